"""DiffDoctor's labeling loop (arXiv 2501.12382, section 3.2): what people should label, and how.

  score           ranks a folder's images and categories by the detector's confidence
  export_hard     writes the hard images of abnormal categories, with maps for a person to correct
  import_labels   takes the corrected maps as true labels
  pseudo          labels the other images with the detector

The paper describes these steps but not their thresholds, which are ours. `diffdoctor.py detector`
trains on the labeled folders that come out. A labeled folder holds images/NAME, maps/NAME.png
(8-bit gray, white where something is wrong), and meta.jsonl with one line per image:

  {"file_name": NAME, "category": "dog", "split": "train" or "test", "source": "human"}

"source" is "human", "pseudo" or "real". A real photograph needs no map.

  $ python data/labels.py score --detector toy/detector --images new --out ranks
  $ python data/labels.py export_hard --detector toy/detector --images new --scores ranks --out hard
  $ python data/labels.py import_labels --labels hard --out labeled     # after you edited hard/maps
  $ python data/labels.py pseudo --detector toy/detector --images new --exclude hard --out pseudo
"""

import hashlib
import json
import sys
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

# When this file runs as a script, Python must still find the package `data`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import pick_device
from data.coco import write_atomically
from data.images import image_batches, image_data, open_image, to_tensor
from judges.detector import load_detector
from run_folder import SettingsHelp, check_ranges, readable_errors, settings_parser, to_pil

SOURCES = ("human", "pseudo", "real")
SPLITS = ("train", "test")
ABNORMAL = 1.5  # times the median confidence of the categories
MAX_COLOR = 8 / 255  # an image editor may leave this much color in a gray map


