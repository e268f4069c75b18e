"""combined_sample.py and evaluate.py through their command lines, on the toy model; the metrics against slow computations of their own."""
import contextlib
import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, ViTConfig, ViTModel

import common
import evaluate
from common import ROOT, Run, base_model, find_lora, load_model, save_weights, trainable
from toy.oracle import correct
from toy.scenes import render, sample_scene

PROMPTS = ["a red star", "a green circle above a blue square", "a yellow triangle left of a purple star"]
SAMPLER = dict(scheduler="ddpm", eta=1., num_inference_steps=3, guidance_scale=1.)
CPU = torch.device("cpu")


def run(script, *words):
    """The script as its command line runs it, in this process: importing torch anew costs 15 seconds."""
    argv, sys.argv = sys.argv, [f"{script}.py", *map(str, words)]
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv = argv


def fails(capsys, script, *words):
    """Exit status 2 and one line on stderr, no traceback -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(script, *words)
    err = [line for line in capsys.readouterr().err.split("\n") if line and not line.startswith("\r")]
    assert e.value.code == 2 and len(err) == 1 and err[0].startswith("error: "), err
    return err[0]


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder with a LoRA that does something, a full fine-tune's, prompts, and images of them by the command line."""
    root = tmp_path_factory.mktemp("sampling")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for name, rank in (("run", 4), ("full", 0)):
        model = load_model("toy", CPU)
        run_folder = Run(SimpleNamespace(out=str(root / name), model="toy", lora_rank=rank, resolution=64, test_prompts=str(root / "prompts.txt"),
                                         train_steps=1, resume=False), SAMPLER, model)
        for p in trainable(model, rank):
            p.data += (.2 if rank else .02) * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        save_weights(model, run_folder.weights, rank)
    for name, words in dict(tuned=["--lora", root / "run"], base=["--lora", root / "run", "--mode", "base", "--base_guidance_scale", 1],
                            full=["--lora", root / "full"]).items():
        run("combined_sample", *words, "--num_images", 2, "--out", root / "images" / name)
    return root


# ------------------------------------------------------------------------------------------------------------------- combined_sample.py

def test_files_and_metadata(made):
    for name in ("tuned", "base", "full"):
        folder = made / "images" / name
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert rows == [dict(file_name=f"{i:05d}_{k:02d}.png", text=p, prompt_id=i, seed=0) for i, p in enumerate(PROMPTS) for k in range(2)]
        assert {p.name for p in folder.iterdir()} == {row["file_name"] for row in rows} | {"metadata.jsonl", "grid.png"}
        assert all(Image.open(folder / row["file_name"]).size == (64, 64) for row in rows)
        assert Image.open(folder / "grid.png").size == (2 * 2 * 64, 2 * 3 * 64)                    # enlarged twice
    tuned, base, full = (pixels(made / "images" / name / "00000_00.png") for name in ("tuned", "base", "full"))
    assert min(abs(a - b).max() for a, b in ((tuned, base), (full, base), (full, tuned))) > 8      # the weights were used


def test_tuned_images_are_the_runs_own(made):
    """The sampler of config.json, the convention of the noise, and the LoRA: as `generate` makes them in the run itself."""
    model = load_model("toy", CPU)
    trainable(model, 4, init_lora=made / "run")
    for name, weights in (("tuned", contextlib.nullcontext()), ("base", base_model(model))):
        with weights:
            images = common.generate(model, PROMPTS, 0, SAMPLER, num_images=2, batch=6)
        for j, image in enumerate(images):
            assert abs(np.asarray(common.to_pil(image), np.int16) - pixels(made / "images" / name / f"{j // 2:05d}_{j % 2:02d}.png")).max() <= 1


