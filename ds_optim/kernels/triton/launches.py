"""The tables of launches: which tensors go together, which program does what, and where everything lies.

Tensors of the same dtypes are launched together. Their rows are sent to the device once for a layout, their addresses
when one has changed, as gradients' have that are freed between steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ds_optim.kernels import eager
from ds_optim.kernels.operands import Operands
from ds_optim.kernels.tables import Select, iterate_column_runs, iterate_row_runs

Dtypes = tuple[torch.dtype, ...]
Rows = npt.NDArray[np.int64]

ROW = 4096  # elements of an elementwise program
PART = 16384  # elements of a cut block that one program takes
CODE_BLOCKS = 4  # blocks of codes of one program
_CODE_ROWS: dict[str, Select] = {"whole codes": "uncut", "cut codes": "cut"}
NARROW = {1: 1024, 16: 64, 128: 8, 512: 2}
"""{elements of a block, at most: how many blocks a program takes}. Wider ones have a program each."""
HUGE = 1 << 20  # elements of a block beyond which its sum comes first, in parts: one program would take milliseconds
TALL, HIGH, BROAD = 256, 8, 128  # rows of a program for columns, of them at a time, and columns
_STEP = 8  # elements: 16 bytes of the shortest format
_REMEMBERED = 16  # dtypes and places that one layout has been seen with


@dataclass(slots=True)
class LaunchGroup:
    """The tensors of a call that have the same dtypes.

    Attributes:
        members: their indices in the call.
        rows: {name: int64 (programs, ...) on the device}, see `spans` and `blocks`; empty ones are left out.
        partials: {name: how many numbers the sums of these blocks are made of}.
        addresses: int64 (rows, members) on the device.
        words: the addresses that were sent, by stream.
    """

    members: list[int]
    rows: dict[str, Tensor]
    partials: dict[str, int]
    addresses: Tensor | None = None
    words: list[list[int]] = field(default_factory=list)


Build = Callable[[Operands, frozenset[int]], dict[str, Rows]]
"""The rows of some members of a call, which count tensors as the call does."""

_dtype_of = attrgetter("dtype")
_address_of = methodcaller("data_ptr")

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""{a layout's first table: {(dtypes of all tensors, device, places, other tables): ({dtypes: LaunchGroup}, ...)}}"""


def together(operands: Operands, layout: Sequence[Tensor], build: Build) -> dict[Dtypes, LaunchGroup]:
    """What is launched together, with the addresses of this call.

    Args:
        layout: the tables of the call that its rows are made from: the same ones, as objects, have the same rows.
        build: makes rows.
    """
    streams: Sequence[Sequence[Tensor | None]] = (operands.params, operands.grads, *operands.states)
    dtypes = tuple(_dtypes(stream, operands.params) for stream in streams)
    device = operands.params[0].device
    places = None if operands.rounding is None else operands.rounding.places
    known: dict[Any, Any] = _known.setdefault(layout[0], {})
    key = (dtypes, device, id(places), *map(id, layout[1:]))
    if key not in known:
        if len(known) >= _REMEMBERED:
            known.clear()
        by_dtypes: dict[Dtypes, list[int]] = {}
        for index, of_tensor in enumerate(zip(*dtypes, strict=True)):
            by_dtypes.setdefault(of_tensor, []).append(index)
        made = {one: _built(operands, members, build) for one, members in by_dtypes.items()}
        kept = (places, *layout[1:])  # their ids are in the key
        known[key] = {one: group for one, group in made.items() if group.rows}, kept
    found: dict[Dtypes, LaunchGroup] = known[key][0]
    for group in found.values():
        _send_addresses(group, operands)
    return found


def kept(tables: Iterable[Tensor]) -> list[Tensor]:
    """What lies on devices for these tables of calls: rows, and addresses."""
    groups = [group for table in tables for found, _ in _known.get(table, {}).values() for group in found.values()]
    addresses = [group.addresses for group in groups if group.addresses is not None]
    return [*(rows for group in groups for rows in group.rows.values()), *addresses]


def _built(operands: Operands, members: list[int], build: Build) -> LaunchGroup:
    position = {index: at for at, index in enumerate(members)}
    tables = {name: table for name, table in build(operands, frozenset(members)).items() if len(table)}
    partials: dict[str, int] = {name: int(tables[name][:, 5].max()) for name in ("cut", "whole") if name in tables}
    rows = {}
    for name, table in tables.items():
        table[:, 0] = [position[index] for index in table[:, 0].tolist()]
        rows[name] = sent(table, operands.params[0].device)
    return LaunchGroup(members, rows, partials)


