"""DiffDoctor: diagnose an image model's artifacts, then treat it (Wang et al., arXiv 2501.12382).

`detector` trains an artifact detector C, which gives each pixel x of an image a confidence in
[0, 1] that something is wrong there. `treat` tunes the image model so that C falls on its images.

  detector:  loss = mean (C(image) - label)^2          Eq. 1, over all pixels of augmented images;
                                                       as many with pseudo as with true labels
  treat:     latents = sample(z_T, all steps but the last grad_steps)      without gradients
             latents = sample(latents, the last grad_steps)                with gradient
             loss    = pixel_loss(C(decode(latents)))  Eq. 2: the mean confidence of all pixels
                     + gamma * offline_loss            Eq. 4, on real images:
             offline_loss = mean ((noise - x0) - v)^2  Eq. 3 for flows; for SD its own loss on
                                                       the noise or on v

grad_steps is the paper's t_tr. The labels come from data/labels.py, the paper's loop of ranking
images, labeling the hard ones by hand, and letting the detector label the rest.

Differences from the paper, whose authors released only the second half:
1. Eq. 3 is a norm. Ours is the mean square over all elements, like the released code's. We draw t
   uniformly and apply the model's own shift. The release omits FLUX's shift and scale for the
   latents of real images, and gives the regularizer an optimizer step of its own.
2. Our gradient stops where the paper says. In the release the truncation never takes effect.
3. The paper recommends early stopping but gives no rule. We stop if the held-out confidence has
   not fallen for --patience evaluations, or if the images have drifted from the originals by more
   than --max_drift times the distance between different images. All snapshots are kept.
4. The paper gives no numbers for training the detector. The optimizer and the thresholds are
   ours; the strong augmentation is nearly UniMatch's (data/augment.py).
results/differences.md lists the release's other settings.

  $ python diffdoctor.py treat                       # the toy world: minutes on two CPU cores
  $ python diffdoctor.py treat --model flux-schnell --detector ad_pytorch_model.bin --gamma 0 \\
        --prompts humans_3000.txt --test_prompts humans_100.txt
  $ python diffdoctor.py detector --data labeled pseudo --real toy/images --out runs/detector

The second command needs one CUDA GPU; its three files come with the authors' release.
"""

import argparse
import math
import sys
import time
from operator import itemgetter

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from common import TOY, add_noise, decode, denoise, diffusion_target, encode, generator
from common import initial_latents, load_model, make_scheduler, make_trainable, merged
from common import pick_device, sample
from data.augment import augment
from data.images import image_batches, image_data
from data.labels import Labelled, overlay, read_labels
from data.prompts import condition, encode_once, read_prompts
from judges.detector import Detector, load_detector
from rewards import REWARD_HELP, load_reward
from run_folder import Run, SettingsHelp, check_out, check_ranges, chosen_model, gather
from run_folder import held_out_images, is_main_process, joined_processes, num_processes, own_part
from run_folder import print_settings, readable_errors, run_name, save_grid, score, settings_for
from run_folder import settings_parser, sum_gradients, sum_processes, write_atomically

