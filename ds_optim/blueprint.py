"""The blueprint of a training: a model on the meta device, its roles, an optimizer over it. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_optim.deepspeed.configuration import DsOptimObject, option_problems
from ds_optim.deepspeed.names import names
from ds_optim.known_transformers import tied
from ds_optim.optimizers.registry import optimizers
from ds_optim.releases import TRANSFORMERS
from ds_optim.roles import canonical_name, decayed_then_exempt, exempt_names, shapes_and_roles
from ds_optim.roles.role import Role
from ds_optim.sharding.layout import ParameterSpec
from ds_optim.stepping.sharded import ShardedOptimizer


class BlueprintError(ValueError):
    """What was asked for cannot be predicted; the message says why and what to give instead."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model and an optimizer over it.

    Attributes:
        optimizer: over meta parameters; decay-exempt ones are a group of their own, as the plugin makes it.
        groups: the parameters of each group, in order, by name and logical shape.
        roles: of every parameter.
        options: what the optimizer was made with.
    """

    optimizer: ShardedOptimizer
    groups: Sequence[Sequence[ParameterSpec]]
    roles: Mapping[str, Role]
    options: Mapping[str, Any]

    @property
    def specs(self) -> list[ParameterSpec]:
        """Every parameter, each once, in the order of the groups."""
        return [spec for group in self.groups for spec in group]

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return sum(spec.numel for spec in self.specs)


def blueprint(
    model: nn.Module, deepspeed_config: Mapping[str, Any], optimizer: str | None, settings: Mapping[str, Any]
) -> Blueprint:
    """The optimizer that a JSON or a name asks for, over a model on the meta device.

    Args:
        model: see `meta_model`.
        deepspeed_config: a DeepSpeed JSON; its optimizer entry and ``ds_optim`` object are used.
        optimizer: a name of ours, with its defaults, which prevails over the JSON's.
        settings: further settings, which prevail over all others.

    Raises:
        BlueprintError: no such optimizer, or options that the plugin refuses.
        ValueError: options or roles that the optimizer refuses.
    """
    cls, options = _optimizer(deepspeed_config, optimizer)
    options.update(settings)
    named = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    shapes, roles = shapes_and_roles(model, options.pop("roles", None))
    patterns = (deepspeed_config.get("ds_optim") or {}).get("no_decay") if optimizer is None else None
    exempt = set(exempt_names(named, roles, patterns))
    groups = [group for group in decayed_then_exempt(named, exempt.__contains__) if group]
    made = cls([{"params": [(name, named[name]) for name in group]} for group in groups], roles=roles, **options)
    return Blueprint(made, [[ParameterSpec(name, shapes[name]) for name in group] for group in groups], roles, options)


def meta_model(config: Mapping[str, Any]) -> nn.Module:
    """A causal language model of transformers, made from its ``config.json`` on the meta device.

    Raises:
        BlueprintError: no ``model_type``, one that transformers does not know, or values that it refuses; or this
            transformers is outside of the range that works.
    """
    problem = TRANSFORMERS.problem(TRANSFORMERS.installed)
    if problem:
        raise BlueprintError(problem)
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in config:
        raise BlueprintError(
            'the model config has no "model_type": it should be the config.json of a transformers model'
        )
    try:
        made = AutoConfig.for_model(**config)
        with torch.device("meta"):
            return tied(AutoModelForCausalLM.from_config(made))
    except Exception as error:  # validators of its own kinds, and whatever a model's constructor does
        said = " ".join(str(error).split())[:200]
        raise BlueprintError(
            f"transformers cannot make a causal language model of type {config['model_type']!r} from this: {said}"
        ) from error


def _optimizer(config: Mapping[str, Any], name: str | None) -> tuple[type[ShardedOptimizer], dict[str, Any]]:
    known = {**names(), **optimizers()}
    lowered = {key.lower(): key for key in known}
    asked = str(name or (config.get("optimizer") or {}).get("type"))
    asked = lowered.get(asked.lower().replace("_", ""), asked) if name else asked
    if asked == "None":
        raise BlueprintError(f"no optimizer was named: give --optimizer ({', '.join(optimizers())})")
    if asked not in known:
        raise BlueprintError(f"{asked} is none of {', '.join(known)}: give --optimizer, or a JSON that names one")
    cls = known[asked]
    if name is not None:
        return cls, {}
    problems = option_problems(cls, config)
    if problems:
        raise BlueprintError("; ".join(problems))
    return cls, DsOptimObject.of(config).all_options(config)
