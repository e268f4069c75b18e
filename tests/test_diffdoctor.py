"""diffdoctor.py: the losses and metrics by hand, the augmentation, a detector, and treating."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, PROMPTS, random_lora, read_log, read_weights_of_run, run_script
from conftest import same_tensors
from PIL import Image
from safetensors.torch import load_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import diffdoctor
from common import TOY, decode, denoise, encode, generator, initial_latents, load_model
from common import make_scheduler, make_trainable, sample, scheduler_step
from data.prompts import condition, read_prompts
from data import augment
from data.labels import SPLITS, Labelled, read_labels
from results.experiments import dreambooth
from judges.detector import Detector, load_detector
from run_folder import Run


def test_pixel_loss_by_hand():
    """Its values, and which pixels get a gradient. The second image has no pixel above 0.1."""
    maps = torch.tensor([[[0.0, 0.2], [0.4, 1.0]], [[0.05, 0.05], [0.1, 0.0]]], requires_grad=True)
    expected = dict(mean=0.225, max=(1 + 0.1) / 2, threshold=((0.2 + 0.4 + 1) / 3 + 0) / 2)
    reached = dict(mean="11111111", max="00010010", threshold="01110000")
    for pixels in expected:
        loss = diffdoctor.pixel_loss(maps, pixels)
        (grad,) = torch.autograd.grad(loss, maps)
        assert loss.item() == pytest.approx(expected[pixels])
        assert [int(g > 0) for g in grad.flatten()] == [int(digit) for digit in reached[pixels]]


@pytest.mark.parametrize("family", ["sd", "sd_v", "flux", "sd35", "z_image"])
def test_offline_loss_by_hand(world, family):
    """The model should predict the noise, v = signal noise - sigma x0, or noise - x0."""
    model = load_model(getattr(world, family), CPU)
    scheduler = make_scheduler(model, "euler" if model.is_flow else "ddim", 5)
    x0 = encode(model, torch.rand(2, 3, 16, 16, generator=generator(0, "images")))
    noise = initial_latents(model, [generator(0, "noise", i) for i in range(2)])
    cond = condition(model, PROMPTS[:2])
    t = torch.tensor([900, 20])
    sigma = t.view(2, 1, 1, 1) / 1000
    signal = 1 - sigma
    if not model.is_flow:
        alpha_bar = model.pipe.scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
        signal = alpha_bar.sqrt()
        sigma = (1 - alpha_bar).sqrt()
    target = dict(sd=noise, sd_v=signal * noise - sigma * x0).get(family, noise - x0)
    noisy_latents = signal * x0 + sigma * noise
    loss = diffdoctor.offline_loss(model, scheduler, x0, noise, t, cond)
    by_hand = (target - denoise(model, noisy_latents, t, cond)).square().mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("family, kind, grad_steps", [("flux", "euler", 1), ("sd", "ddpm", 3)])
def test_the_gradient_is_that_of_the_last_steps_alone(world, family, kind, grad_steps):
    """Against autograd through all steps, with the outputs before the cut detached by hand."""
    model = load_model(getattr(world, family), CPU)
    params = make_trainable(model, 4)
    random_lora(params)
    scheduler = make_scheduler(model, kind, 5)
    detector = load_detector(TOY / "detector", CPU)
    cond = condition(model, PROMPTS[:2])
    cut = 5 - grad_steps
    generators = [generator(0, "noise", i) for i in range(2)]
    noise = initial_latents(model, generators)
    latents = sample(model, scheduler, noise, cond, 0, cut, generators)
    maps = diffdoctor.treat_step(
        model, scheduler, detector, latents, cond, None, generators, grad_steps, 1.0
    )
    grads = torch.autograd.grad(maps.mean(), params)
    generators = [generator(0, "noise", i) for i in range(2)]
    x = initial_latents(model, generators)
    for i, t in enumerate(scheduler.timesteps):
        output = denoise(model, x, t, cond)
        output = output.detach() if i < cut else output
        x = scheduler_step(scheduler, output, t, x, generators)
    by_hand = torch.autograd.grad(detector(decode(model, x)).mean(), params)
    assert max(h.abs().max() for h in by_hand) > 0
    for g, h in zip(grads, by_hand):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5 * h.abs().max().item())


def test_kl_by_hand():
    p = torch.tensor([0.0, 1.0, 0.5, 0.25])
    q = torch.tensor([0.3, 0.5, 0.5, 0.5])
    by_hand = (math.log(1 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 4
    assert diffdoctor.kl(p, q).item() == pytest.approx(by_hand)
    # A complete miss is -log eps. A false alarm is 0 here, because it is KL(1-)'s.
    assert diffdoctor.kl(p[1:2], p[:1]).item() == pytest.approx(-math.log(1e-6))
    assert diffdoctor.kl(p[:1], p[1:2]) == 0


def test_stop_reason():
    def stop(confidences, drifts, patience=2, max_drift=0.5):
        rows = [dict(test_mean=c, test_drift=d) for c, d in zip(confidences, drifts, strict=True)]
        return diffdoctor.stop_reason(rows, patience, max_drift)

    assert stop([0.5, 0.4, 0.3], [0.0, 0.1, 0.5]) is None
    assert "drift 0.51 is beyond --max_drift 0.5" in stop([0.5, 0.4], [0.0, 0.51])
    assert "drift nan is beyond" in stop([0.5, math.nan], [0.0, math.nan])
    flat = [0.5, 0.3, 0.35, 0.3]
    assert stop(flat, [0.0] * 4) == "held-out confidence has not fallen for 2 evaluations"
    assert stop(flat, [0.0] * 4, patience=3) is None
    assert stop([*flat, 0.29], [0.0] * 5, patience=3) is None


def marked_image(confidence=1.0):
    """An image whose red channel is its label, so that whatever moves one must move the other."""
    label = torch.zeros(1, 32, 32)
    label[:, 5:14, 9:20] = confidence * torch.rand(9, 11, generator=generator(0, "label"))
    return torch.cat([label, torch.ones(2, 32, 32)]), label


def test_cutmix_takes_the_box_and_its_label_from_the_image_before():
    labels = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 32, 32) / 6
    shares = []
    for i in range(20):
        images = labels.expand(6, 3, 32, 32)
        images, mixed = augment.cutmix(images, labels, generator(0, "cutmix", i))
        assert torch.equal(images, mixed.expand(6, 3, 32, 32))
        is_other = mixed != labels
        assert torch.equal(mixed, torch.where(is_other, labels.roll(1, 0), labels))
        shares += is_other.float().mean((1, 2, 3)).tolist()
    assert 0.3 < np.mean(np.array(shares) > 0) < 0.7 and max(shares) < 0.45


def test_only_harmless_images_are_shrunk_and_only_half_of_them():
    image, label = marked_image()
    for i in range(8):
        assert augment.shrink_and_pad(image, label, generator(0, "shrink", i))[0] is image
    image, label = marked_image(confidence=0.09)
    num_shrunk = 0
    for i in range(40):
        new_image, new_label = augment.shrink_and_pad(image, label, generator(0, "shrink", i))
        assert torch.equal(new_image[:1], new_label) and new_image.shape == (3, 32, 32)
        if new_image is image:
            continue
        num_shrunk += 1
        # The other channels were 1: now they are 1 in a square and 0 around it.
        side = (new_image[1].amax(1) > 0).sum().item()
        assert new_image[1].sum().item() == pytest.approx(side**2) and 8 <= side <= 24
    assert 12 <= num_shrunk <= 28


def test_augment_moves_labels_too_and_draws_from_its_generator_alone():
    """Only the pseudo-labeled images, the last four, get new colors."""
    image, label = marked_image()
    is_pseudo = 4 * [False] + 4 * [True]
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draw = generator(0, "augment")
        results.append(augment.augment([image] * 8, [label] * 8, is_pseudo, draw))
    (images, labels), (images_again, labels_again) = results
    assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert (labels[0] - label).abs().max() > 0.1
    changes = (images[:, :1] - labels).abs().amax((1, 2, 3))
    assert changes[:4].max() == 0 and (changes[4:] > 0.02).sum() >= 2


@pytest.fixture
def labeled():
    """A labeled folder: red boxes on blue are wrong. 12 images to train on, 4 to test."""
    lines = []
    for kind in ("images", "maps"):
        Path("labeled", kind).mkdir(parents=True)
    for i in range(16):
        image = Image.new("RGB", (32, 32), "blue")
        image.paste("red", (i, 20 - i, i + 12, 32 - i))
        image.save(f"labeled/images/{i}.png")
        image.getchannel("R").save(f"labeled/maps/{i}.png")
        split = "test" if i >= 12 else "train"
        lines.append(json.dumps(dict(file_name=f"{i}.png", split=split, source="human")) + "\n")
    Path("labeled/meta.jsonl").write_text("".join(lines))
    # Batch norm in its head, and dropped paths, which draw from the global generator.
    torch.manual_seed(0)
    sizes = dict(depths=[1] * 4, hidden_sizes=[8, 16, 40, 64], decoder_hidden_size=16)
    config = SegformerConfig(**sizes, num_labels=1, drop_path_rate=0.5)
    Detector(SegformerForSemanticSegmentation(config), 32).save(".")
    return ["detector", "--data", "labeled", "--init", "detector", "--device", "cpu"]


def test_a_detector_learns(labeled):
    words = ["--init", "toy", "--batch_size", 8, "--train_steps", 60, "--size", 32, "--out", "run"]
    assert run_script(diffdoctor, *labeled, *words) == 0
    losses = [row["loss"] for row in read_log("run")]
    assert max(losses[-5:]) < 0.5 * losses[0]
    assert Image.open("run/samples/step_000060.png").size == (3 * 128, 4 * 128)


def test_a_resumed_detector_is_bit_equal(labeled, monkeypatch):
    words = [*labeled, "--train_steps", 4, "--save_every", 2, "--batch_size", 4, "--lr", 1e-3]
    torch.manual_seed(1)
    assert run_script(diffdoctor, *words, "--out", "whole") == 0
    torch.manual_seed(2)
    save = Run.save

    def save_and_die(*arguments):
        save(*arguments)
        sys.exit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_and_die)
        assert run_script(diffdoctor, *words, "--out", "half") == "killed"
    assert run_script(diffdoctor, *words, "--out", "half", "--resume") == 0
    assert read_log("whole") == read_log("half")
    whole = read_weights_of_run("whole")
    assert same_tensors(whole, read_weights_of_run("half"))
    assert whole["decode_head.batch_norm.num_batches_tracked"] == 4


def test_a_detector_update_with_nan_changes_nothing(labeled, monkeypatch):
    nan = torch.full((8, 3, 32, 32), math.nan)
    monkeypatch.setattr(diffdoctor, "augment", lambda images, labels, *_: (nan, labels))
    assert run_script(diffdoctor, *labeled, "--train_steps", 1, "--out", "run") == 0
    assert read_log("run")[0]["skipped"] is True
    assert same_tensors(read_weights_of_run("run"), load_file("detector/model.safetensors"))


def test_detector_metrics_by_hand(labeled):
    data = Labelled(read_labels(["labeled"], []), 32)
    detector = load_detector("detector", CPU)
    stats, _ = diffdoctor.detector_metrics(detector, data, CPU)
    q = torch.cat([detector(data[i][0][None]) for i in range(12, 16)]).double()
    p = torch.cat([data[i][1] for i in range(12, 16)]).double()
    assert stats["mse"] == pytest.approx(100 * (p - q).square().mean().item(), rel=1e-4)
    # Labels are 0 or 1, so that p log(p / q) is -log q or 0.
    assert stats["kl"] == pytest.approx(100 * -(p * q.log()).mean().item(), rel=1e-4)
    assert stats["kl1"] == pytest.approx(100 * -((1 - p) * (1 - q).log()).mean().item(), rel=1e-4)


def test_pseudo_labels_are_added_to_a_batch_of_true_labels():
    rows = [dict(source=s, split=t) for s in ("human", "real", "pseudo") for t in SPLITS * 5]
    indices = diffdoctor.indices_by_source(rows, "train")
    batch = diffdoctor.draw_batch(indices, 0, 1, 10)
    assert [rows[i]["source"] for i in batch] == ["human"] * 6 + ["real"] * 4 + ["pseudo"] * 10
    assert all(rows[i]["split"] == "train" for i in batch)
    assert batch != diffdoctor.draw_batch(indices, 0, 2, 10)
    # Without pseudo labels, an update has the same true ones.
    assert diffdoctor.draw_batch({**indices, "pseudo": []}, 0, 1, 10) == batch[:10]
    assert diffdoctor.draw_batch(dict(human=[7], real=[], pseudo=[]), 0, 1, 3) == [7, 7, 7]


def treat(world, out, *extra, model="sd"):
    words = ["treat", "--model", getattr(world, model), "--detector", TOY / "detector"]
    words += ["--reward", "toy_pref", "--prompts", world.prompts, "--data", world.images]
    words += ["--num_inference_steps", 4, "--batch_size", 4, "--lora_rank", 4, "--device", "cpu"]
    words += ["--train_steps", 2, "--save_every", 1, "--test_prompts", world.one]
    return run_script(diffdoctor, *words, "--out", out, *extra)


def test_the_loss_is_eq_4_whatever_the_micro_batch(world):
    assert treat(world, "four", "--micro_batch", 4) == 0
    assert treat(world, "three", "--micro_batch", 3) == 0
    for row, other in zip(read_log("four"), read_log("three"), strict=True):
        assert row["loss"] == pytest.approx(row["mean"] + 0.25 * row["offline"], rel=1e-4)
        for name in ("loss", "mean", "max", "offline", "grad_norm", "test_drift"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family, guidance_scale", [("sd35", 4.5), ("z_image", 1.0)])
def test_other_flows_are_treated(world, family, guidance_scale):
    words = ["--grad_steps", 2, "--guidance_scale", guidance_scale]
    assert treat(world, "run", *words, model=family) == 0
    rows = read_log("run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["grad_norm"] > 0 and row["offline"] > 0
        assert row["loss"] == pytest.approx(row["mean"] + 0.25 * row["offline"], rel=1e-4)


def test_it_stops_early_and_stays_stopped(world, capsys):
    words = ["--train_steps", 8, "--max_drift", 1e-6, "--lr", 1e-2, "--gamma", 0]
    assert treat(world, "run", *words, model="flux") == 0
    assert treat(world, "run", *words, "--resume", model="flux") == 0
    assert capsys.readouterr().out.count("is beyond --max_drift 1e-06") == 2
    assert len(read_log("run")) == 1 and "offline" not in read_log("run")[0]


def test_the_last_100_prompts_are_held_out_without_test_prompts(world, monkeypatch):
    """We encode 16 of them, and the run keeps all of them for combined_sample.py."""
    prompts = [f"prompt {i}" for i in range(102)] + ["a café"]
    encoded = []
    Path("many.txt").write_text("\n".join(prompts), encoding="utf-8")
    monkeypatch.setattr(diffdoctor, "encode_once", lambda model, texts: encoded.append(texts))
    monkeypatch.setattr(diffdoctor, "held_out_confidence", lambda *_, **__: exit("enough"))
    words = ["--test_prompts", "", "--gamma", 0, "--prompts"]
    assert treat(world, "run", *words, "many.txt") == "enough"
    assert encoded == [prompts[:19]]
    assert read_prompts("run/test_prompts.txt") == prompts[3:]
    assert "too few to hold out the last 100" in treat(world, "new", *words, world.prompts)


def test_the_untreated_images_are_detected_once(world, monkeypatch):
    detect = diffdoctor.detect
    detected = []

    def count(detector, images, device):
        detected.append(len(images))
        return detect(detector, images, device)

    monkeypatch.setattr(diffdoctor, "detect", count)
    assert treat(world, "run", "--gamma", 0, model="flux") == 0
    # Before training and after each of the two updates.
    assert detected == [2, 2, 2]


@pytest.mark.parametrize("model", ["flux-schnell", "flux-dev"])
def test_flux_is_saved_often_enough_to_stop_before_it_collapses(model):
    """The paper sees the collapse around epoch 10. The release's epoch is 8 updates."""
    assert diffdoctor.OURS[model]["save_every"] <= 10 * 8 / 2


