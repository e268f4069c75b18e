"""Does ReFL raise the reward on held-out prompts, and what does it cost? (ImageReFL's Figure 2)

Runs     3 runs of `python refl.py`, seeds 0 to 2, twice as long as by default. Then 4 images of
         each of 40 held-out prompts: of the base model with guidance 4 and without guidance, and of
         every snapshot of every run, on its own without guidance and in combined generation. Real
         scenes of the same prompts are a row of their own, and the reference of frechet_toy.
Prints   a table: toy_pref, which we train on; toy_pref_b and toy_correct, which are not; diversity;
         and the distance to real scenes. Also the seconds per update.
Draws    refl.png, the same prompts and noise before and after training, seed 0.
Took     about 8 minutes of CPU time on one core.
"""

import statistics

import numpy as np
import torch

from combined_sample import sample_mixed, tuned_weight
from common import base_model, decode, generator, initial_latents, load_model, make_scheduler
from common import merged, sample
from data.prompts import condition, encode_once
from evaluate import frechet
from models.lora import load_lora
from rewards import load_reward
from run_folder import score
from toy.scenes import render, sample_scene

from .tools import CPU, JUDGE_BATCH, SEEDS, Judges, draw_rows, held_out_prompts, read_lines, repeat
from .tools import snapshot_names, together, train, updates_of, write_table

METRICS = ("toy_pref", "toy_pref_b", "toy_correct", "dino_div", "frechet_toy")
NUM_STEPS = 20
UPDATES = 30  # the default; the runs go on for as long again
LATE = 15  # base steps: where the gradient steps start
EACH = 4  # images per prompt
BATCH = 20  # images sampled at once
SHOWN = slice(0, 160, 16)  # the images in pictures: the first one of every fourth prompt


def refl(out, jobs):
    runs = together(jobs, train_run, [(out, seed) for seed in SEEDS])
    bench = Bench(out, held_out_prompts(out).read_text().splitlines())
    rows = measure_rows(bench, runs)
    write_table(out / "table.md", rows)
    seconds = []
    for run in runs:
        seconds += [row["seconds"] for row in read_lines(run / "log.jsonl")]
    print(f"seconds per update: median {statistics.median(seconds):.2f}, {jobs} runs at a time")
    draw_before_and_after(bench)


# --------------------------------------------------------------------------------------------------
# What imagerefl.py uses, too


def train_run(out, seed):
    """A run of ReFL, twice as long as by default -> its folder."""
    flags = ("--train_steps", 2 * UPDATES, "--save_every", UPDATES)
    return train(out, f"run_{seed}", "refl", "--seed", seed, *flags)


def real_scenes(prompts, each):
    """Renders `each` scenes per prompt -> images (N, 3, 64, 64) in [0, 1]."""
    scenes = []
    for i, prompt in enumerate(prompts):
        for k in range(each):
            pixels, _ = render(sample_scene(np.random.default_rng([i, k]), prompt))
            scenes.append(torch.from_numpy(pixels).permute(2, 0, 1).float())
    return torch.stack(scenes)


