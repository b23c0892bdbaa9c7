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


def one_by_one(product: Callable[..., object], result: Tensor, *stacks: Tensor) -> Tensor:
    """``product`` of each matrix of the stacks, alone and aligned, into the matrix of ``result``.

    Matrices that begin at multiples of `ALIGNMENT` stay where they are: blocks of the usual sizes fill whole cache
    lines. Others pass through aligned scratch. An operand's layout (row-major or transposed) is kept. Elsewhere than on
    a CPU there is one product, of whole stacks.

    Args:
        product: takes a part of every stack and, as ``out``, of the result. On a CPU these are single matrices,
            (1, m, n), without gaps and aligned.
        result: (B, k, l), contiguous; is returned.
        stacks: (B, m, n) each; are not written to.
    """
    if result.device.type != "cpu":
        product(*stacks, out=result)
        return result
    largest = max(stack.shape[1] * stack.shape[2] for stack in (result, *stacks))
    most = max(_COPIED // max(largest, 1), 1)
    for first in range(0, len(result), most):
        part = slice(first, first + most)
        wanted = result[part]
        target = wanted if _is_aligned(wanted) else _room(wanted)
        operands = [one if _is_aligned(one) else _room(one).copy_(one) for one in (stack[part] for stack in stacks)]
        for *matrices, out in zip(*(one.split(1) for one in (*operands, target)), strict=True):
            product(*matrices, out=out)
        if target is not wanted:
            wanted.copy_(target)
    return result


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
