"""Saving a run and going on with it: which form a directory holds, and what must be the same as before.

Canonical checkpoints go on with any number of ranks and at any ZeRO stage; they are for the optimizers of this
repository. DeepSpeed's own directory serves any optimizer, of others at the same ranks and stage only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import settings
import torch
import torch.distributed as dist


class SaveError(RuntimeError):
    """A checkpoint could not be written; the same on every rank. Earlier ones are untouched."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins.

    Attributes:
        steps: that were done.
        sequences: of the training text that these steps took, all ranks together.
        origin: what was loaded, for the log.
        noise_scale: the saved averages of ``--noise-scale``, if there are any.
    """

    steps: int = 0
    sequences: int = 0
    origin: str = ""
    noise_scale: Mapping[str, Any] | None = None


def check(engine: Any, chosen: settings.Settings) -> None:
    """Refuse at start what would fail at the first save.

    Raises:
        SettingsError: a canonical checkpoint cannot hold what this engine trains.
    """
    if chosen.save is not None and chosen.checkpoint_form == "canonical":
        from ds_optim.checkpoint.content import training_state_of

        _, problems = training_state_of(engine, None)
        if problems:
            raise settings.SettingsError(
                [f"--save: {problem}; --checkpoint-form deepspeed saves it for the same ranks" for problem in problems]
            )


def save(engine: Any, chosen: settings.Settings, step: int, state: Mapping[str, Any]) -> None:
    """Save after ``step`` steps, with the ``state`` that `resume` compares. All ranks call it.

    Raises:
        SaveError: disk full, no permission.
    """
    assert chosen.save is not None
    tag = f"global_step{step}"
    if chosen.checkpoint_form == "deepspeed":
        engine.save_checkpoint(str(chosen.save), tag=tag, client_state=dict(state))
        return
    import ds_optim.checkpoint

    try:
        ds_optim.checkpoint.save(chosen.save, engine, tag=tag, client_state=dict(state), keep=chosen.keep)
    except ds_optim.checkpoint.CheckpointError as error:
        raise SaveError(str(error)) from error


def resume(engine: Any, chosen: settings.Settings, plan: Mapping[str, Any], batch: int) -> Start:
    """Load what ``--resume`` or ``--autoresume`` names. All ranks call it.

    Args:
        plan: what the learning rate and the order of the text follow, by option name; it must be what was saved.
        batch: sequences per step; it may differ, which the log then says.

    Raises:
        SettingsError: nothing there, damaged, of another optimizer or plan.
    """
    path = chosen.save if chosen.autoresume else chosen.resume
    assert path is not None
    asked = f"{'--autoresume from' if chosen.autoresume else '--resume'} {path}"
    found = _find(path)
    if found is None:
        if chosen.autoresume:
            return Start()
        raise settings.SettingsError([f"{asked}: there is no checkpoint"])
    state = _load(engine, *found, chosen.fallback, asked)
    directory = found[0]
    _compare(state, plan, asked)
    steps = int(engine.global_steps)
    if steps >= chosen.steps and not chosen.autoresume:
        raise settings.SettingsError([f"{asked}: all of its {chosen.steps} steps are done"])
    origin = f"{directory}, {steps} steps done"
    if state.get("batch", batch) != batch:
        origin += f"; a step took {state['batch']} sequences and takes {batch} from here on"
    return Start(steps, _sequences(state, steps, batch), origin, state.get("noise_scale"))


def branch(engine: Any, chosen: settings.Settings, plan: Mapping[str, Any], batch: int) -> Start:
    """Load what ``--branch`` names, and hold its learning rate times ``--lr-scale``. All ranks call it.

    The rate goes from the saved one to the scaled one on a straight line over the ``--warmup`` share of the steps. The
    number of steps is this run's own; the rest of the ``plan`` must be what was saved.

    Raises:
        SettingsError: nothing there, damaged, of another optimizer or text, or saved at a learning rate of zero.
    """
    assert chosen.branch is not None
    asked = f"--branch {chosen.branch}"
    found = _find(chosen.branch)
    if found is None:
        raise settings.SettingsError([f"{asked}: there is no checkpoint"])
    state = _load(engine, *found, chosen.fallback, asked)
    _compare(state, {option: here for option, here in plan.items() if option != "steps"}, asked)
    groups = engine.basic_optimizer.param_groups
    if not any(float(group["lr"]) for group in groups):
        raise settings.SettingsError([f"{asked}: its learning rate is 0; take a checkpoint from before the end"])
    for group in groups:
        group["initial_lr"] = float(group["lr"])
    warmup = round(chosen.warmup * chosen.steps)

    def share(step: int) -> float:
        return 1 + (chosen.lr_scale - 1) * (min(1.0, (step + 1) / warmup) if warmup else 1.0)

    engine.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(engine.basic_optimizer, share)
    steps = int(engine.global_steps)
    origin = f"branched from {found[0]} after {steps} steps; learning rate x {chosen.lr_scale:g}"
    return Start(steps, _sequences(state, steps, batch) + chosen.skip_sequences, origin)


def _sequences(state: Mapping[str, Any], steps: int, batch: int) -> int:
    """Of the text that were taken; another script's checkpoint may not say so."""
    return int(state.get("sequences", steps * state.get("batch", batch)))


