"""A parameter that the model did not use counts as having zero gradient, at every stage.

DeepSpeed itself would hand over None (ZeRO-0), zeros (ZeRO-1/2) or the previous step's gradient (ZeRO-3, CPU offload).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.releases import DEEPSPEED
from engines import Case, assembled, build_model, engine_for, masters, run, train
from expected import by_oracle, distance, gradients
from pool import Pools, RanksFailedError

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


@pytest.mark.parametrize("optimizer", ["ds_optim.AdamW", "AdamMini"])
@pytest.mark.parametrize(
    ("stage", "precision", "zero"),
    [
        (0, "fp32", {}),
        (0, "bf16", {}),
        (1, "bf16", {}),
        (1, "bf16_optimizer", {}),
        (2, "bf16", {}),
        (2, "bf16", OFFLOAD),
        (3, "bf16", {}),
        (3, "fp32", OFFLOAD),
    ],
)
def test_an_unused_parameter_has_zero_gradient(
    pool: Pools, optimizer: str, stage: int, precision: str, zero: dict[str, Any]
) -> None:
    case = Case(optimizer, {"weight_decay": 0.1}, stage=stage, precision=precision, zero=zero, unused_from=4, steps=7)
    assert distance(assembled(pool(2).run(run, case)), by_oracle(case)) <= 1e-6


WATCHED = pytest.mark.parametrize("zero", [{"stage": 3}, {"stage": 2, **OFFLOAD}, {"stage": 3, **OFFLOAD}], ids=str)
"""Where DeepSpeed keeps gradients in buffers that outlive the step."""


def norms_and_masters(case: Case) -> dict[str, Any]:
    """The run, with the global norm that the engine states after each step."""
    with engine_for(case) as (engine, _, clock):
        norms = []
        for step in range(1, case.steps + 1):
            train(engine, case, clock, range(step, step + 1))
            norms.append(float(engine.get_global_grad_norm()))
        return {"norms": norms, "masters": masters(engine)}


@WATCHED
def test_neither_the_norm_nor_clipping_sees_an_earlier_gradient(pool: Pools, zero: dict[str, Any]) -> None:
    options = {"weight_decay": 0.1}
    case = Case("ds_optim.AdamW", options, zero["stage"], zero=zero, unused_from=2, steps=3, clipping=0.5)
    reports = pool(2).run(norms_and_masters, case)
    shapes = {name: tuple(p.shape) for name, p in build_model(case).named_parameters()}
    for step, norm in enumerate(reports[0]["norms"], start=1):
        whole = gradients(replace(case, clipping=0.0), shapes, step)
        assert norm == pytest.approx(torch.cat([grad.reshape(-1) for grad in whole.values()]).norm().item(), rel=1e-6)
    assert distance(assembled(reports), by_oracle(case)) <= 1e-6


def join_and_leave(case: Case) -> dict[str, Any]:
    """Uses `sometimes` in step 1, then only in the second micro-batch of step 3 and in the first one of step 4."""
    tokens = torch.arange(12).view(1, 12)
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 2))
        for step, uses in ((2, (False, False)), (3, (False, True)), (4, (True, False))):
            clock["step"] = step
            for use_all in uses:
                engine.backward(engine(tokens, use_all))
                engine.step()
        return {"masters": masters(engine)}


def test_a_parameter_may_join_and_leave_in_the_middle_of_an_accumulation_window(pool: Pools) -> None:
    """DeepSpeed would add its gradient to what is left of an older one, or under offload take the older one instead."""
    cases = [
        Case("Adan", stage=zero["stage"], zero=zero, accumulation=2)
        for zero in ({"stage": 1}, {"stage": 3}, {"stage": 2, **OFFLOAD}, {"stage": 3, **OFFLOAD})
    ]
    if DEEPSPEED.is_before("0.19.5"):  # gradients of earlier passes alone are lost under offload
        for case in cases[2:]:
            with pytest.raises(RanksFailedError, match="that 1 parameters got in earlier backward passes than the la"):
                pool(2).run(join_and_leave, case)
        del cases[2:]
    wanted, *found = (assembled(pool(2).run(join_and_leave, case)) for case in cases)
    for weights in found:
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def drop_batches(case: Case, owner: str | None) -> dict[str, Any]:
    """Two steps, the second without `sometimes`; before it a batch that ``owner``'s ``zero_grad()`` throws away."""
    tokens = torch.arange(12).view(1, 12)
    with engine_for(case) as (engine, _, clock), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(engine, case, clock, range(1, 2))
        if owner is not None:
            clock["step"] = 9
            engine.backward(engine(tokens, True))
            (engine if owner == "engine" else engine.optimizer).zero_grad()
        train(engine, case, clock, range(2, 4))
        return {
            "masters": masters(engine),
            "said": [str(one.message) for one in said if "zero_grad" in str(one.message)],
        }


