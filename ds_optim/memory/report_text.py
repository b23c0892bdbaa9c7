"""The report as Markdown, and for a terminal of 80 columns or more; and how its numbers are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ds_optim.memory.claims import Verdict
from ds_optim.memory.record import Category, Check, human
from ds_optim.memory.report_data import Bar, Report
from ds_optim.memory.report_provenance import STACK

LETTERS = {
    Category.PARAMETERS: ("P", "blue"),
    Category.MASTER: ("m", "bright_blue"),
    Category.GRADIENTS: ("G", "yellow"),
    Category.BUCKETS: ("b", "bright_yellow"),
    Category.OPTIMIZER: ("O", "green"),
    Category.ACTIVATIONS: ("A", "magenta"),
    Category.WORKSPACE: ("/", "white"),
    Category.EXCHANGE: ("x", "cyan"),
    Category.BUFFERS: (":", "bright_black"),
    Category.SLACK: (".", "bright_black"),
    Category.UNACCOUNTED: ("?", "red"),
}
"""A letter and a colour per category, where a chart must be made of letters."""

OUTCOMES = {"PASS": "green", "FAIL": "bold red", "NOT APPLICABLE": "bright_black"}


MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


# Numbers.


def percent(share: float, digits: int = 1) -> str:
    """``25.0 %``."""
    return f"{share * 100:.{digits}f} %".replace("-", MINUS)


def change(relative: float | None) -> str:
    """``-49.9 %`` or ``+3.0 %``; a dash where it is not known."""
    return DASH if relative is None else f"{relative * 100:+.1f} %".replace("-", MINUS)


def ratio(value: float | None) -> str:
    """``1.003``; a dash where it is not known."""
    return DASH if value is None else f"{value:.3f}"


def signed(count: int) -> str:
    """Bytes with their sign: ``+1.00 MB (0.95 MiB)``."""
    return "0 B" if count == 0 else ("+" if count > 0 else MINUS) + human(abs(count))


def found(verdict: Verdict) -> str:
    """What a claim's own counting gave, in words."""
    if verdict.found is None:
        return "not counted"
    return f"{percent(verdict.found)} saved" if verdict.found >= 0 else f"{percent(-verdict.found)} more"


def no_verdicts(report: Report) -> str:
    """Why there are none."""
    if len(report.names) == 2:
        return f"No published claim is known about {report.names[0]}."
    return "No baseline: give a second run, or --baseline RUN, to judge the published claims."


# Markdown.


def render_markdown(report: Report) -> str:
    """The whole report; every number of the page, the timeline apart."""
    parts = [f"# Memory: {report.title}", f"{_subtitle(report)} Bytes of the fullest rank; GB is 1e9 bytes."]
    parts += [f"> {notice}" for notice in report.notices]
    parts.append(_markdown(["", "counted", *_columns(report)], [*_headline_rows(report), *_unaccounted_rows(report)]))
    parts.append("## Claims")
    if report.verdicts:
        rows = [[v.outcome, v.claim, v.counted, v.expected, found(v), v.reason, v.who] for v in report.verdicts]
        parts.append(_markdown(["outcome", "claim", "denominator", "expected", "found", "reason", "claimed by"], rows))
    else:
        parts.append(no_verdicts(report))
    for panel in report.panels:
        used = [c for c in STACK if any(c in bar.bytes for group in panel.groups for bar in group.bars)]
        rows = [
            [group.label, bar.who, *(human(bar.bytes.get(c, 0)) for c in used), human(bar.total)]
            for group in panel.groups
            for bar in group.bars
        ]
        parts += [f"## {panel.title}", _markdown(["rank", "run", *(c.value for c in used), "total"], rows)]
    for comparison in report.comparisons:
        parts.append(f"## Predicted against measured: {comparison.who}, rank {comparison.rank}")
        for part in comparison.sections:
            rows = [
                [x.name, human(x.predicted), human(x.measured), ratio(x.ratio), signed(x.residual)] for x in part.lines
            ]
            parts.append(_markdown([part.title, "predicted", "measured", "ratio", "residual"], rows))
    state = [
        [s.who, s.key, s.dtype, s.shape_rule, f"{s.elements:,}", human(s.bytes), human(s.all_ranks)]
        for s in report.state
    ]
    parts += ["## Optimizer state", _markdown(STATE_COLUMNS, state)]
    if report.hosts:
        parts += ["## Hosts and their ranks", _markdown(HOST_COLUMNS, host_rows(report))]
    if report.paper:
        parts.append("## Published tables, computed again")
        for title, rows in paper_rows(report).items():
            parts += [f"### {title}", _markdown(PAPER_COLUMNS, rows)]
    if report.checks:
        parts += ["## Cross-checks", _markdown(CHECK_COLUMNS, check_rows(report))]
    parts += [
        "## Provenance",
        _markdown(["", *report.names], [[name, *values] for name, values in report.provenance]),
        "## Method behind each number",
        _markdown(["category", *report.names], [[name, *values] for name, values in report.methods]),
    ]
    return "\n\n".join(parts) + "\n"


