"""What a training will do, before it begins: the plan of a whole-matrix optimizer for any number of ranks.

The model is built on the meta device from its config, so that nothing but shapes and roles is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ds_optim.optimizers.whole_matrix import WholeMatrixOptimizer
from ds_optim.role import is_decay_exempt
from ds_optim.roles import canonical_name, infer_roles, logical_shape, override_roles
from ds_optim.sharding.layout import ParameterSpec
from ds_optim.sharding.plan import Plan
from ds_optim.sharding.predict import predicted_layouts


class EstimateError(ValueError):
    """What was asked for cannot be estimated; the message says why and what to give instead."""


def plans(
    model_config: Mapping[str, Any],
    deepspeed_config: Mapping[str, Any],
    optimizer: str | None,
    stage: int | None,
    ranks: Sequence[int],
) -> Iterator[tuple[Plan, dict[str, int], str]]:
    """One plan per number of ranks, with what `Plan.explain` must know of the exchange, and a title.

    Args:
        model_config: a transformers ``config.json``.
        deepspeed_config: a DeepSpeed JSON; its optimizer entry, ``ds_optim`` object and ZeRO stage are used.
        optimizer: a name of ours, which prevails over the JSON's.
        stage: ZeRO stage, which prevails over the JSON's; 2 if neither says.
        ranks: data-parallel ranks.

    Raises:
        EstimateError: no such optimizer, or one whose elements never travel.
        ValueError: options or roles that the optimizer refuses.
    """
    cls, options = _optimizer(deepspeed_config, optimizer)
    model = _meta_model(model_config)
    inferred = infer_roles(model)
    named = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    shapes = {name: logical_shape(parameter) for name, parameter in named.items()}
    given = options.pop("roles", None)
    roles = inferred if given is None else override_roles(inferred, given, shapes)
    exempt = [name for name in named if is_decay_exempt(roles[name])]
    groups = [[name for name in named if name not in exempt], exempt]
    made = cls(
        [{"params": [(name, named[name]) for name in group]} for group in groups if group], roles=roles, **options
    )
    zero = int(deepspeed_config.get("zero_optimization", {}).get("stage", 2)) if stage is None else stage
    specs = [[ParameterSpec(name, shapes[name]) for name in group] for group in groups]
    for world_size in ranks:
        plan = made.plan_over(predicted_layouts(specs, zero, world_size))
        exchange = {"bucket_size": made.exchange_bucket_size, "exchange_bytes": made.exchange_dtype.itemsize}
        yield plan, exchange, f"{cls.__name__}, ZeRO {zero}, {world_size} ranks"


def _optimizer(config: Mapping[str, Any], name: str | None) -> tuple[type[WholeMatrixOptimizer], dict[str, Any]]:
    from ds_optim.deepspeed_plugin import CLASSES, Settings, names, option_problems

    known = {**names(), **{cls.__name__: cls for cls in CLASSES}}
    asked = name or str((config.get("optimizer") or {}).get("type"))
    if asked not in known:
        raise EstimateError(f"{asked} is none of {', '.join(known)}: give --optimizer, or a JSON that names one")
    cls = known[asked]
    if not issubclass(cls, WholeMatrixOptimizer):
        raise EstimateError(
            f"{asked} exchanges nothing between ranks: there is nothing to plan. Ask for Shampoo or SWAN"
        )
    if name is not None:
        return cls, {}
    problems = option_problems(cls, config)
    if problems:
        raise EstimateError("; ".join(problems))
    return cls, Settings.of(config).all_options(config)


def _meta_model(config: Mapping[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in config:
        raise EstimateError(
            'the model config has no "model_type": it should be the config.json of a transformers model'
        )
    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(made)
    return model
