"""The tests' model under torch's own strategies: FSDP2, HSDP, DDP and one device, with gradients of the same bits.

A real forward and backward pass makes every gradient; its values are then replaced by the constants of `engines`, so
that what is left to differ between strategies is the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import ds_optim
from ds_optim import known_torch
from ds_optim.roles import canonical_name
from engines import VOCABULARY, Case, build_model, learning_rate
from expected import gradient, weight_decays


@dataclass(frozen=True)
class MeshCase:
    """One training run of a few steps under a strategy of torch's own."""

    case: Case
    strategy: str = "fsdp"  # single, ddp, fsdp, hsdp
    mixed: bool = False  # forward and backward in bf16
    offload: bool = False  # CPUOffloadPolicy
    late: bool = False  # the optimizer is made before the model is wrapped, its parameters are swapped afterwards

    def __str__(self) -> str:
        flags = [name for name in ("mixed", "offload", "late") if getattr(self, name)]
        return "-".join([self.case.optimizer.split(".")[-1], self.strategy, *flags])


def groups(model: nn.Module, case: Case) -> list[dict[str, Any]]:
    """The parameters by their weight decay, with names."""
    decays = weight_decays(model, case)
    found: dict[float, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if canonical_name(name) in decays:
            found.setdefault(decays[canonical_name(name)], []).append((name, parameter))
    return [{"params": pairs, "weight_decay": decay} for decay, pairs in found.items()]


def make(mesh_case: MeshCase, seed: int = 0) -> tuple[nn.Module, nn.Module, Any]:
    """The wrapped model, the model itself and the optimizer, on this rank."""
    case = replace(mesh_case.case, seed=mesh_case.case.seed + seed)
    model = build_model(case)
    cls = getattr(ds_optim, case.optimizer.split(".")[-1])
    options = {key: value for key, value in case.options.items() if key != "weight_decay"}
    listed = groups(model, case)
    optimizer = cls(listed, roles=model, **options) if mesh_case.late else None
    before = [parameter for group in listed for _, parameter in group["params"]]
    names = {parameter: name for name, parameter in model.named_parameters()}
    wrapped: nn.Module = model
    if mesh_case.strategy == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    elif mesh_case.strategy != "single":
        world = dist.get_world_size()
        shape = (2, world // 2) if mesh_case.strategy == "hsdp" else (world,)
        axes = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
        settings: dict[str, Any] = {"mesh": mesh}
        if mesh_case.mixed:
            settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if mesh_case.offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        for layer in model.llama.model.layers:
            fully_shard(layer, **settings)
        fully_shard(model, **settings)
        average(model)
    if optimizer is None:
        roles = wrapped if mesh_case.strategy == "ddp" else model
        optimizer = cls(groups(model, case), roles=roles, **options)
    elif mesh_case.strategy != "single":  # as Accelerate does
        now = dict(model.named_parameters())
        swapped = {old: now[names[old]] for old in before}
        for group in optimizer.param_groups:
            group["params"] = [swapped[parameter] for parameter in group["params"]]
    return wrapped, model, optimizer


def average(model: nn.Module) -> None:
    """Let FSDP2's gradients be what they should be, as our warning says for torch before 2.9."""
    for module in model.modules() if known_torch.sums_for_averages("cpu") else ():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def set_gradients(model: nn.Module, case: Case, step: int) -> None:
    """Replace the values of every gradient by the constants, in the gradients that backward made."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        constant = gradient(case, canonical_name(name), tuple(parameter.shape), step).to(parameter.grad.dtype)
        if isinstance(parameter.grad, DTensor):
            whole = distribute_tensor(constant, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad.to_local().copy_(whole.to_local())
        else:
            parameter.grad.copy_(constant)


def train(mesh_case: MeshCase, wrapped: nn.Module, model: nn.Module, optimizer: Any, steps: range) -> None:
    """Steps ``steps`` (numbered from 1), setting the learning rate before each."""
    tokens = torch.arange(12).view(1, 12) % VOCABULARY
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        wrapped(tokens).backward()
        set_gradients(model, mesh_case.case, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter, whole and flat: a collective."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[canonical_name(name)] = whole.detach().reshape(-1).clone()
    return found


def run(mesh_case: MeshCase) -> dict[str, Any]:
    """Train the case from scratch on this rank (a job for the pool)."""
    wrapped, model, optimizer = make(mesh_case)
    train(mesh_case, wrapped, model, optimizer, range(1, mesh_case.case.steps + 1))
    kept: dict[str, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            kept[key] = kept.get(key, 0) + local.numel() * local.element_size()
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    return {"weights": weights(model), "state_bytes": kept, "held": held}


def shard_of(whole: Tensor, parameter: DTensor) -> Tensor:
    """This rank's part of a tensor that is cut as a parameter is: tensor parallelism cuts first, FSDP2 the rest.

    By hand, since ``full_tensor()`` puts such shards together in another order in torch 2.8.
    """
    mesh, part, coordinate = parameter.device_mesh, whole.detach(), parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    for dimension in reversed(range(mesh.ndim)):
        placement: Any = parameter.placements[dimension]
        if not placement.is_replicate():
            parts = part.chunk(mesh.size(dimension), placement.dim)
            empty = part.narrow(placement.dim, 0, 0)
            part = [*parts, *[empty] * mesh.size(dimension)][coordinate[dimension]]
    return part
