"""D-Fusion: preference optimization on visually consistent pairs (Hu et al. 2025, arXiv 2505.22002), with DPO, DDPO or DPOK.

Two samples of one prompt differ in everything, so a preference between them says little. D-Fusion makes the better one out of the worse one: it denoises
the same noise again, while self-attention takes the prompt's items from a well-aligned reference. A round, for each of its prompts:

  trajectories     = images_per_prompt samples of th' (DDIM, eta 1, guidance), scored: r = reward(decode(x_0), prompt)
  reference, base  = the best quarter, each twice; the worst half, in order of rank
  mask_t           = XOR over items i of [A_t^i >= threshold_i]            A_t: the reference's cross-attention, first up block         (4)
  target           : base's x_T and noises; in self-attention of the mid and up blocks, for t = 18 .. 1 of 20, both guidance halves,
  k, v             = where(mask_t, k_ref, k_tgt), where(mask_t, v_ref, v_tgt)                                                           (5)
  a                = target if r(target) >= adoption_threshold r(base), else reference;  b = base                                       (7)
  log_ratio        = log p_th(x_{t-1} | x_t, c) - log p_th'(x_{t-1} | x_t, c)          of the plain guided model, mean over the latent
  dpo   loss       = -logsigmoid(beta (log_ratio_a - log_ratio_b))                                                                      (6)
  ddpo  loss       = max(-A rho, -A clip(rho, 1-eps, 1+eps)),  rho = exp(log_ratio),  A = (r - mean_c) / std_c                          (8)
  dpok  loss       = ddpo loss + kl_weight KL(p_th || p_pretrained)                                                                     (9)
  inner_epochs times one update on all pairs and timesteps; in the first th = th', log_ratio = 0, and its log p is log p_th' of the rest

The loss stays near ln 2 (dpo) or 0 however well it learns. Read reward; accuracy, the share of (pair, timestep) with log_ratio_a > log_ratio_b; margin.

Differences from the paper and from the authors' code (which samples and fuses; its training half was never published):
1. Masks merge with XOR and come from the first up block alone, as in the paper; their code: OR (--mask_merge or), and a down block too.
2. Eq. 7's right-hand side is lost in print: here the base; --adopt_against reference is the other reading. beta, kl_weight, clip range: ours.
3. Items of several tokens (woolen = woo|len) are averaged over all of them; five prompts of their code point at a wrong one.
4. The reference is replayed in one batch with the target, from the latents and maps kept when it was sampled: two passes instead of three.
5. A text file of prompts gets its thresholds from a quantile of a few samples; the authors chose by eye. They can be edited.

  $ python dfusion_dpo.py                                       # the toy world, two minutes on a CPU core
  $ python dfusion_dpo.py --naive --out runs/naive              # the baseline: the same pairs, a = reference
  $ python dfusion_dpo.py --model sd21 --algo ddpo --template template2
"""
import argparse
import contextlib
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from tqdm import tqdm

from common import (REWARDS, Parser, Run, base_model, condition, decode, denoise, die, encode_once, generator, held_out, initial_latents,
                    launch, load_model, load_reward, make_scheduler, nearest, pick_device, predict_x0, print_settings, read_prompts, row_of, save_grid,
                    trainable)

