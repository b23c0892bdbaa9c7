"""``engine.load_checkpoint`` of what an optimizer of ours saved: on any ranks, at any ZeRO stage, or one error on all.

DeepSpeed's own form is for the ranks, the stage, the precision and the parameter groups that saved it; what cannot go
on from it DeepSpeed finds out when it has loaded the model's weights already, and blames other things. Here the files
are looked at first, on all ranks. What is DeepSpeed's to load, DeepSpeed loads; what is of other ranks, of another
stage or precision is read in the words of the canonical form, each rank taking what it needs out of the files of all;
and a canonical checkpoint is loaded as such. The files are mapped, not read.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_optim.checkpoint import save_load
from ds_optim.checkpoint.directory import ABOUT, folder_of
from ds_optim.checkpoint.ranges import Ranges
from ds_optim.checkpoint.translation import Origin, Translation, groups_at_zero_0, named_of
from ds_optim.deepspeed import engine_state
from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles, PartsOfModelsError
from ds_optim.deepspeed.events import around_load
from ds_optim.deepspeed.model_parts import is_apart, names_in, shapes_in, tensor_parallel_size
from ds_optim.deepspeed.names import may_be_ours, names
from ds_optim.errors import on_every_rank, raise_everywhere, raise_on_all_ranks
from ds_optim.latest import newest
from ds_optim.listing import first_of
from ds_optim.stepping.sharded import ShardedOptimizer

_ADAMS = ("adam", "adamw")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one rank sees of a checkpoint.

    Attributes:
        files: opened; None if they are not of a kind that is read here.
        differences: what DeepSpeed's own form does not bridge, and its translation does.
        problems: what neither of them does.
        advice: what helps then; empty if nothing is known to.
    """

    files: DeepSpeedFiles | None = None
    differences: Sequence[str] = ()
    problems: Sequence[str] = ()
    advice: str = ""


def resume_anywhere(engine: Any) -> None:
    """Let ``engine.load_checkpoint`` do so; other engines' stay as they are."""
    around_load(engine, _resume)


def _resume(load: Callable[[], Any], engine: Any, asked: dict[str, Any]) -> Any:
    """What ``engine.load_checkpoint`` returns.

    Args:
        load: DeepSpeed's own.
        asked: what it was asked for, by name.

    Raises:
        ValueError: on every rank, before anything is changed: why the checkpoint is not one to go on from, and what
            does all the same.
        CheckpointError: likewise, of files that are missing or damaged, and of another model.
    """
    optimizer: ShardedOptimizer = engine.basic_optimizer
    directory, tag = Path(asked["load_dir"]), asked["tag"]
    if tag is None:
        with suppress(OSError):  # DeepSpeed says so itself
            tag = newest(directory)
    found = optimizer.ranks.everyones((tag, tag is not None and (folder_of(directory, str(tag)) / ABOUT).exists()))
    if any(is_canonical for _, is_canonical in found.values()):
        return _load_canonical(engine, directory, str(tag), asked)
    if None in (one for one, _ in found.values()) or not asked["load_optimizer_states"] or asked["load_module_only"]:
        return load()

    subject = f"{directory} cannot be loaded here, nothing was changed"
    seen = on_every_rank(optimizer.ranks, lambda: _seen(engine, optimizer, directory, str(tag), asked), subject)
    raise_on_all_ranks([*seen.problems, *([seen.advice] if seen.problems else [])], subject, optimizer.ranks)
    if seen.files is None:
        return load()
    files = seen.files
    is_local = engine.use_node_local_storage()  # then no rank sees the files of all
    share = (
        files.files_of(engine.global_rank) if is_local else files.files[optimizer.ranks.index :: optimizer.ranks.size]
    )
    damaged = on_every_rank(optimizer.ranks, lambda: files.damages(share), subject)
    raise_everywhere(optimizer.ranks, damaged, f"DeepSpeed checkpoint {files.folder} is not whole, nothing was changed")
    if any(optimizer.ranks.everyones(bool(seen.differences)).values()):
        return _load_translated(engine, files, seen, asked, subject)
    problems = _state_problems(engine, optimizer, files)
    raise_on_all_ranks([*problems, *([seen.advice] if problems and seen.advice else [])], subject, optimizer.ranks)
    return load()


# -- what is there ------------------------------------------------------------------------------------------------


