"""The judges of the toy world: CLIP, two preference models, a feature extractor, two detectors.

make_clip() and its siblings train one network each with training.fit, which resumes and repeats
exactly on one thread. They save toy/<name>/ in fp16 and in the transformers format. Everything is
trained on renders of *training* captions, and quality.py measures it on held-out ones. make.py
calls them in order.
"""

import functools
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPConfig, CLIPModel, ConvNextConfig, PreTrainedTokenizerFast
from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation
from transformers import ViTConfig, ViTModel

from .artifacts import corrupt
from .scenes import COLOURS, KINDS, RELATIONS, SHAPES, SIZE, all_captions, caption_of
from .scenes import object_sizes, parse_caption, render, sample_scene
from .training import DEVICE, ROOT, fit, rng_of

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LENGTH = 12  # tokens of a padded prompt; the longest caption has 10 with bos and eos
GRAMMAR = "a red green blue yellow purple circle square triangle star left of above".split()
# These were never trained on. They are here so that a curious prompt is not just a row of <unk>.
OTHERS = """an the and with on in to is no not at by from next near right below under over beside
between behind front inside one two three four five small large big tiny huge bright dark light pale
orange pink black white grey brown cyan cross heart diamond rectangle ring moon sun house tree dog
cat shape object background photo picture image drawing""".split()


def make_tokenizer():
    """One token per word, for toy/sd and every CLIPModel here.

    As in the original CLIP the padding is the end token, and CLIPTextModel pools at its first
    occurrence. For that, eos_token_id of the config must be this tokenizer's, and not 2, which
    CLIPTextModel takes for an old config.
    """
    start, end, unknown = ["<|startoftext|>", "<|endoftext|>", "<unk>"]
    vocab = {word: i for i, word in enumerate([start, end, unknown] + GRAMMAR + OTHERS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, vocab[start]), (end, vocab[end])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        model_max_length=LENGTH,
        padding_side="right",
    )


# --------------------------------------------------------------------------------------------------
# Shared by all judges


def normalise(images, mean, std):
    """(B, 3, H, W) in [0, 1] -> normalized, as the network's preprocessor_config.json says."""
    mean = images.new_tensor(mean)[:, None, None]
    std = images.new_tensor(std)[:, None, None]
    return (images - mean) / std


