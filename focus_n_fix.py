"""Focus-N-Fix: fine-tune what was wrong, leave the rest of the image alone (Xing et al. 2025, arXiv 2501.06481).

DRaFT with a regional penalty: raise the reward, and hold the tuned image to the base model's wherever the base model's had no problem.

  I0      = decode(sample(x_T, all steps))                  the base model: the same network, adapters off; no gradient, once per (prompt, x_T)
  M       = problem_mask(map of I0)                         1 where I0 has a problem: a map above --threshold, grown by --dilate pixels
  latents = sample(x_T, steps 0 .. T-K-1)                   the tuned model, same prompt and x_T, DDIM with eta 0; no gradient
  I       = draft(latents)                                  its last K = --grad_steps steps and the decoder, with gradient (DRaFT-K)
  change  = ||(1 - M) (I - I0)||_F / sqrt(values in 1 - M)  per image; free below about LEVEL: hypot(change, LEVEL) - LEVEL
  loss    = -(r' - beta * change)                           r' of the whole image, mapped to about [0, 1]; --beta 0 is DRaFT, the paper's baseline

  --region heatmap      the confidence map of --detector; reward: "artifact", minus its mean (or any other)
  --region saliency     Grad-CAM of -r, in shares of each image's maximum, for a CLIP-like reward: where it finds what lowers r
  --concept BAD GOOD    r = cos(image, GOOD) - cos(image, BAD), of --reward's CLIP, the prompt left out: for concepts that are unwanted

No code was released, and only the abstract was at hand, with second-hand summaries: K = 2, rank 64 and the term itself are the paper's. Ours:
1. change is divided by the root of the number of values it is taken over, so that beta means the same at every resolution and mask. The gradient of
   a norm has unit length however small the norm: at the start I - I0 is the last digits of a float, and the first updates would follow them. So
   changes well below one step of 8 bits do not count. --raw_norm is the paper's form, without either. A mask over everything leaves nothing to hold.
2. An empty mask (nothing wrong) keeps its pair: the formula as it stands then holds the whole image. Such pairs are counted (log: empty).
3. Pairs (prompt, x_T) come from a finite --pool, in turn; their I0 and M are made before training and kept in memory (512 px: 3 MiB a pair).
   --pool 0 draws new pairs for every update, and samples twice.
4. Every other value is ours too. The paper's rewards and maps are private: a detector, a CLIP and --concept stand in for them.

  $ python focus_n_fix.py                                       # the toy world, artifacts; minutes on two CPU cores
  $ python focus_n_fix.py --concept "a red star" "a blue star" --beta 3 --lr 3e-4      # the same, one object unwanted
  $ python focus_n_fix.py --model sd14 --prompts captions.txt --detector detector_folder
  $ python combined_sample.py --lora runs/focus_n_fix-toy-artifact --mode tuned --out images/focus

Measured (toy, artifacts, 60 updates, three seeds; tests/claims.py focus_n_fix): at equal held-out reward the change outside is .0140, DRaFT's .0244.
"""
import dataclasses
import math
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (REWARDS, TOY, Parser, PickScore, Reward, Run, base_model, condition, decode, denoise, die, encode_once, generate,
                    generator, held_out, initial_latents, launch, load_detector, load_model, load_reward, make_scheduler, merged, pick_device,
                    print_settings, read_prompts, row_of, sample, save_grid, trainable)

