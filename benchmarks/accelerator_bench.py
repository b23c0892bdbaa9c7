"""The device, the sizes and the clock of benchmarks/accelerator.py."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from convergence import Setting

from ds_optim.selftest import checks

KEPT = 0.02  # of the minutes: for what is under way when they are over, and the writing


class TimeIsUpError(Exception):
    """The minutes are over."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is; ``small`` is to try the code.

    Attributes:
        numel: elements of what is streamed.
        side: of matrices.
        layers: of a Llama of that width.
        rank: of the factors whose roots are taken.
        batches: sequences per step that are tried.
        setting: of the small Llama.
        tokens_per_parameter: that it is trained with, at most.
        text: files to train on; None for the interpreter's own source.
    """

    numel: int
    side: int
    layers: int
    rank: int
    batches: tuple[int, ...]
    setting: Setting
    tokens_per_parameter: float = 20
    text: Sequence[Path] | None = None

    @classmethod
    def chosen(cls, small: bool) -> Sizes:
        if not small:
            return cls(500_000_000, 2048, 12, 1024, (128, 16), Setting())
        llama = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        tiny = Setting(**llama, seq_length=16, held_out_sequences=8, warmup=0.5)  # type: ignore[arg-type]
        return cls(60_000, 128, 1, 64, (8,), tiny, 0.1, [Path(__file__).parent])


class Bench:
    """The device, the sizes, and the clock."""

    def __init__(self, device: torch.device, sizes: Sizes, minutes: float) -> None:
        self.device, self.sizes = device, sizes
        self.ends = time.monotonic() + 60 * minutes * (1 - KEPT)

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def look(self, done: str = "what stands above") -> None:
        """Look at the clock.

        Args:
            done: what was, until now.

        Raises:
            TimeIsUpError: it is.
        """
        if self.seconds_left < 0:
            raise TimeIsUpError(f"time was up after {done}")

    def milliseconds(self, *contenders: Callable[[], object], rounds: int = 7) -> list[float]:
        """Medians of contenders that run in turn.

        Raises:
            TimeIsUpError: before the first one, if it is.
        """
        self.look()
        return checks.milliseconds(list(contenders), self.device, rounds)

    def host_milliseconds(self, contender: Callable[[], object], rounds: int = 10) -> float:
        """The median time until it returns, when the device may still be at work."""
        times = []
        for _ in range(rounds):
            checks.synchronize(self.device)
            begin = time.perf_counter()
            contender()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)

    def one_step(self, optimizer: Any) -> tuple[float, float]:
        """Its milliseconds, and the bytes that it took and gave back."""
        memory: Any = torch.get_device_module(self.device)
        is_counted = hasattr(memory, "max_memory_allocated")
        checks.synchronize(self.device)
        if is_counted:
            memory.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        optimizer.step()
        checks.synchronize(self.device)
        taken = 1e3 * (time.perf_counter() - begin)
        if not is_counted:
            return taken, 0.0
        return taken, float(memory.max_memory_allocated(self.device) - memory.memory_allocated(self.device))
