"""Ranges of one-dimensional tensors on their way from the ranks that have them to the ranks that want them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.sharding.exchange import carrier_of, from_all_ranks

RangePart = tuple[int, int, Tensor]
"""(which tensor, where the range begins in it, flat values)"""

_Range = tuple[int, int, int]


def transfer(
    have: Sequence[RangePart], want: Sequence[RangePart], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Fill what this rank wants from what all ranks have, in place. A collective; for checkpoints, not for steps.

    Args:
        have: ranges that this rank holds; several ranks may hold the same values.
        want: ranges to be filled, of the same dtypes. What nobody has stays as it is.
        group: whose ranks exchange; None: this process has it all.
        device: of the values.
    """

    def ranges(parts: Sequence[RangePart]) -> list[_Range]:
        return [(tensor, start, start + values.numel()) for tensor, start, values in parts]

    def view(parts: Sequence[RangePart], index: int, start: int, stop: int) -> Tensor:
        _, begin, values = parts[index]
        return values[start - begin : stop - begin]

    mine = ranges(have), ranges(want)
    if group is None:
        for one, other, start, stop in _overlaps(*mine):
            view(want, other, start, stop).copy_(view(have, one, start, stop))
        return
    everyone = from_all_ranks(mine, group)
    outgoing = [list(_overlaps(mine[0], wanted)) for _, wanted in everyone]
    incoming = [list(_overlaps(held, mine[1])) for held, _ in everyone]

    carrier = carrier_of(device, group)
    sent = [[view(have, source, start, stop) for source, _, start, stop in to_rank] for to_rank in outgoing]
    buffers = [[_bytes(values) for values in to_rank] for to_rank in sent]
    sizes = [sum(values.numel() for values in to_rank) for to_rank in buffers]
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    buffer = torch.cat([empty, *(values for to_rank in buffers for values in to_rank)]).to(carrier)
    targets = [[view(want, target, start, stop) for _, target, start, stop in of_rank] for of_rank in incoming]
    widths = [sum(values.numel() * values.element_size() for values in of_rank) for of_rank in targets]
    received = torch.empty(sum(widths), dtype=torch.uint8, device=carrier)
    dist.all_to_all_single(received, buffer, widths, sizes, group=group)
    assert sizes[dist.get_rank(group)] == widths[dist.get_rank(group)]
    position = 0
    for target in (values for of_rank in targets for values in of_rank):
        size = target.numel() * target.element_size()
        target.copy_(received[position : position + size].clone().view(target.dtype))
        position += size


def _overlaps(held: Sequence[_Range], wanted: Sequence[_Range]) -> Iterator[tuple[int, int, int, int]]:
    """(index of what is held, index of what is wanted, start, stop), in an order that both sides share."""
    by_tensor: dict[int, list[tuple[int, int, int]]] = {}
    for index, (tensor, start, stop) in enumerate(wanted):
        by_tensor.setdefault(tensor, []).append((index, start, stop))
    for index, (tensor, start, stop) in enumerate(held):
        for other, begin, end in by_tensor.get(tensor, []):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                yield index, other, low, high


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
