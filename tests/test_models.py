"""models/: every family has the same functions, and loads the published layout or says why not.
And what is particular to one family: SD3.5 without T5, Z-Image's prompts of any length."""

import inspect
import shutil
from pathlib import Path

import pytest
import random_weights
import torch
from conftest import CPU, PROMPTS, break_weights, pipeline_images, run_script, write_sd35
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import dfusion_dpo
import refl
from common import decode_in_parts, denoise, generator, initial_latents, load_model
from common import make_scheduler, make_trainable, sample
from data.prompts import condition
from models import MODELS, flux, sd35, unet, z_image
from run_folder import model_family

LONG = "a red circle above a blue square and a green triangle below a yellow star " * 3
# Billions of parameters: denoisers, and the text encoders that make a GPU full.
SIZES = [
    ("sd35", "transformer", 2.24),
    ("sd35", "text_encoder_3", 4.76),
    ("z-image", "transformer", 6.15),
    ("z-image", "text_encoder", 4.02),
]


def test_all_families_have_the_same_names_and_signatures():
    def interface(family):
        functions = {}
        for name, function in inspect.getmembers(family, inspect.isfunction):
            if function.__module__ == family.__name__:
                functions[name] = inspect.signature(function)
        constants = [name for name in vars(family) if name.isupper()]
        return functions, sorted(constants)

    assert len(interface(unet)[0]) == 7 and len(interface(unet)[1]) == 4
    for family in (flux, sd35, z_image):
        assert interface(family) == interface(unet)


def test_models_are_given_the_settings_of_their_family(world):
    names = dict(sd="sd15", sdxl="sdxl", flux="flux-schnell", flux_dev="flux-dev", sd35="sd35")
    for folder, row in dict(**names, z_image="z-image").items():
        assert model_family(getattr(world, folder)) == row
        assert row in MODELS


@pytest.mark.parametrize("family, shift", [("sd35", 3), ("z_image", 6)])
def test_the_grid_is_the_pipelines_own(world, family, shift):
    model = load_model(getattr(world, family), CPU)
    sigmas = make_scheduler(model, "euler", 10).sigmas
    # z-image starts from 1 - i / N. SD3's grid goes down to a sigma that is already shifted.
    last = 0.1 if family == "z_image" else 0.003 / 1.002
    u = torch.linspace(1, last, 10)
    torch.testing.assert_close(sigmas[:-1], shift * u / (1 + (shift - 1) * u))
    assert sigmas[-1] == 0
    assert sigmas[-2].item() == pytest.approx(dict(sd35=0.0089, z_image=0.4)[family], abs=5e-5)


# --------------------------------------------------------------------------------------------------
# One family


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_z_images_prompts_have_any_length_and_padding_changes_nothing(world, guidance_scale):
    """Images alone, together with a longer prompt, and from the pipeline are the same."""
    model = load_model(world.z_image, CPU)
    scheduler = make_scheduler(model, "euler", 3)
    prompts = [PROMPTS[0], LONG, PROMPTS[2], PROMPTS[1]]
    x_T = initial_latents(model, [generator(0, "test", i) for i in range(4)])

    def images(rows):
        cond = condition(model, [prompts[i] for i in rows])
        uncond = condition(model, [None] * len(rows))
        steps = (0, 3, None, guidance_scale, uncond)
        return decode_in_parts(model, sample(model, scheduler, x_T[rows], cond, *steps), 4)

    together = images([0, 1, 2, 3])
    for i in range(4):
        torch.testing.assert_close(images([i]), together[i : i + 1], rtol=0, atol=1e-5)
    theirs = pipeline_images(model.pipe, prompts, x_T, 3, guidance_scale)
    torch.testing.assert_close(together, theirs, rtol=0, atol=1e-5)
    # The transformer itself pads to a multiple of 32.
    assert condition(model, prompts)["lengths"].tolist() == [5, 47, 5, 9]


