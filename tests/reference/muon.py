"""Muon (Jordan 2024; Moonlight, 2502.16982) and NorMuon (2510.05491), for matrices in torch's (out, in) layout.

    M <- M + (1 - mu) (G - M)                     U = G + mu (M - G) if nesterov, else M
    X <- U / max(|U|, 1e-7)                       transposed if it has more rows than columns
    X <- a X + (b S + c S S) X,  S = X X^T        `steps` times, each with its own (a, b, c)
    O <- X                                        transposed back
    W <- (1 - lr wd) W - lr r O

with r = 0.2 sqrt(max(out, in)) ("match_rms_adamw") or sqrt(max(1, out / in)) ("original"). NorMuon puts between them

    v <- v + (1 - b2) (mean over columns of O^2 - v)
    O' = O / (sqrt(v) + 1e-8),  O <- O' |O| / |O'|
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(u: Tensor, coefficients: Sequence[Sequence[float]], margin: float = 1.0) -> Tensor:
    """Newton-Schulz on one matrix, in its dtype."""
    x = u / (u.norm() * margin).clamp(min=1e-7)
    x = x.T if u.shape[0] > u.shape[1] else x
    for a, b, c in coefficients:
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def muon(
    params: dict[str, Tensor],
    grads: Mapping[str, Tensor],
    state: dict[str, dict[str, Tensor]],
    t: int,
    *,
    lr: float = 1e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    coefficients: Sequence[Sequence[float]] | None = None,
    adjust_lr: str = "match_rms_adamw",
    weight_decay: float | Mapping[str, float] = 0.1,
    beta2: float | None = None,
) -> None:
    """One step on matrices; NorMuon's with a ``beta2``. The rule does not depend on `t`."""
    del t
    for name, p in params.items():
        g = grads[name].to(p.dtype)
        kept = state.setdefault(name, {"m": torch.zeros_like(p), "v": p.new_zeros(p.shape[0], 1)})
        m = kept["m"] = kept["m"] + (1 - momentum) * (g - kept["m"])
        u = g + momentum * (m - g) if nesterov else m
        o = orthogonal(u, coefficients or [QUINTIC] * ns_steps)
        if beta2 is not None:
            v = kept["v"] = kept["v"] + (1 - beta2) * ((o**2).mean(1, keepdim=True) - kept["v"])
            scaled = o / (v.sqrt() + 1e-8)
            o = scaled * (o.norm() / scaled.norm()) if scaled.any() else scaled
        out, inputs = p.shape
        ratio = math.sqrt(max(1, out / inputs)) if adjust_lr == "original" else 0.2 * math.sqrt(max(out, inputs))
        decay = weight_decay if isinstance(weight_decay, float | int) else weight_decay[name]
        params[name] = (1 - lr * decay) * p - lr * ratio * o
