"""docs/results/versions.md, from what `benchmarks/versions.py` found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from environments import OLD_NUMPY, PACKAGES, RESOLVED_FOR, ROOT, TORCH_OF_NEW_NUMPY

if TYPE_CHECKING:
    from versions import Combination

# Columns without tests: each passes once or names the reason. The second one is of combinations with a tool alone.
INSTALLATION, BESIDE = "installation", "installed beside"
_PAGE = """# Releases that were tried together

`python benchmarks/versions.py` makes an environment for each row: its releases, then this checkout, by
`uv pip install .` and by `pip install -e .[test]`. *installation*: both left the releases as they are. Then it runs the
parts of the suite that touch versions. A number: tests that passed. Where a row stands for a tool, that is installed
last, by uv. *installed beside*: it left the releases as they are, and all that ds-optim requires.
`ds-optim doctor` says where your installation stands, [limits](../limits.md#releases) what older releases lack.

{table}

Rows of older releases have fewer tests where [limits](../limits.md#releases) names a fault of theirs.

*commit*: what the areas ran on; with + files were changed, before: it was not noted yet. *GB*: the environment. *min*:
installation and tests. Run on: {machines}.

Why these: {why}.

Torch before {torch} gets `{numpy}` as well: the Triton that it brings interprets no kernels with a newer one.

In no area: {others}.
"""
_BESIDE = """
## Beside tools that dictate releases

What uv's resolver chooses for both together on Python {python}; nothing is installed
(`python benchmarks/versions.py --beside`):

{table}
"""


def passes(area: Mapping[str, Any]) -> bool:
    """Whether tests were run and none failed; some may have been skipped."""
    return bool(area["passed"] and not area["failed"])


def in_words(area: Mapping[str, Any]) -> str:
    """Counts of one area, and a line for every reason of a failure."""
    said = [f"{area[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if area[outcome]]
    reasons = [f"\n    {test}: {reason}" for test, reason in area.get("reasons", {}).items()]
    return f"{', '.join(said)} in {area['seconds']} s{''.join(reasons)}"


def cell(area: Mapping[str, Any] | None) -> str:
    """One area of one row of the table."""
    if area is None:
        return "not run"
    said = f"{area['passed']}"
    if not passes(area):
        said = f"**{area['failed']} of {area['passed'] + area['failed']} failed**"
    return f"{said} ({area['skipped']} skipped)" if area["skipped"] else said


def page(known: Mapping[str, Any], combinations: Mapping[str, Combination], areas: Mapping[str, list[str]]) -> str:
    """The whole page; what belongs to no combination or area of these is left out."""
    rows = {name: known[name] for name in combinations if known.get(name, {}).get("areas")}
    columns = [INSTALLATION, *areas, BESIDE]
    table = [heading("combination", "Python", *PACKAGES, *columns, "commit", "GB", "min")]
    notes = []
    for name, row in rows.items():
        cells = [name, *(row["releases"][package] for package in ("python", *PACKAGES))]
        for area in columns:
            found = row["areas"].get(area)
            cells.append("" if area == BESIDE and not combinations[name].tool else cell(found))
            for test, reason in (found or {}).get("reasons", {}).items():
                notes.append(f"- {name}, {area}: `{test}`: {reason}")
        seconds = row.get("install_seconds", 0) + sum(area["seconds"] for area in row["areas"].values())
        commits = ", ".join(dict.fromkeys(area["commit"] for area in row["areas"].values()))
        table.append(line(*cells, commits, str(row.get("disk_gb", "")), f"{seconds / 60:.0f}"))
    covered = {path for paths in areas.values() for path in paths}
    others = sorted(file.stem for file in (ROOT / "tests").glob("test_*.py") if f"tests/{file.name}" not in covered)
    text = _PAGE.format(
        table="\n".join(table),
        machines="; ".join(sorted({f"{row['machine']}, {row['date']}" for row in rows.values()})),
        why="; ".join(f"{name}: {one.why}" for name, one in combinations.items() if one.why),
        torch=".".join(map(str, TORCH_OF_NEW_NUMPY)),
        numpy=OLD_NUMPY,
        others=", ".join(f"`{name}`" for name in others),
    )
    if notes:
        text += "\n".join(["", "## What did not pass", "", *notes, ""])
    if known.get("beside"):
        chosen = [
            line(tool, *(releases.get(package, "") if releases else "**none**" for package in PACKAGES))
            for tool, releases in known["beside"].items()
        ]
        text += _BESIDE.format(python=RESOLVED_FOR, table="\n".join([heading("tool", *PACKAGES), *chosen]))
    return text


def line(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def heading(*cells: str) -> str:
    """The first two lines of a table."""
    return f"{line(*cells)}\n|{'---|' * len(cells)}"
