"""What the experiments share: runs of the repository's scripts that are not done twice, judges, tables and plots."""
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import torch
from PIL import Image

from common import load_reward, read_prompts
from evaluate import Dino
from toy import oracle

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = (0, 1, 2)
PROMPTS, IMAGES = 40, 8


def call(out, name, script, *words, done=None):
    """Runs one of the repository's scripts unless `done` exists; its output goes to out/logs."""
    if done and done.exists():
        return
    log = out / "logs" / f"{script}_{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as f:
        code = subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, words)], stdout=f, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code:
        raise SystemExit(f"{script}.py {' '.join(map(str, words))} ended with {code}: see {log}")


def together(jobs, calls):
    """Runs thunks, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        for result in [pool.submit(c) for c in calls]:
            result.result()


def prompt_file(path, prompts):
    """Written once: another job may be reading it."""
    text = "\n".join(prompts) + "\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def held_out_prompts(out):
    return prompt_file(out / "prompts.txt", read_prompts(ROOT / "toy" / "prompts_test.txt")[:PROMPTS])


def images(out, name, *words, prompts=None, num_images=IMAGES):
    """Images of one row of a table, of held-out prompts unless said otherwise; returns their folder."""
    folder = out / "images" / name
    if not (folder / "metadata.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)                         # killed while it was sampled
    call(out, name, "combined_sample", *words, "--prompts", prompts or held_out_prompts(out), "--num_images", num_images, "--out", folder,
         done=folder / "metadata.jsonl")
    return folder


def train(out, name, script, *words):
    """One training run, continued if it was cut off, made anew if a number among its flags is another now; returns its folder."""
    run = out / name
    config = json.loads((run / "config.json").read_text()) if (run / "config.json").exists() else {}
    other = any(config.get(flag[2:]) != value for flag, value in zip(words, words[1:]) if isinstance(value, (int, float)))
    if other or not (run / "checkpoint" / "state.pt").exists():
        shutil.rmtree(run, ignore_errors=True)                            # or killed before its first snapshot
        config = {}
    if not config or not (run / "lora" / f"step_{config['train_steps']:06d}").exists():
        call(out, name, script, *words, "--out", run, *(["--resume"] if config else []))
    return run


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Judges:
    """Means over images (N, 3, H, W) of `prompts`, `each` of every one, in a row: what nothing is trained on."""

    def __init__(self):
        cpu = torch.device("cpu")
        self.pref, self.dino = load_reward(f"toy_pref:{ROOT / 'toy' / 'pref_b'}", cpu)[0], Dino(ROOT / "toy" / "dino", cpu)

    @torch.no_grad()
    def __call__(self, images, prompts, each):
        prompts, parts = [p for p in prompts for _ in range(each)], [slice(i, i + 32) for i in range(0, len(images), 32)]
        features = torch.cat([self.dino(images[p]) for p in parts]).unflatten(0, (-1, each))
        return dict(toy_correct=mean(oracle.correct(x, p) is True for x, p in zip(images, prompts)),
                    recognised=mean(oracle.recognised(x, p) for x, p in zip(images, prompts)),
                    toy_pref_b=torch.cat([self.pref(images[p], prompts[p]) for p in parts]).mean().item(),
                    dino_div=((1 - features @ features.mT).sum((1, 2)) / (each * (each - 1))).mean().item())


def mean(values):
    return statistics.mean(map(float, values))


def cell(values, digits=3, sign=""):
    """The mean over seeds, and behind the sign their standard deviation."""
    return f"{mean(values):{sign}.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(path, rows, digits=3, head=()):
    """rows: {name: a dict field -> value for each seed}; a markdown table, printed and written, and the rows beside it as JSON."""
    fields = list(next(iter(rows.values()))[0])
    lines = [*head, "| | " + " | ".join(fields) + " |", "|---|" + "---|" * len(fields)]
    lines += [f"| {name} | " + " | ".join(cell([row[f] for row in of], digits) for f in fields) + " |" for name, of in rows.items()]
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines), flush=True)


def subplots(rows, columns, width, height, **kwargs):
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), constrained_layout=True, **kwargs)


def shrink(path):
    """A PNG of 256 colours in its place."""
    Image.open(path).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)
