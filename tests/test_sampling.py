"""Invariant 1: `sample` equals diffusers' own pipeline, for every family. And what belongs to it:
guidance, prompts, schedulers, x0 predictions, and random numbers that depend on nothing else."""

import pytest
import torch
from conftest import CPU, PROMPTS, pipeline_images
from diffusers import DDIMScheduler, DDPMScheduler

from common import add_noise, decode, decode_in_parts, denoise, diffusion_target, encode
from common import generator, initial_latents, load_model, make_scheduler, predict_x0, sample
from data.prompts import condition, encode_once, encode_prompts
from run_folder import generate


def start(model, prompts=PROMPTS, seed=0):
    """-> x_T, its generators, and both conditions."""
    generators = [generator(seed, "test", i) for i in range(len(prompts))]
    latents = initial_latents(model, generators)
    return latents, generators, condition(model, prompts), condition(model, [None] * len(prompts))


@pytest.mark.parametrize("kind, eta", [("ddpm", 1.0), ("ddim", 0.0), ("ddim", 1.0)])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("family, resolution", [("sd", None), ("sd_v", None), ("sdxl", 32)])
def test_sample_equals_the_sd_pipelines(world, family, resolution, guidance_scale, kind, eta):
    model = load_model(getattr(world, family), CPU, resolution)
    scheduler = make_scheduler(model, kind, 6)
    latents, generators, cond, uncond = start(model)
    ours = sample(model, scheduler, latents, cond, 0, 6, generators, guidance_scale, uncond, eta)
    our_images = decode_in_parts(model, ours, 4)

    # The pipeline gets the same x_T, and generators that have already drawn it.
    latents, generators, _, _ = start(model)
    states = [g.get_state() for g in generators]
    model.pipe.scheduler = type(scheduler).from_config(scheduler.config)
    call = dict(prompt=PROMPTS, num_inference_steps=6, guidance_scale=guidance_scale, eta=eta)
    call.update(height=model.resolution, width=model.resolution, generator=generators)
    theirs = model.pipe(**call, latents=latents, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    for g, state in zip(generators, states):
        g.set_state(state)
    their_images = model.pipe(**call, latents=latents, output_type="pt").images
    assert our_images.shape == (4, 3, model.resolution, model.resolution)
    torch.testing.assert_close(our_images, their_images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family, guidance_scale", [("flux", 1.0), ("flux_dev", 3.5)])
def test_sample_equals_the_flux_pipeline(world, family, guidance_scale):
    model = load_model(getattr(world, family), CPU)
    scheduler = make_scheduler(model, "euler", 4)
    latents, generators, cond, _ = start(model)
    ours = sample(model, scheduler, latents, cond, 0, 4, generators, guidance_scale)
    theirs = pipeline_images(model.pipe, PROMPTS, latents, 4, guidance_scale)
    torch.testing.assert_close(decode_in_parts(model, ours, 2), theirs, rtol=1e-4, atol=1e-4)
    # Guidance is an input of dev, and schnell has none.
    other = sample(model, scheduler, latents, cond, 0, 4, generators, guidance_scale + 5.0, cond)
    if family == "flux_dev":
        assert (other - ours).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("family", ["sd35", "z_image"])
def test_sample_equals_the_pipelines_of_flows_with_usual_guidance(world, family, guidance_scale):
    model = load_model(getattr(world, family), CPU)
    scheduler = make_scheduler(model, "euler", 4)
    # The unconditional prompt comes from the same batch as the others.
    model.embeds.update(encode_prompts(model, PROMPTS))
    latents, generators, cond, uncond = start(model)
    ours = sample(model, scheduler, latents, cond, 0, 4, generators, guidance_scale, uncond)
    theirs = pipeline_images(model.pipe, PROMPTS, latents, 4, guidance_scale)
    torch.testing.assert_close(decode_in_parts(model, ours, 2), theirs, rtol=0, atol=1e-5)
    # Every prompt counts, and so does the guidance.
    shifted = condition(model, PROMPTS[1:] + PROMPTS[:1])
    other = sample(model, scheduler, latents, shifted, 0, 4, generators, guidance_scale, uncond)
    assert (other - ours).abs().amax((1, 2, 3)).min() > 0.01
    other = sample(model, scheduler, latents, cond, 0, 4, generators, guidance_scale + 1, uncond)
    assert (other - ours).abs().amax((1, 2, 3)).min() > 0.01


def test_these_comparisons_can_fail(world):
    """Prompts, pooled states and sizes do change the tiny model's output."""
    model = load_model(world.sdxl, CPU)
    latents, _, cond, uncond = start(model)
    t = torch.tensor(501)
    added = cond["added_cond_kwargs"]
    assert uncond["encoder_hidden_states"].abs().max() == 0
    assert uncond["added_cond_kwargs"]["text_embeds"].abs().max() == 0
    assert added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 4
    pooled = dict(added, text_embeds=uncond["added_cond_kwargs"]["text_embeds"])
    sizes = dict(added, time_ids=added["time_ids"] * 2)
    changes = [
        dict(cond, encoder_hidden_states=uncond["encoder_hidden_states"]),
        dict(cond, added_cond_kwargs=pooled),
        dict(cond, added_cond_kwargs=sizes),
    ]
    with torch.no_grad():
        output = denoise(model, latents, t, cond)
        for changed in changes:
            assert (denoise(model, latents, t, changed) - output).abs().max() > 1e-3


def test_guidance_is_the_formula_and_timesteps_may_be_a_batch(world):
    model = load_model(world.sd, CPU)
    latents, _, cond, uncond = start(model)
    t = torch.tensor([901, 701, 501, 1])
    with torch.no_grad():
        u = denoise(model, latents, t, uncond)
        c = denoise(model, latents, t, cond)
        guided = denoise(model, latents, t, cond, 3.0, uncond)
        one_cond = dict(encoder_hidden_states=cond["encoder_hidden_states"][1:2])
        one = denoise(model, latents[1:2], torch.tensor(701), one_cond)
    torch.testing.assert_close(guided, u + 3 * (c - u), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, c[1:2], rtol=1e-4, atol=1e-4)


def test_sampling_in_two_parts_is_sampling_in_one(world):
    """The step noise goes on where the first part left it. No steps change nothing."""
    model = load_model(world.sd, CPU)
    scheduler = make_scheduler(model, "ddpm", 5)
    latents, generators, cond, _ = start(model)
    whole = sample(model, scheduler, latents, cond, 0, 5, generators)
    latents, generators, _, _ = start(model)
    first = sample(model, scheduler, latents, cond, 0, 3, generators)
    assert sample(model, scheduler, first, cond, 3, 3, generators) is first
    assert torch.equal(sample(model, scheduler, first, cond, 3, 5, generators), whole)


@pytest.mark.parametrize("family", ["sd", "sd_v"])
def test_predict_x0_is_the_schedulers_own(world, family):
    model = load_model(getattr(world, family), CPU)
    latents = torch.randn(2, 4, 8, 8, generator=generator(0, "x"))
    noise_pred = torch.randn(2, 4, 8, 8, generator=generator(0, "noise"))
    for kind, num_steps in (("ddpm", 40), ("ddim", 20)):
        scheduler = make_scheduler(model, kind, num_steps)
        for t in scheduler.timesteps:
            theirs = scheduler.step(noise_pred, t, latents).pred_original_sample
            ours = predict_x0(scheduler, noise_pred, t, latents)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["sd", "sd_v", "flux", "sd35", "z_image"])
def test_x0_noise_and_target_fit_together(world, family):
    """A model that predicted the target exactly would give the clean latents back."""
    model = load_model(getattr(world, family), CPU)
    kind = "euler" if model.is_flow else "ddpm"
    scheduler = make_scheduler(model, kind, 10)
    x0 = torch.randn(3, 4, 8, 8, generator=generator(0, "x0"))
    noise = torch.randn(3, 4, 8, 8, generator=generator(0, "noise"))
    for t in scheduler.timesteps[[2, 7]]:
        noisy = add_noise(scheduler, x0, noise, t)
        target = diffusion_target(scheduler, x0, noise, t)
        torch.testing.assert_close(
            predict_x0(scheduler, target, t, noisy), x0, rtol=1e-4, atol=1e-4
        )
        if model.is_flow:
            expected = (1 - t / 1000) * x0 + t / 1000 * noise
        else:
            alpha_bar = model.pipe.scheduler.alphas_cumprod[t]
            expected = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        torch.testing.assert_close(noisy, expected)
        # One timestep per image gives the same.
        torch.testing.assert_close(add_noise(scheduler, x0, noise, t.expand(3)), noisy)


def test_the_grid_of_timesteps_is_the_papers(world):
    model = load_model(world.sd, CPU)
    for kind, scheduler_class in (("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)):
        scheduler = make_scheduler(model, kind, 40)
        assert type(scheduler) is scheduler_class
        assert scheduler.timesteps.tolist() == [976 - 25 * i for i in range(40)]
    # Step 30 of 40, where ImageReFL starts.
    assert scheduler.alphas_cumprod[226].item() == pytest.approx(0.7127, abs=1e-4)
    with pytest.raises(SystemExit, match="euler"):
        make_scheduler(model, "euler", 4)
    with pytest.raises(KeyError, match="dpm"):
        make_scheduler(model, "dpm", 4)


def test_encode_and_decode_are_the_vaes_own(world):
    model = load_model(world.flux, CPU)
    images = torch.rand(3, 3, 16, 16, generator=generator(0, "images"))
    with torch.no_grad():
        mean = model.vae.encode(images * 2 - 1).latent_dist.mean
        expected = (mean - 0.1159) * 0.3611
        decoded = (model.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    for micro_batch in (1, 2, 8):
        latents = encode(model, images, micro_batch)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            decode_in_parts(model, latents, micro_batch), decoded, rtol=1e-4, atol=1e-5
        )
    assert decode(model, latents.requires_grad_()).requires_grad


def test_no_draw_depends_on_the_batch_or_on_the_global_generator(world):
    model = load_model(world.sd, CPU)
    sampler = dict(scheduler="ddpm", eta=1.0, num_inference_steps=4, guidance_scale=3.0)
    torch.manual_seed(1)
    first = generate(model, PROMPTS[:3], 7, sampler, num_images=3, batch_size=9, micro_batch=9)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = generate(model, PROMPTS[:3], 7, sampler, num_images=3, batch_size=2, micro_batch=1)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (9, 3, 16, 16)
    assert (first - second).abs().max() <= 1 / 255
    other_seed = generate(model, PROMPTS[:3], 8, sampler, num_images=3)
    assert (first - other_seed).abs().max() > 0.05

    purposes = [("a",), ("b",), ("a", 0), ("a", 1), ("a", 0, 1), ("a", 1, 0)]
    assert len({generator(0, *purpose).initial_seed() for purpose in purposes}) == 6


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd35", "z_image"])
def test_prompts_are_encoded_once_and_outlive_the_encoders(world, family):
    model = load_model(getattr(world, family), CPU)
    on_the_fly = condition(model, [*PROMPTS, None])
    encode_once(model, PROMPTS)
    num_bytes = sum(part.nbytes for parts in model.embeds.values() for part in parts)
    for name, part in model.pipe.components.items():
        assert part is None or not name.startswith("text_encoder")
    kept = condition(model, [*PROMPTS, None])
    key = "states" if family == "z_image" else "encoder_hidden_states"
    torch.testing.assert_close(kept[key], on_the_fly[key])
    with pytest.raises(ValueError, match="pass 'another prompt' to encode_once too"):
        condition(model, ["another prompt"])

    # A list that is too long stays with the encoders, and gives the same.
    other = load_model(getattr(world, family), CPU)
    # The embeddings of four prompts are four fifths of these, because None has one, too.
    encode_once(other, PROMPTS, limit=0.79 * num_bytes)
    assert not other.embeds and other.pipe.text_encoder is not None
    torch.testing.assert_close(condition(other, [*PROMPTS, None])[key], on_the_fly[key])
    encode_once(other, PROMPTS, limit=0.81 * num_bytes)
    assert other.embeds and other.pipe.text_encoder is None
