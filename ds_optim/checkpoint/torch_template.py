"""`as_stored`: room for what `torch.distributed.checkpoint` stored of another version's state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata
from torch.distributed.tensor import DTensor, zeros


def as_stored(states: Mapping[str, Any], checkpoint_id: str | os.PathLike[str]) -> dict[str, Any]:
    """What to hand to ``torch.distributed.checkpoint.load`` in the place of ``states``, which it fills.

    It refuses a tensor of another size than is stored, before a loader of ours sees it. State of blocks (1-D DTensors)
    that the checkpoint has in other sizes, since symmetric matrices were stored whole up to 0.1.0, gets room of these;
    ``set_optimizer_state_dict`` and ``load_state_dict`` know both. All ranks call it; nothing is communicated.

    Args:
        states: nested, with this version's state dict of the optimizer inside.
        checkpoint_id: the folder that ``torch.distributed.checkpoint.save`` wrote.
    """
    stored = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    return {key: _fitted(value, key, stored) for key, value in states.items()}


def _fitted(value: Any, name: str, stored: Mapping[str, STORAGE_TYPES]) -> Any:
    """A value, or what lies in it, with room of the stored size; torch joins nested keys by dots."""
    if isinstance(value, dict):
        return {key: _fitted(one, f"{name}.{key}", stored) for key, one in value.items()}
    entry = stored.get(name)
    if not isinstance(value, DTensor) or value.dim() != 1 or not isinstance(entry, TensorStorageMetadata):
        return value
    if entry.size == value.shape:
        return value
    return zeros(entry.size, dtype=value.dtype, device_mesh=value.device_mesh, placements=value.placements)
