r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", https://arxiv.org/abs/2409.11321 (algorithm 3), as
the authors' code computes it (github.com/nikhilvyas/SOAP). For every block :math:`G` of a fixed grid over a parameter,
and every axis :math:`i`, with :math:`G_{(i)}` the block unfolded along it:

.. math::
    \text{first:}\quad & F_i = (1-\beta_2)\, G_{(i)} G_{(i)}^\top, \quad Q_i = \text{its eigenvectors},
        \quad M = V = 0, \quad W \text{ stays} \\
    \text{then } t = 1, 2, \dots:\quad & g = G \times_1 Q_1^\top \dots \times_k Q_k^\top \\
    & M \leftarrow \beta_1 M + (1-\beta_1)\, g \qquad V \leftarrow \beta_2 V + (1-\beta_2)\, g^2 \\
    & W \leftarrow (1 - \eta\lambda)\Bigl(W - \eta\,\tfrac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
        \tfrac{M}{\sqrt V + \epsilon} \times_1 Q_1 \dots \times_k Q_k\Bigr) \\
    & F_i \leftarrow \beta_2 F_i + (1-\beta_2)\, G_{(i)} G_{(i)}^\top \\
    \text{every } f\text{-th } t:\quad & \text{sort by } q^\top F_i\, q, \quad Q_i \leftarrow \mathrm{qr}(F_i Q_i),
        \quad V \text{ sorted with them}, \quad M \text{ turned from the old basis into the new one}

The official code leaves a side longer than ``max_precond_dim`` unrotated; here blocks of a grid are cut from it, as
Shampoo's are: at sizes within the grid the two agree. A block's f-th steps are its own, so that no step has all of
them.
The first basis of a block often has a null space: see `ds_optim.linalg.eigenbases`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_optim.linalg.eigenbases import first_bases, next_bases
from ds_optim.linalg.packed import unpack
from ds_optim.linalg.precision import rounding_workspace
from ds_optim.linalg.products import average_workspace, chained_stacks, rotate_along, stacked_matmul, unfolded
from ds_optim.linalg.workers import Stepwise, side_by_side
from ds_optim.optimizers.adamw import adam_from_adam, adam_rule
from ds_optim.optimizers.matrix_passes import ADAM_GRAFT, adam_graft_scalars
from ds_optim.optimizers.matrix_roles import blocks_refresh, diagonal_factors, grid_tiles, is_matrix
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
    always,
    bytes_of,
    no_contradictions,
    one_of,
    whole_number,
)
from ds_optim.sharding.assignment import Work
from ds_optim.sharding.exchange import HostCopy
from ds_optim.sharding.schedule import BUCKET_SIZE
from ds_optim.stack import are_finite, replace_
from ds_optim.stepping.sharded import ShardedOptimizer

_FIRST = 2  # the step that moves first: the one before gives the first bases
_QR_FLOPS = 10.0  # of a new basis beside its products, in units of n^3: what a QR takes, in flops of a product


def soap_from_adam(moments: AdamMoments, group: Settings) -> dict[str, Tensor]:
    """Adam goes on in the basis in which it was, until the first refresh of a block turns it."""
    averages = adam_from_adam(moments, group)
    found = {"momentum": averages["exp_avg"], "second_moment": averages["exp_avg_sq"]}
    found |= diagonal_factors(moments.second / moments.second_bias(), group["betas"][1], moments.step)
    device = moments.first.device
    for axis, size in enumerate(moments.first.shape):
        found[f"basis_{axis}"] = torch.eye(size, dtype=torch.float32, device=device)
    return {**found, "based": torch.ones((), dtype=torch.int32, device=device)}


def soap_state(settings: Settings, shape: tuple[int, ...]) -> dict[str, StateSpec]:
    """Both moments per element, in the rotated basis; per axis a factor (symmetric) and a basis, if there is one."""
    state: dict[str, StateSpec] = {
        "momentum": (shape, settings["state_dtype"]),
        "second_moment": (shape, settings["state_dtype"]),
    }
    for axis, size in enumerate(shape):
        state[f"factor_{axis}"] = PackedSymmetric(size)
        state[f"basis_{axis}"] = ((size, size), torch.float32)
    state["based"] = ((), torch.int32)
    return state


