"""D-Fusion: DPO on visually consistent pairs of images (Hu et al. 2025, arXiv 2505.22002).

Two samples of one prompt differ in everything, so a preference between them says little. D-Fusion
makes the better image out of the worse one. It denoises the same noise again, while self-attention
takes the prompt's items from a well-aligned reference. We train on such pairs with DPO, DDPO or
DPOK.

theta denotes the weights being trained. theta_old is a copy made at the start of each round. It
samples the round and then stays fixed. Time is the index i into scheduler.timesteps. Step i takes
the latents from x[i] to x[i+1]. x[0] is pure noise, and x[T] is the clean image. The paper counts
the steps down from T to 1, and so do the flags --fusion_steps and --trained_steps.

A round, for each of its prompts c:
  x                = images_per_prompt samples of theta_old (DDIM, eta 1, with guidance)        (1)
  r                = reward(decode(x[T]), c)
  reference, base  = the best quarter, each used twice, and the worst half, paired by rank
  mask[i]          = XOR over the items of [maps[i, item] >= threshold[item]]                   (4)
                     maps: cross-attention of the reference, in the first up block (--mask_layer)
  target           = the base's noise, denoised again. In the mid block and all up blocks, its
                     self-attention uses the reference's keys and values where mask[i] is set   (5)
  a                = target if r(target) >= adoption_threshold * r(base) else reference         (7)
  b                = base
Then inner_epochs updates of theta, each on all pairs at their trained steps:
  log_ratio        = log p_theta(x[i+1] | x[i], c) - log p_theta_old(x[i+1] | x[i], c)
  dpo_loss         = -logsigmoid(beta * (log_ratio_a - log_ratio_b))                            (6)
  ddpo_loss        = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))              (8)
                     ratio = exp(log_ratio), A = (r - mean) / std of the prompt's rewards so far
  dpok_loss        = ddpo_loss + kl_weight * KL(p_theta || p_pretrained)                        (9)
p is the plain guided model, even for steps that were fused. In a round's first update theta still
equals theta_old, so log_ratio is 0. We keep its log p_theta as log p_theta_old for the others.
log p is averaged over the latent elements, as in DDPO's and D3PO's code, so log ratios and margins
are small: about 1e-4 on the toy world. A beta that is meant for summed log-probabilities must be
multiplied by the number of elements, C h w. As long as beta * margin is small against 1, beta only
scales the loss, and Adam does not see that scale. So beta has no effect here until it comes near
10,000. Where the margin is 0, any other loss on it has the same gradient, too, up to a factor: a
fork with such a loss needs more inner_epochs than 2 to differ much.

The loss stays near ln 2 (dpo) or 0 (ddpo, dpok) however well the model learns, and `reward` varies
with the prompts of each round. So watch the held-out `test_reward`, and compare `reward` between
runs at equal rounds only. `accuracy` is the share of pairs and steps with log_ratio_a >
log_ratio_b, and `margin` is the mean difference. Both are measured on the pairs that we train on,
so they are 0.5 and 0 in the first update of every round and then rise.

What to expect on the toy world: targets look almost like their bases, score a little below them on
average, and about two thirds are adopted. test_reward rises by 0.4 to 0.7: see results/dfusion.md.

Differences from the paper and from the authors' code, which samples and fuses but does not train:
1. We merge masks with XOR and take maps from the first up block, as in the paper. The code merges
   with OR (--mask_merge or) and also takes maps from a down block.
2. The right-hand side of Eq. 7 is missing from the paper. We use the base there;
   --adopt_against reference is the other reading. The paper gives no beta, kl_weight or clip range:
   ours come from D3PO, DPOK and the authors' configuration file.
3. If an item has several tokens (woolen = woo|len), we average over all of them. In the code, five
   prompts point at the wrong token.
4. We replay the reference in one batch with the target, from the latents and maps that we kept
   from sampling it. That takes two passes instead of three.
5. The authors chose their thresholds by eye on SD 2.1. For other models, and for prompts from a
   text file, ours come from a quantile over a few samples, and you can edit them.
6. DDPO and DPOK train on the images of the pairs. The paper does not say so; DDPO's own code trains
   on all samples. Its code also gives the limit of 5 on A.
7. Adam's eps is 1e-15. With Table 3's 1e-8, most gradients on the toy world are below eps, which
   silently shrinks the learning rate, and beta would change the size of the steps.
8. D3PO's code, from which Eq. 6 at every step comes, clamps each ratio to 1 +- 0.1 inside the loss.
   We do not. Our ratios stay within 1 +- 0.01, where the clamp would do nothing.
9. We read Table 3's accumulation of 320 as all pairs of a round, so a round makes two updates. If
   it counts images, the paper makes four.

  $ python dfusion_dpo.py                             # the toy world: two minutes on a CPU core
  $ python dfusion_dpo.py --naive --out runs/naive    # the baseline: the same pairs, a = reference
  $ python dfusion_dpo.py --model sd21 --algo ddpo --template template2        # one CUDA GPU
"""

import contextlib
import math
import re
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from tqdm import tqdm

from common import ROOT, base_model, decode_in_parts, denoise, generator, initial_latents
from common import load_model, make_scheduler, make_trainable, pick_device, predict_x0
from data.items import read_items, token_span, write_items
from data.prompts import condition, encode_once, read_prompts
from rewards import REWARD_HELP, load_reward
from run_folder import Run, check_out, check_ranges, chosen_model, describe_reward, gather, held_out
from run_folder import is_main_process, joined_processes, model_family, own_part, print_settings
from run_folder import readable_errors, reward_columns, run_name, save_grid, score_with_parts
from run_folder import settings_for, settings_parser, sum_gradients, sum_processes, write_atomically

