r"""Inverse p-th roots of symmetric positive semidefinite matrices, for Shampoo's preconditioners.

Every matrix of a stack gets a ridge first, relative to its largest eigenvalue or absolute:

.. math::
    \rho = \epsilon\,\lambda_{\max}(A) \;\text{ or }\; \epsilon, \qquad
    \lambda_i \leftarrow \lambda_i(A + \rho I) + \max(0, \rho - \lambda_{\min}(A + \rho I)), \qquad
    X = Q\, \operatorname{diag}(\lambda_i^{e})\, Q^\top

The shift is what Meta's Distributed Shampoo does about eigenvalues that rounding made negative.

``eigh``, the reference, decomposes in fp64, one matrix after the other: any exponent, and right wherever fp64 is, at
condition numbers of 1e12 and scales from 1e-30 to 1e30. A result depends on nothing but its own matrix.

``eigh32``, for CPUs, decomposes in fp32 first, in half the time. That moves eigenvalues by about the last place of the
largest, as fp32 has moved the matrix already; where the smallest, ridge included, stands `DIGITS` bits above that place
and the decomposition gives the matrix back, it is kept. Otherwise the matrix is decomposed in fp64.

``newton``, for accelerators, has matrix products in fp32 only, on the whole stack at once (where it is forced on a CPU,
one matrix after the other), and never waits for the device. It is the coupled Newton iteration for :math:`e = -1/p`
(Guo and Higham, "A Schur-Newton method for the matrix p-th root and its inverse", 2006; in Shampoo: Anil et al.,
"Scalable second order optimization for deep learning", https://arxiv.org/abs/2002.09018),

.. math::
    T = a_k I - b_k M, \qquad X \leftarrow X T, \qquad M \leftarrow T^p M \qquad (X_0 = I,\; M_0 = A),

where Newton's own :math:`a = 1 + 1/p, b = 1/p` only come last. Before, :math:`a_k, b_k` are those under which the
smallest eigenvalue grows fastest while the others stay in (0, 1] (`schedule`). On ill-conditioned matrices it takes
about half the products of the plain iteration and ends closer to the root: about 12 (2 + log2 p) products of 2 n^3
flops.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ds_optim.known_torch import fp32_products
from ds_optim.linalg.precision import MatmulPrecision, Product, product_for_roots
from ds_optim.linalg.workers import Stepwise, finish, matrix_by_matrix

Method = Literal["eigh", "eigh32", "newton"]

# Newton's residual, see `_newton`. The relative error of a root is about residual / p.
RESIDUAL_TOLERANCE = 0.1
# Eigenvalues below this part of the largest are lost in the rounding of an fp32 matrix.
SMALLEST_SHARE = 1e-7
# Power iteration underestimates the largest eigenvalue; the iteration needs eigenvalues of at most one.
MARGIN = 1.1
POWER_STEPS = 32
# Of the fp32 mantissa: bits that the smallest eigenvalue must have left. The ridge of 1e-6 leaves four.
DIGITS = 4
# How far a decomposition in fp32 may be from its matrix, in largest eigenvalues; LAPACK's is about 1e-6.
DECOMPOSITION_TOLERANCE = 1e-4
# No scaled step may press a large eigenvalue below this: it would have to grow again, and its rounding errors with it.
FLOOR = 0.1


def method_for(device: torch.device) -> Method:
    """The method for tensors on `device`: "eigh" on CPU, "newton" elsewhere.

    The environment variable ``DS_OPTIM_ROOTS`` (``eigh``, ``eigh32`` or ``newton``) overrides it; ValueError for
    anything else.
    """
    forced = os.environ.get("DS_OPTIM_ROOTS", "")
    if not forced:
        return "eigh" if device.type == "cpu" else "newton"
    for method in get_args(Method):
        if forced == method:
            return method  # type: ignore[no-any-return]
    raise ValueError(f"DS_OPTIM_ROOTS={forced!r} is not one of {', '.join(get_args(Method))}")


def inverse_roots(
    stack: Tensor, exponent: float, *, eps: float, relative: bool, method: Method, precision: MatmulPrecision = "ieee"
) -> tuple[Tensor, Tensor]:
    """`(A + ridge)^exponent` of every matrix of `stack`, and which of them failed.

    Args:
        stack: (B, n, n) fp32, symmetric positive semidefinite; is not written to.
        exponent: negative, such as -1/4.
        eps: the ridge; must be positive where a matrix may be singular.
        relative: whether `eps` counts in largest eigenvalues. If so, the root of a zero matrix is the identity.
        method: "eigh", "eigh32" or "newton", see the module. "newton" takes matrices as semidefinite (no shift) and
            wants an exponent of -1/p for an integer p. The others on an accelerator wait for it, as
            torch.linalg.eigh does.
        precision: of Newton's products: fp32, or three products in TF32 where it is not "ieee". The others have none.

    Returns:
        roots: (B, n, n) fp32, exactly symmetric.
        failed: (B,) bool. True, with the identity for a root, where a matrix has an element that is not finite, its
            decomposition does not converge, its root overflows, or Newton's residual exceeds `RESIDUAL_TOLERANCE`.

    Raises:
        ValueError: "newton" and `exponent` is not -1/p.
    """
    return finish(
        inverse_roots_stepwise(stack, exponent, eps=eps, relative=relative, method=method, precision=precision)
    )


def inverse_roots_stepwise(
    stack: Tensor, exponent: float, *, eps: float, relative: bool, method: Method, precision: MatmulPrecision = "ieee"
) -> Stepwise[tuple[Tensor, Tensor]]:
    """`inverse_roots`, whose decompositions on a CPU are jobs."""
    if method != "newton":
        dtypes = (torch.float64,) if method == "eigh" else (torch.float32, torch.float64)
        return (yield from _eigh(stack, exponent, eps, relative, dtypes))
    p = round(-1 / exponent)
    if p < 1 or abs(1 + p * exponent) > 1e-9:
        raise ValueError(
            f'the exponent {exponent} is not -1/p for an integer p, which the "newton" method needs: use "eigh" '
            "(environment: DS_OPTIM_ROOTS=eigh) or another exponent"
        )
    bmm = product_for_roots(precision)
    with fp32_products("ieee"):
        if stack.device.type != "cpu":
            return _newton(stack, p, eps, relative, bmm)
        # Alone, and in memory of their own from the first operation on: see `ds_optim.linalg.alignment`.
        roots, failed = zip(*(_newton(matrix, p, eps, relative, bmm) for matrix in stack.split(1)), strict=True)
        return torch.cat(roots), torch.cat(failed)


def roots_workspace(orders: Mapping[int, int], method: Method, precision: MatmulPrecision = "ieee") -> int:
    """Bytes that `inverse_roots` takes for stacks side by side on one thread, with the stacks and their roots.

    Args:
        orders: matrices of each order, each a stack of its own.
        method, precision: as for `inverse_roots`.
    """
    squares = {order: count * order**2 for order, count in orders.items()}
    if method == "newton":
        beside = 7 if precision == "ieee" else 12
        return 4 * (sum(squares.values()) + max(beside * squares[n] + n**2 for n in squares))
    one = 7 * max(orders) ** 2  # of one thread: in fp64 the matrix, its eigenvectors and their product, and a root
    return 4 * (2 * sum(squares.values()) + sum(n**2 for n in orders) + max(one, *squares.values()))


def _eigh(
    stack: Tensor, exponent: float, eps: float, relative: bool, dtypes: Sequence[torch.dtype]
) -> Stepwise[tuple[Tensor, Tensor]]:
    """By eigendecomposition, matrix by matrix: the workspace is that of one matrix per thread.

    On a CPU every matrix has one thread, several matrices at a time, see `ds_optim.linalg.workers`.
    """
    roots = torch.empty_like(stack, memory_format=torch.contiguous_format)
    largest = stack.abs().amax((-2, -1)) if stack.numel() else stack.new_zeros(len(stack))
    failed = ~largest.isfinite()
    trivial = failed | ((largest == 0) & relative)
    identity = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)

    def decompose(index: int) -> None:
        root = roots[index]
        if not bool(trivial[index]):
            for dtype in dtypes:
                overflowed, is_resolved = _eigh_root(stack[index], exponent, eps, relative, dtype, root)
                if dtype == torch.float64 or is_resolved:
                    break
            failed[index] |= overflowed
        if bool(trivial[index] | failed[index]):
            root.copy_(identity)

    yield from matrix_by_matrix(stack, decompose, kept=2)
    return roots, failed


def _eigh_root(
    a: Tensor, exponent: float, eps: float, relative: bool, dtype: torch.dtype, root: Tensor
) -> tuple[bool, bool]:
    """The root of one finite matrix by a decomposition in ``dtype``.

    Args:
        a: (n, n) fp32, symmetric.
        root: (n, n) fp32, is written to.

    Returns:
        Whether there is none (no convergence, or an element overflows), and whether fp32 resolves it, see the module.
    """
    n = len(a)
    matrix = a.to(dtype, copy=True)  # aligned, wherever the block lies
    if not relative:
        matrix.diagonal().add_(eps)
    try:
        eigenvalues, q = torch.linalg.eigh(matrix)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # LinAlgError, or what an accelerator's solver raises: the other ranks must not wait
        return True, False
    shifted = eigenvalues.double()
    ridge = torch.full_like(shifted[-1], eps)
    if relative:
        ridge = eps * shifted[-1]
        shifted = shifted + ridge
    shifted = shifted + (ridge - shifted[0]).clamp_min(0)
    is_resolved = shifted[0] * 2 ** (24 - DIGITS) >= shifted[-1]
    if dtype == torch.float32:
        probe = q.new_ones(n)
        missed = torch.mv(matrix, probe) - torch.mv(q, eigenvalues * torch.mv(q.mT, probe))
        is_resolved &= missed.norm() <= DECOMPOSITION_TOLERANCE * n**0.5 * eigenvalues[-1]
    half = q.mul_(shifted.pow(exponent / 2).to(dtype))
    product = torch.mm(half, half.mT)
    torch.add(product, product.mT, out=root).mul_(0.5)
    is_finite = bool(root.abs().amax().isfinite())
    return not is_finite, is_finite and bool(is_resolved)


def _newton(stack: Tensor, p: int, eps: float, relative: bool, bmm: Product) -> tuple[Tensor, Tensor]:
    r"""By the scaled coupled iteration on the whole stack; the workspace is about seven stacks.

    The residual is the root mean square over n directions of :math:`X^{p/2} (A + \rho I) X^{p/2} - I`, taken after the
    iteration from its result alone: M tends to I even where rounding has led X astray.
    """
    n = stack.shape[-1]
    identity = torch.eye(n, dtype=stack.dtype, device=stack.device)
    valid = stack.isfinite().all(-1).all(-1)[:, None, None]
    largest = stack.abs().amax((-2, -1), keepdim=True)
    zero = (largest == 0) & relative
    # Elements of at most one, whatever the scale.
    unit = largest if relative else largest.clamp_min(eps)
    usable = valid & ~zero
    unit = torch.where(usable, unit, 1)
    a = torch.where(usable, stack, identity) / unit
    a = (a + a.mT).mul_(0.5)
    top = _largest_eigenvalue(a, bmm)
    ridge = eps * top if relative else torch.where(usable, eps / unit, 0)
    a.diagonal(dim1=-2, dim2=-1).add_(ridge[:, :, 0])
    bound = MARGIN * (top + ridge)
    a /= bound

    x, m = identity.expand_as(a), a
    for slope, curvature in schedule(p, max(eps, SMALLEST_SHARE) if relative else SMALLEST_SHARE):
        t = m * -curvature
        t.diagonal(dim1=-2, dim2=-1).add_(slope)
        x = bmm(x, t)
        m = bmm(_power(t, p, bmm), m)
    x = (x + x.mT).mul_(0.5)

    product = bmm(_power(x, p // 2, bmm), a) if p > 1 else a
    product = bmm(product, _power(x, p - p // 2, bmm))
    residual = (product - identity).square_().sum((-2, -1), keepdim=True).div_(n).sqrt_()
    x *= unit.pow(-1 / p) * bound.pow(-1 / p)
    good = valid & (residual <= RESIDUAL_TOLERANCE) & x.isfinite().all(-1).all(-1)[:, None, None]
    return torch.where(good & ~zero, x, identity), ~good[:, 0, 0]


@functools.lru_cache(maxsize=64)
def schedule(p: int, smallest: float) -> tuple[tuple[float, float], ...]:
    r"""The coefficients (a, b) of every step, for eigenvalues in [`smallest`, 1].

    A step maps eigenvalues of M by :math:`f(x) = x (a - b x)^p`. With r = b / a its maximum is at :math:`1/(r (p+1))`,
    and a makes that one. Growing r, the slope at zero grows and f(1) falls: the largest useful r is where f(1) is as
    small as the image of the smallest eigenvalue, or as FLOOR. Once all is close to one, three steps of Newton's.
    """
    steps = []
    while smallest < 0.9:

        def image(x: float, r: float) -> float:
            return x * (1 - r * x) ** p

        low, high = 1 / (p + 1), 1.0
        for _ in range(60):
            r = (low + high) / 2
            peak = image(1 / (r * (p + 1)), r)
            if image(1.0, r) > max(image(smallest, r), FLOOR * peak):
                low = r
            else:
                high = r
        peak = image(1 / (low * (p + 1)), low)
        steps.append((peak ** (-1 / p), low * peak ** (-1 / p)))
        smallest = min(image(smallest, low), image(1.0, low)) / peak
    return (*steps, *[(1 + 1 / p, 1 / p)] * 3)


def _largest_eigenvalue(stack: Tensor, bmm: Product) -> Tensor:
    """(B, 1, 1): the largest eigenvalue of semidefinite matrices from below, by power iteration on four vectors.

    The error is below a percent for spectra without gaps and far smaller with one.
    """
    n = stack.shape[-1]
    index = torch.arange(1, n + 1, dtype=stack.dtype, device=stack.device)
    vectors = torch.stack([torch.cos(k * index * index) for k in (1.0, 2.0, 3.0, 5.0)], -1).expand(len(stack), n, 4)
    tiny = torch.finfo(stack.dtype).tiny
    for _ in range(POWER_STEPS):
        vectors = bmm(stack, vectors)
        vectors = vectors / vectors.square().sum(-2, keepdim=True).sqrt().clamp_min(tiny)
    return (vectors * bmm(stack, vectors)).sum(-2, keepdim=True).amax(-1, keepdim=True)


def _power(stack: Tensor, k: int, bmm: Product) -> Tensor:
    """The k-th powers of (B, n, n), k >= 1, by repeated squaring."""
    result = None
    while True:
        if k % 2:
            result = stack if result is None else bmm(result, stack)
        k //= 2
        if not k:
            assert result is not None
            return result
        stack = bmm(stack, stack)
