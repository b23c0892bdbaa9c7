"""Predicted memory held against measured memory: every optimizer, ZeRO stage, precision and number of ranks.

    python benchmarks/memory_accuracy.py [--markdown docs/results/memory_accuracy.md]

Each case is a real DeepSpeed engine over a small Llama on gloo processes, three steps; the third is measured, storage
by storage, and the estimate is asked for the same. Optimizer state must agree to the byte, each of the model states
within 1 %, activations and peaks within 10 %. Exit status 1 if a line does not, or if more than 0.5 % of what is alive
is nobody's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from rich.progress import track

from ds_optim.memory.agreement import ComparedFigure, agreement
from ds_optim.memory.estimate import predict
from ds_optim.memory.record import MODEL_STATES, Category, Record
from memory_cases import OPTIMIZERS, MemoryCase, measured, request
from pool import Pools

RANKS = (1, 2)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
COLUMNS = ("optimizer state", "model states", "activations", "forward", "backward", "step")
ABOUT = """# Predicted against measured

How far the prediction is from the measurement of the same training, on the rank where it is furthest: (predicted -
measured) / measured. Optimizer state: bytes. Model states: the worst of parameters, fp32 master and gradients.
Activations: what the forward pass leaves. Forward, backward, step: the highest sum of all categories in that phase.
`FAIL`: beyond what is allowed (to the byte; 1 %; 10 %).

A Llama of 3.4 M parameters, 2 sequences of 64 tokens per rank (or 1 of 1,024); buckets of 1 M elements, since
DeepSpeed's own would be larger than all the rest.
"""


def cases() -> list[tuple[int, MemoryCase]]:
    """All of them, ranks outermost."""
    found = []
    for ranks in RANKS:
        for optimizer in OPTIMIZERS:
            for stage in (0, 1, 2, 3):
                for precision in ("fp32", "bf16"):
                    found.append((ranks, MemoryCase(optimizer, stage, precision)))
            for stage in (1, 2, 3):
                found.append((ranks, MemoryCase(optimizer, stage, "bf16", zero=OFFLOAD)))
        found += [(ranks, MemoryCase("AdamMini", stage, "bf16", checkpointing=True)) for stage in (0, 1, 2, 3)]
        found += [(ranks, MemoryCase("AdamMini", stage, "bf16", passes=3)) for stage in (0, 1, 2, 3)]
        long = {"micro_batch": 1, "seq_length": 1024}
        found += [(ranks, MemoryCase("AdamMini", stage, kind, **long)) for stage in (2, 3) for kind in ("fp32", "bf16")]
    for limit in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        found.append((2, MemoryCase("AdamMini", 3, "bf16", zero={limit: 1_000_000})))
    return found


def cells(lines: Sequence[ComparedFigure]) -> list[str]:
    """One table row: the line that is furthest off, per column."""
    states = {category.value for category in MODEL_STATES if category is not Category.OPTIMIZER}
    columns = [
        [line for line in lines if line.name == "optimizer state, bytes"],
        [line for line in lines if line.name in states],
        [line for line in lines if line.name.startswith("activations")],
        *([line for line in lines if line.name == f"peak of {phase}"] for phase in ("forward", "backward", "step")),
    ]
    made = []
    for column in columns:
        worst = max(column, key=lambda line: (not line.passed, abs(line.difference)))
        shown = f"{100 * worst.difference:+.2f} %" if worst.tolerance else f"{worst.predicted - worst.measured:+,}"
        made.append(shown + ("" if all(line.passed for line in column) else " FAIL"))
    return made


def main() -> int:
    """Run all cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    rows = []
    failures = 0
    for ranks, case in track(cases(), description="cases"):
        found = Record.model_validate_json(_pools(ranks).run(measured, case)[0])  # raises if much is nobody's
        lines = agreement(found, predict(request(case, ranks)))
        failures += not all(line.passed for line in lines)
        name = " ".join(
            [
                f"{case.stage} {case.precision}",
                *(["offload"] if case.zero == OFFLOAD else [f"{key}={value:,}" for key, value in case.zero.items()]),
                *(["checkpointing"] if case.checkpointing else []),
                *([f"{case.passes} micro-batches"] if case.passes > 1 else []),
                *([f"{case.seq_length} tokens"] if case.seq_length > 64 else []),
            ]
        )
        rows.append(f"| {case.optimizer} | {name} | {ranks} | " + " | ".join(cells(lines)) + " |")
    table = ["| optimizer | ZeRO stage, precision | ranks | " + " | ".join(COLUMNS) + " |", "|---" * 9 + "|", *rows]
    print("\n".join(table))
    print(f"{len(rows) - failures} of {len(rows)} cases agree")
    if arguments.markdown:
        pages.write(
            arguments.markdown,
            ABOUT
            + "\n"
            + "\n".join(table)
            + f"\n\n{len(rows) - failures} of {len(rows)} cases agree. `python benchmarks/memory_accuracy.py`, "
            f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
            f"{time.time() - started:.0f} s.\n",
        )
    return 1 if failures else 0


if __name__ == "__main__":
    with Pools() as _pools:
        sys.exit(main())
