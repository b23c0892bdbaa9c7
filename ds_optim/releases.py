"""Which releases of the packages around ds_optim work, which were tried, and what follows for the installed ones.

The ranges are the ones that setup.py gives pip; what differs between releases inside them is known to
`ds_optim.known_torch`, `ds_optim.known_transformers` and `ds_optim.deepspeed.differences`. What was tried is what
``benchmarks/versions.py`` ran: docs/results/versions.md.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

Standing = Literal["tested", "untested", "newer", "too old", "too new", "not installed"]
"""Tested; between tested ones; newer than all of them; outside of the range; absent."""


@dataclass(frozen=True, slots=True)
class Releases:
    """What is known of one package's releases.

    Attributes:
        package: its name, as pip knows it.
        first: the oldest release that works.
        end: the first one that is refused: the next major one, whose interfaces may be others.
        tested: all that the suite's parts which touch versions passed on, the oldest first.
        untried: what becomes of a release that was not.
    """

    package: str
    first: str
    end: str
    tested: tuple[str, ...]
    untried: str = "nothing compares it: what it lacks is an error, what it computes otherwise is not noticed"

    @property
    def requirement(self) -> str:
        """What pip is told."""
        return f"{self.package}>={self.first},<{self.end}"

    @property
    def known(self) -> str:
        """What works, in words, for messages."""
        tried = f"tested: {', '.join(self.tested)}" if self.tested else "none tested"
        return f"{self.package} versions known to work: {self.first} and later, below {self.end} ({tried})"

    @property
    def installed(self) -> str:
        """The release that this process uses, or would; empty if there is none. The package is not imported."""
        running = getattr(sys.modules.get(self.package), "__version__", None)
        if running is not None:
            return str(running)
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def is_before(self, version: str) -> bool:
        """Whether the installed release is older than ``version``; one that does not say which it is, is not."""
        installed = self.installed
        return bool(installed) and _numbers(installed) < _numbers(version)

    def standing(self, version: str) -> Standing:
        """Where a release stands. Builds (``2.13.0+cpu``) and previews (``2.8.0a0``) count as their release."""
        if not version:
            return "not installed"
        found = _numbers(version)
        if found < _numbers(self.first):
            return "too old"
        if found >= _numbers(self.end):
            return "too new"
        tried = [_numbers(one) for one in self.tested]
        return "tested" if found in tried else "newer" if tried and found > max(tried) else "untested"

    def problem(self, version: str) -> str:
        """Why a release does not do, with the remedy; empty if it does, or if there is none."""
        standing = self.standing(version)
        if standing not in ("too old", "too new"):
            return ""
        return f"{self.package} {version} is {standing}: pip install '{self.requirement}'; {self.known}"

    def follows(self, version: str) -> str:
        """What becomes of a release that was not tried; empty if it was, or if it does not do."""
        standing = self.standing(version)
        if standing not in ("untested", "newer"):
            return ""
        lies = "is newer than all that were tested" if standing == "newer" else "lies between tested ones"
        return f"{self.package} {version} {lies}: {self.untried}. To try it: benchmarks/versions.py"

    def note(self, version: str) -> str:
        """One line about a release that works as far as is known, but was not tried; else empty."""
        if self.standing(version) != "newer":
            return ""
        return (
            f"{self.package} {version} is newer than the newest that was tested with ds_optim, {self.tested[-1]}: "
            "`ds-optim doctor` says more"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0`` of ``2.13.0+cpu``, of equal length for all."""
    from packaging.version import Version

    release = Version(version).release
    return (*release, *[0] * (4 - len(release)))


TORCH = Releases("torch", "2.8", "3", ("2.8.0", "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"))
DEEPSPEED = Releases(
    "deepspeed",
    "0.18.6",
    "1",
    ("0.18.6", "0.18.9", "0.19.0", "0.19.2", "0.19.6", "0.19.7", "0.19.8"),
    "what it says of its partitions is compared with what the engine holds before the first step",
)
TRANSFORMERS = Releases(
    "transformers", "4.55", "6", ("4.55.0", "4.57.6", "5.0.0", "5.6.0", "5.10.4", "5.16.1", "5.17.0", "5.24.0")
)
ACCELERATE = Releases("accelerate", "1.10", "2", ("1.10.0", "1.11.0", "1.12.0", "1.13.0", "1.15.0"))

ALL = (TORCH, DEEPSPEED, TRANSFORMERS, ACCELERATE)


def require(releases: Releases) -> None:
    """Refuse what does not do; what is not installed is somebody else's concern.

    Raises:
        ImportError: the release is outside of the range. What else is outside is said as well.
    """
    if releases.problem(releases.installed):
        raise ImportError(f"ds_optim cannot work here: {'; '.join(problems())}", name=releases.package)


def problems() -> list[str]:
    """Why installed releases do not do, one sentence for each that is outside of its range."""
    return [problem for one in ALL if (problem := one.problem(one.installed))]


def lock_files_block() -> bool:
    """Whether torch waits for a build's lock file while it is there; since 2.14 the system drops a holder's lock."""
    return TORCH.is_before("2.14")


def say_what_was_not_tried() -> None:
    """Warn, once per process and package, of imported ones that are newer than all that was tested, or outside.

    torch and DeepSpeed are refused there; transformers and accelerate need not be used by the training.
    """
    for one in ALL:
        if one.package in sys.modules:
            _say(one)


@cache
def _say(releases: Releases) -> None:
    installed = releases.installed
    problem, note = releases.problem(installed), releases.note(installed)
    if problem or note:
        warnings.warn(note or f"ds_optim may not work with what is imported here: {problem}", stacklevel=3)
