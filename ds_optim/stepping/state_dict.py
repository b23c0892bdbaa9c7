"""An optimizer's state dict: by name where names are known, state in the dtype it was saved in, and judged first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.stepping.mesh_state import from_mesh, to_mesh
from ds_optim.stepping.names import NAMES, saved_names
from ds_optim.stepping.stepper import Stepper, other_structure

BLOCKS_OF_GROUP = "blocks"
"""In a state dict's parameter groups: a hash of what their state is kept for, since sizes alone cannot tell roles."""


class StateDictForm:
    """How the state of an optimizer's groups looks in a state dict.

    Args:
        owner: the optimizer's name, for messages.
        groups: its parameter groups.
        names: what the parameters of every group are called in the model; None where not all have such a name.
        replaced: groups whose parameters took the places of others, by index.
        stepper: of the optimizer.
        has_blocks: whether state is kept for blocks.
    """

    def __init__(
        self,
        owner: str,
        groups: Sequence[Mapping[str, Any]],
        names: Sequence[list[str] | None],
        replaced: frozenset[int],
        stepper: Stepper,
        has_blocks: bool,
    ) -> None:
        self._owner, self._groups, self._names, self._replaced = owner, groups, names, replaced
        self._stepper, self._has_blocks = stepper, has_blocks

    def keyed(self, state_dict: Mapping[str, Any]) -> list[tuple[Any, Tensor]]:
        """The tensors of the groups, each with its key in a state dict; torch judges whether their numbers agree."""
        tensors = [tensor for group in self._groups for tensor in group["params"]]
        keys = [key for group in self.ordered(state_dict) for key in group]
        return list(zip(keys, tensors, strict=False))

    def ordered(self, state_dict: Mapping[str, Any]) -> list[list[Any]]:
        """The keys of every saved group in the order of the group here: by name if both have names, else as saved."""
        found = []
        for index, (saved, there) in enumerate(zip(state_dict["param_groups"], saved_names(state_dict), strict=True)):
            here = self._names[index] if index < len(self._names) else None
            keys: list[Any] = saved["params"]
            if here is not None and there is not None and set(here) == set(there):
                by_name = dict(zip(there, keys, strict=True))
                keys = [by_name[name] for name in here]
            found.append(keys)
        return found

    # -- saving -----------------------------------------------------------------------------------------------------

    def complete(self, found: dict[str, Any]) -> dict[str, Any]:
        """What torch made of the optimizer, with state of blocks as others can take it over: a collective."""
        keyed = self.keyed(found)
        to_mesh(self._stepper, keyed, found)
        if any(self._names):
            found[NAMES] = list(self._names)
        if self._has_blocks:
            for group, kept in zip(found["param_groups"], self._kept_blocks(found), strict=True):
                group[BLOCKS_OF_GROUP] = kept
        for key, tensor in keyed:
            if key in found["state"]:
                found["state"][key] = self._stepper.kept.gathered(tensor, found["state"][key])
        return found

    def _kept_blocks(self, state_dict: Mapping[str, Any]) -> list[str]:
        """For every parameter group a hash of the blocks of those of its parameters that have state in a state dict."""
        found = []
        tensors = dict(self.keyed(state_dict))
        for group in state_dict["param_groups"]:
            words = [
                (spec.name, text)
                for key in group["params"]
                if key in tensors and state_dict["state"].get(key)
                for spec, text in zip(
                    self._stepper.shards.parameters_of(tensors[key]),
                    self._stepper.blocks_in_words(tensors[key]),
                    strict=True,
                )
            ]
            found.append(hashlib.sha256(repr(sorted(words)).encode()).hexdigest()[:16])
        return found

    # -- loading ----------------------------------------------------------------------------------------------------

    def of_this_rank(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict with this rank's state alone where every owner's was gathered."""
        states = dict(state_dict["state"])
        for key, tensor in self.keyed(state_dict):
            if states.get(key):
                states[key] = self._stepper.kept.mine_of(tensor, states[key])
        return {**state_dict, "state": states}

    def from_mesh(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of this rank with its own blocks of DTensors: a collective."""
        return from_mesh(self._stepper, self.keyed(state_dict), state_dict)

    def keeping_dtypes(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict whose tensors torch's loader leaves alone, in the order of the groups; see `release`."""
        kept = {
            key: {name: _Kept(value) if isinstance(value, Tensor) else value for name, value in state.items()}
            for key, state in state_dict["state"].items()
        }
        groups = [
            {**{k: v for k, v in saved.items() if k not in (BLOCKS_OF_GROUP, NAMES)}, "params": keys}
            for saved, keys in zip(state_dict["param_groups"], self.ordered(state_dict), strict=True)
        ]
        return {**state_dict, "state": kept, "param_groups": groups}

    # -- judging ----------------------------------------------------------------------------------------------------

    def problems(self, state_dict: Mapping[str, Any]) -> list[str]:
        """What in a state dict cannot be this optimizer's, as sentences: other keys, other shapes, other blocks."""
        state_dict = self.of_this_rank(state_dict)
        problems = self._name_problems(state_dict)
        if problems:
            problems.append(f"(state goes by name; without {NAMES!r} it would go by position)")
        else:
            for key, tensor in self.keyed(state_dict):
                state = state_dict["state"].get(key)
                if state:
                    problems += self._problems_of(tensor, state)
            if not problems and self._has_blocks:
                problems += self._block_problems(state_dict)
        here = self._stepper.structure()
        for group in state_dict["param_groups"]:
            problems += [
                f"{key} was {group[key]!r} and is {here[key]!r} here: the state belongs to other blocks or "
                "another schedule"
                for key in other_structure(self._stepper, group)
            ]
        if problems:
            return list(dict.fromkeys(problems))
        return [
            f"the state of {self._stepper.shards.describe(tensor)} holds another rank's blocks, or of other "
            "blocks: load this rank's own file with the roles and sizes it was saved with, or use "
            "ds_optim.checkpoint, which takes any number of ranks"
            for key, tensor in self.keyed(state_dict)
            if self._stepper.kept.is_anothers(tensor, state_dict["state"].get(key, {}))
        ]

    def _name_problems(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Parameters that a state dict has and its group here has not, or the other way round; none without names."""
        problems: list[str] = []
        if len(state_dict["param_groups"]) != len(self._groups):
            return problems  # torch says so
        for index, there in enumerate(saved_names(state_dict)):
            here = self._names[index]
            if here is None or there is None:
                continue
            known, saved = set(here), set(there)
            problems += [
                f"{name} is in its group {index}, not in the optimizer's" for name in there if name not in known
            ]
            problems += [
                f"{name} is not in its group {index}, but in the optimizer's" for name in here if name not in saved
            ]
            if not problems and here != there and index in self._replaced:
                problems.append(
                    f"the parameters of group {index} are in another order, by which DeepSpeed loads its fp32 masters: "
                    "make the model as it was, or use ds_optim.checkpoint, which goes by name"
                )
        return problems

    def _problems_of(self, tensor: Tensor, state: Mapping[str, Any]) -> list[str]:
        """What of a tensor's saved state has other keys or another shape."""
        spec = self._stepper.spec(tensor)
        if set(state) != {"step", *spec}:
            return [f"the state has {sorted(state)}, {self._owner} keeps {sorted({'step', *spec})}"]
        problems = []
        for name, (shape, _) in spec.items():
            found = tuple(state[name].shape)
            if isinstance(tensor, DTensor) and name in self._stepper.element_state and found == tuple(tensor.shape):
                if not isinstance(state[name], DTensor):
                    problems.append(
                        f"{name} of {self._stepper.shards.describe(tensor)} is whole, its parameter is sharded: load "
                        "it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict with "
                        "StateDictOptions(full_state_dict=True)"
                    )
            elif math.prod(found) != math.prod(shape):
                why = "" if shape == tuple(tensor.shape) else " (saved with other roles or another number of ranks)"
                problems.append(
                    f"{name} of a tensor of shape {tuple(tensor.shape)} has {math.prod(found)} values, not "
                    f"{math.prod(shape)}{why}"
                )
            elif found != shape:
                problems.append(f"{name} has shape {found}, its parameter {tuple(tensor.shape)}")
        return problems

    def _block_problems(self, state_dict: Mapping[str, Any]) -> list[str]:
        problems = []
        pairs = zip(state_dict["param_groups"], self._kept_blocks(state_dict), strict=True)
        for index, (group, here) in enumerate(pairs):
            saved = group.get(BLOCKS_OF_GROUP, here)
            if saved != here:
                problems.append(
                    f"the parameters of group {index} were cut into other blocks (hash {saved}, {here} here): "
                    "other roles, another block size, or other names"
                )
        return problems


class _Kept:
    """A tensor that torch's loader must leave alone: neither a tensor, nor a mapping, nor iterable."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def release(optimizer: torch.optim.Optimizer) -> None:
    """Put the tensors of `StateDictForm.keeping_dtypes` into the optimizer's state, on its tensors' devices."""
    for tensor, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, _Kept):
                device = value.tensor.device if name == "step" else tensor.device
                state[name] = value.tensor.detach().to(device, copy=True)
