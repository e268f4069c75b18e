"""What does each kind of data add to a detector? DiffDoctor's Table 1.

The first labels contain no well-formed star, so the detector flags every star. Photographs, hard
cases corrected by a person, and pseudo labels fix that. The person is simulated: the corrected maps
are the true maps of what we drew wrong.

Runs     for seeds 0 to 2, three detectors, each from scratch with 1,000 updates, on ever more data:
         1,500 labeled images; 800 photographs (clean renders); and up to 400 stars that the second
         detector found hard among 2,400 images. The whole labeling loop runs through
         data/labels.py. 400 images are for testing.
         Then, for seeds 0 and 1 and on the labels of the first seed, detectors with 500 updates:
         with true labels alone, and with pseudo labels for the rest of the 2,400 images added. The
         teacher is toy/detector, which is better than ours. Both see the same true labels.
Prints   which categories the detectors find abnormal; and tables of the metrics on test images,
         and of the mean confidence on test images without a mistake, stars and others. In percent.
Took     two to seven minutes per detector on two CPU cores.
"""

import json
import shutil
import zlib

import numpy as np
from PIL import Image

from common import TOY
from data.labels import Labelled, diagnose, read_labels
from diffdoctor import detector_metrics
from judges.detector import load_detector
from toy import oracle
from toy.artifacts import corrupt
from toy.scenes import SHAPES, SIZE, render, sample_scene

from .tools import CPU, SEEDS, mean, read_lines, run_script, together, write_lines, write_table

NUM_IMAGES = dict(human=1500, photos=800, pool=2400, test=400)
# The shares of images with and without a star that hold a mistake.
SHARE_WRONG = dict(human=(1, 0.3), photos=(0, 0), pool=(0.5, 0.5), test=(0.5, 0.5))
UPDATES = 1000
TEACHER = TOY / "detector"  # of the pseudo labels
PSEUDO_UPDATES = 500
PSEUDO_SEEDS = (0, 1)
METRICS = ("mse", "kl", "kl1", "mse_real", "kl1_real")  # columns of the table


def measure_detectors(out, jobs):
    """Makes the data, trains all detectors, and prints the table."""
    data = {name: draw_scenes(out / "data" / name) for name in NUM_IMAGES}
    tester = Tester(data)
    calls = [(out, data, tester, seed) for seed in SEEDS]
    ladders = together(jobs, climb, calls)

    head = []
    for name in ("previous", "photographs"):
        findings = "; ".join(findings[name] for _, findings in ladders)
        head.append(f"abnormal, by the detector of {name}: {findings}")
    rows = {}
    for metrics_by_name, _ in ladders:
        for name, metrics in metrics_by_name.items():
            rows.setdefault(name, []).append(metrics)
    write_table(out / "ladder.md", rows, head=[*head, ""])
    measure_pseudo(out, data, tester, jobs)


# --------------------------------------------------------------------------------------------------
# Data


