"""The scenes of the toy world: a small grammar of captions, and an anti-aliased renderer in NumPy.

A caption is "a red circle" or "a red circle above a blue square". There are 5 colors, 4 shapes and
the relations "left of" and "above". There are no paraphrases, so each layout has one caption.
Within one caption position, size, rotation, color jitter, light and background vary freely. That is
the diversity that a reward can collapse.

  scene = sample_scene(np.random.default_rng(0))   a dict: caption, objects, background
  image, coverage = render(scene)                  (64, 64, 3) and (objects, 64, 64), in [0, 1]

x runs to the right and y downwards, both in [0, 1]. `r` is a length in the same units, and angles
are in radians.

  $ python toy/scenes.py         # prints how many captions there are, and the first ones
"""

import zlib

import numpy as np

SIZE = 64  # pixels
COLOURS = {
    "red": (0.86, 0.13, 0.14),
    "green": (0.13, 0.66, 0.25),
    "blue": (0.14, 0.33, 0.88),
    "yellow": (0.95, 0.82, 0.12),
    "purple": (0.60, 0.18, 0.74),
}
SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = ("left of", "above")
# The 20 things that a caption can name.
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# The radius of the circumcircle in units of r. It gives all shapes about the same area.
REACH = {"circle": 1.0, "square": 1.22, "triangle": 1.32, "star": 1.34}
INNER = 0.45  # inner radius of a star over its outer radius


# --------------------------------------------------------------------------------------------------
# Captions


def held_out(kinds):
    """Whether this combination of (colour, shape), in any order, is reserved for testing.

    5 of the 20 single things are, and 20 of the 190 pairs.
    """
    names = sorted(f"{colour} {shape}" for colour, shape in kinds)
    key = zlib.crc32(" + ".join(names).encode())
    # With these remainders every color and every shape is tested alone.
    if len(kinds) == 1:
        return key % 7 == 0
    return key % 10 == 1


def caption_of(kinds, relation=None):
    """One or two (colour, shape), and the relation of two -> the caption."""
    things = [f"a {colour} {shape}" for colour, shape in kinds]
    if len(things) == 1:
        return things[0]
    return f"{things[0]} {relation} {things[1]}"


def parse_caption(caption):
    """caption -> (list of (colour, shape), relation or None).

    Raises ValueError if the caption is not in the grammar.
    """
    relation = None
    parts = [caption]
    for candidate in RELATIONS:
        if f" {candidate} " in caption:
            relation = candidate
            parts = caption.split(f" {relation} ")
            break
    kinds = [tuple(part.removeprefix("a ").split(" ")) for part in parts]
    is_known = all(kind in KINDS for kind in kinds)
    if not is_known or caption_of(kinds, relation) != caption:
        raise ValueError(f"not a caption of the toy world: {caption!r}")
    return kinds, relation


def all_captions(test):
    """Every caption of one side of the split, in a fixed order: the single things first."""
    captions = []
    for kind in KINDS:
        if held_out([kind]) == test:
            captions.append(caption_of([kind]))
    for first in KINDS:
        for second in KINDS:
            if first != second and held_out([first, second]) == test:
                for relation in RELATIONS:
                    captions.append(caption_of([first, second], relation))
    return captions


def sample_caption(rng, test=False):
    """A random caption of one side of the split: one object in 30 %, two in 70 %."""
    # We draw the number of objects first. If we rejected combinations of the other side before
    # that, nearly all test captions would have one object.
    count = 1 if rng.random() < 0.3 else 2
    while True:
        kinds = [KINDS[i] for i in rng.choice(len(KINDS), count, replace=False)]
        if held_out(kinds) == test:
            return caption_of(kinds, RELATIONS[rng.integers(2)])


# --------------------------------------------------------------------------------------------------
# Scenes


def jitter_colour(rgb, rng):
    """Moves each channel a little, then saturation and brightness. The five colors stay apart."""
    rgb = np.array(rgb) + rng.normal(0, 0.025, 3)
    grey = rgb.mean()
    saturated = grey + (rgb - grey) * rng.uniform(0.82, 1.05)
    return np.clip(saturated * rng.uniform(0.82, 1.08), 0.04, 1.0)


def sample_object(rng, colour, shape, low, high):
    """A random object with r in [low, high] that lies inside the canvas."""
    r = rng.uniform(low, high)
    reach = r * REACH[shape]
    x, y = rng.uniform(reach + 0.02, 0.98 - reach, 2)
    return dict(
        colour=colour,
        shape=shape,
        x=x,
        y=y,
        r=r,
        angle=np.radians(rng.uniform(-26, 26)),
        rgb=jitter_colour(COLOURS[colour], rng),
        light=rng.uniform(0, 0.16),
    )


