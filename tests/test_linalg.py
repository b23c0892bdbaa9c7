"""Inverse roots and polar factors: against fp64, at every scale, and each matrix as if it were alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ds_optim.linalg import inverse_roots as module
from ds_optim.linalg import polar
from ds_optim.linalg.eigenbases import first_bases, next_bases
from ds_optim.linalg.inverse_roots import Method, inverse_roots, method_for, schedule
from ds_optim.linalg.packed import pack
from ds_optim.linalg.polar import (
    POLAR_EXPRESS,
    QUINTIC,
    Coefficients,
    cubic,
    newton_schulz,
    polynomial_flops,
    polynomial_steps,
)
from ds_optim.linalg.precision import MatmulPrecision, product_for_roots, product_in, rounded
from ds_optim.linalg.products import add_gram_, apply_along, gram, own_product_flops, stacked_matmul
from ds_optim.linalg.workers import finish

METHODS: tuple[Method, ...] = ("eigh", "eigh32", "newton")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spectral(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric fp64 matrix with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    a = (q * eigenvalues.double()) @ q.T
    return (a + a.T) / 2


def conditioned(n: int, condition: float, seed: int = 0) -> Tensor:
    """(n, n) fp32 with eigenvalues from one down to 1 / condition, evenly in the logarithm."""
    return spectral(torch.logspace(0, -math.log10(condition), n, dtype=torch.float64), seed).float()


def random_stack(count: int, n: int, seed: int = 0) -> Tensor:
    """(count, n, n) fp32: what a statistic looks like after a few gradients, no two of one scale."""
    g = torch.randn(count, n, n + 3, generator=torch.Generator().manual_seed(seed))
    return torch.bmm(g, g.mT) * torch.logspace(-6, 2, count)[:, None, None]


def meta_root(a: Tensor, exponent: float, eps: float) -> Tensor:
    """Meta's root with an absolute ridge, in fp64."""
    eigenvalues, q = torch.linalg.eigh(a.double() + eps * torch.eye(len(a), dtype=torch.float64))
    if eigenvalues.min() < eps:
        eigenvalues = eigenvalues + (eps - eigenvalues.min())
    return (q * eigenvalues**exponent) @ q.T


def relative_root(a: Tensor, exponent: float, eps: float) -> Tensor:
    """The same with the ridge in units of the largest eigenvalue."""
    return meta_root(a, exponent, eps * float(torch.linalg.eigvalsh(a.double())[-1]))


