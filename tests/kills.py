"""Kills training runs with SIGKILL at random moments, and compares what --resume makes of them with
a run that nobody disturbed: weights, samples, log without its times and checkpoint, bit for bit.

  $ python tests/kills.py --kills 20                 # every training script, one line each
  $ python tests/kills.py --kills 20 --seed 1 refl treat
  $ python tests/kills.py --kills 20 --processes 2                  # as under torchrun
  $ python tests/kills.py --kills 20 --processes 2 --resume_with 1

A run is a fork of this process, in which libraries, model and judges are loaded already, so it
takes seconds. Half of the kills come at the n-th file operation in the run folder, while files are
opened, made, renamed or removed. The other half come after a random share of the run's time. After
every kill, all files but the log must be whole.

With --processes 2, a run is two forks that work together like processes of torchrun, on gloo. Half
of the kills hit both, and the others hit one. A run that one process resumes then equals the
undisturbed run as closely as tests/test_processes.py demands.
"""

import argparse
import json
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import SCRIPTS_THAT_TRAIN, assert_same_run, commands_for_two, make_world, run_script
from conftest import training_commands

from run_folder import joined_processes

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


def start_fork(module, words, out, number, processes, port, die_at):
    """Starts a command line in a fork, as process `number` of `processes` -> its pid and a pipe.

    When the fork ends, the pipe has its number of file operations in `out`, or nothing if it was
    killed. With die_at, it kills itself at that operation.
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
        if processes > 1:
            # What torchrun tells its processes.
            os.environ.update(WORLD_SIZE=str(processes), RANK=str(number), LOCAL_RANK=str(number))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        status = 1
        try:
            with joined_processes(SimpleNamespace(device="cpu")):
                status = run_script(module, *words, "--out", out)
        finally:
            os.write(write_end, str(count).encode())
            os._exit(status if isinstance(status, int) else 1)
    os.close(write_end)
    return pid, read_end


def run_in_forks(
    module, words, out, processes=1, die_at=None, die_after=None, victim=0, together=True
):
    """Runs a command line in one fork, or in several that work together as under torchrun.

    die_at: process 0, which writes all files, kills itself at this file operation in `out`.
    die_after: we kill process `victim` after so many seconds. together: then we kill the others as
    well. If not, they have ten seconds to notice. -> (exit status, or -9 if one was killed; the
    number of file operations of process 0, or None)
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    forks = []
    for number in range(processes):
        at = die_at if number == 0 else None
        forks.append(start_fork(module, words, out, number, processes, port, at))
    pids = [pid for pid, _ in forks]
    pipes = [pipe for _, pipe in forks]
    if die_after is not None:
        ended, _, _ = select.select(pipes, [], [], die_after)
        if not ended:
            os.kill(pids[victim], signal.SIGKILL)

    # Wait until one has ended, and then for the others. If it was killed, its pipe is empty.
    ended, _, _ = select.select(pipes, [], [])
    counts = {pipe: os.read(pipe, 20) for pipe in ended}
    was_killed = not all(counts.values())
    for pid, pipe in forks:
        if pipe in counts:
            continue
        if was_killed:
            noticed, _, _ = select.select([pipe], [], [], 0 if together else 10)
            if not noticed:
                os.kill(pid, signal.SIGKILL)
        counts[pipe] = os.read(pipe, 20)
    for pipe in pipes:
        os.close(pipe)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    status = -signal.SIGKILL if -signal.SIGKILL in statuses else max(statuses, key=abs)
    count = counts[pipes[0]]
    return status, int(count) if count else None


def half_written(run):
    """The names of the files in a run folder that cannot be read to their end."""
    unreadable = []
    for path in sorted(Path(run).rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or ".tmp" in name:
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".html":
                assert path.read_text().endswith("</html>\n")
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".pt":
                torch.load(path, weights_only=True)
        except Exception as error:
            unreadable.append(f"{name} is half-written ({error!r})")
    return unreadable


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


def differences(run, whole, exact):
    """The names of what differs between two finished run folders.

    exact: every bit counts. If not, logs and weights may differ as those of different numbers of
    processes do, and of the other files only the names count.
    """
    got = result(run)
    expected = result(whole)
    if exact:
        names = expected.keys() | got.keys()
        return {name for name in names if expected.get(name) != got.get(name)}
    different = set(expected.keys() ^ got.keys())
    try:
        assert_same_run(whole, run)
    except AssertionError as error:
        different.add(str(error))
    return different


def survive(module, words, folder, kills, seed, processes=1, resume_with=None):
    """Kills a run in `folder` this often, then finishes it; begins another when one ends early.

    processes: how many start each run. resume_with: how many resume it; by default as many.
    -> (what differs from an undisturbed run, number of kills, those while a checkpoint was saved)
    """
    draw = random.Random(seed)
    resume_with = resume_with or processes
    started = time.time()
    status, operations = run_in_forks(module, words, folder / "whole", processes)
    seconds = time.time() - started
    assert status == 0, Path(f"{folder / 'whole'}.out").read_text()

    number, done, while_saving = 0, 0, 0
    different = set()
    while True:
        out = folder / f"run_{number}"
        has_begun = (out / "config.json").is_file()
        again = [*words, "--resume"] if has_begun else words
        count = resume_with if has_begun else processes
        moment = {}
        if done < kills:
            if draw.random() < 0.5:
                moment = dict(die_at=draw.randint(1, operations))
            else:
                moment = dict(die_after=draw.random() * seconds, victim=draw.randrange(count))
            moment["together"] = draw.random() < 0.5
        status, _ = run_in_forks(module, again, out, count, **moment)
        different.update(half_written(out))
        if status == -signal.SIGKILL:
            done += 1
            while_saving += (out / "new.tmp").exists()
            continue
        if status != 0:
            return {f"exit status {status}: {Path(f'{out}.out').read_text()[-1000:]}"}, done, 0
        different |= differences(out, folder / "whole", exact=resume_with == processes)
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
    parser.add_argument("--processes", type=int, default=1, help="processes of a run: 1 or 2 (1)")
    parser.add_argument("--resume_with", type=int, help="processes after a kill (--processes)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        world = make_world(Path(root))
        commands = training_commands(world)
        if args.processes > 1:
            commands = commands_for_two(world)
        for name in args.scripts or commands:
            module, words = commands[name]
            preload(module, words)
            folder = Path(root) / name
            folder.mkdir()
            different, done, while_saving = survive(
                module, words, folder, args.kills, args.seed, args.processes, args.resume_with
            )
            verdict = f"DIFFERENT: {', '.join(different)}" if different else "survived"
            print(f"{name}: {done} kills, {while_saving} while saving: {verdict}", flush=True)


if __name__ == "__main__":
    main()
