"""diffdoctor.py: FLUX against its own pipeline; the losses, the augmentation, the metrics; the detector's data loop and treating, end to end."""
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from test_refl import log_of, same, weights_of
from test_sampling_scripts import files, run

import common
import diffdoctor
import evaluate
from common import (TOY, condition, decode, denoise, diffusion_target, encode, generate, generator, initial_latents, load_model, make_scheduler,
                    predict_x0, row_of, sample, trainable)

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square above a green circle", "a yellow triangle"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny models: FLUX in both forms, SD and SDXL."""
    root = tmp_path_factory.mktemp("diffdoctor")
    tiny.write_flux(root / "schnell"), tiny.write_flux(root / "dev", dev=True, seed=1), tiny.write(root / "sd")
    tiny.write(root / "sdxl", "sdxl")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "one.txt").write_text("a red star\n")
    return root


# ------------------------------------------------------------------------------------------------------------------------------------
# FLUX

@pytest.mark.parametrize("family, guidance_scale, resolution", [("schnell", 1., None), ("schnell", 3., None), ("schnell", 1., 32), ("dev", 3.5, None),
                                                                ("dev", 1., 32)])
def test_sample_equals_flux_pipeline(root, family, guidance_scale, resolution):
    """Latents and pixels. dev takes guidance as an input; schnell above 1 runs a second pass, the pipeline's true_cfg_scale."""
    model = load_model(str(root / family), CPU, resolution)
    generators = [generator(0, "x", i) for i in range(3)]
    noise, cond, uncond = initial_latents(model, generators), condition(model, PROMPTS), condition(model, [None] * 3)
    scheduler = make_scheduler(model, "euler", 5)
    ours = sample(model, scheduler, noise, cond, 0, 5, generators, guidance_scale, uncond)
    with torch.no_grad():
        pixels = decode(model, ours)
    b, c, h, w = noise.shape
    call = dict(prompt=PROMPTS, num_inference_steps=5, height=model.resolution, width=model.resolution, max_sequence_length=12,
                latents=FluxPipeline._pack_latents(noise, b, c, h, w))
    second_pass = dict(guidance_scale=0., true_cfg_scale=guidance_scale, negative_prompt=[""] * 3)
    call |= dict(guidance_scale=guidance_scale) if family == "dev" else second_pass
    theirs = model.pipe(**call, output_type="latent").images
    theirs = FluxPipeline._unpack_latents(theirs, model.resolution, model.resolution, 2)
    assert c == 4 and (ours - theirs).abs().max() < 1e-4 * max(1, theirs.abs().max())
    assert np.abs(pixels.permute(0, 2, 3, 1).numpy() - model.pipe(**call, output_type="np").images).max() < 1e-4
    assert (theirs - noise).abs().max() > .1


def test_what_flux_is_told_matters(root):
    """The comparison above can fail: states, pooled states, guidance, time and position change the tiny model's output."""
    model = load_model(str(root / "dev"), CPU)
    x, cond, t = initial_latents(model, [generator(0, "x")]), condition(model, PROMPTS[:1]), torch.tensor(600.)
    other = condition(model, PROMPTS[1:2])
    with torch.no_grad():
        out = denoise(model, x, t, cond, 3.5)
        for changed in (denoise(model, x, t, dict(cond, encoder_hidden_states=other["encoder_hidden_states"]), 3.5),
                        denoise(model, x, t, dict(cond, pooled_projections=other["pooled_projections"]), 3.5), denoise(model, x, t, cond, 1.),
                        denoise(model, x, torch.tensor(300.), cond, 3.5), denoise(model, x.transpose(2, 3), t, cond, 3.5).transpose(2, 3)):
            assert changed.shape == out.shape == x.shape and (changed - out).abs().max() > 1e-4
        two = denoise(model, torch.cat([x, x]), torch.tensor([600., 300.]), {k: torch.cat([v, v]) for k, v in cond.items()}, 3.5)
        torch.testing.assert_close(two[:1], out, rtol=1e-4, atol=1e-5)


def test_flux_steps_and_targets(root):
    """Sigmas of schnell by hand, dev's shift; the last step is the x0 prediction; a step from the middle needs no step before it."""
    schnell, dev = (load_model(str(root / f), CPU) for f in ("schnell", "dev"))
    scheduler = make_scheduler(schnell, "euler", 5)
    assert scheduler.sigmas.tolist() == pytest.approx([1, .8, .6, .4, .2, 0])
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 800, 600, 400, 200])
    mu = .5 + (1.15 - .5) / (4096 - 256) * (16 - 256)                              # 16 tokens
    by_hand = [math.exp(mu) / (math.exp(mu) + (1 / s - 1)) for s in (1, .8, .6, .4, .2)]
    assert make_scheduler(dev, "euler", 5).sigmas.tolist() == pytest.approx([*by_hand, 0])
    x0, noise = (torch.randn(2, 4, 8, 8, generator=generator(0, k)) for k in "xn")
    v = diffusion_target(scheduler, x0, noise, None)
    assert torch.equal(v, noise - x0)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        noised = (1 - sigma) * x0 + sigma * noise
        torch.testing.assert_close(predict_x0(scheduler, v, t, noised), x0)
        after = common.scheduler_step(scheduler, v, t, noised, None)
        torch.testing.assert_close(after, (1 - scheduler.sigmas[i + 1]) * x0 + scheduler.sigmas[i + 1] * noise)
    torch.testing.assert_close(after, predict_x0(scheduler, v, t, noised))


def test_flux_latents_are_shifted_and_scaled(root):
    model, images = load_model(str(root / "schnell"), CPU), torch.rand(2, 3, 16, 16, generator=generator(0, "i"))
    with torch.no_grad():
        mean = model.vae.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(encode(model, images), (mean - .1159) * .3611)
        torch.testing.assert_close(decode(model, encode(model, images)), (model.vae.decode(mean).sample / 2 + .5).clamp(0, 1))