def is_clear(first, second, relation):
    """Whether two objects stand apart, and clearly in this relation."""
    dx = second["x"] - first["x"]
    dy = second["y"] - first["y"]
    along, across = (dx, dy) if relation == "left of" else (dy, dx)
    gap = np.hypot(dx, dy) - sum(o["r"] * REACH[o["shape"]] for o in (first, second))
    return along > 0.1 and abs(across) < 0.6 * along and gap > 0.03


def sample_scene(rng, caption=None, test=False):
    """A scene of this caption, or of a random caption of one side of the split.

    Everything that the caption leaves open is drawn from `rng`.
    """
    caption = caption or sample_caption(rng, test)
    kinds, relation = parse_caption(caption)
    low, high = object_sizes(len(kinds))
    while True:
        objects = [sample_object(rng, colour, shape, low, high) for colour, shape in kinds]
        if len(objects) == 1 or is_clear(*objects, relation):
            break
    background = dict(
        tone=rng.uniform(0.22, 0.92),
        tint=rng.normal(0, 0.022, 3),
        slope=rng.uniform(0, 0.28),
        direction=rng.uniform(0, 2 * np.pi),
    )
    return dict(caption=caption, objects=objects, background=background)


def object_sizes(count):
    """The smallest and the largest r in a scene of one or two objects."""
    return (0.15, 0.27) if count == 1 else (0.125, 0.205)


# --------------------------------------------------------------------------------------------------
# Rendering


def polygon(shape, arms=5):
    """Vertices (n, 2) of a unit shape: circumradius 1, one vertex up. None for the circle."""
    if shape == "circle":
        return None
    n = {"square": 4, "triangle": 3, "star": 2 * arms}[shape]
    turn = np.pi / 4 if shape == "square" else 0
    angle = np.arange(n) * 2 * np.pi / n - np.pi / 2 + turn
    radius = np.ones(n)
    if shape == "star":
        radius[1::2] = INNER
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]


def signed_distance(x, y, vertices):
    """Signed distance of points (H, W) to a polygon (n, 2), negative inside (even-odd rule)."""
    squared = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0)):
        # The edge, and the points as seen from its start.
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        # t says how far along the edge its nearest point is.
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        # A ray to the right crosses this edge or not. An odd number of crossings means inside.
        if ay != by:
            crosses = (ay <= y) != (by <= y)
            inside ^= crosses & (x < ax + (y - ay) * ex / ey)
    return np.sqrt(squared) * np.where(inside, -1, 1)


def grid(size=SIZE):
    """The pixel centers: x (H, W) and y (H, W)."""
    centres = (np.arange(size) + 0.5) / size
    return np.meshgrid(centres, centres)


def object_coverage(o, size=SIZE):
    """Anti-aliased coverage (H, W) in [0, 1] of one object.

    If the object has `vertices`, they replace those of its shape, as in artifacts.corrupt.
    """
    x, y = grid(size)
    vertices = o["vertices"] if "vertices" in o else polygon(o["shape"])
    if vertices is None:
        distance = np.hypot(x - o["x"], y - o["y"]) - o["r"]
    else:
        c, s = np.cos(o["angle"]), np.sin(o["angle"])
        rotation = np.array([[c, s], [-s, c]])
        placed = o["r"] * REACH[o["shape"]] * vertices @ rotation + [o["x"], o["y"]]
        distance = signed_distance(x, y, placed)
    return np.clip(0.5 - distance * size, 0, 1)


def render(scene, size=SIZE):
    """Returns image (H, W, 3) and coverage (objects, H, W), both float32 in [0, 1]."""
    x, y = grid(size)
    # The background: one tone, brighter towards one side.
    b = scene["background"]
    along = (x - 0.5) * np.cos(b["direction"]) + (y - 0.5) * np.sin(b["direction"])
    tone = b["tone"] + b["slope"] * along
    image = np.clip(tone[..., None] + b["tint"], 0, 1)

    # The objects over it, each with a mild light from above.
    coverage = np.stack([object_coverage(o, size) for o in scene["objects"]])
    for o, alpha in zip(scene["objects"], coverage):
        height = np.clip((o["y"] - y) / o["r"], -1, 1)
        lit = o["rgb"] * (1 + o["light"] * height)[..., None]
        image = image * (1 - alpha[..., None]) + np.clip(lit, 0, 1) * alpha[..., None]
    return image.astype(np.float32), coverage.astype(np.float32)


if __name__ == "__main__":
    for test in (False, True):
        captions = all_captions(test)
        singles = [caption for caption in captions if " a " not in caption]
        side = "test" if test else "train"
        print(f"{side}: {len(captions)} captions, {len(singles)} of one object: {captions[:5]}")
