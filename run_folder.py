"""The plumbing around a run: its settings, log, sample pictures and exact resume. No method here.

  config.json                 the method, every setting, the model's exact source, and the sampler
  log.jsonl                   one line per update
  samples/step_000060.png     held-out prompts at fixed seeds, to flip through
  index.html                  all of this in one page: open it in a browser
  lora/                       the weights for the user, with snapshots lora/step_000060/ and so on
  checkpoint/state.pt         what --resume reads

A run folder is started once and then resumed as often as needed. A killed run loses only the
updates since its last checkpoint. On a CPU, the files of a resumed run are the same, byte for byte,
as those of a run that was never stopped, except for the seconds in the log. On CUDA, some of
torch's backward passes differ in the last digits from run to run.

Under torchrun, several processes with a GPU each divide the images of an update among themselves.
The numbers do not depend on how many there are, except for the last digits, which depend on the
order of sums.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from torchvision.utils import make_grid
from tqdm import tqdm

from common import base_model, decode_in_parts, generator, initial_latents, make_scheduler, merged
from common import pick_device, sample
from data.prompts import condition
from models import FAMILIES, MODELS
from models.hub import find_pipeline, read_json
from pages.make import run_page

# Settings that do not change the numbers may differ when a run is resumed.
MAY_DIFFER = ("train_steps", "micro_batch", "checkpointing", "compile", "save_every")
NOT_SAVED = ("resume", "out", "device")
CHECKPOINT = Path("checkpoint") / "state.pt"  # in the run folder
# Settings that must be 1 or more. A guidance scale of 1 means no guidance.
AT_LEAST_ONE = (
    "train_steps", "batch_size", "micro_batch", "save_every", "num_inference_steps", "num_images",
    "images_per_prompt", "max_images", "guidance_scale", "base_guidance_scale",
)


# --------------------------------------------------------------------------------------------------
# Settings


class SettingsHelp(argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as it is written, and the defaults of the chosen model."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        if action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


def settings_parser(name, doc):
    """An argparse parser for NAME.py, whose --help shows the script's docstring verbatim."""
    return argparse.ArgumentParser(
        f"{name}.py", description=doc, formatter_class=SettingsHelp, allow_abbrev=False
    )


def chosen_model(argv=None):
    """The --model on the command line, which we must know before we read the other flags."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", default="toy")
    return finder.parse_known_args(argv)[0].model


def model_family(model):
    """The key of MODELS whose settings fit a model: its own, or one of the same family."""
    if model in MODELS:
        return model
    pipeline_class, _ = find_pipeline(model)
    family = FAMILIES[pipeline_class]
    config, _ = read_json(model, f"{family.DENOISER}/config.json")
    return family.settings_row(config)


def settings_for(table, model):
    """A model's row of a settings table. A folder or hub model keeps its own resolution."""
    family = model_family(model)
    if family not in table:
        sys.exit(f"--model {model}: there are no settings for it. Use {', '.join(table)}")
    if model in MODELS:
        return table[family]
    return {**table[family], "resolution": None}


def run_name(script, args):
    """The default --out, for example runs/refl-toy-toy_pref."""
    # Of a reward in FILE.py:NAME, only the name.
    reward = re.sub(r"[^,]*\.py:", "", args.reward)
    name = f"{script}-{args.model}-{reward}"
    return str(Path("runs") / re.sub(r"[^\w.-]+", "_", name))


def check_ranges(args):
    """Exits if one of the settings AT_LEAST_ONE is less."""
    for name in AT_LEAST_ONE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            sys.exit(f"--{name} {value:g}: it must be 1 or more")


def check_out(args):
    """Exits if --out has a run that we would overwrite, or if --resume finds no run there."""
    out = Path(args.out)
    has_run = (out / "config.json").is_file()
    if args.resume and not has_run:
        sys.exit(f"--resume: there is no run in {args.out}; name its folder with --out")
    if has_run and not args.resume:
        sys.exit(f"{args.out} already holds a run: pass --resume, or choose another --out")
    # Run.save writes index.html after the checkpoint. Without this check, a run whose checkpoint
    # was deleted would start over and overwrite its log and weights.
    has_lost_checkpoint = (out / "index.html").is_file() and not (out / CHECKPOINT).is_file()
    if args.resume and has_lost_checkpoint:
        sys.exit(f"--resume: {out / CHECKPOINT} is missing, so the run cannot be continued")


