"""The accountant inside other people's loops: transformers' Trainer, DeepSpeed's monitors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_optim.memory.accountant import MemoryAccountant
from ds_optim.memory.record import Category, Record
from ds_optim.trainer_callback import Callback, engine_of


class MemoryReportCallback(Callback):  # type: ignore[misc]
    """Measures one step of a `transformers.Trainer`, plain or under DeepSpeed, and writes ``directory/measured.json``.

        trainer.add_callback(MemoryReportCallback(trainer, "report"))

    The accountant is entered when training begins, since the Trainer gets a model that exists already. To have
    everything counted from the start, enter a `MemoryAccountant` before the model is made and hand it over.

    Args:
        trainer: whose engine, model and optimizer are watched.
        directory: made if it is not there.
        step: which step is measured, from 1; the first also makes the optimizer's state and builds kernels.
        account: an accountant that is entered already; its owner leaves it.
        strict: see `MemoryAccountant`; off, since a report is no reason to end a run.
        **provenance: fields of `ds_optim.memory.record.Provenance`, such as ``seq_length``.

    Attributes:
        record: of all ranks, when the step is over.
    """

    def __init__(
        self,
        trainer: Any,
        directory: str | Path,
        *,
        step: int = 2,
        account: MemoryAccountant | None = None,
        strict: bool = False,
        **provenance: Any,
    ) -> None:
        if step < 1:
            raise ValueError(f"step is {step}; steps are counted from 1")
        self._trainer, self._path, self._step = trainer, Path(directory) / "measured.json", step
        self._is_ours = account is None
        self._account: MemoryAccountant | None = account or MemoryAccountant(strict=strict)
        self._provenance = provenance
        self.record: Record | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Engine, model and optimizer are there now."""
        if self._account is None:
            return
        if self._is_ours:
            self._account.__enter__()
        engine = engine_of(self._trainer)
        if engine is not None:
            self._account.watch(engine)
        else:
            self._account.watch(self._trainer.model_wrapped, self._trainer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the record after the step that was asked for."""
        account = self._account
        if account is None or len(account.running) < self._step:
            return
        given = {"micro_batch": args.per_device_train_batch_size, **self._provenance}
        self.record = account.gather(**given)
        if state.is_world_process_zero:
            self.record.save(self._path)
        self._leave()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training may end before that step."""
        self._leave()

    def _leave(self) -> None:
        if self._account is not None and self._is_ours:
            self._account.__exit__(None, None, None)
        self._account = None


def append_to_monitor(record: Record, monitor: Any, step: int) -> None:
    """Append one rank's bytes per category to DeepSpeed's monitors (tensorboard, csv, wandb, ...).

    Args:
        record: of the last step, ``account.record()``; of several ranks the fullest is shown.
        monitor: ``engine.monitor``; it writes on rank 0 only.
        step: position on the axis of steps: ``engine.global_samples``, as DeepSpeed's own lines.
    """
    fullest = record.fullest
    after, peak = fullest.moment("after step"), fullest.peak
    events = [
        (f"Memory/{category.value.replace(' ', '_')}", after.bytes_of(category), step)
        for category in Category
        if after is not None and category in after.amounts
    ]
    if after is not None:
        events.append(("Memory/total", after.total, step))
    if peak is not None:
        events.append(("Memory/peak", peak.total, step))
    monitor.write_events(events)
