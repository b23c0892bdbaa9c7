"""What an optimizer keeps, as logical tensors: which ranges of each parameter's values lie where in local tensors.

A *logical tensor* has one dimension and does not depend on ranks: a parameter's elements in row-major order, or the
values of its blocks in the order of their index. Pure arithmetic, from layouts alone; checkpoints are made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ds_optim.rule import PackedSymmetric, StateSpec
from ds_optim.sharding.block_runs import BlockRuns
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.boxes import stretches
from ds_optim.sharding.layout import Layout
from ds_optim.sharding.plan import Plan
from ds_optim.stepping.owner_state import StateOfBlock, state_begins


class LogicalRange(NamedTuple):
    """The range ``[start, stop)`` of a logical tensor, which lies at ``offset`` of a flat local tensor."""

    start: int
    stop: int
    offset: int


def slices(pieces: Sequence[LogicalRange], values: Tensor | None) -> list[tuple[int, Tensor]]:
    """Where each piece begins, and its values as a view of the flat local tensor that holds them.

    Args:
        values: None where there are no pieces: a rank that owns no block of a local tensor has no such state there.
    """
    if not pieces:
        return []
    assert values is not None
    return [(piece.start, values[piece.offset : piece.offset + piece.stop - piece.start]) for piece in pieces]


@dataclass(slots=True)
class Logical:
    """One logical tensor, as one rank sees it.

    Attributes:
        numel: of the whole.
        dtype: that it is kept in.
        written: what this rank stores. Over all ranks every value is stored once, or alike by several.
        read: what this rank needs back; more than it stores where a shard boundary cuts a block.
        orders: of the packed symmetric matrices that it consists of, one behind the other; none: of other values.
    """

    numel: int
    dtype: torch.dtype
    written: list[LogicalRange] = field(default_factory=list)
    read: list[LogicalRange] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LogicalParameter:
    """What is kept for one parameter.

    Attributes:
        name: of the parameter.
        shape: logical shape.
        blocks: its blocks in words, empty under an elementwise rule: equal words mean equal blocks.
        weight: its elements, in the local tensor that the optimizer steps.
        state: its state by key, in the optimizer's state of that local tensor.
    """

    name: str
    shape: tuple[int, ...]
    blocks: str
    weight: Logical
    state: dict[str, Logical]


def element_ranges(layout: Layout, rank: int) -> list[list[LogicalRange]]:
    """For every parameter of a layout, the elements that ``rank`` holds."""
    found: list[list[LogicalRange]] = [[] for _ in layout.parameters]
    for fragment in layout.fragments(rank):
        offset = fragment.offset
        box, shape = layout.parts(fragment.parameter)[fragment.part], layout.parameters[fragment.parameter].shape
        for start, stop in stretches(shape, box, fragment.start, fragment.stop):
            found[fragment.parameter].append(LogicalRange(start, stop, offset))
            offset += stop - start
    return found


def packed(pieces: Sequence[Sequence[LogicalRange]]) -> list[list[LogicalRange]]:
    """The same elements in a local tensor that has no room for anything else, in the order of their offsets."""
    order = sorted((piece.offset, index) for index, of_one in enumerate(pieces) for piece in of_one)
    begins: dict[int, int] = {}
    position = 0
    widths = {piece.offset: piece.stop - piece.start for of_one in pieces for piece in of_one}
    for offset, _ in order:
        begins[offset] = position
        position += widths[offset]
    return [[piece._replace(offset=begins[piece.offset]) for piece in of_one] for of_one in pieces]


def block_ranges(layout: Layout, rank: int, grids: Mapping[str, BlockGrid], runs: BlockRuns) -> list[Logical]:
    """One value per block (fp32), for every parameter of a layout: its holders read it, that of its first element
    stores it.

    Args:
        grids: by name; parameters without one have no blocks, and an empty logical tensor.
        runs: of ``rank``, see `ds_optim.sharding.block_runs.block_runs`; they say where a block's value lies.
    """
    listed = [grids.get(spec.name) for spec in layout.parameters]
    found = [Logical(0 if grid is None else grid.num_blocks, torch.float32) for grid in listed]
    for _, length, phase, width, slot, _, _, parameter, first in runs.rows:
        count = -(-(phase + length) // width)
        skipped = int(phase > 0)  # that block begins at another rank
        found[parameter].read.append(LogicalRange(first, first + count, slot))
        if skipped < count:
            found[parameter].written.append(LogicalRange(first + skipped, first + count, slot + skipped))
    for _, length, phase, _, column_start, column_stop, width, slot, _, _, parameter, first, is_first in runs.columns:
        count = (column_stop - column_start) // width
        low = max(0, -(-(phase - column_start) // width))
        high = min(count, -(-(phase + length - column_start) // width)) if is_first else 0
        found[parameter].read.append(LogicalRange(first, first + count, slot))
        if low < high:
            found[parameter].written.append(LogicalRange(first + low, first + high, slot + low))
    return found


def owned_ranges(
    plan: Plan, tensor: int, owned: Sequence[int], state_of_block: StateOfBlock
) -> list[dict[str, Logical]]:
    """State of owned blocks for every parameter of a local tensor: its blocks one behind the other, by their index.

    Args:
        tensor: index in the plan.
        owned: this rank's blocks of it, in the order of their state.
        state_of_block: what is kept for a block of a shape.
    """
    found: list[dict[str, Logical]] = [{} for _ in plan.layouts[tensor].parameters]
    specs: dict[tuple[int, ...], Mapping[str, StateSpec]] = {}
    logical_begins: dict[int, dict[str, int]] = {}
    by_index = sorted(
        plan.of_tensor(tensor), key=lambda block: (plan.blocks[block].parameter, plan.blocks[block].index)
    )
    for block in by_index:
        one = plan.blocks[block]
        spec = specs.setdefault(one.tile.shape, state_of_block(one.tile.shape))
        logical_begins[block] = {}
        for key, kept in spec.items():
            shape, dtype = kept
            logical = found[one.parameter].setdefault(key, Logical(0, dtype))
            if isinstance(kept, PackedSymmetric):
                logical.orders.append(kept.order)
            logical_begins[block][key] = logical.numel
            logical.numel += math.prod(shape)
    for block, begins in state_begins(plan, owned, state_of_block).items():
        one = plan.blocks[block]
        for key, offset in begins.items():
            start = logical_begins[block][key]
            piece = LogicalRange(start, start + math.prod(specs[one.tile.shape][key][0]), offset)
            logical = found[one.parameter][key]
            logical.written.append(piece)
            logical.read.append(piece)
    return found