NAME = "dfusion_dpo"  # names the run folder and the progress bar; change it in a fork
# Table 3: 4 x 160 images of 40 prompts per round, 25,600 in total. The LoRA rank is from the
# authors' code.
PAPER = {
    "sd21": dict(
        train_steps=80, batch_size=640, images_per_prompt=16, inner_epochs=2, resolution=512,
        num_inference_steps=20, guidance_scale=5.0, adoption_threshold=1.0, lr=1e-4, lora_rank=4,
        reward="clip_h",
    ),
}
OURS = {  # what we change, and the models that the paper does not cover
    "sd14": PAPER["sd21"],
    "sd15": PAPER["sd21"],
    "sd21": PAPER["sd21"],
    # With guidance, 8 images are 16 rows of the U-Net: about 110 GiB at 1024 px (computed).
    "sdxl": {**PAPER["sd21"], "resolution": 1024, "micro_batch": 2},
    "toy": dict(
        train_steps=16, batch_size=64, images_per_prompt=8, inner_epochs=2, resolution=64,
        num_inference_steps=10, guidance_scale=1.0, adoption_threshold=1.0, lr=1e-3, lora_rank=8,
        reward="toy_pref", prompts=f"{ROOT}/data/dfusion_toy.json",
        # Block 5 is 8 x 8. The first up block is 4 x 4, which is too coarse for these objects.
        mask_layer=5, item_token="next",
        # All of the 10 steps but the two of smallest noise: their gradients are 44 and 15 times as
        # long as the first step's and hardly point to the reward. See results/dfusion.md.
        trained_steps="10-3", train_timesteps=3,
    ),
}
PAPERS_PROMPTS = ROOT / "data" / "dfusion_templates.json"
ETA = 1.0  # DDIM's noise weight, Table 3: each step adds as much noise as in ancestral sampling
CLIP_RANGE = 0.1  # of Eq. 8, from the authors' configuration; ddpo-pytorch has 1e-4
MASK_QUANTILE = 0.8  # ours: an item covers about a fifth of the picture
PICTURES = ("base", "reference", "mask", "target")  # a row of samples/round_*.png


def parse_args(argv=None):
    parser = settings_parser(NAME, __doc__)
    add = parser.add_argument
    add("--model", default="toy", help=f"{', '.join(OURS)}, a diffusers folder or a hub id")
    add("--reward", help=f"{REWARD_HELP}; it needs no gradient")
    add("--algo", choices=("dpo", "ddpo", "dpok"), default="dpo", help="Eq. 6, 8 or 9")
    add("--naive", action="store_true", help="do not fuse: train on references and bases")
    add(
        "--prompts", default=str(PAPERS_PROMPTS),
        help="JSON as in data/, or a text file with one line 'prompt | item; item' per prompt",
    )
    add("--template", help="which list in the JSON file; by default the first")
    add("--test_prompts", help="held-out prompts; we use the first 16; by default, the JSON's own")
    add("--train_steps", type=int, help="optimizer updates; inner_epochs of them make a round")
    add("--batch_size", type=int, help="images sampled per round")
    add("--images_per_prompt", type=int, help="images per prompt in a round, sampled in one batch")
    add(
        "--micro_batch", type=int, default=8,
        help="images per gradient pass, each one step of a trajectory; lower to save memory",
    )
    add("--inner_epochs", type=int, help="updates on each round's pairs")
    add("--trained_steps", help="steps to train on, e.g. 20-6; by default all; for toy, 10-3 of 10")
    add("--train_timesteps", type=int, help="how many of these to draw per pair; by default all")
    add("--resolution", type=int, help="pixels")
    add("--num_inference_steps", type=int, help="sampling steps, during and after training")
    add("--guidance_scale", type=float, help="guidance scale, during and after training; 1 is none")
    add("--fusion_layers", help="blocks to fuse in, e.g. 3-6; by default the mid and up blocks")
    add("--fusion_steps", help="steps to fuse, e.g. 18-1; by default all but the first two")
    add("--mask_layer", type=int, help="block that makes the mask; by default the first up block")
    add(
        "--item_token", choices=("own", "next"), default="own",
        help="which maps mark an item: those of its own tokens, or that of the next token",
    )
    add("--mask_merge", choices=("xor", "or"), default="xor", help="how to merge the items' masks")
    add(
        "--adoption_threshold", type=float,
        help="lambda of Eq. 7; keep 1 for a reward that can be negative, or it acts in reverse",
    )
    add(
        "--adopt_against", choices=("base", "reference"), default="base",
        help="whose reward to compare the target's with in Eq. 7",
    )
    add(
        "--trajectory", choices=("recorded", "inversion"), default="recorded",
        help="inversion uses trajectories from DDIM inversion, the ablation in section 4.4",
    )
    add("--beta", type=float, default=0.1, help="of dpo: weight in Eq. 6")  # D3PO's
    add("--kl_weight", type=float, default=0.01, help="of dpok: weight in Eq. 9")  # DPOK's code
    add("--lr", type=float, help="learning rate of AdamW")
    add("--lora_rank", type=int, help="LoRA rank (alpha = rank); 0 trains the whole denoiser")
    add("--init_lora", help="start from this LoRA")
    add("--checkpointing", action="store_true", help="save memory; costs a second forward pass")
    add("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    add("--save_every", type=int, default=4, help="updates between snapshots with samples")
    add("--seed", type=int, default=0, help="the random seed")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", help=f"run folder; by default runs/{NAME}-MODEL-REWARD")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    settings = dict(settings_for(OURS, chosen_model(argv)))
    # This default fits only the number of steps that it was chosen for, so we set it later.
    own_trained_steps = settings.pop("trained_steps", None)
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    check_ranges(args)

    if args.naive and (args.fusion_layers or args.fusion_steps):
        parser.error("--naive fuses nothing: leave out --fusion_layers and --fusion_steps")
    num_steps = args.num_inference_steps
    if args.trained_steps is None and num_steps == settings["num_inference_steps"]:
        args.trained_steps = own_trained_steps
    args.trained_steps = args.trained_steps or f"{num_steps}-1"
    args.fusion_steps = args.fusion_steps or f"{max(num_steps - 2, 1)}-1"
    args.train_timesteps = args.train_timesteps or num_steps
    if args.images_per_prompt < 4 or args.images_per_prompt % 4:
        parser.error("--images_per_prompt must be a multiple of 4: the best quarter are references")
    if args.batch_size % args.images_per_prompt:
        parser.error("--batch_size must be a multiple of --images_per_prompt")
    if args.micro_batch < 2 or args.micro_batch % 2:
        parser.error("--micro_batch must be even: a pair is two images")
    if args.algo == "dpok" and args.lora_rank == 0:
        parser.error("--algo dpok needs the pretrained model, which --lora_rank 0 overwrites")
    args.out = args.out or run_name(NAME, args)
    check_out(args)
    return args


def number_range(flag, text):
    """A flag's "3-6", "18-1" or "3" -> range from the smaller to the larger number, inclusive."""
    if not re.fullmatch(r"\d+(-\d+)?", text):
        sys.exit(f"{flag} {text}: it must be one number, or two with a dash, such as 3-6")
    ends = [int(end) for end in text.split("-")]
    return range(min(ends), max(ends) + 1)


def step_indices(flag, text, num_inference_steps):
    """A flag's steps, counted down to 1 as in the paper -> range of indices i, counted up from 0.

    With 20 steps "18-1" is range(2, 20): all but the first two, which are the noisiest.
    """
    counted = number_range(flag, text)
    if counted[0] < 1 or counted[-1] > num_inference_steps:
        sys.exit(f"{flag} {text}: steps are counted from {num_inference_steps} down to 1")
    return range(num_inference_steps - counted[-1], num_inference_steps - counted[0] + 1)


# --------------------------------------------------------------------------------------------------
# The losses


def dpo_loss(log_ratio_a, log_ratio_b, beta):
    """Eq. 6 for preferred images a and rejected images b, (B,) each at the same steps -> scalar."""
    margin = log_ratio_a - log_ratio_b
    return -F.logsigmoid(beta * margin).mean()


def ddpo_loss(log_ratio, advantage, clip_range):
    """Eq. 8, PPO's clipped objective: log_ratio (B,), advantage (B,) -> scalar.

    A step whose probability has moved beyond the clip range in the right direction gets no
    gradient.
    """
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped_ratio).mean()


