"""Where ranks have different parameters: what is kept is accounted for, and what travels is what was planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ds_optim.memory.accountant import MemoryAccountant
from ds_optim.memory.record import Category
from engines import state_bytes
from parallel import Parallel, engine_of, train
from pool import Pools
from test_parallel_engines import of

RUNS = [
    of("AdamMini", slices=2, stage=1, steps=3),
    of("Muon", slices=2, stage=3, steps=3),
    of("Muon", stacks=2, stage=2, steps=3),
    of("Shampoo", experts=2, stage=1, steps=3),
    of("SWAN", stages=2, stage=1, steps=3),
]


def accounted(run: Parallel) -> dict[str, Any]:
    """A job: what the accountant finds on this rank, and what the optimizer really keeps."""
    with MemoryAccountant(strict=False) as accountant, engine_of(run) as (engine, clock):
        accountant.watch(engine)
        train(run, engine, clock, range(1, run.steps + 1))
        (rank,) = accountant.record().ranks
        last = rank.moment("after step")
        assert last is not None
        return {
            "rank": rank.rank,
            "kept": sum(state_bytes(engine).values()),
            "entries": sum(entry.bytes for entry in rank.state),
            "optimizer": last.bytes_of(Category.OPTIMIZER),
            "peaks": [moment.peak_of for moment in rank.moments if moment.peak_of],
        }


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_state_of_every_rank_is_accounted_for(pool: Pools, run: Parallel) -> None:
    reports = pool(4).run(accounted, run)
    assert sorted(one["rank"] for one in reports) == [0, 1, 2, 3]
    for one in reports:
        assert one["kept"] == one["entries"]
        assert one["optimizer"] >= one["entries"] - 8 * 64  # step counts, which are shared or not
        assert one["peaks"] == ["forward", "backward", "step"]


def counted(run: Parallel) -> tuple[int, int, int, int, int]:
    """A job: elements that this rank sent and received in a step, as counted and as planned; and the least of all."""
    with engine_of(run) as (engine, clock):
        train(run, engine, clock, range(1, 2))
        stepper = engine.basic_optimizer.stepper
        stepper.traffic.sent = stepper.traffic.received = 0
        train(run, engine, clock, range(2, 3))
        plans = {id(plan): (plan, stepper.shards.rank_of_owner(tensor)) for tensor, plan in planned(stepper)}
        sent = sum(int(plan.costs.sent[rank]) for plan, rank in plans.values())
        received = sum(int(plan.costs.received[rank]) for plan, rank in plans.values())
        least = sum(plan.costs.straddling for plan, _ in plans.values())
        return stepper.traffic.sent, stepper.traffic.received, sent, received, least


def planned(stepper: Any) -> list[tuple[Any, Any]]:
    return [(tensor, stepper.plans.place_of(tensor)[0]) for tensor in stepper.shards.tensors]


@pytest.mark.parametrize("run", [replace(run, optimizer="SWAN", options={}) for run in RUNS], ids=str)
def test_what_travels_is_what_was_planned(pool: Pools, run: Parallel) -> None:
    """To the element, and of tensor-parallel matrices not more than twice what cannot be avoided."""
    reports = pool(4).run(counted, run)
    for sent, received, to_send, to_receive, _ in reports:
        assert (sent, received) == (to_send, to_receive)
    moved, least = sum(sent + received for sent, received, *_ in reports) / 2, reports[0][-1]
    assert moved >= least or run.stages or run.experts  # where ranks have plans of their own
    if run.slices:
        assert moved <= 2 * least
