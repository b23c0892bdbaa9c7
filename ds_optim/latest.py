"""The file beside checkpoints that names the newest one: DeepSpeed's convention (`engine.py`, `save_checkpoint`)."""

from __future__ import annotations

import os
from pathlib import Path

LATEST = "latest"


def newest(directory: str | os.PathLike[str]) -> str | None:
    """The tag that is the newest; None where no such file can be read."""
    try:
        return Path(directory, LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        return None
