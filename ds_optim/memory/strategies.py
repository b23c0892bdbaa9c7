"""What a strategy keeps, and what it makes in passing, on one rank: DeepSpeed ZeRO 0 to 3, and plain PyTorch.

Read off deepspeed 0.19.8 (`engine.py`, `stage_1_and_2.py`, `stage3.py`,
`unfused_optimizer.py`) and held against measured records. Bytes, of a steady step (the second and later ones), with
one micro-batch per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ds_optim.deepspeed.facts import ALLREDUCE_ELEMENTS
from ds_optim.memory.record import Category
from ds_optim.memory.simulate import Timeline
from ds_optim.sharding.boxes import Ints
from ds_optim.sharding.layout import Layout, ParameterSpec

Bytes = dict[Category, int]


@dataclass(frozen=True, slots=True)
class Terms:
    """One rank's bytes, optimizer state and activations apart.

    Attributes:
        steady: between steps.
        persistent: of the steady parameters, those that are not there at the start and inside a step.
        held: gradients of earlier micro-batches of the same step, alive in the forward pass.
        forward: what the forward pass adds beside activations, by category (one value per point).
        backward: what the backward pass adds, likewise; ``held`` is in it.
        after_backward: what is left of that when the step begins.
        step: what else there is inside the step at its fullest point, gradients included, when the optimizer is called.
        before_optimizer: the same just before, while gradients are flattened.
        offloaded: of ``steady`` and of the optimizer state, the categories that CPU offload keeps in host memory.
    """

    steady: Bytes
    persistent: int
    held: Bytes
    forward: Callable[[Timeline], dict[Category, Ints]]
    backward: Callable[[Timeline], dict[Category, Ints]]
    after_backward: Bytes
    step: Bytes
    before_optimizer: Bytes
    offloaded: Bytes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Partition:
    """One rank's share of the model under a strategy.

    Attributes:
        groups: all parameters, by parameter group.
        layouts: of the local tensors, over data-parallel ranks.
        ranks: this one's rank in each of them.
        world_size: data-parallel ranks.
        width: bytes per element of the model's weights.
        master: bytes per element of the master; 0 if the weights themselves are updated.
        config: DeepSpeed's ``zero_optimization`` with its defaults filled in.
        offload: whether ``offload_optimizer`` puts state, master and gradients on the CPU.
        accumulates: whether a step has several micro-batches.
    """

    groups: Sequence[Sequence[ParameterSpec]]
    layouts: Sequence[Layout]
    ranks: Sequence[int]
    world_size: int
    width: int
    master: int
    config: Any
    offload: bool
    accumulates: bool

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return sum(spec.numel for group in self.groups for spec in group)

    @property
    def local(self) -> list[int]:
        """Elements of each local tensor of this rank, padding included."""
        return [layout.local_numel(rank) for layout, rank in zip(self.layouts, self.ranks, strict=True)]

    @property
    def padded(self) -> int:
        """Elements of all ranks' local tensors that make up this rank's weights."""
        return sum(size * layout.world_size for size, layout in zip(self.local, self.layouts, strict=True))


def plain(one: Partition) -> Terms:
    """PyTorch alone, or DDP without its buckets: whole parameters, gradients and state."""
    gradients = one.total * one.width
    held = {Category.GRADIENTS: gradients} if one.accumulates else {}

    def backward(timeline: Timeline) -> dict[Category, Ints]:
        return {Category.GRADIENTS: _accumulated(timeline) if one.accumulates else _arrived(timeline)}

    after = {Category.GRADIENTS: gradients}
    return Terms({Category.PARAMETERS: gradients}, 0, held, _nothing, backward, after, after, after)


def zero_0(one: Partition) -> Terms:
    """Everything whole on every rank; gradients are flattened to be averaged, even by one rank alone."""
    weights, master = one.total * one.width, one.total * one.master
    bucket = min(one.total, ALLREDUCE_ELEMENTS) * one.width

    def backward(timeline: Timeline) -> dict[Category, Ints]:
        flattened = np.zeros(len(timeline.backward) + 1, dtype=np.int64)
        flattened[-1] = bucket
        arrived = _accumulated(timeline) if one.accumulates else _arrived(timeline)
        return {Category.GRADIENTS: np.append(arrived, arrived[-1]), Category.BUCKETS: flattened}

    after = {Category.GRADIENTS: weights}
    held = after if one.accumulates else {}
    step = {Category.GRADIENTS: weights + master}
    steady = {Category.PARAMETERS: weights, Category.MASTER: master}
    return Terms(steady, 0, held, _nothing, backward, after, step, step)


def zero_1_and_2(one: Partition, *, partition_gradients: bool) -> Terms:
    """A flat copy of all weights, a master partition, and gradients averaged bucket by bucket."""
    mine = _held(one)
    order = [(spec.name, spec.numel * one.width) for group in one.groups for spec in group]
    kept = sum(size for name, size in order if name in mine)  # their gradients are kept whole
    bucket = one.config.reduce_bucket_size
    buffers = bucket * one.width * (2 if one.config.overlap_comm else 1)
    steady = {Category.PARAMETERS: one.padded * one.width, Category.MASTER: sum(one.local) * one.master}
    offloaded: Bytes = {}
    if one.offload:
        largest = max(spec.numel for group in one.groups for spec in group)
        gradients = sum(one.local) * one.master
        spare = sum(one.local) * one.width + 2 * largest * one.width
        steady |= {Category.GRADIENTS: gradients, Category.BUCKETS: spare}
        offloaded = {
            Category.MASTER: steady[Category.MASTER],
            Category.GRADIENTS: gradients,
            Category.BUCKETS: sum(one.local) * one.width + largest * one.width,
        }

    late = not partition_gradients and not one.config.overlap_comm  # gradients are reduced when all are there
    held: Bytes = {}
    if one.accumulates and late:
        held = {Category.GRADIENTS: one.total * one.width, Category.BUCKETS: buffers}
    elif one.accumulates and not one.offload:
        held = {Category.GRADIENTS: kept}
    if one.accumulates and one.offload:  # sums of earlier micro-batches, beside the buffer that the optimizer reads
        steady[Category.GRADIENTS] += kept
        offloaded[Category.GRADIENTS] += kept

    def backward(timeline: Timeline) -> dict[Category, Ints]:
        reduction = _Reduction(bucket * one.width, 0 if one.offload else kept, mine)
        if late:
            arrived = _accumulated(timeline) if one.accumulates else _arrived(timeline)
            gradients = np.append(arrived, reduction.afterwards(order, len(timeline.backward)))
        else:
            gradients = reduction.as_they_arrive(timeline) + held.get(Category.GRADIENTS, 0)
        buckets = np.full(len(gradients), buffers, dtype=np.int64)
        if not held.get(Category.BUCKETS):
            buckets[: timeline.arrivals[0].at] = 0  # made when the first gradient is there
        for point, size in reduction.flushed:
            buckets[point] += size
        return {Category.GRADIENTS: gradients, Category.BUCKETS: buckets}

    if one.offload:
        return Terms(steady, 0, held, _nothing, backward, {}, {}, {}, offloaded)
    before: Bytes = {}
    during: Bytes = {}
    for position, elements in enumerate(one.local):
        flat, handed = elements * one.width, elements * one.master
        cast = handed if one.master != one.width else 0  # fp32 weights are flattened and handed over as they are
        before = max(before, {Category.GRADIENTS: kept + cast, Category.WORKSPACE: flat}, key=total)
        # All gradients are views of one tensor, which goes with the last group.
        left = kept if position + 1 < len(one.local) else 0
        during = max(during, {Category.GRADIENTS: left + handed}, key=total)
    return Terms(steady, 0, held, _nothing, backward, {Category.GRADIENTS: kept}, during, before)


def zero_3(one: Partition) -> Terms:
    """A slice of every parameter, gathered when it is needed; gradients scattered bucket by bucket."""
    slices = sum(one.local)
    bucket = one.config.reduce_bucket_size * one.width
    persistent = _persistent(one)
    steady = {
        Category.PARAMETERS: slices * one.width + persistent,
        Category.MASTER: slices * one.master,
        Category.GRADIENTS: slices * one.width,
        Category.BUCKETS: bucket,
    }
    offloaded: Bytes = {}
    if one.offload:
        offloaded = {
            Category.MASTER: slices * one.master,
            Category.GRADIENTS: slices * (one.width + one.master),
        }
        steady[Category.GRADIENTS] += slices * one.master

    gathering = _Gathering.of(one)

    def forward(timeline: Timeline) -> dict[Category, Ints]:
        return {Category.PARAMETERS: gathering.forward(timeline)}

    def backward(timeline: Timeline) -> dict[Category, Ints]:
        elements = one.config.reduce_bucket_size
        filled, scattered = 0, np.zeros(len(timeline.backward), dtype=np.int64)
        for arrival in timeline.arrivals:
            size = arrival.bytes // one.width
            if filled and filled + size > elements:  # the bucket is copied twice, rank by rank
                scattered[min(arrival.at, len(scattered) - 1)] = 2 * filled * one.width
                filled = 0
            filled += size
        scattered[-1] = 2 * filled * one.width
        return {Category.BUCKETS: scattered, Category.PARAMETERS: gathering.backward(timeline)}

    largest = min(max(one.local), int(one.config.sub_group_size))
    flat = largest * one.width
    handed = largest * one.master
    if one.offload:
        return Terms(steady, persistent, {}, forward, backward, {}, {}, {}, offloaded)
    before = {Category.WORKSPACE: flat, Category.GRADIENTS: handed if one.master != one.width else 0}
    during = {Category.GRADIENTS: handed}
    return Terms(steady, persistent, {}, forward, backward, {}, during, before)


@dataclass(frozen=True, slots=True)
class _Gathering:
    """ZeRO-3: bytes of whole parameters, all but the persistent ones.

    A parameter is copied out of a flat buffer, which was fetched ahead (with ``allgather_sequential`` each has a buffer
    of its own, which is not copied), and dropped after its use, unless it is needed again within ``max_reuse_distance``
    elements (what lies between its two uses counts twice), or was seen by the prefetcher, which looks ahead until
    ``max_live_parameters`` are there.

    Attributes:
        everything: of all parameters that are gathered at some time.
        kept: the most that are there at a time.
        ahead: of the buffers fetched ahead.
        passing: of the largest parameter, where not all are kept.
    """

    everything: int
    kept: int
    ahead: int
    passing: int

    @classmethod
    def of(cls, one: Partition) -> _Gathering:
        if one.world_size == 1:  # a slice is the whole
            return cls(0, 0, 0, 0)
        everything = one.total - _persistent(one) // one.width
        reach, live = int(one.config.max_reuse_distance), int(one.config.max_live_parameters)
        fetched = int(one.config.prefetch_bucket_size)
        by_distance = everything if 2 * everything <= reach else min(everything, reach // 2)
        kept = max(by_distance, min(everything, live) if fetched else 0)
        ahead = 0 if one.config.allgather_sequential else min(everything, fetched, live)
        largest = max(spec.numel for group in one.groups for spec in group) if kept < everything else 0
        return cls(everything * one.width, kept * one.width, ahead * one.width, largest * one.width)

    def forward(self, timeline: Timeline) -> Ints:
        curve = np.full(len(timeline.forward), self.kept, dtype=np.int64)
        curve[: timeline.head + 1] += self.ahead + self.passing
        return curve

    def backward(self, timeline: Timeline) -> Ints:
        """Parameters go as the pass runs back through the layers; those that were not kept are fetched again."""
        left = (self.everything * np.linspace(1, 0, len(timeline.backward))).astype(np.int64)
        return np.minimum(left, self.kept) + (self.ahead + self.passing if self.passing else 0)


def _nothing(_: Timeline) -> dict[Category, Ints]:
    return {}


def total(amounts: Mapping[Category, int]) -> int:
    """All categories together."""
    return sum(amounts.values())


def _arrived(timeline: Timeline) -> Ints:
    """Bytes of gradients, all of which stay, at every point of the backward pass."""
    added = np.zeros(len(timeline.backward), dtype=np.int64)
    for arrival in timeline.arrivals:
        added[min(arrival.at, len(added) - 1)] += arrival.bytes
    return np.cumsum(added)


def _accumulated(timeline: Timeline) -> Ints:
    """Gradients of earlier micro-batches are there; each new one until it is added."""
    total = sum(arrival.bytes for arrival in timeline.arrivals)
    alive = np.full(len(timeline.backward), total, dtype=np.int64)
    for arrival in timeline.arrivals:
        alive[min(arrival.at, len(alive) - 1)] += arrival.bytes
    return alive


@dataclass(slots=True)
class _Reduction:
    """Gradients go through a bucket; what this rank keeps of them has one tensor, made when it is first needed.

    Attributes:
        bucket: bytes; 0 if gradients are not copied into one.
        kept: bytes of that tensor.
        mine: names of the parameters whose gradients go there.
    """

    bucket: int
    kept: int
    mine: frozenset[str]
    flushed: list[tuple[int, int]] = field(default_factory=list)
    """Point of the pass, and bytes of the bucket, which is copied once more to be reduced, beyond what it leaves."""
    _filled: int = 0
    _needed: bool = False
    _made: bool = False

    def _add(self, name: str, size: int, point: int) -> bool:
        """One more gradient; whether it is too large for the bucket."""
        if self._filled and self._filled + size > self.bucket:
            self._flush(point)
        self._filled += size
        self._needed = self._needed or name in self.mine
        return size > self.bucket

    def _flush(self, point: int) -> None:
        made = self.kept if self._needed and not self._made else 0  # after that copy is gone
        self.flushed.append((point, max(0, self._filled - made)))
        self._made = self._made or self._needed
        self._filled, self._needed = 0, False

    @property
    def _made_bytes(self) -> int:
        return self.kept if self._made else 0

    def as_they_arrive(self, timeline: Timeline) -> Ints:
        """ZeRO-2: a gradient lives until it is in the bucket; one that is too large, until the next arrives."""
        alive = np.zeros(len(timeline.backward) + 1, dtype=np.int64)
        points = [min(arrival.at, len(timeline.backward) - 1) for arrival in timeline.arrivals]
        for arrival, point, after in zip(timeline.arrivals, points, [*points[1:], len(alive) - 1], strict=True):
            too_large = self._add(arrival.name, arrival.bytes, point)
            alive[point:] = self._made_bytes + (arrival.bytes if too_large else 0)
            alive[point] = self._made_bytes + arrival.bytes
            alive[after] += arrival.bytes if too_large else 0
        self._flush(len(alive) - 1)
        alive[-1] = self._made_bytes
        return alive

    def afterwards(self, order: Sequence[tuple[str, int]], begin: int) -> Ints:
        """ZeRO-1: all gradients are there; each goes when it is in the bucket, those too large for it at the end.

        Args:
            order: names and bytes.
            begin: point of the pass after which this happens.
        """
        own = sum(size for _, size in order)
        points: list[int] = []
        for name, size in order:
            too_large = self._add(name, size, begin + len(points))
            points.append(own + self._made_bytes)
            own -= 0 if too_large else size
        self._flush(begin + len(points))
        return np.array([*points, own + self._made_bytes, self._made_bytes], dtype=np.int64)


def _held(one: Partition) -> frozenset[str]:
    """Names of the parameters of which this rank holds a part."""
    return frozenset(
        layout.parameters[fragment.parameter].name
        for layout, rank in zip(one.layouts, one.ranks, strict=True)
        for fragment in layout.fragments(rank)
    )


def _persistent(one: Partition) -> int:
    """ZeRO-3: bytes of small parameters that stay gathered."""
    if one.world_size == 1:
        return 0
    small = sum(
        spec.numel for group in one.groups for spec in group if spec.numel <= one.config.param_persistence_threshold
    )
    return min(small, int(one.config.model_persistence_threshold)) * one.width
