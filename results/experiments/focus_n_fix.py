"""Does the regional term preserve the rest of an image, at the same gain inside the region?

Focus-N-Fix's claim, with DRaFT (beta 0) as the baseline. The last K = 2 steps carry the gradient. A
third row lets the base model take the other 8 steps, in training and afterwards (--prefix base, our
variant). For two more rows, all 10 steps carry the gradient. The reward is that of the artifact
detector, and the region its heat map. A method may go further than another in the same number of
updates, so we compare them at equal reward.

Runs     27 of focus_n_fix.py, in which no training pair repeats: 5 methods x seeds 0 to 2, each 60
         updates of 4 images with a snapshot every 15; and the base prefix with two other learning
         rates and two other betas. The choice among these is made on 40 training prompts. Then an
         image of each of 40 held-out prompts from the base model and from every snapshot.
Prints   the table of the choice; a table where the reward first reaches what all methods reach,
         interpolated linearly between snapshots, on training pairs and on held-out ones; and both
         after the last update.
Draws    focus_n_fix_curves.png, the change outside as the reward rises; and focus_n_fix.png,
         held-out images at about equal reward: base | region | tuned | difference.
Took     about 80 seconds of one CPU core per run, 120 with K = 10, and 20 for its images.
"""

import json

import torch
from PIL import Image, ImageDraw, ImageFont

from common import TOY, generator, initial_latents, load_model, make_scheduler
from data.prompts import encode_once, read_prompts
from focus_n_fix import OURS, THRESHOLD, Region, artifact_reward, base_and_mask, change, focus_loss
from focus_n_fix import sample_in_two
from judges.detector import load_detector
from models.lora import load_lora
from run_folder import score, to_pil
from toy import oracle

from .tools import CPU, SEEDS, format_mean, held_out_prompts, mean, new_picture, read_lines
from .tools import save_figure, shrink, snapshot_names, subplots, table_head, table_line, together
from .tools import train, updates_of, write_prompts

# Chosen for the base prefix, on training prompts. The other methods use the same values.
LR = 1e-3
BETA = 15
LEARNING_RATES = (3e-4, 1e-3, 3e-3)  # tried with BETA
BETAS = (5, 15, 45)  # tried with LR
MAX_OUTSIDE = 2 / 255  # of the settings that change less outside, we take the one that gains most
METHODS = {  # the flags of each row
    "DRaFT, K = 2": dict(grad_steps=2, beta=0, prefix="tuned"),
    "Focus-N-Fix, K = 2": dict(grad_steps=2, beta=BETA, prefix="tuned"),
    "Focus-N-Fix, K = 2, base prefix": dict(grad_steps=2, beta=BETA, prefix="base"),
}
METHODS_10 = {
    "DRaFT, K = 10": dict(grad_steps=10, beta=0, prefix="tuned"),
    "Focus-N-Fix, K = 10": dict(grad_steps=10, beta=BETA, prefix="tuned"),
}
COLORS = ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple")
UPDATES = 60
EVERY = 15  # updates between snapshots
BATCH = 4
POOL = UPDATES * BATCH  # so that no pair repeats
FLAGS = dict(
    lr=LR, train_steps=UPDATES, save_every=EVERY, batch_size=BATCH, micro_batch=BATCH, pool=POOL
)
GUIDANCE_SCALE = 4.0
NUM_STEPS = 10
PARTS = 16  # held-out prompts for which we measure prefix and tail apart
CHOICE_PROMPTS = 40  # training prompts that choose, with noise that no run trains on
TRAINING_FIELDS = ("reward", "objective", "outside", "inside")
CHOICE_FIELDS = ("reward", "outside", "inside_gain")
HELD_OUT_FIELDS = ("reward", "objective", "outside", "inside_gain", "toy_correct", "detector_b")
PARTS_FIELDS = ("prefix", "tail")
SHOWN = 6  # rows of images in the picture
CELL = 128  # pixels of an image there


