"""Measures folders of images: quality, diversity, artifacts, and drift from the base model.

A folder holds images and a metadata.jsonl with one line per image:

  {"file_name": "00000_00.png", "text": "a red star", "prompt_id": 0, "seed": 0}

"prompt_id" and "seed" are optional. combined_sample.py writes such folders, but the images can come
from anywhere. They are read as 8-bit RGB, upright as their EXIF tag says; transparency is dropped.
A colon sets the weights of a metric, for example hps:FILE or mps:FOLDER. Your own metric is
FILE.py:NAME, a function or class as --reward takes it: see rewards.py.

Quality: the mean over prompts of the mean over the images of a prompt
  hps pick clip clip_h    HPSv2.1, PickScore, and CLIPScore of ViT-B/32 and ViT-H/14. All but
                          PickScore are cosines; ImageReFL's tables show them times 100
  imagereward             ImageReward; imagereward_raw is the same without its normalization
  aesthetic               LAION's aesthetic predictor, which ignores the prompt, from 1 to 10
  mps                     MPS, condition "overall", with the threshold 0.01 for text tokens, as in
                          ImageReFL; mps_0.3 has the threshold of its authors' evaluation. We choose
                          the tokens for each image, ImageReFL's code for each batch
  toy_pref toy_clip       the rewards of the toy world
  toy_pref_b              a second judge with the same taste, which no training run ever sees
  toy_correct             the share of images that show what the caption says. toy/oracle.py reads
                          them and has no learned parts. If it abstains, the image counts as not
                          correct. We print how often that happens

Diversity
  dino_div                1 - cosine of the DINO features of two images, averaged over the pairs of
                          images of a prompt, then over prompts. Values from different --dino
                          networks are not comparable. The network's own image processor prepares
                          the images, while ImageReFL's code normalizes them as for CLIP

Distance to the images of --reference, over all images and therefore without an interval
  fid                     Frechet distance of Inception features, with pytorch-fid's weights. It
                          needs more than 2,048 images on both sides
  frechet_toy             the same distance of toy/dino features, so it is not FID
  cov_dist log_cov_dist   our own definition, as there is no public one. Let l and m be the sorted
                          eigenvalues of the covariances of the two sets of DINO features:
                          sqrt(sum (l_i - m_i)^2), and mean |log l_i - log m_i|

Artifacts
  artifact_mean           the confidence of --detector that something is wrong, in [0, 1]: its
  artifact_max            mean or its maximum over the pixels of an image

Drift: the first folder against each of the others, image by image for the same prompt and seed
  drift                   PSNR in dB (100 for identical images) and 1 - cosine of DINO features

Intervals are 95% bootstrap intervals over prompts. If a folder has the same prompts and seeds as
the first one, we also print its differences from the first, paired by prompt. Features are cached
in FOLDER/.evaluate, and computed again if the images, prompts, weights or this code change. The
scores of your own metrics are not cached, because we cannot see all that they depend on.

  $ python evaluate.py images/base images/tuned --metrics toy_pref,toy_correct --html page.html
  $ python evaluate.py --over_steps runs/refl-toy-toy_pref --metrics toy_pref,dino_div --plot a.png
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoImageProcessor, ViTModel
from transformers.utils import logging as transformers_logging

from common import ROOT, TOY, generator, load_model, pick_device
from data.images import open_image, read_row, to_tensor
from data.prompts import encode_once, read_prompts
from judges.clip import PickScore
from judges.detector import load_detector
from judges.imagereward import ImageReward
from judges.mps import MPS
from judges.weights import UNREADABLE, explain, find_file, load_complete
from models.hub import split_revision
from models.lora import load_lora
from pages.make import comparison_page, data_uri, some_of
from rewards import OwnReward, build_reward, is_own, split_own
from run_folder import check_ranges, gather, generate_batches, is_main_process, joined_processes
from run_folder import own_part, readable_errors, settings_parser, to_pil, wait_for_all
from run_folder import write_atomically
from toy.oracle import correct
from toy.scenes import SIZE as TOY_SIZE
from toy.scenes import parse_caption

# transformers would warn about weights that we do not use. load_complete checks them instead.
transformers_logging.set_verbosity_error()

QUALITY = (
    "hps", "pick", "imagereward", "imagereward_raw", "mps", "mps_0.3", "aesthetic", "clip",
    "clip_h", "toy_pref", "toy_pref_b", "toy_clip", "toy_correct",
)
ARTIFACTS = ("artifact_mean", "artifact_max")  # the two columns of the detector's values
DISTANCES = ("fid", "frechet_toy", "cov_dist", "log_cov_dist")

# Every metric, and the network whose output it is computed from. A judge of quality gives one
# score per image, so the metric is the network itself.
NETWORK = {
    **{name: name for name in QUALITY},
    "dino_div": "dino",
    "artifact_mean": "detector",
    "artifact_max": "detector",
    "fid": "inception",
    "frechet_toy": "dino",
    "cov_dist": "dino",
    "log_cov_dist": "dino",
    "drift": "dino",
}
# Networks of the toy world, and their folders under toy/.
TOY_FOLDER = {
    "toy_pref": "pref",
    "toy_pref_b": "pref_b",
    "toy_clip": "clip",
    "dino": "dino",
    "detector": "detector",
}
# What a web page shows at most: images of a prompt in a folder, and images in total.
PAGE_SEEDS = 4
PAGE_IMAGES = 800
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def parse_args(argv=None):
    parser = settings_parser("evaluate", __doc__)
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="folders of images; the first is the baseline")
    add("--metrics", required=True, help="metrics from the list above, separated by commas")
    add("--reference", help=f"folder of images to compare with, for {', '.join(DISTANCES)}")
    add("--dino", help="toy, or a ViT; by default facebook/dino-vits16, or toy for toy images")
    add("--detector", help="artifact detector; by default toy/detector for toy images")
    add("--over_steps", metavar="RUN", help="sample and measure every snapshot of this run")
    add("--prompts", help="prompts for --over_steps; by default the run's --test_prompts")
    add("--num_images", type=int, default=4, help="images per prompt for --over_steps")
    add("--batch_size", type=int, default=32, help="images processed at a time")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", help="write all results, with a value per prompt, to this JSON file")
    add("--html", help="write the tables and images, side by side, to this web page")
    add("--plot", help="PNG: quality against diversity; with --over_steps, metrics over steps")
    args = parser.parse_args(argv)
    check_ranges(args)

    args.metrics = split_metrics(args.metrics)
    distances = [name for name in args.metrics if name in DISTANCES]
    if bool(args.folders) == bool(args.over_steps):
        sys.exit("pass either folders of images or --over_steps RUN")
    if len({os.path.realpath(folder) for folder in args.folders}) < len(args.folders):
        sys.exit("a folder is given twice")
    if distances and not args.reference:
        sys.exit(f"--metrics {distances[0]} needs --reference, a folder of images to compare with")
    if "drift" in args.metrics and len(args.folders) == 1:
        sys.exit("--metrics drift needs two folders with the same prompts and seeds")
    has_y = any(is_quality(name) or name in ARTIFACTS for name in args.metrics)
    has_x = any(name == "dino_div" or name in DISTANCES for name in args.metrics)
    if args.plot and not args.over_steps and not (has_x and has_y):
        sys.exit("--plot needs a metric of quality or artifacts, and one of diversity or distance")
    for path in (args.out, args.html, args.plot):
        if path and not Path(path).absolute().parent.is_dir():
            sys.exit(f"{path}: there is no folder {Path(path).parent} to write this file to")
    return args


def split_metrics(text):
    """ "toy_pref,hps:FILE" -> {"toy_pref": "", "hps": "FILE"}. FILE.py:NAME is a name itself."""
    metrics = {}
    for item in text.split(","):
        item = item.strip()
        if is_own(item):
            split_own(item)  # exits if there is no such file
            metrics[item] = ""
            continue
        name, _, path = item.partition(":")
        if name not in NETWORK:
            sys.exit(f"--metrics {name}: no such metric. Choose from {', '.join(NETWORK)}")
        if path and NETWORK[name] in ("dino", "detector", "toy_correct"):
            sys.exit(f"--metrics {name}:{path}: {name} takes no path; see --dino and --detector")
        if path and not os.path.exists(path):
            sys.exit(f"--metrics {name}:{path}: {path} does not exist")
        metrics[name] = path
    return metrics


def network_of(metric):
    """The network that a metric is computed from. Your own metric is its own network."""
    return metric if is_own(metric) else NETWORK[metric]


def is_quality(metric):
    return metric in QUALITY or is_own(metric)


# --------------------------------------------------------------------------------------------------
# Metrics


def prompt_means(values, prompt_ids):
    """Values (N,) and the prompt ids of the N images -> {prompt id: mean over its images}."""
    groups = {}
    for value, prompt_id in zip(values.double().tolist(), prompt_ids, strict=True):
        groups.setdefault(prompt_id, []).append(value)
    return {prompt_id: sum(group) / len(group) for prompt_id, group in groups.items()}


def dino_diversity(features, prompt_ids):
    """Features (N, D) of N images -> {prompt id: mean of 1 - cos over the pairs of its images}.

    A prompt with one image has no pairs and is left out.
    """
    features = F.normalize(features.double(), dim=-1)
    groups = {}
    for i, prompt_id in enumerate(prompt_ids):
        groups.setdefault(prompt_id, []).append(i)
    diversity = {}
    for prompt_id, group in groups.items():
        if len(group) > 1:
            cosines = features[group] @ features[group].T
            i, j = torch.triu_indices(len(group), len(group), offset=1)
            diversity[prompt_id] = 1 - cosines[i, j].mean().item()
    return diversity


def frechet(a, b):
    """Frechet distance of features a (N, D) and b (M, D), in float64 (Heusel et al. 2017, Eq. 6).

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), where S are the covariances. The root
    has the same trace as the root of the symmetric matrix S_a^1/2 S_b S_a^1/2.
    """
    a = a.double()
    b = b.double()
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    # Rounding makes some eigenvalues slightly negative. We treat those as zero.
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum()
    mean_distance = (a.mean(0) - b.mean(0)).square().sum()
    distance = mean_distance + cov_a.trace() + cov_b.trace() - 2 * trace_of_root
    return max(0.0, distance.item())


def covariance_distances(a, b, floor=1e-8):
    """Features a (N, D) and b (M, D) -> (cov_dist, log_cov_dist), as defined at the top.

    The features are normalized first. Eigenvalues below `floor` are rounding errors. ImageReFL
    reports such distances without a formula or code. Of the readings that we tried, this one fits
    the range of its tables best (results/metrics.md).
    """
    l = torch.linalg.eigvalsh(F.normalize(a.double(), dim=-1).T.cov())
    m = torch.linalg.eigvalsh(F.normalize(b.double(), dim=-1).T.cov())
    cov_dist = (l - m).square().sum().sqrt()
    log_cov_dist = (l.clamp(min=floor).log() - m.clamp(min=floor).log()).abs().mean()
    return cov_dist.item(), log_cov_dist.item()


def interval(values, resamples=2000):
    """One value per prompt -> (mean, low, high), with the 95% bootstrap interval over prompts.

    The draws depend only on the number of prompts, so the same values give the same interval.
    """
    values = torch.tensor(values, dtype=torch.float64)
    size = (resamples, len(values))
    picks = torch.randint(len(values), size, generator=generator(0, "bootstrap"))
    means = values[picks].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.mean().item(), low, high


# --------------------------------------------------------------------------------------------------
# Folders of images


def read_folder(folder):
    """metadata.jsonl -> rows dict(file_name, text, prompt_id, seed), sorted.

    Without "prompt_id", all images with the same text belong to one prompt. seed may be None.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        sys.exit(f"{folder}: no metadata.jsonl in it; combined_sample.py writes such folders")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        sys.exit(f"{path}: not UTF-8 text")
    rows = []
    # Not splitlines(), because a caption may contain U+2028.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = read_row(line, Path(folder))
        except ValueError as error:
            sys.exit(f"{path} line {number}: {error}")
        text = values["text"]
        prompt_id = str(values.get("prompt_id", text))
        seed = values.get("seed")
        row = dict(file_name=values["file_name"], text=text, prompt_id=prompt_id, seed=seed)
        rows.append(row)
    check_rows(path, rows)
    # The order of the lines in the file must not matter.
    rows.sort(key=lambda row: (row["prompt_id"], str(row["seed"]), row["file_name"]))
    return rows


