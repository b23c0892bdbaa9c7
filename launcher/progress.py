"""What a person sees while the job runs: a bar, log lines, and a file with every step.

Rank 0 shows and writes; the other ranks hold a `Progress` that does nothing. Without a terminal there is no bar, only
plain lines.
"""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class OptimizerClock:
    """Time inside the basic optimizer's ``step()`` alone: without DeepSpeed's clipping, casting and gathering.

    It listens with `torch.optim.Optimizer`'s own step hooks, so any optimizer can be timed. ZeRO calls ``step()`` once
    per parameter group or sub-group; the calls of one training step are summed. A ``step()`` that calls its parent's is
    heard twice, and counts once.

    Args:
        optimizer: the optimizer that DeepSpeed wraps.
        synchronize: waits for the device. Accelerators run behind the host, and unfinished work of the backward pass
            would otherwise be charged to the optimizer; the wait costs a little speed, and none on a CPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, synchronize: Any) -> None:
        self._synchronize = synchronize
        self._started = 0.0
        self._seconds = 0.0
        self._depth = 0
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._synchronize()
            self._started = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._synchronize()
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Progress:
    """Use as a context manager around the training loop.

    Args:
        shown: whether this rank shows anything.
        first: steps that were done before this process started.
        steps: the last step.
        log_every: steps between two lines. The first step always has its own line: it builds kernels, and its time
            must not hide in an average.
        output: directory for ``log.jsonl``, or None.
    """

    def __init__(self, shown: bool, first: int, steps: int, log_every: int, output: Path | None) -> None:
        self._shown = shown
        self._first = first
        self._steps = steps
        self._log_every = log_every
        self._window: list[dict[str, float]] = []
        self._file: TextIO | None = None
        self._output = output if shown else None
        self.console = Console(highlight=False, quiet=not shown)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, quiet=not shown, width=120)  # a file or a pipe has no width
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=steps, completed=first)

    def __enter__(self) -> "Progress":
        if self._output is not None:
            self._output.mkdir(parents=True, exist_ok=True)
            # A resumed run goes on in the same file; a new one starts it anew.
            self._file = (self._output / "log.jsonl").open("a" if self._first else "w")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def step(
        self, number: int, loss: float, lr: float, grad_norm: float, tokens: int, seconds: float, optimizer: float
    ) -> None:
        """One finished step: ``tokens`` of all ranks, ``seconds`` of the whole step, ``optimizer`` those within it."""
        if not self._shown:
            return
        record = {
            "step": number,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "seconds": seconds,
            "optimizer_seconds": optimizer,
        }
        self.write(record)
        self._window.append(record)
        self._bar.update(self._task, completed=number, description=f"loss {loss:.3f}")
        if self.is_due(number):
            self._line()

    def is_due(self, number: int) -> bool:
        """Whether a step has a line of its own."""
        return number - 1 == self._first or number % self._log_every == 0 or number == self._steps

    def noise_scale(self, number: int, text: str, reading: dict[str, Any]) -> None:
        """A reading of the gradient noise scale after a step: ``text`` for people, the rest for ``log.jsonl``."""
        self.write({"step": number, "noise_scale": reading})
        self.say(f"step {number:>{len(str(self._steps))}}/{self._steps}  {text}")

    def held_out(self, number: int, loss: float) -> None:
        self.write({"step": number, "held_out_loss": loss})
        self.say(f"step {number:>{len(str(self._steps))}}/{self._steps}  held-out loss {loss:.4f}")

    def summary(self, content: dict[str, Any]) -> None:
        if self._output is not None:
            (self._output / "summary.json").write_text(json.dumps(content, indent=2) + "\n")

    def _line(self) -> None:
        """Loss, speed and the optimizer's share are over all steps since the last line; the rest is the last step's."""
        window, self._window = self._window, []
        last = window[-1]
        seconds = sum(r["seconds"] for r in window)
        self.say(
            f"step {last['step']:>{len(str(self._steps))}}/{self._steps}"
            f"  loss {sum(r['loss'] for r in window) / len(window):.4f}"
            f"  lr {last['lr']:.2e}"
            f"  grad norm {last['grad_norm']:.3f}"
            f"  {sum(r['tokens'] for r in window) / seconds:,.0f} tokens/s"
            f"  optimizer {100 * sum(r['optimizer_seconds'] for r in window) / seconds:.2f} % of the step"
        )
