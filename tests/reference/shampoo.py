"""Shampoo: Gupta et al. (1802.09568), and the form of Meta's Distributed Shampoo (2309.06497) with its grafting.

The paper's (`shampoo_paper`), on a whole tensor of K dimensions:

    H_i <- H_i + G_(i) G_(i)^T                    from eps I; G_(i) is the gradient unfolded along dimension i
    W   <- W - lr G x_1 H_1^(-1/2K) ... x_K H_K^(-1/2K)

Today's (`shampoo`), on every block of a grid that cuts each dimension into pieces of at most max_preconditioner_dim:

    F_i <- b2 F_i + (1 - b2) G_(i) G_(i)^T        weight 1 and no bias correction if b2 = 1
    M   <- b1 M + (1 - b1) G                      M^ = M / (1 - b1^t)
    V   <- b3 V + (1 - b3) G^2                    V^ = V / (1 - b3^t), b3 = graft_beta2
    X_i <- root(F_i / (1 - b2^t))                 at a refresh, see below
    u_g =  M^ / (sqrt(V^) + eps)
    u   =  M^ x_1 X_1 ... x_K X_K, times |u_g| / (|u| + 1e-16); u_g itself until the block's first refresh
    W   <- W - lr (u + wd W)

    root(A): eigh(A + r I) gives l, Q; if min l < r: l <- l + r - min l; Q l^exponent Q^T

with exponent = -1/(2K) unless given, and r = matrix_eps (ridge "absolute") or matrix_eps times the largest eigenvalue
of A ("relative"; a zero matrix has the identity for a root).

Refresh "together": all blocks at t = start and at the multiples of f after it. "staggered": a block with offset o when
t >= start and (t + o) mod f = 0. Without a graft, u is M^ until the first refresh.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def unfolded_square(g: Tensor, axis: int) -> Tensor:
    """(d, d) for the size d of `axis`: the sum of g's outer products with itself over all other dimensions."""
    rows = g.movedim(axis, 0).reshape(g.shape[axis], -1)
    return rows @ rows.T


def multiplied(g: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """The mode product: `matrix` applied along `axis` of g."""
    return torch.tensordot(matrix, g, dims=([1], [axis])).movedim(0, axis)


def root(a: Tensor, exponent: float, matrix_eps: float, ridge: str) -> Tensor:
    """The root of a ridged matrix, computed in fp64 whatever the dtype."""
    matrix = a.double()
    if ridge == "relative":
        if not matrix.any():
            return torch.eye(len(a), dtype=a.dtype)
        matrix_eps = matrix_eps * float(torch.linalg.eigvalsh(matrix)[-1])
    eigenvalues, q = torch.linalg.eigh(matrix + matrix_eps * torch.eye(len(a), dtype=torch.float64))
    if eigenvalues.min() < matrix_eps:
        eigenvalues = eigenvalues + (matrix_eps - eigenvalues.min())
    return (q @ torch.diag(eigenvalues**exponent) @ q.T).to(a.dtype)


def block_slices(shape: Sequence[int], max_preconditioner_dim: int) -> list[tuple[slice, ...]]:
    """The grid's blocks, the last dimension running fastest."""
    pieces = [
        [slice(begin, min(begin + max_preconditioner_dim, size)) for begin in range(0, size, max_preconditioner_dim)]
        for size in shape
    ]
    return list(itertools.product(*pieces))


def shampoo(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float | Mapping[str, float] = 0.0,
    matrix_eps: float = 1e-6,
    ridge: str = "relative",
    max_preconditioner_dim: int = 1024,
    precondition_frequency: int = 1,
    start_preconditioning_step: int = 1,
    graft: str | None = "adam",
    graft_beta2: float | None = None,
    exponent: float | None = None,
    refresh: str = "together",
    offsets: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """One step. `state[name]` holds "exp_avg" (M), "exp_avg_sq" (V), "factor/B/I" and "root/B/I".

    B counts the blocks as `block_slices` does, I the dimensions; a root is there from the block's first refresh on.
    `offsets[name]` has one offset per block, for refresh "staggered". `graft_beta2` is b2 unless given.
    """
    beta1, beta2 = betas
    beta3 = beta2 if graft_beta2 is None else graft_beta2
    start, f = start_preconditioning_step, precondition_frequency
    for name, p in params.items():
        g = grads[name].to(p.dtype)
        if name not in state:
            state[name] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        m = beta1 * state[name]["exp_avg"] + (1 - beta1) * g
        v = beta3 * state[name]["exp_avg_sq"] + (1 - beta3) * g**2
        m_hat = m / (1 - beta1**t)
        u = torch.empty_like(p)
        for b, block in enumerate(block_slices(p.shape, max_preconditioner_dim)):
            due = t == start or (t > start and t % f == 0)
            if refresh == "staggered":
                assert offsets is not None
                due = t >= start and (t + offsets[name][b]) % f == 0
            u_block = m_hat[block]
            for axis in range(p.dim()):
                square = unfolded_square(g[block], axis)
                factor = state[name].get(f"factor/{b}/{axis}", torch.zeros_like(square))
                factor = factor + square if beta2 == 1 else beta2 * factor + (1 - beta2) * square
                state[name][f"factor/{b}/{axis}"] = factor
                if due:
                    corrected = factor if beta2 == 1 else factor / (1 - beta2**t)
                    power = -1 / (2 * p.dim()) if exponent is None else exponent
                    state[name][f"root/{b}/{axis}"] = root(corrected, power, matrix_eps, ridge)
                if f"root/{b}/{axis}" in state[name]:
                    u_block = multiplied(u_block, state[name][f"root/{b}/{axis}"], axis)
            if graft == "adam":
                u_graft = m_hat[block] / ((v[block] / (1 - beta3**t)).sqrt() + eps)
                if f"root/{b}/0" in state[name]:
                    u_block = u_block * (u_graft.norm() / (u_block.norm() + 1e-16))
                else:
                    u_block = u_graft
            u[block] = u_block
        params[name] = p - lr * (u + decay * p)
        state[name] |= {"exp_avg": m, "exp_avg_sq": v}


def shampoo_paper(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    t: int,
    *,
    lr: float = 1e-2,
    eps: float = 1e-4,
    weight_decay: float | Mapping[str, float] = 0.0,
) -> None:
    """One step of the paper's algorithms 1 and 2. `state[name]` holds "factor/I" (H_I). Does not depend on `t`."""
    del t
    for name, p in params.items():
        g = grads[name].to(p.dtype)
        if name not in state:
            state[name] = {f"factor/{i}": eps * torch.eye(d, dtype=p.dtype) for i, d in enumerate(p.shape)}
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        u = g
        for axis in range(p.dim()):
            state[name][f"factor/{axis}"] = state[name][f"factor/{axis}"] + unfolded_square(g, axis)
            eigenvalues, q = torch.linalg.eigh(state[name][f"factor/{axis}"].double())
            inverse_root = q @ torch.diag(eigenvalues ** (-1 / (2 * p.dim()))) @ q.T
            u = multiplied(u, inverse_root.to(p.dtype), axis)
        params[name] = p - lr * (u + decay * p)
