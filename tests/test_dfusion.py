"""dfusion_dpo.py: the losses and the policy, prompts and thresholds, fusion, pairs and rounds."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import CPU, PROMPTS, read_log, read_weights_of_run, run_script, same_tensors
from PIL import Image
from random_weights import clip_tokenizer

import dfusion_dpo
from common import generator, load_model, make_scheduler
from data.items import read_items, token_span

TWO_ITEMS = PROMPTS[1]
SMALL = ["--num_inference_steps", 4, "--images_per_prompt", 4, "--batch_size", 4]
SMALL += ["--micro_batch", 4, "--lora_rank", 4, "--device", "cpu", "--reward", "toy_clip"]


@pytest.fixture(scope="module")
def model(world):
    return load_model(world.sd_v, CPU)


@pytest.fixture
def rounds(monkeypatch):
    """The Pairs of every round that a run samples."""
    seen = []
    sample_round = dfusion_dpo.sample_round

    def keep_round(*args):
        seen.append(sample_round(*args))
        return seen[-1]

    monkeypatch.setattr(dfusion_dpo, "sample_round", keep_round)
    return seen


def train(world, out, *extra):
    """A run of two updates, which are one round, through the command line -> its log."""
    files = ["--model", world.sd_v, "--prompts", world.items, "--out", out]
    assert run_script(dfusion_dpo, *SMALL, "--train_steps", 2, *files, *extra) == 0
    return read_log(out)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "randn"))


def image_generators(images):
    return [generator(0, "test", k) for k in images]


def modules(model, kind):
    """The attention processors of the tiny model's mid block and its up block."""
    down, mid, up = dfusion_dpo.attention_blocks(model)
    return dfusion_dpo.processor_names(model, [mid, up], kind)


def test_dpo_loss_and_gradient_by_hand():
    log_ratio_a = torch.zeros(3, requires_grad=True)
    log_ratio_b = torch.zeros(3, requires_grad=True)
    loss = dfusion_dpo.dpo_loss(log_ratio_a, log_ratio_b, beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.allclose(log_ratio_a.grad, torch.full((3,), -0.05 / 3))
    assert torch.allclose(log_ratio_b.grad, torch.full((3,), 0.05 / 3))
    loss = dfusion_dpo.dpo_loss(log_ratio_a + 0.5, log_ratio_b, beta=2.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.0)))


def test_ddpo_clips_and_dpok_adds_the_kl_by_hand():
    log_ratio = torch.tensor([1.3, 0.7, 1.3, 0.7]).log().requires_grad_()
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0])
    loss = dfusion_dpo.ddpo_loss(log_ratio, advantage, clip_range=0.1)
    assert loss.item() == pytest.approx((-2 * 1.1 - 2 * 0.7 + 2 * 1.3 + 2 * 0.9) / 4)
    loss.backward()
    assert torch.allclose(log_ratio.grad, torch.tensor([0.0, -2 * 0.7, 2 * 1.3, 0.0]) / 4)
    kl = torch.tensor([1.0, 2.0, 3.0, 6.0])
    dpok = dfusion_dpo.dpok_loss(log_ratio, advantage, 0.1, kl, kl_weight=0.01)
    assert (dpok - loss).item() == pytest.approx(0.03, rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_step_is_that_of_diffusers(model, prediction_type):
    scheduler = make_scheduler(model, "ddim", 20)
    scheduler.register_to_config(prediction_type=prediction_type)
    x = randn(20, 4, 8, 8)
    out = randn(20, 4, 8, 8, seed=1)
    noise = randn(20, 4, 8, 8, seed=2)
    mu, sigma = dfusion_dpo.ddim_step(scheduler, out, torch.arange(20), x)
    for i, t in enumerate(scheduler.timesteps):
        part = slice(i, i + 1)
        step = scheduler.step(out[part], t, x[part], eta=1.0, variance_noise=noise[part])
        ours = mu[part] + sigma[part] * noise[part]
        assert torch.allclose(ours, step.prev_sample, rtol=1e-4, atol=1e-5)
    assert sigma[-2].item() == pytest.approx(0.0406, abs=1e-4)


def test_log_normal_and_kl_are_those_of_torch():
    x = randn(3, 4, 8, 8)
    mu = randn(3, 4, 8, 8, seed=1)
    sigma = torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1, 1)
    normal = torch.distributions.Normal(mu, sigma.expand_as(mu))
    expected = normal.log_prob(x).mean((1, 2, 3))
    assert torch.allclose(dfusion_dpo.log_normal(x, mu, sigma), expected, rtol=1e-4)
    around_x = torch.distributions.Normal(x, sigma.expand_as(mu))
    expected = torch.distributions.kl_divergence(normal, around_x).mean((1, 2, 3))
    assert torch.allclose(dfusion_dpo.normal_kl(mu, x, sigma), expected, rtol=1e-4)


