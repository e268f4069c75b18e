"""What do combined generation, AIG and ImageReFL's training keep of reward and diversity?

ImageReFL's Table 1 and Figures 5 and 9, beside the same seeds of ReFL, on held-out prompts.

Runs     the 3 runs of the experiment refl, and 3 of imagerefl.py, which get up to twice as many
         updates, as in the paper (seeds 0 to 2). Then 4 images of each of 40 held-out prompts:
         combined generation from two or three snapshots of every run at several switch points; and
         AIG with two powers from ReFL's last snapshot.
Prints   the table; and every method's best unseen judge and captions at equal diversity, read off
         straight lines between neighboring settings, with differences paired by training seed.
Draws    trade_off.png, each metric against diversity; and trade_off_images.png, the same prompts
         and noise under every method.
Took     about half an hour of CPU time, with the runs of the experiment refl.
"""

import itertools

import numpy as np

from .refl import LATE, METRICS, NUM_STEPS, SHOWN, UPDATES, Bench, combined_name, draw_rows
from .refl import train_run
from .tools import SEEDS, describe_differences, held_out_prompts, mean, save_figure, subplots
from .tools import together, train, write_table

BASE_STEPS = {"ReFL": (5, 10, 15, 17), "ImageReFL": (10, 15, 17)}  # of 20: the switch points
SNAPSHOTS = {
    "ReFL": (UPDATES, 2 * UPDATES),
    "ImageReFL": (UPDATES, 2 * UPDATES, 4 * UPDATES),
}
POWERS = (1, 3)  # AIG's
DIVERSITIES = (0.185, 0.195, 0.205)  # at which methods are compared
COMPARED = ("toy_pref", "toy_pref_b", "toy_correct")


def imagerefl(out, jobs):
    runs = together(jobs, train_both, [(out, seed) for seed in SEEDS])
    bench = Bench(out, held_out_prompts(out).read_text().splitlines())
    rows = measure_rows(bench, runs)
    write_table(out / "table.md", rows)
    print_fronts(rows)
    plot_trade_off(rows)
    draw_images(bench)


# --------------------------------------------------------------------------------------------------
# Training and measuring


def train_both(out, seed):
    """A run of ReFL and one of ImageReFL -> {method: folder}. ReFL's belong to that experiment."""
    flags = ("--train_steps", 4 * UPDATES, "--save_every", UPDATES)
    image_run = train(out, f"run_{seed}", "imagerefl", "--seed", seed, *flags)
    return {"ReFL": train_run(out.parent / "refl", seed), "ImageReFL": image_run}


def aig_name(updates, power):
    return f"ReFL, {updates} updates + AIG, power {power}"


def measure_rows(bench, runs):
    """{name of a row: its metrics, one dict per training seed}."""
    rows = {"base, guidance 4": [bench.measure("base_4", None, bench.combined, NUM_STEPS, 4.0)]}
    for kind, snapshots in SNAPSHOTS.items():
        # Only ReFL is also sampled alone, with 0 base steps.
        switches = (0, *BASE_STEPS[kind]) if kind == "ReFL" else BASE_STEPS[kind]
        for updates, base_steps in itertools.product(snapshots, switches):
            row_name = combined_name(kind, updates, base_steps)
            for seed in SEEDS:
                run = runs[seed][kind]
                metrics = bench.measure_combined(kind, run, seed, updates, base_steps)
                rows.setdefault(row_name, []).append(metrics)
    updates = SNAPSHOTS["ReFL"][-1]
    for power in POWERS:
        for seed in SEEDS:
            lora = runs[seed]["ReFL"] / "lora" / f"step_{updates:06d}"
            metrics = bench.measure(f"aig_{seed}_{updates}_{power}", lora, bench.aig, power)
            rows.setdefault(aig_name(updates, power), []).append(metrics)
    return rows


# --------------------------------------------------------------------------------------------------
# Equal diversity


def lines_of(rows, seed):
    """{method: its lines, each a list of metrics}. Every line ends at the guided base model."""
    (base,) = rows["base, guidance 4"]
    lines = {}
    for kind, snapshots in SNAPSHOTS.items():
        lines[kind] = []
        for updates in snapshots:
            names = [combined_name(kind, updates, n) for n in BASE_STEPS[kind]]
            lines[kind].append([rows[name][seed] for name in names] + [base])
    updates = SNAPSHOTS["ReFL"][-1]
    names = [aig_name(updates, power) for power in POWERS]
    lines["AIG"] = [[rows[name][seed] for name in names] + [base]]
    # AIG starts from this snapshot only, so it is compared with its line.
    lines["ReFL, last"] = lines["ReFL"][-1:]
    return lines


