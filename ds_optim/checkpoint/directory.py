"""A checkpoint's directory: whole or not there, and every damage found before anything is read.

    DIRECTORY/latest                 the tag of the newest checkpoint
    DIRECTORY/TAG/manifest.json      format number, size and SHA-256 of every other file; written last
    DIRECTORY/TAG/about.json         what the checkpoint holds
    DIRECTORY/TAG/objects.pt         learning-rate scheduler and client state (pickled)
    DIRECTORY/TAG/.metadata, *.distcp    tensors, by torch.distributed.checkpoint

A checkpoint is written under a temporary name and renamed when it is on the disk. The ranks of one engine or model
write it together, and nobody else; the first among them does what only one can do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ds_optim
from ds_optim.errors import CheckpointError, in_one, on_every_rank, on_first_rank
from ds_optim.latest import LATEST, newest
from ds_optim.sharding.exchange import ALONE, Ranks

FORMAT = 2  # 1: symmetric matrices whole, see `ds_optim.stepping.former_state`
MANIFEST = "manifest.json"
ABOUT = "about.json"
OBJECTS = "objects.pt"


class NewerFormatError(CheckpointError):
    """A later version of ds_optim wrote the checkpoint."""


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def new_checkpoint(ranks: Ranks, directory: Path, tag: str, *, latest: bool = True) -> Iterator[Path]:
    """A folder for ranks to write into, which becomes ``directory/tag`` when the block ends. A collective.

    Args:
        latest: whether the file ``latest`` then names it.

    Raises:
        CheckpointError: on every rank; what was written is removed, and what was there before is untouched.
    """
    subject = f"cannot save checkpoint {tag!r} in {directory}, nothing there was changed"
    folder = directory / f".{tag}.tmp"
    on_first_rank(ranks, lambda: make_folder(directory, tag, folder), subject)
    try:
        try:
            yield folder
        except OSError as error:  # raised on every rank alike
            raise CheckpointError(in_one(str(error).split("\n- "), subject)) from error
        sums = on_every_rank(
            ranks, lambda: {path.name: described(path) for path in _share(ranks, _files(folder))}, subject
        )
        files = ranks.union(sums)
        on_first_rank(ranks, lambda: publish(directory, tag, folder, files, latest=latest), subject)
    except BaseException:
        if ranks.index == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def make_folder(directory: Path, tag: str, folder: Path) -> None:
    """Make ``folder`` for the checkpoint ``tag``, and remove what killed runs left beside it. One rank calls it.

    Raises:
        CheckpointError: something else stands where the checkpoint would.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / tag
    if target.exists() and not (target / MANIFEST).exists() and not (target / ABOUT).exists():
        raise CheckpointError(
            f"{target} is there and is no checkpoint of this form: save under another tag or directory"
        )
    for left in directory.glob(".*.tmp"):  # of runs that were killed while they saved
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for left in directory.glob(".*.old"):  # of runs that were killed before they removed what they had replaced
        if (directory / left.name[1 : -len(".old")]).exists():
            shutil.rmtree(left)
    folder.mkdir()


def publish(directory: Path, tag: str, folder: Path, files: Mapping[str, Any], *, latest: bool = True) -> None:
    """Make a written checkpoint whole, name it, and point ``latest`` to it. One rank calls it.

    Args:
        directory: of the run's checkpoints.
        tag: the checkpoint's name.
        folder: where it was written.
        files: `described` of every file in it, by name.
        latest: whether to point to it.
    """
    ordered = dict(sorted(files.items()))
    manifest = {"format": FORMAT, "saved": now(), "files": ordered}
    write_text(folder / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))
    sync_folder(folder)
    target, old = directory / tag, directory / f".{tag}.old"
    if target.exists():  # saved again under the same tag: one of the two is always there
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    folder.rename(target)
    sync_folder(directory)
    if latest:
        write_text(directory / f".{LATEST}.tmp", tag)
        (directory / f".{LATEST}.tmp").replace(directory / LATEST)
    sync_folder(directory)
    shutil.rmtree(old, ignore_errors=True)


def remove_older(directory: Path, tag: str, keep: int) -> None:
    """Remove whole checkpoints other than ``tag`` and the ``keep - 1`` newest of the others. One rank calls it.

    What is not complete is neither counted nor touched. What cannot be removed stays, with a warning.
    """
    others = [one for one in _tags(directory) if one != tag and _is_complete(directory / one)]
    for other in others[keep - 1 :]:
        going = directory / f".{other}.tmp"  # never half there under its name; the next save removes what is left
        try:
            (directory / other).rename(going)
            shutil.rmtree(going)
        except OSError as error:
            warnings.warn(f"the old checkpoint {directory / other} cannot be removed: {error}", stacklevel=3)


def _is_complete(folder: Path) -> bool:
    """Every file is there with its size; whether their bytes are right is not looked at."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == written["bytes"] for name, written in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def heading(world_size: int, counters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of ``about.json`` that says when and by what it was written.

    Args:
        world_size: ranks of the run.
        counters: the engine's; None without one.
    """
    return {
        "format": FORMAT,
        "saved": now(),
        "versions": {"ds_optim": ds_optim.__version__, "torch": torch.__version__},
        "world_size": world_size,
        "engine": counters,
    }


