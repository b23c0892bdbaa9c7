"""Every optimizer under every strategy, precision and number of ranks, against the textbook and against one process.

    python benchmarks/full_matrix.py [--markdown docs/results/full_matrix.md] [--digests FILE] [--compare FILE]

The suite runs a covering array of more factors (tests/test_invariance.py); this is the full matrix of the four that
matter most, each on real DeepSpeed engines: ten steps (Shampoo, SOAP, Muon and NorMuon thirty, over several refreshes)
with a changing learning rate on constant gradients. Then all of it once more with state in eight bits, where matrices
of 300 elements are enough, blocks of codes are cut everywhere, and one process is the measure (that it is the textbook
kept in eight bits is for tests/test_eight_bit_kernels.py). Exit status 1 if a case is off by more than 1e-6 of the
textbook in fp64 (SWAN, Muon and NorMuon 3e-6, SOAP 1e-4), or if a rule other than Adam-mini is not bitwise what one
process computes. With --compare, also if a case does not end with the bits of an earlier run (benchmarks/digests.py).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import digests
import torch
from rich.progress import track

from engines import WIDER, Case, assembled, run
from expected import by_one_process, by_oracle, distance
from pool import Pools
from test_eight_bit_state import IN_CODES, with_small_ones
from test_invariance import FACTORS, OPTIONS, STRATEGIES, TOLERANCE, case_of

RANKS = (1, 2, 3, 4)
TEN_STEPS = ("AdamW", "Lion", "Adan", "AdamMini", "SWAN")
BLOCKS = ("Shampoo", "SOAP")
OFFLOADED = ["2 fp32 offload", "3 fp32 offload"]
STATES = ("fp32", "int8")


def main() -> int:
    """Run the matrix; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--optimizer", nargs="*", choices=list(OPTIONS), default=list(OPTIONS), help="only these")
    parser.add_argument("--state", nargs="*", choices=STATES, default=STATES, help="only these dtypes of the state")
    digests.add_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    bits: dict[str, str] = {}
    failures = 0
    cases = list(  # ranks outermost: one pool at a time
        itertools.product(RANKS, arguments.state, arguments.optimizer, [*STRATEGIES, *OFFLOADED])
    )
    wanted: dict[tuple[str, str, bool], Any] = {}  # the same for every strategy and number of ranks: that is the point
    for ranks, state, optimizer, strategy in track(cases, description="cases"):
        case = case_under(state, optimizer, strategy, ranks)
        key = state, optimizer, case.precision == "fp32"
        if state == "fp32":
            if key not in wanted:
                wanted[key] = by_oracle(case), by_one_process(case)
            textbook, twin = wanted[key]
            found = assembled(_pools(ranks).run(run, case))
            gap, allowed = distance(found, textbook), TOLERANCE.get(optimizer, 1e-6)
        else:
            if key not in wanted:
                wanted[key] = with_small_ones(by_one_process, case)
            twin = wanted[key]
            found = assembled(_pools(ranks).run(with_small_ones, run, case))
            gap, allowed = distance(found, twin), 1e-6
        bits[f"{optimizer} | {strategy} | {ranks}" + " | int8" * (state == "int8")] = digests.digest(found)
        bitwise = all(torch.equal(values, found[name]) for name, values in twin.items())
        good = gap <= allowed and (bitwise or (optimizer == "AdamMini" and distance(found, twin) <= 1e-6))
        failures += not good
        shown = f" {gap:.0e}" if state == "fp32" or not bitwise else ""
        rows.setdefault((state, optimizer, strategy), {})[ranks] = (
            f"{'=' if bitwise else '~'}{shown}{'' if good else ' FAIL'}"
        )
    _pools.close()
    text = "\n\n".join(
        f"## State in {'fp32' if state == 'fp32' else 'eight bits'}\n\n" + table(rows, state)
        for state in arguments.state
    )
    print(text)
    print(f"{len(cases) - failures} of {len(cases)} cases hold")
    if arguments.markdown:
        pages.write(
            arguments.markdown,
            "# The full matrix\n\n"
            "`=`: bitwise what one process computes on whole parameters; `~`: within 1e-6 of it. The number, with "
            "state in fp32: largest difference from the textbook oracle in fp64, in units of 1 + |parameter|, after "
            "ten steps (Shampoo, SOAP, Muon and NorMuon: thirty); with state in eight bits: from one process, where "
            "not all bits are the same.\n\n"
            + text
            + f"\n\n{len(cases) - failures} of {len(cases)} cases hold. `python benchmarks/full_matrix.py`, "
            f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
            f"{time.time() - started:.0f} s.\n",
        )
    unchanged = digests.finish(bits, arguments)
    return 1 if failures or not unchanged else 0


def case_under(state: str, optimizer: str, strategy: str, ranks: int) -> Case:
    """The case of these four factors, all others at their first value."""
    shown = {"optimizer": optimizer, "strategy": strategy.removesuffix(" offload"), "ranks": ranks}
    variant = "offload" if strategy in OFFLOADED else "plain"
    factors = {name: values[0] for name, values in FACTORS.items()} | shown | {"variant": variant}
    case, _ = case_of([factors[name] for name in FACTORS])
    # More than the tests take, and larger.
    case = replace(case, sizes=WIDER, steps=10 if optimizer.split(".")[-1] in TEN_STEPS else 30)
    options = case.options if state == "fp32" else IN_CODES[optimizer]
    return replace(case, options={**options, **({"precondition_frequency": 4} if optimizer in BLOCKS else {})})


def table(rows: dict[tuple[str, str, str], dict[int, str]], state: str) -> str:
    """Of one dtype of the state: a line for each optimizer and strategy, a column for each number of ranks."""
    columns = [f"{ranks} rank{'s'[: ranks > 1]}" for ranks in RANKS]
    lines = [f"| optimizer | ZeRO stage, precision | {' | '.join(columns)} |", "|---|---|" + "---|" * len(RANKS)]
    for (dtype, optimizer, strategy), cells in rows.items():
        if dtype == state:
            lines.append(f"| {optimizer} | {strategy} | " + " | ".join(cells[ranks] for ranks in RANKS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with Pools() as _pools:
        sys.exit(main())
