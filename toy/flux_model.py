"""toy/flux: a FLUX of 2 million weights on the latents of toy/sd's VAE, in the form of FLUX.1-schnell: few steps, no guidance. See make.py.

A rectified flow goes in straight lines from noise to images: x = (1 - sigma) x0 + sigma noise, and the transformer puts out v = noise - x0. It is
trained in three parts:

1. On the training scenes: mean (v - (noise - x0))^2, one caption in ten left out. That brings layout and colours; outlines stay bent for long, as
   noise - x0 is a guess of what was drawn.
2. On toy/sd's own answer, with guidance 3, to such states. It is no guess: a state has one answer, and shapes get sharp. See `Teacher`.
3. In few steps, as schnell: to do two of the teacher's steps in one. It learns that on the five states of its own way from noise to an image, where
   it will be asked, and so without images.
"""
import functools

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from . import judges
from .training import DEVICE, ROOT, WORK, fit, rng_of

WIDTH = 96                                                       # of both text encoders
SHAPE = dict(in_channels=16, num_layers=1, attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(4, 14, 14),
             joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False)
STEPS = 5                                                        # of sampling
SCENES_STEPS = (1500, 2200, 6000, 8000)                          # part 1: layout; shapes, three times
TEACHER_PARTS, TEACHER_STEPS, FEW_STEPS = 4, 18_000, 500         # part 2: states per scene, steps; part 3
GUIDANCE, INNER = 3., 2                                          # of the teacher; a step in part 3 is so many of the teacher's


def new_transformer(single_blocks=4):
    """FLUX's shape with DiT's start: the norms' modulations and the output begin at zero, each block as the identity. diffusers leaves them random."""
    model = FluxTransformer2DModel(**SHAPE, num_single_layers=single_blocks)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model.to(DEVICE)


def new_t5(tokenizer):
    """One layer, trained with the transformer. FLUX masks no padding, neither in T5 nor after it."""
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=24, num_heads=4, d_ff=192, num_layers=1, dropout_rate=0.,
                                   feed_forward_proj="gated-gelu", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)).to(DEVICE)


