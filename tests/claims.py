"""The experiments behind the README's tables: every figure there is printed by this file. Restartable: what is done is not done again.

  $ python tests/claims.py refl --out claims        # 3 training runs and their images
  $ python tests/claims.py refl --out claims --jobs 2

Writes DIR/<experiment>/table.md, results.json and plots. The training seed is the unit: a figure is the mean over seeds, with the standard
deviation over seeds behind the sign; held-out prompts and image seeds are the same for every row.
"""
import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
PROMPTS, IMAGES = 40, 8
METRICS = ("toy_pref", "toy_pref_b", "toy_correct", "dino_div")


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


def images(out, name, *words):
    """Images of one row of a table; returns their folder."""
    folder = out / "images" / name
    call(out, name, "combined_sample", *words, "--prompts", held_out_prompts(out), "--num_images", IMAGES, "--out", folder, done=folder / "metadata.jsonl")
    return folder


def metrics(out, folder):
    """dict metric -> value of one folder of images."""
    done = out / "metrics" / f"{folder.name}.json"
    done.parent.mkdir(exist_ok=True)
    call(out, folder.name, "evaluate", folder, "--metrics", ",".join(METRICS), "--out", done, done=done)
    return {m: json.loads(done.read_text())["folders"][str(folder)][m]["mean"] for m in METRICS}


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

    def train(seed):
        config = runs[seed] / "config.json"
        if not config.exists() or not (runs[seed] / "lora" / f"step_{json.loads(config.read_text())['train_steps']:06d}").exists():
            call(out, seed, "refl", "--seed", seed, "--out", runs[seed], *(["--resume"] if (runs[seed] / "checkpoint" / "state.pt").exists() else []))
    together(jobs, [lambda s=s: train(s) for s in SEEDS])

    snapshots = sorted(p.name for p in (runs[SEEDS[0]] / "lora").glob("step_*"))
    wanted = {("base, guidance 4",): ("base_guided", "--mode", "base", "--lora", runs[0], "--base_guidance_scale", 4),
              ("base, no guidance",): ("base_plain", "--mode", "base", "--lora", runs[0], "--base_guidance_scale", 1)}
    wanted |= {(name, seed): (f"{name}_{seed}", "--mode", "tuned", "--lora", runs[seed] / "lora" / name) for name in snapshots for seed in SEEDS}
    results = {}
    together(jobs, [lambda k=k, w=w: results.update({k: metrics(out, images(out, *w))}) for k, w in wanted.items()])
    rows = {k[0]: over_seeds([results[k]]) for k in results if len(k) == 1}
    rows |= {f"ReFL, {int(n.removeprefix('step_'))} updates": over_seeds([results[n, s] for s in SEEDS]) for n in snapshots}
    write_table(out, dict(sorted(rows.items(), key=lambda kv: (kv[0][0] != "b", len(kv[0]), kv[0]))))
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


EXPERIMENTS = dict(refl=refl)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, default=Path("claims"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (set OMP_NUM_THREADS=1 for more than one)")
    args = parser.parse_args()
    EXPERIMENTS[args.experiment]((args.out / args.experiment).resolve(), args.jobs)


if __name__ == "__main__":
    main()