def _find(path: Path) -> tuple[Path, str | None, bool] | None:
    """`_place`, with one answer for all ranks, even if their views of a network disk differ."""
    found: list[Any] = [_place(path) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    place: tuple[Path, str | None, bool] | None = found[0]
    return place


def _load(
    engine: Any, directory: Path, tag: str | None, is_deepspeeds: bool, fallback: bool, asked: str
) -> Mapping[str, Any]:
    """Load either form; the ``state`` that was saved with it."""
    if not is_deepspeeds:
        return _load_canonical(engine, directory, tag, fallback, asked)
    if fallback:
        raise settings.SettingsError([f"{asked}: that is DeepSpeed's own form, which --fallback cannot check"])
    loaded, state = engine.load_checkpoint(str(directory), tag=tag)
    if loaded is None:
        raise settings.SettingsError([f"{asked}: DeepSpeed found no checkpoint there"])
    found: Mapping[str, Any] = state
    return found


def _place(path: Path) -> tuple[Path, str | None, bool] | None:
    """Directory and tag (None: the newest) of a checkpoint directory or one folder in it, and if it is DeepSpeed's."""
    from ds_optim.checkpoint.directory import MANIFEST, folder_of
    from ds_optim.latest import newest

    if tag := newest(path):
        return path, None, _is_deepspeeds(folder_of(path, tag))
    if (path / MANIFEST).is_file() or _is_deepspeeds(path):
        return path.parent, path.name, _is_deepspeeds(path)
    return (path, None, False) if any(path.glob(f"*/{MANIFEST}")) else None


def _is_deepspeeds(folder: Path) -> bool:
    return any(folder.glob("*_model_states.pt"))


def _load_canonical(engine: Any, directory: Path, tag: str | None, fallback: bool, asked: str) -> Mapping[str, Any]:
    import ds_optim.checkpoint

    try:
        state = ds_optim.checkpoint.load(directory, engine, tag=tag, fallback=fallback)
    except ds_optim.checkpoint.CheckpointError as error:
        raise settings.SettingsError([f"{asked}: {error}"]) from error
    return state if isinstance(state, Mapping) else {}  # saved by another script


def _compare(state: Mapping[str, Any], plan: Mapping[str, Any], asked: str) -> None:
    problems = []
    for option, here in plan.items():
        before = state.get(option, here)
        if before == here:
            continue
        if option == "text":
            problems.append(f"{asked}: that run read another text; give it the same files with --text")
        else:
            name = f"--{option.replace('_', '-')}"
            problems.append(f"{asked}: that run had {name} {before} and this one has {here}; give {name} {before}")
    if problems:
        raise settings.SettingsError(
            [*problems, "the learning rate and the order of the text follow these; a resumed run must not change them"]
        )
