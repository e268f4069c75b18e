"""The toy world: scenes and captions, the oracle, the judges, the shipped models, and its build."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer, CLIPModel, CLIPTextModel
from transformers import ViTModel

from common import generator, initial_latents, load_model
from conftest import CPU
from run_folder import to_pil
from toy import flux_model, judges, make, measure, oracle, quality, training
from toy.artifacts import RECIPES, corrupt
from toy.scenes import COLOURS, REACH, SHAPES, all_captions, caption_of, object_coverage
from toy.scenes import parse_caption, polygon, render, sample_caption, sample_scene
from toy.training import ROOT, rng_of

PROMPTS = measure.REFERENCE_PROMPTS


def scenes(count, seed=0):
    """Alternately of the training and of the test captions."""
    rngs = [np.random.default_rng([seed, i]) for i in range(count)]
    return [sample_scene(rng, test=i % 2 == 1) for i, rng in enumerate(rngs)]


def thing(colour, shape, x=0.5, y=0.5, r=0.15, **more):
    o = dict(colour=colour, shape=shape, x=x, y=y, r=r, angle=0.2, light=0.08)
    return {**o, "rgb": np.array(COLOURS[colour]), **more}


def picture(*objects):
    """(64, 64, 3): these objects before a gray background."""
    background = dict(tone=0.6, tint=np.zeros(3), slope=0.1, direction=1.0)
    return render(dict(objects=objects, background=background))[0]


# --------------------------------------------------------------------------------------------------
# Scenes and captions


def test_captions_parse_back_and_others_are_refused():
    captions = all_captions(False) + all_captions(True)
    assert len(captions) == len(set(captions)) == 20 + 20 * 19 * 2
    assert all(caption_of(*parse_caption(caption)) == caption for caption in captions)
    longer = ("", " ", " right of a blue star", " above", " above a red star above a red star")
    for bad in ("", "red circle", "a red  circle", "a red cube", *map("a red".__add__, longer)):
        with pytest.raises(ValueError, match="not a caption"):
            oracle.correct(picture(thing("red", "circle")), bad)


def test_no_test_combination_occurs_in_training_in_any_order():
    train, test = ({frozenset(parse_caption(c)[0]) for c in all_captions(t)} for t in (False, True))
    assert not train & test
    assert sorted(len(kinds) for kinds in test) == [1] * 5 + [2] * 20
    # Every color and every shape is tested alone.
    singles = [kind for kinds in test if len(kinds) == 1 for kind in kinds]
    assert {name for kind in singles for name in kind} == {*COLOURS, *SHAPES}
    for is_test, side in ((False, "train"), (True, "test")):
        drawn = [sample_caption(np.random.default_rng(i), is_test) for i in range(500)]
        prompts = (ROOT / f"prompts_{side}.txt").read_text().splitlines()
        assert {*drawn, *prompts} <= set(all_captions(is_test))
        assert 0.25 < np.mean([" a " not in caption for caption in drawn]) < 0.35


def test_scenes_obey_their_caption_and_the_renderer_their_numbers():
    rows, columns = (np.mgrid[:64, :64] + 0.5) / 64
    for scene in scenes(100, seed=1):
        kinds, relation = parse_caption(scene["caption"])
        assert [(o["colour"], o["shape"]) for o in scene["objects"]] == kinds
        assert relation is None or oracle.related(*scene["objects"], relation) == 1
        image, coverage = render(scene)
        assert image.shape == (64, 64, 3) and image.dtype == coverage.dtype == np.float32
        assert 0 <= image.min() and image.max() <= 1
        # Objects are whole and do not overlap.
        assert coverage.min() == 0 and coverage.max() == 1 and coverage.sum(0).max() <= 1.001
        assert not coverage[:, [0, -1]].any() and not coverage[:, :, [0, -1]].any()
        for o, alpha in zip(scene["objects"], coverage):
            area = np.pi * o["r"] ** 2
            if o["shape"] != "circle":
                x, y = (polygon(o["shape"]) * o["r"] * REACH[o["shape"]]).T
                area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
            assert alpha.mean() == pytest.approx(area, rel=0.02)
            assert np.average(columns, weights=alpha) == pytest.approx(o["x"], abs=0.003)
            assert np.average(rows, weights=alpha) == pytest.approx(o["y"], abs=0.003)


def test_the_build_gives_the_shipped_prompts_and_images(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "ROOT", tmp_path)
    make.make_data()
    for name in ("prompts_train.txt", "prompts_test.txt", "images/metadata.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    for i in range(500):
        ours, theirs = (Image.open(root / "images" / f"{i:04d}.png") for root in (tmp_path, ROOT))
        assert np.array_equal(ours, theirs)


# --------------------------------------------------------------------------------------------------
# Oracle


def test_the_oracle_agrees_with_the_renderer():
    for measured in oracle.rates(count=100, seed=1).values():
        assert measured["right"] > 0.985 and measured["abstains"] < 0.01
        assert set(measured["wrong"]) == {"colour", "shape", "exchanged", "relation", "count"}
        assert max(measured["wrong"].values()) == measured["stars"] == 0


def test_reading_returns_what_was_drawn():
    for i, scene in enumerate(scenes(40, seed=2)):
        image, coverage = render(scene)
        found = oracle.read(image)
        assert len(found) == len(scene["objects"])
        assert found[0]["area"] == max(o["area"] for o in found)
        for o, alpha in zip(scene["objects"], coverage):
            near = min(found, key=lambda f: np.hypot(f["x"] - o["x"], f["y"] - o["y"]))
            assert np.hypot(near["x"] - o["x"], near["y"] - o["y"]) < 0.01
            assert near["nearest"] == (near["colour"], near["shape"]) == (o["colour"], o["shape"])
            assert near["residual"] < 0.03
            assert near["area"] == pytest.approx(alpha.mean(), rel=0.06)
        assert oracle.recognised(image, scene["caption"])
        for captions in oracle.wrong_captions(scene["caption"]).values():
            assert not oracle.recognised(image, captions[i % len(captions)])


def test_every_kind_of_image_gives_the_same_verdict():
    image = picture(thing("red", "circle"))
    tensor = torch.from_numpy(image).permute(2, 0, 1).requires_grad_()
    pil = to_pil(tensor)
    large = pil.resize((256, 256), Image.Resampling.BICUBIC)
    for same in (image, tensor, tensor.half(), pil, pil.convert("RGBA"), large):
        assert oracle.correct(same, "a red circle") is True
        assert oracle.correct(same, "a blue circle") is False
    for bad in (image[..., 0], image[None], np.zeros((3, 64, 64))):
        with pytest.raises(ValueError, match=r"\(3, H, W\) tensor"):
            oracle.read(bad)
    noise = np.random.default_rng(0).random((64, 64, 3))
    for nothing in (noise * 0, noise * 0 + 1, noise, oracle.blur(noise, 1.0)):
        assert oracle.correct(nothing, "a red circle above a blue star") is False


CIRCLE = thing("red", "circle", 0.3)
SQUARE = thing("blue", "square", 0.7)
ORANGE = thing("red", "circle", rgb=np.array((0.92, 0.46, 0.13)))
DIAGONAL = (thing("red", "circle", 0.3, 0.3), thing("blue", "square", 0.7, 0.7))
SQUASHED = [thing("red", "square", vertices=polygon("square") * [1, y]) for y in (0.93, 0.83, 0.6)]
VERDICTS = [
    # Something gray counts, a speck makes it abstain, and dust is ignored.
    ("a red circle", (CIRCLE, dict(SQUARE, rgb=np.full(3, 0.2))), False),
    ("a red circle", (CIRCLE, dict(SQUARE, r=0.045)), None),
    ("a red circle", (CIRCLE, dict(SQUARE, r=0.02)), True),
    ("a red circle", (ORANGE,), None),
    ("a green circle", (ORANGE,), False),
    # Cut by the border.
    ("a red circle", (thing("red", "circle", 0.08, r=0.2),), False),
    ("a red square", SQUASHED[:1], True),
    ("a red square", SQUASHED[1:2], None),
    ("a red square", SQUASHED[2:], False),
    ("a red circle left of a blue square", (CIRCLE, SQUARE), True),
    ("a blue square left of a red circle", (CIRCLE, SQUARE), False),
    ("a red square left of a blue circle", (CIRCLE, SQUARE), False),
    ("a red circle left of a blue square", (CIRCLE,), False),
    ("a red circle left of a blue square", DIAGONAL, None),
    ("a blue square above a red circle", DIAGONAL, False),
    # Touching, of one color and of two.
    ("a red circle left of a red square", (CIRCLE, thing("red", "square", 0.57)), None),
    ("a red circle left of a blue square", (CIRCLE, dict(SQUARE, x=0.57)), True),
]


@pytest.mark.parametrize("caption, objects, verdict", VERDICTS)
def test_verdicts(caption, objects, verdict):
    assert oracle.correct(picture(*objects), caption) is verdict


def test_only_a_star_of_five_arms_is_a_star():
    for arms in (3, 4, 5, 6, 7):
        for i, colour in enumerate(COLOURS):
            image = picture(thing(colour, "star", angle=i, vertices=polygon("star", arms=arms)))
            for look in (image, oracle.degrade(image, np.random.default_rng(i))):
                assert oracle.correct(look, f"a {colour} star") is (arms == 5)
                # To the nearest reading, a star with a wrong number of arms is still a star.
                assert arms == 3 or oracle.recognised(look, f"a {colour} star")


def test_the_oracle_on_the_command_line(tmp_path):
    to_pil(torch.from_numpy(picture(CIRCLE)).permute(2, 0, 1)).save(tmp_path / "a.png")
    for words, said in (
        (("a.png", "a red circle"), "True\n"),
        (("a.png", "a red cube"), "oracle.py: not a caption of the toy world: 'a red cube'\n"),
        (("b.png", "a red circle"), "oracle.py: [Errno 2] No such file or directory: 'b.png'\n"),
    ):
        command = [sys.executable, ROOT / "oracle.py", *words]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.stdout + result.stderr).endswith(said)
        assert result.returncode == (said != "True\n") == result.stderr.count("\n")


# --------------------------------------------------------------------------------------------------
# Judges


def test_wrong_captions_change_one_thing():
    wrong = judges.hard_negatives("a red circle left of a blue square")
    assert wrong["binding"] == ["a blue circle left of a red square"]
    assert wrong["exchanged"] == ["a blue square left of a red circle"]
    assert wrong["relation"][:1] == ["a red circle above a blue square"]
    assert wrong["count"] == ["a red circle", "a blue square"]
    for name in ("exchanged", "count", "colour", "shape"):
        assert oracle.wrong_captions("a red circle left of a blue square")[name] == wrong[name]
    # Training sees only captions of its own side.
    captions = judges.Captions()
    for row, caption in enumerate(captions.text):
        negatives = {captions.text[i] for i in captions.negatives(row, rng_of("x"))}
        assert len(negatives) >= 6 and caption not in negatives
        assert not negatives & set(all_captions(True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_mistakes_are_marked(recipe):
    for i, scene in enumerate(scenes(25)):
        image, confidence = corrupt(scene, rng_of("test", i), recipe)
        assert 0 <= image.min() and image.max() <= 1 and 0.5 < confidence.max() <= 1
        # What visibly changed is marked. Nothing else is, but the objects that it spoils.
        change = np.abs(image - render(scene)[0]).max(-1)
        assert confidence[change > 0.12].min(initial=1) > 0.1
        near = change > 0
        for own in [object_coverage(o) > 0 for o in scene["objects"]]:
            near |= own & (change[own] > 0.02).any()
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(near, 3), (7, 7))
        assert not confidence[~windows.any((2, 3))].any()


def test_the_hidden_taste():
    scene = sample_scene(rng_of("test", 5), "a red square")
    (o,) = scene["objects"]
    look = np.array([1.0, 0.8, 0.5])
    lighter = dict(scene["background"], tone=scene["background"]["tone"] + 0.1)
    larger, upright = dict(o, r=o["r"] + 0.01), dict(o, angle=o["angle"] * 0.5)
    for change in (dict(background=lighter), dict(objects=[larger]), dict(objects=[upright])):
        assert judges.taste({**scene, **change}, look) > judges.taste(scene, look)
    # Less blur, more saturation, less noise.
    for change in ((-0.5, 0, 0), (0, 0.1, 0), (0, 0, -0.1)):
        assert judges.taste(scene, look + change) > judges.taste(scene, look)


def test_folders_load_with_stock_classes():
    sizes = {}
    for name, model_class, megabytes in (
        ("clip", CLIPModel, 1.8),
        ("pref", CLIPModel, 1.8),
        ("pref_b", CLIPModel, 1.3),
        ("dino", ViTModel, 0.7),
        ("detector", AutoModelForSemanticSegmentation, 1.4),
        ("detector_b", AutoModelForSemanticSegmentation, 0.9),
    ):
        options = dict(dtype=torch.float32, output_loading_info=True)
        model, report = model_class.from_pretrained(ROOT / name, **options)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (ROOT / name / "model.safetensors").stat().st_size < megabytes * 1e6
        sizes[name] = sum(p.numel() for p in model.parameters())
        if model_class is CLIPModel:
            # One token per word; padding comes after the end, where the text is pooled.
            tokenizer = AutoTokenizer.from_pretrained(ROOT / name)
            assert tokenizer.get_vocab() == judges.make_tokenizer().get_vocab()
            tokens = tokenizer("A red, zorp star!", padding="max_length", return_tensors="pt")
            ids = tokens.input_ids
            assert ids.shape == (1, 12) and ids[0, 3] == 2 and (ids[0, 5:] == 1).all()
            short, long = (model.get_text_features(i).pooler_output for i in (ids[:, :6], ids))
            torch.testing.assert_close(short, long)
    # The second judges are of another kind than the first.
    assert sizes["pref"] != sizes["pref_b"] and sizes["detector"] != sizes["detector_b"]


def test_judges_separate_what_they_should():
    """toy/README.md has the full measurements."""
    for look, floor in ((0, 0.95), (0.6, 0.9)):
        q = quality.clip_quality(count=60, look=look)
        assert min(q["colour"], q["shape"], q["exchanged"]) >= floor, q
    for name in ("pref", "pref_b"):
        q = quality.pref_quality(name, count=80)
        assert q["same"] >= 0.77 and q["wrong"] >= 0.92, q
    for name, recipe in (("detector", "a"), ("detector_b", "b")):
        q = quality.detector_quality(name, recipe, count=30)
        assert min(q["auroc_crisp"], q["auroc_soft"]) >= 0.85, q
        assert max(q["clean_pixels_crisp"], q["clean_pixels_soft"]) <= 0.01, q
    q = quality.dino_quality(captions=12, each=5)
    order = ("different_captions", "one_caption", "narrowed_0.75", "narrowed_0.5", "narrowed_0.25")
    ordered = [q[name] for name in order] + [3 * q["one_scene_disturbed"]]
    assert ordered == sorted(ordered, reverse=True), q
    assert max(q["position_frozen"], q["background_frozen"]) < q["one_caption"], q


# --------------------------------------------------------------------------------------------------
# Models


def test_the_models_open_with_stock_diffusers_and_are_small():
    sd = StableDiffusionPipeline.from_pretrained(ROOT / "sd")
    flux = FluxPipeline.from_pretrained(ROOT / "flux")
    nets = [sd.unet, sd.vae, sd.text_encoder, flux.transformer, flux.text_encoder_2]
    assert {p.dtype for net in nets for p in net.parameters()} == {torch.float32}
    assert not flux.transformer.config.guidance_embeds and sd.safety_checker is None
    size = {}
    for folder in ("flux", "."):
        size[folder] = sum(p.stat().st_size for p in (ROOT / folder).rglob("*.safetensors"))
    assert 5e6 < size["flux"] < 6e6 and size["."] < 21e6


@pytest.mark.parametrize(
    "name, stored, sampler, floor",
    [
        ("toy", "reference", measure.SAMPLER, 0.8),
        ("toy-flux", "flux_reference", measure.FLOW_SAMPLER, 0.7),
    ],
)
def test_the_stored_picture_and_a_floor_of_quality(tmp_path, name, stored, sampler, floor):
    model = load_model(name, CPU)
    measure.save_reference(model, sampler, tmp_path / "new.png")
    old = np.asarray(Image.open(ROOT / "pictures" / f"{stored}.png"), float)
    assert np.abs(np.asarray(Image.open(tmp_path / "new.png"), float) - old).mean() < 4
    # Held-out circles and squares; stars are harder.
    prompts = ["a yellow circle", "a purple circle", "a blue square"]
    rates, images = measure.correct_rates(model, prompts, 4, sampler, seed=1)
    assert images.shape == (12, 3, 64, 64)
    assert rates["True"] >= floor, rates


# --------------------------------------------------------------------------------------------------
# The build of toy/sd and toy/flux


def test_a_killed_build_ends_with_the_same_weights(tmp_path, monkeypatch):
    steps = []

    def train(folder, kill_at=None):
        monkeypatch.setattr(training, "WORK", tmp_path / folder)
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3)

        def step_fn(step, rng):
            if step == kill_at:
                raise KeyboardInterrupt
            steps.append(step)
            x = torch.nn.functional.dropout(judges.noise(rng, 4, 3))
            return (net(x) - x).square().mean(), {}

        training.fit("net", dict(net=net), step_fn, 5, lr=0.1, ema=0.9, save_seconds=-1)
        return net.weight

    with pytest.raises(KeyboardInterrupt):
        train("killed", kill_at=3)
    assert torch.equal(train("killed"), train("whole"))
    assert steps == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_whitening_keeps_the_pictures(monkeypatch):
    vae = make.load_vae()
    images = [make.to_bytes(render(scene)[0]) for scene in scenes(4)]
    latents = make.encode(vae, images)
    before = vae.decode(latents).sample
    with monkeypatch.context() as patch:
        patch.setattr(make, "encode", lambda *_: latents)
        make.whiten(vae, images)
    white = make.encode(vae, images)
    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(vae.decode(white).sample, before, atol=1e-3, rtol=0)


NET = torch.nn.Identity()
ROWS = SimpleNamespace(row=np.arange(1, 9))


@pytest.fixture
def student(monkeypatch, tmp_path):
    """The student is v = x - 2, and fit takes one step: what they saw."""
    seen = SimpleNamespace(states=[], losses=[])

    def velocity(transformer, t5, captions, x, sigma, rows):
        seen.states.append((x, sigma, rows))
        return x - 2

    def fit(name, modules, step_fn, steps, **options):
        seen.losses.append(step_fn(0, rng_of("x"))[0])

    for name, value in dict(velocity=velocity, fit=fit, WORK=tmp_path, TEACHER_PARTS=2).items():
        monkeypatch.setattr(flux_model, name, value)
    return seen


def test_the_flow_learns_noise_minus_x0(student):
    flux_model.train_on_scenes(NET, NET, ROWS, torch.ones(8, 64, 16))
    x, sigma, rows = student.states[0]
    # shift 2, and one sigma in each part
    assert (32 * sigma / (2 - sigma)).long().sort().values.tolist() == list(range(32))
    assert 0 < (rows == 0).sum() < 8
    sigma = sigma.view(-1, 1, 1)
    noise = (x - (1 - sigma)) / sigma
    expected = (x - 2 - (noise - 1)).square().mean()
    torch.testing.assert_close(student.losses[0], expected, rtol=1e-3, atol=0)


def test_the_flow_learns_the_teachers_answers(student):
    calls = []

    def teacher(x, sigma, rows):
        calls.append(rows)
        return x + rows.view(-1, 1, 1)

    flux_model.train_on_teacher(NET, NET, ROWS, teacher, torch.ones(8, 64, 16))
    # Asked once per part, then read from the cache; each part has a sigma in every eighth.
    x, sigma, rows, v = flux_model.answers(teacher, ROWS, torch.ones(8, 64, 16), 1)
    assert len(calls) == 2 and rows.tolist() == ROWS.row.tolist()
    assert (8 * (1 - sigma)).long().sort().values.tolist() == list(range(8))
    torch.testing.assert_close(v.float(), x.float() + rows.view(-1, 1, 1), atol=1e-2, rtol=0)
    expected = (2 + student.states[0][2].float()).square().mean()
    torch.testing.assert_close(student.losses[0], expected, rtol=1e-3, atol=0)


def test_one_step_learns_two_of_the_teachers(student):
    """The teacher's velocity is x - 6, so its step of 0.1 leaves 0.9 of x - 6."""
    sigmas = []

    def teacher(x, sigma, rows):
        sigmas.append(sigma.tolist())
        return x - 6

    flux_model.train_few_steps(NET, NET, ROWS, teacher, batch=2)
    *way, (x, sigma, _) = student.states
    assert sigma.tolist() == pytest.approx(np.repeat([1, 0.8, 0.6, 0.4, 0.2], 2))
    assert np.subtract(*sigmas) == pytest.approx(np.full(10, 0.1))
    for (state, _, _), (after, _, _) in zip(way, way[1:]):
        torch.testing.assert_close(after, state - 0.2 * (state - 2))
    torch.testing.assert_close(x, torch.cat([state for state, _, _ in way]))
    end = 6 + (x - 6) * 0.9**2
    torch.testing.assert_close(student.losses[0], (x - 2 - (x - end) * 5).square().mean())


