"""`save` and `load`: one call on all ranks, for an engine or a plain model and optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_optim.checkpoint import content, fit, ranges
from ds_optim.checkpoint.directory import (
    OBJECTS,
    heading,
    new_checkpoint,
    read_about,
    remove_older,
    whole_checkpoint,
    write_small,
)
from ds_optim.deepspeed import engine_state
from ds_optim.errors import CheckpointError, on_every_rank, on_first_rank, raise_everywhere
from ds_optim.ranks import ranks_of
from ds_optim.sharding.exchange import Ranks


def save(
    directory: str | os.PathLike[str],
    model: Any,
    optimizer: Any = None,
    *,
    tag: str | None = None,
    client_state: Any = None,
    keep: int | None = None,
    latest: bool = True,
    frozen: bool = True,
) -> Path:
    """Save weights, optimizer state, settings, scheduler and counters in canonical form.

    All ranks of the engine or model call it, and no others: those of the engine's mpu, of the mesh, of DDP's group
    (under DDP give the wrapped model, or have given it as ``roles``); all ranks of the job where there is nothing such.
    Every value is stored once. A rank needs a bounded buffer beside its shards. The checkpoint is whole or not there:
    it gets its name, and ``latest`` moves, when everything is on the disk.

    Args:
        directory: of the run's checkpoints, and of no other engine's; made if missing.
        model: a DeepSpeed engine whose optimizer is one of ours, or a model.
        optimizer: of a plain model; None saves its weights alone.
        tag: the checkpoint's folder in ``directory``. Unset: ``global_step`` and the engine's count, or ``step`` and
            the optimizer's. A checkpoint of the same tag is replaced.
        client_state: anything that pickles, the same on all ranks (the first one's is stored); `load` returns it.
        keep: checkpoints that stay in ``directory``, this one and the newest before it; older whole ones are removed
            when this one is there. None keeps all.
        latest: whether ``latest`` names this checkpoint from now on.
        frozen: whether parameters that are not trained are stored (buffers are). Where they were not, `load` leaves
            them as they are: a base model's weights under adapters.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, with every rank's reasons: disk full, no permission, not one of our optimizers.
    """
    directory = Path(directory)
    ranks = ranks_of(model, optimizer)
    training = known(model, optimizer, ranks, "this cannot be saved")
    if not frozen:
        training.leave_out_frozen()
    engine = training.engine
    name = tag or (f"global_step{engine.global_steps}" if engine is not None else f"step{training.step}")
    raise_everywhere(ranks, [*_tag_problems(ranks, name), *_keep_problems(keep)], "this cannot be saved")
    about = {
        **heading(ranks.size, engine_state.counters(engine) if engine is not None else None),
        **content.described(training),
        **({} if frozen else {"frozen_left_out": True}),
    }
    scheduler = getattr(engine, "lr_scheduler", None)
    schedule = scheduler.state_dict() if scheduler is not None else None
    failed = f"cannot save checkpoint {name!r} in {directory}"
    with new_checkpoint(ranks, directory, name, latest=latest) as folder:
        on_first_rank(ranks, partial(write_small, folder, about, client_state, schedule), failed)
        written = on_every_rank(ranks, lambda: content.to_write(training), failed)
        ranges.write(folder, written, ranks.group)
    if keep is not None and ranks.index == 0:
        remove_older(directory, name, keep)
    return directory / name


def load(
    directory: str | os.PathLike[str],
    model: Any,
    optimizer: Any = None,
    *,
    tag: str | None = None,
    fallback: bool = False,
    load_optimizer_states: bool = True,
    strict: bool = True,
) -> Any:
    """Load what `save` stored, on any number of ranks and under any strategy. Who calls it: as for `save`.

    Every file is checked, and every difference between the checkpoint and what is here is named, before anything is
    changed. The pickled part (scheduler, client state) runs code: load only what you trust.

    Args:
        directory: as in `save`.
        model: a DeepSpeed engine whose optimizer is one of ours, or a model.
        optimizer: of a plain model; None loads weights alone.
        tag: the checkpoint; unset, the one that ``latest`` names.
        fallback: if that one is damaged, take the newest older whole one, with one warning.
        load_optimizer_states: False loads weights, scheduler and counters, and leaves the optimizer as it is.
        strict: False allows that other parameters are trained than when it was saved: those that were frozen then begin
            without state, and the state of those that are frozen now is left out. Where DeepSpeed steps several
            parameters together (ZeRO 1 to 3), the former need parameter groups of their own.

    Returns:
        The ``client_state`` that was saved.

    Raises:
        CheckpointError: on every rank: nothing there, damaged (the files are named), of a later version, or of another
            optimizer, other settings, roles or shapes (each difference is named).
    """
    ranks = ranks_of(model, optimizer)
    training = known(model, optimizer, ranks, "nothing can be loaded into this")
    stored = opened(ranks, Path(directory), tag, fallback=fallback)
    put_back(training, stored, states=load_optimizer_states and training.optimizer is not None, strict=strict)
    return stored.client_state


def known(model: Any, optimizer: Any, ranks: Ranks, subject: str) -> content.TrainingState:
    """What a call names: a collective.

    Raises:
        CheckpointError: on every rank: why it cannot be saved or loaded.
    """
    training, problems = content.training_state_of(model, optimizer, ranks)
    raise_everywhere(ranks, problems, subject)
    assert training is not None
    content.ask_others(training)
    return training


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint whose files were found whole.

    Attributes:
        folder: that it is in.
        about: what it holds, see `ds_optim.checkpoint.content`; without ``engine``, counters stay as they are.
        read: fills tensors of this rank, by name: a collective of the group. OSError on every rank if it fails.
        schedule: the learning-rate schedule's state; None if there was none, or none is wanted.
        client_state: the user's.
    """

    folder: Path
    about: Mapping[str, Any]
    read: Callable[[Mapping[str, ranges.Ranges], dist.ProcessGroup | None], None]
    schedule: Any = None
    client_state: Any = None


def opened(ranks: Ranks, directory: Path, tag: str | None, *, fallback: bool = False) -> Stored:
    """A canonical checkpoint, see `load`: a collective."""
    folder = whole_checkpoint(ranks, directory, tag, fallback=fallback)
    about, objects = on_every_rank(
        ranks,
        lambda: (read_about(folder), torch.load(folder / OBJECTS, map_location="cpu", weights_only=False)),
        f"cannot load checkpoint {folder}, nothing was changed",
    )
    return Stored(folder, about, partial(ranges.read, folder), objects["lr_scheduler"], objects["client_state"])


def put_back(training: content.TrainingState, stored: Stored, *, states: bool = True, strict: bool = True) -> None:
    """Go on from a checkpoint: a collective.

    Args:
        states: whether the optimizer's state is wanted, not weights alone.
        strict: see `load`.

    Raises:
        CheckpointError: on every rank: each difference between the checkpoint and what is here.
    """
    about = stored.about
    if about.get("frozen_left_out"):
        there = {**about["parameters"], **about["module"]}
        training.untrained = {name: its for name, its in training.untrained.items() if name in there}
    _refuse_misfits(training, stored, states=states, strict=strict)
    _read_tensors(training, stored, states=states)
    if states:
        assert training.optimizer is not None
        fit.restore_settings(training, about)
        training.optimizer.stepper.forget_past()
    if training.engine is not None:
        _restore_engine(training, stored, follows=states and not strict)


def _refuse_misfits(training: content.TrainingState, stored: Stored, *, states: bool, strict: bool) -> None:
    """Raise on every rank what keeps a checkpoint from being loaded; nothing was changed yet."""
    raise_everywhere(
        training.ranks,
        fit.misfits(training, stored.about, states=states, strict=strict)
        + _schedule_problems(training, stored.schedule),
        f"checkpoint {stored.folder} does not fit, nothing was changed",
        "Load it with what it was saved with; if other parameters are trained now: strict=False; weights alone: "
        "load_optimizer_states=False."
        if states
        else "",
    )


def _read_tensors(training: content.TrainingState, stored: Stored, *, states: bool) -> None:
    """Weights and, if they are wanted, the optimizer's state, into the tensors of this rank."""
    ranks, folder = training.ranks, stored.folder
    planned = on_every_rank(
        ranks,
        lambda: content.to_read(training, stored.about, states=states),
        f"cannot load {folder}, no weight was changed",
    )
    try:
        stored.read(planned.tensors, ranks.group)
    except OSError as error:  # raised on every rank alike
        raise CheckpointError(f"reading {folder} failed half-way, load again before you go on:\n- {error}") from error
    planned.finish()


def _restore_engine(training: content.TrainingState, stored: Stored, *, follows: bool) -> None:
    """Have an engine compute with the weights that were read, and go on counting; its schedule too, if one was saved.

    Args:
        follows: whether parameter groups that the checkpoint knows nothing of take the rate that it has reached.
    """
    engine, about = training.engine, stored.about
    engine_state.publish_weights(engine, training.optimizer.bound_tensors if training.optimizer is not None else {})
    if about["engine"] is not None:
        engine_state.restore_counters(engine, about["engine"])
    if engine.lr_scheduler is not None and stored.schedule is not None:
        engine.lr_scheduler.load_state_dict(stored.schedule)
        if follows:
            fit.follow_schedule(training, about, engine.lr_scheduler)


def _schedule_problems(training: content.TrainingState, saved: Any) -> list[str]:
    """Why a learning-rate schedule cannot go on here: it has one rate for each parameter group."""
    groups = len(training.optimizer.param_groups) if training.optimizer is not None else 0
    rates = saved.get("base_lrs") if isinstance(saved, dict) else None
    if getattr(training.engine, "lr_scheduler", None) is None or rates is None or len(rates) == groups:
        return []
    if training.elsewhere:
        return [f"the learning-rate schedule is of {len(rates)} parameter groups on the first stage, {groups} here"]
    return [f"the learning-rate schedule was saved for {len(rates)} parameter groups, there are {groups} here"]


def _tag_problems(ranks: Ranks, tag: str) -> list[str]:
    found = []
    if not tag or tag.startswith(".") or Path(tag).name != tag or tag == "latest":
        found.append(f"tag {tag!r} is not the name of a folder")
    others = sorted(set(ranks.everyones(tag).values()))
    if len(others) > 1:
        found.append(f"ranks would save under different tags: {', '.join(others)}")
    return found


def _keep_problems(keep: int | None) -> list[str]:
    return [f"keep is {keep}; it must be 1 or more, or None"] if keep is not None and keep < 1 else []
