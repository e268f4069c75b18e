"""Invariant 3: with its adapter off the model is the base model, exactly. And what belongs to it:
the folded LoRA, its start, its file, and files of other programs."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import CPU, PROMPTS, ROOT, pipeline_images, random_lora, same_tensors
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import LORA_FILE, base_model, decode, denoise, generator, initial_latents, load_lora
from common import load_model, make_scheduler, make_trainable, merged, sample
from data.prompts import condition
from run_folder import generate

T = torch.tensor(501)
SAMPLER = dict(scheduler="ddim", eta=0.0, num_inference_steps=4, guidance_scale=1.0)


def in_dtype(model, dtype):
    """What load_model does on CUDA, here on a CPU."""
    torch.nn.Module.to(model.denoiser, dtype)
    model.dtype = dtype


def with_lora(folder, size=0.3, dtype=None):
    """A fresh model with a LoRA that changes its output."""
    model = load_model(folder, CPU)
    if dtype is not None:
        in_dtype(model, dtype)
    random_lora(make_trainable(model, 4), size)
    return model


def start(model):
    latents = initial_latents(model, [generator(0, "test", i) for i in range(len(PROMPTS))])
    return latents, condition(model, PROMPTS)


def lora_layers(model):
    return [layer for layer in model.denoiser.modules() if hasattr(layer, "get_base_layer")]


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd35", "z_image"])
def test_base_model_is_the_base_exactly_and_merged_is_the_lora(world, family):
    model = with_lora(getattr(world, family))
    plain = load_model(getattr(world, family), CPU)
    latents, cond = start(model)
    weights = {name: p.detach().clone() for name, p in model.denoiser.named_parameters()}
    with torch.no_grad():
        base = denoise(plain, latents, T, cond)
        tuned = denoise(model, latents, T, cond)
        effect = (tuned - base).abs().max()
        assert effect > 0.01
        with base_model(model):
            assert torch.equal(denoise(model, latents, T, cond), base)
            with merged(model):
                assert torch.equal(denoise(model, latents, T, cond), base)
        with merged(model):
            folded = denoise(model, latents, T, cond)
        # A sum in another order, not another model.
        assert 0 < (folded - tuned).abs().max() < 2e-4 * effect
        for inside in (merged, base_model):
            with contextlib.suppress(KeyboardInterrupt), inside(model):
                raise KeyboardInterrupt
        assert torch.equal(denoise(model, latents, T, cond), tuned)
    for name, p in model.denoiser.named_parameters():
        assert torch.equal(p, weights[name])


def test_no_gradient_is_lost_silently_in_a_merged_lora(world):
    model = with_lora(world.sd)
    latents, cond = start(model)
    with merged(model):
        with pytest.raises(RuntimeError, match="merged"):
            denoise(model, latents, T, cond)
    assert denoise(model, latents, T, cond).requires_grad


def test_merged_folds_every_attention_projection(world):
    model = with_lora(world.sd)
    layers = lora_layers(model)
    num_attentions = sum(hasattr(module, "to_q") for module in model.denoiser.modules())
    assert len(layers) == 4 * num_attentions > 0  # to_q, to_k, to_v and to_out.0
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    with merged(model):
        for layer, weight in zip(layers, before):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            torch.testing.assert_close(layer.get_base_layer().weight, weight + delta)
            assert layer.disable_adapters
    assert not any(layer.disable_adapters for layer in layers)


@pytest.mark.parametrize("size, folds", [(1e-3, False), (1.0, True)])
def test_bf16_weights_take_only_a_lora_that_they_can_hold(world, size, folds):
    model = with_lora(world.sd, size, dtype=torch.bfloat16)
    layers = lora_layers(model)
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    with merged(model):
        assert all(layer.disable_adapters == folds for layer in layers)
        changed = [
            not torch.equal(layer.get_base_layer().weight, weight)
            for layer, weight in zip(layers, before)
        ]
        assert any(changed) == folds
    for layer, weight in zip(layers, before):
        assert torch.equal(layer.get_base_layer().weight, weight)


def test_an_fp32_lora_trains_on_bf16_weights(world):
    """What a GPU runs, on a CPU: only the LoRA moves, and its gradients are fp32."""
    model = load_model(world.sd, CPU)
    in_dtype(model, torch.bfloat16)
    params = make_trainable(model, 4)
    named = dict(model.denoiser.named_parameters())
    frozen = {name: p.detach().clone() for name, p in named.items() if not p.requires_grad}
    assert all(p.dtype == torch.float32 for p in params)
    assert all(p.dtype == torch.bfloat16 for p in frozen.values())
    optimizer = torch.optim.AdamW(params, lr=1e-2, eps=1e-15)
    before = [p.detach().clone() for p in params]
    latents, cond = start(model)
    for _ in range(2):  # at first only B has a gradient, because B is zero
        noise_pred = denoise(model, latents, torch.tensor(226), cond)
        assert noise_pred.dtype == torch.float32
        noise_pred.square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in params)
        optimizer.step()
    assert all((p - old).abs().max() > 1e-3 for p, old in zip(params, before))
    assert all(torch.equal(named[name], old) for name, old in frozen.items())


def test_a_new_lora_is_the_base_and_depends_on_the_seed_alone(world):
    starts = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        model = load_model(world.sd, CPU)
        state = torch.get_rng_state()
        starts.append([p.detach().clone() for p in make_trainable(model, 4, seed)])
        assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1]))
    assert not all(torch.equal(a, b) for a, b in zip(starts[0], starts[2]))
    latents, cond = start(model)
    with torch.no_grad():
        plain = denoise(load_model(world.sd, CPU), latents, T, cond)
        assert torch.equal(denoise(model, latents, T, cond), plain)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd35", "z_image"])
def test_the_saved_lora_opens_in_plain_diffusers_and_here(world, tmp_path, family):
    folder = getattr(world, family)
    model = with_lora(folder)
    sampler = dict(SAMPLER, scheduler="euler") if model.is_flow else SAMPLER
    ours = generate(model, PROMPTS, 3, sampler, purpose="test")
    model.save(tmp_path / "lora")
    pipe = type(model.pipe).from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "lora")
    theirs = getattr(pipe, model.denoiser_name)
    latents, cond = start(model)
    with torch.no_grad():
        if model.is_flow:
            scheduler = make_scheduler(model, "euler", 4)
            images = decode(model, sample(model, scheduler, latents, cond, 0, 4, None))
            their_images = pipeline_images(pipe, PROMPTS, latents, 4, 1.0)
            torch.testing.assert_close(images, their_images, rtol=0, atol=1e-5)
        else:
            output = theirs(latents, T, **cond).sample
            torch.testing.assert_close(denoise(model, latents, T, cond), output)
        again = load_model(folder, CPU)
        make_trainable(again, 4, init_lora=tmp_path / "lora")
    assert torch.equal(generate(again, PROMPTS, 3, sampler, purpose="test"), ours)
    plain = generate(load_model(folder, CPU), PROMPTS, 3, sampler, purpose="test")
    assert (plain - ours).abs().max() > 0.01


def test_equal_loras_are_equal_bytes(world, tmp_path):
    """In two processes whose sets and maps have another order."""
    script = (
        "import sys; sys.path[:0] = sys.argv[3:5]\n"
        "from conftest import CPU, random_lora\n"
        "from common import load_model, make_trainable\n"
        "model = load_model(sys.argv[1], CPU)\n"
        "random_lora(make_trainable(model, 4))\n"
        "model.save(sys.argv[2])\n"
    )
    for name in ("a", "b"):
        words = [world.sd, tmp_path / name, ROOT, ROOT / "tests"]
        environment = {**os.environ, "PYTHONHASHSEED": str(ord(name))}
        subprocess.run([sys.executable, "-c", script, *words], env=environment, check=True)
    files = [(tmp_path / name / LORA_FILE).read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_alpha_and_rank_are_those_of_the_file(world, tmp_path):
    """Twice the alpha is twice the LoRA, as diffusers reads it."""
    model = with_lora(world.sd)
    model.save(tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    metadata["unet.lora_alpha"] = 8
    save_file(
        tensors, tmp_path / "alpha.safetensors", {"lora_adapter_metadata": json.dumps(metadata)}
    )
    load_lora(model, tmp_path / "alpha.safetensors")
    latents, cond = start(model)
    pipe = StableDiffusionPipeline.from_pretrained(world.sd)
    pipe.load_lora_weights(tmp_path, weight_name="alpha.safetensors")
    with torch.no_grad():
        ours = denoise(model, latents, T, cond)
        torch.testing.assert_close(ours, pipe.unet(latents, T, **cond).sample)
        load_lora(model, tmp_path / LORA_FILE)
        assert (denoise(model, latents, T, cond) - ours).abs().max() > 0.01


def test_a_bf16_model_keeps_the_files_fp32_values(world, tmp_path):
    model = with_lora(world.sd)
    model.save(tmp_path)
    saved = load_file(tmp_path / LORA_FILE)
    coarse = load_model(world.sd, CPU)
    in_dtype(coarse, torch.bfloat16)
    load_lora(coarse, tmp_path)
    coarse.save(tmp_path / "again")
    assert same_tensors(load_file(tmp_path / "again" / LORA_FILE), saved)


def test_other_layouts_open_as_in_diffusers(world, tmp_path):
    """The older names `lora.down` and `lora.up`, which diffusers still reads."""
    model = with_lora(world.sd)
    model.save(tmp_path)
    renamed = {}
    for key, tensor in load_file(tmp_path / LORA_FILE).items():
        key = key.replace("lora_A.weight", "lora.down.weight")
        renamed[key.replace("lora_B.weight", "lora.up.weight")] = tensor
    save_file(renamed, tmp_path / "old.safetensors")
    latents, cond = start(model)
    with torch.no_grad():
        expected = denoise(model, latents, T, cond)
        load_lora(model, tmp_path / "old.safetensors")
        torch.testing.assert_close(denoise(model, latents, T, cond), expected)


def test_files_that_do_not_fit_are_refused(world, tmp_path):
    model = with_lora(world.sd)
    model.save(tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    first = min(tensors)
    files = {
        "extra": {**tensors, first.replace("to_", "of_"): tensors[first].clone()},
        "text": {**tensors, "text_encoder.layer.lora_A.weight": torch.zeros(4, 16)},
        "shape": {**tensors, first: torch.zeros(4, 7)},
        "nan": {**tensors, first: tensors[first] / 0},
        "nothing": {"x": torch.zeros(2)},
    }
    for name, state in files.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(SystemExit, match=f"{name}.safetensors"):
            load_lora(load_model(world.sd, CPU), tmp_path / f"{name}.safetensors")
    torch.save({"x": print}, tmp_path / "code.safetensors")
    with pytest.raises(SystemExit, match="code.safetensors"):
        load_lora(model, tmp_path / "code.safetensors")
    with pytest.raises(SystemExit, match="no LoRA here"):
        load_lora(model, tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="--lora_rank 4"):
        make_trainable(load_model(world.sd, CPU), 8, init_lora=tmp_path)


def test_full_fine_tuning_trains_the_whole_denoiser_and_nothing_else(world, tmp_path):
    model = load_model(world.sd, CPU, full=True)
    params = make_trainable(model, 0)
    assert len(params) == len(list(model.denoiser.parameters()))
    assert not any(p.requires_grad for p in model.vae.parameters())
    model.save(tmp_path)
    opened = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert same_tensors(opened.state_dict(), model.denoiser.state_dict())


def test_checkpointing_leaves_the_gradient_as_it_is(world):
    gradients = []
    for checkpointing in (False, True):
        model = load_model(world.sd, CPU)
        params = make_trainable(model, 4, checkpointing=checkpointing)
        random_lora(params)
        latents, cond = start(model)
        images = decode(model, denoise(model, latents, torch.tensor(226), cond))
        images.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in params]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)
