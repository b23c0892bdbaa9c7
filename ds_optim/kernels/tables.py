"""The work tables of a kernel call: which elements it may touch, and which of them form a block.

Tables are int64 CPU tensors, so that a C++ kernel reads them as they are and a layout builds them once. A call works on
a list of local flat tensors (contiguous, seen as 1-D); whatever no row of a table covers is padding: it is never read
and never written.

``spans`` (n, 3), for elementwise rules::

    tensor  start  length

``row_runs`` (n, 8): consecutive blocks of one width that lie one after the other. Block ``k`` of a run is the local
elements ``[k*width - phase, (k+1)*width - phase)`` clipped to ``[0, length)``, counted from ``start``::

    tensor  start  length  phase  width  slot  cut_first  cut_last

``column_runs`` (n, 11): blocks that are groups of columns of a row-major matrix, of which the local elements
``[start, start + length)`` are the matrix's elements ``[phase, phase + length)``. Block ``k`` of a run is the columns
``[column_start + k*width, column_start + (k+1)*width)`` and has ``block_numel`` elements in the whole matrix::

    tensor  start  length  phase  row_length  column_start  column_stop  width  slot  cut  block_numel

``slot`` is where a run's first block keeps its state in the tensor's block state; the others follow. A block that a
shard boundary cuts has a place in ``cut_sums`` (``cut_first``, ``cut_last``; ``cut`` and following), all others say -1.

``code_runs`` (n, 8): as ``row_runs``, of the blocks that share a scale where state is kept in eight bits
(`ds_optim.kernels.codes`). Their ``slot`` is a place among the scales, their cuts are places in ``cut_maxima``. A call
has them for all its tensors or for none; ``spans`` are not looked at then, and elements that are in no block of codes
are not touched.

This file knows how to read tables; what a row should say is the layout's business.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Select = Literal["all", "uncut", "cut"]
"""Which blocks a blockwise call updates: every block, only whole ones, only those that a shard boundary cuts."""


def table_of(rows: Sequence[Sequence[int]], columns: int) -> Tensor:
    """Rows of numbers as a table, int64 (n, columns), also if there are none."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, columns)


@dataclass(slots=True)
class Tables:
    """What a call walks: spans under an elementwise formula, runs of blocks under a blockwise one; under codes, theirs.

    Attributes:
        spans: int64 (n, 3).
        row_runs: int64 (n, 8).
        column_runs: int64 (n, 11).
        num_cuts: blocks of these tensors' layouts that a shard boundary cuts, the same on every rank.
        code_runs: int64 (n, 8).
        num_code_cuts: likewise of the blocks that share a scale.
    """

    spans: Tensor = field(default_factory=lambda: table_of([], 3))
    row_runs: Tensor = field(default_factory=lambda: table_of([], 8))
    column_runs: Tensor = field(default_factory=lambda: table_of([], 11))
    num_cuts: int = 0
    code_runs: Tensor = field(default_factory=lambda: table_of([], 8))
    num_code_cuts: int = 0


@dataclass(frozen=True, slots=True)
class RowPiece:
    """``blocks`` neighbouring blocks of which ``length`` elements each are held here, one after the other.

    Attributes:
        tensor: index of the local tensor.
        start: first element in that tensor.
        numel: elements of one block in the whole parameter.
        slot: place of the first block in the tensor's block state.
        cut: place of the block in ``cut_sums``, or -1; only single blocks are cut.
    """

    tensor: int
    start: int
    blocks: int
    length: int
    numel: int
    slot: int
    cut: int


@dataclass(frozen=True, slots=True)
class ColumnPiece:
    """``rows`` rows of a matrix fragment, each reduced to the columns ``[first, last)`` of a column run.

    Row ``r`` is the elements ``start + r*row_length + [0, last - first)`` of the local tensor; columns count from the
    run's ``column_start``.
    """

    start: int
    rows: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ColumnRun:
    """One row of ``column_runs`` by name."""

    tensor: int
    start: int
    length: int
    phase: int
    row_length: int
    column_start: int
    column_stop: int
    width: int
    slot: int
    cut: int
    block_numel: int

    @property
    def blocks(self) -> int:
        return (self.column_stop - self.column_start) // self.width

    def pieces(self) -> Iterator[ColumnPiece]:
        """At most three: the end of a row begun elsewhere, whole rows, the beginning of a row that ends elsewhere."""
        position, stop = self.phase, self.phase + self.length
        while position < stop:
            row_start = position - position % self.row_length
            if position == row_start and stop - position >= self.row_length:
                rows = (stop - position) // self.row_length
                row_stop = position + rows * self.row_length
                left, right = 0, self.row_length
            else:
                rows, row_stop = 1, min(row_start + self.row_length, stop)
                left, right = position - row_start, row_stop - row_start
            first, last = max(left, self.column_start), min(right, self.column_stop)
            if first < last:
                start = self.start + (row_start + first - self.phase)
                yield ColumnPiece(start, rows, first - self.column_start, last - self.column_start)
            position = row_stop


def iterate_spans(spans: Tensor) -> Iterator[tuple[int, int, int]]:
    """The rows of ``spans`` as ``(tensor, start, length)``; empty ones are left out."""
    for tensor, start, length in spans.tolist():
        if length:
            yield tensor, start, length


def iterate_row_runs(row_runs: Tensor, select: Select) -> Iterator[RowPiece]:
    """The blocks of ``row_runs`` that ``select`` asks for: a cut block alone, neighbouring whole blocks together.

    Raises:
        ValueError: a run holds part of a block but names no place for it in ``cut_sums``.
    """
    for tensor, start, length, phase, width, slot, cut_first, cut_last in row_runs.tolist():
        if length == 0:
            continue
        blocks = -(-(phase + length) // width)
        first_is_part = phase > 0 or length < width
        last_is_part = (phase + length) % width > 0
        if blocks == 1:
            cut_first = cut_last = max(cut_first, cut_last)
        if (first_is_part and cut_first < 0) or (last_is_part and cut_last < 0):
            raise ValueError(
                f"a run of blocks of {width} elements ends inside a block that is not marked as cut: "
                f"{tensor=} {start=} {length=} {phase=}"
            )
        first = 1 if cut_first >= 0 else 0
        last = 1 if cut_last >= 0 and blocks > 1 else 0
        whole = blocks - first - last
        first_length = min(width - phase, length)
        whole_start = start + (first_length if first else 0)
        if first and select != "uncut":
            yield RowPiece(tensor, start, 1, first_length, width, slot, cut_first)
        if whole and select != "cut":
            yield RowPiece(tensor, whole_start, whole, width, width, slot + first, -1)
        if last and select != "uncut":
            last_start = whole_start + whole * width
            last_length = start + length - last_start
            yield RowPiece(tensor, last_start, 1, last_length, width, slot + blocks - 1, cut_last)


def iterate_column_runs(column_runs: Tensor, select: Select) -> Iterator[ColumnRun]:
    """The rows of ``column_runs`` that ``select`` asks for; a run's blocks are all cut or all whole."""
    for row in column_runs.tolist():
        run = ColumnRun(*row)
        if run.length == 0 or (select == "uncut" and run.cut >= 0) or (select == "cut" and run.cut < 0):
            continue
        yield run
