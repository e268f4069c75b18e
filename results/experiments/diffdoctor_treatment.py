"""Does treating a model remove its artifacts, and what does it do to everything else?

DiffDoctor's Table 2 and Figures 4 and 5, over long training: with and without the regularizer on
real images, at the paper's t = 1 and with five steps that carry the gradient. toy/detector, which
we train on, is one judge of artifacts. toy/detector_b, which nothing is trained on, is the other.

Runs     22 of diffdoctor.py treat: 8 kinds, from 40 to 720 updates without early stopping, with
         seeds 0 to 2, or seed 0 for the worst pixel. Then 2 images of each of 40 held-out prompts
         for every snapshot below, with the seeds of the images before treatment.
Prints   a table: both detectors' confidence in percent, the oracle's verdict and its count of
         things, diversity, drift, and the grain of the background.
Draws    diffdoctor_over_updates.png; and diffdoctor_flux.png and diffdoctor_toy.png: images before
         and after, each beside an overlay of the detector's confidence.
Took     one to six minutes per run on two CPU cores.
"""

import contextlib
import json
import statistics

import matplotlib.pyplot as plt
import torch

from common import TOY, base_model, load_model
from data.prompts import encode_once
from data.labels import overlay
from judges.detector import load_detector
from models.lora import load_lora
from run_folder import generate
from toy import oracle
from toy.scenes import parse_caption

from .tools import CPU, JUDGE_BATCH, SEEDS, Judges, held_out_prompts, mean, new_picture, repeat
from .tools import save_figure, shrink, subplots, together, train, write_table

EACH = 2  # images per held-out prompt
LONG = (40, 120, 240, 480, 720)
KINDS = {  # kind of run: the model, the updates after which we measure it, and the flags
    "toy-flux, gamma 0": ("toy-flux", LONG, "--gamma", 0, "--grad_steps", 1),
    "toy-flux, gamma .25": ("toy-flux", LONG, "--gamma", 0.25, "--grad_steps", 1),
    "toy-flux, gamma 0, max pixel": (
        "toy-flux", LONG[1:], "--gamma", 0, "--grad_steps", 1, "--pixels", "max",
    ),
    "toy-flux, gamma 0, grad_steps 5": (
        "toy-flux", (40, 120, 240), "--gamma", 0, "--grad_steps", 5,
    ),
    "toy, gamma 0": ("toy", (20, 40), "--gamma", 0, "--grad_steps", 1),
    "toy, gamma .25": ("toy", (20, 40), "--gamma", 0.25, "--grad_steps", 1),
    "toy, gamma 0, grad_steps 5": (
        "toy", (20, 60, 120, 240), "--gamma", 0, "--grad_steps", 5,
    ),
    "toy, gamma .25, grad_steps 5": (
        "toy", (20, 60, 120, 240), "--gamma", 0.25, "--grad_steps", 5,
    ),
}
ONE_SEED = ("toy-flux, gamma 0, max pixel",)  # kinds that run with the first seed only
MODELS = ("toy-flux", "toy")
COLORS = ("tab:red", "tab:blue", "tab:green", "tab:orange")
PLOTTED = ("detector mean", "detector_b mean", "toy_correct", "grain", "drift")
SHOWN = {  # pictures, and their columns after the images before: title, kind of run, updates
    "diffdoctor_flux.png": (
        ("all 5 steps,\n240 updates", "toy-flux, gamma 0, grad_steps 5", 240),
        ("t = 1, gamma 0,\n120 updates", "toy-flux, gamma 0", 120),
        ("t = 1, gamma .25,\n120 updates", "toy-flux, gamma .25", 120),
        ("t = 1, gamma 0,\n720 updates", "toy-flux, gamma 0", 720),
        ("t = 1, gamma .25,\n720 updates", "toy-flux, gamma .25", 720),
    ),
    "diffdoctor_toy.png": (
        ("gamma 0,\n60 updates", "toy, gamma 0, grad_steps 5", 60),
        ("gamma 0,\n240 updates", "toy, gamma 0, grad_steps 5", 240),
        ("gamma .25,\n240 updates", "toy, gamma .25, grad_steps 5", 240),
    ),
}