def parse_args(argv=None):
    parser = settings_parser("data/labels", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        options = dict(formatter_class=SettingsHelp, allow_abbrev=False)
        return commands.add_parser(name, help=text, **options).add_argument

    add = command("score", "rank images and categories by the detector's confidence")
    add("--detector", required=True, help="folder, hub id, or the released ad_pytorch_model.bin")
    add("--images", required=True, help="folder with metadata.jsonl: file_name, text, category")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", required=True, help="new folder, for scores.jsonl")

    add = command("export_hard", "write hard images with maps for a person to correct")
    add("--detector", required=True, help="folder, hub id, or the released ad_pytorch_model.bin")
    add("--images", required=True, help="folder with metadata.jsonl: file_name, text, category")
    add("--scores", required=True, help="folder that the score command wrote for the same images")
    add("--categories", nargs="+", help="use these categories instead of the abnormal ones")
    add("--threshold", type=float, default=0.5, help="lowest maximum confidence of a hard image")
    add("--max_images", type=int, default=2000, help="write at most this many, the worst first")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", required=True, help="new folder, for images/, maps/, overlays/ and meta.jsonl")

    add = command("import_labels", "take corrected maps as true labels")
    add("--labels", required=True, help="folder from export_hard, minus the images you deleted")
    add("--split", choices=SPLITS, default="train", help="test: for the metrics only")
    add("--out", required=True, help="labeled folder, new or to add to")

    add = command("pseudo", "label images with the detector")
    add("--detector", required=True, help="folder, hub id, or the released ad_pytorch_model.bin")
    add("--images", required=True, help="folder with metadata.jsonl: file_name, text, category")
    add("--exclude", nargs="+", default=[], help="folders whose images a person has labeled")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", required=True, help="new labeled folder")

    args = parser.parse_args(argv)
    check_ranges(args)
    out = Path(args.out)
    is_empty = out.is_dir() and not any(out.iterdir())
    if args.command != "import_labels" and out.exists() and not is_empty:
        sys.exit(f"--out {out} is not an empty folder: choose another one, or delete it")
    return args


# --------------------------------------------------------------------------------------------------
# Reading


def read_image(path, size=None):
    """Reads an image file -> (3, H, W) in [0, 1]; a gray one has three equal channels.

    size: squash the image to size x size pixels, as a detector sees it.
    """
    image = open_image(path)
    if size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return to_tensor(image)


def check_gray(pixels, path):
    """Raises OSError if the map (3, H, W) at this path has colors: red is not 0.3 wrong."""
    if (pixels.amax(0) - pixels.amin(0)).max() > MAX_COLOR:
        raise OSError(f"{path} has colors; a map is gray, and white where something is wrong")


class Labelled(Dataset):
    """Images with their labels, squashed to the detector's size.

    rows: dicts with the path "image" and, if there is one, "map". Item i is (image (3, size, size),
    label (1, size, size), i), in [0, 1]. Without a map the label is zero.
    """

    def __init__(self, rows, size):
        self.rows = rows
        self.size = size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        image = read_image(row["image"], self.size)
        label = torch.zeros(1, self.size, self.size)
        if row.get("map"):
            pixels = read_image(row["map"], self.size)
            check_gray(pixels, row["map"])
            label = pixels[:1]
        return image, label, i


def read_lines(path):
    """A file of JSON lines -> [(line number, line)], without blank lines."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error
    # Not splitlines(), because a category may contain U+2028.
    lines = enumerate(content.split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def read_meta(folder):
    """The rows of a labeled folder, with the paths "image" and "map" (None for photographs).

    Raises an OSError that names the line if one is wrong. The files themselves may be missing.
    """
    path = Path(folder) / "meta.jsonl"
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append(read_meta_row(line, path.parent))
        except ValueError as error:
            raise OSError(f"{path} line {number}: {error}") from error
    if not rows:
        raise OSError(f"{path}: it lists no images")
    return rows


def read_meta_row(line, folder):
    """One line of meta.jsonl -> its dict with both paths. Raises ValueError if it is wrong."""
    try:
        row = json.loads(line)
        name = Path(row["file_name"])
        is_known = row["source"] in SOURCES and row["split"] in SPLITS
    except (ValueError, KeyError, TypeError):
        is_known = False
    if not is_known or not row["file_name"].strip("."):
        raise ValueError('{"file_name", "category", "split", "source"} is expected')
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{name} is outside the folder")
    row["image"] = folder / "images" / name
    row["map"] = None
    if row["source"] != "real":
        row["map"] = folder / "maps" / name.with_suffix(".png")
    return row


def read_labels(folders, real):
    """All rows of labeled folders, and of image folders of real photographs.

    Every tenth photograph is used only for the metrics. Raises an OSError if a file is missing.
    """
    rows = []
    for folder in folders:
        for row in read_meta(folder):
            for path in (row["image"], row["map"]):
                if path and not path.is_file():
                    raise OSError(f"{path} is missing, but {folder}/meta.jsonl names it")
            rows.append(row)
    for folder in real:
        for i, (path, _) in enumerate(image_data(folder, None).items):
            split = "test" if i % 10 == 9 else "train"
            rows.append(dict(image=path, source="real", split=split))
    return rows


def read_unlabelled(folder):
    """The rows of a folder with metadata.jsonl: file_name, category ("" if none) and "image"."""
    paths = [path for path, _ in image_data(folder, None).items]
    lines = read_lines(Path(folder) / "metadata.jsonl")
    rows = []
    for path, (_, line) in zip(paths, lines, strict=True):
        row = json.loads(line)
        category = str(row.get("category", ""))
        rows.append(dict(file_name=row["file_name"], image=path, category=category))
    return rows


# --------------------------------------------------------------------------------------------------
# Detecting and writing


@torch.no_grad()
def diagnose(detector, rows, device, batch_size=16):
    """Yields (row, confidence (size, size) on the CPU) for each row with an "image"."""
    # Read only the images, even if a row also has a map.
    images_only = [dict(image=row["image"]) for row in rows]
    data = Labelled(images_only, detector.size)
    indices = torch.arange(len(rows)).split(batch_size)
    parts = [part.tolist() for part in indices]
    workers = 4 if device.type == "cuda" else 0
    batches = image_batches(data, parts, workers)
    for images, _, batch in tqdm(batches, total=len(parts), desc="diagnose"):
        confidence = detector(images.to(device)).cpu()
        yield from zip([rows[i] for i in batch], confidence)


def overlay(images, maps):
    """Images (B, 3, H, W) and maps (B, h, w) -> the images, red where the confidence is high."""
    heat = 0.8 * F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")
    red = images.new_tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    return images * (1 - heat) + heat * red


def content_name(path):
    """A file name from the file's hash, so an image has the same name in all labeled folders."""
    return file_hash(path)[:16] + ".png"


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_lines(path, rows):
    """Writes a file of JSON lines, all of it or nothing."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, "".join(lines).encode())


def save_map(confidence, path):
    """Confidence (1 or 3, H, W) in [0, 1] -> an 8-bit gray PNG."""
    to_pil(confidence.expand(3, -1, -1)).convert("L").save(path)


def write_labelled(out, found, source):
    """Writes images and their predicted maps as a labeled folder -> the number of images.

    found: pairs (row, map), as diagnose yields them. Each map is resized to its image. With
    source "human" we add overlays for people to look at, and the map's hash to detect edits.
    """
    is_for_person = source == "human"
    folders = ["images", "maps"]
    if is_for_person:
        folders.append("overlays")
    for folder in folders:
        (out / folder).mkdir(parents=True, exist_ok=True)

    rows = []
    for found_row, confidence in found:
        image = read_image(found_row["image"])
        name = content_name(found_row["image"])
        large_map = F.interpolate(confidence[None, None], image.shape[1:], mode="bilinear")[0]
        to_pil(image).save(out / "images" / name)
        save_map(large_map, out / "maps" / name)
        row = dict(file_name=name, category=found_row["category"], split="train", source=source)
        row["original"] = found_row["file_name"]
        if is_for_person:
            side_by_side = torch.cat([image, overlay(image[None], large_map)[0]], 2)
            to_pil(side_by_side).save(out / "overlays" / name)
            row["exported"] = file_hash(out / "maps" / name)
        rows.append(row)
    # The list comes last, so a folder that has it is complete.
    write_lines(out / "meta.jsonl", rows)
    return len(rows)


# --------------------------------------------------------------------------------------------------
# The commands


def abnormal(means):
    """{category: mean confidence} -> the abnormal categories, the most suspicious one first."""
    median = torch.tensor(list(means.values())).median().item()
    suspicious = [category for category in means if means[category] > ABNORMAL * median]
    return sorted(suspicious, key=means.get, reverse=True)


def score(args):
    device = pick_device(args.device)
    detector = load_detector(args.detector, device)
    rows = []
    by_category = {}
    for found_row, confidence in diagnose(detector, read_unlabelled(args.images), device):
        row = dict(file_name=found_row["file_name"], category=found_row["category"])
        row.update(mean=confidence.mean().item(), max=confidence.max().item())
        rows.append(row)
        by_category.setdefault(row["category"], []).append(row)

    means = {}
    for category, members in by_category.items():
        means[category] = sum(row["mean"] for row in members) / len(members)
    abnormal_categories = abnormal(means)
    print(f"{'category':<30} {'images':>7} {'mean %':>7} {'max %':>7}")
    for category in sorted(means, key=means.get, reverse=True):
        members = by_category[category]
        mean = 100 * means[category]
        worst = 100 * sum(row["max"] for row in members) / len(members)
        note = "   abnormal" if category in abnormal_categories else ""
        print(f"{category or '(none)':<30} {len(members):>7} {mean:>7.2f} {worst:>7.2f}{note}")

    for row in rows:
        row["abnormal"] = row["category"] in abnormal_categories
    rows.sort(key=itemgetter("mean"), reverse=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "scores.jsonl", rows)
    print(f"ranked: {out / 'scores.jsonl'}. Generate more images of the abnormal categories with")
    print("good models, then have the hard ones labeled: python data/labels.py export_hard ...")
    if not abnormal_categories:
        print("No category stands out here. Name those you distrust: export_hard --categories ...")


def read_hard(args):
    """The hard rows of scores.jsonl in its order, the worst one first."""
    hard = []
    try:
        for _, line in read_lines(Path(args.scores) / "scores.jsonl"):
            row = json.loads(line)
            is_wanted = row["abnormal"]
            if args.categories:
                is_wanted = row["category"] in args.categories
            if is_wanted and row["max"] >= args.threshold:
                hard.append(row)
    except (OSError, ValueError, KeyError, TypeError):
        sys.exit(f"--scores {args.scores}: it has no scores.jsonl from data/labels.py score")
    if not hard:
        categories = ", ".join(args.categories or ["an abnormal category"])
        sys.exit(f"no image of {categories} reaches --threshold {args.threshold:g}")
    return hard[: args.max_images]


def export_hard(args):
    device = pick_device(args.device)
    detector = load_detector(args.detector, device)
    known_rows = {row["file_name"]: row for row in read_unlabelled(args.images)}
    rows = []
    for row in read_hard(args):
        if row["file_name"] not in known_rows:
            name = row["file_name"]
            sys.exit(f"--scores {args.scores} knows {name}, which is not in {args.images}")
        rows.append(known_rows[row["file_name"]])
    out = Path(args.out)
    count = write_labelled(out, diagnose(detector, rows, device), "human")
    print(f"{count} images. Look at {out / 'overlays'} and paint the maps in {out / 'maps'}: white")
    print(f"is wrong, black is fine. Delete images you cannot judge from {out / 'images'}. Then:")
    print(f"  python data/labels.py import_labels --labels {out} --out DATASET")


def read_edited_map(row):
    """A map that came back from an image editor -> (3, H, W), after checking that it is a map."""
    path = row["map"]
    if not path.is_file():
        raise OSError(f"{path} is missing; delete the image, too, to leave it out")
    pixels = read_image(path)
    height, width = pixels.shape[1:]
    image_height, image_width = read_image(row["image"]).shape[1:]
    if (height, width) != (image_height, image_width):
        image_size = f"its image has {image_width} x {image_height}"
        raise OSError(f"{path} has {width} x {height} pixels, but {image_size}")
    check_gray(pixels, path)
    return pixels


def import_labels(args):
    out = Path(args.out)
    old_rows = read_meta(out) if (out / "meta.jsonl").exists() else []
    known_names = [row["file_name"] for row in old_rows]

    # We check everything before we write anything.
    labels = []
    num_edited = 0
    num_left_out = 0
    for row in read_meta(args.labels):
        if not row["image"].is_file():
            num_left_out += 1
            continue
        if row["file_name"] in known_names:
            sys.exit(f"{row['image']} already has a label in {out}; delete it from one of the two")
        labels.append((row, read_edited_map(row)))
        if file_hash(row["map"]) != row.get("exported"):
            num_edited += 1

    for folder in ("images", "maps"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    new_rows = []
    for row, pixels in labels:
        name = row["file_name"]
        (out / "images" / name).write_bytes(row["image"].read_bytes())
        save_map(pixels, (out / "maps" / name).with_suffix(".png"))
        category = row.get("category", "")
        new_rows.append(dict(file_name=name, category=category, split=args.split, source="human"))
    for row in old_rows:
        del row["image"], row["map"]
    write_lines(out / "meta.jsonl", old_rows + new_rows)
    print(f"{len(labels)} labels, {num_edited} of them edited, {num_left_out} images left out")
    print(f"{out} now holds {len(old_rows) + len(new_rows)}")


def pseudo(args):
    device = pick_device(args.device)
    detector = load_detector(args.detector, device)
    rows = read_unlabelled(args.images)
    labeled_names = set()
    for folder in args.exclude:
        labeled_names.update(row["file_name"] for row in read_meta(folder))
    rest = [row for row in rows if content_name(row["image"]) not in labeled_names]
    if not rest:
        sys.exit(f"every image of {args.images} is in {', '.join(args.exclude)} already")
    count = write_labelled(Path(args.out), diagnose(detector, rest, device), "pseudo")
    print(f"{count} pseudo labels: {args.out}; {len(rows) - count} images were labeled before")


def main(args):
    commands = dict(
        score=score, export_hard=export_hard, import_labels=import_labels, pseudo=pseudo
    )
    commands[args.command](args)


if __name__ == "__main__":
    args = parse_args()
    with readable_errors(args):
        main(args)
