"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

_PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of ``path`` at the end; an error leaves ``path`` as it was.

    The content is on the disk before the name changes, and the name before this returns: a crash of the process or the
    machine leaves the old file or the new one. Folders are made.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full.

    Example:
        >>> with replacing(Path("run.json")) as file:  # doctest: +SKIP
        ...     file.write(b"{}")
    """
    with _part_of(path) as part:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)


def try_writing(path: Path) -> None:
    """Find out whether a file could be written, and leave it as it is. Folders are made.

    Args:
        path: the file, there or not.

    Raises:
        OSError: it could not be written.
    """
    with _part_of(path) as part:
        part.touch()
    if path.is_dir():
        raise IsADirectoryError(f"it is a folder: {path}")


@contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """The name of what is to become ``path``, in a folder that is there; gone at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold a file as this process's own; a file system without locks is taken at its word.

    The lock is the process's: it goes with it, however it ends, and its children do not have it.

    Args:
        path: the file; its folder is made.

    Raises:
        FileExistsError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read(20).decode(errors="replace").strip() or "unknown"
                raise FileExistsError(error.errno, f"process {holder} holds it") from error
        else:
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            file.flush()
        yield


def save_state(content: Mapping[str, Any], file: BinaryIO) -> str:
    """``torch.save``, with a full disk as the ``OSError`` that it is.

    Args:
        content: tensors and plain values, in dictionaries and lists.
        file: open for writing.

    Returns:
        The SHA-256 (hex) of what was written.

    Raises:
        OSError: it cannot be written.
    """
    hashing = _Hashing(file)
    try:
        torch.save(dict(content), cast("IO[bytes]", hashing))
    except RuntimeError as error:  # torch's, which stumbles over the end of a file that could not be written
        raise hashing.failure or error from error
    return hashing.state.hexdigest()


class _Hashing:
    """A file that takes the digest of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.state = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        self.state.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems have no such thing for folders
        pass
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process had begun to write into a folder."""
    for part in folder.glob(f".*{_PART}"):
        part.unlink(missing_ok=True)
