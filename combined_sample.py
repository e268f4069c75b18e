"""Samples images from a base model, a tuned model, or both together.

A model tuned on a reward makes better images, but they look more alike. The first sampling steps
determine the layout, and the last ones the quality. So in combined generation (ImageReFL,
arXiv 2505.22569, Eq. 3) the base model takes the first steps, and the tuned model takes the rest.

At step i of T, the tuned model has the weight w(i):

  noise_pred = (1 - w(i)) * base(x_t, t, prompt, base_guidance_scale)
               +    w(i)  * tuned(x_t, t, prompt, guidance_scale)

  --mode base       w = 0
  --mode tuned      w = 1
  --mode combined   w = 0 in the first --base_steps steps, then 1
  --mode aig        w = (i / T) ** aig_power, annealed importance guidance (arXiv 2409.06493)

The paper's base_steps, for T = 40: 10 (SD 1.5) and 20 (SDXL) for a model tuned with ReFL, 30 and 35
for one tuned with ImageReFL. aig runs both models in every step but the first. The larger its
power, the longer the base model leads. ImageReFL compares with power 1, at which AIG is about as
diverse as ImageReFL, and its code tries 1 to 5.

Differences from the papers' code:
1. In AIG, ImageReFL's code runs the base model without guidance, which by itself makes it worse.
   Here the base model has --base_guidance_scale; 1 matches that code.
2. With a LoRA, base and tuned model are one network with the LoRA off and on. A full fine-tune
   needs two denoisers in memory, which the paper names as its limitation.
3. SDXL's unconditional embedding is zeros, as in diffusers. ImageReFL's code encodes "".

--lora takes a run folder, a snapshot in it such as RUN/lora/step_000060, or any LoRA that diffusers
can load. Images of a run are made as the run made its own: model, scheduler, steps, guidance,
resolution and held-out prompts are its own, unless a flag says otherwise. The noise depends only on
the seed, the prompt's index and the image's index. So images of different modes, runs and batch
sizes can be compared one by one.

--out gets 00000_00.png (prompt, image) and so on, grid.png, and finally metadata.jsonl, with one
line per image: {"file_name", "text", "prompt_id", "seed"}. If there are several --base_steps,
each gets its own folder, base_steps_12 and so on.

  $ python combined_sample.py --lora runs/refl-toy-toy_pref --mode tuned --out images/tuned
  $ python combined_sample.py --lora runs/refl-toy-toy_pref --mode combined --base_steps 5 10 15 \\
        --out images/combined
  $ python combined_sample.py --model sdxl --mode base --prompts captions.txt --out images/sdxl
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common import TOY, base_model, decode_in_parts, denoise, generator, initial_latents, load_model
from common import make_scheduler, merged, pick_device, sample, scheduler_step
from data.images import open_image, to_tensor
from data.prompts import condition, encode_once, read_prompts
from models import MODELS
from models.lora import find_lora, load_lora
from run_folder import check_ranges, is_main_process, joined_processes, own_part, readable_errors
from run_folder import save_grid, settings_for, settings_parser, to_pil, wait_for_all
from run_folder import write_atomically

# Defaults for images that no run's config.json describes. The base model's guidance is that of
# diffusers' pipelines; the scheduler and its 40 steps are those of ImageReFL, section 5. The tuned
# model has no guidance, as in Eq. 3. FLUX.1-dev keeps it, because there it is an input.
SD = dict(scheduler="ddpm", num_inference_steps=40, base_guidance_scale=7.5, guidance_scale=1.0)
BASE = {
    "sd14": SD,
    "sd15": SD,
    "sd21": SD,
    "sdxl": dict(
        scheduler="ddpm", num_inference_steps=40, base_guidance_scale=5.0, guidance_scale=1.0
    ),
    "flux-schnell": dict(
        scheduler="euler", num_inference_steps=4, base_guidance_scale=1.0, guidance_scale=1.0
    ),
    "flux-dev": dict(
        scheduler="euler", num_inference_steps=28, base_guidance_scale=3.5, guidance_scale=3.5
    ),
    # From their model cards. Z-Image's guidance scale of 4 is 5 here: see models/z_image.py.
    "sd35": dict(
        scheduler="euler", num_inference_steps=40, base_guidance_scale=4.5, guidance_scale=1.0
    ),
    "z-image": dict(
        scheduler="euler", num_inference_steps=50, base_guidance_scale=5.0, guidance_scale=1.0
    ),
    "toy": dict(
        scheduler="ddpm", num_inference_steps=20, base_guidance_scale=4.0, guidance_scale=1.0
    ),
    "toy-flux": dict(
        scheduler="euler", num_inference_steps=5, base_guidance_scale=1.0, guidance_scale=1.0
    ),
}


def parse_args(argv=None):
    parser = settings_parser("combined_sample", __doc__)
    add = parser.add_argument
    add("--lora", help="run folder, LoRA folder or .safetensors file")
    add("--mode", choices=("base", "tuned", "combined", "aig"), help="see above; default: tuned")
    add("--base_steps", type=int, nargs="+", help="for --mode combined: the base model's steps")
    add("--aig_power", type=float, help="for --mode aig: the exponent of its weights; default: 1")
    add("--model", help=f"{', '.join(MODELS)}, a diffusers folder or hub id; the run's, or toy")
    add("--prompts", help="text file, one prompt per line; by default the run's held-out prompts")
    add("--num_images", type=int, default=5, help="images per prompt")
    add("--scheduler", choices=("ddpm", "ddim", "euler"), help="default: the run's, or the model's")
    add("--eta", type=float, help="DDIM's noise, 0 to 1; default: the run's, or 0")
    add("--num_inference_steps", type=int, help="steps; default: the run's, or the model's")
    add("--guidance_scale", type=float, help="the tuned model's; default: the run's, or 1 (none)")
    add("--base_guidance_scale", type=float, help="the base model's; default: run's, or diffusers'")
    add("--resolution", type=int, help="pixels; default: the run's, or the model's")
    add("--batch_size", type=int, default=16, help="images sampled at once; the noise is the same")
    add("--micro_batch", type=int, default=4, help="images decoded at once, to save memory")
    add("--seed", type=int, default=0, help="the random seed")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", required=True, help="folder for the images, new or empty")
    args = parser.parse_args(argv)
    check_ranges(args)

    run = read_run(args.lora)
    # A run of focus_n_fix.py with --prefix base leaves its first steps to the base model.
    if args.mode is None and args.base_steps is None and "base_steps" in run.get("sampler", {}):
        args.mode = "combined"
        args.base_steps = [run["sampler"]["base_steps"]]
    if args.mode is None:
        args.mode = "tuned"
    check_mode(parser, args)
    fill_defaults(args, run)
    if args.scheduler == "ddpm" and args.eta != 1:
        parser.error("--eta is for --scheduler ddim: ddpm always adds the noise of eta 1")
    if args.scheduler == "euler" and args.eta != 0:
        parser.error("--eta is for --scheduler ddim: euler adds no noise")
    if args.prompts is None:
        parser.error(f"--prompts FILE is required with --model {args.model}")
    if args.mode == "combined" and not 0 <= min(args.base_steps):
        parser.error("--base_steps must be 0 or more")
    if args.mode == "combined" and max(args.base_steps) > args.num_inference_steps:
        parser.error(f"--base_steps: there are only {args.num_inference_steps} steps")
    out = Path(args.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        sys.exit(f"--out {out} is not an empty folder: choose another one, or delete it")
    return args


def check_mode(parser, args):
    """Exits if the mode lacks a flag that it needs, or does not use one that was given."""
    if args.mode != "base" and not args.lora:
        parser.error(f"--mode {args.mode} needs --lora: a run folder, a LoRA folder or a file")
    if args.mode == "combined" and not args.base_steps:
        parser.error("--mode combined needs --base_steps")
    if args.mode != "combined" and args.base_steps:
        parser.error("--base_steps is for --mode combined")
    if args.mode != "aig" and args.aig_power is not None:
        parser.error("--aig_power is for --mode aig")
    if args.base_steps and len(set(args.base_steps)) < len(args.base_steps):
        parser.error("--base_steps: each number gets its own folder, so none may be repeated")
    if args.mode == "base" and args.guidance_scale is not None:
        parser.error("--guidance_scale is not used in --mode base: use --base_guidance_scale")
    if args.mode == "tuned" and args.base_guidance_scale is not None:
        parser.error("--base_guidance_scale is not used in --mode tuned: use --guidance_scale")


def fill_defaults(args, run):
    """Fills in the flags that were not given, from the run's config.json or else from BASE."""
    sampler = run.get("sampler", {})
    if args.model is None:
        args.model = run.get("model", "toy")
    row = settings_for(BASE, args.model)

    if args.aig_power is None:
        args.aig_power = 1.0
    if args.prompts is None:
        args.prompts = run.get("test_prompts")
    if args.prompts is None and args.model in ("toy", "toy-flux"):
        args.prompts = f"{TOY}/prompts_test.txt"
    # The run's resolution fits only its own model. Otherwise load_model uses the model's.
    if args.resolution is None and args.model == run.get("model"):
        args.resolution = run["resolution"]
    if args.scheduler is None:
        args.scheduler = sampler.get("scheduler", row["scheduler"])
    if args.num_inference_steps is None:
        args.num_inference_steps = sampler.get("num_inference_steps", row["num_inference_steps"])

    if args.eta is None and args.scheduler == "ddim" and sampler.get("scheduler") == "ddim":
        args.eta = sampler["eta"]
    if args.eta is None:
        args.eta = 1.0 if args.scheduler == "ddpm" else 0.0

    if args.guidance_scale is None:
        args.guidance_scale = sampler.get("guidance_scale", row["guidance_scale"])
    # Many runs train without guidance, but the base model needs it. Only a run that trains with
    # guidance says how much, or one that itself samples from the base model.
    says_how_much = sampler.get("guidance_scale", 1.0) > 1 or "base_steps" in sampler
    if args.base_guidance_scale is None and says_how_much:
        args.base_guidance_scale = sampler["guidance_scale"]
    if args.base_guidance_scale is None:
        args.base_guidance_scale = row["base_guidance_scale"]