def focus_n_fix(out, jobs):
    prompts_file = held_out_prompts(out)
    # We measure held-out images ourselves, so the runs need not sample many.
    write_prompts(out / "shown.txt", read_prompts(prompts_file)[:1])
    calls = {}  # by the run's name, because one of the tried settings is also a method
    for flags in [*METHODS.values(), *METHODS_10.values(), *tried_settings().values()]:
        for seed in SEEDS:
            calls[run_name(flags, seed)] = (out, flags, seed)
    together(jobs, train_run, calls.values())

    torch.set_num_threads(1)
    lines = compare_settings(out)
    measure = Measure("held_out", read_prompts(prompts_file), with_parts=True)
    training = {}
    held_out = {}
    for name, flags in {**METHODS, **METHODS_10}.items():
        runs = [out / run_name(flags, seed) for seed in SEEDS]
        training[name] = [training_rows(run) for run in runs]
        held_out[name] = [measure(run, flags) for run in runs]

    for title, fields, rows in (
        ("training pairs", TRAINING_FIELDS, training),
        ("held-out pairs", HELD_OUT_FIELDS, held_out),
    ):
        k_2 = {name: rows[name] for name in METHODS}
        lines += table_at_equal_reward(title, fields, k_2)
        lines += table_after_training(title, fields, rows)
        # K = 10 reaches less, so comparing with it needs another, lower reward.
        lines += table_at_equal_reward(f"{title}, all methods", fields, rows)
    lines += table_after_training("held-out pairs", PARTS_FIELDS, held_out)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot_curves(training, held_out)
    draw_regions(out, measure, held_out)


# --------------------------------------------------------------------------------------------------
# Training


def tried_settings():
    """The settings that we choose among: {name: flags}. All have the base prefix."""
    flags = METHODS["Focus-N-Fix, K = 2, base prefix"]
    tried = {}
    for lr in LEARNING_RATES:
        tried[f"beta {BETA}, lr {lr}"] = dict(flags, lr=lr)
    for beta in BETAS:
        tried[f"beta {beta}, lr {LR}"] = dict(flags, lr=LR, beta=beta)
    return tried


def compare_settings(out):
    """-> the lines of a table of the settings that we choose among, on training prompts."""
    prompts = read_prompts(TOY / "prompts_train.txt")[-CHOICE_PROMPTS:]
    measure = Measure("choice", prompts, only_last=True)
    rows = {}
    for name, flags in tried_settings().items():
        runs = [out / run_name(flags, seed) for seed in SEEDS]
        rows[name] = [measure(run, flags) for run in runs]
    lines = table_after_training("the choice, on training prompts", CHOICE_FIELDS, rows)
    return lines + [f"chosen: {choose(rows)}"]


def choose(rows):
    """{name: rows of each seed} -> the name of the setting that we take.

    It gains most of all those that change the rest of the image by at most MAX_OUTSIDE.
    """
    gains = {}
    for name, runs in rows.items():
        if mean(run[-1]["outside"] for run in runs) <= MAX_OUTSIDE:
            gains[name] = mean(run[-1]["reward"] for run in runs)
    return max(gains, key=gains.get)


def run_name(flags, seed):
    flags = {**FLAGS, **flags}
    return f"K{flags['grad_steps']}_{flags['beta']}_{flags['prefix']}_{flags['lr']}_{seed}"


def train_run(out, flags, seed, *more):
    """Trains a run, with more words on its command line -> its folder."""
    words = []
    for flag, value in {**FLAGS, **flags, "seed": seed}.items():
        words += [f"--{flag}", value]
    words += ["--test_prompts", out / "shown.txt"]
    return train(out, run_name(flags, seed), "focus_n_fix", *words, *more)


# --------------------------------------------------------------------------------------------------
# Measuring


def training_rows(run):
    """Means over each EVERY updates, after a row for the base model.

    No pair repeats, so we compare each with the base model's image of the same pair.
    """
    config = json.loads((run / "config.json").read_text())
    reward_mean = config["reward_mean"]
    reward_spread = config["reward_spread"]
    rows = [dict(reward=0.0, objective=0.0, outside=0.0, inside=0.0)]
    log = read_lines(run / "log.jsonl")
    for i in range(0, len(log), EVERY):
        updates = log[i : i + EVERY]
        loss = mean(row["loss"] for row in updates)
        base_reward = mean(row["base_reward"] for row in updates)
        base_loss = -(base_reward - reward_mean) / reward_spread
        means = dict(objective=base_loss - loss)
        means["reward"] = (mean(row["reward"] for row in updates) - base_reward) / reward_spread
        for field in ("outside", "inside"):
            means[field] = mean(row[field] for row in updates)
        rows.append(means)
    return rows


