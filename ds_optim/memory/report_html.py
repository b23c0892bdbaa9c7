"""The report as one page: no script, no network, nothing beside it; light and dark, phone and print."""

from __future__ import annotations

import jinja2
from markupsafe import Markup

from ds_optim.memory import charts
from ds_optim.memory.record import Category, human
from ds_optim.memory.report_data import Report
from ds_optim.memory.report_provenance import STACK
from ds_optim.memory.report_text import change, check_rows, found, no_verdicts, paper_rows, percent, ratio, signed

MEANING = {
    Category.PARAMETERS: "",
    Category.MASTER: "the copy that the optimizer updates",
    Category.GRADIENTS: "",
    Category.BUCKETS: "where gradients are reduced",
    Category.OPTIMIZER: "",
    Category.ACTIVATIONS: "",
    Category.WORKSPACE: "made inside the step and dropped again",
    Category.EXCHANGE: "what whole-matrix optimizers send",
    Category.BUFFERS: "tables, batches",
    Category.SLACK: "reserved by the allocator and not used",
    Category.UNACCOUNTED: "alive, and nobody's",
}


def render_html(report: Report) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ds_optim.memory", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "human": human,
        "signed": signed,
        "change": change,
        "percent": percent,
        "ratio": ratio,
        "found": found,
        "slug": charts.slug,
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        bars=_bars(report),
        timelines=_timelines(report),
        legend=_legend(report),
        paper=paper_rows(report),
        checks=check_rows(report),
        no_verdicts=no_verdicts(report),
        outcomes={"PASS": "pass", "FAIL": "fail", "NOT APPLICABLE": "none"},
    )


def _bars(report: Report) -> list[Markup]:
    """Every panel wide and narrow, all on one axis."""
    highest = max((bar.total for panel in report.panels for group in panel.groups for bar in group.bars), default=0)
    scale = charts.axis(highest, report.capacity)
    return [
        Markup("".join(charts.bars(panel, scale, report.capacity, width) for width in (charts.WIDE, charts.NARROW)))
        for panel in report.panels
    ]


def _timelines(report: Report) -> list[Markup]:
    """Every timeline wide and narrow, all on one axis; room is left above the peak for its label."""
    highest = max((sum(s.bytes.values()) for line in report.timelines for s in line.samples), default=0)
    scale = charts.axis(highest, report.capacity, headroom=1.2)
    return [
        Markup("".join(charts.timeline(line, scale, report.capacity, width) for width in (charts.WIDE, charts.NARROW)))
        for line in report.timelines
    ]


def _legend(report: Report) -> list[tuple[Category, str]]:
    """What the charts show, from the bottom of a stack to its top."""
    used = {
        category for panel in report.panels for group in panel.groups for bar in group.bars for category in bar.bytes
    }
    used |= {category for line in report.timelines for sample in line.samples for category in sample.bytes}
    return [(category, MEANING[category]) for category in STACK if category in used]
