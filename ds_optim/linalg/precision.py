"""What products of matrices may lose: the ``matmul_precision`` of whole-matrix rules.

============  ==========================  ==========================================================================
precision     operands of a product       where
============  ==========================  ==========================================================================
``"ieee"``    fp32, 24 bits               the default: nothing is lost
``"tf32"``    fp32, cut to 11 bits        about eight times ieee's rate on GPUs since sm_80
``"bf16"``    bf16, 8 bits                twice that; Newton-Schulz keeps its iterates in bf16, as Muon's users do
============  ==========================  ==========================================================================

Sums are fp32 in all of them; of bf16 products that an accelerator adds up in several parts torch may round the parts
(``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``). A CPU gains nothing: it rounds the operands and
multiplies in fp32, so that what an accelerator would lose can be seen there. Inverse roots need more than 11 bits, at
condition numbers of a million: where products are not ieee, their operands are split into two terms of 11 bits and
three products taken (``tf32x3``, about 22 bits).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ds_optim.known_torch import fp32_products
from ds_optim.linalg import triangle

MatmulPrecision = Literal["ieee", "tf32", "bf16"]
PRECISIONS: tuple[MatmulPrecision, ...] = get_args(MatmulPrecision)

Product = Callable[..., Tensor]
"""Of two stacks (B, m, k) and (B, k, n); ``out``, if given, is (B, m, n) fp32 and dense."""

_TF32_DROPS = 13  # bits of an fp32 mantissa


def product_in(precision: MatmulPrecision) -> Product:
    """``torch.bmm`` of fp32 stacks with operands of a precision; ieee is what the caller has set for fp32."""
    products: dict[MatmulPrecision, Product] = {"ieee": torch.bmm, "tf32": _tf32, "bf16": _bf16}
    return products[precision]


def product_for_roots(precision: MatmulPrecision) -> Product:
    """``torch.bmm`` of fp32 stacks, exact to about 22 bits or more."""
    return torch.bmm if precision == "ieee" else _tf32x3


def rounded(stack: Tensor, precision: MatmulPrecision) -> Tensor:
    """fp32 as a product of a precision reads it, in a new tensor if that differs: to nearest, ties to even."""
    if precision == "ieee":
        return stack
    if precision == "bf16":
        return stack.bfloat16().float()
    bits = stack.view(torch.int32)
    odd = (bits >> _TF32_DROPS) & 1
    cut = ((bits + ((1 << (_TF32_DROPS - 1)) - 1) + odd) >> _TF32_DROPS) << _TF32_DROPS
    return torch.where(stack.isfinite(), cut.view(torch.float32), stack)


def rounding_workspace(
    operands: tuple[int, int], result: int, count: int, precision: MatmulPrecision, device_type: str
) -> int:
    """Bytes that a product of stacks of fp32 takes beside its result for operands of fewer bits.

    Args:
        operands: elements of a matrix of each.
        result: of one of the result.
        count: matrices.
        precision, device_type: on a CPU matrices are rounded one by one, by operations that have temporaries; an
            accelerator has bf16 copies of whole stacks, and reads fp32 as TF32 by itself.
    """
    if device_type == "cpu" and precision != "ieee":
        return 6 * 4 * max(operands)
    return count * (2 * sum(operands) + 4 * result) if precision == "bf16" else 0


def _tf32(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    if a.device.type == "cpu":
        return torch.bmm(rounded(a, "tf32"), rounded(b, "tf32"), out=out)
    with fp32_products("tf32"):
        return torch.bmm(a, b, out=out)


def _bf16(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    if a.device.type == "cpu":
        return torch.bmm(rounded(a, "bf16"), rounded(b, "bf16"), out=out)
    if out is not None and out.dtype == torch.bfloat16:
        return torch.bmm(a.bfloat16(), b.bfloat16(), out=out)
    if a.device.type == "cuda" and torch.version.hip is None:  # the one that gives fp32 sums of bf16 products
        product = torch.bmm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    else:
        product = torch.bmm(a.bfloat16(), b.bfloat16()).float()
    return out.copy_(product) if out is not None else product


def own_gram(stack: Tensor, precision: MatmulPrecision, *, out: Tensor) -> Tensor:
    """``stack @ stack.mT``: by one triangle where an accelerator multiplies in fewer bits than fp32 has.

    Args:
        stack: (B, s, l) fp32, or bf16 with that precision.
        precision: of the product.
        out: (B, s, s) of the stack's dtype or fp32, contiguous; is returned.
    """
    if precision != "ieee" and triangle.serves(stack):
        return triangle.times_own_transpose(stack.bfloat16() if precision == "bf16" else stack, out=out)
    return product_in(precision)(stack, stack.mT, out=out)


def _tf32x3(a: Tensor, b: Tensor) -> Tensor:
    high_a, high_b = rounded(a, "tf32"), rounded(b, "tf32")
    product = _tf32(a - high_a, high_b).add_(_tf32(high_a, b - high_b))
    return product.add_(_tf32(high_a, high_b))
