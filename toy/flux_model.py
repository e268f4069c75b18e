"""toy/flux: a FLUX of 1.7 million weights on the latents of toy/sd's VAE, in the form of FLUX.1-schnell: few steps, no guidance. See make.py.

A rectified flow goes in straight lines from noise to images: x = (1 - sigma) x0 + sigma noise, and the transformer puts out v = noise - x0. It is
trained twice, as schnell was:

1. The teacher, on the training scenes: mean (v - (noise - x0))^2, one caption in ten left out, for guidance. Its paths are bent, so that it needs
   some twenty steps, twice each.
2. The student starts as the teacher and learns to do four guided steps of the teacher in one. It learns that on the five states of its own way from
   noise to an image, where it will be asked, and so without images.
"""
import copy
import functools

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from . import judges
from .training import DEVICE, ROOT, fit

WIDTH = 96                                                       # of both text encoders
SHAPE = dict(in_channels=16, num_layers=1, num_single_layers=4, attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(4, 14, 14),
             joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False)
STEPS = 5                                                        # of sampling
TEACHER_STEPS, STUDENT_STEPS = (1500, 2200, 6000, 8000), 240    # layout; shapes, three times
GUIDANCE, INNER = 3., 4                                          # the student's step is so many of the teacher, with this guidance


def new_transformer():
    """FLUX's shape with DiT's start: the norms' modulations and the output begin at zero, each block as the identity. diffusers leaves them random."""
    model = FluxTransformer2DModel(**SHAPE)
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


def train_teacher(transformer, t5, captions, latents, batch=32):
    def step_fn(step, rng, shift):
        index = rng.integers(len(latents), size=batch)
        x0, noise = latents[index].to(DEVICE), torch.from_numpy(rng.standard_normal(latents[index].shape, dtype=np.float32)).to(DEVICE)
        u = (rng.permutation(batch) + rng.random(batch)) / batch                          # stratified
        sigma = torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float().to(DEVICE)    # as the schedulers of flows shift their sigmas
        rows = torch.from_numpy(np.where(rng.random(batch) < .1, 0, captions.row[index])).to(DEVICE)
        x = x0.lerp(noise, sigma[:, None, None])
        error = (velocity(transformer, t5, captions, x, sigma, rows) - (noise - x0)).square().mean((1, 2))
        return error.mean(), dict(noisy=error[sigma > .8].mean())

    modules, (layout, shapes, more, again) = dict(transformer=transformer, t5=t5), TEACHER_STEPS
    fit("flux", modules, functools.partial(step_fn, shift=2), 5500, lr=2e-3, ema=.999, warmup=200, stop=layout)        # layout is decided in noise
    for name, steps, lr in (("flux_shapes", shapes, 1.5e-3), ("flux_more", more, 1.2e-3), ("flux_again", again, 1e-3)):
        train_on(modules)
        fit(name, modules, functools.partial(step_fn, shift=1), steps, lr=lr, ema=.999)


def train_student(transformer, t5, captions, batch=8):
    teacher, teacher_t5 = copy.deepcopy(transformer), copy.deepcopy(t5)
    sigmas = 1 - torch.arange(STEPS, device=DEVICE) / STEPS

    @torch.no_grad()
    def guided(x, sigma, rows):
        u, c = velocity(teacher, teacher_t5, captions, torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([torch.zeros_like(rows), rows])).chunk(2)
        return u + GUIDANCE * (c - u)

    def step_fn(step, rng):
        rows = torch.from_numpy(captions.row[rng.integers(len(captions.row), size=batch)]).to(DEVICE)
        x = torch.from_numpy(rng.standard_normal((batch, 64, 16), dtype=np.float32)).to(DEVICE)
        path = []
        with torch.no_grad():
            for sigma in sigmas:                                 # the student's own way
                path.append(x)
                x = x - velocity(transformer, t5, captions, x, sigma.expand(batch), rows) / STEPS
        x, sigma, rows = torch.cat(path), sigmas.repeat_interleave(batch), rows.repeat(STEPS)
        end = x
        for i in range(INNER):
            end = end - guided(end, sigma - i / (INNER * STEPS), rows) / (INNER * STEPS)
        loss = (velocity(transformer, t5, captions, x, sigma, rows) - (x - end) * STEPS).square().mean()
        return loss, {}

    modules = dict(transformer=transformer, t5=t5)
    train_on(modules)
    fit("flux_student", modules, step_fn, STUDENT_STEPS, lr=3e-4, ema=.99)


def make_flux(vae, latents, captions):
    """-> FluxPipeline: toy/sd's VAE, toy/clip's text encoder for the pooled states, and the two networks trained here."""
    torch.manual_seed(70)
    tokenizer = judges.make_tokenizer()
    clip = CLIPTextModel.from_pretrained(ROOT / "clip", dtype=torch.float32).to(DEVICE).eval().requires_grad_(False)
    transformer, t5, captions = new_transformer(), new_t5(tokenizer), Captions(captions, tokenizer, clip)
    packed = FluxPipeline._pack_latents(latents, len(latents), 4, 16, 16)
    train_teacher(transformer, t5, captions, packed)
    train_student(transformer, t5, captions)
    vae.register_to_config(shift_factor=0.)                      # its latents are whitened: scale 1, shift 0; the pipeline asks for both
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5,
                        tokenizer_2=tokenizer, transformer=transformer)
