"""Operators that are built on first use: in a folder of this environment's own, and never behind a killed build's lock.

The package knows about them. Without it (others' optimizers need none) torch's folder serves as it is.
"""

from __future__ import annotations

import os
import platform
from collections.abc import MutableMapping


class StaleLockError(RuntimeError):
    """A start would wait for ever: every lock that was left behind, and how to remove it."""


def use_own_folder(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set TORCH_EXTENSIONS_DIR, for this process and its children or for those of a job, unless the user did."""
    try:
        from ds_optim import extension_builds
    except ImportError:
        return
    extension_builds.use_own_folder(environment)


def locks() -> tuple[list[str], list[str]]:
    """What is to be said about locks of builds here: those that were left behind, and those of builds that go on."""
    try:
        from ds_optim import extension_builds
    except ImportError:
        return [], []
    found = extension_builds.locks(extension_builds.folders())
    return [str(lock) for lock in found if lock.is_stale], [str(lock) for lock in found if not lock.is_stale]


def judge() -> list[str]:
    """What goes on here, which torch would wait for without a word.

    Raises:
        StaleLockError: a killed build left its lock, which torch would wait for, too: for ever.
    """
    use_own_folder()
    stale, going_on = locks()
    if stale:
        raise StaleLockError("\n".join([f"on {platform.node()}:", *(f"  - {one}" for one in stale)]))
    return going_on
