"""DiffDoctor: diagnose where images are wrong, then treat the model that made them (Wang et al. 2024, arXiv 2412.12382 v1).

Diagnose: a detector C(x) in [0, 1]^(h x w), the confidence per pixel that something is wrong there, trained on labels that a person can afford:

  loss = mean (C(augment(x)) - augment(label))^2            Eq. 1, half of a batch true labels, half pseudo labels (the detector's own)
  score -> categories with abnormally high confidence -> export_hard -> a person and an image editor -> import_labels; pseudo labels the rest

Treat: sample the whole way, look at the image through the frozen detector, and lower the confidence of every pixel:

  latents = sample(z_T, steps 0 .. N - grad_steps - 1)      no gradient
  latents = sample(latents, the last grad_steps)            with gradient
  loss    = pixel_loss(C(decode(latents)))                  Eq. 2: the mean over all pixels; --pixels max: Figure 4; threshold: the later version's
            + gamma * offline_loss(real image)              Eqs. 3, 4: (noise - x0 - v)^2 for flows, the model's own diffusion loss for SD

Differences from the paper and its released code, which has the second half only:
1. Eq. 3 is a norm; ours is the mean square over elements, t uniform through the model's shift. The release leaves real latents unshifted.
2. The gradient stops where the paper says; the release's truncation never fires.
3. Early stopping is the paper's advice without a rule. Ours: held-out confidence has not fallen for --patience evaluations, or the images are
   further from their first version than --max_drift times the distance between two different images. Every snapshot is kept.
4. The paper gives no numbers for the detector's training: optimizer and thresholds are ours, the strong augmentation UniMatch's.

  $ python diffdoctor.py treat                                                                    # the toy world, minutes on two CPU cores
  $ python diffdoctor.py treat --model flux-schnell --detector ad_pytorch_model.bin --prompts prompts.txt --gamma 0
  $ python diffdoctor.py score --detector toy/detector --images images/base --out scores
  $ python diffdoctor.py export_hard --detector toy/detector --images images/base --scores scores --out hard    # edit hard/maps, then
  $ python diffdoctor.py import_labels --labels hard --out labelled
  $ python diffdoctor.py pseudo --detector toy/detector --images images/base --exclude hard --out pseudo
  $ python diffdoctor.py detector --data labelled pseudo --real toy/images --out runs/detector
"""
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from common import (MODELS, REWARDS, TOY, TOY_MODELS, Detector, Parser, Run, check_out, condition, decode, denoise, die, diffusion_target, encode, encode_once,
                    generate, generator, initial_latents, launch, load_detector, load_model, load_reward, make_scheduler, merged, pick_device,
                    print_settings, read_prompts, row_of, sample, save_grid, to_pil, trainable)
from prompts.coco import image_batches, image_data, to_tensor

