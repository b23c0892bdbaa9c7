"""The suite's parts that touch versions, in an environment of their own for every combination of releases.

    python benchmarks/versions.py [COMBINATION...] [--areas AREA...] [--again] [--folder DIR] [--keep] [--list]
    python benchmarks/versions.py --beside

Makes a virtual environment (by uv, which finds the Python), installs the combination's releases and this checkout into
it, runs the areas, and removes it. What was found is kept in docs/results/versions.json, from which
docs/results/versions.md is written: a run that was cut off goes on with what is missing, and --again repeats areas.

A build of torch for CUDA takes 5 to 8 GB of disk with its libraries and 2 to 4 GB of downloads; one environment is
there at a time (--keep leaves it), and each has operators of its own (TORCH_EXTENSIONS_DIR). Triton before 3.7 links
programs for AMD with a linker that must be there: Debian's lld-16. Exit status 1 if an area
of these combinations does not pass, or one of them cannot be installed. With --beside nothing is run: what would be
installed beside tools that dictate releases of their own is resolved, and put into the page.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import environments
import pages
from environments import PACKAGES, ROOT, InstallationError
from processor import processor
from versions_page import BESIDE, INSTALLATION, in_words, page, passes

RESULTS = ROOT / "docs" / "results" / "versions.json"
TABLE = RESULTS.with_suffix(".md")


class Combination(NamedTuple):
    """Releases that are installed together: of Python, and of `PACKAGES` in their order."""

    python: str
    torch: str
    deepspeed: str
    transformers: str
    accelerate: str
    peft: str
    why: str = ""
    tool: str = ""  # that dictates these releases, as pip is told: installed beside them when all else was tried

    @property
    def releases(self) -> dict[str, str]:
        """By package, and Python's."""
        return {name: getattr(self, name) for name in ("python", *PACKAGES)}


# Every minor release of torch, the releases of DeepSpeed before and after each that moved what is read, old and new
# transformers, every Python. Where nothing else decides, releases that came out together stand together.
COMBINATIONS = {
    "newest": Combination("3.13", "2.15.0", "0.19.8", "5.24.0", "1.15.0", "0.21.2", "the newest of everything"),
    "torch-2.14": Combination("3.11", "2.14.1", "0.19.8", "5.24.0", "1.15.0", "0.21.2"),
    "torch-2.12": Combination("3.13", "2.12.1", "0.19.6", "5.10.4", "1.13.0", "0.19.1"),
    "gpu-machine": Combination("3.12", "2.11.0", "0.19.8", "5.17.0", "1.15.0", "0.21.2", "a machine with a GPU"),
    "torch-2.10": Combination("3.12", "2.10.0", "0.19.2", "5.0.0", "1.12.0", "0.18.1", "the first 5.x of transformers"),
    "torch-2.9": Combination("3.11", "2.9.1", "0.19.0", "4.57.6", "1.12.0", "0.18.0", "the last 4.x of transformers"),
    "oldest": Combination("3.10", "2.8.0", "0.18.6", "4.55.0", "1.10.0", "0.17.0", "the oldest of everything"),
    "llama-factory": Combination(
        "3.11", "2.13.0", "0.19.7", "5.6.0", "1.11.0", "0.18.1", "LLaMA-Factory 0.9.5's", "llamafactory==0.9.5"
    ),
    "axolotl": Combination(
        "3.11", "2.13.0", "0.18.9", "5.16.1", "1.13.0", "0.20.0", "Axolotl 0.19's", "axolotl[deepspeed]==0.19.0"
    ),
}

