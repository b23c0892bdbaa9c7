"""The command ``ds-optim selftest``."""

from __future__ import annotations

import dataclasses
import json
import os
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
    import torch
    import torch.distributed as dist

    from ds_optim.memory.provenance import machine
    from ds_optim.selftest.checks import run

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    console = Console(quiet=ranks > 1 and dist.get_rank() > 0)
    where = f"torch {torch.__version__} on {machine()}"
    table = Table("check", "", "found", title=f"ds-optim selftest: {where}")
    findings: list[CheckResult] = []
    for finding in run():
        findings.append(finding)
        style = STYLES[finding.verdict]
        table.add_row(escape(finding.check), f"[{style}]{finding.verdict}[/]", escape(finding.said))
    console.print(table)
    if written is not None and not console.quiet:
        content = {"where": where, "findings": [dataclasses.asdict(finding) for finding in findings]}
        written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()
    if any(finding.verdict == "FAIL" for finding in findings):
        raise typer.Exit(1)
