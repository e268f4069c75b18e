"""focus_n_fix.py: the regional penalty, its mask, Grad-CAM, the gradient of the last steps, the pool, and what it says to bad input."""
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import random_weights
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from test_refl import log_of, same, weights_of
from test_sampling_scripts import pixels, run
from transformers import CLIPConfig, CLIPModel

import focus_n_fix
from common import (TOY, condition, decode, generate, generator, initial_latents, load_detector, load_model, load_reward, make_scheduler, sample,
                    trainable)
from focus_n_fix import before, change, concept_reward, draft, focus_loss, grad_cam, last_norm, problem_mask

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square above a green circle", "a yellow triangle", "a purple square"]
SHORT = ["--num_inference_steps", "4", "--batch_size", "4", "--micro_batch", "2", "--pool", "4", "--lora_rank", "4", "--guidance_scale", "2",
         "--dilate", "1", "--device", "cpu"]
SAMPLER = dict(scheduler="ddim", eta=0., num_inference_steps=4, guidance_scale=2.)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("focus")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (root / "one.txt").write_text(PROMPTS[0] + "\n")
    tiny.write(root / "sd"), tiny.write(root / "sd_v", prediction_type="v_prediction", seed=1), tiny.write(root / "sdxl", "sdxl", seed=2)
    return root


def train(folder, out, *extra, model="sd"):
    argv = ["--model", folder / model, "--detector", TOY / "detector", "--prompts", folder / "prompts.txt", "--test_prompts", folder / "one.txt", *SHORT]
    focus_n_fix.main(focus_n_fix.parse_args([*map(str, argv), "--out", str(out), *map(str, extra)]))
    return Path(out)


def draw(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed, "draw"))


# ------------------------------------------------------------------------------------------------------------------------------------
# the penalty

def test_the_penalty_has_gradient_zero_at_the_start_and_is_no_nan():
    base, mask = draw(3, 3, 8, 8), (draw(3, 1, 8, 8, seed=1) > .5).float()
    for raw in (False, True):
        images = base.clone().requires_grad_()
        loss, stats = focus_loss(images, base, mask, torch.tensor([1., 2., 6.]), 1e6, raw)
        loss.backward()
        assert loss == -3 and torch.equal(images.grad, torch.zeros_like(base)) and torch.equal(stats["outside"], torch.zeros(3))
    naive = base.clone().requires_grad_()
    ((1 - mask) * (naive - base)).pow(2).sum().sqrt().backward()
    assert naive.grad.isnan().any()                                               # what is avoided


def test_the_penalty_by_hand():
    base, mask = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[:, :, :, :2] = 1                                                         # the left half may change
    images = torch.full_like(base, 9.)
    images[0, :, :, 2:], images[1, :, :, 2:] = .5, 0.
    images[1, 0, 0, 3] = .3
    raw = torch.tensor([.5 * 24 ** .5, .3])                                       # 24 values outside
    torch.testing.assert_close(change(images, base, 1 - mask, raw=True), raw)
    torch.testing.assert_close(change(images, base, 1 - mask), raw / 24 ** .5)
    torch.testing.assert_close(change(images, base, mask), torch.tensor([9., 9.]))
    loss, stats = focus_loss(images, base, mask, torch.tensor([1., 3.]), 2.)
    torch.testing.assert_close(loss, -torch.tensor(2.) + 2 * ((raw ** 2 / 24 + 255 ** -2) ** .5 - 1 / 255).mean())
    loss, _ = focus_loss(images, base, mask, torch.tensor([1., 3.]), 2., raw=True)
    torch.testing.assert_close(loss, -torch.tensor(2.) + 2 * raw.mean())
    torch.testing.assert_close(stats["area"], torch.tensor([.5, .5]))
    assert torch.equal(change(images, base, torch.zeros_like(mask)), torch.zeros(2))      # everything may change: nothing to hold
    big = [F.interpolate(x, scale_factor=4) for x in (images, base, 1 - mask)]
    torch.testing.assert_close(change(*big), change(images, base, 1 - mask))              # the same at every resolution; raw: not
    torch.testing.assert_close(change(*big, raw=True), 4 * raw)


