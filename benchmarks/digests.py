"""Whether a run ends with the bits of an earlier one: a SHA-256 per case, kept in a file and compared.

For `benchmarks/full_matrix.py` and `benchmarks/checkpoint_matrix.py`, before and after a change of the code that is to
change no number:

    python benchmarks/full_matrix.py --digests before.json
    python benchmarks/full_matrix.py --digests after.json --compare before.json

Bits depend on the processor, the versions and the number of threads: both runs belong on one machine.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    found = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        found.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        found.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--digests`` and ``--compare``, for `finish`."""
    parser.add_argument("--digests", type=Path, metavar="FILE", help="where to write a SHA-256 per case (JSON)")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="such a file, of an earlier run: fails if it differs"
    )


def differing(found: Mapping[str, str], earlier: Mapping[str, str]) -> list[str]:
    """A line for every case that ends with other bits than in an earlier run, or that the earlier run did not have."""
    lines = []
    for case, value in found.items():
        if case not in earlier:
            lines.append(f"- NEW {case}: not in the earlier run")
        elif value != earlier[case]:
            lines.append(f"- DIFFERS {case}")
    return lines


def finish(found: Mapping[str, str], arguments: argparse.Namespace) -> bool:
    """Write and compare the digests of all cases as the options say, and print the comparison.

    Returns:
        Whether every case has the bits of the earlier run (True without ``--compare``). Cases of the earlier run that
        this one did not take, with fewer optimizers for instance, are counted in the output and no failure.
    """
    if arguments.digests:
        where = f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
        text = json.dumps({"where": where, "cases": dict(found)}, indent=1)
        arguments.digests.write_text(text + "\n", encoding="utf-8")
    if not arguments.compare:
        return True
    stored = json.loads(arguments.compare.read_text(encoding="utf-8"))
    lines = differing(found, stored["cases"])
    left_out = len(stored["cases"].keys() - found.keys())
    print(
        *lines,
        f"{len(found) - len(lines)} of {len(found)} digests are those of {arguments.compare} ({stored['where']}); "
        f"{left_out} of its cases were not run",
        sep="\n",
    )
    return not lines