def save(name, model, mean, std, processor, tokenizer=None):
    """Writes toy/<name>/: config and weights in fp16, preprocessor_config.json, the tokenizer."""
    folder = ROOT / name
    model.half().save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    is_clip = processor == "CLIPImageProcessor"
    size = dict(height=SIZE, width=SIZE)
    config = dict(
        image_processor_type=processor,
        do_resize=True,
        size=dict(shortest_edge=SIZE) if is_clip else size,
        resample=3 if is_clip else 2,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
    )
    if is_clip:
        config.update(do_center_crop=True, crop_size=size, do_convert_rgb=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def fresh_scenes(count, split="train"):
    """Renders random scenes; split "test" has the held-out captions.

    Returns dict(scenes, a list; images, uint8 (N, 64, 64, 3); coverage, uint8 (N, 2, 64, 64)).
    """
    scenes = []
    images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    coverage = np.zeros((count, 2, SIZE, SIZE), np.uint8)
    for i in range(count):
        scene = sample_scene(rng_of("judges", split, i), test=split == "test")
        image, cover = render(scene)
        scenes.append(scene)
        images[i] = np.rint(image * 255)
        coverage[i, : len(cover)] = np.rint(cover * 255)
    return dict(scenes=scenes, images=images, coverage=coverage)


@functools.cache
def cached_scenes():
    """The training scenes of all judges. Half a minute, once per process."""
    return fresh_scenes(16384)


def to_images(array):
    """uint8 (B, H, W, C) -> float (B, C, H, W) in [0, 1] on DEVICE."""
    return torch.from_numpy(array).to(DEVICE).permute(0, 3, 1, 2).float().contiguous() / 255


def draw(rng, *shape, low=0.0, high=1.0):
    return torch.from_numpy(rng.uniform(low, high, shape)).float().to(DEVICE)


def noise(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(DEVICE)


def scaled_noise(rng, count, channels, side, mode="bilinear"):
    """Noise of side x side, enlarged to (count, channels, 64, 64)."""
    return F.interpolate(noise(rng, count, channels, side, side), (SIZE, SIZE), mode=mode)


def blur(images, sigma):
    """Gaussian blur of (B, C, H, W), with a sigma in pixels per image (B,).

    Sigma 0 leaves an image alone, up to 1e-6.
    """
    offset = torch.arange(-5, 6, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=0.05)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    kernel = kernel.repeat_interleave(images.shape[1], 0)[:, None]  # (B * C, 1, 11)
    x = F.pad(images.flatten(0, 1)[None], (5, 5, 5, 5), mode="replicate")
    x = F.conv2d(x, kernel[:, :, None], groups=len(kernel))
    return F.conv2d(x, kernel[..., None], groups=len(kernel))[0].view_as(images)


def generated_look(images, rng, strength=1.0):
    """What a VAE and a weak generator do to a good picture.

    Slight waves, soft edges, fine and coarse noise, and small shifts of color. images (B, 3, 64,
    64) in [0, 1] -> the same shape and range.
    """
    b = len(images)
    # Waves of up to about a pixel.
    if strength * rng.random() > 0.15:
        flow = scaled_noise(rng, b, 2, 6, mode="bicubic")
        flow = flow * draw(rng, b, 1, 1, 1) ** 2 * 1.6 * strength * 2 / SIZE
        identity = torch.eye(2, 3, device=DEVICE).expand(b, 2, 3)
        places = F.affine_grid(identity, images.shape, align_corners=False)
        places = places + flow.permute(0, 2, 3, 1)
        images = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    images = blur(images, strength * 1.1 * draw(rng, b))
    for side, level in ((64, 0.02), (16, 0.03), (4, 0.03)):
        grain = scaled_noise(rng, b, 3, side)
        images = images + grain * level * strength * draw(rng, b, 1, 1, 1) ** 2
    # Saturation, then a tint of the whole picture.
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1 + 0.12 * strength * draw(rng, b, 1, 1, 1, low=-1))
    return (images + 0.02 * strength * noise(rng, b, 3, 1, 1)).clamp(0, 1)


# --------------------------------------------------------------------------------------------------
# CLIP


def hard_negatives(caption):
    """Wrong captions for a picture of `caption` with one thing changed: {kind: list of captions}.

    They are from both sides of the split.
    """
    kinds, relation = parse_caption(caption)
    wrong = dict(colour=[], shape=[])
    for i, (colour, shape) in enumerate(kinds):
        changed = [("colour", (other, shape)) for other in COLOURS if other != colour]
        changed += [("shape", (colour, other)) for other in SHAPES if other != shape]
        for what, kind in changed:
            new = list(kinds)
            new[i] = kind
            # No caption names one thing twice.
            if len(set(new)) == len(new):
                wrong[what].append(caption_of(new, relation))

    if relation is None:
        wrong["count"] = []
        for kind in KINDS:
            if kind != kinds[0]:
                for name in RELATIONS:
                    wrong["count"].append(caption_of([kinds[0], kind], name))
                    wrong["count"].append(caption_of([kind, kinds[0]], name))
        return wrong

    other = RELATIONS[1 - RELATIONS.index(relation)]
    wrong["exchanged"] = [caption_of(kinds[::-1], relation)]
    wrong["relation"] = [caption_of(kinds, other), caption_of(kinds[::-1], other)]
    wrong["count"] = [caption_of([kind]) for kind in kinds]
    (first_colour, first_shape), (second_colour, second_shape) = kinds
    if first_colour != second_colour and first_shape != second_shape:
        bound = [(second_colour, first_shape), (first_colour, second_shape)]
        wrong["binding"] = [caption_of(bound, relation)]
    return wrong


class Captions:
    """All captions of one side of the split.

    text      the captions, a list
    row       {caption: its number in the list}
    tokens    (N, 12)
    wrong     for each caption the row numbers of its hard negatives *of this side*, by kind
    mirror    for each caption the row number of the flipped picture's caption
    """

    def __init__(self, test=False):
        self.text = all_captions(test)
        self.row = {caption: i for i, caption in enumerate(self.text)}
        self.tokens = tokenise(self.text)
        self.wrong = [self.rows_by_kind(hard_negatives(caption)) for caption in self.text]
        self.mirror = [self.row[mirrored(caption)] for caption in self.text]

    def rows_by_kind(self, negatives):
        groups = []
        for captions in negatives.values():
            groups.append([self.row[caption] for caption in captions if caption in self.row])
        return groups

    def negatives(self, row, rng, each=3):
        """Up to `each` of every kind, about 10 rows.

        The captions of the rest of the batch, some 350, are wrong for a picture too.
        """
        rows = []
        for group in self.wrong[row]:
            rows += list(rng.permutation(group)[:each])
        return rows


def mirrored(caption):
    """The caption of the picture flipped left to right."""
    kinds, relation = parse_caption(caption)
    if relation == "left of":
        kinds = kinds[::-1]
    return caption_of(kinds, relation)


def tokenise(texts):
    """A list of texts -> token ids (N, 12) on DEVICE."""
    tokens = make_tokenizer()(texts, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids.to(DEVICE)


def tower(width, layers, mlp, dim):
    """What the configs of CLIP's two sides have in common."""
    return dict(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=width // 32,
        projection_dim=dim,
        hidden_act="gelu",
    )


def new_clip(vocab, text, vision, dim):
    """A random CLIPModel.

    vocab: number of tokens. text: (width, layers, mlp). vision: (width, layers, mlp, patch).
    dim: width of the shared embedding.
    """
    *vision, patch = vision
    text_config = dict(
        tower(*text, dim),
        vocab_size=vocab,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vision_config = dict(tower(*vision, dim), image_size=SIZE, patch_size=patch)
    config = CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=dim)
    return CLIPModel(config).to(DEVICE)


def embed_text(model, tokens):
    """Token ids (N, 12) -> unit vectors (N, D)."""
    return F.normalize(model.get_text_features(tokens).pooler_output, dim=-1)


def embed_images(model, images):
    """Images (B, 3, 64, 64) in [0, 1] -> unit vectors (B, D), and patch tokens (B, P, width)."""
    out = model.vision_model(normalise(images, CLIP_MEAN, CLIP_STD))
    embedding = F.normalize(model.visual_projection(out.pooler_output), dim=-1)
    return embedding, out.last_hidden_state[:, 1:]


def patch_loss(guess, scenes, coverage, patch):
    """Cross-entropy of a guess with what covers each patch.

    guess: (B, P, 6 + 5) logits: no object and the five colors, no object and the four shapes.
    coverage: uint8 (B, 2, 64, 64). patch: side of a patch in pixels. Returns a scalar.
    """
    coverage = torch.from_numpy(coverage).to(DEVICE).float() / 255
    area = F.avg_pool2d(coverage, patch).flatten(2)  # (B, 2, P)
    b, _, p = area.shape
    colour = area.new_zeros(b, p, 1 + len(COLOURS))
    shape = area.new_zeros(b, p, 1 + len(SHAPES))
    for k, scene in enumerate(scenes):
        for i, o in enumerate(scene["objects"]):
            colour[k, :, 1 + list(COLOURS).index(o["colour"])] += area[k, i]
            shape[k, :, 1 + SHAPES.index(o["shape"])] += area[k, i]
    nothing = 1 - area.sum(1).clamp(max=1)
    colour[..., 0] = nothing
    shape[..., 0] = nothing
    colour_loss = -(F.log_softmax(guess[..., :6], -1) * colour).sum(-1).mean()
    return colour_loss - (F.log_softmax(guess[..., 6:], -1) * shape).sum(-1).mean()


def contrast(model, image_embedding, tokens, own):
    """CLIP's loss, and the share of images (B, D) that find their own caption.

    own (B,): which row of tokens (U, 12) belongs to each image. The other rows, hard negatives
    among them, are wrong for it.
    """
    scale = model.logit_scale.clamp(max=math.log(100)).exp()
    logits = scale * image_embedding @ embed_text(model, tokens).T  # (B, U)
    right = F.one_hot(own, len(tokens)).float()
    # Captions without an image have no row in the text-to-image half.
    used = right.sum(0) > 0
    to_image = F.log_softmax(logits[:, used], 0) * right[:, used] / right[:, used].sum(0)
    loss = (F.cross_entropy(logits, own) - to_image.sum(0).mean()) / 2
    return loss, (logits.argmax(1) == own).float().mean()


def clip_step(model, head, data, captions, batch, patch):
    """Returns the step function of make_clip.

    It takes images with their captions and hard negatives. An auxiliary loss makes the patches say
    what they see.
    """

    def step_fn(step, rng):
        index = rng.choice(len(data["scenes"]), batch, replace=False)
        scenes = [data["scenes"][i] for i in index]
        images = data["images"][index]
        coverage = data["coverage"][index]
        rows = [captions.row[scene["caption"]] for scene in scenes]

        # Flip every second batch left to right.
        if rng.random() < 0.5:
            images = images[:, :, ::-1].copy()
            coverage = coverage[..., ::-1].copy()
            rows = [captions.mirror[row] for row in rows]

        # Each caption once, of the images first and of the hard negatives after them.
        all_rows = list(rows)
        for row in rows:
            all_rows += captions.negatives(row, rng)
        unique, where = np.unique(all_rows, return_inverse=True)
        tokens = captions.tokens[torch.from_numpy(unique).to(DEVICE)]
        own = torch.from_numpy(where[:batch]).to(DEVICE)

        embedding, patches = embed_images(model, generated_look(to_images(images), rng))
        loss, right = contrast(model, embedding, tokens, own)
        see = patch_loss(head(patches), scenes, coverage, patch)
        return loss + see, dict(right=right, see=see)

    return step_fn


def fit_in_cycles(name, modules, step_fn, steps, lr, seed, ema):
    """training.fit once for each number of `steps`: cosine cycles, each at half the last rate.

    A second cycle is worth more than its time. It took shape swaps of toy/clip on held-out captions
    from 0.95 to 0.98, and the best of all 14 wrong captions from 0.75 to 0.93.
    """
    for i, count in enumerate(steps):
        for module in modules.values():
            module.requires_grad_(True)
        cycle = name + "_more" * i
        fit(cycle, modules, step_fn, count, lr * 0.5**i, seed=seed + i, ema=ema)


def make_clip(steps=(2800, 1500)):
    """toy/clip, the alignment reward: a ViT of 128 x 4 with patches of 8, and a text of 96 x 2."""
    torch.manual_seed(10)
    tokenizer = make_tokenizer()
    model = new_clip(len(tokenizer), (96, 2, 288), (128, 4, 256, 8), 96)
    head = nn.Linear(128, 6 + 5).to(DEVICE)
    step_fn = clip_step(model, head, cached_scenes(), Captions(), 64, 8)
    modules = dict(model=model, head=head)
    fit_in_cycles("clip", modules, step_fn, steps, 5e-4, seed=10, ema=0.998)
    save("clip", model, CLIP_MEAN, CLIP_STD, "CLIPImageProcessor", tokenizer)


# --------------------------------------------------------------------------------------------------
# Preference

ALIGNED = 3.5  # what a right caption is worth; the taste alone spans about 0 to 5


def taste(scene, fine):
    """The hidden taste of the toy world, from 0 to about 5.

    It is what the "people" of make_pref like in a picture that fits its caption. The last quarter
    of the sampling can still change the fine part: crisp edges, saturated colors, a smooth
    background without noise. The global part is decided early, and makes diversity collapse when it
    is optimized: large objects, upright, on a light background.

    fine: (blur in pixels 0 .. 2.2, saturation factor 0.45 .. 1.3, noise 0 .. 1), as from `looks`.
    """
    sigma, saturation, dirt = fine
    objects = scene["objects"]
    ratios = [np.ptp(o["rgb"]) / np.ptp(COLOURS[o["colour"]]) for o in objects]
    colourful = np.mean(ratios) * saturation
    crisp = 1 - sigma / 2.2
    vivid = np.clip(colourful, 0.4, 1.2) - 0.4
    clean = 1 - dirt

    low, high = object_sizes(len(objects))
    large = np.mean([(o["r"] - low) / (high - low) for o in objects])
    tilts = [0 if o["shape"] == "circle" else abs(o["angle"]) for o in objects]
    upright = 1 - np.mean(tilts) / np.radians(26)
    light = (scene["background"]["tone"] - 0.22) / 0.7
    return 1.2 * crisp + 1.0 * vivid + 0.8 * clean + 0.9 * large + 0.7 * upright + 0.9 * light


def looks(rng, count):
    """(count, 3): blur, saturation and noise, most pictures on the good side."""
    sigma = 2.2 * rng.random(count) ** 2
    saturation = rng.uniform(0.45, 1.3, count)
    dirt = rng.random(count) ** 2
    return np.stack([sigma, saturation, dirt], 1)


def apply_looks(images, coverage, fine, rng):
    """Images (B, 3, H, W) as a generator might have made them, with looks `fine` (B, 3).

    coverage (B, objects, H, W) in [0, 1]: most of the noise goes to the background.
    """
    fine = torch.from_numpy(fine).float().to(DEVICE)
    grey = images.mean(1, keepdim=True)
    images = (grey + (images - grey) * fine[:, 1, None, None, None]).clamp(0, 1)
    images = blur(images, fine[:, 0])
    background = 1 - 0.7 * coverage.sum(1, keepdim=True).clamp(max=1)
    # Grain, mottle, blotches.
    for side, level in ((64, 0.045), (24, 0.07), (8, 0.07)):
        dirt = scaled_noise(rng, len(images), 3, side)
        images = images + level * fine[:, 2, None, None, None] * background * dirt
    return generated_look(images.clamp(0, 1), rng, 0.4)


class Pairs:
    """Pairs of pictures for one caption, as a preference data set holds them."""

    def __init__(self, data, captions):
        self.data = data
        self.captions = captions
        self.rows = np.array([captions.row[scene["caption"]] for scene in data["scenes"]])
        self.having = {row: np.flatnonzero(self.rows == row) for row in np.unique(self.rows)}

    def draw(self, rng, count):
        """Returns images, captions, and which image is better, for `count` pairs:

        images (2 * count, 3, H, W): the first picture of all pairs, then the second
        caption rows (count,)
        how much better the first one is (count,)

        In the first half of the pairs the second picture belongs to a wrong caption. In the other
        half, by turns: scene and looks differ, or the scene is the same (fine taste only), or the
        looks are the same (global taste only).
        """
        index = np.zeros((2, count), int)
        fine = np.stack([looks(rng, count), looks(rng, count)])
        strange = np.arange(count) < count // 2
        for i in range(count):
            first = rng.integers(len(self.rows))
            if strange[i]:
                groups = [group for group in self.captions.wrong[self.rows[first]] if group]
                row = rng.choice(groups[rng.integers(len(groups))])
                second = rng.choice(self.having[row])
            elif i % 3 == 1:
                second = first
            else:
                second = rng.choice(self.having[self.rows[first]])
            if not strange[i] and i % 3 == 2:
                fine[1, i] = fine[0, i]
            index[:, i] = first, second

        value = np.zeros((2, count))
        for k in (0, 1):
            for i in range(count):
                value[k, i] = taste(self.data["scenes"][index[k, i]], fine[k, i])
        better = value[0] - value[1] + ALIGNED * strange

        index = index.ravel()
        coverage = torch.from_numpy(self.data["coverage"][index]).to(DEVICE).float() / 255
        images = to_images(self.data["images"][index])
        images = apply_looks(images, coverage, fine.reshape(-1, 3), rng)
        return images, self.rows[index[:count]], torch.from_numpy(better).float().to(DEVICE)


def preference_step(model, pairs, captions, batch):
    """Returns the step function of make_pref: Bradley-Terry, in PickScore's way.

    The score is exp(logit_scale) cos(image, text). People are a little unsure, so the label is
    soft.
    """

    def step_fn(step, rng):
        images, rows, better = pairs.draw(rng, batch)
        embedding, _ = embed_images(model, images)
        text = embed_text(model, captions.tokens[torch.from_numpy(rows).to(DEVICE)])
        first_embedding, second_embedding = embedding.chunk(2)
        scale = model.logit_scale.exp()
        first = scale * (first_embedding * text).sum(-1)
        second = scale * (second_embedding * text).sum(-1)
        loss = F.binary_cross_entropy_with_logits(first - second, torch.sigmoid(3 * better))
        right = ((first > second) == (better > 0)).float()
        half = batch // 2
        stats = dict(wrong=right[:half].mean(), same=right[half:].mean(), scale=scale.detach())
        return loss, stats

    return step_fn


def make_pref(steps=(1600, 1200)):
    """toy/pref: toy/clip fine-tuned on preferences, as PickScore was from CLIP-H."""
    torch.manual_seed(20)
    data = cached_scenes()
    captions = Captions()
    model = CLIPModel.from_pretrained(ROOT / "clip", dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
    step_fn = preference_step(model, Pairs(data, captions), captions, 32)
    fit_in_cycles("pref", dict(model=model), step_fn, steps, 4e-4, seed=20, ema=0.995)
    save("pref", model, CLIP_MEAN, CLIP_STD, "CLIPImageProcessor", make_tokenizer())


def make_pref_b(steps=(1800, 800), preference_steps=(1400, 1000)):
    """toy/pref_b: a second judge with the same taste, which nothing is ever trained on.

    It has another seed, width and depth, and a CLIP of its own.
    """
    torch.manual_seed(30)
    data = cached_scenes()
    captions = Captions()
    model = new_clip(len(make_tokenizer()), (64, 2, 192), (96, 5, 192, 8), 64)
    head = nn.Linear(96, 6 + 5).to(DEVICE)
    modules = dict(model=model, head=head)
    step_fn = clip_step(model, head, data, captions, 64, 8)
    fit_in_cycles("pref_b_clip", modules, step_fn, steps, 7e-4, seed=30, ema=0.998)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
    step_fn = preference_step(model, Pairs(data, captions), captions, 32)
    modules = dict(model=model)
    fit_in_cycles("pref_b", modules, step_fn, preference_steps, 4e-4, seed=32, ema=0.995)
    save("pref_b", model, CLIP_MEAN, CLIP_STD, "CLIPImageProcessor", make_tokenizer())


# --------------------------------------------------------------------------------------------------
# Feature extractor


def scene_vector(scene):
    """What a caption leaves open (11,), in units in which a difference of 1 is a clear one.

    Two objects x (there, x, y, size, angle), then the tone of the background.
    """
    v = np.zeros(11)
    for i, o in enumerate(scene["objects"]):
        angle = 0 if o["shape"] == "circle" else o["angle"] / 0.5
        v[5 * i : 5 * i + 5] = 1, o["x"] / 0.35, o["y"] / 0.35, o["r"] / 0.07, angle
    v[10] = scene["background"]["tone"] / 0.35
    return v


def scene_kinds(scene):
    """What the caption says (18,): two objects x (5 colors + 4 shapes), one-hot."""
    v = np.zeros((2, len(COLOURS) + len(SHAPES)))
    for i, o in enumerate(scene["objects"]):
        v[i, list(COLOURS).index(o["colour"])] = 1
        v[i, len(COLOURS) + SHAPES.index(o["shape"])] = 1
    return v.ravel()


def to_rows(vectors):
    return torch.tensor(np.stack(vectors), dtype=torch.float32, device=DEVICE)


def dino_step(model, read, head, data, batch):
    """Returns the step function of make_dino, whose batches hold fours of one caption."""
    vectors = to_rows([scene_vector(scene) for scene in data["scenes"]])
    kinds = to_rows([scene_kinds(scene) for scene in data["scenes"]])
    # The first object is always there, so that entry has std 0.
    standard = torch.cat([vectors, kinds], 1)
    standard = (standard - standard.mean(0)) / standard.std(0).clamp(min=0.1)
    by_caption = {}
    for i, scene in enumerate(data["scenes"]):
        by_caption.setdefault(scene["caption"], []).append(i)
    groups = [group for group in by_caption.values() if len(group) >= 4]
    same = torch.block_diag(*[torch.ones(4, 4, device=DEVICE)] * (batch // 4))

    def step_fn(step, rng):
        chosen = rng.choice(len(groups), batch // 4, replace=False)
        index = np.concatenate([rng.choice(groups[g], 4, replace=False) for g in chosen])
        images = generated_look(to_images(data["images"][index]), rng)
        normalised = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
        tokens = model(normalised).last_hidden_state
        cls = F.normalize(tokens[:, 0], dim=-1)
        v = vectors[index]
        k = kinds[index]
        # 1 for the same things. It is a kernel, and so is its product with the other one.
        alike = (k @ k.T) / (k.sum(1)[:, None] * k.sum(1)).sqrt()
        kernel = torch.exp(-(torch.cdist(v, v) ** 2) / 6) * (0.4 + 0.6 * alike)
        error = (cls @ cls.T - kernel) ** 2
        match = error.mean() + (error * same).sum() / same.sum()
        reading = F.mse_loss(read(tokens[:, 0]), standard[index])
        scenes = [data["scenes"][i] for i in index]
        see = patch_loss(head(tokens[:, 1:]), scenes, data["coverage"][index], 8)
        return 4 * match + reading + see, dict(match=match, reading=reading, see=see)

    return step_fn


def make_dino(steps=(2000, 1000), batch=64):
    """toy/dino: a ViT whose CLS tokens are near each other for similar scenes.

    Its cosine learns a kernel of the scenes' parameters, and the parameters must be readable from
    it. Scenes of 64 pixels are too few and too plain for real self-distillation. Without the
    reading of parameters and patches it sees little more than the tone of the background, which is
    the easiest part of the kernel.
    """
    torch.manual_seed(40)
    data = cached_scenes()
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=256,
        image_size=SIZE,
        patch_size=8,
        pooler_output_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTModel(config).to(DEVICE)
    num_parameters = len(scene_vector(data["scenes"][0])) + len(scene_kinds(data["scenes"][0]))
    read = nn.Linear(96, num_parameters).to(DEVICE)
    head = nn.Linear(96, 6 + 5).to(DEVICE)
    step_fn = dino_step(model, read, head, data, batch)
    modules = dict(model=model, read=read, head=head)
    fit_in_cycles("dino", modules, step_fn, steps, 6e-4, seed=40, ema=0.998)
    save("dino", model, IMAGENET_MEAN, IMAGENET_STD, "ViTImageProcessor")


# --------------------------------------------------------------------------------------------------
# Artifact detectors


def mistakes(recipe, count=10240):
    """Pictures of training captions with mistakes, and their maps. Takes two minutes.

    Returns images uint8 (N, 64, 64, 3) and maps uint8 (N, 64, 64).
    """
    images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    maps = np.zeros((count, SIZE, SIZE), np.uint8)
    for i in range(count):
        rng = rng_of("artifact", recipe, i)
        image, confidence = corrupt(sample_scene(rng), rng, recipe)
        images[i] = np.rint(image * 255)
        maps[i] = np.rint(confidence * 255)
    return images, maps


def detector_step(model, clean, bad, maps, batch):
    """Returns the step function of make_detector.

    clean: uint8 (N, 64, 64, 3). bad: pictures with mistakes of the same form; maps: (N, 64, 64).
    """

    def step_fn(step, rng):
        # 60 % of the pictures have mistakes. The clean ones have empty maps.
        n = int(0.6 * batch)
        i = rng.choice(len(bad), n, replace=False)
        j = rng.choice(len(clean), batch - n, replace=False)
        x = to_images(np.concatenate([bad[i], clean[j]]))
        y = torch.from_numpy(maps[i]).to(DEVICE).float() / 255
        y = F.pad(y, (0, 0, 0, 0, 0, batch - n))
        if rng.random() < 0.5:
            x = x.flip(-1)
            y = y.flip(-1)
        # The maps stay where they are: the waves are half a pixel.
        if rng.random() < 0.8:
            x = generated_look(x, rng, 0.5)
        # A third less time on a CPU with AMX. The small ViTs would gain nothing.
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(normalise(x, IMAGENET_MEAN, IMAGENET_STD)).logits[:, 0]
        p = torch.sigmoid(logits.float())
        stats = dict(
            bad=p[:n][y[:n] > 0.5].mean(),
            fine=p[n:].mean(),
            miss=(p[:n] - y[:n]).square().mean(),
        )
        return F.mse_loss(p, y), stats

    return step_fn


def make_detector(
    name="detector", recipe="a", backbone=None, channels=32, steps=9000, batch=32, seed=50
):
    """toy/detector: where a picture is wrong. Per-pixel MSE on soft maps (DiffDoctor, Eq. 1).

    It is UperNet on a small ResNet. A SegFormer of this size learns nothing in minutes, and both
    open with AutoModelForSemanticSegmentation.
    """
    torch.manual_seed(seed)
    clean = cached_scenes()["images"]
    bad, maps = mistakes(recipe)
    backbone = backbone or ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96],
        depths=[2, 2, 2],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=channels,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=1,
    )
    model = UperNetForSemanticSegmentation(config).to(DEVICE)
    # Most pixels are fine.
    nn.init.constant_(model.decode_head.classifier.bias, -2.0)
    step_fn = detector_step(model, clean, bad, maps, batch)
    fit(name, dict(model=model), step_fn, steps, 2e-3, seed=seed)
    save(name, model, IMAGENET_MEAN, IMAGENET_STD, "SegformerImageProcessor")


def make_detector_b():
    """toy/detector_b, the second opinion: other mistakes, another backbone, size and seed."""
    backbone = ConvNextConfig(
        num_stages=3,
        hidden_sizes=[48, 64, 96],
        depths=[2, 2, 2],
        patch_size=4,
        image_size=SIZE,
        layer_scale_init_value=0.1,
        out_features=["stage1", "stage2", "stage3"],
    )
    make_detector("detector_b", "b", backbone, 24, 9000, seed=60)
