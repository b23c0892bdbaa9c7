"""How Triton's programs read and write the streams of many tensors. Importing this needs triton.

A program has one row of a table: some elements of one tensor, or some of its blocks; where the tensor's streams are,
stands in a second table. Rows and blocks of whole multiples of eight elements, whose streams all begin at multiples of
16 bytes, are read and written 128 bits at a time; edges, and what lies otherwise, one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl

THREADS = 128  # of a program: four warps, or two where a warp has 64
BLOCK = 8 * THREADS  # elements at a time, so that two bytes each make 128 bits; of four bytes half as many do


@triton.jit
def pointers(base, offsets, ALIGNED: tl.constexpr):
    """Of elements in a row, or in rows of a tile, which then all begin aligned."""
    found = base + offsets
    if ALIGNED:
        if len(found.shape) == 2:
            found = tl.max_contiguous(tl.multiple_of(found, (1, 16)), (1, 1024))
        else:
            found = tl.max_contiguous(tl.multiple_of(found, 16), 1024)
    return found


@triton.jit
def get(base, offsets, mask, ALIGNED: tl.constexpr):
    return tl.load(pointers(base, offsets, ALIGNED), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def get_grad(base, offsets, mask, present, ALIGNED: tl.constexpr):
    """Zero where there is none."""
    return get(base, offsets, tl.where(present, mask, False), ALIGNED)  # Triton 3.9's interpreter cannot & a scalar


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
    tl.store(pointers(base, offsets, ALIGNED), value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def prospector(x):
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    return x ^ (x >> 15)


@triton.jit
def at_random(values, index, mixed):
    """bf16, rounded by the noise of `ds_optim.kernels.rounding`."""
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
def put_param(base, offsets, mask, value, index, mixed, ROUNDED: tl.constexpr, ALIGNED: tl.constexpr):
    if ROUNDED:
        value = at_random(value, index + offsets, mixed)
    put(base, offsets, mask, value, ALIGNED)


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
