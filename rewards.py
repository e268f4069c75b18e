"""The rewards: which ones there are, and what --reward can name. Their networks are in judges/.

  reward, reward_range = load_reward("hps", device)
  r = reward(images, prompts)     images (B, 3, H, W) in [0, 1], B prompts -> (B,), differentiable

  "name"              the published weights, from the hub or its local cache
  "name:PATH"         weights in the same layout, from a file or folder (pick: a folder)
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
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common import TOY
from judges.clip import CLIP_VIT_H, Aesthetic, ClipScore, PickScore
from judges.imagereward import ImageReward
from judges.mps import MPS
from judges.weights import UNREADABLE, explain, find_beside, find_file

OPEN_CLIP_FILES = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
# The same file under the names that the hub and its authors gave it.
AESTHETIC_FILES = [
    "aesthetic-model.pth",
    "sac+logos+ava1-l14-linearMSE.pth",
    "sac+logos+ava1-l14-linearMSE.safetensors",
]


@dataclass(frozen=True)
class RewardRange:
    """The known range of a reward, and the map r' = (r - shift) / scale that the losses use.

    For pick and mps the map is ImageReFL's, and for toy_pref and aesthetic it is ours. It brings
    scores to the order of 1, and is the identity for the others. It is affine and constant, so it
    changes the gradient's scale and nothing else.
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
    if name == "clip":
        file = find_file(path, OPEN_CLIP_FILES) if path else None
        return ClipScore("ViT-B-32-quickgelu", tag="openai", path=file, **options)
    if name == "clip_h":
        file = find_file(path, OPEN_CLIP_FILES) if path else None
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
    """One term of a --reward. Most rewards have only one."""

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
        sys.exit(f"--reward {spec}: two parts have the same name, which the log cannot tell apart")
    return parts


def split_part(text):
    """ "pick:FOLDER=0.5" -> RewardPart. The number after the last "=" is the weight."""
    text, weight = re.fullmatch(r"(.*?)(?:=(-?\d*\.?\d+(?:e[+-]?\d+)?))?", text).groups()
    weight = float(weight or 1)
    if is_own(text):
        file, name = split_own(text)
        return RewardPart(name, file=file, weight=weight)
    name, _, path = text.partition(":")
    if name not in REWARDS:
        known = f"{', '.join(REWARDS)}, or your own as FILE.py:NAME"
        sys.exit(f"--reward {name}: no such reward. Choose from {known}")
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

    Each part pulls as hard as it would alone in ReFL's loss, times its weight. The log has
    the raw r of every part. A part with weight 0 is only logged, and needs no gradient.

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
            weight = self.weights[name]
            # With a weight of 0 there is nothing to learn from it, so it needs no backward pass.
            r = reward(images if weight else images.detach(), prompts)
            self.parts[name] = r.detach()
            r_mapped = (r - self.ranges[name].shift) / self.ranges[name].scale
            total = total + weight * r_mapped
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
            need = "only dfusion_dpo.py can train on such a reward"
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