NAME = "diffdoctor"  # names the run folder of `treat`; change it in a fork
PAPER = {  # treat: section 4.1, gamma from Eq. 4, and dev's 10 steps from section 4.3
    "flux-schnell": dict(lr=1e-4, lora_rank=16, num_inference_steps=5, grad_steps=1, gamma=0.25),
    "flux-dev": dict(lr=1e-4, lora_rank=16, num_inference_steps=10, grad_steps=1, gamma=0.25),
    "sd15": dict(lr=1e-4, lora_rank=16, grad_steps=1, gamma=0.0),
}
# The paper does not give resolution, guidance or SD's sampler. The released code has batches of 4.
# The paper treats SD1.5 without the regularizer; we use it there as well, with gamma 0.25.
# FLUX collapses after about 10 of the paper's epochs. An epoch of the released code is 8 updates,
# so we save FLUX every 40 updates, and the other flows, too.
OURS = {
    "sd14": dict(
        train_steps=2000, batch_size=4, resolution=512, lr=1e-4, lora_rank=16,
        scheduler="ddim", num_inference_steps=20, guidance_scale=7.5, grad_steps=1, gamma=0.25,
        save_every=100, reward="imagereward",
    ),
    "sd15": dict(
        train_steps=2000, batch_size=4, resolution=512, lr=1e-4, lora_rank=16,
        scheduler="ddim", num_inference_steps=20, guidance_scale=7.5, grad_steps=1, gamma=0.25,
        save_every=100, reward="imagereward",
    ),
    "sd21": dict(
        train_steps=2000, batch_size=4, resolution=512, lr=1e-4, lora_rank=16,
        scheduler="ddim", num_inference_steps=20, guidance_scale=7.5, grad_steps=1, gamma=0.25,
        save_every=100, reward="imagereward",
    ),
    "sdxl": dict(
        train_steps=2000, batch_size=4, resolution=512, lr=1e-4, lora_rank=16,
        scheduler="ddim", num_inference_steps=20, guidance_scale=5.0, grad_steps=1, gamma=0.25,
        save_every=100, reward="imagereward",
    ),
    "flux-schnell": dict(
        train_steps=2000, batch_size=4, resolution=512, lr=1e-4, lora_rank=16,
        scheduler="euler", num_inference_steps=5, guidance_scale=1.0, grad_steps=1, gamma=0.25,
        save_every=40, reward="imagereward",
    ),
    "flux-dev": dict(
        train_steps=2000, batch_size=4, resolution=512, lr=1e-4, lora_rank=16,
        scheduler="euler", num_inference_steps=10, guidance_scale=3.5, grad_steps=1, gamma=0.25,
        save_every=40, reward="imagereward",
    ),
    # The last step of sd35, at sigma .0089, hardly changes the image, so we use two. The other is
    # at .15, the last step of z-image at .24, and that of the paper's FLUX.1-dev at .17.
    "sd35": dict(
        train_steps=2000, batch_size=4, resolution=512, lr=1e-4, lora_rank=16,
        scheduler="euler", num_inference_steps=20, guidance_scale=4.5, grad_steps=2, gamma=0.25,
        save_every=40, reward="imagereward",
    ),
    "z-image": dict(
        train_steps=2000, batch_size=4, resolution=512, lr=1e-4, lora_rank=16,
        scheduler="euler", num_inference_steps=20, guidance_scale=5.0, grad_steps=1, gamma=0.25,
        save_every=40, reward="imagereward",
    ),
    # The last step alone hardly changes the toy model, as with the paper's SD1.5, so we use 5.
    # Without the regularizer the captions come out right more often. See results/diffdoctor.md.
    "toy": dict(
        train_steps=240, batch_size=8, resolution=64, lr=1e-3, lora_rank=8,
        scheduler="ddpm", num_inference_steps=20, guidance_scale=1.0, grad_steps=5, gamma=0.0,
        save_every=40, reward="toy_pref", detector=f"{TOY}/detector", data=f"{TOY}/images",
        prompts=f"{TOY}/prompts_train.txt", test_prompts=f"{TOY}/prompts_test.txt",
    ),
    # These settings work best on toy-flux. The paper's are grad_steps 1 and gamma 0.25.
    "toy-flux": dict(
        train_steps=240, batch_size=8, resolution=64, lr=1e-3, lora_rank=8,
        scheduler="euler", num_inference_steps=5, guidance_scale=1.0, grad_steps=5, gamma=0.0,
        save_every=40, reward="toy_pref", detector=f"{TOY}/detector", data=f"{TOY}/images",
        prompts=f"{TOY}/prompts_train.txt", test_prompts=f"{TOY}/prompts_test.txt",
    ),
}
# The settings of `detector`, by --init. All are ours, except that the paper's detector is a
# SegFormer-b5 (section 3.2) and the released one sees 512 pixels.
DETECTOR = {
    "toy": dict(train_steps=1000, batch_size=32, lr=2e-3, head_lr=2e-3, size=64),
    "mit-b5": dict(train_steps=40000, batch_size=8, lr=6e-5, head_lr=6e-4, size=512),
}
BACKBONES = {"mit-b5": "nvidia/mit-b5"}  # trained on ImageNet; its license is non-commercial
PIXELS = ("mean", "max", "threshold")
MOVED = ("score", "export_hard", "import_labels", "pseudo")


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in MOVED:
        sys.exit(f"{argv[0]} has moved: python data/labels.py {' '.join(argv)}")
    parser = settings_parser(NAME, __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    options = dict(formatter_class=SettingsHelp, allow_abbrev=False)
    treat_parser = commands.add_parser("treat", help="tune an image model", **options)
    add_treat_settings(treat_parser, argv)
    detector_parser = commands.add_parser("detector", help="train a detector", **options)
    add_detector_settings(detector_parser, argv)
    args = parser.parse_args(argv)
    check_ranges(args)

    if args.command == "treat":
        if not args.detector:
            parser.error(f"--detector is required with --model {args.model}")
        if not args.prompts:
            parser.error(f"--prompts is required with --model {args.model}")
        if not args.data and args.gamma:
            parser.error(f"--data is required with --model {args.model}; or pass --gamma 0")
        if not 1 <= args.grad_steps <= args.num_inference_steps:
            parser.error("we need 1 <= grad_steps <= num_inference_steps")
        args.out = args.out or run_name(NAME, args)
    check_out(args)
    return args


def add_treat_settings(parser, argv):
    add = parser.add_argument
    add("--model", default="toy", help=f"{', '.join(OURS)}, a diffusers folder or a hub id")
    add("--detector", help="folder, hub id, or the released ad_pytorch_model.bin")
    add("--reward", help=f"logged but not trained on: {REWARD_HELP}")
    add("--pixels", choices=PIXELS, default="mean", help="train on all, the worst, or those > 0.1")
    add("--prompts", help="text file, one prompt per line")
    add("--test_prompts", help="held-out prompts; by default the last 100 of --prompts; we use 16")
    add("--data", help="real images for the regularizer: a folder with metadata.jsonl")
    add("--train_steps", type=int, help="optimizer updates")
    add("--batch_size", type=int, help="images per update")
    add("--micro_batch", type=int, default=8, help="images per gradient pass; lower to save memory")
    add("--resolution", type=int, help="pixels")
    add("--num_inference_steps", type=int, help="sampling steps, during and after training")
    add("--guidance_scale", type=float, help="guidance scale, during and after training; 1 is none")
    add("--grad_steps", type=int, help="how many final sampling steps carry the gradient (t_tr)")
    add("--gamma", type=float, help="weight of the regularizer on real images; 0 leaves it out")
    add("--patience", type=int, default=3, help="evaluations without progress before we stop")
    add("--max_drift", type=float, default=0.5, help="drift to stop at; a different image has 1")
    add("--lr", type=float, help="learning rate of AdamW")
    add("--lora_rank", type=int, help="LoRA rank (alpha = rank); 0 trains the whole denoiser")
    add("--init_lora", help="start from this LoRA, such as DreamBooth's (section 4.3)")
    add("--checkpointing", action="store_true", help="save memory; costs a second forward pass")
    add("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    add("--save_every", type=int, help="updates between snapshots with samples")
    add("--seed", type=int, default=0, help="the random seed")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", help=f"run folder; by default runs/{NAME}-MODEL-REWARD")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.set_defaults(**settings_for(OURS, chosen_model(argv)))


def add_detector_settings(parser, argv):
    add = parser.add_argument
    add("--init", default="toy", help="toy (untrained), mit-b5, or a detector to continue from")
    add("--data", nargs="+", required=True, help="labeled folders, as data/labels.py writes them")
    add("--real", nargs="+", default=[], help="folders of photographs with metadata.jsonl")
    add("--size", type=int, help="pixels of the detector's input")
    add("--train_steps", type=int, help="optimizer updates")
    add("--batch_size", type=int, help="images per update, plus as many pseudo-labeled ones")
    add("--lr", type=float, help="initial learning rate of the backbone; it decays to 0")
    add("--head_lr", type=float, help="initial learning rate of the head; it also decays to 0")
    add("--save_every", type=int, default=500, help="updates between snapshots with metrics")
    add("--seed", type=int, default=0, help="the random seed")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", required=True, help="run folder")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")

    # We need --init before we read the other flags. A detector of your own keeps its size.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--init", default="toy")
    init = finder.parse_known_args(argv)[0].init
    parser.set_defaults(**DETECTOR.get(init, {**DETECTOR["mit-b5"], "size": None}))


# --------------------------------------------------------------------------------------------------
# The method: losses, metrics, early stopping


def detector_loss(confidence, labels):
    """Eq. 1 per pixel: confidence and labels (B, h, w) in [0, 1] -> their mean squared error."""
    return F.mse_loss(confidence, labels)


def pixel_loss(confidence, pixels):
    """L_pixel of artifact maps (B, h, w) in [0, 1].

    pixels: "mean" over all pixels (Eq. 2); "max", the worst pixel of each image (Figure 4); or
    "threshold", the mean of each image's pixels above 0.1, or 0 where there is none. That is the
    loss of the paper's later version.
    """
    if pixels == "max":
        return confidence.flatten(1).amax(1).mean()
    if pixels == "threshold":
        is_high = (confidence > 0.1).float()
        num_high = is_high.sum((1, 2)).clamp(min=1)
        return ((confidence * is_high).sum((1, 2)) / num_high).mean()
    return confidence.mean()


def offline_loss(model, scheduler, x0, noise, t, cond, guidance_scale=1.0):
    """L_offline (Eq. 3) on the latents x0 (B, C, h, w) of real images, at timesteps t (B,).

    For flows it is mean ((noise - x0) - v)^2, for SD the model's own loss on the noise or on v.
    """
    noisy_latents = add_noise(scheduler, x0, noise, t)
    prediction = denoise(model, noisy_latents, t, cond, guidance_scale)
    return F.mse_loss(prediction, diffusion_target(scheduler, x0, noise, t))


def condition_both(model, prompts, guidance_scale):
    """Prompts -> (cond, uncond). Without guidance, uncond is None, which saves time."""
    uncond = None
    if guidance_scale > 1:
        uncond = condition(model, [None] * len(prompts))
    return condition(model, prompts), uncond


def treat_step(
    model, scheduler, detector, latents, cond, uncond, generators, grad_steps, guidance_scale
):
    """Algorithm 1, lines 11 to 15: latents (B, C, h, w) -> the artifact maps (B, h, w) of images.

    The last grad_steps sampling steps run with gradients, and so do the decoder and the detector.
    """
    num_steps = len(scheduler.timesteps)
    latents = sample(
        model, scheduler, latents, cond, num_steps - grad_steps, num_steps, generators,
        guidance_scale, uncond, grad=True,
    )
    return detector(decode(model, latents))


def kl(p, q, eps=1e-6):
    """The mean over pixels of p log(p / q), in nats: labels p and confidence q in [0, 1].

    It measures misses; kl(1 - p, 1 - q), the paper's KL(1-), measures false alarms. q is clamped to
    [eps, 1 - eps], and 0 log 0 = 0.
    """
    q = q.clamp(eps, 1 - eps)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).mean()


