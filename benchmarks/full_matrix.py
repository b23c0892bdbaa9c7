"""Every optimizer under every strategy, precision and number of ranks, against the textbook and against one process.

    python benchmarks/full_matrix.py [--markdown docs/results/full_matrix.md] [--digests FILE] [--compare FILE]

The suite runs a covering array of more factors (tests/test_invariance.py); this is the full matrix of the four that
matter most, each on real DeepSpeed engines: ten steps (Shampoo, SOAP, Muon and NorMuon thirty, over several refreshes)
with a changing learning rate on constant gradients. Exit status 1 if a case is off by more than 1e-6 of the textbook in
fp64 (SWAN, Muon and NorMuon 3e-6, SOAP 1e-4), or if a rule other than Adam-mini is not bitwise what one process
computes. With --compare, also if a case does not end with the bits of an earlier run (benchmarks/digests.py).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import digests
import torch
from rich.progress import track

from engines import assembled, run
from expected import by_one_process, by_oracle, distance
from pool import Pools
from test_invariance import FACTORS, OPTIONS, STRATEGIES, TOLERANCE, case_of

RANKS = (1, 2, 3, 4)
OFFLOADED = ["2 fp32 offload", "3 fp32 offload"]


def main() -> int:
    """Run the matrix; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--optimizer", nargs="*", choices=list(OPTIONS), default=list(OPTIONS), help="only these")
    digests.add_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    rows: dict[tuple[str, str], dict[int, str]] = {}
    bits: dict[str, str] = {}
    failures = 0
    plain = {name: values[0] for name, values in FACTORS.items()}
    cases = list(
        itertools.product(RANKS, arguments.optimizer, [*STRATEGIES, *OFFLOADED])
    )  # ranks outermost: one pool at a time
    wanted: dict[tuple[str, bool], Any] = {}  # the same for every strategy and number of ranks: that is the point
    for ranks, optimizer, strategy in track(cases, description="cases"):
        variant = "offload" if strategy in OFFLOADED else "plain"
        shown = {"optimizer": optimizer, "strategy": strategy.removesuffix(" offload"), "ranks": ranks}
        with_factors = {**plain, **shown, "variant": variant}
        case, _ = case_of([with_factors[name] for name in FACTORS])
        key = optimizer, case.precision == "fp32"
        if key not in wanted:
            wanted[key] = by_oracle(case), by_one_process(case)
        found = assembled(_pools(ranks).run(run, case))
        bits[f"{optimizer} | {strategy} | {ranks}"] = digests.digest(found)
        gap, twin = distance(found, wanted[key][0]), wanted[key][1]
        bitwise = all(torch.equal(values, found[name]) for name, values in twin.items())
        good = gap <= TOLERANCE.get(optimizer, 1e-6) and (
            bitwise or (optimizer == "AdamMini" and distance(found, twin) <= 1e-6)
        )
        failures += not good
        rows.setdefault((optimizer, strategy), {})[ranks] = (
            f"{'=' if bitwise else '~'} {gap:.0e}{'' if good else ' FAIL'}"
        )
    _pools.close()
    table = [
        "| optimizer | ZeRO stage, precision | "
        + " | ".join(f"{ranks} rank{'s'[: ranks > 1]}" for ranks in RANKS)
        + " |",
        "|---|---|" + "---|" * len(RANKS),
    ]
    for (optimizer, strategy), cells in rows.items():
        table.append(f"| {optimizer} | {strategy} | " + " | ".join(cells[ranks] for ranks in RANKS) + " |")
    print("\n".join(table))
    print(f"{len(cases) - failures} of {len(cases)} cases hold")
    if arguments.markdown:
        arguments.markdown.write_text(
            "# The full matrix\n\n"
            "`=`: bitwise what one process computes on whole parameters; `~`: within 1e-6 of it. The number: largest "
            "difference from the textbook oracle in fp64, in units of 1 + |parameter|, after ten steps (Shampoo: "
            "thirty).\n\n"
            + "\n".join(table)
            + f"\n\n{len(cases) - failures} of {len(cases)} cases hold. `python benchmarks/full_matrix.py`, "
            f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
            f"{time.time() - started:.0f} s.\n",
            encoding="utf-8",
        )
    unchanged = digests.finish(bits, arguments)
    return 1 if failures or not unchanged else 0


if __name__ == "__main__":
    with Pools() as _pools:
        sys.exit(main())
