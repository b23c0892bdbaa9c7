"""Pipelines, experts and AutoTP: the bits of one process, whatever rank has which parameter, and checkpoints that move.

The models, gradients and one-process runs are those of `parallel`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim import checkpoint
from ds_optim.deepspeed.refusals import judge
from ds_optim.optimizers.registry import optimizers
from ds_optim.roles import infer_roles
from parallel import Parallel, alone, engine_of, held, names_of, ran, report, train, whole_of
from pool import Pools
from resumption import stored
from test_eight_bit_state import with_small_ones
from test_invariance import OFTEN

LIMIT = {"AdamMini": 1e-6}  # the sums of cut blocks in another order; all others are bitwise


def of(name: str, **settings: Any) -> Parallel:
    full = name if name in OFTEN else f"ds_optim.{name}"
    return Parallel(full, OFTEN[full], **settings)


def gaps(run: Parallel, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """What is further from one process's end than it may be, relatively."""
    limit = LIMIT.get(run.optimizer, 0.0)
    gap = {name: float(((found[name] - its).abs() / its.abs().clamp_min(0.1)).max()) for name, its in wanted.items()}
    assert found.keys() == wanted.keys()
    return {name: one for name, one in gap.items() if not one <= limit}


PIPELINES = [
    *((4, of(name, stages=2, stage=1)) for name in optimizers()),
    *((2, of(name, stages=2, stage=0)) for name in ("AdamMini", "Shampoo", "SWAN")),
    *((4, of(name, stages=2, stage=0)) for name in ("Muon", "SOAP", "NorMuon")),
    (3, of("Shampoo", stages=3, stage=0)),
    (4, of("Shampoo", stages=4, stage=0)),
]
EXPERTS = [
    *((4, of(name, experts=2, stage=stage)) for stage, name in enumerate(("Lion", "AdamMini", "Shampoo"))),
    *((4, of(name, experts=2, stage=stage)) for stage, name in enumerate(("AdamMini", "SOAP", "AdamW"))),
    *((4, of(name, experts=2, stage=2 - stage)) for stage, name in enumerate(("Muon", "NorMuon", "SWAN"))),
    (4, of("Adan", experts=4, stage=1)),
    (2, of("Muon", experts=2, stage=2)),
    (4, of("SOAP", experts=4, stage=2)),
]


SLICES = [
    *((4, of(name, slices=2, stage=stage % 3)) for stage, name in enumerate(optimizers())),
    *((2, of(name, slices=2, stage=stage)) for stage, name in enumerate(("Shampoo", "AdamMini", "SOAP"))),
    *((4, of(name, slices=2, stage=3)) for name in ("AdamMini", "Shampoo")),
    *((4, of(name, slices=2, stage=stage)) for stage, name in enumerate(("SWAN", "Muon", "AdamMini"))),
    (4, of("Muon", slices=2, stage=1, tied=True)),
    *((4, of(name, slices=2, stage=stage, fused=True)) for stage, name in enumerate(("Muon", "AdamMini", "Shampoo"))),
    (4, of("AdamMini", slices=2, stage=0, tied=True)),
]


STACKS = [
    *((4, of(name, stacks=2, stage=stage % 3)) for stage, name in enumerate(("AdamMini", "Shampoo", "Muon"))),
    *((4, of(name, stacks=2, stage=stage % 3)) for stage, name in enumerate(("SWAN", "NorMuon", "SOAP"))),
    *((4, of(name, stacks=2, stage=3)) for name in ("AdamMini", "Shampoo")),
    (4, of("AdamMini", stacks=4, stage=1)),
    (2, of("AdamW", stacks=2, stage=2)),
]


BOTH = [
    (4, of("Muon", slices=2, stage=2, precision="bf16")),
    (4, of("AdamMini", stages=2, stage=1, precision="bf16")),
    (4, of("Shampoo", stacks=2, stage=1, precision="bf16")),
    (4, of("SWAN", experts=2, stage=2, precision="bf16")),
    (4, of("Muon", stages=2, experts=2, stage=0)),
    (4, of("AdamMini", stages=2, experts=2, stage=1)),
    (8, of("Shampoo", stages=2, experts=2, stage=1)),
    (8, of("SWAN", slices=2, stage=2)),
    (8, of("AdamMini", stacks=4, stage=1)),
]


