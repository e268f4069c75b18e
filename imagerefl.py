"""ImageReFL: ReFL that starts from real images (Sorokin et al. 2025, arXiv 2505.22569).

We noise a real image to t', denoise it without gradients up to a random late step, and from there
predict the clean image in one step with gradients, to raise its reward. The layout comes from the
real image, so the reward cannot make layouts less diverse.

  x_t'    = add_noise(encode(image), noise, t')           t' is the timestep of step `start`
  mid     ~ {first_mid .. last_mid}                       drawn once per update
  latents = sample(x_t', steps start .. mid - 1)          no gradient, no guidance
  x0      = predict_x0(denoise(latents, t_mid), t_mid)    as in refl.py
  r       = reward(decode(x0), prompt)                    image and prompt are a pair of --data
  mse     = mean((denoise(x_t', t') - target)^2)          the diffusion loss on that image, Eq. 5
  loss    = -reward_scale * r' + diffusion_weight * mse   section 4; r' = (r - shift) / scale

Every refl_every-th update is a classic ReFL step: it takes steps 0 .. mid - 1 from x_T, and has no
mse term.

Differences from the paper's code:
1. If mid == start, there is nothing to denoise. The released code takes a step anyway, so its
   model sees latents at the wrong noise level.
2. Every fourth update is a ReFL step, as in the paper. The released code counts micro-batches, and
   its published configuration has no ReFL steps. There, a ReFL step has a diffusion loss at t_mid.
3. We draw mid once per update, set Adam's eps to 1e-15, and take one optimizer step per update. See
   differences 1 to 3 in refl.py. The released configuration has Adam, and the paper AdamW.
4. We resize and crop images, and encode them to the posterior's mean. The released code squashes
   them into a square and draws a sample.
5. We train a LoRA by default; --lora_rank 0 fine-tunes the whole denoiser, as the paper does.
6. The diffusion loss is in units of the model's output. If the model predicts v, the error of the
   noise is alpha_bar(t') times that of v, so our diffusion_weight acts like one of
   diffusion_weight / alpha_bar(t') in Eq. 5, which is 1.3 times as much on the toy world.
7. The paper does not cover flow models, such as FLUX. There, x_t' = (1 - sigma) x0 + sigma noise,
   the target is noise - x0, and sampling takes Euler steps. The squared error of the noise is
   (1 - sigma)^2 times that of the target, so our diffusion_weight acts like one of
   diffusion_weight / (1 - sigma)^2 in Eq. 5, which is 2.8 times as much on toy-flux.
The tuned model is meant to take over from the base model for the last steps: see
combined_sample.py --mode combined. The held-out reward and the samples come from the tuned model
alone, in all steps.

  $ python imagerefl.py                                   # the toy world: a minute on two CPU cores
  $ python imagerefl.py --model sdxl --reward hps         # one CUDA GPU; COCO's images and captions
  $ python combined_sample.py --lora runs/imagerefl-toy-toy_pref --mode combined --base_steps 15 \\
        --out images
"""

import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import TOY, add_noise, decode, denoise, diffusion_target, encode, generator
from common import initial_latents, load_model, make_scheduler, make_trainable, merged
from common import pick_device, predict_x0, sample
from data.images import image_batches, image_data
from data.prompts import condition, encode_once, read_prompts
from rewards import REWARD_HELP, known_reward, load_reward
from run_folder import Run, check_out, check_ranges, chosen_model, describe_reward, gather, held_out
from run_folder import is_main_process, joined_processes, own_part, print_settings, readable_errors
from run_folder import reward_means, run_name, settings_for, settings_parser, sum_gradients
from run_folder import sum_processes, with_parts

