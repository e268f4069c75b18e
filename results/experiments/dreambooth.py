"""Does treatment keep what a LoRA has learned from six pictures? DiffDoctor's section 4.3.

A DreamBooth LoRA learns "a [v] star", a purple one, beside other stars. Then it is treated against
artifacts. Is the purple star still there in unseen prompts?

Runs     for seeds 0 to 2, a LoRA of 150 updates, and two runs of diffdoctor.py treat that start
         from it, with gamma 0 and 0.25, 60 updates. Then 2 images of each of 30 unseen prompts,
         such as "a yellow circle above a [v] star", after 0, 30 and 60 updates. Guidance is 4.
Prints   a table as in diffdoctor_treatment.py, and "instance", the share of images with a purple
         star, by the oracle's nearest reading. The oracle reads "purple" where a prompt has "[v]".
Draws    diffdoctor_dreambooth.png: the six pictures; then a row each of images before DreamBooth,
         with "[v]" and with "purple", after it, and treated without and with the regularizer.
Took     one to six minutes per treated run on two CPU cores, like diffdoctor_treatment.py's.
"""

import numpy as np
import torch

from common import TOY, base_model, encode, generator, load_lora, load_model, make_scheduler
from common import make_trainable
from data.images import image_data
from data.prompts import condition, encode_once, read_prompts
from diffdoctor import offline_loss
from run_folder import generate, save_grid, to_pil
from toy.scenes import COLOURS, RELATIONS, SHAPES, parse_caption, render, sample_scene

from .diffdoctor_treatment import EACH, TreatmentJudges, notable_things
from .tools import CPU, SEEDS, mean, new_picture, shrink, together, train, write_lines
from .tools import write_prompts, write_table

INSTANCE = "a [v] star"  # the tokenizer does not know "[v]", and the LoRA learns it
LOOK = "purple"  # what "[v]" means
INSTANCE_UPDATES = 150
INSTANCE_LR = 3e-4
TREATED_UPDATES = 60
GAMMAS = (0, 0.25)
GUIDANCE_SCALE = 4
LORA_RANK = 8
SAMPLER = dict(
    scheduler="ddpm", eta=1.0, num_inference_steps=20, guidance_scale=GUIDANCE_SCALE
)


def dreambooth(out, jobs):
    prompts = unseen_prompts()
    write_prompts(out / "unseen.txt", prompts)
    write_prompts(out / "instance.txt", training_prompts())
    pictures = draw_instance()
    prior = other_stars()
    write_pictures(out / "pictures", pictures, prior)
    torch.set_num_threads(1)

    together(jobs, train_seed, [(out, pictures, prior, seed) for seed in SEEDS])
    rows = measure(out, prompts)
    write_table(out / "table.md", rows, 2)
    draw_rows(out, pictures)


# --------------------------------------------------------------------------------------------------
# Prompts and pictures


def named(prompt):
    """The prompt with the meaning of "[v]" in its place, which the oracle and the base can read."""
    return prompt.replace("[v]", LOOK)


def unseen_prompts():
    """30 prompts with the instance and one other thing."""
    others = [f"a {color} {shape}" for color in COLOURS for shape in SHAPES if shape != "star"]
    prompts = []
    for i, other in enumerate(others):
        relation = RELATIONS[i % 2]
        prompts.append(f"{INSTANCE} {relation} {other}")
        prompts.append(f"{other} {relation} {INSTANCE}")
    return prompts


def training_prompts():
    """The prompts of treating: half the instance, half other stars."""
    prompts = [prompt for prompt in read_prompts(TOY / "prompts_train.txt") if "star" in prompt]
    return [INSTANCE] * len(prompts) + prompts


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


def write_pictures(folder, pictures, prior):
    """Writes the regularizer's images: half of them the instance, half other stars."""
    repeats = len(prior) // len(pictures)
    images = [(picture, INSTANCE) for picture in pictures] * repeats + prior
    folder.mkdir(exist_ok=True)
    rows = []
    for i, (image, caption) in enumerate(images):
        name = f"{i:03d}.png"
        to_pil(image).save(folder / name)
        rows.append(dict(file_name=name, text=caption))
    write_lines(folder / "metadata.jsonl", rows)


