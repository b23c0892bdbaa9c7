"""What a memory report says: one run, or two side by side.

Nothing here draws. `report_html` makes a page of it, `report_text` the Markdown and the terminal version. Whatever
is shown for "a rank" is shown for the fullest one, the rank with the highest peak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_optim.memory import claims
from ds_optim.memory.paper_tables import paper_tables as computed_tables
from ds_optim.memory.record import Category, Moment, RankRecord, Record, human
from ds_optim.memory.report_data import (
    Bar,
    Comparison,
    Group,
    Headline,
    HostRow,
    Panel,
    QuantityRow,
    Report,
    Section,
    StateRow,
    StepCourse,
    Unaccounted,
)
from ds_optim.memory.report_provenance import STACK, checks, methods, provenance
from ds_optim.memory.report_runs import Run, Shown, differences

MOST_RANKS = 8
"""With more than these, only the fullest, the emptiest and the mean are shown."""


def make_report(run: Run, baseline: Run | None = None, *, paper_tables: bool = False) -> Report:
    """Everything worth saying about a run, held against a baseline if there is one.

    Args:
        run: as `read_runs` gives it.
        baseline: likewise.
        paper_tables: also reproduce the published tables, which takes seconds.
    """
    record, other = _same_kind(run, baseline)
    shown = [(run.name, record)] + ([(baseline.name, other)] if baseline and other else [])
    everything = [
        (each, known) for each in (run, baseline) if each for known in (each.measured, each.predicted) if known
    ]
    single = all(each.measured is None or each.predicted is None for each, _ in everything)
    sources = [(each.name if single else f"{each.name}, {known.kind}", known) for each, known in everything]
    capacities = [known.provenance.device_memory for _, known in shown if known.provenance.device_memory]
    return Report(
        title=run.name if baseline is None else f"{run.name} beside {baseline.name}",
        names=[name for name, _ in shown],
        kind=" and ".join(dict.fromkeys(known.kind for _, known in shown)),
        notices=_notices(shown),
        headlines=_headlines(record, other),
        unaccounted=_unaccounted(run.measured or record),
        verdicts=claims.judge(record, other) if other is not None else [],
        # Bars hold everything; where some of it is in host memory, a device's limit drawn across them would mislead.
        capacity=None if any(_on_host(known) for _, known in shown) else min(capacities, default=None),
        panels=_panels(shown),
        comparisons=[_comparison(each) for each in (run, baseline) if each and each.measured and each.predicted],
        timelines=[line for name, known in shown for line in _timeline(name, known)],
        state=[row for name, known in shown for row in _state(name, known)],
        hosts=[row for each, known in everything for row in _hosts(each.name, known)],
        paper=computed_tables() if paper_tables else [],
        provenance=provenance(sources),
        methods=methods(sources),
        checks=[row for each, known in everything for row in checks(each.name, known)],
        records=[known for _, known in everything],
    )


def _hosts(name: str, record: Record) -> list[HostRow]:
    """Every host with its ranks, in the order of their first ranks; nothing if all share one, or none is known."""
    by_host: dict[str, list[HostRow]] = {}
    for rank in record.ranks:
        if rank.host is not None:
            row = HostRow(
                who=name,
                host=rank.host,
                rank=rank.rank,
                states=sum(rank.model_states.values()),
                state=rank.state_bytes,
                peak=rank.peak.on_device if rank.peak else 0,
            )
            by_host.setdefault(rank.host, []).append(row)
    if len(by_host) < 2:
        return []
    found: list[HostRow] = []
    for host, rows in by_host.items():
        sums = {what: sum(getattr(row, what) for row in rows) for what in ("states", "state", "peak")}
        found += [HostRow(who=name, host=host, rank=None, **sums), *rows]
    return found


def _same_kind(run: Run, baseline: Run | None) -> tuple[Record, Record | None]:
    """A record of each, both measured or both predicted where that can be."""
    if baseline is None:
        return run.record, None
    if run.measured and baseline.measured:
        return run.measured, baseline.measured
    if run.predicted and baseline.predicted:
        return run.predicted, baseline.predicted
    return run.record, baseline.record


def _notices(shown: Shown) -> list[str]:
    found = []
    if len(shown) == 2:
        (name, record), (other_name, other) = shown
        if record.kind != other.kind:
            found.append(
                f"{name} was {record.kind}, {other_name} was {other.kind}: the two differ by the error of both."
            )
        found += [
            f"The two runs also differ in {difference}."
            for difference in differences(record, other, but=("optimizer",))
        ]
    for name, record in shown:
        missing = record.provenance.world_size - len(record.ranks)
        if missing:
            found.append(f"{name}: {len(record.ranks)} of {record.provenance.world_size} ranks are in the record.")
        peak = record.fullest.peak
        if peak is not None and _on_host(record):
            limit = record.provenance.device_memory
            found.append(
                f"{name}: of the peak, {human(peak.on_host)} are in host memory (CPU offload) and "
                f"{human(peak.on_device)} on the device" + (f", which holds {human(limit)}." if limit else ".")
            )
    return found


def _on_host(record: Record) -> bool:
    return any(moment.on_host for rank in record.ranks for moment in rank.moments)


def _headlines(record: Record, other: Record | None) -> list[Headline]:
    """The fullest rank's states, model states and peak."""

    def line(name: str, counted: str, of: Callable[[RankRecord], int | None]) -> Headline:
        return Headline(
            name=name, counted=counted, bytes=of(record.fullest), baseline=of(other.fullest) if other else None
        )

    peak = record.fullest.peak
    return [
        line("optimizer state", "what the optimizer keeps between steps", lambda rank: rank.state_bytes),
        line("all model states", "parameters, fp32 master, gradients, optimizer state", model_states),
        line(
            "peak",
            f"everything alive at the highest point, {_where(peak)}" if peak else "no moment was recorded",
            lambda rank: rank.peak.total if rank.peak else None,
        ),
    ]


