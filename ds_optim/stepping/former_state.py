"""State that versions up to 0.1.0 wrote, on its way into today's form: symmetric matrices had all their elements there.

How many values a stored tensor has says which form it is in; every loader asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ds_optim.linalg.packed import pack, packed_size
from ds_optim.rule import PackedSymmetric
from ds_optim.sharding.plan import Plan
from ds_optim.stepping.logical_tensors import Logical, LogicalRange, slices
from ds_optim.stepping.owner_state import StateOfBlock


def former_numel(logical: Logical) -> int:
    """Values that a logical tensor had."""
    return _whole_numel(logical.orders) or logical.numel


def room_for_stored(
    logical: Logical, values: Tensor | None, stored: int, device: torch.device | None = None
) -> tuple[list[tuple[int, Tensor]], Callable[[], None]]:
    """Where what this rank needs of a stored logical tensor is to be read to.

    Args:
        logical: of state that is kept here.
        values: the flat local tensor that it lies in; None if this rank needs nothing of it.
        stored: values of the stored tensor, as many as here or as there were in the former form.
        device: of room for the former form; that of ``values`` if None.

    Returns:
        Where every range begins in the stored tensor, and what is to be filled. To be called when it was: what brings
        it to ``values``.
    """
    if stored != former_numel(logical) or stored == logical.numel or not logical.read:
        return slices(logical.read, values), lambda: None
    assert values is not None
    sizes = [order * order for order in logical.orders]
    begins = accumulate(map(packed_size, logical.orders), initial=0)
    places = dict(zip(begins, zip(accumulate(sizes, initial=0), logical.orders, strict=False), strict=False))
    former = [places[piece.start] for piece in logical.read]  # a piece is a matrix
    room = values.new_empty(_whole_numel([order for _, order in former]), device=device or values.device)
    offsets = accumulate((order * order for _, order in former), initial=0)
    pieces = [
        LogicalRange(start, start + order * order, at) for (start, order), at in zip(former, offsets, strict=False)
    ]

    def finish() -> None:
        found, begin = packed_again(room, [order for _, order in former]), 0
        for start, stop, offset in logical.read:
            values[offset : offset + stop - start] = found[begin : begin + stop - start]
            begin += stop - start

    return slices(pieces, room), finish


def in_todays_form(
    plan: Plan, blocks: Sequence[int], state_of_block: StateOfBlock, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of some blocks of a local tensor, as a rank stored it.

    Args:
        plan: whose blocks.
        blocks: in the order of their state.
        state_of_block: what a rule keeps for a block.
        state: by key; what is in neither form stays as it is.
    """
    orders: dict[str, list[int]] = {}
    for block in blocks:
        for key, spec in state_of_block(plan.blocks[block].tile.shape).items():
            if isinstance(spec, PackedSymmetric):
                orders.setdefault(key, []).append(spec.order)
    return {key: packed_again(value, orders[key]) if key in orders else value for key, value in state.items()}


def packed_again(values: Tensor, orders: Sequence[int]) -> Tensor:
    """Symmetric matrices one behind the other, (sum of n^2,), as their lower triangles; anything else as it is."""
    sizes = [order * order for order in orders]
    if values.dim() != 1 or len(values) != sum(sizes):
        return values
    parts = zip(values.split(sizes), orders, strict=True)
    return torch.cat([pack(part.view(1, order, order)).view(-1) for part, order in parts])


def _whole_numel(orders: Sequence[int]) -> int:
    return sum(order * order for order in orders)
