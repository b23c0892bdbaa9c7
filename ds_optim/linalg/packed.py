"""Symmetric matrices by one of their triangles: n (n + 1) / 2 elements in the place of n^2.

Element (i, j), j <= i, lies at i (i + 1) / 2 + j: the rows of the lower triangle one behind the other, which is the
packed storage of LAPACK (``AP`` with ``UPLO="U"``, whose columns are these rows). A stack is packed and unpacked by one
indexed copy, on any device; its table is made once for every order and device.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

_TABLES_KEPT = 64  # orders of matrices, of which a model's blocks have a few
_LONG = 128  # rows of a matrix that are worth a call of their own

_tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}


class Triangles(Protocol):
    """Who copies between matrices and their triangles: this module, or one that does the same faster."""

    def pack(self, stack: Tensor, *, out: Tensor) -> Tensor: ...

    def unpack(self, packed: Tensor, *, out: Tensor) -> Tensor: ...

    def unpack_lower(self, packed: Tensor, *, out: Tensor) -> Tensor: ...


def packed_size(order: int) -> int:
    """Elements that are kept of a symmetric matrix of so many rows."""
    return order * (order + 1) // 2


def order_of(size: int) -> int:
    """Rows of the matrix of which ``size`` elements are kept."""
    return (math.isqrt(8 * size + 1) - 1) // 2


def pack(stack: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The lower triangles of a stack; what is above the diagonal is not looked at.

    Args:
        stack: (B, n, n), contiguous.
        out: (B, n (n + 1) / 2) of the same dtype, contiguous; is returned.
    """
    count, order, _ = stack.shape
    packing, _ = _tables_for(order, stack.device)
    return torch.index_select(stack.view(count, order * order), 1, packing, out=out)


def unpack(packed: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The matrices of which (B, n (n + 1) / 2) are the lower triangles: (B, n, n), exactly symmetric.

    Args:
        packed: of any floating-point dtype.
        out: contiguous, of the same dtype; is returned.
    """
    count, order = len(packed), order_of(packed.shape[1])
    _, unpacking = _tables_for(order, packed.device)
    flat = None if out is None else out.view(count, order * order)
    return torch.index_select(packed, 1, unpacking, out=flat).view(count, order, order)


def unpack_lower(packed: Tensor, *, out: Tensor) -> Tensor:
    """As `unpack` on and below the diagonal; above it lies anything. For a CPU: long rows are copied whole.

    Every row is taken as long as the last one: behind its own elements come those of the next.
    """
    size = packed.shape[1]
    order = order_of(size)
    if order < _LONG:
        return unpack(packed, out=out)
    _, unpacking = _tables_for(order, packed.device)
    for one, square in zip(packed, out, strict=True):
        rows = one.as_strided((size - order + 1, order), (1, 1))  # from every element on
        torch.index_select(rows, 0, unpacking[::order], out=square)
    return out


def packed_diagonal(values: Tensor) -> Tensor:
    """The packed form, (n (n + 1) / 2,), of the diagonal matrix of (n,) values."""
    index = torch.arange(len(values), device=values.device)
    packed = values.new_zeros(packed_size(len(values)))
    packed[index * (index + 3) // 2] = values
    return packed


def tables(orders: Collection[int]) -> list[Tensor]:
    """What is kept from one call to the next for matrices of these orders; for others somebody else may have asked."""
    return [table for (order, _), pair in _tables.items() if order in orders for table in pair]


def _tables_for(order: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each packed element lies in the square, (n (n + 1) / 2,), and each of the square in the packed, (n^2,)."""
    key = order, device
    if key not in _tables:
        if len(_tables) >= _TABLES_KEPT:
            _tables.clear()
        dtype = torch.int32 if order * order < 1 << 31 else torch.int64
        index = torch.arange(order, dtype=dtype, device="cpu")
        row, column = index[:, None], index[None, :]
        low, high = torch.minimum(row, column), torch.maximum(row, column)
        within = (row * order + column)[column <= row]
        _tables[key] = within.to(device), (high * (high + 1) // 2 + low).flatten().to(device)
    return _tables[key]
