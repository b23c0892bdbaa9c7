"""Published optimizers whose state is sharded and whose result does not depend on the number of ranks.

Importing this package costs nothing until a name is used. It also makes the optimizers' names known to DeepSpeed, which
the installed package does by itself when torch is imported (see `ds_optim_autoload`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import ds_optim_autoload

if TYPE_CHECKING:
    from ds_optim.optimizers.adam_mini import AdamMini as AdamMini
    from ds_optim.optimizers.adamw import AdamW as AdamW
    from ds_optim.optimizers.adan import Adan as Adan
    from ds_optim.optimizers.lion import Lion as Lion
    from ds_optim.optimizers.shampoo import Shampoo as Shampoo
    from ds_optim.optimizers.swan import SWAN as SWAN
    from ds_optim.roles import Role as Role
    from ds_optim.roles import infer_roles as infer_roles
    from ds_optim.roles import param_groups as param_groups

_HOME = {
    "AdamMini": "ds_optim.optimizers.adam_mini",
    "AdamW": "ds_optim.optimizers.adamw",
    "Adan": "ds_optim.optimizers.adan",
    "Lion": "ds_optim.optimizers.lion",
    "SWAN": "ds_optim.optimizers.swan",
    "Shampoo": "ds_optim.optimizers.shampoo",
    "Role": "ds_optim.roles",
    "infer_roles": "ds_optim.roles",
    "param_groups": "ds_optim.roles",
}

__version__ = "0.1.0"
__all__ = list(_HOME)

ds_optim_autoload.autoload()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ds_optim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
