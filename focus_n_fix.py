"""Focus-N-Fix: fix what is wrong with an image and leave the rest alone (arXiv 2501.06481).

Xing et al. 2025. This is DRaFT with a regional penalty: we raise the reward of the whole image, and
hold it to the base model's image wherever that image had no problem.

  I0      = decode(sample(x_T, steps 0 .. T-1))      the base model's image, without gradients
  M       = problem_mask(heat map of I0)             1 where I0 has a problem, else 0
  latents = sample(x_T, steps 0 .. T-K-1)            by --prefix, from the same x_T, no gradients
  I       = draft(latents)                           its last K = --grad_steps steps, with gradients
  change  = ||(1 - M) (I - I0)||_F / sqrt(n)         per image; n values lie outside the region
  penalty = sqrt(change^2 + LEVEL^2) - LEVEL         so an invisible change costs nothing
  r'      = (r(I) - mean) / spread                   of the whole image; mean and spread of r(I0)
  loss    = -(r' - beta * penalty)                   0 for the base model, on average

All sampling is DDIM with eta 0, or Euler for flows. --beta 0 is DRaFT-K (Clark et al. 2024), our
baseline.

  --region heatmap     the confidence map of --detector, where it is above --threshold
  --region saliency    Grad-CAM of -r, for a CLIP-like reward: the places that lower r
  --reward artifact    r = -(the mean confidence of --detector)
  --concept BAD GOOD   r = cos(image, GOOD) - cos(image, BAD), with the CLIP of --reward

The authors released no code, and we had only the abstract. The regional term is the paper's; K = 2
and the LoRA rank of 64 are second-hand, from other people's summaries. These choices are ours:
1. We divide the norm by sqrt(n), so that beta means the same at every resolution and mask size.
   A norm's gradient has unit length however small the norm is. At the start I - I0 is rounding
   noise, which the first updates would follow, so changes well below one 8-bit level do not count.
   --raw_norm is the paper's norm, without either change.
2. If nothing is wrong, the mask is empty and the whole image is held. Such pairs still train, and
   the log counts them as "empty". If everything is wrong, there is nothing to hold.
3. Pairs (prompt, x_T) come in turn from a finite --pool. We make their I0 and M once, before
   training, and keep them in memory: about 4 MiB per pair at 512 pixels. --pool 0 draws new pairs
   for every update, so it samples twice.
4. The spread is the standard deviation of r over the base model's images of the first 64 pairs. So
   beta means the same for every reward: how many standard deviations a change of 1 costs.
5. --prefix base is our own variant, and the toy's default: the base model takes the first T - K
   steps, in training and afterwards. With --prefix tuned, as in DRaFT, the tuned model changes
   these steps, too, and no gradient says how. combined_sample.py samples as the run did.
6. The paper's rewards and maps are private. A detector, a CLIP and --concept stand in for them.

  $ python focus_n_fix.py                               # the toy world: minutes on two CPU cores
  $ python focus_n_fix.py --concept "a red circle" "a blue circle" --prefix tuned
  $ python focus_n_fix.py --model sd14 --prompts captions.txt --detector detector_folder
  $ python combined_sample.py --lora runs/focus_n_fix-toy-artifact --out images
"""

import functools
import math
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import TOY, base_model, decode, decode_in_parts, denoise, generator, initial_latents
from common import load_model, make_scheduler, make_trainable, merged, pick_device, sample
from common import scheduler_step
from data.prompts import condition, encode_once, read_prompts
from judges.clip import PickScore
from judges.detector import Detector, load_detector
from rewards import REWARD_HELP, known_reward, load_reward
from run_folder import Run, check_out, check_ranges, chosen_model, describe_reward, gather, held_out
from run_folder import is_main_process, joined_processes, own_part, print_settings, readable_errors
from run_folder import reward_means, run_name, save_grid, score, settings_for, settings_parser
from run_folder import sum_gradients, sum_processes, with_parts