def test_the_gradient_of_the_loss_is_right_and_outside_only():
    base, mask = draw(2, 3, 5, 5).double(), (draw(2, 1, 5, 5, seed=1) > .5).double()
    images = draw(2, 3, 5, 5, seed=2).double().requires_grad_()
    for raw in (False, True):
        assert torch.autograd.gradcheck(lambda x: focus_loss(x, base, mask, torch.zeros(2), 1.5, raw)[0], images)
    (g,) = torch.autograd.grad(focus_loss(images, base, mask, torch.zeros(2), 1.5)[0], images)
    assert ((g != 0) == (mask.expand_as(g) == 0)).all()


def test_rounding_does_not_pull():
    """A norm's gradient has unit length at a change of 1e-7 too; ours grows with the change, and is the norm's where one could see it."""
    base, mask = draw(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    pull = {}
    for size in (1e-7, .1):
        for raw in (False, True):
            images = (base + size).requires_grad_()
            focus_loss(images, base, mask, torch.zeros(1), 1., raw)[0].backward()
            pull[size, raw] = images.grad.norm() * (1 if raw else 192 ** .5)
    assert abs(pull[1e-7, True] - 1) < 1e-3 and pull[1e-7, False] < 1e-4 and abs(pull[.1, False] - 1) < 1e-3


@pytest.mark.parametrize("dilate", [0, 1, 3, 20])
def test_dilation_against_brute_force(dilate):
    heat, threshold = draw(2, 1, 13, 13, seed=dilate), .97
    heat[0, 0, 0, 0], heat[0, 0, 12, 6], heat[1, 0, 5, 5] = 1., 1., threshold     # corners, edges; the threshold itself is not above it
    expected = torch.zeros_like(heat)
    for b, _, y, x in (heat.double() > torch.tensor(threshold)).nonzero().tolist():
        for v in range(13):
            for u in range(13):
                if max(abs(v - y), abs(u - x)) <= dilate:
                    expected[b, 0, v, u] = 1
    assert torch.equal(problem_mask(heat, threshold, dilate), expected) and 0 < expected.mean()
    assert not problem_mask(torch.zeros(1, 1, 9, 9), 0., dilate).any()            # nothing wrong: an empty mask, whatever the dilation


# ------------------------------------------------------------------------------------------------------------------------------------
# Grad-CAM and concepts

@pytest.fixture(scope="module")
def clip():
    """A random CLIP: 32 pixels, 4 x 4 patches, two blocks."""
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIPModel(CLIPConfig(text_config=dict(tiny.TEXT), vision_config=vision, projection_dim=16))
        for p in model.parameters():
            p.data += .1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def features(clip, images):
    return F.normalize(clip.get_image_features(pixel_values=images).pooler_output, dim=-1)


def test_grad_cam_follows_a_planted_patch(clip):
    """Score: cos to what the patch does to the image's features. The map's maximum moves with it. The attention of a random network may look away:
    for other seeds it is there 5 to 12 times of 16; by chance, once."""
    layer, image, patch = clip.vision_model.encoder.layers[-1].layer_norm1, .1 * draw(1, 3, 32, 32), 4 * (draw(3, 8, 8, seed=1) - .5)
    hits = 0
    for k in range(16):
        y, x = divmod(k, 4)
        planted = image.clone()
        planted[0, :, 8 * y:8 * y + 8, 8 * x:8 * x + 8] = patch
        direction = features(clip, planted) - features(clip, image)
        cam = grad_cam(layer, lambda images: (features(clip, images) * direction).sum(-1), planted)
        assert cam.shape == (1, 1, 32, 32) and cam.max() == 1 and cam.min() >= 0
        peak = F.avg_pool2d(cam, 8).argmax().item()
        hits += peak == k
    assert hits >= 14, hits


def test_grad_cam_against_its_closed_form(clip):
    """The last block with uniform attention and without its MLP: class' = class + Wo mean(Wv A + bv) + bo, so dscore/dA_j is (Wo Wv)' g / (1 + N)
    for every token, g the score's gradient at class'. The map is relu(A . that)."""
    block = clip.vision_model.encoder.layers[-1]
    state = {k: v.clone() for k, v in block.state_dict().items()}
    attention = block.self_attn
    for part in (attention.q_proj, attention.k_proj, block.mlp.fc2):
        part.weight.zero_(), part.bias.zero_()
    try:
        images, direction, seen = draw(6, 3, 32, 32), draw(16, seed=1) - .5, []
        score = lambda images: (features(clip, images) * direction).sum(-1)
        cam = grad_cam(block.layer_norm1, score, images)
        hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in (block.layer_norm1, block)]
        features(clip, images)
        for hook in hooks:
            hook.remove()
        a, out = seen
        token = out[:, 0].clone().requires_grad_()
        tail = F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(token)), dim=-1) @ direction
        (g,) = torch.autograd.grad(tail.sum(), token)
        w = g @ attention.out_proj.weight @ attention.v_proj.weight / 17                              # (B, D)
        expected = torch.relu((a[:, 1:] * w[:, None]).sum(-1)).view(6, 1, 4, 4)
        expected = F.interpolate(expected, (32, 32), mode="bilinear")
        top = expected.amax((1, 2, 3), keepdim=True)
        assert (top > 0).any()                                            # where every patch speaks against it, the map is empty
        torch.testing.assert_close(cam, expected / top.clamp(min=1e-30), rtol=1e-3, atol=1e-3)
    finally:
        block.load_state_dict(state)


