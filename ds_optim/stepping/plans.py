"""Who owns which block of a whole-matrix rule: the plans of every shard group over the tensors of some shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from ds_optim.errors import raise_all
from ds_optim.roles import warn_unclaimed
from ds_optim.roles.role import Role
from ds_optim.rule import Settings, WholeMatrix
from ds_optim.sharding.assignment import Tile
from ds_optim.sharding.layout import Layout
from ds_optim.sharding.plan import Plan, make_plans
from ds_optim.stepping.eight_bits import kept_of_block
from ds_optim.stepping.shards import Shards


class _Made(NamedTuple):
    listed: list[Plan]
    places: dict[Tensor, tuple[Plan, int]]
    matrices: dict[Tensor, frozenset[int]]


class Plans:
    """The plans of a whole-matrix rule, made at the first need and again when other tensors are trained.

    Args:
        rule: whose blocks.
        settings: the optimizer's defaults and ``state_dtype``.
        shards: whose tensors; those that are frozen have no place in a plan.

    Attributes:
        generation: goes up whenever plans are dropped: what was derived from them is void.
    """

    def __init__(self, rule: WholeMatrix, settings: Settings, shards: Shards) -> None:
        self._rule, self._settings, self._shards = rule, settings, shards
        self._generation_of_shards = shards.generation
        self._warned_of = -1
        self._plans: _Made | None = None
        self.state_of_block = partial(kept_of_block, partial(rule.state_of_block, settings))
        self.generation = 0

    def at_rank(self, shards: Shards) -> Plans:
        """The same for shards that stand for another rank's: a plan is every rank's."""
        made, others = self._made(), Plans(self._rule, self._settings, shards)
        places = {new: made.places[old] for old, new in zip(self._shards.tensors, shards.tensors, strict=True)}
        matrices = {new: made.matrices[old] for old, new in zip(self._shards.tensors, shards.tensors, strict=True)}
        others._plans = _Made(made.listed, places, matrices)
        return others

    @property
    def listed(self) -> list[Plan]:
        """One for every shard group and kind of layout."""
        return self._made().listed

    def _made(self) -> _Made:
        if self._generation_of_shards != self._shards.generation:
            self._generation_of_shards = self._shards.generation
            self.forget()
        if self._plans is None:
            tensors = self._shards.tensors
            bounds = [self._shards.of(tensor) for tensor in tensors]
            shapes, roles = self._shards.shapes, self._shards.roles
            if self._warned_of != self._shards.generation:
                self._warned_of = self._shards.generation
                consequence = "takes them for single (out, in) matrices, not for embeddings"
                warn_unclaimed({name: roles[name] for name in shapes}, shapes, _is_understood, consequence)
            made = self._over([(bound.layout, bound.owner_group, bound.replicas) for bound in bounds])
            places = {tensors[member]: (plan, index) for plan, members in made for index, member in enumerate(members)}
            matrices = {
                tensor: frozenset(plan.blocks[block].parameter for block in plan.of_tensor(index))
                for tensor, (plan, index) in places.items()
            }
            self._plans = _Made([plan for plan, _ in made], places, matrices)
        return self._plans

    def forget(self) -> None:
        """Drop the plans: they are made anew at the next need."""
        self._plans = None
        self.generation += 1

    def _over(
        self, layouts: Sequence[tuple[Layout, dist.ProcessGroup | None, int]]
    ) -> list[tuple[Plan, tuple[int, ...]]]:
        roles = self._shards.roles
        here = {spec.name: (spec.shape, roles[spec.name]) for layout, _, _ in layouts for spec in layout.parameters}
        tiles, problems = dict[str, list[Tile]](), []
        for name, (shape, role) in {**self._shards.elsewhere.parameters, **here}.items():
            try:
                tiles[name] = self._rule.tiles(self._settings, role, shape)
            except ValueError as error:
                problems.append(f"{name}: {error}")
        raise_all(problems, "these parameters cannot be cut into matrices as the settings ask")
        stateless = not self.state_of_block((1, 1))  # of the rule, not of these parameters: others may join
        work, refresh = partial(self._rule.work, self._settings), self._rule.refresh(self._settings)
        elsewhere = {name: tiles[name] for name in self._shards.elsewhere.parameters}
        return make_plans(layouts, tiles, work, refresh.frequency, refresh.is_staggered, stateless, elsewhere)

    def place_of(self, tensor: Tensor) -> tuple[Plan, int]:
        """The plan of a tensor's shard group, and the tensor's index there.

        Raises:
            ValueError: the tensor is frozen.
        """
        self._shards.of(tensor)  # refuses a tensor that an engine made later
        if tensor not in self._made().places:  # it was frozen until now
            self.forget()
        found = self._made().places.get(tensor)
        if found is None:
            raise ValueError(
                f"{self._shards.describe(tensor)} is frozen (requires_grad is False) and nobody owns its blocks: "
                "unfreeze it first, or leave its state out of what is loaded"
            )
        return found

    def matrices_of(self, tensor: Tensor) -> frozenset[int]:
        """The parameters of a tensor that are made of blocks, as indices into its layout."""
        self.place_of(tensor)
        return self._made().matrices[tensor]

    def owned(self, tensor: Tensor) -> list[int]:
        """The blocks of a local tensor that this rank owns, in the order of their state."""
        plan, index = self.place_of(tensor)
        return plan.owned(index, self._shards.rank_of_owner(tensor))

    def digests(self) -> dict[dist.ProcessGroup | None, str]:
        """Of the plans over the tensors of each shard group that are trained now; the same on every rank of the group
        exactly if the plans are."""
        if any(tensor not in self._made().places for tensor in self._shards.tensors):
            self.forget()
        found: dict[dist.ProcessGroup | None, dict[str, None]] = {}
        for tensor, (plan, _) in self._made().places.items():
            found.setdefault(self._shards.of(tensor).group, {})[plan.digest] = None
        return {group: "".join(digests) for group, digests in found.items()}

    def in_words(self, tensor: Tensor) -> list[str]:
        """The blocks of every parameter of a local tensor; equal words mean equal blocks."""
        plan, index = self.place_of(tensor)
        tiles: dict[int, list[tuple[int, Tile]]] = {}
        for block in plan.of_tensor(index):
            one = plan.blocks[block]
            tiles.setdefault(one.parameter, []).append((one.index, one.tile))
        words = []
        for parameter in range(len(plan.layouts[index].parameters)):
            listed = [tile for _, tile in sorted(tiles.get(parameter, []), key=lambda entry: entry[0])]
            if listed:
                largest = "x".join(str(size) for size in max(tile.shape for tile in listed))
                hashed = hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
                words.append(f"{len(listed)} of at most {largest} (hash {hashed})")
            else:
                words.append("no matrix: Adam")
        return words


def _is_understood(role: Role) -> bool:
    return role.kind != "other" and not (role.kind == "fused" and not role.parts)
