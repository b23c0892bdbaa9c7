"""A name in a DeepSpeed JSON becomes one of our optimizers, bound to its engine.

The one place where DeepSpeed is touched: names are added to `torch.optim` (where DeepSpeed looks them up), the classes
to its list of optimizers that ZeRO supports, and `DeepSpeedEngine._configure_optimizer` is wrapped. The wrapper judges
the configuration before anything is built, splits a flat parameter list into decayed and exempt parameters, and
afterwards binds the optimizer to the partitions that DeepSpeed made.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import wrapt
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero import utils as zero_utils
from torch import Tensor

from ds_optim.checkpoint.deepspeed_resume import guard_resuming
from ds_optim.errors import raise_on_all_ranks
from ds_optim.optimizers.adam_mini import AdamMini
from ds_optim.optimizers.adamw import AdamW
from ds_optim.optimizers.adan import Adan
from ds_optim.optimizers.lion import Lion
from ds_optim.optimizers.shampoo import Shampoo
from ds_optim.optimizers.sharded import ShardedOptimizer, deferred_steps
from ds_optim.optimizers.swan import SWAN
from ds_optim.optimizers.whole_matrix import WholeMatrixOptimizer
from ds_optim.overlooked import overlooked, watch_trainer
from ds_optim.roles import canonical_name, exempt_names, infer_roles, logical_shape
from ds_optim.roles.overrides import override_roles
from ds_optim.roles.role import Role
from ds_optim.sharding import gradient_window, guards, zero
from ds_optim_autoload import ENGINE

CLASSES: tuple[type[ShardedOptimizer], ...] = (AdamW, Lion, Adan, AdamMini, Shampoo, SWAN)

# DeepSpeed keeps these for its own optimizers and never looks them up in torch.optim.
RESERVED = ("AdamW", "Lion")


def names() -> dict[str, type[ShardedOptimizer]]:
    """What may stand in a JSON's ``"type"``, and what it resolves to."""
    dotted = {f"ds_optim.{cls.__name__}": cls for cls in CLASSES}
    bare = {cls.__name__: cls for cls in CLASSES if cls.__name__ not in RESERVED}
    return {**bare, **dotted}


def _install() -> None:
    """Make the optimizers' names known and wrap the engine's ``_configure_optimizer``.

    Runs when this module is imported, whoever imports it, and so once per process. A name that `torch.optim` already
    has for something else is left alone; the dotted name always works.
    """
    for name, cls in names().items():
        if not hasattr(torch.optim, name):
            setattr(torch.optim, name, cls)
    for cls in CLASSES:
        if cls not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(cls)
    wrapt.wrap_function_wrapper(import_module(ENGINE), "DeepSpeedEngine._configure_optimizer", _configure_optimizer)
    watch_trainer()


