r"""Newton-Schulz iterations towards the orthogonal polar factor: SWAN's GradWhitening, Muon's orthogonalisation.

A step is an odd polynomial of the singular values, :math:`s \leftarrow a s + b s^3 + c s^5`:

.. math::
    S = X X^\top, \qquad X \leftarrow a X + (b S + c S^2) X

SWAN (Ma et al., "SWAN: SGD with normalization and whitening enables stateless LLM training",
https://arxiv.org/abs/2412.13148, appendix) whitens by the coupled iteration :math:`Y \leftarrow \beta Y(3I - ZY)`,
:math:`Z \leftarrow \beta (3I - ZY) Z` from :math:`Y_0 = X X^\top, Z_0 = I` and applies Z to X. Z X obeys the equation
above with :math:`(a, b, c) = (3\beta, -\beta, 0)`, the uncoupled polar form: the same in exact arithmetic, for fewer
products, and stable where the coupled form is not. With beta = 1/2 all singular values tend to one and X to the polar
factor :math:`U V^\top`. SWAN's beta = 0.8 does not converge: small singular values grow 2.4-fold a step, and those
that arrive stay within [0.563, 1.6].

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/) takes five steps of one quintic that lets small singular values grow
3.4-fold and leaves all within about [0.7, 1.2]; Polar Express (Amsel et al., https://arxiv.org/abs/2505.16932) a
polynomial of its own in every step, which ends closer to one.

Wide matrices go another way to the same: a step multiplies X from the left by :math:`W = a I + b R + c R^2` with
:math:`R = X X^\top`, so that some steps can be taken on the squares :math:`R \leftarrow W R W` and
:math:`Q \leftarrow W Q` alone, before :math:`X \leftarrow Q X` (the Gram form). For sides s <= l SWAN's is 6 s^3 flops
a step, and 4 s^2 l every few of them, for 4 s^2 l a step. What rounding makes of eigenvalues of R near zero grows
a^2-fold a step until R is taken anew: in fp32 five steps of SWAN's 5.76 end as far from the truth as the plain form
does within a factor of five, in TF32 and bf16 two are already up to 80 times farther off, so that only fp32 goes this
way (docs/results/matmul_precision.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ds_optim.known_torch import fp32_products
from ds_optim.linalg.alignment import ALIGNMENT
from ds_optim.linalg.precision import MatmulPrecision, own_gram, rounded, rounding_workspace

Coefficients: TypeAlias = tuple[float, float, float]
"""a, b, c of one step."""

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""Jordan's: in every step of Muon."""

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Of Polar Express, step by step, for matrices divided by 1.02 times their norm."""

CONVERGENT: Coefficients = (15 / 8, -10 / 8, 3 / 8)
"""Of the quintic that converges to the polar factor, fastest where singular values are near one already."""

GRAM_FROM = 1.5  # times as long as it is wide: where the Gram form begins to have fewer flops
GRAM_STEPS = 5  # before R is taken anew, at most
GRAM_GROWTH = 1.2e3  # of what rounding made of R: 5.76^4 of SWAN, two of Muon's squares


def newton_schulz(stack: Tensor, steps: int, beta: float, precision: MatmulPrecision = "ieee") -> Tensor:
    """`steps` of SWAN's iteration, see `polynomial_steps`.

    Args:
        stack: (B, s, l) fp32 with s <= l, each matrix of Frobenius norm one (or zero, which stays zero); is not
            written to. Singular values above sqrt(3) diverge.
        steps: how many; none returns a copy.
        beta: 0.5 converges, 0.8 is SWAN's.
        precision: of the products.
    """
    return polynomial_steps(stack, cubic(beta, steps), precision)


def cubic(beta: float, steps: int) -> list[Coefficients]:
    """Of SWAN's iteration, step by step."""
    return [(3 * beta, -beta, 0.0)] * steps


