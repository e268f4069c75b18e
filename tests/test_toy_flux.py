"""toy/flux, after six steps of training instead of thousands: the folder opens with stock diffusers, is sampled as by its own pipeline, and
refl.py, diffdoctor.py and combined_sample.py run on it."""
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
import tiny
from test_sampling_scripts import run

import common
from common import condition, decode, generator, initial_latents, load_model, make_scheduler, sample
from toy import flux_model, make, oracle, training

PROMPTS = ["a red circle", "a blue square left of a yellow circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What make.make_flux builds, on a few random latents; as --model toy-flux."""
    root = tmp_path_factory.mktemp("toy")
    latents = torch.randn(12, 4, 16, 16, generator=generator(0, "latents"))
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        for module in (training, flux_model):
            patch.setattr(module, "WORK", root / "work")
        for name, value in dict(SCENES_STEPS=(1, 1, 1, 1), TEACHER_PARTS=2, TEACHER_STEPS=1, FEW_STEPS=1).items():
            patch.setattr(flux_model, name, value)
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
    assert {p.stem for p in (folder.parent / "work").iterdir()} == {"flux", "flux_shapes", "flux_more", "flux_again", "flux_answers_0", "flux_answers_1",
                                                                    "flux_teacher", "flux_few_steps"}


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


class Field(torch.nn.Module):
    """A denoiser of one weight: v = a x - 2 for a caption, a x for none."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, rows):
        return self.a * x - 2 * (rows > 0).float()[:, None, None]


def losses_of(train, *args, **kwargs):
    """What train's first step returns, and what it asked of the Field."""
    seen, losses = [], []

    def velocity(transformer, t5, captions, x, sigma, rows):
        seen.append((x, sigma, rows, transformer(x, rows)))
        return seen[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_model, "velocity", velocity)
        patch.setattr(flux_model, "fit", lambda name, modules, step_fn, steps, **k: losses.append(step_fn(0, training.rng_of("x"))[0]))
        train(Field(), torch.nn.Identity(), *args, **kwargs)
    return losses[0], seen


def test_few_steps_are_the_teachers_two_each():
    """The teacher's velocity is x - 6, whose small steps are known by hand."""
    asked = []

    def teacher(x, sigma, rows):
        asked.append(sigma)
        return x - 6

    captions = type("Captions", (), dict(row=np.array([1, 1, 1])))
    loss, seen = losses_of(flux_model.train_few_steps, captions, teacher, batch=2)
    own, (x, sigma, _, v) = seen[:5], seen[-1]
    assert sigma.tolist() == pytest.approx([s for s in (1, .8, .6, .4, .2) for _ in range(2)]) and len(seen) == 6
    for i in range(4):                                                    # its own way
        torch.testing.assert_close(own[i + 1][0], own[i][0] - .2 * (own[i][0] - 2))
    torch.testing.assert_close(x, torch.cat([state[0] for state in own]))
    end = 6 + (x - 6) * .9 ** 2                                           # dx = -.1 (x - 6), twice
    torch.testing.assert_close(loss, (v - (x - end) * 5).square().mean())
    assert [s[0].item() for s in asked] == pytest.approx([1, .9]) and all(len(s) == 10 for s in asked)


def test_the_teacher_is_toy_sd_as_a_flow():
    """At a timestep of toy/sd: the velocity of the U-Net's own x0 and noise, guided; and a few Euler steps end where DDIM ends."""
    tokenizer, sd = make.judges.make_tokenizer(), load_model("toy", torch.device("cpu"))
    clip = flux_model.CLIPTextModel.from_pretrained(training.ROOT / "clip", dtype=torch.float32).eval()
    teacher = flux_model.Teacher(flux_model.Captions(PROMPTS, tokenizer, clip))
    alpha = make.make_scheduler().alphas_cumprod[600]
    sigma = (1 - alpha).sqrt() / ((1 - alpha).sqrt() + alpha.sqrt())
    z = initial_latents(sd, [generator(0, "z", i) for i in range(2)])
    x = z * ((1 - sigma) ** 2 + sigma ** 2).sqrt()
    ids = tokenizer(["", "", *PROMPTS], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        v = sd.pipe.unet(torch.cat([z, z]), 600, sd.pipe.text_encoder(ids).last_hidden_state).sample
    v = v[:2] + flux_model.GUIDANCE * (v[2:] - v[:2])
    noise, x0 = (1 - alpha).sqrt() * z + alpha.sqrt() * v, alpha.sqrt() * z - (1 - alpha).sqrt() * v
    ours = teacher(FluxPipeline._pack_latents(x, 2, 4, 16, 16), sigma.expand(2), torch.tensor([1, 2]))
    theirs = FluxPipeline._pack_latents(noise - x0, 2, 4, 16, 16)
    assert (ours - theirs).abs().mean() < .02 * theirs.std() and theirs.std() > .5       # bfloat16

    x, steps = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)), 20
    for i in range(steps):
        x = x - teacher(x, torch.full((2,), 1 - i / steps), torch.tensor([1, 2])) / steps
    images = decode(sd, FluxPipeline._unpack_latents(x, 16, 16, 1))
    assert all(oracle.recognised(image, prompt) for image, prompt in zip(images, PROMPTS))


def test_it_learns_the_teachers_answers():
    """Of the states of every scene, at sigmas spread over (0, 1]; asked once and read from the cache after that."""
    latents, captions = torch.randn(8, 64, 16, generator=torch.Generator().manual_seed(0)), type("Captions", (), dict(row=np.arange(8)))
    calls = []

    def teacher(x, sigma, rows):
        calls.append(rows)
        return x + rows[:, None, None]

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(flux_model, "WORK", Path(folder))
        patch.setattr(flux_model, "TEACHER_PARTS", 2)
        loss, seen = losses_of(flux_model.train_on_teacher, captions, teacher, latents, batch=4)
        x, sigma, rows, v = flux_model.answers(teacher, captions, latents, 1)
    assert len(calls) == 2 and rows.tolist() == list(range(8)) and ((8 * (1 - sigma)).long().sort().values == torch.arange(8)).all()
    torch.testing.assert_close(v.float(), x.float() + rows[:, None, None], atol=1e-2, rtol=0)
    (x, sigma, rows, v), = seen
    torch.testing.assert_close(loss, (v - (x + rows[:, None, None])).square().mean(), atol=1e-3, rtol=1e-3)


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
    run("diffdoctor", "treat", *short, "--gamma", .25, "--test_prompts", tmp_path / "one.txt", "--out", tmp_path / "treat")
    rows = [json.loads(line) for line in (tmp_path / "treat" / "log.jsonl").read_text().splitlines()]
    assert all(row["offline"] > 0 and row["grad_norm"] > 0 for row in rows)
    for name in ("refl", "treat"):
        sampler = json.loads((tmp_path / name / "config.json").read_text())["sampler"]
        assert sampler == dict(scheduler="euler", eta=0., num_inference_steps=5, guidance_scale=1.)
    capsys.readouterr()
    run("combined_sample", "--lora", tmp_path / "refl", "--mode", "combined", "--base_steps", 3, "--num_images", 2, "--out", tmp_path / "images")
    assert "scheduler            euler" in capsys.readouterr().out and len(list((tmp_path / "images").glob("0*.png"))) == 2