def stop_reason(evaluations, patience, max_drift):
    """The reason to stop treating, or None.

    evaluations: dicts with test_mean, the held-out confidence, and test_drift. The first of them is
    from before training.
    """
    confidences = [evaluation["test_mean"] for evaluation in evaluations]
    drift = evaluations[-1]["test_drift"]
    # Written with `not`, so that NaN stops the run, too.
    if not drift <= max_drift:
        return f"drift {drift:.2f} is beyond --max_drift {max_drift:g}"
    if len(evaluations) > patience:
        if min(confidences[-patience:]) >= min(confidences[:-patience]):
            return f"held-out confidence has not fallen for {patience} evaluations"
    return None


# --------------------------------------------------------------------------------------------------
# Training a detector


def start_detector(init, seed, size, device):
    """The detector that training starts from, with all weights trainable.

    init: "toy", toy/detector's architecture with random weights; "mit-b5", a SegFormer with an
    encoder trained on ImageNet and a random head; or the folder or file of a detector.
    """
    if init not in DETECTOR:
        detector = load_detector(init, device)
        detector.size = size or detector.size
        return detector.requires_grad_(True)
    # transformers draws from the global generator, so we seed it here and restore it afterward.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "detector").initial_seed())
        if init == "toy":
            config = AutoConfig.from_pretrained(TOY / "detector")
            net = AutoModelForSemanticSegmentation.from_config(config, dtype=torch.float32)
        else:
            net = load_backbone(init)
    # Most pixels are fine, so the confidence starts low: sigmoid(-2) is 0.12.
    torch.nn.init.constant_(net.decode_head.classifier.bias, -2.0)
    return Detector(net, size).to(device)


