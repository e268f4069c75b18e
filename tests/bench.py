"""How fast the scripts are and what memory they need. Not part of the test run.

  $ OMP_NUM_THREADS=1 python tests/bench.py cpu
        An update of each script beside the same update written by hand: seconds and their ratio.
        Three minutes on one CPU core.
  $ OMP_NUM_THREADS=1 python tests/bench.py sweep --pairs 4
        ReFL over batch size, steps and resolution, and Focus-N-Fix over K: seconds of an update,
        and MiB that autograd saves for its backward pass. Six minutes on one CPU core.
  $ python tests/bench.py cuda
        Full-size models with random weights, made on the GPU: ms, images/s, TFLOP/s, MFU, GiB, and
        how the time splits into phases. One GPU with 40 GB. We expect it to take ten minutes.
  $ python tests/bench.py cuda --only sdxl
        One row of that table.
  $ python tests/bench.py cuda --tiny --device cpu
        The same code on narrow models, to see that it runs. Its numbers mean nothing.
  $ OMP_NUM_THREADS=1 python tests/bench.py memory
        The peak memory of full-size models on a GPU, computed without one, and the settings that
        fit on cards of 12 to 80 GB (tests/memory.py). About ten minutes on an idle CPU core.
  $ python tests/bench.py memory --only refl-sd15
        One command of that table.

The scripts' own loops run, each update between two clocks, without held-out sampling. cpu and sweep
measure the toy model on one thread, in thread time. The two sides of a ratio take turns in one
process, and it is a ratio of medians. The updates written by hand use plain torch, diffusers and
peft, and no function of common.py. Like the scripts they encode prompts once, run the prefix on the
whole batch and, except in D-Fusion, fold the LoRA for it.

The last public trainer that backpropagates a reward is TRL 0.23.1's AlignPropTrainer. It needs
older libraries, so give it an environment of its own, which takes a download of several GB:

  $ python3 -m venv trl
  $ trl/bin/pip install trl==0.23.1 diffusers==0.35.1 transformers==4.56.2 peft==0.17.1 \\
        accelerate==1.10.1 torch==2.8.0
  $ trl/bin/python tests/bench.py trl --pairs 12
        Its update beside one written by hand, on modules of the same weights. A minute.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForSemanticSegmentation, CLIPModel, CLIPTextModel
from transformers import PreTrainedTokenizerFast, SegformerConfig, SegformerForSemanticSegmentation

# Modules of ours are imported where they are used: they do not run with the libraries of `trl`.
ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# What the scripts' progress bars say while they train.
TRAINING_LOOPS = ("refl", "imagerefl", "treat", "focus_n_fix", "dfusion_dpo")
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


# --------------------------------------------------------------------------------------------------
# Running the updates of a script


@contextlib.contextmanager
def replaced(module, **values):
    """Inside, these names of the module are these values. Names that it lacks are left out."""
    old = {name: getattr(module, name) for name in values if hasattr(module, name)}
    try:
        for name in old:
            setattr(module, name, values[name])
        yield
    finally:
        for name, value in old.items():
            setattr(module, name, value)


def updates(script, words, around, **stand_ins):
    """Runs the command line of a training script here, each update inside `with around(step)`.

    Held-out sampling is left out. stand_ins: values for other names of the script's module.
    """
    module = importlib.import_module(script)

    class Bar(tqdm):
        """A progress bar that prints nothing, and enters around(step) in a training loop."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options, file=io.StringIO())

        def __iter__(self):
            is_training = self.desc in TRAINING_LOOPS
            for step in self.iterable:
                with around(step) if is_training else contextlib.nullcontext():
                    yield step

    def held_out(*args, **kwargs):
        return dict(test_reward=0.0)

    def held_out_confidence(*args, **kwargs):
        stats = dict(test_mean=0.0, test_max=1.0, test_drift=0.0, test_reward=0.0)
        return stats, torch.zeros(1, 3, 8, 8)

    def compare(*args, **kwargs):
        return {}

    stand_ins.update(tqdm=Bar, held_out=held_out, compare=compare)
    stand_ins.update(held_out_confidence=held_out_confidence)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(replaced(module, **stand_ins))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        words = [*words, "--save_every", 10**6, "--out", f"{folder}/run"]
        module.main(module.parse_args([str(word) for word in words]))


# --------------------------------------------------------------------------------------------------
# Updates written by hand, on the toy model


