"""Matrices of a stack one by one, each at an aligned address: the one place where blocks enter a BLAS on a CPU.

A result must depend on its own matrix alone. A BLAS rounds by more: with several threads a batched product rounds
differently in batches of different sizes, and Intel's MKL on AMD processors rounds `X X^T` by where in memory X and the
result begin (any address that is no multiple of 16 bytes). Blocks begin anywhere: they lie one behind another in
buckets and in state. torch's own sums, means and norms do not look at addresses (tests/test_alignment.py holds all of
this against the processor that it runs on).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

ALIGNMENT = 64
"""Bytes: what torch's CPU allocator promises, a cache line, and the widest vector register."""

_COPIED = 1 << 16
"""Elements of a stack that are copied together, unless a single matrix has more: few calls, and no stack beside it."""


def one_by_one(product: Callable[..., object], result: Tensor, *stacks: Tensor, is_added: bool = False) -> Tensor:
    """``product`` of each matrix of the stacks, alone and aligned, into the matrix of ``result``.

    Matrices that begin at multiples of `ALIGNMENT` stay where they are: blocks of the usual sizes fill whole cache
    lines. Others pass through aligned scratch. An operand's layout (row-major or transposed) is kept. Elsewhere than on
    a CPU there is one product, of whole stacks.

    Args:
        product: takes a part of every stack and, as ``out``, of the result. On a CPU these are single matrices,
            (1, m, n), without gaps and aligned.
        result: (B, k, l), contiguous; is returned.
        stacks: (B, m, n) each; are not written to.
        is_added: whether the product reads its result before it writes it.
    """
    if result.device.type != "cpu":
        product(*stacks, out=result)
        return result
    everything = result, *stacks
    are_aligned = [_is_aligned(one) for one in everything]
    largest = max(1, *(one.shape[1] * one.shape[2] for one in everything))
    most = max(len(result) if all(are_aligned) else _COPIED // largest, 1)
    rooms = [None if fits else _room(one[:most]) for one, fits in zip(everything, are_aligned, strict=True)]
    for first in range(0, len(result), most):
        parts = [one[first : first + most] for one in everything]
        used = [part if room is None else room[: len(part)] for part, room in zip(parts, rooms, strict=True)]
        for part, place in list(zip(parts, used, strict=True))[0 if is_added else 1 :]:
            if place is not part:
                place.copy_(part)
        for out, *matrices in zip(*(one.split(1) for one in used), strict=True):
            product(*matrices, out=out)
        if used[0] is not parts[0]:
            parts[0].copy_(used[0])
    return result


def aligned(matrix: Tensor) -> Tensor:
    """A dense matrix that begins at an aligned address: itself, or a copy."""
    return matrix.clone() if matrix.data_ptr() % ALIGNMENT else matrix


def _is_aligned(stack: Tensor) -> bool:
    """Whether every matrix of a stack begins at an aligned address and has no gaps."""
    _, rows, columns = stack.shape
    is_dense = stack.stride()[1:] in ((columns, 1), (1, rows))
    distance = stack.stride(0) * stack.itemsize if len(stack) > 1 else 0
    return is_dense and not (stack.data_ptr() % ALIGNMENT or distance % ALIGNMENT)


def _room(stack: Tensor) -> Tensor:
    """Aligned room for a stack, laid out like it; memory of its own begins aligned."""
    count, rows, columns = stack.shape
    line = ALIGNMENT // stack.itemsize
    padded = stack.new_empty(count, -(-rows * columns // line) * line)[:, : rows * columns]
    if stack.stride()[1:] == (1, rows) != (columns, 1):
        return padded.view(count, columns, rows).mT
    return padded.view(count, rows, columns)