def _send_addresses(group: LaunchGroup, operands: Operands) -> None:
    of_blocks = (*operands.block_states, *operands.scales)
    streams = (operands.params, operands.grads, *operands.states, *of_blocks)
    words = [_addresses([stream[index] for index in group.members]) for stream in streams]
    moved = [row for row, now in enumerate(words) if row >= len(group.words) or now != group.words[row]]
    if not moved:
        return
    used = [streams[row][index] for row in moved for index in group.members]
    if not all(tensor is None or tensor.is_contiguous() for tensor in used):
        raise ValueError("Triton's programs work on contiguous tensors: one of these is not")
    elements, squares = np.split(np.array(words, dtype=np.int64), [len(words) - len(of_blocks)])
    aligned = ((elements != 0) & (elements % 16 == 0)).all(axis=0)
    group.words, group.addresses = words, sent(np.vstack([elements, aligned, squares]), operands.params[0].device)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    try:
        return list(map(_address_of, tensors))
    except AttributeError:  # some gradient is None
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _dtypes(tensors: Sequence[Tensor | None], params: Sequence[Tensor]) -> Dtypes:
    """A gradient that is missing makes no launch of its own: it has the parameter's."""
    try:
        return tuple(map(_dtype_of, tensors))
    except AttributeError:
        pairs = zip(tensors, params, strict=True)
        return tuple(param.dtype if tensor is None else tensor.dtype for tensor, param in pairs)


def sent(words: Any, device: torch.device) -> Tensor:
    """An int64 table on the device: from pinned memory, so that nothing waits for it."""
    table = torch.from_numpy(np.ascontiguousarray(words, dtype=np.int64))
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


# -- rows -------------------------------------------------------------------------------------------------------------


def spans(operands: Operands, members: frozenset[int]) -> dict[str, Rows]:
    """Of an elementwise call: ``update_rows`` (n, 5): tensor, start, length, identity, index."""
    rows = []
    for tensor, start, length in eager.placed_spans(operands):
        if tensor in members:
            identity, first = _place(operands, tensor, start)
            rows += [
                (tensor, begin, end - begin, identity, first + begin - start)
                for begin, end in _stretches(start, start + length, ROW)
            ]
    return {"update_rows": _table(rows, 5)}


def code_blocks(operands: Operands, members: frozenset[int]) -> dict[str, Rows]:
    """Of a call over state in eight bits: ``whole codes`` and ``cut codes`` (n, 8), see `update_codes`."""
    found: dict[str, Rows] = {}
    for name, select in _CODE_ROWS.items():
        rows = []
        for piece in iterate_row_runs(operands.tables.code_runs, select):
            if piece.tensor in members:
                identity, first = _place(operands, piece.tensor, piece.start)
                for block in range(0, piece.blocks, CODE_BLOCKS):
                    start, count = piece.start + block * piece.length, min(CODE_BLOCKS, piece.blocks - block)
                    here = piece.tensor, start, piece.length, count, piece.slot + block, piece.cut
                    rows.append((*here, identity, first + start - piece.start))
        found[name] = _table(rows, 8)
    return found


