r"""Adan: adaptive Nesterov momentum.

Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
https://arxiv.org/abs/2208.06677 (algorithm 1), as its official code computes it: betas are one minus the paper's, the
state starts at zero with bias correction, and there is no restart (as in the paper's experiments).

.. math::
    d &= g - g_{t-1} \quad (0 \text{ at } t = 1) \\
    m &\leftarrow \beta_1 m + (1-\beta_1)\, g \qquad v \leftarrow \beta_2 v + (1-\beta_2)\, d \qquad
    n \leftarrow \beta_3 n + (1-\beta_3)\,(g + \beta_2 d)^2 \\
    D &= \sqrt{n}\,/\sqrt{1-\beta_3^t} + \epsilon \\
    \theta &\leftarrow \Big(\theta - \frac{\eta}{1-\beta_1^t}\frac{m}{D}
        - \frac{\eta\beta_2}{1-\beta_2^t}\frac{v}{D}\Big) \Big/ (1 + \eta\lambda)

With ``no_prox`` the decay is decoupled, as in AdamW: :math:`\theta \leftarrow (1-\eta\lambda)\theta` before both
subtractions instead of the division after them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ds_optim.rule import (
    AdamMoments,
    BatchScaling,
    Betas,
    Elementwise,
    FromAdam,
    Scalars,
    Settings,
    always,
    flag,
    no_contradictions,
)
from ds_optim.stepping.sharded import ShardedOptimizer


def adan_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_diff: Tensor,
    exp_avg_sq: Tensor,
    previous_grad: Tensor,
    *,
    decay: Any,
    beta1: Any,
    one_minus_beta1: Any,
    beta2: Any,
    one_minus_beta2: Any,
    beta3: Any,
    one_minus_beta3: Any,
    step_size: Any,
    step_size_diff: Any,
    bias3_sqrt: Any,
    eps: Any,
    shrink: Any,
    has_previous: Any,
) -> tuple[Tensor, ...]:
    """One Adan update of any shape, fp32: returns the new ``(param, exp_avg, exp_avg_diff, exp_avg_sq, grad)``.

    ``has_previous`` is 0 at a tensor's first step, else 1.
    """
    difference = (grad - previous_grad) * has_previous
    exp_avg = exp_avg * beta1 + grad * one_minus_beta1
    exp_avg_diff = exp_avg_diff * beta2 + difference * one_minus_beta2
    lookahead = grad + beta2 * difference
    exp_avg_sq = exp_avg_sq * beta3 + one_minus_beta3 * (lookahead * lookahead)
    denominator = exp_avg_sq.sqrt() / bias3_sqrt + eps
    param = param * decay - step_size * (exp_avg / denominator)
    param = (param - step_size_diff * (exp_avg_diff / denominator)) / shrink
    return param, exp_avg, exp_avg_diff, exp_avg_sq, grad.clone()


def adan_scalars(group: Settings, step: int) -> Scalars:
    """The constants of an update at ``step`` (from 1)."""
    lr, (beta1, beta2, beta3) = group["lr"], group["betas"]
    lr_times_decay = lr * group["weight_decay"]
    return {
        "decay": 1 - lr_times_decay if group["no_prox"] else 1.0,
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "beta3": beta3,
        "one_minus_beta3": 1 - beta3,
        "step_size": lr / (1 - beta1**step),
        "step_size_diff": lr * beta2 / (1 - beta2**step),
        "bias3_sqrt": math.sqrt(1 - beta3**step),
        "eps": group["eps"],
        "shrink": 1.0 if group["no_prox"] else 1 + lr_times_decay,
        "has_previous": 0.0 if step == 1 else 1.0,
    }


def adan_from_adam(moments: AdamMoments, group: Settings) -> dict[str, Tensor]:
    r"""The momentum shortened (see docs/warm_start.md), differences zero, the previous gradient the best guess at it.

    Squares are of :math:`g_t + \beta_2 (g_t - g_{t-1})`, larger than those of :math:`g_t` by
    :math:`(1+\beta_2)^2 + \beta_2^2` where gradients are mostly noise, as in training by mini-batches.
    """
    beta1, beta2, beta3 = group["betas"]
    return {
        "exp_avg": moments.first_as(beta1) * moments.shortening(beta1),
        "exp_avg_sq": moments.second_as(beta3) * ((1 + beta2) ** 2 + beta2**2),
        "exp_avg_diff": torch.zeros_like(moments.first),
        "previous_grad": moments.first / moments.first_bias(),
    }


class Adan(ShardedOptimizer):
    """Adan: Adam's second moment under a Nesterov momentum, both gradient and gradient difference averaged.

    State per element: ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq`` and ``previous_grad`` (fp32), 16 bytes per
    parameter: twice AdamW's. Clip the gradient with DeepSpeed's ``gradient_clipping``: the norm must be global.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it; 5 to 10 times AdamW's.
        betas: decay of gradient, gradient difference and second moment (one minus the paper's). The official GPT-2
            recipe: (0.98, 0.92, 0.95) with lr 2.5e-3.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: proximal (divides by ``1 + lr * weight_decay``) unless ``no_prox``; 0.02 in the official recipes.
        no_prox: decoupled weight decay, before the update, instead of proximal.
        roles, state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; roles are not needed
            but for state in eight bits, which embeddings, norms and biases have not.

    Raises:
        ValueError: every setting out of range, all in one message.
    """

    rule = Elementwise(
        summary="when steps cost more than memory, with large batches",
        memory="16",
        learning_rate="5 to 10 times",
        checks={"no_prox": flag()},
        contradictions=no_contradictions,
        betas=Betas(3, last_may_be_one=False),
        from_adam=FromAdam(adan_from_adam, always),
        batch_scaling=BatchScaling("sqrt", "judgement: divided by a root mean square of gradients, as Adam is"),
        name="adan",
        update=adan_update,
        scalars=adan_scalars,
        element_state=("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"),
        non_negative=("exp_avg_sq",),
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        roles: Any = None,
        state_dtype: torch.dtype | str = torch.float32,
        int8_embeddings: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox},
            roles=roles,
            state_dtype=state_dtype,
            int8_embeddings=int8_embeddings,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
        )