def test_steps_are_counted_down_in_flags_and_up_in_the_code(model):
    assert dfusion_dpo.step_indices("--x", "18-1", 20) == range(2, 20)
    assert dfusion_dpo.step_indices("--x", "4-3", 10) == range(6, 8)
    assert dfusion_dpo.step_indices("--x", "20", 20) == range(0, 1)
    for text in ("21-1", "3-0", "3-2-1", "up"):
        with pytest.raises(SystemExit, match="--x"):
            dfusion_dpo.step_indices("--x", text, 20)
    assert dfusion_dpo.parse_args(["--model", "sd21"]).fusion_steps == "18-1"
    # The toy's trained steps fit only its own number of steps.
    assert dfusion_dpo.parse_args([]).trained_steps == "10-3"
    assert dfusion_dpo.parse_args(["--num_inference_steps", "20"]).trained_steps == "20-1"
    scheduler = make_scheduler(model, "ddim", 4)
    assert dfusion_dpo.steps_with_noise(scheduler, range(1, 4)) == [1, 2, 3]
    # With set_alpha_to_one the last step ends in the clean image and adds no noise.
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    assert dfusion_dpo.steps_with_noise(scheduler, range(1, 4)) == [1, 2]


def test_items_are_found_with_the_tokenizer():
    tokenizer = clip_tokenizer(full=True)

    def tokens(prompt, item, which="own"):
        ids = tokenizer(prompt).input_ids
        span = token_span(tokenizer, prompt, item, which)
        return tokenizer.convert_ids_to_tokens([ids[k] for k in span])

    assert tokens("a black and woolen bus", "woolen") == ["woo", "len</w>"]
    assert tokens("a black and woolen bus", "bus", "next") == ["<|endoftext|>"]
    assert tokens("A blue square, a red one", "blue square") == ["blue</w>", "square</w>"]
    for prompt, message in (
        ("a red square and a square", "2 times"),
        ("a squared circle", "0 times"),
        ("red " * 80 + "square", "after the 77 tokens"),
    ):
        with pytest.raises(SystemExit, match=message):
            token_span(tokenizer, prompt, "square")


def test_prompts_files_are_read_or_refused_in_one_line(world):
    Path("items.txt").write_text("a car above a cat | car; cat\n\na red star|red star\n")
    rows, test_prompts = read_items("items.txt")
    row = dict(prompt="a red star", items=["red star"])
    assert rows == [dict(prompt="a car above a cat", items=["car", "cat"]), row]
    assert test_prompts == []
    for lists, message in (
        (dict(train=["a star"], test=[]), "does not fit"),
        (dict(train=[dict(row, thresholds=[0.1, 0.2])], test=[]), "one threshold per item"),
        (dict(train=[row, row], test=[]), "repeated"),
        (dict(train=[row]), "lacks a list"),
    ):
        Path("bad.json").write_text(json.dumps(dict(template=lists)))
        with pytest.raises(SystemExit, match=message):
            read_items("bad.json")
    with pytest.raises(SystemExit, match="item; item"):
        read_items(world.prompts)
    with pytest.raises(SystemExit, match="has only one"):
        read_items(world.items, template="two")


def test_prompts_with_one_and_two_items_get_thresholds(world):
    Path("items.txt").write_text(f"{PROMPTS[0]} | circle\n{TWO_ITEMS} | blue square; circle\n")
    train(world, "text", "--prompts", "items.txt", "--test_prompts", world.one)
    rows, _ = read_items("text/prompts.json")
    assert [len(row["thresholds"]) for row in rows] == [1, 2]
    # A line is the sample, two masks and the merged one. The first prompt has a blank instead.
    picture = Image.open("text/samples/thresholds.png")
    assert picture.size == (4 * 128, 2 * 128)
    assert picture.crop((256, 0, 384, 128)).getextrema() == ((255, 255),) * 3


def test_only_sd21_takes_the_papers_thresholds(world, monkeypatch):
    monkeypatch.setattr(dfusion_dpo, "PAPERS_PROMPTS", Path(world.items))
    train(world, "other", "--prompts", world.items)
    rows, _ = read_items("other/prompts.json")
    assert rows[0]["items"] == ["blue square", "circle"]
    assert rows[0]["thresholds"] != [0.08, 0.08]
    monkeypatch.setattr(dfusion_dpo, "model_family", lambda model: "sd21")
    train(world, "sd21", "--prompts", world.items)
    assert not Path("sd21/prompts.json").exists()