# --------------------------------------------------------------------------------------------------
# Training


def train_seed(out, pictures, prior, seed):
    """Trains a seed's LoRA, and treats it with each gamma."""
    lora = out / f"instance_{seed}"
    if not (lora / "pytorch_lora_weights.safetensors").exists():
        learn_instance(lora, pictures, prior, seed)
    for gamma in GAMMAS:
        train(
            out, f"gamma_{gamma:g}_{seed}", "diffdoctor", "treat",
            "--grad_steps", 5, "--init_lora", lora, "--gamma", gamma,
            "--data", out / "pictures", "--prompts", out / "instance.txt",
            "--test_prompts", out / "unseen.txt", "--guidance_scale", GUIDANCE_SCALE,
            "--train_steps", TREATED_UPDATES, "--save_every", TREATED_UPDATES // 2,
            "--patience", TREATED_UPDATES, "--max_drift", 1e6, "--seed", seed,
        )


def learn_instance(folder, pictures, prior, seed):
    """DreamBooth with prior preservation: half of a batch is the instance, half other stars."""
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


# --------------------------------------------------------------------------------------------------
# Measuring


def snapshots_of(out, seed):
    """{name of a row: its LoRA}."""
    loras = {"DreamBooth": out / f"instance_{seed}"}
    for gamma in GAMMAS:
        run = out / f"gamma_{gamma:g}_{seed}"
        for step in (TREATED_UPDATES // 2, TREATED_UPDATES):
            name = f"treated, gamma {gamma:g}, {step} updates"
            loras[name] = run / "lora" / f"step_{step:06d}"
    return loras


def measure(out, prompts):
    """{name of a row: one dict per training seed}. What is measured stays in measured_SEED.pt."""
    named_prompts = [named(prompt) for prompt in prompts]
    model = load_model("toy", CPU)
    encode_once(model, prompts + named_prompts)
    judges = TreatmentJudges()
    rows = {}
    for seed in SEEDS:
        path = out / f"measured_{seed}.pt"
        if not path.exists():
            images = sample_rows(model, out, prompts, named_prompts, seed)
            measured = {}
            for name, x in images.items():
                row = judges(x, named_prompts, images["DreamBooth"])
                row["instance"] = share_with_instance(x)
                measured[name] = row
            torch.save((images, measured), path)
        _, measured = torch.load(path, weights_only=True)
        for name, row in measured.items():
            rows.setdefault(name, []).append(row)
    return rows


def sample_rows(model, out, prompts, named_prompts, seed):
    """{name of a row: its images (N, 3, 64, 64)}. The base model has rows with the first seed."""
    images = {}
    if seed == SEEDS[0]:
        with base_model(model):
            images["before DreamBooth"] = generate(model, prompts, 0, SAMPLER, EACH)
            name = f'before DreamBooth, "{LOOK}" for "[v]"'
            images[name] = generate(model, named_prompts, 0, SAMPLER, EACH)
    for name, lora in snapshots_of(out, seed).items():
        load_lora(model, lora)
        images[name] = generate(model, prompts, 0, SAMPLER, EACH)
    return images


def share_with_instance(images):
    """The share of images with a star of the instance's look, by the oracle's nearest reading."""
    (kind,), _ = parse_caption(named(INSTANCE))
    has_instance = []
    for image in images:
        has_instance.append(any(o["nearest"] == kind for o in notable_things(image)))
    return mean(has_instance)


def draw_rows(out, pictures):
    """Shows the six pictures, then a row of images per row of the table, without the 30 updates."""
    images, _ = torch.load(out / f"measured_{SEEDS[0]}.pt", weights_only=True)
    rows = []
    for name, x in images.items():
        if f"{TREATED_UPDATES // 2} updates" not in name:
            rows.append(x[:: 4 * EACH])
    columns = len(rows[0])
    blank = torch.ones(columns - len(pictures), 3, 64, 64)
    path = new_picture("diffdoctor_dreambooth.png")
    save_grid(torch.cat([torch.stack(pictures), blank, *rows]), path, columns=columns)
    shrink(path)
