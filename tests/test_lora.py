"""Invariant 3: with its adapter off the model is the base model, exactly. And what belongs to it:
the folded LoRA, its start, its file, and files of other programs."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, PROMPTS, ROOT, pipeline_images, random_lora, same_tensors
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import base_model, decode, denoise, generator, initial_latents, load_model
from common import make_scheduler, make_trainable, merged, sample
from data.prompts import condition
from models.lora import COMFYUI_FILE, LORA_FILE, load_lora
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


def test_full_training_has_no_base_model(world):
    """It would silently be the tuned one."""
    model = load_model(world.sd, CPU, full=True)
    with base_model(model):
        pass
    make_trainable(model, 0)
    with pytest.raises(ValueError, match="no base model"), base_model(model):
        pass


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
    (tmp_path / "text").write_text("")
    for file in (LORA_FILE, COMFYUI_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        # Whoever may read other new files may read these.
        assert (tmp_path / "a" / file).stat().st_mode == (tmp_path / "text").stat().st_mode


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
    load_lora(coarse, tmp_path / COMFYUI_FILE)
    coarse.save(tmp_path / "again")
    in_fp16 = {key: tensor.half().float() for key, tensor in saved.items()}
    assert same_tensors(load_file(tmp_path / "again" / LORA_FILE), in_fp16)


def random_layers(names, model, ranks):
    """{layer: (A (r, in), B (out, r))} for layers of the denoiser; their ranks take turns."""
    layers = {}
    for i, name in enumerate(names):
        outputs, inputs = model.denoiser.get_submodule(name).weight.shape[:2]
        rank = ranks[i % len(ranks)]
        draw = generator(0, "layer", i)
        a = 0.3 * torch.randn(rank, inputs, generator=draw)
        b = 0.3 * torch.randn(outputs, rank, generator=draw)
        layers[name] = (a, b)
    return layers


def names_ending(model, *ends):
    return [name for name, _ in model.denoiser.named_modules() if name.endswith(ends)]


def by_hand(folder, deltas):
    """A model whose weights W are W + delta, without any LoRA."""
    model = load_model(folder, CPU)
    for name, delta in deltas.items():
        weight = model.denoiser.get_submodule(name).weight
        weight.data += delta.view_as(weight)
    return model


def assert_loads_as(folder, file, deltas):
    """Our loader, the file that it writes again, and that file for ComfyUI are all W + delta."""
    plain = load_model(folder, CPU)
    latents, cond = start(plain)
    model = load_model(folder, CPU)
    load_lora(model, file)
    model.save("again")
    again = load_model(folder, CPU)
    load_lora(again, "again")
    with torch.no_grad():
        base = denoise(plain, latents, T, cond)
        expected = denoise(by_hand(folder, deltas), latents, T, cond)
        effect = (expected - base).abs().max()
        assert effect > 0.01
        for loaded in (model, again):
            assert (denoise(loaded, latents, T, cond) - expected).abs().max() < 1e-4 * effect
        if not model.is_flow:
            load_lora(again, f"again/{COMFYUI_FILE}")
            rounded = get_peft_model_state_dict(again.denoiser)
            for key, tensor in get_peft_model_state_dict(model.denoiser).items():
                assert torch.equal(rounded[key], tensor.half().float())


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.mark.parametrize("layout", ["peft", "processor", "lora.down"])
def test_diffusers_files_of_all_ages_open(world, layout):
    """Without an alpha, which is then the rank, even if the ranks differ."""
    model = load_model(world.sd, CPU)
    ranks = (2, 4, 3) if layout == "peft" else (4,)
    layers = random_layers(names_ending(model, *ATTENTION), model, ranks)
    tensors = {}
    deltas = {}
    for name, (a, b) in layers.items():
        deltas[name] = b @ a
        down = f"unet.{name}.lora_A.weight"
        up = f"unet.{name}.lora_B.weight"
        if layout == "processor":
            # diffusers 0.1x: unet.(...).attn1.processor.to_out_lora.down.weight
            block, _, projection = name.removesuffix(".0").rpartition(".")
            down = f"unet.{block}.processor.{projection}_lora.down.weight"
            up = f"unet.{block}.processor.{projection}_lora.up.weight"
        elif layout == "lora.down":
            down = f"unet.{name}.lora.down.weight"
            up = f"unet.{name}.lora.up.weight"
        tensors[down] = a
        tensors[up] = b
    save_file(tensors, "file.safetensors")
    assert_loads_as(world.sd, "file.safetensors", deltas)


def sgm_name(name):
    """A layer of the tiny SDXL in the names of Stability's code, which kohya uses for SDXL.

    That code counts the blocks of all levels in one row. Down: 0 is conv_in, 1 a block, 2 a
    downsampler, 3 the block with attention.
    """
    name = name.replace("down_blocks.1.attentions.0", "input_blocks.3.1")
    name = name.replace("mid_block.attentions.0", "middle_block.1")
    name = name.replace("up_blocks.0.attentions.0", "output_blocks.0.1")
    name = name.replace("up_blocks.0.attentions.1", "output_blocks.1.1")
    return name


@pytest.mark.parametrize("family, rename", [("sd", None), ("sdxl", None), ("sdxl", sgm_name)])
def test_kohya_files_open_with_a_rank_and_an_alpha_per_layer(world, family, rename):
    """Also of layers that our own LoRAs leave alone. diffusers alone misreads these alphas."""
    folder = getattr(world, family)
    model = load_model(folder, CPU)
    names = names_ending(model, *ATTENTION, "ff.net.0.proj", "proj_in", "proj_out")
    tensors = {}
    deltas = {}
    for i, (name, (a, b)) in enumerate(random_layers(names, model, (2, 4, 3)).items()):
        alpha = (1.0, 4.0, 8.0, 2.0)[i % 4]
        deltas[name] = alpha / len(a) * b @ a
        if "proj_" in name and family == "sd":
            # SD 1.x has convolutions here.
            a = a[:, :, None, None]
            b = b[:, :, None, None]
        key = "lora_unet_" + (rename(name) if rename else name).replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = a
        tensors[f"{key}.lora_up.weight"] = b
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, "kohya.safetensors")
    assert_loads_as(folder, "kohya.safetensors", deltas)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_flux_files_with_diffusers_names_open(world, alpha):
    """ai-toolkit writes such files, without alphas. Others add one to each layer."""
    model = load_model(world.flux, CPU)
    names = names_ending(model, *ATTENTION, "add_q_proj", "proj_mlp", "proj_out", "norm.linear")
    names = [name for name in names if "transformer_blocks" in name]
    tensors = {}
    deltas = {}
    for name, (a, b) in random_layers(names, model, (4, 3)).items():
        tensors[f"transformer.{name}.lora_A.weight"] = a
        tensors[f"transformer.{name}.lora_B.weight"] = b
        deltas[name] = b @ a
        if alpha is not None:
            tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
            deltas[name] = alpha / len(a) * b @ a
    save_file(tensors, "file.safetensors")
    assert_loads_as(world.flux, "file.safetensors", deltas)


def test_flux_files_of_kohya_open(world):
    """There q, k and v are one layer. The first layer of single blocks is left out: the converter
    in diffusers splits it at the width of the real model."""
    model = load_model(world.flux, CPU)
    block = "transformer_blocks.0.attn."
    layers = {  # kohya's name: the layers of diffusers
        "double_blocks_0_img_attn_qkv": [block + part for part in ("to_q", "to_k", "to_v")],
        "double_blocks_0_img_attn_proj": [block + "to_out.0"],
        "double_blocks_0_txt_attn_proj": [block + "to_add_out"],
        "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
    }
    tensors = {}
    deltas = {}
    for i, (key, names) in enumerate(layers.items()):
        weights = [model.denoiser.get_submodule(name).weight for name in names]
        rank = (4, 2)[i % 2]
        draw = generator(0, "kohya", i)
        a = 0.3 * torch.randn(rank, weights[0].shape[1], generator=draw)
        b = 0.3 * torch.randn(sum(len(weight) for weight in weights), rank, generator=draw)
        tensors[f"lora_unet_{key}.lora_down.weight"] = a
        tensors[f"lora_unet_{key}.lora_up.weight"] = b
        tensors[f"lora_unet_{key}.alpha"] = torch.tensor(1.0)
        parts = (b @ a / rank).split([len(weight) for weight in weights])
        deltas.update(zip(names, parts))
    save_file(tensors, "kohya.safetensors")
    assert_loads_as(world.flux, "kohya.safetensors", deltas)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_file_for_comfyui_has_its_names_and_opens_in_plain_diffusers(world, family):
    """ComfyUI's comfy/lora.py looks for lora_unet_ and the layer's path, with _ for each dot."""
    folder = getattr(world, family)
    model = with_lora(folder)
    model.save("lora")
    expected = set()
    for name in names_ending(model, *ATTENTION):
        path = "lora_unet_" + name.replace(".", "_")
        expected |= {f"{path}.lora_down.weight", f"{path}.lora_up.weight", f"{path}.alpha"}
    tensors = load_file(f"lora/{COMFYUI_FILE}")
    assert tensors.keys() == expected
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1"
    assert f"{block}_to_out_0.lora_down.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith("alpha")} == {4.0}

    images = {}
    for file in (None, LORA_FILE, COMFYUI_FILE):
        pipe = type(model.pipe).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        if file:
            pipe.load_lora_weights("lora", weight_name=file)
        draw = torch.Generator().manual_seed(0)
        options = dict(num_inference_steps=4, output_type="pt", generator=draw)
        images[file] = pipe(PROMPTS[0], **options).images
    effect = (images[LORA_FILE] - images[None]).abs().max()
    assert effect > 0.05
    assert (images[LORA_FILE] - images[COMFYUI_FILE]).abs().max() < 0.01 * effect


@pytest.mark.parametrize("family", ["flux", "sd35", "z_image"])
def test_transformers_need_no_file_for_comfyui(world, family):
    """ComfyUI reads `transformer.`, the layer's path and lora_A, and no alpha."""
    model = with_lora(getattr(world, family))
    model.save("lora")
    assert [path.name for path in Path("lora").iterdir()] == [LORA_FILE]
    for key in load_file(f"lora/{LORA_FILE}"):
        layer, _, end = key.removeprefix("transformer.").rpartition(".lora_")
        assert key.startswith("transformer.") and end in ("A.weight", "B.weight")
        assert layer in dict(model.denoiser.named_modules())


