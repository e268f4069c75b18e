"""What may happen to a run, and what may be given to it: kills, full disks, NaN, bad files. tests/kills.py kills more often."""
import errno
import json
import math
import os
import resource
import shutil
import signal
import sys

import kills
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import combined_sample
import common
import diffdoctor
import evaluate
import refl
from common import TOY, launch

SCRIPTS = kills.SCRIPTS
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, {script: a command line that works})"""
    root = tmp_path_factory.mktemp("hardening")
    return root, kills.world(root)


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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)              # a shell's background jobs ignore it
    try:
        assert run(monkeypatch, refl, words, tmp_path / "run") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    (line,) = said(capsys)
    assert line.startswith("interrupted") and "checkpoint is whole" in line and "--resume" in line
    assert run(monkeypatch, refl, [*words, "--resume"], tmp_path / "run") == 0
    assert kills.result(tmp_path / "run") == kills.result(tmp_path / "whole")


def test_a_run_does_not_go_back(world, tmp_path, monkeypatch, capsys):
    """Resumed with fewer updates than it has had: its pictures and log stay as they are."""
    words = world[1]["refl"]
    assert run(monkeypatch, refl, words, tmp_path) == 0
    before = kills.result(tmp_path)
    assert run(monkeypatch, refl, [*words, "--resume", "--train_steps", 1], tmp_path) == 2
    assert "already, --train_steps is 1" in said(capsys)[-1] and kills.result(tmp_path) == before


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
    augment = diffdoctor.augment
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


# ------------------------------------------------------------------------------------------------------------------------------------
# bad input: one line, exit status 2, nothing written, nothing run


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def folder(root, name, row, image=None):
    """A folder with one image that is there and one row about it."""
    (root / name).mkdir()
    Image.new("RGB", (64, 64), "red").save(root / name / "x.png")
    if image is not None:
        (root / name / "x.png").write_bytes(image)
    (root / name / "metadata.jsonl").write_text((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return root / name


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory):
    """A folder of bad files. Whatever is run by mistake makes `ran` beside them."""
    root, ran = tmp_path_factory.mktemp("bad"), Code(tmp_path_factory.getbasetemp() / "ran")
    (root / "nul.txt").write_bytes(b"a red circle\0\n")
    (root / "nul_items.txt").write_bytes(b"a red circle\0 | circle\n")
    (root / "nul.json").write_text(json.dumps({"a": dict(train=[dict(prompt="a red circle\0", items=["circle"])], test=["x"])}))
    (root / "empty.txt").write_text("\n \n")
    (root / "utf16.txt").write_text("a red circle", encoding="utf-16")
    picture = (world[0] / "labelled" / "images" / "0.png").read_bytes()
    for name, row, image in (
            ("outside", dict(file_name="../x.png", text="a"), None), ("absolute", dict(file_name="/etc/passwd", text="a"), None),
            ("number", dict(file_name=5, text="a"), None), ("text", dict(file_name="x.png", text=5), None), ("nul", dict(file_name="x.png", text="\0"), None),
            ("nameless", dict(file_name="", text="a"), None), ("list", "[1]", None), ("cut", dict(file_name="x.png", text="a red circle"), picture[:300]),
            ("long", dict(file_name="x" * 5000, text="a"), None), ("nothing", "", None)):
        folder(root, name, row, image)
    for name, row in (("labels_outside", dict(file_name="../0.png", split="train", source="human")), ("labels_nameless", dict(file_name="", split="train", source="human"))):
        (root / name).mkdir()
        (root / name / "meta.jsonl").write_text(json.dumps(row) + "\n")
    lora = {f"unet.x.{part}.weight": torch.zeros(4, 4) for part in ("lora_A", "lora_B")}
    save_file(lora, root / "other.safetensors")
    save_file({k: v / 0 for k, v in lora.items()}, root / "nan.safetensors")
    save_file(lora | {"unet.y.lora_A.weight": torch.zeros(3, 4)}, root / "ranks.safetensors")
    (root / "cut.safetensors").write_bytes((root / "other.safetensors").read_bytes()[:100])
    torch.save({"x": ran}, root / "code.safetensors")
    torch.save({"x": ran}, root / "code.bin")
    torch.save({"a": torch.zeros(3)}, root / "other.bin")
    for name, index in (("list_model", []), ("video", {"_class_name": "CogVideoXPipeline"}), ("flux", {"_class_name": "FluxPipeline"}),
                        ("own_code", dict(json.loads((world[0] / "sd" / "model_index.json").read_text()), unet=["my_unet", "Net"])),
                        ("own_encoder", dict(json.loads((world[0] / "sd" / "model_index.json").read_text()), text_encoder=["transformers", "NoSuchModel"]))):
        (root / name).mkdir()
        for part in (world[0] / "sd").iterdir():
            if part.is_dir() and not (name == "own_code" and part.name == "unet"):
                os.symlink(part, root / name / part.name)
        (root / name / "model_index.json").write_text(json.dumps(index))
    (root / "flux" / "transformer").mkdir()
    (root / "flux" / "transformer" / "config.json").write_text("{}")
    (root / "own_code" / "unet").mkdir()
    (root / "own_code" / "unet" / "my_unet.py").write_text(f"import os\nos.mkdir({str(ran.path)!r})\n")
    (root / "own_code" / "unet" / "config.json").write_text('{"_class_name": "Net"}')
    (root / "own_detector").mkdir()
    (root / "own_detector" / "config.json").write_text(json.dumps(dict(model_type="mine", auto_map={"AutoModelForSemanticSegmentation": "mine.Net", "AutoConfig": "mine.C"})))
    (root / "own_detector" / "mine.py").write_text(f"import os\nos.mkdir({str(ran.path)!r})\n")
    (root / "own_detector" / "preprocessor_config.json").write_text("{}")
    return root


METHODS = ("refl", "imagerefl", "focus_n_fix", "treat", "dfusion_dpo")
PROMPTED, PICTURED = ("refl", "imagerefl", "focus_n_fix", "treat", "sample"), ("imagerefl", "treat", "detector", "score", "evaluate")
IMAGES = dict(imagerefl="--data", treat="--data", detector="--real", score="--images", evaluate="--reference")
TABLE = [  # scripts, flag (None: the images of each), value (a name without a blank: a file of `bad`), what the message holds
    (PROMPTED, "--prompts", "nul.txt", "NUL"), (PROMPTED, "--prompts", "empty.txt", "no prompt"), (PROMPTED, "--prompts", "utf16.txt", "UTF-8"),
    (METHODS, "--test_prompts", "nul.txt", "NUL"), (("dfusion_dpo",), "--prompts", "nul_items.txt", "NUL"), (("dfusion_dpo",), "--prompts", "nul.json", "wrong place"),
    (METHODS, "--prompts", "", "empty"), (METHODS, "--out", "", "empty"),
    (PICTURED, None, "outside", "outside the folder"), (PICTURED, None, "absolute", "outside the folder"), (PICTURED, None, "number", "expected"),
    (PICTURED, None, "text", ""), (PICTURED, None, "nul", ""), (PICTURED, None, "nameless", ""), (PICTURED, None, "list", "expected"),
    (PICTURED, None, "long", "too long"), (PICTURED, None, "nothing", "metadata.jsonl"), (("score", "evaluate"), None, "cut", ""),
    (("detector",), "--data", "labels_outside", "outside the folder"), (("detector",), "--data", "labels_nameless", "expected"),
    (METHODS, "--init_lora", "cut.safetensors", "safetensors"), (METHODS, "--init_lora", "code.safetensors", "safetensors"),
    (METHODS, "--init_lora", "code.bin", "no LoRA"), (METHODS, "--init_lora", "nan.safetensors", "finite"), (METHODS, "--init_lora", "ranks.safetensors", "one rank"),
    (METHODS, "--init_lora", "other.safetensors", "another model"), (("sample",), "--lora", "code.safetensors", "safetensors"),
    (("sample",), "--lora", "other.safetensors", "another model"), (("sample",), "--lora", "nan.safetensors", "finite"),
    (METHODS, "--model", "list_model", "model_index.json"), (METHODS, "--model", "video", "CogVideoXPipeline"),
    (METHODS, "--model", "flux", "flux"),
    (METHODS, "--model", "own_code", "own_code"), (METHODS, "--model", "own_encoder", "NoSuchModel"),
    (("treat", "focus_n_fix", "score"), "--detector", "code.bin", "code"), (("treat", "focus_n_fix", "score"), "--detector", "other.bin", "weights"),
    (("treat", "focus_n_fix", "score"), "--detector", "own_detector", "weights"), (METHODS, "--resolution", "-8 ", "at least 1"),
    (("refl", "imagerefl"), "--reward_scale", "nan ", "finite"), (("imagerefl",), "--diffusion_weight", "inf ", "diffusion_weight"),
    (("focus_n_fix",), "--beta", "inf ", "beta"), (("focus_n_fix", "treat"), "--guidance_scale", "nan ", "guidance"), (METHODS, "--lr", "nan ", "--lr"),
]


def tree(*roots):
    return {str(p): p.stat().st_mtime_ns for root in roots for p in root.rglob("*") if ".evaluate" not in p.parts}


def test_bad_input_is_one_line_and_leaves_nothing(world, bad, tmp_path, monkeypatch, capsys):
    root, words = world
    folder(root, "good", dict(file_name="x.png", text="a red circle"))
    words = words | dict(sample=["--mode", "base", "--model", str(root / "sd"), "--prompts", str(root / "one.txt"), "--num_inference_steps", "2", "--device", "cpu"],
                         score=["score", "--detector", str(TOY / "detector"), "--images", str(root / "good"), "--device", "cpu"],
                         evaluate=[str(root / "good"), "--metrics", "cov_dist", "--device", "cpu"])
    modules = SCRIPTS | dict(sample=combined_sample, score=diffdoctor, evaluate=evaluate)
    ran, before, problems, count = bad.parent / "ran", tree(root, bad), [], 0
    for names, flag, value, expected in TABLE:
        for name in names:
            path = str(bad / value) if value and " " not in value else value.strip()
            line = put(words[name], flag or IMAGES[name], path, *(["--mode", "tuned"] if flag == "--lora" else []))
            said(capsys)
            try:
                status = run(monkeypatch, modules[name], line, None if flag == "--out" else tmp_path / "out")
            except BaseException as e:                                    # show the whole table at once
                status = f"{type(e).__name__}: {e}"
            told, count = said(capsys), count + 1
            if status != 2 or len(told) != 1 or expected not in told[0] or (tmp_path / "out").exists() or ran.exists():
                problems.append((name, flag or IMAGES[name], value, status, told, (tmp_path / "out").exists(), ran.exists()))
    assert not problems, f"{len(problems)} of {count}:\n" + "\n".join(map(str, problems))
    assert tree(root, bad) == before and count > 100


def test_config_json_names_the_commit_of_a_hub_model(world, tmp_path, monkeypatch):
    """Whatever was said, a name or a branch: from a cache in the hub's layout, without a network."""
    import huggingface_hub.constants as hub
    root, commit = tmp_path / "models--nobody--tiny", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(world[0] / "sd", root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    for name in ("nobody/tiny", "nobody/tiny@main"):
        assert common.load_model(name, torch.device("cpu")).source == f"nobody/tiny@{commit}"
    assert run(monkeypatch, refl, put(world[1]["refl"], "--model", "nobody/tiny@main", "--train_steps", 1), tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["model"], config["model_source"]) == ("nobody/tiny@main", f"nobody/tiny@{commit}")


@pytest.mark.parametrize("content", ["cut", "code", "another", "empty", "shapes"])
def test_a_bad_checkpoint_is_not_resumed(world, tmp_path, monkeypatch, capsys, content):
    words, out, state = put(world[1]["refl"], "--train_steps", 2), tmp_path / "run", tmp_path / "run" / "checkpoint" / "state.pt"
    assert run(monkeypatch, refl, words, out) == 0
    good = torch.load(state, weights_only=True)
    if content in ("cut", "empty"):
        state.write_bytes(state.read_bytes()[:1000 if content == "cut" else 0])
    else:
        torch.save(dict(code=dict(good, step=Code(tmp_path / "ran")), another=[1], shapes=dict(good, params=[p[:1] for p in good["params"][::-1]]))[content], state)
    before = tree(out / "lora", out / "checkpoint"), (out / "log.jsonl").read_text()
    said(capsys)
    assert run(monkeypatch, refl, [*words, "--resume"], out) == 2
    (line,) = said(capsys)
    assert "does not continue this run" in line and not (tmp_path / "ran").exists()
    assert before == (tree(out / "lora", out / "checkpoint"), (out / "log.jsonl").read_text())


ODD = "\N{FIRE}\N{CAT} a red circle\n\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05dc\u05d5\u05dd\n" + "a very long prompt " * 500 + "\na\u0301 \u202e red\r\n"


def test_odd_prompts_are_good(world, tmp_path, monkeypatch):
    """Emoji, right-to-left text, 9,000 characters, a byte order mark."""
    (tmp_path / "odd.txt").write_text(ODD, encoding="utf-8-sig")
    (tmp_path / "items.txt").write_text("\N{FIRE} a red circle | circle\n\u05e9\u05dc\u05d5\u05dd a star | star\n", encoding="utf-8-sig")
    for script in METHODS:
        prompts = tmp_path / ("items.txt" if script == "dfusion_dpo" else "odd.txt")
        assert run(monkeypatch, SCRIPTS[script], put(world[1][script], "--prompts", prompts, "--test_prompts", tmp_path / "odd.txt", "--train_steps", 1),
                   tmp_path / script) == 0
    words = ["--mode", "base", "--model", world[0] / "sd", "--prompts", tmp_path / "odd.txt", "--num_inference_steps", 2, "--num_images", 2, "--device", "cpu"]
    assert run(monkeypatch, combined_sample, words, tmp_path / "images") == 0
    rows = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [row["text"] for row in rows[::2]] == [line.strip() for line in ODD.split("\n") if line]
    assert run(monkeypatch, evaluate, [tmp_path / "images", "--metrics", "toy_pref,dino_div", "--dino", "toy", "--device", "cpu"], tmp_path / "results.json") == 0
