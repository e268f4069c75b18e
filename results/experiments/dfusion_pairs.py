"""Is a fused target the base's scene with the reference's item, and do the masks find the items?

D-Fusion's Figure 9: which layers and which steps to fuse. Everything uses the base model,
and nothing is trained.

Runs     for each of two lists of prompts, 8 of its 40 training prompts x 16 images (seed 0, 20
         steps, guidance 5). For each prompt, 8 pairs, fused in 8 ways.
Prints   for each list, a table of base, reference and targets: the reward, the share of targets
         adopted, the oracle's verdict, and how far an image is from its base. Also how
         much of the objects the masks cover.
Draws    dfusion_pairs.png: the first pair of 8 prompts, with rows for base, reference and target.
Took     about six minutes on one CPU core, as estimated from a training run's speed.
"""

import torch
import torch.nn.functional as F

import dfusion_dpo
from common import TOY, generator, load_model, make_scheduler
from data.prompts import encode_prompts
from data.items import read_items
from evaluate import Dino
from rewards import load_reward
from toy import oracle

from .tools import CPU, draw_rows, mean, table_head, table_line

NUM_IMAGES = 16  # per prompt
NUM_STEPS = 20
GUIDANCE_SCALE = 5
FUSED = {  # name of a target: --fusion_layers and --fusion_steps
    "layers 3-6, steps 18-1 (the paper's)": ("3-6", "18-1"),
    "layer 3": ("3", "18-1"),
    "layers 2-4": ("2-4", "18-1"),
    "layers 3-5": ("3-5", "18-1"),
    "all layers": ("0-6", "18-1"),
    "steps 20-1": ("3-6", "20-1"),
    "steps 18-10": ("3-6", "18-10"),
    "steps 9-1": ("3-6", "9-1"),
}
COLUMNS = (
    "toy_clip", "adopted", "toy_correct", "cosine to the base (DINO)", "pixel distance to the base",
)


def measure_pairs(out):
    """-> the lines of the tables, read from pairs.md if it exists."""
    if (out / "pairs.md").exists():
        return (out / "pairs.md").read_text().split("\n")
    torch.set_num_threads(1)
    bench = Bench(out)
    lines = []
    pictures = []
    for template in ("attributes", "relations"):
        rows = read_items(bench.args.prompts, template)[0][::5]
        measured = [measure_prompt(bench, p, row) for p, row in enumerate(rows)]
        lines += table_of_pairs(template, measured)
        pictures += [found["pictures"] for found in measured[:4]]
    rows = {}
    for k, name in enumerate(("base", "reference", "target")):
        rows[name] = torch.stack([of_prompt[k] for of_prompt in pictures])
    draw_rows(rows, "dfusion_pairs.png", label_width=130)
    (out / "pairs.md").write_text("\n".join(lines))
    return lines


class Bench:
    """The base model with its scheduler, judges and settings."""

    def __init__(self, out):
        self.args = settings(out)
        self.model = load_model("toy", CPU)
        self.scheduler = make_scheduler(self.model, "ddim", NUM_STEPS)
        self.reward, _ = load_reward("toy_clip", CPU)
        self.dino = Dino(TOY / "dino", CPU)
        self.plans = {}
        for name, (layers, steps) in FUSED.items():
            args = settings(out, "--fusion_layers", layers, "--fusion_steps", steps)
            self.plans[name] = plan_of(args, self.model)

    def score(self, prompt, trajectories):
        return dfusion_dpo.score_trajectories(
            self.args, self.model, self.reward, prompt, trajectories
        )

    @torch.no_grad()
    def features(self, images):
        return self.dino(images)


def settings(out, *flags):
    """dfusion_dpo.py's settings. The run folder is never made."""
    words = ["--guidance_scale", GUIDANCE_SCALE, "--num_inference_steps", NUM_STEPS]
    words += ["--micro_batch", NUM_IMAGES, "--out", out / "unused", *flags]
    return dfusion_dpo.parse_args([str(word) for word in words])


def plan_of(args, model):
    """Where and when dfusion_dpo.py would read and change attention with these settings."""
    steps = dfusion_dpo.step_indices("--fusion_steps", args.fusion_steps, args.num_inference_steps)
    return dfusion_dpo.FusionPlan(*dfusion_dpo.attention_modules(args, model), steps)


def noise_of(p, images):
    """New noise generators for some images of prompt p."""
    return [generator(0, "pairs", p, int(k)) for k in images]


def share_correct(images, prompt):
    return mean(oracle.correct(image, prompt) is True for image in images)


