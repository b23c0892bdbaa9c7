"""A hostfile as DeepSpeed reads it, with every fault of it at once. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

_LINE = re.compile(r"(\S+)\s+slots=(\d+)$")


class HostfileError(ValueError):
    """Every line that cannot be used, and why."""


def read(path: Path) -> dict[str, int]:
    """Ranks per host, in the order of the file: the first host is where rank 0 runs.

    A line is ``NAME slots=N``; empty lines and lines that begin with # do not count.

    Raises:
        HostfileError: no file, no host, bad lines, hosts that are named twice, slots of zero.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostfileError(f"hostfile {path}: {getattr(error, 'strerror', None) or error}") from error
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate((line.strip() for line in lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            problems.append(f'hostfile {path}, line {number}: "{line}" is not of the form "NAME slots=N"')
        elif match[1] in hosts:
            problems.append(
                f"hostfile {path}, line {number}: {match[1]} was named before; give it all its slots at once"
            )
        elif int(match[2]) == 0:
            problems.append(f"hostfile {path}, line {number}: {match[1]} has no slots; remove the line")
        else:
            hosts[match[1]] = int(match[2])
    if not hosts and not problems:
        problems.append(f"hostfile {path} names no host")
    if problems:
        raise HostfileError("\n".join(problems))
    return hosts
