r"""Lion: the sign of an interpolated momentum.

Chen et al., "Symbolic Discovery of Optimization Algorithms", https://arxiv.org/abs/2302.06675 (algorithm 2):

.. math::
    u &= \operatorname{sign}(\beta_1 m + (1-\beta_1)\, g) \\
    \theta &\leftarrow (1 - \eta\lambda)\,\theta - \eta\, u \\
    m &\leftarrow \beta_2 m + (1-\beta_2)\, g

No bias correction, no eps; ``sign(0) = 0``, so an element whose gradient and momentum are zero does not move.
"""

from __future__ import annotations

import warnings
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


def lion_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    decay: Any,
    beta1: Any,
    one_minus_beta1: Any,
    beta2: Any,
    one_minus_beta2: Any,
    lr: Any,
) -> tuple[Tensor, ...]:
    """One Lion update of any shape, fp32: returns the new ``(param, exp_avg)``."""
    mixed = exp_avg * beta1 + grad * one_minus_beta1
    update = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch's sign would hide a NaN as 0
    return param * decay - lr * update, exp_avg * beta2 + grad * one_minus_beta2


def lion_scalars(group: Settings, step: int) -> Scalars:
    """The constants of an update; every step has the same."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return {
        "decay": 1 - lr * group["weight_decay"],
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "lr": lr,
    }


def lion_from_adam(moments: AdamMoments, group: Settings) -> dict[str, Tensor]:
    """The momentum, which corrects no bias, from AdamW's first moment, shortened (see docs/warm_start.md)."""
    beta = group["betas"][1]
    return {"exp_avg": moments.first * (moments.shortening(beta) / moments.first_bias())}


class Lion(ShardedOptimizer):
    """Lion: every element moves by the learning rate, in the direction of an interpolated momentum's sign.

    State per element: ``exp_avg`` (fp32), 4 bytes per parameter: half of AdamW's.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it; 3 to 10 times smaller than AdamW's (scale initial, peak and final
            value together).
        betas: interpolation for the update, decay of the momentum. The paper's language models: (0.95, 0.98).
        eps: accepted and ignored with one warning (configurations written for Adam carry it).
        weight_decay: decoupled, multiplied by the learning rate; 3 to 10 times larger than AdamW's, so that
            ``lr * weight_decay`` stays the same.
        roles, state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; roles are not
            needed but for state in eight bits, which embeddings, norms and biases have not; ``torch.bfloat16`` halves
            the state.

    Raises:
        ValueError: every setting out of range, all in one message.
    """

    rule = Elementwise(
        summary="to halve the state, with large batches and time to tune",
        memory='4 (2 with `"state_dtype": "bf16"`)',
        learning_rate="a third to a tenth",
        checks={},
        contradictions=no_contradictions,
        betas=Betas(2, last_may_be_one=False),
        from_adam=FromAdam(lion_from_adam, always),
        batch_scaling=BatchScaling("sqrt", "2405.14578 (signs of gradients, below the noise scale; it names Lion)"),
        name="lion",
        update=lion_update,
        scalars=lion_scalars,
        element_state=("exp_avg",),
        non_negative=(),
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        roles: Any = None,
        state_dtype: torch.dtype | str = torch.float32,
        int8_embeddings: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
    ) -> None:
        if eps is not None:
            warnings.warn("Lion has no eps: the value given is ignored", stacklevel=2)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            roles=roles,
            state_dtype=state_dtype,
            int8_embeddings=int8_embeddings,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
        )