def test_tokens_after_the_last_block_would_have_no_gradient(clip):
    images, score = draw(1, 3, 32, 32), lambda images: features(clip, images)[:, 0]
    kept = []
    block = clip.vision_model.encoder.layers[-1]
    with block.register_forward_hook(lambda m, a, out: kept.append(out.requires_grad_())):
        (g,) = torch.autograd.grad(score(images).sum(), kept)
    assert g[:, 0].any() and not g[:, 1:].any()
    assert grad_cam(block.layer_norm1, score, images).any()
    assert not grad_cam(block.layer_norm1, lambda images: 0 * score(images), images).any()           # a flat score: an empty map, no NaN


def test_a_concept_is_the_difference_of_two_scores_and_its_map_is_that_of_the_bad_text():
    clip, _ = load_reward("toy_clip", CPU)
    reward, images = concept_reward(clip, "a red star", "a blue star"), draw(3, 3, 64, 64).requires_grad_()
    expected = clip(images, ["a blue star"] * 3) - clip(images, ["a red star"] * 3)
    torch.testing.assert_close(reward(images, PROMPTS[:3]), expected)
    torch.testing.assert_close(reward(images, ["whatever"] * 3), expected)
    assert torch.autograd.grad(reward(images, PROMPTS[:3]).sum(), images)[0].any()
    with pytest.raises(SystemExit) as e:
        concept_reward(clip, "a red star", "a red star")
    assert e.value.code == 2
    grid = torch.tensor([0, 0, 0, 1] + [0] * 12).view(1, 1, 4, 4).float()
    with torch.no_grad():                                                         # as the script calls it
        cam = grad_cam(last_norm(clip), lambda images: -reward(images, None), images.detach() * grid.repeat_interleave(16, 2).repeat_interleave(16, 3))
    assert cam.shape == (3, 1, 64, 64) and cam.isfinite().all() and torch.equal(cam.amax((1, 2, 3)), torch.ones(3))


