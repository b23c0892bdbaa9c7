"""The block grid of one parameter: which of its elements share one value of a blockwise rule.

Pure arithmetic on shapes. A grid is defined on the *parameter*, never on a shard, so that it cannot depend on the
number of ranks. Which grid an optimizer wants for which role is the optimizer's business, not this file's.
"""

from dataclasses import dataclass


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
