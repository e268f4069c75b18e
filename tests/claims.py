"""The experiments behind the README's tables: their figures are printed by this file. Restartable: what is done is not done again.

  $ OMP_NUM_THREADS=1 python tests/claims.py refl --out claims --jobs 2             # 3 training runs and their images
  $ OMP_NUM_THREADS=1 python tests/claims.py imagerefl --out claims --jobs 2        # 12 more runs; uses refl's
  $ OMP_NUM_THREADS=1 python tests/claims.py focus_n_fix --out claims --jobs 2      # 12 short runs
  $ OMP_NUM_THREADS=1 python tests/claims.py dfusion --out claims                   # D-Fusion's pairs; nothing is trained

Writes DIR/<experiment>/table.md, results.json and plots. The training seed is the unit: a figure is the mean over seeds, with the standard
deviation over seeds behind the sign; held-out prompts and image seeds are the same for every row.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dfusion_dpo
from common import generator, load_detector, load_model, load_reward, make_scheduler, save_grid
from evaluate import Dino
from focus_n_fix import THRESHOLD, change, concept_reward, grad_cam, last_norm, problem_mask
from toy import oracle
from toy.scenes import render, sample_scene

SEEDS = (0, 1, 2)
PROMPTS, IMAGES = 40, 8
METRICS = ("toy_pref", "toy_pref_b", "toy_correct", "dino_div", "frechet_toy")
BASE_STEPS = (5, 8, 11, 14, 17)                  # of 20: the switch points of combined generation
SWITCH = 11                                      # the one that the ablations are shown at
MATCH = 14                                       # the one at which ImageReFL's number of updates is chosen, on training prompts
WEIGHT = 1e-4                                    # a diffusion_weight at which the diffusion loss holds the toy model; the paper's is 1e-5
REFL_EARLIER = "step_000120"                     # ReFL stopped earlier, for comparison


def call(out, name, script, *words, done=None):
    """Runs one of the repository's scripts unless `done` exists; its output goes to out/logs."""
    if done and done.exists():
        return
    log = out / "logs" / f"{script}_{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as f:
        code = subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, words)], stdout=f, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code:
        raise SystemExit(f"{script}.py {' '.join(map(str, words))} ended with {code}: see {log}")


