"""DiffDoctor on the toy world: the detectors' ladder and the treatment; dreambooth.py has the case of section 4.3."""
import contextlib
import json
import shutil
import zlib

import numpy as np
import torch
from PIL import Image

from common import base_model, encode_once, generate, load_detector, load_lora, load_model, save_grid, trainable
from diffdoctor import Labelled, detector_metrics, diagnose, overlay, read_labels
from toy import oracle
from toy.artifacts import corrupt
from toy.scenes import SHAPES, parse_caption, render, sample_scene

from .tools import ROOT, SEEDS, Judges, call, held_out_prompts, json_lines, mean, shrink, subplots, table, together, train

LADDER = dict(human=1500, photos=800, pool=2400, test=400)            # images; DiffDoctor's detector
DETECTOR_UPDATES = 1000
TREATED = {  # DiffDoctor's runs: model, measured after so many updates, flags
    "toy-flux, gamma 0": ("toy-flux", (40, 120, 240, 480, 720), "--gamma", 0, "--grad_steps", 1),
    "toy-flux, gamma .25": ("toy-flux", (40, 120, 240, 480, 720), "--gamma", .25, "--grad_steps", 1),
    "toy-flux, gamma 0, max pixel": ("toy-flux", (40, 120), "--gamma", 0, "--grad_steps", 1, "--pixels", "max"),
    "toy-flux, gamma 0, grad_steps 5": ("toy-flux", (40, 120, 240), "--gamma", 0, "--grad_steps", 5),
    "toy, gamma 0": ("toy", (20, 40), "--gamma", 0, "--grad_steps", 1),
    "toy, gamma .25": ("toy", (20, 40), "--gamma", .25, "--grad_steps", 1),
    "toy, gamma 0, grad_steps 5": ("toy", (20, 60, 120, 240), "--gamma", 0, "--grad_steps", 5),
    "toy, gamma .25, grad_steps 5": ("toy", (20, 60, 120, 240), "--gamma", .25, "--grad_steps", 5)}
SHOWN = {  # columns of the pictures, each with its overlay, after the images before
    "toy-flux": [("toy-flux, gamma 0, grad_steps 5", 240), *((f"toy-flux, gamma {g}", n) for n in (120, 720) for g in ("0", ".25"))],
    "toy": [(f"toy, gamma {g}, grad_steps 5", n) for n in (60, 240) for g in ("0", ".25")]}
EACH = 2                                         # images per held-out prompt