PROMPTS = Path(__file__).resolve().parent / "prompts"
PAPER = {  # Table 3: batch 4 x 160 = 640 images of 40 prompts a round, two updates a round, 25.6k images; the authors' code: LoRA rank 4
    "sd21": dict(train_steps=80, batch_size=640, images_per_prompt=16, inner_epochs=2, lr=1e-4, num_inference_steps=20, guidance_scale=5.,
                 adoption_threshold=1., lora_rank=4, resolution=512, reward="clip_h"),
}
OURS = {   # rows the paper does not have
    "sd14": dict(PAPER["sd21"]),
    "sd15": dict(PAPER["sd21"]),
    "sd21": dict(PAPER["sd21"]),
    "sdxl": dict(PAPER["sd21"], resolution=1024),
    "toy": dict(train_steps=16, batch_size=64, images_per_prompt=8, inner_epochs=2, lr=1e-3, num_inference_steps=10, guidance_scale=1.,
                trained_steps="4-3",                                      # where fused DPO's gradient comes nearest to the reward's: see README
                adoption_threshold=1., lora_rank=8, resolution=64, reward="toy_clip", prompts="dfusion_toy.json",
                mask_layer=5, item_token="next"),                         # 8 x 8; the first up block's 4 x 4 is too coarse for these objects
}
CLIP_RANGE = .1                                                           # eps of Eq. 8: the authors' config; ddpo-pytorch has 1e-4
MASK_QUANTILE = .8                                                        # ours: an item covers about a fifth of the picture


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default="toy", help=f"{', '.join(OURS)}; or a diffusers folder or hub id (id@revision)")
    row = parser.settings(argv, OURS)
    parser.add_argument("--reward", default=row["reward"], help=f"{', '.join(REWARDS)}; name:PATH takes the weights from PATH")
    parser.add_argument("--algo", choices=("dpo", "ddpo", "dpok"), default="dpo", help="Eq. 6, 8 or 9")
    parser.add_argument("--naive", action="store_true", help="no fusion: train on references and bases, the baseline")
    parser.add_argument("--prompts", default=str(PROMPTS / row.get("prompts", "dfusion_templates.json")),
                        help="JSON as in prompts/, or a text file with a line 'prompt | item; item' each")
    parser.add_argument("--template", help="which list of the JSON file (its first)")
    parser.add_argument("--test_prompts", default=argparse.SUPPRESS, help="text file of held-out prompts, the first 16 (the JSON's own list)")
    parser.add_argument("--train_steps", type=int, default=row["train_steps"], help="optimizer updates; inner_epochs of them make a round")
    parser.add_argument("--batch_size", type=int, default=row["batch_size"], help="images sampled a round")
    parser.add_argument("--images_per_prompt", type=int, default=row["images_per_prompt"], help="of one prompt in a round, and at once in the denoiser")
    parser.add_argument("--micro_batch", type=int, default=8, help="images per gradient pass, an image being one timestep of one trajectory")
    parser.add_argument("--inner_epochs", type=int, default=row["inner_epochs"], help="updates on a round's pairs")
    parser.add_argument("--trained_steps", help="timesteps that are trained on, counted down to 1, as 20-6 (all; toy, of 10: 4-3)")
    parser.add_argument("--train_timesteps", type=int, help="so many of them, drawn anew for each pair (all)")
    parser.add_argument("--resolution", type=int, default=row["resolution"], help="pixels")
    parser.add_argument("--num_inference_steps", type=int, default=row["num_inference_steps"], help="sampling steps, in training and after")
    parser.add_argument("--guidance_scale", type=float, default=row["guidance_scale"], help="of the policy, in training and after; 1: none")
    parser.add_argument("--fusion_layers", help="blocks with attention, numbered from 0 down, mid, up, as 3-6 (the mid block and all after it)")
    parser.add_argument("--fusion_steps", help="timesteps that are fused, counted down to 1, as 18-1 (all but the first two)")
    parser.add_argument("--mask_layer", type=int, default=row.get("mask_layer"), help="block whose cross-attention makes the mask (first up block)")
    parser.add_argument("--item_token", choices=("own", "next"), default=row.get("item_token", "own"),
                        help="whose map marks an item: its own tokens', or the next one's (toy's text encoder completes a thing only there)")
    parser.add_argument("--mask_merge", choices=("xor", "or"), default="xor", help="how the items' masks make one")
    parser.add_argument("--adoption_threshold", type=float, default=row["adoption_threshold"], help="lambda of Eq. 7")
    parser.add_argument("--adopt_against", choices=("base", "reference"), default="base", help="whose reward the target must reach")
    parser.add_argument("--trajectory", choices=("recorded", "inversion"), default="recorded", help="inversion: the ablation of section 4.4")
    parser.add_argument("--beta", type=float, default=.1, help="of Eq. 6; nearly inert, as AdamW is blind to the loss's scale")        # ours: D3PO's
    parser.add_argument("--kl_weight", type=float, default=.01, help="of Eq. 9's KL")                                                  # ours: DPOK's code
    parser.add_argument("--lr", type=float, default=row["lr"], help="learning rate of AdamW")
    parser.add_argument("--lora_rank", type=int, default=row["lora_rank"], help="LoRA rank (alpha = rank); 0 trains the full denoiser")
    parser.add_argument("--init_lora", help="start from this LoRA")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, for another forward call in the gradient step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    parser.add_argument("--save_every", type=int, default=4, help="updates between snapshots, each with a sample grid and held-out reward")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", help="run folder (runs/dfusion_dpo-MODEL-REWARD)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where its last checkpoint stands")
    args = parser.finish(argv, "dfusion_dpo")
    args.test_prompts = getattr(args, "test_prompts", None)
    last = args.num_inference_steps
    known = row.get("trained_steps") if last == row["num_inference_steps"] else None
    args.trained_steps = args.trained_steps or known or f"{last}-1"
    args.train_timesteps = args.train_timesteps or last
    if args.naive and (args.fusion_layers or args.fusion_steps):
        parser.error("--naive fuses nothing: --fusion_layers and --fusion_steps have no part in it")
    args.fusion_steps = args.fusion_steps or f"{max(last - 2, 1)}-1"
    if args.images_per_prompt < 4 or args.images_per_prompt % 4 or args.batch_size % args.images_per_prompt:
        parser.error(f"--images_per_prompt {args.images_per_prompt} --batch_size {args.batch_size}: images of a prompt are a multiple of 4 (references "
                     "are the best quarter), images of a round a multiple of that")
    if args.micro_batch % 2:
        parser.error(f"--micro_batch {args.micro_batch}: an even number, half a and half b")
    if args.inner_epochs < 1 or not 1 <= args.train_timesteps <= last:
        parser.error(f"--inner_epochs {args.inner_epochs} --train_timesteps {args.train_timesteps} --num_inference_steps {last}: "
                     "1 <= train_timesteps <= num_inference_steps, and at least one epoch")
    for name in ("fusion_steps", "trained_steps"):
        counted = span(name, getattr(args, name))
        if not 1 <= counted[0] <= counted[-1] <= last:
            parser.error(f"--{name} {getattr(args, name)}: timesteps are counted {last} down to 1")
    span("fusion_layers", args.fusion_layers or "0")
    if not (0 < args.beta < math.inf and 0 <= args.kl_weight < math.inf and 1 <= args.guidance_scale < math.inf and args.adoption_threshold < math.inf):
        parser.error(f"--beta {args.beta:g} --kl_weight {args.kl_weight:g} --guidance_scale {args.guidance_scale:g} --adoption_threshold "
                     f"{args.adoption_threshold:g}: beta above 0, kl_weight 0 or more, guidance 1 or more, the threshold a number")
    if args.algo == "dpok" and not args.lora_rank:
        parser.error("--algo dpok --lora_rank 0: the KL needs the pretrained model, which is the LoRA's base; a full fine-tune has lost it")
    return args