@pytest.mark.parametrize(("ranks", "run"), [*PIPELINES, *EXPERTS, *SLICES, *STACKS, *BOTH], ids=str)
def test_every_rule_ends_with_the_bits_of_one_process(pool: Pools, ranks: int, run: Parallel) -> None:
    reports = pool(ranks).run(ran, run)
    assert gaps(run, whole_of(reports), alone(run, reports)) == {}


def seen_roles(run: Parallel) -> Any:
    """The roles of an engine's parameters, and those that its model had before it was cut."""
    before = infer_roles(run.model())
    with engine_of(run) as (engine, _):
        shards = engine.basic_optimizer.shards
        return {name: shards.roles[name] for name in shards.shapes}, before


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_slices_have_the_roles_of_the_whole(pool: Pools, tied: bool) -> None:
    for found, before in pool(2).run(seen_roles, of("AdamMini", slices=2, tied=tied)):
        assert {key: replace(role, source="module") for key, role in found.items()} == {
            key: replace(role, source="module") for key, role in before.items()
        }
        assert found["model.layers.0.self_attn.k_proj.weight"].head_dim == 6


def stated(run: Parallel) -> Any:
    """The roles of an engine whose JSON states some by pattern, and the groups of its parameters."""
    with engine_of(run) as (engine, _):
        shards = engine.basic_optimizer.shards
        decays = [group["weight_decay"] for group in engine.basic_optimizer.param_groups]
        return {name: shards.roles[name].kind for name in shards.shapes}, decays


@pytest.mark.parametrize(
    ("run", "pattern"),
    [
        (of("AdamMini", stages=2, stage=0), "3.mlp.up_proj.weight"),  # of the second stage
        (of("AdamMini", experts=2), "*.deepspeed_experts.3.up_proj.weight"),  # of one rank of two
    ],
    ids=str,
)
def test_patterns_are_meant_for_the_whole_model(pool: Pools, run: Parallel, pattern: str) -> None:
    options = {**run.options, "roles": {pattern: "other", "*.up_proj.weight": "linear"}}
    reports = pool(4).run(stated, replace(run, options=options))
    kinds = {name: kind for roles, _ in reports for name, kind in roles.items() if "up_proj" in name}
    assert sorted(kinds.values()) == ["linear"] * (len(kinds) - 1) + ["other"]
    assert kinds[next(name for name in kinds if fnmatchcase(name, pattern))] == "other"


def refused(run: Parallel) -> str:
    with pytest.raises(ValueError, match="parameter groups") as caught, engine_of(run):
        pass
    return str(caught.value)


def test_stages_with_other_numbers_of_groups_are_refused(pool: Pools) -> None:
    """DeepSpeed would add the norms of one group up with those of another, and wait."""
    for said in pool(4).run(refused, of("AdamMini", stages=4, stage=1), timeout=60):
        assert "have 1 and 2 parameter groups" in said


def in_eight_bits(run: Parallel) -> str:
    with pytest.raises(RuntimeError, match="eight bits") as caught, engine_of(run):
        pass
    return str(caught.value)


def test_eight_bits_of_columns_are_refused_by_name(pool: Pools) -> None:
    full = Parallel("AdamMini", {"state_dtype": "int8"}, slices=2, stage=1)
    for said in pool(2).run(with_small_ones, in_eight_bits, full, timeout=60):
        assert "model.layers.0.self_attn.o_proj.weight: neighbouring elements" in said


HALF = 3


def saved(run: Parallel, directory: Path) -> dict[str, Any]:
    with engine_of(run) as (engine, clock):
        before = held(engine)
        train(run, engine, clock, range(1, HALF + 1))
        checkpoint.save(directory, engine, tag="half")
        return {"before": before}


def resumed(run: Parallel, directory: Path, again: Path) -> dict[str, Any]:
    """The rest of a run elsewhere, once it was loaded, and saved as it was loaded."""
    with engine_of(run) as (engine, clock):
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.zero_()
        checkpoint.load(directory, engine)
        checkpoint.save(again, engine, tag="half")
        train(run, engine, clock, range(HALF + 1, run.steps + 1))
        return report(engine)


