"""diffdoctor.py: the losses and metrics by hand, the augmentation, a detector, and treating."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, PROMPTS, random_lora, read_log, read_weights_of_run, run_script
from conftest import same_tensors
from PIL import Image
from safetensors.torch import load_file
from transformers import SegformerConfig, SegformerForImageClassification
from transformers import SegformerForSemanticSegmentation

import diffdoctor
from common import TOY, condition, decode, denoise, encode, generator, initial_latents
from common import load_model, make_scheduler, make_trainable, sample, scheduler_step
from data import augment
from data.labels import Labelled, read_labels
from rewards import Detector, load_detector
from run_folder import Run, to_pil

SEGFORMER = dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 40, 64], decoder_hidden_size=16)


# --------------------------------------------------------------------------------------------------
# Losses, metrics, early stopping


@pytest.mark.parametrize(
    "pixels, expected, reached",
    [
        ("mean", 0.225, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ("max", (1 + 0.1) / 2, [[0, 0, 0, 1], [0, 0, 1, 0]]),
        ("threshold", ((0.2 + 0.4 + 1) / 3 + 0) / 2, [[0, 1, 1, 1], [0, 0, 0, 0]]),
    ],
)
def test_pixel_loss_by_hand(pixels, expected, reached):
    """Its value, and which pixels get a gradient. The second image has no pixel above 0.1."""
    maps = torch.tensor([[[0.0, 0.2], [0.4, 1.0]], [[0.05, 0.05], [0.1, 0.0]]], requires_grad=True)
    loss = diffdoctor.pixel_loss(maps, pixels)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert (maps.grad.flatten(1) > 0).int().tolist() == reached


@pytest.mark.parametrize("family", ["sd", "sd_v", "flux"])
def test_offline_loss_by_hand(world, family):
    """The regularizer's target is the noise, v = sqrt(a) noise - sqrt(1 - a) x0, or noise - x0."""
    model = load_model(getattr(world, family), CPU)
    scheduler = make_scheduler(model, "euler" if family == "flux" else "ddim", 5)
    x0 = encode(model, torch.rand(2, 3, 16, 16, generator=generator(0, "images")))
    noise = initial_latents(model, [generator(0, "noise", i) for i in range(2)])
    cond = condition(model, PROMPTS[:2])
    if family == "flux":
        t = torch.tensor([700.0, 250.0])
        sigma = torch.tensor([0.7, 0.25]).view(2, 1, 1, 1)
        noisy_latents = (1 - sigma) * x0 + sigma * noise
        target = noise - x0
    else:
        t = torch.tensor([900, 20])
        a = model.pipe.scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
        noisy_latents = a.sqrt() * x0 + (1 - a).sqrt() * noise
        target = noise if family == "sd" else a.sqrt() * noise - (1 - a).sqrt() * x0
    with torch.no_grad():
        loss = diffdoctor.offline_loss(model, scheduler, x0, noise, t, cond)
        by_hand = (target - denoise(model, noisy_latents, t, cond)).square().mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize(
    "family, kind, grad_steps", [("flux", "euler", 1), ("flux", "euler", 2), ("sd", "ddpm", 3)]
)
def test_the_gradient_is_that_of_the_last_steps_alone(world, family, kind, grad_steps):
    """Against autograd through all steps, whose denoiser outputs we detach by hand before the cut."""
    model = load_model(getattr(world, family), CPU)
    params = make_trainable(model, 4)
    random_lora(params)
    scheduler = make_scheduler(model, kind, 5)
    detector = load_detector(TOY / "detector", CPU)
    cond = condition(model, PROMPTS[:2])
    grad_modes = []
    model.denoiser.register_forward_pre_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))

    generators = [generator(0, "noise", i) for i in range(2)]
    noise = initial_latents(model, generators)
    latents = sample(model, scheduler, noise, cond, 0, 5 - grad_steps, generators)
    maps = diffdoctor.treat_step(
        model, scheduler, detector, latents, cond, None, generators, grad_steps, 1.0
    )
    grads = torch.autograd.grad(diffdoctor.pixel_loss(maps, "mean"), params)
    assert grad_modes == [False] * (5 - grad_steps) + [True] * grad_steps

    generators = [generator(0, "noise", i) for i in range(2)]
    x = initial_latents(model, generators)
    for i, t in enumerate(scheduler.timesteps):
        output = denoise(model, x, t, cond)
        if i < 5 - grad_steps:
            output = output.detach()
        x = scheduler_step(scheduler, output, t, x, generators)
    by_hand = torch.autograd.grad(detector(decode(model, x)).mean(), params)
    assert max(g.abs().max() for g in by_hand) > 0
    for g, h in zip(grads, by_hand):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5 * h.abs().max().item())


