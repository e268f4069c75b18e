"""evaluate.py: every metric against a slow or published computation of its own, its command line, its cache, and what it says to bad input."""
import hashlib
import json
import runpy
import shutil
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import random_weights
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForSemanticSegmentation, AutoTokenizer, CLIPImageProcessor, CLIPModel, SegformerConfig,
                          SegformerForSemanticSegmentation, ViTConfig, ViTModel)

import common
import evaluate
from common import ROOT, Run, load_model, save_weights, trainable
from toy.oracle import correct
from toy.scenes import render, sample_scene

matplotlib.use("Agg")
PROMPTS = ["a red star", "a green circle above a blue square", "a yellow triangle left of a purple star"]
CPU = torch.device("cpu")


def run(*words):
    """evaluate.py as its command line runs it, in this process: importing torch anew costs 15 seconds."""
    argv, sys.argv = sys.argv, ["evaluate.py", *map(str, words)]
    try:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    finally:
        sys.argv = argv


def results(path, *words):
    run(*words, "--out", path)
    return json.loads(path.read_text())


def fails(capsys, *words):
    """Exit status 2 and one line on stderr, no traceback -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(*words)
    err = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line and "image/s" not in line and "folder/s" not in line]
    assert e.value.code == 2 and len(err) == 1 and err[0].startswith("error: "), err
    return err[0]


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def pixels_of(folder):
    """file_name -> (3, H, W) in [0, 1]."""
    return {row["file_name"]: torch.tensor(np.asarray(Image.open(folder / row["file_name"]))).permute(2, 0, 1) / 255. for row in rows_of(folder)}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A random ViT in the published layout: the numbers below need no training."""
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=48, patch_size=16))
        for p in model.parameters():
            p.data += .2 * torch.randn_like(p)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(size=48, image_mean=[.4, .5, .6], image_std=[.2, .25, .3])))
    return folder


@pytest.fixture
def scenes(tmp_path_factory):
    """Two folders of rendered scenes, unequal group sizes, some under a wrong caption; the second folder with other images of the same seeds."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for name in ("a", "b"):
        rows = []
        (root / name).mkdir()
        for i, size in enumerate((3, 1, 4)):
            for k in range(size):
                image, _ = render(sample_scene(rng, PROMPTS[(i + (k == 2)) % 3]))
                rows.append(dict(file_name=f"{i}-{k}.png", text=PROMPTS[i], prompt_id=i, seed=k))
                Image.fromarray((image * 255).round().astype(np.uint8)).save(root / name / rows[-1]["file_name"])
        write_rows(root / name, rows)
    return root


def slow_features(vit, image):
    """The ViT's CLS token (D,) of one image, resized and normalised by hand."""
    x = F.interpolate(image[None], (48, 48), mode="bicubic", antialias=True)
    x = (x - torch.tensor([.4, .5, .6]).view(3, 1, 1)) / torch.tensor([.2, .25, .3]).view(3, 1, 1)
    with torch.no_grad():
        f = ViTModel.from_pretrained(vit, add_pooling_layer=False)(x).last_hidden_state[0, 0].double().numpy()
    return f / np.sqrt(f @ f)


# ------------------------------------------------------------------------------------------------------------------------ the toy's judges

