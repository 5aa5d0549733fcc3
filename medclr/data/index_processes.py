"""Work on many files in several processes: few under way at a time, and a file that kills its process found out.

A piece has a deadline; what runs beyond it is stopped, from within where Python still runs, else with its process.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from medclr.errors import ScanError

SECONDS: Final = 10.0
"""What one file may take, and one second more for each ``BYTES_A_SECOND``."""
BYTES_A_SECOND: Final = 2_000_000

Item = TypeVar("Item")
Result = TypeVar("Result")

_worker = {"is": False}


class OutOfTime(BaseException):
    """A file took too long. No ``Exception``, so that readers that catch everything let it through."""


def in_processes(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    lost: Callable[[Item], Result],
    chunk: int = 1,
) -> Iterator[tuple[Item, Result]]:
    """Results as they come, in no certain order, in memory that does not depend on how many there are.

    Args:
        task: a function of a module, or a partial of one.
        items: what it is called with; taken as they are needed.
        workers: processes; 1 stays in this one, without deadlines.
        lost: the result of an item that kills its process also when it is alone.
        chunk: items sent to a process at once.

    Example:
        >>> sorted(in_processes(abs, [-2, 1], workers=1, lost=abs))
        [(-2, 2), (1, 1)]
    """
    source = iter(items)
    if workers == 1:
        for item in source:
            yield item, task(item)
        return
    pool: ProcessPoolExecutor | None = None
    pending: dict[Future[list[Result]], list[Item]] = {}
    left: list[Item] = []
    try:
        while True:
            try:
                pool = pool or _pool(workers)
                while len(pending) < 4 * workers and (left := list(islice(source, chunk))):
                    pending[pool.submit(_run, task, left)] = left
                    left = []
                if not pending:
                    return
                for done in wait(pending, return_when=FIRST_COMPLETED)[0]:
                    results = done.result()
                    yield from zip(pending.pop(done), results, strict=True)
            except BrokenProcessPool:
                alone = [*(item for piece in pending.values() for item in piece), *left]
                pending, left = {}, []
                if pool is not None:
                    pool.shutdown(cancel_futures=True)
                pool = None
                for item in alone:
                    yield item, _alone(task, item, lost)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


@contextmanager
def deadline(path: Path | None = None, seconds: float = SECONDS) -> Iterator[None]:
    """Stop what takes too long for a file; in a process of :func:`in_processes` only.

    Args:
        path: the file, whose size counts.
        seconds: what a small one may take.

    Raises:
        ScanError: it took too long.
    """
    if not _worker["is"]:
        yield
        return
    if path is not None:
        with suppress(OSError):
            seconds += path.stat().st_size / BYTES_A_SECOND
    # The alarm ends Python code; where a library does not come back, the process ends a little later.
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds + 2, exit=True, file=nowhere)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        except OutOfTime:
            raise took_too_long(seconds) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()


def took_too_long(seconds: float) -> ScanError:
    """The reason against a file that is never done with."""
    return ScanError(
        "The file takes too long to read.",
        got=f"over {seconds:.0f} s",
        wanted="a file that is read in a few seconds",
        fix="Obtain the file again, or convert it anew.",
    )


def killed() -> ScanError:
    """The reason against a file that ends the process that reads it."""
    return ScanError(
        "The process that read the file was killed.",
        got="no answer from it, twice",
        wanted="a file that can be read in the memory and the time that there are",
        fix="Obtain the file again; with little memory, use --workers 1.",
    )


def progress_bar(shown: bool) -> Progress:
    """A bar on stderr, or none."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def _alone(task: Callable[[Item], Result], item: Item, lost: Callable[[Item], Result]) -> Result:
    with _pool(1) as pool:
        try:
            return pool.submit(_run, task, [item]).result()[0]
        except BrokenProcessPool:
            return lost(item)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, initializer=_begin, initargs=(os.getpid(),))


def _run(task: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [task(item) for item in items]


def _begin(parent: int) -> None:
    """A new process: it leaves Ctrl-C to its parent, and ends when that is gone."""
    _worker["is"] = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _stop)
    # What libraries print of a damaged file may quote it.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.__stderr__.fileno() if sys.__stderr__ else 2)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _stop(*_: object) -> None:
    raise OutOfTime
