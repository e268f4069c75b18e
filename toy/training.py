"""The training loop of all networks of the toy world: cosine learning rate, exact resume."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
WORK = ROOT / "work"  # checkpoints and caches of a build, not part of the repository
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rng_of(*key):
    """A NumPy generator for this key of strings and integers. All draws of the build use it.

    A string counts with its first 8 bytes.
    """
    numbers = []
    for part in key:
        if isinstance(part, str):
            part = int.from_bytes(part.encode()[:8], "little")
        numbers.append(part)
    return np.random.default_rng(numbers)


def to_batch(images):
    """A list of (H, W, 3) arrays in [0, 1] -> (B, 3, H, W) tensor on DEVICE."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(DEVICE)


def load_checkpoint(path, steps, seed, modules, optimizer, average):
    """Puts a checkpoint back in place -> the number of steps that are done, 0 if there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=DEVICE, weights_only=True)
    if state["steps"] != steps or state["seed"] != seed:
        raise SystemExit(
            f"{path.name} belongs to a build of {state['steps']} steps with seed {state['seed']}: "
            f"remove {path.parent} to start again"
        )
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    optimizer.load_state_dict(state["opt"])
    for mean, saved in zip(average, state["average"]):
        mean.copy_(saved)
    return state["step"]


def save_checkpoint(path, step, steps, seed, modules, optimizer, average):
    """Writes the checkpoint beside its place, then renames it: a killed build keeps the old one."""
    state = dict(step=step, steps=steps, seed=seed, opt=optimizer.state_dict(), average=average)
    state["modules"] = {name: module.state_dict() for name, module in modules.items()}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def fit(
    name, modules, step_fn, steps, lr,
    seed=0, weight_decay=0.01, warmup=100, ema=0.0, save_seconds=60, clip=1.0, stop=None,
):
    """Trains `modules`, a dict of nn.Modules, in place for `steps` steps of AdamW.

    step_fn(step, rng) -> loss, stats: draws its batch from `rng` alone, a generator of (name, seed,
      step). It returns a scalar loss and a dict of numbers to show.
    ema: if above 0, the modules end as the exponential moving average of their weights.
    stop: end after so many steps, before the learning rate has come down.

    The state is saved to WORK/<name>.pt every `save_seconds` and picked up again. So a killed build
    continues, and ends with the same weights. Returns running means of what it showed. The modules
    come back frozen and in eval mode.
    """
    WORK.mkdir(exist_ok=True)
    path = WORK / f"{name}.pt"
    params = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    average = [p.detach().clone() for p in params] if ema else []
    start = load_checkpoint(path, steps, seed, modules, optimizer, average)
    last_step = stop or steps

    for module in modules.values():
        module.train()
    shown = {}
    saved_at = time.time()
    progress = tqdm(
        range(start, last_step), initial=start, total=last_step, desc=name, mininterval=10
    )
    for step in progress:
        # Warm up, then a cosine down to 1 % of the learning rate.
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * cosine

        # Dropout and the VAE's posterior draw from torch's generator. A tuple of integers has the
        # same hash everywhere.
        torch.manual_seed(hash((seed, step)) % 2**31)
        loss, stats = step_fn(step, rng_of(name, seed, step))
        if not torch.isfinite(loss):
            raise SystemExit(f"{name}: the loss of step {step} is not finite")

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()

        # The average has a short memory at first, or it would remember the random start.
        decay = min(ema, (1 + step) / (10 + step))
        for mean, p in zip(average, params):
            mean.lerp_(p.detach(), 1 - decay)

        # Show running means.
        for key, value in {"loss": loss, **stats}.items():
            value = float(value.detach()) if torch.is_tensor(value) else float(value)
            shown[key] = 0.98 * shown[key] + 0.02 * value if key in shown else value
        progress.set_postfix({key: f"{value:.4f}" for key, value in shown.items()}, refresh=False)

        if time.time() - saved_at > save_seconds:
            save_checkpoint(path, step + 1, steps, seed, modules, optimizer, average)
            saved_at = time.time()

    if start < last_step:
        save_checkpoint(path, last_step, steps, seed, modules, optimizer, average)
    with torch.no_grad():
        for p, mean in zip(params, average):
            p.copy_(mean)
    for module in modules.values():
        module.eval().requires_grad_(False)
    return shown