# {area: the suite's files}. "smoke" is short, for a first look at a combination: files, or tests of files.
AREAS: dict[str, list[str]] = {
    "registration": ["tests/test_registration.py", "tests/test_known_deepspeed.py", "tests/test_versions.py"],
    "vectors": ["tests/test_vectors.py", "tests/test_plain_torch.py", "tests/test_kernels.py"],
    "Triton": ["tests/test_triton.py", "tests/test_machine_code.py", "tests/test_surroundings.py"],
    "invariance": ["tests/test_invariance.py"],
    "matrix engines": ["tests/test_matrix_engines.py"],
    "gradients": [
        "tests/test_unused.py",
        "tests/test_noise_scale.py",
        "tests/test_features_of_deepspeed.py",
        "tests/test_degenerate.py",
    ],
    "DeepSpeed checkpoints": ["tests/test_engine_checkpoints.py", "tests/test_written_checkpoints.py"],
    "canonical checkpoints": [
        "tests/test_canonical_checkpoint.py",
        "tests/test_mesh_checkpoints.py",
        "tests/test_restated_checkpoints.py",
    ],
    "FSDP2": ["tests/test_meshes.py"],
    "Trainer": ["tests/test_integrations.py"],
    "roles": ["tests/test_roles.py"],
    "accountant": [
        "tests/test_accountant.py",
        "tests/test_estimate.py",
        "tests/test_memory.py",
        "tests/test_memory_callback.py",
    ],
    "DeepSpeed's objects": [
        "tests/test_checkpoint_convert.py",
        "tests/test_state_access.py",
        "tests/test_overlooked.py",
        "tests/test_engine_ranks.py",
        "tests/test_warm_start.py",
        "tests/test_rebuilt_engines.py",
    ],
    "guards": ["tests/test_guards.py", "tests/test_refusals.py", "tests/test_precision.py"],
    "Muon and SOAP": ["tests/test_muon.py"],
    "packed and eight-bit state": [
        "tests/test_packed.py",
        "tests/test_eight_bit_kernels.py",
        "tests/test_eight_bit_state.py",
        "tests/test_eight_bit_checkpoints.py",
    ],
}
SMOKE = {
    "smoke": [
        "tests/test_registration.py::test_a_script_that_does_not_know_us_trains_through_its_json",
        "tests/test_meshes.py::test_a_zero_2_run_and_an_fsdp2_run_agree",
        "tests/test_written_checkpoints.py",
        "tests/test_versions.py",
    ]
}
# Timings, and what this table is for: it cannot be so before the table is there.
LEFT_OUT = (
    "tests/test_registration.py::test_import_torch_gets_no_slower",
    "tests/test_versions.py::test_what_is_called_tested_is_what_passed",
)
RUN = "the run itself"  # what failed where no test is known to have
LIMIT = 5400  # seconds that the areas of a combination may take


def main() -> int:
    """Run what is asked for and not known yet; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("combination", nargs="*", help=f"of {', '.join(COMBINATIONS)}; default: all")
    choices, usual = [*AREAS, BESIDE, *SMOKE], [*AREAS, BESIDE]
    parser.add_argument("--areas", nargs="+", choices=choices, default=usual, help="only these")
    parser.add_argument("--again", action="store_true", help="also those of these areas that are known already")
    parser.add_argument("--folder", type=Path, help="where environments are made; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="do not remove environments")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--beside", action="store_true", help="resolve what is installed beside other tools")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: docs/results/versions.json")
    arguments = parser.parse_args()
    unknown = set(arguments.combination) - COMBINATIONS.keys()
    if unknown:
        parser.error(f"no combination is called {', '.join(sorted(unknown))}: there are {', '.join(COMBINATIONS)}")
    if arguments.list:
        for name, one in COMBINATIONS.items():
            print(f"{name}: {' '.join(filter(None, one))}")
        return 0
    known = read(arguments.results)
    if arguments.beside:
        tools = [one.tool for one in COMBINATIONS.values() if one.tool]
        known["beside"] = {tool: environments.resolved_beside(tool) for tool in tools}
        save(known, arguments.results)
        return int(not all(known["beside"].values()))
    failed = False
    for name in arguments.combination or COMBINATIONS:
        row = known[name] = renewed(known.get(name, {}), name, arguments.areas if arguments.again else [])
        areas = [area for area in arguments.areas if area != BESIDE or COMBINATIONS[name].tool]
        missing = [area for area in areas if not is_known(row["areas"].get(area))]
        if missing:
            go_on(name, row, missing, arguments.folder, arguments.keep)
            save(known, arguments.results)
        failed = failed or not all(area in row["areas"] and passes(row["areas"][area]) for area in areas)
    save(known, arguments.results)
    return int(failed)


def read(results: Path) -> dict[str, Any]:
    """All rows. Those of a time that noted no commits say so, and have their seconds in the areas as today's do."""
    known: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    for row in (known[name] for name in COMBINATIONS if name in known):
        for area in row["areas"].values():
            area.setdefault("commit", f"before ({row['date']})" if "date" in row else "before")
        if "test_seconds" in row:
            share(row["areas"], row.pop("test_seconds"))
    return known


