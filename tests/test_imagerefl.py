"""imagerefl.py: what an update is made of, its calls, its loss and its data."""

import inspect
from pathlib import Path

import pytest
import torch
from conftest import CPU, read_log, read_weights_of_run, run_script

import combined_sample
import imagerefl
import refl
from common import add_noise, decode, denoise, diffusion_target, encode, generator
from common import initial_latents, load_model, make_scheduler, predict_x0
from data.images import image_batches, image_data
from data.prompts import condition, encode_once
from rewards import load_reward

SHORT = "--num_inference_steps 6 --start 3 --first_mid 3 --last_mid 5".split()
BATCH = "--batch_size 4 --micro_batch 2 --lora_rank 4 --device cpu".split()


def train(world, out, *extra, family="sd"):
    words = ["--model", getattr(world, family), "--reward", "toy_pref", "--data", world.images]
    words += ["--test_prompts", world.one, "--out", out, *SHORT, *BATCH, *extra]
    assert run_script(imagerefl, *words) == 0
    return out


def test_what_it_shares_with_refl_is_the_same_to_the_byte():
    for name in ("linear_loss", "refl_step"):
        ours = inspect.getsource(getattr(imagerefl, name))
        assert ours == inspect.getsource(getattr(refl, name))


def test_every_fourth_update_is_a_refl_step():
    assert [step for step in range(1, 13) if imagerefl.is_refl_update(step, 4)] == [4, 8, 12]
    assert not any(imagerefl.is_refl_update(step, 0) for step in range(1, 13))


@pytest.mark.parametrize("family", ["sd", "sd_v"])
def test_the_diffusion_loss_by_hand(world, family):
    """It is zero for the truth, and its target is what the model itself predicts."""
    model = load_model(getattr(world, family), CPU)
    scheduler = make_scheduler(model, "ddpm", 40)
    t = scheduler.timesteps[30]
    assert t == 226  # t' of the paper
    images = torch.rand(3, 3, 16, 16, generator=generator(0, "images"))
    x0 = encode(model, images)
    noise = initial_latents(model, [generator(0, "noise", i) for i in range(3)])
    alpha_bar = model.pipe.scheduler.alphas_cumprod[226]
    noisy = add_noise(scheduler, x0, noise, t)
    torch.testing.assert_close(noisy, alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise)
    target = diffusion_target(scheduler, x0, noise, t)
    assert torch.equal(target, noise) == (family == "sd")
    assert imagerefl.diffusion_loss(target, target) == 0
    assert imagerefl.diffusion_loss(target + 2, target) == pytest.approx(4)


def test_an_error_in_v_is_larger_than_the_same_error_in_the_noise(world):
    """Difference 6: with v-prediction, the squared error of the noise is alpha_bar times v's."""
    model = load_model(world.sd_v, CPU)
    scheduler = make_scheduler(model, "ddpm", 40)
    t = scheduler.timesteps[30]
    x0, noise, v_error = (torch.randn(2, 4, 8, 8, generator=generator(0, i)) for i in range(3))
    noisy = add_noise(scheduler, x0, noise, t)
    target = diffusion_target(scheduler, x0, noise, t)
    v_mse = imagerefl.diffusion_loss(target + v_error, target)
    # The noise that a prediction of v implies, from x_t = sqrt(alpha_bar) x0 + ... noise.
    alpha_bar = model.pipe.scheduler.alphas_cumprod[t]
    x0_pred = predict_x0(scheduler, target + v_error, t, noisy)
    noise_pred = (noisy - alpha_bar.sqrt() * x0_pred) / (1 - alpha_bar).sqrt()
    noise_mse = imagerefl.diffusion_loss(noise_pred, noise)
    torch.testing.assert_close(noise_mse, alpha_bar * v_mse, rtol=1e-4, atol=0)
    # At the toy world's t', a weight on v's error counts 1.3 times as much.
    row = imagerefl.OURS["toy"]
    toy = make_scheduler(load_model("toy", CPU), "ddpm", row["num_inference_steps"])
    alpha_bar = toy.alphas_cumprod[toy.timesteps[row["start"]]]
    assert toy.config.prediction_type == "v_prediction"
    assert 1 / alpha_bar == pytest.approx(1.33, abs=0.01)


