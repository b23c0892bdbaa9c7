"""The kernels: every backend computes the formula, on the elements that the tables name and on no others.

The oracle for blocks is element by element: which block an element belongs to is worked out from the columns of a table
as `ds_optim.kernels.tables` describes them, without that file's code, and sums are taken in fp64.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_optim import kernels
from ds_optim.kernels import Formula, Operands, Tables, native
from ds_optim.kernels.build import built_library
from ds_optim.kernels.tables import table_of
from ds_optim.optimizers.adam_mini import adam_mini_update
from ds_optim.optimizers.adamw import adamw_update
from ds_optim.optimizers.adan import adan_update
from ds_optim.optimizers.lion import lion_update
from ds_optim.optimizers.matrix_passes import ADAM_GRAFT, MOMENTUM

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = {"decay": 0.999, "beta1": 0.9, "one_minus_beta1": 0.1, "beta2": 0.95, "one_minus_beta2": 0.05}
ADAM = {**MOMENTS, "step_size": 0.01, "bias2_sqrt": 0.3, "eps": 1e-8}
SCALARS = {
    "adamw": ADAM,
    "lion": {**MOMENTS, "lr": 1e-3},
    "adan": {
        **MOMENTS,
        "beta3": 0.99,
        "one_minus_beta3": 0.01,
        "step_size": 0.01,
        "step_size_diff": 0.02,
        "bias3_sqrt": 0.2,
        "eps": 1e-8,
        "shrink": 1.001,
        "has_previous": 1.0,
    },
    "momentum": {"beta": 0.9, "weight": 0.1, "of_average": 0.7, "of_gradient": 0.3},
    "adam_graft": {
        **{key: value for key, value in MOMENTS.items() if key != "decay"},
        "bias1": 0.3,
        "bias2": 0.2,
        "eps": 1e-8,
    },
}
VARIED = {"adamw": "step_size", "lion": "lr", "adan": "step_size", "momentum": "of_average", "adam_graft": "bias1"}
"""A scalar of each rule that is another one in every step."""
FORMULAS = {
    "adamw": Formula("adamw", adamw_update, 2, 0),
    "lion": Formula("lion", lion_update, 1, 0),
    "adan": Formula("adan", adan_update, 4, 0),
    "momentum": MOMENTUM,
    "adam_graft": ADAM_GRAFT,
}
ADAM_MINI = Formula("adam_mini", adam_mini_update, 1, 1)
NO_SUMS = torch.zeros(0, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- elementwise rules ---------------------------------------------------------------------------------------


@dataclass
class Tensors:
    """Everything that an elementwise call works on; states are listed per state, then per tensor."""

    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[list[Tensor]]

    @classmethod
    def random(
        cls,
        rule: str,
        numels: list[int],
        seed: int,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    ) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def draw(dtype: torch.dtype) -> list[Tensor]:
            return [torch.randn(numel, generator=generator).to(dtype) for numel in numels]

        param, grad, state = dtypes
        states = [[tensor.abs() for tensor in draw(state)] for _ in range(FORMULAS[rule].states)]
        return cls(draw(param), list(draw(grad)), states)

    def clone(self) -> Tensors:
        grads = [None if grad is None else grad.clone() for grad in self.grads]
        return Tensors([p.clone() for p in self.params], grads, [[s.clone() for s in state] for state in self.states])

    def step(self, backend: kernels.Backend, rule: str, spans: list[tuple[int, int, int]], **changed: float) -> None:
        scalars = {**SCALARS[rule], **changed}
        kernels.elementwise(backend, FORMULAS[rule], self.operands(spans, scalars))

    def operands(self, spans: list[tuple[int, int, int]], scalars: dict[str, float]) -> Operands:
        tables = Tables(spans=table_of(spans, 3))
        return Operands(self.params, self.grads, self.states, [], tables, scalars, None, NO_SUMS)

    def flat(self) -> list[Tensor]:
        return [*self.params, *itertools.chain.from_iterable(self.states)]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal to the last bit, NaN at the same places."""
    integers = {4: torch.int32, 2: torch.int16}
    return all(
        bool(
            torch.all(
                (a.view(integers[a.element_size()]) == b.view(integers[b.element_size()])) | (a.isnan() & b.isnan())
            )
        )
        for a, b in zip(left, right, strict=True)
    )


