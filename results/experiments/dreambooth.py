"""Does treatment keep what a LoRA has learned from six pictures? DiffDoctor's section 4.3.

A DreamBooth LoRA learns "a [v] star", a purple one, beside other stars. Then it is treated against
artifacts. Half of the treated [v] prompts name the star alone, half put it beside one of 8 objects.
Is the purple star still there beside 7 other objects, and alone?

Runs     for seeds 0 and 1, a LoRA of 150 updates, and diffdoctor.py treat from there, 120 updates
         with gamma 0. Then 2 images of each of 28 unseen compositions, and 20 images of "a [v]
         star", after 60 and 120 updates. Guidance is 4.
Prints   two tables, of the compositions and of the star alone, with the columns of
         diffdoctor_treatment.py, and "instance": the share of images with a purple star, by the
         oracle's nearest reading. The oracle reads "purple" where a prompt has "[v]".
Draws    diffdoctor_dreambooth.png: one image per row before and after the treatment, each beside
         its overlay.
Took     about seven minutes per treated run on one CPU core.
"""

import itertools

import numpy as np
import torch

from common import TOY, base_model, encode, generator, load_model, make_scheduler, make_trainable
from data.images import image_data
from data.labels import overlay
from data.prompts import condition, encode_once, read_prompts
from diffdoctor import offline_loss
from models.lora import load_lora
from run_folder import generate
from toy.scenes import COLOURS, RELATIONS, SHAPES, parse_caption, render, sample_scene

from .diffdoctor_treatment import EACH, TreatmentJudges, draw_columns, notable_things
from .tools import CPU, mean, together, train, write_prompts, write_table

INSTANCE = "a [v] star"  # the tokenizer does not know "[v]", and the LoRA learns it
LOOK = "purple"  # what "[v]" means
INSTANCE_UPDATES = 150
INSTANCE_LR = 3e-4
TREATED_UPDATES = (60, 120)  # where we measure
SEEDS = (0, 1)
NUM_ALONE = 10  # times EACH images of the instance alone
GUIDANCE_SCALE = 4
LORA_RANK = 8
SAMPLER = dict(
    scheduler="ddpm", eta=1.0, num_inference_steps=20, guidance_scale=GUIDANCE_SCALE
)


def dreambooth(out, jobs):
    treated_others, unseen_others = split_others()
    prompts = dict(compositions=compositions(unseen_others), alone=[INSTANCE] * NUM_ALONE)
    write_prompts(out / "unseen.txt", prompts["compositions"])
    write_prompts(out / "treated.txt", treated_prompts(treated_others))
    pictures = draw_instance()
    prior = other_stars()
    torch.set_num_threads(1)

    together(jobs, learn_instance, [(out, pictures, prior, seed) for seed in SEEDS])
    together(jobs, treat, [(out, seed) for seed in SEEDS])
    judges = TreatmentJudges()
    images = sample_rows(out, prompts)
    for part in prompts:
        write_table(out / f"{part}.md", measure(images, prompts, part, judges), 2)
    draw_before_and_after(images, prompts, judges.detectors["detector"])


# --------------------------------------------------------------------------------------------------
# Prompts and pictures


def named(prompt):
    """The prompt with the meaning of "[v]" in its place, which the oracle and the base can read."""
    return prompt.replace("[v]", LOOK)


def split_others():
    """The 15 things that are no stars -> the 8 that are treated, and the 7 that are not."""
    others = [f"a {color} {shape}" for color in COLOURS for shape in SHAPES if shape != "star"]
    return others[::2], others[1::2]


def compositions(others):
    """The instance and each of these things, in both orders and relations."""
    prompts = []
    for other in others:
        for relation in RELATIONS:
            prompts.append(f"{INSTANCE} {relation} {other}")
            prompts.append(f"{other} {relation} {INSTANCE}")
    return prompts


def treated_prompts(others):
    """The prompts of treating: a quarter the instance alone, a quarter composed, half the class."""
    every_prompt = read_prompts(TOY / "prompts_train.txt")
    class_prompts = [prompt for prompt in every_prompt if "star" in prompt]
    num_alone = len(class_prompts) // 2
    composed = itertools.islice(itertools.cycle(compositions(others)), num_alone)
    return [INSTANCE] * num_alone + list(composed) + class_prompts


def draw_instance():
    """Six pictures (3, 64, 64) of the instance."""
    pictures = []
    for i in range(6):
        scene = sample_scene(np.random.default_rng([7, i]), named(INSTANCE))
        pixels, _ = render(scene)
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return pictures


def other_stars():
    """[(image, caption)] of the toy world's images with a star, for DreamBooth's prior."""
    return [(x, caption) for x, caption in image_data(TOY / "images", 64) if "star" in caption]


# --------------------------------------------------------------------------------------------------
# Training


