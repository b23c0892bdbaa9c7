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

import torch
from torch import Tensor

from ds_optim.known_torch import fp32_products
from ds_optim.linalg.products import stacked_matmul
from ds_optim.linalg.workers import Stepwise, matrix_by_matrix

NULL = 1e-12
"""Eigenvalues of a product in fp64 below this part of its largest are those of its null space."""
LOST = 1e-6
"""Eigenvalues and columns of a product in fp32 below this part of the largest are rounding."""


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
    """`first_basis` of every matrix of a stack (B, n, k); on a CPU as jobs, elsewhere one by one, waiting for each."""
    found = rows.new_empty(rows.shape[0], rows.shape[1], rows.shape[1])

    def compute(index: int) -> None:
        found[index] = first_basis(rows[index])

    yield from matrix_by_matrix(rows, compute, kept=4)
    return found


def next_bases(matrices: Tensor, bases: Tensor) -> Stepwise[tuple[Tensor, Tensor]]:
    """One step of power iteration on every basis of a stack, columns sorted by what they had of their matrix.

    Args:
        matrices: (B, n, n) fp32, symmetric positive semidefinite.
        bases: (B, n, n) fp32, whose columns are orthonormal.

    Returns:
        bases: (B, n, n) fp32, new; not finite where a matrix is not.
        order: (B, n) int64, the old column that each new one follows.
    """
    with fp32_products("ieee"):
        products = stacked_matmul(matrices, bases)
    estimates = (bases * products).sum(-2)
    estimates = torch.where(estimates > LOST * estimates.amax(-1, keepdim=True), estimates, 0)
    order = estimates.argsort(dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2)
    products, kept = products.take_along_dim(columns, -1), bases.take_along_dim(columns, -1)
    if matrices.device.type != "cpu":
        return _orthonormal(products, kept, is_certain=False), order
    found = torch.empty_like(products)

    def compute(index: int) -> None:
        found[index] = _orthonormal(products[index].clone(), kept[index], is_certain=True)

    yield from matrix_by_matrix(matrices, compute, kept=2)
    return found, order


def _orthonormal(products: Tensor, kept: Tensor, *, is_certain: bool) -> Tensor:
    """Orthonormal columns that span what those of ``products`` do, with columns of ``kept`` where those add nothing.

    Args:
        products: (..., n, n).
        kept: likewise.
        is_certain: whether the host may look if there are such columns; else all matrices are decomposed twice.
    """
    basis: Tensor
    basis, triangle = torch.linalg.qr(products)
    lengths = triangle.diagonal(dim1=-2, dim2=-1).abs()
    is_lost = lengths <= LOST * lengths.amax(-1, keepdim=True)
    if is_certain and not bool(is_lost.any()):
        return basis
    basis, _ = torch.linalg.qr(torch.where(is_lost.unsqueeze(-2), kept, products))
    return basis
