"""The suite's parts that touch versions, in an environment of their own for every combination of releases.

    python benchmarks/versions.py [COMBINATION...] [--areas AREA...] [--again] [--folder DIR] [--keep] [--list]
    python benchmarks/versions.py --beside

Makes a virtual environment (by uv, which finds the Python), installs this checkout and the combination's releases into
it, runs the areas, and removes it. What was found is kept in docs/results/versions.json, from which
docs/results/versions.md is written: a run that was cut off goes on with what is missing, and --again starts over.

A build of torch for CUDA takes 5 to 7 GB of disk with its libraries and 2 to 4 GB of downloads; one environment is
there at a time (--keep leaves it), and each has operators of its own (TORCH_EXTENSIONS_DIR). Exit status 1 if an area
of these combinations does not pass. With --beside nothing is run: what would be installed beside tools that dictate
releases of their own is resolved, and put into the page.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from processor import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "versions.json"
TABLE = RESULTS.with_suffix(".md")
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "peft")


class Combination(NamedTuple):
    """Releases that are installed together: of Python, and of `PACKAGES` in their order."""

    python: str
    torch: str
    deepspeed: str
    transformers: str
    accelerate: str
    peft: str
    why: str = ""

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
    "llama-factory": Combination("3.11", "2.13.0", "0.19.7", "5.6.0", "1.11.0", "0.18.1", "LLaMA-Factory 0.9.5's"),
    "axolotl": Combination("3.11", "2.13.0", "0.18.9", "5.16.1", "1.13.0", "0.20.0", "Axolotl 0.19's"),
}

# {area: the suite's files}. "smoke" is short, for a first look at a combination: files, or tests of files.
AREAS: dict[str, list[str]] = {
    "registration": ["tests/test_registration.py", "tests/test_known_deepspeed.py", "tests/test_versions.py"],
    "vectors": ["tests/test_vectors.py", "tests/test_plain_torch.py", "tests/test_kernels.py"],
    "Triton": ["tests/test_triton.py", "tests/test_surroundings.py"],
    "invariance": ["tests/test_invariance.py"],
    "matrix engines": ["tests/test_matrix_engines.py"],
    "gradients": [
        "tests/test_unused.py",
        "tests/test_noise_scale.py",
        "tests/test_features_of_deepspeed.py",
        "tests/test_degenerate.py",
    ],
    "DeepSpeed checkpoints": ["tests/test_engine_checkpoints.py", "tests/test_written_checkpoints.py"],
    "canonical checkpoints": ["tests/test_canonical_checkpoint.py", "tests/test_mesh_checkpoints.py"],
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
}
BESIDE = ("llamafactory==0.9.5", "axolotl[deepspeed]==0.19.0")
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
TORCH_OF_TRITON_3_7 = (
    2,
    12,
)  # Triton's interpreter, in which kernels are tested, cannot read numpy 2.4's scalars before
LIMIT = 5400  # seconds that the areas of a combination may take


def main() -> int:
    """Run what is asked for and not known yet; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("combination", nargs="*", help=f"of {', '.join(COMBINATIONS)}; default: all")
    parser.add_argument("--areas", nargs="+", choices=[*AREAS, *SMOKE], default=list(AREAS), help="only these")
    parser.add_argument("--again", action="store_true", help="also what is known already")
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
            print(f"{name}: {' '.join(one)}")
        return 0
    known: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    if arguments.beside:
        known["beside"] = {tool: beside(tool) for tool in BESIDE}
        save(known, arguments.results)
        return int(not all(known["beside"].values()))
    failed = False
    for name in arguments.combination or COMBINATIONS:
        row = known.get(name, {})
        if arguments.again or row.get("releases") != COMBINATIONS[name].releases:
            row = {}
        known[name] = row
        row["releases"] = COMBINATIONS[name].releases
        missing = [area for area in arguments.areas if area not in row.setdefault("areas", {})]
        if missing:
            with environment(name, arguments.folder, arguments.keep, row) as folder:
                started = time.time()
                row["areas"] |= tried(folder, {area: {**AREAS, **SMOKE}[area] for area in missing})
                row["test_seconds"] = row.get("test_seconds", 0) + round(time.time() - started)
                for area in missing:
                    print(f"{name}: {area}: {in_words(row['areas'][area])}", flush=True)
                save(known, arguments.results)
        failed = failed or not all(passes(row["areas"][area]) for area in arguments.areas)
    save(known, arguments.results)
    return int(failed)


