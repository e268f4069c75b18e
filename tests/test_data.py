"""data/: COCO from a local server that breaks on purpose, image folders, and prompt files."""

import http.server
import io
import json
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from data import coco, hpdv2
from data.coco import Coco
from data.images import ImageFolder, image_batches, image_data, square, to_tensor
from data.labels import read_image, read_unlabelled
from data.prompts import read_prompts
from evaluate import read_batches, read_folder

ROOT = Path(__file__).resolve().parents[1]
SIZES = {9: (64, 48), 25: (40, 60), 30: (32, 32), 34: (70, 33)}
ZIP = "/" + coco.ARCHIVE
FIRST = "/train2017/000000000009.jpg"


def captions_json():
    """The layout of captions_train2017.json, unsorted, with stray blanks and bad file names."""
    images = []
    notes = []
    for i, (width, height) in reversed(SIZES.items()):
        images.append({"id": i, "width": width, "height": height, "file_name": f"../{i}.jpg"})
        for k in reversed(range(5)):
            text = f"caption {k} of\n image  {i}. \n"
            notes.append({"image_id": i, "id": 1000 * i + k, "caption": text})
    return json.dumps({"images": images, "annotations": notes})


def jpeg(size):
    buffer = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.log.append(self.path)
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # The first `cuts[path]` transfers break off in the middle.
        if self.server.cuts.get(self.path, 0) > 0:
            self.server.cuts[self.path] -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    """A small COCO at COCO_BASE: its files, a log of paths, and transfers to cut."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.log = []
        running.cuts = {}
        running.files = {f"/train2017/{i:012d}.jpg": jpeg(size) for i, size in SIZES.items()}
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("../../evil.txt", "x")
            for split in coco.SPLITS:
                archive.writestr(f"annotations/captions_{split}2017.json", captions_json())
        running.files[ZIP] = content.getvalue()
        monkeypatch.setattr(coco, "PAUSE", 0.0)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("COCO_BASE", f"http://127.0.0.1:{running.server_port}/")
        threading.Thread(target=running.serve_forever, args=(0.02,)).start()
        yield running
        running.shutdown()


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_captions_and_items(server, tmp_path):
    cache = tmp_path / "deep/er/cache"
    data = Coco("train", 32, cache)
    assert data.captions == coco.captions("train", cache)
    # These draws come from the first edition. Resumed runs depend on them.
    for seed, numbers in enumerate(["4131", "2312", "4320"]):
        texts = [f"caption {k} of image {i}." for k, i in zip(numbers, SIZES)]
        assert coco.captions("val", cache, seed=seed) == texts
    assert [coco.pick("abcde", 0, i) for i in range(8)] == list("dedaeacd")
    # One download of the archive, no image for captions, and nothing outside the cache.
    assert server.log == [ZIP]
    image = data[0][0]
    assert torch.equal(image, to_tensor(square(Image.open(io.BytesIO(server.files[FIRST])), 32)))
    assert torch.equal(Coco("train", 32, cache)[0][0], image)
    assert server.log == [ZIP, FIRST]
    assert len(files_in(cache)) == len(files_in(tmp_path)) == 3


def test_an_existing_coco_folder_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("network"))
    monkeypatch.setenv("COCO_CACHE", str(tmp_path))
    monkeypatch.setenv("COCO_BASE", "http://example.org/")
    assert coco.places() == (tmp_path, "http://example.org")
    for folder in ("annotations", "train2017"):
        (tmp_path / folder).mkdir()
    (tmp_path / "annotations/captions_train2017.json").write_text(captions_json())
    (tmp_path / FIRST[1:]).write_bytes(jpeg(SIZES[9]))
    assert image_data(None, 16)[0][0].shape == (3, 16, 16)
    assert len(read_prompts(None)) == 4


@pytest.mark.parametrize("path", [ZIP, FIRST])
def test_a_broken_transfer_is_tried_three_times(server, tmp_path, path):
    server.cuts[path] = 2
    assert Coco("train", 32, tmp_path / "a")[0][0].shape == (3, 32, 32)
    server.cuts[path] = 3
    with pytest.raises(OSError, match=f"http://127.*{path}: .*gave up after 3 tries"):
        Coco("train", 32, tmp_path / "b")[0]
    assert server.log.count(path) == 6
    assert not [name for name in files_in(tmp_path / "b") if not name.endswith(".json")]


def test_damaged_files(server, tmp_path):
    data = Coco("train", 32, tmp_path)
    image = data[0][0]
    path = tmp_path / FIRST[1:]
    # A damaged image in the cache is downloaded again.
    for damaged in (b"", path.read_bytes()[:300], jpeg((32, 32))):
        path.write_bytes(damaged)
        assert torch.equal(data[0][0], image)
        assert path.read_bytes() == server.files[FIRST]
    # Damaged content from the server never enters the cache.
    path.unlink()
    for content, reason in ((None, "404"), (b"<html>", "readable"), (jpeg((8, 8)), "annotation")):
        server.files[FIRST] = content
        with pytest.raises(OSError, match=f"http://127.*{FIRST}: .*{reason}"):
            data[0]
        assert not path.exists()
    (tmp_path / "annotations/captions_train2017.json").write_text("{")
    with pytest.raises(OSError, match="captions_train2017.json: not COCO captions; delete it"):
        Coco("train", 32, tmp_path)


def test_the_command(server, tmp_path):
    def run(images, resolution=32):
        size = f"--images {images} --resolution {resolution}".split()
        coco.main(coco.parse_args([*size, "--out", "out", "--cache", "cache"]))

    with pytest.raises(SystemExit, match="--images 5: choose 1 to 4"):
        run(5)
    server.cuts["/train2017/000000000030.jpg"] = 3
    with pytest.raises(OSError, match="000000000030.jpg"):
        run(4)
    assert not (tmp_path / "out/metadata.jsonl").exists()
    # A killed run may leave a temporary file. The same command again goes on.
    (tmp_path / "out/.000000000030.png.0f0f.tmp").write_bytes(b"half")
    run(4)
    assert server.log.count(FIRST) == 1
    assert files_in(tmp_path / "out") == [*(f"{i:012d}.png" for i in SIZES), "metadata.jsonl"]
    for made, item in zip(ImageFolder(tmp_path / "out", 32), Coco("train", 32, tmp_path / "cache")):
        assert torch.equal(made[0], item[0]) and made[1] == item[1]
    with pytest.raises(OSError, match="000000000030.png is not a file that this command writes"):
        run(2)
    with pytest.raises(OSError, match="its images have 32 pixels"):
        run(4, resolution=64)
    # On the command line, a mistake is one line.
    arguments = [sys.executable, ROOT / "data/coco.py", "--images", "2", "--out", __file__]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and re.fullmatch(".*File exists.*\n", result.stderr)


def test_hpdv2_prompts_are_written_once_each_and_on_one_line(tmp_path, monkeypatch):
    rows = [dict(prompt=prompt, rank=[1, 0]) for prompt in ("a fox", "two\nlines", "a fox")]
    (tmp_path / "test.json").write_text(json.dumps(rows))

    def fake_hub(repo, filename, repo_type):
        assert (repo, repo_type) == ("ymhao/HPDv2", "dataset")
        return tmp_path / filename

    monkeypatch.setattr(hpdv2, "hf_hub_download", fake_hub)
    hpdv2.main(tmp_path / "prompts.txt")
    assert read_prompts(tmp_path / "prompts.txt") == ["a fox", "two lines"]


def test_hpdv2_without_the_hub_is_one_line(tmp_path, monkeypatch):
    fake_hub = Mock(side_effect=LocalEntryNotFoundError("check your connection"))
    monkeypatch.setattr(hpdv2, "hf_hub_download", fake_hub)
    with pytest.raises(SystemExit, match="ymhao/HPDv2 cannot be downloaded. check your connection"):
        hpdv2.main(tmp_path / "prompts.txt")


def test_image_folder_and_batches(tmp_path):
    rows = [{"file_name": f"{i}.png", "text": f"text {i}"} for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(2):
        Image.effect_noise((30, 20), 50).save(tmp_path / f"{i}.png")
    data = image_data(tmp_path, 20)
    crop = Image.open(tmp_path / "0.png").convert("RGB").crop((5, 0, 25, 20))
    values = torch.tensor(list(crop.tobytes())).view(20, 20, 3)
    assert torch.equal(data[0][0], values.permute(2, 0, 1) / 255)
    for workers in (0, 2):
        (images, texts), (_, last) = image_batches(data, iter([[1, 0], [1]]), workers)
        assert torch.equal(images, torch.stack([data[1][0], data[0][0]]))
        assert list(texts) == ["text 1", "text 0"] and list(last) == ["text 1"]
    # PIL would turn a 16-bit gray image white.
    Image.new("I;16", (30, 20), 30000).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"damaged")
    for i, message in enumerate(["0.png: not a readable image .more than 8", "1.png: not a"]):
        with pytest.raises(OSError, match=message):
            data[i]
    # EXIF orientation 3 means rotated by 180 degrees.
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.linear_gradient("L").save(tmp_path / "0.png", exif=exif)
    assert data[0][0][:, 0].min() > 0.9 and data[0][0][:, -1].max() < 0.1
    # The labeling loop and evaluate.py see the same image.
    ((images, _),) = read_batches(tmp_path, [dict(file_name="0.png")], 1)
    for image in (images[0], read_image(tmp_path / "0.png")):
        assert image[:, 0].min() > 0.9 and image[:, -1].max() < 0.1


def test_a_byte_order_mark_is_dropped(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    text = '\ufeff{"file_name": "0.png", "text": "x", "category": "dog"}\n'
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert ImageFolder(tmp_path, 16).captions == ["x"]
    assert read_unlabelled(tmp_path)[0]["category"] == "dog"
    assert read_folder(tmp_path)[0]["text"] == "x"


def test_bad_metadata(tmp_path):
    path = tmp_path / "metadata.jsonl"
    for content, message in (
        (b"", ": it lists no images"),
        (b"\xff\xfe", ": not UTF-8 text"),
        (b'\n{"file_name": "0.png"}', ' line 2: {"file_name": "...", "text": "..."} is expected'),
        (b'{"file_name": "0.png", "text": 3}', " line 1: the text is not a string"),
        (b'{"file_name": "0.png", "text": "x"}', " line 1: 0.png is missing"),
        (b'{"file_name": "a/../../0.png", "text": "x"}', " line 1: a/../../0.png is outside"),
        (b'{"file_name": "/etc/hostname", "text": "x"}', " line 1: /etc/hostname is outside"),
    ):
        path.write_bytes(content)
        with pytest.raises(OSError, match=re.escape(f"{path}{message}")):
            ImageFolder(tmp_path, 16)


def test_read_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff a dog \r\n\n\tein Bär\n".encode())
    assert read_prompts(path) == ["a dog", "ein Bär"]
    for content, message in ((b" \n", "no prompt"), (b"a\0b", "NUL"), (b"\xff\xfe", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=f"prompts file {path}: .*{message}"):
            read_prompts(path)
    with pytest.raises(SystemExit, match="none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("name", ["dfusion_templates.json", "dfusion_toy.json"])
def test_dfusions_prompt_lists_are_complete(name):
    """Each list has 40 training prompts with items and thresholds, and 40 test prompts besides."""
    lists = json.loads((ROOT / "data" / name).read_text())
    for template in lists.values():
        train = [row["prompt"] for row in template["train"]]
        num_prompts = 80 if template is lists.get("both") else 40
        assert len(set(train)) == len(set(template["test"])) == num_prompts
        assert not set(train) & set(template["test"])
        for row in template["train"]:
            assert len(row["items"]) == len(row["thresholds"]) >= 1
            assert all(item in row["prompt"] for item in row["items"])
            assert all(0 < threshold < 0.2 for threshold in row["thresholds"])