def span(name, text):
    """"3-6", "18-1" or "3" -> range of the whole numbers from the smaller to the larger one, inclusive."""
    ends = text.split("-")
    if len(ends) > 2 or not all(x.isdecimal() for x in ends):
        die(f"--{name} {text}: two numbers with a dash, such as 3-6, or one")
    return range(min(map(int, ends)), max(map(int, ends)) + 1)


# ------------------------------------------------------------------------------------------------------------------------------------
# the policy: DDIM's step as a Gaussian, and the three losses


def alphas(scheduler, t):
    """t (B,) of scheduler.timesteps, on the CPU -> abar_t and abar_prev, (B, 1, 1, 1) each, on the CPU."""
    t = t.view(-1, 1, 1, 1)
    t_prev = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return scheduler.alphas_cumprod[t], torch.where(t_prev < 0, scheduler.final_alpha_cumprod, scheduler.alphas_cumprod[t_prev.clamp(min=0)])


def predict(scheduler, noise_pred, t, latents):
    """The model's output at t (B,) -> x0hat and eps (B, C, h, w), whatever the model predicts."""
    a = alphas(scheduler, t)[0].to(latents)
    x0 = predict_x0(scheduler, noise_pred, t.view(-1, 1, 1, 1), latents)
    return x0, (latents - a.sqrt() * x0) / (1 - a).sqrt()


def ddim_step(scheduler, noise_pred, t, latents):
    """Eq. 1 with eta 1: p(x_{t-1} | x_t) = N(mu, sigma^2). noise_pred, latents (B, C, h, w), t (B,) on the CPU -> mu like latents, sigma (B, 1, 1, 1)."""
    a, a_prev = (x.to(latents) for x in alphas(scheduler, t))
    variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
    x0, eps = predict(scheduler, noise_pred, t, latents)
    return a_prev.sqrt() * x0 + (1 - a_prev - variance).sqrt() * eps, variance.sqrt()


def log_normal(x, mu, sigma):
    """log N(x; mu, sigma^2), (B, C, h, w) -> (B,): the mean over the latent's numbers, as all code of this family has it, not the sum."""
    return (-(x - mu) ** 2 / (2 * sigma ** 2) - sigma.log() - .5 * math.log(2 * math.pi)).mean((1, 2, 3))


def normal_kl(mu, mu_pretrained, sigma):
    """KL(N(mu, sigma^2) || N(mu_pretrained, sigma^2)), (B, C, h, w) -> (B,): the mean over the latent's numbers, as log_normal has it."""
    return ((mu - mu_pretrained) ** 2 / (2 * sigma ** 2)).mean((1, 2, 3))


def dpo_loss(log_ratio_a, log_ratio_b, beta):
    """Eq. 6; log_ratio (B,) of the preferred and the other image at the same timesteps."""
    return -F.logsigmoid(beta * (log_ratio_a - log_ratio_b)).mean()


def ddpo_loss(log_ratio, advantage, clip_range):
    """Eq. 8; log_ratio, advantage (B,)."""
    rho = log_ratio.exp()
    return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - clip_range, 1 + clip_range)).mean()


def dpok_loss(log_ratio, advantage, clip_range, kl, kl_weight):
    """Eq. 9 with alpha = 1: only kl_weight / alpha counts for AdamW. kl (B,): KL(p_th || p_pretrained) per number of the latent."""
    return ddpo_loss(log_ratio, advantage, clip_range) + kl_weight * kl.mean()


def advantages(history, r):
    """r (B,) of a prompt's images, history: all rewards of its unfused samples so far, this round's too -> (r - mean) / std, within +-5."""
    history = torch.tensor(history)
    return ((r - history.mean()) / (history.std(correction=0) + 1e-6)).clamp(-5, 5)


# ------------------------------------------------------------------------------------------------------------------------------------
# masks and fusion


