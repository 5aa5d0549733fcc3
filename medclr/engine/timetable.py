"""When a checkpoint is due."""

from __future__ import annotations

import time

from medclr.errors import ConfigError


class Timetable:
    """Every few steps, every few minutes, or both, whichever comes first.

    Args:
        every_steps: batches between two checkpoints; 0 does not count them.
        every_minutes: minutes between two checkpoints; 0 does not look at the clock.

    Raises:
        ConfigError: for negative ones.
    """

    def __init__(self, every_steps: int, every_minutes: float) -> None:
        if every_steps < 0 or every_minutes < 0:
            raise ConfigError(
                "The time between two checkpoints is unusable.",
                got=f"{every_steps} steps, {every_minutes} minutes",
                wanted=">= 0; 0 is never",
                fix="For example checkpoint_minutes: 15.",
            )
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self._step, self._time = 0, time.monotonic()

    def begin(self, step: int) -> None:
        """Count from this step, and from now on."""
        self._step, self._time = step, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time."""
        by_steps = self.every_steps and step - self._step >= self.every_steps
        by_time = self.every_minutes and time.monotonic() - self._time >= 60 * self.every_minutes
        return bool(by_steps or by_time)