class Bench:
    """Samples and judges many settings in one process, all with the same prompts and noise.

    These are the images of combined_sample.py with seed 0. The base model's first steps are the
    same for every tuned model, so they are made once.
    """

    def __init__(
        self, out, prompts, each=EACH, model="toy", scheduler="ddpm", num_steps=NUM_STEPS
    ):
        torch.set_num_threads(1)
        self.folder = out.parent / "measured"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prompts = prompts
        self.each = each
        self.num_steps = num_steps
        self.model = load_model(model, CPU)
        encode_once(self.model, prompts)
        self.scheduler = make_scheduler(self.model, scheduler, num_steps)
        self.starts = {}  # (base steps, guidance) -> latents and states of generators per batch

        self.reward, _ = load_reward("toy_pref", CPU)
        self.judges = Judges()
        self.scene_features = self.features(real_scenes(prompts, each))

    def batches(self):
        """Yields (cond, uncond, generators) of every batch of images."""
        jobs = [(i, k) for i in range(len(self.prompts)) for k in range(self.each)]
        for first in range(0, len(jobs), BATCH):
            batch = jobs[first : first + BATCH]
            cond = condition(self.model, [self.prompts[i] for i, _ in batch])
            uncond = condition(self.model, [None] * len(batch))
            yield cond, uncond, [generator(0, "image", i, k) for i, k in batch]

    @torch.no_grad()
    def start(self, base_steps, guidance):
        """Per batch, the latents after the base model's first steps and the generators' states."""
        if (base_steps, guidance) in self.starts:
            return self.starts[base_steps, guidance]
        starts = []
        if base_steps == 0:
            for _, _, generators in self.batches():
                latents = initial_latents(self.model, generators)
                starts.append((latents, [g.get_state() for g in generators]))
        else:
            # Continue from the last switch point before this one.
            known = [n for n, other in self.starts if other == guidance and n < base_steps]
            first = max(known, default=0)
            for cond, uncond, generators, latents in self.continued(first, guidance):
                with base_model(self.model):
                    latents = sample(
                        self.model, self.scheduler, latents, cond, first, base_steps, generators,
                        guidance, uncond,
                    )
                starts.append((latents, [g.get_state() for g in generators]))
        self.starts[base_steps, guidance] = starts
        return starts

    def continued(self, base_steps, guidance):
        """Yields (cond, uncond, generators, latents) of every batch after these base steps."""
        starts = self.start(base_steps, guidance)
        for (cond, uncond, generators), (latents, states) in zip(self.batches(), starts):
            for g, state in zip(generators, states):
                g.set_state(state)
            yield cond, uncond, generators, latents

    @torch.no_grad()
    def combined(self, base_steps, guidance=4.0):
        """Combined generation: with 0 base steps it is the tuned model alone, with all the base."""
        images = []
        for cond, _, generators, latents in self.continued(base_steps, guidance):
            with merged(self.model):
                latents = sample(
                    self.model, self.scheduler, latents, cond, base_steps, self.num_steps,
                    generators,
                )
            images.append(decode(self.model, latents))
        return torch.cat(images)

    @torch.no_grad()
    def aig(self, power, guidance=4.0):
        """AIG with the tuned model's weight (i / number of steps) ** power."""
        weights = []
        for i in range(self.num_steps):
            weights.append(tuned_weight("aig", i, self.num_steps, aig_power=power))
        images = []
        for cond, uncond, generators in self.batches():
            latents = initial_latents(self.model, generators)
            latents = sample_mixed(
                self.model, self.scheduler, latents, cond, uncond, weights, generators,
                base_guidance_scale=guidance,
            )
            images.append(decode(self.model, latents))
        return torch.cat(images)

    @torch.no_grad()
    def features(self, images):
        """Images -> their DINO features (N, D)."""
        return torch.cat([self.judges.dino(part) for part in images.split(JUDGE_BATCH)])

    def judge(self, images):
        """Images, `each` per prompt -> {metric: its mean}."""
        row = self.judges(images, self.prompts, self.each)
        row["toy_pref"] = score(self.reward, images, repeat(self.prompts, self.each)).mean().item()
        row["frechet_toy"] = frechet(self.features(images), self.scene_features)
        return {metric: row[metric] for metric in METRICS}

    def measure(self, name, lora, sampler, *settings):
        """The metrics of a LoRA (None: the base model) under a sampler, made once.

        sampler: self.combined or self.aig. The images are kept beside the metrics.
        """
        path = self.folder / f"{name}.pt"
        if not path.exists():
            if lora:
                load_lora(self.model, lora)
            images = sampler(*settings)
            torch.save(((images * 255).round().byte(), self.judge(images)), path)
        _, metrics = torch.load(path, weights_only=True)
        return metrics

    def measure_combined(self, kind, run, seed, updates, base_steps):
        """The metrics of a run's snapshot; with 0 base steps it samples alone."""
        name = f"{kind}_{seed}_{updates}_{base_steps}"
        lora = run / "lora" / f"step_{updates:06d}"
        return self.measure(name, lora, self.combined, base_steps)

    def images(self, name):
        """The images of a measurement, in [0, 1]."""
        images, _ = torch.load(self.folder / f"{name}.pt", weights_only=True)
        return images / 255


def combined_name(kind, updates, base_steps):
    """What a table calls combined generation; with 0 base steps it is the tuned model alone."""
    name = f"{kind}, {updates} updates"
    if base_steps:
        name += f" + {base_steps} base steps"
    return name


# --------------------------------------------------------------------------------------------------
# The table and the pictures


def measure_rows(bench, runs):
    """{name of a row: its metrics, one dict per training seed}."""
    rows = {
        "real scenes": [bench.judge(real_scenes(bench.prompts, bench.each))],
        "base, guidance 4": [bench.measure("base_4", None, bench.combined, NUM_STEPS, 4.0)],
        "base, no guidance": [bench.measure("base_1", None, bench.combined, NUM_STEPS, 1.0)],
    }
    for base_steps in (0, LATE):
        for snapshot in snapshot_names(runs[0]):
            updates = updates_of(snapshot)
            row_name = combined_name("ReFL", updates, base_steps)
            rows[row_name] = []
            for seed, run in zip(SEEDS, runs):
                metrics = bench.measure_combined("ReFL", run, seed, updates, base_steps)
                rows[row_name].append(metrics)
    return rows


def draw_before_and_after(bench):
    """Draws ten prompts before and after training, seed 0, alone and in combined generation."""
    names = {
        "base, no guidance": "base_1",
        "ReFL": f"ReFL_0_{UPDATES}_0",
        "base, guidance 4": "base_4",
        f"ReFL, {LATE} base steps": f"ReFL_0_{UPDATES}_{LATE}",
    }
    rows = {label: bench.images(name)[SHOWN] for label, name in names.items()}
    draw_rows(rows, "refl.png")
