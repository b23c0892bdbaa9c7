"""The plan of a whole-matrix rule over one shard group: every block, who holds it, who owns it, when it is refreshed.

Made from layouts and shapes alone, so that one process can plan for 1,024 ranks before any training. `Plan.explain`
says what every rank will do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ds_optim.sharding.assignment import Block, Floats, Holding, Tile, Work, assign, holdings, stagger
from ds_optim.sharding.layout import Layout, Replicated
from ds_optim.sharding.schedule import BUCKET_SIZE, Bucket, BucketTables, buckets
from ds_optim.sharding.tensor_parallel import TensorParallel

_SHOWN_RANKS = 16


@dataclass(frozen=True)
class Plan:
    """Every block of one shard group.

    Attributes:
        layouts: of the local tensors.
        blocks: tensor by tensor, parameter by parameter.
        held: who holds each block.
        owners: the rank that computes each block and keeps its state.
        world_size: ranks of the group and of its replicas.
        frequency: steps between two refreshes of a block; 1 for a rule without.
        stateless: the rule keeps nothing between steps.
        replicas: shard groups that hold the same, one behind the other in the ranks' order (HSDP).
    """

    layouts: tuple[Layout, ...]
    blocks: tuple[Block, ...]
    held: tuple[Holding, ...]
    owners: tuple[int, ...]
    world_size: int
    frequency: int
    stateless: bool
    replicas: int = 1

    @property
    def replicated(self) -> bool:
        """Whether every rank holds every parameter, as at ZeRO-0."""
        return all(isinstance(layout, Replicated) for layout in self.layouts)

    @cached_property
    def digest(self) -> str:
        """A hash that is the same on every rank exactly if the plans are."""
        entries = [(block.tensor, block.parameter, block.tile, block.offset) for block in self.blocks]
        return hashlib.sha256(repr((entries, self.owners, self.world_size)).encode()).hexdigest()

    def name(self, block: int) -> str:
        """What a user calls a block."""
        one = self.blocks[block]
        spec = self.layouts[one.tensor].parameters[one.parameter]
        ranges = ", ".join(f"{start}:{stop}" for start, stop in zip(one.tile.box.start, one.tile.box.stop, strict=True))
        return f"{spec.name}, block {one.index} [{ranges}]"

    def of_tensor(self, tensor: int) -> list[int]:
        """The blocks of a local tensor's parameters in the order of their state: equal shapes together, by offset."""
        return self._by_tensor.get(tensor, [])

    @cached_property
    def _by_tensor(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for index, block in enumerate(self.blocks):
            found.setdefault(block.tensor, []).append(index)
        return {tensor: sorted(indices, key=self._state_order) for tensor, indices in found.items()}

    def _state_order(self, block: int) -> tuple[tuple[int, ...], int, int, int]:
        one = self.blocks[block]
        return one.tile.shape, -one.offset % self.frequency, one.parameter, one.index

    def owned(self, tensor: int, rank: int) -> list[int]:
        """The blocks of a local tensor's parameters that ``rank`` owns, in the order of their state."""
        return [block for block in self.of_tensor(tensor) if self.owners[block] == rank]

    def schedule(self, tensors: Sequence[int], rank: int, bucket_size: int) -> list[Bucket]:
        """The buckets of a step over these local tensors, as ``rank`` sees them.

        Args:
            tensors: indices, in the order in which every rank steps them.
            bucket_size: elements, see `ds_optim.sharding.schedule.buckets`.
        """
        made = self._buckets(tensors, bucket_size)
        tables = BucketTables(
            self.blocks,
            self.held,
            self.owners,
            self.layouts,
            rank,
            self.world_size,
            self.replicas,
            self.replicated,
            bucket_size,
        )
        return [tables.bucket(members) for members in made]

    def _buckets(self, tensors: Iterable[int], bucket_size: int) -> list[list[int]]:
        """The blocks of every bucket of a step over these local tensors."""
        queues: list[list[int]] = [[] for _ in range(self.world_size)]
        for tensor in tensors:
            for block in self.of_tensor(tensor):
                queues[self.owners[block]].append(block)
        if self.stateless:  # nothing ties a block to its tensor: equal shapes of all tensors go together
            for queue in queues:
                queue.sort(key=self._state_order)
        return buckets(self.blocks, self.held, queues, self.world_size, self.replicas, bucket_size, self.replicated)

    def waiting(self, bucket_size: int) -> float:
        """How much longer a step's arithmetic takes than a fair share of it, since ranks wait for each other.

        A bucket takes as long as its busiest owner, and only neighbouring buckets overlap: here none do. 1 is best.
        """
        flops = np.array([block.work.step_flops + block.work.refresh_flops / self.frequency for block in self.blocks])
        if not flops.any():
            return 1.0
        longest = 0.0
        for members in self._buckets(range(len(self.layouts)), bucket_size):
            owners = np.array([self.owners[block] for block in members])
            longest += float(np.bincount(owners, weights=flops[members]).max())
        return longest / (float(flops.sum()) / self.world_size)

    # -- what it costs ----------------------------------------------------------------------------------------------

    def _sum_by_owner(self, values: Sequence[float]) -> Floats:
        if not self.blocks:
            return np.zeros(self.world_size)
        return np.bincount(self.owners, weights=values, minlength=self.world_size).astype(np.float64)

    @cached_property
    def costs(self) -> Costs:
        """What every rank does in a step."""
        works = [block.work for block in self.blocks]
        received, sent = np.zeros(self.world_size), np.zeros(self.world_size)
        straddling = 0
        shards = self.world_size // self.replicas
        for block, held, owner in zip(self.blocks, self.held, self.owners, strict=True):
            numel = block.tile.box.numel
            if not len(held.ranks):  # replicated: the owner's update goes to everybody
                sent[owner] += numel * (self.world_size - 1)
                received += numel
                received[owner] -= numel
                continue
            holders, held_by = held.totals
            for ranks, counts, to, by in (
                (holders + owner // shards * shards, held_by, received, sent),
                (*held.everywhere(self.replicas, shards), sent, received),
            ):
                remote = ranks != owner
                to[owner] += counts[remote].sum()
                np.add.at(by, ranks[remote], counts[remote])
            straddling += (self.replicas + 1) * numel - 2 * held.most
        refreshes = np.zeros((self.frequency, self.world_size))
        for block, owner in zip(self.blocks, self.owners, strict=True):
            refreshes[block.offset, owner] += block.work.refresh_flops
        steady = self._sum_by_owner([work.step_flops for work in works])
        return Costs(
            blocks=self._sum_by_owner([1.0] * len(works)),
            flops=steady + refreshes.mean(axis=0),
            worst_step=_imbalance_of_steps(steady, refreshes),
            state_bytes=self._sum_by_owner([float(work.state_bytes) for work in works]),
            sent=sent,
            received=received,
            straddling=straddling,
            matrix_elements=sum(block.tile.box.numel for block in self.blocks),
        )

    def _label(self, rank: int) -> str:
        """A rank, and where it stands in a mesh of tensor or expert parallelism."""
        places = {one.axis: one.places for one in self.layouts if isinstance(one, TensorParallel)}
        return " ".join([str(rank), *(f"{axis}{its[rank][0]}" for axis, its in places.items())])

    def explain(self, *, bucket_size: int = BUCKET_SIZE, exchange_bytes: int = 4, all_ranks: bool = False) -> str:
        """A table of what each rank computes, keeps and moves per step, before any training.

        Args:
            bucket_size: elements, the optimizer's ``exchange_bucket_size``.
            exchange_bytes: bytes per element that travels (4 for fp32, 2 for bf16).
            all_ranks: every rank's line, however many there are.
        """
        costs = self.costs
        width = max(6, *(len(self._label(rank)) for rank in (0, self.world_size - 1)))
        lines = [
            f"{len(self.blocks)} blocks of {costs.matrix_elements / 1e6:.2f} M elements over {self.world_size} ranks"
            + (f", roots refreshed every {self.frequency} steps" if self.frequency > 1 else ""),
            f"{'rank':>{width}} {'blocks':>8} {'GFLOP/step':>12} {'state MB':>10} {'sent MB':>9} {'received MB':>12}",
        ]
        shown = range(self.world_size)
        if not all_ranks and self.world_size > _SHOWN_RANKS:
            shown = range(_SHOWN_RANKS)

        def row(label: str, pick: Callable[[Floats], float]) -> str:
            return (
                f"{label:>{width}} {pick(costs.blocks):8.0f} {pick(costs.flops) / 1e9:12.3f} "
                f"{pick(costs.state_bytes) / 1e6:10.2f} {pick(costs.sent) * exchange_bytes / 1e6:9.2f} "
                f"{pick(costs.received) * exchange_bytes / 1e6:12.2f}"
            )

        lines += [row(self._label(rank), lambda values, rank=rank: float(values[rank])) for rank in shown]  # type: ignore[misc]
        if len(shown) < self.world_size:
            lines.append(f"{'...':>{width}} ({self.world_size - len(shown)} more)")
        lines += [row("mean", lambda values: float(values.mean())), row("max", lambda values: float(values.max()))]
        lines.append(
            f"imbalance (max/mean): flops {imbalance(costs.flops):.3f}, worst step {costs.worst_step:.3f}, "
            f"state {imbalance(costs.state_bytes):.3f}; with waiting for buckets {self.waiting(bucket_size):.3f}"
        )
        idle = int((costs.blocks == 0).sum())
        if not self.blocks:
            lines.append("no matrices: every parameter is stepped by Adam where it lies")
        elif idle:
            lines.append(f"{idle} of {self.world_size} ranks own nothing and wait: blocks are too few or too unequal")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Costs:
    """What every rank does in a step; arrays have one entry per rank.

    Attributes:
        blocks: owned.
        flops: mean per step.
        worst_step: over all residues of the refresh schedule, the largest max/mean of the ranks' flops in that step.
        state_bytes: of owned blocks.
        sent: elements, both ways.
        received: elements, both ways.
        straddling: elements, both ways and over all ranks, that would travel if every block were owned by the rank that
            holds most of it: what cannot be avoided; the rest is what balancing moves.
        matrix_elements: of all blocks.
    """

    blocks: Floats
    flops: Floats
    worst_step: float
    state_bytes: Floats
    sent: Floats
    received: Floats
    straddling: int
    matrix_elements: int

    @property
    def floor(self) -> float:
        """Elements, in and out, that each rank moves on average where every parameter is cut into equal slices."""
        ranks = len(self.blocks)
        return 2 * (ranks - 1) / ranks * self.matrix_elements / ranks


def imbalance(values: Floats) -> float:
    """Largest over mean; 1 where there is nothing."""
    return float(values.max() / values.mean()) if values.any() else 1.0


def _imbalance_of_steps(steady: Floats, refreshes: Floats) -> float:
    return max((imbalance(steady + of_step) for of_step in refreshes), default=1.0)


def make_plans(
    layouts: Sequence[tuple[Layout, object, int]],
    tiles: Mapping[str, Sequence[Tile]],
    work: Callable[[tuple[int, ...]], Work],
    frequency: int,
    staggered: bool,
    stateless: bool,
    elsewhere: Mapping[str, Sequence[Tile]] | None = None,
) -> list[tuple[Plan, tuple[int, ...]]]:
    """One plan per shard group and kind of layout, sharded or replicated, in the order of their first tensors.

    Args:
        layouts: of every local tensor, in an order that all ranks share; what tells its shard group; its replicas.
        tiles: the blocks of every parameter, by name; parameters without any are not matrices.
        work: the costs of a block of a shape.
        frequency: steps between two refreshes of a block.
        staggered: blocks refresh in different steps; otherwise all together.
        stateless: see `Plan`.
        elsewhere: the blocks of what other ranks step, by name: when one refreshes depends on all that there are.

    Returns:
        Each plan, and for each of its tensors the index into ``layouts``.
    """
    listed = [
        (tensor, parameter, index, tile)
        for tensor, (layout, _, _) in enumerate(layouts)
        for parameter, spec in enumerate(layout.parameters)
        for index, tile in enumerate(tiles[spec.name])
    ]
    costs = {shape: work(shape) for shape in {tile.shape for *_, tile in listed}}
    works = [costs[tile.shape] for *_, tile in listed]
    keys = [(layouts[tensor][0].parameters[parameter].name, index) for tensor, parameter, index, _ in listed]
    others = {(name, i): work(tile.shape) for name, its in (elsewhere or {}).items() for i, tile in enumerate(its)}
    every = {**others, **dict(zip(keys, works, strict=True))}
    residues = stagger(list(every), list(every.values()), frequency) if staggered else [0] * len(every)
    offsets = dict(zip(every, residues, strict=True))

    plans = []
    kinds = [(group, replicas, isinstance(layout, Replicated)) for layout, group, replicas in layouts]
    for kind in dict.fromkeys(kinds):  # what every rank holds travels otherwise than shards do
        replicas = kind[1]
        members = tuple(index for index, its in enumerate(kinds) if its == kind)
        position = {tensor: place for place, tensor in enumerate(members)}
        of_group = tuple(layouts[tensor][0] for tensor in members)
        blocks = tuple(
            Block(position[tensor], parameter, index, tile, cost, offsets[key])
            for (tensor, parameter, index, tile), cost, key in zip(listed, works, keys, strict=True)
            if tensor in position
        )
        held = [
            found
            for layout in of_group
            for parameter, spec in enumerate(layout.parameters)
            for found in holdings(layout, parameter, [tile.box for tile in tiles[spec.name]])
        ]
        world_size = of_group[0].world_size * replicas
        owners = assign(blocks, held, world_size, frequency, replicas)
        plan = Plan(of_group, blocks, tuple(held), tuple(owners), world_size, frequency, stateless, replicas)
        plans.append((plan, members))
    return plans