def test_a_flux_folder_is_known_by_its_config_and_a_wrong_scheduler_is_refused(root, capsys):
    table = {"flux-schnell": {"a": 1}, "flux-dev": {"a": 2}}
    assert row_of(table, str(root / "schnell")) == {"a": 1, "resolution": None} and row_of(table, str(root / "dev"))["a"] == 2
    assert row_of({"sd15": {}}, str(root / "dev")) == {} == row_of({"sd15": {}}, "flux-dev")
    for family, kind in (("schnell", "ddpm"), ("sd", "euler")):
        with pytest.raises(SystemExit) as e:
            make_scheduler(load_model(str(root / family), CPU), kind, 4)
        assert e.value.code == 2 and "does not fit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load_model(str(root / "schnell"), CPU, full=True)


def test_fp32_trainables_on_a_bf16_flux(root):
    """What a GPU runs, here on a CPU: close to the network in plain bf16 (which rounds time and guidance as published), fp32 gradients."""
    model, plain = load_model(str(root / "dev"), CPU), load_model(str(root / "dev"), CPU)
    for m in (model, plain):
        torch.nn.Module.to(m.denoiser, torch.bfloat16)
    model.dtype, params = torch.bfloat16, trainable(model, 4)
    x, cond, t = initial_latents(model, [generator(0, "x")]), condition(model, PROMPTS[:1]), torch.tensor(600.)
    out = denoise(model, x, t, cond, 3.5)
    with torch.no_grad():
        reference = common._flux(plain, x.bfloat16(), t, {k: v.bfloat16() for k, v in cond.items()}, 3.5).float()
    assert out.dtype == torch.float32 and (out - reference).abs().max() < .05 * reference.abs().max()
    out.square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in params) and any(p.grad.abs().max() > 0 for p in params)


def test_a_flux_lora_opens_in_plain_diffusers(root, tmp_path):
    model = load_model(str(root / "schnell"), CPU)
    common.encode_once(model, PROMPTS)
    assert model.pipe.text_encoder is None and model.pipe.text_encoder_2 is None
    params = trainable(model, 4)
    names = [n for n, p in model.denoiser.named_parameters() if p.requires_grad]
    assert len(names) == 2 * (4 + 3) and len(params) == len(names)                 # to_q, to_k, to_v of both blocks, to_out.0 of the double one
    for i, p in enumerate(params):
        p.data = .3 * torch.randn(p.shape, generator=generator(0, "lora", i))
    common.save_weights(model, tmp_path, 4)
    sampler = dict(scheduler="euler", eta=0., num_inference_steps=4, guidance_scale=1.)
    ours = generate(model, PROMPTS, 3, sampler, batch=2)                           # two batches on one scheduler
    pipe = FluxPipeline.from_pretrained(root / "schnell")
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator(3, "image", i, 0)) for i in range(3)])
    call = dict(prompt=PROMPTS, num_inference_steps=4, height=16, width=16, max_sequence_length=12, output_type="pt",
                latents=FluxPipeline._pack_latents(noise, 3, 4, 8, 8))
    assert (pipe(**call).images - ours).abs().max() > .02
    pipe.load_lora_weights(tmp_path)
    assert (pipe(**call).images - ours).abs().max() < 1e-3
    again = load_model(str(root / "schnell"), CPU)
    trainable(again, 4, init_lora=tmp_path)
    assert (generate(again, PROMPTS, 3, sampler) - ours).abs().max() < 1e-4
    run("combined_sample", "--model", root / "schnell", "--lora", tmp_path, "--prompts", root / "prompts.txt", "--seed", 3, "--num_images", 1,
        "--mode", "combined", "--base_steps", 0, "--out", tmp_path / "images")
    made = np.asarray(Image.open(tmp_path / "images" / "00000_00.png"), np.int16)
    assert abs(np.asarray(common.to_pil(ours[0]), np.int16) - made).max() <= 1


# ------------------------------------------------------------------------------------------------------------------------------------
# the losses

def test_pixel_loss_on_hand_made_maps():
    maps = torch.tensor([[[.0, .2], [.4, 1.]], [[.05, .05], [.1, .0]]], requires_grad=True)
    for pixels, expected in dict(mean=.225, max=(1 + .1) / 2, threshold=((.2 + .4 + 1) / 3 + 0) / 2).items():
        loss = diffdoctor.pixel_loss(maps, pixels)
        assert loss.item() == pytest.approx(expected), pixels
        grad = torch.autograd.grad(loss, maps)[0]
        reached = dict(mean=[[1, 1], [1, 1], [1, 1], [1, 1]], max=[[0, 0], [0, 1], [0, 0], [1, 0]], threshold=[[0, 1], [1, 1], [0, 0], [0, 0]])[pixels]
        assert (grad.view(4, 2) > 0).int().tolist() == reached


def test_the_rectified_flow_loss_by_hand(root):
    """With latents shifted and scaled as FLUX has them, packed here by einsum, dev's guidance among the inputs."""
    model = load_model(str(root / "dev"), CPU)
    images, t = torch.rand(2, 3, 16, 16, generator=generator(0, "i")), torch.tensor([700., 250.])
    noise = torch.randn(2, 4, 8, 8, generator=generator(0, "n"))
    cond = condition(model, PROMPTS[:2])
    with torch.no_grad():
        loss = diffdoctor.offline_loss(model, make_scheduler(model, "euler", 5), encode(model, images), noise, t, cond, 3.5)
        x0 = (model.vae.encode(images * 2 - 1).latent_dist.mean - .1159) * .3611

        def pack(x):
            return x.view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
        x_t = torch.stack([(1 - s) * a + s * b for a, b, s in zip(x0, noise, (.7, .25))])
        ids = torch.tensor([[0., y, x] for y in range(4) for x in range(4)])
        v = model.denoiser(pack(x_t), timestep=t / 1000, guidance=torch.tensor([3.5, 3.5]), img_ids=ids, txt_ids=torch.zeros(12, 3), **cond).sample
    assert loss.item() == pytest.approx((pack(noise - x0) - v).square().mean().item(), rel=1e-4)


