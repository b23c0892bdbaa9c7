"""Reads the layout out of parameters themselves: DTensors of FSDP2 and HSDP, parameters under DDP, plain ones.

Nothing is asked of other ranks: a DTensor knows its mesh and its placements.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ds_optim import known_torch
from ds_optim.sharding.binding import BoundTensor, whole
from ds_optim.sharding.boxes import Box, is_one_range
from ds_optim.sharding.exchange import Ranks, group_over
from ds_optim.sharding.layout import Boxed, Layout, ParameterSpec, Replicated, RowSharded, Scattered

_MOST_STRIPES = 4096  # on a rank: two for each of very many experts

Placement: TypeAlias = Any
"""Of `torch.distributed.tensor`: a shard's ``dim`` is not every placement's."""


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
    if not cut or any(one.is_partial() for one in tensor.placements):  # which is refused, see `problems`
        return BoundTensor(Replicated(spec, mesh.size()), group=group_of(mesh) if mesh.size() > 1 else None)
    if known_torch.sums_for_averages(mesh.device_type):
        _say_sums()
    order = _order(mesh, tensor.placements)
    striped = None if order is not None else _stripes(spec.shape, mesh, tensor.placements, cut)
    if order is None and striped is None:
        held = ParameterSpec(name, tuple(tensor.to_local().shape))
        return BoundTensor(Scattered(held, placements=str(tensor.placements)))
    group = mesh.get_group(cut[0]) if len(cut) == 1 else group_over(_along(mesh, cut))
    ranks = dist.get_process_group_ranks(group)
    layout: Layout
    if order is None:
        assert striped is not None
        layout = Boxed(spec, striped)
    elif len(cut) == 1 and tensor.placements[cut[0]] == Shard(0) and _along(mesh, cut) == ranks:
        layout = RowSharded(spec, len(ranks))
    else:
        layout = Boxed(spec, tuple((box,) for box in boxes_of(spec.shape, mesh, tensor.placements, order, ranks)))
    return BoundTensor(layout, dist.get_rank(group), group, owners=_owners(mesh, cut))


def boxes_of(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], order: Sequence[int], ranks: Sequence[int]
) -> list[Box]:
    """What each of some ranks of a mesh holds of a parameter, whose cuts are made in this order of dimensions."""
    listed = mesh.mesh
    coordinates = dict(zip(listed.flatten().tolist(), product(*map(range, listed.shape)), strict=True))
    found = []
    for rank in ranks:
        start, stop = [0] * len(shape), list(shape)
        for dim in order:
            along = placements[dim].dim
            width = -(-(stop[along] - start[along]) // mesh.size(dim))  # as `torch.chunk` cuts
            first = min(start[along] + coordinates[rank][dim] * width, stop[along])
            start[along], stop[along] = first, min(first + width, stop[along])
        found.append(Box(tuple(start), tuple(stop)))
    return found


def _order(mesh: DeviceMesh, placements: Sequence[Placement]) -> list[int] | None:
    """The dimensions of a mesh in the order in which they cut a parameter; None where a rank then holds no box of it.

    One behind the other, but FSDP2 cuts what tensor parallelism along the same dimension of the parameter, a later one
    of the mesh, has cut before: a strided shard. One that follows no other cut is made of stripes.
    """
    cut = [dim for dim, one in enumerate(placements) if not one.is_replicate()]
    strided = {dim: factor for dim in cut if (factor := known_torch.split_factor(placements[dim])) is not None}
    for dim, factor in strided.items():
        later = [other for other in cut if other > dim and placements[other].dim == placements[dim].dim]
        if math.prod(mesh.size(other) for other in later) != factor:
            return None
    return [dim for dim in cut if dim not in strided] + list(strided)[::-1]


def _stripes(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], cut: Sequence[int]
) -> tuple[tuple[Box, ...], ...] | None:
    """What every rank along a mesh's one cut has of a parameter that is cut in stripes (packed tensor parallelism): a
    part of each of the equal parts of a dimension. None where these are not boxes, or too many."""
    (dim, *others), factor = cut, known_torch.split_factor(placements[cut[0]])
    along, ranks = placements[dim].dim, mesh.size(dim)
    leading = math.prod(shape[:along])
    if others or factor is None or shape[along] % (factor * ranks) or leading * factor > _MOST_STRIPES:
        return None
    width, behind = shape[along] // (factor * ranks), shape[along + 1 :]
    found = []
    for rank in range(ranks):
        first = range(rank * width, shape[along], ranks * width)
        found.append(
            tuple(
                Box((*at, row, *(0 for _ in behind)), (*(index + 1 for index in at), row + width, *behind))
                for at in product(*map(range, shape[:along]))
                for row in first
            )
        )
    return tuple(found)


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
    layout, is_apart, how = bound.layout, False, ""
    if isinstance(layout, Scattered):
        is_apart, how = True, f"{name} lies as {layout.placements} over its mesh"
        if not is_elementwise:
            found.append(
                f"{how}, in stripes: an optimizer of blocks needs one box of it on each rank (Shard along any "
                "dimensions); use AdamW, Lion or Adan, or shard it that way"
            )
    elif isinstance(layout, Boxed) and isinstance(tensor, DTensor):
        shape = layout.parameter.shape
        is_apart = any(len(its) > 1 or not is_one_range(shape, its[0]) for its in layout.boxes)
        how = f"{name} lies as {tensor.placements} over its mesh"
    if is_apart and in_codes:
        found.append(
            f"{how}, so that neighbouring elements, which share a scale in eight bits, lie on several ranks: shard it "
            'along dimension 0 alone, or set state_dtype="fp32"'
        )
    if is_apart and stochastic and tensor.dtype == torch.bfloat16:
        found.append(
            f"{how}, where bf16_stochastic_round cannot number its elements: shard it along dimension 0 alone, or set "
            "bf16_stochastic_round=False"
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


def _along(mesh: DeviceMesh, dims: Sequence[int]) -> list[int]:
    """The ranks of a mesh that differ from this one along these dimensions alone."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank has a part of a parameter of the mesh"
    index = tuple(slice(None) if dim in dims else here for dim, here in enumerate(coordinate))
    return [int(rank) for rank in mesh.mesh[index].flatten()]


def _owners(mesh: DeviceMesh, dims: Sequence[int]) -> dist.ProcessGroup | None:
    """The group over which owners of blocks are spread, if that is more than the shards along ``dims``.

    Its ranks must be those of one replica's shards behind those of another's, as in HSDP's meshes. In another mesh
    (FSDP2 over tensor parallelism, of what that replicates) every replica owns all blocks.
    """
    others = [dim for dim in range(mesh.ndim) if dim not in dims]
    replicas = mesh.mesh.permute(*others, *dims).reshape(-1, math.prod(mesh.size(dim) for dim in dims))
    listed = [rank for replica in replicas.tolist() for rank in sorted(replica)]
    return group_of(mesh) if len(replicas) > 1 and listed == sorted(listed) else None
