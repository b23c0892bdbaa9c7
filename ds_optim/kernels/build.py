"""Building the C++ kernels: on first use, once per host, kept for later processes.

Not `torch.utils.cpp_extension.load`: the source includes no torch header, so that one call of the compiler builds it in
a few seconds, without ninja, and a build outlives torch releases; and torch's build lock stays behind for ever when its
holder is killed. Shared with it: where builds are kept (``TORCH_EXTENSIONS_DIR``) and how the compiler is named
(``CXX``). The ranks of a host share one build: the first compiles, the others wait.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "native.cpp"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # a fused multiply-add in the vector loop but not in its tail would make slices round apart
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-pthread",
    # Compilers halve AVX-512 registers by default; whole ones took 5 % off Adam-mini and cost the others nothing.
    *(("-mprefer-vector-width=512",) if platform.machine().lower() in ("x86_64", "amd64") else ()),
)


class UnavailableError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


def built_library() -> Path:
    """The shared library for this source, compiler and processor; compiled unless some process did so before.

    Raises:
        UnavailableError: there is no working compiler, or no place to keep the build.
    """
    if os.name != "posix":
        raise UnavailableError("only Linux and macOS are supported")
    from torch.utils.cpp_extension import get_default_build_root  # costs an import of setuptools

    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, *sorted(FOLDER.glob("*.h")))]
    identity = [*sources, *FLAGS, os.environ.get("CXX", ""), _processor()]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    target = Path(root) / "ds_optim" / f"kernels_{digest}.so"
    if target.exists():
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):  # the system drops the lock of a process that dies
            if not target.exists():
                _compile(target)
    except (OSError, NotImplementedError) as problem:  # the latter: a file system without locks
        raise UnavailableError(f"no place for the build: {problem}; set TORCH_EXTENSIONS_DIR to a folder") from problem
    return target


def _compile(target: Path) -> None:
    compiler = _compiler()
    print(f"ds_optim: building CPU kernels, once, about 10 s: {target}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"`{shlex.join(command)}` failed:\n{(done.stdout + done.stderr)[-2000:]}")
        unfinished.replace(target)  # complete or absent, for whoever looks


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise UnavailableError(
        f"CXX names {named!r}, which is not on the PATH"
        if named
        else "no C++ compiler on the PATH (c++, g++ or clang++; on Debian: apt install g++)"
    )


def _processor() -> str:
    """What ``-march=native`` depends on: homes are shared by machines whose processors differ."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as cpuinfo:
            lines = cpuinfo.read().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return "\n".join(line for line in lines if line.startswith(telling))
