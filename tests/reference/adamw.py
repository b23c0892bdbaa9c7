"""AdamW: Loshchilov and Hutter, Decoupled Weight Decay Regularization (1711.05101), in the form of torch.optim.AdamW.

p <- p - lr wd p
m <- b1 m + (1 - b1) g
v <- b2 v + (1 - b2) g^2
p <- p - lr m^ / (sqrt(v^) + eps)        with m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def adamw(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Mapping[str, float] = 1e-2,
) -> None:
    """One step. `state[name]` holds "exp_avg" (m) and "exp_avg_sq" (v), both of the parameter's shape."""
    beta1, beta2 = betas
    for name, p in params.items():
        g = grads[name].to(p.dtype)
        if name not in state:
            state[name] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        m = beta1 * state[name]["exp_avg"] + (1 - beta1) * g
        v = beta2 * state[name]["exp_avg_sq"] + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        p = p - lr * decay * p
        params[name] = p - lr * m_hat / (v_hat.sqrt() + eps)
        state[name] = {"exp_avg": m, "exp_avg_sq": v}
