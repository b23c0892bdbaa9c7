"""Where a measured record comes from: machine, versions, model, optimizer and strategy, as they are found."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from ds_optim.deepspeed import wrappers
from ds_optim.memory.labels import basic_optimizer, stepped

_PACKAGES = ("ds-optim", "torch", "deepspeed", "transformers")


def describe(watched: Any, model: nn.Module, optimizer: Any, wrapper: Any, *, world_size: int) -> dict[str, Any]:
    """The fields of `ds_optim.memory.record.Provenance` that can be found out.

    Args:
        watched: what was given to watch: an engine or a model.
        model: the model itself.
        optimizer: as it was given, wrapped or not.
        wrapper: DeepSpeed's wrapper, or None.
        world_size: ranks that train it.
    """
    basic = basic_optimizer(optimizer)
    is_engine = watched is not model
    stage = _stage(watched, wrapper) if is_engine or wrapper is not None else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "model": getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "optimizer": _optimizer_name(basic),
        "settings": {key: str(value) for key, value in basic.defaults.items() if not isinstance(value, torch.Tensor)},
        "strategy": f"DeepSpeed ZeRO-{stage}" if stage is not None else _strategy(model),
        "stage": stage,
        "world_size": world_size,
        "precision": _precision(model, stepped(optimizer)),
        "offload": "cpu" if wrappers.is_offloaded(wrapper) else "none",
        "micro_batch": int(watched.train_micro_batch_size_per_gpu()) if is_engine else None,
        "checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "command": " ".join(sys.argv),
    }


def machine() -> str:
    """Processor, cores, operating system, and the accelerator if there is one."""
    parts = [platform.processor() or platform.machine(), f"{os.cpu_count()} cores", platform.platform(terse=True)]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Of Python, and of the packages that matter."""
    return {"python": platform.python_version(), **installed()}


def installed() -> dict[str, str]:
    """Versions of the packages that matter, where they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _stage(watched: Any, wrapper: Any) -> int:
    if hasattr(watched, "zero_optimization_stage"):
        return int(watched.zero_optimization_stage())
    return wrappers.stage_of(wrapper)


def _strategy(model: nn.Module) -> str:
    if any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()):
        return "FSDP2" if hasattr(model, "_get_fsdp_state") else "DTensor"
    return "plain PyTorch"


def _optimizer_name(basic: Any) -> str:
    package = type(basic).__module__.split(".")[0]
    fused = " (fused)" if basic.defaults.get("fused") else ""
    return f"{package}.{type(basic).__name__}{fused}"


def _precision(model: nn.Module, updated: list[torch.Tensor]) -> str:
    """By the dtypes of most elements: what the model computes with, and what the optimizer steps."""
    computed = _main_dtype([(p.dtype, getattr(p, "ds_numel", p.numel())) for p in model.parameters()])
    stepped_in = _main_dtype([(tensor.dtype, tensor.numel()) for tensor in updated])
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    name = short.get(computed, computed)
    return name if stepped_in != computed or name == "fp32" else f"pure {name}"


def _main_dtype(sizes: list[tuple[torch.dtype, int]]) -> str:
    sums: dict[torch.dtype, int] = {}
    for dtype, count in sizes:
        sums[dtype] = sums.get(dtype, 0) + count
    return str(max(sums, key=lambda dtype: sums[dtype], default=torch.float32)).removeprefix("torch.")
