"""Measures what the toy world's diffusion model can do, on held-out prompts, and draws the pictures of toy/README.md.

  $ python toy/measure.py                 # the model, then the judges (python -m toy.quality)
  $ python toy/measure.py --model toy-flux    # the flow, in five steps without guidance; no judges
  $ python toy/measure.py --model DIR     # another one
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))          # run as a script: find the packages `toy` and `common`
from common import condition, decode, denoise, generate, generator, initial_latents, load_model, make_scheduler, pick_device, read_prompts, save_grid, to_pil
from toy import oracle, quality
from toy.training import ROOT

SAMPLER = dict(scheduler="ddim", eta=0., num_inference_steps=20, guidance_scale=4.)
FLOW_SAMPLER = dict(scheduler="euler", eta=0., num_inference_steps=5, guidance_scale=1.)


class SharedKeys:
    """Attention processor: with `on`, the last third of each guidance half [reference | base | fused] attends to the reference's keys and
    values instead of its own, in self-attention only."""
    on = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if self.on and encoder_hidden_states is None:
            n = len(k) // 6
            source = torch.arange(6 * n).view(2, 3, n)
            source[:, 2] = source[:, 0]
            k, v = k[source.flatten()], v[source.flatten()]
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@torch.no_grad()
def fusion_influence(model, prompts, num_images=8, guidance_scale=5., steps=20, unfused=2):
    """How far the mid and up blocks' self-attention carries appearance: mean |base - fused| / mean |base - reference| in pixels, where
    `fused` is `base` (same x_T, same step noise) with all keys and values replaced by the reference's in steps 18..1 of 20 (DDIM, eta 1).

    Returns the ratio, and the three image batches (N, 3, H, W).
    """
    keys, stock, scheduler = SharedKeys(), model.denoiser.attn_processors, make_scheduler(model, "ddim", steps)
    each = [p for p in prompts for _ in range(num_images)]
    reference, base = ([generator(0, name, i) for i in range(len(each))] for name in ("reference", "base"))
    x = initial_latents(model, reference + base)
    x = torch.cat([x, x[len(each):]])
    cond, uncond = condition(model, each * 3), condition(model, [None] * len(x))
    try:
        model.denoiser.set_attn_processor({k: keys if k.startswith(("mid", "up")) else p for k, p in stock.items()})
        for i, t in enumerate(tqdm(scheduler.timesteps, desc="fusion influence")):
            keys.on = i >= unfused
            noise = initial_latents(model, reference + base)
            x = scheduler.step(denoise(model, x, t, cond, guidance_scale, uncond), t, x, eta=1., variance_noise=torch.cat([noise, noise[len(each):]])).prev_sample
    finally:
        model.denoiser.set_attn_processor(stock)
    reference, base, fused = decode(model, x).chunk(3)
    return ((base - fused).abs().mean() / (base - reference).abs().mean()).item(), (reference, base, fused)


def save_picture(images, name, columns):
    """A grid in toy/pictures, of 256 colours: at most 150 KB."""
    path = ROOT / "pictures" / f"{name}.png"
    save_grid(images, path, columns)
    Image.open(path).quantize(256).save(path, optimize=True)


def save_reference(model, sampler, name):
    """Two small images that the tests make again: have the weights, or diffusers, changed?"""
    images = generate(model, ["a red circle", "a blue square left of a yellow circle"], 0, sampler)
    to_pil(torch.cat(list(images), 2)).save(ROOT / "pictures" / f"{name}.png")


def correct_rates(model, prompts, num_images, sampler, seed=0):
    """Shares of the images that the oracle calls right, wrong, and abstains on; whose nearest reading is the caption (oracle.recognised); and with
    a detector confidence above .5."""
    images = generate(model, prompts, seed, sampler, num_images)
    each = [p for p in prompts for _ in range(num_images)]
    verdicts = [oracle.correct(image, prompt) for image, prompt in zip(images, each)]
    confidence = quality.artifact_confidence(images).flatten(1).amax(1)
    rates = {str(v): verdicts.count(v) / len(verdicts) for v in (True, False, None)}
    nearest = [oracle.recognised(image, prompt) for image, prompt in zip(images, each)]
    return dict(rates, recognised=sum(nearest) / len(nearest), artifacts=(confidence > .5).float().mean().item(), images=len(images)), images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy", help="another model folder in its place")
    parser.add_argument("--no_judges", action="store_true", help="the diffusion model alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, prompts = load_model(args.model, pick_device("auto")), read_prompts(ROOT / "prompts_test.txt")
    one, two = [p for p in prompts if p.count(" a ") == 0], [p for p in prompts if p.count(" a ") == 1][:40]
    sampler = FLOW_SAMPLER if model.flow else SAMPLER
    for guidance_scale in (1.,) if model.flow else (4., 1.):
        for name, part, num_images in (("one object", one, 24), ("two objects", two, 4)):
            rates, images = correct_rates(model, part, num_images, dict(sampler, guidance_scale=guidance_scale))
            print(f"guidance {guidance_scale:g}, {name:<11}", {k: round(v, 3) for k, v in rates.items()}, flush=True)
            if name == "two objects":
                save_picture(images[:96].unflatten(0, (24, 4))[:, :2].flatten(0, 1), "flux" if model.flow else f"guidance_{guidance_scale:g}", 12)
    save_reference(model, sampler, "flux_reference" if model.flow else "reference")
    if model.flow:
        return
    influence, pictures = fusion_influence(model, prompts[:8])
    print(f"fusion influence {influence:.3f}")
    save_picture(torch.stack(pictures, 1)[::4].transpose(0, 1).flatten(0, 1), "fusion", 16)
    if not args.no_judges:
        print(json.dumps(quality.measure(), indent=1))


if __name__ == "__main__":
    main()
