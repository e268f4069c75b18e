"""Builds the toy world from nothing: prompts, images and networks.

  $ python toy/make.py                    # everything that is not there yet, in order
  $ python toy/make.py --stages vae sd    # some stages alone

You can stop it with Ctrl-C and start it again as you like. A stage keeps its progress in toy/work/
and continues from there. To build it anew, delete that folder and the network's own. Every draw
comes from (stage, seed, step), and we use one thread, so that a build repeats on the same machine.
It runs on CUDA if there is one. toy/measure.py makes its pictures and figures.
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

# Run as a script: Python finds the package `toy` in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toy import flux_model, judges
from toy.scenes import SIZE, all_captions, parse_caption, render, sample_scene
from toy.training import DEVICE, ROOT, WORK, fit, rng_of, to_batch

SCENES = 30_720  # rendered once, of training captions only
VAE_STEPS = 3000
VAE_CROP_STEPS = 2300  # the first ones are on crops around an object
SD_STEPS = (3550, 5000)  # layout, then shapes twice
# Self- and cross-attention at 16x16, 8x8 and 4x4. The 4x4 level sees the whole scene.
UNET = dict(
    block_out_channels=(32, 64, 96),
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=8,
)


# --------------------------------------------------------------------------------------------------
# The training scenes


def save_arrays(path, **arrays):
    """Writes an .npz file, all of it or nothing."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)


def to_bytes(image):
    """(H, W, 3) in [0, 1] -> the same in 0 .. 255, rounded."""
    return np.round(image * 255).astype(np.uint8)


def scenes():
    """The training scenes, rendered once and cached.

    images (N, 64, 64, 3) uint8, captions (N,), and for each scene an object's center (N, 2).
    """
    path = WORK / "scenes.npz"
    if not path.exists():
        WORK.mkdir(exist_ok=True)
        images = np.empty((SCENES, SIZE, SIZE, 3), np.uint8)
        captions = []
        centres = []
        for i in tqdm(range(SCENES), desc="scenes", mininterval=10):
            rng = rng_of("scene", i)
            scene = sample_scene(rng)
            images[i] = to_bytes(render(scene)[0])
            captions.append(scene["caption"])
            o = scene["objects"][rng.integers(len(scene["objects"]))]
            centres.append((o["x"], o["y"]))
        save_arrays(
            path,
            images=images,
            captions=np.array(captions),
            centres=np.array(centres, np.float32),
        )
    return np.load(path)


def to_pixels(images):
    """A list of (H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1] on DEVICE, as the VAE takes them."""
    return to_batch([image.astype(np.float32) / 127.5 - 1 for image in images])


# --------------------------------------------------------------------------------------------------
# VAE


def make_vae():
    """toy/sd/vae, an AutoencoderKL from 64 x 64 to 4 x 16 x 16.

    It sees small crops first: on full images the background drowns the edges of the objects.
    """
    data = scenes()
    images = data["images"]
    centres = data["centres"]
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    ).to(DEVICE)

    def step_fn(step, rng):
        is_crop = step < VAE_CROP_STEPS
        index = rng.integers(len(images), size=32 if is_crop else 16)
        batch = [images[i] for i in index]
        if is_crop:
            # 32 x 32 pixels with the object's center in their middle half.
            middle = centres[index] * SIZE - 16 + rng.integers(-8, 9, (len(index), 2))
            corners = np.clip(middle, 0, SIZE - 32).astype(int)
            batch = [image[y : y + 32, x : x + 32] for image, (x, y) in zip(batch, corners)]
        x = to_pixels(batch)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - x
        mse = error.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = mse + 0.2 * error.abs().mean() + 1e-5 * kl
        return loss, dict(psnr=10 * torch.log10(4 / mse.detach()))

    fit("vae", {"vae": vae}, step_fn, VAE_STEPS, lr=2e-3, ema=0.995)
    whiten(vae, images)
    save(vae, "vae")