@dataclass(frozen=True, slots=True)
class Settings:
    """The JSON's top-level ``"ds_optim"`` object: what must not meet the Trainer's "auto" matching.

    Attributes:
        options: options of the optimizer, which take precedence over ``optimizer.params`` (three-element ``betas``).
        no_decay: name patterns of the parameters that are spared weight decay; None: by role, see `is_decay_exempt`.
    """

    options: dict[str, Any]
    no_decay: tuple[str, ...] | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """From a whole DeepSpeed configuration."""
        given = dict(config.get("ds_optim") or {})
        no_decay = given.pop("no_decay", None)
        return cls(given, tuple(no_decay) if isinstance(no_decay, list) else None)

    def all_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the optimizer is made with."""
        return {**(config.get("optimizer", {}).get("params") or {}), **self.options}


def _configure_optimizer(wrapped: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    client, parameters = _arguments(*args, **kwargs)
    if parameters is not None:
        parameters = [_listed(entry) for entry in parameters]
    forgotten = overlooked(client, parameters)
    result = _configured(wrapped, engine, client, parameters)
    if forgotten is not None and zero.ranks_of(engine).index == 0:
        forgotten.warn(engine)
    return result


def _configured(wrapped: Callable[..., Any], engine: Any, client: Any, parameters: Any) -> Any:
    named = names().get(engine.optimizer_name()) if client is None else None
    foreign = (
        client is not None and isinstance(client, torch.optim.Optimizer) and not isinstance(client, ShardedOptimizer)
    )
    if foreign or (client is None and named is None):
        return wrapped(client, parameters)  # DeepSpeed's own optimizer, or somebody else's

    inferred = infer_roles(engine.module)
    given: list[Tensor] = []
    with deferred_steps():
        if named is not None:
            given = [parameter for group in _grouped(parameters) for parameter in group]
            parameters = _prepare_from_json(engine, named, parameters, inferred)
        elif isinstance(client, ShardedOptimizer):
            given = _accept_client(engine, client, inferred)
        else:  # a callable that makes an optimizer, perhaps one of ours
            make = client

            def client(parameters: Any) -> Any:
                made = make(parameters)
                if isinstance(made, ShardedOptimizer):
                    given.extend(_accept_client(engine, made, inferred))
                return made

        result = wrapped(client, parameters)
    basic = engine.basic_optimizer
    if isinstance(basic, ShardedOptimizer):
        binding = zero.read(engine)
        if not binding.problems:
            binding = replace(binding, settle=gradient_window.settle_gradients(engine))
        basic.bind(binding, _roles(engine, basic._roles_given, inferred), _by_name(engine, given))
        zero.guard_state_access(engine, type(basic).__name__, basic.element_keys)
        guard_resuming(engine)
        guards.watch(engine)
    return result


def _accept_client(engine: Any, optimizer: ShardedOptimizer, inferred: Mapping[str, Role]) -> list[Tensor]:
    """Judge an engine for an optimizer that the user made; the parameters that it was given."""
    problems = _engine_problems(engine, type(optimizer), optimizer._roles_given, inferred)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    problems += _untrained(engine, groups)
    if isinstance(engine.client_lr_scheduler, torch.optim.lr_scheduler.LRScheduler):
        problems += [
            f"parameter group {index} is empty: DeepSpeed takes it from the optimizer, but the learning-rate scheduler "
            "that was made over it still counts it: leave the group out"
            for index, group in enumerate(groups)
            if not group
        ]
    if engine._config._param_dict.get("ds_optim"):
        problems.append(
            'the "ds_optim" object is for an optimizer that the JSON names; give its contents to the optimizer '
            "that you make yourself"
        )
    _raise_on_all_ranks(engine, problems)
    _allow_cpu_offload(engine)
    return [parameter for group in groups for parameter in group]


def _arguments(client_optimizer: Any, model_parameters: Any) -> tuple[Any, Any]:
    return client_optimizer, model_parameters


def _prepare_from_json(
    engine: Any, cls: type[ShardedOptimizer], parameters: list[Any], inferred: Mapping[str, Role]
) -> list[Any]:
    """Judge the configuration, merge the ``ds_optim`` object into the optimizer's options, make decay groups."""
    config = engine._config._param_dict
    problems = option_problems(cls, config)
    settings = Settings.of(config)
    options = settings.all_options(config)
    problems += _engine_problems(engine, cls, options.get("roles"), inferred)
    grouped = any(isinstance(entry, dict) for entry in parameters)
    if grouped and settings.no_decay:
        problems.append('"no_decay" has no effect on parameter groups that you made: leave it out')
    patterns = settings.no_decay
    exempt, pattern_problems = _exempt(engine, patterns, inferred)
    _raise_on_all_ranks(engine, [*problems, *pattern_problems, *_untrained(engine, _grouped(parameters))])
    _warn_of_trainers_betas(cls, config)
    if options.get("roles") is not None:  # they were judged
        exempt, _ = _exempt(engine, patterns, _roles(engine, options["roles"], inferred))
    engine._config.optimizer_params = options
    _allow_cpu_offload(engine)
    if grouped:
        return parameters

    groups: list[dict[str, Any]] = [
        {"params": [entry for entry in parameters if _parameter(entry) not in exempt]},
        {"params": [entry for entry in parameters if _parameter(entry) in exempt], "weight_decay": 0.0},
    ]
    kept, others = [], list[Any]()
    for group in groups:
        if any(_is_trained(_parameter(entry)) for entry in group["params"]):
            kept.append(group)
        else:
            others += group["params"]
    if not kept:  # ZeRO-0, else this was refused: an engine whose steps do nothing, as with DeepSpeed's own optimizers
        return [{"params": others}]
    # What has no elements does not decay either, and DeepSpeed cannot lay out a group of nothing else.
    kept[0]["params"] += [entry for entry in others if _parameter(entry).requires_grad]
    return kept