def load_backbone(init):
    """A SegFormer with the encoder of BACKBONES[init]. Only the head's weights are random."""
    try:
        net, report = AutoModelForSemanticSegmentation.from_pretrained(
            BACKBONES[init],
            num_labels=1,
            decoder_hidden_size=768,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"--init {init}: {error}")
    missing = [key for key in report["missing_keys"] if not key.startswith("decode_head.")]
    if missing:
        sys.exit(f"--init {init}: {BACKBONES[init]} lacks {min(missing)}")
    return net


def indices_by_source(rows, split):
    """The indices of a split's rows, grouped by source: human, real and pseudo."""
    indices = dict(human=[], real=[], pseudo=[])
    for i, row in enumerate(rows):
        if row["split"] == split:
            indices[row["source"]].append(i)
    return indices


def draw_batch(indices, seed, step, batch_size):
    """The images of one update: batch_size with true labels, and as many with pseudo labels.

    Of the true labels, 40% (our choice) are of real photographs, if there are any, and the others
    are human. Pseudo labels are added, so that they do not take the place of true ones.
    indices: what indices_by_source returns.
    """
    num_pseudo = batch_size if indices["pseudo"] else 0
    num_real = round(0.4 * batch_size) if indices["real"] else 0
    counts = dict(human=batch_size - num_real, real=num_real, pseudo=num_pseudo)
    draw = generator(seed, "data", step)
    batch = []
    for source, count in counts.items():
        if count:
            picks = torch.randint(len(indices[source]), (count,), generator=draw)
            batch += [indices[source][i] for i in picks]
    return batch


