"""The judges: rewards and the artifact detector. Each loads its published checkpoint.

  reward, reward_range = load_reward("hps", device)
  r = reward(images, prompts)     images (B, 3, H, W) in [0, 1], B prompts -> (B,), differentiable

  "name"              the published weights, from the hub or its local cache
  "name:PATH"         weights in the same layout, from a file or folder
  "FILE.py:NAME"      your own: a function as above, or a class, which we build as NAME(device)
  "hps=1,pick=0.5"    a weighted sum of any of these; without a number, the weight is 1

Missing or mismatched weights are an error, never random numbers. A path cannot contain a comma.

Your own reward needs no other line than these, for example in my_rewards.py. Pass it as --reward
my_rewards.py:warmth, or to evaluate.py as --metrics my_rewards.py:warmth:

    def warmth(images, prompts):
        red = images[:, 0].mean((1, 2))
        blue = images[:, 2].mean((1, 2))
        return red - blue
"""

import importlib.util
import json
import math
import os
import pickle
import re
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer, BertTokenizer
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.utils import cached_file

from common import TOY
from models.hub import read_json, split_revision

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore and MPS are built on it
CLIP_VIT_L = "openai/clip-vit-large-patch14"  # the aesthetic predictor is built on it
OPENAI_CLIP = "timm/vit_base_patch32_clip_224.openai/open_clip_model.safetensors"
TRANSFORMERS_FILES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
OPEN_CLIP_FILES = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
# The same file under the names that the hub and its authors gave it.
AESTHETIC_FILES = [
    "aesthetic-model.pth",
    "sac+logos+ava1-l14-linearMSE.pth",
    "sac+logos+ava1-l14-linearMSE.safetensors",
]
MORE_THAN_TENSORS = "more than plain tensors; we never run code"
# What the libraries raise if a weights file is missing, damaged or made for another network.
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, SafetensorError)


@dataclass(frozen=True)
class RewardRange:
    """The known range of a reward, and the map r' = (r - shift) / scale that the losses use.

    The map is ImageReFL's. It brings toy_pref, pick and mps, and in the same way aesthetic, to
    about [0, 1], and is the identity for the others. It is affine and constant, so it changes the
    gradient's scale and nothing else.
    """

    low: float = math.nan
    high: float = math.nan
    shift: float = 0.0
    scale: float = 1.0

    def __str__(self):
        if math.isnan(self.low):
            return "no known range"
        return f"known range {self.low:g} to {self.high:g}"


REWARDS = {
    "toy_pref": RewardRange(3.0, 16.5, shift=3.0, scale=13.0),  # the toy world's preference model
    "toy_clip": RewardRange(0.0, 0.93),  # the toy world's CLIP: a cosine
    "hps": RewardRange(0.25, 0.38),  # HPSv2.1
    "pick": RewardRange(20.0, 24.0, shift=20.0, scale=10.0),  # PickScore
    "imagereward": RewardRange(-2.0, 2.0),
    "mps": RewardRange(10.0, 16.0, scale=10.0),  # MPS, condition "overall"
    "aesthetic": RewardRange(4.0, 7.0, scale=10.0),  # LAION's predictor, on a scale of 1 to 10
    "clip": RewardRange(0.25, 0.35),  # CLIPScore of ViT-B/32: a cosine
    "clip_h": RewardRange(0.25, 0.4),  # CLIPScore of ViT-H/14
}
REWARD_HELP = (
    f"{', '.join(REWARDS)}; name:PATH loads the weights from PATH; FILE.py:NAME is your own;"
    " hps=1,pick=0.5 is a weighted sum"
)