def test_the_offline_loss_of_sd_is_its_diffusion_loss(root):
    model, noise = load_model(str(root / "sd"), CPU), torch.randn(2, 4, 8, 8, generator=generator(0, "n"))
    x0, t, cond = torch.randn(2, 4, 8, 8, generator=generator(0, "x")), torch.tensor([900, 20]), condition(model, PROMPTS[:2])
    a = model.pipe.scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    with torch.no_grad():
        eps = model.denoiser(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, **cond).sample
        loss = diffdoctor.offline_loss(model, make_scheduler(model, "ddim", 5), x0, noise, t, cond)
    assert loss.item() == pytest.approx((eps - noise).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("family, kind, k", [("schnell", "euler", 1), ("schnell", "euler", 2), ("sd", "ddim", 1), ("sd", "ddpm", 3)])
def test_the_gradient_is_that_of_the_last_steps_alone(root, family, kind, k):
    """Against a graph cut by hand; every call before the cut runs without gradient."""
    model, n = load_model(str(root / family), CPU), 5
    params, scheduler, detector = trainable(model, 4), make_scheduler(model, kind, n), common.load_detector(TOY / "detector", CPU)
    for i, p in enumerate(params):
        p.data = .3 * torch.randn(p.shape, generator=generator(0, i))
    args = SimpleNamespace(grad_steps=k, guidance_scale=1.)
    cond, calls = condition(model, PROMPTS), []
    generators = [generator(0, "x", i) for i in range(3)]
    x_T = initial_latents(model, generators).requires_grad_()
    hook = model.denoiser.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    latents = sample(model, scheduler, x_T, cond, 0, n - k, generators)
    loss = diffdoctor.pixel_loss(diffdoctor.treat_step(model, scheduler, detector, latents, cond, None, args, generators), "mean")
    grads = torch.autograd.grad(loss, [*params, latents.requires_grad_()], allow_unused=True)
    hook.remove()
    assert calls == [False] * (n - k) + [True] * k and grads[-1] is None and x_T.grad is None

    generators = [generator(0, "x", i) for i in range(3)]
    x = initial_latents(model, generators)
    for i, t in enumerate(scheduler.timesteps):
        out = denoise(model, x, t, cond)
        x = common.scheduler_step(scheduler, out if i >= n - k else out.detach(), t, x, generators)
    by_hand = torch.autograd.grad(detector(decode(model, x)).mean(), params)
    assert max(g.abs().max() for g in by_hand) > 0
    for g, h in zip(grads, by_hand):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5 * h.abs().max().item())


def test_kl_against_numpy():
    draw = np.random.default_rng(0)
    p, q = draw.random((2, 8, 8)), draw.random((2, 8, 8))
    p[0, :2], p[1, :2], q[0, 0], q[1, 0], q[0, 1], q[1, 1] = 0, 1, 0, 1, 1, 0       # right and wrong at both ends
    for a, b in ((p, q), (1 - p, 1 - q)):
        clamped = b.clip(1e-6, 1 - 1e-6)
        expected = np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / clamped), 0).mean()
        assert diffdoctor.kl(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected)
    zero, one = torch.zeros(4), torch.ones(4)
    assert diffdoctor.kl(zero, zero) == 0 and diffdoctor.kl(one, one).item() == pytest.approx(1e-6, rel=.1)
    assert diffdoctor.kl(one, zero).item() == pytest.approx(-math.log(1e-6)) and diffdoctor.kl(zero, one) == 0      # a miss; a false alarm is KL(1-)'s
    assert diffdoctor.kl(1 - zero, 1 - one).item() == pytest.approx(-math.log(1e-6), rel=1e-3)


def test_early_stopping():
    falling = [(.5, 0.), (.4, .1), (.3, .2), (.2, .3)]
    assert diffdoctor.stop_reason(falling, 2, .5) is None and diffdoctor.stop_reason(falling[:1], 1, .5) is None
    assert "--max_drift 0.25" in diffdoctor.stop_reason(falling, 2, .25) and "nan" in diffdoctor.stop_reason([(.5, 0.), (math.nan, math.nan)], 3, .5)
    flat = [(.5, 0.), (.3, .1), (.35, .1), (.3, .1)]
    assert diffdoctor.stop_reason(flat, 3, .5) is None and "not fallen for 2" in diffdoctor.stop_reason(flat, 2, .5)
    assert "not fallen for 3" in diffdoctor.stop_reason([*flat, (.31, .1)], 3, .5) and diffdoctor.stop_reason([*flat, (.29, .1)], 3, .5) is None


# ------------------------------------------------------------------------------------------------------------------------------------
# the augmentation

def marked(size=32):
    """An image whose red channel is its label: whatever moves one must move the other."""
    label = torch.zeros(1, size, size)
    label[:, 5:14, 9:20] = torch.rand(9, 11, generator=generator(0, "label"))
    return torch.cat([label, torch.rand(2, size, size, generator=generator(0, "rest"))]), label


def test_weak_augmentation_moves_image_and_label_alike():
    image, label = marked()
    seen = [diffdoctor.weak(image, label, generator(0, "w", i)) for i in range(20)]
    assert all(torch.equal(a[:1], b) and a.shape == image.shape for a, b in seen) and all((a - image).abs().max() > .1 for a, _ in seen[:3])
    assert torch.equal(diffdoctor.weak(image, label, generator(1, "w"))[0], diffdoctor.weak(image, label, generator(1, "w"))[0])


def test_only_harmless_images_are_shrunk_and_label_alike():
    image, label = marked()
    for i in range(20):
        a, b = diffdoctor.shrink_and_pad(image, label, generator(0, "s", i))
        assert a is image and b is label                                           # high confidence: never touched
    low = (.09 * label, torch.cat([.09 * label, image[1:] * 0 + 1]))
    sides = set()
    for i in range(40):
        a, b = diffdoctor.shrink_and_pad(low[1], low[0], generator(0, "s", i))
        rows, columns = a[1].amax(1).nonzero()[:, 0], a[1].amax(0).nonzero()[:, 0]       # ones where the small image is, padding elsewhere
        side = len(rows)
        sides.add(side)
        assert a.shape == (3, 32, 32) and torch.equal(a[:1], b) and 8 <= side <= 24 and len(columns) == side
        inside = torch.zeros(32, 32, dtype=bool)
        inside[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] = True
        assert a[:, ~inside].abs().max() == 0 and b[:, ~inside].abs().max() == 0 and torch.allclose(a[1:, inside], torch.ones(()))
    assert len(sides) > 8


