r"""NorMuon: Muon whose output neurons have learning rates of their own.

Li et al., "NorMuon: Making Muon more efficient and scalable", https://arxiv.org/abs/2510.05491 (algorithm 1). Momentum
and orthogonalisation are `Muon`'s; the orthogonal :math:`O` of a matrix of A outputs and B inputs then goes on as

.. math::
    v_i &\leftarrow v_i + (1-\beta_2)\,\bigl(\operatorname{mean}_j(O_{ij}^2) - v_i\bigr)
        \quad\text{for every output neuron } i \\
    O'_{ij} &= O_{ij} / (\sqrt{v_i} + 10^{-8}), \qquad
        W \leftarrow (1 - \eta\lambda)\,W - \eta\, r\, O'\,\lVert O \rVert_F / \lVert O' \rVert_F
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_optim.linalg.products import block_norms
from ds_optim.optimizers.matrix_roles import update_matrices_
from ds_optim.optimizers.muon import (
    Muon,
    adjustment,
    iteration_flops,
    momentum_pass_,
    muon_from_adam,
    muon_state,
    orthogonalize_,
)
from ds_optim.rule import (
    AdamMoments,
    FromAdam,
    Settings,
    Stack,
    StateSpec,
    always,
    bytes_of,
    number,
)
from ds_optim.sharding.assignment import Work
from ds_optim.sharding.schedule import BUCKET_SIZE
from ds_optim.stepping.sharded import ShardedOptimizer

_EPS = 1e-8


def normuon_state(settings: Settings, shape: tuple[int, ...]) -> dict[str, StateSpec]:
    """The momentum, and a second moment for every output neuron."""
    return {**muon_state(settings, shape), "neuron_square": ((shape[1],), torch.float32)}


def normuon_from_adam(moments: AdamMoments, group: Settings) -> dict[str, Tensor]:
    """As Muon's; what the rows of orthogonal matrices will be nobody has seen yet."""
    rows = torch.zeros(moments.first.shape[1], dtype=torch.float32, device=moments.first.device)
    return {**muon_from_adam(moments, group), "neuron_square": rows}


def normuon_work(settings: Settings, shape: tuple[int, ...]) -> Work:
    """What the iteration takes."""
    return Work(step_flops=iteration_flops(settings, shape), state_bytes=bytes_of(normuon_state(settings, shape)))


def normuon_update(group: Settings, stack: Stack) -> Mapping[str, Tensor]:
    """Momentum, its orthogonalisation, neuron by neuron scaled, and its length."""
    momentum_pass_(group, stack)
    length = adjustment(group, stack.shape)
    tiny = torch.finfo(torch.float32).tiny

    def update_(matrices: Tensor, output_dim: int) -> None:
        orthogonalize_(matrices, group, stack.matmul_precision)
        before = block_norms(matrices)
        square = stack.average_(stack.state["neuron_square"], matrices.square().mean(3 - output_dim), group["beta2"])
        matrices.mul_((square.sqrt() + _EPS).reciprocal_().unsqueeze(3 - output_dim))
        matrices.mul_((before / block_norms(matrices).clamp_min_(tiny) * length).view(-1, 1, 1))

    update_matrices_(stack.grads, update_)
    return {}


class NorMuon(ShardedOptimizer):
    """NorMuon: Muon with a second moment for every output neuron; what is no matrix is stepped by Adam.

    State: ``momentum`` (4 bytes per parameter) and ``neuron_square`` (fp32, one per row) for matrices, ``exp_avg`` and
    ``exp_avg_sq`` (8 bytes) for the rest.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it. AdamW's with the default ``adjust_lr``.
        momentum, nesterov, ns_steps, ns_coefficients, adjust_lr, per_head: see `Muon`.
        beta2: decay of the second moments of neurons, in [0, 1).
        betas: of the Adam that steps what is no matrix.
        eps: of that Adam.
        weight_decay: decoupled, multiplied by the learning rate.
        roles: what each parameter is, and so whether it is a matrix, and which of its dimensions are neurons; see
            `Muon`.
        state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; the state is ``momentum`` and
            that Adam's.
        exchange_bucket_size, exchange_dtype, matmul_precision: see `ShardedOptimizer`.

    Raises:
        ValueError: every setting out of range, all in one message; roles that match nothing or contradict shapes;
            ``per_head`` where nobody knows the heads.
    """

    rule = replace(
        Muon.rule,
        summary="for Muon's tokens or fewer, neurons evened out",
        memory="4 for matrices and 4 per neuron, 8 for the rest",
        checks={**Muon.rule.checks, "beta2": number(lambda value: 0 <= value < 1, "be in [0, 1)")},
        from_adam=FromAdam(normuon_from_adam, always),
        state_of_block=normuon_state,
        work=normuon_work,
        update=normuon_update,
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: str | Sequence[float] = "quintic",
        adjust_lr: str = "match_rms_adamw",
        per_head: bool = False,
        exchange_bucket_size: int = BUCKET_SIZE,
        exchange_dtype: torch.dtype | str = torch.float32,
        matmul_precision: str = "ieee",
        roles: Any = None,
        state_dtype: torch.dtype | str = torch.float32,
        int8_embeddings: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "beta2": beta2,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
                "ns_coefficients": ns_coefficients,
                "adjust_lr": adjust_lr,
                "per_head": per_head,
            },
            roles=roles,
            state_dtype=state_dtype,
            int8_embeddings=int8_embeddings,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
            exchange_bucket_size=exchange_bucket_size,
            exchange_dtype=exchange_dtype,
            matmul_precision=matmul_precision,
        )
