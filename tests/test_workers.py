"""Computations that hand out jobs: what they come to, what runs together, and on how many threads."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator

import pytest
import torch

from ds_optim.linalg import workers
from ds_optim.linalg.workers import Stepwise, finish, finish_all, side_by_side


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param  # whatever ran, and whether or not it went well
    torch.set_num_threads(before)


class Log:
    """Computations that square numbers, and what ran in which batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.done: list[int] = []
        self.elements = 1

    def squares(self, number: int, rounds: int) -> Stepwise[int]:
        for _ in range(rounds):
            found: list[int] = []

            def square(found: list[int] = found, number: int = number) -> None:
                assert torch.get_num_threads() == 1
                found.append(number**2)

            yield [workers.Job(number, self.elements, square)]
            number = found[0]
        self.done.append(number)
        return number

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = workers.on_one_thread_each

        def watched(jobs: list[workers.Job]) -> None:
            self.batches.append([len(jobs)])
            run(jobs)

        monkeypatch.setattr(workers, "on_one_thread_each", watched)


def test_a_computation_comes_to_what_it_returns_with_jobs_and_without() -> None:
    log = Log()
    assert finish(log.squares(3, 2)) == 81
    assert finish(log.squares(3, 0)) == 3


def test_computations_side_by_side_share_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    log.watch(monkeypatch)
    assert finish(side_by_side([log.squares(2, 2), log.squares(3, 0), log.squares(5, 1)])) == [16, 3, 25]
    assert log.batches == [[2], [1]]
    assert finish(side_by_side([])) == []


def test_so_many_are_under_way_as_fill_all_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    log = Log()
    log.watch(monkeypatch)
    finish_all(log.squares(number, 1) for number in range(30))
    full = workers._JOBS_PER_THREAD * threads
    assert log.batches == [[full]] * (30 // full) + ([[30 % full]] if 30 % full else [])
    assert sorted(log.done) == [number**2 for number in range(30)]
    log.batches.clear()
    finish_all(log.squares(number, 0) for number in range(5))
    assert log.batches == []


def test_few_are_under_way_that_keep_much(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    log.watch(monkeypatch)
    log.elements = workers._ELEMENTS * torch.get_num_threads() // 2
    finish_all(log.squares(number, 1) for number in range(6))
    assert log.batches == [[2], [2], [2]]


def test_nobody_keeps_what_a_job_was_given_when_it_is_done() -> None:
    kept: list[bool] = []

    def task() -> Stepwise[None]:
        given = torch.ones(3)
        alive = weakref.ref(given)
        yield [workers.Job(1, 1, functools.partial(torch.sum, given))]
        del given
        kept.append(alive() is not None)

    finish(task())
    finish(side_by_side([task(), task()]))
    finish_all(task() for _ in range(3))
    assert kept == [False] * 6


def test_what_a_job_raises_is_raised() -> None:
    def fails() -> None:
        raise ArithmeticError("a job")

    def task() -> Stepwise[None]:
        yield [workers.Job(1, 1, fails), workers.Job(2, 1, fails)]

    with pytest.raises(ArithmeticError, match="a job"):
        finish(task())
    with pytest.raises(ArithmeticError, match="a job"):
        finish_all([task()])
