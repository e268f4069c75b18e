"""The shipped toy flow: opens with stock diffusers, makes the stored picture, and is as good as toy/README.md says."""
import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

import common
from toy import measure, oracle
from toy.training import ROOT

FLOOR = .55                                                                                  # toy/README.md has the rate itself


def test_opens_with_stock_diffusers_in_one_dtype_and_is_small():
    pipe = FluxPipeline.from_pretrained(ROOT / "flux")
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for m in parts for p in m.parameters()} == {torch.float32} and not pipe.transformer.config.guidance_embeds
    assert sum(p.stat().st_size for p in (ROOT / "flux").rglob("*") if p.is_file()) < 6e6


def test_the_stored_picture_and_a_floor_of_quality():
    model = common.load_model("toy-flux", torch.device("cpu"))
    stored = np.asarray(Image.open(ROOT / "pictures" / "flux_reference.png"), dtype=np.float32) / 255
    images = common.generate(model, ["a red circle", "a blue square left of a yellow circle"], 0, measure.FLOW_SAMPLER)
    now = torch.cat(list(images), 2).permute(1, 2, 0).numpy()
    assert stored.shape == now.shape and np.abs(stored - now).mean() < 4 / 255

    prompts = ["a yellow circle", "a purple circle", "a blue square"]                        # held out; circles and squares, not stars
    images = common.generate(model, prompts, 1, measure.FLOW_SAMPLER, num_images=8)
    read = [oracle.recognised(image, prompts[i // 8]) for i, image in enumerate(images)]
    assert sum(read) >= FLOOR * len(read), read