def error(found: Tensor, wanted: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def root_of(a: Tensor, exponent: float, *, eps: float, relative: bool, method: Method = "eigh") -> Tensor:
    roots, failed = inverse_roots(a[None], exponent, eps=eps, relative=relative, method=method)
    assert not failed.any()
    return roots[0]


# ---------------------------------------------------------------------------------------------------------------------
# Inverse roots: right


@pytest.mark.parametrize("exponent", [-1 / 2, -1 / 4, -1 / 6, -1 / 8, -0.3, -1.0])
@pytest.mark.parametrize("relative", [True, False])
def test_eigh_is_the_root_of_the_ridged_matrix(exponent: float, relative: bool) -> None:
    reference = relative_root if relative else meta_root
    for a in random_stack(5, 24):
        wanted = reference(a, exponent, 1e-3)
        assert error(root_of(a, exponent, eps=1e-3, relative=relative), wanted) <= 1e-7


def test_eigh_shifts_eigenvalues_up_to_the_ridge() -> None:
    a = spectral(torch.tensor([2.0, 0.5, 0.1, -0.25])).float()
    found = torch.linalg.eigvalsh(root_of(a, -1 / 2, eps=0.01, relative=False).double()) ** -2
    torch.testing.assert_close(found, torch.tensor([2.26, 0.76, 0.36, 0.01]).double(), rtol=1e-5, atol=0)
    found = torch.linalg.eigvalsh(root_of(a, -1 / 2, eps=0.01, relative=True).double()) ** -2
    torch.testing.assert_close(found, torch.tensor([2.27, 0.77, 0.37, 0.02]).double(), rtol=1e-5, atol=0)


def test_a_ridge_is_added_once_to_a_matrix_that_needs_no_shift() -> None:
    a = torch.diag(torch.tensor([4.0, 1.0, 0.25]))
    torch.testing.assert_close(
        root_of(a, -1 / 2, eps=0.25, relative=False), torch.diag(torch.tensor([4.25, 1.25, 0.5]) ** -0.5)
    )
    torch.testing.assert_close(
        root_of(a, -1 / 2, eps=0.25, relative=True), torch.diag(torch.tensor([5.0, 2.0, 1.25]) ** -0.5)
    )


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("relative", [True, False])
def test_eigh_is_right_at_every_condition_number(condition: float, relative: bool) -> None:
    # fp32 elements keep small eigenvalues only where they are diagonal; the first matrix asks for all twelve digits.
    for a in (torch.diag(torch.logspace(0, -math.log10(condition), 32)), conditioned(32, condition)):
        wanted = (relative_root if relative else meta_root)(a, -1 / 4, 1e-12)
        assert error(root_of(a, -1 / 4, eps=1e-12, relative=relative), wanted) <= 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-7, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_a_relative_ridge_makes_the_root_homogeneous(scale: float, method: Method) -> None:
    a = conditioned(32, 1e4)
    scaled = a * scale
    wanted = relative_root(scaled, -1 / 4, 1e-6)
    tolerance = 1e-6 if method == "eigh" else 1e-3
    assert error(root_of(scaled, -1 / 4, eps=1e-6, relative=True, method=method), wanted) <= tolerance
    power_of_two = root_of(a * 2.0**-80, -1 / 4, eps=1e-6, relative=True, method=method)
    assert error(power_of_two, root_of(a, -1 / 4, eps=1e-6, relative=True, method=method) * 2.0**20) <= tolerance


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_an_absolute_ridge_is_absolute_at_every_scale(scale: float, method: Method) -> None:
    a = conditioned(32, 1e4) * scale
    tolerance = 1e-6 if method == "eigh" else 1e-3
    found = root_of(a, -1 / 2, eps=1e-6, relative=False, method=method)
    assert error(found, meta_root(a, -1 / 2, 1e-6)) <= tolerance


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_has_the_identity_or_the_root_of_the_ridge(method: Method) -> None:
    zeros = torch.zeros(2, 5, 5)
    roots, failed = inverse_roots(zeros, -1 / 4, eps=1e-6, relative=True, method=method)
    assert not failed.any()
    assert torch.equal(roots, torch.eye(5).expand(2, 5, 5))
    roots, failed = inverse_roots(zeros, -1 / 4, eps=1e-12, relative=False, method=method)
    assert not failed.any()
    torch.testing.assert_close(roots, 1e3 * torch.eye(5).expand(2, 5, 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_matrices_of_one_element_and_stacks_of_none(method: Method) -> None:
    torch.testing.assert_close(
        root_of(torch.tensor([[16.0]]), -1 / 4, eps=1e-9, relative=True, method=method), torch.tensor([[0.5]])
    )
    roots, failed = inverse_roots(torch.empty(0, 3, 3), -1 / 4, eps=1e-6, relative=True, method=method)
    assert (roots.shape, failed.shape) == ((0, 3, 3), (0,))


@pytest.mark.parametrize(("condition", "most"), [(1e1, 1e-5), (1e3, 1e-4), (1e6, 0.05)])
def test_a_decomposition_in_fp32_is_off_by_what_the_smallest_eigenvalue_has_left(condition: float, most: float) -> None:
    a = conditioned(48, condition)
    found = root_of(a, -1 / 4, eps=1e-6, relative=True, method="eigh32")
    assert 0 < error(found, relative_root(a, -1 / 4, 1e-6)) <= most


@pytest.mark.parametrize(("eps", "relative"), [(1e-7, True), (1e-12, True), (1e-12, False)])
def test_what_fp32_does_not_resolve_is_decomposed_in_fp64(eps: float, relative: bool) -> None:
    a = torch.stack([torch.diag(torch.logspace(0, -12, 32)), conditioned(32, 10.0)])
    found, failed = inverse_roots(a, -1 / 4, eps=eps, relative=relative, method="eigh32")
    wanted, _ = inverse_roots(a, -1 / 4, eps=eps, relative=relative, method="eigh")
    assert not failed.any()
    assert torch.equal(found[0], wanted[0])
    assert not torch.equal(found[1], wanted[1])


def test_a_decomposition_in_fp32_that_does_not_give_the_matrix_back_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = random_stack(2, 24)
    wanted, _ = inverse_roots(stack, -1 / 4, eps=1e-6, relative=True, method="eigh")
    eigh = torch.linalg.eigh

    def wrong(a: Tensor) -> object:
        values, vectors = eigh(a)
        return (values, vectors) if a.dtype == torch.float64 else (values * 1.01, vectors)

    monkeypatch.setattr(module.torch.linalg, "eigh", wrong)
    found, failed = inverse_roots(stack, -1 / 4, eps=1e-6, relative=True, method="eigh32")
    assert not failed.any()
    assert torch.equal(found, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Inverse roots: each matrix by itself


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_matrix_that_is_not_finite_fails_alone(method: Method, bad: float) -> None:
    stack = random_stack(5, 16)
    roots, failed = inverse_roots(stack, -1 / 4, eps=1e-6, relative=True, method=method)
    assert not failed.any()
    spoiled = stack.clone()
    spoiled[2, 3, 7] = bad
    found, failed = inverse_roots(spoiled, -1 / 4, eps=1e-6, relative=True, method=method)
    assert failed.tolist() == [False, False, True, False, False]
    assert torch.equal(found[2], torch.eye(16))
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], roots[others])


def test_a_decomposition_that_does_not_converge_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = random_stack(3, 8)
    roots, _ = inverse_roots(stack, -1 / 4, eps=1e-6, relative=True, method="eigh")
    eigh, calls = torch.linalg.eigh, []

    def flaky(a: Tensor) -> object:
        calls.append(a)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return eigh(a)

    monkeypatch.setattr(module.torch.linalg, "eigh", flaky)
    found, failed = inverse_roots(stack, -1 / 4, eps=1e-6, relative=True, method="eigh")
    assert failed.tolist() == [False, True, False]
    assert torch.equal(found[1], torch.eye(8))
    assert torch.equal(found[::2], roots[::2])


def test_a_root_that_overflows_fails() -> None:
    a = torch.stack([torch.eye(4) * 1e-30, torch.eye(4)])
    roots, failed = inverse_roots(a, -2.0, eps=1e-6, relative=True, method="eigh")
    assert failed.tolist() == [True, False]
    assert torch.equal(roots[0], torch.eye(4))


@pytest.mark.parametrize(("method", "count"), [("eigh", 1), ("eigh", 2), ("eigh32", 1), ("eigh32", 2), ("newton", 1)])
@pytest.mark.parametrize("n", [1, 5, 33, 130])
def test_a_root_is_bitwise_the_same_in_any_stack(method: Method, count: int, n: int) -> None:
    stack = random_stack(5, n)
    with threads(count):
        whole, _ = inverse_roots(stack, -1 / 4, eps=1e-6, relative=True, method=method)
        for chosen in ([0], [3], [4, 1], [1, 2, 3]):
            part, _ = inverse_roots(stack[chosen], -1 / 4, eps=1e-6, relative=True, method=method)
            assert torch.equal(part, whole[chosen])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relative", [True, False])
def test_roots_are_symmetric_and_the_stack_is_left_alone(method: Method, relative: bool) -> None:
    stack = random_stack(4, 20)
    before = stack.clone()
    roots, _ = inverse_roots(stack, -1 / 4, eps=1e-6, relative=relative, method=method)
    assert torch.equal(stack, before)
    assert torch.equal(roots, roots.mT)
    strided = torch.empty(4, 20, 40)[:, :, ::2].copy_(stack)
    again, _ = inverse_roots(strided, -1 / 4, eps=1e-6, relative=relative, method=method)
    assert again.is_contiguous()
    torch.testing.assert_close(again, roots, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Newton


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_newton_agrees_with_eigh_on_moderately_conditioned_matrices(p: int) -> None:
    for condition, tolerance in [(1e1, 1e-5), (1e3, 1e-5), (1e4, 1e-4), (1e6, 1e-2)]:
        stack = torch.stack([conditioned(96, condition, seed) * 10.0**seed for seed in range(3)])
        for relative in (True, False):
            found, failed = inverse_roots(stack, -1 / p, eps=1e-6, relative=relative, method="newton")
            wanted, _ = inverse_roots(stack, -1 / p, eps=1e-6, relative=relative, method="eigh")
            assert not failed.any()
            worst = max(error(a, b) for a, b in zip(found, wanted, strict=True))
            assert worst <= tolerance, (p, condition, relative)


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_newton_takes_singular_and_clustered_spectra_under_the_usual_ridge(p: int) -> None:
    g = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    low_rank = g @ g.T
    half = spectral(torch.cat([torch.ones(48), torch.full((48,), 1e-6)])).float()
    flat = torch.eye(96)
    for a in (low_rank, half, flat):
        found = root_of(a, -1 / p, eps=1e-6, relative=True, method="newton")
        assert error(found, relative_root(a, -1 / p, 1e-6)) <= 3e-2


@pytest.mark.parametrize("p", [2, 4, 8])
def test_newton_flags_what_it_cannot_do(p: int) -> None:
    hopeless = spectral(torch.cat([torch.ones(48), torch.full((48,), -1e-3)])).float()  # not semidefinite
    stack = torch.stack([conditioned(96, 1e2), hopeless, conditioned(96, 1e3)])
    roots, failed = inverse_roots(stack, -1 / p, eps=1e-12, relative=False, method="newton")
    assert failed.tolist() == [False, True, False]
    assert torch.equal(roots[1], torch.eye(96))
    assert roots.isfinite().all()


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("condition", [1e5, 1e7, 1e9, 1e12])
def test_what_newton_does_not_flag_is_right(p: int, condition: float) -> None:
    for seed in range(3):
        a = conditioned(64, condition, seed)
        roots, failed = inverse_roots(a[None], -1 / p, eps=1e-12, relative=False, method="newton")
        assert failed.all() or error(roots[0], meta_root(a, -1 / p, 1e-12)) <= 0.1


def test_newton_takes_exponents_of_an_integer_root_only() -> None:
    for exponent in (-0.3, -2.0, -0.75):
        with pytest.raises(ValueError, match=r"is not -1/p .* use \"eigh\""):
            inverse_roots(torch.eye(2)[None], exponent, eps=1e-6, relative=True, method="newton")
    inverse_roots(torch.eye(2)[None], -1 / 3, eps=1e-6, relative=True, method="newton")


@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize("smallest", [1e-7, 1e-6, 1e-3, 0.5])
def test_the_schedule_brings_every_eigenvalue_to_one(p: int, smallest: float) -> None:
    x = torch.logspace(math.log10(smallest), 0, 2001, dtype=torch.float64)
    for a, b in schedule(p, smallest):
        x = x * (a - b * x) ** p
        assert x.min() > 0
        assert x.max() < 1 + 1e-9
    assert float((x - 1).abs().max()) < 1e-6
    assert len(schedule(p, smallest)) <= 14


def test_newton_multiplies_in_full_precision_and_puts_the_setting_back() -> None:
    before = torch.get_float32_matmul_precision()
    a = conditioned(64, 1e4)[None]
    wanted, _ = inverse_roots(a, -1 / 4, eps=1e-6, relative=True, method="newton")
    try:
        torch.set_float32_matmul_precision("medium")
        found, _ = inverse_roots(a, -1 / 4, eps=1e-6, relative=True, method="newton")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, wanted)


def test_the_method_follows_the_device_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_OPTIM_ROOTS", raising=False)
    assert method_for(torch.device("cpu")) == "eigh"
    assert method_for(torch.device("cuda")) == "newton"
    for forced in METHODS:
        monkeypatch.setenv("DS_OPTIM_ROOTS", forced)
        assert method_for(torch.device("cpu")) == method_for(torch.device("cuda")) == forced
    monkeypatch.setenv("DS_OPTIM_ROOTS", "svd")
    with pytest.raises(ValueError, match="DS_OPTIM_ROOTS='svd' is not one of eigh, eigh32, newton"):
        method_for(torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Polar factors


def wide_stack(count: int, short: int, long: int, seed: int = 0) -> Tensor:
    """(count, short, long) fp32 of norm one."""
    x = torch.randn(count, short, long, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=(1, 2), keepdim=True)


def coupled(x: Tensor, steps: int, beta: float) -> Tensor:
    """SWAN's form: Y to (X X^T)^(1/2) and Z to its inverse, then Z X."""
    identity = torch.eye(len(x), dtype=x.dtype)
    y, z = x @ x.T, identity
    for _ in range(steps):
        t = 3 * identity - z @ y
        y, z = beta * y @ t, beta * t @ z
    return z @ x


@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_the_polar_form_is_the_coupled_form(beta: float) -> None:
    for x in wide_stack(3, 12, 40).double():
        found = newton_schulz(x[None], 10, beta)[0]
        assert error(found, coupled(x, 10, beta)) <= 1e-10


def test_beta_of_a_half_converges_to_the_polar_factor() -> None:
    stack = wide_stack(3, 16, 48)
    u, _, vt = torch.linalg.svd(stack.double(), full_matrices=False)
    for found, wanted in zip(newton_schulz(stack, 20, 0.5), u @ vt, strict=True):
        assert error(found, wanted) <= 1e-5


def test_swans_beta_leaves_singular_values_within_its_bounds() -> None:
    values = torch.linalg.svdvals(newton_schulz(wide_stack(8, 24, 96), 10, 0.8).double())
    assert values.min() >= 0.563
    assert values.max() <= 1.6 + 1e-5


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 10])
def test_steps_are_steps_and_the_stack_is_left_alone(steps: int) -> None:
    stack = wide_stack(3, 5, 9)
    before = stack.clone()
    wanted = stack.double()
    for _ in range(steps):
        wanted = 0.8 * (3 * wanted - wanted @ wanted.mT @ wanted)
    found = newton_schulz(stack, steps, 0.8)
    assert torch.equal(stack, before)
    assert found.data_ptr() != stack.data_ptr()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_zero_matrix_stays_zero_and_a_transposed_stack_is_taken_as_it_is() -> None:
    assert not newton_schulz(torch.zeros(2, 3, 4), 10, 0.8).any()
    stack = wide_stack(3, 6, 11)
    transposed = stack.mT.contiguous().mT
    torch.testing.assert_close(newton_schulz(transposed, 10, 0.8), newton_schulz(stack, 10, 0.8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 40), (64, 64), (64, 1000), (129, 1025)])
