"""DiffDoctor's section 4.3 on the toy world: a DreamBooth LoRA is treated."""
import json

import numpy as np
import torch

from common import (base_model, condition, encode, encode_once, generate, generator, load_lora, load_model, make_scheduler, read_prompts, save_grid,
                    save_weights, to_pil, trainable)
from diffdoctor import offline_loss
from prompts.coco import image_data
from toy import oracle
from toy.scenes import COLOURS, RELATIONS, SHAPES, parse_caption, render, sample_scene

from .diffdoctor import EACH, Treated
from .tools import ROOT, SEEDS, mean, prompt_file, shrink, table, together, train

INSTANCE, LOOK = "a [v] star", "purple"          # "[v]" is unknown to the tokenizer, and learns to be purple
INSTANCE_UPDATES, INSTANCE_LR, INSTANCE_TREATED, GAMMAS = 150, 3e-4, 60, (0, .25)
GUIDANCE = 4


def dreambooth(out, jobs):
    """DiffDoctor's section 4.3: a LoRA that has learned one thing from six pictures is treated; is the thing still there in unseen prompts?"""
    others = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES if shape != "star"]
    unseen = [f"{a} {RELATIONS[i % 2]} {b}" for i, o in enumerate(others) for a, b in ((INSTANCE, o), (o, INSTANCE))]
    classes = [p for p in read_prompts(ROOT / "toy" / "prompts_train.txt") if "star" in p]
    for name, prompts in dict(instance=[INSTANCE] * len(classes) + classes, unseen=unseen).items():
        prompt_file(out / f"{name}.txt", prompts)
    scenes = [sample_scene(np.random.default_rng([7, i]), INSTANCE.replace("[v]", LOOK)) for i in range(6)]
    pictures = [torch.from_numpy(render(s)[0]).permute(2, 0, 1) for s in scenes]
    prior = [(x, caption) for x, caption in image_data(ROOT / "toy" / "images", 64) if "star" in caption]
    folder, half = out / "pictures", [(x, INSTANCE) for x in pictures] * (len(prior) // len(pictures))      # of the regulariser: half of both
    folder.mkdir(exist_ok=True)
    lines = [dict(file_name=f"{i:03d}.png", text=caption) for i, (x, caption) in enumerate(half + prior)]
    for line, (x, _) in zip(lines, half + prior):
        to_pil(x).save(folder / line["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cpu, judges, plain = torch.device("cpu"), Treated(), [p.replace("[v]", LOOK) for p in unseen]
    sampler = dict(scheduler="ddpm", eta=1., num_inference_steps=20, guidance_scale=GUIDANCE)
    torch.set_num_threads(1)

    def learn(folder, seed):
        """DreamBooth with prior preservation: half of a batch the instance, half other stars."""
        model = load_model("toy", cpu)
        encode_once(model, [INSTANCE, *(caption for _, caption in prior)])
        optimizer, scheduler = torch.optim.AdamW(trainable(model, 8, seed), lr=INSTANCE_LR), make_scheduler(model, "ddpm", 20)
        for step in range(INSTANCE_UPDATES):
            draw = generator(seed, "dreambooth", step)
            batch = [(pictures[i], INSTANCE) for i in torch.randint(len(pictures), (4,), generator=draw)]
            images, captions = zip(*batch, *(prior[i] for i in torch.randint(len(prior), (4,), generator=draw)))
            x0 = encode(model, torch.stack(images))
            noise, t = torch.randn(x0.shape, generator=draw), torch.randint(1000, (len(x0),), generator=draw)
            offline_loss(model, scheduler, x0, noise, t, condition(model, list(captions))).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_weights(model, folder, 8)

    def instance(images):
        """The share of images with the instance: a star of its look, by the oracle's nearest reading."""
        kind = parse_caption(INSTANCE.replace("[v]", LOOK))[0][0]
        return mean(any(o["nearest"] == kind and o["area"] * oracle.SIZE ** 2 >= oracle.NOTABLE for o in oracle.read(x)) for x in images)

    def loras(seed):
        """{name of a row: its LoRA}"""
        found = {"DreamBooth": out / f"instance_{seed}"}
        for gamma in GAMMAS:
            for n in (INSTANCE_TREATED // 2, INSTANCE_TREATED):
                found[f"treated, gamma {gamma:g}, {n} updates"] = out / f"gamma_{gamma:g}_{seed}" / "lora" / f"step_{n:06d}"
        return found

    def one(seed):
        lora = out / f"instance_{seed}"
        if not (lora / "pytorch_lora_weights.safetensors").exists():
            learn(lora, seed)
        for gamma in GAMMAS:
            train(out, f"gamma_{gamma:g}_{seed}", "diffdoctor", "treat", "--grad_steps", 5, "--init_lora", lora, "--gamma", gamma, "--data",
                  out / "pictures", "--prompts", out / "instance.txt", "--test_prompts", out / "unseen.txt",
                  "--guidance_scale", GUIDANCE, "--train_steps", INSTANCE_TREATED, "--save_every", INSTANCE_TREATED // 2, "--patience", INSTANCE_TREATED, "--max_drift", 1e6, "--seed", seed)

    together(jobs, [lambda s=s: one(s) for s in SEEDS])
    model, rows = load_model("toy", cpu), {}
    encode_once(model, unseen + plain)
    trainable(model, 8)
    for seed in SEEDS:
        measured = out / f"measured_{seed}.pt"
        if not measured.exists():
            sets = {}
            if seed == SEEDS[0]:
                with base_model(model):
                    sets = {"before DreamBooth": generate(model, unseen, 0, sampler, EACH),
                            f'before DreamBooth, "{LOOK}" for "[v]"': generate(model, plain, 0, sampler, EACH)}
            for name, path in loras(seed).items():
                load_lora(model, path)
                sets[name] = generate(model, unseen, 0, sampler, EACH)
            torch.save((sets, {n: judges(x, plain, sets["DreamBooth"]) | dict(instance=instance(x)) for n, x in sets.items()}), measured)
        for name, row in torch.load(measured)[1].items():
            rows.setdefault(name, []).append(row)
    table(out / "table.md", rows, 2)
    shown = [images[::4 * EACH] for name, images in torch.load(out / f"measured_{SEEDS[0]}.pt")[0].items() if f"{INSTANCE_TREATED // 2} updates" not in name]
    save_grid(torch.cat([torch.stack(pictures), torch.ones(len(shown[0]) - 6, 3, 64, 64), *shown]), out / "dreambooth.png", columns=len(shown[0]))
    shrink(out / "dreambooth.png")
