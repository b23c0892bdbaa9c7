"""Whole blocks at their owners: gradients in, updates out, bucket by bucket, the next bucket under way meanwhile.

Per bucket: pack what others own, one all-to-all, unpack; the caller turns gradients into updates in place; then the
same way back. Parameters that every rank holds need no way in, and updates are gathered by all. Knows tensors and
process groups, nothing of optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.known_torch import all_gather_single
from ds_optim.sharding.exchange import DeviceCopy, HostCopy, beside, staged, worker_of
from ds_optim.sharding.schedule import Bucket, InBlock, Piece, Segment

Compute = Callable[[Bucket, Tensor], None]
"""Turns the flat fp32 gradients of a bucket's owned blocks, one behind the other, into their updates, in place."""

Apply = Callable[[Piece, list[Tensor]], None]
"""Takes the update of one piece, shaped like its `views`, to where the parameter lies."""


@dataclass(slots=True)
class Traffic:
    """Elements that this rank sent to and received from others, both ways, since it was last reset; padding apart."""

    sent: int = 0
    received: int = 0
    messages: int = 0


@dataclass(frozen=True, slots=True)
class Wire:
    """How buckets travel.

    Attributes:
        group: the shard group; None for a process on its own.
        device: of the local tensors.
        dtype: of everything that travels, and so of what an owner sees, also of what it holds itself: fp32 or bf16.
        replicated: all ranks hold all gradients; updates are gathered.
        traffic: counted as it goes.
    """

    group: dist.ProcessGroup | None
    device: torch.device
    dtype: torch.dtype
    replicated: bool
    traffic: Traffic

    @property
    def carrier(self) -> torch.device:
        """Where buckets and matrix algebra live, see `worker_of`."""
        return worker_of(self.device, self.group)

    @property
    def is_staged(self) -> bool:
        """Whether buckets are an accelerator's and pass through memory of the host, where the local tensors are."""
        return self.carrier != self.device and self.carrier.type != "cpu"

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)


def views(flat: Tensor, piece: Piece | InBlock) -> list[Tensor]:
    """A piece of a flat local tensor, or what lies in a flat block, as strided views in the order of the wire."""
    base = flat.storage_offset()
    return [flat.as_strided(part.shape, piece.strides, base + part.offset) for part in piece.rectangles]


def parts(flat: Tensor, piece: Piece | InBlock) -> list[Tensor]:
    """The same elements in a buffer, shaped like their `views`."""
    split = flat.split([part.numel for part in piece.rectangles])
    return [values.view(part.shape) for values, part in zip(split, piece.rectangles, strict=True)]


def run(
    buckets: Sequence[Bucket],
    wire: Wire,
    gradient_of: Callable[[Piece], Tensor | None],
    compute: Compute,
    apply: Apply,
) -> None:
    """Run all buckets of one step.

    Args:
        buckets: this rank's part, in the same order on every rank.
        wire: how they travel.
        gradient_of: the flat local gradient that holds a piece; None counts as zero.
        compute: what owners do.
        apply: what holders do; also called for what owners hold themselves.
    """
    incoming = _Incoming(buckets[0], wire, gradient_of) if buckets else None
    outgoing: _Outgoing | None = None
    for index, bucket in enumerate(buckets):
        assert incoming is not None
        work = incoming.unpack()
        incoming = _Incoming(buckets[index + 1], wire, gradient_of) if index + 1 < len(buckets) else None
        compute(bucket, work)
        if outgoing is not None:
            outgoing.finish(apply)
        outgoing = _Outgoing(bucket, wire, work, apply)
        del work
    if outgoing is not None:
        outgoing.finish(apply)


def buffer_bytes(buckets: Sequence[Bucket], itemsize: int) -> tuple[int, int]:
    """The most that a rank's buffers take while it computes, and at any moment: arithmetic, see `run`.

    Where buckets are staged, an accelerator has one more of them in fp32: the next one's own part comes early.

    Args:
        buckets: the rank's part.
        itemsize: bytes of an element that travels.
    """

    def leaving(index: int) -> int:
        if not 0 <= index < len(buckets) or not buckets[index].travels:
            return 0
        bucket = buckets[index]
        if bucket.gathered:
            return max(bucket.shares) * (1 + len(bucket.shares)) * itemsize
        if not any((*bucket.back_to, *bucket.back_from)):  # broadcast by owners
            others = sorted(bucket.shares, reverse=True)[:2]
            return (bucket.numel + sum(others)) * itemsize
        return (sum(bucket.back_to) + sum(bucket.back_from)) * itemsize

    def arriving(index: int) -> int:
        if not 0 <= index < len(buckets) or not buckets[index].travels:
            return 0
        return (sum(buckets[index].from_ranks) + sum(buckets[index].to_ranks)) * itemsize

    computing, any_moment = [0], [0]
    for index, bucket in enumerate(buckets):
        work = 4 * bucket.numel
        computing.append(arriving(index + 1) + work + leaving(index - 1))
        any_moment += [arriving(index) + work + leaving(index - 1), arriving(index + 1) + work + leaving(index)]
    return max(computing), max(*any_moment, *computing)


