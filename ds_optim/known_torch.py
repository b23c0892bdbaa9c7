"""What differs between the releases of torch in the range of `ds_optim.releases`, with the release that brought it.

The one place that knows: others call what stands here. What a build has says more than its number, which is compared
for mistakes alone; what must be known before torch is imported stands in `ds_optim.releases`. Private parts of torch
that are the same in the whole range are named, and tried out, where they are used (`ds_optim.memory.tracker`), or here
if several modules use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.releases import TORCH


def all_gather_single(output: Tensor, shard: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Begin to collect every rank's ``shard`` (n,) in ``output`` (ranks * n,).

    By its name of 2.13, which came with a warning about the older one, `all_gather_into_tensor`.
    """
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return cast(dist.Work, gather(output, shard, group, async_op=True))


def fsdp_parameters(module: Any) -> Iterator[Any]:
    """FSDP2's own objects of one of its modules, one for each parameter: several groups since 2.12, one before.

    Raises:
        AttributeError: this torch keeps them elsewhere.
    """
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for group in groups:
        if group is not None:  # a module whose parameters all belong to others
            yield from group.fsdp_params


def split_factor(placement: Any) -> int | None:
    """Into how many parts a shard's dimension was cut before, of a strided shard (FSDP2 over tensor parallelism)."""
    factor = getattr(placement, "split_factor", None)
    return None if factor is None else int(factor)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, on which Triton launches: it need not be that of the tensors."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def is_at_work(accelerator: torch.device) -> bool:
    """Whether this process has begun to use an accelerator; not every kind of them can say so."""
    module: Any = torch.get_device_module(accelerator)
    return bool(getattr(module, "is_initialized", lambda: False)())


def allocated(device: torch.device) -> int | None:
    """Bytes of tensors on an accelerator, as its allocator counts them; None where none does.

    `torch.accelerator` counts them for all kinds since 2.9, modules of their own before.
    """
    count = None if device.type == "cpu" else getattr(torch.get_device_module(device), "memory_allocated", None)
    return None if count is None else int(count(device))


def free(device: torch.device) -> int | None:
    """Bytes that an accelerator has left; None where it does not say."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if ask is None else int(ask(device)[0])


def graph_task() -> int:
    """The backward pass that this thread is in, by its number; -1 outside of all."""
    return int(torch._C._current_graph_task_id())


def when_backward_ends(action: Callable[[], None]) -> None:
    """Let ``action()`` follow the backward pass that this thread is in, behind what was queued for its end before."""
    torch.autograd.Variable._execution_engine.queue_callback(action)


@cache
def backward_problem() -> str:
    """Why `graph_task` and `when_backward_ends`, private parts of torch, do not work here; empty if they do.

    Runs a backward pass through one number.
    """
    tasks: list[int] = []
    try:
        with torch.enable_grad():
            number = torch.ones(1, device="cpu", requires_grad=True)
            number.register_hook(lambda _: when_backward_ends(partial(tasks.append, graph_task())))
            number.sum().backward()
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {TORCH.installed} does not say when a backward pass ends ({error}); {TORCH.known}"
    if not tasks or tasks == [-1]:
        return f"torch {TORCH.installed} says otherwise in which backward pass it is, and when that ends; {TORCH.known}"
    return ""


@cache
def triton_problem() -> str:
    """Why Triton, which torch's builds for GPUs bring, compiles nothing for the accelerator here; empty if it does.

    Builds Triton's driver, compiles a small program and launches nothing.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
        from ds_optim.triton_probe import compile_one

        compile_one()
    except Exception as error:  # no triton, no C compiler, no device, or one that this Triton does not know
        said = " ".join(str(error).split())[:200]
        return f"Triton cannot be used here: {type(error).__name__}: {said}"
    return ""


def compiles_codes(states: int, rocm: str | None) -> bool:
    """Whether Triton compiles programs over so many states in eight bits.

    For AMD's GPUs it does not finish those over four (Adan's) before 3.6, which came with torch 2.10.

    Args:
        states: of a formula, per element.
        rocm: the release of ROCm that torch was built for, None if for none.
    """
    return states < 4 or rocm is None or not TORCH.is_before("2.10")


def sums_for_averages(device_type: str) -> bool:
    """Whether a reduce-scatter of CPU tensors gives the sum where it is asked for the average, as gloo does before 2.9.

    FSDP2 asks for the average of gradients, unless it is told to use sums alone, which it divides itself.
    """
    return device_type == "cpu" and TORCH.is_before("2.9")


@contextmanager
def fp32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Products of fp32 matrices in fp32, though training may have allowed TF32 or bf16 for them, or in TF32 on GPUs.

    Each backend has a setting of its own since 2.9, which must not be mixed with the one for all that there was before.
    Where one has none it reads as its parent's, which it is left to follow again.
    """
    parents: list[Any] = [torch.backends.cudnn, torch.backends.mkldnn]
    backends: list[Any] = [getattr(of, "matmul", None) for of in (torch.backends.cuda, torch.backends.mkldnn)]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend, wanted in zip(backends, (precision, "ieee"), strict=True):
                backend.fp32_precision = wanted
            yield
        finally:
            for backend, parent, was in zip(backends, parents, before, strict=True):
                backend.fp32_precision = "none" if was == parent.fp32_precision else was
    else:
        allowed = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