def _parameter(entry: Any) -> Tensor:
    found: Tensor = entry[1] if isinstance(entry, tuple) else entry  # (name, parameter) pairs are welcome
    return found


def _listed(entry: Any) -> Any:
    """A group whose parameters can be read more than once; anything else as it is."""
    if not isinstance(entry, dict) or isinstance(entry["params"], Tensor | list | set):  # sets are refused later
        return entry
    return {**entry, "params": list(entry["params"])}


def _grouped(parameters: list[Any]) -> list[list[Tensor]]:
    """The parameters of each group, from what DeepSpeed makes optimizers of."""
    if not any(isinstance(entry, dict) for entry in parameters):
        return [[_parameter(entry) for entry in parameters]]
    groups = [entry["params"] for entry in parameters if isinstance(entry, dict)]
    return [[group] if isinstance(group, Tensor) else [_parameter(entry) for entry in group] for group in groups]


def _is_trained(parameter: Tensor) -> bool:
    """Whether DeepSpeed hands a parameter to an optimizer (`deepspeed.runtime.utils.is_optimized_parameter`)."""
    return parameter.requires_grad and math.prod(logical_shape(parameter)) > 0


def _by_name(engine: Any, parameters: list[Tensor]) -> dict[Tensor, str]:
    names = {parameter: canonical_name(name) for name, parameter in engine.module.named_parameters()}
    return {parameter: names.get(parameter, "a parameter that the model does not have") for parameter in parameters}


def _untrained(engine: Any, groups: list[list[Tensor]]) -> list[str]:
    """What of an optimizer's groups cannot be trained; DeepSpeed fails at it and names neither group nor parameter."""
    stage = engine.zero_optimization_stage()
    names = _by_name(engine, [parameter for group in groups for parameter in group])
    if not names or (stage and not any(map(_is_trained, names))):
        found = f"all {len(names)} parameters are frozen or without elements" if names else "there are no parameters"
        remedy = 'leave "optimizer" out of the JSON, and pass none'
        if stage in (1, 2):
            remedy += ", and set zero_optimization.stage to 0 or 3: DeepSpeed's stages 1 and 2 need an optimizer"
        return [f"nothing here is trained ({found}): {remedy}"]
    problems = []
    for index, group in enumerate(groups):
        if group and stage in (1, 2) and not any(map(_is_trained, group)):
            listed = ", ".join([names[parameter] for parameter in group[:3]] + ["..."] * (len(group) > 3))
            problems.append(
                f"parameter group {index} ({listed}) has nothing to train, which DeepSpeed cannot lay out at ZeRO "
                f"stage {stage}: leave the group out"
            )
    if stage == 3:
        problems += [
            f"{name} of shape {logical_shape(parameter)} has no elements, which DeepSpeed cannot gather at ZeRO stage "
            "3: take it out of the model, or use stage 1 or 2"
            for parameter, name in names.items()
            if parameter.requires_grad and not _is_trained(parameter)
        ]
    return problems


