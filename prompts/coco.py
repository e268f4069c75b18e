"""COCO 2017 as training data: captions from its annotation archive, images fetched one by one when they are first asked for.

  Coco("train", resolution=512)[i]      -> (image (3, 512, 512) in [0, 1], caption); a torch Dataset, safe with any number of loader workers
  captions("val")                       -> the captions of the same items, without any image

The archive (241 MB) is fetched once; captions_train2017.json and captions_val2017.json are kept of it. Images are kept as COCO serves them, in
COCO's own folders (annotations/, train2017/, val2017/): who has COCO already points --cache or COCO_CACHE at it, and nothing is fetched. Every
file is written beside its place and renamed into it, so that a killed run leaves no half file behind. A transfer that breaks continues where it
stopped; after three tries there is one error that names the address. A cached image that does not decode, or has not the size its annotation
says, is fetched again.

  $ python prompts/coco.py --images 5000 --out data/coco                                    # an imagefolder, for --data
  $ python prompts/coco.py --images 5000 --out data/val --split val --resolution 1024       # the same command again goes on where it stopped

COCO_CACHE and COCO_BASE stand for --cache and --base where a script uses COCO without these flags.
"""
import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import http.client
import io
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

BASE = "http://images.cocodataset.org"                                    # plain http: its https certificate is another host's
ARCHIVE = "annotations/annotations_trainval2017.zip"
SPLITS = ("train", "val")
TRIES = 3
PAUSE = 1.                                                                # seconds before the second try, doubled before the third
TIMEOUT = 30.                                                             # seconds without a byte


def write(path, data):
    """Writes bytes to path atomically: a reader, or a run after kill -9, sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        tmp.write_bytes(data)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def transfer(url, sink, desc=None):
    """Appends to the binary file `sink` what it lacks of url (HTTP Range); a server without ranges sends all again. desc: shows a progress bar."""
    start = sink.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and start:                                       # nothing after `start`: the caller's check says whether it is whole
            return
        raise
    with response:
        if response.status != 206:
            start = sink.seek(0)
            sink.truncate()
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ValueError(f"the server sent another range than asked for ({response.headers.get('Content-Range')})")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=desc, disable=desc is None) as bar:
            while chunk := response.read(1 << 16):
                sink.write(chunk)
                bar.update(len(chunk))
    if total and sink.tell() < total:                                     # http.client does not complain of a short body read in pieces
        raise OSError(f"the transfer broke at {sink.tell():,} of {total:,} bytes")


def download(url, sink, check, desc=None):
    """Transfers url into `sink`, continuing what is there, and returns check(sink). Three tries, then an OSError naming url.

    check raises ValueError for bytes that are all there and wrong; they are dropped, and the next try begins anew.
    """
    for attempt in range(TRIES):
        time.sleep(PAUSE * attempt)
        try:
            transfer(url, sink, desc)
            return check(sink)
        except ValueError as e:
            reason = str(e)
            sink.seek(0)
            sink.truncate()
        except urllib.error.HTTPError as e:
            reason = f"HTTP {e.code} {e.reason}"
        except (OSError, http.client.HTTPException) as e:                 # refused, reset, timed out, cut
            reason = str(getattr(e, "reason", e)) or type(e).__name__
    raise OSError(f"{url}: {reason}; gave up after {TRIES} tries")


def parse(text):
    """A captions_*2017.json -> [(image id, width, height, [caption, ...]), ...] by image id, captions by annotation id; ValueError if it is none."""
    try:
        data = json.loads(text)
        texts = {}
        for a in sorted(data["annotations"], key=lambda a: a["id"]):
            texts.setdefault(a["image_id"], []).append(" ".join(a["caption"].split()))       # some end in a newline
        items = [(int(x["id"]), int(x["width"]), int(x["height"]), texts[x["id"]]) for x in sorted(data["images"], key=lambda x: x["id"])]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"not COCO captions ({type(e).__name__}: {e})") from e
    if not items:
        raise ValueError("not COCO captions (no image)")
    return items


def read_archive(sink):
    """The annotation archive -> {split: bytes of its captions}. Entries are read by name, never extracted to the paths the archive says."""
    try:
        with zipfile.ZipFile(sink) as archive:
            found = {split: archive.read(f"annotations/captions_{split}2017.json") for split in SPLITS}       # checks the CRC
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError) as e:
        raise ValueError(f"not COCO's annotation archive, or a broken one ({e})") from e
    for text in found.values():
        parse(text)
    return found


def places(cache=None, base=None):
    """(cache folder, base address): the arguments, else COCO_CACHE and COCO_BASE, else ~/.cache/coco2017 and COCO's own."""
    cache = cache or os.environ.get("COCO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coco2017"
    return Path(cache).expanduser().absolute(), (base or os.environ.get("COCO_BASE") or BASE).rstrip("/")


def annotations(split, cache, base):
    """parse() of a split's captions; fetches the archive on first use. Of several processes one fetches, the others wait for it."""
    path, part = cache / f"annotations/captions_{split}2017.json", cache / (ARCHIVE + ".part")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(cache / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)                              # falls with its process, so kill -9 leaves none behind
            if not path.is_file():
                print(f"COCO: fetching the captions once ({base}/{ARCHIVE}, 241 MB) into {cache}", flush=True)
                with open(part, "ab+") as sink:
                    found = download(f"{base}/{ARCHIVE}", sink, read_archive, "captions")
                for name, text in found.items():
                    write(cache / f"annotations/captions_{name}2017.json", text)
                part.unlink()
    try:
        items = parse(path.read_bytes())
    except ValueError as e:
        raise OSError(f"{path}: {e}; delete it, and it is fetched again") from e
    print(f"COCO: {len(items):,} {split} images, cache {cache}", flush=True)
    return items


def pick(texts, seed, image_id):
    """One of an image's captions (most have five), drawn from (seed, image id) alone."""
    digest = hashlib.blake2b(repr((seed, "coco caption", image_id)).encode(), digest_size=8).digest()
    return texts[int.from_bytes(digest, "little") % len(texts)]


def captions(split="train", cache=None, base=None, seed=0):
    """One caption per image: captions(split)[i] is the caption of Coco(split)[i]."""
    return [pick(texts, seed, image_id) for image_id, _, _, texts in annotations(split, *places(cache, base))]


def square(image, resolution):
    """PIL image -> RGB, short side resized to `resolution` pixels (Lanczos, antialiased), centre-cropped to a square."""
    return ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)


