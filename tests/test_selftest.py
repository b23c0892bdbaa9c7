"""`ds-optim selftest`: a table of what this machine does, an exit status, and planted faults that it finds."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ds_optim.cli import app
from ds_optim.kernels import native
from ds_optim.selftest import checks

CPU = torch.device("cpu")


def found(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["selftest", *options], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def test_a_sound_machine_passes_and_says_what_it_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checks, "milliseconds", lambda contenders, _: [2.0 for one in contenders if one() is not NotImplemented]
    )
    status, said = found("--json", str(tmp_path / "found.json"))
    assert status == 0, said
    content = json.loads((tmp_path / "found.json").read_text())
    verdicts = {one["check"]: one["verdict"] for one in content["findings"]}
    for name in checks.TOLERANCE:
        assert verdicts[f"{name} on cpu"] == "PASS"
    assert verdicts["stochastic rounding on cpu"] == "PASS"
    assert verdicts["no host synchronisation on cpu"] == "NOT HERE"
    assert verdicts["the same weights on all ranks"] == "NOT HERE"
    assert "torchrun --no-python --nproc-per-node 2 ds-optim selftest" in said
    [memory] = [one for one in content["findings"] if one["check"] == "AdamMini's state on cpu"]
    assert memory["numbers"]["kept_bytes"] == memory["numbers"]["predicted_bytes"] > 0
    assert f"torch {torch.__version__}" in content["where"]


def test_a_kernel_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.elementwise

    def wrong(formula: Any, operands: Any) -> None:
        right(formula, operands)
        operands.params[0].mul_(1.001)

    monkeypatch.setattr(native, "elementwise", wrong)
    verdicts = {one.check: one.verdict for one in checks.updates(CPU)}
    assert verdicts["AdamW on cpu"] == verdicts["Lion on cpu"] == verdicts["Adan on cpu"] == "FAIL"
    assert verdicts["AdamMini on cpu"] == "PASS"


def test_bits_that_are_rounded_otherwise_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.descend
    monkeypatch.setattr(native, "descend", lambda *given: right(*given[:-1], (*given[-1][:-1], given[-1][-1] ^ 1)))
    [finding] = checks.rounding(CPU)
    assert finding.verdict == "FAIL"


def test_a_slow_step_and_slow_products_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "milliseconds", lambda contenders, _: [2.5, 1.0, 1.0, 1.0][: len(contenders)])
    assert [one.verdict for one in checks.step_time(CPU)] == ["FAIL", "PASS"]
    assert [one.verdict for one in checks.matrix_rate(CPU)] == ["FAIL"]


def test_state_that_is_not_as_predicted_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.predict
    monkeypatch.setattr(
        checks, "predict", lambda request: right(replace(request, model={**request.model, "num_hidden_layers": 3}))
    )
    assert {one.verdict for one in checks.memory(CPU)} == {"FAIL"}


def test_a_check_that_raises_is_a_failure_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> Any:
        raise RuntimeError("no such driver")

    monkeypatch.setattr(checks, "CHECKS", (broken, checks.rounding))
    one, other, last = checks.run()
    assert (one.check, one.verdict, one.said) == ("broken on cpu", "FAIL", "RuntimeError: no such driver")
    assert (other.verdict, last.verdict) == ("PASS", "NOT HERE")
    status, said = found()
    assert status == 1
    assert "no such driver" in said


def test_ranks_of_torchrun_are_compared(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from ds_optim.selftest import checks\n"
        "dist.init_process_group('gloo')\n"
        "found = [(one.check, one.verdict) for one in checks.ranks()]\n"
        "made = checks.made\n"
        "def wrong(name, weights, roles=None):\n"
        "    optimizer = made(name, weights, roles)\n"
        "    optimizer.param_groups[0]['lr'] *= 1 + dist.get_rank()\n"
        "    return optimizer\n"
        "checks.made = wrong\n"
        "found += [(one.check, one.verdict) for one in checks.ranks()][:1]\n"
        "if dist.get_rank() == 0: print('FOUND', found)\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert [verdict for _, verdict in ast.literal_eval(line.removeprefix("FOUND "))] == ["PASS", "PASS", "FAIL"]
