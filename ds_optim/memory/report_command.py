"""The command ``ds-optim report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ds_optim.memory.record import RecordError
from ds_optim.memory.report_runs import ReportError


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Record files, or directories with measured.json or predicted.json; one run or two."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for report.html, report.md and report.json.")] = Path(
        "memory-report"
    ),
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help="What to hold the run against, if it is not the second RUN.")
    ] = None,
    paper_tables: Annotated[bool, typer.Option(help="Also compute the published tables again; takes seconds.")] = False,
) -> None:
    """Write a page, Markdown and JSON about where a run's memory goes, and print the short version.

    A measured and a predicted record of the same run are held against each other; of two runs, the second is the
    baseline.
    """
    console = Console()
    try:
        page = write(runs, output, baseline, paper_tables, console)
    except (RecordError, ReportError, OSError) as error:
        console.print(Text.assemble(("problem:", "bold red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(Text(f"\n{page}"), soft_wrap=True)


def write(
    runs: list[Path], output: Path, baseline: Path | None, paper_tables: bool, console: Console | None = None
) -> Path:
    """Write the three files; return the page's path.

    Raises:
        RecordError: a file is no record.
        ReportError: no report can be made of these runs.
        OSError: the directory cannot be written.
    """
    from ds_optim.memory.report import make_report
    from ds_optim.memory.report_html import render_html
    from ds_optim.memory.report_runs import read_runs
    from ds_optim.memory.report_text import print_report, render_markdown

    run, other = read_runs(runs, baseline)
    made = make_report(run, other, paper_tables=paper_tables)
    output.mkdir(parents=True, exist_ok=True)
    page = output / "report.html"
    page.write_text(render_html(made), encoding="utf-8")
    (output / "report.md").write_text(render_markdown(made), encoding="utf-8")
    (output / "report.json").write_text(made.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")
    if console is not None:
        print_report(made, console)
    return page
