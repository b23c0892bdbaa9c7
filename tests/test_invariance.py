"""The same gradients give the same parameters, whatever the number of ranks, the ZeRO stage and the way it is set up.

A covering array of the factors: every pair of values that can occur together occurs in at least one case. The full
matrix is `benchmarks/full_matrix.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from ds_optim.releases import DEEPSPEED
from engines import Case, assembled, engine_for, run
from expected import by_one_process, by_oracle, distance
from pool import Pools

OPTIONS: dict[str, dict[str, Any]] = {
    "ds_optim.AdamW": {"betas": [0.9, 0.95], "weight_decay": 0.1},
    "ds_optim.Lion": {"betas": [0.95, 0.98], "weight_decay": 0.1},
    "Adan": {"weight_decay": 0.02},
    "AdamMini": {"betas": [0.9, 0.95], "weight_decay": 0.1},
    # Blocks of 8 straddle every boundary of these shapes; the buckets are small, so that there are several.
    "Shampoo": {
        "weight_decay": 0.05,
        "max_preconditioner_dim": 8,
        "precondition_frequency": 4,
        "exchange_bucket_size": 300,
    },
    "SWAN": {"weight_decay": 0.05, "exchange_bucket_size": 300},
    "ds_optim.Muon": {"weight_decay": 0.05, "exchange_bucket_size": 300},
    "NorMuon": {"weight_decay": 0.05, "exchange_bucket_size": 300, "momentum": 0.9},
    # Blocks of 3 are square but at the ends: a thin strip's factor has a null space, and only rounding to turn it.
    "SOAP": {
        "weight_decay": 0.05,
        "max_preconditioner_dim": 3,
        "precondition_frequency": 3,
        "exchange_bucket_size": 300,
    },
}
STEPS = dict.fromkeys(OPTIONS, 6) | {"Shampoo": 11, "SOAP": 8}  # blocks are refreshed twice
OFTEN = {
    **OPTIONS,
    **{n: {**OPTIONS[n], "max_preconditioner_dim": 8, "precondition_frequency": 2} for n in ("Shampoo", "SOAP")},
}
"""Where one process is the measure and no textbook, which wants more gradients in a factor.

