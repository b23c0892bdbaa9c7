"""The programs that Triton compiles. Importing this needs triton.

One launch updates the elements of any number of tensors. A program has one row of a table: some elements of
one tensor, or some of its blocks; where the tensor's streams are, stands in a second table. Rows and blocks of whole
multiples of eight elements, whose streams all begin at multiples of 16 bytes, are read and written 128 bits at a time;
edges, and what lies otherwise, one by one.

Arithmetic is that of the C++ kernels, operation by operation: quotients and roots are rounded to nearest, and products
are not fused with sums (``enable_fp_fusion=False``), so that an element's result does not depend on its row.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024  # elements at a time: eight per thread of four warps, so that two bytes each make 128 bits
ALIGNMENT = 16  # bytes


@triton.jit
def adamw(streams, scalars):
    param, grad, average, square = streams
    decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt, eps = scalars
    average = average + (grad - average) * one_minus_beta1
    square = square * beta2 + one_minus_beta2 * (grad * grad)
    denominator = tl.div_rn(tl.sqrt_rn(square), bias2_sqrt) + eps
    return param * decay - step_size * tl.div_rn(average, denominator), average, square


@triton.jit
def lion(streams, scalars):
    param, grad, average = streams
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr = scalars
    mixed = average * beta1 + grad * one_minus_beta1
    sign = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, tl.where(mixed == 0, 0.0, mixed)))  # NaN stays NaN
    return param * decay - lr * sign, average * beta2 + grad * one_minus_beta2


@triton.jit
def adan(streams, scalars):
    param, grad, average, average_difference, square, previous = streams
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3 = scalars[:7]
    step_size, step_size_diff, bias3_sqrt, eps, shrink, has_previous = scalars[7:]
    difference = (grad - previous) * has_previous
    average = average * beta1 + grad * one_minus_beta1
    average_difference = average_difference * beta2 + difference * one_minus_beta2
    ahead = grad + beta2 * difference
    square = square * beta3 + one_minus_beta3 * (ahead * ahead)
    denominator = tl.div_rn(tl.sqrt_rn(square), bias3_sqrt) + eps
    moved = param * decay - step_size * tl.div_rn(average, denominator)
    moved = tl.div_rn(moved - step_size_diff * tl.div_rn(average_difference, denominator), shrink)
    return moved, average, average_difference, square, grad


ARITHMETIC = {"adamw": adamw, "lion": lion, "adan": adan}


@triton.jit
def get(base, offsets, mask, ALIGNED: tl.constexpr):
    pointers = base + offsets
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, 16), 1024)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def to_bf16(values):
    """To nearest, ties to even: by hand, as Triton's interpreter cuts bits off."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def put(base, offsets, mask, value, ALIGNED: tl.constexpr):
    if base.dtype.element_ty == tl.bfloat16 and value.dtype == tl.float32:
        value = to_bf16(value)
    value = value.to(base.dtype.element_ty)
    pointers = base + offsets
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, 16), 1024)
    tl.store(pointers, value, mask=mask)


@triton.jit
def prospector(x):
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    return x ^ (x >> 15)


@triton.jit
def at_random(values, index, mixed):
    """bf16, rounded by the noise of `ds_optim.kernels.rounding`; no two indices differ in their high words."""
    low = prospector(mixed.to(tl.uint32))
    high = prospector((mixed >> 32).to(tl.uint32) ^ (index >> 32).to(tl.uint32))
    x = index.to(tl.uint32) ^ low
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) ^ high
    x = (x ^ (x >> 12)) * 0x297A2D39
    noise = (x ^ (x >> 15)) >> 16
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    up = tl.where(magnitude < 0x7F7F0000, ((bits & 0xFFFF) + noise) >> 16, 0)
    rounded = tl.where(magnitude > 0x7F800000, 0x7FC0, (bits >> 16) + up)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def bases_of(DTYPES: tl.constexpr, addresses, tensors, tensor, start):
    """Where a tensor's streams have element ``start``; whether it has a gradient, and 128-bit accesses fit."""
    bases = ()
    for stream in tl.static_range(len(DTYPES)):
        base = tl.load(addresses + stream * tensors + tensor).to(tl.pointer_type(DTYPES[stream])) + start
        bases = bases + (base,)
    present = tl.load(addresses + tensors + tensor) != 0
    is_aligned = (tl.load(addresses + len(DTYPES) * tensors + tensor) != 0) & (start % 8 == 0)
    return bases, present, is_aligned


