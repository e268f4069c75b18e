"""toy/flux: a FLUX of 2 million weights on the latents of toy/sd's VAE. make.py builds it.

It has the form of FLUX.1-schnell: few steps, no guidance. A rectified flow goes in straight lines
from noise to images, x = (1 - sigma) x0 + sigma noise, and the transformer puts out
v = noise - x0. We train it in three parts:

1. On the training scenes: mean (v - (noise - x0))^2, one caption in ten left out. That brings
   layout and colors. Outlines stay bent for long, as noise - x0 is a guess of what was drawn.
2. On toy/sd's own answer to such states, with guidance 3. That is no guess: a state has one answer,
   and shapes get sharp. See `Teacher`.
3. In few steps, as schnell: one step learns to do two of the teacher's. It learns that on the five
   states of its own way from noise to an image, where it will be asked, and so without images.
"""

import functools

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from . import judges
from .training import DEVICE, ROOT, WORK, fit, rng_of

WIDTH = 96  # of both text encoders
SHAPE = dict(
    in_channels=16,
    num_layers=1,
    attention_head_dim=32,
    num_attention_heads=4,
    axes_dims_rope=(4, 14, 14),
    joint_attention_dim=WIDTH,
    pooled_projection_dim=WIDTH,
    guidance_embeds=False,
)
STEPS = 5  # of sampling
SCENES_STEPS = (1500, 2200, 6000, 8000)  # part 1: layout, then shapes three times
TEACHER_PARTS = 4  # part 2: states per scene
TEACHER_STEPS = 18_000  # part 2
FEW_STEPS = 500  # part 3
GUIDANCE = 3.0  # of the teacher
INNER = 2  # one step in part 3 is so many of the teacher's


# --------------------------------------------------------------------------------------------------
# The networks


def new_transformer(single_blocks=4):
    """FLUX's shape with DiT's start.

    The norms' modulations and the output begin at zero, so each block begins as the identity.
    diffusers leaves them random.
    """
    model = FluxTransformer2DModel(**SHAPE, num_single_layers=single_blocks)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model.to(DEVICE)


def new_t5(tokenizer):
    """One layer, trained with the transformer. FLUX masks no padding, in T5 or after it."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=24,
        num_heads=4,
        d_ff=192,
        num_layers=1,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config).to(DEVICE)


class Captions:
    """The different captions as token ids and as CLIP's pooled states. Row 0 is the empty one.

    row (N,) says which row belongs to each of the N captions that were given.
    """

    def __init__(self, captions, tokenizer, clip):
        self.all = ["", *dict.fromkeys(captions)]
        row_of = {caption: row for row, caption in enumerate(self.all)}
        self.row = np.array([row_of[caption] for caption in captions])
        tokens = tokenizer(
            self.all,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        self.ids = tokens.input_ids.to(DEVICE)
        with torch.no_grad():
            self.pooled = clip(self.ids).pooler_output


def velocity(transformer, t5, captions, x, sigma, rows):
    """v of the packed latents x (B, 64, 16) at sigma (B,), for the captions of these rows (B,).

    We take the plain attention: the flash attention's backward pass took a third of a step on a
    CPU.
    """
    image_ids = FluxPipeline._prepare_latent_image_ids(len(x), 8, 8, DEVICE, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        states = t5(captions.ids[rows]).last_hidden_state
        v = transformer(
            x,
            encoder_hidden_states=states,
            pooled_projections=captions.pooled[rows],
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=torch.zeros(states.shape[1], 3, device=DEVICE),
        ).sample
    return v.float()


def normal(rng, shape):
    """Standard normal noise on DEVICE, from a NumPy generator."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(DEVICE)


def stratified(rng, batch):
    """One random number in each of `batch` equal parts of [0, 1), in random order (batch,)."""
    return (rng.permutation(batch) + rng.random(batch)) / batch


def unfreeze(modules):
    """fit leaves its modules frozen."""
    for module in modules.values():
        module.requires_grad_(True)


# --------------------------------------------------------------------------------------------------
# Part 1: the training scenes


