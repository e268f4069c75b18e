"""What do combined generation, AIG and ImageReFL's training keep of reward and diversity?

ImageReFL's Table 1 and Figures 5 and 9, beside the same seeds of ReFL. ImageReFL goes further than
ReFL in the same number of updates, and at the paper's weight its diffusion loss hardly restrains
the toy model.
So we also ask which of its snapshots is as diverse as the last one of ReFL. We ask on training
prompts and seed 0, and then compare on held-out prompts.

Runs     refl.py's 3 runs, which it shares with the experiment refl, and 12 of imagerefl.py (240
         updates, seeds 0 to 2): its defaults, --diffusion_weight 1e-4, and two ablations. Then 8
         images of each of 40 held-out prompts per row: tuned, combined with 5 to 17 base steps, and
         AIG. To choose the snapshots, also 4 images of each of 40 training prompts.
Prints   what the choice of snapshots is based on; the table; and the differences from ReFL at the
         same switch points, paired by training seed.
Draws    trade_off.png: each metric against diversity.
Took     about 2.5 minutes per run on two CPU cores when nothing else ran, plus the images.
"""

import itertools
import shutil

from common import TOY
from data.prompts import read_prompts

from .refl import METRICS, measure, write_renders
from .tools import NUM_IMAGES, NUM_PROMPTS, SEEDS, describe_differences, held_out_prompts, mean
from .tools import run_script, sample_images, save_figure, snapshot_names, subplots, together
from .tools import train, updates_of, write_prompts, write_table

BASE_STEPS = (5, 8, 11, 14, 17)  # of 20: the switch points of combined generation
LATER_BASE_STEPS = BASE_STEPS[2:]  # those that the chosen snapshots are shown at
SWITCH = 11  # the one that the ablations are shown at
MATCH = 14  # the one at which ImageReFL's number of updates is chosen, on training prompts
# A diffusion_weight at which the diffusion loss holds the toy model. The paper's is 1e-5.
WEIGHT = 1e-4
REFL_EARLIER = "step_000120"  # ReFL stopped earlier, for comparison
KINDS = {  # kind of run: its name in the table, its script and flags
    "refl": ("ReFL", "refl"),
    "imagerefl": ("ImageReFL", "imagerefl"),
    "no_diffusion": (
        "ImageReFL without the diffusion loss", "imagerefl", "--diffusion_weight", 0,
    ),
    "no_refl": ("ImageReFL without ReFL steps", "imagerefl", "--refl_every", 0),
    "weighted": (
        f"ImageReFL, diffusion_weight {WEIGHT:g}", "imagerefl", "--diffusion_weight", WEIGHT,
    ),
}
COMPARED = ("refl", "imagerefl", "weighted")  # kinds of which we choose a snapshot


def imagerefl(out, jobs):
    calls = [(out, kind, seed) for seed in SEEDS for kind in KINDS]
    together(jobs, train_kind, calls)
    rows = measure_last(out, jobs)
    chosen = choose_snapshots(out, jobs)
    later = measure_chosen(out, jobs, chosen)
    write_table(out / "table.md", {**rows, **later})

    updates = updates_of(snapshot_names(run_of(out, "refl", SEEDS[0]))[-1])
    own = combined_rows(rows, "ImageReFL", BASE_STEPS)
    print_differences("ImageReFL after as many updates", own, rows, updates)
    for kind in ("imagerefl", "weighted"):
        name = chosen_name(kind, chosen[kind])
        own = combined_rows(later, name, LATER_BASE_STEPS)
        print_differences(name, own, rows, updates)
    plot_trade_off(rows, later, chosen)


def combined_name(name, base_steps):
    """What the table calls combined generation."""
    return f"{name} + combined, {base_steps} base steps"


def combined_rows(rows, name, base_steps):
    """{number of base steps: its row}."""
    return {n: rows[combined_name(name, n)] for n in base_steps}


# --------------------------------------------------------------------------------------------------
# Training


def run_of(out, kind, seed):
    """The folder of a run. Those of ReFL belong to the experiment refl."""
    if kind == "refl":
        return out.parent / "refl" / f"run_{seed}"
    return out / f"{kind}_{seed}"


def train_kind(out, kind, seed):
    run = run_of(out, kind, seed)
    _, script, *flags = KINDS[kind]
    train(run.parent, run.name, script, *flags, "--seed", seed)