def soap_work(settings: Settings, shape: tuple[int, ...]) -> Work:
    """Statistics and both rotations take 2 numel d_i floating-point operations each, per axis."""
    numel = math.prod(shape)
    return Work(
        step_flops=6.0 * numel * sum(shape),
        refresh_flops=sum((4 + _QR_FLOPS) * size**3 + 2.0 * numel * size for size in shape),
        state_bytes=bytes_of(soap_state(settings, shape)),
    )


def soap_workspace(settings: Settings, shape: tuple[int, ...], count: int, device_type: str) -> int:
    """What the products take, or new bases: factors of all axes, one's products and their decomposition."""
    numel, largest, precision = math.prod(shape), max(shape) ** 2, settings["matmul_precision"]
    bases = blocks_refresh(settings).share(count) * (sum(size**2 for size in shape) + 2 * largest)
    average = average_workspace(shape, count, precision, device_type)
    rotation = 4 * count * (chained_stacks(len(shape)) - 1) * numel
    rotation += rounding_workspace((largest, numel), numel, count, precision, device_type)
    return max(4 * bases, 4 * count * numel + max(average, rotation))


def soap_update(group: Settings, stack: Stack) -> Stepwise[Mapping[str, Tensor]]:
    """Adam in the rotated basis, then the statistics, and new bases for the blocks whose step it is."""
    (beta1, beta2), state, axes = group["betas"], stack.state, range(len(stack.shape))
    update = max(stack.step - _FIRST + 1, 1)
    based = state["based"] > 0
    rotated = stack.grads
    for axis in axes:
        rotated = rotate_along(state[f"basis_{axis}"], rotated, axis, stack.matmul_precision)
        stack.average_gram_(state[f"factor_{axis}"], axis, beta2)
    eps = group["eps"] / math.sqrt(1 - beta2**update)
    scalars = adam_graft_scalars((beta1, beta2), update, eps)
    rotated = rotated.contiguous()
    fits = are_finite(rotated)
    stack.pass_(ADAM_GRAFT, ("momentum", "second_moment"), scalars, rotated, stack.good & based & fits)
    baseless = yield from _give_bases(stack)
    for axis in axes:
        rotated = rotate_along(state[f"basis_{axis}"], rotated, axis, stack.matmul_precision, back=True)
    stack.grads.copy_(rotated)
    del rotated  # a stack's room
    failed = yield from _refresh(group, stack, based)
    return {
        "its gradient is too large to be rotated": stack.good & ~fits,
        "no eigenvectors of its gradients' products were found": failed | baseless,
    }


def _give_bases(stack: Stack) -> Stepwise[Tensor]:
    """The first basis of every block that has none yet, of its first gradient that is not zero; (B,) flags of failures.

    Which block has such a gradient an accelerator's host knows a step late, but for the very first step: ``based`` is
    -1 meanwhile, and the basis is the next gradient's.
    """
    based, failed = stack.state["based"], torch.zeros_like(stack.good)
    is_known = stack.step < _FIRST or based.device.type == "cpu"
    flags = [0] * len(stack)
    if stack.step >= _FIRST:
        if "based" not in stack.memory:  # a resumed run looks once
            stack.memory["based"] = HostCopy(based)
        flags = stack.memory["based"].read()
        if min(flags) > 0:
            return failed
    is_new = stack.good & (based <= 0) & (stack.grads.flatten(1) != 0).any(1)
    based.masked_fill_(is_new, -1)
    wanted = HostCopy(is_new).read() if is_known else [flag < 0 for flag in flags]
    singles = [slice(index, index + 1) for index, is_wanted in enumerate(wanted) if is_wanted]
    computed = yield from side_by_side(
        side_by_side([first_bases(unfolded(stack.grads[one], axis)) for axis in range(len(stack.shape))])
        for one in singles
    )
    for one, bases in zip(singles, computed, strict=True):
        is_found = is_new[one] & torch.stack([basis.isfinite().all() for basis in bases]).all()
        for axis, basis in enumerate(bases):
            replace_(stack.state[f"basis_{axis}"][one], basis, is_found)
        based[one].masked_fill_(is_found, 1)
        failed[one] = is_new[one] & ~is_found
    stack.memory["based"] = HostCopy(based)
    return failed


