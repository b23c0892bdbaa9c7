r"""Newton-Schulz iteration towards the orthogonal polar factor, for SWAN's GradWhitening.

.. math::
    X \leftarrow \beta\,(3X - (X X^\top) X)

SWAN (Ma et al., "SWAN: SGD with normalization and whitening enables stateless LLM training",
https://arxiv.org/abs/2412.13148, appendix) whitens by the coupled iteration :math:`Y \leftarrow \beta Y(3I - ZY)`,
:math:`Z \leftarrow \beta (3I - ZY) Z` from :math:`Y_0 = X X^\top, Z_0 = I` and applies Z to X. Z X obeys the equation
above, the uncoupled polar form: the same in exact arithmetic, for fewer products, and stable where the coupled form
is not.

Wide matrices go another way to the same: a step multiplies X from the left by :math:`W = 3\beta I - \beta R` with
:math:`R = X X^\top`, so that some steps can be taken on the squares :math:`R \leftarrow W R W` and
:math:`Q \leftarrow W Q` alone, before :math:`X \leftarrow Q X` (the Gram form). For sides s <= l that is 6 s^3 flops a
step, and 4 s^2 l every few of them, for 4 s^2 l a step. What rounding makes of eigenvalues of R near zero grows
5.76-fold a step until R is taken anew: in fp32 five steps end as far from the truth as the plain form does within a
factor of five, in TF32 and bf16 two are already up to 80 times farther off, so that only fp32 goes this way
(docs/results/matmul_precision.md).

A step maps each singular value s to :math:`\beta s (3 - s^2)`. With beta = 1/2 all tend to one and X to the polar
factor :math:`U V^\top`. SWAN's beta = 0.8 does not converge: small singular values grow 2.4-fold a step, and those
that arrive stay within [0.563, 1.6].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_optim.known_torch import fp32_products
from ds_optim.linalg.precision import MatmulPrecision, own_gram, rounded

GRAM_FROM = 1.5  # times as long as it is wide: where the Gram form begins to have fewer flops
GRAM_STEPS = 5  # before R is taken anew


def newton_schulz(stack: Tensor, steps: int, beta: float, precision: MatmulPrecision = "ieee") -> Tensor:
    """`steps` Newton-Schulz steps on every matrix of `stack`.

    Args:
        stack: (B, s, l) fp32 with s <= l, each matrix of Frobenius norm one (or zero, which stays zero); is not
            written to. Singular values above sqrt(3) diverge.
        steps: how many; none returns a copy.
        beta: 0.5 converges, 0.8 is SWAN's.
        precision: of the products, see `ds_optim.linalg.precision`. In bf16 the iterates are rounded as well.

    Returns:
        (B, s, l) fp32, a new tensor.

    The workspace beside the result is s (2 l + 4 s) elements per matrix at most, on CPU for one matrix at a time: with
    several threads, batched products there round differently in batches of different sizes, and a result must not
    depend on its neighbours.
    """
    on_cpu = stack.device.type == "cpu"
    size = 1 if on_cpu else max(len(stack), 1)
    dtype = torch.bfloat16 if precision == "bf16" and not on_cpu else stack.dtype
    rows, columns = stack.shape[1:]
    is_wide = _takes_gram_form(rows, columns, steps, precision)
    # Memory of its own, since the rounding may also depend on where in memory a matrix begins.
    x_BSL, y_BSL = (stack.new_empty(size, rows, columns, dtype=dtype) for _ in range(2))
    squares = [stack.new_empty(size, rows, rows, dtype=dtype) for _ in range(4 if is_wide else 1)]
    result = torch.empty_like(stack, memory_format=torch.contiguous_format)
    with fp32_products("tf32" if precision == "tf32" else "ieee"):
        for begin in range(0, len(stack), size):
            x_BSL.copy_(stack[begin : begin + size])
            if is_wide:
                found = _gram_form(x_BSL, y_BSL, squares, steps, beta)
            else:
                found = _plain_form(x_BSL, y_BSL, squares[0], steps, beta, precision)
            result[begin : begin + size] = found
    return result


def newton_schulz_flops(rows: int, columns: int, steps: int, precision: MatmulPrecision) -> float:
    """Floating-point operations of `newton_schulz` on one matrix, whole products counted."""
    if not _takes_gram_form(rows, columns, steps, precision):
        return 4.0 * steps * rows**2 * columns
    rounds = -(-steps // GRAM_STEPS)
    return 4.0 * rounds * rows**2 * columns + 6.0 * (steps - rounds) * rows**3


def _takes_gram_form(rows: int, columns: int, steps: int, precision: MatmulPrecision) -> bool:
    return precision == "ieee" and columns > GRAM_FROM * rows and steps > 1


def _plain_form(
    x_BSL: Tensor, y_BSL: Tensor, a_BSS: Tensor, steps: int, beta: float, precision: MatmulPrecision
) -> Tensor:
    on_cpu = x_BSL.device.type == "cpu"

    def read(operand: Tensor) -> Tensor:  # as an accelerator reads it by itself
        return rounded(operand, precision) if on_cpu else operand

    def keep(iterate: Tensor) -> Tensor:
        return read(iterate) if precision == "bf16" else iterate

    x_BSL = keep(x_BSL)
    for _ in range(steps):
        operand_BSL = read(x_BSL)
        product_BSS = read(own_gram(operand_BSL, "ieee" if on_cpu else precision, out=a_BSS))
        torch.baddbmm(x_BSL, product_BSS, operand_BSL, beta=3 * beta, alpha=-beta, out=y_BSL)
        x_BSL, y_BSL = keep(y_BSL), x_BSL
    return x_BSL


def _gram_form(x_BSL: Tensor, y_BSL: Tensor, squares: Sequence[Tensor], steps: int, beta: float) -> Tensor:
    r_BSS, w_BSS, q_BSS, other_BSS = squares
    for done in range(0, steps, GRAM_STEPS):
        torch.bmm(x_BSL, x_BSL.mT, out=r_BSS)
        last = min(GRAM_STEPS, steps - done) - 1
        for step in range(last + 1):
            torch.mul(r_BSS, -beta, out=w_BSS).diagonal(dim1=-2, dim2=-1).add_(3 * beta)
            if step == 0:
                q_BSS.copy_(w_BSS)
            else:
                torch.bmm(w_BSS, q_BSS, out=other_BSS)
                q_BSS, other_BSS = other_BSS, q_BSS
            if step < last:
                torch.bmm(w_BSS, r_BSS, out=other_BSS)
                torch.bmm(other_BSS, w_BSS, out=r_BSS)
        torch.bmm(q_BSS, x_BSL, out=y_BSL)
        x_BSL, y_BSL = y_BSL, x_BSL
    return x_BSL
