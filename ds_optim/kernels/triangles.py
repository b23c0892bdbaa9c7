"""Symmetric fp32 matrices on a CPU, copied from and to their packed lower triangles by C++ on all threads.

The same as the functions of `ds_optim.linalg.packed`, several times faster: rows are copied whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_optim.kernels.native import library


def pack(stack: Tensor, *, out: Tensor) -> Tensor:
    """The lower triangles of a stack (B, n, n), into (B, n (n + 1) / 2), which is returned.

    Raises:
        ValueError: as for `unpack`.
    """
    _check(out, stack)
    library().ds_optim_pack(stack.data_ptr(), out.data_ptr(), *stack.shape[:2], torch.get_num_threads())
    torch.autograd.graph.increment_version(out)
    return out


def unpack(packed: Tensor, *, out: Tensor) -> Tensor:
    """The matrices of which (B, n (n + 1) / 2) are the lower triangles, into (B, n, n), which is returned.

    Raises:
        ValueError: a tensor is not fp32 and contiguous on a CPU, or they do not belong together.
    """
    return _unpack(packed, out, both=True)


def unpack_lower(packed: Tensor, *, out: Tensor) -> Tensor:
    """As `unpack` on and below the diagonal; what is above it stays."""
    return _unpack(packed, out, both=False)


def _unpack(packed: Tensor, out: Tensor, *, both: bool) -> Tensor:
    _check(packed, out)
    library().ds_optim_unpack(packed.data_ptr(), out.data_ptr(), *out.shape[:2], int(both), torch.get_num_threads())
    torch.autograd.graph.increment_version(out)
    return out


def _check(packed: Tensor, squares: Tensor) -> None:
    count, order, columns = squares.shape
    belong = order == columns and packed.shape == (count, order * (order + 1) // 2)
    if not belong or any(
        one.dtype != torch.float32 or one.device.type != "cpu" or not one.is_contiguous() for one in (packed, squares)
    ):
        raise ValueError(
            "the C++ kernels copy contiguous fp32 matrices on the CPU from and to their lower triangles, not "
            f"{tuple(packed.shape)} {packed.dtype} and {tuple(squares.shape)} {squares.dtype}"
        )
