"""Measures folders of images, whoever made them: metadata.jsonl with {"file_name", "text"} a line, and "prompt_id", "seed" if there are any.

Quality, the mean over prompts of the mean over a prompt's images:
  toy_pref      the toy world's preference reward, that runs train on
  toy_pref_b    another judge of the same taste, made from other data; never a training reward
  toy_clip      cosine of image and text of the toy world's CLIP
  toy_correct   share of images that show exactly what the caption says, by toy/oracle.py, which has no learned part; where it abstains the
                image counts as not correct, and the rate of that is told
  pick          PickScore
Diversity:
  dino_div      mean over prompts of the mean over pairs of the prompt's images of 1 - cos of their DINO features (the CLS token).
                --dino toy, or a ViT of the hub such as facebook/dino-vits16 (the paper's). Pixels are normalised as DINO's own
                preprocessor says (ImageNet); ImageReFL's release feeds it CLIP's. Compare figures of one extractor only.

Intervals: 95 %, bootstrap over prompts. If a folder has the prompts and seeds of the first one, its differences to it are paired by prompt.

  $ python evaluate.py images/base images/tuned --metrics toy_pref,toy_clip,toy_correct,dino_div --out results.json
"""
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import ViTModel
from transformers.utils import logging as transformers_logging

from common import REWARDS, TOY, Parser, PickScore, Reward, die, fetch, generator, nearest, pick_device, resize_and_normalise
from toy.oracle import correct
from toy.scenes import SIZE as TOY_SIZE
from toy.scenes import parse_caption

JUDGES = {**REWARDS, "toy_pref_b": Reward(lambda path, device: PickScore(TOY / "pref_b", TOY / "pref_b", device), 0., 10.)}
METRICS = [*JUDGES, "toy_correct", "dino_div"]


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders with images and metadata.jsonl; differences are to the first one")
    parser.add_argument("--metrics", required=True, help=f"comma-separated, of {', '.join(METRICS)}")
    parser.add_argument("--dino", help=f"toy, or a folder or hub id of a ViT (toy if all images are {TOY_SIZE} px, else facebook/dino-vits16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", help="write everything to this JSON file, with each prompt's value")
    args = parser.parse_args(argv)
    args.metrics = list(dict.fromkeys(m.strip() for m in args.metrics.split(",")))
    for name in args.metrics:
        if name not in METRICS:
            parser.error(f"--metrics {name}: no such metric; {nearest(name, METRICS)}")
    if len(set(map(os.path.realpath, args.folders))) < len(args.folders):
        parser.error("a folder is named twice")
    if args.out and (os.path.isdir(args.out) or not Path(args.out).absolute().parent.is_dir()):
        parser.error(f"--out {args.out}: the name of a file in a folder that exists is needed")
    return args


# ------------------------------------------------------------------------------------------------------------------------------------
# folders of images


def read_folder(folder):
    """metadata.jsonl -> rows dict(file_name, text, prompt_id, seed), sorted, so that their order in the file never matters.

    Without prompt_id images of the same text are one prompt; without seed there is no pairing (None).
    """
    path, rows = Path(folder) / "metadata.jsonl", []
    if not path.is_file():
        die(f"{folder}: no metadata.jsonl in it; combined_sample.py writes folders as they are expected here")
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                rows.append(dict(file_name=row["file_name"], text=row["text"], prompt_id=str(row.get("prompt_id", row["text"])), seed=row.get("seed")))
            except (ValueError, KeyError, TypeError, AttributeError):
                die(f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}, and "prompt_id", "seed" if there are any')
    texts = {}
    for row in rows:
        if not (Path(folder) / row["file_name"]).is_file():
            die(f"{folder}: {row['file_name']}, named in its metadata.jsonl, does not exist")
        if texts.setdefault(row["prompt_id"], row["text"]) != row["text"]:
            die(f"{path}: prompt_id {row['prompt_id']} has two texts, {texts[row['prompt_id']]!r} and {row['text']!r}")
    if not rows or len({row["file_name"] for row in rows}) < len(rows):
        die(f"{path}: " + ("a file is named twice" if rows else "no images in it"))
    return sorted(rows, key=lambda row: (row["prompt_id"], row["file_name"]))


def read_image(path):
    """(3, H, W) in [0, 1]; OSError if it cannot be read."""
    try:
        with Image.open(path) as f:
            return torch.from_numpy(np.array(f.convert("RGB"))).permute(2, 0, 1).float() / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise OSError(f"{path}: not a readable image ({type(e).__name__})") from e


def batches(folder, rows, batch=32):
    """Yields images (B, 3, H, W) in [0, 1] and their rows; a batch ends early where the images' size changes."""
    images, part = [], []
    for row in rows:
        image = read_image(Path(folder) / row["file_name"])
        if images and (len(images) == batch or image.shape != images[0].shape):
            yield torch.stack(images), part
            images, part = [], []
        images, part = images + [image], part + [row]
    yield torch.stack(images), part


