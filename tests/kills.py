"""Kills training runs with SIGKILL at random moments, and compares what --resume makes of them with a run that nobody disturbed: weights, samples,
log without its times, checkpoint, bit for bit.

  $ python tests/kills.py --kills 20                            # every training script: a line each, "20 of 20 kills survived"
  $ python tests/kills.py --kills 20 --seed 1 refl treat

A run is a fork of this process, in which libraries, model, reward and detector are loaded already: seconds, not a minute. Half of the kills come at a
file operation in the run folder (the n-th one: files being opened, made, renamed, removed), half after a share of the run's time.
"""
import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffdoctor
import dfusion_dpo
import focus_n_fix
import imagerefl
import refl
import tiny
from common import TOY, launch, load_detector, load_model, load_reward

FILES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")        # audit events
SCRIPTS = dict(refl=refl, imagerefl=imagerefl, focus_n_fix=focus_n_fix, treat=diffdoctor, detector=diffdoctor, dfusion_dpo=dfusion_dpo)
PROMPTS = ["a red circle", "a blue square above a green circle", "a yellow triangle", "a purple square"]


def world(root):
    """Writes a tiny model, prompts and labels -> {script: its command line}. Four updates, a checkpoint every two."""
    model = tiny.write(root / "sd")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (root / "one.txt").write_text("a red star\n")
    rows = [dict(prompt="a red circle above a blue square", items=["circle", "blue square"], thresholds=[.08, .08])]
    (root / "items.json").write_text(json.dumps({"first": dict(train=rows, test=["a red star"])}))
    (root / "labelled" / "images").mkdir(parents=True), (root / "labelled" / "maps").mkdir()
    lines = []
    for i in range(6):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(root / "labelled" / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 2, (64, 64), np.uint8) * 255).save(root / "labelled" / "maps" / f"{i}.png")
        lines.append(dict(file_name=f"{i}.png", category="", split="test" if i > 3 else "train", source="human"))
    (root / "labelled" / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    prompts = ["--prompts", root / "prompts.txt", "--test_prompts", root / "one.txt"]
    every = ["--train_steps", 4, "--save_every", 2, "--device", "cpu"]
    common = ["--model", model, "--num_inference_steps", 4, "--lora_rank", 4, "--lr", 1e-3, *every]
    batch, data, judge = ["--batch_size", 2, "--micro_batch", 2], ["--data", TOY / "images"], ["--detector", TOY / "detector"]
    late = ["--first_mid", 2, "--last_mid", 3]
    return {name: [*map(str, words)] for name, words in dict(
        refl=[*common, *batch, *prompts, *late, "--reward", "toy_pref"],
        imagerefl=[*common, *batch, *prompts, *late, *data, "--start", 1, "--reward", "toy_pref"],
        focus_n_fix=[*common, *batch, *prompts, *judge, "--pool", 4, "--reward", "artifact"],
        treat=["treat", *common, *batch, *prompts, *judge, *data, "--max_drift", 99, "--patience", 99, "--reward", "toy_pref"],
        detector=["detector", "--data", root / "labelled", "--real", TOY / "images", "--batch_size", 4, *every],
        dfusion_dpo=[*common, "--images_per_prompt", 4, "--batch_size", 4, "--micro_batch", 4, "--save_every", 1, "--reward", "toy_clip",
                     "--prompts", root / "items.json"]).items()}


def loaded(module, words):
    """The script with its networks at hand: a fork has its own copy of them."""
    cpu, known = torch.device("cpu"), dict(zip(words, words[1:]))
    if "--model" in known:
        model = load_model(known["--model"], cpu)
        module.load_model = lambda *args, **kwargs: model
    if known.get("--reward", "artifact") != "artifact":
        reward = load_reward(known["--reward"], cpu)
        module.load_reward = lambda *args: reward
    if known.get("--detector"):
        detector = load_detector(known["--detector"], cpu)
        module.load_detector = lambda *args: detector
    return module


def fork(module, words, out, die_at=None, die_after=None):
    """Runs the command line in a fork -> (its exit status or -9, its number of file operations, None if it was killed). die_at: the fork kills
    itself at this file operation in `out`; die_after: it is killed after so many seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, count = 1, 0
        try:
            os.dup2(os.open(f"{out}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)

            def watch(event, args):
                nonlocal count
                if event in FILES and str(args[0]).startswith(str(out) + os.sep):
                    count += 1
                    if count == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(watch)
            torch.set_num_threads(1)
            sys.argv = [module.__file__, *words, "--out", str(out)]
            launch(module.parse_args, module.main)
            status = 0
        except SystemExit as e:
            status = e.code
        finally:
            os.write(write, str(count).encode())
            os._exit(status or 0)
    os.close(write)
    if die_after is not None and not select.select([read], [], [], die_after)[0]:
        os.kill(pid, signal.SIGKILL)
    count = os.read(read, 20)                                             # waits for the fork's end; empty if it was killed
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(count) if count else None


def result(out):
    """Everything in a finished run folder that must not depend on kills: {name: content}."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and not any(part.endswith(".tmp") for part in p.relative_to(out).parts)):
        name = str(path.relative_to(out))
        if name == "log.jsonl":
            found[name] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        elif name.endswith("state.pt"):
            found[name] = flat(torch.load(path, weights_only=True))
        elif name.endswith(".safetensors"):                               # its header has no order
            with safe_open(path, "pt") as f:
                found[name] = f.metadata(), flat({k: f.get_tensor(k) for k in f.keys()})
        else:
            found[name] = path.read_bytes()
    return found


def flat(x):
    """A checkpoint as something that == compares bit by bit."""
    if torch.is_tensor(x):
        return str(x.dtype), tuple(x.shape), x.contiguous().numpy().tobytes()
    return {k: flat(v) for k, v in x.items()} if isinstance(x, dict) else [flat(v) for v in x] if isinstance(x, (list, tuple)) else x


def survives(module, words, folder, kills, seed):
    """A run in `folder` killed `kills` times, then finished; when one ends before its kill, another begins -> (what differs from an undisturbed
    run, how many kills there were in all, how many of them while a checkpoint was written)."""
    draw, start = random.Random(seed), time.time()
    whole, out = folder / "whole", folder / "run_0"
    status, operations = fork(module, words, whole)
    seconds = time.time() - start
    assert status == 0, Path(f"{whole}.out").read_text()
    expected, done, saving, different = result(whole), 0, 0, set()
    while True:
        begun = (out / "config.json").is_file()
        moment = dict(die_at=draw.randint(1, operations)) if draw.random() < .5 else dict(die_after=draw.random() * seconds)
        status, _ = fork(module, [*words, "--resume"] if begun else words, out, **(moment if done < kills else {}))
        if status == -signal.SIGKILL:
            done, saving = done + 1, saving + (out / "new.tmp").exists()
            continue
        if status != 0:
            return {f"exit status {status}: {Path(f'{out}.out').read_text()[-1000:]}"}, done, saving
        got = result(out)
        different |= {name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)}
        if done >= kills:
            return different, done, saving
        out = folder / f"run_{int(out.name[4:]) + 1}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(SCRIPTS)} (all)")
    parser.add_argument("--kills", type=int, default=20, help="of each script (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        commands = world(Path(root))
        for name in args.scripts or SCRIPTS:
            (Path(root) / name).mkdir()
            different, done, saving = survives(loaded(SCRIPTS[name], commands[name]), commands[name], Path(root) / name, args.kills, args.seed)
            print(f"{name}: {done} kills, {saving} of them while saving: " + (f"DIFFERENT: {', '.join(different)}" if different else "survived"), flush=True)
