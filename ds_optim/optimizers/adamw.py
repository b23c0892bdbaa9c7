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
from collections.abc import Callable
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
    no_contradictions,
)
from ds_optim.stepping.sharded import ShardedOptimizer


def adam_scalars(group: Settings, step: int) -> Scalars:
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


def adam_from_adam(moments: AdamMoments, group: Settings) -> dict[str, Tensor]:
    """Both moments go on; also those of Adam-mini, whose second is a mean over each block."""
    beta1, beta2 = group["betas"]
    return {"exp_avg": moments.first_as(beta1), "exp_avg_sq": moments.second_as(beta2)}


def adam_rule(settings_of: Callable[[Settings], Settings]) -> Elementwise:
    """AdamW's rule, also as the one that steps what is no matrix for another rule.

    Args:
        settings_of: makes its settings (``lr``, ``betas``, ``eps``, ``weight_decay``) of a group's.
    """
    return Elementwise(
        summary="as the baseline, in the same kernels and checks",
        memory="8",
        learning_rate="1",
        checks={},
        contradictions=no_contradictions,
        betas=Betas(2, last_may_be_one=False),
        from_adam=FromAdam(lambda moments, group: adam_from_adam(moments, settings_of(group)), always),
        batch_scaling=BatchScaling(
            "sqrt", "2205.10287 (derived and tested for Adam and RMSprop); used for branching by 2505.23971"
        ),
        name="adamw",
        update=adamw_update,
        scalars=lambda group, step: adam_scalars(settings_of(group), step),
        element_state=("exp_avg", "exp_avg_sq"),
        non_negative=("exp_avg_sq",),
    )


class AdamW(ShardedOptimizer):
    """AdamW (decoupled weight decay), `torch.optim.AdamW`'s formula to 1e-6, under every ZeRO stage.

    State per element: ``exp_avg`` (fp32) and ``exp_avg_sq`` (fp32), 8 bytes per parameter.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it. LLM practice 1e-4 to 1e-3, with warm-up and cosine decay.
        betas: decay of the first and second moment. LLM practice (0.9, 0.95).
        eps: added to the root of the bias-corrected second moment.
        weight_decay: decoupled, multiplied by the learning rate. LLM practice 0.1, not on norms and biases.
        roles, state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; roles are not needed
            but for state in eight bits, which embeddings, norms and biases have not.

    Raises:
        ValueError: every setting out of range, all in one message.
    """

    rule = adam_rule(lambda group: group)

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
        int8_embeddings: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            roles=roles,
            state_dtype=state_dtype,
            int8_embeddings=int8_embeddings,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
        )
