"""Who holds which elements: the layout of one local tensor over a shard group.

Pure data and arithmetic. A layout knows the fragments of *every* rank from shapes and the group's size alone, without
communication, so one process can lay out 1,024 ranks. It knows nothing of deepspeed, of devices or of optimizers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from ds_optim.sharding.boxes import Box, whole


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter as the model defines it: its name (without wrapper prefixes) and its logical shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Fragment:
    """The range ``[start, stop)`` of the row-major elements of one part of a parameter, which a rank holds.

    Attributes:
        parameter: index into the layout's ``parameters``.
        offset: where the range begins in the rank's local tensor, in elements.
        part: index into the layout's ``parts`` of the parameter; where nothing cuts it but rows and slices, the only
            one, and the range is one of the parameter's own elements.
    """

    parameter: int
    start: int
    stop: int
    offset: int
    part: int = 0

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Share(NamedTuple):
    """Who holds one part of a parameter: ``ranks[i]`` has ``[edges[i], edges[i + 1])`` of its row-major elements."""

    edges: Sequence[int]
    ranks: Sequence[int]


class Layout(Protocol):
    """How a list of parameters lies in one local tensor per rank.

    Attributes:
        parameters: what the tensor is made of, in the order in which it lies there.
        world_size: ranks of the shard group.
    """

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]: ...

    @property
    def world_size(self) -> int: ...

    def local_numel(self, rank: int) -> int:
        """Elements of the local tensor of ``rank``, padding included."""

    def fragments(self, rank: int) -> list[Fragment]:
        """What ``rank`` holds, by offset; empty fragments are left out. What lies outside them is padding."""

    def parts(self, parameter: int) -> Sequence[Box]:
        """The boxes that a parameter consists of, see `Fragment`: the whole of it, or what tensor parallelism makes."""

    def shares(self, parameter: int) -> Sequence[Share]:
        """Who holds each of its parts; of what every rank holds, the first one does."""


@dataclass(frozen=True, slots=True)
class FlatPartition:
    """Parameters flattened one behind the other, the flat tensor cut into equal partitions (ZeRO-1/2, BF16_Optimizer).

    Attributes:
        offsets: where each parameter begins in the flat tensor; gaps between parameters are alignment padding.
        partition_size: elements per rank; the flat tensor's tail past the last parameter is padding.
    """

    parameters: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]
    partition_size: int
    world_size: int

    def local_numel(self, rank: int) -> int:
        return self.partition_size

    def fragments(self, rank: int) -> list[Fragment]:
        begin, end = rank * self.partition_size, (rank + 1) * self.partition_size
        found = []
        for index, (spec, offset) in enumerate(zip(self.parameters, self.offsets, strict=True)):
            start, stop = max(begin - offset, 0), min(end - offset, spec.numel)
            if start < stop:
                found.append(Fragment(index, start, stop, offset + start - begin))
        return sorted(found, key=lambda fragment: fragment.offset)

    def parts(self, parameter: int) -> Sequence[Box]:
        return [whole(self.parameters[parameter].shape)]

    def shares(self, parameter: int) -> Sequence[Share]:
        offset, numel = self.offsets[parameter], self.parameters[parameter].numel
        first, last = offset // self.partition_size, (offset + numel - 1) // self.partition_size
        cuts = [edge * self.partition_size - offset for edge in range(first + 1, last + 1)]
        return [_in_turn([0, *cuts, numel], first)]


@dataclass(frozen=True, slots=True)
class SlicedParameters:
    """Every parameter cut into equal slices of ``ceil(numel / world_size)``, the slices concatenated (ZeRO-3)."""

    parameters: tuple[ParameterSpec, ...]
    world_size: int

    def slice_numel(self, parameter: int) -> int:
        return -(-self.parameters[parameter].numel // self.world_size)

    def local_numel(self, rank: int) -> int:
        return sum(self.slice_numel(index) for index in range(len(self.parameters)))

    def fragments(self, rank: int) -> list[Fragment]:
        found, offset = [], 0
        for index, spec in enumerate(self.parameters):
            width = self.slice_numel(index)
            start, stop = min(rank * width, spec.numel), min((rank + 1) * width, spec.numel)
            if start < stop:
                found.append(Fragment(index, start, stop, offset))
            offset += width
        return found

    def parts(self, parameter: int) -> Sequence[Box]:
        return [whole(self.parameters[parameter].shape)]

    def shares(self, parameter: int) -> Sequence[Share]:
        width, numel = self.slice_numel(parameter), self.parameters[parameter].numel
        return [_in_turn([*range(0, numel, width), numel] if width else [0, 0], 0)]


@dataclass(frozen=True, slots=True)
class RowSharded:
    """One parameter cut along its first dimension into runs of ``ceil(rows / world_size)`` rows (FSDP2's ``Shard(0)``).

    The last ranks may hold fewer rows, or none.
    """

    parameter: ParameterSpec
    world_size: int

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        return (self.parameter,)

    def _edge(self, rank: int) -> int:
        """The parameter's element with which the part of ``rank`` begins."""
        rows = self.parameter.shape[0]
        row = self.parameter.numel // rows if rows else 0
        return min(rank * -(-rows // self.world_size), rows) * row

    def local_numel(self, rank: int) -> int:
        return self._edge(rank + 1) - self._edge(rank)

    def fragments(self, rank: int) -> list[Fragment]:
        start, stop = self._edge(rank), self._edge(rank + 1)
        return [Fragment(0, start, stop, 0)] if start < stop else []

    def parts(self, parameter: int) -> Sequence[Box]:
        return [whole(self.parameter.shape)]

    def shares(self, parameter: int) -> Sequence[Share]:
        edges = {self._edge(rank) for rank in range(1, self.world_size)}
        return [_in_turn([0, *sorted(edges - {0, self.parameter.numel}), self.parameter.numel], 0)]


@dataclass(frozen=True, slots=True)
class Boxed:
    """One parameter of which every rank holds boxes: tensor parallelism, alone or over sharded rows.

    Attributes:
        boxes: of each rank, one behind the other in its local tensor, each row-major: mostly one, several where it has
            stripes; together they are the parameter. One may be empty.
    """

    parameter: ParameterSpec
    boxes: tuple[tuple[Box, ...], ...]

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        return (self.parameter,)

    @property
    def world_size(self) -> int:
        return len(self.boxes)

    def local_numel(self, rank: int) -> int:
        return sum(box.numel for box in self.boxes[rank])

    def fragments(self, rank: int) -> list[Fragment]:
        before = sum(map(len, self.boxes[:rank]))
        return [
            Fragment(0, 0, box.numel, offset, before + at)
            for at, (offset, box) in enumerate(one_behind_the_other(self.boxes[rank]))
            if box.numel
        ]

    def parts(self, parameter: int) -> Sequence[Box]:
        return [box for boxes in self.boxes for box in boxes]

    def shares(self, parameter: int) -> Sequence[Share]:
        return [Share((0, box.numel), (rank,)) for rank, boxes in enumerate(self.boxes) for box in boxes]


def one_behind_the_other(boxes: Sequence[Box]) -> list[tuple[int, Box]]:
    """Where each box begins in a local tensor that consists of them."""
    return list(zip(accumulate((box.numel for box in boxes), initial=0), boxes, strict=False))


@dataclass(frozen=True, slots=True)
class Replicated:
    """One whole parameter, the same on every rank (a single device, DDP, ZeRO-0)."""

    parameter: ParameterSpec
    world_size: int = 1

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        return (self.parameter,)

    def local_numel(self, rank: int) -> int:
        return self.parameter.numel

    def fragments(self, rank: int) -> list[Fragment]:
        return [Fragment(0, 0, self.parameter.numel, 0)] if self.parameter.numel else []

    def parts(self, parameter: int) -> Sequence[Box]:
        return [whole(self.parameter.shape)]

    def shares(self, parameter: int) -> Sequence[Share]:
        return [Share((0, self.parameter.numel), (0,))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scattered(Replicated):
    """What one rank holds of a parameter where that is no box of it: several stripes (packed tensor parallelism).

    ``parameter`` has the shape of this rank's part, which stands for itself: good enough for elementwise rules.

    Attributes:
        placements: how it lies, in words.
    """

    placements: str


def _in_turn(edges: Sequence[int], first: int) -> Share:
    """A share of neighbouring ranks."""
    return Share(edges, range(first, first + len(edges) - 1))


def check(layout: Layout) -> list[str]:
    """Everything that is wrong with a layout, judged over all ranks; empty if it is sound.

    Sound means: fragments lie inside their rank's tensor without overlap, and every element of every parameter is held
    exactly once (by every rank, if replicated).
    """
    problems = []
    held: list[dict[int, list[tuple[int, int]]]] = [{} for _ in layout.parameters]
    ranks = 1 if isinstance(layout, Replicated) else layout.world_size
    for rank in range(ranks):
        end = 0
        for fragment in layout.fragments(rank):
            if fragment.offset < end:
                problems.append(f"rank {rank}: {layout.parameters[fragment.parameter].name} overlaps its neighbour")
            end = fragment.offset + fragment.numel
            held[fragment.parameter].setdefault(fragment.part, []).append((fragment.start, fragment.stop))
        if end > layout.local_numel(rank):
            problems.append(f"rank {rank}: fragments end at {end}, its tensor has {layout.local_numel(rank)} elements")
    for index, spec in enumerate(layout.parameters):
        parts = layout.parts(index)
        problems += _problems_of_parts(spec, parts)
        for part, box in enumerate(parts):
            reached = 0
            for start, stop in sorted(held[index].get(part, [])):
                if start != reached:
                    problems.append(f"{spec.name}: elements [{reached}, {start}) are held by no rank or by two")
                reached = stop
            if reached != box.numel:
                problems.append(f"{spec.name}: ranks hold {reached} of {box.numel} elements")
    return problems


def _problems_of_parts(spec: ParameterSpec, parts: Sequence[Box]) -> list[str]:
    """Whether parts are a parameter: disjoint, inside of it, and as many elements as it has."""
    starts, stops = (np.array([getattr(box, end) for box in parts]) for end in ("start", "stop"))
    found = []
    if (starts < 0).any() or (stops > np.array(spec.shape)).any() or (starts > stops).any():
        found.append(f"{spec.name}: a part of it reaches beyond its shape {spec.shape}")
    if sum(box.numel for box in parts) != spec.numel:
        found.append(f"{spec.name}: its parts have {sum(box.numel for box in parts)} of {spec.numel} elements")
    for index in range(len(parts) if len(parts) > 1 else 0):
        overlap = np.minimum(stops[index], stops[index + 1 :]) > np.maximum(starts[index], starts[index + 1 :])
        if overlap.all(axis=1).any():
            found.append(f"{spec.name}: two parts of it have elements in common")
            break
    return found


def digest(layouts: Sequence[Layout]) -> str:
    """A hash of layouts that is the same on every rank exactly if the layouts are (hexadecimal SHA-256)."""
    hashed = hashlib.sha256()
    for layout in layouts:
        hashed.update(repr(layout).encode())
    return hashed.hexdigest()
