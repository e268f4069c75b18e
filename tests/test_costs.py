"""Invariant 6: denoiser calls, decodes and reward calls of a step equal the formula, and FLOPs are
within 1 % of it. Also what a step saves for its backward pass, what it reads back from the device,
and how many images are in the VAE at a time. No test here looks at a clock."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import bench
import pytest
import torch
from conftest import CPU, PROMPTS, ROOT, run_script, training_commands
from diffusers import AutoencoderKL
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import combined_sample
import evaluate
import rewards
from common import decode, denoise, encode, load_model, make_trainable
from data.prompts import condition
from judges.detector import load_detector

T = 4  # --num_inference_steps of training_commands
B = 2  # and its --batch_size
GUIDED = 2  # guidance puts two copies of a batch through the denoiser
FLAGS = {
    "refl": ["--first_mid", 3, "--last_mid", 3],
    "imagerefl": ["--first_mid", 3, "--last_mid", 3, "--start", 1, "--refl_every", 0],
    "treat": ["--guidance_scale", 1, "--grad_steps", 1],
    "focus_n_fix": ["--guidance_scale", 4, "--grad_steps", 2],
    "dfusion_dpo": ["--guidance_scale", 5, "--inner_epochs", 2, "--naive"],
}


class Reads(TorchDispatchMode):
    """Counts .item(), float() and bool() of what is computed, for which a GPU must finish its work.

    Whole numbers do not count, nor what is asked of them: they are timesteps, on the CPU.
    """

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            x = args[0]
            is_answer = x.dtype == torch.bool and not hasattr(x, "of_whole_numbers")
            self.count += x.is_floating_point() or is_answer
        elif torch.is_tensor(out) and out.dtype == torch.bool:
            if not any(x.is_floating_point() for x in args if torch.is_tensor(x)):
                out.of_whole_numbers = True
        return out


NETWORKS = {  # by the name of their class
    "UNet2DConditionModel": "denoiser",
    "Encoder": "encoder",
    "Decoder": "decoder",
    "CLIPVisionEmbeddings": "reward",
    "Detector": "detector",
}


def measure_updates(world, name, micro_batch):
    """Two updates of a script on the tiny model and the toy judges -> {step: what it costs}.

    calls: {(network, images, whether with gradient): how often}. reads: values that are read back.
    """
    module, words = training_commands(world)[name]
    calls = Counter()
    found = {}

    def count_call(module, args):
        network = NETWORKS.get(type(module).__name__)
        if network:
            calls[network, len(args[0]), torch.is_grad_enabled()] += 1

    def load_reward(*args):
        reward, reward_range = rewards.load_reward(*args)
        # Each text is encoded once per run, so it is no cost of a step.
        for prompt in PROMPTS:
            reward.text(prompt)
        return reward, reward_range

    @contextlib.contextmanager
    def around(step):
        calls.clear()
        with FlopCounterMode(display=False) as counter, Reads() as reads:
            yield
        total = counter.get_total_flops()
        found[step] = SimpleNamespace(flops=total, reads=reads.count, calls=dict(calls))

    words = [*words, *FLAGS[name], "--train_steps", 2, "--micro_batch", micro_batch]
    with register_module_forward_pre_hook(count_call):
        bench.updates(module.__name__, words, around, load_reward=load_reward)
    return found


def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def price(world):
    """FLOPs of one image in each piece of a step, measured alone."""
    model = load_model(world.sd, CPU)
    reward, _ = rewards.load_reward("toy_pref", CPU)
    reward.text(PROMPTS[0])
    detector = load_detector(ROOT / "toy" / "detector", CPU)
    cond = condition(model, PROMPTS[:1])
    latents = torch.randn(1, *model.latent_shape)
    needs_grad = latents.clone().requires_grad_()
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    t = torch.tensor(301)
    p = SimpleNamespace()
    with torch.no_grad():
        p.forward = flops(denoise, model, latents, t, cond)
        p.encode = flops(encode, model, images)

    # The others are forward and backward. `through` goes back to the latents, too.
    def backward_of(function, *args):
        function(*args).sum().backward()

    make_trainable(model, 4)
    p.gradient = flops(backward_of, denoise, model, latents, t, cond)
    p.through = flops(backward_of, denoise, model, needs_grad, t, cond)
    p.decode = flops(backward_of, decode, model, needs_grad)
    p.reward = flops(backward_of, reward, images, PROMPTS[:1])
    p.detector = flops(backward_of, detector, images)
    return p


CALLS = {  # of an update with micro-batches of one image, or in D-Fusion of a pair
    "refl": {
        ("denoiser", B, False): 3, ("denoiser", 1, True): B, ("decoder", 1, True): B,
        ("reward", 1, True): B,
    },
    # From step 1 to step 3. The diffusion loss has a gradient of its own.
    "imagerefl": {
        ("denoiser", B, False): 2, ("denoiser", 1, True): 2 * B, ("decoder", 1, True): B,
        ("reward", 1, True): B, ("encoder", 1, False): B,
    },
    "treat": {
        ("denoiser", B, False): T - 1, ("denoiser", 1, True): 2 * B, ("decoder", 1, True): B,
        ("detector", 1, True): B, ("encoder", 1, False): B,
    },
    "focus_n_fix": {
        ("denoiser", B * GUIDED, False): T - 2, ("denoiser", GUIDED, True): 2 * B,
        ("decoder", 1, True): B, ("detector", 1, True): B,
    },
    # The inner update: two pairs at all steps.
    "dfusion_dpo": {("denoiser", 2 * GUIDED, True): 2 * T},
}


def expected_flops(p):
    """The same in FLOPs. With K = 2 the last step's gradient goes through it to the one before."""
    treated = (T - 1) * p.forward + p.gradient + p.decode + p.detector
    focused = GUIDED * ((T - 2) * p.forward + p.gradient + p.through) + p.decode + p.detector
    return {
        "refl": B * (3 * p.forward + p.gradient + p.decode + p.reward),
        "imagerefl": B * (p.encode + 2 * p.forward + 2 * p.gradient + p.decode + p.reward),
        "treat": B * (treated + p.encode + p.gradient),
        "focus_n_fix": B * focused,
        "dfusion_dpo": 2 * T * 2 * GUIDED * p.gradient,
    }


