"""The block grid of one parameter: which of its elements share one value of a blockwise rule.

Pure arithmetic on shapes. A grid is defined on the *parameter*, never on a shard, so that it cannot depend on the
number of ranks. Which grid an optimizer wants for which role is the optimizer's business, not this file's.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ds_optim.sharding.boxes import Box, strides_of


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Blocks along one axis of a parameter seen as a row-major array of shape ``(batch, reduce, axis, inner)``.

    Element ``(b, r, a, i)`` belongs to block ``(b, s)`` where ``s`` is the segment of ``axis`` that holds ``a``; a
    block therefore spans the whole of ``reduce`` and ``inner``. Every matrix layout in use is a special case:

    ==========================================  =====  ======  ====  ==========
    parameter                                   batch  reduce  axis  inner
    ==========================================  =====  ======  ====  ==========
    Linear (out, in), one block per row         1      1       out   in
    Linear (out, in), one block per head        1      1       out   in
    Conv1D of GPT-2 (in, out)                   1      in      out   1
    stacked experts (E, out, in)                E      1       out   in
    stacked experts (E, in, out)                E      in      out   1
    convolution (out, in, kh, kw)               1      1       out   in*kh*kw
    a norm's weight as one block                1      1       1     numel
    a bias, every element its own block         1      1       numel 1
    ==========================================  =====  ======  ====  ==========

    Attributes:
        runs: ``((count, width), ...)``: ``count`` segments of ``width`` positions each, in order along ``axis``;
            they must fill it exactly. Two-level layouts (a fused query-key-value weight) are several runs.
    """

    batch: int
    reduce: int
    axis: int
    inner: int
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        covered = sum(count * width for count, width in self.runs)
        if covered != self.axis:
            raise ValueError(f"blocks cover {covered} of {self.axis} positions along the output axis: {self.runs}")

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return self.batch * self.reduce * self.axis * self.inner

    @property
    def blocks_per_batch(self) -> int:
        return sum(count for count, _ in self.runs)

    @property
    def num_blocks(self) -> int:
        """Blocks of the parameter, numbered batch by batch, run by run."""
        return self.batch * self.blocks_per_batch

    def numel_of(self, block: int) -> int:
        """Elements of a block."""
        index = block % self.blocks_per_batch
        for count, width in self.runs:
            if index < count:
                return width * self.inner * self.reduce
            index -= count
        raise AssertionError("a block of the grid")


