"""From the events of one training step to its moments, peaks and timeline.

Labels are resolved when the step is over, so a storage that turns out to be a gradient was one from its first byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from ds_optim.memory.errors import MemoryAccountError
from ds_optim.memory.labels import Labels, transient
from ds_optim.memory.record import Category, CountedBy, Moment, MomentName, Phase, Sample, human, sized
from ds_optim.memory.tracker import Event, Storage

PHASES: tuple[Phase, ...] = ("forward", "backward", "step")
TIMELINE_SAMPLES = 240
_LARGEST_NAMED = 5  # unaccounted storages in a message

Amounts = dict[Category, int]


@dataclass(slots=True)
class StepLog:
    """What is kept of one step.

    Attributes:
        opening: storages alive at its start, and their bytes.
        events: since then, in order.
        marks: how many events lay before a moment.
    """

    opening: dict[Storage, int]
    events: list[Event]
    marks: dict[MomentName, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepAccount:
    """One step, resolved.

    Attributes:
        moments: in the order of time, peaks among them.
        timeline: at most `TIMELINE_SAMPLES` points, the highest among them.
        opening: bytes alive at its start.
        nobodys: storages that are alive at its end and unlabelled, and their bytes then.
    """

    moments: list[Moment]
    timeline: list[Sample]
    opening: int
    nobodys: dict[Storage, int]


def balance(storages: Mapping[Storage, int], labels: Labels, *, of_this_step: bool = False) -> Amounts:
    """Bytes per category between steps, where what nobody claims is unaccounted for.

    Args:
        storages: and their bytes.
        labels: of them.
        of_this_step: whether a label of the step before does not count.
    """
    amounts: Amounts = {}
    for storage, count in storages.items():
        category = labels.of(storage, of_this_step=of_this_step) or Category.UNACCOUNTED
        amounts[category] = amounts.get(category, 0) + count
    return amounts


def resolve(
    log: StepLog, live: Iterable[Storage], labels: Labels, *, timeline: bool, on_accelerator: bool = False
) -> StepAccount:
    """Replay a step whose end is now.

    Args:
        log: of the step.
        live: storages alive now.
        labels: of everything.
        timeline: whether to keep one.
        on_accelerator: whether host memory is another memory than the model's; the peaks are then the device's.
    """

    def category_of(storage: Storage) -> Category:
        return labels.of(storage) or (Category.UNACCOUNTED if storage in log.opening else transient(storage))

    amounts = balance(log.opening, labels)
    total = opening = sum(log.opening.values())
    host = sum(count for storage, count in log.opening.items() if storage.is_host) if on_accelerator else 0
    peaks: dict[str, tuple[int, Amounts, int]] = {}
    at_mark: dict[MomentName, tuple[Amounts, int]] = {}
    marks = {index: name for name, index in log.marks.items()}
    stride = max(1, len(log.events) // TIMELINE_SAMPLES)
    samples: list[tuple[int, str, Amounts]] = []
    window: tuple[int, int, str, Amounts] | None = None
    for index, (storage, change, phase) in enumerate(log.events):
        if index in marks:
            at_mark[marks[index]] = dict(amounts), host
        category = category_of(storage)
        amounts[category] = amounts.get(category, 0) + change
        total += change
        if on_accelerator and storage.is_host:
            host += change
        if phase not in peaks or total - host > peaks[phase][0]:
            peaks[phase] = (total - host, dict(amounts), host)
        if timeline:  # the highest point of each stretch of events, so that no peak is lost
            if window is None or total - host > window[0]:
                window = (total - host, index, phase, dict(amounts))
            if (index + 1) % stride == 0 or index + 1 == len(log.events):
                samples.append(window[1:])
                window = None
    for name, index in log.marks.items():
        if index >= len(log.events):
            at_mark[name] = dict(amounts), host
    alive = {storage: storage.bytes for storage in live}
    at_mark["after step"] = balance(alive, labels, of_this_step=True), host
    return StepAccount(
        moments=_in_order(peaks, at_mark),
        timeline=_shortened(samples, len(log.events)),
        opening=opening,
        nobodys={storage: count for storage, count in alive.items() if not labels.of(storage, of_this_step=True)},
    )


def named(name: MomentName, amounts: Amounts, on_host: int) -> Moment:
    """A moment between phases."""
    return Moment(name=name, amounts=sized(amounts, CountedBy.STORAGES), on_host=on_host)


def own_allocations(log: StepLog) -> tuple[int, int]:
    """Of a step: the highest point of what it allocated itself, and bytes older than it that it freed."""
    running = highest = freed = 0
    for storage, change, _ in log.events:
        if storage in log.opening:
            freed -= change
        else:
            running += change
            highest = max(highest, running)
    return highest, freed


def judge_unaccounted(moment: Moment, nobodys: Mapping[Storage, int], tolerance: float) -> None:
    """Refuse a moment at which too much is nobody's.

    Args:
        moment: a named one.
        nobodys: storages that are unlabelled then, and their bytes.
        tolerance: largest share of all bytes.

    Raises:
        MemoryAccountError: the share is larger; the largest such storages are named with the phase and the line that
            made them.
    """
    unaccounted = moment.bytes_of(Category.UNACCOUNTED)
    if unaccounted <= tolerance * moment.total:
        return
    largest = sorted(nobodys, key=lambda storage: nobodys[storage], reverse=True)[:_LARGEST_NAMED]
    listed = [f"{nobodys[s]:,} bytes, made in phase {s.born!r} by {s.origin or 'unknown code'}" for s in largest]
    raise MemoryAccountError(
        f"{moment.name}: {human(unaccounted)} of {human(moment.total)} are nobody's "
        f"({100 * unaccounted / moment.total:.2f} %, tolerance {100 * tolerance:g} %). Drop what is kept by "
        "mistake, or name it: MemoryAccountant(extra={name: (category, tensor)}). The largest:\n- "
        + "\n- ".join(listed)
    )


def _in_order(
    peaks: Mapping[str, tuple[int, Amounts, int]], at_mark: Mapping[MomentName, tuple[Amounts, int]]
) -> list[Moment]:
    moments = []
    for phase in PHASES:
        name = cast(MomentName, f"after {phase}")
        if phase in peaks:
            _, amounts, host = peaks[phase]
            moments.append(Moment(peak_of=phase, amounts=sized(amounts, CountedBy.STORAGES), on_host=host))
        if name in at_mark:
            moments.append(named(name, *at_mark[name]))
    return moments


def _shortened(samples: Sequence[tuple[int, str, Amounts]], count: int) -> list[Sample]:
    return [
        Sample(at=(index + 1) / count, phase=cast(Phase, phase), bytes={c: size for c, size in amounts.items() if size})
        for index, phase, amounts in samples
    ]