def unpaired(first, rows):
    """Why the differences of two folders cannot be paired; None if they can: the same prompts, and the same seeds of each."""
    tables = []
    for each in (first, rows):
        if any(row["seed"] is None for row in each):
            return "a folder's metadata.jsonl has no seeds"
        tables.append({})
        for row in each:
            tables[-1].setdefault((row["prompt_id"], row["text"]), []).append(str(row["seed"]))
    same = sum(sorted(seeds) == sorted(tables[1].get(key, [])) for key, seeds in tables[0].items())
    return None if same == len(tables[0]) == len(tables[1]) else f"{same} of {len(tables[0])} and {len(tables[1])} prompts have the same text and seeds"


# ------------------------------------------------------------------------------------------------------------------------------------
# metrics


class Dino:
    """images (B, 3, H, W) in [0, 1] -> L2-normalised CLS token (B, D) of a ViT (Caron et al. 2021), preprocessed as its folder says."""

    def __init__(self, source, device):
        processor = json.loads(fetch(source, "preprocessor_config.json").read_text())
        size = processor["size"]                                          # {"height", "width"}, {"shortest_edge"} or, in old files, a number
        self.size = size.get("shortest_edge") or size["height"] if isinstance(size, dict) else size
        self.mean, self.std, self.device = processor["image_mean"], processor["image_std"], device
        repo, _, revision = source.partition("@")
        transformers_logging.set_verbosity_error()                        # its report of the pooler, that we leave out
        self.vit, info = ViTModel.from_pretrained(repo, revision=revision or "main", add_pooling_layer=False, dtype=torch.float32,
                                                  use_safetensors=True, output_loading_info=True)
        if info["missing_keys"]:                                          # transformers would go on with random weights
            die(f"--dino {source}: no ViT, or not all of its weights: {sorted(info['missing_keys'])[0]} is missing")
        self.vit.to(device).eval().requires_grad_(False)

    def __call__(self, images, prompts=None):
        pixels = resize_and_normalise(images.to(self.device), self.size, self.mean, self.std)
        return F.normalize(self.vit(pixels).last_hidden_state[:, 0], dim=-1)


def verdicts(images, prompts):
    """toy/oracle.py's verdicts: 1 correct, 0 not, nan where it abstains."""
    table = {True: 1., False: 0., None: float("nan")}
    return torch.tensor([table[correct(image, prompt)] for image, prompt in zip(images, prompts)])


def load_metric(name, device, dino="toy"):
    """A name of METRICS -> callable(images (B, 3, H, W) in [0, 1], prompts) -> scores (B,), or features (B, D) for dino_div."""
    if name == "toy_correct":
        return verdicts
    source = str(TOY / "dino") if dino == "toy" else dino
    folder = {"toy_pref": TOY / "pref", "toy_pref_b": TOY / "pref_b", "toy_clip": TOY / "clip"}.get(name)
    if folder and not (folder / "model.safetensors").is_file():
        die(f"--metrics {name}: its weights are missing, no {folder / 'model.safetensors'}; `python toy/make.py` makes them")
    try:
        return Dino(source, device) if name == "dino_div" else JUDGES[name].build(None, device)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        die(f"--metrics {name}: cannot load the weights{f' of {source}' if name == 'dino_div' else ''}: {(str(e).splitlines() or [type(e).__name__])[0]}")


@torch.no_grad()
def scores(metric, images, prompts, batch=32):
    """What a metric of load_metric says of images (N, 3, H, W) and their N prompts -> (N,) or (N, D), on the CPU."""
    device = getattr(metric, "device", None) or getattr(getattr(metric, "clip", None), "device", "cpu")
    return torch.cat([metric(images[i:i + batch].to(device), prompts[i:i + batch]).float().cpu() for i in range(0, len(prompts), batch)])


def prompt_means(values, prompt_ids):
    """values (N,), N prompt ids -> {id: mean over its images}."""
    groups = {}
    for value, p in zip(values.double().tolist(), prompt_ids, strict=True):
        groups.setdefault(p, []).append(value)
    return {p: sum(group) / len(group) for p, group in groups.items()}


def dino_diversity(features, prompt_ids):
    """features (N, D), N prompt ids -> {id: mean of 1 - cos over the pairs of its images}; prompts with one image have none and are absent."""
    groups, features = {}, F.normalize(features.double(), dim=-1)
    for i, p in enumerate(prompt_ids):
        groups.setdefault(p, []).append(i)
    pairs = {p: torch.triu_indices(len(group), len(group), 1) for p, group in groups.items() if len(group) > 1}
    return {p: 1 - (features[groups[p]] @ features[groups[p]].T)[tuple(ij)].mean().item() for p, ij in pairs.items()}


def interval(values, resamples=2000):
    """Per-prompt values -> (mean, low, high), the 95 % bootstrap interval over prompts; always the same draws for the same count."""
    values = torch.tensor(list(values), dtype=torch.float64)
    means = values[torch.randint(len(values), (resamples, len(values)), generator=generator(0, "bootstrap"))].mean(1)
    return values.mean().item(), *means.quantile(torch.tensor([.025, .975], dtype=torch.float64)).tolist()


