"""What the branches say: the largest batch whose loss stays within the tolerance, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ds_optim.batch_size.branch_runs import DIVERGED, BranchResult

Finding = Literal["between", "at least", "none", "unknown"]

_DOUBT = (
    " A difference that decides this is less than two standard errors from the tolerance: repeat it (--repeats), "
    "or train for longer."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One batch size.

    Attributes:
        batch: sequences per step.
        loss: held-out loss in nats per token, mean over the repeats; NaN if one of them has none.
        difference: from the baseline's.
        standard_error: of the difference: over held-out sequences and, from two repeats on, over repeats; NaN if
            neither is known, 0 for the baseline itself.
        within: whether the difference is within the tolerance; None if it is not known.
        clear: whether the difference is two standard errors or more away from the tolerance; None if it is not known.
        failure: why there is no loss.
    """

    batch: int
    loss: float
    difference: float
    standard_error: float
    within: bool | None
    clear: bool | None
    failure: str


@dataclass(frozen=True, slots=True)
class CriticalBatch:
    """The critical batch size.

    Attributes:
        kind: ``between``: ``largest`` is within the tolerance and ``first_outside``, the next that was tried, is not;
            ``at least``: all that could be judged are within; ``none``: no batch above the baseline is within;
            ``unknown``: nothing can be said.
        largest: the largest batch within the tolerance; for ``none`` the baseline.
        first_outside: the smallest batch above it that is not.
        words: one sentence.
    """

    kind: Finding
    largest: int | None
    first_outside: int | None
    words: str


def rows(outcomes: Sequence[BranchResult], baseline: int, tolerance: float) -> list[Row]:
    """One row per batch size, ascending.

    Args:
        outcomes: of all branches and repeats.
        baseline: the batch that the others are held against.
        tolerance: nats per token by which a loss may be higher.
    """
    by_batch: dict[int, list[BranchResult]] = {}
    for outcome in sorted(outcomes, key=lambda one: (one.branch.batch, one.branch.repeat)):
        by_batch.setdefault(outcome.branch.batch, []).append(outcome)
    return [_row(batch, by_batch, baseline, tolerance) for batch in by_batch]


def judge(table: Sequence[Row], baseline: int, tolerance: float) -> CriticalBatch:
    """Go up from the baseline and stop at the first batch that is not within the tolerance.

    A branch that diverged is not. What failed otherwise says nothing, and nothing beyond it is looked at.
    """
    start = next((row for row in table if row.batch == baseline), None)
    if start is None or start.failure:
        why = f": {start.failure}" if start else ""
        return CriticalBatch("unknown", None, None, f"The baseline of {baseline:,} sequences has no loss{why}.")
    largest, missing = start, None
    for row in (row for row in table if row.batch > baseline):
        if row.within is None:
            missing = row
            break
        if not row.within:
            doubt = "" if row.clear is not False and largest.clear is not False else _DOUBT
            if largest is start:
                words = (
                    f"No larger batch stays within {tolerance:g} of the baseline's loss: the critical batch size is "
                )
                words += f"below {row.batch:,} sequences.{doubt}"
                return CriticalBatch("none", baseline, row.batch, words)
            words = f"The critical batch size is {largest.batch:,} sequences or more, and less than {row.batch:,}."
            return CriticalBatch("between", largest.batch, row.batch, words + doubt)
        largest = row
    because = f" {missing.batch:,} cannot be judged: {missing.failure}." if missing else " Nothing larger was tried."
    if largest is start:
        return CriticalBatch("unknown", None, None, f"Nothing can be said.{because}")
    doubt = _DOUBT if largest.clear is False else ""
    words = f"The critical batch size is at least {largest.batch:,} sequences.{because}{doubt}"
    return CriticalBatch("at least", largest.batch, None, words)


def _row(batch: int, by_batch: Mapping[int, Sequence[BranchResult]], baseline: int, tolerance: float) -> Row:
    own, base = by_batch[batch], by_batch.get(baseline, [])
    failures = [outcome.failure for outcome in own if outcome.failure]
    if failures:
        # To end without a finite loss is as far outside as can be; a process that failed says nothing.
        diverged = DIVERGED in failures
        within, clear = (False, True) if diverged else (None, None)
        return Row(batch, math.nan, math.nan, math.nan, within, clear, failures[0])
    loss = statistics.fmean(outcome.loss for outcome in own)
    if not base or any(outcome.failure for outcome in base):
        return Row(batch, loss, math.nan, math.nan, None, None, "")
    if batch == baseline:
        return Row(batch, loss, 0.0, 0.0, True, None, "")
    pairs = list(zip(own, base, strict=True))
    differences = [one.loss - other.loss for one, other in pairs]
    difference = statistics.fmean(differences)
    error = _standard_error(pairs, differences)
    within = difference <= tolerance
    clear = None if math.isnan(error) else abs(difference - tolerance) >= 2 * error
    return Row(batch, loss, difference, error, within, clear, "")


def _standard_error(pairs: Sequence[tuple[BranchResult, BranchResult]], differences: Sequence[float]) -> float:
    """Of two independent sources: which sequences were held out, and which were trained on."""
    squares = []
    counts = {len(outcome.losses) for pair in pairs for outcome in pair}
    if len(counts) == 1 and min(counts) > 1:
        each = [statistics.fmean(one.losses[i] - other.losses[i] for one, other in pairs) for i in range(counts.pop())]
        squares.append(statistics.variance(each) / len(each))
    if len(differences) > 1:
        squares.append(statistics.variance(differences) / len(differences))
    return math.sqrt(sum(squares)) if squares else math.nan
