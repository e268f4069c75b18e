"""How good the judges of the toy world are, on held-out captions. Every function returns a dict of numbers; fixed seeds.

  $ python -m toy.quality             # all of them, about a minute on one core
"""
import json

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import AutoModel, AutoModelForSemanticSegmentation, AutoTokenizer, CLIPModel

from . import judges
from .artifacts import corrupt
from .judges import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, generated_look, hard_negatives, normalise
from .scenes import all_captions, render, sample_scene
from .training import DEVICE, ROOT, rng_of, to_batch


def load(cls, name):
    # fp16 files; transformers 5 would compute in fp16 too
    return cls.from_pretrained(ROOT / name, dtype=torch.float32).to(DEVICE).eval()


def in_batches(fn, x, size=128):
    with torch.no_grad():
        return torch.cat([fn(part) for part in x.split(size)])


def scores(name, images, texts):
    """exp(logit_scale) * cos of each image (N, 3, H, W) with each text, (N, len(texts)), and the bare cosine."""
    model, tokenizer = load(CLIPModel, name), AutoTokenizer.from_pretrained(ROOT / name)
    tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
    text = in_batches(lambda t: F.normalize(model.get_text_features(t).pooler_output, dim=-1), tokens)
    image = in_batches(lambda x: F.normalize(model.get_image_features(normalise(x, CLIP_MEAN, CLIP_STD)).pooler_output, dim=-1), images)
    cosine = image @ text.T
    return model.logit_scale.detach().exp() * cosine, cosine


def test_scenes(count, *key):
    """Scenes of held-out captions and their renders (N, 3, H, W)."""
    scenes = [sample_scene(rng_of("quality", *key, i), test=True) for i in range(count)]
    return scenes, to_batch([render(s)[0] for s in scenes])


def clip_quality(name="clip", count=500, look=0.):
    """Share of held-out scenes whose caption scores above every wrong caption of a kind; `each`: above one of them, on average.

    look > 0 measures on pictures softened and disturbed as by a VAE and a generator. cos_right and cos_wrong give the reward's range."""
    scenes, images = test_scenes(count, "clip")
    if look:
        images = generated_look(images, rng_of("quality", "look"), look)
    negatives = [hard_negatives(s["caption"]) for s in scenes]
    texts = sorted({c for s, n in zip(scenes, negatives) for c in [s["caption"], *sum(n.values(), [])]})
    row = {c: i for i, c in enumerate(texts)}
    _, cosine = scores(name, images, texts)
    cosine = cosine.cpu().numpy()
    out, own = {}, np.array([cosine[i, row[s["caption"]]] for i, s in enumerate(scenes)])
    for kind in ("colour", "shape", "binding", "exchanged", "relation", "count"):
        margins = [own[i] - cosine[i, [row[c] for c in n[kind]]] for i, n in enumerate(negatives) if n.get(kind)]
        out[kind] = np.mean(np.concatenate(margins) > 0)         # the usual figure: one right against one wrong caption
        out[kind + "_all"] = np.mean([(m > 0).all() for m in margins])
    wrong = [cosine[i, [row[c] for c in sum((g for k, g in n.items() if k != "count"), [])]] for i, n in enumerate(negatives)]
    out["best_of_all"] = np.mean([o > w.max() for o, w in zip(own, wrong)])
    out |= dict(negatives=np.mean([len(w) for w in wrong]), cos_right=own.mean(), cos_wrong=np.mean([w.mean() for w in wrong]))
    return {k: round(float(v), 3) for k, v in out.items()}


