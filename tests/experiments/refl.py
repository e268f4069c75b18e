"""ReFL on the toy world, and what it shares with ImageReFL's experiment: judged folders of images."""
import json
import statistics

import numpy as np
from PIL import Image

from toy.scenes import render, sample_scene

from .tools import IMAGES, SEEDS, call, held_out_prompts, images, json_lines, shrink, subplots, table, together, train

METRICS = ("toy_pref", "toy_pref_b", "toy_correct", "dino_div", "frechet_toy")


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
    rows = {k[0]: [results[k]] for k in results if len(k) == 1}
    rows |= {f"ReFL, {int(n.removeprefix('step_'))} updates": [results[n, s] for s in SEEDS] for n in snapshots}
    table(out / "table.md", dict(sorted(rows.items(), key=lambda kv: (kv[0][0] not in "br", len(kv[0]), kv[0]))))
    seconds = [row["seconds"] for s in SEEDS for row in json_lines(runs[s] / "log.jsonl")]
    print(f"seconds per update: median {statistics.median(seconds):.2f}, {jobs} runs at a time")

    figure, axes = subplots(1, len(METRICS), 3.2, 2.8)
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
    both.save(out / "before_after.png")
    shrink(out / "before_after.png")
