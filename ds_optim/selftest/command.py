"""The command ``ds-optim selftest``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ds_optim.selftest.result import CheckResult

STYLES = {"PASS": "green", "FAIL": "bold red", "NOT HERE": "yellow"}


def selftest(
    written: Annotated[Path | None, typer.Option("--json", help="Write what was found there, too.")] = None,
) -> None:
    """Try this machine out, once, in two minutes: updates against plain torch operations, stochastic rounding's bits,
    waits for the device, step times beside torch's fused AdamW and beside a copy, the rate of Newton-Schulz steps,
    memory as predicted; under ``torchrun`` whether all ranks train the same weights.

    Exit status 1 if something failed. What this machine cannot show is NOT HERE, and no failure.
    """
    from ds_optim.selftest.checks import run
    from ds_optim.selftest.job import joined

    with joined() as this:
        findings = this.gathered([*run()])
        if this.rank == 0:
            _show(findings, written)
    if any(finding.verdict == "FAIL" for finding in findings):
        raise typer.Exit(1)


def _show(findings: list[CheckResult], written: Path | None) -> None:
    """The table: of other ranks what failed. The file has everything."""
    import torch

    from ds_optim.memory.provenance import machine

    where = f"torch {torch.__version__} on {machine()}"
    table = Table("check", "", "found", title=f"ds-optim selftest: {where}")
    for finding in findings:
        if finding.rank == 0 or finding.verdict == "FAIL":
            style = STYLES[finding.verdict]
            check = f"rank {finding.rank}: {finding.check}" if finding.rank else finding.check
            table.add_row(escape(check), f"[{style}]{finding.verdict}[/]", escape(finding.said))
    Console().print(table)
    if written is not None:
        content = {"where": where, "findings": [dataclasses.asdict(finding) for finding in findings]}
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
