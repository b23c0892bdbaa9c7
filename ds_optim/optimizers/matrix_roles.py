"""Which parameters are matrices for a whole-matrix rule, and of which true matrices a stacked or fused weight is made.

And the two ways in which rules cut and see them: whole (SWAN, Muon), or in blocks of a fixed grid (Shampoo, SOAP).

Decided by role and logical shape alone. Embeddings, output heads, norms and biases are none: each of their rows (or
elements) sees its own gradients, and every published recipe gives them to Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from torch import Tensor

from ds_optim.linalg.packed import packed_diagonal
from ds_optim.linalg.polar import Coefficients, polynomial_workspace
from ds_optim.linalg.precision import MatmulPrecision
from ds_optim.roles.role import WITH_HEADS, Part, Role, is_vector, matrix_view
from ds_optim.rule import Refresh, Settings
from ds_optim.sharding.assignment import Tile
from ds_optim.sharding.boxes import Box, tiles

_ADAMS = frozenset({"embedding", "head", "norm", "bias"})


def is_preconditioned(role: Role, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is more than a number, and none of those that Adam steps."""
    return role.kind not in _ADAMS and len(shape) > 0 and math.prod(shape) > 0


def is_matrix(role: Role, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is made of true matrices: also longer than one along two dimensions at least."""
    return is_preconditioned(role, shape) and not is_vector(shape[role.batch_dims :])


def true_matrices(role: Role, shape: tuple[int, ...], per_head: bool = False) -> list[Box]:
    """The independent matrices of a parameter: one per expert of a stack, one per part of a fused weight.

    A fused weight's parts are what its role says: ``{"kind": "linear"}`` makes it one matrix, ``{"parts": [["query",
    64], ["query", 64], ...]}`` one per head.

    Args:
        role: whose ``batch_dims`` stack matrices and whose ``parts`` lie side by side along ``output_dim``.
        shape: logical shape of the whole parameter.
        per_head: whether every head of queries, keys and values is a matrix of its own.

    Raises:
        ValueError: ``per_head``, and the role does not say what it is or how many rows a head has.
    """
    whole = Box((0,) * len(shape), shape)
    single = [1] * role.batch_dims + list(shape[role.batch_dims :])
    axis = role.output_dim
    sizes = _sizes(role, shape[axis], per_head)
    found = []
    for matrix in tiles(whole, single):
        for start, stop in pairwise([0, *accumulate(sizes)]):
            found.append(
                Box(
                    (*matrix.start[:axis], start, *matrix.start[axis + 1 :]),
                    (*matrix.stop[:axis], stop, *matrix.stop[axis + 1 :]),
                )
            )
    return found


def _sizes(role: Role, rows: int, per_head: bool) -> list[int]:
    """Output rows of every matrix, in order."""
    parts = role.parts if role.kind == "fused" and role.parts else (Part(role.kind, rows),)
    if not per_head:
        return [part.size for part in parts]
    sizes = []
    for part in parts:
        if part.kind not in (*WITH_HEADS, "fused", "other"):
            sizes.append(part.size)
            continue
        if part.kind == "other":
            raise ValueError(
                "per_head, and nothing says what this matrix is, so whether it has heads: pass roles=model, say what "
                'it is ({"kind": "linear"}), or leave per_head out'
            )
        if role.head_dim is None:
            raise ValueError(
                f"per_head, and nothing says how many rows a head of this {part.kind} has: pass roles=model, say so "
                f'({{"kind": "{role.kind}", "head_dim": 64}}; a fused weight\'s parts as well), or leave per_head out'
            )
        whole, rest = divmod(part.size, role.head_dim)
        sizes += [part.size] if rest else [role.head_dim] * whole  # values of another width lie one head in a part
    return sizes


def matrix_tiles(role: Role, shape: tuple[int, ...], per_head: bool = False) -> list[Tile]:
    """Every true matrix, seen as (inputs before, outputs, inputs behind); a convolution's inputs are (in, k, k).

    Raises:
        ValueError: see `true_matrices`.
    """
    if not is_matrix(role, shape):
        return []
    found = []
    for box in true_matrices(role, shape, per_head):
        _, inputs_before, outputs, inputs_behind = matrix_view(role, box.shape)
        found.append(Tile(box, (inputs_before, outputs, inputs_behind)))
    return found


def update_matrices_(stack: Tensor, update: Callable[[Tensor, int], object]) -> None:
    """Hand a stack of `matrix_tiles` to a function on matrices, which changes it in place.

    Args:
        stack: (B, inputs before, outputs, inputs behind), contiguous.
        update: is given (B, m, n) as it lies, contiguous, and the dimension of the outputs, 1 or 2.
    """
    _, before, outputs, behind = stack.shape
    if before == 1:
        update(stack.view(-1, outputs, behind), 1)
    elif behind == 1:
        update(stack.view(-1, before, outputs), 2)
    else:
        moved = stack.movedim(2, 1)
        matrices = moved.reshape(-1, outputs, before * behind)  # a copy
        update(matrices, 1)
        moved.copy_(matrices.view(moved.shape))


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shorter and the longer side of the matrix that a block of `matrix_tiles` is."""
    before, outputs, behind = shape
    return min(before * behind, outputs), max(before * behind, outputs)


def iteration_workspace(
    shape: tuple[int, ...], count: int, steps: Sequence[Coefficients], precision: MatmulPrecision, device_type: str
) -> int:
    """Bytes that `update_matrices_` takes with `polynomial_steps` on so many blocks of `matrix_tiles`."""
    before, _, behind = shape
    moved = 4 * count * math.prod(shape) if min(before, behind) > 1 else 0
    return moved + polynomial_workspace((count, *sides(shape)), steps, precision, device_type)


def blocks_refresh(settings: Settings) -> Refresh:
    """When the blocks of `grid_tiles` are refreshed."""
    return Refresh(int(settings["precondition_frequency"]), settings["refresh"] == "staggered")


def grid_tiles(role: Role, shape: tuple[int, ...], largest: int) -> list[Tile]:
    """Blocks of at most ``largest`` along every axis, a fixed grid over every true matrix; axes of one do not count."""
    if not is_preconditioned(role, shape):
        return []
    axes = [axis for axis in range(role.batch_dims, len(shape)) if shape[axis] > 1] or [len(shape) - 1]
    return [
        Tile(tile, tuple(tile.shape[axis] for axis in axes))
        for matrix in true_matrices(role, shape)
        for tile in tiles(matrix, [largest] * len(shape))
    ]


def diagonal_factors(mean_square: Tensor, beta: float, step: int) -> dict[str, Tensor]:
    """Shampoo's factors of a block after ``step`` steps that the gradient's mean square implies, packed."""
    weight = 1 - beta**step if beta < 1 else float(step)
    return {
        f"factor_{axis}": packed_diagonal(weight * mean_square.movedim(axis, 0).reshape(size, -1).sum(1))
        for axis, size in enumerate(mean_square.shape)
    }
