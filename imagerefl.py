"""ImageReFL: ReFL that starts from real images (Sorokin et al. 2025, arXiv 2505.22569).

Noise a real image to t', denoise it without gradient to a random late step, predict the clean image there in one step with gradient, and raise its
reward. In these updates the model never draws a layout of its own, which the reward could narrow.

  x_t'    = add_noise(encode(image), noise, t')             t' the timestep of step `start`; image and prompt are a pair of --data
  mid     ~ {first_mid .. last_mid}                         drawn once per update
  latents = sample(x_t', steps start .. mid-1)              the model that trains; no gradient, no guidance; nothing if mid == start
  r       = reward(decode(predict_x0(denoise(latents, t_mid), t_mid)), prompt)                     refl_step, as in refl.py
  mse     = mean((denoise(x_t', t') - target)^2)            the diffusion loss on the real image
  loss    = -reward_scale * r' + diffusion_weight * mse     section 4; r' = r mapped to about [0, 1] by a constant affine map

  every refl_every-th update is a classic ReFL step: from x_T, steps 0 .. mid-1, without the diffusion loss

Differences from the paper's code:
1. Where mid == start the rollout is empty. The release takes a step all the same, so the model sees latents of the wrong noise level.
2. Every fourth *update* is ReFL's, as the paper has it; the release counts micro-batches, and its published configuration leaves this off.
3. mid is drawn once per update, not per micro-batch; Adam's eps is 1e-15, and one step per update: see refl.py, differences 1 and 2.
4. Images are resized and cropped; the release squashes them to a square.
5. A LoRA by default; --lora_rank 0 is the paper's full fine-tuning. The tuned model is meant for the last steps alone, after the base model:
   combined_sample.py --mode combined. With a LoRA both are one network, adapter off and on. test_reward and samples/ show the tuned model alone, in
   all steps.

  $ python imagerefl.py                                         # the toy world, minutes on two CPU cores
  $ python imagerefl.py --model sdxl --reward hps               # COCO, fetched on first use
  $ python combined_sample.py --lora runs/imagerefl-toy-toy_pref --mode combined --base_steps 14 --out images

Measured (toy, defaults, one CPU core, three seeds; tests/claims.py imagerefl): .5 s an update; held-out toy_pref 14.40 -> 15.94, dino_div .320 -> .132
alone, 16.22 and .148 after 14 of 20 steps of the base model, whose own are 15.59 and .210.
"""
import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (REWARDS, Parser, Run, condition, decode, denoise, diffusion_target, encode, encode_once, generator, held_out,
                    initial_latents, launch, load_model, load_reward, make_scheduler, merged, pick_device, predict_x0, print_settings, read_prompts,
                    row_of, sample, trainable)
from prompts.coco import image_batches, image_data

