"""The README's commands are those of the scripts: each is parsed by its script's own parser, and the fork it describes is made."""
import re
import shlex
import sys

import diffdoctor
import dfusion_dpo
import evaluate
import focus_n_fix
import imagerefl
import kills
import pytest
import refl
import torch
from safetensors.torch import load_file, save_file

import combined_sample
from common import ROOT, launch
from prompts import coco

SCRIPTS = {f"{m.__name__.replace('prompts.coco', 'prompts/coco')}.py": m for m in (
    refl, imagerefl, diffdoctor, focus_n_fix, dfusion_dpo, combined_sample, evaluate, coco)}
FORK = {"mine.py": refl}                                                  # the README's copy of it
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)
INLINE = re.findall(r"`([^`]+)`", re.sub(r"^```\n.*?^```$", "", README, flags=re.M | re.S))
COMMANDS = [re.search(r"python [\w/]+\.py.*", " ".join(line.split("#")[0].split())) for line in [*"\n".join(BLOCKS).splitlines(), *INLINE]]
COMMANDS = [found[0] for found in COMMANDS if found and not found[0].startswith(("python tests/", "python toy/"))]


def test_the_readme_has_commands_of_every_script():
    assert {command.split()[1] for command in COMMANDS} == {*SCRIPTS, *FORK}


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_of_the_readme_parses(command, tmp_path, monkeypatch):
    """In a folder with what the command names, as far as the parser looks."""
    monkeypatch.chdir(tmp_path)
    for folder in ("toy", "prompts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for run in re.findall(r"--lora (\S+)", command):
        (tmp_path / run / "lora").mkdir(parents=True)
    for lora in re.findall(r"--init_lora (\S+)", command):
        (tmp_path / lora).mkdir()
        save_file({"unet.x.lora_A.weight": torch.zeros(16, 4)}, tmp_path / lora / "pytorch_lora_weights.safetensors")
    _, script, *words = shlex.split(command)
    args = (SCRIPTS | FORK)[script].parse_args(words)
    assert vars(args)


def test_a_fork_by_the_readmes_words(tmp_path, monkeypatch):
    """Copy refl.py, change its loss, run it: the fork trains, and otherwise than refl.py."""
    words = kills.world(tmp_path)["refl"]
    text = (ROOT / "refl.py").read_text()
    changed = text.replace("return -reward_scale * ((r - shift) / scale).mean()", "return reward_scale * ((r - shift) / scale).mean()")
    assert changed != text
    ends = []
    for name, source in (("plain", text), ("fork", changed)):
        script = {"__name__": name}
        exec(compile(source, f"{name}.py", "exec"), script)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--out", str(tmp_path / name)])
        launch(script["parse_args"], script["main"])
        ends.append(load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors"))
    assert any(not torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_help_is_a_page_or_two(capsys):
    for module, words in [(m, []) for m in SCRIPTS.values()] + [(diffdoctor, [c]) for c in diffdoctor.COMMANDS]:
        with pytest.raises(SystemExit) as stop:
            module.parse_args([*words, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and 20 < text.count("\n") <= 100 and "python" in text
