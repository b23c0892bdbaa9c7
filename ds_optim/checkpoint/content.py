"""What a checkpoint holds: the names of its tensors, their description in ``about.json``, and whether it fits.

    weights.P        the elements of parameter P in the precision that the optimizer steps (the fp32 master)
    state.P.KEY      its state: per element, or its blocks one behind the other in the order of their index
    module.NAME      buffers, and parameters that are not trained

Every tensor is one-dimensional, row-major, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim.checkpoint import engine as engines
from ds_optim.checkpoint.ranges import CHUNK_ELEMENTS, Ranges
from ds_optim.optimizers.launch import row_major
from ds_optim.optimizers.logical import Logical, LogicalParameter, Piece, slices
from ds_optim.optimizers.sharded import BLOCKS_OF_GROUP, ShardedOptimizer
from ds_optim.roles import canonical_name, logical_shape
from ds_optim.sharding import dtensor
from ds_optim.sharding.binding import local_of
from ds_optim.sharding.exchange import ALONE, Ranks
from ds_optim.sharding.layout import Scattered

_NOT_SETTINGS = ("params", "param_names", BLOCKS_OF_GROUP)


@dataclass(slots=True)
class Subject:
    """What is saved or loaded.

    Attributes:
        model: the module, unwrapped.
        optimizer: ours, or None for weights alone.
        engine: the DeepSpeed engine, if there is one.
        ranks: that save or load it together.
        parameters: what the optimizer keeps, by local tensor.
        untrained: the model's other parameters and its buffers: logical shape, where this rank's part of it begins,
            and that part.
    """

    model: nn.Module
    optimizer: ShardedOptimizer | None
    engine: Any
    parameters: dict[Tensor, list[LogicalParameter]] = field(default_factory=dict)
    untrained: dict[str, tuple[tuple[int, ...], int, Tensor]] = field(default_factory=dict)
    ranks: Ranks = ALONE

    def listed(self) -> Iterator[tuple[Tensor, LogicalParameter]]:
        """Every trained parameter, with the local tensor that it lies in."""
        return ((tensor, one) for tensor, parameters in self.parameters.items() for one in parameters)

    @property
    def step(self) -> int:
        """The largest step count of any parameter."""
        return max((_step_of(self.optimizer, tensor) or 0 for tensor in self.parameters), default=0)


def subject_of(model: Any, optimizer: Any, ranks: Ranks = ALONE) -> tuple[Subject | None, list[str]]:
    """What a call names, or why it cannot be saved or loaded.

    Args:
        ranks: that save or load it together, see `ds_optim.ranks.ranks_of`.
    """
    engine = model if engines.is_engine(model) else None
    if engine is not None:
        if optimizer is not None and optimizer not in (engine.optimizer, engine.basic_optimizer):
            return None, ["give the engine alone: it knows its optimizer"]
        optimizer, model = engine.basic_optimizer, engine.module
    if not isinstance(model, nn.Module):
        return None, [f"{type(model).__name__} is neither a DeepSpeed engine nor a torch.nn.Module"]
    if not isinstance(optimizer, ShardedOptimizer) and (optimizer is not None or engine is not None):
        return None, [f"{type(optimizer).__name__} is not an optimizer of ds_optim: use its own checkpoint"]
    if engine is None and isinstance(optimizer, ShardedOptimizer) and optimizer.is_bound:
        return None, ["this optimizer belongs to a DeepSpeed engine: give the engine instead"]
    found = engines.problems(engine) if engine is not None else []
    if found:
        return None, found
    subject = Subject(model, optimizer, engine, ranks=ranks)
    names: dict[Tensor, str] = {parameter: canonical_name(name) for name, parameter in model.named_parameters()}
    for tensor, parameters in (optimizer.logical() if optimizer is not None else {}).items():
        called = names.get(tensor)  # an optimizer without an engine may not have been told names
        subject.parameters[tensor] = [replace(one, name=called) if called else one for one in parameters]
    trained = {one.name for _, one in subject.listed()}
    scattered = []
    for parameter, name in names.items():
        if isinstance(dtensor.read(name, parameter).layout, Scattered):
            scattered.append(name)
        elif name not in trained:
            subject.untrained[name] = (logical_shape(parameter), *engines.local_weight(parameter))
    if scattered:
        return None, [
            f"{', '.join(scattered[:5])}{' ...' if len(scattered) > 5 else ''}: not sharded along dimension 0 (tensor "
            "parallelism); use torch.distributed.checkpoint with torch's get_optimizer_state_dict"
        ]
    subject.untrained.update({name: (tuple(buffer.shape), 0, buffer) for name, buffer in _buffers(model)})
    return subject, []


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield canonical_name(f"{prefix}.{name}" if prefix else name), buffer.detach()


# -- description ------------------------------------------------------------------------------------------------------


def described(subject: Subject) -> dict[str, Any]:
    """The part of ``about.json`` that says what the tensors are."""
    optimizer = subject.optimizer
    return {
        "optimizer": type(optimizer).__name__ if optimizer is not None else None,
        "structure": optimizer.structural_settings() if optimizer is not None else {},
        "groups": _groups(subject),
        "parameters": {
            one.name: {
                "shape": list(one.shape),
                "dtype": _dtype(one.weight.dtype),
                "blocks": one.blocks,
                "step": _step_of(optimizer, tensor),
                "state": {
                    key: {"numel": logical.numel, "dtype": _dtype(logical.dtype)}
                    for key, logical in one.state.items()
                    if _step_of(optimizer, tensor) is not None
                },
            }
            for tensor, one in subject.listed()
        },
        "module": {
            name: {"shape": list(shape), "dtype": _dtype(values.dtype)}
            for name, (shape, _, values) in subject.untrained.items()
        },
    }


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step_of(optimizer: ShardedOptimizer | None, tensor: Tensor) -> int | None:
    """The step count of a local tensor; None if it has no state."""
    state = optimizer.state.get(tensor) if optimizer is not None else None
    return int(state["step"]) if state else None


def _groups(subject: Subject) -> list[dict[str, Any]]:
    """The parameter groups: the names in each and its settings, those that JSON can hold."""
    if subject.optimizer is None:
        return []
    listed: list[dict[str, Any]] = [
        {"parameters": [], "settings": {key: _plain(value) for key, value in group.items() if _is_setting(key, value)}}
        for group in subject.optimizer.param_groups
    ]
    for tensor, index in _group_indices(subject).items():
        listed[index]["parameters"] += [one.name for one in subject.parameters.get(tensor, [])]
    return listed


def _group_indices(subject: Subject) -> dict[Tensor, int]:
    if subject.engine is not None:
        return engines.group_indices(subject.engine)
    assert subject.optimizer is not None
    return {t: index for index, group in enumerate(subject.optimizer.param_groups) for t in group["params"]}


def _is_setting(key: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return key not in _NOT_SETTINGS and all(_is_setting("", one) for one in value)
    plain = value is None or isinstance(value, bool | int | float | str)
    return key not in _NOT_SETTINGS and (plain or (isinstance(value, Tensor) and value.numel() == 1))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


# -- does it fit? -----------------------------------------------------------------------------------------------------


def misfits(subject: Subject, about: Mapping[str, Any], *, states: bool, strict: bool = True) -> list[str]:
    """Every difference that keeps a checkpoint from being loaded, as sentences.

    Args:
        about: the checkpoint's description.
        states: whether the optimizer's state is wanted, not weights alone.
        strict: whether the same parameters must be trained. What has no elements has no state and is never missed.
    """
    saved = about["parameters"]
    stored = {**about["module"], **saved}
    here = {one.name: one.shape for _, one in subject.listed()}
    here.update({name: shape for name, (shape, _, _) in subject.untrained.items()})
    found = [f"{name} is not in the checkpoint" for name in here if name not in stored]
    found += [f"the checkpoint has {name}, which is not here" for name in stored if name not in here]
    for name, shape in here.items():
        if name in stored and tuple(stored[name]["shape"]) != shape:
            found.append(f"{name} has shape {tuple(stored[name]['shape'])} in the checkpoint, {shape} here")
    optimizer = subject.optimizer
    if not states or optimizer is None:
        return found
    if about["optimizer"] != type(optimizer).__name__:
        return [
            *found,
            f"it is of {about['optimizer'] or 'a model without optimizer'}, not of {type(optimizer).__name__}",
        ]
    for key, value in optimizer.structural_settings().items():
        if about["structure"].get(key) != value:
            found.append(f"{key} is {about['structure'].get(key)!r} in the checkpoint, {value!r} here")
    for parameters in subject.parameters.values():
        steps: dict[int, str] = {}
        new = [one.name for one in parameters if one.name in stored and one.name not in saved and one.weight.numel]
        if strict:
            found += [f"{name} was not trained when the checkpoint was saved and has no state there" for name in new]
        for one in parameters:
            entry = saved.get(one.name)
            if entry is None:
                continue
            if entry["blocks"] != one.blocks:
                found.append(
                    f"{one.name}: blocks are {entry['blocks']} in the checkpoint, {one.blocks} here (roles differ)"
                )
            if entry["step"] is not None:
                steps.setdefault(entry["step"], one.name)
        if len(steps) > 1:
            listed = ", ".join(f"{name} {step}" for step, name in steps.items())
            found.append(f"these are stepped together here and took different numbers of steps: {listed}")
        if steps and new and not strict:
            count, other = next(iter(steps.items()))
            found += [
                f"{name} has no state in the checkpoint and is stepped together here with {other}, which took {count} "
                "steps: give it a parameter group of its own"
                for name in new
            ]
    trained = {one.name for _, one in subject.listed()}
    if strict:
        frozen = [name for name in saved if name in here and name not in trained and math.prod(here[name]) > 0]
        found += [f"{name} was trained and is not trained here" for name in frozen]
    return found + _misfit_groups(subject, about)


def _saved_settings(subject: Subject, about: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """For every parameter group here, the different settings that its parameters were saved with."""
    by_name = {name: group["settings"] for group in about["groups"] for name in group["parameters"]}
    found: dict[int, list[dict[str, Any]]] = {}
    for tensor, index in _group_indices(subject).items():
        for one in subject.parameters.get(tensor, []):
            settings, known = by_name.get(one.name), found.setdefault(index, [])
            if settings is not None and settings not in known:
                known.append(settings)
    return found


def _misfit_groups(subject: Subject, about: Mapping[str, Any]) -> list[str]:
    found = []
    for index, settings in _saved_settings(subject, about).items():
        if len(settings) > 1:
            keys = {key for one in settings for key in one if one[key] != settings[0].get(key)}
            values = "; ".join(f"{key} " + " and ".join(str(one.get(key)) for one in settings) for key in sorted(keys))
            found.append(
                f"parameters of group {index} were in groups with different settings ({values}): make them again"
            )
    return found


# -- tensors ----------------------------------------------------------------------------------------------------------


def held_parts(pieces: list[Piece], values: Tensor | None) -> list[tuple[int, Tensor]]:
    """The ranges and where their values lie, in a local tensor or a DTensor of any shape."""
    return slices(pieces, None if values is None else local_of(values).view(-1))


def to_write(subject: Subject) -> dict[str, Ranges]:
    """What this rank stores, by name."""
    found: dict[str, Ranges] = {}

    def add(name: str, logical: Logical, values: Tensor | None) -> None:
        if logical.numel:
            found[name] = Ranges(logical.numel, logical.dtype, held_parts(logical.written, values), CHUNK_ELEMENTS)

    for tensor, one in subject.listed():
        add(f"weights.{one.name}", one.weight, row_major(local_of(tensor)))
        state = subject.optimizer.state.get(tensor) if subject.optimizer is not None else None
        if state:
            for key, logical in one.state.items():
                add(f"state.{one.name}.{key}", logical, state.get(key))
    for name, (shape, begin, values) in subject.untrained.items():
        # Ranks may have different statistics in their buffers; those of the first are stored, as DeepSpeed does.
        sliced = values.numel() != math.prod(shape)
        parts = [(begin, row_major(values))] if sliced or subject.ranks.index == 0 else []
        if math.prod(shape):
            found[f"module.{name}"] = Ranges(math.prod(shape), values.dtype, parts, CHUNK_ELEMENTS)
    return found


@dataclass(slots=True)
class Reading:
    """What this rank reads, and what is to be put back where it belongs afterwards.

    Attributes:
        tensors: by name in the checkpoint.
        copies: (flat copy, tensor) for tensors that are not row-major.
    """

    tensors: dict[str, Ranges] = field(default_factory=dict)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, name: str, numel: int, parts: list[tuple[int, Tensor]]) -> None:
        if parts:
            self.tensors[name] = Ranges(numel, parts[0][1].dtype, parts)

    def flat(self, tensor: Tensor) -> Tensor:
        local = local_of(tensor).detach()
        flat = row_major(local)
        if not local.is_contiguous():
            self.copies.append((flat, local))
        return flat

    @torch.no_grad()
    def finish(self) -> None:
        for flat, tensor in self.copies:
            tensor.copy_(flat.view(tensor.shape))


def to_read(subject: Subject, about: Mapping[str, Any], *, states: bool) -> Reading:
    """What this rank needs, by name. With ``states``, the optimizer's state is made first, with its step counts."""
    reading = Reading()

    def stored_as(name: str) -> str:
        return f"{'weights' if name in about['parameters'] else 'module'}.{name}"

    for tensor, parameters in subject.parameters.items():
        flat = reading.flat(tensor)
        state = _make_state(subject, tensor, parameters, about) if states else None
        for one in parameters:
            reading.add(stored_as(one.name), one.weight.numel, held_parts(one.weight.read, flat))
            for key, logical in one.state.items() if state is not None else ():
                assert state is not None
                parts = held_parts(logical.read, state.get(key))
                if key in about["parameters"].get(one.name, {"state": {}})["state"]:
                    reading.add(f"state.{one.name}.{key}", logical.numel, parts)
                else:  # never used: its gradients were zero
                    for _, values in parts:
                        values.zero_()
    for name, (shape, begin, values) in subject.untrained.items():
        if values.numel():
            reading.add(stored_as(name), math.prod(shape), [(begin, reading.flat(values))])
    return reading