def test_the_toys_grad_cam_finds_the_unwanted_object():
    """Renders of two objects, one of them red: most of what is above half of the maximum lies nearer to it than to the other object."""
    import numpy as np
    from toy.scenes import render, sample_scene
    clip, _ = load_reward("toy_clip", CPU)
    reward, found = concept_reward(clip, "a red circle", "a blue circle"), []
    for i in range(12):
        caption = "a red circle left of a green square" if i % 2 else "a green square left of a red circle"
        image, coverage = render(sample_scene(np.random.default_rng(i), caption))
        images = torch.tensor(image).permute(2, 0, 1)[None].float()
        above = grad_cam(last_norm(clip), lambda images: -reward(images, None), images)[0, 0].numpy() > .5
        y, x = np.mgrid[:64, :64]
        centres = [((c * x).sum() / c.sum(), (c * y).sum() / c.sum()) for c in coverage]              # in the order of the caption
        red, green = centres[::-1] if not i % 2 else centres
        nearer = np.hypot(x - red[0], y - red[1]) < np.hypot(x - green[0], y - green[1])
        found.append(nearer[above].mean())
    assert sum(f > .5 for f in found) >= 9, found


# ------------------------------------------------------------------------------------------------------------------------------------
# the gradient

@pytest.mark.parametrize("family", ["sd", "sd_v", "sdxl"])
def test_the_gradient_is_drafts_and_the_full_mask_changes_nothing(folder, family):
    """Against the chain written out with the modules alone and DDIM's own formula. A mask over everything leaves exactly the same gradient, whatever
    beta; the logged squares are those of dloss/dnoise_pred."""
    model = load_model(str(folder / family), CPU)
    params, scheduler = trainable(model, 4), make_scheduler(model, "ddim", 4)
    cond, uncond = condition(model, PROMPTS[:2]), condition(model, [None] * 2)
    noise = initial_latents(model, [generator(0, "x", i) for i in range(2)])
    base, _ = before(model, scheduler, noise, PROMPTS[:2], 2., lambda images, prompts: None)
    for i, p in enumerate(params):
        p.data = .3 * torch.randn(p.shape, generator=generator(0, i))
    target = draw(2, 3, 16, 16)

    def gradient(mask, beta):
        latents = sample(model, scheduler, noise, cond, 0, 2, None, 2., uncond)
        assert not latents.requires_grad
        images, squares = draft(model, scheduler, latents, cond, 2., uncond, 2)
        r = -(images - target).square().mean((1, 2, 3))                   # a reward of the whole image
        loss, _ = focus_loss(images, base, mask, r, beta)
        return torch.autograd.grad(loss, params), squares, latents

    everything = torch.ones(2, 1, 16, 16)
    grads, squares, x = gradient(everything, 0.)
    for other in (gradient(everything, 1e6)[0], gradient(torch.zeros_like(everything), 0.)[0]):
        assert all(torch.equal(g, h) for g, h in zip(grads, other))
    assert any(not torch.equal(g, h) for g, h in zip(grads, gradient(torch.zeros_like(everything), 1.)[0]))

    predictions, steps = [], scheduler.timesteps.tolist()
    for i in (2, 3):
        a = model.pipe.scheduler.alphas_cumprod[steps[i]]
        a_next = model.pipe.scheduler.alphas_cumprod[steps[i + 1]] if i < 3 else scheduler.final_alpha_cumprod
        out_u, out_c = (model.denoiser(x, steps[i], **c).sample for c in (uncond, cond))
        predictions.append(out_u + 2. * (out_c - out_u))
        eps, x0 = predictions[-1], (x - (1 - a) ** .5 * predictions[-1]) / a ** .5
        if family == "sd_v":
            eps, x0 = a ** .5 * predictions[-1] + (1 - a) ** .5 * x, a ** .5 * x - (1 - a) ** .5 * predictions[-1]
        x = a_next ** .5 * x0 + (1 - a_next) ** .5 * eps
    by_hand = (decode(model, x) - target).square().mean((1, 2, 3)).mean()
    expected = torch.autograd.grad(by_hand, [*params, *predictions])
    assert max(g.abs().max() for g in expected) > 0
    for g, h in zip(grads, expected):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-2 * h.abs().max().item())     # guidance as one batch or as two
    assert list(squares) == steps[:1:-1]                                          # the last step's comes first
    for t, h in zip(steps[2:], expected[-2:]):
        assert squares[t].item() == pytest.approx(h.square().sum().item(), rel=1e-2)


