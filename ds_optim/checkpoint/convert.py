"""From DeepSpeed's own checkpoint directory to the canonical form: offline, one process, no engine.

What the optimizer keeps and where it lies is asked of the optimizer itself, over meta tensors laid out as the ranks'
were; this file only brings its answer and the files together.
"""

from __future__ import annotations

import inspect
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim.checkpoint import content, ranges
from ds_optim.checkpoint.directory import heading, new_checkpoint, write_small
from ds_optim.deepspeed import engine_state
from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles, RankStates
from ds_optim.deepspeed.configuration import DsOptimObject
from ds_optim.deepspeed.names import names
from ds_optim.errors import CheckpointError, in_one
from ds_optim.roles import canonical_name, decayed_then_exempt, exempt_names, shapes_and_roles
from ds_optim.roles.role import Role
from ds_optim.rule import WholeMatrix
from ds_optim.sharding.exchange import ALONE
from ds_optim.sharding.layout import Layout, ParameterSpec, Replicated
from ds_optim.stepping.eight_bits import EIGHT_BITS, is_codes
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.owned_blocks import OwnedBlocks
from ds_optim.stepping.sharded import ShardedOptimizer
from ds_optim.stepping.stepper import logical_of


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    deepspeed_config: Mapping[str, Any] | None = None,
    tag: str | None = None,
    trust: bool = False,
) -> Path:
    """Turn a checkpoint that DeepSpeed saved, of a run with one of our optimizers, into the canonical form.

    Tensors are those that `ds_optim.checkpoint.save` would have written at that moment, bit for bit. What the run keeps
    beside them is taken along: scheduler, counters, loss scale, client state.

    Args:
        source: the directory that was given to ``save_checkpoint``, or a checkpoint's folder in it.
        directory: of the canonical checkpoints; made if missing.
        model: the model of the run; the meta device will do. Needed where something depends on what each parameter
            is (blocks: all but AdamW, Lion, Adan; state in eight bits), and at ZeRO-0, where DeepSpeed saves no names.
        deepspeed_config: the run's configuration: the optimizer's name, ``roles`` and ``no_decay``. Unset, the one that
            DeepSpeed saved; needed if that was a path or the optimizer was made by hand.
        tag: which checkpoint, and its name in ``directory``; unset, the one that ``latest`` names.
        trust: also read objects of unknown classes (in the client state, say), which runs code of theirs.

    Returns:
        The canonical checkpoint's folder.

    Raises:
        CheckpointError: files missing or damaged, not one of our optimizers, or model or configuration are not those of
            the run: every difference is named, and what to give.
        ValueError: ``roles`` that no parameter of the model can have.
    """
    files = DeepSpeedFiles(Path(source), tag, trust=trust)
    config = deepspeed_config if deepspeed_config is not None else files.config
    cls, options = _optimizer_of(config)
    shapes, roles = shapes_and_roles(model, options.get("roles")) if model is not None else ({}, {})
    groups = _groups_at_zero_0(files, model, config or {}, shapes, roles)
    layouts = files.layouts(groups)
    _require_fit(files, cls, model, shapes, layouts)

    states = files.rank(0, [[spec.name for spec in group] for group in groups])
    optimizer = _made(files, cls, layouts, states, options if model is not None else None)
    first = optimizer.predicted(layouts, 0, roles)
    trained = {spec.name for layout in layouts for spec in layout.parameters}
    missing = sorted(set(shapes) - trained - set(files.untrained(0, trained)))
    if missing:
        raise _misfit(files, [f"{name} of the model is not in it" for name in missing])

    about: dict[str, Any] = {}
    merged: dict[str, list[ranges.Ranges]] = {}
    for rank in range(files.world_size if files.is_zero else 1):
        states = files.rank(rank, []) if rank else states
        training = _training_state_of(files, rank, optimizer, first.at_rank(rank), layouts, states)
        for name, stored in content.to_write(training).items():
            merged.setdefault(name, []).append(stored)
        about = about or {**_about(files, states, config or {}), **content.described(training)}
    with new_checkpoint(ALONE, Path(directory), files.tag) as folder:
        write_small(folder, about, files.client_state or None, files.main.get("lr_scheduler"))
        ranges.write(folder, {name: parts[0].joined_with(parts[1:]) for name, parts in merged.items()})
    return Path(directory) / files.tag


