"""Whole-matrix rules: blocks belong to owners, which keep their state; what is no matrix is stepped where it lies.

Blocks travel to their owners and their updates back through the exchange of `ds_optim.sharding`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim import kernels
from ds_optim.errors import raise_all
from ds_optim.linalg import packed as packed_matrices
from ds_optim.rule import PackedSymmetric, Settings, StateSpec, WholeMatrix
from ds_optim.sharding import pipeline
from ds_optim.sharding.binding import local_grad, local_of
from ds_optim.sharding.exchange import worker_of
from ds_optim.sharding.plan import Plan
from ds_optim.sharding.schedule import Bucket
from ds_optim.stepping.block_step import BlockStep, stack_size
from ds_optim.stepping.eight_bits import EIGHT_BITS, CodedBlocks
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.kernel_calls import row_major
from ds_optim.stepping.logical_tensors import Logical
from ds_optim.stepping.options import PRODUCTS, Options, judged
from ds_optim.stepping.owned_state import OwnedState
from ds_optim.stepping.owner_state import block_views, state_begins
from ds_optim.stepping.plans import Plans
from ds_optim.stepping.shards import Shards
from ds_optim.stepping.stepper import ShapeRule, States, Together, other_structure
from ds_optim.stepping.withheld import Withheld

_SCHEDULES_KEPT = 64  # sets of tensors whose buckets are remembered: a training run has a few
_MEMORIES_KEPT = 1 << 14  # stacks that a rule remembers something of


class OwnedBlocks:
    """Steps of a whole-matrix rule, see `ds_optim.stepping.stepper.Stepper`.

    Args:
        rule: whose.
        settings: the optimizer's defaults.
        options: of the whole optimizer.
        shards: whose tensors.
        owner: the optimizer's name, for messages.

    Attributes:
        owner: as given.
        plans: who owns which block.
        kept: what is kept for them.
        coded: their state in eight bits, where it has any.
        traffic: what this rank sent and received.
    """

    def __init__(self, rule: WholeMatrix, settings: Settings, options: Options, shards: Shards, owner: str) -> None:
        self.rule, self.options, self.shards, self.owner = rule, options, shards, owner
        self._settings = {**settings, **{key: getattr(options, key) for key in ("state_dtype", *PRODUCTS)}}
        self.coded = CodedBlocks.of(rule)
        self._set_plans(Plans(rule, self._settings, shards))
        self.traffic = pipeline.Traffic()

    def _set_plans(self, plans: Plans) -> None:
        self.plans = plans
        self._others = InPlace(self.rule.others, self.options, self.shards, self.owner, plans.matrices_of)
        self.kept = OwnedState(plans, self.shards, self.coded, self._others.keys, self._others.kept)
        self._withheld = Withheld(self.owner, self.shards)
        self._forget_derived()

    def _forget_derived(self) -> None:
        self._generation = self.plans.generation
        self._begins: dict[Tensor, dict[int, dict[str, int]]] = {}
        self._schedules: dict[tuple[int, ...], tuple[list[Tensor], list[Bucket]]] = {}
        self._memories: dict[int, dict[tuple[int, ...], dict[str, Any]]] = {}
        self._others.forget()

    def at_rank(self, rank: int) -> OwnedBlocks:
        """The same on another rank, of shards that are predicted; the plan is every rank's."""
        shards = self.shards.at_rank(rank)
        other = OwnedBlocks(self.rule, self._settings, self.options, shards, self.owner)
        other._set_plans(self.plans.at_rank(shards))
        return other

    def agreed(self) -> dict[dist.ProcessGroup | None, str]:
        found = self.plans.digests()
        self._others.agreed()
        return found

    def backends(self, device: torch.device) -> set[str]:
        groups = {self.shards.of(tensor).owner_group for tensor in self.shards.tensors}
        where = {device, *(worker_of(device, group) for group in groups)}
        return {*self._others.backends(device), *(kernels.backend_for(None, one) for one in where)}

    # -- state ------------------------------------------------------------------------------------------------------

    @property
    def element_state(self) -> tuple[str, ...]:
        return self._others.element_state

    @property
    def element_keys(self) -> tuple[str, ...]:
        return ()  # what the other rule keeps has no room for matrices

    def spec(self, tensor: Tensor) -> dict[str, StateSpec]:
        return {**self._others.spec(tensor), **self.kept.spec(tensor)}

    def shape_rule(self, key: str) -> ShapeRule:
        return self._others.shape_rule(key) if key in self._others.keys else "owned block"

    def logical_state(self, tensor: Tensor) -> list[dict[str, Logical]]:
        others = self._others.logical_state(tensor)
        return [owned or its for owned, its in zip(self.kept.logical(tensor), others, strict=True)]

    def units(self, tensor: Tensor, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Views (1, *shape per block) of the state of every block of a tensor that this rank owns."""
        plan, _ = self.plans.place_of(tensor)
        return block_views(plan, self.plans.owned(tensor), self.plans.state_of_block, state)

    def blocks_in_words(self, tensor: Tensor) -> list[str]:
        return self.plans.in_words(tensor)

    def structure(self) -> dict[str, Any]:
        return {**self._others.structure(), **{key: self._settings[key] for key in self.rule.structure}}

    def forget_past(self) -> None:
        self._withheld.clear()
        self._memories.clear()

    def buffers(self) -> list[Tensor]:
        shapes = {plan.blocks[block].tile.shape for plan in self.plans.listed for block in range(len(plan.blocks))}
        kept = [one for shape in shapes for one in self.plans.state_of_block(shape).values()]
        tables = packed_matrices.tables({one.order for one in kept if isinstance(one, PackedSymmetric)})
        return [*self._others.buffers(), *self._withheld.buffers(), *tables]

    # -- prediction -------------------------------------------------------------------------------------------------

    def workspace(self, device_type: str) -> list[tuple[int, int]]:
        """Bytes of exchange buffers and of temporaries at the fullest moments of a step: computing, and between.

        Of shards that are predicted, in one shard group.

        Args:
            device_type: where matrix algebra runs; stacks are small on a CPU.
        """
        plan = self.plans.listed[0]
        rank = self.shards.rank_of_owner(self.shards.tensors[0])
        buckets = plan.schedule(range(len(plan.layouts)), rank, self.options.exchange_bucket_size)
        fullest = 0
        coded = 1 + len(self.rule.element_state) if self.options.state_dtype == EIGHT_BITS else 0
        for bucket in buckets:
            blocks = [plan.blocks[one.block] for one in bucket.owned]
            counts = Counter((one.tile.shape, -1 if plan.stateless else one.tensor) for one in blocks)
            for (shape, _), count in counts.items():
                together = min(count, stack_size(device_type, shape, bucket.numel))
                update = self.rule.workspace(self._settings, shape, together, device_type)
                # a stack's state as fp32, and once more in the making
                fullest = max(fullest, update + 4 * coded * together * math.prod(shape))
        computing, any_moment = pipeline.buffer_bytes(buckets, self.options.exchange_dtype.itemsize)
        return [(computing, fullest), (any_moment, 0)]

    # -- the step ---------------------------------------------------------------------------------------------------

    def prepare(
        self, together: Mapping[Together, list[Tensor]], groups: Mapping[int, dict[str, Any]], states: States
    ) -> list[Callable[[], None]]:
        others = [
            f"{key} is {group[key]!r} in a group and was {self._settings[key]!r} at the start: make a new optimizer"
            for group in groups.values()
            for key in other_structure(self, group)
        ]
        raise_all(others, f"{self.owner}: blocks, their state and their schedule cannot change")
        edited = [problem for group in groups.values() for problem in judged(self.rule.checks, group)]
        raise_all(edited, f"{self.owner}: a parameter group")  # by all ranks: in the update its owner would be alone
        self._withheld.raise_if_any(min(key.step for key in together) if self.shards.is_bound and together else None)
        if self._generation != self.plans.generation:
            self._forget_derived()
        launches = self._others.prepare(together, groups, states)
        for key, tensors in together.items():
            by_plan: dict[int, list[Tensor]] = {}
            for tensor in tensors:
                by_plan.setdefault(id(self.plans.place_of(tensor)[0]), []).append(tensor)
            launches += [
                partial(self._step_blocks, of_plan, groups[key.group_id], key, states) for of_plan in by_plan.values()
            ]
        return launches

    def _step_blocks(self, tensors: list[Tensor], group: Settings, key: Together, states: States) -> None:
        plan, _ = self.plans.place_of(tensors[0])
        by_index = {self.plans.place_of(tensor)[1]: tensor for tensor in tensors}
        together = tuple(id(tensor) for tensor in tensors)
        buckets = self._buckets(together, tensors, plan, list(by_index))
        if not buckets:
            return
        flat = {index: row_major(local_of(tensor)) for index, tensor in by_index.items()}
        ranks = self.shards.of(tensors[0]).owner_group
        wire = pipeline.Wire(ranks, key.device, self.options.exchange_dtype, plan.replicated, self.traffic)
        step = BlockStep(
            plan=plan,
            wire=wire,
            flat=flat,
            grads={i: None if (g := local_grad(t)) is None else row_major(g) for i, t in by_index.items()},
            state={index: states[tensor] for index, tensor in by_index.items()},
            begins={index: self._begins_of(tensor) for index, tensor in by_index.items()},
            state_of_block=self.plans.state_of_block,
            coded=self.coded,
            update=partial(self.rule.update, group),
            matmul_precision=self.options.matmul_precision,
            step=key.step,
            step_size=_number(self.rule.step_size(group), wire.carrier),
            decay=1.0
            if key.step < self.rule.first_step
            else _number(1 - group["lr"] * group["weight_decay"], key.device),
            rounding={
                index: rounding
                for index, tensor in by_index.items()
                if (rounding := self._others.rounding([tensor], key.step)) is not None
            },
            memories=self._memories_of(plan),
        )
        failures = step.run(buckets)
        for index, tensor in by_index.items():
            local = local_of(tensor)
            if not local.is_contiguous():
                local.copy_(flat[index].view(local.shape))
        self._withheld.note(together, key.step, failures, plan, step.suspects, ranks)

    def _buckets(
        self, together: tuple[int, ...], tensors: list[Tensor], plan: Plan, indices: Sequence[int]
    ) -> list[Bucket]:
        if together not in self._schedules:
            if len(self._schedules) >= _SCHEDULES_KEPT:
                self._schedules.clear()
            rank = self.shards.rank_of_owner(tensors[0])
            self._schedules[together] = tensors, plan.schedule(indices, rank, self.options.exchange_bucket_size)
        return self._schedules[together][1]

    def _memories_of(self, plan: Plan) -> dict[tuple[int, ...], dict[str, Any]]:
        memories = self._memories.setdefault(id(plan), {})
        if len(memories) >= _MEMORIES_KEPT:
            memories.clear()
        return memories

    def _begins_of(self, tensor: Tensor) -> dict[int, dict[str, int]]:
        if tensor not in self._begins:
            plan, _ = self.plans.place_of(tensor)
            self._begins[tensor] = state_begins(plan, self.plans.owned(tensor), self.plans.state_of_block)
        return self._begins[tensor]


def _number(value: Any, device: torch.device) -> Any:
    """What follows from a learning rate, where it is used: the host's own as a number, moved once if it is moved."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.device.type == "cpu" else value.reshape(()).to(device)