def dpok_loss(log_ratio, advantage, clip_range, kl, kl_weight):
    """Eq. 9 with alpha 1: kl (B,) is KL(p_theta || p_pretrained), averaged over the latents."""
    return ddpo_loss(log_ratio, advantage, clip_range) + kl_weight * kl.mean()


def advantages(rewards, past_rewards):
    """Rewards of a prompt's images, of any shape -> (r - mean) / std, within -5 .. 5.

    past_rewards: list of all rewards of the prompt's plain samples so far, including this round's.
    """
    past = torch.tensor(past_rewards)
    return ((rewards - past.mean()) / (past.std(correction=0) + 1e-6)).clamp(-5, 5)


# --------------------------------------------------------------------------------------------------
# The policy: a step of DDIM with eta 1 is a Gaussian


def guided(model, scheduler, latents, i, prompts, guidance_scale):
    """The model's output under guidance at step i, an int or (B,) -> (B, C, h, w).

    The guided model is the policy: it samples, so its probabilities are the ones to change.
    Both halves, with and without the prompt, carry gradients.
    """
    cond = condition(model, prompts)
    uncond = condition(model, [None] * len(prompts))
    return denoise(model, latents, scheduler.timesteps[i], cond, guidance_scale, uncond)


def alpha_bars(scheduler):
    """alpha_bar, the share of signal, for a trajectory's latents x[0] .. x[T] -> (T+1,)."""
    before_each_step = scheduler.alphas_cumprod[scheduler.timesteps]
    return torch.cat([before_each_step, scheduler.final_alpha_cumprod.view(1)])


def ddim_variance(alpha_bar, next_alpha_bar):
    """sigma^2 of the steps from alpha_bar to next_alpha_bar, in Eq. 1."""
    return ETA**2 * (1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)


def predict_x0_and_eps(scheduler, noise_pred, t, latents):
    """The model's output -> the clean latents and the noise that it implies, (B, C, h, w) each.

    t: the timesteps of the latents, a scalar or (B,).
    """
    t = t.view(-1, 1, 1, 1)
    alpha_bar = scheduler.alphas_cumprod[t].to(latents)
    x0 = predict_x0(scheduler, noise_pred, t, latents)
    eps = (latents - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    return x0, eps


def ddim_step(scheduler, noise_pred, i, latents):
    """Eq. 1, step i, an int or (B,): p(x[i+1] | x[i]) is the Gaussian N(mu, sigma^2).

    noise_pred, latents (B, C, h, w) -> mu (B, C, h, w), sigma (B or 1, 1, 1, 1).
    """
    bars = alpha_bars(scheduler)
    alpha_bar = bars[i].view(-1, 1, 1, 1).to(latents)
    next_alpha_bar = bars[i + 1].view(-1, 1, 1, 1).to(latents)
    variance = ddim_variance(alpha_bar, next_alpha_bar)
    x0, eps = predict_x0_and_eps(scheduler, noise_pred, scheduler.timesteps[i], latents)
    # The mean keeps part of the noise, eps. The rest is the step's fresh noise, of size sigma.
    mu = next_alpha_bar.sqrt() * x0 + (1 - next_alpha_bar - variance).sqrt() * eps
    return mu, variance.sqrt()


def steps_with_noise(scheduler, steps):
    """The subset of `steps` that adds noise. A step without noise has no probability to train."""
    bars = alpha_bars(scheduler)
    variance = ddim_variance(bars[:-1], bars[1:])
    return [i for i in steps if variance[i] > 0]


def log_normal(x, mu, sigma):
    """log N(x; mu, sigma^2) of (B, C, h, w) -> (B,).

    Averaged over the latent elements, as in DDPO's and D3PO's code, not summed.
    """
    squares = (x - mu) ** 2 / (2 * sigma**2)
    return (-squares - sigma.log() - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))


def normal_kl(mu, mu_pretrained, sigma):
    """KL(N(mu, sigma^2) || N(mu_pretrained, sigma^2)) -> (B,), a mean like log_normal."""
    return ((mu - mu_pretrained) ** 2 / (2 * sigma**2)).mean((1, 2, 3))


@torch.no_grad()
def sample_trajectories(
    model, scheduler, prompt, generators, guidance_scale, capture=None, token_spans=()
):
    """Samples images of one prompt, one per generator, and keeps all their latents.

    The LoRA stays unmerged: rounded weights would be a different policy from the one we train.
    capture: an installed CrossAttentionMaps, to keep the items' maps as well.
    Returns trajectories (B, T+1, C, h, w) and maps (B, T, items, s, s) or None, on the CPU.
    """
    prompts = [prompt] * len(generators)
    latents = initial_latents(model, generators)
    trajectory = [latents.cpu()]
    maps = []
    for i in range(len(scheduler.timesteps)):
        noise_pred = guided(model, scheduler, latents, i, prompts, guidance_scale)
        mu, sigma = ddim_step(scheduler, noise_pred, i, latents)
        # The generators continue where they left off: first x[0], then each step's noise.
        latents = mu + sigma * initial_latents(model, generators)
        trajectory.append(latents.cpu())
        if capture:
            maps.append(capture.pop_item_maps(token_spans))
    return torch.stack(trajectory, 1), torch.stack(maps, 1) if maps else None


