"""What long runs die of, in words that help: no memory, no disk, a worker or a rank that is gone."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Final

import torch
import torch.distributed as dist

from medclr import errors
from medclr.errors import MedclrError, causes

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN: Final = (errno.EROFS, errno.EACCES, errno.EPERM)
_NUMBER: Final = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")  # as Python and as Rust, for safetensors, write it
_WORKER_ERROR: Final = re.compile(
    r"^medclr\.errors\.(\w+): (.*?)\n  got:    (.*?)\n  wanted: (.*?)\n  fix:    ([^\n]*)", re.MULTILINE | re.DOTALL
)
_LOST_WORKER: Final = re.compile(r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal)")
_SIGNAL: Final = re.compile(r"DataLoader worker \(pid.*\) is killed by signal: (\w+)")
_LOST_RANK: Final = re.compile(
    r"NCCL (error|watchdog|communicator)|nccl\w+Error"
    r"|gloo.*(closed by peer|reset by peer|broken pipe|timed out|timeout)",
    re.IGNORECASE | re.DOTALL,
)


def explain(error: BaseException) -> MedclrError | None:
    """What a failure means and what to do about it; None for one that is not known.

    Args:
        error: what was raised. Its causes count as well, the outermost first. A :class:`MedclrError` is given back as
            it is; so is one that a data loader's worker raised, which arrives as text.
    """
    for link in causes(error):
        if isinstance(link, MedclrError):
            return link
        meaning = _from_worker(link) or _memory(link) or _worker(link) or _disk(link) or _rank(link)
        if meaning is not None:
            return meaning
    return None


@contextmanager
def explained() -> Iterator[None]:
    """A block whose failures are raised as :class:`MedclrError` where :func:`explain` knows them, else as they are.

    Raises:
        MedclrError: from the error that it explains.

    Example:
        >>> with explained():
        ...     raise MemoryError
        Traceback (most recent call last):
        medclr.errors.MedclrError: The machine is out of memory.
        ...
    """
    try:
        yield
    except Exception as error:
        meaning = explain(error)
        if meaning is None or meaning is error:
            raise
        # A copy, because the meaning may be a cause of the error, which must not become its own.
        raise copy(meaning) from error


def _from_worker(error: BaseException) -> MedclrError | None:
    """The error that a worker raised: torch sends its text, and cannot make one that takes more than a message."""
    found = _WORKER_ERROR.findall(str(error)) if str(error).startswith("Caught ") else []
    kind, problem, got, wanted, fix = found[-1] if found else ("", "", "", "", "")
    made = getattr(errors, kind, None)
    if not isinstance(made, type) or not issubclass(made, MedclrError):
        return None
    return made(problem, got=got, wanted=wanted, fix=fix)


def _memory(error: BaseException) -> MedclrError | None:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        return MedclrError(
            "The GPU is out of memory.",
            got=_short(error),
            wanted="a step that fits into its memory",
            fix="Lower batch_size, then roi_size; set precision: bf16; or end what else runs on this GPU.",
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or _number(error) == errno.ENOMEM:
        return MedclrError(
            "The machine is out of memory.",
            got=_short(error),
            wanted="scans and batches that fit into its memory",
            fix="Lower batch_size, then roi_size; and num_workers or cache_mb, since each worker may keep cache_mb.",
        )
    return None


def _lost_while_sending(error: BaseException) -> bool:
    """Whether a worker was lost after it had announced a batch and before it had handed it over."""
    files = [frame.f_code.co_filename.replace("\\", "/") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, EOFError | ConnectionError) and any("torch/multiprocessing/" in file for file in files)


def _worker(error: BaseException) -> MedclrError | None:
    if not _LOST_WORKER.search(str(error)) and not _lost_while_sending(error):
        return None
    # Which signal it was may be known to a cause alone; where none is, the worker has most likely been killed.
    known = [found[1] for link in causes(error) if (found := _SIGNAL.search(str(link)))] or ["Killed"]
    if known[0] == "Bus":
        return MedclrError(
            "A data loader worker has found no room in shared memory.",
            got=_short(error),
            wanted="room in /dev/shm for the batches that are under way",
            fix="Give the container a larger --shm-size, or set num_workers: 0.",
        )
    if known[0] == "Killed":
        return MedclrError(
            "A data loader worker was killed by the system, most likely because the machine is out of memory.",
            got=_short(error),
            wanted="workers that live as long as the run",
            fix="Lower num_workers or cache_mb: each worker may keep cache_mb of what it reads itself.",
        )
    return None


def _disk(error: BaseException) -> MedclrError | None:
    number = _number(error)
    # torch.save into a path says no more than this where a write has failed.
    torn = "inline_container.cc" in str(error) and re.search("unexpected pos|write failed", str(error))
    if number in _FULL or torn:
        return MedclrError(
            "The disk is full.",
            got=_short(error),
            wanted="space for checkpoints, weights and curves",
            fix="Free some space, or set output_dir to another disk; then start again, and the run goes on.",
        )
    if number in _FORBIDDEN:
        return MedclrError(
            "The system does not allow to write there.",
            got=_short(error),
            wanted="an output folder that you may write to, on a disk that is not read-only",
            fix="Set output_dir to such a folder; a disk that has become read-only may be failing.",
        )
    return None


def _rank(error: BaseException) -> MedclrError | None:
    lost = isinstance(error, RuntimeError) and _LOST_RANK.search(str(error))
    # A broken connection is an OSError where a worker has died, and a RuntimeError where a rank has.
    if not lost and not isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return None
    return MedclrError(
        "Another rank has died, or no longer answers.",
        got=_short(error),
        wanted="all ranks to live as long as the run",
        fix="See that rank's own message. Start again, and the run goes on; torchrun --max-restarts does so by itself.",
    )


def _number(error: BaseException) -> int | None:
    """The system's number of an error; from the text, where a worker or a library has sent no more."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found[1] or found[2]) if found else None


def _short(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return ": ".join(str(part) for part in (error.filename, os.strerror(error.errno)) if part)
    return " ".join(str(error).split())[:200] or type(error).__name__
