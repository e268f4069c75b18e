"""dfusion_dpo.py: the policy and its losses, masks and fusion, a round's pairs and costs, its run folder, and what it says to bad input."""
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import test_refl
import tiny
import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from random_weights import clip_tokenizer
from test_sampling_scripts import run

import dfusion_dpo as d
from common import ROOT, condition, generator, initial_latents, load_model, make_scheduler, sample, trainable

CPU = torch.device("cpu")
ROWS = [dict(prompt="a red circle above a blue square", items=["circle", "blue square"], thresholds=[.08, .08]),
        dict(prompt="a yellow triangle", items=["triangle"], thresholds=[.08])]
SHORT = ["--num_inference_steps", 4, "--images_per_prompt", 4, "--batch_size", 8, "--micro_batch", 4, "--lora_rank", 4, "--device", "cpu",
         "--reward", "toy_clip"]
ALL, NONE = ["--adoption_threshold", 9], ["--adoption_threshold", -9]     # random pictures have a cosine below 0: every target passes, or none
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("dfusion")
    (root / "prompts.json").write_text(json.dumps({"first": dict(train=ROWS, test=["a red star"]), "second": dict(train=ROWS[:1], test=["a red star"])}))
    (root / "prompts.txt").write_text("a red circle above a blue square | circle; blue square\n\na yellow triangle|triangle\n")
    (root / "one.txt").write_text("a red star\n")
    tiny.write(root / "sd"), tiny.write(root / "sd_v", prediction_type="v_prediction", seed=1), tiny.write(root / "sdxl", "sdxl", seed=2)
    return root


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder / "sd_v"), CPU)


def train(folder, out, *extra, model="sd_v"):
    """One run through the command line's own parser -> its folder."""
    argv = ["--model", folder / model, "--prompts", folder / "prompts.json", "--out", out, *SHORT, *extra]
    d.main(d.parse_args(list(map(str, argv))))
    return Path(out)