def test_checkpointing_does_not_change_the_gradient(folder):
    """I0 is made, with the adapters off, before the chain with gradient: so its checkpointed backward sees them on."""
    grads = []
    for checkpointing in (False, True):
        model = load_model(str(folder / "sd"), CPU)
        params, scheduler = trainable(model, 4, checkpointing=checkpointing), make_scheduler(model, "ddim", 4)
        for i, p in enumerate(params):
            p.data = .3 * torch.randn(p.shape, generator=generator(0, i))
        assert model.denoiser.is_gradient_checkpointing == checkpointing
        noise, region = initial_latents(model, [generator(0, "x", i) for i in range(2)]), lambda images, prompts: problem_mask(images[:, :1], .6, 1)
        base, mask = before(model, scheduler, noise, PROMPTS[:2], 2., region)
        cond, uncond = condition(model, PROMPTS[:2]), condition(model, [None] * 2)
        images, _ = draft(model, scheduler, sample(model, scheduler, noise, cond, 0, 2, None, 2., uncond), cond, 2., uncond, 2)
        focus_loss(images, base, mask, images.mean((1, 2, 3)), 1.)[0].backward()
        grads.append([p.grad for p in params])
        assert 0 < mask.mean() < 1
    assert max(g.abs().max() for g in grads[0]) > 0
    for g, h in zip(*grads):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5 * h.abs().max().item())


def test_I0_is_the_base_model_whatever_the_adapter(folder):
    untouched = generate(load_model(str(folder / "sd"), CPU), PROMPTS, 0, SAMPLER, purpose="held-out")
    model = load_model(str(folder / "sd"), CPU)
    for p in trainable(model, 4):
        p.data += torch.randn(p.shape, generator=generator(0, "p"))
    noise = initial_latents(model, [generator(0, "held-out", i, 0) for i in range(4)])
    base, mask = before(model, make_scheduler(model, "ddim", 4), noise, PROMPTS, 2., lambda images, prompts: problem_mask(images[:, :1], .5, 0))
    assert torch.equal(base, untouched) and torch.equal(mask, (untouched[:, :1] > .5).float())
    assert (generate(model, PROMPTS, 0, SAMPLER, purpose="held-out") - untouched).abs().max() > .01


# ------------------------------------------------------------------------------------------------------------------------------------
# runs

def test_a_huge_beta_keeps_the_image(folder, tmp_path):
    """No region at all: the whole image is held. beta = 0 on the same pairs moves it."""
    settings = ["--threshold", .999, "--dilate", 0, "--train_steps", 12, "--batch_size", 2, "--num_inference_steps", 3, "--lr", .001]
    held, free = (train(folder, tmp_path / str(beta), *settings, "--beta", beta) for beta in (1e6, 0))
    for row in log_of(held):
        assert row["area"] == 0 and row["empty"] == 2 and all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert log_of(held)[0]["outside"] == log_of(held)[0]["inside"] == 0            # step 0: I = I0, exactly
    assert log_of(held)[-1]["test_outside"] < .3 * log_of(free)[-1]["test_outside"]


@pytest.fixture
def calls(monkeypatch):
    """Denoiser calls of training: (timestep, images with guidance's half, with gradient), in order; prompts of the pairs made."""
    seen, made, load = [], [], focus_n_fix.load_model

    def load_watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.denoiser.register_forward_pre_hook(lambda m, a, k: seen.append((int(a[1]), len(a[0]), torch.is_grad_enabled())), with_kwargs=True)
        return model

    def before_watched(model, scheduler, noise, prompts, *args):
        made.append(prompts)
        return before(model, scheduler, noise, prompts, *args)

    monkeypatch.setattr(focus_n_fix, "load_model", load_watched)
    monkeypatch.setattr(focus_n_fix, "before", before_watched)
    monkeypatch.setattr(focus_n_fix, "held_out", lambda *a, **k: 0.)
    monkeypatch.setattr(focus_n_fix, "compare", lambda *a, **k: {})
    return seen, made


