"""Checkpoints in canonical form: by parameter name and logical element, for any number of ranks and any strategy.

import ds_optim.checkpoint

ds_optim.checkpoint.save("checkpoints", engine, client_state={"epoch": 3})
client_state = ds_optim.checkpoint.load("checkpoints", engine)         # fewer ranks, another ZeRO stage, ...
ds_optim.checkpoint.load("checkpoints", model, optimizer)              # without DeepSpeed
"""

from ds_optim.checkpoint.directory import CheckpointError as CheckpointError
from ds_optim.checkpoint.save_load import load as load
from ds_optim.checkpoint.save_load import save as save
from ds_optim.checkpoint.warm_start import warm_start as warm_start

__all__ = ["CheckpointError", "load", "save", "warm_start"]