def test_strong_augmentation_changes_pixels_in_range_and_no_label():
    image, label = marked(64)
    seen = torch.stack([diffdoctor.strong(image, generator(0, "x", i)) for i in range(40)])
    assert 0 <= seen.min() and seen.max() <= 1 + 1e-6 and .75 < ((seen - image).abs().amax((1, 2, 3)) > .02).float().mean() < 1
    grey = (seen.amax(1) - seen.amin(1)).amax((1, 2)) < 1e-5
    assert 2 <= grey.sum() <= 15
    images, labels = torch.stack([image] * 4), torch.stack([label] * 4)
    out, after = diffdoctor.augment(images, labels, [False] * 4, generator(0, "a"))
    assert torch.equal(out[:, :1], after)                                          # true labels: the weak ones alone


def test_cutmix_moves_image_and_label_alike():
    labels = torch.arange(6.).view(6, 1, 1, 1).expand(6, 1, 32, 32) / 6
    images = labels.expand(6, 3, 32, 32)
    share = []
    for i in range(20):
        a, b = diffdoctor.cutmix(images, labels, generator(0, "c", i))
        assert torch.equal(a[:, :1], b)
        for k in range(6):
            other = b[k, 0] != labels[k, 0]
            assert other.sum() == 0 or torch.equal(b[k, 0][other].unique(), labels[k - 1, 0, 0, :1])
            share.append(other.float().mean().item())
    assert .3 < np.mean(np.array(share) > 0) < .7 and max(share) <= .45


# ------------------------------------------------------------------------------------------------------------------------------------
# the detector

def test_the_released_layout_loads_bit_exactly(tmp_path, capsys):
    """transformers-4 key names in a plain state dict: a bare load_state_dict fails on them, load_detector does not, and never unpickles code."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    config = SegformerConfig(depths=[1, 2, 3, 1], hidden_sizes=[8, 16, 40, 64], decoder_hidden_size=24, num_labels=1)
    net = SegformerForSemanticSegmentation(config).eval()
    net.save_pretrained(tmp_path / "net")
    old = load_file(tmp_path / "net" / "model.safetensors")
    assert "segformer.encoder.block.2.2.attention.self.query.weight" in old and "decode_head.linear_c.3.proj.bias" in old
    with pytest.raises(RuntimeError):
        net.load_state_dict(old)
    torch.save(old, tmp_path / "ad_pytorch_model.bin")
    detector, own = common.load_detector(tmp_path / "ad_pytorch_model.bin", CPU), net.state_dict()
    assert same(detector.net.state_dict(), own) and detector.size == 512 and not any(p.requires_grad for p in detector.parameters())
    images = torch.rand(2, 3, 512, 512, generator=generator(0, "i"), requires_grad=True)
    with torch.no_grad():
        logits = net((images - torch.tensor([.485, .456, .406]).view(3, 1, 1)) / torch.tensor([.229, .224, .225]).view(3, 1, 1)).logits
        theirs = torch.nn.functional.interpolate(logits, (512, 512), mode="bilinear").sigmoid()[:, 0]
    assert logits.shape == (2, 1, 128, 128)
    ours = detector(images)
    torch.testing.assert_close(ours, theirs)
    ours.mean().backward()
    assert images.grad.abs().sum() > 0

    class Code:
        def __reduce__(self):
            return print, ("unpickled",)
    torch.save({"x": Code()}, tmp_path / "code.bin")
    torch.save({k: v for k, v in old.items() if "classifier" not in k}, tmp_path / "lacks.bin")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.bin")
    shutil.copytree(TOY / "clip", tmp_path / "clip")
    for name, words in {"code.bin": "carries code", "lacks.bin": "classifier", "other.bin": "patch_embeddings", "clip": "CLIPConfig"}.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            common.load_detector(tmp_path / name, CPU)
        told = capsys.readouterr()
        assert e.value.code == 2 and words in told.err.splitlines()[-1] and "unpickled" not in told.out


def test_segformer_b5_is_the_published_one():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    config = SegformerConfig(depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, num_labels=1)
    with torch.device("meta"):
        net = SegformerForSemanticSegmentation(config)
    assert len(net.state_dict()) == 1172 and sum(p.numel() for p in net.parameters()) == 84_594_113


def test_a_start_from_an_encoder_draws_the_head_alone(tmp_path, monkeypatch):
    from transformers import SegformerConfig, SegformerForImageClassification
    torch.manual_seed(1)
    encoder = SegformerForImageClassification(SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 40, 64]))
    encoder.save_pretrained(tmp_path / "encoder")
    monkeypatch.setitem(diffdoctor.BACKBONE, "mit-b5", str(tmp_path / "encoder"))
    before = torch.get_rng_state()
    a, b, c = (diffdoctor.start_detector("mit-b5", seed, 64, CPU).net.state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state()) and same(a, b) and not same(a, c)
    own = encoder.segformer.state_dict()
    assert all(torch.equal(a["segformer." + k], v) for k, v in own.items()) and a["decode_head.linear_fuse.weight"].shape[0] == 768
    assert a["decode_head.classifier.bias"].item() == -2


def test_a_batch_is_half_pseudo_and_its_rest_partly_photographs():
    rows = [dict(source=s, split=p) for s in ("human", "real", "pseudo") for p in ("train", "test") for _ in range(5)]
    kinds = Counter((rows[i]["source"], rows[i]["split"]) for i in diffdoctor.draw_batch(rows, 0, 1, 20))
    assert kinds == {("pseudo", "train"): 10, ("real", "train"): 4, ("human", "train"): 6}
    only = [row for row in rows if row["source"] == "human"]
    assert len(diffdoctor.draw_batch(only, 0, 1, 20)) == 20 and diffdoctor.draw_batch(rows, 0, 1, 20) != diffdoctor.draw_batch(rows, 0, 2, 20)


def test_abnormal_categories():
    assert diffdoctor.abnormal(dict(hand=.3, dog=.05, tree=.04, text=.2, sky=.06)) == ["hand", "text"]
    assert diffdoctor.abnormal({"": .3}) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Toy scenes: 24 unlabelled ones, stars always wrong; and 12 labelled ones."""
    from toy.artifacts import corrupt
    from toy.scenes import render, sample_scene
    root = tmp_path_factory.mktemp("world")
    (root / "new").mkdir(), (root / "labelled" / "images").mkdir(parents=True), (root / "labelled" / "maps").mkdir()
    rows, meta = [], []
    for i in range(36):
        rng = np.random.default_rng(i)
        scene = sample_scene(rng)
        star = any(o["shape"] == "star" for o in scene["objects"])
        image, label = corrupt(scene, rng) if star or i >= 24 else (render(scene)[0], np.zeros((64, 64)))
        picture = Image.fromarray(np.rint(image * 255).astype(np.uint8))
        if i < 24:
            picture.save(root / "new" / f"{i}.png")
            rows.append(dict(file_name=f"{i}.png", text=scene["caption"], category="star" if star else scene["objects"][0]["shape"]))
        else:
            picture.save(root / "labelled" / "images" / f"{i}.png")
            Image.fromarray(np.rint(label * 255).astype(np.uint8)).save(root / "labelled" / "maps" / f"{i}.png")
            meta.append(dict(file_name=f"{i}.png", category="toy", split="test" if i >= 30 else "train", source="human"))
    (root / "new" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "labelled" / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in meta))
    return root


