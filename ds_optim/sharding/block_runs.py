"""From a layout and the parameters' block grids to the tables that a kernel walks.

A *span* is a stretch of the local tensor without padding. A *run* is a stretch of equal blocks inside one fragment. A
block that a shard boundary cuts gets an index that is the same on every rank of the group, so that its partial sums
meet in one small all-reduce. Pure arithmetic; the columns are those of `ds_optim.kernels`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Set
from dataclasses import dataclass

from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.layout import Fragment, Layout


@dataclass(frozen=True, slots=True)
class BlockRuns:
    """The blocks of one local tensor.

    Attributes:
        rows: ``row_runs`` without their ``tensor`` column, the parameter behind: (start, length, phase, width, slot,
            cut_first, cut_last, parameter).
        columns: ``column_runs`` likewise: (start, length, phase, row_length, column_start, column_stop, width, slot,
            cut, block_numel, parameter).
        num_slots: blocks of which this rank holds at least one element.
        num_cuts: blocks of the whole layout that a shard boundary cuts, equal on every rank.
    """

    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    num_slots: int
    num_cuts: int

    def of(self, parameters: Set[int]) -> BlockRuns:
        """Those of some parameters alone; places in state and among cuts are as they were."""
        rows, columns = (tuple(row for row in table if row[-1] in parameters) for table in (self.rows, self.columns))
        return BlockRuns(rows, columns, self.num_slots, self.num_cuts)


def held_spans(layout: Layout, rank: int, left_out: Set[int] = frozenset()) -> list[tuple[int, int]]:
    """What ``rank`` holds, as ``(start, length)``, neighbours joined: kernels are fast on long spans.

    Args:
        left_out: parameters, by index, that somebody else steps.
    """
    joined: list[tuple[int, int]] = []
    for fragment in layout.fragments(rank):
        if fragment.parameter in left_out:
            continue
        start, length = fragment.offset, fragment.numel
        if joined and sum(joined[-1]) == start:
            start, length = joined[-1][0], joined.pop()[1] + length
        joined.append((start, length))
    return joined


class _Grid:
    """Arithmetic on one grid: where its blocks begin, in row-major elements of one batch entry."""

    def __init__(self, grid: BlockGrid) -> None:
        self.grid = grid
        self.batch_numel = grid.reduce * grid.axis * grid.inner
        self.run_starts: list[int] = []  # position along the axis where each run begins
        self.run_blocks: list[int] = []  # blocks before each run
        position = blocks = 0
        for count, width in grid.runs:
            self.run_starts.append(position)
            self.run_blocks.append(blocks)
            position += count * width
            blocks += count

    def row_block(self, element: int) -> tuple[int, bool]:
        """The block that holds a row-major element, and whether the element is the block's first (``reduce == 1``)."""
        batch, within = divmod(element, self.batch_numel)
        position, rest = divmod(within, self.grid.inner)
        run = bisect_right(self.run_starts, position) - 1
        index, offset = divmod(position - self.run_starts[run], self.grid.runs[run][1])
        return batch * self.grid.blocks_per_batch + self.run_blocks[run] + index, offset == 0 and rest == 0

    def cut_blocks(self, cuts: list[int]) -> list[int]:
        """Blocks with elements on both sides of at least one of the positions, ascending."""
        if self.grid.reduce == 1:
            located = (self.row_block(cut) for cut in cuts)
            return sorted({block for block, first in located if not first})
        batches = sorted({cut // self.batch_numel for cut in cuts if cut % self.batch_numel})
        per_batch = self.grid.blocks_per_batch
        return [batch * per_batch + block for batch in batches for block in range(per_batch)]


def block_runs(layout: Layout, rank: int, grids: Mapping[str, BlockGrid]) -> BlockRuns:
    """The runs of ``rank``'s local tensor, given grids of parameters by name; those without one have no blocks."""
    arithmetic = [_Grid(grids[spec.name]) if spec.name in grids else None for spec in layout.parameters]
    cut_index: list[dict[int, int]] = []
    num_cuts = 0
    for parameter, grid in enumerate(arithmetic):
        blocks = grid.cut_blocks(layout.cuts(parameter)) if grid is not None else []
        cut_index.append({block: num_cuts + position for position, block in enumerate(blocks)})
        num_cuts += len(blocks)

    rows: list[tuple[int, ...]] = []
    columns: list[tuple[int, ...]] = []
    slots = 0
    for fragment in layout.fragments(rank):
        grid, cuts = arithmetic[fragment.parameter], cut_index[fragment.parameter]
        if grid is None:
            continue
        if grid.grid.reduce == 1:
            slots = _append_rows(rows, fragment, grid, cuts, slots)
        else:
            slots = _append_columns(columns, fragment, grid, cuts, slots)
    return BlockRuns(tuple(rows), tuple(columns), slots, num_cuts)


def _append_rows(
    rows: list[tuple[int, ...]], fragment: Fragment, arithmetic: _Grid, cuts: Mapping[int, int], slots: int
) -> int:
    """Row runs of one fragment: the fragment cut where the grid's runs (and batch entries) begin."""
    grid = arithmetic.grid
    single = len(grid.runs) == 1  # equal blocks throughout: batch entries need not be told apart
    element = fragment.start
    while element < fragment.stop:
        if single:
            begin, width, end, first_block = 0, grid.runs[0][1] * grid.inner, fragment.stop, 0
        else:
            batch, within = divmod(element, arithmetic.batch_numel)
            run = bisect_right(arithmetic.run_starts, within // grid.inner) - 1
            begin = batch * arithmetic.batch_numel + arithmetic.run_starts[run] * grid.inner
            width = grid.runs[run][1] * grid.inner
            end = min(begin + grid.runs[run][0] * width, fragment.stop)
            first_block = batch * grid.blocks_per_batch + arithmetic.run_blocks[run]
        phase = (element - begin) % width
        first = first_block + (element - begin) // width
        last = first_block + (end - 1 - begin) // width
        rows.append(
            (
                fragment.offset + element - fragment.start,
                end - element,
                phase,
                width,
                slots,
                cuts.get(first, -1),
                cuts.get(last, -1),
                fragment.parameter,
            )
        )
        slots += last - first + 1
        element = end
    return slots


def _append_columns(
    columns: list[tuple[int, ...]], fragment: Fragment, arithmetic: _Grid, cuts: Mapping[int, int], slots: int
) -> int:
    """Column runs of one fragment: per batch entry that it touches, one for every run of the grid.

    ``inner`` positions behind the axis belong to the same column group, so columns are counted in elements.
    """
    grid = arithmetic.grid
    row_length = grid.axis * grid.inner
    element = fragment.start
    while element < fragment.stop:
        batch = element // arithmetic.batch_numel
        end = min((batch + 1) * arithmetic.batch_numel, fragment.stop)
        for run, (count, width) in enumerate(grid.runs):
            start = arithmetic.run_starts[run] * grid.inner
            first = batch * grid.blocks_per_batch + arithmetic.run_blocks[run]
            columns.append(
                (
                    fragment.offset + element - fragment.start,
                    end - element,
                    element - batch * arithmetic.batch_numel,
                    row_length,
                    start,
                    start + count * width * grid.inner,
                    width * grid.inner,
                    slots,
                    cuts.get(first, -1),
                    width * grid.inner * grid.reduce,
                    fragment.parameter,
                )
            )
            slots += count
        element = end
    return slots
