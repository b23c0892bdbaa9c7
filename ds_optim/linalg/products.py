"""Matrix products along one axis of stacked blocks of any order: Shampoo's statistics and their application."""

from __future__ import annotations

import torch
from torch import Tensor


def stacked_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for stacks (B, m, k) and (B, k, n).

    On CPU one matrix at a time: with several threads a batched product rounds differently in batches of different
    sizes, and what a block becomes must not depend on which others its owner has.
    """
    if a.device.type != "cpu":
        return torch.bmm(a, b)
    result = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for index in range(len(a)):
        torch.bmm(a[index : index + 1], b[index : index + 1], out=result[index : index + 1])
    return result


def gram(stack: Tensor, axis: int) -> Tensor:
    """The contraction of every block with itself over all axes but one.

    Args:
        stack: (B, d_0, ..., d_K) of K + 1 axes per block.
        axis: the axis that stays.

    Returns:
        (B, d_axis, d_axis).
    """
    rows = stack.movedim(axis + 1, 1).flatten(2) if stack.dim() > 2 else stack.unsqueeze(2)
    return stacked_matmul(rows, rows.mT)


def apply_along(matrices: Tensor, stack: Tensor, axis: int) -> Tensor:
    """Every block multiplied by its matrix along one axis: the mode product.

    Args:
        matrices: (B, d_axis, d_axis), symmetric.
        stack: (B, d_0, ..., d_K).
        axis: which of the block's axes.
    """
    if stack.dim() > 2 and axis == stack.dim() - 2:  # the last: rows are multiplied from the right, nothing is moved
        return stacked_matmul(stack.flatten(1, -2), matrices).view(stack.shape)
    moved = stack.movedim(axis + 1, 1)
    product = stacked_matmul(matrices, moved.flatten(2) if moved.dim() > 2 else moved.unsqueeze(2))
    return product.view(moved.shape).movedim(1, axis + 1)


def block_norms(stack: Tensor) -> Tensor:
    """(B,) Euclidean norms of blocks, axis by axis: one long sum would be split differently for different B."""
    norms: Tensor = torch.linalg.vector_norm(stack, dim=-1)
    while norms.dim() > 1:
        norms = torch.linalg.vector_norm(norms, dim=-1)
    return norms
