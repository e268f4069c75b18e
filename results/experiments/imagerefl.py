"""What do combined generation, AIG and ImageReFL's training keep of reward and diversity?

ImageReFL's Table 1 and Figures 5 and 9, beside the same seeds of ReFL, on held-out prompts.

Runs     5 runs of ReFL, the first 3 of which are those of the experiment refl, and 5 of
         imagerefl.py. The first 3 of these get twice as many updates as ReFL, as in the paper.
         Then 4 images of each of 40 held-out prompts: combined generation from two or three
         snapshots of every run at several switch points; and AIG with two to five powers from
         ReFL's last snapshot. These two are compared with a base guidance of 2, too.
Prints   the table; and the methods at equal diversity, after as many updates and after twice as
         many, read off straight lines between neighboring settings, with differences paired by
         training seed.
Draws    trade_off.png, each metric against diversity; and trade_off_images.png, the same prompts
         and noise under every method.
Took     about three quarters of an hour of CPU time, with the runs of the experiment refl.
"""

import itertools

import numpy as np

from .refl import LATE, METRICS, NUM_STEPS, SHOWN, UPDATES, Bench, combined_name, train_run
from .tools import SEEDS, describe_differences, draw_rows, held_out_prompts, mean, save_figure
from .tools import subplots, together, train, write_table

BASE_STEPS = (10, 15, 17)  # of 20: the switch points at which methods are compared
ALONE = (0, 5)  # ReFL's switch points with SEEDS only; at 0 it samples alone
ALL_SEEDS = (*SEEDS, 3, 4)
SNAPSHOTS = {
    "ReFL": (UPDATES, 2 * UPDATES),
    "ImageReFL": (UPDATES, 2 * UPDATES, 4 * UPDATES),
}
LOW_GUIDANCE = 2
# The base model's guidance: AIG's powers
POWERS = {4: (1, 1.5, 2, 3, 5), LOW_GUIDANCE: (1, 3)}
# The base model's guidance: where methods are compared
DIVERSITIES = {4: (0.195, 0.2, 0.205), LOW_GUIDANCE: (0.225, 0.23)}
COMPARED = ("toy_pref", "toy_pref_b", "toy_correct", "frechet_toy")


def imagerefl(out, jobs):
    runs = together(jobs, train_both, [(out, seed) for seed in ALL_SEEDS])
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
    # As in the paper, ImageReFL gets twice the updates of ReFL. The last two seeds are only used
    # for the comparison at equal updates.
    train_steps = 4 * UPDATES if seed in SEEDS else 2 * UPDATES
    flags = ("--train_steps", train_steps, "--save_every", UPDATES)
    image_run = train(out, f"run_{seed}", "imagerefl", "--seed", seed, *flags)
    return {"ReFL": train_run(out.parent / "refl", seed), "ImageReFL": image_run}


def base_name(guidance):
    return f"base, guidance {guidance}"


def switched_name(kind, updates, base_steps, guidance):
    """What a table calls combined generation with this guidance of the base model."""
    name = combined_name(kind, updates, base_steps)
    if guidance == LOW_GUIDANCE:
        name += f", base guidance {guidance}"
    return name


def aig_name(power, guidance):
    name = f"ReFL, {2 * UPDATES} updates + AIG, power {power}"
    if guidance == LOW_GUIDANCE:
        name += f", base guidance {guidance}"
    return name


def measure_rows(bench, runs):
    """{name of a row: its metrics, one dict per training seed, from seed 0 on}."""
    rows = {}
    for guidance in POWERS:
        metrics = bench.measure(f"base_{guidance}", None, bench.combined, NUM_STEPS, guidance)
        rows[base_name(guidance)] = [metrics]
    for kind, snapshots in SNAPSHOTS.items():
        switches = (*ALONE, *BASE_STEPS) if kind == "ReFL" else BASE_STEPS
        for updates, base_steps in itertools.product(snapshots, switches):
            seeds = ALL_SEEDS
            if base_steps in ALONE or updates > 2 * UPDATES:
                seeds = SEEDS
            row_name = combined_name(kind, updates, base_steps)
            rows[row_name] = []
            for seed in seeds:
                run = runs[seed][kind]
                metrics = bench.measure_combined(kind, run, seed, updates, base_steps)
                rows[row_name].append(metrics)

    # Combined generation and AIG from ReFL's last snapshot.
    updates = SNAPSHOTS["ReFL"][-1]
    for guidance in POWERS:
        for seed in SEEDS:
            lora = runs[seed]["ReFL"] / "lora" / f"step_{updates:06d}"
            if guidance == LOW_GUIDANCE:
                for base_steps in BASE_STEPS:
                    name = f"ReFL_{seed}_{updates}_{base_steps}_{guidance}"
                    metrics = bench.measure(name, lora, bench.combined, base_steps, guidance)
                    row_name = switched_name("ReFL", updates, base_steps, guidance)
                    rows.setdefault(row_name, []).append(metrics)
            for power in POWERS[guidance]:
                name = f"aig_{seed}_{updates}_{power}_{guidance}"
                metrics = bench.measure(name, lora, bench.aig, power, guidance)
                rows.setdefault(aig_name(power, guidance), []).append(metrics)
    return rows


