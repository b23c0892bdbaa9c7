"""What a kernel call is made of: the arithmetic of a rule, and the tensors that it works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ds_optim.kernels.rounding import Rounding
from ds_optim.kernels.tables import Tables

Arithmetic = Callable[..., tuple[Tensor, ...]]
"""A pure function of fp32 tensors: see `ds_optim.kernels`."""

Scalars = Mapping[str, float | Tensor]
"""A formula's keyword arguments: numbers or 0-dim tensors."""

FormulaKind = Literal["elementwise", "blockwise"]


@dataclass(frozen=True, slots=True)
class Formula:
    """The arithmetic of one rule.

    Attributes:
        name: among the fused kernels. Who takes a name of theirs must compute what they compute.
        update: elementwise ``(param, grad, *states, **scalars) -> (param, *states)``; blockwise ``(param, grad,
            mean_square, *states, *block_states, **scalars) -> (param, *states, *block_states)``. All fp32.
        states: how many states have one value per element.
        block_states: how many have one value per block; 0 makes the formula elementwise.
    """

    name: str
    update: Arithmetic
    states: int
    block_states: int

    @property
    def kind(self) -> FormulaKind:
        """Whether the formula sees blocks."""
        return "blockwise" if self.block_states else "elementwise"


@dataclass(slots=True)
class Operands:
    """What one kernel call works on. All tensors are on one device, but for the tables, which are on the CPU.

    Attributes:
        params: T local tensors, contiguous, of any shape, which is not looked at; fp32, bf16 or fp16; updated in place.
        grads: their gradients, of the same numel, any of the three dtypes; None counts as zero. Never written to.
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
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    states: Sequence[Sequence[Tensor]]
    block_states: Sequence[Sequence[Tensor]]
    tables: Tables
    scalars: Scalars
    rounding: Rounding | None
    cut_sums: Tensor