def at_diversity(lines, diversity, metric):
    """The best value of a metric at this diversity, over straight lines between settings."""
    values = []
    for line in lines:
        for left, right in zip(line, line[1:]):
            low, high = sorted([left["dino_div"], right["dino_div"]])
            if low <= diversity <= high:
                ends = sorted([left, right], key=lambda row: row["dino_div"])
                y = [row[metric] for row in ends]
                values.append(np.interp(diversity, [low, high], y).item())
    return max(values, default=float("nan"))


def print_fronts(rows):
    """Prints every method at equal diversity, and the differences from ReFL with base steps."""
    for diversity in DIVERSITIES:
        print(f"\nat dino_div {diversity}")
        per_method = {}
        for seed in SEEDS:
            for method, lines in lines_of(rows, seed).items():
                values = {metric: at_diversity(lines, diversity, metric) for metric in COMPARED}
                per_method.setdefault(method, []).append(values)
        for method, per_seed in per_method.items():
            means = [f"{m} {mean(row[m] for row in per_seed):.3f}" for m in COMPARED]
            print(f"  {method:<12}" + "  ".join(means))
        for method, other in (("ImageReFL", "ReFL"), ("AIG", "ReFL, last")):
            differences = {}
            for metric in COMPARED:
                pairs = zip(per_method[method], per_method[other])
                differences[metric] = [own[metric] - refl[metric] for own, refl in pairs]
            print(f"  {method} minus {other}: " + describe_differences(differences))


# --------------------------------------------------------------------------------------------------
# The pictures


def mean_over_seeds(per_seed):
    """One dict per training seed -> their mean."""
    return {metric: mean(row[metric] for row in per_seed) for metric in METRICS}


def plot_trade_off(rows):
    """Draws each metric against diversity, with a line over the settings of each method."""
    (base,) = rows["base, guidance 4"]
    lines = {}  # label: rows of the line, color, form
    forms = (("tab:cyan", "tab:blue"), ("gold", "tab:orange", "tab:red"))
    for (kind, snapshots), colors in zip(SNAPSHOTS.items(), forms):
        for updates, color in zip(snapshots, colors):
            names = [combined_name(kind, updates, n) for n in BASE_STEPS[kind]]
            line = [mean_over_seeds(rows[name]) for name in names] + [base]
            lines[f"{kind}, {updates} updates"] = (line, color, "o-")
    updates = SNAPSHOTS["ReFL"][-1]
    line = [mean_over_seeds(rows[aig_name(updates, power)]) for power in POWERS]
    lines[f"ReFL, {updates} updates, AIG"] = (line + [base], "tab:green", "+--")
    lines["base, guidance 4"] = ([base], "black", "*")

    shown = [metric for metric in METRICS if metric != "dino_div"]
    figure, axes = subplots(1, len(shown), 4, 3.6)
    for axis, metric in zip(axes, shown):
        for label, (line, color, form) in lines.items():
            x = [row["dino_div"] for row in line]
            y = [row[metric] for row in line]
            axis.plot(x, y, form, color=color, label=label, markersize=5)
        axis.set(xlabel="dino_div", title=metric)
    axes[0].legend(fontsize=7)
    save_figure(figure, "trade_off.png", dpi=80)


def draw_images(bench):
    """Draws the first image of ten prompts under every method, seed 0."""
    refl_updates = SNAPSHOTS["ReFL"][-1]
    image_updates = SNAPSHOTS["ImageReFL"][-1]
    names = {
        "base, guidance 4": "base_4",
        "ReFL alone": f"ReFL_0_{refl_updates}_0",
        f"ReFL, {LATE} base steps": f"ReFL_0_{refl_updates}_{LATE}",
        f"ImageReFL, {LATE} base": f"ImageReFL_0_{image_updates}_{LATE}",
        "AIG, power 1": f"aig_0_{refl_updates}_1",
    }
    rows = {label: bench.images(name)[SHOWN] for label, name in names.items()}
    draw_rows(rows, "trade_off_images.png")