def pref_quality(name="pref", count=500):
    """Pair accuracy on held-out captions: same caption (all differs, the fine part only, the global part only), and a picture of a wrong caption
    (colour, shape, order ... changed) against a right one, the looks of both random; the range of the score."""
    out = {}
    for key in ("same", "fine", "overall", "wrong"):
        scenes, looks = [[], []], []
        for i in range(count):
            rng = rng_of("quality", "pairs", key, i)
            first = sample_scene(rng, test=True)
            groups = [g for g in hard_negatives(first["caption"]).values() if g]
            other = str(rng.choice(groups[rng.integers(len(groups))])) if key == "wrong" else first["caption"]
            scenes[0].append(first)
            scenes[1].append(first if key == "fine" else sample_scene(rng, other))
            looks.append(judges.looks(rng, 2))
        looks = np.stack(looks, 1)                               # (2, count, 3)
        if key == "overall":
            looks[1] = looks[0]
        drawn = [render(s) for s in scenes[0] + scenes[1]]
        coverage = torch.stack([torch.from_numpy(c.sum(0, keepdims=True)) for _, c in drawn]).to(DEVICE)
        images = judges.apply_looks(to_batch([im for im, _ in drawn]), coverage, looks.reshape(-1, 3), rng_of("quality", "looks", key))
        texts = sorted({s["caption"] for s in scenes[0]})
        score = scores(name, images, texts)[0].view(2, count, -1)
        own = torch.tensor([texts.index(s["caption"]) for s in scenes[0]], device=DEVICE)
        first, second = score.gather(2, own.expand(2, count)[..., None])[..., 0]
        value = [[judges.taste(s, f) for s, f in zip(scenes[k], looks[k])] for k in (0, 1)]
        better = torch.tensor([key == "wrong" or a > b for a, b in zip(*value)], device=DEVICE)
        out[key] = ((first > second) == better).float().mean()
        if key == "same":
            out |= dict(score_mean=first.mean(), score_std=first.std())
    return {k: round(float(v), 3) for k, v in out.items()}


def auroc(score, positive):
    """Area under the ROC curve of scores (N,) by ranks; ties are broken by order (scores are continuous)."""
    rank = np.empty(len(score))
    rank[np.argsort(score, kind="stable")] = np.arange(1, len(score) + 1)
    n = positive.sum()
    return (rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n))


def artifact_confidence(images, name="detector"):
    """images (N, 3, H, W) in [0, 1] -> the detector's confidence per pixel (N, H, W): logits upsampled bilinearly, then the sigmoid."""
    model = load(AutoModelForSemanticSegmentation, name)
    return in_batches(lambda b: torch.sigmoid(F.interpolate(model(normalise(b.to(DEVICE), IMAGENET_MEAN, IMAGENET_STD)).logits,
                                                            b.shape[2:], mode="bilinear")[:, 0]), images)


def detector_quality(name="detector", recipe="a", count=300, look=.4):
    """On held-out captions: pixel AUROC over scenes with mistakes of a recipe (map > .5 is positive), crisp and with a generated look; mean
    confidence on them and on clean ones; false positives: share of clean pixels above .5, and of clean scenes with any such pixel."""
    confidence = lambda x: artifact_confidence(x, name)
    scenes = [sample_scene(rng_of("quality", "bad", i), test=True) for i in range(count)]
    bad = [corrupt(s, rng_of("quality", "corrupt", i), recipe) for i, s in enumerate(scenes)]
    images, maps = to_batch([b[0] for b in bad]), np.stack([b[1] for b in bad])
    objects = np.stack([render(s)[1].sum(0) for s in scenes])
    _, clean = test_scenes(count, "clean")
    blind = objects.ravel() + np.random.default_rng(0).uniform(0, 1e-3, objects.size)              # ties broken at random
    out, on = dict(auroc_blind=auroc(blind, maps.ravel() > .5)), objects > .5
    for key, level in (("crisp", 0), ("soft", look)):
        rng = rng_of("quality", "detector")
        on_bad, on_clean = (confidence(generated_look(x, rng, level) if level else x).cpu().numpy() for x in (images, clean))
        out |= {f"auroc_{key}": auroc(on_bad.ravel(), maps.ravel() > .5), f"auroc_objects_{key}": auroc(on_bad[on], maps[on] > .5), f"mse_{key}": np.mean((on_bad - maps) ** 2),
                f"mean_bad_{key}": on_bad.mean(), f"mean_clean_{key}": on_clean.mean(), f"clean_pixels_{key}": np.mean(on_clean > .5),
                f"clean_scenes_{key}": np.mean(on_clean.max((1, 2)) > .5), f"found_{key}": np.mean(on_bad.max((1, 2)) > .5),
                f"scene_auroc_{key}": auroc(np.concatenate([on_bad.max((1, 2)), on_clean.max((1, 2))]), np.arange(2 * count) < count)}
    return {k: round(float(v), 4) for k, v in out.items()}


