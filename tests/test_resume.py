"""Invariant 4: a run that was stopped, killed or resumed with another micro-batch ends with the
same bytes as one that nobody disturbed."""

import builtins
import errno
import io
import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import kills
import pytest
import torch
from conftest import SCRIPTS_THAT_TRAIN, read_log, read_weights_of_run, run_script, same_tensors
from conftest import training_commands
from safetensors import SafetensorError

import refl
from run_folder import Run


@pytest.fixture
def stop_after_a_checkpoint(monkeypatch):
    """While .on is true, a run ends as if by Ctrl-C when it has saved its first checkpoint."""

    class Switch:
        on = True

    save = Run.save

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if Switch.on:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_stop)
    return Switch


@pytest.mark.parametrize("name", [*SCRIPTS_THAT_TRAIN, "refl in full"])
def test_two_updates_and_a_resume_are_four_updates(world, stop_after_a_checkpoint, name):
    """Also when the log breaks off in the middle of a line, and whatever the global seed."""
    module, words = training_commands(world)[name.split()[0]]
    if name == "refl in full":
        words = [*words, "--lora_rank", 0]
    if name == "dfusion_dpo":
        # The checkpoint after two updates then lies inside a round.
        words = [*words, "--inner_epochs", 3]
    stop_after_a_checkpoint.on = False
    torch.manual_seed(1)
    assert run_script(module, *words, "--out", "whole") == 0

    stop_after_a_checkpoint.on = True
    torch.manual_seed(2)
    assert run_script(module, *words, "--out", "half") == 130
    at_two = read_weights_of_run("half")
    assert torch.load("half/checkpoint/state.pt", weights_only=True)["step"] == 2
    with open("half/log.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 0.0}\n{"step": 4, "lo')

    stop_after_a_checkpoint.on = False
    assert run_script(module, *words, "--out", "half", "--resume") == 0
    assert [row["step"] for row in read_log("half")] == [1, 2, 3, 4]
    assert kills.result("half") == kills.result("whole")
    assert not same_tensors(read_weights_of_run("half"), at_two)
    assert not list(Path("half").rglob("*.tmp"))


@pytest.mark.filterwarnings("ignore:This process.*fork")
@pytest.mark.parametrize("name", ["refl", "dfusion_dpo"])
def test_a_killed_run_ends_as_if_nothing_had_happened(world, monkeypatch, name):
    """Three kills at random moments; tests/kills.py kills every script more often."""
    module, words = training_commands(world)[name]
    for function in ("load_model", "load_reward"):
        monkeypatch.setattr(module, function, getattr(module, function))  # to be put back
    kills.preload(module, words)
    different, done, _ = kills.survive(module, words, Path.cwd(), 3, seed=1)
    assert not different and done == 3


@pytest.mark.parametrize("num_renamed", [0, 1, 2])
def test_a_save_that_was_cut_off_is_as_if_it_had_not_begun(world, monkeypatch, num_renamed):
    """Of the three files of the first save, the checkpoint must get its name last."""
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "whole") == 0
    replace = Path.replace
    renamed = []

    def replace_or_stop(self, target):
        if "new.tmp" in self.parts:
            if len(renamed) == num_renamed:
                raise KeyboardInterrupt
            renamed.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_stop)
    assert run_script(module, *words, "--out", "run") == 130
    assert "state.pt" not in renamed
    monkeypatch.setattr(Path, "replace", replace)
    assert run_script(module, *words, "--out", "run", "--resume") == 0
    assert kills.result("run") == kills.result("whole")


@pytest.mark.parametrize("name", SCRIPTS_THAT_TRAIN)
def test_only_the_log_is_written_in_place(world, monkeypatch, name):
    """All other files get their names when they are whole. The log may end in half a line."""
    module, words = training_commands(world)[name]
    written = set()
    real_open = open

    def note(path, mode="r", *args, **kwargs):
        if mode[0] in "wax" and str(path).startswith("run/"):
            written.add(str(path).removeprefix("run/"))
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", note)
    monkeypatch.setattr(io, "open", note)
    assert run_script(module, *words, "--train_steps", 2, "--out", "run") == 0
    assert {"config.json.tmp", "index.html.tmp"} < written
    assert any(name.endswith(".png.tmp") for name in written)
    assert {name for name in written if ".tmp" not in name} == {"log.jsonl"}


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(world, monkeypatch):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "whole") == 0
    step = refl.refl_step

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(refl, "refl_step", interrupt)
    assert run_script(module, *words, "--out", "run") == 130
    monkeypatch.setattr(refl, "refl_step", step)
    assert run_script(module, *words, "--out", "run", "--resume") == 0
    assert kills.result("run") == kills.result("whole")


