"""FLUX.1-schnell and FLUX.1-dev: rectified flows that see an image as tokens of 2 x 2 latents.

Latents are (B, 16, h, w). Dev takes the guidance scale as an input, instead of a second pass, and
shifts its sigmas: the more tokens an image has, the larger the shift. Both are distilled.
"""

import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

PIPELINES = (FluxPipeline,)
DENOISER = "transformer"
IS_FLOW = True
# The attention projections, but for the text's own in the double blocks.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def settings_row(config):
    return "flux-dev" if config.get("guidance_embeds") else "flux-schnell"


def load_options(index):
    return {}


def own_resolution(pipe):
    return pipe.vae.config.sample_size


def set_timesteps(model, scheduler, num_inference_steps):
    sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
    num_tokens = model.latent_shape[1] * model.latent_shape[2] // 4
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(num_tokens, *(scheduler.config[key] for key in keys))
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)


def encode(model, texts):
    """Per text: T5's states (256 or 512, D) and CLIP's pooled state (D2,).

    FLUX has no unconditional prompt, so we encode "" as one more text.
    """
    # 256 tokens with schnell and 512 with dev.
    length = min(512 if model.takes_guidance else 256, model.pipe.tokenizer_2.model_max_length)
    states, pooled, _ = model.pipe.encode_prompt(
        prompt=[*texts, ""], prompt_2=None, max_sequence_length=length, device=model.device
    )
    embeds = list(zip(states, pooled))
    return embeds[:-1], embeds[-1]


def condition(model, embeds):
    parts = [torch.stack(part).to(model.device, non_blocking=True) for part in zip(*embeds)]
    return dict(encoder_hidden_states=parts[0], pooled_projections=parts[1])


def predict(model, latents, t, cond, guidance_scale):
    """Packs latents (B, C, h, w) into tokens of 2 x 2, calls FLUX, and unpacks its output."""
    batch_size, channels, height, width = latents.shape
    device = latents.device
    packed = FluxPipeline._pack_latents(latents, batch_size, channels, height, width)
    image_ids = FluxPipeline._prepare_latent_image_ids(
        batch_size, height // 2, width // 2, device, torch.float32
    )
    text_ids = torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=device)
    guidance = None
    if model.takes_guidance:
        guidance = torch.full((batch_size,), float(guidance_scale), device=device)
    output = model.denoiser(
        packed,
        timestep=t.float().expand(batch_size) / 1000,
        guidance=guidance,
        img_ids=image_ids,
        txt_ids=text_ids,
        **cond,
    ).sample
    # The last argument is the VAE's scale: 1, because height and width are in latents.
    return FluxPipeline._unpack_latents(output, height, width, 1)