# --------------------------------------------------------------------------------------------------
# The last snapshots


def measure_last(out, jobs):
    """{name of a row: its metrics, one dict per training seed}, without the chosen snapshots."""
    # The renders come first: they are the reference of all others.
    rows = {"real scenes": [measure(out, write_renders(out))]}
    measured = together(jobs, measure_base, [(out, 4), (out, 1)])
    calls = [(out, kind, seed) for seed in SEEDS for kind in KINDS if kind != "weighted"]
    measured += together(jobs, measure_run, calls)
    for metrics_of_rows in measured:
        for name, metrics in metrics_of_rows.items():
            rows.setdefault(name, []).append(metrics)
    return dict(sorted(rows.items(), key=row_order))


def row_order(item):
    """Base and real scenes first, then by kind, and the shorter name first."""
    name, _ = item
    is_tuned = not name.startswith(("base", "real"))
    return is_tuned, name.split(",")[0], len(name), name


def measure_base(out, guidance_scale):
    """The base model -> {name of its row: its metrics}."""
    lora = run_of(out, "refl", SEEDS[0])
    flags = ("--mode", "base", "--lora", lora, "--base_guidance_scale", guidance_scale)
    folder = sample_images(out, f"base_{guidance_scale}", *flags)
    return {f"base, guidance {guidance_scale}": measure(out, folder)}


def measure_run(out, kind, seed):
    """The last snapshot of a run, with every way to sample it -> {name of a row: its metrics}."""
    label = KINDS[kind][0]
    run = run_of(out, kind, seed)
    base_steps = (SWITCH,) if kind.startswith("no_") else BASE_STEPS
    rows = {}
    for n, folder in sample_combined(out, run, f"{kind}_{seed}_combined", base_steps).items():
        metrics = measure(out, folder, f"{kind}_{seed}_combined_{n}")
        rows[combined_name(label, n)] = metrics

    folder = sample_images(out, f"{kind}_{seed}", "--mode", "tuned", "--lora", run)
    rows[label] = measure(out, folder)
    if kind == "refl":
        for guidance_scale in (1, 4):
            flags = ("--mode", "aig", "--lora", run, "--base_guidance_scale", guidance_scale)
            folder = sample_images(out, f"{kind}_{seed}_aig_{guidance_scale}", *flags)
            rows[f"{label} + AIG, base guidance {guidance_scale}"] = measure(out, folder)
    return rows


def sample_combined(out, run, name, base_steps):
    """Samples held-out prompts at several switch points -> {number of base steps: folder}."""
    folder = out / "images" / name
    folders = {n: folder / f"base_steps_{n}" for n in base_steps}
    if len(base_steps) == 1:
        folders = {base_steps[0]: folder}
    done = folders[base_steps[-1]] / "metadata.jsonl"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
    run_script(
        out, name, "combined_sample", "--lora", run, "--mode", "combined",
        "--base_steps", *base_steps, "--prompts", held_out_prompts(out),
        "--num_images", NUM_IMAGES, "--out", folder, done=done,
    )
    return folders


# --------------------------------------------------------------------------------------------------
# The chosen snapshots


def choose_snapshots(out, jobs):
    """Chooses the snapshots that are as diverse as ReFL's last -> {kind: name of its snapshot}.

    We ask on training prompts, so that the held-out ones have no part in the choice. Of ReFL
    itself it is the snapshot REFL_EARLIER.
    """
    training_prompts = read_prompts(TOY / "prompts_train.txt")[:NUM_PROMPTS]
    prompts = write_prompts(out / "training_prompts.txt", training_prompts)
    snapshots = snapshot_names(run_of(out, "refl", SEEDS[0]))

    def measure_on_training_prompts(kind, snapshot):
        lora = run_of(out, kind, SEEDS[0]) / "lora" / snapshot
        flags = ("--lora", lora, "--mode", "combined", "--base_steps", MATCH)
        name = f"tuning_{kind}_{snapshot}"
        return measure(out, sample_images(out, name, *flags, prompts=prompts, num_images=4))

    calls = list(itertools.product(COMPARED, snapshots))
    tuning = dict(zip(calls, together(jobs, measure_on_training_prompts, calls)))
    print(f"\ntraining prompts, seed 0, {MATCH} base steps")
    for kind, snapshot in sorted(tuning):
        # The reference of frechet_toy has other prompts.
        metrics = tuning[kind, snapshot]
        parts = [f"{name} {metrics[name]:.3f}" for name in METRICS if name != "frechet_toy"]
        print(f"  {kind:<10}{snapshot}  " + "  ".join(parts))

    target = tuning["refl", snapshots[-1]]["dino_div"]
    chosen = {}
    for kind in ("imagerefl", "weighted"):
        distance = {name: abs(tuning[kind, name]["dino_div"] - target) for name in snapshots}
        chosen[kind] = min(distance, key=distance.get)
    chosen["refl"] = REFL_EARLIER
    return chosen


