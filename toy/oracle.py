"""Reads a scene of the toy world without any learned part, and says whether a caption holds: the ground truth beside the learned judges.

  1. background: a smooth surface, fitted robustly to the pixels from the border inwards
  2. objects: connected pixels that differ from it, cut where the hue changes
  3. colour: the hue of its mean colour, against the five of the palette
  4. shape: the radius of the object in 120 directions around its centre, against the four shapes at any rotation, size and blur
  5. verdict: the caption's objects, one to one, and their relation

Of 4,000 clean renders (half of them held-out combinations) it finds all right and abstains on none; it accepts none of their 17,500 wrong
captions (a colour or shape swapped, objects exchanged, relation changed, an object too many) and none of 2,000 stars with 4, 6 or 7 arms or one
arm missing. The same for these renders blurred (sigma .5 to .8 pixels), with noise (.02) and a saturation of .75 to 1.1. 4 ms an image.

  $ python toy/oracle.py                               # prints these rates: 2 minutes
  $ python toy/oracle.py image.png "a red circle"      # prints what it reads, and the verdict

It sees no texture: a circle that is half red and half orange passes. It judges outlines strictly: an object overlapped by another is malformed.
"""
import functools
import itertools
import sys
import time
from pathlib import Path

import numpy as np

if not __package__:                                              # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toy.scenes import COLOURS, INNER, KINDS, RELATIONS, SHAPES, SIZE, caption_of, object_coverage, parse_caption, polygon, render, sample_scene

FOREGROUND = .15             # distance to the background, in RGB; objects are at least .3 away
SPECK, NOTABLE = 14, 40      # pixels: smaller things are ignored; things between the two make the oracle abstain
HUE_SURE, HUE_MAYBE = 20, 32  # degrees from the palette's hue; red and yellow, its closest, are 52 apart
GREY = .15                   # chroma below which a thing has no colour
# rms error of the radius, relative to its mean: a shape recognised at a glance, and one that might pass. Clean renders stay below .02,
# a star of 4 or 6 arms has .13 or .22, a square stretched by a fifth .10
FIT = dict(circle=(.05, .075), square=(.06, .09), triangle=(.07, .11), star=(.08, .12))
MARGIN = 1.25                # the second best shape must fit worse than the best by this factor
DIRECTIONS = 120             # divisible by 3, 4, 5 and 6
Y, X = np.mgrid[:SIZE, :SIZE]
QUADRATIC = np.stack([np.ones((SIZE, SIZE)), X / 31.5 - 1, Y / 31.5 - 1], -1)
QUADRATIC = np.concatenate([QUADRATIC, QUADRATIC[..., [1, 1, 2]] * QUADRATIC[..., [1, 2, 2]]], -1)
BORDER = (np.minimum(X, Y) < 2) | (np.maximum(X, Y) >= SIZE - 2)


# ------------------------------------------------------------------------------------------------------------------------- segmentation

def to_array(image):
    """PIL image, (3, H, W) tensor or (H, W, 3) array, in [0, 1] -> (64, 64, 3) float64."""
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"), float) / 255
    elif hasattr(image, "detach"):
        image = image.detach().float().cpu().permute(1, 2, 0).numpy()
    image = np.asarray(image, float)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is a PIL image, a (3, H, W) tensor or an (H, W, 3) array in [0, 1], not {image.shape}")
    if image.shape[:2] != (SIZE, SIZE):
        from PIL import Image
        channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BOX) for c in range(3)]
        image = np.stack([np.asarray(c, float) for c in channels], -1)
    return np.clip(image, 0, 1)


def background_of(image):
    """(64, 64, 3) -> the quadratic surface (64, 64, 3) that most pixels follow; the border decides which ones."""
    half, pixels, weight = QUADRATIC[::2, ::2].reshape(-1, 6), image[::2, ::2].reshape(-1, 3), BORDER[::2, ::2].ravel().astype(float)
    for terms in (3, 3, 3, 3, 6, 6, 6):                          # reweighted least squares: a plane first, which cannot bend into an object
        b = half[:, :terms]
        fit = np.linalg.solve((b * weight[:, None]).T @ b + 1e-6 * np.eye(terms), (b * weight[:, None]).T @ pixels)
        weight = (1 + ((pixels - b @ fit) ** 2).sum(1) / .05 ** 2) ** -2.
    return QUADRATIC @ fit


