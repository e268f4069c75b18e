"""Measures what the toy world's diffusion models can do on held-out prompts.

It also draws the pictures of toy/README.md.

  $ python toy/measure.py                     # toy/sd, then the judges (python -m toy.quality)
  $ python toy/measure.py --model toy-flux    # the flow in five steps, without guidance and judges
  $ python toy/measure.py --model DIR         # another model
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

# Run as a script: Python finds our modules in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import decode_in_parts, denoise, generator, initial_latents, load_model
from common import make_scheduler, pick_device
from data.prompts import condition, read_prompts
from run_folder import generate, save_grid, to_pil
from toy import oracle, quality
from toy.training import ROOT

SAMPLER = dict(scheduler="ddim", eta=0.0, num_inference_steps=20, guidance_scale=4.0)
FLOW_SAMPLER = dict(scheduler="euler", eta=0.0, num_inference_steps=5, guidance_scale=1.0)
# The small images that the tests make again.
REFERENCE_PROMPTS = ["a red circle", "a blue square left of a yellow circle"]


# --------------------------------------------------------------------------------------------------
# Fusion influence


class SharedKeys:
    """Attention processor for a batch of thirds [reference | base | fused], with guidance twice.

    With `on`, the last third attends to the reference's keys and values instead of its own, in
    self-attention only.
    """

    on = False

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **_
    ):
        is_self_attention = encoder_hidden_states is None
        context = hidden_states if is_self_attention else encoder_hidden_states
        q = attn.to_q(hidden_states)
        k = attn.to_k(context)
        v = attn.to_v(context)
        if self.on and is_self_attention:
            n = len(k) // 6
            source = torch.arange(6 * n).view(2, 3, n)
            source[:, 2] = source[:, 0]
            k = k[source.flatten()]
            v = v[source.flatten()]
        # (B, tokens, width) -> (B, heads, tokens, width of a head)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@torch.no_grad()
def fusion_influence(model, prompts, num_images=8, guidance_scale=5.0, steps=20, unfused=2):
    """How far the self-attention of the mid and up blocks carries appearance.

    It is mean |base - fused| / mean |base - reference| in pixels. `fused` is `base`, with the same
    x_T and step noise, but with all keys and values replaced by the reference's after the first
    `unfused` steps (DDIM, eta 1). Returns the ratio, and the three image batches (N, 3, H, W).
    """
    keys = SharedKeys()
    stock = model.denoiser.attn_processors
    processors = {}
    for name, processor in stock.items():
        processors[name] = keys if name.startswith(("mid", "up")) else processor

    scheduler = make_scheduler(model, "ddim", steps)
    prompt_per_image = [prompt for prompt in prompts for _ in range(num_images)]
    n = len(prompt_per_image)
    generators = [generator(0, "reference", i) for i in range(n)]
    generators += [generator(0, "base", i) for i in range(n)]
    x = initial_latents(model, generators)
    x = torch.cat([x, x[n:]])  # reference, base, fused
    cond = condition(model, prompt_per_image * 3)
    uncond = condition(model, [None] * len(x))
    try:
        model.denoiser.set_attn_processor(processors)
        for i, t in enumerate(tqdm(scheduler.timesteps, desc="fusion influence")):
            keys.on = i >= unfused
            # The generators continue: one step's noise, the same for base and fused.
            noise = initial_latents(model, generators)
            noise = torch.cat([noise, noise[n:]])
            noise_pred = denoise(model, x, t, cond, guidance_scale, uncond)
            x = scheduler.step(noise_pred, t, x, eta=1.0, variance_noise=noise).prev_sample
    finally:
        model.denoiser.set_attn_processor(stock)
    reference, base, fused = decode_in_parts(model, x, 64).chunk(3)
    ratio = (base - fused).abs().mean() / (base - reference).abs().mean()
    return ratio.item(), (reference, base, fused)


# --------------------------------------------------------------------------------------------------
# Pictures and rates


def save_picture(images, path, columns):
    """A grid of 256 colors, at most 150 KB."""
    save_grid(images, path, columns)
    Image.open(path).quantize(256).save(path, optimize=True)


def save_reference(model, sampler, path):
    """Two small images that the tests make again: have the weights or diffusers changed?"""
    images = generate(model, REFERENCE_PROMPTS, 0, sampler)
    to_pil(torch.cat(list(images), 2)).save(path)


def correct_rates(model, prompts, num_images, sampler, seed=0):
    """Measures num_images images per prompt -> a dict of shares, and the images.

    True, False, None    the oracle says right, says wrong, abstains
    recognised           the nearest reading of the image is its prompt
    artifacts            the detector's confidence is above 0.5 somewhere
    images               how many there are, no share
    """
    images = generate(model, prompts, seed, sampler, num_images)
    prompt_per_image = [prompt for prompt in prompts for _ in range(num_images)]
    verdicts = []
    nearest = []
    for image, prompt in zip(images, prompt_per_image):
        verdicts.append(oracle.correct(image, prompt))
        nearest.append(oracle.recognised(image, prompt))
    confidence = quality.artifact_confidence(images).flatten(1).amax(1)
    rates = {str(verdict): oracle.share(verdicts, verdict) for verdict in (True, False, None)}
    rates["recognised"] = sum(nearest) / len(nearest)
    rates["artifacts"] = (confidence > 0.5).float().mean().item()
    rates["images"] = len(images)
    return rates, images


def main(argv=None):
    parser = argparse.ArgumentParser(
        "measure.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="toy", help="toy, toy-flux, or another model's folder")
    add("--no_judges", action="store_true", help="measure the diffusion model alone")
    add("--out", type=Path, default=ROOT / "pictures", help="folder for the pictures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, pick_device("auto"))
    prompts = read_prompts(ROOT / "prompts_test.txt")
    one = [prompt for prompt in prompts if prompt.count(" a ") == 0]
    two = [prompt for prompt in prompts if prompt.count(" a ") == 1][:40]
    sampler = FLOW_SAMPLER if model.is_flow else SAMPLER
    for guidance_scale in (1.0,) if model.is_flow else (4.0, 1.0):
        sampler = dict(sampler, guidance_scale=guidance_scale)
        rates, _ = correct_rates(model, one, 24, sampler)
        print_rates(guidance_scale, "one object", rates)
        rates, images = correct_rates(model, two, 4, sampler)
        print_rates(guidance_scale, "two objects", rates)
        # The first two images of each of 24 prompts.
        pairs = images[:96].unflatten(0, (24, 4))[:, :2].flatten(0, 1)
        name = "flux" if model.is_flow else f"guidance_{guidance_scale:g}"
        save_picture(pairs, args.out / f"{name}.png", 12)

    if model.is_flow:
        save_reference(model, FLOW_SAMPLER, args.out / "flux_reference.png")
        return
    save_reference(model, SAMPLER, args.out / "reference.png")
    influence, batches = fusion_influence(model, prompts[:8])
    print(f"fusion influence {influence:.3f}")
    # Every fourth image; a row each for reference, base and fused.
    rows = torch.stack(batches, 1)[::4].transpose(0, 1).flatten(0, 1)
    save_picture(rows, args.out / "fusion.png", 16)
    if not args.no_judges:
        print(json.dumps(quality.measure(), indent=1))


def print_rates(guidance_scale, what, rates):
    figures = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    print(f"guidance {guidance_scale:g}, {what}: {figures}", flush=True)


if __name__ == "__main__":
    main()