PAPER = {  # second-hand; SD v1.4 is its main model, SDXL its other one
    "sd14": dict(grad_steps=2, lora_rank=64),
    "sdxl": dict(grad_steps=2, lora_rank=64),
}
OURS = {   # ours but for the two above
    **dict.fromkeys(("sd14", "sd15", "sd21"), dict(PAPER["sd14"], train_steps=1000, batch_size=4, micro_batch=2, lr=2e-4, num_inference_steps=50,
                                                   guidance_scale=7.5, beta=.5, dilate=20, pool=256, resolution=512)),
    "sdxl": dict(PAPER["sdxl"], train_steps=1000, batch_size=4, micro_batch=1, lr=2e-4, num_inference_steps=50, guidance_scale=5., beta=.5, dilate=40,
                 pool=256, resolution=1024),
    "toy": dict(grad_steps=2, lora_rank=16, train_steps=120, batch_size=8, micro_batch=8, lr=1e-3, num_inference_steps=10, guidance_scale=4., beta=.5,
                dilate=3, pool=128, resolution=64),
}
THRESHOLD = dict(heatmap=.2, saliency=.5)                                 # ours
ARTIFACT = Reward(None, -1., 0.)                                          # minus the mean confidence of the detector
LEVEL = 1 / 255                                                           # one step of an 8-bit picture
SHOWN = 8                                                                 # held-out images in the pictures of I0 | M | I | difference


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default="toy", help=f"{', '.join(OURS)}; or a diffusers folder or hub id (id@revision)")
    row = parser.settings(argv, OURS)
    parser.add_argument("--reward", help=f"artifact, {', '.join(REWARDS)}; name:PATH takes the weights from PATH")
    parser.add_argument("--concept", nargs=2, metavar=("BAD", "GOOD"), help="two texts: what is unwanted, and its neutral counterpart")
    parser.add_argument("--region", choices=("heatmap", "saliency"), help="where the problem is: see above")
    parser.add_argument("--detector", help="artifact detector: a folder or hub id in transformers' format, or a file of weights (toy/detector on toy)")
    parser.add_argument("--threshold", type=float, help="the problem is where the map is above: confidence, or share of the saliency's maximum")
    parser.add_argument("--dilate", type=int, default=row["dilate"], help="pixels by which the region grows on every side")
    parser.add_argument("--beta", type=float, default=row["beta"], help="weight of the change outside the region, against r'; 0 is DRaFT")
    parser.add_argument("--raw_norm", action="store_true", help="the paper's norm, not divided by the root of its number of values: choose --beta anew")
    parser.add_argument("--pool", type=int, default=row["pool"], help="pairs of prompt and noise, I0 and M made once; 0: new ones every update")
    parser.add_argument("--prompts", help="text file, a prompt per line (toy/prompts_train.txt on toy; needed with other models)")
    parser.add_argument("--test_prompts", help="held-out prompts, the first 16 (toy/prompts_test.txt on toy; else the last 100 of --prompts, held out)")
    parser.add_argument("--train_steps", type=int, default=row["train_steps"], help="optimizer updates")
    parser.add_argument("--batch_size", type=int, default=row["batch_size"], help="images per update")
    parser.add_argument("--micro_batch", type=int, default=row["micro_batch"], help="images per gradient pass; the prefix runs on the whole batch")
    parser.add_argument("--resolution", type=int, default=row["resolution"], help="pixels")
    parser.add_argument("--num_inference_steps", type=int, default=row["num_inference_steps"], help="sampling steps, in training and after")
    parser.add_argument("--guidance_scale", type=float, default=row["guidance_scale"], help="in training and after; 1 is without")
    parser.add_argument("--grad_steps", type=int, default=row["grad_steps"], help="K, the last steps, which carry the gradient")
    parser.add_argument("--lr", type=float, default=row["lr"], help="learning rate of AdamW")
    parser.add_argument("--lora_rank", type=int, default=row["lora_rank"], help="LoRA rank (alpha = rank); I0 needs the adapter to turn off: at least 1")
    parser.add_argument("--init_lora", help="start from this LoRA")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, for another forward call in the gradient step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    parser.add_argument("--save_every", type=int, default=60, help="updates between snapshots, each with a sample grid and held-out reward")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", help="run folder (runs/focus_n_fix-MODEL-REWARD)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where its last checkpoint stands")
    first = parser.parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])[0]
    toy, region = first.model == "toy", first.region or ("saliency" if first.concept else "heatmap")
    parser.set_defaults(region=region, threshold=THRESHOLD[region], reward="artifact" if not first.concept else "toy_clip" if toy else "clip")
    args = parser.finish(argv, "focus_n_fix", own_rewards=("artifact",))

    clip_like = args.reward.partition(":")[0] not in ("artifact", "imagereward")
    if not args.prompts:
        parser.error(f"--prompts FILE is needed with --model {args.model}")
    if not clip_like and (args.concept or args.region == "saliency"):
        parser.error(f"--{'concept' if args.concept else 'region saliency'} needs a CLIP-like reward, {args.reward} is none: "
                     f"--reward {', '.join(name for name in REWARDS if name != 'imagereward')}")
    if needs := args.region == "heatmap" or args.reward == "artifact":
        args.detector = args.detector or (str(TOY / "detector") if toy else parser.error(
            f"--detector is needed with --model {args.model}, --region {args.region} and --reward {args.reward}; or --concept BAD GOOD"))
    if args.detector and not needs:
        parser.error("--detector has no part in --region saliency with this reward")
    if args.lora_rank < 1:
        parser.error("--lora_rank 0: I0 comes from the network with its adapter off, so it takes a LoRA of rank 1 or more")
    if not 1 <= args.grad_steps <= args.num_inference_steps:
        parser.error(f"--grad_steps {args.grad_steps}: 1 <= grad_steps <= num_inference_steps = {args.num_inference_steps}")
    if not 0 <= args.threshold < 1 or args.dilate < 0 or args.pool < 0 or not 0 <= args.beta < math.inf or not 1 <= args.guidance_scale < math.inf:
        parser.error(f"--threshold {args.threshold:g} --dilate {args.dilate} --pool {args.pool} --beta {args.beta:g} --guidance_scale "
                     f"{args.guidance_scale:g}: threshold in [0, 1); dilate, pool and beta 0 or more; guidance 1 or more")
    return args