class Captions:
    """The captions as token ids and as CLIP's pooled states, a row each; row 0 is the empty one."""

    def __init__(self, captions, tokenizer, clip):
        self.all = ["", *dict.fromkeys(captions)]
        where = {caption: row for row, caption in enumerate(self.all)}
        self.row = np.array([where[c] for c in captions])
        self.ids = tokenizer(self.all, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids.to(DEVICE)
        with torch.no_grad():
            self.pooled = clip(self.ids).pooler_output


def velocity(transformer, t5, captions, x, sigma, rows):
    """v of the packed latents x (B, 64, 16) at sigma (B,), for the captions of these rows.

    The plain attention: on a CPU the flash attention's backward pass took a third of a step."""
    ids = FluxPipeline._prepare_latent_image_ids(len(x), 8, 8, DEVICE, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        states = t5(captions.ids[rows]).last_hidden_state
        return transformer(x, encoder_hidden_states=states, pooled_projections=captions.pooled[rows], timestep=sigma, img_ids=ids,
                           txt_ids=torch.zeros(states.shape[1], 3, device=DEVICE)).sample.float()


def train_on(modules):
    """fit leaves its modules frozen."""
    for module in modules.values():
        module.requires_grad_(True)


def train_on_scenes(transformer, t5, captions, latents, batch=32):
    def step_fn(step, rng, shift):
        index = rng.integers(len(latents), size=batch)
        x0, noise = latents[index].to(DEVICE), torch.from_numpy(rng.standard_normal(latents[index].shape, dtype=np.float32)).to(DEVICE)
        u = (rng.permutation(batch) + rng.random(batch)) / batch                          # stratified
        sigma = torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float().to(DEVICE)    # as the schedulers of flows shift their sigmas
        rows = torch.from_numpy(np.where(rng.random(batch) < .1, 0, captions.row[index])).to(DEVICE)
        x = x0.lerp(noise, sigma[:, None, None])
        error = (velocity(transformer, t5, captions, x, sigma, rows) - (noise - x0)).square().mean((1, 2))
        return error.mean(), dict(noisy=error[sigma > .8].mean())

    modules, (layout, shapes, more, again) = dict(transformer=transformer, t5=t5), SCENES_STEPS
    fit("flux", modules, functools.partial(step_fn, shift=2), 5500, lr=2e-3, ema=.999, warmup=200, stop=layout)        # layout is decided in noise
    for name, steps, lr in (("flux_shapes", shapes, 1.5e-3), ("flux_more", more, 1.2e-3), ("flux_again", again, 1e-3)):
        train_on(modules)
        fit(name, modules, functools.partial(step_fn, shift=1), steps, lr=lr, ema=.999)


class Teacher:
    """The flow of toy/sd with guidance: x (B, 64, 16), sigma (B,), the captions' rows -> noise - x0 (B, 64, 16).

    With r = |(1 - sigma, sigma)| the state x / r is one of Stable Diffusion's: sqrt(alpha_bar) = (1 - sigma) / r names its timestep, the last one for
    all sigma above .94. The U-Net's v gives x0 = ((1 - sigma) x / r - sigma v) / r, and noise - x0 = (x - x0) / sigma. In ten Euler steps of this
    flow, guidance 3, toy/sd's pictures are recognised in 1.00 (one object) and .93 (two) of 60 each: about as good as in twenty of its own."""

    def __init__(self, captions):
        self.unet = UNet2DConditionModel.from_pretrained(ROOT / "sd" / "unet", torch_dtype=torch.float32).to(DEVICE).eval().requires_grad_(False)
        text_encoder = CLIPTextModel.from_pretrained(ROOT / "sd" / "text_encoder", dtype=torch.float32).to(DEVICE).eval()
        with torch.no_grad():
            self.states = text_encoder(captions.ids).last_hidden_state
        alphas = DDIMScheduler.from_pretrained(ROOT / "sd" / "scheduler").alphas_cumprod.to(DEVICE)
        self.sigmas = (1 - alphas).sqrt() / ((1 - alphas).sqrt() + alphas.sqrt())

    @torch.no_grad()
    def __call__(self, x, sigma, rows):
        x = FluxPipeline._unpack_latents(x, 16, 16, 1)
        t, sigma = (self.sigmas - sigma[:, None]).abs().argmin(1), sigma[:, None, None, None]
        r = ((1 - sigma) ** 2 + sigma ** 2).sqrt()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            v = self.unet(torch.cat([x / r] * 2), torch.cat([t, t]), self.states[torch.cat([torch.zeros_like(rows), rows])]).sample.float()
        without, with_caption = v.chunk(2)
        v = without + GUIDANCE * (with_caption - without)
        x0 = ((1 - sigma) * x / r - sigma * v) / r
        return FluxPipeline._pack_latents((x - x0) / sigma, len(x), 4, 16, 16)


def answers(teacher, captions, latents, part, batch=32):
    """A state of every scene (N, 64, 16), its sigma (N,), its caption's row (N,) and the teacher's velocity; computed once and cached."""
    path = WORK / f"flux_answers_{part}.pt"
    if not path.exists():
        out = []
        for start in tqdm(range(0, len(latents), batch), desc=path.stem, mininterval=10):
            rng, x0 = rng_of("answers", part, start), latents[start:start + batch].to(DEVICE)
            noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(DEVICE)
            sigma = torch.from_numpy(1 - (rng.permutation(len(x0)) + rng.random(len(x0))) / len(x0)).float().to(DEVICE)      # in (0, 1], stratified
            x, rows = x0.lerp(noise, sigma[:, None, None]), torch.from_numpy(captions.row[start:start + batch]).to(DEVICE)
            out.append((x.half(), sigma, rows, teacher(x, sigma, rows).half()))
        torch.save([torch.cat(tensors) for tensors in zip(*out)], path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return torch.load(path, map_location=DEVICE, weights_only=True)


def train_on_teacher(transformer, t5, captions, teacher, latents, batch=32):
    x, sigma, rows, v = (torch.cat(tensors) for tensors in zip(*(answers(teacher, captions, latents, part) for part in range(TEACHER_PARTS))))

    def step_fn(step, rng):
        index = rng.integers(len(x), size=batch)
        error = (velocity(transformer, t5, captions, x[index].float(), sigma[index], rows[index]) - v[index].float()).square().mean((1, 2))
        return error.mean(), {}

    modules = dict(transformer=transformer, t5=t5)
    train_on(modules)
    fit("flux_teacher", modules, step_fn, TEACHER_STEPS, lr=1e-3, ema=.999)


def train_few_steps(transformer, t5, captions, teacher, batch=8):
    sigmas = 1 - torch.arange(STEPS, device=DEVICE) / STEPS

    def step_fn(step, rng):
        rows = torch.from_numpy(captions.row[rng.integers(len(captions.row), size=batch)]).to(DEVICE)
        x = torch.from_numpy(rng.standard_normal((batch, 64, 16), dtype=np.float32)).to(DEVICE)
        path = []
        with torch.no_grad():
            for sigma in sigmas:                                 # its own way
                path.append(x)
                x = x - velocity(transformer, t5, captions, x, sigma.expand(batch), rows) / STEPS
        x, sigma, rows = torch.cat(path), sigmas.repeat_interleave(batch), rows.repeat(STEPS)
        end = x
        for i in range(INNER):
            end = end - teacher(end, sigma - i / (INNER * STEPS), rows) / (INNER * STEPS)
        loss = (velocity(transformer, t5, captions, x, sigma, rows) - (x - end) * STEPS).square().mean()
        return loss, {}

    modules = dict(transformer=transformer, t5=t5)
    train_on(modules)
    fit("flux_few_steps", modules, step_fn, FEW_STEPS, lr=3e-4, ema=.99)


def make_flux(vae, latents, captions, compiled=False):
    """-> FluxPipeline: toy/sd's VAE, toy/clip's text encoder for the pooled states, and the two networks trained here."""
    torch.manual_seed(70)
    tokenizer = judges.make_tokenizer()
    clip = CLIPTextModel.from_pretrained(ROOT / "clip", dtype=torch.float32).to(DEVICE).eval().requires_grad_(False)
    small, t5, captions = new_transformer(), new_t5(tokenizer), Captions(captions, tokenizer, clip)
    packed, teacher = FluxPipeline._pack_latents(latents, len(latents), 4, 16, 16), Teacher(captions)
    transformer = new_transformer(single_blocks=5)               # one more block, the identity at first: as many weights as fit in 6 MB
    train_on_scenes(small, t5, captions, packed)
    transformer.load_state_dict(transformer.state_dict() | small.state_dict())
    if compiled:
        transformer.compile()
    train_on_teacher(transformer, t5, captions, teacher, packed)
    train_few_steps(transformer, t5, captions, teacher)
    vae.register_to_config(shift_factor=0.)                      # its latents are whitened: scale 1, shift 0; the pipeline asks for both
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5,
                        tokenizer_2=tokenizer, transformer=transformer)