def _optimizer_of(config: Mapping[str, Any] | None) -> tuple[type[ShardedOptimizer], Mapping[str, Any]]:
    """The optimizer's class and the options that it was given."""
    name = str(((config or {}).get("optimizer") or {}).get("type"))
    if name not in names():
        if config is None or "optimizer" not in config:
            found = "DeepSpeed did not save which optimizer it was"
        else:
            found = f"the optimizer was {name}, which is none of {', '.join(names())}"
        raise CheckpointError(f'{found}: give a DeepSpeed JSON whose "optimizer" names it (--deepspeed)')
    return names()[name], DsOptimObject.of(config or {}).all_options(config or {})


def _groups_at_zero_0(
    files: DeepSpeedFiles,
    model: nn.Module | None,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, Role],
) -> list[list[ParameterSpec]]:
    """The parameters of each group, as the plugin makes groups; DeepSpeed saves no names at this stage."""
    if files.is_zero:
        return []
    if model is None:
        raise CheckpointError(
            f"{files.folder} is of ZeRO stage 0, where DeepSpeed saves no names with the optimizer's state: "
            "give the model (--model config.json)"
        )
    named = [canonical_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    exempt = set(exempt_names(named, roles, DsOptimObject.of(config).no_decay))
    split = decayed_then_exempt(named, exempt.__contains__)
    saved = files.main["optimizer"].get("optimizer_state_dict", files.main["optimizer"])["param_groups"]
    candidates = ([group for group in split if group], [named])
    sizes = [len(group["params"]) for group in saved]
    for groups in candidates:
        if [len(group) for group in groups] == sizes:
            return [[ParameterSpec(name, shapes[name]) for name in group] for group in groups]
    raise _misfit(
        files,
        [
            f"its parameter groups have {sizes} parameters, this model and configuration make "
            f"{' or '.join(str([len(group) for group in groups]) for groups in candidates)} "
            "(groups that you made yourself are not known at ZeRO stage 0; frozen parameters must be frozen here too)"
        ],
    )


def _require_fit(
    files: DeepSpeedFiles,
    cls: type[ShardedOptimizer],
    model: nn.Module | None,
    shapes: Mapping[str, tuple[int, ...]],
    layouts: Sequence[Layout],
) -> None:
    """Refuse a model that is not the run's, and none where the optimizer has blocks."""
    if model is None:
        if not cls.rule.is_elementwise:
            raise CheckpointError(
                f"the blocks of {cls.__name__} depend on what each parameter is, which DeepSpeed does not save: "
                "give the model (--model config.json)"
            )
        return
    found = []
    for spec in (spec for layout in layouts for spec in layout.parameters):
        if spec.name not in shapes:
            found.append(f"the model has no parameter {spec.name}")
        elif shapes[spec.name] != spec.shape:
            found.append(f"{spec.name} has shape {spec.shape} in the checkpoint, {shapes[spec.name]} in the model")
    if found:
        raise _misfit(files, found)


def _misfit(files: DeepSpeedFiles, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        in_one(
            list(dict.fromkeys(problems)),
            f"{files.folder} does not fit the model and configuration that were given",
            "Give the config.json (--model) and the DeepSpeed JSON (--deepspeed) of that run.",
        )
    )


def _made(
    files: DeepSpeedFiles,
    cls: type[ShardedOptimizer],
    layouts: Sequence[Layout],
    states: RankStates,
    given: Mapping[str, Any] | None,
) -> ShardedOptimizer:
    """The optimizer that was saved, over tensors of no size that stand for those of any rank.

    Args:
        given: its options; None if the model is not known.
    """
    saved = states.optimizer["param_groups"]
    sizes = [len(group["params"]) for group in saved]
    if sum(sizes) != len(layouts) or len(states.masters) != len(layouts):
        raise CheckpointError(
            f"{files.folder}: the optimizer stepped {sum(sizes)} tensors, {len(states.masters)} were saved, its "
            f"parameters make {len(layouts)}: no DeepSpeed that is known here wrote it"
        )
    options: dict[str, Any] = {
        key: saved[0][key] for key in inspect.signature(cls).parameters if key in saved[0] and key != "params"
    }
    elements = (cls.rule.others if isinstance(cls.rule, WholeMatrix) else cls.rule).element_state
    every = list(states.optimizer["state"].values())
    kept = [state[key].dtype for state in every for key in elements if key in state]
    if any(is_codes(key) for state in every for key in state):
        if given is None:
            raise CheckpointError(
                "which state is in eight bits depends on what each parameter is, which DeepSpeed does not save: give "
                "the model (--model config.json)"
            )
        kept, options["int8_embeddings"] = [EIGHT_BITS], bool(given.get("int8_embeddings", False))
    groups = [{"params": [torch.empty(0, device="meta") for _ in range(size)]} for size in sizes]
    try:
        optimizer = cls(groups, state_dtype=kept[0] if kept else torch.float32, **options)
    except ValueError as error:
        raise CheckpointError(f"{files.folder} was not saved by {error}") from error
    for group, its in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in its.items() if key != "params"})
    return optimizer