def concept_reward(clip, bad, good):
    """A CLIP-like reward and two texts -> the reward cos(image, good) - cos(image, bad), whatever the prompt: a product with one difference."""
    difference = clip.text(good) - clip.text(bad)
    if not difference.any():
        die(f"--concept {bad!r} {good!r}: this CLIP reads both texts alike")
    clip.texts[bad, good] = difference
    return lambda images, prompts: clip(images, [(bad, good)] * len(images))


def grad_cam(layer, score, images):
    """Grad-CAM (Selvaraju et al. 2017) of a ViT: images (B, 3, H, W) -> (B, 1, H, W) in [0, 1], each image's maximum 1, or 0 all over.

    score: images -> (B,). layer gives A (B, 1 + g*g, D), the tokens *entering* the last block (after its first norm): only the class token is pooled,
    so what leaves the block has no gradient at the patches. Weights w = mean over patches of dscore/dA; the map is relu(sum over D of w A).
    """
    kept = []
    with layer.register_forward_hook(lambda module, inputs, out: kept.append(out.requires_grad_())), torch.enable_grad():
        (gradient,) = torch.autograd.grad(score(images).sum(), kept)
    a, gradient = kept[0].detach()[:, 1:].float(), gradient[:, 1:].float()                  # without the class token
    cam = torch.relu((gradient.mean(1, keepdim=True) * a).sum(-1))                          # (B, g*g)
    g = round(cam.shape[1] ** .5)
    cam = F.interpolate(cam.view(-1, 1, g, g), images.shape[2:], mode="bilinear")
    return cam / cam.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny)


def last_norm(clip):
    """The first norm of the last block of a CLIP-like reward's ViT: transformers' names, or open_clip's."""
    return clip.clip.vision_model.encoder.layers[-1].layer_norm1 if isinstance(clip, PickScore) else clip.clip.visual.transformer.resblocks[-1].ln_1


def problem_mask(heat, threshold, dilate):
    """heat (B, 1, H, W) -> M (B, 1, H, W): 1 where it is above the threshold or within `dilate` pixels of that (in a square), else 0."""
    return F.max_pool2d((heat > threshold).float(), 2 * dilate + 1, stride=1, padding=dilate)


def change(images, base, where, raw=False):
    """||where (I - I0)||_F per image (B,), over the root of the number of values in `where` (B, 1, H, W) unless raw. vector_norm's gradient is 0 at
    I = I0, where training starts; (x ** 2).sum().sqrt()'s is NaN."""
    norm = torch.linalg.vector_norm((where * (images - base)).flatten(1), dim=1)
    return norm if raw else norm / (images.shape[1] * where.flatten(1).sum(1)).clamp(min=1).sqrt()


def focus_loss(images, base, mask, r, beta, raw=False):
    """-(r' - beta ||(1 - M) (I - I0)||), the mean over the batch: images I and base I0 (B, 3, H, W), mask M (B, 1, H, W), r' (B,)."""
    outside = change(images, base, 1 - mask, raw)
    stats = dict(outside=outside.detach(), inside=change(images.detach(), base, mask, raw), area=mask.mean((1, 2, 3)))
    penalty = outside if raw else torch.hypot(outside, torch.full_like(outside, LEVEL)) - LEVEL
    return (beta * penalty - r).mean(), stats


