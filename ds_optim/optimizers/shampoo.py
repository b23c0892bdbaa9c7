r"""Shampoo: preconditioning by Kronecker factors, with its roots amortised and its step length grafted from Adam.

Gupta, Koren & Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", https://arxiv.org/abs/1802.09568
(algorithms 1 and 2), with what made it train large models: Anil et al., "Scalable Second Order Optimization for Deep
Learning", https://arxiv.org/abs/2002.09018, and Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the
Distributed Shampoo Optimizer", https://arxiv.org/abs/2309.06497. For every block :math:`G` of order :math:`k` (2 for a
matrix) of a fixed grid over a parameter, and every axis :math:`i`:

.. math::
    F_i &\leftarrow \beta_2 F_i + (1-\beta_2)\, G_{(i)} G_{(i)}^\top \qquad (\beta_2 = 1: \text{the sum}) \\
    M &\leftarrow \beta_1 M + (1-\beta_1)\, G \qquad V \leftarrow \beta_{2g} V + (1-\beta_{2g})\, G^2 \\
    X_i &\leftarrow \bigl(\hat F_i + \epsilon\,\lambda_{\max} I\bigr)^{-1/(2k)} \quad\text{every } f \text{ steps} \\
    U &= \hat M \times_1 X_1 \times_2 \dots \times_k X_k, \qquad
    U_g = \hat M / (\sqrt{\hat V} + \epsilon_g) \\
    W &\leftarrow (1 - \eta\lambda)\,W - \eta\, U\,\lVert U_g\rVert / \lVert U\rVert

:math:`G_{(i)}` is the block unfolded along its axis :math:`i`; hats are bias-corrected. A block's :math:`f`-th steps
are its own, so that no step has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_optim.linalg.inverse_roots import Method, inverse_roots_stepwise, method_for, roots_workspace
from ds_optim.linalg.packed import pack, unpack
from ds_optim.linalg.products import block_norms, products_workspace
from ds_optim.linalg.workers import Stepwise, side_by_side
from ds_optim.optimizers.adamw import adam_from_adam, adam_rule
from ds_optim.optimizers.matrix_passes import ADAM_GRAFT, MOMENTUM, adam_graft_scalars, momentum_scalars
from ds_optim.optimizers.matrix_roles import blocks_refresh, diagonal_factors, grid_tiles
from ds_optim.rule import (
    AdamMoments,
    BatchScaling,
    Betas,
    FromAdam,
    PackedSymmetric,
    Settings,
    Stack,
    StateSpec,
    WholeMatrix,
    bytes_of,
    kept_whole,
    number,
    one_of,
    whole_number,
)
from ds_optim.sharding.assignment import Work
from ds_optim.sharding.exchange import HostCopy
from ds_optim.sharding.schedule import BUCKET_SIZE
from ds_optim.stack import replace_
from ds_optim.stepping.sharded import ShardedOptimizer

TOLERATED_FAILURES = 3  # root computations of one block in a row, the last root kept, before all ranks are told
_PARTS = 8  # of a stack: the iteration's workspace is seven times what it works on
_ROOT_FLOPS = 20.0  # of a root, in units of n^3: what an eigendecomposition takes, in flops of a matrix product


def _graft_beta2(group: Settings) -> float:
    """Decay of the second moment of the graft and of the Adam that steps what is no matrix."""
    if group["graft_beta2"] is not None:
        return float(group["graft_beta2"])
    return float(group["betas"][1]) if group["betas"][1] < 1 else 0.999


def _frequency(settings: Settings) -> int:
    return int(settings["precondition_frequency"])


def _roots_of(settings: Settings, axes: int, device: torch.device) -> tuple[float, Method]:
    """The exponent of every axis's root, and how it is taken."""
    exponent, method = float(settings["exponent"] or -0.5 / axes), method_for(device)
    return exponent, "eigh" if method == "newton" and not (-1 / exponent).is_integer() else method


def _start(settings: Settings) -> int:
    """The first step at which roots may be taken."""
    stated = settings["start_preconditioning_step"]
    if stated is not None:
        return int(stated)
    return _frequency(settings) if settings["graft"] else 1