def labelled_scenes(folder, count, star, other):
    """`count` scenes of at most one star as a labelled folder, whose images/ is an imagefolder with categories too. `star` and `other`: the shares of
    scenes with and without one that hold a mistake, in the star if there is one. All but photographs bear a generator's marks (oracle.degrade)."""
    if (folder / "meta.jsonl").exists():
        return folder
    for part in ("images", "maps"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        rng, shapes = np.random.default_rng([zlib.crc32(folder.name.encode()), i]), ["star"] * 2
        while shapes.count("star") > 1:
            scene = sample_scene(rng)
            shapes = [o["shape"] for o in scene["objects"]]
        (image, coverage), confidence, category = render(scene), np.zeros((64, 64)), "star" if "star" in shapes else shapes[0]
        if rng.random() < (star if category == "star" else other):
            spot = coverage[shapes.index("star")] if category == "star" else 0 * coverage[0]
            while not confidence.any() or (confidence * spot).sum() < .2 * spot.sum():
                image, confidence = corrupt(scene, rng)
        if folder.name != "photos":
            image = oracle.degrade(image, rng)
        rows.append(dict(file_name=f"{i:05d}.png", text=scene["caption"], category=category, source="human",
                         split="test" if folder.name == "test" else "train"))
        for part, pixels in (("images", image), ("maps", confidence)):
            Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(folder / part / rows[-1]["file_name"])
    for path in (folder / "images" / "metadata.jsonl", folder / "meta.jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def ladder(out, jobs):
    """DiffDoctor's Table 1: what each kind of data adds to a detector whose first labels know no well-formed star."""
    data = {name: labelled_scenes(out / "data" / name, n, *dict(human=(1, .3), photos=(0, 0)).get(name, (.5, .5))) for name, n in LADDER.items()}
    photos, pool = data["photos"] / "images", data["pool"] / "images"
    test, results, named, cpu = Labelled(read_labels([data["test"]], [photos]), 64), {}, {}, torch.device("cpu")
    fine = [row for row in test.rows if row["source"] == "human" and not np.asarray(Image.open(row["map"])).any()]

    def one(seed):
        at, results[seed] = out / f"ladder_{seed}", {}

        def detector(name, *folders, real=True):
            run = at / name.replace(" ", "_")
            folder, metrics = run / "model" / "detector", run / "metrics.json"
            if not (folder / "model.safetensors").exists():
                shutil.rmtree(run, ignore_errors=True)
                call(out, f"{name}_{seed}", "diffdoctor", "detector", "--data", *folders, *(["--real", photos] if real else []), "--seed", seed,
                     "--train_steps", DETECTOR_UPDATES, "--save_every", DETECTOR_UPDATES, "--out", run)
            if not metrics.exists():
                found = load_detector(folder, cpu)
                means = [(r["category"] == "star", m.mean().item()) for r, m in diagnose(found, fine, cpu)]
                row = detector_metrics(found, test, cpu)[0]
                row |= {f"{k} without a mistake": 100 * mean(m for s, m in means if s == (k == "stars")) for k in ("stars", "others")}
                metrics.write_text(json.dumps(row) + "\n")
            results[seed][name] = json.loads(metrics.read_text())
            return folder

        def step(command, folder, *words):
            done = folder / ("scores.jsonl" if command == "score" else "meta.jsonl")
            if command != "import_labels" and not done.exists():
                shutil.rmtree(folder, ignore_errors=True)                 # killed half-way
            call(out, f"{command}_{seed}_{folder.name}", "diffdoctor", command, *words, "--out", folder, done=done)
        zeroth, first = detector("previous labels", data["human"], real=False), detector("+ photographs", data["human"])
        for name, detected in (("previous", zeroth), ("photographs", first)):
            step("score", at / f"scores_{name}", "--detector", detected, "--images", pool)
            scores = json_lines(at / f"scores_{name}" / "scores.jsonl")
            means = {c: mean(r["mean"] for r in scores if r["category"] == c) for c in SHAPES}
            named[seed, name] = ", ".join({r["category"] for r in scores if r["abnormal"]}) or "none", means["star"] / sorted(means.values())[1]
        step("export_hard", at / "hard", "--detector", first, "--images", pool, "--scores", at / "scores_photographs", "--categories", "star",
             "--max_images", 400)
        for row in json_lines(at / "hard" / "meta.jsonl"):              # the person, who knows the truth
            shutil.copy(data["pool"] / "maps" / row["original"], at / "hard" / "maps" / row["file_name"])
        step("import_labels", at / "labelled", "--labels", at / "hard")
        second = detector("+ hard cases", data["human"], at / "labelled")
        step("pseudo", at / "pseudo", "--detector", second, "--images", pool, "--exclude", at / "hard")
        detector("+ pseudo labels", data["human"], at / "labelled", at / "pseudo")

    together(jobs, [lambda s=s: one(s) for s in SEEDS])
    head = [f"abnormal, by the detector of {n}: " + "; ".join(f"{named[s, n][0]} (stars {named[s, n][1]:.2f} times the median)" for s in SEEDS)
            for n in ("previous", "photographs")]
    table(out / "ladder.md", {name: [results[s][name] for s in SEEDS] for name in results[SEEDS[0]]}, head=[*head, ""])


class Treated(Judges):
    """With the detectors' confidence in percent, and what the oracle counts; before: the images of equal seeds."""

    def __init__(self):
        super().__init__()
        self.detectors = {name: load_detector(ROOT / "toy" / name, torch.device("cpu")) for name in ("detector", "detector_b")}

    @torch.no_grad()
    def __call__(self, images, prompts, before):
        row = {}
        for name, detector in self.detectors.items():
            maps = torch.cat([detector(part) for part in images.split(32)])
            row |= {f"{name} mean": 100 * maps.mean().item(), f"{name} max": 100 * maps.flatten(1).amax(1).mean().item()}
        things = [[o for o in oracle.read(x) if o["area"] * oracle.SIZE ** 2 >= oracle.NOTABLE] for x in images]
        wanted = [len(parse_caption(p)[0]) for p in prompts for _ in range(EACH)]
        return row | super().__call__(images, prompts, EACH) | {
            "too few": mean(len(t) < n for t, n in zip(things, wanted)), "too many": mean(len(t) > n for t, n in zip(things, wanted)),
            "area": 100 * mean(sum(o["area"] for o in t) for t in things),
            "drift": ((images - before).abs().mean() / (before - before.roll(1, 0)).abs().mean()).item()}


def grain(images):
    """What no judge here sees: root mean square of the background's deviation from a smooth surface, in percent."""
    rows = []
    for image in map(oracle.to_array, images):
        background = oracle.background_of(image)
        rest = ~oracle.grow(oracle.segment(image, background) > 0, 3)
        rows.append(100 * ((image - background)[rest] ** 2).mean() ** .5)
    return mean(rows)


def treated(out, jobs):
    """DiffDoctor's Table 2 and Figures 4 and 5: artifacts for both detectors, captions and quality over long training."""
    prompts, judges, models, results = held_out_prompts(out).read_text().splitlines(), Treated(), {}, {}
    (out / "measured").mkdir(exist_ok=True)

    def run_of(name, seed):
        return out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"

    def measured(name, seed, step):
        """Images of a snapshot and what the judges say, made once."""
        run, kind = run_of(name, seed), TREATED[name][0]
        path = out / "measured" / (f"{run.name}_{step:06d}.pt" if step else f"{kind}_before.pt")
        if not path.exists():
            if kind not in models:
                models[kind] = load_model(kind, torch.device("cpu"))
                encode_once(models[kind], prompts)
                trainable(models[kind], 8)
            if step:
                load_lora(models[kind], run / "lora" / f"step_{step:06d}")
            with contextlib.nullcontext() if step else base_model(models[kind]):
                images = generate(models[kind], prompts, 0, json.loads((run / "config.json").read_text())["sampler"], EACH)
            torch.save((images, judges(images, prompts, measured(name, seed, 0)[0] if step else images)), path)
        return torch.load(path)

    def trained(name, seed):
        kind, steps, *words = TREATED[name]
        train(out, run_of(name, seed).name, "diffdoctor", "treat", "--model", kind, "--seed", seed, "--train_steps", steps[-1],
              "--save_every", steps[0], "--patience", steps[-1], "--max_drift", 1e6, *words)

    together(jobs, [lambda n=n, s=s: trained(n, s) for n in TREATED for s in SEEDS])
    torch.set_num_threads(1)
    rows = {}
    for name, (kind, steps, *_) in TREATED.items():                    # one at a time: models and judges are shared
        for seed in SEEDS:
            each = {step: measured(name, seed, step) for step in (0, *steps)}
            results[name, seed] = {step: r | {"mean / area": r["detector mean"] / max(r["area"], .1), "grain": grain(x)} for step, (x, r) in each.items()}
        rows[f"{kind}, before"] = [results[name, SEEDS[0]][0]]
        for step in steps:
            rows[f"{name}: {step} updates"] = [results[name, s][step] for s in SEEDS]
    table(out / "treated.md", rows, 2)

    shown = ("detector mean", "detector_b mean", "toy_correct", "too few", "grain", "drift")
    figure, axes = subplots(2, len(shown), 3, 2.5)
    for row, kind in zip(axes, ("toy-flux", "toy")):
        for axis, field in zip(row, shown):
            for name, colour in zip([n for n in TREATED if TREATED[n][0] == kind], ("tab:red", "tab:blue", "tab:green", "tab:orange")):
                for s in SEEDS:
                    label, curve = name.removeprefix(f"{kind}, ") if s == SEEDS[0] else None, results[name, s]
                    axis.plot(list(curve), [r[field] for r in curve.values()], color=colour, alpha=.7, label=label)
            axis.set(title=field + ", %" * ("detector" in field), xlabel=f"updates of {kind}")
        row[0].legend(fontsize=7)
    figure.savefig(out / "over_updates.png", dpi=70)
    for kind, columns in SHOWN.items():
        sets = [measured(n, SEEDS[0], step)[0][::4 * EACH] for n, step in ((columns[0][0], 0), *columns)]         # one image of every fourth prompt
        sets = [x for images in sets for x in (images, overlay(images, judges.detectors["detector"](images)))]
        save_grid(torch.stack([x for row in zip(*sets) for x in row]), out / f"treated_{kind}.png", columns=len(sets))
    for path in out.glob("*.png"):
        shrink(path)


def diffdoctor(out, jobs):
    """The detectors' ladder and the treatment."""
    ladder(out, jobs)
    treated(out, jobs)
