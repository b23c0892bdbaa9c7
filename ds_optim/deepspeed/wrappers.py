"""What is read of DeepSpeed's objects: the one table of its optimizer wrappers, and of its engine.

Keyed by the names of classes, so that it can be read where DeepSpeed is not installed. Whoever reads an attribute of a
wrapper has it listed here, or in `differences` if not every release that is known has it, and asks for a problem
before: a release that has it no more is named, with the ones that have it, instead of an `AttributeError` in the middle
of a step. A class that derives from one of these is another one: what it does differently is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from ds_optim.releases import DEEPSPEED

Purpose = Literal["parameters", "fp32 master", "gradients", "gradient buckets", "buffers"]
"""What a wrapper keeps tensors for, in the words of the memory accounts' categories."""

Use = Literal["training", "checkpoint"]
"""Who reads: an optimizer that is bound to the engine, with what guards and measures it; saving and loading."""

EngineUse = Literal["configuration", Use, "measurement"]
"""Likewise of an engine itself: who looks at it before it has a wrapper, and the noise scale."""

BUFFERS_OF_ZERO_3 = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
"""Where a ZeRO-3 wrapper keeps gradients, by parameter."""

STATE_ACCESS = (
    "get_full_hp_param",
    "set_full_hp_param",
    "get_local_fp32_param",
    "set_local_hp_param",
    "get_hp_param_device",
)
"""What `deepspeed.utils.safe_get_full_optimizer_state` and its relatives call: of a parameter at ZeRO-1/2, of the
wrapper at ZeRO-3."""

GRADIENTS_OF_PARAMETERS = ("grad", "grad_accum", "_hp_grad")
"""Where the gradient of a parameter may hang; DeepSpeed accumulates in ``grad_accum``."""


@dataclass(frozen=True, slots=True)
class WrapperKind:
    """What is read of one of DeepSpeed's wrapper classes.

    Attributes:
        name: of the class.
        stage: of ZeRO; None where ``partition_gradients`` tells 2 from 1.
        training: what an optimizer of ours needs; None if it never runs in such a wrapper.
        checkpoint: what saving and loading need; None likewise.
        tensors: lists, dictionaries and objects of tensors that it keeps, and what for.
        at_times: the same, of what is there in some states or configurations only.
        says_offloaded: the attribute that says whether gradients are offloaded to the CPU; empty if they never are.
        offloaded: what training needs besides where they are.
    """

    name: str
    stage: int | None
    tensors: Mapping[str, Purpose]
    training: tuple[str, ...] | None = None
    checkpoint: tuple[str, ...] | None = None
    at_times: Mapping[str, Purpose] = field(default_factory=dict)
    says_offloaded: str = ""
    offloaded: tuple[str, ...] = ()

    def needed(self, use: Use, wrapper: Any) -> tuple[str, ...] | None:
        """The attributes that a wrapper of this class must have for a use; None where it serves no such use."""
        if use == "checkpoint":
            return self.checkpoint
        return (*self.training, *self.offloaded) if self.training and is_offloaded(wrapper) else self.training


ZERO_1_AND_2 = WrapperKind(
    "DeepSpeedZeroOptimizer",
    stage=None,
    training=(
        # the partitions, and who holds them
        *("round_robin_bit16_groups", "bit16_groups", "bit16_groups_flat"),
        *("partition_size", "real_dp_process_group", "single_partition_of_fp32_groups"),
        # gradients, from the backward pass to the step
        *("averaged_gradients", "all_grad_tensors", "ready_for_gradients", "get_param_id", "_grad_acc_hooks"),
        *("backward_prologue", "independent_gradient_partition_epilogue", "is_gradient_accumulation_boundary"),
        *("zero_grad", "unscale_and_clip_grads", "overflow", "loss_scale", "cpu_offload", "partition_gradients"),
        # access to state
        *("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state", "_link_all_hp_params"),
    ),
    says_offloaded="cpu_offload",
    offloaded=("grad_position", "accumulated_grads_in_cpu", "norm_for_param_grads", "local_overflow"),
    checkpoint=("update_lp_params", "loss_scaler"),
    tensors={
        "bit16_groups_flat": "parameters",
        "single_partition_of_fp32_groups": "fp32 master",
        "averaged_gradients": "gradients",
        "all_grad_tensors": "gradients",
        "ipg_buckets": "gradient buckets",
    },
    at_times={
        "grads_in_partition": "gradients",  # set by the first backward pass
        "accumulated_grads_in_cpu": "gradients",
        "param_buffer_of_bit16_for_cpu_offload_groups": "gradient buckets",
        "temp_grad_buffer_for_cpu_offload": "gradient buckets",
        "temp_grad_buffer_for_gpu_offload": "gradient buckets",
        "_global_grad_norm": "buffers",
    },
)

