"""The one list of optimizers: everything that names them all reads it."""

from __future__ import annotations

from ds_optim.optimizers.adam_mini import AdamMini
from ds_optim.optimizers.adamw import AdamW
from ds_optim.optimizers.adan import Adan
from ds_optim.optimizers.lion import Lion
from ds_optim.optimizers.shampoo import Shampoo
from ds_optim.optimizers.sharded import ShardedOptimizer
from ds_optim.optimizers.swan import SWAN

_LISTED: dict[str, type[ShardedOptimizer]] = {cls.__name__: cls for cls in (AdamW, Lion, Adan, AdamMini, Shampoo, SWAN)}


def optimizers() -> dict[str, type[ShardedOptimizer]]:
    """Every optimizer by the name of its class, in the order of the documentation."""
    return dict(_LISTED)
