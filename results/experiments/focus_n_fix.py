"""Does the regional term preserve the rest of an image, at the same gain inside the region?

Focus-N-Fix's claim, with DRaFT (beta 0) as the baseline, in two cases: artifacts, where the region
is a detector's heat map, and an unwanted concept, "a red circle", where it is Grad-CAM's. DRaFT
goes further in the same number of updates, so we compare the two at equal reward.

Runs     12 of focus_n_fix.py: 2 cases x 2 betas x seeds 0 to 2, 60 updates, a snapshot every 15.
         Then 2 images of each held-out prompt for the base model and every snapshot: 40 prompts,
         or for the concept those with "red", and 40 prompts without red as a control.
Prints   for each case, a table at the point where the reward first reaches what both reach,
         interpolated linearly between snapshots, and a table after 60 updates.
Draws    equal_reward.png, three metrics over the reward; and focus_n_fix.png, six held-out images
         at about equal reward: I0 | M | I | 3 x the difference.
Took     2 to 4 minutes per run, two at a time on two CPU cores.
"""

import itertools
import json
import threading

import numpy as np
import torch
from PIL import Image

from common import TOY
from data.prompts import read_prompts
from evaluate import Dino
from focus_n_fix import THRESHOLD, change, concept_reward, grad_cam, last_norm, problem_mask
from rewards import load_detector, load_reward
from run_folder import save_grid

from .tools import CPU, JUDGE_BATCH, NUM_PROMPTS, SEEDS, format_mean, mean, new_picture, read_lines
from .tools import run_script, sample_images, save_figure, shrink, subplots, table_head, table_line
from .tools import together, train, write_prompts

CASES = ("heatmap", "concept")
BETAS = dict(heatmap=(0, 0.5), concept=(0, 3))  # 0 is DRaFT
# At the default of 1e-3 DRaFT and beta 1 both end in pictures that no longer show any caption.
CONCEPT_LR = 3e-4
CONCEPT = ("a red circle", "a blue circle")  # what is unwanted, and its neutral counterpart
DILATE = 3
UPDATES = 60
EVERY = 15  # updates between snapshots
FIELDS = (
    "outside", "dino", "inside_reward", "outside_reward", "second", "toy_correct", "toy_pref_b",
)


def focus_n_fix(out, jobs):
    write_lists(out)
    torch.set_num_threads(1)
    judges = RegionJudges()
    calls = []
    for seed, case in itertools.product(SEEDS, CASES):
        calls += [(case, beta, seed) for beta in BETAS[case]]

    def measure(case, beta, seed):
        return train_and_measure(out, judges, case, beta, seed)

    results = dict(zip(calls, together(jobs, measure, calls)))
    rows_by_name = {" ".join(map(str, call)): rows for call, rows in sorted(results.items())}
    (out / "results.json").write_text(json.dumps(rows_by_name, indent=1) + "\n")

    lines = []
    for case in CASES:
        lines += table_at_equal_reward(case, results)
        lines += table_after_training(case, results)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot_equal_reward(results)
    draw_regions(out, results)


# --------------------------------------------------------------------------------------------------
# Prompts and training


def write_lists(out):
    """Writes the prompts files: for the concept those prompts that have "red" in them."""
    train_prompts = read_prompts(TOY / "prompts_train.txt")
    test_prompts = read_prompts(TOY / "prompts_test.txt")
    red_train = [prompt for prompt in train_prompts if "red" in prompt]
    red_test = [prompt for prompt in test_prompts if "red" in prompt]
    unrelated = [prompt for prompt in test_prompts if "red" not in prompt]
    write_prompts(out / "test.txt", test_prompts[:NUM_PROMPTS])
    write_prompts(out / "red_train.txt", red_train)
    write_prompts(out / "red_test.txt", red_test[:NUM_PROMPTS])
    write_prompts(out / "unrelated.txt", unrelated[:NUM_PROMPTS])


def held_out_file(out, case):
    return out / ("test.txt" if case == "heatmap" else "red_test.txt")


