"""Invariant 7: every command of the README and of results/ parses, every script runs through its
command line, and the mistakes that people really make end in one clear line."""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import random_weights
import torch
from conftest import CPU, ROOT, break_weights, read_log, read_weights_of_run, run_script
from conftest import same_tensors, training_commands

import combined_sample
import dfusion_dpo
import diffdoctor
import evaluate
import focus_n_fix
import imagerefl
import refl
from common import TOY, load_model
from data import coco, labels
from data.prompts import condition
from rewards import load_reward
from run_folder import readable_errors

MODULES = {
    "refl.py": refl,
    "imagerefl.py": imagerefl,
    "diffdoctor.py": diffdoctor,
    "focus_n_fix.py": focus_n_fix,
    "dfusion_dpo.py": dfusion_dpo,
    "combined_sample.py": combined_sample,
    "evaluate.py": evaluate,
    "data/coco.py": coco,
    "data/labels.py": labels,
    "mine.py": refl,  # the README's fork
}
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "results").glob("*.md"))]
COMMAND = re.compile(r"(?:python|torchrun [^`\n]*--) ((?:data/)?\w+\.py)([^`#\n]*)")


def commands_of_pages():
    """Every `python script.py ...` in the pages, in code blocks and in running text.

    Those that are started by `torchrun ... -- script.py ...` count as well.
    """
    found = []
    for page in PAGES:
        # A backslash at the end of a line continues the command.
        text = page.read_text().replace("\\\n", " ")
        for script, words in COMMAND.findall(text):
            if script in MODULES and words.strip():
                found.append(f"{script} {' '.join(words.split())}")
    return sorted(set(found))


def test_the_readme_shows_every_script():
    text = (ROOT / "README.md").read_text()
    for script in ("refl", "imagerefl", "diffdoctor", "focus_n_fix", "dfusion_dpo"):
        assert f"`{script}.py`" in text
    assert len(text.split()) <= 1600
    assert "](results/pictures/" in "\n".join(text.splitlines()[:15])


def test_no_line_of_code_has_more_than_100_columns():
    # Your own files beside ours may be as wide as you like.
    ours = [*MODULES, "common.py", "rewards.py", "run_folder.py"]
    files = [ROOT / name for name in ours if name != "mine.py"]
    files += [*ROOT.glob("[a-z]*/*.py"), *ROOT.glob("results/*/*.py")]
    too_long = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if len(line) > 100:
                too_long.append(f"{file.name}:{number}")
    assert len(files) > 60 and not too_long


