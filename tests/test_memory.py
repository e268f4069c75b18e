"""The peak memory of an update, computed without data, beside what torch measures on a CPU."""

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import bench
import memory
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from common import make_trainable

REFL = "--model sd15 --num_inference_steps 2 --first_mid 1 --last_mid 1 --reward pick".split()
TREAT = "treat --model flux-schnell --num_inference_steps 2 --reward pick".split()
TREAT += ["--detector", "x", "--data", "x"]
ROWS = {
    "refl": bench.Row("", "refl", [*REFL, "--checkpointing", "--micro_batch", 2], images=2),
    "treat": bench.Row("", "diffdoctor", [*TREAT, "--micro_batch", 4], "flux", images=4),
}
IN_FP32 = dict(tiny=True, dtype=torch.float32)


def in_a_fork(function, *args, **options):
    """Calls the function in a fork of this process.

    A backward pass without data starts threads of autograd, and a process that has them cannot be
    forked for training, as test_resume.py does.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args, **options).result()


@pytest.mark.parametrize("name", list(ROWS))
def test_the_computed_peak_is_what_torch_measures(name):
    """Within 6%: a convolution's workspace, for example, is measured but not computed."""
    row = replace(ROWS[name], resolution=64)
    computed = in_a_fork(memory.computed_peak, row, **IN_FP32)
    measured = in_a_fork(memory.measured_peak, row)
    # Nothing of this is there before the first update.
    above_rest = computed.total - computed.resting
    assert above_rest == pytest.approx(measured, rel=0.06)


def test_a_peak_grows_in_a_straight_line():
    """So two images tell what four need."""
    row = replace(ROWS["treat"], resolution=64)
    line = in_a_fork(memory.line_of, row, **IN_FP32)
    four = in_a_fork(memory.computed_peak, row, **IN_FP32)
    assert line.peak(4, 4) == pytest.approx(four.total, rel=0.01)
    assert line.peak(4, 1) < line.peak(4, 2) < line.peak(4, 4)
    # Between updates there are the weights, and four numbers for each parameter of the LoRA.
    model, reward, detector = memory.models(row, tiny=True)
    modules = memory.modules_of(model, reward, detector)
    weights = sum(p.nbytes for module in modules for p in module.parameters())
    buffers = sum(x.nbytes for module in modules for x in module.buffers())
    num_params = sum(p.numel() for p in make_trainable(model, 16))
    expected = weights + buffers + 16 * num_params
    assert line.one.resting == line.two.resting == expected


def without_data(module, mode, device):
    """Moves a module's parameters and buffers to a device that need not exist."""
    memory.remove_data(module, mode)
    with mode:
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = torch.nn.Parameter(p.to(device), p.requires_grad)
            for name, x in part._buffers.items():
                if x is not None:
                    part._buffers[name] = x.to(device)


@contextlib.contextmanager
def rules_of(device):
    """torch's own autocast for CUDA, or what memory.py uses in its place on the CPU."""
    if device == "cpu":
        with memory.autocast_of_cuda(), torch.autocast("cpu", torch.bfloat16):
            yield
        return

    def attention(query, key, value, *args, **kwargs):
        # What torch calls on a GPU, after it has looked at the GPU.
        inputs = [x.to(torch.bfloat16) for x in (query, key, value)]
        return torch.ops.aten._scaled_dot_product_flash_attention(*inputs)[0]

    # torch.autocast("cuda") turns itself off where there is no GPU.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with bench.replaced(F, scaled_dot_product_attention=attention):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def bytes_kept(denoiser, inputs, device):
    """Bytes that autograd saves in a forward pass, by data type. Parameters are left out."""
    kept = {}

    def pack(x):
        owner = x if x._base is None else x._base
        if not isinstance(owner, torch.nn.Parameter):
            kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), rules_of(device):
        denoiser(**inputs)
    sizes = {}
    for x in kept.values():
        sizes[x.dtype] = sizes.get(x.dtype, 0) + x.untyped_storage().nbytes()
    return sizes


def bytes_kept_by(family, device):
    """The same for a tiny denoiser of the family, in bf16 with an fp32 LoRA."""
    makers, shapes = bench.builders(family, tiny=True)
    denoiser = makers["transformer" if family == "flux" else "unet"]()
    denoiser = denoiser.to(torch.bfloat16).requires_grad_(False)
    bench.add_lora(denoiser, 4)
    for p in denoiser.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_data(denoiser, mode, device)
    with mode, torch.device(device):
        cond = [torch.empty(2, *shape, dtype=torch.bfloat16) for shape in shapes]
        inputs = dict(timestep=torch.zeros(2), encoder_hidden_states=cond[0])
        if family == "flux":
            inputs.update(hidden_states=torch.empty(2, 64, 16), pooled_projections=cond[1])
            inputs.update(img_ids=torch.empty(64, 3), txt_ids=torch.empty(len(cond[0][0]), 3))
        else:
            more = dict(text_embeds=cond[1], time_ids=torch.empty(2, 6))
            inputs.update(sample=torch.empty(2, 4, 16, 16), added_cond_kwargs=more)
        return bytes_kept(denoiser, inputs, device)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_cpu_without_data_keeps_what_a_gpu_keeps(family):
    """The same bytes of each data type as under torch's autocast for CUDA, within 0.1%."""
    on_cpu = in_a_fork(bytes_kept_by, family, "cpu")
    on_gpu = in_a_fork(bytes_kept_by, family, "cuda")
    # Attention on a GPU also keeps the state of its random numbers, in two whole numbers.
    on_gpu.pop(torch.uint64)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    # Without the norms in fp32, most would be bf16.
    assert on_cpu[torch.float32] > 0.4 * on_cpu[torch.bfloat16]


def line(resting, prefix, gradient):
    """A Line in GiB: at rest, and for each image of the prefix and of a micro-batch."""
    peaks = []
    for images in (1, 2):
        phases = dict(prefix=resting + prefix * images, gradient=resting + gradient * images)
        phases = {phase: size * memory.GIB for phase, size in phases.items()}
        peaks.append(memory.Peak(resting * memory.GIB, phases))
    return memory.Line(*peaks)


@pytest.mark.parametrize(
    "card, expected",
    [  # 2 GB stay free; 16 images in the prefix take 4 + 16 x 0.25 = 8
        (48, ("the defaults", 44)),
        (24, ("--micro_batch 2", 14)),
        (12, ("--micro_batch 1", 9)),
        (10.5, ("--micro_batch 2 --checkpointing", 8)),
        (8, ("--micro_batch 1 --checkpointing --batch_size 8", 6)),
        (6, None),
    ],
)
def test_recipes_change_the_update_last(card, expected):
    lines = {False: line(4, 0.25, 5), True: line(4, 0.25, 2)}
    found = memory.recipe(lines, 16, card)
    if expected is None:
        assert found is None
    else:
        assert found == (expected[0], expected[1] * memory.GIB)


def test_each_row_of_the_table_has_a_name():
    assert tuple(memory.cases()) == bench.MEMORY_ROWS
