"""A block's result is its own: not its address's, nor its neighbours', on whatever code path a processor takes.

Sums round by their order, and libraries choose the order: Intel's MKL on an AMD processor by where in memory a matrix
begins. Blocks begin anywhere, and elsewhere on another number of ranks. So here everything that a step does with blocks
is done at every place of a cache line, for sizes up to 64, and to stacks as well as to each block alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.kernels import Backend
from ds_optim.linalg.eigenbases import first_bases, next_bases
from ds_optim.linalg.inverse_roots import Method, inverse_roots
from ds_optim.linalg.packed import order_of, pack, packed_size, unpack
from ds_optim.linalg.polar import newton_schulz
from ds_optim.linalg.precision import PRECISIONS, MatmulPrecision
from ds_optim.linalg.products import add_gram_, apply_along, block_norms, gram, rotate_along, stacked_matmul
from ds_optim.linalg.workers import finish
from ds_optim.optimizers.muon import orthogonalize_
from ds_optim.optimizers.swan import swan_update_
from ds_optim.rule import Stack
from test_kernels import FORMULAS, Blocks, Tensors, same_bits

Shape = tuple[int, ...]
Function = Callable[..., Tensor]

LINE = 16  # elements of fp32
SIZES = (*range(1, 35), 40, 47, 48, 49, 63, 64)  # every remainder of a cache line, and around whole tiles of products
SQUARE: list[Shape] = [(n, n) for n in SIZES]
OBLONG: list[Shape] = [(m, n) for m in (1, 2, 3, 5, 8, 33, 64) for n in (1, 2, 7, 16, 36, 45, 64) if m != n]
MATRICES = SQUARE + OBLONG
VECTORS: list[Shape] = [(n,) for n in (1, 2, 7, 36, 64)]
TENSORS: list[Shape] = [(3, 4, 5), (5, 36, 2), (8, 4, 3, 3), (1, 9, 1, 11)]


def placed(values: Tensor, offset: int) -> Tensor:
    """A copy that begins so many elements behind the beginning of a cache line."""
    room = torch.empty(values.numel() + 3 * LINE, dtype=values.dtype)
    begin = -room.data_ptr() // values.itemsize % LINE + offset
    return room[begin : begin + values.numel()].view(values.shape).copy_(values)


def drawn(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def statistics(count: int, size: int) -> Tensor:
    """Symmetric and positive definite."""
    gradient = drawn(count, size, size + 3).double()
    return (gradient @ gradient.mT).float()


def product(shape: Shape, count: int) -> list[Tensor]:
    return [drawn(count, *shape), drawn(count, *shape[::-1])]


def pair(shape: Shape, count: int) -> list[Tensor]:
    return [drawn(count, *shape), drawn(count, *shape)]


def block(shape: Shape, count: int) -> list[Tensor]:
    return [drawn(count, *shape)]


def wide(shape: Shape, count: int) -> list[Tensor]:
    return [drawn(count, *sorted(shape)) / max(shape)]


def factors(shape: Shape, count: int) -> list[Tensor]:
    return [statistics(count, shape[0])]


def rooted(axis: int) -> Callable[[Shape, int], list[Tensor]]:
    return lambda shape, count: [statistics(count, shape[axis]), drawn(count, *shape)]


def packed_root(axis: int) -> Callable[[Shape, int], list[Tensor]]:
    return lambda shape, count: [pack(statistics(count, shape[axis])), drawn(count, *shape)]


def applied(axis: int) -> Function:
    return lambda matrices, stack: apply_along(matrices, stack, axis)


def with_factor(axis: int) -> Callable[[Shape, int], list[Tensor]]:
    return lambda shape, count: [drawn(count, packed_size(shape[axis])), drawn(count, *shape)]


def added(axis: int) -> Function:
    """What is kept begins where it is given."""

    def add(kept: Tensor, stack: Tensor) -> Tensor:
        before = kept.clone()
        add_gram_(kept, stack, axis, 0.9, 0.1)
        result = kept.clone()
        kept.copy_(before)
        return result

    return add


def gram_of(axis: int) -> Function:
    return lambda stack: gram(stack, axis)


def roots(method: Method) -> Function:
    return lambda stack: inverse_roots(stack, -1 / 4, eps=1e-6, relative=True, method=method)[0]


def swan(dim: int) -> Function:
    return lambda stack: swan_update_(stack, dim, steps=2, beta=0.8)


FUNCTIONS: dict[str, tuple[list[Shape], Callable[[Shape, int], list[Tensor]], Function]] = {
    "stacked_matmul": (MATRICES, product, stacked_matmul),
    "stacked_matmul of a transposed": (MATRICES, pair, lambda a, b: stacked_matmul(a.mT, b)),
    "gram over axis 0": (MATRICES + VECTORS + TENSORS, block, gram_of(0)),
    "gram over axis 1": (MATRICES + TENSORS, block, gram_of(1)),
    "gram over axis 2": (TENSORS, block, gram_of(2)),
    "add_gram_ over axis 0": (MATRICES + TENSORS + [(257, 7), (300, 40)], with_factor(0), added(0)),
    "add_gram_ over axis 1": (MATRICES + TENSORS + [(7, 257), (33, 529)], with_factor(1), added(1)),
    "apply_along axis 0": (MATRICES + VECTORS + TENSORS, rooted(0), applied(0)),
    "apply_along axis 1": (MATRICES + TENSORS, rooted(1), applied(1)),
    "apply_along axis 2": (TENSORS, rooted(2), applied(2)),
    "apply_along axis 0, packed": (MATRICES + VECTORS + TENSORS, packed_root(0), applied(0)),
    "apply_along axis 1, packed": (MATRICES + TENSORS, packed_root(1), applied(1)),
    "block_norms": (MATRICES + VECTORS + TENSORS, block, block_norms),
    "newton_schulz": (MATRICES, wide, lambda stack: newton_schulz(stack, 3, 0.8)),
    "orthogonalize_": (
        MATRICES,
        block,
        lambda stack: orthogonalize_(stack, {"ns_steps": 2, "ns_coefficients": "quintic"}),
    ),
    "rotate_along axis 0": (MATRICES + TENSORS, rooted(0), lambda q, stack: rotate_along(q, stack, 0)),
    "rotate_along axis 1, back": (MATRICES + TENSORS, rooted(1), lambda q, stack: rotate_along(q, stack, 1, back=True)),
    "first_bases": (MATRICES, block, lambda stack: finish(first_bases(stack))),
    "next_bases": (
        SQUARE,
        factors,
        lambda stack: finish(next_bases(stack, torch.eye(stack.shape[-1]).expand_as(stack)))[0],
    ),
    "swan_update_ over rows": (MATRICES, block, swan(1)),
    "swan_update_ over columns": (MATRICES, block, swan(2)),
    "inverse_roots by eigh": (SQUARE, factors, roots("eigh")),
    "inverse_roots by eigh32": (SQUARE, factors, roots("eigh32")),
    "inverse_roots by newton": (SQUARE, factors, roots("newton")),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_result_does_not_depend_on_where_blocks_begin(name: str) -> None:
    shapes, operands, function = FUNCTIONS[name]
    for shape in shapes:
        given = operands(shape, 2)
        wanted = function(*(placed(one, 0) for one in given))
        for offset in range(1, LINE + 1):
            found = function(*(placed(one, offset * (1 + index)) for index, one in enumerate(given)))
            assert torch.equal(found, wanted), f"{shape}, {offset} elements behind the beginning of a cache line"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_result_does_not_depend_on_its_neighbours(name: str) -> None:
    shapes, operands, function = FUNCTIONS[name]
    for shape in shapes:
        given = operands(shape, 5)
        together = function(*(one.clone() for one in given))
        for part in (slice(0, 1), slice(1, 2), slice(4, 5), slice(2, 4)):
            alone = function(*(one[part].clone() for one in given))
            assert torch.equal(alone, together[part]), f"{shape}, blocks {part}"


@pytest.mark.parametrize(
    ("count", "shape"), [(0, (3, 4)), (3, (4, 16)), (2, (5, 7)), (1, (255, 259)), (3, (255, 259)), (1500, (9, 5))]
)
def test_products_are_products_whatever_is_copied_on_the_way(count: int, shape: Shape) -> None:
    """Also where a single matrix is more than is copied together, or a stack is."""
    for offset in (0, 1):
        stack, other, matrices = (placed(drawn(count, *s), offset) for s in (shape, shape[::-1], (shape[0], shape[0])))
        for found, wanted in (
            (stacked_matmul(stack, other), stack.double() @ other.double()),
            (stacked_matmul(other.mT, stack.mT), other.double().mT @ stack.double().mT),
            (gram(stack, 1), stack.double().mT @ stack.double()),
            (apply_along(matrices, stack, 0), matrices.double() @ stack.double()),
        ):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 31, 256, 257, 300, 700])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gram_is_added_inside_its_product(rows: int, axis: int, precision: MatmulPrecision) -> None:
    """By halves where there are many rows."""
    stack = placed(drawn(2, *((rows, 40) if axis == 0 else (40, rows))), 3)
    kept = statistics(2, rows)
    wanted = 0.9 * kept.double() + 0.1 * gram(stack, axis, precision).double()
    found = add_gram_(placed(pack(kept), 5), stack, axis, 0.9, 0.1, precision)
    torch.testing.assert_close(unpack(found).double(), wanted, rtol=1e-5, atol=1e-5)


def updated(optimizer: Any, shape: Shape, count: int, offset: int, which: slice) -> dict[str, Tensor]:
    """What a rule makes of some of `count` blocks, and of their state: everything begins `offset` behind a line."""
    state = {}
    for name, (its, dtype) in optimizer.stepper.plans.state_of_block(shape).items():
        if dtype == torch.int32:
            values = torch.full((count,), int(name == "based"), dtype=dtype)
        elif name.startswith(("factor", "root")):
            values = pack(statistics(count, order_of(its[0])))
        elif name.startswith("basis"):
            values = torch.linalg.qr(drawn(count, *its))[0]
        else:
            values = drawn(count, *its).square()
        state[name] = placed(values[which], offset)
    grads = placed(drawn(count, *shape)[which], offset)
    good = torch.ones(len(grads), dtype=torch.bool)
    stack = Stack(shape, grads, state, good, 2, (0,) * len(grads))
    before = grads.clone()
    update = optimizer.rule.update(optimizer.param_groups[0], stack)
    if not isinstance(update, Mapping):
        finish(update)
    assert not torch.equal(grads, before)
    assert "rooted" not in state or bool(state["rooted"].all())
    return {"update": grads, **state}


SHAMPOO = {"precondition_frequency": 1, "start_preconditioning_step": 1}
RULES = {
    "Shampoo": (ds_optim.Shampoo, SHAMPOO),
    "Shampoo as in the paper": (ds_optim.Shampoo, {"betas": (0, 1), "graft": None, "ridge": "absolute", **SHAMPOO}),
    "SWAN": (ds_optim.SWAN, {}),
    "NorMuon": (ds_optim.NorMuon, {"ns_steps": 2}),
    "SOAP": (ds_optim.SOAP, {"precondition_frequency": 1}),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rules_update_is_the_blocks_own(rule: str) -> None:
    cls, settings = RULES[rule]
    optimizer = cls([nn.Parameter(torch.zeros(2, 2))], **settings)
    # A whole matrix is (inputs in front, outputs, inputs behind).
    shapes = [(1, *shape) for shape in MATRICES] if rule in ("SWAN", "NorMuon") else MATRICES
    for shape in [*shapes, (2, 4, 5), (5, 36, 2)]:
        wanted = updated(optimizer, shape, 3, 0, slice(None))
        for offset, which in ((1, slice(None)), (6, slice(1, 2))):
            for name, found in updated(optimizer, shape, 3, offset, which).items():
                assert torch.equal(found, wanted[name][which]), f"{name}, {shape}, {offset} elements behind a line"


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("rule", FORMULAS)
def test_an_elementwise_update_does_not_depend_on_where_tensors_begin(rule: str, backend: Backend, seed: int) -> None:
    for size in (*SIZES, 1000):
        start = Tensors.random(rule, [size], seed)
        results = []
        for offset in range(LINE + 1):
            moved = Tensors(
                [placed(start.params[0], offset)],
                [placed(start.grads[0], 2 * offset)],
                [[placed(state[0], 3 * offset % LINE)] for state in start.states],
            )
            moved.step(backend, rule, [(0, 0, size)])
            results.append(moved.flat())
        assert all(same_bits(results[0], found) for found in results), size


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("row_length", [None, "columns"])
def test_a_blockwise_update_does_not_depend_on_where_blocks_begin(
    backend: Backend, row_length: str | None, seed: int
) -> None:
    """Blocks of many sizes behind one another, so that each begins somewhere else already."""
    parts = [(2, size) for size in (*SIZES, 300)]
    blocks = Blocks(parts, sum(2 * size for _, size in parts) if row_length else None, 3 if row_length else 1, seed)
    results = []
    for offset in range(LINE + 1):
        made = blocks.shards([], 0)
        made.params = [placed(made.params[0], offset)]
        made.grads = [placed(made.grads[0], 2 * offset)]
        made.averages = [placed(made.averages[0], 3 * offset % LINE)]
        made.squares = [placed(made.squares[0], offset)]
        made.step(backend, split=False)
        results.append([*made.params, *made.averages, *made.squares])
    assert all(same_bits(results[0], found) for found in results)


@pytest.mark.long
@pytest.mark.parametrize(("mkl", "aten"), [("AVX2", "avx2"), ("SSE4_2", "default")])
def test_the_same_holds_on_the_code_paths_of_other_processors(mkl: str, aten: str) -> None:
    """The libraries read these when they are loaded. MKL's is for Intel processors; elsewhere it may choose itself."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "a_result_does_not or a_rules_update"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "MKL_ENABLE_INSTRUCTIONS": mkl, "ATEN_CPU_CAPABILITY": aten},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
