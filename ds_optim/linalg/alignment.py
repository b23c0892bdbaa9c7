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


def one_by_one(product: Callable[..., object], result: Tensor, *stacks: Tensor) -> Tensor:
    """``product`` of each matrix of the stacks, alone and aligned, into the matrix of ``result``.

    What does not begin at a multiple of `ALIGNMENT` passes through one matrix of aligned scratch; blocks of the usual
    sizes, which fill whole cache lines, do not. An operand's layout (row-major or transposed) is kept. Elsewhere than
    on a CPU there is one product, of whole stacks.

    Args:
        product: takes a part of every stack and, as ``out``, of the result. On a CPU these are single matrices,
            (1, m, n), without gaps and aligned.
        result: (B, k, l), contiguous; is returned.
        stacks: (B, m, n) each; are not written to.
    """
    if result.device.type != "cpu":
        product(*stacks, out=result)
        return result
    spares = [None if _is_aligned(stack) else _scratch(stack) for stack in stacks]
    target = None if _is_aligned(result) else _scratch(result)
    for index in range(len(result)):
        here = slice(index, index + 1)
        matrices = [
            stack[here] if spare is None else spare.copy_(stack[here])
            for stack, spare in zip(stacks, spares, strict=True)
        ]
        if target is None:
            product(*matrices, out=result[here])
        else:
            product(*matrices, out=target)
            result[here] = target
    return result


def _is_aligned(stack: Tensor) -> bool:
    """Whether every matrix of a stack begins at an aligned address and has no gaps."""
    _, rows, columns = stack.shape
    is_dense = stack.stride()[1:] in ((columns, 1), (1, rows))
    distance = stack.stride(0) * stack.itemsize if len(stack) > 1 else 0
    return is_dense and not (stack.data_ptr() % ALIGNMENT or distance % ALIGNMENT)


def _scratch(stack: Tensor) -> Tensor:
    """Room for one matrix of a stack, laid out like it; memory of its own begins aligned."""
    _, rows, columns = stack.shape
    if stack.stride()[1:] == (1, rows) != (columns, 1):
        return stack.new_empty(1, columns, rows).mT
    return stack.new_empty(1, rows, columns)