def test_the_calls_of_a_run(folder, tmp_path, calls):
    """I0 of the pictures and of the pool once; then T - K calls of the whole batch without gradient, and K per micro-batch with it."""
    seen, made = calls
    t = make_scheduler(load_model(str(folder / "sd"), CPU), "ddim", 4).timesteps.tolist()
    train(folder, tmp_path / "run", "--train_steps", 3, "--pool", 6)
    pictures, pool = [(x, 2, False) for x in t], [(x, 8, False) for x in t] + [(x, 4, False) for x in t]
    update = [(x, 8, False) for x in t[:2]] + [(x, 4, True) for x in t[2:]] * 2
    assert seen == pictures + pool + 3 * update and [len(p) for p in made] == [1, 4, 2]
    seen.clear()
    train(folder, tmp_path / "fresh", "--train_steps", 2, "--pool", 0, "--guidance_scale", 1, "--grad_steps", 4)
    assert Counter(seen) == {(x, n, False): k for x in t for n, k in ((1, 1), (4, 2))} | {(x, 2, True): 4 for x in t}


def test_cached_and_uncached_runs_give_the_same_numbers(folder, tmp_path):
    """A pool that is never used up is --pool 0, bit for bit; a smaller one comes again. Micro-batches change no noise."""
    cached, uncached, short, micro = (log_of(train(folder, tmp_path / f"{pool}_{n}", "--train_steps", 2, "--pool", pool, "--micro_batch", n))
                                      for pool, n in ((8, 2), (0, 2), (4, 2), (8, 3)))
    assert cached == uncached and same(weights_of(tmp_path / "8_2"), weights_of(tmp_path / "0_2"))
    assert short[0] == cached[0] and short[1]["area"] == short[0]["area"] != cached[1]["area"]
    for key in ("reward", "loss", "area"):                                # not grad_norm: at the start I - I0 is rounding, and a norm's gradient has unit length
        assert micro[0][key] == pytest.approx(cached[0][key], rel=1e-3)


def test_cached_and_uncached_saliency(folder, tmp_path):
    words = ["--model", folder / "sd", "--concept", "a red star", "a blue star", "--reward", "toy_clip", "--prompts", folder / "prompts.txt",
             "--test_prompts", folder / "one.txt", *SHORT, "--train_steps", 1]
    for pool in (4, 0):
        focus_n_fix.main(focus_n_fix.parse_args(list(map(str, [*words, "--pool", pool, "--out", tmp_path / f"{pool}"]))))
    assert log_of(tmp_path / "4") == log_of(tmp_path / "0") and 0 < log_of(tmp_path / "4")[0]["area"] < 1
    clip, _ = load_reward("toy_clip", CPU)                                # the mask in the picture: where "a red star" is seen
    base = generate(load_model(str(folder / "sd"), CPU), PROMPTS[:1], 0, SAMPLER, purpose="held-out")
    good_minus_bad = concept_reward(clip, "a red star", "a blue star")
    expected = problem_mask(grad_cam(last_norm(clip), lambda images: -good_minus_bad(images, None), base), .5, 1)
    shown = torch.tensor(pixels(tmp_path / "4" / "samples" / "region_000000.png"))[::8, 128:256:8, 0] > 0
    assert torch.equal(shown, expected[0, 0] > 0)


def test_resume_is_exact(folder, tmp_path):
    settings = ["--save_every", 2, "--pool", 6, "--lr", 1e-3]
    whole = train(folder, tmp_path / "whole", *settings, "--train_steps", 4, model="sd_v")
    half = train(folder, tmp_path / "half", *settings, "--train_steps", 2, model="sd_v")
    train(folder, half, *settings, "--train_steps", 4, "--resume", model="sd_v")
    assert log_of(whole) == log_of(half) and [row["step"] for row in log_of(half)] == [1, 2, 3, 4]
    assert same(weights_of(whole), weights_of(half)) and any(v.any() for k, v in weights_of(whole).items() if "lora_B" in k)
    for name in ("step_000004.png", "region_000004.png"):
        assert (whole / "samples" / name).read_bytes() == (half / "samples" / name).read_bytes()


