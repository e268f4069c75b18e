"""How fast the scripts are. Not part of the test run.

  $ python tests/bench.py cpu                    # an update of each script beside a loop written by hand: ratios of thread time; minutes on one core
  $ python tests/bench.py sweep                  # ReFL over batch, steps and resolution, Focus-N-Fix over K; bytes that a gradient step saves
  $ python tests/bench.py cuda                   # full-size models with random weights made on the GPU: ms, images/s, TFLOP/s, MFU, memory, phases
  $ python tests/bench.py cuda --tiny --device cpu          # the same code on narrow models; its numbers mean nothing

The scripts' own loops run, each update between two clocks; held-out sampling is left out. cpu and sweep take the toy model, one thread, and pairs A B A
B in one process; a ratio is that of the medians. The loops written by hand use plain torch and diffusers, peft's LoRA, and no function of common.py;
they encode prompts once, run the prefix on the whole batch, and fold the LoRA for it by diffusers' fuse_lora (not in D-Fusion), as the scripts do.

The last public trainer that backpropagates a reward is TRL 0.23.1's AlignPropTrainer. It wants older libraries, so it gets an environment of its own:

  $ python3 -m venv trl && trl/bin/pip install trl==0.23.1 diffusers==0.35.1 transformers==4.56.2 peft==0.17.1 accelerate==1.10.1 torch==2.8.0
  $ trl/bin/python tests/bench.py trl            # its update, beside the loop written by hand on modules of the same weights
"""
import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (AutoModelForSemanticSegmentation, CLIPModel, CLIPTextModel, PreTrainedTokenizerFast, SegformerConfig,
                          SegformerForSemanticSegmentation)

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BARS = dict(refl="refl", imagerefl="imagerefl", diffdoctor="treat", focus_n_fix="focus_n_fix", dfusion_dpo="dfusion_dpo")     # of the training loops


@contextlib.contextmanager
def replaced(module, **values):
    """Inside, these names of the module, of those that it has, are these values."""
    old = {name: getattr(module, name) for name in values if hasattr(module, name)}
    try:
        for name in old:
            setattr(module, name, values[name])
        yield
    finally:
        for name in old:
            setattr(module, name, old[name])


def updates(script, argv, around, **stand_ins):
    """Runs a script's main; around(step) is a context that each update of its loop runs in. Held-out sampling is left out."""
    module = importlib.import_module(script)

    class Bar(tqdm):
        def __iter__(self):
            for step in self.iterable:
                with around(step) if self.desc == BARS[script] else contextlib.nullcontext():
                    yield step

    before = torch.zeros(1, 3, 8, 8)
    stand_ins = dict(tqdm=lambda *a, **k: Bar(*a, **k, file=io.StringIO()), held_out=lambda *a, **k: 0., compare=lambda *a, **k: {}, held_out_confidence=lambda
                     *a, **k: (dict(test_mean=0., test_max=1., test_drift=0., test_reward=0.), before), **stand_ins)
    with tempfile.TemporaryDirectory() as out, replaced(module, **stand_ins), contextlib.redirect_stdout(io.StringIO()):
        module.main(module.parse_args([*(["treat"] if script == "diffdoctor" else []), *map(str, argv), "--save_every", "1000000", "--out", f"{out}/run"]))


# ------------------------------------------------------------------------------------------------------------------------------------
# the loops written by hand


