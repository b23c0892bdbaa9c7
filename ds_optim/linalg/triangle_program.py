"""The Triton program of `ds_optim.linalg.triangle`. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_triangle(
    stack, result, rows, columns, step_batch, step_row, step_column, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """One tile of the lower triangle of one matrix, and its mirror image."""
    number = tl.program_id(0)
    down = ((tl.sqrt(8.0 * number + 1.0) - 1.0) / 2.0).to(tl.int32)  # the root may be off by one
    down = tl.where(down * (down + 1) // 2 > number, down - 1, down)
    down = tl.where((down + 1) * (down + 2) // 2 <= number, down + 1, down)
    across = number - down * (down + 1) // 2
    first = stack + tl.program_id(1).to(tl.int64) * step_batch
    own = down * TILE + tl.arange(0, TILE)
    other = across * TILE + tl.arange(0, TILE)
    inner = tl.arange(0, DEPTH)
    own_rows = first + own.to(tl.int64)[:, None] * step_row
    other_rows = first + other.to(tl.int64)[:, None] * step_row
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for at in range(0, columns, DEPTH):
        here = at + inner
        skipped = here.to(tl.int64)[None, :] * step_column
        inside = here[None, :] < columns
        a = tl.load(own_rows + skipped, mask=(own[:, None] < rows) & inside, other=0.0)
        b = tl.load(other_rows + skipped, mask=(other[:, None] < rows) & inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32")
    corner = result + tl.program_id(1).to(tl.int64) * rows * rows
    value = total.to(result.dtype.element_ty)
    mask = (own[:, None] < rows) & (other[None, :] < rows)
    tl.store(corner + own.to(tl.int64)[:, None] * rows + other[None, :], value, mask=mask)
    if down != across:
        mirrored = corner + other.to(tl.int64)[:, None] * rows + own[None, :]
        tl.store(mirrored, tl.trans(value), mask=tl.trans(mask))