In `Case.steps` steps every block is refreshed twice, or three times.
"""
# Of the fp64 textbook; iterations that let small singular values grow, and eigenvectors of factors in fp32.
TOLERANCE = {"SWAN": 3e-6, "ds_optim.Muon": 3e-6, "NorMuon": 3e-6, "SOAP": 1e-4}
STRATEGIES = ["0 fp32", "0 bf16", "1 fp32", "1 bf16", "1 bf16_optimizer", "2 fp32", "2 bf16", "3 fp32", "3 bf16"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "round robin": {"zero": {"round_robin_gradients": True}},
    "aligned": {"zero": {"round_robin_gradients": True, "parameter_alignment": True}},
    "offload": {"zero": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}},
    "sub-groups": {"zero": {"sub_group_size": 300}},
    "zero.Init": {"zero_init": True},
    "small buckets": {"zero": {"reduce_bucket_size": 300, "allgather_bucket_size": 300}},
}
if "parameter_alignment" not in DeepSpeedZeroConfig.model_fields:  # it came with 0.19.7
    del VARIANTS["aligned"]
STAGES = {
    "plain": "0123",
    "round robin": "12",
    "aligned": "12",
    "offload": "123",
    "sub-groups": "3",
    "zero.Init": "3",
    "small buckets": "12",
}
FACTORS: dict[str, list[Any]] = {
    "optimizer": list(OPTIONS),
    "strategy": STRATEGIES,
    "ranks": [1, 2, 3, 4],
    "variant": list(VARIANTS),
    "route": ["json", "client"],
    "groups": ["flat", "user's"],
    "tied": [False, True],
    "frozen": [(), ("embed_tokens", "k_proj")],
    "accumulation": [1, 4],
    "clipping": [0.0, 1.0],
    "unused": [None, 4],
    "layers": [2, 1],
}


def possible(row: list[Any]) -> bool:
    """Whether DeepSpeed has this combination at all, and it is worth its time."""
    values = dict(zip(FACTORS, row, strict=False))
    strategy, variant = values.get("strategy"), values.get("variant")
    if strategy is None or variant is None:
        return True
    if strategy[0] not in STAGES[variant]:
        return False
    if (strategy[0], variant, values.get("accumulation")) == ("2", "offload", 4) and DEEPSPEED.is_before("0.19.0"):
        return False  # refused, as is the next
    if strategy == "0 bf16" and values.get("frozen") and DEEPSPEED.is_before("0.19.1"):
        return False
    if values.get("optimizer") == "SOAP" and values.get("layers") == 2:
        return False  # so many blocks take most of the time
    return not ("bf16_optimizer" in strategy and variant != "plain")


def case_of(row: list[Any], seed: int = 0) -> tuple[Case, int]:
    """The case of one row of the array, and its number of ranks."""
    values = dict(zip(FACTORS, row, strict=True))
    stage, precision = values["strategy"].split()
    variant = VARIANTS[values["variant"]]
    case = Case(
        values["optimizer"],
        OPTIONS[values["optimizer"]],
        stage=int(stage),
        precision=precision,
        zero=variant.get("zero", {}),
        zero_init=variant.get("zero_init", False),
        client=values["route"] == "client",
        user_groups=values["groups"] != "flat",
        tied=values["tied"],
        frozen=values["frozen"],
        accumulation=values["accumulation"],
        clipping=values["clipping"],
        unused_from=values["unused"],
        layers=values["layers"],
        steps=STEPS[values["optimizer"]],
        seed=seed,
    )
    return case, values["ranks"]


def in_rows(metafunc: pytest.Metafunc, factors: dict[str, list[Any]]) -> None:
    """A case for each row of a covering array: not by a decorator, since ranks import these modules too."""
    if "row" in metafunc.fixturenames:
        rows = [list(row) for row in AllPairs(list(factors.values()), filter_func=possible)]
        metafunc.parametrize("row", rows, ids=lambda row: "-".join(map(str, row)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    in_rows(metafunc, FACTORS)


def check(pool: Pools, case: Case, ranks: int) -> None:
    """The case on real ranks: against the oracle, against one process, and the model's weights against the masters."""
    reports = pool(ranks).run(run, case)
    found = assembled(reports)
    assert distance(found, by_oracle(case)) <= TOLERANCE.get(case.optimizer, 1e-6)
    twin = by_one_process(case)
    if case.optimizer == "AdamMini" or case.clipping:  # the norm is DeepSpeed's, and the order in which it is added up
        assert distance(found, twin) <= TOLERANCE.get(case.optimizer, 1e-6)
    else:
        differing = [name for name, values in twin.items() if not torch.equal(values, found[name])]
        assert not differing, f"not bitwise the same as one process: {differing}"
    for report in reports:
        for name, weight in report["weights"].items():
            if name in found:
                assert torch.equal(weight.reshape(-1), found[name].to(weight.dtype)), name


def buckets_of(case: Case) -> int:
    """Of this rank, in a step of a rule of blocks."""
    with engine_for(case) as (engine, _, _):
        optimizer = engine.basic_optimizer
        plan, rank = optimizer.stepper.plans.listed[0], optimizer.shards.rank_of_owner(optimizer.shards.tensors[0])
        return len(plan.schedule(range(len(plan.layouts)), rank, case.options["exchange_bucket_size"]))


@pytest.mark.parametrize("options", [OPTIONS, OFTEN], ids=["", "often"])
@pytest.mark.parametrize("name", [name for name in OPTIONS if "exchange_bucket_size" in OPTIONS[name]])
def test_a_step_of_the_cases_has_several_buckets(pool: Pools, name: str, options: dict[str, dict[str, Any]]) -> None:
    assert min(pool(4).run(buckets_of, Case(name, options[name]))) > 1


def test_every_strategy_ends_where_the_textbook_does(
    pool: Pools, row: list[Any], request: pytest.FixtureRequest
) -> None:
    case, ranks = case_of(row, int(request.config.getoption("--seed")))
    check(pool, case, ranks)
