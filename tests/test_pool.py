"""The pool of ranks that the distributed tests stand on: results, failures, hangs, and life after them."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import pool as pool_module
from pool import Pools, RanksFailedError


def sum_over_ranks(scale: float) -> tuple[int, torch.Tensor]:
    import deepspeed.comm as comm

    total = torch.full((3,), scale * (comm.get_rank() + 1))
    comm.all_reduce(total)
    return comm.get_rank(), total


def surroundings() -> dict[str, object]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names} | {"threads": torch.get_num_threads(), "pid": os.getpid()}


def draw() -> float:
    return float(torch.rand(()))


def narrow_view() -> dict[str, list[torch.Tensor]]:
    base = torch.arange(12.0)
    return {"views": [base[2:5], base.to(torch.bfloat16)[:1]]}


def fail_on(rank: int) -> None:
    print("about to look at the rank")
    if int(os.environ["RANK"]) == rank:
        raise ValueError(f"rank {rank} refuses")
    torch.distributed.barrier()


def die_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def sleep_for(seconds: float) -> None:
    time.sleep(seconds)


def unpicklable() -> object:
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_answers_in_order_and_collectives_work(pool: Pools, world_size: int) -> None:
    results = pool(world_size).run(sum_over_ranks, 2.0)
    assert [rank for rank, _ in results] == list(range(world_size))
    for _, total in results:
        assert torch.equal(total, torch.full((3,), 2.0 * sum(range(1, world_size + 1))))


def test_ranks_are_persistent_and_set_up_like_a_launcher_does(pool: Pools) -> None:
    first = pool(2).run(surroundings)
    assert [place.pop("RANK") for place in first] == ["0", "1"]
    assert [place.pop("LOCAL_RANK") for place in first] == ["0", "1"]
    pids = [place.pop("pid") for place in first]
    assert first == [{"WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "threads": 1}] * 2
    assert [place["pid"] for place in pool(2).run(surroundings)] == pids
    assert not set(pids) & {place["pid"] for place in pool(1).run(surroundings)}


def test_every_job_starts_from_the_same_random_state(pool: Pools) -> None:
    assert len(set(pool(2).run(draw) + pool(2).run(draw) + pool(1).run(draw))) == 1


def test_tensors_come_back_by_value_wherever_they_are(pool: Pools) -> None:
    (answer,) = pool(1).run(narrow_view)
    assert torch.equal(answer["views"][0], torch.tensor([2.0, 3.0, 4.0]))
    assert answer["views"][1].dtype == torch.bfloat16


def test_a_partial_of_a_function_can_be_sent(pool: Pools) -> None:
    assert pool(1).run(functools.partial(sum_over_ranks, scale=3.0))[0][0] == 0


def test_a_failing_rank_is_reported_with_its_traceback_and_does_not_hang_the_others(
    pool: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "GRACE", 1.0)
    with pytest.raises(RanksFailedError, match="rank 1 refuses") as caught:
        pool(2).run(fail_on, 1)
    assert set(caught.value.reports) == {0, 1}
    assert "ValueError" in caught.value.reports[1]
    assert "in fail_on" in caught.value.reports[1]
    assert "within 1 s of another rank's failure" in caught.value.reports[0]
    assert "about to look at the rank" in str(caught.value)
    assert "barrier" in str(caught.value), "the stack of the rank that waited should be shown"
    assert len(pool(2).run(draw)) == 2


def test_a_rank_that_dies_is_reported_and_replaced(pool: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "GRACE", 1.0)
    with pytest.raises(RanksFailedError, match="died with exit code -9"):
        pool(2).run(die_on, 0)
    assert len(pool(2).run(draw)) == 2


def test_a_job_that_takes_too_long_ends_the_pool(pool: Pools) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"no answer within 0\.5 s") as caught:
        pool(1).run(sleep_for, 60.0, timeout=0.5)
    assert time.monotonic() - start < 10.0
    assert "sleep_for" in str(caught.value)
    assert len(pool(1).run(draw)) == 1


def test_a_result_that_cannot_be_sent_is_an_error_of_the_job(pool: Pools) -> None:
    with pytest.raises(RanksFailedError, match="pickle"):
        pool(1).run(unpicklable)


def test_ranks_take_no_time_between_jobs(pool: Pools) -> None:
    pids = [place["pid"] for place in pool(2).run(surroundings)]
    ranks = [psutil.Process(int(str(pid))) for pid in pids]
    deadline = time.monotonic() + 10.0
    while any(rank.status() != psutil.STATUS_STOPPED for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(pool(2).run(draw)) == 2


@pytest.mark.parametrize("last", ["pools(1).run(test_pool.sleep_for, 60.0)", "time.sleep(60.0)"], ids=["busy", "idle"])
def test_no_rank_survives_a_parent_that_is_killed(tmp_path: Path, last: str) -> None:
    script = (
        "import test_pool, pool, time\n"
        "pools = pool.Pools()\n"
        "if __name__ == '__main__':\n"
        "    print(*[place['pid'] for place in pools(1).run(test_pool.surroundings)], flush=True)\n"
        f"    {last}\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 1
    deadline = time.monotonic() + 60.0  # the fork server has much to tidy up
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, pids))


def lives(pid: int) -> bool:
    """Also false of one that nobody asked for its exit status."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
