"""The command ``ds-optim batch-size measure``: branches from a checkpoint, run, judged and drawn."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_optim.batch_size.advice import Estimate, estimate_of, in_words
from ds_optim.batch_size.learning_rate import ScalingRule

if TYPE_CHECKING:
    from ds_optim.batch_size.branch_runs import BranchResult
    from ds_optim.batch_size.branching import Study
    from ds_optim.batch_size.verdict import CriticalBatch, Row


def measure(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="The training command, for one branch.")
    ],
    checkpoint: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Where all branches start: one, or a run's newest.")
    ],
    batches: Annotated[str, typer.Option(help="Sequences per step, all ranks together, e.g. 8,16,32,64.")],
    tokens: Annotated[float, typer.Option(help="Of every branch, rounded to whole steps, e.g. 2e5.")],
    output: Annotated[Path, typer.Option(file_okay=False, help="A folder for the branches and the result.")],
    tolerance: Annotated[float, typer.Option(min=0, help="How much higher a loss may be, in nats per token.")] = 0.01,
    baseline: Annotated[
        int | None, typer.Option(help="The batch to hold the others against; else the checkpoint's own, or the first.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Of every branch, each on another stretch of the text.")] = 1,
    lr_rule: Annotated[
        str | None,
        typer.Option(help="How the learning rate follows the batch: sqrt, linear or none; else the optimizer's rule."),
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence, if the checkpoint does not say.")
    ] = None,
    noise_scale: Annotated[
        bool, typer.Option(help="Also ask the baseline for its noise scale, with the command's --noise-scale.")
    ] = True,
) -> None:
    """Find the largest batch that costs no loss: branch from a checkpoint at several batch sizes.

    Each branch is the COMMAND with --branch, --batch, --steps, --lr-scale and --output added (launcher/train.py has
    them). Finished branches are kept: the same command goes on after an interruption. Writes result.json and .png.
    Exit status 1 if nothing can be said.
    """
    from ds_optim.batch_size import branching

    console = Console(highlight=False)
    try:
        study = branching.plan(
            branching.Checkpoint.read(checkpoint),
            command,
            output,
            _numbers(batches),
            tokens,
            baseline=baseline,
            seq_length=seq_length,
            rule=_rule(lr_rule),
            repeats=repeats,
            noise_scale=noise_scale,
        )
        _show_plan(console, study, tokens)
        with _stopping():
            outcomes = _run_all(console, study)
    except (branching.BranchingError, OSError) as error:
        console.print(Text.assemble(("problem:", "bold red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(1) from error
    found = _conclude(console, study, outcomes, tolerance)
    raise typer.Exit(1 if found.kind == "unknown" else 0)


@contextmanager
def _stopping() -> Iterator[None]:
    """Within it, being terminated is an exception, so that the branch that runs is stopped too."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rule(text: str | None) -> ScalingRule | None:
    known: dict[str, ScalingRule] = {rule: rule for rule in get_args(ScalingRule)}
    if text is not None and text not in known:
        raise typer.BadParameter(f"--lr-rule is {text!r}: {', '.join(known)}")
    return known[text] if text is not None else None


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--batches is {text!r}: whole numbers with commas between them") from error


