"""What a job is started from: hostfile, environment files, command line; every fault at once. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

INHERITED = (
    *("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"),
    "TORCH_EXTENSIONS_DIR",
    # Which of a processor's instructions torch and its libraries use, by which hosts would round apart.
    *("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA"),
)
"""What was set for the command counts on all hosts; pdsh would start them without it."""
_LINE = re.compile(r"(\S+)\s+slots=(\d+)$")
_PLAIN = re.compile(r"[\w@%+=:,./-]+")  # what DeepSpeed puts into a remote shell's command line as it is
_EXPANDED = re.compile(r"[$`\\\"]")  # what a shell expands inside the quotes that DeepSpeed puts around spaces


class JobFilesError(ValueError):
    """Every line that cannot be used, and why."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks per host, in the order of the file: the first host is where rank 0 runs.

    A line is ``NAME slots=N``; empty lines and lines that begin with # do not count.

    Raises:
        JobFilesError: no file, no host, bad lines, hosts that are named twice, slots of zero.
    """
    hosts: dict[str, int] = {}
    problems = []
    for number, line in _lines(path, "hostfile"):
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
        raise JobFilesError("\n".join(problems))
    return hosts


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """The lines that count, with their numbers: neither empty nor comments."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobFilesError(f"{what} {path}: {getattr(error, 'strerror', None) or error}") from error
    numbered = enumerate((line.strip() for line in lines), 1)
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def read_environment(path: Path) -> dict[str, str]:
    """NAME=VALUE lines, as in DeepSpeed's ``.deepspeed_env``; empty lines and comments may stand between them.

    Raises:
        JobFilesError: no file; every line that is neither.
    """
    found: dict[str, str] = {}
    problems = []
    for number, line in _lines(path, "environment file"):
        name, equals, value = line.partition("=")
        if not equals or not name.isidentifier():
            problems.append(f'environment file {path}, line {number}: "{line}" is not of the form NAME=VALUE')
        elif any(sign in value for sign in "\"'`$\\"):
            problems.append(
                f"environment file {path}, line {number}: DeepSpeed cannot pass quotes, $ or backslashes on"
            )
        else:
            found[name] = value
    if problems:
        raise JobFilesError("\n".join(problems))
    return found


def environment(files: Iterable[Path], interface: str) -> dict[str, str]:
    """For every process of the job: the files' variables (the last file counts), what is inherited, and the interface.

    Raises:
        JobFilesError: everything that is wrong with the files.
    """
    found = {name: os.environ[name] for name in INHERITED if os.environ.get(name)}
    problems = []
    for path in files:
        try:
            found |= read_environment(path)
        except JobFilesError as error:
            problems.append(str(error))
    if problems:
        raise JobFilesError("\n".join(problems))
    return found | ({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {})


def unpassable(paths: Iterable[str], arguments: Sequence[str]) -> list[str]:
    """What DeepSpeed would hand to a remote shell in a way that changes it.

    Args:
        paths: of the checkout, of Python, of the script, of the logs.
        arguments: of the script.
    """
    problems = [
        f"DeepSpeed cannot pass the path {path!r} over ssh: use one without spaces and signs of the shell"
        for path in dict.fromkeys(paths)
        if not _PLAIN.fullmatch(path)
    ]
    for argument in arguments:
        is_quoted = " " in argument
        if _EXPANDED.search(argument) if is_quoted else not _PLAIN.fullmatch(argument):
            problems.append(
                f"DeepSpeed cannot pass the argument {argument!r} over ssh, where a shell would read its signs: put it "
                "into a file, or use --no-ssh or --elastic"
            )
    return problems
