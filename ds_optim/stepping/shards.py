"""What the tensors that an optimizer steps hold: the names, roles and fragments of the parameters in them.

Made in one of three ways, which are all the same to a step: from what a strategy's reader found (`Shards`), from
parameters as they are (`ParameterShards`), or from layouts of a training that need not exist (`Shards.predicted`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.roles import logical_shape, resolve_roles
from ds_optim.roles.role import Role
from ds_optim.sharding import dtensor
from ds_optim.sharding.binding import Binding, BoundTensor
from ds_optim.sharding.layout import Layout, ParameterSpec, Replicated
from ds_optim.stepping.names import ParameterNames


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the ranks of an engine step besides this one's tensors.

    Attributes:
        parameters: shape and role of every parameter that any rank steps, by name; none where all step the same.
        axes: the groups whose product the engine's ranks are, where some have no part in another's shard group.
        steps: how often the engine has stepped, see `ds_optim.sharding.binding.Binding`.
    """

    parameters: Mapping[str, tuple[tuple[int, ...], Role]] = field(default_factory=dict)
    axes: tuple[dist.ProcessGroup, ...] = ()
    steps: Callable[[], int] | None = None

    @classmethod
    def of(cls, binding: Binding, roles: Mapping[str, Role]) -> Elsewhere:
        """Asked of all ranks of an engine: a collective.

        Args:
            roles: of this rank's parameters, by name.
        """
        sizes = [bound.layout.world_size * bound.replicas for bound in binding.tensors.values()]
        if not binding.is_apart:
            return cls({}, binding.ranks.axes if min(sizes, default=0) < binding.ranks.size else (), binding.steps)
        mine = {
            spec.name: (spec.shape, roles[spec.name])
            for bound in binding.tensors.values()
            for spec in bound.layout.parameters
            if spec.name in roles
        }
        return cls(binding.ranks.union(mine), binding.ranks.axes, binding.steps)