def check_rows(path, rows):
    """Exits if there are no rows, a file is listed twice, or a prompt has two texts."""
    if not rows:
        sys.exit(f"{path}: it lists no images")
    if len({row["file_name"] for row in rows}) < len(rows):
        sys.exit(f"{path}: a file is listed twice")
    text_of = {}
    for row in rows:
        text = text_of.setdefault(row["prompt_id"], row["text"])
        if text != row["text"]:
            texts = f"{text!r} and {row['text']!r}"
            sys.exit(f"{path}: prompt_id {row['prompt_id']} has two texts, {texts}")


def read_batches(folder, rows, batch_size):
    """Yields images (B, 3, H, W) in [0, 1] and their rows.

    A batch also ends where the size of the images changes.
    """
    images = []
    rows_in_batch = []
    for row in rows:
        image = to_tensor(open_image(Path(folder) / row["file_name"]))
        is_full = len(images) == batch_size
        if images and (is_full or image.shape != images[0].shape):
            yield torch.stack(images), rows_in_batch
            images = []
            rows_in_batch = []
        images.append(image)
        rows_in_batch.append(row)
    yield torch.stack(images), rows_in_batch


def prompt_ids_of(rows):
    return [row["prompt_id"] for row in rows]


def seeds_per_prompt(rows):
    """Rows -> {(prompt id, text): its sorted seeds}. ValueError if there are no seeds."""
    seeds = {}
    for row in rows:
        if row["seed"] is None:
            raise ValueError("a folder's metadata.jsonl has no seeds")
        seeds.setdefault((row["prompt_id"], row["text"]), []).append(str(row["seed"]))
    return {prompt: sorted(group) for prompt, group in seeds.items()}