def _seen(engine: Any, optimizer: ShardedOptimizer, directory: Path, tag: str, asked: Mapping[str, Any]) -> _Seen:
    if not engine_state.writes_torchs_files(engine):
        return _Seen()
    try:
        # Objects of any class are accepted: DeepSpeed would unpickle these files in a moment.
        files = DeepSpeedFiles(directory, tag, trust=True, verify=False)
    except PartsOfModelsError:
        return _Seen()
    its = files.rank(0, []).optimizer
    differences = _differences(files, engine)
    problems = _other_optimizer(files.optimizer_name, engine)
    if str(int(engine.zero_optimization_stage())) in files.stage:  # elsewhere groups are saved in other pieces
        others, lie_otherwise = _other_groups(files, its, optimizer)
        (differences if lie_otherwise else problems).extend(others)
    if differences and (not may_be_ours(files.optimizer_name) or problems or asked["custom_load_fn"] is not None):
        problems, differences = [*differences, *problems], []
    if differences:
        problems += engine_state.problems(engine)
    has_advice = problems or _is_adams(files, its)
    return _Seen(files, differences, problems, _advice(files, its, directory, optimizer) if has_advice else "")


def _differences(files: DeepSpeedFiles, engine: Any) -> list[str]:
    """What DeepSpeed's own form does not bridge: ranks, ZeRO stages, precisions."""
    found = []
    stage, ranks = int(engine.zero_optimization_stage()), int(engine.seq_dp_world_size)
    if str(stage) not in files.stage:
        found.append(f"it was saved at ZeRO stage {files.stage}, this engine's is {stage}")
    if stage and files.is_zero and files.world_size != ranks:
        found.append(f"it was saved by {_ranks(files.world_size)}, here {'are' if ranks > 1 else 'is'} {ranks}")
    is_half = engine.bfloat16_enabled() if files.is_zero else engine.optimizer is not engine.basic_optimizer
    if tensor_parallel_size(engine) > 1 or is_apart(engine):
        found.append("it was saved of a whole model, here ranks have parts of it")
    if files.is_half != is_half and str(stage) in files.stage:
        one, other = ("bf16", "not") if files.is_half else ("another precision", "bf16")
        found.append(f"it was saved of a model in {one}, this engine's is {other}")
    return found


def _other_optimizer(name: str, engine: Any) -> list[str]:
    """Whether the configuration of that run named an optimizer that keeps other state. DeepSpeed's Adam is an AdamW.

    A configuration's optimizer may not be the one that trains: an object that DeepSpeed is handed prevails.
    """
    if engine.client_optimizer is not None and name.lower() == str(engine._config.optimizer_name).lower():
        return []
    ours, theirs = type(engine.basic_optimizer).__name__, name.rsplit(".", 1)[-1].lower()
    if not theirs or theirs == ours.lower() or (theirs in _ADAMS and ours.lower() in _ADAMS):
        return []
    return [f"it was saved by {name}, whose state is not {ours}'s"]


def _other_groups(
    files: DeepSpeedFiles, saved: Mapping[str, Any], optimizer: ShardedOptimizer
) -> tuple[list[str], bool]:
    """Whether the parameters of that run lay in other groups, or in another order, or were others.

    Returns:
        What differs, and whether it is only where the same parameters lie.
    """
    counts = len(saved["param_groups"]), len(optimizer.param_groups)
    if files.is_zero:
        there = [[(spec.name, spec.shape) for spec in layout.parameters] for layout in files.layouts([])]
        here = [[(s.name, s.shape) for s in bound.layout.parameters] for bound in optimizer.bound_tensors.values()]
        names_there, names_here = ({name for tensor in lists for name, _ in tensor} for lists in (there, here))
        shapes_there, shapes_here = ([[shape for _, shape in tensor] for tensor in lists] for lists in (there, here))
        is_same = there == here if names_there == names_here else shapes_there == shapes_here  # a model may be renamed
    else:
        names_there = names_here = set()  # DeepSpeed saves none
        is_same = _sizes(saved["param_groups"]) == _sizes(optimizer.param_groups)
    if is_same:
        return [], False
    gone, new = first_of(sorted(names_there - names_here)), first_of(sorted(names_here - names_there))
    problems = [f"it has {gone}, not trained here"] if gone else []
    problems += [f"it has not {new}, trained here"] if new else []
    lie_otherwise = files.is_zero and not problems
    if counts[0] != counts[1]:
        problems.append(
            f"its parameters are in {_groups(counts[0])}, here in {_groups(counts[1])}: for an optimizer that the JSON "
            "names, ds_optim makes a group without weight decay of norms and biases, unless "
            '"ds_optim": {"no_decay": []} stands at the top level of the JSON'
        )
    return problems or [
        "its parameters are in other groups or in another order: groups that you made, no_decay patterns, "
        "sub_group_size and round_robin_gradients must be those of that run"
    ], lie_otherwise


def _sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _groups(count: int) -> str:
    return f"{count} group{'s' * (count > 1)}"


def _is_adams(files: DeepSpeedFiles, saved: Mapping[str, Any]) -> bool:
    """Whether an AdamW saved it, whoever's: by the configuration, or else by what is kept."""
    if files.optimizer_name:
        return files.optimizer_name.rsplit(".", 1)[-1].lower() in _ADAMS
    states = [state for state in saved["state"].values() if state]
    return bool(states) and all(
        {"exp_avg", "exp_avg_sq"} <= set(state) <= {"step", "exp_avg", "exp_avg_sq"}
        and state["exp_avg_sq"].numel() == state["exp_avg"].numel()  # Adam-mini keeps fewer
        for state in states
    )


