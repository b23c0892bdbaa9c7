"""The picture of a measurement: loss against batch size, with the tolerance band and both answers drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_optim.batch_size.advice import Estimate
from ds_optim.batch_size.verdict import CriticalBatch, Row


def draw(
    table: Sequence[Row],
    verdict: CriticalBatch,
    estimate: Estimate | None,
    *,
    baseline: int,
    tolerance: float,
    title: str,
    path: Path,
) -> None:
    """Write a PNG. The critical batch is a span from the largest batch within the tolerance to the first outside.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    measured = [row for row in table if not row.failure]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    start = next((row.loss for row in measured if row.batch == baseline), None)
    if start is not None:
        axes.axhspan(start, start + tolerance, color="tab:green", alpha=0.15, label=f"baseline + {tolerance:g}")
    if verdict.largest is not None and verdict.first_outside is not None:
        between = f"{verdict.largest:,} to {verdict.first_outside:,}"
        label = f"critical batch: {between if verdict.kind == 'between' else f'below {verdict.first_outside:,}'}"
        axes.axvspan(verdict.largest, verdict.first_outside, color="tab:blue", alpha=0.15, label=label)
    elif verdict.largest is not None:
        axes.axvline(
            verdict.largest, color="tab:blue", alpha=0.5, label=f"critical batch: at least {verdict.largest:,}"
        )
    if estimate is not None:
        if estimate.is_known:
            axes.axvspan(max(estimate.low, 1e-3), estimate.high, color="tab:orange", alpha=0.15)
        label = f"noise scale: {estimate.sequences:,.0f}"
        axes.axvline(estimate.sequences, color="tab:orange", linestyle="--", label=label)
    errors = [2 * row.standard_error if row.standard_error == row.standard_error else 0.0 for row in measured]
    axes.errorbar(
        [row.batch for row in measured],
        [row.loss for row in measured],
        yerr=errors,
        color="black",
        marker="o",
        capsize=3,
        label="held-out loss (2 standard errors of the difference)",
    )
    ends = [row.batch for row in table] + ([estimate.sequences] if estimate is not None else [])
    axes.set_xlim(min(ends) / 1.5, max(ends) * 1.5)  # an interval may reach far beyond
    axes.set_xticks([row.batch for row in table], [f"{row.batch:,}" for row in table])
    axes.minorticks_off()
    axes.set_xlabel("sequences per step")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
