"""What whole-matrix rules compute element by element before they multiply: one pass over a stack of blocks each.

A pass turns a stack's gradients into what its rule goes on with, in place. An element whose gradient is not a number
becomes zero, and what is kept for it stays: so a stack marks the blocks that must not advance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_optim.kernels import Formula
from ds_optim.rule import Scalars


def momentum_pass(
    gradient: Tensor, _: Tensor, average: Tensor, *, beta: Any, weight: Any, of_average: Any, of_gradient: Any
) -> tuple[Tensor, ...]:
    """``average <- beta average + weight gradient``, and a mixture of it with the gradient: (mixture, average)."""
    advanced = average * beta + gradient * weight
    mixed = advanced * of_average + gradient * of_gradient
    is_number = ~gradient.isnan()
    return torch.where(is_number, mixed, 0), torch.where(is_number, advanced, average)


def adam_graft_pass(
    gradient: Tensor,
    _: Tensor,
    average: Tensor,
    square: Tensor,
    *,
    beta1: Any,
    one_minus_beta1: Any,
    beta2: Any,
    one_minus_beta2: Any,
    bias1: Any,
    bias2: Any,
    eps: Any,
) -> tuple[Tensor, ...]:
    """Both moments of Adam, and its bias-corrected direction: (direction, average, square)."""
    advanced = average * beta1 + gradient * one_minus_beta1
    squares = square * beta2 + (gradient * gradient) * one_minus_beta2
    direction = (advanced / bias1) / ((squares / bias2).sqrt() + eps)
    is_number = ~gradient.isnan()
    return (
        torch.where(is_number, direction, 0),
        torch.where(is_number, advanced, average),
        torch.where(is_number, squares, square),
    )


MOMENTUM = Formula("momentum", momentum_pass, states=1, block_states=0, is_pass=True)
ADAM_GRAFT = Formula("adam_graft", adam_graft_pass, states=2, block_states=0, is_pass=True)


def momentum_scalars(beta: float, of_average: float, of_gradient: float) -> Scalars:
    """Of `MOMENTUM`, whose average then weighs gradients by ``1 - beta``."""
    return {"beta": beta, "weight": 1 - beta, "of_average": of_average, "of_gradient": of_gradient}


def adam_graft_scalars(betas: tuple[float, float], step: int, eps: float) -> Scalars:
    """Of `ADAM_GRAFT` in the ``step``-th step, from 1."""
    beta1, beta2 = betas
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "bias1": 1 - beta1**step,
        "bias2": 1 - beta2**step,
        "eps": eps,
    }
