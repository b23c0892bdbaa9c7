"""The state of owned blocks: made, brought to its owners, and gathered from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.rule import StateSpec
from ds_optim.sharding.exchange import from_all_ranks
from ds_optim.stepping.eight_bits import CodedBlocks
from ds_optim.stepping.former_state import in_todays_form
from ds_optim.stepping.logical_tensors import Logical, owned_ranges
from ds_optim.stepping.owner_state import BLOCKS, block_views, by_identity, identities, state_spec
from ds_optim.stepping.plans import Plans
from ds_optim.stepping.shards import Shards
from ds_optim.stepping.state_moves import Placed, StateMoves, as_stated, moved, room_for
from ds_optim.stepping.stepper import HeldState, States


class OwnedState:
    """What owners keep for their blocks, beside what is kept for elements that are in no block.

    Args:
        plans: who owns which.
        shards: whose tensors.
        coded: which codes the state of blocks has in eight bits.
        of_others: keys of the state that belongs to no block.
        others: that state.
    """

    def __init__(
        self, plans: Plans, shards: Shards, coded: CodedBlocks, of_others: Sequence[str], others: HeldState
    ) -> None:
        self._plans, self._shards, self._coded = plans, shards, coded
        self._of_others, self._others = of_others, others
        self._state_of_block = plans.state_of_block
        self._followed = -1  # state may have come from a copy, or from a file

    def spec(self, tensor: Tensor) -> dict[str, StateSpec]:
        """What this rank keeps of the blocks of a local tensor."""
        plan, index = self._plans.place_of(tensor)
        spec = state_spec(plan, self._plans.owned(tensor), self._state_of_block)
        if isinstance(tensor, DTensor):  # torch looks for the same keys on every rank
            everyones = state_spec(plan, plan.of_tensor(index), self._state_of_block)
            spec = {**{name: ((0,), dtype) for name, (_, dtype) in everyones.items()}, **spec}
        return spec

    def fill(self, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
        """Write into state that was just made whose it is."""
        if BLOCKS in state:
            state[BLOCKS].copy_(identities(self._plans.place_of(tensor)[0], self._plans.owned(tensor)))

    def logical(self, tensor: Tensor) -> list[dict[str, Logical]]:
        """State of owned blocks for every parameter of a local tensor, by key."""
        plan, index = self._plans.place_of(tensor)
        return owned_ranges(plan, index, self._plans.owned(tensor), self._state_of_block)

    def follow_plan(self, states: States) -> None:
        """Bring the state of blocks to its owners in a new plan: a collective of every group that spreads owners.

        Parameters that join later (unfrozen, another parameter group) change who owns which block.
        """
        plans = self._plans.listed  # made anew if a group was added
        if self._followed == self._plans.generation:
            return
        self._followed = self._plans.generation
        by_group: dict[dist.ProcessGroup | None, list[tuple[Tensor, list[int]]]] = {}
        for tensor in self._shards.tensors if plans else ():
            state = states.get(tensor, {})
            if BLOCKS in state:
                plan, index = self._plans.place_of(tensor)
                kept = by_identity(plan, plan.of_tensor(index), state[BLOCKS])
                assert kept is not None
                by_group.setdefault(self._shards.of(tensor).owner_group, []).append((tensor, kept))
        for group, listed in by_group.items():
            is_elsewhere = any(kept != self._plans.owned(tensor) for tensor, kept in listed)
            if any(from_all_ranks(is_elsewhere, group)):
                self._move_to_owners(states, listed, group)

    def _move_to_owners(
        self, states: States, listed: Sequence[tuple[Tensor, list[int]]], group: dist.ProcessGroup | None
    ) -> None:
        moves, made = StateMoves(), {}
        for tensor, kept in listed:
            plan, index = self._plans.place_of(tensor)
            have, owned = Placed(kept, states[tensor]), self._plans.owned(tensor)
            have = have if group is None else as_stated(plan, self._state_of_block, have)
            like = have.state if group is None else {}
            made[tensor] = room_for(plan, self._state_of_block, owned, like, tensor.device)
            moves.add_blocks(plan, index, self._state_of_block, have, Placed(owned, made[tensor]))
        moves.run(group, listed[0][0].device)
        for tensor, its in made.items():
            empty = {
                key: torch.zeros(shape, dtype=dtype, device=tensor.device)
                for key, (shape, dtype) in self.spec(tensor).items()
                if key not in its
            }
            state = states[tensor]
            for key in [key for key in state if key != "step" and key not in self._of_others]:
                del state[key]
            state.update({**empty, **its})

    def values_of(self, tensor: Tensor, parameter: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `KeptState` says, block behind block."""
        plan, index = self._plans.place_of(tensor)
        blocks = [block for block in plan.of_tensor(index) if plan.blocks[block].parameter == parameter]
        if not blocks:
            return self._others.values_of(tensor, parameter, state)
        blocks.sort(key=lambda block: plan.blocks[block].index)
        found: dict[str, list[Tensor]] = {}
        for kept in block_views(plan, blocks, self._state_of_block, state):
            for key, values in self._coded.decoded(kept).items():  # small blocks have values among others' codes
                found.setdefault(key, []).append(values.flatten())
        return {key: torch.cat(values) for key, values in found.items()}

    # -- in a state dict --------------------------------------------------------------------------------------------

    def _is_spread(self, tensor: Tensor) -> bool:
        """Whether the blocks of a plain tensor that all ranks hold have different owners."""
        plan, _ = self._plans.place_of(tensor)
        is_everywhere = plan.replicated or plan.replicas > 1
        return not isinstance(tensor, DTensor) and is_everywhere and plan.world_size > 1 and not plan.stateless

    def gathered(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A tensor's state with every owner's blocks, on every rank, where blocks are spread: a collective."""
        if not self._is_spread(tensor):
            return state
        plan, index = self._plans.place_of(tensor)
        have, group = Placed(self._plans.owned(tensor), state), self._shards.of(tensor).owner_group
        assert group is not None
        everyones = plan.of_tensor(index)
        return {**state, **moved(plan, index, self._state_of_block, have, everyones, group, tensor.device)}

    def mine_of(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A tensor's state in today's form, with this rank's blocks alone where every owner's were gathered."""
        plan, index = self._plans.place_of(tensor)
        named = state.get(BLOCKS)  # of a mesh, a state dict has something else in its place
        kept = by_identity(plan, plan.of_tensor(index), named) if isinstance(named, Tensor) else None
        if kept is not None:
            state = in_todays_form(plan, kept, self._state_of_block, state)
        if not isinstance(tensor, DTensor) and BLOCKS not in state and not plan.stateless and not plan.of_tensor(index):
            return {**state, BLOCKS: identities(plan, [])}  # there was no block at all when it was saved
        if not self._is_spread(tensor):
            return dict(state)
        everything = plan.of_tensor(index)
        spec = state_spec(plan, everything, self._state_of_block)
        if not all(name in state and tuple(state[name].shape) == shape for name, (shape, _) in spec.items()):
            return dict(state)
        if kept is None or sorted(kept) != sorted(everything):
            return dict(state)  # `is_anothers` says what is wrong
        have = Placed(kept, {key: state[key] for key in spec})
        device = state[BLOCKS].device
        mine = moved(plan, index, self._state_of_block, have, self._plans.owned(tensor), None, device)
        return {**{name: value for name, value in state.items() if name not in spec}, **mine}

    def is_anothers(self, tensor: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether state is of other blocks than this rank owns."""
        kept = state.get(BLOCKS)
        if kept is None:
            return False
        wanted = identities(self._plans.place_of(tensor)[0], self._plans.owned(tensor))
        return not torch.equal(kept.cpu(), wanted)