class Shards:
    """The local tensors of a strategy.

    Args:
        tensors: every local tensor and what it holds, in the order in which all ranks step them.
        roles: of every parameter, by name.
        elsewhere: what other ranks of an engine step.
    """

    def __init__(
        self,
        tensors: Mapping[Tensor, BoundTensor],
        roles: Mapping[str, Role],
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self._roles = dict(roles)
        self.elsewhere = elsewhere or Elsewhere()
        self.generation = 0
        """Goes up when tensors or roles are others than before: what was derived from them is void."""

    @classmethod
    def predicted(
        cls, layouts: Sequence[Layout], rank: int, roles: Mapping[str, Role], elsewhere: Elsewhere | None = None
    ) -> Shards:
        """The tensors of one rank of a strategy, on the meta device; nothing is allocated.

        Args:
            layouts: of the local tensors.
            rank: in the shard group.
            roles: of every parameter, by name.
            elsewhere: what other ranks step.
        """
        return cls(
            {
                torch.empty(
                    layout.parameter.shape if isinstance(layout, Replicated) else layout.local_numel(0), device="meta"
                ): BoundTensor(layout, rank)
                for layout in layouts
            },
            roles,
            elsewhere,
        )

    @property
    def is_bound(self) -> bool:
        """Whether a strategy's tensors are stepped, in the place of parameters."""
        return bool(self._tensors)

    def always_steps(self, tensor: Tensor) -> bool:
        """Whether no gradient is a zero gradient, as inside an engine."""
        return tensor in self._tensors

    def at_rank(self, rank: int) -> Shards:
        """What stands for the same tensors on another rank."""
        tensors = {}
        for tensor, bound in self._tensors.items():
            if not isinstance(bound.layout, Replicated) and bound.layout.local_numel(rank) != tensor.numel():
                tensor = tensor.new_empty(bound.layout.local_numel(rank))  # slices may be uneven
            tensors[tensor] = replace(bound, rank=rank)
        return Shards(tensors, self._roles, self.elsewhere)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are trained, in an order that all ranks share."""
        return list(self._tensors)

    @property
    def roles(self) -> Mapping[str, Role]:
        """Of every parameter, by name."""
        return self._roles

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The logical shape of every parameter, by name."""
        return {spec.name: spec.shape for bound in self._tensors.values() for spec in bound.layout.parameters}

    def of(self, tensor: Tensor) -> BoundTensor:
        """What a local tensor holds.

        Raises:
            RuntimeError: it was not there when these shards were made.
        """
        if tensor not in self._tensors:
            raise RuntimeError(
                "the engine stepped a tensor that was not there when the optimizer was bound; "
                "build a new engine after changing the model or its parameter groups"
            )
        return self._tensors[tensor]

    def parameters_of(self, tensor: Tensor) -> Sequence[ParameterSpec]:
        """The parameters in a local tensor."""
        return self.of(tensor).layout.parameters

    def whole(self, tensors: Sequence[Tensor]) -> list[str] | None:
        """The names of those that a strategy holds whole, one parameter each; None where there is no strategy."""
        layouts = [self._tensors[tensor].layout for tensor in tensors if tensor in self._tensors]
        return [layout.parameter.name for layout in layouts if isinstance(layout, Replicated)]

    @property
    def axes(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups along which all ranks hear of what happens to some, where one shard group has not all of them."""
        return self.elsewhere.axes

    def rank_of_owner(self, tensor: Tensor) -> int:
        """This process's rank among the owners of blocks (a replicated tensor of an engine is bound with rank 0)."""
        bound = self.of(tensor)
        return bound.rank if bound.owner_group is None else dist.get_rank(bound.owner_group)

    def describe(self, tensor: Tensor) -> str:
        """The names of the first parameters in a local tensor, for a message."""
        return ", ".join(spec.name for spec in self.of(tensor).layout.parameters[:3])


class ParameterShards(Shards):
    """The parameters of an optimizer without an engine: whole ones, DTensors, or replicas under DDP.

    Args:
        optimizer: whose groups they are in; it is referred to weakly.
        names: of the parameters.
        roles_given: what roles are found from at the first need, see `ds_optim.roles.resolve_roles`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: ParameterNames, roles_given: Any) -> None:
        super().__init__({}, {})
        self._optimizer = weakref.ref(optimizer)
        self._names, self._roles_given = names, roles_given
        self._replicas: dict[Tensor, dist.ProcessGroup] | None = None

    @property
    def is_bound(self) -> bool:
        return False

    def always_steps(self, tensor: Tensor) -> bool:
        return False

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are not frozen, or were not when they got state."""
        optimizer = self._optimizer()
        assert optimizer is not None
        given = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        return [t for t in given if t.requires_grad or t.grad is not None or t in optimizer.state]

    @property
    def roles(self) -> Mapping[str, Role]:
        """Of every parameter, by name.

        Raises:
            ValueError: what was given cannot be the roles of these parameters.
        """
        if not self._roles:
            self._roles = resolve_roles(self._roles_given, self.shapes, dict(self._names.items()))
        return self._roles

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The logical shape of every parameter, by name."""
        return {name: logical_shape(parameter) for parameter, name in self._names.items()}

    def of(self, tensor: Tensor) -> BoundTensor:
        found = self._tensors.get(tensor)
        if found is None:
            self.follow_replaced()
            if self._replicas is None:
                self._replicas = dtensor.replicas_of(self._roles_given)
            found = self._tensors[tensor] = dtensor.read(self._names[tensor], tensor, self._replicas.get(tensor))
        return found

    def whole(self, tensors: Sequence[Tensor]) -> list[str] | None:
        return None

    @property
    def axes(self) -> tuple[dist.ProcessGroup, ...]:
        groups = dict.fromkeys(self.of(tensor).owner_group for tensor in self.tensors)
        found = tuple(group for group in groups if group is not None)
        members = {tuple(sorted(dist.get_process_group_ranks(group))) for group in found}
        return found if len(members) > 1 else ()

    def describe(self, tensor: Tensor) -> str:
        return self._names.describe(tensor)

    def follow_replaced(self) -> None:
        """Find everything anew if other parameters took the places of these in the groups.

        Raises:
            RuntimeError: see `ParameterNames.follow_replaced`.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        if self._names.follow_replaced(optimizer):
            self._tensors.clear()
            self._replicas = None
            self.expect_others()

    def expect_others(self) -> None:
        """Find roles anew: parameters have joined."""
        self._roles = {}
        self.generation += 1
