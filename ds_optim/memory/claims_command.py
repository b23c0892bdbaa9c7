"""The command ``ds-optim claims``: verdicts, and the papers' tables computed again, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ds_optim.memory.claims import CLAIMS, ClaimError, Verdict, judge
from ds_optim.memory.paper_cases import JudgedCase, judged_cases
from ds_optim.memory.record import RecordError
from ds_optim.memory.report_runs import ReportError, read_runs

if TYPE_CHECKING:  # it imports torch, which records alone do not need
    from ds_optim.memory.paper_tables import PaperRow

_STYLES = {"PASS": "green", "FAIL": "red", "NOT APPLICABLE": "dim"}


def claims(
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="A memory record to judge, or a directory with measured.json or predicted.json (the measured one is "
            "judged).",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="AdamW's, on the same model, ranks and precision: likewise."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Judge published claims about memory: of one record against AdamW's, or else the papers' own cases.

    Without records the cases are predicted from shapes alone and the papers' tables are computed again. Exit status 1
    if a verdict differs from the one recorded for the case, or a number from the published one by more than rounding.
    With records: exit status 1 if a claim fails.
    """
    if (record is None) != (baseline is None):
        raise typer.BadParameter("give --record and --baseline together, or neither")
    if record is not None and baseline is not None:
        wrong = _judge_files(record, baseline, as_json)
    else:
        wrong = _judge_papers(as_json)
    raise typer.Exit(1 if wrong else 0)


def _judge_files(record: Path, baseline: Path, as_json: bool) -> bool:
    console = Console()
    try:
        ours, theirs = (read_runs([path])[0].record for path in (record, baseline))
        verdicts = judge(ours, theirs)
    except (RecordError, ReportError, ClaimError) as error:
        console.print(f"[bold red]problem:[/] {error}", highlight=False)
        raise typer.Exit(1) from error
    if as_json:
        _print_json({"verdicts": [verdict.model_dump() for verdict in verdicts]})
    elif not verdicts:
        console.print(f"no claim is known about {ours.provenance.optimizer}", highlight=False)
    else:
        table = Table("claim", "counted", "expected", "found", "outcome", "because")
        for verdict in verdicts:
            table.add_row(
                verdict.claim, verdict.counted, verdict.expected, _share(verdict), _outcome(verdict), verdict.reason
            )
        console.print(table)
    return any(verdict.outcome == "FAIL" for verdict in verdicts)


def _judge_papers(as_json: bool) -> bool:
    from ds_optim.memory.paper_tables import paper_tables

    judged, rows = list(judged_cases()), paper_tables()
    wrong = [f"{one.case}: {one.verdict.claim}: {one.deviation}" for one in judged if one.deviation]
    wrong += [
        f"{row.table}: {row.row}: {row.exact:.3f} {row.unit}, published {row.published}"
        for row in rows
        if not row.agrees
    ]
    if as_json:
        _print_json(
            {
                "verdicts": [
                    {"case": str(one.case), **one.verdict.model_dump(), "deviation": one.deviation} for one in judged
                ],
                "tables": [row.model_dump() for row in rows],
                "deviations": wrong,
            }
        )
    else:
        console = Console()
        console.print(_verdict_table(judged))
        for table in _paper_tables(rows):
            console.print(table)
        for line in wrong:
            console.print(f"[bold red]deviates:[/] {line}", highlight=False)
        if not wrong:
            applied = sum(one.verdict.outcome != "NOT APPLICABLE" for one in judged)
            console.print(
                f"all {len(judged)} verdicts are as recorded ({len(judged) - applied} of them NOT APPLICABLE: --json "
                "has the reasons), all published numbers within their rounding",
                highlight=False,
            )
    return bool(wrong)


def _verdict_table(judged: Sequence[JudgedCase]) -> Table:
    """The cases claim by claim; what a claim does not apply to is in the JSON, unless it deviates."""
    table = Table("case", "expected", "found", "outcome", title="Claims, predicted from shapes")
    for claim in CLAIMS:
        table.add_section()
        table.add_row(f"[bold]{claim.title}[/]\n[dim]{claim.who}\ncounted: {claim.counted}[/]")
        for one in judged:
            if one.verdict.claim == claim.title and (one.verdict.outcome != "NOT APPLICABLE" or one.deviation):
                remark = " (!)" if one.deviation else ", known" if one.verdict.outcome == "FAIL" else ""
                table.add_row(
                    f"  {one.case}", one.verdict.expected, _share(one.verdict), _outcome(one.verdict) + remark
                )
    return table


def _paper_tables(rows: Sequence[PaperRow]) -> list[Table]:
    tables: dict[str, Table] = {}
    for row in rows:
        if row.table not in tables:
            tables[row.table] = table = Table("", title=row.table)
            for heading in ("published", "exact", "off by"):
                table.add_column(heading, justify="right")
            table.add_column("standing of the published number")
        tables[row.table].add_row(
            row.row,
            "-" if row.published is None else f"{row.published:.2f} {row.unit}",
            f"{row.exact:.3f} {row.unit}",
            "-" if row.off_by is None else f"{row.off_by:+.2f} %",
            row.standing,
        )
    return list(tables.values())


def _share(verdict: Verdict) -> str:
    if verdict.found is None:
        return "-"
    return f"{abs(verdict.found) * 100:.1f} % {'saved' if verdict.found >= 0 else 'more'}"


def _outcome(verdict: Verdict) -> str:
    return f"[{_STYLES[verdict.outcome]}]{verdict.outcome}[/]"


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1))