def test_a_polar_factor_is_bitwise_the_same_in_any_stack(count: int, shape: tuple[int, int]) -> None:
    stack = wide_stack(6, *shape)
    with threads(count):
        whole = newton_schulz(stack, 10, 0.8)
        for chosen in ([0], [5], [2, 4], [1, 2, 3], [0, 1, 2, 3, 5]):
            assert torch.equal(newton_schulz(stack[chosen], 10, 0.8), whole[chosen])
        assert torch.equal(newton_schulz(stack[3:5], 10, 0.8), whole[3:5])  # where they are in memory


def test_a_matrix_that_is_not_finite_spoils_no_other_polar_factor() -> None:
    stack = wide_stack(3, 8, 12)
    spoiled = stack.clone()
    spoiled[1, 2, 3] = math.nan
    assert torch.equal(newton_schulz(spoiled, 10, 0.8)[::2], newton_schulz(stack, 10, 0.8)[::2])


@pytest.mark.parametrize("beta", [0.5, 0.8])
@pytest.mark.parametrize("shape", [(16, 25), (40, 160), (64, 65)])
def test_wide_matrices_take_the_gram_form_which_is_the_plain_one(
    shape: tuple[int, int], beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = wide_stack(2, *shape)
    calls: list[int] = []
    original = polar._gram_form
    monkeypatch.setattr(polar, "_gram_form", lambda *given: calls.append(1) or original(*given))
    for steps in (2, 5, 6, 10, 13):
        calls.clear()
        found = newton_schulz(stack, steps, beta)
        assert len(calls) == (2 if shape[1] > 1.5 * shape[0] else 0)
        monkeypatch.setattr(polar, "GRAM_FROM", math.inf)
        assert error(found, newton_schulz(stack, steps, beta)) <= 2e-4
        monkeypatch.setattr(polar, "GRAM_FROM", 1.5)


def test_the_gram_form_has_the_flops_that_are_written_down() -> None:
    rows, columns = 32, 128
    with FlopCounterMode(display=False) as counter:
        newton_schulz(wide_stack(1, rows, columns), 10, 0.8)
    assert counter.get_total_flops() == 2 * (4 * rows**2 * columns + 4 * 6 * rows**3)
    assert counter.get_total_flops() == polynomial_flops(rows, columns, cubic(0.8, 10), "ieee")
    with FlopCounterMode(display=False) as counter:
        newton_schulz(wide_stack(1, rows, columns), 10, 0.8, "tf32")
    assert counter.get_total_flops() == 10 * 4 * rows**2 * columns


POLYNOMIALS: dict[str, list[Coefficients]] = {"quintic": [QUINTIC] * 5, "polar express": list(POLAR_EXPRESS)}


def by_hand(stack: Tensor, steps: list[Coefficients]) -> Tensor:
    for a, b, c in steps:
        square = stack @ stack.mT
        stack = a * stack + (b * square + c * square @ square) @ stack
    return stack


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("shape", [(24, 24), (24, 30), (24, 100), (7, 300)])
def test_quintic_steps_are_what_they_are_by_hand(name: str, shape: tuple[int, int]) -> None:
    stack, steps = wide_stack(3, *shape) / 1.02, POLYNOMIALS[name]
    for count in (1, 2, 4, 5):
        found = polynomial_steps(stack, steps[:count])
        assert error(found, by_hand(stack.double(), steps[:count])) <= 3e-5
        assert torch.equal(polynomial_steps(stack[1:2], steps[:count]), found[1:2])
    ends = torch.linalg.svdvals(found.double())
    assert float(ends.median()) > 0.5
    assert float(ends.max()) < 1.2


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_matrices_of_low_rank_stay_near_the_truth_in_the_gram_form(name: str, seed: int) -> None:
    """What rounding makes of the null space of X X^T grows with every step; nothing may come of it."""
    steps = POLYNOMIALS[name]
    low = wide_stack(2, 3, 120, seed)
    stack = wide_stack(2, 3, 40, seed + 1).mT @ low
    stack = stack / (1.02 * stack.flatten(1).norm(dim=1).view(-1, 1, 1))
    truth = by_hand(stack.double(), steps)
    assert error(polynomial_steps(stack, steps), truth) <= 3 * max(error(by_hand(stack, steps), truth), 2e-5)


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("columns", [40, 128])
def test_quintic_steps_have_the_flops_that_are_written_down(name: str, columns: int) -> None:
    for precision in ("ieee", "bf16"):
        with FlopCounterMode(display=False) as counter:
            polynomial_steps(wide_stack(1, 32, columns), POLYNOMIALS[name], precision)  # type: ignore[arg-type]
        assert counter.get_total_flops() == polynomial_flops(32, columns, POLYNOMIALS[name], precision)  # type: ignore[arg-type]
    plain = 5 * (4 * 32**2 * columns + 2 * 32**3)
    assert (polynomial_flops(32, columns, POLYNOMIALS[name], "ieee") < plain) == (columns == 128)


# -- eigenbases --------------------------------------------------------------------------------------------------------


def basis_of(rows: Tensor) -> Tensor:
    return finish(first_bases(rows))


@pytest.mark.parametrize(("n", "k"), [(12, 30), (12, 12), (30, 7), (9, 1)])
def test_a_first_basis_has_the_eigenvectors_of_its_gradient_in_falling_order(n: int, k: int, seed: int) -> None:
    rows = wide_stack(2, n, k, seed) * 1e-12
    bases = basis_of(rows)
    torch.testing.assert_close(bases.mT @ bases, torch.eye(n).expand(2, n, n), rtol=0, atol=1e-6)
    factor = rows.double() @ rows.double().mT
    inside = bases.double().mT @ factor @ bases.double()
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert error(torch.diag_embed(values), inside) <= 1e-5
    assert bool((values[:, :-1] >= values[:, 1:] - 1e-6 * values[:, :1]).all())


def test_a_null_space_has_one_basis_whatever_the_decomposition_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = wide_stack(1, 20, 6)
    wanted = basis_of(rows)
    original = torch.linalg.eigh

    def another(matrix: Tensor) -> tuple[Tensor, Tensor]:
        """As another LAPACK might: null vectors turned among themselves, every second sign changed."""
        values, vectors = original(matrix)
        null = int((values <= 1e-12 * values[-1]).sum())
        if null > 1:
            turn, _ = torch.linalg.qr(torch.randn(null, null, dtype=matrix.dtype))
            vectors = torch.cat([vectors[:, :null] @ turn, vectors[:, null:]], 1)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", another)
    found = basis_of(rows)
    signs = (found * wanted).sum(-2, keepdim=True).sign()
    torch.testing.assert_close(found * signs, wanted, rtol=0, atol=1e-6)
    assert torch.equal(basis_of(torch.zeros(1, 5, 3)), torch.eye(5)[None])


def test_bases_follow_their_matrix(seed: int) -> None:
    """Power iteration turns them towards the eigenvectors, and says where each column came from."""
    factor = torch.stack([conditioned(16, 1e3), conditioned(16, 1e2)])
    bases = torch.linalg.qr(wide_stack(2, 16, 16, seed))[0]
    for _ in range(400):
        bases, order = finish(next_bases(factor, bases))
        assert torch.equal(order.sort(-1).values, torch.arange(16).expand(2, 16))
    inside = bases.double().mT @ factor.double() @ bases.double()
    assert error(torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), inside) <= 1e-3