def gens(n, name="x"):
    return [generator(0, name, i) for i in range(n)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------------------------------
# the policy


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_step_is_diffusers_and_its_log_prob_a_normals(model, prediction_type):
    """Every timestep in one call, against DDIMScheduler.step one by one; the log-density in float64."""
    scheduler = make_scheduler(model, "ddim", 20)
    scheduler.register_to_config(prediction_type=prediction_type)
    t, x, out, noise = scheduler.timesteps, randn(20, 4, 8, 8), randn(20, 4, 8, 8, seed=1), randn(20, 4, 8, 8, seed=2)
    assert t.tolist() == list(range(951, 0, -50))
    mu, sigma = d.ddim_step(scheduler, out, t, x)
    theirs = torch.cat([scheduler.step(out[i:i + 1], t[i], x[i:i + 1], eta=1., variance_noise=noise[i:i + 1]).prev_sample for i in range(20)])
    torch.testing.assert_close(mu + sigma * noise, theirs, rtol=1e-4, atol=1e-5)
    assert sigma[-2].item() == pytest.approx(.0406, abs=1e-4)             # the step that dominates every log-ratio
    exact = torch.distributions.Normal(mu.double(), sigma.double()).log_prob(theirs.double()).mean((1, 2, 3))
    torch.testing.assert_close(d.log_normal(theirs, mu, sigma).double(), exact, rtol=1e-4, atol=1e-5)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mu, sigma.expand_as(mu)), torch.distributions.Normal(mu + .1, sigma.expand_as(mu)))
    torch.testing.assert_close(d.normal_kl(mu, mu + .1, sigma), kl.mean((1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_trajectories_are_the_samplers_own(model):
    """The same generators through common.sample, with DDIM's eta 1 and guidance: what held-out images and combined_sample.py do."""
    scheduler, prompt = make_scheduler(model, "ddim", 4), ROWS[0]["prompt"]
    x, maps = d.sample_trajectories(model, scheduler, prompt, gens(4), 5.)
    generators = gens(4)
    cond, uncond = condition(model, [prompt] * 4), condition(model, [None] * 4)
    theirs = sample(model, scheduler, initial_latents(model, generators), cond, 0, 4, generators, 5., uncond, 1.)
    assert x.shape == (4, 5, 4, 8, 8) and x.dtype == torch.float32 and maps is None
    torch.testing.assert_close(x[:, -1], theirs, rtol=1e-4, atol=1e-4)
    parts = torch.cat([d.sample_trajectories(model, scheduler, prompt, gens(4)[i:i + 2], 5.)[0] for i in (0, 2)])
    torch.testing.assert_close(parts, x, rtol=1e-3, atol=1e-4)            # noise belongs to the image, not to the batch
    assert torch.equal(parts[:, 0], x[:, 0])


def test_dpo_by_hand():
    zero = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    loss = d.dpo_loss(*zero, beta=.1)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(2))
    torch.testing.assert_close(zero[0].grad, torch.full((3,), -.05 / 3))  # -beta / 2, and the mean's third
    torch.testing.assert_close(zero[1].grad, torch.full((3,), .05 / 3))
    assert d.dpo_loss(torch.tensor([.3]), torch.tensor([-.2]), 2.).item() == pytest.approx(np.log1p(np.exp(-1.)))


def test_the_gradient_of_dpo_at_theta_prime(folder):
    """-beta/2 (grad log p_a - grad log p_b) in the network's parameters, each log p by plain autograd of a Normal."""
    model = load_model(str(folder / "sd_v"), CPU)
    params, scheduler = trainable(model, 4), make_scheduler(model, "ddim", 4)
    for i, p in enumerate(params):
        p.data = .3 * randn(*p.shape, seed=i)
    t, x, x_prev = scheduler.timesteps[1:2].repeat(2), randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    mu, sigma = d.ddim_step(scheduler, d.guided(model, x, t, [ROWS[0]["prompt"]] * 2, 5.), t, x)
    log_prob = d.log_normal(x_prev, mu, sigma)
    log_ratio = log_prob - log_prob.detach()
    grads = torch.autograd.grad(d.dpo_loss(*log_ratio.chunk(2), .1), params, retain_graph=True)
    a, b = (torch.autograd.grad(torch.distributions.Normal(mu[i], sigma[i]).log_prob(x_prev[i]).mean(), params, retain_graph=True) for i in (0, 1))
    assert max(g.abs().max() for g in grads) > 0
    for g, ga, gb in zip(grads, a, b):
        torch.testing.assert_close(g, -.05 * (ga - gb), rtol=1e-3, atol=1e-7)


def test_ppo_clip_by_hand():
    log_ratio = torch.tensor([1.3, .7, 1.3, .7, 1.]).log().requires_grad_()
    advantage = torch.tensor([2., 2., -2., -2., 3.])
    loss = d.ddpo_loss(log_ratio, advantage, .1)                          # A > 0: min(rho, 1.1); A < 0: max(rho, .9)
    assert loss.item() == pytest.approx((-2 * 1.1 - 2 * .7 + 2 * 1.3 + 2 * .9 - 3) / 5)
    loss.backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0., -2 * .7, 2 * 1.3, 0., -3.]) / 5)
    kl = torch.tensor([1., 2., 3., 4., 5.])
    assert (d.dpok_loss(log_ratio, advantage, .1, kl, .01) - loss).item() == pytest.approx(.03)


