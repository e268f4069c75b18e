"""Samples images from a model, from what a run made of it, or from both: combined generation (ImageReFL, arXiv 2505.22569, Eq. 3) and AIG.

A tuned model draws better and less varied images. The first steps decide the layout, the last ones the quality, so let the base model take the
first steps and the tuned one the rest. Step i of T predicts with the weight w(i) on the tuned model:

  noise_pred = (1 - w(i)) base(x_t, t, c; base_guidance_scale) + w(i) tuned(x_t, t, c; guidance_scale)

  --mode base       w = 0
  --mode tuned      w = 1
  --mode combined   w = 1[i >= base_steps]          a hard switch: 2 base_steps + (T - base_steps) denoiser passes. The paper's base_steps of T = 40,
                                                    SD1.5 and SDXL: ReFL 10, 20; ImageReFL 30, 35
  --mode aig        w = i / T                       annealed importance guidance (arXiv 2409.06493), exponent 1: every step runs both

1. The released AIG runs its base without guidance, which by itself makes the base worse; here --base_guidance_scale decides (1: the release's).
2. With a LoRA, base and tuned are one network with the adapter off and on: the second set of weights that the paper names as its limitation is
   the adapter's (megabytes). A full fine-tune needs both denoisers in memory, and this script says how much that is.
3. SDXL's unconditional embedding is zeros, as diffusers has it; ImageReFL's release encodes "".

For a run folder (or a snapshot in it) the model and the sampler come from the run's config.json, so that its images are made as it was trained;
every flag overrides. Noise depends on (seed, index of the prompt, index of the image) alone: images of different modes, runs and batch sizes with
the same seed are pairs.

  --lora RUN                    a run folder, or its snapshot lora/step_000060; a full fine-tune's weights are in RUN/model/unet
  --lora DIR_OR_FILE            any LoRA in diffusers' format on the attention projections; its rank is read from the file

Writes 00000_00.png (prompt, image), grid.png and, last of all, metadata.jsonl: {"file_name", "text", "prompt_id", "seed"} a line; with several
--base_steps a folder for each, base_steps_12 and so on.

  $ python combined_sample.py --lora runs/refl-toy-toy_pref --mode tuned --out images/tuned
  $ python combined_sample.py --lora runs/refl-toy-toy_pref --mode combined --base_steps 5 10 15 --out images/combined
  $ python combined_sample.py --model sdxl --mode base --prompts captions.txt --out images/sdxl
"""
import contextlib
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common import (MODELS, TOY, TOY_MODELS, Parser, base_model, condition, decode, denoise, die, encode_once, generator, initial_latents, launch, load_model,
                    make_scheduler, merged, pick_device, read_lora, read_prompts, row_of, save_grid, scheduler_step, to_pil,
                    trainable)

BASE = {  # guidance: the default of diffusers' pipeline; the scheduler and its 40 steps: ImageReFL, section 5
    "toy": dict(scheduler="ddpm", num_inference_steps=20, guidance_scale=4.),                                          # ours
    **dict.fromkeys(("sd14", "sd15", "sd21"), dict(scheduler="ddpm", num_inference_steps=40, guidance_scale=7.5)),
    "sdxl": dict(scheduler="ddpm", num_inference_steps=40, guidance_scale=5.),
    "toy-flux": dict(scheduler="euler", num_inference_steps=5, guidance_scale=1.),                                     # ours
    "flux-schnell": dict(scheduler="euler", num_inference_steps=4, guidance_scale=1.),
    "flux-dev": dict(scheduler="euler", num_inference_steps=28, guidance_scale=3.5),
}


def read_run(path):
    """The config.json of the run that this path is, or lies in; {} for a LoRA without one."""
    for folder in (Path(path), *Path(path).parents[:3]) if path else ():
        if (folder / "config.json").is_file():
            try:
                config = json.loads((folder / "config.json").read_text())
            except ValueError:
                die(f"--lora {path}: {folder / 'config.json'} is not JSON")
            if isinstance(config, dict) and {"model", "lora_rank", "sampler"} <= config.keys():
                return config
    return {}


