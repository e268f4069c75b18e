"""Mistakes of a weak image generator, made on purpose: what the artifact detectors learn from.

  image, confidence = corrupt(scene, rng)      (64, 64, 3) and (64, 64), both in [0, 1]

The map is soft. It is 1 where a person would point at the mistake: the whole object when its shape
as a whole is wrong, the spot otherwise. It falls to 0 within 3 pixels. Every visibly changed pixel
is marked, and objects that were left alone are not.

There are two recipes with nothing in common but the idea: "a" for toy/detector, and "b" for
toy/detector_b, which judges what was trained against the first. NumPy only.
"""

import numpy as np

from .scenes import COLOURS, REACH, SIZE, grid, polygon, render

# --------------------------------------------------------------------------------------------------
# Tools


def soften(x, sigma=1.0):
    """Gaussian blur of x (H, W) with a reach of 3 pixels: exactly 0 further away."""
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in (0, 1):
        x = sum(
            weight * np.roll(np.pad(x, 3), offset, axis)[3:-3, 3:-3]
            for weight, offset in zip(kernel, range(-3, 4))
        )
    return x


def outline(shape, n=48):
    """The outline of a unit shape as n points: their angles and radii, both (n,).

    If n is divisible by 4 and by 3, all corners are among them. A star always has 40 points.
    """
    turn = np.pi / 4 if shape == "square" else 0
    angle = np.arange(n) * 2 * np.pi / n - np.pi / 2 + turn
    vertices = polygon(shape)
    if vertices is None:
        return angle, np.ones(n)
    if shape == "star":
        # 4 points along each of its 10 edges keep it sharp.
        t = np.arange(4)[:, None] / 4
        edges = zip(vertices, np.roll(vertices, -1, 0))
        corners = np.concatenate([a + t * (b - a) for a, b in edges])
        return np.arctan2(corners[:, 1], corners[:, 0]), np.hypot(*corners.T)
    sides = len(vertices)
    in_side = (angle - angle[0]) % (2 * np.pi / sides)
    return angle, np.cos(np.pi / sides) / np.cos(in_side - np.pi / sides)


def points(angle, radius):
    """Polar coordinates, both (n,) -> (n, 2)."""
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]


def waves(angle, rng, low, high):
    """A smooth random function of the angle with amplitude about 1, of harmonics low .. high."""
    k = np.arange(low, high + 1)
    phase = rng.uniform(0, 2 * np.pi, len(k))
    size = rng.uniform(0.4, 1, len(k))
    return (size * np.cos(angle[:, None] * k + phase)).sum(1) / np.sqrt((size**2).sum())


def shift(image, dx, dy):
    """image (H, W, C) sampled at (x + dx, y + dy), offsets (H, W) in pixels.

    Bilinear; the edges are repeated.
    """
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    x = np.clip(x + dx, 0, SIZE - 1.001)
    y = np.clip(y + dy, 0, SIZE - 1.001)
    x0 = x.astype(int)
    y0 = y.astype(int)
    u = (x - x0)[..., None]
    v = (y - y0)[..., None]
    upper = image[y0, x0] * (1 - u) + image[y0, x0 + 1] * u
    lower = image[y0 + 1, x0] * (1 - u) + image[y0 + 1, x0 + 1] * u
    return upper * (1 - v) + lower * v


def blend(image, alpha, colour):
    """image (H, W, 3) covered with a color, or another image, as far as alpha (H, W) says."""
    alpha = alpha[..., None]
    return image * (1 - alpha) + alpha * colour


def boundary_point(o, rng):
    """A random point (x, y) of the object's outline, and the direction outwards."""
    angle, radius = outline(o["shape"])
    i = rng.integers(len(angle))
    c, s = np.cos(o["angle"]), np.sin(o["angle"])
    out_x = c * np.cos(angle[i]) - s * np.sin(angle[i])
    out_y = s * np.cos(angle[i]) + c * np.sin(angle[i])
    out = np.array([out_x, out_y])
    return np.array([o["x"], o["y"]]) + out * radius[i] * o["r"] * REACH[o["shape"]], out


def other_colour(rng, o):
    """A color of the palette that the object does not have, slightly jittered."""
    name = rng.choice([colour for colour in COLOURS if colour != o["colour"]])
    return np.clip(np.array(COLOURS[name]) + rng.normal(0, 0.04, 3), 0, 1)


def disc(x0, y0, radius, rng=None, squeeze=0.0):
    """Anti-aliased disc (H, W); with rng an irregular blob."""
    x, y = grid()
    edge = radius
    if rng is not None:
        angle = np.arctan2(y - y0, x - x0)
        edge = radius * (1 + squeeze * waves(angle.ravel(), rng, 2, 4).reshape(angle.shape))
    return np.clip(0.5 - (np.hypot(x - x0, y - y0) - edge) * SIZE, 0, 1)


