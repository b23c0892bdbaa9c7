"""Which torch the accountant knows: it reads private parts of torch, and one message says so where they are others."""

from __future__ import annotations

import torch

KNOWN_VERSIONS = "2.13"


class MemoryAccountError(RuntimeError):
    """Memory cannot be accounted for; the message says which, and what to do."""


def unknown_torch(found: object) -> MemoryAccountError:
    """The error for a torch whose private parts are others than expected.

    Args:
        found: what is missing, as a clause.
    """
    return MemoryAccountError(
        f"torch {torch.__version__}: {found}, so storages cannot be followed. Versions known to work: {KNOWN_VERSIONS}"
    )