@torch.no_grad()
def before(model, scheduler, noise, prompts, guidance_scale, region):
    """What the base model makes of x_T (B, C, h, w): I0 (B, 3, H, W), and M (B, 1, H, W) by region(images, prompts)."""
    with base_model(model):
        latents = sample(model, scheduler, noise, condition(model, prompts), 0, len(scheduler.timesteps), None, guidance_scale,
                         condition(model, [None] * len(prompts)))
    base = decode(model, latents)
    return base, region(base, prompts)


def draft(model, scheduler, latents, cond, guidance_scale, uncond, grad_steps):
    """DRaFT-K (Clark et al. 2024): the last K DDIM steps with gradient, latents (B, C, h, w) -> images (B, 3, H, W); and a dict that the backward
    pass fills: timestep -> ||dloss/dnoise_pred||^2. An epsilon model's last step, t = 1, hardly moves the image: there one sees it."""
    squares = {}
    for t in scheduler.timesteps[-grad_steps:]:
        noise_pred = denoise(model, latents, t, cond, guidance_scale, uncond)
        noise_pred.register_hook(lambda g, t=t.item(): squares.update({t: g.square().sum()}))
        latents = scheduler.step(noise_pred, t, latents, eta=0.).prev_sample
    return decode(model, latents), squares


def compare(run, prompts, sampler, base, mask, step):
    """Held-out images beside the base model's: samples/region_*.png holds I0 | M | I | 3 |I - I0|, a row a prompt. Returns test_outside and
    test_inside, the change as in the loss's default form."""
    images = generate(run.model, prompts, run.args.seed, sampler, purpose="held-out")
    rows = torch.stack([base, mask.expand_as(base), images, 3 * (images - base).abs()], 1).flatten(0, 1)
    save_grid(rows, run.dir / "samples" / f"region_{step:06d}.png", columns=4)
    return dict(test_outside=change(images, base, 1 - mask).mean().item(), test_inside=change(images, base, mask).mean().item())