def test_numbers_equal_a_slow_computation(scenes, vit, tmp_path):
    result = results(tmp_path / "r.json", scenes / "a", "--metrics", "toy_correct,toy_clip,toy_pref,dino_div", "--dino", vit)["folders"][str(scenes / "a")]
    groups, images = {}, pixels_of(scenes / "a")
    for row in rows_of(scenes / "a"):
        groups.setdefault(row["text"], []).append((images[row["file_name"]], slow_features(vit, images[row["file_name"]])))

    verdicts = [[correct(image, text) for image, _ in group] for text, group in groups.items()]
    assert result["toy_correct"]["mean"] == pytest.approx(np.mean([np.mean([v is True for v in vs]) for vs in verdicts]))
    assert result["toy_correct"]["abstained"] == pytest.approx(np.mean([np.mean([v is None for v in vs]) for vs in verdicts]))
    assert 0 < result["toy_correct"]["mean"] < 1

    diversity = []
    for group in groups.values():
        pairs = [1 - f @ g for i, (_, f) in enumerate(group) for j, (_, g) in enumerate(group) if i < j]
        diversity += [np.mean(pairs)] if pairs else []
    assert result["dino_div"]["mean"] == pytest.approx(np.mean(diversity), abs=1e-5) and result["dino_div"]["mean"] > 1e-3
    assert (result["dino_div"]["prompts"], result["dino_div"]["left_out"]) == (2, 1)

    for metric, name, scale in (("toy_clip", "clip", lambda m: 1.), ("toy_pref", "pref", lambda m: m.logit_scale.exp().item())):
        clip, tokenizer = CLIPModel.from_pretrained(ROOT / "toy" / name, dtype=torch.float32), AutoTokenizer.from_pretrained(ROOT / "toy" / name)
        mean, std = torch.tensor([.48145466, .4578275, .40821073]), torch.tensor([.26862954, .26130258, .27577711])
        means = []
        for text, group in groups.items():
            with torch.no_grad():
                t = clip.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0]
                x = [clip.get_image_features(((i - mean[:, None, None]) / std[:, None, None])[None]).pooler_output[0] for i, _ in group]
            means.append(np.mean([scale(clip) * torch.cosine_similarity(t, v, dim=0).item() for v in x]))
        assert result[metric]["mean"] == pytest.approx(np.mean(means), rel=1e-4)
        assert result[metric]["low"] <= result[metric]["mean"] <= result[metric]["high"]


def test_order_and_batches_do_not_matter_and_differences_are_paired(scenes, vit, tmp_path, capsys):
    words = [scenes / "a", scenes / "b", "--dino", vit, "--reference", scenes / "b",
             "--metrics", "toy_correct,toy_clip,dino_div,artifact_mean,artifact_max,cov_dist,log_cov_dist,drift"]
    one, shown = results(tmp_path / "r.json", *words), capsys.readouterr().out
    a, b = map(str, words[:2])
    assert "cov_dist, log_cov_dist of as many images as the features have dimensions, or fewer" in shown
    assert f"minus {a}" in shown and "1 of 3 prompts have one image" in shown and "abstained" in shown and f"drift from {a}" in shown
    for metric, d in one["differences"][b].items():
        x, y = (one["folders"][folder][metric] for folder in (a, b))
        assert d["mean"] == pytest.approx(y["mean"] - x["mean"], abs=1e-12)
        assert d["low"] is None if metric.endswith("cov_dist") else d["low"] <= d["mean"] <= d["high"]
    assert one["folders"][b]["cov_dist"]["mean"] == one["folders"][b]["log_cov_dist"]["mean"] == 0 < one["folders"][a]["cov_dist"]["mean"]

    rows = rows_of(scenes / "b")
    write_rows(scenes / "b", rows[::-1])
    assert results(tmp_path / "r.json", *words) == one                     # from the cache
    for size in (1, 3):
        for name in "ab":
            shutil.rmtree(scenes / name / ".evaluate")
        again = results(tmp_path / "r.json", *words, "--batch_size", size)
        for part in ("folders", "differences", "drift"):
            for folder, metrics in one[part].items():
                for metric, s in metrics.items():
                    assert again[part][folder][metric]["per_prompt"] == pytest.approx(s["per_prompt"], abs=1e-4)
                    assert again[part][folder][metric]["mean"] == pytest.approx(s["mean"], abs=1e-4)

    write_rows(scenes / "b", [dict(row, seed=row["seed"] + (row["prompt_id"] == 2)) for row in rows])
    changed = results(tmp_path / "r.json", *words[:6], "--metrics", "toy_correct,toy_clip")
    assert all(changed["folders"][f][m] == again["folders"][f][m] for f in (a, b) for m in ("toy_correct", "toy_clip")) and not changed["differences"]
    assert "2 of 3 and 3 prompts have the same text and seeds" in changed["not_paired"][b] and "no paired differences" in capsys.readouterr().out
    assert "does not pair with" in fails(capsys, *words)                   # drift is nothing but pairs