@pytest.mark.parametrize("name", list(FLAGS))
def test_an_update_costs_its_formula_and_reads_nothing_per_micro_batch(world, price, name):
    smallest = 2 if name == "dfusion_dpo" else 1
    update = measure_updates(world, name, smallest)[2]
    assert update.calls == CALLS[name]
    assert update.flops == pytest.approx(expected_flops(price)[name], rel=0.01)
    larger = measure_updates(world, name, 2 * smallest)[2]
    assert 3 <= update.reads == larger.reads <= 12
    assert sum(larger.calls.values()) < sum(update.calls.values())


def test_a_round_of_dfusion_samples_once_and_replays_only_the_fused_steps(world, monkeypatch):
    """4 images make a reference, its 2 bases and 2 targets, which are decoded 2 at a time."""
    monkeypatch.setitem(FLAGS, "dfusion_dpo", ["--guidance_scale", 5])
    assert measure_updates(world, "dfusion_dpo", 2)[1].calls == {
        ("denoiser", 4 * GUIDED, False): T,
        # In the last two of four steps, the reference in one batch with both targets.
        ("denoiser", 3 * GUIDED, False): 2,
        ("decoder", 2, False): 3,
        ("reward", 2, False): 3,
        # The inner update, as in any other one.
        ("denoiser", 2 * GUIDED, True): 2 * T,
    }


@pytest.fixture
def images_in_vae(monkeypatch):
    """How many images each call of a VAE has: dict(encode=[...], decode=[...])."""
    sizes = dict(encode=[], decode=[])
    for name in sizes:

        def watched(self, x, *args, name=name, real=getattr(AutoencoderKL, name), **kwargs):
            sizes[name].append(len(x))
            return real(self, x, *args, **kwargs)

        monkeypatch.setattr(AutoencoderKL, name, watched)
    return sizes