def doctor(*words):
    """A command line, through its own parser -> None."""
    diffdoctor.main(diffdoctor.parse_args([*map(str, words)]))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_loop_that_a_person_walks(world, tmp_path, capsys):
    """score, export, paint, import, pseudo, train: through the command line, on toy/detector."""
    look = ["--detector", TOY / "detector", "--images", world / "new", "--device", "cpu"]
    run("diffdoctor", "score", *look, "--out", tmp_path / "scores")
    told = capsys.readouterr().out
    rows = lines(tmp_path / "scores" / "scores.jsonl")
    assert [row["mean"] for row in rows] == sorted((row["mean"] for row in rows), reverse=True) and len(rows) == 24
    first = [x.split()[0] for x in told.splitlines() if "abnormal" in x][0]
    assert "star" in {row["category"] for row in rows if row["abnormal"]} and first == "star"     # the most suspicious one
    means = {c: np.mean([row["mean"] for row in rows if row["category"] == c]) for c in {row["category"] for row in rows}}
    assert means["star"] > 3 * max(means[c] for c in means if c != "star"), means

    run("diffdoctor", "export_hard", *look, "--scores", tmp_path / "scores", "--max_images", 4, "--out", tmp_path / "hard")
    hard = lines(tmp_path / "hard" / "meta.jsonl")
    assert [row["original"] for row in hard] == [row["file_name"] for row in rows if row["abnormal"] and row["max"] >= .5][:4] and len(hard) > 2
    first = hard[0]
    picture, label = (Image.open(tmp_path / "hard" / kind / first["file_name"]) for kind in ("images", "maps"))
    original = np.asarray(Image.open(world / "new" / first["original"]).convert("RGB"))
    assert (np.asarray(picture) == original).all() and label.mode == "L" and label.size == (64, 64)
    with torch.no_grad():
        predicted = common.load_detector(TOY / "detector", CPU)(torch.tensor(original.transpose(2, 0, 1)[None] / 255, dtype=torch.float32))[0]
    assert abs(np.asarray(label) / 255 - predicted.numpy()).max() <= 1.01 / 255
    seen = np.asarray(Image.open(tmp_path / "hard" / "overlays" / first["file_name"]), float)
    assert seen.shape == (64, 128, 3) and (seen[:, 64:, 1] < seen[:, :64, 1] - 10).any()                   # reddened

    painted = np.zeros((64, 64), np.uint8)
    painted[10:20, 30:40] = 255
    Image.fromarray(painted).save(tmp_path / "hard" / "maps" / first["file_name"])
    (tmp_path / "hard" / "images" / hard[1]["file_name"]).unlink()                                        # cannot be judged
    run("diffdoctor", "import_labels", "--labels", tmp_path / "hard", "--out", tmp_path / "dataset")
    assert f"{len(hard) - 1} labels, 1 of them edited, 1 images left out" in capsys.readouterr().out
    meta = lines(tmp_path / "dataset" / "meta.jsonl")
    assert [row["file_name"] for row in meta] == [row["file_name"] for i, row in enumerate(hard) if i != 1]
    assert meta[0] == dict(file_name=first["file_name"], category="star", split="train", source="human")
    assert (np.asarray(Image.open(tmp_path / "dataset" / "maps" / first["file_name"])) == painted).all()
    with pytest.raises(SystemExit):                                                # not twice
        doctor("import_labels", "--labels", tmp_path / "hard", "--out", tmp_path / "dataset")
    assert lines(tmp_path / "dataset" / "meta.jsonl") == meta

    run("diffdoctor", "pseudo", *look, "--exclude", tmp_path / "hard", "--out", tmp_path / "pseudo")
    rest = lines(tmp_path / "pseudo" / "meta.jsonl")
    assert {row["original"] for row in rest} == {f"{i}.png" for i in range(24)} - {row["original"] for row in hard}
    assert {row["source"] for row in rest} == {"pseudo"} and not (tmp_path / "pseudo" / "overlays").exists()

    run("diffdoctor", "detector", "--data", world / "labelled", tmp_path / "dataset", tmp_path / "pseudo", "--real", TOY / "images", "--train_steps", 2,
        "--batch_size", 8, "--out", tmp_path / "run", "--device", "cpu")
    told, row = capsys.readouterr().out, lines(tmp_path / "run" / "log.jsonl")[-1]
    assert f"{6 + len(hard) - 1} human (train), 6 human (test), 450 real (train), 50 real (test)" in told
    assert {"mse", "kl", "kl1", "mse_real", "kl1_real"} <= row.keys() and (tmp_path / "run" / "samples" / "step_000002.png").is_file()
    trained = str(tmp_path / "run" / "model" / "detector")
    run("diffdoctor", "score", *look[2:], "--detector", trained, "--out", tmp_path / "again")
    assert len(lines(tmp_path / "again" / "scores.jsonl")) == 24
    images = torch.rand(2, 3, 96, 96, generator=generator(0, "i"))
    with torch.no_grad():                                                          # evaluate.py reads it, and sees the same
        maps = common.load_detector(trained, CPU)(images).flatten(1)
        torch.testing.assert_close(evaluate.artifacts(trained, CPU)(images), torch.stack([maps.mean(1), maps.amax(1)], 1), rtol=1e-4, atol=1e-5)


