"""When each block travels: buckets of bounded size, the same on every rank, and this rank's part in them.

All ranks compute all buckets' membership, since a collective needs everyone; the tables of pieces are made for one rank
only. On the wire a piece is what one rank holds of one block, in the block's row-major order. A bucket's way back has
the layout of its way in, so both use the same tables and the same buffers. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_optim.sharding.assignment import Block, Holding
from ds_optim.sharding.boxes import Rectangle, rectangles, strides_of
from ds_optim.sharding.layout import Layout

BUCKET_SIZE = 1 << 24
"""Default ``exchange_bucket_size``, elements: 64 MiB of fp32 per buffer."""

_IN_FLIGHT = 5
"""Buffers that are alive at once: a bucket on its way in (2), one being computed (1), one on its way back (2). They
share what the contract allows for two buckets to send and two to receive."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What this rank holds of one block.

    Attributes:
        tensor: index of the local tensor.
        parameter: index of the parameter in its layout.
        rectangles: where it lies in the local tensor, in the block's row-major order; offsets are the local tensor's.
        strides: the parameter's, for `torch.as_strided`.
        numel: elements.
        start: where it begins in the block (own blocks) or in the buffer that carries it (others' blocks).
        owner: the rank that owns the block.
    """

    tensor: int
    parameter: int
    rectangles: tuple[Rectangle, ...]
    strides: tuple[int, ...]
    numel: int
    start: int
    owner: int


@dataclass(frozen=True, slots=True)
class Segment:
    """What another rank holds of one of this rank's blocks: a range of the owner's buffer and of the block."""

    buffer_start: int
    block_start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Owned:
    """One of this rank's blocks in a bucket: what it holds itself, and what others send."""

    block: int
    numel: int
    local: Piece | None
    remote: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """This rank's part in one exchange.

    Attributes:
        owned: blocks to compute, in the order of their state.
        others: what this rank holds of other ranks' blocks, in wire order.
        from_ranks: elements that each rank sends here for `owned`, and gets back.
        to_ranks: elements that this rank sends to each rank for `others`, and gets back.
        shares: elements of the blocks that each rank owns in this bucket.
        travels: whether any rank sends anything; the same on every rank.
        gathered: of replicated parameters, whether one all-gather of equal shares carries the updates; otherwise every
            owner broadcasts its own in turn. ``start`` of others' pieces counts from the message that carries them.
    """

    owned: tuple[Owned, ...]
    others: tuple[Piece, ...]
    from_ranks: tuple[int, ...]
    to_ranks: tuple[int, ...]
    shares: tuple[int, ...]
    travels: bool
    gathered: bool = False

    @property
    def numel(self) -> int:
        """Elements of the owned blocks."""
        return sum(one.numel for one in self.owned)


def message_size(bucket_size: int) -> int:
    """Elements that one of the buffers in flight may have."""
    return bucket_size * 4 // _IN_FLIGHT


def buckets(
    blocks: Sequence[Block],
    held: Sequence[Holding],
    queues: Sequence[Sequence[int]],
    world_size: int,
    bucket_size: int,
    replicated: bool,
) -> list[list[int]]:
    """Every bucket as a list of blocks, in the order in which each owner computes its own.

    Args:
        blocks: all blocks of the plan.
        held: who holds each.
        queues: per rank, the blocks that it owns among those to be stepped, in the order of their state.
        world_size: ranks of the shard group.
        bucket_size: elements. No rank sends, receives or computes more than a fifth of four buckets at a time, or than
            the largest block: every owner must be able to work on one at the same time.
        replicated: all ranks hold everything: only updates travel, gathered by all.
    """
    largest = max((blocks[block].tile.box.numel for queue in queues for block in queue), default=0)
    limit = max(message_size(bucket_size) // (world_size if replicated else 1), largest)
    made: list[list[int]] = []
    cursors = [0] * world_size
    left = sum(len(queue) for queue in queues)
    while left:
        bucket: list[int] = []
        sent, received, computed = (np.zeros(world_size, dtype=np.int64) for _ in range(3))
        open_ranks = [rank for rank in range(world_size) if cursors[rank] < len(queues[rank])]
        while open_ranks:
            still_open = []
            for rank in open_ranks:
                block = queues[rank][cursors[rank]]
                numel = blocks[block].tile.box.numel
                ranks = held[block].ranks  # none if replicated
                counts = held[block].counts[: len(ranks)]
                remote = ranks != rank
                fits = (
                    computed[rank] + numel <= limit
                    and received[rank] + counts[remote].sum() <= limit
                    and not (sent[ranks[remote]] + counts[remote] > limit).any()
                )
                if bucket and not fits:
                    continue
                bucket.append(block)
                computed[rank] += numel
                received[rank] += counts[remote].sum()
                sent[ranks[remote]] += counts[remote]
                cursors[rank] += 1
                left -= 1
                if cursors[rank] < len(queues[rank]):
                    still_open.append(rank)
            open_ranks = still_open
        made.append(bucket)
    return made


class Tables:
    """Makes one rank's part of buckets.

    Args:
        rank: of this process in the shard group.
        layouts: of every local tensor, by the blocks' ``tensor``.
        replicated: all ranks hold everything.
        bucket_size: as in `buckets`.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        held: Sequence[Holding],
        owners: Sequence[int],
        layouts: Sequence[Layout],
        rank: int,
        world_size: int,
        replicated: bool,
        bucket_size: int,
    ) -> None:
        self._blocks, self._held, self._owners, self._layouts = blocks, held, owners, layouts
        self._rank, self._world_size, self._replicated = rank, world_size, replicated
        self._message_size = message_size(bucket_size)
        self._fragments = [{found.parameter: found for found in layout.fragments(rank)} for layout in layouts]

    def bucket(self, members: Sequence[int]) -> Bucket:
        """This rank's part in the bucket of these blocks."""
        by_owner: list[list[int]] = [[] for _ in range(self._world_size)]
        for block in members:
            by_owner[self._owners[block]].append(block)
        shares = tuple(sum(self._blocks[block].tile.box.numel for block in mine) for mine in by_owner)
        width = max(shares)
        gathered = self._replicated and width * self._world_size <= self._message_size

        to_ranks, others, start = [0] * self._world_size, [], 0
        for owner, theirs in enumerate(by_owner):
            if owner == self._rank:
                continue
            if self._replicated:
                start = owner * width if gathered else 0
            for block in theirs:
                piece = self._piece(block, start)
                if piece is not None:
                    others.append(piece)
                    start += piece.numel
                    to_ranks[owner] += 0 if self._replicated else piece.numel
        owned, from_ranks = self._owned(by_owner[self._rank])
        travels = self._replicated or any((self._held[block].ranks != self._owners[block]).any() for block in members)
        return Bucket(
            owned, tuple(others), from_ranks, tuple(to_ranks), shares, travels and self._world_size > 1, gathered
        )

    def _owned(self, mine: Sequence[int]) -> tuple[tuple[Owned, ...], tuple[int, ...]]:
        """This rank's own blocks, and how many elements each rank sends for them."""
        from_ranks = [0] * self._world_size
        sources = (
            [] if self._replicated else [(block, *entry) for block in mine for entry in _entries(self._held[block])]
        )
        for _, source, _, count in sources:
            from_ranks[source] += count if source != self._rank else 0
        cursors = [sum(from_ranks[:source]) for source in range(self._world_size)]
        remote: dict[int, list[Segment]] = {block: [] for block in mine}
        begins = dict.fromkeys(mine, 0)
        for block, source, edge, count in sources:
            if source == self._rank:
                begins[block] = edge
            else:
                remote[block].append(Segment(cursors[source], edge, count))
                cursors[source] += count
        owned = [
            Owned(block, self._blocks[block].tile.box.numel, self._piece(block, begins[block]), tuple(remote[block]))
            for block in mine
        ]
        return tuple(owned), tuple(from_ranks)

    def _piece(self, block: int, start: int) -> Piece | None:
        """What this rank holds of a block, if anything."""
        one = self._blocks[block]
        fragment = self._fragments[one.tensor].get(one.parameter)
        if fragment is None:
            return None
        shape = self._layouts[one.tensor].parameters[one.parameter].shape
        shift = fragment.offset - fragment.start
        found = tuple(
            Rectangle(rectangle.offset + shift, rectangle.shape)
            for rectangle in rectangles(shape, one.tile.box, fragment.start, fragment.stop)
        )
        if not found:
            return None
        strides = strides_of(shape)
        return Piece(
            one.tensor,
            one.parameter,
            found,
            strides,
            sum(rectangle.numel for rectangle in found),
            start,
            self._owners[block],
        )


def _entries(held: Holding) -> list[tuple[int, int, int]]:
    """(rank, where its elements begin in the block, how many) of every holder, in the block's order."""
    return list(zip(held.ranks.tolist(), held.edges[:-1].tolist(), held.counts.tolist(), strict=True))