def renewed(row: dict[str, Any], name: str, again: list[str]) -> dict[str, Any]:
    """A combination's row as far as its releases are still the same, without the areas that are run again."""
    releases = COMBINATIONS[name].releases
    if row.get("releases") != releases:
        return {"releases": releases, "areas": {}}
    return {**row, "areas": {area: found for area, found in row["areas"].items() if area not in again}}


def is_known(area: Mapping[str, Any] | None) -> bool:
    """Whether an area has a result of its own: where a run was cut off or broke down, it has none."""
    return area is not None and [*area.get("reasons", {})] != [RUN]


def go_on(name: str, row: dict[str, Any], missing: list[str], folder: Path | None, keep: bool) -> None:
    """Run what a row lacks. What cannot be installed leaves the areas missing, and the reason in their place."""
    now = commit()
    files = {area: paths for area, paths in {**AREAS, **SMOKE}.items() if area in missing}
    found: dict[str, Any] = {}
    try:
        with environment(name, folder, keep, row) as made:
            if files:
                found |= tried(made, files)
            if BESIDE in missing:
                found[BESIDE] = put_beside(made, COMBINATIONS[name].tool)
    except InstallationError as error:
        found[INSTALLATION] = check({"the installation": str(error)})
    row["areas"] |= found
    for area in row["areas"].values():
        area.setdefault("commit", now)
    for area, one in found.items():
        print(f"{name}: {area}: {in_words(one)}", flush=True)


def commit() -> str:
    """The checkout's commit, with a "+" if tracked files other than results are not as it has them."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!docs/results"], check=False).returncode
    return head.stdout.strip() + ("+" if changed else "")


@contextlib.contextmanager
def environment(name: str, folder: Path | None, keep: bool, row: dict[str, Any]) -> Iterator[Path]:
    """A virtual environment with one combination's releases; what it took is noted in the row."""
    made = (folder or Path(tempfile.gettempdir()) / "ds_optim_versions").resolve() / name
    releases = COMBINATIONS[name].releases
    complete = made / "complete"  # with what
    row["machine"] = f"{processor()}, {os.cpu_count()} cores"
    row["date"] = str(datetime.date.today())
    try:
        if not complete.exists() or complete.read_text(encoding="utf-8") != json.dumps(releases):
            started = time.time()
            shutil.rmtree(made, ignore_errors=True)
            environments.fill(made, releases)
            row["install_seconds"] = round(time.time() - started)
            row["areas"][INSTALLATION] = check({})
            complete.write_text(json.dumps(releases), encoding="utf-8")
        row["disk_gb"] = round(environments.size(made) / 1e9, 1)
        yield made
    finally:
        shutil.rmtree(made.with_name("cache"), ignore_errors=True)  # of one environment's downloads
        if not keep:
            shutil.rmtree(made, ignore_errors=True)


