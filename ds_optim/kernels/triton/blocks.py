"""Triton's programs for Adam-mini: one second moment for a block. Importing this needs triton.

A whole block of neighbouring elements has a program of its own, or a share of one, and its gradient is fetched from
memory once. Of blocks that a shard boundary cuts, and of those that are columns of a matrix, the sums come first: in
parts, which are added up in their order, so that no result depends on which program was first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_optim.kernels.triton.access import bases_of, get, get_grad, numbers, put, put_param


@triton.jit
def advance(states, mask, mean_square, scalars):
    """Advance the states of blocks; returns what their momenta are multiplied by."""
    _, _, beta2, one_minus_beta2, step_size, bias2_sqrt, eps = scalars
    square = tl.load(states, mask=mask, other=0.0) * beta2 + one_minus_beta2 * mean_square
    tl.debug_barrier()  # every warp reads a state, one thread writes it: not before the last warp has read
    tl.store(states, square, mask=mask)
    return tl.div_rn(step_size, tl.div_rn(tl.sqrt_rn(square), bias2_sqrt) + eps)


@triton.jit
def move(bases, grad, offsets, mask, factor, index, mixed, scalars, ROUNDED: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements whose blocks' factors are known."""
    param = get(bases[0], offsets, mask, ALIGNED)
    average = get(bases[2], offsets, mask, ALIGNED)
    average = average + (grad - average) * scalars[1]
    put_param(bases[0], offsets, mask, param * scalars[0] - average * factor, index, mixed, ROUNDED, ALIGNED)
    put(bases[2], offsets, mask, average, ALIGNED)


@triton.jit
def move_row(
    bases,
    present,
    length,
    factor,
    index,
    mixed,
    scalars,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements of one block, or of a part of one."""
    for at in range(0, length, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        mask = offsets < length
        grad = get_grad(bases[1], offsets, mask, present, ALIGNED)
        move(bases, grad, offsets, mask, factor, index, mixed, scalars, ROUNDED, ALIGNED)


@triton.jit
def states_of(addresses, tensors, tensor):
    """Where a tensor's block states begin."""
    return tl.load(addresses + 4 * tensors + tensor).to(tl.pointer_type(tl.float32))


@triton.jit
def tile_at(row):
    """What the rows of `sum_columns` and `update_columns` begin with, and whether all in it are whole steps."""
    length, first, last, tile = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    is_whole = (length % 8 == 0) & (first % 8 == 0) & (last % 8 == 0)  # tiles begin at whole steps
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), length, first, last, tile, is_whole


@triton.jit
def columns_of(where, WIDTH: tl.constexpr):
    """Of a tile: the row length, the first column that there is, the tile's columns, and which of them there are."""
    length, first, last, tile = where
    columns = tile + tl.arange(0, WIDTH)
    return length, first, columns, (columns >= first) & (columns < last)