def test_statistics_are_numpys_over_all_rounds():
    rounds = [np.random.default_rng(i).normal(.3, .05, 8).astype(np.float32) for i in range(3)]
    for k in range(3):
        past = np.concatenate(rounds[:k + 1])
        expected = np.clip((rounds[k] - past.mean()) / (past.std() + 1e-6), -5, 5)
        torch.testing.assert_close(d.advantages(past.tolist(), torch.tensor(rounds[k])), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert d.advantages([0.] * 99 + [.001], torch.tensor([1., -1.])).tolist() == [5, -5]
    assert d.advantages([.3] * 8, torch.tensor([.3])).abs().item() < .1   # all the same: no advantage, no nan


def test_choose_by_hand():
    r = torch.tensor([.1, .8, .3, .7, .2, .6, .4, .5])
    reference, base, source = d.choose(r)
    assert reference.tolist() == [1, 3] and base.tolist() == [6, 2, 4, 0] and source.tolist() == [0, 0, 1, 1]
    reference, base, source = d.choose(torch.arange(16.))
    assert reference[source].tolist() == [15, 15, 14, 14, 13, 13, 12, 12] and base.tolist() == list(range(7, -1, -1))


# ------------------------------------------------------------------------------------------------------------------------------------
# masks and fusion


def test_items_are_found_with_the_tokenizer():
    tokenizer = clip_tokenizer(full=True)

    def pieces(prompt, item, which="own"):
        ids = tokenizer(prompt, padding="max_length", max_length=77).input_ids
        return tokenizer.convert_ids_to_tokens([ids[i] for i in d.token_span(tokenizer, prompt, item, which)])
    assert pieces("a black and woolen bus", "woolen") == ["woo", "len</w>"]
    assert pieces("a black and woolen bus", "bus") == ["bus</w>"] and pieces("a black and woolen bus", "bus", "next") == ["<|endoftext|>"]
    assert pieces("the computer below the counter", "computer") == ["compu", "ter</w>"]
    assert pieces("the computer below the counter", "counter") == ["counter</w>"]
    assert pieces("A blue square, a red circle", "blue square") == ["blue</w>", "square</w>"]
    for name in ("template1", "template2", "template3"):
        rows, tests = d.read_items(str(ROOT / "prompts" / "dfusion_templates.json"), name)
        assert len(rows) == len(tests) == 40
        for row in rows:
            for item, threshold in zip(row["items"], row["thresholds"], strict=True):
                assert "".join(pieces(row["prompt"], item)).replace("</w>", "") == item.replace(" ", "") and 0 < threshold <= .03


def test_toy_prompts_are_of_the_right_side_of_the_split():
    from toy.scenes import all_captions
    train, test = set(all_captions(False)), set(all_captions(True))
    for name, count in (("attributes", 40), ("relations", 40), (None, 80)):
        rows, tests = d.read_items(str(ROOT / "prompts" / "dfusion_toy.json"), name)
        assert len(rows) == len(set(tests)) == count and {row["prompt"] for row in rows} <= train and set(tests) <= test
        assert all(item in row["prompt"] for row in rows for item in row["items"])


def test_masks_by_hand():
    maps = torch.tensor([[[.1, .5], [.3, .2]], [[.9, .6], [.1, .2]]])     # two items, 2 x 2
    assert d.merge_masks(maps, [.3, .6], "xor").tolist() == [[True, False], [True, False]]
    assert d.merge_masks(maps, [.3, .6], "or").tolist() == [[True, True], [True, False]]
    assert d.merge_masks(maps[None, None], [.3, .6], "or").shape == (1, 1, 2, 2)


def blocks_of(model):
    blocks = d.attention_blocks(model)
    return blocks, d.modules_of(model, blocks[2:], "attn2"), d.modules_of(model, blocks[1:], "attn1")


@pytest.mark.parametrize("family", ["sd_v", "sdxl"])
def test_idle_processors_are_the_stock_ones_and_maps_are_the_softmax(folder, family):
    model = load_model(str(folder / family), CPU)
    blocks, cross, own = blocks_of(model)
    assert blocks == ["down_blocks.1", "mid_block", "up_blocks.0"] and len(cross) == 2 and len(own) == 3
    x, t, prompts = randn(3, 4, 8, 8), torch.tensor([501] * 3), [r["prompt"] for r in ROWS] + ["a red star"]
    with torch.no_grad():
        stock = d.guided(model, x, t, prompts, 5.)
        with d.installed(model, d.SelfAttentionFusion(), own):
            assert torch.equal(d.guided(model, x, t, prompts, 5.), stock)
        seen, attn = [], model.denoiser.get_submodule(cross[0].removesuffix(".processor"))
        hook = attn.register_forward_pre_hook(lambda m, a, k: seen.append((a[0], k["encoder_hidden_states"])), with_kwargs=True)
        with d.installed(model, d.CrossAttentionMaps(3), cross[:1]) as maps_of:
            assert torch.equal(d.guided(model, x, t, prompts, 5.), stock)
            maps = maps_of.maps[0]
            taken = maps_of.take([[1, 2], [4]])
            assert not maps_of.maps
        hook.remove()
        states, text = seen[0][0][3:], seen[0][1][3:]                     # the conditional half
        scores = attn.get_attention_scores(attn.head_to_batch_dim(attn.to_q(states)), attn.head_to_batch_dim(attn.to_k(text)))
    torch.testing.assert_close(maps, scores.unflatten(0, (3, -1)).mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))
    assert taken.shape == (3, 2, 4, 4)
    torch.testing.assert_close(taken[:, 0].flatten(1), maps[:, :, 1:3].mean(-1))
    with torch.no_grad():
        assert torch.equal(d.guided(model, x, t, prompts, 5.), stock)


def test_stock_processors_come_back_whatever_happens(model):
    before = model.denoiser.attn_processors
    with pytest.raises(KeyError):
        with d.installed(model, d.SelfAttentionFusion(), blocks_of(model)[2]):
            assert sum(isinstance(p, d.SelfAttentionFusion) for p in model.denoiser.attn_processors.values()) == 3
            raise KeyError
    after = model.denoiser.attn_processors
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert all(isinstance(p, AttnProcessor2_0) for p in after.values())


