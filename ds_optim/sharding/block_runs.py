"""From a layout and the parameters' block grids to the tables that a kernel walks.

A *span* is a stretch of the local tensor without padding. A *run* is a stretch of equal blocks inside one fragment. A
block of which several ranks hold something gets an index that is the same on every rank of the group, so that its
partial sums meet in one small all-reduce. Pure arithmetic; the columns are those of `ds_optim.kernels`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Set
from dataclasses import dataclass

from ds_optim.sharding.blocks import BlockGrid, GridPart
from ds_optim.sharding.layout import Fragment, Layout


@dataclass(frozen=True, slots=True)
class BlockRuns:
    """The blocks of one local tensor.

    Attributes:
        rows: ``row_runs`` without their ``tensor`` column, the parameter and the number of the run's first block
            behind: (start, length, phase, width, slot, cut_first, cut_last, parameter, block).
        columns: ``column_runs`` likewise, and whether the blocks' first elements are in the part of the parameter that
            is here: (start, length, phase, row_length, column_start, column_stop, width, slot, cut, block_numel,
            parameter, block, is_first).
        num_slots: blocks of which this rank holds at least one element.
        num_cuts: blocks of the whole layout of which several ranks hold something, equal on every rank.
    """

    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    num_slots: int
    num_cuts: int

    def of(self, parameters: Set[int]) -> BlockRuns:
        """Those of some parameters alone; places in state and among cuts are as they were."""
        rows = tuple(row for row in self.rows if row[-2] in parameters)
        columns = tuple(row for row in self.columns if row[-3] in parameters)
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


def block_runs(layout: Layout, rank: int, grids: Mapping[str, BlockGrid]) -> BlockRuns:
    """The runs of ``rank``'s local tensor, given grids of parameters by name; those without one have no blocks.

    Raises:
        ValueError: a part of a parameter has no whole rows of its grid, see `GridPart`.
    """
    parts = [_parts(layout, index, grids.get(spec.name)) for index, spec in enumerate(layout.parameters)]
    cut_index: list[dict[int, int]] = []
    num_cuts = 0
    for parameter, of_parameter in enumerate(parts):
        cut: set[int] = set()
        for number, share in enumerate(layout.shares(parameter)):
            if number in of_parameter:
                cut.update(of_parameter[number].cut_blocks(share.edges[1:-1]))
        cut_index.append({block: num_cuts + position for position, block in enumerate(sorted(cut))})
        num_cuts += len(cut)

    rows: list[tuple[int, ...]] = []
    columns: list[tuple[int, ...]] = []
    slots = 0
    for fragment in layout.fragments(rank):
        if not parts[fragment.parameter]:
            continue
        part, cuts = parts[fragment.parameter][fragment.part], cut_index[fragment.parameter]
        if part.grid.reduce > 1:
            slots = _append_columns(columns, fragment, part, cuts, slots)
        elif part.is_scattered:
            slots = _append_pieces(rows, fragment, part, cuts, slots)
        else:
            slots = _append_rows(rows, fragment, part, cuts, slots)
    return BlockRuns(tuple(rows), tuple(columns), slots, num_cuts)


def _parts(layout: Layout, parameter: int, grid: BlockGrid | None) -> dict[int, GridPart]:
    """What each part of a parameter that is not empty has of its grid; nothing without one."""
    if grid is None:
        return {}
    spec, boxes = layout.parameters[parameter], layout.parts(parameter)
    try:
        return {at: GridPart(grid, spec.shape, box) for at, box in enumerate(boxes) if box.numel}
    except ValueError as error:
        remedy = "shard it along its first dimension, or use AdamW, Lion or Adan"
        raise ValueError(f"{spec.name}: {error}: {remedy}") from None


def _append_rows(
    rows: list[tuple[int, ...]], fragment: Fragment, part: GridPart, cuts: Mapping[int, int], slots: int
) -> int:
    """Row runs of one fragment: the fragment cut where the grid's runs (and batch entries) begin."""
    grid = part.grid
    single = len(grid.runs) == 1 and part.axis == grid.axis  # equal blocks throughout: batch entries are not told apart
    element = fragment.start
    while element < fragment.stop:
        if single:
            begin, width, end = 0, grid.runs[0][1] * grid.inner, fragment.stop
            first_block = part.batch_start * grid.blocks_per_batch
        else:
            batch, within = divmod(element, part.batch_numel)
            run = bisect_right(part.run_starts, part.axis_start + within // grid.inner) - 1
            begin = batch * part.batch_numel + (part.run_starts[run] - part.axis_start) * grid.inner
            width = grid.runs[run][1] * grid.inner
            end = min(begin + grid.runs[run][0] * width, (batch + 1) * part.batch_numel, fragment.stop)
            first_block = (part.batch_start + batch) * grid.blocks_per_batch + part.run_blocks[run]
        phase = (element - begin) % width
        first = first_block + (element - begin) // width
        last = first_block + (end - 1 - begin) // width
        start = fragment.offset + element - fragment.start
        ends = cuts.get(first, -1), cuts.get(last, -1)
        rows.append((start, end - element, phase, width, slots, *ends, fragment.parameter, first))
        slots += last - first + 1
        element = end
    return slots


def _append_pieces(
    rows: list[tuple[int, ...]], fragment: Fragment, part: GridPart, cuts: Mapping[int, int], slots: int
) -> int:
    """Row runs of one fragment of a part that has something of each row: a run for every block, which is always cut."""
    for block, begin, end, before in part.pieces(fragment.start, fragment.stop):
        start, numel, cut = fragment.offset + begin - fragment.start, part.grid.numel_of(block), cuts[block]
        rows.append((start, end - begin, before, numel, slots, cut, cut, fragment.parameter, block))
        slots += 1
    return slots


def _append_columns(
    columns: list[tuple[int, ...]], fragment: Fragment, part: GridPart, cuts: Mapping[int, int], slots: int
) -> int:
    """Column runs of one fragment: per batch entry that it touches, one for every run of the grid.

    ``inner`` positions behind the axis belong to the same column group, so columns are counted in elements.
    """
    grid = part.grid
    element = fragment.start
    while element < fragment.stop:
        batch = element // part.batch_numel
        end = min((batch + 1) * part.batch_numel, fragment.stop)
        for block, first, last, width, is_first in part.columns():
            first_block = (part.batch_start + batch) * grid.blocks_per_batch + block
            columns.append(
                (
                    fragment.offset + element - fragment.start,
                    end - element,
                    element - batch * part.batch_numel,
                    part.axis * part.inner,
                    first * part.inner,
                    last * part.inner,
                    width * part.inner,
                    slots,
                    cuts.get(first_block, -1),
                    grid.numel_of(first_block),
                    fragment.parameter,
                    first_block,
                    int(is_first),
                )
            )
            slots += (last - first) // width
        element = end
    return slots