@torch.no_grad()
def detector_metrics(detector, data, device):
    """The metrics of Table 1 on the test rows of `data` -> (stats, what to show).

    stats, in percent: mse, kl and kl1 on human labels, mse_real and kl1_real on photographs, if
    there are any. To show: the images, labels and maps of the first batch, or None.
    """
    detector.eval()
    stats = {}
    shown = None
    workers = 4 if device.type == "cuda" else 0
    indices = indices_by_source(data.rows, "test")
    for source, suffix in (("human", ""), ("real", "_real")):
        test = indices[source]
        if not test:
            continue
        parts = [test[i : i + 16] for i in range(0, len(test), 16)]
        sums = torch.zeros(3)
        for images, labels, _ in image_batches(data, parts, workers):
            p = labels[:, 0]
            q = detector(images.to(device)).cpu()
            means = torch.stack([F.mse_loss(q, p), kl(p, q), kl(1 - p, 1 - q)])
            sums += len(p) * means
            if shown is None:
                shown = (images, p, q)
        mse, misses, false_alarms = (100 * sums / len(test)).tolist()
        stats[f"mse{suffix}"] = mse
        stats[f"kl1{suffix}"] = false_alarms
        if source == "human":
            # In a photograph there is nothing to miss.
            stats["kl"] = misses
    return stats, shown