def _training_state_of(
    files: DeepSpeedFiles,
    rank: int,
    optimizer: ShardedOptimizer,
    stepper: InPlace | OwnedBlocks,
    layouts: Sequence[Layout],
    states: RankStates,
) -> content.TrainingState:
    """What a rank would have handed to `ds_optim.checkpoint.save`."""
    optimizer.take_over(stepper)
    _step_over(optimizer, stepper.shards.tensors)
    problems = []
    module = files.module
    for layout, master in zip(layouts, states.masters, strict=True):
        if isinstance(layout, Replicated) and not _holds(master, module[layout.parameter.name]):
            problems.append(f"the fp32 weights in {layout.parameter.name}'s place are another's: its groups are others")
        needed = max((fragment.offset + fragment.numel for fragment in layout.fragments(rank)), default=0)
        if not needed <= master.numel() <= layout.local_numel(rank):
            problems.append(
                f"the tensor of {layout.parameters[0].name} ... has {master.numel()} elements, its shapes make "
                f"{layout.local_numel(rank)}"
            )
    problems += optimizer.state_form.problems(states.optimizer)
    if problems:
        raise _misfit(files, [f"rank {rank}: {problem}" for problem in problems])
    logical = logical_of(stepper)
    saved = optimizer.state_form.of_this_rank(states.optimizer)["state"]
    _step_over(optimizer, states.masters)
    optimizer.state = defaultdict(
        dict, {master: saved[key] for key, master in optimizer.state_form.keyed(states.optimizer) if key in saved}
    )
    return content.TrainingState(
        nn.Module(),
        optimizer,
        None,
        {master: logical[tensor] for master, tensor in zip(states.masters, stepper.shards.tensors, strict=True)},
        files.untrained(rank, {spec.name for layout in layouts for spec in layout.parameters}),
    )


def _holds(master: Tensor, weight: Tensor) -> bool:
    """Whether an fp32 master is that of a weight, a NaN included."""
    if master is weight:
        return True
    return master.shape == weight.shape and torch.allclose(master.to(weight.dtype), weight, 0, 0, equal_nan=True)


def _step_over(optimizer: ShardedOptimizer, tensors: Sequence[Tensor]) -> None:
    """Put other tensors into the optimizer's groups, in the order of those that are there."""
    waiting = iter(tensors)
    for group in optimizer.param_groups:
        group["params"] = [next(waiting) for _ in group["params"]]


def _about(files: DeepSpeedFiles, states: RankStates, config: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("gradient_accumulation_steps")
    steps = files.main["global_steps"]
    engine = SimpleNamespace(
        global_steps=steps,
        global_samples=files.main["global_samples"],
        skipped_steps=files.main["skipped_steps"],
        micro_steps=steps * (window if isinstance(window, int) else 1),  # DeepSpeed does not save it
        optimizer=SimpleNamespace(loss_scaler=states.scaler),
    )
    return heading(files.world_size, engine_state.counters(engine))
