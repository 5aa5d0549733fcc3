"""Signals that ask a run to stop: it finishes its step, saves, and ends with a code of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Final

STOPPED_EXIT_CODE: Final = 75
"""How a process ends after a signal, once the run is saved (EX_TEMPFAIL of sysexits.h): start it again to go on."""

SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""What schedulers send before they take a machine away, and Ctrl-C."""


class StopSignals:
    """Remembers the first signal that asks to stop, in place of dying of it; a later one acts at once, as usual.

    Of two within ``grace`` seconds the second does not count: a scheduler and ``torchrun`` may both send the first.

    Outside the main thread no handler can be installed, and nothing is done. A process that was forked off, such as a
    data loader's worker, leaves the matter to its parent.

    Example:
        >>> with StopSignals() as signals:  # doctest: +SKIP
        ...     while not signals.received:
        ...         step()
    """

    def __init__(self, grace: float = 1.0) -> None:
        self.grace = grace
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._process = 0
        self._when = 0.0

    def __enter__(self) -> StopSignals:
        self.received, self._process = None, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self.received is not None:
            if time.monotonic() - self._when > self.grace:
                self.__exit__(None, None, None)
                os.kill(self._process, number)
            return
        self._when = time.monotonic()
        self.received = signal.Signals(number)
        # Not by print or logging, which may be in the middle of a line of their own.
        text = f"\n{self.received.name}: the run stops after this step, and saves; once more to stop at once\n"
        os.write(2, text.encode())


def let_workers_die_quietly() -> None:
    """Keep the death of a data loader's worker from interrupting a step; the next batch tells of it, between two steps.

    torch raises it from a handler of SIGCHLD, at whatever the process is doing, such as writing a checkpoint.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and hasattr(signal, "SIGCHLD") and signal.getsignal(signal.SIGCHLD) != signal.SIG_DFL:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
