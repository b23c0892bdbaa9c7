"""Stochastic rounding of fp32 results to bf16 parameters: up or down at random, so that on average nothing is lost.

bf16 keeps 8 significant bits: rounded to nearest, a weight loses every update below 1/512 of itself. Here the low half
of the fp32 result is the probability, in units of 2^-16, that its high half goes up to the next number of bf16 (away
from zero, as the result is sign and magnitude); infinities, NaN and the largest finite number never go up.

The random bits are no generator's: they are a hash of where an element is. So they need no state, and are the same
however the parameter is cut over ranks, spans or threads, on every backend::

    identity = 64 bits of BLAKE2 of the parameter's name       key = 64 bits of BLAKE2 of (seed, step)
    k = identity ^ key                                         i = the element's row-major index in the whole parameter

    x = i[31:0] ^ P(k[31:0])
    x = (x ^ x >> 15) * 0x2c1b3c6d
    x = x ^ P(k[63:32] ^ i[63:32])
    x = (x ^ x >> 12) * 0x297a2d39
    noise = (x ^ x >> 15) >> 16

all modulo 2^32, where P is prospector32 of C. Wellons, https://github.com/skeeto/hash-prospector: the lines above
without what enters from k and i's high half. That half way enters a second word of the key makes the noise of two
steps, or of two parameters, more than one table in another order.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x2C1B3C6D, 0x297A2D39  # below 2^31: in int64 no product of a word overflows
_LARGEST = 0x7F7F0000  # the largest finite bf16; what has a larger pattern is infinite, NaN, or rounds down

Words: TypeAlias = tuple[()] | tuple[int, int, int]
"""How elements that lie one behind another are rounded: to nearest, or by (identity, index of the first, key)."""


class Place(NamedTuple):
    """The stretch ``[start, start + length)`` of a local tensor, elements ``first ...`` of one parameter.

    Attributes:
        tensor: index of the local tensor in a call.
        identity: of the parameter, see `identity_of`.
    """

    tensor: int
    start: int
    length: int
    identity: int
    first: int


class Places:
    """Which element of which parameter every element of a call's local tensors is.

    Attributes:
        rows: ascending by tensor and start; what they leave out is never rounded.
        table: the same as an int64 CPU tensor (n, 5), for the C++ kernels.
    """

    def __init__(self, rows: Sequence[Place]) -> None:
        self.rows = sorted(rows)
        self.table = torch.tensor(self.rows, dtype=torch.int64, device="cpu").reshape(-1, 5)
        self._begins = [row[:2] for row in self.rows]
        self._narrowed: dict[tuple[tuple[int, int, int, int], ...], Places] = {}

    def at(self, tensor: int, start: int) -> Place:
        """The place of an element and of what follows it.

        Raises:
            ValueError: no place holds it.
        """
        index = bisect_right(self._begins, (tensor, start)) - 1
        if index >= 0:
            found = self.rows[index]
            skipped = start - found.start
            if found.tensor == tensor and skipped < found.length:
                return Place(tensor, start, found.length - skipped, found.identity, found.first + skipped)
        raise ValueError(f"element {start} of tensor {tensor} has no place in a parameter")

    def within(self, tensor: int, start: int, length: int) -> Iterator[Place]:
        """A stretch of a local tensor, cut where a parameter ends."""
        stop = start + length
        while start < stop:
            place = self.at(tensor, start)
            yield place._replace(length=min(place.length, stop - start))
            start += place.length

    def narrowed(self, stretches: Mapping[int, tuple[int, int, int]]) -> Places:
        """Of stretches that become tensors of their own, see `Rounding.narrowed`; the same ones are the same object."""
        key = tuple((index, *stretch) for index, stretch in stretches.items())
        if key not in self._narrowed:
            self._narrowed[key] = Places(
                [
                    place._replace(tensor=index, start=place.start - start)
                    for index, tensor, start, length in key
                    for place in self.within(tensor, start, length)
                ]
            )
        return self._narrowed[key]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a call rounds its bf16 parameters; other dtypes, and state, are rounded to nearest as ever.

    Attributes:
        key: of the step, see `key_of`.
        places: of all bf16 parameters of the call.
    """

    key: int
    places: Places

    def narrowed(self, stretches: Mapping[int, tuple[int, int, int]]) -> Rounding:
        """The same for stretches ``(tensor, start, length)`` that become tensors of their own, by their new index."""
        return Rounding(self.key, self.places.narrowed(stretches))


def identity_of(name: str) -> int:
    """64 bits, signed, that stand for a parameter."""
    return _hashed(name)


def key_of(seed: int, step: int) -> int:
    """64 bits, signed, that stand for a step (from 1) of a run."""
    return _hashed(f"{seed} {step}")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _prospector(x: Any) -> Any:
    x = (x ^ (x >> 15)) * _FIRST & _WORD
    x = (x ^ (x >> 12)) * _SECOND & _WORD
    return x ^ (x >> 15)


def noise(index: Tensor, identity: int | Tensor, key: int | Tensor) -> Tensor:
    """16 random bits for every element, int64 of the shape of ``index``.

    Args:
        index: int64, row-major in the whole parameter.
        identity, key: numbers, or 0-dim int64 tensors.
    """
    mixed: Any = identity ^ key
    x: Any = (index & _WORD) ^ _prospector(mixed & _WORD)
    x = (x ^ (x >> 15)) * _FIRST & _WORD
    x = x ^ _prospector((mixed >> 32 & _WORD) ^ (index >> 32))
    x = (x ^ (x >> 12)) * _SECOND & _WORD
    bits: Tensor = (x ^ (x >> 15)) >> 16
    return bits


def indices(like: Tensor, first: int | Tensor) -> Tensor:
    """The indices of elements that lie ``like`` that strided view of a row-major parameter, from ``first`` on."""
    found = torch.zeros((), dtype=torch.int64, device=like.device) + first
    for dim, (size, stride) in enumerate(zip(like.shape, like.stride(), strict=True)):
        along = torch.arange(size, dtype=torch.int64, device=like.device) * stride
        found = found + along.view(-1, *(1 for _ in range(like.dim() - 1 - dim)))
    return found


def rounded(values: Tensor, noise: Tensor) -> Tensor:
    """fp32 ``values``, each replaced by one of its two neighbours in bf16 (by itself, if it is one)."""
    bits = values.view(torch.int32)
    carry = ((bits & 0xFFFF) + noise.to(torch.int32)) >> 16
    carry = torch.where((bits & 0x7FFFFFFF) < _LARGEST, carry, 0)
    result = ((bits & -0x10000) + (carry << 16)).view(torch.float32)
    return torch.where(values.isnan(), values, result)


def store(target: Tensor, values: Tensor, words: Sequence[int | Tensor]) -> None:
    """Write fp32 ``values`` to ``target``, stochastically rounded if that is bf16 and if there are ``words``.

    Args:
        target: a strided view of a row-major parameter.
        values: of the same shape.
        words: nothing, or (identity, index of the target's first element, key), as `noise` and `indices` take them.
    """
    if words and target.dtype == torch.bfloat16:
        identity, first, key = words
        values = rounded(values, noise(indices(target, first), identity, key))
    target.copy_(values)