def option_problems(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the options that a whole DeepSpeed configuration gives to ``cls``."""
    no_decay = (config.get("ds_optim") or {}).get("no_decay")
    if no_decay is not None and not (isinstance(no_decay, list) and all(isinstance(p, str) for p in no_decay)):
        return [f'"no_decay" must be a list of name patterns, not {no_decay!r}']
    options = Settings.of(config).all_options(config)
    accepted = list(inspect.signature(cls).parameters)[1:]
    problems = [
        f"{cls.__name__} has no option {key!r}; its options: {', '.join(accepted)}"
        for key in options
        if key not in accepted
    ]
    auto = [key for key, value in options.items() if value == "auto"]
    if auto:
        problems.append(f'"auto" for {", ".join(auto)} is filled in by a Hugging Face Trainer only; give numbers')
    problems += _schedule_problems(cls, config)
    return problems + cls.setting_problems({key: value for key, value in options.items() if value != "auto"})


_TRAINERS_BETAS = (0.9, 0.999)  # the defaults of adam_beta1 and adam_beta2 in TrainingArguments


def _has_other_betas(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> bool:
    """Whether two betas that a Trainer fills in could displace the optimizer's own unseen."""
    own = inspect.signature(cls).parameters["betas"].default
    return cls.num_betas == 2 and tuple(own) != _TRAINERS_BETAS and "betas" not in Settings.of(config).options


def _own_betas(cls: type[ShardedOptimizer]) -> str:
    own = list(inspect.signature(cls).parameters["betas"].default)
    return (
        f'leave "betas" out of "optimizer.params" for its default {own}, or put "ds_optim": {{"betas": {own}}} into it'
    )


def _warn_of_trainers_betas(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> None:
    """By now "auto" is a number, and numbers must equal the Trainer's arguments: only equality with a default shows."""
    integration = sys.modules.get("transformers.integrations.deepspeed")
    trainers = integration.deepspeed_config() if integration is not None else None
    betas = (config["optimizer"].get("params") or {}).get("betas")
    if trainers is None or betas is None or tuple(betas) != _TRAINERS_BETAS or not _has_other_betas(cls, config):
        return
    warnings.warn(
        f'{cls.__name__} trains with betas {list(betas)}, the TrainingArguments\' defaults, which "auto" fills in: if '
        f"they are not meant, {_own_betas(cls)} in the JSON",
        stacklevel=2,
    )


_TRAINER_FILLS = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")  # of a schedule


def _schedule(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    scheduler = config.get("scheduler") or {}
    return str(scheduler.get("type", "")), dict(scheduler.get("params") or {})


def _schedule_problems(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> list[str]:
    """Why a JSON's ``scheduler`` cannot work with ``cls``."""
    name, params = _schedule(config)
    if name == "OneCycle" and params.get("cycle_momentum", True) and cls.num_betas != 2:
        return [
            f"OneCycle writes two betas into the groups, {cls.__name__} has {cls.num_betas}: "
            'set "cycle_momentum": false in "scheduler.params"'
        ]
    return []


def trainer_problems(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> list[str]:
    """What a Hugging Face Trainer's "auto" would make wrong in a whole DeepSpeed configuration."""
    problems = []
    betas = (config["optimizer"].get("params") or {}).get("betas")
    if betas == "auto" and cls.num_betas != 2 and "betas" not in Settings.of(config).options:
        own = list(inspect.signature(cls).parameters["betas"].default)
        problems.append(
            f'"betas": "auto": a Trainer fills in two, {cls.__name__} has {cls.num_betas}: '
            f'leave it out and write "ds_optim": {{"betas": {own}}}'
        )
    name, params = _schedule(config)
    made = getattr(lr_schedules, name, None) if name in lr_schedules.VALID_LR_SCHEDULES else None
    accepted = list(inspect.signature(made).parameters)[1:] if made is not None else list(params)
    problems += [
        f'{name} has no option {key!r} ("scheduler.params"); its options: {", ".join(accepted)}'
        for key in params
        if key not in accepted
    ]
    left = [key for key, value in params.items() if value == "auto" and key in accepted and key not in _TRAINER_FILLS]
    if left:
        problems.append(
            f'"auto" for {", ".join(left)} of {name}: a Trainer fills in {", ".join(_TRAINER_FILLS)} only; give values'
        )
    return problems


def notes(config: Mapping[str, Any]) -> list[str]:
    """What is no error in a whole DeepSpeed configuration, but trains with other numbers than it seems to."""
    optimizer = config.get("optimizer")
    cls = names().get(str(optimizer.get("type"))) if isinstance(optimizer, Mapping) else None
    if cls is None or not isinstance(optimizer, Mapping):
        return []
    found = []
    given = optimizer.get("params") or {}
    if given.get("betas") == "auto" and _has_other_betas(cls, config):
        found.append(
            f'"betas": "auto" gives {cls.__name__} the TrainingArguments\' adam_beta1 and adam_beta2, by default '
            f"{list(_TRAINERS_BETAS)}: {_own_betas(cls)}"
        )
    name, params = _schedule(config)
    lr = Settings.of(config).all_options(config).get("lr")
    if name in ("WarmupLR", "WarmupDecayLR"):
        highest = params.get("warmup_max_lr", 0.001 if name == "WarmupDecayLR" else lr)
        stated = "" if "warmup_max_lr" in params else ", its default"
        if highest not in ("auto", lr):
            found.append(
                f"{name} trains with its warmup_max_lr, {highest}{stated}, and not with the optimizer's lr"
                + (f", {lr}" if lr is not None else "")
                + ': set "warmup_max_lr" to the learning rate'
            )
    if name == "OneCycle" and params.get("cycle_momentum", True) and cls.num_betas == 2:
        found.append(
            f"OneCycle cycles the first beta between {params.get('cycle_min_mom', 0.8)} and "
            f"{params.get('cycle_max_mom', 0.9)} and sets the second to 0.99, whatever the optimizer was given: "
            '"cycle_momentum": false in "scheduler.params" keeps its betas'
        )
    return found


def _exempt(engine: Any, no_decay: tuple[str, ...] | None, roles: Mapping[str, Role]) -> tuple[set[Tensor], list[str]]:
    """The parameters without weight decay, and patterns that match none."""
    named = {canonical_name(name): parameter for name, parameter in engine.module.named_parameters()}
    problems = [
        f'"no_decay": {pattern!r} matches no parameter'
        for pattern in no_decay or ()
        if not exempt_names(named, roles, [pattern])
    ]
    return {named[name] for name in exempt_names(named, roles, no_decay)}, problems


def _roles(engine: Any, given: Any, inferred: Mapping[str, Role]) -> Mapping[str, Role]:
    """The role of every parameter of the engine's module: inferred, then overridden by what the user gave."""
    if given is None or isinstance(given, torch.nn.Module):
        return inferred
    shapes = {canonical_name(name): logical_shape(p) for name, p in engine.module.named_parameters()}
    return override_roles(inferred, given, shapes)


def _allow_cpu_offload(engine: Any) -> None:
    """DeepSpeed refuses client optimizers under CPU offload unless the user says otherwise: ours run natively there."""
    engine._config.zero_force_ds_cpu_optimizer = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A DeepSpeed setting under which an optimizer here could not be exact.

    Attributes:
        applies: judges a `deepspeed.runtime.config.DeepSpeedConfig` and an optimizer class.
        reason: what is wrong and what to change.
    """

    applies: Callable[[Any, type[ShardedOptimizer]], bool]
    reason: str


def _offload(config: Any, name: str, default: Any) -> Any:
    return getattr(config.zero_config.offload_optimizer, name, default)


REFUSALS = (
    Refusal(
        lambda config, _: getattr(config.zero_config, "zenflow", None) is not None,
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
        lambda config, _: config.expert_parallel_config.enabled,
        "expert_parallel (AutoEP) gives each rank experts of its own, which is not supported: remove it, and use the "
        "model's own (stacked) experts",
    ),
    Refusal(
        lambda config, _: config.compile_config.deepcompile and config.zero_enabled,
        "compile.deepcompile moves gradients past the hooks that tell an unused parameter from one with an old "
        "gradient: set it to false; engine.compile() works without it",
    ),
    Refusal(
        lambda config, cls: not cls.is_elementwise and config.tensor_parallel_config.autotp_size > 1,
        "an optimizer of blocks needs whole heads, rows and matrices, tensor parallelism (AutoTP) hands out slices "
        "of them: use AdamW, Lion or Adan, or set tensor_parallel.autotp_size to 1",
    ),
)


def refusals(config: Any, cls: type[ShardedOptimizer]) -> list[str]:
    """Every reason why ``cls`` could not be exact under a `DeepSpeedConfig`, each with its remedy."""
    return [refusal.reason for refusal in REFUSALS if refusal.applies(config, cls)]


def _engine_problems(engine: Any, cls: type[ShardedOptimizer], roles: Any, inferred: Mapping[str, Role]) -> list[str]:
    problems = refusals(engine._config, cls)
    if issubclass(cls, WholeMatrixOptimizer) and isinstance(engine.module, PipelineModule):
        problems.append(
            f"{cls.__name__} under a PipelineModule would depend on the number of stages, and stop one stage alone "
            "where a gradient is not finite: use ZeRO without pipeline parallelism"
        )
    problems += _sparse_problems(engine.module)
    if engine.has_moe_layers:
        problems.append("DeepSpeed's expert parallelism is not supported: use the model's own (stacked) experts")
    try:
        _roles(engine, roles, inferred)
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
        reasons = refusals(whole, named or AdamMini)
    if named is not None:
        reasons = [*option_problems(named, _without_auto(config)), *trainer_problems(named, config), *reasons]
    return named.__name__ if named else "", reasons


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _raise_on_all_ranks(engine: Any, problems: list[str]) -> None:
    """On all ranks of an engine: its stages have different layers, and none of them may wait for another."""
    subject = "ds_optim cannot run under this configuration, nothing was changed"
    raise_on_all_ranks(problems, subject, zero.ranks_of(engine))


_install()
