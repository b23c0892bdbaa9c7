"""Fused elementwise and blockwise updates: one call per optimizer step, over a list of local flat tensors.

A *formula* is the arithmetic of one rule, a pure function of fp32 tensors of one shape. Its scalars are keyword
arguments, Python floats or 0-dim tensors, rounded to fp32 by every backend::

    elementwise   formula(param, grad, *states, **scalars) -> (param, *states)
    blockwise     formula(param, grad, mean_square, *states, *block_states, **scalars)
                      -> (param, *states, *block_states)

``mean_square`` is a block's mean of squared gradients, divided by its exact size and rounded to fp32 once; it and the
block states broadcast against the elements. A formula that does not broadcast or that looks at other elements is wrong.

Three backends run a formula (`backend_for` chooses by device, never by size):

- ``native``: C++ on the CPU, built on first use. It knows the formulas by ``name`` and must agree with them; the
  ``formula`` argument is then not called. fp32 arithmetic whose result does not depend on how a tensor is cut into
  spans, nor on the number of threads.
- ``compiled``: `torch.compile` of the formula, for accelerators.
- ``eager``: the formula as it is, piece by piece: the oracle, and the fallback.

Parameters, gradients and element states may be fp32, bf16 or fp16, block states are fp32. What is written is rounded to
nearest, bf16 parameters stochastically if a `Rounding` is given. Only elements that a table
covers are touched (`ds_optim.kernels.tables` says how tables read). Gradients are never written to. Nothing
synchronises with an accelerator.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ds_optim.kernels import compiled, eager, native
from ds_optim.kernels.build import UnavailableError
from ds_optim.kernels.rounding import Place, Places, Rounding
from ds_optim.kernels.tables import Formula, Select

__all__ = [
    "Backend",
    "Formula",
    "Place",
    "Places",
    "Rounding",
    "Select",
    "backend_for",
    "blockwise",
    "descend",
    "elementwise",
    "partial_sums",
]

Backend = Literal["native", "compiled", "eager"]


def backend_for(device: torch.device) -> Backend:
    """The backend for tensors on ``device``: C++ on the CPU, compiled on accelerators, eager without a compiler.

    The environment variable ``DS_OPTIM_KERNELS`` (``native``, ``compiled`` or ``eager``) overrides the choice on
    devices that the named backend can serve. Ranks that share a shard group should agree on the answer.

    Raises:
        ValueError: ``DS_OPTIM_KERNELS`` names no backend.
        UnavailableError: it forces the C++ kernels, which cannot be built here.
    """
    forced = os.environ.get("DS_OPTIM_KERNELS", "")
    if forced and forced not in get_args(Backend):
        raise ValueError(f"DS_OPTIM_KERNELS is {forced!r}; it may be one of {', '.join(get_args(Backend))}")
    if forced == "native" and device.type == "cpu":
        native.library()  # a missing compiler must show here, where ranks still compare notes
        return "native"
    if forced and forced != "native":
        return cast(Backend, forced)
    return _by_device(device.type)


@cache
def _by_device(device_type: str) -> Backend:
    """The policy, decided (and warned about) once per process and kind of device."""
    if device_type == "cpu":
        try:
            native.library()
            return "native"
        except UnavailableError as problem:
            reason = str(problem)
    elif device_type in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        if has_triton():
            return "compiled"
        reason = "torch.compile needs triton, which is not installed or does not support this device"
    else:
        reason = "only cpu, cuda and xpu have them"
    warnings.warn(
        f"ds_optim: no fused optimizer kernels for {device_type} tensors, so plain torch operations are used, which "
        f"compute the same several times slower. Reason: {reason}",
        stacklevel=3,
    )
    return "eager"


def elementwise(
    backend: Backend,
    name: str,
    formula: Formula,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    states: Sequence[Sequence[Tensor]],
    spans: Tensor,
    scalars: Mapping[str, float | Tensor],
    rounding: Rounding | None = None,
) -> None:
    """Update ``params`` and ``states`` in place on the elements that ``spans`` covers.

    Args:
        backend: what `backend_for` chose.
        name: the rule: ``adamw``, ``lion`` or ``adan`` (another name runs in eager or compiled form only).
        formula: the rule's arithmetic.
        params: local flat tensors, contiguous.
        grads: their gradients, of the same numel, any of the three dtypes; None counts as zero.
        states: for every state the list of its tensors, in the order of the formula's arguments.
        spans: int64 CPU tensor (n, 3), see `ds_optim.kernels.tables`.
        scalars: the formula's keyword arguments, numbers or 0-dim tensors.
        rounding: how bf16 parameters are rounded; None rounds them to nearest.
    """
    if backend == "native":
        native.elementwise(name, params, grads, states, spans, scalars, rounding)
    else:
        driver = compiled if backend == "compiled" else eager
        driver.elementwise(formula, params, grads, states, spans, scalars, rounding)


def partial_sums(
    backend: Backend,
    grads: Sequence[Tensor | None],
    row_runs: Tensor,
    column_runs: Tensor,
    cut_sums: Tensor,
) -> None:
    """Add to ``cut_sums`` the sums of squared gradients of the local elements of every cut block.

    Args:
        backend: what `backend_for` chose.
        grads: as for `elementwise`.
        row_runs: int64 CPU tensor (n, 8).
        column_runs: int64 CPU tensor (n, 11).
        cut_sums: fp64 (fp32 where the device has no fp64), 1-D, on the gradients' device, zeroed by the caller, who
            all-reduces it over the shard group afterwards.
    """
    if backend == "native":
        native.partial_sums(grads, row_runs, column_runs, cut_sums)
    else:
        driver = compiled if backend == "compiled" else eager
        driver.partial_sums(grads, row_runs, column_runs, cut_sums)


def blockwise(
    backend: Backend,
    name: str,
    formula: Formula,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    states: Sequence[Sequence[Tensor]],
    block_states: Sequence[Sequence[Tensor]],
    row_runs: Tensor,
    column_runs: Tensor,
    cut_sums: Tensor,
    scalars: Mapping[str, float | Tensor],
    select: Select = "all",
    rounding: Rounding | None = None,
) -> None:
    """Update ``params``, ``states`` and ``block_states`` in place, block by block.

    A block's mean square comes from its local elements, or, if a shard boundary cuts it, from ``cut_sums``, which must
    then hold the sums of the whole group.

    Args:
        backend: what `backend_for` chose.
        name: the rule: ``adam_mini`` (another name runs in eager or compiled form only).
        formula: the rule's arithmetic.
        params, grads, states: as for `elementwise`.
        block_states: for every block state the list of its tensors, fp32, one value per local block.
        row_runs, column_runs, cut_sums: as for `partial_sums`.
        scalars: the formula's keyword arguments.
        select: ``all`` blocks, only ``uncut`` ones (while the all-reduce travels) or only ``cut`` ones (afterwards).
        rounding: as for `elementwise`.
    """
    tables = row_runs, column_runs, cut_sums
    if backend == "native":
        native.blockwise(name, params, grads, states, block_states, *tables, scalars, select, rounding)
    else:
        driver = compiled if backend == "compiled" else eager
        driver.blockwise(formula, params, grads, states, block_states, *tables, scalars, select, rounding)


def descend(
    backend: Backend, target: Tensor, update: Tensor, decay: float | Tensor, identity: int, first: int, key: int
) -> None:
    """``target <- decay target - update`` on bf16 parameters, stochastically rounded.

    Args:
        backend: what `backend_for` chose.
        target: bf16, a strided view of a row-major parameter.
        update: fp32, contiguous, of the same shape.
        decay: a number or a 0-dim tensor.
        identity: of the parameter, see `ds_optim.kernels.rounding.identity_of`.
        first: index of the view's first element in the whole parameter.
        key: of the step, see `ds_optim.kernels.rounding.key_of`.
    """
    driver = {"native": native, "compiled": compiled, "eager": eager}[backend]
    driver.descend(target, update, decay, identity, first, key)