def artifact_judges():
    """-> the reward and the region of the artifact detector."""
    detector = load_detector(TOY / "detector", CPU)
    region = Region(THRESHOLD["heatmap"], OURS["toy"]["dilate"], detector)
    return artifact_reward(detector), region


class Measure:
    """Samples prompts from every snapshot of a run, and compares with the base model's images.

    measure(run, flags) -> rows, a dict of means over images for the base model and each snapshot.
    name: of the prompts, for the file in the run's folder. judges: the reward and the region, by
    default those of the artifact detector. only_last: measure the last snapshot alone. with_parts:
    measure what the first steps alone and the last alone change.
    """

    def __init__(self, name, prompts, judges=None, only_last=False, with_parts=False):
        self.name = name
        self.prompts = prompts
        self.only_last = only_last
        self.with_parts = with_parts
        self.model = load_model("toy", CPU)
        encode_once(self.model, prompts)
        self.reward, region = judges or artifact_judges()
        self.detector_b = load_detector(TOY / "detector_b", CPU)
        self.scheduler = make_scheduler(self.model, "ddim", NUM_STEPS)
        generators = [generator(0, "image", i, 0) for i in range(len(prompts))]
        self.noise = initial_latents(self.model, generators)
        self.base, self.mask = base_and_mask(
            self.model, self.scheduler, GUIDANCE_SCALE, region, 8, self.noise, prompts
        )

    def __call__(self, run, flags):
        done = run / f"{self.name}.json"
        if not done.exists():
            spread = json.loads((run / "config.json").read_text())["reward_spread"]
            rows = [self.judge(self.base, spread, flags["beta"], step=0)]
            snapshots = snapshot_names(run)
            if self.only_last:
                snapshots = snapshots[-1:]
            for snapshot in snapshots:
                images = self.sample(run / "lora" / snapshot, flags)
                rows.append(self.judge(images, spread, flags["beta"], updates_of(snapshot)))
            if self.with_parts:
                # The model still holds the weights of the last snapshot.
                rows[-1].update(self.parts(flags))
            done.write_text(json.dumps(rows, indent=1) + "\n")
        return json.loads(done.read_text())

    def sample(self, lora, flags):
        """The images (N, 3, H, W) of a snapshot, whose weights stay in the model."""
        load_lora(self.model, lora)
        return self.images_of(flags, len(self.prompts), flags["prefix"], "tuned")

    def images_of(self, flags, num_prompts, prefix, tail):
        """The images of the first prompts. The steps before the last K are those of `prefix`."""
        return sample_in_two(
            self.model, self.scheduler, GUIDANCE_SCALE, NUM_STEPS - flags["grad_steps"], 8,
            self.noise[:num_prompts], self.prompts[:num_prompts], prefix, tail,
        )

    @torch.no_grad()
    def judge(self, images, spread, beta, step):
        r = score(self.reward, images, self.prompts)
        base_r = score(self.reward, self.base, self.prompts)
        gain = (r - base_r) / spread
        # Only inside the region the tuned image, and outside it the base's.
        inside_only = torch.where(self.mask > 0, images, self.base)
        outside = 1 - self.mask
        inside_gain = (score(self.reward, inside_only, self.prompts) - base_r) / spread
        loss = focus_loss(images, self.base, self.mask, gain, beta)
        is_correct = []
        for image, prompt in zip(images, self.prompts):
            is_correct.append(oracle.correct(image, prompt) is True)
        return dict(
            step=step,
            reward=gain.mean().item(),
            objective=-loss.item(),
            outside=change(images, self.base, outside).mean().item(),
            inside_gain=inside_gain.mean().item(),
            toy_correct=mean(is_correct),
            detector_b=self.detector_b(images).mean().item(),
            area=self.mask.mean().item(),
        )

    def parts(self, flags):
        """The change outside by the first T - K steps alone, and by the others alone."""
        base = self.base[:PARTS]
        outside = 1 - self.mask[:PARTS]

        def change_of(prefix, tail):
            images = self.images_of(flags, PARTS, prefix, tail)
            return change(images, base, outside).mean().item()

        return dict(prefix=change_of(flags["prefix"], "base"), tail=change_of("base", "tuned"))


# --------------------------------------------------------------------------------------------------
# The tables


