"""The experiments behind the README's tables can be started, and do not take an old run for a new one. Their figures are not made here: hours of a core."""
import importlib
import json

import claims
import numpy as np
import pytest
import torch
from experiments import diffdoctor, tools

from toy.scenes import render, sample_scene


@pytest.mark.parametrize("name", claims.EXPERIMENTS)
def test_every_experiment_opens(name):
    assert callable(getattr(importlib.import_module(f"experiments.{name}"), name))


def test_a_run_is_used_again_only_with_the_same_numbers(tmp_path, monkeypatch):
    """Done: not started. Cut off: resumed. Cut off before its first checkpoint, or other settings: from the start."""
    calls, run = [], tmp_path / "run"
    monkeypatch.setattr(tools, "call", lambda out, name, script, *words: calls.append(words))
    words = ("--gamma", .25, "--naive", "--train_steps", 40)
    fresh, resumed = [(*words, "--out", run)], [(*words, "--out", run, "--resume")]

    def left(gamma, *names):
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps(dict(gamma=gamma, train_steps=40)))
        for name in names:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).touch()
        calls.clear()
        tools.train(tmp_path, "run", "diffdoctor", *words)
        return calls
    assert left(.25) == fresh and not run.exists()
    assert left(.25, "checkpoint/state.pt") == resumed and run.exists()
    assert left(.25, "checkpoint/state.pt", "lora/step_000040") == []
    assert left(.5, "checkpoint/state.pt", "lora/step_000040") == fresh and not run.exists()


def test_a_table(tmp_path, capsys):
    tools.table(tmp_path / "t.md", {"a": [dict(x=1, y=.5)], "b": [dict(x=1, y=1), dict(x=3, y=1)]}, 1, ["head", ""])
    text = "head\n\n| | x | y |\n|---|---|---|\n| a | 1.0 | 0.5 |\n| b | 2.0 ± 1.4 | 1.0 ± 0.0 |\n"
    assert (tmp_path / "t.md").read_text() == text == capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["b"] == [dict(x=1, y=1), dict(x=3, y=1)]


def test_grain_sees_stripes_in_the_background_and_not_the_things():
    image = torch.from_numpy(render(sample_scene(np.random.default_rng(0), "a red circle left of a blue square"))[0]).permute(2, 0, 1)
    rows = .05 * (torch.arange(64) // 2 % 2 * 2 - 1)[None, :, None]
    assert diffdoctor.grain([image]) < .5 and 4.5 < diffdoctor.grain([(image + rows).clamp(0, 1)]) < 6                # percent
