"""Programs in processes of their own, forked from one that has imported torch, DeepSpeed and transformers.

What a fresh interpreter does with a script or with ``ds-optim``, without the seconds that it takes to import. Tests of
what an import does start interpreters instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pool import start_fork_server


@dataclass(frozen=True)
class Finished:
    """What a program left: its exit status, and what it wrote to both streams."""

    returncode: int
    output: str


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, timeout: float = 400
) -> Finished:
    """Run ``ds-optim`` or a Python script with arguments.

    Args:
        folder: that it runs in.
        environment: its variables; unset, those of this process.
    """
    start_fork_server()
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        variables = dict(os.environ if environment is None else environment)
        process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(list(command), str(folder), variables, output.name)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            return Finished(-9, f"{output.read()}\nno end within {timeout:g} s")
        return Finished(process.exitcode, output.read())


def _run(command: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.argv = command
    try:
        if command[0] == "ds-optim":
            from ds_optim_command import main

            main()
        else:
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