class Plain:
    """The toy model's modules as diffusers and transformers load them, with a LoRA; what each loop below needs and no more."""

    def __init__(self, rank, scheduler, steps, lr=1e-3, images=8):
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel.from_pretrained(TOY / "sd" / "unet", torch_dtype=torch.float32).requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(TOY / "sd" / "vae", torch_dtype=torch.float32).requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        self.params = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, eps=1e-15, fused=True)
        betas = json.loads((TOY / "sd" / "scheduler" / "scheduler_config.json").read_text())
        self.scheduler = scheduler.from_config(betas, timestep_spacing="leading", steps_offset=1, clip_sample=False)
        self.scheduler.set_timesteps(steps)
        self.timesteps = self.scheduler.timesteps
        self.clip = CLIPModel.from_pretrained(TOY / "pref", dtype=torch.float32).eval().requires_grad_(False)
        self.detector = AutoModelForSemanticSegmentation.from_pretrained(TOY / "detector", dtype=torch.float32).eval().requires_grad_(False)
        prompts, rows = (TOY / "prompts_train.txt").read_text().splitlines(), (TOY / "images" / "metadata.jsonl").read_text().splitlines()
        self.files = [TOY / "images" / json.loads(row)["file_name"] for row in rows]
        with torch.no_grad():
            texts = CLIPTextModel.from_pretrained(TOY / "sd" / "text_encoder", dtype=torch.float32)
            self.texts = texts(self.ids(TOY / "sd" / "tokenizer", prompts[:images])).last_hidden_state
            self.empty = texts(self.ids(TOY / "sd" / "tokenizer", [""])).last_hidden_state.expand(images, -1, -1)
            ids = self.ids(TOY / "pref", prompts[:images])
            at = ids.argmax(-1) if self.clip.config.text_config.eos_token_id == 2 else (ids == self.clip.config.text_config.eos_token_id).int().argmax(-1)
            pooled = self.clip.text_model(ids).last_hidden_state[torch.arange(images), at]
            self.wanted = F.normalize(self.clip.text_projection(pooled), dim=-1)

    @staticmethod
    def ids(folder, prompts):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token=config["pad_token"])
        return tokenizer(prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids

    def noise(self, n):
        return torch.randn(n, 4, 16, 16)

    def eps(self, x, t, at, guidance=1.):
        """The U-Net's output for the prompts of a slice."""
        if guidance == 1:
            return self.unet(x, t, self.texts[at]).sample
        both = self.unet(torch.cat([x, x]), t if t.ndim == 0 else torch.cat([t, t]), torch.cat([self.empty[at], self.texts[at]])).sample
        u, c = both.chunk(2)
        return u + guidance * (c - u)

    def x0(self, v, t, x):
        a = self.scheduler.alphas_cumprod[t]
        return a ** .5 * x - (1 - a) ** .5 * v

    @torch.no_grad()
    def prefix(self, x, first, last, guidance=1.):
        self.unet.fuse_lora()
        for t in self.timesteps[first:last]:
            x = self.scheduler.step(self.eps(x, t, slice(len(x)), guidance), t, x).prev_sample
        self.unet.unfuse_lora()
        return x

    def picture(self, x):
        return (self.vae.decode(x).sample / 2 + .5).clamp(0, 1)           # the toy VAE's scaling factor is 1

    def reward(self, images, at):
        pixels = (images - self.mean) / self.std
        features = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        return self.clip.logit_scale.exp() * (F.normalize(features, dim=-1) * self.wanted[at]).sum(-1)

    mean, std = torch.tensor([.48145466, .4578275, .40821073]).view(3, 1, 1), torch.tensor([.26862954, .26130258, .27577711]).view(3, 1, 1)

    def artifacts(self, images):
        pixels = (images - torch.tensor([.485, .456, .406]).view(3, 1, 1)) / torch.tensor([.229, .224, .225]).view(3, 1, 1)
        return F.interpolate(self.detector(pixels).logits, images.shape[2:], mode="bilinear")[:, 0].sigmoid()

    @torch.no_grad()
    def real_latents(self, n):
        """n images read from the disk, encoded."""
        chosen = [self.files[i] for i in torch.randint(len(self.files), (n,))]
        images = [torch.frombuffer(bytearray(Image.open(f).convert("RGB").tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1) / 255 for f in chosen]
        return self.vae.encode(torch.stack(images) * 2 - 1).latent_dist.mean

    def update(self, clip=None):
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()


def refl(p, batch=8, mid=16):
    x, t = p.prefix(p.noise(batch), 0, mid), p.timesteps[mid]
    r = p.reward(p.picture(p.x0(p.eps(x, t, slice(batch)), t, x)), slice(batch))
    (-1e-3 * ((r - 3) / 13).mean()).backward()
    p.update()


def imagerefl(p, batch=8, start=12, mid=16):
    x0, noise, t = p.real_latents(batch), p.noise(batch), p.timesteps[mid]
    noised = p.scheduler.add_noise(x0, noise, p.timesteps[start])
    x = p.prefix(noised, start, mid)
    r = p.reward(p.picture(p.x0(p.eps(x, t, slice(batch)), t, x)), slice(batch))
    (-1e-3 * ((r - 3) / 13).mean()).backward()
    target = p.scheduler.get_velocity(x0, noise, p.timesteps[start].expand(batch))
    (1e-5 * F.mse_loss(p.eps(noised, p.timesteps[start], slice(batch)), target)).backward()
    p.update()


def treat(p, batch=8):
    x, t = p.prefix(p.noise(batch), 0, 19), p.timesteps[19]
    x = p.scheduler.step(p.eps(x, t, slice(batch)), t, x).prev_sample
    p.artifacts(p.picture(x)).mean().backward()
    x0, noise, t = p.real_latents(batch), p.noise(batch), torch.randint(1000, (batch,))
    v = p.eps(p.scheduler.add_noise(x0, noise, t), t, slice(batch))
    (.25 * F.mse_loss(v, p.scheduler.get_velocity(x0, noise, t))).backward()
    p.update()


def focus(p, batch=8, base=torch.rand(8, 3, 64, 64), mask=(torch.rand(8, 1, 64, 64) > .8).float()):
    x = p.prefix(p.noise(batch), 0, 8, 4.)
    for t in p.timesteps[8:]:
        x = p.scheduler.step(p.eps(x, t, slice(batch), 4.), t, x).prev_sample
    images = p.picture(x)
    held = torch.linalg.vector_norm(((1 - mask) * (images - base)).flatten(1), dim=1) / (3 * (1 - mask).flatten(1).sum(1)).sqrt()
    (p.artifacts(images).mean((1, 2)) + .5 * held).mean().backward()
    p.update(1.)


def dpo(p, couples=16, together=4, latents=torch.randn(2, 16, 4, 16, 16)):
    """One inner update on couples of (pair, timestep); together: so many couples in a forward. 1 is how ddpo-pytorch trains by default: one
    timestep of one trajectory (DPO: of its two) at a time."""
    a_of, ahead = p.scheduler.alphas_cumprod, 1000 // len(p.timesteps)
    for i in range(0, couples, together):
        x, x_prev = latents[:, i:i + together].flatten(0, 1), latents[:, i:i + together].flatten(0, 1) + .1
        t = p.timesteps[torch.arange(i, i + together) % (len(p.timesteps) - 1)].repeat(2)
        a, b = a_of[t].view(-1, 1, 1, 1), a_of[t - ahead].view(-1, 1, 1, 1)
        v = p.eps(x, t, torch.arange(2 * together) % len(p.texts), 5.)
        variance = (1 - b) / (1 - a) * (1 - a / b)
        x0 = a.sqrt() * x - (1 - a).sqrt() * v
        mu = b.sqrt() * x0 + (1 - b - variance).sqrt() * (x - a.sqrt() * x0) / (1 - a).sqrt()
        log_prob = (-(x_prev - mu) ** 2 / (2 * variance) - variance.sqrt().log()).mean((1, 2, 3))
        a, b = (log_prob - log_prob.detach()).chunk(2)
        (-F.logsigmoid(.1 * (a - b)).mean() * together / couples).backward()
    p.update(1.)


# ------------------------------------------------------------------------------------------------------------------------------------
# cpu, sweep, trl


def timed(f):
    start = time.thread_time()
    f()
    return time.thread_time() - start


def against(script, argv, *hands, pairs=8):
    """-> seconds of the script's update, and of each function in `hands`, measured in turn: medians over `pairs`, after one to warm up."""
    times = []

    @contextlib.contextmanager
    def around(step):
        start = time.thread_time()
        yield
        times.append([time.thread_time() - start, *map(timed, hands)])

    updates(script, [*argv, "--train_steps", pairs + 2, "--device", "cpu"], around)
    return [statistics.median(column) for column in zip(*times[1:-1])]    # the last one also saves


def cpu(pairs):
    torch.set_num_threads(1)
    fixed = ["--first_mid", 16, "--last_mid", 16]
    guided = ["--num_inference_steps", 20, "--guidance_scale", 5, "--trained_steps", "20-6"]
    rounds = [*guided, "--batch_size", 16, "--inner_epochs", pairs + 2, "--train_timesteps", 2]       # 8 pairs, 2 timesteps of each
    cases = {  # name: script, its flags, loops written by hand
        "refl": ("refl", fixed, Plain(8, DDPMScheduler, 20), refl),
        "refl, 1 image": ("refl", [*fixed, "--batch_size", 1], Plain(8, DDPMScheduler, 20), lambda p: refl(p, 1)),
        "imagerefl": ("imagerefl", [*fixed, "--refl_every", 0], Plain(8, DDPMScheduler, 20), imagerefl),
        "diffdoctor treat": ("diffdoctor", ["--grad_steps", 1], Plain(8, DDPMScheduler, 20), treat),
        "focus_n_fix": ("focus_n_fix", ["--pool", 8], Plain(16, DDIMScheduler, 10), focus),
        "dfusion_dpo, inner update": ("dfusion_dpo", rounds, Plain(8, DDIMScheduler, 20), dpo, lambda p: dpo(p, together=1)),
    }
    print(f"{'update of':<28}{'script s':>10}{'by hand s':>11}{'ratio':>8}")
    for name, (script, argv, plain, *hands) in cases.items():
        ours, *theirs = against(script, argv, *(lambda hand=hand: hand(plain) for hand in hands), pairs=pairs)
        print(f"{name:<28}{ours:>10.3f}{theirs[0]:>11.3f}{ours / theirs[0]:>8.3f}")
        if len(theirs) > 1:
            print(f"{'  a timestep at a time, as ddpo-pytorch trains':<48}{theirs[1]:.3f} s, {theirs[1] / ours:.2f} times the script's")


def trl(pairs, steps=20, batch=8):
    """AlignPropTrainer's update beside the loop written by hand: 20 DDIM steps with eta 1, the last one with gradient, guidance 5:
    with 1 it cannot run, its pipeline then gets the unconditional embeddings all the same and its U-Net twice as many states as latents."""
    from accelerate import PartialState
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
    torch.set_num_threads(1)
    PartialState(cpu=True)                                                # its pipeline logs before its trainer has made one
    p = Plain(4, DDIMScheduler, steps)

    def hand():
        x = p.noise(batch)
        with torch.no_grad():
            for t in p.timesteps[:-1]:
                x = p.scheduler.step(p.eps(x, t, slice(batch), 5.), t, x, eta=1.).prev_sample
        t = p.timesteps[-1]
        x = p.scheduler.step(p.eps(x, t, slice(batch), 5.), t, x, eta=1.).prev_sample
        (10 - p.reward(p.picture(x), slice(batch)).mean()).backward()
        p.update(1.)

    with tempfile.TemporaryDirectory() as folder:                         # the toy model with a tokenizer that older libraries read
        config = json.loads((TOY / "sd" / "tokenizer" / "tokenizer_config.json").read_text())
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOY / "sd" / "tokenizer" / "tokenizer.json"), pad_token=config["pad_token"], model_max_length=12)
        StableDiffusionPipeline(
            unet=UNet2DConditionModel.from_pretrained(TOY / "sd" / "unet", torch_dtype=torch.float32), safety_checker=None, feature_extractor=None,
            vae=AutoencoderKL.from_pretrained(TOY / "sd" / "vae", torch_dtype=torch.float32), scheduler=copy.deepcopy(p.scheduler), tokenizer=tokenizer,
            text_encoder=CLIPTextModel.from_pretrained(TOY / "sd" / "text_encoder", dtype=torch.float32),
            requires_safety_checker=False).save_pretrained(folder)
        prompts = itertools.cycle((TOY / "prompts_train.txt").read_text().splitlines()[:batch])
        config = AlignPropConfig(train_batch_size=batch, sample_num_steps=steps, sample_guidance_scale=5., truncated_backprop_rand=False,
                                 truncated_backprop_timestep=steps - 1, mixed_precision="no", accelerator_kwargs=dict(cpu=True), save_freq=10 ** 6)
        trainer = AlignPropTrainer(config, lambda images, prompts, metadata: (p.reward(images, slice(batch)), {}), lambda: (next(prompts), {}),
                                   DefaultDDPOStableDiffusionPipeline(folder))
        times = [[timed(lambda i=i: trainer.step(0, i)), timed(hand)] for i in range(pairs + 1)][1:]
    theirs, ours = (statistics.median(column) for column in zip(*times))
    print(f"AlignPropTrainer {theirs:.3f} s, by hand {ours:.3f} s: ratio {theirs / ours:.3f}")