class PlainToy:
    """The toy model and its judges as diffusers and transformers load them, with a LoRA.

    It knows the prompts of one batch, and what the updates below need of them.
    """

    clip_mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    clip_std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    imagenet_mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    imagenet_std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def __init__(self, rank, scheduler_class, num_inference_steps, lr=1e-3, num_prompts=8):
        torch.manual_seed(0)
        fp32 = dict(torch_dtype=torch.float32)
        self.unet = UNet2DConditionModel.from_pretrained(TOY / "sd" / "unet", **fp32)
        self.unet.requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(TOY / "sd" / "vae", **fp32)
        self.vae.requires_grad_(False)
        self.clip = CLIPModel.from_pretrained(TOY / "pref", dtype=torch.float32)
        self.clip.eval().requires_grad_(False)
        self.detector = AutoModelForSemanticSegmentation.from_pretrained(
            TOY / "detector", dtype=torch.float32
        )
        self.detector.eval().requires_grad_(False)

        add_lora(self.unet, rank)
        self.params = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, eps=1e-15, fused=True)
        text = (TOY / "sd" / "scheduler" / "scheduler_config.json").read_text()
        grid = dict(timestep_spacing="leading", steps_offset=1, clip_sample=False)
        self.scheduler = scheduler_class.from_config(json.loads(text), **grid)
        self.scheduler.set_timesteps(num_inference_steps)
        self.timesteps = self.scheduler.timesteps

        prompts = (TOY / "prompts_train.txt").read_text().splitlines()[:num_prompts]
        self.encode_prompts(prompts)
        rows = (TOY / "images" / "metadata.jsonl").read_text().splitlines()
        self.files = [TOY / "images" / json.loads(row)["file_name"] for row in rows]
        # What Focus-N-Fix holds the images to, and some trajectories of D-Fusion.
        self.base_images = torch.rand(8, 3, 64, 64)
        self.masks = (torch.rand(8, 1, 64, 64) > 0.8).float()
        self.latents_of_couples = torch.randn(2, 16, 4, 16, 16)

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Keeps the U-Net's text states and the reward's text features of the prompts."""
        encoder = CLIPTextModel.from_pretrained(TOY / "sd" / "text_encoder", dtype=torch.float32)
        tokenizer = TOY / "sd" / "tokenizer"
        self.states = encoder(tokenize(tokenizer, prompts)).last_hidden_state
        empty = encoder(tokenize(tokenizer, [""])).last_hidden_state
        self.empty_states = empty.expand(len(prompts), -1, -1)

        ids = tokenize(TOY / "pref", prompts)
        eos = self.clip.config.text_config.eos_token_id
        # CLIP pools at the end token. Its first configurations name a wrong one, which is 2: there
        # the end token is the largest.
        end = ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)
        pooled = self.clip.text_model(ids).last_hidden_state[torch.arange(len(prompts)), end]
        self.text_features = F.normalize(self.clip.text_projection(pooled), dim=-1)

    def noise(self, batch_size):
        return torch.randn(batch_size, 4, 16, 16)

    def denoise(self, x, t, part, guidance_scale=1.0):
        """The U-Net's output v for the prompts of a slice or of indices."""
        if guidance_scale == 1:
            return self.unet(x, t, self.states[part]).sample
        states = torch.cat([self.empty_states[part], self.states[part]])
        t_twice = t if t.ndim == 0 else torch.cat([t, t])
        v_uncond, v_cond = self.unet(torch.cat([x, x]), t_twice, states).sample.chunk(2)
        return v_uncond + guidance_scale * (v_cond - v_uncond)

    def predict_x0(self, v, t, x):
        alpha_bar = self.scheduler.alphas_cumprod[t]
        return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * v

    @torch.no_grad()
    def prefix(self, x, first, last, guidance_scale=1.0):
        """Steps first .. last - 1 of the whole batch, with the LoRA folded."""
        self.unet.fuse_lora()
        for t in self.timesteps[first:last]:
            v = self.denoise(x, t, slice(len(x)), guidance_scale)
            x = self.scheduler.step(v, t, x).prev_sample
        self.unet.unfuse_lora()
        return x

    def decode(self, x):
        # The toy VAE's scaling factor is 1.
        return (self.vae.decode(x).sample / 2 + 0.5).clamp(0, 1)

    def reward(self, images):
        """The toy preference model's logits, of images whose prompts are the first ones."""
        pixels = (images - self.clip_mean) / self.clip_std
        pooled = self.clip.vision_model(pixels).pooler_output
        features = F.normalize(self.clip.visual_projection(pooled), dim=-1)
        cosine = (features * self.text_features[: len(images)]).sum(-1)
        return self.clip.logit_scale.exp() * cosine

    def artifacts(self, images):
        pixels = (images - self.imagenet_mean) / self.imagenet_std
        logits = self.detector(pixels).logits
        return F.interpolate(logits, images.shape[2:], mode="bilinear")[:, 0].sigmoid()

    @torch.no_grad()
    def real_latents(self, batch_size):
        """Latents of images that are read from the disk."""
        images = []
        for i in torch.randint(len(self.files), (batch_size,)):
            pixels = np.array(Image.open(self.files[i]).convert("RGB"))
            images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        return self.vae.encode(torch.stack(images) * 2 - 1).latent_dist.mean

    def update(self, max_norm=math.inf):
        norm = torch.nn.utils.clip_grad_norm_(self.params, max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()


def add_lora(unet, rank):
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)
    config.init_lora_weights = "gaussian"
    unet.add_adapter(config)


def tokenize(folder, prompts):
    """Prompts -> token ids (B, 12)."""
    tokenizer = load_tokenizer(folder)
    options = dict(padding="max_length", truncation=True, max_length=12)
    return tokenizer(prompts, **options, return_tensors="pt").input_ids


