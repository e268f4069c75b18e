"""Do the gradients of two rounds agree, with each other and with the gradient of the reward?

This is D-Fusion's argument in numbers. If naive pairs teach little because they differ in
everything, then their gradients point in a new direction every round. The gradient of the mean
reward, which we want, is backpropagated through all of sampling.

Runs     DPO's gradient at the base model, on 8 prompts with attributes: 4 rounds of 64 images
         without guidance (10 steps), and 3 rounds with guidance 5 (20 steps), each fused and naive.
         The reward's gradient over 2 x 64 images. Nothing is trained.
Prints   a table by sampling step: the mean cosine between rounds, and to the reward's gradient
         with its standard error; and how well two halves of that gradient agree.
Took     about six minutes on one CPU core, as estimated from a training run's speed.
"""

import itertools
import json

import torch

import dfusion_dpo
from common import decode, generator, initial_latents, load_model, make_scheduler, make_trainable
from data.prompts import encode_once
from data.items import read_items
from rewards import load_reward

from .tools import CPU, table_line

SETTINGS = ((1, 10, 4), (5, 20, 3))  # guidance, sampling steps, rounds
NUM_IMAGES = 8  # per prompt, of the reward's gradient
COUPLES = 16  # pairs and steps in a gradient pass


def measure_gradients(out):
    """-> the lines of the table."""
    torch.set_num_threads(1)
    lines = [
        "\nDPO's gradient at the base model, rounds of 64 images: mean cosine between rounds, "
        "and to the gradient of the mean reward (± its standard error)\n",
        "| guidance, steps | t | naive: between rounds | to the reward's "
        "| fused: between rounds | to the reward's |",
        "|---|---|---|---|---|---|",
    ]
    notes = [""]
    for guidance_scale, num_steps, num_rounds in SETTINGS:
        done = out / f"gradients_{guidance_scale}_{num_steps}.json"
        if not done.exists():
            bench = Bench(out, guidance_scale, num_steps)
            done.write_text(json.dumps(compare_gradients(bench, num_rounds)) + "\n")
        found = json.loads(done.read_text())
        name = f"{guidance_scale}, {num_steps}"
        # The rows come in twos: a group of steps naive, then the same steps fused.
        for naive, fused in zip(found["table"][::2], found["table"][1::2]):
            lines.append(line_of(name, naive, fused))
        notes.append(
            f"guidance {guidance_scale}: the reward's gradient over one half of its images "
            f"and over the other: cosine {found['halves']:+.2f}"
        )
    return lines + notes


def line_of(name, naive, fused):
    """Two rows [timesteps, is naive, between rounds, to the reward's, error] -> a line."""
    timesteps = naive[0]
    cells = [f"{timesteps[0]}"]
    if len(timesteps) > 1:
        cells = [f"{timesteps[0]} to {timesteps[-1]}"]
    for _, _, between, to_reward, error in (naive, fused):
        cells += [f"{between:+.2f}", f"{to_reward:+.3f} ± {error:.3f}"]
    return table_line(name, cells)


class Bench:
    """The base model with an untrained LoRA, and what a round needs."""

    def __init__(self, out, guidance_scale, num_steps):
        words = ["--guidance_scale", guidance_scale, "--num_inference_steps", num_steps]
        words += ["--out", out / "unused"]
        self.args = dfusion_dpo.parse_args([str(word) for word in words])
        self.model = load_model("toy", CPU)
        self.reward, _ = load_reward("toy_clip", CPU)
        # 8 prompts, the same ones in all rounds.
        self.rows = read_items(self.args.prompts, "attributes")[0][::5]
        encode_once(self.model, [row["prompt"] for row in self.rows])
        self.params = make_trainable(self.model, self.args.lora_rank)
        self.scheduler = make_scheduler(self.model, "ddim", num_steps)
        modules = dfusion_dpo.attention_modules(self.args, self.model)
        self.plan = dfusion_dpo.FusionPlan(*modules, range(2, num_steps))

    def take_gradient(self):
        """The gradient as one vector of length 1. It is zero again afterwards."""
        vector = torch.cat([p.grad.flatten() for p in self.params])
        for p in self.params:
            p.grad = None
        return vector / vector.norm()


def compare_gradients(bench, num_rounds):
    """-> dict(halves, table), with a row for each group of steps, naive and then fused."""
    num_steps = bench.args.num_inference_steps
    # Five groups of steps. The last step has hardly any noise, so it is left out.
    size = num_steps // 5
    groups = []
    for first in range(0, num_steps - 1, size):
        groups.append(range(first, min(first + size, num_steps - 1)))

    halves = [reward_gradient(bench, seed) for seed in range(2)]
    both = halves[0] + halves[1]
    truth = both / both.norm()

    gradients = {}
    for number, naive in itertools.product(range(num_rounds), (True, False)):
        for steps, gradient in round_gradients(bench, number, naive, groups).items():
            gradients.setdefault((steps, naive), []).append(gradient)

    table = []
    is_other_round = ~torch.eye(num_rounds, dtype=torch.bool)
    for steps, naive in itertools.product(groups, (True, False)):
        vectors = torch.stack(gradients[steps, naive])
        between = (vectors @ vectors.T)[is_other_round].mean().item()
        cosines = vectors @ truth
        error = (cosines.std() / num_rounds**0.5).item()
        timesteps = bench.scheduler.timesteps[steps].tolist()
        table.append((timesteps, naive, between, cosines.mean().item(), error))
    return dict(halves=(halves[0] @ halves[1]).item(), table=table)


def reward_gradient(bench, seed):
    """The gradient of the mean reward, through all sampling steps, over 8 images per prompt."""
    model = bench.model
    scheduler = bench.scheduler
    for row in bench.rows:
        prompts = [row["prompt"]] * NUM_IMAGES
        generators = [generator(seed, "true", row["prompt"], k) for k in range(NUM_IMAGES)]
        latents = initial_latents(model, generators)
        for i in range(len(scheduler.timesteps)):
            noise_pred = dfusion_dpo.guided(
                model, scheduler, latents, i, prompts, bench.args.guidance_scale
            )
            mu, sigma = dfusion_dpo.ddim_step(scheduler, noise_pred, i, latents)
            latents = mu + sigma * initial_latents(model, generators)
        loss = -bench.reward(decode(model, latents), prompts).mean()
        loss.backward()
    return bench.take_gradient()


def round_gradients(bench, number, naive, groups):
    """Samples a round of pairs -> {group of steps: DPO's gradient on all pairs at these steps}."""
    bench.args.naive = naive
    pairs = dfusion_dpo.sample_round(
        bench.args, bench.model, bench.scheduler, bench.reward, bench.rows, bench.plan, {}, number
    )
    gradients = {}
    for steps in groups:
        couples = torch.tensor(list(itertools.product(range(len(pairs.prompts)), steps)))
        for part in couples.split(COUPLES):
            p, i = part.T
            loss, *_ = dfusion_dpo.pair_loss(bench.args, bench.model, bench.scheduler, pairs, p, i)
            loss = loss * len(part) / len(couples)
            loss.backward()
        gradients[steps] = bench.take_gradient()
    return gradients
