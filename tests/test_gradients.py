"""Invariant 2: the truncated gradient equals autograd through a graph that is cut by hand, and it
is exactly zero before the cut."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, PROMPTS, random_lora
from diffusers import DDPMScheduler

import refl
from common import generator, initial_latents, load_model, make_scheduler, make_trainable, merged
from common import sample
from data.prompts import condition
from rewards import load_reward


@pytest.fixture(scope="module")
def reward():
    return load_reward("toy_pref", CPU)[0]


def reward_by_hand(reward, images, prompts):
    """The toy preference model's own logits, with the pixels prepared by hand."""
    pixels = F.interpolate(images, (64, 64), mode="bicubic", antialias=True)
    mean = torch.tensor(reward.mean).view(3, 1, 1)
    std = torch.tensor(reward.std).view(3, 1, 1)
    tokens = reward.tokenizer(prompts, padding=True, return_tensors="pt")
    return reward.clip(pixel_values=(pixels - mean) / std, **tokens).logits_per_image.diag()


def decode_by_hand(model, latents):
    images = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clip(0, 1)


@pytest.mark.parametrize("family", ["sd", "sd_v", "sdxl"])
def test_refls_gradient_is_that_of_a_graph_cut_by_hand(world, reward, family):
    model = load_model(getattr(world, family), CPU)
    params = make_trainable(model, 4)
    random_lora(params)
    scheduler = make_scheduler(model, "ddpm", 4)
    cond = condition(model, PROMPTS)
    mid = 2

    # Ours. Two calls without gradient, one with it, and nothing reaches x_T.
    has_gradient = []
    hook = model.denoiser.register_forward_pre_hook(
        lambda *_: has_gradient.append(torch.is_grad_enabled())
    )
    generators = [generator(0, "x", i) for i in range(4)]
    x_T = initial_latents(model, generators).requires_grad_()
    latents = sample(model, scheduler, x_T, cond, 0, mid, generators)
    assert not latents.requires_grad
    r = refl.refl_step(
        model, scheduler, latents, scheduler.timesteps[mid], cond, reward, PROMPTS
    )
    refl.linear_loss(r, 0.0, 10.0, 1e-3).backward()
    hook.remove()
    assert has_gradient == [False, False, True]
    assert x_T.grad is None
    ours = [p.grad.clone() for p in params]

    # The same steps, written out with the modules alone.
    generators = [generator(0, "x", i) for i in range(4)]
    x = initial_latents(model, generators)
    theirs = DDPMScheduler.from_config(scheduler.config)
    theirs.set_timesteps(4)
    for t in theirs.timesteps[:mid]:
        noise_pred = model.denoiser(x, t, **cond).sample.detach()
        x = theirs.step(noise_pred, t, x, generator=generators).prev_sample
    t = theirs.timesteps[mid]
    alpha_bar = theirs.alphas_cumprod[t]
    output = model.denoiser(x, t, **cond).sample
    if family == "sd_v":
        x0 = alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * output
    else:
        x0 = (x - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5
    r_by_hand = reward_by_hand(reward, decode_by_hand(model, x0), PROMPTS)
    torch.testing.assert_close(r, r_by_hand, rtol=1e-5, atol=1e-5)
    by_hand = torch.autograd.grad(-1e-3 * r_by_hand.mean() / 10, params)
    assert max(g.abs().max() for g in by_hand) > 0
    for g, h in zip(ours, by_hand):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5 * h.abs().max().item())


@pytest.mark.parametrize("family", ["sd", "flux", "sd35", "z_image"])
def test_the_end_of_the_sampler_has_the_gradient_of_its_own_steps_alone(world, family):
    """sample(..., grad=True) against the last two steps by hand, and nothing before them."""
    model = load_model(getattr(world, family), CPU)
    params = make_trainable(model, 4)
    random_lora(params)
    scheduler = make_scheduler(model, "euler" if model.is_flow else "ddim", 5)
    cond = condition(model, PROMPTS[:2])
    x_T = initial_latents(model, [generator(0, "x", i) for i in range(2)]).requires_grad_()

    with merged(model):
        latents = sample(model, scheduler, x_T, cond, 0, 3, None)
    prefix = latents.clone().requires_grad_()
    sample(model, scheduler, prefix, cond, 3, 5, None, grad=True).square().sum().backward()
    ours = [p.grad.clone() for p in params]
    assert x_T.grad is None and prefix.grad.abs().max() > 0

    x = prefix.detach()
    for i in (3, 4):
        t = scheduler.timesteps[i]
        if family == "sd35":
            velocity = model.denoiser(x, timestep=t.expand(2), **cond).sample
        elif family == "z_image":
            frames = list(x.unsqueeze(2))
            prompts = list(cond["states"].split(cond["lengths"].tolist()))
            output = model.denoiser(frames, (1000 - t.expand(2)) / 1000, prompts).sample
            velocity = -torch.stack(output).squeeze(2)
        elif family == "flux":
            packed = model.pipe._pack_latents(x, 2, 4, 8, 8)
            ids = model.pipe._prepare_latent_image_ids(2, 4, 4, CPU, torch.float32)
            text_ids = torch.zeros(cond["encoder_hidden_states"].shape[1], 3)
            output = model.denoiser(
                packed, timestep=t.expand(2) / 1000, img_ids=ids, txt_ids=text_ids, **cond
            ).sample
            velocity = model.pipe._unpack_latents(output, 8, 8, 1)
        if model.is_flow:
            x = x + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * velocity
        else:
            noise_pred = model.denoiser(x, t, **cond).sample
            x = scheduler.step(noise_pred, t, x, eta=0.0).prev_sample
    by_hand = torch.autograd.grad(x.square().sum(), params)
    for g, h in zip(ours, by_hand):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5 * h.abs().max().item())


def test_a_small_step_against_the_gradient_raises_the_reward(world, reward):
    """By what the gradient promises: the loss has the right sign and scale."""
    model = load_model(world.sd, CPU)
    params = make_trainable(model, 4)
    scheduler = make_scheduler(model, "ddpm", 4)
    latents = initial_latents(model, [generator(0, "x", i) for i in range(4)])
    cond = condition(model, PROMPTS)

    def loss():
        t = scheduler.timesteps[2]
        r = refl.refl_step(model, scheduler, latents, t, cond, reward, PROMPTS)
        return refl.linear_loss(r, 0.0, 10.0, 1e-3)

    before = loss()
    gradients = torch.autograd.grad(before, params)
    squared_norm = sum(g.square().sum() for g in gradients)
    # Promised: a loss that is 1e-5 lower, which is a mean reward 0.1 higher.
    for p, g in zip(params, gradients):
        p.data -= 1e-5 / squared_norm * g
    assert (before - loss()).item() == pytest.approx(1e-5, rel=0.2)