def saved_bytes(script, argv):
    """Bytes that autograd saves in the graphs of one update: each storage once, without parameters. With one micro-batch, what it holds at once."""
    saved = {}

    def pack(x):
        if not isinstance(x if x._base is None else x._base, torch.nn.Parameter):
            saved[x.untyped_storage().data_ptr()] = x                     # kept, so that no later tensor gets its address
        return x

    updates(script, [*argv, "--train_steps", 1], lambda step: torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x))
    return sum(x.untyped_storage().nbytes() for x in saved.values())


def sweep(pairs):
    torch.set_num_threads(1)
    fixed = ["--first_mid", 16, "--last_mid", 16]
    cases = [("batch", "refl", [(n, [*fixed, "--batch_size", n, "--micro_batch", 16]) for n in (1, 2, 4, 8, 16)]),
             ("steps", "refl", [(n, ["--num_inference_steps", n, "--first_mid", n - 1, "--last_mid", n - 1]) for n in (10, 20, 40)]),
             ("resolution", "refl", [(n, [*fixed, "--resolution", n, "--batch_size", 4]) for n in (32, 64, 128)]),
             ("K", "focus_n_fix", [(n, ["--grad_steps", n, "--pool", 8]) for n in (1, 2, 4, 8)])]
    print(f"{'':<24}{'s an update':>12}{'MiB saved':>11}{'with --checkpointing':>22}")
    for what, script, rows in cases:
        for n, argv in rows:
            seconds, = against(script, argv, pairs=pairs)
            saved = [saved_bytes(script, [*argv, *more]) / 2 ** 20 for more in ([], ["--checkpointing"])]
            print(f"{f'{script}, {what} {n}':<24}{seconds:>12.3f}{saved[0]:>11.1f}{saved[1]:>22.1f}")


