"""Images with captions as tensors in [0, 1]: from a folder of your own, or from COCO 2017.

An image folder holds images and a metadata.jsonl with one line per image:

  {"file_name": "0001.png", "text": "a corgi on a skateboard"}
"""

import json
from pathlib import Path

from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor


def square(image, resolution):
    """PIL image -> RGB (resolution, resolution): resized, then center-cropped."""
    return ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)


def to_tensor(image):
    """PIL RGB image -> (3, H, W) float32 in [0, 1]."""
    return pil_to_tensor(image) / 255


def open_image(path):
    """Reads an image file -> PIL RGB image, turned upright as its EXIF tag says.

    Transparency is dropped: every pixel keeps the color stored in the file, also where it is fully
    transparent. Raises an OSError that names the file if it is not an image, or has more than 8
    bits per channel, which Pillow would clip to white.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel; save it with 8")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: not a readable image ({error})") from error


def read_row(line, folder):
    """One line of metadata.jsonl -> its dict. Raises ValueError if the image or text is wrong."""
    try:
        row = json.loads(line)
        name = Path(row["file_name"])
        text = row["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError('{"file_name": "...", "text": "..."} is expected') from error
    if not isinstance(text, str) or "\0" in text:
        raise ValueError("the text is not a string, or it has a NUL character")
    # Links inside the folder are fine: the hub's cache is made of them.
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{name} is outside the folder")
    if not (folder / name).is_file():
        raise ValueError(f"{name} is missing")
    return row


class ImageFolder(Dataset):
    """A folder of images with metadata.jsonl.

    Item i is (image, caption): float32 (3, resolution, resolution) in [0, 1] and a string.
    The list is checked when the dataset is built, and each image when it is read. Both raise an
    OSError that names the file.
    """

    def __init__(self, folder, resolution):
        self.resolution = resolution
        self.items = []
        path = Path(folder) / "metadata.jsonl"
        try:
            # utf-8-sig drops the byte order mark that some editors put first.
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise OSError(f"{path}: not UTF-8 text") from error
        except OSError as error:
            raise OSError(
                f"{path}: {error.strerror}; a folder of images with metadata.jsonl is expected"
            ) from error
        # Not splitlines(), because a caption may contain U+2028.
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = read_row(line, path.parent)
            except ValueError as error:
                raise OSError(f"{path} line {number}: {error}") from error
            self.items.append((path.parent / row["file_name"], row["text"]))
        if not self.items:
            raise OSError(f"{path}: it lists no images")

    @property
    def captions(self):
        return [text for _, text in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, text = self.items[i]
        image = open_image(path)
        return to_tensor(square(image, self.resolution)), text


def image_data(folder, resolution):
    """The training images of a script: an ImageFolder, or COCO's train split if folder is None."""
    if folder is not None:
        return ImageFolder(folder, resolution)
    # Imported here because coco.py itself imports from this file.
    from data.coco import Coco

    return Coco("train", resolution)


def image_batches(data, indices, workers=0):
    """Yield (images (B, 3, H, W) in [0, 1], captions) for each list of indices.

    `workers` processes read ahead. An error in a worker is raised here with the same type, and
    with the worker's traceback in its message.
    """
    yield from DataLoader(data, batch_sampler=indices, num_workers=workers)