def components(labels):
    """Labels (64, 64), 0 for nothing -> a mask (64, 64) for each 4-connected region of one label."""
    width = SIZE + 2
    flat = np.pad(labels, 1).ravel()
    where = np.flatnonzero(flat)
    todo, out = dict(zip(where.tolist(), flat[where].tolist())), []
    while todo:
        start, label = todo.popitem()
        region, stack = [start], [start]
        while stack:
            i = stack.pop()
            for j in (i - 1, i + 1, i - width, i + width):
                if todo.get(j) == label:
                    del todo[j]
                    region.append(j)
                    stack.append(j)
        mask = np.zeros(width * width, bool)
        mask[region] = True
        out.append(mask.reshape(width, width)[1:-1, 1:-1])
    return out


def grow(mask, steps=1):
    for _ in range(steps):
        wide = np.pad(mask, 1)
        mask = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    return mask


def opponent(rgb):
    """(..., 3) -> its chroma as a complex number: the angle is the hue (red 0), grey is 0."""
    return rgb @ np.array([2, -1 + 3 ** .5 * 1j, -1 - 3 ** .5 * 1j]) / 6 ** .5


PALETTE = opponent(np.array(list(COLOURS.values())))
PALETTE /= abs(PALETTE)


def hue_angles(chroma):
    """(N,) complex -> degrees from each colour of the palette (N, 5), in [0, 180]."""
    return abs(np.degrees(np.angle(chroma[:, None] * PALETTE.conj())))


def segment(image, background):
    """-> label map (64, 64): 0 background, 1 to 5 the nearest colour of the palette, 6 grey; one object of a hue between two has one label."""
    difference = image - background
    distance, chroma = np.sqrt((difference ** 2).sum(-1)), opponent(difference)
    where = distance > FOREGROUND
    labels = np.zeros((SIZE, SIZE), int)
    if not where.any():
        return labels
    nearest = 1 + hue_angles(chroma[where]).argmin(1)
    labels[where] = np.where(abs(chroma[where]) < .12 * distance[where], 6, nearest)
    mean = {k: chroma[labels == k].sum() for k in range(1, 6) if (labels == k).any()}
    for a, b in itertools.combinations(mean, 2):                 # an orange disc is not half red and half yellow
        if abs(np.angle(mean[a] * mean[b].conj())) < np.radians(30):
            labels[labels == b] = a
    for k in np.unique(labels[where]):                           # the edge is where an object covers about half of the pixel
        own = labels == k
        labels[own & (distance < .45 * np.quantile(distance[own], .8))] = 0
    return labels


def coverage_of(mask, others, image, background):
    """The soft coverage (64, 64) in [0, 1] of the object at `mask`, and its mean colour (3,)."""
    core = ~grow(~mask)
    if core.sum() < 12:
        core = mask
    basis = np.stack([np.ones_like(X), X - X[core].mean(), Y - Y[core].mean()], -1)
    if np.ptp(X[core]) < 4 or np.ptp(Y[core]) < 4:
        basis = basis[..., :1]
    fit = np.linalg.lstsq(basis[core], image[core], rcond=None)[0]        # the light on it changes linearly
    towards = np.clip(basis @ fit, 0, 1) - background
    alpha = ((image - background) * towards).sum(-1) / np.maximum((towards ** 2).sum(-1), .02)
    return np.where(grow(mask, 3) & ~others, np.clip(alpha, 0, 1), 0), image[core].mean(0)


# -------------------------------------------------------------------------------------------------------------------------------- shape

