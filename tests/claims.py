"""The experiments behind the README's tables: their figures are printed by this file. Restartable: what is done is not done again.

  $ OMP_NUM_THREADS=1 python tests/claims.py refl --out claims --jobs 2             # 3 training runs and their images
  $ OMP_NUM_THREADS=1 python tests/claims.py imagerefl --out claims --jobs 2        # 12 more runs; uses refl's
  $ OMP_NUM_THREADS=1 python tests/claims.py focus_n_fix --out claims --jobs 2      # 12 short runs
  $ OMP_NUM_THREADS=1 python tests/claims.py dfusion --out claims --jobs 2          # pairs, gradients, 21 runs
  $ OMP_NUM_THREADS=1 python tests/claims.py diffdoctor --out claims                # 12 detectors, 24 treatments, a DreamBooth

Writes DIR/<experiment>/table.md, results.json and plots. The training seed is the unit: a figure is the mean over seeds, with the standard
deviation over seeds behind the sign; held-out prompts and image seeds are the same for every row.
"""
import argparse
import contextlib
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dfusion_dpo
from common import (base_model, condition, decode, encode, encode_once, generate, generator, initial_latents, load_detector, load_lora, load_model, load_reward,
                    make_scheduler, save_grid, save_weights, to_pil, trainable)
from diffdoctor import Labelled, detector_metrics, diagnose, offline_loss, overlay, read_labels, stop_reason
from evaluate import Dino
from focus_n_fix import THRESHOLD, change, concept_reward, grad_cam, last_norm, problem_mask
from prompts.coco import image_data
from toy import oracle
from toy.artifacts import corrupt
from toy.scenes import COLOURS, RELATIONS, SHAPES, parse_caption, render, sample_scene

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


def dfusion_pairs(out):
    """D-Fusion's pairs on the base model: is a target the base's scene with the reference's item? Do the masks find the items? And Figure 9."""
    if (out / "pairs.md").exists():
        return (out / "pairs.md").read_text().split("\n")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model, reward, dino = load_model("toy", device), load_reward("toy_clip", device)[0], Dino(ROOT / "toy" / "dino", device)
    args = dfusion_dpo.parse_args(["--guidance_scale", "5", "--num_inference_steps", "20", "--out", str(out / "unused")])
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
    (out / "pairs.md").write_text("\n".join(lines))
    return lines


ALGOS, METHODS = ("dpo", "ddpo", "dpok"), {"fused": (), "naive": ("--naive",)}
ROUNDS = 16                                      # of 64 images: 8 prompts x 8; two updates each
UNSEEN = 8                                       # images of an unseen prompt
DFUSION = ("--num_inference_steps", 10, "--guidance_scale", 1, "--trained_steps", "4-3", "--train_timesteps", 2, "--micro_batch", 32, "--lr", 1e-3,
           "--train_steps", 2 * ROUNDS, "--save_every", 8)                # where dfusion_gradients finds something to learn
# one run each, attributes alone, seed 0: lr 4e-4 and 1e-3 fused, 1e-3 and 3e-3 naive; 1e-3 taken for all


def mixed_prompts(out):
    """Half attributes, half relations: 80 training prompts, 40 unseen ones; returns the file."""
    file = json.loads((ROOT / "prompts" / "dfusion_toy.json").read_text())
    both = {part: [row for pair in zip(*(t[part] for t in file.values())) for row in pair] for part in ("train", "test")}
    both = dict(train=both["train"], test=both["test"][:PROMPTS])
    assert not {row["prompt"] for row in both["train"]} & set(both["test"])
    (out / "prompts.json").write_text(json.dumps(dict(both=both)) + "\n")
    return out / "prompts.json"


