"""focus_n_fix.py: the regional penalty, its regions, DRaFT's gradient, and the pool of pairs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, PROMPTS, random_lora, read_log, run_script
from PIL import Image

import combined_sample
import focus_n_fix
from common import TOY, decode, denoise, generator, initial_latents, load_model, make_scheduler
from common import make_trainable, sample
from data.prompts import condition
from focus_n_fix import LEVEL, Pool, Region, base_and_mask, change, concept_reward, draft
from focus_n_fix import focus_loss, grad_cam, last_norm, problem_mask, sample_in_two
from results.experiments.focus_n_fix import training_rows
from judges.detector import load_detector
from judges.images import preprocess
from rewards import load_reward
from run_folder import generate

SAMPLER = dict(scheduler="ddim", eta=0.0, num_inference_steps=4, guidance_scale=2.0)


def draw(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed, "draw"))


def test_the_loss_by_hand():
    base = torch.zeros(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1  # the left half may change
    images = 9 * mask.expand_as(base)
    images[0, ..., 2:] = 0.5
    images[1, 0, 0, 3] = 0.3
    r = torch.tensor([1.0, 3.0])
    norm = torch.tensor([0.5 * 24**0.5, 0.3])  # 24 values lie outside
    torch.testing.assert_close(change(images, base, 1 - mask, raw=True), norm)
    torch.testing.assert_close(change(images, base, 1 - mask), norm / 24**0.5)
    torch.testing.assert_close(change(images, base, mask), torch.tensor([9.0, 9.0]))
    expected = (2 * ((norm**2 / 24 + LEVEL**2).sqrt() - LEVEL) - r).mean()
    torch.testing.assert_close(focus_loss(images, base, mask, r, beta=2.0), expected)
    raw_loss = focus_loss(images, base, mask, r, beta=2.0, raw=True)
    torch.testing.assert_close(raw_loss, (2 * norm - r).mean())
    # Four times the resolution is the same change.
    big = [F.interpolate(x, scale_factor=4) for x in (images, base, 1 - mask)]
    torch.testing.assert_close(change(*big), norm / 24**0.5)


@pytest.mark.parametrize("raw", [False, True])
def test_the_gradient_is_zero_at_the_start_and_then_right(raw):
    base = draw(2, 3, 5, 5).double()
    mask = (draw(2, 1, 5, 5, seed=1) > 0.5).double()

    def loss_of(images):
        return focus_loss(images, base, mask, torch.tensor([1.0, 2.0]), 1.5, raw)

    start = base.clone().requires_grad_()
    loss_of(start).backward()
    assert loss_of(start) == -1.5
    assert torch.equal(start.grad, torch.zeros_like(base))
    images = draw(2, 3, 5, 5, seed=2).double().requires_grad_()
    torch.autograd.gradcheck(loss_of, images)
    (gradient,) = torch.autograd.grad(loss_of(images), images)
    assert torch.equal(gradient != 0, mask.expand_as(gradient) == 0)


@pytest.mark.parametrize("size, slope", [(1e-6, 0.0), (LEVEL, 0.5**0.5), (0.5, 1.0)])
def test_a_change_that_nobody_sees_does_not_pull(size, slope):
    base = draw(1, 3, 8, 8).double()
    images = (base + size).requires_grad_()
    loss = focus_loss(images, base, torch.zeros(1, 1, 8, 8), torch.zeros(1), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.hypot(size, LEVEL) - LEVEL, rel=1e-6, abs=1e-9)
    assert images.grad.sum().item() == pytest.approx(slope, abs=1e-3)


def test_a_full_region_and_beta_0_are_draft():
    base = draw(1, 3, 4, 4)
    full = torch.ones(1, 1, 4, 4)
    for mask, beta, is_draft in ((full, 1e6, True), (1 - full, 0.0, True), (1 - full, 1.0, False)):
        images = draw(1, 3, 4, 4, seed=1).requires_grad_()
        focus_loss(images, base, mask, images.sum((1, 2, 3)), beta).backward()
        assert torch.equal(images.grad, -torch.ones_like(base)) == is_draft


@pytest.mark.parametrize("dilate", [0, 1, 20])
def test_the_mask_against_brute_force(dilate):
    heat = draw(2, 1, 13, 13, seed=dilate)
    heat[0, 0, 0, 0] = 1.0
    heat[1, 0, 5, 5] = 0.97  # the threshold itself is not above it
    expected = torch.zeros_like(heat)
    for image, _, y, x in (heat > 0.97).nonzero().tolist():
        rows = slice(max(y - dilate, 0), y + dilate + 1)
        expected[image, 0, rows, max(x - dilate, 0) : x + dilate + 1] = 1
    assert torch.equal(problem_mask(heat, 0.97, dilate), expected)


def test_grad_cam_against_the_last_block_written_out():
    clip, _ = load_reward("toy_clip", CPU)
    images = draw(3, 3, 64, 64)
    prompts = ["a red star"] * 3
    tower = clip.clip.vision_model
    *first_blocks, block = tower.encoder.layers
    pixels = preprocess(images, clip.size, clip.mean, clip.std)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in first_blocks:
        hidden = layer(hidden, attention_mask=None)
    a = block.layer_norm1(hidden).requires_grad_()
    hidden = hidden + block.self_attn(a)[0]
    hidden = hidden + block.mlp(block.layer_norm2(hidden))
    features = clip.clip.visual_projection(tower.post_layernorm(hidden[:, 0]))
    r = F.normalize(features, dim=-1) @ clip.text("a red star")
    weight = torch.autograd.grad(-r.sum(), a)[0][:, 1:].mean(1)
    side = math.isqrt(a.shape[1] - 1)
    expected = torch.einsum("bnd,bd->bn", a[:, 1:], weight).relu().view(3, 1, side, side)
    expected = F.interpolate(expected, (64, 64), mode="bilinear")
    expected = expected / expected.amax((1, 2, 3), keepdim=True)

    region = Region(0.5, 0, clip=clip, reward=clip)
    with torch.no_grad():  # as the script calls it
        cam = region.saliency(images, prompts)
        torch.testing.assert_close(cam, expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(region(images, prompts), (cam > 0.5).float())
        flat = grad_cam(last_norm(clip), lambda images: 0 * clip(images, prompts), images)
    assert torch.equal(flat, torch.zeros_like(cam))


def test_an_open_clip_model_has_a_saliency():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    net = open_clip.CLIP(16, vision, dict(vocab_size=79, width=16, heads=2, layers=1)).eval()
    layer = last_norm(SimpleNamespace(clip=net))
    cam = grad_cam(layer, lambda images: net.encode_image(images)[:, 0], draw(8, 3, 32, 32))
    assert cam.amax() == 1 and 0 < cam.mean() < 0.9


def test_a_concept_is_a_difference_of_cosines():
    clip, _ = load_reward("toy_clip", CPU)
    reward = concept_reward(clip, "a red star", "a blue star")
    images = draw(3, 3, 64, 64)
    expected = clip(images, ["a blue star"] * 3) - clip(images, ["a red star"] * 3)
    torch.testing.assert_close(reward(images, PROMPTS[:3]), expected)
    with pytest.raises(SystemExit, match="cannot tell the two texts apart"):
        concept_reward(clip, "a red star", "a red star")


def test_draft_is_sampling_and_its_gradient_that_of_a_hand_cut_graph(world):
    model = load_model(world.sd, CPU)
    params = make_trainable(model, 4)
    random_lora(params)
    scheduler = make_scheduler(model, "ddim", 4)
    cond, uncond = condition(model, PROMPTS[:2]), condition(model, [None] * 2)
    noise = draw(2, *model.latent_shape)
    latents = sample(model, scheduler, noise, cond, 0, 2, None, 2.0, uncond)
    images, noise_preds = draft(model, scheduler, latents, cond, 2.0, uncond, 2)
    whole = sample(model, scheduler, latents, cond, 2, 4, None, 2.0, uncond, grad=True)
    assert torch.equal(images, decode(model, whole))
    (images - draw(2, 3, 16, 16)).square().mean().backward()
    ours = [p.grad for p in [*params, *noise_preds]]

    # DDIM's own formula for the last two steps, from latents that carry no gradient.
    x = latents
    noise_preds = []
    alpha_bars = [*scheduler.alphas_cumprod[scheduler.timesteps[2:]], scheduler.final_alpha_cumprod]
    for i, t in enumerate(scheduler.timesteps[2:]):
        noise_preds.append(denoise(model, x, t, cond, 2.0, uncond))
        x0 = (x - (1 - alpha_bars[i]) ** 0.5 * noise_preds[i]) / alpha_bars[i] ** 0.5
        x = alpha_bars[i + 1] ** 0.5 * x0 + (1 - alpha_bars[i + 1]) ** 0.5 * noise_preds[i]
    loss = (decode(model, x) - draw(2, 3, 16, 16)).square().mean()
    expected = torch.autograd.grad(loss, [*params, *noise_preds])
    for grad, grad_by_hand in zip(ours, expected, strict=True):
        tolerance = 1e-3 * grad_by_hand.abs().max().item()
        assert tolerance > 0
        torch.testing.assert_close(grad, grad_by_hand, rtol=1e-3, atol=tolerance)


def test_the_base_image_is_the_untouched_models_whatever_the_lora(world):
    untouched = generate(load_model(world.sd, CPU), PROMPTS, 0, SAMPLER)
    model = load_model(world.sd, CPU)
    random_lora(make_trainable(model, 4))
    scheduler = make_scheduler(model, "ddim", 4)
    noise = initial_latents(model, [generator(0, "image", i, 0) for i in range(4)])
    region = Region(0.02, 1, load_detector(f"{TOY}/detector", CPU))
    base, mask = base_and_mask(model, scheduler, 2.0, region, 4, noise, PROMPTS)
    heat = F.interpolate(region.detector(untouched)[:, None], (16, 16), mode="bilinear")
    assert torch.equal(base, untouched) and torch.equal(mask, problem_mask(heat, 0.02, 1))
    assert not torch.equal(generate(model, PROMPTS, 0, SAMPLER), untouched)


def test_a_pool_is_finite_and_its_pairs_come_again(world):
    def make_base(noise, prompts):
        return 2 * noise, noise[:, :1]

    def reward(images, prompts):
        return images.mean((1, 2, 3))

    model = load_model(world.sd, CPU)
    pool = Pool(model, PROMPTS, 0, 6, make_base, reward)
    pool.fill(6, batch_size=4)
    no_pool = Pool(model, PROMPTS, 0, 0, make_base, reward)
    prompts, noise, base, mask, base_reward = pool.batch(range(4, 8))  # pairs 4, 5, 0, 1
    assert torch.equal(base, 2 * noise) and torch.equal(mask, noise[:, :1])
    assert torch.equal(base_reward, reward(base, prompts))
    assert torch.equal(noise[2:], pool.batch(range(2))[1])
    for again, size in ((pool.batch(range(10, 14)), 4), (no_pool.batch(range(4, 8)), 2)):
        assert again[0][:size] == prompts[:size]
        for part, part_again in zip((noise, base, mask, base_reward), again[1:], strict=True):
            assert torch.equal(part[:size], part_again[:size])
    assert not any(torch.equal(x, noise[2]) for x in no_pool.batch(range(6, 22))[1])


def short_run(world, *more):
    """The flags of a run of two updates with one held-out prompt."""
    words = ["--model", world.sd, "--prompts", world.prompts, "--test_prompts", world.one]
    words += ["--reward", "toy_pref", "--detector", f"{TOY}/detector", "--device", "cpu"]
    words += ["--num_inference_steps", 4, "--batch_size", 4, "--micro_batch", 2, "--pool", 4]
    words += ["--grad_steps", 2, "--lr", 1e-3]
    words += ["--lora_rank", 4, "--guidance_scale", 2, "--train_steps", 2]
    words += ["--threshold", 0.97, "--dilate", 0]
    return [*words, *more, "--out", "run"]


def pairs_of_short_run(model):
    """The first four pairs that short_run trains on -> prompts, x_T, I0, M, r(I0)."""
    region = Region(0.97, 0, load_detector(f"{TOY}/detector", CPU))

    def make_base(noise, prompts):
        scheduler = make_scheduler(model, "ddim", 4)
        return base_and_mask(model, scheduler, 2.0, region, 4, noise, prompts)

    reward, _ = load_reward("toy_pref", CPU)
    pool = Pool(model, PROMPTS, 0, 0, make_base, reward)
    return pool.batch(range(4))


@pytest.mark.parametrize("pool", [4, 0])
def test_a_run_logs_the_loss_and_shows_the_region(world, monkeypatch, pool):
    monkeypatch.setattr(focus_n_fix, "SPREAD_PAIRS", 4)
    words = short_run(world, "--beta", 3, "--raw_norm", "--pool", pool)
    assert run_script(focus_n_fix, *words) == 0
    log = read_log("run")
    config = json.loads(Path("run/config.json").read_text())
    assert config["sampler"] == SAMPLER
    assert (config["region"], config["threshold"]) == ("heatmap", 0.97)
    assert config["reward"] == "toy_pref"
    # The unit of r' is the spread of the base model's rewards.
    prompts, _, base, *_ = pairs_of_short_run(load_model(world.sd, CPU))
    base_rewards = load_reward("toy_pref", CPU)[0](base, prompts)
    for row in log:
        r_mapped = (row["reward"] - base_rewards.mean().item()) / base_rewards.std().item()
        assert row["loss"] == pytest.approx(3 * row["outside"] - r_mapped, rel=1e-3, abs=1e-4)
        assert list(row["grad_by_t"]) == ["251", "1"] and min(row["grad_by_t"].values()) > 0
        # A pool of 4 repeats the same pairs, so their base images have the same rewards.
        if pool or row is log[0]:
            base_reward = base_rewards.mean().item()
            assert row["base_reward"] == pytest.approx(base_reward, rel=1e-6)
    assert abs(log[0]["loss"]) < 1e-3  # of the base model itself
    assert log[0]["outside"] < 1e-4 < log[1]["outside"]
    # One row of I0 | M | I | 3 |I - I0|. Before training I is I0.
    picture = np.asarray(Image.open("run/samples/region_000000.png")).astype(int)
    base, mask, images, difference = np.split(picture, 4, axis=1)
    assert max(abs(base - images).max(), difference.max()) <= 1 and set(mask.ravel()) <= {0, 255}


@pytest.mark.parametrize("family, timesteps", [("sd35", ["602", "9"]), ("z_image", ["857", "667"])])
def test_flows_take_euler_steps(world, family, timesteps):
    words = short_run(world, "--model", getattr(world, family))
    assert run_script(focus_n_fix, *words) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["sampler"] == dict(SAMPLER, scheduler="euler")
    for row in read_log("run"):
        assert list(row["grad_by_t"]) == timesteps and min(row["grad_by_t"].values()) > 0
    assert read_log("run")[0]["outside"] < 1e-4 < read_log("run")[1]["outside"]


@pytest.mark.filterwarnings("ignore:std")
def test_a_reward_without_spread_is_refused(world):
    message = run_script(focus_n_fix, *short_run(world, "--pool", 1))
    assert "these images have equal rewards" in message


def test_two_models_take_turns(world):
    """The change of the whole, of the prefix alone, and of the tail alone."""
    model = load_model(world.sd, CPU)
    scheduler = make_scheduler(model, "ddim", 4)
    noise = initial_latents(model, [generator(0, "image", i, 0) for i in range(4)])
    untouched = generate(model, PROMPTS, 0, SAMPLER)
    random_lora(make_trainable(model, 4))

    def images_of(prefix, tail):
        return sample_in_two(model, scheduler, 2.0, 3, 4, noise, PROMPTS, prefix, tail)

    base_first = dict(SAMPLER, base_steps=3)
    assert torch.equal(images_of("base", "base"), untouched)
    assert torch.equal(images_of("tuned", "tuned"), generate(model, PROMPTS, 0, SAMPLER))
    assert torch.equal(images_of("base", "tuned"), generate(model, PROMPTS, 0, base_first))
    sizes = []
    for weights in (("tuned", "tuned"), ("tuned", "base"), ("base", "tuned")):
        sizes.append((images_of(*weights) - untouched).abs().mean())
    assert sizes[0] > sizes[1] > sizes[2] > 1e-4


@pytest.mark.parametrize("prefix", ["tuned", "base"])
def test_the_prefix_is_that_of_the_flag_in_training_and_after(world, monkeypatch, prefix):
    monkeypatch.setattr(focus_n_fix, "SPREAD_PAIRS", 4)
    model = load_model(world.sd, CPU)
    random_lora(make_trainable(model, 4))
    model.save("lora")
    words = short_run(world, "--prefix", prefix, "--init_lora", "lora")
    assert run_script(focus_n_fix, *words, "--lr", 1e-9) == 0

    # In training.
    scheduler = make_scheduler(model, "ddim", 4)
    prompts, noise, base, mask, _ = pairs_of_short_run(model)
    images = sample_in_two(model, scheduler, 2.0, 2, 4, noise, prompts, prefix, "tuned")
    row = read_log("run")[1]
    outside = change(images, base, 1 - mask).mean().item()
    assert row["outside"] == pytest.approx(outside, rel=1e-4)

    # On the held-out prompt. A base prefix changes nothing, so we do not measure it apart.
    prompt = Path(world.one).read_text().splitlines()
    noise = initial_latents(model, [generator(0, "held-out", 0, 0)])
    region = Region(0.97, 0, load_detector(f"{TOY}/detector", CPU))
    base, mask = base_and_mask(model, scheduler, 2.0, region, 4, noise, prompt)
    images = sample_in_two(model, scheduler, 2.0, 2, 4, noise, prompt, prefix, "tuned")
    outside = change(images, base, 1 - mask).mean().item()
    assert row["test_outside"] == pytest.approx(outside, rel=1e-4)
    if prefix == "base":
        assert "test_outside_prefix" not in row and "test_outside_tail" not in row
    else:
        assert 0 < row["test_outside_tail"] < row["test_outside_prefix"]

    # In combined_sample.py, which needs no flag.
    sampler = json.loads(Path("run/config.json").read_text())["sampler"]
    assert sampler.get("base_steps") == (2 if prefix == "base" else None)
    words = ["--lora", "run", "--num_images", 1, "--device", "cpu", "--out", "images"]
    assert run_script(combined_sample, *words) == 0
    expected = sample_in_two(
        model, scheduler, 2.0, 2, 1, initial_latents(model, [generator(0, "image", 0, 0)]),
        prompt, prefix, "tuned",
    )
    image = torch.from_numpy(np.array(Image.open("images/00000_00.png"))).permute(2, 0, 1)
    assert (image / 255 - expected[0]).abs().max() <= 0.501 / 255


def test_the_objective_is_zero_for_the_base_model(world, monkeypatch):
    monkeypatch.setattr(focus_n_fix, "SPREAD_PAIRS", 4)
    compare = focus_n_fix.compare
    found = []

    def keep(*args, **kwargs):
        found.append(compare(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(focus_n_fix, "compare", keep)
    assert run_script(focus_n_fix, *short_run(world, "--beta", 1)) == 0
    before, after = found
    assert abs(before["test_objective"]) < 1e-3 < abs(after["test_objective"])
    assert before["test_outside"] < 1e-4 < after["test_outside"]


def test_training_pairs_are_compared_with_their_own_base_images(tmp_path):
    """Two windows by hand: the pairs of the second are two standard deviations better."""
    config = dict(reward_mean=-3.0, reward_spread=0.5)
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = []
    for base_reward in (-3.0, -2.0):
        r_mapped = (base_reward + 0.1 + 3.0) / 0.5
        row = dict(reward=base_reward + 0.1, base_reward=base_reward, outside=0.2, inside=0.3)
        lines += [json.dumps({**row, "loss": 0.05 - r_mapped})] * 15  # 0.05 is beta * penalty
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    rows = training_rows(tmp_path)
    assert len(rows) == 3 and set(rows[0].values()) == {0.0}
    for row in rows[1:]:
        assert row == pytest.approx(dict(reward=0.2, objective=0.15, outside=0.2, inside=0.3))


def test_defaults_that_depend_on_other_flags():
    for words, expected in (
        ("", ("artifact", "heatmap", 0.2, f"{TOY}/detector")),
        ("--concept a b", ("toy_clip", "saliency", 0.5, None)),
        ("--model sdxl --prompts x --concept a b", ("clip", "saliency", 0.5, None)),
    ):
        args = focus_n_fix.parse_args(words.split())
        assert (args.reward, args.region, args.threshold, args.detector) == expected


def test_refusals(capsys):
    for words, message in (
        ("--lora_rank 0", "with its LoRA off"),
        ("--region saliency", "need a CLIP as --reward"),
        ("--region saliency --reward mps", "need a CLIP as --reward"),
        ("--concept a b --reward toy_clip,toy_pref", "need a CLIP as --reward"),
        ("--concept a b --detector x", "--detector is not used"),
        ("--model sd14 --prompts x", "--detector is required"),
    ):
        assert run_script(focus_n_fix, *words.split()) == 2
        assert message in capsys.readouterr().err


def test_without_test_prompts_the_last_100_are_held_out(tmp_path):
    lines = [f"prompt {i}" for i in range(102)]
    args = SimpleNamespace(prompts=tmp_path / "prompts.txt", test_prompts=None)
    args.prompts.write_text("\n".join(lines))
    assert focus_n_fix.read_both_prompts(args) == (lines[:2], lines[2:18])
    args.prompts.write_text("\n".join(lines[:100]))
    with pytest.raises(SystemExit, match="--test_prompts FILE is required"):
        focus_n_fix.read_both_prompts(args)
