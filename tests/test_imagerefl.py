"""imagerefl.py: what a step is made of, its rule and its data; and combined_sample.py's modes, which its models are meant for."""
import inspect
import json
from collections import Counter
from pathlib import Path

import pytest
import test_coco
import test_refl
import tiny
import torch
from PIL import Image
from test_sampling_scripts import files, pixels, run
from safetensors.torch import load_file

import combined_sample
import common
import imagerefl
import refl
from common import TOY, base_model, condition, denoise, diffusion_target, encode, initial_latents, generator, load_model, make_scheduler, predict_x0, trainable

CPU = torch.device("cpu")
SHORT = ["--num_inference_steps", "6", "--start", "3", "--first_mid", "3", "--last_mid", "5", "--batch_size", "4", "--micro_batch", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, and eight images with captions."""
    root = tmp_path_factory.mktemp("imagerefl")
    (root / "data").mkdir()
    rows = (TOY / "images" / "metadata.jsonl").read_text().splitlines()[:8]
    for row in rows:
        name = json.loads(row)["file_name"]
        (root / "data" / name).write_bytes((TOY / "images" / name).read_bytes())
    (root / "data" / "metadata.jsonl").write_text("\n".join(rows))
    (root / "one.txt").write_text("a red star\n")
    tiny.write(root / "sd"), tiny.write(root / "sd_v", prediction_type="v_prediction", seed=1)
    return root


def train(folder, out, *extra, model="sd"):
    argv = ["--model", str(folder / model), "--reward", "toy_pref", "--data", str(folder / "data"), "--test_prompts", str(folder / "one.txt"), *SHORT]
    imagerefl.main(imagerefl.parse_args([*argv, "--out", str(out), *map(str, extra)]))
    return Path(out)


# ------------------------------------------------------------------------------------------------------------------------------------
# the method

def test_the_shared_step_and_loss_are_refls_to_the_byte():
    for name in ("refl_step", "linear_loss"):
        assert inspect.getsource(getattr(imagerefl, name)) == inspect.getsource(getattr(refl, name))


def test_the_fourth_update_is_refls():
    args = imagerefl.parse_args(["--refl_every", "4"])
    assert [step for step in range(1, 13) if imagerefl.classic(args, step)] == [4, 8, 12]
    args.refl_every = 0
    assert not any(imagerefl.classic(args, step) for step in range(1, 13))


@pytest.mark.parametrize("family", ["sd", "sd_v"])
def test_the_diffusion_loss_is_zero_for_the_truth_and_the_target_is_the_models_own(folder, family):
    model = load_model(str(folder / family), CPU)
    scheduler = make_scheduler(model, "ddpm", 40)
    t = scheduler.timesteps[30]
    assert t == 226                                                                # t' of the paper: step 30 of 40
    images = torch.rand(3, 3, 16, 16, generator=generator(0, "images"))
    x0, noise = encode(model, images), initial_latents(model, [generator(0, "noise", i) for i in range(3)])
    noised = scheduler.add_noise(x0, noise, t)
    a = model.pipe.scheduler.alphas_cumprod[226]
    torch.testing.assert_close(noised, a.sqrt() * x0 + (1 - a).sqrt() * noise)
    target = diffusion_target(scheduler, x0, noise, t)
    torch.testing.assert_close(predict_x0(scheduler, target, t, noised), x0, rtol=1e-4, atol=1e-4)
    assert imagerefl.diffusion_loss(target, target) == 0 and imagerefl.diffusion_loss(target + 2, target) == 4
    assert torch.equal(target, noise) == (family == "sd")


@pytest.fixture
def calls(monkeypatch):
    """Every denoiser call of training: (timestep, images, with gradient), in order."""
    seen, load = [], imagerefl.load_model

    def load_watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.denoiser.register_forward_pre_hook(lambda m, a, k: seen.append((int(a[1]), len(a[0]), torch.is_grad_enabled())), with_kwargs=True)
        return model

    monkeypatch.setattr(imagerefl, "load_model", load_watched)
    monkeypatch.setattr(imagerefl, "held_out", lambda *a, **k: 0.)
    return seen


def test_the_calls_of_an_update(folder, tmp_path, calls):
    """From images: no call when mid == start, else steps start .. mid-1 on the whole batch without gradient; then per micro-batch one call at
    t_mid and one at t' with gradient. Classic: steps 0 .. mid-1, and one call per micro-batch."""
    t = make_scheduler(load_model(str(folder / "sd"), CPU), "ddpm", 6).timesteps.tolist()
    out = train(folder, tmp_path / "run", "--train_steps", 6, "--refl_every", 3)
    rows, expected = test_refl.log_of(out), []
    for row in rows:
        first, gradient = (0, [t[row["mid"]]]) if row["step"] % 3 == 0 else (3, [t[row["mid"]], t[3]])
        expected += [(t[i], 4, False) for i in range(first, row["mid"])] + [(x, 2, True) for x in gradient] * 2
        assert ("mse" in row) == (row["step"] % 3 != 0)
    assert calls == expected
    assert {3, 4, 5} >= {row["mid"] for row in rows} and len({row["mid"] for row in rows}) > 1

    calls.clear()
    train(folder, tmp_path / "ablation", "--train_steps", 2, "--refl_every", 0, "--diffusion_weight", 0, "--last_mid", 3)
    assert Counter(calls) == {(t[3], 2, True): 2 * 2}                              # nothing but the step with gradient


def test_resume_is_exact(folder, tmp_path):
    whole = train(folder, tmp_path / "whole", "--train_steps", 6, "--save_every", 3, model="sd_v")
    train(folder, tmp_path / "half", "--train_steps", 3, "--save_every", 3, model="sd_v")
    half = train(folder, tmp_path / "half", "--train_steps", 6, "--save_every", 3, "--resume", model="sd_v")
    assert test_refl.log_of(whole) == test_refl.log_of(half)
    assert test_refl.same(test_refl.weights_of(whole), test_refl.weights_of(half))
    weights = load_file(whole / "lora" / "pytorch_lora_weights.safetensors")
    assert any(v.abs().max() > 0 for k, v in weights.items() if "lora_B" in k)


def test_the_full_denoiser_trains_and_combines_with_its_base(folder, tmp_path, capsys):
    out = train(folder, tmp_path / "run", "--train_steps", 2, "--lora_rank", 0, "--lr", .01)
    words = ["--lora", out, "--num_images", 2, "--num_inference_steps", 4]
    for name, mode in dict(tuned=["tuned"], zero=["combined", "--base_steps", 0], base=["base"], four=["combined", "--base_steps", 4]).items():
        run("combined_sample", *words, "--mode", *mode, "--out", tmp_path / name)
    assert "GiB each" in capsys.readouterr().out
    assert files(tmp_path / "tuned") == files(tmp_path / "zero") != files(tmp_path / "base") == files(tmp_path / "four")


def test_bad_values(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            imagerefl.main(imagerefl.parse_args(list(map(str, argv))))
        lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.strip() and not line.startswith("imagerefl: ")]
        assert e.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    assert "start <= first_mid" in refused("--start", 13)
    assert "0 or more" in refused("--refl_every", -1) and "0 or more" in refused("--diffusion_weight", -.1)
    assert "No such file" in refused("--data", tmp_path / "nothing")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "metadata.jsonl").write_text('{"file_name": "../a.png", "text": "a red star"}\n')
    assert "outside the folder" in refused("--data", tmp_path / "outside")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "broken" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red star"}\n')
    monkeypatch.setattr(imagerefl, "held_out", lambda *a, **k: 0.)
    assert "a.png: not a readable image" in refused("--model", folder / "sd", "--reward", "toy_pref", "--data", tmp_path / "broken",
                                                    "--test_prompts", folder / "one.txt", *SHORT, "--out", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------------------------------
# combined generation and AIG

def test_weights_by_hand():
    table = {mode: [combined_sample.weight(mode, i, 4, 3) for i in range(4)] for mode in ("base", "tuned", "combined", "aig")}
    assert table == dict(base=[0, 0, 0, 0], tuned=[1, 1, 1, 1], combined=[0, 0, 0, 1], aig=[0, .25, .5, .75])


@pytest.fixture(scope="module")
def lora(folder):
    model = load_model(str(folder / "sd"), CPU)
    for p in trainable(model, 4):
        p.data += .3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    common.save_weights(model, folder / "lora", 4)
    return model


def test_no_base_steps_is_tuned_and_all_are_base_bit_for_bit(folder, lora, tmp_path):
    words = ["--model", folder / "sd", "--lora", folder / "lora", "--prompts", folder / "one.txt", "--num_images", 3, "--num_inference_steps", 4]
    run("combined_sample", *words, "--mode", "combined", "--base_steps", 0, 2, 4, "--out", tmp_path / "combined")
    for mode in ("base", "tuned", "aig"):
        run("combined_sample", *words, "--mode", mode, "--out", tmp_path / mode)
    zero, two, four, base, tuned, aig = (files(tmp_path / f) for f in ("combined/base_steps_0", "combined/base_steps_2", "combined/base_steps_4",
                                                                      "base", "tuned", "aig"))
    assert zero == tuned and four == base and len({x["00000_01.png"] for x in (tuned, two, base, aig)}) == 4


def test_the_mixed_prediction_and_its_calls(folder, lora):
    latents = initial_latents(lora, [generator(0, "x", i) for i in range(2)])
    cond, uncond, t = condition(lora, ["a red star"] * 2), condition(lora, [None] * 2), torch.tensor(501)
    calls = []
    hook = lora.denoiser.register_forward_pre_hook(lambda m, a, k: calls.append(len(a[0])), with_kwargs=True)
    with torch.no_grad():
        tuned = denoise(lora, latents, t, cond)
        with base_model(lora):
            base = denoise(lora, latents, t, cond, 5., uncond)
        calls.clear()
        for w, expected, passes in ((0., base, [4]), (1., tuned, [2]), (.3, .7 * base + .3 * tuned, [4, 2])):
            torch.testing.assert_close(combined_sample.mixed_prediction(lora, latents, t, cond, uncond, w, 1., 5.), expected, rtol=1e-3, atol=1e-4)
            assert calls == passes                                                 # guidance doubles the base's part alone
            calls.clear()
    hook.remove()


def test_bad_modes(folder, lora, tmp_path, capsys):
    words = ["--model", folder / "sd", "--lora", folder / "lora", "--prompts", folder / "one.txt", "--num_inference_steps", 4, "--out", tmp_path / "out"]
    for extra, expected in {("--mode", "combined"): "which needs it", ("--mode", "aig", "--base_steps", 2): "belongs to --mode combined",
                            ("--mode", "combined", "--base_steps", 5): "from 0 to num_inference_steps = 4",
                            ("--mode", "combined", "--base_steps", 2, 2): "different numbers",
                            ("--mode", "tuned", "--base_guidance_scale", 2): "no part in --mode tuned",
                            ("--mode", "base", "--guidance_scale", 2): "no part in --mode base"}.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            run("combined_sample", *words, *extra)
        assert e.value.code == 2 and expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_toy_run_through_the_command_line(tmp_path, capsys):
    run("imagerefl", "--train_steps", 2, "--batch_size", 2, "--num_inference_steps", 4, "--start", 2, "--first_mid", 2, "--last_mid", 3, "--out", tmp_path)
    text = capsys.readouterr().out
    assert "held-out toy_pref before" in text and "held-out toy_pref after" in text
    assert Image.open(tmp_path / "samples" / "step_000002.png").size[0] > 0
    run("combined_sample", "--lora", tmp_path, "--mode", "combined", "--base_steps", 2, "--num_images", 1, "--out", tmp_path / "images")
    assert "base_guidance_scale  4.0" in capsys.readouterr().out
    assert pixels(tmp_path / "images" / "00000_00.png").shape == (64, 64, 3)


def test_without_data_it_trains_on_coco(folder, tmp_path, monkeypatch, capsys):
    """`python imagerefl.py --model sdxl --reward hps` just runs: captions once, images on first use, held-out captions of the other split."""
    files = {test_coco.ZIP: test_coco.archive()}
    files |= {f"/{split}2017/{i:012d}.jpg": test_coco.jpeg(i, w, h) for split, sizes in test_coco.SIZES.items() for i, w, h in sizes}
    with test_coco.serving(files) as server:
        monkeypatch.setenv("COCO_BASE", server.base)
        monkeypatch.setenv("COCO_CACHE", str(tmp_path / "coco"))
        words = ["--model", folder / "sd", "--reward", "toy_pref", *SHORT, "--refl_every", 2, "--train_steps", 2]
        run("imagerefl", *words, "--out", tmp_path / "run")
        fetched = Counter(path for path, _ in server.log)
        assert fetched.pop(test_coco.ZIP) == 1 and set(fetched.values()) == {1}        # the archive once, each image once
        assert 1 <= len(fetched) <= 4 and all(path.startswith("/train2017/") for path in fetched)
        server.files.clear()                                                           # what is cached needs no network
        run("imagerefl", *words, "--out", tmp_path / "again")
    assert test_refl.log_of(tmp_path / "run") == test_refl.log_of(tmp_path / "again")
    assert str(tmp_path / "coco") in capsys.readouterr().out