def _advice(files: DeepSpeedFiles, saved: Mapping[str, Any], directory: Path, optimizer: ShardedOptimizer) -> str:
    """What goes on from there all the same."""
    target, is_ours = type(optimizer).__name__, files.optimizer_name in names()
    source = names().get(files.optimizer_name, type(optimizer))
    if _is_adams(files, saved) and files.is_zero and not (is_ours and target == "AdamW"):
        return (
            "a warm start takes over what AdamW has learned, for any groups and any number of ranks: "
            f"engine.load_checkpoint({str(directory)!r}, load_optimizer_states=False), then "
            f"ds_optim.checkpoint.warm_start.warm_start({str(directory)!r}, engine), see docs/warm_start.md"
        )
    if not is_ours and _is_adams(files, saved):
        return (
            "at ZeRO stage 0 DeepSpeed saves no names: give warm_start the optimizer's state_dict() and names=[...], "
            "see docs/warm_start.md"
        )
    if not is_ours and files.optimizer_name:
        return "weights alone can be taken over: load_checkpoint(..., load_optimizer_states=False)"
    needs_model = not source.rule.is_elementwise or not files.is_zero
    convert = f"ds-optim checkpoint convert {shlex.quote(str(directory))} OUT{' --model CONFIG.JSON' * needs_model}"
    load = "ds_optim.checkpoint.load('OUT', engine, strict=False) allows other parameters to be trained"
    if source.__name__ == "AdamW" and target != "AdamW":
        load = "ds_optim.checkpoint.warm_start.warm_start('OUT', engine, weights=True), see docs/warm_start.md, goes on"
    elif source is not type(optimizer):
        load = "ds_optim.checkpoint.load('OUT', engine, load_optimizer_states=False) takes over weights alone"
    return f"`{convert}` makes a canonical checkpoint; then {load}, see docs/checkpoints.md"


def _state_problems(engine: Any, optimizer: ShardedOptimizer, files: DeepSpeedFiles) -> list[str]:
    """What the optimizer itself would say of its state; at ZeRO-3 its groups are empty but in a step."""
    rank = next(bound.rank for bound in optimizer.bound_tensors.values()) if files.is_zero else 0
    saved = files.rank(rank, []).optimizer
    fill = getattr(engine.optimizer, "_set_fp32_optimizer_param_groups", None)
    if fill is None:
        return optimizer.state_form.problems(saved)
    fill()
    try:
        return optimizer.state_form.problems(saved)
    finally:
        engine.optimizer._clear_fp32_optimizer_param_groups()


# -- what DeepSpeed does not load ---------------------------------------------------------------------------------


def _load_canonical(engine: Any, directory: Path, tag: str, asked: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    ranks = engine.basic_optimizer.ranks
    training = save_load.known(engine, None, ranks, "nothing can be loaded into this")
    stored = save_load.opened(ranks, directory, tag)
    if asked["load_module_only"]:
        stored = replace(stored, about={**stored.about, "engine": None})
    if asked["load_module_only"] or not asked["load_lr_scheduler_states"]:
        stored = replace(stored, schedule=None)
    save_load.put_back(training, stored, states=asked["load_optimizer_states"] and not asked["load_module_only"])
    return str(stored.folder), stored.client_state or {}


def _load_translated(
    engine: Any, files: DeepSpeedFiles, seen: _Seen, asked: Mapping[str, Any], subject: str
) -> tuple[str, dict[str, Any]]:
    optimizer: ShardedOptimizer = engine.basic_optimizer
    training = save_load.known(engine, None, optimizer.ranks, subject)

    def translated() -> Translation:
        shapes = shapes_in(engine.module)
        run = Origin(
            type(optimizer),
            files.config or engine._config._param_dict,
            {name: shapes[parameter] for parameter, name in names_in(engine.module).items()},
            optimizer.shards.roles,
            {"int8_embeddings": optimizer.stepper.options.int8_embeddings},
            f"DeepSpeed itself cannot load it: {'; '.join(seen.differences)}.",
        )
        return Translation(files, run, groups_at_zero_0(files, run, named_of(engine.module)))

    its = on_every_rank(optimizer.ranks, translated, subject)

    def read(wanted: Mapping[str, Ranges], _: Any) -> None:
        where = (optimizer.ranks.index + 0.5) / optimizer.ranks.size
        on_every_rank(optimizer.ranks, lambda: its.read(wanted, where), f"reading {files.folder} failed half-way")

    about = {**its.about, "frozen_left_out": not asked["load_module_strict"]}
    schedule = files.main.get("lr_scheduler") if asked["load_lr_scheduler_states"] else None
    save_load.put_back(training, save_load.Stored(files.folder, about, read, schedule))
    return str(files.folder), files.client_state
