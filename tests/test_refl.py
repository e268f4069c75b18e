"""refl.py: its gradient, its cost, its run folder, and what it says to bad input."""
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import common
import refl
from common import condition, decode, denoise, generate, generator, initial_latents, load_model, load_reward, make_scheduler, sample, trainable

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square above a green circle", "a yellow triangle", "a purple square"]
SHORT = ["--num_inference_steps", "4", "--first_mid", "2", "--last_mid", "3", "--batch_size", "4", "--micro_batch", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (root / "one.txt").write_text(PROMPTS[0] + "\n")
    return {"sd": tiny.write(root / "sd"), "sdxl": tiny.write(root / "sdxl", "sdxl", seed=2), "root": root, "toy": "toy",
            "prompts": str(root / "prompts.txt"), "one": str(root / "one.txt")}


def train(folders, out, *extra, model="sd", prompts="prompts"):
    """One run through the command line's own parser -> its folder."""
    argv = ["--model", folders[model], "--reward", "toy_pref", "--prompts", folders[prompts], "--test_prompts", folders["one"], "--out", str(out), *SHORT]
    refl.main(refl.parse_args([*argv, *map(str, extra)]))
    return Path(out)


def log_of(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights_of(run):
    return load_file(next(p for p in (run / "lora/pytorch_lora_weights.safetensors", run / "model/unet/diffusion_pytorch_model.safetensors") if p.is_file()))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------------------------------
# the loss and its gradient


def test_losses_by_hand():
    r = torch.tensor([1., 3., -1.])
    assert refl.linear_loss(r, 0., 10., 1e-3).item() == pytest.approx(-1e-4)                 # -1e-3 mean(.1, .3, -.1)
    assert refl.linear_loss(torch.tensor([22.]), 20., 10., 1e-3).item() == pytest.approx(-2e-4)
    assert refl.hinge_loss(r, 1e-3).item() == pytest.approx(1e-3 * (1 + 0 + 3) / 3)
    r.requires_grad_()
    refl.linear_loss(r, 20., 10., 1e-3).backward()
    torch.testing.assert_close(r.grad, torch.full((3,), -1e-3 / 30))
    r.grad = None
    refl.hinge_loss(r, 1e-3).backward()
    torch.testing.assert_close(r.grad, torch.tensor([-1e-3 / 3, 0., -1e-3 / 3]))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_gradient_is_that_of_a_graph_cut_by_hand(folders, family):
    """Against the steps written out with the modules alone; nothing before the cut gets a gradient."""
    model = load_model(folders[family], CPU)
    reward, _ = load_reward("toy_pref", CPU)
    params, scheduler, mid = trainable(model, 4), make_scheduler(model, "ddpm", 4), 2
    for i, p in enumerate(params):
        p.data = .3 * torch.randn(p.shape, generator=generator(0, i))
    cond = condition(model, PROMPTS)
    generators = [generator(0, "x", i) for i in range(4)]
    x_T = initial_latents(model, generators).requires_grad_()

    grad_calls = []
    hook = model.denoiser.register_forward_pre_hook(lambda *_: grad_calls.append(torch.is_grad_enabled()))
    latents = sample(model, scheduler, x_T, cond, 0, mid, generators)
    assert not latents.requires_grad
    r = refl.refl_step(model, scheduler, latents, scheduler.timesteps[mid], cond, reward, PROMPTS)
    refl.linear_loss(r, 0., 10., 1e-3).backward()
    hook.remove()
    assert grad_calls == [False, False, True] and x_T.grad is None
    grads = [p.grad.clone() for p in params]

    generators = [generator(0, "x", i) for i in range(4)]
    x = initial_latents(model, generators)
    theirs = DDPMScheduler.from_config(scheduler.config)
    theirs.set_timesteps(4)
    for t in theirs.timesteps[:mid]:
        x = theirs.step(model.denoiser(x, t, **cond).sample.detach(), t, x, generator=generators).prev_sample
    t = theirs.timesteps[mid]
    a = theirs.alphas_cumprod[t]
    x0 = (x - (1 - a) ** .5 * model.denoiser(x, t, **cond).sample) / a ** .5
    images = (model.vae.decode(x0 / model.vae.config.scaling_factor).sample / 2 + .5).clip(0, 1)
    pixels = common.resize_and_normalise(images, 64, reward.mean, reward.std)
    tokens = reward.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    logits = reward.clip(pixel_values=pixels, **tokens).logits_per_image.diag()
    torch.testing.assert_close(r, logits, rtol=1e-5, atol=1e-5)
    by_hand = torch.autograd.grad(-1e-3 * logits.mean() / 10, params)
    assert max(g.abs().max() for g in by_hand) > 0
    for g, h in zip(grads, by_hand):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5 * h.abs().max().item())


def test_with_gradient_the_end_of_the_sampler_is_differentiable(folders):
    model = load_model(folders["sd"], CPU)
    params, scheduler = trainable(model, 4), make_scheduler(model, "ddim", 4)
    cond, x = condition(model, PROMPTS[:1]), initial_latents(model, [generator(0, "x")])
    latents = sample(model, scheduler, x, cond, 0, 2, None)
    sample(model, scheduler, latents, cond, 2, 4, None, grad=True).sum().backward()
    assert sum(p.grad.abs().sum() for p in params) > 0


# ------------------------------------------------------------------------------------------------------------------------------------
# what an update costs


@pytest.fixture
def counted(monkeypatch):
    """Counts of a run: denoiser calls by (images, gradient), decodes and rewards by images. Held-out sampling is left out."""
    counts, load = Counter(), refl.load_model

    def load_counted(*args, **kwargs):
        model = load(*args, **kwargs)
        model.denoiser.register_forward_pre_hook(lambda m, a, k: counts.update([("denoiser", len(a[0]), torch.is_grad_enabled())]), with_kwargs=True)
        model.vae.decoder.register_forward_pre_hook(lambda m, a: counts.update([("decode", len(a[0]), torch.is_grad_enabled())]))
        return model

    def reward_counted(spec, device):
        reward, row = load_reward(spec, device)
        reward.clip.vision_model.register_forward_pre_hook(lambda m, a, k: counts.update([("reward", len(k["pixel_values"]), torch.is_grad_enabled())]),
                                                           with_kwargs=True)
        return reward, row

    monkeypatch.setattr(refl, "load_model", load_counted)
    monkeypatch.setattr(refl, "load_reward", reward_counted)
    monkeypatch.setattr(refl, "held_out", lambda *a, **k: 0.)
    return counts


def test_an_update_is_mid_prefix_calls_and_one_pass_a_micro_batch(folders, tmp_path, counted):
    run = train(folders, tmp_path / "run", "--train_steps", 3)
    prefix = sum(row["mid"] for row in log_of(run))
    assert counted == {("denoiser", 4, False): prefix, ("denoiser", 2, True): 2 * 3, ("decode", 2, True): 2 * 3, ("reward", 2, True): 2 * 3}
    assert all(2 <= row["mid"] <= 3 for row in log_of(run))


def test_flops_of_an_update_equal_the_formula(folders, tmp_path, monkeypatch):
    """Two updates minus one, against mid F(batch) + micro-batches (F + backward of denoiser, decode and reward), each measured alone."""
    monkeypatch.setattr(refl, "held_out", lambda *a, **k: 0.)

    def flops(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    settings = ["--num_inference_steps", 6, "--first_mid", 4, "--last_mid", 4, "--lora_rank", 8, "--batch_size", 2, "--micro_batch", 1]
    one, two = (flops(lambda: train(folders, tmp_path / str(n), "--train_steps", n, *settings, model="toy", prompts="one")) for n in (1, 2))

    model = load_model("toy", CPU)
    reward, _ = load_reward("toy_pref", CPU)
    reward.text(PROMPTS[0])
    latents, t = torch.randn(2, *model.latent_shape, generator=generator(0, "x")), torch.tensor(301)
    with torch.no_grad():
        prefix = flops(lambda: denoise(model, latents, t, condition(model, PROMPTS[:1] * 2)))
    trainable(model, 8)
    cond, images = condition(model, PROMPTS[:1]), torch.rand(1, 3, 64, 64, requires_grad=True)
    gradient = flops(lambda: denoise(model, latents[:1], t, cond).sum().backward())
    decoding = flops(lambda: decode(model, latents[:1].clone().requires_grad_()).sum().backward())
    rewarding = flops(lambda: reward(images, PROMPTS[:1]).sum().backward())
    assert two - one == pytest.approx(4 * prefix + 2 * (gradient + decoding + rewarding), rel=.01)
    assert min(prefix, gradient, decoding, rewarding) > .01 * (two - one)


# ------------------------------------------------------------------------------------------------------------------------------------
# runs


@pytest.mark.parametrize("rank", [4, 0])
def test_resume_is_exact_and_a_seed_is_a_run(folders, tmp_path, rank):
    settings = ["--lora_rank", rank, "--save_every", 2, "--lr", 1e-3]
    torch.manual_seed(1)
    whole = train(folders, tmp_path / "whole", *settings, "--train_steps", 4)
    torch.manual_seed(2)                                                  # nothing reads the global generator
    half = train(folders, tmp_path / "half", *settings, "--train_steps", 2)
    at_two = weights_of(half)
    with open(half / "log.jsonl", "a") as f:                              # killed after its third update, in the middle of a line
        f.write('{"step": 3, "loss": 0.0}\n{"step": 4, "lo')
    train(folders, half, *settings, "--train_steps", 4, "--resume")
    assert log_of(whole) == log_of(half) and [row["step"] for row in log_of(half)] == [1, 2, 3, 4]
    assert same(weights_of(whole), weights_of(half)) and not same(weights_of(half), at_two)
    states = [torch.load(run / "checkpoint/state.pt", weights_only=True) for run in (whole, half)]
    assert states[0]["step"] == states[1]["step"] == 4 and all(torch.equal(a, b) for a, b in zip(*(s["params"] for s in states)))
    for name in ("step_000002.png", "step_000004.png"):
        assert (whole / "samples" / name).read_bytes() == (half / "samples" / name).read_bytes()
    kind = "model" if rank == 0 else "lora"
    assert sorted(p.name for p in (whole / kind).iterdir() if p.name.startswith("step_")) == ["step_000002", "step_000004"]
    assert not list(whole.rglob("*.tmp"))
    if rank:
        other = train(folders, tmp_path / "other", *settings, "--train_steps", 2, "--seed", 1)
        assert not same(weights_of(other), at_two) and log_of(other)[0]["reward"] != log_of(whole)[0]["reward"]


def test_micro_batches_do_not_change_the_noise(folders, tmp_path):
    a = train(folders, tmp_path / "a", "--train_steps", 2)
    b = train(folders, tmp_path / "b", "--train_steps", 2, "--micro_batch", 4)
    c = train(folders, tmp_path / "c", "--train_steps", 2, "--micro_batch", 3)
    for other in (b, c):
        for x, y in zip(log_of(a), log_of(other)):
            assert x["mid"] == y["mid"]
            assert all(x[k] == pytest.approx(y[k], rel=1e-3) for k in ("reward", "loss", "grad_norm", "grad_rms"))


def test_the_run_folder(folders, tmp_path):
    run = train(folders, tmp_path / "run", "--train_steps", 2, "--seed", 5)
    config = json.loads((run / "config.json").read_text())
    assert config["sampler"] == {"scheduler": "ddpm", "eta": 1., "num_inference_steps": 4, "guidance_scale": 1.}
    assert config["seed"] == 5 and config["resolution"] == 16 and config["model_source"] == folders["sd"] and config["reward"] == "toy_pref"
    assert {"step", "loss", "reward", "grad_norm", "grad_rms", "mid"} <= log_of(run)[0].keys() and "test_reward" in log_of(run)[1]
    known = common.REWARDS["toy_pref"]
    for row in log_of(run):
        assert row["loss"] == pytest.approx(-1e-3 * (row["reward"] - known.shift) / known.scale, rel=1e-4)
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_000000.png", "step_000002.png"]


def test_adam_moves_by_the_learning_rate_whatever_the_reward_scale(folders, tmp_path):
    """With Adam's usual eps, gradients of 1e-10 would hardly move a parameter."""
    moved = []
    for scale in (1e-3, 1e-6):
        run = train(folders, tmp_path / f"{scale}", "--train_steps", 1, "--reward_scale", scale, "--lr", 1e-3, "--lora_rank", 4)
        up = torch.cat([v.flatten() for k, v in weights_of(run).items() if "lora_B" in k])     # B starts at zero
        moved.append((up.abs() / 1e-3).median().item())
        assert log_of(run)[0]["grad_rms"] < 1e-1 * scale
    assert moved == pytest.approx([1, 1], rel=.01)


def run_and_keep(folders, out, monkeypatch, *extra, model):
    """-> the run's folder and the model as training left it."""
    kept, load = [], refl.load_model
    monkeypatch.setattr(refl, "load_model", lambda *a, **k: kept.append(load(*a, **k)) or kept[0])
    return train(folders, out, *extra, model=model), kept[0]


@pytest.mark.parametrize("family", ["sd", "sdxl", "toy"])
def test_the_lora_opens_in_plain_diffusers(folders, tmp_path, monkeypatch, family):
    run, model = run_and_keep(folders, tmp_path / "run", monkeypatch, "--train_steps", 2, "--lr", .05, "--lora_rank", 4, model=family)
    sampler = dict(json.loads((run / "config.json").read_text())["sampler"])
    ours = generate(model, PROMPTS, 3, sampler, purpose="test")

    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipe = cls.from_pretrained(model.source, dtype=torch.float32)         # toy keeps half-precision files
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", steps_offset=1, clip_sample=False)

    def images():
        generators = [generator(3, "test", i, 0) for i in range(4)]
        latents = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
        out = pipe(PROMPTS, num_inference_steps=4, guidance_scale=1., latents=latents, generator=generators, output_type="pt",
                   height=model.resolution, width=model.resolution)
        return out.images

    assert (images() - ours).abs().max() > .02                            # without the LoRA: other images
    pipe.load_lora_weights(run / "lora")
    assert (images() - ours).abs().max() < 1e-3
    pipe.unload_lora_weights()
    pipe.load_lora_weights(run / "lora" / "step_000002")
    assert (images() - ours).abs().max() < 1e-3

    again = load_model(folders[family], CPU)                              # and our own --init_lora
    trainable(again, 4, init_lora=run)
    assert (generate(again, PROMPTS, 3, sampler, purpose="test") - ours).abs().max() < 1e-4


def test_a_full_fine_tune_opens_in_plain_diffusers(folders, tmp_path, monkeypatch):
    run, model = run_and_keep(folders, tmp_path / "run", monkeypatch, "--train_steps", 1, "--lora_rank", 0, model="sd")
    opened = UNet2DConditionModel.from_pretrained(run / "model" / "unet").state_dict()
    base = UNet2DConditionModel.from_pretrained(folders["sd"], subfolder="unet").state_dict()
    assert same(opened, model.denoiser.state_dict()) and opened.keys() == base.keys()
    assert sum(not torch.equal(opened[k], base[k]) for k in base) > .9 * len(base)


def test_a_small_step_against_the_gradient_raises_the_reward(folders):
    """On the same latents, by what the gradient promises: the sign and the scale of the loss are right."""
    model = load_model(folders["sd"], CPU)
    reward, _ = load_reward("toy_pref", CPU)
    params, scheduler = trainable(model, 4), make_scheduler(model, "ddpm", 4)
    latents, cond = initial_latents(model, [generator(0, "x", i) for i in range(4)]), condition(model, PROMPTS)

    def step():
        return refl.linear_loss(refl.refl_step(model, scheduler, latents, scheduler.timesteps[2], cond, reward, PROMPTS), 0., 10., 1e-3)
    before = step()
    grads = torch.autograd.grad(before, params)
    size = sum(g.square().sum() for g in grads)
    for p, g in zip(params, grads):
        p.data -= 1e-5 / size * g                                         # promises the loss 1e-5 less: the mean reward .1 more
    assert (before - step()).item() == pytest.approx(1e-5, rel=.2)


# ------------------------------------------------------------------------------------------------------------------------------------
# bad input: one line, exit status 2, nothing written


@pytest.fixture(scope="module")
def a_run(folders, tmp_path_factory):
    return train(folders, tmp_path_factory.mktemp("bad") / "run", "--train_steps", 1, "--lora_rank", 4, "--seed", 1)


def refused(capsys, *argv):
    """Runs the command line, which must refuse -> its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        refl.main(refl.parse_args(list(map(str, argv))))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_bad_values(capsys, tmp_path, folders, a_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "model_index.json").write_text("{")
    save_file({"x": torch.zeros(2)}, tmp_path / "no_lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((a_run / "lora/pytorch_lora_weights.safetensors").read_bytes()[:2000])
    tiny_sd = ["--model", folders["sd"], "--reward", "toy_pref", "--prompts", folders["prompts"], "--test_prompts", folders["one"], *SHORT]
    table = [
        (["--model", "sdxxl"], ["sdxl", "no such model"]),
        (["--model", "sd51"], ["sd15"]),
        (["--model", "a_folder"], ["a_folder", "model_index.json"]),
        (["--model", "flux"], ["CogVideoXPipeline", "StableDiffusionXLPipeline"]),
        (["--model", "json"], ["model_index.json"]),
        (["--reward", "toy_perf"], ["toy_pref", "no such reward"]),
        (["--reward", "toy_pref:nowhere"], ["nowhere"]),
        (["--reward", f"toy_pref:{tmp_path / 'a_folder'}"], ["a_folder"]),
        (["--reward", f"toy_clip:{tmp_path / 'empty.txt'}"], ["empty.txt"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--prompts", "empty.txt"], ["empty.txt", "no prompt"]),
        (["--prompts", "binary.txt"], ["binary.txt", "UTF-8"]),
        (["--prompts", "a_folder"], ["a_folder"]),
        (["--test_prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["--model", folders["sd"]], ["--reward"]),
        (["--model", folders["sd"], "--reward", "toy_pref"], ["COCO captions", "127.0.0.1"]),           # the default, and no network
        (["--first_mid", "9", "--last_mid", "8"], ["first_mid <= last_mid"]),
        (["--last_mid", "20"], ["num_inference_steps = 20"]),
        (["--first_mid", "-1"], ["first_mid"]),
        (["--train_steps", "0"], ["--train_steps", "at least 1"]),
        (["--micro_batch", "0"], ["--micro_batch"]),
        (["--batch_size", "many"], ["--batch_size", "many"]),
        (["--lr", "0"], ["--lr"]),
        (["--lora_rank", "-1"], ["--lora_rank"]),
        (["--resolution", "50"], ["--resolution", "multiple of"]),
        (["--loss", "hing"], ["linear", "hinge"]),
        (["--learning_rate", "1"], ["--learning_rate", "known"]),
        (["--micro_bach", "1"], ["--micro_batch"]),
        (["--model"], ["--model"]),
        (["--device", "gpu"], ["gpu", "cpu", "cuda"]),
        (["--init_lora", "a_folder", "--lora_rank", "4"], ["a_folder", "no LoRA"]),
        (["--init_lora", "nowhere"], ["nowhere"]),
        (["--init_lora", "no_lora.safetensors"], ["no_lora.safetensors", "not a LoRA"]),
        (["--init_lora", "cut.safetensors"], ["cut.safetensors"]),
        (["--init_lora", a_run, "--lora_rank", "8"], ["rank 4", "--lora_rank 4"]),
        (["--init_lora", a_run, "--lora_rank", "4"], ["another model"]),                         # of the tiny model, for toy
        (["--resume", "--out", tmp_path / "new"], ["no checkpoint", "--resume"]),
        ([*tiny_sd, "--resume", "--out", a_run, "--lora_rank", "4", "--seed", "2"], ["seed was 1, now 2"]),
        ([*tiny_sd, "--out", a_run, "--lora_rank", "4", "--seed", "1"], ["holds a run", "--resume"]),
    ]
    if not torch.cuda.is_available():
        table += [(["--device", "cuda"], ["cuda", "cpu"]), (["--device", "cuda:1"], ["cuda:1"])]
    monkeypatch.setenv("COCO_BASE", "http://127.0.0.1:9")
    monkeypatch.setenv("COCO_CACHE", str(tmp_path / "coco"))
    monkeypatch.setattr(common.coco, "PAUSE", 0.)
    before = sorted(a_run.rglob("*")), (a_run / "config.json").read_text()
    problems = []
    for argv, words in table:
        try:
            message = refused(capsys, *argv)
            problems += [(argv, message)] if not all(w in message for w in words) else []
        except BaseException as e:                                        # show the whole table at once
            problems.append((argv, f"{type(e).__name__}: {e}"))
    assert not problems, "\n".join(map(str, problems))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "new").exists()
    assert before == (sorted(a_run.rglob("*")), (a_run / "config.json").read_text())


def test_a_hub_id_that_cannot_be_reached(capsys, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert "nobody/nothing" in refused(capsys, "--model", "nobody/nothing", "--reward", "toy_pref", "--prompts", "x")
    assert "nobody/nothing" in refused(capsys, "--model", "nobody/nothing@v1", "--reward", "toy_pref", "--prompts", "x")
    monkeypatch.setitem(common.MODELS, "sd15", "nobody/nothing")
    assert "the network" in refused(capsys, "--model", "sd15", "--reward", "toy_pref", "--prompts", "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("part, file", [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")])
@pytest.mark.parametrize("harm", ["cut", "absent", "key", "shape"])
def test_broken_weights_are_refused_and_never_random(capsys, folders, tmp_path, part, file, harm):
    """Libraries may warn before it; the last line is ours."""
    folder = tmp_path / "model"
    shutil.copytree(folders["sd"], folder)
    path = folder / part / f"{file}.safetensors"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif harm == "absent":
        path.unlink()
    else:
        state = load_file(path)
        key = sorted(state)[0]
        state[key] = torch.zeros(3, 5)
        if harm == "key":
            del state[key]
        save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        load_model(str(folder), CPU)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(f"error: --model {folder}")


@pytest.mark.parametrize("harm", ["cut", "key", "kind"])
def test_broken_reward_weights_are_refused_and_never_random(capsys, tmp_path, harm):
    folder = tmp_path / "pref"
    shutil.copytree(common.TOY / "pref", folder)
    path = folder / "model.safetensors"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif harm == "kind":                                                  # another network's weights under CLIP's config
        shutil.copy(common.TOY / "sd" / "text_encoder" / "model.safetensors", path)
    else:
        state = load_file(path)
        del state["visual_projection.weight"]
        save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        load_reward(f"toy_pref:{folder}", CPU)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(f"error: --reward toy_pref:{folder}")
