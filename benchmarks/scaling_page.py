"""Tables and plots of `benchmarks/scaling.py`, from its record alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from colors import COLORS

from ds_optim.optimizers.registry import optimizers

OPTIMIZERS = tuple(optimizers())
_COMMAND = "python benchmarks/scaling.py"
_MEASURED = """## Counted, and predicted

{model}, {tokens} tokens per rank and step, bf16, real DeepSpeed engines on gloo ranks. *Sends*: MB per rank and step,
mean; what a rank must send under collectives that waste nothing. *Products*: GFLOP of matrix products on the busiest
rank, roots apart. *State*: MB on the fullest rank. Each counted / predicted; *off*: the worst of these, and of what the
busiest rank sends and the mean rank keeps. *Share*: of the optimizer's step in the training step. *Step*: the
optimizer's step against AdamW's, both over {rounds} steps in which they take turns. All ranks share two cores with
other work, and with {tokens} tokens there is hardly anything else to do: these two columns compare optimizers within
one row of ranks and stage, and say nothing of how long a step takes elsewhere.
"""
_PLANNED = """## Planned, from layouts

Of a step in bf16 with fp32 state, defaults of each optimizer (Shampoo: blocks of 1,024, roots every 10 steps). State
and bytes per rank. *Most*: the rank that has most. *Ratio*: what the optimizer sends on average over what ZeRO itself
sends. *TFLOP*: matrix products and roots of a step. *Idle*: ranks that own no matrix. *Step* and *share*: milliseconds
of the optimizer's step and its part of the whole training step, on the machine below. ZeRO 1 and 2 are one line:
partitions, and so everything an optimizer does, are the same, and with one pass per step ZeRO's own bytes are, too.
"""


def pair(values: Sequence[float], unit: float, digits: int) -> str:
    """Counted / predicted."""
    counted, predicted = (value / unit for value in values)
    return f"{counted:,.{digits}f} / {predicted:,.{digits}f}"


def measured_lines(rows: Sequence[Mapping[str, Any]], deviation: Callable[[Sequence[float]], float]) -> list[str]:
    """The counted rows as Markdown, with steps as multiples of AdamW's beside which they were timed."""
    adamw = {(one["stage"], one["ranks"]): one["seconds"] for one in rows if one["optimizer"] == "AdamW"}

    def times(one: Mapping[str, Any]) -> tuple[str, str]:
        return f"{one['share']:.1%}", f"{one['seconds'] / adamw[one['stage'], one['ranks']]:.1f}"

    return _counted(rows, deviation, times)


def here_lines(
    rows: Sequence[Mapping[str, Any]], deviation: Callable[[Sequence[float]], float], *, with_times: bool
) -> list[str]:
    """The counted rows of a job's own ranks as Markdown, with share and milliseconds of the step.

    ``with_times``: beside those that were predicted, which are for accelerators.
    """

    def times(one: Mapping[str, Any]) -> tuple[str, str]:
        share, step = f"{one['share']:.1%}", f"{1e3 * one['seconds']:.1f} ms"
        if with_times:
            share += f" / {one['predicted_share']:.1%}"
            step += f" / {1e3 * one['predicted_seconds']:.1f} ms"
        return share, step

    return _counted(rows, deviation, times)