def test_the_metrics_of_a_run_by_hand(world):
    data = diffdoctor.Labelled(diffdoctor.read_labels([world / "labelled"], [TOY / "images"]), 64)
    detector = common.load_detector(TOY / "detector", CPU)
    stats, _ = diffdoctor.detector_metrics(detector, data, CPU)
    items = [data[i] for i, row in enumerate(data.rows) if row["split"] == "test" and row["source"] == "human"]
    with torch.no_grad():
        q = torch.stack([detector(image[None])[0] for image, _, _ in items]).double().numpy().clip(1e-6, 1 - 1e-6)
    p = np.stack([label[0].numpy() for _, label, _ in items]).astype(float)
    assert len(items) == 6 and stats["mse"] == pytest.approx(100 * ((p - q) ** 2).mean(), rel=1e-3)
    assert stats["kl1"] == pytest.approx(100 * np.where(p < 1, (1 - p) * np.log(np.where(p < 1, 1 - p, 1) / (1 - q)), 0).mean(), rel=1e-3)
    assert stats["mse_real"] < stats["mse"] and "kl_real" not in stats


class Killed(Exception):
    pass


def killed_after(monkeypatch, at):
    """The next run dies when it logs a later update than `at`."""
    log = common.Run.log

    def die_there(self, step, **row):
        if step > at:
            raise Killed
        log(self, step=step, **row)
    monkeypatch.setattr(common.Run, "log", die_there)
    monkeypatch.setattr(diffdoctor.Run, "log", die_there)
    return lambda: (monkeypatch.setattr(common.Run, "log", log), monkeypatch.setattr(diffdoctor.Run, "log", log))


@pytest.mark.parametrize("init", ["toy", "segformer"])
def test_resuming_a_detector_is_exact(world, tmp_path, monkeypatch, init):
    """With batch norm's statistics, and SegFormer's dropout and dropped paths, which draw from the global generator."""
    if init == "segformer":
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
        config = SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 40, 64], decoder_hidden_size=16, num_labels=1, drop_path_rate=.5)
        diffdoctor.save_detector(common.Detector(SegformerForSemanticSegmentation(config), 64), tmp_path / "segformer")
        init = tmp_path / "segformer"
    words = ["detector", "--init", init, "--data", world / "labelled", "--train_steps", 4, "--save_every", 2, "--batch_size", 4, "--lr", 1e-3,
             "--head_lr", 1e-3, "--device", "cpu"]
    torch.manual_seed(1)
    doctor(*words, "--out", tmp_path / "whole")
    torch.manual_seed(2)
    revive = killed_after(monkeypatch, 2)
    with pytest.raises(Killed):
        doctor(*words, "--out", tmp_path / "half")
    revive()
    doctor(*words, "--out", tmp_path / "half", "--resume")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "half") and [row["step"] for row in log_of(tmp_path / "half")] == [1, 2, 3, 4]
    ends = [load_file(tmp_path / name / "model" / "detector" / "model.safetensors") for name in ("whole", "half")]
    assert same(*ends) and not same(ends[0], load_file(tmp_path / "half" / "model" / "step_000002" / "detector" / "model.safetensors"))
    assert [row["lr"] for row in log_of(tmp_path / "whole")] == pytest.approx([1e-3 * .5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])


# ------------------------------------------------------------------------------------------------------------------------------------
# treating

def treat(root, out, *extra, model="sd"):
    """One run through the command line's own parser -> its folder."""
    short = ["--num_inference_steps", 4, "--batch_size", 4, "--micro_batch", 2, "--lora_rank", 4, "--lr", 1e-2, "--train_steps", 2, "--save_every", 2]
    doctor("treat", "--model", root / model, "--reward", "toy_pref", "--detector", TOY / "detector", "--prompts", root / "prompts.txt", "--test_prompts",
           root / "one.txt", "--data", TOY / "images", "--device", "cpu", *short, "--out", out, *extra)
    return Path(out)


@pytest.mark.parametrize("family", ["schnell", "sd"])
def test_resuming_a_treatment_is_exact(root, tmp_path, monkeypatch, family):
    words = ["--train_steps", 4, "--save_every", 2, "--max_drift", 99]
    torch.manual_seed(1)
    whole = treat(root, tmp_path / "whole", *words, model=family)
    torch.manual_seed(2)
    revive = killed_after(monkeypatch, 2)
    with pytest.raises(Killed):
        treat(root, tmp_path / "half", *words, model=family)
    revive()
    half = treat(root, tmp_path / "half", *words, "--resume", model=family)
    assert log_of(whole) == log_of(half) and same(weights_of(whole), weights_of(half))
    assert {"loss", "mean", "max", "offline", "grad_norm", "grad_rms"} <= log_of(half)[0].keys()
    assert {"test_mean", "test_max", "test_drift", "test_reward"} <= log_of(half)[1].keys() and log_of(half)[1]["test_drift"] > 0
    assert sorted(p.name for p in (half / "lora").glob("step_*")) == ["step_000002", "step_000004"]
    assert files(whole / "samples") == files(half / "samples") and len(files(whole / "samples")) == 3
    for row in log_of(half):
        assert row["loss"] == pytest.approx(row["mean"] + .25 * row["offline"], rel=1e-4)


def test_the_calls_of_an_update(root, tmp_path, monkeypatch):
    """N - K on the whole batch without gradient, K with it per micro-batch, one more for the regulariser; not that one without gamma."""
    calls, load = [], diffdoctor.load_model

    def watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.denoiser.register_forward_pre_hook(lambda m, a, k: calls.append((len(a[0]), torch.is_grad_enabled())), with_kwargs=True)
        return model
    monkeypatch.setattr(diffdoctor, "load_model", watched)
    monkeypatch.setattr(diffdoctor, "held_out_confidence", lambda *a, **k: (dict(test_mean=.5, test_max=.5, test_drift=0., test_reward=0.), None))
    treat(root, tmp_path / "a", "--grad_steps", 3, "--train_steps", 1, "--guidance_scale", 1)
    assert Counter(calls) == {(4, False): 1, (2, True): 2 * (3 + 1)}
    calls.clear()
    treat(root, tmp_path / "b", "--gamma", 0, "--train_steps", 1, "--guidance_scale", 1)
    assert Counter(calls) == {(4, False): 3, (2, True): 2} and "offline" not in log_of(tmp_path / "b")[0]
    calls.clear()
    treat(root, tmp_path / "c", "--guidance_scale", 2, "--train_steps", 1)
    assert Counter(calls) == {(8, False): 3, (4, True): 2, (2, True): 2}            # the regulariser is not guided


