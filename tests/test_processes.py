"""torchrun: several processes compute the numbers of one. Here two of them, on the CPU, by gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import combined_sample
import evaluate
import pytest
import refl
import run_folder
import torch
from conftest import ROOT, assert_same_run, commands_for_two, read_log, run_script
from conftest import training_commands
from PIL import Image, ImageChops

SUMS = {"imagerefl": "toy_pref=0.5,toy_clip", "dfusion_dpo": "toy_clip,toy_pref=0.5"}
TRAINING = ("refl", "imagerefl", "treat", "focus_n_fix", "dfusion_dpo")


def start_torchrun(script, *words):
    """Starts a script in two processes under torchrun -> the process of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # The -- keeps torchrun from taking our --start for a flag of its own.
    command += ["--", str(ROOT / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A folder with every run twice: made by one process (one/NAME) and by two (two/NAME)."""
    root = tmp_path_factory.mktemp("processes")
    torch.set_num_threads(1)
    commands = []
    for name, (module, words) in commands_for_two(world).items():
        if name in SUMS:
            words = [*words, "--reward", SUMS[name]]
        assert run_script(module, *words, "--out", root / "one" / name) == 0
        commands.append([module.__name__, [*words, "--out", root / "two" / name]])

    # A run that stops halfway, to be resumed by one process.
    words = [*halfway_words(world, root), "--train_steps", 2]
    commands.append(["refl", words])

    # The images of a run, and what they are like.
    lora = root / "one" / "refl"
    images = ["--lora", lora, "--mode", "aig", "--prompts", world.prompts, "--num_images", 2]
    judge = ["--metrics", "toy_pref,dino_div", "--dino", "toy"]
    for name in ("one", "two"):
        sampling = ["combined_sample", [*images, "--out", root / name / "images"]]
        judging = ["evaluate", [root / name / "images", *judge, "--out", root / name / "out.json"]]
        if name == "two":
            commands += [sampling, judging]
        else:
            assert run_script(combined_sample, *sampling[1]) == 0
            assert run_script(evaluate, *judging[1]) == 0

    path = root / "commands.json"
    words = [[name, [str(word) for word in words]] for name, words in commands]
    path.write_text(json.dumps(words))
    process = start_torchrun("tests/run_commands.py", path)
    output = process.communicate(timeout=600)
    assert process.returncode == 0, output
    statuses = json.loads(path.with_suffix(".done.json").read_text())
    assert statuses == [0] * len(commands), output
    return root


def halfway_words(world, root):
    """The flags of the run that two processes start and one process finishes."""
    _, words = commands_for_two(world)["refl"]
    return [*words, "--out", root / "two" / "half"]


@pytest.mark.parametrize("name", TRAINING)
def test_two_processes_train_as_one(runs, name):
    assert_same_run(runs / "one" / name, runs / "two" / name)
    # The parts of a sum are gathered as the sum is.
    assert ("reward_toy_pref" in read_log(runs / "two" / name)[0]) == (name in SUMS)


def test_one_process_resumes_what_two_started(runs, world):
    assert run_script(refl, *halfway_words(world, runs), "--resume") == 0
    assert_same_run(runs / "one" / "refl", runs / "two" / "half")


def test_two_processes_sample_and_judge_as_one(runs):
    files = sorted(path.name for path in (runs / "one" / "images").glob("[!.]*"))
    assert len(files) == 4 * 2 + 2
    for name in files:
        first = runs / "one" / "images" / name
        second = runs / "two" / "images" / name
        if name.endswith(".png"):
            difference = ImageChops.difference(Image.open(first), Image.open(second))
            assert max(high for _, high in difference.getextrema()) <= 1
        else:
            assert first.read_bytes() == second.read_bytes()

    results = json.loads((runs / "one" / "out.json").read_text())
    other = json.loads((runs / "two" / "out.json").read_text())
    (row,) = results["folders"].values()
    (other_row,) = other["folders"].values()
    for metric in ("toy_pref", "dino_div"):
        assert other_row[metric]["mean"] == pytest.approx(row[metric]["mean"], abs=1e-4)


def test_a_killed_process_ends_the_run(world):
    _, words = training_commands(world)["refl"]
    words = [*words, "--train_steps", 100_000, "--out", "run"]
    process = start_torchrun("refl.py", *words)
    deadline = time.time() + 240
    log = Path("run/log.jsonl")
    while not (log.is_file() and log.read_text()):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    # Only the main process prints. If it notices before torchrun ends it, it has one line to say.
    assert output.count("held-out toy_pref before") == 1
    assert str(ROOT / "refl.py") + '", line' not in errors


def test_a_lost_process_is_one_line(monkeypatch):
    def all_reduce(tensor):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:29500")

    monkeypatch.setattr(run_folder, "num_processes", lambda: 2)
    monkeypatch.setattr(run_folder.dist, "all_reduce", all_reduce)
    with pytest.raises(SystemExit) as stopped, run_folder.readable_errors(SimpleNamespace()):
        run_folder.wait_for_all()
    assert stopped.value.code == "\nanother process of this run has ended"


def test_more_processes_than_images_are_refused(monkeypatch):
    monkeypatch.setattr(run_folder, "num_processes", lambda: 3)
    with pytest.raises(SystemExit, match="3 processes, but only 2 images"):
        run_folder.own_part([0, 1])


@pytest.mark.parametrize("total", (3, 7, 8))
def test_parts_are_disjoint_and_complete(monkeypatch, total):
    monkeypatch.setattr(run_folder, "num_processes", lambda: 3)
    everything = []
    for number in range(3):
        monkeypatch.setattr(run_folder, "process_number", lambda number=number: number)
        everything += run_folder.own_part(list(range(total)))
    assert everything == list(range(total))