PAPER = {  # section 5: ReFL steps one in four, loss weights, batch, rate; code: start, mid; a release's "epoch" is 100 updates, ImageReFL runs 40
    "sd15": dict(train_steps=4000, batch_size=32, lr=3e-4, num_inference_steps=40, start=30, first_mid=30, last_mid=39, reward_scale=1e-3,
                 diffusion_weight=1e-5, refl_every=4, lora_rank=0, resolution=512),
    "sdxl": dict(train_steps=4000, batch_size=16, lr=3e-4, num_inference_steps=40, start=30, first_mid=30, last_mid=39, reward_scale=1e-3,
                 diffusion_weight=1e-5, refl_every=4, lora_rank=0, resolution=512),
}
OURS = {   # what we change, and the rows the paper does not have
    "sd14": dict(PAPER["sd15"], lora_rank=32),
    "sd15": dict(PAPER["sd15"], lora_rank=32),
    "sd21": dict(PAPER["sd15"], lora_rank=32),
    "sdxl": dict(PAPER["sdxl"], lora_rank=32),
    "toy": dict(train_steps=240, batch_size=8, lr=1e-3, num_inference_steps=20, start=12, first_mid=12, last_mid=19, reward_scale=1e-3,
                diffusion_weight=1e-5, refl_every=4, lora_rank=8, resolution=64),
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default="toy", help=f"{', '.join(OURS)}; or a diffusers folder or hub id (id@revision)")
    row = parser.settings(argv, OURS)
    parser.add_argument("--reward", help=f"{', '.join(REWARDS)}; name:PATH takes the weights from PATH (toy_pref on toy)")
    parser.add_argument("--data", help="folder of images with metadata.jsonl, {file_name, text} a line (toy/images on toy; else COCO, fetched on first use)")
    parser.add_argument("--prompts", help="prompts of the classic ReFL steps (toy/prompts_train.txt on toy; else the captions of --data)")
    parser.add_argument("--test_prompts", help="held-out prompts, the first 16 (toy/prompts_test.txt on toy; else captions of COCO's validation set)")
    parser.add_argument("--train_steps", type=int, default=row["train_steps"], help="optimizer updates")
    parser.add_argument("--batch_size", type=int, default=row["batch_size"], help="images per update")
    parser.add_argument("--micro_batch", type=int, default=8, help="images per gradient pass; the prefix runs on the whole batch")
    parser.add_argument("--resolution", type=int, default=row["resolution"], help="pixels")
    parser.add_argument("--num_inference_steps", type=int, default=row["num_inference_steps"], help="sampling steps, in training and after")
    parser.add_argument("--start", type=int, default=row["start"], help="real images are noised to the timestep of this step (t')")
    parser.add_argument("--first_mid", type=int, default=row["first_mid"], help="earliest step that may carry the gradient")
    parser.add_argument("--last_mid", type=int, default=row["last_mid"], help="latest one, inclusive")
    parser.add_argument("--reward_scale", type=float, default=row["reward_scale"], help="weight of the reward in the loss")
    parser.add_argument("--diffusion_weight", type=float, default=row["diffusion_weight"], help="weight of the diffusion loss; 0 leaves it out")
    parser.add_argument("--refl_every", type=int, default=row["refl_every"], help="every so many updates are classic ReFL's; 0: none")
    parser.add_argument("--lr", type=float, default=row["lr"], help="learning rate of AdamW")
    parser.add_argument("--lora_rank", type=int, default=row["lora_rank"], help="LoRA rank (alpha = rank); 0 trains the full denoiser")
    parser.add_argument("--init_lora", help="start from this LoRA")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, for another forward call in the gradient step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    parser.add_argument("--save_every", type=int, default=60, help="updates between snapshots, each with a sample grid and held-out reward")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", help="run folder (runs/imagerefl-MODEL-REWARD)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where its last checkpoint stands")
    args = parser.finish(argv, "imagerefl")
    if not 0 <= args.start <= args.first_mid <= args.last_mid < args.num_inference_steps:
        parser.error(f"--start {args.start} --first_mid {args.first_mid} --last_mid {args.last_mid}: "
                     f"0 <= start <= first_mid <= last_mid < num_inference_steps = {args.num_inference_steps}")
    if not math.isfinite(args.reward_scale):
        parser.error(f"--reward_scale {args.reward_scale:g}: a finite number is needed")
    if not 0 <= args.diffusion_weight < math.inf or args.refl_every < 0:
        parser.error(f"--diffusion_weight {args.diffusion_weight:g} --refl_every {args.refl_every}: 0 or more")
    return args


def refl_step(model, scheduler, latents, t, cond, reward, prompts):
    """One denoiser call with gradient at timestep t: latents (B, C, h, w) -> rewards (B,) of the predicted clean images."""
    noise_pred = denoise(model, latents, t, cond)
    x0 = predict_x0(scheduler, noise_pred, t, latents)
    return reward(decode(model, x0), prompts)


def linear_loss(r, shift, scale, reward_scale):
    """-reward_scale r', r' = (r - shift) / scale: ImageReFL's; its gradient does not fade as the reward grows."""
    return -reward_scale * ((r - shift) / scale).mean()


def diffusion_loss(noise_pred, target):
    """mean (noise_pred - target)^2 on a noised real image, target the noise (or v): keeps the denoiser a denoiser of real images."""
    return F.mse_loss(noise_pred, target)


def classic(args, step):
    """Whether this update is ReFL's, from pure noise (section 4: one after every three of ImageReFL's)."""
    return args.refl_every > 0 and step % args.refl_every == 0


