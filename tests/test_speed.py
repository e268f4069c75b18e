"""What an update costs, counted: calls, FLOPs, values read back, bytes saved for the backward pass. No test here looks at a clock."""
import json
from collections import Counter
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import bench
import combined_sample
import common
import pytest
import tiny
import torch
from common import base_model, condition, decode, denoise, encode, generator, initial_latents, load_detector, load_model, load_reward, merged, trainable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

CPU, PROMPT, T = torch.device("cpu"), "a red circle above a blue square", 4
COMMON = ["--num_inference_steps", T, "--batch_size", 2, "--lora_rank", 4, "--train_steps", 2, "--device", "cpu"]
FLAGS = {
    "refl": ["--first_mid", 3, "--last_mid", 3],
    "imagerefl": ["--first_mid", 3, "--last_mid", 3, "--start", 1, "--refl_every", 0],
    "diffdoctor": ["--detector", common.TOY / "detector", "--guidance_scale", 1],
    "focus_n_fix": ["--detector", common.TOY / "detector", "--pool", 2, "--reward", "artifact", "--guidance_scale", 4],
    "dfusion_dpo": ["--batch_size", 4, "--images_per_prompt", 4, "--naive", "--inner_epochs", 2],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("speed")
    (root / "one.txt").write_text(PROMPT + "\n")
    (root / "images").mkdir()
    for i in range(2):
        common.to_pil(torch.rand(3, 16, 16, generator=generator(0, i))).save(root / "images" / f"{i}.png")
    (root / "images" / "metadata.jsonl").write_text("".join(json.dumps(dict(file_name=f"{i}.png", text=PROMPT)) + "\n" for i in range(2)))
    (root / "items.json").write_text(json.dumps({"one": dict(test=[PROMPT], train=[dict(prompt=PROMPT, items=["red circle"], thresholds=[.1])])}))
    return SimpleNamespace(model=tiny.write(root / "sd"), root=root)


class Reads(TorchDispatchMode):
    """Counts .item(), float(), bool() of what is computed: on a GPU each waits for all work so far. Whole numbers and what is asked of them are
    the sampler's timesteps, which lie on the CPU."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].is_floating_point() or args[0].dtype == torch.bool and not hasattr(args[0], "of_whole_numbers")
        elif torch.is_tensor(out) and out.dtype == torch.bool and not any(x.is_floating_point() for x in args if torch.is_tensor(x)):
            out.of_whole_numbers = True
        return out


def second_update(files, script, micro_batch, *more):
    """-> FLOPs, calls by (network, images, gradient) and values read of a script's second update, on the tiny model and the toy judges."""
    calls, found, load = Counter(), {}, common.load_model

    def watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.denoiser.register_forward_pre_hook(lambda m, a: calls.update([("denoiser", len(a[0]), torch.is_grad_enabled())]))
        model.vae.decoder.register_forward_pre_hook(lambda m, a: calls.update([("decoder", len(a[0]), torch.is_grad_enabled())]))
        return model

    @contextmanager
    def around(step):
        calls.clear()
        with ExitStack() as stack:
            flops, reads = stack.enter_context(FlopCounterMode(display=False)), stack.enter_context(Reads())
            yield
        found[step] = flops.get_total_flops(), dict(calls), reads.count

    prompts = files.root / ("items.json" if script == "dfusion_dpo" else "one.txt")
    reward = [] if script == "focus_n_fix" else ["--reward", "toy_pref"]
    argv = ["--model", files.model, *COMMON, *FLAGS[script], *reward, "--prompts", prompts, "--test_prompts", files.root / "one.txt", *more]
    argv += ["--data", files.root / "images"] if script in ("imagerefl", "diffdoctor") else []
    bench.updates(script, [*argv, "--micro_batch", micro_batch], around, load_model=watched)
    return found[2]


def flops(f):
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def price(files):
    """FLOPs of an image in each piece, measured alone."""
    model, (reward, _), detector = load_model(files.model, CPU), load_reward("toy_pref", CPU), load_detector(common.TOY / "detector", CPU)
    reward.text(PROMPT)
    x, t, cond, images = torch.randn(1, *model.latent_shape), torch.tensor(301), condition(model, [PROMPT]), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        costs = dict(forward=flops(lambda: denoise(model, x, t, cond)), encode=flops(lambda: encode(model, images)))
    trainable(model, 4)
    costs |= dict(
        gradient=flops(lambda: denoise(model, x, t, cond).sum().backward()),
        through=flops(lambda: denoise(model, x.clone().requires_grad_(), t, cond).sum().backward()),      # to its input too
        decode=flops(lambda: decode(model, x.clone().requires_grad_()).sum().backward()),
        reward=flops(lambda: reward(images.clone().requires_grad_(), [PROMPT]).sum().backward()),
        detector=flops(lambda: detector(images.clone().requires_grad_()).sum().backward()))
    return SimpleNamespace(**costs)


@pytest.mark.parametrize("script", list(FLAGS))
def test_an_update_costs_its_formula_and_reads_nothing_per_micro_batch(files, price, script):
    p, micro = price, 2 if script == "dfusion_dpo" else 1
    formula = {
        "refl": 2 * (3 * p.forward + p.gradient + p.decode + p.reward),
        "imagerefl": 2 * (p.encode + 2 * p.forward + 2 * p.gradient + p.decode + p.reward),
        "diffdoctor": 2 * ((T - 1) * p.forward + 2 * p.gradient + p.decode + p.detector + p.encode),
        "focus_n_fix": 2 * (2 * (T - 2) * p.forward + 2 * (p.gradient + p.through) + p.decode + p.detector),       # guidance: two a call
        "dfusion_dpo": 2 * T * 2 * 2 * p.gradient,                        # 2 pairs; a and b, guidance
    }
    d = ("decoder", 1, True)
    expected = {
        "refl": {("denoiser", 2, False): 3, ("denoiser", 1, True): 2, d: 2},
        "imagerefl": {("denoiser", 2, False): 2, ("denoiser", 1, True): 4, d: 2},
        "diffdoctor": {("denoiser", 2, False): T - 1, ("denoiser", 1, True): 4, d: 2},
        "focus_n_fix": {("denoiser", 4, False): T - 2, ("denoiser", 2, True): 4, d: 2},
        "dfusion_dpo": {("denoiser", 4, True): 2 * T},
    }
    total, calls, reads = second_update(files, script, micro)
    assert total == pytest.approx(formula[script], rel=.01)
    assert calls == expected[script]
    assert second_update(files, script, 2 * micro)[2] == reads <= 12


def test_bytes_saved_for_the_backward_pass():
    """--checkpointing takes the VAE's too, which are the most: 2.8 of 3.6 GiB an image in SD1.5 at 512 px."""
    def saved(model, f):
        kept = {}
        params = {p.untyped_storage().data_ptr() for module in (model.denoiser, model.vae) for p in module.parameters()}

        def pack(x):
            if x.untyped_storage().data_ptr() not in params:
                kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            f()
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    sizes = {}
    for checkpointing in (False, True):
        model = load_model("toy", CPU)
        trainable(model, 4, checkpointing=checkpointing)
        x, cond = torch.randn(1, *model.latent_shape), condition(model, [PROMPT])
        sizes[checkpointing] = saved(model, lambda: denoise(model, x, torch.tensor(301), cond)), saved(model, lambda: decode(model, x.requires_grad_()))
    (unet, vae), (unet_less, vae_less) = sizes[False], sizes[True]
    assert unet_less < .25 * unet and vae_less < .5 * vae, sizes


def test_the_prefix_saves_nothing_whatever_its_batch(files):
    """What autograd saves in an update does not grow with the steps before the gradient."""
    def saved(*more):
        return bench.saved_bytes("refl", ["--model", files.model, "--reward", "toy_pref", "--prompts", files.root / "one.txt", "--test_prompts",
                                          files.root / "one.txt", "--num_inference_steps", 8, "--batch_size", 2, "--device", "cpu", *more])
    assert saved("--first_mid", 1, "--last_mid", 1) == saved("--first_mid", 7, "--last_mid", 7) > 0


@pytest.mark.parametrize("mode, folds", [("tuned", 1), ("combined", 1), ("aig", 0), ("base", 0)])
def test_a_batch_of_images_folds_the_lora_once(files, tmp_path, monkeypatch, mode, folds):
    entered = []
    monkeypatch.setattr(combined_sample, "merged", lambda model: entered.append(1) or merged(model))
    model = load_model(files.model, CPU)
    trainable(model, 4)
    args = SimpleNamespace(scheduler="ddim", num_inference_steps=4, num_images=2, batch_size=2, seed=0, mode=mode, guidance_scale=1.,
                           base_guidance_scale=2., eta=0.)
    combined_sample.sample_folder(model, [PROMPT], args, tmp_path / "images", 2 if mode == "combined" else None)
    assert len(entered) == folds


def test_inside_the_base_model_nothing_is_folded(files):
    model = load_model(files.model, CPU)
    x, cond = initial_latents(model, [generator(0, "x")]), condition(model, [PROMPT])
    with torch.no_grad():
        plain = denoise(model, x, torch.tensor(301), cond)
        for p in trainable(model, 4):
            p.data.fill_(.1)
        with base_model(model), merged(model):
            assert torch.equal(denoise(model, x, torch.tensor(301), cond), plain)
        assert not torch.equal(denoise(model, x, torch.tensor(301), cond), plain)


def test_compile_has_room_for_every_shape(files):
    """Blocks of one class share dynamo's cache, a full graph over its limit is an error, and an update of the toy model needs 14 (widths, batches,
    with gradient and without); the default is 8."""
    model = load_model(files.model, CPU)
    trainable(model, 4, compile=True)
    assert torch._dynamo.config.recompile_limit >= 64


def test_channels_last_weights_are_saved_as_others_are(files, tmp_path):
    """On CUDA load_model lays out convolutions so."""
    model = load_model(files.model, CPU, full=True)
    model.denoiser.to(memory_format=torch.channels_last)
    assert model.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    common.save_weights(model, tmp_path, 0)
    again = type(model.denoiser).from_pretrained(tmp_path / "unet")
    assert torch.equal(again.conv_in.weight, model.denoiser.conv_in.weight) and again.conv_in.weight.is_contiguous()


# ------------------------------------------------------------------------------------------------------------------------------------
# tests/bench.py, as far as a CPU can run it


@pytest.mark.parametrize("family, denoiser", [("sd15", "unet"), ("sdxl", "unet"), ("flux", "transformer")])
def test_the_benchmarks_models_have_the_published_size(family, denoiser):
    with torch.device("meta"):
        module = bench.builders(family, tiny=False)[0][denoiser]()
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(bench.PARAMETERS[family], rel=1e-4)


@pytest.mark.parametrize("row", ["public", "sdxl_1", "flux", "dfusion"])
def test_the_gpu_benchmark_runs_on_a_cpu(monkeypatch, capsys, row):
    monkeypatch.setattr(bench, "TIMED", 1)
    monkeypatch.setattr(bench, "WARM_UP", 1)
    bench.main(["cuda", "--tiny", "--device", "cpu", "--only", row])
    line = capsys.readouterr().out.splitlines()[-1]
    for phase in ("prefix", "gradient") + (() if row == "dfusion" else ("VAE", "reward")):
        assert f"{phase} " in line, line
    shares = [int(word.rstrip("%")) for word in line.split() if word.endswith("%")]
    assert abs(sum(shares) - 100) <= len(shares)