@torch.no_grad()
def invert(model, scheduler, prompt, x0):
    """Clean latents (B, C, h, w) -> trajectories (B, T+1, C, h, w) by DDIM inversion.

    Section 4.4 replaces the recorded trajectories with these. Inversion runs the steps backward:
    at step i the model gets the latents x[i+1], but the timestep of x[i]. We run it without
    guidance, as null-text inversion does.
    """
    prompts = [prompt] * len(x0)
    bars = alpha_bars(scheduler)
    # The timestep of each x[i]. The clean latents count as timestep 0.
    timesteps = torch.cat([scheduler.timesteps, torch.zeros(1, dtype=torch.long)])
    latents = x0.to(model.device)
    trajectory = [x0]
    for i in reversed(range(len(scheduler.timesteps))):
        noise_pred = guided(model, scheduler, latents, i, prompts, guidance_scale=1.0)
        x0_pred, eps = predict_x0_and_eps(scheduler, noise_pred, timesteps[i + 1], latents)
        alpha_bar = bars[i].to(latents)
        latents = alpha_bar.sqrt() * x0_pred + (1 - alpha_bar).sqrt() * eps
        trajectory.insert(0, latents.cpu())
    return torch.stack(trajectory, 1)


# --------------------------------------------------------------------------------------------------
# Masks and fusion: reading and changing the denoiser's attention


