"""Checkpoints in canonical form: by parameter name and logical element, for any number of ranks and any strategy.

import ds_optim.checkpoint

ds_optim.checkpoint.save("checkpoints", engine, client_state={"epoch": 3})
client_state = ds_optim.checkpoint.load("checkpoints", engine)         # fewer ranks, another ZeRO stage, ...
ds_optim.checkpoint.load("checkpoints", model, optimizer)              # without DeepSpeed

Importing this costs nothing until a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_optim.checkpoint.gathered import full_state as full_state
    from ds_optim.checkpoint.save_load import load as load
    from ds_optim.checkpoint.save_load import save as save
    from ds_optim.checkpoint.torch_template import as_stored as as_stored
    from ds_optim.errors import CheckpointError as CheckpointError

_HOME = {
    "CheckpointError": "ds_optim.errors",
    "as_stored": "ds_optim.checkpoint.torch_template",
    "full_state": "ds_optim.checkpoint.gathered",
    "load": "ds_optim.checkpoint.save_load",
    "save": "ds_optim.checkpoint.save_load",
}

__all__ = ["CheckpointError", "as_stored", "full_state", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ds_optim.checkpoint' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
