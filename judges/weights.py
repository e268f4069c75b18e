"""Reads the weights of judges from files, folders or the hub.

Weights that are missing, left over or of the wrong shape are an error, and no code is ever run.
"""

import os
import pickle
import textwrap
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file

from models.hub import split_revision

OPENAI_CLIP = "timm/vit_base_patch32_clip_224.openai/open_clip_model.safetensors"
TRANSFORMERS_FILES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
MORE_THAN_TENSORS = "more than plain tensors; we never run code"
# What the libraries raise if a weights file is missing, damaged or made for another network.
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, SafetensorError)


def find_file(path, filenames, repo=None):
    """The file that name:PATH refers to: PATH itself, or the first of `filenames` that is in PATH.

    Without a path, it is the first of `filenames` in the repo on the hub.
    """
    if not path:
        return Path(cached_file(repo, filenames[0]))
    if os.path.isfile(path):
        return Path(path)
    for filename in filenames:
        if (Path(path) / filename).is_file():
            return Path(path) / filename
    raise FileNotFoundError(f"{path} has no {' or '.join(filenames)}")


def find_beside(filename, folder, repo):
    """The folder of the weights, if it has this file too; otherwise the repo on the hub."""
    return folder if os.path.isfile(f"{folder}/{filename}") else repo


def read_weights(path):
    """A .safetensors file, or a torch checkpoint of plain tensors -> {name: tensor}."""
    check_weights_file(path)
    if str(path).endswith(".safetensors"):
        return load_file(path)
    try:
        # With weights_only, a checkpoint that contains code is rejected, never run.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} has {MORE_THAN_TENSORS}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(torch.is_tensor(x) for x in state.values()):
        raise ValueError(f"{path} contains no state dict")
    return state


def check_weights_file(path):
    """Raises ValueError for two kinds of file that people take for weights."""
    with open(path, "rb") as file:
        is_pointer = file.read(23) == b"version https://git-lfs"
    if is_pointer:
        raise ValueError(
            f"{path} is only a git-lfs pointer to the weights: run `git lfs pull` in its folder"
        )
    if not zipfile.is_zipfile(path):
        return
    # A torch checkpoint is a zip file too, but has no code in it.
    with zipfile.ZipFile(path) as archive:
        has_code = any("/code/" in name for name in archive.namelist())
    if has_code:
        raise ValueError(
            f"{path} is a TorchScript archive, which contains code, and we never run code. Use a "
            "file with the same weights only, such as a .safetensors file. OpenAI's CLIP has one "
            f"on the hub: {OPENAI_CLIP}"
        )


def explain(error):
    """An error on one line of at most 400 characters, because libraries list every tensor."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)


def load_complete(model_class, source, unused=(), **options):
    """from_pretrained, frozen, in eval mode, by default in fp32. The files must have every weight.

    unused: prefixes of weights that the files may contain for parts that we do not build.
    """
    repo, revision = split_revision(source) if source is not None else (None, None)
    use_safetensors = True
    if repo is not None and os.path.isfile(repo):
        raise ValueError("it is a file; pass the folder with this file and its config.json")
    if repo is not None and os.path.isdir(repo):
        file = find_file(repo, TRANSFORMERS_FILES)
        check_weights_file(file)
        # Some older models have no safetensors. transformers does not run code in theirs, either.
        use_safetensors = file.suffix != ".bin"
    try:
        net, report = model_class.from_pretrained(
            repo,
            revision=revision or "main",
            use_safetensors=use_safetensors,
            output_loading_info=True,
            **{"dtype": torch.float32, **options},
        )
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{source} has {MORE_THAN_TENSORS}") from error
    check_complete(report, model_class.__name__, unused)
    return net.eval().requires_grad_(False)


def check_complete(report, name, unused=()):
    """Raises ValueError if any weight did not come from the files, or one of theirs was unused."""
    unexpected = {key for key in report["unexpected_keys"] if not key.startswith(tuple(unused))}
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    wrong = report["missing_keys"] | unexpected | mismatched
    # The table of position ids is not a weight, but some versions of transformers save it.
    wrong = {key for key in wrong if not key.endswith("position_ids")}
    if wrong:
        raise ValueError(f"{name}: {min(wrong)} is missing, unexpected or has the wrong shape")


def judge_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32
