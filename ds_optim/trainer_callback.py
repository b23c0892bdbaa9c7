"""What our callbacks for `transformers.Trainer` share; transformers need not be installed to import them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback as Callback
else:
    try:
        from transformers import TrainerCallback as Callback
    except ImportError:
        Callback = object

__all__ = ["Callback", "engine_of"]


def engine_of(trainer: Any) -> Any | None:
    """The DeepSpeed engine that a Trainer trains with, once training has begun; None if it uses none."""
    wrapped = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
    return None if wrapped is None else wrapped.engine
