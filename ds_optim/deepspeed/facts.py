"""Numbers that stand in DeepSpeed's source, with the file and the name under which they stand there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

START_ALIGNMENT = 2
"""Elements per rank that ZeRO-1/2 pads a group to (`stage_1_and_2.py`, `nccl_start_alignment_factor`)."""

ALLREDUCE_ELEMENTS = 500_000_000
"""Most elements of gradients that ZeRO-0 flattens at a time (`engine.py`, `MEMORY_OPT_ALLREDUCE_SIZE`)."""

MAKERS_OF_PARAMETERS = (
    "deepspeed.runtime.zero.partition_parameters.",
    "deepspeed.runtime.zero.partitioned_param_coordinator.",
    "deepspeed.runtime.zero.parameter_offload.",
)
"""Whose code allocates gathered parameters."""

MAKERS_OF_BUCKETS = (
    "deepspeed.runtime.zero.stage",
    "deepspeed.runtime.comm.",
    "deepspeed.runtime.engine.",
    "deepspeed.runtime.bf16_optimizer.",
    "deepspeed.comm.",
)
"""Whose code allocates, in a backward pass, what gradients are reduced in."""


def zero_settings(config: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """A JSON's ``zero_optimization`` with DeepSpeed's own defaults filled in.

    Raises:
        pydantic.ValidationError: DeepSpeed refuses it.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**config)
