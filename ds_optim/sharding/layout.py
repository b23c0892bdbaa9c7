"""Who holds which elements: the layout of one local tensor over a shard group.

Pure data and arithmetic. A layout knows the fragments of *every* rank from shapes and the group's size alone, without
communication, so one process can lay out 1,024 ranks. It knows nothing of deepspeed, of devices or of optimizers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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
    """The range ``[start, stop)`` of one parameter's row-major elements that a rank holds.

    Attributes:
        parameter: index into the layout's ``parameters``.
        offset: where the range begins in the rank's local tensor, in elements.
    """

    parameter: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


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

    def cuts(self, parameter: int) -> list[int]:
        """Positions strictly inside a parameter where one rank's fragment ends and another's begins, ascending."""

    def first_rank(self, parameter: int) -> int:
        """The rank that holds a parameter's first element; its successors hold what follows each cut."""


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

    def cuts(self, parameter: int) -> list[int]:
        offset, numel = self.offsets[parameter], self.parameters[parameter].numel
        first = offset // self.partition_size + 1
        last = (offset + numel - 1) // self.partition_size
        return [edge * self.partition_size - offset for edge in range(first, last + 1)]

    def first_rank(self, parameter: int) -> int:
        return self.offsets[parameter] // self.partition_size


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

    def cuts(self, parameter: int) -> list[int]:
        width = self.slice_numel(parameter)
        return list(range(width, self.parameters[parameter].numel, width)) if width else []

    def first_rank(self, parameter: int) -> int:
        return 0


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

    def cuts(self, parameter: int) -> list[int]:
        edges = {self._edge(rank) for rank in range(1, self.world_size)}
        return sorted(edges - {0, self.parameter.numel})

    def first_rank(self, parameter: int) -> int:
        return 0


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

    def cuts(self, parameter: int) -> list[int]:
        return []

    def first_rank(self, parameter: int) -> int:
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scattered(Replicated):
    """What one rank holds of a parameter where that is no contiguous range of it (tensor parallelism on dimension 1).

    ``parameter`` has the shape of this rank's part, which stands for itself: good enough for elementwise rules.

    Attributes:
        placements: how it lies, in words.
    """

    placements: str


def check(layout: Layout) -> list[str]:
    """Everything that is wrong with a layout, judged over all ranks; empty if it is sound.

    Sound means: fragments lie inside their rank's tensor without overlap, and every element of every parameter is held
    exactly once (by every rank, if replicated).
    """
    problems = []
    held: list[list[tuple[int, int]]] = [[] for _ in layout.parameters]
    ranks = 1 if isinstance(layout, Replicated) else layout.world_size
    for rank in range(ranks):
        end = 0
        for fragment in layout.fragments(rank):
            if fragment.offset < end:
                problems.append(f"rank {rank}: {layout.parameters[fragment.parameter].name} overlaps its neighbour")
            end = fragment.offset + fragment.numel
            held[fragment.parameter].append((fragment.start, fragment.stop))
        if end > layout.local_numel(rank):
            problems.append(f"rank {rank}: fragments end at {end}, its tensor has {layout.local_numel(rank)} elements")
    for spec, ranges in zip(layout.parameters, held, strict=True):
        reached = 0
        for start, stop in sorted(ranges):
            if start != reached:
                problems.append(f"{spec.name}: elements [{reached}, {start}) are held by no rank or by two")
            reached = stop
        if reached != spec.numel:
            problems.append(f"{spec.name}: ranks hold {reached} of {spec.numel} elements")
    return problems


def digest(layouts: Sequence[Layout]) -> str:
    """A hash of layouts that is the same on every rank exactly if the layouts are (hexadecimal SHA-256)."""
    hashed = hashlib.sha256()
    for layout in layouts:
        hashed.update(repr(layout).encode())
    return hashed.hexdigest()