# ------------------------------------------------------------------------------------------------------------------------------------
# cuda

TIMED, WARM_UP = 10, 3
PARAMETERS = dict(sd15=859.5e6, sdxl=2567.5e6, flux=11891.2e6)            # of the denoisers; FLUX's is schnell's
FLUX = dict(guidance_embeds=False)                                        # FLUX.1-schnell: the class's own defaults
TINY_FLUX = dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
                 pooled_projection_dim=32, axes_dims_rope=(4, 6, 6))
B5 = dict(depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, num_labels=1)
TINY_B5 = dict(depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, num_labels=1)


def build(make, device, dtype):
    """A module with weights N(0, 1/fan in) made on the device, norms about 1 and biases about 0, never zero; frozen, in eval mode."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = make()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, p in module.named_parameters():
        p.data = p.data.to(dtype).normal_() * (p[0].numel() ** -.5 if p.ndim > 1 else .1) + (p.ndim == 1 and name.endswith("weight"))
    return module.eval().requires_grad_(False)


def builders(family, tiny):
    """{part: function that builds it} of a pipeline, and the text states' shape."""
    import random_weights
    if family != "flux":
        parts = random_weights.modules(family, not tiny, len(random_weights.clip_tokenizer(not tiny)))
        width = (random_weights.SMALL if tiny else random_weights.FULL)[family]["unet"]["cross_attention_dim"]
        return parts, [(77, width), (32 if tiny else 1280,)][:2 if family == "sdxl" else 1]
    vae = dict(block_out_channels=(8, 8, 16, 16) if tiny else (128, 256, 512, 512), norm_num_groups=4 if tiny else 32, latent_channels=4 if tiny else 16)
    parts = dict(transformer=lambda: FluxTransformer2DModel(**(TINY_FLUX if tiny else FLUX)), vae=lambda: AutoencoderKL(
        **vae, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, scaling_factor=.3611,
        shift_factor=.1159, use_quant_conv=False, use_post_quant_conv=False))
    return parts, [(256, 32), (32,)] if tiny else [(256, 4096), (768,)]