def build_reward(name, path, device, dtype=None):
    """Builds one of REWARDS. path: a file or folder of weights, or None for the published ones.

    dtype: of the weights; by default bf16 on CUDA, which is fine for training, and fp32 on a CPU.
    """
    options = dict(device=device, dtype=dtype)
    if name == "toy_pref":
        return PickScore(path or TOY / "pref", path or TOY / "pref", **options)
    if name == "toy_clip":
        return PickScore(path or TOY / "clip", path or TOY / "clip", cosine=True, **options)
    if name == "hps":
        file = find_file(path, ["HPS_v2.1_compressed.pt"], "xswu/HPSv2")
        return ClipScore("ViT-H-14", path=file, pad=True, **options)
    if name == "pick":
        # PickScore was published without a processor, so it uses that of the CLIP it started from.
        processor = CLIP_VIT_H
        if path:
            processor = find_beside("tokenizer_config.json", path, CLIP_VIT_H)
        return PickScore(path or "yuvalkirstain/PickScore_v1", processor, **options)
    if name == "imagereward":
        return ImageReward(find_file(path, ["ImageReward.pt"], "THUDM/ImageReward"), **options)
    if name == "mps":
        return MPS(find_file(path, ["model.safetensors"], "RE-N-Y/mpsv1"), **options)
    if name == "aesthetic":
        return Aesthetic(
            find_file(path, AESTHETIC_FILES, "trl-lib/ddpo-aesthetic-predictor"), **options
        )
    file = find_file(path, OPEN_CLIP_FILES) if path else None
    if name == "clip":
        return ClipScore("ViT-B-32-quickgelu", tag="openai", path=file, **options)
    if name == "clip_h":
        return ClipScore("ViT-H-14", tag="laion2b_s32b_b79k", path=file, **options)
    raise ValueError(f"no reward {name}")


def load_reward(spec, device):
    """A --reward, in one of the forms above -> (reward, its RewardRange)."""
    parts = split_reward(spec)
    rewards = {}
    ranges = {}
    for part in parts:
        rewards[part.name], ranges[part.name] = load_part(part, device)
    if not is_sum(parts):
        return rewards[parts[0].name], ranges[parts[0].name]
    weights = {part.name: part.weight for part in parts}
    return WeightedSum(rewards, ranges, weights), sum_of_ranges(ranges, weights)


def load_part(part, device):
    if part.file:
        return OwnReward(part.file, part.name, device), RewardRange()
    try:
        return build_reward(part.name, part.path, device), REWARDS[part.name]
    except UNREADABLE as error:
        where = f"{part.name}:{part.path}" if part.path else part.name
        sys.exit(f"--reward {where}: cannot load its weights. {explain(error)}")


# --------------------------------------------------------------------------------------------------
# What --reward names: one of REWARDS, your own, or a sum


@dataclass(frozen=True)
class RewardPart:
    """One part of a --reward, which in most cases has no other."""

    name: str  # one of REWARDS, or what FILE.py defines
    path: str = None  # of the weights
    file: str = None  # FILE.py
    weight: float = 1.0


def split_reward(spec):
    """A --reward -> a list of RewardPart, after checking that there are such rewards and files."""
    if not spec:
        sys.exit(f"--reward is required with this model. Choose from {', '.join(REWARDS)}")
    parts = [split_part(text.strip()) for text in spec.split(",")]
    if len({part.name for part in parts}) < len(parts):
        sys.exit(f"--reward {spec}: two parts have the same name, so the log cannot tell them apart")
    return parts


def split_part(text):
    """ "pick:FOLDER=0.5" -> RewardPart. The number after the last "=" is the weight."""
    text, weight = re.fullmatch(r"(.*?)(?:=(-?\d*\.?\d+(?:e-?\d+)?))?", text).groups()
    weight = float(weight or 1)
    if is_own(text):
        file, name = split_own(text)
        return RewardPart(name, file=file, weight=weight)
    name, _, path = text.partition(":")
    if name not in REWARDS:
        sys.exit(f"--reward {name}: no such reward. Choose from {', '.join(REWARDS)}")
    if path and not os.path.exists(path):
        sys.exit(f"--reward {text}: {path} does not exist")
    return RewardPart(name, path or None, weight=weight)


def is_sum(parts):
    return len(parts) > 1 or parts[0].weight != 1


def known_reward(spec):
    """Which of REWARDS a --reward is, or None if it is your own or a weighted sum."""
    parts = split_reward(spec)
    if is_sum(parts) or parts[0].file:
        return None
    return parts[0].name


