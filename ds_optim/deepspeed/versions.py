"""Which releases of DeepSpeed everything in this package was read off, and how messages say so."""

from __future__ import annotations

import sys

FIRST, MINOR, NEXT = "0.19.8", "0.19", "0.20"

REQUIREMENT = f"deepspeed>={FIRST},<{NEXT}"
"""As it stands in setup.py, which cannot import this: internals move with every minor release."""

KNOWN_VERSIONS = f"{FIRST} and later patches of {MINOR}"

MINOR_RELEASE = f"DeepSpeed {MINOR}"
"""The release whose files and formats are read."""

KNOWN_TO_WORK = f"deepspeed versions known to work: {KNOWN_VERSIONS}"


def running() -> str:
    """The DeepSpeed of this process, for messages; it is not imported for that."""
    return f"deepspeed {getattr(sys.modules.get('deepspeed'), '__version__', '(not imported)')}"
