"""The Triton programs: what they compute, in Triton's interpreter.

In the interpreter elementwise ones must agree with the C++ kernels to the last bit: the arithmetic is the same,
operation by operation; Adam-mini's, which add their sums up in another order, with fp64 to 1e-6, or to a last place of
a shorter format.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_optim
import machine_code
from ds_optim import kernels, known_torch
from ds_optim.kernels import Operands, Place, Places, Rounding, Tables
from ds_optim.kernels import triton as by_triton
from ds_optim.kernels.tables import table_of
from ds_optim.kernels.triton import access, elements, launches
from ds_optim.linalg import triangle
from test_kernels import ADAM_MINI, FLOATS, FORMULAS, NO_SUMS, SCALARS, VARIED, Blocks, Tensors, same_bits

ROW = launches.ROW


def test_the_interpreter_runs_here_and_every_program_is_named() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert {*elements.ARITHMETIC, "adam_mini"} == by_triton.PROGRAMS
    assert {*FORMULAS, "adam_mini"} == by_triton.PROGRAMS  # all of them are tested


# -- what is computed -------------------------------------------------------------------------------------------------


def dtypes_in_turn() -> Iterator[tuple[str, tuple[torch.dtype, torch.dtype, torch.dtype]]]:
    """Every two dtypes of every two operands for every rule; all three of them for one rule or another."""
    for (place, rule), (first, param), (second, grad) in itertools.product(
        enumerate(FORMULAS), enumerate(FLOATS), enumerate(FLOATS)
    ):
        yield rule, (param, grad, FLOATS[(place + first + second) % len(FLOATS)])


@pytest.mark.parametrize(("rule", "dtypes"), dtypes_in_turn(), ids=str)
def test_a_program_is_the_cpp_kernel_to_the_last_bit(
    rule: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], seed: int
) -> None:
    found = Tensors.random(rule, [2 * ROW + 19, 7, 1, 0, 900], seed, dtypes)
    found.grads[1] = None
    wanted = found.clone()
    spans = [(0, 3, 2 * ROW + 10), (1, 0, 7), (2, 0, 1), (3, 0, 0), (4, 0, 512), (4, 520, 300)]
    for step_size in (0.01, 0.005):
        found.step("triton", rule, spans, **{VARIED[rule]: step_size})
        wanted.step("native", rule, spans, **{VARIED[rule]: step_size})
    assert same_bits(found.flat(), wanted.flat())


@given(cuts=st.lists(st.integers(1, 9_999), max_size=5), offset=st.integers(0, 9), data=st.integers(0, 99))
@settings(max_examples=10)
@pytest.mark.parametrize("rule", FORMULAS)
def test_an_update_depends_neither_on_cuts_nor_on_alignment(rule: str, cuts: list[int], offset: int, data: int) -> None:
    whole = Tensors.random(rule, [10_000], data)
    pieces = whole.clone()
    held = torch.empty(10_000 + offset)  # a parameter that begins anywhere in its storage
    held[offset:] = pieces.params[0]
    pieces.params = [held[offset:]]
    whole.step("triton", rule, [(0, 0, 10_000)])
    edges = sorted({0, *cuts, 10_000})
    pieces.step("triton", rule, [(0, a, b - a) for a, b in itertools.pairwise(edges)])
    assert same_bits(whole.flat(), pieces.flat())


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_what_is_written_is_rounded_as_torch_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (1 << 15,), generator=generator, dtype=torch.int64).to(torch.int32)
    every = torch.arange(0, 65536, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    ties = (every.float() + torch.cat([every[1:], every[:1]]).float()) / 2
    wide = torch.cat([patterns.view(torch.float32), every.float(), ties])
    scalars = {"decay": 1.0, "lr": 0.0, "beta1": 1.0, "one_minus_beta1": 0.0, "beta2": 0.0, "one_minus_beta2": 1.0}
    narrowed = Tensors([torch.zeros_like(wide)], [wide], [[torch.zeros(wide.numel(), dtype=dtype)]])
    narrowed.step("triton", "lion", [(0, 0, wide.numel())], **scalars)
    assert same_bits(narrowed.states[0], [(wide + 0.0).to(dtype)])


@pytest.mark.parametrize("first", [0, 12345, (1 << 32) - 700])
def test_parameters_are_rounded_by_the_same_noise_as_elsewhere(first: int, seed: int) -> None:
    start = Tensors.random("adamw", [1500, 300], seed, (torch.bfloat16, torch.bfloat16, torch.float32))
    places = Places([Place(0, 0, 1000, 77, first), Place(0, 1000, 500, -5, 0), Place(1, 0, 300, 9, 3)])
    ends = {}
    for backend in ("native", "triton"):
        ends[backend] = start.clone()
        for key in (1, -(1 << 62)):
            operands = ends[backend].operands([(0, 2, 1490), (1, 0, 300)], SCALARS["adamw"])
            operands.rounding = Rounding(key, places)
            kernels.elementwise(backend, FORMULAS["adamw"], operands)
    assert same_bits(ends["triton"].flat(), ends["native"].flat())
    nearest = start.clone()
    nearest.step("triton", "adamw", [(0, 2, 1490), (1, 0, 300)])
    assert not same_bits(ends["triton"].params, nearest.params)


def test_scalars_may_lie_on_the_device(seed: int) -> None:
    numbers = Tensors.random("lion", [100], seed)
    pointed = numbers.clone()
    numbers.step("triton", "lion", [(0, 0, 100)])
    pointed.step("triton", "lion", [(0, 0, 100)], lr=torch.tensor(SCALARS["lion"]["lr"], dtype=torch.float64))  # type: ignore[arg-type]
    assert same_bits(numbers.flat(), pointed.flat())


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(a, b, c) for a in FLOATS for b in FLOATS for c in FLOATS[:2]], ids=str)
def test_blocks_of_every_dtype(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], seed: int) -> None:
    blocks = Blocks([(40, 1), (3, 12), (2, 2504), (5, 700)], None, 1, seed, dtypes)
    cuts = [37, blocks.labels.numel() // 2]
    made = blocks.shards(cuts, 8)
    made.step("triton", split=False)
    blocks.check(made, cuts, 8)


def test_parts_of_a_long_cut_block_are_added_up(seed: int) -> None:
    blocks = Blocks([(1, 3 * launches.PART + 5), (1, 7)], None, 1, seed)
    cuts = [2 * launches.PART + 3]
    made = blocks.shards(cuts, 1)
    made.step("triton", split=True)
    blocks.check(made, cuts, 1)


@pytest.mark.parametrize("cuts", [[], [4 * launches.PART]])
def test_the_sum_of_a_huge_block_comes_first_in_parts(
    cuts: list[int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two huge ones, small ones around them; none, or the second, is cut."""
    monkeypatch.setattr(launches, "HUGE", launches.PART)
    blocks = Blocks([(2, 40), (1, 2 * launches.PART + 5), (1, 3 * launches.PART), (3, 700)], None, 1, seed)
    made = blocks.shards(cuts, 1)
    made.step("triton", split=False)
    blocks.check(made, cuts, 1)
    both = Blocks([(1, launches.PART + 8), (1, launches.PART + 8)], None, 1, seed)  # in one run of a table
    made = both.shards([], 1)
    made.step("triton", split=True)
    both.check(made, [], 1)