def measure_treatments(out, jobs):
    """Trains all runs, prints the table and draws the pictures."""
    together(jobs, train_kind, [(out, kind, seed) for kind in KINDS for seed in seeds_of(kind)])
    torch.set_num_threads(1)
    snapshots = Snapshots(out)
    curves = {}
    rows = {}
    for kind, (model_name, steps, *_) in KINDS.items():
        curves[kind] = {}
        for step in (0, *steps):
            per_seed = [snapshots.row(kind, seed, step) for seed in seeds_of(kind)]
            curves[kind][step] = {field: spread(per_seed, field) for field in PLOTTED}
            if step:
                rows[f"{kind}: {step} updates"] = per_seed
            else:
                rows[f"{model_name}, before"] = per_seed[:1]
    write_table(out / "treated.md", rows, 2)
    plot_over_updates(curves)
    for name, treated in SHOWN.items():
        draw_treated(name, treated, snapshots)


def seeds_of(kind):
    """The training seeds of a kind of run."""
    return SEEDS[:1] if kind in ONE_SEED else SEEDS


def spread(per_seed, field):
    """The mean and the standard deviation over seeds, which is 0 for one seed."""
    values = [row[field] for row in per_seed]
    return mean(values), statistics.stdev(values) if len(values) > 1 else 0


def run_of(out, kind, seed):
    """The folder of a run."""
    name = kind.replace(", ", "_").replace(" ", "_")
    return out / f"{name}_{seed}"


def train_kind(out, kind, seed):
    """Trains a run without early stopping, so that all snapshots exist."""
    model_name, steps, *flags = KINDS[kind]
    name = run_of(out, kind, seed).name
    train(
        out, name, "diffdoctor", "treat", "--model", model_name, "--seed", seed,
        "--train_steps", steps[-1], "--save_every", steps[0],
        "--patience", steps[-1], "--max_drift", 1e6, *flags,
    )


# --------------------------------------------------------------------------------------------------
# Measuring


class TreatmentJudges:
    """What nothing is trained on, the two detectors, and what the oracle counts.

    judges(images, prompts, before) -> dict of means over images (N, 3, H, W), EACH per prompt.
    before: the images of equal seeds before training.
    """

    def __init__(self):
        self.judges = Judges()
        self.detectors = {}
        for name in ("detector", "detector_b"):
            self.detectors[name] = load_detector(TOY / name, CPU)

    @torch.no_grad()
    def __call__(self, images, prompts, before):
        row = {}
        for name, detector in self.detectors.items():
            maps = torch.cat([detector(part) for part in images.split(JUDGE_BATCH)])
            row[f"{name} mean"] = 100 * maps.mean().item()
            row[f"{name} max"] = 100 * maps.flatten(1).amax(1).mean().item()
        row.update(self.judges(images, prompts, EACH))
        row.update(count_things(images, repeat(prompts, EACH)))
        distance = (before - before.roll(1, 0)).abs().mean()
        row["drift"] = ((images - before).abs().mean() / distance).item()
        return row


def notable_things(image):
    """The oracle's reading of an image, without specks."""
    return [o for o in oracle.read(image) if oracle.is_notable(o)]


def count_things(images, prompts):
    """The shares of images with fewer or more things than the caption, and the area in percent."""
    too_few = []
    too_many = []
    areas = []
    for image, prompt in zip(images, prompts):
        things = notable_things(image)
        kinds, _ = parse_caption(prompt)
        too_few.append(len(things) < len(kinds))
        too_many.append(len(things) > len(kinds))
        areas.append(sum(o["area"] for o in things))
    return {"too few": mean(too_few), "too many": mean(too_many), "area": 100 * mean(areas)}


def grain(images):
    """How far the background deviates from a smooth surface: root mean square, in percent.

    No judge here sees it.
    """
    rows = []
    for image in images:
        image = oracle.to_array(image)
        background = oracle.background_of(image)
        # Keep three pixels away from the objects.
        rest = ~oracle.grow(oracle.segment(image, background) > 0, 3)
        mean_square = ((image - background)[rest] ** 2).mean()
        rows.append(100 * mean_square**0.5)
    return mean(rows)