def check_pairs(first, other):
    """ValueError unless the rows of two folders have the same prompts with the same seeds."""
    a = seeds_per_prompt(first)
    b = seeds_per_prompt(other)
    if a != b:
        num_same = sum(a[prompt] == b.get(prompt) for prompt in a)
        counts = f"{num_same} of {len(a)} and {len(b)}"
        raise ValueError(f"{counts} prompts have the same text and seeds")


# --------------------------------------------------------------------------------------------------
# Networks: images (B, 3, H, W) in [0, 1] and B prompts -> scores (B,) or features (B, D)


class Dino:
    """The L2-normalized CLS token (B, D) of a ViT (Caron et al. 2021).

    The network's own image processor prepares the images. DINO's squashes them into a square.
    """

    def __init__(self, source, device):
        repo, revision = split_revision(source)
        self.processor = AutoImageProcessor.from_pretrained(
            repo, revision=revision or "main", trust_remote_code=False
        )
        unused = ("pooler.", "classifier.")
        vit = load_complete(ViTModel, source, unused=unused, add_pooling_layer=False)
        self.vit = vit.to(device)

    def __call__(self, images, prompts=None):
        # Processors are made for 8-bit images, as files have them.
        bytes_of_images = (images * 255).round().to(torch.uint8)
        pixels = self.processor(bytes_of_images, return_tensors="pt").pixel_values
        cls_token = self.vit(pixels).last_hidden_state[:, 0]
        return F.normalize(cls_token, dim=-1)


