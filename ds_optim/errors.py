"""One error that lists every problem, on all ranks alike: none may go on, or wait, while another raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ds_optim.sharding.exchange import Ranks, rank_in_job

_SHOWN = 20  # problems in one message about a checkpoint

T = TypeVar("T")


def raise_all(problems: Sequence[str], subject: str) -> None:
    """One error that lists every problem, if there are any."""
    if problems:
        raise ValueError(f"{subject}:\n- " + "\n- ".join(problems))


def raise_on_all_ranks(problems: Sequence[str], subject: str, ranks: Ranks) -> None:
    """As `raise_all`, on all of these ranks if one has a problem: none may go on, or wait, while another raises."""
    everyones = ranks.everyones(problems).values()
    raise_all(list(dict.fromkeys(problem for of_rank in everyones for problem in of_rank)), subject)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or does not fit. The same on every rank."""


def raise_everywhere(ranks: Ranks, problems: Sequence[str], subject: str, remedy: str = "") -> None:
    """One `CheckpointError` with the problems of all ``ranks`` on each of them, if any has one."""
    everyones = ranks.everyones(list(problems)).values()
    found = list(dict.fromkeys(problem for of_rank in everyones for problem in of_rank))
    if found:
        raise CheckpointError(in_one(found, subject, remedy))


def in_one(problems: Sequence[str], subject: str, remedy: str = "") -> str:
    """One message for several problems."""
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    text = f"{subject}:\n- " + "\n- ".join([*problems[:_SHOWN], *more])
    return f"{text}\n{remedy}" if remedy else text


def on_every_rank(ranks: Ranks, work: Callable[[], T], subject: str) -> T:
    """Do something on each of these ranks, and raise on all of them if it fails on any. Returns this rank's result."""
    result: Any = None
    problem: list[str] = []
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        known = isinstance(error, CheckpointError)
        problem = [str(error) if known else f"rank {rank_in_job()}: {type(error).__name__}: {error}"]
    raise_everywhere(ranks, problem, subject)
    return result  # type: ignore[no-any-return]


def on_first_rank(ranks: Ranks, work: Callable[[], T], subject: str) -> T:
    """As `on_every_rank`, but only the first of them does it; all get its result."""
    mine = on_every_rank(ranks, lambda: work() if ranks.index == 0 else None, subject)
    return next(iter(ranks.everyones(mine).values()))  # type: ignore[return-value]
