"""What may happen to a run, and what may be given to it: kills, full disks, NaN, bad files. tests/kills.py kills more often."""
import errno
import json
import math
import os
import resource
import signal
import sys
from pathlib import Path

import kills
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import combined_sample
import common
import diffdoctor
import dfusion_dpo
import evaluate
import focus_n_fix
import imagerefl
import refl
from common import TOY, launch

SCRIPTS = kills.SCRIPTS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, {script: a command line that works})"""
    root = tmp_path_factory.mktemp("hardening")
    return root, kills.world(root)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, module, words, out=None):
    """A command line in this process -> its exit status."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words), *(["--out", str(out)] if out else [])])
    try:
        launch(module.parse_args, module.main)
    except SystemExit as e:
        return e.code
    return 0


def said(capsys):
    """What a command said on stderr, without progress bars: tqdm clears a bar with blanks between carriage returns."""
    lines = [line.split("\r")[-1] for line in capsys.readouterr().err.split("\n")]
    return [line for line in lines if line.startswith(("error", "interrupted", "update", "Traceback"))]


def put(words, *changes):
    """A command line with some flags' values replaced or added."""
    words = list(words)
    for flag, value in zip(changes[::2], changes[1::2]):
        if flag in words:
            words[words.index(flag) + 1] = str(value)
        else:
            words += [flag, str(value)]
    return words


# ------------------------------------------------------------------------------------------------------------------------------------
# kills, disks, Ctrl-C, memory


@pytest.mark.filterwarnings("ignore:This process.*fork")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_ends_as_if_nothing_had_happened(world, tmp_path, monkeypatch, script):
    module, words = SCRIPTS[script], world[1][script]
    for name in ("load_model", "load_reward", "load_detector"):           # put back afterwards
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(module, name))
    different, done, _ = kills.survives(kills.loaded(module, words), words, tmp_path, 3, seed=1)
    assert not different and done == 3


def test_a_disk_that_fills_up(world, tmp_path, monkeypatch, capsys):
    """Files may grow to one byte less than each that the run writes: it stops with one line, and what was saved is as it was."""
    words = world[1]["refl"]
    assert run(monkeypatch, refl, words, tmp_path / "whole") == 0
    expected, out = kills.result(tmp_path / "whole"), tmp_path / "run"
    assert run(monkeypatch, refl, put(words, "--train_steps", 2), out) == 0
    before = (out / "checkpoint" / "state.pt").read_bytes()
    sizes = {name: (tmp_path / "whole" / name).stat().st_size for name in ("config.json", "samples/step_000004.png", "checkpoint/state.pt",
                                                                           "lora/pytorch_lora_weights.safetensors")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, size in sizes.items():
        said(capsys)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))       # Python ignores the signal, so write() fails
        try:
            assert run(monkeypatch, refl, [*words, "--resume"], out) == 2, name
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (line,) = said(capsys)
        assert "too large" in line and "checkpoint is whole" in line and "--resume" in line
        assert (out / "checkpoint" / "state.pt").read_bytes() == before
    assert run(monkeypatch, refl, [*words, "--resume"], out) == 0 and kills.result(out) == expected


def test_an_output_that_cannot_be_written(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for script, module in SCRIPTS.items():
        assert run(monkeypatch, module, world[1][script], tmp_path / "file" / "run") == 2
        (line,) = said(capsys)
        assert "Not a directory" in line and str(tmp_path) in line

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")
    monkeypatch.setattr(common.coco, "write", refuse)
    assert run(monkeypatch, refl, world[1]["refl"], tmp_path / "run") == 2 and said(capsys) == ["error: somewhere: Read-only file system"]


def test_ctrl_c(world, tmp_path, monkeypatch, capsys):
    words, calls, step = world[1]["refl"], [], refl.refl_step
    assert run(monkeypatch, refl, words, tmp_path / "whole") == 0

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args)
    monkeypatch.setattr(refl, "refl_step", interrupted)
    assert run(monkeypatch, refl, words, tmp_path / "run") == 130
    (line,) = said(capsys)
    assert line.startswith("interrupted") and "checkpoint is whole" in line and "--resume" in line
    assert run(monkeypatch, refl, [*words, "--resume"], tmp_path / "run") == 0
    assert kills.result(tmp_path / "run") == kills.result(tmp_path / "whole")


def test_a_gpu_without_memory(world, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.02 GiB "
                                          "is free. Including non-PyTorch memory, this process has 22.60 GiB memory in use. Of the allocated memory")
    monkeypatch.setattr(refl, "refl_step", full)
    assert run(monkeypatch, refl, world[1]["refl"], tmp_path / "run") == 2
    (line,) = said(capsys)
    assert "Tried to allocate 2.50 GiB" in line and "1.02 GiB is free" in line and "Including" not in line
    order = [line.index(f"--{name}") for name in ("micro_batch (now 2)", "checkpointing (now False)", "batch_size (now 2)", "resolution (now 16)")]
    assert order == sorted(order)