def diversity(images, name="dino"):
    """Mean over groups of the mean pairwise 1 - cos of the CLS token: images (groups, n, 3, H, W), DinoDiversity of evaluate.py."""
    model = load(AutoModel, name)
    g, n = images.shape[:2]
    cls = in_batches(lambda x: F.normalize(model(normalise(x, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0], dim=-1), images.flatten(0, 1))
    cls = cls.view(g, n, -1)
    return float((1 - cls @ cls.transpose(1, 2)).sum((1, 2)).mean() / (n * (n - 1)))


def narrowed(scene, centre, share):
    """`scene` moved towards `centre` (same caption): share 1 is the scene itself, 0 the centre."""
    mix = lambda a, b: b + share * (a - b)
    objects = [dict(o, **{k: mix(o[k], c[k]) for k in ("x", "y", "r", "angle", "rgb", "light")}) for o, c in zip(scene["objects"], centre["objects"])]
    b = {k: mix(scene["background"][k], centre["background"][k]) for k in scene["background"]}
    return dict(scene, objects=objects, background=b)


def dino_quality(name="dino", captions=40, each=6):
    """Diversity of held-out captions' scenes: different captions, one caption, the same narrowed to .75 .. .25 of its range around one scene,
    one part of it frozen, one scene under mild disturbance."""
    texts = all_captions(test=True)
    texts = [texts[i] for i in rng_of("quality", "dino").choice(len(texts), captions)]
    groups = [[sample_scene(rng_of("quality", "dino", g, i), caption) for i in range(each)] for g, caption in enumerate(texts)]
    draw = lambda groups: torch.stack([to_batch([render(s)[0] for s in g]) for g in groups])
    images = draw(groups)
    out = dict(different_captions=diversity(torch.stack(list(images.flatten(0, 1).split(captions))[:each]), name),      # one of each
               one_caption=diversity(images, name))
    for share in (.75, .5, .25):
        out[f"narrowed_{share}"] = diversity(draw([[narrowed(s, g[0], share) for s in g] for g in groups]), name)
    freeze = lambda *keys: [[dict(s, objects=[dict(o, **{k: c[k] for k in keys}) for o, c in zip(s["objects"], g[0]["objects"])]) for s in g]
                            for g in groups]
    out |= dict(position_frozen=diversity(draw(freeze("x", "y")), name), size_frozen=diversity(draw(freeze("r")), name),
                pose_frozen=diversity(draw(freeze("angle")), name),
                background_frozen=diversity(draw([[dict(s, background=g[0]["background"]) for s in g] for g in groups]), name))
    rng = rng_of("quality", "disturbed")
    same = images[:, :1].expand_as(images)
    out["one_scene_disturbed"] = diversity(generated_look(same.flatten(0, 1), rng, .4).view_as(images), name)
    return {k: round(v, 4) for k, v in out.items()}


@torch.no_grad()
def vae_quality(count=64):
    """Peak signal-to-noise ratio (dB) of held-out scenes through toy/sd's VAE and back."""
    vae, (_, images) = AutoencoderKL.from_pretrained(ROOT / "sd" / "vae", torch_dtype=torch.float32).to(DEVICE).eval(), test_scenes(count, "vae")
    again = vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + .5
    return dict(psnr=round(-10 * (again - images).square().mean().log10().item(), 2))


def measure():
    """Everything: dict network -> dict of numbers."""
    second = dict(pref_b=pref_quality("pref_b")) if (ROOT / "pref_b").exists() else {}
    return dict(vae=vae_quality(), clip=clip_quality(), clip_soft=clip_quality(look=.6), pref=pref_quality(), **second, dino=dino_quality(),
                detector=detector_quality(), detector_b=detector_quality("detector_b", "b"),
                detector_on_b=detector_quality("detector", "b"), detector_b_on_a=detector_quality("detector_b", "a"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, numbers in measure().items():
        print(name, json.dumps(numbers, indent=1))