def summary(per_prompt):
    """{id: value} -> dict(mean, low, high, prompts, per_prompt); the mean is None if there is no prompt."""
    mean, low, high = interval(per_prompt.values()) if per_prompt else (None, None, None)
    return dict(mean=mean, low=low, high=high, prompts=len(per_prompt), per_prompt=per_prompt)


def summarise(name, values, prompt_ids):
    """What `scores` returned for a metric -> its summary; with it toy_correct's rate of abstentions, dino_div's one-image prompts."""
    if name != "toy_correct" and not values.isfinite().all():
        raise FloatingPointError(f"--metrics {name}: scores are not finite; its weights are broken")
    if name == "dino_div":
        per_prompt = dino_diversity(values, prompt_ids)
        return dict(summary(per_prompt), left_out=len(set(prompt_ids)) - len(per_prompt))
    result = summary(prompt_means(values.nan_to_num(0.) if name == "toy_correct" else values, prompt_ids))
    if name == "toy_correct":
        abstained = prompt_means(values.isnan(), prompt_ids).values()
        result["abstained"] = sum(abstained) / len(abstained)
    return result


def measure(folders, metrics):
    """folders: {name: rows of read_folder}, metrics: {name: callable of load_metric} -> dict(folders={folder: {metric: summary}},
    differences={folder: {metric: summary}} to the first folder, not_paired={folder: why not})."""
    first, results = next(iter(folders)), dict(folders={}, differences={}, not_paired={})
    with tqdm(total=sum(map(len, folders.values())), desc="images", unit="image") as bar:
        for folder, rows in folders.items():
            values = {name: [] for name in metrics}
            for images, part in batches(folder, rows):
                for name, metric in metrics.items():
                    values[name].append(scores(metric, images, [row["text"] for row in part]))
                bar.update(len(part))
            own = {name: summarise(name, torch.cat(values[name]), [row["prompt_id"] for row in rows]) for name in metrics}
            results["folders"][folder], its = own, results["folders"].get(first)
            if reason := unpaired(folders[first], rows):
                results["not_paired"][folder] = reason
            elif folder != first:
                results["differences"][folder] = {m: summary({p: v - its[m]["per_prompt"][p] for p, v in own[m]["per_prompt"].items()}) for m in metrics}
    return results


def main(args):
    device, folders = pick_device(args.device), {folder: read_folder(folder) for folder in args.folders}
    try:
        for text in {row["text"] for rows in folders.values() for row in rows} if "toy_correct" in args.metrics else ():
            parse_caption(text)
    except ValueError as e:
        die(f"--metrics toy_correct: {e}")
    try:
        firsts = [read_image(Path(folder) / rows[0]["file_name"]) for folder, rows in folders.items()]
        dino = args.dino or ("toy" if all(image.shape[1:] == (TOY_SIZE, TOY_SIZE) for image in firsts) else "facebook/dino-vits16")
        results = measure(folders, {name: load_metric(name, device, dino) for name in args.metrics})
    except (OSError, FloatingPointError) as e:                            # an image, a metric: the message names it
        die(e)
    report(results, folders, dino)
    if args.out:
        tmp = Path(args.out + ".tmp")
        tmp.write_text(json.dumps(dict(dino=dino if "dino_div" in args.metrics else None, first=args.folders[0], **results), indent=1) + "\n")
        tmp.replace(args.out)


def report(results, folders, dino):
    """The aligned table: mean [95 % interval over prompts], then the paired differences to the first folder, then what must be said."""
    first = next(iter(folders))
    metrics = list(results["folders"][first])

    def table(title, part):
        rows = [[title, "images", "prompts", *metrics]]
        for folder, own in part.items():
            cells = ["-" if s["mean"] is None else f"{s['mean']:.4f} [{s['low']:.4f}, {s['high']:.4f}]" for s in own.values()]
            rows.append([folder, str(len(folders[folder])), str(len({row["prompt_id"] for row in folders[folder]})), *cells])
        widths = [max(map(len, column)) for column in zip(*rows)]
        print(*("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows), "", sep="\n")

    table("folder", results["folders"])
    if results["differences"]:
        table(f"minus {first}", results["differences"])
    for folder, own in results["folders"].items():
        if folder in results["not_paired"] and len(folders) > 1:
            print(f"{folder}: no paired differences to {first}: {results['not_paired'][folder]}")
        if left_out := own.get("dino_div", {}).get("left_out"):
            print(f"{folder}: {left_out} of {left_out + own['dino_div']['prompts']} prompts have one image, and are left out of dino_div")
        if "toy_correct" in own:
            print(f"{folder}: the oracle abstained on {own['toy_correct']['abstained']:.1%} of the images: counted as not correct")
    if "dino_div" in metrics:
        print(f"dino_div: features of {dino}")


if __name__ == "__main__":
    main(parse_args())
