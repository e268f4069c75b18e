"""Focus-N-Fix on the toy world: artifacts and a concept, with and without its term."""
import json
import threading

import numpy as np
import torch
from PIL import Image

from common import load_detector, load_reward, read_prompts, save_grid
from focus_n_fix import THRESHOLD, change, concept_reward, grad_cam, last_norm, problem_mask

from .tools import PROMPTS, ROOT, SEEDS, call, cell, images, json_lines, mean, prompt_file, shrink, subplots, together, train

BETAS = dict(heatmap=(0, .5), concept=(0, 3))    # Focus-N-Fix; 0 is DRaFT
CONCEPT_LR = 3e-4                                # at the default 1e-3 DRaFT and beta 1 both end in pictures that no longer show any caption
CONCEPT = "a red circle", "a blue circle"        # what is unwanted, and its neutral counterpart
DILATE = 3
UPDATES, EVERY = 60, 15


def read_folder(folder):
    """Images (N, 3, H, W) in [0, 1], and their prompts."""
    rows = json_lines(folder / "metadata.jsonl")
    pixels = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB"), np.float32) / 255 for row in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), [row["text"] for row in rows]


def focus_n_fix(out, jobs):
    """The same gain inside of the region for a smaller change outside? DRaFT (beta 0) against the regional term, at equal reward."""
    lists = {name: read_prompts(ROOT / "toy" / f"prompts_{name}.txt") for name in ("train", "test")}
    files = dict(test=lists["test"][:PROMPTS], red_train=[p for p in lists["train"] if "red" in p], red_test=[p for p in lists["test"] if "red" in p][:PROMPTS],
                 unrelated=[p for p in lists["test"] if "red" not in p][:PROMPTS])
    for name, prompts in files.items():
        prompt_file(out / f"{name}.txt", prompts)
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
            for row, folder, mode in ((rows[0], "unrelated_0", "base"), (rows[-1], f"{name}_unrelated", "tuned")):
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
                  + f" (before: {mean(results[case, 0, s][0]['reward'] for s in SEEDS):.4f}; region {results[case, 0, 0][0]['area']:.1%})\n",
                  "| | " + " | ".join(fields) + " |", "|---|" + "---|" * len(fields)]
        spread = lambda values: cell(values, 4)
        lines.append("| before | " + " | ".join(f"{results[case, 0, 0][0][f]:.4f}" for f in fields) + " |")
        lines += [f"| beta {b:g} | " + " | ".join(spread([at_gain(results[case, b, s], level[s], f) for s in SEEDS]) for f in fields) + " |" for b in BETAS[case]]
        last = ("reward", "outside", "psnr", *fields[1:], *(["unrelated"] if case == "concept" else []))
        lines += [f"\n{case}: after {UPDATES} updates\n", "| | " + " | ".join(last) + " |", "|---|" + "---|" * len(last),
                  "| before | " + " | ".join("" if f == "psnr" else f"{results[case, 0, 0][0][f]:.4f}" for f in last) + " |"]
        lines += [f"| beta {b:g} | " + " | ".join(spread([results[case, b, s][-1][f] for s in SEEDS]) for f in last) + " |" for b in BETAS[case]]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = subplots(2, 3, 3.7, 3)
    for row, case in zip(axes, words):
        for axis, field in zip(row, ("outside", "dino", "toy_correct")):
            for beta, colour in zip(BETAS[case], ("tab:red", "tab:blue")):
                for s in SEEDS:
                    axis.plot([r["reward"] for r in results[case, beta, s]], [r[field] for r in results[case, beta, s]], "o-", markersize=3, color=colour,
                              alpha=.7, label=(f"beta {beta:g}" if beta else "DRaFT (beta 0)") if s == SEEDS[0] else None)
            axis.set(title=f"{case}: {field}", xlabel="reward")
        row[0].legend(fontsize=7)
    figure.savefig(out / "equal_reward.png", dpi=80)

    tiles = []                                                            # six images, seed 0, where DRaFT's reward is nearest to the other's last
    for case in words:
        draft, other = (results[case, b, SEEDS[0]] for b in BETAS[case])
        near = min(range(1, len(draft)), key=lambda i: abs(draft[i]["reward"] - other[-1]["reward"]))
        for beta, i in zip(BETAS[case], (near, len(other) - 1)):
            print(f"regions.png: {case}, beta {beta:g}, {i * EVERY} updates")
            run = out / f"{case}_{beta}_{SEEDS[0]}"
            before, after = (read_folder(run / "over_steps" / f"step_{n * EVERY:06d}")[0][::14] for n in (0, i))
            files = sorted((run / "masks").glob("*.png"))[::14]
            mask = torch.from_numpy(np.stack([np.asarray(Image.open(f), np.float32) / 255 for f in files]))[:, None].expand_as(before)
            tiles += [before, mask, after, (3 * (after - before).abs()).clamp(max=1)]
    save_grid(torch.stack(tiles, 1).flatten(0, 1), out / "regions.png", columns=len(tiles))
    Image.open(out / "regions.png").reduce(2).save(out / "regions.png")
    shrink(out / "regions.png")