def train_case(out, name, case, beta, seed):
    """Trains a run -> its folder."""
    flags = ["--beta", beta, "--seed", seed, "--train_steps", UPDATES, "--save_every", EVERY]
    if case == "concept":
        flags += ["--concept", *CONCEPT, "--lr", CONCEPT_LR]
        flags += ["--prompts", out / "red_train.txt", "--test_prompts", out / "red_test.txt"]
    return train(out, name, "focus_n_fix", *flags)


# --------------------------------------------------------------------------------------------------
# Measuring


def read_folder(folder):
    """A folder of images -> images (N, 3, H, W) in [0, 1], and their prompts."""
    images = []
    prompts = []
    for row in read_lines(folder / "metadata.jsonl"):
        pixels = np.asarray(Image.open(folder / row["file_name"]).convert("RGB"), np.float32)
        images.append(pixels / 255)
        prompts.append(row["text"])
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return images, prompts


class RegionJudges:
    """The regions of the base model's images, and what a tuned image gains inside and outside them.

    The networks are shared by all jobs, and Grad-CAM attaches a hook to one of them. So only one
    job at a time may use them.
    """

    def __init__(self):
        self.detector = load_detector(TOY / "detector", CPU)
        self.detector_b = load_detector(TOY / "detector_b", CPU)
        self.clip, _ = load_reward("toy_clip", CPU)
        self.concept = concept_reward(self.clip, *CONCEPT)
        self.dino = Dino(TOY / "dino", CPU)
        self.lock = threading.Lock()

    def region(self, case, base, prompts):
        """The base model's images (N, 3, H, W) -> where they may change, (N, 1, H, W)."""
        if case == "heatmap":
            heat = self.detector(base)[:, None]
            return problem_mask(heat, THRESHOLD["heatmap"], DILATE)

        def unwanted(images):
            return -self.concept(images, prompts)

        heat = grad_cam(last_norm(self.clip), unwanted, base)
        return problem_mask(heat, THRESHOLD["saliency"], DILATE)

    @torch.no_grad()
    def measure(self, case, images, prompts, base, mask):
        """A snapshot's images beside the base model's -> dict of means over images."""
        row = dict(
            outside=change(images, base, 1 - mask).mean().item(),
            second=-self.detector_b(images).mean().item(),
        )
        if case == "heatmap":
            row.update(self.artifact_rewards(images, mask))
        else:
            row.update(self.concept_rewards(images, prompts, base, mask))
        return row

    def artifact_rewards(self, images, mask):
        """The reward is a mean over pixels, so we can split it into two parts."""
        maps = self.detector(images)[:, None]
        has_region = mask.sum((1, 2, 3)) > 0

        def part(where):
            return (maps * where).sum((1, 2, 3)) / where.sum((1, 2, 3)).clamp(min=1)

        return dict(
            reward=-maps.mean().item(),
            inside_reward=-part(mask)[has_region].mean().item(),
            outside_reward=-part(1 - mask).mean().item(),
        )

    def concept_rewards(self, images, prompts, base, mask):
        """The tuned image only inside the region, or only outside it, is also an image."""
        inside = torch.where(mask > 0, images, base)
        outside = torch.where(mask > 0, base, images)
        return dict(
            reward=self.concept(images, prompts).mean().item(),
            inside_reward=self.concept(inside, prompts).mean().item(),
            outside_reward=self.concept(outside, prompts).mean().item(),
        )

    @torch.no_grad()
    def drift_outside(self, images, base, mask):
        """PSNR in dB and 1 - cosine of DINO features, with the base's pixels inside the region."""
        images = torch.where(mask > 0, base, images)
        squares = (images - base).double().square().mean(1, keepdim=True).sum((1, 2, 3))
        mse = squares / (1 - mask).double().sum((1, 2, 3))
        psnr = -10 * mse.clamp(min=1e-10).log10()
        distances = []
        for part, base_part in zip(images.split(JUDGE_BATCH), base.split(JUDGE_BATCH)):
            distances.append(1 - (self.dino(part) * self.dino(base_part)).sum(-1))
        return dict(psnr=psnr.mean().item(), dino=torch.cat(distances).double().mean().item())