NAME = "imagerefl"  # names the run folder and the progress bar; change it in a fork
# From section 5; start and mid are from the code. The paper's 40 "epochs" are 4000 updates if one
# has 100 updates, as in the code's ReFL. The code's ImageReFL has 20 of 200. lora_rank 0, which is
# full fine-tuning, and its learning rate are the paper's. Besides OURS, only the printed settings
# and the run's page read PAPER. They show where we depart from it.
PAPER = {
    "sd15": dict(
        train_steps=4000, batch_size=32, resolution=512, lr=3e-4, lora_rank=0,
        num_inference_steps=40, start=30, first_mid=30, last_mid=39, reward_scale=1e-3,
        diffusion_weight=1e-5, refl_every=4,
    ),
    "sdxl": dict(
        train_steps=4000, batch_size=16, resolution=512, lr=3e-4, lora_rank=0,
        num_inference_steps=40, start=30, first_mid=30, last_mid=39, reward_scale=1e-3,
        diffusion_weight=1e-5, refl_every=4,
    ),
}
# What we change, and the models that the paper does not cover. On flows, images start at the step
# whose sigma is closest to .39, where the noise-to-signal ratio is .63, as at the paper's t' of
# 226. Otherwise, large models take refl.py's values, with twice its updates as in the paper.
OURS = {
    "sd14": {**PAPER["sd15"], "lora_rank": 32},
    "sd15": {**PAPER["sd15"], "lora_rank": 32},
    "sd21": {**PAPER["sd15"], "lora_rank": 32},
    "sdxl": {**PAPER["sdxl"], "lora_rank": 32},
    "flux-schnell": dict(  # starts at sigma .5; the next step is at .25
        train_steps=4000, batch_size=16, resolution=512, lr=1e-4, lora_rank=16,
        num_inference_steps=4, start=2, first_mid=2, last_mid=3, reward_scale=1e-3,
        diffusion_weight=1e-5, refl_every=4,
    ),
    "flux-dev": dict(  # starts at sigma .39
        train_steps=4000, batch_size=16, resolution=512, lr=1e-4, lora_rank=16,
        num_inference_steps=28, start=21, first_mid=21, last_mid=27, reward_scale=1e-3,
        diffusion_weight=1e-5, refl_every=4,
    ),
    "sd35": dict(  # starts at sigma .38; step 24, at .0089, hardly changes the image
        train_steps=600, batch_size=64, resolution=512, lr=1e-4, lora_rank=32,
        num_inference_steps=25, start=20, first_mid=20, last_mid=23, reward_scale=1e-3,
        diffusion_weight=1e-5, refl_every=4,
    ),
    "z-image": dict(  # starts at sigma .42
        train_steps=4000, batch_size=16, resolution=512, lr=1e-4, lora_rank=16,
        num_inference_steps=28, start=25, first_mid=25, last_mid=27, reward_scale=1e-3,
        diffusion_weight=1e-5, refl_every=4,
    ),
    "toy": dict(
        train_steps=30, batch_size=8, resolution=64, lr=1e-3, lora_rank=8,
        num_inference_steps=20, start=15, first_mid=15, last_mid=19, reward_scale=1e-3,
        diffusion_weight=1e-5, refl_every=4, save_every=10,
        reward="toy_pref", data=f"{TOY}/images", test_prompts=f"{TOY}/prompts_test.txt",
    ),
    "toy-flux": dict(  # starts at sigma .4
        train_steps=40, batch_size=8, resolution=64, lr=3e-4, lora_rank=8,
        num_inference_steps=5, start=3, first_mid=3, last_mid=4, reward_scale=1e-3,
        diffusion_weight=1e-5, refl_every=4, save_every=10,
        reward="toy_pref", data=f"{TOY}/images", test_prompts=f"{TOY}/prompts_test.txt",
    ),
}


def parse_args(argv=None):
    parser = settings_parser(NAME, __doc__)
    add = parser.add_argument
    add("--model", default="toy", help=f"{', '.join(OURS)}, a diffusers folder or a hub id")
    add("--reward", help=f"{REWARD_HELP}; required except with toy models")
    add("--data", help="image folder with metadata.jsonl; without it, COCO, fetched as needed")
    add("--prompts", help="prompts for the ReFL steps, one per line; without it, --data's captions")
    add("--test_prompts", help="held-out prompts; we use the first 16; without it, COCO's captions."
        " data/hpdv2.py fetches the paper's 400 test prompts")
    add("--train_steps", type=int, help="optimizer updates")
    add("--batch_size", type=int, help="images per update")
    add("--micro_batch", type=int, default=8, help="images per gradient pass; lower to save memory")
    add("--resolution", type=int, help="pixels")
    add("--num_inference_steps", type=int, help="sampling steps, during and after training")
    add("--start", type=int, help="real images are noised to t', the timestep of this step")
    add("--first_mid", type=int, help="earliest step that may carry the gradient")
    add("--last_mid", type=int, help="latest step that may carry the gradient, inclusive")
    add("--reward_scale", type=float, help="weight of the reward in the loss")
    add("--diffusion_weight", type=float, help="weight of the diffusion loss; 0 leaves it out")
    add("--refl_every", type=int, help="every Nth update is a classic ReFL step; 0 means never")
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

    # The toy world has more training prompts than its images have captions.
    if args.prompts is None and args.data == f"{TOY}/images":
        args.prompts = f"{TOY}/prompts_train.txt"
    # known_reward exits if there is no such reward.
    known_reward(args.reward)
    if not 0 <= args.start <= args.first_mid <= args.last_mid < args.num_inference_steps:
        parser.error("0 <= start <= first_mid <= last_mid < num_inference_steps must hold")
    args.out = args.out or run_name(NAME, args)
    check_out(args)
    return args


# --------------------------------------------------------------------------------------------------
# The method


def linear_loss(r, shift, scale, reward_scale):
    """-reward_scale * r', r' = (r - shift) / scale. The gradient does not fade as r (B,) grows."""
    return -reward_scale * ((r - shift) / scale).mean()