def _refresh(group: Settings, stack: Stack, based: Tensor) -> Stepwise[Tensor]:
    """Turn the bases of the blocks whose step it is, and what is kept in them; flags (B,) of those that cannot be."""
    failed = torch.zeros_like(stack.good)
    which = stack.due(stack.step - _FIRST + 1, group["precondition_frequency"])
    if stack.step < _FIRST or which.start == which.stop:
        return failed
    momentum, square, good = stack.state["momentum"][which], stack.state["second_moment"][which], based & stack.good
    bases = [stack.state[f"basis_{axis}"][which] for axis in range(len(stack.shape))]
    computed = yield from side_by_side(
        next_bases(unpack(stack.state[f"factor_{axis}"][which]), old) for axis, old in enumerate(bases)
    )
    is_finite = torch.stack([new.isfinite().flatten(1).all(1) for new, _ in computed]).all(0)
    failed[which] = good[which] & ~is_finite
    good = good[which] & is_finite
    for axis, (old, (new, order)) in enumerate(zip(bases, computed, strict=True)):
        replace_(momentum, rotate_along(stacked_matmul(old.mT, new), momentum, axis), good)
        along = order.view(len(order), *(-1 if other == axis else 1 for other in range(len(stack.shape))))
        replace_(square, square.gather(axis + 1, along.expand_as(square)), good)
        replace_(old, new, good)
    return failed


class SOAP(ShardedOptimizer):
    """SOAP: Adam in Shampoo's eigenbasis; embeddings, output heads, norms, biases and vectors are stepped by Adam.

    State of a d1 x d2 block: ``momentum`` and ``second_moment`` (fp32 per element, in the rotated basis), and per axis
    ``factor`` (fp32, one triangle of d_i x d_i) and ``basis`` (fp32, d_i x d_i): 20 bytes per parameter for square
    blocks, each kept once, by its owner.

    The first step moves no matrix, as in the official code: it gives the first bases.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: learning rate, or a tensor that holds it.
        betas: decay of the two moments, and with the second that of the factors.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        max_preconditioner_dim: blocks are at most this long along every axis.
        precondition_frequency: steps from one basis of a block to its next.
        refresh: "staggered" gives every block steps of its own, so that the work of a step is even. "together" turns
            all bases in the same step, as others do.
        exchange_bucket_size, exchange_dtype, matmul_precision: see `ShardedOptimizer`; new bases are made of fp32
            products whatever the precision.
        roles: what each parameter is: the model itself, the result of `infer_roles`, or ``{pattern: role}``. Inside a
            DeepSpeed engine the model is known and patterns only override. Stacked experts and the parts of a fused
            weight never share a block.
        state_dtype, int8_embeddings, bf16_stochastic_round, seed: see `ShardedOptimizer`; the state is ``momentum``,
            ``second_moment`` and that Adam's.

    Raises:
        ValueError: every setting out of range, all in one message; roles that match nothing or contradict shapes.
    """

    rule = WholeMatrix(
        summary="when steps cost more than memory, and Shampoo's roots too much",
        memory="about 20",
        learning_rate="1 to 3 times",
        checks={
            "max_preconditioner_dim": whole_number(1),
            "precondition_frequency": whole_number(1),
            "refresh": one_of(("staggered", "together"), 'be "staggered" or "together"'),
        },
        contradictions=no_contradictions,
        betas=Betas(2, last_may_be_one=False),
        from_adam=FromAdam(soap_from_adam, always),
        batch_scaling=BatchScaling("sqrt", "judgement: Adam in another basis"),
        structure=("max_preconditioner_dim", "precondition_frequency", "refresh"),
        tiles=lambda settings, role, shape: (
            grid_tiles(role, shape, settings["max_preconditioner_dim"]) if is_matrix(role, shape) else []
        ),
        state_of_block=soap_state,
        element_state=("momentum", "second_moment"),
        non_negative=("second_moment",),
        work=soap_work,
        refresh=blocks_refresh,
        update=soap_update,
        step_size=lambda group: group["lr"] * (1 - group["lr"] * group["weight_decay"]),
        first_step=_FIRST,
        workspace=soap_workspace,
        others=adam_rule(lambda group: group),
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_preconditioner_dim: int = 1024,
        precondition_frequency: int = 10,
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
                "max_preconditioner_dim": max_preconditioner_dim,
                "precondition_frequency": precondition_frequency,
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
