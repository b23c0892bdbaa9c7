"""What a compiler makes of the Triton programs, read from the code for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import triton

import machine_code
from ds_optim.kernels import triton as by_triton
from ds_optim.kernels.triton import access, launches
from test_kernels import ADAM_MINI, FORMULAS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    settings = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(machine_code.__file__)], capture_output=True, text=True, env=settings, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(
        done.stdout.splitlines()[-1]
    )  # LLVM and Triton say of an unknown GPU what they think
    return found


def streams_of(one: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Bytes per element of what a program reads and of what it writes 128 bits at a time, each as often as it does."""
    param, grad, state = one["dtypes"]
    states = [state] * (FORMULAS[one["rule"]].states if one["rule"] in FORMULAS else ADAM_MINI.states)
    everything = [param, grad, *states], [param, *states]
    if one["rule"] in ("momentum", "adam_graft"):  # in place of the gradient
        return [param, *states], [param, *states]
    return {
        "update_rows": everything,
        "update_narrow_blocks of 16": everything,
        "update_narrow_blocks of 128": everything,
        "update_narrow_blocks of 512": everything,
        "descend_rows of 1024": ([param, 4], [param]),
        "sum_columns": ([grad], []),
        "update_columns": everything,
        "update_wide_blocks": ([grad, *everything[0]], everything[1]),  # the second time from the cache
        "update_cut_rows": everything,
        "sum_rows": ([grad], []),
    }.get(one["program"], ([], []))


def test_whole_rows_move_128_bits_at_a_time_and_each_stream_once(made: dict[str, Any]) -> None:
    assert {one["target"] for one in made["programs"]} == {"sm_75", "sm_80", "sm_90", "sm_100", "gfx942"}
    assert {one["rule"] for one in made["programs"]} == by_triton.PROGRAMS
    for one in made["programs"]:
        each = (
            16 // min(one["dtypes"])
            if one["program"] in ("update_rows", "update_all")
            else access.BLOCK // access.THREADS
        )
        read, written = (sum(streams) * each // 16 for streams in streams_of(one))
        assert (one["loads"], one["stores"]) == (read, written), one


def test_nothing_is_spilled_and_nothing_contracted(made: dict[str, Any]) -> None:
    for one in made["programs"]:
        assert one["spilled"] == 0, one
        assert one["fused"] == 0, one


def test_programs_of_codes_spill_and_contract_nothing_and_move_whole_blocks_wide(made: dict[str, Any]) -> None:
    """Parameters and gradients, that is: of codes 128 bits would be sixteen. MI300 has no room for Adan's four."""
    assert {one["target"] for one in made["coded"]} == {"sm_75", "sm_80", "sm_90", "sm_100", "gfx942"}
    for one in made["coded"]:
        assert one["fused"] == 0, one
        assert one["spilled"] == 0 or (one["rule"], one["target"]) == ("adan", "gfx942"), one
        assert one["shared"] <= machine_code.SHARED[one["target"]], one
    for target, rule in {(one["target"], one["rule"]) for one in made["coded"]}:
        for width in (4, 2):
            its = [
                one for one in made["coded"] if (one["target"], one["rule"], one["dtypes"][0]) == (target, rule, width)
            ]
            assert sorted((one["loads"], one["stores"]) for one in its) in ([], [(0, 0), (0, 0), (width, width // 2)])


def test_subnormal_numbers_are_none_the_less(made: dict[str, Any]) -> None:
    """Before 3.6 Triton took them for zero in roots and quotients: docs/limits.md."""
    is_old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
    assert any(one["flushing"] for one in made["programs"]) == is_old


def test_every_warp_has_read_a_blocks_state_before_it_is_written(made: dict[str, Any]) -> None:
    """In `advance_known` the thread that writes uses what itself has read, and no other uses anything."""
    of_blocks = [one for one in made["programs"] if re.match("update_(?:wide|narrow)_blocks", one["program"])]
    widths = {"update_wide_blocks", *(f"update_narrow_blocks of {width}" for width in launches.NARROW)}
    for target in machine_code.CASES_OF:
        assert {one["program"] for one in of_blocks if one["target"] == machine_code.name_of(target)} == widths
    for one in of_blocks:
        assert re.fullmatch("b*(?:r+b+w+b*)+", one["order"]), one


def test_a_program_shares_no_more_memory_than_its_gpu_has(made: dict[str, Any]) -> None:
    for one in made["programs"] + made["triangles"]:
        assert one["shared"] <= machine_code.SHARED[one["target"]], one


def test_the_triangle_runs_on_tensor_cores_and_reads_128_bits_at_a_time(made: dict[str, Any]) -> None:
    """NVIDIA's take TF32 along rows alone: columns are turned on their way, 32 bits at a time."""
    assert {one["target"] for one in made["triangles"]} == machine_code.SHARED.keys() - {"sm_75"}
    assert len(made["triangles"]) == 7 * 5
    for one in made["triangles"]:
        is_turned = one["transposed"] and one["dtype"] == "torch.float32" and one["target"] != "gfx942"
        assert one["tensor core"] > 0, one
        assert one["spilled"] == 0, one
        assert (one["narrow reads"] > 0) == is_turned, one
        assert is_turned or one["wide reads"] > 0, one


def test_neither_a_schedule_nor_a_step_nor_a_length_makes_another_program(made: dict[str, Any]) -> None:
    """A learning rate on the device does: once."""
    assert made["variants"] == [1, 1, 2, 2]


def test_a_gpu_that_triton_does_not_know_is_noticed_before_a_step(made: dict[str, Any]) -> None:
    """Its driver does; the assembler says so of a small program, compiled when an optimizer gets its tensors."""
    *known, unknown = made["problems"].values()
    assert known == [""] * len(machine_code.TARGETS)
    assert unknown.startswith("Triton cannot be used here: ")
    assert "\n" not in unknown
