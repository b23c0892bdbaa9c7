"""Which parameters are matrices for a whole-matrix rule, and of which true matrices a stacked or fused weight is made.

Decided by role and logical shape alone. Embeddings, output heads, norms and biases are none: each of their rows (or
elements) sees its own gradients, and every published recipe gives them to Adam.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

from torch import Tensor

from ds_optim.linalg.packed import packed_diagonal
from ds_optim.roles.role import Role, is_vector
from ds_optim.sharding.boxes import Box, tiles

_ADAMS = frozenset({"embedding", "head", "norm", "bias"})


def is_preconditioned(role: Role, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is more than a number, and none of those that Adam steps."""
    return role.kind not in _ADAMS and len(shape) > 0 and math.prod(shape) > 0


def is_matrix(role: Role, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is made of true matrices: also longer than one along two dimensions at least."""
    return is_preconditioned(role, shape) and not is_vector(shape[role.batch_dims :])


def true_matrices(role: Role, shape: tuple[int, ...]) -> list[Box]:
    """The independent matrices of a parameter: one per expert of a stack, one per part of a fused weight.

    A fused weight's parts are what its role says: ``{"kind": "linear"}`` makes it one matrix, ``{"parts": [["query",
    64], ["query", 64], ...]}`` one per head.

    Args:
        role: whose ``batch_dims`` stack matrices and whose ``parts`` lie side by side along ``output_dim``.
        shape: logical shape of the whole parameter.
    """
    whole = Box((0,) * len(shape), shape)
    single = [1] * role.batch_dims + list(shape[role.batch_dims :])
    found = []
    for matrix in tiles(whole, single):
        if role.kind != "fused" or not role.parts:
            found.append(matrix)
            continue
        axis = role.output_dim
        edges = [0, *accumulate(part.size for part in role.parts)]
        for start, stop in pairwise(edges):
            found.append(
                Box(
                    (*matrix.start[:axis], start, *matrix.start[axis + 1 :]),
                    (*matrix.stop[:axis], stop, *matrix.stop[axis + 1 :]),
                )
            )
    return found


def diagonal_factors(mean_square: Tensor, beta: float, step: int) -> dict[str, Tensor]:
    """Shampoo's factors of a block after ``step`` steps that the gradient's mean square implies, packed."""
    weight = 1 - beta**step if beta < 1 else float(step)
    return {
        f"factor_{axis}": packed_diagonal(weight * mean_square.movedim(axis, 0).reshape(size, -1).sum(1))
        for axis, size in enumerate(mean_square.shape)
    }
