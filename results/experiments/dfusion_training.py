"""Do fused pairs teach more than naive ones, on unseen prompts? D-Fusion's Figures 6 and 7.

And section 4.4's ablation: what if the trajectories come from DDIM inversion?

Runs     21 of dfusion_dpo.py: DPO, DDPO and DPOK, each fused and naive, and DPO with inverted
         trajectories; seeds 0 to 2; 32 updates, which are 16 rounds of 64 images. Then 8 images of
         each of 40 unseen prompts after 16 and 32 updates, and of the base model, with seeds that
         training never used.
Prints   a table of the change from the base model, and fused minus naive for each seed.
Draws    dfusion_training.png: two metrics over the images that went through the U-Net.
Took     about 2 minutes per run on a CPU core.
"""

import itertools
import json
import re

import torch

from common import ROOT, load_lora, load_model
from data.prompts import encode_once
from data.items import read_items
from rewards import load_reward
from run_folder import generate, save_grid, score

from .tools import CPU, JUDGE_BATCH, NUM_IMAGES, NUM_PROMPTS, SEEDS, Judges, describe_differences
from .tools import format_mean, mean, read_lines, repeat, save_figure, subplots, table_head
from .tools import table_line, together, train

ALGOS = ("dpo", "ddpo", "dpok")
METHODS = {"fused": (), "naive": ("--naive",)}
INVERTED = "dpo, fused, inverted trajectories"
SNAPSHOTS = (16, 32)  # updates; two of them make a round of 64 images, 8 prompts x 8
# The rest are toy's defaults, which come from what dfusion_gradients.py finds.
FLAGS = ("--micro_batch", 32, "--train_steps", SNAPSHOTS[-1], "--save_every", SNAPSHOTS[0])


def kinds_of_runs():
    """{kind of run: its flags}."""
    kinds = {}
    for algo in ALGOS:
        for method, flags in METHODS.items():
            kinds[f"{algo}, {method}"] = ("--algo", algo, *flags)
    kinds[INVERTED] = ("--algo", "dpo", "--trajectory", "inversion")
    return kinds


def measure_training(out, jobs):
    """-> the lines of the tables."""
    kinds = kinds_of_runs()
    calls = list(itertools.product(SEEDS, kinds))

    def train_kind(seed, kind):
        folder = f"{re.sub(', | ', '_', kind)}_{seed}"
        return train(out, folder, "dfusion_dpo", *FLAGS, *kinds[kind], "--seed", seed)

    runs = dict(zip(calls, together(jobs, train_kind, calls)))
    logs = {}
    for call, run in runs.items():
        logs[call] = read_lines(run / "log.jsonl")

    torch.set_num_threads(1)
    unseen = UnseenPrompts(out, next(iter(runs.values())))
    base = unseen.measure(None)
    change = {}
    for (seed, kind), step in itertools.product(calls, SNAPSHOTS):
        row = unseen.measure(runs[seed, kind] / "lora" / f"step_{step:06d}")
        change[seed, kind, step] = subtract(row, base)

    plot_training(change, logs)
    return table_of_changes(kinds, base, change, logs) + fused_minus_naive(base, change)


def subtract(row, base):
    """{metric: value} minus {metric: value}."""
    return {metric: row[metric] - base[metric] for metric in base}


class UnseenPrompts:
    """Measures a snapshot on unseen prompts, with seeds that training never used."""

    def __init__(self, out, run):
        items = f"{ROOT}/data/dfusion_toy.json"
        self.prompts = read_items(items, "both")[1][:NUM_PROMPTS]
        self.folder = out / "measured"
        self.sampler = json.loads((run / "config.json").read_text())["sampler"]
        self.reward, _ = load_reward("toy_clip", CPU)
        self.judges = Judges()

    def measure(self, lora):
        """A snapshot, or None for the base model -> {metric: its mean}, made once."""
        name = f"{lora.parent.parent.name}_{lora.name}" if lora else "base"
        done = self.folder / f"{name}.json"
        if not done.exists():
            self.folder.mkdir(exist_ok=True)
            model = load_model("toy", CPU)
            encode_once(model, self.prompts)
            if lora:
                load_lora(model, lora)
            images = generate(model, self.prompts, 1, self.sampler, NUM_IMAGES)
            r = score(self.reward, images, repeat(self.prompts, NUM_IMAGES), JUDGE_BATCH)
            row = dict(toy_clip=r.mean().item())
            row.update(self.judges(images, self.prompts, NUM_IMAGES))
            done.write_text(json.dumps(row) + "\n")
            save_grid(images[: 8 * NUM_IMAGES], done.with_suffix(".png"), columns=NUM_IMAGES)
        return json.loads(done.read_text())


def until(log, step):
    """The rows of a log up to an update."""
    return [row for row in log if row["step"] <= step]


def total_passes(log):
    """How many images went through the U-Net. With guidance each counts twice."""
    return sum(row["passes"] for row in log)


def table_of_changes(kinds, base, change, logs):
    """The lines of the table: a row for each kind and snapshot."""
    before = ", ".join(f"{metric} {value:.3f}" for metric, value in base.items())
    lines = [
        f"\nunseen prompts, the change from the base model at the same seeds ({before})\n",
        *table_head(["images", "passes", "adopted", *base]),
    ]
    for step, kind in itertools.product(SNAPSHOTS, kinds):
        # Every seed has as many images and passes.
        first_log = until(logs[SEEDS[0], kind], step)
        cells = [f"{first_log[-1]['images']:,}", f"{total_passes(first_log):,}"]
        adopted = []
        for seed in SEEDS:
            adopted += [r["adoption"] for r in until(logs[seed, kind], step) if "adoption" in r]
        cells.append(f"{mean(adopted):.2f}" if adopted else "")
        for metric in base:
            values = [change[seed, kind, step][metric] for seed in SEEDS]
            cells.append(format_mean(values, 4, "+"))
        lines.append(table_line(kind, cells))
    return lines


def fused_minus_naive(base, change):
    """The lines that pair fused and naive runs by seed."""
    lines = ["\nfused minus naive, mean (each seed)\n"]
    for step, algo in itertools.product(SNAPSHOTS, ALGOS):
        differences = {metric: [] for metric in base}
        for seed in SEEDS:
            fused = change[seed, f"{algo}, fused", step]
            naive = change[seed, f"{algo}, naive", step]
            for metric, value in subtract(fused, naive).items():
                differences[metric].append(value)
        lines.append(f"  {algo:<5}{step} updates  " + describe_differences(differences))
    return lines


def plot_training(change, logs):
    """Draws the change of two metrics over the images through the U-Net, one line per run."""
    figure, axes = subplots(2, 3, 3.7, 3, sharey="row")
    for axes_of_algo, algo in zip(axes.T, ALGOS):
        for method, color in zip(METHODS, ("tab:blue", "tab:red")):
            for seed in SEEDS:
                kind = f"{algo}, {method}"
                log = logs[seed, kind]
                x = [total_passes(until(log, step)) / 1000 for step in (0, *SNAPSHOTS)]
                for axis, metric in zip(axes_of_algo, ("toy_clip", "toy_correct")):
                    y = [0] + [change[seed, kind, step][metric] for step in SNAPSHOTS]
                    label = method if seed == SEEDS[0] else None
                    axis.plot(x, y, "o-", color=color, markersize=3, label=label)
                    axis.set(title=f"{algo}: {metric}, change")
                    axis.set(xlabel="thousand images through the U-Net")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, "dfusion_training.png", dpi=80)