@contextlib.contextmanager
def environment(name: str, folder: Path | None, keep: bool, row: dict[str, Any]) -> Iterator[Path]:
    """A virtual environment with one combination's releases; what it took is noted in the row."""
    started = time.time()
    made = (folder or Path(tempfile.gettempdir()) / "ds_optim_versions").resolve() / name
    cache = made.with_name("cache")  # of one environment's downloads
    if not (made / "complete").exists():
        shutil.rmtree(made, ignore_errors=True)
        fill(made, COMBINATIONS[name].releases, cache)
        shutil.rmtree(cache, ignore_errors=True)
        (made / "complete").touch()
    row["disk_gb"] = round(size(made) / 1e9, 1)
    row["install_seconds"] = round(time.time() - started)
    row["machine"] = f"{processor()}, {os.cpu_count()} cores"
    row["date"] = str(datetime.date.today())
    try:
        yield made
    finally:
        if not keep:
            shutil.rmtree(made, ignore_errors=True)


def fill(made: Path, one: Mapping[str, str], cache: Path) -> None:
    """The releases first, then this checkout as a user installs it, by pip: it must leave them as they are."""
    python = str(made / "bin" / "python")
    settings = {**os.environ, "UV_CACHE_DIR": str(cache), "DS_BUILD_OPS": "0", "PIP_CONFIG_FILE": os.devnull}
    subprocess.run([uv(), "venv", "-q", "--seed", "--python", interpreter(one["python"]), str(made)], check=True)
    wanted = [f"{package}=={one[package]}" for package in PACKAGES]
    if tuple(map(int, one["torch"].split(".")[:2])) < TORCH_OF_TRITON_3_7:
        wanted.append("numpy<2.4")
    install = [uv(), "pip", "install", "-q", "--compile-bytecode", "--python", python]  # else each process compiles
    subprocess.run([*install, *wanted], check=True, env=settings)
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]"], check=True, env=settings)
    ask = "import importlib.metadata, sys; print(*map(importlib.metadata.version, sys.argv[1:]))"
    said = subprocess.run([python, "-c", ask, *PACKAGES], capture_output=True, text=True, check=True).stdout.split()
    for package, release in zip(PACKAGES, said, strict=True):
        if release.partition("+")[0] != one[package]:
            raise SystemExit(f"installing ds-optim replaced {package} {one[package]} by {release}")
    own = {**settings, "TORCH_EXTENSIONS_DIR": str(made / "torch_extensions"), "DS_ACCELERATOR": "cpu"}
    subprocess.run([python, str(ROOT / "tests" / "operators.py")], check=True, env=own, stdout=subprocess.DEVNULL)


def beside(tool: str) -> dict[str, str]:
    """The releases that pip's rules choose where this checkout is installed beside a tool; empty if there are none."""
    wanted = f"{tool}\nds-optim @ file://{ROOT}\n"
    command = [uv(), "pip", "compile", "-q", "--no-header", "--no-annotate", "--python-version", "3.11", "-"]
    ran = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    print(f"{tool}: {ran.stderr or 'can be installed beside'}", flush=True)
    chosen = dict(line.split("==", 1) for line in ran.stdout.splitlines() if "==" in line)
    return {package: chosen[package] for package in PACKAGES if package in chosen}


def uv() -> str:
    """Where uv is: beside the Python that runs this, or on the path."""
    return shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "uv"


def interpreter(version: str) -> str:
    """A Python of this version: on the path, pyenv's, or what uv finds or fetches by itself."""
    candidates = [shutil.which(f"python{version}"), sys.executable]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False)
        if said.stdout.strip() == version:
            return str(candidate)
    return version


