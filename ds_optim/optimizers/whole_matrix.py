"""Where a whole-matrix rule meets a plan: blocks belong to owners, which keep their state; the rest is Adam's.

`WholeMatrixOptimizer` steps what a rule calls blocks through the exchange of `ds_optim.sharding`, and every other
element (embeddings, output heads, norms, biases) by Adam, whose state lies where the elements lie. A subclass says what
the blocks of a parameter are, what it keeps for one, what one costs and how a stack of equal ones is updated.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.errors import raise_all
from ds_optim.kernels import Rounding
from ds_optim.optimizers.adamw import adam_scalars, adamw_update
from ds_optim.optimizers.block_step import BlockStep, Stack, Suspects, stack_size
from ds_optim.optimizers.launch import Call, Rule, Scalars, StateSpec, Tables, row_major
from ds_optim.optimizers.logical import Logical, element_pieces, owned_pieces, packed
from ds_optim.optimizers.mesh_state import parts_of
from ds_optim.optimizers.owner_state import (
    BLOCKS,
    by_identity,
    gathered,
    identities,
    selected,
    state_begins,
    state_spec,
)
from ds_optim.optimizers.sharded import ShardedOptimizer, Together, dtype_of
from ds_optim.roles import warn_unclaimed
from ds_optim.roles.role import Role
from ds_optim.sharding import pipeline
from ds_optim.sharding.assignment import Tile, Work
from ds_optim.sharding.binding import BoundTensor, local_grad, local_of
from ds_optim.sharding.exchange import ALONE, Ranks, Verdict
from ds_optim.sharding.layout import Layout
from ds_optim.sharding.plan import Plan, make_plans
from ds_optim.sharding.runs import held_spans
from ds_optim.sharding.schedule import Bucket
from ds_optim.sharding.transfer import Part, transfer

_SCHEDULES_KEPT = 64  # sets of tensors whose buckets are remembered: a training run has a few


class _Judged(NamedTuple):
    """What is to be known of a step when the next one begins."""

    step: int
    verdict: Verdict
    plan: Plan
    suspects: list[Suspects]
    ranks: dist.ProcessGroup | None


class WholeMatrixOptimizer(ShardedOptimizer):
    """Base of Shampoo and SWAN.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        defaults: per-group settings; those in ``structure`` decide blocks, state or schedule and hold for all groups.
        exchange_bucket_size: elements; no rank has more than four such buckets in flight or in work, unless a single
            block is larger.
        exchange_dtype: of gradients and updates between holders and owners, fp32 or bf16. bf16 rounds what an owner
            holds itself as well, so that the result does not depend on who holds what.
        common: roles, state_dtype, bf16_stochastic_round and seed, see `ShardedOptimizer`.

    Raises:
        ValueError: every setting out of range, all in one message.
    """

    rule = Rule("adamw", adamw_update, element_state=("exp_avg", "exp_avg_sq"))
    is_elementwise = False
    structure: ClassVar[tuple[str, ...]] = ()
    stack_temporaries: ClassVar[int] = 4
    """What an update takes beside its gradients and state, in units of a stack (measured; the design's bound is 4)."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        exchange_bucket_size: int,
        exchange_dtype: torch.dtype | str,
        **common: Any,
    ) -> None:
        super().__init__(
            params, defaults, exchange_bucket_size=exchange_bucket_size, exchange_dtype=exchange_dtype, **common
        )
        self.exchange_bucket_size = exchange_bucket_size
        self.exchange_dtype = dtype_of(exchange_dtype) or torch.float32

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_exchange": (self.exchange_bucket_size, self.exchange_dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_exchange" in state:  # absent where torch's load_state_dict hands over what it loaded
            self.exchange_bucket_size, self.exchange_dtype = state.pop("_exchange")
        super().__setstate__(state)

    def _start(self, roles: Any, state_dtype: torch.dtype) -> None:
        super()._start(roles, state_dtype)
        self._plans: list[Plan] = []
        self._planned: dict[Tensor, tuple[Plan, int]] = {}
        self._matrices: dict[Tensor, frozenset[int]] = {}
        self._begins: dict[Tensor, dict[int, dict[str, int]]] = {}
        self._schedules: dict[tuple[int, ...], list[Bucket]] = {}
        self._verdicts: dict[tuple[int, ...], _Judged] = {}
        self.traffic = pipeline.Traffic()

    # -- what a rule says -------------------------------------------------------------------------------------------

    @abstractmethod
    def tiles(self, role: Role, shape: tuple[int, ...]) -> list[Tile]:
        """The blocks of a parameter of this role and logical shape; none if Adam steps it."""

    @abstractmethod
    def block_state(self, shape: tuple[int, ...]) -> dict[str, StateSpec]:
        """What is kept for one block: shape and dtype by name."""

    @abstractmethod
    def work(self, shape: tuple[int, ...]) -> Work:
        """What one block costs its owner."""

    @abstractmethod
    def update(self, group: dict[str, Any], stack: Stack) -> Mapping[str, Tensor]:
        """Turn a stack's gradients into updates; see `ds_optim.optimizers.block_step.Update`."""

    @property
    def frequency(self) -> int:
        """Steps between two refreshes of a block."""
        return 1

    @property
    def staggered(self) -> bool:
        """Whether blocks refresh in different steps."""
        return False

    def step_size(self, group: dict[str, Any]) -> Any:
        """What updates are multiplied by."""
        return group["lr"]

    @property
    def element_keys(self) -> tuple[str, ...]:
        return ()  # the fallback's state is packed: matrices have none

    def scalars(self, group: dict[str, Any], step: int) -> Scalars:
        """Constants of the Adam that steps what is no matrix."""
        return adam_scalars(group, step)

    # -- settings ---------------------------------------------------------------------------------------------------

    @classmethod
    def setting_problems(cls, settings: Mapping[str, Any]) -> list[str]:
        problems = super().setting_problems(settings)
        size = settings.get("exchange_bucket_size", 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            problems.append(f"exchange_bucket_size must be a whole number of elements >= 1, not {size!r}")
        if dtype_of(settings.get("exchange_dtype", torch.float32)) is None:
            problems.append(f"exchange_dtype must be fp32 or bf16, not {settings['exchange_dtype']!r}")
        return problems

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        others = [
            f"{key} is a setting of the whole optimizer: {self.defaults[key]!r}, not {param_group[key]!r} for one group"
            for key in self._other_structure(param_group)
        ]
        raise_all(others, f"{type(self).__name__}: a parameter group")
        super().add_param_group(param_group)
        self._forget_plans()

    def _other_structure(self, settings: Mapping[str, Any]) -> list[str]:
        """The structural settings that these state otherwise than the optimizer was made with."""
        return [key for key in self.structure if settings.get(key, self.defaults[key]) != self.defaults[key]]

    # -- the plan ---------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Who owns which block; ``print(optimizer.plan.explain())``. Of the first shard group if there are several."""
        self._make_plans()
        return self._plans[0]

    def _warn_unclaimed(self, roles: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]]) -> None:
        def is_understood(role: Role) -> bool:
            return role.kind != "other" and not (role.kind == "fused" and not role.parts)

        warn_unclaimed(roles, shapes, is_understood, "takes them for single (out, in) matrices, not for embeddings")

    def _forget_layouts(self) -> None:
        super()._forget_layouts()
        self._forget_plans()

    def _forget_plans(self) -> None:
        self._plans.clear()
        self._planned.clear()
        self._matrices.clear()
        self._begins.clear()
        self._schedules.clear()

    def _check_layouts(self, tensors: Sequence[Tensor]) -> bool:
        joined = super()._check_layouts(tensors)
        if joined:
            self._settle()
        return joined

    def _agreed(self) -> str:
        if not self.is_bound and any(tensor not in self._planned for tensor in self._trained()):
            self._forget_plans()
        self._make_plans()
        return "".join(plan.digest for plan in self._plans)

    def _on_bind(self) -> str:
        shapes = {spec.name: spec.shape for one in self._bound.values() for spec in one.layout.parameters}
        self._warn_unclaimed({name: self._roles[name] for name in shapes}, shapes)
        self._verdicts.clear()
        return self._agreed()

    def plan_over(self, layouts: Sequence[Layout]) -> Plan:
        """The plan for other ranks or another strategy, from shapes alone (see `ds_optim.sharding.predict`).

        Args:
            layouts: of the parameters that this optimizer was given, by the names that it was given.
        """
        return self._plans_over([(layout, None, 1) for layout in layouts])[0][0]

    def _plans_over(
        self, layouts: Sequence[tuple[Layout, dist.ProcessGroup | None, int]]
    ) -> list[tuple[Plan, tuple[int, ...]]]:
        roles = self._roles_of_parameters()
        specs = {spec.name: spec.shape for layout, _, _ in layouts for spec in layout.parameters}
        tiles = {name: self.tiles(roles[name], shape) for name, shape in specs.items()}
        stateless = not self.block_state((1, 1))  # of the rule, not of these parameters: others may join
        return make_plans(layouts, tiles, self.work, self.frequency, self.staggered, stateless)

    def _make_plans(self) -> None:
        if self._plans:
            return
        # Frozen parameters have no place in the schedule: no engine would know of them.
        tensors = list(self._bound) or self._trained()
        bounds = [self._bound_tensor(tensor) for tensor in tensors]
        for plan, members in self._plans_over([(b.layout, b.owner_group, b.replicas) for b in bounds]):
            self._plans.append(plan)
            self._planned.update({tensors[member]: (plan, index) for index, member in enumerate(members)})
        for tensor in tensors:
            if BLOCKS in self.state.get(tensor, {}) and self._bound_tensor(tensor).owner_group is None:
                self._reorder(tensor)

    def _reorder(self, tensor: Tensor) -> None:
        """Bring the state of a tensor's blocks into the order of a new plan: new parameters shift the refreshes."""
        plan, _ = self._plan_of(tensor)
        state, owned = self.state[tensor], self._owned(tensor)
        kept = by_identity(plan, owned, state[BLOCKS])
        assert kept is not None, "the blocks of a parameter do not change"
        if kept != owned:
            state.update(selected(plan, state, kept, owned, self.block_state))

    def _plan_of(self, tensor: Tensor) -> tuple[Plan, int]:
        """The plan of a tensor's shard group, and the tensor's index there."""
        self._make_plans()
        self._bound_tensor(tensor)  # refuses a tensor that an engine made later
        if tensor not in self._planned:  # it was frozen until now
            self._forget_plans()
            self._make_plans()
        if tensor not in self._planned:
            raise ValueError(
                f"{self._names.get(tensor)} is frozen (requires_grad is False) and nobody owns its blocks: unfreeze it "
                "first, or leave its state out of what is loaded"
            )
        return self._planned[tensor]

    def _settle(self) -> None:
        """Bring the state of blocks to its owners in a new plan: a collective of every group that spreads owners.

        Parameters that join later (unfrozen, another parameter group) change who owns which block.
        """
        by_group: dict[dist.ProcessGroup, list[Tensor]] = {}
        for tensor in self._planned:
            group = self._bound_tensor(tensor).owner_group
            if group is not None and BLOCKS in self.state.get(tensor, {}):
                by_group.setdefault(group, []).append(tensor)
        for group, tensors in by_group.items():
            have: list[Part] = []
            want: list[Part] = []
            moved = {}
            count = 0
            for tensor in tensors:
                plan, index = self._plan_of(tensor)
                state, fresh = self.state[tensor], self.fresh_state(tensor)
                blocks = {(plan.blocks[b].parameter, plan.blocks[b].index): b for b in plan.of_tensor(index)}
                kept = [blocks[parameter, block] for parameter, block in state[BLOCKS].tolist()]
                old, new = (owned_pieces(plan, index, mine, self.block_state) for mine in (kept, self._owned(tensor)))
                for before, after in zip(old, new, strict=True):
                    for key in before:
                        have += parts_of(count, before[key].written, state.get(key))
                        want += parts_of(count, after[key].read, fresh.get(key))
                        count += 1
                moved[tensor] = {**fresh, **{key: state[key] for key in ("step", *self.rule.element_state)}}
            transfer(have, want, group, tensors[0].device)
            self.state.update(moved)

    def _owned(self, tensor: Tensor) -> list[int]:
        plan, index = self._plan_of(tensor)
        return plan.owned(index, self._rank(tensor))

    def _rank(self, tensor: Tensor) -> int:
        """This process's rank among the owners (a replicated tensor of an engine is bound with rank 0)."""
        bound = self._bound_tensor(tensor)
        return bound.rank if bound.owner_group is None else dist.get_rank(bound.owner_group)

    # -- state ------------------------------------------------------------------------------------------------------

    def _fallback_spans(self, tensor: Tensor) -> list[tuple[int, int]]:
        """What Adam steps of a tensor, as ``(start, length)``."""
        if tensor not in self._matrices:
            plan, index = self._plan_of(tensor)
            self._matrices[tensor] = frozenset(plan.blocks[block].parameter for block in plan.of_tensor(index))
        bound = self._bound_tensor(tensor)
        return held_spans(bound.layout, bound.rank, self._matrices[tensor])

    def _state_spec(self, tensor: Tensor) -> dict[str, StateSpec]:
        plan, index = self._plan_of(tensor)
        spec = {**self._fallback_spec(tensor), **state_spec(plan, self._owned(tensor), self.block_state)}
        if isinstance(tensor, DTensor):  # torch looks for the same keys on every rank
            everyones = state_spec(plan, plan.of_tensor(index), self.block_state)
            spec = {**{name: ((0,), dtype) for name, (_, dtype) in everyones.items()}, **spec}
        return spec

    def _fallback_spec(self, tensor: Tensor) -> dict[str, StateSpec]:
        numel = sum(length for _, length in self._fallback_spans(tensor))
        all_adams = not self._matrices[tensor] if isinstance(tensor, DTensor) else numel == tensor.numel()
        shape = tuple(tensor.shape) if all_adams else (numel,)
        return dict.fromkeys(self.rule.element_state, (shape, self.state_dtype))

    def fresh_state(self, tensor: Tensor) -> dict[str, Any]:
        state = super().fresh_state(tensor)
        if BLOCKS in state:
            state[BLOCKS].copy_(identities(self._plan_of(tensor)[0], self._owned(tensor)))
        return state

    def predicted_workspace(self, rank: int, device_type: str = "cpu") -> list[tuple[int, int]]:
        """Bytes of exchange buffers and of temporaries at the fullest moments of a step on ``rank``: while it computes,
        and between. After `predicted_state` only.

        Args:
            device_type: where matrix algebra runs; stacks are small on a CPU.
        """
        self._make_plans()
        plan = self._plans[0]
        buckets = plan.schedule(range(len(plan.layouts)), rank, self.exchange_bucket_size)
        largest = 0
        for bucket in buckets:
            counts = Counter(plan.blocks[one.block].tile.shape for one in bucket.owned)
            for shape, count in counts.items():
                together = min(count, stack_size(device_type, shape, bucket.numel))
                largest = max(largest, 4 * together * max(math.prod(shape), max(shape) ** 2))
        computing, any_moment = pipeline.buffer_bytes(buckets, self.exchange_dtype.itemsize)
        return [(computing, self.stack_temporaries * largest), (any_moment, 0)]

    # -- the step ---------------------------------------------------------------------------------------------------

    def _call(self, tensors: list[Tensor], scalars: Scalars, rounding: Rounding | None) -> Call:
        stretches = []
        for index, tensor in enumerate(tensors):
            begin = 0
            for start, length in self._fallback_spans(tensor):
                stretches.append((index, start, length, begin))
                begin += length
        return super()._call(tensors, scalars, rounding).narrowed(stretches)

    def _tables_of(self, tensors: list[Tensor], bounds: list[BoundTensor]) -> Tables:
        return Tables()  # `narrowed` walks other ones

    def _prepare(
        self, together: Mapping[Together, list[Tensor]], groups: Mapping[int, dict[str, Any]]
    ) -> list[Callable[[], None]]:
        others = [
            f"{key} is {group[key]!r} in a group and was {self.defaults[key]!r} at the start: make a new optimizer"
            for group in groups.values()
            for key in self._other_structure(group)
        ]
        raise_all(others, f"{type(self).__name__}: blocks, their state and their schedule cannot change")
        self._raise_if_failed(min(key.step for key in together) if self.is_bound and together else None)
        launches = super()._prepare(together, groups)
        for key, tensors in together.items():
            by_plan: dict[int, list[Tensor]] = {}
            for tensor in tensors:
                by_plan.setdefault(id(self._plan_of(tensor)[0]), []).append(tensor)
            launches += [partial(self._step_blocks, of_plan, groups[key.group_id], key) for of_plan in by_plan.values()]
        return launches

    def _step_blocks(self, tensors: list[Tensor], group: dict[str, Any], key: Together) -> None:
        plan, _ = self._plan_of(tensors[0])
        by_index = {self._planned[tensor][1]: tensor for tensor in tensors}
        together = tuple(id(tensor) for tensor in tensors)
        if together not in self._schedules:
            if len(self._schedules) >= _SCHEDULES_KEPT:
                self._schedules.clear()
            rank = self._rank(tensors[0])
            self._schedules[together] = plan.schedule(list(by_index), rank, self.exchange_bucket_size)
        buckets = self._schedules[together]
        if not buckets:
            return
        flat = {index: row_major(local_of(tensor)) for index, tensor in by_index.items()}
        ranks = self._bound_tensor(tensors[0]).owner_group
        for tensor in tensors:
            if tensor not in self._begins:
                self._begins[tensor] = state_begins(plan, self._owned(tensor), self.block_state)
        step = BlockStep(
            plan=plan,
            wire=pipeline.Wire(ranks, key.device, self.exchange_dtype, plan.replicated, self.traffic),
            flat=flat,
            grads={i: None if (g := local_grad(t)) is None else row_major(g) for i, t in by_index.items()},
            state={index: self.state[tensor] for index, tensor in by_index.items()},
            begins={index: self._begins[tensor] for index, tensor in by_index.items()},
            block_state=self.block_state,
            update=partial(self.update, group),
            step=key.step,
            step_size=_number(self.step_size(group)),
            decay=_number(1 - group["lr"] * group["weight_decay"]),
            rounding={
                index: rounding
                for index, tensor in by_index.items()
                if (rounding := self._rounding([tensor], key.step)) is not None
            },
        )
        failures = step.run(buckets)
        for index, tensor in by_index.items():
            local = local_of(tensor)
            if not local.is_contiguous():
                local.copy_(flat[index].view(local.shape))
        self._verdicts[together] = _Judged(key.step, Verdict(failures, ranks), plan, step.suspects, ranks)

    def _raise_if_failed(self, step: int | None) -> None:
        """Raise on all ranks of a shard group if any of them withheld an update before this step.

        An engine makes several calls per step: the first hears of everything in the previous step, before any weight
        changes in this one.

        Args:
            step: about to be made; None where every call is a step of its own.

        Raises:
            RuntimeError: names every block, its owner and the reason. An optimizer without an engine may go on; an
                engine's own bookkeeping does not survive errors in a step.
        """
        listed = []
        for key in [key for key, judged in self._verdicts.items() if step is None or judged.step < step]:
            _, verdict, plan, suspects, group = self._verdicts.pop(key)
            if not verdict.read():
                continue
            mine = [
                f"{plan.name(block)}: {reason}"
                for one in suspects
                for reason, flags in one.reasons.items()
                for block, failed in zip(one.blocks, flags.tolist(), strict=True)
                if failed
            ]
            found = (ALONE if group is None else Ranks((group,))).everyones(mine)
            listed += [f"rank {rank}: {entry}" for rank, entries in found.items() for entry in entries]
        if listed:
            raise RuntimeError(
                f"{type(self).__name__} withheld the updates of these blocks in the previous step. Remedy: find out "
                "why (data, learning rate, loss scale) and resume from the last checkpoint; gradient clipping and bf16 "
                "help most.\n- " + "\n- ".join(listed)
            )

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def logical_state(self, tensor: Tensor) -> list[dict[str, Logical]]:
        plan, index = self._plan_of(tensor)
        bound = self._bound_tensor(tensor)
        matrices = {plan.blocks[block].parameter for block in plan.of_tensor(index)}
        pieces = element_pieces(bound.layout, bound.rank)
        adams = packed([[] if parameter in matrices else held for parameter, held in enumerate(pieces)])
        found = owned_pieces(plan, index, self._owned(tensor), self.block_state)
        for parameter, spec in enumerate(bound.layout.parameters):
            if parameter not in matrices:
                held = adams[parameter]
                found[parameter] = {
                    key: Logical(spec.numel, self.state_dtype, held, held) for key in self.rule.element_state
                }
        return found

    def _blocks_in_words(self, tensor: Tensor) -> list[str]:
        plan, index = self._plan_of(tensor)
        tiles: dict[int, list[tuple[int, Tile]]] = {}
        for block in plan.of_tensor(index):
            one = plan.blocks[block]
            tiles.setdefault(one.parameter, []).append((one.index, one.tile))
        words = []
        for parameter in range(len(plan.layouts[index].parameters)):
            listed = [tile for _, tile in sorted(tiles.get(parameter, []), key=lambda entry: entry[0])]
            if listed:
                largest = "x".join(str(size) for size in max(tile.shape for tile in listed))
                hashed = hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
                words.append(f"{len(listed)} of at most {largest} (hash {hashed})")
            else:
                words.append("no matrix: Adam")
        return words

    def structural_settings(self) -> dict[str, Any]:
        return {**super().structural_settings(), **{key: self.defaults[key] for key in self.structure}}

    def forget_past(self) -> None:
        self._verdicts.clear()
        self._forget_plans()  # and what rules remember along with them

    def _with_blocks(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict in which also a tensor without blocks lists them, as it did not when there were none at all."""
        states = dict(state_dict["state"])
        for key, tensor in self.keyed(state_dict):
            if states.get(key) and BLOCKS not in states[key] and not isinstance(tensor, DTensor):
                plan, index = self._plan_of(tensor)
                if not plan.stateless and not plan.of_tensor(index):
                    states[key] = {**states[key], BLOCKS: identities(plan, [])}
        return {**state_dict, "state": states}

    def state_problems(self, state_dict: Mapping[str, Any]) -> list[str]:
        state_dict = self._of_this_rank(state_dict)
        problems = super().state_problems(state_dict)
        for group in state_dict["param_groups"]:
            problems += [
                f"{key} was {group[key]!r} and is {self.defaults[key]!r} here: the state belongs to other blocks or "
                "another schedule"
                for key in self._other_structure(group)
            ]
        if problems:
            return list(dict.fromkeys(problems))
        for key, tensor in self.keyed(state_dict):
            kept = state_dict["state"].get(key, {}).get(BLOCKS)
            if kept is not None and not torch.equal(
                kept.cpu(), identities(self._plan_of(tensor)[0], self._owned(tensor))
            ):
                problems.append(
                    f"the state of {self._names[tensor]} holds another rank's blocks, or of other "
                    "blocks: load this rank's own file with the roles and sizes it was saved with, or use "
                    "ds_optim.checkpoint, which takes any number of ranks"
                )
        return problems

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`.

        Where parameters are replicated over ranks (ZeRO-0), every owner's blocks are gathered, so that whichever rank
        saves has all of them: all ranks must call it, as DeepSpeed's ``save_checkpoint`` does. Elsewhere it holds what
        this rank owns.
        """
        if self.state and not self.is_bound:
            self._check_layouts(self._trained())
        found: dict[str, Any] = super().state_dict()
        for key, tensor in self.keyed(found):
            if key in found["state"] and self._is_spread(tensor):
                plan, index = self._plan_of(tensor)
                group, kept = self._bound_tensor(tensor).group, found["state"][key]
                assert group is not None
                everyones = gathered(
                    plan, kept, self._owned(tensor), plan.of_tensor(index), self.block_state, group, tensor.device
                )
                found["state"][key] = {**kept, **everyones}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `ShardedOptimizer.load_state_dict`; of a gathered state every owner takes its blocks."""
        super().load_state_dict(self._of_this_rank(state_dict))
        self._verdicts.clear()

    def _of_this_rank(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict with this rank's blocks alone where every owner's were gathered."""
        state_dict = self._with_blocks(state_dict)
        states = dict(state_dict["state"])
        for key, tensor in self.keyed(state_dict):
            if states.get(key) and self._is_spread(tensor):
                plan, index = self._plan_of(tensor)
                everything, kept = plan.of_tensor(index), states[key]
                spec = state_spec(plan, everything, self.block_state)
                if all(name in kept and tuple(kept[name].shape) == shape for name, (shape, _) in spec.items()):
                    order = by_identity(plan, everything, kept[BLOCKS])
                    if order is not None:  # otherwise `state_problems` says what is wrong
                        mine = selected(plan, kept, order, self._owned(tensor), self.block_state)
                        others = {name: value for name, value in kept.items() if name not in spec}
                        states[key] = {**others, **mine}
        return {**state_dict, "state": states}

    def _is_spread(self, tensor: Tensor) -> bool:
        """Whether the blocks of a plain tensor that all ranks hold have different owners."""
        plan, _ = self._plan_of(tensor)
        return not isinstance(tensor, DTensor) and plan.replicated and plan.world_size > 1 and not plan.stateless


def _number(value: Any) -> Any:
    """A learning rate of shape (1,) as one of shape ()."""
    return value.reshape(()) if isinstance(value, Tensor) else value
