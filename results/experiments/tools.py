"""What the experiments share: runs of the scripts, judges, tables and pictures.

Every experiment has a folder `out` of its own, with its runs and, among other files,

  logs/        what the scripts printed
  table.md     the table; some have several, under other names. write_table adds a file .json with
               the values of each training seed

and draws its pictures into PICTURES. What exists is not made again, so an interrupted
experiment resumes where it stopped.
"""

import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

from common import ROOT, TOY
from data.prompts import read_prompts
from evaluate import Dino
from rewards import load_reward
from run_folder import to_pil
from toy import oracle

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURES = ROOT / "results" / "pictures"
CPU = torch.device("cpu")
SEEDS = (0, 1, 2)
NUM_PROMPTS = 40
JUDGE_BATCH = 32


# --------------------------------------------------------------------------------------------------
# Running scripts


def run_script(out, name, script, *flags, done=None):
    """Runs a script of the repository, unless the file `done` exists. Its output goes to out/logs.

    script: without its .py, for example "refl" or "data/labels".
    """
    if done and done.exists():
        return
    log = out / "logs" / f"{Path(script).name}_{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(flag) for flag in flags]
    command = [sys.executable, ROOT / f"{script}.py", *words]
    with open(log, "w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if status:
        raise SystemExit(f"{script}.py {' '.join(words)} ended with {status}: see {log}")


def together(jobs, function, calls):
    """Calls function(*arguments) for each of `calls`, `jobs` at a time -> the results, in order."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
        return [future.result() for future in futures]


def train(out, name, script, *flags):
    """Trains the run out/name -> its folder.

    An interrupted run is resumed. A run whose numbers differ from those among the flags is
    deleted and made again.
    """
    run = out / name
    config = {}
    if (run / "config.json").exists():
        config = json.loads((run / "config.json").read_text())
    is_other = False
    for flag, value in zip(flags, flags[1:]):
        if isinstance(value, (int, float)) and config.get(flag.removeprefix("--")) != value:
            is_other = True
    # Without a checkpoint there is nothing to continue.
    if is_other or not (run / "checkpoint" / "state.pt").exists():
        shutil.rmtree(run, ignore_errors=True)
        config = {}
    is_finished = False
    if config:
        is_finished = (run / "lora" / f"step_{config['train_steps']:06d}").exists()
    if not is_finished:
        resume = ["--resume"] if config else []
        run_script(out, name, script, *flags, "--out", run, *resume)
    return run


def snapshot_names(run):
    """The snapshots of a run, from the first to the last: "step_000060" and so on."""
    return sorted(folder.name for folder in (run / "lora").glob("step_*"))


def updates_of(snapshot):
    """ "step_000060" -> 60."""
    return int(snapshot.removeprefix("step_"))


def write_prompts(path, prompts):
    """Writes a prompts file -> its path. An equal file is left alone: a job may be reading it."""
    text = "\n".join(prompts) + "\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def held_out_prompts(out):
    """The file with the held-out prompts of every row."""
    prompts = read_prompts(TOY / "prompts_test.txt")[:NUM_PROMPTS]
    return write_prompts(out / "prompts.txt", prompts)


def read_lines(path):
    """A file of JSON lines -> its rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    """Writes a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------
# Judging images


class Judges:
    """What nothing is trained on: the second preference model, the oracle, and diversity.

    judges(images, prompts, each) -> dict of means over images (N, 3, H, W) in [0, 1] on the CPU:
    `each` images of the first prompt, then `each` of the second, and so on.
    """

    def __init__(self):
        self.pref, _ = load_reward(f"toy_pref:{TOY / 'pref_b'}", CPU)
        self.dino = Dino(TOY / "dino", CPU)

    @torch.no_grad()
    def __call__(self, images, prompts, each):
        prompts = repeat(prompts, each)
        features = []
        rewards = []
        for i in range(0, len(images), JUDGE_BATCH):
            part = slice(i, i + JUDGE_BATCH)
            features.append(self.dino(images[part]))
            rewards.append(self.pref(images[part], prompts[part]))
        is_correct = []
        is_recognized = []
        for image, prompt in zip(images, prompts):
            is_correct.append(oracle.correct(image, prompt) is True)
            is_recognized.append(oracle.recognised(image, prompt))
        return dict(
            toy_correct=mean(is_correct),
            recognised=mean(is_recognized),
            toy_pref_b=torch.cat(rewards).mean().item(),
            dino_div=diversity(torch.cat(features), each),
        )


def repeat(prompts, each):
    """Prompts -> the prompt of every image, if there are `each` images per prompt."""
    return [prompt for prompt in prompts for _ in range(each)]


def diversity(features, each):
    """Normalized features (N, D), `each` per prompt -> 1 - cosine, the mean over pairs, prompts."""
    features = features.unflatten(0, (-1, each))
    distances = 1 - features @ features.mT
    num_pairs = each * (each - 1)
    return (distances.sum((1, 2)) / num_pairs).mean().item()


# --------------------------------------------------------------------------------------------------
# Tables


def mean(values):
    """The mean of numbers or booleans."""
    return statistics.mean(map(float, values))


def format_mean(values, digits=3, sign=""):
    """The mean of one value per seed, followed by ± their standard deviation."""
    text = f"{mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def table_head(columns):
    """The first two lines of a markdown table."""
    return [table_line("", columns), "|---|" + "---|" * len(columns)]


def table_line(name, cells):
    """A line of a markdown table."""
    line = "|"
    for cell in (name, *cells):
        line += f" {cell} |" if cell else " |"
    return line


def write_table(path, rows, digits=3, head=()):
    """Prints and writes a markdown table, and beside it the rows as JSON.

    rows: {name: [{field: value}, one dict per training seed]}. head: lines above the table.
    """
    fields = list(next(iter(rows.values()))[0])
    lines = [*head, *table_head(fields)]
    for name, per_seed in rows.items():
        cells = []
        for field in fields:
            cells.append(format_mean([row[field] for row in per_seed], digits))
        lines.append(table_line(name, cells))
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines), flush=True)


def describe_differences(differences):
    """{metric: one difference per seed} -> a line of "metric mean (each seed)" per metric."""
    parts = []
    for metric, values in differences.items():
        each = " ".join(f"{value:+.3f}" for value in values)
        parts.append(f"{metric} {mean(values):+.3f} ({each})")
    return "  ".join(parts)


# --------------------------------------------------------------------------------------------------
# Pictures


def subplots(rows, columns, width, height, **options):
    """A matplotlib figure and its axes, each of this size in inches."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, constrained_layout=True, **options)


def new_picture(name):
    """The path of a picture to be written."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    return PICTURES / name


def save_figure(figure, name, dpi):
    """Writes a figure to results/pictures -> its path."""
    path = new_picture(name)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path


def shrink(path):
    """Replaces a PNG with a PNG of 256 colors."""
    image = Image.open(path).convert("RGB")
    image.quantize(256, kmeans=1).save(path, optimize=True)


def draw_rows(rows, name, side=80, label_width=210):
    """{label: images, a list of (3, H, W)} -> a picture with a labeled row of images for each."""
    num_columns = max(len(images) for images in rows.values())
    picture = Image.new("RGB", (label_width + side * num_columns, side * len(rows)), "white")
    font = ImageFont.load_default(size=20)
    pen = ImageDraw.Draw(picture)
    for y, (label, images) in enumerate(rows.items()):
        pen.text((8, side * y + side // 2), label, fill="black", font=font, anchor="lm")
        for x, image in enumerate(images):
            tile = to_pil(image).resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(tile, (label_width + side * x, side * y))
    path = new_picture(name)
    picture.save(path)
    shrink(path)