class Inception:
    """The pool3 features (B, 2048) of pytorch-fid's InceptionV3, which published FIDs use.

    path: a copy of its weights; by default they are downloaded once.
    """

    def __init__(self, path, device):
        from pytorch_fid import inception  # an optional package, which only FID needs

        if not path:
            path = download_inception()
        # We load the weights ourselves: pytorch-fid would unpickle whatever it downloads.
        content = Path(path).read_bytes()
        if hashlib.sha256(content).hexdigest() != INCEPTION_SHA256:
            raise ValueError(f"{path} is not pytorch-fid's file: its sha256 differs")
        state = torch.load(path, map_location="cpu", weights_only=True)

        def our_weights(url, progress):
            return state

        inception.load_state_dict_from_url = our_weights
        self.net = inception.InceptionV3().to(device).eval()

    def __call__(self, images, prompts=None):
        return self.net(images)[0].flatten(1)


def download_inception():
    """The path of pytorch-fid's weights in torch's cache, downloaded if necessary."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, path, hash_prefix=INCEPTION_SHA256)
        except OSError as error:
            advice = "If you have the file already, pass fid:FILE"
            raise OSError(f"cannot download {INCEPTION_URL} ({error}). {advice}") from error
    return path


def artifacts(source, device):
    """A detector -> a network whose values (B, 2) are the mean and maximum of its confidence."""
    detector = load_detector(source, device)

    def mean_and_max(images, prompts=None):
        confidence = detector(images).flatten(1)
        return torch.stack([confidence.mean(1), confidence.amax(1)], 1)

    return mean_and_max


def verdicts(images, prompts):
    """toy/oracle.py's verdicts (B,): 1 if correct, 0 if not, NaN where it abstains."""
    value_of = {True: 1.0, False: 0.0, None: float("nan")}
    values = []
    for image, prompt in zip(images.cpu(), prompts):
        values.append(value_of[correct(image, prompt)])
    return torch.tensor(values)


def build_network(name, source, device):
    """A value of NETWORK, and its weights (None: the published ones) -> the network."""
    if name == "dino":
        return Dino(source, device)
    if name == "detector":
        return artifacts(source, device)
    if name == "inception":
        return Inception(source, device)
    if name == "mps_0.3":
        file = find_file(source, ["model.safetensors"], "RE-N-Y/mpsv1")
        return MPS(file, device, threshold=0.3, dtype=torch.float32)
    if name == "toy_correct":
        return verdicts
    if name == "toy_pref_b":
        return PickScore(source, source, device, dtype=torch.float32)
    if name == "imagereward_raw":
        file = find_file(source, ["ImageReward.pt"], "THUDM/ImageReward")
        return ImageReward(file, device, dtype=torch.float32, raw=True)
    # Measuring wants more digits than training: fp32 on every device, and no TF32 (see main).
    return build_reward(name, source, device, torch.float32)


def load_network(name, source, device):
    if is_own(name):
        return OwnReward(*split_own(name), device)
    try:
        return build_network(name, source or None, device)
    except (*UNREADABLE, ImportError) as error:
        what = "cannot load its weights"
        if source and not os.path.exists(source):
            what = f"{source} is no file or folder here, nor a hub model that we can reach"
        sys.exit(f"{name}: {what}. {explain(error)}")


# --------------------------------------------------------------------------------------------------
# Features, with a cache on disk


def file_state(path):
    """A file's name, size and time, which change when it is written again."""
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def fingerprint(name, source, device, folder, rows):
    """A hash of what cached features depend on: images, texts, weights, device and code."""
    weights = []
    if source and os.path.isfile(source):
        weights = [Path(source)]
    elif source:
        weights = [path for path in sorted(Path(source).glob("*")) if path.is_file()]
    code = []
    files = ["evaluate.py", "rewards.py", "data/images.py", "toy/oracle.py", "toy/scenes.py"]
    files += sorted((ROOT / "judges").glob("*.py"))
    for file in files:
        code.append((ROOT / file).read_bytes())
    images = []
    for row in rows:
        path = Path(folder) / row["file_name"]
        images.append((row["text"], row["file_name"], file_state(path)))
    weight_files = [file_state(path) for path in weights]
    content = repr((name, str(source), device.type, weight_files, code, images))
    return hashlib.sha256(content.encode()).hexdigest()


def read_cache(path, key):
    """The features cached under this key, or None."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") == key:
                return file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        print(f"{path}: not readable ({explain(error)}), so we recompute these features")
    return None


def write_cache(path, features, key):
    """Caches the features for the next evaluation. A read-only folder is not an error."""
    # Several evaluations may share a reference, so each first writes its own file.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({"features": features.contiguous()}, temporary, {"key": key})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        print(f"{path}: cannot write here, so the features are not cached ({error})")


def compute_features(network, name, folder, rows, device, batch_size):
    """A network's values (N, ...) for all images of a folder, on the CPU."""
    parts = []
    # Under torchrun, each process takes its part of the images; alone, this process takes all.
    own_rows = own_part(rows)
    label = f"{name} of {folder}"
    is_quiet = not is_main_process()
    with tqdm(total=len(own_rows), desc=label, unit="image", disable=is_quiet) as progress:
        for images, rows_in_batch in read_batches(folder, own_rows, batch_size):
            prompts = [row["text"] for row in rows_in_batch]
            parts.append(network(images.to(device), prompts).float().cpu())
            progress.update(len(images))
    features = gather(torch.cat(parts), len(rows))
    # Only the oracle may return NaN, when it abstains.
    if name != "toy_correct" and not features.isfinite().all():
        sys.exit(f"{name}: its values for {folder} are not finite. Are its weights broken?")
    return features


