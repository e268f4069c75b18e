"""The judges of the toy world: CLIP, two preference models, a feature extractor, two artifact detectors. See make.py.

make_clip() and so on train one network each (training.fit: resumable, deterministic on one thread) and save toy/<name>/ as fp16 in the
transformers format. Everything is trained on renders of *training* captions; quality.py measures it on held-out ones.
"""
import functools
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (CLIPConfig, CLIPModel, ConvNextConfig, PreTrainedTokenizerFast, ResNetConfig, UperNetConfig,
                          UperNetForSemanticSegmentation, ViTConfig, ViTModel)

from .artifacts import corrupt
from .scenes import COLOURS, KINDS, RELATIONS, SHAPES, SIZE, all_captions, caption_of, parse_caption, render, sample_scene
from .training import DEVICE, ROOT, fit, rng_of

CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
IMAGENET_MEAN, IMAGENET_STD = (.485, .456, .406), (.229, .224, .225)
LENGTH = 12                                                      # tokens of a padded prompt; the longest caption has 10 with bos and eos
GRAMMAR = "a red green blue yellow purple circle square triangle star left of above".split()
# never trained on; here so that a curious prompt is more than a row of <unk>
OTHERS = """an the and with on in to is no not at by from next near right below under over beside between behind front inside
one two three four five small large big tiny huge bright dark light pale orange pink black white grey brown cyan
cross heart diamond rectangle ring moon sun house tree dog cat shape object background photo picture image drawing""".split()


