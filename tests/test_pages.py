"""index.html of a run, and evaluate.py --html: complete, self-contained, escaped, repeatable."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import evaluate
import pytest
import torch
from conftest import PROMPTS, SCRIPTS_THAT_TRAIN, run_script, training_commands
from PIL import Image, ImageChops

import refl
from pages import make
from run_folder import save_grid, to_pil

NASTY = """<script>alert("1 & 2")</script> 'quoted' \N{CAT}"""
VOID = ("meta", "img", "input")


class Page(HTMLParser):
    """An HTML text -> .elements, each with tag, attrs, text and parents. Tags must match."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.elements = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = SimpleNamespace(tag=tag, attrs=dict(attrs), text="", parents=list(self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def find(self, tag, name=None, inside=None):
        """The elements of this tag, with this class, inside this element."""
        found = []
        for element in self.elements:
            classes = element.attrs.get("class", "").split()
            if element.tag == tag and name in (None, *classes):
                if inside is None or any(parent is inside for parent in element.parents):
                    found.append(element)
        return found


def read_page(path):
    text = Path(path).read_text(encoding="utf-8")
    page = Page(text)
    # Nothing is loaded from elsewhere.
    for element in page.elements:
        for attribute in ("src", "href"):
            assert element.attrs.get(attribute, "data:").startswith("data:")
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert len(page.find("script")) == 1
    return page


def to_image(img):
    """The picture in an <img>."""
    _, _, data = img.attrs["src"].partition(";base64,")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def num_points(polyline):
    return len(polyline.attrs["points"].split())


UPDATES = ["update 0", "update 2", "update 4"]
SAMPLES = ("Samples", UPDATES, PROMPTS[:1], ["", ""])
WITH_ARTIFACTS = ["before", "its artifacts", "now", "its artifacts"]
WITH_REGION = ["I0: base model", "M: region", "I: now", "3 |I - I0|"]
# What each page shows: heading, slides, captions in a slide, labels of a figure's images.
SECTIONS = {
    "refl": [SAMPLES],
    "imagerefl": [SAMPLES],
    "treat": [("Samples", UPDATES, PROMPTS[:1] * 2, WITH_ARTIFACTS)],
    "detector": [
        ("Samples", UPDATES[1:], ["test image 1", "test image 2"], ["image", "label", "detector"])
    ],
    "focus_n_fix": [SAMPLES, ("Regions", UPDATES, PROMPTS[:1], WITH_REGION)],
    "dfusion_dpo": [
        SAMPLES,
        (
            "Training pairs",
            ["round 0", "round 1"],
            PROMPTS[1:2],
            ["base", "reference", "mask", "target"],
        ),
    ],
}


@pytest.mark.parametrize("name", SCRIPTS_THAT_TRAIN)
def test_every_script_shows_all_its_pictures_and_its_log(world, name):
    module, words = training_commands(world)[name]
    if name == "dfusion_dpo":
        words = [*words, "--inner_epochs", 2]
    assert run_script(module, *words, "--out", "run") == 0
    page = read_page("run/index.html")

    viewers = page.find("div", "viewer")
    headings = [h2.text for h2 in page.find("h2")][2:]
    assert headings == [heading for heading, *_ in SECTIONS[name]]
    for viewer, (_, names, captions, labels) in zip(viewers, SECTIONS[name], strict=True):
        slides = page.find("div", "slide", inside=viewer)
        assert [slide.attrs["data-name"] for slide in slides] == names
        # Without JavaScript, the last slide is shown, beside the first if the figures have no
        # labels.
        hidden = ["hidden" in slide.attrs for slide in slides]
        assert not hidden[-1] and hidden[0] == any(labels)
        for slide in slides:
            texts = [caption.text for caption in page.find("figcaption", inside=slide)]
            assert texts == captions
            for figure in page.find("figure", inside=slide):
                assert len(page.find("img", inside=figure)) == len(labels)
                texts = [small.text for small in page.find("small", inside=figure)]
                assert texts == [label for label in labels if label]

    # A curve for every number of the log, with a point for every update that has it.
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    before = json.loads(Path("run/config.json").read_text()).get("before", {})
    counts = {}
    for row in [before, *rows]:
        for field, value in row.items():
            if field not in ("step", "seconds") and isinstance(value, (int, float)):
                counts[field] = counts.get(field, 0) + 1
    drawn = {}
    for figure in page.find("svg"):
        quantity, _, _ = figure.attrs["aria-label"].partition(":")
        for polyline in page.find("polyline", inside=figure):
            prefix = "test_" if polyline.attrs["class"] == "held-out" else ""
            drawn[prefix + quantity] = num_points(polyline)
    assert drawn == counts
    if name != "detector":
        assert counts["test_reward"] == 3