def test_keys_and_values_by_hand(model):
    """One module, both guidance halves: where the mask is set a target's keys and values are its reference's; queries stay its own."""
    attn = model.denoiser.get_submodule(blocks_of(model)[2][0].removesuffix(".processor"))
    n, m, hw = 2, 3, 16
    h, source, masks = randn(2 * (n + m), hw, attn.to_q.in_features), torch.tensor([0, 0, 1]), randn(m, 4, 4, seed=3) > 0
    fusion = d.SelfAttentionFusion()
    fusion.n, fusion.source, fusion.masks = n, source, masks

    def attend(q, k, v):
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for x in (q, k, v))
        out = (q @ k.mT * attn.scale).softmax(-1) @ v
        return attn.to_out[0](out.transpose(0, 1).flatten(1))
    with torch.no_grad():
        out, stock = fusion(attn, h), AttnProcessor2_0()(attn, h)
        for half in (h[:n + m], h[n + m:]):
            start = 0 if half is not h and torch.equal(half, h[:n + m]) else n + m
            torch.testing.assert_close(out[start:start + n], stock[start:start + n], rtol=1e-4, atol=1e-5)
            for j in range(m):
                own, ref, where = half[n + j], half[source[j]], masks[j].flatten()[:, None]
                k, v = (torch.where(where, f(ref), f(own)) for f in (attn.to_k, attn.to_v))
                torch.testing.assert_close(out[start + n + j], attend(attn.to_q(own), k, v), rtol=1e-4, atol=1e-5)
        fusion.masks = torch.ones(m, 4, 4, dtype=torch.bool)              # all keys: what a target's own keys are does not matter
        h2 = h.clone()
        full = fusion(attn, h)
        h2[n] = h2[n + 1]
        torch.testing.assert_close(fusion(attn, h2)[n], full[n + 1])
        fusion.masks = ~fusion.masks
        torch.testing.assert_close(fusion(attn, h), stock, rtol=1e-5, atol=1e-6)
        fusion.masks = torch.eye(2, dtype=torch.bool).expand(m, 2, 2)     # nearest neighbour: 2 x 2 over 4 x 4
        big = torch.eye(2).repeat_interleave(2, 0).repeat_interleave(2, 1).bool().expand(m, 4, 4)
        small = fusion(attn, h)
        fusion.masks = big
        assert torch.equal(small, fusion(attn, h))


class TwoPass:
    """Keeps the references' keys and values in one pass; gives them to the targets, without a mask, in another."""
    def __init__(self):
        self.kept, self.give, self.mask, self.source = {}, False, None, None

    def __call__(self, attn, h, *args, **kwargs):
        q, k, v = attn.to_q(h), attn.to_k(h), attn.to_v(h)
        if self.give:
            side = int(h.shape[1] ** .5)
            mask = F.interpolate(self.mask[:, None].float(), (side, side)).flatten(1)[None, :, :, None]
            k, v = ((mask * ref.unflatten(0, (2, -1))[:, self.source] + (1 - mask) * own.unflatten(0, (2, -1))).flatten(0, 1)
                    for ref, own in zip(self.kept[attn], (k, v)))
        else:
            self.kept[attn] = k, v
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_the_joint_batch_is_two_passes_and_no_mask_the_plain_model(model):
    own, n, m = blocks_of(model)[2], 2, 4
    x, t, source, masks = randn(n + m, 4, 8, 8), torch.tensor([501]), torch.tensor([0, 0, 1, 1]), randn(m, 4, 4, seed=3) > 0
    prompts = [ROWS[0]["prompt"]] * (n + m)
    plain = d.guided(model, x, t.expand(n + m), prompts, 5.)
    with d.installed(model, d.SelfAttentionFusion(), own) as fusion:
        fusion.n, fusion.source, fusion.masks = n, source, masks
        joint = d.guided(model, x, t.expand(n + m), prompts, 5.)
        fusion.masks = torch.zeros_like(masks)
        assert torch.equal(d.guided(model, x, t.expand(n + m), prompts, 5.), plain)                  # mask 0, the same joint batch: exactly
        fusion.masks = torch.ones_like(masks)
        assert torch.equal(d.guided(model, x, t.expand(n + m), prompts, 5.)[:n], plain[:n])          # mask 1: references untouched
    assert torch.equal(joint[:n], plain[:n]) and (joint[n:] - plain[n:]).abs().max() > 1e-3
    with d.installed(model, TwoPass(), own) as two:
        reference = d.guided(model, x[:n], t.expand(n), prompts[:n], 5.)
        two.give, two.mask, two.source = True, masks, source
        target = d.guided(model, x[n:], t.expand(m), prompts[n:], 5.)
    torch.testing.assert_close(joint, torch.cat([reference, target]), rtol=1e-4, atol=1e-4 * joint.abs().max().item())


