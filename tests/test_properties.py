"""What must hold for every shape, split and seed (hypothesis draws them), and evaluate.py against a slow reference written from its docstring."""
import itertools
import json
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
from common import (condition, generate, generator, initial_latents, load_model, load_reward, make_scheduler, resize_and_normalise, sample,
                    trainable)
from diffdoctor import pixel_loss
from focus_n_fix import change
from refl import linear_loss, refl_step

CPU = torch.device("cpu")
few = settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
PROMPTS = ["a red circle", "a blue square above a green circle", "a yellow triangle"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_model(tiny.write(tmp_path_factory.mktemp("tiny") / "sd"), CPU)
    for p in trainable(model, 4, seed=1):
        p.data += .1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.fixture(scope="module")
def reward():
    return load_reward("toy_pref", CPU)[0]


@few
@given(seed=st.integers(0, 2 ** 63), steps=st.integers(2, 5), batches=st.tuples(st.integers(1, 7), st.integers(1, 7)), guidance=st.sampled_from([1., 3.]))
def test_images_do_not_depend_on_the_batch(model, seed, steps, batches, guidance):
    sampler = dict(scheduler="ddpm", eta=1., num_inference_steps=steps, guidance_scale=guidance)
    a, b = (generate(model, PROMPTS, seed, sampler, 2, batch=n) for n in batches)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert torch.equal(a, generate(model, PROMPTS, seed, sampler, 2, batch=batches[0]))


@few
@given(seed=st.integers(0, 2 ** 63), steps=st.integers(2, 6), data=st.data())
def test_sampling_may_be_cut_anywhere(model, seed, steps, data):
    scheduler, cut = make_scheduler(model, "ddpm", steps), data.draw(st.integers(0, steps))
    cond, ends = condition(model, PROMPTS), []
    for cuts in ([0, steps], [0, cut, steps]):
        generators = [generator(seed, "cut", i) for i in range(len(PROMPTS))]
        latents = initial_latents(model, generators)
        for first, last in itertools.pairwise(cuts):
            latents = sample(model, scheduler, latents, cond, first, last, generators)
        ends.append(latents)
    assert torch.equal(*ends)


@few
@given(seed=st.integers(0, 2 ** 31), n=st.integers(2, 5), micro=st.integers(1, 5), mid=st.integers(0, 3))
def test_the_gradient_does_not_depend_on_the_split(model, reward, seed, n, micro, mid):
    scheduler, params = make_scheduler(model, "ddpm", 4), [p for p in model.denoiser.parameters() if p.requires_grad]
    latents, prompts = initial_latents(model, [generator(seed, "split", i) for i in range(n)]), (PROMPTS * 2)[:n]
    grads = []
    for size in (n, micro):
        for i in range(0, n, size):
            part = prompts[i:i + size]
            r = refl_step(model, scheduler, latents[i:i + size], scheduler.timesteps[mid], condition(model, part), reward, part)
            (linear_loss(r, 3., 13., 1.) * len(part) / n).backward()
        grads.append(torch.cat([p.grad.flatten() for p in params]))
        model.denoiser.zero_grad(set_to_none=True)
    assert (grads[0] - grads[1]).norm() <= 1e-3 * grads[0].norm()


@few
@given(b=st.integers(1, 3), h=st.integers(16, 90), w=st.integers(16, 90), size=st.sampled_from([16, 32, 48]), pad=st.booleans())
def test_any_image_reaches_a_reward_at_its_size(b, h, w, size, pad):
    images = torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(h * w))
    out = resize_and_normalise(images, size, (.5, .5, .5), (.25, .25, .25), pad)
    assert out.shape == (b, 3, size, size) and out.isfinite().all()
    alone = torch.cat([resize_and_normalise(image[None], size, (.5, .5, .5), (.25, .25, .25), pad) for image in images])
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-5)
    grey = resize_and_normalise(torch.full((1, 3, h, w), .5), size, (.5, .5, .5), (.25, .25, .25))
    assert grey.abs().max() < 1e-4                                        # a flat image stays flat


