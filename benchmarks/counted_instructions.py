"""How many instructions a step executes for each element, with state in fp32 and in eight bits: why that is slower.

    python benchmarks/counted_instructions.py [--markdown docs/results/counted_instructions.md]

A process steps one parameter on one thread while its parent lets it execute one instruction at a time (``ptrace``) and
counts: what is counted is what runs, whatever the machine's load. Two sizes are counted and their difference is
divided by the elements between them, so that neither Python nor a call's own costs are in it. Bytes are those that a
step must move between memory and core. Vector instructions count as one each: the figures depend on the width of the
processor's vectors. Linux on x86-64; some minutes of one core.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import platform
import signal
import traceback
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["DS_OPTIM_KERNELS"] = "native"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from processor import processor
from torch import nn

import ds_optim
from ds_optim.optimizers.registry import optimizers

RULES = ("AdamW", "AdamMini", "Lion", "Adan")
SIZES = (1 << 16, 1 << 17)  # rows of 1,024
WARM = 2  # steps, before anything is counted
TRACE_ME, SINGLE_STEP = 0, 9
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
LIBC.ptrace.restype = ctypes.c_long


def instructions(name: str, elements: int, settings: dict[str, Any]) -> int:
    """Of one step of an optimizer on one parameter, Python's included.

    Raises:
        RuntimeError: the process ended before its step did.
    """
    child = os.fork()
    if child == 0:
        try:
            _step_under_count(name, elements, settings)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)  # it stops by itself, where counting begins
    count = 0
    step, wait, stopped_by = LIBC.ptrace, os.waitpid, os.WSTOPSIG
    while True:
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"{name} ended ({status}) before its step did")
        step(SINGLE_STEP, child, None, None)
        _, status = wait(child, 0)
        if os.WIFSTOPPED(status) and stopped_by(status) == signal.SIGSTOP:
            break
        count += 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return count


def _step_under_count(name: str, elements: int, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(elements // 1024, 1024, generator=generator) * 0.02)
    optimizer = getattr(ds_optim, name)([("mlp.weight", parameter)], roles={"*": "mlp"}, **settings)
    for turn in range(WARM + 1):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.01
        if turn == WARM:
            if LIBC.ptrace(TRACE_ME, 0, None, None) < 0:
                raise OSError(ctypes.get_errno(), "this process may not be traced")
            os.kill(os.getpid(), signal.SIGSTOP)
        optimizer.step()
    os.kill(os.getpid(), signal.SIGSTOP)


def per_element(name: str, settings: dict[str, Any]) -> float:
    """Instructions for each element, where a parameter grows from the first size to the second."""
    small, large = (instructions(name, size, settings) for size in SIZES)
    return (large - small) / (SIZES[1] - SIZES[0])


def row(name: str) -> str:
    """Of the table."""
    fp32, coded = (per_element(name, settings) for settings in ({}, {"state_dtype": "int8"}))
    states = optimizers()[name].rule.streams - 3  # type: ignore[attr-defined]
    moved = 12 + 4 * states, 12 + states
    cells = (f"{fp32:.2f}", f"{coded:.2f}", f"{coded / fp32:.2f}", *map(str, moved), f"{moved[1] / moved[0]:.2f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Count, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where the page is written")
    given = parser.parse_args()
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        parser.error("instructions are counted on Linux and x86-64 only")
    lines = [
        "| optimizer | instructions per element, fp32 | int8 | ratio | bytes per element, fp32 | int8 | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in RULES:
        lines.append(row(name))
        print(lines[-1], flush=True)
    made = f"{processor()}, torch {torch.__version__}, {datetime.date.today()}"
    said = (__doc__ or "").split("\n\n")
    text = "\n\n".join(
        ["# Counted instructions", f"`python benchmarks/counted_instructions.py`. {made}.", said[2], "\n".join(lines)]
    )
    if given.markdown:
        pages.write(given.markdown, text + "\n")


if __name__ == "__main__":
    main()
