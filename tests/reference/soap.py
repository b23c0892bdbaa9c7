"""SOAP (2409.11321), as the official code computes it, on every block of a grid; fp64 wherever it is given fp64.

    first gradient: L = (1 - b2) G G^T, R = (1 - b2) G^T G; QL, QR their eigenvectors, largest first; W stays
    then t = 1, 2, ...
      g = QL^T G QR;  M <- b1 M + (1 - b1) g;  V <- b2 V + (1 - b2) g^2
      W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) QL (M / (sqrt V + eps)) QR^T;   W <- W - lr wd W
      L <- b2 L + (1 - b2) G G^T, R likewise
      when (t + offset) mod f = 0: i = order of diag(QL^T L QL), falling; permute V's rows; QL' = qr(L QL[:, i]).Q;
      likewise R and columns; M <- QL'^T QL M QR^T QR'

A first basis has no order within its null space: there, the eigenvectors of diag(n, ..., 1) within it, the largest
first. Estimates below 1e-6 of the largest count as zero, and zeros keep their order. A column of L QL that adds nothing
to those before it (R's diagonal at most 1e-6 of its largest) is replaced by the old vector, and the product is
decomposed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def first_basis(rows: Tensor) -> Tensor:
    """Left singular vectors of (n, k), computed in fp64."""
    n = len(rows)
    u, s, _ = torch.linalg.svd(rows.double(), full_matrices=True)
    if not s.any():
        return torch.eye(n, dtype=rows.dtype)
    rank = int((s > 1e-6 * s[0]).sum())
    null = u[:, rank:]
    if rank < n:
        _, within = torch.linalg.eigh(null.T @ torch.diag(torch.arange(n, 0, -1).double()) @ null)
        u = torch.cat([u[:, :rank], null @ within.flip(-1)], 1)
    return u.to(rows.dtype)


def turned(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The next basis, and the order that its columns come in."""
    estimates = torch.diag(basis.T @ factor @ basis)
    order = torch.where(estimates > 1e-6 * estimates.max(), estimates, 0).argsort(descending=True, stable=True)
    old = basis[:, order]
    product = factor @ old
    q, r = torch.linalg.qr(product)
    lengths = r.diagonal().abs()
    lost = lengths <= 1e-6 * lengths.max()
    if lost.any():
        q, _ = torch.linalg.qr(torch.where(lost, old, product))
    return q, order


def along(g: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """``matrix`` applied along an axis."""
    return torch.tensordot(matrix, g, dims=([1], [axis])).movedim(0, axis)


def unfolded(g: Tensor, axis: int) -> Tensor:
    """(d, rest)."""
    return g.movedim(axis, 0).reshape(g.shape[axis], -1)


def soap(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    step: int,
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    weight_decay: float | Mapping[str, float] = 0.01,
    precondition_frequency: int = 10,
    max_preconditioner_dim: int = 1024,
    offsets: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """One step on matrices, the first of which (``step`` 1) moves nothing."""
    b1, b2 = betas
    t = step - 1
    for name, p in params.items():
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        pieces = [
            [slice(at, at + max_preconditioner_dim) for at in range(0, size, max_preconditioner_dim)]
            for size in p.shape
        ]
        result = p.clone()
        for index, where in enumerate(itertools.product(*pieces)):
            g = grads[name].to(p.dtype)[where]
            kept = state.setdefault(f"{name} {index}", {})
            axes = range(g.dim())
            if step == 1:
                kept["m"], kept["v"] = torch.zeros_like(g), torch.zeros_like(g)
                for axis in axes:
                    rows = unfolded(g, axis)
                    kept[f"l{axis}"] = (1 - b2) * rows @ rows.T
                    kept[f"q{axis}"] = first_basis(rows)
                continue
            rotated = g
            for axis in axes:
                rotated = along(rotated, kept[f"q{axis}"].T, axis)
            kept["m"] = b1 * kept["m"] + (1 - b1) * rotated
            kept["v"] = b2 * kept["v"] + (1 - b2) * rotated**2
            u = (1 - b2**t) ** 0.5 / (1 - b1**t) * kept["m"] / (kept["v"].sqrt() + eps)
            for axis in axes:
                u = along(u, kept[f"q{axis}"], axis)
            result[where] = (1 - lr * decay) * (p[where] - lr * u)
            for axis in axes:
                rows = unfolded(g, axis)
                kept[f"l{axis}"] = b2 * kept[f"l{axis}"] + (1 - b2) * rows @ rows.T
            if (t + (offsets[name][index] if offsets else 0)) % precondition_frequency:
                continue
            for axis in axes:
                basis = kept[f"q{axis}"]
                kept[f"q{axis}"], order = turned(kept[f"l{axis}"], basis)
                kept["v"] = kept["v"].index_select(axis, order)
                kept["m"] = along(kept["m"], kept[f"q{axis}"].T @ basis, axis)
        params[name] = result