def _contradictions(settings: Settings) -> list[str]:
    needed = ("ridge", "max_preconditioner_dim", "precondition_frequency", "refresh")
    problems = [f"{key} must be given" for key in needed if key in settings and settings[key] is None]
    start = settings.get("start_preconditioning_step")
    if "graft" in settings and settings["graft"] is None and isinstance(start, int) and start > 1:
        problems.append(
            f"without a graft there is no step to take before start_preconditioning_step {start}: make it 1, or "
            'graft "adam"'
        )
    return problems


def _start_from_adam(moments: AdamMoments, group: Settings) -> dict[str, Tensor]:
    """Momentum and graft go on, factors start as the diagonals that the gradient's mean square implies.

    No block has a root before its first refresh.
    """
    averages = adam_from_adam(moments, _grafts_adam(group))
    known = {"momentum": averages["exp_avg"], "graft": averages["exp_avg_sq"]}
    known |= diagonal_factors(moments.second / moments.second_bias(), group["betas"][1], moments.step)
    spec = shampoo_state({**group, "state_dtype": torch.float32}, tuple(moments.first.shape))
    device = moments.first.device
    rest = {key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in spec.items()}
    return {**rest, **known}


def _needs_a_graft(settings: Settings) -> str:
    if settings["graft"]:
        return ""
    return 'Shampoo without a graft has no AdamW step to go on with: use graft "adam", or start cold'


def _grafts_adam(group: Settings) -> Settings:
    """The settings of the Adam of the graft, which also steps what is no matrix."""
    return {**group, "betas": (group["betas"][0], _graft_beta2(group))}


def shampoo_state(settings: Settings, shape: tuple[int, ...]) -> dict[str, StateSpec]:
    """Averages of gradients and squares per element, a factor and its root per axis (symmetric), and three counts."""
    state_dtype = settings["state_dtype"]
    state: dict[str, StateSpec] = {"momentum": (shape, state_dtype)}
    if settings["graft"]:
        state["graft"] = (shape, state_dtype)
    for axis, size in enumerate(shape):
        state[f"factor_{axis}"] = state[f"root_{axis}"] = PackedSymmetric(size)
    state["rooted"] = ((), torch.int32)  # 1 from the first root on; until then the block takes its graft's step
    state["failures"] = ((), torch.int32)  # root computations in a row that failed
    state["waiting"] = ((), torch.int32)  # 1 if the root is to be decomposed in the next step
    return state


def shampoo_work(settings: Settings, shape: tuple[int, ...]) -> Work:
    """Statistics and application take 2 numel d_i floating-point operations each, per axis."""
    spec = shampoo_state(settings, shape)
    return Work(
        step_flops=4.0 * math.prod(shape) * sum(shape),
        refresh_flops=_ROOT_FLOPS * sum(size**3 for size in shape),
        state_bytes=bytes_of(spec),
        balanced_bytes=bytes_of(kept_whole(spec)),
    )


