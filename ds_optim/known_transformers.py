"""What differs between the releases of transformers in the range of `ds_optim.releases`, each with its release.

The one place that knows. transformers is imported by the functions that need it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


def causal_model(config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    """A causal language model with weights of ``dtype``, an argument that was called ``torch_dtype`` before 4.56."""
    from transformers import AutoModelForCausalLM

    name = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # configs were renamed with it
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **{name: dtype})
    return tied(made)


def tied(model: Any) -> nn.Module:
    """A model with its output head tied, if its config says so: 5.0 leaves that out on the meta device."""
    model.tie_weights()
    return cast(nn.Module, model)


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass, by non-reentrant checkpoints: this name since 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def tensor_parallel_plan(model: Any) -> dict[str, str]:
    """How a model's modules are cut over tensor-parallel ranks, by name with ``*`` for numbers: since 4.50, a property
    of the model's since 4.55."""
    plan = getattr(model, "tp_plan", None)
    if plan is None:
        prefix = f"{model.base_model_prefix}."
        of_base = getattr(model.config, "base_model_tp_plan", None) or {}
        plan = {**{prefix + key: style for key, style in of_base.items()}, **(getattr(model, "_tp_plan", None) or {})}
    return {key: str(style) for key, style in plan.items()}