def test_kl_by_hand():
    p = torch.tensor([0.0, 1.0, 0.5, 0.25])
    q = torch.tensor([0.3, 0.5, 0.5, 0.5])
    by_hand = (math.log(1 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 4
    assert diffdoctor.kl(p, q).item() == pytest.approx(by_hand)
    zero = torch.zeros(3)
    one = torch.ones(3)
    # A complete miss is -log eps, a right answer 0, and a false alarm the concern of KL(1-).
    assert diffdoctor.kl(one, zero).item() == pytest.approx(-math.log(1e-6))
    assert diffdoctor.kl(zero, zero) == diffdoctor.kl(zero, one) == 0
    assert diffdoctor.kl(1 - zero, 1 - one).item() == pytest.approx(-math.log(1e-6), rel=1e-3)


def test_stop_reason():
    def stop(confidences, drifts, patience=2, max_drift=0.5):
        rows = [dict(test_mean=c, test_drift=d) for c, d in zip(confidences, drifts, strict=True)]
        return diffdoctor.stop_reason(rows, patience, max_drift)

    assert stop([0.5], [0.0], patience=1) is None
    assert stop([0.5, 0.4, 0.3], [0.0, 0.1, 0.5]) is None
    assert stop([0.5, 0.4, 0.3], [0.0, 0.1, 0.51]) == "drift 0.51 is beyond --max_drift 0.5"
    assert "nan" in stop([0.5, math.nan], [0.0, math.nan])
    flat = [0.5, 0.3, 0.35, 0.3]
    assert stop(flat, [0.0] * 4) == "held-out confidence has not fallen for 2 evaluations"
    assert stop(flat, [0.0] * 4, patience=3) is None
    assert stop([*flat, 0.29], [0.0] * 5, patience=3) is None


# --------------------------------------------------------------------------------------------------
# Augmentation


def marked_image(size=32, confidence=1.0):
    """An image whose red channel is its label, so that whatever moves one must move the other."""
    label = torch.zeros(1, size, size)
    label[:, 5:14, 9:20] = confidence * torch.rand(9, 11, generator=generator(0, "label"))
    return torch.cat([label, torch.ones(2, size, size)]), label


def test_labels_move_with_their_images():
    image, label = marked_image()
    for i in range(20):
        new_image, new_label = augment.weak(image, label, generator(0, "weak", i))
        assert torch.equal(new_image[:1], new_label)
        assert (new_image - image).abs().max() > 0.1
    labels = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 32, 32) / 6
    shares = []
    for i in range(20):
        draw = generator(0, "cutmix", i)
        images, mixed = augment.cutmix(labels.expand(6, 3, 32, 32), labels, draw)
        assert torch.equal(images, mixed.expand(6, 3, 32, 32))
        for k in range(6):
            is_other = mixed[k, 0] != labels[k, 0]
            assert (mixed[k, 0][is_other] == labels[k - 1, 0, 0, 0]).all()
            shares.append(is_other.float().mean().item())
    assert 0.3 < np.mean(np.array(shares) > 0) < 0.7 and max(shares) < 0.45


def test_only_harmless_images_are_shrunk():
    image, label = marked_image()
    assert augment.shrink_and_pad(image, label, generator(0, "shrink"))[0] is image
    image, label = marked_image(confidence=0.09)
    sides = set()
    for i in range(40):
        new_image, new_label = augment.shrink_and_pad(image, label, generator(0, "shrink", i))
        assert torch.equal(new_image[:1], new_label) and new_image.shape == (3, 32, 32)
        # The other channels were 1: now they are 1 in a square and 0 around it.
        rows = new_image[1].amax(1).nonzero()
        side = len(rows)
        square = torch.ones(side, side)
        left = new_image[1].amax(0).nonzero()[0].item()
        torch.testing.assert_close(new_image[1, rows[0] :, left:][:side, :side], square)
        assert new_image[1].sum().item() == pytest.approx(side**2)
        sides.add(side)
    assert len(sides) > 8 and min(sides) >= 8 and max(sides) <= 24


def test_strong_augmentation_is_for_pseudo_labels_and_draws_from_its_generator():
    image, label = marked_image()
    images = torch.stack([image] * 8)
    labels = torch.stack([label] * 8)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        is_pseudo = [False] * 4 + [True] * 4
        results.append(augment.augment(images, labels, is_pseudo, generator(0, "augment")))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    new_images, new_labels = results[0]
    assert torch.equal(new_images[:4, :1], new_labels[:4])  # no color of them has changed
    assert (new_images[4:, :1] - new_labels[4:]).abs().amax((1, 2, 3)).min() > 0.02
    assert new_images.min() >= 0 and new_images.max() <= 1 + 1e-6


# --------------------------------------------------------------------------------------------------
# Training a detector


@pytest.fixture
def labeled():
    """A labeled folder: red boxes on gray are wrong. 12 images to train on, 4 to test."""
    lines = []
    for kind in ("images", "maps"):
        Path("labeled", kind).mkdir(parents=True)
    for i in range(16):
        corner = torch.randint(16, (2,), generator=generator(0, "box", i)).tolist()
        label = torch.zeros(1, 32, 32)
        label[:, corner[0] : corner[0] + 12, corner[1] : corner[1] + 12] = 1
        image = torch.full((3, 32, 32), 0.5)
        image = torch.where(label > 0, torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1), image)
        to_pil(image).save(f"labeled/images/{i}.png")
        to_pil(label.expand(3, -1, -1)).convert("L").save(f"labeled/maps/{i}.png")
        split = "test" if i >= 12 else "train"
        lines.append(json.dumps(dict(file_name=f"{i}.png", split=split, source="human")) + "\n")
    Path("labeled/meta.jsonl").write_text("".join(lines))
    # Batch norm in its head, and dropped paths, which draw from the global generator.
    torch.manual_seed(0)
    net = SegformerForSemanticSegmentation(
        SegformerConfig(**SEGFORMER, num_labels=1, drop_path_rate=0.5)
    )
    Detector(net, 32).save(".")
    return ["detector", "--data", "labeled", "--init", "detector", "--device", "cpu"]


