"""LoRA files: writes ours, and reads those of other programs.

  save_lora(model, folder)    for diffusers, and for SD and SDXL a copy for ComfyUI
  load_lora(model, path)      a run, a folder or a file, in any format that diffusers reads
"""

import json
import logging
import sys
from pathlib import Path

from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

# Of a LoRA that does not fit, diffusers prints every tensor. We stop with a line of our own.
logging.getLogger("diffusers.loaders.peft").setLevel(logging.CRITICAL)

LORA_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui.safetensors"


def save_lora(model, folder):
    """Writes the LoRA so that pipe.load_lora_weights(folder) loads it.

    Beside a U-Net's LoRA we write a copy for ComfyUI and A1111, which know its layers only by
    kohya's names. It is half as large: they expect fp16. Snapshots get one, too, as you may pick
    any of them. FLUX, SD3.5 and Z-Image need none: ComfyUI reads the names of the first file.
    """
    # This is the file that diffusers' save_lora_weights writes, but equal LoRAs give equal
    # bytes. In diffusers' files, the order of peft's sets and of some header entries varies.
    prefix = model.denoiser_name
    metadata = {}
    for key, value in model.denoiser.peft_config["default"].to_dict().items():
        metadata[f"{prefix}.{key}"] = sorted(value) if isinstance(value, set) else value
    header = {"lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)}
    tensors = {}
    for key, tensor in get_peft_model_state_dict(model.denoiser).items():
        tensors[f"{prefix}.{key}"] = tensor.contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    # safetensors' save_file would make files that only their owner can read.
    (Path(folder) / LORA_FILE).write_bytes(to_safetensors(tensors, header))
    if prefix == "unet":
        # Each layer's alpha in this file is its rank, as in our LoRAs.
        for_comfyui = convert_state_dict_to_kohya(tensors)
        for_comfyui = {key: tensor.half() for key, tensor in for_comfyui.items()}
        (Path(folder) / COMFYUI_FILE).write_bytes(to_safetensors(for_comfyui))


def find_lora(path):
    """A run folder, a LoRA folder or a .safetensors file -> the file."""
    path = Path(path)
    if not path.exists():
        sys.exit(f"{path}: there is no such file or folder")
    for candidate in (path, path / LORA_FILE, path / "lora" / LORA_FILE):
        if candidate.is_file() and candidate.suffix == ".safetensors":
            return candidate
    sys.exit(f"{path}: no LoRA here; expected a .safetensors file, {LORA_FILE} or lora/{LORA_FILE}")


def load_lora(model, path):
    """Loads a LoRA file into the denoiser, replacing any earlier one. Every tensor must fit.

    The file can be in any format that diffusers reads: its own, older ones, or kohya's. Afterward
    alpha = rank in every layer, because we multiply the LoRA by alpha / rank. So training it on
    takes steps of the usual size, and programs that ignore alpha see the same LoRA.
    """
    file = find_lora(path)
    if hasattr(model.denoiser, "peft_config"):
        model.denoiser.delete_adapters("default")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            header = opened.metadata() or {}
        if any("dora_scale" in key or "lora_magnitude_vector" in key for key in tensors):
            sys.exit(f"{file}: this is a DoRA, which we do not support")
        apply_alphas(tensors)
        # SDXL's LoRAs from kohya number the blocks in another way, for which it needs the config.
        state = model.pipe.lora_state_dict(tensors, unet_config=model.denoiser.config)
        if isinstance(state, tuple):
            state = state[0]
        metadata = json.loads(header.get("lora_adapter_metadata", "null"))
        model.denoiser.load_lora_adapter(
            state, prefix=model.denoiser_name, adapter_name="default", metadata=metadata
        )
        restore_precision(model, state)
        loaded = get_peft_model_state_dict(model.denoiser)
    except (
        OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, SafetensorError
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        sys.exit(f"{file}: not a LoRA of {model.source}. {type(error).__name__}: {reason}")
    if any(key.startswith("text_encoder") for key in state):
        sys.exit(f"{file}: this LoRA also changes the text encoder, which we do not tune")
    if len(state) != len(loaded):
        sys.exit(
            f"{file}: this LoRA was not made for {model.source}. "
            f"It has {len(state)} tensors, of which {len(loaded)} fit"
        )
    if not all(tensor.isfinite().all() for tensor in loaded.values()):
        sys.exit(f"{file}: this LoRA holds NaN or Inf")
    use_our_settings(model)


def apply_alphas(tensors):
    """Multiplies each layer of a LoRA file by its alpha / rank, and drops the alphas, in place.

    diffusers 0.42 applies an alpha that all layers share, but ignores those of attention layers
    if they differ, as they do in a LoRA that was resized layer by layer.
    """
    for key in [key for key in tensors if key.endswith(".alpha")]:
        alpha = tensors.pop(key).item()
        layer = key.removesuffix("alpha")
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            if f"{layer}{down}.weight" in tensors:
                rank = len(tensors[f"{layer}{down}.weight"])
                weight = tensors[f"{layer}{up}.weight"].float()
                tensors[f"{layer}{up}.weight"] = weight * alpha / rank


def restore_precision(model, state):
    """Restores the fp32 values of a LoRA's file, which the bf16 layers have rounded; trainable."""
    for name, p in model.denoiser.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(True)  # the header of a file may ask for a LoRA that is frozen
    prefix = f"{model.denoiser_name}."
    tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not any("lora_A" in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    set_peft_model_state_dict(model.denoiser, tensors)


def use_our_settings(model):
    """Gives a LoRA that was just loaded alpha = rank, at the same effect, and no dropout."""
    for layer in model.denoiser.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["default"].weight.data *= layer.scaling["default"]
            layer.scaling["default"] = 1.0
    # A file's header may ask for dropout, which runs only in training mode.
    model.denoiser.eval()
    config = model.denoiser.peft_config["default"]
    config.lora_alpha = config.r
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.lora_dropout = 0.0