def train_detector(args):
    if num_processes() > 1:
        sys.exit("detector: batch norm must see the whole batch, so start it without torchrun")
    device = pick_device(args.device)
    rows = read_labels(args.data, args.real)
    train_indices = indices_by_source(rows, "train")
    test_indices = indices_by_source(rows, "test")
    if not train_indices["human"]:
        sys.exit(f"--data {' '.join(args.data)}: no human labels to train on")
    detector = start_detector(args.init, args.seed, args.size, device)
    args.size = detector.size
    data = Labelled(rows, detector.size)

    params = []
    backbone = dict(params=[], lr=args.lr)
    head = dict(params=[], lr=args.head_lr)
    for name, p in detector.named_parameters():
        group = head if "decode_head" in name else backbone
        group["params"].append(p)
        params.append(p)
    optimizer = torch.optim.AdamW([backbone, head], weight_decay=1e-2, fused=True)
    # A checkpoint also needs batch norm's running statistics, which are buffers.
    buffers = list(detector.buffers())
    state = params + buffers

    # The learning rate falls to 0 at train_steps, so a run cannot be made longer.
    run = Run(args, args.init, {}, f"{NAME} detector", fixed=["train_steps"])
    for name, value in vars(args).items():
        print(f"  {name:<20} {value}")
    print(f"  training {sum(p.numel() for p in params):,} parameters")
    for source in train_indices:
        num_train = len(train_indices[source])
        print(f"  {source} labels: {num_train} to train on, {len(test_indices[source])} to test")
    run.resume(state, optimizer)

    steps = range(run.start + 1, args.train_steps + 1)
    batches_of_indices = [
        draw_batch(train_indices, args.seed, step, args.batch_size) for step in steps
    ]
    workers = 4 if device.type == "cuda" else 0
    batches = image_batches(data, batches_of_indices, workers)
    progress = tqdm(steps, initial=run.start, total=args.train_steps, desc="detector")
    for step in progress:
        started = time.time()

        # Read and augment the batch. Pseudo-labeled images are augmented more strongly.
        images, labels, batch = next(batches)
        is_pseudo = [rows[i]["source"] == "pseudo" for i in batch]
        draw = generator(args.seed, "augment", step)
        images, labels = augment(images.to(device), labels.to(device), is_pseudo, draw)

        # Both learning rates follow half a cosine down to zero.
        decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / args.train_steps))
        backbone_group, head_group = optimizer.param_groups
        backbone_group["lr"] = args.lr * decay
        head_group["lr"] = args.head_lr * decay

        # The forward pass changes batch norm's statistics. We keep the old ones in case the update
        # is skipped. Dropout uses the global generator: we seed it here and restore it afterward.
        detector.train()
        old_buffers = [buffer.clone() for buffer in buffers]
        is_cuda = device.type == "cuda"
        devices = [device] if is_cuda else []
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_cuda)
        with torch.random.fork_rng(devices), autocast:
            torch.manual_seed(generator(args.seed, "dropout", step).initial_seed())
            confidence = detector(images)
        loss = detector_loss(confidence, labels[:, 0])
        loss.backward()

        # Update the weights, without clipping. Skip the update if the loss or the gradient is NaN
        # or Inf. We check both, because the gradient can be finite where the loss is not.
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item()
        is_finite = math.isfinite(grad_norm) and math.isfinite(loss.item())
        if is_finite:
            optimizer.step()
        else:
            run.skip(step)
            for buffer, old_buffer in zip(buffers, old_buffers):
                buffer.copy_(old_buffer)
        optimizer.zero_grad(set_to_none=True)

        # Log the update, with metrics and a picture of test images at every snapshot. Each row of
        # the picture has an image, its label and the detector's map.
        stats = dict(
            loss=loss.item(),
            grad_norm=grad_norm,
            lr=backbone_group["lr"],
            skipped=None if is_finite else True,
            seconds=time.time() - started,
        )
        is_snapshot = step % args.save_every == 0 or step == args.train_steps
        if is_snapshot:
            metrics, shown = detector_metrics(detector, data, device)
            stats.update(metrics)
            if shown is not None:
                images, p, q = shown
                grid = torch.stack([images, overlay(images, p), overlay(images, q)], 1)[:8]
                path = run.dir / "samples" / f"step_{step:06d}.png"
                captions = [f"test image {k + 1}" for k in range(len(grid))]
                labels = ("image", "label", "detector")
                save_grid(grid.flatten(0, 1), path, 3, captions, labels)
        run.log(step, **stats)
        progress.set_postfix(loss=f"{stats['loss']:.2e}")

        # Save the weights for the user, and a checkpoint to resume from.
        if is_snapshot:
            run.save(step, detector, state, optimizer)
            percents = [f"{name} {value:.3f}" for name, value in metrics.items()]
            tqdm.write(f"  in percent: {', '.join(percents) or 'no test images'}")

    print(f"detector: {run.weights / 'detector'}")


# --------------------------------------------------------------------------------------------------
# Treating an image model


@torch.no_grad()
def detect(detector, images, device, batch_size=16):
    """Images (N, 3, H, W) on the CPU -> artifact maps (N, h, w) on the CPU."""
    return torch.cat([detector(part.to(device)).cpu() for part in images.split(batch_size)])


def held_out_confidence(run, model, detector, reward, prompts, step, untreated=None, num_images=2):
    """Samples held-out prompts at fixed seeds -> (stats, (images (N, 3, H, W), maps (N, h, w))).

    untreated: the images and maps of the untreated model, as returned by the first call.
    stats: the mean over images of each map's mean and maximum, the drift and the reward. The drift
    is the mean pixel distance from the untreated images, divided by the mean distance between
    different untreated images. A picture in samples/ shows each image before and now with its map.
    """
    images = held_out_images(run, model, prompts, num_images)
    maps = detect(detector, images, model.device)
    if untreated is None:
        untreated = (images, maps)
    before, maps_before = untreated
    rows = [before, overlay(before, maps_before), images, overlay(images, maps)]
    grid = torch.stack(rows, 1)[:16]
    prompt_per_image = [prompt for prompt in prompts for _ in range(num_images)]
    path = run.dir / "samples" / f"step_{step:06d}.png"
    labels = ("before", "its artifacts", "now", "its artifacts")
    save_grid(grid.flatten(0, 1), path, 8, prompt_per_image[: len(grid)], labels)

    drift = (images - before).abs().mean()
    distance = (before - before.roll(1, 0)).abs().mean().clamp(min=1e-3)
    r = score(reward, images.to(model.device), prompt_per_image)
    stats = dict(
        test_mean=maps.mean().item(),
        test_max=maps.flatten(1).amax(1).mean().item(),
        test_drift=(drift / distance).item(),
        test_reward=r.mean().item(),
    )
    return stats, (images, maps)