NAME = "focus_n_fix"  # names the run folder and the progress bar; change it in a fork
PAPER = {  # second-hand: from summaries by others, not from the abstract. SD 1.4 is its main model
    "sd14": dict(grad_steps=2, lora_rank=64),
    "sdxl": dict(grad_steps=2, lora_rank=64),
}
SD = dict(
    PAPER["sd14"], train_steps=1000, batch_size=4, micro_batch=2, resolution=512, lr=2e-4,
    num_inference_steps=50, guidance_scale=7.5, beta=15.0, dilate=20, pool=256,
)
OURS = {  # ours, except for these two values
    "sd14": SD,
    "sd15": SD,
    "sd21": SD,
    "sdxl": dict(
        PAPER["sdxl"], train_steps=1000, batch_size=4, micro_batch=1, resolution=1024, lr=2e-4,
        num_inference_steps=50, guidance_scale=5.0, beta=15.0, dilate=40, pool=256,
    ),
    # Steps: diffusers' for SD3, and the fewest that Z-Image's authors recommend.
    "sd35": dict(
        PAPER["sdxl"], train_steps=1000, batch_size=4, micro_batch=1, resolution=512, lr=2e-4,
        num_inference_steps=28, guidance_scale=4.5, beta=15.0, dilate=20, pool=256,
    ),
    "z-image": dict(
        PAPER["sdxl"], train_steps=1000, batch_size=4, micro_batch=1, resolution=512, lr=2e-4,
        num_inference_steps=28, guidance_scale=5.0, beta=15.0, dilate=20, pool=256,
    ),
    "toy": dict(
        grad_steps=2, prefix="base", lora_rank=16, train_steps=60, batch_size=8, micro_batch=8,
        resolution=64, lr=1e-3, num_inference_steps=10, guidance_scale=4.0, beta=15.0, dilate=3,
        pool=128, save_every=20,
        prompts=f"{TOY}/prompts_train.txt", test_prompts=f"{TOY}/prompts_test.txt",
    ),
}
THRESHOLD = dict(heatmap=0.2, saliency=0.5)
LEVEL = 1 / 255  # one step of an 8-bit picture
CLIPS = ("toy_pref", "toy_clip", "hps", "pick", "clip", "clip_h")  # rewards that are a CLIP
SPREAD_PAIRS = 64  # the pairs whose I0 gives the mean and the spread of the reward
SHOWN = 8  # held-out images in the pictures I0 | M | I | difference
WEIGHTS = dict(base=base_model, tuned=merged)  # what --prefix can name


