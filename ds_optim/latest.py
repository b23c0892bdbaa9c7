"""The file beside checkpoints that names the newest one: DeepSpeed's convention (`engine.py`, `save_checkpoint`)."""

from __future__ import annotations

import os
from pathlib import Path

LATEST = "latest"


def newest(directory: str | os.PathLike[str]) -> str | None:
    """The tag that is the newest; None where there is no such file.

    Raises:
        OSError: there is one that cannot be read.
    """
    try:
        return Path(directory, LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
