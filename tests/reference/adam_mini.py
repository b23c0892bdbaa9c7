"""Adam-mini: Zhang et al. (2406.16793 v6), in the form of the authors' code 1.1.1.

    p   <- p - lr wd p
    m   <- b1 m + (1 - b1) g
    v_b <- b2 v_b + (1 - b2) mean over block b of g^2
    p   <- p - lr m^ / (sqrt(v_b^) + eps)    with m^ = m / (1 - b1^t), v_b^ = v_b / (1 - b2^t), b the element's block

Which elements form a block is given, element by element, as integer labels 0 ... B-1 of the parameter's shape. The
paper's choices (heads, rows, whole tensors) are thus stated by whoever calls, by any means unlike those of the code
under test.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def adam_mini(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    t: int,
    *,
    labels: Mapping[str, Tensor],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Mapping[str, float] = 0.0,
) -> None:
    """One step. `state[name]` holds "exp_avg" (m, of the parameter's shape) and "exp_avg_sq" (v, one value per label).

    `labels[name]` is an int64 tensor of the parameter's shape. Sums over blocks are taken in fp64 whatever the dtype.
    """
    beta1, beta2 = betas
    for name, p in params.items():
        g = grads[name].to(p.dtype)
        block = labels[name].flatten()
        sizes = torch.bincount(block)
        if name not in state:
            state[name] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": p.new_zeros(len(sizes))}
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        sums = torch.bincount(block, weights=g.double().flatten() ** 2)
        m = beta1 * state[name]["exp_avg"] + (1 - beta1) * g
        v = beta2 * state[name]["exp_avg_sq"] + (1 - beta2) * (sums / sizes).to(p.dtype)
        m_hat = m / (1 - beta1**t)
        v_hat = (v / (1 - beta2**t))[block].reshape(p.shape)
        p = p - lr * decay * p
        params[name] = p - lr * m_hat / (v_hat.sqrt() + eps)
        state[name] = {"exp_avg": m, "exp_avg_sq": v}