class WeightedSum:
    """The sum of weight * r', where each part has its own map r' = (r - shift) / scale.

    So a part pulls as hard as it would alone in ReFL's loss, times its weight, and adding another
    part leaves it as it was. The log has the raw r of every part. A weight of 0 only logs it.

    rewards, ranges, weights: {name: value}
    """

    def __init__(self, rewards, ranges, weights):
        self.rewards = rewards
        self.ranges = ranges
        self.weights = weights
        self.parts = {}  # {name: r (B,)} of the last call, raw

    def __call__(self, images, prompts):
        total = 0.0
        for name, reward in self.rewards.items():
            r = reward(images, prompts)
            self.parts[name] = r.detach()
            r_mapped = (r - self.ranges[name].shift) / self.ranges[name].scale
            total = total + self.weights[name] * r_mapped
        return total


def sum_of_ranges(ranges, weights):
    """The RewardRange of a WeightedSum. Its range is known if those of all parts are."""
    low = 0.0
    high = 0.0
    for name, part in ranges.items():
        ends = [weights[name] * (end - part.shift) / part.scale for end in (part.low, part.high)]
        low += min(ends)
        high += max(ends)
    return RewardRange(low, high)


class OwnReward:
    """Your own reward: the function NAME of FILE.py, or its class, built once as NAME(device).

    It may return scores of any precision, or plain numbers for methods that need no gradient.
    """

    def __init__(self, file, name, device):
        self.spec = f"{file}:{name}"
        spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look for their module here
        spec.loader.exec_module(module)
        if not hasattr(module, name):
            sys.exit(f"{self.spec}: {file} defines no {name}")
        self.reward = getattr(module, name)
        if isinstance(self.reward, type):
            self.reward = self.reward(device)

    def __call__(self, images, prompts):
        r = torch.as_tensor(self.reward(images, prompts), device=images.device).float()
        if r.shape != (len(images),):
            expected = f"({len(images)},): one score per image"
            sys.exit(f"{self.spec} returned the shape {tuple(r.shape)}, but it must be {expected}")
        # Only the methods that train through the reward pass images with a gradient.
        if images.requires_grad and not r.requires_grad:
            need = "this script trains through it. dfusion_dpo.py does not"
            sys.exit(f"{self.spec} returned scores without a gradient, but {need}")
        return r


def is_own(text):
    """Whether "FILE.py:NAME" is meant, and not one of ours."""
    return text.partition(":")[0].endswith(".py")


def split_own(text):
    """ "FILE.py:NAME" -> FILE.py, which must exist, and NAME."""
    file, _, name = text.partition(":")
    if not os.path.isfile(file):
        sys.exit(f"{text}: there is no file {file}")
    if not name:
        sys.exit(f"{text}: add a colon and the name of your function or class, as in {file}:score")
    return file, name


# --------------------------------------------------------------------------------------------------
# Reading files, preparing images


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