class CrossAttentionMaps:
    """Attention processor of cross-attention: the stock one, which also keeps the softmaxed maps of the last `batch` rows, guidance's conditional
    half, averaged over heads: (batch, h*w, tokens) per module."""
    stock = AttnProcessor2_0()

    def __init__(self, batch):
        self.batch, self.maps = batch, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        q, k = attn.to_q(hidden_states[-self.batch:]), attn.to_k(encoder_hidden_states[-self.batch:])
        q, k = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k))
        self.maps.append((q @ k.mT * attn.scale).float().softmax(-1).mean(1))
        return self.stock(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    def take(self, spans):
        """The mean over the modules since the last take, and over each item's tokens: (batch, items, s, s), on the CPU."""
        maps = torch.stack(self.maps).mean(0)
        self.maps.clear()
        side = math.isqrt(maps.shape[1])
        return torch.stack([maps[:, :, tokens].mean(-1) for tokens in spans], 1).unflatten(2, (side, side)).cpu()


class SelfAttentionFusion:
    """Attention processor of self-attention: the stock one while `masks` is None. Else each guidance half is [n references | m targets], masks
    (m, s, s) bool, source (m,) the reference of each target, and the targets get Eq. 5's keys and values."""
    stock = AttnProcessor2_0()
    n = masks = source = None

    def __call__(self, attn, hidden_states, *args, **kwargs):
        if self.masks is None:
            return self.stock(attn, hidden_states, *args, **kwargs)
        side = math.isqrt(hidden_states.shape[1])
        mask = F.interpolate(self.masks[:, None].float(), (side, side), mode="nearest").flatten(2).mT.bool()          # (m, h*w, 1): key positions
        q, k, v = attn.to_q(hidden_states), self.fused(attn.to_k(hidden_states), mask), self.fused(attn.to_v(hidden_states), mask)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out))

    def fused(self, x, mask):
        """Keys or values (halves * (n + m), h*w, c) -> the same, the targets' where the mask is set taken from their references'."""
        x = x.unflatten(0, (-1, self.n + len(mask)))
        return torch.cat([x[:, :self.n], torch.where(mask, x[:, self.source], x[:, self.n:])], 1).flatten(0, 1)


@contextlib.contextmanager
def installed(model, processor, names):
    """Inside, these attention modules use the processor, in eager mode; stock ones are put back whatever happens."""
    stock = model.denoiser.attn_processors
    try:
        model.denoiser.set_attn_processor({k: processor if k in names else p for k, p in stock.items()})
        with torch.compiler.set_stance("force_eager"):                    # it keeps state, which a compiled block would bake in
            yield processor
    finally:
        model.denoiser.set_attn_processor(stock)


def attention_blocks(model):
    """The denoiser's blocks with attention in the paper's order (0 to 6 in SD): down, mid, up. Their names happen to sort that way."""
    return sorted({k.split(".attentions")[0] for k in model.denoiser.attn_processors})


def modules_of(model, blocks, kind):
    """Names of the blocks' self-attention ("attn1") or cross-attention ("attn2") processors."""
    return [k for k in model.denoiser.attn_processors if k.split(".attentions")[0] in blocks and f".{kind}." in k]


def token_span(tokenizer, prompt, item, which="own"):
    """The positions of an item's tokens in the encoded prompt, or of the next token. The item is one or more whole words that occur once."""
    found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(item)}(?!\w)", prompt, re.IGNORECASE)]
    if len(found) != 1:
        die(f"prompt {prompt!r}: its item {item!r} occurs {len(found)} times in it; once is needed: name it with more of its words")
    (start, end), = found
    offsets = tokenizer(prompt, return_offsets_mapping=True, truncation=True, max_length=tokenizer.model_max_length).offset_mapping
    tokens = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
    tokens = tokens or die(f"prompt {prompt!r}: its item {item!r} lies behind the {tokenizer.model_max_length} tokens that the model reads")
    return tokens if which == "own" else [tokens[-1] + 1]                 # there is one: the end of the text


def merge_masks(maps, thresholds, merge):
    """Eq. 4. maps (..., items, s, s), one threshold an item -> bool (..., s, s)."""
    items = maps >= torch.tensor(thresholds).view(-1, 1, 1)
    return items.sum(-3) % 2 == 1 if merge == "xor" else items.any(-3)


def guided(model, latents, t, prompts, guidance_scale):
    """The policy's output (B, C, h, w): the model under guidance. t (B,), on the CPU."""
    return denoise(model, latents, t, condition(model, prompts), guidance_scale, condition(model, [None] * len(prompts)))


@torch.no_grad()
def sample_trajectories(model, scheduler, prompt, generators, guidance_scale, maps_of=None, spans=()):
    """Samples a prompt's images, one per generator -> trajectories (B, T+1, C, h, w) fp32, x_T first, on the CPU; with maps_of, an installed
    CrossAttentionMaps, also the items' maps (B, T, items, s, s)."""
    prompts = [prompt] * len(generators)
    latents = initial_latents(model, generators)
    trajectory, maps = [latents.cpu()], []
    for t in scheduler.timesteps:
        t = t.expand(len(prompts))
        mu, sigma = ddim_step(scheduler, guided(model, latents, t, prompts, guidance_scale), t, latents)
        latents = mu + sigma * initial_latents(model, generators)         # the generators go on: x_T first, then each step's noise
        trajectory.append(latents.cpu())
        if maps_of:
            maps.append(maps_of.take(spans))
    return torch.stack(trajectory, 1), torch.stack(maps, 1) if maps else None


