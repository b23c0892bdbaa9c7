"""Adan: Xie et al. (2208.06677), in the form of the authors' code (betas: one minus the paper's; bias correction).

d <- g - g_previous                      0 at the first step
m <- b1 m + (1 - b1) g
v <- b2 v + (1 - b2) d
n <- b3 n + (1 - b3) (g + b2 d)^2
u <- (m^ + b2 v^) / (sqrt(n^) + eps)     with x^ = x / (1 - b_x^t)
prox (the default):   p <- (p - lr u) / (1 + lr wd)
no_prox:              p <- (1 - lr wd) p - lr u
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def adan(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float | Mapping[str, float] = 0.0,
    no_prox: bool = False,
) -> None:
    """One step. `state[name]` holds "exp_avg" (m), "exp_avg_diff" (v), "exp_avg_sq" (n) and "previous_grad"."""
    beta1, beta2, beta3 = betas
    for name, p in params.items():
        g = grads[name].to(p.dtype)
        if name not in state:
            zeros = torch.zeros_like(p)
            state[name] = {"exp_avg": zeros, "exp_avg_diff": zeros, "exp_avg_sq": zeros, "previous_grad": g}
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        d = g - state[name]["previous_grad"]
        m = beta1 * state[name]["exp_avg"] + (1 - beta1) * g
        v = beta2 * state[name]["exp_avg_diff"] + (1 - beta2) * d
        n = beta3 * state[name]["exp_avg_sq"] + (1 - beta3) * (g + beta2 * d) ** 2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        n_hat = n / (1 - beta3**t)
        u = (m_hat + beta2 * v_hat) / (n_hat.sqrt() + eps)
        params[name] = (1 - lr * decay) * p - lr * u if no_prox else (p - lr * u) / (1 + lr * decay)
        state[name] = {"exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "previous_grad": g}
