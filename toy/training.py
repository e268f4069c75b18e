"""The training loop that every network of the toy world shares: cosine learning rate, a progress bar, exact resume. See make.py."""
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
WORK = ROOT / "work"                                             # checkpoints and caches of a build; not part of the repository
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rng_of(*key):
    """A NumPy generator for this key of strings and integers: every draw of the build comes from one of these."""
    return np.random.default_rng([int.from_bytes(k.encode()[:8], "little") if isinstance(k, str) else k for k in key])


def to_batch(images):
    """A list of (H, W, 3) arrays in [0, 1] -> (B, 3, H, W) tensor on DEVICE."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(DEVICE)


def fit(name, modules, step_fn, steps, lr, seed=0, weight_decay=.01, warmup=100, ema=0., save_seconds=60, clip=1., stop=None):
    """Trains `modules` (a dict name -> nn.Module, updated in place) for `steps` steps of AdamW.

    step_fn(step, rng) -> loss, stats: draws its batch from `rng` alone (a generator of (name, seed, step)) and returns a scalar loss and
    a dict of floats to show. The state is saved every `save_seconds` in WORK/<name>.pt and picked up again, so a killed build continues
    and ends in the same weights. With `ema` > 0 the modules end as the exponential moving average of their weights. `stop` ends the training
    before the learning rate has come down.
    """
    WORK.mkdir(exist_ok=True)
    path, tmp = WORK / f"{name}.pt", WORK / f"{name}.tmp"
    params = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, betas=(.9, .99))
    average = [p.detach().clone() for p in params] if ema else []
    start = 0
    if path.exists():
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        if state["steps"] != steps or state["seed"] != seed:
            raise SystemExit(f"{path.name} belongs to a build of {state['steps']} steps, seed {state['seed']}: remove {WORK} to start again")
        for key, m in modules.items():
            m.load_state_dict(state["modules"][key])
        opt.load_state_dict(state["opt"])
        for a, b in zip(average, state["average"]):
            a.copy_(b)
        start = state["step"]

    def save(step):
        torch.save(dict(step=step, steps=steps, seed=seed, modules={k: m.state_dict() for k, m in modules.items()}, opt=opt.state_dict(),
                        average=average), tmp)
        tmp.replace(path)

    for m in modules.values():
        m.train()
    shown, last = {}, time.time()
    for step in (bar := tqdm(range(start, stop or steps), initial=start, total=stop or steps, desc=name, mininterval=10)):
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (.5 + .5 * math.cos(math.pi * step / steps) + .01)
        torch.manual_seed(hash((seed, step)) % 2**31)            # dropout and the VAE's posterior; a tuple of integers hashes the same everywhere
        loss, stats = step_fn(step, rng_of(name, seed, step))
        if not torch.isfinite(loss):
            raise SystemExit(f"{name}: the loss of step {step} is not finite")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, clip)
        opt.step()
        for a, p in zip(average, params):                        # a short memory at first: the average must not remember the random start
            a.lerp_(p.detach(), 1 - min(ema, (1 + step) / (10 + step)))
        for k, v in {"loss": loss, **stats}.items():
            v = float(v.detach()) if torch.is_tensor(v) else float(v)
            shown[k] = v if k not in shown else .98 * shown[k] + .02 * v
        bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
        if time.time() - last > save_seconds:
            save(step + 1)
            last = time.time()
    if start < (stop or steps):
        save(stop or steps)
    with torch.no_grad():
        for p, a in zip(params, average):
            p.copy_(a)
    for m in modules.values():
        m.eval().requires_grad_(False)
    return shown
