"""`ds-optim selftest`: a table of what this machine does, an exit status, and planted faults that it finds."""

from __future__ import annotations

import ast
import gc
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import forked
import pretended
from ds_optim.cli import app
from ds_optim.kernels import native
from ds_optim.known_torch import fp32_products
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


def test_products_are_compared_in_fp32_whatever_the_environment_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    right = torch.bmm

    def noted(*given: Any, **named: Any) -> Any:
        seen.add(torch.backends.cuda.matmul.fp32_precision)
        return right(*given, **named)

    monkeypatch.setattr(torch, "bmm", noted)
    with fp32_products("tf32"):
        [*_] = checks.matrix_rate(CPU)
    assert seen == {"ieee"}


@pytest.mark.parametrize(("free", "ranks", "rows"), [(80e9, 1, 100_000), (4e9, 2, 24_414), (4e9, 4, 12_207)])
def test_what_is_timed_fits_into_half_of_the_free_memory(
    free: float, ranks: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), 80 << 30))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert checks.rows_with_room(pretended.CUDA) == rows


def test_where_memory_is_short_no_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 80 << 30))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    [finding] = checks.step_time(pretended.CUDA)
    assert finding.verdict == "NOT HERE"
    assert "needs 1.6 GB of free memory; this rank's share of what is free is 1.0 GB" in finding.said


def test_a_step_that_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]

    def waiting(name: str, *given: Any, **options: Any) -> Any:
        optimizer = made(name, *given, **options)
        if (name, options["bf16_stochastic_round"]) == ("Lion", True):
            optimizer.register_step_pre_hook(lambda *_: wait())
        return optimizer

    def wait() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    made = checks.made
    with pretended.entered(monkeypatch, does_run=False):
        monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        [sound] = checks.waits(pretended.CUDA)
        monkeypatch.setattr(checks, "made", waiting)
        [finding] = checks.waits(pretended.CUDA)
    assert (sound.verdict, finding.verdict) == ("PASS", "FAIL")
    assert finding.said == "Lion in bfloat16: called a synchronizing CUDA operation"
    assert modes[-1] == "default"


@pytest.mark.parametrize("lost", [0, 100_000])
@pytest.mark.parametrize("name", ["AdamW", "AdamMini", "Shampoo"])
def test_state_is_held_against_what_the_allocator_counts(name: str, lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretended device's allocator counts what is alive, each tensor in blocks of 512 bytes."""

    def counted(_: object) -> int:
        gc.collect()
        alive = [one.values.untyped_storage() for one in gc.get_objects() if type(one) is pretended.OnDevice]
        return sum(-(-size // 512) * 512 for size in {one.data_ptr(): one.nbytes() for one in alive}.values())

    def forgetful(*given: Any, **options: Any) -> Any:
        optimizer = made(*given, **options)
        optimizer.register_step_post_hook(lambda *_: left.append(torch.zeros(lost, device=pretended.CUDA)))
        return optimizer

    left: list[torch.Tensor] = []
    made = checks.made
    monkeypatch.setattr(checks, "made", forgetful)
    monkeypatch.setattr(checks, "KEPT_BY", (name,))
    with pretended.entered(monkeypatch, does_run=False):
        monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        monkeypatch.setattr(torch.cuda, "memory_allocated", counted)
        [finding] = checks.memory(pretended.CUDA)
    assert finding.verdict == ("FAIL" if lost else "PASS"), finding.said


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


def test_an_error_among_the_ranks_loses_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no such cable")

    monkeypatch.setattr(checks, "CHECKS", (checks.rounding,))
    monkeypatch.setattr(checks, "ranks", broken)
    status, said = found("--json", str(tmp_path / "new" / "found.json"))
    assert status == 1
    assert "RuntimeError: no such cable" in said
    assert "0 of 33,153 bits differ" in said
    content = json.loads((tmp_path / "new" / "found.json").read_text())
    assert [one["verdict"] for one in content["findings"]] == ["PASS", "FAIL"]


def test_every_rank_of_a_host_has_an_accelerator_until_there_are_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[-1])
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    given = []
    for place in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(place))
        given.append(checks.devices()[-1])
    assert given == [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 0)]
    assert current == [0, 0, 1, 0]


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of a command, or of a script of ours."""
    environment = forked.environment(COLUMNS="300")
    launcher = ["torchrun", "--nproc-per-node", "2", *command]
    return subprocess.run(launcher, capture_output=True, text=True, check=False, env=environment)


def test_the_command_with_two_ranks_prints_one_table_and_writes_what_both_found(tmp_path: Path) -> None:
    """What its timings say is not asked here."""
    done = torchrun("--no-python", "ds-optim", "selftest", "--json", str(tmp_path / "found.json"))
    assert done.stdout.count("ds-optim selftest: torch") == 1, done.stderr
    verdicts = {
        (one["rank"], one["check"]): one["verdict"]
        for one in json.loads((tmp_path / "found.json").read_text())["findings"]
    }
    for rank in range(2):
        for check in ("AdamMini on cpu: the same weights on all ranks", "Shampoo on cpu", "stochastic rounding on cpu"):
            assert verdicts[rank, check] == "PASS"
    assert done.stdout.count("Shampoo on cpu: the same weights on all ranks") == 1
    assert bool(done.returncode) == ("FAIL" in verdicts.values())


def test_what_failed_on_another_rank_is_printed_with_its_rank(tmp_path: Path) -> None:
    """It left the others alone in a collective."""
    script = tmp_path / "command.py"
    script.write_text(
        "import datetime, os\n"
        "from ds_optim.cli import app\n"
        "from ds_optim.selftest import checks, job\n"
        "def broken():\n"
        "    raise RuntimeError('no such cable')\n"
        "job.PATIENCE = datetime.timedelta(seconds=15)\n"
        "checks.CHECKS = (checks.rounding,)\n"
        "if os.environ['RANK'] == '1': checks.ranks = broken\n"
        f"app(['selftest', '--json', {str(tmp_path / 'found.json')!r}])\n"
    )
    done = torchrun(str(script))
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "FAIL" in line]
    assert len(lines) == 2, done.stdout
    assert lines[0].startswith("│ ranks ")
    assert lines[1].startswith("│ rank 1: ranks ")
    assert "RuntimeError: no such cable" in lines[1]
    content = json.loads((tmp_path / "found.json").read_text())
    found = [(one["rank"], one["check"], one["verdict"]) for one in content["findings"]]
    assert found == [
        (rank, *one) for rank in range(2) for one in (("stochastic rounding on cpu", "PASS"), ("ranks", "FAIL"))
    ]


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
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert [verdict for _, verdict in ast.literal_eval(line.removeprefix("FOUND "))] == ["PASS", "PASS", "PASS", "FAIL"]
