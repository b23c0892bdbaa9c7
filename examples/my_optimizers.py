"""Two optimizers that ds_optim does not have: one elementwise, one of whole matrices. docs/add_an_optimizer.md."""

import math
from typing import Any

import torch

from ds_optim.linalg.polar import cubic, newton_schulz, polynomial_workspace
from ds_optim.linalg.products import block_norms
from ds_optim.optimizers.adamw import adam_rule
from ds_optim.optimizers.matrix_roles import is_matrix, true_matrices
from ds_optim.optimizers.registry import register
from ds_optim.rule import (
    BatchScaling,
    Betas,
    Elementwise,
    FromAdam,
    Refresh,
    WholeMatrix,
    always,
    bytes_of,
    no_contradictions,
    whole_number,
)
from ds_optim.sharding.assignment import Tile, Work
from ds_optim.sharding.schedule import BUCKET_SIZE
from ds_optim.stepping.sharded import ShardedOptimizer

# Signum (https://arxiv.org/abs/1802.04434, algorithm 2): every element by itself.


def signum_update(param, grad, exp_avg, *, decay, beta, one_minus_beta, lr):
    """The formula, on fp32 tensors of any shape: returns the new parameter and state."""
    exp_avg = exp_avg * beta + grad * one_minus_beta
    return param * decay - lr * exp_avg.sign(), exp_avg


def signum_scalars(group, step):
    """The formula's constants at a step (from 1); numbers, or tensors where lr is one."""
    lr, (beta,) = group["lr"], group["betas"]
    return {"decay": 1 - lr * group["weight_decay"], "beta": beta, "one_minus_beta": 1 - beta, "lr": lr}


@register
class Signum(ShardedOptimizer):
    """Signum: the sign of a momentum. State: ``exp_avg``, 4 bytes per parameter."""

    rule = Elementwise(
        summary="to show how a rule is added",
        memory="4",
        learning_rate="3 to 10 times smaller",
        checks={},
        contradictions=no_contradictions,
        betas=Betas(1, last_may_be_one=False),
        from_adam=FromAdam(lambda moments, group: {"exp_avg": moments.first_as(group["betas"][0])}, always),
        batch_scaling=BatchScaling("sqrt", "judgement: as Lion"),
        name="signum",
        update=signum_update,
        scalars=signum_scalars,
        element_state=("exp_avg",),
        non_negative=(),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float] = (0.9,),
        weight_decay: float = 0.0,
        *,
        roles: Any = None,
        state_dtype: Any = torch.float32,
        int8_embeddings: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            roles=roles,
            state_dtype=state_dtype,
            int8_embeddings=int8_embeddings,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
        )


# Spectral descent: the polar factor of a matrix's momentum; what is no matrix is stepped by Adam.


def spectral_tiles(settings, role, shape):
    """Every true matrix (an expert, a part of a fused weight) is a block; rows are outputs of a `nn.Linear`."""
    boxes = true_matrices(role, shape) if is_matrix(role, shape) else []
    return [Tile(box, (math.prod(box.shape[:-1]), box.shape[-1])) for box in boxes]


def spectral_state(settings, shape):
    """Shape and dtype of what the owner of a block keeps."""
    return {"momentum": (shape, settings["state_dtype"])}


def spectral_work(settings, shape):
    """What a block costs its owner: from this the blocks are shared out."""
    short, long = sorted(shape)
    flops = 4.0 * settings["ns_steps"] * short * short * long
    return Work(step_flops=flops, state_bytes=bytes_of(spectral_state(settings, shape)))


def spectral_workspace(settings, shape, count, device_type):
    """Bytes that an update takes beside gradients and state: the memory accountant predicts with it."""
    steps = cubic(0.5, settings["ns_steps"])
    unit_and_momentum = 2 * 4 * count * math.prod(shape)
    return unit_and_momentum + polynomial_workspace((count, *sorted(shape)), steps, "ieee", device_type)


def spectral_update(group, stack):
    """Turn a stack of gradients (B, m, n) into updates, in place; blocks that are not good keep their momentum."""
    momentum = stack.average_(stack.state["momentum"], stack.grads, group["betas"][0])
    wide = momentum.mT if stack.shape[0] > stack.shape[1] else momentum
    tiny = torch.finfo(torch.float32).tiny
    unit = wide / block_norms(wide).clamp_min(tiny).view(-1, 1, 1)
    polar = newton_schulz(unit, group["ns_steps"], 0.5)
    stack.grads.copy_((polar.mT if wide is not momentum else polar) * 0.2 * math.sqrt(max(stack.shape)))
    return {}  # nothing to withhold


@register
class Spectral(ShardedOptimizer):
    """Spectral descent. State of matrices: ``momentum``, 4 bytes per parameter, each block's at its owner."""

    rule = WholeMatrix(
        summary="to show how a rule is added",
        memory="4 for matrices, 8 for the rest",
        learning_rate="1",
        checks={"ns_steps": whole_number(1)},
        contradictions=no_contradictions,
        betas=Betas(1, last_may_be_one=False),
        from_adam=FromAdam(lambda moments, group: {"momentum": moments.first_as(group["betas"][0])}, always),
        batch_scaling=BatchScaling("sqrt", "judgement: of fixed length"),
        structure=(),
        tiles=spectral_tiles,
        state_of_block=spectral_state,
        element_state=("momentum",),
        non_negative=(),
        work=spectral_work,
        refresh=lambda settings: Refresh(1, is_staggered=False),
        update=spectral_update,
        step_size=lambda group: group["lr"],
        first_step=1,
        workspace=spectral_workspace,
        others=adam_rule(lambda group: {**group, "betas": (group["betas"][0], 0.95), "eps": 1e-8}),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float] = (0.9,),
        weight_decay: float = 0.0,
        *,
        ns_steps: int = 8,
        exchange_bucket_size: int = BUCKET_SIZE,
        exchange_dtype: Any = torch.float32,
        roles: Any = None,
        state_dtype: Any = torch.float32,
        int8_embeddings: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "ns_steps": ns_steps},
            roles=roles,
            state_dtype=state_dtype,
            int8_embeddings=int8_embeddings,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
            exchange_bucket_size=exchange_bucket_size,
            exchange_dtype=exchange_dtype,
        )


if __name__ == "__main__":
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
    inputs = torch.randn(64, 16)
    for cls in (Signum, Spectral):
        optimizer = cls(model.named_parameters(), lr=1e-3, roles=model)
        for _ in range(20):
            loss = (model(inputs) - inputs).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"{cls.__name__}: {loss:.4f}")
