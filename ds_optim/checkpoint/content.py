"""What a checkpoint holds: the names of its tensors, their description in ``about.json``, and whether it fits.

    weights.P        the elements of parameter P in the precision that the optimizer steps (the fp32 master)
    state.P.KEY      its state: per element, or its blocks one behind the other in the order of their index
    module.NAME      buffers, and parameters that are not trained

Every tensor is one-dimensional, row-major, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optim.checkpoint.ranges import CHUNK_ELEMENTS, Ranges
from ds_optim.deepspeed import engine_state, model_parts
from ds_optim.roles import canonical_name, logical_shape
from ds_optim.sharding import dtensor
from ds_optim.sharding.binding import local_of
from ds_optim.sharding.exchange import ALONE, Ranks, rank_in_job
from ds_optim.sharding.layout import Scattered
from ds_optim.stepping.former_state import room_for_stored
from ds_optim.stepping.kernel_calls import row_major
from ds_optim.stepping.logical_tensors import Logical, LogicalParameter, LogicalRange, slices
from ds_optim.stepping.sharded import ShardedOptimizer
from ds_optim.stepping.state_dict import BLOCKS_OF_GROUP

NOT_SETTINGS = ("params", "param_names", BLOCKS_OF_GROUP, "name", "moe")


@dataclass(slots=True)
class TrainingState:
    """What is saved or loaded.

    Attributes:
        model: the module, unwrapped.
        optimizer: ours, or None for weights alone.
        engine: the DeepSpeed engine, if there is one.
        ranks: that save or load it together.
        parameters: what the optimizer keeps, by local tensor.
        untrained: the model's other parameters and its buffers: logical shape, which elements are here, and where
            they are.
        elsewhere: the shapes of what other ranks have, by name; none where all have the same.
        of_others: the names of what is here as well as on ranks that store it.
    """

    model: nn.Module
    optimizer: ShardedOptimizer | None
    engine: Any
    parameters: dict[Tensor, list[LogicalParameter]] = field(default_factory=dict)
    untrained: dict[str, tuple[tuple[int, ...], list[LogicalRange], Tensor]] = field(default_factory=dict)
    ranks: Ranks = ALONE
    elsewhere: dict[str, tuple[int, ...]] = field(default_factory=dict)
    of_others: frozenset[str] = frozenset()

    def listed(self) -> Iterator[tuple[Tensor, LogicalParameter]]:
        """Every trained parameter, with the local tensor that it lies in."""
        return ((tensor, one) for tensor, parameters in self.parameters.items() for one in parameters)

    def leave_out_frozen(self) -> None:
        """Forget the parameters that are not trained, buffers aside."""
        frozen = {canonical_name(name) for name, _ in self.model.named_parameters()}
        if self.engine is not None:
            frozen = set(model_parts.names_in(self.model).values())
        self.untrained = {name: its for name, its in self.untrained.items() if name not in frozen}

    @property
    def step(self) -> int:
        """The largest step count of any parameter."""
        return max((_step_of(self.optimizer, tensor) or 0 for tensor in self.parameters), default=0)


def training_state_of(model: Any, optimizer: Any, ranks: Ranks = ALONE) -> tuple[TrainingState | None, list[str]]:
    """What a call names, or why it cannot be saved or loaded; then every rank's `ask_others` is to be called.

    Args:
        ranks: that save or load it together, see `ds_optim.ranks.ranks_of`.
    """
    engine = model if engine_state.is_engine(model) else None
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
    found = engine_state.problems(engine) if engine is not None else []
    if found:
        return None, found
    training = TrainingState(model, optimizer, engine, ranks=ranks)
    slices = dict[Tensor, model_parts.Slices]()
    if engine is not None:
        names, slices = model_parts.names_in(model), model_parts.slices_in(model)
    else:
        names = {parameter: canonical_name(name) for name, parameter in model.named_parameters()}
    for tensor, parameters in (optimizer.logical() if optimizer is not None else {}).items():
        called = names.get(tensor)  # an optimizer without an engine may not have been told names
        training.parameters[tensor] = [replace(one, name=called) if called else one for one in parameters]
    trained = {one.name for _, one in training.listed()}
    scattered = [name for one, name in names.items() if isinstance(dtensor.read(name, one).layout, Scattered)]
    if scattered:
        return None, [
            f"{', '.join(scattered[:5])}{' ...' if len(scattered) > 5 else ''}: not a box of it on each rank (packed "
            "tensor parallelism); use torch.distributed.checkpoint with torch's get_optimizer_state_dict"
        ]
    for parameter, name in names.items():
        if name not in trained:
            cut = slices.get(parameter)
            shape = cut.whole if cut is not None else logical_shape(parameter)
            training.untrained[name] = shape, *engine_state.local_weight(parameter, cut)
    for name, buffer in _buffers(model, model_parts.naming(model) if engine is not None else canonical_name):
        training.untrained[name] = tuple(buffer.shape), [LogicalRange(0, buffer.numel(), 0)], buffer
    return training, []


def ask_others(training: TrainingState) -> None:
    """Find out what other ranks have, where they have different parameters: a collective.

    What several groups of ranks have (tied weights of a pipeline's stages) the first of them stores.
    """
    if training.engine is None or not model_parts.is_apart(training.engine):
        return
    assert training.optimizer is not None
    mine: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for tensor, one in training.listed():
        group = training.optimizer.shards.of(tensor).owner_group
        mine[one.name] = one.shape, tuple(dist.get_process_group_ranks(group)) if group else (rank_in_job(),)
    mine.update({name: (shape, (rank_in_job(),)) for name, (shape, _, _) in training.untrained.items()})
    first = training.ranks.union(mine)
    training.elsewhere.update((name, shape) for name, (shape, _) in first.items())
    training.of_others = frozenset(name for name, (_, holders) in mine.items() if first[name][1] != holders)


def _buffers(model: nn.Module, name_of: Callable[[str], str]) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield name_of(f"{prefix}.{name}" if prefix else name), buffer.detach()


# -- description ------------------------------------------------------------------------------------------------------


def described(training: TrainingState) -> dict[str, Any]:
    """The part of ``about.json`` that says what the tensors are: a collective where ranks have different ones."""
    mine = _described_here(training)
    return _together(training.ranks.everyones(mine).values()) if training.elsewhere else mine


def _together(listed: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks have. Parameter groups are the same if their settings are."""
    first, *others = listed
    groups = [(group["settings"], dict.fromkeys(group["parameters"])) for group in first["groups"]]
    for one in others:
        for key in ("parameters", "module"):
            first[key] = {**one[key], **first[key]}
        for group in one["groups"]:
            same = next((names for settings, names in groups if settings == group["settings"]), None)
            if same is None:
                groups.append((group["settings"], dict.fromkeys(group["parameters"])))
            else:
                same.update(dict.fromkeys(group["parameters"]))
    return {**first, "groups": [{"parameters": list(names), "settings": settings} for settings, names in groups]}


def _described_here(training: TrainingState) -> dict[str, Any]:
    optimizer = training.optimizer
    return {
        "optimizer": type(optimizer).__name__ if optimizer is not None else None,
        "structure": optimizer.stepper.structure() if optimizer is not None else {},
        "groups": _groups(training),
        "parameters": {
            one.name: {
                "shape": list(one.shape),
                "dtype": _dtype(one.weight.dtype),
                "blocks": one.blocks,
                "step": _step_of(optimizer, tensor),
                "state": state_in_words(one) if _step_of(optimizer, tensor) is not None else {},
            }
            for tensor, one in training.listed()
        },
        "module": {
            name: {"shape": list(shape), "dtype": _dtype(values.dtype)}
            for name, (shape, _, values) in training.untrained.items()
        },
    }


def state_in_words(one: LogicalParameter) -> dict[str, dict[str, Any]]:
    """What a parameter's state is, in ``about.json``."""
    return {key: {"numel": logical.numel, "dtype": _dtype(logical.dtype)} for key, logical in one.state.items()}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step_of(optimizer: ShardedOptimizer | None, tensor: Tensor) -> int | None:
    """The step count of a local tensor; None if it has no state."""
    state = optimizer.state.get(tensor) if optimizer is not None else None
    return int(state["step"]) if state else None


def _groups(training: TrainingState) -> list[dict[str, Any]]:
    """The parameter groups: the names in each and its settings, those that JSON can hold."""
    if training.optimizer is None:
        return []
    listed: list[dict[str, Any]] = [
        {"parameters": [], "settings": {key: _plain(value) for key, value in group.items() if _is_setting(key, value)}}
        for group in training.optimizer.param_groups
    ]
    for tensor, index in group_indices(training).items():
        listed[index]["parameters"] += dict.fromkeys(one.name for one in training.parameters.get(tensor, []))
    return listed


def group_indices(training: TrainingState) -> dict[Tensor, int]:
    """The parameter group of every tensor that the optimizer steps."""
    if training.engine is not None:
        return engine_state.group_indices(training.engine)
    assert training.optimizer is not None
    return {t: index for index, group in enumerate(training.optimizer.param_groups) for t in group["params"]}


def _is_setting(key: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return key not in NOT_SETTINGS and all(_is_setting("", one) for one in value)
    plain = value is None or isinstance(value, bool | int | float | str)
    return key not in NOT_SETTINGS and (plain or (isinstance(value, Tensor) and value.numel() == 1))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


# -- tensors ----------------------------------------------------------------------------------------------------------


def held_parts(pieces: list[LogicalRange], values: Tensor | None) -> list[tuple[int, Tensor]]:
    """The ranges and where their values lie, in a local tensor or a DTensor of any shape."""
    return slices(pieces, None if values is None else local_of(values).view(-1))


def to_write(training: TrainingState) -> dict[str, Ranges]:
    """What this rank stores, by name."""
    found: dict[str, Ranges] = {}

    def add(name: str, logical: Logical, values: Tensor | None) -> None:
        if logical.numel and (logical.written or name not in found):
            found[name] = Ranges(logical.numel, logical.dtype, held_parts(logical.written, values), CHUNK_ELEMENTS)

    for tensor, one in training.listed():
        if one.name in training.of_others:
            continue
        add(f"weights.{one.name}", one.weight, row_major(local_of(tensor)))
        state = training.optimizer.state.get(tensor) if training.optimizer is not None else None
        if state:
            for key, logical in one.state.items():
                add(f"state.{one.name}.{key}", logical, state.get(key))
    for name, (shape, pieces, values) in training.untrained.items():
        # Ranks may have different statistics in their buffers; those of the first are stored, as DeepSpeed does.
        is_stored = name not in training.of_others if training.elsewhere else training.ranks.index == 0
        parts = slices(pieces, row_major(values)) if values.numel() != math.prod(shape) or is_stored else []
        if math.prod(shape) and (parts or not training.elsewhere):
            found[f"module.{name}"] = Ranges(math.prod(shape), values.dtype, parts, CHUNK_ELEMENTS)
    return found


@dataclass(slots=True)
class PlannedRead:
    """What this rank reads, and what is to be put back where it belongs afterwards.

    Attributes:
        tensors: by name in the checkpoint.
        endings: what brings it there: of tensors that are not row-major, and of state that was stored in a former form.
    """

    tensors: dict[str, Ranges] = field(default_factory=dict)
    endings: list[Callable[[], object]] = field(default_factory=list)

    def add(self, name: str, numel: int, parts: list[tuple[int, Tensor]]) -> None:
        """Ranges of a tensor that are wanted; of what is wanted twice (for two copies) one is read."""
        known = dict(self.tensors[name].held()) if name in self.tensors else {}
        for start, values in parts:
            if start in known:
                self.endings.append(partial(values.copy_, known[start]))
            else:
                known[start] = values
        if known:
            self.tensors[name] = Ranges(numel, next(iter(known.values())).dtype, known.items())

    def add_state(self, name: str, logical: Logical, values: Tensor | None, stored: int) -> None:
        """State that has ``stored`` values in the checkpoint."""
        flat = None if values is None else local_of(values).view(-1)
        parts, ending = room_for_stored(logical, flat, stored, torch.device("cpu"))
        self.add(name, stored, parts)
        self.endings.append(ending)

    def flat(self, tensor: Tensor) -> Tensor:
        local = local_of(tensor).detach()
        flat = row_major(local)
        if not local.is_contiguous():
            self.endings.append(lambda: local.copy_(flat.view(local.shape)))
        return flat

    @torch.no_grad()
    def finish(self) -> None:
        for ending in self.endings:
            ending()


def to_read(training: TrainingState, about: Mapping[str, Any], *, states: bool) -> PlannedRead:
    """What this rank needs, by name. With ``states``, the optimizer's state is made first, with its step counts."""
    planned = PlannedRead()

    def stored_as(name: str) -> str:
        return f"{'weights' if name in about['parameters'] else 'module'}.{name}"

    for tensor, parameters in training.parameters.items():
        flat = planned.flat(tensor)
        state = _make_state(training, tensor, parameters, about) if states else None
        for one in parameters:
            planned.add(stored_as(one.name), one.weight.numel, held_parts(one.weight.read, flat))
            for key, logical in one.state.items() if state is not None else ():
                assert state is not None
                stored = about["parameters"].get(one.name, {"state": {}})["state"].get(key)
                if stored is not None:
                    planned.add_state(f"state.{one.name}.{key}", logical, state.get(key), stored["numel"])
                else:  # never used: its gradients were zero
                    for _, values in held_parts(logical.read, state.get(key)):
                        values.zero_()
    for name, (shape, pieces, values) in training.untrained.items():
        if values.numel():
            planned.add(stored_as(name), math.prod(shape), slices(pieces, planned.flat(values)))
    return planned


def _make_state(
    training: TrainingState, tensor: Tensor, parameters: list[LogicalParameter], about: Mapping[str, Any]
) -> dict[str, Any] | None:
    """State to read into, its step count set; None, and none left, if the checkpoint has none for this tensor."""
    assert training.optimizer is not None
    saved = about["parameters"]
    steps = {saved[one.name]["step"] for one in parameters if one.name in saved} - {None}
    if not steps:
        training.optimizer.state.pop(tensor, None)
        return None
    state = training.optimizer.state_of(tensor)
    state["step"].fill_(steps.pop())
    return state