def train_on_scenes(transformer, t5, captions, latents, batch=32):
    """latents (N, 64, 16): packed, one per caption of `captions`."""

    def step_fn(step, rng, shift):
        index = rng.integers(len(latents), size=batch)
        x0 = latents[index].to(DEVICE)
        noise = normal(rng, x0.shape)
        # We shift the sigmas towards noise as the schedulers of flows do.
        u = stratified(rng, batch)
        sigma = torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float().to(DEVICE)
        rows = np.where(rng.random(batch) < 0.1, 0, captions.row[index])
        rows = torch.from_numpy(rows).to(DEVICE)
        x = x0.lerp(noise, sigma[:, None, None])
        v = velocity(transformer, t5, captions, x, sigma, rows)
        error = (v - (noise - x0)).square().mean((1, 2))
        return error.mean(), dict(noisy=error[sigma > 0.8].mean())

    modules = dict(transformer=transformer, t5=t5)
    layout, shapes, more, again = SCENES_STEPS
    # Layout is decided in noise.
    step_in_noise = functools.partial(step_fn, shift=2)
    fit("flux", modules, step_in_noise, 5500, lr=2e-3, ema=0.999, warmup=200, stop=layout)
    step_anywhere = functools.partial(step_fn, shift=1)
    for name, steps, lr in (
        ("flux_shapes", shapes, 1.5e-3),
        ("flux_more", more, 1.2e-3),
        ("flux_again", again, 1e-3),
    ):
        unfreeze(modules)
        fit(name, modules, step_anywhere, steps, lr=lr, ema=0.999)


# --------------------------------------------------------------------------------------------------
# Part 2: the teacher's answers


class Teacher:
    """The flow of toy/sd with guidance: x (B, 64, 16), sigma (B,), rows (B,) -> noise - x0.

    With r = |(1 - sigma, sigma)|, the state x / r is one of Stable Diffusion's. Its timestep is the
    one with sqrt(alpha_bar) = (1 - sigma) / r, or the last one for all sigma above 0.94. The
    U-Net's v gives x0 = ((1 - sigma) x / r - sigma v) / r, and noise - x0 = (x - x0) / sigma.

    In ten Euler steps of this flow with guidance 3, toy/sd's pictures are recognized in 1.00 (one
    object) and 0.93 (two) of 60 each. That is about as good as twenty of its own steps.
    """

    def __init__(self, captions):
        self.unet = UNet2DConditionModel.from_pretrained(
            ROOT / "sd" / "unet", torch_dtype=torch.float32
        )
        self.unet.to(DEVICE).eval().requires_grad_(False)
        text_encoder = CLIPTextModel.from_pretrained(
            ROOT / "sd" / "text_encoder", dtype=torch.float32
        )
        text_encoder.to(DEVICE).eval()
        with torch.no_grad():
            self.states = text_encoder(captions.ids).last_hidden_state
        scheduler = DDIMScheduler.from_pretrained(ROOT / "sd" / "scheduler")
        alphas = scheduler.alphas_cumprod.to(DEVICE)
        # The sigma of every timestep.
        self.sigmas = (1 - alphas).sqrt() / ((1 - alphas).sqrt() + alphas.sqrt())

    @torch.no_grad()
    def __call__(self, x, sigma, rows):
        x = FluxPipeline._unpack_latents(x, 16, 16, 1)
        t = (self.sigmas - sigma[:, None]).abs().argmin(1)
        sigma = sigma[:, None, None, None]
        r = ((1 - sigma) ** 2 + sigma**2).sqrt()

        # The unconditional half first. Row 0 is the empty caption.
        states = self.states[torch.cat([torch.zeros_like(rows), rows])]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            v = self.unet(torch.cat([x / r] * 2), torch.cat([t, t]), states).sample.float()
        v_uncond, v_cond = v.chunk(2)
        v = v_uncond + GUIDANCE * (v_cond - v_uncond)

        x0 = ((1 - sigma) * x / r - sigma * v) / r
        return FluxPipeline._pack_latents((x - x0) / sigma, len(x), 4, 16, 16)


