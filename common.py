"""What every script shares: model loading, gradient-truncated sampling, and LoRA setup.

This file is thin on purpose. Losses, default hyperparameters, and the choice of the steps that
carry the gradient belong in the scripts. What is particular to a family of models is in models/.

  model     = load_model("sdxl", device)                       a frozen pipeline and its denoiser
  params    = make_trainable(model, lora_rank=32)               its LoRA, in fp32
  scheduler = make_scheduler(model, "ddpm", 40)
  latents   = sample(model, scheduler, x_T, cond, 0, 30, ...)   steps 0 .. 29, without gradients
  x0        = predict_x0(scheduler, denoise(model, latents, t, cond), t, latents)
  images    = decode(model, x0)                                 (B, 3, H, W) in [0, 1]

Latents are (B, C, h, w) in fp32 everywhere, even for FLUX. Timesteps fall from at most 1000.
"""

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from models import FAMILIES
from models.hub import find_pipeline, load_text_encoders, split_revision, weight_variant
from models.lora import load_lora, save_lora

diffusers.logging.disable_progress_bar()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent
TOY = ROOT / "toy"


def generator(seed, purpose, *index):
    """A CPU generator for one purpose, for example generator(seed, "train", update, i).

    Every random draw in a run comes from such a generator, never from the global one. So the noise
    does not depend on the batch size, the micro-batch or the device, and a checkpoint needs no
    random state.
    """
    digest = hashlib.blake2b(repr((seed, purpose, *index)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def pick_device(name):
    """ "auto", "cpu", "cuda" or "cuda:1" -> torch.device.

    torchrun numbers its processes in LOCAL_RANK, and each takes the GPU of that number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {name}: torch sees no CUDA device on this machine; use --device cpu")
    return device


# --------------------------------------------------------------------------------------------------
# Models


@dataclass
class Model:
    """A text-to-image model: a diffusers pipeline, and the network in it that we train."""

    pipe: object  # holds the VAE, the scheduler's config and the text encoders
    denoiser: torch.nn.Module  # pipe.unet or pipe.transformer
    source: str  # folder, or hub id with commit
    device: torch.device
    dtype: torch.dtype  # of the frozen weights: bf16 on CUDA, fp32 on a CPU
    resolution: int  # pixels
    full_base: torch.nn.Module = None  # the base denoiser, if `denoiser` is a full fine-tune
    embeds: dict = field(default_factory=dict)  # prompt -> its embeddings, on the CPU
    lora_is_merged: bool = False  # true inside `with merged(model)`

    @property
    def vae(self):
        return self.pipe.vae

    @property
    def latent_shape(self):
        """(C, h, w) of one image's latents."""
        side = self.resolution // self.pipe.vae_scale_factor
        return (self.vae.config.latent_channels, side, side)

    @property
    def family(self):
        """The module of models/ that knows this model's particulars."""
        return FAMILIES[type(self.pipe)]

    @property
    def is_flow(self):
        """Whether this is a rectified flow (FLUX, SD3.5, Z-Image) instead of a diffusion model.

        Then x_t = (1 - sigma) x0 + sigma noise, t = 1000 sigma, and the output is noise - x0.
        """
        return self.family.IS_FLOW

    @property
    def takes_guidance(self):
        """Whether guidance is an input of the network (FLUX.1-dev) instead of a second pass."""
        return self.denoiser.config.get("guidance_embeds", False)

    @property
    def denoiser_name(self):
        """The denoiser's folder in the diffusers format, and its prefix in a LoRA file."""
        return self.family.DENOISER

    def save(self, folder):
        """Writes the LoRA so that pipe.load_lora_weights(folder) loads it, or the full denoiser."""
        if hasattr(self.denoiser, "peft_config"):
            save_lora(self, folder)
        else:
            self.denoiser.save_pretrained(Path(folder) / self.denoiser_name)


def load_model(name, device, resolution=None, full=False):
    """Loads a model of one of the families in models/, frozen and in eval mode.

    name: a key of MODELS, a folder in the diffusers format, or "owner/name@revision".
    resolution: in pixels; by default the model's own.
    full: keep the denoiser in fp32 on every device, to train all of its weights.
    """
    pipeline_class, index_path = find_pipeline(name)
    family = FAMILIES[pipeline_class]
    repo, revision = split_revision(name)
    if full and family.IS_FLOW:
        sys.exit(f"--lora_rank 0 is for U-Nets; {name} is too large to train whole, so use a LoRA")

    index = json.loads(index_path.read_text())
    variant = None if full else weight_variant(repo, revision, index_path)
    options = dict(revision=revision, use_safetensors=True, variant=variant)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"default": dtype, family.DENOISER: torch.float32 if full else dtype}
    try:
        parts = load_text_encoders(repo, index, dtype, options)
        parts.update(family.load_options(index))
        pipe = pipeline_class.from_pretrained(repo, dtype=dtypes, **parts, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"--model {name}: {type(error).__name__}: {error}")
    pipe.set_progress_bar_config(disable=True)

    memory_format = torch.channels_last if device.type == "cuda" else torch.preserve_format
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            # diffusers silently leaves a weight without data if the files do not have it.
            for key, weight in part.named_parameters():
                if weight.is_meta:
                    sys.exit(f"--model {name}: the weights of its {type(part).__name__} lack {key}")
            part.requires_grad_(False).eval().to(device, memory_format=memory_format)

    denoiser = getattr(pipe, family.DENOISER)
    own_resolution = family.own_resolution(pipe)
    resolution = resolution or own_resolution
    multiple = 8 * pipe.vae_scale_factor
    if resolution % multiple and resolution != own_resolution:
        sys.exit(f"--resolution {resolution}: it must be a multiple of {multiple}")
    # A hub model is identified by its commit, so that config.json says exactly what was loaded.
    source = repo if os.path.isdir(repo) else f"{repo}@{index_path.parent.name}"
    return Model(pipe, denoiser, source, device, dtype, resolution)


# --------------------------------------------------------------------------------------------------
# Sampling


def denoise(model, latents, t, cond, guidance_scale=1.0, uncond=None):
    """Calls the denoiser on latents (B, C, h, w) at timestep t, a scalar or (B,) -> its output.

    A guidance_scale other than 1 needs `uncond`, also of B prompts, and runs both halves in one
    batch: u + w (c - u).
    FLUX.1-dev takes the guidance scale as an input instead.
    """
    if model.lora_is_merged and torch.is_grad_enabled():
        raise RuntimeError("a merged LoRA gets no gradient: leave `with merged(model)` first")
    # The copy must not block, so that the CPU can keep queueing work while the GPU is busy. (The
    # noise of diffusers' DDPM and DDIM steps still does.)
    t = t.to(latents.device, non_blocking=True)
    predict = model.family.predict
    # fp32 LoRA weights meet bf16 activations here. Autocast caches the weights it casts, so every
    # call opens its own: a weight cached without gradients must not be reused with gradients.
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        if guidance_scale == 1 or model.takes_guidance:
            return predict(model, latents, t, cond, guidance_scale).float()
        both = concatenate(uncond, cond)
        t_twice = t if t.ndim == 0 else torch.cat([t, t])
        output = predict(model, torch.cat([latents, latents]), t_twice, both, guidance_scale)
    output_uncond, output_cond = output.float().chunk(2)
    return output_uncond + guidance_scale * (output_cond - output_uncond)


def concatenate(first, second):
    """Two nested dicts of tensors -> one, joined along the batch."""
    joined = {}
    for key, value in first.items():
        if isinstance(value, dict):
            joined[key] = concatenate(value, second[key])
        else:
            joined[key] = torch.cat([value, second[key]])
    return joined


def make_scheduler(model, kind, num_inference_steps):
    """A diffusers scheduler on the model's own noise schedule.

    kind: "ddpm" (ancestral) or "ddim", or "euler" for flows. DDPM and DDIM have leading spacing
    and offset 1, so their last timestep is 1 and their last step hardly changes the image.
    """
    if (kind == "euler") != model.is_flow:
        sys.exit(f"scheduler {kind} does not fit {model.source}: flows, and only they, need euler")
    config = model.pipe.scheduler.config
    if model.is_flow:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    else:
        scheduler_class = dict(ddpm=DDPMScheduler, ddim=DDIMScheduler)[kind]
        grid = dict(timestep_spacing="leading", steps_offset=1)
        scheduler = scheduler_class.from_config(
            config, clip_sample=False, thresholding=False, **grid
        )
    model.family.set_timesteps(model, scheduler, num_inference_steps)
    return scheduler


def initial_latents(model, generators):
    """N(0, I) noise, one generator per image -> (B, C, h, w) on the model's device.

    It is used for x_T and wherever else a script needs noise in the shape of latents.
    """
    noise = [torch.randn(model.latent_shape, generator=g) for g in generators]
    return torch.stack(noise).to(model.device)


def sample(
    model, scheduler, latents, cond, first, last, generators,
    guidance_scale=1.0, uncond=None, eta=0.0, grad=False,
):
    """Runs the scheduler's steps first .. last - 1; returns `latents` itself if there are none.

    Gradient-truncated sampling takes two calls: the prefix with grad=False, then the last steps
    with grad=True. Step noise comes from `generators`, one per image, and continues from call to
    call.
    """
    with torch.set_grad_enabled(grad):
        for t in scheduler.timesteps[first:last]:
            noise_pred = denoise(model, latents, t, cond, guidance_scale, uncond)
            latents = scheduler_step(scheduler, noise_pred, t, latents, generators, eta)
    return latents


def scheduler_step(scheduler, noise_pred, t, latents, generators, eta=0.0):
    """One step of the scheduler from timestep t. Only DDIM uses eta; Euler adds no noise."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # diffusers' own step() starts counting at zero, but we may start at any step.
        i = (scheduler.timesteps == t).nonzero().item()
        sigma_change = (scheduler.sigmas[i + 1] - scheduler.sigmas[i]).item()
        return latents + sigma_change * noise_pred
    options = dict(eta=eta) if isinstance(scheduler, DDIMScheduler) else {}
    return scheduler.step(noise_pred, t, latents, generator=generators, **options).prev_sample


def predict_x0(scheduler, noise_pred, t, latents):
    """The clean latents that the model's output at timestep t implies, differentiable."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return latents - t.to(latents) / 1000 * noise_pred
    alpha_bar = scheduler.alphas_cumprod[t].to(latents)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return (latents - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * latents - (1 - alpha_bar).sqrt() * noise_pred
    raise ValueError(f"prediction type {prediction_type!r} is not supported")


def add_noise(scheduler, x0, noise, t):
    """Clean latents (B, C, h, w) -> the noisy latents at timestep t, a scalar or (B,)."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = (t.to(x0) / 1000).view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * noise
    return scheduler.add_noise(x0, noise, t)


def diffusion_target(scheduler, x0, noise, t):
    """What the model should predict for add_noise(x0, noise, t): noise, v, or noise - x0."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return noise - x0
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(x0, noise, t.expand(len(x0)))
    return noise


def decode(model, latents):
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], fp32, differentiable.

    The VAE runs in bf16 on CUDA, never in fp16, where SDXL's VAE overflows.
    """
    config = model.vae.config
    latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    images = model.vae.decode(latents.to(model.vae.dtype)).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def decode_in_parts(model, latents, micro_batch):
    """Like decode, but without gradients, `micro_batch` images at a time, and onto the CPU."""
    return torch.cat([decode(model, part).cpu() for part in latents.split(micro_batch)])


@torch.no_grad()
def encode(model, images, micro_batch=8):
    """Images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w), the posterior's mean.

    The VAE sees at most `micro_batch` images at a time.
    """
    means = []
    for part in images.split(micro_batch):
        pixels = part.to(model.device) * 2 - 1
        means.append(model.vae.encode(pixels.to(model.vae.dtype)).latent_dist.mean.float())
    config = model.vae.config
    return (torch.cat(means) - (config.get("shift_factor") or 0.0)) * config.scaling_factor


# --------------------------------------------------------------------------------------------------
# LoRA


def make_trainable(model, lora_rank, seed=0, checkpointing=False, compile=False, init_lora=None):
    """Adds a LoRA of this rank (alpha = rank), or unfreezes the whole denoiser if the rank is 0.

    init_lora: start from this LoRA. Returns the trainable parameters, in fp32.
    """
    if init_lora:
        load_lora(model, init_lora)
        rank = model.denoiser.peft_config["default"].r
        if rank != lora_rank:
            sys.exit(f"--init_lora {init_lora} has rank {rank}: pass --lora_rank {rank}")
    elif lora_rank:
        # peft draws from the global generator, so we seed it here and restore it afterward.
        targets = model.family.LORA_TARGETS
        config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets)
        config.init_lora_weights = "gaussian"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "lora").initial_seed())
            model.denoiser.add_adapter(config)
    else:
        model.denoiser.requires_grad_(True)

    params = [p for p in model.denoiser.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    if checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    if checkpointing or model.device.type == "cuda":
        # On a GPU we always do this: at 512 px the VAE's decoder keeps 2.8 GiB per image without
        # it, and 0.4 GiB with it.
        model.vae.enable_gradient_checkpointing()
    if compile:
        # There is one graph per width, batch size and gradient mode. The default limit is 8.
        torch._dynamo.config.recompile_limit = 64
        model.denoiser.compile_repeated_blocks(fullgraph=True)
    return params


@contextlib.contextmanager
def base_model(model):
    """Inside this context the denoiser is the exact base model: no adapters, or its own network.

    Do not leave the context between a checkpointed forward pass and its backward pass. A script
    that trains all weights (--lora_rank 0) has overwritten its base model, so this is an error.
    """
    tuned = model.denoiser
    has_lora = hasattr(tuned, "peft_config")
    is_overwritten = any(p.requires_grad for p in tuned.parameters())
    if is_overwritten and not has_lora and model.full_base is None:
        raise ValueError("there is no base model anymore: --lora_rank 0 trains its own weights")
    try:
        if has_lora:
            tuned.disable_adapters()
        if model.full_base is not None:
            model.denoiser = model.full_base
        yield
    finally:
        model.denoiser = tuned
        if has_lora:
            tuned.enable_adapters()


@contextlib.contextmanager
def merged(model):
    """Inside this context the LoRA is folded into the weights, which halves the number of kernels.

    This is only for sampling: NO GRADIENT reaches a folded LoRA, and `denoise` raises an error if
    gradients are on. Early in training a LoRA can be too small to survive the rounding to bf16. If
    that would lose more than 5% of it, we do not fold it. Inside `base_model` this does nothing.
    """
    layers = [
        layer
        for layer in model.denoiser.modules()
        if isinstance(layer, LoraLayer) and not layer.disable_adapters
    ]
    kept = [layer.get_base_layer().weight.data for layer in layers]

    def restore():
        # Put the old weights back. Subtracting what we added would let them drift.
        for layer, weight in zip(layers, kept):
            layer.get_base_layer().weight.data = weight

    try:
        if layers and fold(layers) <= 0.05:
            model.denoiser.disable_adapters()
            model.lora_is_merged = True
        else:
            restore()
        yield
    finally:
        restore()
        model.lora_is_merged = False
        if layers:
            model.denoiser.enable_adapters()


@torch.no_grad()
def fold(layers):
    """Adds each LoRA to its layer's weight -> the rounding error, as a fraction of the LoRA."""
    squared_error = squared_size = 0.0
    for layer in layers:
        base = layer.get_base_layer()
        delta = layer.get_delta_weight("default")
        exact = base.weight.float() + delta
        base.weight.data = exact.to(base.weight.dtype)
        squared_error += (base.weight - exact).square().sum()
        squared_size += delta.square().sum()
    return (squared_error / squared_size.clamp(min=1e-30)).sqrt().item()