def test_the_run_folder_and_the_reward_mapped(folder, tmp_path):
    out = train(folder, tmp_path / "run", "--train_steps", 1, "--reward", "toy_pref", "--beta", 3, model="sdxl")
    config, (row,) = json.loads((out / "config.json").read_text()), log_of(out)
    assert config["sampler"] == dict(SAMPLER) and config["reward"] == "toy_pref" and config["region"] == "heatmap" and config["threshold"] == .2
    assert row["loss"] == pytest.approx(-(row["reward"] - 3) / 13 + 3 * row["outside"], rel=1e-4)
    assert {"grad_norm", "grad_rms", "inside", "area", "empty", "test_reward", "test_outside", "test_inside"} <= row.keys()
    assert [int(t) for t in row["grad_by_t"]] == [251, 1] and all(v > 0 for v in row["grad_by_t"].values())
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["region_000000.png", "region_000001.png", "step_000000.png", "step_000001.png"]
    shown = pixels(out / "samples" / "region_000000.png")                         # 1 row of I0 | M | I | difference, 16 px enlarged by 8
    assert shown.shape == (128, 512, 3) and (shown[:, :128] == shown[:, 256:384]).all() and not shown[:, 384:].any()
    base = generate(load_model(str(folder / "sdxl"), CPU), PROMPTS[:1], 0, SAMPLER, purpose="held-out")
    expected = F.interpolate(load_detector(str(TOY / "detector"), CPU)(base)[:, None], (16, 16), mode="bilinear")
    assert torch.equal(torch.tensor(shown[::8, 128:256:8, 0] > 0), problem_mask(expected, .2, 1)[0, 0] > 0) and set(shown[:, 128:256].ravel()) <= {0, 255}


def test_without_test_prompts_the_last_100_are_held_out(folder, tmp_path, calls, capsys):
    _, made = calls
    lines = ["a red star", "a blue star", *[f"a green {s}" for s in ("circle", "square")] * 50]
    (tmp_path / "many.txt").write_text("\n".join(lines))
    (tmp_path / "few.txt").write_text("\n".join(lines[2:]))
    words = ["--model", folder / "sd", "--detector", TOY / "detector", *SHORT, "--train_steps", 2]
    focus_n_fix.main(focus_n_fix.parse_args(list(map(str, [*words, "--prompts", tmp_path / "many.txt", "--out", tmp_path / "run"]))))
    assert made[0] == lines[2:10] and set(sum(made[1:], [])) == {"a red star", "a blue star"}
    with pytest.raises(SystemExit):
        focus_n_fix.main(focus_n_fix.parse_args(list(map(str, [*words, "--prompts", tmp_path / "few.txt", "--out", tmp_path / "none"]))))
    assert "--test_prompts FILE is needed" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_saliency_of_an_open_clip_reward(folder, tmp_path):
    path = random_weights.write("clip_h", tmp_path, seed=1)
    argv = ["--model", folder / "sd", "--reward", f"clip_h:{path}", "--concept", "blood", "water", "--prompts", folder / "prompts.txt",
            "--test_prompts", folder / "one.txt", *SHORT, "--train_steps", 1, "--out", tmp_path / "run"]
    args = focus_n_fix.parse_args(list(map(str, argv)))
    assert (args.region, args.threshold) == ("saliency", .5)
    focus_n_fix.main(args)
    (row,) = log_of(tmp_path / "run")
    assert 0 < row["area"] < 1 and row["empty"] == 0 and row["grad_norm"] > 0