class _Incoming:
    """Gradients of one bucket on their way to its owners."""

    def __init__(self, bucket: Bucket, wire: Wire, gradient_of: Callable[[Piece], Tensor | None]) -> None:
        self._bucket, self._wire, self._gradient_of = bucket, wire, gradient_of
        self._received: Tensor | None = None
        self._sent: Tensor | None = None
        self._work: Any = None
        if bucket.travels and not wire.replicated:
            self._sent = torch.empty(sum(bucket.to_ranks), dtype=wire.dtype, device=wire.carrier)
            self._received = torch.empty(sum(bucket.from_ranks), dtype=wire.dtype, device=wire.carrier)
            sent = staged(self._sent) if wire.is_staged else self._sent
            stretches = sent.split([piece.numel for piece in bucket.sending])
            _read(
                ((piece, parts(one, piece)) for piece, one in zip(bucket.sending, stretches, strict=True)), gradient_of
            )
            with beside(wire.carrier, self._sent, self._received) if wire.is_staged else contextlib.nullcontext():
                if wire.is_staged:
                    self._sent.copy_(sent, non_blocking=True)
                self._work = _all_to_all(self._received, self._sent, bucket.from_ranks, bucket.to_ranks, wire)
        self._own: DeviceCopy | None = None
        if wire.is_staged:
            here = staged(torch.empty(bucket.numel, dtype=torch.float32, device="meta"))
            self._read_own(here)
            self._own = DeviceCopy(here, wire.carrier, torch.float32)

    def _read_own(self, work: Tensor) -> None:
        """What this rank itself holds of its blocks."""
        own = zip(work.split([one.numel for one in self._bucket.owned]), self._bucket.owned, strict=True)
        _read(
            ((one.local, _inside(block, one.local)) for block, one in own if one.local is not None), self._gradient_of
        )

    def unpack(self) -> Tensor:
        """The flat gradients of the owned blocks, one behind the other, fp32; waits for the others' parts."""
        bucket, wire = self._bucket, self._wire
        if self._own is not None:
            work, self._own = self._own.arrived(), None  # what others send lands on the rest
        else:
            work = torch.empty(bucket.numel, dtype=torch.float32, device=wire.carrier)
            self._read_own(work)
        own = zip(work.split([one.numel for one in bucket.owned]), bucket.owned, strict=True)
        if self._work is not None:
            self._work.wait()
        if self._received is not None:
            received = self._received
            _copy(pair for block, one in own for part in one.remote for pair in _on_the_wire(block, part, received))
        self._sent = self._received = None
        return _as_sent(work, wire)