def to_tensor(image):
    """PIL RGB image -> (3, H, W) fp32 in [0, 1]."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1) / 255


class Coco(Dataset):
    """COCO 2017, by image id: item i is (image (3, resolution, resolution) fp32 in [0, 1], caption). train: 118,287 images, val: 5,000.

    cache: folder; base: address to fetch from (see `places`); seed: of the draw of each image's caption. An image that cannot be had is an
    OSError with one line that names its address; in a loader's worker it ends the loader with the same type.
    """

    def __init__(self, split="train", resolution=512, cache=None, base=None, seed=0):
        self.split, self.resolution = split, resolution
        self.cache, self.base = places(cache, base)
        self.items = [(image_id, w, h, pick(texts, seed, image_id)) for image_id, w, h, texts in annotations(split, self.cache, self.base)]

    @property
    def captions(self):
        return [text for *_, text in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return to_tensor(square(self.image(i), self.resolution)), self.items[i][3]

    def image(self, i):
        """PIL image i as COCO has it, from the cache or fetched into it. Its file name comes from the number alone, never from the annotations."""
        image_id, width, height, _ = self.items[i]
        name = f"{self.split}2017/{image_id:012d}.jpg"

        def check(file):
            try:
                file.seek(0)
                image = Image.open(file)
                if image.size != (width, height):
                    raise ValueError(f"{image.width} x {image.height} pixels where the annotation says {width} x {height}")
                image.load()
            except (OSError, SyntaxError, Image.DecompressionBombError) as e:
                raise ValueError("not a readable image") from e
            return image

        path = self.cache / name
        with contextlib.suppress(FileNotFoundError, ValueError), open(path, "rb") as file:
            return check(file)
        sink = io.BytesIO()
        image = download(f"{self.base}/{name}", sink, check)
        write(path, sink.getvalue())
        return image


class ImageFolder(Dataset):
    """Images with captions in metadata.jsonl ({"file_name", "text"} a line): item i is (image (3, resolution, resolution) in [0, 1], caption).

    The whole list is checked at once, each image's pixels when it is read; both are an OSError that names what is wrong.
    """

    def __init__(self, folder, resolution):
        self.resolution, self.items, path = resolution, [], Path(folder) / "metadata.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")          # not splitlines: a caption may hold U+2028
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
            raise OSError(f"{path}: {reason}; a folder of images with metadata.jsonl is expected") from e
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = Path(row["file_name"]), row["text"]
            except (ValueError, KeyError, TypeError) as e:
                raise OSError(f'{path} line {number}: {{"file_name": "...", "text": "..."}} is expected') from e
            if not isinstance(text, str) or "\0" in text:
                raise OSError(f"{path} line {number}: its text is no string, or has a NUL character in it")
            if name.is_absolute() or ".." in name.parts:                  # links in the folder are fine (the hub's cache has them)
                raise OSError(f"{path} line {number}: {name} is outside the folder")
            if not (path.parent / name).is_file():
                raise OSError(f"{path} line {number}: {name} is missing")
            self.items.append((path.parent / name, text))
        if not self.items:
            raise OSError(f"{path}: no image in it")

    @property
    def captions(self):
        return [text for _, text in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        file, text = self.items[i]
        try:
            with Image.open(file) as image:
                return to_tensor(square(ImageOps.exif_transpose(image), self.resolution)), text
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise OSError(f"{file}: not a readable image") from e


def image_data(folder, resolution):
    """The training images of a script: an ImageFolder, or COCO's training set without a folder. Bad data: one line, exit status 2."""
    try:
        return ImageFolder(folder, resolution) if folder else Coco("train", resolution)
    except OSError as e:
        die(e)


