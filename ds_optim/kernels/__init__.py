"""Fused elementwise and blockwise updates: one call per optimizer step, over a list of local flat tensors.

A `Formula` is the arithmetic of one rule, a pure function of fp32 tensors of one shape. Its scalars are keyword
arguments, Python floats or 0-dim tensors, rounded to fp32 by every backend::

    elementwise   update(param, grad, *states, **scalars) -> (param, *states)
    blockwise     update(param, grad, mean_square, *states, *block_states, **scalars)
                      -> (param, *states, *block_states)

``mean_square`` is a block's mean of squared gradients, divided by its exact size and rounded to fp32 once; it and the
block states broadcast against the elements. A formula that does not broadcast or that looks at other elements is wrong.

Three backends run a formula on `Operands` (`backend_for` chooses by formula and device, never by size):

- ``native``: C++ on the CPU, built on first use. It knows formulas by ``name`` (`ds_optim.kernels.native.KERNELS`) and
  must agree with them; their ``update`` is then not called. fp32 arithmetic whose result does not depend on how a
  tensor is cut into spans, nor on the number of threads.
- ``triton``: Triton's programs, for accelerators: one launch for all tensors, the C++ kernels' arithmetic.
- ``eager``: the formula as it is, piece by piece: the oracle, and the fallback, also of formulas without a kernel.

Parameters, gradients and element states may be fp32, bf16 or fp16, block states are fp32. Element states may also be
kept in eight bits (`coded`, `partial_maxima`; `ds_optim.kernels.codes` says how). What is written is rounded to
nearest, bf16 parameters stochastically if a `Rounding` is given. Only elements that a table covers are touched
(`ds_optim.kernels.tables` says how tables read). Gradients are never written to. Nothing synchronises with an
accelerator.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from ds_optim.kernels import codes, eager, native, triton
from ds_optim.kernels.build import UnavailableError
from ds_optim.kernels.operands import Formula, FormulaKind, Operands, Scalars, check_blocks
from ds_optim.kernels.rounding import Place, Places, Rounding, Words
from ds_optim.kernels.tables import Select, Tables
from ds_optim.known_torch import triton_problem

__all__ = [
    "Backend",
    "Formula",
    "Operands",
    "Place",
    "Places",
    "Rounding",
    "Scalars",
    "Select",
    "Tables",
    "Words",
    "backend_for",
    "blockwise",
    "coded",
    "descend",
    "device_backend",
    "elementwise",
    "kept_for",
    "one_pass",
    "partial_maxima",
    "partial_sums",
]

Backend = Literal["native", "triton", "eager"]


class _Driver(Protocol):
    """What a backend's module has."""

    def has(self, formula: Formula) -> bool: ...

    def elementwise(self, formula: Formula, operands: Operands) -> None: ...

    def one_pass(self, formula: Formula, values: Tensor, states: Sequence[Tensor], scalars: Scalars) -> None: ...

    def partial_sums(self, operands: Operands) -> None: ...

    def blockwise(self, formula: Formula, operands: Operands, select: Select) -> None: ...

    def partial_maxima(self, formula: Formula, operands: Operands) -> None: ...

    def coded(self, formula: Formula, operands: Operands, select: Select) -> None: ...

    def descend(self, target: Tensor, update: Tensor, decay: float | Tensor, words: Words) -> None: ...


_DRIVERS: Mapping[Backend, _Driver] = {"native": native, "triton": triton, "eager": eager}
_LANGUAGES: Mapping[Backend, str] = {"native": "C++", "triton": "Triton"}
"""Of those that have kernels."""


def backend_for(formula: Formula | None, device: torch.device) -> Backend:
    """The backend for a formula on ``device``: C++ on the CPU, Triton on accelerators, eager without either.

    The environment variable ``DS_OPTIM_KERNELS`` (``native``, ``triton`` or ``eager``) overrides the choice on devices
    that the named backend can serve. A formula without a kernel there is eager; a warning says so once per formula and
    kind of device. Nothing is launched to find out, so that the ranks of a shard group, who should agree on the answer,
    can compare theirs first.

    Args:
        formula: what is to be run; None for what needs none: `descend`, which every backend has, and copies of
            triangles (`ds_optim.kernels.triangles`), which the C++ kernels have.
        device: of the tensors.

    Raises:
        ValueError: ``DS_OPTIM_KERNELS`` names no backend.
        UnavailableError: it forces the C++ kernels, which cannot be built here.
    """
    forced = os.environ.get("DS_OPTIM_KERNELS", "")
    if forced and forced not in get_args(Backend):
        raise ValueError(f"DS_OPTIM_KERNELS is {forced!r}; it may be one of {', '.join(get_args(Backend))}")
    if forced == "native" and device.type == "cpu":
        native.library()  # a missing compiler must show here, where ranks still compare notes
        chosen: Backend = "native"
    elif forced == "triton" and triton.serves(device.type):
        chosen = "triton"
    elif forced and forced not in ("native", "triton"):
        chosen = cast(Backend, forced)
    else:
        chosen = device_backend(device.type)
    if formula is not None and not _DRIVERS[chosen].has(formula):
        of = _LANGUAGES[chosen]
        states = f"{formula.states} per element{' in eight bits' if formula.codes else ''}"
        _warn_without_kernel(of, formula.name, formula.kind, states, formula.block_states, device.type)
        return "eager"
    return chosen


