"""What happens to files that torch wrote: they are lost, cut short, or a bit of them flips."""

from __future__ import annotations

import zipfile
from pathlib import Path


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def flip(path: Path) -> None:
    """One bit in the middle of the largest record."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda one: one.file_size)
    content = bytearray(path.read_bytes())
    content[record.header_offset + record.file_size // 2 + 100] ^= 1
    path.write_bytes(bytes(content))
