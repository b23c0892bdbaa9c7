"""A parameter that the model did not use counts as having zero gradient, at every stage.

DeepSpeed itself would hand over None (ZeRO-0), zeros (ZeRO-1/2) or the previous step's gradient (ZeRO-3, CPU offload).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Case, assembled, engine_for, masters, run, train
from expected import by_oracle, distance
from pool import Pools

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


def join_late(case: Case) -> str:
    """Uses `sometimes` in step 1, then only in the second micro-batch of step 3; returns the error."""
    tokens = torch.arange(12).view(1, 12)
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 2))
        for step, uses in ((2, (False, False)), (3, (False, True))):
            clock["step"] = step
            for use_all in uses:
                engine.backward(engine(tokens, use_all))
                try:
                    engine.step()
                except RuntimeError as error:
                    return str(error)
    return "no error"


@pytest.mark.parametrize("zero", [{"stage": 3}, {"stage": 2, **OFFLOAD}], ids=["ZeRO-3", "ZeRO-2 offload"])
def test_joining_in_the_middle_of_an_accumulation_window_is_refused(pool: Pools, zero: dict[str, Any]) -> None:
    case = Case("ds_optim.AdamW", stage=zero["stage"], zero=zero, accumulation=2)
    for message in pool(2).run(join_late, case):
        assert message.startswith("sometimes.weight: used for the first time in a later backward pass")


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