class CrossAttentionMaps:
    """A diffusers processor for cross-attention: the stock one, but it also keeps its maps.

    A map says how much each place in the image attends to each token. We keep the mean over heads,
    for the last `batch_size` rows only. Under guidance these are the rows with the prompt, which
    `denoise` puts behind the unconditional ones.
    """

    stock = AttnProcessor2_0()

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.maps = []  # (B, h*w, tokens) of each module that ran since the last pop

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        q = split_heads(attn, attn.to_q(hidden_states[-self.batch_size :]))
        k = split_heads(attn, attn.to_k(encoder_hidden_states[-self.batch_size :]))
        scores = (q @ k.mT * attn.scale).float()  # (B, heads, h*w, tokens)
        self.maps.append(scores.softmax(-1).mean(1))
        return self.stock(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    def pop_item_maps(self, token_spans):
        """The maps since the last pop, averaged over modules and over each item's tokens.

        token_spans: for each item the positions of its tokens -> (B, items, s, s) on the CPU.
        """
        maps = torch.stack(self.maps).mean(0)  # (B, h*w, tokens)
        self.maps.clear()
        side = math.isqrt(maps.shape[1])
        item_maps = [maps[:, :, tokens].mean(-1) for tokens in token_spans]
        return torch.stack(item_maps, 1).unflatten(2, (side, side)).cpu()


class SelfAttentionFusion:
    """A diffusers processor for self-attention: Eq. 5, or the stock one while there are no masks.

    The batch is [n references | m targets], or two such halves under guidance. Set `masks`, bool
    (m, s, s), to fuse. Target j then takes its keys and values inside masks[j] from the
    reference reference_of[j]. Its queries are unchanged, and so are the references.
    """

    stock = AttnProcessor2_0()

    def __init__(self, num_references, reference_of):
        self.num_references = num_references
        self.reference_of = reference_of
        self.masks = None

    def __call__(self, attn, hidden_states, *args, **kwargs):
        if self.masks is None:
            return self.stock(attn, hidden_states, *args, **kwargs)
        side = math.isqrt(hidden_states.shape[1])
        masks = F.interpolate(self.masks[:, None].float(), (side, side), mode="nearest")
        key_masks = masks.flatten(2).mT.bool()  # (m, h*w, 1): one decision per key position
        q = attn.to_q(hidden_states)
        k = self.fuse(attn.to_k(hidden_states), key_masks)
        v = self.fuse(attn.to_v(hidden_states), key_masks)
        q, k, v = [split_heads(attn, x) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)  # (B, h*w, channels)
        # The output projection, and diffusers' dropout, which is off.
        return attn.to_out[1](attn.to_out[0](out))

    def fuse(self, x, key_masks):
        """Eq. 5: keys or values (halves * (n + m), h*w, channels) -> the fused ones."""
        halves = x.unflatten(0, (-1, self.num_references + len(key_masks)))
        references = halves[:, : self.num_references]
        targets = halves[:, self.num_references :]
        fused = torch.where(key_masks, references[:, self.reference_of], targets)
        return torch.cat([references, fused], 1).flatten(0, 1)


def split_heads(attn, x):
    """(B, tokens, heads * d) -> (B, heads, tokens, d)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


@contextlib.contextmanager
def installed(model, processor, names):
    """Inside this context, the named attention modules use the processor, not the stock one."""
    stock = model.denoiser.attn_processors
    changed = dict(stock)
    for name in names:
        changed[name] = processor
    try:
        model.denoiser.set_attn_processor(changed)
        # Our processors keep state, which a compiled block would bake in.
        with torch.compiler.set_stance("force_eager"):
            yield processor
    finally:
        model.denoiser.set_attn_processor(stock)


def attention_blocks(model):
    """The denoiser's blocks with attention, in the paper's order: down, mid, up (0 .. 6 in SD)."""
    names = {name.split(".attentions")[0] for name in model.denoiser.attn_processors}
    # Alphabetical order is the right one: "down_blocks.0" < "mid_block" < "up_blocks.1".
    return sorted(names)


def processor_names(model, blocks, kind):
    """The self-attention ("attn1") or cross-attention ("attn2") processors of some blocks."""
    return [
        name
        for name in model.denoiser.attn_processors
        if name.split(".attentions")[0] in blocks and f".{kind}." in name
    ]


def item_token_spans(args, model, row):
    """For each item of a row of the prompts file, the tokens whose maps mark it."""
    tokenizer = model.pipe.tokenizer
    return [token_span(tokenizer, row["prompt"], item, args.item_token) for item in row["items"]]


def merge_masks(maps, thresholds, merge):
    """Eq. 4: maps (..., items, s, s), one threshold per item -> masks (..., s, s), bool."""
    item_masks = maps >= torch.tensor(thresholds).view(-1, 1, 1)
    if merge == "xor":
        # The XOR of several masks is true where an odd number of them is.
        return item_masks.sum(-3) % 2 == 1
    return item_masks.any(-3)


def shade(image, masks):
    """Image (3, H, W), masks (steps, s, s) -> the image, dark where the masks are never set."""
    how_often = masks.float().mean(0)[None, None]
    return image * (0.2 + 0.8 * F.interpolate(how_often, image.shape[-2:], mode="nearest")[0])


@torch.no_grad()
def fuse(
    model, scheduler, plan, prompt, references, bases, reference_of, masks, generators,
    guidance_scale,
):
    """Denoises the noise of each base again, with items from its reference (section 3.2).

    references (n, T+1, C, h, w) and their masks (n, T, s, s); bases (m, T+1, C, h, w);
    reference_of (m,): each base's index among the references; generators: the bases', restarted.
    Returns the targets' trajectories (m, T+1, C, h, w) on the CPU.
    """
    n = len(references)
    m = len(bases)
    latents = initial_latents(model, generators)
    trajectory = [latents.cpu()]
    processor = SelfAttentionFusion(n, reference_of.to(model.device))
    with installed(model, processor, plan.fused_modules):
        for i in range(len(scheduler.timesteps)):
            # Draw at every step, so that the noise is the same as the base's.
            noise = initial_latents(model, generators)
            # Before the first fused step, a target equals its base.
            if i < plan.fused_steps.start:
                latents = bases[:, i + 1].to(model.device)
                trajectory.append(latents.cpu())
                continue
            if i in plan.fused_steps:
                # Replay the references as they were at this step, beside the targets.
                processor.masks = masks[reference_of, i].to(model.device)
                both = torch.cat([references[:, i].to(model.device), latents])
                prompts = [prompt] * (n + m)
                noise_pred = guided(model, scheduler, both, i, prompts, guidance_scale)[n:]
                processor.masks = None
            else:
                noise_pred = guided(model, scheduler, latents, i, [prompt] * m, guidance_scale)
            mu, sigma = ddim_step(scheduler, noise_pred, i, latents)
            latents = mu + sigma * noise
            trajectory.append(latents.cpu())
    return torch.stack(trajectory, 1)


# --------------------------------------------------------------------------------------------------
# A round: samples of theta_old, made into pairs


@dataclass
class FusionPlan:
    """Where and when we read and change attention."""

    mask_modules: list  # names of the cross-attention processors whose maps make the masks
    fused_modules: list  # names of the self-attention processors that fuse
    fused_steps: range  # indices i


@dataclass
class Samples:
    """Some images of one prompt, on the CPU."""

    trajectories: torch.Tensor  # (B, T+1, C, h, w), fp32
    images: torch.Tensor  # (B, 3, H, W) in [0, 1]
    rewards: torch.Tensor  # (B,)
    parts: dict = field(default_factory=dict)  # of a sum, for the log: {"reward_hps": (B,), ...}

    def __getitem__(self, indices):
        return Samples(self.trajectories[indices], self.images[indices], self.rewards[indices])


@dataclass
class Pairs:
    """What a round trains on: P pairs. The tensors' first index is 0 for a, 1 for b."""

    prompts: list  # P texts
    trajectories: torch.Tensor  # (2, P, T+1, C, h, w), fp32, on the CPU
    advantages: torch.Tensor  # (2, P)
    pictures: list  # base | reference | mask | target of the first pair of up to 8 prompts
    stats: dict  # round statistics for the log


def draw_prompts(args, rows, number):
    """The prompts of round `number`, as indices into rows."""
    draw = generator(args.seed, "prompts", number)
    num_prompts = args.batch_size // args.images_per_prompt
    return torch.randperm(len(rows), generator=draw)[:num_prompts].tolist()


def noise_generators(args, number, row_index, images):
    """Fresh noise generators for the given images of a prompt. Their first draw is x[0]."""
    return [generator(args.seed, "trajectory", number, row_index, int(k)) for k in images]


def sample_prompt(args, model, scheduler, row, generators, plan):
    """sample_trajectories for a row's prompt, with its items' maps unless --naive."""
    prompt = row["prompt"]
    if args.naive:
        return sample_trajectories(model, scheduler, prompt, generators, args.guidance_scale)
    spans = item_token_spans(args, model, row)
    capture = CrossAttentionMaps(len(generators))
    with installed(model, capture, plan.mask_modules):
        return sample_trajectories(
            model, scheduler, prompt, generators, args.guidance_scale, capture, spans
        )


def score_trajectories(args, model, reward, prompt, trajectories):
    """Decodes the last latents of trajectories and scores the images -> Samples."""
    images = decode_in_parts(model, trajectories[:, -1].to(model.device), args.micro_batch)
    prompts = [prompt] * len(images)
    rewards = score_with_parts(reward, images.to(model.device), prompts, args.micro_batch)
    columns = reward_columns(reward, rewards)
    return Samples(trajectories, images, columns.pop("reward"), columns)


def choose(rewards):
    """Rewards (N,) -> the indices of references (N/4,), of bases (N/2,), and the pairing.

    References are the best quarter and bases the worst half, each sorted best first. The pairing
    (N/2,) gives each base the number of its reference: 0, 0, 1, 1, and so on.
    """
    order = rewards.argsort(descending=True, stable=True)
    num_references = len(rewards) // 4
    references = order[:num_references]
    bases = order[len(rewards) // 2 :]
    return references, bases, torch.arange(num_references).repeat_interleave(2)


def adopt(args, target, reference, base):
    """Eq. 7: each target that is good enough, else its reference -> Samples, adopted (P,) bool."""
    against = base if args.adopt_against == "base" else reference
    adopted = target.rewards >= args.adoption_threshold * against.rewards
    per_image = adopted.view(-1, 1, 1, 1)
    preferred = Samples(
        torch.where(per_image[..., None], target.trajectories, reference.trajectories),
        torch.where(per_image, target.images, reference.images),
        torch.where(adopted, target.rewards, reference.rewards),
    )
    return preferred, adopted


def inverted(model, scheduler, prompt, samples):
    """The same Samples with trajectories by DDIM inversion, the ablation of section 4.4."""
    trajectories = invert(model, scheduler, prompt, samples.trajectories[:, -1])
    return Samples(trajectories, samples.images, samples.rewards)


def pair_up(prompt, preferred, base, past_rewards, pictures, stats):
    """The Pairs of one prompt: preferred and base are Samples of P images each."""
    trajectories = torch.stack([preferred.trajectories, base.trajectories])
    rewards = torch.stack([preferred.rewards, base.rewards])
    means = {name: values.float().mean().item() for name, values in stats.items()}
    prompts = [prompt] * len(base.rewards)
    return Pairs(prompts, trajectories, advantages(rewards, past_rewards), pictures, means)


def join_pairs(parts, num_prompts):
    """The Pairs of this process's prompts -> one. Statistics are means over all num_prompts."""
    prompts = []
    pictures = []
    for k, part in enumerate(parts):
        prompts += part.prompts
        if k < 8:
            pictures += part.pictures
    stats = {}
    for name in parts[0].stats:
        values = torch.tensor([part.stats[name] for part in parts], dtype=torch.float64)
        stats[name] = gather(values, num_prompts).mean().item()
    all_trajectories = torch.cat([part.trajectories for part in parts], 1)
    all_advantages = torch.cat([part.advantages for part in parts], 1)
    return Pairs(prompts, all_trajectories, all_advantages, pictures, stats)


def sample_round(args, model, scheduler, reward, rows, plan, history, number):
    """Samples round `number` with the model's current weights, theta_old -> Pairs.

    history: {prompt: {round: rewards}}, which we add to. If a round is sampled again, it replaces
    its own rewards. Under torchrun, each process samples its part of the round's prompts.
    """
    parts = []
    rewards = []
    row_indices = draw_prompts(args, rows, number)
    for row_index in own_part(row_indices):
        row = rows[row_index]
        prompt = row["prompt"]

        # Sample the prompt's images, and keep the maps of where the items are.
        generators = noise_generators(args, number, row_index, range(args.images_per_prompt))
        trajectories, maps = sample_prompt(args, model, scheduler, row, generators, plan)

        # Score them. Only these rewards, never those of fused images, enter the history.
        samples = score_trajectories(args, model, reward, prompt, trajectories)
        history.setdefault(prompt, {})[number] = samples.rewards.tolist()
        rewards.append(samples.rewards)

        # Choose references and bases. `reference` and `base` have one image per pair.
        references, bases, reference_of = choose(samples.rewards)
        reference = samples[references[reference_of]]
        base = samples[bases]
        preferred = reference
        pictures = [base.images[0], reference.images[0]]
        stats = dict(reward=samples.rewards, reward_b=base.rewards, **samples.parts)

        if not args.naive:
            # Mark the items in the references, at every step.
            masks = merge_masks(maps[references], row["thresholds"], args.mask_merge)

            # Denoise the bases' noise again, with the references' items.
            generators = noise_generators(args, number, row_index, bases)
            targets = fuse(
                model, scheduler, plan, prompt, trajectories[references], trajectories[bases],
                reference_of, masks, generators, args.guidance_scale,
            )

            # Fusion may fail. If a target is not good enough, use its reference instead.
            target = score_trajectories(args, model, reward, prompt, targets)
            preferred, adopted = adopt(args, target, reference, base)
            fused_masks = masks[:, plan.fused_steps]
            pictures += [shade(torch.ones_like(base.images[0]), fused_masks[0]), target.images[0]]
            stats.update(reward_target=target.rewards, adoption=adopted, mask_area=fused_masks)

        # Pair them up, with each image's advantage over all plain samples of the prompt so far.
        stats.update(reward_a=preferred.rewards)
        past_rewards = finite_rewards(history[prompt])
        if args.trajectory == "inversion":
            preferred = inverted(model, scheduler, prompt, preferred)
            base = inverted(model, scheduler, prompt, base)
        parts.append(pair_up(prompt, preferred, base, past_rewards, pictures, stats))

    # Later, these prompts may be other processes' turn, so every history holds all rewards.
    rewards = gather(torch.stack(rewards), len(row_indices))
    for row_index, rewards_of_prompt in zip(row_indices, rewards):
        history.setdefault(rows[row_index]["prompt"], {})[number] = rewards_of_prompt.tolist()
    return join_pairs(parts, len(row_indices))


def finite_rewards(rewards_of_rounds):
    """{round: rewards} of a prompt -> all of them in one list, without NaN and Inf."""
    rewards = []
    for rewards_of_round in rewards_of_rounds.values():
        rewards += [r for r in rewards_of_round if math.isfinite(r)]
    return rewards


# --------------------------------------------------------------------------------------------------
# Thresholds for prompts that have none


def find_thresholds(args, model, scheduler, rows, plan, path):
    """Gives thresholds to the rows that have none, and shows the first 8 of them in a picture.

    Each row of the picture at `path` shows a sample, its items' masks, and the merged mask.
    """
    max_items = max(len(row["items"]) for row in rows)
    missing = [row for row in rows if "thresholds" not in row]
    pictures = []
    for k, row in enumerate(tqdm(missing, desc="thresholds")):
        generators = [generator(args.seed, "threshold", k, image) for image in range(4)]
        trajectories, maps = sample_prompt(args, model, scheduler, row, generators, plan)
        maps = maps[:, plan.fused_steps]
        row["thresholds"] = item_thresholds(maps)
        if k < 8:
            image = decode_in_parts(model, trajectories[:1, -1].to(model.device), 1)[0]
            pictures += mask_pictures(image, maps[0], row["thresholds"], args.mask_merge, max_items)
    captions = [f"{row['prompt']} ({', '.join(row['items'])})" for row in missing[:8]]
    save_grid(torch.stack(pictures), path, columns=max_items + 2, captions=captions)


def item_thresholds(maps):
    """Maps (B, steps, items, s, s) -> one threshold per item: a quantile of its map's values."""
    values_per_item = maps.transpose(0, 2).flatten(1)
    quantiles = values_per_item.quantile(MASK_QUANTILE, 1)
    return [float(f"{quantile:.3g}") for quantile in quantiles]


def mask_pictures(image, maps, thresholds, merge, max_items):
    """An image (3, H, W), its items' masks, blanks up to max_items, and the merged mask."""
    pictures = [image]
    for k, threshold in enumerate(thresholds):
        pictures.append(shade(image, merge_masks(maps[:, [k]], [threshold], merge)))
    # Prompts may have different numbers of items, but all rows of a grid must have one length.
    num_blanks = max_items - len(thresholds)
    pictures += [torch.ones_like(image)] * num_blanks
    pictures.append(shade(image, merge_masks(maps, thresholds, merge)))
    return pictures


# --------------------------------------------------------------------------------------------------
# Training


def read_test_prompts(args, prompts_of_file):
    """The held-out prompts: those of --test_prompts, else those of the prompts file."""
    if args.test_prompts:
        return read_prompts(args.test_prompts)[:16]
    if not prompts_of_file:
        sys.exit(f"--test_prompts FILE is required, because {args.prompts} has no test prompts")
    return prompts_of_file[:16]


def check_rows(args, model, rows):
    """Exits if a round needs more prompts than there are, or an item is not in its prompt."""
    if len(rows) < args.batch_size // args.images_per_prompt:
        at_most = len(rows) * args.images_per_prompt
        sys.exit(f"--batch_size {args.batch_size}: {len(rows)} prompts give only {at_most}")
    for row in rows:
        item_token_spans(args, model, row)


def attention_modules(args, model):
    """The names of the modules that make masks and of those that fuse.

    Sets --mask_layer and --fusion_layers if they were not given: to the first up block with
    cross-attention, and to the mid block and all blocks after it.
    """
    blocks = attention_blocks(model)
    up_blocks = [k for k, name in enumerate(blocks) if name.startswith("up")]
    down_blocks = [k for k, name in enumerate(blocks) if name.startswith("down")]
    if args.mask_layer is None:
        args.mask_layer = up_blocks[0]
    if args.fusion_layers is None:
        args.fusion_layers = f"{len(down_blocks)}-{len(blocks) - 1}"

    layers = number_range("--fusion_layers", args.fusion_layers)
    if layers[-1] >= len(blocks) or not 0 <= args.mask_layer < len(blocks):
        known = ", ".join(f"{k} {name}" for k, name in enumerate(blocks))
        sys.exit(
            f"--fusion_layers {args.fusion_layers} --mask_layer {args.mask_layer}: "
            f"the blocks with attention are {known}"
        )
    mask_modules = processor_names(model, [blocks[args.mask_layer]], "attn2")
    fused_modules = processor_names(model, [blocks[k] for k in layers], "attn1")
    return mask_modules, fused_modules


def draw_pair_steps(args, number, num_pairs, trained_steps):
    """The pairs' steps that a round trains on -> (N, 2), each row a (pair, step).

    Each pair gets --train_timesteps of the trained steps, the same ones in every inner epoch.
    """
    pair_steps = []
    for pair in range(num_pairs):
        draw = generator(args.seed, "timesteps", number, pair)
        picks = torch.randperm(len(trained_steps), generator=draw)[: args.train_timesteps]
        for k in picks.sort()[0]:
            pair_steps.append((pair, trained_steps[k]))
    return torch.tensor(pair_steps)


def pair_loss(args, model, scheduler, pairs, p, i, log_prob_old=None):
    """The loss of pairs p (B,) at steps i (B,), in one forward pass of 2B images.

    log_prob_old (2B,): log p_theta_old, or None while theta equals theta_old.
    Returns the loss, log_prob, log_ratio and kl (None without DPOK). All but the loss are (2B,)
    and detached: first for the a of every pair, then for the b.
    """
    prompts = [pairs.prompts[k] for k in p] * 2
    latents = pairs.trajectories[:, p, i].flatten(0, 1).to(model.device)
    next_latents = pairs.trajectories[:, p, i + 1].flatten(0, 1).to(model.device)
    advantage = pairs.advantages[:, p].flatten().to(model.device)
    i = i.repeat(2)

    # The pretrained model is the same network with its LoRA off. It goes first: with
    # --checkpointing the LoRA must stay as it is between a forward pass and its backward pass.
    if args.algo == "dpok":
        with base_model(model), torch.no_grad():
            noise_pred = guided(model, scheduler, latents, i, prompts, args.guidance_scale)
            mu_pretrained, _ = ddim_step(scheduler, noise_pred, i, latents)

    # We score the step under the plain model, even if fusion made it.
    noise_pred = guided(model, scheduler, latents, i, prompts, args.guidance_scale)
    mu, sigma = ddim_step(scheduler, noise_pred, i, latents)
    log_prob = log_normal(next_latents, mu, sigma)
    if log_prob_old is None:
        log_prob_old = log_prob.detach()
    log_ratio = log_prob - log_prob_old

    kl = None
    if args.algo == "dpo":
        log_ratio_a, log_ratio_b = log_ratio.chunk(2)
        loss = dpo_loss(log_ratio_a, log_ratio_b, args.beta)
    elif args.algo == "ddpo":
        loss = ddpo_loss(log_ratio, advantage, CLIP_RANGE)
    elif args.algo == "dpok":
        kl = normal_kl(mu, mu_pretrained, sigma)
        loss = dpok_loss(log_ratio, advantage, CLIP_RANGE, kl, args.kl_weight)
        kl = kl.detach()
    else:
        raise ValueError(f"--algo {args.algo} has no loss")
    return loss, log_prob.detach(), log_ratio.detach(), kl


def own_pair_steps(values, num_prompts):
    """Values (N, ...) of all pair steps, prompt by prompt -> those of this process's prompts."""
    return own_part(values.unflatten(0, (num_prompts, -1))).flatten(0, 1)


def gather_steps(values, num_prompts):
    """Values (n, ...) of this process's pair steps -> those of all processes (N, ...)."""
    num_own_prompts = len(own_part(range(num_prompts)))
    return gather(values.unflatten(0, (num_own_prompts, -1)), num_prompts).flatten(0, 1)


def preference_stats(log_ratio, steps_of_pairs, num_steps):
    """What log_ratio (2, N) says: accuracy and margin, and its size at each step i."""
    margin = log_ratio[0] - log_ratio[1]
    # A tie counts half, so that accuracy is 0.5 before anything is learned.
    wins = (margin > 0) + 0.5 * (margin == 0)
    root_mean_squares = []
    for i in range(num_steps):
        at_step = log_ratio[:, steps_of_pairs == i]
        value = None
        if at_step.numel():
            value = float(f"{at_step.square().mean().sqrt():.4g}")
        root_mean_squares.append(value)
    return dict(
        accuracy=wins.mean().item(), margin=margin.mean().item(), log_ratio=root_mean_squares
    )


def copy_params(params):
    return [p.detach().clone() for p in params]


def set_params(params, values):
    for p, value in zip(params, values, strict=True):
        p.data.copy_(value)


def main(args):
    num_steps = args.num_inference_steps
    # From here on, steps are always indices i, and the first one is 0.
    fused_steps = step_indices("--fusion_steps", args.fusion_steps, num_steps)
    trained_steps = step_indices("--trained_steps", args.trained_steps, num_steps)

    rows, test_prompts = read_items(args.prompts, args.template)
    test_prompts = read_test_prompts(args, test_prompts)
    # The authors chose their thresholds by eye, on the maps of SD 2.1.
    if PAPERS_PROMPTS.samefile(args.prompts) and model_family(args.model) != "sd21":
        for row in rows:
            row.pop("thresholds")
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution, full=args.lora_rank == 0)
    args.resolution = model.resolution
    check_rows(args, model, rows)
    plan = FusionPlan(*attention_modules(args, model), fused_steps)
    reward, reward_range = load_reward(args.reward, device)
    encode_once(model, [row["prompt"] for row in rows] + test_prompts)

    params = make_trainable(
        model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora
    )
    # Table 3 has eps 1e-8, which is above most gradients of the toy world: see difference 7.
    optimizer = torch.optim.AdamW(
        params, lr=args.lr, betas=(0.9, 0.999), eps=1e-15, weight_decay=1e-4, fused=True
    )

    sampler = dict(scheduler="ddim", eta=ETA)
    sampler.update(num_inference_steps=num_steps, guidance_scale=args.guidance_scale)
    scheduler = make_scheduler(model, sampler["scheduler"], num_steps)
    trained_steps = steps_with_noise(scheduler, trained_steps)
    if not trained_steps:
        sys.exit(f"--trained_steps {args.trained_steps}: none of these steps adds noise")

    run = Run(args, model.source, sampler, NAME, PAPER)
    print_settings(args, PAPER, params)
    write_atomically(run.dir / "test_prompts.txt", "\n".join(test_prompts) + "\n")
    history = {}
    state = run.resume(params, optimizer)
    if state is not None:
        history = state["history"]
        for row, thresholds in zip(rows, state["thresholds"]):
            row["thresholds"] = thresholds
    else:
        if not args.naive and any("thresholds" not in row for row in rows):
            picture = run.dir / "samples" / "thresholds.png"
            find_thresholds(args, model, scheduler, rows, plan, picture)
            if is_main_process():
                write_items(run.dir / "prompts.json", rows, test_prompts)
            print(f"thresholds: {run.dir / 'prompts.json'}, and what they mark: {picture}")
            print("  If they miss the items, edit the file and start again with --prompts FILE")
        before = held_out(run, model, reward, test_prompts, step=0)
        print(f"held-out {args.reward} before: {describe_reward(before)}")
        print(f"  ({reward_range})")
        resting_loss = "ln 2 = 0.693" if args.algo == "dpo" else "0"
        print(f"The loss stays near {resting_loss} however well the model learns: read test_reward")

    # The number of images that the denoiser has seen. With guidance each counts twice.
    passes = []

    def count_images(module, inputs):
        passes.append(len(inputs[0]))

    model.denoiser.register_forward_pre_hook(count_images)

    steps = range(run.start + 1, args.train_steps + 1)
    num_prompts = args.batch_size // args.images_per_prompt
    progress = tqdm(
        steps, initial=run.start, total=args.train_steps, desc=NAME, disable=not is_main_process()
    )
    for step in progress:
        started = time.time()
        passes.clear()
        number, epoch = divmod(step - 1, args.inner_epochs)

        # A new round: the current weights become theta_old, and they sample the pairs.
        if epoch == 0:
            theta_old = copy_params(params)
            log_prob_old = None
            pairs = sample_round(args, model, scheduler, reward, rows, plan, history, number)
            picture = run.dir / "samples" / f"round_{number:04d}.png"
            pairs_per_prompt = args.images_per_prompt // 2
            captions = pairs.prompts[::pairs_per_prompt][:8]
            labels = ("base", "reference") if args.naive else PICTURES
            save_grid(torch.stack(pairs.pictures), picture, len(labels), captions, labels)

        # If we resumed inside a round, remake its pairs from theta_old and the same noise.
        elif step == run.start + 1:
            theta = copy_params(params)
            theta_old = state["theta_old"]
            log_prob_old = state["log_prob_old"]
            set_params(params, theta_old)
            pairs = sample_round(args, model, scheduler, reward, rows, plan, history, number)
            set_params(params, theta)
            passes.clear()

        # Compute the loss of all pairs at their steps, one micro-batch at a time, half a and half
        # b. Weight each micro-batch's mean by its fraction of the total. Under torchrun, each
        # process takes the pairs that it has sampled, and counts them from 0.
        num_pairs = num_prompts * args.images_per_prompt // 2
        pair_steps = draw_pair_steps(args, number, num_pairs, trained_steps)
        own_steps = own_pair_steps(pair_steps, num_prompts)
        own_steps = own_steps - torch.tensor([own_steps[0, 0], 0])
        own_log_prob_old = None
        if log_prob_old is not None:
            own_log_prob_old = own_pair_steps(log_prob_old.T, num_prompts)
        total_loss = 0.0
        log_probs = []
        log_ratios = []
        kls = []
        pair_steps_per_batch = args.micro_batch // 2
        for k in range(0, len(own_steps), pair_steps_per_batch):
            part = slice(k, k + pair_steps_per_batch)
            p, i = own_steps[part].T
            old = None
            if log_prob_old is not None:
                old = own_log_prob_old[part].T.flatten().to(device)
            loss, log_prob, log_ratio, kl = pair_loss(args, model, scheduler, pairs, p, i, old)
            loss = loss * len(p) / len(pair_steps)
            loss.backward()
            total_loss += loss.detach()
            log_probs.append(log_prob.view(2, -1))
            log_ratios.append(log_ratio.view(2, -1))
            if kl is not None:
                kls.append(kl.view(2, -1))

        # With several processes, add up their gradients, and collect what they log. Every loss is
        # divided by the number of all pair steps, so this is a sum, and not a mean as in DDP.
        sum_gradients(params)
        total_loss = sum_processes(total_loss)
        log_prob = gather_steps(torch.cat(log_probs, 1).T, num_prompts).T.cpu()
        log_ratio = gather_steps(torch.cat(log_ratios, 1).T, num_prompts).T.cpu()
        kl = None
        if kls:
            kl = gather_steps(torch.cat(kls, 1).T, num_prompts).mean().item()
        num_passes = sum_processes(torch.tensor(sum(passes))).item()

        # In the first epoch theta was theta_old, so these log-probabilities are theta_old's.
        if log_prob_old is None:
            log_prob_old = log_prob

        # Update the weights, with the gradient's norm clipped to 1 (Table 3). Skip the update if
        # the loss, the gradient or the mean reward is NaN or Inf.
        grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        is_finite = math.isfinite(grad_norm) and math.isfinite(total_loss)
        is_finite = is_finite and math.isfinite(pairs.stats["reward"])
        if is_finite:
            optimizer.step()
        else:
            run.skip(step)
        optimizer.zero_grad(set_to_none=True)

        # Log the update, with samples of held-out prompts at every snapshot.
        stats = dict(
            round=number,
            epoch=epoch,
            loss=total_loss.item(),
            **pairs.stats,
            **preference_stats(log_ratio, pair_steps[:, 1], num_steps),
            kl=kl,
            grad_norm=grad_norm,
            images=(number + 1) * args.batch_size,
            passes=num_passes,
            skipped=None if is_finite else True,
            seconds=time.time() - started,
        )
        is_snapshot = step % args.save_every == 0 or step == args.train_steps
        if is_snapshot:
            stats.update(held_out(run, model, reward, test_prompts, step))
        run.log(step, **stats)
        progress.set_postfix(
            reward=f"{stats['reward']:.4f}", accuracy=f"{stats['accuracy']:.3f}"
        )

        # Save the weights for the user, and a checkpoint to resume from, even mid-round.
        if is_snapshot:
            run.save(
                step, model, params, optimizer,
                history=history,
                thresholds=[row.get("thresholds") for row in rows],
                log_prob_old=log_prob_old,
                theta_old=[p.cpu() for p in theta_old],
            )

    # From the log, because a resumed run may have had nothing left to do.
    after = describe_reward(run.read_log()[-1])
    print(f"held-out {args.reward} after:  {after}; see {run.dir / 'index.html'}")


if __name__ == "__main__":
    args = parse_args()
    with readable_errors(args), joined_processes(args):
        main(args)
