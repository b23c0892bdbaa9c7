"""Which records a report is about: files and directories become one run, or two that can be held against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_optim.memory.record import Record


class ReportError(ValueError):
    """No report can be made of what was given; the message says why and what to give instead."""


@dataclass(frozen=True)
class Run:
    """One training, measured or predicted or both.

    Attributes:
        source: what the user gave, for error messages.
        name: of its optimizer, short.
    """

    source: str
    measured: Record | None = None
    predicted: Record | None = None
    name: str = ""

    @property
    def record(self) -> Record:
        """The measured one, if there is one."""
        found = self.measured or self.predicted
        assert found is not None, "a run without a record"
        return found


def read_runs(paths: Sequence[Path], baseline: Path | None = None) -> tuple[Run, Run | None]:
    """The run to show, and the run to hold it against.

    A measured and a predicted record of the same run, given one by one or in one directory, become one run. The
    baseline is the one given as such, else the second run.

    Args:
        paths: record files, or directories with ``measured.json``, ``predicted.json`` or both.
        baseline: likewise.

    Raises:
        RecordError: a file is not there or no record.
        ReportError: no record in a directory, too many runs, or runs of different models.
    """
    runs: list[Run] = []
    for path in paths:
        run = _read(path)
        partner = next((other for other in runs if _are_a_pair(other, run)), None)
        if partner is None:
            runs.append(run)
        else:
            paired = replace(
                partner, measured=partner.measured or run.measured, predicted=partner.predicted or run.predicted
            )
            runs[runs.index(partner)] = paired
    if baseline is not None:
        runs.append(_read(baseline))
    if not 1 <= len(runs) <= 2:
        named = ", ".join(run.source for run in runs) or "none"
        raise ReportError(f"a report shows one run or two, {len(runs)} were given ({named}): leave some out")
    first, second = runs[0], runs[1] if len(runs) == 2 else None
    if second is not None:
        _refuse_to_compare(first, second)
    return _named(first, second)


def _read(path: Path) -> Run:
    if not path.is_dir():
        record = Record.load(path)
        return Run(str(path), *((record, None) if record.kind == "measured" else (None, record)))
    found = {}
    for kind in ("measured", "predicted"):
        file = path / f"{kind}.json"
        if file.exists():
            found[kind] = Record.load(file)
            if found[kind].kind != kind:
                raise ReportError(f"{file} holds a {found[kind].kind} record: rename it")
    if not found:
        raise ReportError(
            f"{path} holds neither measured.json nor predicted.json: give the directory that "
            "launcher/train.py --memory-report wrote, or a record's file"
        )
    run = Run(str(path), found.get("measured"), found.get("predicted"))
    differing = differences(run.measured, run.predicted) if run.measured and run.predicted else []
    if differing:
        raise ReportError(
            f"measured.json and predicted.json in {path} are of different runs ({'; '.join(differing)}): "
            "predict it again with the settings that were measured"
        )
    return run


_SETTINGS: dict[str, Callable[[Record], object]] = {
    "optimizer": lambda record: record.provenance.optimizer,
    "strategy": lambda record: record.provenance.strategy,
    "stage": lambda record: record.provenance.stage,
    "ranks": lambda record: record.provenance.world_size,
    "precision": lambda record: record.provenance.precision,
    "offload": lambda record: record.provenance.offload,
    "micro-batch": lambda record: record.provenance.micro_batch,
    "tokens per sequence": lambda record: record.provenance.seq_length,
    "checkpointing": lambda record: record.provenance.checkpointing,
}


def differences(one: Record, other: Record, but: Sequence[str] = ()) -> list[str]:
    """Settings known of both and different, in words."""
    found = []
    if one.provenance.parameters != other.provenance.parameters:
        found.append(f"parameters {one.provenance.parameters:,} and {other.provenance.parameters:,}")
    for name, of in _SETTINGS.items():
        a, b = of(one), of(other)
        if name not in but and a != b and a is not None and b is not None:
            found.append(f"{name} {a} and {b}")
    return found


def _are_a_pair(one: Run, other: Run) -> bool:
    kinds = [run.record.kind for run in (one, other) if (run.measured is None) != (run.predicted is None)]
    return sorted(kinds) == ["measured", "predicted"] and not differences(one.record, other.record)


def _refuse_to_compare(one: Run, other: Run) -> None:
    a, b = one.record.provenance, other.record.provenance
    if a.parameters != b.parameters:
        raise ReportError(
            f"{one.source} and {other.source} cannot be compared: {a.model} has {a.parameters:,} parameters, "
            f"{b.model} has {b.parameters:,}. Give two runs of the same model"
        )


def _named(first: Run, second: Run | None) -> tuple[Run, Run | None]:
    """Short names for the charts, that tell the two apart."""

    def short(run: Run) -> str:
        return run.record.provenance.optimizer.split(".", 1)[-1]

    if second is None:
        return replace(first, name=short(first)), None
    for name in (
        short,
        lambda run: run.record.provenance.optimizer,
        lambda run: f"{short(run)}, {run.record.provenance.strategy}",
        lambda run: f"{short(run)}, {run.record.provenance.precision}",
        lambda run: f"{short(run)}, {run.record.provenance.world_size} ranks",
        lambda run: f"{short(run)}, {run.record.kind}",
    ):
        if name(first) != name(second):
            return replace(first, name=name(first)), replace(second, name=name(second))
    return replace(first, name=f"{short(first)} (1)"), replace(second, name=f"{short(second)} (2)")


Shown = Sequence[tuple[str, Record]]
"""A run's name and the record of it that is shown; the baseline's after it, if there is one."""
