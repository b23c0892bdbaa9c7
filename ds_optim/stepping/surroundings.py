"""What a training script has set around a step, and a step must not take part in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the precision that the optimizer asks for: autocast would make those of fp32 factors bf16 or fp16."""
    kinds = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        kinds.append(accelerator.type)
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def refuse_capture() -> None:
    """Refuse to become part of a CUDA graph: a replay would have this step's number, learning rate and rounding.

    Raises:
        RuntimeError: a capture is under way.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "ds_optim cannot be captured in a CUDA graph: step count, bias correction, learning rate and the key of "
            "stochastic rounding are numbers of the host, which a replay would repeat. Capture forward and backward "
            "pass alone, and call step() after the replay; no weight was changed"
        )
