"""The log files of a job's ranks, as DeepSpeed's ``--enable_each_rank_log`` and torchrun's ``--log-dir`` write them.

python launcher/rank_logs.py follow runs/logs --until FILE     what the first rank writes, until that file is there
python launcher/rank_logs.py reasons runs/logs                the last error of every rank that failed
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_DEEPSPEED = re.compile(r"_rank(\d+)\.log$")
_TORCHRUN = re.compile(r"([^/]+/attempt_\d+)/(\d+)/std(?:err|out)\.log$")
# How a Python traceback ends, how train.py says that it cannot go on, how the C++ parts die. torch and torchrun put the
# rank in brackets before each line.
_PREFIX = re.compile(r"^(?:\[\w+\]: ?)*")
_REASON = re.compile(r"(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b|train\.py (?:cannot|stopped)|terminate called")
_SHOWN_LINES = 6


def of_ranks(directory: Path, newer_than: float = 0.0) -> dict[str, list[Path]]:
    """Log files of each rank, oldest first; only those changed after a Unix time.

    DeepSpeed numbers files by rank (``rank 3``); torchrun by the rank on its host, in a folder per host and attempt
    (``local rank 3 in run_x2l9/attempt_0``).
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(directory.rglob("*.log"), key=lambda path: path.stat().st_mtime):
        if path.stat().st_mtime < newer_than:
            continue
        if (match := _DEEPSPEED.search(path.name)) is not None:
            found.setdefault(f"rank {match[1]}", []).append(path)
        elif (match := _TORCHRUN.search(path.as_posix())) is not None:
            found.setdefault(f"local rank {match[2]} in {match[1]}", []).append(path)
    return found


def reasons(directory: Path, newer_than: float = 0.0) -> dict[str, str]:
    """The last error of every rank whose log holds one, with the lines that follow it."""
    said: dict[str, str] = {}
    for rank, paths in sorted(of_ranks(directory, newer_than).items()):
        for path in paths:
            lines = [_PREFIX.sub("", line) for line in path.read_text(errors="replace").splitlines()]
            starts = [number for number, line in enumerate(lines) if _REASON.match(line)]
            if starts:
                said[rank] = "\n".join(line[:500] for line in lines[starts[-1] : starts[-1] + _SHOWN_LINES])
    return said


def follow(directory: Path, until: Path, newer_than: float) -> None:
    """Print what the first rank writes, until the file ``until`` is there, or whoever started this is gone."""
    position, parent = 0, os.getppid()
    while True:
        is_over = until.exists() or os.getppid() != parent
        paths = of_ranks(directory, newer_than).get("rank 0", [])
        if paths:
            with paths[-1].open(errors="replace") as log:
                log.seek(position)
                for line in log:
                    print(line, end="", flush=True)
                position = log.tell()
        if is_over:
            return
        time.sleep(0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python launcher/rank_logs.py", description=__doc__.split("\n")[0])
    parser.add_argument("mode", choices=("follow", "reasons"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--until", type=Path, metavar="FILE", help="which says that the job has ended")
    parser.add_argument("--newer", type=Path, metavar="FILE", help="only logs that changed after this file")
    given = parser.parse_args(arguments)
    newer_than = given.newer.stat().st_mtime if given.newer else 0.0
    if given.mode == "follow":
        if given.until is None:
            parser.error("follow needs --until")
        follow(given.directory, given.until, newer_than)
        return 0
    for rank, reason in reasons(given.directory, newer_than).items():
        print(f"{rank}: " + reason.replace("\n", "\n    "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
