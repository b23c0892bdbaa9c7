r"""Muon: the momentum of a matrix, orthogonalised.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon/
(2024), with the step length of Liu et al., "Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982
(section 2.2). For the gradient :math:`G` of a matrix of A outputs and B inputs:

.. math::
    M &\leftarrow M + (1-\mu)(G - M) \qquad U = G + \mu\,(M - G) \quad\text{(Nesterov), or } M \\
    X &\leftarrow U / \max(\lVert U \rVert_F, 10^{-7}), \qquad X \leftarrow a X + (b S + c S^2) X,\; S = X X^\top
        \quad\text{five times} \\
    W &\leftarrow (1 - \eta\lambda)\,W - \eta\, r\, X, \qquad
        r = 0.2\sqrt{\max(A, B)} \;\text{ or }\; \sqrt{\max(1, A/B)}

The first r ("match_rms_adamw") gives updates the root mean square that AdamW's have, so that its learning rate and
decay carry over, and one learning rate serves the Adam of what is no matrix as well; it is the default. The second
("original") is Jordan's, torch's and DeepSpeed's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ds_optim.linalg.polar import (
    CONVERGENT,
    POLAR_EXPRESS,
    QUINTIC,
    Coefficients,
    polynomial_flops,
    polynomial_steps,
)
from ds_optim.linalg.precision import MatmulPrecision
from ds_optim.linalg.products import block_norms
from ds_optim.optimizers.adamw import adam_rule
from ds_optim.optimizers.matrix_passes import MOMENTUM, momentum_scalars
from ds_optim.optimizers.matrix_roles import iteration_workspace, matrix_tiles, sides, update_matrices_
from ds_optim.rule import (
    AdamMoments,
    BatchScaling,
    Betas,
    FromAdam,
    Refresh,
    SettingCheck,
    Settings,
    Stack,
    StateSpec,
    WholeMatrix,
    always,
    bytes_of,
    flag,
    no_contradictions,
    number,
    one_of,
    whole_number,
)
from ds_optim.sharding.assignment import Work
from ds_optim.sharding.schedule import BUCKET_SIZE
from ds_optim.stepping.sharded import ShardedOptimizer

ADJUSTMENTS = ("match_rms_adamw", "original")
_EPS = 1e-7  # a norm below it is taken for it
_EXPRESS_MARGIN = 1.02  # Polar Express wants norms a little below one


def _are_coefficients(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("quintic", "polar_express")
    if not isinstance(value, Sequence):
        return False
    return len(value) == 3 and all(isinstance(one, Real) and math.isfinite(one) for one in value)


CHECKS: Mapping[str, SettingCheck] = {
    "momentum": number(lambda value: 0 <= value < 1, "be in [0, 1)"),
    "nesterov": flag(),
    "ns_steps": whole_number(1),
    "ns_coefficients": SettingCheck(
        _are_coefficients, 'be "quintic", "polar_express" or three numbers a, b, c', is_optional=False
    ),
    "adjust_lr": one_of(ADJUSTMENTS),
    "per_head": flag(),
}
"""Of what Muon and NorMuon have in common."""


def coefficients(group: Settings) -> list[Coefficients]:
    """Of the iteration, step by step."""
    steps, stated = int(group["ns_steps"]), group["ns_coefficients"]
    if stated == "polar_express":
        return [*POLAR_EXPRESS, *[CONVERGENT] * steps][:steps]
    a, b, c = QUINTIC if stated == "quintic" else (float(one) for one in stated)
    return [(a, b, c)] * steps


def orthogonalize_(matrices: Tensor, group: Settings, precision: MatmulPrecision = "ieee") -> Tensor:
    """A stack of matrices, each brought near its orthogonal polar factor, in place.

    Args:
        matrices: (B, m, n) fp32, finite; zero stays zero.
        group: settings, of which ``ns_steps`` and ``ns_coefficients`` count.
        precision: of the products.
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    # Divided by the largest element first: squares of large or small ones would not be numbers.
    peak = matrices.abs().amax((1, 2), keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    wide /= peak
    norm = torch.maximum(block_norms(wide).view(-1, 1, 1), _EPS / peak)
    wide /= norm * _EXPRESS_MARGIN if group["ns_coefficients"] == "polar_express" else norm
    wide.copy_(polynomial_steps(wide, coefficients(group), precision))
    return matrices


def adjustment(group: Settings, shape: tuple[int, ...]) -> float:
    """What an orthogonal matrix is multiplied by, for a block (inputs before, outputs, inputs behind)."""
    before, outputs, behind = shape
    inputs = before * behind
    if group["adjust_lr"] == "original":
        return math.sqrt(max(1.0, outputs / inputs))
    return 0.2 * math.sqrt(max(outputs, inputs))


def momentum_pass_(group: Settings, stack: Stack) -> None:
    """Advance the momentum, and turn gradients into what is to be orthogonalised."""
    decay = group["momentum"]
    ahead = (decay, 1 - decay) if group["nesterov"] else (1.0, 0.0)
    stack.pass_(MOMENTUM, ("momentum",), momentum_scalars(decay, *ahead))


def muon_state(settings: Settings, shape: tuple[int, ...]) -> dict[str, StateSpec]:
    """The momentum."""
    return {"momentum": (shape, settings["state_dtype"])}


def muon_from_adam(moments: AdamMoments, group: Settings) -> dict[str, Tensor]:
    """The momentum goes on; what is no matrix keeps its Adam."""
    return {"momentum": moments.first_as(group["momentum"])}


def iteration_flops(settings: Settings, shape: tuple[int, ...]) -> float:
    """Of a step on one block."""
    return polynomial_flops(*sides(shape), coefficients(settings), settings["matmul_precision"])


def muon_work(settings: Settings, shape: tuple[int, ...]) -> Work:
    """What the iteration takes."""
    return Work(step_flops=iteration_flops(settings, shape), state_bytes=bytes_of(muon_state(settings, shape)))


def muon_workspace(settings: Settings, shape: tuple[int, ...], count: int, device_type: str) -> int:
    """What the iteration takes."""
    return iteration_workspace(shape, count, coefficients(settings), settings["matmul_precision"], device_type)


def muon_update(group: Settings, stack: Stack) -> Mapping[str, Tensor]:
    """Momentum, its orthogonalisation, and its length."""
    momentum_pass_(group, stack)
    update_matrices_(stack.grads, lambda matrices, _: orthogonalize_(matrices, group, stack.matmul_precision))
    stack.grads.mul_(adjustment(group, stack.shape))
    return {}


class Muon(ShardedOptimizer):
    """Muon: orthogonalised momentum; embeddings, output heads, norms and biases are stepped by Adam.

    State: ``momentum`` (4 bytes per parameter) for matrices, ``exp_avg`` and ``exp_avg_sq`` (8 bytes) for the rest.
    Gradients are clipped where DeepSpeed clips them, before the momentum, at every ZeRO stage.

    In a DeepSpeed JSON it is ``"ds_optim.Muon"``: DeepSpeed keeps ``"Muon"`` for its own.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it. AdamW's with the default ``adjust_lr``.
        momentum: decay of the average of gradients, in [0, 1).
        betas: of the Adam that steps what is no matrix.
        eps: of that Adam.
        weight_decay: decoupled, multiplied by the learning rate.
        nesterov: whether the newest gradient counts once more.
        ns_steps: steps of the iteration, at 4 s^2 l + 2 s^3 floating-point operations for sides s <= l at most.
        ns_coefficients: "quintic", "polar_express" (closer to the polar factor at the same cost, and with more than
            five steps as close as asked), or a, b, c of every step; see `ds_optim.linalg.polar`.
        adjust_lr: "match_rms_adamw" or "original", see the module.
        per_head: whether every attention head of queries, keys and values is orthogonalised by itself.
        roles: what each parameter is, and so whether it is a matrix: the model itself, the result of `infer_roles`, or
            ``{pattern: role}``. Inside a DeepSpeed engine the model is known and patterns only override. Stacked
            experts and the parts of a fused weight are orthogonalised one by one.
        state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; the state is ``momentum`` and
            that Adam's.
        exchange_bucket_size, exchange_dtype, matmul_precision: see `ShardedOptimizer`. Others run the iteration in
            "bf16", whose results differ by about 1e-2.

    Raises:
        ValueError: every setting out of range, all in one message; roles that match nothing or contradict shapes;
            ``per_head`` where nobody knows the heads.
    """

    rule = WholeMatrix(
        summary="for fewer tokens with half of AdamW's state",
        memory="4 for matrices, 8 for the rest",
        learning_rate="1",
        checks=CHECKS,
        contradictions=no_contradictions,
        betas=Betas(2, last_may_be_one=False),
        from_adam=FromAdam(muon_from_adam, always),
        batch_scaling=BatchScaling(
            "sqrt", "judgement: orthogonalised, of fixed length: a sign of the whole matrix; the rest is Adam"
        ),
        structure=("per_head",),
        tiles=lambda settings, role, shape: matrix_tiles(role, shape, settings["per_head"]),
        state_of_block=muon_state,
        element_state=("momentum",),
        non_negative=(),
        work=muon_work,
        refresh=lambda settings: Refresh(1, is_staggered=False),
        update=muon_update,
        step_size=lambda group: group["lr"],
        first_step=1,
        workspace=muon_workspace,
        others=adam_rule(lambda group: group),
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
