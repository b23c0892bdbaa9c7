"""Lion: Chen et al., Symbolic Discovery of Optimization Algorithms (2302.06675), algorithm 2.

u <- sign(b1 m + (1 - b1) g)             with the momentum of the step before, and sign(0) = 0
p <- p - lr (u + wd p)
m <- b2 m + (1 - b2) g
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def lion(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    t: int,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float | Mapping[str, float] = 0.0,
) -> None:
    """One step. `state[name]` holds "exp_avg" (m), of the parameter's shape. The rule does not depend on `t`."""
    del t
    beta1, beta2 = betas
    for name, p in params.items():
        g = grads[name].to(p.dtype)
        m = state[name]["exp_avg"] if name in state else torch.zeros_like(p)
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        u = torch.sign(beta1 * m + (1 - beta1) * g)
        params[name] = p - lr * (u + decay * p)
        state[name] = {"exp_avg": beta2 * m + (1 - beta2) * g}
