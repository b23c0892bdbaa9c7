"""Why memory cannot be accounted for."""

from __future__ import annotations

from ds_optim.releases import TORCH


class MemoryAccountError(RuntimeError):
    """Memory cannot be accounted for; the message says which, and what to do."""


def unknown_torch(found: object) -> MemoryAccountError:
    """The error for a torch whose private parts are others than expected.

    Args:
        found: what is missing, as a clause.
    """
    return MemoryAccountError(f"torch {TORCH.installed}: {found}, so storages cannot be followed; {TORCH.known}")