def load_tokenizer(folder, **options):
    """A toy tokenizer, in a way that old and new libraries both know."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, pad_token=config["pad_token"], **options)


def refl_by_hand(toy, batch_size=8, mid=16):
    x = toy.prefix(toy.noise(batch_size), 0, mid)
    t = toy.timesteps[mid]
    v = toy.denoise(x, t, slice(batch_size))
    r = toy.reward(toy.decode(toy.predict_x0(v, t, x)))
    (-1e-3 * ((r - 3) / 13).mean()).backward()
    toy.update()


def imagerefl_by_hand(toy, batch_size=8, start=12, mid=16):
    x0 = toy.real_latents(batch_size)
    noise = toy.noise(batch_size)
    t_start = toy.timesteps[start]
    noisy_latents = toy.scheduler.add_noise(x0, noise, t_start)
    x = toy.prefix(noisy_latents, start, mid)
    t = toy.timesteps[mid]
    v = toy.denoise(x, t, slice(batch_size))
    r = toy.reward(toy.decode(toy.predict_x0(v, t, x)))
    (-1e-3 * ((r - 3) / 13).mean()).backward()
    target = toy.scheduler.get_velocity(x0, noise, t_start.expand(batch_size))
    v = toy.denoise(noisy_latents, t_start, slice(batch_size))
    (1e-5 * F.mse_loss(v, target)).backward()
    toy.update()


def treat_by_hand(toy, batch_size=8):
    x = toy.prefix(toy.noise(batch_size), 0, 19)
    t = toy.timesteps[19]
    v = toy.denoise(x, t, slice(batch_size))
    x = toy.scheduler.step(v, t, x).prev_sample
    toy.artifacts(toy.decode(x)).mean().backward()
    x0 = toy.real_latents(batch_size)
    noise = toy.noise(batch_size)
    t = torch.randint(1000, (batch_size,))
    v = toy.denoise(toy.scheduler.add_noise(x0, noise, t), t, slice(batch_size))
    (0.25 * F.mse_loss(v, toy.scheduler.get_velocity(x0, noise, t))).backward()
    toy.update()


def focus_n_fix_by_hand(toy, batch_size=8):
    x = toy.prefix(toy.noise(batch_size), 0, 8, guidance_scale=4.0)
    for t in toy.timesteps[8:]:
        v = toy.denoise(x, t, slice(batch_size), guidance_scale=4.0)
        x = toy.scheduler.step(v, t, x).prev_sample
    images = toy.decode(x)
    outside = 1 - toy.masks
    norm = torch.linalg.vector_norm((outside * (images - toy.base_images)).flatten(1), dim=1)
    change = norm / (3 * outside.flatten(1).sum(1)).sqrt()
    (toy.artifacts(images).mean((1, 2)) + 0.5 * change).mean().backward()
    toy.update(max_norm=1.0)


def dpo_by_hand(toy, num_couples=16, together=4):
    """An inner update of DPO on couples of a pair and a timestep, `together` in a forward pass.

    together=1 is how ddpo-pytorch trains by default: one timestep of one trajectory at a time, or
    here of a pair's two.
    """
    num_steps = len(toy.timesteps)
    for first in range(0, num_couples, together):
        couples = torch.arange(first, first + together)
        x = toy.latents_of_couples[:, couples].flatten(0, 1)
        next_x = x + 0.1
        t = toy.timesteps[couples % (num_steps - 1)].repeat(2)
        alpha_bar = toy.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        next_alpha_bar = toy.scheduler.alphas_cumprod[t - 1000 // num_steps].view(-1, 1, 1, 1)
        prompts = torch.arange(2 * together) % len(toy.states)
        v = toy.denoise(x, t, prompts, guidance_scale=5.0)
        variance = (1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)
        x0 = alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v
        eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        mu = next_alpha_bar.sqrt() * x0 + (1 - next_alpha_bar - variance).sqrt() * eps
        squares = (next_x - mu) ** 2 / (2 * variance)
        log_prob = (-squares - variance.sqrt().log()).mean((1, 2, 3))
        log_ratio_a, log_ratio_b = (log_prob - log_prob.detach()).chunk(2)
        loss = -F.logsigmoid(0.1 * (log_ratio_a - log_ratio_b)).mean()
        (loss * together / num_couples).backward()
    toy.update(max_norm=1.0)


# --------------------------------------------------------------------------------------------------
# cpu, sweep and trl


def timed(function):
    start = time.thread_time()
    function()
    return time.thread_time() - start


def measure_in_turn(script, words, *by_hand, pairs):
    """Seconds of the script's update and of each function in `by_hand`, which runs after it.

    They are medians of `pairs` measurements, after one to warm up.
    """
    rows = []

    @contextlib.contextmanager
    def around(step):
        start = time.thread_time()
        yield
        seconds = time.thread_time() - start
        rows.append([seconds, *[timed(function) for function in by_hand]])

    # The last update also saves, so we leave it out.
    updates(script, [*words, "--train_steps", pairs + 2, "--device", "cpu"], around)
    return [statistics.median(column) for column in zip(*rows[1:-1])]


def cpu(pairs):
    """The script's update beside the one written by hand."""
    torch.set_num_threads(1)
    late = ["--first_mid", 16, "--last_mid", 16]
    from_images = [*late, "--start", 12, "--refl_every", 0]
    # A round of 8 pairs, with 2 timesteps of each. All updates but the first are inner ones.
    one_round = ["--batch_size", 16, "--inner_epochs", pairs + 2, "--train_timesteps", 2]
    guided = ["--num_inference_steps", 20, "--guidance_scale", 5, "--trained_steps", "20-6"]
    refl_toy = PlainToy(8, DDPMScheduler, 20)
    one_image = functools.partial(refl_by_hand, batch_size=1)
    cases = [  # title, script, its flags, the toy model, the update written by hand
        ("refl", "refl", late, refl_toy, refl_by_hand),
        ("refl, 1 image", "refl", [*late, "--batch_size", 1], refl_toy, one_image),
        ("imagerefl", "imagerefl", from_images, refl_toy, imagerefl_by_hand),
        (
            "diffdoctor treat", "diffdoctor", ["treat", "--grad_steps", 1, "--gamma", 0.25],
            refl_toy, treat_by_hand,
        ),
        (
            "focus_n_fix", "focus_n_fix", ["--prefix", "tuned", "--pool", 8],
            PlainToy(16, DDIMScheduler, 10), focus_n_fix_by_hand,
        ),
        (
            "dfusion_dpo, inner update", "dfusion_dpo", [*guided, *one_round],
            PlainToy(8, DDIMScheduler, 20), dpo_by_hand,
        ),
    ]
    print(f"{'update of':<28}{'script s':>10}{'by hand s':>11}{'ratio':>8}")
    for title, script, words, toy, update in cases:
        by_hand = [functools.partial(update, toy)]
        if update is dpo_by_hand:
            by_hand.append(functools.partial(update, toy, together=1))
        ours, theirs, *alone = measure_in_turn(script, words, *by_hand, pairs=pairs)
        print(f"{title:<28}{ours:>10.3f}{theirs:>11.3f}{ours / theirs:>8.3f}")
        if alone:
            what = "  a timestep at a time, as ddpo-pytorch trains"
            print(f"{what:<48}{alone[0]:.3f} s, {alone[0] / ours:.2f} times the script's")