def write_small(folder: Path, about: Mapping[str, Any], client_state: Any, lr_scheduler: Any) -> None:
    """Write what is not tensors: ``about.json`` and ``objects.pt``; they are on the disk on return."""
    write_about(folder, about)
    with open(folder / OBJECTS, "wb") as stream:
        torch.save({"client_state": client_state, "lr_scheduler": lr_scheduler}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write ``about.json`` and see it onto the disk."""
    write_text(folder / ABOUT, json.dumps(about, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a small file and see it onto the disk."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """See a folder's entries onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


# -- reading ----------------------------------------------------------------------------------------------------------


def folder_of(directory: Path, tag: str) -> Path:
    """Where a checkpoint lies; beside its name, if a save under the same tag was cut short."""
    target, old = directory / tag, directory / f".{tag}.old"
    return old if old.is_dir() and not target.exists() else target


def whole_checkpoint(ranks: Ranks, directory: Path, tag: str | None, *, fallback: bool) -> Path:
    """The folder of a checkpoint whose every file is as it was written. A collective; each of ``ranks`` checks a share.

    Args:
        tag: None for the one that ``latest`` names.
        fallback: take the newest whole one that is older, if this one is damaged, with one warning.

    Raises:
        CheckpointError: there is none, or it is damaged and ``fallback`` was not asked for or found nothing.
        NewerFormatError: a later version wrote it.
    """
    first = on_first_rank(ranks, lambda: tag or _latest(directory), f"cannot load from {directory}")
    found = damages(folder_of(directory, first), ranks)
    if not found:
        return folder_of(directory, first)
    message = in_one(found, f"checkpoint {first!r} in {directory} is damaged, nothing was loaded")
    if not fallback:
        raise CheckpointError(f"{message}\nLoad an older one: fallback=True, or tag= one of {_tags(directory)}")
    limit = _age(folder_of(directory, first))
    older = on_first_rank(
        ranks,
        lambda: [one for one in _tags(directory) if one != first and _age(folder_of(directory, one)) <= limit],
        message,
    )
    for other in older:
        try:
            found = damages(folder_of(directory, other), ranks)
        except NewerFormatError:
            continue
        if not found:
            if ranks.index == 0:
                warnings.warn(f"{message}\nLoading the older checkpoint {other!r} instead", stacklevel=3)
            return folder_of(directory, other)
    raise CheckpointError(f"{message}\nNo older checkpoint there is whole")


def damages(folder: Path, ranks: Ranks = ALONE) -> list[str]:
    """What is wrong with a checkpoint's files, the same on each of ``ranks``: a collective.

    Raises:
        NewerFormatError: a later version wrote it.
    """

    def check() -> tuple[list[str], str]:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            files = manifest["files"]
            if int(manifest["format"]) > FORMAT:
                return [], f"{folder} has format {manifest['format']}, this version of ds_optim knows {FORMAT}"
            if manifest.pop("sha256") != _digest(manifest):
                return [f"{MANIFEST} was changed"], ""
        except FileNotFoundError:
            return [
                f"{MANIFEST} is missing: {'it was not saved to its end' if folder.is_dir() else 'no such folder'}"
            ], ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"], ""
        mine = _share(ranks, sorted(files))
        return [problem for name in mine for problem in _damage(folder / name, files[name])], ""

    answers = ranks.everyones(check()).values()
    newer = [reason for _, reason in answers if reason]
    if newer:
        raise NewerFormatError(f"{newer[0]}: install the version that wrote it, or a later one; nothing was loaded")
    return sorted({problem for problems, _ in answers for problem in problems})


def _damage(path: Path, written: Mapping[str, Any]) -> list[str]:
    try:
        size = path.stat().st_size
        if size != written["bytes"]:
            return [f"{path.name} has {size} bytes, {written['bytes']} were written"]
        return [] if described(path) == dict(written) else [f"{path.name} was changed: its checksum differs"]
    except FileNotFoundError:
        return [f"{path.name} is missing"]
    except OSError as error:
        return [f"{path.name} cannot be read ({error})"]


def read_about(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds (its ``about.json``)."""
    found: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return found


def _latest(directory: Path) -> str:
    # Without it, or if it is empty, the first save there was killed between naming the checkpoint and writing `latest`.
    for tag in (newest(directory), *_tags(directory)):
        if tag:
            return tag
    raise CheckpointError(f"there is no file {directory / LATEST}: nothing was ever saved there")


def _tags(directory: Path) -> list[str]:
    """Checkpoints of this form in a directory, the newest first."""
    with suppress(OSError):
        found = [path.parent for path in directory.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]
        return [folder.name for folder in sorted(found, key=_age, reverse=True)]
    return []


def _age(folder: Path) -> str:
    """When a checkpoint was saved, from its manifest or, if that cannot be read, from the folder itself."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["saved"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with suppress(OSError):
        return datetime.fromtimestamp(folder.stat().st_mtime, timezone.utc).isoformat(timespec="microseconds")
    return now()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != MANIFEST)


def _share(ranks: Ranks, listed: Sequence[Path]) -> Sequence[Path]:
    """This rank's part of what all of them check together."""
    return listed[ranks.index :: ranks.size]


def described(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as the manifest has them."""
    hashed, size = hashlib.sha256(), 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            hashed.update(block)
            size += len(block)
    return {"bytes": size, "sha256": hashed.hexdigest()}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
