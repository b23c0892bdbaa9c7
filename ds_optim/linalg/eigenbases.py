r"""Eigenbases of symmetric positive semidefinite matrices, for SOAP: the first exactly, the next by following them.

The first basis of a matrix is that of one gradient, and often has a null space: a tall gradient's :math:`G G^\top` has
no more rank than G has columns. Of a null space every basis is as good, and every LAPACK picks another one, so that
what is trained would depend on the machine. It gets the eigenvectors of a fixed diagonal within it instead
(`first_basis`).

The next ones follow by a step of power iteration, as the official SOAP has it: :math:`Q \leftarrow \mathrm{qr}(A Q)`,
columns in the order of their eigenvalue estimates :math:`q_i^\top A q_i`. Where A is singular, estimates are rounding,
which changes no order, and so are columns that the iteration leaves without a direction of their own: the old vectors
take their places (`next_bases`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ds_optim.known_torch import fp32_products
from ds_optim.linalg.alignment import aligned
from ds_optim.linalg.products import stacked_matmul
from ds_optim.linalg.workers import Stepwise, matrix_by_matrix

NULL = 1e-12
"""Eigenvalues of a product in fp64 below this part of its largest are those of its null space."""
LOST = 1e-6
"""Eigenvalues of a product in fp32 below this part of the largest are rounding; columns, see `_are_lost`."""


def first_basis(rows: Tensor) -> Tensor:
    """Eigenvectors of ``rows @ rows.mT``, the largest eigenvalue's first, computed in fp64.

    Args:
        rows: (n, k) fp32, finite; zero gives the identity.

    Returns:
        (n, n) fp32, whose columns are orthonormal.
    """
    n = len(rows)
    rows = rows.double()
    peak = rows.abs().amax() if rows.numel() else rows.new_zeros(())
    rows = rows / torch.where(peak > 0, peak, 1.0)
    eigenvalues, ascending = torch.linalg.eigh(rows @ rows.mT)
    vectors: Tensor = ascending.flip(-1)
    rank = int((eigenvalues > NULL * eigenvalues[-1]).sum())
    if rank == 0:
        return torch.eye(n, dtype=torch.float32, device=rows.device)
    if rank < n:
        weights = torch.arange(n, 0, -1, dtype=vectors.dtype, device=vectors.device)
        null = vectors[:, rank:]
        _, within = torch.linalg.eigh(null.mT @ (weights[:, None] * null))
        vectors = torch.cat([vectors[:, :rank], null @ within.flip(-1)], 1)
    return vectors.float()


def first_bases(rows: Tensor) -> Stepwise[Tensor]:
    """`first_basis` of every matrix of a stack (B, n, k); on a CPU as jobs, elsewhere one by one, waiting for each.

    Returns:
        (B, n, n) fp32; not a number where a decomposition does not converge.
    """
    found = rows.new_empty(rows.shape[0], rows.shape[1], rows.shape[1])

    def compute(index: int) -> None:
        _decompose(lambda: first_basis(rows[index]), found[index])

    yield from matrix_by_matrix(rows, compute, kept=4)
    return found


def next_bases(matrices: Tensor, bases: Tensor) -> Stepwise[tuple[Tensor, Tensor]]:
    """One step of power iteration on every basis of a stack, columns sorted by what they had of their matrix.

    Args:
        matrices: (B, n, n) fp32, symmetric positive semidefinite.
        bases: (B, n, n) fp32, whose columns are orthonormal.

    Returns:
        bases: (B, n, n) fp32, new; not finite where a matrix is not, or where its decomposition fails.
        order: (B, n) int64, the old column that each new one follows.
    """
    with fp32_products("ieee"):
        products = stacked_matmul(matrices, bases)
    del matrices  # a stack's room
    estimates = (bases * products).sum(-2)
    estimates = torch.where(estimates > LOST * estimates.amax(-1, keepdim=True), estimates, 0)
    order = estimates.argsort(dim=-1, descending=True, stable=True)
    products = _in_order(products, order)
    if products.device.type != "cpu":
        _decompose(lambda: _orthonormal(products, bases, order, is_certain=False), products)
        return products, order

    def compute(index: int) -> None:
        one = products[index]
        _decompose(lambda: _orthonormal(aligned(one), bases[index], order[index], is_certain=True), one)

    yield from matrix_by_matrix(products, compute, kept=1)
    return products, order


def _in_order(columns: Tensor, order: Tensor) -> Tensor:
    """Of (..., n, n), by (..., n); `take_along_dim` would make an index of twice their size."""
    return columns.gather(-1, order.unsqueeze(-2).expand_as(columns))


def _decompose(compute: Callable[[], Tensor], found: Tensor) -> None:
    """Put what is computed into ``found``, or NaN if that fails: with an error here alone other ranks would wait."""
    try:
        found.copy_(compute())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # LinAlgError, or what an accelerator's solver raises
        found.fill_(math.nan)


def _are_lost(triangle: Tensor, lengths: Tensor, least: Tensor) -> Tensor:
    """Columns of which nothing but rounding is left beside those before them: flags (..., n).

    A column is a mixture of those before it, and what is left. What is left has the rounding of the column itself and,
    by their weights in the mixture, that of the others: where they are nearly dependent, weights are large. Weights are
    looked at where some column is lost without them; twice, since what the first look takes for a direction may be such
    a remainder.

    Args:
        triangle: (..., n, n), of the columns' QR decomposition; is written to.
        lengths: (..., n), of what is left of each column: the triangle's diagonal without signs.
        least: (..., 1), what a column is lost with that mixes no others.
    """
    is_lost, n = lengths <= least, triangle.shape[-1]
    is_singular = is_lost.any(-1, keepdim=True)
    own = triangle.diagonal(dim1=-2, dim2=-1)
    row = torch.zeros(2 * n - 1, dtype=triangle.dtype, device=triangle.device)
    row.narrow(0, n - 1, 1).fill_(1.0)
    backwards = row.unfold(0, n, 1).expand_as(triangle)  # the identity from right to left, without the room of one
    for _ in range(2):
        triangle.masked_fill_(is_lost.unsqueeze(-1), 0.0)
        own.masked_fill_(is_lost, 1.0)
        mixtures = torch.linalg.solve_triangular(triangle, backwards, upper=True)
        is_lost = (lengths <= least * (mixtures.norm(dim=-2).flip(-1) * own.abs())) & is_singular
        del mixtures  # a stack's room
    return is_lost


def _orthonormal(products: Tensor, bases: Tensor, order: Tensor, *, is_certain: bool) -> Tensor:
    """Orthonormal columns that span what those of ``products`` do, with old ones where those add nothing.

    Args:
        products: (..., n, n); is written to.
        bases: likewise, the old ones.
        order: (..., n), which of them each column follows.
        is_certain: whether the host may look if there are such columns; else all matrices are decomposed twice.
    """
    basis: Tensor
    basis, triangle = torch.linalg.qr(products, mode="reduced" if is_certain else "r")
    lengths = triangle.diagonal(dim1=-2, dim2=-1).abs()
    least = LOST * lengths.amax(-1, keepdim=True)
    if is_certain and not bool((lengths <= least).any()):
        return basis
    del basis  # its room
    is_lost = _are_lost(triangle, lengths, least)
    del triangle
    torch.where(is_lost.unsqueeze(-2), _in_order(bases, order), products, out=products)
    basis, _ = torch.linalg.qr(products)
    return basis
