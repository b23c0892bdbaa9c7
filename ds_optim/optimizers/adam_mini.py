r"""Adam-mini: Adam with one second moment per block instead of one per element.

Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", https://arxiv.org/abs/2406.16793 (algorithms 1 and 3),
as the official code v1.1.1 computes it. A block :math:`b` is what the Hessian of a transformer makes one: a head of a
query or key, an output neuron of any other matrix, a token of an embedding, a whole norm.

.. math::
    \theta &\leftarrow (1 - \eta\lambda)\,\theta \qquad m \leftarrow \beta_1 m + (1-\beta_1)\, g \\
    v_b &\leftarrow \beta_2 v_b + (1-\beta_2)\, \operatorname{mean}(g_b^2) \\
    \theta_b &\leftarrow \theta_b - \frac{\eta}{1-\beta_1^t}\, \frac{m_b}{\sqrt{v_b}\,/\sqrt{1-\beta_2^t} + \epsilon}
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ds_optim.optimizers.adamw import adam_from_adam, adam_scalars
from ds_optim.roles.role import PER_HEAD, Role, is_vector, matrix_view
from ds_optim.rule import BatchScaling, Betas, Blockwise, FromAdam, always, no_contradictions
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.stepping.sharded import ShardedOptimizer


def adam_mini_update(
    param: Tensor,
    grad: Tensor,
    mean_square: Tensor,
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
    """One Adam-mini update, fp32: returns the new ``(param, exp_avg, exp_avg_sq)``.

    ``mean_square`` and ``exp_avg_sq`` hold one value per block and broadcast against the elements.
    """
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * mean_square
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    block_step = step_size / (exp_avg_sq.sqrt() / bias2_sqrt + eps)
    return param * decay - exp_avg * block_step, exp_avg, exp_avg_sq


def adam_mini_blocks(role: Role, shape: tuple[int, ...]) -> BlockGrid:
    """The blocks of one parameter (paper, Algorithm 3; the table of the official v1.1.1, without its name collisions).

    =====================================================  ========================================================
    role                                                   block
    =====================================================  ========================================================
    bias                                                   one element (plain AdamW)
    query, key                                             one head: ``head_dim`` output rows (one row if unknown)
    embedding, head, value, attention_output, mlp,
    router, linear, conv, other                            one output row (token, neuron, channel) of each expert
    fused                                                  part by part, by the same rules
    norm, any 1-D tensor, and a vector that is "other"     the whole tensor
    =====================================================  ========================================================

    Args:
        role: of the parameter.
        shape: logical shape of the whole parameter, never of a shard.
    """
    if role.kind == "bias":
        return BlockGrid(1, 1, math.prod(shape), 1, ((math.prod(shape), 1),))
    if role.kind == "norm" or len(shape) < 2 or (role.kind == "other" and is_vector(shape)):
        return BlockGrid(1, 1, 1, math.prod(shape), ((1, 1),))
    batch, reduce, axis, inner = matrix_view(role, shape)
    if role.kind == "fused" and role.parts:
        runs = tuple(_segments(part.kind, part.size, role.head_dim) for part in role.parts)
    else:
        runs = (_segments(role.kind, axis, role.head_dim),)
    return BlockGrid(batch, reduce, axis, inner, _merged(runs))


def _segments(kind: str, size: int, head_dim: int | None) -> tuple[int, int]:
    """``(count, width)`` of the blocks of ``size`` output positions of one kind."""
    if kind in PER_HEAD and head_dim is not None:
        return size // head_dim, head_dim
    return size, 1


def _merged(runs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The same segments with neighbouring runs of equal width joined (a query's heads and the key's behind them)."""
    joined: list[tuple[int, int]] = []
    for count, width in runs:
        if joined and joined[-1][1] == width:
            count += joined.pop()[0]
        joined.append((count, width))
    return tuple(joined)


class AdamMini(ShardedOptimizer):
    """Adam-mini: AdamW with one second moment per block of parameters instead of one per element.

    State: ``exp_avg`` (fp32 per element) and ``exp_avg_sq`` (fp32 per block), 4 bytes per parameter and 4 per block:
    half of AdamW's. Use AdamW's learning rate, betas and weight decay.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it; AdamW's value.
        betas: decay of the first and second moment; AdamW's values. The official language-model runs: (0.9, 0.95).
        eps: added to the root of the bias-corrected second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        roles: what each parameter is, and so which blocks it has: the model itself, the result of `infer_roles`, or
            ``{pattern: role}``. Inside a DeepSpeed engine the model is known and patterns only override. Outside,
            without roles, names decide what they can and every other parameter has one block per output row.
        state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; ``exp_avg_sq`` is fp32
            always.

    Raises:
        ValueError: every setting out of range, all in one message; roles that match nothing or contradict shapes.
    """

    rule = Blockwise(
        summary="to halve AdamW's state, with AdamW's settings",
        memory="4, and 4 per block",
        learning_rate="1",
        checks={},
        contradictions=no_contradictions,
        betas=Betas(2, last_may_be_one=False),
        from_adam=FromAdam(adam_from_adam, always),
        batch_scaling=BatchScaling(
            "sqrt", "judgement: divided by a root mean square over each block, as Adam is element by element"
        ),
        name="adam_mini",
        update=adam_mini_update,
        scalars=adam_scalars,
        element_state=("exp_avg",),
        non_negative=(),
        block_state=("exp_avg_sq",),
        blocks=adam_mini_blocks,
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
