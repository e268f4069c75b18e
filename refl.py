"""ReFL: reward feedback learning (Xu et al. 2023, arXiv 2304.05977), set up as in ImageReFL.

We denoise without gradients up to a random late step, and from there predict the clean image in one
step with gradients. The decoder and the reward are differentiable, so the denoiser can learn to
raise the reward of that image.

  mid     ~ {first_mid .. last_mid}                     one of the last steps, drawn once per update
  latents = sample(x_T, steps 0 .. mid - 1)             from pure noise x_T; no gradient
  x0      = predict_x0(denoise(latents, t_mid), t_mid)  the one denoiser call with gradients
  r       = reward(decode(x0), prompt)                  through the frozen VAE and reward
  loss    = -reward_scale * r'                          r' = (r - shift) / scale (rewards.py); or
  loss    = reward_scale * relu(2 - r)                  with --loss hinge, ImageReward's own loss

We sample with ancestral DDPM steps and no guidance, both during and after training. Flows take
Euler steps instead, with x0 = x_t - sigma v, and FLUX.1-dev gets a guidance scale of 1. The last
DDPM timestep is 1, where the image hardly changes anymore, so the reward's gradient there is small:
compare mid and grad_norm in the log.

Differences from ImageReFL's code (we follow its version of ReFL and its settings):
1. We draw mid once per update, not once per micro-batch, so the whole batch goes through the steps
   before mid at once. With SD1.5, those steps take about 80% of the FLOPs.
2. Adam's eps is 1e-15. With the loss scaled by 1e-3, gradients can approach or fall below the usual
   eps of 1e-8, which silently shrinks the learning rate. Check that grad_rms in the log stays well
   above eps.
3. We take one optimizer step per update. The released code takes two with the same gradient, the
   first before undoing the gradient scaling. The scaled one dominates Adam's moments: each step
   becomes 1/sqrt(2) as long, and the two together sqrt(2) times. To match, multiply --lr by 1.4.
4. We train a LoRA by default. It fits on one GPU, and the base model is the same network with the
   LoRA switched off. --lora_rank 0 fine-tunes the whole denoiser, as the papers do.
From ImageReward's own ReFL (lr 1e-5, batch 64, 100 updates) we take only the hinge loss.

  $ python refl.py                                        # the toy world: a minute on two CPU cores
  $ python refl.py --model sdxl --reward hps              # one CUDA GPU; COCO's captions as prompts
  $ python combined_sample.py --lora runs/refl-toy-toy_pref --mode tuned --out images
"""

import math
import time

import torch
from tqdm import tqdm

from common import TOY, decode, denoise, generator, initial_latents, load_model, make_scheduler
from common import make_trainable, merged, pick_device, predict_x0, sample
from data.prompts import condition, encode_once, read_prompts
from rewards import REWARD_HELP, known_reward, load_reward
from run_folder import Run, check_out, check_ranges, chosen_model, describe_reward, gather, held_out
from run_folder import is_main_process, joined_processes, own_part, print_settings, readable_errors
from run_folder import reward_means, run_name, settings_for, settings_parser, sum_gradients
from run_folder import sum_processes, with_parts

