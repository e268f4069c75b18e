"""Can Focus-N-Fix remove an unwanted concept and leave the rest of the image alone?

The paper's other kind of problem, besides artifacts. The unwanted concept is a red circle, which
should become a blue one: r = cos(image, "a blue circle") - cos(image, "a red circle"), by toy_clip.
The region is Grad-CAM of -r. All settings but these are those of focus_n_fix.py.

Runs     7 of focus_n_fix.py --concept, on the training prompts with something red: DRaFT and
         Focus-N-Fix with seeds 0 to 2, and with seed 0 Focus-N-Fix with the base prefix. Then an
         image of each held-out prompt with something red, from the base model and from every
         snapshot.
Prints   two tables: where the reward first reaches what DRaFT and Focus-N-Fix both reach, and after
         the last update. "red" is the share of images with a red thing, and "others" the share of
         the captions' other things that are there, both by the oracle's nearest reading.
Draws    focus_n_fix_concept.png, held-out images after the last update, and of DRaFT also where its
         reward is closest to that of Focus-N-Fix.
Took     about 70 seconds of one CPU core per run, and 40 for its images.
"""

import torch

from common import TOY
from data.prompts import read_prompts
from focus_n_fix import OURS, THRESHOLD, Region, concept_reward
from rewards import load_reward
from toy import oracle
from toy.scenes import parse_caption

from .focus_n_fix import METHODS, Measure, draw_tiles, run_name, table_after_training
from .focus_n_fix import table_at_equal_reward, train_run
from .tools import CPU, SEEDS, mean, together, write_prompts

BAD = "a red circle"
GOOD = "a blue circle"
COLOR = "red"
DRAFT = "DRaFT, K = 2"
FOCUS = "Focus-N-Fix, K = 2"
BASE_PREFIX = "Focus-N-Fix, K = 2, base prefix"
SEEDS_OF = {DRAFT: SEEDS, FOCUS: SEEDS, BASE_PREFIX: SEEDS[:1]}
FIELDS = ("reward", "objective", "outside", "inside_gain", "red", "others", "toy_correct")
SHOWN = (0, 1, 2, 3, 4, 5)  # held-out prompts in the picture


def unwanted_concept(out, jobs):
    held_out = read_prompts(TOY / "prompts_test.txt")
    red = [prompt for prompt in held_out if COLOR in prompt]
    train_prompts = read_prompts(TOY / "prompts_train.txt")
    write_prompts(out / "train.txt", [prompt for prompt in train_prompts if COLOR in prompt])
    # We measure held-out images ourselves, so the runs need not sample many.
    write_prompts(out / "shown.txt", red[:1])
    calls = [(out, name, seed) for name, seeds in SEEDS_OF.items() for seed in seeds]
    together(jobs, train_on_concept, calls)

    torch.set_num_threads(1)
    measure = ConceptMeasure("red", red, concept_judges())
    rows = {}
    for name, seeds in SEEDS_OF.items():
        rows[name] = [measure(run_of(out, name, seed), METHODS[name]) for seed in seeds]
    title = "held-out prompts with something red"
    both = {name: rows[name] for name in (DRAFT, FOCUS)}
    lines = table_at_equal_reward(title, FIELDS, both)
    lines += table_after_training(title, FIELDS, rows)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw_concept(out, measure, rows)


def run_of(out, name, seed):
    """The folder of a run."""
    return out / run_name(METHODS[name], seed)


def train_on_concept(out, name, seed):
    words = ["--concept", BAD, GOOD, "--prompts", out / "train.txt"]
    return train_run(out, METHODS[name], seed, *words)


def concept_judges():
    """-> the reward, and the region where an image lowers it."""
    clip, _ = load_reward("toy_clip", CPU)
    reward = concept_reward(clip, BAD, GOOD)
    region = Region(THRESHOLD["saliency"], OURS["toy"]["dilate"], clip=clip, reward=reward)
    return reward, region


class ConceptMeasure(Measure):
    """The measure of focus_n_fix.py, which also counts what is red and what is not."""

    def judge(self, images, spread, beta, step):
        row = super().judge(images, spread, beta, step)
        return {**row, **count_colors(images, self.prompts)}


def count_colors(images, prompts):
    """Images and prompts -> the share of images with something red, and of the others kept.

    A caption's other things are those of another color; each is found in the image or not.
    """
    is_red = []
    is_found = []
    for image, prompt in zip(images, prompts):
        found = [o["nearest"] for o in oracle.read(image) if oracle.is_notable(o)]
        is_red.append(any(color == COLOR for color, _ in found))
        kinds, _ = parse_caption(prompt)
        is_found += [kind in found for kind in kinds if kind[0] != COLOR]
    return dict(red=mean(is_red), others=mean(is_found))


def draw_concept(out, measure, rows):
    """Draws held-out images of the first seed: base | region | DRaFT twice | Focus-N-Fix."""
    focus = rows[FOCUS][0][-1]
    last = rows[DRAFT][0][-1]
    nearest = min(rows[DRAFT][0], key=lambda row: abs(row["reward"] - focus["reward"]))
    columns = {"base model": measure.base, "region": measure.mask.expand_as(measure.base)}
    for name, row in ((DRAFT, nearest), (DRAFT, last), (FOCUS, focus)):
        lora = run_of(out, name, SEEDS[0]) / "lora" / f"step_{row['step']:06d}"
        label = f"{name.removesuffix(', K = 2')},\n{row['step']} updates"
        columns[label] = measure.sample(lora, METHODS[name])
    shown = {label: images[list(SHOWN)] for label, images in columns.items()}
    draw_tiles("focus_n_fix_concept.png", shown)
