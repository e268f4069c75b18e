"""toy/flux, after five steps of training instead of thousands: the folder opens with stock diffusers, is sampled as by its own pipeline, and
refl.py, diffdoctor.py and combined_sample.py run on it."""
import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
import tiny
from test_sampling_scripts import run

import common
from common import condition, decode, generator, initial_latents, load_model, make_scheduler, sample
from toy import flux_model, make, training

PROMPTS = ["a red circle", "a blue square left of a yellow circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What make.make_flux builds, on a few random latents; as --model toy-flux."""
    root = tmp_path_factory.mktemp("toy")
    latents = torch.randn(12, 4, 16, 16, generator=generator(0, "latents"))
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(training, "WORK", root / "work")
        patch.setattr(flux_model, "TEACHER_STEPS", (1, 1, 1, 1))
        patch.setattr(flux_model, "STUDENT_STEPS", 1)
        patch.setitem(common.MODELS, "toy-flux", str(root / "flux"))
        pipe = flux_model.make_flux(make.load_vae(), latents, PROMPTS * 6)
        for p in [*pipe.transformer.parameters(), *pipe.text_encoder_2.parameters()]:
            p.data += .05 * torch.randn_like(p)                           # no weight is zero: the blocks begin as the identity
        make.save_pipeline(pipe, root / "flux")
        yield root / "flux"


def test_opens_with_stock_diffusers_in_one_dtype_and_is_small(folder):
    pipe = FluxPipeline.from_pretrained(folder)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for m in parts for p in m.parameters()} == {torch.float32}
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor, pipe.transformer.config.guidance_embeds) == (1, 0, False)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 6e6
    assert not [p for p in folder.rglob("*.json") if "_name_or_path" in p.read_text()]
    vae, clip = make.load_vae().state_dict(), flux_model.CLIPTextModel.from_pretrained(training.ROOT / "clip", dtype=torch.float32).state_dict()
    for ours, theirs in ((pipe.vae, vae), (pipe.text_encoder, clip)):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_a_killed_build_goes_on(folder):
    """Every part of the training has left its checkpoint."""
    assert {p.stem for p in (folder.parent / "work").iterdir()} == {"flux", "flux_shapes", "flux_more", "flux_again", "flux_student"}


def test_sample_equals_flux_pipeline(folder):
    """Five steps with the pipeline's own encoding, packing, sigmas and decoding."""
    model, generators = load_model("toy-flux", torch.device("cpu")), [generator(0, "x", i) for i in range(2)]
    noise, scheduler = initial_latents(model, generators), make_scheduler(model, "euler", 5)
    assert noise.shape == (2, 4, 16, 16) and scheduler.sigmas.tolist() == pytest.approx([1, .8, .6, .4, .2, 0])
    with torch.no_grad():
        latents = sample(model, scheduler, noise, condition(model, PROMPTS), 0, 5, generators)
        ours = decode(model, latents).permute(0, 2, 3, 1).numpy()
    theirs = model.pipe(PROMPTS, height=64, width=64, num_inference_steps=5, guidance_scale=0., max_sequence_length=12, output_type="np",
                        latents=FluxPipeline._pack_latents(noise, 2, 4, 16, 16)).images
    assert ours.shape == (2, 64, 64, 3) and np.abs(ours - theirs).max() < 1e-4 and (latents - noise).abs().max() > .1


def test_the_student_learns_what_the_teacher_does_in_four_guided_steps():
    """The teacher's velocity is x - 2 for a caption and x for none: guidance 3 makes it x - 6, whose small steps are known by hand."""
    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(()))

    captions = type("Captions", (), dict(row=np.array([1, 1, 1])))
    seen = []

    def velocity(transformer, t5, captions, x, sigma, rows):
        v = transformer.a * x - 2 * (rows > 0).float()[:, None, None]
        seen.append((x, sigma, rows, v))
        return v

    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_model, "velocity", velocity)
        patch.setattr(flux_model, "fit", lambda name, modules, step_fn, steps, **k: losses.append(step_fn(0, training.rng_of("x"))[0]))
        flux_model.train_student(Field(), torch.nn.Identity(), captions, batch=2)
    own, (x, sigma, _, v) = seen[:5], seen[-1]
    assert sigma.tolist() == pytest.approx([s for s in (1, .8, .6, .4, .2) for _ in range(2)])
    for i in range(4):                                                    # the student's own way, without guidance
        torch.testing.assert_close(own[i + 1][0], own[i][0] - .2 * (own[i][0] - 2))
    torch.testing.assert_close(x, torch.cat([state[0] for state in own]))
    end = 6 + (x - 6) * .95 ** 4                                          # dx = -.05 (x - 6), four times
    torch.testing.assert_close(losses[0], (v - (x - end) * 5).square().mean())
    inner = [s for _, s, rows, _ in seen[5:-1] for s in s[:1].tolist()]
    assert inner == pytest.approx([1, .95, .9, .85]) and all(len(s) == 20 for _, s, _, _ in seen[5:-1])


def test_refl_on_dev_trains_and_samples_with_guidance_1(tmp_path, monkeypatch):
    """Guidance is an input of the network there."""
    seen, flux = [], common._flux
    monkeypatch.setattr(common, "_flux", lambda *args: (seen.append(args[4]), flux(*args))[1])
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    run("refl", "--model", tiny.write_flux(tmp_path / "dev", dev=True), "--reward", "toy_pref", "--prompts", tmp_path / "one.txt", "--test_prompts",
        tmp_path / "one.txt", "--batch_size", 1, "--train_steps", 1, "--num_inference_steps", 3, "--first_mid", 2, "--last_mid", 2, "--out", tmp_path / "run")
    assert len(seen) == 3 + 3 + 3 and set(seen) == {1.}                   # held-out before, two steps and the one with gradient, held-out after
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["grad_norm"] > 0


def test_training_and_combined_generation_run_on_it(folder, tmp_path, capsys):
    short = ["--model", "toy-flux", "--batch_size", 2, "--train_steps", 2, "--lora_rank", 4, "--save_every", 2]
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    run("refl", *short, "--test_prompts", tmp_path / "one.txt", "--out", tmp_path / "refl")
    rows = [json.loads(line) for line in (tmp_path / "refl" / "log.jsonl").read_text().splitlines()]
    assert all(row["mid"] in (3, 4) and row["grad_norm"] > 0 for row in rows) and "test_reward" in rows[-1]
    run("diffdoctor", "treat", *short, "--test_prompts", tmp_path / "one.txt", "--out", tmp_path / "treat")
    rows = [json.loads(line) for line in (tmp_path / "treat" / "log.jsonl").read_text().splitlines()]
    assert all(row["offline"] > 0 and row["grad_norm"] > 0 for row in rows)
    for name in ("refl", "treat"):
        sampler = json.loads((tmp_path / name / "config.json").read_text())["sampler"]
        assert sampler == dict(scheduler="euler", eta=0., num_inference_steps=5, guidance_scale=1.)
    capsys.readouterr()
    run("combined_sample", "--lora", tmp_path / "refl", "--mode", "combined", "--base_steps", 3, "--num_images", 2, "--out", tmp_path / "images")
    assert "scheduler            euler" in capsys.readouterr().out and len(list((tmp_path / "images").glob("0*.png"))) == 2