ZERO_3 = WrapperKind(
    "DeepSpeedZeroOptimizer_Stage3",
    stage=3,
    training=(
        # the partitions, and who holds them
        *("fp16_groups", "fp32_partitioned_groups_flat", "grad_position", "dp_process_group"),
        # gradients, from the backward pass to the step
        *(BUFFERS_OF_ZERO_3, "partition_grads", "micro_step_id", "get_param_id", "_grad_acc_hooks"),
        *("_leaf_module_hooks", "is_gradient_accumulation_boundary", "zero_grad", "unscale_and_clip_grads", "overflow"),
        *("loss_scale", "offload_optimizer"),
        # the optimizer's groups, which are empty between steps
        *("_set_fp32_optimizer_param_groups", "_clear_fp32_optimizer_param_groups"),
        # access to state
        "_link_all_hp_params",
    ),
    says_offloaded="offload_optimizer",
    offloaded=("norm_for_param_grads",),
    checkpoint=(
        *("fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "persistent_parameters"),
        *("checkpoint_event_prologue", "checkpoint_event_epilogue", "loss_scaler"),
    ),
    tensors={
        "fp16_partitioned_groups_flat": "parameters",
        "fp32_partitioned_groups_flat": "fp32 master",
        "averaged_gradients": "gradients",
        "grad_partitions_flat_buffer": "gradients",
        "ipg_buckets": "gradient buckets",
        "param_groups_fp16_flat_cpu_memory": "parameters",
        "inf_or_nan_tracker": "buffers",
    },
    at_times={"lp_param_buffer": "parameters", "_global_grad_norm": "buffers"},
)

BF16 = WrapperKind(
    "BF16_Optimizer",
    stage=1,
    training=(
        # the partitions, and who holds them
        *("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition", "real_dp_process_group"),
        # gradients, from the backward pass to the step
        *("fp32_groups_gradient_flat_partition", "clear_hp_grads", "get_grads_for_norm"),
        # access to state
        *("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state", "_link_all_hp_params"),
    ),
    checkpoint=("update_lp_params",),
    tensors={
        "bf16_groups_flat": "parameters",
        "fp32_groups_flat_partition": "fp32 master",
        "fp32_groups_gradients_flat": "gradients",
    },
    at_times={"_global_grad_norm": "buffers"},
)

UNFUSED = WrapperKind(
    "FP16_UnfusedOptimizer",  # in bf16 too
    stage=0,
    training=("fp16_groups", "fp32_groups", "unscale_and_clip_grads", "refresh_fp32_params", "overflow"),
    checkpoint=("fp16_groups", "fp32_groups"),
    tensors={"fp16_groups": "parameters", "fp32_groups": "fp32 master"},
    at_times={"_global_grad_norm": "buffers"},
)

# Around DeepSpeed's own Adam only; its memory is accounted for, to compare with.
FUSED_FP16 = WrapperKind(
    "FP16_Optimizer",
    stage=0,
    tensors={"fp16_groups_flat": "parameters", "fp32_groups_flat": "fp32 master"},
    at_times={"_global_grad_norm": "buffers"},
)

WRAPPERS: Mapping[str, WrapperKind] = {one.name: one for one in (ZERO_1_AND_2, ZERO_3, BF16, UNFUSED, FUSED_FP16)}

ENGINE_ATTRIBUTES: Mapping[EngineUse, tuple[str, ...]] = {
    "configuration": (
        # the ranks
        *("seq_data_parallel_group", "mesh_device", "mp_world_size", "mpu"),
        # the model and what it is to be trained with
        *("module", "basic_optimizer", "client_lr_scheduler", "has_moe_layers", "pipeline_parallelism"),
        "autotp_size",
        *("zero_optimization_stage", "zero_use_cpu_optimizer", "optimizer_name"),
        *("_config._param_dict", "_config.optimizer_params", "_config.zero_force_ds_cpu_optimizer"),
    ),
    "training": (
        *("optimizer", "client_optimizer", "_config.optimizer_name", "bfloat16_enabled", "seq_dp_world_size"),
        *("expert_data_parallel_group", "expert_parallel_group"),
        # the step and what leads to it
        *("global_steps", "skipped_steps", "zero_grad", "inside_no_sync_ctxt", "gradient_accumulation_steps"),
        "is_gradient_accumulation_boundary",
        # its checkpoints
        *("load_checkpoint", "save_checkpoint", "use_node_local_storage", "global_rank"),
    ),
    "checkpoint": (
        *("module", "optimizer", "basic_optimizer", "mp_world_size", "pipeline_parallelism", "lr_scheduler"),
        *("global_steps", "global_samples", "micro_steps", "skipped_steps", "gradient_accumulation_steps"),
        "checkpoint_engine",
    ),
    "measurement": (
        *("optimizer", "global_steps", "data_parallel_group", "sequence_parallel_size", "fp16_enabled"),
        *("torch_autocast_z0_gradscaler", "clip_fp32_gradients"),
    ),
}
"""What is read of an engine: before DeepSpeed has put its wrapper around the optimizer, and by whom afterwards."""


def kind_of(wrapper: Any) -> WrapperKind | None:
    """What is known of a wrapper's class; None of any other object."""
    return WRAPPERS.get(type(wrapper).__name__)


def is_offloaded(wrapper: Any) -> bool:
    """Whether a wrapper keeps gradients, master and state in host memory."""
    kind = kind_of(wrapper)
    return kind is not None and bool(kind.says_offloaded and getattr(wrapper, kind.says_offloaded, False))


def stage_of(wrapper: Any) -> int:
    """The ZeRO stage of a wrapper of `WRAPPERS`."""
    stage = WRAPPERS[type(wrapper).__name__].stage
    return stage if stage is not None else 2 if wrapper.partition_gradients else 1


def attributes_problem(engine: Any, use: EngineUse) -> str:
    """Why an engine itself is not what is known here, as a sentence; empty if it is.

    Args:
        use: for which attributes it must have.
    """
    return unlike(_missing(engine, ENGINE_ATTRIBUTES[use]))


def engine_problem(engine: Any, use: Use) -> str:
    """The same of an engine and its wrapper."""
    problem = attributes_problem(engine, use)
    if problem or engine.optimizer is engine.basic_optimizer:  # DeepSpeed has put nothing around it
        return problem
    wrapper = engine.optimizer
    kind = kind_of(wrapper)
    expected = kind.needed(use, wrapper) if kind is not None else None
    if expected is None:
        return (
            f"{type(wrapper).__name__} is a DeepSpeed optimizer wrapper that is not known here; use ZeRO stage 0, "
            f"1, 2 or 3; {DEEPSPEED.known}"
        )
    return unlike(_missing(wrapper, expected))


def tensors_problem(wrapper: Any) -> str:
    """The same of a wrapper of `WRAPPERS` and what it keeps tensors in."""
    return unlike(_missing(wrapper, WRAPPERS[type(wrapper).__name__].tensors))


def unlike(found: str) -> str:
    """The one message about a release of DeepSpeed that is another one than expected; empty if nothing was found."""
    if not found:
        return ""
    remedy = f"pip install 'deepspeed=={DEEPSPEED.tested[-1]}'"
    return f"deepspeed {DEEPSPEED.installed}: {found}; {DEEPSPEED.known}; {remedy}"


def _missing(owner: Any, expected: Iterable[str]) -> str:
    missing = [name for name in expected if not _has(owner, name)]
    return f"{type(owner).__name__} has no {', '.join(missing)}" if missing else ""


def _has(owner: Any, name: str) -> bool:
    """As `hasattr`, of an attribute's attribute too."""
    try:
        attrgetter(name)(owner)
    except AttributeError:
        return False
    return True
