"""The programs that Triton compiles. Importing this needs triton.

One launch updates the elements of any number of tensors. A program has one row of a table, at most `ROW` elements of
one tensor; where the tensor's streams are, stands in a second table. Rows of exactly `ROW` elements whose streams all
begin at multiples of 16 bytes are read and written 128 bits at a time; edges, and what lies otherwise, one by one.

Arithmetic is that of the C++ kernels, operation by operation: quotients and roots are rounded to nearest, and products
are not fused with sums (``enable_fp_fusion=False``), so that an element's result does not depend on its row.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROW = 4096
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
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(base + offsets, 16), 1024)
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


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
    if ALIGNED:
        tl.store(tl.max_contiguous(tl.multiple_of(base + offsets, 16), 1024), value)
    else:
        tl.store(base + offsets, value, mask=mask)


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
    param = results[0]
    if ROUNDED:
        put(bases[0], offsets, mask, at_random(param, index + offsets, mixed), ALIGNED)
    else:
        put(bases[0], offsets, mask, param, ALIGNED)
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
    scalars,
    POINTED: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROW: tl.constexpr,
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
    values = ()
    for scalar in tl.static_range(len(scalars)):
        if POINTED[scalar]:
            values = values + (tl.load(scalars[scalar]),)
        else:
            values = values + (scalars[scalar],)
    bases = ()
    for stream in tl.static_range(len(DTYPES)):
        base = tl.load(addresses + stream * tensors + tensor).to(tl.pointer_type(DTYPES[stream])) + start
        bases = bases + (base,)
    present = tl.load(addresses + tensors + tensor) != 0
    is_aligned = tl.load(addresses + len(DTYPES) * tensors + tensor) != 0
    if is_aligned & (length == ROW) & (start % 8 == 0):
        for at in range(0, ROW, BLOCK):
            update_block(update, bases, present, at, length, index, mixed, values, ROUNDED, True, BLOCK)
    else:
        for ragged in range(0, length, BLOCK):
            update_block(update, bases, present, ragged, length, index, mixed, values, ROUNDED, False, BLOCK)