def full_weights(path):
    """The folder of a full fine-tune's denoiser, if this path is a run or model folder with one."""
    return next((folder / "unet" for folder in (Path(path), Path(path) / "model") if (folder / "unet" / "config.json").is_file()), None)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--lora", help="run folder, LoRA folder or .safetensors file")
    parser.add_argument("--mode", choices=("base", "tuned", "combined", "aig"), default="tuned", help="who predicts the noise: see above")
    parser.add_argument("--base_steps", type=int, nargs="+", help="--mode combined: the first so many steps are the base model's")
    parser.add_argument("--model", help=f"{', '.join(MODELS)}; or a diffusers folder or hub id (the run's; else toy)")
    first, _ = parser.parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])
    run = read_run(first.lora)
    model = first.model or run.get("model", "toy")
    row = row_of(BASE, model)
    trained = dict(row, guidance_scale=row["guidance_scale"] if row["scheduler"] == "euler" else 1., **({"resolution": run["resolution"]} if run.get("model") == model else {})) | run.get("sampler", {})
    default = dict(trained, base_guidance_scale=trained["guidance_scale"] if trained["guidance_scale"] > 1 else row["guidance_scale"])
    parser.set_defaults(model=model)
    parser.add_argument("--prompts", default=run.get("test_prompts"), help="text file, a prompt per line (the run's --test_prompts; toy/prompts_test.txt)")
    parser.add_argument("--num_images", type=int, default=5, help="images per prompt")
    parser.add_argument("--scheduler", choices=("ddpm", "ddim", "euler"), default=default["scheduler"], help="ancestral or DDIM; FLUX's is euler")
    parser.add_argument("--eta", type=float, help="DDIM's noise, 0 to 1 (the run's, else 0)")
    parser.add_argument("--num_inference_steps", type=int, default=default["num_inference_steps"], help="sampling steps")
    parser.add_argument("--guidance_scale", type=float, help=f"of the tuned model; 1 is without guidance ({default['guidance_scale']:g})")
    parser.add_argument("--base_guidance_scale", type=float, help=f"of the base model ({default['base_guidance_scale']:g})")
    parser.add_argument("--resolution", type=int, default=default.get("resolution"), help="pixels (the run's, else the model's)")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once; their noise does not depend on it")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", required=True, help="folder for the images: new, or empty")
    args = parser.parse_args(argv)

    if args.scheduler == "ddpm" and args.eta not in (None, 1):
        parser.error(f"--eta {args.eta:g} is for --scheduler ddim; ddpm adds all of its noise, as ddim does with eta 1")
    if args.scheduler == "euler" and args.eta not in (None, 0):
        parser.error(f"--eta {args.eta:g} is for --scheduler ddim; euler adds no noise")
    if args.eta is None:
        args.eta = 1. if args.scheduler == "ddpm" else default["eta"] if default["scheduler"] == "ddim" and "eta" in default else 0.
    for name in ("num_images", "num_inference_steps", "resolution", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    if args.num_inference_steps > 500:
        parser.error(f"--num_inference_steps {args.num_inference_steps}: at most 500 of the 1000 timesteps of training")
    for name, unused in (("guidance_scale", "base"), ("base_guidance_scale", "tuned")):
        if getattr(args, name) is None:
            setattr(args, name, default[name])
        elif args.mode == unused:
            parser.error(f"--{name} has no part in --mode {unused}; there it is {'--base_guidance_scale' if unused == 'base' else '--guidance_scale'}")
    if not 0 <= args.eta <= 1 or not all(0 <= g < math.inf for g in (args.guidance_scale, args.base_guidance_scale)):
        parser.error(f"--eta {args.eta:g} --guidance_scale {args.guidance_scale:g} --base_guidance_scale {args.base_guidance_scale:g}: "
                     "eta is 0 to 1, guidance 0 or more")
    if args.mode != "base" and not args.lora:
        parser.error(f"--mode {args.mode} needs --lora: a run folder, a LoRA folder or a .safetensors file")
    if (args.mode == "combined") != bool(args.base_steps):
        parser.error("--base_steps N belongs to --mode combined" + ("" if args.base_steps else ", which needs it"))
    if any(not 0 <= n <= args.num_inference_steps for n in args.base_steps or []) or len(set(args.base_steps or [])) < len(args.base_steps or []):
        parser.error(f"--base_steps {' '.join(map(str, args.base_steps))}: different numbers from 0 to num_inference_steps = {args.num_inference_steps}")
    args.prompts = args.prompts or (str(TOY / "prompts_test.txt") if model in TOY_MODELS else parser.error(f"--prompts FILE is needed with --model {model}"))
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        parser.error(f"--out {out} exists and is not an empty folder: choose another one, or delete it")
    return args


def load_full(model, folder):
    """Loads a fully fine-tuned denoiser; the base's stays beside it for base_model. Every key and shape must fit."""
    try:
        unet, info = type(model.denoiser).from_pretrained(folder, torch_dtype=model.dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as e:
        die(f"--lora {folder}: {e}")
    if info["missing_keys"] or {k: v.shape for k, v in unet.state_dict().items()} != {k: v.shape for k, v in model.denoiser.state_dict().items()}:
        die(f"--lora {folder}: these weights are not complete, or belong to another model than {model.source}")
    model.base, model.denoiser = model.denoiser, unet.requires_grad_(False).eval().to(model.device)
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    print(f"  a full fine-tune: base and tuned denoiser are both in memory, {size / 2**30:.2f} GiB each; a LoRA's base costs nothing")


def weight(mode, i, num_inference_steps, base_steps=None):
    """w(i) in [0, 1], the tuned model's share of step i = 0 .. num_inference_steps - 1: Eq. 3 (combined), or AIG with lambda = 1."""
    return {"base": 0., "tuned": 1., "combined": float(i >= (base_steps or 0)), "aig": i / num_inference_steps}[mode]


def mixed_prediction(model, latents, t, cond, uncond, w, guidance_scale, base_guidance_scale):
    """(1 - w) base + w tuned, the model's output (B, C, h, w) at timestep t; a model of weight 0 is not run."""
    if w < 1:
        with base_model(model):
            base = denoise(model, latents, t, cond, base_guidance_scale, uncond)
    if w > 0:
        tuned = denoise(model, latents, t, cond, guidance_scale, uncond)
    return base if w == 0 else tuned if w == 1 else torch.lerp(base, tuned, w)


@torch.no_grad()
def sample_folder(model, prompts, args, out, base_steps=None):
    """Writes the images of all prompts, grid.png and metadata.jsonl into the folder `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        die(f"--out {out}: cannot write there ({e.strerror})")
    scheduler = make_scheduler(model, args.scheduler, args.num_inference_steps)
    jobs, rows, shown = [(i, k) for i in range(len(prompts)) for k in range(args.num_images)], [], []
    with tqdm(total=len(jobs), desc=f"{out.name}, {args.mode}", unit="image") as bar:
        for j in range(0, len(jobs), args.batch_size):
            part = jobs[j:j + args.batch_size]
            generators = [generator(args.seed, "image", i, k) for i, k in part]
            latents, cond, uncond = initial_latents(model, generators), condition(model, [prompts[i] for i, _ in part]), condition(model, [None] * len(part))
            steps = [(weight(args.mode, i, len(scheduler.timesteps), base_steps), t) for i, t in enumerate(scheduler.timesteps)]
            for alone, part_of_steps in itertools.groupby(steps, key=lambda step: step[0] == 1):
                with merged(model) if alone else contextlib.nullcontext():             # once; where the base has a part the LoRA stays apart
                    for w, t in part_of_steps:
                        noise_pred = mixed_prediction(model, latents, t, cond, uncond, w, args.guidance_scale, args.base_guidance_scale)
                        latents = scheduler_step(scheduler, noise_pred, t, latents, generators, args.eta)
            for (i, k), image in zip(part, decode(model, latents).cpu()):
                rows.append(dict(file_name=f"{i:05d}_{k:02d}.png", text=prompts[i], prompt_id=i, seed=args.seed))
                to_pil(image).save(out / rows[-1]["file_name"])
                if i < 8 and k < 8:
                    shown.append(image)
            bar.update(len(part))
    save_grid(torch.stack(shown), out / "grid.png", columns=min(8, args.num_images))               # a row a prompt
    (out / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} images of {len(prompts)} prompts: {out}; look at {out / 'grid.png'}")


def main(args):
    run = read_run(args.lora)
    for name, value in vars(args).items():
        trained = run.get("sampler", {}).get(name, value)
        print(f"  {name:<20} {value}" + (f"   (the run: {trained})" if trained != value else ""))
    full = full_weights(args.lora) if args.lora else None
    rank = read_lora(args.lora)[1] if args.lora and not full else 0       # in mode base too: a mistyped --lora is an error
    prompts = read_prompts(args.prompts)
    model = load_model(args.model, pick_device(args.device), args.resolution)
    if args.mode != "base" and full:
        load_full(model, full)
    elif args.mode != "base":
        trainable(model, rank, init_lora=args.lora)
    encode_once(model, prompts)
    for n in args.base_steps or [None]:
        sample_folder(model, prompts, args, Path(args.out) / (f"base_steps_{n}" if len(args.base_steps or []) > 1 else ""), n)


if __name__ == "__main__":
    launch(parse_args, main)
