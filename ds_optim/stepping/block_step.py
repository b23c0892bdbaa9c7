"""One step over the blocks of a plan: owners turn stacks of gradients into updates, holders subtract them.

Runs on what `ds_optim.sharding.pipeline` delivers. What an update is, is the rule's business; what a rule keeps for a
block lies in the optimizer's state, block behind block, so that a stack of equal blocks is a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_optim import kernels
from ds_optim.known_torch import fp32_products
from ds_optim.linalg.precision import MatmulPrecision
from ds_optim.linalg.workers import Stepwise, finish, finish_all
from ds_optim.sharding import pipeline
from ds_optim.sharding.exchange import DeviceCopy, HostCopy
from ds_optim.sharding.plan import Plan
from ds_optim.sharding.schedule import Bucket, Owned, Piece
from ds_optim.stack import Stack, are_finite, withhold
from ds_optim.stepping.eight_bits import CodedBlocks
from ds_optim.stepping.owner_state import StateOfBlock

_STACK_ELEMENTS = {"cpu": 1 << 20}
"""A stack's temporaries should fit the cache of a CPU; elsewhere only the bucket limits a stack."""


def stack_size(device_type: str, shape: Sequence[int], bucket: int) -> int:
    """Blocks of a shape that are updated together, at most, out of a bucket of so many elements."""
    return max(_STACK_ELEMENTS.get(device_type, bucket) // max(math.prod(shape), max(shape) ** 2), 1)


@dataclass(frozen=True, slots=True)
class Suspects:
    """The blocks of one stack and, by reason, which of them went wrong; the flags stay on their device."""

    blocks: tuple[int, ...]
    reasons: Mapping[str, Tensor]


class _Fetched(NamedTuple):
    """A stack: its blocks, gradients, and state as it is kept and as it comes to where it is worked with."""

    blocks: tuple[int, ...]
    grads: Tensor
    stored: Mapping[str, Tensor]
    coming: Mapping[str, Tensor | DeviceCopy]


@dataclass(slots=True)
class BlockStep:
    """One step over the blocks of tensors that share their settings.

    Attributes:
        plan: of their shard group.
        wire: how buckets travel.
        flat: local tensors, flat, by their index in the plan; updated in place.
        grads: their flat gradients; None counts as zero.
        state: the optimizer's state of each tensor.
        begins: where each owned block's state begins there.
        state_of_block: what the rule keeps for a block.
        coded: its state in eight bits, where it has any.
        update: the rule, see `ds_optim.rule.WholeMatrix`.
        matmul_precision: of its products.
        step: count, from 1.
        step_size: what updates are multiplied by before they are subtracted.
        decay: what parameters are multiplied by before.
        rounding: of each bf16 tensor that is not rounded to nearest, as the only tensor of a call.
        memories: what the rule remembers of each stack, by its blocks.
        suspects: collected as stacks are computed.
        returning: state of stacks on its way from the accelerator to the host, where it is kept.
    """

    plan: Plan
    wire: pipeline.Wire
    flat: Mapping[int, Tensor]
    grads: Mapping[int, Tensor | None]
    state: Mapping[int, dict[str, Any]]
    begins: Mapping[int, Mapping[int, Mapping[str, int]]]
    state_of_block: StateOfBlock
    coded: CodedBlocks
    update: Callable[[Stack], Mapping[str, Tensor] | Stepwise[Mapping[str, Tensor]]]
    matmul_precision: MatmulPrecision
    step: int
    step_size: Any
    decay: Any
    rounding: Mapping[int, kernels.Rounding]
    memories: dict[tuple[int, ...], dict[str, Any]]
    suspects: list[Suspects] = field(default_factory=list)
    returning: list[list[tuple[Tensor, HostCopy]]] = field(default_factory=list)

    def run(self, buckets: Sequence[Bucket]) -> Tensor:
        """Update every block; how many blocks of this rank went wrong (0-dim fp32, not waited for)."""
        pipeline.run(buckets, self.wire, self._gradient_of, self._compute, self._apply)
        self._return(0)
        flags = [flag for one in self.suspects for flag in one.reasons.values()]
        if not flags:
            return torch.zeros((), device=self.wire.carrier)
        return torch.cat(flags).sum(dtype=torch.float32)

    def _gradient_of(self, piece: Piece) -> Tensor | None:
        return self.grads[piece.tensor]

    def _compute(self, bucket: Bucket, work: Tensor) -> None:
        with fp32_products("ieee"):
            finish_all(self._updates(bucket, work))

    def _updates(self, bucket: Bucket, work: Tensor) -> Iterator[Stepwise[None]]:
        """Of every stack; what an accelerator needs of the next one's state is on its way meanwhile."""
        before: _Fetched | None = None
        for blocks, grads in self._stacks(bucket, work):
            self._return(1)  # an accelerator has the state of three stacks at most
            stored = self._stored(blocks)
            coming = {name: _fetched(kept, grads.device) for name, kept in stored.items()}
            if before is not None:
                yield self._update_stack(before)
            before = _Fetched(blocks, grads, stored, coming)
        if before is not None:
            yield self._update_stack(before)

    def _stacks(self, bucket: Bucket, work: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Neighbours of equal shape, whose state lies in one piece; few enough for a cache."""

        def likeness(one: Owned) -> tuple[tuple[int, ...], int]:
            block = self.plan.blocks[one.block]
            return block.tile.shape, -1 if self.plan.stateless else block.tensor

        start = 0
        for (shape, _), equal in groupby(bucket.owned, likeness):
            listed = [one.block for one in equal]
            numel = math.prod(shape)
            most = stack_size(work.device.type, shape, work.numel())
            for first in range(0, len(listed), most):
                blocks = tuple(listed[first : first + most])
                yield blocks, work.narrow(0, start, len(blocks) * numel).view(len(blocks), *shape)
                start += len(blocks) * numel

    def _update_stack(self, fetched: _Fetched) -> Stepwise[None]:
        blocks, grads, stored, coming = fetched
        first = self.plan.blocks[blocks[0]]
        good = are_finite(grads)
        withhold(grads, good, 0)
        working = {name: _working(one) for name, one in coming.items()}
        offsets = tuple(self.plan.blocks[block].offset for block in blocks)
        memory = self.memories.get(blocks, {})
        in_codes = self.coded.has(working)
        state = self.coded.decoded(working) if in_codes else working
        update = self.update(
            Stack(first.tile.shape, grads, state, good, self.step, offsets, memory, self.matmul_precision)
        )
        if isinstance(update, Mapping):
            failed = update
        elif not in_codes and all(working[name] is kept for name, kept in stored.items()):
            failed = yield from update
        else:  # copies of state: not those of many stacks
            failed = finish(update)
        if in_codes:
            self.coded.keep_(working, state, good)
        if memory:
            self.memories[blocks] = memory
        self.returning.append([])
        for name, kept in stored.items():
            if working[name].device != kept.device:
                self.returning[-1].append((kept, HostCopy(working[name])))
            elif working[name] is not kept:
                kept.copy_(working[name])
        reasons = {"its gradient is not finite": ~good, **failed}
        withhold(grads, ~torch.stack(list(reasons.values())).any(0), 0)
        grads.mul_(self.step_size)
        self.suspects.append(Suspects(blocks, reasons))

    def _return(self, stacks: int) -> None:
        """Put state where it is kept, but for that of the last ``stacks``, which the accelerator may still work on."""
        while len(self.returning) > stacks:
            for kept, copy in self.returning.pop(0):
                kept.copy_(copy.wait())

    def _stored(self, blocks: Sequence[int]) -> dict[str, Tensor]:
        """The state of consecutive equal blocks: views, (B, *shape per block)."""
        first = self.plan.blocks[blocks[0]]
        found = {}
        for name, (shape, _) in self.state_of_block(first.tile.shape).items():
            begin = self.begins[first.tensor][blocks[0]][name]
            flat: Tensor = self.state[first.tensor][name]
            found[name] = flat.narrow(0, begin, len(blocks) * math.prod(shape)).view(len(blocks), *shape)
        return found

    def _apply(self, piece: Piece, update: list[Tensor]) -> None:
        """Decay what a piece covers and subtract its update, each with one rounding, wherever the piece is cut."""
        flat = self.flat[piece.tensor]
        targets = pipeline.views(flat, piece)
        updates = [part.to(flat.device, torch.float32) for part in update]
        if flat.dtype == torch.float32 and flat.device.type != "cpu":  # few launches, however many parts
            if isinstance(self.decay, Tensor) or self.decay != 1:
                torch._foreach_mul_(targets, self.decay)
            torch._foreach_sub_(targets, updates)
            return
        backend, rounding = kernels.backend_for(None, flat.device), self.rounding.get(piece.tensor)
        for target, part, rectangle in zip(targets, updates, piece.rectangles, strict=True):
            words: kernels.Words = ()
            if rounding is not None:
                place = rounding.places.at(0, rectangle.offset)
                words = place.identity, place.first, rounding.key
            kernels.descend(backend, target, part.contiguous(), self.decay, words)


def _fetched(kept: Tensor, device: torch.device) -> Tensor | DeviceCopy:
    """State on its way to where a rule computes with it: the tensor itself wherever possible."""
    if kept.device == device or device.type == "cpu":
        return kept.to(device)
    return DeviceCopy(kept, device, _working_dtype(kept))


def _working(fetched: Tensor | DeviceCopy) -> Tensor:
    """State as a rule computes with it: the tensor itself wherever possible."""
    return fetched.arrived() if isinstance(fetched, DeviceCopy) else fetched.to(_working_dtype(fetched))


def _working_dtype(kept: Tensor) -> torch.dtype:
    return torch.float32 if kept.is_floating_point() else kept.dtype