def diffusion_loss(noise_pred, target):
    """Eq. 5, but a mean over (B, C, h, w). The target is the noise, or v, of the latents at t'."""
    return F.mse_loss(noise_pred, target)


def refl_step(model, scheduler, latents, t, cond, reward, prompts):
    """Latents (B, C, h, w) at timestep t -> rewards (B,) of the clean images predicted from them.

    The decoder clamps to [0, 1], so a saturated pixel has no gradient. To penalize noise_pred in a
    fork, return it, too, and add the penalty to the loss in the loop, where reward_scale is small.
    """
    noise_pred = denoise(model, latents, t, cond)
    x0 = predict_x0(scheduler, noise_pred, t, latents)
    return reward(decode(model, x0), prompts)


def is_refl_update(step, refl_every):
    """Section 4: with refl_every 4, one classic ReFL step follows three updates on real images."""
    return refl_every > 0 and step % refl_every == 0


# --------------------------------------------------------------------------------------------------
# Training


def main(args):
    test_prompts = read_prompts(args.test_prompts, "val")[:16]
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution, full=args.lora_rank == 0)
    args.resolution = model.resolution  # the model's own, if none was given
    data = image_data(args.data, args.resolution)
    train_prompts = read_prompts(args.prompts) if args.prompts else data.captions
    reward, reward_range = load_reward(args.reward, device)
    # Encode all prompts now and free the text encoders, unless there are too many to keep.
    encode_once(model, data.captions + train_prompts + test_prompts)

    params = make_trainable(
        model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora
    )
    num_params = sum(p.numel() for p in params)
    # See difference 2 in refl.py for why eps is so small.
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
    t_start = scheduler.timesteps[args.start]  # t'

    run = Run(args, model.source, sampler, NAME, PAPER)
    print_settings(args, PAPER, params)
    run.resume(params, optimizer)
    if run.start == 0:
        before = held_out(run, model, reward, test_prompts, step=0)
        print(f"held-out {args.reward} before: {describe_reward(before)}")
        print(f"  ({reward_range})")

    # Draw the images for all remaining updates now, so that the data loader can read ahead.
    steps = range(run.start + 1, args.train_steps + 1)
    picks_of_images = []
    for step in steps:
        if not is_refl_update(step, args.refl_every):
            draw = generator(args.seed, "data", step)
            picks = torch.randint(len(data), (args.batch_size,), generator=draw)
            picks_of_images.append(own_part(picks.tolist()))
    num_workers = 4 if device.type == "cuda" else 0
    batches = image_batches(data, picks_of_images, num_workers)

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

        indices = own_part(range(args.batch_size))
        noise_generators = [generator(args.seed, "train", step, i) for i in indices]
        noise = initial_latents(model, noise_generators)
        from_images = not is_refl_update(step, args.refl_every)
        if from_images:
            # Noise real images to t'. Their captions replace the drawn prompts.
            images, prompts = next(batches)
            image_latents = encode(model, images, args.micro_batch)
            noisy_latents = add_noise(scheduler, image_latents, noise, t_start)
            target = diffusion_target(scheduler, image_latents, noise, t_start)
            start = noisy_latents
            start_step = args.start
        else:
            # A classic ReFL step starts from pure noise.
            start = noise
            start_step = 0

        # Denoise up to step mid, the whole batch at once and without gradients. Each image
        # has a generator of its own, by its index in the batch, which also supplies its step noise.
        # Inside `merged`, the LoRA is folded into the weights, which is faster.
        cond = condition(model, prompts)
        with merged(model):
            latents = sample(model, scheduler, start, cond, start_step, mid, noise_generators)

        # Predict the clean images from there and raise their reward, one micro-batch at a time.
        # Weight each micro-batch's mean by its fraction of the batch.
        total_loss = 0.0
        rewards = []
        weighted_mses = []
        for i in range(0, len(prompts), args.micro_batch):
            part = slice(i, i + args.micro_batch)
            cond = condition(model, prompts[part])
            r = refl_step(model, scheduler, latents[part], t_mid, cond, reward, prompts[part])
            loss = linear_loss(r, reward_range.shift, reward_range.scale, args.reward_scale)
            loss = loss * len(r) / args.batch_size
            loss.backward()
            total_loss += loss.detach()
            rewards.append(with_parts(reward, r))

            # The diffusion loss gets its own backward pass, so memory holds one graph at a time.
            if from_images and args.diffusion_weight:
                noise_pred = denoise(model, noisy_latents[part], t_start, cond)
                mse = diffusion_loss(noise_pred, target[part])
                loss = args.diffusion_weight * mse * len(r) / args.batch_size
                loss.backward()
                total_loss += loss.detach()
                weighted_mses.append(mse.detach() * len(r))

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
        if weighted_mses:
            stats["mse"] = sum_processes(torch.stack(weighted_mses).sum()).item() / args.batch_size
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
