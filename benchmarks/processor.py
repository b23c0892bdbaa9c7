"""What a benchmark's page calls the processor that it ran on."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path


def processor() -> str:
    """The model as /proc names it, else what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