NAME = "refl"  # names the run folder and the progress bar; change it in a fork
# From ImageReFL's section 5 and its code, where ReFL runs 20 "epochs" of 100 updates. lora_rank 0,
# which is full fine-tuning, and its learning rate are the paper's. Besides OURS, only the printed
# settings and the run's page read PAPER. They show where we depart from it.
PAPER = {
    "sd15": dict(
        train_steps=2000, batch_size=32, resolution=512, lr=3e-4, lora_rank=0,
        num_inference_steps=40, first_mid=30, last_mid=39, reward_scale=1e-3,
    ),
    "sdxl": dict(
        train_steps=2000, batch_size=16, resolution=512, lr=3e-4, lora_rank=0,
        num_inference_steps=40, first_mid=30, last_mid=39, reward_scale=1e-3,
    ),
}
# What we change, and the models that the paper does not cover.
OURS = {
    "sd14": {**PAPER["sd15"], "lora_rank": 32},
    "sd15": {**PAPER["sd15"], "lora_rank": 32},
    "sd21": {**PAPER["sd15"], "lora_rank": 32},
    "sdxl": {**PAPER["sdxl"], "lora_rank": 32},
    "flux-schnell": dict(
        train_steps=2000, batch_size=16, resolution=512, lr=1e-4, lora_rank=16,
        num_inference_steps=4, first_mid=2, last_mid=3, reward_scale=1e-3,
    ),
    "flux-dev": dict(
        train_steps=2000, batch_size=16, resolution=512, lr=1e-4, lora_rank=16,
        num_inference_steps=28, first_mid=20, last_mid=27, reward_scale=1e-3,
    ),
    # Updates, batch, resolution, steps and first_mid are those of FlowBP's ReFL on this model
    # (github.com/RuoyuWang-2077/FlowBP), which trains all weights with lr 1e-5, under a guidance of
    # 3.5. The rank is Flow-GRPO's. The last step, at sigma .0089, hardly changes the image, so
    # last_mid is the one before it.
    "sd35": dict(
        train_steps=300, batch_size=64, resolution=512, lr=1e-4, lora_rank=32,
        num_inference_steps=25, first_mid=14, last_mid=23, reward_scale=1e-3,
    ),
    # The fewest steps that its authors recommend, at sigmas of .67 to .18; sd35 has .68 to .12.
    "z-image": dict(
        train_steps=2000, batch_size=16, resolution=512, lr=1e-4, lora_rank=16,
        num_inference_steps=28, first_mid=21, last_mid=27, reward_scale=1e-3,
    ),
    "toy": dict(
        train_steps=30, batch_size=8, resolution=64, lr=1e-3, lora_rank=8,
        num_inference_steps=20, first_mid=15, last_mid=19, reward_scale=1e-3, save_every=10,
        reward="toy_pref", prompts=f"{TOY}/prompts_train.txt",
        test_prompts=f"{TOY}/prompts_test.txt",
    ),
    # It samples in 5 steps. A gradient at the first three costs fewer correct captions than one at
    # the last two: see results/refl.md.
    "toy-flux": dict(
        train_steps=40, batch_size=8, resolution=64, lr=3e-4, lora_rank=8,
        num_inference_steps=5, first_mid=0, last_mid=2, reward_scale=1e-3, save_every=10,
        reward="toy_pref", prompts=f"{TOY}/prompts_train.txt",
        test_prompts=f"{TOY}/prompts_test.txt",
    ),
}