def test_held_out_stats_by_hand(monkeypatch):
    x, before = torch.rand(2, 4, 3, 8, 8, generator=generator(0, "images"))
    monkeypatch.setattr(diffdoctor, "held_out_images", lambda *_: x)
    run = SimpleNamespace(args=SimpleNamespace(seed=0, micro_batch=8), sampler={}, dir=Path("."))
    Path("samples").mkdir()

    def red(images, *_):
        return images[:, 0]

    model = SimpleNamespace(device=CPU)
    untreated = (before, before[:, 0])
    stats, (images, maps) = diffdoctor.held_out_confidence(
        run, model, red, red, PROMPTS[:2], 0, untreated
    )
    assert torch.equal(images, x) and torch.equal(maps, x[:, 0])
    assert stats["test_mean"] == pytest.approx(x[:, 0].mean().item())
    assert stats["test_max"] == pytest.approx(x[:, 0].amax((1, 2)).mean().item())
    distance = (before - before[[3, 0, 1, 2]]).abs().mean()
    assert stats["test_drift"] == pytest.approx(((x - before).abs().mean() / distance).item())


def test_moved_commands_name_the_new_one():
    for name in ("score", "export_hard", "import_labels", "pseudo"):
        message = f"{name} has moved: python data/labels.py {name} --out x"
        assert run_script(diffdoctor, name, "--out", "x") == message


def test_dreambooth_is_treated_in_some_compositions_and_tested_in_others():
    treated_others, unseen_others = dreambooth.split_others()
    assert (len(treated_others), len(unseen_others)) == (8, 7)
    prompts = dreambooth.treated_prompts(treated_others)
    of_instance = [prompt for prompt in prompts if dreambooth.INSTANCE in prompt]
    assert 2 * len(of_instance) == len(prompts)
    assert 2 * of_instance.count(dreambooth.INSTANCE) == len(of_instance)
    assert len(set(dreambooth.compositions(unseen_others))) == 28
    assert not any(other in prompt for other in unseen_others for prompt in of_instance)
