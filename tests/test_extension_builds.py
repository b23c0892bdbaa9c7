"""Builds of operators: a folder for each environment, and no start that waits for a killed build without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ds_optim.extension_builds import LONGEST_BUILD, VARIABLE, Lock, folders, locks, own_folder, use_own_folder

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "launcher"
sys.path.insert(0, str(LAUNCHER))

import builds  # noqa: E402
import host_report  # noqa: E402
import preflight  # noqa: E402

# As torch/utils/file_baton.py does it; then whatever a build does.
HOLDER = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def a_torch_whose_locks_are_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.14, whichever is installed."""
    monkeypatch.setattr(torch, "__version__", "2.13.0")


@contextmanager
def held(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock, for as long as the block lasts at most."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def make_older(lock: Path, seconds: float) -> None:
    os.utime(lock, (time.time() - seconds,) * 2)


@pytest.fixture
def left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of an operator whose build was killed long ago, in the folder that the user chose for builds."""
    lock = tmp_path / "my builds" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with held(lock) as process:
        process.send_signal(signal.SIGKILL)
    make_older(lock, 2 * LONGEST_BUILD)
    monkeypatch.setenv(VARIABLE, str(lock.parents[1]))
    return lock


def names_it(lock: Path, said: str) -> bool:
    return "deepspeed_shm_comm: a build that was killed left its lock (2 hours old" in said and f"rm '{lock}'" in said


# ----------------------------------------------------------------------------------------------------------- the folder


def test_two_environments_build_in_two_folders(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | {"PYTHONPATH": str(ROOT)}
    found = []
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / name)], check=True)
        command = [str(tmp_path / name / "bin" / "python"), "-m", "ds_optim.extension_builds"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert found == [f"{tmp_path / name / 'torch_extensions'}\n" for name in ("one", "two")]


def test_the_users_folder_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {VARIABLE: "/somewhere"}
    assert use_own_folder(chosen) == Path("/somewhere")
    assert chosen == {VARIABLE: "/somewhere"}
    assert folders(chosen) == [Path("/somewhere")]
    nothing = {VARIABLE: ""}
    assert use_own_folder(nothing) == own_folder() == Path(nothing[VARIABLE])
    monkeypatch.setenv(VARIABLE, "/somewhere")
    script = 'source "$0"; echo "$TORCH_EXTENSIONS_DIR"'
    command = ["bash", "-c", script, str(LAUNCHER / "install.sh")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "/somewhere"  # the first call says that it installs


def test_an_environment_that_has_more_than_is_asked_for_is_not_installed_again(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    functions = tmp_path / "functions.sh"
    functions.write_text((LAUNCHER / "install.sh").read_text().partition("\n_ds_optim_here=")[0])

    def shell(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        script = f'source "{functions}"; {command} "$@"'
        folder = LAUNCHER.parent
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script, "", *arguments], capture_output=True, text=True, cwd=folder
        )

    def was_made(extras: str) -> bool:
        return not shell("_ds_optim_was_made", str(python), extras).returncode

    assert not was_made("")
    stamp = shell("_ds_optim_stamp", str(python), "test,trainer").stdout
    (tmp_path / "ds-optim-test,trainer.stamp").write_text(stamp)
    assert all(map(was_made, ("", "test", "trainer,test")))
    assert not any(map(was_made, ("tes", "test,other")))
    (tmp_path / "ds-optim-test,trainer.stamp").write_text("of another setup.py")
    assert not was_made("")
    (tmp_path / "ds-optim-base.stamp").write_text(shell("_ds_optim_stamp", str(python), "").stdout)
    assert [was_made(extras) for extras in ("", "test")] == [True, False]
    python.unlink()
    assert not was_made("")


def test_a_python_that_is_nobodys_environment_gets_a_folder_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system, conda = tmp_path / "usr", tmp_path / "conda"
    (conda / "conda-meta").mkdir(parents=True)
    assert own_folder(conda, str(conda)) == conda / "torch_extensions"
    others = [own_folder(system, str(system)), own_folder(tmp_path / "local", str(tmp_path / "local"))]
    monkeypatch.setattr(os, "access", lambda *_: False)
    others.append(own_folder(conda, str(conda)))  # somebody else's
    assert len(set(others)) == 3
    assert {folder.parent for folder in others} == {tmp_path / "cache" / "torch_extensions"}


def test_ranks_on_other_hosts_build_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written() -> str:
        target = tmp_path / "environment"
        options = ["--hostfile", str(tmp_path / "hosts"), "--hostfile-only", "--write-environment", str(target)]
        alone = ["--no-ssh", "--node-rank", "0", "--master-addr", "127.0.0.1"]
        assert preflight.main([*options, *alone, str(LAUNCHER / "train.py")]) == 0
        return target.read_text()

    (tmp_path / "hosts").write_text("a slots=1\n")
    monkeypatch.delenv(VARIABLE)
    assert f"{VARIABLE}={own_folder()}\n" in written()
    monkeypatch.setenv(VARIABLE, "/somewhere")
    assert f"{VARIABLE}=/somewhere\n" in written()


# ------------------------------------------------------------------------------------------------------------ the locks


def test_a_lock_of_a_killed_build_is_named_with_the_command_that_helps(left_behind: Path) -> None:
    [lock] = locks(folders())
    assert lock.is_stale
    assert lock.holders == ()
    assert names_it(left_behind, str(lock))
    assert left_behind.exists()  # nothing is removed here


def test_it_is_stale_at_once_where_every_process_is_seen(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"  # as torch's own folder has it
    lock.parent.mkdir(parents=True)
    with held(lock) as process:
        process.send_signal(signal.SIGKILL)
    [found] = locks([tmp_path])
    assert found.holders == ()
    assert found.is_stale is found.is_seen
    assert Lock(lock, 3.0, (), is_seen=True).is_stale
    elsewhere = Lock(lock, 3.0, (), is_seen=False)
    assert not elsewhere.is_stale
    assert "perhaps by a build on another host" in str(elsewhere)
    assert f"rm {lock}" in str(elsewhere)


def test_a_lock_of_a_living_build_is_not_stale_however_old(tmp_path: Path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    with held(lock) as process:
        make_older(lock, 2 * LONGEST_BUILD)
        [found] = locks([tmp_path])
        assert found.holders == (process.pid,)
        assert not found.is_stale
        assert "rm " not in str(found)
        # Python was killed, ninja goes on.
        with subprocess.Popen(["sleep", "600"], cwd=lock.parent) as ninja:
            process.kill()
            process.wait()
            [found] = locks([tmp_path])
            ninja.kill()
        assert found.holders == (ninja.pid,)
        assert not found.is_stale
    assert [one.is_stale for one in locks([tmp_path])] == [True]


def test_a_torch_that_asks_the_system_is_not_stopped_by_a_file(
    left_behind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    assert locks(folders()) == []


def test_our_own_kernels_lock_is_none(tmp_path: Path) -> None:
    (tmp_path / "ds_optim").mkdir()
    (tmp_path / "ds_optim" / "kernels_0123456789abcdef.lock").touch()
    assert locks([tmp_path, tmp_path / "missing"]) == []


def test_the_training_job_says_so_and_does_not_start(left_behind: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import train

    assert train.main(["--steps", "0"]) == 2
    said = capsys.readouterr().err
    assert "cannot start on" in said
    assert names_it(left_behind, said)
    assert "no step at all" not in said
    left_behind.unlink()
    with held(left_behind) as process:
        assert train.main(["--steps", "0"]) == 2
        said = capsys.readouterr().err
    assert f"by process {process.pid}; whatever needs the operator waits for it" in said
    assert "asks for no step at all" in said  # it went on


def test_the_preflight_reports_it_among_the_hosts_other_problems(left_behind: Path) -> None:
    question = host_report.Question(script=str(LAUNCHER / "train.py"), arguments=["--micro-batch", "0"])
    found = host_report.report(question).problems
    assert any("the micro-batch is 0" in problem for problem in found)
    assert any(names_it(left_behind, problem) for problem in found)
    assert len(found) == 2


def test_the_doctor_reports_it(left_behind: Path) -> None:
    from ds_optim.cli import app

    sick = CliRunner().invoke(app, ["doctor"])
    assert sick.exit_code == 1
    assert f"operators are built in {left_behind.parents[1]} ({VARIABLE})" in sick.output
    assert names_it(left_behind, sick.output)
    left_behind.unlink()
    healthy = CliRunner().invoke(app, ["doctor"])
    assert healthy.exit_code == 0, healthy.output


def test_the_test_suite_does_not_start(left_behind: Path) -> None:
    arguments = ["--collect-only", "-q", "-n", "0", str(ROOT / "tests" / "test_boxes.py")]
    code = f"import sys, torch, pytest; torch.__version__ = '2.13.0'; sys.exit(pytest.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert names_it(left_behind, done.stderr)


def test_without_the_package_the_job_starts_as_it_did(left_behind: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own optimizers need none of ours."""
    monkeypatch.setitem(sys.modules, "ds_optim", None)
    assert builds.judge() == []
