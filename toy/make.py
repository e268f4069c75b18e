"""Builds the toy world from nothing: prompts, images and networks. Its pictures and figures: toy/measure.py.

  $ python toy/make.py                    # everything that is not there yet, in order; Ctrl-C and start again as you like
  $ python toy/make.py --stages vae sd    # some stages alone

A stage keeps its progress in toy/work/ and continues from there; delete that folder (and the network's own) to build it anew. Every draw
comes from (stage, seed, step), one thread, so that a build repeats on the same machine; the device is CUDA when there is one.
"""
import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))          # run as a script: find the package `toy`
from toy import flux_model, judges
from toy.scenes import SIZE, all_captions, parse_caption, render, sample_scene
from toy.training import DEVICE, ROOT, WORK, fit, rng_of, to_batch

SCENES = 30_720                                                   # rendered once, in training captions only
VAE_STEPS, VAE_CROP_STEPS = 3000, 2300                            # the first ones on crops around an object
SD_STEPS = (3550, 5000)                                           # layout; shapes, twice


def save_arrays(path, **arrays):
    """All of it or nothing."""
    with open(path.with_suffix(".tmp"), "wb") as f:
        np.savez(f, **arrays)
    path.with_suffix(".tmp").replace(path)


def scenes():
    """The training scenes: images (N, 64, 64, 3) uint8, captions, and an object's centre for each; rendered once and cached."""
    path = WORK / "scenes.npz"
    if not path.exists():
        WORK.mkdir(exist_ok=True)
        images, captions, centres = np.empty((SCENES, SIZE, SIZE, 3), np.uint8), [], []
        for i in tqdm(range(SCENES), desc="scenes", mininterval=10):
            rng = rng_of("scene", i)
            scene = sample_scene(rng)
            images[i] = np.round(render(scene)[0] * 255)
            captions.append(scene["caption"])
            o = scene["objects"][rng.integers(len(scene["objects"]))]
            centres.append((o["x"], o["y"]))
        save_arrays(path, images=images, captions=np.array(captions), centres=np.array(centres, np.float32))
    return np.load(path)