# --------------------------------------------------------------------------------------------------
# The method


def mixed_prediction(
    model, latents, t, cond, uncond, w, guidance_scale=1.0, base_guidance_scale=1.0
):
    """Eq. 3: (1 - w) base + w tuned, the model's output (B, C, h, w) at timestep t.

    A model with weight 0 is not run.
    """
    if w == 1:
        return denoise(model, latents, t, cond, guidance_scale, uncond)
    with base_model(model):
        base = denoise(model, latents, t, cond, base_guidance_scale, uncond)
    if w == 0:
        return base
    tuned = denoise(model, latents, t, cond, guidance_scale, uncond)
    return torch.lerp(base, tuned, w)


def tuned_weight(mode, i, num_inference_steps, base_steps=0, aig_power=1.0):
    """w(i) in [0, 1], the tuned model's weight at step i = 0 .. num_inference_steps - 1."""
    if mode == "base":
        return 0.0
    if mode == "tuned":
        return 1.0
    if mode == "combined":
        return 0.0 if i < base_steps else 1.0
    return (i / num_inference_steps) ** aig_power  # aig


def sample_mixed(
    model, scheduler, latents, cond, uncond, weights, generators,
    guidance_scale=1.0, base_guidance_scale=1.0, eta=0.0,
):
    """Takes all steps from x_T; weights[i] is the tuned model's at step i, and never decreases."""
    # The steps that use the base model, alone or together with the tuned one.
    switch = sum(w < 1 for w in weights)
    for w, t in zip(weights[:switch], scheduler.timesteps):
        noise_pred = mixed_prediction(
            model, latents, t, cond, uncond, w, guidance_scale, base_guidance_scale
        )
        latents = scheduler_step(scheduler, noise_pred, t, latents, generators, eta)

    # The rest is plain sampling from the tuned model. Here we can fold the LoRA into the weights,
    # which is faster.
    if switch < len(weights):
        with merged(model):
            latents = sample(
                model, scheduler, latents, cond, switch, len(weights), generators,
                guidance_scale, uncond, eta,
            )
    return latents