def put_beside(made: Path, tool: str) -> dict[str, Any]:
    """Whether a tool can be installed into an environment, in which nothing else is tried afterwards."""
    (made / "complete").unlink()
    try:
        environments.put_beside(made, tool)
    except InstallationError as error:
        return check({tool: str(error)})
    return check({})


def check(reasons: dict[str, str]) -> dict[str, Any]:
    """An area without tests, that passed if there is no reason why it failed."""
    found = {"passed": int(not reasons), "failed": int(bool(reasons)), "skipped": 0, "seconds": 0}
    return {**found, "reasons": reasons} if reasons else found


def tried(made: Path, areas: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What one run of pytest finds of some areas: counts, their parts of its seconds, the reason of every failure."""
    report = made / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(made / "bin" / "python"), "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
    command += [f"--junitxml={report}", *(f"--deselect={test}" for test in LEFT_OUT)]
    command += [path for paths in areas.values() for path in paths]
    started = time.time()
    ended: int | None = None
    with (made / "log.txt").open("a") as log, contextlib.suppress(subprocess.TimeoutExpired):
        own = environments.settings(made)
        ran = subprocess.run(command, cwd=ROOT, env=own, stdout=log, stderr=log, timeout=LIMIT, check=False)
        ended = ran.returncode
    found = judged(report.read_text(encoding="utf-8") if report.exists() else "", ended, areas)
    share(found, time.time() - started)
    return found


def judged(report: str, ended: int | None, areas: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What a report of pytest's says of some areas; ``ended``: pytest's status, None if it had to be stopped.

    A run that ended in another way than its tests explain has failed in every area.
    """
    cases = list(ET.fromstring(report).iter("testcase")) if report else []
    mine = {area: [case for case in cases if is_of(case, paths)] for area, paths in areas.items()}
    failures = [case for found in mine.values() for case in found if failure(case) is not None]
    explained = ended == 0 or (ended == 1 and failures)
    status = f"not finished after {LIMIT} s" if ended is None else f"pytest ended with status {ended}"
    return {area: found_in(found, "" if explained else status) for area, found in mine.items()}


def is_of(case: ET.Element, paths: list[str]) -> bool:
    """Whether a reported test is one of some files, or of some tests of files; or a file that cannot be imported."""
    module, name = case.get("classname", ""), case.get("name", "").partition("[")[0]
    if not module:
        return f"{name.replace('.', '/')}.py" in [path.partition("::")[0] for path in paths]
    file = f"{module.replace('.', '/')}.py"
    return file in paths or f"{file}::{name}" in paths


def failure(case: ET.Element) -> ET.Element | None:
    """What a reported test failed by, if it did."""
    return next((child for child in case if child.tag in ("failure", "error")), None)


def found_in(cases: list[ET.Element], status: str) -> dict[str, Any]:
    """Counts, seconds and reasons of failures of one area; ``status``: what was wrong with the run itself, if so."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    reasons = {} if cases and not status else {RUN: status or "pytest reported no test of it"}
    for case in cases:
        bad = failure(case)
        outcome = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        found[outcome] += 1
        if bad is not None:
            reasons[case.get("name", "")] = environments.reason(f"{bad.get('message', '')}\n{bad.text}")
    found["seconds"] = round(sum(float(case.get("time", 0)) for case in cases))
    found["failed"] = found["failed"] or len(reasons)
    return {**found, "reasons": reasons} if reasons else found


def share(areas: Mapping[str, dict[str, Any]], seconds: float) -> None:
    """Replace areas' seconds, which are those of tests that ran two at a time, by their parts of what all took."""
    total = sum(area["seconds"] for area in areas.values()) or 1
    for area in areas.values():
        area["seconds"] = round(seconds * area["seconds"] / total)


def save(known: Mapping[str, Any], results: Path) -> None:
    """Both files; the table is written from the numbers alone."""
    results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if results == RESULTS:
        pages.write(TABLE, page(known, COMBINATIONS, AREAS))


if __name__ == "__main__":
    sys.exit(main())
