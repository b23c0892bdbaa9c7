"""The report's two charts as inline SVG: stacked bars per rank, and the timeline of a step.

Colours and hatches are classes and patterns of the page (``fill-parameters``), so that light, dark and print are the
page's business. Each chart is drawn twice, for a wide page and for a phone; letters keep their size on both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor, log10

from ds_optim.memory.record import Category, Sample, human
from ds_optim.memory.report_data import Bar, Panel, StepCourse
from ds_optim.memory.report_provenance import STACK

WIDE, NARROW = 880, 328
"""Widths in CSS pixels."""

CHARACTER = 6.9
"""Upper bound on the mean width of a letter at 12 px in the fonts of the page, in pixels."""

BOLD = 1.15
"""How much longer a word is in bold."""

MOST_POINTS = 360
"""Of a timeline; more are thinned out, and the highest of each run of points is kept."""

LABELLED = {
    Category.PARAMETERS: "parameters",
    Category.MASTER: "master",
    Category.GRADIENTS: "gradients",
    Category.BUCKETS: "buckets",
    Category.OPTIMIZER: "optimizer",
    Category.ACTIVATIONS: "activations",
}
"""Words that stand inside a bar where they fit; the hatched categories carry none."""


@dataclass(frozen=True)
class Axis:
    """From 0 to `limit` bytes, marked at `ticks`, in a unit of `size` bytes."""

    limit: float
    ticks: tuple[float, ...]
    unit: str
    size: float

    def tick(self, value: float) -> str:
        return f"{value / self.size:g}"


def axis(highest: float, capacity: int | None = None, headroom: float = 1.0) -> Axis:
    """A round axis for these bytes, and for the device's capacity if it is less than three times as far."""
    reach = max(highest * headroom, 1.0)
    if capacity is not None and capacity < 3 * highest:
        reach = max(reach, capacity * max(headroom, 1.04))
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if reach >= s), ("B", 1.0))
    rough = reach / size / 4
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    count = ceil(reach / size / step - 0.05)
    ticks = tuple(round(index * step, 9) * size for index in range(count + 1))
    return Axis(max(reach, ticks[-1] if count * step * size <= reach * 1.15 else reach), ticks, unit, size)


def slug(category: Category) -> str:
    """Part of a CSS class."""
    return category.value.replace(" ", "-")


def _tag(name: str, content: str = "", /, **attributes: object) -> str:
    pairs = "".join(f' {key.strip("_").replace("_", "-")}="{escape(_plain(v))}"' for key, v in attributes.items())
    return f"<{name}{pairs}>{content}</{name}>" if content else f"<{name}{pairs}/>"


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _text(x: float, y: float, words: str, look: str = "", anchor: str = "start") -> str:
    return _tag("text", escape(words), x=x, y=y, class_=look, text_anchor=anchor)


def _svg(width: int, height: float, title: str, description: str, look: str, parts: Sequence[str]) -> str:
    """One picture with a name and a description for those who do not see it."""
    size = "wide" if width == WIDE else "narrow"
    said = _tag("title", escape(title)) + _tag("desc", escape(description))
    return _tag(
        "svg",
        said + "".join(parts),
        class_=f"chart {look} {size}",
        viewBox=f"0 0 {width} {_plain(float(height))}",
        role="img",
        aria_label=f"{title}. {description}",
    )


# Bars.


def bars(panel: Panel, scale: Axis, capacity: int | None, width: int) -> str:
    """Stacked bars per rank, the baseline above the run, on an axis that other panels may share."""
    wide = width == WIDE
    names = {bar.who for group in panel.groups for bar in group.bars}
    left = max(CHARACTER * max(map(len, names)) + 16, 96) if wide else 0.0
    right = 176.0 if wide else 0.0
    plot = width - left - right - (0 if wide else 2)
    thick, top = (26.0, 26.0 if _capacity_shown(scale, capacity) else 6.0)
    rows: list[str] = []
    tops: list[float] = []
    y = top
    for index, group in enumerate(panel.groups):
        y += 14 if index else 0
        rows.append(_text(0, y + 13, group.label, "rank"))
        y += 22
        for bar in group.bars:
            total = human(bar.total)
            if wide:
                rows.append(_text(left - 12, y + thick / 2 + 4, bar.who, "who", "end"))
                rows.append(_text(width, y + thick / 2 + 4, total, "total", "end"))
            elif CHARACTER * (len(bar.who) + len(total) + 2) <= width:
                rows += [_text(0, y + 12, bar.who, "who"), _text(width, y + 12, total, "total", "end")]
                y += 19
            else:
                rows += [_text(0, y + 12, bar.who, "who"), _text(0, y + 28, total, "total")]
                y += 35
            rows.append(_bar(bar, left, y, plot / scale.limit, thick))
            tops.append(y)
            y += thick + (6 if wide else 10)
    bottom = y + 4
    grid = [
        part
        for index, tick in enumerate(scale.ticks)
        if tick <= scale.limit * 1.001
        for x in [left + tick / scale.limit * plot]
        for part in (
            _tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"),
            _text(
                x,
                bottom + 16,
                scale.tick(tick) + (f" {scale.unit}" if index == 0 else ""),
                "tick",
                _anchor(index, tick, scale, wide),
            ),
        )
    ]
    # On a phone totals stand between the bars: the line is broken there.
    spans = [(top - 6, bottom)] if wide else [(top - 6, top + 2), *((y - 2, y + thick + 2) for y in tops)]
    limit = _capacity_line(scale, capacity, left, plot, spans, width)
    described = "; ".join(f"{g.label}: {', '.join(f'{b.who} {human(b.total)}' for b in g.bars)}" for g in panel.groups)
    return _svg(width, bottom + 24, panel.title, described, "bars", [*grid, *rows, limit])