def test_sd35_without_t5(tmp_path):
    """The folder that models/sd35.py describes: T5's states are zeros, as in diffusers."""
    folder = write_sd35(tmp_path / "full", seed=5)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "text_encoder_3").exists()
    model = load_model(str(tmp_path / "without"), CPU)
    cond = condition(model, PROMPTS)
    assert cond["encoder_hidden_states"][:, 12:].abs().max() == 0  # after CLIP's 12 tokens
    x_T = initial_latents(model, [generator(0, "test", i) for i in range(4)])
    scheduler = make_scheduler(model, "euler", 3)
    options = (0, 3, None, 5.0, condition(model, [None] * 4))
    ours = decode_in_parts(model, sample(model, scheduler, x_T, cond, *options), 4)
    theirs = pipeline_images(pipe, PROMPTS, x_T, 3, 5.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sd35", "z_image"])
def test_bf16_checkpointing_and_compiled_blocks(world, family):
    """What runs on a GPU: fp32 LoRAs on bf16 weights, and whole graphs, here without a compiler."""
    model = load_model(getattr(world, family), CPU)
    params = make_trainable(model, 4)
    cond = condition(model, PROMPTS)
    uncond = condition(model, [None] * 4)
    x_T = initial_latents(model, [generator(0, "test", i) for i in range(4)])
    t = torch.tensor(501.0)

    def output_and_gradient():
        output = denoise(model, x_T, t, cond, 3.0, uncond)
        grads = torch.autograd.grad(output.square().mean(), params)
        return output.detach(), torch.cat([g.flatten() for g in grads])

    output, gradient = output_and_gradient()
    model.denoiser.enable_gradient_checkpointing()
    torch.testing.assert_close(output_and_gradient(), (output, gradient))
    model.denoiser.disable_gradient_checkpointing()
    model.denoiser.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(output_and_gradient(), (output, gradient))

    model = load_model(getattr(world, family), CPU)
    torch.nn.Module.to(model.denoiser, torch.bfloat16)
    model.dtype = torch.bfloat16
    params = make_trainable(model, 4)
    coarse, coarse_gradient = output_and_gradient()
    assert coarse.dtype == coarse_gradient.dtype == torch.float32
    assert 0 < (coarse - output).abs().max() < 0.05 * output.abs().max()
    assert torch.cosine_similarity(coarse_gradient, gradient, dim=0) > 0.99


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", ["sd35", "z-image"])
def test_the_published_layout_loads_and_samples(tmp_path, name):
    """SD3.5: only the text encoders have an fp16 variant, and T5's comes in several files."""
    folder = random_weights.write(name, tmp_path)
    names = {str(path.relative_to(folder)) for path in Path(folder).rglob("*.safetensors")}
    if name == "sd35":
        assert any(file.startswith("text_encoder_3/model.fp16-00002-of-") for file in names)
        assert "transformer/diffusion_pytorch_model.safetensors" in names
    model = load_model(folder, CPU)
    assert model.resolution == 64 and model.latent_shape == (16, 8, 8)
    cond = condition(model, PROMPTS[:2])
    x_T = initial_latents(model, [generator(0, "test", i) for i in range(2)])
    latents = sample(model, make_scheduler(model, "euler", 2), x_T, cond, 0, 2, None)
    assert latents.isfinite().all()
    # The weights are those of the files, and not random.
    part = "text_encoder_2" if name == "sd35" else "text_encoder"
    (file,) = (Path(folder) / part).glob("*.safetensors")
    stored = load_file(file)
    for key, weight in getattr(model.pipe, part).named_parameters():
        key = key if name == "sd35" else f"model.{key}"
        assert torch.equal(weight, stored[key].float())


@pytest.mark.parametrize("name, part, billions", SIZES)
def test_full_size_networks_have_the_published_size(name, part, billions):
    with torch.device("meta"):
        network = random_weights.flow_modules(name, True, 49408)[part]()
    parameters = {id(p): p.numel() for p in network.parameters()}
    assert sum(parameters.values()) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("harm", ["cut", "absent", "key", "shape"])
@pytest.mark.parametrize(
    "family, part",
    [("sd35", "transformer"), ("sd35", "text_encoder_3"), ("z_image", "text_encoder")],
)
def test_broken_weights_of_flows_are_one_line(world, tmp_path, family, part, harm):
    folder = tmp_path / "model"
    shutil.copytree(getattr(world, family), folder)
    (path,) = (folder / part).glob("*.safetensors")
    break_weights(path, harm)
    with pytest.raises(SystemExit, match=f"--model {folder}") as error:
        load_model(str(folder), CPU)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("family", ["sd35", "z_image"])
def test_what_a_flow_cannot_do_is_one_line(world, family):
    model = getattr(world, family)
    message = run_script(dfusion_dpo, "--model", model, "--reward", "toy_clip", "--out", "run")
    assert f"--model {model}: there are no settings for it" in message
    words = ["--model", model, "--reward", "toy_pref", "--prompts", world.prompts]
    words += ["--test_prompts", world.one, "--lora_rank", 0, "--out", "run", "--train_steps", 1]
    assert "--lora_rank 0 is for U-Nets" in run_script(refl, *words)
    with pytest.raises(SystemExit, match="flows, and only they, need euler"):
        make_scheduler(load_model(model, CPU), "ddpm", 4)