@cache
def device_backend(device_type: str) -> Backend:
    """The policy for a kind of device, decided (and warned about) once per process."""
    if device_type == "cpu":
        try:
            native.library()
            return "native"
        except UnavailableError as problem:
            reason = str(problem)
    elif device_type in ("cuda", "xpu"):
        reason = triton_problem()
        if not reason:
            return "triton"
    else:
        reason = "only cpu, cuda and xpu have them"
    warnings.warn(
        f"ds_optim: no fused optimizer kernels for {device_type} tensors, so plain torch operations are used, which "
        f"compute the same several times slower. Reason: {reason}",
        stacklevel=3,
    )
    return "eager"


@cache
def _warn_without_kernel(
    of: str, name: str, kind: FormulaKind, states: str, block_states: int, device_type: str
) -> None:
    """Once per formula, of which there may be many objects, and kind of device."""
    warnings.warn(
        f"ds_optim: there is no {of} kernel for the {kind} formula {name!r} (states: {states}, {block_states} per "
        f"block), so plain torch operations are used on {device_type} tensors, which compute the same several times "
        "slower",
        stacklevel=3,
    )


def kept_for(tables: Tables) -> list[Tensor]:
    """The tensors that calls over these tables keep from step to step: them, and what lies on devices for them."""
    listed = (tables.spans, tables.row_runs, tables.column_runs, tables.code_runs)
    return [*listed, *triton.kept(listed), *(codes.kept() if len(tables.code_runs) else ())]


def elementwise(backend: Backend, formula: Formula, operands: Operands) -> None:
    """Update ``params`` and ``states`` in place on the elements that the tables' ``spans`` cover.

    Args:
        backend: what `backend_for` chose for the formula.
        formula: an elementwise one.
        operands: see there; its block states and ``cut_sums`` are not looked at.

    Raises:
        ValueError: the backend cannot work on this, or a bf16 element has no place in the `Rounding`.
    """
    _DRIVERS[backend].elementwise(formula, operands)


def one_pass(backend: Backend, formula: Formula, values: Tensor, states: Sequence[Tensor], scalars: Scalars) -> None:
    """Update ``values`` and ``states`` in place, all their elements, without tables.

    Args:
        backend: what `backend_for` chose for the formula.
        formula: an elementwise one that does not look at its gradient.
        values: what it takes for the parameter, contiguous; fp32, bf16 or fp16, rounded to nearest.
        states: of the formula, of the same numel.
        scalars: of the formula, numbers or 0-dim tensors.

    Raises:
        ValueError: the backend cannot work on this.
    """
    _DRIVERS[backend].one_pass(formula, values, states, scalars)


def partial_sums(backend: Backend, operands: Operands) -> None:
    """Add to ``cut_sums`` the sums of squared gradients of the local elements of every cut block.

    Args:
        backend: what `backend_for` chose for the formula that will use the sums.
        operands: of the `blockwise` call that will follow; only gradients, tables and ``cut_sums`` are looked at.

    Raises:
        ValueError: as for `elementwise`.
    """
    _DRIVERS[backend].partial_sums(operands)


def blockwise(backend: Backend, formula: Formula, operands: Operands, select: Select = "all") -> None:
    """Update ``params``, ``states`` and ``block_states`` in place, block by block.

    A block's mean square comes from its local elements, or, if a shard boundary cuts it, from ``cut_sums``, which must
    then hold the sums of the whole group.

    Args:
        backend: what `backend_for` chose for the formula.
        formula: a blockwise one.
        operands: see there; the tables' ``spans`` are not looked at.
        select: ``all`` blocks, only ``uncut`` ones (while the all-reduce travels) or only ``cut`` ones (afterwards).

    Raises:
        ValueError: as for `elementwise`.
    """
    check_blocks(formula, operands)
    _DRIVERS[backend].blockwise(formula, operands, select)


def partial_maxima(backend: Backend, formula: Formula, operands: Operands) -> None:
    """Enter the largest magnitudes of the new states of every block of codes that is cut into ``cut_maxima``.

    New states are what `coded` will find, of the elements that are here; nothing of a block's sum enters them.

    Args:
        backend: what `backend_for` chose for the formula.
        formula: one with ``codes``.
        operands: of the `coded` call that will follow; nothing but ``cut_maxima`` is written to.

    Raises:
        ValueError: as for `elementwise`.
    """
    check_blocks(formula, operands)
    _DRIVERS[backend].partial_maxima(formula, operands)


def coded(backend: Backend, formula: Formula, operands: Operands, select: Select = "all") -> None:
    """As `elementwise` or `blockwise`, where states are kept in eight bits, over the tables' ``code_runs``.

    Args:
        backend: what `backend_for` chose for the formula.
        formula: one with ``codes``. A blockwise one's new element states must not depend on what a block shares.
        operands: see there; sums and maxima of cut blocks must be those of the whole group.
        select: which blocks of codes an elementwise formula updates; a blockwise one updates all of them.

    Raises:
        ValueError: as for `elementwise`.
    """
    check_blocks(formula, operands)
    _DRIVERS[backend].coded(formula, operands, select)


def descend(backend: Backend, target: Tensor, update: Tensor, decay: float | Tensor, words: Words) -> None:
    """``target <- decay target - update``: the product and the difference are rounded to fp32, then to the target.

    Args:
        backend: what `backend_for` chose for no formula.
        target: fp32, bf16 or fp16, a strided view of a row-major parameter.
        update: fp32, contiguous, of the same shape.
        decay: a number or a 0-dim tensor.
        words: nothing rounds to nearest. For bf16 that is rounded stochastically: the parameter's identity, the index
            of the view's first element in the whole parameter, and the step's key, see `ds_optim.kernels.rounding`.
    """
    _DRIVERS[backend].descend(target, update, decay, words)