def chosen_name(kind, snapshot):
    """What the table calls a chosen snapshot."""
    return f"{KINDS[kind][0]}, {updates_of(snapshot)} updates"


def measure_chosen(out, jobs, chosen):
    """{name of a row: its metrics, one dict per training seed} of the chosen snapshots."""

    def measure_cell(kind, base_steps, seed):
        snapshot = chosen[kind]
        lora = run_of(out, kind, seed) / "lora" / snapshot
        flags = ("--lora", lora, "--mode", "combined", "--base_steps", base_steps)
        name = f"{kind}_{seed}_{snapshot}_{base_steps}"
        return measure(out, sample_images(out, name, *flags))

    calls = list(itertools.product(chosen, LATER_BASE_STEPS, SEEDS))
    rows = {}
    for call, metrics in zip(calls, together(jobs, measure_cell, calls)):
        kind, base_steps, _ = call
        name = combined_name(chosen_name(kind, chosen[kind]), base_steps)
        rows.setdefault(name, []).append(metrics)
    return rows


def print_differences(name, own, rows, updates):
    """Prints own {base steps: one dict per seed} minus ReFL's last snapshot, paired by seed."""
    print(f"\n{name}, minus ReFL after {updates} updates: mean (each seed)")
    for base_steps, per_seed in own.items():
        refl_per_seed = rows[combined_name("ReFL", base_steps)]
        differences = {}
        for metric in METRICS:
            pairs = zip(per_seed, refl_per_seed)
            differences[metric] = [row[metric] - refl[metric] for row, refl in pairs]
        print(f"  {base_steps:>2} base steps  " + describe_differences(differences))


# --------------------------------------------------------------------------------------------------
# The picture


def plot_trade_off(rows, later, chosen):
    """Draws each metric against diversity, with a line over the switch points of each kind."""
    lines = []  # rows of a line, color, form, label
    for name, color in (("ReFL", "tab:blue"), ("ImageReFL", "tab:orange")):
        combined = combined_rows(rows, name, BASE_STEPS).values()
        curve = [rows[name], *combined, rows["base, guidance 4"]]
        lines.append((curve, color, "o-", f"{name} + combined"))
        lines.append(([rows[name]], color, "s", f"{name} alone"))
    for kind, color in (("refl", "tab:cyan"), ("imagerefl", "tab:red"), ("weighted", "tab:green")):
        name = chosen_name(kind, chosen[kind])
        curve = list(combined_rows(later, name, LATER_BASE_STEPS).values())
        lines.append((curve, color, "o--", f"{name} + combined"))
    points = {
        "base, guidance 4": ("black", "*"),
        "base, guidance 1": ("black", "."),
        "real scenes": ("green", "^"),
        "ReFL + AIG, base guidance 1": ("blue", "x"),
        "ReFL + AIG, base guidance 4": ("blue", "+"),
    }
    for name, (color, marker) in points.items():
        lines.append(([rows[name]], color, marker, name))

    shown = [metric for metric in METRICS if metric != "dino_div"]
    figure, axes = subplots(1, len(shown), 4, 3.6)
    for axis, metric in zip(axes, shown):
        for curve, color, form, label in lines:
            x = [mean(row["dino_div"] for row in per_seed) for per_seed in curve]
            y = [mean(row[metric] for row in per_seed) for per_seed in curve]
            size = dict(markersize=3) if form.startswith("o") else {}
            axis.plot(x, y, form, color=color, label=label, **size)
        axis.set(xlabel="dino_div", title=metric)
    axes[0].legend(fontsize=6)
    save_figure(figure, "trade_off.png", dpi=80)