def make_tokenizer():
    """One token a word, used by toy/sd and every CLIPModel here. As in the original CLIP the padding is the end token, and
    CLIPTextModel pools at its first occurrence (eos_token_id of the config must be this tokenizer's, and not 2: see CLIPTextModel)."""
    specials = ["<|startoftext|>", "<|endoftext|>", "<unk>"]
    vocab = {word: i for i, word in enumerate(specials + GRAMMAR + OTHERS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<|startoftext|> $A <|endoftext|>",
                                                        special_tokens=[(s, vocab[s]) for s in specials[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=specials[0], eos_token=specials[1], pad_token=specials[1],
                                   unk_token=specials[2], model_max_length=LENGTH, padding_side="right")


# ---------------------------------------------------------------------------------------------------------------- shared by all judges

def normalise(images, mean, std):
    """(B, 3, H, W) in [0, 1] -> the same, as preprocessor_config.json of the network says."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def save(name, model, mean, std, processor, tokenizer=None):
    """toy/<name>/: weights and config (fp16), preprocessor_config.json, tokenizer."""
    folder = ROOT / name
    model.half().save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    clip = processor == "CLIPImageProcessor"
    size = dict(height=SIZE, width=SIZE)
    config = dict(image_processor_type=processor, do_resize=True, size=dict(shortest_edge=SIZE) if clip else size, resample=3 if clip else 2,
                  do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(mean), image_std=list(std))
    if clip:
        config |= dict(do_center_crop=True, crop_size=size, do_convert_rgb=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def fresh_scenes(count, split="train"):
    """dict(scenes list, images uint8 (N, 64, 64, 3), coverage uint8 (N, 2, 64, 64)); split "test" has the held-out captions."""
    scenes = [sample_scene(rng_of("judges", split, i), test=split == "test") for i in range(count)]
    images, coverage = np.zeros((count, SIZE, SIZE, 3), np.uint8), np.zeros((count, 2, SIZE, SIZE), np.uint8)
    for i, scene in enumerate(scenes):
        image, cover = render(scene)
        images[i], coverage[i, :len(cover)] = np.rint(image * 255), np.rint(cover * 255)
    return dict(scenes=scenes, images=images, coverage=coverage)


cached_scenes = functools.cache(lambda: fresh_scenes(16384))      # half a minute, once a process


def to_images(array):
    """uint8 (B, H, W, C) -> float (B, C, H, W) in [0, 1] on DEVICE."""
    return torch.from_numpy(array).to(DEVICE).permute(0, 3, 1, 2).float().contiguous() / 255


def draw(rng, *shape, low=0., high=1.):
    return torch.from_numpy(rng.uniform(low, high, shape)).float().to(DEVICE)


def noise(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(DEVICE)


def blur(images, sigma):
    """Gaussian blur of (B, C, H, W) with a sigma (B,) in pixels for each image; sigma 0 leaves it alone (up to 1e-6)."""
    offset = torch.arange(-5, 6, device=images.device)
    kernel = torch.exp(-.5 * (offset / sigma.clamp(min=.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)[:, None]     # (B * C, 1, 11)
    x = F.pad(images.flatten(0, 1)[None], (5, 5, 5, 5), mode="replicate")
    x = F.conv2d(x, kernel[:, :, None], groups=len(kernel))
    return F.conv2d(x, kernel[..., None], groups=len(kernel))[0].view_as(images)


def generated_look(images, rng, strength=1.):
    """What a VAE and a weak generator do to a good picture: soft edges, slight waves, coarse and fine noise, small shifts of colour."""
    b = len(images)
    if strength * rng.random() > .15:                            # waves: up to about a pixel
        flow = F.interpolate(noise(rng, b, 2, 6, 6), (SIZE, SIZE), mode="bicubic") * draw(rng, b, 1, 1, 1) ** 2 * 1.6 * strength * 2 / SIZE
        eye = F.affine_grid(torch.eye(2, 3, device=DEVICE).expand(b, 2, 3), images.shape, align_corners=False)
        images = F.grid_sample(images, eye + flow.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    images = blur(images, strength * 1.1 * draw(rng, b))
    for side, level in ((64, .02), (16, .03), (4, .03)):
        images = images + F.interpolate(noise(rng, b, 3, side, side), (SIZE, SIZE), mode="bilinear") * level * strength * draw(rng, b, 1, 1, 1) ** 2
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1 + .12 * strength * draw(rng, b, 1, 1, 1, low=-1))
    return (images + .02 * strength * noise(rng, b, 3, 1, 1)).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------------------------------- CLIP

def hard_negatives(caption):
    """Wrong captions for a picture of `caption`, one thing changed: dict kind -> list of captions (of either side of the split)."""
    kinds, relation = parse_caption(caption)

    def replaced(i, kind):
        return caption_of([kind if j == i else k for j, k in enumerate(kinds)], relation)

    rest = [[k for j, k in enumerate(kinds) if j != i] for i in range(len(kinds))]
    out = dict(colour=[replaced(i, (c, s)) for i, (c0, s) in enumerate(kinds) for c in COLOURS if c != c0 and (c, s) not in rest[i]],
               shape=[replaced(i, (c, s)) for i, (c, s0) in enumerate(kinds) for s in SHAPES if s != s0 and (c, s) not in rest[i]])
    if relation is None:
        out["count"] = [caption_of(pair, r) for k in KINDS if k != kinds[0] for r in RELATIONS for pair in ((kinds[0], k), (k, kinds[0]))]
        return out
    (c0, s0), (c1, s1) = kinds
    other = RELATIONS[1 - RELATIONS.index(relation)]
    out |= dict(exchanged=[caption_of(kinds[::-1], relation)], relation=[caption_of(kinds, other), caption_of(kinds[::-1], other)],
                count=[caption_of([k]) for k in kinds])
    if c0 != c1 and s0 != s1:
        out["binding"] = [caption_of([(c1, s0), (c0, s1)], relation)]
    return out


class Captions:
    """All captions of one side of the split, their tokens (N, 12) and their hard negatives *within that side* (lists of row numbers)."""

    def __init__(self, test=False):
        self.text = all_captions(test)
        self.row = {caption: i for i, caption in enumerate(self.text)}
        self.tokens = tokenise(self.text)
        self.wrong = [[[self.row[c] for c in group if c in self.row] for group in hard_negatives(caption).values()] for caption in self.text]
        self.mirror = [self.row[mirrored(caption)] for caption in self.text]

    def negatives(self, row, rng, each=3):
        """Up to `each` of every kind, about 10 captions; those of the whole batch, some 350, are wrong for a picture too."""
        return [c for group in self.wrong[row] for c in rng.permutation(group)[:each]]


def mirrored(caption):
    """The caption of the picture flipped left to right."""
    kinds, relation = parse_caption(caption)
    return caption_of(kinds[::-1] if relation == "left of" else kinds, relation)


def tokenise(texts):
    return make_tokenizer()(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)


def new_clip(vocab, text, vision, dim):
    """CLIPModel from (width, layers, mlp) of the text side and (width, layers, mlp, patch) of the vision side."""
    shape = lambda c: dict(hidden_size=c[0], num_hidden_layers=c[1], intermediate_size=c[2], num_attention_heads=c[0] // 32,
                           projection_dim=dim, hidden_act="gelu")
    return CLIPModel(CLIPConfig(
        text_config=shape(text) | dict(vocab_size=vocab, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1),
        vision_config=shape(vision) | dict(image_size=SIZE, patch_size=vision[3]), projection_dim=dim)).to(DEVICE)


def embed_text(model, tokens):
    return F.normalize(model.get_text_features(tokens).pooler_output, dim=-1)


def embed_images(model, images):
    """-> embedding (B, D), patch tokens (B, P, width)."""
    out = model.vision_model(normalise(images, CLIP_MEAN, CLIP_STD))
    return F.normalize(model.visual_projection(out.pooler_output), dim=-1), out.last_hidden_state[:, 1:]


def patch_loss(guess, scenes, coverage, patch):
    """Cross-entropy of guess (B, P, 6 + 5) with the shares of each patch that no object and each colour, and each shape, cover."""
    area = F.avg_pool2d(torch.from_numpy(coverage).to(DEVICE).float() / 255, patch).flatten(2)           # (B, 2, P)
    colour, shape = area.new_zeros(*area.shape[::2], 1 + len(COLOURS)), area.new_zeros(*area.shape[::2], 1 + len(SHAPES))
    for b, scene in enumerate(scenes):
        for i, o in enumerate(scene["objects"]):
            colour[b, :, 1 + list(COLOURS).index(o["colour"])] += area[b, i]
            shape[b, :, 1 + SHAPES.index(o["shape"])] += area[b, i]
    colour[..., 0] = shape[..., 0] = 1 - area.sum(1).clamp(max=1)
    return -(F.log_softmax(guess[..., :6], -1) * colour).sum(-1).mean() - (F.log_softmax(guess[..., 6:], -1) * shape).sum(-1).mean()


def contrast(model, image_embedding, tokens, own):
    """CLIP's loss. own (B,): which row of tokens (U, 12) belongs to each image; the other rows, hard negatives among them, are wrong for it."""
    logits = model.logit_scale.clamp(max=math.log(100)).exp() * image_embedding @ embed_text(model, tokens).T       # (B, U)
    right = F.one_hot(own, len(tokens)).float()
    used = right.sum(0) > 0                                      # captions without an image have no row in the text -> image half
    to_image = F.log_softmax(logits[:, used], 0) * right[:, used] / right[:, used].sum(0)
    return (F.cross_entropy(logits, own) - to_image.sum(0).mean()) / 2, (logits.argmax(1) == own).float().mean()


def clip_step(model, head, data, captions, batch, patch):
    """The step of make_clip: images with their captions and hard negatives, and the auxiliary loss that makes patches say what they see."""
    def step(step, rng):
        index = rng.choice(len(data["scenes"]), batch, replace=False)
        scenes, images, coverage = [data["scenes"][i] for i in index], data["images"][index], data["coverage"][index]
        rows = [captions.row[s["caption"]] for s in scenes]
        if rng.random() < .5:
            images, coverage, rows = images[:, :, ::-1].copy(), coverage[..., ::-1].copy(), [captions.mirror[r] for r in rows]
        unique, where = np.unique(rows + [n for r in rows for n in captions.negatives(r, rng)], return_inverse=True)
        embedding, patches = embed_images(model, generated_look(to_images(images), rng))
        loss, right = contrast(model, embedding, captions.tokens[torch.from_numpy(unique).to(DEVICE)], torch.from_numpy(where[:batch]).to(DEVICE))
        see = patch_loss(head(patches), scenes, coverage, patch)
        return loss + see, dict(right=right, see=see)
    return step


def fit_in_cycles(name, modules, step, steps, lr, seed, ema):
    """training.fit once for each number of `steps`: cosine cycles, each at half the rate of the one before. A second one is worth more than
    its time: it took shape swaps of toy/clip on held-out captions from .95 to .98, the best of all 14 wrong captions from .75 to .93."""
    for i, count in enumerate(steps):
        for m in modules.values():
            m.requires_grad_(True)
        fit(name + "_more" * i, modules, step, count, lr * .5 ** i, seed=seed + i, ema=ema)


def make_clip(steps=(2800, 1500)):
    """toy/clip: the alignment reward. ViT 128 x 4 with patches of 8, text 96 x 2."""
    torch.manual_seed(10)
    tokenizer = make_tokenizer()
    model = new_clip(len(tokenizer), (96, 2, 288), (128, 4, 256, 8), 96)
    head = nn.Linear(128, 6 + 5).to(DEVICE)
    step = clip_step(model, head, cached_scenes(), Captions(), 64, 8)
    fit_in_cycles("clip", dict(model=model, head=head), step, steps, 5e-4, seed=10, ema=.998)
    save("clip", model, CLIP_MEAN, CLIP_STD, "CLIPImageProcessor", tokenizer)


# ------------------------------------------------------------------------------------------------------------------------ preference

ALIGNED = 3.5                                                    # what a right caption is worth; the taste alone spans about 0 to 5


def taste(scene, fine):
    """The hidden taste of the toy world, from 0 to about 5: what make_pref's "people" like in a picture that fits its caption.

    Fine part, reachable in the last quarter of the sampling: crisp edges, saturated colours, a smooth and noise-free background.
    Global part, decided early, and what makes diversity collapse when optimised: large objects, upright, on a light background.
    `fine` is (blur in pixels 0..2.2, saturation factor .45..1.3, noise 0..1) of looks() below.
    """
    sigma, saturation, dirt = fine
    objects = scene["objects"]
    low, high = (.15, .27) if len(objects) == 1 else (.125, .205)
    colourful = np.mean([np.ptp(o["rgb"]) / np.ptp(COLOURS[o["colour"]]) for o in objects]) * saturation
    crisp, vivid, clean = 1 - sigma / 2.2, np.clip(colourful, .4, 1.2) - .4, 1 - dirt
    large = np.mean([(o["r"] - low) / (high - low) for o in objects])
    upright = 1 - np.mean([0 if o["shape"] == "circle" else abs(o["angle"]) for o in objects]) / np.radians(26)
    light = (scene["background"]["tone"] - .22) / .7
    return 1.2 * crisp + 1.0 * vivid + .8 * clean + .9 * large + .7 * upright + .9 * light


def looks(rng, count):
    """(count, 3): blur, saturation, noise, most pictures on the good side."""
    return np.stack([2.2 * rng.random(count) ** 2, rng.uniform(.45, 1.3, count), rng.random(count) ** 2], 1)


def apply_looks(images, coverage, fine, rng):
    """images (B, 3, H, W), coverage (B, 2, H, W) in [0, 1], looks (B, 3) -> pictures as a generator might have made them."""
    fine = torch.from_numpy(fine).float().to(DEVICE)
    grey = images.mean(1, keepdim=True)
    images = (grey + (images - grey) * fine[:, 1, None, None, None]).clamp(0, 1)
    images = blur(images, fine[:, 0])
    background = 1 - .7 * coverage.sum(1, keepdim=True).clamp(max=1)
    for side, level in ((64, .045), (24, .07), (8, .07)):        # grain, mottle, blotches
        dirt = F.interpolate(noise(rng, len(images), 3, side, side), (SIZE, SIZE), mode="bilinear")
        images = images + level * fine[:, 2, None, None, None] * background * dirt
    return generated_look(images.clamp(0, 1), rng, .4)


class Pairs:
    """Pairs of pictures for one caption, as a preference data set holds them."""

    def __init__(self, data, captions):
        self.data, self.captions = data, captions
        self.rows = np.array([captions.row[s["caption"]] for s in data["scenes"]])
        self.having = {row: np.flatnonzero(self.rows == row) for row in np.unique(self.rows)}

    def draw(self, rng, count):
        """-> images (2 * count, 3, H, W): first of all pairs, then second; caption rows (count,); how much better the first is (count,).

        The second picture of the first half belongs to a wrong caption. Of the other half, by turns: both scene and looks differ, same scene
        (fine taste only), same looks (global taste only)."""
        index, fine = np.zeros((2, count), int), np.stack([looks(rng, count), looks(rng, count)])
        strange = np.arange(count) < count // 2
        for i in range(count):
            first = rng.integers(len(self.rows))
            if strange[i]:
                groups = [g for g in self.captions.wrong[self.rows[first]] if g]
                second = rng.choice(self.having[rng.choice(groups[rng.integers(len(groups))])])
            else:
                second = first if i % 3 == 1 else rng.choice(self.having[self.rows[first]])
                if i % 3 == 2:
                    fine[1, i] = fine[0, i]
            index[:, i] = first, second
        value = np.array([[taste(self.data["scenes"][j], f) for j, f in zip(index[k], fine[k])] for k in (0, 1)])
        better = value[0] - value[1] + ALIGNED * strange
        index = index.ravel()
        coverage = torch.from_numpy(self.data["coverage"][index]).to(DEVICE).float() / 255
        images = apply_looks(to_images(self.data["images"][index]), coverage, fine.reshape(-1, 3), rng)
        return images, self.rows[index[:count]], torch.from_numpy(better).float().to(DEVICE)


def preference_step(model, pairs, captions, batch):
    """Bradley-Terry on score = exp(logit_scale) cos(image, text), PickScore's way; people are a little unsure (a soft label)."""
    def step(step, rng):
        images, rows, better = pairs.draw(rng, batch)
        embedding, _ = embed_images(model, images)
        text = embed_text(model, captions.tokens[torch.from_numpy(rows).to(DEVICE)])
        first, second = (model.logit_scale.exp() * (e * text).sum(-1) for e in embedding.chunk(2))
        loss = F.binary_cross_entropy_with_logits(first - second, torch.sigmoid(3 * better))
        right = ((first > second) == (better > 0)).float()
        return loss, dict(wrong=right[:batch // 2].mean(), same=right[batch // 2:].mean(), scale=model.logit_scale.exp().detach())
    return step


def make_pref(steps=(1600, 1200)):
    """toy/pref: toy/clip fine-tuned on preferences, as PickScore was from CLIP-H."""
    torch.manual_seed(20)
    data, captions = cached_scenes(), Captions()
    model = CLIPModel.from_pretrained(ROOT / "clip", dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
    step = preference_step(model, Pairs(data, captions), captions, 32)
    fit_in_cycles("pref", dict(model=model), step, steps, 4e-4, seed=20, ema=.995)
    save("pref", model, CLIP_MEAN, CLIP_STD, "CLIPImageProcessor", make_tokenizer())


def make_pref_b(steps=(1800, 800), preference_steps=(1400, 1000)):
    """toy/pref_b: a second judge with the same taste, of another seed, width and depth, with a CLIP of its own. Never trained on."""
    torch.manual_seed(30)
    data, captions = cached_scenes(), Captions()
    model = new_clip(len(make_tokenizer()), (64, 2, 192), (96, 5, 192, 8), 64)
    head = nn.Linear(96, 6 + 5).to(DEVICE)
    fit_in_cycles("pref_b_clip", dict(model=model, head=head), clip_step(model, head, data, captions, 64, 8), steps, 7e-4, seed=30, ema=.998)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
    step = preference_step(model, Pairs(data, captions), captions, 32)
    fit_in_cycles("pref_b", dict(model=model), step, preference_steps, 4e-4, seed=32, ema=.995)
    save("pref_b", model, CLIP_MEAN, CLIP_STD, "CLIPImageProcessor", make_tokenizer())


# ----------------------------------------------------------------------------------------------------------------------- feature extractor

def scene_vector(scene):
    """What a caption leaves open, in units in which a difference of 1 is a clear one: (2 objects x (there, x, y, size, angle), tone)."""
    v = np.zeros(11)
    for i, o in enumerate(scene["objects"]):
        v[5 * i:5 * i + 5] = 1, o["x"] / .35, o["y"] / .35, o["r"] / .07, 0 if o["shape"] == "circle" else o["angle"] / .5
    v[10] = scene["background"]["tone"] / .35
    return v


def scene_kinds(scene):
    """(2 objects x (5 colours + 4 shapes)) one-hot: what the caption says."""
    v = np.zeros((2, len(COLOURS) + len(SHAPES)))
    for i, o in enumerate(scene["objects"]):
        v[i, list(COLOURS).index(o["colour"])] = v[i, len(COLOURS) + SHAPES.index(o["shape"])] = 1
    return v.ravel()


def make_dino(steps=(2000, 1000), batch=64):
    """toy/dino: a ViT whose CLS token is near for near scenes: its cosine is taught a kernel of the scene's parameters, and the
    parameters must be readable from it. (64 px scenes are too few and too plain for real self-distillation. Without the reading of
    parameters and patches it sees little more than the tone of the background, which is the easiest part of the kernel.)"""
    torch.manual_seed(40)
    data = cached_scenes()
    vectors, kinds = (torch.tensor(np.stack([f(s) for s in data["scenes"]]), dtype=torch.float32, device=DEVICE) for f in (scene_vector, scene_kinds))
    standard = torch.cat([vectors, kinds], 1)
    standard = (standard - standard.mean(0)) / standard.std(0).clamp(min=.1)             # the first object is always there: std 0
    by_caption = {}
    for i, s in enumerate(data["scenes"]):
        by_caption.setdefault(s["caption"], []).append(i)
    groups = [g for g in by_caption.values() if len(g) >= 4]
    model = ViTModel(ViTConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, intermediate_size=256, image_size=SIZE, patch_size=8,
                               pooler_output_size=8, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)).to(DEVICE)
    read, head = nn.Linear(96, standard.shape[1]).to(DEVICE), nn.Linear(96, 6 + 5).to(DEVICE)
    same = torch.block_diag(*[torch.ones(4, 4, device=DEVICE)] * (batch // 4))

    def step(step, rng):                                         # fours of one caption
        index = np.concatenate([rng.choice(groups[g], 4, replace=False) for g in rng.choice(len(groups), batch // 4, replace=False)])
        images = generated_look(to_images(data["images"][index]), rng)
        tokens = model(normalise(images, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state
        cls, v, k = F.normalize(tokens[:, 0], dim=-1), vectors[index], kinds[index]
        alike = (k @ k.T) / (k.sum(1)[:, None] * k.sum(1)).sqrt()                        # 1: the same things; a kernel, as is the product below
        error = (cls @ cls.T - torch.exp(-torch.cdist(v, v) ** 2 / 6) * (.4 + .6 * alike)) ** 2
        match = error.mean() + (error * same).sum() / same.sum()
        reading = F.mse_loss(read(tokens[:, 0]), standard[index])
        see = patch_loss(head(tokens[:, 1:]), [data["scenes"][i] for i in index], data["coverage"][index], 8)
        return 4 * match + reading + see, dict(match=match, reading=reading, see=see)

    fit_in_cycles("dino", dict(model=model, read=read, head=head), step, steps, 6e-4, seed=40, ema=.998)
    save("dino", model, IMAGENET_MEAN, IMAGENET_STD, "ViTImageProcessor")


# --------------------------------------------------------------------------------------------------------------------- artifact detectors

def mistakes(recipe, count=10240):
    """images uint8 (N, 64, 64, 3) of training captions with mistakes and their maps uint8 (N, 64, 64); two minutes."""
    images, maps = np.zeros((count, SIZE, SIZE, 3), np.uint8), np.zeros((count, SIZE, SIZE), np.uint8)
    for i in range(count):
        rng = rng_of("artifact", recipe, i)
        image, confidence = corrupt(sample_scene(rng), rng, recipe)
        images[i], maps[i] = np.rint(image * 255), np.rint(confidence * 255)
    return images, maps


def make_detector(name="detector", recipe="a", backbone=None, channels=32, steps=9000, batch=32, seed=50):
    """toy/detector: where a picture is wrong. UperNet on a small ResNet: a SegFormer of this size learns nothing in minutes, and both come
    through AutoModelForSemanticSegmentation. Per-pixel MSE on soft maps (DiffDoctor, Eq. 1); 40 % of the pictures are clean."""
    torch.manual_seed(seed)
    clean, (bad, maps) = cached_scenes()["images"], mistakes(recipe)
    backbone = backbone or ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96], depths=[2, 2, 2], layer_type="basic",
                                        out_features=["stage1", "stage2", "stage3"])
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, hidden_size=channels, pool_scales=[1, 2],
                                                         use_auxiliary_head=False, num_labels=1)).to(DEVICE)
    nn.init.constant_(model.decode_head.classifier.bias, -2.)    # most pixels are fine

    def step(step, rng):
        n = int(.6 * batch)
        i, j = rng.choice(len(bad), n, replace=False), rng.choice(len(clean), batch - n, replace=False)
        x = to_images(np.concatenate([bad[i], clean[j]]))
        y = F.pad(torch.from_numpy(maps[i]).to(DEVICE).float() / 255, (0, 0, 0, 0, 0, batch - n))
        if rng.random() < .5:
            x, y = x.flip(-1), y.flip(-1)
        if rng.random() < .8:
            x = generated_look(x, rng, .5)                       # maps stay where they are: waves of half a pixel
        with torch.autocast(DEVICE.type, torch.bfloat16):        # a third less time on a CPU with AMX; nothing gained for the small ViTs
            logits = model(normalise(x, IMAGENET_MEAN, IMAGENET_STD)).logits[:, 0]
        p = torch.sigmoid(logits.float())
        return F.mse_loss(p, y), dict(bad=p[:n][y[:n] > .5].mean(), fine=p[n:].mean(), miss=(p[:n] - y[:n]).square().mean())

    fit(name, dict(model=model), step, steps, 2e-3, seed=seed)
    save(name, model, IMAGENET_MEAN, IMAGENET_STD, "SegformerImageProcessor")


def make_detector_b():
    """toy/detector_b: the second opinion: other mistakes, another backbone and size, another seed."""
    backbone = ConvNextConfig(num_stages=3, hidden_sizes=[48, 64, 96], depths=[2, 2, 2], patch_size=4, image_size=SIZE, layer_scale_init_value=.1,
                              out_features=["stage1", "stage2", "stage3"])
    make_detector("detector_b", "b", backbone, 24, 9000, seed=60)
