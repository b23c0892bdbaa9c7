"""Matrix products along one axis of stacked blocks of any order: statistics, their application, rotations.

Symmetric matrices are kept packed (`ds_optim.linalg.packed`) and unpacked for a product: on a CPU a few at a time,
which stay in its cache, elsewhere all of a stack.

What a block becomes depends neither on its place in memory nor on its neighbours, see `ds_optim.linalg.alignment`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ds_optim.linalg import packed as in_torch
from ds_optim.linalg.alignment import one_by_one
from ds_optim.linalg.packed import Triangles, order_of, pack
from ds_optim.linalg.precision import MatmulPrecision, own_gram, product_in, rounding_workspace

_WHOLE = 256
"""Rows of a matrix whose product with itself is cheaper whole than by its halves."""

_UNPACKED = 1 << 19
"""Elements of matrices that are unpacked at a time on a CPU, unless a single one has more."""


def stacked_matmul(a: Tensor, b: Tensor, precision: MatmulPrecision = "ieee") -> Tensor:
    """``a @ b`` for stacks (B, m, k) and (B, k, n)."""
    return one_by_one(product_in(precision), a.new_empty(a.shape[0], a.shape[1], b.shape[2]), a, b)


def gram(stack: Tensor, axis: int, precision: MatmulPrecision = "ieee") -> Tensor:
    """The contraction of every block with itself over all axes but one.

    Args:
        stack: (B, d_0, ..., d_K) of K + 1 axes per block.
        axis: the axis that stays.
        precision: of the product.

    Returns:
        (B, d_axis, d_axis).
    """
    rows = unfolded(stack, axis)
    result = rows.new_empty(rows.shape[0], rows.shape[1], rows.shape[1])
    return one_by_one(partial(own_gram, precision=precision), result, rows)


def unfolded(stack: Tensor, axis: int) -> Tensor:
    """(B, d_axis, all other elements): every block as a matrix whose rows lie along one axis; a view where it can be.

    Args:
        stack: (B, d_0, ..., d_K).
    """
    return stack.movedim(axis + 1, 1).flatten(2) if stack.dim() > 2 else stack.unsqueeze(2)


def add_gram_(
    kept: Tensor,
    stack: Tensor,
    axis: int,
    beta: float,
    weight: float,
    precision: MatmulPrecision = "ieee",
    triangles: Triangles = in_torch,
) -> Tensor:
    """``kept <- beta kept + weight gram(stack, axis)``, in place: on a CPU, where nothing is lost, inside the product.

    Args:
        kept: (B, n (n + 1) / 2) fp32 for n = d_axis, packed, contiguous; is returned.
        stack, axis, precision: as for `gram`.
        beta: of what is kept.
        weight: of what is new.
        triangles: unpacks and packs on a CPU.
    """
    if kept.device.type != "cpu":
        return (kept if beta == 1 else kept.mul_(beta)).add_(pack(gram(stack, axis, precision)), alpha=weight)
    if precision != "ieee":  # on a CPU every operation rounds once: fused ones round otherwise where registers end
        return kept.mul_(beta).add_(pack(gram(stack, axis, precision)).mul_(weight))

    def product(one: Tensor, *, out: Tensor) -> None:
        _add_own_product_(out[0], one[0], beta, weight)

    rows = unfolded(stack, axis)
    for part, room in _parts(kept):
        lower = triangles.unpack_lower(kept[part], out=room)
        triangles.pack(one_by_one(product, lower, rows[part], is_added=True), out=kept[part])
    return kept


def products_workspace(shape: Sequence[int], count: int, precision: MatmulPrecision, device_type: str) -> int:
    """Bytes that `add_gram_` and `apply_along` take on a stack of blocks along all axes, one after the other.

    Of packed matrices, with what is applied to one axis still there for the next.
    """
    numel, most = math.prod(shape), 0
    for axis, size in enumerate(shape):
        unpacked = _together(count, size, device_type) * size**2
        stacks = chained_stacks(len(shape)) if axis else 1
        rounding = rounding_workspace((size**2, numel), numel, count, precision, device_type)
        most = max(most, 4 * (unpacked + stacks * count * numel) + rounding)
    return max(most, average_workspace(shape, count, precision, device_type))


def average_workspace(shape: Sequence[int], count: int, precision: MatmulPrecision, device_type: str) -> int:
    """Bytes that `add_gram_` takes on a stack of blocks: a product and its triangle, or what it unpacks."""
    order, numel = max(shape), math.prod(shape)
    if device_type == "cpu" and precision == "ieee":
        return 4 * _together(count, order, device_type) * order**2
    return 6 * count * order**2 + rounding_workspace((numel, numel), order**2, count, precision, device_type)


def chained_stacks(axes: int) -> int:
    """Stacks that are alive at once while blocks are multiplied along one axis after another.

    What was computed along the axis before and what is along this one, and of more than two axes a copy.
    """
    return 2 if axes < 3 else 3


def _together(count: int, order: int, device_type: str) -> int:
    """How many of so many packed matrices are unpacked at a time."""
    return min(count, max(_UNPACKED // max(order * order, 1), 1)) if device_type == "cpu" else count


def _parts(packed: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What of a stack of packed matrices is unpacked at a time, and room for it, the same for all."""
    order = order_of(packed.shape[1])
    most = _together(len(packed), order, packed.device.type)
    room = packed.new_empty(most, order, order)
    for first in range(0, len(packed), most or 1):
        yield slice(first, first + most), room[: len(packed) - first]


