"""refl.py: its losses by hand, its run folder, and what its settings do."""

import json
import math

import pytest
import torch
from conftest import read_log, read_weights_of_run, run_script, same_tensors

import refl
from rewards import REWARDS

SHORT = "--num_inference_steps 4 --first_mid 2 --last_mid 3 --batch_size 4 --micro_batch 2".split()


def train(world, out, *extra, status=0):
    words = ["--model", world.sd, "--reward", "toy_pref", "--device", "cpu", "--out", out, *SHORT]
    words += ["--prompts", world.prompts, "--test_prompts", world.one, "--lora_rank", 4, *extra]
    assert run_script(refl, *words) == status
    return out


def test_losses_by_hand():
    r = torch.tensor([1.0, 3.0, -1.0], requires_grad=True)
    linear = refl.linear_loss(r, 0.0, 10.0, 1e-3)
    assert linear.item() == pytest.approx(-1e-3 * (0.1 + 0.3 - 0.1) / 3)
    (gradient,) = torch.autograd.grad(linear, r)
    torch.testing.assert_close(gradient, torch.full((3,), -1e-3 / 30))
    assert refl.linear_loss(torch.tensor([22.0]), 20.0, 10.0, 1e-3).item() == pytest.approx(-2e-4)

    hinge = refl.hinge_loss(r, 1e-3)
    assert hinge.item() == pytest.approx(1e-3 * (1 + 0 + 3) / 3)
    (gradient,) = torch.autograd.grad(hinge, r)
    torch.testing.assert_close(gradient, torch.tensor([-1e-3 / 3, 0.0, -1e-3 / 3]))


def test_the_run_folder(world):
    run = train(world, "run", "--train_steps", 3, "--save_every", 2, "--seed", 5)
    config = json.loads(open("run/config.json").read())
    expected = dict(scheduler="ddpm", eta=1.0, num_inference_steps=4, guidance_scale=1.0)
    assert config["sampler"] == expected
    assert config["model_source"] == world.sd
    assert (config["seed"], config["resolution"], config["reward"]) == (5, 16, "toy_pref")

    rows = read_log(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert ["test_reward" in row for row in rows] == [False, True, True]
    reward_range = REWARDS["toy_pref"]
    for row in rows:
        assert 2 <= row["mid"] <= 3
        r_scaled = (row["reward"] - reward_range.shift) / reward_range.scale
        assert row["loss"] == pytest.approx(-1e-3 * r_scaled, rel=1e-4)
        assert row["grad_norm"] > 0
    num_params = sum(t.numel() for t in read_weights_of_run("run").values())
    assert row["grad_rms"] == pytest.approx(row["grad_norm"] / math.sqrt(num_params), rel=1e-4)


def test_a_seed_is_a_run_and_micro_batches_do_not_change_it(world):
    train(world, "a", "--train_steps", 2)
    torch.manual_seed(7)  # nothing reads the global generator
    train(world, "again", "--train_steps", 2)
    assert read_log("a") == read_log("again")
    assert same_tensors(read_weights_of_run("a"), read_weights_of_run("again"))
    for micro_batch in (4, 3):
        train(world, f"micro_{micro_batch}", "--train_steps", 2, "--micro_batch", micro_batch)
        for row, other in zip(read_log("a"), read_log(f"micro_{micro_batch}")):
            assert row["mid"] == other["mid"]
            for name in ("reward", "loss", "grad_norm"):
                assert row[name] == pytest.approx(other[name], rel=1e-3)
    train(world, "seed", "--train_steps", 2, "--seed", 1)
    assert read_log("seed")[0]["reward"] != read_log("a")[0]["reward"]


def test_adam_moves_by_the_learning_rate_whatever_the_reward_scale(world):
    """Difference 2: with the usual eps, gradients of 1e-10 would hardly move a weight."""
    for scale in (1e-3, 1e-6):
        run = train(world, f"run_{scale}", "--train_steps", 1, "--reward_scale", scale)
        lr = json.loads(open(f"run_{scale}/config.json").read())["lr"]
        weights = read_weights_of_run(run)
        moved = torch.cat([t.flatten() for key, t in weights.items() if "lora_B" in key])
        assert moved.abs().median().item() == pytest.approx(lr, rel=0.01)  # B starts at zero
        assert read_log(run)[0]["grad_rms"] < 0.1 * scale


def test_init_lora_starts_where_the_other_run_ended(world):
    train(world, "first", "--train_steps", 2, "--lr", 0.01)
    train(world, "second", "--train_steps", 1, "--init_lora", "first", "--lr", 1e-30)
    first, second = read_weights_of_run("first"), read_weights_of_run("second")
    assert all(torch.allclose(first[key], second[key], atol=1e-12) for key in first)


def test_the_hinge_loss_is_imagerewards_only(world, capsys):
    assert train(world, "run", "--loss", "hinge", status=2)
    assert "imagereward" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["flux", "flux_dev", "sd35", "z_image", "sdxl", "sd_v"])
def test_every_family_trains(world, family):
    words = ["--model", getattr(world, family), "--reward", "toy_pref", "--device", "cpu"]
    words += ["--prompts", world.prompts, "--test_prompts", world.one, "--lora_rank", 4, *SHORT]
    assert run_script(refl, *words, "--train_steps", 2, "--out", "run") == 0
    weights = read_weights_of_run("run")
    moved = [t.abs().max().item() for key, t in weights.items() if "lora_B" in key]
    assert sum(size > 0 for size in moved) >= 0.8 * len(moved)


def test_the_loss_is_where_the_readme_says_it_is():
    """A forker replaces one function, and the loop calls it by its name."""
    source = open(refl.__file__).read()
    assert source.count("def linear_loss(") == 1
    assert source.count("linear_loss(") == 2
