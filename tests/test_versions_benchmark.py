"""benchmarks/versions.py without its environments: what it makes of reports, of older results and of what fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import environments  # noqa: E402
import versions  # noqa: E402
from environments import PACKAGES, InstallationError  # noqa: E402
from versions import AREAS, BESIDE, COMBINATIONS, INSTALLATION, RUN, SMOKE  # noqa: E402
from versions_page import cell, page, passes  # noqa: E402

PASSED = {"passed": 7, "failed": 0, "skipped": 0, "seconds": 60, "commit": "abc1234"}
TOOL = next(name for name, one in COMBINATIONS.items() if one.tool)

# -- what a report says -----------------------------------------------------------------------------------------------

FILES = {"first": ["tests/test_a.py"], "second": ["tests/test_a.py", "tests/test_b.py"], "third": ["tests/test_c.py"]}
FINE = """
    <testcase classname="tests.test_a" name="test_one[x.y]" time="1.0" />
    <testcase classname="tests.test_b" name="test_two" time="3.0"><skipped message="no" /></testcase>
    <testcase classname="tests.test_c" name="test_three" time="0.5" />"""
NOT_IMPORTED = """
    <testcase classname="" name="tests.test_b" time="0.000"><error message="collection failure">
E   ModuleNotFoundError: No module named 'nothing'</error></testcase>"""
FAILED = """
    <testcase classname="tests.test_b" name="test_four" time="1"><failure message="assert 1 == 2" /></testcase>"""


def judged(cases: str, ended: int | None, files: dict[str, list[str]] = FILES) -> dict[str, dict[str, Any]]:
    return versions.judged(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", ended, files)


def test_tests_are_counted_in_their_areas() -> None:
    found = judged(FINE, 0)
    assert found["first"] == {"passed": 1, "failed": 0, "skipped": 0, "seconds": 1}
    assert found["second"] == {"passed": 1, "failed": 0, "skipped": 1, "seconds": 4}
    assert all(map(passes, found.values()))


def test_a_file_that_cannot_be_imported_fails_its_areas() -> None:
    found = judged(FINE + NOT_IMPORTED, 1)
    assert found["second"]["reasons"] == {"tests.test_b": "ModuleNotFoundError: No module named 'nothing'"}
    assert [passes(area) for area in found.values()] == [True, False, True]
    smoke = {"smoke": ["tests/test_b.py::test_two", "tests/test_c.py"]}
    assert not passes(judged(FINE + NOT_IMPORTED, 1, smoke)["smoke"])


@pytest.mark.parametrize(
    ("cases", "ended", "said"),
    [
        (FINE, 1, "pytest ended with status 1"),  # of which no test knows
        (FINE, 3, "pytest ended with status 3"),
        (FINE + FAILED, 2, "pytest ended with status 2"),
        ("", None, "not finished after 5400 s"),
    ],
)
def test_a_run_that_broke_down_fails_everywhere(cases: str, ended: int | None, said: str) -> None:
    for area in judged(cases, ended).values():
        assert not passes(area)
        assert area["reasons"][RUN] == said


def test_a_failure_is_its_areas_alone_and_what_was_not_reported_has_failed() -> None:
    found = judged(FINE + FAILED, 1, {**FILES, "fourth": ["tests/test_d.py"]})
    assert {area: passes(one) for area, one in found.items()} == {
        "first": True,
        "second": False,
        "third": True,
        "fourth": False,
    }
    assert found["fourth"]["reasons"] == {RUN: "pytest reported no test of it"}


def test_areas_have_their_parts_of_what_all_took() -> None:
    areas = {"a": {"seconds": 10}, "b": {"seconds": 30}}
    versions.share(areas, 20.0)
    assert areas == {"a": {"seconds": 5}, "b": {"seconds": 15}}


# -- what is known already --------------------------------------------------------------------------------------------


def row_of(name: str, **areas: Any) -> dict[str, Any]:
    return {"releases": COMBINATIONS[name].releases, "areas": areas, "machine": "a machine", "date": "2026-11-29"}


def test_again_drops_what_it_is_told_alone() -> None:
    row = {**row_of("oldest", roles=PASSED, FSDP2=PASSED), "disk_gb": 7.2}
    assert versions.renewed(row, "oldest", []) == row
    assert versions.renewed(row, "oldest", ["FSDP2"]) == {**row, "areas": {"roles": PASSED}}
    assert versions.renewed(row, "newest", [])["areas"] == {}  # of other releases


def test_where_a_run_broke_down_nothing_is_known() -> None:
    timeout = judged("", None)["first"]
    assert [versions.is_known(area) for area in (None, timeout, PASSED)] == [False, False, True]
    assert versions.is_known(judged(FINE + FAILED, 1)["second"])


def test_rows_of_before_commits_were_noted_say_so(tmp_path: Path) -> None:
    results = tmp_path / "versions.json"
    old = {area: {"passed": 1, "failed": 0, "skipped": 0, "seconds": 90} for area in ("roles", "FSDP2")}
    results.write_text(json.dumps({"oldest": {**row_of("oldest", **old), "test_seconds": 120}}), encoding="utf-8")
    known = versions.read(results)
    row = known["oldest"]
    assert {area["commit"] for area in row["areas"].values()} == {"before (2026-11-29)"}
    assert [area["seconds"] for area in row["areas"].values()] == [60, 60]
    assert "test_seconds" not in row
    versions.save(known, results)
    assert versions.read(results) == known
    row["areas"]["roles"] = PASSED
    assert "| abc1234, before (2026-11-29) |" in page(known, COMBINATIONS, AREAS)


def test_a_commit_is_named_with_a_plus_for_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    results = tmp_path / "docs" / "results" / "versions.json"
    results.parent.mkdir(parents=True)
    for file in (results, tmp_path / "code.py"):
        file.write_text("1", encoding="utf-8")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        someone = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
        subprocess.run(["git", *someone, *words], cwd=tmp_path, check=True)
    plain = versions.commit()
    assert len(plain) >= 7
    assert plain.isalnum()
    results.write_text("2", encoding="utf-8")  # what the last row found
    assert versions.commit() == plain
    (tmp_path / "code.py").write_text("2", encoding="utf-8")
    assert versions.commit() == f"{plain}+"


# -- runs, with installations and tests that are pretended ------------------------------------------------------------


class Pretended:
    """In the place of environments and tests: what was filled, and which areas were run in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.done: list[Any] = []
        self.broken: tuple[str, ...] = ()
        self.results = folder / "results.json"
        self.folder = folder
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(environments, "fill", self.fill)
        monkeypatch.setattr(environments, "put_beside", self.put_beside)
        monkeypatch.setattr(versions, "tried", self.tried)
        monkeypatch.setattr(versions, "commit", lambda: "abc1234")

    def fill(self, made: Path, releases: dict[str, str]) -> None:
        if made.name in self.broken:
            raise InstallationError(f"no torch {releases['torch']}")
        made.mkdir(parents=True)
        self.done.append(f"fill {made.name}")

    def put_beside(self, made: Path, tool: str) -> None:
        self.done.append(f"put {tool}")
        if "tool" in self.broken:
            raise InstallationError("the installation replaced torch 1 by 2")

    def tried(self, made: Path, areas: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
        self.done.append(list(areas))
        return {area: {"passed": 1, "failed": 0, "skipped": 0, "seconds": 1} for area in areas}

    def __call__(self, *arguments: str) -> int:
        self.done.clear()
        common = ["--results", str(self.results), "--folder", str(self.folder / "made")]
        self.monkeypatch.setattr(sys, "argv", ["versions.py", *arguments, *common])
        return versions.main()

    @property
    def rows(self) -> dict[str, Any]:
        return dict(json.loads(self.results.read_text(encoding="utf-8")))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretended:
    return Pretended(monkeypatch, tmp_path)


def test_what_cannot_be_installed_fails_its_row_alone(run: Pretended) -> None:
    run.broken = ("oldest",)
    assert run("oldest", "newest") == 1
    assert run.done == ["fill newest", list(AREAS)]
    (area,) = run.rows["oldest"]["areas"].values()
    assert area["reasons"] == {"the installation": f"no torch {COMBINATIONS['oldest'].torch}"}
    assert "- oldest, installation: `the installation`: no torch" in page(run.rows, COMBINATIONS, AREAS)
    run.broken = ()
    assert run("oldest", "newest") == 0  # goes on with what is missing
    assert run.done == ["fill oldest", list(AREAS)]
    assert passes(run.rows["oldest"]["areas"][INSTALLATION])


def test_again_runs_some_areas_and_keeps_the_others(run: Pretended) -> None:
    assert run("newest") == 0
    before = run.rows["newest"]["areas"]
    assert run("newest", "--areas", "roles") == 0
    assert run.done == []
    assert run("newest", "--areas", "roles", "--again") == 0
    assert run.done == ["fill newest", ["roles"]]
    assert run.rows["newest"]["areas"] == before


def test_the_time_of_an_installation_is_of_one_that_was_made(run: Pretended) -> None:
    assert run("newest", "--keep", "--areas", "roles") == 0
    run.results.write_text(json.dumps({"newest": {**run.rows["newest"], "install_seconds": 100}}), encoding="utf-8")
    assert run("newest", "--keep", "--areas", "FSDP2") == 0
    assert run.done == [["FSDP2"]]
    assert run.rows["newest"]["install_seconds"] == 100
    run.monkeypatch.setitem(COMBINATIONS, "newest", COMBINATIONS["newest"]._replace(torch="2.99.0"))
    assert run("newest", "--areas", "FSDP2") == 0  # what was kept is of another release
    assert run.done == ["fill newest", ["FSDP2"]]
    assert run.rows["newest"]["install_seconds"] == 0


def test_a_tool_comes_last_and_its_environment_is_not_used_again(run: Pretended) -> None:
    run.broken = ("tool",)
    assert run(TOOL, "--keep") == 1
    assert run.done == [f"fill {TOOL}", list(AREAS), f"put {COMBINATIONS[TOOL].tool}"]
    assert run.rows[TOOL]["areas"][BESIDE]["reasons"] == {
        COMBINATIONS[TOOL].tool: "the installation replaced torch 1 by 2"
    }
    run.broken = ()
    assert run(TOOL, "--areas", BESIDE, "--again") == 0
    assert run.done == [f"fill {TOOL}", f"put {COMBINATIONS[TOOL].tool}"]


def test_the_smoke_is_of_one_row_and_leaves_the_page_alone(run: Pretended) -> None:
    page_before = versions.TABLE.read_bytes()
    assert run("oldest", "--areas", "smoke") == 0
    assert run.done == ["fill oldest", ["smoke"]]
    assert versions.TABLE.read_bytes() == page_before
    for test in SMOKE["smoke"]:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_every_file_of_an_area_is_there() -> None:
    assert all((ROOT / path).is_file() for paths in AREAS.values() for path in paths)


# -- installations, with commands that are pretended ------------------------------------------------------------------

BEFORE = dict.fromkeys(PACKAGES, "1.0")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(environments, "run", lambda made, *command: ran.append(command) or "")
    monkeypatch.setattr(environments, "interpreter", lambda version: f"python{version}")
    monkeypatch.setattr(environments, "installed", lambda made: BEFORE)
    return ran


def test_releases_are_installed_then_the_checkout_plainly_then_with_its_tests(
    commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    environments.fill(tmp_path, COMBINATIONS["oldest"].releases)
    ends = [command[-1] for command in commands]
    assert ends == [str(tmp_path), "numpy<2.4", str(ROOT), f"{ROOT}[test]", str(ROOT / "tests" / "operators.py")]
    assert "torch==2.8.0" in commands[1]
    assert environments.pins("2.15.0") == []


def test_a_release_that_is_replaced_is_an_error(
    monkeypatch: pytest.MonkeyPatch, commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    found = iter([BEFORE, {**BEFORE, "torch": "2.0"}])
    monkeypatch.setattr(environments, "installed", lambda made: next(found))
    with pytest.raises(InstallationError, match=r"^the installation replaced torch 1\.0 by 2\.0$"):
        environments.fill(tmp_path, COMBINATIONS["oldest"].releases)
    assert commands[-1][-1] == str(ROOT)


def test_a_tool_may_break_itself_but_not_what_we_require(
    monkeypatch: pytest.MonkeyPatch, commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    said = "Found 1 incompatibility\nThe package `kernels` was built for a different platform\n"
    monkeypatch.setattr(
        environments.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    )
    environments.put_beside(tmp_path, "a-tool==1")
    assert commands[-1][-1] == "a-tool==1"
    said += "The package `ds-optim` requires `typer>=0.15`, but `0.14.0` is installed\n"
    with pytest.raises(InstallationError, match=r"`ds-optim` requires `typer>=0\.15`"):
        environments.put_beside(tmp_path, "a-tool==1")


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(InstallationError, match=r"^ModuleNotFoundError: No module named 'nothing_here'$"):
        environments.run(tmp_path, sys.executable, "-c", "import nothing_here")


# -- the page ---------------------------------------------------------------------------------------------------------


def test_a_cell_names_what_was_skipped() -> None:
    assert cell({**PASSED, "passed": 130, "skipped": 2}) == "130 (2 skipped)"
    assert cell({**PASSED, "failed": 1}) == "**1 of 8 failed**"
    assert cell(None) == "not run"
    assert not passes({**PASSED, "passed": 0, "skipped": 5})


def test_the_page_says_what_it_is_of() -> None:
    known = {"newest": row_of("newest", roles=PASSED), "beside": {"a-tool==1": {"torch": "2.9"}, "another": {}}}
    text = page(known, COMBINATIONS, AREAS)
    (row,) = [line for line in text.splitlines() if line.startswith("| newest")]
    cells = [each.strip() for each in row.strip("|").split("|")]
    titles = next(line for line in text.splitlines() if line.startswith("| combination")).strip("|").split("|")
    shown = dict(zip((each.strip() for each in titles), cells, strict=True))
    assert (shown["commit"], shown["min"], shown["roles"], shown["FSDP2"]) == ("abc1234", "1", "7", "not run")
    assert shown[BESIDE] == ""
    assert "What uv's resolver chooses" in text
    assert "| another | **none** |" in text
    assert "Torch before 2.12 gets `numpy<2.4` as well" in text
    (outside,) = [line for line in text.splitlines() if line.startswith("In no area: ")]
    assert "`test_house`" in outside
    assert "`test_memory`" not in outside
