"""Killed ranks, full disks, disks that may only be read: a save that fails costs that save and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_optim import Lion, checkpoint
from ds_optim.checkpoint import directory, ranges
from ds_optim.checkpoint.directory import damages
from ds_optim.latest import LATEST, newest
from engines import Case, assembled, engine_for, masters, train
from pool import Pools, RanksFailedError

CASE = Case("AdamMini", {"weight_decay": 0.1}, stage=2)
STEPS = 6


# -- a rank is killed -------------------------------------------------------------------------------------------------


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _then_die(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        _die()

    return wrapped


def _dies_as_latest_moves(write_text: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
    def wrapped(path: Path, text: str) -> None:
        write_text(path, text)
        if path.name == ".latest.tmp":
            _die()

    return wrapped


def _dies_as_it_is_named(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    def wrapped(path: Path, target: Path) -> Path:
        if path.match(".global_step*.tmp"):
            _die()
        return rename(path, target)

    return wrapped


# What the victim was doing, and which rank it was.
KILLS = [
    ("a save: its name is there, latest is not", 0),
    ("a save of a tag that is there: the old one has given way", 0),
    ("a step", 1),
    ("a save: tensors are written", 1),
]


@contextmanager
def deadly(moment: str, engine: Any) -> Iterator[None]:
    """This process dies in that moment."""
    if moment == "a step":
        patch = mock.patch.object(engine.basic_optimizer, "step", _die)
    elif moment == "a save: tensors are written":
        patch = mock.patch.object(ranges.Writer, "write_data", _then_die(ranges.Writer.write_data))
    elif "given way" in moment:
        patch = mock.patch.object(Path, "rename", _dies_as_it_is_named(Path.rename))
    else:
        patch = mock.patch.object(directory, "write_text", _dies_as_latest_moves(directory.write_text))
    with patch:
        yield


def to_the_end(case: Case, folder: str, kill: tuple[str, int] | None) -> dict[str, Any]:
    """Go on from the newest checkpoint, if there is one, and save after every second step; perhaps die on the way."""
    with engine_for(case) as (engine, _, clock):
        with suppress(checkpoint.CheckpointError):
            checkpoint.load(folder, engine)
        begun = engine.global_steps
        if kill is not None and dist.get_rank() == kill[1]:
            with deadly(kill[0], engine):
                _train_and_save(engine, case, clock, folder)
        _train_and_save(engine, case, clock, folder)
        return {"masters": masters(engine), "begun": begun}


def _train_and_save(engine: Any, case: Case, clock: dict[str, int], folder: str) -> None:
    for step in range(engine.global_steps + 1, STEPS + 1):
        train(engine, case, clock, range(step, step + 1))
        if step % 2 == 0:
            checkpoint.save(folder, engine, keep=2)


def test_after_a_kill_the_run_goes_on_from_a_whole_checkpoint(pool: Pools, tmp_path: Path) -> None:
    undisturbed = assembled(pool(2).run(to_the_end, CASE, str(tmp_path / "undisturbed"), None))
    saved = tmp_path / "saved"
    for kill in KILLS:
        moment, victim = kill
        with pytest.raises(RanksFailedError) as error:
            pool(2).run(to_the_end, CASE, str(saved), kill)
        assert error.value.reports[victim] == f"the process died with exit code {-signal.SIGKILL}", moment
        assert "no answer within" not in error.value.reports[1 - victim], "the other rank hung"
        assert (saved / "global_step2").is_dir()
        whole = {path.name: damages(path) for path in saved.glob("[!.]*") if path.is_dir()}
        assert not any(whole.values()), (moment, whole)
        if moment == "a save: its name is there, latest is not":
            assert not (saved / "latest").exists()
            (saved / "latest").write_text("global_step2")  # the same again, two steps later
            shutil.copytree(tmp_path / "undisturbed" / "global_step4", saved / "global_step4")
        elif "given way" in moment:
            assert (saved / ".global_step4.old").is_dir()
            assert not (saved / "global_step4").exists()
    reports = pool(2).run(to_the_end, CASE, str(saved), None)
    assert [report["begun"] for report in reports] == [2, 2]
    for name, values in assembled(reports).items():
        assert torch.equal(values, undisturbed[name]), name
    assert sorted(path.name for path in saved.iterdir()) == ["global_step4", "global_step6", "latest"]


# -- disks ------------------------------------------------------------------------------------------------------------


def _mount(*arguments: str) -> None:
    found = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if found.returncode != 0:
        why = f"mount {' '.join(arguments)}: {found.stderr.strip()}"
        if os.geteuid() == 0:
            pytest.fail(f"{why}: root must be allowed to mount a tmpfs (docker run --cap-add SYS_ADMIN)")
        pytest.skip(f"only root can mount a small disk: {why}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(disk: Path, room: int) -> None:
    """Leave ``room`` bytes free."""
    dist.barrier()
    if dist.get_rank() == 0:
        filler = disk / "filler"
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
    dist.barrier()


def on_a_disk_that_is_full(case: Case, disk: str, ample: str) -> dict[str, Any]:
    """Save at every shortage of room; go on training; save elsewhere, and there again when there is room."""
    folder = Path(disk) / "saved"
    messages: dict[int, str] = {}
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 3))
        checkpoint.save(folder, engine)
        needed = sum(path.stat().st_size for path in (folder / "global_step2").iterdir())
        train(engine, case, clock, range(3, 4))
        for room in range(0, needed, needed // 12):
            _fill(Path(disk), room - room % 4096)
            with pytest.raises(checkpoint.CheckpointError) as error:
                checkpoint.save(folder, engine, keep=1)
            messages[room] = str(error.value)
            dist.barrier()  # rank 0 removes what was written
            assert sorted(path.name for path in folder.iterdir()) == ["global_step2", "latest"]
            assert damages(folder / "global_step2") == []
        train(engine, case, clock, range(4, 5))
        checkpoint.save(ample, engine)
        train(engine, case, clock, range(5, STEPS + 1))
        _fill(Path(disk), 2 * needed)
        checkpoint.save(folder, engine, keep=1)
        return {"messages": messages, "masters": masters(engine)}


def test_a_full_disk_costs_one_save(pool: Pools, small_disk: Path, tmp_path: Path) -> None:
    undisturbed = assembled(pool(2).run(to_the_end, CASE, str(tmp_path / "undisturbed"), None))
    reports = pool(2).run(on_a_disk_that_is_full, CASE, str(small_disk), str(tmp_path / "ample"))
    assert reports[0]["messages"] == reports[1]["messages"]
    assert len(reports[0]["messages"]) >= 12
    for room, message in reports[0]["messages"].items():
        assert "cannot save checkpoint 'global_step3'" in message
        assert "No space left on device" in message, (room, message)
    for name, values in assembled(reports).items():
        assert torch.equal(values, undisturbed[name]), name
    assert sorted(path.name for path in (small_disk / "saved").iterdir()) == [f"global_step{STEPS}", "latest"]
    assert damages(tmp_path / "ample" / "global_step4") == damages(small_disk / "saved" / f"global_step{STEPS}") == []


def on_a_disk_to_read_from(case: Case, folder: str, elsewhere: str) -> str:
    with engine_for(case) as (engine, _, clock):
        assert checkpoint.load(folder, engine) == "kept"
        train(engine, case, clock, range(3, 4))
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.save(folder, engine)
        train(engine, case, clock, range(4, 5))
        checkpoint.save(elsewhere, engine)
        return str(error.value)


def saved_once(case: Case, folder: str) -> None:
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 3))
        checkpoint.save(folder, engine, client_state="kept")


def test_a_disk_that_may_only_be_read_is_read(pool: Pools, small_disk: Path, tmp_path: Path) -> None:
    pool(2).run(saved_once, CASE, str(small_disk / "saved"))
    _mount("-o", "remount,ro", str(small_disk))
    for message in pool(2).run(on_a_disk_to_read_from, CASE, str(small_disk / "saved"), str(tmp_path)):
        assert "cannot save checkpoint 'global_step3'" in message
        assert "Read-only file system" in message
        assert "rank 0" in message
    assert damages(small_disk / "saved" / "global_step2") == damages(tmp_path / "global_step4") == []


# -- old checkpoints --------------------------------------------------------------------------------------------------


def test_old_checkpoints_go_when_the_new_one_is_whole(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = Lion(model.named_parameters())

    def save(step: int, keep: int | None) -> list[str]:
        checkpoint.save(tmp_path, model, optimizer, tag=f"step{step}", keep=keep)
        return sorted(path.name for path in tmp_path.iterdir() if path.is_dir())

    assert [save(step, None) for step in range(4)][-1] == ["step0", "step1", "step2", "step3"]
    (tmp_path / "step2" / "objects.pt").unlink()
    (tmp_path / "notes").mkdir()
    # The damaged one is neither counted nor removed, and what is not ours stays.
    assert save(4, 3) == ["notes", "step1", "step2", "step3", "step4"]
    assert save(3, 2) == ["notes", "step2", "step3", "step4"]
    shutil.copytree(tmp_path / "step4", tmp_path / ".step4.old")  # left by a kill in the last moment of a save
    shutil.copytree(tmp_path / "step4", tmp_path / ".step5.tmp")
    assert save(6, 1) == ["notes", "step2", "step6"]
    with pytest.raises(checkpoint.CheckpointError, match="keep is 0; it must be 1 or more"):
        save(7, 0)
    assert (tmp_path / "latest").read_text() == "step6"


def test_a_file_that_names_the_newest_and_cannot_be_read_is_not_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would begin anew, or go on from another checkpoint."""
    latest = tmp_path / LATEST
    assert newest(tmp_path / "nowhere") is newest(tmp_path) is None
    latest.mkdir()
    assert newest(tmp_path) is None
    latest.rmdir()
    latest.write_text("step4\n")
    assert newest(tmp_path) == "step4"

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", str(latest))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PermissionError):
        newest(tmp_path)
