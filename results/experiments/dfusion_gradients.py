"""Which sampling steps carry the reward's gradient, for naive and for fused pairs?

This is D-Fusion's argument in numbers. If naive pairs teach little because they differ in
everything, then their gradients point in a new direction every round. The gradient of the mean
reward, which we want, is backpropagated through all of sampling.

Runs     the gradients of DPO and DDPO at the base model, one per sampling step, on 8 training
         prompts: 4 rounds of 64 images, each fused and naive. The reward's gradient over 2 x 64
         images. Nothing is trained.
Prints   a table by sampling step and by set of steps: the mean cosine to the reward's gradient,
         with its standard error over rounds, and the mean cosine between rounds; and how well two
         halves of the reward's gradient agree.
Took     4 minutes on one CPU core.
"""

import itertools
import json

import torch

import dfusion_dpo
from common import decode, generator, initial_latents, load_model, make_scheduler, make_trainable
from data.prompts import encode_once
from data.items import read_items
from rewards import load_reward

from .tools import CPU, mean, table_head, table_line

NUM_ROUNDS = 4
NUM_IMAGES = 8  # per prompt, of the reward's gradient
COUPLES = 16  # pairs and steps in a gradient pass
METHODS = (("dpo", "naive"), ("dpo", "fused"), ("ddpo", "naive"), ("ddpo", "fused"))
# Sets of steps, counted down as in --trained_steps, and whether every step's gradient is scaled
# to length 1 before they are added.
SETS = {
    "10-6": ("10-6", False),
    "10-3": ("10-3", False),
    "4-3": ("4-3", False),
    "10-1": ("10-1", False),
    "10-1, each of length 1": ("10-1", True),
}


def measure_gradients(out):
    """-> the lines of the table."""
    torch.set_num_threads(1)
    done = out / "gradients.json"
    if not done.exists():
        done.write_text(json.dumps(compare_gradients(Bench(out))) + "\n")
    found = json.loads(done.read_text())
    lines = [
        "\nThe gradient at the base model: mean cosine to the reward's gradient ± its standard "
        "error over rounds, and in parentheses the mean cosine between two rounds\n",
        *table_head(["length", *(f"{method} {algo.upper()}" for algo, method in METHODS)]),
    ]
    for name, row in found["table"].items():
        # How long DPO's naive gradient is, compared with that of the first step.
        cells = [f"{row['length']:.3g}" if row["length"] else ""]
        for to_reward, error, between in row["cosines"]:
            cells.append(f"{to_reward:+.2f} ± {error:.2f} ({between:+.2f})")
        lines.append(table_line(name, cells))
    lines.append(
        "\nthe reward's gradient over one half of its images and over the other: "
        f"cosine {found['halves']:+.2f}"
    )
    return lines


class Bench:
    """The base model with an untrained LoRA, and what a round needs."""

    def __init__(self, out):
        self.args = dfusion_dpo.parse_args(["--reward", "toy_pref", "--out", str(out / "unused")])
        self.model = load_model("toy", CPU)
        self.reward, _ = load_reward(self.args.reward, CPU)
        # 8 training prompts, the same ones in all rounds.
        self.rows = read_items(self.args.prompts)[0][::10]
        encode_once(self.model, [row["prompt"] for row in self.rows])
        self.params = make_trainable(self.model, self.args.lora_rank)
        self.scheduler = make_scheduler(self.model, "ddim", self.args.num_inference_steps)
        modules = dfusion_dpo.attention_modules(self.args, self.model)
        fused_steps = dfusion_dpo.step_indices(
            "--fusion_steps", self.args.fusion_steps, self.args.num_inference_steps
        )
        self.plan = dfusion_dpo.FusionPlan(*modules, fused_steps)

    def take_gradient(self):
        """The gradient as one vector. It is zero again afterwards."""
        vector = torch.cat([p.grad.flatten() for p in self.params])
        for p in self.params:
            p.grad = None
        return vector


def compare_gradients(bench):
    """-> dict(halves, table), with a row for each step and each set of steps."""
    halves = [unit(reward_gradient(bench, seed)) for seed in range(2)]
    truth = unit(halves[0] + halves[1])

    # {method: (rounds, steps, parameters)}
    gradients = {}
    for method in METHODS:
        gradients[method] = []
    for number, naive in itertools.product(range(NUM_ROUNDS), (True, False)):
        for algo, per_step in round_gradients(bench, number, naive).items():
            gradients[algo, "naive" if naive else "fused"].append(per_step)
    gradients = {method: torch.stack(rounds) for method, rounds in gradients.items()}

    table = {}
    lengths = gradients["dpo", "naive"].norm(dim=-1).mean(0)
    for i, t in enumerate(bench.scheduler.timesteps.tolist()):
        cosines = [compare(rounds[:, i], truth) for rounds in gradients.values()]
        length = (lengths[i] / lengths[0]).item()
        table[f"t = {t}"] = dict(length=length, cosines=cosines)
    for name, (text, is_scaled) in SETS.items():
        steps = dfusion_dpo.step_indices("SETS", text, bench.args.num_inference_steps)
        cosines = []
        for rounds in gradients.values():
            if is_scaled:
                rounds = unit(rounds)
            cosines.append(compare(rounds[:, steps].sum(1), truth))
        table[name] = dict(length=None, cosines=cosines)
    return dict(halves=(halves[0] @ halves[1]).item(), table=table)


def unit(vectors):
    """Vectors (..., D) -> the same with length 1."""
    return vectors / vectors.norm(dim=-1, keepdim=True)


def compare(vectors, truth):
    """Gradients of rounds (R, D) -> cosine to the truth, its standard error, cosine of rounds."""
    vectors = unit(vectors)
    cosines = vectors @ truth
    is_other_round = ~torch.eye(len(vectors), dtype=torch.bool)
    between = (vectors @ vectors.T)[is_other_round]
    error = cosines.std() / len(vectors) ** 0.5
    return cosines.mean().item(), error.item(), mean(between)


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


def round_gradients(bench, number, naive):
    """Samples a round of pairs -> {algo: the gradient on all pairs at each step, (T, D)}."""
    bench.args.naive = naive
    pairs = dfusion_dpo.sample_round(
        bench.args, bench.model, bench.scheduler, bench.reward, bench.rows, bench.plan, {}, number
    )
    num_pairs = len(pairs.prompts)
    gradients = {}
    for algo in ("dpo", "ddpo"):
        bench.args.algo = algo
        per_step = []
        for i in range(bench.args.num_inference_steps):
            for p in torch.arange(num_pairs).split(COUPLES):
                steps = torch.full_like(p, i)
                loss, *_ = dfusion_dpo.pair_loss(
                    bench.args, bench.model, bench.scheduler, pairs, p, steps
                )
                loss = loss * len(p) / num_pairs
                loss.backward()
            per_step.append(bench.take_gradient())
        gradients[algo] = torch.stack(per_step)
    return gradients