def test_pictures_prompts_and_settings_of_a_run(world):
    """The pixels, captions and settings are the run's, whatever characters the prompts have."""
    Path("odd.txt").write_text(f"a red circle\n{NASTY}\n", encoding="utf-8")
    _, words = training_commands(world)["refl"]
    words = [*words, "--test_prompts", "odd.txt", "--loss", "linear", "--train_steps", 2]
    assert run_script(refl, *words, "--out", "run") == 0
    page = read_page("run/index.html")
    captions = [caption.text for caption in page.find("figcaption")]
    assert captions == ["a red circle", NASTY] * 2
    images = page.find("img")
    assert len(images) == 2 * 2 * 2 and NASTY in images[-1].attrs["alt"]

    # The images of the page are the cells of the picture, pixel by pixel.
    with Image.open("run/samples/step_000002.png") as picture:
        assert picture.size == (4 * 128, 128)
        for k, img in enumerate(images[4:]):
            cell = picture.crop((128 * k, 0, 128 * k + 128, 128))
            assert ImageChops.difference(to_image(img), cell).getbbox() is None

    # The settings stand beside the paper's, which are bold where they differ.
    rows = {}
    for row in page.find("tr")[1:]:
        cells = page.find("td", inside=row)
        name = page.find("th", inside=row)[0].text
        rows[name] = (cells[0].text, cells[1].text, "class" in cells[0].attrs)
    assert rows["lr"] == ("0.001", "0.0003", True)
    assert rows["model"] == (world.sd, "", False)
    assert rows["reward_scale"] == ("0.001", "0.001", False)


def test_the_page_is_made_again_with_the_same_bytes(world):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "run") == 0
    page = Path("run/index.html")
    first = page.read_bytes()
    page.unlink()
    make.read_picture.cache_clear()
    assert run_script(module, *words, "--out", "run", "--resume") == 0
    assert page.read_bytes() == first


def test_a_picture_that_cannot_be_read_does_not_stop_the_run(world, capsys):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--train_steps", 2, "--out", "run") == 0
    picture = Path("run/samples/step_000000.png")
    picture.write_bytes(picture.read_bytes()[:-200])
    page = Path("run/index.html").read_bytes()
    assert run_script(module, *words, "--out", "run", "--resume") == 0
    assert torch.load("run/checkpoint/state.pt", weights_only=True)["step"] == 4
    assert "index.html is not up to date" in capsys.readouterr().err
    assert Path("run/index.html").read_bytes() == page