def test_identical_folders_differ_by_nothing(scenes, tmp_path):
    shutil.copytree(scenes / "a", scenes / "c")
    r = results(tmp_path / "r.json", scenes / "a", scenes / "c", "--reference", scenes / "c",
                "--metrics", "toy_pref,toy_correct,dino_div,artifact_mean,artifact_max,frechet_toy,cov_dist,log_cov_dist,drift")
    assert all(d["mean"] == 0 for d in r["differences"][str(scenes / "c")].values())
    own = r["folders"][str(scenes / "a")]
    assert own["frechet_toy"]["mean"] == pytest.approx(0, abs=1e-6) and own["cov_dist"]["mean"] == own["log_cov_dist"]["mean"] == 0
    drift = r["drift"][str(scenes / "c")]
    assert drift["psnr"]["mean"] == pytest.approx(100) and drift["dino"]["mean"] == pytest.approx(0, abs=1e-6)


def test_intervals_cover_the_mean_of_the_population():
    rng = np.random.default_rng(1)
    inside = [low <= 1. <= high for _, low, high in (evaluate.interval(rng.normal(1, 2, 40).tolist(), 400) for _ in range(200))]
    assert .88 <= np.mean(inside) <= .99                                   # nominally .95, a little less with 40 prompts
    assert evaluate.interval([3., 3.]) == (3., 3., 3.)
    assert (evaluate.summary({"0": 3.})["low"], evaluate.summary({})["mean"]) == (None, None)


def test_the_second_judge_is_no_training_reward():
    assert "toy_pref_b" in evaluate.METRICS and "toy_pref_b" not in common.REWARDS
    assert set(common.REWARDS) < set(evaluate.METRICS)                     # all rewards are metrics


def test_abstentions_count_as_not_correct_and_are_told():
    result = evaluate.summarise("toy_correct", torch.tensor([1., float("nan"), 0., 1.]), ["0", "0", "1", "1"])
    assert (result["mean"], result["abstained"], result["per_prompt"]) == (.5, .25, {"0": .5, "1": .5})


# ------------------------------------------------------------------------------------------------------------- distances of distributions

def test_frechet_distance_equals_scipys(rng=np.random.default_rng(0)):
    for n, m, d in ((60, 50, 12), (10, 9, 16)):                            # of full rank, and not
        a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(.3, 1, (m, d))
        s, t = np.cov(a.T), np.cov(b.T)
        want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
        assert evaluate.frechet(torch.tensor(a), torch.tensor(b)) == pytest.approx(want, rel=1e-4 if n < d else 1e-9)
        assert evaluate.frechet(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-5)


def test_covariance_distances_equal_numpys(rng=np.random.default_rng(0)):
    a, b = rng.normal(size=(40, 6)) * [1, 2, 3, 1, 1, 1], rng.normal(size=(30, 6))
    l, m = (np.sort(np.linalg.eigvals(np.cov((x / np.linalg.norm(x, axis=1, keepdims=True)).T)).real) for x in (a, b))
    got = evaluate.covariance_distances(torch.tensor(a), torch.tensor(b))
    assert got == (pytest.approx(np.mean(abs(l - m))), pytest.approx(np.mean(abs(np.log(l) - np.log(m)))))
    assert evaluate.covariance_distances(torch.tensor(a[:3]), torch.tensor(a[:3])) == (0, 0)       # without full rank


def test_dino_diversity_equals_a_double_loop(rng=np.random.default_rng(0)):
    features, ids = rng.normal(size=(9, 5)), ["x", "y", "x", "z", "y", "x", "w", "w", "x"]
    want = {}
    for p in set(ids) - {"z"}:
        group = [f / np.linalg.norm(f) for f, q in zip(features, ids) if q == p]
        want[p] = np.mean([1 - group[i] @ group[j] for i in range(len(group)) for j in range(i)])
    assert evaluate.dino_diversity(torch.tensor(features), ids) == pytest.approx(want)


def test_inception_is_pytorch_fids(scenes, tmp_path, monkeypatch, capsys):
    """Its architecture with random weights, written as the published file is: our features are its own, and nothing is unpickled or unknown."""
    inception = pytest.importorskip("pytorch_fid.inception")
    state = {}
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda url, progress: state)
    with torch.random.fork_rng(devices=[]), monkeypatch.context() as m:
        torch.manual_seed(0)
        m.setattr(torch.nn.Module, "load_state_dict", lambda self, given: state.update(self.state_dict()))
        theirs = inception.InceptionV3().eval()
    torch.save(state, tmp_path / "weights.pth")
    assert "its sha256 is another one" in fails(capsys, scenes / "a", "--metrics", f"fid:{tmp_path / 'weights.pth'}", "--reference", scenes / "b")
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest())
    ours = evaluate.Inception(tmp_path / "weights.pth", CPU)
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images)[0][:, :, 0, 0]) and ours(images).std() > 0
    assert inception.load_state_dict_from_url("", progress=True).keys() == state.keys()            # never the one that unpickles


