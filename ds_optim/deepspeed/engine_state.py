"""What of a DeepSpeed engine a checkpoint needs beside its optimizer's tensors.

DeepSpeed is not imported: an engine is told by what it has. Its attributes are named in `wrappers` and guarded by one
check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.deepspeed import model_parts, wrappers
from ds_optim.sharding import dtensor
from ds_optim.sharding.binding import BoundTensor, local_of
from ds_optim.sharding.boxes import stretches
from ds_optim.stepping.logical_tensors import LogicalRange, element_ranges

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def is_engine(subject: Any) -> bool:
    """Whether this is a DeepSpeed engine, not a plain model."""
    return hasattr(subject, "basic_optimizer") and hasattr(subject, "module")


def writes_torchs_files(engine: Any) -> bool:
    """Whether its own checkpoints are files of torch's, as they are unless the configuration names another writer."""
    return type(engine.checkpoint_engine).__name__ == "TorchCheckpointEngine"


def problems(engine: Any) -> list[str]:
    """Why an engine cannot be saved or loaded, as sentences."""
    found = wrappers.engine_problem(engine, "checkpoint")
    if found:
        return [found]
    if model_parts.has_unknown_parts(engine):
        return [
            "model parallelism of an mpu: which parts of the parameters the ranks hold is not known, use DeepSpeed's "
            "own checkpoint"
        ]
    if _is_stage_3(engine):
        missing = [p for p in engine.module.parameters() if p.ds_tensor.numel() != p.partition_numel()]
        if missing:
            return ["the weights are offloaded to NVMe (zero_optimization.offload_param): use cpu"]
    return []


def group_indices(engine: Any) -> dict[Tensor, int]:
    """The parameter group of every tensor that the optimizer steps. ZeRO-3 keeps its groups empty between steps."""
    if _is_stage_3(engine):
        wrapper = engine.optimizer
        return {
            tensor: wrapper.sub_group_to_group_id[index]
            for index, tensor in enumerate(wrapper.fp32_partitioned_groups_flat)
        }
    groups = engine.basic_optimizer.param_groups
    return {tensor: index for index, group in enumerate(groups) for tensor in group["params"]}


def counters(engine: Any) -> dict[str, Any]:
    """Steps, samples and the fp16 loss scale, as JSON holds them."""
    found: dict[str, Any] = {name: int(getattr(engine, name)) for name in _COUNTERS}
    scaler = _loss_scaler(engine)
    if scaler is not None:
        found["loss_scale"] = {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)}
    return found


def restore_counters(engine: Any, found: Mapping[str, Any]) -> None:
    """Put `counters` back; a loss scale only where the engine has a dynamic one, a static one is configuration."""
    for name in _COUNTERS:
        setattr(engine, name, found[name])
    window = engine.gradient_accumulation_steps()
    engine.micro_steps -= engine.micro_steps % window  # gradients are not saved: a window begins anew
    scaler = _loss_scaler(engine)
    if scaler is not None:
        for name, value in found.get("loss_scale", {}).items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)


def local_weight(parameter: Tensor, slices: model_parts.Slices | None = None) -> tuple[list[LogicalRange], Tensor]:
    """Which of a parameter's elements are here, and where in them; all without ZeRO-3, FSDP2 or model parallelism.

    Args:
        slices: how the whole one is cut, if it is.
    """
    if isinstance(parameter, DTensor):
        bound = dtensor.read("", parameter)
        return element_ranges(bound.layout, bound.rank)[0], local_of(parameter).detach()
    begin, end, values = 0, parameter.numel(), parameter.detach()
    if hasattr(parameter, "ds_tensor"):
        sliced: Any = parameter
        width, numel = sliced.partition_numel(), sliced.ds_numel
        begin = min(width * dist.get_rank(sliced.ds_process_group), numel)
        end = min(begin + width, numel)
        values = sliced.ds_tensor.detach().view(-1)[: end - begin]
    if slices is None:
        return [LogicalRange(begin, end, 0)], values
    found, before = list[LogicalRange](), 0
    for box in slices.boxes[slices.rank]:
        low, high = max(begin, before), min(end, before + box.numel)
        offset = low - begin
        for start, stop in stretches(slices.whole, box, low - before, high - before):
            found.append(LogicalRange(start, stop, offset))
            offset += stop - start
        before += box.numel
    return found, values


@torch.no_grad()
def publish_weights(engine: Any, bound: Mapping[Tensor, BoundTensor]) -> None:
    """Give the model the weights that were read into the optimizer's fp32 tensors, as DeepSpeed does after a step."""
    wrapper = engine.optimizer
    if _is_stage_3(engine):
        wrapper.checkpoint_event_prologue()
        for tensor, parameters in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
            one = bound[tensor]
            for fragment in one.layout.fragments(one.rank):
                weight = parameters[fragment.parameter].ds_tensor.detach().view(-1)
                weight[: fragment.numel].copy_(tensor.detach()[fragment.offset : fragment.offset + fragment.numel])
        persistent = wrapper.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        wrapper.checkpoint_event_epilogue()  # gathers the persistent ones again
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif wrapper is not engine.basic_optimizer:
        for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.data)


def _is_stage_3(engine: Any) -> bool:
    return wrappers.kind_of(engine.optimizer) is wrappers.ZERO_3


def _loss_scaler(engine: Any) -> Any:
    """The scaler whose state counts: of fp16, dynamic."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
