"""Do ReFL and ImageReFL work on a flow? On toy-flux, a small FLUX that samples in 5 Euler steps.

Runs     3 runs of `python refl.py --model toy-flux`, 3 of imagerefl.py, and 3 of refl.py with the
         gradient steps of imagerefl.py, seeds 0 to 2, twice as long as by default. Then 4 images of
         each of 40 held-out prompts: of the base model and of every snapshot; of the last two kinds
         of runs also in combined generation, with 1 to 4 base steps of 5.
Prints   the table of the experiment refl, with recognised, the oracle's nearest reading; and
         ImageReFL minus ReFL at the same gradient steps, updates and base steps, paired by
         training seed.
Draws    flows.png, the same prompts and noise before and after training, seed 0.
Took     48 minutes with --jobs 1, on two CPU cores that other jobs kept busy.
"""

import itertools

from toy import oracle

from .refl import SHOWN, Bench, combined_name
from .tools import SEEDS, describe_differences, draw_rows, held_out_prompts, mean, repeat, together
from .tools import train, write_table

NUM_STEPS = 5
UPDATES = 40  # the default; the runs go on for as long again
SNAPSHOTS = (UPDATES, 2 * UPDATES)
# The base model's steps at which each kind of run is sampled. ReFL's default trains the first three
# steps of 5, so it does not fit combined generation. Its second row trains the steps of ImageReFL.
BASE_STEPS = {"ReFL": (0,), "ReFL, late": (0, 1, 2, 3, 4), "ImageReFL": (0, 1, 2, 3, 4)}
COMPARED = ("toy_pref", "toy_pref_b", "toy_correct", "recognised", "dino_div")


def flows(out, jobs):
    runs = together(jobs, train_all, [(out, seed) for seed in SEEDS])
    prompts = held_out_prompts(out).read_text().splitlines()
    bench = Bench(out, prompts, model="toy-flux", scheduler="euler", num_steps=NUM_STEPS)
    rows = measure_rows(bench, runs)
    write_table(out / "table.md", rows)
    print_differences(rows)
    draw_before_and_after(bench)


def train_all(out, seed):
    """One run of each kind -> {kind: folder}."""
    flags = ("--train_steps", 2 * UPDATES, "--save_every", UPDATES)
    flags = ("--model", "toy-flux", "--seed", seed, *flags)
    late = ("--first_mid", 3, "--last_mid", 4)
    return {
        "ReFL": train(out, f"refl_{seed}", "refl", *flags),
        "ReFL, late": train(out, f"late_{seed}", "refl", *flags, *late),
        "ImageReFL": train(out, f"imagerefl_{seed}", "imagerefl", *flags),
    }


def measure(bench, name, lora, base_steps):
    """The metrics of a LoRA (None: the base model). This FLUX samples without guidance."""
    metrics = bench.measure(f"flow_{name}", lora, bench.combined, base_steps, 1.0)
    images = bench.images(f"flow_{name}")
    prompts = repeat(bench.prompts, bench.each)
    is_recognized = [oracle.recognised(image, p) for image, p in zip(images, prompts)]
    return {**metrics, "recognised": mean(is_recognized)}


def measure_rows(bench, runs):
    """{name of a row: its metrics, one dict per training seed}."""
    rows = {"base": [measure(bench, "base", None, NUM_STEPS)]}
    for kind, updates in itertools.product(BASE_STEPS, SNAPSHOTS):
        for base_steps in BASE_STEPS[kind]:
            row_name = combined_name(kind, updates, base_steps)
            rows[row_name] = []
            for seed in SEEDS:
                lora = runs[seed][kind] / "lora" / f"step_{updates:06d}"
                name = f"{kind}_{seed}_{updates}_{base_steps}"
                rows[row_name].append(measure(bench, name, lora, base_steps))
    return rows


def print_differences(rows):
    """Prints ImageReFL minus ReFL, setting by setting, paired by training seed."""
    for updates, base_steps in itertools.product(SNAPSHOTS, BASE_STEPS["ImageReFL"]):
        own = rows[combined_name("ImageReFL", updates, base_steps)]
        others = rows[combined_name("ReFL, late", updates, base_steps)]
        differences = {}
        for metric in COMPARED:
            differences[metric] = [a[metric] - b[metric] for a, b in zip(own, others)]
        print(f"\nImageReFL minus ReFL, {updates} updates, {base_steps} base steps")
        print("  " + describe_differences(differences))


def draw_before_and_after(bench):
    """Draws ten prompts before and after training, seed 0."""
    names = {"base": "base"}
    for kind, updates in itertools.product(("ReFL", "ImageReFL"), SNAPSHOTS):
        names[f"{kind}, {updates}"] = f"{kind}_0_{updates}_0"
    rows = {label: bench.images(f"flow_{name}")[SHOWN] for label, name in names.items()}
    draw_rows(rows, "flows.png")
