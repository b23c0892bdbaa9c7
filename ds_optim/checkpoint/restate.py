"""A canonical checkpoint with its state in another precision: fp32, bf16 or eight bits. Offline, one process.

What is kept, and of what a scale is the largest magnitude, is asked of the optimizer itself, once with the precision
of the checkpoint and once with the other. Weights, buffers, settings, schedule, counters and client state stay as they
are.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim.checkpoint import content, ranges
from ds_optim.checkpoint.directory import (
    OBJECTS,
    heading,
    new_checkpoint,
    read_about,
    whole_checkpoint,
    write_about,
)
from ds_optim.checkpoint.ranges import CHUNK_ELEMENTS, Ranges
from ds_optim.errors import CheckpointError, raise_everywhere
from ds_optim.optimizers.registry import optimizers
from ds_optim.roles import shapes_and_roles
from ds_optim.roles.role import Role
from ds_optim.rule import AnyRule
from ds_optim.sharding.exchange import ALONE
from ds_optim.sharding.layout import ParameterSpec, Replicated
from ds_optim.stepping.eight_bits import CodedBlocks
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.owned_blocks import OwnedBlocks
from ds_optim.stepping.stepper import logical_of


def restate(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    state_dtype: str | torch.dtype,
    int8_embeddings: bool = False,
    roles: Any = None,
    tag: str | None = None,
) -> Path:
    """Write a canonical checkpoint anew, with optimizer state of another precision.

    From eight bits to fp32 nothing is lost; the way back, and to bf16, rounds as a step does. Needs memory for the
    whole checkpoint.

    Args:
        source: the directory of the checkpoint.
        directory: where the new one is written, under the same name; made if missing.
        model: the model of the run, on any device, the meta device too: what is kept in eight bits depends on what each
            parameter is.
        state_dtype: the new one, see `ShardedOptimizer`.
        int8_embeddings: whether embeddings are kept in eight bits too.
        roles: overrides that the run had, as ``{pattern: role}``.
        tag: which checkpoint; unset, the one that ``latest`` names.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: it is damaged, of no optimizer of ours, or of another model; source and target are one.
        ValueError: no such precision; ``int8_embeddings`` with another one than int8; roles that no parameter of the
            model can have.
    """
    folder = whole_checkpoint(ALONE, Path(source), tag, fallback=False)
    if folder.parent.resolve() == Path(directory).resolve():
        raise CheckpointError(f"{folder} would be replaced: give another directory")
    about = read_about(folder)
    shapes, known = shapes_and_roles(model, roles)
    old = _stepper(about, known, {key: about["structure"][key] for key in _KINDS if key in about["structure"]})
    new = _stepper(about, known, {"state_dtype": state_dtype, "int8_embeddings": int8_embeddings})
    _require_fit(folder, about, shapes, old)
    tensors, before = _read(folder, about, old)
    for ours, (theirs, (one,)) in zip(old.shards.tensors, logical_of(new).items(), strict=True):
        if one.name in before:
            state = _empty(new, theirs)
            _convert(old, ours, before.pop(one.name), new, theirs, state)
            for key, logical in one.state.items():
                parts = content.held_parts(logical.written, state[key])
                tensors[f"state.{one.name}.{key}"] = Ranges(logical.numel, logical.dtype, parts, CHUNK_ELEMENTS)
            about["parameters"][one.name]["state"] = content.state_in_words(one)
    about = {**about, **heading(about["world_size"], about["engine"]), "structure": new.structure()}
    with new_checkpoint(ALONE, Path(directory), folder.name) as fresh:
        write_about(fresh, about)
        shutil.copyfile(folder / OBJECTS, fresh / OBJECTS)
        ranges.write(fresh, tensors)
    return Path(directory) / folder.name


_KINDS = ("state_dtype", "int8_embeddings")


def _stepper(about: Mapping[str, Any], roles: Mapping[str, Role], kinds: Mapping[str, Any]) -> InPlace | OwnedBlocks:
    """How one process would step the parameters of a checkpoint, over tensors of no size."""
    if about["optimizer"] not in optimizers():
        raise CheckpointError(
            f"it is of {about['optimizer'] or 'a model without optimizer'}, which is none of {', '.join(optimizers())}"
        )
    cls = optimizers()[about["optimizer"]]
    settings = {**about["groups"][0]["settings"], **about["structure"]}
    options = {key: settings[key] for key in inspect.signature(cls).parameters if key in settings and key not in _KINDS}
    specs = [ParameterSpec(name, tuple(entry["shape"])) for name, entry in about["parameters"].items()]
    optimizer = cls([torch.empty(0, device="meta") for _ in specs], **options, **kinds)
    return optimizer.predicted([Replicated(spec) for spec in specs], 0, roles)


def _read(
    folder: Path, about: Mapping[str, Any], stepper: InPlace | OwnedBlocks
) -> tuple[dict[str, Ranges], dict[str, dict[str, Tensor]]]:
    """What stays as it is, by its name in the checkpoint, and the state of every parameter that has any, by key."""
    tensors: dict[str, Ranges] = {}
    for name, (numel, dtype) in ranges.lengths(folder).items():
        if not name.startswith("state."):
            values = torch.empty(numel, dtype=dtype, device="cpu")
            tensors[name] = Ranges(numel, dtype, [(0, values)], CHUNK_ELEMENTS)
    planned = content.PlannedRead(dict(tensors))
    states: dict[str, dict[str, Tensor]] = {}
    for tensor, (one,) in logical_of(stepper).items():
        entry = about["parameters"][one.name]
        if entry["step"] is not None:
            states[one.name] = _empty(stepper, tensor)
            for key, logical in one.state.items():
                values = states[one.name][key]
                planned.add_state(f"state.{one.name}.{key}", logical, values, entry["state"][key]["numel"])
    ranges.read(folder, planned.tensors)
    planned.finish()
    return tensors, states


def _require_fit(
    folder: Path, about: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], stepper: InPlace | OwnedBlocks
) -> None:
    """Refuse a model that is not the run's: its shapes and roles are not those of the checkpoint."""
    found = []
    for name, entry in about["parameters"].items():
        if shapes.get(name) != tuple(entry["shape"]):
            found.append(f"{name} has shape {tuple(entry['shape'])} in the checkpoint, {shapes.get(name)} in the model")
    for (one,) in logical_of(stepper).values() if not found else ():
        entry = about["parameters"][one.name]
        if one.blocks != entry["blocks"] or (entry["step"] is not None and one.state.keys() != entry["state"].keys()):
            found.append(f"{one.name} is something else in this model: roles differ")
    raise_everywhere(ALONE, found, f"checkpoint {folder} does not fit the model that was given")