# --------------------------------------------------------------------------------------------------
# Recipe "a", the whole object has the wrong shape: (object, rng) -> vertices (n, 2)


def star_arms(o, rng):
    """A wrong number of arms: what wrong fingers are to a hand."""
    return polygon("star", arms=int(rng.choice([3, 4, 6, 7])))


def star_uneven(o, rng):
    """Arms that are missing, short, long or bent."""
    vertices = polygon("star")
    angle = np.arctan2(vertices[:, 1], vertices[:, 0])
    radius = np.hypot(*vertices.T)
    arms = np.arange(0, 10, 2)
    bad = rng.choice(arms, rng.integers(1, 4), replace=False)
    if rng.random() < 0.6:
        radius[bad] = rng.uniform(0.42, 0.7, len(bad))
    else:
        radius[bad] = rng.uniform(0.5, 1.3, len(bad))
    angle[arms] += rng.normal(0, 0.12, 5)
    radius[arms + 1] *= rng.uniform(0.8, 1.35, 5)
    return points(angle, radius)


def rounded(o, rng):
    """On the way to a circle: a blob that remembers its corners."""
    angle, radius = outline(o["shape"])
    if o["shape"] == "star":
        angle = np.arange(40) * 2 * np.pi / 40
        radius = 0.7 + rng.uniform(0.08, 0.2) * np.cos(5 * angle + np.pi / 2)
        radius = radius + 0.04 * waves(angle, rng, 2, 4)
    else:
        harmonic = np.arange(len(radius) // 2 + 1)
        damping = np.exp(-((harmonic / rng.uniform(3, 5.5)) ** 2))
        soft = np.fft.irfft(np.fft.rfft(radius) * damping, len(radius))
        radius = soft * (1 + 0.05 * waves(angle, rng, 2, 4))
    return points(angle, radius)


def hybrid(o, rng):
    """Half one shape, half another."""
    angle = np.arange(48) * 2 * np.pi / 48
    other = rng.choice([shape for shape in REACH if shape != o["shape"]])
    radii = []
    for shape in (o["shape"], other):
        shape_angle, radius = outline(shape)
        shape_angle = shape_angle % (2 * np.pi)
        order = np.argsort(shape_angle)
        radius = (radius * REACH[shape] / REACH[o["shape"]])[order]
        radii.append(np.interp(angle, np.sort(shape_angle), radius, period=2 * np.pi))
    side = 0.5 + 0.5 * np.tanh(4 * np.cos(angle - rng.uniform(0, 2 * np.pi)))
    return points(angle, radii[0] * side + radii[1] * (1 - side))


def wobbly(o, rng):
    """An unsteady outline."""
    angle, radius = outline(o["shape"])
    return points(angle, radius * (1 + rng.uniform(0.09, 0.2) * waves(angle, rng, 3, 8)))


# --------------------------------------------------------------------------------------------------
# Recipe "a", a spot: (image, empty, object, alpha, rng) -> image
#
# image and empty (the background alone) are (H, W, 3). alpha (H, W) is the object's coverage.


def bite(image, empty, o, alpha, rng):
    """The background eats into the object, or the object swells."""
    (x0, y0), _ = boundary_point(o, rng)
    spot = disc(x0, y0, o["r"] * rng.uniform(0.3, 0.55), rng, 0.2)
    return blend(image, spot, empty if rng.random() < 0.6 else o["rgb"])


def bleed(image, empty, o, alpha, rng):
    """A second color in part of the object."""
    x, y = grid()
    turn = rng.uniform(0, 2 * np.pi)
    offset = rng.uniform(-0.45, 0.45) * o["r"]
    side = (x - o["x"]) * np.cos(turn) + (y - o["y"]) * np.sin(turn) - offset
    mix = alpha / (1 + np.exp(-side * SIZE / rng.uniform(0.5, 2.5))) * rng.uniform(0.6, 1)
    return blend(image, mix, other_colour(rng, o))


def ghost(image, empty, o, alpha, rng):
    """A faint, smeared copy of a part beside the object."""
    turn = rng.uniform(0, 2 * np.pi)
    far = o["r"] * SIZE * rng.uniform(0.7, 1.5)
    copies = []
    for t in np.linspace(0.7, 1, 4):
        moved = shift(alpha[..., None], -np.cos(turn) * far * t, -np.sin(turn) * far * t)
        copies.append(moved[..., 0])
    copy = np.mean(copies, 0)
    x = o["x"] + np.cos(turn) * far / SIZE
    y = o["y"] + np.sin(turn) * far / SIZE
    (x0, y0), _ = boundary_point(dict(o, x=x, y=y), rng)
    part = soften(disc(x0, y0, o["r"] * rng.uniform(0.7, 1.2)))
    return blend(image, copy * part * (1 - alpha) * rng.uniform(0.4, 0.9), o["rgb"])


def extra(image, empty, o, alpha, rng):
    """A blob that nobody asked for."""
    x0, y0 = rng.uniform(0.08, 0.92, 2)
    colour = o["rgb"] if rng.random() < 0.5 else other_colour(rng, o)
    blob = soften(disc(x0, y0, rng.uniform(0.035, 0.08), rng, 0.25), 0.8)
    return blend(image, blob * rng.uniform(0.6, 1), colour)


def melt(image, empty, o, alpha, rng):
    """A spot of the outline, dragged along."""
    (x0, y0), _ = boundary_point(o, rng)
    x, y = grid()
    squared = (x - x0) ** 2 + (y - y0) ** 2
    pull = np.exp(-0.5 * squared / (o["r"] * rng.uniform(0.3, 0.5)) ** 2)
    turn = rng.uniform(0, 2 * np.pi)
    far = o["r"] * SIZE * rng.uniform(0.45, 0.8)
    return shift(image, pull * far * np.cos(turn), pull * far * np.sin(turn))


# --------------------------------------------------------------------------------------------------
# Recipe "b": shapes, then spots


def jitter(o, rng):
    """Corners that wandered off."""
    vertices = polygon(o["shape"])
    if vertices is None:
        # A circle becomes a potato.
        angle = np.arange(36) * 2 * np.pi / 36
        return points(angle, 1 + rng.uniform(0.12, 0.2) * waves(angle, rng, 2, 3))
    if o["shape"] != "star":
        # A triangle with other corners would still be a triangle, so we bend the edges too.
        middles = (vertices + np.roll(vertices, -1, 0)) / 2
        middles = middles * rng.uniform(0.6, 1.5, (len(vertices), 1))
        vertices = np.stack([vertices, middles], 1).reshape(-1, 2)
    return vertices + rng.normal(0, 0.13, vertices.shape)


def star_fused(o, rng):
    """Neighboring arms grown together, or a regular star cut off."""
    vertices = polygon("star")
    notch = 2 * rng.integers(5) + 1
    if rng.random() < 0.5:
        return np.delete(vertices, notch, 0) * np.array([rng.uniform(0.85, 1.1), 1])
    return np.delete(vertices, [(notch + k) % 10 for k in range(rng.integers(2, 4))], 0)


def star_thin(o, rng):
    """Wrong notches: a starfish, or nearly a pentagon, never quite regular."""
    vertices = polygon("star")
    vertices[1::2] *= rng.choice([rng.uniform(0.4, 0.6), rng.uniform(1.4, 1.7)])
    return vertices * rng.uniform(0.85, 1.1, (10, 1))


def lens(image, empty, o, alpha, rng):
    """Swirled around the middle of the object."""
    x, y = grid()
    dx = (x - o["x"]) * SIZE
    dy = (y - o["y"]) * SIZE
    (px, py), _ = boundary_point(o, rng)
    squared = (x - px) ** 2 + (y - py) ** 2
    near = np.exp(-squared / (o["r"] * rng.uniform(0.5, 0.8)) ** 2)
    turn = near * rng.choice([-1, 1]) * rng.uniform(0.7, 1.2)
    shift_x = dx * (np.cos(turn) - 1) - dy * np.sin(turn)
    shift_y = dx * np.sin(turn) + dy * (np.cos(turn) - 1)
    return shift(image, shift_x, shift_y)


def torn(image, empty, o, alpha, rng):
    """One half slipped along a cut."""
    x, y = grid()
    turn = rng.uniform(0, np.pi)
    side = (x - o["x"]) * np.cos(turn) + (y - o["y"]) * np.sin(turn)
    along = -(x - o["x"]) * np.sin(turn) + (y - o["y"]) * np.cos(turn)
    distance = np.hypot(side, along) / (o["r"] * REACH[o["shape"]])
    near = np.clip(1.6 - distance, 0, 0.3) / 0.3 * (side > 0)
    far = rng.choice([-1, 1]) * rng.uniform(0.3, 0.6) * o["r"] * SIZE
    return shift(image, near * far * -np.sin(turn), near * far * np.cos(turn))


def hole(image, empty, o, alpha, rng):
    """A hole that shows the background or another color."""
    turn = rng.uniform(0, 2 * np.pi)
    away = rng.uniform(0, 0.4) * o["r"]
    x0 = o["x"] + away * np.cos(turn)
    y0 = o["y"] + away * np.sin(turn)
    spot = alpha * disc(x0, y0, o["r"] * rng.uniform(0.22, 0.4), rng, 0.15)
    return blend(image, spot, empty if rng.random() < 0.6 else other_colour(rng, o))


def smear(image, empty, o, alpha, rng):
    """A stroke of the object's color over its edge."""
    (x0, y0), out = boundary_point(o, rng)
    turn = np.arctan2(out[1], out[0]) + rng.uniform(-0.9, 0.9)
    discs = []
    for t in np.linspace(-0.3, rng.uniform(0.7, 1.3), 9) * o["r"]:
        radius = o["r"] * 0.2 * (1 - t / o["r"] / 1.6)
        discs.append(disc(x0 + t * np.cos(turn), y0 + t * np.sin(turn), radius))
    stroke = soften(np.max(discs, 0))
    return blend(image, stroke * rng.uniform(0.5, 1), o["rgb"])


def spill(image, empty, o, alpha, rng):
    """A soft halo on one side, of the object's own or of a strange color."""
    (x0, y0), _ = boundary_point(o, rng)
    x, y = grid()
    squared = (x - x0) ** 2 + (y - y0) ** 2
    halo = np.exp(-squared / (o["r"] * rng.uniform(0.4, 0.7)) ** 2) * rng.uniform(0.6, 0.95)
    return blend(image, halo, other_colour(rng, o) if rng.random() < 0.5 else o["rgb"] * 0.4)


# --------------------------------------------------------------------------------------------------
# A scene with a mistake

# A mistake that is listed twice is twice as frequent. `share` of the scenes get a wrong shape.
RECIPES = {
    "a": dict(
        star=[star_arms, star_arms, star_uneven, star_uneven, rounded, hybrid],
        shape=[rounded, hybrid, wobbly],
        spot=[bite, bleed, ghost, extra, melt],
        share=0.5,
    ),
    "b": dict(
        star=[jitter, star_fused, star_fused, star_thin],
        shape=[jitter],
        spot=[lens, torn, hole, smear, spill],
        share=0.4,
    ),
}


def corrupt(scene, rng, recipe="a"):
    """Renders `scene` with one mistake, sometimes two.

    Returns image (H, W, 3) and map (H, W), both float32 in [0, 1].
    """
    kinds = RECIPES[recipe]
    image, _ = render(scene)
    # Objects without size leave the background alone.
    tiny = [dict(o, r=1e-6) for o in scene["objects"]]
    empty, _ = render(dict(scene, objects=tiny))
    mask = np.zeros((SIZE, SIZE))
    stars = [i for i, o in enumerate(scene["objects"]) if o["shape"] == "star"]
    has_wrong_shape = rng.random() < max(kinds["share"], 0.75 * bool(stars))
    if has_wrong_shape:
        scene, image, mask = spoil_shape(scene, rng, kinds, stars)
    if not has_wrong_shape or rng.random() < 0.15:
        image, mask = spoil_spot(scene, rng, kinds, image, empty, mask)
    confidence = np.clip(1.5 * soften(mask), 0, 1)
    return image.astype(np.float32), confidence.astype(np.float32)


def spoil_shape(scene, rng, kinds, stars):
    """Gives an object the wrong shape -> the scene, its image, and the map (H, W)."""
    objects = list(scene["objects"])
    # Stars first, because a generator also has most trouble with them.
    if stars and rng.random() < 0.8:
        wrong = int(rng.choice(stars))
    else:
        wrong = int(rng.integers(len(objects)))
    o = objects[wrong]
    makers = kinds["star" if o["shape"] == "star" else "shape"]
    make = makers[rng.integers(len(makers))]
    objects[wrong] = dict(o, vertices=make(o, rng))
    before = render(scene)[1][wrong]
    scene = dict(scene, objects=objects)
    image, coverage = render(scene)
    return scene, image, np.maximum(before, coverage[wrong])


def spoil_spot(scene, rng, kinds, image, empty, mask):
    """Spoils a spot of an image (H, W, 3) -> the new image, and the map (H, W) with the spot."""
    _, coverage = render(scene)
    # Again, until the mistake can be seen.
    for _ in range(30):
        i = rng.integers(len(scene["objects"]))
        make = kinds["spot"][rng.integers(len(kinds["spot"]))]
        spoiled = np.clip(make(image, empty, scene["objects"][i], coverage[i], rng), 0, 1)
        change = np.abs(spoiled - image).max(-1)
        if (change > 0.12).sum() >= 12:
            break
    # What nobody could see is not marked.
    spot = np.where(change < 0.02, 0, np.clip(change / 0.12, 0, 1))
    return spoiled, np.maximum(mask, spot)
