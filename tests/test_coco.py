"""COCO as data, from a server on localhost that holds a tiny COCO in the real layout, and is broken on purpose."""
import collections
import contextlib
import http.server
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from prompts import coco

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"train": [(9, 64, 48), (25, 40, 60), (30, 32, 32), (34, 70, 33), (36, 50, 41), (42, 48, 48)], "val": [(139, 44, 36), (285, 36, 52)]}
ZIP = "/" + coco.ARCHIVE


def jpeg(image_id, w, h):
    """Two halves of different colour and some noise: a centre crop and a shift are visible in it."""
    image = Image.effect_noise((w, h), 40).convert("RGB")
    image.paste((image_id * 5 % 256, 30, 200), (0, 0, w // 2, h))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def captions_json(split):
    """The layout of captions_*2017.json: images and annotations in no order, five captions an image, some with blanks at the end."""
    images = [{"license": 3, "file_name": f"../../{i}.jpg", "coco_url": f"http://elsewhere/{i}.jpg", "height": h, "width": w, "id": i}
              for i, w, h in SIZES[split]]
    notes = [{"image_id": i, "id": 1000 * i + k, "caption": f"caption {k} of\n image {i}. \n"} for i, _, _ in SIZES[split] for k in range(5)]
    random.Random(0).shuffle(images)
    random.Random(1).shuffle(notes)
    return json.dumps({"info": {}, "licenses": [{"url": "", "id": 3, "name": ""}], "images": images, "annotations": notes})


def archive(extra=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in extra:
            z.writestr(name, data)
        z.writestr("annotations/instances_train2017.json", random.Random(2).randbytes(150_000))
        for split in SIZES:
            z.writestr(f"annotations/captions_{split}2017.json", captions_json(split))
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        s, start = self.server, int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        with s.lock:
            s.log.append((self.path, start))
            cut = s.cut.get(self.path) and s.cut[self.path].popleft()
        body = s.files.get(self.path)
        if body is None:
            return self.send_error(404)
        if not s.ranges:
            start = 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        part = body[start:] if cut is None else body[start:start + cut]
        for i in range(0, len(part), 20_000):
            self.wfile.write(part[i:i + 20_000])
            self.wfile.flush()
            if i >= s.stall.get(self.path, len(body)):                    # hold the transfer open until the test lets go
                s.stalled.set()
                s.go.wait(20)


@contextlib.contextmanager
def serving(files, address=("127.0.0.1", 0)):
    """files: {path: bytes}; .cut {path: deque of byte counts, one a request, None: whole}; .ranges; .stall {path: bytes}; .log of (path, start)."""
    server = http.server.ThreadingHTTPServer(address, Handler)
    server.daemon_threads, server.files, server.cut, server.ranges, server.log, server.lock = True, files, {}, True, [], threading.Lock()
    server.stall, server.stalled, server.go = {}, threading.Event(), threading.Event()
    server.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .02})
    thread.start()
    try:
        yield server
    finally:
        server.go.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def tiny():
    return {ZIP: archive(), **{f"/{split}2017/{i:012d}.jpg": jpeg(i, w, h) for split in SIZES for i, w, h in SIZES[split]}}


@pytest.fixture
def server(tiny, monkeypatch):
    monkeypatch.setattr(coco, "PAUSE", 0.)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(dict(tiny)) as s:
        yield s


def load(server, cache, split="train", resolution=32, **kw):
    return coco.Coco(split, resolution, cache=cache, base=server.base, **kw)


def asked(server, path):
    return [start for p, start in server.log if p == path]


def no_temporary(folder):
    return not [p for p in Path(folder).rglob("*") if p.name.endswith((".tmp", ".part"))]


def image_path(i, split="train"):
    return f"/{split}2017/{i:012d}.jpg"


def command(*args, **env):
    """The command as a user runs it -> CompletedProcess."""
    return subprocess.run([sys.executable, str(ROOT / "prompts/coco.py"), *map(str, args)], capture_output=True, text=True, cwd="/",
                          env={**os.environ, "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1", **env})


def run(capsys, *args):
    """The command in this process -> (exit status, stderr's error lines): what `python prompts/coco.py` does, without starting torch again."""
    try:
        coco.main(coco.parse_args([str(a) for a in args]))
        status = 0
    except OSError as e:
        with pytest.raises(SystemExit) as stop:
            coco.die(e)
        status = stop.value.code
    except SystemExit as e:
        status = e.code
    return status, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------------------------------------------------------- items and captions


def test_items(server, tmp_path):
    """Order by image id, tensors in [0, 1], the resized centre crop of the served picture, one of the image's own captions."""
    data = load(server, tmp_path)
    assert len(data) == 6 and [x[:3] for x in data.items] == SIZES["train"]
    for k, (i, w, h) in enumerate(SIZES["train"]):
        image, text = data[k]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
        assert text in [f"caption {j} of image {i}." for j in range(5)]
        picture, side = Image.open(io.BytesIO(server.files[image_path(i)])).convert("RGB"), min(w, h)
        left, top = (w - side) / 2, (h - side) / 2
        crop = picture.resize((32, 32), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        expected = torch.tensor(list(crop.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
        assert (image - expected).abs().max() <= 1 / 255
    assert (data[2][0] * 255).byte().permute(1, 2, 0).numpy().tobytes() == Image.open(io.BytesIO(server.files[image_path(30)])).tobytes()


def test_fetched_once_and_only_what_is_asked(server, tmp_path):
    data = load(server, tmp_path)
    first = data[1]
    again, other = load(server, tmp_path)[1], load(server, tmp_path, resolution=16)[1]
    assert torch.equal(first[0], again[0]) and first[1] == again[1] and other[0].shape == (3, 16, 16)
    assert server.log == [(ZIP, 0), (image_path(25), 0)]
    assert (tmp_path / image_path(25)[1:]).read_bytes() == server.files[image_path(25)]
    assert no_temporary(tmp_path)


def test_a_write_that_breaks_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def full_disk(path, data):
        with open(path, "wb") as f:
            f.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        coco.write(tmp_path / "file", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_someone_elses_coco_folder_needs_no_network(tiny, tmp_path, monkeypatch):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2017.json").write_text(captions_json("val"))
    (tmp_path / "val2017").mkdir()
    (tmp_path / image_path(139, "val")[1:]).write_bytes(tiny[image_path(139, "val")])
    monkeypatch.setattr(coco.urllib.request, "urlopen", lambda *a, **k: pytest.fail("the network was asked"))
    assert coco.Coco("val", 16, cache=tmp_path)[0][0].shape == (3, 16, 16)


def test_captions_are_drawn_from_seed_and_image(server, tmp_path):
    data = load(server, tmp_path)
    assert [data.items[i][3] for i in range(6)] == coco.captions("train", tmp_path, server.base) == coco.captions("train", tmp_path, server.base)
    assert len(coco.captions("val", tmp_path, server.base)) == 2
    seeds = {tuple(coco.captions("train", tmp_path, server.base, seed)) for seed in range(5)}
    assert len(seeds) == 5                                                # 5^6 lists: two alike by chance would be one in 1500
    counts = collections.Counter(coco.pick("abcde", 0, i) for i in range(5000))
    assert all(900 < counts[c] < 1100 for c in "abcde")                   # 1000 each, sigma 28
    assert coco.pick("abcde", 0, 9) == "e" and coco.pick("abcde", 1, 25) == "d"     # never to change: runs are resumed on it
    assert not [path for path, _ in server.log if path != ZIP]            # captions fetch no image


def test_cache_and_base_from_the_environment_and_printed(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COCO_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("COCO_BASE", server.base + "/")
    assert len(coco.captions("val")) == 2
    out = capsys.readouterr().out
    assert str(tmp_path / "here") in out and f"{server.base}{ZIP}" in out and "241 MB" in out
    monkeypatch.delenv("COCO_CACHE")
    monkeypatch.delenv("COCO_BASE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert coco.places() == (tmp_path / "xdg/coco2017", "http://images.cocodataset.org")


def test_loader_workers(server, tmp_path):
    """Two workers, each image asked for twice in one pass: the same items as without workers, no half file."""
    data = load(server, tmp_path / "a")
    plain = [load(server, tmp_path / "b")[i] for i in range(6)]
    order = [[0, 1, 2], [0, 1, 2], [3, 4, 5], [5, 4, 3]]
    batches = list(DataLoader(data, batch_sampler=order, num_workers=2))
    for ids, (images, texts) in zip(order, batches, strict=True):
        assert torch.equal(images, torch.stack([plain[i][0] for i in ids])) and list(texts) == [plain[i][1] for i in ids]
    assert no_temporary(tmp_path) and len(list((tmp_path / "a/train2017").iterdir())) == 6


def test_loader_error_names_the_address(server, tmp_path):
    data = load(server, tmp_path)
    del server.files[image_path(30)]
    loader = iter(DataLoader(data, batch_size=3, num_workers=2))
    with pytest.raises(OSError) as e:
        list(loader)
    loader._shutdown_workers()                                            # left to the garbage collector, torch waits 5 s a worker
    assert str(e.value).rpartition("OSError: ")[2].strip() == f"{server.base}{image_path(30)}: HTTP 404 Not Found; gave up after 3 tries"


# ---------------------------------------------------------------------------------------------------------------- a broken server


def test_missing_image(server, tmp_path):
    data = load(server, tmp_path)
    del server.files[image_path(9)]
    with pytest.raises(OSError, match=f"{server.base}{image_path(9)}: HTTP 404 Not Found; gave up after 3 tries"):
        data[0]
    assert asked(server, image_path(9)) == [0, 0, 0] and not (tmp_path / image_path(9)[1:]).exists()
    assert data[1][0].shape == (3, 32, 32)


@pytest.mark.parametrize("ranges", (True, False))
def test_cut_transfers_go_on_where_they_stopped(server, tmp_path, ranges):
    """Image: cut twice. Archive: cut twice. The third request brings the rest; without ranges on the server, everything anew."""
    server.ranges = ranges
    server.cut = {ZIP: collections.deque([70_000, None if not ranges else 30_000, None]), image_path(9): collections.deque([100, 200, None])}
    data = load(server, tmp_path)
    data[0]
    assert asked(server, image_path(9)) == ([0, 100, 300] if ranges else [0, 100, 200])
    assert asked(server, ZIP) == ([0, 70_000, 100_000] if ranges else [0, 70_000])
    assert (tmp_path / image_path(9)[1:]).read_bytes() == server.files[image_path(9)]
    assert no_temporary(tmp_path)


def test_cut_every_time(server, tmp_path):
    size = len(server.files[image_path(9)])
    data = load(server, tmp_path)
    server.cut = {image_path(9): collections.deque([10, 10, 10])}
    with pytest.raises(OSError, match=f"000000000009.jpg: the transfer broke at 30 of {size:,} bytes; gave up"):
        data[0]
    assert not (tmp_path / image_path(9)[1:]).exists()


@pytest.mark.parametrize("bad, reason", [
    ("size", "32 x 32 pixels where the annotation says 64 x 48"), ("garbage", "not a readable image"), ("cut", "not a readable image"),
    ("empty", "not a readable image"), ("html", "not a readable image")])
def test_wrong_bytes(server, tmp_path, bad, reason):
    """Whole transfers with something wrong in them: three tries from zero, nothing cached."""
    good = server.files[image_path(9)]
    data = load(server, tmp_path)
    server.files[image_path(9)] = {"size": server.files[image_path(30)], "garbage": random.Random(3).randbytes(999), "cut": good[:len(good) // 2],
                                   "empty": b"", "html": b"<html>hotel wifi</html>"}[bad]
    with pytest.raises(OSError, match=reason):
        data[0]
    assert asked(server, image_path(9)) == [0, 0, 0] and not (tmp_path / "train2017").exists()
    server.files[image_path(9)] = good
    assert data[0][0].shape == (3, 32, 32)


def test_broken_cache_file_is_fetched_again(server, tmp_path):
    data = load(server, tmp_path)
    whole, path = data[0][0], tmp_path / image_path(9)[1:]
    for broken in (b"", b"garbage", path.read_bytes()[:300], server.files[image_path(30)]):
        path.write_bytes(broken)
        assert torch.equal(data[0][0], whole) and path.read_bytes() == server.files[image_path(9)]


def test_server_down(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "PAUSE", 0.)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))                                          # bound and not listening: refused
        base = f"http://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(OSError, match=f"{base}{ZIP}: .*refused; gave up after 3 tries"):
            coco.Coco("train", 32, tmp_path, base)
    assert not list((tmp_path / "annotations").glob("*.json"))


@pytest.mark.parametrize("bad", ("truncated", "garbage", "no captions", "captions not json", "captions of something else", "crc"))
def test_broken_archive(server, tmp_path, bad):
    """Never a captions file out of it, and the next run starts from zero."""
    good = server.files[ZIP]

    def packed(text):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as z:
            for split in SIZES if text else ():
                z.writestr(f"annotations/captions_{split}2017.json", text)
        return buffer.getvalue()

    stored = packed(captions_json("train"))
    server.files[ZIP] = {"truncated": good[:-5000], "garbage": random.Random(4).randbytes(9000), "no captions": packed(""),
                         "captions not json": packed("{"),
                         "captions of something else": packed('{"images": [{"id": 1}], "annotations": []}'),
                         "crc": stored.replace(b"caption 3", b"caption 8", 1)}[bad]
    with pytest.raises(OSError, match=f"{server.base}{ZIP}: not COCO"):
        load(server, tmp_path)
    assert not list((tmp_path / "annotations").glob("*.json")) and asked(server, ZIP) == [0, 0, 0]
    server.files[ZIP] = good
    assert len(load(server, tmp_path)) == 6 and asked(server, ZIP)[3:] == [0]


def test_archive_with_paths_outside(server, tmp_path, monkeypatch):
    """Entries that would land outside of the folder, absolute or with dots, are never written; file_name in the captions is no path either."""
    server.files[ZIP] = archive([("../../evil.txt", "x"), ("annotations/../../evil.txt", "x"), (str(tmp_path / "evil.txt"), "x")])
    cache = tmp_path / "deep/er/cache"
    monkeypatch.chdir(tmp_path)
    load(server, cache)[0]
    files = sorted(os.path.relpath(p, cache) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [".lock", "annotations/captions_train2017.json", "annotations/captions_val2017.json", "train2017/000000000009.jpg"]


def test_part_of_another_size_is_dropped(server, tmp_path):
    """A leftover part as long as the archive or longer, with other bytes: the server answers 416, the check fails, everything is fetched anew."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / (coco.ARCHIVE + ".part")).write_bytes(bytes(len(server.files[ZIP]) + 10))
    assert len(load(server, tmp_path)) == 6 and asked(server, ZIP) == [len(server.files[ZIP]) + 10, 0] and no_temporary(tmp_path)


def test_broken_annotations_in_the_cache_are_named(server, tmp_path):
    load(server, tmp_path)
    path = tmp_path / "annotations/captions_val2017.json"
    path.write_text("{")
    with pytest.raises(OSError, match=f"{path}: not COCO captions .*delete it"):
        coco.captions("val", tmp_path, server.base)


def test_two_at_once_fetch_the_archive_once(server, tmp_path):
    server.stall = {ZIP: 100_000}
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(load(server, tmp_path)))) for _ in range(2)]
    for t in threads:
        t.start()
    assert server.stalled.wait(20)
    server.go.set()
    for t in threads:
        t.join()
    assert found == [6, 6] and asked(server, ZIP) == [0]


# ---------------------------------------------------------------------------------------------------------------- the command


def test_command(server, tmp_path, capsys):
    """The imagefolder holds what Coco gives, pixel for pixel; the same command again asks for nothing; a larger one extends it."""
    out, options = tmp_path / "out", ("--resolution", 32, "--base", server.base, "--cache", tmp_path / "cache")
    assert run(capsys, "--images", 4, "--out", out, *options) == (0, [])
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.png")}
    asked_for = len(server.log)
    assert run(capsys, "--images", 4, "--out", out, *options) == (0, []) and len(server.log) == asked_for
    assert run(capsys, "--images", 6, "--out", out, *options) == (0, [])
    assert {n: (out / n).stat().st_mtime_ns for n in before} == before
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    data = load(server, tmp_path / "cache")
    assert sorted(p.name for p in out.iterdir()) == [*(f"{i:012d}.png" for i, _, _ in SIZES["train"]), "metadata.jsonl"]
    for k, row in enumerate(rows):
        image, text = data[k]
        assert row == {"file_name": f"{SIZES['train'][k][0]:012d}.png", "text": text}
        assert torch.equal(coco.to_tensor(Image.open(out / row["file_name"])), image)
    assert len(rows) == 6


def test_command_stops_and_goes_on(server, tmp_path, capsys):
    out, options = tmp_path / "out", ("--resolution", 32, "--base", server.base, "--cache", tmp_path / "cache")
    gone = server.files.pop(image_path(36))
    status, errors = run(capsys, "--images", 6, "--out", out, *options)
    assert status == 2 and errors == [f"error: {server.base}{image_path(36)}: HTTP 404 Not Found; gave up after 3 tries"]
    assert not (out / "metadata.jsonl").exists() and no_temporary(tmp_path)
    server.files[image_path(36)] = gone
    assert run(capsys, "--images", 6, "--out", out, *options) == (0, []) and (out / "metadata.jsonl").exists()
    assert all(len(asked(server, image_path(i))) == 1 for i, _, _ in SIZES["train"] if i != 36)


@pytest.mark.parametrize("args, message", [
    (["--images", "0", "--out", "x"], "--images 0: at least 1"),
    (["--images", "7", "--out", "{tmp}/new"], "--images 7: the train split has 6"),
    (["--images", "2", "--out", "{tmp}/new", "--resolution", "4"], "--resolution 4: at least 8"),
    (["--images", "2", "--out", "{tmp}/new", "--split", "test"], "invalid choice: 'test'"),
    (["--images", "2", "--out", "{tmp}/new", "--base", "file:///etc"], "begins with http:// or https://"),
    (["--images", "2", "--out", "{tmp}/full"], "holds notes.tmp, which this command did not write"),
    (["--images", "2", "--out", "{tmp}/file"], "{tmp}/file"),
    (["--images", "2", "--out", "{tmp}/file/below"], "{tmp}/file"),
    (["--images", "1", "--out", "{tmp}/made"], "holds 000000000025.png, which is not among the first 1 train images"),
    (["--images", "2", "--out", "{tmp}/made", "--split", "val"], "which is not among the first 2 val images"),
    (["--images", "2", "--out", "{tmp}/made", "--resolution", "64"], "holds images of 32 pixels, --resolution is 64"),
    (["--out", "{tmp}/new"], "--images"), (["--images", "many", "--out", "{tmp}/new"], "invalid int value: 'many'"),
    (["--images", "2", "--out", "{tmp}/new", "--resoluton", "64"], "--resoluton")])
def test_command_bad_input(server, tmp_path, monkeypatch, capsys, args, message):
    """One line, exit status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.tmp").write_text("mine")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("COCO_BASE", server.base)
    monkeypatch.setenv("COCO_CACHE", str(tmp_path / "cache"))
    assert run(capsys, "--images", 2, "--out", tmp_path / "made", "--resolution", 32)[0] == 0
    listing = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file() and "cache" not in p.parts)
    args = [a.format(tmp=tmp_path) for a in args]
    status, errors = run(capsys, *(args if "--resolution" in args else [*args, "--resolution", "32"]))
    assert status == 2 and len(errors) == 1 and message.format(tmp=tmp_path) in errors[0]
    assert sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file() and "cache" not in p.parts) == listing


def test_kill_in_the_archive_and_go_on(server, tmp_path):
    """kill -9 while the archive comes: the next run asks for the rest only, then makes the folder; as a user runs it, from another directory."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    args = ["--images", "3", "--out", str(out), "--resolution", "32", "--base", server.base, "--cache", str(cache)]
    server.stall = {ZIP: 100_000}
    killed = subprocess.Popen([sys.executable, str(ROOT / "prompts/coco.py"), *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env={**os.environ, "no_proxy": "127.0.0.1"})
    part = cache / (coco.ARCHIVE + ".part")
    assert server.stalled.wait(60)
    while not part.stat().st_size and killed.poll() is None:              # it reads 64 KiB at a time
        time.sleep(.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    have = part.stat().st_size
    assert 0 < have < len(server.files[ZIP]) and not out.exists()
    result = command(*args)
    assert result.returncode == 0, result.stderr
    assert asked(server, ZIP) == [0, have] and len((out / "metadata.jsonl").read_text().splitlines()) == 3 and no_temporary(tmp_path)
    assert str(cache) in result.stdout and "captions" in result.stderr and "images" in result.stderr and "Traceback" not in result.stderr


def test_kill_among_the_images_and_go_on(server, tmp_path, capsys):
    """kill -9 while an image comes: no metadata.jsonl, every file whole; the rest follows in the next run, without what was there."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    args = ["--images", "6", "--out", str(out), "--resolution", "32", "--base", server.base, "--cache", str(cache)]
    slow = image_path(42)
    buffer = io.BytesIO()
    Image.effect_noise((48, 48), 60).convert("RGB").save(buffer, "JPEG", quality=95)
    server.files[slow] = buffer.getvalue() + bytes(60_000)                # trailing zeros: decodable, long enough to stall
    server.stall = {slow: 20_000}
    killed = subprocess.Popen([sys.executable, str(ROOT / "prompts/coco.py"), *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env={**os.environ, "no_proxy": "127.0.0.1"})
    assert server.stalled.wait(60)
    while len(list(out.glob("0*.png"))) < 5 and killed.poll() is None:
        time.sleep(.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (out / "metadata.jsonl").exists() and len(list(out.glob("0*.png"))) == 5
    for path in [*out.glob("0*.png"), *cache.glob("train2017/0*.jpg")]:
        Image.open(path).load()
    (out / f".000000000042.png.{'0f' * 16}.tmp").write_bytes(b"half")                # what a kill at the wrong moment leaves
    server.go.set()
    assert run(capsys, *args) == (0, [])
    assert len((out / "metadata.jsonl").read_text().splitlines()) == 6 and no_temporary(out)
    assert len(asked(server, slow)) == 2 and all(len(asked(server, image_path(i))) == 1 for i, _, _ in SIZES["train"][:5])


def test_command_as_a_user_runs_it(tmp_path):
    """--help and a server that is down, in a process of their own: no traceback, exit status 2, one error line."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        result = command("--images", 2, "--out", tmp_path / "out", COCO_BASE=f"http://127.0.0.1:{s.getsockname()[1]}", COCO_CACHE=str(tmp_path / "cache"))
    errors = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: http://127.0.0.1") and ZIP in errors[0]
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------- imagefolders


def folder(path, rows, n=4):
    path.mkdir(parents=True)
    for i in range(n):
        Image.effect_noise((30, 20), 50 + i).convert("RGB").save(path / f"{i}.png")
    (path / "metadata.jsonl").write_text("".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return path


def folder_rows(n=4):
    return [{"file_name": f"{i}.png", "text": f"caption {i}\u2028", "seed": 1} for i in range(n)]


def test_imagefolder(tmp_path):
    """Pixels of the centre crop, the whole caption, a link (as in the hub's cache) read as the file it is."""
    path = folder(tmp_path / "a", [*folder_rows(), "\n"])
    (path / "0.png").rename(tmp_path / "blob")
    os.symlink(tmp_path / "blob", path / "0.png")
    data = coco.ImageFolder(path, 20)
    assert len(data) == 4 and data.captions == [f"caption {i}\u2028" for i in range(4)]
    for i in range(4):
        image, text = data[i]
        pixels = Image.open(path / f"{i}.png").crop((5, 0, 25, 20))
        assert text == data.captions[i] and torch.equal(image, torch.tensor(list(pixels.tobytes())).view(20, 20, 3).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("bad, message", [
    ([], "no image in it"), (["{\n"], 'line 1: {"file_name"'), (["[1]\n"], 'line 1: {"file_name"'),
    ([*folder_rows(1), {"file_name": "1.png"}], 'line 2: {"file_name"'), ([{"file_name": "../b/0.png", "text": "x"}], "../b/0.png is outside"),
    ([{"file_name": "/etc/hostname", "text": "x"}], "/etc/hostname is outside"), ([{"file_name": "1/../../b/0.png", "text": "x"}], "is outside"),
    ([{"file_name": "9.png", "text": "x"}], "9.png is missing"), ([{"file_name": "", "text": "x"}], " is missing"),
    ([{"file_name": "a\0.png", "text": "x"}], " is missing"), ([{"file_name": "1.png", "text": 3}], "its text is no string")])
def test_imagefolder_bad_metadata(tmp_path, bad, message):
    folder(tmp_path / "b", [])
    with pytest.raises(OSError) as e:
        coco.ImageFolder(folder(tmp_path / "a", bad), 16)
    assert message in str(e.value) and str(e.value).startswith(f"{tmp_path}/a/metadata.jsonl")


def test_image_data_and_batches_end_with_one_line(tmp_path, capsys):
    """No folder, no UTF-8, and an image cut short, met in this process and in a worker."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metadata.jsonl").write_bytes(b"\xff\xfe")
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path / "a", "not UTF-8")):
        with pytest.raises(SystemExit) as e:
            coco.image_data(path, 16)
        err = capsys.readouterr().err
        assert e.value.code == 2 and message in err and err.count("\n") == 1
    path = folder(tmp_path / "b", folder_rows())
    (path / "2.png").write_bytes((path / "2.png").read_bytes()[:300])
    for workers in (0, 1):
        with pytest.raises(SystemExit) as e:
            list(coco.image_batches(coco.image_data(path, 16), [[0, 1], [2, 3]], workers))
        assert e.value.code == 2 and capsys.readouterr().err == f"error: {path}/2.png: not a readable image\n"


# ---------------------------------------------------------------------------------------------------------------- prompt lists


def test_dfusion_templates():
    """Three templates of 40 training prompts, each with its item words and a mask threshold per item, and 40 test prompts apart from them."""
    lists = json.loads((ROOT / "prompts/dfusion_templates.json").read_text())
    assert list(lists) == ["template1", "template2", "template3"]
    for template in lists.values():
        train, test = [row["prompt"] for row in template["train"]], template["test"]
        assert len(set(train)) == len(set(test)) == 40 and not set(train) & set(test)
        for row in template["train"]:
            assert len(row["items"]) == len(row["thresholds"]) >= 1 and all(0 < x < .1 for x in row["thresholds"])
            assert all(item in row["prompt"].split() for item in row["items"])
