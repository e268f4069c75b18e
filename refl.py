"""ReFL: reward feedback learning (Xu et al. 2023, arXiv 2304.05977), with the settings of ImageReFL (arXiv 2505.22569).

Denoise without gradient to a random late step, predict the clean image there in one step with gradient, and raise its reward.

  mid     ~ {first_mid .. last_mid}                         one of the last steps of the sampler, drawn once per update
  latents = sample(x_T, steps 0 .. mid-1)                   no gradient, no guidance
  x0      = predict_x0(denoise(latents, t_mid), t_mid)      ONE denoiser call with gradient
  r       = reward(decode(x0), prompt)                      gradient flows through the frozen VAE and the frozen reward
  loss    = -reward_scale * r'                              r' = r mapped to about [0, 1] by a constant affine map; or
  loss    = reward_scale * relu(2 - r)                      --loss hinge: ImageReward's original, r the normalised ImageReward

Images are sampled with the same ancestral steps (DDPM) as in training, without guidance; FLUX with its own Euler steps, on which t is 1000 sigma,
x0 = x_t - sigma v, and dev's guidance input is 1.

Differences from the papers' code:
1. mid is drawn once per update, not per micro-batch: the prefix, four fifths of the work, then runs on the whole batch at once.
2. Adam's eps is 1e-15. With the papers' 1e-8 a loss scaled by 1e-3 has gradients that sink under eps, and the real learning rate is a
   fraction of the one on paper (grad_rms is logged: it must stay well above eps). The ImageReFL release steps its optimizer twice per
   update, so its parameters move sqrt(2) lr: to repeat its speed multiply --lr by 1.4.
3. A LoRA by default, so that it fits one GPU and the base model is the same network with the adapter off; --lora_rank 0 is the papers' full
   fine-tuning.
4. Of ImageReward's own ReFL only the loss is here: its lr 1e-5, batch 64, 100 updates and clipping at 1 are not the defaults.

  $ python refl.py                                              # the toy world, minutes on two CPU cores
  $ python refl.py --model sd15 --reward pick --prompts captions.txt --test_prompts unseen.txt
  $ python combined_sample.py --lora runs/refl-toy-toy_pref --mode tuned --out images

Measured (toy, defaults, one CPU core, three seeds; tests/claims.py refl): .9 s an update; held-out toy_pref 14.40 -> 15.84, dino_div .320 -> .174.
"""
import math
import time

import torch
from tqdm import tqdm

from common import (REWARDS, Parser, Run, condition, decode, denoise, encode_once, generator, held_out, initial_latents, launch,
                    load_model, load_reward, make_scheduler, merged, pick_device, predict_x0, print_settings, read_prompts, row_of, sample, trainable)

PAPER = {  # ImageReFL, section 5 and its code; a release's "epoch" is 100 updates, ReFL runs 20
    "sd15": dict(train_steps=2000, batch_size=32, lr=3e-4, num_inference_steps=40, first_mid=30, last_mid=39, reward_scale=1e-3, lora_rank=0, resolution=512),
    "sdxl": dict(train_steps=2000, batch_size=16, lr=3e-4, num_inference_steps=40, first_mid=30, last_mid=39, reward_scale=1e-3, lora_rank=0, resolution=512),
}
OURS = {   # what we change, and the rows the paper does not have
    "sd14": dict(PAPER["sd15"], lora_rank=32),
    "sd15": dict(PAPER["sd15"], lora_rank=32),
    "sd21": dict(PAPER["sd15"], lora_rank=32),
    "sdxl": dict(PAPER["sdxl"], lora_rank=32),
    "flux-schnell": dict(train_steps=2000, batch_size=16, lr=1e-4, num_inference_steps=4, first_mid=2, last_mid=3, reward_scale=1e-3, lora_rank=16, resolution=512),
    "flux-dev": dict(train_steps=2000, batch_size=16, lr=1e-4, num_inference_steps=28, first_mid=20, last_mid=27, reward_scale=1e-3, lora_rank=16, resolution=512),
    "toy-flux": dict(train_steps=240, batch_size=8, lr=1e-3, num_inference_steps=5, first_mid=3, last_mid=4, reward_scale=1e-3, lora_rank=8, resolution=64),
    "toy": dict(train_steps=240, batch_size=8, lr=1e-3, num_inference_steps=20, first_mid=12, last_mid=19, reward_scale=1e-3, lora_rank=8, resolution=64),
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default="toy", help=f"{', '.join(OURS)}; or a diffusers folder or hub id (id@revision)")
    row = parser.settings(argv, OURS)
    parser.add_argument("--reward", help=f"{', '.join(REWARDS)}; name:PATH takes the weights from PATH (toy_pref on toy)")
    parser.add_argument("--loss", choices=("linear", "hinge"), default="linear", help="-r' or ImageReward's relu(2 - r)")
    parser.add_argument("--prompts", help="text file, a prompt per line (toy/prompts_train.txt on toy; else captions of COCO's training set, fetched once)")
    parser.add_argument("--test_prompts", help="held-out prompts, the first 16 (toy/prompts_test.txt on toy; else captions of COCO's validation set)")
    parser.add_argument("--train_steps", type=int, default=row["train_steps"], help="optimizer updates")
    parser.add_argument("--batch_size", type=int, default=row["batch_size"], help="images per update")
    parser.add_argument("--micro_batch", type=int, default=8, help="images per gradient pass; the prefix runs on the whole batch")
    parser.add_argument("--resolution", type=int, default=row["resolution"], help="pixels")
    parser.add_argument("--num_inference_steps", type=int, default=row["num_inference_steps"], help="sampling steps, in training and after")
    parser.add_argument("--first_mid", type=int, default=row["first_mid"], help="earliest step that may carry the gradient")
    parser.add_argument("--last_mid", type=int, default=row["last_mid"], help="latest one, inclusive")
    parser.add_argument("--reward_scale", type=float, default=row["reward_scale"], help="weight of the reward in the loss")
    parser.add_argument("--lr", type=float, default=row["lr"], help="learning rate of AdamW")
    parser.add_argument("--lora_rank", type=int, default=row["lora_rank"], help="LoRA rank (alpha = rank); 0 trains the full denoiser")
    parser.add_argument("--init_lora", help="start from this LoRA")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, for another forward call in the gradient step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    parser.add_argument("--save_every", type=int, default=60, help="updates between snapshots, each with a sample grid and held-out reward")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", help="run folder (runs/refl-MODEL-REWARD)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where its last checkpoint stands")
    args = parser.finish(argv, "refl")
    if not 0 <= args.first_mid <= args.last_mid < args.num_inference_steps:
        parser.error(f"--first_mid {args.first_mid} --last_mid {args.last_mid}: 0 <= first_mid <= last_mid < num_inference_steps = {args.num_inference_steps}")
    if not math.isfinite(args.reward_scale):
        parser.error(f"--reward_scale {args.reward_scale:g}: a finite number is needed")
    if args.loss == "hinge" and args.reward.partition(":")[0] != "imagereward":
        parser.error("--loss hinge is ImageReward's: relu(2 - r) is 0, or never fades, for the scale of another --reward")
    return args