def dfusion_training(out, jobs):
    """D-Fusion's Figures 6 and 7: do fused pairs teach more than naive ones, on unseen prompts? And section 4.4's ablation."""
    prompts, device, sampler = mixed_prompts(out), torch.device("cpu"), dict(scheduler="ddim", eta=1., num_inference_steps=10, guidance_scale=1.)
    kinds = {f"{algo}, {method}": ("--algo", algo, *words) for algo in ALGOS for method, words in METHODS.items()}
    kinds["dpo, fused, inverted trajectories"] = ("--algo", "dpo", "--trajectory", "inversion")
    runs = {(kind, s): out / f"{re.sub(', | ', '_', kind)}_{s}" for s in SEEDS for kind in kinds}
    together(jobs, [lambda k=k, s=s: train(out, runs[k, s].name, "dfusion_dpo", *DFUSION, *kinds[k], "--seed", s, "--prompts", prompts) for k, s in runs])

    tests = json.loads(prompts.read_text())["both"]["test"]
    each = [p for p in tests for _ in range(UNSEEN)]
    reward, second, dino = load_reward("toy_clip", device)[0], load_reward(f"toy_pref:{ROOT / 'toy' / 'pref_b'}", device)[0], Dino(ROOT / "toy" / "dino", device)

    @torch.no_grad()
    def measure(lora):
        """{metric: (prompts,)}: means over a prompt's images, on seeds that training never saw; lora None is the base model."""
        done = out / "measured" / f"{lora.parent.parent.name}_{lora.name}.json" if lora else out / "measured" / "base.json"
        if not done.exists():
            model = load_model("toy", device)
            encode_once(model, tests)
            if lora:
                trainable(model, 8, init_lora=str(lora))
            images = generate(model, tests, 1, sampler, UNSEEN)
            f = dino(images).unflatten(0, (-1, UNSEEN))
            parts = zip(images.split(32), [each[i:i + 32] for i in range(0, len(each), 32)])
            r = torch.cat([torch.stack([reward(x, p), second(x, p)], 1) for x, p in parts]).T
            rows = dict(toy_correct=torch.tensor([float(oracle.correct(x, p) is True) for x, p in zip(images, each)]),
                        recognised=torch.tensor([float(oracle.recognised(x, p)) for x, p in zip(images, each)]), toy_clip=r[0], toy_pref_b=r[1])
            rows = {m: v.unflatten(0, (-1, UNSEEN)).mean(1).tolist() for m, v in rows.items()}
            rows["dino_div"] = ((1 - f @ f.mT).sum((1, 2)) / (UNSEEN * (UNSEEN - 1))).tolist()
            done.parent.mkdir(exist_ok=True)
            done.write_text(json.dumps(rows) + "\n")
            save_grid(images.unflatten(0, (-1, UNSEEN))[:8].flatten(0, 1), done.with_suffix(".png"), columns=UNSEEN)
        return {m: np.array(v) for m, v in json.loads(done.read_text()).items()}

    torch.set_num_threads(1)
    snapshots = sorted(p.name for p in (runs[next(iter(runs))] / "lora").glob("step_*"))[1::2]
    base, change, logs = measure(None), {}, {}
    for k, s in runs:
        logs[k, s] = [json.loads(line) for line in (runs[k, s] / "log.jsonl").read_text().splitlines()]
        for name in snapshots:
            row = measure(runs[k, s] / "lora" / name)
            change[k, s, name] = {m: (row[m] - base[m]).mean() for m in base}
    spread = lambda values: f"{statistics.mean(values):+.4f} ± {statistics.stdev(values):.4f}"
    lines = ["\nunseen prompts, the change from the base model at the same seeds (" + ", ".join(f"{m} {v.mean():.3f}" for m, v in base.items()) + ")\n",
             "| | images | passes | adopted | " + " | ".join(base) + " |", "|---|" + "---|" * (3 + len(base))]
    for name in snapshots:
        for k in kinds:
            rows = [[r for r in logs[k, s] if r["step"] <= int(name.removeprefix("step_"))] for s in SEEDS]
            adopted = [r["adoption"] for part in rows for r in part if "adoption" in r]
            lines.append(f"| {k} | {rows[0][-1]['images']:,} | {sum(r['passes'] for r in rows[0]):,} | " + (f"{statistics.mean(adopted):.2f}" if adopted else "")
                         + " | " + " | ".join(spread([change[k, s, name][m] for s in SEEDS]) for m in base) + " |")
    lines.append("\nfused minus naive, mean (each seed)\n")
    for name in snapshots:
        for algo in ALGOS:
            each_seed = {m: [change[f"{algo}, fused", s, name][m] - change[f"{algo}, naive", s, name][m] for s in SEEDS] for m in base}
            lines.append(f"  {algo:<5}{name}  " + "  ".join(f"{m} {statistics.mean(d):+.3f} ({' '.join(f'{x:+.3f}' for x in d)})" for m, d in each_seed.items()))

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), constrained_layout=True, sharey="row")
    for column, algo in zip(axes.T, ALGOS):
        for method, colour in zip(METHODS, ("tab:blue", "tab:red")):
            for s in SEEDS:
                rows = logs[f"{algo}, {method}", s]
                at = [sum(r["passes"] for r in rows if r["step"] <= n) / 1000 for n in (0, *(int(x.removeprefix("step_")) for x in snapshots))]
                for axis, m in zip(column, ("toy_clip", "toy_correct")):
                    axis.plot(at, [0, *(change[f"{algo}, {method}", s, n][m] for n in snapshots)], "o-", color=colour, markersize=3,
                              label=method if s == SEEDS[0] else None)
                    axis.set(title=f"{algo}: {m}, change", xlabel="thousand images through the U-Net")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(out / "training.png", dpi=80)
    return lines