def model_states(rank: RankRecord) -> int | None:
    """Their sum, or None if the moments that it is read from were not recorded."""
    known = rank.moment("after step") and rank.moment("after backward")
    return sum(rank.model_states.values()) if known else None


def _where(moment: Moment) -> str:
    return f"in the {moment.peak_of}" if moment.peak_of else moment.name or "at an unnamed moment"


def _unaccounted(record: Record) -> Unaccounted | None:
    """The worst share over ranks and moments; nothing for a prediction, which has no such bytes."""
    if record.kind == "predicted":
        return None
    every = [
        Unaccounted(rank=rank.rank, bytes=moment.bytes_of(Category.UNACCOUNTED), total=moment.total)
        for rank in record.ranks
        for moment in rank.moments
    ]
    return max(every, key=lambda found: found.share, default=None)


def _panels(shown: Shown) -> list[Panel]:
    """Every rank at its peak, and between two steps."""
    titles: dict[str, Callable[[RankRecord], Moment | None]] = {
        "At the peak of a step": lambda rank: rank.peak,
        "Between two steps": lambda rank: rank.moment("after step"),
    }
    panels = [Panel(title=title, groups=_groups(shown, at)) for title, at in titles.items()]
    return [panel for panel in panels if panel.groups]


def _groups(shown: Shown, at: Callable[[RankRecord], Moment | None]) -> list[Group]:
    numbers = [[rank.rank for rank in record.ranks] for _, record in shown]
    each = all(
        found == numbers[0] and len(found) == record.provenance.world_size <= MOST_RANKS
        for found, (_, record) in zip(numbers, shown, strict=True)
    )
    labels: dict[str, list[Bar]] = {}
    for name, record in reversed(shown):  # the baseline first
        found = {rank.rank: moment for rank in record.ranks if (moment := at(rank))}
        if not found:
            continue
        by_total = sorted(found, key=lambda number: found[number].total)
        if each:
            chosen = {f"rank {number}": _bytes([moment]) for number, moment in found.items()}
        else:
            chosen = {"fullest rank": _bytes([found[by_total[-1]]])}
            if len(found) > 1:
                chosen |= {"emptiest rank": _bytes([found[by_total[0]]]), "mean": _bytes(list(found.values()))}
        for label, stack in chosen.items():
            labels.setdefault(label, []).append(Bar(who=name, bytes=stack))
    return [Group(label=label, bars=bars) for label, bars in labels.items()]


def _bytes(moments: Sequence[Moment]) -> dict[Category, int]:
    """Their mean, without empty categories."""
    means = {category: round(sum(m.bytes_of(category) for m in moments) / len(moments)) for category in STACK}
    return {category: mean for category, mean in means.items() if mean}


def _comparison(run: Run) -> Comparison:
    """Predicted against measured on the measured run's fullest rank."""
    assert run.measured is not None
    assert run.predicted is not None
    measured = run.measured.fullest
    predicted = next((rank for rank in run.predicted.ranks if rank.rank == measured.rank), run.predicted.fullest)

    def lines(theirs: dict[Category, int], ours: dict[Category, int], total: str) -> list[QuantityRow]:
        used = [category for category in STACK if theirs.get(category) or ours.get(category)]
        found = [QuantityRow(name=c.value, predicted=theirs.get(c, 0), measured=ours.get(c, 0)) for c in used]
        return [*found, QuantityRow(name=total, predicted=sum(theirs.values()), measured=sum(ours.values()))]

    sections = []
    if model_states(predicted) is not None and model_states(measured) is not None:
        states = lines(predicted.model_states, measured.model_states, "all model states")
        sections.append(Section(title="Model states", lines=states, main=True))
    for phase in ("forward", "backward", "step"):
        theirs, ours = predicted.peak_of(phase), measured.peak_of(phase)
        if theirs and ours:
            highest = ours is measured.peak
            sections.append(
                Section(
                    title=f"Peak of the {phase}" + (", the highest" if highest else ""),
                    lines=lines(_bytes([theirs]), _bytes([ours]), f"{phase} peak"),
                    main=highest,
                )
            )
    sections.sort(key=lambda section: not section.main)
    return Comparison(who=run.name, rank=measured.rank, predicted_rank=predicted.rank, sections=sections)


def _timeline(name: str, record: Record) -> list[StepCourse]:
    """Of the fullest rank that kept one."""
    kept = [rank for rank in record.ranks if rank.timeline]
    if not kept:
        return []
    fullest = max(kept, key=lambda rank: rank.peak.total if rank.peak else 0)
    return [StepCourse(who=name, rank=fullest.rank, samples=fullest.timeline)]


def _state(name: str, record: Record) -> list[StateRow]:
    def everywhere(key: str, dtype: str, shape_rule: str) -> int:
        return sum(
            entry.bytes
            for rank in record.ranks
            for entry in rank.state
            if (entry.key, entry.dtype, entry.shape_rule) == (key, dtype, shape_rule)
        )

    return [
        StateRow(**entry.model_dump(), who=name, all_ranks=everywhere(entry.key, entry.dtype, entry.shape_rule))
        for entry in record.fullest.state
    ]