def measure_prompt(bench, p, row):
    """One prompt -> dict of what the table needs, with the pictures of its first pair."""
    prompt = row["prompt"]
    plan = next(iter(bench.plans.values()))
    # Encode the prompt once, not at every step.
    bench.model.embeds.update(encode_prompts(bench.model, [prompt]))

    # Sample images, and for the masks keep where the items are in them.
    trajectories, maps = dfusion_dpo.sample_prompt(
        bench.args, bench.model, bench.scheduler, row, noise_of(p, range(NUM_IMAGES)), plan
    )
    samples = bench.score(prompt, trajectories)
    references, bases, reference_of = dfusion_dpo.choose(samples.rewards)
    masks = dfusion_dpo.merge_masks(maps[references], row["thresholds"], bench.args.mask_merge)
    base = samples[bases]
    reference = samples[references[reference_of]]
    features = bench.features(samples.images)
    base_features = features[bases]

    # The pairs as they are without fusion.
    cosine = (features[references[reference_of]] * base_features).sum(-1).mean()
    found = dict(num_pairs=len(bases), pictures=[base.images[0], samples.images[references[0]]])
    found["base"] = [base.rewards.mean(), share_correct(base.images, prompt)]
    found["reference"] = [
        reference.rewards.mean(),
        share_correct(reference.images, prompt),
        cosine,
        (reference.images - base.images).abs().mean(),
    ]
    found["masks"] = []
    for k, mask in zip(references, masks[:, plan.fused_steps]):
        found["masks"].append(compare_mask(samples.images[k], mask))

    # Fuse the same pairs in each of the ways.
    for name, fused_plan in bench.plans.items():
        targets = dfusion_dpo.fuse(
            bench.model, bench.scheduler, fused_plan, prompt, trajectories[references],
            base.trajectories, reference_of, masks, noise_of(p, bases), GUIDANCE_SCALE,
        )
        target = bench.score(prompt, targets)
        found[name] = [
            target.rewards.mean(),
            (target.rewards >= base.rewards).float().mean(),
            share_correct(target.images, prompt),
            (bench.features(target.images) * base_features).sum(-1).mean(),
            (target.images - base.images).abs().mean(),
        ]
        found["pictures"].append(target.images[0])
    return found


def compare_mask(image, masks):
    """Masks (steps, s, s) of an image against its objects, as the oracle cuts them out.

    -> (3, steps): the share of the objects under the mask, of the latent, and of the picture.
    """
    pixels = oracle.to_array(image)
    objects = oracle.segment(pixels, oracle.background_of(pixels)) > 0
    objects = torch.from_numpy(objects).float()
    objects = F.adaptive_avg_pool2d(objects[None], masks.shape[-1])[0]
    masks = masks.float()
    covered = (masks * objects).sum((1, 2)) / objects.sum()
    area = masks.mean((1, 2))
    return torch.stack([covered, area, objects.mean().expand(len(masks))])


def column_means(measured, name):
    """The means over prompts of one entry of measure_prompt's dicts."""
    values = []
    for found in measured:
        values.append([float(value) for value in found[name]])
    return torch.tensor(values, dtype=torch.float64).mean(0).tolist()


def table_of_pairs(template, measured):
    """The dicts of a list's prompts -> the lines of its table."""
    r_base, correct_base = column_means(measured, "base")
    r_reference, correct_reference, cosine, pixels = column_means(measured, "reference")
    size = f"{len(measured)} prompts, {NUM_IMAGES} images each"
    base_cells = [f"{r_base:.3f}", "", f"{correct_base:.2f}", "1", "0"]
    reference_cells = [f"{r_reference:.3f}", "", f"{correct_reference:.2f}"]
    reference_cells += [f"{cosine:.3f}", f"{pixels:.3f}"]
    lines = [
        f"\n{template}: {size}, {measured[0]['num_pairs']} pairs a prompt\n",
        *table_head(COLUMNS),
        table_line("base", base_cells),
        table_line("reference", reference_cells),
    ]
    for name in FUSED:
        r, adopted, correct, cosine, pixels = column_means(measured, name)
        cells = [f"{r:.3f}", f"{adopted:.2f}", f"{correct:.2f}", f"{cosine:.3f}", f"{pixels:.3f}"]
        lines.append(table_line(f"target: {name}", cells))

    of_masks = []
    for found in measured:
        of_masks += found["masks"]
    covered, area, objects = torch.cat(of_masks, 1).mean(1).tolist()
    lines.append(
        f"\nmasks: {area:.1%} of the latent; the objects are {objects:.1%} of the picture,"
        f" {covered:.1%} of them under the mask"
    )
    return lines
