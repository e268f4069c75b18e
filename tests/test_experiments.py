"""The experiments in results/: no run is taken for another, and figures and tables are right."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, random_lora, run_script
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import combined_sample
from common import load_model, make_trainable
from results import run
from results.experiments import diffdoctor_treatment, flows, focus_n_fix, imagerefl, refl, tools
from results.experiments import unwanted_concept
from toy.oracle import correct, recognised
from toy.scenes import render, sample_scene

FLAGS = ("--gamma", 0.25, "--naive", "--train_steps", 40)


@pytest.mark.parametrize("name", run.EXPERIMENTS)
def test_every_experiment_is_found_by_its_name(name):
    assert run.find_experiment(name).__module__ == f"results.experiments.{name}"


@pytest.fixture
def train_again(tmp_path, monkeypatch):
    """Calls tools.train where a run was left -> the flags of the scripts that it started."""
    calls = []

    def fake_script(out, name, script, *flags):
        calls.append(flags)

    def call(gamma, *files):
        for file in ("config.json", *files):
            path = tmp_path / "run" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(gamma=gamma, train_steps=40)))
        assert tools.train(tmp_path, "run", "diffdoctor", *FLAGS) == tmp_path / "run"
        return calls

    monkeypatch.setattr(tools, "run_script", fake_script)
    return call


def test_a_run_without_a_checkpoint_is_made_anew(train_again, tmp_path):
    assert train_again(0.25) == [(*FLAGS, "--out", tmp_path / "run")]
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_is_continued(train_again, tmp_path):
    flags = (*FLAGS, "--out", tmp_path / "run", "--resume")
    assert train_again(0.25, "checkpoint/state.pt") == [flags]
    assert (tmp_path / "run").exists()


def test_a_finished_run_is_not_started_again(train_again):
    assert train_again(0.25, "checkpoint/state.pt", "lora/step_000040/x") == []


def test_a_run_with_another_number_is_never_taken_for_this_one(train_again, tmp_path):
    calls = train_again(0.5, "checkpoint/state.pt", "lora/step_000040/x")
    assert calls == [(*FLAGS, "--out", tmp_path / "run")]
    assert not (tmp_path / "run").exists()


def test_results_come_in_the_order_of_the_calls():
    assert tools.together(2, pow, [(2, 3), (3, 2), (5, 1)]) == [8, 9, 5]


def test_a_table_has_means_and_deviations_over_seeds(tmp_path, capsys):
    rows = {"a": [dict(x=1, y=0.5)], "b": [dict(x=1, y=1), dict(x=3, y=1)]}
    tools.write_table(tmp_path / "t.md", rows, 1, ["head", ""])
    lines = ["head", "", "| | x | y |", "|---|---|---|", "| a | 1.0 | 0.5 |"]
    lines.append("| b | 2.0 ± 1.4 | 1.0 ± 0.0 |")
    assert (tmp_path / "t.md").read_text().splitlines() == lines
    assert capsys.readouterr().out.splitlines() == lines
    assert json.loads((tmp_path / "t.json").read_text()) == rows


def test_equal_reward_is_read_off_straight_lines():
    rows = [dict(reward=0, outside=0), dict(reward=1, outside=2), dict(reward=3, outside=4)]
    assert focus_n_fix.at_reward(rows, 0.5, "outside") == 1
    assert focus_n_fix.at_reward(rows, 2, "outside") == 3
    assert np.isnan(focus_n_fix.at_reward(rows, 4, "outside"))


def test_the_setting_that_gains_most_is_chosen_if_it_leaves_the_rest_alone():
    def runs(reward, *outside):
        return [[dict(reward=9, outside=9), dict(reward=reward, outside=o)] for o in outside]

    rows = {"small": runs(1, 0, 0), "good": runs(2, 1 / 255, 2.9 / 255), "far": runs(3, 2 / 255, 1)}
    assert focus_n_fix.choose(rows) == "good"


def test_red_things_and_the_others_of_a_caption_are_counted():
    prompts = ["a red star above a blue square", "a blue square left of a green star", "a red star"]
    seen = ["a purple star above a blue square", "a blue square left of a purple star"]
    seen += ["a red star"]
    images = refl.real_scenes(seen, 1)
    counts = unwanted_concept.count_colors(images, prompts)
    assert counts == dict(red=pytest.approx(1 / 3), others=pytest.approx(2 / 3))


def test_grain_sees_stripes_in_the_background_and_not_the_objects():
    scene = sample_scene(np.random.default_rng(0), "a red circle left of a blue square")
    image = torch.from_numpy(render(scene)[0]).permute(2, 0, 1)
    is_odd = torch.arange(64) // 2 % 2
    stripes = 0.05 * (2 * is_odd - 1)[None, :, None]
    assert diffdoctor_treatment.grain([image]) < 0.5
    # Their root mean square is 5 percent.
    assert 4.5 < diffdoctor_treatment.grain([(image + stripes).clamp(0, 1)]) < 6


def test_real_scenes_show_what_their_captions_say():
    prompts = ["a red circle above a blue square", "a green star"]
    images = refl.real_scenes(prompts, 8)
    assert all(correct(image, caption) for image, caption in zip(images, tools.repeat(prompts, 8)))


def test_the_bench_makes_the_images_of_combined_sample(tmp_path):
    """Although it takes the base model's first steps once for all."""
    model = load_model("toy", CPU)
    random_lora(make_trainable(model, 4), size=0.1)
    model.save(tmp_path / "lora")
    words = ["--lora", tmp_path / "lora", "--num_images", 2, "--device", "cpu", "--mode"]
    words = ["--prompts", tools.write_prompts(tmp_path / "p.txt", ["a red star"]), *words]
    run_script(combined_sample, *words, "combined", "--base_steps", 16, "--out", tmp_path / "16")
    run_script(combined_sample, *words, "aig", "--aig_power", 2, "--out", tmp_path / "aig")

    bench = refl.Bench(tmp_path / "refl", ["a red star"], each=2)
    bench.measure("5", tmp_path / "lora", bench.combined, 5)
    bench.measure("16", tmp_path / "lora", bench.combined, 16)
    bench.measure("again", tmp_path / "lora", bench.combined, 16)
    bench.measure("aig", tmp_path / "lora", bench.aig, 2.0)
    assert torch.equal(bench.images("16"), bench.images("again"))
    for name in ("16", "aig"):
        files = sorted((tmp_path / name).glob("0*.png"))
        images = torch.stack([pil_to_tensor(Image.open(file)) for file in files]) / 255
        assert (images - bench.images(name)).abs().max() < 1.5 / 255
    assert not torch.equal(bench.images("16"), bench.images("aig"))


