"""When each block travels: buckets of bounded size, the same on every rank, and this rank's part in them.

All ranks compute all buckets' membership, since a collective needs everyone; the tables of pieces are made for one rank
only. On the wire a piece is what one rank holds of one block, row-major. A bucket's way back has the layout of its way
in, unless there are replicas of the shard group: gradients come from the owner's own, updates go to all of them. Pure
arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ds_optim.sharding.assignment import Block, HeldParts, Holding
from ds_optim.sharding.boxes import Rectangle, elements_before, placed, shared, strides_of, within
from ds_optim.sharding.layout import Fragment, Layout

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
        rectangles: where it lies in the local tensor, in the order of the wire; offsets are the local tensor's.
        strides: of the part of the parameter that is here, for `torch.as_strided`.
        numel: elements.
        start: where it begins in the buffer that carries it (others' blocks); of own blocks see ``inside``.
        owner: the rank that owns the block.
        inside: of own blocks, where it lies in the block.
    """

    tensor: int
    parameter: int
    rectangles: tuple[Rectangle, ...]
    strides: tuple[int, ...]
    numel: int
    start: int
    owner: int
    inside: InBlock | None = None


@dataclass(frozen=True, slots=True)
class InBlock:
    """Where a range of the wire lies in a block: as strided views of it, in order.

    Attributes:
        rectangles: offsets are the block's.
        strides: the block's; 1 of a stretch of its row-major order.
    """

    rectangles: tuple[Rectangle, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """What another rank holds of one of this rank's blocks: a range of the owner's buffer, and its place."""

    buffer_start: int
    numel: int
    place: InBlock


@dataclass(frozen=True, slots=True)
class Owned:
    """One of this rank's blocks in a bucket: what it holds itself, what others send, and what goes back to others."""

    block: int
    numel: int
    local: Piece | None
    remote: tuple[Segment, ...]
    back: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """This rank's part in one exchange.

    Attributes:
        owned: blocks to compute, in the order of their state.
        others: what this rank holds of other ranks' blocks, in wire order.
        sending: those of them whose owners want this rank's gradient.
        from_ranks: elements that each rank sends here for `owned`.
        to_ranks: elements that this rank sends to each rank for `sending`.
        back_to: elements that this rank sends to each rank of updates.
        back_from: elements that each rank sends here of updates.
        shares: elements of the blocks that each rank owns in this bucket.
        travels: whether any rank sends anything; the same on every rank.
        gathered: of replicated parameters, whether one all-gather of equal shares carries the updates; otherwise every
            owner broadcasts its own in turn. ``start`` of others' pieces counts from the message that carries them.
    """

    owned: tuple[Owned, ...]
    others: tuple[Piece, ...]
    sending: tuple[Piece, ...]
    from_ranks: tuple[int, ...]
    to_ranks: tuple[int, ...]
    back_to: tuple[int, ...]
    back_from: tuple[int, ...]
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
    replicas: int,
    bucket_size: int,
    replicated: bool,
) -> list[list[int]]:
    """Every bucket as a list of blocks, in the order in which each owner computes its own.

    Args:
        blocks: all blocks of the plan.
        held: who holds each.
        queues: per rank, the blocks that it owns among those to be stepped, in the order of their state.
        world_size: ranks of the shard group and its replicas.
        replicas: shard groups that hold the same.
        bucket_size: elements. No rank sends, receives or computes more than a fifth of four buckets at a time, or than
            the largest block: every owner must be able to work on one at the same time.
        replicated: all ranks hold everything: only updates travel, gathered by all.
    """
    largest = max((blocks[block].tile.box.numel for queue in queues for block in queue), default=0)
    limit = max(message_size(bucket_size) // (world_size if replicated else 1), largest * replicas)
    made: list[list[int]] = []
    cursors = [0] * world_size
    left = sum(len(queue) for queue in queues)
    while left:
        bucket: list[int] = []
        load = _Load(world_size, replicas, limit)
        open_ranks = [rank for rank in range(world_size) if cursors[rank] < len(queues[rank])]
        while open_ranks:
            still_open = []
            for rank in open_ranks:
                block = queues[rank][cursors[rank]]
                if not load.add(rank, blocks[block].tile.box.numel, held[block]):
                    continue
                bucket.append(block)
                cursors[rank] += 1
                left -= 1
                if cursors[rank] < len(queues[rank]):
                    still_open.append(rank)
            open_ranks = still_open
        made.append(bucket)
    return made


class _Load:
    """Elements that every rank sends, receives and computes in one bucket, each at most ``limit``."""

    def __init__(self, world_size: int, replicas: int, limit: int) -> None:
        self._replicas, self._shards, self._limit = replicas, world_size // replicas, limit
        self._is_empty = True
        self._sent, self._received, self._computed, self._back_sent, self._back_received = (
            np.zeros(world_size, dtype=np.int64) for _ in range(5)
        )

    def add(self, rank: int, numel: int, held: Holding) -> bool:
        """Count a block that ``rank`` owns, unless that is too much for any rank; the first is not, whatever it is."""
        holders, counts = held.totals  # none if replicated
        ranks = holders + rank // self._shards * self._shards
        remote = ranks != rank
        ranks, counts = ranks[remote], counts[remote]
        fits = (
            self._computed[rank] + numel <= self._limit
            and self._received[rank] + counts.sum() <= self._limit
            and not (self._sent[ranks] + counts > self._limit).any()
        )
        if self._replicas > 1:
            away, away_counts = held.everywhere(self._replicas, self._shards)
            elsewhere = away != rank
            away, away_counts = away[elsewhere], away_counts[elsewhere]
            fits = (
                fits
                and self._back_sent[rank] + away_counts.sum() <= self._limit
                and not (self._back_received[away] + away_counts > self._limit).any()
            )
        if not fits and not self._is_empty:
            return False
        self._is_empty = False
        self._computed[rank] += numel
        self._received[rank] += counts.sum()
        self._sent[ranks] += counts
        if self._replicas > 1:
            self._back_sent[rank] += away_counts.sum()
            self._back_received[away] += away_counts
        return True


class BucketTables:
    """Makes one rank's part of buckets.

    Args:
        rank: of this process among all owners.
        replicas: shard groups that hold the same.
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
        replicas: int,
        replicated: bool,
        bucket_size: int,
    ) -> None:
        self._blocks, self._held, self._owners, self._layouts = blocks, held, owners, layouts
        self._rank, self._world_size, self._replicated = rank, world_size, replicated
        self._message_size = message_size(bucket_size)
        self._replicas, self._shards = replicas, world_size // replicas
        shard = rank % self._shards
        self._fragments: list[dict[int, list[Fragment]]] = [{} for _ in layouts]
        for mine, layout in zip(self._fragments, layouts, strict=True):
            for found in layout.fragments(shard):
                mine.setdefault(found.parameter, []).append(found)
        self._parts: dict[tuple[int, int], HeldParts] = {}

    def bucket(self, members: Sequence[int]) -> Bucket:
        """This rank's part in the bucket of these blocks."""
        by_owner: list[list[int]] = [[] for _ in range(self._world_size)]
        for block in members:
            by_owner[self._owners[block]].append(block)
        shares = tuple(sum(self._blocks[block].tile.box.numel for block in mine) for mine in by_owner)
        width = max(shares)
        gathered = self._replicated and width * self._world_size <= self._message_size

        to_ranks, back_from = [0] * self._world_size, [0] * self._world_size
        others: list[Piece] = []
        sending: list[Piece] = []
        start = 0
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
                    if not self._replicated:
                        back_from[owner] += piece.numel
                        if owner // self._shards == self._rank // self._shards:
                            sending.append(piece)
                            to_ranks[owner] += piece.numel
        mine = by_owner[self._rank]
        own_group = self._rank // self._shards
        remote, from_ranks = self._segments(mine, [own_group])
        back, back_to = self._segments(mine, range(self._replicas)) if self._replicas > 1 else (remote, from_ranks)
        owned = tuple(
            Owned(
                block,
                self._blocks[block].tile.box.numel,
                self._piece(block, 0, is_own=True),
                tuple(remote[block]),
                tuple(back[block]),
            )
            for block in mine
        )
        travels = self._replicated or any(
            self._replicas > 1 or (self._held[block].ranks != self._owners[block]).any() for block in members
        )
        return Bucket(
            owned,
            tuple(others),
            tuple(sending),
            tuple(from_ranks),
            tuple(to_ranks),
            tuple(back_to),
            tuple(back_from),
            shares,
            travels and self._world_size > 1,
            gathered,
        )

    def _segments(self, mine: Sequence[int], groups: Iterable[int]) -> tuple[dict[int, list[Segment]], list[int]]:
        """What other ranks of these shard groups hold of this rank's blocks, and how many elements each rank does."""
        counted = [0] * self._world_size
        held = (
            []
            if self._replicated
            else [
                (block, group * self._shards + shard, edge, count)
                for group in groups
                for block in mine
                for shard, edge, count in _entries(self._held[block])
                if group * self._shards + shard != self._rank
            ]
        )
        for _, rank, _, count in held:
            counted[rank] += count
        cursors = [sum(counted[:rank]) for rank in range(self._world_size)]
        found: dict[int, list[Segment]] = {block: [] for block in mine}
        for block, rank, edge, count in held:
            found[block].append(Segment(cursors[rank], count, self._in_block(block, edge, count)))
            cursors[rank] += count
        return found, counted

    def _parts_of(self, block: int) -> HeldParts:
        one = self._blocks[block]
        key = one.tensor, one.parameter
        if key not in self._parts:
            self._parts[key] = HeldParts(self._layouts[one.tensor], one.parameter)
        return self._parts[key]

    def _in_block(self, block: int, edge: int, numel: int) -> InBlock:
        """Where a range of the wire, of one part of the parameter, lies in a block."""
        box = self._blocks[block].tile.box
        before = 0
        for _, common in self._parts_of(block).of(box):
            if edge < before + common.numel:
                if common == box:
                    break
                low = edge - before
                found = placed(box.shape, within(common, box), low, low + numel)
                return InBlock(tuple(found), strides_of(box.shape))
            before += common.numel
        return InBlock((Rectangle(edge, (numel,)),), (1,))

    def _piece(self, block: int, start: int, *, is_own: bool = False) -> Piece | None:
        """What this rank holds of a block, if anything."""
        one = self._blocks[block]
        box, parts = one.tile.box, self._parts_of(block)
        found, inside, strides = list[Rectangle](), list[Rectangle](), tuple[int, ...]()
        for fragment in self._fragments[one.tensor].get(one.parameter, ()):
            part = parts.boxes[fragment.part]
            common = shared(box, part)
            if common is None:
                continue
            local = within(common, part)
            low, high = 0, local.numel
            if fragment.stop - fragment.start < part.numel:
                low, high = elements_before(part.shape, local, np.array([fragment.start, fragment.stop])).tolist()
            if low == high:
                continue
            shift = fragment.offset - fragment.start
            found += [Rectangle(its.offset + shift, its.shape) for its in placed(part.shape, local, low, high)]
            strides = strides or strides_of(part.shape)  # those of stripes differ where they are one element thick
            if is_own:
                inside += placed(box.shape, within(common, box), low, high)
        if not found:
            return None
        return Piece(
            one.tensor,
            one.parameter,
            tuple(found),
            strides,
            sum(rectangle.numel for rectangle in found),
            start,
            self._owners[block],
            InBlock(tuple(inside), strides_of(box.shape)) if is_own else None,
        )


def _entries(held: Holding) -> list[tuple[int, int, int]]:
    """(rank, where its elements begin in the block, how many) of every holder, in the block's order."""
    return list(zip(held.ranks.tolist(), held.edges[:-1].tolist(), held.counts.tolist(), strict=True))
