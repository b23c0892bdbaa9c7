"""Runs the branches of a study, one process each, and reads what they leave.

A branch must leave ``DIRECTORY/summary.json`` with ``held_out_loss_after`` (and, for a standard error,
``held_out_losses_after``: one loss per held-out sequence). ``launcher/train.py`` does. A finished branch is one file,
written when it ends, and is not run again; an interrupted one begins anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_optim.batch_size.branching import FINISHED, Branch, Study
from ds_optim.checkpoint.directory import write_text
from ds_optim.json_file import read_object

CONSOLE = "console.txt"
DIVERGED = "it diverged"


@dataclass(frozen=True, slots=True)
class BranchResult:
    """How a branch ended.

    Attributes:
        loss: held-out loss, mean over the sequences; NaN if it diverged or failed.
        losses: of each held-out sequence; empty if the command does not say.
        failure: why there is no loss; empty if there is one.
        seconds: that it took.
        summary: what the command wrote.
    """

    branch: Branch
    loss: float
    losses: tuple[float, ...]
    failure: str
    seconds: float
    summary: Mapping[str, Any]


def finished(study: Study, branch: Branch) -> BranchResult | None:
    """The outcome that an earlier run of this study left; None if the branch is still to be run."""
    path = study.output / branch.name / FINISHED
    if not path.is_file():
        return None
    content = read_object(path)
    return _outcome(branch, content["summary"], content["seconds"])


def run(study: Study, branch: Branch, watch: Callable[[int], object] = lambda _: None) -> BranchResult:
    """Run one branch to its end, whatever that is; a failure is an outcome.

    Args:
        study: that it belongs to.
        branch: which is not finished; what an interrupted run of it left is removed.
        watch: called every second or so with the tokens seen so far.
    """
    folder = study.output / branch.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    with open(folder / CONSOLE, "wb") as console:
        try:
            # A process group of its own: if this process is stopped, everything that the command started is.
            process = subprocess.Popen(
                study.arguments(branch), stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return BranchResult(branch, math.nan, (), f"it cannot be started: {error}", 0.0, {})
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                watch(_tokens_seen(folder))
        finally:
            if process.poll() is None:
                _stop(process)
    seconds = round(time.monotonic() - started, 1)
    failure, summary = _read_summary(folder, branch, process.returncode)
    if failure:
        return BranchResult(branch, math.nan, (), f"{failure} (see {folder / CONSOLE})", seconds, summary)
    content = {"setting": study.setting(branch), "seconds": seconds, "summary": summary}
    making = folder / f"{FINISHED}.writing"
    write_text(making, json.dumps(content, indent=1) + "\n")
    making.rename(folder / FINISHED)
    return _outcome(branch, summary, seconds)


def _read_summary(folder: Path, branch: Branch, status: int) -> tuple[str, dict[str, Any]]:
    """What went wrong, if anything did, and what the command wrote."""
    if status != 0:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{how}: {_last_line(folder / CONSOLE)}", {}
    try:
        summary = read_object(folder / "summary.json")
        float(summary["held_out_loss_after"])
    except (OSError, ValueError) as error:
        return f"the command ended well but left no summary: {error}", {}
    except (KeyError, TypeError):
        return "summary.json has no number for held_out_loss_after", {}
    if summary.get("batch", branch.batch) != branch.batch:
        return f"summary.json says that the batch was {summary['batch']}", summary
    return "", summary


def _outcome(branch: Branch, summary: Mapping[str, Any], seconds: float) -> BranchResult:
    loss = float(summary["held_out_loss_after"])
    if not math.isfinite(loss):
        return BranchResult(branch, math.nan, (), DIVERGED, seconds, summary)
    return BranchResult(branch, loss, tuple(summary.get("held_out_losses_after", ())), "", seconds, summary)


def _last_line(path: Path) -> str:
    """What the command said last, or its last error; without the log lines that DeepSpeed's launcher adds."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if not re.match(r"\[\d{4}-\d\d-\d\d", line)]
    errors = [line for line in own if re.match(r"[\w.]*Error\b", line.removeprefix("[rank0]: "))]
    return (errors or own or lines or ["it said nothing"])[-1].removeprefix("- ")[:300]


def _tokens_seen(folder: Path) -> int:
    """From the log that ``launcher/train.py`` writes; 0 of another command."""
    path = folder / "log.jsonl"
    if not path.is_file():
        return 0
    seen = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            seen += int(json.loads(line).get("tokens", 0))
        except (ValueError, AttributeError):  # a line that is being written
            continue
    return seen


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):  # the second for what has outlived the first
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=10)
