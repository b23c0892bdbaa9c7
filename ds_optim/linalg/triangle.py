r""":math:`X X^\top` of stacks by one of its triangles, on accelerators: half the flops of a general product.

A Triton program has a tile of the lower triangle, adds it up in fp32 and writes it and its mirror image. It serves
products in TF32 and bf16, where there are tensor cores for them; in fp32, torch's own is left alone.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ds_optim.known_torch import current, triton_problem

TILE = 128  # rows and columns of a program's tile
DEPTH = 128  # bytes of a row at a time: three stages are 96 KiB at most, where NVIDIA's have 99, and on gfx942 64 of 64
OPTIONS = {"num_warps": 8, "num_stages": 3}
SMALLEST = 512  # rows: below, tiles are too few to fill a device, and torch's batched product wins anyway


def serves(stack: Tensor) -> bool:
    """Whether products of this stack go this way: on a GPU that it is made for, of matrices that are worth it, unless
    ``DS_OPTIM_KERNELS`` names another backend than ``triton``."""
    return (
        stack.device.type == "cuda"
        and stack.shape[1] >= SMALLEST
        and os.environ.get("DS_OPTIM_KERNELS", "") in ("", "triton")
        and not triton_problem()
        and has_tensor_cores(stack.device)
    )


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether a GPU has some for TF32 and bf16: NVIDIA's from sm_80 on, of AMD's gfx942."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
            *(stack, out, rows, columns, *stack.stride(), TILE, DEPTH // stack.itemsize), **OPTIONS
        )
    return out


@cache
def program() -> Any:
    """What is launched; importing it needs triton."""
    from ds_optim.linalg.triangle_program import lower_triangle

    return lower_triangle