@pytest.mark.parametrize("name", list(FLAGS))
def test_the_vae_never_sees_more_than_a_micro_batch(world, images_in_vae, name):
    """Also of held-out images, where SDXL's VAE would need 24 GiB for all of them at once."""
    module, words = training_commands(world)[name]
    micro_batch = 2 if name == "dfusion_dpo" else 1
    words = [*words, "--train_steps", 2, "--test_prompts", world.prompts]
    assert run_script(module, *words, "--micro_batch", micro_batch, "--out", "run") == 0
    # Two held-out images per prompt, before and after; and those of the training.
    assert sum(images_in_vae["decode"]) >= 2 * 2 * len(PROMPTS) + 2 * B
    assert sum(images_in_vae["encode"]) == (2 * B if "--data" in words else 0)
    assert set(images_in_vae["encode"] + images_in_vae["decode"]) == {micro_batch}


def test_sampling_from_a_run_decodes_a_micro_batch_at_a_time(world, images_in_vae):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--train_steps", 2, "--out", "run") == 0

    images_in_vae["decode"].clear()
    words = ["--lora", "run", "--prompts", world.prompts, "--num_images", 2, "--device", "cpu"]
    assert run_script(combined_sample, *words, "--micro_batch", 3, "--out", "images") == 0
    assert images_in_vae["decode"] == [3, 3, 2]

    images_in_vae["decode"].clear()
    words = ["--over_steps", "run", "--prompts", world.prompts, "--num_images", 3]
    assert run_script(evaluate, *words, "--metrics", "toy_clip", "--device", "cpu") == 0
    # The base model and one snapshot.
    assert images_in_vae["decode"] == 2 * [4, 4, 4]


def test_checkpointing_saves_far_less_for_the_backward_pass():
    """It includes the VAE, which saves most: 2.8 of 3.6 GiB per image in SD 1.5 at 512 pixels."""
    unet = {}
    vae = {}
    for checkpointing in (False, True):
        model = load_model("toy", CPU)
        make_trainable(model, 4, checkpointing=checkpointing)
        cond = condition(model, PROMPTS[:1])
        latents = torch.randn(1, *model.latent_shape, requires_grad=True)
        with bench.kept_for_backward() as kept:
            denoise(model, latents, torch.tensor(301), cond)
        unet[checkpointing] = bench.num_bytes(kept)
        with bench.kept_for_backward() as kept:
            decode(model, latents)
        vae[checkpointing] = bench.num_bytes(kept)
    assert 0 < unet[True] < 0.25 * unet[False]
    assert 0 < vae[True] < 0.5 * vae[False]


def test_the_prefix_saves_nothing(world):
    """What autograd saves in an update does not grow with the steps before the gradient."""
    _, words = training_commands(world)["refl"]
    words = [*words, "--num_inference_steps", 8]
    early = bench.saved_bytes("refl", [*words, "--first_mid", 1, "--last_mid", 1])
    late = bench.saved_bytes("refl", [*words, "--first_mid", 7, "--last_mid", 7])
    assert early == late > 0


def test_compile_has_room_for_every_shape(world):
    """Blocks of one class share dynamo's cache. An update of the toy model needs 14 places."""
    # monkeypatch would leave this setting deleted.
    with torch._dynamo.config.patch(recompile_limit=8):
        make_trainable(load_model(world.sd, CPU), 4, compile=True)
        assert torch._dynamo.config.recompile_limit >= 64


def test_channels_last_weights_are_saved_as_others_are(world):
    """load_model lays out convolutions so on CUDA."""
    model = load_model(world.sd, CPU, full=True)
    model.denoiser.to(memory_format=torch.channels_last)
    weight = model.denoiser.conv_in.weight
    assert not weight.is_contiguous()
    model.save("weights")
    again = type(model.denoiser).from_pretrained("weights/unet").conv_in.weight
    assert again.is_contiguous() and torch.equal(again, weight)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_the_benchmarks_models_have_the_published_size(family):
    makers, _ = bench.builders(family, tiny=False)
    with torch.device("meta"):
        denoiser = makers["transformer" if family == "flux" else "unet"]()
    num_params = sum(p.numel() for p in denoiser.parameters())
    assert num_params == pytest.approx(bench.PARAMETERS[family], rel=1e-4)


def test_a_row_of_the_gpu_benchmark_runs_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(bench, "TIMED", 1)
    monkeypatch.setattr(bench, "WARM_UP", 1)
    bench.main(["cuda", "--tiny", "--device", "cpu", "--only", "refl"])
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert {"prefix", "gradient", "VAE", "reward"} <= set(words)
