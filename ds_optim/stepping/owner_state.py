"""The state of owned blocks: one flat tensor per kind, block behind block.

Beside a rule's own kinds there is ``blocks``, the identity of every block that has state here, so that nobody takes
another rank's for its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ds_optim.rule import StateSpec
from ds_optim.sharding.plan import Plan

StateOfBlock = Callable[[tuple[int, ...]], Mapping[str, StateSpec]]
"""What a rule keeps for one block of a shape, by name."""

BLOCKS = "blocks"


def state_spec(plan: Plan, blocks: Sequence[int], state_of_block: StateOfBlock) -> dict[str, StateSpec]:
    """What is kept for these blocks; nothing at all under a stateless rule."""
    if plan.stateless:
        return {}
    spec: dict[str, StateSpec] = {}
    for block in blocks:
        for name, (shape, dtype) in state_of_block(plan.blocks[block].tile.shape).items():
            size = spec[name][0][0] if name in spec else 0
            spec[name] = ((size + math.prod(shape),), dtype)
    return {**spec, BLOCKS: ((len(blocks), 2), torch.int64)}


def state_begins(plan: Plan, blocks: Sequence[int], state_of_block: StateOfBlock) -> dict[int, dict[str, int]]:
    """Where each block's state begins in those flat tensors."""
    begins: dict[int, dict[str, int]] = {}
    position: dict[str, int] = {}
    for block in blocks:
        spec = state_of_block(plan.blocks[block].tile.shape)
        begins[block] = {name: position.get(name, 0) for name in spec}
        for name, (shape, _) in spec.items():
            position[name] = position.get(name, 0) + math.prod(shape)
    return begins


def block_views(
    plan: Plan, blocks: Sequence[int], state_of_block: StateOfBlock, state: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Views (1, *shape per block) of the state of blocks that stands one behind the other in flat tensors."""
    for block, begins in state_begins(plan, blocks, state_of_block).items():
        spec = state_of_block(plan.blocks[block].tile.shape)
        yield {
            name: state[name].narrow(0, begins[name], math.prod(shape)).view(1, *shape)
            for name, (shape, _) in spec.items()
        }


def identities(plan: Plan, blocks: Sequence[int]) -> Tensor:
    """(parameter, index) of blocks, (B, 2) int64."""
    entries = [(plan.blocks[block].parameter, plan.blocks[block].index) for block in blocks]
    return torch.tensor(entries, dtype=torch.int64, device="cpu").reshape(-1, 2)


def by_identity(plan: Plan, blocks: Sequence[int], kept: Tensor) -> list[int] | None:
    """The blocks that (B, 2) identities name, in their order; None if one is not among ``blocks``."""
    known = {(plan.blocks[block].parameter, plan.blocks[block].index): block for block in blocks}
    found = [known.get((parameter, index)) for parameter, index in kept.tolist()]
    listed = [block for block in found if block is not None]
    return listed if len(listed) == len(found) else None