# --------------------------------------------------------------------------------------------------
# Sampling


@torch.no_grad()
def sample_folder(model, prompts, args, out, base_steps=0):
    """Writes the images of all prompts, grid.png and metadata.jsonl into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    scheduler = make_scheduler(model, args.scheduler, args.num_inference_steps)
    num_steps = len(scheduler.timesteps)
    weights = []
    for i in range(num_steps):
        weights.append(tuned_weight(args.mode, i, num_steps, base_steps, args.aig_power))

    jobs = [(i, k) for i in range(len(prompts)) for k in range(args.num_images)]
    # Under torchrun, each process makes its part of the images; alone, this process makes all.
    own_jobs = own_part(jobs)
    progress = tqdm(
        total=len(own_jobs),
        desc=f"{out.name}, {args.mode}",
        unit="image",
        disable=not is_main_process(),
    )
    for first in range(0, len(own_jobs), args.batch_size):
        batch = own_jobs[first : first + args.batch_size]
        generators = [generator(args.seed, "image", i, k) for i, k in batch]
        latents = initial_latents(model, generators)
        cond = condition(model, [prompts[i] for i, _ in batch])
        uncond = condition(model, [None] * len(batch))
        latents = sample_mixed(
            model, scheduler, latents, cond, uncond, weights, generators,
            args.guidance_scale, args.base_guidance_scale, args.eta,
        )

        # Write the images.
        images = decode_in_parts(model, latents, args.micro_batch)
        for (i, k), image in zip(batch, images):
            to_pil(image).save(out / image_name(i, k))
        progress.update(len(batch))
    progress.close()
    wait_for_all()

    # The grid shows at most eight prompts with eight images each.
    shown = [open_image(out / image_name(i, k)) for i, k in jobs if i < 8 and k < 8]
    images = torch.stack([to_tensor(image) for image in shown])
    save_grid(images, out / "grid.png", columns=min(8, args.num_images))
    # metadata.jsonl comes last, so if it exists, all images do.
    text = ""
    for i, k in jobs:
        row = dict(file_name=image_name(i, k), text=prompts[i], prompt_id=i, seed=args.seed)
        text += json.dumps(row, ensure_ascii=False) + "\n"
    write_atomically(out / "metadata.jsonl", text)
    print(f"{len(jobs)} images of {len(prompts)} prompts: {out}; look at {out / 'grid.png'}")


def image_name(i, k):
    """The file name of image k of prompt i."""
    return f"{i:05d}_{k:02d}.png"


# --------------------------------------------------------------------------------------------------
# Reading what a run made


def read_run(path):
    """The config.json of the run that this path is, or is inside of; {} if there is none."""
    if path is None:
        return {}
    for folder in (Path(path), *Path(path).parents[:3]):
        if not (folder / "config.json").is_file():
            continue
        config = json.loads((folder / "config.json").read_text())
        # A model's folder also has a config.json, but it does not contain a sampler.
        if "sampler" not in config:
            continue
        # Without --test_prompts, some scripts choose them and keep them here.
        chosen_prompts = folder / "test_prompts.txt"
        if config.get("test_prompts") is None and chosen_prompts.is_file():
            config["test_prompts"] = str(chosen_prompts)
        return config
    return {}


def find_full_weights(path):
    """The folder of a full fine-tune's denoiser, if this path is a run or model folder with one."""
    for folder in (Path(path) / "unet", Path(path) / "model" / "unet"):
        if (folder / "config.json").is_file():
            return folder
    return None


