"""Who owns which block, and when its root is refreshed: decided from shapes, layouts and a cost model alone.

Longest first: of the ranks that hold something of a block and would stay within their share, the one that holds most
gets it; if there is none, the rank that ends least loaded. Afterwards the worst ranks exchange blocks with the least
loaded ones. "Loaded" means the worst of mean flops per step, bytes of state, and flops of the steps that share a
refresh residue, so that staggered refreshes make no spike on any rank. Pure arithmetic, the same on every rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ds_optim.sharding.boxes import Box, Ints, elements_before, within
from ds_optim.sharding.layout import Layout, Replicated

Floats = NDArray[np.float64]

_EVEN = 1.03  # of a fair share: good enough
_EXCHANGES = 2000  # tries to get there
_PARTNERS = 8  # ranks to exchange blocks with, the least loaded first


@dataclass(frozen=True, slots=True)
class Work:
    """What one block costs its owner.

    Attributes:
        step_flops: floating-point operations of every step.
        refresh_flops: those of a refresh, on top, in the steps that have one; 0 for a rule without.
        state_bytes: kept between steps.
        balanced_bytes: what state is shared out by where that is not `state_bytes`. A checkpoint in DeepSpeed's form
            has state where its owner was: a rule that comes to keep a block in fewer bytes must not give it to others.
    """

    step_flops: float
    refresh_flops: float = 0.0
    state_bytes: int = 0
    balanced_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of a parameter and the shape in which a rule sees it (same elements, row-major)."""

    box: Box
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a binding.

    Attributes:
        tensor: index of the local tensor that holds its parameter.
        parameter: index of the parameter in that tensor's layout.
        index: of the block within its parameter.
        tile: its elements.
        work: its costs.
        offset: its refreshes fall on steps t with ``(t + offset) % frequency == 0``.
    """

    tensor: int
    parameter: int
    index: int
    tile: Tile
    work: Work
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds a block's elements: ``ranks[i]`` holds ``[edges[i], edges[i + 1])`` of them in the order of the wire.

    That is the block's row-major order; of a block that several parts of its parameter share, what lies in the first
    part comes before what lies in the next, each row-major. ``ranks`` is empty for a replicated parameter, which every
    rank holds.
    """

    ranks: Ints
    edges: Ints

    @property
    def counts(self) -> Ints:
        return np.diff(self.edges)

    @property
    def totals(self) -> tuple[Ints, Ints]:
        """The holders, each once, and how many elements each has; nobody of a replicated parameter."""
        if len(self.ranks) < 2:
            return self.ranks, self.counts[: len(self.ranks)]
        ranks, index = np.unique(self.ranks, return_inverse=True)
        return ranks, np.bincount(index, weights=self.counts).astype(np.int64)

    @property
    def most(self) -> int:
        """Elements that one rank has at most."""
        return int((self.counts if len(self.ranks) < 2 else self.totals[1]).max())

    def everywhere(self, replicas: int, shards: int) -> tuple[Ints, Ints]:
        """The holders and their elements in all replicas of a shard group of ``shards`` ranks."""
        ranks, counts = self.totals
        first = np.arange(replicas).repeat(len(ranks)) * shards
        return first + np.tile(ranks, replicas), np.tile(counts, replicas)


class HeldParts:
    """The parts of one parameter, and who holds them.

    Args:
        layout: of the local tensor that holds it.
        parameter: its index there.
    """

    def __init__(self, layout: Layout, parameter: int) -> None:
        self.boxes = list(layout.parts(parameter))
        self._starts = np.array([box.start for box in self.boxes], dtype=np.int64)
        self._stops = np.array([box.stop for box in self.boxes], dtype=np.int64)
        self._shares = [
            (np.array(edges, dtype=np.int64), np.array(ranks, dtype=np.int64))
            for edges, ranks in layout.shares(parameter)
        ]

    def of(self, box: Box) -> list[tuple[int, Box]]:
        """What of a box of the parameter lies in each part, in the parts' order: part, and what they have in common."""
        if len(self.boxes) == 1:
            return [(0, box)]
        low, high = np.maximum(self._starts, box.start), np.minimum(self._stops, box.stop)
        found = np.flatnonzero((low < high).all(axis=1)).tolist()
        return [(part, Box(tuple(low[part].tolist()), tuple(high[part].tolist()))) for part in found]

    def holding(self, box: Box) -> Holding:
        """Who holds the elements of a box."""
        ranks, edges, before = list[Ints](), list[Ints](), 0
        for part, common in self.of(box):
            of_part, (positions, holders) = self.boxes[part], self._shares[part]
            if len(holders) == 1:
                ranks.append(holders)
                edges.append(np.array([before]))
            else:
                inside = within(common, of_part)
                # Only the stretch of positions around the box: a parameter of many slices has many boxes.
                stride = math.prod(of_part.shape[1:])
                low = max(int(np.searchsorted(positions, inside.start[0] * stride, "right")) - 1, 0)
                high = int(np.searchsorted(positions, inside.stop[0] * stride, "left")) + 1
                counted = elements_before(of_part.shape, inside, positions[low:high])
                some = np.flatnonzero(np.diff(counted))
                ranks.append(holders[low + some])
                edges.append(before + counted[some])
            before += common.numel
        return Holding(np.concatenate(ranks), np.concatenate([*edges, [box.numel]]))