def test_a_detector_learns(labeled):
    words = ["--init", "toy", "--size", 32, "--batch_size", 8, "--train_steps", 25, "--out", "run"]
    assert run_script(diffdoctor, *labeled, *words) == 0
    losses = [row["loss"] for row in read_log("run")]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert Image.open("run/samples/step_000025.png").size == (3 * 128, 4 * 128)
    learned = load_detector("run/model/detector", CPU)
    assert learned.size == 32 and not learned.training


def test_a_resumed_detector_is_bit_equal(labeled, monkeypatch):
    words = [*labeled, "--train_steps", 4, "--save_every", 2, "--batch_size", 4, "--lr", 1e-3]
    torch.manual_seed(1)
    assert run_script(diffdoctor, *words, "--out", "whole") == 0
    torch.manual_seed(2)
    log = Run.log

    def log_until_2(run, step, **values):
        if step > 2:
            raise InterruptedError("killed")
        log(run, step, **values)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(Run, "log", log_until_2)
        raise SystemExit(run_script(diffdoctor, *words, "--out", "half"))
    assert len(read_log("half")) == 2
    assert run_script(diffdoctor, *words, "--out", "half", "--resume") == 0
    assert read_log("whole") == read_log("half")
    whole = read_weights_of_run("whole")
    start = load_file("detector/model.safetensors")
    assert same_tensors(whole, read_weights_of_run("half"))
    mean = "decode_head.batch_norm.running_mean"
    assert not torch.equal(whole[mean], start[mean])


def test_a_detector_update_with_nan_changes_nothing(labeled, monkeypatch):
    def spoil(images, labels, is_pseudo, draw):
        return images * math.nan, labels

    monkeypatch.setattr(diffdoctor, "augment", spoil)
    assert run_script(diffdoctor, *labeled, "--train_steps", 1, "--out", "run") == 0
    assert read_log("run")[0]["skipped"] is True
    assert same_tensors(read_weights_of_run("run"), load_file("detector/model.safetensors"))


def test_detector_metrics_by_hand(labeled):
    data = Labelled(read_labels(["labeled"], [TOY / "images"]), 32)
    data.rows = data.rows[:80]
    detector = load_detector("detector", CPU)
    stats, _ = diffdoctor.detector_metrics(detector, data, CPU)
    with torch.no_grad():
        q = torch.stack([detector(data[i][0][None])[0] for i in range(12, 16)]).double()
    p = torch.stack([data[i][1][0] for i in range(12, 16)]).double()
    assert stats["mse"] == pytest.approx(100 * (p - q).square().mean().item(), rel=1e-4)
    # Labels are 0 or 1, so that p log(p / q) is -log q or 0.
    assert stats["kl"] == pytest.approx(100 * -(p * q.log()).mean().item(), rel=1e-4)
    assert stats["kl1"] == pytest.approx(100 * -((1 - p) * (1 - q).log()).mean().item(), rel=1e-4)
    assert {"mse_real", "kl1_real"} == stats.keys() - {"mse", "kl", "kl1"}


