"""Reads the layout out of parameters themselves: DTensors of FSDP2 and HSDP, parameters under DDP, plain ones.

Nothing is asked of other ranks: a DTensor knows its mesh and its placements.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ds_optim import known_torch
from ds_optim.sharding.binding import BoundTensor, whole
from ds_optim.sharding.exchange import Ranks, group_over
from ds_optim.sharding.layout import ParameterSpec, Replicated, RowSharded, Scattered


def read(name: str, tensor: Tensor, replicas: dist.ProcessGroup | None = None) -> BoundTensor:
    """How a parameter lies over the ranks.

    Args:
        name: of the parameter.
        tensor: a DTensor or a plain tensor.
        replicas: the ranks that hold the same plain tensors with the same gradients (DDP's group).
    """
    if not isinstance(tensor, DTensor):
        bound = whole(name, tensor)
        if replicas is None or dist.get_world_size(replicas) == 1:
            return bound
        return replace(
            bound, layout=Replicated(bound.layout.parameters[0], dist.get_world_size(replicas)), group=replicas
        )
    mesh, spec = tensor.device_mesh, ParameterSpec(name, tuple(tensor.shape))
    cut = [dim for dim, one in enumerate(tensor.placements) if not one.is_replicate() and mesh.size(dim) > 1]
    if not cut:
        return BoundTensor(Replicated(spec, mesh.size()), group=group_of(mesh) if mesh.size() > 1 else None)
    placement = tensor.placements[cut[0]]
    if len(cut) > 1 or type(placement) is not Shard or placement.dim != 0:
        held = ParameterSpec(name, tuple(tensor.to_local().shape))
        return BoundTensor(Scattered(held, placements=str(tensor.placements)))
    dim = cut[0]
    shards = mesh.size(dim)
    if known_torch.sums_for_averages(mesh.device_type):
        _say_sums()
    return BoundTensor(
        RowSharded(spec, shards),
        mesh.get_local_rank(dim),
        mesh.get_group(dim),
        owners=_owners(mesh, dim),
    )


def problems(
    tensor: Tensor, bound: BoundTensor, *, is_elementwise: bool, stochastic: bool, in_codes: bool
) -> list[str]:
    """Why a parameter cannot be stepped exactly, each with its remedy.

    Args:
        tensor: the parameter.
        bound: what `read` made of it.
        is_elementwise: otherwise the rule needs whole rows, heads or matrices.
        stochastic: bf16 parameters are rounded stochastically, by the number of each element in the whole parameter.
        in_codes: state is kept in eight bits, with a scale for every 256 neighbouring elements.
    """
    name, found = bound.layout.parameters[0].name, []
    if getattr(tensor, "_fsdp_flattened", False) or getattr(tensor, "_is_flat_param", False):
        found.append(
            f"{name} was flattened by FSDP1 (FullyShardedDataParallel), which does not say where its elements lie: use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if isinstance(tensor, DTensor) and any(one.is_partial() for one in tensor.placements):
        found.append(f"{name} is a sum that is still to be made ({tensor.placements}): not a parameter")
    if isinstance(bound.layout, Scattered) and not is_elementwise:
        found.append(
            f"{name} lies as {bound.layout.placements} over its mesh: an optimizer of blocks needs contiguous rows, "
            "sharded along dimension 0 of one mesh dimension; use AdamW, Lion or Adan, or shard it that way"
        )
    if isinstance(bound.layout, Scattered) and in_codes and is_elementwise:
        found.append(
            f"{name} lies as {bound.layout.placements} over its mesh, where the blocks of state in eight bits would "
            'depend on the number of ranks: shard it along dimension 0 of one mesh dimension, or set state_dtype="fp32"'
        )
    if isinstance(bound.layout, Scattered) and stochastic and tensor.dtype == torch.bfloat16:
        found.append(
            f"{name} lies as {bound.layout.placements} over its mesh, where bf16_stochastic_round would depend on the "
            "number of ranks: shard it along dimension 0 of one mesh dimension, or set bf16_stochastic_round=False"
        )
    return found


@cache
def _say_sums() -> None:
    """Once per process: only the model knows whether its owner has done so."""
    warnings.warn(
        "torch before 2.9 adds gradients of FSDP2 up over CPU ranks (gloo) instead of averaging them: call "
        "set_force_sum_reduction_for_comms(True) on every FSDPModule, or use a newer torch",
        stacklevel=2,
    )


def replicas_of(model: object) -> dict[Tensor, dist.ProcessGroup]:
    """The ranks that hold the same parameter with the same gradient, for what `DistributedDataParallel` reduces."""
    found: dict[Tensor, dist.ProcessGroup] = {}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, DistributedDataParallel):
            for name, parameter in module.module.named_parameters():
                if name not in module.parameters_to_ignore:
                    found[parameter] = module.process_group
    return found


def ranks_of(models: Iterable[nn.Module]) -> Ranks:
    """The ranks that models lie on: of their parameters' meshes, of DDP. Those of the whole job where neither is."""
    models = list(models)
    meshes = {p.device_mesh: None for model in models for p in model.parameters() if isinstance(p, DTensor)}
    found = [(Ranks(tuple(mesh.get_all_groups()[::-1])), _ranks_in(mesh)) for mesh in meshes]
    for group in dict.fromkeys(group for model in models for group in replicas_of(model).values()):
        found.append((Ranks((group,)), set(dist.get_process_group_ranks(group))))
    if not found:
        return Ranks.of_job()
    everyone = set().union(*(members for _, members in found))
    return next((ranks for ranks, members in found if members == everyone), None) or Ranks((group_over(everyone),))


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of a mesh as one group; every rank of the mesh must ask."""
    members = _ranks_in(mesh)
    return mesh.get_group() if mesh.ndim == 1 and len(members) < dist.get_world_size() else group_over(members)


def _ranks_in(mesh: DeviceMesh) -> set[int]:
    return {int(rank) for rank in mesh.mesh.flatten()}


def _owners(mesh: DeviceMesh, dim: int) -> dist.ProcessGroup | None:
    """The group over which owners of blocks are spread, if that is more than the shards along ``dim``.

    Its ranks must be those of one replica's shards behind those of another's, as in HSDP's meshes. In another mesh
    (FSDP2 over tensor parallelism) every replica owns all blocks.
    """
    listed = [int(rank) for rank in mesh.mesh.movedim(dim, -1).flatten()]
    return group_of(mesh) if mesh.size() > mesh.size(dim) and listed == sorted(listed) else None