@torch.no_grad()
def fuse(model, scheduler, fusion, prompt, references, bases, source, masks, generators, guidance_scale, steps):
    """Denoises each base's noise again, in `steps` (range of indices of scheduler.timesteps) with its reference's keys and values in the masks.

    references (n, T+1, C, h, w) and their masks (n, T, s, s), bases (m, T+1, C, h, w), source (m,) of references, the bases' generators anew;
    fusion: the installed SelfAttentionFusion -> targets (m, T+1, C, h, w), on the CPU. Before the first of `steps` a target is its base.
    """
    n, m = len(references), len(bases)
    latents = initial_latents(model, generators)
    targets = [latents.cpu()]
    for i, t in enumerate(scheduler.timesteps):
        noise, t = initial_latents(model, generators), t.expand(m)
        if i < steps.start:
            latents = bases[:, i + 1].to(model.device)
        else:
            if i in steps:                                                # the reference as it was then, beside the target
                fusion.n, fusion.source, fusion.masks = n, source.to(model.device), masks[source, i].to(model.device)
                both = torch.cat([references[:, i].to(model.device), latents])
                noise_pred = guided(model, both, t[:1].expand(n + m), [prompt] * (n + m), guidance_scale)[n:]
                fusion.masks = None
            else:
                noise_pred = guided(model, latents, t, [prompt] * m, guidance_scale)
            mu, sigma = ddim_step(scheduler, noise_pred, t, latents)
            latents = mu + sigma * noise
        targets.append(latents.cpu())
    return torch.stack(targets, 1)


@torch.no_grad()
def invert(model, scheduler, prompt, x0):
    """The ablation's trajectories (section 4.4): DDIM inversion of x0 (B, C, h, w), diffusers' DDIMInverseScheduler's: the model is asked at t about
    latents of the level before. Without guidance, as null-text inversion has it (ours) -> (B, T+1, C, h, w), x_T first."""
    latents, trajectory = x0.to(model.device), [x0]
    for t in scheduler.timesteps.flip(0):
        t = t.expand(len(x0))
        t_prev = (t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps).clamp(min=0)
        x0, eps = predict(scheduler, guided(model, latents, t, [prompt] * len(x0), 1.), t_prev, latents)
        a, _ = alphas(scheduler, t)
        latents = a.sqrt().to(latents) * x0 + (1 - a).sqrt().to(latents) * eps
        trajectory.insert(0, latents.cpu())
    return torch.stack(trajectory, 1)


# ------------------------------------------------------------------------------------------------------------------------------------
# prompts, items and thresholds


def read_items(path, template):
    """JSON {template: {"train": [{"prompt", "items", "thresholds"}], "test": [prompt]}} or lines 'prompt | item; item' -> train rows, test prompts.
    Rows may lack thresholds; a text file has none, and no test prompts."""
    lines = read_prompts(path)
    try:
        if path.endswith(".json"):
            file = json.loads("\n".join(lines))
            if template and template not in file:
                die(f"--template {template}: {path} has no such template; {nearest(template, list(file))}")
            rows, tests = (file[template or next(iter(file))][k] for k in ("train", "test"))
        elif template:
            die(f"--template {template}: {path} is a text file; templates are a JSON file's")
        else:
            rows, tests = [dict(prompt=p.strip(), items=[x.strip() for x in items.split(";")]) for p, items in (line.split("|") for line in lines)], []
        for row in rows:
            numbers = row.get("thresholds", [0] * len(row["items"]))
            if not row["items"] or not row.keys() <= {"prompt", "items", "thresholds"} or len(numbers) != len(row["items"]):
                raise ValueError(f"{row['prompt']!r} has not as many thresholds as items, or other keys")
            for value, kind in (*((x, str) for x in (row["prompt"], *row["items"], *tests)), *((x, (int, float)) for x in numbers)):
                if not isinstance(value, kind) or value == "" or "\0" in str(value):
                    raise ValueError(f"{value!r} in the wrong place")
        if len({row["prompt"] for row in rows}) < len(rows) or not rows:
            raise ValueError("no prompt, or one twice")
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as e:              # RuntimeError: an empty object has no first template
        die(f"prompts file {path}: {e}. Expected: " + ('{template: {"train": [{"prompt", "items", "thresholds"}, ...], "test": [prompt, ...]}}'
                                                       if path.endswith(".json") else "lines of 'prompt | item; item'"))
    return rows, tests


