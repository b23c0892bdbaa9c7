"""A parameter that the model did not use counts as having zero gradient, at every stage.

DeepSpeed itself would hand over None (ZeRO-0), zeros (ZeRO-1/2) or the previous step's gradient (ZeRO-3, CPU offload).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines import Case, assembled, engine_for, run, train
from expected import by_oracle, distance
from pool import Pools

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


@pytest.mark.parametrize("optimizer", ["ds_optim.AdamW", "AdamMini"])
@pytest.mark.parametrize(
    ("stage", "precision", "zero"),
    [
        (0, "fp32", {}),
        (0, "bf16", {}),
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
        assert message.startswith("sometimes.weight: used for the first time in the middle")