STACKED = {"frozen": ("k_proj", "w2", "norm")}
FROZEN = {"frozen": ("k_proj", "down_proj", "norm")}
MOVES = {
    "two stages to one": ((4, {"stages": 2}), (2, {"stages": 1})),
    "one stage to three": ((2, {"stages": 1}), (3, {"stages": 3})),
    "experts on two ranks to one": ((4, {"experts": 2}), (2, {"experts": 1})),
    "experts on one rank to four": ((2, {"experts": 1}), (4, {"experts": 4})),
    "two stages of experts to one": ((4, {"stages": 2, "experts": 2}), (2, {"stages": 1, "experts": 1})),
    "two slices to one": ((4, {"slices": 2}), (2, {"slices": 1})),
    "experts on four ranks to one": ((4, {"experts": 4}), (2, {"experts": 1})),
    "stacks on one rank to two": ((2, {"stacks": 1}), (4, {"stacks": 2, "stage": 2})),
    "stacks on two ranks to one, some frozen": ((4, {"stacks": 2, **STACKED}), (2, {"stacks": 1, **STACKED})),
    "stacks on two ranks to one": ((4, {"stacks": 2}), (2, {"stacks": 1, "stage": 2})),
    "two slices to one, some frozen": ((4, {"slices": 2, **FROZEN}), (2, {"slices": 1, **FROZEN})),
    "two slices to one, some frozen, ZeRO-3": ((4, {"slices": 2, "stage": 3, **FROZEN}), (2, {"slices": 1, **FROZEN})),
    "one slice to two": ((2, {"slices": 1}), (2, {"slices": 2, "stage": 2})),
}


# Each move with a rule of each kind, in turn.
RULES = itertools.cycle((("AdamW", "SOAP"), ("AdamMini", "Shampoo")))
MOVED = [(move, rule) for move, rules in zip(MOVES, RULES, strict=False) for rule in rules]


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [(*MOVES[move], rule) for move, rule in MOVED],
    ids=[f"{move}-{rule}" for move, rule in MOVED],
)
def test_a_checkpoint_goes_on_elsewhere(pool: Pools, tmp_path: Path, before: Any, after: Any, name: str) -> None:
    (ranks, settings), (others, other_settings) = before, after
    run, other = of(name, **settings), of(name, **other_settings)
    first, second = tmp_path / "first", tmp_path / "second"
    begun = pool(ranks).run(saved, run, first)
    reports = pool(others).run(resumed, other, first, second)
    one, two = stored(first / "half"), stored(second / "half")
    assert one.keys() == two.keys()
    assert [key for key, values in one.items() if not torch.equal(values, two[key])] == []
    about = [json.loads((folder / "half" / "about.json").read_text()) for folder in (first, second)]
    assert about[0]["parameters"] == about[1]["parameters"]
    assert about[0]["module"] == about[1]["module"]
    marks = {key: float(values) for key, values in one.items() if "deepspeed_experts" in key and key.endswith("mark")}
    assert all(key.split(".")[-2] == str(int(value)) for key, value in marks.items())
    shapes = {name: shape for report in reports for name, shape in report["shapes"].items()}
    ends = [{**report, "before": {}} for report in reports]
    begins = [{**report, "shapes": shapes, "roles": {}} for report in begun]
    wanted = alone(run, [*ends, *begins], other, HALF)
    assert gaps(run, whole_of(reports), wanted) == {}


IMPOSSIBLE = {
    "a pipeline at ZeRO-2": (of("Muon", stages=2, stage=2), "incompatible with pipeline parallelism"),
    "experts at ZeRO-3": (of("Muon", experts=2, stage=3), "MoE is not supported with ZeRO Stage 3"),
    "a pipeline of slices": (of("Muon", stages=2, slices=2, stage=1), "Not able to determine model policy"),
    "stacks and slices": (of("Muon", stacks=2, slices=2, stage=1), "the plan is rejected as a whole"),
}