@torch.no_grad()
def test_a_target_shares_its_bases_noise(model):
    scheduler, prompt, own = make_scheduler(model, "ddim", 6), ROWS[0]["prompt"], blocks_of(model)[2]
    x, _ = d.sample_trajectories(model, scheduler, prompt, gens(4), 5.)
    reference, base, source = torch.tensor([1]), torch.tensor([3, 0]), torch.tensor([0, 0])
    masks = torch.ones(1, 6, 4, 4, dtype=torch.bool)

    def fuse(masks, steps):
        with d.installed(model, d.SelfAttentionFusion(), own) as fusion:
            return d.fuse(model, scheduler, fusion, prompt, x[reference], x[base], source, masks, [gens(4)[i] for i in (3, 0)], 5., steps)
    torch.testing.assert_close(fuse(~masks, range(6)), x[base], rtol=1e-3, atol=1e-3)                # no mask: the base again
    target = fuse(masks, range(2, 5))
    assert torch.equal(target[:, :3], x[base][:, :3])                                              # before the fused steps a target is its base
    assert (target[:, 3] - x[base][:, 3]).abs().max() > 1e-3
    t, z = scheduler.timesteps[5:].repeat(2), torch.stack([[initial_latents(model, [g])[0] for _ in range(7)][6] for g in (gens(4)[3], gens(4)[0])])
    mu, sigma = d.ddim_step(scheduler, d.guided(model, target[:, 5], t, [prompt] * 2, 5.), t, target[:, 5])
    torch.testing.assert_close((target[:, 6] - mu) / sigma, z, rtol=1e-2, atol=1e-2)                # the last step: unfused, the base's noise


