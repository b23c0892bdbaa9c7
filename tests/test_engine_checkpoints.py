"""DeepSpeed's own checkpoints at the same number of ranks: a resumed run is bitwise the uninterrupted one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import Case, engine_for, masters, train
from pool import Pools

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SHAMPOO = {"max_preconditioner_dim": 8, "precondition_frequency": 3}


def interrupted(case: Case, folder: str) -> tuple[bool, set[str], list[int], list[int]]:
    """Whether saving after half the steps and resuming in a new engine ends in the same bits; what was loaded."""
    half = case.steps // 2
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, half + 1))
        engine.save_checkpoint(folder)
        train(engine, case, clock, range(half + 1, case.steps + 1))
        whole = masters(engine)
    # Other initial weights: everything must come from the checkpoint.
    with engine_for(replace(case, seed=case.seed + 1)) as (engine, _, clock):
        engine.load_checkpoint(folder)
        loaded = masters(engine)
        states = list(engine.basic_optimizer.state.values())
        dtypes = {f"{key} {value.dtype}" for state in states for key, value in state.items()}
        counts = [int(state["step"]) for state in states]
    with engine_for(case) as (engine, _, clock):
        engine.load_checkpoint(folder, load_optimizer_states=False)
        left_out = [int(state["step"]) for state in engine.basic_optimizer.state.values()]
    with engine_for(case) as (engine, _, clock):
        engine.load_checkpoint(folder)
        same = _same(loaded, masters(engine))
        train(engine, case, clock, range(half + 1, case.steps + 1))
        return same and _same(whole, masters(engine)), dtypes, counts, left_out


def _same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    def tensors(found: dict[str, Any]) -> list[Tensor]:
        return [values for _, fragments in sorted(found.items()) for _, _, values in fragments]

    return one.keys() == two.keys() and all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


CASES = [
    Case("ds_optim.AdamW", {"weight_decay": 0.1}, stage=0, precision="fp32"),
    Case("AdamMini", {"weight_decay": 0.1}, stage=0, precision="bf16"),
    Case("Adan", {"weight_decay": 0.1}, stage=1, precision="bf16_optimizer"),
    Case("AdamMini", {"weight_decay": 0.1}, stage=1, precision="bf16"),
    Case("ds_optim.Lion", {"state_dtype": "bf16"}, stage=2, precision="bf16"),
    Case("Adan", {}, stage=2, precision="bf16", zero=OFFLOAD),
    Case("AdamMini", {"weight_decay": 0.1}, stage=3, precision="bf16", zero={"sub_group_size": 300}),
    Case("ds_optim.Lion", {"weight_decay": 0.1}, stage=3, precision="fp32"),
    Case("Shampoo", SHAMPOO, stage=0, precision="fp32"),
    Case("Shampoo", SHAMPOO, stage=1, precision="bf16"),
    Case("Shampoo", SHAMPOO, stage=2, precision="fp32", zero=OFFLOAD),
    Case("Shampoo", SHAMPOO, stage=3, precision="bf16", zero={"sub_group_size": 300}),
    Case("SWAN", {}, stage=2, precision="bf16"),
    Case("SWAN", {}, stage=3, precision="fp32", zero=OFFLOAD),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.optimizer}-{case.stage}-{case.precision}")
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(pool: Pools, case: Case, tmp_path: Path) -> None:
    for same, dtypes, counts, left_out in pool(2).run(interrupted, case, str(tmp_path)):
        assert same
        for entry in dtypes:
            key, dtype = entry.split()
            bf16 = "state_dtype" in case.options and key != "step"
            whole = {"blocks": "torch.int64", **dict.fromkeys(("rooted", "failures", "waiting"), "torch.int32")}
            assert dtype == whole.get(key, "torch.bfloat16" if bf16 else "torch.float32"), entry
        assert set(counts) == {case.steps // 2}
        assert left_out == []
