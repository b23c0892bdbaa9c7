"""State of blocks in a state dict, for parameters that are DTensors: as DTensors too, so that torch can reshard it.

A rank's own state dict holds the blocks that it happens to own. `torch.distributed.checkpoint.state_dict` would take
such tensors for the same on every rank and keep one rank's. So in a state dict every kind of block state is the logical
one-dimensional tensor of all blocks (`ds_optim.optimizers.logical`), cut into equal parts over the whole mesh: DCP
loads it at another number of ranks, and a full state dict gathers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ds_optim.optimizers.logical import Logical, Piece, slices
from ds_optim.sharding.dtensor import group_of
from ds_optim.sharding.transfer import Part, transfer

if TYPE_CHECKING:
    from ds_optim.optimizers.sharded import ShardedOptimizer


def to_mesh(optimizer: ShardedOptimizer, state_dict: dict[str, Any]) -> None:
    """Replace the block state of parameters that lie in a mesh; all their ranks must call it. In place."""
    kept = [entry for entry in _listed(optimizer, state_dict) if entry[0] in state_dict["state"]]
    for mesh, entries in _by_mesh(kept).items():
        have: list[Part] = []
        want: list[Part] = []
        made: list[tuple[Any, str, Tensor, int]] = []
        for key, _, logical in entries:
            state = state_dict["state"][key]
            for name, one in logical.items():
                begin, stop = _part(mesh, one.numel)
                part = torch.zeros(stop - begin, dtype=state[name].dtype, device=state[name].device)
                have += parts_of(len(made), one.written, state[name])
                want.append((len(made), begin, part))
                made.append((key, name, part, one.numel))
        if made:
            transfer(have, want, group_of(mesh), made[0][2].device)
        for key, name, part, numel in made:
            placed = DTensor.from_local(
                part, mesh, _placements(mesh), run_check=False, shape=torch.Size((numel,)), stride=(1,)
            )
            state_dict["state"][key] = {**state_dict["state"][key], name: placed}
    for key, tensor, logical in kept:
        known = {"step", *logical, *_element_keys(optimizer, tensor)}
        state_dict["state"][key] = {name: one for name, one in state_dict["state"][key].items() if name in known}


def from_mesh(optimizer: ShardedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every rank's own blocks where `to_mesh` put logical tensors; a collective as well.

    What does not look like it is left as it is, for `ShardedOptimizer.state_problems` to judge.
    """
    states = dict(state_dict["state"])
    kept = []
    for key, tensor, logical in _listed(optimizer, state_dict):
        loaded = {name: value for name, value in states.get(key, {}).items() if not isinstance(value, dict)}
        sizes = all(name in loaded and loaded[name].numel() == one.numel for name, one in logical.items())
        if sizes and loaded.keys() == {"step", *logical, *_element_keys(optimizer, tensor)}:
            states[key] = {**optimizer.fresh_state(tensor), **{k: v for k, v in loaded.items() if k not in logical}}
            kept.append((key, tensor, logical))
    for mesh, entries in _by_mesh(kept).items():
        have: list[Part] = []
        want: list[Part] = []
        count = 0
        for key, _, logical in entries:
            for name, one in logical.items():
                value, mine = state_dict["state"][key][name], states[key][name]
                mine = states[key][name] = mine.to(value.dtype)
                if isinstance(value, DTensor):
                    value = value.redistribute(placements=_placements(value.device_mesh))
                    have.append((count, _part(value.device_mesh, one.numel)[0], value.to_local()))
                    want += parts_of(count, one.read, mine)
                else:  # all of it is here
                    for start, part in slices(one.read, mine):
                        part.copy_(value.reshape(-1)[start : start + part.numel()])
                count += 1
        transfer(have, want, group_of(mesh), torch.device(mesh.device_type))
    return {**state_dict, "state": states}


def _element_keys(optimizer: ShardedOptimizer, tensor: Tensor) -> Iterator[str]:
    return (key for key in optimizer.logical_state(tensor)[0] if key in optimizer.rule.element_state)


def _listed(
    optimizer: ShardedOptimizer, state_dict: Mapping[str, Any]
) -> list[tuple[Any, DTensor, dict[str, Logical]]]:
    """Every DTensor of the groups with its key in a state dict and what is kept for its blocks."""
    return [
        (
            key,
            tensor,
            {
                name: one
                for name, one in optimizer.logical_state(tensor)[0].items()
                if name not in optimizer.rule.element_state and one.numel
            },
        )
        for key, tensor in optimizer.keyed(state_dict)
        if isinstance(tensor, DTensor) and (optimizer.state.get(tensor) or state_dict["state"].get(key))
    ]


def _by_mesh(
    entries: list[tuple[Any, DTensor, dict[str, Logical]]],
) -> dict[DeviceMesh, list[tuple[Any, DTensor, dict[str, Logical]]]]:
    found: dict[DeviceMesh, list[tuple[Any, DTensor, dict[str, Logical]]]] = {}
    for entry in entries:
        if entry[2]:
            found.setdefault(entry[1].device_mesh, []).append(entry)
    return found


def parts_of(tensor: int, pieces: list[Piece], values: Tensor | None) -> list[Part]:
    """Pieces of a flat local tensor, to be sent or filled by `ds_optim.sharding.transfer`.

    Args:
        tensor: number of the logical tensor.
        pieces: of it, and where they lie in ``values``.
        values: None where there are no pieces.
    """
    return [(tensor, start, part) for start, part in slices(pieces, values)]


def _placements(mesh: DeviceMesh) -> list[Shard]:
    return [Shard(0)] * mesh.ndim


def _part(mesh: DeviceMesh, numel: int) -> tuple[int, int]:
    """This rank's range of a one-dimensional DTensor that is cut along every dimension of a mesh."""
    start, stop = 0, numel
    for dim in range(mesh.ndim):
        width = -(-(stop - start) // mesh.size(dim))
        begin = min(start + width * mesh.get_local_rank(dim), stop)
        start, stop = begin, min(begin + width, stop)
    return start, stop