def said_of(run: Parallel) -> str:
    try:
        with engine_of(run):
            return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(("run", "said"), IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_what_cannot_be_is_said(pool: Pools, run: Parallel, said: str) -> None:
    """By DeepSpeed itself, deepspeed 0.19.8."""
    for found in pool(4).run(said_of, run, timeout=60):
        assert said in found


def test_what_nobody_tried_is_refused() -> None:
    config = of("Muon", stacks=2, slices=2, stage=1).config()
    assert any("folds experts over slices" in reason for reason in judge(config)[1])


def gone_on_by_deepspeed(run: Parallel, folder: Path) -> dict[str, Any]:
    """A run that DeepSpeed's own checkpoint carries over to another engine."""
    with engine_of(run) as (engine, clock):
        before = held(engine)
        train(run, engine, clock, range(1, HALF + 1))
        engine.save_checkpoint(folder)
    with engine_of(replace(run, steps=run.steps)) as (engine, clock):
        engine.load_checkpoint(folder)
        train(run, engine, clock, range(HALF + 1, run.steps + 1))
        return {"before": before, **report(engine)}


CARRIED = [
    *(of(name, slices=2, stage=stage) for stage, name in enumerate(("Muon", "AdamMini", "Shampoo", "Muon"))),
    *(of(name, stacks=2, stage=1 + stage) for stage, name in enumerate(("AdamMini", "Muon", "SWAN"))),
    of("Shampoo", experts=2, stage=1),
    *(of(name, stages=2, stage=stage) for stage, name in enumerate(("Muon", "Shampoo"))),
]


@pytest.mark.parametrize("run", CARRIED, ids=str)
def test_deepspeeds_own_checkpoints_go_on(pool: Pools, tmp_path: Path, run: Parallel) -> None:
    reports = pool(4).run(gone_on_by_deepspeed, run, tmp_path)
    assert gaps(run, whole_of(reports), alone(run, reports)) == {}


def partly_saved(run: Parallel, folder: Path) -> str:
    with engine_of(run) as (engine, clock):
        train(run, engine, clock, range(1, 2))
        with pytest.raises(RuntimeError) as caught:
            engine.save_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("run", [of("Muon", experts=2, stage=0), of("Shampoo", stacks=2, stage=0)], ids=str)
def test_a_save_of_which_some_ranks_would_hear_is_refused(pool: Pools, tmp_path: Path, run: Parallel) -> None:
    for said in pool(4).run(partly_saved, run, tmp_path, timeout=60):
        assert "use ds_optim.checkpoint.save" in said


def states_of(run: Parallel, name: str) -> dict[str, Tensor]:
    with engine_of(run) as (engine, clock):
        train(run, engine, clock, range(1, 3))
        return checkpoint.full_state(engine, name)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (of("Shampoo", stages=2), "3.mlp.up_proj.weight"),
        (of("AdamMini", experts=2), "2.mlp.deepspeed_moe.experts.deepspeed_experts.3.up_proj.weight"),
    ],
    ids=str,
)
def test_every_rank_sees_the_state_of_what_another_has(pool: Pools, run: Parallel, name: str) -> None:
    first, *others = pool(4).run(states_of, run, name)
    assert first
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(values, other[key]) for key, values in first.items())


def hears_of(run: Parallel, name: str) -> tuple[int, str]:
    """A gradient of one parameter is not finite at one step: when this rank hears of it, and what."""
    with engine_of(run) as (engine, clock):
        parameter = names_of(engine.module, run.experts).get(name)
        if parameter is not None:
            parameter.register_hook(lambda grad: grad / (0 if clock["step"] == 2 else 1))
        try:
            train(run, engine, clock, range(1, run.steps + 1))
        except RuntimeError as error:
            return clock["step"], str(error)
    return 0, ""


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (of("Muon", stages=2, stage=0), "3.mlp.up_proj.weight"),
        (of("Shampoo", experts=2, stage=0), "2.mlp.deepspeed_moe.experts.deepspeed_experts.3.up_proj.weight"),
    ],
    ids=str,
)
def test_every_rank_hears_of_an_update_that_was_withheld(pool: Pools, run: Parallel, name: str) -> None:
    for step, said in pool(4).run(hears_of, run, name, timeout=90):
        assert step == 4  # the one behind the next
        assert f"{name}, block 0" in said
