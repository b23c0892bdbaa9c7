"""Where the memory of one training step is, measured once near the start of a run and written as one JSON file.

The accountant follows the run from before the model is made to the end of the second step, which is the one that is
reported: the first also makes the optimizer's state and builds kernels. Three bare steps later it knows what following
cost, writes the record and is gone.
"""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

BARE_STEPS = 3


class MemoryReport:
    """Measures a run into ``directory/measured.json``; does nothing at all if the directory is None.

    Args:
        directory: made if it is not there.
        provenance: what the accountant cannot find out: name of the model, sequence length.
    """

    def __init__(self, directory: Path | None, **provenance: Any) -> None:
        self._directory, self._provenance = directory, provenance
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
        if self._steps == 2:
            self._stack.enter_context(self._account.paused())
        elif self._steps == 2 + BARE_STEPS:
            self.finish()

    def finish(self) -> None:
        """Write what was measured, if that was not done yet: a collective."""
        if self._account is None or self._steps == 0:
            return
        account, directory, self._account = self._account, self._directory, None
        assert directory is not None
        record = account.gather(**self._provenance)
        self._stack.close()
        if dist.get_rank() == 0:
            path = directory / "measured.json"
            record.save(path)
            print(f"memory     {path}: {_summary(record)}", flush=True)


def _summary(record: Any) -> str:
    from ds_optim.memory.record import Category, human

    fullest, overhead = record.fullest, record.provenance.overhead
    after = fullest.moment("after step")
    nobodys = after.bytes_of(Category.UNACCOUNTED) / after.total
    slower = "" if overhead is None else f"; following it made the step {overhead:.2f} times as long"
    return f"peak {human(fullest.peak.total)} on rank {fullest.rank}, {100 * nobodys:.3f} % unaccounted for{slower}"