def holdings(layout: Layout, parameter: int, boxes: Sequence[Box]) -> list[Holding]:
    """Who holds the elements of each of these boxes of one parameter."""
    if isinstance(layout, Replicated):
        return [Holding(np.empty(0, np.int64), np.array([0, box.numel])) for box in boxes]
    parts = HeldParts(layout, parameter)
    return [parts.holding(box) for box in boxes]


def stagger(keys: Sequence[tuple[str, int]], works: Sequence[Work], frequency: int) -> list[int]:
    """The refresh offset of every block: each residue gets the same share of the work, whatever the number of ranks.

    Args:
        keys: (parameter name, block index) of every block, which order blocks of equal work.
        works: their costs.
        frequency: steps between two refreshes of a block.
    """
    order = sorted(range(len(keys)), key=lambda block: (-works[block].refresh_flops, keys[block]))
    residues = [(0.0, offset) for offset in range(frequency)]
    offsets = [0] * len(keys)
    for block in order:
        load, offset = heapq.heappop(residues)
        offsets[block] = offset
        heapq.heappush(residues, (load + works[block].refresh_flops, offset))
    return offsets


def assign(
    blocks: Sequence[Block], held: Sequence[Holding], world_size: int, frequency: int, replicas: int = 1
) -> list[int]:
    """The owner of every block.

    Args:
        blocks: in an order that is the same on every rank.
        held: who holds each block's elements in one shard group.
        world_size: ranks of all shard groups.
        frequency: steps between two refreshes of a block; 1 for a rule without.
        replicas: shard groups that hold the same.
    """
    if world_size == 1 or not blocks:
        return [0] * len(blocks)
    burden = _burdens([block.work for block in blocks], [block.offset for block in blocks], frequency, world_size)
    loads = np.zeros((burden.shape[1], world_size))
    owners = np.zeros(len(blocks), dtype=np.int64)
    most = [one.most for one in held]  # of equal blocks, those that lie on one rank choose first
    for block in sorted(range(len(blocks)), key=lambda i: (-burden[i, 0], -burden[i, 1], -most[i], i)):
        rows = [0, 1, 2 + blocks[block].offset % frequency]
        after = loads[rows] + burden[block, rows][:, None]
        worst = after.max(axis=0)
        owner = _best_holder(held[block].everywhere(replicas, world_size // replicas), worst)
        if owner < 0:
            owner = int(np.lexsort((after.sum(axis=0), worst))[0])
        owners[block] = owner
        loads[:, owner] += burden[block]
    _even_out(burden, owners, loads)
    return owners.tolist()  # type: ignore[no-any-return]


def _burdens(works: Sequence[Work], offsets: Sequence[int], frequency: int, world_size: int) -> Floats:
    """(blocks, 2 + frequency): every block's part of mean flops, of state, and of the flops of each residue's steps.

    In units of a rank's fair share, so that a rank's worst sum tells how far it is from it. A share of nothing is 0.
    """
    steady = np.array([work.step_flops for work in works])
    refresh = np.array([work.refresh_flops for work in works])
    burden = np.zeros((len(works), 2 + frequency))
    burden[:, 0] = steady + refresh / frequency
    burden[:, 1] = [work.balanced_bytes or work.state_bytes for work in works]
    burden[:, 2:] = steady[:, None]
    burden[np.arange(len(works)), 2 + np.array(offsets) % frequency] += refresh
    shares = burden.sum(axis=0) / world_size
    return burden / np.where(shares > 0, shares, 1.0)


def _best_holder(holders: tuple[Ints, Ints], load: Floats) -> int:
    """The rank that holds most of a block and would not exceed its share by owning it; -1 if there is none."""
    ranks, held = holders
    if not len(ranks):
        return -1
    counts = np.where(load[ranks] <= 1.0 + 1e-9, held, 0)
    best = int(counts.argmax())
    return int(ranks[best]) if counts[best] else -1


def _even_out(burden: Floats, owners: Ints, loads: Floats) -> None:
    """Exchange blocks of the worst rank, or move them, while that makes the worse of two ranks better. In place."""
    stuck: set[int] = set()
    for _ in range(_EXCHANGES):
        worst = loads.max(axis=0)
        worst[list(stuck)] = 0
        rank = int(worst.argmax())
        if worst[rank] <= _EVEN:
            return
        row = int(loads[:, rank].argmax())
        mine = np.flatnonzero(owners == rank)
        for other in np.argsort(loads[row], kind="stable")[:_PARTNERS].tolist():
            if other == rank:
                continue
            theirs = np.append(np.flatnonzero(owners == other), -1)  # -1: nothing comes back
            back = np.vstack([burden[theirs[:-1]], np.zeros_like(burden[:1])])
            change = back[None, :, :] - burden[mine][:, None, :]
            after = np.maximum((loads[:, rank] + change).max(axis=2), (loads[:, other] - change).max(axis=2))
            best = int(after.argmin())
            if after.flat[best] < worst[rank] - 1e-6:
                give, take = np.unravel_index(best, after.shape)
                owners[mine[give]] = other
                if theirs[take] >= 0:
                    owners[theirs[take]] = rank
                loads[:, rank] += change[give, take]
                loads[:, other] -= change[give, take]
                stuck.clear()
                break
        else:
            stuck.add(rank)
            if len(stuck) >= _PARTNERS:
                return