def papers_settings(args, paper):
    """The row of the table PAPER for this run's model; {} if the paper has none."""
    return paper.get(model_family(args.model), {})


def print_settings(args, paper, params):
    """Prints every setting, with the paper's value beside it where ours differs."""
    paper_row = papers_settings(args, paper)
    for name, value in vars(args).items():
        line = f"  {name:<20} {value}"
        if paper_row.get(name) not in (None, value):
            line += f"   (paper: {paper_row[name]})"
        print(line)
    print(f"  training {sum(p.numel() for p in params):,} parameters")
    if not paper_row:
        print("  The paper has no settings for this model: all values are ours")


@contextlib.contextmanager
def readable_errors(args):
    """Inside this context, Ctrl-C, a full GPU and an unusable file print one line and exit."""
    hint = ""
    try:
        yield
    except (KeyboardInterrupt, torch.OutOfMemoryError, OSError, SafetensorError) as error:
        out = getattr(args, "out", None)
        if out and (Path(out) / CHECKPOINT).is_file():
            hint = ". The last checkpoint is intact: repeat the command with --resume to continue"
        if isinstance(error, KeyboardInterrupt):
            print(f"\ninterrupted{hint}", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, torch.OutOfMemoryError):
            # torch's message goes on for a page. Its first sentences say what did not fit.
            what, is_free, _ = str(error).partition(" is free")
            advice = "Lower --micro_batch, then pass --checkpointing, then lower --batch_size"
            if not hasattr(args, "checkpointing"):
                advice = "Lower --micro_batch or --batch_size"
            sys.exit(f"\n{what}{is_free}. {advice}{hint}")
        sys.exit(f"\n{error}{hint}")
    except RuntimeError as error:
        # The processes that read images ahead pass them on in shared memory.
        if "shared memory" not in str(error):
            raise
        sys.exit(f"\n{error}. In Docker, start the container with --ipc=host")


# --------------------------------------------------------------------------------------------------
# Several GPUs


@contextlib.contextmanager
def joined_processes(args):
    """Inside this context, the processes that torchrun started work together.

    The main process writes all files and prints. Without torchrun, this does nothing.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # By default, CUDA tensors travel by NCCL and CPU tensors by gloo.
    dist.init_process_group()
    # parse_args has checked that --out is free. Wait until every process has done so, before one
    # of them creates the folder.
    wait_for_all()
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")
    yield
    # After an error we do not get here: the process exits, and torchrun ends the others.
    dist.destroy_process_group()


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def process_number():
    """0 .. num_processes() - 1. The main process has number 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process():
    return process_number() == 0


def own_part(items):
    """This process's part of a list, range or tensor. Without torchrun, that is all of it."""
    total = len(items)
    if total < num_processes():
        sys.exit(f"{num_processes()} processes, but only {total} images or prompts: start fewer")
    first = total * process_number() // num_processes()
    last = total * (process_number() + 1) // num_processes()
    return items[first:last]


def gather(rows, total):
    """The rows (n, ...) of this process's part -> those of all processes (total, ...)."""
    if num_processes() == 1:
        return rows
    # Every process fills its own rows of a tensor of zeros, and the sum has them all. Unlike with
    # all_gather, the parts may differ in length. own_part is a view, so copy_ writes into it.
    everything = rows.new_zeros(total, *rows.shape[1:])
    own_part(everything).copy_(rows)
    return sum_processes(everything)


def sum_processes(tensor):
    """The sum of the tensors of all processes, in place."""
    if num_processes() > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            # An OSError, of which readable_errors prints one line.
            raise ConnectionError("another process of this run has ended") from error
    return tensor


def sum_gradients(params):
    """Adds up the gradients of all processes, in a single exchange."""
    if num_processes() == 1:
        return
    flat = sum_processes(torch.cat([p.grad.flatten() for p in params]))
    parts = flat.split([p.numel() for p in params])
    for p, part in zip(params, parts):
        p.grad.copy_(part.view_as(p))