def parse_args(argv=None):
    parser = settings_parser(NAME, __doc__)
    add = parser.add_argument
    add("--model", default="toy", help=f"{', '.join(OURS)}, a diffusers folder or a hub id")
    add("--reward", help=f"{REWARD_HELP}; required except with toy models")
    add("--loss", choices=("linear", "hinge"), default="linear", help="minimize -r' or relu(2 - r)")
    add("--prompts", help="text file, one prompt per line; without it, COCO's captions (241 MB)")
    add("--test_prompts", help="held-out prompts; we use the first 16; without it, COCO's captions")
    add("--train_steps", type=int, help="optimizer updates")
    add("--batch_size", type=int, help="images per update")
    add("--micro_batch", type=int, default=8, help="images per gradient pass; lower to save memory")
    add("--resolution", type=int, help="pixels")
    add("--num_inference_steps", type=int, help="sampling steps, during and after training")
    add("--first_mid", type=int, help="earliest step that may carry the gradient")
    add("--last_mid", type=int, help="latest step that may carry the gradient, inclusive")
    add("--reward_scale", type=float, help="weight of the reward in the loss")
    add("--lr", type=float, help="learning rate of AdamW")
    add("--lora_rank", type=int, help="LoRA rank (alpha = rank); 0 trains the whole denoiser")
    add("--init_lora", help="start from this LoRA")
    add("--checkpointing", action="store_true", help="save memory; costs a second forward pass")
    add("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    add("--save_every", type=int, default=60, help="updates between snapshots with samples")
    add("--seed", type=int, default=0, help="the random seed")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", help=f"run folder; by default runs/{NAME}-MODEL-REWARD")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    # The row of OURS for this --model gives the defaults, and flags override them.
    parser.set_defaults(**settings_for(OURS, chosen_model(argv)))
    args = parser.parse_args(argv)
    check_ranges(args)

    # known_reward exits if there is no such reward.
    reward_name = known_reward(args.reward)
    if args.loss == "hinge" and reward_name != "imagereward":
        parser.error("--loss hinge fits only the scale of --reward imagereward")
    if not 0 <= args.first_mid <= args.last_mid < args.num_inference_steps:
        parser.error("0 <= first_mid <= last_mid < num_inference_steps must hold")
    args.out = args.out or run_name(NAME, args)
    check_out(args)
    return args


# --------------------------------------------------------------------------------------------------
# The method


def linear_loss(r, shift, scale, reward_scale):
    """-reward_scale * r', r' = (r - shift) / scale. The gradient does not fade as r (B,) grows."""
    return -reward_scale * ((r - shift) / scale).mean()


def hinge_loss(r, reward_scale):
    """reward_scale * relu(2 - r), where r (B,) is the ImageReward. Above 2 the gradient is zero."""
    return reward_scale * torch.relu(2 - r).mean()


def refl_step(model, scheduler, latents, t, cond, reward, prompts):
    """Latents (B, C, h, w) at timestep t -> rewards (B,) of the clean images predicted from them.

    The decoder clamps to [0, 1], so a saturated pixel has no gradient. To penalize noise_pred in a
    fork, return it, too, and add the penalty to the loss in the loop, where reward_scale is small.
    """
    noise_pred = denoise(model, latents, t, cond)
    x0 = predict_x0(scheduler, noise_pred, t, latents)
    return reward(decode(model, x0), prompts)


# --------------------------------------------------------------------------------------------------
# Training


def main(args):
    train_prompts = read_prompts(args.prompts)
    test_prompts = read_prompts(args.test_prompts, "val")[:16]
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution, full=args.lora_rank == 0)
    args.resolution = model.resolution  # the model's own, if none was given
    reward, reward_range = load_reward(args.reward, device)
    # Encode all prompts now and free the text encoders, unless there are too many to keep.
    encode_once(model, train_prompts + test_prompts)

    params = make_trainable(
        model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora
    )
    num_params = sum(p.numel() for p in params)
    # See difference 2 above for why eps is so small.
    optimizer = torch.optim.AdamW(
        params, lr=args.lr, betas=(0.9, 0.999), eps=1e-15, weight_decay=1e-2, fused=True
    )

    # How held-out images are sampled, and later those of combined_sample.py, which reads this from
    # config.json. A fork with guidance or DDIM must also pass guidance_scale, uncond or eta to
    # sample() and denoise() in the loop.
    sampler = dict(scheduler="ddpm", eta=1.0)
    if model.is_flow:
        sampler = dict(scheduler="euler", eta=0.0)
    sampler.update(num_inference_steps=args.num_inference_steps, guidance_scale=1.0)
    scheduler = make_scheduler(model, sampler["scheduler"], args.num_inference_steps)

    run = Run(args, model.source, sampler, NAME, PAPER)
    print_settings(args, PAPER, params)
    run.resume(params, optimizer)
    if run.start == 0:
        before = held_out(run, model, reward, test_prompts, step=0)
        print(f"held-out {args.reward} before: {describe_reward(before)}")
        print(f"  ({reward_range})")

    steps = range(run.start + 1, args.train_steps + 1)
    progress = tqdm(
        steps, initial=run.start, total=args.train_steps, desc=NAME, disable=not is_main_process()
    )
    for step in progress:
        started = time.time()

        # Draw the prompts, and the sampling step that will carry the gradient. Under torchrun, each
        # process takes its part of the images; alone, this process takes all of them.
        draw = generator(args.seed, "update", step)
        picks = torch.randint(len(train_prompts), (args.batch_size,), generator=draw)
        prompts = [train_prompts[i] for i in own_part(picks)]
        mid = torch.randint(args.first_mid, args.last_mid + 1, (), generator=draw).item()
        t_mid = scheduler.timesteps[mid]

        # Denoise pure noise up to that step, the whole batch at once and without gradients. Each
        # image has a generator of its own, by its index in the batch, which also supplies its step
        # noise. Inside `merged`, the LoRA is folded into the weights, which is faster.
        indices = own_part(range(args.batch_size))
        noise_generators = [generator(args.seed, "train", step, i) for i in indices]
        noise = initial_latents(model, noise_generators)
        cond = condition(model, prompts)
        with merged(model):
            latents = sample(model, scheduler, noise, cond, 0, mid, noise_generators)

        # Predict the clean images from there and raise their reward, one micro-batch at a time.
        # Weight each micro-batch's mean by its fraction of the batch.
        total_loss = 0.0
        rewards = []
        for i in range(0, len(prompts), args.micro_batch):
            part = slice(i, i + args.micro_batch)
            cond = condition(model, prompts[part])
            r = refl_step(model, scheduler, latents[part], t_mid, cond, reward, prompts[part])
            if args.loss == "hinge":
                loss = hinge_loss(r, args.reward_scale)
            else:
                loss = linear_loss(r, reward_range.shift, reward_range.scale, args.reward_scale)
            loss = loss * len(r) / args.batch_size
            loss.backward()
            total_loss += loss.detach()
            rewards.append(with_parts(reward, r))

        # With several processes, add up their gradients, and collect what they log. Every loss is
        # divided by the size of the whole batch, so this is a sum, and not a mean as in DDP.
        sum_gradients(params)
        total_loss = sum_processes(total_loss)
        rewards = gather(torch.cat(rewards), args.batch_size)

        # Update the weights, without clipping. Skip the update if the loss or the gradient is NaN
        # or Inf. We check both, because the gradient of clamp is zero where a pixel is NaN.
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item()
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
            grad_norm=grad_norm,
            grad_rms=grad_norm / num_params**0.5,
            mid=mid,
            skipped=None if is_finite else True,
            seconds=time.time() - started,
        )
        is_snapshot = step % args.save_every == 0 or step == args.train_steps
        if is_snapshot:
            stats.update(held_out(run, model, reward, test_prompts, step))
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
