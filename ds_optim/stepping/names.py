"""What the parameters of an optimizer are called: without wrapper prefixes, from the user, the model, or made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_optim.roles import canonical_name

NAMES = "param_names"
"""In a state dict: the names of every group's parameters, a list or None for each group.

torch.optim puts them into the groups (and goes by position all the same). There
`torch.distributed.checkpoint.state_dict` repeats the list for every parameter of a flattened state dict, and cannot
load a full one into an optimizer without names, nor a flattened one that was saved without.
"""


class ParameterNames:
    """The names of the parameters in an optimizer's groups.

    Args:
        model: whose names parameters have that came without; anything else knows none.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._by_tensor: dict[Tensor, str] = {}
        self._made_up: set[str] = set()
        self._listed: list[list[str]] = []

    def __getitem__(self, tensor: Tensor) -> str:
        return self._by_tensor[tensor]

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._by_tensor

    def __len__(self) -> int:
        return len(self._by_tensor)

    def items(self) -> list[tuple[Tensor, str]]:
        """Every parameter and its name."""
        return list(self._by_tensor.items())

    def describe(self, tensor: Tensor) -> str:
        """A parameter's name, for a message."""
        return self._by_tensor.get(tensor, f"a parameter of shape {tuple(tensor.shape)}")

    def enter(self, entries: Sequence[Any]) -> list[str]:
        """Name what is to become a group; what is wrong with the names, as sentences.

        Args:
            entries: parameters or ``(name, parameter)`` pairs; what is no tensor is left to torch.
        """
        problems = []
        known_names = self._names_in_model()
        for entry in entries:
            name, parameter = entry if isinstance(entry, tuple) else (None, entry)
            if not isinstance(parameter, Tensor):
                continue  # torch says so better
            known = canonical_name(name) if name else known_names.get(parameter, "")
            if not known:
                known = f"parameter {len(self._by_tensor)}"
                self._made_up.add(known)
            if known in self._by_tensor.values() and parameter not in self._by_tensor:
                problems.append(f"two parameters are called {known}: give them different names")
            self._by_tensor[parameter] = known
        return problems

    def close_group(self, parameters: Sequence[Tensor]) -> None:
        """Remember the order of a group that was added."""
        self._listed.append([self._by_tensor[parameter] for parameter in parameters])

    def _names_in_model(self) -> dict[Tensor, str]:
        """What parameters without a name are called: as in the model, if that was given as ``roles``."""
        if not isinstance(self._model, torch.nn.Module):
            return {}
        named = self._model.named_parameters(remove_duplicate=False)
        return {parameter: canonical_name(name) for name, parameter in reversed(list(named))}

    def follow_replaced(self, optimizer: torch.optim.Optimizer) -> bool:
        """Give parameters that took the places of others since the groups were made their names.

        Accelerate builds the optimizer before `fully_shard` and then replaces the parameters in its groups.

        Returns:
            Whether there were any.

        Raises:
            RuntimeError: they cannot be told apart, or state belongs to the parameters that were replaced.
        """
        groups = optimizer.param_groups
        if all(tensor in self._by_tensor for group in groups for tensor in group["params"]):
            return False
        names: dict[Tensor, str] = {}
        for group, listed in zip(groups, self._listed, strict=False):
            if len(group["params"]) == len(listed):
                names.update(zip(group["params"], listed, strict=True))
        given = {tensor for group in groups for tensor in group["params"]}
        lost = [tensor for tensor in optimizer.state if tensor not in given]
        if names.keys() != given or lost:
            raise RuntimeError(
                f"{type(optimizer).__name__}: parameters in its groups were replaced "
                + ("after it had state for them" if lost else "by another number of parameters")
                + ": wrap the model (fully_shard, Accelerate) before the first step or load, or make a new optimizer"
            )
        self._by_tensor = names
        return True

    def in_group(self, index: int, tensors: Sequence[Tensor], known: list[str] | None) -> list[str] | None:
        """What the parameters of a group are called in the model; None if not all of them have such a name.

        Args:
            index: of the group.
            tensors: in it.
            known: their names, where an engine says what is in it.
        """
        if known is not None:
            names = known
        elif all(tensor in self._by_tensor for tensor in tensors):
            names = [self._by_tensor[tensor] for tensor in tensors]
        else:  # others have taken their places
            names = list(self._listed[index]) if index < len(self._listed) else []
        is_complete = bool(names) and len(names) == len(tensors)
        return names if is_complete and not self._made_up.intersection(names) else None

    def saved(self, groups: Sequence[Mapping[str, Any]]) -> tuple[list[str], set[str]]:
        """What `restore` needs beside the groups, for pickle."""
        return [self._by_tensor[tensor] for group in groups for tensor in group["params"]], self._made_up

    def restore(self, saved: tuple[list[str], set[str]], groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `saved` gave, for the copies of the groups' parameters."""
        names, made_up = saved
        tensors = [tensor for group in groups for tensor in group["params"]]
        self._by_tensor, self._made_up = dict(zip(tensors, names, strict=True)), set(made_up)
        self._listed = [[self._by_tensor[tensor] for tensor in group["params"]] for group in groups]


def saved_names(state_dict: Mapping[str, Any]) -> list[list[str] | None]:
    """For every group of a state dict, ours or torch's, its parameters' names; None where none can be compared.

    Where parameters have names for keys, `torch.distributed.checkpoint.state_dict` has put the keys in order already,
    and other lists as they were saved.
    """
    groups, ours = state_dict["param_groups"], state_dict.get(NAMES) or ()
    found: list[list[str] | None] = []
    for index, group in enumerate(groups):
        listed = group.get(NAMES) or (ours[index] if len(ours) == len(groups) else None) or ()
        names = [canonical_name(name) for name in listed if isinstance(name, str)]
        unique = len(set(names)) == len(listed) == len(group["params"])
        known = unique and names and not any(isinstance(key, str) for key in group["params"])
        found.append(names if known else None)
    return found