def learn_instance(out, pictures, prior, seed):
    """DreamBooth with prior preservation: half of a batch is the instance, half other stars."""
    folder = out / f"instance_{seed}"
    if (folder / "pytorch_lora_weights.safetensors").exists():
        return
    model = load_model("toy", CPU)
    encode_once(model, [INSTANCE, *(caption for _, caption in prior)])
    params = make_trainable(model, LORA_RANK, seed)
    optimizer = torch.optim.AdamW(params, lr=INSTANCE_LR)
    scheduler = make_scheduler(model, "ddpm", 20)
    for step in range(INSTANCE_UPDATES):
        # Draw four pictures of the instance and four other stars.
        draw = generator(seed, "dreambooth", step)
        picks = torch.randint(len(pictures), (4,), generator=draw)
        images = [pictures[i] for i in picks]
        captions = [INSTANCE] * 4
        for i in torch.randint(len(prior), (4,), generator=draw):
            image, caption = prior[i]
            images.append(image)
            captions.append(caption)

        # The diffusion loss on them.
        x0 = encode(model, torch.stack(images))
        noise = torch.randn(x0.shape, generator=draw)
        t = torch.randint(1000, (len(x0),), generator=draw)
        loss = offline_loss(model, scheduler, x0, noise, t, condition(model, captions))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save(folder)


def treat(out, seed):
    """Treats a seed's LoRA without early stopping -> the run's folder."""
    return train(
        out, f"treated_{seed}", "diffdoctor", "treat",
        "--grad_steps", 5, "--init_lora", out / f"instance_{seed}", "--gamma", 0,
        "--prompts", out / "treated.txt", "--test_prompts", out / "unseen.txt",
        "--guidance_scale", GUIDANCE_SCALE,
        "--train_steps", TREATED_UPDATES[-1], "--save_every", TREATED_UPDATES[0],
        "--patience", TREATED_UPDATES[-1], "--max_drift", 1e6, "--seed", seed,
    )


# --------------------------------------------------------------------------------------------------
# Measuring


def snapshots(out):
    """{(name of a row, seed): its LoRA}. Without a LoRA, the row shows the base model."""
    loras = {("before DreamBooth", SEEDS[0]): None}
    loras[f"before DreamBooth, {LOOK}", SEEDS[0]] = None
    for seed in SEEDS:
        loras["DreamBooth, before treatment", seed] = out / f"instance_{seed}"
        for step in TREATED_UPDATES:
            snapshot = out / f"treated_{seed}" / "lora" / f"step_{step:06d}"
            loras[f"treated, {step} updates", seed] = snapshot
    return loras


def sample_rows(out, prompts):
    """{(name of a row, seed): {part of the prompts: its images}}. What is sampled stays."""
    model = load_model("toy", CPU)
    every_prompt = prompts["compositions"] + [INSTANCE]
    encode_once(model, every_prompt + [named(prompt) for prompt in every_prompt])
    sampled = {}
    (out / "images").mkdir(exist_ok=True)
    for (name, seed), lora in snapshots(out).items():
        path = out / "images" / f"{name}_{seed}.pt"
        if not path.exists():
            images = {}
            for part, texts in prompts.items():
                images[part] = sample_row(model, lora, name, texts)
            torch.save(images, path)
        sampled[name, seed] = torch.load(path, weights_only=True)
    return sampled


def sample_row(model, lora, name, prompts):
    """The images (N, 3, 64, 64) of a row, EACH per prompt."""
    if lora:
        load_lora(model, lora)
        return generate(model, prompts, 0, SAMPLER, EACH)
    if LOOK in name:
        prompts = [named(prompt) for prompt in prompts]
    with base_model(model):
        return generate(model, prompts, 0, SAMPLER, EACH)


def measure(sampled, prompts, part, judges):
    """{name of a row: one dict per training seed}."""
    named_prompts = [named(prompt) for prompt in prompts[part]]
    rows = {}
    for (name, seed), images in sampled.items():
        before = sampled["DreamBooth, before treatment", seed][part]
        row = judges(images[part], named_prompts, before)
        row["instance"] = share_with_instance(images[part])
        rows.setdefault(name, []).append(row)
    return rows


def share_with_instance(images):
    """The share of images with a star of the instance's look, by the oracle's nearest reading."""
    (kind,), _ = parse_caption(named(INSTANCE))
    has_instance = []
    for image in images:
        has_instance.append(any(o["nearest"] == kind for o in notable_things(image)))
    return mean(has_instance)


def draw_before_and_after(sampled, prompts, detector):
    """Shows one image of every fourth composition and three of the star alone, the first seed's."""
    columns = []
    for title, name in (
        ("before\nDreamBooth", "before DreamBooth"),
        ("DreamBooth,\nbefore treatment", "DreamBooth, before treatment"),
        ("treated,\n120 updates", "treated, 120 updates"),
    ):
        images = sampled[name, SEEDS[0]]
        shown = torch.cat([images["compositions"][:: 4 * EACH], images["alone"][:3]])
        columns.append((title, shown))
        with torch.no_grad():
            columns.append(("red: what the\ndetector sees", overlay(shown, detector(shown))))
    labels = prompts["compositions"][::4] + 3 * [INSTANCE]
    draw_columns("diffdoctor_dreambooth.png", columns, labels)
