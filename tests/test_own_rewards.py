"""What --reward can name besides the rewards of rewards.py: one of your own, and weighted sums."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, PROMPTS, ROOT, read_log, read_weights_of_run, run_script, same_tensors
from conftest import training_commands

import dfusion_dpo
import evaluate
import rewards
from common import TOY, generator
from rewards import REWARDS, RewardPart, known_reward, load_reward, split_reward
from run_folder import describe_reward, run_name

MY_REWARDS = '''
import io

import torch
from PIL import Image


def compressibility(images, prompts):
    """DDPO's: minus the size of the JPEG file in kB. Plain numbers, without a gradient."""
    scores = []
    for image in images:
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        scores.append(-file.tell() / 1000)
    return scores


class Brightness:
    built = []

    def __init__(self, device):
        self.built.append(device)
        self.weights = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64, device=device)

    def __call__(self, images, prompts):
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return images.double().mean((2, 3)) @ self.weights - 0.01 * lengths


def one_number(images, prompts):
    return images.mean()


def column(images, prompts):
    return images.mean((2, 3))[:, :1]
'''


def own_example(text):
    """The function that is shown as an example of a reward of one's own -> its code."""
    found = re.search(r"^( *)def warmth\(.*?return [^\n]*\n", text, re.S | re.M)
    indent = found.group(1)
    return "".join(line.removeprefix(indent) for line in found.group().splitlines(keepends=True))


@pytest.fixture
def mine():
    Path("my_rewards.py").write_text(MY_REWARDS + "\n\n" + own_example(rewards.__doc__))


def pictures(num_images=3):
    return torch.rand(num_images, 3, 64, 64, generator=generator(0, "pictures"))


def refused(spec, message):
    with pytest.raises(SystemExit) as stop:
        load_reward(spec, CPU)
    assert message in stop.value.code and "\n" not in stop.value.code


# --------------------------------------------------------------------------------------------------
# What a --reward means


def test_parts_of_a_spec(mine):
    Path("run=3").mkdir()
    Path("sac+logos-l14.pth").touch()
    for spec, *expected in (
        ("hps", RewardPart("hps")),
        ("hps=1,pick=0.05", RewardPart("hps"), RewardPart("pick", weight=0.05)),
        ("hps, pick=-2e-3", RewardPart("hps"), RewardPart("pick", weight=-0.002)),
        ("pick=1e+2", RewardPart("pick", weight=100.0)),
        ("hps:run=3=.5", RewardPart("hps", "run=3", weight=0.5)),
        ("aesthetic:sac+logos-l14.pth", RewardPart("aesthetic", "sac+logos-l14.pth")),
        ("my_rewards.py:warmth=3", RewardPart("warmth", file="my_rewards.py", weight=3.0)),
    ):
        assert split_reward(spec) == expected
    expected = {"hps": "hps", "hps=2": None, "hps,pick": None, "my_rewards.py:imagereward": None}
    assert {spec: known_reward(spec) for spec in expected} == expected


def test_a_run_is_named_after_what_it_trains_on(mine):
    class Args:
        model = "toy"

    for spec, name in (
        ("hps", "runs/refl-toy-hps"),
        ("some/where/my_rewards.py:warmth", "runs/refl-toy-warmth"),
        ("hps=1,a/b.py:warmth=0.5", "runs/refl-toy-hps_1_warmth_0.5"),
    ):
        Args.reward = spec
        assert run_name("refl", Args) == name


def test_a_sum_adds_what_each_part_is_trained_on():
    images = pictures().requires_grad_()
    reward, reward_range = load_reward("toy_pref,toy_clip=-0.5", CPU)
    total = reward(images, PROMPTS[:3])
    pref = load_reward("toy_pref", CPU)[0](images, PROMPTS[:3])
    clip = load_reward("toy_clip", CPU)[0](images, PROMPTS[:3])
    expected = (pref - 3) / 13 - 0.5 * clip
    torch.testing.assert_close(total, expected)
    # The log gets the raw values.
    assert list(reward.parts) == ["toy_pref", "toy_clip"]
    torch.testing.assert_close(reward.parts["toy_pref"], pref.detach())
    torch.testing.assert_close(reward.parts["toy_clip"], clip.detach())
    gradients = [torch.autograd.grad(r.sum(), images)[0] for r in (total, expected)]
    torch.testing.assert_close(*gradients)
    # toy_pref from 3 to 16.5 is 0 to 1.04, and toy_clip from 0 to 0.93 lowers the sum.
    assert reward_range.low == pytest.approx(-0.465)
    assert reward_range.high == pytest.approx(13.5 / 13)
    assert (reward_range.shift, reward_range.scale) == (0, 1)
    assert str(REWARDS["hps"]) == "known range 0.25 to 0.38"


def test_one_part_with_a_weight_is_a_sum():
    images = pictures()
    with torch.no_grad():
        r = load_reward("toy_pref", CPU)[0](images, PROMPTS[:3])
        doubled = load_reward("toy_pref=2", CPU)[0](images, PROMPTS[:3])
    torch.testing.assert_close(doubled, 2 * (r - 3) / 13)


def test_your_own_function_and_class(mine):
    images = pictures()
    reward, reward_range = load_reward("my_rewards.py:warmth", CPU)
    expected = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
    torch.testing.assert_close(reward(images, PROMPTS[:3]), expected)
    assert str(reward_range) == "no known range"
    assert str(load_reward("toy_clip,my_rewards.py:warmth", CPU)[1]) == "no known range"
    assert (reward_range.shift, reward_range.scale) == (0, 1)

    brightness, _ = load_reward("my_rewards.py:Brightness", CPU)
    means = images.mean((2, 3))
    expected = 0.2 * means[:, 0] + 0.7 * means[:, 1] + 0.1 * means[:, 2]
    expected -= 0.01 * torch.tensor([len(prompt) for prompt in PROMPTS[:3]])
    for _ in range(2):
        r = brightness(images, PROMPTS[:3])
        torch.testing.assert_close(r, expected)
    # It was built once, on the device of the run.
    assert brightness.reward.built == [CPU]

    # Numbers are enough for methods that need no gradient.
    compressibility, _ = load_reward("my_rewards.py:compressibility", CPU)
    noise_and_black = torch.stack([images[0], torch.zeros(3, 64, 64)])
    noise, black = compressibility(noise_and_black, PROMPTS[:2]).tolist()
    assert noise < -5 and -1 < black < -0.5


def test_mistakes_with_your_own(mine):
    for spec, message in (
        ("absent.py:warmth", "absent.py:warmth: there is no file absent.py"),
        ("my_rewards.py", "add a colon and the name of your function or class"),
        ("my_rewards.py:warm", "my_rewards.py defines no warm"),
        ("hps,hps=2", "two parts have the same name"),
        ("toy_clip,", "no such reward"),
        ("toy_clip=x", "toy_clip=x: no such reward"),
        (f"toy_pref,toy_clip:{TOY}/dino", f"--reward toy_clip:{TOY}/dino: cannot load"),
    ):
        refused(spec, message)
    for name, message in (
        ("one_number", "my_rewards.py:one_number returned the shape (), but it must be (3,)"),
        ("column", "returned the shape (3, 1), but it must be (3,): one score per image"),
        ("compressibility", "returned scores without a gradient"),
    ):
        reward, _ = load_reward(f"my_rewards.py:{name}", CPU)
        with pytest.raises(SystemExit, match=re.escape(message)):
            reward(pictures().requires_grad_(), PROMPTS[:3])


def test_the_example_is_the_same_wherever_it_is_shown():
    """In rewards.py, and in any page that shows it."""
    code = own_example(rewards.__doc__)
    for page in [ROOT / "README.md", *(ROOT / "results").glob("*.md")]:
        if "def warmth(" in page.read_text():
            assert own_example(page.read_text()) == code, page


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("name", ["refl", "imagerefl", "focus_n_fix", "dfusion_dpo"])
def test_every_part_is_logged(world, mine, name):
    module, words = training_commands(world)[name]
    spec = "toy_pref=0.5,toy_clip=2,my_rewards.py:warmth"
    assert run_script(module, *words, "--reward", spec, "--out", "run") == 0
    assert json.loads(Path("run/config.json").read_text())["reward"] == spec
    rows = read_log("run")
    assert len(rows) == 4
    for row in rows:
        starts = ["reward"] if "test_reward" not in row else ["reward", "test_reward"]
        for start in starts:
            pref, clip, warmth = [row[f"{start}_{p}"] for p in ("toy_pref", "toy_clip", "warmth")]
            expected = 0.5 * (pref - 3) / 13 + 2 * clip + warmth
            assert row[start] == pytest.approx(expected, abs=1e-5)
    assert sum("test_reward_warmth" in row for row in rows) == 2


def test_a_weight_of_zero_only_watches(world):
    """The run is that of toy_pref alone, with one more column in its log."""
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--out", "alone") == 0
    assert run_script(module, *words, "--reward", "toy_pref,toy_clip=0", "--out", "watched") == 0
    for row, other in zip(read_log("alone"), read_log("watched")):
        assert other["reward_toy_pref"] == pytest.approx(row["reward"], rel=1e-5)
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert "reward_toy_clip" in other and "reward_toy_pref" not in row
    for key, weight in read_weights_of_run("alone").items():
        torch.testing.assert_close(read_weights_of_run("watched")[key], weight, rtol=0, atol=1e-4)


def test_a_watched_reward_needs_no_gradient(world, mine):
    """The size of the JPEG file, which has none, beside a run that trains through toy_pref."""
    module, words = training_commands(world)["refl"]
    spec = "toy_pref,my_rewards.py:compressibility=0"
    assert run_script(module, *words, "--reward", spec, "--out", "run") == 0
    for row in read_log("run"):
        assert row["reward_compressibility"] < 0
        assert row["grad_norm"] > 0


def test_a_run_on_your_own_reward_is_resumed(world, mine, capsys):
    module, words = training_commands(world)["refl"]
    words = [*words, "--reward", "my_rewards.py:Brightness"]
    assert run_script(module, *words, "--out", "whole") == 0
    assert "(no known range)" in capsys.readouterr().out
    assert run_script(module, *words, "--train_steps", 2, "--out", "half") == 0
    assert run_script(module, *words, "--out", "half", "--resume") == 0
    assert read_log("whole") == read_log("half")
    assert same_tensors(read_weights_of_run("whole"), read_weights_of_run("half"))


def test_your_own_reward_without_a_gradient(world, mine):
    """DDPO's JPEG compressibility: on the toy, and one line where a method needs its gradient."""
    spec = "my_rewards.py:compressibility"
    words = ["--reward", spec, "--train_steps", 2, "--batch_size", 8, "--images_per_prompt", 4]
    words += ["--num_inference_steps", 2, "--algo", "ddpo", "--device", "cpu"]
    words += ["--test_prompts", world.one]
    assert run_script(dfusion_dpo, *words) == 0
    first, second = read_log("runs/dfusion_dpo-toy-compressibility")
    # Files of 64 x 64 pixels have about 2 kB.
    assert -4 < first["reward"] < -1 and first["reward_b"] < first["reward"]
    assert "test_reward" in second
    module, words = training_commands(world)["refl"]
    assert "without a gradient" in run_script(module, *words, "--reward", spec, "--out", "run")


def test_held_out_texts():
    assert describe_reward(dict(test_reward=1.23456, loss=3)) == "1.2346"
    stats = dict(test_reward=1.0, test_reward_hps=0.3, test_reward_pick=21.0)
    assert describe_reward(stats) == "1.0000 (hps 0.3000, pick 21.0000)"


# --------------------------------------------------------------------------------------------------
# evaluate.py


def test_your_own_metric(world, mine, capsys):
    shutil.copytree(world.images, "images")
    words = ["images", "--metrics", "my_rewards.py:warmth,toy_clip", "--out", "out.json"]
    found = []
    for factor in (1, 2):
        assert run_script(evaluate, *words) == 0
        result = json.loads(Path("out.json").read_text())["folders"]["images"]
        found.append(result["my_rewards.py:warmth"]["mean"])
        # What it reads may change, so its scores are never kept.
        code = Path("my_rewards.py").read_text()
        Path("my_rewards.py").write_text(code.replace("red - blue", "2 * red - 2 * blue"))
    assert found[1] == pytest.approx(2 * found[0]) and found[0] != 0
    assert [path.name for path in Path("images/.evaluate").iterdir()] == ["toy_clip.safetensors"]
    assert "my_rewards.py:warmth" in capsys.readouterr().out
    warmth = []
    for path in Path("images").glob("*.png"):
        pixels = evaluate.to_tensor(evaluate.open_image(path))
        warmth.append((pixels[0].mean() - pixels[2].mean()).item())
    assert found[0] == pytest.approx(sum(warmth) / 4, abs=1e-6)
    for metric, message in (
        ("absent.py:warmth", "there is no file absent.py"),
        ("my_rewards.py:warm", "defines no warm"),
        ("my_rewards.py:column", "returned the shape (4, 1)"),
    ):
        assert message in run_script(evaluate, "images", "--metrics", metric)