@contextlib.contextmanager
def kept_for_backward():
    """Inside, what autograd saves goes into the dict that this yields: each storage once.

    Parameters are left out.
    """
    kept = {}

    def pack(x):
        owner = x if x._base is None else x._base
        if not isinstance(owner, torch.nn.Parameter):
            # It holds the tensor itself, so that no later one gets its address.
            kept[x.untyped_storage().data_ptr()] = x
        return x

    def unpack(x):
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


def num_bytes(kept):
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def saved_bytes(script, words):
    """Bytes that autograd saves in one update. With one micro-batch it holds them all at once."""
    totals = []

    @contextlib.contextmanager
    def around(step):
        with kept_for_backward() as kept:
            yield
        totals.append(num_bytes(kept))

    updates(script, [*words, "--train_steps", 1], around)
    return totals[0]


def sweep(pairs):
    """How time and memory grow with batch size, steps, resolution and K."""
    torch.set_num_threads(1)
    late = ["--first_mid", 16, "--last_mid", 16]
    cases = []  # title, script, its flags
    for n in (1, 2, 4, 8, 16):
        words = [*late, "--batch_size", n, "--micro_batch", 16]
        cases.append((f"refl, batch {n}", "refl", words))
    for n in (10, 20, 40):
        words = ["--num_inference_steps", n, "--first_mid", n - 1, "--last_mid", n - 1]
        cases.append((f"refl, steps {n}", "refl", words))
    for n in (32, 64, 128):
        words = [*late, "--resolution", n, "--batch_size", 4]
        cases.append((f"refl, resolution {n}", "refl", words))
    for n in (1, 2, 4, 8):
        cases.append((f"focus_n_fix, K {n}", "focus_n_fix", ["--grad_steps", n, "--pool", 8]))

    print(f"{'':<24}{'s an update':>12}{'MiB saved':>11}{'with --checkpointing':>22}")
    for title, script, words in cases:
        (seconds,) = measure_in_turn(script, words, pairs=pairs)
        mebibytes = saved_bytes(script, words) / 2**20
        fewer = saved_bytes(script, [*words, "--checkpointing"]) / 2**20
        print(f"{title:<24}{seconds:>12.3f}{mebibytes:>11.1f}{fewer:>22.1f}")


