"""One rank's predicted record: what it holds, and the curves of its passes, as moments, peaks and a timeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_optim.memory.record import Amount, Category, CountedBy, Moment, Phase, RankRecord, Sample, StateEntry
from ds_optim.memory.simulate import Timeline
from ds_optim.memory.strategies import Bytes, Terms, total
from ds_optim.sharding.boxes import Ints

_SAMPLES = 200  # points of a timeline that are kept


@dataclass(frozen=True, slots=True)
class RankHoldings:
    """What one rank holds, activations apart.

    Attributes:
        rank: its place.
        elements: parameter elements that its optimizer updates, padding included.
        terms: of the strategy.
        entries: the optimizer's state.
        workspaces: what the optimizer makes at the fullest moments of its step.
    """

    rank: int
    elements: int
    terms: Terms
    entries: list[StateEntry]
    workspaces: list[Bytes]


def rank_record(one: RankHoldings, offloads: bool, timeline: Timeline | None) -> RankRecord:
    """The predicted moments, peaks and timeline of a rank.

    Args:
        one: what it holds.
        offloads: whether optimizer state lies in host memory.
        timeline: of its passes; None leaves forward and backward out.
    """
    terms, entries = one.terms, one.entries
    state = sum(entry.bytes for entry in entries)
    offloaded = dict(terms.offloaded)
    if offloads:
        offloaded[Category.OPTIMIZER] = state
    on_host = sum(offloaded.values())
    steady = {**terms.steady, Category.OPTIMIZER: state}

    def moment(amounts: Mapping[Category, int], **named: Any) -> Moment:
        return Moment(amounts=_amounts(amounts), on_host=on_host, **named)

    at_init = _added(steady, {Category.PARAMETERS: -terms.persistent, Category.OPTIMIZER: -state})
    moments = [
        Moment(name="after init", amounts=_amounts(at_init), on_host=on_host - offloaded.get(Category.OPTIMIZER, 0))
    ]
    samples: list[Sample] = []
    after_backward = _added(steady, terms.after_backward)
    if timeline is not None:
        held = {category: np.full(len(timeline.forward), size) for category, size in terms.held.items()}
        forward = _curves(steady, timeline.forward, {**held, **terms.forward(timeline)})
        extra = terms.backward(timeline)
        length = max([len(timeline.backward), *(len(curve) for curve in extra.values())])
        left = np.append(timeline.backward, np.full(length - len(timeline.backward), timeline.backward[-1]))
        backward = _curves(steady, left, extra)
        moments += [
            moment(_at(forward, _top(forward)), peak_of="forward"),
            moment(_at(forward, -1), name="after forward"),
            moment(_at(backward, _top(backward)), peak_of="backward"),
        ]
        samples = [*_sampled(forward, "forward", 0.0, 0.35), *_sampled(backward, "backward", 0.35, 0.8)]
    moments.append(moment(after_backward, name="after backward"))
    inside = _added(steady, {Category.PARAMETERS: -terms.persistent})
    during = _added(inside, terms.step)
    candidates = [_added(during, workspace) for workspace in one.workspaces] + [_added(inside, terms.before_optimizer)]
    moments += [moment(max(candidates, key=total), peak_of="step"), moment(steady, name="after step")]
    if samples:
        rows = [after_backward, *reversed(candidates), steady]
        samples += [
            Sample(at=0.8 + 0.2 * (index + 1) / len(rows), phase="step", bytes=_present(row))
            for index, row in enumerate(rows)
        ]
    return RankRecord(rank=one.rank, elements=one.elements, moments=moments, state=entries, timeline=samples)


def _amounts(amounts: Mapping[Category, int]) -> dict[Category, Amount]:
    methods = {
        Category.ACTIVATIONS: CountedBy.SIMULATION,
        Category.WORKSPACE: CountedBy.FORMULA,
        Category.EXCHANGE: CountedBy.FORMULA,
        Category.BUCKETS: CountedBy.FORMULA,
    }
    return {
        category: Amount(bytes=int(amounts[category]), method=methods.get(category, CountedBy.LAYOUT))
        for category in Category
        if amounts.get(category)
    }


def _added(one: Mapping[Category, int], other: Mapping[Category, int]) -> Bytes:
    return {category: one.get(category, 0) + other.get(category, 0) for category in {**one, **other}}


def _present(amounts: Mapping[Category, int]) -> Bytes:
    return {category: int(amounts[category]) for category in Category if amounts.get(category)}


def _curves(steady: Mapping[Category, int], activations: Ints, extra: Mapping[Category, Ints]) -> dict[Category, Ints]:
    """Bytes per category along a pass."""
    zeros = np.zeros(len(activations), dtype=np.int64)
    made = {category: zeros + size for category, size in steady.items()}
    for category, curve in {Category.ACTIVATIONS: activations, **extra}.items():
        longest = np.append(curve, np.full(len(activations) - len(curve), curve[-1])) if len(curve) else zeros
        made[category] = made.get(category, zeros) + longest
    return made


def _top(curves: Mapping[Category, Ints]) -> int:
    return int(np.argmax(np.sum(list(curves.values()), axis=0)))


def _at(curves: Mapping[Category, Ints], index: int) -> Bytes:
    return {category: int(curve[index]) for category, curve in curves.items()}


def _sampled(curves: Mapping[Category, Ints], phase: Phase, begin: float, end: float) -> list[Sample]:
    length = len(next(iter(curves.values())))
    points = sorted({*np.linspace(0, length - 1, min(length, _SAMPLES)).astype(int).tolist(), _top(curves)})
    return [
        Sample(at=begin + (end - begin) * index / max(1, length - 1), phase=phase, bytes=_present(_at(curves, index)))
        for index in points
    ]