def tried(folder: Path, areas: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What one run of pytest finds of some areas: counts, the tests' seconds, and the reason of every failure."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    settings = {
        **{key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CI")},
        "VIRTUAL_ENV": str(folder),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
    command += [f"--junitxml={report}", *(f"--deselect={test}" for test in LEFT_OUT)]
    command += [path for paths in areas.values() for path in paths]
    with (folder / "log.txt").open("a") as log:
        try:
            ran = subprocess.run(command, cwd=ROOT, env=settings, stdout=log, stderr=log, timeout=LIMIT, check=False)
            status = f"pytest ended with status {ran.returncode}"
        except subprocess.TimeoutExpired:
            status = f"not finished after {LIMIT} s"
    cases = list(ET.parse(report).getroot().iter("testcase")) if report.exists() else []
    return {area: found_in([case for case in cases if is_of(case, paths)], status) for area, paths in areas.items()}


def is_of(case: ET.Element, paths: list[str]) -> bool:
    """Whether a reported test is one of some files, or of some tests of files."""
    file = case.get("classname", "").replace(".", "/") + ".py"
    return file in paths or f"{file}::{case.get('name', '').partition('[')[0]}" in paths


def found_in(cases: list[ET.Element], status: str) -> dict[str, Any]:
    """Counts, seconds and the reasons of failures of one area; ``status``: how the run ended, if nothing is known."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    reasons = {} if cases else {"the run itself": status}
    for case in cases:
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        outcome = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        found[outcome] += 1
        if bad is not None:
            said = f"{bad.get('message', '')}\n{bad.text}"
            errors = [one for one in re.findall(r"\w*(?:Error|Exception): .*", said) if "RanksFailedError" not in one]
            reasons[case.get("name", "")] = " ".join((errors or [said])[-1].split())[:300]
    found["seconds"] = round(sum(float(case.get("time", 0)) for case in cases))
    found["failed"] = found["failed"] or int(not cases)
    return {**found, "reasons": reasons} if reasons else found


def passes(area: Mapping[str, Any]) -> bool:
    """Whether everything was run and nothing failed."""
    return area["failed"] == 0 and area["passed"] > 0


def in_words(area: Mapping[str, Any]) -> str:
    """Counts of one area."""
    said = [f"{area[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if area[outcome]]
    return f"{', '.join(said)} in {area['seconds']} s"


def save(known: Mapping[str, Any], results: Path) -> None:
    """Both files; the table is written from the numbers alone."""
    results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if results == RESULTS:
        TABLE.write_text(page(known), encoding="utf-8")


def page(known: Mapping[str, Any]) -> str:
    """docs/results/versions.md."""
    rows = {name: known[name] for name in COMBINATIONS if known.get(name, {}).get("areas")}
    lines = [
        "# Releases that were tried together",
        "",
        "`python benchmarks/versions.py` makes an environment for each row: releases, then `pip install .`, which",
        "leaves them as they are; it runs the parts of the suite that touch versions. A number: tests that passed.",
        "`ds-optim doctor` says where your installation stands, [limits](../limits.md#releases) what older ones lack.",
        "",
        f"| combination | Python | {' | '.join(PACKAGES)} | {' | '.join(AREAS)} | GB | min |",
        "|---|---|" + "---|" * (len(PACKAGES) + len(AREAS) + 2),
    ]
    notes = []
    for name, row in rows.items():
        cells = []
        for area in AREAS:
            found = row["areas"].get(area)
            cells.append("not run" if found is None else cell(found))
            for test, reason in (found or {}).get("reasons", {}).items():
                notes.append(f"- {name}, {area}: `{test}`: {reason}")
        minutes = (row["install_seconds"] + row["test_seconds"]) / 60
        numbers = [row["releases"][package] for package in ("python", *PACKAGES)]
        lines.append(f"| {name} | {' | '.join([*numbers, *cells])} | {row['disk_gb']} | {minutes:.0f} |")
    lines += [
        "",
        "Why these: " + "; ".join(f"{name}: {one.why}" for name, one in COMBINATIONS.items() if one.why) + ".",
    ]
    if notes:
        lines += ["", "## What did not pass", "", *notes]
    if known.get("beside"):
        lines += ["", "## Beside tools that dictate releases", ""]
        lines += ["What pip's rules choose for both together (`python benchmarks/versions.py --beside`):", ""]
        lines += [f"| tool | {' | '.join(PACKAGES)} |", "|---|" + "---|" * len(PACKAGES)]
        for tool, chosen in known["beside"].items():
            picked = [chosen.get(package, "") for package in PACKAGES] if chosen else ["**none**"] * len(PACKAGES)
            lines.append(f"| {tool} | {' | '.join(picked)} |")
    machines = sorted({f"{row['machine']}, {row['date']}" for row in rows.values()})
    lines += ["", f"Run on: {'; '.join(machines)}. GB: the environment; min: installation and tests.", ""]
    return "\n".join(lines)


def cell(found: Mapping[str, Any]) -> str:
    """One area of one row."""
    if passes(found):
        return str(found["passed"])
    return f"**{found['failed']} of {found['passed'] + found['failed']} failed**"


def size(folder: Path) -> int:
    """Bytes of all files under a folder, links not followed."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() or file.is_symlink())


if __name__ == "__main__":
    sys.exit(main())
