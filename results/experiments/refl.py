"""Does ReFL raise the reward on held-out prompts, and what does it cost? (ImageReFL's Figure 2)

Runs     3 runs of `python refl.py` with its defaults (240 updates), seeds 0 to 2. Then 8 images of
         each of 40 held-out prompts: of the base model with guidance 4 and without guidance, and
         of every snapshot of every run, without guidance. Real scenes of the same prompts are a
         row of their own, and the reference of frechet_toy.
Prints   a table with a row per snapshot: toy_pref, which we train on; toy_pref_b and toy_correct,
         which are not; diversity; and the distance to real scenes. Also the seconds per update.
Draws    refl_over_training.png, the metrics over the updates, one line per seed; and refl.png,
         held-out prompts before and after training, seed 0.
Took     4 to 5 minutes per run, two at a time on two CPU cores. The images take extra time.
"""

import json
import statistics

import numpy as np
from PIL import Image

from toy.scenes import render, sample_scene

from .tools import NUM_IMAGES, SEEDS, held_out_prompts, new_picture, read_lines, run_script
from .tools import sample_images, save_figure, shrink, snapshot_names, subplots, together, train
from .tools import updates_of, write_lines, write_table

METRICS = ("toy_pref", "toy_pref_b", "toy_correct", "dino_div", "frechet_toy")


def refl(out, jobs):
    calls = [(out, f"run_{seed}", "refl", "--seed", seed) for seed in SEEDS]
    runs = together(jobs, train, calls)
    rows = measure_rows(out, jobs, runs)
    write_table(out / "table.md", rows)
    seconds = []
    for run in runs:
        seconds += [row["seconds"] for row in read_lines(run / "log.jsonl")]
    print(f"seconds per update: median {statistics.median(seconds):.2f}, {jobs} runs at a time")

    snapshots = snapshot_names(runs[0])
    plot_over_training(rows, snapshots)
    draw_before_and_after(runs[0], snapshots[-1])


# --------------------------------------------------------------------------------------------------
# What imagerefl.py uses, too


def write_renders(out):
    """Renders real scenes of the held-out prompts, as many as a row has images -> their folder."""
    folder = out / "images" / "renders"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(held_out_prompts(out).read_text().splitlines()):
        for k in range(NUM_IMAGES):
            pixels, _ = render(sample_scene(np.random.default_rng([i, k]), prompt))
            name = f"{i:05d}_{k:02d}.png"
            Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(folder / name)
            rows.append(dict(file_name=name, text=prompt, prompt_id=i))
    write_lines(folder / "metadata.jsonl", rows)
    return folder


def measure(out, folder, name=None):
    """Measures a folder of images with evaluate.py -> {metric: its mean}."""
    name = name or folder.name
    done = out / "metrics" / f"{name}.json"
    done.parent.mkdir(exist_ok=True)
    run_script(
        out, name, "evaluate", folder, "--metrics", ",".join(METRICS),
        "--reference", out / "images" / "renders", "--out", done, done=done,
    )
    summaries = json.loads(done.read_text())["folders"][str(folder)]
    return {metric: summaries[metric]["mean"] for metric in METRICS}


# --------------------------------------------------------------------------------------------------
# The table and the pictures


def measure_rows(out, jobs, runs):
    """{name of a row: its metrics, one dict per training seed}."""
    base = ("--mode", "base", "--lora", runs[0])
    calls = [
        ("base, guidance 4", "base_guided", *base, "--base_guidance_scale", 4),
        ("base, no guidance", "base_plain", *base, "--base_guidance_scale", 1),
    ]
    for snapshot in snapshot_names(runs[0]):
        for seed, run in zip(SEEDS, runs):
            row_name = f"ReFL, {updates_of(snapshot)} updates"
            lora = run / "lora" / snapshot
            calls.append((row_name, f"{snapshot}_{seed}", "--mode", "tuned", "--lora", lora))

    def sample_and_measure(row_name, name, *flags):
        return row_name, measure(out, sample_images(out, name, *flags))

    # The renders come first: they are the reference of all others.
    rows = {"real scenes": [measure(out, write_renders(out))]}
    for row_name, metrics in together(jobs, sample_and_measure, calls):
        rows.setdefault(row_name, []).append(metrics)
    return rows


def plot_over_training(rows, snapshots):
    """Draws every metric over the updates, one line per seed."""
    updates = [updates_of(snapshot) for snapshot in snapshots]
    (without_guidance,) = rows["base, no guidance"]
    (with_guidance,) = rows["base, guidance 4"]
    figure, axes = subplots(1, len(METRICS), 3.2, 2.8)
    for axis, metric in zip(axes, METRICS):
        for k in range(len(SEEDS)):
            curve = [without_guidance[metric]]
            curve += [rows[f"ReFL, {n} updates"][k][metric] for n in updates]
            axis.plot([0, *updates], curve, color="tab:blue", alpha=0.6)
        label = "base, guidance 4"
        axis.axhline(with_guidance[metric], color="grey", linestyle=":", label=label)
        axis.set(title=metric, xlabel="updates")
    axes[0].legend(fontsize=8)
    save_figure(figure, "refl_over_training.png", dpi=90)


def draw_before_and_after(run, snapshot):
    """Puts a run's first and last samples side by side, at half their size."""
    before = Image.open(run / "samples" / "step_000000.png").convert("RGB").reduce(2)
    after = Image.open(run / "samples" / f"{snapshot}.png").convert("RGB").reduce(2)
    gap = 16
    both = Image.new("RGB", (2 * before.width + gap, before.height), "white")
    both.paste(before, (0, 0))
    both.paste(after, (before.width + gap, 0))
    path = new_picture("refl.png")
    both.save(path)
    shrink(path)