def polynomial_steps(stack: Tensor, steps: Sequence[Coefficients], precision: MatmulPrecision = "ieee") -> Tensor:
    """Odd polynomials of the singular values of every matrix of `stack`, one after the other.

    Args:
        stack: (B, s, l) fp32 with s <= l, each matrix of Frobenius norm one at most (or zero, which stays zero); is not
            written to.
        steps: their coefficients; none returns a copy.
        precision: of the products, see `ds_optim.linalg.precision`. In bf16 the iterates are rounded as well.

    Returns:
        (B, s, l) fp32, a new tensor.

    `polynomial_workspace` says what it takes, result included: on a CPU, where batches of different sizes round
    differently with several threads and a result must not depend on its neighbours, the iterates of one matrix.
    """
    shape = rows, columns = stack.shape[1:]
    is_wide = _takes_gram_form(rows, columns, steps, precision)
    size, dtype, room, count = _rooms(stack.shape, steps, precision, stack.device.type, stack.dtype)
    # Memory of its own, since the rounding may also depend on where in memory a matrix begins.
    rooms = [stack.new_empty(room, dtype=dtype) for _ in range(2)]
    squares = [stack.new_empty(size, rows, rows, dtype=dtype) for _ in range(count)]
    result = None if size == len(stack) else torch.empty_like(stack, memory_format=torch.contiguous_format)
    with fp32_products("tf32" if precision == "tf32" else "ieee"):
        for begin in range(0, len(stack), size):
            x_BSL, y_BSL = (_begin_of(one, (size, *shape)) for one in rooms)
            x_BSL.copy_(stack[begin : begin + size])
            if is_wide:
                found = _gram_form(rooms, (size, *shape), squares, steps)
            else:
                found = _plain_form(x_BSL, y_BSL, squares, steps, precision)
            if result is None:
                return found.to(stack.dtype)
            result[begin : begin + size] = found
    assert result is not None
    return result


def _rooms(
    shape: Sequence[int],
    steps: Sequence[Coefficients],
    precision: MatmulPrecision,
    device_type: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, torch.dtype, int, int]:
    """How many matrices go through at a time, in which dtype, elements of an iterate's room, how many squares."""
    together, rows, columns = shape
    on_cpu = device_type == "cpu"
    size = 1 if on_cpu else max(together, 1)
    dtype = torch.bfloat16 if precision == "bf16" and not on_cpu else dtype
    is_wide = _takes_gram_form(rows, columns, steps, precision)
    room = max(size * rows * columns, 2 * _aligned(size * rows * rows, dtype) if is_wide else 0)
    return size, dtype, room, 2 if is_wide else 1 + any(c for _, _, c in steps)


def polynomial_workspace(
    shape: Sequence[int], steps: Sequence[Coefficients], precision: MatmulPrecision, device_type: str
) -> int:
    """Bytes that `polynomial_steps` takes on a stack (B, s, l), its result included."""
    size, dtype, room, count = _rooms(shape, steps, precision, device_type)
    square = size * shape[1] ** 2
    found = dtype.itemsize * (2 * room + count * square)
    if size < shape[0] or dtype != torch.float32:
        found += 4 * math.prod(shape)
    if device_type == "cpu":  # elsewhere iterates are bf16
        largest = math.prod(shape[1:])
        found += rounding_workspace((largest, largest), square, 1, precision, device_type)
    return found


