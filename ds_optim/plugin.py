"""What follows from `import deepspeed`: our names in a JSON, and engines that load and save on any terms."""

from __future__ import annotations

from typing import Any

from ds_optim.deepspeed.plugin import when_bound


def _watch_checkpoints(engine: Any) -> None:
    # They need torch's checkpoint package, which other engines do without.
    from ds_optim.checkpoint import engine_saves, resume

    engine_saves.save_as_asked(engine)
    resume.resume_anywhere(engine)


when_bound(_watch_checkpoints)
