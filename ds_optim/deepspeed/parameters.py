"""What DeepSpeed makes optimizers of: parameters, ``(name, parameter)`` pairs, or groups of either."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ds_optim.deepspeed.model_parts import is_apart, names_in, shapes_in
from ds_optim.deepspeed.reader import ranks_of
from ds_optim.roles import logical_shape
from ds_optim.roles.overrides import override_roles
from ds_optim.roles.role import Role

T = TypeVar("T")


def parameter_of(entry: Any) -> Tensor:
    """The parameter itself, of a pair too."""
    found: Tensor = entry[1] if isinstance(entry, tuple) else entry
    return found


def listed(entry: Any) -> Any:
    """A group whose parameters can be read more than once; anything else as it is."""
    if not isinstance(entry, dict) or isinstance(entry["params"], Tensor | list | set):  # sets are refused later
        return entry
    return {**entry, "params": list(entry["params"])}


def grouped(parameters: list[Any]) -> list[list[Tensor]]:
    """The parameters of each group, from what DeepSpeed makes optimizers of."""
    if not any(isinstance(entry, dict) for entry in parameters):
        return [[parameter_of(entry) for entry in parameters]]
    groups = [entry["params"] for entry in parameters if isinstance(entry, dict)]
    return [[group] if isinstance(group, Tensor) else [parameter_of(entry) for entry in group] for group in groups]


def is_trained(parameter: Tensor) -> bool:
    """Whether DeepSpeed hands a parameter to an optimizer (`deepspeed.runtime.utils.is_optimized_parameter`)."""
    return parameter.requires_grad and math.prod(logical_shape(parameter)) > 0


def names_of(engine: Any, parameters: list[Tensor]) -> dict[Tensor, str]:
    """What an engine's model calls each of these parameters."""
    names = names_in(engine.module)
    return {parameter: names.get(parameter, "a parameter that the model does not have") for parameter in parameters}


def roles_of(engine: Any, given: Any, inferred: Mapping[str, Role]) -> Mapping[str, Role]:
    """The role of every parameter of the engine's module: inferred, then overridden by what the user gave.

    Where ranks have different parameters a collective: patterns are meant for the whole model.

    Raises:
        ValueError: see `ds_optim.roles.override_roles`.
    """
    if given is None or isinstance(given, torch.nn.Module):
        return inferred
    whole = shapes_in(engine.module)
    mine = {name: (whole[parameter], inferred[name]) for parameter, name in names_in(engine.module).items()}
    everyones = {**anywhere(engine, mine), **mine}
    roles = {name: role for name, (_, role) in everyones.items()}
    found = override_roles(roles, given, {name: shape for name, (shape, _) in everyones.items()})
    return {name: found[name] for name in mine}


def anywhere(engine: Any, mine: Mapping[str, T]) -> dict[str, T]:
    """What all ranks of an engine have, by parameters' names: a collective where they have different ones."""
    return ranks_of(engine).union(mine) if is_apart(engine) else dict(mine)