PAPER = {  # section 4.1; gamma: Eq. 4; dev's 10 steps: section 4.3. Its SD1.5 was treated without the regulariser
    "flux-schnell": dict(lr=1e-4, lora_rank=16, num_inference_steps=5, grad_steps=1, gamma=.25),
    "flux-dev": dict(lr=1e-4, lora_rank=16, num_inference_steps=10, grad_steps=1, gamma=.25),
    "sd15": dict(lr=1e-4, lora_rank=16, grad_steps=1),
}
FREE = dict(train_steps=2000, batch_size=4, save_every=100, gamma=.25, reward="imagereward")               # ours; batch 4: the release's
OURS = {   # what the paper leaves open: resolution, guidance, SD's sampler; and the rows that it does not have
    "flux-schnell": dict(PAPER["flux-schnell"], **FREE | dict(scheduler="euler", guidance_scale=1., resolution=512)),
    "flux-dev": dict(PAPER["flux-dev"], **FREE | dict(scheduler="euler", guidance_scale=3.5, resolution=512)),
    **dict.fromkeys(("sd14", "sd15", "sd21"),
                    dict(PAPER["sd15"], **FREE, scheduler="ddim", num_inference_steps=20, guidance_scale=7.5, resolution=512)),
    "sdxl": dict(PAPER["sd15"], **FREE, scheduler="ddim", num_inference_steps=20, guidance_scale=5., resolution=512),
    "toy": dict(train_steps=60, batch_size=8, save_every=20, gamma=.25, reward=None, lr=1e-3, lora_rank=8, scheduler="ddpm", num_inference_steps=20,
                guidance_scale=1., grad_steps=5, resolution=64),              # the last step alone moves it little, as the paper's SD1.5 (README)
    "toy-flux": dict(train_steps=240, batch_size=8, save_every=40, gamma=0., reward=None, lr=1e-3, lora_rank=8, scheduler="euler", num_inference_steps=5,
                     guidance_scale=1., grad_steps=5, resolution=64),             # where it works best (README); the paper has 1 and gamma .25
}
DETECTOR = {  # ours, but for SegFormer-b5 (section 3.2) at 512 pixels (the release)
    "toy": dict(train_steps=1000, batch_size=32, lr=2e-3, head_lr=2e-3, size=64),
    "mit-b5": dict(train_steps=40000, batch_size=16, lr=6e-5, head_lr=6e-4, size=512),
}
BACKBONE = {"mit-b5": "nvidia/mit-b5"}                                    # ImageNet weights; their licence is not commercial
COMMANDS = dict(detector="train a detector on images and maps", score="rank a folder's images and categories by the detector's confidence",
                export_hard="images of hard categories, with overlays and maps to edit", import_labels="take edited maps as true labels",
                pseudo="label images by the detector", treat="tune a diffusion model against a detector")


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS, help="; ".join(f"{name}: {what}" for name, what in COMMANDS.items()))
    command = argv[0] if argv and argv[0] in COMMANDS else None
    if command == "treat":
        return parse_treat(parser, argv)
    if command == "detector":
        parser.add_argument("--init", default="toy", help="toy: toy/detector's architecture, untrained; mit-b5: SegFormer-b5 on ImageNet's weights "
                            "(nvidia/mit-b5, not for commercial use); else a detector's folder or file to go on from")
        start = [a for a in argv if a not in ("-h", "--help")]
        row = DETECTOR.get(parser.parse_known_args(start)[0].init, dict(DETECTOR["mit-b5"], size=None))
        parser.add_argument("--data", nargs="+", required=True, help="labelled folders: images/, maps/ (grey: the confidence), meta.jsonl")
        parser.add_argument("--real", nargs="+", default=[], help="folders of photographs with metadata.jsonl: nothing is wrong in them")
        parser.add_argument("--size", type=int, default=row["size"], help="pixels of the detector's input (those of --init)")
        parser.add_argument("--train_steps", type=int, default=row["train_steps"], help="optimizer updates")
        parser.add_argument("--batch_size", type=int, default=row["batch_size"], help="images per update, half of them pseudo-labelled")
        parser.add_argument("--lr", type=float, default=row["lr"], help="learning rate of the backbone, falling as a cosine")
        parser.add_argument("--head_lr", type=float, default=row["head_lr"], help="that of the head")
        parser.add_argument("--save_every", type=int, default=500, help="updates between snapshots, each with metrics")
        parser.add_argument("--seed", type=int, default=0, help="of every random draw")
        parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where its last checkpoint stands")
        parser.set_defaults(lora_rank=0)                                  # a run folder of full weights
    if command in ("score", "export_hard", "pseudo"):
        parser.add_argument("--detector", required=True, help="folder or hub id in transformers' format, or the released file ad_pytorch_model.bin")
        parser.add_argument("--images", required=True, help="folder with metadata.jsonl: file_name, text and, for score, category")
    if command == "export_hard":
        parser.add_argument("--scores", required=True, help="what score wrote about the same images")
        parser.add_argument("--categories", nargs="+", help="instead of those that score found abnormal")
        parser.add_argument("--threshold", type=float, default=.5, help="hard: the maximum confidence is at least this")          # ours
        parser.add_argument("--max_images", type=int, default=2000, help="the first so many, by mean confidence")
    if command == "import_labels":
        parser.add_argument("--labels", required=True, help="folder of export_hard with edited maps; images that you deleted from it are left out")
        parser.add_argument("--split", choices=("train", "test"), default="train", help="test: for the metrics only")
    if command == "pseudo":
        parser.add_argument("--exclude", nargs="+", default=[], help="labelled folders and folders of export_hard, whose images are left out")
    if command:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
        parser.add_argument("--out", required=True, help="run folder" if command == "detector" else "folder to write")
    args = parser.parse_args(argv)
    for name, low, high in (("train_steps", 1, math.inf), ("batch_size", 1, math.inf), ("save_every", 1, math.inf), ("max_images", 1, math.inf),
                            ("size", 1, math.inf), ("threshold", 0, 1), ("lr", 0, 1), ("head_lr", 0, 1)):
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} {value:g}: at least 1" if high > 1 else f"--{name} {value:g}: 0 to 1")
    out = Path(args.out)
    if command == "detector":
        check_out(args)
    if command not in ("detector", "import_labels") and out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        parser.error(f"--out {out} exists and is not an empty folder: choose another one, or delete it")
    return args


def parse_treat(parser, argv):
    parser.add_argument("--model", default="toy", help=f"{', '.join(MODELS)}; or a diffusers folder or hub id (id@revision)")
    row = parser.settings(argv, OURS)
    parser.add_argument("--detector", help="folder or hub id in transformers' format, or the released file ad_pytorch_model.bin (toy/detector on toy)")
    parser.add_argument("--reward", default=row["reward"], help=f"reported beside the confidence, not trained on: {', '.join(REWARDS)}; name:PATH")
    parser.add_argument("--prompts", help="text file, a prompt per line (toy/prompts_train.txt on toy)")
    parser.add_argument("--test_prompts", help="held-out prompts, the first 16 (toy/prompts_test.txt on toy; else the last 100 of --prompts)")
    parser.add_argument("--data", help="real images of the regulariser, with metadata.jsonl (toy/images on toy)")
    parser.add_argument("--pixels", choices=("mean", "max", "threshold"), default="mean", help="which are lowered: all, the worst, those above .1")
    parser.add_argument("--grad_steps", type=int, default=row["grad_steps"], help="the last so many sampling steps carry the gradient (t_tr)")
    parser.add_argument("--gamma", type=float, default=row["gamma"], help="weight of the diffusion loss on real images; 0 leaves it out")
    parser.add_argument("--patience", type=int, default=3, help="stop if held-out confidence has not fallen for so many evaluations")   # ours
    parser.add_argument("--max_drift", type=float, default=.5, help="stop beyond this drift; 1: as far as another image")                   # ours
    parser.add_argument("--train_steps", type=int, default=row["train_steps"], help="optimizer updates")
    parser.add_argument("--batch_size", type=int, default=row["batch_size"], help="images per update")
    parser.add_argument("--micro_batch", type=int, default=8, help="images per gradient pass; the prefix runs on the whole batch")
    parser.add_argument("--resolution", type=int, default=row["resolution"], help="pixels")
    parser.add_argument("--num_inference_steps", type=int, default=row["num_inference_steps"], help="sampling steps, in training and after")
    parser.add_argument("--guidance_scale", type=float, default=row["guidance_scale"], help="in training and after; 1 is without")
    parser.add_argument("--lr", type=float, default=row["lr"], help="learning rate of AdamW")
    parser.add_argument("--lora_rank", type=int, default=row["lora_rank"], help="LoRA rank (alpha = rank); 0 trains the full U-Net")
    parser.add_argument("--init_lora", help="start from this LoRA: DreamBooth's, to be treated (section 4.3)")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, for another forward call in the gradient step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser's blocks")
    parser.add_argument("--save_every", type=int, default=row["save_every"], help="updates between snapshots, each with overlays and metrics")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", help="run folder (runs/diffdoctor-MODEL-REWARD)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where its last checkpoint stands")
    args = parser.finish(argv, "diffdoctor")
    args.detector = args.detector or (str(TOY / "detector") if args.model in TOY_MODELS else None)
    for name, hint in (("detector", ""), ("prompts", ""), ("data", "; or --gamma 0, without the regulariser")):
        if getattr(args, name) is None and (args.gamma or name != "data"):
            parser.error(f"--{name} is needed with --model {args.model}{hint}")
    if not 1 <= args.grad_steps <= args.num_inference_steps:
        parser.error(f"--grad_steps {args.grad_steps}: 1 to num_inference_steps = {args.num_inference_steps}")
    if not 0 <= args.gamma < math.inf or args.patience < 1 or not args.max_drift > 0 or not 1 <= args.guidance_scale < math.inf:
        parser.error(f"--gamma {args.gamma:g} --patience {args.patience} --max_drift {args.max_drift:g} --guidance_scale {args.guidance_scale:g}: "
                     "gamma is 0 or more, patience at least 1, max_drift above 0, guidance at least 1")
    args.scheduler = row["scheduler"]
    return args