def draw_scenes(folder):
    """Draws a labeled folder of scenes with at most one star -> the folder.

    Its images/ has a metadata.jsonl with categories, so it is an image folder, too. All but the
    photographs have a generator's marks.
    """
    if (folder / "meta.jsonl").exists():
        return folder
    for part in ("images", "maps"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(NUM_IMAGES[folder.name]):
        rng = np.random.default_rng([zlib.crc32(folder.name.encode()), i])
        scene = sample_scene_with_one_star(rng)
        image, confidence, category = draw_scene(scene, rng, SHARE_WRONG[folder.name])
        if folder.name != "photos":
            image = oracle.degrade(image, rng)
        row = dict(file_name=f"{i:05d}.png", text=scene["caption"], category=category)
        row.update(source="human", split="test" if folder.name == "test" else "train")
        rows.append(row)
        for part, pixels in (("images", image), ("maps", confidence)):
            pixels = np.round(pixels * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / row["file_name"])
    # The list that says the folder is complete comes last.
    write_lines(folder / "images" / "metadata.jsonl", rows)
    write_lines(folder / "meta.jsonl", rows)
    return folder


def shapes_of(scene):
    return [o["shape"] for o in scene["objects"]]


def sample_scene_with_one_star(rng):
    """A scene with no star or one."""
    while True:
        scene = sample_scene(rng)
        if shapes_of(scene).count("star") <= 1:
            return scene


def draw_scene(scene, rng, share_wrong):
    """-> image (64, 64, 3), map of what is wrong in it (64, 64), category.

    If there is a star, a mistake is in the star.
    """
    shapes = shapes_of(scene)
    image, coverage = render(scene)
    confidence = np.zeros((SIZE, SIZE))
    category = "star" if "star" in shapes else shapes[0]
    share_of_stars, share_of_others = share_wrong
    share = share_of_stars if category == "star" else share_of_others
    if rng.random() >= share:
        return image, confidence, category

    star = np.zeros((SIZE, SIZE))
    if category == "star":
        star = coverage[shapes.index("star")]
    # A fifth of the star must be wrong. Without a star any mistake will do.
    while not confidence.any() or (confidence * star).sum() < 0.2 * star.sum():
        image, confidence = corrupt(scene, rng)
    return image, confidence, category


# --------------------------------------------------------------------------------------------------
# The ladder: one training seed


def climb(out, data, tester, seed):
    """Trains a seed's three detectors, each on what the ones before it made possible.

    -> {detector: its metrics}, and {detector: what it finds abnormal among the unlabeled images}.
    """
    ladder = out / f"ladder_{seed}"
    human = data["human"]
    photos = data["photos"] / "images"
    pool = data["pool"] / "images"
    metrics = {}
    findings = {}

    def detector(name, folders, real=("--real", photos)):
        run = ladder / name.replace(" ", "_")
        data_flags = ["--data", *folders, *real]
        folder = train_detector(out, run, f"{name}_{seed}", seed, UPDATES, data_flags)
        metrics[name] = tester.measure(folder, run / "metrics.json")
        return folder

    def label(command, folder, *flags):
        run_labels(out, command, f"{seed}_{folder.name}", folder, *flags)
        return folder

    def score(name, detected):
        scores = ladder / f"scores_{name}"
        label("score", scores, "--detector", detected, "--images", pool)
        findings[name] = describe_scores(read_lines(scores / "scores.jsonl"))
        return scores

    # The previous labels alone, and with photographs.
    previous = detector("previous labels", [human], real=())
    with_photos = detector("+ photographs", [human])
    score("previous", previous)
    scores = score("photographs", with_photos)

    # A person corrects the hard stars.
    hard = label(
        "export_hard", ladder / "hard", "--detector", with_photos, "--images", pool,
        "--scores", scores, "--categories", "star", "--max_images", 400,
    )
    correct_maps(hard, data["pool"])
    labeled = label("import_labels", ladder / "labelled", "--labels", hard)
    detector("+ hard cases", [human, labeled])
    return metrics, findings


# --------------------------------------------------------------------------------------------------
# Pseudo labels


def measure_pseudo(out, data, tester, jobs):
    """Trains detectors with and without pseudo labels, and prints the table."""
    calls = [(out, data, tester, seed) for seed in PSEUDO_SEEDS]
    rows = {"the teacher": [tester.measure(TEACHER, out / "teacher.json")]}
    for metrics_by_name in together(jobs, learn_from_teacher, calls):
        for name, metrics in metrics_by_name.items():
            rows.setdefault(name, []).append(metrics)
    write_table(out / "pseudo.md", rows)


def learn_from_teacher(out, data, tester, seed):
    """-> {detector: its metrics} of one training seed."""
    ladder = out / f"ladder_{SEEDS[0]}"
    folder = out / f"pseudo_{seed}"
    data_flags = ["--real", data["photos"] / "images", "--data", data["human"], ladder / "labelled"]
    metrics = {}

    def detector(name):
        run = folder / name.replace(" ", "_")
        found = train_detector(out, run, f"{name}_{seed}", seed, PSEUDO_UPDATES, data_flags)
        metrics[name] = tester.measure(found, run / "metrics.json")

    detector("true labels alone")
    pseudo = folder / "labels"
    run_labels(
        out, "pseudo", seed, pseudo, "--detector", TEACHER,
        "--images", data["pool"] / "images", "--exclude", ladder / "hard",
    )
    data_flags.append(pseudo)
    detector("+ pseudo labels")
    return metrics


def train_detector(out, run, name, seed, updates, data_flags):
    """Trains a detector unless it exists -> the folder with its weights."""
    folder = run / "model" / "detector"
    if not (folder / "model.safetensors").exists():
        shutil.rmtree(run, ignore_errors=True)
        run_script(
            out, name, "diffdoctor", "detector", *data_flags, "--seed", seed,
            "--train_steps", updates, "--save_every", updates, "--out", run,
        )
    return folder


def run_labels(out, command, name, folder, *flags):
    """Runs a command of data/labels.py, unless its folder is complete."""
    done = folder / ("scores.jsonl" if command == "score" else "meta.jsonl")
    if command != "import_labels" and not done.exists():
        # A job that was killed left a part, and the script wants an empty folder.
        shutil.rmtree(folder, ignore_errors=True)
    run_script(
        out, f"{command}_{name}", "data/labels", command, *flags, "--out", folder, done=done
    )


def correct_maps(hard, pool):
    """Does the person's work: replaces the detector's maps with the true ones."""
    for row in read_lines(hard / "meta.jsonl"):
        shutil.copy(pool / "maps" / row["original"], hard / "maps" / row["file_name"])


def describe_scores(scores):
    """The abnormal categories, and how far stars stand out."""
    abnormal = {row["category"] for row in scores if row["abnormal"]}
    means = {}
    for shape in SHAPES:
        means[shape] = mean(row["mean"] for row in scores if row["category"] == shape)
    # Of the four categories, the second smallest is torch's median.
    ratio = means["star"] / sorted(means.values())[1]
    return f"{', '.join(sorted(abnormal)) or 'none'} (stars {ratio:.2f} times the median)"


class Tester:
    """Measures detectors on the test images."""

    def __init__(self, data):
        photos = data["photos"] / "images"
        self.images = Labelled(read_labels([data["test"]], [photos]), SIZE)
        self.fine = []  # rows of test images without a mistake
        for row in self.images.rows:
            if row["source"] == "human" and not np.asarray(Image.open(row["map"])).any():
                self.fine.append(row)

    def measure(self, folder, done):
        """-> {metric: percent}, read from the file `done` if it is there."""
        if not done.exists():
            detector = load_detector(folder, CPU)
            on_stars = []
            on_others = []
            for row, confidence in diagnose(detector, self.fine, CPU):
                values = on_stars if row["category"] == "star" else on_others
                values.append(confidence.mean().item())
            found, _ = detector_metrics(detector, self.images, CPU)
            metrics = {name: found[name] for name in METRICS}
            metrics["stars without a mistake"] = 100 * mean(on_stars)
            metrics["others without a mistake"] = 100 * mean(on_others)
            done.write_text(json.dumps(metrics) + "\n")
        return json.loads(done.read_text())