def test_masks_and_thresholds_by_hand():
    maps = torch.tensor([[[0.1, 0.5], [0.3, 0.2]], [[0.9, 0.6], [0.1, 0.2]]])
    xor = dfusion_dpo.merge_masks(maps, [0.3, 0.6], "xor")
    assert xor.tolist() == [[True, False], [True, False]]
    either = dfusion_dpo.merge_masks(maps, [0.3, 0.6], "or")
    assert either.tolist() == [[True, True], [True, False]]
    # Thresholds of 2 images, 3 steps, 2 items, 5 x 5 places: 80 % of 0 .. 149 are below 119.2.
    numbers = torch.arange(150.0).view(2, 3, 1, 5, 5)
    assert dfusion_dpo.item_thresholds(torch.cat([numbers, 10 * numbers], 2)) == [119.0, 1190.0]


@torch.no_grad()
def test_captured_maps_are_the_softmax_and_change_nothing(model):
    attn = model.denoiser.get_submodule(modules(model, "attn2")[0].removesuffix(".processor"))
    states = randn(6, 16, attn.to_q.in_features)
    text = randn(6, 12, attn.to_k.in_features, seed=1)
    capture = dfusion_dpo.CrossAttentionMaps(3)
    assert torch.equal(capture(attn, states, text), attn(states, text))
    item_maps = capture.pop_item_maps([[1, 2], [4]])
    # diffusers' own probabilities of the last three rows, which under guidance have the prompts.
    q = attn.head_to_batch_dim(attn.to_q(states[3:]))
    k = attn.head_to_batch_dim(attn.to_k(text[3:]))
    probs = attn.get_attention_scores(q, k).unflatten(0, (3, -1)).mean(1)
    expected = torch.stack([probs[:, :, 1:3].mean(-1), probs[:, :, 4]], 1)
    assert torch.allclose(item_maps.flatten(2), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_fused_keys_and_values_by_hand(model):
    """In both guidance halves: inside a target's mask, keys and values are its reference's."""
    attn = model.denoiser.get_submodule(modules(model, "attn1")[0].removesuffix(".processor"))
    states = randn(10, 16, attn.to_q.in_features)
    fusion = dfusion_dpo.SelfAttentionFusion(2, torch.tensor([0, 0, 1]))
    stock = fusion(attn, states)
    fusion.masks = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 0]], [[1, 1], [1, 1]]]).bool()
    fused = fusion(attn, states)

    def attend(own, source):
        q, k, v = attn.to_q(own), attn.to_k(source), attn.to_v(source)
        q, k, v = [x.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for x in (q, k, v)]
        out = (q @ k.mT * attn.scale).softmax(-1) @ v
        return attn.to_out[0](out.transpose(0, 1).flatten(1))

    for half in (0, 5):
        assert torch.allclose(fused[half : half + 2], stock[half : half + 2], atol=1e-5)
        for j, reference in enumerate([0, 0, 1]):
            own = states[half + 2 + j]
            mask = fusion.masks[j].repeat_interleave(2, 0).repeat_interleave(2, 1)
            source = torch.where(mask.view(16, 1), states[half + reference], own)
            expected = attend(own, source)
            assert torch.allclose(fused[half + 2 + j], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_targets_share_their_bases_noise_and_without_masks_are_the_bases(model):
    scheduler = make_scheduler(model, "ddim", 6)
    generators = image_generators(range(4))
    x, _ = dfusion_dpo.sample_trajectories(model, scheduler, TWO_ITEMS, generators, 5.0)
    bases = x[[3, 0]]

    def fuse(masks, steps):
        plan = dfusion_dpo.FusionPlan([], modules(model, "attn1"), steps)
        groups = (x[[1]], bases, torch.tensor([0, 0]))
        noise = image_generators([3, 0])
        return dfusion_dpo.fuse(model, scheduler, plan, TWO_ITEMS, *groups, masks, noise, 5.0)

    masks = torch.ones(1, 6, 4, 4, dtype=torch.bool)
    assert torch.equal(fuse(~masks, range(6)), bases)
    # A target is its base before the fused steps and while its mask is empty, then leaves it.
    masks[:, 2] = False
    targets = fuse(masks, range(2, 5))
    assert torch.equal(targets[:, :4], bases[:, :4])
    assert (targets[:, 4] - bases[:, 4]).abs().max() > 1e-3
    # Its last step is plain again, with the seventh draw of the base's generator.
    draws = torch.stack([torch.randn(7, 4, 8, 8, generator=g) for g in image_generators([3, 0])])
    out = dfusion_dpo.guided(model, scheduler, targets[:, 5], 5, [TWO_ITEMS] * 2, 5.0)
    mu, sigma = dfusion_dpo.ddim_step(scheduler, out, 5, targets[:, 5])
    assert torch.allclose(targets[:, 6], mu + sigma * draws[:, 6], rtol=1e-4, atol=1e-4)


def test_choice_and_advantages_by_hand():
    rewards = torch.tensor([0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.4, 0.5])
    references, bases, reference_of = dfusion_dpo.choose(rewards)
    assert references.tolist() == [1, 3]
    assert bases.tolist() == [6, 2, 4, 0]
    assert reference_of.tolist() == [0, 0, 1, 1]
    values = dfusion_dpo.advantages(torch.tensor([0.2, 0.5, 9.0]), [0.2, 0.6, 0.2, 0.6])
    assert values.tolist() == pytest.approx([-1, 0.5, 5], rel=1e-4)


@pytest.mark.parametrize("against, kept", [("base", [1.0, 1.0]), ("reference", [2.0, 1.0])])
def test_adoption_by_hand(against, kept):
    args = dfusion_dpo.parse_args(["--adopt_against", against, "--adoption_threshold", "0.5"])

    def samples(value, rewards):
        images = torch.full((2, 3, 4, 4), value)
        return dfusion_dpo.Samples(images[:, None], images, torch.tensor(rewards))

    groups = (samples(1.0, [1.0, 3.0]), samples(2.0, [4.0, 5.0]), samples(3.0, [2.0, 6.0]))
    preferred, adopted = dfusion_dpo.adopt(args, *groups)
    assert preferred.trajectories[:, 0, 0, 0, 0].tolist() == kept
    assert preferred.rewards[0] == (1.0 if adopted[0] else 4.0)


def test_naive_and_fused_pairs(world, rounds):
    # toy_clip gives these images rewards below 0. So in Eq. 7 a large threshold adopts every
    # target, and one below 0 adopts none.
    log = train(world, "fused", "--adoption_threshold", 9)
    train(world, "naive", "--naive")
    train(world, "none", "--adoption_threshold", -9)
    fused, naive, none = rounds
    assert (fused.stats["adoption"], none.stats["adoption"]) == (1, 0)
    # 4 images make a reference and two bases, which are the same in all runs.
    assert torch.equal(fused.trajectories[1], naive.trajectories[1])
    assert torch.equal(naive.trajectories[0, 0], naive.trajectories[0, 1])
    # A target leaves its base at the third step. A refused one gives way to the reference.
    assert torch.equal(fused.trajectories[0, :, :3], fused.trajectories[1, :, :3])
    assert not torch.equal(fused.trajectories[0, :, 3], fused.trajectories[1, :, 3])
    assert torch.equal(none.trajectories, naive.trajectories)
    # In the first epoch theta is theta_old.
    assert log[0]["loss"] == pytest.approx(math.log(2))
    assert log[0]["accuracy"] == 0.5
    assert log[0]["log_ratio"] == [0, 0, 0, 0]
    assert log[1]["accuracy"] != 0.5


def test_dpok_of_two_rounds_and_resumed_inside_the_first(world, rounds):
    words = ["--algo", "dpok", "--naive", "--trained_steps", "3-2", "--trajectory", "inversion"]
    words += ["--save_every", 1]
    log = train(world, "run", *words, "--train_steps", 3)
    train(world, "parts", *words, "--train_steps", 1)
    assert train(world, "parts", *words, "--train_steps", 3, "--resume") == log
    assert same_tensors(read_weights_of_run("parts"), read_weights_of_run("run"))
    assert log[0]["loss"] == pytest.approx(-rounds[0].advantages.mean().item(), abs=1e-6)
    draws = [generator(0, "trajectory", 0, 0, k) for k in range(4)]
    sampled = torch.stack([torch.randn(4, 8, 8, generator=g) for g in draws])
    for inverted in rounds[0].trajectories[:, :, 0].flatten(0, 1):
        assert not (inverted == sampled).flatten(1).all(1).any()
    assert log[0]["kl"] == 0
    assert log[1]["kl"] > 0
    assert [value is None for value in log[1]["log_ratio"]] == [True, False, False, True]
    # The bases are the worst half. Their advantages are over the rewards of both rounds.
    state = torch.load("run/checkpoint/state.pt", weights_only=True)
    first, second = state["history"][TWO_ITEMS].values()
    bases = torch.tensor(sorted(second)[1::-1])
    expected = dfusion_dpo.advantages(bases, first + second)
    assert torch.allclose(rounds[1].advantages[1], expected)


def test_the_scale_of_the_loss_does_not_change_an_update(world):
    """In a first update, beta only scales the loss. Adam's eps must be below the gradients."""
    for beta in (2**-3, 2**-13):
        train(world, f"{beta}", "--beta", beta, "--lr", 1e-3, "--train_steps", 1)
    small = read_weights_of_run(f"{2**-13}")
    for name, weights in read_weights_of_run(f"{2**-3}").items():
        assert torch.allclose(small[name], weights, rtol=0, atol=1e-6)
