r"""AdamW: Adam with decoupled weight decay.

Loshchilov & Hutter, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101 (algorithm 2), with the
bias correction of Kingma & Ba, "Adam", https://arxiv.org/abs/1412.6980 (algorithm 1), in `torch.optim.AdamW`'s order:

.. math::
    \theta &\leftarrow (1 - \eta\lambda)\,\theta \\
    m &\leftarrow \beta_1 m + (1-\beta_1)\, g \qquad v \leftarrow \beta_2 v + (1-\beta_2)\, g^2 \\
    \theta &\leftarrow \theta - \frac{\eta}{1-\beta_1^t}\,
        \frac{m}{\sqrt{v}\,/\sqrt{1-\beta_2^t} + \epsilon}
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ds_optim.optimizers.launch import Rule, Scalars
from ds_optim.optimizers.sharded import ShardedOptimizer


def adam_scalars(group: dict[str, Any], step: int) -> Scalars:
    """The constants of Adam's bias-corrected update with decoupled weight decay, at ``step`` (from 1)."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return {
        "decay": 1 - lr * group["weight_decay"],
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "step_size": lr / (1 - beta1**step),
        "bias2_sqrt": math.sqrt(1 - beta2**step),
        "eps": group["eps"],
    }


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    decay: Any,
    beta1: Any,
    one_minus_beta1: Any,
    beta2: Any,
    one_minus_beta2: Any,
    step_size: Any,
    bias2_sqrt: Any,
    eps: Any,
) -> tuple[Tensor, ...]:
    """One AdamW update of any shape, fp32: returns the new ``(param, exp_avg, exp_avg_sq)``."""
    param = param * decay
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * (grad * grad)
    denominator = exp_avg_sq.sqrt() / bias2_sqrt + eps
    return param - step_size * (exp_avg / denominator), exp_avg, exp_avg_sq


class AdamW(ShardedOptimizer):
    """AdamW (decoupled weight decay), `torch.optim.AdamW`'s formula to 1e-6, under every ZeRO stage.

    State per element: ``exp_avg`` (fp32) and ``exp_avg_sq`` (fp32), 8 bytes per parameter.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it. LLM practice 1e-4 to 1e-3, with warm-up and cosine decay.
        betas: decay of the first and second moment. LLM practice (0.9, 0.95).
        eps: added to the root of the bias-corrected second moment.
        weight_decay: decoupled, multiplied by the learning rate. LLM practice 0.1, not on norms and biases.
        roles: accepted for uniformity; an elementwise rule does not need them.
        state_dtype: dtype of the state.
        bf16_stochastic_round: round parameters in bf16 up or down at random, so that small updates are not lost
            (`ds_optim.kernels.rounding`). For training without an fp32 master copy.
        seed: of that rounding.

    Raises:
        ValueError: every setting out of range, all in one message.
    """

    rule = Rule("adamw", adamw_update, element_state=("exp_avg", "exp_avg_sq"))

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        roles: Any = None,
        state_dtype: torch.dtype | str = torch.float32,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            roles=roles,
            state_dtype=state_dtype,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
        )

    def scalars(self, group: dict[str, Any], step: int) -> Scalars:
        return adam_scalars(group, step)
