"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
