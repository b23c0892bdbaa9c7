"""A Triton program that is compiled to see whether any can be. Importing this needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def halve(values, roots):
    """What optimizers need: a load, a root and a division that round once, a store."""
    tl.store(roots, tl.div_rn(tl.sqrt_rn(tl.load(values)), 2.0))


def compile_one() -> None:
    """Compile for the accelerator here, and launch nothing."""
    halve.warmup(torch.float32, torch.float32, grid=(1,))