@pytest.mark.parametrize("command", commands_of_pages())
def test_a_command_of_the_pages_parses(command, tmp_path):
    """In a folder with what the command names, as far as the parser looks."""
    for name in ("toy", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    for run in re.findall(r"--lora (\S+)", command):
        (tmp_path / run / "lora").mkdir(parents=True)
        if "-sdxl-" in run:
            # A run's config.json says how many steps there are for --base_steps.
            sampler = dict(scheduler="ddpm", eta=1.0, num_inference_steps=40, guidance_scale=1.0)
            config = dict(model="sdxl", lora_rank=32, resolution=512, sampler=sampler)
            config["test_prompts"] = "unseen.txt"
            (tmp_path / run / "config.json").write_text(json.dumps(config))
    for file in re.findall(r"(\w+\.py):\w", command):
        (tmp_path / file).touch()  # a reward of your own
    script, *words = shlex.split(command)
    module = MODULES[script]
    assert vars(module.parse_args(words))


def test_pages_link_to_files_that_exist():
    for page in [*PAGES, ROOT / "toy" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_heart_of_refl_in_the_readme_is_the_scripts_own_code():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"## The heart of ReFL\n\n```python\n(.*?)```", readme, re.S).group(1)
    source = [line.strip() for line in (ROOT / "refl.py").read_text().splitlines()]
    position = 0
    for line in block.splitlines():
        position = source.index(line.strip(), position) + 1
    assert len(block.splitlines()) >= 10


def load_fork(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_fork(world, tmp_path):
    """Copy refl.py, rename its runs, turn its loss around: it trains the other way."""
    source = (ROOT / "refl.py").read_text()
    source = source.replace('NAME = "refl"', 'NAME = "mine"')
    loss = "return -reward_scale * ((r - shift) / scale).mean()"
    assert source.count(loss) == 1 and source.count('"mine"') == 1 and '"refl"' not in source
    (tmp_path / "mine.py").write_text(source.replace(loss, loss.replace("-reward", "reward")))
    fork = load_fork(tmp_path / "mine.py")
    assert fork.parse_args([]).out == "runs/mine-toy-toy_pref"
    _, words = training_commands(world)["refl"]
    assert run_script(refl, *words, "--train_steps", 1, "--out", "plain") == 0
    assert run_script(fork, *words, "--train_steps", 1, "--out", "fork") == 0
    plain, mine = read_log("plain")[0], read_log("fork")[0]
    assert mine["loss"] == pytest.approx(-plain["loss"])
    assert not same_tensors(read_weights_of_run("plain"), read_weights_of_run("fork"))


@pytest.mark.parametrize("script", sorted(MODULES))
def test_help_is_a_page_or_two_with_the_models_defaults(script, capsys):
    commands = [[]]
    if script == "diffdoctor.py":
        commands = [[], ["treat"], ["detector"]]
    if script == "data/labels.py":
        commands = [[], ["score"], ["export_hard"], ["import_labels"], ["pseudo"]]
    for words in commands:
        assert run_script(MODULES[script], *words, "--help") == 0
        text = capsys.readouterr().out
        assert 5 < text.count("\n") <= 150
        assert max(len(line) for line in text.splitlines()) <= 100
    if script == "refl.py":
        assert run_script(refl, "--model", "sdxl", "--help") == 0
        assert "(default: 16)" in capsys.readouterr().out


def test_every_default_model_has_settings_that_parse():
    for module in (refl, imagerefl, focus_n_fix, dfusion_dpo):
        for model in module.OURS:
            words = ["--model", model, "--reward", "toy_pref", "--prompts", world_free_prompts()]
            if module is focus_n_fix:
                words += ["--detector", TOY / "detector"]
            if module is dfusion_dpo:
                words = words[:4]
            args = module.parse_args([str(word) for word in words])
            for name, value in module.OURS[model].items():
                if name not in ("reward", "prompts"):
                    assert getattr(args, name) == value


@pytest.mark.parametrize("script", ["refl.py", "imagerefl.py", "focus_n_fix.py", "dfusion_dpo.py"])
def test_every_setting_of_a_model_has_its_flag(script, capsys):
    """A key of OURS without a flag would be printed and saved, and change nothing."""
    module = MODULES[script]
    run_script(module, "--help")
    text = capsys.readouterr().out
    for row in module.OURS.values():
        for name in row:
            assert f"  --{name} " in text, name


def world_free_prompts():
    Path("prompts.txt").write_text("a red circle\n")
    return "prompts.txt"


# --------------------------------------------------------------------------------------------------
# Mistakes that people really make: one clear line, and nothing written


def mistakes(world):
    """(flags, words that the message must hold)."""
    Path("empty.txt").write_text("\n  \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    Path("a_folder").mkdir()
    Path("video").mkdir()
    Path("video/model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    rows = [
        (["--model", "sdxxl"], ["sdxxl", "sdxl", "unknown"]),
        (["--model", "a_folder"], ["a_folder", "model_index.json"]),
        (["--model", "video"], ["CogVideoXPipeline", "StableDiffusionXLPipeline"]),
        (["--model", "nobody/nothing"], ["nobody/nothing"]),
        (["--reward", "toy_perf"], ["toy_perf", "toy_pref"]),
        (["--reward", "toy_pref:nowhere"], ["nowhere", "does not exist"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["--prompts", "empty.txt"], ["empty.txt"]),
        (["--prompts", "binary.txt"], ["binary.txt", "UTF-8"]),
        (["--resolution", "50"], ["--resolution 50", "multiple of"]),
        (["--batch_size", "0"], ["--batch_size 0", "1 or more"]),
        (["--micro_batch", "-1"], ["--micro_batch -1", "1 or more"]),
        (["--train_steps", "0"], ["--train_steps 0", "1 or more"]),
        (["--init_lora", "a_folder"], ["a_folder", "no LoRA here"]),
        (["--resume", "--out", "new"], ["--resume", "no run in new"]),
    ]
    if not torch.cuda.is_available():
        rows.append((["--device", "cuda"], ["--device cuda", "--device cpu"]))
    return rows


def test_a_mistake_ends_in_one_line_and_leaves_nothing(world, capsys):
    usual = ["--model", world.sd, "--reward", "toy_pref"]
    usual += ["--prompts", world.prompts, "--test_prompts", world.one, "--lora_rank", 4]
    for flags, expected in mistakes(world):
        capsys.readouterr()
        message = run_script(refl, *usual, *flags)
        if message == 2:
            message = capsys.readouterr().err.splitlines()[-1]
        assert isinstance(message, str), (flags, message)
        assert "Traceback" not in message
        for words in expected:
            assert words in message, (flags, message)
    assert not Path("runs").exists() and not Path("new").exists()


@pytest.mark.parametrize("name", ["imagerefl", "focus_n_fix", "treat", "dfusion_dpo"])
def test_the_other_scripts_answer_alike(world, name):
    module, words = training_commands(world)[name]
    Path("empty.txt").write_text("\n")
    for flags, expected in (
        (["--model", "sdxxl"], "sdxxl"),
        (["--reward", "toy_perf"], "toy_perf"),
        (["--prompts", "empty.txt"], "empty.txt"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--init_lora", "empty.txt"], "empty.txt"),
        (["--resume"], "--resume"),
        (["--save_every", 0], "--save_every 0: it must be 1 or more"),
    ):
        message = run_script(module, *words, *flags, "--out", "run")
        assert isinstance(message, str) and expected in message, (flags, message)
        shutil.rmtree("run", ignore_errors=True)


def test_a_model_without_a_reward_asks_for_one(world):
    for module in (refl, imagerefl):
        assert "--reward is required" in run_script(module, "--model", world.sd)


def test_a_folder_that_holds_a_run_is_never_overwritten(world):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--train_steps", 1, "--out", "run") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert "holds a run" in run_script(module, *words, "--out", "run")
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}


def test_two_runs_that_start_at_once_do_not_share_a_folder(world, monkeypatch):
    module, words = training_commands(world)["refl"]

    def load_while_another_run_starts(*args, **kwargs):
        Path("run").mkdir()
        Path("run/config.json").write_text("the other run's")
        return load_model(*args, **kwargs)

    monkeypatch.setattr(refl, "load_model", load_while_another_run_starts)
    assert "run already holds a run" in run_script(module, *words, "--out", "run")
    assert [path.name for path in Path("run").iterdir()] == ["config.json"]
    assert Path("run/config.json").read_text() == "the other run's"


def test_a_lora_of_another_model_is_refused(world):
    module, words = training_commands(world)["refl"]
    assert run_script(module, *words, "--train_steps", 1, "--out", "run") == 0
    message = run_script(module, *words, "--model", world.sdxl, "--init_lora", "run", "--out", "b")
    assert "run" in message and "LoRA" in message


def test_out_of_memory_says_what_to_turn_down(world, monkeypatch):
    text = (
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB "
        "of which 1.02 GiB is free. Including non-PyTorch memory, this process has 22.60 GiB"
    )

    def full(*args):
        raise torch.OutOfMemoryError(text)

    module, words = training_commands(world)["refl"]
    monkeypatch.setattr(refl, "refl_step", full)
    message = run_script(module, *words, "--out", "run")
    # Only this much of torch's page.
    assert "1.02 GiB is free" in message and "Including" not in message
    flags = [message.index(flag) for flag in ("--micro_batch", "--checkpointing", "--batch_size")]
    assert flags == sorted(flags)


# --------------------------------------------------------------------------------------------------
# Models from folders and from the hub's cache


def test_config_json_names_the_commit_of_a_hub_model(world, tmp_path, monkeypatch):
    """Also where a branch was named: from a cache in the hub's layout, without a network."""
    import huggingface_hub.constants as hub

    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "cache" / "models--nobody--tiny"
    shutil.copytree(world.sd, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for module in ("transformers.utils.hub", "transformers.configuration_utils"):
        if hasattr(importlib.import_module(module), "HF_HUB_CACHE"):
            monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("nobody/tiny", "nobody/tiny@main"):
        assert load_model(name, CPU).source == f"nobody/tiny@{commit}"
    _, words = training_commands(world)["refl"]
    words = [*words, "--model", "nobody/tiny@main", "--train_steps", 1, "--out", "run"]
    assert run_script(refl, *words) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["model"] == "nobody/tiny@main"
    assert config["model_source"] == f"nobody/tiny@{commit}"


def test_too_little_shared_memory_is_one_line():
    """What the DataLoader's workers raise in a container with Docker's default of 64 MiB."""
    with pytest.raises(SystemExit, match="--ipc=host"), readable_errors(None):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")
    with pytest.raises(RuntimeError, match="shapes"), readable_errors(None):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("harm", ["cut", "absent", "key", "shape"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_broken_model_weights_are_refused_and_never_random(world, tmp_path, part, harm):
    folder = tmp_path / "model"
    shutil.copytree(world.sd, folder)
    (path,) = (folder / part).glob("*.safetensors")
    break_weights(path, harm)
    with pytest.raises(SystemExit, match=f"--model {folder}"):
        load_model(str(folder), CPU)


@pytest.mark.parametrize("harm", ["cut", "absent", "key", "shape"])
def test_broken_reward_weights_are_refused_and_never_random(tmp_path, harm):
    folder = tmp_path / "pref"
    shutil.copytree(TOY / "pref", folder)
    break_weights(folder / "model.safetensors", harm)
    with pytest.raises(SystemExit, match=f"--reward toy_pref:{folder}"):
        load_reward(f"toy_pref:{folder}", CPU)


@pytest.mark.parametrize("name, part", [("sd15", "tokenizer"), ("sdxl", "tokenizer_2")])
def test_a_model_whose_tokenizer_lost_its_vocabulary_is_refused(tmp_path, name, part):
    """transformers makes a tokenizer of a few special tokens then, and says nothing."""
    folder = random_weights.write_pipeline(name, tmp_path / "model", full=False, seed=0)
    assert condition(load_model(str(folder), CPU), ["a red circle"])
    for lost in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / part / lost).unlink(missing_ok=True)
    with pytest.raises((SystemExit, ValueError), match="token|vocab"):
        condition(load_model(str(folder), CPU), ["a red circle"])


def test_code_beside_the_weights_is_never_run(world, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(world.sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["my_unet", "Net"]
    (folder / "model_index.json").write_text(json.dumps(index))
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (folder / "unet" / "my_unet.py").write_text(code)
    with pytest.raises(SystemExit, match="--model"):
        load_model(str(folder), CPU)
    assert not (tmp_path / "ran").exists()


def test_odd_prompts_are_fine(world):
    """Emoji, right-to-left text, thousands of characters, a byte order mark."""
    odd = "\N{FIRE}\N{CAT} a red circle\n\u05e9\u05dc\u05d5\u05dd\n" + "a very long prompt " * 500
    Path("odd.txt").write_text(odd + "\r\n", encoding="utf-8-sig")
    _, words = training_commands(world)["refl"]
    words = [*words, "--prompts", "odd.txt", "--test_prompts", "odd.txt", "--train_steps", 1]
    assert run_script(refl, *words, "--out", "run") == 0
    sampling = ["--mode", "base", "--model", world.sd, "--num_inference_steps", 2]
    sampling += ["--num_images", 1, "--prompts", "odd.txt", "--out", "images"]
    assert run_script(combined_sample, *sampling) == 0
    lines = Path("images/metadata.jsonl").read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    assert texts == [line.strip() for line in odd.split("\n")]