class Snapshots:
    """The images of a run's snapshots and what the judges say of them, each made once."""

    def __init__(self, out):
        self.out = out
        self.prompts = held_out_prompts(out).read_text().splitlines()
        self.judges = TreatmentJudges()
        self.models = {}  # name -> the model, which all its snapshots use
        (out / "measured").mkdir(exist_ok=True)

    def model(self, name):
        if name not in self.models:
            self.models[name] = load_model(name, CPU)
            encode_once(self.models[name], self.prompts)
        return self.models[name]

    def sample(self, kind, seed, step):
        """The images of a snapshot, or at step 0 those of the base model."""
        run = run_of(self.out, kind, seed)
        model = self.model(KINDS[kind][0])
        if step:
            load_lora(model, run / "lora" / f"step_{step:06d}")
        sampler = json.loads((run / "config.json").read_text())["sampler"]
        with contextlib.nullcontext() if step else base_model(model):
            return generate(model, self.prompts, 0, sampler, EACH)

    def measured(self, kind, seed, step):
        """-> images (N, 3, H, W) of a snapshot, and what the judges say."""
        name = f"{run_of(self.out, kind, seed).name}_{step:06d}"
        if step == 0:
            # All runs of a model start from the same images.
            name = f"{KINDS[kind][0]}_before"
        path = self.out / "measured" / f"{name}.pt"
        if not path.exists():
            images = self.sample(kind, seed, step)
            before = images
            if step:
                before, _ = self.measured(kind, seed, 0)
            torch.save((images, self.judges(images, self.prompts, before)), path)
        return torch.load(path, weights_only=True)

    def row(self, kind, seed, step):
        """The table's dict of a snapshot."""
        images, row = self.measured(kind, seed, step)
        row["mean / area"] = row["detector mean"] / max(row["area"], 0.1)
        row["grain"] = grain(images)
        return row


# --------------------------------------------------------------------------------------------------
# The pictures


def plot_over_updates(curves):
    """Draws the fields PLOTTED over the updates: a row of axes per model, a line per kind of run.

    curves: {kind: {updates: {field: (mean, standard deviation)}}}, over the training seeds.
    """
    figure, axes = subplots(2, len(PLOTTED), 3, 2.5)
    for axes_of_model, model_name in zip(axes, MODELS):
        kinds = [kind for kind in KINDS if KINDS[kind][0] == model_name]
        for axis, field in zip(axes_of_model, PLOTTED):
            for kind, color in zip(kinds, COLORS):
                curve = curves[kind]
                middle = [curve[step][field][0] for step in curve]
                low = [curve[step][field][0] - curve[step][field][1] for step in curve]
                high = [curve[step][field][0] + curve[step][field][1] for step in curve]
                label = kind.removeprefix(f"{model_name}, ")
                axis.plot(list(curve), middle, color=color, label=label)
                axis.fill_between(list(curve), low, high, color=color, alpha=0.2)
            unit = ", %" if "detector" in field or field == "grain" else ""
            axis.set(title=field + unit, xlabel=f"updates of {model_name}")
        axes_of_model[0].legend(fontsize=7)
    path = save_figure(figure, "diffdoctor_over_updates.png", dpi=70)
    shrink(path)


def draw_columns(name, columns, labels):
    """Draws a picture from its columns, (title, images (N, 3, 64, 64)), with a label per row."""
    figure, axes = subplots(1, len(columns), 1, len(labels) + 0.4)
    for axis, (title, images) in zip(axes, columns):
        stack = torch.cat(list(images), 1).permute(1, 2, 0)
        axis.imshow(stack.clamp(0, 1), interpolation="nearest")
        axis.set_title(title, fontsize=7)
        axis.set(xticks=[], yticks=[])
    rows = [64 * i + 32 for i in range(len(labels))]
    axes[0].set_yticks(rows, [label.replace(" a ", "\na ") for label in labels], fontsize=7)
    # The images are square, so some of the figure stays empty. "tight" cuts it off.
    figure.savefig(new_picture(name), dpi=100, bbox_inches="tight")
    plt.close(figure)
    shrink(new_picture(name))


def draw_treated(name, treated, snapshots):
    """Shows one image of every fourth prompt, before and after, each beside its overlay."""
    _, first_kind, _ = treated[0]
    detector = snapshots.judges.detectors["detector"]
    columns = []
    for title, kind, step in (("before", first_kind, 0), *treated):
        images, _ = snapshots.measured(kind, SEEDS[0], step)
        images = images[:: 4 * EACH]
        columns.append((title, images))
        with torch.no_grad():
            columns.append(("red: what the\ndetector sees", overlay(images, detector(images))))
    draw_columns(name, columns, snapshots.prompts[::4])
