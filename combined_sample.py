"""Samples images from a model (--mode base) or from what a run made of it (--mode tuned).

For a run folder (or a snapshot in it) the model and the sampler come from the run's config.json, so that its images are made as it was trained;
every flag overrides. Noise depends on (seed, index of the prompt, index of the image) alone: base and tuned images with the same seed, and
folders made with different batch sizes, are pairs.

  --lora RUN                    a run folder, or its snapshot lora/step_000060; a full fine-tune's weights are in RUN/model/unet
  --lora DIR_OR_FILE            any LoRA in diffusers' format on the attention projections; its rank is read from the file

The base is sampled with guidance (its pipeline's own scale), the tuned model as its run says (ReFL: without).
Writes 00000_00.png (prompt, image), grid.png and, last of all, metadata.jsonl: {"file_name", "text", "prompt_id", "seed"} a line.

  $ python combined_sample.py --lora runs/refl-toy-toy_pref --mode tuned --out images/tuned
  $ python combined_sample.py --lora runs/refl-toy-toy_pref --mode base --out images/base
  $ python combined_sample.py --model sdxl --mode base --prompts captions.txt --out images/sdxl
"""
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common import (MODELS, TOY, Parser, die, encode_prompts, generate_batches, load_model, merged, pick_device, read_lora, read_prompts,
                    release_text_encoders, row_of, save_grid, to_pil, trainable)

BASE = {  # guidance: the default of diffusers' pipeline; the scheduler and its 40 steps: ImageReFL, section 5
    "toy": dict(scheduler="ddpm", num_inference_steps=20, guidance_scale=4.),                                          # ours
    **dict.fromkeys(("sd14", "sd15", "sd21"), dict(scheduler="ddpm", num_inference_steps=40, guidance_scale=7.5)),
    "sdxl": dict(scheduler="ddpm", num_inference_steps=40, guidance_scale=5.),
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
    parser.add_argument("--mode", choices=("base", "tuned"), default="tuned", help="the model as it was, or with the run's weights")
    parser.add_argument("--model", help=f"{', '.join(MODELS)}; or a diffusers folder or hub id (the run's; else toy)")
    first, _ = parser.parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])
    run = read_run(first.lora)
    model = first.model or run.get("model", "toy")
    row = row_of(BASE, model)
    trained = dict(row, guidance_scale=1., **({"resolution": run["resolution"]} if run.get("model") == model else {})) | run.get("sampler", {})
    default = dict(trained, guidance_scale=row["guidance_scale"]) if first.mode == "base" else trained
    parser.set_defaults(model=model)
    parser.add_argument("--prompts", default=run.get("test_prompts"), help="text file, a prompt per line (the run's --test_prompts; toy/prompts_test.txt)")
    parser.add_argument("--num_images", type=int, default=5, help="images per prompt")
    parser.add_argument("--scheduler", choices=("ddpm", "ddim"), default=default["scheduler"], help="ancestral or DDIM")
    parser.add_argument("--eta", type=float, help="DDIM's noise, 0 to 1 (the run's, else 0)")
    parser.add_argument("--num_inference_steps", type=int, default=default["num_inference_steps"], help="sampling steps")
    parser.add_argument("--guidance_scale", type=float, default=default["guidance_scale"], help="1 is without guidance")
    parser.add_argument("--resolution", type=int, default=default.get("resolution"), help="pixels (the run's, else the model's)")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once; their noise does not depend on it")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", required=True, help="folder for the images: new, or empty")
    args = parser.parse_args(argv)

    if args.scheduler == "ddpm" and args.eta not in (None, 1):
        parser.error(f"--eta {args.eta:g} is for --scheduler ddim; ddpm adds all of its noise, as ddim does with eta 1")
    if args.eta is None:
        args.eta = 1. if args.scheduler == "ddpm" else default["eta"] if default["scheduler"] == "ddim" and "eta" in default else 0.
    for name in ("num_images", "num_inference_steps", "resolution", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    if args.num_inference_steps > 1000:
        parser.error(f"--num_inference_steps {args.num_inference_steps}: at most the 1000 timesteps of training")
    if not 0 <= args.eta <= 1 or not 0 <= args.guidance_scale < math.inf:
        parser.error(f"--eta {args.eta:g} --guidance_scale {args.guidance_scale:g}: eta is 0 to 1, guidance 0 or more")
    if args.mode == "tuned" and not args.lora:
        parser.error("--mode tuned needs --lora: a run folder, a LoRA folder or a .safetensors file")
    args.prompts = args.prompts or (str(TOY / "prompts_test.txt") if model == "toy" else parser.error(f"--prompts FILE is needed with --model {model}"))
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        parser.error(f"--out {out} exists and is not an empty folder: choose another one, or delete it")
    return args


def load_full(model, folder):
    """Puts a fully fine-tuned denoiser in the model's place; every key and shape must fit."""
    try:
        unet, info = type(model.denoiser).from_pretrained(folder, torch_dtype=model.dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as e:
        die(f"--lora {folder}: {e}")
    if info["missing_keys"] or {k: v.shape for k, v in unet.state_dict().items()} != {k: v.shape for k, v in model.denoiser.state_dict().items()}:
        die(f"--lora {folder}: these weights are not complete, or belong to another model than {model.source}")
    model.pipe.unet = model.denoiser = unet.requires_grad_(False).eval().to(model.device)


def main(args):
    run = read_run(args.lora)
    for name, value in vars(args).items():
        trained = run.get("sampler", {}).get(name, value)
        print(f"  {name:<20} {value}" + (f"   (the run: {trained})" if trained != value else ""))
    full = full_weights(args.lora) if args.lora else None
    rank = read_lora(args.lora)[1] if args.lora and not full else 0       # in mode base too: a mistyped --lora is an error
    prompts = read_prompts(args.prompts)
    model = load_model(args.model, pick_device(args.device), args.resolution)
    if args.mode == "tuned" and full:
        load_full(model, full)
    elif args.mode == "tuned":
        trainable(model, rank, init_lora=args.lora)
    encode_prompts(model, prompts)
    release_text_encoders(model)

    out, sampler = Path(args.out), {k: getattr(args, k) for k in ("scheduler", "eta", "num_inference_steps", "guidance_scale")}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        die(f"--out {out}: cannot write there ({e.strerror})")
    jobs, rows, shown = [(i, k) for i in range(len(prompts)) for k in range(args.num_images)], [], []
    with merged(model), tqdm(total=len(jobs), desc=f"{args.mode} images", unit="image") as bar:
        for images in generate_batches(model, prompts, args.seed, sampler, args.num_images, args.batch_size):
            for image in images:
                i, k = jobs[len(rows)]
                rows.append(dict(file_name=f"{i:05d}_{k:02d}.png", text=prompts[i], prompt_id=i, seed=args.seed))
                to_pil(image).save(out / rows[-1]["file_name"])
                if i < 8 and k < 8:
                    shown.append(image)
            bar.update(len(images))
    save_grid(torch.stack(shown), out / "grid.png", columns=min(8, args.num_images))               # a row a prompt
    (out / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} images of {len(prompts)} prompts: {out}; look at {out / 'grid.png'}")


if __name__ == "__main__":
    main(parse_args())