def check_tokenizer(tokenizer, vocab_size, source):
    """Raises ValueError if the vocabulary is missing: transformers would read all words as unknown.

    A tokenizer may have somewhat fewer tokens than the text encoder has embeddings, as BLIP's does.
    """
    if not 0.9 * vocab_size <= len(tokenizer) <= vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, but its model {vocab_size}. "
            "Is tokenizer.json, vocab.json or vocab.txt missing?"
        )


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
    """from_pretrained in fp32, frozen and in eval mode; every weight must come from the files.

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


def preprocess(images, size, mean, std, pad=False, floor_crop=False):
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalized. Differentiable.

    Resizes the short side (bicubic, antialiased) and crops the center. If the corner of the crop
    is not a whole number, torchvision rounds it to the nearest and transformers rounds it down
    (floor_crop). With pad, as in HPS, we resize the long side instead and the rest is black.
    """
    height, width = images.shape[-2:]
    if pad:
        ratio = size / max(height, width)
        new_size = [round(height * ratio), round(width * ratio)]
    else:
        short = min(height, width)
        new_size = [size * height // short, size * width // short]
    images = TF.resize(images, new_size, InterpolationMode.BICUBIC, antialias=True)
    height, width = images.shape[-2:]
    if pad:
        left, top = (size - width) // 2, (size - height) // 2
        images = TF.pad(images, [left, top, size - width - left, size - height - top])
    elif floor_crop:
        images = TF.crop(images, (height - size) // 2, (width - size) // 2, size, size)
    else:
        images = TF.center_crop(images, [size, size])
    return TF.normalize(images, mean, std)


def judge_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# --------------------------------------------------------------------------------------------------
# CLIP-like rewards


class PickScore:
    """exp(logit_scale) cos(image, text) of a transformers CLIPModel (Kirstain et al. 2023).

    cosine: leave out the scale. Text features are computed once per prompt.
    """

    def __init__(self, model, processor, device, cosine=False, dtype=None):
        dtype = dtype or judge_dtype(device)
        self.clip = load_complete(CLIPModel, model, dtype=dtype).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
        check_tokenizer(self.tokenizer, self.clip.config.text_config.vocab_size, processor)
        image_processor = CLIPImageProcessor.from_pretrained(processor)
        size = image_processor.size
        self.size = size.get("shortest_edge", size.get("height"))
        self.mean = image_processor.image_mean
        self.std = image_processor.image_std
        self.scale = 1.0 if cosine else self.clip.logit_scale.exp().item()
        self.texts = {}  # prompt -> its normalized features (D,)

    def __call__(self, images, prompts):
        text = torch.stack([self.text(prompt) for prompt in prompts])
        pixels = preprocess(images, self.size, self.mean, self.std, floor_crop=True)
        features = self.clip.get_image_features(pixels.to(self.clip.dtype)).pooler_output
        image = F.normalize(features.float(), dim=-1)
        return self.scale * (image * text).sum(-1)

    @torch.no_grad()
    def text(self, prompt):
        if prompt not in self.texts:
            positions = self.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                [prompt],
                padding="max_length",
                truncation=True,
                max_length=min(self.tokenizer.model_max_length, positions),
                return_tensors="pt",
            )
            features = self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output
            self.texts[prompt] = F.normalize(features.float(), dim=-1)[0]
        return self.texts[prompt]


class ClipScore:
    """cos(image, text) of an open_clip model: CLIPScore (Hessel et al. 2021).

    With HPSv2's weights and pad=True, this is HPSv2 (Wu et al. 2023).

    name, tag: open_clip's names for the architecture and the weights.
    path: a weights file to use instead of the tag's. An open_clip_config.json beside it, if there
    is one, defines the architecture.
    """

    def __init__(self, name, device, tag=None, path=None, pad=False, dtype=None):
        import open_clip  # takes a second to import, so only its users pay for it

        if path is None:
            config = open_clip.get_pretrained_cfg(name, tag)
            path = open_clip.download_pretrained(config)
        if Path(path).with_name("open_clip_config.json").is_file():
            name = f"local-dir:{Path(path).parent}"
        # On the meta device we spend nothing on weights that the file will replace.
        with torch.device("meta"):
            self.clip = open_clip.CLIP(**open_clip.get_model_config(name))
        self.clip.load_state_dict(read_weights(path), assign=True)
        # The causal mask is the one buffer that no file contains.
        self.clip.attn_mask = torch.full(self.clip.attn_mask.shape, -torch.inf).triu(1)
        self.dtype = dtype or judge_dtype(device)
        self.clip.to(device, self.dtype).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.device = device
        self.pad = pad
        self.texts = {}  # prompt -> its normalized features (D,)

    def __call__(self, images, prompts):
        text = torch.stack([self.text(prompt) for prompt in prompts])
        size = self.clip.visual.image_size[0]
        pixels = preprocess(images, size, CLIP_MEAN, CLIP_STD, pad=self.pad)
        features = self.clip.encode_image(pixels.to(self.dtype))
        return (F.normalize(features.float(), dim=-1) * text).sum(-1)

    @torch.no_grad()
    def text(self, prompt):
        if prompt not in self.texts:
            tokens = self.tokenizer([prompt]).to(self.device)
            features = self.clip.encode_text(tokens).float()
            self.texts[prompt] = F.normalize(features, dim=-1)[0]
        return self.texts[prompt]


class Aesthetic:
    """LAION's aesthetic predictor: an MLP on the normalized image features of OpenAI's ViT-L/14.

    This is improved-aesthetic-predictor, which DDPO and AlignProp train on. It ignores the prompts.

    path: the MLP's file. A CLIP beside it, with its config.json, is used instead of the hub's.
    """

    def __init__(self, path, device, dtype=None):
        source = find_beside("config.json", Path(path).parent, CLIP_VIT_L)
        # The checkpoint is a whole CLIP, and we leave out its text encoder.
        unused = ("text_model.", "text_projection.", "logit_scale")
        clip = load_complete(CLIPVisionModelWithProjection, source, unused=unused)
        self.clip = clip.to(device, dtype or judge_dtype(device))
        # The MLP has no non-linearity. Identity replaces its dropout, which is off in evaluation.
        layers = torch.nn.Sequential(
            torch.nn.Linear(768, 1024),
            torch.nn.Identity(),
            torch.nn.Linear(1024, 128),
            torch.nn.Identity(),
            torch.nn.Linear(128, 64),
            torch.nn.Identity(),
            torch.nn.Linear(64, 16),
            torch.nn.Linear(16, 1),
        )
        self.mlp = torch.nn.ModuleDict(dict(layers=layers))
        self.mlp.load_state_dict(read_weights(path))
        self.mlp.to(device).eval().requires_grad_(False)

    def __call__(self, images, prompts=None):
        pixels = preprocess(
            images, self.clip.config.image_size, CLIP_MEAN, CLIP_STD, floor_crop=True
        )
        features = self.clip(pixels.to(self.clip.dtype)).image_embeds
        return self.mlp["layers"](F.normalize(features.float(), dim=-1))[:, 0]


# --------------------------------------------------------------------------------------------------
# ImageReward

BLIP_NAMES = (  # names in ImageReward.pt -> names in transformers
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "mlp."),
    (r"\.cls_token$", ".embeddings.class_embedding"),
    (r"\.pos_embed$", ".embeddings.position_embedding"),
    (r"\.patch_embed\.proj\.", ".embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"\.blocks\.", ".encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
BLIP_UNUSED = r"blip\.(text_encoder\.embeddings\.position_ids|vision_proj|text_proj)"


def rename_blip(state):
    """ImageReward.pt's {name: tensor} under transformers' names, without the unused ones."""
    renamed = {}
    for key, tensor in state.items():
        if re.match(BLIP_UNUSED, key):
            continue
        for pattern, replacement in BLIP_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def build_blip_scorer(state):
    """ImageReward.pt's tensors -> ModuleDict(vision, text, mlp). Sizes are read off the tensors."""
    state = rename_blip(state)
    width, _, _, patch_size = state["vision.embeddings.patch_embedding.weight"].shape
    num_positions = state["vision.embeddings.position_embedding"].shape[1]
    grid = round((num_positions - 1) ** 0.5)
    vision_config = BlipVisionConfig(
        hidden_size=width,
        num_attention_heads=width // 64,  # heads are 64 wide, as in BLIP
        image_size=grid * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
        intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(key.endswith(".mlp.fc1.weight") for key in state),
    )
    vocab_size, hidden_size = state["text.embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        encoder_hidden_size=width,
        is_decoder=True,  # this adds the cross-attention to the image
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
        num_hidden_layers=sum(key.endswith(".intermediate.dense.weight") for key in state),
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
    )
    with torch.device("meta"):
        # The MLP has no non-linearity. Identity replaces its dropout, which is off in evaluation.
        mlp = torch.nn.Sequential(
            torch.nn.Linear(hidden_size, 1024),
            torch.nn.Identity(),
            torch.nn.Linear(1024, 128),
            torch.nn.Identity(),
            torch.nn.Linear(128, 64),
            torch.nn.Identity(),
            torch.nn.Linear(64, 16),
            torch.nn.Linear(16, 1),
        )
        vision = BlipVisionModel(vision_config)
        text = BlipTextModel(text_config, add_pooling_layer=False)
        net = torch.nn.ModuleDict(dict(vision=vision, text=text, mlp=mlp))
    net.load_state_dict(state, assign=True)
    text.embeddings.position_ids = torch.arange(text_config.max_position_embeddings)[None]
    return net.eval().requires_grad_(False)


class ImageReward:
    """ImageReward-v1.0 (Xu et al. 2023): BLIP, whose text encoder looks at the image, and an MLP.

    The score is normalized to mean 0 and variance 1 with the authors' constants.
    raw: return the MLP's own output instead.
    path: ImageReward.pt. A tokenizer beside it is used instead of the hub's.
    """

    def __init__(self, path, device, raw=False, dtype=None):
        dtype = dtype or judge_dtype(device)
        self.net = build_blip_scorer(read_weights(path)).to(device, dtype)
        self.net["mlp"].float()
        repo = "google-bert/bert-base-uncased"
        source = find_beside("tokenizer_config.json", Path(path).parent, repo)
        self.tokenizer = BertTokenizer.from_pretrained(source)
        check_tokenizer(self.tokenizer, self.net["text"].config.vocab_size, source)
        self.raw = raw
        self.texts = {}  # prompt -> (token ids, attention mask)

    def __call__(self, images, prompts):
        tokens = [self.text(prompt) for prompt in prompts]
        ids = torch.cat([token_ids for token_ids, _ in tokens])
        mask = torch.cat([attention_mask for _, attention_mask in tokens])
        vision = self.net["vision"]
        pixels = preprocess(images, vision.config.image_size, CLIP_MEAN, CLIP_STD)
        image_states = vision(pixels.to(vision.dtype)).last_hidden_state
        text_states = self.net["text"](
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image_states
        ).last_hidden_state
        r = self.net["mlp"](text_states[:, 0].float())[:, 0]  # of the [CLS] token
        return r if self.raw else (r - 0.16717362830052426) / 1.0333394966054072

    def text(self, prompt):
        if prompt not in self.texts:
            tokens = self.tokenizer(
                [prompt], padding="max_length", truncation=True, max_length=35, return_tensors="pt"
            ).to(self.net["text"].device)
            self.texts[prompt] = (tokens.input_ids, tokens.attention_mask)
        return self.texts[prompt]


# --------------------------------------------------------------------------------------------------
# MPS


class MPS:
    """The Multi-dimensional Preference Score, condition "overall" (Zhang et al., CVPR 2024).

    exp(logit_scale) cos(text, x[0]), where x (B, 257, D) starts as the image tokens. In each of
    4 layers they attend to the text tokens (B, 77, D) that are related to the condition, and
    then to each other, with rotary positions. The 16 heads of width 64 share one key and value, a
    SwiGLU runs in parallel with each attention, and no layer has a bias.

    threshold: a text token is related if its closeness to the condition exceeds this share of the
    closest token's. ImageReFL and the authors' model take 0.01, the authors' evaluation 0.3.

    path: model.safetensors in the layout of RE-N-Y/mpsv1, because the authors' own file is a
    pickle. A tokenizer beside it is used instead of the hub's.
    """

    CONDITION = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
        "structure, instance, texture, quantity, attributes, position, number, location, word, "
        "things."
    )
    CROSS_WEIGHTS = ("norm", "to_q", "to_kv", "to_out", "ff.0", "ff.2")
    SELF_WEIGHTS = ("norm", "fused_attn_ff_proj", "attn_out", "ff_out.1")

    def __init__(self, path, device, threshold=0.01, dtype=None):
        self.threshold = threshold
        state = read_weights(path)
        clip_state = take_prefix(state, "mps.model.")
        layers = take_prefix(state, "mps.cross_model.layers.")
        config = build_clip_config(clip_state)
        clip = load_complete(CLIPModel, None, config=config, state_dict=clip_state)
        # Only the large part may be in bf16. The four layers, and what they read, stay in fp32.
        self.clip = clip.to(device, dtype or judge_dtype(device))
        self.layers = []
        for i in range(len({key.split(".")[0] for key in layers})):
            cross = [layers[f"{i}.0.fn.{name}.weight"].to(device) for name in self.CROSS_WEIGHTS]
            own = [layers[f"{i}.1.fn.{name}.weight"].to(device) for name in self.SELF_WEIGHTS]
            self.layers.append((cross, own))
        source = find_beside("tokenizer_config.json", Path(path).parent, CLIP_VIT_H)
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        check_tokenizer(self.tokenizer, self.clip.config.text_config.vocab_size, source)
        self.size = self.clip.config.vision_config.image_size
        self.condition = self.text([self.CONDITION])[0][0]  # (77, D)

    @torch.no_grad()
    def text(self, prompts):
        """-> tokens (B, 77, D) and end-of-text features (B, D). Padding tokens are included."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        states = self.clip.text_model(ids.to(self.clip.device)).last_hidden_state
        tokens = self.clip.text_projection(states).float()
        # The end-of-text token has the highest id.
        return tokens, tokens[torch.arange(len(ids)), ids.argmax(-1)]

    def __call__(self, images, prompts):
        unique_prompts = list(dict.fromkeys(prompts))
        order = [unique_prompts.index(prompt) for prompt in prompts]
        tokens, end = self.text(unique_prompts)
        tokens, end = tokens[order], end[order]
        closeness = (tokens @ self.condition.T).amax(-1)  # (B, 77), to the condition
        is_related = closeness / closeness.amax(1, keepdim=True) > self.threshold
        pixels = preprocess(images, self.size, CLIP_MEAN, CLIP_STD, floor_crop=True)
        # We take the image tokens before the last norm: (B, 257, D).
        states = self.clip.vision_model(pixels.to(self.clip.dtype)).last_hidden_state
        x = self.clip.visual_projection(states).float()
        for cross, own in self.layers:
            x = cross_layer(x, tokens, is_related[:, None, None], *cross)
            # Key and value share one matrix, and have one head each.
            head_width = len(cross[2]) // 2
            x = self_layer(x, head_width, *own)
        return self.clip.logit_scale.exp().float() * F.cosine_similarity(end, x[:, 0], dim=-1)


def cross_layer(x, tokens, mask, norm, to_q, to_kv, to_out, ff_up, ff_down):
    """Image tokens x (B, 257, D) attend to text tokens (B, 77, D), with a parallel feed-forward."""
    h = F.layer_norm(x, norm.shape, norm)
    k, v = (tokens @ to_kv.T).chunk(2, -1)
    attention = attend(h @ to_q.T, k, v, mask)
    return x + attention @ to_out.T + swiglu(h @ ff_up.T) @ ff_down.T


def self_layer(x, head_width, norm, fused, attn_out, ff_out):
    """Image tokens x (B, 257, D) attend to each other, with a parallel feed-forward."""
    h = F.layer_norm(x, norm.shape, norm)
    ff_width = 2 * ff_out.shape[1]
    q_width = len(fused) - 2 * head_width - ff_width
    q, k, v, ff = (h @ fused.T).split([q_width, head_width, head_width, ff_width], -1)
    attention = attend(rotate(q, head_width), rotate(k, head_width), v)
    return x + attention @ attn_out.T + swiglu(ff) @ ff_out.T


def attend(q, k, v, mask=None):
    """q (B, N, heads * d); k and v (B, M, d) are the same for all heads -> (B, N, heads * d)."""
    q = q.unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)
    k = k[:, None].expand(-1, q.shape[1], -1, -1)
    v = v[:, None].expand(-1, q.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def rotate(x, d):
    """Rotary positions (Su et al. 2021) on the heads of x (B, N, heads * d)."""
    positions = torch.arange(x.shape[1], device=x.device)[:, None]
    angle = positions / 10000 ** (torch.arange(0, d, 2, device=x.device) / d)  # (N, d / 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.unflatten(-1, (-1, d)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)


def swiglu(x):
    a, gate = x.chunk(2, -1)
    return F.silu(gate) * a


def take_prefix(state, prefix):
    """The tensors whose names start with the prefix, without it and in fp32."""
    return {
        key.removeprefix(prefix): tensor.float()
        for key, tensor in state.items()
        if key.startswith(prefix)
    }


def build_clip_config(state):
    """A CLIPModel's {name: tensor} -> its CLIPConfig. Heads are 64 and 80 wide, as in ViT-H."""

    def tower(name, head_width):
        mlp = state[f"{name}_model.encoder.layers.0.mlp.fc2.weight"]
        layers = [key for key in state if key.startswith(f"{name}_model.")]
        return dict(
            hidden_size=mlp.shape[0],
            intermediate_size=mlp.shape[1],
            num_hidden_layers=sum(key.endswith("mlp.fc1.weight") for key in layers),
            num_attention_heads=mlp.shape[0] // head_width,
            hidden_act="gelu",
        )

    patch_size = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    num_positions = len(state["vision_model.embeddings.position_embedding.weight"])
    image_size = round((num_positions - 1) ** 0.5) * patch_size
    vocab_size = len(state["text_model.embeddings.token_embedding.weight"])
    text_length = len(state["text_model.embeddings.position_embedding.weight"])
    return CLIPConfig(
        projection_dim=len(state["text_projection.weight"]),
        vision_config=dict(tower("vision", 80), image_size=image_size, patch_size=patch_size),
        text_config=dict(
            tower("text", 64), vocab_size=vocab_size, max_position_embeddings=text_length
        ),
    )


# --------------------------------------------------------------------------------------------------
# The artifact detector


class Detector(torch.nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> confidence (B, size, size) that something is wrong there.

    The confidence is in [0, 1] and differentiable. Images are squashed into a square, not cropped,
    and antialiased if they shrink, as the detector's training data is here. The authors' demo does
    not antialias.
    """

    def __init__(self, net, size, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.net = net
        self.size = size
        self.mean = mean
        self.std = std

    def forward(self, images):
        size = [self.size, self.size]
        images = TF.resize(images, size, InterpolationMode.BILINEAR, antialias=True)
        pixels = TF.normalize(images, self.mean, self.std)
        logits = self.net(pixels).logits.float()
        return F.interpolate(logits, size, mode="bilinear")[:, 0].sigmoid()

    def save(self, folder):
        """Writes folder/detector, which --detector and evaluate.py can load."""
        folder = Path(folder) / "detector"
        self.net.save_pretrained(folder)
        processor = dict(
            image_processor_type="SegformerImageProcessor",
            do_resize=True,
            size=dict(height=self.size, width=self.size),
            resample=2,
            do_rescale=True,
            rescale_factor=1 / 255,
            do_normalize=True,
            image_mean=list(self.mean),
            image_std=list(self.std),
        )
        text = json.dumps(processor, indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(text)


def build_segformer(state):
    """A SegFormer's {name: tensor} under its published names -> the network, sized to fit."""
    encoder = "segformer.encoder"
    widths = [len(state[f"{encoder}.patch_embeddings.{i}.proj.weight"]) for i in range(4)]
    depths = []
    for i in range(4):
        blocks = [key for key in state if key.startswith(f"{encoder}.block.{i}.")]
        depths.append(len({key.split(".")[4] for key in blocks}))
    config = SegformerConfig(
        hidden_sizes=widths,
        depths=depths,
        decoder_hidden_size=len(state["decode_head.linear_fuse.weight"]),
        num_labels=1,
    )
    return load_complete(SegformerForSemanticSegmentation, None, config=config, state_dict=state)


def load_detector(source, device):
    """Loads a frozen artifact detector.

    source: a folder or hub id in the transformers format, or a file with the state dict of a
    SegFormer for 512 pixels, as DiffDoctor's authors released it.
    """
    try:
        if os.path.isfile(source):
            detector = Detector(build_segformer(read_weights(source)), size=512)
        else:
            processor, _ = read_json(source, "preprocessor_config.json")
            net = load_complete(AutoModelForSemanticSegmentation, source, trust_remote_code=False)
            size = processor["size"]["height"]
            detector = Detector(net, size, processor["image_mean"], processor["image_std"])
    except UNREADABLE as error:
        what = "cannot load its weights"
        if not os.path.exists(source):
            what = "no such file or folder here, nor a hub model that we can reach"
        sys.exit(f"--detector {source}: {what}. {explain(error)}")
    if detector.net.config.num_labels != 1:
        num_classes = detector.net.config.num_labels
        sys.exit(f"--detector {source}: it has {num_classes} classes; a detector has one")
    return detector.to(device).eval().requires_grad_(False)
