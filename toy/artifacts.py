"""Mistakes of a weak image generator, made on purpose: what the artifact detectors learn from. NumPy only.

  image, confidence = corrupt(scene, np.random.default_rng(0))             # (64, 64, 3) in [0, 1]; (64, 64) in [0, 1]

The map is soft: 1 where a person would point at the mistake (the whole object when its shape as a whole is wrong, the spot otherwise),
falling to 0 within 3 pixels. Every visibly changed pixel is marked; objects that were left alone are not. Two recipes with nothing in common
but the idea: "a" for toy/detector, "b" for toy/detector_b, which judges what was trained against the first.
"""
import numpy as np

from .scenes import COLOURS, REACH, SIZE, grid, polygon, render


def soften(x, sigma=1.):
    """Gaussian blur (H, W) with a reach of 3 pixels: exactly 0 further away."""
    kernel = np.exp(-.5 * (np.arange(-3, 4) / sigma) ** 2)
    for axis in (0, 1):
        x = sum(k * np.roll(np.pad(x, 3), s, axis)[3:-3, 3:-3] for k, s in zip(kernel / kernel.sum(), range(-3, 4)))
    return x


def outline(shape, n=48):
    """The outline of a unit shape as n points: their angles and radii, both (n,); n divisible by 4 and by 3 keeps all corners but a star's."""
    angle = np.arange(n) * 2 * np.pi / n - np.pi / 2 + (np.pi / 4 if shape == "square" else 0)
    vertices = polygon(shape)
    if vertices is None:
        return angle, np.ones(n)
    if shape == "star":                                          # 4 points along each of its 10 edges: sharp
        t = np.arange(4)[:, None] / 4
        points = np.concatenate([a + t * (b - a) for a, b in zip(vertices, np.roll(vertices, -1, 0))])
        return np.arctan2(points[:, 1], points[:, 0]), np.hypot(*points.T)
    sides = len(vertices)
    return angle, np.cos(np.pi / sides) / np.cos((angle - angle[0]) % (2 * np.pi / sides) - np.pi / sides)


def points(angle, radius):
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]


def waves(angle, rng, low, high):
    """A smooth random function of the angle with amplitude about 1, made of harmonics low..high."""
    k = np.arange(low, high + 1)
    phase, size = rng.uniform(0, 2 * np.pi, len(k)), rng.uniform(.4, 1, len(k))
    return (size * np.cos(angle[:, None] * k + phase)).sum(1) / np.sqrt((size ** 2).sum())


def shift(image, dx, dy):
    """image sampled at (x + dx, y + dy), offsets (H, W) in pixels; bilinear, edges repeated."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    x, y = np.clip(x + dx, 0, SIZE - 1.001), np.clip(y + dy, 0, SIZE - 1.001)
    x0, y0 = x.astype(int), y.astype(int)
    u, v = (x - x0)[..., None], (y - y0)[..., None]
    return (image[y0, x0] * (1 - u) + image[y0, x0 + 1] * u) * (1 - v) + (image[y0 + 1, x0] * (1 - u) + image[y0 + 1, x0 + 1] * u) * v


def boundary_point(o, rng):
    """A point on the object's outline, in scene coordinates, and the direction outwards."""
    angle, radius = outline(o["shape"])
    i = rng.integers(len(angle))
    c, s = np.cos(o["angle"]), np.sin(o["angle"])
    out = np.array([c * np.cos(angle[i]) - s * np.sin(angle[i]), s * np.cos(angle[i]) + c * np.sin(angle[i])])
    return np.array([o["x"], o["y"]]) + out * radius[i] * o["r"] * REACH[o["shape"]], out


def other_colour(rng, o):
    return np.clip(np.array(COLOURS[rng.choice([c for c in COLOURS if c != o["colour"]])]) + rng.normal(0, .04, 3), 0, 1)


def disc(x0, y0, radius, rng=None, squeeze=0.):
    """Anti-aliased disc (H, W); with rng an irregular blob."""
    x, y = grid()
    angle = np.arctan2(y - y0, x - x0)
    edge = radius * (1 + squeeze * waves(angle.ravel(), rng, 2, 4).reshape(angle.shape)) if rng is not None else radius
    return np.clip(.5 - (np.hypot(x - x0, y - y0) - edge) * SIZE, 0, 1)