def together(jobs, calls):
    """Runs thunks, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        for result in [pool.submit(c) for c in calls]:
            result.result()


def held_out_prompts(out):
    path = out / "prompts.txt"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join((ROOT / "toy" / "prompts_test.txt").read_text().splitlines()[:PROMPTS]) + "\n")
    return path


def training_prompts(out):
    """For choices: what is tuned is tuned on these, and reported on the held-out ones."""
    path = out / "training_prompts.txt"
    path.write_text("\n".join((ROOT / "toy" / "prompts_train.txt").read_text().splitlines()[:PROMPTS]) + "\n")
    return path


def images(out, name, *words, prompts=None, num_images=IMAGES):
    """Images of one row of a table, of held-out prompts unless said otherwise; returns their folder."""
    folder = out / "images" / name
    if not (folder / "metadata.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)                         # killed while it was sampled
    call(out, name, "combined_sample", *words, "--prompts", prompts or held_out_prompts(out), "--num_images", num_images, "--out", folder,
         done=folder / "metadata.jsonl")
    return folder


def renders(out):
    """Real scenes of the same prompts, as many as a row has images: the reference of frechet_toy, and a row of its own."""
    folder = out / "images" / "renders"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(held_out_prompts(out).read_text().splitlines()):
        for k in range(IMAGES):
            rows.append(dict(file_name=f"{i:05d}_{k:02d}.png", text=prompt, prompt_id=i))
            image = render(sample_scene(np.random.default_rng([i, k]), prompt))[0]
            Image.fromarray(np.round(image * 255).astype(np.uint8)).save(folder / rows[-1]["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def metrics(out, folder, name=None):
    """dict metric -> value of one folder of images."""
    done = out / "metrics" / f"{name or folder.name}.json"
    done.parent.mkdir(exist_ok=True)
    call(out, name or folder.name, "evaluate", folder, "--metrics", ",".join(METRICS), "--reference", out / "images" / "renders", "--out", done, done=done)
    return {m: json.loads(done.read_text())["folders"][str(folder)][m]["mean"] for m in METRICS}


def train(out, name, script, *words):
    """One training run, continued if it was cut off; returns its folder."""
    run = out / name
    config = run / "config.json"
    if not (run / "checkpoint" / "state.pt").exists():
        shutil.rmtree(run, ignore_errors=True)                            # killed before its first snapshot
    if not config.exists() or not (run / "lora" / f"step_{json.loads(config.read_text())['train_steps']:06d}").exists():
        call(out, name, script, *words, "--out", run, *(["--resume"] if (run / "checkpoint" / "state.pt").exists() else []))
    return run


def over_seeds(rows):
    """A list of dicts metric -> value -> dict metric -> (mean, standard deviation)."""
    return {m: (statistics.mean(r[m] for r in rows), statistics.stdev(r[m] for r in rows) if len(rows) > 1 else None) for m in METRICS}


def write_table(out, rows):
    """rows: dict name -> dict metric -> (mean, sd or None); a markdown table, printed and written."""
    lines = ["| | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}") for mean, sd in (row[m] for m in METRICS)) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


def refl(out, jobs):
    """ReFL raises the reward on held-out prompts and lowers diversity (ImageReFL's Figure 2). Tuned models sample without guidance."""
    runs = {seed: out / f"run_{seed}" for seed in SEEDS}
    together(jobs, [lambda s=s: train(out, f"run_{s}", "refl", "--seed", s) for s in SEEDS])

    snapshots = sorted(p.name for p in (runs[SEEDS[0]] / "lora").glob("step_*"))
    wanted = {("base, guidance 4",): ("base_guided", "--mode", "base", "--lora", runs[0], "--base_guidance_scale", 4),
              ("base, no guidance",): ("base_plain", "--mode", "base", "--lora", runs[0], "--base_guidance_scale", 1)}
    wanted |= {(name, seed): (f"{name}_{seed}", "--mode", "tuned", "--lora", runs[seed] / "lora" / name) for name in snapshots for seed in SEEDS}
    results = {("real scenes",): metrics(out, renders(out))}
    together(jobs, [lambda k=k, w=w: results.update({k: metrics(out, images(out, *w))}) for k, w in wanted.items()])
    rows = {k[0]: over_seeds([results[k]]) for k in results if len(k) == 1}
    rows |= {f"ReFL, {int(n.removeprefix('step_'))} updates": over_seeds([results[n, s] for s in SEEDS]) for n in snapshots}
    write_table(out, dict(sorted(rows.items(), key=lambda kv: (kv[0][0] not in "br", len(kv[0]), kv[0]))))
    seconds = [json.loads(line)["seconds"] for s in SEEDS for line in (runs[s] / "log.jsonl").read_text().splitlines()]
    print(f"seconds per update: median {statistics.median(seconds):.2f}, {jobs} runs at a time")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(METRICS), figsize=(3.2 * len(METRICS), 2.8), constrained_layout=True)
    x = [0] + [int(n.removeprefix("step_")) for n in snapshots]
    for axis, metric in zip(axes, METRICS):
        for seed in SEEDS:
            axis.plot(x, [results["base, no guidance",][metric]] + [results[n, seed][metric] for n in snapshots], color="tab:blue", alpha=.6)
        axis.axhline(results["base, guidance 4",][metric], color="grey", linestyle=":", label="base, guidance 4")
        axis.set(title=metric, xlabel="updates")
    axes[0].legend(fontsize=8)
    figure.savefig(out / "over_training.png", dpi=90)
    before, after = (Image.open(runs[0] / "samples" / f"{name}.png").convert("RGB").reduce(2) for name in ("step_000000", snapshots[-1]))
    both = Image.new("RGB", (2 * before.width + 16, before.height), "white")
    both.paste(before, (0, 0))
    both.paste(after, (before.width + 16, 0))
    both.quantize(256).save(out / "before_after.png", optimize=True)


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
    rows = {name: over_seeds([results[n, s] for n, s in sorted(results) if n == name]) for name in dict.fromkeys(n for n, _ in results)}
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
    later = {f"{kinds[k][0]}, {updates[k]} updates + combined, {b} base steps": over_seeds([equal[k, b, s] for s in SEEDS]) for k, b, _ in cells}
    write_table(out, rows | later)

    def differences(name, base_steps, row_of):
        """Prints row_of(base_steps, seed) minus the last ReFL's at the same switch point, paired by training seed."""
        print(f"\n{name}, minus ReFL after {int(snapshots[-1].removeprefix('step_'))} updates: mean (each seed)")
        for b in base_steps:
            each = {m: [row_of(b, s)[m] - results[f"ReFL + combined, {b} base steps", s][m] for s in SEEDS] for m in METRICS}
            print(f"  {b:>2} base steps  " + "  ".join(f"{m} {statistics.mean(d):+.3f} ({' '.join(f'{x:+.3f}' for x in d)})" for m, d in each.items()))
    differences("ImageReFL after as many updates", BASE_STEPS, lambda b, s: results[f"ImageReFL + combined, {b} base steps", s])
    for k in ("imagerefl", "weighted"):
        differences(f"{kinds[k][0]}, {updates[k]} updates", BASE_STEPS[2:], lambda b, s, k=k: equal[k, b, s])

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = [m for m in METRICS if m != "dino_div"]
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.6), constrained_layout=True)
    for axis, metric in zip(axes, shown):
        for name, colour in (("ReFL", "tab:blue"), ("ImageReFL", "tab:orange")):
            curve = [rows[name], *(rows[f"{name} + combined, {n} base steps"] for n in BASE_STEPS), rows["base, guidance 4"]]
            axis.plot([r["dino_div"][0] for r in curve], [r[metric][0] for r in curve], "o-", color=colour, markersize=3, label=f"{name} + combined")
            axis.plot(curve[0]["dino_div"][0], curve[0][metric][0], "s", color=colour, label=f"{name} alone")
        for k, colour in (("refl", "tab:cyan"), ("imagerefl", "tab:red"), ("weighted", "tab:green")):
            curve = [row for name, row in later.items() if name.startswith(f"{kinds[k][0]}, {updates[k]} updates")]
            axis.plot([r["dino_div"][0] for r in curve], [r[metric][0] for r in curve], "o--", color=colour, markersize=3,
                      label=f"{kinds[k][0]}, {updates[k]} updates + combined")
        for name, marker in (("base, guidance 4", "k*"), ("base, guidance 1", "k."), ("real scenes", "g^"), ("ReFL + AIG, base guidance 1", "bx"),
                             ("ReFL + AIG, base guidance 4", "b+")):
            axis.plot(rows[name]["dino_div"][0], rows[name][metric][0], marker, label=name)
        axis.set(xlabel="dino_div", title=metric)
    axes[0].legend(fontsize=6)
    figure.savefig(out / "trade_off.png", dpi=80)