def main(args):
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution)
    args.resolution = model.resolution
    detector = load_detector(args.detector, device) if args.detector else None
    if args.reward == "artifact":
        reward, row = lambda images, prompts: -detector(images).mean((1, 2)), ARTIFACT
    else:
        clip, row = load_reward(args.reward, device)
        reward = concept_reward(clip, *args.concept) if args.concept else clip
        row = dataclasses.replace(row, low=-row.high, shift=0.) if args.concept else row
    train_prompts = read_prompts(args.prompts)
    if args.test_prompts:
        test_prompts = read_prompts(args.test_prompts)[:16]
    elif len(train_prompts) > 100:
        train_prompts, test_prompts = train_prompts[:-100], train_prompts[-100:][:16]
    else:
        die(f"--test_prompts FILE is needed: the last 100 of --prompts would be held out, and {args.prompts} has {len(train_prompts)}")
    encode_once(model, train_prompts + test_prompts)

    def region(images, prompts):
        heat = (F.interpolate(detector(images)[:, None], images.shape[2:], mode="bilinear") if args.region == "heatmap" else
                grad_cam(last_norm(clip), lambda images: -reward(images, prompts), images))
        return problem_mask(heat, args.threshold, args.dilate)

    params = trainable(model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(.9, .999), eps=1e-15, weight_decay=.1, fused=True)       # ours
    scheduler = make_scheduler(model, "ddim", args.num_inference_steps)
    sampler = dict(scheduler="ddim", eta=0., num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    run = Run(args, sampler, model)
    print_settings(args, row_of(PAPER, args.model), params)
    shown = test_prompts[:SHOWN]
    noise = initial_latents(model, [generator(args.seed, "held-out", i, 0) for i in range(len(shown))])
    test_base, test_mask = (x.cpu() for x in before(model, scheduler, noise, shown, args.guidance_scale, region))
    if args.resume:
        run.resume(params, optimizer)
    else:
        print(f"held-out {args.reward} before: {held_out(run, reward, test_prompts, sampler, 0):.4f} (known range {row.low:g} to {row.high:g})")
        compare(run, shown, sampler, test_base, test_mask, 0)

    def prompt_of(pair):
        return train_prompts[torch.randint(len(train_prompts), (), generator=generator(args.seed, "prompt", pair))]

    def noise_of(pairs):
        return initial_latents(model, [generator(args.seed, "train", pair) for pair in pairs])

    cache = {}                                                            # pair -> I0, M on the CPU
    for i in tqdm(range(0, min(args.pool, args.train_steps * args.batch_size), args.batch_size), desc="I0 and M of the pool"):
        pairs = list(range(i, min(i + args.batch_size, args.pool)))
        made = before(model, scheduler, noise_of(pairs), [prompt_of(pair) for pair in pairs], args.guidance_scale, region)
        cache |= {pair: (base, mask) for pair, base, mask in zip(pairs, *(x.cpu() for x in made))}
    if cache:
        areas = torch.stack([mask.mean() for _, mask in cache.values()])
        print(f"{len(cache)} pairs: the region is {areas.mean():.1%} of I0; nothing is wrong in {(areas == 0).sum()}, everything in {(areas == 1).sum()}")

    for step in (bar := tqdm(range(run.start + 1, args.train_steps + 1), initial=run.start, total=args.train_steps, desc="focus_n_fix")):
        start = time.time()
        pairs = range((step - 1) * args.batch_size, step * args.batch_size)
        pairs = [pair % args.pool for pair in pairs] if args.pool else list(pairs)
        prompts, noise = [prompt_of(pair) for pair in pairs], noise_of(pairs)
        if args.pool:
            base, mask = (torch.stack(x).to(device) for x in zip(*(cache[pair] for pair in pairs)))
        else:
            base, mask = before(model, scheduler, noise, prompts, args.guidance_scale, region)
        cond, uncond, prefix = condition(model, prompts), condition(model, [None] * len(prompts)), args.num_inference_steps - args.grad_steps
        with merged(model):
            latents = sample(model, scheduler, noise, cond, 0, prefix, None, args.guidance_scale, uncond)

        total, rewards, parts, squares = 0., [], [], dict.fromkeys(scheduler.timesteps[prefix:].tolist(), 0.)
        for i in range(0, args.batch_size, args.micro_batch):
            part, here = prompts[i:i + args.micro_batch], slice(i, i + args.micro_batch)
            images, own = draft(model, scheduler, latents[here], condition(model, part), args.guidance_scale, condition(model, [None] * len(part)),
                                args.grad_steps)
            r = reward(images, part)
            loss, stats = focus_loss(images, base[here], mask[here], (r - row.shift) / row.scale, args.beta, args.raw_norm)
            loss = loss * len(part) / args.batch_size
            loss.backward()
            total, rewards, parts = total + loss.detach(), rewards + [r.detach()], parts + [stats]
            squares = {t: squares[t] + own[t] for t in squares}

        grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.).item()                        # ours
        if not (skipped := run.skips(step, grad_norm, total)):            # NaN or Inf never reaches the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stats = dict(loss=total.item(), reward=torch.cat(rewards).mean().item(), grad_norm=grad_norm,
                     grad_rms=grad_norm / sum(p.numel() for p in params) ** .5, skipped=skipped, seconds=time.time() - start)
        stats |= {k: torch.cat([s[k] for s in parts]).mean().item() for k in ("outside", "inside", "area")}
        stats |= dict(empty=int((mask.amax((1, 2, 3)) == 0).sum()), grad_by_t={t: float(f"{s.sqrt():.4g}") for t, s in squares.items()})
        if step % args.save_every == 0 or step == args.train_steps:
            stats["test_reward"] = held_out(run, reward, test_prompts, sampler, step)
            stats |= compare(run, shown, sampler, test_base, test_mask, step)
        run.log(step=step, **stats)
        bar.set_postfix(loss=f"{stats['loss']:.2e}", reward=f"{stats['reward']:.3f}", outside=f"{stats['outside']:.3f}")
        if "test_reward" in stats:
            run.save(step, params, optimizer)

    after = stats["test_reward"] if run.start < args.train_steps else held_out(run, reward, test_prompts, sampler, args.train_steps)
    print(f"held-out {args.reward} after:  {after:.4f}; pictures: {run.dir / 'samples'}")


if __name__ == "__main__":
    launch(parse_args, main)
