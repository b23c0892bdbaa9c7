"""State in eight bits (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2110.02861), number by number.

dynamic code: a number in [-1, 1] is a sign, a decade 10^-e (e = 0 .. 6) and the middle of one of equal parts of
[0.1, 1]: 2^(6 - e) parts, 2^(7 - e) where no sign is needed; besides 0 and 1. Largest magnitude of 256 elements: scale.
"""

from __future__ import annotations

import bisect
import itertools
import math

import torch
from torch import Tensor

BLOCK = 256


def dynamic_code(is_signed: bool) -> list[float]:
    """The 256 numbers, ascending; each is an fp32 number."""
    positive = []
    for exponent in range(7):
        parts = 2 ** (6 - exponent) if is_signed else 2 ** (7 - exponent)
        edges = [0.1 + 0.9 * k / parts for k in range(parts + 1)]
        positive += [10**-exponent * (low + high) / 2 for low, high in itertools.pairwise(edges)]
    listed = [*positive, *(-value for value in positive if is_signed), 0.0, 1.0]
    return sorted(torch.tensor(listed, dtype=torch.float64).float().tolist())


def _nearest(table: list[float], value: float) -> float:
    at = bisect.bisect_left(table, value)
    near = table[max(at - 1, 0) : at + 1]
    return min(near, key=lambda one: (abs(one - value), abs(one)))


def kept(values: Tensor, *, is_signed: bool) -> Tensor:
    """What is left of a parameter's state once it was kept in eight bits, fp32 of the same shape."""
    table, flat, found = dynamic_code(is_signed), values.flatten().tolist(), []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        scale = torch.tensor(max(abs(value) for value in block)).float()
        if any(not math.isfinite(value) for value in block):
            found += [math.nan] * len(block)
        elif scale < 2.0**-126:
            found += [0.0] * len(block)
        else:
            scaled = (torch.tensor(block).float() * (1 / scale)).tolist()
            numbers = [_nearest(table, value) for value in scaled]
            if not is_signed:  # a positive value stays positive
                numbers = [max(one, table[1]) if value > 0 else one for one, value in zip(numbers, block, strict=True)]
            found += (torch.tensor(numbers).float() * scale).tolist()
    return torch.tensor(found, dtype=torch.float32).view(values.shape)