def trl(pairs, num_steps=20, batch_size=8):
    """AlignPropTrainer's update beside one written by hand.

    20 DDIM steps with eta 1, of which the last has the gradient, and guidance 5. Without guidance
    the trainer does not run: its pipeline gets the unconditional embeddings all the same, and its
    U-Net twice as many states as latents.
    """
    from accelerate import PartialState
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    torch.set_num_threads(1)
    # Its pipeline logs before its trainer has made one of these.
    PartialState(cpu=True)
    toy = PlainToy(4, DDIMScheduler, num_steps)
    everything = slice(batch_size)

    def by_hand():
        x = toy.noise(batch_size)
        with torch.no_grad():
            for t in toy.timesteps[:-1]:
                v = toy.denoise(x, t, everything, guidance_scale=5.0)
                x = toy.scheduler.step(v, t, x, eta=1.0).prev_sample
        t = toy.timesteps[-1]
        v = toy.denoise(x, t, everything, guidance_scale=5.0)
        x = toy.scheduler.step(v, t, x, eta=1.0).prev_sample
        (10 - toy.reward(toy.decode(x)).mean()).backward()
        toy.update(max_norm=1.0)

    prompts = itertools.cycle((TOY / "prompts_train.txt").read_text().splitlines()[:batch_size])

    def next_prompt():
        return next(prompts), {}

    def reward(images, prompts, metadata):
        return toy.reward(images), {}

    config = AlignPropConfig(
        train_batch_size=batch_size,
        sample_num_steps=num_steps,
        sample_guidance_scale=5.0,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=num_steps - 1,
        mixed_precision="no",
        accelerator_kwargs=dict(cpu=True),
        save_freq=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_toy_pipeline(folder, toy.scheduler)
        pipeline = DefaultDDPOStableDiffusionPipeline(folder)
        trainer = AlignPropTrainer(config, reward, next_prompt, pipeline)
        rows = []
        for i in range(pairs + 1):
            step = functools.partial(trainer.step, 0, i)
            rows.append([timed(step), timed(by_hand)])
    # The first measurement warms up.
    theirs, ours = [statistics.median(column) for column in zip(*rows[1:])]
    print(f"AlignPropTrainer {theirs:.3f} s, by hand {ours:.3f} s: ratio {theirs / ours:.3f}")


def write_toy_pipeline(folder, scheduler):
    """Writes the toy model with a tokenizer that older libraries read."""
    fp32 = dict(torch_dtype=torch.float32)
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_pretrained(TOY / "sd" / "unet", **fp32),
        vae=AutoencoderKL.from_pretrained(TOY / "sd" / "vae", **fp32),
        text_encoder=CLIPTextModel.from_pretrained(
            TOY / "sd" / "text_encoder", dtype=torch.float32
        ),
        tokenizer=load_tokenizer(TOY / "sd" / "tokenizer", model_max_length=12),
        scheduler=copy.deepcopy(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# cuda: models of the published size, with random weights

TIMED = 10  # updates that are measured
WARM_UP = 3  # updates before them
# Of the denoisers; FLUX's is schnell's.
PARAMETERS = dict(sd15=859.5e6, sdxl=2567.5e6, flux=11891.2e6)
FLUX = dict(guidance_embeds=False)  # FLUX.1-schnell: the class's own defaults
TINY_FLUX = dict(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
)
FLUX_VAE = dict(block_out_channels=(128, 256, 512, 512), latent_channels=16)
TINY_FLUX_VAE = dict(block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=4)
B5 = dict(
    depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, num_labels=1
)
TINY_B5 = dict(
    depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
    decoder_hidden_size=16, num_labels=1,
)


def default_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(make, device, dtype):
    """make() on the device with random weights, frozen and in eval mode.

    They are N(0, 1/fan in), norms about 1 and biases about 0, and none of them is zero.
    """
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = make()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, p in module.named_parameters():
        p.data = p.data.to(dtype).normal_()
        if p.ndim > 1:
            p.data *= p[0].numel() ** -0.5
        else:
            p.data *= 0.1
            p.data += 1.0 if name.endswith("weight") else 0.0
    return module.eval().requires_grad_(False)


def builders(family, tiny):
    """{part: function that builds it} of a pipeline, and the shapes of a prompt's embeddings."""
    import random_weights

    if family == "flux":
        transformer = functools.partial(FluxTransformer2DModel, **(TINY_FLUX if tiny else FLUX))
        vae = functools.partial(
            AutoencoderKL,
            **(TINY_FLUX_VAE if tiny else FLUX_VAE),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        shapes = [(256, 32), (32,)] if tiny else [(256, 4096), (768,)]
        return dict(transformer=transformer, vae=vae), shapes

    vocab_size = len(random_weights.clip_tokenizer(not tiny))
    parts = random_weights.modules(family, not tiny, vocab_size)
    configs = random_weights.SMALL if tiny else random_weights.FULL
    shapes = [(77, configs[family]["unet"]["cross_attention_dim"])]
    if family == "sdxl":
        shapes.append((32 if tiny else 1280,))
    return parts, shapes


class RandomEmbeddings(dict):
    """Stands for Model.embeds: it knows every prompt, and draws its embeddings when asked."""

    def __init__(self, shapes, dtype):
        self.shapes = shapes
        self.dtype = dtype

    def __contains__(self, prompt):
        return True

    def __missing__(self, prompt):
        self[prompt] = tuple(torch.randn(shape, dtype=self.dtype) for shape in self.shapes)
        return self[prompt]


def random_model(family, device, resolution, tiny):
    """A common.Model of the published size with random weights, and no text encoder."""
    import common
    import random_weights

    dtype = default_dtype(device)
    makers, shapes = builders(family, tiny)
    parts = {}
    for name, make in makers.items():
        if not name.startswith("text_encoder"):
            parts[name] = build(make, device, dtype)
    denoiser = parts["transformer" if family == "flux" else "unet"]
    num_params = sum(p.numel() for p in denoiser.parameters())
    if not tiny and abs(num_params / PARAMETERS[family] - 1) > 1e-3:
        raise ValueError(f"{family}: {num_params} parameters, not the published size")

    absent = dict(text_encoder=None, tokenizer=random_weights.clip_tokenizer(True))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    if family == "flux":
        absent.update(text_encoder_2=None, tokenizer_2=None)
        pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **absent, **parts)
    elif family == "sdxl":
        absent.update(text_encoder_2=None, tokenizer_2=None)
        pipe = StableDiffusionXLPipeline(scheduler=scheduler, **absent, **parts)
    else:
        absent.update(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = StableDiffusionPipeline(scheduler=scheduler, **absent, **parts)

    if device.type == "cuda":
        # The layout that load_model gives them.
        for part in parts.values():
            part.to(memory_format=torch.channels_last)
    embeds = RandomEmbeddings(shapes, dtype)
    return common.Model(pipe, denoiser, family, device, dtype, resolution, embeds=embeds)


def random_reward(device, tiny):
    """PickScore's network, a CLIP ViT-H/14, with random weights. All prompts read alike."""
    import random_weights
    from judges.clip import PickScore

    make = functools.partial(CLIPModel, random_weights.clip_h_config(not tiny, 1000))

    class RandomPickScore(PickScore):
        def __init__(self):
            self.clip = build(make, device, default_dtype(device))
            self.size = self.clip.config.vision_config.image_size
            self.mean = [0.5] * 3
            self.std = [0.25] * 3
            self.scale = 100.0
            features = torch.randn(self.clip.config.projection_dim, device=device)
            self.text_features = F.normalize(features, dim=-1)

        def text(self, prompt):
            return self.text_features

    return RandomPickScore()


def random_detector(device, tiny):
    """A SegFormer-b5 for 512 pixels with random weights."""
    from judges.detector import Detector

    config = SegformerConfig(**(TINY_B5 if tiny else B5))
    make = functools.partial(SegformerForSemanticSegmentation, config)
    return Detector(build(make, device, torch.float32), 64 if tiny else 512)


# --------------------------------------------------------------------------------------------------
# cuda: clocks


class Clock:
    """A line of time: each mark ends a phase and names the next one.

    On a GPU the marks are events, so nothing waits for them. The backward pass sets some, too.
    """

    def __init__(self, device):
        self.is_cuda = device.type == "cuda"
        self.marks = []  # (phase, event or time)

    def mark(self, phase):
        if self.is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    def mark_in_backward(self, x, phase):
        """Marks the phase when the backward pass has the gradient of x."""

        def mark(gradient):
            self.mark(phase)

        if x.requires_grad:
            x.register_hook(mark)

    def phases(self):
        """{phase: ms} since the last call."""
        if self.is_cuda:
            torch.cuda.synchronize()
        sums = {}
        for (phase, start), (_, end) in itertools.pairwise(self.marks):
            ms = start.elapsed_time(end) if self.is_cuda else 1e3 * (end - start)
            sums[phase] = sums.get(phase, 0.0) + ms
        self.marks.clear()
        return sums


class Meter:
    """Measures updates: the first WARM_UP are left out, and the TIMED that follow count.

    flops: of an update; by default they are counted in the second one, which is slower for it.
    """

    def __init__(self, device, flops=None):
        self.device = device
        self.clock = Clock(device)
        self.flops = flops
        self.peak = 0  # bytes
        self.rows = []  # {phase: ms} of each measured update

    @contextlib.contextmanager
    def update(self, step):
        counts_flops = step == 2 and self.flops is None
        is_cuda = self.device.type == "cuda"
        counter = FlopCounterMode(display=False)
        if is_cuda and step == WARM_UP + 1:
            torch.cuda.reset_peak_memory_stats()
        with counter if counts_flops else contextlib.nullcontext():
            self.clock.mark("prefix")
            yield
            self.clock.mark("end")
        if counts_flops:
            self.flops = counter.get_total_flops()
        phases = self.clock.phases()
        if WARM_UP < step <= WARM_UP + TIMED:
            self.rows.append(phases)
            self.peak = torch.cuda.max_memory_allocated() if is_cuda else 0

    def print_row(self, title, images, rate):
        """images: of an update. rate: TFLOP/s of a large matmul on this device."""
        phases = {}
        for phase in self.rows[0]:
            phases[phase] = statistics.median(row.get(phase, 0.0) for row in self.rows)
        ms = sum(phases.values())
        tflops = self.flops / 1e12
        tflops_per_second = 1e3 * tflops / ms
        cells = f"{ms:>9.0f}{1e3 * images / ms:>9.2f}{tflops:>9.1f}{tflops_per_second:>9.1f}"
        cells += f"{100 * tflops_per_second / rate:>7.1f}{self.peak / 2**30:>7.1f}"
        shares = [f"{phase} {100 * value / ms:.0f}%" for phase, value in phases.items()]
        print(f"{title:<46}{cells}  {'  '.join(shares)}", flush=True)


def print_header(device, tiny, rate):
    kind = "CPU"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    elif tiny:
        kind = "CPU, narrow models: these numbers mean nothing"
    print(f"{kind}; torch {torch.__version__}; a large bf16 matmul: {rate:.3g} TFLOP/s")
    print(f"median of {TIMED} updates after {WARM_UP}")
    print("FLOPs are those that run, with what checkpointing runs again")
    titles = f"{'ms':>9}{'images/s':>9}{'TFLOP':>9}{'TFLOP/s':>9}{'MFU %':>7}{'GiB':>7}"
    print(f"{'':<46}{titles}")


def matmul_rate(device, tiny):
    """TFLOP/s of a large matmul: what this device can do."""
    n = 256 if tiny else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(10):
        a @ b
    clock = Clock(device)
    clock.mark("matmul")
    for _ in range(50):
        a @ b
    clock.mark("end")
    return 50 * 2 * n**3 / clock.phases()["matmul"] / 1e9


def with_marks(clock):
    """denoise, decode and encode of common.py, which mark where their phases begin."""
    import common

    real_denoise = common.denoise
    real_decode = common.decode
    real_encode = common.encode

    def denoise(model, latents, *args, **kwargs):
        clock.mark("gradient" if torch.is_grad_enabled() else "prefix")
        return real_denoise(model, latents, *args, **kwargs)

    def decode(model, latents):
        clock.mark("VAE")
        clock.mark_in_backward(latents, "gradient")
        images = real_decode(model, latents)
        clock.mark("reward")
        clock.mark_in_backward(images, "VAE")
        return images

    def encode(model, images, *args, **kwargs):
        clock.mark("VAE")
        latents = real_encode(model, images, *args, **kwargs)
        clock.mark("prefix")
        return latents

    return dict(denoise=denoise, decode=decode, encode=encode)


# --------------------------------------------------------------------------------------------------
# cuda: the table


@dataclass
class Row:
    """A line of the table: updates of one script on one model."""

    title: str
    script: str
    words: list
    family: str = "sd15"
    resolution: int = 512
    images: int = 16  # of an update


ROWS = (
    "public", "refl", "refl_contiguous", "refl_compile", "sdxl", "sdxl_1", "imagerefl", "flux",
    "focus", "dfusion",
)
MEMORY_ROWS = (
    "refl-sd15", "imagerefl-sd15", "refl-sdxl", "imagerefl-sdxl", "refl-sdxl-1024", "treat-flux",
)


def gpu_rows(tiny):
    """{name: Row} of all rows but "public"."""
    late = ["--num_inference_steps", 40, "--first_mid", 34, "--last_mid", 34, "--reward", "pick"]
    sd15 = [*late, "--model", "sd15"]
    sdxl = [*late, "--model", "sdxl"]
    from_images = ["--start", 30, "--refl_every", 0]
    flux = ["treat", "--model", "flux-schnell", "--num_inference_steps", 5, "--reward", "pick"]
    flux += ["--detector", "x", "--data", "x", "--micro_batch", 1, "--checkpointing"]
    focus = ["--model", "sd15", "--detector", "x", "--pool", 4]
    dfusion = ["--model", "sd15", "--reward", "pick", "--num_inference_steps", 20]
    dfusion += ["--images_per_prompt", 8, "--inner_epochs", 1, "--train_timesteps", 5]
    rows = dict(
        refl=Row("ReFL, SD1.5", "refl", sd15),
        refl_contiguous=Row("ReFL, SD1.5, not channels_last", "refl", sd15),
        refl_compile=Row("ReFL, SD1.5, --compile", "refl", [*sd15, "--compile"]),
        sdxl=Row(
            "ReFL, SDXL, batch 4, micro-batch 1", "refl", [*sdxl, "--micro_batch", 1],
            family="sdxl", resolution=1024, images=4,
        ),
        sdxl_1=Row("ReFL, SDXL, batch 1", "refl", sdxl, "sdxl", 1024, images=1),
        imagerefl=Row("ImageReFL, SD1.5", "imagerefl", [*sd15, *from_images]),
        flux=Row(
            "DiffDoctor, FLUX-schnell, --checkpointing", "diffdoctor", flux,
            family="flux", images=4,
        ),
        focus=Row("Focus-N-Fix, SD1.5, I0 kept", "focus_n_fix", focus, images=4),
        dfusion=Row(
            "D-Fusion: a round of 4 pairs, an update of 5 steps", "dfusion_dpo", dfusion, images=8
        ),
    )
    if tiny:
        for row in rows.values():
            row.resolution = 64
            row.images = min(row.images, 4)
            row.words = [*row.words, "--num_inference_steps", 4]
        for name in ("refl", "refl_contiguous", "refl_compile", "sdxl", "sdxl_1", "imagerefl"):
            rows[name].words += ["--first_mid", 2, "--last_mid", 2]
        rows["imagerefl"].words += ["--start", 1]
        rows["dfusion"].words += ["--images_per_prompt", 4, "--train_timesteps", 2]
    return rows


class Captions:
    """Stands for a folder of images, of which only the size and the captions are asked for."""

    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)


def run_row(row, model, reward, detector, meter):
    """Runs WARM_UP + TIMED updates of a script, and one more, on models that are made already."""
    import common
    import rewards

    captions = [f"a photograph of thing {i}" for i in range(64)]
    pixels = torch.rand(row.images, 3, model.resolution, model.resolution)

    def load_model(*args, **kwargs):
        return model

    def load_reward(*args):
        return reward, rewards.REWARDS["pick"]

    def load_detector(*args):
        return detector

    def encode_once(*args):
        pass

    def image_data(*args):
        return Captions(captions)

    def image_batches(data, indices, *args):
        for _ in indices:
            yield pixels, captions[: row.images]

    marked = with_marks(meter.clock)
    stand_ins = dict(load_model=load_model, load_reward=load_reward, load_detector=load_detector)
    stand_ins.update(encode_once=encode_once, image_data=image_data, image_batches=image_batches)
    words = [*row.words, "--batch_size", row.images, "--resolution", row.resolution]
    # The last update also saves, so it comes after those that count.
    words += ["--train_steps", WARM_UP + TIMED + 1, "--device", model.device]
    with tempfile.TemporaryDirectory() as folder, replaced(common, **marked):
        (Path(folder) / "train").write_text("\n".join(captions))
        (Path(folder) / "test").write_text("\n".join(captions[:2]))
        words += ["--test_prompts", f"{folder}/test"]
        if row.script != "dfusion_dpo":
            words += ["--prompts", f"{folder}/train"]
        updates(row.script, words, meter.update, **stand_ins, **marked)


def public_way(model, text_encoder, reward, meter, batch_size, num_steps, mid, micro_batch=4):
    """ReFL as public loops have it.

    They encode prompts in every update and keep the LoRA apart. Prefix and gradient run in batches
    of micro_batch, the VAE in fp32 without checkpointing, and everything in the memory layout that
    it was loaded in.
    """
    device = model.device
    clock = meter.clock
    unet = model.denoiser.to(memory_format=torch.contiguous_format)
    vae = copy.deepcopy(model.vae).float().to(memory_format=torch.contiguous_format)
    add_lora(unet, 32)
    params = [p for p in unet.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(params, lr=3e-4)
    config = model.pipe.scheduler.config
    scheduler = DDPMScheduler.from_config(config, timestep_spacing="leading")
    scheduler.set_timesteps(num_steps, device=device)
    is_bf16 = model.dtype == torch.bfloat16

    for step in range(1, WARM_UP + TIMED + 1):
        with meter.update(step):
            for _ in range(0, batch_size, micro_batch):
                clock.mark("prefix")
                with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                    with torch.no_grad():
                        tokens = torch.randint(500, (micro_batch, 77), device=device)
                        states = text_encoder(tokens).last_hidden_state
                        x = torch.randn(micro_batch, *model.latent_shape, device=device)
                        for t in scheduler.timesteps[:mid]:
                            noise_pred = unet(x, t, states).sample.float()
                            x = scheduler.step(noise_pred, t, x).prev_sample
                    t = scheduler.timesteps[mid]
                    clock.mark("gradient")
                    noise_pred = unet(x, t, states).sample.float()
                alpha_bar = scheduler.alphas_cumprod[t.cpu()].to(device)
                x0 = (x - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()
                clock.mark("VAE")
                clock.mark_in_backward(x0, "gradient")
                images = vae.decode(x0 / vae.config.scaling_factor).sample
                images = (images / 2 + 0.5).clamp(0, 1)
                clock.mark("reward")
                clock.mark_in_backward(images, "VAE")
                r = reward(images, [""] * micro_batch)
                loss = -1e-3 * r.mean() * micro_batch / batch_size
                loss.backward()
                loss.item()
            optimizer.step()
            optimizer.zero_grad()


def print_public_row(device, tiny, rate):
    model = random_model("sd15", device, 64 if tiny else 512, tiny)
    reward = random_reward(device, tiny)
    makers, _ = builders("sd15", tiny)
    text_encoder = build(makers["text_encoder"], device, model.dtype)
    meter = Meter(device)
    batch_size, num_steps, mid = (4, 4, 2) if tiny else (16, 40, 34)
    public_way(model, text_encoder, reward, meter, batch_size, num_steps, mid)
    meter.print_row(f"public way, ReFL, {batch_size} images, prefix of 4", batch_size, rate)


def print_row(name, row, device, tiny, rate, flops=None):
    """Measures a row and prints it -> FLOPs of an update."""
    model = random_model(row.family, device, row.resolution, tiny)
    if name == "refl_contiguous":
        model.denoiser.to(memory_format=torch.contiguous_format)
        model.vae.to(memory_format=torch.contiguous_format)
    reward = None
    detector = None
    if row.script != "focus_n_fix":
        reward = random_reward(device, tiny)
    if row.script in ("diffdoctor", "focus_n_fix"):
        detector = random_detector(device, tiny)
    meter = Meter(device, flops)
    run_row(row, model, reward, detector, meter)
    meter.print_row(row.title, row.images, rate)
    return meter.flops


def cuda(device, tiny, only):
    """Each row makes its models anew, so that no row pays for another's memory."""
    rate = matmul_rate(device, tiny)
    print_header(device, tiny, rate)
    if only in (None, "public"):
        print_public_row(device, tiny, rate)
    flops = 0
    for name, row in gpu_rows(tiny).items():
        if only not in (None, name):
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
        # To count FLOPs would break compiled graphs. They are those of the row before.
        known = flops if name == "refl_compile" else None
        flops = print_row(name, row, device, tiny, rate, known)


def main(argv=None):
    parser = argparse.ArgumentParser(
        "bench.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("cpu", "sweep", "trl", "cuda", "memory"), help="which table")
    add("--pairs", type=int, default=8, help="cpu, sweep, trl: measurements of each (default: 8)")
    add("--device", default="cuda", help="cuda: where to run (default: cuda)")
    add("--tiny", action="store_true", help="cuda: narrow models of 64 pixels")
    add("--only", choices=ROWS + MEMORY_ROWS, help="cuda, memory: this row alone")
    args = parser.parse_args(argv)
    if args.what == "cpu":
        cpu(args.pairs)
    elif args.what == "sweep":
        sweep(args.pairs)
    elif args.what == "trl":
        trl(args.pairs)
    elif args.what == "memory":
        import memory

        torch.set_num_threads(1)
        memory.print_recipes(args.only)
    else:
        from common import pick_device

        cuda(pick_device(args.device), args.tiny, args.only)


if __name__ == "__main__":
    main()
