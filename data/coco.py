"""COCO 2017 as training data: captions from its annotation archive, images fetched one by one.

  captions("val")                     -> one caption per image; no image is fetched
  Coco("train", resolution=512)[i]    -> (image (3, 512, 512) in [0, 1], caption)

The first use downloads the annotation archive (241 MB) and keeps its two caption files. An image
is downloaded when it is first needed. The cache uses COCO's own folders (annotations/,
train2017/, val2017/). If you already have COCO, pass --cache or set COCO_CACHE to its folder, and
nothing is downloaded. COCO_BASE changes the address to download from, as --base does.

Run as a command, it writes an image folder for --data. If it is stopped, run it again to continue:

  $ python data/coco.py --images 5000 --out coco_images
  $ python data/coco.py --images 5000 --out coco_val --split val --resolution 1024
"""

import argparse
import hashlib
import http.client
import io
import json
import os
import socket
import sys
import time
import uuid
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

# When this file runs as a script, Python must still find the package `data`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.images import square, to_tensor

# Plain http, because the certificate of COCO's https address belongs to another host.
BASE = "http://images.cocodataset.org"
ARCHIVE = "annotations/annotations_trainval2017.zip"
SPLITS = ("train", "val")
TRIES = 3
PAUSE = 1.0  # seconds before the second try, doubled before the third
TIMEOUT = 30.0  # seconds to wait for the next byte


def write_atomically(path, data):
    """Write bytes through a temporary file, so that `path` holds all of them or is unchanged."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fetch(url, folder, install, progress=False):
    """Download `url` to a temporary file in `folder` and return install(file).

    `install` moves what it needs to its final place, and raises ValueError for bad content.
    After three failed tries it raises an OSError that names the address.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    # torch.hub has no timeout of its own. Without one, we would wait forever for a silent server.
    socket.setdefaulttimeout(TIMEOUT)
    for attempt in range(TRIES):
        time.sleep(PAUSE * attempt)
        try:
            torch.hub.download_url_to_file(url, temporary, progress=progress)
            return install(temporary)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = error
        finally:
            temporary.unlink(missing_ok=True)
    raise OSError(f"{url}: {reason}; gave up after {TRIES} tries") from reason


def install_captions(file):
    """Save the two caption files of COCO's annotation archive in the folder of the archive.

    Entries are read by name. Nothing is extracted to a path that the archive chooses.
    """
    found = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for split in SPLITS:
                name = f"captions_{split}2017.json"
                found[name] = archive.read(f"annotations/{name}")
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ValueError(f"not COCO's annotation archive, or damaged ({error})") from error
    for name, text in found.items():
        write_atomically(file.with_name(name), text)


def places(cache=None, base=None):
    """Return the cache folder and the address to download from.

    Arguments take precedence over COCO_CACHE and COCO_BASE. The defaults are ~/.cache/coco2017 and
    COCO's server.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = cache or os.environ.get("COCO_CACHE") or Path(user_cache) / "coco2017"
    base = base or os.environ.get("COCO_BASE") or BASE
    return Path(cache).expanduser().absolute(), base.rstrip("/")


def read_annotations(path):
    """Read a captions_*2017.json into a list of (image id, width, height, captions).

    Images are sorted by image id, and the captions of an image by annotation id.
    """
    try:
        content = json.loads(path.read_bytes())
        texts = {}
        for annotation in sorted(content["annotations"], key=itemgetter("id")):
            # Some captions end in a newline, and some have double spaces.
            text = " ".join(annotation["caption"].split())
            texts.setdefault(annotation["image_id"], []).append(text)
        items = []
        for image in sorted(content["images"], key=itemgetter("id")):
            image_id = int(image["id"])
            items.append((image_id, image["width"], image["height"], texts[image_id]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path}: not COCO captions; delete it to fetch it again") from error
    return items


def annotations(split, cache, base):
    """The annotations of a split; the first use downloads the archive."""
    path = cache / f"annotations/captions_{split}2017.json"
    if not path.is_file():
        url = f"{base}/{ARCHIVE}"
        print(f"COCO: fetching the captions once ({url}, 241 MB) into {cache}", flush=True)
        fetch(url, path.parent, install_captions, progress=True)
    items = read_annotations(path)
    print(f"COCO: {len(items):,} {split} images, cache {cache}", flush=True)
    return items


def pick(texts, seed, image_id):
    """Draw one of an image's captions (most have five) from the seed and the image id alone."""
    key = repr((seed, "coco caption", image_id)).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return texts[int.from_bytes(digest, "little") % len(texts)]