@pytest.mark.parametrize("turn", [0.05, 10.0])
def test_no_direction_of_a_regular_matrix_is_lost(turn: float, seed: int) -> None:
    """However small, and near to bases or far from them: they are those of the decomposition alone."""
    generator = torch.Generator().manual_seed(seed)
    for size in (1, 5, 18):
        noise = [torch.randn(50, size, size, dtype=torch.float64, generator=generator) for _ in range(2)]
        vectors = torch.linalg.qr(noise[0])[0]
        matrices = ((vectors * torch.logspace(0, -5, size, dtype=torch.float64)) @ vectors.mT).float()
        old = torch.linalg.qr(vectors + turn * noise[1])[0].float()
        found, order = finish(next_bases(matrices, old))
        wanted, _ = torch.linalg.qr(matrices @ old.take_along_dim(order[:, None], -1))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_where_a_matrix_is_singular_its_old_vectors_stay(seed: int) -> None:
    """Columns that the iteration would draw out of rounding; also if the matrix has left the old range altogether.

    A column that is drawn out of rounding turns by about one (by 0.4 and more in one of ten such matrices, before it
    was told how much rounding the columns before it pass on); of 12,000 now none turned by more than 0.03, and one in
    some hundreds by more than 1e-3.
    """
    count = 40
    first, second = wide_stack(count, 18, 4, seed), wide_stack(count, 18, 4, seed + 1)
    old = basis_of(first)
    for rows in (first, second, torch.cat([first, second], 2)):
        factor = rows @ rows.mT
        found, order = finish(next_bases(factor, old))
        nudged, another = finish(next_bases(factor * (1 + 1e-7), old))
        torch.testing.assert_close(found.mT @ found, torch.eye(18).expand(count, 18, 18), rtol=0, atol=1e-5)
        is_tied = (order != another).any(1)  # two estimates that differ by less than was added
        assert int(is_tied.sum()) <= 1
        turned = (nudged - found).abs().amax((1, 2))[~is_tied]
        assert turned.max() <= (1e-3 if rows is first else 0.1)
        assert int((turned > 1e-3).sum()) <= count // 10
        if rows is first:
            signs = (found * old.take_along_dim(order[:, None], -1)).sum(-2, keepdim=True).abs()
            torch.testing.assert_close(signs, torch.ones_like(signs), rtol=0, atol=1e-3)