@torch.no_grad()
def whiten(vae, images):
    """Folds the latents' mean and std into quant_conv and post_quant_conv.

    Then latents have unit variance and the scaling factor is 1, with the same pictures.
    """
    latents = torch.cat([encode(vae, images[i : i + 64]) for i in range(0, 2048, 64)])
    mean = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    into = vae.quant_conv
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    # The other four channels are the log-variance.
    into.bias[4:] -= 2 * std.log()
    back = vae.post_quant_conv
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(vae, images):
    """(B, 64, 64, 3) uint8 -> latents (B, 4, 16, 16), the posterior's mean."""
    return vae.encode(to_pixels(images)).latent_dist.mean


def save(module, name):
    """Writes toy/sd/<name>/ in fp16."""
    module.to(torch.float16).save_pretrained(ROOT / "sd" / name)
    module.to(torch.float32)


def load_vae():
    vae = AutoencoderKL.from_pretrained(ROOT / "sd" / "vae")
    return vae.to(DEVICE).eval().requires_grad_(False)


def latents_of_scenes():
    """Latents (N, 4, 16, 16) and captions of the training scenes, encoded once and cached."""
    path = WORK / "latents.npz"
    data = scenes()
    if not path.exists():
        vae = load_vae()
        images = data["images"]
        parts = []
        for i in tqdm(range(0, len(images), 64), desc="latents", mininterval=10):
            parts.append(encode(vae, images[i : i + 64]).cpu())
        save_arrays(path, latents=torch.cat(parts).numpy())
    latents = torch.from_numpy(np.load(path)["latents"])
    return latents, [str(caption) for caption in data["captions"]]


# --------------------------------------------------------------------------------------------------
# The diffusion models


def make_unet(shape):
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, cross_attention_dim=96, **shape
    )
    return unet.to(DEVICE)