def find_thresholds(args, model, scheduler, rows, modules, steps, out, num_images=4):
    """Thresholds for rows that lack them: the MASK_QUANTILE of an item's maps over a few samples and the fused steps. The rows then hold them;
    out/thresholds.png shows sample | each item's mask | merged mask of the first prompts."""
    pictures = []
    for i, row in enumerate(tqdm([row for row in rows if "thresholds" not in row], desc="thresholds")):
        spans = [token_span(model.pipe.tokenizer, row["prompt"], item, args.item_token) for item in row["items"]]
        with installed(model, CrossAttentionMaps(num_images), modules) as maps_of:
            generators = [generator(args.seed, "threshold", i, k) for k in range(num_images)]
            latents, maps = sample_trajectories(model, scheduler, row["prompt"], generators, args.guidance_scale, maps_of, spans)
        maps = maps[:, steps]
        row["thresholds"] = [float(f"{x:.3g}") for x in maps.transpose(0, 2).flatten(1).quantile(MASK_QUANTILE, 1)]
        if i < 8:
            image = decode(model, latents[:1, -1].to(model.device))[0].detach().cpu()
            masks = [merge_masks(maps[0][:, [j]], row["thresholds"][j:j + 1], "or") for j in range(len(row["items"]))]
            masks = [*masks, *masks[-1:] * (max(len(r["items"]) for r in rows) - len(masks)), merge_masks(maps[0], row["thresholds"], args.mask_merge)]
            pictures += [image, *(shade(image, x) for x in masks)]
    save_grid(torch.stack(pictures), out / "thresholds.png", columns=len(masks) + 1)


def shade(image, masks):
    """image (3, H, W), masks (steps, s, s) -> the image, dark where the mask is never set."""
    return image * (.2 + .8 * F.interpolate(masks.float().mean(0)[None, None], image.shape[-2:], mode="nearest")[0])


# ------------------------------------------------------------------------------------------------------------------------------------
# a round


@dataclass
class Pairs:
    """What a round trains on. First index: 0 the preferred image a, 1 the base b."""
    prompts: list                                                         # (P,)
    trajectories: torch.Tensor                                            # (2, P, T+1, C, h, w) fp32, on the CPU
    advantages: torch.Tensor                                              # (2, P)
    pictures: list                                                        # base | reference | mask | target of a few pairs


def pair_loss(args, model, scheduler, pairs, p, i, log_prob_old=None):
    """The loss on pairs p (m,) at steps i (m,): one forward with gradient of 2m images, guidance's halves both in it, first the m a's, then their b's.

    log_prob_old (2m,): of th'; None while th = th', which it then is itself. Returns the loss, and (2m,) detached: log_prob, log_ratio, KL (or None).
    """
    prompts, t, kl = [pairs.prompts[k] for k in p] * 2, scheduler.timesteps[i].repeat(2), None
    x, x_prev = (pairs.trajectories[:, p, k].flatten(0, 1).to(model.device) for k in (i, i + 1))                     # (2m, C, h, w)
    if args.algo == "dpok":                                               # before the forward: a checkpointed backward runs it again
        with base_model(model), torch.no_grad():
            mu_pretrained, _ = ddim_step(scheduler, guided(model, x, t, prompts, args.guidance_scale), t, x)
    mu, sigma = ddim_step(scheduler, guided(model, x, t, prompts, args.guidance_scale), t, x)
    log_prob = log_normal(x_prev, mu, sigma)
    log_ratio = log_prob - (log_prob.detach() if log_prob_old is None else log_prob_old)
    advantage = pairs.advantages[:, p].flatten().to(model.device)
    if args.algo == "dpo":
        loss = dpo_loss(*log_ratio.chunk(2), args.beta)
    elif args.algo == "ddpo":
        loss = ddpo_loss(log_ratio, advantage, CLIP_RANGE)
    else:
        kl = normal_kl(mu, mu_pretrained, sigma)
        loss = dpok_loss(log_ratio, advantage, CLIP_RANGE, kl, args.kl_weight)
    return loss, log_prob.detach(), log_ratio.detach(), None if kl is None else kl.detach()