def describe(stats, reward_name):
    """One line about an evaluation, for the terminal."""
    mean_and_max = f"mean {stats['test_mean']:.2%}, max {stats['test_max']:.2%}"
    return f"{mean_and_max}; {reward_name} {stats['test_reward']:.4f}"


def treat(args):
    train_prompts = read_prompts(args.prompts)
    if args.test_prompts:
        test_prompts = read_prompts(args.test_prompts)
    elif len(train_prompts) > 100:
        test_prompts = train_prompts[-100:]
        train_prompts = train_prompts[:-100]
    else:
        sys.exit(f"--prompts {args.prompts}: too few to hold out the last 100; pass --test_prompts")
    all_test_prompts = test_prompts
    test_prompts = test_prompts[:16]
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution, full=args.lora_rank == 0)
    args.resolution = model.resolution
    detector = load_detector(args.detector, device)
    reward, _ = load_reward(args.reward, device)
    captions = []
    if args.gamma:
        data = image_data(args.data, args.resolution)
        captions = data.captions
    encode_once(model, train_prompts + test_prompts + captions)

    params = make_trainable(
        model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora
    )
    num_params = sum(p.numel() for p in params)
    # See difference 2 in refl.py for why eps is so small.
    optimizer = torch.optim.AdamW(
        params, lr=args.lr, betas=(0.9, 0.999), eps=1e-15, weight_decay=1e-2, fused=True
    )

    eta = 1.0 if args.scheduler == "ddpm" else 0.0
    sampler = dict(scheduler=args.scheduler, eta=eta)
    sampler.update(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    scheduler = make_scheduler(model, sampler["scheduler"], args.num_inference_steps)
    # The regularizer's timesteps are uniform. For flows they go through the model's own shift.
    timesteps = torch.arange(1000)
    if model.is_flow:
        timesteps = make_scheduler(model, "euler", 1000).timesteps

    # --patience counts evaluations, and there is one every save_every updates.
    run = Run(args, model.source, sampler, f"{NAME} treat", PAPER, fixed=["save_every"])
    # For combined_sample.py --prompts: also those that we do not use here.
    write_atomically(run.dir / "test_prompts.txt", "\n".join(all_test_prompts) + "\n")
    print_settings(args, PAPER, params)
    # Drift is measured from the untreated model, so a checkpoint must not be loaded yet.
    first, untreated = held_out_confidence(run, model, detector, reward, test_prompts, step=0)
    run.note_before(**first)
    print(f"held-out artifact confidence before: {describe(first, args.reward)}")
    if first["test_max"] < 0.1:
        print("  The detector sees next to nothing in these images, so there is little to learn.")
        print("  Was it trained on images like these?")
    run.resume(params, optimizer)
    evaluations = [first] + [row for row in run.read_log() if "test_mean" in row]

    steps = range(run.start + 1, args.train_steps + 1)
    if args.gamma:
        indices = []
        for step in steps:
            draw = generator(args.seed, "data", step)
            picks = torch.randint(len(data), (args.batch_size,), generator=draw)
            indices.append(own_part(picks.tolist()))
        workers = 4 if device.type == "cuda" else 0
        batches = image_batches(data, indices, workers)
    is_quiet = not is_main_process()
    progress = tqdm(
        steps, initial=run.start, total=args.train_steps, desc="treat", disable=is_quiet
    )
    for step in progress:
        started = time.time()

        # Stop early, once the evaluations say so.
        if stop_reason(evaluations, args.patience, args.max_drift):
            break

        # Draw the prompts. Under torchrun, each process takes its part of the images; alone, this
        # process takes all of them.
        draw = generator(args.seed, "update", step)
        picks = torch.randint(len(train_prompts), (args.batch_size,), generator=draw)
        prompts = [train_prompts[i] for i in own_part(picks)]

        # Denoise pure noise up to the steps that carry the gradient, the whole batch at once.
        indices = own_part(range(args.batch_size))
        noise_generators = [generator(args.seed, "train", step, i) for i in indices]
        noise = initial_latents(model, noise_generators)
        cond, uncond = condition_both(model, prompts, args.guidance_scale)
        num_prefix_steps = args.num_inference_steps - args.grad_steps
        with merged(model):
            latents = sample(
                model, scheduler, noise, cond, 0, num_prefix_steps, noise_generators,
                args.guidance_scale, uncond,
            )

        # For the regularizer, encode real images and draw noise and a timestep for each.
        if args.gamma:
            images, captions = next(batches)
            x0 = encode(model, images, args.micro_batch)
            draws = [generator(args.seed, "offline", step, i) for i in indices]
            real_noise = initial_latents(model, draws)
            t_indices = [torch.randint(1000, (), generator=draw) for draw in draws]
            t = timesteps[torch.stack(t_indices)].to(device)

        # Do the last steps with gradients and lower the confidence, one micro-batch at a time.
        # Weight each micro-batch's mean by its fraction of the batch.
        total_loss = 0.0
        maps = []
        total_offline_loss = torch.zeros((), device=device)
        for i in range(0, len(prompts), args.micro_batch):
            part = slice(i, i + args.micro_batch)
            cond, uncond = condition_both(model, prompts[part], args.guidance_scale)
            confidence = treat_step(
                model, scheduler, detector, latents[part], cond, uncond, noise_generators[part],
                args.grad_steps, args.guidance_scale,
            )
            loss = pixel_loss(confidence, args.pixels)
            loss = loss * len(confidence) / args.batch_size
            loss.backward()
            total_loss += loss.detach()
            maps.append(confidence.detach())

            # The regularizer (Eq. 4) has its own backward pass, which saves memory.
            if args.gamma:
                cond = condition(model, captions[part])
                guidance_scale = args.guidance_scale if model.takes_guidance else 1.0
                offline = offline_loss(
                    model, scheduler, x0[part], real_noise[part], t[part], cond, guidance_scale
                )
                loss = args.gamma * offline * len(confidence) / args.batch_size
                loss.backward()
                total_loss += loss.detach()
                total_offline_loss += offline.detach() * len(confidence) / args.batch_size

        # With several processes, add up their gradients, and collect what they log. Every loss is
        # divided by the size of the whole batch, so this is a sum, and not a mean as in DDP.
        sum_gradients(params)
        total_loss = sum_processes(total_loss)
        total_offline_loss = sum_processes(total_offline_loss)
        maps = gather(torch.cat(maps), args.batch_size)

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
            mean=maps.mean().item(),
            max=maps.flatten(1).amax(1).mean().item(),
            grad_norm=grad_norm,
            grad_rms=grad_norm / num_params**0.5,
            offline=total_offline_loss.item() if args.gamma else None,
            skipped=None if is_finite else True,
            seconds=time.time() - started,
        )
        is_snapshot = step % args.save_every == 0 or step == args.train_steps
        if is_snapshot:
            evaluation, _ = held_out_confidence(
                run, model, detector, reward, test_prompts, step, untreated
            )
            stats.update(evaluation)
        run.log(step, **stats)
        progress.set_postfix(loss=f"{stats['loss']:.2e}", mean=f"{stats['mean']:.2%}")

        # Save the weights for the user, and a checkpoint to resume from. The evaluation is read
        # back from the log, rounded, so that a resumed run stops at the same update.
        if is_snapshot:
            run.save(step, model, params, optimizer)
            evaluations.append(run.read_log()[-1])
    progress.close()

    reason = stop_reason(evaluations, args.patience, args.max_drift) or "all updates are done"
    print(f"stopped: {reason}. Before and after: {run.dir / 'index.html'}")
    candidates = [row for row in evaluations[1:] if row["test_drift"] <= args.max_drift]
    if candidates:
        best = min(candidates, key=itemgetter("test_mean"))
        print(f"held-out artifact confidence after:  {describe(best, args.reward)}")
        snapshot = run.weights / f"step_{best['step']:06d}"
        print(f"  with a drift of {best['test_drift']:.2f}; the best snapshot: {snapshot}")


def main(args):
    if args.command == "treat":
        treat(args)
    else:
        train_detector(args)


if __name__ == "__main__":
    args = parse_args()
    with readable_errors(args), joined_processes(args):
        main(args)