def make_scheduler():
    """Stable Diffusion's scaled-linear betas, with leading spacing and offset 1.

    It predicts v, as Stable Diffusion 2.1's does: see train_sd.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def train_sd(name, shape, layout_steps, shape_steps, batch=32):
    """Trains the U-Net, and with it its text encoder. Returns both and the tokenizer.

    The text encoder starts as toy/clip's, just as Stable Diffusion's is CLIP's.

    With epsilon prediction and min-SNR weights, a U-Net this small never learned "left of" and
    "above". The noisiest steps decide them, and there it was busy copying the noise. The error of
    x0 at t = 950 after 400 steps was 1.27, which is worse than black, and 0.66 with v prediction.
    Hence v prediction, and the noisy steps count a little more: we weight the error of x0 with
    min(SNR + 0.3, 5), where min-SNR has min(SNR, 5) and plain v has SNR + 1. That brings the
    layout. After 3,000 steps the model prefers the right order to the exchanged one in 0.95 of the
    scenes at t = 900, but shapes stay blurred. The second part of the training weights with
    min(SNR + 0.05, 5) and brings the shapes.
    """
    latents, captions = latents_of_scenes()
    tokenizer = judges.make_tokenizer()
    padding = dict(padding="max_length", max_length=tokenizer.model_max_length)
    ids = tokenizer(captions, return_tensors="pt", **padding).input_ids
    empty = tokenizer("", return_tensors="pt", **padding).input_ids
    torch.manual_seed(0)
    unet = make_unet(shape)
    text_encoder = CLIPTextModel.from_pretrained(ROOT / "clip", dtype=torch.float32).to(DEVICE)
    alphas = make_scheduler().alphas_cumprod.to(DEVICE)

    def step_fn(step, rng, noisy):
        index = rng.integers(len(latents), size=batch)
        x0 = latents[index].to(DEVICE)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(DEVICE)
        # One timestep in each of `batch` equal parts of 0 .. 999.
        t = (rng.permutation(batch) + rng.random(batch)) / batch * 1000
        t = torch.from_numpy(t).long().to(DEVICE)
        a = alphas[t][:, None, None, None]
        # One caption in ten is left out, for guidance.
        is_empty = torch.from_numpy(rng.random(batch) < 0.1)[:, None]
        tokens = torch.where(is_empty, empty, ids[index]).to(DEVICE)
        states = text_encoder(tokens).last_hidden_state
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        v = unet(x, t, states).sample
        target = a.sqrt() * noise - (1 - a).sqrt() * x0
        error = (v - target).square().mean((1, 2, 3))
        # The error of v is SNR + 1 times that of x0.
        snr = (a / (1 - a)).flatten()
        loss = (error * (snr + noisy).clamp(max=5) / (snr + 1)).mean()
        return loss, dict(mse=error.detach().mean())

    modules = {"unet": unet, "text_encoder": text_encoder}
    step_layout = functools.partial(step_fn, noisy=0.3)
    fit(name, modules, step_layout, 6000, lr=1e-3, ema=0.999, stop=layout_steps)
    # The shapes take two cycles of the learning rate. Right after the first, one object is right in
    # 0.56.
    step_shapes = functools.partial(step_fn, noisy=0.05)
    for part in ("shapes", "more"):
        flux_model.unfreeze(modules)
        fit(f"{name}_{part}", modules, step_shapes, shape_steps, lr=7e-4, ema=0.999)
    return unet, text_encoder, tokenizer


def make_sd():
    """toy/sd, a folder that StableDiffusionPipeline.from_pretrained opens."""
    unet, text_encoder, tokenizer = train_sd("sd", UNET, *SD_STEPS)
    pipe = StableDiffusionPipeline(
        vae=load_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipe, ROOT / "sd")


def make_flux(compiled=False):
    """toy/flux, a folder that FluxPipeline.from_pretrained opens."""
    latents, captions = latents_of_scenes()
    pipe = flux_model.make_flux(load_vae(), latents, captions, compiled)
    save_pipeline(pipe, ROOT / "flux")


def save_pipeline(pipe, folder):
    """Writes a pipeline in fp16, without any path of this machine."""
    pipe.to(torch.float16).save_pretrained(folder)
    # The VAE's config names the folder that it was loaded from.
    path = folder / "vae" / "config.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "_name_or_path" not in line))
    # transformers computes in the dtype that it finds here, but diffusers in fp32. Without this
    # change the pipeline would be mixed.
    for path in folder.glob("text_encoder*/config.json"):
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


# --------------------------------------------------------------------------------------------------
# Prompts and images


def make_data():
    """prompts_train.txt, prompts_test.txt, and images/ with captions.

    The test prompts are the held-out combinations, shuffled, the single things first.
    """
    train = all_captions(test=False)
    test = all_captions(test=True)
    rng = rng_of("prompts")
    singles = [caption for caption in test if len(parse_caption(caption)[0]) == 1]
    pairs = [caption for caption in test if caption not in singles]
    train_prompts = [train[i] for i in rng.permutation(len(train))[:240]]
    test_prompts = singles + [pairs[i] for i in rng.permutation(len(pairs))]
    (ROOT / "prompts_train.txt").write_text("\n".join(train_prompts) + "\n")
    (ROOT / "prompts_test.txt").write_text("\n".join(test_prompts) + "\n")

    folder = ROOT / "images"
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(500):
        scene = sample_scene(rng_of("image", i))
        name = f"{i:04d}.png"
        rows.append(json.dumps({"file_name": name, "text": scene["caption"]}))
        Image.fromarray(to_bytes(render(scene)[0])).save(folder / name, optimize=True)
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


# --------------------------------------------------------------------------------------------------

STAGES = dict(
    data=make_data,
    clip=judges.make_clip,
    vae=make_vae,
    sd=make_sd,
    flux=make_flux,
    pref=judges.make_pref,
    pref_b=judges.make_pref_b,
    dino=judges.make_dino,
    detector=judges.make_detector,
    detector_b=judges.make_detector_b,
)
# The file that says that a stage is done. For the others it is <stage>/config.json.
OUTPUT = dict(
    data="images/metadata.jsonl",
    vae="sd/vae/config.json",
    sd="sd/model_index.json",
    flux="flux/model_index.json",
)


def is_built(stage):
    return (ROOT / OUTPUT.get(stage, f"{stage}/config.json")).exists()


def main(argv=None):
    parser = argparse.ArgumentParser(
        "make.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, help="by default all that are not built yet")
    add(
        "--compile",
        action="store_true",
        help="torch.compile toy/flux: a step takes two thirds of the time; needs a C++ compiler",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for stage in args.stages or [stage for stage in STAGES if not is_built(stage)]:
        if stage == "flux":
            make_flux(args.compile)
        else:
            STAGES[stage]()


if __name__ == "__main__":
    main()
