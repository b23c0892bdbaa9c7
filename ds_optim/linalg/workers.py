"""Small matrices on a CPU: a decomposition has one thread, several run at a time.

A decomposition of a few hundred rows gains little from a second thread, suffers from a busy one, and would round
differently: what becomes of a matrix must not depend on how many threads there are. A computation that needs some is
written as a `Stepwise`: it hands out jobs, and goes on when they are done, so that the jobs of many computations fill
all threads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class Job(NamedTuple):
    """A part of a computation.

    Attributes:
        cost: of running it, in any unit that all jobs have: the dearest begin first.
        elements: that are kept for it until the computation goes on.
        run: does it.
    """

    cost: float
    elements: int
    run: Callable[[], object]


Stepwise: TypeAlias = Generator[Sequence[Job], None, _T]
"""Yields jobs that may run in any order and at the same time; goes on when they are done."""

_ELEMENTS = 1 << 20  # jobs that keep so many per thread are enough to start as well
_JOBS_PER_THREAD = 8
"""Jobs that are enough to start: more of them fill threads better, and have more computations under way."""


def matrix_by_matrix(stack: Tensor, compute: Callable[[int], object], kept: int) -> Stepwise[None]:
    """``compute`` of the index of every matrix of a stack (B, n, ...): on a CPU as jobs, elsewhere one after the other.

    Args:
        compute: of cubic cost.
        kept: elements for each until the computation goes on, in units of n^2.
    """
    count, n = stack.shape[:2]
    if stack.device.type == "cpu":
        yield [Job(n**3, kept * n * n, functools.partial(compute, index)) for index in range(count)]
    else:
        for index in range(count):
            compute(index)


def side_by_side(tasks: Iterable[Stepwise[_T]]) -> Stepwise[list[_T]]:
    """Computations as one, whose jobs are theirs."""
    running, results = dict(enumerate(tasks)), dict[int, _T]()
    while running:
        jobs: list[Job] = []
        for index, task in list(running.items()):
            try:
                jobs += next(task)
            except StopIteration as end:
                results[index] = end.value
                del running[index]
        if jobs:
            yield jobs
    return [results[index] for index in sorted(results)]


def finish(task: Stepwise[_T]) -> _T:
    """Run a computation to its end, and return what it comes to."""
    while True:
        try:
            on_one_thread_each(next(task))  # nobody keeps jobs, and what they refer to, when they are done
        except StopIteration as end:
            result: _T = end.value
            return result


def finish_all(tasks: Iterable[Stepwise[Any]]) -> None:
    """Run computations to their ends: several are under way as long as they have too few jobs for all threads."""
    waiting, jobs = list[Stepwise[Any]](), list[Job]()
    for task in tasks:
        if _advance(task, jobs):
            waiting.append(task)
        threads = torch.get_num_threads()
        if len(jobs) >= _JOBS_PER_THREAD * threads or sum(job.elements for job in jobs) >= _ELEMENTS * threads:
            _finish_waiting(waiting, jobs)
    _finish_waiting(waiting, jobs)


def _advance(task: Stepwise[Any], jobs: list[Job]) -> bool:
    """Put a task's next jobs to the others; whether it has any."""
    found = next(task, None)
    jobs += found or ()
    return found is not None


def _finish_waiting(waiting: list[Stepwise[Any]], jobs: list[Job]) -> None:
    """Run tasks that have handed out these jobs to their ends, and empty both lists."""
    while waiting:
        on_one_thread_each(jobs)
        jobs.clear()
        waiting[:] = [task for task in waiting if _advance(task, jobs)]


def on_one_thread_each(jobs: Sequence[Job]) -> None:
    """Run jobs, each on a single thread of torch's; raises what one of them raises."""
    threads = torch.get_num_threads()
    jobs = sorted(jobs, key=lambda job: -job.cost)
    try:
        if threads > 1:
            torch.set_num_threads(1)  # of this thread; the linear algebra library's are everybody's, restored below
        if threads > 1 and len(jobs) > 1:
            list(_workers(threads).map(_run, [[job] for job in jobs]))
        else:
            for job in jobs:
                job.run()
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def _run(single: list[Job]) -> None:
    torch.set_num_threads(1)  # of this thread
    single.pop().run()  # which this thread forgets before others hear that it is done


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "ds_optim matrices")


os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork
