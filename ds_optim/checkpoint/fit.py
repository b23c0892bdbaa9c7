"""Whether a checkpoint fits what it is to be loaded into, and the settings that come with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_optim.checkpoint.content import NOT_SETTINGS, TrainingState, group_indices


def misfits(training: TrainingState, about: Mapping[str, Any], *, states: bool, strict: bool = True) -> list[str]:
    """Every difference that keeps a checkpoint from being loaded, as sentences.

    Args:
        about: the checkpoint's description.
        states: whether the optimizer's state is wanted, not weights alone.
        strict: whether the same parameters must be trained. What has no elements has no state and is never missed.
    """
    saved = about["parameters"]
    stored = {**about["module"], **saved}
    here = {one.name: one.shape for _, one in training.listed()}
    here.update({name: shape for name, (shape, _, _) in training.untrained.items()})
    found = [f"{name} is not in the checkpoint" for name in here if name not in stored]
    anywhere = {*here, *training.elsewhere}
    found += [f"the checkpoint has {name}, which is not here" for name in stored if name not in anywhere]
    for name, shape in here.items():
        if name in stored and tuple(stored[name]["shape"]) != shape:
            found.append(f"{name} has shape {tuple(stored[name]['shape'])} in the checkpoint, {shape} here")
    optimizer = training.optimizer
    if not states or optimizer is None:
        return found
    if about["optimizer"] != type(optimizer).__name__:
        return [
            *found,
            f"it is of {about['optimizer'] or 'a model without optimizer'}, not of {type(optimizer).__name__}",
        ]
    for key, value in optimizer.stepper.structure().items():
        if about["structure"].get(key) != value:
            found.append(f"{key} is {about['structure'].get(key)!r} in the checkpoint, {value!r} here")
    for parameters in training.parameters.values():
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
    trained = {one.name for _, one in training.listed()}
    frozen = [name for name in saved if name in here and name not in trained and math.prod(here[name]) > 0]
    found += [f"{name} was trained and is not trained here" for name in frozen if strict]
    return found + _misfit_groups(training, about)


def _saved_settings(training: TrainingState, about: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """For every parameter group here, the different settings that its parameters were saved with."""
    by_name = {
        name: {key: value for key, value in group["settings"].items() if key not in NOT_SETTINGS}
        for group in about["groups"]
        for name in group["parameters"]
    }
    found: dict[int, list[dict[str, Any]]] = {}
    for tensor, index in group_indices(training).items():
        for one in training.parameters.get(tensor, []):
            settings, known = by_name.get(one.name), found.setdefault(index, [])
            if settings is not None and settings not in known:
                known.append(settings)
    return found


def _misfit_groups(training: TrainingState, about: Mapping[str, Any]) -> list[str]:
    found = []
    for index, settings in _saved_settings(training, about).items():
        if len(settings) > 1:
            keys = {key for one in settings for key in one if one[key] != settings[0].get(key)}
            values = "; ".join(f"{key} " + " and ".join(str(one.get(key)) for one in settings) for key in sorted(keys))
            found.append(
                f"parameters of group {index} were in groups with different settings ({values}): make them again"
            )
    return found


# -- settings ---------------------------------------------------------------------------------------------------------


def restore_settings(training: TrainingState, about: Mapping[str, Any]) -> None:
    """Put the parameter groups' settings back; a learning rate that is a tensor stays the same tensor."""
    assert training.optimizer is not None
    for index, settings in _saved_settings(training, about).items():
        group = training.optimizer.param_groups[index]
        for key, value in settings[0].items() if settings else ():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def follow_schedule(training: TrainingState, about: Mapping[str, Any], scheduler: Any) -> None:
    """Give parameter groups that the checkpoint knows nothing of the rate that a loaded schedule has reached."""
    assert training.optimizer is not None
    is_torchs = isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    # DeepSpeed's schedules know a last rate only after a step; other people's may tell none.
    rates_of = getattr(scheduler, "get_last_lr" if is_torchs else "get_lr", None)
    if rates_of is None:
        return
    rates = rates_of()
    for index, settings in _saved_settings(training, about).items():
        group = training.optimizer.param_groups[index]
        if not settings and isinstance(group["lr"], Tensor):
            group["lr"].fill_(rates[index])
        elif not settings:
            group["lr"] = rates[index]
