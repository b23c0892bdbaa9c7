"""What differs between the releases of DeepSpeed in the range of `ds_optim.releases`, with the release that brought it.

The one place that knows. Where something is read, what an object has says more than a release's number, and a release
that is not known yet is judged by the same look; what is read is checked against the engine before the first step all
the same, see `ds_optim.deepspeed.reader`. Mistakes that cannot be seen on an object go by the number.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_optim.releases import DEEPSPEED


def offsets(wrapper: Any, group: int) -> list[int]:
    """Where each parameter of a ZeRO-1/2 group begins in its flat tensor (0.19.7); before, one behind the other."""
    if hasattr(wrapper, "round_robin_bit16_offsets"):
        return [int(offset) for offset in wrapper.round_robin_bit16_offsets[group]]
    sizes = [parameter.numel() for parameter in wrapper.round_robin_bit16_groups[group]]
    return list(accumulate([0, *sizes[:-1]]))


def sub_group_ranks(wrapper: Any, sub_group: int) -> dist.ProcessGroup:
    """Who shares a sub-group of ZeRO-3 (0.19.3); before, all sub-groups are shared by the same ranks."""
    own = getattr(wrapper, "_get_sub_group_process_group", None)
    ranks: dist.ProcessGroup = own(sub_group) if own is not None else wrapper.dp_process_group
    return ranks


def is_boundary(wrapper: Any) -> bool:
    """Whether a ZeRO wrapper is in the last backward pass of an accumulation window: a method (0.19.5) or a value."""
    stated = wrapper.is_gradient_accumulation_boundary
    return bool(stated() if callable(stated) else stated)


def is_managed(engine: Any) -> bool:
    """Whether DeepSpeed counts the backward passes of a step, which may be turned off since 0.19.4."""
    managed = getattr(engine, "managed_gradient_accumulation", None)
    return managed is None or bool(managed())


_ARRIVED = ("_offload_accumulated_param_ids", "_offload_boundary_param_ids")  # ZeRO-1/2, ZeRO-3


def hand_over(wrapper: Any, parameters: Iterable[Tensor]) -> bool:
    """Under offload, let the masters get gradients that only earlier passes of a window brought (0.19.5).

    Returns:
        Whether they are there; before, they are lost where a backward pass hands over what it reduces.
    """
    arrived = _arrived(wrapper)
    if arrived is None:
        return not (getattr(wrapper, "partition_gradients", True) or wrapper.overlap_comm)
    ids = {wrapper.get_param_id(parameter) for parameter in parameters}
    setattr(wrapper, arrived, getattr(wrapper, arrived) & ids)
    wrapper.finalize_gradient_accumulation_boundary()  # what DeepSpeed does for all of them if unmanaged
    return True


def forget_arrivals(wrapper: Any) -> None:
    """Under offload, drop what a window that is dropped has brought, which otherwise only a step does (0.19.5).

    ZeRO-1/2 before 0.19.0 would lose the next pass as a middle one: it is told that it is the first.
    """
    if DEEPSPEED.is_before("0.19.0") and hasattr(wrapper, "accumulated_grads_in_cpu"):
        wrapper.micro_step_id = 0 if wrapper.ready_for_gradients else -1  # is counted when buckets are set up
    arrived = _arrived(wrapper)
    if arrived is not None:
        setattr(wrapper, arrived, set())
    if hasattr(wrapper, "_wait_for_offload_copies"):  # to the host, at ZeRO-1/2 (0.19.8); before, they were not noted
        wrapper._wait_for_offload_copies()


def _arrived(wrapper: Any) -> str | None:
    return next((name for name in _ARRIVED if hasattr(wrapper, name)), None)


def gathers_in_a_graph(wrapper: Any) -> bool:
    """Whether a ZeRO-1/2 wrapper's flat weights hang in a graph of autograd's, as they do until 0.19.0 detached them.

    Unless its step is taken outside of autograd, gathering them in place ends with an error of torch from 2.9 on, over
    several ranks of a CPU.
    """
    return any(flat.requires_grad for flat in wrapper.bit16_groups_flat)


def has_expert_parallelism(config: Any) -> bool:
    """Whether a configuration asks for AutoEP (0.19.2)."""
    setting = getattr(config, "expert_parallel_config", None)
    return setting is not None and bool(setting.enabled)


# -- faults of older releases that no object shows -------------------------------------------------------------------


def are_those_before(release: str) -> bool:
    """Whether the faults that a release mended are in the installed one."""
    return DEEPSPEED.is_before(release)


def gathers_too_early(config: Any) -> bool:
    """Whether ZeRO-3 on CPU would use gathered weights before all of them have arrived, as it does before 0.19.8.

    Of the weights that it gathers together (those that are too small to be partitioned, after every step) it waits for
    the last one alone; gloo's do not come in order. Gathered one by one they are waited for. On an accelerator a stream
    keeps the order.
    """
    return (
        DEEPSPEED.is_before("0.19.8")
        and config.zero_optimization_stage == 3
        and not config.zero_config.allgather_sequential
        and _ranks_are_on_cpu()
    )


def reduces_nothing(config: Any) -> bool:
    """Whether ZeRO-1/2 on CPU would leave every rank its own gradients, as it does without buckets before 0.19.8."""
    return (
        DEEPSPEED.is_before("0.19.8")
        and config.zero_optimization_stage in (1, 2)
        and not config.zero_config.contiguous_gradients
        and not _offloads(config)  # which needs buckets
        and _ranks_are_on_cpu()
    )


def loses_middle_passes(config: Any) -> bool:
    """Whether ZeRO-2 under CPU offload would drop all but the first and last pass of a window, as before 0.19.0."""
    return (
        DEEPSPEED.is_before("0.19.0")
        and config.zero_optimization_stage == 2
        and _offloads(config)
        and config.gradient_accumulation_steps > 2
    )


def loses_earlier_passes(engine: Any) -> bool:
    """Whether an offloading ZeRO-2 engine whose boundaries are set by hand keeps the last pass alone, as before 0.19.0.

    It adds passes up only where the configuration says that there are several.
    """
    return (
        DEEPSPEED.is_before("0.19.0")
        and engine.zero_optimization_stage() == 2
        and engine.gradient_accumulation_steps() == 1
    )


def reduces_before_it_adds(wrapper: Any) -> bool:
    """Whether a BF16_Optimizer takes the last backward pass of a window into its buffers after they were reduced.

    Before 0.19.0 every rank then steps with gradients of its own, unless each gradient is taken when it is there.
    """
    return DEEPSPEED.is_before("0.19.0") and not wrapper.immediate_grad_update


def mixes_frozen_groups_up() -> bool:
    """Whether ZeRO-3 gives the groups behind a frozen one the options of others, as before 0.19.3."""
    return DEEPSPEED.is_before("0.19.3")


def lays_out_empty_parameters() -> bool:
    """Whether ZeRO-1/2 has parameters without elements in its partitions, as before 0.19.8."""
    return DEEPSPEED.is_before("0.19.8")


def _offloads(config: Any) -> bool:
    offload = config.zero_config.offload_optimizer
    return offload is not None and str(getattr(offload.device, "value", offload.device)) == "cpu"


def _ranks_are_on_cpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cpu" and dist.is_initialized() and dist.get_world_size() > 1
