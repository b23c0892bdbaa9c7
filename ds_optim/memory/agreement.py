"""How far a prediction is from a measurement of the same run, line by line, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass

from ds_optim.memory.record import MODEL_STATES, Category, Moment, RankRecord, Record

STATES, PASSING = 0.01, 0.10
"""Largest allowed differences, relative to the measurement: of each category of model states, and of activations and
peaks. Optimizer state must agree to the byte."""


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure of one rank.

    Attributes:
        rank: whose it is.
        name: what is compared, in words.
        measured: bytes.
        predicted: bytes.
        tolerance: relative to ``measured``; 0: to the byte.
    """

    rank: int
    name: str
    measured: int
    predicted: int
    tolerance: float

    @property
    def difference(self) -> float:
        """Relative to what was measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else float(self.predicted != 0)

    @property
    def passed(self) -> bool:
        return abs(self.difference) <= self.tolerance


def agreement(measured: Record, predicted: Record) -> list[ComparedFigure]:
    """Every figure that both records have, of every rank that both have.

    Raises:
        ValueError: they have no rank in common.
    """
    by_rank = {rank.rank: rank for rank in predicted.ranks}
    lines = [line for rank in measured.ranks if rank.rank in by_rank for line in _of_rank(rank, by_rank[rank.rank])]
    if not lines:
        raise ValueError("the measured and the predicted record have no rank in common")
    return lines


def _of_rank(measured: RankRecord, predicted: RankRecord) -> list[ComparedFigure]:
    rank = measured.rank
    lines = [ComparedFigure(rank, "optimizer state, bytes", measured.state_bytes, predicted.state_bytes, 0.0)]
    ours, theirs = measured.model_states, predicted.model_states
    for category in MODEL_STATES:
        if category is not Category.OPTIMIZER and (ours[category] or theirs[category]):
            lines.append(ComparedFigure(rank, category.value, ours[category], theirs[category], STATES))

    def both(name: str, one: Moment | None, other: Moment | None, *categories: Category) -> None:
        if one is not None and other is not None:
            pair = (one.bytes_of(*categories), other.bytes_of(*categories)) if categories else (one.total, other.total)
            lines.append(ComparedFigure(rank, name, *pair, PASSING))

    kept = measured.moment("after forward"), predicted.moment("after forward")
    both("activations after forward", *kept, Category.ACTIVATIONS)
    both("peak of forward", measured.peak_of("forward"), predicted.peak_of("forward"))
    both("peak of backward", measured.peak_of("backward"), predicted.peak_of("backward"))
    both("peak of step", measured.peak_of("step"), predicted.peak_of("step"))
    return lines