def assert_agree(left: list[Tensor], right: list[Tensor]) -> None:
    """To 1e-6, or a last place of a shorter format. Not to the last bit of fp32: torch takes its roots from MKL, whose
    last bit may be off."""
    for a, b in zip(left, right, strict=True):
        limit = max(1e-6, torch.finfo(a.dtype).eps)
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("rule", FORMULAS)
def test_the_cpp_kernel_is_the_formula(rule: str, seed: int) -> None:
    start = Tensors.random(rule, [4099, 7, 1, 0], seed)
    spans = [(0, 0, 4099), (1, 0, 7), (2, 0, 1), (3, 0, 0)]
    results = {}
    for backend in ("native", "eager"):
        results[backend] = start.clone()
        for step_size in (0.01, 0.02, 0.005):
            results[backend].step(backend, rule, spans, **{VARIED[rule]: step_size})
    assert_agree(results["native"].flat(), results["eager"].flat())
    assert not torch.equal(results["native"].params[0], start.params[0])


@pytest.mark.parametrize("rule", FORMULAS)
def test_every_dtype_is_computed_in_fp32_and_rounded_once(rule: str, seed: int) -> None:
    for dtypes in itertools.product(FLOATS, repeat=3):
        start = Tensors.random(rule, [2100], seed, dtypes)
        spans = [(0, 5, 2090)]
        by_cpp, by_torch = start.clone(), start.clone()
        by_cpp.step("native", rule, spans)
        by_torch.step("eager", rule, spans)
        assert_agree(by_cpp.flat(), by_torch.flat())


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_half_precision_numbers_are_converted_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator, dtype=torch.int64).to(torch.int32)
    wide = torch.cat([patterns.view(torch.float32), every.float(), every.float().nextafter(torch.tensor(1.0))])
    ties = (every.float() + torch.cat([every[1:], every[:1]]).float()) / 2
    wide = torch.cat([wide, ties])
    # Without decay and at learning rate 0 the parameter keeps its value; the momentum becomes the gradient.
    scalars = {"decay": 1.0, "lr": 0.0, "beta1": 1.0, "one_minus_beta1": 0.0, "beta2": 0.0, "one_minus_beta2": 1.0}
    ordinary = every[every.isfinite()]
    kept = Tensors([ordinary.clone()], [torch.ones_like(ordinary)], [[torch.zeros_like(ordinary)]])
    kept.step("native", "lion", [(0, 0, ordinary.numel())], **scalars)
    assert torch.equal(kept.params[0], ordinary)

    narrowed = Tensors([torch.zeros_like(wide)], [wide], [[torch.zeros(wide.numel(), dtype=dtype)]])
    narrowed.step("native", "lion", [(0, 0, wide.numel())], **scalars)
    expected = (wide + 0.0).to(dtype)  # the formula adds a zero
    assert same_bits(narrowed.states[0], [expected])


@given(cuts=st.lists(st.integers(1, 69_999), max_size=6), threads=st.sampled_from((1, 2, 5)), data=st.integers(0, 99))
@settings(max_examples=25)
@pytest.mark.parametrize("rule", FORMULAS)
def test_an_update_does_not_depend_on_how_tensors_are_cut_nor_on_threads(
    rule: str, cuts: list[int], threads: int, data: int
) -> None:
    whole = Tensors.random(rule, [70_000], data)
    pieces = whole.clone()
    torch.set_num_threads(1)
    whole.step("native", rule, [(0, 0, 70_000)])
    torch.set_num_threads(threads)
    edges = sorted({0, *cuts, 70_000})
    pieces.step("native", rule, [(0, a, b - a) for a, b in itertools.pairwise(edges)])
    assert same_bits(whole.flat(), pieces.flat())


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
@pytest.mark.parametrize("rule", FORMULAS)
def test_padding_is_neither_read_nor_written(rule: str, backend: kernels.Backend, seed: int) -> None:
    tensors = Tensors.random(rule, [1000, 1000], seed)
    spans = [(0, 3, 400), (1, 0, 1), (1, 990, 10)]
    inside = [torch.zeros(1000, dtype=torch.bool) for _ in range(2)]
    for index, start, length in spans:
        inside[index][start : start + length] = True
    for stream in (tensors.params, tensors.grads, *tensors.states):
        for tensor, mask in zip(stream, inside, strict=True):
            assert tensor is not None
            tensor[~mask] = float("nan")
    grads = [grad.clone() for grad in tensors.grads if grad is not None]
    before = tensors.clone()
    tensors.step(backend, rule, spans)
    for stream, old in zip((tensors.params, *tensors.states), (before.params, *before.states), strict=True):
        for tensor, past, mask in zip(stream, old, inside, strict=True):
            assert tensor[mask].isfinite().all()
            assert tensor[~mask].isnan().all()
            if stream is tensors.params:
                assert not torch.equal(tensor[mask], past[mask])
    assert same_bits([grad for grad in tensors.grads if grad is not None], grads)