@triton.jit
def sum_tile(
    base,
    present,
    into,
    distance,
    count,
    height,
    where,
    ALIGNED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    length, first, columns, inside = columns_of(where, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for top in range(0, height, HEIGHT):
        down = top + tl.arange(0, HEIGHT)
        mask = (down < height)[:, None] & inside[None, :]
        grad = get_grad(base, down[:, None] * length + (columns - first)[None, :], mask, present, ALIGNED)
        total += tl.sum(grad * grad, axis=0).to(tl.float64)
    tl.store(into + tl.arange(0, WIDTH) * distance, total, mask=tl.arange(0, WIDTH) < count)


@triton.jit
def update_tile(
    bases,
    present,
    factors,
    width,
    height,
    where,
    index,
    mixed,
    scalars,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    length, first, columns, inside = columns_of(where, WIDTH)
    factor = tl.load(factors + columns // width, mask=inside, other=0.0)
    for top in range(0, height, HEIGHT):
        down = top + tl.arange(0, HEIGHT)
        mask = (down < height)[:, None] & inside[None, :]
        offsets = down[:, None] * length + (columns - first)[None, :]
        grad = get_grad(bases[1], offsets, mask, present, ALIGNED)
        move(bases, grad, offsets, mask, factor[None, :], index, mixed, scalars, ROUNDED, ALIGNED)


@triton.jit
def squares(base, present, length, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of a row's gradient, fp64; a part of `BLOCK` elements is added up in fp32."""
    total = tl.zeros((), tl.float64)
    for at in range(0, length, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        grad = get_grad(base, offsets, offsets < length, present, ALIGNED)
        total += tl.sum(grad * grad).to(tl.float64)
    return total


@triton.jit
def update_wide_block(
    bases,
    square,
    present,
    width,
    index,
    mixed,
    scalars,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = squares(bases[1], present, width, ALIGNED, BLOCK)
    factor = advance(square, True, (total / width).to(tl.float32), scalars)
    move_row(bases, present, width, factor, index, mixed, scalars, ROUNDED, ALIGNED, BLOCK)


@triton.jit(do_not_specialize=["tensors", "key"])
def update_wide_blocks(
    DTYPES: tl.constexpr,
    addresses,
    tensors,
    rows,
    key,
    ROUNDED: tl.constexpr,
    scalars,
    POINTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adam-mini on one whole block, whose gradient is read again from the cache.

    Args:
        DTYPES: of parameter, gradient and average; squares are fp32.
        addresses: int64 (5, tensors): parameter, gradient, average, whether these are aligned, squares.
        rows: int64 (programs, 7): tensor, start, width, 1, place of the square, identity, index.
    """
    row = rows + tl.program_id(0).to(tl.int64) * 7
    tensor, start, width = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    mixed, index = tl.load(row + 5) ^ key, tl.load(row + 6)
    values = numbers(scalars, POINTED)
    bases, present, is_aligned = bases_of(DTYPES, addresses, tensors, tensor, start)
    square = states_of(addresses, tensors, tensor) + tl.load(row + 4)
    if is_aligned & (width % 8 == 0):
        wide = width // 8 * 8
        update_wide_block(bases, square, present, wide, index, mixed, values, ROUNDED, True, BLOCK)
    else:
        update_wide_block(bases, square, present, width, index, mixed, values, ROUNDED, False, BLOCK)


@triton.jit
def update_rows_of_blocks(
    bases,
    square,
    present,
    width,
    count,
    index,
    mixed,
    scalars,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    block, element = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    offsets = block[:, None] * width + element[None, :]
    mask = (block < count)[:, None] & (element < width)[None, :]
    grad = get_grad(bases[1], offsets, mask, present, ALIGNED)
    mean_square = (tl.sum(grad * grad, axis=1).to(tl.float64) / width).to(tl.float32)
    factor = advance(square + block, block < count, mean_square, scalars)
    move(bases, grad, offsets, mask, factor[:, None], index, mixed, scalars, ROUNDED, ALIGNED)


@triton.jit(do_not_specialize=["tensors", "key"])
def update_narrow_blocks(
    DTYPES: tl.constexpr,
    addresses,
    tensors,
    rows,
    key,
    ROUNDED: tl.constexpr,
    scalars,
    POINTED: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adam-mini on at most `COUNT` neighbouring whole blocks of at most `WIDTH` elements; see `update_wide_blocks`.

    Args:
        rows: their fourth column is the number of blocks.
    """
    row = rows + tl.program_id(0).to(tl.int64) * 7
    tensor, start, width, count = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    mixed, index = tl.load(row + 5) ^ key, tl.load(row + 6)
    values = numbers(scalars, POINTED)
    bases, present, is_aligned = bases_of(DTYPES, addresses, tensors, tensor, start)
    square = states_of(addresses, tensors, tensor) + tl.load(row + 4)
    if WIDTH == 1:
        update_rows_of_blocks(bases, square, present, width, count, index, mixed, values, ROUNDED, False, COUNT, WIDTH)
    elif is_aligned & (width % 8 == 0):
        wide = width // 8 * 8
        update_rows_of_blocks(bases, square, present, wide, count, index, mixed, values, ROUNDED, True, COUNT, WIDTH)
    else:
        update_rows_of_blocks(bases, square, present, width, count, index, mixed, values, ROUNDED, False, COUNT, WIDTH)


@triton.jit(do_not_specialize=["tensors"])
def sum_rows(DTYPES: tl.constexpr, addresses, tensors, rows, partials, BLOCK: tl.constexpr):
    """Squares of parts of blocks that a shard boundary cuts, each into a number of its own (fp64, or what has none).

    Args:
        rows: int64 (programs, 6): tensor, start, length, ...
    """
    program = tl.program_id(0).to(tl.int64)
    row = rows + program * 6
    tensor, start, length = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    bases, present, is_aligned = bases_of(DTYPES, addresses, tensors, tensor, start)
    if is_aligned & (length % 8 == 0):
        tl.store(partials + program, squares(bases[1], present, length // 8 * 8, True, BLOCK))
    else:
        tl.store(partials + program, squares(bases[1], present, length, False, BLOCK))


@triton.jit(do_not_specialize=["tensors"])
def sum_columns(DTYPES: tl.constexpr, addresses, tensors, rows, partials, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Squares of some columns over some rows of a matrix, each column into a number of its own.

    Args:
        rows: int64 (programs, 10): tensor, start, rows, row length, first and last column that there are, first column
            of the program; where the first column's number is, how far the next one's, and how many columns have one,
            which is zero for those that there are not.
    """
    row = rows + tl.program_id(0).to(tl.int64) * 10
    tensor, start, height, length, first, last, tile, is_whole = tile_at(row)
    bases, present, is_aligned = bases_of(DTYPES, addresses, tensors, tensor, start)
    into, distance, count = partials + tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
    if is_aligned & is_whole:
        where = (length // 8 * 8, first // 8 * 8, last // 8 * 8, tile // 8 * 8)
        sum_tile(bases[1], present, into, distance, count, height, where, True, HEIGHT, WIDTH)
    else:
        where = (length, first, last, tile)
        sum_tile(bases[1], present, into, distance, count, height, where, False, HEIGHT, WIDTH)


@triton.jit
def add_up(blocks, partials, sums, BEGUN: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of each block up, in their order: to its sum, if that has `BEGUN`, or else to nothing.

    Args:
        blocks: as in `advance_known`.
    """
    row = blocks + tl.program_id(0).to(tl.int64) * 6
    where, first, last = sums + tl.load(row + 2), tl.load(row + 4), tl.load(row + 5)
    total = tl.load(where) if BEGUN else tl.zeros((), tl.float64)
    for part in range(first, last, BLOCK):
        here = part + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(partials + here, mask=here < last, other=0.0))
    tl.store(where, total)


@triton.jit(do_not_specialize=["tensors"])
def advance_known(addresses, tensors, blocks, sums, factors, scalars, POINTED: tl.constexpr):
    """The state of one block whose sum is known.

    Args:
        blocks: int64 (programs, 6): tensor, place of its square, place in ``sums``, elements of the whole block, and
            where its parts begin and end.
        factors: fp32 (programs,): of the blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    row = blocks + program * 6
    square = states_of(addresses, tensors, tl.load(row)) + tl.load(row + 1)
    mean_square = (tl.load(sums + tl.load(row + 2)) / tl.load(row + 3)).to(tl.float32)
    tl.store(factors + program, advance(square, True, mean_square, numbers(scalars, POINTED)))


@triton.jit(do_not_specialize=["tensors", "key"])
def update_cut_rows(
    DTYPES: tl.constexpr,
    addresses,
    tensors,
    rows,
    factors,
    key,
    ROUNDED: tl.constexpr,
    scalars,
    POINTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements of one part of a cut block.

    Args:
        rows: int64 (programs, 6): tensor, start, length, block (in ``factors``), identity, index.
    """
    row = rows + tl.program_id(0).to(tl.int64) * 6
    tensor, start, length = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    factor, mixed, index = tl.load(factors + tl.load(row + 3)), tl.load(row + 4) ^ key, tl.load(row + 5)
    values = numbers(scalars, POINTED)
    bases, present, is_aligned = bases_of(DTYPES, addresses, tensors, tensor, start)
    if is_aligned & (length % 8 == 0):
        move_row(bases, present, length // 8 * 8, factor, index, mixed, values, ROUNDED, True, BLOCK)
    else:
        move_row(bases, present, length, factor, index, mixed, values, ROUNDED, False, BLOCK)


@triton.jit(do_not_specialize=["tensors", "key"])
def update_columns(
    DTYPES: tl.constexpr,
    addresses,
    tensors,
    rows,
    factors,
    key,
    ROUNDED: tl.constexpr,
    scalars,
    POINTED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The elements of some columns of some rows.

    Args:
        rows: int64 (programs, 11): the first seven as in `sum_columns`; first column's block (in ``factors``), columns
            of a block, identity, index of the element at ``start``.
    """
    row = rows + tl.program_id(0).to(tl.int64) * 11
    tensor, start, height, length, first, last, tile, is_whole = tile_at(row)
    factor, width = factors + tl.load(row + 7), tl.load(row + 8)
    mixed, index = tl.load(row + 9) ^ key, tl.load(row + 10)
    values = numbers(scalars, POINTED)
    bases, present, is_aligned = bases_of(DTYPES, addresses, tensors, tensor, start)
    if is_aligned & is_whole:
        where = (length // 8 * 8, first // 8 * 8, last // 8 * 8, tile // 8 * 8)
        update_tile(bases, present, factor, width, height, where, index, mixed, values, ROUNDED, True, HEIGHT, WIDTH)
    else:
        where = (length, first, last, tile)
        update_tile(bases, present, factor, width, height, where, index, mixed, values, ROUNDED, False, HEIGHT, WIDTH)