def test_the_models_own_defaults():
    args = focus_n_fix.parse_args(["--model", "sd14", "--prompts", "x", "--detector", "y"])
    assert (args.reward, args.region, args.grad_steps, args.lora_rank, args.num_inference_steps, args.out) == (
        "artifact", "heatmap", 2, 64, 50, "runs/focus_n_fix-sd14-artifact")
    args = focus_n_fix.parse_args(["--model", "sdxl", "--prompts", "x", "--concept", "a", "b"])
    assert (args.reward, args.region, args.detector, args.resolution, args.lora_rank) == ("clip", "saliency", None, 1024, 64)
    args = focus_n_fix.parse_args(["--concept", "a", "b"])
    assert (args.reward, args.model) == ("toy_clip", "toy")


def test_bad_values(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = ["--model", folder / "sd", "--prompts", folder / "prompts.txt"]
    table = [
        (["--lora_rank", 0], ["adapter off"]),
        (["--grad_steps", 0], ["1 <= grad_steps"]),
        (["--grad_steps", 11], ["num_inference_steps = 10"]),
        (["--beta", -1], ["--beta -1", "0 or more"]),
        (["--beta", "nan"], ["--beta nan"]),
        (["--dilate", -1], ["--dilate -1"]),
        (["--pool", -1], ["--pool -1"]),
        (["--threshold", 1], ["threshold in [0, 1)"]),
        (["--guidance_scale", .5], ["guidance 1 or more"]),
        (["--region", "heat"], ["heatmap", "saliency"]),
        (["--region", "saliency"], ["artifact is none", "clip_h"]),
        (["--reward", "imagereward", "--region", "saliency"], ["imagereward is none"]),
        (["--reward", "artifact", "--concept", "a", "b"], ["--concept needs a CLIP-like reward"]),
        (["--concept", "a red star"], ["--concept"]),
        ([*real, "--reward", "toy_clip", "--concept", "a red star", "a red star"], ["reads both texts alike"]),
        (["--concept", "a red star", "a blue star", "--detector", "x"], ["no part"]),
        (["--reward", "artefact"], ["no such reward"]),
        ([*real, "--detector", "nowhere"], ["nowhere"]),
        ([*real, "--detector", TOY / "clip"], ["--detector", "cannot load"]),
        (["--model", "sd14", "--detector", "x"], ["--prompts FILE"]),
        (real, ["--detector is needed", "--concept"]),
        ([*real, "--reward", "toy_pref"], ["--detector is needed"]),
        (["--model", "flux-dev", "--prompts", "x"], ["flux-dev"]),
        (["--grad_step", 1], ["--grad_steps"]),
        (["--resume", "--out", tmp_path / "new"], ["no checkpoint"]),
    ]
    problems = []
    for argv, words in table:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            focus_n_fix.main(focus_n_fix.parse_args(list(map(str, argv))))
        err = capsys.readouterr().err
        if stop.value.code != 2 or not err.startswith("error: ") or err.count("\n") != 1 or not all(w in err for w in words):
            problems.append((argv, err))
    assert not problems, "\n".join(map(str, problems))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "new").exists()


def test_the_toy_run_through_the_command_line(tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a red star\na green circle above a blue square\n")
    words = ["--train_steps", 1, "--batch_size", 2, "--pool", 2, "--num_inference_steps", 4, "--test_prompts", tmp_path / "two.txt"]
    run("focus_n_fix", *words, "--out", tmp_path / "run")
    text = capsys.readouterr().out
    assert "held-out artifact before: -" in text and "held-out artifact after:  -" in text and "2 pairs: the region is" in text
    assert Image.open(tmp_path / "run" / "samples" / "region_000001.png").size == (4 * 128, 2 * 128)
    run("focus_n_fix", *words, "--concept", "a red star", "a blue star", "--raw_norm", "--out", tmp_path / "concept")
    assert "held-out toy_clip before" in capsys.readouterr().out
    run("combined_sample", "--lora", tmp_path / "run", "--mode", "tuned", "--num_images", 1, "--out", tmp_path / "images")
    text = capsys.readouterr().out
    assert "scheduler            ddim" in text and "eta                  0.0" in text and "guidance_scale       4.0" in text
    assert pixels(tmp_path / "images" / "00000_00.png").shape == (64, 64, 3)
