"""How good the judges of the toy world are, on held-out captions. All seeds are fixed.

Every ..._quality function returns a dict of numbers.

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
from .judges import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, generated_look
from .judges import hard_negatives, normalise
from .scenes import all_captions, render, sample_scene
from .training import DEVICE, ROOT, rng_of, to_batch


def load(model_class, name):
    """The network of toy/<name>, in fp32. The files are fp16, and so would be the computation."""
    return model_class.from_pretrained(ROOT / name, dtype=torch.float32).to(DEVICE).eval()


def in_batches(fn, x, size=128):
    """fn(x) without gradient, `size` rows at a time."""
    with torch.no_grad():
        return torch.cat([fn(part) for part in x.split(size)])


def rounded(numbers, digits):
    return {name: round(float(value), digits) for name, value in numbers.items()}


def render_all(scenes):
    """A list of scenes -> images (N, 3, 64, 64)."""
    return to_batch([render(scene)[0] for scene in scenes])


def test_scenes(count, *key):
    """Scenes of held-out captions, and their renders (N, 3, H, W)."""
    scenes = [sample_scene(rng_of("quality", *key, i), test=True) for i in range(count)]
    return scenes, render_all(scenes)


# pytest would take this for a test where it is imported.
test_scenes.__test__ = False


# --------------------------------------------------------------------------------------------------
# CLIP and the preference models


def scores(name, images, texts):
    """Scores of images (N, 3, H, W) with texts (T,): exp(logit_scale) * cos, and the bare cosine.

    Both are (N, T).
    """
    model = load(CLIPModel, name)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / name)
    tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(DEVICE)

    def embed_text(tokens):
        return F.normalize(model.get_text_features(tokens).pooler_output, dim=-1)

    def embed_image(images):
        pixels = normalise(images, CLIP_MEAN, CLIP_STD)
        return F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)

    text = in_batches(embed_text, tokens)
    image = in_batches(embed_image, images)
    cosine = image @ text.T
    return model.logit_scale.detach().exp() * cosine, cosine


def clip_quality(name="clip", count=500, look=0.0):
    """How often a held-out scene's caption scores above wrong captions, by kind of mistake.

    <kind>           above one wrong caption, on average: the usual figure
    <kind>_all       above every wrong caption of this kind
    best_of_all      above every wrong caption, except those with another number of objects
    negatives        how many those are on average
    cos_right, cos_wrong    mean cosines, for the reward's range

    look > 0 measures on pictures softened and disturbed as by a VAE and a generator.
    """
    scenes, images = test_scenes(count, "clip")
    if look:
        images = generated_look(images, rng_of("quality", "look"), look)
    negatives = [hard_negatives(scene["caption"]) for scene in scenes]
    texts = {scene["caption"] for scene in scenes}
    for groups in negatives:
        texts.update(*groups.values())
    texts = sorted(texts)
    row = {caption: i for i, caption in enumerate(texts)}
    _, cosine = scores(name, images, texts)
    cosine = cosine.cpu().numpy()
    own = np.array([cosine[i, row[scene["caption"]]] for i, scene in enumerate(scenes)])

    out = {}
    for kind in ("colour", "shape", "binding", "exchanged", "relation", "count"):
        margins = []
        for i, groups in enumerate(negatives):
            if groups.get(kind):
                rows = [row[caption] for caption in groups[kind]]
                margins.append(own[i] - cosine[i, rows])
        out[kind] = np.mean(np.concatenate(margins) > 0)
        out[kind + "_all"] = np.mean([(margin > 0).all() for margin in margins])

    wrong = []
    for i, groups in enumerate(negatives):
        rows = []
        for kind, captions in groups.items():
            if kind != "count":
                rows += [row[caption] for caption in captions]
        wrong.append(cosine[i, rows])
    out["best_of_all"] = np.mean([right > group.max() for right, group in zip(own, wrong)])
    out["negatives"] = np.mean([len(group) for group in wrong])
    out["cos_right"] = own.mean()
    out["cos_wrong"] = np.mean([group.mean() for group in wrong])
    return rounded(out, 3)


def draw_pair(rng, key):
    """Two scenes of held-out captions for pref_quality, and their looks (2, 3)."""
    first = sample_scene(rng, test=True)
    groups = [group for group in hard_negatives(first["caption"]).values() if group]
    caption = first["caption"]
    if key == "wrong":
        caption = str(rng.choice(groups[rng.integers(len(groups))]))
    second = first if key == "fine" else sample_scene(rng, caption)
    looks = judges.looks(rng, 2)
    if key == "overall":
        looks[1] = looks[0]
    return first, second, looks


def pref_quality(name="pref", count=500):
    """The share of pairs in which the better picture has the higher score, on held-out captions.

    same         one caption; scene and looks differ
    fine         one scene; the fine part of the taste differs
    overall      one caption, the same looks; the global part of the taste differs
    wrong        a right against a wrong caption (color, shape, order ... changed), with any looks
    score_mean, score_std    of the first pictures in the pairs of `same`
    """
    out = {}
    for key in ("same", "fine", "overall", "wrong"):
        pairs = [draw_pair(rng_of("quality", "pairs", key, i), key) for i in range(count)]
        firsts = [first for first, _, _ in pairs]
        seconds = [second for _, second, _ in pairs]
        looks = np.stack([pair_looks for _, _, pair_looks in pairs], 1)  # (2, count, 3)

        drawn = [render(scene) for scene in firsts + seconds]
        coverage = [torch.from_numpy(cover.sum(0, keepdims=True)) for _, cover in drawn]
        coverage = torch.stack(coverage).to(DEVICE)
        images = to_batch([image for image, _ in drawn])
        rng = rng_of("quality", "looks", key)
        images = judges.apply_looks(images, coverage, looks.reshape(-1, 3), rng)

        # Both pictures are scored with the first one's caption.
        texts = sorted({scene["caption"] for scene in firsts})
        score = scores(name, images, texts)[0].view(2, count, -1)
        own = [texts.index(scene["caption"]) for scene in firsts]
        own = torch.tensor(own, device=DEVICE)
        first, second = score.gather(2, own.expand(2, count)[..., None])[..., 0]

        better = []
        for i in range(count):
            value = judges.taste(firsts[i], looks[0, i])
            other = judges.taste(seconds[i], looks[1, i])
            better.append(key == "wrong" or value > other)
        better = torch.tensor(better, device=DEVICE)
        out[key] = ((first > second) == better).float().mean()
        if key == "same":
            out["score_mean"] = first.mean()
            out["score_std"] = first.std()
    return rounded(out, 3)


# --------------------------------------------------------------------------------------------------
# Detectors


def auroc(score, positive):
    """Area under the ROC curve of scores (N,) for positive (N,), by ranks.

    Ties are broken by order, as scores are continuous.
    """
    rank = np.empty(len(score))
    rank[np.argsort(score, kind="stable")] = np.arange(1, len(score) + 1)
    n = positive.sum()
    return (rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n))


def artifact_confidence(images, name="detector"):
    """Images (N, 3, H, W) in [0, 1] -> the detector's confidence per pixel (N, H, W).

    The logits are upsampled bilinearly, then the sigmoid is taken.
    """
    model = load(AutoModelForSemanticSegmentation, name)

    def confidence(batch):
        logits = model(normalise(batch.to(DEVICE), IMAGENET_MEAN, IMAGENET_STD)).logits
        return torch.sigmoid(F.interpolate(logits, batch.shape[2:], mode="bilinear")[:, 0])

    return in_batches(confidence, images)


def detector_quality(name="detector", recipe="a", count=300, look=0.4):
    """Pixel AUROC on held-out scenes with mistakes of a recipe, where a map > 0.5 is positive.

    <figure>_crisp, <figure>_soft    on renders, and with a generated look

    auroc            of all pixels
    auroc_objects    of the pixels within objects
    auroc_blind      of marking every object blindly (no _crisp, no _soft)
    scene_auroc      of each scene's highest confidence, scenes with mistakes against clean ones
    mse              against the maps
    mean_bad, mean_clean    mean confidence, with mistakes and on clean scenes
    clean_pixels     false positives: share of clean pixels above 0.5
    clean_scenes     share of clean scenes with any such pixel
    found            share of scenes with mistakes that have any such pixel
    """
    scenes = [sample_scene(rng_of("quality", "bad", i), test=True) for i in range(count)]
    bad = []
    for i, scene in enumerate(scenes):
        bad.append(corrupt(scene, rng_of("quality", "corrupt", i), recipe))
    images = to_batch([image for image, _ in bad])
    maps = np.stack([confidence for _, confidence in bad])
    objects = np.stack([render(scene)[1].sum(0) for scene in scenes])
    _, clean = test_scenes(count, "clean")

    positive = maps.ravel() > 0.5
    on_object = objects > 0.5
    # Ties are broken at random here: the score of a blind detector is not continuous.
    blind = objects.ravel() + np.random.default_rng(0).uniform(0, 1e-3, objects.size)
    out = dict(auroc_blind=auroc(blind, positive))
    for key, level in (("crisp", 0), ("soft", look)):
        rng = rng_of("quality", "detector")
        bad_images = generated_look(images, rng, level) if level else images
        on_bad = artifact_confidence(bad_images, name).cpu().numpy()
        clean_images = generated_look(clean, rng, level) if level else clean
        on_clean = artifact_confidence(clean_images, name).cpu().numpy()
        bad_peak = on_bad.max((1, 2))
        clean_peak = on_clean.max((1, 2))
        is_bad = np.arange(2 * count) < count
        out[f"auroc_{key}"] = auroc(on_bad.ravel(), positive)
        out[f"auroc_objects_{key}"] = auroc(on_bad[on_object], maps[on_object] > 0.5)
        out[f"mse_{key}"] = np.mean((on_bad - maps) ** 2)
        out[f"mean_bad_{key}"] = on_bad.mean()
        out[f"mean_clean_{key}"] = on_clean.mean()
        out[f"clean_pixels_{key}"] = np.mean(on_clean > 0.5)
        out[f"clean_scenes_{key}"] = np.mean(clean_peak > 0.5)
        out[f"found_{key}"] = np.mean(bad_peak > 0.5)
        out[f"scene_auroc_{key}"] = auroc(np.concatenate([bad_peak, clean_peak]), is_bad)
    return rounded(out, 4)


# --------------------------------------------------------------------------------------------------
# Feature extractor


def diversity(images, name="dino"):
    """Mean over groups of the mean pairwise 1 - cos of the CLS tokens, as in evaluate.py.

    images (groups, n, 3, H, W).
    """
    model = load(AutoModel, name)

    def embed(images):
        hidden = model(normalise(images, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state
        return F.normalize(hidden[:, 0], dim=-1)

    g, n = images.shape[:2]
    cls = in_batches(embed, images.flatten(0, 1)).view(g, n, -1)
    return float((1 - cls @ cls.transpose(1, 2)).sum((1, 2)).mean() / (n * (n - 1)))


def interpolate(keys, first, second, share):
    """{key: share * first + (1 - share) * second}"""
    return {key: second[key] + share * (first[key] - second[key]) for key in keys}


def narrowed(scene, centre, share):
    """`scene` moved towards `centre`, of the same caption.

    At share 1 it is the scene itself, at 0 the center.
    """
    keys = ("x", "y", "r", "angle", "rgb", "light")
    objects = []
    for o, c in zip(scene["objects"], centre["objects"]):
        objects.append(dict(o, **interpolate(keys, o, c, share)))
    background = scene["background"]
    background = interpolate(background, background, centre["background"], share)
    return dict(scene, objects=objects, background=background)


def frozen(scene, centre, *keys):
    """`scene` with some keys of its objects as in `centre`."""
    objects = []
    for o, c in zip(scene["objects"], centre["objects"]):
        objects.append(dict(o, **{key: c[key] for key in keys}))
    return dict(scene, objects=objects)


def dino_quality(name="dino", captions=40, each=6):
    """Diversity of held-out captions' scenes, `each` scenes per caption.

    different_captions        scenes of different captions
    one_caption               scenes of one caption
    narrowed_0.75 ... 0.25    the same, moved so much of their range towards one scene
    position_frozen ...       the same, with one part as in one scene
    one_scene_disturbed       one scene under mild disturbance
    """
    texts = all_captions(test=True)
    texts = [texts[i] for i in rng_of("quality", "dino").choice(len(texts), captions)]
    groups = []
    for g, caption in enumerate(texts):
        rngs = [rng_of("quality", "dino", g, i) for i in range(each)]
        groups.append([sample_scene(rng, caption) for rng in rngs])

    def measure(change):
        """The diversity after change(scene, the first scene of its group)."""
        changed = [[change(scene, group[0]) for scene in group] for group in groups]
        return diversity(torch.stack([render_all(group) for group in changed]), name)

    images = torch.stack([render_all(group) for group in groups])
    # Each of these groups has one scene per caption.
    mixed = torch.stack(list(images.flatten(0, 1).split(captions))[:each])
    out = dict(different_captions=diversity(mixed, name), one_caption=diversity(images, name))
    for share in (0.75, 0.5, 0.25):
        out[f"narrowed_{share}"] = measure(lambda scene, centre: narrowed(scene, centre, share))
    out["position_frozen"] = measure(lambda scene, centre: frozen(scene, centre, "x", "y"))
    out["size_frozen"] = measure(lambda scene, centre: frozen(scene, centre, "r"))
    out["pose_frozen"] = measure(lambda scene, centre: frozen(scene, centre, "angle"))
    out["background_frozen"] = measure(
        lambda scene, centre: dict(scene, background=centre["background"])
    )
    same = images[:, :1].expand_as(images).flatten(0, 1)
    disturbed = generated_look(same, rng_of("quality", "disturbed"), 0.4)
    out["one_scene_disturbed"] = diversity(disturbed.view_as(images), name)
    return rounded(out, 4)


# --------------------------------------------------------------------------------------------------
# VAE


@torch.no_grad()
def vae_quality(count=64):
    """Peak signal-to-noise ratio (dB) of held-out scenes through toy/sd's VAE and back."""
    vae = AutoencoderKL.from_pretrained(ROOT / "sd" / "vae", torch_dtype=torch.float32)
    vae = vae.to(DEVICE).eval()
    _, images = test_scenes(count, "vae")
    latents = vae.encode(2 * images - 1).latent_dist.mean
    again = vae.decode(latents).sample / 2 + 0.5
    mse = (again - images).square().mean()
    return dict(psnr=round(-10 * mse.log10().item(), 2))


def measure():
    """Everything: {network: dict of numbers}."""
    return dict(
        vae=vae_quality(),
        clip=clip_quality(),
        clip_soft=clip_quality(look=0.6),
        pref=pref_quality(),
        pref_b=pref_quality("pref_b"),
        dino=dino_quality(),
        detector=detector_quality(),
        detector_b=detector_quality("detector_b", "b"),
        detector_on_b=detector_quality("detector", "b"),
        detector_b_on_a=detector_quality("detector_b", "a"),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, numbers in measure().items():
        print(name, json.dumps(numbers, indent=1))
