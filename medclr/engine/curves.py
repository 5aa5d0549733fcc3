"""TensorBoard's files of a run: one writer for all that log, which ends no run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter

from medclr import distributed

logger = logging.getLogger(__name__)


class Curves:
    """Stands in for a ``SummaryWriter``, also to MONAI's handlers: ``summary_writer: '@curves'``.

    It opens a file at the first write and on rank 0 alone; elsewhere nothing is written. Where the disk fails, it warns
    once and writes no more: a run is worth more than its curves.

    All methods ``add_...`` of a ``SummaryWriter`` are offered.

    Args:
        log_dir: where TensorBoard's files go.

    Example:
        >>> curves = Curves("models/tensorboard")
        >>> curves.attach(trainer)  # doctest: +SKIP
        >>> curves.add_scalar("train/loss", 0.5, 10)  # doctest: +SKIP
    """

    def __init__(self, log_dir: str | Path) -> None:
        self.log_dir = str(log_dir)
        self._writer: Any = None
        self._purge_step: int | None = None
        self._last_step = 0
        self._failed = False

    def attach(self, engine: Engine) -> None:
        """Follow the trainer. Of a resumed run, TensorBoard hides what was written after the step that it resumes from.

        An exception leaves the file as it was flushed last: ignite would keep the exception from those who wait for it,
        if this listened to it.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.flush())
        engine.add_event_handler(Events.COMPLETED, lambda: self.close())
        engine.add_event_handler(Events.TERMINATE, lambda: self.close())  # which may leave COMPLETED out

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None, **settings: Any) -> None:
        """One point of a curve."""
        self._write("add_scalar", tag, scalar_value, global_step=global_step, **settings)

    def add_image(self, tag: str, img_tensor: Any, global_step: int | None = None, **settings: Any) -> None:
        """A picture, (C, H, W) in 0..1."""
        self._write("add_image", tag, img_tensor, global_step=global_step, **settings)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("add_") or not hasattr(SummaryWriter, name):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return lambda *values, **settings: self._write(name, *values, **settings)

    def flush(self) -> None:
        """Put what was written on the disk, as far as it works."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except Exception as error:  # tensorboard's, or with TensorFlow beside it that one's
                self._stop(error)

    def close(self) -> None:
        """Close the file, as far as it works; the next write opens another."""
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._stop(error)
        self._writer = None

    def _start(self, engine: Engine) -> None:
        earlier = any(Path(self.log_dir).glob("events.out.tfevents*"))
        if engine.state.iteration > 0:
            self.close()  # only a new file can say from which step on the others are no longer true
            self._purge_step = engine.state.iteration + 1
        elif self._writer is None and earlier:
            self._purge_step = 0  # of a run that was killed before its first checkpoint, or is begun anew

    def _write(self, method: str, *values: Any, **settings: Any) -> None:
        if self._failed or distributed.rank() != 0:
            return
        step = settings.get("global_step")
        self._last_step = self._last_step if step is None else int(step)
        if not self._is_open():
            return
        try:
            getattr(self._writer, method)(*values, **settings)
        except Exception as error:
            # A thread writes, and what it died of is raised by the next call; all else is a mistake of the caller.
            if not isinstance(error, OSError) and error not in _failures(self._writer):
                raise
            self._stop(error)

    def _is_open(self) -> bool:
        if self._writer is None:
            try:
                self._writer = SummaryWriter(self.log_dir, purge_step=self._purge_step)
            except Exception as error:
                self._stop(error)
                return False
            self._purge_step = None
        return True

    def _stop(self, error: Exception) -> None:
        self._failed = True
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        logger.warning("TensorBoard curves stop at step %d: %s; the training goes on", self._last_step, reason)
        writer, self._writer = self._writer, None
        for file in _files(writer):
            # Not the writer's own close: it flushes first, which fails again, and the thread would be left running.
            with suppress(Exception):
                file.close()


def _files(writer: Any) -> list[Any]:
    return list((getattr(writer, "all_writers", None) or {}).values())


def _failures(writer: Any) -> list[BaseException]:
    """What the threads that write have died of."""
    found = []
    for file in _files(writer):
        thread = getattr(getattr(file.event_writer, "_async_writer", None), "_worker", None)
        found.append(getattr(thread, "exception", None))
    return [error for error in found if error is not None]
