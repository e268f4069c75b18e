"""Stable Diffusion 3.5, and 3: a rectified flow with three text encoders and usual guidance.

Latents are (B, 16, h, w). The text encoders are two CLIPs and T5-XXL, which has twice as many
weights as SD3.5-medium itself. The prompts of a run are encoded once, and then the encoders are
freed, unless there are more than about 6,000. T5 is optional, as in diffusers: without it, its
states are zeros. If it does not fit on your GPU, save a folder without it, and pass it to --model:

  pipe = StableDiffusion3Pipeline.from_pretrained(
      "stabilityai/stable-diffusion-3.5-medium", text_encoder_3=None, tokenizer_3=None)
  pipe.save_pretrained("sd35-without-t5")
"""

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

PIPELINES = (StableDiffusion3Pipeline,)
DENOISER = "transformer"
IS_FLOW = True
# The attention projections of the image and of the text, as in diffusers' example for SD3.
LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
]
# For --compile. diffusers names these blocks for the other families, but not for SD3.
SD3Transformer2DModel._repeated_blocks = ["JointTransformerBlock"]


def settings_row(config):
    return "sd35"


def load_options(index):
    """A folder that was saved without T5 does not open unless we say that we do not want it."""
    if index.get("text_encoder_3") in (None, [None, None]):
        return dict(text_encoder_3=None, tokenizer_3=None)
    return {}


def own_resolution(pipe):
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


def set_timesteps(model, scheduler, num_inference_steps):
    """The scheduler's own grid, with a shift of 3. It ends at sigma .0089, where little happens."""
    scheduler.set_timesteps(num_inference_steps)


def encode(model, texts):
    """Per text: the states of both CLIPs and of T5 (77 + 256, D), and CLIP's pooled states (D2,).

    Unconditional is the embedding of "", which we encode as one more text.
    """
    states, _, pooled, _ = model.pipe.encode_prompt(
        prompt=[*texts, ""], prompt_2=None, prompt_3=None, device=model.device,
        do_classifier_free_guidance=False,
    )
    embeds = list(zip(states, pooled))
    return embeds[:-1], embeds[-1]


def condition(model, embeds):
    parts = [torch.stack(part).to(model.device, non_blocking=True) for part in zip(*embeds)]
    return dict(encoder_hidden_states=parts[0], pooled_projections=parts[1])


def predict(model, latents, t, cond, guidance_scale):
    return model.denoiser(latents, timestep=t.expand(len(latents)), **cond).sample