def test_the_bench_samples_a_flow_as_combined_sample_does(tmp_path):
    model = load_model("toy-flux", CPU)
    random_lora(make_trainable(model, 4), size=0.1)
    model.save(tmp_path / "lora")
    words = ["--model", "toy-flux", "--lora", tmp_path / "lora", "--num_images", 2]
    words += ["--prompts", tools.write_prompts(tmp_path / "p.txt", ["a red star"])]
    words += ["--mode", "combined", "--base_steps", 2, "--device", "cpu", "--out", tmp_path / "2"]
    assert run_script(combined_sample, *words) == 0

    flow = dict(model="toy-flux", scheduler="euler", num_steps=5)
    bench = refl.Bench(tmp_path / "flows", ["a red star"], each=2, **flow)
    row = flows.measure(bench, "2", tmp_path / "lora", 2)
    files = sorted((tmp_path / "2").glob("0*.png"))
    images = torch.stack([pil_to_tensor(Image.open(file)) for file in files]) / 255
    assert (images - bench.images("flow_2")).abs().max() < 1.5 / 255
    is_recognized = [recognised(image, "a red star") for image in bench.images("flow_2")]
    assert row["recognised"] == sum(is_recognized) / 2


def test_imagerefl_is_compared_with_refl_at_the_same_gradient_steps(capsys, monkeypatch):
    """In a world where ImageReFL is ahead by the seed, and every base step takes 0.1."""

    def fake_measure(bench, name, lora, base_steps):
        value = -0.1 * base_steps
        if lora and lora.parts[0] == "image":
            value += int(name.split("_")[1])
        if lora and lora.parts[0] == "refl":
            value += 99  # the default's steps, which must not be compared
        return dict.fromkeys(flows.COMPARED, value)

    monkeypatch.setattr(flows, "measure", fake_measure)
    runs = [{"ReFL": Path("refl"), "ReFL, late": Path("late"), "ImageReFL": Path("image")}] * 3
    rows = flows.measure_rows(None, runs)
    assert len(rows) == 1 + 2 + 10 + 10
    assert rows["ReFL, late, 40 updates + 3 base steps"][0]["toy_pref"] == pytest.approx(-0.3)
    flows.print_differences(rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if "toy_pref " in line]
    assert len(lines) == 10
    assert all("toy_pref +1.000 (+0.000 +1.000 +2.000)" in line for line in lines)


