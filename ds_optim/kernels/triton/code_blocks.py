"""Triton's programs for state in eight bits, see `ds_optim.kernels.codes`. Importing this needs triton.

A program takes some whole blocks of codes, a row of its tile each, or what is here of a block that a shard boundary
cuts. Arithmetic is that of the C++ kernels, operation by operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_optim.kernels.codes import BLOCK
from ds_optim.kernels.triton.access import bases_of, get, get_grad, numbers, put, put_param

CODES = tl.constexpr(BLOCK)


@triton.jit
def decoded(codes, values, scales):
    """What a tile of bytes (blocks, elements) stands for, by the ``values`` of all 256, fp32."""
    return tl.load(values + codes.to(tl.int32)) * scales[:, None]


@triton.jit
def scales_of(largest):
    """The scales of blocks whose largest magnitudes have these bits: NaN of what is not finite, zero of subnormals."""
    bits = tl.where(largest < 0x7F800000, largest, 0x7FC00000)
    return tl.where(bits < 0x00800000, 0, bits).to(tl.float32, bitcast=True)


@triton.jit
def encoded(block, scales, places, first, SIGNED: tl.constexpr):
    """The bytes of a tile of values (blocks, elements), by ``places`` from ``first`` on."""
    usable = scales > 0  # neither zero nor NaN
    factors = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scales, 1.0)), 0.0)
    bits = tl.where(usable[:, None], block * factors[:, None], 0.0).to(tl.int32, bitcast=True)
    magnitudes = tl.minimum(bits & 0x7FFFFFFF, 0x3F800000)
    words = tl.load(places + tl.maximum((magnitudes >> 16) - first, 0))
    found = (words >> 16) + ((magnitudes & 0xFFFF) > (words & 0xFFFF)).to(tl.int32)
    if SIGNED:
        found = tl.where(bits < 0, 256 - tl.minimum(found, 127), found) & 0xFF
    else:
        is_positive = usable[:, None] & (block.to(tl.int32, bitcast=True) > 0)
        found = tl.maximum(found, is_positive.to(tl.int32))
    return found.to(tl.uint8)


@triton.jit
def update_block_rows(
    update: tl.constexpr,
    bases,
    scales,
    present,
    length,
    count,
    place,
    maxima,
    index,
    mixed,
    values,
    places,
    FIRST: tl.constexpr,
    SIGNED: tl.constexpr,
    scalars,
    KNOWN: tl.constexpr,
    ONLY_MAXIMA: tl.constexpr,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    COUNT: tl.constexpr,
):
    """``count`` blocks of ``length`` elements; where their largest magnitudes are ``KNOWN``, they are at ``place``."""
    states: tl.constexpr = len(bases) - 2
    within = tl.arange(0, CODES)
    blocks = tl.arange(0, COUNT)
    here = blocks < count
    offsets = blocks[:, None] * length + within[None, :]
    mask = here[:, None] & (within < length)[None, :]
    streams = (get(bases[0], offsets, mask, ALIGNED), get_grad(bases[1], offsets, mask, present, ALIGNED))
    for state in tl.static_range(states):
        scale = tl.load(scales[state] + blocks, mask=here, other=0.0)
        codes = tl.load(bases[state + 2] + offsets, mask=mask, other=0)
        streams = streams + (decoded(codes, values[state], scale),)
    results = update(streams, scalars)
    if not ONLY_MAXIMA:
        put_param(bases[0], offsets, mask, results[0], index, mixed, ROUNDED, ALIGNED)
    for state in tl.static_range(states):
        new = tl.where(mask, results[state + 1], 0.0)
        largest = tl.max(new.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        if ONLY_MAXIMA:
            tl.atomic_max(maxima + (place * states + state) + blocks, largest, mask=here)
        else:
            if KNOWN:
                largest = tl.load(maxima + (place * states + state) + blocks, mask=here, other=0)
            now = scales_of(largest)
            tl.store(scales[state] + blocks, now, mask=here)
            put(bases[state + 2], offsets, mask, encoded(new, now, places[state], FIRST[state], SIGNED[state]), False)


@triton.jit(do_not_specialize=["tensors", "key"])
def update_codes(
    update: tl.constexpr,
    DTYPES: tl.constexpr,
    addresses,
    tensors,
    rows,
    maxima,
    key,
    ROUNDED: tl.constexpr,
    values,
    places,
    FIRST: tl.constexpr,
    SIGNED: tl.constexpr,
    scalars,
    POINTED: tl.constexpr,
    KNOWN: tl.constexpr,
    ONLY_MAXIMA: tl.constexpr,
    COUNT: tl.constexpr,
):
    """An elementwise formula on the blocks of codes of one row of a table.

    Args:
        update: of `ds_optim.kernels.triton.elements.ARITHMETIC`.
        DTYPES: of the streams: parameter, gradient, codes.
        addresses: int64 (streams + 1 + states, tensors): where each begins, 0 for a gradient that is missing; whether
            all of a tensor's are there and aligned; where scales begin.
        rows: int64 (programs, 8): tensor, start, elements of a block, blocks, slot of the first, place of its maxima,
            and of the first element identity and index, as in `Place`.
        maxima: int32 (cut blocks, states).
        values: by state, what its bytes stand for.
        places: by state, where its boundaries are, less ``FIRST``.
        KNOWN: whether the blocks are cut: their largest magnitudes are in ``maxima``.
        ONLY_MAXIMA: enter them there, and do nothing else.
        COUNT: blocks of a row at most.
    """
    row = rows + tl.program_id(0).to(tl.int64) * 8
    tensor, start, length, count = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    slot, place = tl.load(row + 4), tl.load(row + 5)
    mixed, index = tl.load(row + 6) ^ key, tl.load(row + 7)
    known = numbers(scalars, POINTED)
    bases, present, is_aligned = bases_of(DTYPES, addresses, tensors, tensor, start)
    scales = ()
    for state in tl.static_range(len(DTYPES) - 2):
        at = addresses + (len(DTYPES) + 1 + state) * tensors + tensor
        scales = scales + (tl.load(at).to(tl.pointer_type(tl.float32)) + slot,)
    if is_aligned & (length == CODES):
        update_block_rows(
            update, bases, scales, present, CODES, count, place, maxima, index, mixed, values, places, FIRST, SIGNED,
            known, KNOWN, ONLY_MAXIMA, ROUNDED, True, COUNT,
        )  # fmt: skip
    else:
        update_block_rows(
            update, bases, scales, present, length, count, place, maxima, index, mixed, values, places, FIRST, SIGNED,
            known, KNOWN, ONLY_MAXIMA, ROUNDED, False, COUNT,
        )  # fmt: skip
