"""benchmarks/accelerator.py, at toy size on the CPU: that it runs. Its numbers are for accelerators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "accelerator.py"
OPTIMIZERS = ("AdamW", "Lion", "Adan", "AdamMini", "Shampoo", "SWAN")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_without_an_accelerator_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "no accelerator here" in done.stderr


def test_every_section_runs_at_toy_size(tmp_path: Path) -> None:
    sections = "bandwidth", "many_tensors", "matrices", "roots", "convergence"  # the selftest has its own tests
    done = run("--small", "--only", *sections, "--out", str(tmp_path))
    assert done.returncode in (0, 1), done.stderr
    found = json.loads((tmp_path / "accelerator.json").read_text(encoding="utf-8"))["sections"]
    assert list(found) == list(sections)
    everything = [one for section in found.values() for one in section]
    assert not [one for one in everything if one["check"].startswith("the section")], everything
    for name in ("AdamW", "Lion", "Adan", "AdamMini"):
        assert sum(one["check"].startswith(f"{name}, 60,000 elements") for one in found["bandwidth"]) == 3
        assert sum(one["check"] == f"{name}, 300 tensors" for one in found["many_tensors"]) == 1
    assert {one["check"].rpartition(" ")[2] for one in found["matrices"]} == {"ieee", "tf32", "bf16"}
    assert all(one["verdict"] == "PASS" for section in ("roots", "convergence") for one in found[section])
    assert [one["check"].partition(",")[0] for one in found["convergence"]] == [*OPTIMIZERS] * 3
    text = (tmp_path / "accelerator.md").read_text(encoding="utf-8")
    assert all(one["check"] in text for one in everything)