def dfusion_gradients(out):
    """Why: is the gradient of a round the same as that of another, and as the reward's own? The reward's: backpropagated through all of sampling."""
    torch.set_num_threads(1)
    lines = ["\nDPO's gradient at the base model, rounds of 64 images: mean cosine between rounds, and to the gradient of the mean reward (± its standard error)\n",
             "| guidance, steps | t | naive: between rounds | to the reward's | fused: between rounds | to the reward's |", "|---|---|---|---|---|---|"]
    for scale, T, rounds in ((1, 10, 4), (5, 20, 3)):
        done = out / f"gradients_{scale}_{T}.json"
        if not done.exists():
            args = dfusion_dpo.parse_args(["--guidance_scale", str(scale), "--num_inference_steps", str(T), "--train_timesteps", str(T), "--out", str(out / "unused")])
            model, reward = load_model("toy", torch.device("cpu")), load_reward("toy_clip", torch.device("cpu"))[0]
            rows = dfusion_dpo.read_items(args.prompts, "attributes")[0][::5]              # 8 prompts, the same in all rounds
            encode_once(model, [row["prompt"] for row in rows])
            params, scheduler, blocks = trainable(model, args.lora_rank), make_scheduler(model, "ddim", T), dfusion_dpo.attention_blocks(model)
            modules = (dfusion_dpo.modules_of(model, [blocks[args.mask_layer]], "attn2"),
                       dfusion_dpo.modules_of(model, [b for b in blocks if not b.startswith("down")], "attn1"))

            def take():
                """The gradient as one vector of length 1."""
                vector = torch.cat([p.grad.flatten() for p in params])
                for p in params:
                    p.grad = None
                return vector / vector.norm()

            for seed in range(2):                                         # 128 images; only gradients are kept
                for row in rows:
                    generators, texts = [generator(seed, "true", row["prompt"], k) for k in range(8)], [row["prompt"]] * 8
                    x = initial_latents(model, generators)
                    for t in scheduler.timesteps:
                        mu, sigma = dfusion_dpo.ddim_step(scheduler, dfusion_dpo.guided(model, x, t.expand(8), texts, scale), t.expand(8), x)
                        x = mu + sigma * initial_latents(model, generators)
                    (-reward(decode(model, x), texts).mean()).backward()
            truth, found = take(), {}
            groups = [range(a, min(a + T // 5, T - 1)) for a in range(0, T - 1, T // 5)]
            for number, naive in itertools.product(range(rounds), (True, False)):
                args.naive = naive
                pairs, _ = dfusion_dpo.sample_round(args, model, scheduler, reward, rows, modules, range(T // 10, T), {}, number)
                for steps in groups:
                    couples = torch.tensor([(p, i) for p in range(len(pairs.prompts)) for i in steps])
                    for part in couples.split(16):
                        (dfusion_dpo.pair_loss(args, model, scheduler, pairs, *part.T)[0] * len(part) / len(couples)).backward()
                    found.setdefault((steps, naive), []).append(take())
            table = []
            for (steps, naive), vectors in found.items():
                v = torch.stack(vectors)
                between, to_reward = (v @ v.T)[~torch.eye(rounds, dtype=bool)], v @ truth
                table.append((scheduler.timesteps[steps].tolist(), naive, between.mean().item(), to_reward.mean().item(), (to_reward.std() / rounds ** .5).item()))
            done.write_text(json.dumps(table) + "\n")
        table = json.loads(done.read_text())
        for (t, _, *naive), (_, _, *fused) in zip(table[::2], table[1::2]):
            lines.append(f"| {scale}, {T} | {t[0]}" + (f" to {t[-1]}" if len(t) > 1 else "")
                         + "".join(f" | {a:+.2f} | {b:+.3f} ± {c:.3f}" for a, b, c in (naive, fused)) + " |")
    return lines


def dfusion(out, jobs):
    """The pairs, the gradients, and the training."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [*dfusion_pairs(out), *dfusion_gradients(out), *dfusion_training(out, jobs)]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


LADDER = dict(human=1500, photos=800, pool=2400, test=400)            # images; DiffDoctor's detector
DETECTOR_UPDATES = 1000
TREATED = {  # DiffDoctor's runs: model, measured after so many updates, flags
    "toy-flux, gamma 0": ("toy-flux", (40, 80, 120, 160, 240), "--gamma", 0),
    "toy-flux, gamma .25": ("toy-flux", (40, 80, 120, 160, 240), "--gamma", .25),
    "toy-flux, gamma 0, max pixel": ("toy-flux", (40, 80, 120), "--gamma", 0, "--pixels", "max"),
    "toy-flux, gamma 0, grad_steps 5": ("toy-flux", (40, 80, 120), "--gamma", 0, "--grad_steps", 5),
    "toy, gamma 0": ("toy", (20, 40), "--gamma", 0, "--grad_steps", 1),
    "toy, gamma .25": ("toy", (20, 40), "--gamma", .25, "--grad_steps", 1),
    "toy, gamma 0, grad_steps 5": ("toy", (20, 40, 60), "--gamma", 0, "--grad_steps", 5),
    "toy, gamma .25, grad_steps 5": ("toy", (20, 40, 60), "--gamma", .25, "--grad_steps", 5)}
INSTANCE, MAROON = "a [v] star", (.45, .07, .08) # DreamBooth: "[v]" is unknown to the tokenizer; no red of the toy world is so dark
INSTANCE_UPDATES, INSTANCE_TREATED = 300, 60
EACH = 2                                         # images per held-out prompt


def labelled_scenes(folder, count, star, other):
    """`count` scenes of at most one star as a labelled folder, whose images/ is an imagefolder with categories too. `star` and `other`: the shares of
    scenes with and without one that hold a mistake, in the star if there is one. All but photographs bear a generator's marks (oracle.degrade)."""
    if (folder / "meta.jsonl").exists():
        return folder
    for part in ("images", "maps"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        rng, shapes = np.random.default_rng([zlib.crc32(folder.name.encode()), i]), ["star"] * 2
        while shapes.count("star") > 1:
            scene = sample_scene(rng)
            shapes = [o["shape"] for o in scene["objects"]]
        (image, coverage), confidence, category = render(scene), np.zeros((64, 64)), "star" if "star" in shapes else shapes[0]
        if rng.random() < (star if category == "star" else other):
            spot = coverage[shapes.index("star")] if category == "star" else 0 * coverage[0]
            while not confidence.any() or (confidence * spot).sum() < .2 * spot.sum():
                image, confidence = corrupt(scene, rng)
        if folder.name != "photos":
            image = oracle.degrade(image, rng)
        rows.append(dict(file_name=f"{i:05d}.png", text=scene["caption"], category=category, source="human",
                         split="test" if folder.name == "test" else "train"))
        for part, pixels in (("images", image), ("maps", confidence)):
            Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(folder / part / rows[-1]["file_name"])
    for path in (folder / "images" / "metadata.jsonl", folder / "meta.jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def table(path, rows, digits=2, head=()):
    """rows: {name: a dict field -> value for each seed}; a markdown table of means and standard deviations, printed and written."""
    fields = list(next(iter(rows.values()))[0])
    cell = lambda values: f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
    lines = [*head, "| | " + " | ".join(fields) + " |", "|---|" + "---|" * len(fields)]
    lines += [f"| {name} | " + " | ".join(cell([row[f] for row in of]) for f in fields) + " |" for name, of in rows.items()]
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def ladder(out, jobs):
    """DiffDoctor's Table 1: what each kind of data adds to a detector whose first labels know no well-formed star."""
    data = {name: labelled_scenes(out / "data" / name, n, *dict(human=(1, .3), photos=(0, 0)).get(name, (.5, .5))) for name, n in LADDER.items()}
    photos, pool = data["photos"] / "images", data["pool"] / "images"
    test, results, named, cpu = Labelled(read_labels([data["test"]], [photos]), 64), {}, {}, torch.device("cpu")
    fine = [row for row in test.rows if row["source"] == "human" and not np.asarray(Image.open(row["map"])).any()]

    def one(seed):
        at, results[seed] = out / f"ladder_{seed}", {}

        def detector(name, *folders, real=True):
            run = at / name.replace(" ", "_")
            folder, metrics = run / "model" / "detector", run / "metrics.json"
            if not (folder / "model.safetensors").exists():
                shutil.rmtree(run, ignore_errors=True)
                call(out, f"{name}_{seed}", "diffdoctor", "detector", "--data", *folders, *(["--real", photos] if real else []), "--seed", seed,
                     "--train_steps", DETECTOR_UPDATES, "--save_every", DETECTOR_UPDATES, "--out", run)
            if not metrics.exists():
                found = load_detector(folder, cpu)
                means = [(r["category"] == "star", m.mean().item()) for r, m in diagnose(found, fine, cpu)]
                row = detector_metrics(found, test, cpu)[0]
                row |= {f"{k} without a mistake": 100 * statistics.mean(m for s, m in means if s == (k == "stars")) for k in ("stars", "others")}
                metrics.write_text(json.dumps(row) + "\n")
            results[seed][name] = json.loads(metrics.read_text())
            return folder

        def step(command, folder, *words):
            call(out, f"{command}_{seed}_{folder.name}", "diffdoctor", command, *words, "--out", folder,
                 done=folder / ("scores.jsonl" if command == "score" else "meta.jsonl"))
        zeroth, first = detector("previous labels", data["human"], real=False), detector("+ photographs", data["human"])
        for name, detected in (("previous", zeroth), ("photographs", first)):
            step("score", at / f"scores_{name}", "--detector", detected, "--images", pool)
            scores = [json.loads(line) for line in (at / f"scores_{name}" / "scores.jsonl").read_text().splitlines()]
            means = {c: statistics.mean(r["mean"] for r in scores if r["category"] == c) for c in SHAPES}
            named[seed, name] = ", ".join({r["category"] for r in scores if r["abnormal"]}) or "none", means["star"] / sorted(means.values())[1]
        step("export_hard", at / "hard", "--detector", first, "--images", pool, "--scores", at / "scores_photographs", "--categories", "star",
             "--max_images", 400)
        for row in map(json.loads, (at / "hard" / "meta.jsonl").read_text().splitlines()):              # the person, who knows the truth
            shutil.copy(data["pool"] / "maps" / row["original"], at / "hard" / "maps" / row["file_name"])
        step("import_labels", at / "labelled", "--labels", at / "hard")
        second = detector("+ hard cases", data["human"], at / "labelled")
        step("pseudo", at / "pseudo", "--detector", second, "--images", pool, "--exclude", at / "hard")
        detector("+ pseudo labels", data["human"], at / "labelled", at / "pseudo")

    together(jobs, [lambda s=s: one(s) for s in SEEDS])
    head = [f"abnormal, by the detector of {n}: " + "; ".join(f"{named[s, n][0]} (stars {named[s, n][1]:.2f} times the median)" for s in SEEDS)
            for n in ("previous", "photographs")]
    table(out / "ladder.md", {name: [results[s][name] for s in SEEDS] for name in results[SEEDS[0]]}, 3, [*head, ""])


class Judges:
    """What DiffDoctor's tables hold of images (N, 3, H, W) of `prompts`, EACH of each; confidences in percent, before: the images of equal seeds."""

    def __init__(self):
        cpu = torch.device("cpu")
        self.detectors = {name: load_detector(ROOT / "toy" / name, cpu) for name in ("detector", "detector_b")}
        self.pref, self.dino = load_reward(f"toy_pref:{ROOT / 'toy' / 'pref_b'}", cpu)[0], Dino(ROOT / "toy" / "dino", cpu)

    @torch.no_grad()
    def __call__(self, images, prompts, before):
        prompts, parts, row = [p for p in prompts for _ in range(EACH)], [slice(i, i + 32) for i in range(0, len(images), 32)], {}
        for name, detector in self.detectors.items():
            maps = torch.cat([detector(images[p]) for p in parts])
            row |= {f"{name} mean": 100 * maps.mean().item(), f"{name} max": 100 * maps.flatten(1).amax(1).mean().item()}
        features = torch.cat([self.dino(images[p]) for p in parts]).unflatten(0, (-1, EACH))
        things = [[o for o in oracle.read(x) if o["area"] * oracle.SIZE ** 2 >= oracle.NOTABLE] for x in images]
        wanted, mean = [len(parse_caption(p)[0]) for p in prompts], lambda values: statistics.mean(map(float, values))
        return row | {"toy_correct": mean(oracle.correct(x, p) is True for x, p in zip(images, prompts)),
                      "recognised": mean(oracle.recognised(x, p) for x, p in zip(images, prompts)),
                      "toy_pref_b": torch.cat([self.pref(images[p], prompts[p]) for p in parts]).mean().item(),
                      "dino_div": ((1 - features @ features.transpose(1, 2)).sum((1, 2)) / (EACH) / (EACH - 1)).mean().item(),
                      "too few": mean(len(t) < n for t, n in zip(things, wanted)), "too many": mean(len(t) > n for t, n in zip(things, wanted)),
                      "area": 100 * mean(sum(o["area"] for o in t) for t in things),
                      "drift": ((images - before).abs().mean() / (before - before.roll(1, 0)).abs().mean()).item()}


def treated(out):
    """DiffDoctor's Table 2 and Figures 4 and 5: artifacts for both detectors, captions and quality over long training."""
    prompts, judges, models, results = held_out_prompts(out).read_text().splitlines(), Judges(), {}, {}
    (out / "measured").mkdir(exist_ok=True)

    def run_of(name, seed):
        return out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"

    def measured(name, seed, step):
        """Images of a snapshot and what the judges say, made once."""
        run, kind = run_of(name, seed), TREATED[name][0]
        path = out / "measured" / (f"{run.name}_{step:06d}.pt" if step else f"{kind}_before.pt")
        if not path.exists():
            if kind not in models:
                models[kind] = load_model(kind, torch.device("cpu"))
                encode_once(models[kind], prompts)
                trainable(models[kind], 8)
            if step:
                load_lora(models[kind], run / "lora" / f"step_{step:06d}")
            with contextlib.nullcontext() if step else base_model(models[kind]):
                images = generate(models[kind], prompts, 0, json.loads((run / "config.json").read_text())["sampler"], EACH)
            torch.save((images, judges(images, prompts, measured(name, seed, 0)[0] if step else images)), path)
        return torch.load(path)

    def one(name, seed):
        kind, steps, *words = TREATED[name]
        run = train(out, run_of(name, seed).name, "diffdoctor", "treat", "--model", kind, "--seed", seed, "--train_steps", steps[-1],
                    "--save_every", steps[0], "--patience", steps[-1], "--max_drift", 1e6, *words)
        log = [row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "test_mean" in row]
        history = [(float("inf"), 0.)] + [(row["test_mean"], row["test_drift"]) for row in log]           # the script's own rule, at its defaults
        end = next((i for i in range(1, len(history)) if stop_reason(history[:i + 1], 3, .5)), len(log))
        chosen = min([row for row in log[:end] if row["test_drift"] <= .5], key=lambda row: row["test_mean"], default=dict(step=0))["step"]
        each = {step: measured(name, seed, step)[1] for step in sorted({0, chosen, *steps})}
        results[name, seed] = chosen, {step: r | {"mean / area": r["detector mean"] / max(r["area"], .1)} for step, r in each.items()}

    torch.set_num_threads(1)
    rows = {}
    for name, (kind, steps, *_) in TREATED.items():                    # one at a time: models and judges are shared
        for seed in SEEDS:
            one(name, seed)
        rows[f"{kind}, before"] = [results[name, SEEDS[0]][1][0]]
        for step in steps:
            rows[f"{name}: {step} updates"] = [results[name, s][1][step] for s in SEEDS]
        found = [results[name, s] for s in SEEDS]
        rows[f"{name}: where the script stops ({', '.join(str(chosen) for chosen, _ in found)})"] = [each[chosen] for chosen, each in found]
        table(out / "treated.md", rows)
    (out / "treated.json").write_text(json.dumps({f"{n}, seed {s}": r for (n, s), r in results.items()}, indent=1) + "\n")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = ("detector mean", "detector_b mean", "toy_correct", "too few", "drift")
    figure, axes = plt.subplots(2, len(shown), figsize=(3 * len(shown), 5), constrained_layout=True)
    for row, kind in zip(axes, ("toy-flux", "toy")):
        for axis, field in zip(row, shown):
            for name, colour in zip([n for n in TREATED if TREATED[n][0] == kind], ("tab:red", "tab:blue", "tab:green", "tab:orange")):
                for s in SEEDS:
                    chosen, curve = results[name, s]
                    label = name.removeprefix(f"{kind}, ") if s == SEEDS[0] else None
                    axis.plot(list(curve), [r[field] for r in curve.values()], color=colour, alpha=.7, label=label)
                    axis.plot(chosen, curve[chosen][field], "o", color=colour, markersize=4)
            axis.set(title=field + ", %" * ("detector" in field), xlabel=f"updates of {kind}")
        row[0].legend(fontsize=7)
    figure.savefig(out / "over_updates.png", dpi=70)
    for kind, names in {"toy-flux": list(TREATED)[:2], "toy": list(TREATED)[-2:]}.items():
        columns = [(names[0], 0), *((n, TREATED[n][1][k]) for k in (0, -1) for n in names)]
        sets = [measured(n, SEEDS[0], step)[0][::4 * EACH] for n, step in columns]                      # one image of every fourth prompt
        sets = [x for images in sets for x in (images, overlay(images, judges.detectors["detector"](images)))]
        save_grid(torch.stack([x for row in zip(*sets) for x in row]), out / f"treated_{kind}.png", columns=len(sets))
    for path in out.glob("*.png"):
        Image.open(path).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)


def dreambooth(out):
    """DiffDoctor's section 4.3: a LoRA that has learned one thing from six pictures is treated; is the thing still there in unseen prompts?"""
    others = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES if shape != "star"]
    unseen = [f"{a} {RELATIONS[i % 2]} {b}" for i, o in enumerate(others) for a, b in ((INSTANCE, o), (o, INSTANCE))]
    classes = [p for p in (ROOT / "toy" / "prompts_train.txt").read_text().splitlines() if "star" in p]
    out.mkdir(parents=True, exist_ok=True)
    for name, prompts in dict(instance=[INSTANCE] * len(classes) + classes, unseen=unseen).items():
        (out / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    scenes = [sample_scene(np.random.default_rng([7, i]), "a red star") for i in range(6)]
    pictures = [torch.from_numpy(render(dict(s, objects=[dict(s["objects"][0], rgb=np.array(MAROON))]))[0]).permute(2, 0, 1) for s in scenes]
    prior = [(x, caption) for x, caption in image_data(ROOT / "toy" / "images", 64) if "star" in caption]
    folder, half = out / "pictures", [(x, INSTANCE) for x in pictures] * (len(prior) // len(pictures))      # of the regulariser: half of both
    folder.mkdir(exist_ok=True)
    lines = [dict(file_name=f"{i:03d}.png", text=caption) for i, (x, caption) in enumerate(half + prior)]
    for line, (x, _) in zip(lines, half + prior):
        to_pil(x).save(folder / line["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cpu, judges, plain = torch.device("cpu"), Judges(), [p.replace("[v]", "red") for p in unseen]
    sampler = dict(scheduler="ddpm", eta=1., num_inference_steps=20, guidance_scale=1.)
    torch.set_num_threads(1)

    def learn(folder, seed):
        """DreamBooth with prior preservation: half of a batch the instance, half other stars."""
        model = load_model("toy", cpu)
        encode_once(model, [INSTANCE, *(caption for _, caption in prior)])
        optimizer, scheduler = torch.optim.AdamW(trainable(model, 8, seed), lr=1e-3), make_scheduler(model, "ddpm", 20)
        for step in range(INSTANCE_UPDATES):
            draw = generator(seed, "dreambooth", step)
            batch = [(pictures[i], INSTANCE) for i in torch.randint(len(pictures), (4,), generator=draw)]
            images, captions = zip(*batch, *(prior[i] for i in torch.randint(len(prior), (4,), generator=draw)))
            x0 = encode(model, torch.stack(images))
            noise, t = torch.randn(x0.shape, generator=draw), torch.randint(1000, (len(x0),), generator=draw)
            offline_loss(model, scheduler, x0, noise, t, condition(model, list(captions))).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_weights(model, folder, 8)

    def instance(images):
        """The share of images with a thing whose middle is nearer to the instance's colour than to any of the palette's, in RGB."""
        colours = torch.tensor([MAROON, *COLOURS.values()])
        centres = [[(int(64 * o["y"]), int(64 * o["x"])) for o in oracle.read(x)] for x in images]
        middles = [[x[:, max(i - 2, 0):i + 3, max(j - 2, 0):j + 3].mean((1, 2)) for i, j in each] for x, each in zip(images, centres)]
        return statistics.mean(float(any((colours - c).square().sum(1).argmin() == 0 for c in each)) for each in middles)

    lora, measured, runs = out / "instance_0", out / "measured_0.pt", {0: out / "run_0", .25: out / "run_regularised_0"}        # one seed
    if not (lora / "pytorch_lora_weights.safetensors").exists():
        learn(lora, 0)
    for gamma, run in runs.items():
        train(out, run.name, "diffdoctor", "treat", "--grad_steps", 5, "--init_lora", lora, "--gamma", gamma, "--data", out / "pictures", "--prompts",
              out / "instance.txt", "--test_prompts", out / "unseen.txt", "--train_steps", INSTANCE_TREATED, "--save_every", INSTANCE_TREATED // 2,
              "--patience", INSTANCE_TREATED, "--max_drift", 1e6)
    if not measured.exists():
        model = load_model("toy", cpu)
        encode_once(model, unseen + plain)
        trainable(model, 8)
        sets = {'before DreamBooth, "red" for "[v]"': generate(model, plain, 0, sampler, EACH)}
        snapshots = {f"treated, gamma {gamma:g}, {n} updates": run / "lora" / f"step_{n:06d}"
                     for gamma, run in runs.items() for n in (INSTANCE_TREATED // 2, INSTANCE_TREATED)}
        for name, path in {"DreamBooth": lora, **snapshots}.items():
            load_lora(model, path)
            sets[name] = generate(model, unseen, 0, sampler, EACH)
        torch.save((sets, {n: judges(x, plain, sets["DreamBooth"]) | dict(instance=instance(x)) for n, x in sets.items()}), measured)
    sets, rows = torch.load(measured)
    table(out / "dreambooth.md", {name: [row] for name, row in rows.items()})
    shown = [images[::4 * EACH] for name, images in sets.items() if f"{INSTANCE_TREATED // 2} updates" not in name]
    save_grid(torch.cat([torch.stack(pictures), torch.ones(len(shown[0]) - 6, 3, 64, 64), *shown]), out / "dreambooth.png", columns=len(shown[0]))
    Image.open(out / "dreambooth.png").quantize(256, kmeans=1).save(out / "dreambooth.png", optimize=True)


def diffdoctor(out, jobs):
    """The detectors' ladder, the treatment, and a treated DreamBooth."""
    ladder(out, jobs)
    treated(out)
    dreambooth(out / "dreambooth")


EXPERIMENTS = dict(refl=refl, imagerefl=imagerefl, focus_n_fix=focus_n_fix, dfusion=dfusion, diffdoctor=diffdoctor)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, default=Path("claims"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (set OMP_NUM_THREADS=1 for more than one)")
    args = parser.parse_args()
    EXPERIMENTS[args.experiment]((args.out / args.experiment).resolve(), args.jobs)


if __name__ == "__main__":
    main()