def test_what_does_not_change_the_numbers_may_change(world, stop_after_a_checkpoint):
    """Out of memory says "turn down --micro_batch": then the run must go on with it."""
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "run") == 130
    stop_after_a_checkpoint.on = False
    changes = ["--micro_batch", 1, "--checkpointing", "--save_every", 1, "--device", "auto"]
    assert run_script(module, *words, *changes, "--out", "run", "--resume") == 0
    config = json.loads(Path("run/config.json").read_text())
    assert (config["micro_batch"], config["checkpointing"], config["save_every"]) == (1, True, 1)
    assert run_script(module, *words, "--out", "whole") == 0
    for row, other in zip(read_log("run"), read_log("whole")):
        assert row["reward"] == pytest.approx(other["reward"], rel=1e-4)


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_damaged_or_deleted_checkpoint_is_one_line(world):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "run") == 0
    checkpoint = Path("run/checkpoint/state.pt")
    whole = checkpoint.read_bytes()
    more = [*words, "--train_steps", 6, "--out", "run", "--resume"]
    for content in (whole[:-1000], whole[:100], b"", b"text"):
        checkpoint.write_bytes(content)
        before = files_of("run")
        assert "state.pt is damaged" in run_script(module, *more)
        assert files_of("run") == before
    # The run must not start over: that would empty its log and overwrite its weights.
    checkpoint.unlink()
    before = files_of("run")
    assert "state.pt is missing" in run_script(module, *more)
    assert files_of("run") == before


def test_a_run_whose_samples_were_deleted_goes_on(world):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--train_steps", 2, "--out", "run") == 0
    shutil.rmtree("run/samples")
    assert run_script(module, *words, "--out", "run", "--resume") == 0
    assert [path.name for path in Path("run/samples").iterdir()] == ["step_000004.png"]


@pytest.mark.parametrize(
    "where, error",
    [
        ("pathlib.Path.write_bytes", OSError(errno.ENOSPC, "No space left on device")),
        # What diffusers' save_pretrained raises, with --lora_rank 0.
        ("models.lora.to_safetensors", SafetensorError("I/O error: No space left on device")),
        ("torch.save", RuntimeError("unexpected pos 704 vs 598")),
    ],
)
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(world, monkeypatch, where, error):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "whole") == 0
    assert run_script(module, *words, "--train_steps", 2, "--out", "run") == 0

    def full(*args, **kwargs):
        # A new one, because the traceback of `error` would outlive the run and keep its lock.
        raise type(error)(*error.args)

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        message = run_script(module, *words, "--out", "run", "--resume")
    assert "No space left" in message or "Is the disk full?" in message
    assert "The last checkpoint is intact" in message
    assert run_script(module, *words, "--out", "run", "--resume") == 0
    assert kills.result("run") == kills.result("whole")


def test_what_changes_the_numbers_is_refused(world):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "run") == 0
    before = kills.result("run")
    changes = {
        "seed was 0 and is 1": ["--seed", 1],
        "lr was 0.001 and is 0.002": ["--lr", 0.002],
        "model_source was": ["--model", world.sd_v],
        "at 4 already": ["--train_steps", 3],
    }
    for message, change in changes.items():
        assert message in run_script(module, *words, *change, "--out", "run", "--resume")
    assert kills.result("run") == before


@pytest.mark.parametrize(
    "name, change", [("detector", ["--train_steps", 6]), ("treat", ["--save_every", 1])]
)
def test_what_changes_the_numbers_of_one_method_is_refused(world, name, change):
    """The detector's learning rate falls until train_steps; treat's patience counts snapshots."""
    module, words = training_commands(world)[name]
    assert run_script(module, *words, "--out", "run") == 0
    message = run_script(module, *words, *change, "--out", "run", "--resume")
    assert f"{change[0].strip('-')} was" in message