@contextmanager
def new_memory_full_of_nan() -> Iterator[None]:
    """What torch makes of `torch.empty` where results must be the same in every run."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cuts", [[], [1000], [1000, 1200]])
@pytest.mark.parametrize("row_length", [None, 378])
def test_sums_are_made_of_what_was_written_alone(
    row_length: int | None, cuts: list[int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of parts of huge blocks, and of columns in rows that begin and end inside of a matrix."""
    monkeypatch.setattr(launches, "HUGE", 500)
    monkeypatch.setattr(launches, "PART", 256)
    monkeypatch.setattr(launches, "TALL", 3)
    parts = [(2, 700), (1, 3000)] if row_length is None else [(2, 64), (250, 1)]
    blocks = Blocks(parts, row_length, 1 if row_length is None else 10, seed)
    made = blocks.shards(cuts, 1)
    with new_memory_full_of_nan():
        assert torch.empty(1).isnan()
        made.step("triton", split=True)
    blocks.check(made, cuts, 1)


def test_blocks_without_gradient_decay(seed: int) -> None:
    blocks = Blocks([(3, 5), (2, 600)], None, 1, seed)
    zeros, skipped = blocks.shards([1300], 0), blocks.shards([1300], 0)
    for rank in range(len(zeros.grads)):
        zeros.grads[rank] = torch.zeros_like(zeros.params[rank])
        skipped.grads[rank] = None
    zeros.step("triton", split=False)
    skipped.step("triton", split=False)
    assert same_bits([*zeros.params, *zeros.squares], [*skipped.params, *skipped.squares])