def captions(split="train", cache=None, base=None, seed=0):
    """One caption per image: captions(split)[i] belongs to image i of Coco(split)."""
    rows = annotations(split, *places(cache, base))
    return [pick(texts, seed, image_id) for image_id, _, _, texts in rows]


def open_image(path, size):
    """Decode an image of a known (width, height). ValueError if it is damaged or the wrong size."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("not a readable image") from error
    if image.size != size:
        raise ValueError(f"the image is {image.size}, but its annotation says {size}")
    return image


class Coco(Dataset):
    """COCO 2017 sorted by image id. train has 118,287 images, val has 5,000.

    Item i is (image, caption): float32 (3, resolution, resolution) in [0, 1] and a string.
    `seed` draws the caption of each image; `cache` and `base` are explained in `places`.
    An image that cannot be downloaded raises an OSError that names its address.
    """

    def __init__(self, split="train", resolution=512, cache=None, base=None, seed=0):
        self.split = split
        self.resolution = resolution
        self.cache, self.base = places(cache, base)
        self.items = []
        for image_id, width, height, texts in annotations(split, self.cache, self.base):
            self.items.append((image_id, width, height, pick(texts, seed, image_id)))

    @property
    def captions(self):
        return [caption for _, _, _, caption in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image = square(self.image(i), self.resolution)
        return to_tensor(image), self.items[i][3]

    def image(self, i):
        """Return the original PIL image i, from the cache or downloaded into it."""
        image_id, width, height, _ = self.items[i]
        # The file name is made only from the number, never from a name in the annotations.
        name = f"{self.split}2017/{image_id:012d}.jpg"
        path = self.cache / name
        if path.is_file():
            try:
                return open_image(path, (width, height))
            except ValueError:
                # The file in the cache is damaged. Download it again below.
                pass

        def install(file):
            image = open_image(file, (width, height))
            file.replace(path)
            return image

        return fetch(f"{self.base}/{name}", path.parent, install)


def check_folder(out, names):
    """Reject a folder with files that are not ours, and delete what a killed run left behind."""
    expected = {"metadata.jsonl", *names}
    # A name that begins with a dot is a temporary file or belongs to the system.
    for path in sorted(out.glob("[!.]*")):
        if path.name not in expected:
            raise OSError(
                f"--out {out}: {path.name} is not a file that this command writes; "
                "choose an empty folder"
            )
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=int, required=True, help="how many images, in the order of their ids")
    add("--out", required=True, help="folder for 000000000009.png, ... and metadata.jsonl")
    add("--split", choices=SPLITS, default="train", help="default: train")
    add("--resolution", type=int, default=512, help="side in pixels; default: 512")
    add("--cache", help="folder for downloads; default: COCO_CACHE or ~/.cache/coco2017")
    add("--base", help=f"address to download from; default: COCO_BASE or {BASE}")
    return parser.parse_args(argv)


def main(args):
    # If we cannot create the folder, fail before the long download, not after it.
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = Coco(args.split, args.resolution, args.cache, args.base)
    if not 1 <= args.images <= len(data):
        sys.exit(f"--images {args.images}: choose 1 to {len(data)} for the {args.split} split")
    names = [f"{image_id:012d}.png" for image_id, _, _, _ in data.items[: args.images]]
    check_folder(out, names)

    def make(i):
        path = out / names[i]
        if path.exists():
            # An earlier run made the image. It must have the size that we want now.
            with Image.open(path) as image:
                side = image.width
            if side != args.resolution:
                raise OSError(f"--out {out}: its images have {side} pixels; choose an empty folder")
            return
        buffer = io.BytesIO()
        square(data.image(i), args.resolution).save(buffer, "PNG", compress_level=1)
        write_atomically(path, buffer.getvalue())

    with ThreadPoolExecutor(16) as pool:
        # An error ends the loop, and `map` then cancels the images that have not started.
        for _ in tqdm(pool.map(make, range(len(names))), total=len(names), desc="images"):
            pass

    # metadata.jsonl comes last, so a folder that has it is complete.
    lines = []
    for name, caption in zip(names, data.captions):
        row = {"file_name": name, "text": caption}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(out / "metadata.jsonl", "".join(lines).encode())
    print(f"{len(names):,} images with captions: {out}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as error:
        sys.exit(str(error))