@pytest.mark.parametrize("rule", FORMULAS)
def test_a_missing_gradient_counts_as_zero(rule: str, seed: int) -> None:
    zeros = Tensors.random(rule, [3000], seed)
    absent = zeros.clone()
    zeros.grads = [torch.zeros(3000)]
    absent.grads = [None]
    zeros.step("native", rule, [(0, 0, 3000)])
    absent.step("native", rule, [(0, 0, 3000)])
    assert same_bits(zeros.flat(), absent.flat())


def test_hundreds_of_tiny_tensors_are_all_updated(seed: int) -> None:
    numels = [1 + 37 * i % 900 for i in range(400)]
    by_cpp = Tensors.random("adamw", numels, seed)
    by_torch = by_cpp.clone()
    spans = [(i, 0, numel) for i, numel in enumerate(numels)]
    torch.set_num_threads(3)
    by_cpp.step("native", "adamw", spans)
    by_torch.step("eager", "adamw", spans)
    assert_agree(by_cpp.flat(), by_torch.flat())


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_lions_sign_is_zero_at_zero_and_hides_no_nan(backend: kernels.Backend) -> None:
    gradient = torch.tensor([0.0, -0.0, 2.0, -3.0, float("inf"), float("nan")])
    tensors = Tensors([torch.ones(6)], [gradient], [[torch.zeros(6)]])
    tensors.step(backend, "lion", [(0, 0, 6)], decay=1.0, lr=0.25)
    expected = torch.tensor([1.0, 1.0, 0.75, 1.25, 0.75, float("nan")])
    torch.testing.assert_close(tensors.params[0], expected, equal_nan=True, rtol=0, atol=0)


def test_autograd_hears_of_the_update(seed: int) -> None:
    tensors = Tensors.random("adamw", [10], seed)
    version = tensors.params[0]._version
    tensors.step("native", "adamw", [(0, 0, 10)])
    assert tensors.params[0]._version > version


def test_scalars_may_be_tensors(seed: int) -> None:
    number = Tensors.random("lion", [100], seed)
    for backend in ("native", "eager"):
        tensor = number.clone()
        tensor.step(backend, "lion", [(0, 0, 100)], lr=torch.tensor(1e-3))  # type: ignore[arg-type]
        expected = number.clone()
        expected.step(backend, "lion", [(0, 0, 100)])
        assert same_bits(tensor.flat(), expected.flat())


# -- blockwise rules -----------------------------------------------------------------------------------------


@dataclass
class Shards:
    """A matrix or a list of rows, cut over ranks: a local tensor each, padded by NaN in front and behind."""

    params: list[Tensor]
    grads: list[Tensor | None]
    averages: list[Tensor]
    squares: list[Tensor]
    rows: list[list[tuple[int, ...]]]
    columns: list[list[tuple[int, ...]]]
    num_cuts: int

    def step(self, backend: kernels.Backend, *, split: bool, threads: int = 1, formula: Formula = ADAM_MINI) -> None:
        """Partial sums on every rank, their sum, the update on every rank."""
        torch.set_num_threads(threads)
        total = torch.zeros(self.num_cuts, dtype=torch.float64)
        for rank in range(len(self.params)):
            kernels.partial_sums(backend, self._operands(rank, total))
        for rank in range(len(self.params)):
            for select in ("uncut", "cut") if split else ("all",):
                kernels.blockwise(backend, formula, self._operands(rank, total), select)

    def _operands(self, rank: int, total: Tensor) -> Operands:
        tables = Tables(
            row_runs=table_of(self.rows[rank], 8), column_runs=table_of(self.columns[rank], 11), num_cuts=self.num_cuts
        )
        return Operands(
            *([self.params[rank]], [self.grads[rank]], [[self.averages[rank]]], [[self.squares[rank]]]),
            *(tables, ADAM, None, total),
        )


