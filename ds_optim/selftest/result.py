"""What a check found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Passing = Literal["PASS", "FAIL", "NOT HERE"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the table.

    Attributes:
        check: what was looked at, and where.
        verdict: NOT HERE if this machine cannot show it.
        said: in words, with the limit.
        numbers: what was measured, by name; units are in the names.
        rank: who found it.
    """

    check: str
    verdict: Passing
    said: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    rank: int = 0


def judged(check: str, passes: bool, said: str, **numbers: float) -> CheckResult:
    """A finding of something that was measured."""
    return CheckResult(check, "PASS" if passes else "FAIL", said, numbers)


def not_here(check: str, why: str) -> CheckResult:
    """A finding of something that this machine cannot show."""
    return CheckResult(check, "NOT HERE", why)


def failed(check: str, error: Exception) -> CheckResult:
    """A finding of something that raised."""
    return CheckResult(check, "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
