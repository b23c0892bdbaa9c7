"""Whose training it is: the ranks that checkpoints and memory accounts of an engine or a model are made with.

An engine under an mpu, a mesh and DDP's process group may be a part of the job.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_optim.deepspeed import reader
from ds_optim.sharding import dtensor
from ds_optim.sharding.exchange import Ranks
from ds_optim.stepping.sharded import ShardedOptimizer


def ranks_of(trained: Any, optimizer: Any = None) -> Ranks:
    """The ranks of an engine, or those that a model's parameters lie on; the whole job where nothing says so.

    Args:
        trained: a DeepSpeed engine, or a model: under DDP the wrapped one, unless the optimizer was given that as
            ``roles``.
        optimizer: of a model.
    """
    if hasattr(trained, "seq_data_parallel_group"):
        return reader.ranks_of(trained)
    given = optimizer.roles_given if isinstance(optimizer, ShardedOptimizer) else None
    if isinstance(optimizer, ShardedOptimizer) and optimizer.is_bound:
        return optimizer.ranks
    return dtensor.ranks_of([one for one in (trained, given) if isinstance(one, nn.Module)])