STATE_COLUMNS = ["run", "key", "dtype", "a value per", "elements", "fullest rank", "ranks in the record"]
HOST_COLUMNS = ["run", "host", "rank", "model states", "optimizer state", "peak"]
PAPER_COLUMNS = ["row", "published", "exact", "off by", "standing"]
CHECK_COLUMNS = ["run", "check", "ours", "theirs", "their method", "difference", "allowed", "outcome", "worst rank"]


def host_rows(report: Report) -> list[list[str]]:
    """A row per host, the sum of its ranks, and one per rank."""
    return [
        [
            row.who,
            row.host,
            "all its ranks" if row.rank is None else str(row.rank),
            *(human(b) for b in (row.states, row.state, row.peak)),
        ]
        for row in report.hosts
    ]


def paper_rows(report: Report) -> dict[str, list[list[str]]]:
    """Published, exact, off by: under the title of each table."""
    tables: dict[str, list[list[str]]] = {}
    for row in report.paper:
        cells = [
            row.row,
            DASH if row.published is None else f"{row.published:g} {row.unit}",
            f"{row.exact:.{1 if row.unit == '%' else 3}f} {row.unit}",
            DASH if row.off_by is None else f"{row.off_by:+.2f} %".replace("-", MINUS),
            row.standing,
        ]
        tables.setdefault(row.table, []).append(cells)
    return tables


def check_rows(report: Report) -> list[list[str]]:
    """Every check at the rank where it is worst."""
    return [
        [
            row.who,
            check.name,
            human(check.ours),
            human(check.theirs),
            check.method.value,
            change(check.difference).replace("+0.0", "0.0"),
            _limit(check),
            DASH if check.passed is None else "PASS" if check.passed else "FAIL",
            str(row.rank),
        ]
        for row in report.checks
        for check in [row.check]
    ]


def _limit(check: Check) -> str:
    if check.tolerance is None:
        return "only shown"
    return percent(check.tolerance) + (f" and {human(check.allowance)}" if check.allowance else "")


def _subtitle(report: Report) -> str:
    known = report.records[0].provenance
    ranks = "one rank" if known.world_size == 1 else f"{known.world_size:,} ranks"
    return f"{report.kind.capitalize()}: {known.model}, {known.strategy}, {ranks}, {known.precision}."


def _columns(report: Report) -> list[str]:
    return [*report.names, "change"] if len(report.names) == 2 else report.names


def _headline_rows(report: Report) -> list[list[str]]:
    def size(count: int | None) -> str:
        return "not recorded" if count is None else human(count)

    compared = len(report.names) == 2
    return [
        [line.name, line.counted, size(line.bytes), *([size(line.baseline), change(line.change)] if compared else [])]
        for line in report.headlines
    ]


def _unaccounted_rows(report: Report) -> list[list[str]]:
    worst = report.unaccounted
    if worst is None:
        return []
    where = f"worst moment of all ranks, rank {worst.rank}: {percent(worst.share, 2)} of {human(worst.total)}"
    return [["unaccounted", where, human(worst.bytes), *(["", ""] if len(report.names) == 2 else [])]]


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(words: str) -> str:
    return " ".join(words.replace("\\", "\\\\").replace("|", "\\|").split())


# Terminal.