def test_a_batch_is_half_pseudo_and_partly_photographs():
    rows = []
    for source in ("human", "real", "pseudo"):
        for split in ("train", "test"):
            rows += [dict(source=source, split=split)] * 5
    indices = diffdoctor.indices_by_source(rows, "train")
    batch = diffdoctor.draw_batch(indices, 0, 1, 20)
    kinds = Counter((rows[i]["source"], rows[i]["split"]) for i in batch)
    assert kinds == {("pseudo", "train"): 10, ("real", "train"): 4, ("human", "train"): 6}
    assert batch == diffdoctor.draw_batch(indices, 0, 1, 20)
    assert batch != diffdoctor.draw_batch(indices, 0, 2, 20)
    only_human = dict(human=indices["human"], real=[], pseudo=[])
    assert set(diffdoctor.draw_batch(only_human, 0, 1, 20)) <= set(indices["human"])


def test_a_start_from_an_encoder_draws_the_head_alone(monkeypatch):
    encoder = SegformerForImageClassification(SegformerConfig(**SEGFORMER))
    encoder.save_pretrained("encoder")
    monkeypatch.setitem(diffdoctor.BACKBONES, "mit-b5", "encoder")
    nets = [diffdoctor.start_detector("mit-b5", seed, 64, CPU).net for seed in (0, 0, 1)]
    first, same, other = (net.state_dict() for net in nets)
    assert same_tensors(first, same) and not same_tensors(first, other)
    for key, tensor in encoder.segformer.state_dict().items():
        assert torch.equal(first[f"segformer.{key}"], tensor)
    assert first["decode_head.classifier.bias"].item() == -2


# --------------------------------------------------------------------------------------------------
# Treating


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


def test_it_stops_early_and_stays_stopped(world, capsys):
    words = ["--train_steps", 8, "--max_drift", 1e-6, "--lr", 1e-2, "--gamma", 0]
    assert treat(world, "run", *words, model="flux") == 0
    assert "is beyond --max_drift 1e-06" in capsys.readouterr().out
    assert treat(world, "run", *words, "--resume", model="flux") == 0
    assert "is beyond --max_drift 1e-06" in capsys.readouterr().out
    (row,) = read_log("run")
    assert "offline" not in row


def test_the_last_100_prompts_are_held_out_without_test_prompts(world, monkeypatch):
    prompts = [f"prompt {i}" for i in range(103)]
    Path("many.txt").write_text("\n".join(prompts))
    encoded = []
    monkeypatch.setattr(diffdoctor, "encode_once", lambda model, texts: encoded.append(texts))
    monkeypatch.setattr(diffdoctor, "make_trainable", lambda *_: exit("enough"))
    words = ["--test_prompts", "", "--gamma", 0, "--prompts"]
    assert treat(world, "run", *words, "many.txt") == "enough"
    assert encoded == [prompts[:3] + prompts[3:19]]
    assert "too few to hold out the last 100" in treat(world, "run", *words, world.prompts)


def test_held_out_stats_by_hand(monkeypatch):
    images = torch.rand(4, 3, 8, 8, generator=generator(0, "now"))
    before = torch.rand(4, 3, 8, 8, generator=generator(0, "before"))
    monkeypatch.setattr(diffdoctor, "generate", lambda *_, **options: images)
    args = SimpleNamespace(seed=0, micro_batch=8)
    run = SimpleNamespace(args=args, sampler={}, dir=Path("."))
    Path("samples").mkdir()

    def red(images):
        return images[:, 0]

    def reward(images, prompts):
        return torch.tensor([float(prompt) for prompt in prompts])

    model = SimpleNamespace(device=CPU)
    words = (run, model, red, reward, ["1", "3"], 7, before)
    stats, _ = diffdoctor.held_out_confidence(*words)
    x = images.numpy()
    y = before.numpy()
    assert stats["test_mean"] == pytest.approx(x[:, 0].mean())
    assert stats["test_max"] == pytest.approx(x[:, 0].max((1, 2)).mean())
    distance = np.abs(y - y[[3, 0, 1, 2]]).mean()
    assert stats["test_drift"] == pytest.approx(np.abs(x - y).mean() / distance)
    assert stats["test_reward"] == 2
    assert Path("samples/step_000007.png").is_file()


@pytest.mark.parametrize("command", ["score", "export_hard", "import_labels", "pseudo"])
def test_moved_commands_name_the_new_one(command):
    message = run_script(diffdoctor, command, "--out", "x")
    assert message == f"{command} has moved: python data/labels.py {command} --out x"
