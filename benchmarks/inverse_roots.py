"""Inverse roots by eigendecomposition and by Newton's iteration: how long they take and how wrong they are.

    python benchmarks/inverse_roots.py [--markdown docs/results/inverse_roots.md]

Prints a Markdown table. The matrices have random eigenvectors and eigenvalues evenly spaced in the logarithm, are
rounded to fp32, and get a ridge relative to the largest eigenvalue. The error is relative, in the Frobenius norm,
against the root of that fp32 matrix in fp64 by the definition in ds_optim/linalg/inverse_roots.py. The time is the
median per matrix, for a stack at condition number 1e6. `eigh32` takes fp32 where that resolves the matrix, else fp64.
"""

from __future__ import annotations

import datetime
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import typer
from processor import processor
from torch import Tensor

from ds_optim.linalg.inverse_roots import inverse_roots

STACKS = {128: 16, 256: 8, 512: 2, 1024: 1}  # matrices per stack, by size
CONDITIONS = (1e3, 1e6, 1e9)


def matrices(n: int, condition: float, count: int) -> Tensor:
    """(count, n, n) fp32."""
    generator = torch.Generator().manual_seed(n)
    q, _ = torch.linalg.qr(torch.randn(count, n, n, dtype=torch.float64, generator=generator))
    eigenvalues = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    a = (q * eigenvalues) @ q.mT
    return ((a + a.mT) / 2).float()


def textbook(stack: Tensor, exponent: float, ridge: float) -> Tensor:
    """By the definition, in the precision of `stack`."""
    eigenvalues, q = torch.linalg.eigh(stack)
    rho = ridge * eigenvalues[:, -1:]
    eigenvalues = eigenvalues + rho
    eigenvalues = eigenvalues + (rho - eigenvalues[:, :1]).clamp_min(0)
    return (q * eigenvalues[:, None, :] ** exponent) @ q.mT


def contenders(exponent: float, ridge: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions from a stack to its roots; NaN where one is flagged."""

    def flagged(found: tuple[Tensor, Tensor]) -> Tensor:
        roots, failed = found
        return roots.masked_fill(failed[:, None, None], math.nan)

    return {
        "eigh": lambda a: flagged(inverse_roots(a, exponent, eps=ridge, relative=True, method="eigh")),
        "eigh32": lambda a: flagged(inverse_roots(a, exponent, eps=ridge, relative=True, method="eigh32")),
        "newton": lambda a: flagged(inverse_roots(a, exponent, eps=ridge, relative=True, method="newton")),
    }


def milliseconds(function: Callable[[Tensor], Tensor], stack: Tensor, rounds: int) -> float:
    """The median time per matrix."""
    function(stack)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function(stack)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds) / len(stack)


def machine() -> str:
    """Where and when, in one line."""
    model = processor()
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{datetime.date.today()}, {model}, {torch.get_num_threads()} threads of {os.cpu_count()}, "
        f"torch {torch.__version__}; load average before the run {load}"
    )


def main(
    root: Annotated[int, typer.Option(min=1, help="p: the roots are of exponent -1/p.")] = 4,
    ridge: Annotated[float, typer.Option(help="In units of the largest eigenvalue.")] = 1e-6,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    markdown: Annotated[Path | None, typer.Option(help="Where to write the page.")] = None,
) -> None:
    """Time and error of every method at every size."""
    where = machine()
    functions = contenders(-1 / root, ridge)
    header = [
        "method",
        "n",
        "ms per matrix",
        *(f"error at {condition:.0e}".replace("e+0", "e") for condition in CONDITIONS),
    ]
    rows = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    for n, count in STACKS.items():
        inputs = {condition: matrices(n, condition, count) for condition in CONDITIONS}
        wanted = {condition: textbook(a.double(), -1 / root, ridge) for condition, a in inputs.items()}
        for name, function in functions.items():
            cells = [name, str(n), f"{milliseconds(function, inputs[1e6], rounds):.1f}"]
            for condition, a in inputs.items():
                gaps = (function(a).double() - wanted[condition]).norm(dim=(1, 2)) / wanted[condition].norm(dim=(1, 2))
                worst = float(gaps.max())
                cells.append("failed" if math.isnan(worst) else f"{worst:.0e}")
            rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)
    print(table)
    print(where)
    if markdown:
        page = (
            f"# Inverse roots\n\n`python benchmarks/inverse_roots.py`: {where}.\n\n"
            f"Exponent -1/{root}, ridge {ridge:g} of the largest eigenvalue, median of {rounds} rounds. Errors are "
            "relative to the fp64 root of the same fp32 matrix, at three condition numbers before the ridge; the "
            f"largest of the stack.\n\n{table}\n"
        )
        pages.write(markdown, page)


if __name__ == "__main__":
    typer.run(main)
