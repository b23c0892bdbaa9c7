"""Whose training it is: the ranks that checkpoints and memory accounts of an engine or a model are made with.

An engine under an mpu, a mesh and DDP's process group may be a part of the job.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_optim.optimizers.sharded import ShardedOptimizer
from ds_optim.sharding import dtensor
from ds_optim.sharding.exchange import Ranks


def ranks_of(trained: Any, optimizer: Any = None) -> Ranks:
    """The ranks of an engine, or those that a model's parameters lie on; the whole job where nothing says so.

    Args:
        trained: a DeepSpeed engine, or a model: under DDP the wrapped one, unless the optimizer was given that as
            ``roles``.
        optimizer: of a model.
    """
    if hasattr(trained, "seq_data_parallel_group"):
        from ds_optim.sharding import zero  # imports DeepSpeed, which is there then

        return zero.ranks_of(trained)
    given = optimizer._roles_given if isinstance(optimizer, ShardedOptimizer) else None
    if isinstance(optimizer, ShardedOptimizer) and optimizer.is_bound:
        return optimizer.ranks
    return dtensor.ranks_of([one for one in (trained, given) if isinstance(one, nn.Module)])
