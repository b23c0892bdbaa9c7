"""The gradient noise scale of a run: beside the log lines, in ``log.jsonl`` and ``summary.json``, in the monitors."""

from collections.abc import Mapping
from typing import Any

import settings
from progress import Progress


class NoiseWatch:
    """Follows every step if ``--noise-scale`` was given, and does nothing at all otherwise. Made on all ranks.

    Args:
        engine: after a checkpoint was loaded.
        saved: what `state` was when the run that is resumed was saved, if it was watched.

    Raises:
        SettingsError: there is no smaller batch to compare a step with, or no way to measure it.
    """

    def __init__(self, engine: Any, chosen: settings.Settings, saved: Mapping[str, Any] | None) -> None:
        self._engine, self._noise = engine, None
        if not chosen.noise_scale:
            return
        from ds_optim.batch_size import NoiseScale, NoiseScaleError

        try:
            self._noise = NoiseScale(engine, seq_length=chosen.seq_length, by_role=chosen.noise_scale_by_role)
        except NoiseScaleError as error:
            raise settings.SettingsError([f"--noise-scale: {error}"]) from error
        if saved is not None:
            try:
                self._noise.load_state_dict(saved)
            except ValueError as error:
                raise settings.SettingsError([f"--noise-scale: {error}"]) from error

    def step_done(self, progress: Progress, number: int) -> None:
        """Shown where a log line is due. All ranks read, so that an error ends all of them."""
        if self._noise is None or not progress.is_due(number):
            return
        reading = self._noise.read()
        progress.noise_scale(number, str(reading), reading.as_dict())
        if self._engine.monitor.enabled:
            from ds_optim.batch_size.callback import append_to_monitor

            append_to_monitor(reading, self._engine.monitor, self._engine.global_samples)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {} if self._noise is None else {"noise_scale": self._noise.state_dict()}

    def summary(self) -> dict[str, Any]:
        """The last reading."""
        return {} if self._noise is None else {"noise_scale": self._noise.read().as_dict()}
