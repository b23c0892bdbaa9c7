"""Virtual environments for `benchmarks/versions.py`: filled with releases, which nothing installed later replaces."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "peft")
# Older ones bring a Triton whose interpreter, in which kernels are tested, cannot read the scalars of newer numpy.
TORCH_OF_NEW_NUMPY = (2, 12)
OLD_NUMPY = "numpy<2.4"
RESOLVED_FOR = "3.11"  # the Python of `resolved_beside`


class InstallationError(Exception):
    """Why something cannot be installed, in one line."""


def fill(made: Path, releases: Mapping[str, str]) -> None:
    """Make an environment of the releases, then install this checkout: plainly, then editable with its tests' needs.

    Raises:
        InstallationError: something cannot be installed, or the checkout's installation replaced one of `PACKAGES`.
    """
    python = str(made / "bin" / "python")
    install = uv(), "pip", "install", "-q", "--compile-bytecode", "--python", python  # else each process compiles
    run(made, uv(), "venv", "-q", "--seed", "--python", interpreter(releases["python"]), str(made))
    run(made, *install, *(f"{package}=={releases[package]}" for package in PACKAGES), *pins(releases["torch"]))
    before = installed(made)
    for command in ((*install, str(ROOT)), (python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]")):
        run(made, *command)
        refuse_replaced(before, installed(made))
    run(made, python, str(ROOT / "tests" / "operators.py"))


def put_beside(made: Path, tool: str) -> None:
    """Install a tool into an environment that has ds-optim.

    Raises:
        InstallationError: it cannot be, one of `PACKAGES` was replaced, or what ds-optim requires is gone.
    """
    python = str(made / "bin" / "python")
    before = installed(made)
    run(made, uv(), "pip", "install", "-q", "--python", python, tool)
    refuse_replaced(before, installed(made))
    command = [uv(), "pip", "check", "--python", python]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    problems = [line for line in (ran.stdout + ran.stderr).splitlines() if "`ds-optim`" in line]
    if problems:
        raise InstallationError("; ".join(problems))


def resolved_beside(tool: str) -> dict[str, str]:
    """What uv's resolver chooses where this checkout is installed beside a tool; empty if there is nothing."""
    wanted = f"{tool}\nds-optim @ file://{ROOT}\n"
    command = [uv(), "pip", "compile", "-q", "--no-header", "--no-annotate", "--python-version", RESOLVED_FOR, "-"]
    ran = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    print(f"{tool}: {ran.stderr or 'can be installed beside'}", flush=True)
    chosen = dict(line.split("==", 1) for line in ran.stdout.splitlines() if "==" in line)
    return {package: chosen[package] for package in PACKAGES if package in chosen}


def pins(torch: str) -> list[str]:
    """What a release of torch needs besides the row's own releases."""
    return [OLD_NUMPY] if tuple(map(int, torch.split(".")[:2])) < TORCH_OF_NEW_NUMPY else []


def installed(made: Path) -> dict[str, str]:
    """The releases of `PACKAGES` in an environment."""
    ask = "import importlib.metadata, sys; print(*map(importlib.metadata.version, sys.argv[1:]))"
    said = run(made, str(made / "bin" / "python"), "-c", ask, *PACKAGES)
    return dict(zip(PACKAGES, said.split(), strict=True))


def refuse_replaced(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raise InstallationError if a package has another release than before."""
    other = [
        f"{package} {before[package]} by {after[package]}" for package in before if before[package] != after[package]
    ]
    if other:
        raise InstallationError(f"the installation replaced {', '.join(other)}")


def settings(made: Path) -> dict[str, str]:
    """Environment variables of all that runs in an environment; downloads lie in a folder ``cache`` beside it."""
    linker = shutil.which("ld.lld-16")  # older Triton brings none for AMD, and older linkers do not know its files
    return {
        **{key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CI")},
        "VIRTUAL_ENV": str(made),
        "PATH": f"{made / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "UV_CACHE_DIR": str(made.with_name("cache")),
        "PIP_CONFIG_FILE": os.devnull,
        "DS_BUILD_OPS": "0",
        "TORCH_EXTENSIONS_DIR": str(made / "torch_extensions"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **({"TRITON_HIP_LLD_PATH": linker} if linker else {}),
    }


def run(made: Path, *command: str) -> str:
    """What a command prints that must not fail; InstallationError if it does."""
    ran = subprocess.run(command, env=settings(made), capture_output=True, text=True, check=False)
    if ran.returncode:
        raise InstallationError(reason(ran.stderr or ran.stdout))
    return ran.stdout


def reason(said: str) -> str:
    """One line of what a failure says: its last error, other than that ranks failed, or how it begins."""
    errors = [one for one in re.findall(r"\w*(?:Error|Exception): .*", said) if "RanksFailedError" not in one]
    return " ".join((errors or [said])[-1].split())[:300]


def uv() -> str:
    """Where uv is: beside the Python that runs this, or on the path."""
    return shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "uv"


def interpreter(version: str) -> str:
    """A Python of this version: on the path, pyenv's, or what uv finds or fetches by itself."""
    candidates = [shutil.which(f"python{version}"), sys.executable]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False)
        if said.stdout.strip() == version:
            return str(candidate)
    return version


def size(folder: Path) -> int:
    """Bytes of all files under a folder, links not followed."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() or file.is_symlink())
