"""ImageReFL on the toy world, beside the same seeds of ReFL."""
import shutil

from common import read_prompts

from .refl import METRICS, metrics, renders
from .tools import IMAGES, PROMPTS, ROOT, SEEDS, call, held_out_prompts, images, mean, prompt_file, subplots, table, together, train

BASE_STEPS = (5, 8, 11, 14, 17)                  # of 20: the switch points of combined generation
SWITCH = 11                                      # the one that the ablations are shown at
MATCH = 14                                       # the one at which ImageReFL's number of updates is chosen, on training prompts
WEIGHT = 1e-4                                    # a diffusion_weight at which the diffusion loss holds the toy model; the paper's is 1e-5
REFL_EARLIER = "step_000120"                     # ReFL stopped earlier, for comparison


def training_prompts(out):
    """For choices: what is tuned is tuned on these, and reported on the held-out ones."""
    return prompt_file(out / "training_prompts.txt", read_prompts(ROOT / "toy" / "prompts_train.txt")[:PROMPTS])


def imagerefl(out, jobs):
    """ImageReFL's Table 1 and Figures 5 and 9: what combined generation and AIG keep of the reward, and of the diversity."""
    kinds = {"refl": ("ReFL", "refl"), "imagerefl": ("ImageReFL", "imagerefl"),
             "no_diffusion": ("ImageReFL without the diffusion loss", "imagerefl", "--diffusion_weight", 0),
             "no_refl": ("ImageReFL without ReFL steps", "imagerefl", "--refl_every", 0),
             "weighted": (f"ImageReFL, diffusion_weight {WEIGHT:g}", "imagerefl", "--diffusion_weight", WEIGHT)}
    runs = {(kind, seed): out.parent / "refl" / f"run_{seed}" if kind == "refl" else out / f"{kind}_{seed}"
            for seed in SEEDS for kind in kinds}
    together(jobs, [lambda k=k, s=s: train(runs[k, s].parent, runs[k, s].name, *kinds[k][1:], "--seed", s) for k, s in runs])

    results = {("real scenes", 0): metrics(out, renders(out))}
    together(jobs, [lambda g=g: results.update({(f"base, guidance {g}", 0): metrics(out, images(
        out, f"base_{g}", "--mode", "base", "--lora", runs["refl", 0], "--base_guidance_scale", g))}) for g in (4, 1)])

    def measure(kind, seed):
        name, run = kinds[kind][0], runs[kind, seed]
        steps = (SWITCH,) if kind.startswith("no_") else BASE_STEPS
        folder = out / "images" / f"{kind}_{seed}_combined"
        last = folder / (f"base_steps_{steps[-1]}" if len(steps) > 1 else "") / "metadata.jsonl"
        if not last.exists():
            shutil.rmtree(folder, ignore_errors=True)
        call(out, folder.name, "combined_sample", "--lora", run, "--mode", "combined", "--base_steps", *steps, "--prompts", held_out_prompts(out),
             "--num_images", IMAGES, "--out", folder, done=last)
        for n in steps:
            results[f"{name} + combined, {n} base steps", seed] = metrics(out, folder / f"base_steps_{n}" if len(steps) > 1 else folder, f"{folder.name}_{n}")
        results[name, seed] = metrics(out, images(out, f"{kind}_{seed}", "--mode", "tuned", "--lora", run))
        for g in (1, 4) if kind == "refl" else ():
            results[f"{name} + AIG, base guidance {g}", seed] = metrics(
                out, images(out, f"{kind}_{seed}_aig_{g}", "--mode", "aig", "--lora", run, "--base_guidance_scale", g))
    together(jobs, [lambda k=k, s=s: measure(k, s) for k, s in runs if k != "weighted"])
    rows = {name: [results[n, s] for n, s in sorted(results) if n == name] for name in dict.fromkeys(n for n, _ in results)}
    rows = dict(sorted(rows.items(), key=lambda kv: (kv[0][0] not in "br", kv[0].split(",")[0], len(kv[0]), kv[0])))

    # ImageReFL goes further in as many updates, and at the paper's weight its diffusion loss hardly holds it. Which snapshot, of either weight, is as
    # diverse as the last of ReFL? Asked on training prompts, seed 0; then compared on held-out ones.
    tuning, snapshots = {}, sorted(p.name for p in (runs["refl", 0] / "lora").glob("step_*"))
    together(jobs, [lambda k=k, n=n: tuning.update({(k, n): metrics(out, images(
        out, f"tuning_{k}_{n}", "--lora", runs[k, 0] / "lora" / n, "--mode", "combined", "--base_steps", MATCH, prompts=training_prompts(out), num_images=4))})
        for k in ("refl", "imagerefl", "weighted") for n in snapshots])
    print(f"\ntraining prompts, seed 0, {MATCH} base steps")
    for (k, n), row in sorted(tuning.items()):
        print(f"  {k:<10}{n}  " + "  ".join(f"{m} {v:.3f}" for m, v in row.items() if m != "frechet_toy"))
    last = tuning["refl", snapshots[-1]]["dino_div"]
    chosen = {k: min(snapshots, key=lambda n: abs(tuning[k, n]["dino_div"] - last)) for k in ("imagerefl", "weighted")} | {"refl": REFL_EARLIER}
    cells = [(k, b, s) for k in chosen for b in BASE_STEPS[2:] for s in SEEDS]
    equal = {}
    together(jobs, [lambda k=k, b=b, s=s: equal.update({(k, b, s): metrics(out, images(
        out, f"{k}_{s}_{chosen[k]}_{b}", "--lora", runs[k, s] / "lora" / chosen[k], "--mode", "combined", "--base_steps", b))}) for k, b, s in cells])
    updates = {k: int(n.removeprefix("step_")) for k, n in chosen.items()}
    later = {f"{kinds[k][0]}, {updates[k]} updates + combined, {b} base steps": [equal[k, b, s] for s in SEEDS] for k, b, _ in cells}
    table(out / "table.md", rows | later)

    def differences(name, base_steps, row_of):
        """Prints row_of(base_steps, seed) minus the last ReFL's at the same switch point, paired by training seed."""
        print(f"\n{name}, minus ReFL after {int(snapshots[-1].removeprefix('step_'))} updates: mean (each seed)")
        for b in base_steps:
            each = {m: [row_of(b, s)[m] - results[f"ReFL + combined, {b} base steps", s][m] for s in SEEDS] for m in METRICS}
            print(f"  {b:>2} base steps  " + "  ".join(f"{m} {mean(d):+.3f} ({' '.join(f'{x:+.3f}' for x in d)})" for m, d in each.items()))
    differences("ImageReFL after as many updates", BASE_STEPS, lambda b, s: results[f"ImageReFL + combined, {b} base steps", s])
    for k in ("imagerefl", "weighted"):
        differences(f"{kinds[k][0]}, {updates[k]} updates", BASE_STEPS[2:], lambda b, s, k=k: equal[k, b, s])

    shown = [m for m in METRICS if m != "dino_div"]
    at = lambda row, metric: mean(r[metric] for r in row)
    figure, axes = subplots(1, len(shown), 4, 3.6)
    for axis, metric in zip(axes, shown):
        for name, colour in (("ReFL", "tab:blue"), ("ImageReFL", "tab:orange")):
            curve = [rows[name], *(rows[f"{name} + combined, {n} base steps"] for n in BASE_STEPS), rows["base, guidance 4"]]
            axis.plot([at(r, "dino_div") for r in curve], [at(r, metric) for r in curve], "o-", color=colour, markersize=3, label=f"{name} + combined")
            axis.plot(at(curve[0], "dino_div"), at(curve[0], metric), "s", color=colour, label=f"{name} alone")
        for k, colour in (("refl", "tab:cyan"), ("imagerefl", "tab:red"), ("weighted", "tab:green")):
            curve = [row for name, row in later.items() if name.startswith(f"{kinds[k][0]}, {updates[k]} updates")]
            axis.plot([at(r, "dino_div") for r in curve], [at(r, metric) for r in curve], "o--", color=colour, markersize=3,
                      label=f"{kinds[k][0]}, {updates[k]} updates + combined")
        for name, marker in (("base, guidance 4", "k*"), ("base, guidance 1", "k."), ("real scenes", "g^"), ("ReFL + AIG, base guidance 1", "bx"),
                             ("ReFL + AIG, base guidance 4", "b+")):
            axis.plot(at(rows[name], "dino_div"), at(rows[name], metric), marker, label=name)
        axis.set(xlabel="dino_div", title=metric)
    axes[0].legend(fontsize=6)
    figure.savefig(out / "trade_off.png", dpi=80)