def random_model(family, device, resolution, tiny):
    """A common.Model of published size with random weights; its embeddings are drawn when they are asked for."""
    import common
    import random_weights
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusionXLPipeline
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parts, shapes = builders(family, tiny)
    parts = {k: build(make, device, dtype) for k, make in parts.items() if not k.startswith("text")}
    betas = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    absent = dict(text_encoder=None, tokenizer=random_weights.clip_tokenizer(True))
    if family == "flux":
        pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None, **absent, **parts)
    elif family == "sdxl":
        pipe = StableDiffusionXLPipeline(scheduler=DDIMScheduler(**betas), text_encoder_2=None, tokenizer_2=None, **absent, **parts)
    else:
        pipe = StableDiffusionPipeline(scheduler=DDIMScheduler(**betas), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
                                       **absent, **parts)
    denoiser = parts["transformer" if family == "flux" else "unet"]
    if not tiny and abs(sum(p.numel() for p in denoiser.parameters()) / PARAMETERS[family] - 1) > .001:
        raise SystemExit(f"{family}: not the published size")

    class Embeds(dict):
        def __contains__(self, prompt):
            return True

        def __missing__(self, prompt):
            self[prompt] = tuple(torch.randn(shape, dtype=dtype) for shape in shapes)
            return self[prompt]

    if device.type == "cuda":
        for part in parts.values():
            part.to(memory_format=torch.channels_last)                    # as load_model has it
    return common.Model(pipe, denoiser, family, device, dtype, resolution, embeds=Embeds())


