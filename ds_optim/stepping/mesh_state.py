"""State of blocks in a state dict, for parameters that are DTensors: as DTensors too, so that torch can reshard it.

A rank's own state dict holds the blocks that it happens to own. `torch.distributed.checkpoint.state_dict` would take
such tensors for the same on every rank and keep one rank's. So in a state dict every kind of block state is the logical
one-dimensional tensor of all blocks (`ds_optim.stepping.logical_tensors`), cut into equal parts over the whole mesh:
DCP loads it at another number of ranks, and a full state dict gathers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ds_optim.sharding.dtensor import group_of
from ds_optim.sharding.exchange import from_all_ranks
from ds_optim.stepping.former_state import former_numel, room_for_stored
from ds_optim.stepping.logical_tensors import Logical, slices
from ds_optim.stepping.state_moves import StateMoves
from ds_optim.stepping.stepper import Stepper, fresh_state

Keyed = Sequence[tuple[Any, Tensor]]
"""Tensors, each with its key in a state dict."""


class _MeshEntry(NamedTuple):
    """A DTensor, its key in a state dict, what is kept for its blocks, and the keys of what is kept per element."""

    key: Any
    tensor: DTensor
    of_blocks: dict[str, Logical]
    of_elements: frozenset[str]

    @property
    def keys(self) -> set[str]:
        return {"step", *self.of_blocks, *self.of_elements}


class _Spread(NamedTuple):
    """A logical tensor, where this rank's part of it is wanted, and what is loaded of it, spread over a mesh."""

    logical: Logical
    mine: Tensor
    value: DTensor


def to_mesh(stepper: Stepper, keyed: Keyed, state_dict: dict[str, Any]) -> None:
    """Replace the block state of parameters that lie in a mesh; all their ranks must call it. In place."""
    states = state_dict["state"]
    kept = _entries(stepper, [(key, tensor) for key, tensor in keyed if states.get(key)])
    for mesh, entries in _by_mesh(kept).items():
        moves = StateMoves()
        made: list[tuple[Any, str, Tensor, int]] = []
        for entry in entries:
            state = states[entry.key]
            for name, one in entry.of_blocks.items():
                begin, stop = _part(mesh, one.numel)
                part = torch.zeros(stop - begin, dtype=state[name].dtype, device=state[name].device)
                moves.add(slices(one.written, state[name]), [(begin, part)])
                made.append((entry.key, name, part, one.numel))
        if made:
            moves.run(group_of(mesh), made[0][2].device)
        for key, name, part, numel in made:
            placed = DTensor.from_local(
                part, mesh, _placements(mesh), run_check=False, shape=torch.Size((numel,)), stride=(1,)
            )
            states[key] = {**states[key], name: placed}
    for entry in kept:
        states[entry.key] = {name: one for name, one in states[entry.key].items() if name in entry.keys}


def from_mesh(stepper: Stepper, keyed: Keyed, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with every rank's own blocks where `to_mesh` put logical tensors; a collective as well.

    What does not look like it is left as it is, for `ds_optim.stepping.state_dict.StateDictForm.problems` to judge.
    """
    states = dict(state_dict["state"])
    kept = []
    for entry in _entries(stepper, [(key, tensor) for key, tensor in keyed if states.get(key)]):
        loaded = {name: value for name, value in states[entry.key].items() if not isinstance(value, dict)}
        sizes = all(
            name in loaded and loaded[name].numel() in (one.numel, former_numel(one))
            for name, one in entry.of_blocks.items()
        )
        if sizes and loaded.keys() == entry.keys:
            others = {name: value for name, value in loaded.items() if name not in entry.of_blocks}
            states[entry.key] = {**fresh_state(stepper, entry.tensor), **others}
            kept.append(entry)
    for mesh, entries in _by_mesh(kept).items():
        moves, spread, endings = StateMoves(), list[_Spread](), list[Callable[[], None]]()
        for entry in entries:
            for name, one in entry.of_blocks.items():
                value, mine = state_dict["state"][entry.key][name], states[entry.key][name]
                mine = states[entry.key][name] = mine.to(value.dtype)
                if isinstance(value, DTensor):
                    spread.append(_Spread(one, mine, value.redistribute(placements=_placements(value.device_mesh))))
                else:  # all of it is here
                    alone = StateMoves()
                    want, ending = room_for_stored(one, mine, value.numel())
                    alone.add([(0, value.reshape(-1))], want)
                    alone.run(None, mine.device)
                    ending()
        # Of what was cut from a full state dict in a former form, torch says that it has the sizes of today's.
        parts = from_all_ranks([len(its.value.to_local()) for its in spread], group_of(mesh)) if spread else []
        for its, stored in zip(spread, map(sum, zip(*parts, strict=True)), strict=True):
            want, ending = room_for_stored(its.logical, its.mine, stored)
            moves.add([(_part(its.value.device_mesh, stored)[0], its.value.to_local())], want)
            endings.append(ending)
        if len(moves):
            moves.run(group_of(mesh), torch.device(mesh.device_type))
        for ending in endings:
            ending()
    return {**state_dict, "state": states}


def _entries(stepper: Stepper, keyed: Keyed) -> list[_MeshEntry]:
    found = []
    for key, tensor in keyed:
        if isinstance(tensor, DTensor):
            logical = stepper.logical_state(tensor)[0]
            of_elements = frozenset(name for name in logical if name in stepper.element_state)
            blocks = {name: one for name, one in logical.items() if name not in of_elements and one.numel}
            found.append(_MeshEntry(key, tensor, blocks, of_elements))
    return found


def _by_mesh(entries: Sequence[_MeshEntry]) -> dict[DeviceMesh, list[_MeshEntry]]:
    found: dict[DeviceMesh, list[_MeshEntry]] = {}
    for entry in entries:
        if entry.of_blocks:
            found.setdefault(entry.tensor.device_mesh, []).append(entry)
    return found


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
