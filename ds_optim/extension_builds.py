"""Where operators are built on first use, and the locks that killed builds leave there.

torch keeps what it builds (DeepSpeed's operators) in one folder per version of Python, whichever environment asks: two
environments with different releases rebuild each other's. And before 2.14 its lock is a mere file
(`torch/utils/file_baton.py`): it outlives a holder that is killed, and whoever comes later waits for it for ever,
without a word. Here: a folder for each environment, and which locks nobody can hold. Nothing is removed here; the user
is told the command.

It is asked before torch is imported. Our own kernels need none of it, see `kernels.build`.

    python -m ds_optim.extension_builds         prints the folder, for shells
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from ds_optim.releases import lock_files_block

VARIABLE = "TORCH_EXTENSIONS_DIR"
"""What tells torch where to build."""

LONGEST_BUILD = 3600.0
"""Seconds. DeepSpeed's operators take one to ten minutes each, CUTLASS's on a busy machine half an hour."""

_INITIAL_NAMESPACE = "pid:[4026531836]"  # a constant of Linux: whoever is in it sees the processes of all containers
_SHELLS = frozenset(("bash", "dash", "fish", "ksh", "sh", "zsh"))  # of a user who looks into the folder
_LOCAL_FILE_SYSTEMS = frozenset(("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"))


# ----------------------------------------------------------------------------------------------------------- the folder


def own_folder(prefix: str | os.PathLike[str] = sys.prefix, base_prefix: str = sys.base_prefix) -> Path:
    """This environment's folder: inside it if it is a virtual or conda environment that can be written.

    Otherwise (a system's Python, an environment of somebody else) in the user's cache, under a name made of the prefix.
    """
    root = Path(prefix)
    inside = root / "torch_extensions"
    is_environment = str(prefix) != base_prefix or (root / "conda-meta").is_dir()
    if is_environment and os.access(inside if inside.is_dir() else root, os.W_OK):
        return inside
    return shared_folder() / f"environment_{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}"


def shared_folder() -> Path:
    """Where torch builds if it is told nothing: shared by all environments of a user."""
    caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or caches) / "torch_extensions"


def use_own_folder(environment: MutableMapping[str, str] = os.environ) -> Path:
    """Have this process and its children build in the environment's own folder, unless the user chose one.

    Returns:
        The folder that counts now.
    """
    if not environment.get(VARIABLE):
        environment[VARIABLE] = str(own_folder())
    return Path(environment[VARIABLE])


def folders(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where builds of this environment may be: the folder that the user chose, else torch's and our launcher's."""
    chosen = environment.get(VARIABLE)
    return [Path(chosen)] if chosen else [shared_folder(), own_folder()]


# ------------------------------------------------------------------------------------------------------------ the locks


@dataclass(frozen=True, slots=True)
class Lock:
    """A build's lock; as text, what is to be said about it.

    Attributes:
        path: of the file.
        age: seconds.
        holders: processes here that have it open or work in its folder.
        is_seen: whether any process that could hold it would be among these: not on a network file system, which other
            hosts write to, nor inside a container, which does not see what others build.
    """

    path: Path
    age: float
    holders: tuple[int, ...]
    is_seen: bool

    @property
    def is_stale(self) -> bool:
        """Whether it was left behind."""
        return not self.holders and (self.is_seen or self.age > LONGEST_BUILD)

    def __str__(self) -> str:
        operator, remedy = self.path.parent.name, f"rm {shlex.quote(str(self.path))}"
        if self.is_stale:
            why = "which no process holds" if self.is_seen else "held by no process here, and no build takes that long"
            return (
                f"{operator}: a build that was killed left its lock ({_words(self.age)} old, {why}); whatever needs "
                f"the operator would wait for it for ever. Remove it: {remedy}"
            )
        if self.holders:
            return (
                f"{operator}: being built for {_words(self.age)} by process {', '.join(map(str, self.holders))}; "
                "whatever needs the operator waits for it"
            )
        return (
            f"{operator}: locked for {_words(self.age)} by no process here, perhaps by a build on another host or in "
            f"another container; whatever needs the operator waits for it. If nothing builds there: {remedy}"
        )


def locks(roots: Iterable[Path]) -> list[Lock]:
    """The locks of all builds in these folders; none of a torch that is not stopped by a file that was left behind."""
    if not lock_files_block():
        return []
    paths = {path for root in roots for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)}
    before = {path: _identity(path) for path in sorted(paths)}
    holders, is_blind = _processes(before) if before else ({}, False)
    found = []
    for path, identity in before.items():
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            about = path.stat()
            if (about.st_dev, about.st_ino) == identity:
                is_seen = not is_blind and about.st_uid == os.geteuid() and _is_local(path)
                found.append(Lock(path, max(0.0, time.time() - about.st_mtime), tuple(holders[path]), is_seen))
    return found


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_dev, about.st_ino


def _processes(wanted: Mapping[Path, tuple[int, int] | None]) -> tuple[dict[Path, list[int]], bool]:
    """The processes that hold each lock; and whether some of the user's cannot be looked into.

    torch keeps the file open for as long as it builds, in Python; ninja and the compilers, which may outlive Python,
    work in its folder.
    """
    found: dict[Path, list[int]] = {path: [] for path in wanted}
    is_blind = not Path("/proc/self/fd").is_dir()
    opened = {identity: path for path, identity in wanted.items()}
    inside = {_identity(path.parent): path for path in wanted}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {opened.get(_identity(entry.path)) for entry in os.scandir(process / "fd")}
            if (process / "comm").read_text().strip() not in _SHELLS:
                held.add(inside.get(_identity(process / "cwd")))
        except PermissionError:
            with contextlib.suppress(OSError):
                is_blind |= process.stat().st_uid == os.geteuid()
        except OSError:  # it ended
            continue
        else:
            for path in filter(None, held):
                found[path].append(int(process.name))
    return found, is_blind


def _is_local(path: Path) -> bool:
    """Whether only processes that can be seen from here write to its file system; False where that is not known."""
    try:
        if os.readlink("/proc/self/ns/pid") != _INITIAL_NAMESPACE:
            return False
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    place, kind = "", ""
    for line in lines:  # ID PARENT DEVICE ROOT MOUNT-POINT OPTIONS [TAGS] - TYPE SOURCE OPTIONS
        about, _, rest = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), about.split()[4])
        if len(point) >= len(place) and path.resolve().is_relative_to(point):  # a later one hides an earlier one
            place, kind = point, rest.split()[0]
    return kind in _LOCAL_FILE_SYSTEMS


def _words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    print(use_own_folder())
