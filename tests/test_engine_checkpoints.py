"""DeepSpeed's own checkpoints at the same number of ranks: a resumed run is bitwise the uninterrupted one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_optim
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


def refused(case: Case, other: Case, folder: str) -> str:
    """What a rank is told that loads a checkpoint of something else."""
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 3))
        engine.save_checkpoint(folder)
    with engine_for(other) as (engine, _, _):
        try:
            engine.load_checkpoint(folder)
        except ValueError as error:
            return str(error)
    return "nothing"


Q_PROJ = {"ds_optim": {"roles": {"llama.model.layers.0.self_attn.q_proj.weight": "linear"}}}


@pytest.mark.parametrize(
    ("case", "other", "word"),
    [
        (Case("AdamMini", stage=2), Case("ds_optim.Lion", stage=2), "Lion keeps"),
        (Case("AdamMini", stage=3), Case("AdamMini", stage=3, extra=Q_PROJ), "other roles|other blocks"),
        (
            Case("Shampoo", SHAMPOO, stage=1),
            Case("Shampoo", {**SHAMPOO, "max_preconditioner_dim": 9}, stage=1),
            "was 8",
        ),
    ],
    ids=lambda case: case.optimizer if isinstance(case, Case) else str(case),
)
def test_a_checkpoint_of_something_else_is_refused(
    pool: Pools, case: Case, other: Case, word: str, tmp_path: Path
) -> None:
    for said in pool(2).run(refused, case, other, str(tmp_path)):
        assert re.search(word, said), said


@pytest.mark.parametrize("cls", [ds_optim.AdamMini, ds_optim.Shampoo])
def test_other_roles_are_told_from_equal_sizes(cls: Any) -> None:
    linears: list[dict[str, Any]] = [{"*": {"kind": "linear", "output_dim": dim}} for dim in (0, 1)]
    if cls is ds_optim.Shampoo:
        linears = [{"*.0": "linear", "*.1": "embedding"}, {"*.0": "embedding", "*.1": "linear"}]
    optimizers = []
    for roles in linears:
        parameters = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
        optimizers.append(cls([(f"layer.{index}", p) for index, p in enumerate(parameters)], roles=roles))
        for parameter in parameters:
            parameter.grad = torch.ones(8, 8)
        optimizers[-1].step()
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    assert all("blocks" not in group for group in optimizers[0].param_groups)
    with pytest.raises(ValueError, match=r"other blocks|keeps"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
