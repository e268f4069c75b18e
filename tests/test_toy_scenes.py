"""The renderer and the grammar of the toy world, and the oracle which reads its scenes back."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toy import oracle
from toy.scenes import (COLOURS, KINDS, REACH, RELATIONS, SHAPES, SIZE, all_captions, caption_of, held_out, parse_caption, polygon, render,
                        sample_caption, sample_scene)

ROOT = Path(__file__).resolve().parents[1]


def scenes(count, seed=0):
    """Alternately of the training and of the test captions."""
    return [sample_scene(np.random.default_rng([seed, i]), test=i % 2 == 1) for i in range(count)]


def thing(colour, shape, x=.5, y=.5, r=.15, **more):
    return dict(dict(colour=colour, shape=shape, x=x, y=y, r=r, angle=.2, rgb=np.array(COLOURS[colour]), light=.08), **more)


def picture(*objects, tone=.6, tint=(0, 0, 0)):
    """(64, 64, 3): these objects before a background of this tone."""
    background = dict(tone=tone, tint=np.array(tint), slope=.1, direction=1.)
    if not objects:
        return picture(thing("red", "circle", x=-1, y=-1), tone=tone, tint=tint)
    return render(dict(caption="", objects=objects, background=background))[0]


# ----------------------------------------------------------------------------------------------------------------------------- grammar

def test_every_caption_parses_back():
    captions = all_captions(False) + all_captions(True)
    assert len(captions) == len(set(captions)) == len(KINDS) + len(KINDS) * (len(KINDS) - 1) * len(RELATIONS)
    for caption in captions:
        assert caption_of(*parse_caption(caption)) == caption


@pytest.mark.parametrize("caption", ["", "red circle", "a red circle ", "a red  circle", "a circle red", "an orange circle", "a red cube", "a red",
                                     "a red circle right of a blue star", "a red circle above", "a red circle above a blue star above a red star"])
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(caption)
    with pytest.raises(ValueError, match="not a caption"):
        oracle.correct(picture(thing("red", "circle")), caption)


def test_held_out_combinations_never_occur_in_training_in_any_order():
    sides = {test: {frozenset(parse_caption(caption)[0]) for caption in all_captions(test)} for test in (False, True)}
    assert not sides[False] & sides[True]
    assert all(held_out(kinds[::-1]) == held_out(kinds) for kinds in ([a, b] for a in KINDS for b in KINDS))
    singles, pairs = [[k for k in sides[True] if len(k) == n] for n in (1, 2)]
    assert len(singles) == 5 and len(pairs) == 20
    assert {c for k in singles for c, _ in k} == set(COLOURS) and {s for k in singles for _, s in k} == set(SHAPES)
    for test in (False, True):
        drawn = [sample_caption(np.random.default_rng(i), test) for i in range(2000)]
        assert {frozenset(parse_caption(c)[0]) for c in drawn} <= sides[test]
        assert .25 < sum(" a " not in c for c in drawn) / 2000 < .35            # the share of one object, on both sides
        assert set(drawn) <= set(all_captions(test)) and len(set(drawn)) > (35 if test else 500)


# ---------------------------------------------------------------------------------------------------------------------------- renderer

def test_scenes_obey_their_caption():
    for i, scene in enumerate(scenes(600)):
        kinds, relation = parse_caption(scene["caption"])
        objects = scene["objects"]
        assert [(o["colour"], o["shape"]) for o in objects] == kinds and held_out(kinds) == (i % 2 == 1)
        for o in objects:
            reach = o["r"] * REACH[o["shape"]]
            assert .019 < o["x"] - reach and o["x"] + reach < .981 and .019 < o["y"] - reach and o["y"] + reach < .981
            others = [np.abs(o["rgb"] / np.mean(o["rgb"]) - np.array(c) / np.mean(c)).sum() for c in COLOURS.values()]
            assert list(COLOURS)[int(np.argmin(others))] == o["colour"]
        if relation:
            a, b = objects
            along, across = (b["x"] - a["x"], b["y"] - a["y"])[::1 if relation == "left of" else -1]
            assert along > .1 and abs(across) < .6 * along
            assert np.hypot(along, across) > .03 + sum(o["r"] * REACH[o["shape"]] for o in objects)


def test_coverage_and_image_are_in_range_and_agree():
    for scene in scenes(150, seed=1):
        image, coverage = render(scene)
        assert image.shape == (SIZE, SIZE, 3) and coverage.shape == (len(scene["objects"]), SIZE, SIZE)
        assert image.dtype == coverage.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 1 and coverage.min() == 0 and coverage.max() == 1
        assert coverage.sum(0).max() <= 1.001                                   # objects do not overlap
        assert not coverage[:, [0, -1]].any() and not coverage[:, :, [0, -1]].any()
        for o, alpha in zip(scene["objects"], coverage):
            corners = polygon(o["shape"])
            if corners is None:
                area = np.pi * o["r"] ** 2
            else:
                x, y = (corners * o["r"] * REACH[o["shape"]]).T
                area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
            assert abs(alpha.sum() / SIZE ** 2 - area) < .02 * area
            rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
            assert abs((alpha * columns).sum() / alpha.sum() + .5 / SIZE - o["x"]) < .003
            assert abs((alpha * rows).sum() / alpha.sum() + .5 / SIZE - o["y"]) < .003
    image, coverage = render(scene, size=128)
    assert image.shape == (128, 128, 3) and coverage.shape[1:] == (128, 128)


@pytest.mark.parametrize("seed, caption, mean, areas", [
    (0, "a green square left of a blue square", (.3726, .41363, .41214), (192.49, 227.23)),
    (1, "a purple star left of a yellow triangle", (.6943, .68555, .6602), (255.92, 279.56)),
    (2, "a red triangle", (.54688, .47887, .46807), (569.36,)),
])
def test_a_seed_gives_the_scene_it_always_gave(seed, caption, mean, areas):
    scene = sample_scene(np.random.default_rng(seed))
    image, coverage = render(scene)
    assert scene["caption"] == caption
    np.testing.assert_allclose(image.mean((0, 1)), mean, atol=2e-4)
    np.testing.assert_allclose(coverage.sum((1, 2)), areas, rtol=2e-3)
    again = render(sample_scene(np.random.default_rng(seed)))
    assert (again[0] == image).all() and (again[1] == coverage).all()


def test_one_caption_leaves_room_for_diversity():
    drawn = [sample_scene(np.random.default_rng(i), "a green star above a red square") for i in range(200)]
    assert {s["caption"] for s in drawn} == {"a green star above a red square"}
    facts = np.array([[o["x"], o["y"], o["r"], o["angle"]] for s in drawn for o in s["objects"][:1]])
    assert (facts.std(0) > (.1, .035, .015, .2)).all() and np.std([s["background"]["tone"] for s in drawn]) > .15


# -------------------------------------------------------------------------------------------------------------- oracle: rates and verdicts

@pytest.fixture(scope="module")
def measured():
    return oracle.rates(count=250, seed=1)                       # 500 scenes and 250 malformed stars, clean and degraded


def test_the_oracle_agrees_with_the_renderer(measured):
    assert measured["clean"]["right"] > .99 and measured["clean"]["abstains"] < .01
    assert measured["degraded"]["right"] > .985 and measured["degraded"]["abstains"] < .01


@pytest.mark.parametrize("look", ["clean", "degraded"])
def test_the_oracle_accepts_no_wrong_caption_and_no_malformed_star(measured, look):
    assert set(measured[look]["wrong"]) == {"colour", "shape", "exchanged", "relation", "count"}
    assert max(measured[look]["wrong"].values()) < .005 and measured[look]["stars"] < .005


def test_wrong_captions_are_wrong():
    wrong = oracle.wrong_captions("a red circle left of a blue square")
    assert wrong["exchanged"] == ["a blue square left of a red circle"] and wrong["relation"] == ["a red circle above a blue square"]
    assert wrong["count"] == ["a red circle", "a blue square"] and len(wrong["colour"]) == 8 and len(wrong["shape"]) == 6
    assert "a red circle left of a red circle" not in oracle.wrong_captions("a red circle left of a red star")["shape"]
    known = set(all_captions(False)) | set(all_captions(True))
    for caption in all_captions(True):
        assert all(group and known - {caption} >= set(group) for group in oracle.wrong_captions(caption).values())


def test_read_returns_what_was_drawn():
    for scene in scenes(100, seed=2):
        image, coverage = render(scene)
        found = oracle.read(image)
        assert [o["area"] for o in found] == sorted((o["area"] for o in found), reverse=True) and len(found) == len(scene["objects"])
        for o, alpha in zip(scene["objects"], coverage):
            match = min(found, key=lambda f: np.hypot(f["x"] - o["x"], f["y"] - o["y"]))
            assert np.hypot(match["x"] - o["x"], match["y"] - o["y"]) < .01
            assert (match["colour"], match["shape"]) == (o["colour"], o["shape"]) and match["residual"] < .03
            assert abs(match["area"] * SIZE ** 2 - alpha.sum()) < .06 * alpha.sum()


def test_any_kind_of_image_gives_the_same_verdict():
    for scene in scenes(20, seed=3):
        image = render(scene)[0]
        tensor = torch.from_numpy(image).permute(2, 0, 1).requires_grad_()
        pil = Image.fromarray(np.round(image * 255).astype(np.uint8))
        wrong = oracle.wrong_captions(scene["caption"])["colour"][0]
        for same in (image, tensor, tensor.half(), pil, pil.convert("RGBA"), pil.resize((256, 256), Image.Resampling.BICUBIC)):
            assert oracle.correct(same, scene["caption"]) is True
            assert oracle.correct(same, wrong) is False
    for bad in (image[..., 0], image[None], np.zeros((3, 64, 64))):
        with pytest.raises(ValueError, match=r"\(3, H, W\) tensor"):
            oracle.read(bad)


@pytest.mark.parametrize("caption, objects, verdict", [
    ("a red circle", [thing("red", "circle")], True),
    ("a red circle", [], False),
    ("a red circle", [thing("red", "circle", .3), thing("red", "circle", .7)], False),
    ("a red circle", [thing("red", "circle", .3), thing("blue", "square", .7, rgb=np.full(3, .2))], False),        # a grey thing is a thing
    ("a red circle", [thing("red", "circle", .3), thing("blue", "square", .7, r=.045)], None),                    # a speck
    ("a red circle", [thing("red", "circle", .3), thing("blue", "square", .7, r=.02)], True),                     # dust
    ("a red circle", [thing("red", "circle", rgb=np.array((.92, .46, .13)))], None),                              # orange
    ("a yellow circle", [thing("red", "circle", rgb=np.array((.92, .46, .13)))], None),
    ("a green circle", [thing("red", "circle", rgb=np.array((.92, .46, .13)))], False),
    ("a red circle", [thing("red", "circle", rgb=np.full(3, .15))], False),
    ("a red circle", [thing("red", "circle", .08, r=.2)], False),                                                 # cut by the border
    ("a red square", [thing("red", "square", angle=np.pi / 4)], True),                                            # any rotation
    ("a red triangle", [thing("red", "triangle", angle=np.pi)], True),
    ("a red square", [thing("red", "square", vertices=polygon("square") * [1, .93])], True),
    ("a red square", [thing("red", "square", vertices=polygon("square") * [1, .83])], None),
    ("a red square", [thing("red", "square", vertices=polygon("square") * [1, .6])], False),
    ("a red circle left of a blue square", [thing("red", "circle", .3), thing("blue", "square", .7)], True),
    ("a blue square left of a red circle", [thing("red", "circle", .3), thing("blue", "square", .7)], False),
    ("a red circle above a blue square", [thing("red", "circle", .3), thing("blue", "square", .7)], False),
    ("a red circle left of a blue square", [thing("red", "circle", .3, .3), thing("blue", "square", .7, .7)], None),    # diagonal
    ("a red circle above a blue square", [thing("red", "circle", .3, .3), thing("blue", "square", .7, .7)], None),
    ("a blue square above a red circle", [thing("red", "circle", .3, .3), thing("blue", "square", .7, .7)], False),
    ("a red circle left of a blue square", [thing("blue", "circle", .3), thing("red", "square", .7)], False),     # colours bound wrongly
    ("a red circle left of a red square", [thing("red", "circle", .3), thing("red", "square", .57)], None),       # touching, one colour
    ("a red circle left of a blue square", [thing("red", "circle", .3), thing("blue", "square", .57)], True),     # touching, two colours
    ("a red circle left of a blue square", [thing("red", "circle", .3)], False),
])
def test_verdicts(caption, objects, verdict):
    assert oracle.correct(picture(*objects), caption) is verdict


@pytest.mark.parametrize("look", ["clean", "degraded"])
@pytest.mark.parametrize("arms, allowed", [(3, {False}), (4, {False}), (5, {True}), (6, {False}), (7, {False}), (8, {False})])
def test_only_a_star_of_five_arms_is_a_star(arms, allowed, look):
    verdicts = set()
    for i in range(15):
        rng = np.random.default_rng(i)
        scene = sample_scene(rng, f"a {list(COLOURS)[i % 5]} star")
        scene["objects"][0] |= dict(vertices=polygon("star", arms=arms), r=rng.uniform(.125, .2))
        image = render(scene)[0]
        verdicts.add(oracle.correct(oracle.degrade(image, rng) if look == "degraded" else image, scene["caption"]))
    assert verdicts == allowed


def test_broken_shapes_are_not_accepted():
    disc, empty = picture(thing("red", "circle", r=.25)), picture()
    columns, rows = np.meshgrid(*[(np.arange(SIZE) + .5) / SIZE - .5] * 2)
    blue = empty * 0 + np.float32(COLOURS["blue"])
    inside = np.abs(disc - empty).sum(-1, keepdims=True) > .3
    for where, with_ in [(np.hypot(columns, rows) < .1, empty), (columns > 0, empty), ((columns > 0) & (rows > 0), empty),
                         (np.abs(columns) < .03, empty), ((columns > 0) & inside[..., 0], blue)]:
        assert oracle.correct(np.where(where[..., None], with_, disc), "a red circle") is False


@pytest.mark.parametrize("tone, tint", [(0, (0, 0, 0)), (1.1, (0, 0, 0)), (.6, (.3, 0, -.4)), (.5, (-.3, 0, .4)), (.4, (.2, -.1, .2))])
def test_any_smooth_background(tone, tint):
    for colour, shape in [("yellow", "star"), ("green", "triangle"), ("purple", "square"), ("blue", "circle")]:
        assert oracle.correct(picture(thing(colour, shape, r=.2), tone=tone, tint=tint), f"a {colour} {shape}") is True


def test_images_of_nothing_are_read_without_an_error():
    rng = np.random.default_rng(0)
    with np.errstate(divide="raise", invalid="raise"):
        for image in (np.zeros((64, 64, 3)), np.ones((64, 64, 3)), rng.random((64, 64, 3)), rng.random((64, 64, 1)) * np.ones(3),
                      np.kron(rng.random((8, 8, 3)), np.ones((8, 8, 1))), oracle.blur(rng.random((64, 64, 3)), 1.)):
            assert oracle.correct(image, "a red circle above a blue star") is False


def test_command_line(tmp_path):
    Image.fromarray((picture(thing("red", "circle")) * 255).astype(np.uint8)).save(tmp_path / "a.png")
    run = lambda *args: subprocess.run([sys.executable, "toy/oracle.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    right = run(tmp_path / "a.png", "a red circle")
    assert right.returncode == 0 and right.stdout.splitlines()[-1] == "True" and "'shape': 'circle'" in right.stdout
    for args in [(tmp_path / "a.png", "a red cube"), (tmp_path / "b.png", "a red circle"), (tmp_path / "a.png",)]:
        wrong = run(*args)
        assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and not wrong.stdout


def test_recognised_is_the_nearest_reading():
    for i, scene in enumerate(scenes(100, seed=5)):
        image = render(scene)[0]
        assert oracle.recognised(image, scene["caption"])
        for captions in oracle.wrong_captions(scene["caption"]).values():
            assert not oracle.recognised(image, captions[i % len(captions)])
    six = picture(thing("red", "star", vertices=polygon("star", arms=6)))
    assert oracle.correct(six, "a red star") is False and oracle.recognised(six, "a red star")
    assert not oracle.recognised(six, "a red circle") and not oracle.recognised(six, "a blue star") and not oracle.recognised(picture(), "a red star")
    diagonal = picture(thing("red", "circle", x=.3, y=.3), thing("blue", "circle", x=.7, y=.72))
    assert oracle.correct(diagonal, "a red circle above a blue circle") is None
    assert oracle.recognised(diagonal, "a red circle above a blue circle") and not oracle.recognised(diagonal, "a red circle left of a blue circle")