def blocks(operands: Operands, members: frozenset[int]) -> dict[str, Rows]:
    """Of a blockwise call: the rows of every program, see there.

    Whole blocks of neighbouring elements are called ``wide``, or after their width in `NARROW`. Of the others the sums
    come first: ``cut`` lists those that a shard boundary cuts, ``whole`` those of columns and huge ones; ``cut parts``
    and ``whole parts`` are rows of elements, ``cut sums``, ``cut updates``, ``whole sums`` and ``whole updates`` tiles
    of columns.
    """
    at_once: dict[str, list[Rows]] = {}
    huge = _Parts([], [])
    for piece in iterate_row_runs(operands.tables.row_runs, "uncut"):
        if piece.tensor not in members:
            continue
        identity, first = _place(operands, piece.tensor, piece.start)
        if piece.length > HUGE:
            for number in range(piece.blocks):
                start = piece.start + number * piece.length
                place = piece.tensor, piece.slot + number, len(huge.blocks), piece.length
                huge.add(place, start, start + piece.length, identity, first - piece.start)
            continue
        narrow = next((width for width in NARROW if piece.length <= width), None)
        step = 1 if narrow is None else NARROW[narrow]
        begin = np.arange(0, piece.blocks, step)
        count = np.minimum(step, piece.blocks - begin)
        same = np.ones_like(begin)
        skipped = begin * piece.length
        columns = [same * piece.tensor, piece.start + skipped, same * piece.length, count, piece.slot + begin]
        columns += [same * identity, first + skipped]
        at_once.setdefault("wide" if narrow is None else str(narrow), []).append(np.stack(columns, axis=1))
    cut = _Parts([], [])
    for piece in iterate_row_runs(operands.tables.row_runs, "cut"):
        if piece.tensor in members:
            identity, first = _place(operands, piece.tensor, piece.start)
            place = piece.tensor, piece.slot, piece.cut, piece.numel
            cut.add(place, piece.start, piece.start + piece.length, identity, first - piece.start)
    tables = {name: np.concatenate(rows) for name, rows in at_once.items()}
    ways: list[tuple[str, Select, _Parts]] = [("cut", "cut", cut), ("whole", "uncut", huge)]
    for name, select, listed in ways:
        known, sums, updates = _columns(operands, members, select, len(listed.blocks), len(listed.rows))
        tables[name] = _table([*listed.blocks, *known], 6)
        tables[f"{name} parts"] = _table(listed.rows, 6)
        tables[f"{name} sums"] = _table(sums, 10)
        tables[f"{name} updates"] = _table(updates, 11)
    return tables


class _Parts(NamedTuple):
    """Blocks of neighbouring elements whose sums come first: the rows of their parts, and of themselves."""

    rows: list[tuple[int, ...]]
    blocks: list[tuple[int, ...]]

    def add(self, place: tuple[int, int, int, int], start: int, stop: int, identity: int, skipped: int) -> None:
        """A block: tensor, slot, place among sums and numel; its elements, whose indices are ``skipped`` further."""
        before, number = len(self.rows), len(self.blocks)
        self.rows.extend(
            (place[0], begin, end - begin, number, identity, begin + skipped)
            for begin, end in _stretches(start, stop, PART)
        )
        self.blocks.append((*place, before, len(self.rows)))


def _columns(
    operands: Operands, members: frozenset[int], select: Select, block: int, partial: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Blocks of columns, the tiles that their sums are made of, and those that are updated.

    Args:
        block: of those that others have taken, in the factors; sums of whole ones are numbered likewise.
        partial: numbers that others have taken, among the parts of sums.
    """
    blocks, sums, updates = list[tuple[int, ...]](), list[tuple[int, ...]](), list[tuple[int, ...]]()
    for run in iterate_column_runs(operands.tables.column_runs, select):
        if run.tensor not in members:
            continue
        bands = [
            (piece.start + top * run.row_length, min(TALL, piece.rows - top), run.row_length, piece.first, piece.last)
            for piece in run.pieces()
            for top in range(0, piece.rows, TALL)
        ]
        for number, band in enumerate(bands):
            identity, index = _place(operands, run.tensor, band[0])
            for tile in range(0, run.blocks * run.width, BROAD):  # of a column that the band has not, the sum is zero
                here, count = (run.tensor, *band, tile), min(BROAD, run.blocks * run.width - tile)
                sums.append((*here, partial + tile * len(bands) + number, len(bands), count))
                if band[3] < tile + count and tile < band[4]:
                    updates.append((*here, block, run.width, identity, index))
        for number in range(run.blocks):
            place = block + number if run.cut < 0 else run.cut + number
            begin = partial + number * run.width * len(bands)
            end = begin + run.width * len(bands)
            blocks.append((run.tensor, run.slot + number, place, run.block_numel, begin, end))
        block += run.blocks
        partial += run.blocks * run.width * len(bands)
    return blocks, sums, updates


def _place(operands: Operands, tensor: int, start: int) -> tuple[int, int]:
    """Of an element: the parameter's identity, and the index in it."""
    words = eager.words_at(operands.rounding, operands.params[tensor], tensor, start)
    return (words[0], words[1]) if words else (0, 0)


def _stretches(start: int, stop: int, longest: int) -> Iterator[tuple[int, int]]:
    """Cut so that as many elements as can be lie in stretches of whole steps from a whole step on."""
    head = min(stop, start + -start % _STEP)
    tail = stop - (stop - head) % _STEP
    return itertools.pairwise(sorted({start, head, *range(head, stop, longest), tail, stop}))


def _table(rows: Sequence[Sequence[int]], columns: int) -> Rows:
    return np.array(rows, dtype=np.int64).reshape(-1, columns)