def test_an_error_in_a_flow_is_larger_than_the_same_error_in_the_noise(world):
    """Difference 7: on a flow, the squared error of the noise is (1 - sigma)^2 times the flow's."""
    model = load_model(world.flux, CPU)
    scheduler = make_scheduler(model, "euler", 5)
    t = scheduler.timesteps[3]  # sigma 0.4
    x0, noise, flow_error = (torch.randn(2, 4, 8, 8, generator=generator(0, i)) for i in range(3))
    noisy = add_noise(scheduler, x0, noise, t)
    torch.testing.assert_close(noisy, 0.6 * x0 + 0.4 * noise)
    target = diffusion_target(scheduler, x0, noise, t)
    torch.testing.assert_close(target, noise - x0)
    flow_mse = imagerefl.diffusion_loss(target + flow_error, target)
    # The noise that this prediction implies, from x_t = 0.6 x0 + 0.4 noise.
    x0_pred = predict_x0(scheduler, target + flow_error, t, noisy)
    noise_pred = (noisy - 0.6 * x0_pred) / 0.4
    noise_mse = imagerefl.diffusion_loss(noise_pred, noise)
    torch.testing.assert_close(noise_mse, 0.36 * flow_mse, rtol=1e-4, atol=0)
    # toy-flux starts there, so a weight on the flow's error counts 2.8 times as much.
    row = imagerefl.OURS["toy-flux"]
    assert 1 - row["start"] / row["num_inference_steps"] == pytest.approx(0.4)
    assert 1 / 0.36 == pytest.approx(2.8, abs=0.03)


def test_an_update_on_a_flow_by_hand(world):
    """The loss of the first update, where the LoRA does not change the model yet."""
    words = ["--train_steps", 1, "--first_mid", 5, "--diffusion_weight", 0.1]
    (row,) = read_log(train(world, "run", *words, family="flux"))

    # The images, their captions, and the noise of update 1.
    model = load_model(world.flux, CPU)
    data = image_data(world.images, 16)
    picks = torch.randint(4, (4,), generator=generator(0, "data", 1)).tolist()
    images, prompts = next(image_batches(data, [picks]))
    encode_once(model, prompts)
    cond = condition(model, prompts)
    noise = initial_latents(model, [generator(0, "train", 1, i) for i in range(4)])

    # Of six steps, step 3 has sigma 3/6 and step 5 has sigma 1/6.
    x0 = encode(model, images)
    noisy = x0 / 2 + noise / 2
    latents = noisy
    reward, _ = load_reward("toy_pref", CPU)
    with torch.no_grad():
        for sigma in (3 / 6, 2 / 6):
            v = denoise(model, latents, torch.tensor(1000 * sigma), cond)
            latents = latents - v / 6
        v = denoise(model, latents, torch.tensor(1000 / 6), cond)
        r = reward(decode(model, latents - v / 6), prompts).mean().item()
        v = denoise(model, noisy, torch.tensor(1000 * 3 / 6), cond)
    mse = (v - (noise - x0)).square().mean().item()
    assert row["mid"] == 5
    assert row["reward"] == pytest.approx(r, rel=1e-4)
    assert row["mse"] == pytest.approx(mse, rel=1e-4)
    assert row["loss"] == pytest.approx(-1e-3 * (r - 3) / 13 + 0.1 * mse, rel=1e-4)


@pytest.mark.parametrize(
    "row, family, sigma",
    [("flux-schnell", "flux", 0.5), ("flux-dev", "flux_dev", 0.39), ("sd35", "sd35", 0.38)]
    + [("z-image", "z_image", 0.42), ("toy-flux", "flux", 0.4)],
)
def test_a_flow_starts_where_the_noise_is_about_that_of_the_paper(world, row, family, sigma):
    """At the step whose ratio of noise to signal is closest to that of t' = 226."""
    settings = imagerefl.OURS[row]
    # FLUX.1-dev's sigmas depend on the size of the latents, which is 64 x 64 at its 512 pixels.
    model = load_model(getattr(world, family), CPU, 128)
    sigmas = make_scheduler(model, "euler", settings["num_inference_steps"]).timesteps / 1000
    alpha_bar = load_model(world.sd, CPU).pipe.scheduler.alphas_cumprod[226]
    paper = ((1 - alpha_bar) / alpha_bar).sqrt()
    assert paper == pytest.approx(0.63, abs=0.01)
    # At sigma 1 there is no signal.
    ratios = sigmas[1:] / (1 - sigmas[1:])
    closest = 1 + (ratios / paper).log().abs().argmin().item()
    assert settings["start"] == settings["first_mid"] == closest
    assert sigmas[closest].item() == pytest.approx(sigma, abs=0.006)