def test_a_run_that_is_still_going_on_is_not_resumed(world, monkeypatch):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "whole") == 0
    save = Run.save
    messages = []

    def resume_and_save(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if not messages:
            messages.append(run_script(module, *words, "--out", "run", "--resume"))

    monkeypatch.setattr(Run, "save", resume_and_save)
    assert run_script(module, *words, "--out", "run") == 0
    assert messages == [
        "another process is training in run: wait until it has ended, or end it"
    ]
    assert kills.result("run") == kills.result("whole")


def test_a_run_without_a_checkpoint_says_that_it_starts_over(world, monkeypatch, capsys):
    module, words = training_commands(world)["refl"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", Mock(side_effect=KeyboardInterrupt))
        assert run_script(module, *words, "--out", "run") == 130
    capsys.readouterr()
    assert run_script(module, *words, "--out", "run", "--resume") == 0
    assert "no checkpoint yet, so it starts over" in capsys.readouterr().out
    assert [row["step"] for row in read_log("run")] == [1, 2, 3, 4]


def test_a_run_of_another_script_is_not_resumed(world, monkeypatch):
    """Even if all settings are the same, as in a fork."""
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "run") == 0
    before = kills.result("run")
    monkeypatch.setattr(module, "NAME", "fork")
    message = run_script(module, *words, "--out", "run", "--resume")
    assert "method was 'refl' and is 'fork'" in message
    assert kills.result("run") == before


# --------------------------------------------------------------------------------------------------
# NaN and Inf


def note_weights(monkeypatch):
    """-> a list that will have the weights after every update."""
    seen = []
    zero_grad = torch.optim.Optimizer.zero_grad

    def note(optimizer, *args, **kwargs):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([p.detach().clone() for p in params])
        zero_grad(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", note)
    return seen


def break_gradients(monkeypatch, module, bad_updates):
    """The gradient of these updates is NaN -> a list of the weights after every update."""
    seen = note_weights(monkeypatch)
    norm_functions = {name: getattr(torch.nn.utils, name) for name in NORMS}

    def make_broken(name):
        def broken(params, *args, **kwargs):
            norm = norm_functions[name](params, *args, **kwargs)
            return norm * math.nan if len(seen) + 1 in bad_updates else norm

        return broken

    for name in NORMS:
        monkeypatch.setattr(torch.nn.utils, name, make_broken(name))
    return seen


NORMS = ("get_total_norm", "clip_grad_norm_")


@pytest.mark.parametrize("name", SCRIPTS_THAT_TRAIN)
def test_an_update_that_is_not_finite_is_left_out_counted_and_said(
    world, monkeypatch, capsys, name
):
    module, words = training_commands(world)[name]
    weights = break_gradients(monkeypatch, module, {3})
    assert run_script(module, *words, "--out", "run") == 0
    assert [row.get("skipped") for row in read_log("run")] == [None, None, True, None]
    assert capsys.readouterr().err.count("update 3: NaN or Inf") == 1
    assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[2]))
    assert not all(torch.equal(a, b) for a, b in zip(weights[2], weights[3]))
    assert all(t.isfinite().all() for t in read_weights_of_run("run").values())


@pytest.mark.parametrize("name", SCRIPTS_THAT_TRAIN)
def test_nan_from_a_network_changes_nothing(world, monkeypatch, capsys, name):
    """In update 2 the denoiser returns NaN, in update 3 the VAE's decoder, in update 4 the judge.

    The NaN is only in the values. In most scripts, the gradient of update 3 is zero and finite.
    """
    module, words = training_commands(world)[name]
    words = [*words, "--train_steps", 5, "--save_every", 5]
    if name == "dfusion_dpo":
        words += ["--inner_epochs", 1]  # every update samples and judges its own images
    weights = note_weights(monkeypatch)
    spoiled = []

    def spoil(loader, update, find_layer):
        load = getattr(module, loader)

        def return_nan(layer, inputs, output):
            if len(weights) + 1 == update:
                spoiled.append(update)
                return output.masked_fill(torch.ones_like(output, dtype=torch.bool), math.nan)

        def load_and_spoil(*args, **kwargs):
            loaded = load(*args, **kwargs)
            find_layer(loaded).register_forward_hook(return_nan)
            return loaded

        monkeypatch.setattr(module, loader, load_and_spoil)

    if name == "detector":
        spoil("start_detector", 4, lambda detector: detector)
    else:
        spoil("load_model", 2, lambda model: model.denoiser.conv_out)
        spoil("load_model", 3, lambda model: model.vae.decoder.conv_out)
        if name in ("treat", "focus_n_fix"):
            spoil("load_detector", 4, lambda detector: detector)
        else:
            spoil("load_reward", 4, lambda loaded: loaded[0].clip.visual_projection)

    assert run_script(module, *words, "--out", "run") == 0
    bad_updates = {4} if name == "detector" else {2, 3, 4}
    assert set(spoiled) == bad_updates
    assert {row["step"] for row in read_log("run") if "skipped" in row} == bad_updates
    errors = capsys.readouterr().err
    assert errors.count("NaN or Inf in its loss") == len(bad_updates)
    assert "not up to date" not in errors  # the page shows such a run, too
    for update in range(2, 6):
        is_same = all(torch.equal(a, b) for a, b in zip(weights[update - 2], weights[update - 1]))
        assert is_same == (update in bad_updates)
    assert all(t.isfinite().all() for t in read_weights_of_run("run").values())


def test_the_fifth_in_a_row_ends_the_run(world, monkeypatch):
    """Also when it is resumed among them."""
    module, words = training_commands(world)["refl"]
    words = [*words, "--save_every", 1, "--out", "run"]
    bad_updates = {2, *range(4, 20)}
    break_gradients(monkeypatch, module, bad_updates)
    assert run_script(module, *words, "--train_steps", 6) == 0
    message = run_script(module, *words, "--train_steps", 20, "--resume")
    assert message.startswith("update 8: ") and "fifth in a row" in message
    assert [row["step"] for row in read_log("run") if "skipped" in row] == [2, 4, 5, 6, 7]