# ------------------------------------------------------------------------------------------------------------------------------------
# the losses


def pixel_loss(confidence, pixels):
    """L_pixel of artifact maps (B, h, w) in [0, 1]: "mean" over all pixels (Eq. 2), "max": each image's worst one (Figure 4), "threshold": each
    image's mean over the pixels above .1 (the later version), 0 where there is none."""
    if pixels == "max":
        return confidence.flatten(1).amax(1).mean()
    if pixels == "threshold":
        high = (confidence > .1).float()
        return ((confidence * high).sum((1, 2)) / high.sum((1, 2)).clamp(min=1)).mean()
    return confidence.mean()


def offline_loss(model, scheduler, x0, noise, t, cond, guidance_scale=1.):
    """L_offline, Eq. 3, on latents x0 (B, C, h, w) of real images, t (B,): mean ((noise - x0) - v)^2 of a flow, x_t = (1 - t) x0 + t noise with t
    in thousandths; a diffusion model's own loss, on its noise or v, otherwise."""
    if model.flow:
        sigma = (t / 1000).view(-1, 1, 1, 1)
        noised = (1 - sigma) * x0 + sigma * noise
    else:
        noised = scheduler.add_noise(x0, noise, t)
    return F.mse_loss(denoise(model, noised, t, cond, guidance_scale), diffusion_target(scheduler, x0, noise, t))


def treat_step(model, scheduler, detector, latents, cond, uncond, args, generators):
    """Algorithm 1, lines 11-15: the last grad_steps steps with gradient, from latents (B, C, h, w) -> artifact maps (B, h, w) of the images."""
    n = len(scheduler.timesteps)
    latents = sample(model, scheduler, latents, cond, n - args.grad_steps, n, generators, args.guidance_scale, uncond, grad=True)
    return detector(decode(model, latents))