@torch.no_grad()
def test_inversion_is_diffusers(model):
    scheduler, x0 = make_scheduler(model, "ddim", 5), randn(2, 4, 8, 8)
    x = d.invert(model, scheduler, ROWS[0]["prompt"], x0)
    assert x.shape == (2, 6, 4, 8, 8) and torch.equal(x[:, -1], x0)
    theirs = DDIMInverseScheduler.from_config(scheduler.config, set_alpha_to_one=False, clip_sample=False)
    theirs.set_timesteps(5)
    for i, t in enumerate(scheduler.timesteps.flip(0)):
        latents = x[:, 5 - i]
        out = d.guided(model, latents, t.expand(2), [ROWS[0]["prompt"]] * 2, 1.)
        torch.testing.assert_close(x[:, 4 - i], theirs.step(out, t, latents).prev_sample, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------------------------------
# rounds and runs


@pytest.fixture
def watched(monkeypatch):
    """The pairs of every round, and the denoiser's calls in training: Counter of (rows, with gradient)."""
    rounds, calls, load, sample_round = [], Counter(), d.load_model, d.sample_round

    def load_watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.denoiser.register_forward_pre_hook(lambda m, a, k: calls.update([(len(a[0]), torch.is_grad_enabled())]), with_kwargs=True)
        return model

    def round_watched(*args, **kwargs):
        rounds.append(sample_round(*args, **kwargs))
        return rounds[-1]
    monkeypatch.setattr(d, "load_model", load_watched)
    monkeypatch.setattr(d, "sample_round", round_watched)
    monkeypatch.setattr(d, "held_out", lambda *a, **k: 0.)
    return rounds, calls


def test_what_a_round_is_made_of_and_costs(folder, tmp_path, watched):
    """4 images of 2 prompts in 4 steps, 2 pairs a prompt, guided (two rows an image); 3 steps fused with one reference; 16 couples in passes of 2."""
    rounds, calls = watched
    rows = test_refl.log_of(train(folder, tmp_path / "fused", "--train_steps", 2, "--fusion_steps", "3-1", *ALL))
    assert calls == {(8, False): 4 * 2, (6, False): 3 * 2, (8, True): 2 * 8}
    assert [row["passes"] for row in rows] == [8 * 8 + 6 * 6 + 8 * 8, 8 * 8] and [row["round"] for row in rows] == [0, 0]
    pairs, stats = rounds[0]
    assert pairs.trajectories.shape == (2, 4, 5, 4, 8, 8) and pairs.advantages.shape == (2, 4) and len(pairs.pictures) == 8
    assert stats["adoption"] == 1 and 0 < stats["mask_area"] < 1 and stats["reward_b"] <= stats["reward"]
    assert rows[0]["loss"] == pytest.approx(np.log(2)) and rows[0]["accuracy"] == .5 and rows[0]["margin"] == 0 and rows[0]["log_ratio"] == [0] * 4
    assert rows[1]["accuracy"] != .5 and all(x > 0 for x in rows[1]["log_ratio"]) and rows[1]["images"] == 8

    train(folder, tmp_path / "naive", "--train_steps", 1, "--naive")
    naive = rounds[1][0]
    assert torch.equal(naive.trajectories[1], pairs.trajectories[1]) and naive.prompts == pairs.prompts      # the same bases, and
    assert torch.equal(naive.trajectories[0, 0], naive.trajectories[0, 1]) and not torch.equal(naive.trajectories[0], pairs.trajectories[0])
    assert len(naive.pictures) == 4

    train(folder, tmp_path / "refused", "--train_steps", 1, *NONE)
    assert rounds[2][1]["adoption"] == 0 and torch.equal(rounds[2][0].trajectories, naive.trajectories)      # Eq. 7: back to the references

    calls.clear()
    settings = ["--algo", "dpok", "--train_timesteps", 1, "--naive", "--trajectory", "inversion"]
    rows = test_refl.log_of(train(folder, tmp_path / "dpok", "--train_steps", 2, *settings))
    assert calls == {(8, False): 4 * 2 + 2 * 2, (2, False): 4 * 4, (8, True): 2 * 2}
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0 and sum(x is None for x in rows[0]["log_ratio"]) < 4
    last = rounds[3][0].trajectories
    assert torch.equal(last[1, :, -1], naive.trajectories[1, :, -1]) and not torch.equal(last[1, :, 0], naive.trajectories[1, :, 0])


def test_no_guidance_is_one_row_an_image_and_ddpo_starts_at_the_mean_advantage(folder, tmp_path, watched):
    rounds, calls = watched
    out = train(folder, tmp_path / "run", "--train_steps", 2, "--guidance_scale", 1, "--algo", "ddpo", "--lr", .01, *ALL, model="sdxl")
    assert calls == {(4, False): 4 * 2, (3, False): 2 * 2, (4, True): 8 * 2}
    rows = test_refl.log_of(out)
    assert rows[0]["loss"] == pytest.approx(-rounds[0][0].advantages.mean().item(), abs=1e-6) and rows[1]["loss"] < rows[0]["loss"]      # it went down


def test_a_step_without_noise_is_not_trained(folder, tmp_path):
    shutil.copytree(folder / "sd", tmp_path / "sd")
    path = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), set_alpha_to_one=True)))
    rows = test_refl.log_of(train(folder, tmp_path / "run", "--train_steps", 2, "--naive", "--batch_size", 4, "--model", tmp_path / "sd"))
    assert rows[1]["log_ratio"][3] is None and all(x > 0 for x in rows[1]["log_ratio"][:3]) and np.isfinite(rows[1]["loss"])


def test_trained_steps_are_counted_down_to_1_and_no_other_step_is_trained(folder, tmp_path):
    rows = test_refl.log_of(train(folder, tmp_path / "run", "--train_steps", 2, "--naive", "--batch_size", 4, "--trained_steps", "3-2"))
    assert [x is None for x in rows[1]["log_ratio"]] == [True, False, False, True] and rows[1]["margin"] != 0
    one = test_refl.log_of(train(folder, tmp_path / "one", "--train_steps", 1, "--naive", "--batch_size", 4, "--trained_steps", "3-3"))[0]
    assert rows[0]["passes"] - one["passes"] == 8                        # 2 pairs, 2 images, guidance: one step less


@pytest.mark.parametrize("settings", [["--algo", "dpo"],
                                      ["--algo", "dpok", "--train_timesteps", 2, "--prompts", "prompts.txt", "--test_prompts", "one.txt"]])