def _counted(
    rows: Sequence[Mapping[str, Any]],
    deviation: Callable[[Sequence[float]], float],
    times: Callable[[Mapping[str, Any]], tuple[str, str]],
) -> list[str]:
    lines = [
        "| optimizer | ZeRO | ranks | optimizer sends | ZeRO sends | products | state | off | share | step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        keys = ("sent_mean", "sent_most", "zero", "flops", "state", "state_mean")
        off = max((deviation(one[key]) for key in keys), key=abs)
        share, step = times(one)
        lines.append(
            f"| {one['optimizer']} | {one['stage']} | {one['ranks']} | {pair(one['sent_mean'], 1e6, 3)} | "
            f"{pair(one['zero'], 1e6, 2)} | {pair(one['flops'], 1e9, 2)} | {pair(one['state'], 1e6, 3)} | "
            f"{round(off, 4) + 0.0:.2%} | {share} | {step} |"
        )
    return lines


def size(value: float) -> str:
    """Bytes, three digits."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g} {name}" if value < 999.5 * unit else f"{value / unit:,.0f} {name}"
    return f"{value:.0f}"


def digits(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _beside(one: Mapping[str, Any]) -> float:
    """What the optimizer sends, relative to ZeRO; one rank sends nothing."""
    return float(one["sent_mean"] / one["zero_sent"]) if one["zero_sent"] else 0.0


def planned_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The planned rows of one model as Markdown."""
    lines = [
        "| optimizer | ZeRO | ranks | state, most | mean | sends, mean | most | ZeRO sends | ratio | TFLOP, most | "
        "mean | idle | step | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        flops = [digits(one[key] / 1e12) if one["matrices"] else "" for key in ("flops_most", "flops_mean")]
        lines.append(
            f"| {one['optimizer']} | {'1, 2' if one['stage'] < 3 else 3} | {one['ranks']:,} | "
            f"{size(one['state_most'])} | {size(one['state_mean'])} | {size(one['sent_mean'])} | "
            f"{size(one['sent_most'])} | {size(one['zero_sent'])} | {_beside(one):.2g} | "
            f"{flops[0]} | {flops[1]} | {one['idle'] if one['matrices'] else ''} | "
            f"{digits(1e3 * one['step_seconds'])} | {one['share']:.2%} |"
        )
    return lines


def page(record: Mapping[str, Any], deviation: Callable[[Sequence[float]], float]) -> str:
    """The whole record as Markdown."""
    lines = ["# How it scales", ""]
    if "measured" in record:
        found = record["measured"]
        lines += [*_MEASURED.format(**found).splitlines(), "", *measured_lines(found["rows"], deviation), ""]
        lines += [f"`{_COMMAND}`, {found['date']}, {found['machine']}.", ""]
    if "planned" in record:
        found = record["planned"]
        lines += [*_PLANNED.splitlines(), "", "| assumption | value | |", "|---|---|---|"]
        lines += [f"| `{name}` | {value:g} | {meaning} |" for name, value, meaning in found["assumptions"]]
        slowest = max(
            (row for rows in found["models"].values() for row in rows), key=lambda row: row["planning_seconds"]
        )
        for model, rows in found["models"].items():
            lines += ["", f"### {model}", "", *planned_lines(rows)]
        case = f"{slowest['optimizer']}, ZeRO {slowest['stage']}, {slowest['ranks']:,} ranks"
        took = f"All of it took {found['seconds']:.0f} s beside other work, the slowest line "
        took += f"{slowest['planning_seconds']:.0f} s ({case})."
        lines += ["", f"`{_COMMAND}`, {found['date']}, {found['machine']}. {took}", ""]
    return "\n".join(lines)


def draw(models: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """State, bytes beside ZeRO's own and share of the step against ranks, at ZeRO-3, one column per model."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f'{path} was not drawn: pip install "ds-optim[plot]" for matplotlib', file=sys.stderr)
        return
    panels: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("state on the fullest rank, GB", lambda one: one["state_most"] / 1e9),
        ("optimizer sends / ZeRO sends", _beside),
        ("optimizer's share of the step, %", lambda one: 100 * one["share"]),
    )
    figure: Any = Figure(figsize=(6.2 * len(models), 11), layout="constrained")
    grid = figure.subplots(len(panels), len(models), squeeze=False, sharex=True, sharey="row")
    for column, (model, rows) in enumerate(models.items()):
        for axes, (label, value) in zip(grid[:, column], panels, strict=True):
            for name in OPTIMIZERS:
                points = [(one["ranks"], value(one)) for one in rows if one["optimizer"] == name and one["stage"] == 3]
                if any(height > 0 for _, height in points):
                    axes.plot(*zip(*points, strict=True), "o-", color=COLORS[name], label=name, markersize=4)
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylabel(label if column == 0 else "")
        ticks = sorted({one["ranks"] for one in rows})
        grid[-1, column].set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        grid[-1, column].minorticks_off()
        grid[-1, column].set_xlabel("ranks")
        grid[0, column].set_title(f"{model}, ZeRO-3")
        idle = [one for one in rows if one["optimizer"] == "SWAN" and one["stage"] == 3 and one["idle"]]
        for one in idle:
            grid[-1, column].annotate(
                f"{one['idle']} idle",
                (one["ranks"], 100 * one["share"]),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize="small",
                color=COLORS["SWAN"],
            )
    grid[0, 0].legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=110)
