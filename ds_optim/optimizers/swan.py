r"""SWAN: stochastic gradients, normalized and whitened, without state for matrices.

Ma et al., "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training",
https://arxiv.org/abs/2412.13148 (algorithm 1; the operators as its authors restate them in later work). There is no
official code. For the gradient :math:`G` of a matrix:

.. math::
    \tilde G &= \frac{G - \operatorname{mean}(G)}{\operatorname{std}(G)}
        \quad\text{(GradNorm: of every neuron over its inputs, or of every input over the neurons)} \\
    X_0 &= \tilde G / \lVert \tilde G \rVert_F, \qquad X \leftarrow \beta\,(3X - X X^\top X)
        \quad k \text{ times} \quad\text{(GradWhitening: } (\tilde G\tilde G^\top)^{-1/2}\tilde G\text{)} \\
    W &\leftarrow (1 - \eta\lambda)\,W - \eta\,\alpha\,\frac{\lVert \tilde G \rVert_F}{\lVert X \rVert_F}\,X

so that an update has a root mean square of one. The default :math:`\beta = 0.8` does not converge to the polar factor:
singular values end between 0.56 and 1.6, and small ones grow fast. 0.5 converges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_optim.linalg.polar import cubic, newton_schulz, polynomial_flops
from ds_optim.linalg.precision import MatmulPrecision
from ds_optim.linalg.products import block_norms
from ds_optim.optimizers.adamw import adam_rule
from ds_optim.optimizers.matrix_roles import iteration_workspace, matrix_tiles, sides, update_matrices_
from ds_optim.rule import (
    AdamMoments,
    BatchScaling,
    Betas,
    FromAdam,
    Refresh,
    Settings,
    Stack,
    StateSpec,
    WholeMatrix,
    always,
    no_contradictions,
    number,
    one_of,
    whole_number,
)
from ds_optim.sharding.assignment import Work
from ds_optim.sharding.schedule import BUCKET_SIZE
from ds_optim.stepping.sharded import ShardedOptimizer

NORM_AXES = ("in", "out", "long")
_DEAD = 1e-6  # a deviation below this part of the largest one, or of its own mean, is rounding


def grad_norm_(grads: Tensor, dim: int) -> Tensor:
    """GradNorm, in place: subtract the mean along ``dim`` and divide by the (population) standard deviation.

    Scale-invariant down to the smallest gradients: everything is divided by the largest element first, so that no
    epsilon is needed. Rows without deviation become zero.

    Args:
        grads: (B, m, n) fp32, finite.
        dim: 1 or 2.
    """
    grads.div_(grads.abs().amax((1, 2), keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny))
    mean = grads.mean(dim, keepdim=True)
    deviation = grads.sub_(mean).square().mean(dim, keepdim=True).sqrt_()
    alive = deviation > _DEAD * torch.maximum(mean.abs_(), deviation.amax((1, 2), keepdim=True))
    return grads.mul_(torch.where(alive, deviation.reciprocal(), 0))


def swan_update_(grads: Tensor, dim: int, *, steps: int, beta: float, precision: MatmulPrecision = "ieee") -> Tensor:
    """GradNorm along ``dim``, GradWhitening and rescaling of a stack of matrices, in place.

    Args:
        grads: (B, m, n) fp32, finite; zero matrices stay zero.
        dim: 1 or 2, along which GradNorm takes its statistics.
        steps: of the Newton-Schulz iteration.
        beta: its step, 0.8 in SWAN; 0.5 converges.
        precision: of its products.
    """
    grad_norm_(grads, dim)
    length = block_norms(grads).view(-1, 1, 1)
    wide = grads.mT if grads.shape[1] > grads.shape[2] else grads
    wide /= length.clamp_min(1)  # a norm is 0, or about the root of the elements
    whitened = newton_schulz(wide, steps, beta, precision)
    scale = length / block_norms(whitened).clamp_min_(torch.finfo(torch.float32).tiny).view(-1, 1, 1)
    torch.mul(whitened, scale, out=wide)
    return grads


def no_state(settings: Settings, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
    """Nothing is kept for a matrix."""
    return {}


def nothing_from_adam(moments: AdamMoments, group: Settings) -> Mapping[str, Tensor]:
    """A matrix has no state to start; the rest goes on with its Adam."""
    return {}


def swan_work(settings: Settings, shape: tuple[int, ...]) -> Work:
    """What Newton-Schulz takes."""
    steps = cubic(settings["ns_beta"], settings["ns_steps"])
    return Work(step_flops=polynomial_flops(*sides(shape), steps, settings["matmul_precision"]))


def swan_workspace(settings: Settings, shape: tuple[int, ...], count: int, device_type: str) -> int:
    """What Newton-Schulz takes."""
    steps = cubic(settings["ns_beta"], settings["ns_steps"])
    return iteration_workspace(shape, count, steps, settings["matmul_precision"], device_type)


def swan_update(group: Settings, stack: Stack) -> Mapping[str, Tensor]:
    """GradNorm, GradWhitening and rescaling of a stack of matrices, whichever way they lie."""
    before, outputs, behind = stack.shape  # outputs, with inputs on either side
    inputs = before * behind
    wanted = group["norm_axis"]
    over_inputs = wanted == "in" or (wanted == "long" and inputs >= outputs)
    if min(inputs, outputs) == 1:  # a fused part of one row: there is no deviation along the other axis
        over_inputs = inputs > 1

    def update_(matrices: Tensor, output_dim: int) -> None:
        dim = 3 - output_dim if over_inputs else output_dim
        precision = stack.matmul_precision
        swan_update_(matrices, dim, steps=group["ns_steps"], beta=group["ns_beta"], precision=precision)

    update_matrices_(stack.grads, update_)
    return {}


class SWAN(ShardedOptimizer):
    """SWAN: no state at all for matrices; embeddings, output heads, norms and biases are stepped by Adam.

    State: none for matrices, ``exp_avg`` and ``exp_avg_sq`` (8 bytes per parameter) for the rest. An update has a root
    mean square of ``alpha``, about what Adam's has, so that one learning rate serves both.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it. 1 to 6 times AdamW's.
        betas: of the Adam that steps what is no matrix.
        eps: of that Adam.
        weight_decay: decoupled, multiplied by the learning rate. Published runs use none.
        roles: what each parameter is, and so whether it is a matrix: the model itself, the result of `infer_roles`, or
            ``{pattern: role}``. Inside a DeepSpeed engine the model is known and patterns only override. Stacked
            experts and the parts of a fused weight are whitened one by one.
        state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; the state is that Adam's.
        alpha: multiplies the updates of matrices.
        ns_steps: Newton-Schulz steps, at 4 s^2 l floating-point operations each for a matrix of sides s <= l.
        ns_beta: their step size; see the module.
        norm_axis: what GradNorm takes its statistics over: "in" a neuron's inputs, "out" the neurons of an input,
            "long" whichever are more. The paper leaves it open for a transposed weight; the default is the one that
            trained best here (docs/optimizers/swan.md).
        exchange_bucket_size, exchange_dtype, matmul_precision: see `ShardedOptimizer`.

    Raises:
        ValueError: every setting out of range, all in one message; roles that match nothing or contradict shapes.
    """

    rule = WholeMatrix(
        summary="for the fewest tokens without state, with batches that hide its products",
        memory="0 for matrices, 8 for the rest",
        learning_rate="1 to 6 times",
        checks={
            "alpha": number(lambda value: 0 <= value < math.inf, "be a finite number >= 0"),
            "ns_steps": whole_number(1),
            "ns_beta": number(lambda value: 0 < value < 1, "lie in (0, 1)"),
            "norm_axis": one_of(NORM_AXES),
        },
        contradictions=no_contradictions,
        betas=Betas(2, last_may_be_one=False),
        from_adam=FromAdam(nothing_from_adam, always),
        batch_scaling=BatchScaling(
            "sqrt", "judgement: whitened, of fixed length: a sign of the whole matrix; the rest is Adam"
        ),
        structure=("norm_axis",),
        tiles=lambda settings, role, shape: matrix_tiles(role, shape),
        state_of_block=no_state,
        element_state=(),
        non_negative=(),
        work=swan_work,
        refresh=lambda settings: Refresh(1, is_staggered=False),
        update=swan_update,
        step_size=lambda group: group["lr"] * group["alpha"],
        first_step=1,
        workspace=swan_workspace,
        others=adam_rule(lambda group: group),
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        alpha: float = 1.0,
        ns_steps: int = 10,
        ns_beta: float = 0.8,
        norm_axis: str = "in",
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
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "alpha": alpha,
                "ns_steps": ns_steps,
                "ns_beta": ns_beta,
                "norm_axis": norm_axis,
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
