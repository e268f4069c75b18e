"""data/labels.py: the labeling loop with a detector whose answer we know, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from conftest import CPU, ROOT, run_script
from PIL import Image

from data import labels

SIZE = 16


class RedDetector:
    """Its confidence is the red channel, so that a test can paint what it sees."""

    size = SIZE

    def __call__(self, images):
        assert images.shape[2:] == (SIZE, SIZE)
        return images[:, 0]


@pytest.fixture
def unlabelled(monkeypatch):
    """A folder of 18 images, six per category. Hands are redder the higher their number."""
    monkeypatch.setattr(labels, "load_detector", lambda source, device: RedDetector())
    Path("new").mkdir()
    lines = []
    for i in range(18):
        category = ["hand", "dog", "tree"][i % 3]
        pixels = np.full((SIZE, SIZE, 3), 5, np.uint8)
        pixels[0, 0, 1] = i  # so that no two files are equal
        if category == "hand":
            pixels[4:8, 4:8, 0] = 100 + 8 * i
        Image.fromarray(pixels).save(f"new/{i}.png")
        lines.append(json.dumps(dict(file_name=f"{i}.png", text="a cat", category=category)))
    Path("new/metadata.jsonl").write_text("\n\n".join(lines))


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


LOOK = ["--detector", "red", "--images", "new", "--device", "cpu"]


def run(command, *words):
    assert run_script(labels, command, *words) == 0


def message_of(command, *words):
    """The line that a command ends with, also where readable_errors made it."""
    with pytest.raises(SystemExit) as stop:
        sys.exit(run_script(labels, command, *words))
    return str(stop.value.code)


def score_and_export(*words):
    run("score", *LOOK, "--out", "scores")
    run("export_hard", *LOOK, "--scores", "scores", "--out", "hard", *words)


def pixels_of(path):
    return np.asarray(Image.open(path))


def test_score_ranks_images_and_flags_the_abnormal_category(unlabelled, capsys):
    run("score", *LOOK, "--out", "scores")
    rows = read_rows("scores/scores.jsonl")
    assert len(rows) == 18
    hands = [f"{i}.png" for i in (15, 12, 9, 6, 3, 0)]
    assert [row["file_name"] for row in rows[:6]] == hands
    assert {row["category"] for row in rows if row["abnormal"]} == {"hand"}
    assert rows[0]["max"] == pytest.approx(220 / 255)
    assert rows[0]["mean"] == pytest.approx((240 * 5 + 16 * 220) / 256 / 255)
    output = capsys.readouterr().out
    assert "No category stands out" not in output
    hand = output.splitlines()[1].split()
    # In percent: the mean (240 * 5 + 16 * 160) / 256 / 255 and the maximum 160 / 255.
    assert hand == ["hand", "6", "5.76", "62.75", "abnormal"]


def test_score_says_if_no_category_is_abnormal(unlabelled, monkeypatch, capsys):
    monkeypatch.setattr(labels, "abnormal", lambda means: [])
    run("score", *LOOK, "--out", "scores")
    assert "No category stands out" in capsys.readouterr().out


def test_export_hard_takes_the_worst_images_with_their_maps(unlabelled):
    score_and_export("--threshold", 150 / 255)
    rows = read_rows("hard/meta.jsonl")
    # The maxima are 100, 124, 148, 172, 196 and 220 of 255: the last three are hard.
    assert [row["original"] for row in rows] == ["15.png", "12.png", "9.png"]
    name = rows[0]["file_name"]
    original = pixels_of("new/15.png")
    assert (pixels_of(f"hard/images/{name}") == original).all()
    assert (pixels_of(f"hard/maps/{name}") == original[:, :, 0]).all()
    both = pixels_of(f"hard/overlays/{name}")
    assert (both[:, :SIZE] == original).all()
    # Where the confidence is c, 0.8 c of the overlay is red.
    heat = 0.8 * 220 / 255
    assert both[5, SIZE + 5, 0] == pytest.approx(220 * (1 - heat) + 255 * heat, abs=1)


def test_export_hard_of_chosen_categories_and_at_most_max_images(unlabelled):
    score_and_export("--categories", "dog", "tree", "--threshold", 0, "--max_images", 5)
    categories = [row["category"] for row in read_rows("hard/meta.jsonl")]
    assert len(categories) == 5 and "hand" not in categories
    words = ["export_hard", *LOOK, "--out", "other", "--scores"]
    assert "no image of cat reaches" in message_of(*words, "scores", "--categories", "cat")
    assert "no scores.jsonl" in message_of(*words, "new")
    assert "not an empty folder" in message_of("score", *LOOK, "--out", "new")


def test_the_whole_loop(unlabelled, capsys):
    score_and_export("--threshold", 0)
    rows = read_rows("hard/meta.jsonl")
    painted = rows[0]["file_name"]
    deleted = rows[1]["file_name"]
    untouched = rows[2]["file_name"]
    new_map = np.zeros((SIZE, SIZE), np.uint8)
    new_map[2:5, 7:9] = 255
    Image.fromarray(new_map).convert("RGBA").save(f"hard/maps/{painted}")
    Path(f"hard/images/{deleted}").unlink()
    run("import_labels", "--labels", "hard", "--out", "labeled")
    assert "5 labels, 1 of them edited, 1 images left out" in capsys.readouterr().out
    labeled = read_rows("labeled/meta.jsonl")
    first = dict(file_name=painted, category="hand", split="train", source="human")
    assert labeled[0] == first and len(labeled) == 5
    assert (pixels_of(f"labeled/maps/{painted}") == new_map).all()
    for kind in ("images", "maps"):
        old = Path(f"hard/{kind}/{untouched}").read_bytes()
        assert Path(f"labeled/{kind}/{untouched}").read_bytes() == old

    # The same labels again: refused, and nothing changes.
    before = Path("labeled/meta.jsonl").read_bytes()
    words = ["import_labels", "--labels", "hard", "--out", "labeled"]
    assert "already has a label in labeled" in message_of(*words)
    assert Path("labeled/meta.jsonl").read_bytes() == before

    # The detector labels the other 12, and not the one that was deleted, either.
    run("pseudo", *LOOK, "--exclude", "hard", "--out", "pseudo")
    rest = read_rows("pseudo/meta.jsonl")
    assert {row["original"] for row in rest} == {f"{i}.png" for i in range(18) if i % 3}
    words = ["pseudo", *LOOK, "--exclude", "hard", "pseudo", "--out", "more"]
    assert "every image of new is in hard, pseudo already" in message_of(*words)

    # A second import extends the folder; detector training reads both.
    run("import_labels", "--labels", "pseudo", "--split", "test", "--out", "labeled")
    rows = labels.read_labels(["labeled", "pseudo"], ["new"])
    kinds = [f"{row['source']} {row['split']}" for row in rows]
    assert kinds[:29] == ["human train"] * 5 + ["human test"] * 12 + ["pseudo train"] * 12
    assert kinds[29:] == ["real train"] * 9 + ["real test"] + ["real train"] * 8


def test_abnormal_is_above_one_and_a_half_medians():
    means = dict(text=0.2, dog=0.05, tree=0.04, hand=0.3, sky=0.06)
    assert labels.abnormal(means) == ["hand", "text"]
    assert labels.abnormal({"": 0.3}) == []


def test_maps_and_images_of_other_sizes(unlabelled):
    """The detector sees SIZE x SIZE pixels. A written map has the size of its image."""
    wide = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    Image.fromarray(wide).save("wide.png")
    rows = [dict(file_name="wide.png", image=Path("wide.png"), category="")] * 20
    found = list(labels.diagnose(RedDetector(), rows, CPU))
    assert labels.write_labelled(Path("out"), found[:1], "pseudo") == 1
    name = read_rows("out/meta.jsonl")[0]["file_name"]
    large = F.interpolate(found[19][1][None, None], (24, 40), mode="bilinear")[0, 0]
    assert abs(pixels_of(f"out/maps/{name}") - 255 * large.numpy()).max() <= 0.51
    (image, label, i) = labels.Labelled(labels.read_meta("out"), 8)[0]
    assert image.shape == (3, 8, 8) and label.shape == (1, 8, 8) and i == 0
    squeezed = np.asarray(Image.open("wide.png").resize((8, 8), Image.Resampling.BILINEAR))
    assert (image.permute(1, 2, 0).numpy() == squeezed / np.float32(255)).all()


def write_one_label(map_image, **changes):
    """A labeled folder "bad" with one image of 8 x 8 pixels and this map."""
    for kind in ("images", "maps"):
        Path("bad", kind).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("bad/images/a.png")
    if map_image is not None:
        map_image.save("bad/maps/a.png")
    row = {"file_name": "a.png", "split": "train", "source": "human", **changes}
    Path("bad/meta.jsonl").write_text("\n" + json.dumps(row))


GOOD_MAP = Image.new("L", (8, 8))
BAD_LABELS = [
    (Image.new("RGB", (8, 8), (255, 0, 0)), {}, "a.png has colors"),
    (Image.new("L", (4, 6)), {}, "a.png has 4 x 6 pixels, but its image has 8 x 8"),
    (Image.new("I;16", (8, 8)), {}, "a.png: not a readable image (more than 8 bits"),
    (None, {}, "a.png is missing"),
    (GOOD_MAP, dict(file_name="../a.png"), "meta.jsonl line 2: ../a.png is outside"),
    (GOOD_MAP, dict(file_name=3), "meta.jsonl line 2: {"),
    (GOOD_MAP, dict(source="robot"), "meta.jsonl line 2: {"),
]


@pytest.mark.parametrize("map_image, changes, words", BAD_LABELS)
def test_bad_labels_are_refused_and_nothing_is_written(map_image, changes, words):
    write_one_label(map_image, **changes)
    assert words in message_of("import_labels", "--labels", "bad", "--out", "labeled")
    assert not Path("labeled").exists()


def test_training_refuses_a_map_with_colors():
    write_one_label(Image.new("RGB", (8, 8), (255, 0, 0)))
    data = labels.Labelled(labels.read_meta("bad"), 8)
    with pytest.raises(OSError, match="a.png has colors"):
        data[0]


def test_read_image_refuses_what_it_would_clip():
    for mode in ("I;16", "I", "F"):
        Image.new(mode, (8, 8)).save("deep.tiff")
        with pytest.raises(OSError, match="deep.tiff: .*more than 8 bits per channel"):
            labels.read_image("deep.tiff")
    Path("text.png").write_text("no image")
    with pytest.raises(OSError, match="text.png: not a readable image"):
        labels.read_image("text.png")


def test_it_runs_as_a_script_from_any_folder():
    script = str(ROOT / "data" / "labels.py")
    done = subprocess.run([sys.executable, script, "score", "-h"], capture_output=True, text=True)
    assert done.returncode == 0 and "--detector" in done.stdout, done.stderr