def test_same_seed_same_bytes_batches_do_not_matter_and_flags_override(made, tmp_path, capsys):
    words = ["--lora", find_lora(made / "run").parent, "--num_images", 2]                          # the LoRA's folder inside the run does as well
    run("combined_sample", *words, "--out", tmp_path / "again")
    assert files(tmp_path / "again") == files(made / "images" / "tuned")
    run("combined_sample", *words, "--batch_size", 4, "--out", tmp_path / "batches")
    for path in (tmp_path / "batches").glob("0*.png"):
        assert abs(pixels(path) - pixels(tmp_path / "again" / path.name)).max() <= 1
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    capsys.readouterr()
    words += ["--prompts", tmp_path / "one.txt", "--scheduler", "ddim", "--num_inference_steps", 2]
    run("combined_sample", *words, "--out", tmp_path / "ddim")
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert (shown["scheduler"], shown["num_inference_steps"], shown["eta"]) == ("ddim   (the run: ddpm)", "2   (the run: 3)", "0.0   (the run: 1.0)")
    run("combined_sample", *words, "--seed", 1, "--out", tmp_path / "seed")
    assert shown["guidance_scale"] == "1.0" and json.loads((tmp_path / "seed" / "metadata.jsonl").read_text().split("\n")[0])["seed"] == 1
    assert len({(tmp_path / name / "00000_00.png").read_bytes() for name in ("again", "ddim", "seed")}) == 3


