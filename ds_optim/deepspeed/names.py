"""What may stand in a DeepSpeed JSON as an optimizer's ``"type"``, and where DeepSpeed looks it up."""

from __future__ import annotations

import torch

from ds_optim.optimizers.registry import optimizers
from ds_optim.stepping.sharded import ShardedOptimizer


def names() -> dict[str, type[ShardedOptimizer]]:
    """What may stand in a JSON's ``"type"``, and what it resolves to.

    Every registered optimizer has its name behind that of its package and a dot (``ds_optim.AdamW``), and its bare one
    unless DeepSpeed keeps that for an optimizer of its own, which it then never looks up in `torch.optim`.
    """
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS  # compared in lower case there

    listed = optimizers()
    dotted = {f"{cls.__module__.partition('.')[0]}.{name}": cls for name, cls in listed.items()}
    bare = {name: cls for name, cls in listed.items() if name.lower() not in DEEPSPEED_OPTIMIZERS}
    return {**bare, **dotted}


def may_be_ours(name: str) -> bool:
    """Whether the optimizer that a checkpoint's configuration names is one of ours; where it names none, it may be."""
    return not name or name in names()


def json_names() -> list[str]:
    """The shortest name of every optimizer that may stand in a JSON."""
    known = names()
    return [next(name for name, its in known.items() if its is cls) for cls in optimizers().values()]


def install_names() -> None:
    """Make the names known to DeepSpeed; what is known already stays, so that it may be done again.

    A name that `torch.optim` already has for something else is left alone; the dotted name always works.
    """
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    for name, cls in names().items():
        if not hasattr(torch.optim, name):
            setattr(torch.optim, name, cls)
        if cls not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(cls)