# -------------------------------------------------------------------------------------------------------------------------------- MPS

def published_mps(state, clip, tokenizer, image, prompt):
    """Score of one image (1, 3, h, w), preprocessed, by the equations of the published code (trainer/models/cross_modeling.py of Kwai-VGI/MPS)."""
    def text_features(text):
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        tokens = clip.text_model(ids).last_hidden_state @ clip.text_projection.weight.T
        return tokens, tokens[0, (ids[0] == ids.max()).nonzero()[0]]

    def norm(x, weight):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * weight

    def silu_gate(x):
        a, gate = x[..., :x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
        return gate / (1 + torch.exp(-gate)) * a

    def rotary(x):                                                         # (n, 64)
        angle = torch.outer(torch.arange(len(x)).float(), 1 / 10000 ** (torch.arange(0, 64, 2).float() / 64)).repeat(1, 2)
        return x * angle.cos() + torch.cat([-x[:, 32:], x[:, :32]], 1) * angle.sin()

    text, end = text_features(prompt)
    condition, _ = text_features("light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
                                 "texture, quantity, attributes, position, number, location, word, things.")
    text, condition = text[0], condition[0]
    sim = (text @ condition.T).max(1).values
    masked = torch.where(sim / sim.max() > .01, 0., float("-inf"))
    assert 0 < (masked == 0).sum() < 77
    x = clip.vision_model(image).last_hidden_state[0] @ clip.visual_projection.weight.T
    d = x.shape[1]
    for layer in range(4):
        w = {k.split(".fn.")[1]: v for k, v in state.items() if k.startswith(f"mps.cross_model.layers.{layer}.0.")}
        h = norm(x, w["norm.weight"])
        q, (k, v) = h @ w["to_q.weight"].T, (text @ w["to_kv.weight"].T).chunk(2, 1)
        heads = [(q[:, i:i + 64] @ k.T / 8 + masked).softmax(1) @ v for i in range(0, d, 64)]
        x = torch.cat(heads, 1) @ w["to_out.weight"].T + silu_gate(h @ w["ff.0.weight"].T) @ w["ff.2.weight"].T + x
        w = {k.split(".fn.")[1]: v for k, v in state.items() if k.startswith(f"mps.cross_model.layers.{layer}.1.")}
        q, k, v, ff = (norm(x, w["norm.weight"]) @ w["fused_attn_ff_proj.weight"].T).split([d, 64, 64, 8 * d], 1)
        heads = [(rotary(q[:, i:i + 64]) @ rotary(k).T / 8).softmax(1) @ v for i in range(0, d, 64)]
        x = torch.cat(heads, 1) @ w["attn_out.weight"].T + silu_gate(ff) @ w["ff_out.1.weight"].T + x
    return (clip.logit_scale.exp() * F.cosine_similarity(end[0], x[0], dim=0)).item()


@pytest.fixture(scope="module")
def mps(tmp_path_factory):
    """Random weights in the published layout, words that the condition lacks being far from those it has: they may not be attended."""
    folder = random_weights.write("mps", tmp_path_factory.mktemp("mps"))
    tokenizer, state = AutoTokenizer.from_pretrained(folder), load_file(f"{folder}/model.safetensors")
    words = state["mps.model.text_model.embeddings.token_embedding.weight"]
    strange = sorted({i for p in PROMPTS for i in tokenizer(p).input_ids} - set(tokenizer(evaluate.MPS.CONDITION).input_ids))
    u = 2 * torch.randn(words.shape[1], generator=torch.Generator().manual_seed(0))
    words += u
    words[strange] -= 2 * u
    save_file(state, f"{folder}/model.safetensors")
    return folder


def test_mps_equals_its_published_equations(mps, scenes, tmp_path):
    state = load_file(f"{mps}/model.safetensors")
    clip = CLIPModel(random_weights.clip_h_config(False, len(AutoTokenizer.from_pretrained(mps)))).eval()
    clip.load_state_dict({k.removeprefix("mps.model."): v for k, v in state.items() if k.startswith("mps.model.")})
    tokenizer, processor = AutoTokenizer.from_pretrained(mps), CLIPImageProcessor.from_pretrained(mps)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    got = results(tmp_path / "r.json", scenes / "a", "--metrics", f"mps:{mps}", "--batch_size", 3)["folders"][str(scenes / "a")]["mps"]
    images = pixels_of(scenes / "a")
    want = {}
    with torch.no_grad():
        for row in rows_of(scenes / "a"):
            x = F.interpolate(images[row["file_name"]][None], (42, 42), mode="bicubic", antialias=True)
            want.setdefault(str(row["prompt_id"]), []).append(published_mps(state, clip, tokenizer, (x - mean) / std, row["text"]))
    assert got["per_prompt"] == pytest.approx({p: np.mean(x) for p, x in want.items()}, abs=2e-3)
    assert len({round(v, 1) for v in got["per_prompt"].values()}) == 3


def test_mps_knows_its_published_size():
    want = random_weights.clip_h_config(True, 49408)
    with torch.device("meta"):
        theirs = CLIPModel(want)
        got = evaluate.clip_config(theirs.state_dict())
        ours = CLIPModel(got)
    assert random_weights.shapes_of(ours) == random_weights.shapes_of(theirs)
    for tower in ("text_config", "vision_config"):
        for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
            assert getattr(getattr(got, tower), name) == getattr(getattr(want, tower), name)


def test_incomplete_mps_is_refused(mps, scenes, tmp_path, capsys):
    for lost, expected in (("mps.cross_model.layers.3.1.fn.attn_out.weight", "3.1.fn.attn_out.weight"),
                           ("mps.model.text_model.encoder.layers.0.mlp.fc1.bias", "text_model.encoder.layers.0.mlp.fc1.bias")):
        shutil.copytree(mps, tmp_path / lost)
        save_file({k: v for k, v in load_file(f"{mps}/model.safetensors").items() if k != lost}, tmp_path / lost / "model.safetensors")
        assert expected in fails(capsys, scenes / "a", "--metrics", f"mps:{tmp_path / lost}")


def test_imagereward_has_two_scales(scenes, tmp_path):
    path = random_weights.write("imagereward", tmp_path)
    own = results(tmp_path / "r.json", scenes / "a", "--metrics", f"imagereward:{path},imagereward_raw:{path}")["folders"][str(scenes / "a")]
    assert own["imagereward"]["mean"] == pytest.approx((own["imagereward_raw"]["mean"] - .16717362830052426) / 1.0333394966054072, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------- artifacts and drift

def test_artifacts_equal_the_detectors_own_confidence(scenes, tmp_path):
    own = results(tmp_path / "r.json", scenes / "a", "--metrics", "artifact_max,artifact_mean")["folders"][str(scenes / "a")]
    net = AutoModelForSemanticSegmentation.from_pretrained(ROOT / "toy" / "detector", dtype=torch.float32).eval()
    mean, std = torch.tensor([.485, .456, .406]).view(3, 1, 1), torch.tensor([.229, .224, .225]).view(3, 1, 1)
    images, values = pixels_of(scenes / "a"), {}
    with torch.no_grad():
        for row in rows_of(scenes / "a"):
            logits = net(((images[row["file_name"]] - mean) / std)[None]).logits
            c = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False).sigmoid()
            values.setdefault(str(row["prompt_id"]), []).append((c.mean().item(), c.max().item()))
    assert own["artifact_mean"]["per_prompt"] == pytest.approx({p: np.mean(v, 0)[0] for p, v in values.items()}, abs=1e-5)
    assert own["artifact_max"]["per_prompt"] == pytest.approx({p: np.mean(v, 0)[1] for p, v in values.items()}, abs=1e-5)
    assert 0 < own["artifact_mean"]["mean"] < own["artifact_max"]["mean"] < 1


def test_drift_is_psnr_and_features_outside_the_masks(scenes, vit, tmp_path, capsys):
    a, b, masks = scenes / "a", scenes / "b", tmp_path / "masks"
    masks.mkdir()
    before, after = pixels_of(a), pixels_of(b)
    inside = np.zeros((64, 64), bool)
    inside[10:50, 20:64] = True
    for name in before:
        Image.fromarray((inside * 255).astype(np.uint8)).save(masks / name)
    for words, outside in (([], np.ones((64, 64), bool)), (["--masks", masks], ~inside)):
        got = results(tmp_path / "r.json", a, b, "--metrics", "drift", "--dino", vit, *words)["drift"][str(b)]
        psnr, distance = {}, {}
        for row in rows_of(a):
            x, y = before[row["file_name"]].double().numpy(), after[row["file_name"]].double().numpy()
            psnr.setdefault(str(row["prompt_id"]), []).append(10 * np.log10(1 / np.mean((x - y)[:, outside] ** 2)))
            y = np.where(outside, y, x)
            f, g = (slow_features(vit, torch.tensor(z).float()) for z in (x, y))
            distance.setdefault(str(row["prompt_id"]), []).append(1 - f @ g)
        assert got["psnr"]["per_prompt"] == pytest.approx({p: np.mean(v) for p, v in psnr.items()}, abs=1e-4)
        assert got["dino"]["per_prompt"] == pytest.approx({p: np.mean(v) for p, v in distance.items()}, abs=1e-5)
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(masks / "0-1.png")
    assert "0-1.png has another size than its image, or leaves nothing" in fails(capsys, a, b, "--metrics", "drift", "--masks", masks)
    (masks / "0-1.png").unlink()
    assert "0-1.png: not a readable image" in fails(capsys, a, b, "--metrics", "drift", "--masks", masks)
    Image.open(b / "1-0.png").resize((32, 32)).save(b / "1-0.png")
    assert "differ in size, in the batch from 0-0.png" in fails(capsys, a, b, "--metrics", "drift", "--dino", vit)


# -------------------------------------------------------------------------------------------------------------------- cache and snapshots

def test_features_are_kept_until_something_changes(scenes, vit, tmp_path, capsys):
    """What is in the cache is believed: so a falsified cache shows when it is read, and when not."""
    words, cache = [scenes / "a", "--metrics", "dino_div", "--dino", vit], scenes / "a" / ".evaluate" / "dino.safetensors"

    def value():
        return results(tmp_path / "r.json", *words)["folders"][str(scenes / "a")]["dino_div"]["mean"]
    true = value()

    def falsify():
        with evaluate.safe_open(cache, "pt") as f:
            key, features = f.metadata()["key"], f.get_tensor("features")
        save_file({"features": features[:1].expand(len(features), -1).contiguous()}, cache, {"key": key})
    falsify()
    assert value() == pytest.approx(0, abs=1e-6) and true > .01            # it was read
    rows = rows_of(scenes / "a")
    write_rows(scenes / "a", rows[::-1])
    assert value() == pytest.approx(0, abs=1e-6)                           # in another order: the same images
    image = (scenes / "a" / "0-0.png").read_bytes()
    (scenes / "a" / "0-0.png").write_bytes(image)
    assert value() == true                                                 # a file was written again
    falsify()
    write_rows(scenes / "a", [dict(row, text=row["text"] + "!") for row in rows])
    assert value() == true                                                 # other prompts
    falsify()
    weights = vit / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert value() == true                                                 # other weights
    cache.write_bytes(b"not a cache")
    capsys.readouterr()
    assert value() == true and "not readable" in capsys.readouterr().out
    assert {p.name for p in cache.parent.iterdir()} == {"dino.safetensors"}
    shutil.rmtree(cache.parent)
    cache.parent.write_text("not a folder")                                # nowhere to write: said, and no reason to fail
    assert value() == true and "features are not kept" in capsys.readouterr().out


def test_curves_over_the_snapshots_of_a_run(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n")
    sampler = dict(scheduler="ddpm", eta=1., num_inference_steps=2, guidance_scale=1.)
    for name, rank in (("lora", 4), ("model", 0)):
        model = load_model("toy", CPU)
        folder = tmp_path / name
        Run(SimpleNamespace(out=str(folder), model="toy", lora_rank=rank, resolution=64, test_prompts=str(tmp_path / "prompts.txt"), train_steps=2,
                            resume=False), sampler, model)
        params = trainable(model, rank)
        for step in (1, 2):
            for p in params:
                p.data += (.2 if rank else .02) * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + step))
            save_weights(model, folder / name / f"step_{step:06d}", rank)
        words = ["--over_steps", folder, "--num_images", 2, "--metrics", "toy_pref,dino_div,drift", "--plot", tmp_path / "steps.png"]
        r = results(tmp_path / "r.json", *words)
        made = {p: p.stat().st_mtime_ns for p in (folder / "over_steps").rglob("*.png")}
        assert list(r["steps"].values()) == [0, 1, 2] and len(made) == 3 * 2 * 2 and len(r["differences"]) == len(r["drift"]) == 2
        assert len({r["folders"][f]["toy_pref"]["mean"] for f in r["steps"]}) == 3
        with Image.open(tmp_path / "steps.png") as plot:
            assert plot.size[0] > plot.size[1] > 100
        images = common.generate(model, PROMPTS[:2], 0, sampler, num_images=2)                     # the model as the last snapshot has it
        for i, image in enumerate(images):
            x = np.asarray(Image.open(folder / "over_steps" / "step_000002" / f"{i // 2:05d}_{i % 2:02d}.png"), np.int16)
            assert abs(np.asarray(common.to_pil(image), np.int16) - x).max() <= 1
        assert results(tmp_path / "r.json", *words) == r and made == {p: p.stat().st_mtime_ns for p in made}   # nothing is sampled twice
    results(tmp_path / "r.json", *words[:2], "--num_images", 1, *words[4:])
    assert len(list((folder / "over_steps").rglob("*.png"))) == 3 * 2
    assert "no run folder" in fails(capsys, "--over_steps", tmp_path, "--metrics", "toy_pref")
    shutil.rmtree(folder / "model")
    assert "no snapshots in it" in fails(capsys, "--over_steps", folder, "--metrics", "toy_pref")