def test_bad_input_of_combined_sample(made, tmp_path, capsys):
    prompts, lora = made / "prompts.txt", load_file(find_lora(made / "run"))
    (tmp_path / "empty.txt").write_text("\n\n")
    for name in ("wide", "odd"):
        (tmp_path / name).mkdir()
    save_file({k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in lora.items()}, tmp_path / "wide" / "pytorch_lora_weights.safetensors")
    (tmp_path / "odd" / "pytorch_lora_weights.safetensors").write_bytes(b"not a LoRA")
    for words, expected in {
        ("--mode", "tuned"): "--mode tuned needs --lora",
        ("--mode", "bse"): "invalid choice: 'bse'",
        ("--lora", tmp_path): "no LoRA here",
        ("--lora", tmp_path / "wide"): "belongs to another model or rank",
        ("--lora", tmp_path / "odd"): "not a readable safetensors file",
        ("--lora", made / "run", "--model", "toi"): "did you mean toy?",
        ("--lora", made / "run", "--model", tmp_path): "has no model_index.json",
        ("--lora", made / "run", "--prompts", tmp_path / "empty.txt"): "no prompt in it",
        ("--lora", made / "run", "--prompts", tmp_path / "absent.txt"): "absent.txt",
        ("--lora", made / "run", "--num_images", 0): "--num_images 0: at least 1",
        ("--lora", made / "run", "--eta", .5): "--eta 0.5 is for --scheduler ddim",
        ("--lora", made / "run", "--guidance_scale", "nan"): "guidance 0 or more",
        ("--lora", made / "run", "--resolution", 65): "--resolution 65",
        ("--lora", made / "run", "--guidance_scal", 2): "did you mean --guidance_scale",
        ("--lora", made / "run", "--device", "gpu"): "--device gpu",
    }.items():
        assert expected in fails(capsys, "combined_sample", *(() if "--prompts" in words else ("--prompts", prompts)), *words, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert "is not an empty folder" in fails(capsys, "combined_sample", "--lora", made / "run", "--out", made / "images" / "base")
    assert "is not an empty folder" in fails(capsys, "combined_sample", "--lora", made / "run", "--out", prompts)
    assert "--out" in fails(capsys, "combined_sample", "--lora", made / "run")


# ------------------------------------------------------------------------------------------------------------------------- evaluate.py

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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Two folders of rendered scenes, unequal group sizes, some under a wrong caption; the second folder with other images of the same seeds."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for name in ("a", "b"):
        rows = []
        (root / name).mkdir()
        for i, size in enumerate((3, 1, 4)):
            for k in range(size):
                scene = sample_scene(rng, PROMPTS[(i + (k == 2)) % 3])
                rows.append(dict(file_name=f"{i}-{k}.png", text=PROMPTS[i], prompt_id=i, seed=k))
                image, _ = render(scene)
                Image.fromarray((image * 255).round().astype(np.uint8)).save(root / name / rows[-1]["file_name"])
        (root / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def slow_features(vit, image):
    pixels = F.interpolate(image[None], (48, 48), mode="bicubic", antialias=True, align_corners=False)[0]
    pixels = torch.stack([(pixels[c] - m) / s for c, m, s in zip(range(3), (.4, .5, .6), (.2, .25, .3))])
    with torch.no_grad():
        return ViTModel.from_pretrained(vit, dtype=torch.float32)(pixels[None]).last_hidden_state[0, 0].double().numpy()


def test_numbers_equal_a_slow_computation(scenes, vit, tmp_path):
    run("evaluate", scenes / "a", "--metrics", "toy_correct,toy_clip,toy_pref,dino_div", "--dino", vit, "--out", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())["folders"][str(scenes / "a")]
    groups = {}
    for row in rows_of(scenes / "a"):
        image = torch.tensor(np.asarray(Image.open(scenes / "a" / row["file_name"]))).permute(2, 0, 1) / 255.
        groups.setdefault(row["text"], []).append((image, slow_features(vit, image)))

    verdicts = [[correct(image, text) for image, _ in group] for text, group in groups.items()]
    assert result["toy_correct"]["mean"] == pytest.approx(np.mean([np.mean([v is True for v in vs]) for vs in verdicts]))
    assert result["toy_correct"]["abstained"] == pytest.approx(np.mean([np.mean([v is None for v in vs]) for vs in verdicts]))
    assert 0 < result["toy_correct"]["mean"] < 1

    diversity = []
    for group in groups.values():
        pairs = [1 - f @ g / np.sqrt(f @ f) / np.sqrt(g @ g) for i, (_, f) in enumerate(group) for j, (_, g) in enumerate(group) if i < j]
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
    words = ["--metrics", "toy_correct,toy_clip,dino_div", "--dino", vit, "--out", tmp_path / "r.json"]
    run("evaluate", scenes / "a", scenes / "b", *words)
    one = json.loads((tmp_path / "r.json").read_text())
    shown = capsys.readouterr().out
    assert f"minus {scenes / 'a'}" in shown and "1 of 3 prompts have one image" in shown and "abstained" in shown
    for metric, d in one["differences"][str(scenes / "b")].items():
        a, b = (one["folders"][str(scenes / name)][metric] for name in "ab")
        assert d["mean"] == pytest.approx(b["mean"] - a["mean"], abs=1e-12) and d["low"] <= d["mean"] <= d["high"]

    rows = rows_of(scenes / "b")
    (scenes / "b" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    run("evaluate", scenes / "a", scenes / "b", *words)
    assert json.loads((tmp_path / "r.json").read_text()) == one

    metric, sizes = evaluate.load_metric("dino_div", CPU, str(vit)), (1, 3, 32)
    sorted_rows = evaluate.read_folder(scenes / "a")
    split = [torch.cat([evaluate.scores(metric, x, [r["text"] for r in part]) for x, part in evaluate.batches(scenes / "a", sorted_rows, n)]) for n in sizes]
    assert [len(list(evaluate.batches(scenes / "a", sorted_rows, n))) for n in sizes] == [8, 3, 1]
    assert all(torch.allclose(split[0], x, atol=1e-4) for x in split)

    (scenes / "b" / "metadata.jsonl").write_text("".join(json.dumps(dict(row, seed=row["seed"] + (row["prompt_id"] == 2))) + "\n" for row in rows))
    run("evaluate", scenes / "a", scenes / "b", *words)
    changed = json.loads((tmp_path / "r.json").read_text())
    assert changed["folders"] == one["folders"] and not changed["differences"]
    assert "2 of 3 and 3 prompts have the same text and seeds" in changed["not_paired"][str(scenes / "b")] and "no paired differences" in capsys.readouterr().out


def test_intervals_cover_the_mean_of_the_population():
    rng = np.random.default_rng(1)
    inside = [low <= 1. <= high for _, low, high in (evaluate.interval(rng.normal(1, 2, 40).tolist(), 400) for _ in range(200))]
    assert .88 <= np.mean(inside) <= .99                                   # nominally .95, a little less with 40 prompts
    assert evaluate.interval([3., 3.]) == (3., 3., 3.)


def test_bad_input_of_evaluate(scenes, vit, tmp_path, monkeypatch, capsys):
    def folder(name, rows, image=None):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        if image is not None:
            (tmp_path / name / "x.png").write_bytes(image)
        return tmp_path / name
    png, row = (scenes / "a" / "0-0.png").read_bytes(), dict(file_name="x.png", text="a red star")
    (tmp_path / "no_weights").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (broken / name).write_bytes((vit / name).read_bytes())
    save_file({k: v for k, v in load_file(vit / "model.safetensors").items() if "cls_token" not in k}, broken / "model.safetensors", {"format": "pt"})
    for words, expected in {
        (tmp_path, "--metrics", "toy_clip"): "no metadata.jsonl",
        (scenes / "a", "--metrics", "toy_perf"): "did you mean toy_pref",
        (scenes / "a",): "--metrics",
        (scenes / "a", scenes / "a", "--metrics", "toy_clip"): "named twice",
        (scenes / "a", "--metrics", "toy_correct", "--out", tmp_path / "no" / "r.json"): "a folder that exists",
        (folder("gone", [row]), "--metrics", "toy_clip"): "x.png, named in its metadata.jsonl, does not exist",
        (folder("empty", []), "--metrics", "toy_clip"): "no images in it",
        (folder("json", ["{"]), "--metrics", "toy_clip"): "line 1: expected",
        (folder("list", ["[1]"]), "--metrics", "toy_clip"): "line 1: expected",
        (folder("texts", [dict(row, prompt_id=1), dict(row, prompt_id=1, text="a blue star")], png), "--metrics", "toy_clip"): "has two texts",
        (folder("twice", [row, row], png), "--metrics", "toy_clip"): "a file is named twice",
        (folder("cut", [row], png[:200]), "--metrics", "toy_correct"): "x.png: not a readable image",
        (folder("caption", [dict(row, text="a photo of a cat")], png), "--metrics", "toy_correct"): "not a caption of the toy world",
        (scenes / "a", "--metrics", "dino_div", "--dino", tmp_path / "no_weights"): "has no preprocessor_config.json",
        (scenes / "a", "--metrics", "dino_div", "--dino", broken): "cls_token is missing",
    }.items():
        assert expected in fails(capsys, "evaluate", *words)
    monkeypatch.setattr(evaluate, "TOY", tmp_path)
    with pytest.raises(SystemExit):
        evaluate.load_metric("toy_pref_b", CPU)
    assert "its weights are missing" in capsys.readouterr().err


def test_one_image_a_prompt_has_no_diversity_and_says_so(tmp_path, vit, scenes, capsys):
    (tmp_path / "x.png").write_bytes((scenes / "a" / "0-0.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text(json.dumps(dict(file_name="x.png", text="anything at all")) + "\n")   # no prompt_id, no seed
    run("evaluate", tmp_path, "--metrics", "dino_div,toy_clip", "--dino", vit, "--out", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())["folders"][str(tmp_path)]["dino_div"]
    assert (result["mean"], result["prompts"], result["left_out"]) == (None, 0, 1) and "1 of 1 prompts" in capsys.readouterr().out


def test_the_second_judge_is_no_training_reward():
    assert "toy_pref_b" in evaluate.METRICS and "toy_pref_b" not in common.REWARDS


def test_broken_weights_are_no_number():
    with pytest.raises(FloatingPointError, match="dino_div: scores are not finite"):
        evaluate.summarise("dino_div", torch.full((2, 4), float("nan")), ["0", "0"])


def test_abstentions_count_as_not_correct_and_are_told():
    result = evaluate.summarise("toy_correct", torch.tensor([1., float("nan"), 0., 1.]), ["0", "0", "1", "1"])
    assert (result["mean"], result["abstained"], result["per_prompt"]) == (.5, .25, {"0": .5, "1": .5})