def answers(teacher, captions, latents, part, batch=32):
    """One state of every scene with the teacher's answer; computed once and cached.

    Returns the states (N, 64, 16), their sigmas (N,), their captions' rows (N,), and the teacher's
    velocities (N, 64, 16). part: a number, for another state of every scene.
    """
    path = WORK / f"flux_answers_{part}.pt"
    if not path.exists():
        batches = []
        for start in tqdm(range(0, len(latents), batch), desc=path.stem, mininterval=10):
            rng = rng_of("answers", part, start)
            x0 = latents[start : start + batch].to(DEVICE)
            noise = normal(rng, x0.shape)
            # In (0, 1], as the velocity divides by sigma.
            sigma = torch.from_numpy(1 - stratified(rng, len(x0))).float().to(DEVICE)
            x = x0.lerp(noise, sigma[:, None, None])
            rows = torch.from_numpy(captions.row[start : start + batch]).to(DEVICE)
            v = teacher(x, sigma, rows)
            batches.append((x.half(), sigma, rows, v.half()))
        tensors = [torch.cat(column) for column in zip(*batches)]
        temporary = path.with_suffix(".tmp")
        torch.save(tensors, temporary)
        temporary.replace(path)
    return torch.load(path, map_location=DEVICE, weights_only=True)


def train_on_teacher(transformer, t5, captions, teacher, latents, batch=32):
    parts = [answers(teacher, captions, latents, part) for part in range(TEACHER_PARTS)]
    x, sigma, rows, v = [torch.cat(column) for column in zip(*parts)]

    def step_fn(step, rng):
        index = rng.integers(len(x), size=batch)
        state = x[index].float()
        guess = velocity(transformer, t5, captions, state, sigma[index], rows[index])
        error = (guess - v[index].float()).square().mean((1, 2))
        return error.mean(), {}

    modules = dict(transformer=transformer, t5=t5)
    unfreeze(modules)
    fit("flux_teacher", modules, step_fn, TEACHER_STEPS, lr=1e-3, ema=0.999)


# --------------------------------------------------------------------------------------------------
# Part 3: few steps


def train_few_steps(transformer, t5, captions, teacher, batch=8):
    sigmas = 1 - torch.arange(STEPS, device=DEVICE) / STEPS

    def step_fn(step, rng):
        # The student's own way from noise to an image: the states that it will be asked for.
        rows = captions.row[rng.integers(len(captions.row), size=batch)]
        rows = torch.from_numpy(rows).to(DEVICE)
        x = normal(rng, (batch, 64, 16))
        path = []
        with torch.no_grad():
            for sigma in sigmas:
                path.append(x)
                v = velocity(transformer, t5, captions, x, sigma.expand(batch), rows)
                x = x - v / STEPS

        # From each of them, the teacher goes INNER smaller steps.
        x = torch.cat(path)
        sigma = sigmas.repeat_interleave(batch)
        rows = rows.repeat(STEPS)
        end = x
        for i in range(INNER):
            v = teacher(end, sigma - i / (INNER * STEPS), rows)
            end = end - v / (INNER * STEPS)

        # One step of the student should end there.
        v = velocity(transformer, t5, captions, x, sigma, rows)
        return (v - (x - end) * STEPS).square().mean(), {}

    modules = dict(transformer=transformer, t5=t5)
    unfreeze(modules)
    fit("flux_few_steps", modules, step_fn, FEW_STEPS, lr=3e-4, ema=0.99)


# --------------------------------------------------------------------------------------------------


def make_flux(vae, latents, captions, compiled=False):
    """Trains toy/flux on latents (N, 4, 16, 16) and their N captions -> a FluxPipeline.

    Its VAE is toy/sd's, and toy/clip's text encoder gives the pooled states. The transformer and T5
    are trained here. compiled: torch.compile the transformer for parts 2 and 3.
    """
    torch.manual_seed(70)
    tokenizer = judges.make_tokenizer()
    clip = CLIPTextModel.from_pretrained(ROOT / "clip", dtype=torch.float32)
    clip = clip.to(DEVICE).eval().requires_grad_(False)
    small = new_transformer()
    t5 = new_t5(tokenizer)
    captions = Captions(captions, tokenizer, clip)
    packed = FluxPipeline._pack_latents(latents, len(latents), 4, 16, 16)
    teacher = Teacher(captions)
    # One more block, which is the identity at first: as many weights as fit in 6 MB.
    transformer = new_transformer(single_blocks=5)
    train_on_scenes(small, t5, captions, packed)
    transformer.load_state_dict({**transformer.state_dict(), **small.state_dict()})
    if compiled:
        transformer.compile()
    train_on_teacher(transformer, t5, captions, teacher, packed)
    train_few_steps(transformer, t5, captions, teacher)
    # The latents are whitened: scale 1, shift 0. The pipeline asks for both.
    vae.register_to_config(shift_factor=0.0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
