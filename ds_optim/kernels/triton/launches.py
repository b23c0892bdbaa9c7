"""The tables of launches: which tensors go together, which program does what, and where everything lies.

Tensors of the same dtypes are launched together. Their rows are sent to the device once for a layout, their addresses
when one has changed, as gradients' have that are freed between steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ds_optim.kernels import eager
from ds_optim.kernels.operands import Operands
from ds_optim.kernels.tables import iterate_row_runs

Dtypes = tuple[torch.dtype, ...]
Rows = npt.NDArray[np.int64]
Place = tuple[int, int]
"""Of a row's first element: the parameter's identity, and the index in it."""

ROW = 4096  # elements of an elementwise program
PART = 16384  # elements of a cut block that one program takes
NARROW = {1: 1024, 16: 64, 128: 8, 512: 2}
"""{elements of a block, at most: how many blocks a program takes}. Wider ones have a program each."""
_STEP = 8  # elements: 16 bytes of the shortest format
_WORD = 1 << 32  # indices of a row have the same high word
_REMEMBERED = 16  # dtypes and places that one layout has been seen with


@dataclass(slots=True)
class Together:
    """The tensors of a call that have the same dtypes.

    Attributes:
        members: their indices in the call.
        rows: {program: int64 (programs, ...) on the device}, see `programs`; empty ones are left out.
        addresses: int64 (rows, members) on the device.
        words: what was sent as these.
    """

    members: list[int]
    rows: dict[str, Tensor]
    addresses: Tensor | None = None
    words: list[list[int]] = field(default_factory=list)


Build = Callable[[Operands, frozenset[int]], dict[str, Rows]]
"""The rows of some members of a call, which count tensors as the call does."""

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""{a layout's table: {(dtypes of all tensors, device, places): (the places, {dtypes: Together})}}"""


def together(operands: Operands, layout: Tensor, build: Build) -> dict[Dtypes, Together]:
    """What is launched together, with the addresses of this call.

    Args:
        layout: the table of the call that its rows are made from: the same one, as an object, has the same rows.
        build: makes rows.
    """
    streams: Sequence[Sequence[Tensor | None]] = (operands.params, operands.grads, *operands.states)
    dtypes = tuple(tuple(_dtype(tensor, streams[0][i]) for i, tensor in enumerate(stream)) for stream in streams)
    device = operands.params[0].device
    places = None if operands.rounding is None else operands.rounding.places
    known: dict[Any, Any] = _known.setdefault(layout, {})
    key = (dtypes, device, id(places))
    if key not in known:
        if len(known) >= _REMEMBERED:
            known.clear()
        by_dtypes: dict[Dtypes, list[int]] = {}
        for index, of_tensor in enumerate(zip(*dtypes, strict=True)):
            by_dtypes.setdefault(of_tensor, []).append(index)
        made = {one: _built(operands, members, build) for one, members in by_dtypes.items()}
        known[key] = places, {one: group for one, group in made.items() if group.rows}  # places: their id is in the key
    found: dict[Dtypes, Together] = known[key][1]
    for group in found.values():
        _send_addresses(group, operands)
    return found


def _built(operands: Operands, members: list[int], build: Build) -> Together:
    position = {index: at for at, index in enumerate(members)}
    rows = {}
    for program, table in build(operands, frozenset(members)).items():
        if len(table):
            table[:, 0] = [position[index] for index in table[:, 0].tolist()]
            rows[program] = sent(table, operands.params[0].device)
    return Together(members, rows)


def _send_addresses(group: Together, operands: Operands) -> None:
    streams = (operands.params, operands.grads, *operands.states, *operands.block_states)
    words = [[_address(stream[index]) for index in group.members] for stream in streams]
    if words != group.words:
        elements = words[: len(words) - len(operands.block_states)]
        aligned = [int(all(word and not word % 16 for word in of_tensor)) for of_tensor in zip(*elements, strict=True)]
        table = np.array([*elements, aligned, *words[len(elements) :]], dtype=np.int64)
        group.words, group.addresses = words, sent(table, operands.params[0].device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None, param: Tensor | None) -> torch.dtype:
    """A gradient that is missing makes no launch of its own."""
    found = param if tensor is None else tensor
    assert found is not None
    return found.dtype


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
            carries = range(start - first + _WORD * (1 + first // _WORD), start + length, _WORD)
            rows += [
                (tensor, begin, end - begin, identity, first + begin - start)
                for begin, end in _stretches(start, start + length, ROW, carries)
            ]
    return {"update_rows": _table(rows, 5)}


def blocks(operands: Operands, members: frozenset[int]) -> dict[str, Rows]:
    """Of a blockwise call, whose runs of columns are not looked at: the rows of every program, see there.

    Those for whole blocks are called ``wide`` or after their width in `NARROW`.
    """
    whole: dict[str, list[Rows]] = {}
    for piece in iterate_row_runs(operands.tables.row_runs, "uncut"):
        if piece.tensor in members:
            identity, first = _place(operands, piece.tensor, piece.start)
            narrow = next((width for width in NARROW if piece.length <= width), None)
            step = 1 if narrow is None else NARROW[narrow]
            begin = np.arange(0, piece.blocks, step)
            count = np.minimum(step, piece.blocks - begin)
            same = np.ones_like(begin)
            skipped = begin * piece.length
            columns = [same * piece.tensor, piece.start + skipped, same * piece.length, count, piece.slot + begin]
            columns += [same * identity, first + skipped]
            whole.setdefault("wide" if narrow is None else str(narrow), []).append(np.stack(columns, axis=1))
    parts: list[tuple[int, ...]] = []
    cut: list[tuple[int, ...]] = []
    for piece in iterate_row_runs(operands.tables.row_runs, "cut"):
        if piece.tensor in members:
            identity, first = _place(operands, piece.tensor, piece.start)
            before = len(parts)
            parts += [
                (piece.tensor, begin, end - begin, len(cut), identity, first + begin - piece.start)
                for begin, end in _stretches(piece.start, piece.start + piece.length, PART)
            ]
            cut.append((piece.tensor, piece.slot, piece.cut, piece.numel, before, len(parts)))
    tables = {name: np.concatenate(rows) for name, rows in whole.items()}
    return {**tables, "parts": _table(parts, 6), "cut": _table(cut, 6)}


def _place(operands: Operands, tensor: int, start: int) -> Place:
    words = eager.words_at(operands.rounding, operands.params[tensor], tensor, start)
    return (words[0], words[1]) if words else (0, 0)


def _stretches(start: int, stop: int, longest: int, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Cut so that as many elements as can be lie in stretches of whole steps from a whole step on."""
    head = min(stop, start + -start % _STEP)
    tail = stop - (stop - head) % _STEP
    return itertools.pairwise(sorted({start, head, *range(head, stop, longest), tail, stop, *cuts}))


def _table(rows: Sequence[Sequence[int]], columns: int) -> Rows:
    return np.array(rows, dtype=np.int64).reshape(-1, columns)
