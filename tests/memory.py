"""How much memory an update of a script needs at its peak, computed without a GPU.

We run the script's own update on tensors that have a shape and a data type, but no data (torch's
FakeTensors), and note when each of them is made and freed. So an update of a full-size model takes
seconds on a CPU. What is counted: the weights of the model and the reward, the LoRA, its gradients
and Adam's moments, what autograd saves, and what lives only for a moment.

What is not counted: the CUDA context, the workspaces of cuDNN and cuBLAS, and the gaps that the
allocator leaves. RESERVE is set aside for these. Nor are the text encoders counted, which a run
frees unless it has too many prompts for encode_once in data/prompts.py: SDXL's take 1.5 GiB in
bf16, and stay with COCO's captions. The sampling of held-out images is not counted, either.

A peak grows in a straight line with the images in a batch, so we compute one and two images, and
continue the line. `python tests/bench.py memory` prints the tables of results/memory.md.
"""

import contextlib
import importlib
import weakref
from dataclasses import dataclass, replace

import bench
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
GIB = 2**30
RESERVE = 2.0  # GiB of a card that we leave free
CARDS = (12, 16, 24, 48, 80)  # GB


# --------------------------------------------------------------------------------------------------
# Tensors without data


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of the FakeTensors that are alive, and their peak in each phase.

    Other tensors are left alone: random draws, timesteps and prompts are real, as those in the
    CPU's memory are on a machine with a GPU.
    """

    def __init__(self):
        super().__init__()
        self.sizes = {}  # address of a storage: its bytes
        self.bytes = 0
        self.phase = "start"
        self.peaks = {}  # phase: the most bytes in it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if is_fake and func is torch.ops.aten._local_scalar_dense.default:
            # The script asks for a number, for its log. Without data there is none.
            return 0.0
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor):
                self.add(x)
        return out

    def add(self, x):
        storage = x.untyped_storage()
        address = storage._cdata
        if address in self.sizes:
            return
        self.sizes[address] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.note()
        weakref.finalize(storage, self.drop, address)

    def drop(self, address):
        self.bytes -= self.sizes.pop(address)

    def note(self):
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.bytes)

    # What bench.with_marks calls where the phases of an update begin.
    def mark(self, phase):
        self.phase = phase
        self.note()

    def mark_in_backward(self, x, phase):
        if x.requires_grad:
            x.register_hook(lambda gradient: self.mark(phase))


def remove_data(module, mode):
    """Replaces the parameters and buffers of a module that still have data by FakeTensors."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not isinstance(p, FakeTensor):
                fake = mode.from_tensor(p.detach())
                part._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)
        for name, x in part._buffers.items():
            if x is not None and not isinstance(x, FakeTensor):
                part._buffers[name] = mode.from_tensor(x)


@contextlib.contextmanager
def autocast_of_cuda():
    """Inside, the CPU's autocast does what CUDA's does: it also runs norms in fp32.

    Both run convolutions, linear layers and attention in bf16. A FakeTensor on a CPU takes the
    CPU's rules, and one on a GPU has no backward pass on a machine without a GPU.
    """

    def in_fp32(op):
        def run(*args):
            args = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
            ):
                return op(*args)

        return run

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("layer_norm", "group_norm"):
            library.impl(name, in_fp32(getattr(torch.ops.aten, name)), "AutocastCPU")
        yield


# --------------------------------------------------------------------------------------------------
# The peak of an update


class EndOfUpdate(Exception):
    """Ends a run in or after its first update."""


class FirstUpdate:
    """Stands for bench.Meter: lets one update run, inside `around`."""

    def __init__(self, clock, around):
        self.clock = clock
        self.around = around

    @contextlib.contextmanager
    def update(self, step):
        with self.around():
            yield
        raise EndOfUpdate


@dataclass
class Peak:
    """Bytes of an update."""

    resting: int  # weights, LoRA, its gradients and Adam's moments
    phases: dict  # {phase: the peak in it}

    @property
    def total(self):
        return max(self.phases.values())


