"""Stable Diffusion 1.x, 2.x and SDXL: U-Nets that predict the noise, or v.

Latents are (B, 4, h, w), and timesteps run from 999 down to 0. SDXL has a second text encoder,
whose pooled state goes into the time embedding, together with the size of the image.
"""

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

PIPELINES = (StableDiffusionPipeline, StableDiffusionXLPipeline)
DENOISER = "unet"
IS_FLOW = False
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # the attention projections


def settings_row(config):
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"


def load_options(index):
    """SD's safety checker would make some images black. Its folder need not be there."""
    if index["_class_name"] == "StableDiffusionXLPipeline":
        return {}
    return dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def own_resolution(pipe):
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def set_timesteps(model, scheduler, num_inference_steps):
    scheduler.set_timesteps(num_inference_steps)


def encode(model, texts):
    """Per text: CLIP's states (77, D) and, with SDXL, the second CLIP's pooled state (D2,).

    Unconditional are zeros for SDXL, as in its pipeline, and the embedding of "" otherwise.
    """
    out = model.pipe.encode_prompt(
        prompt=texts, device=model.device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    if len(out) == 2:
        states, uncond_states = out
        return list(zip(states)), (uncond_states[0],)
    states, uncond_states, pooled, uncond_pooled = out
    return list(zip(states, pooled)), (uncond_states[0], uncond_pooled[0])


def condition(model, embeds):
    parts = [torch.stack(part).to(model.device, non_blocking=True) for part in zip(*embeds)]
    cond = dict(encoder_hidden_states=parts[0])  # (B, 77, D)
    if len(parts) == 2:
        # SDXL is also told the original size, the crop's corner and the target size.
        size = model.resolution
        sizes = torch.tensor([[size, size, 0, 0, size, size]]).to(parts[0])
        time_ids = sizes.expand(len(embeds), -1)
        cond["added_cond_kwargs"] = dict(text_embeds=parts[1], time_ids=time_ids)
    return cond


def predict(model, latents, t, cond, guidance_scale):
    return model.denoiser(latents, t, **cond).sample