def test_equal_diversity_is_read_off_a_line():
    line = [dict(dino_div=0.2, x=3), dict(dino_div=0.1, x=1), dict(dino_div=0.08, x=5)]
    assert imagerefl.at_diversity(line, 0.12, "x") == pytest.approx(1.4)
    assert imagerefl.at_diversity(line, 0.2, "x") == pytest.approx(3)
    assert imagerefl.at_diversity(line, 0.085, "x") == pytest.approx(4)
    assert np.isnan(imagerefl.at_diversity(line, 0.3, "x"))


class LinearBench:
    """Every base step adds 0.01 of diversity and takes 0.1 of every other metric.

    AIG with powers 1 to 5 is as diverse as 15 to 19 base steps, and 0.3 worse. The runs of
    ImageReFL get more captions right with every training seed.
    """

    combined = aig = None

    def measure(self, name, lora, sampler, *settings):
        number, guidance = settings
        base_steps = 14 + number if name.startswith("aig") else number
        metrics = dict.fromkeys(refl.METRICS, -0.1 * base_steps)
        if name.startswith("aig"):
            metrics = {metric: value - 0.3 for metric, value in metrics.items()}
        metrics["dino_div"] = 0.02 + 0.01 * base_steps + (0.03 if guidance == 2 else 0)
        return metrics

    def measure_combined(self, kind, run, seed, updates, base_steps):
        metrics = self.measure(kind, None, None, base_steps, 4)
        if kind == "ImageReFL":
            metrics["toy_correct"] += 0.01 * seed
        return metrics


def test_methods_are_compared_at_equal_diversity_and_paired_by_seed(capsys):
    runs = [{"ReFL": Path("refl"), "ImageReFL": Path("imagerefl")}] * 5
    rows = imagerefl.measure_rows(LinearBench(), runs)
    num_seeds = {name: len(per_seed) for name, per_seed in rows.items()}
    assert num_seeds["ReFL, 60 updates + 15 base steps"] == 5
    assert num_seeds["ImageReFL, 120 updates + 15 base steps"] == 3
    assert num_seeds["ReFL, 60 updates"] == num_seeds["ReFL, 60 updates + AIG, power 1"] == 3

    imagerefl.print_fronts(rows)
    printed = capsys.readouterr().out.split("\n\n")
    parts = [part for part in printed if "guidance 4, dino_div 0.2\n" in part]
    refl_part, longer_part, aig_part, image_and_aig_part = parts
    # A third of the way from 17 base steps to the base model.
    assert "toy_pref -1.800" in refl_part and "toy_pref -1.800" in aig_part
    assert "toy_correct +0.013 (+0.000 +0.007 +0.013 +0.020 +0.027)" in refl_part
    assert "toy_pref_b -0.300 (-0.300 -0.300 -0.300)" in aig_part
    # Twice the updates and AIG have three seeds.
    assert "toy_correct +0.007 (+0.000 +0.007 +0.013)" in longer_part
    assert "toy_correct +0.307 (+0.300 +0.307 +0.313)" in image_and_aig_part
    assert "ImageReFL, 30 updates minus ReFL, 30 updates" in printed[0]
    # Each guidance has the base model of its own at the end of the lines.
    (part,) = [part for part in printed if "guidance 2, dino_div 0.23\n" in part]
    # There, AIG has no setting between power 3 and the base model.
    assert "toy_pref -1.800" in part and "toy_pref_b -0.200 (-0.200 -0.200 -0.200)" in part


def test_shrink_leaves_256_colors_and_the_size(tmp_path):
    ramp = np.arange(40 * 30 * 3).reshape(40, 30, 3) % 251
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "picture.png")
    tools.shrink(tmp_path / "picture.png")
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size == (30, 40) and picture.mode == "P"
    assert np.abs(np.asarray(picture.convert("RGB"), float) - ramp).mean() < 20