def shampoo_workspace(settings: Settings, shape: tuple[int, ...], count: int, device_type: str) -> int:
    """What the products take, or the roots of the blocks that are due."""
    _, method = _roots_of(settings, len(shape), torch.device(device_type))
    due = blocks_refresh(settings).share(count)
    if method == "newton":
        due = min(due, -(-count // _PARTS))
    orders = {size: due * shape.count(size) for size in shape}
    precision = settings["matmul_precision"]
    products = products_workspace(shape, count, precision, device_type)
    return max(products, roots_workspace(orders, method, precision))


def shampoo_update(group: Settings, stack: Stack) -> Stepwise[Mapping[str, Tensor]]:
    """Advance averages and factors, take the roots whose step it is, and precondition the momentum."""
    beta1, beta2 = group["betas"]
    state, step, axes = stack.state, stack.step, range(len(stack.shape))
    for axis in axes:
        stack.average_gram_(state[f"factor_{axis}"], axis, beta2)
    bias1 = 1 - beta1**step
    if group["graft"]:
        scalars = adam_graft_scalars((beta1, _graft_beta2(group)), step, group["eps"])
        stack.pass_(ADAM_GRAFT, ("momentum", "graft"), scalars)
        direction = state["momentum"]  # its bias is nothing to what is grafted
    else:
        direction = stack.pass_(MOMENTUM, ("momentum",), momentum_scalars(beta1, 1 / bias1, 0.0))
    failed = yield from _refresh(group, stack)
    if step < _start(group):
        return {}
    for axis in axes:
        direction = stack.applied(state[f"root_{axis}"], direction, axis)
    if group["graft"]:
        lengths = block_norms(stack.grads) / (block_norms(direction) + 1e-16 * bias1)
        replace_(stack.grads, direction, state["rooted"] > 0, lengths)
    else:
        stack.grads.copy_(direction)
    return {f"{TOLERATED_FAILURES} root computations in a row failed": failed}


def _refresh(group: Settings, stack: Stack) -> Stepwise[Tensor]:
    """Take the roots of the blocks whose step it is; flags (B,) of those that failed once too often.

    What an accelerator's iteration could not do is decomposed in fp64 in the next step, block by block: only then
    is it known on the host, without waiting.
    """
    exponent, method = _roots_of(group, len(stack.shape), stack.grads.device)
    flags = torch.zeros_like(stack.good)
    due, waiting = _due(group, stack), stack.state["waiting"]
    if method == "newton":
        last = stack.memory.get("waiting") or HostCopy(waiting)  # a fresh or resumed run looks once
        for index in [index for index, is_waiting in enumerate(last.read()) if is_waiting]:
            single = slice(index, index + 1)
            flags[single] = _count(stack, single, (yield from _take_roots(group, stack, single, exponent, "eigh")))
            waiting[single] = 0
    if due.start < due.stop:
        most = -(-len(stack) // _PARTS) if method == "newton" else len(stack)
        for first in range(due.start, due.stop, most):
            part = slice(first, min(first + most, due.stop))
            failed = yield from _take_roots(group, stack, part, exponent, method)
            if method == "newton":
                stack.state["failures"][part] *= failed  # a root that was found ends the row of failures
                waiting[part] = failed.to(waiting.dtype)
            else:
                flags[part] = _count(stack, part, failed)
    if method == "newton":
        stack.memory["waiting"] = HostCopy(waiting)
    return flags


def _due(group: Settings, stack: Stack) -> slice:
    """The blocks whose roots are taken in this step."""
    if stack.step < _start(group):
        return slice(0, 0)
    if stack.step == _start(group) and not (group["refresh"] == "staggered" and group["graft"]):
        return slice(0, len(stack))  # without a graft every block needs a root from the start
    return stack.due(stack.step, _frequency(group))


def _take_roots(group: Settings, stack: Stack, which: slice, exponent: float, method: Method) -> Stepwise[Tensor]:
    """New roots of some of a stack's blocks along all axes; (n,) flags of the blocks that keep their last ones."""
    beta2, relative = group["betas"][1], group["ridge"] == "relative"
    correction = 1.0 if beta2 == 1 else 1 - beta2**stack.step
    eps = group["matrix_eps"] or (1e-6 if relative else 1e-12)
    failed = torch.zeros_like(stack.good[which])
    found: dict[int, Tensor] = {}
    of_size = {size: [axis for axis, its in enumerate(stack.shape) if its == size] for size in stack.shape}
    computed = yield from side_by_side(
        inverse_roots_stepwise(
            unpack(torch.cat([stack.state[f"factor_{axis}"][which] for axis in axes]).div_(correction)),
            exponent,
            eps=eps,
            relative=relative,
            method=method,
            precision=stack.matmul_precision,
        )
        for axes in of_size.values()  # axes of one length share a stack
    )
    for axes, (roots, failed_here) in zip(of_size.values(), computed, strict=True):
        failed = failed | failed_here.view(len(axes), -1).any(0)
        found.update(zip(axes, roots.chunk(len(axes)), strict=True))
    for axis, roots in found.items():
        replace_(stack.state[f"root_{axis}"][which], pack(roots), ~failed)
    stack.state["rooted"][which] |= (~failed).to(torch.int32)
    return failed


def _count(stack: Stack, which: slice, failed: Tensor) -> Tensor:
    """Count failures in a row; (n,) flags of the blocks that reached what is tolerated."""
    failures = stack.state["failures"][which]
    failures.add_(1).mul_(failed)
    return failures >= TOLERATED_FAILURES


class Shampoo(ShardedOptimizer):
    """Shampoo with Adam's step length; embeddings, output heads, norms and biases are stepped by Adam itself.

    State of a d1 x d2 block: ``momentum`` and ``graft`` (fp32 per element), and per axis ``factor`` and ``root``
    (fp32, one triangle of d_i x d_i): 16 bytes per parameter for square blocks, each kept once, by its owner.

    The paper's algorithm is ``betas=(0, 1), graft=None, precondition_frequency=1, ridge="absolute"``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it. With the Adam graft AdamW's value.
        betas: decay of the momentum (0 for none) and of the factors; 1 accumulates them for ever, as in the paper.
        eps: added to the root of the second moment, in the Adam graft and in the Adam for what is no matrix.
        weight_decay: decoupled, multiplied by the learning rate.
        matrix_eps: ridge before a root is taken. Unset: 1e-6 if relative, 1e-12 if absolute.
        ridge: "relative" to a factor's largest eigenvalue, or "absolute".
        max_preconditioner_dim: blocks are at most this long along every axis.
        precondition_frequency: steps from one root of a block to its next.
        start_preconditioning_step: before it every block takes its graft's step. Unset: ``precondition_frequency``, or
            1 without a graft, which needs a root from the start.
        graft: "adam", or None for the preconditioned momentum as it is. Without it a block whose gradient is zero in
            the first step has the root of the ridge alone until its next refresh: refresh in every step, as the paper.
        graft_beta2: decay of the second moment of the graft and of that Adam. Unset: ``betas[1]``, or 0.999 if that
            is 1.
        exponent: of every axis's factor. Unset: -1/(2 k) for blocks with k axes.
        refresh: "staggered" gives every block steps of its own, so that the work of a step is even. "together" takes
            all roots in the same step, as others do.
        exchange_bucket_size, exchange_dtype, matmul_precision: see `ShardedOptimizer`.
        roles: what each parameter is: the model itself, the result of `infer_roles`, or ``{pattern: role}``. Inside a
            DeepSpeed engine the model is known and patterns only override. Stacked experts and the parts of a fused
            weight never share a block.
        state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; the state is
            ``momentum``, ``graft`` and that Adam's.

    Raises:
        ValueError: every setting out of range, all in one message; roles that match nothing or contradict shapes.
    """

    rule = WholeMatrix(
        summary="when steps cost more than memory",
        memory="about 16",
        learning_rate="1",
        checks={
            "matrix_eps": number(lambda value: 0 < value < math.inf, "be a finite number > 0", is_optional=True),
            "ridge": one_of(("relative", "absolute"), 'be "relative" or "absolute"', is_optional=True),
            "max_preconditioner_dim": whole_number(1, is_optional=True),
            "precondition_frequency": whole_number(1, is_optional=True),
            "start_preconditioning_step": whole_number(1, is_optional=True),
            "graft": one_of(("adam",), 'be "adam" or null', is_optional=True),
            "graft_beta2": number(lambda value: 0 <= value < 1, "be in [0, 1)", is_optional=True),
            "exponent": number(lambda value: -1 <= value < 0, "be in [-1, 0)", is_optional=True),
            "refresh": one_of(("staggered", "together"), 'be "staggered" or "together"', is_optional=True),
        },
        contradictions=_contradictions,
        betas=Betas(2, last_may_be_one=True),
        from_adam=FromAdam(_start_from_adam, _needs_a_graft),
        batch_scaling=BatchScaling(
            "sqrt", "judgement: the direction is whitened and the default graft gives it Adam's length"
        ),
        structure=(
            "max_preconditioner_dim",
            "precondition_frequency",
            "start_preconditioning_step",
            "graft",
            "refresh",
        ),
        tiles=lambda settings, role, shape: grid_tiles(role, shape, settings["max_preconditioner_dim"]),
        state_of_block=shampoo_state,
        element_state=("momentum", "graft"),
        non_negative=("graft",),
        work=shampoo_work,
        refresh=blocks_refresh,
        update=shampoo_update,
        step_size=lambda group: group["lr"],
        first_step=1,
        workspace=shampoo_workspace,
        others=adam_rule(_grafts_adam),
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        matrix_eps: float | None = None,
        ridge: str = "relative",
        max_preconditioner_dim: int = 1024,
        precondition_frequency: int = 10,
        start_preconditioning_step: int | None = None,
        graft: str | None = "adam",
        graft_beta2: float | None = None,
        exponent: float | None = None,
        refresh: str = "staggered",
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
                "matrix_eps": matrix_eps,
                "ridge": ridge,
                "max_preconditioner_dim": max_preconditioner_dim,
                "precondition_frequency": precondition_frequency,
                "start_preconditioning_step": start_preconditioning_step,
                "graft": graft,
                "graft_beta2": graft_beta2,
                "exponent": exponent,
                "refresh": refresh,
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