def print_report(report: Report, console: Console) -> None:
    """The short version: verdict, bars, predicted against measured, state, checks."""
    console.print(Text(f"Memory: {report.title}", style="bold"))
    console.print(Text(f"{_subtitle(report)} Bytes of the fullest rank.", style="bright_black"))
    for notice in report.notices:
        console.print(Text(f"! {notice}", style="yellow"))
    console.print()
    console.print(_headlines(report))
    console.print()
    for verdict in report.verdicts:
        console.print(_verdict(verdict))
    if not report.verdicts:
        console.print(Text(no_verdicts(report)))
    for part in (
        *_bars(report, console.width),
        *_comparisons(report),
        _state(report),
        *_on_hosts(report),
        *_checks(report),
    ):
        console.print()
        console.print(part)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> Table:
    """Rows without rules, one space between columns; the columns from `numbers` on are aligned at the right."""
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bright_black",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        number = index >= numbers
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _headlines(report: Report) -> Table:
    rows = [[row[0], *row[2:]] for row in _headline_rows(report)]
    worst = report.unaccounted
    if worst is not None:
        cells = [f"unaccounted, {percent(worst.share, 2)}", human(worst.bytes)]
        rows.append([*cells, *(["", ""] if len(report.names) == 2 else [])])
    return _table("", ["", *_columns(report)], rows, 1)


def _verdict(verdict: Verdict) -> RenderableType:
    head = Text.assemble((verdict.outcome, OUTCOMES[verdict.outcome]), "  ", (verdict.claim, "bold"))
    body = f"{found(verdict)}, expected {verdict.expected}\nof {verdict.counted}\n"
    return Group(head, Padding(Text.assemble(body, (verdict.reason, "bright_black")), (0, 0, 0, 6)))


def _bars(report: Report, width: int) -> Iterable[RenderableType]:
    every = [bar for panel in report.panels for group in panel.groups for bar in group.bars]
    most = max((bar.total for bar in every), default=0) or 1
    who = max(map(len, report.names)) + 2
    long = max(width - who - 23, 16)
    for panel in report.panels:
        lines = [Text(panel.title, style="bold")]
        for group in panel.groups:
            lines.append(Text(group.label, style="bright_black"))
            for bar in group.bars:
                drawn = _letters(bar, most, long)
                lines.append(
                    Text.assemble(f"{bar.who:<{who}}", drawn, " " * (long - len(drawn)), f"{human(bar.total):>23}")
                )
        yield Group(*lines)
    used = [category for category in STACK if any(category in bar.bytes for bar in every)]
    names = {category: f" {category.value}".replace(" ", "\N{NO-BREAK SPACE}") for category in used}
    yield Text("  ").join(Text.assemble(LETTERS[category], name) for category, name in names.items())


def _letters(bar: Bar, most: int, long: int) -> Text:
    """The stack in letters; ends are rounded, so that the whole is as long as its total."""
    drawn, below = Text(), 0
    for category in STACK:
        above = below + bar.bytes.get(category, 0)
        letter, colour = LETTERS[category]
        drawn.append(letter * (round(above / most * long) - round(below / most * long)), style=colour)
        below = above
    return drawn


def _comparisons(report: Report) -> Iterable[RenderableType]:
    for comparison in report.comparisons:
        rows: list[list[str]] = []
        for part in comparison.sections:
            rows += [["at the peak:" if "Peak" in part.title else "model states:", *[""] * 4]] if part.main else []
            rows += [
                [x.name, human(x.predicted), human(x.measured), ratio(x.ratio), signed(x.residual).split(" (")[0]]
                for x in (part.lines if part.main else part.lines[-1:])
            ]
        title = f"Predicted against measured: {comparison.who}, rank {comparison.rank}"
        yield _table(title, ["", "predicted", "measured", "ratio", "residual"], rows, 1)


def _on_hosts(report: Report) -> Iterable[RenderableType]:
    if report.hosts:
        yield _table("Hosts and their ranks", HOST_COLUMNS, host_rows(report), 3)


def _state(report: Report) -> RenderableType:
    rows = [[s.who, s.key, s.dtype, s.shape_rule, human(s.bytes)] for s in report.state]
    return _table("Optimizer state, fullest rank", ["run", "key", "dtype", "a value per", "bytes"], rows, 4)


def _checks(report: Report) -> Iterable[RenderableType]:
    every = check_rows(report)
    for name in report.names:
        rows = [[row[1], row[4], row[5], row[6], row[7]] for row in every if row[0] == name]
        if rows:
            title = f"Cross-checks of {name}, worst rank"
            yield _table(title, ["check", "held against", "difference", "allowed", "outcome"], rows, 2)
    for title, rows in paper_rows(report).items():
        yield _table(title, PAPER_COLUMNS, rows, 1)
