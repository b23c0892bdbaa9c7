"""Boxes: the blocks of whole-matrix rules as ranges of a parameter's dimensions, and where their elements lie.

A box is defined on the parameter, never on a shard. Two facts carry the exchange: the elements of a box that lie in a
range of the parameter's row-major order form a range of the box's own row-major order, and they are the union of a few
rectangles that strided views can reach. Pure arithmetic.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Box:
    """The elements ``[start_i, stop_i)`` along every dimension of a parameter."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Elements of a box that one strided view reaches.

    Attributes:
        offset: row-major position of its first element in the parameter.
        shape: extent along every dimension; the strides are the parameter's.
    """

    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def tiles(box: Box, largest: Sequence[int]) -> list[Box]:
    """A fixed grid over a box, at most ``largest[i]`` along dimension ``i``; row-major, the last ones smaller."""
    edges = [
        [(begin, min(begin + size, stop)) for begin in range(start, stop, size)]
        for start, stop, size in zip(box.start, box.stop, largest, strict=True)
    ]
    return [Box(tuple(s for s, _ in corner), tuple(e for _, e in corner)) for corner in product(*edges)]


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def elements_before(shape: Sequence[int], box: Box, positions: Ints) -> Ints:
    """How many elements of ``box`` precede each row-major position of a parameter of ``shape``."""
    found = np.zeros_like(positions)
    inside = np.ones(positions.shape, dtype=bool)  # positions whose leading coordinates lie inside the box so far
    rest = positions
    for dim, stride in enumerate(strides_of(shape)):
        coordinate, rest = np.divmod(rest, stride)
        start, stop = box.start[dim], box.stop[dim]
        behind = math.prod(box.shape[dim + 1 :])
        found += np.where(inside, np.clip(coordinate - start, 0, stop - start) * behind, 0)
        inside &= (coordinate >= start) & (coordinate < stop)
    return found


def slabs(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The range ``[start, stop)`` of an array's row-major order as boxes: a body, and heads and tails around it."""
    found: list[Box] = []
    strides = strides_of(shape)

    def cut(corner: tuple[int, ...], low: int, high: int) -> None:
        """Add ``[low, high)`` of the sub-array that has these first coordinates."""
        if low >= high:
            return
        dim = len(corner)
        first, first_from = divmod(low, strides[dim])
        last, last_to = divmod(high, strides[dim])
        if first == last:
            cut((*corner, first), first_from, last_to)
            return
        if first_from:
            cut((*corner, first), first_from, strides[dim])
            first += 1
        if first < last:
            ends = tuple(index + 1 for index in corner)
            inner = tuple(shape[dim + 1 :])
            found.append(Box((*corner, first, *(0 for _ in inner)), (*ends, last, *inner)))
        cut((*corner, last), 0, last_to)

    if not shape:
        return [Box((), ())] if start < stop else []
    if math.prod(shape):
        cut((), start, stop)
    return found


def shared(box: Box, other: Box) -> Box | None:
    """What two boxes of one array have in common, if anything."""
    start = tuple(map(max, box.start, other.start))
    stop = tuple(map(min, box.stop, other.stop))
    return Box(start, stop) if all(low < high for low, high in zip(start, stop, strict=True)) else None


def within(box: Box, outer: Box) -> Box:
    """A box by its coordinates in another one that contains it."""
    return Box(
        tuple(at - begin for at, begin in zip(box.start, outer.start, strict=True)),
        tuple(at - begin for at, begin in zip(box.stop, outer.start, strict=True)),
    )


def placed(shape: Sequence[int], box: Box, start: int, stop: int) -> list[Rectangle]:
    """The range ``[start, stop)`` of a box's own row-major order, in an array of ``shape``."""
    strides = strides_of(shape)
    corner = sum(map(operator.mul, box.start, strides))
    if (start, stop) == (0, box.numel) and stop:
        return [Rectangle(corner, box.shape)]
    return [
        Rectangle(corner + sum(map(operator.mul, slab.start, strides)), slab.shape)
        for slab in slabs(box.shape, start, stop)
    ]


def stretches(shape: Sequence[int], box: Box, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The range ``[start, stop)`` of a box's own order as ranges of the row-major order of an array of ``shape``."""
    strides = strides_of(shape)
    cut = max((dim for dim, size in enumerate(box.shape) if size != shape[dim]), default=0)
    width = math.prod(box.shape[cut:])  # elements of the box that lie one behind another
    begin = end = -1
    while start < stop:
        row, rest = divmod(start, width)
        index = np.unravel_index(row, box.shape[:cut]) if cut else ()
        corner = sum((at + int(here)) * stride for at, here, stride in zip(box.start, index, strides, strict=False))
        first = corner + sum(map(operator.mul, box.start[cut:], strides[cut:])) + rest
        length = min(width - rest, stop - start)
        if first != end:
            if begin < end:
                yield begin, end
            begin = first
        end = first + length
        start += length
    if begin < end:
        yield begin, end


def is_one_range(shape: Sequence[int], box: Box) -> bool:
    """Whether a box that is cut along one dimension has neighbouring elements of an array of ``shape``."""
    cut = [dim for dim, size in enumerate(box.shape) if size != shape[dim]]
    return not box.numel or not cut or (len(cut) == 1 and math.prod(shape[: cut[0]]) == 1)


def between(shape: Sequence[int], dim: int, low: int, high: int) -> Box:
    """What of an array has the indices ``[low, high)`` along a dimension."""
    start, stop = [0] * len(shape), list(shape)
    start[dim], stop[dim] = low, high
    return Box(tuple(start), tuple(stop))


def whole(shape: Sequence[int]) -> Box:
    """All of an array."""
    return Box((0,) * len(shape), tuple(shape))