def kl(p, q, eps=1e-6):
    """mean over pixels of p log(p / q), q clamped to [eps, 1 - eps], 0 log 0 = 0: misses. kl(1 - p, 1 - q), KL(1-): false alarms. In nats."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q.clamp(eps, 1 - eps))).mean()


def stop_reason(history, patience, max_drift):
    """Why to stop, or None. history: (held-out mean confidence, drift) of each evaluation, the one before training first."""
    confidence = [c for c, _ in history]
    if not history[-1][1] <= max_drift:                                   # a collapse to nan as well
        return f"drift {history[-1][1]:.2f} is beyond --max_drift {max_drift:g}"
    if len(history) > patience and min(confidence[-patience:]) >= min(confidence[:-patience]):
        return f"held-out confidence has not fallen for {patience} evaluations"


# ------------------------------------------------------------------------------------------------------------------------------------
# the augmentation: images (3, S, S) in [0, 1] with labels (1, S, S) in [0, 1]; draw: a CPU generator


def uniform(draw, low, high):
    return low + (high - low) * torch.rand((), generator=draw).item()


def weak(image, label, draw):
    """For every image: a flip in half of them, a crop of 80 to 100 % of the side (ours), label alike."""
    both, size = torch.cat([image, label]), image.shape[-1]
    if uniform(draw, 0, 1) < .5:
        both = both.flip(-1)
    side = round(size * uniform(draw, .8, 1))
    y, x = (int(uniform(draw, 0, size - side + 1)) for _ in "yx")
    both = F.interpolate(both[None, :, y:y + side, x:x + side], (size, size), mode="bilinear", antialias=True)[0]
    return both[:3], both[3:]


def shrink_and_pad(image, label, draw):
    """The paper's dynamic augmentation: an image without a pixel at .1 becomes a small one somewhere on black, its label alike: what a detector
    wrongly fears is small and intricate. Images with higher confidence are never touched. The .1, scale .25 to .75, any position: ours."""
    if label.max() >= .1:
        return image, label
    size = image.shape[-1]
    side = max(1, round(size * uniform(draw, .25, .75)))
    y, x = (int(uniform(draw, 0, size - side + 1)) for _ in "yx")
    small = F.interpolate(torch.cat([image, label])[None], (side, side), mode="bilinear", antialias=True)[0]
    both = F.pad(small, (x, size - side - x, y, size - side - y))
    return both[:3], both[3:]


def strong(image, draw):
    """Pixels of pseudo-labelled images, after UniMatch: colour jitter .5, .5, .5, .25 (p .8), grey (p .2), blur (p .5, sigma .1 to 2 at 512 px)."""
    luma = image.new_tensor([.299, .587, .114]).view(3, 1, 1)
    if uniform(draw, 0, 1) < .8:                                          # brightness, contrast, saturation, then hue as a turn in YIQ
        image = (image * uniform(draw, .5, 1.5)).clamp(0, 1)
        image = torch.lerp((image * luma).sum(0).mean().expand_as(image), image, uniform(draw, .5, 1.5)).clamp(0, 1)
        image = torch.lerp((image * luma).sum(0).expand_as(image), image, uniform(draw, .5, 1.5)).clamp(0, 1)
        yiq, turn = image.new_tensor([[.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]]), 2 * math.pi * uniform(draw, -.25, .25)
        turned = image.new_tensor([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
        image = torch.einsum("ij,jhw->ihw", torch.linalg.inv(yiq) @ turned @ yiq, image).clamp(0, 1)
    if uniform(draw, 0, 1) < .2:
        image = (image * luma).sum(0).expand_as(image)
    if uniform(draw, 0, 1) < .5:
        sigma = uniform(draw, .1, 2) * image.shape[-1] / 512
        reach = math.ceil(3 * sigma)
        kernel = torch.exp(-.5 * (torch.arange(-reach, reach + 1, device=image.device) / sigma) ** 2)
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        padded = F.pad(image[None], (reach,) * 4, mode="replicate")
        image = F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0]
    return image


def cutmix(images, labels, draw):
    """Half of the images (B, 3, S, S) get a box, 2 to 40 % of the area, of their neighbour in the batch, labels (B, 1, S, S) alike (UniMatch)."""
    (b, _, size, _), out = images.shape, (images.clone(), labels.clone())
    for i in range(b):
        if uniform(draw, 0, 1) < .5:
            area, ratio = uniform(draw, .02, .4), math.exp(uniform(draw, math.log(.3), math.log(1 / .3)))
            h, w = (min(size, max(1, round(size * math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
            y, x = int(uniform(draw, 0, size - h + 1)), int(uniform(draw, 0, size - w + 1))
            for new, old in zip(out, (images, labels)):
                new[i, :, y:y + h, x:x + w] = old[i - 1, :, y:y + h, x:x + w]
    return out


def augment(images, labels, is_pseudo, draw):
    """images (B, 3, S, S), labels (B, 1, S, S): weak for all; pseudo-labelled ones are shrunk if harmless, then made hard to recognise and mixed."""
    pairs = [weak(image, label, draw) for image, label in zip(images, labels)]
    pairs = [shrink_and_pad(*pair, draw) if p else pair for pair, p in zip(pairs, is_pseudo)]
    pairs = [(strong(image, draw), label) if p else (image, label) for (image, label), p in zip(pairs, is_pseudo)]
    images, labels = (torch.stack(x) for x in zip(*pairs))
    at = [i for i, p in enumerate(is_pseudo) if p]
    images[at], labels[at] = cutmix(images[at], labels[at], draw)
    return images, labels


# ------------------------------------------------------------------------------------------------------------------------------------
# labels: a labelled folder holds images/NAME, maps/NAME.png (8-bit grey = confidence) and meta.jsonl, a line an image:
# {"file_name": NAME, "category": ..., "split": "train" or "test", "source": "human", "pseudo" or "real"}; real ones need no map


def read_image(path, mode, size=None):
    """An image file -> (3 or 1, H, W) in [0, 1]; size: squeezed to size x size pixels, as a detector sees it."""
    try:
        with Image.open(path) as image:
            image = image.convert(mode)
            image = image.resize((size, size), Image.BILINEAR) if size else image
            return to_tensor(image) if mode == "RGB" else to_tensor(image.convert("RGB"))[:1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise OSError(f"{path}: not a readable image") from e


class Labelled(Dataset):
    """Items i: (image (3, size, size), label (1, size, size), zeros without a map, i); rows: dicts with the paths "image" and "map"."""

    def __init__(self, rows, size):
        self.rows, self.size = rows, size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image, label = self.rows[i]["image"], self.rows[i].get("map")
        return read_image(image, "RGB", self.size), read_image(label, "L", self.size) if label else torch.zeros(1, self.size, self.size), i


def read_meta(folder):
    """The rows of a labelled folder, with the paths of image and map; a bad one is an error that names it."""
    folder, rows = Path(folder), []
    try:
        lines = (folder / "meta.jsonl").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        die(f"{folder / 'meta.jsonl'}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}; a folder with images/, maps/ and meta.jsonl is expected")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{folder / 'meta.jsonl'} line {number}"
        try:
            row = json.loads(line)
            name, ok = Path(row["file_name"]), row["file_name"].strip(".") and row["source"] in ("human", "pseudo", "real") and row["split"] in ("train", "test")
        except (ValueError, KeyError, TypeError, AttributeError):
            ok = False
        if not ok:
            die(f'{where}: {{"file_name", "category", "split": "train" or "test", "source": "human", "pseudo" or "real"}} is expected')
        if name.is_absolute() or ".." in name.parts:
            die(f"{where}: {name} is outside the folder")
        row |= dict(image=folder / "images" / name, map=None if row["source"] == "real" else folder / "maps" / name.with_suffix(".png"))
        rows.append(row)
    return rows or die(f"{folder / 'meta.jsonl'}: no image in it")


def read_labels(folders, real):
    """All rows of labelled folders and of folders of photographs, every tenth of which is for the metrics."""
    rows = [row for folder in folders for row in read_meta(folder)]
    for row in rows:
        for path in (row["image"], row["map"]):
            if path and not path.is_file():
                die(f"{path} is missing, which {path.parent.parent / 'meta.jsonl'} names")
    for folder in real:
        rows += [dict(image=path, source="real", split="test" if i % 10 == 9 else "train") for i, (path, _) in enumerate(image_data(folder, 8).items)]
    return rows


def read_unlabelled(folder):
    """The rows of a folder with metadata.jsonl: file_name, the path of the image, and the category, "" where a line has none."""
    paths = [path for path, _ in image_data(folder, 8).items]             # checks the list
    rows = [json.loads(line) for line in (Path(folder) / "metadata.jsonl").read_text(encoding="utf-8").split("\n") if line.strip()]
    return [dict(file_name=row["file_name"], image=path, category=str(row.get("category", ""))) for path, row in zip(paths, rows)]


@torch.no_grad()
def diagnose(detector, rows, device):
    """Yields (row, map (size, size) on the CPU)."""
    parts = [range(i, min(i + 16, len(rows))) for i in range(0, len(rows), 16)]
    batches = image_batches(Labelled([dict(image=row["image"]) for row in rows], detector.size), parts, workers=4 if device.type == "cuda" else 0)
    for images, _, at in tqdm(batches, total=len(parts), desc="diagnose"):
        yield from zip([rows[i] for i in at], detector(images.to(device)).cpu())


def overlay(images, maps):
    """images (B, 3, H, W), maps (B, h, w) -> the images, red where the confidence is high."""
    heat = .8 * F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")
    return images * (1 - heat) + heat * images.new_tensor([1., 0., 0.]).view(3, 1, 1)


def content_name(path):
    """A file name made of the image's own bytes, the same in every folder: what was labelled is known by it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] + ".png"