@torch.no_grad()
def features_of(folders, names, sources, device, batch_size):
    """{folder: rows} and the names of networks -> {(folder, name): values (N, ...)}."""
    table = {}
    for name in names:
        # Load a network when the first folder needs it. Only one is in memory at a time.
        network = None
        for folder, rows in folders.items():
            # We cannot see all files that your own metric reads, so it is never cached.
            features = None
            if not is_own(name):
                key = fingerprint(name, sources[name], device, folder, rows)
                cache = Path(folder) / ".evaluate" / f"{name}.safetensors"
                features = read_cache(cache, key)
            if features is None:
                if network is None:
                    network = load_network(name, sources[name], device)
                features = compute_features(network, name, folder, rows, device, batch_size)
                if is_main_process() and not is_own(name):
                    write_cache(cache, features, key)
            table[folder, name] = features
    return table


# --------------------------------------------------------------------------------------------------
# Measuring


def summarize_prompts(per_prompt):
    """{prompt id: value} -> dict(mean, low, high, prompts, per_prompt).

    Without prompts, the mean is None. With fewer than two, there is no interval.
    """
    mean = low = high = None
    if per_prompt:
        mean, low, high = interval(list(per_prompt.values()))
    if len(per_prompt) < 2:
        low = high = None
    return dict(mean=mean, low=low, high=high, prompts=len(per_prompt), per_prompt=per_prompt)


def summarize_distance(name, features, reference, num_prompts):
    """Features (N, D) of a folder and (M, D) of the reference -> a summary without an interval."""
    num_images = min(len(features), len(reference))
    if num_images < 2:
        sys.exit(f"--metrics {name}: one image has no covariance; there must be two or more")
    if name in ("fid", "frechet_toy"):
        distance = frechet(features, reference)
    else:
        cov_dist, log_cov_dist = covariance_distances(features, reference)
        distance = log_cov_dist if name == "log_cov_dist" else cov_dist
    # With fewer images than dimensions, a covariance does not have full rank and means little.
    full_rank = num_images > features.shape[1]
    return dict(
        mean=distance, low=None, high=None, prompts=num_prompts, per_prompt={}, full_rank=full_rank
    )


def summarize(name, values, prompt_ids, reference=None):
    """A metric from the values (N, ...) of its network -> its summary for one folder."""
    num_prompts = len(set(prompt_ids))
    if name in DISTANCES:
        return summarize_distance(name, values, reference, num_prompts)
    if name == "dino_div":
        summary = summarize_prompts(dino_diversity(values, prompt_ids))
        summary["left_out"] = num_prompts - summary["prompts"]
        return summary
    if name == "toy_correct":
        summary = summarize_prompts(prompt_means(values.nan_to_num(0.0), prompt_ids))
        abstained = prompt_means(values.isnan(), prompt_ids).values()
        summary["abstained"] = sum(abstained) / len(abstained)
        return summary
    if name in ARTIFACTS:
        values = values[:, ARTIFACTS.index(name)]
    return summarize_prompts(prompt_means(values, prompt_ids))


def difference(own, baseline):
    """Two summaries of a metric for the same prompts -> the summary of own - baseline."""
    if own["mean"] is not None and not own["per_prompt"]:
        return {**own, "mean": own["mean"] - baseline["mean"]}
    per_prompt = {}
    for prompt_id, value in own["per_prompt"].items():
        per_prompt[prompt_id] = value - baseline["per_prompt"][prompt_id]
    return summarize_prompts(per_prompt)


@torch.no_grad()
def drift(first, other, dino, device, batch_size):
    """Two (folder, rows) whose images correspond -> dict(psnr, dino) of summaries.

    psnr = -10 log10(mean squared error), at most 100 dB;  dino = 1 - cos of the features.
    """
    psnr = []
    dino_distance = []
    batches = zip(read_batches(*first, batch_size), read_batches(*other, batch_size))
    for (a, rows_in_batch), (b, _) in batches:
        if a.shape != b.shape:
            name = rows_in_batch[0]["file_name"]
            raise OSError(f"--metrics drift: from {name} on, {other[0]} has other image sizes")
        mse = (a - b).double().square().mean((1, 2, 3))
        psnr.append(-10 * mse.clamp(min=1e-10).log10())
        cosine = (dino(a.to(device)) * dino(b.to(device))).sum(-1)
        dino_distance.append(1 - cosine.cpu())
    prompt_ids = prompt_ids_of(first[1])
    return {
        "psnr": summarize_prompts(prompt_means(torch.cat(psnr), prompt_ids)),
        "dino": summarize_prompts(prompt_means(torch.cat(dino_distance), prompt_ids)),
    }