def choose(r):
    """r (N,) -> indices of references (the best quarter), bases (the worst half, best first), and each base's reference, an index of the former."""
    order = r.argsort(descending=True, stable=True)
    return order[:len(r) // 4], order[len(r) // 2:], torch.arange(len(r) // 4).repeat_interleave(2)


@torch.no_grad()
def score(model, reward, latents, prompt, batch):
    """x_0 (B, C, h, w) -> images (B, 3, H, W) and rewards (B,), on the CPU, `batch` at a time."""
    images = [decode(model, x.to(model.device)) for x in latents.split(batch)]
    return torch.cat(images).cpu(), torch.cat([reward(x, [prompt] * len(x)) for x in images]).cpu()


def sample_round(args, model, scheduler, reward, rows, modules, steps, history, number):
    """Samples, scores, pairs, fuses and verifies round `number` -> Pairs, stats. modules: names of (capturing, fused) attention modules, steps:
    the fused range; history {prompt: {round: rewards}} gets this round's, and a round sampled again replaces its own."""
    N, prompts, trajectories, advantage, pictures, stats = args.images_per_prompt, [], [], [], [], {}
    for i in torch.randperm(len(rows), generator=generator(args.seed, "prompts", number))[:args.batch_size // N].tolist():
        prompt, row = rows[i]["prompt"], rows[i]

        def generators(images):
            return [generator(args.seed, "trajectory", number, i, int(k)) for k in images]
        spans = [] if args.naive else [token_span(model.pipe.tokenizer, prompt, item, args.item_token) for item in row["items"]]
        with contextlib.nullcontext() if args.naive else installed(model, CrossAttentionMaps(N), modules[0]) as maps_of:
            x, maps = sample_trajectories(model, scheduler, prompt, generators(range(N)), args.guidance_scale, maps_of, spans)
        images, r = score(model, reward, x[:, -1], prompt, args.micro_batch)
        history.setdefault(prompt, {})[number] = r.tolist()

        reference, base, source = choose(r)
        a, r_a, b, r_b = x[reference][source], r[reference][source], x[base], r[base]
        shown = [images[base[0]], images[reference[0]]]
        now = dict(reward=r, reward_b=r_b)
        if not args.naive:
            masks = merge_masks(maps[reference], row["thresholds"], args.mask_merge)
            with installed(model, SelfAttentionFusion(), modules[1]) as fusion:
                target = fuse(model, scheduler, fusion, prompt, x[reference], b, source, masks, generators(base), args.guidance_scale, steps)
            images, r_t = score(model, reward, target[:, -1], prompt, args.micro_batch)
            adopted = r_t >= args.adoption_threshold * (r_b if args.adopt_against == "base" else r_a)                                  # Eq. 7
            a, r_a = torch.where(adopted.view(-1, 1, 1, 1, 1), target, a), torch.where(adopted, r_t, r_a)
            shown += [shade(torch.ones_like(images[0]), masks[0, steps]), images[0]]
            now |= dict(reward_target=r_t, adoption=adopted.float(), mask_area=masks[:, steps].float())
        if args.trajectory == "inversion":
            a, b = invert(model, scheduler, prompt, a[:, -1]), invert(model, scheduler, prompt, b[:, -1])
        past = [value for rewards in history[prompt].values() for value in rewards if math.isfinite(value)]
        trajectories.append(torch.stack([a, b]))
        advantage.append(torch.stack([advantages(past, r_a), advantages(past, r_b)]))
        prompts += [prompt] * len(base)
        pictures += shown if len(prompts) <= 8 * len(base) else []
        for k, v in dict(now, reward_a=r_a).items():
            stats.setdefault(k, []).append(v.mean().item())
    return Pairs(prompts, torch.cat(trajectories, 1), torch.cat(advantage, 1), pictures), {k: sum(v) / len(v) for k, v in stats.items()}


def main(args):
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution, full=args.lora_rank == 0)
    args.resolution = model.resolution
    reward, known = load_reward(args.reward, device)
    rows, test_prompts = read_items(args.prompts, args.template)
    test_prompts = read_prompts(args.test_prompts) if args.test_prompts else test_prompts or die("--test_prompts FILE is needed: --prompts has none")
    test_prompts, N = test_prompts[:16], args.images_per_prompt
    if len(rows) < args.batch_size // N:
        die(f"--batch_size {args.batch_size}: {N} images each of {len(rows)} prompts are at most {N * len(rows)}")
    for row in rows:
        for item in row["items"]:
            token_span(model.pipe.tokenizer, row["prompt"], item)
    blocks = attention_blocks(model)
    if args.mask_layer is None:
        args.mask_layer = next(i for i, name in enumerate(blocks) if name.startswith("up") and modules_of(model, [name], "attn2"))
    args.fusion_layers = args.fusion_layers or f"{sum(name.startswith('down') for name in blocks)}-{len(blocks) - 1}"
    layers = span("fusion_layers", args.fusion_layers)
    if layers[-1] >= len(blocks) or not 0 <= args.mask_layer < len(blocks) or not modules_of(model, [blocks[args.mask_layer]], "attn2"):
        die(f"--fusion_layers {args.fusion_layers} --mask_layer {args.mask_layer}: the blocks with attention are "
            + ", ".join(f"{i} {name}" for i, name in enumerate(blocks)))
    modules = modules_of(model, [blocks[args.mask_layer]], "attn2"), modules_of(model, [blocks[i] for i in layers], "attn1")
    encode_once(model, [row["prompt"] for row in rows] + test_prompts)

    params = trainable(model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(.9, .999), eps=1e-8, weight_decay=1e-4, fused=True)
    scheduler, T = make_scheduler(model, "ddim", args.num_inference_steps), args.num_inference_steps
    fused, trained = (span(name, getattr(args, name)) for name in ("fusion_steps", "trained_steps"))
    steps = range(T - fused[-1], T - fused[0] + 1)                        # T is the first step, 1 the last
    zeros = torch.zeros(T, 1, 1, 1)                                       # without noise (set_alpha_to_one: the last step) nothing to train
    random_steps = ddim_step(scheduler, zeros, scheduler.timesteps, zeros)[1].flatten().nonzero().flatten().tolist()
    random_steps = [i for i in random_steps if T - i in trained] or die(f"--trained_steps {args.trained_steps}: no noise is added there, nothing to train on")
    sampler = dict(scheduler="ddim", eta=1., num_inference_steps=T, guidance_scale=args.guidance_scale)
    run = Run(args, sampler, model)
    print_settings(args, row_of(PAPER, args.model), params)
    (run.dir / "test_prompts.txt").write_text("\n".join(test_prompts) + "\n")
    if args.resume:
        state = run.resume(params, optimizer)
        history = state["history"]
        for row, thresholds in zip(rows, state["thresholds"]):
            row["thresholds"] = thresholds
    else:
        history = {}
        if not args.naive and any("thresholds" not in row for row in rows):
            find_thresholds(args, model, scheduler, rows, modules[0], steps, run.dir / "samples")
            (run.dir / "prompts.json").write_text(json.dumps({"prompts": dict(train=rows, test=test_prompts)}, indent=1, ensure_ascii=False))
            print(f"thresholds: {run.dir / 'prompts.json'}; if samples/thresholds.png does not show the items, edit it and start with --prompts it")
        print(f"held-out {args.reward} before: {held_out(run, reward, test_prompts, sampler, 0):.4f} (known range {known.low:g} to {known.high:g})")
        print("the loss stays near ln 2 = .693 (dpo) or 0 (ddpo, dpok) however well it learns: read reward, and accuracy and margin in log.jsonl")

    passes = []                                                           # images through the U-Net: guidance makes it two an image
    model.denoiser.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    for step in (bar := tqdm(range(run.start + 1, args.train_steps + 1), initial=run.start, total=args.train_steps, desc="dfusion_dpo")):
        start = time.time()
        number, epoch = divmod(step - 1, args.inner_epochs)
        if epoch == 0:
            theta_old, log_prob_old = [p.detach().clone() for p in params], None                                      # th'
            pairs, round_stats = sample_round(args, model, scheduler, reward, rows, modules, steps, history, number)
        elif step == run.start + 1:                                       # resumed inside a round: its samples come again, from th'
            theta, theta_old, log_prob_old = [p.detach().clone() for p in params], state["theta_old"], state["log_prob_old"]
            assign(params, theta_old)
            pairs, round_stats = sample_round(args, model, scheduler, reward, rows, modules, steps, history, number)
            assign(params, theta)
            passes.clear()
        if epoch == 0 and pairs.pictures:
            save_grid(torch.stack(pairs.pictures), run.dir / "samples" / f"round_{number:04d}.png", columns=2 if args.naive else 4)

        picked = [torch.randperm(len(random_steps), generator=generator(args.seed, "timesteps", number, p))[:args.train_timesteps].sort()[0]
                  for p in range(len(pairs.prompts))]
        couples = torch.tensor([(p, random_steps[k]) for p, ks in enumerate(picked) for k in ks])                    # (pair, index of timestep)
        m, total, log_probs, log_ratios, kls = args.micro_batch // 2, 0., [], [], []
        for j in range(0, len(couples), m):                               # their order is free: one optimizer step takes them all
            p, i = couples[j:j + m].T
            old = None if log_prob_old is None else log_prob_old[:, j:j + m].flatten().to(device)
            loss, log_prob, log_ratio, kl = pair_loss(args, model, scheduler, pairs, p, i, old)
            loss = loss * len(p) / len(couples)
            loss.backward()
            total += loss.detach()
            log_probs.append(log_prob.view(2, -1))
            log_ratios.append(log_ratio.view(2, -1))
            kls.append(kl)
        log_prob_old = torch.cat(log_probs, 1).cpu() if log_prob_old is None else log_prob_old

        grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.).item()     # Table 3
        if not (skipped := run.skips(step, grad_norm, total, round_stats["reward"])):         # NaN or Inf never reaches the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log_ratio = torch.cat(log_ratios, 1).cpu()                        # (2, couples)
        margin = log_ratio[0] - log_ratio[1]
        at = [log_ratio[:, couples[:, 1] == i] for i in range(T)]
        stats = dict(round=number, epoch=epoch, loss=total.item(), **round_stats, accuracy=((margin > 0) + .5 * (margin == 0)).mean().item(),
                     margin=margin.mean().item(), log_ratio=[float(f"{x.square().mean().sqrt():.4g}") if x.numel() else None for x in at],
                     grad_norm=grad_norm, images=(number + 1) * args.batch_size, passes=sum(passes), skipped=skipped,
                     seconds=time.time() - start)
        if args.algo == "dpok":
            stats["kl"] = torch.cat(kls).mean().item()
        if step % args.save_every == 0 or step == args.train_steps:
            stats["test_reward"] = held_out(run, reward, test_prompts, sampler, step)
        passes.clear()
        run.log(step=step, **stats)
        bar.set_postfix(reward=f"{stats['reward']:.4f}", accuracy=f"{stats['accuracy']:.3f}")
        if "test_reward" in stats:
            run.save(step, params, optimizer, history=history, thresholds=[row.get("thresholds") for row in rows], log_prob_old=log_prob_old,
                     theta_old=[p.cpu() for p in theta_old])

    after = stats["test_reward"] if run.start < args.train_steps else held_out(run, reward, test_prompts, sampler, args.train_steps)
    print(f"held-out {args.reward} after:  {after:.4f}; pictures: {run.dir / 'samples'}")


def assign(params, values):
    """Puts values into the parameters, in place."""
    for p, value in zip(params, values, strict=True):
        p.data.copy_(value)


if __name__ == "__main__":
    launch(parse_args, main)