def write_lines(path, rows):
    """A file of JSON lines, written beside its place and then renamed into it."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    tmp.replace(path)


def write_labelled(out, found, source):
    """Images and predicted maps of (row, map) pairs, at the image's own size, as a labelled folder; meta.jsonl last. -> number of images."""
    rows = []
    for folder in ("images", "maps", *(["overlays"] if source == "human" else [])):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for row, confidence in found:
        image, name = read_image(row["image"], "RGB"), content_name(row["image"])
        large = F.interpolate(confidence[None, None], image.shape[1:], mode="bilinear")[0]
        to_pil(image).save(out / "images" / name)
        to_pil(large.expand(3, -1, -1)).convert("L").save(out / "maps" / name)
        rows.append(dict(file_name=name, category=row["category"], split="train", source=source, original=row["file_name"]))
        if source == "human":
            to_pil(torch.cat([image, overlay(image[None], large)[0]], 2)).save(out / "overlays" / name)
            rows[-1]["exported"] = hashlib.sha256((out / "maps" / name).read_bytes()).hexdigest()
    write_lines(out / "meta.jsonl", rows)
    return len(rows)


# ------------------------------------------------------------------------------------------------------------------------------------
# the commands


def abnormal(means):
    """{category: mean confidence} -> the categories above 1.5 times the median one's (ours), most suspicious first."""
    middle = torch.tensor(list(means.values())).median().item()
    return sorted((c for c in means if means[c] > 1.5 * middle), key=lambda c: -means[c])


def score(args):
    device = pick_device(args.device)
    detector = load_detector(args.detector, device)
    rows = [dict(file_name=row["file_name"], category=row["category"], mean=m.mean().item(), max=m.max().item())
            for row, m in diagnose(detector, read_unlabelled(args.images), device)]
    of = {c: [row for row in rows if row["category"] == c] for c in {row["category"] for row in rows}}
    means = {c: sum(row["mean"] for row in part) / len(part) for c, part in of.items()}
    high = abnormal(means)
    print(f"{'category':<30} {'images':>7} {'mean %':>7} {'max %':>7}")
    for c in sorted(means, key=lambda c: -means[c]):
        worst = sum(row["max"] for row in of[c]) / len(of[c])
        print(f"{c or '(none)':<30} {len(of[c]):>7} {100 * means[c]:>7.2f} {100 * worst:>7.2f}" + ("   abnormal" if c in high else ""))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    write_lines(Path(args.out) / "scores.jsonl", [row | dict(abnormal=row["category"] in high) for row in sorted(rows, key=lambda row: -row["mean"])])
    print(f"ranked: {Path(args.out) / 'scores.jsonl'}. Draw more of the abnormal categories with good models, label the hard ones: export_hard")


def export_hard(args):
    device, path = pick_device(args.device), Path(args.scores) / "scores.jsonl"
    detector, of = load_detector(args.detector, device), {row["file_name"]: row for row in read_unlabelled(args.images)}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        hard = [row for row in rows if row["max"] >= args.threshold and (row["category"] in args.categories if args.categories else row["abnormal"])]
    except (OSError, ValueError, KeyError, TypeError):
        die(f"--scores {args.scores}: no scores.jsonl of `diffdoctor.py score` there")
    if lost := [row["file_name"] for row in hard if row["file_name"] not in of]:
        die(f"--scores {args.scores} knows {lost[0]}, which is not in {args.images}")
    if not hard:
        die(f"no image of {', '.join(args.categories or ['an abnormal category'])} reaches --threshold {args.threshold:g}")
    out = Path(args.out)
    n = write_labelled(out, diagnose(detector, [of[row["file_name"]] for row in hard[:args.max_images]], device), "human")
    print(f"{n} images: look at {out / 'overlays'}, paint {out / 'maps'} (white: wrong, black: fine), delete images you cannot judge from "
          f"{out / 'images'}, then: python diffdoctor.py import_labels --labels {out} --out DATASET")