def main(args):
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution, full=args.lora_rank == 0)
    args.resolution = model.resolution
    reward, row = load_reward(args.reward, device)
    data = image_data(args.data, args.resolution)
    train_prompts, test_prompts = read_prompts(args.prompts) if args.prompts else data.captions, read_prompts(args.test_prompts, "val")[:16]
    encode_once(model, data.captions + train_prompts + test_prompts)

    params = trainable(model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(.9, .999), eps=1e-15, weight_decay=1e-2, fused=True)     # eps: refl.py, difference 2
    scheduler = make_scheduler(model, "ddpm", args.num_inference_steps)
    t_start = scheduler.timesteps[args.start]                             # t'
    sampler = dict(scheduler="ddpm", eta=1., num_inference_steps=args.num_inference_steps, guidance_scale=1.)
    run = Run(args, sampler, model)
    print_settings(args, row_of(PAPER, args.model), params)
    if args.resume:
        run.resume(params, optimizer)
    else:
        print(f"held-out {args.reward} before: {held_out(run, reward, test_prompts, sampler, 0):.4f} (known range {row.low:g} to {row.high:g})")

    indices = [torch.randint(len(data), (args.batch_size,), generator=generator(args.seed, "data", step)).tolist()
               for step in range(run.start + 1, args.train_steps + 1) if not classic(args, step)]
    batches = image_batches(data, indices, workers=4 if device.type == "cuda" else 0)
    for step in (bar := tqdm(range(run.start + 1, args.train_steps + 1), initial=run.start, total=args.train_steps, desc="imagerefl")):
        start = time.time()
        draw = generator(args.seed, "update", step)
        prompts = [train_prompts[i] for i in torch.randint(len(train_prompts), (args.batch_size,), generator=draw)]
        mid = torch.randint(args.first_mid, args.last_mid + 1, (), generator=draw).item()
        generators = [generator(args.seed, "train", step, i) for i in range(args.batch_size)]
        noise, first = initial_latents(model, generators), 0
        latents, from_images = noise, not classic(args, step)
        if from_images:
            images, prompts = next(batches)
            first, x0 = args.start, encode(model, images)
            latents = noised = scheduler.add_noise(x0, noise, t_start)
            target = diffusion_target(scheduler, x0, noise, t_start)
        with merged(model):
            latents = sample(model, scheduler, latents, condition(model, prompts), first, mid, generators)

        t, total, rewards, mses = scheduler.timesteps[mid], 0., [], []
        for i in range(0, args.batch_size, args.micro_batch):
            part = prompts[i:i + args.micro_batch]
            r = refl_step(model, scheduler, latents[i:i + args.micro_batch], t, condition(model, part), reward, part)
            loss = linear_loss(r, row.shift, row.scale, args.reward_scale)
            loss = loss * len(part) / args.batch_size
            loss.backward()
            total, rewards = total + loss.detach(), rewards + [r.detach()]
            if from_images and args.diffusion_weight:                     # a backward pass of its own: one graph in memory at a time
                mse = diffusion_loss(denoise(model, noised[i:i + args.micro_batch], t_start, condition(model, part)), target[i:i + args.micro_batch])
                loss = args.diffusion_weight * mse * len(part) / args.batch_size
                loss.backward()
                total, mses = total + loss.detach(), mses + [mse.detach() * len(part)]

        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item()           # ImageReFL does not clip
        if not (skipped := run.skips(step, grad_norm, total)):            # NaN or Inf never reaches the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stats = dict(loss=total.item(), reward=torch.cat(rewards).mean().item(), grad_norm=grad_norm,
                     grad_rms=grad_norm / sum(p.numel() for p in params) ** .5, mid=mid, skipped=skipped, seconds=time.time() - start)
        if mses:
            stats["mse"] = torch.stack(mses).sum().item() / args.batch_size
        if step % args.save_every == 0 or step == args.train_steps:
            stats["test_reward"] = held_out(run, reward, test_prompts, sampler, step)
        run.log(step=step, **stats)
        bar.set_postfix(loss=f"{stats['loss']:.2e}", reward=f"{stats['reward']:.3f}")
        if "test_reward" in stats:
            run.save(step, params, optimizer)

    after = stats["test_reward"] if run.start < args.train_steps else held_out(run, reward, test_prompts, sampler, args.train_steps)
    print(f"held-out {args.reward} after:  {after:.4f}; pictures: {run.dir / 'samples'}")


if __name__ == "__main__":
    launch(parse_args, main)