def test_resume_is_exact_also_inside_a_round(folder, tmp_path, settings):
    settings = [folder / x if str(x).endswith("txt") else x for x in settings] + ["--lr", .01, "--save_every", 1]
    whole = train(folder, tmp_path / "whole", *settings, "--train_steps", 4)
    half = train(folder, tmp_path / "half", *settings, "--train_steps", 1)
    train(folder, half, *settings, "--train_steps", 3, "--resume")                                  # from inside round 0 to inside round 1
    train(folder, half, *settings, "--train_steps", 4, "--resume")
    without = [[{k: v for k, v in row.items() if k not in ("passes", "test_reward")} for row in test_refl.log_of(r)] for r in (whole, half)]
    assert without[0] == without[1] and [row["step"] for row in without[1]] == [1, 2, 3, 4]
    assert test_refl.same(test_refl.weights_of(whole), test_refl.weights_of(half))
    assert [row["passes"] for row in test_refl.log_of(whole)] == [row["passes"] for row in test_refl.log_of(half)]
    for name in ("step_000004.png", "round_0001.png"):
        assert (whole / "samples" / name).read_bytes() == (half / "samples" / name).read_bytes()
    history = [torch.load(r / "checkpoint/state.pt", weights_only=True)["history"] for r in (whole, half)]
    assert history[0] == history[1] and all(sorted(rounds) == [0, 1] and len(rounds[0]) == 4 for rounds in history[0].values())


def test_thresholds_of_a_text_file(folder, tmp_path, capsys):
    out = train(folder, tmp_path / "run", "--train_steps", 1, "--prompts", folder / "prompts.txt", "--test_prompts", folder / "one.txt")
    rows, tests = d.read_items(str(out / "prompts.json"), None)
    assert [row["items"] for row in rows] == [["circle", "blue square"], ["triangle"]] and tests == ["a red star"]
    assert all(0 < x < 1 for row in rows for x in row["thresholds"])
    assert Image.open(out / "samples" / "thresholds.png").size == (4 * 16 * 8, 2 * 16 * 8)        # sample, two items, merged; zoomed
    assert "edit it" in capsys.readouterr().out and (out / "test_prompts.txt").read_text() == "a red star\n"
    again = train(folder, tmp_path / "again", "--train_steps", 1, "--prompts", out / "prompts.json")
    assert test_refl.log_of(out) == test_refl.log_of(again)
    area = test_refl.log_of(train(folder, tmp_path / "one", "--train_steps", 1, "--prompts", out / "prompts.json", "--mask_merge", "or"))[0]["mask_area"]
    assert .1 < area < .6                                                 # one item a fifth, two up to two


def test_the_toy_run_through_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "toy.txt").write_text("a red circle | circle\n")
    run("dfusion_dpo", "--train_steps", 1, "--batch_size", 4, "--images_per_prompt", 4, "--num_inference_steps", 3, "--train_timesteps", 2,
        "--prompts", tmp_path / "toy.txt", "--test_prompts", folder / "one.txt", "--out", tmp_path / "run")
    text = capsys.readouterr().out
    assert "held-out toy_clip before" in text and "held-out toy_clip after" in text and "stays near ln 2" in text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["sampler"] == dict(scheduler="ddim", eta=1., num_inference_steps=3, guidance_scale=1.) and config["fusion_layers"] == "3-6"
    assert Image.open(tmp_path / "run" / "samples" / "round_0000.png").size[0] == 4 * 64 * 2
    run("combined_sample", "--lora", tmp_path / "run", "--prompts", tmp_path / "run" / "test_prompts.txt", "--num_images", 1, "--out", tmp_path / "images")
    text = capsys.readouterr().out
    assert "ddim" in text and "eta                  1.0" in text and (tmp_path / "images" / "00000_00.png").exists()


def test_settings_of_the_paper():
    args = d.parse_args(["--model", "sd21"])
    row = dict(train_steps=80, batch_size=640, images_per_prompt=16, inner_epochs=2, train_timesteps=20, num_inference_steps=20, guidance_scale=5.,
               lr=1e-4, lora_rank=4, fusion_steps="18-1", mask_merge="xor", item_token="own", adoption_threshold=1., reward="clip_h", algo="dpo")
    assert row.items() <= vars(args).items() and Path(args.prompts).name == "dfusion_templates.json"
    assert d.parse_args([]).reward == "toy_clip" and d.parse_args(["--model", "sdxl"]).resolution == 1024
    assert [d.parse_args(words).trained_steps for words in ([], ["--num_inference_steps", "20"], ["--model", "sd21"])] == ["4-3", "20-1", "20-1"]


# ------------------------------------------------------------------------------------------------------------------------------------
# bad input: one line, exit status 2, nothing written