def wait_for_all():
    """Returns once all processes are here, or raises an error if one has ended."""
    sum_processes(torch.zeros(1))


# --------------------------------------------------------------------------------------------------
# Pictures


def to_pil(image):
    """(3, H, W) in [0, 1] -> PIL image, rounded to 8 bits."""
    pixels = (image.detach().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_grid(images, path, columns, captions=(), labels=None):
    """Images (N, 3, H, W) in [0, 1] -> one PNG, row by row. Small images are enlarged.

    captions: a text for each N / len(captions) images. labels: what each of these images shows.
    Both go into the PNG's metadata, where the run's page finds them.
    """
    if not is_main_process():
        return
    zoom = max(1, 128 // images.shape[-1])
    images = F.interpolate(images.detach(), scale_factor=zoom, mode="nearest")
    info = PngInfo()
    if captions:
        labels = labels or [""] * (len(images) // len(captions))
        grid = dict(columns=min(columns, len(images)), captions=captions, labels=labels)
        info.add_text("grid", json.dumps(grid))
    # After a kill, the page must not find half a picture.
    temporary = path.with_name(path.name + ".tmp")
    picture = to_pil(make_grid(images, nrow=columns, padding=0))
    picture.save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)


@torch.no_grad()
def generate_batches(
    model, prompts, seed, sampler, num_images=1, micro_batch=8, purpose="image", batch_size=16
):
    """Yields images (up to batch_size, 3, H, W) in [0, 1] on the CPU, prompt by prompt.

    Image k of prompt i has the noise of generator(seed, purpose, i, k), whatever batch it is in.
    sampler: dict(scheduler, eta, num_inference_steps, guidance_scale), as in config.json. With
    base_steps in it, the base model takes that many first steps.
    """
    scheduler = make_scheduler(model, sampler["scheduler"], sampler["num_inference_steps"])
    guidance_scale = sampler["guidance_scale"]
    base_steps = sampler.get("base_steps", 0)
    # Under torchrun, each process makes its part of the images.
    jobs = own_part([(i, k) for i in range(len(prompts)) for k in range(num_images)])
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        generators = [generator(seed, purpose, i, k) for i, k in batch]
        latents = initial_latents(model, generators)
        cond = condition(model, [prompts[i] for i, _ in batch])
        uncond = condition(model, [None] * len(batch))
        num_steps = len(scheduler.timesteps)
        if base_steps:
            with base_model(model):
                latents = sample(
                    model, scheduler, latents, cond, 0, base_steps, generators,
                    guidance_scale, uncond, sampler["eta"],
                )
        with merged(model):
            latents = sample(
                model, scheduler, latents, cond, base_steps, num_steps, generators,
                guidance_scale, uncond, sampler["eta"],
            )
        yield decode_in_parts(model, latents, micro_batch)


def generate(model, prompts, seed, sampler, num_images=1, *args, **kwargs):
    """All images of generate_batches in one tensor (len(prompts) * num_images, 3, H, W)."""
    batches = generate_batches(model, prompts, seed, sampler, num_images, *args, **kwargs)
    return gather(torch.cat(list(batches)), len(prompts) * num_images)


def with_parts(reward, r):
    """r (B,), which `reward` has just returned -> (B, 1 + K): r, and the K parts of a sum."""
    parts = getattr(reward, "parts", {})
    return torch.stack([r, *parts.values()], 1).detach()


def reward_columns(reward, rewards, name="reward"):
    """Rows (N, 1 + K) of with_parts -> {"reward": (N,), "reward_hps": (N,), ...}."""
    names = [name]
    for part in getattr(reward, "parts", {}):
        names.append(f"{name}_{part}")
    return dict(zip(names, rewards.unbind(1)))


def reward_means(reward, rewards, name="reward"):
    """Rows (N, 1 + K) of with_parts -> {"reward": mean, "reward_hps": mean, ...} for the log."""
    columns = reward_columns(reward, rewards, name)
    return {name: column.mean().item() for name, column in columns.items()}


def describe_reward(stats):
    """A dict with test_reward, and test_reward_NAME for the parts of a sum -> text."""
    parts = []
    for name, value in stats.items():
        if name.startswith("test_reward_"):
            parts.append(f"{name.removeprefix('test_reward_')} {value:.4f}")
    text = f"{stats['test_reward']:.4f}"
    return f"{text} ({', '.join(parts)})" if parts else text


@torch.no_grad()
def score_with_parts(reward, images, prompts, batch_size=16):
    """Images (N, 3, H, W) -> rewards (N, 1 + K) as in with_parts, on the CPU."""
    rewards = []
    for i in range(0, len(images), batch_size):
        r = reward(images[i : i + batch_size], prompts[i : i + batch_size])
        rewards.append(with_parts(reward, r).cpu())
    return torch.cat(rewards)


def score(reward, images, prompts, batch_size=16):
    """Rewards (N,) of images (N, 3, H, W) on the CPU, `batch_size` at a time."""
    return score_with_parts(reward, images, prompts, batch_size)[:, 0]


def held_out_images(run, model, prompts, num_images):
    """Samples held-out prompts, always with the same noise -> (N, 3, H, W) on the CPU."""
    return generate(
        model, prompts, run.args.seed, run.sampler, num_images, run.args.micro_batch, "held-out"
    )


def held_out(run, model, reward, prompts, step, num_images=2):
    """Samples held-out prompts at fixed seeds -> {"test_reward": its mean, ...} for the log.

    The images go to samples/. For a sum, there is also the mean of every part.
    """
    images = held_out_images(run, model, prompts, num_images)
    save_grid(images, run.dir / "samples" / f"step_{step:06d}.png", columns=8, captions=prompts)
    prompt_per_image = [prompt for prompt in prompts for _ in range(num_images)]
    rewards = score_with_parts(reward, images.to(model.device), prompt_per_image)
    means = reward_means(reward, rewards, "test_reward")
    if step == 0:
        run.note_before(**means)
    return means


# --------------------------------------------------------------------------------------------------
# The run folder


def write_atomically(path, text):
    """Writes a file so that readers see all of it or the old one, even after kill -9."""
    if not is_main_process():
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def lock_folder(folder):
    """Exits if another process is training in this run folder -> the lock, to be kept.

    It ends with the process, even after kill -9.
    """
    path = folder / "checkpoint" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(f"another process is training in {folder}: wait until it has ended, or end it")
    return lock


class Run:
    """A run folder, as described at the top of this file."""

    def __init__(self, args, model_source, sampler, method="", paper=None, fixed=()):
        """method: its name, as in "refl". paper: the table PAPER of the script.

        fixed: settings of MAY_DIFFER that change the numbers of this method.
        """
        self.args = args
        self.sampler = sampler
        self.method = method
        self.paper = papers_settings(args, paper) if paper else None
        self.fixed = fixed
        self.dir = Path(args.out)
        self.weights = self.dir / ("lora" if getattr(args, "lora_rank", 0) else "model")
        self.checkpoint = self.dir / CHECKPOINT
        self.start = 0  # the updates that are already done
        self.skipped = []  # the updates that were skipped

        self.config = {"method": method}
        for name, value in vars(args).items():
            if name not in NOT_SAVED:
                self.config[name] = value
        self.config.update(model_source=model_source, sampler=sampler)
        # A round trip through JSON turns tuples into lists, so that old and new can be compared.
        self.config = json.loads(json.dumps(self.config))
        if args.resume:
            old = json.loads((self.dir / "config.json").read_text())
            self.check_config(old)
            # Keep what was added to the settings later, such as the values before training.
            self.config = {**old, **self.config}
        if is_main_process():
            # Another run may have started here while this one was loading its models.
            check_out(args)
            self.lock = lock_folder(self.dir)
        (self.dir / "samples").mkdir(parents=True, exist_ok=True)
        # A run that was stopped before its first checkpoint starts over.
        if not (args.resume and self.checkpoint.is_file()):
            if args.resume:
                print("--resume: this run has no checkpoint yet, so it starts over")
            self.write_config()
            write_atomically(self.dir / "log.jsonl", "")
        wait_for_all()

    def check_config(self, old):
        """Exits if a setting that changes the numbers differs from the run's, `old`."""
        changes = []
        for name, value in self.config.items():
            is_checked = name in self.fixed or name not in MAY_DIFFER
            if is_checked and value != old.get(name):
                changes.append(f"{name} was {old.get(name)!r} and is {value!r}")
        if changes:
            remedy = "Change them back, or choose another --out"
            sys.exit(f"--resume: settings differ from the run's: {'; '.join(changes)}. {remedy}")

    def note_before(self, **values):
        """Adds held-out values of the untrained model to config.json; the log begins after them."""
        before = self.config.setdefault("before", {})
        for name, value in values.items():
            before[name] = float(f"{value:.8g}")
        self.write_config()

    def write_page(self):
        """Writes index.html from the files of this folder."""
        path = self.dir / "index.html"
        rows = self.read_log()
        try:
            text = run_page(self.dir / "samples", self.method, self.config, rows, self.paper)
            write_atomically(path, text)
        except Exception as error:
            # Whatever is wrong with a page or a picture, it must not end the training.
            tqdm.write(f"{path} is not up to date: {error!r}", file=sys.stderr)

    def write_config(self):
        write_atomically(self.dir / "config.json", json.dumps(self.config, indent=1) + "\n")

    def resume(self, params, optimizer):
        """Loads the weights and the optimizer's state from the checkpoint, and sets .start.

        Returns everything in the checkpoint, or None if this is a new run.
        """
        if not (self.args.resume and self.checkpoint.is_file()):
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (EOFError, LookupError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            sys.exit(f"--resume: {self.checkpoint} is damaged. {type(error).__name__}: {reason}")
        self.start = state["step"]
        if self.args.train_steps < self.start:
            sys.exit(f"--train_steps {self.args.train_steps}: the run is at {self.start} already")
        for p, saved in zip(params, state["params"], strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        # The log may extend past the checkpoint. Those updates are run again.
        rows = [row for row in self.read_log() if row["step"] <= self.start]
        self.skipped = [row["step"] for row in rows if "skipped" in row]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.dir / "log.jsonl", text)
        self.write_config()
        if is_main_process():
            self.write_page()
        # From here on, every process may read the log.
        wait_for_all()
        return state

    def read_log(self):
        """The rows of log.jsonl. A last line that was cut short by a kill is dropped."""
        lines = (self.dir / "log.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, step, **values):
        """Appends a line to log.jsonl. Floats have 8 digits. Values that are None are omitted."""
        if not is_main_process():
            return
        row = dict(step=step)
        for name, value in values.items():
            if isinstance(value, float):
                value = float(f"{value:.8g}")
            if value is not None:
                row[name] = value
        with open(self.dir / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def skip(self, step):
        """Records and reports a skipped update. Five in a row end the run."""
        self.skipped.append(step)
        message = f"update {step}: NaN or Inf in its loss, gradient or reward, skipped"
        if self.skipped[-5:] == list(range(step - 4, step + 1)):
            sys.exit(f"{message}. This is the fifth in a row; lower --lr")
        if is_main_process():
            tqdm.write(f"{message} ({len(self.skipped) - 1} skipped before)", file=sys.stderr)

    def save(self, step, model, params, optimizer, **more):
        """Writes the user's weights, a snapshot, the checkpoint with `more`, and index.html."""
        if is_main_process():
            self.write_checkpoint(step, model, params, optimizer, more)
            self.write_page()
        wait_for_all()

    def write_checkpoint(self, step, model, params, optimizer, more):
        """Writes all files to a temporary folder first and then moves them, the checkpoint last."""
        new = self.dir / "new.tmp"
        shutil.rmtree(new, ignore_errors=True)
        weights = new / self.weights.name
        for folder in (weights, weights / f"step_{step:06d}"):
            model.save(folder)
        state = dict(step=step, optimizer=optimizer.state_dict(), **more)
        state["params"] = [p.detach().cpu() for p in params]
        (new / "checkpoint").mkdir()
        try:
            torch.save(state, new / CHECKPOINT)
        except RuntimeError as error:
            # torch's message about a full disk does not say that it is one.
            raise OSError(f"{self.checkpoint}: cannot be written. Is the disk full?") from error

        files = [file for file in new.rglob("*") if file.is_file()]
        files.sort(key=lambda file: file.name == "state.pt")
        for file in files:
            target = self.dir / file.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        shutil.rmtree(new)
