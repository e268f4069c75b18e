"""The shipped toy diffusion models: open with stock diffusers, still make the stored picture, and are as good as toy/README.md says."""
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from PIL import Image

import common
from toy import measure, oracle
from toy.training import ROOT


def test_opens_with_stock_diffusers_in_one_dtype():
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "sd")
    dtypes = {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()}
    assert dtypes == {torch.float32} and pipe.safety_checker is None
    crossed = {name.split(".")[0] for name, m in pipe.unet.named_modules() if name.endswith("attn2")}
    assert crossed == {"down_blocks", "mid_block", "up_blocks"}
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()


def test_the_flow_opens_with_stock_diffusers_in_one_dtype_and_is_small():
    pipe = FluxPipeline.from_pretrained(ROOT / "flux")
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for m in parts for p in m.parameters()} == {torch.float32} and not pipe.transformer.config.guidance_embeds
    assert sum(p.stat().st_size for p in (ROOT / "flux").rglob("*") if p.is_file()) < 6e6


def test_weights_are_half_precision_and_small():
    total = sum(p.stat().st_size for p in ROOT.rglob("*.safetensors") if "work" not in p.relative_to(ROOT).parts)
    assert 5e6 < total < 21e6                                                                # flux 5.8, all else 14.2
    assert all("fp16" not in p.name for p in ROOT.rglob("*.safetensors"))                    # plain names: from_pretrained needs no variant


@pytest.mark.parametrize("name, picture, sampler, floor", [("toy", "reference", measure.SAMPLER, .8), ("toy-flux", "flux_reference", measure.FLOW_SAMPLER, .7)])
def test_the_stored_picture_and_a_floor_of_quality(name, picture, sampler, floor):           # toy/README.md has the rates themselves
    model = common.load_model(name, torch.device("cpu"))
    stored = np.asarray(Image.open(ROOT / "pictures" / f"{picture}.png"), dtype=np.float32) / 255
    images = common.generate(model, ["a red circle", "a blue square left of a yellow circle"], 0, sampler)
    now = torch.cat(list(images), 2).permute(1, 2, 0).numpy()
    assert stored.shape == now.shape and np.abs(stored - now).mean() < 4 / 255

    prompts = ["a yellow circle", "a purple circle", "a blue square"]                        # held out; circles and squares, not stars
    images = common.generate(model, prompts, 1, sampler, num_images=8)
    read = [oracle.correct(image, prompts[i // 8]) for i, image in enumerate(images)]
    assert read.count(True) >= floor * len(read), read