def import_labels(args):
    rows, out, left_out, changed = read_meta(args.labels), Path(args.out), 0, 0
    old = read_meta(out) if (out / "meta.jsonl").exists() else []
    known, kept = {row["file_name"] for row in old}, []
    for row in rows:                                                      # everything is checked before anything is written
        if not row["image"].is_file():
            left_out += 1
            continue
        if row["file_name"] in known:
            die(f"{row['image']} has a label in {out} already: delete it on one of the two sides")
        try:
            with Image.open(row["map"]) as image, Image.open(row["image"]) as picture:
                pixels = to_tensor(image.convert("RGB"))
                if image.mode[0] in "IF":
                    die(f"{row['map']} has more than 8 bits a pixel: save it as 8-bit grey")
                if image.size != picture.size:
                    die(f"{row['map']} has {image.width} x {image.height} pixels, its image {picture.width} x {picture.height}")
        except (OSError, SyntaxError, ValueError) as e:
            die(f"{row['map']}: " + ("missing; delete the image too, to leave it out" if isinstance(e, FileNotFoundError) else "not a readable image"))
        if (pixels.amax(0) - pixels.amin(0)).max() > 8 / 255:
            die(f"{row['map']} has colours: a map is grey, white where something is wrong")
        changed += hashlib.sha256(row["map"].read_bytes()).hexdigest() != row.get("exported")
        kept.append((row, pixels))
    for folder in ("images", "maps"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for row, pixels in kept:
        (out / "images" / row["file_name"]).write_bytes(row["image"].read_bytes())
        to_pil(pixels).convert("L").save((out / "maps" / row["file_name"]).with_suffix(".png"))
    new = [dict(file_name=row["file_name"], category=row.get("category", ""), split=args.split, source="human") for row, _ in kept]
    write_lines(out / "meta.jsonl", [{k: v for k, v in row.items() if k not in ("image", "map")} for row in old] + new)
    print(f"{len(new)} labels, {changed} of them edited, {left_out} images left out; {out} now holds {len(old) + len(new)}")


def pseudo(args):
    device = pick_device(args.device)
    detector, rows = load_detector(args.detector, device), read_unlabelled(args.images)
    labelled = {row["file_name"] for folder in args.exclude for row in read_meta(folder)}
    rest = [row for row in rows if content_name(row["image"]) not in labelled]
    if not rest:
        die(f"every image of {args.images} is in {', '.join(args.exclude)}")
    n = write_labelled(Path(args.out), diagnose(detector, rest, device), "pseudo")
    print(f"{n} pseudo labels: {args.out}; {len(rows) - n} images were labelled before")


def start_detector(init, seed, size, device):
    """The detector that training starts from, on `device`: only its head is drawn from the seed, or with "toy" all of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "detector").initial_seed())
        if init == "toy":
            config = AutoConfig.from_pretrained(TOY / "detector")
            net = AutoModelForSemanticSegmentation.from_config(config, dtype=torch.float32)
        elif init in BACKBONE:
            try:
                net, info = AutoModelForSemanticSegmentation.from_pretrained(BACKBONE[init], num_labels=1, decoder_hidden_size=768,
                                                                             dtype=torch.float32, output_loading_info=True)
            except (OSError, ValueError) as e:
                die(f"--init {init}: {e}")
            if lost := [k for k in info["missing_keys"] if not k.startswith("decode_head.")]:
                die(f"--init {init}: {BACKBONE[init]} lacks {min(lost)}")
        else:
            detector = load_detector(init, device)
            detector.size = size or detector.size
            return detector.requires_grad_(True)
    torch.nn.init.constant_(net.decode_head.classifier.bias, -2.)         # most pixels are fine
    return Detector(net, size).to(device)


def save_detector(detector, folder):
    """The folder that --detector and evaluate.py open."""
    detector.net.save_pretrained(folder)
    size = dict(height=detector.size, width=detector.size)
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="SegformerImageProcessor", do_resize=True, size=size, resample=2, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=list(detector.mean), image_std=list(detector.std)), indent=2) + "\n")


def draw_batch(rows, seed, step, batch_size):
    """Indices of one update: half pseudo labels, if there are any; of the rest 40 % photographs (ours), if there are any; else human labels."""
    of = {s: [i for i, row in enumerate(rows) if row["source"] == s and row["split"] == "train"] for s in ("human", "real", "pseudo")}
    n = dict(pseudo=batch_size // 2 if of["pseudo"] else 0)
    n["real"] = round(.4 * (batch_size - n["pseudo"])) if of["real"] else 0
    n["human"], draw = batch_size - n["pseudo"] - n["real"], generator(seed, "data", step)
    return [of[s][i] for s in ("human", "real", "pseudo") if n[s] for i in torch.randint(len(of[s]), (n[s],), generator=draw).tolist()]


@torch.no_grad()
def detector_metrics(detector, data, device):
    """MSE, KL and KL(1-) on test labels, MSE and KL(1-) on test photographs (Table 1), in percent, and (images, labels, maps) of the first eight."""
    detector.eval()
    stats, shown = {}, []
    for name, sources in (("", ("human",)), ("_real", ("real",))):
        at = [i for i, row in enumerate(data.rows) if row["source"] in sources and row["split"] == "test"]
        sums = torch.zeros(3)
        for images, labels, _ in image_batches(data, [at[i:i + 16] for i in range(0, len(at), 16)], workers=4 if device.type == "cuda" else 0):
            p, q = labels[:, 0], detector(images.to(device)).cpu()
            sums += len(p) * torch.stack([F.mse_loss(q, p), kl(p, q), kl(1 - p, 1 - q)])
            shown += [(images, p, q)] if len(shown) < 1 else []
        if at:
            stats |= {k + name: (100 * v / len(at)).item() for k, v in zip(("mse", "kl", "kl1"), sums) if not (name and k == "kl")}
    return stats, shown


def train_detector(args):
    device = pick_device(args.device)
    rows = read_labels(args.data, args.real)
    if not any(row["source"] == "human" and row["split"] == "train" for row in rows):
        die(f"--data {' '.join(args.data)}: no true label (source human, split train) to learn from")
    detector = start_detector(args.init, args.seed, args.size, device)
    args.size, data = detector.size, Labelled(rows, detector.size)
    named = dict(detector.named_parameters())
    backbone, head = ([p for n, p in named.items() if ("decode_head" in n) == is_head] for is_head in (False, True))
    optimizer = torch.optim.AdamW([dict(params=backbone, lr=args.lr), dict(params=head, lr=args.head_lr)], weight_decay=1e-2, fused=True)
    state = [*named.values(), *detector.buffers()]                        # batch norm's statistics too
    saved = SimpleNamespace(save_pretrained=lambda folder: save_detector(detector, folder))
    run = Run(args, {}, SimpleNamespace(source=args.init, part="detector", denoiser=saved, vae=None))
    print_settings(args, {}, list(named.values()))
    count = {(s, p): sum(row["source"] == s and row["split"] == p for row in rows) for s in ("human", "real", "pseudo") for p in ("train", "test")}
    print("  " + ", ".join(f"{n} {s} ({p})" for (s, p), n in count.items() if n))
    if args.resume:
        run.resume(state, optimizer)

    indices = [draw_batch(rows, args.seed, step, args.batch_size) for step in range(run.start + 1, args.train_steps + 1)]
    batches = image_batches(data, indices, workers=4 if device.type == "cuda" else 0)
    for step in (bar := tqdm(range(run.start + 1, args.train_steps + 1), initial=run.start, total=args.train_steps, desc="detector")):
        start, (images, labels, at) = time.time(), next(batches)
        images, labels = augment(images.to(device), labels.to(device), [rows[i]["source"] == "pseudo" for i in at.tolist()],
                                 generator(args.seed, "augment", step))
        detector.train()
        for group, lr in zip(optimizer.param_groups, (args.lr, args.head_lr)):
            group["lr"] = lr * .5 * (1 + math.cos(math.pi * (step - 1) / args.train_steps))
        statistics = [b.clone() for b in detector.buffers()]              # batch norm's: the forward pass changes them
        with torch.random.fork_rng(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            torch.manual_seed(generator(args.seed, "dropout", step).initial_seed())
            confidence = detector(images)
        loss = F.mse_loss(confidence, labels[:, 0])                       # Eq. 1
        loss.backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in named.values()]).item()
        if not (skipped := run.skips(step, grad_norm, loss.detach())):    # NaN or Inf never reaches the weights
            optimizer.step()
        else:
            for b, kept in zip(detector.buffers(), statistics):
                b.copy_(kept)
        optimizer.zero_grad(set_to_none=True)
        stats = dict(loss=loss.item(), grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"], skipped=skipped, seconds=time.time() - start)
        if step % args.save_every == 0 or step == args.train_steps:
            metrics, shown = detector_metrics(detector, data, device)
            stats |= metrics
            for images, p, q in shown:                                    # image, label, prediction: a row each
                save_grid(torch.stack([x for i, j, k in zip(images, overlay(images, p), overlay(images, q)) for x in (i, j, k)][:24]),
                          run.dir / "samples" / f"step_{step:06d}.png", columns=3)
        run.log(step=step, **stats)
        bar.set_postfix(loss=f"{stats['loss']:.2e}")
        if step % args.save_every == 0 or step == args.train_steps:
            run.save(step, state, optimizer)
            print("\n  in percent: " + (", ".join(f"{k} {v:.3f}" for k, v in metrics.items()) or "no test label, no metrics"))
    print(f"detector: {run.weights / 'detector'}")


@torch.no_grad()
def held_out_confidence(run, detector, reward, prompts, sampler, step, before=None, num_images=2):
    """Samples held-out prompts at fixed seeds -> stats and images (N, 3, H, W): the mean over images of the map's mean and of its maximum, the
    reward, and the drift: the mean distance of pixels from `before`, over that between different images of `before`. Overlays to samples/."""
    images, device = generate(run.model, prompts, run.args.seed, sampler, num_images, purpose="held-out"), run.model.device
    before, each = images if before is None else before, [p for p in prompts for _ in range(num_images)]
    maps = torch.cat([detector(images[i:i + 16].to(device)).cpu() for i in range(0, len(images), 16)])
    first = torch.cat([detector(before[i:i + 16].to(device)).cpu() for i in range(0, len(before), 16)])
    r = torch.cat([reward(images[i:i + 16].to(device), each[i:i + 16]) for i in range(0, len(images), 16)])
    drift = (images - before).abs().mean() / (before - before.roll(1, 0)).abs().mean().clamp(min=1e-3)
    rows = zip(before[:16], overlay(before, first), images, overlay(images, maps))
    save_grid(torch.stack([x for row in rows for x in row]), run.dir / "samples" / f"step_{step:06d}.png", columns=8)
    worst = maps.flatten(1).amax(1).mean()
    return dict(test_mean=maps.mean().item(), test_max=worst.item(), test_drift=drift.item(), test_reward=r.mean().item()), images


def treat(args):
    device = pick_device(args.device)
    model = load_model(args.model, device, args.resolution, full=args.lora_rank == 0)
    args.resolution = model.resolution
    detector, (reward, _) = load_detector(args.detector, device), load_reward(args.reward, device)
    data = image_data(args.data, args.resolution) if args.gamma else None
    prompts = read_prompts(args.prompts)
    if args.test_prompts is None and len(prompts) <= 100:
        die(f"--prompts {args.prompts}: {len(prompts)} prompts, of which the last 100 would be held out; name others with --test_prompts")
    train_prompts, test_prompts = (prompts[:-100], prompts[-100:]) if args.test_prompts is None else (prompts, read_prompts(args.test_prompts))
    test_prompts = test_prompts[:16]
    encode_once(model, train_prompts + test_prompts + (data.captions if data else []))

    params = trainable(model, args.lora_rank, args.seed, args.checkpointing, args.compile, args.init_lora)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(.9, .999), eps=1e-15, weight_decay=1e-2, fused=True)     # eps: see refl.py
    scheduler = make_scheduler(model, args.scheduler, args.num_inference_steps)
    times = make_scheduler(model, "euler", 1000).timesteps if model.flow else torch.arange(1000)           # of the regulariser
    eta = 1. if args.scheduler == "ddpm" else 0.
    sampler = dict(scheduler=args.scheduler, eta=eta, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    run = Run(args, sampler, model)
    print_settings(args, row_of(PAPER, args.model), params)
    first, before = held_out_confidence(run, detector, reward, test_prompts, sampler, 0)      # of the model to treat: before a checkpoint is loaded
    print(f"held-out artifact confidence before: mean {first['test_mean']:.2%}, max {first['test_max']:.2%}; {args.reward} {first['test_reward']:.4f}")
    if first["test_max"] < .1:
        print("  the detector sees next to nothing in this model's images: no signal, no gradient. Was it trained on images like these?")
    if args.resume:
        run.resume(params, optimizer)
    log = run.dir / "log.jsonl"
    evaluated = [row for row in map(json.loads, log.read_text().splitlines()) if "test_mean" in row] if args.resume else []
    history = [(first["test_mean"], 0.)] + [(row["test_mean"], row["test_drift"]) for row in evaluated]
    reason = stop_reason(history, args.patience, args.max_drift)

    draws = [torch.randint(len(data), (args.batch_size,), generator=generator(args.seed, "data", step)).tolist()
             for step in range(run.start + 1, args.train_steps + 1)] if data else []
    batches = image_batches(data, draws, workers=4 if device.type == "cuda" else 0)
    for step in (bar := tqdm(range(run.start + 1, args.train_steps + 1), initial=run.start, total=args.train_steps, desc="treat")):
        if reason:
            break
        start = time.time()
        draw = generator(args.seed, "update", step)
        prompts = [train_prompts[i] for i in torch.randint(len(train_prompts), (args.batch_size,), generator=draw)]
        generators = [generator(args.seed, "train", step, i) for i in range(args.batch_size)]
        uncond = condition(model, [None] * args.batch_size) if args.guidance_scale > 1 else None
        with merged(model):
            latents = sample(model, scheduler, initial_latents(model, generators), condition(model, prompts), 0,
                             args.num_inference_steps - args.grad_steps, generators, args.guidance_scale, uncond)
        if data:
            images, captions = next(batches)
            x0 = encode(model, images)
            noises = [generator(args.seed, "offline", step, i) for i in range(args.batch_size)]
            noise = initial_latents(model, noises)
            t = torch.stack([times[torch.randint(1000, (), generator=g)] for g in noises]).to(device)

        total, maps, offline = 0., [], []
        for i in range(0, args.batch_size, args.micro_batch):
            at = slice(i, i + args.micro_batch)
            cond, uncond = condition(model, prompts[at]), condition(model, [None] * len(prompts[at])) if args.guidance_scale > 1 else None
            confidence = treat_step(model, scheduler, detector, latents[at], cond, uncond, args, generators[at])
            loss = pixel_loss(confidence, args.pixels) * len(confidence) / args.batch_size
            loss.backward()
            total, maps = total + loss.detach(), maps + [confidence.detach()]
            if data:                                                      # a backward pass of its own: one graph in memory at a time
                mse = offline_loss(model, scheduler, x0[at], noise[at], t[at], condition(model, captions[at]),
                                   args.guidance_scale if model.distilled else 1.)
                loss = args.gamma * mse * len(confidence) / args.batch_size                   # Eq. 4
                loss.backward()
                total, offline = total + loss.detach(), offline + [mse.detach() * len(confidence)]

        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item()           # the paper does not say that it clips
        if not (skipped := run.skips(step, grad_norm, total)):            # NaN or Inf never reaches the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        maps = torch.cat(maps)
        stats = dict(loss=total.item(), mean=maps.mean().item(), max=maps.flatten(1).amax(1).mean().item(), grad_norm=grad_norm,
                     grad_rms=grad_norm / sum(p.numel() for p in params) ** .5, skipped=skipped, seconds=time.time() - start)
        if offline:
            stats["offline"] = (sum(offline) / args.batch_size).item()
        if step % args.save_every == 0 or step == args.train_steps:
            stats |= held_out_confidence(run, detector, reward, test_prompts, sampler, step, before)[0]
        run.log(step=step, **stats)
        bar.set_postfix(loss=f"{stats['loss']:.2e}", mean=f"{stats['mean']:.2%}")
        if "test_mean" in stats:
            run.save(step, params, optimizer)
            evaluated.append(json.loads(log.read_text().splitlines()[-1]))            # as a resumed run will read it
            history.append((evaluated[-1]["test_mean"], evaluated[-1]["test_drift"]))
            reason = stop_reason(history, args.patience, args.max_drift)
    bar.close()

    print(f"stopped: {reason or 'all updates done'}; pictures, before and after, each with its overlay: {run.dir / 'samples'}")
    if inside := [row for row in evaluated if row["test_drift"] <= args.max_drift]:
        best = min(inside, key=lambda row: row["test_mean"])
        print(f"held-out artifact confidence after:  mean {best['test_mean']:.2%}, max {best['test_max']:.2%}; {args.reward} {best['test_reward']:.4f};"
              f" drift {best['test_drift']:.2f}; the best snapshot: {run.weights / 'step_{:06d}'.format(best['step'])}")


def main(args):
    commands = dict(detector=train_detector, score=score, export_hard=export_hard, import_labels=import_labels, pseudo=pseudo, treat=treat)
    commands[args.command](args)


if __name__ == "__main__":
    launch(parse_args, main)