def _make_state(
    subject: Subject, tensor: Tensor, parameters: list[LogicalParameter], about: Mapping[str, Any]
) -> dict[str, Any] | None:
    """State to read into, its step count set; None, and none left, if the checkpoint has none for this tensor."""
    assert subject.optimizer is not None
    saved = about["parameters"]
    steps = {saved[one.name]["step"] for one in parameters if one.name in saved} - {None}
    if not steps:
        subject.optimizer.state.pop(tensor, None)
        return None
    state = subject.optimizer.state_of(tensor)
    state["step"].fill_(steps.pop())
    return state


def restore_settings(subject: Subject, about: Mapping[str, Any]) -> None:
    """Put the parameter groups' settings back; a learning rate that is a tensor stays the same tensor."""
    assert subject.optimizer is not None
    for index, settings in _saved_settings(subject, about).items():
        group = subject.optimizer.param_groups[index]
        for key, value in settings[0].items() if settings else ():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def follow_schedule(subject: Subject, about: Mapping[str, Any], scheduler: Any) -> None:
    """Give parameter groups that the checkpoint knows nothing of the rate that a loaded schedule has reached."""
    assert subject.optimizer is not None
    is_torchs = isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    # DeepSpeed's schedules know a last rate only after a step; other people's may tell none.
    rates_of = getattr(scheduler, "get_last_lr" if is_torchs else "get_lr", None)
    if rates_of is None:
        return
    rates = rates_of()
    for index, settings in _saved_settings(subject, about).items():
        group = subject.optimizer.param_groups[index]
        if not settings and isinstance(group["lr"], Tensor):
            group["lr"].fill_(rates[index])
        elif not settings:
            group["lr"] = rates[index]