def _empty(stepper: InPlace | OwnedBlocks, tensor: Tensor) -> dict[str, Tensor]:
    return {key: torch.zeros(shape, dtype=dtype, device="cpu") for key, (shape, dtype) in stepper.spec(tensor).items()}


def _units(
    stepper: InPlace | OwnedBlocks, tensor: Tensor, state: Mapping[str, Tensor]
) -> Iterator[tuple[CodedBlocks, dict[str, Tensor]]]:
    """Views (1, ...) of a parameter's state, in parts whose codes have scales of their own, and how to read them."""
    rule: AnyRule = stepper.rule
    if isinstance(stepper, OwnedBlocks):
        for views in stepper.units(tensor, state):
            yield stepper.coded, views
        rule = stepper.rule.others
    in_place = {
        key: values.view(1, -1)
        for key, values in state.items()
        if values.numel() and stepper.shape_rule(key) != "owned block"
    }
    yield CodedBlocks.of(rule), in_place


def _convert(
    old: InPlace | OwnedBlocks,
    ours: Tensor,
    before: dict[str, Tensor],
    new: InPlace | OwnedBlocks,
    theirs: Tensor,
    state: dict[str, Tensor],
) -> None:
    """Fill a tensor's state with what it was in the other precision."""
    for (codes, kept), (_, wanted) in zip(_units(old, ours, before), _units(new, theirs, state), strict=True):
        for key, values in codes.encoded(codes.decoded(kept), wanted).items():
            wanted[key].copy_(values)
