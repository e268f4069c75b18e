"""The scenes of the toy world: a small grammar of captions and an anti-aliased renderer. NumPy only, nothing learned.

A caption is "a red circle" or "a red circle above a blue square" (5 colours, 4 shapes, "left of" and "above"; no paraphrases, so a
caption and the layout of its scene are in one-to-one correspondence). Within one caption position, size, rotation, colour jitter, light
and background vary freely: that is the diversity a reward can collapse.

  scene = sample_scene(np.random.default_rng(0))           # a dict: caption, objects, background
  image, coverage = render(scene)                          # (64, 64, 3) in [0, 1]; (objects, 64, 64) in [0, 1]

Coordinates: x to the right and y downwards, both in [0, 1]; `r` is a length in the same units; angles in radians.
"""
import zlib

import numpy as np

SIZE = 64
COLOURS = {"red": (.86, .13, .14), "green": (.13, .66, .25), "blue": (.14, .33, .88), "yellow": (.95, .82, .12), "purple": (.60, .18, .74)}
SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = ("left of", "above")
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]           # the 20 things a caption can name
REACH = {"circle": 1., "square": 1.22, "triangle": 1.32, "star": 1.34}       # circumradius in units of r: about equal areas
INNER = .45                                                                   # inner over outer radius of a star


def held_out(kinds):
    """Whether this unordered combination of (colour, shape) is reserved for testing: 5 of 20 single things, 20 of 190 pairs."""
    key = zlib.crc32(" + ".join(sorted(f"{colour} {shape}" for colour, shape in kinds)).encode())
    return key % 7 == 0 if len(kinds) == 1 else key % 10 == 1        # remainders chosen so that every colour and shape is tested alone


def caption_of(kinds, relation=None):
    things = [f"a {colour} {shape}" for colour, shape in kinds]
    return things[0] if len(things) == 1 else f"{things[0]} {relation} {things[1]}"


def parse_caption(caption):
    """caption -> (kinds, relation or None); ValueError if the grammar does not have it."""
    for relation in RELATIONS:
        if f" {relation} " in caption:
            parts = caption.split(f" {relation} ")
            break
    else:
        relation, parts = None, [caption]
    kinds = [tuple(part.removeprefix("a ").split(" ")) for part in parts]
    if any(kind not in KINDS for kind in kinds) or caption_of(kinds, relation) != caption:
        raise ValueError(f"not a caption of the toy world: {caption!r}")
    return kinds, relation


def all_captions(test):
    """Every caption of one side of the split, in a fixed order: the single things first."""
    singles = [[kind] for kind in KINDS]
    pairs = [[a, b] for a in KINDS for b in KINDS if a != b]
    captions = [caption_of(kinds) for kinds in singles if held_out(kinds) == test]
    return captions + [caption_of(kinds, relation) for kinds in pairs if held_out(kinds) == test for relation in RELATIONS]


def sample_caption(rng, test=False):
    # the number of objects first: rejecting held-out combinations before it would leave nearly all test captions with one object
    count = 1 if rng.random() < .3 else 2
    while True:
        kinds = [KINDS[i] for i in rng.choice(len(KINDS), count, replace=False)]
        if held_out(kinds) == test:
            return caption_of(kinds, RELATIONS[rng.integers(2)])


def _hue_shift(rgb, rng):
    """Colour jitter: brightness, saturation and a small move of each channel; the five colours stay apart."""
    rgb = np.array(rgb) + rng.normal(0, .025, 3)
    grey = rgb.mean()
    return np.clip((grey + (rgb - grey) * rng.uniform(.82, 1.05)) * rng.uniform(.82, 1.08), .04, 1.)


