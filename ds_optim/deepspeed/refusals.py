"""What is refused at start: settings, engines and models under which an optimizer here could not be exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_optim.deepspeed import differences, model_parts
from ds_optim.deepspeed.configuration import option_problems, trainer_problems
from ds_optim.deepspeed.names import names
from ds_optim.deepspeed.parameters import is_trained, names_of, roles_of
from ds_optim.listing import first_of
from ds_optim.optimizers.registry import optimizers
from ds_optim.releases import DEEPSPEED
from ds_optim.roles import canonical_name, logical_shape
from ds_optim.roles.role import Role
from ds_optim.stepping.sharded import ShardedOptimizer


@dataclass(frozen=True, slots=True)
class Refusal:
    """A DeepSpeed setting under which an optimizer here could not be exact.

    Attributes:
        applies: judges a `deepspeed.runtime.config.DeepSpeedConfig` and an optimizer class.
        reason: what is wrong and what to change.
        before: the release of DeepSpeed that mends it; None if none does.
    """

    applies: Callable[[Any, type[ShardedOptimizer]], bool]
    reason: str
    before: str | None = None

    @property
    def may_apply(self) -> bool:
        """Whether the installed DeepSpeed has the fault."""
        return self.before is None or differences.are_those_before(self.before)


def _offload(config: Any, name: str, default: Any) -> Any:
    """A setting of ``zero_optimization.offload_optimizer``; ``default`` without that."""
    offload = config.zero_config.offload_optimizer
    return default if offload is None else getattr(offload, name)


REFUSALS = (
    Refusal(
        lambda config, _: config.zero_config.zenflow is not None,
        "zero_optimization.zenflow updates with its own Adam: remove it",
    ),
    Refusal(
        lambda config, _: _offload(config, "device", None) == "nvme",  # a str enumeration, or its value
        "zero_optimization.offload_optimizer.device nvme takes all state for fp32 tensors of the partition's size: "
        'use "cpu"',
    ),
    Refusal(
        lambda config, _: bool(_offload(config, "super_offload", False)),
        "zero_optimization.offload_optimizer.super_offload updates with its own Adam: set it to false",
    ),
    Refusal(
        lambda config, _: _offload(config, "ratio", 1.0) < 1,
        "zero_optimization.offload_optimizer.ratio below 1 updates the rest with DeepSpeed's Adam: set it to 1",
    ),
    Refusal(
        lambda config, _: config.float16_config.fp16_master_weights_and_grads,
        "fp16.fp16_master_weights_and_grads drops the fp32 master weights: set it to false",
    ),
    Refusal(
        lambda config, _: config.bfloat16_config.bf16_master_weights_and_grads,
        "bf16.bf16_master_weights_and_grads drops the fp32 master weights: set it to false",
    ),
    Refusal(
        lambda config, _: config.bfloat16_config.bf16_optimizer_states,
        'bf16.bf16_optimizer_states belongs to DeepSpeed\'s Adam: set it to false and give the optimizer "state_dtype"',
    ),
    Refusal(
        lambda config, _: config.float16_config.enabled and not config.zero_enabled,
        "fp16 without ZeRO divides gradients by a loss scale that was never applied (DeepSpeed's "
        "FP16_UnfusedOptimizer): use ZeRO stage 1, or bf16",
    ),
    Refusal(
        lambda config, _: config.torch_autocast_enabled and config.torch_autocast_dtype == torch.float16,
        "torch_autocast with float16 puts a gradient scaler around every step(): use bfloat16",
    ),
    Refusal(
        lambda config, _: config.zero_config.elastic_checkpoint,
        "zero_optimization.elastic_checkpoint slices all state by elements: set it to false",
    ),
    Refusal(
        lambda config, _: config.load_universal_checkpoint,
        "checkpoint.load_universal knows Adam's state only: set it to false",
    ),
    Refusal(
        lambda config, _: differences.has_expert_parallelism(config) and config.tensor_parallel_config.autotp_size > 1,
        "expert_parallel (AutoEP) together with tensor_parallel (AutoTP) folds experts over slices, which is not "
        "supported: use one of them",
    ),
    Refusal(
        lambda config, _: differences.gathers_too_early(config),
        "ZeRO-3 on CPU with several ranks uses gathered weights before all of them have arrived in deepspeed before "
        '0.19.8: set "stage3_allgather_sequential": true in "zero_optimization", and give zero.Init the same config',
        before="0.19.8",
    ),
    Refusal(
        lambda config, _: differences.reduces_nothing(config),
        "ZeRO-1/2 on CPU with several ranks and contiguous_gradients false reduces no gradients in deepspeed before "
        "0.19.8: leave it out",
        before="0.19.8",
    ),
    Refusal(
        lambda config, _: differences.loses_middle_passes(config),
        "ZeRO-2 with CPU offload and gradient_accumulation_steps above 2 keeps the first and the last micro-batch "
        "alone in deepspeed before 0.19.0: use ZeRO stage 1 or 3, or deepspeed 0.19.0 or later",
        before="0.19.0",
    ),
    Refusal(
        lambda config, _: config.compile_config.deepcompile and config.zero_enabled,
        "compile.deepcompile moves gradients past the hooks that tell an unused parameter from one with an old "
        "gradient: set it to false; engine.compile() works without it",
    ),
)


def refusals(config: Any, cls: type[ShardedOptimizer]) -> list[str]:
    """Every reason why ``cls`` could not be exact under a `DeepSpeedConfig`, each with its remedy."""
    found = []
    for refusal in REFUSALS:
        try:
            applies = refusal.applies(config, cls)
        except AttributeError as error:  # settings of a release that is not known are called otherwise
            found.append(f"deepspeed {DEEPSPEED.installed} keeps a setting elsewhere ({error}); {DEEPSPEED.known}")
        else:
            found += [refusal.reason] * applies
    return found


def engine_problems(engine: Any, cls: type[ShardedOptimizer], roles: Any, inferred: Mapping[str, Role]) -> list[str]:
    """Every reason why an optimizer of ``cls`` could not be exact in an engine, ``roles`` that do not fit included."""
    problems = refusals(engine._config, cls)
    problems += _sparse_problems(engine.module)
    if not cls.rule.is_elementwise and model_parts.has_unknown_parts(engine):
        unknown = model_parts.unknown_slices(engine.module) or ["any parameter"]
        problems.append(
            f"{first_of(unknown)}: tensor parallelism has cut these in a way that is not known here (AutoTP's fused, "
            "transposed and packed layers, an mpu's own), and an optimizer of blocks needs whole heads, rows and "
            "matrices: use AdamW, Lion or Adan, or FSDP2 over tensor parallelism"
        )
    partial = model_parts.partial_gradients(engine.module)
    if partial:
        problems.append(
            f"{first_of(partial)}: norms of queries and keys, of which each tensor-parallel rank sees its own heads; "
            "nobody adds their gradients up, and ranks would drift apart. AutoTP does where the model has a tp_plan or "
            'the JSON "tensor_parallel": {"partition_config": ...} with grad_allreduce'
        )
    if engine.pipeline_parallelism and model_parts.tensor_parallel_size(engine) > 1:
        problems.append("AutoTP inside a PipelineModule is not supported: set tensor_parallel.autotp_size to 1")
    try:
        roles_of(engine, roles, inferred)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _sparse_problems(model: torch.nn.Module) -> list[str]:
    """Embeddings whose gradients would be sparse: DeepSpeed flattens gradients, and fails on the first of these."""
    return [
        f"{canonical_name(name)}.weight: {type(module).__name__}(sparse=True) makes a sparse gradient, which neither "
        "DeepSpeed nor any optimizer here can take: make it with sparse=False, or freeze it"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        and module.sparse
        and module.weight.requires_grad
    ]


def untrained(engine: Any, groups: list[list[Tensor]]) -> list[str]:
    """What of an optimizer's groups cannot be trained; DeepSpeed fails at it and names neither group nor parameter."""
    stage = engine.zero_optimization_stage()
    named = names_of(engine, [parameter for group in groups for parameter in group])
    if not named or (stage and not any(map(is_trained, named))):
        found = f"all {len(named)} parameters are frozen or without elements" if named else "there are no parameters"
        remedy = 'leave "optimizer" out of the JSON, and pass none'
        if stage in (1, 2):
            remedy += ", and set zero_optimization.stage to 0 or 3: DeepSpeed's stages 1 and 2 need an optimizer"
        return [f"nothing here is trained ({found}): {remedy}"]
    problems = []
    for index, group in enumerate(groups):
        if group and stage in (1, 2) and not any(map(is_trained, group)):
            listed = ", ".join([named[parameter] for parameter in group[:3]] + ["..."] * (len(group) > 3))
            problems.append(
                f"parameter group {index} ({listed}) has nothing to train, which DeepSpeed cannot lay out at ZeRO "
                f"stage {stage}: leave the group out"
            )
        elif group and stage == 3 and differences.mixes_frozen_groups_up() and not any(p.requires_grad for p in group):
            problems.append(
                f"parameter group {index} is frozen, and at ZeRO stage 3 deepspeed before 0.19.3 gives the groups "
                "behind it the options of others: leave the group out"
            )
    why = ""
    if stage == 3:
        why = "DeepSpeed cannot gather at ZeRO stage 3: take it out of the model, or use stage 1 or 2"
    elif stage and differences.lays_out_empty_parameters():
        why = f"deepspeed before 0.19.8 cannot lay out at ZeRO stage {stage}: take it out of the model, or freeze it"
    if why:
        problems += [
            f"{name} of shape {logical_shape(parameter)} has no elements, which {why}"
            for parameter, name in named.items()
            if parameter.requires_grad and not is_trained(parameter)
        ]
    return problems


def judge(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What would be refused under a DeepSpeed configuration, without an engine and its model.

    Returns:
        The optimizer's name, empty if the configuration names none of ours, and every reason. Settings are then judged
        as for an Adam-mini that is made by hand. "auto" values belong to a Trainer and are left out.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    optimizer = config.get("optimizer")
    named = names().get(str(optimizer.get("type"))) if isinstance(optimizer, Mapping) else None
    known = _without_auto({key: value for key, value in config.items() if "batch" not in key and key != "optimizer"})
    known.pop("gradient_accumulation_steps", None)
    try:
        whole = DeepSpeedConfig({**known, "train_micro_batch_size_per_gpu": 1})
    except Exception as error:  # of several kinds, and the file is what is judged
        reasons = [f"DeepSpeed refuses it: {error}"]
    else:
        reasons = refusals(whole, named or optimizers()["AdamMini"])
    if named is not None:
        reasons = [*option_problems(named, _without_auto(config)), *trainer_problems(named, config), *reasons]
    return named.__name__ if named else "", reasons


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value
