"""combined_sample.py: the weights of its modes, the mixed step, the files, and the defaults."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import CPU, PROMPTS, random_lora, run_script
from PIL import Image

import combined_sample
import refl
from combined_sample import mixed_prediction, parse_args, tuned_weight
from common import TOY, base_model, decode, denoise, generator, initial_latents, load_model
from common import make_scheduler, make_trainable, sample
from data.prompts import condition
from run_folder import Run, generate

SAMPLER = dict(scheduler="ddim", eta=0.5, num_inference_steps=4, guidance_scale=3.0)


def write_run(world, out, lora_rank):
    """A run folder with a random LoRA, or at rank 0 with shifted weights -> its model."""
    model = load_model(world.sd, CPU)
    random_lora(make_trainable(model, lora_rank), size=0.3 if lora_rank else 0.05)
    config = dict(model=world.sd, resolution=16, lora_rank=lora_rank, test_prompts=world.prompts)
    run = Run(SimpleNamespace(**config, out=out, resume=False), model.source, SAMPLER)
    model.save(run.weights)
    return model


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return SimpleNamespace(path=path, model=write_run(world, path, lora_rank=4))


def run_combined(path, out, *words):
    """Runs the script on a run -> what it wrote: bytes by file name."""
    words = ["--lora", path, "--num_images", 2, "--device", "cpu", *words]
    assert run_script(combined_sample, *words, "--out", out) == 0
    return read_folder(out)


def read_folder(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def read_images(folder):
    files = sorted(Path(folder).glob("0*.png"))
    return torch.stack([TF.pil_to_tensor(Image.open(file)).int() for file in files])


def test_the_weights_by_hand():
    by_hand = dict(base=[0] * 4, tuned=[1] * 4, combined=[0, 0, 0, 1], aig=[0, 0.25, 0.5, 0.75])
    for mode, weights in by_hand.items():
        assert [tuned_weight(mode, i, 4, base_steps=3) for i in range(4)] == weights
    # The power only bends AIG's weights: the base model leads for longer.
    assert [tuned_weight("aig", i, 4, 3, 2.0) for i in range(4)] == [0, 0.0625, 0.25, 0.5625]
    assert [tuned_weight("combined", i, 4, 3, 2.0) for i in range(4)] == by_hand["combined"]


@torch.no_grad()
def test_the_mixed_step_by_hand(run):
    model = run.model
    latents = torch.linspace(-1, 1, 256).view(1, *model.latent_shape)
    cond, uncond = condition(model, PROMPTS[:1]), condition(model, [None])
    t = torch.tensor(501)
    tuned = denoise(model, latents, t, cond, 2.0, uncond)
    with base_model(model):
        base = denoise(model, latents, t, cond, 5.0, uncond)
    calls = []
    hook = model.denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    for w, expected, num_calls in ((0, base, 1), (1, tuned, 1), (0.3, 0.7 * base + 0.3 * tuned, 2)):
        mixed = mixed_prediction(model, latents, t, cond, uncond, w, 2.0, 5.0)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5 * (w == 0.3))
        assert len(calls) == num_calls
        calls.clear()
    hook.remove()


@torch.no_grad()
def test_images_are_the_runs_own_and_base_steps_go_from_tuned_to_base(run):
    tuned = run_combined(run.path, "tuned")
    base = run_combined(run.path, "base", "--mode", "base")
    aig = run_combined(run.path, "aig", "--mode", "aig")
    squared = run_combined(run.path, "squared", "--mode", "aig", "--aig_power", 2)
    run_combined(run.path, "combined", "--mode", "combined", "--base_steps", 0, 2, 4)
    assert read_folder("combined/base_steps_0") == tuned
    assert read_folder("combined/base_steps_4") == base
    assert len({files["00001_01.png"] for files in (tuned, base, aig, squared)}) == 4
    expected = generate(run.model, PROMPTS, 0, SAMPLER, num_images=2, micro_batch=4)
    assert ((expected * 255).round() - read_images("tuned")).abs().max() <= 1
    # Two steps of the base model, then two of the tuned one.
    scheduler = make_scheduler(run.model, "ddim", 4)
    generators = [generator(0, "image", 0, 0)]
    latents = initial_latents(run.model, generators)
    options = [generators, 3.0, condition(run.model, [None]), 0.5]
    cond = condition(run.model, PROMPTS[:1])
    with base_model(run.model):
        latents = sample(run.model, scheduler, latents, cond, 0, 2, *options)
    latents = sample(run.model, scheduler, latents, cond, 2, 4, *options)
    expected = (decode(run.model, latents) * 255).round()
    assert (expected - read_images("combined/base_steps_2")[0]).abs().max() <= 1


def test_files_and_metadata(run):
    written = run_combined(run.path, "images", "--seed", 3)
    rows = [json.loads(line) for line in written["metadata.jsonl"].decode().splitlines()]
    names = [f"{i:05d}_{k:02d}.png" for i in range(4) for k in range(2)]
    assert [row["file_name"] for row in rows] == names
    assert rows[3] == dict(file_name="00001_01.png", text=PROMPTS[1], prompt_id=1, seed=3)
    assert set(written) == {*names, "grid.png", "metadata.jsonl"}
    assert len({written[name] for name in names}) == 8


def test_noise_depends_on_neither_batch_nor_mode(run, monkeypatch):
    seen = []

    def watch(model, generators):
        seen.append(initial_latents(model, generators))
        return seen[-1]

    monkeypatch.setattr(combined_sample, "initial_latents", watch)
    run_combined(run.path, "whole")
    run_combined(run.path, "parts", "--batch_size", 3, "--micro_batch", 1)
    run_combined(run.path, "aig", "--mode", "aig")
    run_combined(run.path, "seed", "--seed", 1)
    assert [len(noise) for noise in seen] == [8, 3, 3, 2, 8, 8]
    assert torch.equal(torch.cat(seen[1:4]), seen[0]) and torch.equal(seen[4], seen[0])
    assert not torch.equal(seen[5], seen[0])
    assert (read_images("whole") - read_images("parts")).abs().max() <= 1


def test_a_full_fine_tune_keeps_its_base(world, run):
    write_run(world, Path("full"), lora_rank=0)
    tuned = run_combined("full", "tuned")
    base = run_combined("full", "base", "--mode", "base")
    run_combined("full", "combined", "--mode", "combined", "--base_steps", 0, 4)
    assert tuned != base == run_combined(run.path, "lora_base", "--mode", "base")
    assert read_folder("combined/base_steps_0") == tuned
    assert read_folder("combined/base_steps_4") == base
    words = ["--lora", "full", "--model", world.sdxl, "--out", "other"]
    assert "incomplete weights, or not those of" in run_script(combined_sample, *words)


@pytest.mark.parametrize("family", ["sd35", "z_image"])
def test_a_tuned_flow_and_its_base(world, family):
    words = ["--model", getattr(world, family), "--reward", "toy_pref", "--device", "cpu"]
    words += ["--prompts", world.prompts, "--test_prompts", world.prompts, "--lora_rank", 4]
    words += ["--num_inference_steps", 4, "--first_mid", 2, "--last_mid", 3, "--batch_size", 2]
    assert run_script(refl, *words, "--lr", 0.01, "--train_steps", 1, "--out", "run") == 0
    tuned = run_combined("run", "tuned")
    base = run_combined("run", "base", "--mode", "base", "--base_guidance_scale", 3)
    words = ["--mode", "combined", "--base_guidance_scale", 3, "--base_steps", 0, 2, 4]
    run_combined("run", "combined", *words)
    assert read_folder("combined/base_steps_0") == tuned
    assert read_folder("combined/base_steps_2") not in (tuned, base)
    assert read_folder("combined/base_steps_4") == base


def test_defaults_come_from_the_run_or_the_model(world, run):
    def settings(*words):
        args = parse_args([str(word) for word in ("--out", "new", *words)])
        names = "scheduler eta num_inference_steps guidance_scale base_guidance_scale resolution"
        return [getattr(args, name) for name in names.split()], args.model, args.prompts

    snapshot = run.path / "lora" / "step_000001"
    assert settings("--lora", snapshot) == (["ddim", 0.5, 4, 3.0, 3.0, 16], world.sd, world.prompts)
    others = settings("--lora", run.path, "--model", "toy", "--scheduler", "ddpm")
    assert others[0] == ["ddpm", 1.0, 4, 3.0, 3.0, None]
    expected = (["ddpm", 1.0, 20, 1.0, 4.0, None], "toy", f"{TOY}/prompts_test.txt")
    assert settings("--mode", "base") == settings("--lora", "x.safetensors") == expected


def test_held_out_prompts_that_a_run_has_chosen(world):
    """D-Fusion and DiffDoctor keep them in the run folder, even if none were given."""
    Path("run").mkdir()
    config = dict(model=world.sd, resolution=16, test_prompts=None, sampler=SAMPLER)
    Path("run/config.json").write_text(json.dumps(config))
    Path("run/test_prompts.txt").write_text("a red circle\n")
    args = parse_args(["--lora", "run", "--out", "new"])
    assert args.prompts == "run/test_prompts.txt"


def test_refusals(world, run, capsys):
    lora = ["--lora", run.path]
    for words, message in (
        (["--mode", "tuned"], "--mode tuned needs --lora"),
        ([*lora, "--mode", "combined"], "needs --base_steps"),
        ([*lora, "--mode", "combined", "--base_steps", 5], "there are only 4 steps"),
        ([*lora, "--mode", "aig", "--base_steps", 2], "--base_steps is for --mode combined"),
        ([*lora, "--mode", "tuned", "--aig_power", 2], "--aig_power is for --mode aig"),
        ([*lora, "--out", world.images], "not an empty folder"),
        (["--mode", "base", "--lora", "nowhere"], "nowhere: there is no such file or folder"),
        ([*lora, "--model", world.flux], "LoRA"),
        (["--mode", "base", "--num_images", 0], "--num_images 0: it must be 1 or more"),
        # diffusers' usual value for FLUX.1-schnell; here it would ignore the prompts.
        ([*lora, "--guidance_scale", 0], "--guidance_scale 0: it must be 1 or more"),
    ):
        status = run_script(combined_sample, "--out", "new", *words)
        assert status != 0 and message in f"{status} {capsys.readouterr().err}", words
    assert not Path("new").exists()
