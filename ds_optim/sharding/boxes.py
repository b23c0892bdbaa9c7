"""Boxes: the blocks of whole-matrix rules as ranges of a parameter's dimensions, and where their elements lie.

A box is defined on the parameter, never on a shard. Two facts carry the exchange: the elements of a box that lie in a
range of the parameter's row-major order form a range of the box's own row-major order, and they are the union of a few
rectangles that strided views can reach. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def rectangles(shape: Sequence[int], box: Box, start: int, stop: int) -> list[Rectangle]:
    """The elements of ``box`` inside ``[start, stop)`` of a parameter of ``shape``, in the box's row-major order."""
    found: list[Rectangle] = []
    strides = strides_of(shape)

    def cut(dim: int, corner: int, low: int, high: int) -> None:
        """Add what lies in ``[low, high)`` of the sub-array of dimensions ``dim ...`` that begins at ``corner``."""
        if low >= high:
            return
        stride = strides[dim]
        first, first_from = divmod(low, stride)
        last, last_to = divmod(high, stride)
        inner = dim + 1
        if first == last:
            row(inner, corner, first, first_from, last_to)
            return
        if first_from:
            row(inner, corner, first, first_from, stride)
            first += 1
        begin, end = max(first, box.start[dim]), min(last, box.stop[dim])
        if begin < end:
            offset = begin * stride + sum(box.start[d] * strides[d] for d in range(inner, len(shape)))
            extent = (1,) * dim + (end - begin, *box.shape[inner:])
            found.append(Rectangle(corner + offset, extent))
        if last_to:
            row(inner, corner, last, 0, last_to)

    def row(inner: int, corner: int, index: int, low: int, high: int) -> None:
        if box.start[inner - 1] <= index < box.stop[inner - 1]:
            cut(inner, corner + index * strides[inner - 1], low, high)

    if shape:
        cut(0, 0, start, stop)
    return [rectangle for rectangle in found if rectangle.numel]