def test_the_teacher_is_toy_sd_as_a_flow():
    """At timestep 600: noise - x0 of the U-Net's own noise and x0, guided."""
    sd = load_model("toy", CPU)
    clip = CLIPTextModel.from_pretrained(ROOT / "clip", dtype=torch.float32).eval()
    captions = flux_model.Captions(PROMPTS, judges.make_tokenizer(), clip)
    teacher = flux_model.Teacher(captions)
    alpha = make.make_scheduler().alphas_cumprod[600]
    sigma = (1 - alpha).sqrt() / ((1 - alpha).sqrt() + alpha.sqrt())
    z = initial_latents(sd, [generator(0, "z", i) for i in range(2)])
    v = [sd.denoiser(z, 600, teacher.states[rows]).sample for rows in ([0, 0], [1, 2])]
    v = v[0] + 3 * (v[1] - v[0])
    noise, x0 = (1 - alpha).sqrt() * z + alpha.sqrt() * v, alpha.sqrt() * z - (1 - alpha).sqrt() * v
    x = FluxPipeline._pack_latents(z * ((1 - sigma) ** 2 + sigma**2).sqrt(), 2, 4, 16, 16)
    ours = teacher(x, sigma.expand(2), torch.tensor([1, 2]))
    theirs = FluxPipeline._pack_latents(noise - x0, 2, 4, 16, 16)
    # bfloat16
    assert (ours - theirs).abs().mean() < 0.02 * theirs.std()
