r""":math:`X X^\top` of stacks by one of its triangles, on accelerators: half the flops of a general product.

A Triton program has a tile of the lower triangle, adds it up in fp32 and writes it and its mirror image. It serves
products in TF32 and bf16, which run on tensor cores; in fp32, torch's own is left alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ds_optim.known_torch import current, triton_problem

TILE, DEPTH = 128, 64  # rows and columns of a program's tile, and of what it multiplies at a time
OPTIONS = {"num_warps": 8, "num_stages": 3}
SMALLEST = 512  # rows: below, tiles are too few to fill a device, and torch's batched product wins anyway


def serves(stack: Tensor) -> bool:
    """Whether products of this stack go this way: on a GPU that Triton compiles for, of matrices that are worth it."""
    return stack.device.type == "cuda" and stack.shape[1] >= SMALLEST and not triton_problem()


def times_own_transpose(stack: Tensor, *, out: Tensor) -> Tensor:
    """``stack @ stack.mT``, exactly symmetric.

    Args:
        stack: (B, s, l) fp32, whose operands are read as TF32, or bf16; any strides.
        out: (B, s, s) fp32 or bf16, contiguous; is returned. Sums are fp32, rounded to its dtype once.
    """
    batch, rows, columns = stack.shape
    tiles = -(-rows // TILE)
    with current(stack.device):
        program()[(tiles * (tiles + 1) // 2, batch)](
            *(stack, out, rows, columns, *stack.stride(), TILE, DEPTH), **OPTIONS
        )
    return out


@cache
def program() -> Any:
    """What is launched; importing it needs triton."""
    from ds_optim.linalg.triangle_program import lower_triangle

    return lower_triangle
