"""Who owns which block, and when its root is refreshed: decided from shapes, layouts and a cost model alone.

Longest first: a block goes to the rank that holds most of it while that rank is at most at its share, otherwise to the
rank that ends least loaded. "Loaded" is the worst of three: mean flops per step, bytes of state, and flops of the steps
that share the block's refresh residue, so that staggered refreshes make no spike on any rank. Pure arithmetic, the same
on every rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ds_optim.sharding.boxes import Box, Ints, elements_before
from ds_optim.sharding.layout import Layout, Replicated

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """What one block costs its owner.

    Attributes:
        step_flops: floating-point operations of every step.
        refresh_flops: those of a refresh, on top, in the steps that have one; 0 for a rule without.
        state_bytes: kept between steps.
    """

    step_flops: float
    refresh_flops: float = 0.0
    state_bytes: int = 0


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
    """Who holds a block's elements: ``ranks[i]`` holds ``[edges[i], edges[i + 1])`` of its row-major order.

    ``ranks`` is empty for a replicated parameter, which every rank holds.
    """

    ranks: Ints
    edges: Ints

    @property
    def counts(self) -> Ints:
        return np.diff(self.edges)


def holdings(layout: Layout, parameter: int, boxes: Sequence[Box]) -> list[Holding]:
    """Who holds the elements of each of these boxes of one parameter."""
    if isinstance(layout, Replicated):
        return [Holding(np.empty(0, np.int64), np.array([0, box.numel])) for box in boxes]
    spec = layout.parameters[parameter]
    positions = np.array([0, *layout.cuts(parameter), spec.numel], dtype=np.int64)
    first_rank = layout.first_rank(parameter)
    stride = spec.numel // spec.shape[0]
    found = []
    for box in boxes:
        # Only the stretch of positions around the box: a parameter of many slices has many boxes.
        low = max(int(np.searchsorted(positions, box.start[0] * stride, "right")) - 1, 0)
        high = int(np.searchsorted(positions, box.stop[0] * stride, "left")) + 1
        edges = elements_before(spec.shape, box, positions[low:high])
        some = np.flatnonzero(np.diff(edges))
        found.append(Holding(first_rank + low + some, np.append(edges[some], box.numel)))
    return found


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


def assign(blocks: Sequence[Block], held: Sequence[Holding], world_size: int, frequency: int) -> list[int]:
    """The owner of every block.

    Args:
        blocks: in an order that is the same on every rank.
        held: who holds each block's elements.
        world_size: ranks of the shard group.
        frequency: steps between two refreshes of a block; 1 for a rule without.
    """
    if world_size == 1 or not blocks:
        return [0] * len(blocks)
    residues = frequency if any(block.work.refresh_flops for block in blocks) else 1
    flops = np.array([block.work.step_flops + block.work.refresh_flops / residues for block in blocks])
    peaks = np.array([block.work.refresh_flops for block in blocks])
    state = np.array([float(block.work.state_bytes) for block in blocks])
    offsets = np.array([block.offset for block in blocks])
    # Shares: what every rank would have of each if nothing were lumpy. A share of 0 means that there is nothing to do.
    share_flops = flops.sum() / world_size
    share_state = state.sum() / world_size
    share_peak = np.array([peaks[offsets == residue].sum() for residue in range(residues)]) / world_size

    load_flops, load_state = np.zeros(world_size), np.zeros(world_size)
    load_peak = np.zeros((residues, world_size))
    owners = [0] * len(blocks)
    for block in sorted(range(len(blocks)), key=lambda index: (-flops[index], -state[index], index)):
        residue = offsets[block]
        after_flops = (load_flops + flops[block]) / share_flops
        after_state = (load_state + state[block]) / share_state if share_state else np.zeros(world_size)
        base = share_flops + share_peak[residue]
        after_peak = (load_flops + load_peak[residue] + flops[block] + peaks[block]) / base
        worst = np.maximum(np.maximum(after_flops, after_state), after_peak)
        owner = int(_best_holder(held[block], worst))
        if owner < 0:
            owner = int(np.lexsort((after_flops + after_state + after_peak, worst))[0])
        owners[block] = owner
        load_flops[owner] += flops[block]
        load_state[owner] += state[block]
        load_peak[residue, owner] += peaks[block]
    return owners


def _best_holder(held: Holding, load: Floats) -> int:
    """The rank that holds most of a block and would not exceed its share by owning it; -1 if there is none."""
    if not len(held.ranks):
        return -1
    counts = np.where(load[held.ranks] <= 1.0 + 1e-9, held.counts, 0)
    best = int(counts.argmax())
    return int(held.ranks[best]) if counts[best] else -1
