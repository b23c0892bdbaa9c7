r"""Newton-Schulz iteration towards the orthogonal polar factor, for SWAN's GradWhitening.

.. math::
    X \leftarrow \beta\,(3X - (X X^\top) X)

SWAN (Ma et al., "SWAN: SGD with normalization and whitening enables stateless LLM training",
https://arxiv.org/abs/2412.13148, appendix) whitens by the coupled iteration :math:`Y \leftarrow \beta Y(3I - ZY)`,
:math:`Z \leftarrow \beta (3I - ZY) Z` from :math:`Y_0 = X X^\top, Z_0 = I` and applies Z to X. Z X obeys the equation
above, the uncoupled polar form: the same in exact arithmetic, for fewer products, and stable where the coupled form
is not.

A step maps each singular value s to :math:`\beta s (3 - s^2)`. With beta = 1/2 all tend to one and X to the polar
factor :math:`U V^\top`. SWAN's beta = 0.8 does not converge: small singular values grow 2.4-fold a step, and those
that arrive stay within [0.563, 1.6].
"""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz(stack: Tensor, steps: int, beta: float) -> Tensor:
    """`steps` Newton-Schulz steps on every matrix of `stack`.

    Args:
        stack: (B, s, l) fp32 with s <= l, each matrix of Frobenius norm one (or zero, which stays zero); is not
            written to. Singular values above sqrt(3) diverge.
        steps: how many; none returns a copy.
        beta: 0.5 converges, 0.8 is SWAN's.

    Returns:
        (B, s, l) fp32, a new tensor.

    A step is computed as `W = 3 beta I - beta X X^T`, (s, s), and then `W X`: 4 s^2 l flops per matrix. The workspace
    beside the result is s (s + l) elements per matrix, on CPU for one matrix at a time: with several threads, batched
    products there round differently in batches of different sizes, and a result must not depend on its neighbours.
    """
    result = torch.empty_like(stack, memory_format=torch.contiguous_format)
    size = 1 if stack.device.type == "cpu" else max(len(stack), 1)
    w_BSS = stack.new_empty(size, stack.shape[1], stack.shape[1])
    # Copies on CPU, since the rounding may also depend on where in memory a matrix begins.
    spare = torch.empty_like(stack[:size], memory_format=torch.contiguous_format)
    other = torch.empty_like(spare) if size < len(stack) else result
    for begin in range(0, len(stack), size):
        x_BSL, y_BSL = (spare, other) if steps % 2 else (other, spare)  # the last step writes to `other`
        x_BSL.copy_(stack[begin : begin + size])
        for _ in range(steps):
            torch.baddbmm(w_BSS, x_BSL, x_BSL.mT, beta=0, alpha=-beta, out=w_BSS)  # what is in w counts for nothing
            w_BSS.diagonal(dim1=-2, dim2=-1).add_(3 * beta)
            torch.bmm(w_BSS, x_BSL, out=y_BSL)
            x_BSL, y_BSL = y_BSL, x_BSL
        if other is not result:
            result[begin : begin + size] = x_BSL
    return result