def test_micro_batches_do_not_change_an_update_and_its_run_can_be_sampled(root, tmp_path, capsys):
    a, b = (treat(root, tmp_path / str(n), "--micro_batch", n, model="dev") for n in (4, 3))
    for x, y in zip(log_of(a), log_of(b)):
        assert all(x[k] == pytest.approx(y[k], rel=1e-3) for k in ("loss", "mean", "max", "offline", "grad_norm"))
    config = json.loads((a / "config.json").read_text())
    assert config["sampler"] == dict(scheduler="euler", eta=0., num_inference_steps=4, guidance_scale=3.5)
    capsys.readouterr()
    run("combined_sample", "--lora", a, "--num_images", 2, "--out", tmp_path / "images")                  # samples as it was trained
    assert "guidance_scale       3.5\n" in capsys.readouterr().out and (tmp_path / "images" / "00000_01.png").is_file()
    assert treat(root, tmp_path / "sdxl", "--train_steps", 1, model="sdxl").is_dir()


@pytest.mark.parametrize("pixels", ["mean", "max", "threshold"])
def test_a_small_step_against_the_gradient_lowers_the_confidence(root, pixels):
    """On the same noise, by what the gradient promises: the loss's sign and scale are right."""
    model = load_model(str(root / "schnell"), CPU)
    params, scheduler, detector = trainable(model, 4), make_scheduler(model, "euler", 5), common.load_detector(TOY / "detector", CPU)
    args, cond = SimpleNamespace(grad_steps=1, guidance_scale=1.), condition(model, PROMPTS)
    latents = sample(model, scheduler, initial_latents(model, [generator(0, "x", i) for i in range(3)]), cond, 0, 4, None)

    def loss():
        return diffdoctor.pixel_loss(diffdoctor.treat_step(model, scheduler, detector, latents, cond, None, args, None), pixels)
    before = loss()
    grads = torch.autograd.grad(before, params)
    size = sum(g.square().sum() for g in grads)
    for p, g in zip(params, grads):
        p.data -= 1e-3 / size * g
    assert (before - loss()).item() == pytest.approx(1e-3, rel=.3 if pixels == "mean" else .7)      # a pixel may cross the threshold, or another be the largest


def test_it_stops_early_and_stays_stopped(root, tmp_path, capsys):
    words = ["--train_steps", 8, "--save_every", 1, "--max_drift", 1e-6]
    out = treat(root, tmp_path / "run", *words, model="schnell")
    assert "is beyond --max_drift" in capsys.readouterr().out and len(log_of(out)) == 1 and (out / "lora" / "step_000001").is_dir()
    treat(root, tmp_path / "run", *words, "--resume", model="schnell")
    assert "stopped: drift" in capsys.readouterr().out and len(log_of(out)) == 1


def test_an_instance_lora_is_continued(root, tmp_path, capsys):
    """Section 4.3: a LoRA that learned an instance from pictures is treated on instance and class prompts: it starts there, drift is from there."""
    model = load_model(str(root / "schnell"), CPU)
    params, times = trainable(model, 4), make_scheduler(model, "euler", 1000)
    optimizer, pictures = torch.optim.AdamW(params, lr=1e-2), torch.rand(1, 3, 16, 16, generator=generator(0, "instance")).expand(4, -1, -1, -1)
    x0, cond, losses = encode(model, pictures), condition(model, ["a purple heart"] * 4), []
    for step in range(40):
        g = generator(0, "dreambooth", step)
        t = times.timesteps[torch.randint(1000, (4,), generator=g)]
        loss = diffdoctor.offline_loss(model, times, x0, torch.randn(x0.shape, generator=g), t, cond)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < .9 * sum(losses[:10])
    common.save_weights(model, tmp_path / "instance", 4)
    sampler = dict(scheduler="euler", eta=0., num_inference_steps=4, guidance_scale=1.)
    mean = common.load_detector(TOY / "detector", CPU)(generate(model, ["a red star"], 0, sampler, 2, purpose="held-out")).mean()

    (tmp_path / "instance.txt").write_text("a purple heart\na heart above a blue square\n")
    out = treat(root, tmp_path / "treated", "--init_lora", tmp_path / "instance", "--prompts", tmp_path / "instance.txt", "--lr", 1e-6, "--max_drift", 99,
                model="schnell")
    a, b = load_file(tmp_path / "instance" / "pytorch_lora_weights.safetensors"), weights_of(out)
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 1e-5 for k in a) and not same(a, b)
    assert log_of(out)[-1]["test_drift"] < .1 and f"before: mean {mean:.2%}" in capsys.readouterr().out


def test_no_signal_is_said(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diffdoctor, "load_detector", lambda *_: lambda images: .01 * images.mean(1))
    treat(root, tmp_path / "run", model="schnell")
    assert "no signal, no gradient" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------------------------
# bad input: one line, exit status 2, nothing half-written