# ------------------------------------------------------------------------------------------- a whole object of the wrong shape: vertices

def star_arms(o, rng):                                           # the hands of this world: a wrong number of fingers
    return polygon("star", arms=int(rng.choice([3, 4, 6, 7])))


def star_uneven(o, rng):                                         # arms missing, short, long, bent
    angle, radius = (f(polygon("star")) for f in (lambda p: np.arctan2(p[:, 1], p[:, 0]), lambda p: np.hypot(*p.T)))
    arm = np.arange(0, 10, 2)
    bad = rng.choice(arm, rng.integers(1, 4), replace=False)
    radius[bad] = rng.uniform(.42, .7, len(bad)) if rng.random() < .6 else rng.uniform(.5, 1.3, len(bad))
    angle[arm] += rng.normal(0, .12, 5)
    radius[arm + 1] *= rng.uniform(.8, 1.35, 5)
    return points(angle, radius)


def rounded(o, rng):                                             # on the way to a circle: a blob with a memory of its corners
    angle, radius = outline(o["shape"])
    if o["shape"] == "star":
        angle = np.arange(40) * 2 * np.pi / 40
        radius = .7 + rng.uniform(.08, .2) * np.cos(5 * angle + np.pi / 2) + .04 * waves(angle, rng, 2, 4)
    else:
        soft = np.fft.irfft(np.fft.rfft(radius) * np.exp(-(np.arange(len(radius) // 2 + 1) / rng.uniform(3, 5.5)) ** 2), len(radius))
        radius = soft * (1 + .05 * waves(angle, rng, 2, 4))
    return points(angle, radius)


def hybrid(o, rng):                                              # half one shape, half another
    angle = np.arange(48) * 2 * np.pi / 48
    both = []
    for shape in (o["shape"], rng.choice([s for s in REACH if s != o["shape"]])):
        a, r = outline(shape)
        both.append(np.interp(angle, *(np.sort(a % (2 * np.pi)), (r * REACH[shape] / REACH[o["shape"]])[np.argsort(a % (2 * np.pi))]), period=2 * np.pi))
    side = .5 + .5 * np.tanh(4 * np.cos(angle - rng.uniform(0, 2 * np.pi)))
    return points(angle, both[0] * side + both[1] * (1 - side))


def wobbly(o, rng):                                              # an unsteady outline
    angle, radius = outline(o["shape"])
    return points(angle, radius * (1 + rng.uniform(.09, .2) * waves(angle, rng, 3, 8)))


# ---------------------------------------------------------------------------------------- a spot: (image, scene, object, alpha) -> image

def bite(image, clean, o, alpha, rng):                           # the background eats into the object, or the object swells
    (x0, y0), out = boundary_point(o, rng)
    spot = disc(x0, y0, o["r"] * rng.uniform(.3, .55), rng, .2)
    return image * (1 - spot[..., None]) + spot[..., None] * (clean["empty"] if rng.random() < .6 else o["rgb"])


def bleed(image, clean, o, alpha, rng):                          # a second colour in part of the object
    x, y = grid()
    turn, where = rng.uniform(0, 2 * np.pi), rng.uniform(-.45, .45) * o["r"]
    side = (x - o["x"]) * np.cos(turn) + (y - o["y"]) * np.sin(turn) - where
    mix = (alpha / (1 + np.exp(-side * SIZE / rng.uniform(.5, 2.5))) * rng.uniform(.6, 1))[..., None]
    return image * (1 - mix) + mix * other_colour(rng, o)


def ghost(image, clean, o, alpha, rng):                          # a faint smeared copy of a part beside the object
    turn, far = rng.uniform(0, 2 * np.pi), o["r"] * SIZE * rng.uniform(.7, 1.5)
    copy = np.mean([shift(alpha[..., None], -np.cos(turn) * far * t, -np.sin(turn) * far * t)[..., 0] for t in np.linspace(.7, 1, 4)], 0)
    (x0, y0), _ = boundary_point(dict(o, x=o["x"] + np.cos(turn) * far / SIZE, y=o["y"] + np.sin(turn) * far / SIZE), rng)
    mix = (copy * soften(disc(x0, y0, o["r"] * rng.uniform(.7, 1.2))) * (1 - alpha) * rng.uniform(.4, .9))[..., None]
    return image * (1 - mix) + mix * o["rgb"]


def extra(image, clean, o, alpha, rng):                          # a blob that nobody asked for
    x0, y0 = rng.uniform(.08, .92, 2)
    colour = o["rgb"] if rng.random() < .5 else other_colour(rng, o)
    mix = (soften(disc(x0, y0, rng.uniform(.035, .08), rng, .25), .8) * rng.uniform(.6, 1))[..., None]
    return image * (1 - mix) + mix * colour


def melt(image, clean, o, alpha, rng):                           # a spot of the outline dragged along
    (x0, y0), _ = boundary_point(o, rng)
    x, y = grid()
    pull = np.exp(-.5 * ((x - x0) ** 2 + (y - y0) ** 2) / (o["r"] * rng.uniform(.3, .5)) ** 2)
    turn, far = rng.uniform(0, 2 * np.pi), o["r"] * SIZE * rng.uniform(.45, .8)
    return shift(image, pull * far * np.cos(turn), pull * far * np.sin(turn))


# ---------------------------------------------------------------------------------------------------------------- recipe "b"

def jitter(o, rng):                                              # corners that wandered off
    vertices = polygon(o["shape"])
    if vertices is None:                                         # a circle becomes a potato
        angle = np.arange(36) * 2 * np.pi / 36
        return points(angle, 1 + rng.uniform(.12, .2) * waves(angle, rng, 2, 3))
    if o["shape"] != "star":                                     # a triangle with other corners would still be a triangle: bend its edges
        vertices = np.stack([vertices, (vertices + np.roll(vertices, -1, 0)) / 2 * rng.uniform(.6, 1.5, (len(vertices), 1))], 1).reshape(-1, 2)
    return vertices + rng.normal(0, .13, vertices.shape)


def star_fused(o, rng):                                          # neighbouring arms grown together, or a regular star cut off
    vertices = polygon("star")
    i = 2 * rng.integers(5) + 1
    if rng.random() < .5:
        return np.delete(vertices, i, 0) * np.array([rng.uniform(.85, 1.1), 1])
    return np.delete(vertices, [(i + k) % 10 for k in range(rng.integers(2, 4))], 0)


def star_thin(o, rng):                                           # the wrong notches: a starfish, or nearly a pentagon; never quite regular
    vertices = polygon("star")
    vertices[1::2] *= rng.choice([rng.uniform(.4, .6), rng.uniform(1.4, 1.7)])
    return vertices * rng.uniform(.85, 1.1, (10, 1))


def lens(image, clean, o, alpha, rng):                           # swirled around the middle of the object
    x, y = grid()
    dx, dy = (x - o["x"]) * SIZE, (y - o["y"]) * SIZE
    (px, py), _ = boundary_point(o, rng)
    near = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (o["r"] * rng.uniform(.5, .8)) ** 2)
    turn = near * rng.choice([-1, 1]) * rng.uniform(.7, 1.2)
    return shift(image, dx * (np.cos(turn) - 1) - dy * np.sin(turn), dx * np.sin(turn) + dy * (np.cos(turn) - 1))


def torn(image, clean, o, alpha, rng):                           # one half slipped along a cut
    x, y = grid()
    turn = rng.uniform(0, np.pi)
    side = (x - o["x"]) * np.cos(turn) + (y - o["y"]) * np.sin(turn)
    along = -(x - o["x"]) * np.sin(turn) + (y - o["y"]) * np.cos(turn)
    near = np.clip(1.6 - np.hypot(side, along) / (o["r"] * REACH[o["shape"]]), 0, .3) / .3 * (side > 0)
    far = rng.choice([-1, 1]) * rng.uniform(.3, .6) * o["r"] * SIZE
    return shift(image, near * far * -np.sin(turn), near * far * np.cos(turn))


def hole(image, clean, o, alpha, rng):
    turn, away = rng.uniform(0, 2 * np.pi), rng.uniform(0, .4) * o["r"]
    spot = alpha * disc(o["x"] + away * np.cos(turn), o["y"] + away * np.sin(turn), o["r"] * rng.uniform(.22, .4), rng, .15)
    return image * (1 - spot[..., None]) + spot[..., None] * (clean["empty"] if rng.random() < .6 else other_colour(rng, o))


def smear(image, clean, o, alpha, rng):                          # a stroke of the object's colour over its edge
    (x0, y0), out = boundary_point(o, rng)
    turn = np.arctan2(out[1], out[0]) + rng.uniform(-.9, .9)
    spot = np.max([disc(x0 + t * np.cos(turn), y0 + t * np.sin(turn), o["r"] * .2 * (1 - t / o["r"] / 1.6))
                   for t in np.linspace(-.3, rng.uniform(.7, 1.3), 9) * o["r"]], 0)
    mix = (soften(spot) * rng.uniform(.5, 1))[..., None]
    return image * (1 - mix) + mix * o["rgb"]


def spill(image, clean, o, alpha, rng):                          # a soft halo of its own or a strange colour at one side
    (x0, y0), out = boundary_point(o, rng)
    x, y = grid()
    halo = np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (o["r"] * rng.uniform(.4, .7)) ** 2) * rng.uniform(.6, .95)
    colour = other_colour(rng, o) if rng.random() < .5 else o["rgb"] * .4
    return image * (1 - halo[..., None]) + halo[..., None] * colour


RECIPES = {
    "a": dict(star=[star_arms, star_arms, star_uneven, star_uneven, rounded, hybrid], shape=[rounded, hybrid, wobbly],
              spot=[bite, bleed, ghost, extra, melt], share=.5),
    "b": dict(star=[jitter, star_fused, star_fused, star_thin], shape=[jitter], spot=[lens, torn, hole, smear, spill], share=.4)}


def corrupt(scene, rng, recipe="a"):
    """Renders `scene` with one mistake, sometimes two. Returns image (H, W, 3) float32 in [0, 1], map (H, W) float32 in [0, 1]."""
    kinds = RECIPES[recipe]
    clean, _ = render(scene)
    empty, _ = render(dict(scene, objects=[dict(o, r=1e-6) for o in scene["objects"]]))
    image, mask = clean, np.zeros((SIZE, SIZE))
    stars = [i for i, o in enumerate(scene["objects"]) if o["shape"] == "star"]
    wrong = None
    if rng.random() < max(kinds["share"], .75 * bool(stars)):    # an object of the wrong shape: stars first, as in nature
        wrong = int(rng.choice(stars)) if stars and rng.random() < .8 else int(rng.integers(len(scene["objects"])))
        o = scene["objects"][wrong]
        make = kinds["star" if o["shape"] == "star" else "shape"]
        objects = [dict(p, vertices=make[rng.integers(len(make))](p, rng)) if i == wrong else p for i, p in enumerate(scene["objects"])]
        before = render(scene)[1][wrong]
        scene = dict(scene, objects=objects)
        image, coverage = render(scene)
        mask = np.maximum(before, coverage[wrong])
    if wrong is None or rng.random() < .15:
        coverage = render(scene)[1]
        for _ in range(30):
            i = rng.integers(len(scene["objects"]))
            make = kinds["spot"][rng.integers(len(kinds["spot"]))]
            spoiled = np.clip(make(image, dict(empty=empty), scene["objects"][i], coverage[i], rng), 0, 1)
            change = np.abs(spoiled - image).max(-1)
            if (change > .12).sum() >= 12:                       # visible, or again
                break
        image, mask = spoiled, np.maximum(mask, np.where(change < .02, 0, np.clip(change / .12, 0, 1)))        # unseen: unmarked
    return image.astype(np.float32), np.clip(1.5 * soften(mask), 0, 1).astype(np.float32)