def test_the_trade_off_is_drawn(scenes, tmp_path):
    run(scenes / "a", scenes / "b", "--metrics", "toy_pref,toy_correct,dino_div", "--plot", tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as plot:
        assert plot.size[0] > 1.5 * plot.size[1] > 300                     # two panels


# ------------------------------------------------------------------------------------------------------------------------------ bad input

def test_bad_input(scenes, vit, tmp_path, monkeypatch, capsys):
    def folder(name, rows, image=None):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, rows)
        if image is not None:
            (tmp_path / name / "x.png").write_bytes(image)
        return tmp_path / name
    png, row = (scenes / "a" / "0-0.png").read_bytes(), dict(file_name="x.png", text="a red star")
    (tmp_path / "no_weights").mkdir()
    broken, wide = tmp_path / "broken", tmp_path / "wide"
    for path in (broken, wide):
        path.mkdir()
        for name in ("config.json", "preprocessor_config.json"):
            (path / name).write_bytes((vit / name).read_bytes())
    weights = load_file(vit / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "cls_token" not in k}, broken / "model.safetensors", {"format": "pt"})
    save_file({k: v * float("nan") for k, v in weights.items()}, wide / "model.safetensors", {"format": "pt"})
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (pickled / name).write_bytes((vit / name).read_bytes())
    torch.save({**weights, "code": exec}, pickled / "pytorch_model.bin")
    two = tmp_path / "two"
    SegformerForSemanticSegmentation(SegformerConfig(num_labels=2, hidden_sizes=[4, 4, 4, 4], depths=[1] * 4, num_attention_heads=[1] * 4,
                                                     decoder_hidden_size=4)).save_pretrained(two)
    shutil.copy(ROOT / "toy" / "detector" / "preprocessor_config.json", two)
    Image.new("RGB", (80, 80)).save(tmp_path / "big.png")
    big = folder("big", [row], (tmp_path / "big.png").read_bytes())
    a, b = scenes / "a", scenes / "b"
    for words, expected in {
        (tmp_path, "--metrics", "toy_clip"): "no metadata.jsonl",
        (a, "--metrics", "toy_perf"): "did you mean toy_pref",
        (a, "--metrics", "hpsv2"): "did you mean hps",
        (a,): "--metrics",
        ("--metrics", "toy_clip"): "folders of images are needed",
        (a, "--over_steps", b, "--metrics", "toy_clip"): "in their place",
        (a, a, "--metrics", "toy_clip"): "named twice",
        (a, "--metrics", "toy_correct", "--out", tmp_path / "no" / "r.json"): "a folder that exists",
        (a, "--metrics", "toy_correct", "--plot", tmp_path / "p.png"): "--plot draws quality against diversity",
        (a, "--metrics", "drift"): "drift needs two folders",
        (a, b, "--metrics", "toy_clip", "--masks", tmp_path): "--masks are for",
        (a, "--metrics", "fid"): "measured against --reference",
        (a, "--metrics", "cov_dist", "--reference", big): "one image has no covariance, which cov_dist compare",
        (a, "--metrics", "cov_dist", "--reference", tmp_path): "no metadata.jsonl",
        (a, "--metrics", "frechet_toy", "--reference", b, "--dino", vit): "frechet_toy is of toy/dino",
        (a, "--metrics", "dino_div:x"): "takes no path",
        (a, "--metrics", "hps:x.pt"): "x.pt does not exist",
        (a, "--metrics", "mps:" + str(tmp_path / "no_weights")): "has no model.safetensors",
        (a, "--metrics", "mps:" + str(pickled / "pytorch_model.bin")): "mps: cannot load the weights",
        (a, "--metrics", "toy_pref:" + str(tmp_path / "no_weights")): "its weights are missing",
        (a, "--metrics", "toy_clip", "--batch_size", 0): "at least 1",
        (folder("gone", [row]), "--metrics", "toy_clip"): "x.png, named in its metadata.jsonl, does not exist",
        (folder("empty", []), "--metrics", "toy_clip"): "no images in it",
        (folder("json", ["{"]), "--metrics", "toy_clip"): "line 1: expected",
        (folder("list", ["[1]"]), "--metrics", "toy_clip"): "line 1: expected",
        (folder("texts", [dict(row, prompt_id=1), dict(row, prompt_id=1, text="a blue star")], png), "--metrics", "toy_clip"): "has two texts",
        (folder("twice", [row, row], png), "--metrics", "toy_clip"): "a file is named twice",
        (folder("cut", [row], png[:200]), "--metrics", "toy_correct"): "x.png: not a readable image",
        (folder("caption", [dict(row, text="a photo of a cat")], png), "--metrics", "toy_correct"): "not a caption of the toy world",
        (a, "--metrics", "dino_div", "--dino", tmp_path / "no_weights"): "has no preprocessor_config.json",
        (a, "--metrics", "dino_div", "--dino", broken): "cls_token is missing",
        (a, "--metrics", "dino_div", "--dino", wide): "are not finite",
        (a, "--metrics", "dino_div", "--dino", pickled): "no file named model.safetensors",
        (a, "--metrics", "artifact_max", "--detector", two): "one class, this network 2",
        (big, "--metrics", "artifact_max"): "--detector DIR is needed",
    }.items():
        assert expected in fails(capsys, *words), words

    def no_network(*_, **__):
        raise OSError("unreachable")
    monkeypatch.setattr(common, "hf_hub_download", no_network)             # as for a gated id
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path / "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    pytest.importorskip("pytorch_fid")
    assert "was not served (unreachable)" in fails(capsys, a, "--metrics", "fid", "--reference", b)
    assert "accept its terms at https://huggingface.co/some/vit" in fails(capsys, a, "--metrics", "dino_div", "--dino", "some/vit")
    assert "accept its terms at https://huggingface.co/RE-N-Y/mpsv1" in fails(capsys, a, "--metrics", "mps")
    assert not (tmp_path / "p.png").exists()


def test_one_image_a_prompt_has_no_diversity_and_says_so(tmp_path, vit, scenes, capsys):
    (tmp_path / "x.png").write_bytes((scenes / "a" / "0-0.png").read_bytes())
    write_rows(tmp_path, [dict(file_name="x.png", text="anything at all")])                        # no prompt_id, no seed
    result = results(tmp_path / "r.json", tmp_path, "--metrics", "dino_div,toy_clip", "--dino", vit)["folders"][str(tmp_path)]["dino_div"]
    assert (result["mean"], result["prompts"], result["left_out"]) == (None, 0, 1) and "1 of 1 prompts" in capsys.readouterr().out