def models(row, tiny):
    """The model, reward and detector of a bench.Row, on the CPU."""
    model = bench.random_model(row.family, CPU, row.resolution, tiny)
    reward = bench.random_reward(CPU, tiny)
    detector = bench.random_detector(CPU, tiny) if row.script == "diffdoctor" else None
    return model, reward, detector


def modules_of(model, reward, detector):
    found = [model.denoiser, model.vae, reward.clip]
    return found if detector is None else [*found, detector]


def computed_peak(row, tiny=False, dtype=torch.bfloat16):
    """The Peak of an update of a bench.Row, computed without data.

    dtype: of the frozen weights, which is bf16 on a GPU. There the VAE is always checkpointed.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def build(make, device, dtype):
        """bench.build without random numbers."""
        torch.set_default_dtype(dtype)
        try:
            with mode:
                return make().eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)

    with bench.replaced(bench, build=build, default_dtype=lambda device: dtype):
        model, reward, detector = models(row, tiny)
    live = LiveBytes()
    for module in modules_of(model, reward, detector):
        remove_data(module, mode)
        for x in [*module.parameters(), *module.buffers()]:
            live.add(x)
    if dtype == torch.bfloat16:
        model.vae.enable_gradient_checkpointing()

    script = importlib.import_module(row.script)
    make_real = script.make_trainable
    num_params = 0

    def make_trainable(*args, **kwargs):
        nonlocal num_params
        make_real(*args, **kwargs)
        remove_data(model.denoiser, mode)
        params = [p for p in model.denoiser.parameters() if p.requires_grad]
        for p in params:
            live.add(p)
        num_params = sum(p.numel() for p in params)
        return params

    resting = 0

    @contextlib.contextmanager
    def around():
        nonlocal resting
        resting = live.bytes
        live.peaks.clear()
        live.mark("prefix")
        yield

    def step(optimizer):
        raise EndOfUpdate

    with contextlib.ExitStack() as stack:
        stack.enter_context(live)
        stack.enter_context(autocast_of_cuda())
        stack.enter_context(bench.replaced(script, make_trainable=make_trainable))
        stack.enter_context(bench.replaced(torch.optim.AdamW, step=step))
        stack.enter_context(contextlib.suppress(EndOfUpdate))
        bench.run_row(row, model, reward, detector, FirstUpdate(live, around))
    # We stop where the first optimizer step begins. Later updates also hold Adam's two moments, and
    # later micro-batches the gradients of earlier ones: three fp32 numbers per parameter.
    later = 12 * num_params
    phases = {phase: peak + later for phase, peak in live.peaks.items()}
    return Peak(resting + later, phases)


def measured_peak(row, tiny=True):
    """The most bytes that the first update with data takes beyond those before it, in fp32.

    torch's profiler reports each allocation and release of the CPU's memory.
    """
    model, reward, detector = models(row, tiny)
    profiler = torch.profiler.profile(profile_memory=True)

    @contextlib.contextmanager
    def around():
        with profiler:
            yield

    class NoClock:
        def mark(self, phase):
            pass

        def mark_in_backward(self, x, phase):
            pass

    with contextlib.suppress(EndOfUpdate):
        bench.run_row(row, model, reward, detector, FirstUpdate(NoClock(), around))
    change = 0
    peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            change += event.nbytes()
            peak = max(peak, change)
    return peak


# --------------------------------------------------------------------------------------------------
# The tables


@dataclass
class Case:
    """A command for which we look for settings that fit."""

    row: bench.Row
    batch_size: int  # the script's own


def cases():
    """{one of bench.MEMORY_ROWS: Case}, all with PickScore as the reward.

    Of two steps, one is the prefix. The number of its steps does not matter for memory.
    """
    late = ["--num_inference_steps", 2, "--first_mid", 1, "--last_mid", 1, "--reward", "pick"]
    sd15 = [*late, "--model", "sd15"]
    sdxl = [*late, "--model", "sdxl"]
    from_images = ["--start", 0, "--refl_every", 0]
    treat = ["treat", "--model", "flux-schnell", "--num_inference_steps", 2, "--reward", "pick"]
    treat += ["--detector", "x", "--data", "x"]
    rows = [
        bench.Row("refl.py, SD1.5", "refl", sd15),
        bench.Row("imagerefl.py, SD1.5", "imagerefl", [*sd15, *from_images]),
        bench.Row("refl.py, SDXL", "refl", sdxl, "sdxl"),
        bench.Row("imagerefl.py, SDXL", "imagerefl", [*sdxl, *from_images], "sdxl"),
        bench.Row("refl.py, SDXL, 1024 px", "refl", sdxl, "sdxl", 1024),
        bench.Row("diffdoctor.py treat, FLUX.1-schnell", "diffdoctor", treat, "flux"),
    ]
    batch_sizes = dict(sd15=32, sdxl=16, flux=4)
    found = [Case(row, batch_sizes[row.family]) for row in rows]
    return dict(zip(bench.MEMORY_ROWS, found))


@dataclass
class Line:
    """The Peaks of a command with one and with two images, continued to more."""

    one: Peak
    two: Peak

    def growth(self, phase):
        """Bytes for each further image."""
        return self.two.phases[phase] - self.one.phases[phase]

    def peak(self, batch_size, micro_batch):
        """The prefix takes the whole batch, and the other phases a micro-batch at a time."""
        peaks = []
        for phase, one_image in self.one.phases.items():
            images = batch_size if phase == "prefix" else min(batch_size, micro_batch)
            peaks.append(one_image + (images - 1) * self.growth(phase))
        return max(peaks)


def line_of(row, *flags, **options):
    """The Line of a bench.Row with more flags."""
    peaks = []
    for images in (1, 2):
        words = [*row.words, *flags, "--micro_batch", images]
        peaks.append(computed_peak(replace(row, words=words, images=images), **options))
    return Line(*peaks)


def recipe(lines, batch_size, card):
    """The flags that fit on a card of so many GB -> (flags, peak in bytes), or None.

    lines: {whether with --checkpointing: Line}. We first lower --micro_batch from 8, then add
    --checkpointing, and last lower --batch_size, which alone changes the update.
    """
    room = (card - RESERVE) * GIB
    smaller = batch_size
    while smaller >= 1:
        for checkpointing in (False, True):
            for micro_batch in (8, 4, 2, 1):
                peak = lines[checkpointing].peak(smaller, micro_batch)
                if peak > room:
                    continue
                flags = []
                if micro_batch < 8:
                    flags.append(f"--micro_batch {micro_batch}")
                if checkpointing:
                    flags.append("--checkpointing")
                if smaller < batch_size:
                    flags.append(f"--batch_size {smaller}")
                return " ".join(flags) or "the defaults", peak
        smaller //= 2
    return None


def print_recipes(only=None):
    print(f"GiB at the peak, on a GPU. {RESERVE:g} GiB of each card are left free.")
    print("The text encoders are freed. SDXL with COCO's captions keeps them: add 1.5 GiB.")
    for name, case in cases().items():
        if only not in (None, name):
            continue
        lines = {False: line_of(case.row), True: line_of(case.row, "--checkpointing")}
        print(f"{case.row.title}: {lines[False].one.resting / GIB:.1f} GiB between updates")
        for checkpointing, line in lines.items():
            cells = []
            for phase, peak in line.one.phases.items():
                cells.append(f"{phase} {peak / GIB:.2f} + {line.growth(phase) / GIB:.2f}")
            what = "with --checkpointing" if checkpointing else "without --checkpointing"
            print(f"  one image + each further one, {what}: {', '.join(cells)}")
        for card in CARDS:
            found = recipe(lines, case.batch_size, card)
            if found is None:
                print(f"  {card} GB: does not fit")
            else:
                flags, peak = found
                print(f"  {card} GB: {peak / GIB:.1f} with {flags}", flush=True)