def failing(decompose: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A decomposition that does not converge in its ``at``-th call, from 1."""
    calls = itertools.count(1)

    def flaky(*given: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return decompose(*given, **named)

    return flaky


def test_a_basis_whose_decomposition_fails_is_not_a_number_and_the_others_are_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = wide_stack(3, 8, 12)
    factors, old = rows @ rows.mT, basis_of(rows)
    followed, order = finish(next_bases(factors, old))
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, 2))
    monkeypatch.setattr(torch.linalg, "qr", failing(torch.linalg.qr, 2))
    found, (next_found, next_order) = basis_of(rows), finish(next_bases(factors, old))
    assert torch.equal(next_order, order)
    for wanted, bases in ((old, found), (followed, next_found)):
        assert bases[1].isnan().all()
        assert torch.equal(bases[::2], wanted[::2])


# -- precision ---------------------------------------------------------------------------------------------------------


def test_operands_are_rounded_to_nearest_and_ties_to_even() -> None:
    unit = 2.0**-10
    values = torch.tensor([1 + unit / 4, 1 + unit / 2, 1 + 1.5 * unit, -1 - 0.75 * unit, 3e38, math.inf, -math.inf])
    wanted = torch.tensor([1, 1, 1 + 2 * unit, -1 - unit, 0, math.inf, -math.inf])
    wanted[4] = rounded(values, "tf32")[4]
    assert abs(float(wanted[4]) - 3e38) <= 3e38 * unit / 2
    assert torch.equal(rounded(values, "tf32"), wanted)
    assert rounded(torch.tensor([math.nan]), "tf32").isnan().all()
    assert torch.equal(rounded(values, "bf16"), values.bfloat16().float())
    assert rounded(values, "ieee") is values


@pytest.mark.parametrize(("precision", "bits"), [("ieee", 22), ("tf32", 10), ("bf16", 7)])
def test_a_product_loses_the_bits_of_its_operands_and_no_more(precision: MatmulPrecision, bits: int) -> None:
    a, b = wide_stack(2, 24, 50), wide_stack(2, 24, 50, seed=1).mT
    exact = rounded(a, precision).double() @ rounded(b, precision).double()
    found = product_in(precision)(a, b)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    lost = error(found, a.double() @ b.double())
    assert lost <= 2.0**-bits
    assert precision == "ieee" or lost >= 2.0 ** -(bits + 4)
    assert torch.equal(stacked_matmul(a, b, precision), found)
    assert torch.equal(gram(a, 0, precision), product_in(precision)(a, a.mT))
    matrices = gram(a, 0)
    assert torch.equal(apply_along(matrices, a, 0, precision), product_in(precision)(matrices, a))


def test_roots_lose_nothing_that_matters(seed: int) -> None:
    a, b = wide_stack(2, 24, 50, seed), wide_stack(2, 24, 50, seed + 1).mT
    assert error(product_for_roots("bf16")(a, b), a.double() @ b.double()) <= 2.0**-20
    factor = conditioned(48, 1e5)[None]
    wanted, _ = inverse_roots(factor, -1 / 4, eps=1e-6, relative=True, method="eigh")
    for precision in ("ieee", "tf32", "bf16"):
        found, failed = inverse_roots(factor, -1 / 4, eps=1e-6, relative=True, method="newton", precision=precision)  # type: ignore[arg-type]
        assert not failed.any()
        assert error(found, wanted.double()) <= 1e-3


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 1e-3), ("bf16", 3e-2)])
def test_a_polar_factor_in_fewer_bits_is_near_and_its_own(precision: MatmulPrecision, bound: float) -> None:
    stack = wide_stack(3, 32, 48)
    wanted = newton_schulz(stack, 10, 0.5)
    found = newton_schulz(stack, 10, 0.5, precision)
    assert bound / 100 <= error(found, wanted) <= bound
    assert torch.equal(newton_schulz(stack[1:2], 10, 0.5, precision), found[1:2])
    assert (precision == "bf16") == torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("order", [5, 256, 257, 700])
def test_the_flops_of_an_own_product_are_those_that_are_counted(order: int) -> None:
    """On a CPU, where half of a large symmetric product is left out; what is kept is right all the same."""
    stack = torch.randn(2, order, 3, generator=torch.Generator().manual_seed(order))
    kept = pack(torch.eye(order).repeat(2, 1, 1))
    with FlopCounterMode(display=False) as counter:
        add_gram_(kept, stack, 0, 0.5, 0.25)
    assert counter.get_total_flops() == 2 * own_product_flops(order, 3)
    assert (order > 256) == (own_product_flops(order, 3) < 2 * order**2 * 3)
    torch.testing.assert_close(kept, pack(0.5 * torch.eye(order) + 0.25 * stack @ stack.mT))