def _aligned(count: int, dtype: torch.dtype) -> int:
    """So many elements, and those up to where the next may begin."""
    line = ALIGNMENT // dtype.itemsize
    return -(-count // line) * line


def _begin_of(room: Tensor, shape: tuple[int, ...], first: int = 0) -> Tensor:
    return room[first : first + math.prod(shape)].view(shape)


def polynomial_flops(rows: int, columns: int, steps: Sequence[Coefficients], precision: MatmulPrecision) -> float:
    """Floating-point operations of `polynomial_steps` on one matrix, whole products counted."""
    quintic = sum(2.0 * rows**3 for _, _, c in steps if c)
    if not _takes_gram_form(rows, columns, steps, precision):
        return 4.0 * len(steps) * rows**2 * columns + quintic
    rounds = len(_rounds(steps))
    return 4.0 * rounds * rows**2 * columns + 6.0 * (len(steps) - rounds) * rows**3 + quintic


def _takes_gram_form(rows: int, columns: int, steps: Sequence[Coefficients], precision: MatmulPrecision) -> bool:
    return precision == "ieee" and columns > GRAM_FROM * rows and len(steps) > 1


def _rounds(steps: Sequence[Coefficients]) -> list[Sequence[Coefficients]]:
    """Steps that are taken on one R."""
    rounds: list[list[Coefficients]] = []
    growth = 1.0
    for step in steps:
        if not rounds or len(rounds[-1]) == GRAM_STEPS or growth > GRAM_GROWTH:
            rounds.append([])
            growth = 1.0
        rounds[-1].append(step)
        growth *= step[0] ** 2
    return [*rounds]


def _plain_form(
    x_BSL: Tensor, y_BSL: Tensor, squares: Sequence[Tensor], steps: Sequence[Coefficients], precision: MatmulPrecision
) -> Tensor:
    on_cpu = x_BSL.device.type == "cpu"

    def read(operand: Tensor) -> Tensor:  # as an accelerator reads it by itself
        return rounded(operand, precision) if on_cpu else operand

    def keep(iterate: Tensor) -> Tensor:
        return read(iterate) if precision == "bf16" else iterate

    x_BSL = keep(x_BSL)
    for a, b, c in steps:
        operand_BSL = read(x_BSL)
        product_BSS, weight = read(own_gram(operand_BSL, "ieee" if on_cpu else precision, out=squares[0])), b
        if c:
            torch.baddbmm(product_BSS, product_BSS, product_BSS, beta=b, alpha=c, out=squares[1])
            product_BSS, weight = read(squares[1]), 1.0
        torch.baddbmm(x_BSL, product_BSS, operand_BSL, beta=a, alpha=weight, out=y_BSL)
        x_BSL, y_BSL = keep(y_BSL), x_BSL
    return x_BSL


def _gram_form(
    rooms: Sequence[Tensor], shape: tuple[int, int, int], squares: Sequence[Tensor], steps: Sequence[Coefficients]
) -> Tensor:
    """R and W lie where the next iterate comes, which is computed when they have been used.

    Args:
        rooms: of X, which begins the first, and of the next one.
        shape: of X.
        squares: two.
        steps: their coefficients.
    """
    (x_room, y_room), (q_BSS, other_BSS) = rooms, squares
    square = shape[0], shape[1], shape[1]
    for together in _rounds(steps):
        x_BSL, y_BSL = (_begin_of(room, shape) for room in (x_room, y_room))
        r_BSS, w_BSS = (_begin_of(y_room, square, at) for at in (0, _aligned(math.prod(square), y_room.dtype)))
        torch.bmm(x_BSL, x_BSL.mT, out=r_BSS)
        for step, (a, b, c) in enumerate(together, 1):
            if c:
                torch.baddbmm(r_BSS, r_BSS, r_BSS, beta=b, alpha=c, out=w_BSS)
            else:
                torch.mul(r_BSS, b, out=w_BSS)
            w_BSS.diagonal(dim1=-2, dim2=-1).add_(a)
            if step == 1:
                q_BSS.copy_(w_BSS)
            else:
                torch.bmm(w_BSS, q_BSS, out=other_BSS)
                q_BSS, other_BSS = other_BSS, q_BSS
            if step < len(together):
                torch.bmm(w_BSS, r_BSS, out=other_BSS)
                torch.bmm(other_BSS, w_BSS, out=r_BSS)
        torch.bmm(q_BSS, x_BSL, out=y_BSL)
        x_room, y_room = y_room, x_room
    return y_BSL