class GridPart:
    """What a box of a parameter has of the parameter's grid: its own extents along the grid's four axes.

    The box's row-major order is the row-major order of these extents. Where the box is all of the parameter, so are
    they.

    Args:
        grid: of the parameter.
        shape: of the parameter.
        box: whose part; not empty.

    Attributes:
        batch_start, axis_start: the first batch entry, and the first position along the axis.
        batch, axis, inner: how many there are.
        batch_numel: elements of a batch entry.
        is_scattered: whether every block has elements elsewhere.

    Raises:
        ValueError: the box is no such part: its order is another one than the grid's.
    """

    def __init__(self, grid: BlockGrid, shape: Sequence[int], box: Box) -> None:
        self.grid = grid
        sizes = {"batch": grid.batch, "reduce": grid.reduce, "axis": grid.axis, "inner": grid.inner}
        starts, kept = dict.fromkeys(sizes, 0), dict(sizes)
        for start, stop, size, stride in zip(box.start, box.stop, shape, strides_of(shape), strict=True):
            if stop - start == size:
                continue
            axis, unit, is_outermost = _axis_of(sizes, size, stride)
            if kept[axis] != sizes[axis] or (axis in ("batch", "axis") and not is_outermost):
                raise ValueError(f"a part {box.shape} of {tuple(shape)} has other rows than its blocks {grid.runs}")
            starts[axis], kept[axis] = start * unit, sizes[axis] * (stop - start) // size
        self.batch_start, self.axis_start = starts["batch"], starts["axis"]
        self.batch, self.axis, self.inner = kept["batch"], kept["axis"], kept["inner"]
        self._inner_start, self._is_first = starts["inner"], starts["reduce"] == 0
        self.batch_numel = kept["reduce"] * self.axis * self.inner
        self.is_scattered = kept["reduce"] < grid.reduce or self.inner < grid.inner
        self.run_starts: list[int] = []  # position along the axis where each run begins
        self.run_blocks: list[int] = []  # blocks before each run
        position = blocks = 0
        for count, width in grid.runs:
            self.run_starts.append(position)
            self.run_blocks.append(blocks)
            position += count * width
            blocks += count

    def _block_at(self, position: int) -> tuple[int, int, int]:
        """The block of a batch entry that holds a position along the axis, where it begins there, and its width."""
        run = bisect_right(self.run_starts, position) - 1
        width = self.grid.runs[run][1]
        index = (position - self.run_starts[run]) // width
        return self.run_blocks[run] + index, self.run_starts[run] + index * width, width

    def cut_blocks(self, cuts: Iterable[int]) -> set[int]:
        """Blocks of the parameter that have elements here and elsewhere, where positions cut this part over ranks.

        Args:
            cuts: strictly inside the part's row-major elements.
        """
        per_batch, batches = self.grid.blocks_per_batch, range(self.batch_start, self.batch_start + self.batch)
        stop = self.axis_start + self.axis
        first, begin, _ = self._block_at(self.axis_start)
        last, last_begin, width = self._block_at(stop - 1)
        if self.is_scattered:
            return {batch * per_batch + block for batch in batches for block in range(first, last + 1)}
        ends = {first} if begin < self.axis_start else set[int]()
        ends |= {last} if stop < last_begin + width else set()
        found = {batch * per_batch + block for batch in batches for block in ends}
        for cut in cuts:
            batch, within = divmod(cut, self.batch_numel)
            before = (self.batch_start + batch) * per_batch
            if self.grid.reduce > 1:
                found.update(before + block for block in range(first, last + 1) if within)
            else:
                position, rest = divmod(within, self.inner)
                block, begin, _ = self._block_at(self.axis_start + position)
                found |= {before + block} if rest or begin < self.axis_start + position else set()
        return found

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """What ``[start, stop)`` of the part's elements has of each block, of which the elements are not all here.

        Of a grid of rows: block, where the piece begins and ends, and how many of the block's elements come before.
        """
        while start < stop:
            batch, within = divmod(start, self.batch_numel)
            position, rest = divmod(within, self.inner)
            block, begin, width = self._block_at(self.axis_start + position)
            end = min(begin + width - self.axis_start, self.axis) * self.inner + batch * self.batch_numel
            skipped = (self.axis_start + position - begin) * self.grid.inner + self._inner_start + rest
            number = (self.batch_start + batch) * self.grid.blocks_per_batch + block
            yield number, start, min(end, stop), skipped
            start = end

    def columns(self) -> Iterator[tuple[int, int, int, int, bool]]:
        """Neighbouring equal blocks of a batch entry, of which all are whole along the axis, or there is one.

        First block in the batch entry, first and last position along the part's axis, width of one, and whether their
        first elements are here.
        """
        position, stop = self.axis_start, self.axis_start + self.axis
        while position < stop:
            block, begin, width = self._block_at(position)
            run = bisect_right(self.run_starts, position) - 1
            run_stop = self.run_starts[run] + self.grid.runs[run][0] * width
            whole_stop = min(run_stop, begin + (stop - begin) // width * width)
            end = whole_stop if begin == position < whole_stop else min(begin + width, stop)
            width = width if begin == position < whole_stop else end - position
            is_first = self._is_first and self._inner_start == 0 and begin == position
            yield block, position - self.axis_start, end - self.axis_start, width, is_first
            position = end


def _axis_of(sizes: Mapping[str, int], size: int, stride: int) -> tuple[str, int, bool]:
    """Along which of a grid's axes a dimension of the parameter lies, its positions' width there, and whether it is the
    outermost dimension along it."""
    behind = 1
    for axis in ("inner", "axis", "reduce", "batch"):
        if behind <= stride and size * stride <= behind * sizes[axis]:
            return axis, stride // behind, size * stride == behind * sizes[axis]
        behind *= sizes[axis]
    raise ValueError(f"a dimension of {size} lies along several axes of a grid {dict(sizes)}")