@few
@given(b=st.integers(1, 4), h=st.integers(2, 9), w=st.integers(2, 9), seed=st.integers(0, 2 ** 31))
def test_losses_of_pixels_are_means_over_images(b, h, w, seed):
    g = torch.Generator().manual_seed(seed)
    maps, images, base = torch.rand(b, h, w, generator=g), torch.rand(b, 3, h, w, generator=g), torch.rand(b, 3, h, w, generator=g)
    for kind in ("mean", "max", "threshold"):
        each = torch.stack([pixel_loss(m[None], kind) for m in maps])
        assert pixel_loss(maps, kind).item() == pytest.approx(each.mean().item(), rel=1e-4)
    where = (maps > .5).float()[:, None]
    each = [math.sqrt(sum((images[i, c, y, x] - base[i, c, y, x]).item() ** 2 for c in range(3) for y in range(h) for x in range(w) if where[i, 0, y, x])
                      / max(1, 3 * where[i].sum().item())) for i in range(b)]
    assert change(images, base, where).tolist() == pytest.approx(each, rel=1e-3, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------------------------------
# evaluate.py


def slow_reference(rows, scores, features):
    """{metric: mean over prompts} by loops, from the docstring's words; rows in the order of scores and features."""
    prompts = sorted({row["prompt_id"] for row in rows})
    of = {p: [i for i, row in enumerate(rows) if row["prompt_id"] == p] for p in prompts}
    quality = [sum(scores[i] for i in of[p]) / len(of[p]) for p in prompts]
    diversity = []
    for p in prompts:
        pairs = [1 - float(features[i] @ features[j]) / float(np.linalg.norm(features[i]) * np.linalg.norm(features[j]))
                 for i, j in itertools.combinations(of[p], 2)]
        diversity += [sum(pairs) / len(pairs)] if pairs else []
    return dict(toy_pref=sum(quality) / len(quality), dino_div=sum(diversity) / len(diversity) if diversity else None)


def one_folder(folder, seed, counts, size):
    """A folder of noise: counts[p] images of prompt p; metadata in a shuffled order."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for p, count in enumerate(counts):
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{p}_{k}.png")
            rows.append(dict(file_name=f"{p}_{k}.png", text=PROMPTS[p], prompt_id=p, seed=k))
    rng.shuffle(rows)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@settings(few, max_examples=4)
@given(seed=st.integers(0, 2 ** 31), counts=st.lists(st.integers(1, 4), min_size=1, max_size=3), size=st.sampled_from([40, 64]), batch=st.integers(1, 9))
def test_evaluate_equals_a_slow_reference(tmp_path_factory, reward, seed, counts, size, batch):
    root = tmp_path_factory.mktemp("evaluate")
    tables = {name: one_folder(root / name, seed + i, counts, size) for i, name in enumerate("ab")}
    argv = [str(root / "a"), str(root / "b"), "--metrics", "toy_pref,dino_div", "--dino", "toy", "--batch_size", str(batch), "--device", "cpu"]
    evaluate.main(evaluate.parse_args([*argv, "--out", str(root / "results.json")]))
    results, dino = json.loads((root / "results.json").read_text()), evaluate.Dino(str(evaluate.TOY / "dino"), CPU)
    expected = {}
    for name, rows in tables.items():
        images = [torch.tensor(np.array(Image.open(root / name / row["file_name"]))).permute(2, 0, 1)[None] / 255 for row in rows]
        with torch.no_grad():
            scores = [reward(image, [row["text"]]).item() for image, row in zip(images, rows)]
            features = [dino(image)[0].double().numpy() for image in images]
        expected[name] = slow_reference(rows, scores, features)
        for metric, value in expected[name].items():
            got = results["folders"][str(root / name)][metric]["mean"]
            assert (got is None) == (value is None) and (value is None or got == pytest.approx(value, abs=1e-4))
    for metric in ("toy_pref", "dino_div"):
        got = results["differences"][str(root / "b")][metric]["mean"]
        want = None if expected["a"][metric] is None else expected["b"][metric] - expected["a"][metric]
        assert (got is None) == (want is None) and (want is None or got == pytest.approx(want, abs=1e-4))


@few
@given(seed=st.integers(0, 2 ** 31), n=st.integers(3, 12), d=st.integers(2, 4))
def test_frechet_equals_its_definition(seed, n, d):
    """|mean difference|^2 + tr(A + B - 2 (A B)^.5), the root by its eigenvalues."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)), rng.normal(1, 2, size=(n + 1, d))
    s, t = (np.cov(x, rowvar=False).reshape(d, d) for x in (a, b))
    root = np.sqrt(np.maximum(np.linalg.eigvals(s @ t).real, 0)).sum()
    slow = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root
    assert evaluate.frechet(torch.tensor(a), torch.tensor(b)) == pytest.approx(slow, rel=1e-4, abs=1e-4)
    assert evaluate.frechet(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)
