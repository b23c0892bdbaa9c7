"""What ``engine.save_checkpoint`` writes, as the JSON's ``"ds_optim": {"checkpoint": ...}`` says.

    "deepspeed"   DeepSpeed's own form (the default)
    "canonical"   the canonical form in its place, under the same directory and tag
    "both"        DeepSpeed's own form, and the canonical one in the folder ``canonical`` of the same directory

``engine.load_checkpoint`` knows both forms.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_optim.checkpoint import save_load
from ds_optim.deepspeed.configuration import DsOptimObject
from ds_optim.deepspeed.events import around_save

BESIDE = "canonical"


def save_as_asked(engine: Any) -> None:
    """Let this engine's ``save_checkpoint`` write what its configuration asks for."""
    form = DsOptimObject.of(engine._config._param_dict).checkpoint
    if form == "deepspeed":
        return

    def saved(save: Callable[[], Any], engine: Any, asked: dict[str, Any]) -> Any:
        directory = Path(asked["save_dir"])
        if form == "both":
            save()
            directory /= BESIDE
        save_load.save(
            directory,
            engine,
            tag=None if asked["tag"] is None else str(asked["tag"]),
            client_state=asked["client_state"] or None,
            latest=asked["save_latest"],
            frozen=not asked["exclude_frozen_parameters"],
        )
        return True  # as DeepSpeed's

    around_save(engine, saved)
