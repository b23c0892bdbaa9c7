"""Triton's programs for formulas of single elements. Importing this needs triton.

Arithmetic is that of the C++ kernels, operation by operation: quotients and roots are rounded to nearest, and products
are not fused with sums (``enable_fp_fusion=False``), so that an element's result does not depend on its row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_optim.kernels.triton.access import bases_of, get, get_grad, numbers, put, put_param


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


@triton.jit
def momentum(streams, scalars):
    gradient, _, before = streams
    beta, weight, of_average, of_gradient = scalars
    average = before * beta + gradient * weight
    mixed = average * of_average + gradient * of_gradient
    is_number = gradient == gradient
    return tl.where(is_number, mixed, 0.0), tl.where(is_number, average, before)


@triton.jit
def adam_graft(streams, scalars):
    gradient, _, before, square_before = streams
    beta1, one_minus_beta1, beta2, one_minus_beta2, bias1, bias2, eps = scalars
    average = before * beta1 + gradient * one_minus_beta1
    square = square_before * beta2 + (gradient * gradient) * one_minus_beta2
    step = tl.div_rn(tl.div_rn(average, bias1), tl.sqrt_rn(tl.div_rn(square, bias2)) + eps)
    is_number = gradient == gradient
    return (
        tl.where(is_number, step, 0.0),
        tl.where(is_number, average, before),
        tl.where(is_number, square, square_before),
    )


ARITHMETIC = {"adamw": adamw, "lion": lion, "adan": adan, "momentum": momentum, "adam_graft": adam_graft}


@triton.jit
def update_row(
    update: tl.constexpr,
    bases,
    present,
    length,
    index,
    mixed,
    scalars,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements of a row; a gradient that is not ``present`` is zero."""
    for at in range(0, length, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        mask = offsets < length
        streams = (get(bases[0], offsets, mask, ALIGNED), get_grad(bases[1], offsets, mask, present, ALIGNED))
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
        update_row(update, bases, present, whole, index, mixed, values, ROUNDED, True, BLOCK)
    else:
        update_row(update, bases, present, length, index, mixed, values, ROUNDED, False, BLOCK)


@triton.jit
def update_all(
    update: tl.constexpr,
    streams,
    numel,
    scalars,
    POINTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """An elementwise formula on a row of tensors that are known without a table; there is no gradient beside them.

    Args:
        streams: parameter, states.
        numel: of each.
        ALIGNED: whether they all begin at multiples of 16 bytes.
    """
    start = tl.program_id(0).to(tl.int64) * ROW
    length = tl.minimum(numel - start, ROW)
    bases = (streams[0] + start, streams[0] + start)
    for stream in tl.static_range(1, len(streams)):
        bases = bases + (streams[stream] + start,)
    values = numbers(scalars, POINTED)
    if ALIGNED:
        whole = length // 8 * 8  # the rest is the last row's
        update_row(update, bases, False, whole, start, start, values, False, True, BLOCK)
        rest = ()
        for stream in tl.static_range(len(bases)):
            rest = rest + (bases[stream] + whole,)
        update_row(update, rest, False, length - whole, start, start, values, False, False, 8)
    else:
        update_row(update, bases, False, length, start, start, values, False, False, BLOCK)


@triton.jit(do_not_specialize=["key", "identity", "first"])
def descend_rows(
    target,
    update,
    rows,
    columns,
    stride,
    decay,
    POINTED: tl.constexpr,
    identity,
    first,
    key,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``target <- decay target - update``: some columns of one row of a strided view.

    Args:
        target: the rows ``stride`` elements apart.
        update: fp32, contiguous.
        first: index of the view's first element.
        ROUNDED: whether the target, which then is bf16, is rounded at random.
    """
    tiles = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    offsets = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < columns
    factor = numbers((decay,), (POINTED,))[0]
    moved = tl.load(target + row * stride + offsets, mask=mask, other=0.0).to(tl.float32) * factor
    moved = moved - tl.load(update + row * columns + offsets, mask=mask, other=0.0)
    base, mixed = target + row * stride, identity.to(tl.int64) ^ key
    put_param(base, offsets, mask, moved, first + row * stride, mixed, ROUNDED, False)