def measure(folders, metrics, sources, device, reference=None, batch_size=32):
    """Computes all metrics of all folders.

    folders: {folder: rows of read_folder}, the first one being the baseline
    sources: {network: its weights}
    reference: the same as folders, with one entry, for DISTANCES

    Returns four dicts by folder: folders {metric: summary}, differences {metric: summary} from the
    first folder, not_paired (why there are none), and drift {"psnr", "dino": summary}.
    """
    first = next(iter(folders))
    results = dict(folders={}, differences={}, not_paired={}, drift={})
    for folder, rows in folders.items():
        try:
            check_pairs(folders[first], rows)
        except ValueError as error:
            if "drift" in metrics:
                sys.exit(f"--metrics drift: {folder} does not pair with {first}: {error}")
            results["not_paired"][folder] = str(error)

    # Run every network once over every folder, and over the reference if it is needed.
    names = [name for name in metrics if name != "drift"]
    networks = list(dict.fromkeys(network_of(name) for name in names))
    features = features_of(folders, networks, sources, device, batch_size)
    of_reference = {}
    if any(name in DISTANCES for name in names):
        (reference_folder,) = reference
        networks = list(dict.fromkeys(network_of(name) for name in names if name in DISTANCES))
        table = features_of(reference, networks, sources, device, batch_size)
        of_reference = {name: table[reference_folder, name] for name in networks}

    # Compute the metrics from these values, and the differences from the first folder.
    for folder, rows in folders.items():
        own = {}
        for name in names:
            network = network_of(name)
            values = features[folder, network]
            own[name] = summarize(name, values, prompt_ids_of(rows), of_reference.get(network))
        results["folders"][folder] = own
        if folder != first and folder not in results["not_paired"]:
            baseline = results["folders"][first]
            results["differences"][folder] = {
                name: difference(own[name], baseline[name]) for name in names
            }

    # Drift reads the images again, because it compares pixels.
    if "drift" in metrics:
        dino = load_network("dino", sources["dino"], device)
        for folder in list(folders)[1:]:
            pair = ((first, folders[first]), (folder, folders[folder]))
            results["drift"][folder] = drift(*pair, dino, device, batch_size)
    return results


# --------------------------------------------------------------------------------------------------
# The snapshots of a run


def read_run(run):
    """A run folder -> its config, and {step: folder of the snapshot}, sorted."""
    path = run / "config.json"
    if not path.is_file():
        sys.exit(f"--over_steps {run}: not a run folder, because it has no config.json")
    config = json.loads(path.read_text())
    if not config.get("sampler"):
        sys.exit(f"--over_steps {run}: its config.json names no sampler, so we cannot sample it")
    snapshots = {}
    for folder in (run / ("lora" if config["lora_rank"] else "model")).glob("step_*"):
        snapshots[int(folder.name.removeprefix("step_"))] = folder
    if not snapshots:
        sys.exit(f"--over_steps {run}: no snapshots; training saves one every --save_every updates")
    return config, dict(sorted(snapshots.items()))


def load_snapshot(model, folder, lora_rank):
    """Loads the weights of a snapshot into the model, replacing those of the last one."""
    if lora_rank:
        load_lora(model, folder)
        return
    denoiser = type(model.denoiser).from_pretrained(
        folder / model.denoiser_name, torch_dtype=model.dtype, use_safetensors=True
    )
    model.denoiser.load_state_dict(denoiser.state_dict())