def profile(alpha):
    """Soft coverage (64, 64) -> centre x, y in pixels, radius in 120 directions (pixels), how much of the inside is missing [0, 1]."""
    area = alpha.sum()
    x, y = (alpha * X).sum() / area, (alpha * Y).sum() / area
    reach = min(np.hypot(X - x, Y - y)[alpha > .1].max() + 2, 45)
    r = np.arange(.25, reach, .5)
    theta = np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS
    px, py = x + np.cos(theta)[:, None] * r + 1, y + np.sin(theta)[:, None] * r + 1
    wide = np.pad(alpha, 1)                                      # nothing outside of the canvas
    px, py = np.clip(px, 0, SIZE + .999), np.clip(py, 0, SIZE + .999)
    i, j = py.astype(int), px.astype(int)
    u, v = px - j, py - i
    along = (wide[i, j] * (1 - u) + wide[i, j + 1] * u) * (1 - v) + (wide[i + 1, j] * (1 - u) + wide[i + 1, j + 1] * u) * v
    radius = along.sum(1) * .5                                   # the integral of the coverage: no edge to find, blur cancels out
    inside = (r < .7 * radius[:, None]) * r
    return x, y, radius, float((inside * (1 - along)).sum() / max(inside.sum(), 1e-9))


def blur(a, sigma):
    kernel = np.exp(-.5 * (np.arange(-3, 4) / max(sigma, .05)) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        wide = np.pad(a, [(3, 3) if k == axis else (0, 0) for k in range(a.ndim)], mode="edge")
        a = sum(k * np.take(wide, np.arange(i, i + SIZE), axis) for i, k in enumerate(kernel))
    return a


@functools.cache
def templates():
    """-> names, and the spectra of their normalised profiles. Stars with a wrong number of arms are there to be recognised as such."""
    names, profiles = [], []
    for name, vertices in [(s, polygon(s)) for s in SHAPES] + [("malformed", polygon("star", arms=n)) for n in (4, 6, 7)]:
        for r, sigma in itertools.product((.125, .2), (0, .6, 1.)):
            o = dict(shape="star" if name == "malformed" else name, vertices=vertices, x=.5, y=.5, r=r, angle=0.)
            radius = profile(blur(object_coverage(o), sigma))[2]
            names.append(name)
            profiles.append(radius / radius.mean())
    return np.array(names), np.fft.rfft(profiles)


def shape_errors(radius):
    """A profile (120,) -> {shape: rms error of the best fit, relative to the mean radius} over all rotations and blurs."""
    names, spectra = templates()
    own = np.fft.rfft(radius / radius.mean())
    power = lambda s: (2 * (abs(s) ** 2).sum(-1) - abs(s[..., 0]) ** 2) / DIRECTIONS ** 2
    match = np.fft.irfft(own * spectra.conj(), 4 * DIRECTIONS).max(1) * 4 / DIRECTIONS        # correlation every .75 degrees
    error = np.sqrt(np.maximum(power(own) + power(spectra) - 2 * match, 0))
    return {name: float(error[names == name].min()) for name in dict.fromkeys(names)}


# ------------------------------------------------------------------------------------------------------------------------------ reading

def read(image):
    """PIL image, (3, H, W) tensor or (H, W, 3) array in [0, 1] -> a list of objects, the largest first. Each is a dict:

    colour     of COLOURS; None when its hue lies between two, or it has none
    shape      of SHAPES; None when it is malformed, or two fit nearly as well
    x, y       the centre, in [0, 1], y downwards; area: share of the canvas, in [0, 1]
    residual   rms error of the outline against the best shape, relative to the mean radius (FIT)
    colours    what is possible at all, {colour: 1 sure, 0 maybe}; shapes alike, {shape: 1 sure, 0 maybe}
    nearest    (colour, shape) that come closest, however far away they are; a star with a wrong number of arms is a star here
    """
    image = to_array(image)
    background = background_of(image)
    labels = segment(image, background)
    masks = [m for m in components(labels) if m.sum() >= SPECK]
    objects = []
    for mask in masks:
        alpha, rgb = coverage_of(mask, (labels > 0) & ~mask, image, background)
        x, y, radius, missing = profile(alpha)
        errors = shape_errors(radius)
        best = min(errors, key=errors.get)
        hole = max(0, missing - .04)                             # noise and the notches of a blurred star leave less than .03
        sure = sorted(errors.values())[1] > MARGIN * errors[best]
        shapes = {s: int(sure and errors[s] + hole < FIT[s][0]) for s in SHAPES
                  if errors[s] <= MARGIN * errors[best] and errors[s] + hole < FIT[s][1]}
        chroma = opponent(rgb)
        angles = hue_angles(np.array([chroma]))[0] if abs(chroma) > GREY else np.full(5, 180.)
        colours = {c: int(a < HUE_SURE) for c, a in zip(COLOURS, angles) if a < HUE_MAYBE}
        objects.append(dict(colour=next((c for c in colours if colours[c]), None), shape=next((s for s in shapes if shapes[s]), None),
                            x=float(x + .5) / SIZE, y=float(y + .5) / SIZE, area=float(alpha.sum()) / SIZE ** 2,
                            residual=min(errors[s] for s in SHAPES) + hole, colours=colours, shapes=shapes,
                            nearest=(list(COLOURS)[hue_angles(np.array([chroma]))[0].argmin()], best.replace("malformed", "star"))))
    return sorted(objects, key=lambda o: -o["area"])


def related(a, b, relation):
    """Whether a is `relation` b: 1 yes, 0 near the diagonal or on top of each other, -1 no."""
    dx, dy = b["x"] - a["x"], b["y"] - a["y"]
    along, across = (dx, abs(dy)) if relation == "left of" else (dy, abs(dx))
    return 1 if along > .06 and across < .85 * along else 0 if along > .03 and across < 1.2 * along else -1


def judge(objects, caption):
    """What `read` returned -> True, False or None: see correct."""
    kinds, relation = parse_caption(caption)
    things, specks = [o for o in objects if o["area"] * SIZE ** 2 >= NOTABLE], [o for o in objects if o["area"] * SIZE ** 2 < NOTABLE]
    if len(things) != len(kinds):
        # two objects of one colour that touch read as a single strange one
        merged = len(things) == 1 and len(kinds) == 2 and kinds[0][0] == kinds[1][0] and kinds[0][0] in things[0]["colours"]
        return None if merged and not things[0]["shape"] else False
    verdict = -1
    for order in itertools.permutations(things):
        facts = [o["colours"].get(c, -1) for o, (c, _) in zip(order, kinds)] + [o["shapes"].get(s, -1) for o, (_, s) in zip(order, kinds)]
        verdict = max(verdict, min(facts + ([related(*order, relation)] if relation else [])))
    return False if verdict < 0 else None if verdict == 0 or specks else True


def recognised(image, caption):
    """Whether the caption is the nearest reading of the image: as many objects of notable size, their nearest colours and shapes, and the direction
    between them. What a classifier or a parser without a class for malformed shapes would say: a star with six arms is still a star to it."""
    things = [o for o in read(image) if o["area"] * SIZE ** 2 >= NOTABLE]
    kinds, relation = parse_caption(caption)
    if sorted(o["nearest"] for o in things) != sorted(kinds):
        return False
    if relation is None:
        return True
    a, b = sorted(things, key=lambda o: o["nearest"] != kinds[0])
    dx, dy = b["x"] - a["x"], b["y"] - a["y"]
    return dx > abs(dy) if relation == "left of" else dy > abs(dx)


def correct(image, caption):
    """Whether the image shows exactly what the caption says. `image` as in read; ValueError for a caption outside of the grammar.

    True   exactly the caption's objects with their colours, shapes and relation, and nothing else of notable size (1 % of the canvas)
    False  it clearly contradicts: another number of objects, a wrong colour, shape or relation, or a malformed shape (a star of 4 arms)
    None   it abstains: a hue between two colours, two shapes that fit nearly as well, an outline that might just pass, a relation
           near the diagonal, objects of one colour that touch, a speck of .3 to 1 % of the canvas
    """
    return judge(read(image), caption)


# -------------------------------------------------------------------------------------------------------------------------------- rates

def wrong_captions(caption):
    """Captions which contradict a scene of `caption`, by what is wrong: {kind: list}."""
    kinds, relation = parse_caption(caption)
    out = dict(colour=[], shape=[])
    for i, (colour, shape) in enumerate(kinds):
        for name, replaced in [("colour", (c, shape)) for c in COLOURS if c != colour] + [("shape", (colour, s)) for s in SHAPES if s != shape]:
            new = [replaced if k == i else kind for k, kind in enumerate(kinds)]
            if len(set(new)) == len(new):
                out[name].append(caption_of(new, relation))
    if relation is None:
        return out | dict(count=[caption_of([kinds[0], k], r) for k in KINDS if k != kinds[0] for r in RELATIONS])
    other = RELATIONS[1 - RELATIONS.index(relation)]
    return out | dict(exchanged=[caption_of(kinds[::-1], relation)], relation=[caption_of(kinds, other)], count=[caption_of([k]) for k in kinds])


def degrade(image, rng):
    """What a small VAE and a generator do to a render: blur, noise, another saturation."""
    image = blur(image, rng.uniform(.5, .8)) + rng.normal(0, .02, image.shape)
    grey = image.mean(-1, keepdims=True)
    return np.clip(grey + (image - grey) * rng.uniform(.75, 1.1), 0, 1)


def malformed_star(rng):
    """A scene of one star with 4, 6 or 7 arms, or with one arm missing."""
    scene = sample_scene(rng, f"a {rng.choice(list(COLOURS))} star")
    arms = rng.choice([4, 5, 6, 7])
    vertices = polygon("star", arms=arms)
    if arms == 5:
        vertices[2 * rng.integers(5)] *= INNER
    scene["objects"][0]["vertices"] = vertices
    return scene


def rates(count=2000, seed=0, looks=("clean", "degraded")):
    """`count` scenes of each split with their own and with wrong captions, and `count` malformed stars, by look:
    {look: dict(right, abstains, wrong (what was claimed falsely of a wrong caption, {kind: share}), stars, ms)}, the first four shares."""
    templates()
    verdicts, seconds = {look: dict(own=[], stars=[], wrong={}) for look in looks}, dict.fromkeys(looks, 0.)
    for i in range(3 * count):
        rng = np.random.default_rng([seed, i])
        scene = malformed_star(rng) if i >= 2 * count else sample_scene(rng, test=i % 2 == 1)
        clean = render(scene)[0]
        for look in looks:
            image = degrade(clean, rng) if look == "degraded" else clean
            start = time.process_time()
            objects = read(image)
            seconds[look] += time.process_time() - start
            verdicts[look]["stars" if i >= 2 * count else "own"].append(judge(objects, scene["caption"]))
            for kind, captions in wrong_captions(scene["caption"]).items() if i < 2 * count else ():
                verdicts[look]["wrong"].setdefault(kind, []).append(judge(objects, captions[rng.integers(len(captions))]))
    share = lambda verdicts, what: sum(v is what for v in verdicts) / len(verdicts)
    return {look: dict(right=share(v["own"], True), abstains=share(v["own"], None), wrong={k: share(w, True) for k, w in v["wrong"].items()},
                       stars=share(v["stars"], True), ms=seconds[look] / (3 * count) * 1e3) for look, v in verdicts.items()}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for look, r in rates().items():
            print(f"{look:8}  own caption: True {r['right']:.2%}, abstains {r['abstains']:.2%} | a wrong caption, True: "
                  + ", ".join(f"{kind} {share:.2%}" for kind, share in r["wrong"].items())
                  + f" | malformed stars, True: {r['stars']:.2%} | {r['ms']:.1f} ms an image")
    else:
        from PIL import Image
        try:
            if len(sys.argv) != 3:
                raise ValueError('expects an image and a caption: python toy/oracle.py image.png "a red circle"')
            objects = read(Image.open(sys.argv[1]))
            verdict = judge(objects, sys.argv[2])
        except (OSError, ValueError) as error:
            print(f"oracle.py: {error}", file=sys.stderr)
            sys.exit(2)
        for thing in objects:
            print(thing)
        print(verdict)
