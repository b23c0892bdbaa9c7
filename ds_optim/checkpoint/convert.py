"""From DeepSpeed's own checkpoint directory to the canonical form: offline, one process, no engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ds_optim.checkpoint import ranges
from ds_optim.checkpoint.directory import new_checkpoint, write_small
from ds_optim.checkpoint.translation import Origin, Translation, groups_at_zero_0, named_of
from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles
from ds_optim.deepspeed.configuration import DsOptimObject
from ds_optim.deepspeed.names import names
from ds_optim.errors import CheckpointError
from ds_optim.roles import shapes_and_roles
from ds_optim.sharding.exchange import ALONE
from ds_optim.stepping.sharded import ShardedOptimizer

_REMEDY = "Give the config.json (--model) and the DeepSpeed JSON (--deepspeed) of that run."


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
    eight_bits = {"int8_embeddings": bool(options.get("int8_embeddings", False))}
    run = Origin(cls, config or {}, shapes if model is not None else None, roles, eight_bits, _REMEDY)
    groups = groups_at_zero_0(files, run, named_of(model))
    if model is None and not cls.rule.is_elementwise:
        raise CheckpointError(
            f"the blocks of {cls.__name__} depend on what each parameter is, which DeepSpeed does not save: "
            "give the model (--model config.json)"
        )
    its = Translation(files, run, groups)
    missing = sorted(set(shapes) - its.names)
    if missing:
        raise run.misfit(files, [f"{name} of the model is not in it" for name in missing])

    merged: dict[str, list[ranges.Ranges]] = {}
    for rank in its.ranks:
        for name, stored in its.of_rank(rank).items():
            merged.setdefault(name, []).append(stored)
    with new_checkpoint(ALONE, Path(directory), files.tag) as folder:
        write_small(folder, its.about, files.client_state or None, files.main.get("lr_scheduler"))
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