BETAS = dict(heatmap=(0, .5), concept=(0, 3))    # Focus-N-Fix; 0 is DRaFT
CONCEPT_LR = 3e-4                                # at the default 1e-3 DRaFT and beta 1 both end in pictures that no longer show any caption
CONCEPT = "a red circle", "a blue circle"        # what is unwanted, and its neutral counterpart
DILATE = 3
UPDATES, EVERY = 60, 15


def read_folder(folder):
    """Images (N, 3, H, W) in [0, 1], and their prompts."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pixels = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB"), np.float32) / 255 for row in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), [row["text"] for row in rows]


def focus_n_fix(out, jobs):
    """The same gain inside of the region for a smaller change outside? DRaFT (beta 0) against the regional term, at equal reward."""
    lists = {name: (ROOT / "toy" / f"prompts_{name}.txt").read_text().splitlines() for name in ("train", "test")}
    files = dict(test=lists["test"][:PROMPTS], red_train=[p for p in lists["train"] if "red" in p], red_test=[p for p in lists["test"] if "red" in p][:PROMPTS],
                 unrelated=[p for p in lists["test"] if "red" not in p][:PROMPTS])
    out.mkdir(parents=True, exist_ok=True)
    for name, prompts in files.items():
        (out / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    words = dict(heatmap=[], concept=["--concept", *CONCEPT, "--lr", CONCEPT_LR, "--prompts", out / "red_train.txt", "--test_prompts", out / "red_test.txt"])
    prompts = dict(heatmap=out / "test.txt", concept=out / "red_test.txt")
    detector, detector_b = (load_detector(ROOT / "toy" / name, torch.device("cpu")) for name in ("detector", "detector_b"))
    clip = load_reward("toy_clip", torch.device("cpu"))[0]
    concept = concept_reward(clip, *CONCEPT)

    @torch.no_grad()
    def measure(case, folder, base, mask):
        """One folder of images beside the base model's -> dict of means over images."""
        images, texts = read_folder(folder)
        row = dict(outside=change(images, base, 1 - mask).mean().item(), second=-detector_b(images).mean().item())
        if case == "heatmap":                                             # the reward is a mean over pixels: split it
            maps, keep = detector(images)[:, None], mask.sum((1, 2, 3)) > 0
            part = lambda where: ((maps * where).sum((1, 2, 3)) / where.sum((1, 2, 3)).clamp(min=1))
            return dict(row, reward=-maps.mean().item(), inside_reward=-part(mask)[keep].mean().item(), outside_reward=-part(1 - mask).mean().item())
        r = lambda images: concept(images, texts).mean().item()           # the tuned image inside of the region alone, or outside of it alone
        return dict(row, reward=r(images), inside_reward=r(torch.where(mask > 0, images, base)), outside_reward=r(torch.where(mask > 0, base, images)))

    def one(case, beta, seed):
        name = f"{case}_{beta}_{seed}"
        run = train(out, name, "focus_n_fix", "--beta", beta, "--seed", seed, "--train_steps", UPDATES, "--save_every", EVERY, *words[case])
        folders = [run / "over_steps" / f"step_{step:06d}" for step in range(0, UPDATES + 1, EVERY)]
        call(out, f"{name}_sample", "evaluate", "--over_steps", run, "--prompts", prompts[case], "--num_images", 2, "--metrics", "toy_correct",
             "--out", run / "sampled.json", done=run / "sampled.json")
        base, texts = read_folder(folders[0])
        with alone:                                                       # the judges are shared, and Grad-CAM hangs a hook on one
            heat = (detector(base)[:, None] if case == "heatmap" else grad_cam(last_norm(clip), lambda images: -concept(images, texts), base))
        mask = problem_mask(heat, THRESHOLD["heatmap" if case == "heatmap" else "saliency"], DILATE)
        (run / "masks").mkdir(exist_ok=True)
        for file, m in zip(sorted(p.name for p in folders[0].glob("*.png")), mask):
            Image.fromarray((m[0] * 255).byte().numpy()).save(run / "masks" / file)
        call(out, name, "evaluate", *folders, "--metrics", "toy_correct,toy_pref_b,drift", "--masks", run / "masks", "--out", run / "measured.json",
             done=run / "measured.json")
        measured, rows = json.loads((run / "measured.json").read_text()), []
        for folder in folders:
            drift = measured["drift"].get(str(folder), dict(psnr=dict(mean=None), dino=dict(mean=0.)))
            with alone:
                own = measure(case, folder, base, mask)
            rows.append(dict(own, psnr=drift["psnr"]["mean"], dino=drift["dino"]["mean"],
                             **{m: measured["folders"][str(folder)][m]["mean"] for m in ("toy_correct", "toy_pref_b")}, area=mask.mean().item()))
        if case == "concept":                                             # prompts that have nothing to do with it
            for row, folder, mode in ((rows[0], f"{name}_unrelated_0", "base"), (rows[-1], f"{name}_unrelated", "tuned")):
                guidance = ("--base_guidance_scale", 4) if mode == "base" else ()
                folder = images(out, folder, "--lora", run, "--mode", mode, *guidance, prompts=out / "unrelated.txt", num_images=2)
                done = out / "metrics" / f"{folder.name}.json"
                done.parent.mkdir(exist_ok=True)
                call(out, folder.name, "evaluate", folder, "--metrics", "toy_correct", "--out", done, done=done)
                row["unrelated"] = json.loads(done.read_text())["folders"][str(folder)]["toy_correct"]["mean"]
        results[case, beta, seed] = rows

    results, alone = {}, threading.Lock()
    torch.set_num_threads(1)
    together(jobs, [lambda c=c, b=b, s=s: one(c, b, s) for s in SEEDS for c in words for b in BETAS[c]])
    (out / "results.json").write_text(json.dumps({" ".join(map(str, k)): v for k, v in sorted(results.items())}, indent=1) + "\n")

    def at_gain(rows, level, field):
        """`field` where the reward first reaches `level`, on straight lines between snapshots."""
        for a, b in zip(rows, rows[1:]):
            if b["reward"] >= level:
                share = (level - a["reward"]) / (b["reward"] - a["reward"])
                return a[field] + share * (b[field] - a[field])
        return float("nan")

    lines = []
    for case in words:
        level = {s: min(max(r["reward"] for r in results[case, b, s]) for b in BETAS[case]) for s in SEEDS}       # what both reach
        fields = ("outside", "dino", "inside_reward", "outside_reward", "second", "toy_correct", "toy_pref_b")
        lines += [f"\n{case}: where the reward first reaches what both reach, " + ", ".join(f"{v:.4f}" for v in level.values())
                  + f" (before: {statistics.mean(results[case, 0, s][0]['reward'] for s in SEEDS):.4f}; region {results[case, 0, 0][0]['area']:.1%})\n",
                  "| | " + " | ".join(fields) + " |", "|---|" + "---|" * len(fields)]
        spread = lambda values: f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        lines.append("| before | " + " | ".join(f"{results[case, 0, 0][0][f]:.4f}" for f in fields) + " |")
        lines += [f"| beta {b:g} | " + " | ".join(spread([at_gain(results[case, b, s], level[s], f) for s in SEEDS]) for f in fields) + " |" for b in BETAS[case]]
        last = ("reward", "outside", "psnr", *fields[1:], *(["unrelated"] if case == "concept" else []))
        lines += [f"\n{case}: after {UPDATES} updates\n", "| | " + " | ".join(last) + " |", "|---|" + "---|" * len(last),
                  "| before | " + " | ".join("" if f == "psnr" else f"{results[case, 0, 0][0][f]:.4f}" for f in last) + " |"]
        lines += [f"| beta {b:g} | " + " | ".join(spread([results[case, b, s][-1][f] for s in SEEDS]) for f in last) + " |" for b in BETAS[case]]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for row, case in zip(axes, words):
        for axis, field in zip(row, ("outside", "dino", "toy_correct")):
            for beta, colour in zip(BETAS[case], ("tab:red", "tab:blue")):
                for s in SEEDS:
                    axis.plot([r["reward"] for r in results[case, beta, s]], [r[field] for r in results[case, beta, s]], "o-", markersize=3, color=colour,
                              alpha=.7, label=(f"beta {beta:g}" if beta else "DRaFT (beta 0)") if s == SEEDS[0] else None)
            axis.set(title=f"{case}: {field}", xlabel="reward")
        row[0].legend(fontsize=7)
    figure.savefig(out / "equal_reward.png", dpi=80)