def train_and_measure(out, judges, case, beta, seed):
    """One run -> its rows: a dict for the base model and for each snapshot."""
    name = f"{case}_{beta}_{seed}"
    run = train_case(out, name, case, beta, seed)
    folders = sample_and_evaluate(out, run, case)
    base, prompts = read_folder(folders[0])
    with judges.lock:
        mask = judges.region(case, base, prompts)
    save_masks(run / "masks", mask)

    summaries = json.loads((run / "measured.json").read_text())["folders"]
    rows = []
    for folder in folders:
        images, _ = read_folder(folder)
        with judges.lock:
            row = judges.measure(case, images, prompts, base, mask)
            drift = dict(psnr=None, dino=0.0)
            if folder != folders[0]:
                drift = judges.drift_outside(images, base, mask)
        row.update(drift, area=mask.mean().item())
        for metric in ("toy_correct", "toy_pref_b"):
            row[metric] = summaries[str(folder)][metric]["mean"]
        rows.append(row)
    if case == "concept":
        rows[0]["unrelated"] = measure_unrelated(out, run, "unrelated_0", "base")
        rows[-1]["unrelated"] = measure_unrelated(out, run, f"{name}_unrelated", "tuned")
    return rows


def sample_and_evaluate(out, run, case):
    """Samples the base model and all snapshots, and writes measured.json -> their folders."""
    sampled = run / "sampled.json"
    run_script(
        out, f"{run.name}_sample", "evaluate", "--over_steps", run,
        "--prompts", held_out_file(out, case), "--num_images", 2, "--metrics", "toy_correct",
        "--out", sampled, done=sampled,
    )
    folders = []
    for step in range(0, UPDATES + 1, EVERY):
        folders.append(run / "over_steps" / f"step_{step:06d}")
    measured = run / "measured.json"
    run_script(
        out, run.name, "evaluate", *folders, "--metrics", "toy_correct,toy_pref_b",
        "--out", measured, done=measured,
    )
    return folders


def save_masks(folder, masks):
    """Writes masks (N, 1, H, W) as PNGs, in the order of the images."""
    folder.mkdir(exist_ok=True)
    for i, mask in enumerate(masks):
        Image.fromarray((mask[0] * 255).byte().numpy()).save(folder / f"{i:05d}.png")


def measure_unrelated(out, run, name, mode):
    """The share of correct images for prompts that do not involve the concept."""
    guidance = ("--base_guidance_scale", 4) if mode == "base" else ()
    flags = ("--lora", run, "--mode", mode, *guidance)
    folder = sample_images(out, name, *flags, prompts=out / "unrelated.txt", num_images=2)
    done = out / "metrics" / f"{name}.json"
    done.parent.mkdir(exist_ok=True)
    run_script(
        out, name, "evaluate", folder, "--metrics", "toy_correct", "--out", done, done=done
    )
    return json.loads(done.read_text())["folders"][str(folder)]["toy_correct"]["mean"]


# --------------------------------------------------------------------------------------------------
# The tables


def at_reward(rows, level, field):
    """`field` where the reward first reaches `level`, interpolated between snapshots."""
    for before, after in zip(rows, rows[1:]):
        if after["reward"] >= level:
            share = (level - before["reward"]) / (after["reward"] - before["reward"])
            return before[field] + share * (after[field] - before[field])
    return float("nan")


