"""Why DeepSpeed's own ``load_checkpoint`` could not go on from a directory with an optimizer of ours, and what can.

DeepSpeed finds out when it has loaded the model's weights already, and blames other things: a padding setting where a
parameter group was added, a missing file where the ZeRO stage is another. Here the files are looked at first, on all
ranks. They are mapped, not read; what cannot be opened is left to DeepSpeed, which says so itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles
from ds_optim.deepspeed.events import around_load
from ds_optim.deepspeed.facts import LATEST
from ds_optim.deepspeed.names import names
from ds_optim.errors import raise_all, raise_on_all_ranks
from ds_optim.listing import first_of
from ds_optim.stepping.sharded import ShardedOptimizer

_ADAMS = ("adam", "adamw")


@dataclass(frozen=True, slots=True)
class _Saved:
    """What one rank sees of a checkpoint.

    Attributes:
        problems: what keeps this engine from going on from it, whatever the values in it are.
        advice: what helps; empty if nothing is known to.
        optimizer: the state dict that this rank's optimizer would be given, if there are no problems.
        failure: why it cannot be opened; empty if it can.
    """

    problems: Sequence[str] = ()
    advice: str = ""
    optimizer: Mapping[str, Any] | None = None
    failure: str = ""


def judge_resuming(engine: Any, directory: Path, tag: str | None) -> None:
    """Refuse a checkpoint of DeepSpeed's that an engine with an optimizer of ours cannot go on from. A collective.

    Args:
        engine: whose ``load_checkpoint`` is to load weights and optimizer state.
        directory: as is ``tag`` (None: the one that ``latest`` names), what ``load_checkpoint`` was given.

    Raises:
        ValueError: on every rank, before anything is changed: every reason, and what goes on from there all the same.
    """
    optimizer: ShardedOptimizer = engine.basic_optimizer
    saved = _seen(engine, optimizer, directory, tag)
    subject = f"{directory} cannot be loaded by DeepSpeed's load_checkpoint here, nothing was changed"
    raise_on_all_ranks([*saved.problems, *([saved.advice] if saved.problems else [])], subject, optimizer.ranks)
    failures = list(optimizer.ranks.everyones(saved.failure).values())
    if any(failures):
        # A rank that DeepSpeed stops alone would keep the others waiting for it.
        is_of_some = not all(failures) and not engine.use_node_local_storage()
        raise_all([failure for failure in failures if failure] if is_of_some else [], subject)
        return
    assert saved.optimizer is not None
    problems = _state_problems(engine, optimizer, saved.optimizer)
    raise_on_all_ranks([*problems, *([saved.advice] if problems and saved.advice else [])], subject, optimizer.ranks)


def _seen(engine: Any, optimizer: ShardedOptimizer, directory: Path, tag: str | None) -> _Saved:
    try:
        if tag is None:
            tag = (directory / LATEST).read_text(encoding="utf-8").strip()
        # Objects of any class are accepted: DeepSpeed unpickles these files in a moment.
        files = DeepSpeedFiles(directory, str(tag), trust=True, verify=False)
        its = files.rank(0, []).optimizer
        problems = [*_differences(files, engine), *_other_optimizer(files.optimizer_name, engine)]
        if str(int(engine.zero_optimization_stage())) in files.stage:  # elsewhere groups are saved in other pieces
            problems += _other_groups(files, its, optimizer)
        if problems:
            return _Saved(problems, _advice(files, its, directory, optimizer))
        if files.is_zero:
            its = files.rank(next(bound.rank for bound in optimizer.bound_tensors.values()), []).optimizer
        return _Saved(optimizer=its, advice=_advice(files, its, directory, optimizer) if _is_adams(files, its) else "")
    except Exception as error:  # not there, damaged, of another kind of checkpoint engine, of model parallelism
        return _Saved(failure=f"rank {engine.global_rank}: {error}")


def _differences(files: DeepSpeedFiles, engine: Any) -> list[str]:
    """What DeepSpeed's own form does not bridge: ranks, ZeRO stages, precisions."""
    found = []
    stage, ranks = int(engine.zero_optimization_stage()), int(engine.seq_dp_world_size)
    if str(stage) not in files.stage:
        found.append(f"it was saved at ZeRO stage {files.stage}, this engine's is {stage}")
    if stage and files.is_zero and files.world_size != ranks:
        found.append(f"it was saved by {_ranks(files.world_size)}, here {'are' if ranks > 1 else 'is'} {ranks}")
    is_half = engine.bfloat16_enabled() if files.is_zero else engine.optimizer is not engine.basic_optimizer
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


def _other_groups(files: DeepSpeedFiles, saved: Mapping[str, Any], optimizer: ShardedOptimizer) -> list[str]:
    """Whether the parameters of that run lay in other groups, or in another order, or were others."""
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
        return []
    gone, new = first_of(sorted(names_there - names_here)), first_of(sorted(names_here - names_there))
    problems = [f"it has {gone}, not trained here"] if gone else []
    problems += [f"it has not {new}, trained here"] if new else []
    if counts[0] != counts[1]:
        problems.append(
            f"its parameters are in {_groups(counts[0])}, here in {_groups(counts[1])}: for an optimizer that the JSON "
            "names, ds_optim makes a group without weight decay of norms and biases, unless "
            '"ds_optim": {"no_decay": []} stands at the top level of the JSON'
        )
    return problems or [
        "its parameters are in other groups or in another order: groups that you made, no_decay patterns, "
        "sub_group_size and round_robin_gradients must be those of that run"
    ]


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
    load = "ds_optim.checkpoint.load('OUT', engine)"
    if source.__name__ == "AdamW" and target != "AdamW":
        load = "ds_optim.checkpoint.warm_start.warm_start('OUT', engine, weights=True), see docs/warm_start.md, and"
    elif source is not type(optimizer):
        load = "ds_optim.checkpoint.load('OUT', engine, load_optimizer_states=False), weights alone"
    return (
        f"`{convert}` makes a checkpoint for any ranks, ZeRO stage and precision; then {load}, see docs/checkpoints.md"
    )


def _state_problems(engine: Any, optimizer: ShardedOptimizer, saved: Mapping[str, Any]) -> list[str]:
    """What the optimizer itself would say of its state; at ZeRO-3 its groups are empty but in a step."""
    fill = getattr(engine.optimizer, "_set_fp32_optimizer_param_groups", None)
    if fill is None:
        return optimizer.state_form.problems(saved)
    fill()
    try:
        return optimizer.state_form.problems(saved)
    finally:
        engine.optimizer._clear_fp32_optimizer_param_groups()


def guard_resuming(engine: Any) -> None:
    """Let ``engine.load_checkpoint`` judge first; other engines' stay as they are."""

    def judged(load: Callable[[], Any], engine: Any, asked: dict[str, Any]) -> Any:
        if asked["load_optimizer_states"] and not asked["load_module_only"]:
            judge_resuming(engine, Path(asked["load_dir"]), asked["tag"])
        return load()

    around_load(engine, judged)
