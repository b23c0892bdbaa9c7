"""The one way that state moves between tensors and ranks: what is there, what is wanted, one exchange.

State is moved as ranges of logical tensors (`ds_optim.stepping.logical_tensors`), which do not depend on ranks: from an
old plan's owners to a new one's, from all owners to every rank and back, into the form of a DTensor and out of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.sharding.plan import Plan
from ds_optim.sharding.transfer import RangePart, transfer
from ds_optim.stepping.logical_tensors import owned_ranges, slices
from ds_optim.stepping.owner_state import BLOCKS, StateOfBlock, identities, state_spec


class Placed(NamedTuple):
    """The state of some blocks of a local tensor, in the order in which it lies there.

    Attributes:
        blocks: of the plan.
        state: by key; a key may be missing where there are no blocks that have it.
    """

    blocks: Sequence[int]
    state: Mapping[str, Tensor]


class StateMoves:
    """State on its way. Every logical tensor is added on all ranks of the exchange, in the same order."""

    def __init__(self) -> None:
        self._have: list[RangePart] = []
        self._want: list[RangePart] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, have: Sequence[tuple[int, Tensor]], want: Sequence[tuple[int, Tensor]]) -> None:
        """One logical tensor: where ranges of it begin that are here, or wanted here, and their values."""
        self._have += [(self._count, start, values) for start, values in have]
        self._want += [(self._count, start, values) for start, values in want]
        self._count += 1

    def add_blocks(self, plan: Plan, tensor: int, state_of_block: StateOfBlock, have: Placed, want: Placed) -> None:
        """All state of the blocks of a local tensor.

        Args:
            plan: whose blocks.
            tensor: index in the plan.
            state_of_block: what is kept for a block.
            have: what is here.
            want: what is to be filled.
        """
        before, after = (owned_ranges(plan, tensor, one.blocks, state_of_block) for one in (have, want))
        for old, new in zip(before, after, strict=True):
            for key in old:
                self.add(slices(old[key].written, have.state.get(key)), slices(new[key].read, want.state.get(key)))

    def run(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Fill what is wanted: a collective of the group.

        Args:
            group: None: this process has everything that it wants.
            device: of the values.
        """
        transfer(self._have, self._want, group, device)


def moved(
    plan: Plan,
    tensor: int,
    state_of_block: StateOfBlock,
    have: Placed,
    blocks: Sequence[int],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The state of other blocks of a local tensor, or of the same in another order; see `StateMoves.run`.

    Without a group it keeps its dtypes, over a group it has those that the rule states.
    """
    have = have if group is None else as_stated(plan, state_of_block, have)
    want = Placed(blocks, room_for(plan, state_of_block, blocks, {} if group is not None else have.state, device))
    moves = StateMoves()
    moves.add_blocks(plan, tensor, state_of_block, have, want)
    moves.run(group, device)
    return dict(want.state)


def room_for(
    plan: Plan, state_of_block: StateOfBlock, blocks: Sequence[int], like: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Zeros for the state of blocks, and their identities.

    Args:
        like: has the dtypes; those of keys that it lacks are as the rule states.
    """
    made = {
        key: torch.zeros(shape, dtype=like[key].dtype if key in like else dtype, device=device)
        for key, (shape, dtype) in state_spec(plan, blocks, state_of_block).items()
    }
    return {**made, BLOCKS: identities(plan, blocks).to(device)} if BLOCKS in made else made


def as_stated(plan: Plan, state_of_block: StateOfBlock, placed: Placed) -> Placed:
    """State in the dtypes that the rule states, in which it can meet that of other ranks."""
    spec = state_spec(plan, placed.blocks, state_of_block)
    return Placed(placed.blocks, {key: placed.state[key].to(spec[key][1]) for key in spec if key in placed.state})