def random_reward(device, tiny):
    """PickScore's network (CLIP ViT-H/14), random."""
    import common
    import random_weights
    reward = object.__new__(common.PickScore)
    reward.clip = build(lambda: CLIPModel(random_weights.clip_h_config(not tiny, 1000)), device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    reward.size, reward.mean, reward.std, reward.scale = reward.clip.config.vision_config.image_size, [.5] * 3, [.25] * 3, 100.
    text = F.normalize(torch.randn(reward.clip.config.projection_dim, device=device), dim=-1)
    reward.text = lambda prompt: text
    return reward


class Clock:
    """A line of time: each mark ends a phase and names the next one. On a GPU the marks are events, which the backward pass sets too."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self, phase):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((phase, event if self.cuda else time.perf_counter()))

    def phases(self):
        """-> {phase: ms} since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        out = {}
        for (phase, start), (_, end) in itertools.pairwise(self.marks):
            out[phase] = out.get(phase, 0.) + (start.elapsed_time(end) if self.cuda else 1e3 * (end - start))
        self.marks.clear()
        return out

    def watch(self, f, before, after=None, backward=None):
        """f with marks: before it, after it, and where the gradient arrives at its input or its output (`backward`: the phase that this starts)."""
        def watched(model, x, *args, **kwargs):
            self.mark("gradient" if before == "denoiser" and torch.is_grad_enabled() else "prefix" if before == "denoiser" else before)
            if backward and x.requires_grad:
                x.register_hook(lambda g: self.mark(backward))
            out = f(model, x, *args, **kwargs)
            if after:
                self.mark(after)
                if out.requires_grad:
                    out.register_hook(lambda g: self.mark(before))
            return out
        return watched


def measure(name, script, argv, model, reward, detector, images, device, flops=None):
    """Runs WARM_UP + TIMED updates of a script and prints a row; returns FLOPs of an update, counted in the second one unless given."""
    import common
    clock, rows, peak = Clock(device), [], 0
    decode, denoise, encode = (clock.watch(getattr(common, f), *how) for f, *how in (
        ("decode", "VAE", "reward", "gradient"), ("denoise", "denoiser"), ("encode", "VAE", "prefix")))

    @contextlib.contextmanager
    def around(step):
        nonlocal flops, peak
        counter = FlopCounterMode(display=False) if step == 2 and flops is None else contextlib.nullcontext()
        if device.type == "cuda" and step == WARM_UP + 1:
            torch.cuda.reset_peak_memory_stats()
        with counter:
            clock.mark("prefix")
            yield
            clock.mark("end")
        if step == 2 and flops is None:
            flops = counter.get_total_flops()
        phases = clock.phases()
        if WARM_UP < step <= WARM_UP + TIMED:
            rows.append(phases)
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0

    captions = [f"a photograph of thing {i}" for i in range(64)]
    pixels = torch.rand(images, 3, model.resolution, model.resolution)
    stand_ins = dict(load_model=lambda *a, **k: model, load_reward=lambda *a: (reward, common.REWARDS["pick"]), load_detector=lambda *a: detector,
                     encode_once=lambda *a: None, decode=decode, denoise=denoise, encode=encode, image_data=lambda *a: Data(captions),
                     image_batches=lambda data, indices, **k: ((pixels, captions[:images]) for _ in indices))
    with tempfile.TemporaryDirectory() as folder, replaced(common, denoise=denoise, decode=decode):
        for name_of_file, lines in (("train", captions), ("test", captions[:2])):
            (Path(folder) / name_of_file).write_text("\n".join(lines))
        files = ["--test_prompts", f"{folder}/test"] + ([] if script == "dfusion_dpo" else ["--prompts", f"{folder}/train"])
        updates(script, [*argv, *files, "--train_steps", WARM_UP + TIMED + 1, "--device", device], around, **stand_ins)
    ms = {phase: statistics.median(row.get(phase, 0.) for row in rows) for phase in rows[0]}
    report(name, sum(ms.values()), images, flops, peak, ms)
    return flops


class Data:
    """Stands for a folder of images: only its size and captions are asked for."""
    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)