# --------------------------------------------------------------------------------------------------
# Equal diversity


def line_names(kind, updates, guidance=4):
    """The rows of a snapshot in combined generation, up to the base model alone."""
    names = [switched_name(kind, updates, n, guidance) for n in BASE_STEPS]
    return [*names, base_name(guidance)]


def aig_line(guidance):
    """The rows of AIG with this guidance, up to the base model alone."""
    return [aig_name(power, guidance) for power in POWERS[guidance]] + [base_name(guidance)]


def comparisons():
    """Yields (method, its line, the other method, its line, guidance, diversities to compare at).

    Methods are compared after equally many updates, and ImageReFL with twice as many, too. AIG
    starts from ReFL's last snapshot only.
    """
    first, last = SNAPSHOTS["ReFL"]
    refl = f"ReFL, {last} updates"
    refl_line = line_names("ReFL", last)
    early_line = line_names("ReFL", first)
    for updates in SNAPSHOTS["ImageReFL"]:
        name = f"ImageReFL, {updates} updates"
        line = line_names("ImageReFL", updates)
        if updates == first:
            # So early, not every run is as little diverse as the other points.
            yield name, line, f"ReFL, {first} updates", early_line, 4, DIVERSITIES[4][-1:]
        else:
            yield name, line, refl, refl_line, 4, DIVERSITIES[4]
    for guidance in POWERS:
        line = line_names("ReFL", last, guidance)
        yield "AIG", aig_line(guidance), refl, line, guidance, DIVERSITIES[guidance]
    image_line = line_names("ImageReFL", last)
    yield f"ImageReFL, {last} updates", image_line, "AIG", aig_line(4), 4, DIVERSITIES[4]


def read_off(rows, line, seed, diversity):
    """A line of names -> {metric: its value at this diversity with this training seed}."""
    # The base model is the end of every line, whatever the training seed.
    settings = [rows[name][seed] for name in line[:-1]] + rows[line[-1]]
    return {metric: at_diversity(settings, diversity, metric) for metric in COMPARED}


def at_diversity(line, diversity, metric):
    """A metric at this diversity, on the straight lines between neighboring settings."""
    for left, right in zip(line, line[1:]):
        ends = sorted([left, right], key=lambda row: row["dino_div"])
        x = [row["dino_div"] for row in ends]
        y = [row[metric] for row in ends]
        if x[0] <= diversity <= x[1]:
            return np.interp(diversity, x, y).item()
    return float("nan")


def print_fronts(rows):
    """Prints the methods at equal diversity, with differences paired by training seed."""
    for method, line, other, other_line, guidance, diversities in comparisons():
        # Some rows have five training seeds and some three.
        seeds = range(min(len(rows[line[0]]), len(rows[other_line[0]])))
        for diversity in diversities:
            own = [read_off(rows, line, seed, diversity) for seed in seeds]
            others = [read_off(rows, other_line, seed, diversity) for seed in seeds]
            differences = {}
            for metric in COMPARED:
                differences[metric] = [a[metric] - b[metric] for a, b in zip(own, others)]
            values = [f"{metric} {mean(row[metric] for row in others):.3f}" for metric in COMPARED]
            print(f"\nbase guidance {guidance}, dino_div {diversity}")
            print(f"  {other}: " + "  ".join(values))
            print(f"  {method} minus {other}: " + describe_differences(differences))


# --------------------------------------------------------------------------------------------------
# The pictures


def mean_over_seeds(per_seed):
    """One dict per training seed -> their mean."""
    return {metric: mean(row[metric] for row in per_seed) for metric in METRICS}


def plot_trade_off(rows):
    """Draws each metric against diversity, with a line over the settings of each method."""
    lines = {}  # label: rows of the line, color, form
    forms = (("tab:cyan", "tab:blue"), ("gold", "tab:orange", "tab:red"))
    for (kind, snapshots), colors in zip(SNAPSHOTS.items(), forms):
        for updates, color in zip(snapshots, colors):
            lines[f"{kind}, {updates} updates"] = (line_names(kind, updates), color, "o-")
    updates = SNAPSHOTS["ReFL"][-1]
    lines[f"ReFL, {updates} updates, AIG"] = (aig_line(4), "tab:green", "+--")
    lines[base_name(4)] = ([base_name(4)], "black", "*")

    shown = [metric for metric in METRICS if metric != "dino_div"]
    figure, axes = subplots(1, len(shown), 4, 3.6)
    for axis, metric in zip(axes, shown):
        for label, (names, color, form) in lines.items():
            # Every row has these seeds, and only some have more.
            line = [mean_over_seeds(rows[name][: len(SEEDS)]) for name in names]
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
        "AIG, power 1": f"aig_0_{refl_updates}_1_4",
    }
    rows = {label: bench.images(name)[SHOWN] for label, name in names.items()}
    draw_rows(rows, "trade_off_images.png")