def refl_step(model, scheduler, latents, t, cond, reward, prompts):
    """One denoiser call with gradient at timestep t: latents (B, C, h, w) -> rewards (B,) of the predicted clean images."""
    noise_pred = denoise(model, latents, t, cond)
    x0 = predict_x0(scheduler, noise_pred, t, latents)
    return reward(decode(model, x0), prompts)


def linear_loss(r, shift, scale, reward_scale):
    """-reward_scale r', r' = (r - shift) / scale: ImageReFL's; its gradient does not fade as the reward grows."""
    return -reward_scale * ((r - shift) / scale).mean()


def hinge_loss(r, reward_scale):
    """ImageReward's own: reward_scale relu(2 - r), r the normalised ImageReward; stops pushing at 2."""
    return reward_scale * torch.relu(2 - r).mean()


def main(args):
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution, full=args.lora_rank == 0)
    args.resolution = model.resolution
    reward, row = load_reward(args.reward, device)
    train_prompts, test_prompts = read_prompts(args.prompts), read_prompts(args.test_prompts, "val")[:16]
    encode_once(model, train_prompts + test_prompts)

    params = trainable(model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(.9, .999), eps=1e-15, weight_decay=1e-2, fused=True)     # eps: refl.py, difference 2
    kind, eta = ("euler", 0.) if model.flow else ("ddpm", 1.)
    scheduler = make_scheduler(model, kind, args.num_inference_steps)
    sampler = dict(scheduler=kind, eta=eta, num_inference_steps=args.num_inference_steps, guidance_scale=1.)
    run = Run(args, sampler, model)
    print_settings(args, row_of(PAPER, args.model), params)
    if args.resume:
        run.resume(params, optimizer)
    else:
        print(f"held-out {args.reward} before: {held_out(run, reward, test_prompts, sampler, 0):.4f} (known range {row.low:g} to {row.high:g})")

    for step in (bar := tqdm(range(run.start + 1, args.train_steps + 1), initial=run.start, total=args.train_steps, desc="refl")):
        start = time.time()
        draw = generator(args.seed, "update", step)
        prompts = [train_prompts[i] for i in torch.randint(len(train_prompts), (args.batch_size,), generator=draw)]
        mid = torch.randint(args.first_mid, args.last_mid + 1, (), generator=draw).item()
        generators = [generator(args.seed, "train", step, i) for i in range(args.batch_size)]
        with merged(model):
            latents = sample(model, scheduler, initial_latents(model, generators), condition(model, prompts), 0, mid, generators)

        t, total, rewards = scheduler.timesteps[mid], 0., []
        for i in range(0, args.batch_size, args.micro_batch):
            part = prompts[i:i + args.micro_batch]
            r = refl_step(model, scheduler, latents[i:i + args.micro_batch], t, condition(model, part), reward, part)
            loss = hinge_loss(r, args.reward_scale) if args.loss == "hinge" else linear_loss(r, row.shift, row.scale, args.reward_scale)
            loss = loss * len(part) / args.batch_size
            loss.backward()
            total, rewards = total + loss.detach(), rewards + [r.detach()]

        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item()           # ImageReFL does not clip
        if not (skipped := run.skips(step, grad_norm, total)):            # NaN or Inf never reaches the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stats = dict(loss=total.item(), reward=torch.cat(rewards).mean().item(), grad_norm=grad_norm,
                     grad_rms=grad_norm / sum(p.numel() for p in params) ** .5, mid=mid, skipped=skipped, seconds=time.time() - start)
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