@triton.jit
def numbers(scalars, POINTED: tl.constexpr):
    """Scalars, of which some lie on the device."""
    values = ()
    for scalar in tl.static_range(len(scalars)):
        if POINTED[scalar]:
            values = values + (tl.load(scalars[scalar]),)
        else:
            values = values + (scalars[scalar],)
    return values


@triton.jit
def put_param(base, offsets, mask, value, index, mixed, ROUNDED: tl.constexpr, ALIGNED: tl.constexpr):
    if ROUNDED:
        value = at_random(value, index + offsets, mixed)
    put(base, offsets, mask, value, ALIGNED)


@triton.jit
def update_block(
    update: tl.constexpr,
    bases,
    present,
    at,
    length,
    index,
    mixed,
    scalars,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements ``at ... at + BLOCK`` of a row; a gradient that is not ``present`` is zero."""
    offsets = at + tl.arange(0, BLOCK)
    mask = offsets < length
    streams = (get(bases[0], offsets, mask, ALIGNED), get(bases[1], offsets, mask & present, ALIGNED))
    for stream in tl.static_range(2, len(bases)):
        streams = streams + (get(bases[stream], offsets, mask, ALIGNED),)
    results = update(streams, scalars)
    put_param(bases[0], offsets, mask, results[0], index, mixed, ROUNDED, ALIGNED)
    for state in tl.static_range(1, len(results)):
        put(bases[state + 1], offsets, mask, results[state], ALIGNED)


@triton.jit(do_not_specialize=["tensors", "key"])
def update_rows(
    update: tl.constexpr,
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
    """An elementwise formula on one row of a table.

    Args:
        update: of `ARITHMETIC`.
        DTYPES: of the streams: parameter, gradient, states.
        addresses: int64 (streams + 1, tensors): where each begins, 0 for a gradient that is missing; last, whether all
            of a tensor's are there and aligned.
        tensors: how many.
        rows: int64 (programs, 5): tensor, start, length, and of the first element identity and index, as in `Place`.
        key: of the step, see `ds_optim.kernels.rounding`.
        scalars: of the formula, numbers or pointers to numbers.
        POINTED: which of them are pointers.
        ROUNDED: whether parameters, which then are bf16, are rounded at random.
    """
    row = rows + tl.program_id(0).to(tl.int64) * 5
    tensor, start, length = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    mixed, index = tl.load(row + 3) ^ key, tl.load(row + 4)
    values = numbers(scalars, POINTED)
    bases, present, is_aligned = bases_of(DTYPES, addresses, tensors, tensor, start)
    if is_aligned & (length % 8 == 0):
        whole = length // 8 * 8  # the same: so the compiler knows that masks begin and end at multiples of eight
        for at in range(0, whole, BLOCK):
            update_block(update, bases, present, at, whole, index, mixed, values, ROUNDED, True, BLOCK)
    else:
        for ragged in range(0, length, BLOCK):
            update_block(update, bases, present, ragged, length, index, mixed, values, ROUNDED, False, BLOCK)


# -- Adam-mini: one second moment for a block -------------------------------------------------------------------------


@triton.jit
def advance(square, mean_square, scalars):
    """A block's new state, and what its momentum is multiplied by."""
    _, _, beta2, one_minus_beta2, step_size, bias2_sqrt, eps = scalars
    square = square * beta2 + one_minus_beta2 * mean_square
    return square, tl.div_rn(step_size, tl.div_rn(tl.sqrt_rn(square), bias2_sqrt) + eps)


@triton.jit
def move(bases, present, offsets, mask, factor, index, mixed, scalars, ROUNDED: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements whose blocks' factors are known."""
    param = get(bases[0], offsets, mask, ALIGNED)
    grad = get(bases[1], offsets, mask & present, ALIGNED)
    average = get(bases[2], offsets, mask, ALIGNED)
    average = average + (grad - average) * scalars[1]
    put_param(bases[0], offsets, mask, param * scalars[0] - average * factor, index, mixed, ROUNDED, ALIGNED)
    put(bases[2], offsets, mask, average, ALIGNED)


@triton.jit
def squares(base, present, length, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of a row's gradient, fp64; a part of `BLOCK` elements is added up in fp32."""
    total = tl.zeros((), tl.float64)
    for at in range(0, length, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        grad = get(base, offsets, (offsets < length) & present, ALIGNED)
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
    advanced, factor = advance(tl.load(square), (total / width).to(tl.float32), scalars)
    tl.store(square, advanced)
    for at in range(0, width, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        move(bases, present, offsets, offsets < width, factor, index, mixed, scalars, ROUNDED, ALIGNED)


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
    square = tl.load(addresses + 4 * tensors + tensor).to(tl.pointer_type(tl.float32)) + tl.load(row + 4)
    if is_aligned & (width % 8 == 0):
        wide = width // 8 * 8
        update_wide_block(bases, square, present, wide, index, mixed, values, ROUNDED, True, BLOCK)
    else:
        update_wide_block(bases, square, present, width, index, mixed, values, ROUNDED, False, BLOCK)


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
    bases, present, _ = bases_of(DTYPES, addresses, tensors, tensor, start)
    block, element = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    square = tl.load(addresses + 4 * tensors + tensor).to(tl.pointer_type(tl.float32)) + tl.load(row + 4) + block
    offsets = block[:, None] * width + element[None, :]
    mask = (block < count)[:, None] & (element < width)[None, :]
    grad = get(bases[1], offsets, mask & present, False)
    mean_square = (tl.sum(grad * grad, axis=1).to(tl.float64) / width).to(tl.float32)
    advanced, factor = advance(tl.load(square, mask=block < count, other=0.0), mean_square, values)
    tl.store(square, advanced, mask=block < count)
    move(bases, present, offsets, mask, factor[:, None], index, mixed, values, ROUNDED, False)


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


@triton.jit
def add_up(blocks, partials, cut_sums):
    """Add each cut block's parts, in their order, to its sum over all ranks. ``blocks``: as in `advance_cut`."""
    row = blocks + tl.program_id(0).to(tl.int64) * 6
    sums = cut_sums + tl.load(row + 2)
    total = tl.load(sums)
    for part in range(tl.load(row + 4), tl.load(row + 5)):
        total += tl.load(partials + part)
    tl.store(sums, total)


@triton.jit(do_not_specialize=["tensors"])
def advance_cut(addresses, tensors, blocks, cut_sums, factors, scalars, POINTED: tl.constexpr):
    """The state of one cut block, whose sum is known.

    Args:
        blocks: int64 (programs, 6): tensor, place of its square, place in ``cut_sums``, elements of the whole block,
            first and last row of its parts.
        factors: fp32 (programs,): of the blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    row = blocks + program * 6
    square = tl.load(addresses + 4 * tensors + tl.load(row)).to(tl.pointer_type(tl.float32)) + tl.load(row + 1)
    mean_square = (tl.load(cut_sums + tl.load(row + 2)) / tl.load(row + 3)).to(tl.float32)
    advanced, factor = advance(tl.load(square), mean_square, numbers(scalars, POINTED))
    tl.store(square, advanced)
    tl.store(factors + program, factor)


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
        whole = length // 8 * 8
        for at in range(0, whole, BLOCK):
            offsets = at + tl.arange(0, BLOCK)
            move(bases, present, offsets, offsets < whole, factor, index, mixed, values, ROUNDED, True)
    else:
        for ragged in range(0, length, BLOCK):
            singly = ragged + tl.arange(0, BLOCK)
            move(bases, present, singly, singly < length, factor, index, mixed, values, ROUNDED, False)