def table_at_equal_reward(case, results):
    """The lines of a table where the reward first reaches what both betas reach, per seed."""
    levels = {}
    for seed in SEEDS:
        best = []
        for beta in BETAS[case]:
            best.append(max(row["reward"] for row in results[case, beta, seed]))
        levels[seed] = min(best)
    before = mean(results[case, 0, seed][0]["reward"] for seed in SEEDS)
    first = results[case, 0, SEEDS[0]][0]
    reached = ", ".join(f"{level:.4f}" for level in levels.values())
    lines = [
        f"\n{case}: where the reward first reaches what both reach, {reached}"
        f" (before: {before:.4f}; region {first['area']:.1%})\n",
        *table_head(FIELDS),
        table_line("before", [f"{first[field]:.4f}" for field in FIELDS]),
    ]
    for beta in BETAS[case]:
        cells = []
        for field in FIELDS:
            values = [at_reward(results[case, beta, s], levels[s], field) for s in SEEDS]
            cells.append(format_mean(values, 4))
        lines.append(table_line(f"beta {beta:g}", cells))
    return lines


def table_after_training(case, results):
    """The lines of a table after the last update."""
    fields = ["reward", "outside", "psnr", *FIELDS[1:]]
    if case == "concept":
        fields.append("unrelated")
    lines = [f"\n{case}: after {UPDATES} updates\n", *table_head(fields)]
    first = results[case, 0, SEEDS[0]][0]
    cells = ["" if field == "psnr" else f"{first[field]:.4f}" for field in fields]
    lines.append(table_line("before", cells))
    for beta in BETAS[case]:
        cells = []
        for field in fields:
            values = [results[case, beta, seed][-1][field] for seed in SEEDS]
            cells.append(format_mean(values, 4))
        lines.append(table_line(f"beta {beta:g}", cells))
    return lines


# --------------------------------------------------------------------------------------------------
# The pictures


def plot_equal_reward(results):
    """Draws three metrics over the reward, one line per run."""
    figure, axes = subplots(2, 3, 3.7, 3)
    for axes_of_case, case in zip(axes, CASES):
        for axis, field in zip(axes_of_case, ("outside", "dino", "toy_correct")):
            for beta, color in zip(BETAS[case], ("tab:red", "tab:blue")):
                name = f"beta {beta:g}" if beta else "DRaFT (beta 0)"
                for seed in SEEDS:
                    rows = results[case, beta, seed]
                    x = [row["reward"] for row in rows]
                    y = [row[field] for row in rows]
                    label = name if seed == SEEDS[0] else None
                    axis.plot(x, y, "o-", markersize=3, color=color, alpha=0.7, label=label)
            axis.set(title=f"{case}: {field}", xlabel="reward")
        axes_of_case[0].legend(fontsize=7)
    save_figure(figure, "equal_reward.png", dpi=80)


def draw_regions(out, results):
    """Shows every 14th image of seed 0, where DRaFT's reward is nearest to the other's last."""
    tiles = []
    for case in CASES:
        draft, other = [results[case, beta, SEEDS[0]] for beta in BETAS[case]]
        last = other[-1]["reward"]
        distances = [abs(row["reward"] - last) for row in draft[1:]]
        nearest = 1 + distances.index(min(distances))
        for beta, snapshot in zip(BETAS[case], (nearest, len(other) - 1)):
            print(f"focus_n_fix.png: {case}, beta {beta:g}, {snapshot * EVERY} updates")
            run = out / f"{case}_{beta}_{SEEDS[0]}"
            tiles += region_tiles(run, snapshot * EVERY)
    path = new_picture("focus_n_fix.png")
    save_grid(torch.stack(tiles, 1).flatten(0, 1), path, columns=len(tiles))
    Image.open(path).reduce(2).save(path)
    shrink(path)


def region_tiles(run, step):
    """I0, M, I and 3 |I - I0| of every 14th image, (6, 3, H, W) each."""
    before = read_folder(run / "over_steps" / "step_000000")[0][::14]
    after = read_folder(run / "over_steps" / f"step_{step:06d}")[0][::14]
    masks = []
    for file in sorted((run / "masks").glob("*.png"))[::14]:
        masks.append(np.asarray(Image.open(file), np.float32) / 255)
    mask = torch.from_numpy(np.stack(masks))[:, None].expand_as(before)
    difference = (3 * (after - before).abs()).clamp(max=1)
    return [before, mask, after, difference]
