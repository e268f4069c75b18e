"""combined_sample.py through its command line, on the toy model."""
import contextlib
import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
from common import ROOT, Run, base_model, find_lora, load_model, save_weights, trainable

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