@dataclass
class Blocks:
    """One parameter whose elements carry a block number each: what shards of it must reproduce.

    With a row length, blocks are groups of columns, ``parts`` runs of (count, width); without, they are runs of
    consecutive elements.
    """

    parts: list[tuple[int, int]]
    row_length: int | None
    rows: int
    seed: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        widths = [width for count, width in self.parts for _ in range(count)]
        labels = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
        self.labels = labels.repeat(self.rows) if self.row_length else labels
        numel = self.labels.numel()
        param, grad, average = self.dtypes
        self.param = torch.randn(numel, generator=generator).to(param)
        self.grad = (torch.randn(numel, generator=generator) * 0.1).to(grad)
        self.average = torch.randn(numel, generator=generator).to(average)
        self.square = torch.rand(len(widths), generator=generator)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parameter, average and block state after a step, in fp64."""
        sums = torch.zeros(self.square.numel(), dtype=torch.float64)
        sums.index_add_(0, self.labels, self.grad.double().square())
        mean = sums / torch.bincount(self.labels, minlength=self.square.numel())
        scalars = {name: torch.tensor(value, dtype=torch.float32).double() for name, value in ADAM.items()}
        square = self.square.double() * scalars["beta2"] + scalars["one_minus_beta2"] * mean
        average = self.average.double()
        average = average + (self.grad.double() - average) * scalars["one_minus_beta1"]
        factor = scalars["step_size"] / (square.sqrt() / scalars["bias2_sqrt"] + scalars["eps"])
        return self.param.double() * scalars["decay"] - average * factor[self.labels], average, square

    def shards(self, cuts: list[int], padding: int) -> Shards:
        """The parameter cut at the given elements, with the tables that describe each fragment."""
        edges = sorted({0, *cuts, self.labels.numel()})
        cut_blocks: dict[int, int] = {}
        for cut in edges[1:-1]:
            before, after = set(self.labels[:cut].tolist()), set(self.labels[cut:].tolist())
            for block in sorted(before & after):
                cut_blocks.setdefault(block, len(cut_blocks))
        made = Shards([], [], [], [], [], [], len(cut_blocks))
        for start, stop in itertools.pairwise(edges):
            nan = torch.full((padding,), float("nan"))
            for into, source in ((made.params, self.param), (made.grads, self.grad), (made.averages, self.average)):
                into.append(torch.cat([nan.to(source.dtype), source[start:stop], nan.to(source.dtype)]))
            if self.row_length is None:
                self._append_rows(made, start, stop, padding, cut_blocks)
            else:
                self._append_columns(made, start, stop, padding, cut_blocks)
        return made

    def _append_rows(self, made: Shards, start: int, stop: int, padding: int, cut_blocks: dict[int, int]) -> None:
        rows, held, position, block = [], [], 0, 0
        for count, width in self.parts:
            first, last = max(start, position), min(stop, position + count * width)
            if first < last:
                first_block = block + (first - position) // width
                last_block = block + (last - 1 - position) // width
                phase = (first - position) % width
                local = padding + first - start
                cut_first, cut_last = cut_blocks.get(first_block, -1), cut_blocks.get(last_block, -1)
                rows.append((0, local, last - first, phase, width, len(held), cut_first, cut_last))
                held += range(first_block, last_block + 1)
            position, block = position + count * width, block + count
        made.rows.append(rows)
        made.columns.append([])
        made.squares.append(self.square[held].clone())

    def _append_columns(self, made: Shards, start: int, stop: int, padding: int, cut_blocks: dict[int, int]) -> None:
        rows, column, block = [], 0, 0
        for count, width in self.parts:
            cut = cut_blocks.get(block, -1)  # if one is cut, the others are too unless they end in time
            assert cut < 0 or [cut_blocks.get(block + k, -1) for k in range(count)] == list(range(cut, cut + count))
            stops = (column, column + count * width)
            rows.append(
                (0, padding, stop - start, start, self.row_length, *stops, width, block, cut, self.rows * width)
            )
            column, block = column + count * width, block + count
        made.rows.append([])
        made.columns.append(rows)
        made.squares.append(self.square.clone())

    def check(self, made: Shards, cuts: list[int], padding: int, tolerance: float = 1e-6) -> None:
        edges = sorted({0, *cuts, self.labels.numel()})
        param, average, square = self.expected()
        for rank, (start, stop) in enumerate(itertools.pairwise(edges)):
            inside = slice(padding, padding + stop - start)
            for tensor, whole in ((made.params[rank], param), (made.averages[rank], average)):
                limit = max(tolerance, torch.finfo(tensor.dtype).eps)
                torch.testing.assert_close(tensor[inside].double(), whole[start:stop], rtol=limit, atol=limit)
                assert tensor[:padding].isnan().all()
                assert tensor[inside.stop :].isnan().all()
            held = self.labels[start:stop].unique() if self.row_length is None else slice(None)
            torch.testing.assert_close(made.squares[rank].double(), square[held], rtol=tolerance, atol=0)


row_parts = st.lists(
    st.tuples(
        st.integers(1, 9), st.sampled_from((1, 2, 7, 15, 16, 17, 31, 64, 128, 255, 256, 300, 512, 513, 768, 1025, 2048))
    ),
    min_size=1,
    max_size=4,
)


@given(parts=row_parts, data=st.data())
@settings(max_examples=40)
@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_blocks_cut_over_ranks_are_updated_as_if_whole(
    backend: kernels.Backend, parts: list[tuple[int, int]], data: st.DataObject
) -> None:
    blocks = Blocks(parts, None, 1, data.draw(st.integers(0, 99)))
    cuts = data.draw(st.lists(st.integers(0, blocks.labels.numel()), max_size=4))
    padding = data.draw(st.sampled_from((0, 1, 16)))
    made = blocks.shards(cuts, padding)
    made.step(backend, split=data.draw(st.booleans()), threads=data.draw(st.sampled_from((1, 3))))
    blocks.check(made, cuts, padding)


@given(
    parts=st.lists(st.tuples(st.integers(1, 5), st.sampled_from((1, 3, 8, 40))), min_size=1, max_size=3),
    rows=st.sampled_from((1, 2, 5, 33, 70, 600)),
    data=st.data(),
)
@settings(max_examples=20)
@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_column_blocks_cut_over_ranks_are_updated_as_if_whole(
    backend: kernels.Backend, parts: list[tuple[int, int]], rows: int, data: st.DataObject
) -> None:
    row_length = sum(count * width for count, width in parts)
    blocks = Blocks(parts, row_length, rows, data.draw(st.integers(0, 99)))
    # A cut inside the first or the last row leaves some columns whole: layouts call all blocks of such a matrix cut.
    cuts = data.draw(st.lists(st.integers(row_length, max(row_length, (rows - 1) * row_length)), max_size=3))
    cuts = [cut for cut in cuts if cut < rows * row_length]
    padding = data.draw(st.sampled_from((0, 3)))
    made = blocks.shards(cuts, padding)
    made.step(backend, split=data.draw(st.booleans()), threads=data.draw(st.sampled_from((1, 3))))
    blocks.check(made, cuts, padding)


@pytest.mark.parametrize("dtypes", [(a, b, c) for a in FLOATS for b in FLOATS for c in FLOATS[:2]])
def test_blockwise_updates_of_every_dtype(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], seed: int) -> None:
    for blocks in (
        Blocks([(40, 1), (3, 12), (2, 2500), (5, 700)], None, 1, seed, dtypes),
        Blocks([(3, 64), (700, 3)], 3 * 64 + 2100, 40, seed, dtypes),
    ):
        cuts = [37, blocks.labels.numel() // 2] if blocks.row_length is None else [blocks.labels.numel() // 2]
        made = blocks.shards(cuts, 2)
        made.step("native", split=False)
        blocks.check(made, cuts, 2)


def test_a_huge_block_and_wide_columns_do_not_depend_on_threads(seed: int) -> None:
    huge = Blocks([(1, 1_200_001), (3, 70_000), (2000, 5)], None, 1, seed)
    wide = Blocks([(30, 100), (9000, 1)], 12_000, 70, seed)
    for blocks in (huge, wide):
        results = []
        for threads in (1, 2, 5):
            made = blocks.shards([], 0)
            made.step("native", split=False, threads=threads)
            results.append([made.params[0], made.averages[0], made.squares[0]])
        blocks.check(made, [], 0)
        assert same_bits(results[0], results[1])
        assert same_bits(results[0], results[2])


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_blocks_without_gradient_decay(backend: kernels.Backend, seed: int) -> None:
    blocks = Blocks([(3, 5), (2, 600)], None, 1, seed)
    zeros, skipped = blocks.shards([], 0), blocks.shards([], 0)
    zeros.grads[0].zero_()
    skipped.grads[0] = None
    zeros.step(backend, split=False)
    skipped.step(backend, split=False)
    assert same_bits([*zeros.params, *zeros.squares], [*skipped.params, *skipped.squares])


# -- choice, build, refusals ---------------------------------------------------------------------------------


def test_the_environment_may_force_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert kernels.backend_for(None, cpu) == "native"
    for name in ("native", "triton", "eager"):
        monkeypatch.setenv("DS_OPTIM_KERNELS", name)
        assert kernels.backend_for(None, cpu) == name
    monkeypatch.setenv("DS_OPTIM_KERNELS", "fast")
    with pytest.raises(ValueError, match="native, triton, eager"):
        kernels.backend_for(None, cpu)


def momentum_update(param: Tensor, grad: Tensor, average: Tensor, *, decay: float, beta1: float) -> tuple[Tensor, ...]:
    average = average * beta1 + grad
    return param * decay - 0.01 * average, average


def block_rms_update(
    param: Tensor,
    grad: Tensor,
    mean_square: Tensor,
    average: Tensor,
    largest: Tensor,
    *,
    decay: float,
    beta1: float,
    **_: float,
) -> tuple[Tensor, ...]:
    average, largest = average * beta1 + grad, torch.maximum(largest, mean_square)
    return param * decay - average / (largest.sqrt() + 1), average, largest


def without_kernel(formula: Formula, monkeypatch: pytest.MonkeyPatch, forced: str) -> kernels.Backend:
    """What is chosen on the CPU for a formula that nobody asked for before."""
    if forced:
        monkeypatch.setenv("DS_OPTIM_KERNELS", forced)
    with pytest.warns(UserWarning, match=f"no C\\+\\+ kernel for the {formula.kind} formula {formula.name!r}.*slower"):
        backend = kernels.backend_for(formula, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.backend_for(formula, torch.device("cpu")) == backend == "eager"
        assert kernels.backend_for(None, torch.device("cpu")) == "native"
    return backend


@pytest.mark.parametrize("forced", ["", "native"])
def test_an_elementwise_formula_without_a_kernel_is_eager_before_anything_ran(
    monkeypatch: pytest.MonkeyPatch, forced: str, seed: int
) -> None:
    formula = Formula(f"momentum {forced}", momentum_update, 1, 0)
    backend = without_kernel(formula, monkeypatch, forced)
    spans, scalars = [(0, 3, 90_000), (1, 0, 5)], {"decay": 0.999, "beta1": 0.9}
    start = Tensors.random("lion", [90_010, 5], seed)
    chosen, eager = start.clone(), start.clone()
    kernels.elementwise(backend, formula, chosen.operands(spans, scalars))
    kernels.elementwise("eager", formula, eager.operands(spans, scalars))
    assert same_bits(chosen.flat(), eager.flat())
    assert start.grads[0] is not None
    average = start.states[0][0][3:90_003] * 0.9 + start.grads[0][3:90_003]
    wanted = start.params[0].clone()
    wanted[3:90_003] = wanted[3:90_003] * 0.999 - 0.01 * average
    torch.testing.assert_close(chosen.params[0], wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="no elementwise C\\+\\+ kernel named 'momentum"):
        kernels.elementwise("native", formula, chosen.operands(spans, scalars))


@pytest.mark.parametrize("forced", ["", "native"])
def test_a_blockwise_formula_without_a_kernel_is_eager_before_anything_ran(
    monkeypatch: pytest.MonkeyPatch, forced: str, seed: int
) -> None:
    formula = Formula(f"block rms {forced}", block_rms_update, 1, 1)
    backend = without_kernel(formula, monkeypatch, forced)
    blocks = Blocks([(5, 30), (2, 7)], None, 1, seed)
    chosen, eager = (blocks.shards([75], 4) for _ in range(2))
    chosen.step(backend, split=True, formula=formula)
    eager.step("eager", split=False, formula=formula)
    for found, wanted in ((chosen.params, eager.params), (chosen.averages, eager.averages)):
        assert same_bits(found, wanted)
    assert same_bits(chosen.squares, eager.squares)
    squares = torch.zeros(7).index_add_(0, blocks.labels, blocks.grad.square()) / torch.bincount(blocks.labels)
    largest = torch.maximum(blocks.square, squares)[blocks.labels]
    average = blocks.average * 0.9 + blocks.grad
    found = torch.cat([chosen.params[0][4:79], chosen.params[1][4:93]])
    torch.testing.assert_close(found, blocks.param * 0.999 - average / (largest.sqrt() + 1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no blockwise C\\+\\+ kernel named 'block rms"):
        chosen.step("native", split=False, formula=formula)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_known_updates_are_subtracted_and_rounded_to_nearest(
    backend: kernels.Backend, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(7, 5, 1300, generator=generator).to(dtype)
    update = torch.randn(3, 4, 1290, generator=generator)
    here = (slice(1, 6, 2), slice(1, 5), slice(3, 1293))
    found, wanted = whole.clone(), whole.clone()
    kernels.descend(backend, found[here], update, 0.9, ())
    wanted[here] = (whole[here].float() * torch.tensor(0.9) - update).to(dtype)
    assert same_bits([found], [wanted])


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_elements_beyond_two_to_the_31_are_reached(backend: kernels.Backend, seed: int) -> None:
    """Of bytes that nobody touches there are no pages: only the last of these elements take memory."""
    first, count = 2**31 + 5, 3000
    small = Tensors.random("lion", [count], seed, (torch.bfloat16,) * 3)
    large = [torch.empty(first + count, dtype=torch.bfloat16) for _ in range(3)]
    for whole, part in zip(large, (small.params[0], small.grads[0], small.states[0][0]), strict=True):
        assert part is not None
        whole[first:] = part
    found = Tensors([large[0]], [large[1]], [[large[2]]])
    found.step(backend, "lion", [(0, first, count)])
    small.step(backend, "lion", [(0, 0, count)])
    assert same_bits([one[first:] for one in found.flat()], small.flat())


PASSES = ("momentum", "adam_graft")


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
@pytest.mark.parametrize("rule", PASSES)
def test_a_pass_leaves_alone_what_is_not_a_number(backend: kernels.Backend, rule: str, seed: int) -> None:
    start = Tensors.random(rule, [3000], seed)
    start.params[0][700:1500] = math.nan
    found, undisturbed = start.clone(), start.clone()
    undisturbed.params[0].nan_to_num_()
    for one in (found, undisturbed):
        kernels.one_pass(backend, FORMULAS[rule], one.params[0], [state[0] for state in one.states], SCALARS[rule])
    assert not found.params[0][700:1500].any()
    for after, other, before in zip(found.states, undisturbed.states, start.states, strict=True):
        assert same_bits([after[0][700:1500]], [before[0][700:1500]])
        assert same_bits([after[0][:700], after[0][1500:]], [other[0][:700], other[0][1500:]])
        assert not torch.equal(after[0][:700], before[0][:700])


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7, 11), (2, 4096), (3, 4099)])
@pytest.mark.parametrize("rule", PASSES)
def test_a_pass_is_the_elementwise_update_of_everything(
    rule: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], seed: int
) -> None:
    numel = math.prod(shape)
    start = Tensors.random(rule, [numel + 1], seed, dtypes)
    wanted = start.clone()
    wanted.step("native", rule, [(0, 1, numel)])
    for backend in ("native", "triton", "eager"):
        found = start.clone()
        values, *states = (one[1:].view(shape) for one in found.flat())  # begins nowhere in particular
        kernels.one_pass(backend, FORMULAS[rule], values, states, SCALARS[rule])  # type: ignore[arg-type]
        if backend == "eager":
            assert_agree(found.flat(), wanted.flat())
        else:
            assert same_bits(found.flat(), wanted.flat())
        aligned = Tensors([start.params[0][1:].clone()], [None], [[state[0][1:].clone()] for state in start.states])
        kernels.one_pass(backend, FORMULAS[rule], aligned.params[0], aligned.flat()[1:], SCALARS[rule])  # type: ignore[arg-type]
        assert same_bits(aligned.flat(), [one[1:] for one in found.flat()])


def test_kernels_are_known_by_name_kind_and_states() -> None:
    known = [*FORMULAS.values(), ADAM_MINI]
    assert all(native.has(formula) for formula in known)
    assert {formula.name for formula in known} == set(native.KERNELS)
    assert not native.has(Formula("momentum", lion_update, 1, 0))  # somebody's rule, no pass of ours
    assert not native.has(Formula("adamw", adamw_update, 3, 0))
    assert not native.has(Formula("adamw", adamw_update, 2, 1))
    assert not native.has(Formula("adam_mini", adam_mini_update, 2, 0))


def test_without_a_compiler_there_is_one_warning_and_the_formula(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    kernels.device_backend.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no-such-compiler"):
            assert kernels.backend_for(None, torch.device("cpu")) == "eager"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend_for(None, torch.device("cpu")) == "eager"
    finally:
        native.library.cache_clear()
        kernels.device_backend.cache_clear()


COMPILER = """#!/bin/sh
echo compiled >> {log}
for last; do :; done
sleep {seconds}
cp {built} "$last"
"""


def test_ranks_build_once_and_a_killed_build_holds_nobody_up(tmp_path: Path) -> None:
    built, log, compiler = built_library(), tmp_path / "log", tmp_path / "compiler"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "builds"), "CXX": str(compiler)}
    code = "from ds_optim.kernels import native; native.library()"

    def start(seconds: int) -> subprocess.Popen[str]:
        compiler.write_text(COMPILER.format(log=log, seconds=seconds, built=built))
        compiler.chmod(0o755)
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)

    doomed = start(600)
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    # The compiler outlives its rank, without the lock.
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(doomed.pid)], capture_output=True, text=True, check=True
    )
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    log.unlink()

    ranks = [start(1), start(1)]
    messages = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], messages
    assert log.read_text().splitlines() == ["compiled"]
    assert sum("building" in message for message in messages) == 1
    assert len(list((tmp_path / "builds" / "ds_optim").glob("*.so"))) == 1


def test_bad_arguments_are_refused_with_the_reason(seed: int) -> None:
    spans = [(0, 0, 10)]
    cases = {
        "float64": Tensors([torch.zeros(10).double()], [torch.zeros(10)], [[torch.zeros(10)]]),
        "not contiguous": Tensors([torch.zeros(20)[::2]], [torch.zeros(10)], [[torch.zeros(10)]]),
        "differ in size": Tensors([torch.zeros(10)], [torch.zeros(11)], [[torch.zeros(10)]]),
        "on meta": Tensors([torch.zeros(10)], [torch.zeros(10)], [[torch.zeros(10, device="meta")]]),
    }
    for reason, tensors in cases.items():
        with pytest.raises(ValueError, match=reason):
            tensors.step("native", "lion", spans)
    fine = Tensors.random("lion", [10], seed)
    for row in ((0, 0, 11), (0, -1, 5), (1, 0, 5), (0, 8, 3)):
        with pytest.raises(ValueError, match="does not fit"):
            fine.step("native", "lion", [row])
    blocks = Blocks([(4, 10)], None, 1, seed)
    for bad in (
        (0, 0, 35, 0, 10, 0, -1, -1),  # ends inside a block that is not cut
        (0, 5, 35, 5, 10, 0, -1, -1),  # begins inside one
        (0, 0, 40, 0, 10, 1, -1, -1),  # needs five slots
        (0, 0, 40, 0, 10, 0, 0, -1),  # there are no cut sums
        (0, 0, 40, 0, 0, 0, -1, -1),
    ):
        made = blocks.shards([], 0)
        made.rows[0] = [bad]
        with pytest.raises(ValueError, match="does not fit"):
            made.step("native", split=False)


def test_a_step_needs_no_memory_of_the_tensors_size() -> None:
    """Peak resident memory during a step, as Linux counts it, against the 96 MiB of the partition (three streams)."""

    def resident(key: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(key)))

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    numel = 1 << 23
    tensors = Tensors([torch.ones(numel)], [torch.ones(numel)], [[torch.zeros(numel) + 1 for _ in range(1)]] * 2)
    tensors.states = [[torch.ones(numel)], [torch.ones(numel)]]
    tables = Tables(row_runs=torch.tensor([[0, 0, numel, 0, 4096, 0, -1, -1]]))
    squares = torch.zeros(numel // 4096)

    def mini() -> None:
        streams = tensors.params, tensors.grads, tensors.states[:1], [[squares]]
        kernels.blockwise("native", ADAM_MINI, Operands(*streams, tables, ADAM, None, NO_SUMS))

    for step in (lambda: tensors.step("native", "adamw", [(0, 0, numel)]), mini):
        step()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step()
        assert resident("VmHWM") - before < 0.01 * 3 * 4 * numel
