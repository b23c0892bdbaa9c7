"""A list of names in a message that must stay short."""

from __future__ import annotations

from collections.abc import Sequence


def first_of(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