@pytest.mark.parametrize("owner", ["engine", "optimizer"])
@pytest.mark.parametrize(
    "case",
    [
        Case("Adan", stage=0),
        Case("Adan", stage=1, precision="bf16"),
        Case("Adan", stage=1, precision="bf16_optimizer"),
        Case("Adan", stage=2, accumulation=2),
        Case("Adan", stage=2, precision="bf16", extra={"data_types": {"grad_accum_dtype": "fp32"}}),
        Case("Adan", stage=2, precision="bf16", zero=OFFLOAD, extra={"data_types": {"grad_accum_dtype": "fp32"}}),
        Case("Adan", stage=2, zero=OFFLOAD, accumulation=2),
        Case("Adan", stage=3, accumulation=2),
        Case("Adan", stage=3, zero=OFFLOAD),
    ],
    ids=lambda case: f"{case.stage} {case.precision} {''.join(case.zero)}{' fp32 sums' * bool(case.extra)}",
)
def test_a_batch_that_is_thrown_away_leaves_no_trace(pool: Pools, case: Case, owner: str) -> None:
    case = replace(case, unused_from=2)
    undisturbed, dropped = (pool(2).run(drop_batches, case, who) for who in (None, owner))
    found, wanted = assembled(dropped), assembled(undisturbed)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(dropped[0]["said"]) == (case.accumulation > 1)  # where DeepSpeed would keep what is dropped
    assert not undisturbed[0]["said"]


def step_twice(case: Case) -> dict[str, Any]:
    """A step, and another one without a backward pass."""
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 2))
        engine.step()
        return {"masters": masters(engine)}


def test_a_step_without_a_backward_pass_has_no_gradient(pool: Pools) -> None:
    """As DeepSpeed does it at ZeRO-0; ZeRO-1, 2 and 3 fail there."""
    wanted, *found = (
        assembled(pool(2).run(step_twice, Case("ds_optim.AdamW", stage=stage, zero=zero)))
        for stage, zero in ((0, {}), (2, OFFLOAD), (3, OFFLOAD))
    )
    for weights in found:
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def roll_back(case: Case, folder: str, live: bool) -> dict[str, Any]:
    """A checkpoint after two steps; then a step without `sometimes`, in a new engine or in one that was rolled back."""
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 3))
        engine.save_checkpoint(folder)
        if live:
            train(engine, case, clock, range(3, 4))
            engine.load_checkpoint(folder)
            train(engine, replace(case, unused_from=0), clock, range(3, 4))
            return {"masters": masters(engine)}
    with engine_for(case) as (engine, _, clock):
        engine.load_checkpoint(folder)
        train(engine, replace(case, unused_from=0), clock, range(3, 4))
        return {"masters": masters(engine)}


@pytest.mark.parametrize("zero", [{"stage": 3}, {"stage": 2, **OFFLOAD}], ids=["ZeRO-3", "ZeRO-2 offload"])
def test_a_gradient_from_before_a_rollback_is_stale_too(pool: Pools, zero: dict[str, Any], tmp_path: Path) -> None:
    case = Case("ds_optim.AdamW", stage=zero["stage"], precision="bf16", zero=zero)
    fresh, rolled = (assembled(pool(2).run(roll_back, case, str(tmp_path / str(live)), live)) for live in (False, True))
    assert all(torch.equal(fresh[name], rolled[name]) for name in fresh)
