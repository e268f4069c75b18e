"""Z-Image: a rectified flow with Qwen3 as its text encoder, and prompts of any length.

Latents are (B, 16, h, w), of FLUX's VAE. There are three surprises. The transformer takes
1 - sigma, the share of the image, and returns x0 - noise. It takes lists, with one image and one
prompt in each place. And its pipeline's guidance_scale is ours minus 1, so 4 there is 5 here.
"""

import torch
from diffusers import ZImagePipeline

PIPELINES = (ZImagePipeline,)
DENOISER = "transformer"
IS_FLOW = True
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # the attention projections


def settings_row(config):
    return "z-image"


def load_options(index):
    return {}


def own_resolution(pipe):
    return pipe.vae.config.sample_size


def set_timesteps(model, scheduler, num_inference_steps):
    """The scheduler shifts these sigmas by its constant, which is 6 for the base model."""
    sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
    scheduler.set_timesteps(sigmas=sigmas)


def encode(model, texts):
    """Per text: the states (tokens, D) of Qwen3's last layer but one, without padding.

    Unconditional is the embedding of "", which we encode as one more text.
    """
    embeds = []
    # One text at a time: the pipeline pads each to 512 tokens, and keeps the states of all 36
    # layers, which would take 6 GB for 64 texts.
    for text in [*texts, ""]:
        (states,), _ = model.pipe.encode_prompt(
            [text], device=model.device, do_classifier_free_guidance=False
        )
        embeds.append((states,))
    return embeds[:-1], embeds[-1]


def condition(model, embeds):
    """The prompts' tokens, one prompt after the other, so that no result depends on padding."""
    states = [states for (states,) in embeds]
    return dict(
        states=torch.cat(states).to(model.device, non_blocking=True),  # (tokens of all prompts, D)
        # (B,), on the CPU, where `predict` can read them without waiting for the GPU.
        lengths=torch.tensor([len(part) for part in states]),
    )


def predict(model, latents, t, cond, guidance_scale):
    images = latents.unsqueeze(2).unbind()  # B times (C, 1, h, w): each is one frame
    prompts = cond["states"].split(cond["lengths"].tolist())
    share = (1000 - t.float().expand(len(latents))) / 1000
    output = model.denoiser(list(images), share, list(prompts)).sample
    return -torch.stack(output).squeeze(2)
