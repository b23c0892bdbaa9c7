"""Published optimizers whose state is sharded and whose result does not depend on the number of ranks.

Importing this package costs nothing until a name is used. It also makes the optimizers' names known to DeepSpeed, which
the installed package does by itself when torch is imported (see `ds_optim_autoload`).

Raises:
    ImportError: the installed torch is outside of the range that works; the message says which one is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import ds_optim_autoload
from ds_optim.releases import TORCH, require

if TYPE_CHECKING:
    from ds_optim.optimizers.registry import *  # noqa: F403
    from ds_optim.roles import Role as Role
    from ds_optim.roles import infer_roles as infer_roles
    from ds_optim.roles import param_groups as param_groups

_OF_ROLES = ("Role", "infer_roles", "param_groups")

__version__ = "0.2.0"

require(TORCH)  # at once: what follows would fail with names that an older one does not have
ds_optim_autoload.autoload()


def _optimizers() -> dict[str, Any]:
    found: dict[str, Any] = import_module("ds_optim.optimizers.registry").optimizers()
    return found


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [*_optimizers(), *_OF_ROLES]
    if name in _OF_ROLES:
        return getattr(import_module("ds_optim.roles"), name)
    # Names that Python itself asks for, of a module that is being imported, are nobody's optimizer.
    found = None if name.startswith("_") or name.islower() else _optimizers().get(name)
    if found is None:
        raise AttributeError(f"module 'ds_optim' has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return [*globals(), "__all__", *_optimizers(), *_OF_ROLES]
