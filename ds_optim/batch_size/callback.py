"""The noise scale inside other people's loops: transformers' Trainer, DeepSpeed's monitors."""

from __future__ import annotations

import warnings
from typing import Any

from ds_optim.batch_size.estimator import Reading
from ds_optim.batch_size.noise_scale import NoiseScale, UnequalBatchesError
from ds_optim.trainer_callback import Callback, engine_of


class NoiseScaleCallback(Callback):  # type: ignore[misc]
    """Measures the noise scale of a `transformers.Trainer`, plain or under DeepSpeed, and puts it into its log.

        trainer.add_callback(NoiseScaleCallback(trainer, seq_length=2048))

    At every logging step of the Trainer there is one more entry: ``noise_scale``, ``noise_scale_low``,
    ``noise_scale_high`` (sequences), ``noise_scale_tokens`` and, with ``by_role``, ``noise_scale_attention`` and so on;
    an entry is missing while it is not ready.

    Args:
        trainer: whose engine, or model and optimizer, are watched.
        **options: of `NoiseScale`, such as ``seq_length``, ``by_role``, ``beta``.

    Attributes:
        reading: the latest; None before the first.

    Raises:
        NoiseScaleError: when training begins, if the noise scale cannot be measured there.
    """

    def __init__(self, trainer: Any, **options: Any) -> None:
        self._trainer, self._options = trainer, options
        self._noise: NoiseScale | None = None
        self.reading: Reading | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Engine, model and optimizer are there now."""
        options = {"micro_batch_size": args.per_device_train_batch_size, **self._options}
        engine = engine_of(self._trainer)
        if engine is not None:
            self._noise = NoiseScale(engine, **options)
        else:
            self._noise = NoiseScale(self._trainer.model_wrapped, optimizer=self._trainer.optimizer, **options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs where the Trainer logs."""
        if control.should_log and self._read() is not None:
            assert self.reading is not None
            entry = _entry(self.reading)
            if entry:
                self._trainer.log(entry)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last reading stays."""
        self._read()
        if self._noise is not None:
            self._noise.detach()
        self._noise = None

    def _read(self) -> Reading | None:
        try:
            self.reading = None if self._noise is None else self._noise.read()
        except UnequalBatchesError as error:  # no reason to end a run
            warnings.warn(f"noise scale: {error}", stacklevel=2)
            self.reading = None
        return self.reading


def _entry(reading: Reading) -> dict[str, float]:
    found = {
        "noise_scale": reading.sequences,
        "noise_scale_low": reading.interval and reading.interval[0],
        "noise_scale_high": reading.interval and reading.interval[1],
        "noise_scale_tokens": reading.tokens,
        **{f"noise_scale_{role}": of_role.sequences for role, of_role in reading.roles.items()},
    }
    return {key: round(value, 1) for key, value in found.items() if value is not None}


def append_to_monitor(reading: Reading, monitor: Any, step: int) -> None:
    """Append a reading to DeepSpeed's monitors (tensorboard, csv, wandb, ...), as far as it is ready.

    Args:
        reading: of `NoiseScale.read`.
        monitor: ``engine.monitor``; it writes on rank 0 only.
        step: position on the axis of steps: ``engine.global_samples``, as DeepSpeed's own lines.
    """
    found = {
        "sequences": reading.sequences,
        "low": reading.interval and reading.interval[0],
        "high": reading.interval and reading.interval[1],
        "tokens": reading.tokens,
        "gradient_sq": reading.gradient_sq,
        "noise": reading.noise,
        **{f"{role}/sequences": of_role.sequences for role, of_role in reading.roles.items()},
    }
    events = [(f"NoiseScale/{key}", value, step) for key, value in found.items() if value is not None]
    if events:
        monitor.write_events(events)