def at_reward(rows, level, field):
    """`field` where the reward first reaches `level`, interpolated between snapshots."""
    for before, after in zip(rows, rows[1:]):
        if after["reward"] >= level:
            share = (level - before["reward"]) / (after["reward"] - before["reward"])
            return before[field] + share * (after[field] - before[field])
    return float("nan")


def common_levels(rows):
    """{name: rows of each seed} -> for each seed, the highest reward that all methods reach."""
    levels = []
    for runs in zip(*rows.values()):
        levels.append(min(max(row["reward"] for row in run) for run in runs))
    return levels


def table_at_equal_reward(title, fields, rows):
    levels = common_levels(rows)
    gains = ", ".join(f"{level:.2f}" for level in levels)
    lines = [f"\n{title}, where the reward has first risen by {gains}\n", *table_head(fields)]
    for name, runs in rows.items():
        cells = []
        for field in fields:
            values = [at_reward(run, level, field) for run, level in zip(runs, levels)]
            cells.append(format_mean(values, 4))
            print(title, name, field, " ".join(f"{value:.4f}" for value in values))
        lines.append(table_line(name, cells))
    return lines


def table_after_training(title, fields, rows):
    lines = [f"\n{title}, after the last update\n", *table_head(fields)]
    first = next(iter(rows.values()))
    for name, runs in {"before": [run[:1] for run in first], **rows}.items():
        cells = []
        for field in fields:
            values = [run[-1].get(field, 0.0) for run in runs]
            cells.append(format_mean(values, 4))
        lines.append(table_line(name, cells))
    return lines


# --------------------------------------------------------------------------------------------------
# The pictures


def plot_curves(training, held_out):
    """The change outside as the reward rises: one line per run, one color per method."""
    figure, axes = subplots(1, 2, 5.5, 3.8)
    for axis, title, rows in zip(axes, ("training pairs", "held-out pairs"), (training, held_out)):
        for (name, runs), color in zip(rows.items(), COLORS):
            for run, seed in zip(runs, SEEDS):
                x = [row["reward"] for row in run]
                y = [row["outside"] for row in run]
                label = name if seed == SEEDS[0] else None
                axis.plot(x, y, "o-", markersize=3, color=color, alpha=0.7, label=label)
        axis.set(title=title, xlabel="rise of the reward, in standard deviations")
        axis.set(ylabel="change outside the region")
    axes[0].legend(fontsize=7)
    save_figure(figure, "focus_n_fix_curves.png", dpi=80)


def draw_regions(out, measure, rows):
    """Draws the first held-out images that have a region, for all methods and the first seed.

    Each has about the reward that all methods reach.
    """
    rows = {name: rows[name] for name in METHODS}
    level = common_levels(rows)[0]
    shown = measure.mask.sum((1, 2, 3)).nonzero()[:SHOWN, 0].tolist()
    columns = {"base model": measure.base, "region": measure.mask.expand_as(measure.base)}
    for name, flags in METHODS.items():
        snapshots = rows[name][0][1:]
        distances = [abs(row["reward"] - level) for row in snapshots]
        nearest = snapshots[distances.index(min(distances))]
        print(f"focus_n_fix.png: {name}, {nearest['step']} updates, reward {nearest['reward']:.4f}")
        run = out / run_name(flags, SEEDS[0])
        images = measure.sample(run / "lora" / f"step_{nearest['step']:06d}", flags)
        label = name.replace(", ", "\n", 1)
        columns[label] = images
        columns[f"5 x change by\n{label}"] = 5 * (images - measure.base).abs()
    draw_tiles("focus_n_fix.png", {label: images[shown] for label, images in columns.items()})


def draw_tiles(name, columns):
    """{label: images (N, 3, H, W)} -> a picture with a labeled column for each."""
    num_rows = len(next(iter(columns.values())))
    head = 60
    picture = Image.new("RGB", (CELL * len(columns), head + CELL * num_rows), "white")
    font = ImageFont.load_default(size=13)
    pen = ImageDraw.Draw(picture)
    for x, (label, images) in enumerate(columns.items()):
        pen.text(
            (CELL * x + CELL // 2, head // 2), label, "black", font, anchor="mm", align="center"
        )
        for y, image in enumerate(images):
            tile = to_pil(image).resize((CELL - 2, CELL - 2), Image.NEAREST)
            picture.paste(tile, (CELL * x, head + CELL * y))
    path = new_picture(name)
    picture.save(path)
    shrink(path)