def load_full(model, folder):
    """Loads a fully fine-tuned denoiser. The base model's denoiser stays in model.full_base."""
    try:
        tuned, report = type(model.denoiser).from_pretrained(
            folder, torch_dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"--lora {folder}: {error}")
    shapes = {key: weight.shape for key, weight in tuned.state_dict().items()}
    base_shapes = {key: weight.shape for key, weight in model.denoiser.state_dict().items()}
    if report["missing_keys"] or shapes != base_shapes:
        sys.exit(f"--lora {folder}: incomplete weights, or not those of {model.source}")
    model.full_base = model.denoiser
    model.denoiser = tuned.requires_grad_(False).eval().to(model.device)
    num_bytes = sum(p.numel() * p.element_size() for p in tuned.parameters())
    print(f"  the base and tuned denoisers are both in memory, {num_bytes / 2**30:.2f} GiB each")


def print_sampling(args):
    """Prints every setting, with the run's own value beside it where it differs."""
    sampler = read_run(args.lora).get("sampler", {})
    for name, value in vars(args).items():
        line = f"  {name:<20} {value}"
        if sampler.get(name, value) != value:
            line += f"   (the run: {sampler[name]})"
        print(line)


def main(args):
    prompts = read_prompts(args.prompts)
    full_weights = None
    if args.lora:
        full_weights = find_full_weights(args.lora)
    if args.lora and full_weights is None:
        # This exits if there is no LoRA. Even in mode base, a mistyped path is an error.
        find_lora(args.lora)
    print_sampling(args)

    model = load_model(args.model, pick_device(args.device), args.resolution)
    if args.mode != "base" and full_weights:
        load_full(model, full_weights)
    elif args.mode != "base":
        load_lora(model, args.lora)
    encode_once(model, prompts)

    if args.mode != "combined":
        sample_folder(model, prompts, args, Path(args.out))
    elif len(args.base_steps) == 1:
        sample_folder(model, prompts, args, Path(args.out), args.base_steps[0])
    else:
        for base_steps in args.base_steps:
            out = Path(args.out) / f"base_steps_{base_steps}"
            sample_folder(model, prompts, args, out, base_steps)


if __name__ == "__main__":
    args = parse_args()
    with readable_errors(args), joined_processes(args):
        main(args)