@pytest.mark.parametrize("family", ["flux", "flux_dev", "sd35", "z_image"])
def test_every_flow_trains(world, family):
    """An update from images and a ReFL step, and both reach the whole LoRA."""
    run = train(world, "run", "--train_steps", 2, "--refl_every", 2, family=family)
    assert ["mse" in row for row in read_log(run)] == [True, False]
    weights = read_weights_of_run(run)
    moved = [t.abs().max().item() for key, t in weights.items() if "lora_B" in key]
    assert sum(size > 0 for size in moved) >= 0.8 * len(moved)


def test_toy_flux_on_the_command_line():
    """A run with the defaults, and combined generation from it, with its Euler steps."""
    words = ["--model", "toy-flux", "--train_steps", 1, "--device", "cpu", "--out", "run"]
    assert run_script(imagerefl, *words) == 0
    (row,) = read_log("run")
    assert row["mid"] in (3, 4) and row["mse"] > 0
    Path("one.txt").write_text("a red circle\n")
    words = ["--lora", "run", "--mode", "combined", "--base_steps", 3, "--prompts", "one.txt"]
    words += ["--num_images", 1, "--device", "cpu", "--out", "images"]
    assert run_script(combined_sample, *words) == 0
    assert Path("images/00000_00.png").is_file()


@pytest.fixture
def calls(monkeypatch):
    """Every denoiser call of training: (timestep, images, with gradient), in order."""
    seen = []
    load = imagerefl.load_model

    def load_and_watch(*args, **kwargs):
        model = load(*args, **kwargs)

        def note(module, inputs):
            latents, t = inputs
            seen.append((int(t), len(latents), torch.is_grad_enabled()))

        model.denoiser.register_forward_pre_hook(note)
        return model

    def no_samples(*args, **kwargs):
        return dict(test_reward=0.0)

    monkeypatch.setattr(imagerefl, "load_model", load_and_watch)
    monkeypatch.setattr(imagerefl, "held_out", no_samples)
    return seen


def test_the_calls_of_an_update(world, calls):
    """From images: steps start .. mid - 1 without gradient, nothing if mid == start; then for
    each micro-batch one call at t_mid and one at t' with gradient. A ReFL step: from step 0."""
    run = train(world, "run", "--train_steps", 6, "--refl_every", 3)
    t = make_scheduler(load_model(world.sd, CPU), "ddpm", 6).timesteps.tolist()
    expected = []
    for row in read_log(run):
        is_refl = row["step"] % 3 == 0
        assert ("mse" in row) != is_refl
        first = 0 if is_refl else 3
        expected += [(t[i], 4, False) for i in range(first, row["mid"])]
        with_gradient = [(t[row["mid"]], 2, True)]
        if not is_refl:
            with_gradient.append((t[3], 2, True))
        expected += with_gradient * 2
    assert calls == expected
    assert len({row["mid"] for row in read_log(run)}) > 1

    # The ablation: no ReFL steps, no diffusion loss, and no steps before mid.
    calls.clear()
    words = ["--refl_every", 0, "--diffusion_weight", 0, "--last_mid", 3]
    train(world, "ablation", "--train_steps", 2, *words)
    assert calls == [(t[3], 2, True)] * 4


def test_own_images_bring_their_own_prompts():
    """Also on the toy model, whose prompts belong to its own images."""
    assert imagerefl.parse_args([]).prompts.endswith("toy/prompts_train.txt")
    assert imagerefl.parse_args(["--data", "my_images"]).prompts is None
    assert imagerefl.parse_args(["--data", "my_images", "--prompts", "a"]).prompts == "a"


def test_the_loss_adds_up(world):
    """The logged loss is the reward's part plus the weighted mse, also with uneven parts."""
    run = train(world, "run", "--train_steps", 3, "--diffusion_weight", 0.1, "--micro_batch", 3)
    for row in read_log(run):
        r_scaled = (row["reward"] - 3) / 13  # toy_pref's affine map
        expected = -1e-3 * r_scaled + 0.1 * row["mse"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)


def test_images_and_their_own_captions_are_trained_on(world, monkeypatch):
    """Without --prompts the ReFL steps take the captions of --data, too."""
    seen = []

    def note(model, prompts):
        seen.append(tuple(prompts))
        return condition(model, prompts)

    monkeypatch.setattr(imagerefl, "condition", note)
    train(world, "run", "--train_steps", 4, "--refl_every", 2)
    captions = {line for line in open(world.prompts).read().splitlines() if line}
    assert {prompt for prompts in seen for prompt in prompts} <= captions
    draw = generator(0, "data", 1)
    picks = torch.randint(4, (4,), generator=draw).tolist()
    in_order = open(world.prompts).read().split("\n")
    assert seen[0] == tuple(in_order[i] for i in picks)