FUSED = {"layers 3-6, steps 18-1 (the paper's)": ("3-6", "18-1"), "layer 3": ("3", "18-1"), "layers 2-4": ("2-4", "18-1"), "layers 3-5": ("3-5", "18-1"),
         "all layers": ("0-6", "18-1"), "steps 20-1": ("3-6", "20-1"), "steps 18-10": ("3-6", "18-10"), "steps 9-1": ("3-6", "9-1")}


def dfusion(out, jobs):
    """D-Fusion's pairs on the base model: is a target the base's scene with the reference's item? Do the masks find the items? And Figure 9."""
    torch.set_num_threads(jobs)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    model, reward, dino = load_model("toy", device), load_reward("toy_clip", device)[0], Dino(ROOT / "toy" / "dino", device)
    args = dfusion_dpo.parse_args(["--out", str(out / "unused")])
    scheduler, blocks, scale = make_scheduler(model, "ddim", args.num_inference_steps), dfusion_dpo.attention_blocks(model), args.guidance_scale
    capturing, lines, pictures, N = dfusion_dpo.modules_of(model, [blocks[args.mask_layer]], "attn2"), [], {}, 16
    steps_of = lambda text: range(args.num_inference_steps - max(dfusion_dpo.span("", text)), args.num_inference_steps - min(dfusion_dpo.span("", text)) + 1)
    right = lambda images, prompt: [float(oracle.correct(image, prompt) is True) for image in images]
    for template in ("attributes", "relations"):
        rows = dfusion_dpo.read_items(args.prompts, template)[0][::5]                      # 8 of its 40 training prompts
        plain, fused, found = [], {name: [] for name in FUSED}, []
        for p, row in enumerate(rows):
            prompt, generators = row["prompt"], lambda which: [generator(0, "pairs", p, int(k)) for k in which]
            spans = [dfusion_dpo.token_span(model.pipe.tokenizer, prompt, item, args.item_token) for item in row["items"]]
            with dfusion_dpo.installed(model, dfusion_dpo.CrossAttentionMaps(N), capturing) as maps_of:
                x, maps = dfusion_dpo.sample_trajectories(model, scheduler, prompt, generators(range(N)), scale, maps_of, spans)
            images, r = dfusion_dpo.score(model, reward, x[:, -1], prompt, N)
            reference, base, source = dfusion_dpo.choose(r)
            masks = dfusion_dpo.merge_masks(maps[reference], row["thresholds"], args.mask_merge)
            with torch.no_grad():
                features = dino(images)
            a, b = reference[source], base
            plain.append((r[b].mean(), r[a].mean(), (features[a] * features[b]).sum(-1).mean(), (images[a] - images[b]).abs().mean(),
                          statistics.mean(right(images[b], prompt)), statistics.mean(right(images[a], prompt))))
            for k, m in zip(reference, masks):                             # the masks against the objects, as the oracle cuts them out
                pixels = oracle.to_array(images[k])
                thing = torch.from_numpy(oracle.segment(pixels, oracle.background_of(pixels)) > 0).float()
                thing = torch.nn.functional.adaptive_avg_pool2d(thing[None], m.shape[-1])[0]
                m = m[steps_of(args.fusion_steps)].float()
                found.append(((m * thing).sum((1, 2)) / thing.sum(), m.mean((1, 2)), thing.mean().expand(len(m))))
            for name, (layers, steps) in FUSED.items():
                names = dfusion_dpo.modules_of(model, [blocks[i] for i in dfusion_dpo.span("", layers)], "attn1")
                with dfusion_dpo.installed(model, dfusion_dpo.SelfAttentionFusion(), names) as fusion:
                    target = dfusion_dpo.fuse(model, scheduler, fusion, prompt, x[reference], x[base], source, masks, generators(base), scale, steps_of(steps))
                made, r_t = dfusion_dpo.score(model, reward, target[:, -1], prompt, N)
                with torch.no_grad():
                    cosine = (dino(made) * features[b]).sum(-1).mean()
                fused[name].append((r_t.mean(), (r_t >= r[b]).float().mean(), cosine, (made - images[b]).abs().mean(), statistics.mean(right(made, prompt))))
                if p < 6:
                    pictures.setdefault((template, p), [images[base[0]], images[reference[0]]]).append(made[0])
        mean = lambda parts: torch.tensor(parts, dtype=torch.float64).mean(0).tolist()
        r_b, r_a, cosine, pixels, right_b, right_a = mean(plain)
        lines += [f"\n{template}: {len(rows)} prompts, {N} images each, {len(base)} pairs a prompt\n",
                  "| | toy_clip | adopted | toy_correct | cosine to the base (DINO) | pixel distance to the base |", "|---|---|---|---|---|---|",
                  f"| base | {r_b:.3f} | | {right_b:.2f} | 1 | 0 |", f"| reference | {r_a:.3f} | | {right_a:.2f} | {cosine:.3f} | {pixels:.3f} |"]
        for name in FUSED:
            r_t, adopted, cosine, pixels, correct = mean(fused[name])
            lines.append(f"| target: {name} | {r_t:.3f} | {adopted:.2f} | {correct:.2f} | {cosine:.3f} | {pixels:.3f} |")
        inside, area, objects = (torch.cat(x).mean().item() for x in zip(*found))
        lines.append(f"\nmasks: {area:.1%} of the latent; the objects are {objects:.1%} of the picture, {inside:.1%} of them under the mask")
    save_grid(torch.cat([torch.stack(images) for images in pictures.values()]), out / "pairs.png", columns=2 + len(FUSED))
    Image.open(out / "pairs.png").quantize(256).save(out / "pairs.png", optimize=True)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


EXPERIMENTS = dict(refl=refl, imagerefl=imagerefl, focus_n_fix=focus_n_fix, dfusion=dfusion)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, default=Path("claims"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (set OMP_NUM_THREADS=1 for more than one)")
    args = parser.parse_args()
    EXPERIMENTS[args.experiment]((args.out / args.experiment).resolve(), args.jobs)


if __name__ == "__main__":
    main()