def parse_args(argv=None):
    parser = settings_parser(NAME, __doc__)
    add = parser.add_argument
    add("--model", default="toy", help=f"{', '.join(OURS)}, a diffusers folder or a hub id")
    add("--reward", help=f"artifact, {REWARD_HELP}; default: artifact, or a CLIP")
    add("--concept", nargs=2, metavar=("BAD", "GOOD"), help="an unwanted text and a neutral one")
    add("--region", choices=tuple(THRESHOLD), help="by default heatmap, or saliency with --concept")
    add("--detector", help="artifact detector: a folder, a hub id or a file of weights")
    add("--threshold", type=float, help="problems are above it; 0.2 for heatmap, 0.5 for saliency")
    add("--dilate", type=int, help="pixels by which the region grows on every side")
    add("--beta", type=float, help="weight of the change outside the region; 0 is DRaFT")
    add("--prefix", choices=tuple(WEIGHTS), default="tuned", help="who takes the first T - K steps")
    add("--raw_norm", action="store_true", help="use the paper's norm, which needs another --beta")
    add("--pool", type=int, help="pairs of prompt and noise; 0 draws new ones for every update")
    add("--prompts", help="text file, one prompt per line")
    add("--test_prompts", help="held-out prompts; by default the last 100 of --prompts; we use 16")
    add("--train_steps", type=int, help="optimizer updates")
    add("--batch_size", type=int, help="images per update")
    add("--micro_batch", type=int, help="images per gradient pass; lower to save memory")
    add("--resolution", type=int, help="pixels")
    add("--num_inference_steps", type=int, help="sampling steps, during and after training")
    add("--guidance_scale", type=float, help="guidance scale, during and after training; 1 is none")
    add("--grad_steps", type=int, help="how many final sampling steps carry the gradient (K)")
    add("--lr", type=float, help="learning rate of AdamW")
    add("--lora_rank", type=int, help="LoRA rank (alpha = rank), at least 1")
    add("--init_lora", help="start from this LoRA")
    add("--checkpointing", action="store_true", help="save memory; costs a second forward pass")
    add("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    add("--save_every", type=int, default=60, help="updates between snapshots with samples")
    add("--seed", type=int, default=0, help="the random seed")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", help=f"run folder; by default runs/{NAME}-MODEL-REWARD")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.set_defaults(**settings_for(OURS, chosen_model(argv)))
    args = parser.parse_args(argv)
    check_ranges(args)

    # These defaults depend on other flags.
    if args.region is None:
        args.region = "saliency" if args.concept else "heatmap"
    if args.threshold is None:
        args.threshold = THRESHOLD[args.region]
    if args.reward is None and args.concept:
        args.reward = "toy_clip" if args.model == "toy" else "clip"
    if args.reward is None:
        args.reward = "artifact"
    needs_detector = args.region == "heatmap" or args.reward == "artifact"
    if args.detector is None and needs_detector and args.model == "toy":
        args.detector = f"{TOY}/detector"

    # known_reward exits if there is no such reward.
    has_clip = args.reward != "artifact" and known_reward(args.reward) in CLIPS
    needs_clip = args.concept or args.region == "saliency"
    if needs_clip and not has_clip:
        names = ", ".join(CLIPS)
        parser.error(f"--concept and --region saliency need a CLIP as --reward, one of {names}")
    if needs_detector and args.detector is None:
        parser.error("--detector is required, unless you pass --concept BAD GOOD")
    if args.detector is not None and not needs_detector:
        parser.error("--detector is not used with --region saliency and this reward")
    if args.prompts is None:
        parser.error(f"--prompts FILE is required with --model {args.model}")
    if args.lora_rank < 1:
        parser.error("--lora_rank must be 1 or more: I0 comes from the model with its LoRA off")
    if not 1 <= args.grad_steps <= args.num_inference_steps:
        parser.error("we need 1 <= grad_steps <= num_inference_steps")
    if not 0 <= args.threshold < 1:
        parser.error("--threshold must be in [0, 1), like the maps that it applies to")
    args.out = args.out or run_name(NAME, args)
    check_out(args)
    return args


# --------------------------------------------------------------------------------------------------
# The loss


def focus_loss(images, base, mask, r, beta, raw=False):
    """-(r' - beta * penalty), the mean over the batch.

    images  I, what the tuned model makes: (B, 3, H, W) in [0, 1]
    base    I0, what the base model makes of the same prompt and x_T: (B, 3, H, W) in [0, 1]
    mask    M, 1 where I0 has a problem, so that the image may change, else 0: (B, 1, H, W)
    r       r', the reward of the whole I in standard deviations of the base model's: (B,)
    beta    the weight of a change outside the region: so many standard deviations for a change of 1
    raw     use the paper's own penalty, the plain norm
    """
    penalty = change(images, base, 1 - mask, raw)
    if not raw:
        # For large changes this is close to the change itself, but at 0 it is flat. It bends at
        # LEVEL, which is one step of an 8-bit picture.
        penalty = torch.hypot(penalty, torch.full_like(penalty, LEVEL)) - LEVEL
    return (beta * penalty - r).mean()


def change(images, base, where, raw=False):
    """||where (I - I0)||_F per image (B,), divided by the root of the number of values unless raw.

    where: (B, 1, H, W), 1 at the pixels that count and 0 at the others.
    """
    difference = where * (images - base)
    # At I = I0, where training starts, vector_norm's gradient is 0. That of sum().sqrt() is NaN.
    norm = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    if raw:
        return norm
    num_values = images.shape[1] * where.flatten(1).sum(1)
    return norm / num_values.clamp(min=1).sqrt()


# --------------------------------------------------------------------------------------------------
# Regions, and the rewards that go with them


def problem_mask(heat, threshold, dilate):
    """A map (B, 1, H, W) -> M (B, 1, H, W): 1 where it is above the threshold, else 0.

    The ones grow by `dilate` pixels on every side.
    """
    above = (heat > threshold).float()
    return F.max_pool2d(above, 2 * dilate + 1, stride=1, padding=dilate)


def grad_cam(layer, score, images):
    """Grad-CAM (Selvaraju et al. 2017) of a ViT: images (B, 3, H, W) -> maps (B, 1, H, W).

    The map is relu(sum over D of w A), where A (B, 1 + g * g, D) is the output of `layer` and w the
    mean of dscore/dA over the patches. Each map is divided by its maximum, so it lies in [0, 1].
    score: images -> (B,). layer: the first norm of the last block, so A is what enters the block.
    Only the class token is pooled, so the patches that leave the block have no gradient.
    """
    kept = []

    def keep_output(module, inputs, output):
        kept.append(output.requires_grad_())

    with layer.register_forward_hook(keep_output), torch.enable_grad():
        (gradient,) = torch.autograd.grad(score(images).sum(), kept)
    # The first token is the class token, which has no position in the image.
    activation = kept[0].detach()[:, 1:].float()
    weight = gradient[:, 1:].float().mean(1, keepdim=True)
    cam = torch.relu((weight * activation).sum(-1))  # (B, g * g)
    grid = round(cam.shape[1] ** 0.5)
    cam = F.interpolate(cam.view(-1, 1, grid, grid), images.shape[2:], mode="bilinear")
    # A map that is 0 everywhere stays that way.
    maximum = cam.amax((1, 2, 3), keepdim=True)
    return cam / maximum.clamp(min=torch.finfo(cam.dtype).tiny)


def last_norm(clip):
    """The first norm of the last block in the image tower of a CLIP-like reward."""
    if isinstance(clip, PickScore):
        return clip.clip.vision_model.encoder.layers[-1].layer_norm1
    return clip.clip.visual.transformer.resblocks[-1].ln_1


@dataclass
class Region:
    """Where images have a problem: region(images, prompts) -> M (B, 1, H, W).

    We look at the detector's confidence map if there is one, else at the saliency of -reward.
    """

    threshold: float
    dilate: int
    detector: Detector = None
    clip: object = None  # the CLIP-like reward that `reward` is computed with
    reward: object = None

    def __call__(self, images, prompts):
        if self.detector is not None:
            heat = self.detector(images)[:, None]
            heat = F.interpolate(heat, images.shape[2:], mode="bilinear")
        else:
            heat = self.saliency(images, prompts)
        return problem_mask(heat, self.threshold, self.dilate)

    def saliency(self, images, prompts):
        """Grad-CAM of -r, which is high in the places that lower r."""

        def negative_reward(images):
            return -self.reward(images, prompts)

        return grad_cam(last_norm(self.clip), negative_reward, images)


def artifact_reward(detector):
    """A detector -> the reward r = -(its mean confidence), whatever the prompt."""

    def reward(images, prompts):
        return -detector(images).mean((1, 2))

    return reward


def concept_reward(clip, bad, good):
    """A CLIP and two texts -> the reward cos(image, good) - cos(image, bad), for any prompt."""
    # Both cosines are products with the image, so their difference is one product with this.
    difference = clip.text(good) - clip.text(bad)
    if not difference.any():
        sys.exit(f"--concept {bad!r} {good!r}: this CLIP cannot tell the two texts apart")
    # The CLIP caches text features by prompt, so we store ours under the pair of texts.
    clip.texts[bad, good] = difference

    def reward(images, prompts):
        return clip(images, [(bad, good)] * len(images))

    return reward


# --------------------------------------------------------------------------------------------------
# DRaFT, and the pairs that it trains on


def draft(model, scheduler, latents, cond, guidance_scale, uncond, grad_steps):
    """DRaFT-K: the last K DDIM steps with gradients, latents (B, C, h, w) -> images (B, 3, H, W).

    Also returns the K noise predictions. They keep their gradients, so that the log can show how
    much each step learns. With an epsilon model, the last step, at t = 1, hardly moves the image.
    """
    noise_preds = []
    for t in scheduler.timesteps[-grad_steps:]:
        noise_pred = denoise(model, latents, t, cond, guidance_scale, uncond)
        noise_pred.retain_grad()
        noise_preds.append(noise_pred)
        latents = scheduler_step(scheduler, noise_pred, t, latents, None)
    return decode(model, latents), noise_preds


@torch.no_grad()
def base_and_mask(model, scheduler, guidance_scale, region, micro_batch, noise, prompts):
    """What the base model makes of x_T (B, C, h, w) -> I0 (B, 3, H, W), M (B, 1, H, W), on the CPU.

    The base model is the same network with its LoRA off, so I0 is exact.
    """
    cond = condition(model, prompts)
    uncond = condition(model, [None] * len(prompts))
    num_steps = len(scheduler.timesteps)
    with base_model(model):
        latents = sample(model, scheduler, noise, cond, 0, num_steps, None, guidance_scale, uncond)
    base = decode_in_parts(model, latents, micro_batch)
    mask = region(base.to(model.device), prompts)
    return base, mask.cpu()


@torch.no_grad()
def sample_in_two(
    model, scheduler, guidance_scale, num_prefix_steps, micro_batch, noise, prompts, prefix, tail
):
    """x_T (B, C, h, w) -> images (B, 3, H, W) on the CPU, from two models in turn.

    prefix, tail: keys of WEIGHTS, for the first num_prefix_steps steps and for the rest.
    """
    cond = condition(model, prompts)
    uncond = condition(model, [None] * len(prompts))
    num_steps = len(scheduler.timesteps)
    latents = noise
    for weights, first, last in (
        (prefix, 0, num_prefix_steps), (tail, num_prefix_steps, num_steps),
    ):
        with WEIGHTS[weights](model):
            latents = sample(
                model, scheduler, latents, cond, first, last, None, guidance_scale, uncond
            )
    return decode_in_parts(model, latents, micro_batch)


class Pool:
    """The pairs (prompt, x_T) of a run, with I0, M and r(I0). They depend on (seed, pair) alone.

    make_base: (noise, prompts) -> I0, M. size: pair k + size repeats pair k; 0 means no repeats.
    """

    def __init__(self, model, prompts, seed, size, make_base, reward):
        self.model = model
        self.prompts = prompts
        self.seed = seed
        self.size = size
        self.make_base = make_base
        self.reward = reward
        # Of the first pairs, on the CPU:
        self.base = None  # I0
        self.mask = None  # M
        self.base_reward = None  # r(I0)

    def fill(self, num_pairs, batch_size):
        """Makes I0, M and r(I0) of the first pairs. Call it once, before the first batch."""
        # Under torchrun, each process makes its part of them, and all get all.
        own_pairs = own_part(range(num_pairs))
        parts = []
        batches = range(0, len(own_pairs), batch_size)
        for first in tqdm(batches, desc="I0 and M of the pool", disable=not is_main_process()):
            pairs = own_pairs[first : first + batch_size]
            parts.append(self.make(self.draw_noise(pairs), self.draw_prompts(pairs)))
        self.base, self.mask, self.base_reward = (
            gather(torch.cat(part), num_pairs) for part in zip(*parts)
        )

    def make(self, noise, prompts):
        """x_T and prompts -> I0, M and r(I0), on the CPU."""
        base, mask = self.make_base(noise, prompts)
        return base, mask, score(self.reward, base.to(self.model.device), prompts)

    def batch(self, pairs):
        """Numbers of pairs -> their prompts, and on the device x_T, I0, M and r(I0)."""
        if self.size:
            pairs = [pair % self.size for pair in pairs]
        prompts = self.draw_prompts(pairs)
        noise = self.draw_noise(pairs)
        if self.size:
            made = (self.base[pairs], self.mask[pairs], self.base_reward[pairs])
        else:
            made = self.make(noise, prompts)
        return prompts, noise, *(part.to(self.model.device) for part in made)

    def draw_prompts(self, pairs):
        prompts = []
        for pair in pairs:
            draw = generator(self.seed, "prompt", pair)
            pick = torch.randint(len(self.prompts), (), generator=draw)
            prompts.append(self.prompts[pick])
        return prompts

    def draw_noise(self, pairs):
        return initial_latents(self.model, [generator(self.seed, "train", pair) for pair in pairs])


# --------------------------------------------------------------------------------------------------
# Training


def read_both_prompts(args):
    """-> the training prompts, and 16 held-out ones."""
    train_prompts = read_prompts(args.prompts)
    if args.test_prompts:
        return train_prompts, read_prompts(args.test_prompts)[:16]
    if len(train_prompts) <= 100:
        sys.exit("--test_prompts FILE is required: --prompts has too few to hold out its last 100")
    return train_prompts[:-100], train_prompts[-100:][:16]


def load_judges(args, device):
    """-> the reward and the region, frozen on the device."""
    detector = load_detector(args.detector, device) if args.detector else None
    clip = None
    if args.reward == "artifact":
        reward = artifact_reward(detector)
    else:
        reward, _ = load_reward(args.reward, device)
        clip = reward
    if args.concept:
        reward = concept_reward(clip, *args.concept)
    if args.region == "heatmap":
        region = Region(args.threshold, args.dilate, detector)
    else:
        region = Region(args.threshold, args.dilate, clip=clip, reward=reward)
    return reward, region


@dataclass
class TestPairs:
    """Held-out pairs (prompt, x_T), with what the base model makes of them."""

    prompts: list
    noise: torch.Tensor  # x_T: (N, C, h, w)
    base: torch.Tensor  # I0: (N, 3, H, W) on the CPU
    mask: torch.Tensor  # M: (N, 1, H, W) on the CPU
    base_reward: torch.Tensor  # r(I0): (N,) on the CPU


def compare(run, model, scheduler, num_prefix_steps, pairs, reward, spread, step):
    """What training did so far to the held-out pairs -> a dict for the log.

    samples/region_*.png holds I0 | M | I | 3 |I - I0|, one row per prompt.
    """
    args = run.args
    base = pairs.base
    mask = pairs.mask

    def sample_pairs(prefix, tail):
        images = sample_in_two(
            model, scheduler, args.guidance_scale, num_prefix_steps, args.micro_batch,
            own_part(pairs.noise), own_part(pairs.prompts), prefix, tail,
        )
        return gather(images, len(pairs.prompts))

    images = sample_pairs(args.prefix, "tuned")
    columns = [base, mask.expand_as(base), images, 3 * (images - base).abs()]
    pictures = torch.stack([column[:SHOWN] for column in columns], 1).flatten(0, 1)
    path = run.dir / "samples" / f"region_{step:06d}.png"
    labels = ("I0: base model", "M: region", "I: now", "3 |I - I0|")
    save_grid(pictures, path, len(columns), pairs.prompts[:SHOWN], labels)

    # The objective, minus what the base model's own images get.
    reward_after = score(reward, images.to(model.device), pairs.prompts)
    gain = (reward_after - pairs.base_reward) / spread
    objective = -focus_loss(images, base, mask, gain, args.beta, args.raw_norm)
    stats = dict(
        test_objective=objective.item(),
        test_outside=change(images, base, 1 - mask).mean().item(),
        test_inside=change(images, base, mask).mean().item(),
    )
    # Let the base model take the last K steps, or all the others, to see who changes the image.
    if args.prefix == "tuned":
        only_prefix = sample_pairs("tuned", "base")
        only_tail = sample_pairs("base", "tuned")
        stats["test_outside_prefix"] = change(only_prefix, base, 1 - mask).mean().item()
        stats["test_outside_tail"] = change(only_tail, base, 1 - mask).mean().item()
    return stats


def main(args):
    train_prompts, test_prompts = read_both_prompts(args)
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution)
    args.resolution = model.resolution
    reward, region = load_judges(args, device)
    encode_once(model, train_prompts + test_prompts)

    params = make_trainable(
        model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora
    )
    num_params = sum(p.numel() for p in params)
    # The optimizer's settings are ours, because we do not know the paper's.
    optimizer = torch.optim.AdamW(
        params, lr=args.lr, betas=(0.9, 0.999), eps=1e-15, weight_decay=0.1, fused=True
    )

    sampler = dict(scheduler="euler" if model.is_flow else "ddim", eta=0.0)
    sampler.update(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    num_prefix_steps = args.num_inference_steps - args.grad_steps
    if args.prefix == "base":
        # For all who sample from the run later: these steps belong to the base model.
        sampler.update(base_steps=num_prefix_steps)
    scheduler = make_scheduler(model, sampler["scheduler"], args.num_inference_steps)
    make_base = functools.partial(
        base_and_mask, model, scheduler, args.guidance_scale, region, args.micro_batch
    )

    # The base model's own images of the held-out prompts, to compare the tuned ones with.
    noise_generators = [generator(args.seed, "held-out", i, 0) for i in range(len(test_prompts))]
    test_noise = initial_latents(model, noise_generators)
    test_base, test_mask = make_base(test_noise, test_prompts)
    test_reward = score(reward, test_base.to(device), test_prompts)
    test_pairs = TestPairs(test_prompts, test_noise, test_base, test_mask, test_reward)

    run = Run(args, model.source, sampler, NAME, PAPER)
    print_settings(args, PAPER, params)
    run.resume(params, optimizer)

    # Make I0 and M for the pool once. A short run does not need all of it, but the reward's unit
    # needs some pairs in any case.
    pool = Pool(model, train_prompts, args.seed, args.pool, make_base, reward)
    spread_pairs = min(SPREAD_PAIRS, args.pool or SPREAD_PAIRS)
    num_pairs = min(args.pool, args.train_steps * args.batch_size)
    pool.fill(max(num_pairs, spread_pairs), args.batch_size)
    if args.pool:
        areas = pool.mask.mean((1, 2, 3))
        num_empty = (areas == 0).sum()
        num_full = (areas == 1).sum()
        print(f"{len(areas)} pairs: the region is {areas.mean():.1%} of I0")
        print(f"  nothing is wrong in {num_empty} of them, and everything in {num_full}")

    # The reward's unit depends on the seed alone, so a resumed run finds the same one.
    base_rewards = pool.base_reward[:spread_pairs]
    mean = base_rewards.mean().item()
    spread = base_rewards.std().item()
    print(f"{args.reward} of {spread_pairs} base images: {mean:.4f} ± {spread:.4f}, the unit of r'")
    if not spread > 0:
        sys.exit("these images have equal rewards, so beta has no unit: use another --reward")
    run.config.update(reward_mean=mean, reward_spread=spread)
    run.write_config()

    compare_with_base = functools.partial(
        compare, run, model, scheduler, num_prefix_steps, test_pairs, reward, spread
    )
    if run.start == 0:
        before = held_out(run, model, reward, test_prompts, step=0)
        print(f"held-out {args.reward} before: {describe_reward(before)}")
        run.note_before(**compare_with_base(step=0))

    # Those of flows are not whole numbers.
    last_timesteps = [round(t) for t in scheduler.timesteps[num_prefix_steps:].tolist()]

    steps = range(run.start + 1, args.train_steps + 1)
    progress = tqdm(
        steps, initial=run.start, total=args.train_steps, desc=NAME, disable=not is_main_process()
    )
    for step in progress:
        started = time.time()

        # Take the next pairs in turn, with what the base model makes of them. Under torchrun, each
        # process takes its part of the pairs; alone, this process takes all of them.
        first = (step - 1) * args.batch_size
        pairs = own_part(range(first, first + args.batch_size))
        prompts, noise, base, mask, base_reward = pool.batch(pairs)

        # Denoise the same noise up to the last K steps, the whole batch at once and without
        # gradients: with the tuned model, as in DRaFT, or with the base model.
        cond = condition(model, prompts)
        uncond = condition(model, [None] * len(prompts))
        with WEIGHTS[args.prefix](model):
            latents = sample(
                model, scheduler, noise, cond, 0, num_prefix_steps, None,
                args.guidance_scale, uncond,
            )

        # Take the last steps with gradients, raise the reward and hold the rest of the image, one
        # micro-batch at a time. Weight each micro-batch's mean by its fraction of the batch.
        total_loss = 0.0
        rewards = []
        outside = []
        inside = []
        squared_grads = dict.fromkeys(last_timesteps, 0.0)
        for i in range(0, len(prompts), args.micro_batch):
            part = slice(i, i + args.micro_batch)
            cond = condition(model, prompts[part])
            uncond = condition(model, [None] * len(prompts[part]))
            images, noise_preds = draft(
                model, scheduler, latents[part], cond, args.guidance_scale, uncond, args.grad_steps
            )
            r = reward(images, prompts[part])
            r_mapped = (r - mean) / spread
            loss = focus_loss(images, base[part], mask[part], r_mapped, args.beta, args.raw_norm)
            loss = loss * len(r) / args.batch_size
            loss.backward()
            total_loss += loss.detach()
            rewards.append(with_parts(reward, r))

            # For the log: how far the images moved, and how much each step learns.
            images = images.detach()
            outside.append(change(images, base[part], 1 - mask[part], args.raw_norm))
            inside.append(change(images, base[part], mask[part], args.raw_norm))
            for t, noise_pred in zip(last_timesteps, noise_preds):
                squared_grads[t] += noise_pred.grad.square().sum()

        # With several processes, add up their gradients, and collect what they log. Every loss is
        # divided by the size of the whole batch, so this is a sum, and not a mean as in DDP.
        sum_gradients(params)
        total_loss = sum_processes(total_loss)
        rewards = gather(torch.cat(rewards), args.batch_size)
        base_reward = gather(base_reward, args.batch_size)
        outside = gather(torch.cat(outside), args.batch_size)
        inside = gather(torch.cat(inside), args.batch_size)
        area = gather(mask.mean((1, 2, 3)), args.batch_size)
        grads = sum_processes(torch.stack(list(squared_grads.values()))).sqrt().tolist()

        # Update the weights, with the gradient's norm clipped to 1. Skip the update if the loss
        # or the gradient is NaN or Inf. We check both, because the gradient of clamp is zero where
        # a pixel is NaN.
        grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        is_finite = math.isfinite(grad_norm) and math.isfinite(total_loss)
        if is_finite:
            optimizer.step()
        else:
            run.skip(step)
        optimizer.zero_grad(set_to_none=True)

        # Log the update, with samples of held-out prompts at every snapshot.
        stats = dict(
            loss=total_loss.item(),
            **reward_means(reward, rewards),
            base_reward=base_reward.mean().item(),
            grad_norm=grad_norm,
            grad_rms=grad_norm / num_params**0.5,
            outside=outside.mean().item(),
            inside=inside.mean().item(),
            area=area.mean().item(),
            empty=int((area == 0).sum()),
            grad_by_t={t: float(f"{grad:.4g}") for t, grad in zip(last_timesteps, grads)},
            skipped=None if is_finite else True,
            seconds=time.time() - started,
        )
        is_snapshot = step % args.save_every == 0 or step == args.train_steps
        if is_snapshot:
            stats.update(held_out(run, model, reward, test_prompts, step))
            stats.update(compare_with_base(step=step))
        run.log(step, **stats)
        progress.set_postfix(loss=f"{stats['loss']:.2e}", reward=f"{stats['reward']:.3f}")

        # Save the weights for the user, and a checkpoint to resume from.
        if is_snapshot:
            run.save(step, model, params, optimizer)

    # From the log, because a resumed run may have had nothing left to do.
    after = describe_reward(run.read_log()[-1])
    print(f"held-out {args.reward} after:  {after}; see {run.dir / 'index.html'}")


if __name__ == "__main__":
    args = parse_args()
    with readable_errors(args), joined_processes(args):
        main(args)
