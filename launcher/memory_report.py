"""Where the memory of one training step is, measured once near the start of a run, and a page about it at the end.

The accountant follows the run from before the model is made to the end of the fourth step, which is the one that is
reported: the first also makes the optimizer's state and builds kernels, and ZeRO-3 looks on for up to three steps
before it fetches parameters ahead. Three bare steps later it knows what following cost, writes the record and is gone.
When the run has ended, the first rank predicts the same run, and one with AdamW, and writes the page.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

MEASURED_STEP, BARE_STEPS = 4, 3


class MemoryReport:
    """Measures a run into ``directory/measured.json``, and makes ``report.html`` of it when the run has ended.

    Does nothing at all if the directory is None.

    Args:
        directory: made if it is not there.
        model: its ``config.json``.
        name: of the model.
        deepspeed: the DeepSpeed JSON.
        seq_length: tokens.
    """

    def __init__(
        self, directory: Path | None, model: dict[str, Any], name: str, deepspeed: dict[str, Any], seq_length: int
    ) -> None:
        self._directory = directory
        self._asked = {"model": model, "model_name": name, "deepspeed": deepspeed, "seq_length": seq_length}
        self._is_written = False
        self._steps = 0
        self._stack = contextlib.ExitStack()
        self._account: Any = None
        if directory is not None:
            from ds_optim.memory.accountant import MemoryAccountant

            # A run is not ended for a few bytes that are nobody's: the report shows them.
            self._account = MemoryAccountant(strict=False, cross_check="process")

    def __enter__(self) -> "MemoryReport":
        if self._account is not None:
            self._stack.enter_context(self._account)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        self._stack.close()

    def watch(self, engine: Any) -> None:
        """Call it when the engine is there, before the first step."""
        if self._account is not None:
            self._account.watch(engine)

    def step_done(self) -> None:
        """Call it after every optimizer step, on all ranks."""
        if self._account is None:
            return
        self._steps += 1
        if self._steps == MEASURED_STEP:
            self._stack.enter_context(self._account.paused())
        elif self._steps == MEASURED_STEP + BARE_STEPS:
            self.finish()

    def finish(self) -> None:
        """Write what was measured, if that was not done yet: a collective."""
        if self._account is None or self._steps == 0:
            return
        account, directory, self._account = self._account, self._directory, None
        assert directory is not None
        record = account.gather(model=self._asked["model_name"], seq_length=self._asked["seq_length"])
        self._stack.close()
        if dist.get_rank() == 0:
            path = directory / "measured.json"
            record.save(path)
            print(f"memory     {path}: {_summary(record)}", flush=True)
            self._is_written = True

    def page(self) -> Path | None:
        """Predict the run and its twin with AdamW, and write the page; None on other ranks, or without a record.

        The predictions are left out where this is no run that can be predicted (somebody else's optimizer).
        """
        if not self._is_written:
            return None
        from ds_optim.memory.estimate import predict, request_of
        from ds_optim.memory.report_command import write

        assert self._directory is not None
        baseline = self._directory / "adamw.json"
        try:
            asked = request_of(**self._asked, world_size=dist.get_world_size())
            predict(asked).save(self._directory / "predicted.json")
            predict(replace(asked, optimizer="AdamW", settings={})).save(baseline)
        except ValueError as error:
            print(f"memory     not predicted: {error}", flush=True)
            return write([self._directory], self._directory, None, False)
        return write([self._directory], self._directory, baseline, False)


def _summary(record: Any) -> str:
    from ds_optim.memory.record import Category, human

    fullest, overhead = record.fullest, record.provenance.overhead
    after = fullest.moment("after step")
    nobodys = after.bytes_of(Category.UNACCOUNTED) / after.total
    slower = "" if overhead is None else f"; following it made the step {overhead:.2f} times as long"
    return f"peak {human(fullest.peak.total)} on rank {fullest.rank}, {100 * nobodys:.3f} % unaccounted for{slower}"
