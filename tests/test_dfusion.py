"""dfusion_dpo.py: the losses and the policy, masks and fusion, pairs, thresholds and prompts."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, PROMPTS, read_log, run_script
from diffusers import DDIMInverseScheduler
from PIL import Image
from random_weights import clip_tokenizer

import dfusion_dpo
from common import ROOT, generator, load_model, make_scheduler
from data.items import read_items, token_span

TWO_ITEMS = PROMPTS[1]
SMALL = ["--num_inference_steps", 4, "--images_per_prompt", 4, "--batch_size", 4]
SMALL += ["--micro_batch", 4, "--lora_rank", 4, "--device", "cpu", "--reward", "toy_clip"]
# The tiny model's images are noise, to which toy_clip gives rewards below 0. So by Eq. 7 a large
# threshold adopts every target, and one below 0 adopts none.
ADOPT_ALL = ["--adoption_threshold", 9]
ADOPT_NONE = ["--adoption_threshold", -9]


@pytest.fixture(scope="module")
def model(world):
    return load_model(world.sd_v, CPU)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_generators(images):
    return [generator(0, "test", k) for k in images]


def modules(model, kind):
    """The tiny model has a down, a mid and an up block with attention: we take the last two."""
    blocks = dfusion_dpo.attention_blocks(model)
    assert blocks == ["down_blocks.1", "mid_block", "up_blocks.0"]
    return dfusion_dpo.module_names(model, blocks[1:], kind)


def train(world, out, *extra, items=None):
    """One run of two updates, a round, through the command line -> its log."""
    files = ["--model", world.sd_v, "--prompts", items or world.items, "--out", out]
    status = run_script(dfusion_dpo, *SMALL, "--train_steps", 2, *files, *extra)
    assert status == 0
    return read_log(out)


# --------------------------------------------------------------------------------------------------
# Losses


def test_dpo_loss_and_gradient_by_hand():
    log_ratio_a = torch.zeros(3, requires_grad=True)
    log_ratio_b = torch.zeros(3, requires_grad=True)
    loss = dfusion_dpo.dpo_loss(log_ratio_a, log_ratio_b, beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    # sigmoid'(0) beta = 0.05 each, a third of it in the mean: a becomes likelier, b less likely.
    assert torch.allclose(log_ratio_a.grad, torch.full((3,), -0.05 / 3))
    assert torch.allclose(log_ratio_b.grad, torch.full((3,), 0.05 / 3))
    loss = dfusion_dpo.dpo_loss(torch.tensor([0.3]), torch.tensor([-0.2]), beta=2.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.0)))


def test_ddpo_clips_and_dpok_adds_the_kl_by_hand():
    log_ratio = torch.tensor([1.3, 0.7, 1.3, 0.7]).log().requires_grad_()
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0])
    loss = dfusion_dpo.ddpo_loss(log_ratio, advantage, clip_range=0.1)
    assert loss.item() == pytest.approx((-2 * 1.1 - 2 * 0.7 + 2 * 1.3 + 2 * 0.9) / 4)
    loss.backward()
    # No gradient where the ratio went beyond the range in the right direction.
    assert torch.allclose(log_ratio.grad, torch.tensor([0.0, -2 * 0.7, 2 * 1.3, 0.0]) / 4)
    kl = torch.tensor([1.0, 2.0, 3.0, 6.0])
    dpok = dfusion_dpo.dpok_loss(log_ratio, advantage, 0.1, kl, kl_weight=0.01)
    assert (dpok - loss).item() == pytest.approx(0.03, rel=1e-5)


def test_advantages_by_hand():
    # Mean 0.4, standard deviation 0.2 (of all, not corrected).
    values = dfusion_dpo.advantages(torch.tensor([0.2, 0.5, 9.0]), [0.2, 0.6, 0.2, 0.6])
    assert values.tolist() == pytest.approx([-1, 0.5, 5], rel=1e-4)
    assert dfusion_dpo.finite_rewards({0: [1.0, math.nan], 1: [2.0]}) == [1.0, 2.0]


# --------------------------------------------------------------------------------------------------
# The policy


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_step_is_that_of_diffusers(model, prediction_type):
    scheduler = make_scheduler(model, "ddim", 20)
    scheduler.register_to_config(prediction_type=prediction_type)
    latents = randn(20, 4, 8, 8)
    noise_pred = randn(20, 4, 8, 8, seed=1)
    noise = randn(20, 4, 8, 8, seed=2)
    mu, sigma = dfusion_dpo.ddim_step(scheduler, noise_pred, torch.arange(20), latents)
    for i, t in enumerate(scheduler.timesteps):
        part = slice(i, i + 1)
        options = dict(eta=1.0, variance_noise=noise[part])
        expected = scheduler.step(noise_pred[part], t, latents[part], **options).prev_sample
        assert torch.allclose(mu[part] + sigma[i] * noise[part], expected, rtol=1e-4, atol=1e-5)
        # An int for all images of the batch is the same.
        one_mu, one_sigma = dfusion_dpo.ddim_step(scheduler, noise_pred[part], i, latents[part])
        assert torch.equal(one_mu, mu[part]) and torch.equal(one_sigma, sigma[part])
    # The step from timestep 51, which dominates every log ratio.
    assert sigma[-2].item() == pytest.approx(0.0406, abs=1e-4)


def test_log_normal_and_kl_are_those_of_torch():
    x = randn(3, 4, 8, 8)
    mu = randn(3, 4, 8, 8, seed=1)
    other_mu = randn(3, 4, 8, 8, seed=2)
    sigma = torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1, 1)
    normal = torch.distributions.Normal(mu, sigma.expand_as(mu))
    expected = normal.log_prob(x).mean((1, 2, 3))
    assert torch.allclose(dfusion_dpo.log_normal(x, mu, sigma), expected, rtol=1e-4)
    other = torch.distributions.Normal(other_mu, sigma.expand_as(mu))
    expected = torch.distributions.kl_divergence(normal, other).mean((1, 2, 3))
    assert torch.allclose(dfusion_dpo.normal_kl(mu, other_mu, sigma), expected, rtol=1e-4)


def test_steps_are_counted_down_on_the_command_line_and_up_in_the_code(model):
    assert dfusion_dpo.step_indices("--x", "18-1", 20) == range(2, 20)
    assert dfusion_dpo.step_indices("--x", "4-3", 10) == range(6, 8)
    assert dfusion_dpo.step_indices("--x", "20", 20) == range(0, 1)
    for text in ("21-1", "3-0", "3-2-1", "up"):
        with pytest.raises(SystemExit, match="--x"):
            dfusion_dpo.step_indices("--x", text, 20)
    scheduler = make_scheduler(model, "ddim", 4)
    assert dfusion_dpo.steps_with_noise(scheduler, range(1, 4)) == [1, 2, 3]
    # With set_alpha_to_one the last step ends in the clean image and adds no noise.
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    assert dfusion_dpo.steps_with_noise(scheduler, range(1, 4)) == [1, 2]


@torch.no_grad()
def test_inversion_is_that_of_diffusers(model):
    scheduler = make_scheduler(model, "ddim", 5)
    x0 = randn(2, 4, 8, 8)
    x = dfusion_dpo.invert(model, scheduler, TWO_ITEMS, x0)
    assert torch.equal(x[:, 5], x0)
    config = dict(scheduler.config, set_alpha_to_one=False)
    inverse = DDIMInverseScheduler.from_config(config)
    inverse.set_timesteps(5)
    for i in reversed(range(5)):
        noise_pred = dfusion_dpo.guided(model, scheduler, x[:, i + 1], i, [TWO_ITEMS] * 2, 1.0)
        expected = inverse.step(noise_pred, scheduler.timesteps[i], x[:, i + 1]).prev_sample
        assert torch.allclose(x[:, i], expected, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------
# Prompts and their items


def test_items_are_found_with_the_tokenizer():
    tokenizer = clip_tokenizer(full=True)

    def words(prompt, item, which="own"):
        ids = tokenizer(prompt).input_ids
        positions = token_span(tokenizer, prompt, item, which)
        return tokenizer.convert_ids_to_tokens([ids[k] for k in positions])

    assert words("a black and woolen bus", "woolen") == ["woo", "len</w>"]
    assert words("a black and woolen bus", "bus", "next") == ["<|endoftext|>"]
    assert words("A blue square, a red circle", "blue square") == ["blue</w>", "square</w>"]
    assert words("the computer below the counter", "counter") == ["counter</w>"]
    for prompt, item, times in (("a red square and a blue square", "square", 2), ("a car", "ca", 0)):
        with pytest.raises(SystemExit, match=f"occurs {times} times"):
            token_span(tokenizer, prompt, item)
    with pytest.raises(SystemExit, match="after the 77 tokens"):
        token_span(tokenizer, "red " * 80 + "square", "square")


@pytest.mark.parametrize("name, count", [("dfusion_templates.json", 40), ("dfusion_toy.json", 80)])
def test_the_prompt_lists_are_complete(name, count):
    tokenizer = clip_tokenizer(full=True)
    rows, test_prompts = read_items(ROOT / "data" / name)
    assert len(rows) == len(set(test_prompts)) == count
    for row in rows:
        assert len(row["thresholds"]) == len(row["items"])
        assert row["prompt"] not in test_prompts
        for item in row["items"]:
            token_span(tokenizer, row["prompt"], item)


def test_prompts_files_are_read_or_refused_in_one_line(world):
    text = Path("items.txt")
    text.write_text("a red circle above a blue square | circle; blue square\n\na star|star\n")
    rows, test_prompts = read_items("items.txt")
    assert rows[0] == dict(prompt="a red circle above a blue square", items=["circle", "blue square"])
    assert rows[1] == dict(prompt="a star", items=["star"])
    assert test_prompts == []
    dfusion_dpo.write_items("items.json", rows, ["a test"])
    assert read_items("items.json") == (rows, ["a test"])
    assert read_items("items.json", "prompts") == (rows, ["a test"])

    row = dict(prompt="a star", items=["star"], thresholds=[0.1])
    broken = [
        ({}, "we expect"),
        ({"a": dict(train=[row])}, "lacks a list"),
        ({"a": dict(train=["a star"], test=[])}, "does not fit"),
        ({"a": dict(train=[dict(row, threshold=[0.1])], test=[])}, "does not fit"),
        ({"a": dict(train=[dict(row, thresholds=[0.1, 0.2])], test=[])}, "one threshold per item"),
        ({"a": dict(train=[dict(row, items=[""])], test=[])}, "empty prompt or item"),
        ({"a": dict(train=[row, row], test=[])}, "twice"),
        ({"a": dict(train=[], test=[])}, "no training prompt"),
    ]
    for content, message in broken:
        Path("broken.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=message):
            read_items("broken.json")
    text.write_text("a red circle\n")
    cases = [("items.txt", None, "item; item"), ("items.txt", "a", "no templates")]
    cases += [(world.items, "two", "has only one"), ("absent.json", None, "No such file")]
    for path, template, message in cases:
        with pytest.raises(SystemExit, match=message):
            read_items(path, template)


def test_thresholds_of_prompts_with_one_and_two_items(world):
    Path("items.txt").write_text(f"{PROMPTS[0]} | circle\n{TWO_ITEMS} | blue square; circle\n")
    log = train(world, "text", "--test_prompts", world.one, items="items.txt")
    rows, test_prompts = read_items("text/prompts.json")
    assert test_prompts == PROMPTS[:1]
    assert [len(row["thresholds"]) for row in rows] == [1, 2]
    # Two lines: sample, two masks (one of them blank in the first line), merged mask.
    picture = Image.open("text/samples/thresholds.png")
    assert picture.size == (4 * 128, 2 * 128)
    assert picture.crop((256, 0, 384, 128)).getextrema() == ((255, 255),) * 3
    assert picture.crop((256, 128, 384, 256)).getextrema() != ((255, 255),) * 3
    # The file that it writes says the same, so the run can be done again from it.
    assert train(world, "again", items="text/prompts.json") == log


def test_thresholds_are_quantiles():
    # 2 images, 3 steps, 2 items, 5 x 5 places: item 0 has 0 .. 149, item 1 ten times as much.
    numbers = torch.arange(150.0).view(2, 3, 1, 5, 5)
    maps = torch.cat([numbers, 10 * numbers], 2)
    assert dfusion_dpo.item_thresholds(maps) == [119.0, 1190.0]


# --------------------------------------------------------------------------------------------------
# Masks and fusion


def test_masks_by_hand():
    maps = torch.tensor([[[0.1, 0.5], [0.3, 0.2]], [[0.9, 0.6], [0.1, 0.2]]])
    xor = dfusion_dpo.merge_masks(maps, [0.3, 0.6], "xor")
    assert xor.tolist() == [[True, False], [True, False]]
    either = dfusion_dpo.merge_masks(maps, [0.3, 0.6], "or")
    assert either.tolist() == [[True, True], [True, False]]


@torch.no_grad()
def test_captured_maps_are_the_softmax_and_change_nothing(model):
    scheduler = make_scheduler(model, "ddim", 4)
    names = modules(model, "attn2")[:1]
    attn = model.denoiser.get_submodule(names[0].removesuffix(".processor"))
    seen = []

    def keep_inputs(module, args, kwargs):
        seen.append((args[0], kwargs["encoder_hidden_states"]))

    inputs = (model, scheduler, randn(3, 4, 8, 8), 1, PROMPTS[:3], 5.0)
    stock = dfusion_dpo.guided(*inputs)
    hook = attn.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    with dfusion_dpo.installed(model, dfusion_dpo.CrossAttentionMaps(3), names) as capture:
        assert torch.equal(dfusion_dpo.guided(*inputs), stock)
        item_maps = capture.pop_item_maps([[1, 2], [4]])
        assert capture.maps == []
    hook.remove()
    # The last three of the six rows have the prompts; diffusers' own probabilities of them.
    states, text = [x[3:] for x in seen[0]]
    q = attn.head_to_batch_dim(attn.to_q(states))
    k = attn.head_to_batch_dim(attn.to_k(text))
    probabilities = attn.get_attention_scores(q, k).unflatten(0, (3, -1)).mean(1)
    expected = torch.stack([probabilities[:, :, 1:3].mean(-1), probabilities[:, :, 4]], 1)
    assert item_maps.shape == (3, 2, 4, 4)
    assert torch.allclose(item_maps.flatten(2), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(dfusion_dpo.guided(*inputs), stock)


@torch.no_grad()
def test_fused_keys_and_values_by_hand(model):
    """Both guidance halves: inside a target's mask the keys and values are its reference's."""
    attn = model.denoiser.get_submodule(modules(model, "attn1")[0].removesuffix(".processor"))
    hidden_states = randn(10, 16, attn.to_q.in_features)
    reference_of = torch.tensor([0, 0, 1])
    fusion = dfusion_dpo.SelfAttentionFusion(2, reference_of)
    stock = fusion(attn, hidden_states)
    # A 2 x 2 mask over 4 x 4 keys grows to the nearest neighbor.
    fusion.masks = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 0]], [[1, 1], [1, 1]]]).bool()
    fused = fusion(attn, hidden_states)
    for half in (slice(0, 5), slice(5, 10)):
        states = hidden_states[half]
        assert torch.allclose(fused[half][:2], stock[half][:2], atol=1e-5)
        for j in range(3):
            mask = fusion.masks[j].repeat_interleave(2, 0).repeat_interleave(2, 1)
            own = states[2 + j]
            keys_from = torch.where(mask.view(16, 1), states[reference_of[j]], own)
            q, k, v = [
                project(x).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
                for project, x in ((attn.to_q, own), (attn.to_k, keys_from), (attn.to_v, keys_from))
            ]
            weights = (q @ k.mT * attn.scale).softmax(-1)
            expected = attn.to_out[0]((weights @ v).transpose(0, 1).flatten(1))
            assert torch.allclose(fused[half][2 + j], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_targets_share_their_bases_noise_and_no_mask_gives_the_bases(model):
    scheduler = make_scheduler(model, "ddim", 6)
    all_images = image_generators(range(4))
    x, maps = dfusion_dpo.sample_trajectories(model, scheduler, TWO_ITEMS, all_images, 5.0)
    assert x.shape == (4, 7, 4, 8, 8) and maps is None
    references = x[[1]]
    bases = x[[3, 0]]

    def fuse(masks, steps):
        plan = dfusion_dpo.FusionPlan([], modules(model, "attn1"), steps)
        reference_of = torch.tensor([0, 0])
        generators = image_generators([3, 0])
        return dfusion_dpo.fuse(
            model, scheduler, plan, TWO_ITEMS, references, bases, reference_of, masks,
            generators, 5.0,
        )

    masks = torch.ones(1, 6, 4, 4, dtype=torch.bool)
    assert torch.equal(fuse(~masks, range(6)), bases)
    targets = fuse(masks, range(2, 5))
    # Before the fused steps a target is its base, then it leaves it.
    assert torch.equal(targets[:, :3], bases[:, :3])
    assert (targets[:, 3] - bases[:, 3]).abs().max() > 1e-3
    # The last step is plain again, with the noise that the base had there.
    for trajectories in (targets, bases):
        last = trajectories[:, 5]
        noise_pred = dfusion_dpo.guided(model, scheduler, last, 5, [TWO_ITEMS] * 2, 5.0)
        mu, sigma = dfusion_dpo.ddim_step(scheduler, noise_pred, 5, last)
        noise = (trajectories[:, 6] - mu) / sigma
        for k, image in enumerate([3, 0]):
            draws = torch.randn(7, 4, 8, 8, generator=image_generators([image])[0])
            assert torch.allclose(noise[k], draws[6], rtol=1e-2, atol=1e-2)
    after = model.denoiser.attn_processors.values()
    assert not any(isinstance(p, dfusion_dpo.SelfAttentionFusion) for p in after)


# --------------------------------------------------------------------------------------------------
# Pairs and rounds


def test_choose_by_hand():
    rewards = torch.tensor([0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.4, 0.5])
    references, bases, reference_of = dfusion_dpo.choose(rewards)
    assert references.tolist() == [1, 3]
    assert bases.tolist() == [6, 2, 4, 0]
    assert reference_of.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("against, expected", [("base", [True, True]), ("reference", [False, True])])
def test_adoption_by_hand(against, expected):
    words = ["--adopt_against", against, "--adoption_threshold", "0.5"]
    args = dfusion_dpo.parse_args(words)

    def samples(value, rewards):
        images = torch.full((2, 3, 4, 4), value)
        return dfusion_dpo.Samples(torch.full((2, 3, 4, 1, 1), value), images, rewards)

    target = samples(1.0, torch.tensor([1.0, 3.0]))
    reference = samples(2.0, torch.tensor([4.0, 5.0]))
    base = samples(3.0, torch.tensor([2.0, 6.0]))
    preferred, adopted = dfusion_dpo.adopt(args, target, reference, base)
    assert adopted.tolist() == expected
    assert preferred.rewards.tolist() == [1.0 if expected[0] else 4.0, 3.0]
    for tensor in (preferred.trajectories, preferred.images):
        assert tensor.flatten(1).mean(1).tolist() == [1.0 if expected[0] else 2.0, 1.0]


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


def test_naive_and_fused_pairs(world, rounds):
    fused_log = train(world, "fused", *ADOPT_ALL)
    train(world, "naive", "--naive")
    train(world, "none", *ADOPT_NONE)
    fused, naive, none = rounds
    # 4 images make a reference and two bases. All runs have the same bases.
    assert fused.trajectories.shape == (2, 2, 5, 4, 8, 8)
    assert torch.equal(fused.trajectories[1], naive.trajectories[1])
    assert torch.equal(naive.trajectories[0, 0], naive.trajectories[0, 1])
    # A target starts from its base's noise. A refused one gives way to the reference.
    assert fused.stats["adoption"] == 1
    assert torch.equal(fused.trajectories[0, :, :3], fused.trajectories[1, :, :3])
    assert not torch.equal(fused.trajectories[0, :, 3:], fused.trajectories[1, :, 3:])
    assert none.stats["adoption"] == 0
    assert torch.equal(none.trajectories, naive.trajectories)
    assert 0 < fused.stats["mask_area"] < 1
    assert Image.open("fused/samples/round_0000.png").size == (4 * 128, 128)
    assert Image.open("naive/samples/round_0000.png").size == (2 * 128, 128)
    # In the first epoch theta is theta_old.
    assert fused_log[0]["loss"] == pytest.approx(math.log(2))
    assert fused_log[0]["accuracy"] == 0.5
    assert fused_log[0]["log_ratio"] == [0, 0, 0, 0]
    assert min(fused_log[1]["log_ratio"]) > 0
    assert fused_log[1]["accuracy"] != 0.5
    assert fused_log[0]["reward_b"] < 0


def test_ddpo_starts_at_the_mean_advantage_and_trains_only_the_chosen_steps(world, rounds):
    log = train(world, "run", "--algo", "ddpo", "--naive", "--trained_steps", "3-2")
    assert log[0]["loss"] == pytest.approx(-rounds[0].advantages.mean().item(), abs=1e-6)
    untrained = [value is None for value in log[1]["log_ratio"]]
    assert untrained == [True, False, False, True]
    # 4 images in 4 steps, then 2 pairs at 2 steps. Guidance makes it two rows per image.
    assert [row["passes"] for row in log] == [2 * (4 * 4 + 2 * 2 * 2), 2 * (2 * 2 * 2)]
    # Every pair draws its own step of the two, the same one in both epochs.
    args = dfusion_dpo.parse_args(["--train_timesteps", "1"])
    couples = dfusion_dpo.draw_couples(args, 0, 32, [1, 2])
    assert couples[:, 0].tolist() == list(range(32))
    assert set(couples[:, 1].tolist()) == {1, 2}


def test_dpok_starts_without_kl_and_inversion_keeps_only_the_images(world, rounds):
    log = train(world, "dpok", "--algo", "dpok", "--naive", "--trajectory", "inversion")
    assert log[0]["kl"] == 0
    assert log[1]["kl"] > 0
    train(world, "recorded", "--naive")
    inverted, recorded = [pairs.trajectories for pairs in rounds]
    assert torch.equal(inverted[:, :, 4], recorded[:, :, 4])
    assert not torch.equal(inverted[:, :, 0], recorded[:, :, 0])


def test_rewards_of_all_rounds_make_the_advantages(world, rounds):
    train(world, "run", "--naive", "--train_steps", 3, "--save_every", 1)
    state = torch.load("run/checkpoint/state.pt", weights_only=True)
    history = state["history"][TWO_ITEMS]
    assert [len(history[number]) for number in (0, 1)] == [4, 4]
    past = history[0] + history[1]
    # The bases are the worst half of the second round, the better one first.
    bases = torch.tensor(sorted(history[1])[1::-1])
    expected = dfusion_dpo.advantages(bases, past)
    assert torch.allclose(rounds[1].advantages[1], expected)


def test_settings_of_the_paper_and_their_defaults():
    args = dfusion_dpo.parse_args(["--model", "sd21"])
    assert (args.batch_size, args.images_per_prompt, args.lr) == (640, 16, 1e-4)
    assert (args.fusion_steps, args.trained_steps, args.train_timesteps) == ("18-1", "20-1", 20)
    assert (args.mask_merge, args.item_token, args.reward) == ("xor", "own", "clip_h")
    assert Path(args.prompts).name == "dfusion_templates.json"
    # The toy's own choice fits its own number of steps.
    assert dfusion_dpo.parse_args([]).trained_steps == "4-3"
    assert dfusion_dpo.parse_args(["--num_inference_steps", "20"]).trained_steps == "20-1"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--fusion_layers", "1-3"], "2 up_blocks.0"),
        (["--mask_layer", 3], "2 up_blocks.0"),
        (["--batch_size", 8], "at most 4"),
        (["--trained_steps", "5-1"], "--trained_steps 5-1"),
    ],
)
def test_mistakes_end_in_one_line(world, words, message):
    files = ["--model", world.sd_v, "--prompts", world.items]
    assert message in run_script(dfusion_dpo, *SMALL, *files, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--images_per_prompt", 6],
        ["--batch_size", 20],
        ["--micro_batch", 3],
        ["--algo", "dpok", "--lora_rank", 0],
        ["--naive", "--fusion_steps", "3-1"],
    ],
)
def test_settings_that_do_not_fit_are_a_usage_error(words):
    assert run_script(dfusion_dpo, *words) == 2
