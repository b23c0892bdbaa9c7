"""A call's tensors and tables in the layout that the C++ kernels read, checked before they see them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor

from ds_optim.kernels.rounding import Rounding

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
"""What the C++ side calls them."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.uint8,)

_dtype_of = attrgetter("dtype")

_ABSENT = 1 << 62
"""The size of a gradient that is None: any row of a table fits it, and nothing is read."""


@dataclass(frozen=True, slots=True)
class _Stream:
    """One stream: addresses, dtypes and sizes of all its tensors, also in the layout that the C++ side reads."""

    addresses: list[int]
    dtypes: list[torch.dtype]
    numels: list[int]
    words: array[int]


_recent: dict[tuple[str, int, int], _Stream] = {}
"""Streams of recent calls: hundreds of parameters keep their memory from step to step."""
_RECENT_LIMIT = 256


def _stream(label: str, tensors: Sequence[Tensor | None], allowed: Sequence[torch.dtype]) -> _Stream:
    """The tensors as a stream, checked unless it equals a recent one."""
    try:
        addresses = list(map(Tensor.data_ptr, cast("Sequence[Tensor]", tensors)))
        dtypes = list(map(_dtype_of, tensors))
        numels = list(map(Tensor.numel, cast("Sequence[Tensor]", tensors)))
    except TypeError:  # some gradient is None
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        dtypes = [torch.float32 if tensor is None else tensor.dtype for tensor in tensors]
        numels = [_ABSENT if tensor is None else tensor.numel() for tensor in tensors]
    key = (label, len(addresses), addresses[0] if addresses else 0)
    known = _recent.get(key)
    if known is not None and known.addresses == addresses and known.dtypes == dtypes and known.numels == numels:
        return known
    check_tensors(label, tensors, allowed)
    codes = [DTYPES[dtype] for dtype in dtypes]
    stream = _Stream(addresses, dtypes, numels, array("q", [*addresses, *codes, *numels]))
    if len(addresses) > 1:  # a single one is soon made, and stacks of blocks have hundreds
        if len(_recent) >= _RECENT_LIMIT:
            _recent.clear()
        _recent[key] = stream
    return stream


class Streams:
    """A call's tensors: streams and codes have one value per element, those in ``blocks`` one per block.

    Attributes:
        tensors: how many.
        address: of the array of the streams' tables.
        numels: address of the sizes of the first stream's tensors.
        slots: address of the sizes of the last stream's tensors.
    """

    def __init__(
        self,
        streams: Sequence[tuple[str, Sequence[Tensor | None]]],
        blocks: Sequence[tuple[str, Sequence[Tensor]]] = (),
        codes: Sequence[tuple[str, Sequence[Tensor]]] = (),
    ) -> None:
        tables = [_stream(label, tensors, FLOATS) for label, tensors in streams]
        tables += [_stream(label, tensors, CODES) for label, tensors in codes]
        tables += [_stream(label, tensors, FLOATS) for label, tensors in blocks]
        first, streams = tables[0], (*streams, *codes)
        for (label, _), table in zip((*streams, *blocks), tables, strict=True):
            if len(table.numels) != len(first.numels):
                raise ValueError(f"{len(table.numels)} tensors as {label}, {len(first.numels)} as {streams[0][0]}")
        for (label, _), table in zip(streams, tables, strict=False):
            if table.numels != first.numels and any(
                a != b for a, b in zip(first.numels, table.numels, strict=True) if b != _ABSENT
            ):
                raise ValueError(f"{label} and {streams[0][0]} differ in size: {table.numels} and {first.numels}")
        self.tensors = len(first.numels)
        self._tables = tables  # kept alive: the C++ side points into them
        self._pointers = array("q", [table.words.buffer_info()[0] for table in tables])
        self.address = self._pointers.buffer_info()[0]
        sizes_at = 2 * len(first.numels) * first.words.itemsize
        self.numels = tables[0].words.buffer_info()[0] + sizes_at
        self.slots = tables[-1].words.buffer_info()[0] + sizes_at


def check_tensors(label: str, tensors: Sequence[Tensor | None], allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """
    Raises:
        ValueError: they are not contiguous CPU tensors of these dtypes.
    """
    problems = set()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            problems.add(f"{label} is on {tensor.device}")
        if not tensor.is_contiguous():
            problems.add(f"{label} is not contiguous")
        if tensor.dtype not in allowed:
            problems.add(f"{label} is {tensor.dtype}")
    if problems:
        raise ValueError(
            "the C++ kernels work on contiguous fp32, bf16 or fp16 CPU tensors, and uint8 ones of codes: "
            f"{', '.join(sorted(problems))}"
        )


def check_table(label: str, table: Tensor, columns: int) -> None:
    """
    Raises:
        ValueError: it is no table of so many columns.
    """
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != columns or not table.is_contiguous():
        raise ValueError(
            f"{label} must be a contiguous int64 tensor of shape (n, {columns}), not {tuple(table.shape)} {table.dtype}"
        )


def raise_if_bad(code: int, rows: Tensor, columns: Tensor | None) -> None:
    """Raise ``ValueError`` of the row that a code names: of the first table from 1 up, of the second from -1 down."""
    if code == 0:
        return
    row = rows[code - 1] if code > 0 or columns is None else columns[-code - 1]
    raise ValueError(f"a row of the table does not fit the tensors or contradicts itself: {row.tolist()}")


def rounding_words(rounding: Rounding | None) -> array[int] | None:
    """As the C++ side reads it; alive as long as ``rounding``."""
    if rounding is None:
        return None
    table = rounding.places.table
    return array("q", [table.data_ptr(), len(table), rounding.key])