def _anchor(index: int, tick: float, scale: Axis, wide: bool) -> str:
    if index == 0:
        return "start"
    return "end" if not wide and tick > 0.97 * scale.limit else "middle"


def _bar(bar: Bar, left: float, y: float, per_byte: float, thick: float) -> str:
    parts, x = [], left
    for category in STACK:
        count = bar.bytes.get(category, 0)
        if not count:
            continue
        long = count * per_byte
        title = _tag("title", escape(f"{bar.who}: {category.value} {human(count)}"))
        parts.append(
            _tag(
                "rect",
                title,
                x=x,
                y=y,
                width=max(long - (1.0 if long > 4 else 0.0), 0.4),
                height=thick,
                class_=f"fill-{slug(category)}{' thin' if long < 3 else ''}",
            )
        )
        word = LABELLED.get(category, "")
        if word and CHARACTER * len(word) + 8 <= long:
            parts.append(_text(x + long / 2, y + thick / 2 + 4, word, f"inside on-{slug(category)}", "middle"))
        x += long
    label = f"{bar.who}, {human(bar.total)}"
    return _tag("g", "".join(parts), class_="bar", data_who=bar.who, data_bytes=bar.total, aria_label=label)


def _capacity_shown(scale: Axis, capacity: int | None) -> bool:
    return capacity is not None and capacity <= scale.limit


def _capacity_line(
    scale: Axis, capacity: int | None, left: float, plot: float, spans: Sequence[tuple[float, float]], width: int
) -> str:
    if capacity is None or not _capacity_shown(scale, capacity):
        return ""
    x = left + capacity / scale.limit * plot
    words = f"capacity {human(capacity)}"
    half = BOLD * CHARACTER * len(words) / 2
    at, anchor = (x, "middle") if half <= x <= width - half else (min(x + 4, float(width)), "end")
    line = "".join(_tag("line", x1=x, x2=x, y1=start, y2=stop, class_="capacity") for start, stop in spans)
    return _tag("g", line + _text(at, spans[0][0] - 6, words, "limit", anchor))


# Timeline.


def timeline(line: StepCourse, scale: Axis, capacity: int | None, width: int) -> str:
    """Stacked areas over one step, its phases as bands, the highest point marked."""
    wide = width == WIDE
    left, right = (52.0, 8.0) if wide else (34.0, 2.0)
    plot, tall = width - left - right, 280.0 if wide else 230.0
    samples = thinned(line.samples)
    phases = _phases(samples)
    crowded = any(CHARACTER * len(name) + 8 > (stop - start) * plot for name, start, stop in phases)
    top = 44.0 if crowded else 26.0
    bottom = top + tall

    def x_of(at: float) -> float:
        return left + at * plot

    def y_of(count: float) -> float:
        return bottom - count / scale.limit * tall

    parts = _bands(phases, x_of, width, top, bottom)
    for index, tick in enumerate(scale.ticks):
        if tick <= scale.limit * 1.001:
            y = y_of(tick)
            parts.append(_tag("line", x1=left, x2=left + plot, y1=y, y2=y, class_="grid"))
            parts.append(_text(left - 6, y + 4, scale.tick(tick) if index else f"0 {scale.unit}", "tick", "end"))
    floor_ = [0] * len(samples)
    for category in STACK:
        counts = [sample.bytes.get(category, 0) for sample in samples]
        if not any(counts):
            continue
        ceiling = [below + count for below, count in zip(floor_, counts, strict=True)]
        path = _steps(samples, ceiling, x_of, y_of) + _steps(samples, floor_, x_of, y_of, back=True) + "Z"
        title = _tag("title", escape(f"{category.value}, at most {human(max(counts))}"))
        parts.append(_tag("path", title, d="M" + path[1:], class_=f"area fill-{slug(category)}"))
        floor_ = ceiling
    for _, _, stop in phases[:-1]:
        parts.append(_tag("line", x1=x_of(stop), x2=x_of(stop), y1=top, y2=bottom, class_="border"))
    highest = max(range(len(samples)), key=lambda index: floor_[index])
    x, y = x_of(samples[highest].at), y_of(floor_[highest])
    words = f"peak {human(floor_[highest])}"
    described = f"{words}, in the {samples[highest].phase}"
    label, line_at = y - 18, None
    if capacity is not None and _capacity_shown(scale, capacity):
        line_at = y_of(capacity)
        if abs(label - line_at) < 22:
            label = min(label, line_at - 24)  # above the line's own label
    parts.append(_peak(x, y, label, described if wide else words, left, float(width)))
    if capacity is not None and line_at is not None:
        at, anchor = (left + 6, "start") if x > left + plot / 2 else (left + plot - 6, "end")
        parts.append(_tag("line", x1=left, x2=left + plot, y1=line_at, y2=line_at, class_="capacity"))
        parts.append(_text(at, line_at - 6, f"capacity {human(capacity)}", "limit", anchor))
    parts.append(_text(left, bottom + 17, "one step, by allocations" if wide else "one step", "tick"))
    title = f"Timeline of one step of {line.who}, rank {line.rank}"
    return _svg(width, bottom + 24, title, described, "timeline", parts)