def sample_scene(rng, caption=None, test=False):
    """A scene of this caption (or of a random one of the split): everything the caption leaves open is drawn from `rng`."""
    caption = caption or sample_caption(rng, test)
    kinds, relation = parse_caption(caption)
    low, high = (.15, .27) if len(kinds) == 1 else (.125, .205)
    while True:
        objects = []
        for colour, shape in kinds:
            r = rng.uniform(low, high)
            reach = r * REACH[shape]
            x, y = rng.uniform(reach + .02, .98 - reach, 2)
            objects.append(dict(colour=colour, shape=shape, x=x, y=y, r=r, angle=np.radians(rng.uniform(-26, 26)),
                                rgb=_hue_shift(COLOURS[colour], rng), light=rng.uniform(0, .16)))
        if len(objects) == 1:
            break
        dx, dy = objects[1]["x"] - objects[0]["x"], objects[1]["y"] - objects[0]["y"]
        along, across = (dx, dy) if relation == "left of" else (dy, dx)
        gap = np.hypot(dx, dy) - sum(o["r"] * REACH[o["shape"]] for o in objects)
        if along > .1 and abs(across) < .6 * along and gap > .03:
            break
    background = dict(tone=rng.uniform(.22, .92), tint=rng.normal(0, .022, 3), slope=rng.uniform(0, .28), direction=rng.uniform(0, 2 * np.pi))
    return dict(caption=caption, objects=objects, background=background)


def polygon(shape, arms=5):
    """Vertices (n, 2) of a unit shape (circumradius 1, one vertex up); None for the circle."""
    if shape == "circle":
        return None
    n = {"square": 4, "triangle": 3, "star": 2 * arms}[shape]
    angle = np.arange(n) * 2 * np.pi / n - np.pi / 2 + (np.pi / 4 if shape == "square" else 0)
    radius = np.where(np.arange(n) % 2 == 1, INNER, 1.) if shape == "star" else np.ones(n)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]


def signed_distance(x, y, vertices):
    """Signed distance of points (H, W) to a polygon (n, 2), negative inside (even-odd rule)."""
    distance, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0)):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        if ay != by:
            inside ^= ((ay <= y) != (by <= y)) & (x < ax + (y - ay) * ex / ey)
    return np.sqrt(distance) * np.where(inside, -1, 1)


def grid(size=SIZE):
    centres = (np.arange(size) + .5) / size
    return np.meshgrid(centres, centres)          # x (H, W), y (H, W)


def object_coverage(o, size=SIZE):
    """Anti-aliased coverage (H, W) in [0, 1] of one object; `vertices` in the object overrides its shape (see corrupt)."""
    x, y = grid(size)
    vertices = o["vertices"] if "vertices" in o else polygon(o["shape"])
    if vertices is None:
        distance = np.hypot(x - o["x"], y - o["y"]) - o["r"]
    else:
        c, s = np.cos(o["angle"]), np.sin(o["angle"])
        placed = o["r"] * REACH[o["shape"]] * vertices @ np.array([[c, s], [-s, c]]) + [o["x"], o["y"]]
        distance = signed_distance(x, y, placed)
    return np.clip(.5 - distance * size, 0, 1)


def render(scene, size=SIZE):
    """Returns image (H, W, 3) float32 in [0, 1] and coverage (objects, H, W) float32 in [0, 1]."""
    x, y = grid(size)
    b = scene["background"]
    tone = b["tone"] + b["slope"] * ((x - .5) * np.cos(b["direction"]) + (y - .5) * np.sin(b["direction"]))
    image = np.clip(tone[..., None] + b["tint"], 0, 1)
    coverage = np.stack([object_coverage(o, size) for o in scene["objects"]])
    for o, alpha in zip(scene["objects"], coverage):
        lit = o["rgb"] * (1 + o["light"] * np.clip((o["y"] - y) / o["r"], -1, 1))[..., None]        # a mild light from above
        image = image * (1 - alpha[..., None]) + np.clip(lit, 0, 1) * alpha[..., None]
    return image.astype(np.float32), coverage.astype(np.float32)


if __name__ == "__main__":
    for test in (False, True):
        captions = all_captions(test)
        print("test" if test else "train", len(captions), "captions,", sum(" a " not in c for c in captions), "of one object; first:", captions[:5])
