"""What the host does in a step of 300 tensors before their one launch, against torch's fused AdamW: no GPU needed.

    python benchmarks/host_time.py [--rounds N] [--markdown docs/results/host_time.md]

Every contender steps 300 parameters of 128 elements, one step each in turn. Ours takes the Triton backend with the
launch itself left out: what remains is Python, and the table of addresses that goes to the device where tensors have
moved (not its copy into pinned memory, of 12 kB). torch's fused AdamW really updates its 38,400 elements, which takes
it some microseconds. Gradients stay where they are, or are made anew before every step (``zero_grad`` as it is by
default), which is not in the time. Exit status 1 if ours takes more than 2 ms, or more than 1.5 of torch's.
"""

from __future__ import annotations

import os

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["TRITON_INTERPRET"] = "1"  # of tensors on the CPU, which the backend takes for no other reason
os.environ["DS_OPTIM_KERNELS"] = "triton"

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processor import processor

import ds_optim
from ds_optim.kernels.triton import blocks, elements

PROGRAMS = {
    elements: ("update_rows",),
    blocks: ("update_wide_blocks", "update_narrow_blocks"),
}
OURS = ("AdamW", "Lion", "Adan", "AdamMini")
UNIT = "torch AdamW fused"
MOST_MS, MOST_OF_UNIT = 2.0, 1.5


class NotLaunched:
    """A program that is called and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    """300 weights with gradients."""
    found = [(f"layers.{index}.up_proj.weight", torch.nn.Parameter(torch.zeros(8, 16))) for index in range(300)]
    for _, one in found:
        one.grad = torch.zeros_like(one)
    return found


def contenders() -> dict[str, Any]:
    """Optimizers that have stepped, by name."""
    made = {UNIT: torch.optim.AdamW([one for _, one in parameters()], fused=True)}
    for name in OURS:
        roles = {"roles": {"*": "linear"}} if name == "AdamMini" else {}
        made[name] = getattr(ds_optim, name)(parameters(), lr=1e-3, **roles)
    for optimizer in made.values():
        for _ in range(5):
            optimizer.step()
    return made


def renew(optimizer: Any) -> None:
    """Gradients elsewhere in memory; the old ones go when all new ones are there."""
    listed = [one for group in optimizer.param_groups for one in group["params"]]
    for one, grad in zip(listed, [torch.zeros_like(one) for one in listed], strict=True):
        one.grad = grad


def milliseconds(rounds: int, *, anew: bool) -> dict[str, list[float]]:
    """Of every step, by contender; who begins a round, changes."""
    made = contenders()
    found: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            if anew:
                renew(made[name])
            begin = time.perf_counter()
            made[name].step()
            found[name].append(1e3 * (time.perf_counter() - begin))
    return found


def main() -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="steps of each contender (default: 200)")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for module, names in PROGRAMS.items():
        for name in names:
            setattr(module, name, NotLaunched())
    lines = [
        "# The host's time in a step of 300 tensors",
        "",
        f"`python benchmarks/host_time.py`: {processor()}, one thread, torch {torch.__version__},"
        f" {datetime.date.today()}; {arguments.rounds} steps each in turn, launches left out.",
    ]
    good = True
    for title, anew in (("Gradients stay where they are", False), ("Gradients are made anew", True)):
        found = milliseconds(arguments.rounds, anew=anew)
        unit = statistics.median(found[UNIT])
        lines += ["", f"## {title}", "", "| optimizer | median, ms | least, ms | of torch's fused AdamW |"]
        lines.append("|---|---|---|---|")
        for name, times in found.items():
            median = statistics.median(times)
            lines.append(f"| {name} | {median:.2f} | {min(times):.2f} | {median / unit:.2f} |")
            good = good and (name == UNIT or (median <= MOST_MS and median <= MOST_OF_UNIT * unit))
    lines += ["", f"Wanted: at most {MOST_MS:.0f} ms and {MOST_OF_UNIT} of torch's: {'met' if good else 'missed'}.", ""]
    print("\n".join(lines))
    if arguments.markdown is not None:
        pages.write(arguments.markdown, "\n".join(lines))
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
