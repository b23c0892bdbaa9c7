"""What a kernel call is made of: the arithmetic of a rule, and the tensors that it works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ds_optim.kernels.codes import Code
from ds_optim.kernels.rounding import Rounding
from ds_optim.kernels.tables import Tables

Arithmetic = Callable[..., tuple[Tensor, ...]]
"""A pure function of fp32 tensors: see `ds_optim.kernels`."""

Scalars: TypeAlias = Mapping[str, Any]
"""A formula's constants for one call, by name: Python floats, or 0-dim tensors where the learning rate is one."""

FormulaKind = Literal["elementwise", "blockwise"]

_dtype_of = attrgetter("dtype")


@dataclass(frozen=True, slots=True)
class Formula:
    """The arithmetic of one rule.

    Attributes:
        name: among the fused kernels. Who takes a name of theirs must compute what they compute.
        update: elementwise ``(param, grad, *states, **scalars) -> (param, *states)``; blockwise ``(param, grad,
            mean_square, *states, *block_states, **scalars) -> (param, *states, *block_states)``. All fp32.
        states: how many states have one value per element.
        block_states: how many have one value per block; 0 makes the formula elementwise.
        is_pass: whether it is elementwise, takes values for its parameter, and does not look at the gradient: see
            `ds_optim.kernels.one_pass`.
        codes: of its states, in their order, where they are kept in eight bits: see `ds_optim.kernels.codes`. None are
            where they are kept as they are.
    """

    name: str
    update: Arithmetic
    states: int
    block_states: int
    is_pass: bool = False
    codes: tuple[Code, ...] = ()

    @property
    def kind(self) -> FormulaKind:
        """Whether the formula sees blocks."""
        return "blockwise" if self.block_states else "elementwise"


@dataclass(slots=True)
class Operands:
    """What one kernel call works on. All tensors are on one device, but for the tables, which are on the CPU.

    Attributes:
        params: T local tensors, contiguous, of any shape, which is not looked at; fp32, bf16 or fp16; updated in place.
        grads: their gradients, of the same numel, any of the three dtypes; None counts as zero. Never written to: a
            pass, which does not read them, may be given its parameters once more.
        states: for every element state the list of its T tensors, in the order of the formula's arguments, like
            ``params`` in numel and choice of dtype; updated in place.
        block_states: for every block state the list of its T tensors, 1-D, fp32, one value per local block; updated in
            place. Empty for an elementwise formula.
        tables: int64, which elements are touched, and which of them form a block.
        scalars: of the formula.
        rounding: how bf16 parameters are rounded; None rounds them to nearest.
        cut_sums: (C,) fp64 (fp32 where the device has no fp64), contiguous: the sums of squared gradients of the blocks
            that a shard boundary cuts. `partial_sums` adds this rank's share to what the caller zeroed; the caller
            all-reduces it over the shard group before `blockwise` updates cut blocks. Empty where no block is cut.
        scales: for every state that is kept in eight bits the list of its T tensors of scales, 1-D, fp32, one for each
            block of which something is here; ``states`` are uint8 then. Updated in place.
        cut_maxima: (D, states) int32, contiguous: the largest magnitudes of the new states, as bits, of the blocks of
            codes that a shard boundary cuts. `partial_maxima` enters this rank's into what the caller zeroed; the
            caller takes the largest over the shard group before cut blocks are updated.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    states: Sequence[Sequence[Tensor]]
    block_states: Sequence[Sequence[Tensor]]
    tables: Tables
    scalars: Scalars
    rounding: Rounding | None
    cut_sums: Tensor
    scales: Sequence[Sequence[Tensor]] = ()
    cut_maxima: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32, device="cpu"))


def check_blocks(formula: Formula, operands: Operands) -> None:
    """What has a value per block has no choice of dtype: kernels write to it as to the dtype that it should have.

    Raises:
        ValueError: block states, scales or ``cut_maxima`` are not what `Operands` says.
    """
    if not operands.params:
        return
    problems, maxima, states = [], operands.cut_maxima, len(formula.codes)
    kinds = ("block states", operands.block_states, formula.block_states), ("scales", operands.scales, states)
    for label, listed, count in kinds:
        if [len(of_state) for of_state in listed] != [len(operands.params)] * count:
            problems.append(f"{label} must be {count} lists of {len(operands.params)} tensors, as many as parameters")
        if any(set(map(_dtype_of, of_state)) != {torch.float32} for of_state in listed):
            problems.append(f"{label} must be torch.float32 throughout")
    is_int32 = maxima.dtype == torch.int32 and maxima.is_contiguous() and maxima.shape[1:] == (states,)
    if maxima.numel() and not (is_int32 and maxima.device == operands.params[0].device):
        problems.append(
            f"cut_maxima must be a contiguous torch.int32 tensor of shape (n, {states}) beside the parameters, not "
            f"{tuple(maxima.shape)} {maxima.dtype} on {maxima.device}"
        )
    if problems:
        raise ValueError("; ".join(problems))


def merged(view: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of a row-major view with as few dimensions as possible, at least two; the last stride is 1."""
    dims: list[tuple[int, int]] = [(1, view.numel())]
    for size, stride in [*zip(view.shape, view.stride(), strict=True), (1, 1)]:
        if size == 1 and stride != 1:
            continue
        if dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims if len(dims) > 1 else [(1, view.numel()), *dims]