class _Outgoing:
    """Updates of one bucket on their way to whoever holds the parameters; the owner's own part is applied at once."""

    def __init__(self, bucket: Bucket, wire: Wire, work: Tensor, apply: Apply) -> None:
        self._bucket, self._wire = bucket, wire
        self._received: Tensor | None = None
        self._sent: Tensor | None = None
        self._work: Any = None
        work = _as_sent(work, wire)
        blocks = work.split([one.numel for one in bucket.owned])
        if bucket.travels and bucket.gathered:
            self._sent, self._received, self._work = _gather_by_all(work, bucket, wire)
        elif bucket.travels and wire.replicated:
            self._sent = work.to(wire.dtype)  # broadcast when the one before has arrived, see `finish`
        elif bucket.travels:
            self._sent = torch.empty(sum(bucket.back_to), dtype=wire.dtype, device=wire.carrier)
            sent = self._sent
            _copy(
                (carried, of_block)
                for block, one in zip(blocks, bucket.owned, strict=True)
                for part in one.back
                for of_block, carried in _on_the_wire(block, part, sent)
            )
            self._received = torch.empty(sum(bucket.back_from), dtype=wire.dtype, device=wire.carrier)
            self._work = _all_to_all(self._received, sent, bucket.back_from, bucket.back_to, wire)
        self._landing = HostCopy(work) if wire.is_staged else None
        if self._landing is None:
            self._apply_own(work, apply)

    def _apply_own(self, work: Tensor, apply: Apply) -> None:
        sizes = [one.numel for one in self._bucket.owned]
        for block, one in zip(work.split(sizes), self._bucket.owned, strict=True):
            if one.local is not None:
                apply(one.local, _inside(block, one.local))

    def finish(self, apply: Apply) -> None:
        """Wait for what other ranks computed, and apply it; where buckets are staged, what this one did as well."""
        if self._landing is not None:
            self._apply_own(self._landing.wait(), apply)
            self._landing = None
        if self._work is not None:
            self._work.wait()
        if self._received is not None:
            received = HostCopy(self._received).wait() if self._wire.is_staged else self._received
            for piece in self._bucket.others:
                apply(piece, parts(received.narrow(0, piece.start, piece.numel), piece))
        elif self._sent is not None and self._wire.replicated:
            self._broadcast(self._sent, apply)
        self._sent = self._received = None

    def _broadcast(self, mine: Tensor, apply: Apply) -> None:
        """Every owner's updates to all, one owner after the other: two of them are in flight at most."""
        wire, arriving = self._wire, None
        for owner in [*(rank for rank, share in enumerate(self._bucket.shares) if share), None]:
            following = None
            if owner is not None:
                is_mine = owner == wire.rank
                share = self._bucket.shares[owner]
                buffer = mine if is_mine else torch.empty(share, dtype=wire.dtype, device=wire.carrier)
                sent: Any = dist.broadcast(buffer.view(torch.uint8), group_src=owner, group=wire.group, async_op=True)
                following = owner, buffer, sent
                wire.traffic.messages += 1
                wire.traffic.sent += share * (len(self._bucket.shares) - 1) if is_mine else 0
                wire.traffic.received += 0 if is_mine else share
            if arriving is not None:
                source, values, handle = arriving
                handle.wait()
                values = HostCopy(values).wait() if wire.is_staged else values
                for piece in self._bucket.others:
                    if piece.owner == source:
                        apply(piece, parts(values.narrow(0, piece.start, piece.numel), piece))
            arriving = following


def _read(places: Iterable[tuple[Piece, list[Tensor]]], gradient_of: Callable[[Piece], Tensor | None]) -> None:
    """Fill what is given with each piece, shaped like its `views`, with that piece of the gradients."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for piece, targets in places:
        flat = gradient_of(piece)
        if flat is None:
            torch._foreach_zero_(targets)
        else:
            pairs += zip(targets, views(flat, piece), strict=True)
    _copy(pairs)


def _inside(block: Tensor, piece: Piece) -> list[Tensor]:
    """What this rank itself holds of one of its flat blocks, shaped like the piece's `views`."""
    assert piece.inside is not None
    return views(block, piece.inside)


def _on_the_wire(block: Tensor, part: Segment, buffer: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """What another rank holds of a block: in the block, and in the buffer that carries it."""
    carried = buffer.narrow(0, part.buffer_start, part.numel)
    return zip(views(block, part.place), parts(carried, part.place), strict=True)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    listed = list(pairs)
    if listed:
        torch._foreach_copy_([target for target, _ in listed], [source for _, source in listed])


def _as_sent(work: Tensor, wire: Wire) -> Tensor:
    """Round as the wire does, whoever holds what: otherwise the result would depend on the number of ranks."""
    return work if wire.dtype == torch.float32 else work.copy_(work.to(wire.dtype))


def _all_to_all(received: Tensor, sent: Tensor, from_ranks: Sequence[int], to_ranks: Sequence[int], wire: Wire) -> Any:
    # Bytes: every backend carries them, not every one carries bf16.
    size = wire.dtype.itemsize
    work = dist.all_to_all_single(
        received.view(torch.uint8),
        sent.view(torch.uint8),
        [count * size for count in from_ranks],
        [count * size for count in to_ranks],
        group=wire.group,
        async_op=True,
    )
    wire.traffic.sent += sent.numel()
    wire.traffic.received += received.numel()
    wire.traffic.messages += 1
    return work


def _gather_by_all(work: Tensor, bucket: Bucket, wire: Wire) -> tuple[Tensor, Tensor, Any]:
    """Every owner's updates to every rank, in equal shares."""
    width = max(bucket.shares)
    wire.traffic.messages += 1
    wire.traffic.sent += work.numel() * (len(bucket.shares) - 1)
    wire.traffic.received += sum(bucket.shares) - work.numel()
    sent = torch.zeros(width, dtype=wire.dtype, device=wire.carrier)
    sent.narrow(0, 0, work.numel()).copy_(work)
    received = torch.empty(width * len(bucket.shares), dtype=wire.dtype, device=wire.carrier)
    pending = all_gather_single(received.view(torch.uint8), sent.view(torch.uint8), wire.group)
    return sent, received, pending