RATE = [0.]                                                               # TFLOP/s of a large matmul, measured first


def report(name, ms, images, flops, peak, phases):
    split = "  ".join(f"{phase} {100 * value / ms:.0f}%" for phase, value in phases.items())
    print(f"{name:<46}{ms:>9.0f}{images / ms * 1e3:>9.2f}{flops / 1e12:>9.1f}{flops / ms / 1e9:>9.1f}{100 * flops / ms / 1e9 / RATE[0]:>7.1f}"
          f"{peak / 2 ** 30:>7.1f}  {split}", flush=True)


def matmul_rate(device, tiny):
    """TFLOP/s of a large matmul: what this device can do."""
    n, clock = 256 if tiny else 8192, Clock(device)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    clock.mark("matmul")
    for _ in range(50):
        a @ b
    clock.mark("end")
    return 50 * 2 * n ** 3 / clock.phases()["matmul"] / 1e9


def public(model, text_encoder, reward, images, device, steps, mid, micro=4):
    """ReFL as public loops have it: prompts encoded in every update, the LoRA wrapped, prefix and gradient in batches of `micro`, the VAE in fp32
    and without checkpointing, everything in the memory layout that it was loaded in."""
    unet, clock, rows, flops, peak = model.denoiser.to(memory_format=torch.contiguous_format), Clock(device), [], 0, 0
    vae = copy.deepcopy(model.vae).float().to(memory_format=torch.contiguous_format)
    unet.add_adapter(LoraConfig(r=32, lora_alpha=32, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    params = [p for p in unet.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(params, lr=3e-4)
    scheduler = DDPMScheduler.from_config(model.pipe.scheduler.config, timestep_spacing="leading")
    scheduler.set_timesteps(steps, device=device)
    for step in range(1, WARM_UP + TIMED + 1):
        if device.type == "cuda" and step == WARM_UP + 1:
            torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False) if step == 2 else contextlib.nullcontext() as counter:
            clock.mark("prefix")
            for _ in range(0, images, micro):
                with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
                    with torch.no_grad():
                        states = text_encoder(torch.randint(500, (micro, 77), device=device)).last_hidden_state
                        x = torch.randn(micro, *model.latent_shape, device=device)
                        for t in scheduler.timesteps[:mid]:
                            x = scheduler.step(unet(x, t, states).sample.float(), t, x).prev_sample
                    t = scheduler.timesteps[mid]
                    clock.mark("gradient")
                    v, a = unet(x, t, states).sample.float(), scheduler.alphas_cumprod[t.cpu()].to(device)
                x0 = (x - (1 - a).sqrt() * v) / a.sqrt()
                clock.mark("VAE")
                x0.register_hook(lambda g: clock.mark("gradient"))
                pictures = (vae.decode(x0 / vae.config.scaling_factor).sample / 2 + .5).clamp(0, 1)
                clock.mark("reward")
                pictures.register_hook(lambda g: clock.mark("VAE"))
                loss = -1e-3 * reward(pictures, [""] * micro).mean() * micro / images
                loss.backward()
                loss.item()
            optimizer.step()
            optimizer.zero_grad()
            clock.mark("end")
        flops = counter.get_total_flops() if step == 2 else flops
        phases = clock.phases()
        if step > WARM_UP:
            rows.append(phases)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    ms = {phase: statistics.median(row[phase] for row in rows) for phase in rows[0]}
    report(f"public way, ReFL, {images} images, prefix of {micro}", sum(ms.values()), images, flops, peak, ms)


def cuda(device, tiny, only):
    """Every row makes its model anew, so that no row pays for another's memory."""
    import common
    RATE[0] = matmul_rate(device, tiny)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, narrow models: these numbers mean nothing" if tiny else "CPU"
    print(f"{kind}; torch {torch.__version__}; a large bf16 matmul: {RATE[0]:.3g} TFLOP/s\nmedian of {TIMED} updates after {WARM_UP}; FLOPs are those that "
          f"run, with what checkpointing runs again\n{'':<46}{'ms':>9}{'images/s':>9}{'TFLOP':>9}{'TFLOP/s':>9}{'MFU %':>7}{'GiB':>7}")
    steps, mid, small = (4, 2, 64) if tiny else (40, 34, None)
    at = ["--num_inference_steps", steps, "--first_mid", mid, "--last_mid", mid, "--reward", "pick"]
    n = 4 if tiny else 16
    few = ["--num_inference_steps", 4] if tiny else []
    rows = {  # name: family, pixels, script, images of an update, flags
        "refl": ("ReFL, SD1.5", "sd15", 512, "refl", n, [*at, "--model", "sd15"]),
        "refl_contiguous": ("ReFL, SD1.5, not channels_last", "sd15", 512, "refl", n, [*at, "--model", "sd15"]),
        "refl_compile": ("ReFL, SD1.5, --compile", "sd15", 512, "refl", n, [*at, "--model", "sd15", "--compile"]),
        "sdxl": ("ReFL, SDXL, batch 4, micro-batch 1", "sdxl", 1024, "refl", 4, [*at, "--model", "sdxl", "--micro_batch", 1]),
        "sdxl_1": ("ReFL, SDXL, batch 1", "sdxl", 1024, "refl", 1, [*at, "--model", "sdxl"]),
        "imagerefl": ("ImageReFL, SD1.5", "sd15", 512, "imagerefl", n, [*at, "--model", "sd15", "--start", 1 if tiny else 30, "--refl_every", 0]),
        "flux": ("DiffDoctor, FLUX-schnell, --checkpointing", "flux", 512, "diffdoctor", 4, [
            *(few or ["--num_inference_steps", 5]), "--model", "flux-schnell", "--reward", "pick", "--detector", "x", "--data", "x", "--micro_batch", 1,
            "--checkpointing"]),
        "focus": ("Focus-N-Fix, SD1.5, I0 kept", "sd15", 512, "focus_n_fix", 4, [*few, "--model", "sd15", "--detector", "x", "--pool", 4]),
        "dfusion": ("D-Fusion: a round of 4 pairs, an update of 5 steps", "sd15", 512, "dfusion_dpo", 4 if tiny else 8, [
            "--num_inference_steps", 4 if tiny else 20, "--model", "sd15", "--reward", "pick", "--images_per_prompt", 4 if tiny else 8, "--inner_epochs", 1,
            "--train_timesteps", 2 if tiny else 5]),
    }
    flops = None
    if only in (None, "public"):
        model, reward = random_model("sd15", device, small or 512, tiny), random_reward(device, tiny)
        text_encoder = build(builders("sd15", tiny)[0]["text_encoder"], device, model.dtype)
        public(model, text_encoder, reward, n, device, steps, mid)
        del model, reward, text_encoder
    for key, (name, family, pixels, script, images, argv) in rows.items():
        if only not in (None, key):
            continue
        model = random_model(family, device, small or pixels, tiny)
        if key == "refl_contiguous":
            model.denoiser.to(memory_format=torch.contiguous_format)
            model.vae.to(memory_format=torch.contiguous_format)
        reward, detector = None, None
        if script in ("diffdoctor", "focus_n_fix"):
            net = build(lambda: SegformerForSemanticSegmentation(SegformerConfig(**(TINY_B5 if tiny else B5))), device, torch.float32)
            detector = common.Detector(net, 64 if tiny else 512)
        if script != "focus_n_fix":
            reward = random_reward(device, tiny)
        flops = measure(name, script, [*argv, "--batch_size", images, "--resolution", small or pixels], model, reward, detector, images, device,
                        flops or 0 if key == "refl_compile" else None)         # counting would break the graphs: those of the row before
        del model, reward, detector
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", choices=("cpu", "sweep", "trl", "cuda"))
    parser.add_argument("--pairs", type=int, default=8, help="cpu, sweep, trl: measurements of each")
    parser.add_argument("--device", default="cuda", help="cuda: where to run")
    parser.add_argument("--tiny", action="store_true", help="cuda: narrow models of 64 pixels")
    parser.add_argument("--only", choices=("public", "refl", "refl_contiguous", "refl_compile", "sdxl", "sdxl_1", "imagerefl", "flux", "focus", "dfusion"),
                        help="cuda: this row alone")
    args = parser.parse_args(argv)
    if args.what == "cuda":
        from common import pick_device
        cuda(pick_device(args.device), args.tiny, args.only)
    else:
        dict(cpu=cpu, sweep=sweep, trl=trl)[args.what](args.pairs)


if __name__ == "__main__":
    main()