def test_skipped_updates_and_numbers_without_a_point():
    rows = []
    for step in range(1, 101):
        rows.append(dict(step=step, reward=step / 7, grad_norm=1.0, by_t={"1": 2.0}))
    rows[41].update(grad_norm=float("nan"), skipped=True)
    page = Page(make.curves(rows, {"test_reward": 3.0}))
    assert [h3.text.strip() for h3 in page.find("h3")] == ["reward held-out training", "grad_norm"]
    assert [num_points(line) for line in page.find("polyline")] == [1, 100, 99]
    assert len(page.find("path", "skipped")) == 2
    assert "Skipped updates: 42" in page.find("p")[0].text

    # The first and the last point are at the ends of the axis, and larger values are higher.
    points = page.find("polyline")[1].attrs["points"].split()
    points = [tuple(map(float, point.split(","))) for point in points]
    assert points == sorted(points, key=lambda point: (point[0], -point[1]))
    texts = [text.text for text in page.find("text", "x")]
    assert texts[:4] == ["0", "50", "100", "update"]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 12, [0, 5, 10]),
        (14.2, 15.9, [14.5, 15, 15.5]),
        (-1e-3, -7e-4, [-1e-3, -9e-4, -8e-4, -7e-4]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert make.ticks(low, high) == pytest.approx(expected)


def test_large_images_are_scaled_down_and_many_snapshots_thinned_out(monkeypatch):
    _, width, height = make.data_uri(Image.new("RGB", (1024, 512)))
    assert (width, height) == (192, 96)
    assert make.some_of([*range(5)], 5) == [0, 1, 2, 3, 4]
    assert make.some_of([*range(101)], 5) == [0, 25, 50, 75, 100]
    Path("samples").mkdir()
    for step in range(7):
        image = torch.full((1, 3, 4, 4), step / 10)
        save_grid(image, Path("samples") / f"step_{step:06d}.png", 8, ["a gray square"])
    # A picture that has no captions is not for the page.
    save_grid(image, Path("samples/other.png"), 8)
    monkeypatch.setattr(make, "MAX_SLIDES", 4)
    page = Page(make.all_pictures(Path("samples")))
    names = [slide.attrs["data-name"] for slide in page.find("div", "slide")]
    assert names == ["update 0", "update 2", "update 4", "update 6"]
    assert "4 of 7 are shown" in page.find("p")[0].text


# --------------------------------------------------------------------------------------------------
# evaluate.py --html


def write_folder(folder, prompts, num_images, brightness):
    """A folder of gray 64 x 64 images."""
    folder = Path(folder)
    folder.mkdir()
    lines = []
    for i, prompt in enumerate(prompts):
        for k in range(num_images):
            name = f"{i}-{k}.png"
            to_pil(torch.full((3, 64, 64), brightness + 0.1 * i + 0.01 * k)).save(folder / name)
            row = dict(file_name=name, text=prompt, prompt_id=i, seed=k)
            lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def test_a_comparison_shows_the_tables_and_the_same_prompt_side_by_side(capsys):
    prompts = ["a red star", NASTY, "a blue square"]
    write_folder("<b>", prompts, 2, 0.2)
    write_folder("tuned", prompts[:2], 6, 0.6)
    words = ["--metrics", "toy_pref,artifact_mean", "--html", "page.html", "--device", "cpu"]
    assert run_script(evaluate, "<b>", "tuned", *words, "--out", "out.json") == 0
    printed = capsys.readouterr().out
    page = read_page("page.html")

    # The table has the numbers that are printed.
    (table,) = page.find("table")
    cells = [cell.text for cell in page.find("td", inside=table)]
    assert cells[:2] == ["6", "3"] and len(cells) == 2 * 4
    assert all(cell in printed for cell in cells)
    assert any("no paired differences" in note.text for note in page.find("p"))

    # A slide for each prompt has a figure for each folder, with its first four images.
    slides = page.find("div", "slide")
    assert [page.find("h3", inside=slide)[0].text for slide in slides] == prompts
    assert ["hidden" in slide.attrs for slide in slides] == [False, True, True]
    for i, slide in enumerate(slides):
        figures = page.find("figure", inside=slide)
        assert [page.find("figcaption", inside=f)[0].text for f in figures] == ["<b>", "tuned"]
        counts = [len(page.find("img", inside=figure)) for figure in figures]
        assert counts == [2, 4 if i < 2 else 0]
    pixel = to_image(page.find("img", inside=page.find("figure")[1])[3]).getpixel((0, 0))
    assert pixel == (round(255 * 0.63),) * 3


def test_only_an_interval_beyond_all_others_wins():
    def summary(low, high):
        return dict(mean=(low + high) / 2, low=low, high=high)

    summaries = {
        "a": dict(hps=summary(1, 2), clip=summary(1, 3), artifact_max=summary(1, 2)),
        "b": dict(hps=summary(3, 4), clip=summary(2, 4), artifact_max=summary(3, 4)),
        "c": dict(hps=summary(0, 2), clip=summary(0, 1), artifact_max=summary(5, 6)),
    }
    assert evaluate.clear_winners(summaries) == [(1, 3), (0, 5)]
    for own in summaries.values():
        own["fid"] = dict(mean=1.0, low=None, high=None)
    assert evaluate.clear_winners(summaries) == [(1, 3), (0, 5)]
    assert evaluate.clear_winners({"a": summaries["a"]}) == []