def _run_all(console: Console, study: Study) -> list[BranchResult]:
    """Every branch's outcome, those included that were finished before."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ds_optim.batch_size import branch_runs, branching

    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as progress:
        task = progress.add_task("branches", total=sum(study.tokens(branch) for branch in study.branches))
        done = 0
        for branch in study.branches:
            progress.update(task, description=branch.name)
            outcome = branch_runs.finished(study, branch)
            was_there = outcome is not None
            if outcome is None:
                outcome = branch_runs.run(
                    study,
                    branch,
                    lambda seen, done=done: progress.update(task, completed=done + seen),  # type: ignore[misc]
                )
            outcomes.append(outcome)
            done += study.tokens(branch)
            progress.update(task, completed=done)
            result = outcome.failure or f"held-out loss {outcome.loss:.4f}"
            took = "finished before" if was_there else f"{outcome.seconds:.0f} s"
            progress.console.print(f"{branch.name}: {result} ({took})", markup=False, soft_wrap=True)
            if outcome.failure and branch.batch == study.baseline:
                hint = "; --no-noise-scale leaves the estimate out" if study.measures_noise(branch) else ""
                raise branching.BranchingError(
                    [f"the baseline, {branch.name}, failed, and there is nothing to hold the others against{hint}"]
                )
    return outcomes


def _show_plan(console: Console, study: Study, asked: float) -> None:
    about = study.checkpoint
    console.print(
        f"From {about.folder}: {about.optimizer or 'an optimizer'}, learning rate by the rule {study.rule!r}, baseline "
        f"{study.baseline:,} sequences of {study.seq_length:,} tokens.",
        markup=False,
        soft_wrap=True,
    )
    budgets = sorted({study.tokens(branch) for branch in study.branches})
    rounded = f", {asked:,.0f} rounded to whole steps" if budgets != [asked] else ""
    same = f"{budgets[0]:,} tokens each" if len(budgets) == 1 else f"{budgets[0]:,} to {budgets[-1]:,} tokens"
    console.print(f"{len(study.branches)} branches of {same}{rounded}.")
    table = Table("batch", "steps", "learning rate x")
    for branch in study.branches:
        if not branch.repeat:
            table.add_row(f"{branch.batch:,}", f"{branch.steps:,}", f"{branch.lr_scale:.3g}")
    console.print(table)


def _show_rows(console: Console, table: Sequence[Row]) -> None:
    shown = Table(title="Held-out loss at the end", title_justify="left")
    for heading in ("batch", "loss", "from the baseline", "standard error", "within the tolerance"):
        shown.add_column(heading, justify="right")
    for row in table:
        if row.failure:
            shown.add_row(f"{row.batch:,}", "-", "-", "-", "no" if row.within is False else "unknown")
            continue
        within = {True: "yes", False: "no", None: "unknown"}[row.within] + (
            "" if row.clear is not False else ", not clearly"
        )
        error = "-" if math.isnan(row.standard_error) else f"{row.standard_error:.4f}"
        difference = "-" if math.isnan(row.difference) else f"{row.difference:+.4f}"
        shown.add_row(f"{row.batch:,}", f"{row.loss:.4f}", difference, error, within)
    console.print(shown)


def _conclude(console: Console, study: Study, outcomes: Sequence[BranchResult], tolerance: float) -> CriticalBatch:
    """Judge the branches; say, write and draw what was found."""
    from ds_optim.batch_size import verdict

    table = verdict.rows(outcomes, study.baseline, tolerance)
    found = verdict.judge(table, study.baseline, tolerance)
    said = _noise_of(outcomes, study)
    estimate, why = estimate_of(said)
    _show_rows(console, table)
    words = [found.words]
    if estimate is not None:
        words += [_in_short(estimate), *in_words(study.baseline, estimate)]
    elif study.noise_scale and found.kind != "unknown":
        words.append(f"No noise scale to hold it against: {why}.")
    for line in words:
        console.print(line, markup=False, soft_wrap=True)
    _write(study, outcomes, table, found, said, tolerance, words)
    _draw(console, study, table, found, estimate, tolerance)
    return found


def _noise_of(outcomes: Sequence[BranchResult], study: Study) -> Mapping[str, Any]:
    """What the baseline's summary says about the noise scale."""
    for outcome in outcomes:
        if study.measures_noise(outcome.branch):
            found = outcome.summary.get("noise_scale")
            return found if isinstance(found, dict) else {}
    return {}


def _in_short(estimate: Estimate) -> str:
    ends = f" (interval {estimate.low:,.0f} to {estimate.high:,.0f})" if estimate.is_known else ""
    return f"The noise scale, an estimate of the same, is {estimate.sequences:,.0f} sequences{ends}."


def _write(
    study: Study,
    outcomes: Sequence[BranchResult],
    table: Sequence[Row],
    found: CriticalBatch,
    noise: Mapping[str, Any],
    tolerance: float,
    words: Sequence[str],
) -> None:
    about = study.checkpoint
    content = {
        "checkpoint": str(about.folder),
        "optimizer": about.optimizer,
        "command": list(study.command),
        "baseline": study.baseline,
        "seq_length": study.seq_length,
        "lr_rule": study.rule,
        "tolerance": tolerance,
        "critical_batch": asdict(found),
        "noise_scale": dict(noise) or None,
        "words": list(words),
        "rows": [asdict(row) for row in table],
        "branches": [
            {
                **asdict(one.branch),
                "tokens": study.tokens(one.branch),
                "held_out_loss": one.loss,
                "failure": one.failure,
                "seconds": one.seconds,
                **{key: one.summary[key] for key in ("micro_batch", "accumulation", "ranks") if key in one.summary},
            }
            for one in outcomes
        ],
    }
    (study.output / "result.json").write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(
    console: Console,
    study: Study,
    table: Sequence[Row],
    found: CriticalBatch,
    estimate: Estimate | None,
    tolerance: float,
) -> None:
    from ds_optim.batch_size.plot import draw

    written = [study.output / "result.json"]
    title = f"{study.checkpoint.optimizer or 'branches'}, {study.tokens(study.branches[0]):,} tokens each"
    picture = study.output / "result.png"
    try:
        draw(table, found, estimate, baseline=study.baseline, tolerance=tolerance, title=title, path=picture)
        written.append(picture)
    except ImportError:
        console.print('No plot: it needs matplotlib, pip install "ds-optim[plot]".', markup=False)
    console.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
