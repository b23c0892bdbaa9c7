r"""State in eight bits: the dynamic code, its tables, and how values become codes and codes values.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861 (sections 1.3, 2.1 and
2.2). A block of `BLOCK` consecutive elements of a *parameter* shares a scale, its largest magnitude, in fp32; an
element is a byte that stands for a number in [-1, 1] times that. The numbers are dense where moments are, over seven
decades: :math:`10^{-e}` (:math:`e` from 0 to 6) times 0.1 to 1 is cut into :math:`2^{6-e}` equal parts
(:math:`2^{7-e}` without a sign), each stood for by its middle. These, negated too for a signed code, zero and one are
the 256.

    signed      byte b: the b-th of zero, the middles and one; 256 - b: the same below zero, where there is no -1
    unsigned    byte b: the b-th of zero, the middles and one

So a byte of zero is zero under either code, and state that was just made is, as ever, all zero. A value becomes the
nearest number; of two that are equally near, the smaller. But under the unsigned code a positive value never becomes
zero, so that a root of it never divides by eps alone while the first moment beside it survives: it is byte 1 at least.
The bits of the value itself decide, not its quotient, which may underflow. A block whose largest magnitude is below the
smallest normal fp32 becomes zero all the same. One with a value that is not finite has the scale NaN, and so is NaN
throughout: no byte could say it of one element.

Every backend does the same fp32 operations: one quotient per block, then one product and comparisons per element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal

import torch
from torch import Tensor

BLOCK = 256
"""Elements of a block."""

Code = Literal["signed", "unsigned"]
"""Of state that may have either sign, or of state that is never below zero."""

_DECADES = 7
_SMALLEST = 2.0**-126
_MAGNITUDE, _INFINITE, _ONE = 0x7FFFFFFF, 0x7F800000, 0x3F800000  # bits of fp32
_LOW = 16  # bits of a magnitude that `places` compares, below those that it is looked up by


@cache
def magnitudes(code: Code) -> Tensor:
    """What a code can say of a magnitude: ascending fp32 from 0 to 1, 129 of a signed code and 256 of an unsigned."""
    found = [0.0]
    for decade in range(_DECADES - 1, -1, -1):
        parts = 2 ** (_DECADES - 1 - decade + (code == "unsigned"))
        found += [(0.1 + 0.9 * (2 * part + 1) / (2 * parts)) / 10**decade for part in range(parts)]
    return torch.tensor([*found, 1.0], dtype=torch.float32, device="cpu")


@cache
def values(code: Code) -> Tensor:
    """What each of the 256 bytes stands for, fp32."""
    found = magnitudes(code)
    return found if code == "unsigned" else torch.cat([found, -found[1:-1].flip(0)])


@cache
def boundaries(code: Code) -> Tensor:
    """Ascending fp32: a magnitude is the k-th (from 0) if k of these are below it.

    The middle of two numbers is seldom an fp32 number. It is rounded down: what is above it in fp32 is above it.
    """
    found = magnitudes(code).double()
    middles = (found[:-1] + found[1:]) / 2
    nearest = middles.float()
    return torch.where(nearest > middles, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


@cache
def places(code: Code) -> Tensor:
    """The boundaries as other backends look them up, int32 (n,).

    The upper half of a magnitude's bits, less `first_place`, is an index: what is found there has the number of
    boundaries below all magnitudes of that upper half in its own upper half, and in its lower one the lower half of the
    one boundary that is among them, or a number that no lower half exceeds.
    """
    bits = boundaries(code).view(torch.int32).tolist()
    listed = []
    for upper in range(first_place(code), (_ONE >> _LOW) + 1):
        among = [one & 0xFFFF for one in bits if one >> _LOW == upper]
        assert len(among) < 2, "two boundaries have the same upper half"
        below = sum(one >> _LOW < upper for one in bits)
        listed.append(below << _LOW | (among[0] if among else 0xFFFF))
    return torch.tensor(listed, dtype=torch.int32, device="cpu")


@cache
def first_place(code: Code) -> int:
    """The upper half of the bits of all magnitudes that are zero; smaller ones count as this."""
    return (int(boundaries(code)[0].view(torch.int32)) >> _LOW) - 1


def blocks_of(numel: int) -> int:
    """How many blocks so many elements have."""
    return -(-numel // BLOCK)


_sent: dict[tuple[Callable[[Code], Tensor], Code, torch.device], Tensor] = {}


def table(of: Callable[[Code], Tensor], code: Code, device: torch.device) -> Tensor:
    """`values`, `boundaries` or `places` on a device; sent there once."""
    key = of, code, device
    if key not in _sent:
        _sent[key] = of(code).to(device)
    return _sent[key]


def kept() -> list[Tensor]:
    """The tables that lie on devices."""
    return list(_sent.values())


def decode(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """The values of codes, fp32 of their shape.

    Args:
        codes: uint8.
        scales: fp32, broadcast against them.
    """
    return table(values, code, codes.device)[codes.int()] * scales


def maxima(block_BE: Tensor) -> Tensor:
    """The largest magnitude of each row, as the bits of an fp32 number: int32 (B,), in whose order NaN is the largest.

    Of these the largest over several ranks is the same on all of them, NaN included.
    """
    return (block_BE.view(torch.int32) & _MAGNITUDE).amax(1)


def scales_of(maxima: Tensor) -> Tensor:
    """The scales (fp32) of blocks of these `maxima`."""
    found = torch.where(maxima < _INFINITE, maxima, 0x7FC00000).view(torch.float32)
    return torch.where(found < _SMALLEST, 0.0, found)


def encode(block_BE: Tensor, scales: Tensor, code: Code) -> Tensor:
    """The codes (uint8) of fp32 values in blocks of these scales (B,)."""
    usable = (scales > 0)[:, None]  # neither zero nor NaN
    scaled = torch.where(usable, block_BE * (1 / scales)[:, None], 0.0)
    numbers = torch.bucketize(scaled.abs(), table(boundaries, code, scaled.device), out_int32=True)
    if code == "signed":
        numbers = torch.where(scaled < 0, 256 - numbers.clamp(max=127), numbers) & 0xFF
    else:
        numbers = torch.where(usable & (block_BE.view(torch.int32) > 0), numbers.clamp(min=1), numbers)
    return numbers.to(torch.uint8)


def decode_rows(codes_BE: Tensor, scales: Tensor, code: Code) -> Tensor:
    """Rows that each are blocks of codes one behind another, the last one as long as there are elements: fp32 (B, E).

    Args:
        codes_BE: uint8 (B, E).
        scales: fp32 (B, blocks).
    """
    found = torch.empty(codes_BE.shape, dtype=torch.float32, device=codes_BE.device)
    for part, blocks in _parts_of_rows(codes_BE.shape[1]):
        codes = codes_BE[:, part].unflatten(1, (blocks.stop - blocks.start, -1))
        found[:, part] = decode(codes, scales[:, blocks, None], code).flatten(1)
    return found


def encode_rows(values_BE: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """The reverse: codes (B, E) and scales (B, blocks) of fp32 rows."""
    rows, numel = values_BE.shape
    codes = torch.empty(rows, numel, dtype=torch.uint8, device=values_BE.device)
    scales = torch.empty(rows, blocks_of(numel), dtype=torch.float32, device=values_BE.device)
    for part, blocks in _parts_of_rows(numel):
        width = (part.stop - part.start) // (blocks.stop - blocks.start)
        values = values_BE[:, part].reshape(-1, width)
        found = scales_of(maxima(values))
        scales[:, blocks] = found.view(rows, -1)
        codes[:, part] = encode(values, found, code).view(rows, -1)
    return codes, scales


def _parts_of_rows(numel: int) -> Iterator[tuple[slice, slice]]:
    """Elements and blocks of the whole blocks of a row, and of what is left."""
    whole = numel // BLOCK
    if whole:
        yield slice(0, whole * BLOCK), slice(0, whole)
    if numel % BLOCK:
        yield slice(whole * BLOCK, numel), slice(whole, whole + 1)