def make_vae():
    """AutoencoderKL, 64x64 -> 4 x 16 x 16. Small crops first: on full images the background drowns the edges of the objects."""
    data = scenes()
    images, centres = data["images"], data["centres"]
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                        layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=SIZE, mid_block_add_attention=False,
                        scaling_factor=1.).to(DEVICE)

    def step_fn(step, rng):
        index = rng.integers(len(images), size=32 if step < VAE_CROP_STEPS else 16)
        batch = [images[i] for i in index]
        if step < VAE_CROP_STEPS:
            corner = np.clip(centres[index] * SIZE - 16 + rng.integers(-8, 9, (len(index), 2)), 0, SIZE - 32).astype(int)
            batch = [b[y:y + 32, x:x + 32] for b, (x, y) in zip(batch, corner)]
        x = to_batch([b.astype(np.float32) / 127.5 - 1 for b in batch])
        with torch.autocast(DEVICE.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - x
        mse = error.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return mse + .2 * error.abs().mean() + 1e-5 * kl, dict(psnr=10 * torch.log10(4 / mse.detach()))

    fit("vae", {"vae": vae}, step_fn, VAE_STEPS, lr=2e-3, ema=.995)
    whiten(vae, images)
    save(vae, "vae")


@torch.no_grad()
def whiten(vae, images):
    """Folds the latents' mean and std into quant_conv and post_quant_conv: latents of unit variance, scaling_factor 1, the same pictures."""
    z = torch.cat([encode(vae, images[i:i + 64]) for i in range(0, 2048, 64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    q, p = vae.quant_conv, vae.post_quant_conv
    q.weight[:4] /= std[:, None, None, None]
    q.bias[:4] = (q.bias[:4] - mean) / std
    q.bias[4:] -= 2 * std.log()                                   # log-variance
    p.bias += p.weight[:, :, 0, 0] @ mean
    p.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(vae, images):
    """(B, 64, 64, 3) uint8 -> latents (B, 4, 16, 16), the posterior's mean."""
    return vae.encode(to_batch([i.astype(np.float32) / 127.5 - 1 for i in images])).latent_dist.mean


def save(module, name):
    module.to(torch.float16).save_pretrained(ROOT / "sd" / name)
    module.to(torch.float32)


def load_vae():
    return AutoencoderKL.from_pretrained(ROOT / "sd" / "vae").to(DEVICE).eval().requires_grad_(False)


def latents_of_scenes():
    """Latents (N, 4, 16, 16) and captions of the training scenes, encoded once and cached."""
    path = WORK / "latents.npz"
    data = scenes()
    if not path.exists():
        vae, images = load_vae(), data["images"]
        z = [encode(vae, images[i:i + 64]).cpu() for i in tqdm(range(0, len(images), 64), desc="latents", mininterval=10)]
        save_arrays(path, latents=torch.cat(z).numpy())
    return torch.from_numpy(np.load(path)["latents"]), [str(c) for c in data["captions"]]


# Self- and cross-attention at 16x16, 8x8 and 4x4: the 4x4 level sees the whole scene.
UNET = dict(block_out_channels=(32, 64, 96), down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
            layers_per_block=1, attention_head_dim=2, norm_num_groups=8)


def make_unet(shape):
    return UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4, cross_attention_dim=96, **shape).to(DEVICE)


def make_scheduler():
    """Stable Diffusion's scaled-linear betas, leading spacing with offset 1; v prediction, as Stable Diffusion 2.1's: see train_sd."""
    return DDIMScheduler(num_train_timesteps=1000, beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction")


def train_sd(name, shape, layout_steps, shape_steps, batch=32):
    """The U-Net and its text encoder, which starts as toy/clip's (Stable Diffusion's is CLIP's as well) and is trained with it.

    With epsilon prediction and min-SNR weights a U-Net this small never learned "left of" and "above": they decide the noisiest steps, where it
    was busy copying the noise (error of x0 at t = 950 after 400 steps: 1.27, worse than black; .66 with v prediction). Hence v prediction, and the
    noisy steps count a little more: the error of x0 is weighted with min(SNR + .3, 5), where min-SNR has min(SNR, 5) and plain v SNR + 1. That
    brings the layout (after 3,000 steps the model prefers the right order to the exchanged one in .95 of the scenes at t = 900) but leaves shapes
    blurred; the second part of the training weights with min(SNR + .05, 5), and brings the shapes.
    """
    latents, captions = latents_of_scenes()
    tokenizer = judges.make_tokenizer()
    ids = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    torch.manual_seed(0)
    unet, text_encoder = make_unet(shape), CLIPTextModel.from_pretrained(ROOT / "clip", dtype=torch.float32).to(DEVICE)
    alphas = make_scheduler().alphas_cumprod.to(DEVICE)

    def step_fn(step, rng, noisy):
        index = rng.integers(len(latents), size=batch)
        x0 = latents[index].to(DEVICE)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(DEVICE)
        t = torch.from_numpy((rng.permutation(batch) + rng.random(batch)) / batch * 1000).long().to(DEVICE)       # stratified
        a = alphas[t][:, None, None, None]
        tokens = torch.where(torch.from_numpy(rng.random(batch) < .1)[:, None], empty, ids[index]).to(DEVICE)      # for guidance
        v = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text_encoder(tokens).last_hidden_state).sample
        error = (v - (a.sqrt() * noise - (1 - a).sqrt() * x0)).square().mean((1, 2, 3))
        snr = (a / (1 - a)).flatten()
        loss = (error * (snr + noisy).clamp(max=5) / (snr + 1)).mean()
        return loss, dict(mse=error.detach().mean())

    modules = {"unet": unet, "text_encoder": text_encoder}
    fit(name, modules, functools.partial(step_fn, noisy=.3), 6000, lr=1e-3, ema=.999, stop=layout_steps)
    for part in ("shapes", "more"):                              # a second cycle of the learning rate: one object .56 right after the first
        for module in modules.values():
            module.requires_grad_(True)
        fit(f"{name}_{part}", modules, functools.partial(step_fn, noisy=.05), shape_steps, lr=7e-4, ema=.999)
    return unet, text_encoder, tokenizer


def make_sd():
    """toy/sd, a folder that StableDiffusionPipeline.from_pretrained opens."""
    unet, text_encoder, tokenizer = train_sd("sd", UNET, *SD_STEPS)
    save_pipeline(StableDiffusionPipeline(vae=load_vae(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(),
                                          safety_checker=None, feature_extractor=None, requires_safety_checker=False), ROOT / "sd")


def make_flux(compiled=False):
    """toy/flux, a folder that FluxPipeline.from_pretrained opens."""
    save_pipeline(flux_model.make_flux(load_vae(), *latents_of_scenes(), compiled), ROOT / "flux")


def save_pipeline(pipe, folder):
    pipe.to(torch.float16).save_pretrained(folder)
    path = folder / "vae" / "config.json"                        # it names the folder it was loaded from: no path of this machine
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "_name_or_path" not in line))
    for path in folder.glob("text_encoder*/config.json"):        # transformers computes in the dtype it finds here, diffusers in fp32: a mixed pipeline
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def make_data():
    """prompts_train.txt, prompts_test.txt (the held-out combinations, shuffled, single things first) and images/ with captions."""
    train, test = all_captions(test=False), all_captions(test=True)
    rng = rng_of("prompts")
    singles = [c for c in test if len(parse_caption(c)[0]) == 1]
    pairs = [c for c in test if c not in singles]
    prompts = {"train": [train[i] for i in rng.permutation(len(train))[:240]], "test": singles + [pairs[i] for i in rng.permutation(len(pairs))]}
    for name, lines in prompts.items():
        (ROOT / f"prompts_{name}.txt").write_text("\n".join(lines) + "\n")
    folder = ROOT / "images"
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(500):
        scene = sample_scene(rng_of("image", i))
        rows.append(json.dumps({"file_name": f"{i:04d}.png", "text": scene["caption"]}))
        Image.fromarray(np.round(render(scene)[0] * 255).astype(np.uint8)).save(folder / f"{i:04d}.png", optimize=True)
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


STAGES = dict(data=make_data, clip=judges.make_clip, vae=make_vae, sd=make_sd, flux=make_flux, pref=judges.make_pref, pref_b=judges.make_pref_b,
              dino=judges.make_dino, detector=judges.make_detector, detector_b=judges.make_detector_b)
OUTPUT = dict(data="images/metadata.jsonl", vae="sd/vae/config.json", sd="sd/model_index.json", flux="flux/model_index.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="in this order; all that are not built yet")
    parser.add_argument("--compile", action="store_true", help="torch.compile for toy/flux: its steps take two thirds of the time; wants a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stages = dict(STAGES, flux=functools.partial(make_flux, args.compile))
    for stage in args.stages or [s for s in STAGES if not (ROOT / OUTPUT.get(s, f"{s}/config.json")).exists()]:
        stages[stage]()


if __name__ == "__main__":
    main()