def _squares(matrices: Tensor, triangles: Triangles) -> Iterator[tuple[slice, Tensor]]:
    """A stack of square matrices, as it is; of packed ones some at a time."""
    if matrices.dim() > 2:
        yield slice(None), matrices
        return
    for part, room in _parts(matrices):
        yield part, triangles.unpack(matrices[part], out=room)


def _add_own_product_(kept: Tensor, rows: Tensor, beta: float, weight: float) -> None:
    """``kept <- beta kept + weight rows rows^T`` of one matrix: its lower triangle, whatever is above the diagonal."""
    count = len(rows)
    if count <= _WHOLE:
        torch.addmm(kept, rows, rows.mT, beta=beta, alpha=weight, out=kept)
        return
    half = _half(count)
    upper, lower = rows[:half], rows[half:]
    _add_own_product_(kept[:half, :half], upper, beta, weight)
    _add_own_product_(kept[half:, half:], lower, beta, weight)
    corner = kept[half:, :half]
    torch.addmm(corner, lower, upper.mT, beta=beta, alpha=weight, out=corner)


def _half(count: int) -> int:
    """Rows of the first half of so many: it ends where a cache line does."""
    return count // 2 // 16 * 16


def own_product_flops(order: int, others: int) -> int:
    """Floating-point operations of `add_gram_` on a CPU, of a block of so many rows and elements in each of them."""
    if order <= _WHOLE:
        return 2 * order**2 * others
    half = _half(order)
    halves = own_product_flops(half, others) + own_product_flops(order - half, others)
    return halves + 2 * half * (order - half) * others


def apply_along(
    matrices: Tensor,
    stack: Tensor,
    axis: int,
    precision: MatmulPrecision = "ieee",
    triangles: Triangles = in_torch,
) -> Tensor:
    """Every block multiplied by its matrix along one axis: the mode product.

    Args:
        matrices: (B, d_axis, d_axis), or symmetric and packed, (B, d_axis (d_axis + 1) / 2). One that is not symmetric
            multiplies the last of several axes from the right, others from the left.
        stack: (B, d_0, ..., d_K).
        axis: which of the block's axes.
        precision: of the product.
        triangles: unpacks what is packed.
    """
    is_last = stack.dim() > 2 and axis == stack.dim() - 2  # rows are multiplied from the right, nothing is moved
    operand = stack.flatten(1, -2) if is_last else unfolded(stack, axis)
    result = operand.new_empty(operand.shape)
    for part, squares in _squares(matrices, triangles):
        factors = (operand[part], squares) if is_last else (squares, operand[part])
        one_by_one(product_in(precision), result[part], *factors)
    if is_last:
        return result.view(stack.shape)
    return result.view(stack.movedim(axis + 1, 1).shape).movedim(1, axis + 1)


def rotate_along(
    bases: Tensor, stack: Tensor, axis: int, precision: MatmulPrecision = "ieee", *, back: bool = False
) -> Tensor:
    """Every block's coordinates along one axis in its basis, or back from there.

    Args:
        bases: (B, d_axis, d_axis), orthogonal; columns are the basis.
        stack: (B, d_0, ..., d_K).
        axis: which of the block's axes.
        precision: of the product.
        back: from coordinates to what they stand for.
    """
    is_last = stack.dim() > 2 and axis == stack.dim() - 2  # multiplied from the right
    return apply_along(bases.mT if is_last == back else bases, stack, axis, precision)


def block_norms(stack: Tensor) -> Tensor:
    """(B,) Euclidean norms of blocks, axis by axis: one long sum would be split differently for different B."""
    norms: Tensor = torch.linalg.vector_norm(stack, dim=-1)
    while norms.dim() > 1:
        norms = torch.linalg.vector_norm(norms, dim=-1)
    return norms