def image_batches(data, indices, workers=0):
    """Yields (images (B, 3, H, W) in [0, 1], captions) for each list of indices; the workers read ahead. Bad data: one line, exit status 2."""
    try:
        yield from DataLoader(data, batch_sampler=indices, num_workers=workers)
    except OSError as e:
        die(str(e).rpartition("OSError: ")[2])                            # from a worker it comes wrapped in that worker's traceback


# ------------------------------------------------------------------------------------------------------------------------------------
# the command


def die(message):
    """Bad input: one line on stderr, exit status 2."""
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)               # clears a progress bar first
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(message)


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--images", type=int, required=True, help="how many: the first by image id, so that a larger folder extends a smaller one")
    parser.add_argument("--out", required=True, help="imagefolder: 000000000009.png ... and metadata.jsonl, written last")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    parser.add_argument("--resolution", type=int, default=512, help="pixels; default: 512")
    parser.add_argument("--base", help=f"address to fetch from; default: COCO_BASE, else {BASE}")
    parser.add_argument("--cache", help="folder of what was fetched; default: COCO_CACHE, else ~/.cache/coco2017")
    args = parser.parse_args(argv)
    for name, low in (("images", 1), ("resolution", 8)):
        if getattr(args, name) < low:
            die(f"--{name} {getattr(args, name)}: at least {low}")
    if not places(args.cache, args.base)[1].startswith(("http://", "https://")):
        die(f"--base {places(args.cache, args.base)[1]}: an address that begins with http:// or https:// is needed")
    return args


OWN = re.compile(r"metadata\.jsonl|\d+\.png")                              # what this command writes, and
LEFT = re.compile(r"\.(metadata\.jsonl|\d+\.png)\.[0-9a-f]{32}\.tmp")       # what a killed one leaves behind


def prepare(out):
    """Refuses a folder that holds anything that this command did not write."""
    found = list(out.iterdir()) if out.exists() else []
    for path in found:
        if not OWN.fullmatch(path.name) and not LEFT.fullmatch(path.name):
            raise OSError(f"--out {out} holds {path.name}, which this command did not write: choose an empty folder")
    for path in found:
        if LEFT.fullmatch(path.name):
            path.unlink()


def main(args):
    out = Path(args.out)
    prepare(out)                                                          # before 241 MB are fetched for nothing
    data = Coco(args.split, args.resolution, args.cache, args.base)
    if args.images > len(data):
        die(f"--images {args.images}: the {args.split} split has {len(data):,}")
    names = [f"{image_id:012d}.png" for image_id, *_ in data.items[:args.images]]
    present = {path.name for path in out.glob("*.png")}
    if other := sorted(present - set(names)):
        die(f"--out {out} holds {other[0]}, which is not among the first {args.images} {args.split} images: choose an empty folder")

    def make(i):
        if names[i] in present:
            with Image.open(out / names[i]) as image:
                if image.size != (args.resolution, args.resolution):
                    raise OSError(f"--out {out} holds images of {image.width} pixels, --resolution is {args.resolution}: choose an empty folder")
            return
        buffer = io.BytesIO()
        square(data.image(i), args.resolution).save(buffer, "PNG", compress_level=1)
        write(out / names[i], buffer.getvalue())

    with concurrent.futures.ThreadPoolExecutor(16) as pool, tqdm(total=len(names), desc="images") as bar:
        try:
            for job in concurrent.futures.as_completed([pool.submit(make, i) for i in range(len(names))]):
                job.result()
                bar.update()
        except BaseException:                                             # an error or Ctrl-C: do not work off the queue first
            pool.shutdown(cancel_futures=True)
            raise
    rows = [json.dumps({"file_name": name, "text": data.items[i][3]}, ensure_ascii=False) for i, name in enumerate(names)]
    write(out / "metadata.jsonl", "".join(row + "\n" for row in rows).encode())
    print(f"{len(names):,} images with captions: {out}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as e:
        die(e)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130)
