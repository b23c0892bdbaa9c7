"""The Triton programs: what they compute, in Triton's interpreter; what is made of them, for GPUs that are not here.

In the interpreter they must agree with the C++ kernels to the last bit: the arithmetic is the same, operation by
operation. What a compiler makes of it is read from the code for sm_80 and sm_90.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_optim import kernels
from ds_optim.kernels import Operands, Place, Places, Rounding, Tables
from ds_optim.kernels import triton as by_triton
from ds_optim.kernels.tables import table_of
from ds_optim.kernels.triton import programs
from test_kernels import FLOATS, FORMULAS, NO_SUMS, SCALARS, Tensors, same_bits

MACHINE_CODE = Path(__file__).with_name("machine_code.py")
ROW = programs.ROW


def test_the_interpreter_runs_here_and_every_program_is_named() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert set(programs.ARITHMETIC) == by_triton.PROGRAMS
    assert set(FORMULAS) == by_triton.PROGRAMS  # all of them are tested


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", itertools.product(FLOATS, repeat=3), ids=str)
@pytest.mark.parametrize("rule", FORMULAS)
def test_a_program_is_the_cpp_kernel_to_the_last_bit(
    rule: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], seed: int
) -> None:
    found = Tensors.random(rule, [2 * ROW + 19, 7, 1, 0, 900], seed, dtypes)
    found.grads[1] = None
    wanted = found.clone()
    spans = [(0, 3, 2 * ROW + 10), (1, 0, 7), (2, 0, 1), (3, 0, 0), (4, 0, 512), (4, 520, 300)]
    for step_size in (0.01, 0.005):
        key = "lr" if rule == "lion" else "step_size"
        found.step("triton", rule, spans, **{key: step_size})
        wanted.step("native", rule, spans, **{key: step_size})
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


@pytest.mark.parametrize("rule", FORMULAS)
def test_what_no_span_covers_is_neither_read_nor_written(rule: str, seed: int) -> None:
    tensors = Tensors.random(rule, [1000], seed)
    inside = torch.zeros(1000, dtype=torch.bool)
    spans = [(0, 3, 400), (0, 990, 10)]
    for _, start, length in spans:
        inside[start : start + length] = True
    for tensor in (tensors.params[0], tensors.grads[0], *(state[0] for state in tensors.states)):
        assert tensor is not None
        tensor[~inside] = float("nan")
    tensors.step("triton", rule, spans)
    for tensor in tensors.flat():
        assert tensor[inside].isfinite().all()
        assert tensor[~inside].isnan().all()


def test_lions_sign_is_zero_at_zero_and_hides_no_nan() -> None:
    gradient = torch.tensor([0.0, -0.0, 2.0, -3.0, float("inf"), float("nan")])
    tensors = Tensors([torch.ones(6)], [gradient], [[torch.zeros(6)]])
    tensors.step("triton", "lion", [(0, 0, 6)], decay=1.0, lr=0.25)
    expected = torch.tensor([1.0, 1.0, 0.75, 1.25, 0.75, float("nan")])
    torch.testing.assert_close(tensors.params[0], expected, equal_nan=True, rtol=0, atol=0)


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
    counted, sent = Counted(programs.update_rows), list[int]()
    monkeypatch.setattr(programs, "update_rows", counted)
    send = by_triton._sent
    monkeypatch.setattr(by_triton, "_sent", lambda words, device: (sent.append(1), send(words, device))[1])
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


def test_what_has_no_program_is_left_to_the_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OPTIM_KERNELS", "triton")
    cpu = torch.device("cpu")
    assert kernels.backend_for(FORMULAS["lion"], cpu) == "triton"
    other = kernels.Formula("lion", FORMULAS["lion"].update, 2, 0)
    assert kernels.backend_for(other, cpu) == "compiled"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernels.backend_for(FORMULAS["lion"], cpu) == "native"  # no accelerator, no interpreter


def test_without_a_driver_there_is_one_warning_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    by_triton.problem.cache_clear()
    kernels.device_backend.cache_clear()
    with pytest.warns(UserWarning, match="no fused optimizer kernels for cuda tensors.*Triton cannot be used here: "):
        assert kernels.backend_for(FORMULAS["lion"], torch.device("cuda")) == "eager"
    kernels.device_backend.cache_clear()


# -- machine code -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    settings = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(MACHINE_CODE)], capture_output=True, text=True, env=settings, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_whole_rows_move_128_bits_at_a_time_and_each_stream_once(made: dict[str, Any]) -> None:
    assert {one["target"] for one in made["programs"]} == {"sm_80", "sm_90"}
    for one in made["programs"]:
        streams, threads = one["bytes"], 128
        read = sum(width * programs.BLOCK // threads // 16 for width in streams)
        written = read - streams[1] * programs.BLOCK // threads // 16  # all but the gradient
        assert (one["loads"], one["stores"]) == (read, written), one
        assert one["numbers"] <= 12  # of the tables, and scalars that lie on the device


def test_nothing_is_spilled_and_nothing_contracted(made: dict[str, Any]) -> None:
    for one in made["programs"]:
        assert one["spilled"] == 0, one
        assert one["fused"] == 0, one
        assert one["registers"] <= 255, one


def test_neither_a_schedule_nor_a_step_nor_a_length_makes_another_program(made: dict[str, Any]) -> None:
    """A learning rate on the device does: once."""
    assert made["variants"] == [1, 1, 2, 2]
