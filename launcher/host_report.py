"""What one host says of itself, for `preflight`: versions, hashes, interfaces, what it can reach. Run on every host.

    python launcher/host_report.py '{"script": "launcher/train.py", "arguments": [], "world_size": 2}'

It prints one line of JSON. Whatever fails is an entry in ``problems``, so that one run shows everything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import builds
import psutil
from pydantic import BaseModel

MARK = "HOST-REPORT "
"""Before the JSON: a login shell may print a greeting first."""
PACKAGES = ("torch", "deepspeed", "ds-optim", "transformers", "numpy")


class Question(BaseModel):
    """What the launching host asks of all hosts alike.

    Attributes:
        script: of the training.
        arguments: of the script.
        world_size: ranks of the whole job.
        shared: a file that this host should see, and its content; or None.
        port: that the first host must be able to listen on; None for the others.
    """

    script: str
    arguments: list[str] = []
    world_size: int = 1
    shared: tuple[str, str] | None = None
    port: int | None = None


class Report(BaseModel):
    """One host's answer. A hash is None where there is nothing to hash.

    Attributes:
        versions: of Python and of the packages that must be equal.
        package: hash of the installed ds_optim's files.
        script: hash of the training script and the modules beside it.
        layout: hash of how the parameters are laid out over ``world_size`` ranks.
        interfaces: IPv4 address by network interface.
        devices: accelerators; 0 on a machine that computes on its processor.
        problems: what is wrong on this host alone.
    """

    versions: dict[str, str]
    package: str | None
    script: str | None
    layout: str | None
    interfaces: dict[str, str]
    devices: int
    problems: list[str] = []


def report(question: Question) -> Report:
    """This host's answer."""
    problems: list[str] = []
    layout, devices = None, 0
    try:
        layout = layout_hash(question)
        devices = _devices()
    except (Exception, SystemExit) as error:
        # An import, a config file, an option, an optimizer's refusal: the launching host must hear of it.
        said = " ".join(str(error).split())[:300]
        problems.append(f"the training's settings cannot be read here: {type(error).__name__}: {said}")
    if question.shared is not None and not _sees(*question.shared):
        problems.append(
            f"it does not see {Path(question.shared[0]).parent} as the launching host does: share that path"
        )
    if question.port is not None:
        problems += port_problems(question.port)
    problems += builds.locks()[0]  # left behind by builds that were killed
    return Report(
        versions={"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        package=_package_hash(),
        script=_script_hash(Path(question.script)),
        layout=layout,
        interfaces=_interfaces(),
        devices=devices,
        problems=problems,
    )


def layout_hash(question: Question) -> str | None:
    """Which rank will hold what, hashed; None if the script is not ``launcher/train.py`` or the optimizer not ours.

    Raises:
        SettingsError: the script's arguments or files cannot work.
    """
    if not is_train_py(question.script):
        return None
    import settings

    from ds_optim.blueprint import BlueprintError, blueprint, meta_model
    from ds_optim.deepspeed.predict import predicted_layouts
    from ds_optim.sharding.layout import digest

    chosen = settings.read(question.arguments, question.world_size)
    try:
        about = blueprint(meta_model(chosen.model), chosen.deepspeed, None, {})
    except BlueprintError:
        return None
    return digest(predicted_layouts(about.groups, chosen.zero_stage, question.world_size))


def is_train_py(script: str) -> bool:
    """Whether that is the training job beside this file, whose settings can be read."""
    return Path(script).resolve() == Path(__file__).resolve().with_name("train.py")


def _devices() -> int:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _package_hash() -> str | None:
    from importlib.util import find_spec

    spec = find_spec("ds_optim")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    files = [path for path in package.rglob("*") if path.suffix in {".py", ".h", ".cpp", ".j2"}]
    return _hash(sorted(files), package)


def _script_hash(script: Path) -> str | None:
    if not script.is_file():
        return None
    return _hash([script, *sorted(path for path in script.parent.glob("*.py") if path != script)], script.parent)


def _hash(files: Sequence[Path], root: Path) -> str:
    hashed = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return hashed.hexdigest()


def _interfaces() -> dict[str, str]:
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }


def _sees(file: str, content: str) -> bool:
    try:
        return Path(file).read_text() == content
    except OSError:
        return False


def port_problems(port: int) -> list[str]:
    """Why nobody can listen on a port here; empty if somebody could."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(1)  # binding alone succeeds beside a listener that also reuses the address
        except OSError as error:
            return [f"port {port} cannot be used here ({error.strerror}): choose another with --port"]
    return []


if __name__ == "__main__":
    print(MARK + report(Question(**json.loads(sys.argv[1]))).model_dump_json(), flush=True)