def test_blocks_parameters_are_rounded_by_the_same_noise_as_elsewhere(seed: int) -> None:
    parts = [(1500, 1), (20, 12), (3, 130), (2, 2504), (1, 1)]
    numel = sum(count * width for count, width in parts)
    places = Places([Place(0, 0, numel, 77, (1 << 32) - 900)])
    for cuts in ([], [numel - 4000]):
        ends = {}
        for backend in ("native", "triton"):
            made = Blocks(parts, None, 1, seed, (torch.bfloat16, torch.bfloat16, torch.float32)).shards(cuts, 0)
            for rank in range(len(made.params)):
                total = torch.zeros(made.num_cuts, dtype=torch.float64)
                operands = made._operands(rank, total)
                operands.rounding = Rounding(5, places)
                kernels.partial_sums(backend, operands)
                kernels.blockwise(backend, ADAM_MINI, operands)
            ends[backend] = made.params
        for found, wanted in zip(ends["triton"], ends["native"], strict=True):
            far = (found.view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
            assert int(far.max()) <= 1  # a factor's last bit may tip one over
            assert int((far > 0).sum()) <= found.numel() // 2000


# -- launches and tables ----------------------------------------------------------------------------------------------


class Counted:
    """The programs, and the grids with which they were launched."""

    def __init__(self, program: Any) -> None:
        self.program, self.grids = program, list[int]()

    def __getitem__(self, grid: tuple[int]) -> Any:
        self.grids += grid
        return self.program[grid]


def test_any_number_of_tensors_is_one_launch_and_tables_are_sent_when_they_change(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, sent = Counted(elements.update_rows), list[int]()
    monkeypatch.setattr(elements, "update_rows", counted)
    send = launches.sent
    monkeypatch.setattr(launches, "sent", lambda words, device: (sent.append(1), send(words, device))[1])
    numels = [1 + 37 * i % 90 for i in range(40)]
    tensors = Tensors.random("adamw", numels, seed)
    tables = Tables(spans=table_of([(i, 0, numel) for i, numel in enumerate(numels)], 3))

    def step() -> tuple[int, int]:
        counted.grids, sent[:] = [], []
        operands = Operands(tensors.params, tensors.grads, tensors.states, [], tables, SCALARS["adamw"], None, NO_SUMS)
        kernels.elementwise("triton", FORMULAS["adamw"], operands)
        return len(counted.grids), len(sent)

    assert step() == (1, 2)  # rows and addresses
    assert step() == (1, 0)
    tensors.grads[5] = torch.ones(numels[5])
    assert step() == (1, 1)  # addresses alone
    tensors.grads[6] = None
    assert step() == (1, 1)
    tensors.params[7] = tensors.params[7].bfloat16()
    assert step() == (2, 4)  # of two dtypes
    assert step() == (2, 0)


def test_adam_mini_launches_a_program_for_each_kind_of_block(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide blocks, biases, and what a shard boundary cuts, in 20 tensors; what else reaches a device, the pretended one
    says (`test_pretended_device`)."""
    counted: dict[str, Counted] = {}
    for module, names in machine_code.PROGRAMS.items():
        for name in names:
            counted[name] = Counted(getattr(module, name))
            monkeypatch.setattr(module, name, counted[name])
    numel, runs = 3000, []
    for tensor in range(20):  # a bias of 500, two rows of 1000, and half of a third one
        runs.append((tensor, 0, 500, 0, 1, 0, -1, -1))
        runs.append((tensor, 500, 2500, 0, 1000, 500, -1, tensor))
    generator = torch.Generator().manual_seed(seed)
    params, grads, averages = (
        [torch.randn(numel, generator=generator) for _ in range(20)] for _ in ("param", "grad", "average")
    )
    sums = torch.zeros(20, dtype=torch.float64)
    tables = Tables(row_runs=table_of(runs, 8), num_cuts=20)
    squares = [torch.zeros(503) for _ in range(20)]
    operands = Operands(params, list(grads), [averages], [squares], tables, SCALARS["adamw"], None, sums)
    kernels.partial_sums("triton", operands)
    kernels.blockwise("triton", ADAM_MINI, operands, "uncut")
    kernels.blockwise("triton", ADAM_MINI, operands, "cut")
    assert {name: len(one.grids) for name, one in counted.items() if one.grids} == {
        "update_wide_blocks": 1,
        "update_narrow_blocks": 1,
        "sum_rows": 1,
        "add_up": 1,
        "advance_known": 1,
        "update_cut_rows": 1,
    }


def test_what_has_no_program_is_left_to_the_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OPTIM_KERNELS", "triton")
    cpu = torch.device("cpu")
    assert kernels.backend_for(FORMULAS["lion"], cpu) == "triton"
    assert kernels.backend_for(None, cpu) == "triton"
    other = kernels.Formula("lion", FORMULAS["lion"].update, 2, 0)
    with pytest.warns(UserWarning, match="there is no Triton kernel for the elementwise formula 'lion'"):
        assert kernels.backend_for(other, cpu) == "eager"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernels.backend_for(FORMULAS["lion"], cpu) == "native"  # no accelerator, no interpreter


@pytest.mark.parametrize("name", ["Lion", "AdamMini"])
def test_what_calls_keep_on_a_device_is_listed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OPTIM_KERNELS", "triton")
    parameters = [(str(index), torch.nn.Parameter(torch.ones(4, 16))) for index in range(3)]
    for _, one in parameters:
        one.grad = torch.ones_like(one)
    optimizer = getattr(ds_optim, name)(parameters, **({} if name == "Lion" else {"roles": {"*": "linear"}}))
    optimizer.step()
    listed = {tuple(one.shape) for one in optimizer.stepper.buffers()}
    assert {
        (5, 3) if name == "AdamMini" else (4, 3),
        (3, 7) if name == "AdamMini" else (3, 5),
    } <= listed  # addresses, rows


def test_without_a_driver_there_is_one_warning_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    known_torch.triton_problem.cache_clear()
    kernels.device_backend.cache_clear()
    with pytest.warns(UserWarning, match="no fused optimizer kernels for cuda tensors.*Triton cannot be used here: "):
        assert kernels.backend_for(FORMULAS["lion"], torch.device("cuda")) == "eager"
    kernels.device_backend.cache_clear()


def test_where_a_compiler_does_not_finish_state_in_eight_bits_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    coded = {name: replace(FORMULAS[name], codes=("signed",) * FORMULAS[name].states) for name in ("adan", "adamw")}
    monkeypatch.setenv("DS_OPTIM_KERNELS", "triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for version, found in (("2.9.1", "eager"), ("2.10.0", "triton")):
        monkeypatch.setattr(torch, "__version__", version)
        kernels._warn_without_kernel.cache_clear()
        with (
            pytest.warns(UserWarning, match="'adan'.*4 per element in eight bits")
            if found == "eager"
            else nullcontext()
        ):
            assert kernels.backend_for(coded["adan"], torch.device("cpu")) == found
        assert kernels.backend_for(FORMULAS["adan"], torch.device("cpu")) == "triton"
        assert kernels.backend_for(coded["adamw"], torch.device("cpu")) == "triton"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert kernels.backend_for(coded["adan"], torch.device("cpu")) == "triton"


@pytest.mark.parametrize(
    "cut", [(slice(None), slice(None)), (slice(1, 4), slice(3, 2100)), (slice(0, 5, 2), slice(7, 8))]
)
def test_updates_are_subtracted_as_the_cpp_kernel_does(cut: tuple[slice, slice], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(6, 2500, generator=generator).bfloat16()
    update = torch.randn(whole[cut].shape, generator=generator).mul_(1e-3)
    found, wanted = whole.clone(), whole.clone()
    for backend, target in (("triton", found), ("native", wanted)):
        kernels.descend(backend, target[cut], update, 0.99, (11, 5 + cut[0].start if cut[0].start else 5, 13))  # type: ignore[arg-type]
    assert torch.equal(found, wanted)
    assert not torch.equal(found, whole)


def test_a_grid_has_one_axis_which_alone_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []

    class Grids:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(elements, "descend_rows", Grids())
    count = 70_000_000  # of elements, none of which is touched
    kernels.descend("triton", torch.empty(count, dtype=torch.bfloat16), torch.empty(count), 1.0, (0, 0, 0))
    assert grids == [(-(-count // access.BLOCK),)]


@pytest.mark.parametrize("stream", ["params", "grads", "states"])
def test_what_is_not_contiguous_is_refused(stream: str) -> None:
    found = Tensors.random("lion", [64], 0, (torch.float32,) * 3)
    torn = torch.zeros(64, 2)[:, 0]
    if stream == "states":
        found.states[0][0] = torn
    else:
        getattr(found, stream)[0] = torn
    with pytest.raises(ValueError, match="contiguous"):
        kernels.elementwise("triton", FORMULAS["lion"], found.operands([(0, 0, 64)], SCALARS["lion"]))


# -- X X^T ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 300, 70), (1, 128, 129), (3, 5, 1), (1, 385, 64)])
def test_one_triangle_is_the_whole_product(shape: tuple[int, int, int], seed: int) -> None:
    """In fp32: Triton's interpreter multiplies the bits of bf16 numbers, and rounds no operand to TF32."""
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    wanted = stack.double() @ stack.double().mT
    for laid_out in (stack, stack.mT.contiguous().mT, torch.cat([stack, stack], dim=2)[:, :, : shape[2]]):
        out = torch.full((shape[0], shape[1], shape[1]), torch.nan)
        assert triangle.times_own_transpose(laid_out, out=out) is out
        assert float((out - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
        assert torch.equal(out, out.mT)


@pytest.mark.parametrize("error", [0.0, -0.2, 0.2])
def test_every_tile_of_the_triangle_is_found(error: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """231 of them, though the root that a tile is found by may be off."""
    root = tl.sqrt

    @tl.core.builtin
    def near_root(x: Any, _semantic: Any = None) -> Any:
        return root(x, _semantic=_semantic) + error

    monkeypatch.setattr(tl, "sqrt", near_root)
    monkeypatch.setattr(triangle, "TILE", 2)
    monkeypatch.setattr(triangle, "DEPTH", 8)
    stack = torch.randn(1, 41, 3, generator=torch.Generator().manual_seed(seed))
    out = triangle.times_own_transpose(stack, out=torch.full((1, 41, 41), torch.nan))
    torch.testing.assert_close(out, stack @ stack.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", [None, "", "triton", "eager", "native"])
def test_the_triangle_is_left_alone_where_triton_is(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "triton_problem", lambda: "")
    monkeypatch.setattr(triangle, "has_tensor_cores", lambda _: True)
    monkeypatch.delenv("DS_OPTIM_KERNELS", raising=False)
    if named is not None:
        monkeypatch.setenv("DS_OPTIM_KERNELS", named)
    stack: Any = SimpleNamespace(device=torch.device("cuda"), shape=(1, triangle.SMALLEST, 4096))
    assert triangle.serves(stack) == (named not in ("eager", "native"))
    assert not triangle.serves(torch.empty(1, triangle.SMALLEST, 4096))


@pytest.mark.parametrize(
    ("hip", "found", "is_served"),
    [
        (None, (7, 5), False),
        (None, (8, 0), True),
        (None, (12, 0), True),
        ("7.0", "gfx942:sramecc+:xnack-", True),
        ("7.0", "gfx90a:sramecc+:xnack-", False),
        ("7.0", "gfx950:sramecc+:xnack-", False),
    ],
)
def test_the_triangle_is_for_gpus_with_tensor_cores_for_its_formats(
    hip: str | None, found: Any, is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=found))
    assert triangle.has_tensor_cores.__wrapped__(torch.device("cuda")) == is_served