def test_bad_values(root, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in dict(empty="", odd='{"file_name": 3}', out='{"file_name": "../a.png", "split": "train", "source": "human"}',
                           absent='{"file_name": "a.png", "split": "train", "source": "human"}',
                           real='{"file_name": "a.png", "split": "train", "source": "real"}').items():
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "meta.jsonl").write_text(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "real" / "images" / "a.png")
    for name, maps in dict(small=Image.new("L", (4, 4)), deep=Image.new("I;16", (8, 8)), red=Image.new("RGB", (8, 8), (255, 0, 0)), none=None,
                           text=b"no image").items():
        (tmp_path / name / "images").mkdir(parents=True), (tmp_path / name / "maps").mkdir()
        (tmp_path / name / "meta.jsonl").write_text('{"file_name": "a.png", "split": "train", "source": "human"}')
        Image.new("RGB", (8, 8)).save(tmp_path / name / "images" / "a.png")
        if maps is not None:
            maps.save(tmp_path / name / "maps" / "a.png") if not isinstance(maps, bytes) else (tmp_path / name / "maps" / "a.png").write_bytes(maps)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "scores.jsonl").write_text('{"file_name": "other.png", "category": "x", "mean": 1, "max": 1, "abnormal": true}\n')
    (tmp_path / "few.txt").write_text("a red star\n")
    look = ["--detector", TOY / "detector", "--images", world / "new", "--out", "new"]
    tune = ["treat", "--model", root / "schnell", "--reward", "toy_pref"]
    whole = [*tune, "--detector", TOY / "detector", "--prompts", root / "prompts.txt", "--test_prompts", root / "one.txt", "--gamma", 0]
    table = [
        ([], ["command"]),
        (["heal"], ["heal", "export_hard"]),
        (["treat", "--grad_step", 1], ["--grad_steps"]),
        (["treat", "--grad_steps", 21], ["num_inference_steps = 20"]),
        (["treat", "--grad_steps", 0], ["--grad_steps 0"]),
        (["treat", "--pixels", "most"], ["threshold"]),
        (["treat", "--gamma", -1], ["--gamma -1"]),
        (["treat", "--gamma", "nan"], ["gamma is 0 or more"]),
        (["treat", "--patience", 0], ["--patience 0"]),
        (["treat", "--max_drift", 0], ["--max_drift 0"]),
        (["treat", "--model", "flux"], ["flux-schnell"]),
        (["treat", "--detector", "nowhere/at/all"], ["nowhere/at/all"]),
        (["treat", "--detector", root / "one.txt"], ["one.txt"]),
        (["treat", "--detector", TOY / "clip"], ["CLIPConfig"]),
        (["treat", "--data", "nowhere"], ["nowhere"]),
        (tune, ["--detector is needed"]),
        ([*tune, "--detector", TOY / "detector"], ["--prompts is needed"]),
        ([*tune, "--detector", TOY / "detector", "--prompts", "few.txt"], ["--data is needed", "--gamma 0"]),
        ([*tune, "--detector", TOY / "detector", "--prompts", "few.txt", "--gamma", 0], ["few.txt", "last 100", "--test_prompts"]),
        ([*whole, "--lora_rank", 0], ["LoRA"]),
        ([*whole, "--resume", "--out", "new"], ["no checkpoint"]),
        (["score", *look[:4], "--out", "full"], ["full", "not an empty folder"]),
        (["score", *look[:2], "--images", "nowhere", "--out", "new"], ["metadata.jsonl"]),
        (["score", "--images", world / "new", "--out", "new"], ["--detector"]),
        (["export_hard", *look, "--scores", "nowhere"], ["scores.jsonl"]),
        (["export_hard", *look, "--scores", "full"], ["other.png"]),
        (["export_hard", *look, "--scores", "full", "--categories", "y"], ["no image of y"]),
        (["export_hard", *look, "--scores", "full", "--threshold", 2], ["--threshold 2"]),
        (["import_labels", "--labels", "nowhere", "--out", "new"], ["meta.jsonl", "No such file"]),
        (["import_labels", "--labels", "empty", "--out", "new"], ["no image in it"]),
        (["import_labels", "--labels", "odd", "--out", "new"], ["line 1", "is expected"]),
        (["import_labels", "--labels", "out", "--out", "new"], ["outside the folder"]),
        (["import_labels", "--labels", "small", "--out", "new"], ["4 x 4", "8 x 8"]),
        (["import_labels", "--labels", "red", "--out", "new"], ["colours"]),
        (["import_labels", "--labels", "deep", "--out", "new"], ["8-bit grey"]),
        (["import_labels", "--labels", "none", "--out", "new"], ["missing"]),
        (["import_labels", "--labels", "text", "--out", "new"], ["not a readable image"]),
        (["pseudo", *look, "--exclude", "nowhere"], ["nowhere", "meta.jsonl"]),
        (["detector", "--out", "new"], ["--data"]),
        (["detector", "--data", "absent", "--out", "new"], ["a.png is missing"]),
        (["detector", "--data", "real", "--out", "new"], ["no true label"]),
        (["detector", "--data", world / "labelled", "--real", "nowhere", "--out", "new"], ["nowhere"]),
        (["detector", "--data", world / "labelled", "--init", "nowhere/at", "--out", "new"], ["nowhere/at"]),
        (["detector", "--data", world / "labelled", "--lr", 2, "--out", "new"], ["--lr 2"]),
        (["detector", "--data", world / "labelled", "--size", 0, "--out", "new"], ["--size 0"]),
        (["detector", "--data", world / "labelled", "--train_steps", 0, "--out", "new"], ["--train_steps 0"]),
        (["detector", "--data", world / "labelled", "--resume", "--out", "new"], ["no checkpoint"]),
    ]
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    problems = []
    for argv, words in table:
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                doctor(*argv)
            told = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
            if stop.value.code != 2 or len(told) != 1 or not all(w in told[0] for w in words):
                problems.append((argv, told))
        except BaseException as e:                                        # show the whole table at once
            problems.append((argv, f"{type(e).__name__}: {e}"))
    assert not problems, "\n".join(map(str, problems))
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs").exists()


def test_the_commands_of_the_docstring_parse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in diffdoctor.COMMANDS:
        with pytest.raises(SystemExit) as e:
            diffdoctor.parse_args([command, "--help"])
        assert e.value.code == 0 and "--out" in capsys.readouterr().out
    said = [line.split("#")[0].split("diffdoctor.py ", 1)[1].split() for line in diffdoctor.__doc__.splitlines() if line.startswith("  $ ")]
    assert {words[0] for words in said} == diffdoctor.COMMANDS.keys()
    for words in said:
        assert diffdoctor.parse_args(words).command == words[0]


def test_the_toy_run_through_the_command_line(tmp_path, capsys):
    run("diffdoctor", "treat", "--train_steps", 1, "--batch_size", 2, "--num_inference_steps", 5, "--out", tmp_path / "run", "--device", "cpu")
    told = capsys.readouterr().out
    assert "held-out artifact confidence before: mean" in told and "toy_pref" in told and "the best snapshot" in told
    assert Image.open(tmp_path / "run" / "samples" / "step_000001.png").size[0] > 0
    (tmp_path / "one.txt").write_text("a red star\n")
    run("combined_sample", "--lora", tmp_path / "run", "--prompts", tmp_path / "one.txt", "--num_images", 1, "--out", tmp_path / "images")
    assert (tmp_path / "images" / "00000_00.png").is_file()