@pytest.mark.parametrize(
    "header",
    [
        {"lora_alpha": 8, "lora_dropout": 0.5, "inference_mode": True},
        {"lora_alpha": 4, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {name: 8 for name in ATTENTION}},
    ],
)
def test_training_on_from_another_alpha_keeps_its_effect(world, header):
    """Training starts from a LoRA with alpha = rank and the same effect, and saves such a file."""
    model = with_lora(world.sd)
    model.save("lora")
    tensors = load_file(f"lora/{LORA_FILE}")
    with safe_open(f"lora/{LORA_FILE}", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    metadata.update({f"unet.{key}": value for key, value in header.items()})
    header = {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(tensors, "other.safetensors", header)

    scale = 2.0  # 8 / 4, or 4 / sqrt(4)
    deltas = {}
    for layer in names_ending(load_model(world.sd, CPU), *ATTENTION):
        a = tensors[f"unet.{layer}.lora_A.weight"]
        deltas[layer] = scale * tensors[f"unet.{layer}.lora_B.weight"] @ a
    assert_loads_as(world.sd, "other.safetensors", deltas)

    model = load_model(world.sd, CPU)
    params = make_trainable(model, 4, init_lora="other.safetensors")
    assert len(params) == len(tensors)
    assert {layer.scaling["default"] for layer in lora_layers(model)} == {1.0}
    model.save("again")
    for key, tensor in load_file(f"again/{LORA_FILE}").items():
        assert torch.equal(tensor, tensors[key] * (scale if "lora_B" in key else 1.0))
    with safe_open(f"again/{LORA_FILE}", "pt") as file:
        saved = json.loads(file.metadata()["lora_adapter_metadata"])
    assert saved["unet.lora_alpha"] == saved["unet.r"] == 4 and not saved["unet.use_rslora"]
    assert saved["unet.alpha_pattern"] == {} and saved["unet.lora_dropout"] == 0


def test_files_that_do_not_fit_are_refused(world, tmp_path):
    model = with_lora(world.sd)
    model.save(tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    for_comfyui = load_file(tmp_path / COMFYUI_FILE)
    first = min(tensors)
    files = {
        "extra": {**tensors, first.replace("to_", "of_"): tensors[first].clone()},
        "text": {**tensors, "text_encoder.layer.lora_A.weight": torch.zeros(4, 16)},
        "shape": {**tensors, first: torch.zeros(4, 7)},
        "nan": {**tensors, first: tensors[first] / 0},
        "nothing": {"x": torch.zeros(2)},
        "dora": {**for_comfyui, min(for_comfyui).replace("alpha", "dora_scale"): torch.ones(16, 1)},
    }
    for name, state in files.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(SystemExit, match=f"{name}.safetensors"):
            load_lora(load_model(world.sd, CPU), tmp_path / f"{name}.safetensors")
    torch.save({"x": print}, tmp_path / "code.safetensors")
    with pytest.raises(SystemExit, match="code.safetensors"):
        load_lora(model, tmp_path / "code.safetensors")
    with pytest.raises(SystemExit, match="nowhere: there is no such file or folder"):
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