def test_bad_values(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"list.json": [1], "cut.json": '{"a": ', "no_test.json": {"a": {"train": ROWS}}, "empty.json": {}, "plain.txt": "a red circle\n",
             "text.json": {"a": {"train": ["a red circle"], "test": []}}, "few.json": {"a": {"train": [dict(ROWS[0], thresholds=[.1])], "test": []}},
             "absent.json": {"a": {"train": [dict(prompt="a red circle", items=["square"])], "test": ["a red star"]}},
             "part.json": {"a": {"train": [dict(prompt="a red circle", items=["circ"])], "test": ["a red star"]}},
             "twice.json": {"a": {"train": ROWS[:1] * 2, "test": []}}, "ambiguous.txt": "a red square above a blue square | square\n",
             "typo.json": {"a": {"train": [dict(ROWS[0], threshold=[.1, .1])], "test": []}}}
    for name, content in files.items():
        Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
    ours = ["--model", folder / "sd", "--prompts", folder / "prompts.json", *SHORT]
    table = [
        (["--model", "flux-schnell"], ["flux-schnell", "sdxl"]),
        (["--algo", "ppo"], ["dpo", "ddpo", "dpok"]),
        (["--algo", "dpok", "--lora_rank", 0], ["dpok", "lora_rank"]),
        (["--images_per_prompt", 6], ["multiple of 4"]),
        (["--images_per_prompt", 8, "--batch_size", 20], ["--batch_size 20"]),
        (["--micro_batch", 3], ["even"]),
        (["--inner_epochs", 0], ["at least one epoch"]),
        (["--train_timesteps", 21], ["num_inference_steps 10"]),
        (["--num_inference_steps", 2000, "--train_timesteps", 1], ["at most 500"]),
        (["--fusion_steps", "21-1"], ["10 down to 1"]),
        (["--trained_steps", "21-3"], ["--trained_steps 21-3", "10 down to 1"]),
        (["--fusion_steps", "18-1-2"], ["18-1-2", "dash"]),
        (["--fusion_layers", "up"], ["up", "3-6"]),
        (["--naive", "--fusion_steps", "18-1"], ["--naive fuses nothing"]),
        (["--beta", 0], ["beta above 0"]),
        (["--kl_weight", -1], ["kl_weight"]),
        (["--kl_weight", "nan"], ["kl_weight"]),
        (["--guidance_scale", .5], ["guidance"]),
        (["--mask_merge", "and"], ["xor", "or"]),
        (["--trajectory", "inverse"], ["inversion"]),
        (["--fusion_step", "18-1"], ["--fusion_steps"]),
        ([*ours, "--fusion_layers", "1-3"], ["up_blocks.0", "1-3"]),
        ([*ours, "--mask_layer", 5], ["up_blocks.0", "5"]),
        ([*ours, "--batch_size", 12], ["at most 8"]),
        ([*ours, "--template", "secnd"], ["second"]),
        ([*ours, "--prompts", "nowhere.json"], ["nowhere.json", "No such file"]),
        ([*ours, "--prompts", "list.json"], ["list.json", "train"]),
        ([*ours, "--prompts", "cut.json"], ["cut.json", "train"]),
        ([*ours, "--prompts", "no_test.json"], ["no_test.json", "test"]),
        ([*ours, "--prompts", "empty.json"], ["empty.json"]),
        ([*ours, "--prompts", "text.json"], ["text.json", "train"]),
        ([*ours, "--prompts", "few.json"], ["as many thresholds as items"]),
        ([*ours, "--prompts", "typo.json"], ["other keys"]),
        ([*ours, "--prompts", "plain.txt"], ["prompt | item; item"]),
        ([*ours, "--prompts", "twice.json"], ["twice"]),
        ([*ours, "--prompts", folder / "prompts.txt"], ["--test_prompts"]),
        ([*ours, "--prompts", folder / "prompts.txt", "--template", "a"], ["--template a"]),
        ([*ours, "--batch_size", 4, "--prompts", "absent.json"], ["square", "occurs 0 times"]),
        ([*ours, "--batch_size", 4, "--prompts", "part.json"], ["circ", "occurs 0 times"]),
        ([*ours, "--batch_size", 4, "--prompts", "ambiguous.txt", "--test_prompts", folder / "one.txt"], ["occurs 2 times"]),
    ]
    problems = []
    for argv, words in table:
        try:
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                d.main(d.parse_args(list(map(str, argv))))
            err = capsys.readouterr().err
            if stop.value.code != 2 or not err.startswith("error: ") or err.count("\n") != 1 or not all(w in err for w in words):
                problems.append((argv, err))
        except BaseException as e:                                        # show the whole table at once
            problems.append((argv, f"{type(e).__name__}: {e}"))
    assert not problems, "\n".join(map(str, problems))
    assert not (tmp_path / "runs").exists()