def thinned(samples: Sequence[Sample], most: int = MOST_POINTS) -> list[Sample]:
    """At most about `most` of them, the first and last and the highest of each run of neighbours in one phase."""
    if len(samples) <= most:
        return list(samples)
    size = ceil(len(samples) / most)
    kept = []
    for _, phase in groupby(samples, key=lambda sample: sample.phase):
        run = list(phase)
        kept += [max(run[at : at + size], key=lambda s: sum(s.bytes.values())) for at in range(0, len(run), size)]
    return [
        *([samples[0]] if kept[0] != samples[0] else []),
        *kept,
        *([samples[-1]] if kept[-1] != samples[-1] else []),
    ]


def _phases(samples: Sequence[Sample]) -> list[tuple[str, float, float]]:
    """(phase, start, stop) between 0 and 1; a band ends where the next one's first sample lies."""
    starts = [(phase, next(run).at) for phase, run in groupby(samples, key=lambda sample: sample.phase)]
    stops = [at for _, at in starts[1:]] + [1.0]
    return [
        (phase, at if index else 0.0, stop) for index, ((phase, at), stop) in enumerate(zip(starts, stops, strict=True))
    ]


def _bands(
    phases: Sequence[tuple[str, float, float]], x_of: Callable[[float], float], width: int, top: float, bottom: float
) -> list[str]:
    """Backgrounds and names of the phases; a name that is longer than its band stands a row higher."""
    parts: list[str] = []
    free = 0.0  # where the next name of the upper row may begin
    for index, (phase, start, stop) in enumerate(phases):
        x, wide = x_of(start), x_of(stop) - x_of(start)
        if index % 2 == 0:
            parts.append(_tag("rect", x=x, y=top, width=wide, height=bottom - top, class_="band"))
        long = CHARACTER * len(phase)
        if long + 8 <= wide:
            parts.append(_text(x + wide / 2, top - 8, phase, "phase", "middle"))
            continue
        at = min(x + wide / 2 - long / 2, width - long)
        if at >= free:
            parts.append(_text(at, top - 26, phase, "phase"))
            parts.append(_tag("line", x1=x + wide / 2, x2=x + wide / 2, y1=top - 22, y2=top, class_="leader"))
            free = at + long + 10
    return parts


def _steps(
    samples: Sequence[Sample],
    counts: Sequence[int],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    back: bool = False,
) -> str:
    """Path through the points, each holding until the next."""
    edges = [0.0, *(sample.at for sample in samples[1:]), 1.0]
    points = [
        (x_of(at), y_of(count))
        for index, count in enumerate(counts)
        for at in (edges[index], max(edges[index + 1], edges[index]))
    ]
    return "".join(f"L{x:.1f} {y:.1f}" for x, y in (reversed(points) if back else points))


def _peak(x: float, y: float, label: float, words: str, left: float, right: float) -> str:
    """A mark at the highest point with its value above it, kept inside the picture."""
    half = BOLD * CHARACTER * len(words) / 2
    middle = min(max(x, left + half + 2), right - half - 2)
    stem = _tag("line", x1=x, x2=x, y1=label + 5, y2=y, class_="stem")
    mark = _tag("circle", cx=x, cy=y, r=4, class_="mark")
    return _tag("g", stem + mark + _text(middle, label, words, "peak", "middle"), class_="summit")