# ------------------------------------------------------------------------------------------------------------------------------------
# NaN and Inf


def poisoned(monkeypatch, module, phase, bad):
    """From now on the phase puts out NaN (the denoiser: Inf) in the updates of `bad` -> a list that gets the trained weights at the end of each one."""
    seen, now = [], {"step": 1}
    skips, load_model, load_detector = common.Run.skips, module.load_model, getattr(module, "load_detector", None)

    def watched(self, step, *args):
        try:
            return skips(self, step, *args)
        finally:
            now["step"] = step + 1
            seen.append([p.detach().clone() for p in self.model.denoiser.parameters() if p.requires_grad])

    def hook(value, name):
        def forward(m, i, out):
            x = getattr(out, "sample", out)
            if now["step"] in bad and name == "backward pass" and x.requires_grad:
                x.register_hook(lambda g: g * value)
            elif now["step"] in bad and name != "backward pass":
                out = type(out)(sample=x * value) if hasattr(out, "sample") else x * value
            return out
        return forward

    def model(*args, **kwargs):
        model = load_model(*args, **kwargs)
        if phase in ("denoiser", "backward pass"):
            model.denoiser.register_forward_hook(hook(math.inf if phase == "denoiser" else math.nan, phase))
        if phase == "VAE":                                                # its Inf would be clamped
            model.vae.decoder.register_forward_hook(hook(math.nan, phase))
        return model

    def judge(call):
        return lambda *args: call(*args) * (math.nan if now["step"] in bad else 1)
    monkeypatch.setattr(common.Run, "skips", watched)
    monkeypatch.setattr(module, "load_model", model)
    if phase == "reward or detector":
        load_reward = module.load_reward
        monkeypatch.setattr(module, "load_reward", lambda *a: (lambda r, row: (judge(r), row))(*load_reward(*a)))
        if load_detector:
            monkeypatch.setattr(module, "load_detector", lambda *a: judge(load_detector(*a)))
    return seen


@pytest.mark.parametrize("phase", ["denoiser", "VAE", "reward or detector", "backward pass"])
@pytest.mark.parametrize("script", ["refl", "imagerefl", "focus_n_fix", "treat", "dfusion_dpo"])
def test_nan_is_named_and_left_out(world, tmp_path, monkeypatch, capsys, script, phase):
    module = SCRIPTS[script]
    seen = poisoned(monkeypatch, module, phase, {3})
    assert run(monkeypatch, module, put(world[1][script], "--save_every", 5, "--train_steps", 5), tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    skipped = {row["step"]: row["skipped"] for row in rows if "skipped" in row}
    again = [4] if script == "dfusion_dpo" and phase != "backward pass" else []                      # the same round's samples
    assert skipped[3] == phase and list(skipped) == [3, *again]
    line, *more = said(capsys)
    assert len(more) == len(again) and line.startswith(f"update 3: NaN or Inf, first from the {phase}; ")
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3])) and not all(torch.equal(a, b) for a, b in zip(seen[1], seen[2]))
    assert all(p.isfinite().all() for p in load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").values())


def test_nan_in_a_detector(world, tmp_path, monkeypatch, capsys):
    """Nor does it reach the running statistics of its batch norm, which the forward pass changes."""
    start, augment = diffdoctor.start_detector, diffdoctor.augment
    assert run(monkeypatch, diffdoctor, world[1]["detector"], tmp_path / "fine") == 0
    calls = []

    def poison(images, *args):
        calls.append(0)
        images, labels = augment(images, *args)
        return images * math.nan if len(calls) == 3 else images, labels
    monkeypatch.setattr(diffdoctor, "augment", poison)
    assert run(monkeypatch, diffdoctor, world[1]["detector"], tmp_path / "run") == 0
    assert [json.loads(line).get("skipped") for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [None, None, "reward or detector", None]
    state = load_file(tmp_path / "run" / "model" / "detector" / "model.safetensors")
    assert all(x.isfinite().all() for x in state.values()) and any("running_mean" in k for k in state) and len(said(capsys)) == 1


def test_the_fifth_nan_in_a_row_ends_the_run(world, tmp_path, monkeypatch, capsys):
    """Also when it is stopped and resumed among them."""
    words = put(world[1]["refl"], "--save_every", 1)
    poisoned(monkeypatch, refl, "denoiser", {2, *range(4, 20)})
    assert run(monkeypatch, refl, put(words, "--train_steps", 6), tmp_path / "run") == 0
    assert run(monkeypatch, refl, [*put(words, "--train_steps", 20), "--resume"], tmp_path / "run") == 2
    *_, line = said(capsys)
    assert line.startswith("error: update 8: NaN or Inf, first from the denoiser") and "--lr" in line and "fifth update in a row" in line
    assert all(p.isfinite().all() for p in load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").values())