def sample_folder(model, prompts, sampler, num_images, out, settings):
    """Samples a folder of images, all or nothing. settings.json records how."""
    temporary = out.with_name(out.name + ".tmp")
    if is_main_process():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait_for_all()

    rows = []
    for i, prompt in enumerate(prompts):
        for k in range(num_images):
            rows.append(dict(file_name=f"{i:05d}_{k:02d}.png", text=prompt, prompt_id=i, seed=0))
    # generate_batches makes this process's part of the images, in the same order.
    own_rows = iter(own_part(rows))
    total = len(own_part(rows))
    with tqdm(total=total, desc=f"{out}", unit="image", disable=not is_main_process()) as progress:
        for images in generate_batches(model, prompts, 0, sampler, num_images, micro_batch=4):
            for image in images:
                to_pil(image).save(temporary / next(own_rows)["file_name"])
            progress.update(len(images))
    wait_for_all()

    if is_main_process():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (temporary / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        (temporary / "settings.json").write_text(settings)
        shutil.rmtree(out, ignore_errors=True)
        temporary.replace(out)
    wait_for_all()


def sample_snapshots(run, prompts_file, num_images, device):
    """Samples the base model (step 0) and every snapshot of a run -> {folder of images: step}.

    All use the same prompts and noise, and the sampler from the run's config.json. The images go to
    RUN/over_steps/step_000060 and so on. Existing images are not sampled again.
    """
    run = Path(run)
    config, snapshots = read_run(run)
    prompts_file = prompts_file or config.get("test_prompts")
    if not prompts_file:
        sys.exit(f"--over_steps {run}: the run had no --test_prompts file; pass --prompts")
    prompts = read_prompts(prompts_file)
    model = None
    folders = {}
    for step, snapshot in {0: None, **snapshots}.items():
        out = run / "over_steps" / f"step_{step:06d}"
        folders[str(out)] = step
        files = []
        if snapshot:
            files = [file_state(path) for path in sorted(snapshot.rglob("*.safetensors"))]
        settings = dict(
            sampler=config["sampler"],
            model=config["model"],
            resolution=config["resolution"],
            prompts=prompts,
            num_images=num_images,
            weights=files,
        )
        settings = json.dumps(settings)
        done = out / "settings.json"
        if done.is_file() and done.read_text() == settings:
            continue
        if model is None:
            model = load_model(config["model"], device, config["resolution"])
            encode_once(model, prompts)
        # Step 0 comes first, while the model is still the base model.
        if snapshot:
            load_snapshot(model, snapshot, config["lora_rank"])
        sample_folder(model, prompts, config["sampler"], num_images, out, settings)
    return folders


# --------------------------------------------------------------------------------------------------
# Tables and plots


def format_cell(summary):
    """The mean and, in brackets, its interval."""
    if summary["mean"] is None:
        return "-"
    text = f"{summary['mean']:.4f}"
    if summary["low"] is not None:
        text += f" [{summary['low']:.4f}, {summary['high']:.4f}]"
    return text


def table_of(title, summaries, folders):
    """summaries: {folder: {metric: summary}} -> texts, a line per folder, a column per metric."""
    metrics = next(iter(summaries.values()))
    table = [[title, "images", "prompts", *metrics]]
    for folder, own in summaries.items():
        rows = folders[folder]
        num_prompts = len(set(prompt_ids_of(rows)))
        cells = [format_cell(summary) for summary in own.values()]
        table.append([folder, str(len(rows)), str(num_prompts), *cells])
    return table


def tables_of(results, folders):
    """The tables that we print: the metrics, the differences from the first folder, the drift."""
    first = next(iter(folders))
    tables = []
    if results["folders"][first]:
        tables.append(table_of("folder", results["folders"], folders))
        if results["differences"]:
            tables.append(table_of(f"minus {first}", results["differences"], folders))
    if results["drift"]:
        tables.append(table_of(f"drift from {first}", results["drift"], folders))
    return tables


def print_table(table):
    """Prints rows of texts in aligned columns."""
    widths = []
    for column in zip(*table):
        widths.append(max(len(cell) for cell in column))
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        print("  ".join(cells).rstrip())
    print()


def notes_on(folder, own):
    """What a reader must know about one folder's metrics -> lines of text."""
    notes = []
    if "dino_div" in own and own["dino_div"]["left_out"]:
        left_out = own["dino_div"]["left_out"]
        total = left_out + own["dino_div"]["prompts"]
        text = f"dino_div leaves out {left_out} of {total} prompts with only one image"
        notes.append(f"{folder}: {text}")
    if "toy_correct" in own:
        abstained = own["toy_correct"]["abstained"]
        text = f"the oracle abstained on {abstained:.1%} of the images (counted as wrong)"
        notes.append(f"{folder}: {text}")
    too_few = [name for name, summary in own.items() if not summary.get("full_rank", True)]
    if too_few:
        reason = "we need more images than the features have dimensions"
        notes.append(f"{folder}: too few images for {', '.join(too_few)}: {reason}")
    return notes


def notes_of(results, folders, shown):
    """The notes below the tables, lines of text. shown: {"dino", "detector": its source}."""
    first = next(iter(folders))
    notes = []
    for folder, own in results["folders"].items():
        if folder in results["not_paired"] and len(folders) > 1:
            reason = results["not_paired"][folder]
            notes.append(f"{folder}: no paired differences from {first}: {reason}")
        notes += notes_on(folder, own)
    for name, source in shown.items():
        if source:
            notes.append(f"{name}: {source}")
    return notes


def report(results, folders, shown):
    """Prints the tables and then the notes."""
    for table in tables_of(results, folders):
        print_table(table)
    for note in notes_of(results, folders, shown):
        print(note)


# --------------------------------------------------------------------------------------------------
# The web page


def clear_winners(summaries):
    """{folder: {metric: summary}} -> the cells (row, column) of table_of to show in bold.

    A folder wins a metric if its whole interval is better than the intervals of all others.
    """
    cells = []
    metrics = list(next(iter(summaries.values())))
    rows = list(summaries.values())
    for m, metric in enumerate(metrics):
        intervals = [(row[metric]["low"], row[metric]["high"]) for row in rows]
        if len(rows) < 2 or any(low is None for low, _ in intervals):
            continue
        if metric in ARTIFACTS:
            # Here, lower is better.
            intervals = [(-high, -low) for low, high in intervals]
        best = max(range(len(rows)), key=lambda r: intervals[r][0])
        others = [high for r, (_, high) in enumerate(intervals) if r != best]
        if intervals[best][0] > max(others):
            # The first three columns are the folder and its numbers of images and prompts.
            cells.append((best, 3 + m))
    return cells


def prompt_slides(folders):
    """The images for the page -> a list of (prompt, figures), with a figure for each folder.

    A prompt's images are in the order of their seeds, so the k-th images of paired folders have
    the same seed. Prompts are in the order of their files.
    """
    by_prompt = {}
    for folder, rows in folders.items():
        for row in rows:
            files = by_prompt.setdefault(row["text"], {}).setdefault(folder, [])
            if len(files) < PAGE_SEEDS:
                files.append(Path(folder) / row["file_name"])

    def first_file(prompt):
        files = next(iter(by_prompt[prompt].values()))
        return files[0].name

    num_prompts = max(2, PAGE_IMAGES // (PAGE_SEEDS * len(folders)))
    slides = []
    for prompt in some_of(sorted(by_prompt, key=first_file), num_prompts):
        figures = []
        for folder in folders:
            files = by_prompt[prompt].get(folder, [])
            cells = [(*data_uri(open_image(file)), "") for file in files]
            figures.append((cells, folder))
        slides.append((prompt, figures))
    return slides


def write_page(path, results, folders, shown):
    """Writes --html: the tables, the notes and the images."""
    notes = [
        "In brackets: 95% bootstrap intervals over prompts. Bold: the whole interval is better "
        "than those of all other folders. Less is better for artifacts, more for dino_div.",
        *notes_of(results, folders, shown),
    ]
    tables = []
    for table in tables_of(results, folders):
        header, *rows = table
        is_metrics = header[0] == "folder"
        marked = clear_winners(results["folders"]) if is_metrics else []
        tables.append((header, rows, marked))
    write_atomically(Path(path), comparison_page(tables, notes, prompt_slides(folders)))


def error_bars(summaries):
    """n summaries -> how far their intervals reach below and above the means, two lists."""
    below = []
    above = []
    for summary in summaries:
        has_interval = summary["low"] is not None
        below.append(summary["mean"] - summary["low"] if has_interval else 0.0)
        above.append(summary["high"] - summary["mean"] if has_interval else 0.0)
    return below, above


def draw_panel(axis, summaries, metric, x_metric, steps):
    """Draws one metric against another, or against the steps, on a matplotlib axis.

    summaries: {folder: {metric: summary}}. A folder without a value is left out.
    """
    needed = [metric] if steps else [metric, x_metric]
    folders = []
    for folder, own in summaries.items():
        if all(own[name]["mean"] is not None for name in needed):
            folders.append(folder)
    values = [summaries[folder][metric] for folder in folders]
    y = [summary["mean"] for summary in values]
    if steps:
        x = [steps[folder] for folder in folders]
        axis.errorbar(x, y, yerr=error_bars(values), fmt="o-", capsize=3)
        axis.set(xlabel="updates", ylabel=metric)
        return
    x_values = [summaries[folder][x_metric] for folder in folders]
    x = [summary["mean"] for summary in x_values]
    axis.errorbar(x, y, error_bars(values), error_bars(x_values), fmt="o", capsize=3)
    axis.set(xlabel=x_metric, ylabel=metric)
    label = dict(textcoords="offset points", xytext=(5, 5), fontsize=8)
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    for name, *point in zip(names, x, y):
        axis.annotate(name, point, **label)


def plot(results, path, steps=None):
    """Writes a PNG with one panel per metric, and intervals as bars.

    Quality and artifacts are plotted against the first metric of diversity or distance, one point
    per folder. With steps, {folder: step}, every metric is plotted against the steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summaries = results["folders"]
    metrics = list(next(iter(summaries.values())))
    panels = metrics
    x_metric = None
    if not steps:
        panels = [name for name in metrics if is_quality(name) or name in ARTIFACTS]
        x_metric = [name for name in metrics if name == "dino_div" or name in DISTANCES][0]
    width = 4 * len(panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, 3.4), constrained_layout=True, squeeze=False
    )
    for axis, metric in zip(axes[0], panels):
        draw_panel(axis, summaries, metric, x_metric, steps)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------


def check_captions(folders):
    """Exits if toy_correct cannot read a caption."""
    for folder, rows in folders.items():
        for row in rows:
            try:
                parse_caption(row["text"])
            except ValueError as error:
                sys.exit(f"--metrics toy_correct: {folder}: {error}")


def all_toy_images(folders):
    """Whether the first image of every folder has the size of the toy world's images."""
    for folder, rows in folders.items():
        image = to_tensor(open_image(Path(folder) / rows[0]["file_name"]))
        if image.shape[1:] != (TOY_SIZE, TOY_SIZE):
            return False
    return True


def choose_networks(args, folders):
    """Sets the defaults of --dino and --detector -> {network: its weights}."""
    networks = {network_of(name) for name in args.metrics}
    is_toy = all_toy_images(folders)
    if args.dino is None:
        args.dino = "toy" if is_toy else "facebook/dino-vits16"
    if args.detector is None and is_toy:
        args.detector = "toy"
    if "detector" in networks and args.detector is None:
        sys.exit("--detector is required: toy/detector knows only the toy world's images")
    if "frechet_toy" in args.metrics and args.dino != "toy":
        sys.exit("--metrics frechet_toy is defined by toy/dino: pass --dino toy")
    sources = {network_of(name): path for name, path in args.metrics.items()}
    sources.update(dino=args.dino, detector=args.detector)
    for name, folder in TOY_FOLDER.items():
        if sources.get(name) in (None, "", "toy"):
            sources[name] = str(TOY / folder)
    return sources


def main(args):
    # Convolutions on CUDA would round to 10 bits, although their weights are fp32.
    torch.backends.cudnn.allow_tf32 = False
    device = pick_device(args.device)
    steps = None
    if args.over_steps:
        steps = sample_snapshots(args.over_steps, args.prompts, args.num_images, device)
    folders = {folder: read_folder(folder) for folder in steps or args.folders}
    reference = {}
    if args.reference:
        reference = {args.reference: read_folder(args.reference)}
    if "toy_correct" in args.metrics:
        check_captions(folders)

    sources = choose_networks(args, {**folders, **reference})
    metrics = list(args.metrics)
    results = measure(folders, metrics, sources, device, reference, args.batch_size)
    networks = {network_of(name) for name in metrics}
    shown = dict(
        dino=args.dino if "dino" in networks else None,
        detector=args.detector if "detector" in networks else None,
    )
    report(results, folders, shown)
    if args.html and is_main_process():
        write_page(args.html, results, folders, shown)
        print(f"see {args.html}")
    if args.plot and is_main_process():
        plot(results, args.plot, steps)
    if args.out:
        first = next(iter(folders))
        content = dict(shown, first=first, reference=args.reference, steps=steps, **results)
        write_atomically(Path(args.out), json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    args = parse_args()
    with readable_errors(args), joined_processes(args):
        main(args)
