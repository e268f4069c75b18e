"""Kills training runs with SIGKILL at random moments, and compares what --resume makes of them with
a run that nobody disturbed: weights, samples, log without its times and checkpoint, bit for bit.

  $ python tests/kills.py --kills 20                 # every training script, one line each
  $ python tests/kills.py --kills 20 --seed 1 refl treat

A run is a fork of this process, in which libraries, model and judges are loaded already, so it
takes seconds. Half of the kills come at the n-th file operation in the run folder, while files are
opened, made, renamed or removed. The other half come after a random share of the run's time.
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

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import SCRIPTS_THAT_TRAIN, make_world, run_script, training_commands

FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")  # audit events


def preload(module, words):
    """Loads the model and the judges of a command line once, for all forks: each gets a copy."""
    cpu = torch.device("cpu")
    flags = dict(zip(words, words[1:]))
    for flag, name in (
        ("--model", "load_model"),
        ("--reward", "load_reward"),
        ("--detector", "load_detector"),
    ):
        if flags.get(flag, "artifact") == "artifact":
            continue
        loaded = getattr(module, name)(str(flags[flag]), cpu)

        def give_loaded(*args, loaded=loaded, **kwargs):
            return loaded

        setattr(module, name, give_loaded)


def run_in_fork(module, words, out, die_at=None, die_after=None):
    """Runs a command line in a fork.

    die_at: the fork kills itself at this file operation in `out`. die_after: we kill it after so
    many seconds. -> (exit status, or -9 if it was killed; its number of file operations, or None)
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0

        def watch(event, args):
            nonlocal count
            if event in FILE_OPERATIONS and str(args[0]).startswith(str(out) + os.sep):
                count += 1
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        # What the fork prints goes to a file beside the run.
        printed = os.open(f"{out}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        torch.set_num_threads(1)
        sys.addaudithook(watch)
        status = 1
        try:
            status = run_script(module, *words, "--out", out)
        finally:
            os.write(write_end, str(count).encode())
            os._exit(status if isinstance(status, int) else 1)
    os.close(write_end)
    if die_after is not None:
        ended, _, _ = select.select([read_end], [], [], die_after)
        if not ended:
            os.kill(pid, signal.SIGKILL)
    count = os.read(read_end, 20)  # waits for the end of the fork; empty if it was killed
    os.close(read_end)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(count) if count else None


def result(run):
    """Everything in a finished run folder that a kill must not change: {name: content}."""
    found = {}
    for path in sorted(Path(run).rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or ".tmp" in name:
            continue
        if name == "log.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                row.pop("seconds")
            found[name] = rows
        elif path.suffix == ".pt":
            found[name] = as_bytes(torch.load(path, weights_only=True))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                found[name] = (file.metadata(), as_bytes(tensors))
        else:
            found[name] = path.read_bytes()
    return found


def as_bytes(value):
    """A checkpoint as something that == compares bit by bit."""
    if torch.is_tensor(value):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(part) for part in value]
    return value


def survive(module, words, folder, kills, seed):
    """Kills a run in `folder` this often, then finishes it; begins another when one ends early.

    -> (what differs from an undisturbed run, number of kills, those while a checkpoint was saved)
    """
    draw = random.Random(seed)
    started = time.time()
    status, operations = run_in_fork(module, words, folder / "whole")
    seconds = time.time() - started
    assert status == 0, Path(f"{folder / 'whole'}.out").read_text()
    expected = result(folder / "whole")

    number, done, while_saving = 0, 0, 0
    different = set()
    while True:
        out = folder / f"run_{number}"
        has_begun = (out / "config.json").is_file()
        moment = {}
        if done < kills:
            if draw.random() < 0.5:
                moment = dict(die_at=draw.randint(1, operations))
            else:
                moment = dict(die_after=draw.random() * seconds)
        again = [*words, "--resume"] if has_begun else words
        status, _ = run_in_fork(module, again, out, **moment)
        if status == -signal.SIGKILL:
            done += 1
            while_saving += (out / "new.tmp").exists()
            continue
        if status != 0:
            return {f"exit status {status}: {Path(f'{out}.out').read_text()[-1000:]}"}, done, 0
        got = result(out)
        for name in expected.keys() | got.keys():
            if expected.get(name) != got.get(name):
                different.add(name)
        if done >= kills:
            return different, done, while_saving
        number += 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", help=f"of {', '.join(SCRIPTS_THAT_TRAIN)}; all")
    parser.add_argument("--kills", type=int, default=20, help="kills of each script (20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments (0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        commands = training_commands(make_world(Path(root)))
        for name in args.scripts or SCRIPTS_THAT_TRAIN:
            module, words = commands[name]
            preload(module, words)
            folder = Path(root) / name
            folder.mkdir()
            different, done, while_saving = survive(module, words, folder, args.kills, args.seed)
            verdict = f"DIFFERENT: {', '.join(different)}" if different else "survived"
            print(f"{name}: {done} kills, {while_saving} while saving: {verdict}", flush=True)


if __name__ == "__main__":
    main()
