"""The memory report says what the records say, as a page, as Markdown, as JSON and in a terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from rich.console import Console
from typer.testing import CliRunner

import browser
from ds_optim.memory import charts, claims
from ds_optim.memory.claims import Verdict
from ds_optim.memory.record import Category, Record, Sample, human
from ds_optim.memory.report import make_report
from ds_optim.memory.report_command import report as report_command
from ds_optim.memory.report_command import write
from ds_optim.memory.report_data import Report
from ds_optim.memory.report_html import render_html
from ds_optim.memory.report_runs import ReportError, Run, read_runs
from ds_optim.memory.report_text import print_report, render_markdown
from memory_records import record

ADAMW = "torch.AdamW (fused)"


def two_runs(**settings: Any) -> Report:
    """AdamMini, measured and predicted, beside a measured AdamW."""
    return make_report(
        Run("a", record(**settings), record(kind="predicted", **settings), "AdamMini"),
        Run("b", record(ADAMW, **settings), None, "AdamW (fused)"),
    )


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory of records: a measured and predicted pair in ``mini``, a measured AdamW in ``adamw.json``."""
    record().save(tmp_path / "mini" / "measured.json")
    record(kind="predicted").save(tmp_path / "mini" / "predicted.json")
    record(ADAMW).save(tmp_path / "adamw.json")
    return tmp_path


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(report_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


# What it says.


def test_the_command_writes_a_page_markdown_and_json(files: Path) -> None:
    result = run(files / "mini", files / "adamw.json", "--output", files / "out")
    assert result.exit_code == 0, result.output
    assert {file.name for file in (files / "out").iterdir()} == {"report.html", "report.md", "report.json"}
    peak = record().fullest.peak
    assert peak is not None
    assert human(peak.total) in result.output
    content = json.loads((files / "out" / "report.json").read_text(encoding="utf-8"))
    assert content["title"] == "AdamMini beside AdamW (fused)"
    assert [found["kind"] for found in content["records"]] == ["measured", "predicted", "measured"]
    assert Record.model_validate(content["records"][0]) == record()


def test_the_headlines_are_the_records_numbers() -> None:
    ours, theirs = record().fullest, record(ADAMW).fullest
    states, model_states, peak = two_runs().headlines
    assert (states.bytes, states.baseline) == (ours.state_bytes, theirs.state_bytes)
    assert (model_states.bytes, model_states.baseline) == tuple(sum(r.model_states.values()) for r in (ours, theirs))
    assert (peak.bytes, peak.baseline) == tuple(r.peak.total for r in (ours, theirs) if r.peak)
    assert states.change == pytest.approx(-0.5, abs=1e-3)
    assert "backward" in peak.counted


@pytest.mark.parametrize("render", [render_html, render_markdown], ids=["page", "Markdown"])
def test_every_number_of_the_records_is_shown(render: Callable[[Report], str]) -> None:
    words = re.sub(r"<[^>]+>", "", render(two_runs()))
    for shown in (record(), record(ADAMW)):
        for rank in shown.ranks:
            for moment in (rank.peak, rank.moment("after step")):
                assert moment is not None
                assert human(moment.total) in words
                assert all(human(amount.bytes) in words for amount in moment.amounts.values())
        assert all(f"{entry.elements:,}" in words for entry in shown.fullest.state)
        assert all(value in words for value in shown.provenance.settings.values())
        assert all(version in words for version in shown.provenance.versions.values())


def test_every_bar_is_as_long_as_its_bytes() -> None:
    """The rectangles of a bar touch one another and end where its total lies on the axis."""
    shown = two_runs()
    panel = shown.panels[0]
    highest = max(bar.total for group in panel.groups for bar in group.bars)
    scale = charts.axis(highest)
    for width in (charts.WIDE, charts.NARROW):
        drawn = re.findall(r'<g class="bar".*?</g>', charts.bars(panel, scale, None, width))
        ends = {}
        for bar in drawn:
            total = int(re.findall(r'data-bytes="(\d+)"', bar)[0])
            corners = [
                tuple(map(float, pair)) for pair in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', bar)
            ]
            assert all(0 <= b - (a + long) <= 1.1 for (a, long), (b, _) in pairwise(corners))
            ends[total] = (corners[-1][0] + corners[-1][1] - corners[0][0]) / total
        assert len(drawn) == 4
        assert max(ends.values()) == pytest.approx(min(ends.values()), rel=0.01)


def test_predicted_stands_against_measured_per_category() -> None:
    (found,) = two_runs().comparisons
    titles = [section.title for section in found.sections]
    assert titles == ["Model states", "Peak of the backward, the highest", "Peak of the forward", "Peak of the step"]
    states = {line.name: line for line in found.sections[0].lines}
    assert all(line.ratio == 1 and line.residual == 0 for line in states.values())
    activations = next(line for line in found.sections[2].lines if line.name == "activations")
    assert activations.ratio == pytest.approx(0.99, abs=1e-3)
    assert activations.residual == activations.measured - activations.predicted > 0


def test_claims_keep_their_outcome_and_their_denominator(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(ours: Record, theirs: Record) -> list[Verdict]:
        assert (ours.provenance.optimizer, theirs.provenance.optimizer) == ("ds_optim.AdamMini", ADAMW)
        known = {"who": "somebody", "expected": "25 %"}
        return [
            Verdict(claim="first", counted="states", found=0.123, outcome="FAIL", reason="too little", **known),
            Verdict(claim="second", counted="bananas", found=None, outcome="NOT APPLICABLE", reason="none", **known),
            Verdict(claim="third", counted="scratch", found=-0.5, outcome="PASS", reason="said so", **known),
        ]

    monkeypatch.setattr(claims, "judge", judge)
    made = two_runs()
    terminal = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_report(made, terminal)
    for words in (re.sub(r"<[^>]+>", "", render_html(made)), render_markdown(made), terminal.export_text()):
        for fact in ("FAIL", "NOT APPLICABLE", "PASS", "bananas", "12.3 % saved", "not counted", "50.0 % more"):
            assert fact in words


def test_the_real_claims_are_judged() -> None:
    verdicts = {verdict.claim: verdict.outcome for verdict in two_runs().verdicts}
    assert verdicts["Adam-mini saves 45 to 50 % of the optimizer state"] == "PASS"


def test_without_a_baseline_nothing_is_judged_and_the_reader_is_told() -> None:
    made = make_report(Run("a", record(), None, "AdamMini"))
    assert made.verdicts == []
    assert made.headlines[0].change is None
    assert all("--baseline" in words for words in (render_html(made), render_markdown(made)))


def test_hosts_have_a_row_each_and_a_row_per_rank() -> None:
    two = record(ranks=4)
    named = [rank.model_copy(update={"host": f"node{rank.rank // 2}"}) for rank in two.ranks]
    report = make_report(Run("a", measured=two.model_copy(update={"ranks": named})))
    assert [(row.host, row.rank) for row in report.hosts] == [
        *(("node0", None), ("node0", 0), ("node0", 1)),
        *(("node1", None), ("node1", 2), ("node1", 3)),
    ]
    assert report.hosts[3].peak == named[2].peak.on_device + named[3].peak.on_device  # type: ignore[union-attr]
    assert report.hosts[0].state == 2 * named[0].state_bytes
    for text in (render_markdown(report), render_html(report)):
        assert "Hosts and their ranks" in text
        assert human(report.hosts[0].states).split(" (")[0] in text
    assert make_report(Run("a", measured=two)).hosts == []  # one machine, or nobody knows


def test_unaccounted_is_the_worst_moment_of_all_ranks() -> None:
    worst = two_runs(unaccounted=3_000_000).unaccounted
    assert worst is not None
    assert worst.bytes == 3_000_000
    assert worst.total == min(m.total for r in record(unaccounted=3_000_000).ranks for m in r.moments)
    assert make_report(Run("a", None, record(kind="predicted"), "x")).unaccounted is None


@pytest.mark.parametrize(
    ("ranks", "labels"),
    [(1, ["rank 0"]), (8, [f"rank {n}" for n in range(8)]), (9, ["fullest rank", "emptiest rank", "mean"])],
)
def test_many_ranks_are_shown_by_the_fullest_the_emptiest_and_the_mean(ranks: int, labels: list[str]) -> None:
    made = two_runs(ranks=ranks)
    assert [group.label for group in made.panels[0].groups] == labels
    if ranks == 9:
        totals = sorted(rank.peak.total for rank in record(ranks=9).ranks if rank.peak)
        shown = [group.bars[1].total for group in made.panels[0].groups]
        assert shown == pytest.approx([totals[-1], totals[0], sum(totals) / 9], abs=len(Category))


def test_a_prediction_of_one_rank_of_many_says_so() -> None:
    made = make_report(Run("a", None, record(kind="predicted", ranks=1, world_size=1024), "AdamMini"))
    assert made.notices == ["AdamMini: 1 of 1024 ranks are in the record."]
    assert [group.label for group in made.panels[0].groups] == ["fullest rank"]


def test_runs_of_different_kinds_and_settings_are_compared_with_a_notice() -> None:
    made = make_report(
        Run("a", record(), None, "x"), Run("b", None, record(ADAMW, kind="predicted", precision="fp32"), "y")
    )
    assert any("predicted" in notice for notice in made.notices)
    assert any("precision bf16 and fp32" in notice for notice in made.notices)


def test_a_line_marks_the_capacity_where_it_is_in_reach() -> None:
    assert "capacity 700.00 MB" in render_html(two_runs(device_memory=700_000_000))
    far = render_html(two_runs(device_memory=80_000_000_000))
    assert "capacity 80" not in far
    assert human(80_000_000_000) in far


def test_a_device_limit_is_not_drawn_across_bytes_that_are_in_host_memory() -> None:
    plain = record(device_memory=700_000_000)
    moments = [moment.model_copy(update={"on_host": 100_000_000}) for moment in plain.fullest.moments]
    offloaded = plain.model_copy(update={"ranks": [plain.fullest.model_copy(update={"moments": moments})]})
    made = make_report(Run("a", offloaded, None, "AdamMini"))
    assert made.capacity is None
    assert any("100.00 MB (95.37 MiB) are in host memory" in notice for notice in made.notices)
    assert 'class="capacity"' not in render_html(made)


def test_a_timeline_keeps_its_highest_point_when_it_is_thinned() -> None:
    samples = [
        Sample(at=i / 9999, phase="forward", bytes={Category.ACTIVATIONS: 999 if i == 7003 else i % 50})
        for i in range(10_000)
    ]
    kept = charts.thinned(samples)
    assert len(kept) <= charts.MOST_POINTS + 2
    assert max(sum(sample.bytes.values()) for sample in kept) == 999
    assert [kept[0], kept[-1]] == [samples[0], samples[-1]]


def test_a_phase_that_allocated_nothing_is_named() -> None:
    plain = record(ranks=1)
    kept = [sample for sample in plain.fullest.timeline if sample.phase != "step"]
    still = plain.model_copy(update={"ranks": [plain.fullest.model_copy(update={"timeline": kept})]})
    assert "Nothing was allocated in the step" in render_html(make_report(Run("a", still, None, "x")))
    assert "Nothing was allocated" not in render_html(make_report(Run("a", plain, None, "x")))


def test_a_record_without_a_timeline_says_so() -> None:
    assert "No timeline was kept" in render_html(two_runs(timeline=False))


def test_published_tables_are_shown_when_asked_for_and_no_published_throughput_is(files: Path) -> None:
    made = make_report(*read_runs([files / "mini", files / "adamw.json"]), paper_tables=True)
    for words in (render_html(made), render_markdown(made)):
        assert "26.958 GB" in words
        assert not re.search(r"tokens/s|5572|3725|49\.6 %", words)


# Its forms.


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    page = render_html(two_runs())
    assert not re.search(r"<script|https?:|@import|url\((?!#)|<iframe|srcset", page)
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]


def test_what_a_record_says_cannot_become_markup() -> None:
    name = "x.<script>alert(1)</script>|"
    made = make_report(Run("a", record(notes=[name]), None, name))
    assert "<script" not in render_html(made)
    assert tables(render_markdown(made))


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of cells, as a Markdown parser sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 3:
            found[-1][-1].append(token.content)
    return found


def test_the_markdown_tables_parse() -> None:
    made = two_runs()
    markdown = render_markdown(made)
    found = tables(markdown)
    assert len(found) == markdown.count("\n| --- |") == 1 + 1 + 2 + 4 + 1 + 1 + 2
    assert all(len(row) == len(table[0]) for table in found for row in table)
    headline = found[0][1]
    assert headline[0] == "optimizer state"
    assert headline[2] == human(record().fullest.state_bytes)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") >= 3 for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_version_fits_its_width(width: int) -> None:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_report(two_runs(), console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    peak = record().fullest.peak
    assert peak is not None
    assert any(line.startswith("peak") and human(peak.total) in line for line in lines)
    drawn = [line for line in lines if re.match(r"AdamMini +P+m+", line)]
    assert len(drawn) == 4
    activations = next(line for line in lines if line.startswith("activations"))
    assert "0.990" in activations


# What is refused.


def test_a_measured_and_a_predicted_file_of_one_run_become_one(files: Path) -> None:
    found, other = read_runs([files / "mini" / "predicted.json", files / "mini" / "measured.json"])
    assert other is None
    assert found.measured == record()
    assert found.predicted == record(kind="predicted")


def test_two_runs_of_one_optimizer_get_names_that_tell_them_apart(tmp_path: Path) -> None:
    record().save(tmp_path / "a.json")
    record(precision="fp32").save(tmp_path / "b.json")
    found, other = read_runs([tmp_path / "a.json"], tmp_path / "b.json")
    assert other is not None
    assert (found.name, other.name) == ("AdamMini, bf16", "AdamMini, fp32")


def _truncated(files: Path) -> list[object]:
    text = (files / "adamw.json").read_text(encoding="utf-8")
    (files / "cut.json").write_text(text[: len(text) // 2], encoding="utf-8")
    return [files / "cut.json"]


def _other_model(files: Path) -> list[object]:
    record(ADAMW, parameters=124_000_000, model="gpt2").save(files / "gpt2.json")
    return [files / "mini", files / "gpt2.json"]


def _mixed_directory(files: Path) -> list[object]:
    record(kind="predicted", precision="fp32").save(files / "mini" / "predicted.json")
    return [files / "mini"]


def _empty_directory(files: Path) -> list[object]:
    (files / "empty").mkdir()
    return [files / "empty"]


def _wrong_name(files: Path) -> list[object]:
    record().save(files / "wrong" / "predicted.json")
    return [files / "wrong"]


def _three(files: Path) -> list[object]:
    record("ds_optim.Lion").save(files / "lion.json")
    return [files / "mini", files / "adamw.json", "--baseline", files / "lion.json"]


def _output_is_a_file(files: Path) -> list[object]:
    return [files / "mini", "--output", files / "adamw.json"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda files: [files / "none.json"], r"none\.json: No such file"),
        (_truncated, r"cut\.json is no whole memory record"),
        (_other_model, r"cannot be compared: .*58,073,600 parameters, gpt2 has 124,000,000"),
        (_mixed_directory, r"of different runs \(precision bf16 and fp32\)"),
        (_empty_directory, r"holds neither measured\.json nor predicted\.json"),
        (_wrong_name, r"holds a measured record: rename it"),
        (_three, r"3 were given"),
        (_output_is_a_file, r"adamw\.json"),
    ],
)
def test_bad_input_gives_one_clear_error(files: Path, given: Callable[[Path], list[object]], message: str) -> None:
    result = run("--output", files / "out", *given(files))
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert re.search(f"^problem: .*{message}", result.output)
    assert not (files / "out").exists()


def test_errors_have_types(files: Path) -> None:
    with pytest.raises(ReportError):
        write([Path(str(path)) for path in _empty_directory(files)], files / "out", None, False)


# In a real browser.


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    program = browser.find()
    if program is None:
        message = "chromium is not installed (.ci/run installs it)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with browser.chromium(program) as opened:
        yield opened


VISIBLE = """
(selector => [...document.querySelectorAll(selector)].map(e => {
  const box = e.getBoundingClientRect();
  return {text: e.textContent, left: box.left, right: box.right, top: box.top, bottom: box.bottom};
}).filter(b => b.right > b.left && b.bottom > b.top))
"""

CONTRAST = """
(() => {
  const probe = document.createElement('span');
  document.body.append(probe);
  const light = name => {
    probe.style.color = `var(--${name})`;
    const parts = getComputedStyle(probe).color.match(/\\d+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
  };
  const found = {};
  for (const [front, back] of PAIRS) {
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    found[`${front} on ${back}`] = (a + .05) / (b + .05);
  }
  probe.remove();
  return found;
})()
"""

READ = [
    *[(name, "paper") for name in ("ink", "soft", "limit")],
    ("pass", "pass-paper"),
    ("fail", "fail-paper"),
    *[("on-strong", name) for name in ("parameters", "gradients", "optimizer", "activations")],
    *[("on-tint", name) for name in ("master", "buckets")],
]
SEEN = [(n, "paper") for n in ("parameters", "gradients", "optimizer", "activations", "workspace", "exchange", "edge")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_stands_in_chromium(page: browser.Page, files: Path, width: int, scheme: str) -> None:
    record(device_memory=660_000_000).save(files / "mini" / "measured.json")
    made = write([files / "mini", files / "adamw.json"], files / "out", None, paper_tables=False)
    before = len(page.requests)
    page.open(made, width, scheme)

    assert page.console == []
    assert [url for url in page.requests[before:] if not url.startswith("data:")] == [made.resolve().as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:
        cut = (
            "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel)"
        )
        assert page.evaluate(cut) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == (scheme == "dark")

    (verdict,) = page.evaluate(f"{VISIBLE}('#verdict')")
    assert "PASS" in verdict["text"]
    assert "Adam-mini saves 45 to 50 %" in verdict["text"]
    everything = page.evaluate(f"{VISIBLE}('#verdict *, .bar, .bar rect, svg.chart')")
    assert all(box["left"] >= 0 and box["right"] <= width + 0.5 for box in everything)
    drawn = page.evaluate(f"{VISIBLE}('.bar')")
    assert len(drawn) == 8  # two panels, two ranks, AdamW and AdamMini
    assert all(box["right"] - box["left"] > 100 and box["bottom"] - box["top"] > 20 for box in drawn)

    words = page.evaluate(f"{VISIBLE}('svg.chart text')")
    assert len(words) > 40
    assert all(box["left"] >= 0 and box["right"] <= width for box in words)
    assert min(box["bottom"] - box["top"] for box in words) >= 11, "letters are too small"
    for index, one in enumerate(words):
        for other in words[index + 1 :]:
            apart = (
                one["right"] <= other["left"]
                or other["right"] <= one["left"]
                or one["bottom"] - 2 <= other["top"]
                or other["bottom"] - 2 <= one["top"]
            )
            assert apart, f"{one['text']!r} lies over {other['text']!r}"

    for pairs, enough in ((READ, 4.5), (SEEN, 3.0)):
        found = page.evaluate(CONTRAST.replace("PAIRS", json.dumps(pairs)))
        assert {pair: ratio for pair, ratio in found.items() if ratio < enough} == {}


def test_the_page_can_be_printed(page: browser.Page, files: Path) -> None:
    """On the width of an A4 sheet nothing is cut off, and the paper is white whatever the screen."""
    made = write([files / "mini", files / "adamw.json"], files / "out", None, paper_tables=True)
    page.open(made, 680, "dark", media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(page.evaluate(f"{VISIBLE}('.bar')")) == 8


def test_the_browser_would_notice_a_request_and_a_console_error(page: browser.Page, tmp_path: Path) -> None:
    """The test above can fail."""
    file = tmp_path / "bad.html"
    file.write_text("<script>console.error('oh')</script><img src='https://example.org/x.png'>", encoding="utf-8")
    page.open(file, 360, "light")
    assert any("oh" in said for said in page.console)
    assert any("example.org" in url for url in page.requests)
    page.console.clear()
    page.requests.clear()
