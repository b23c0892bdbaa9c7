"""SWAN: Ma et al., SGD with normalization and whitening (2412.13148), for matrices in torch's (out, in) layout.

    G  <- G / max |G|                             the update does not depend on the gradient's scale
    G~ <- (G - mean) / std                        along one dimension, population std; zero where std is
    X  <- G~ / |G~|                               transposed if it has more rows than columns
    X  <- beta (3 X - (X X^T) X)                  `steps` times: towards (X X^T)^(-1/2) X
    u  <- X |G~| / |X|                            transposed back: mean square one if no std was zero
    W  <- W - lr wd W - lr alpha u

`axis`: "in" takes mean and std along dimension 1 (over the inputs, one of each per output row), "out" along dimension
0, "long" along the longer one, which is "in" of a square matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def whitened(g: Tensor, axis: str, beta: float, steps: int) -> Tensor:
    """The update u of a matrix, in its dtype."""
    rows, columns = g.shape
    if not g.any():
        return torch.zeros_like(g)
    dim = {"in": 1, "out": 0, "long": 0 if rows > columns else 1}[axis]
    g = g / g.abs().max()
    g = g - g.mean(dim, keepdim=True)
    std = (g**2).mean(dim, keepdim=True).sqrt()
    g = torch.where(std > 1e-6 * std.max(), g / std, 0.0)
    size = g.norm()
    if size == 0:
        return torch.zeros_like(g)
    x = (g.T if rows > columns else g) / size
    for _ in range(steps):
        x = beta * (3 * x - (x @ x.T) @ x)
    x = x.T if rows > columns else x
    return x * (size / x.norm())


def swan(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    t: int,
    *,
    lr: float = 1e-3,
    alpha: float = 1.0,
    axis: str = "in",
    beta: float = 0.8,
    steps: int = 10,
    weight_decay: float | Mapping[str, float] = 0.0,
) -> None:
    """One step on matrices. There is no state, and the rule does not depend on `t`."""
    del t, state
    for name, p in params.items():
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        u = whitened(grads[name].to(p.dtype), axis, beta, steps)
        params[name] = p - lr * decay * p - lr * alpha * u
