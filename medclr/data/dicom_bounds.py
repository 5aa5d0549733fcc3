"""Bounds for reading DICOM files that may hold anything: no read past the end, none too large, none for too long."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from pydicom import config

from medclr.errors import ScanError

MOST_SECONDS: Final = 8.0
"""What reading one header may take."""
LARGEST_VALUE: Final = 1 << 26
"""Bytes; no element of a header is longer."""


class NotDicom(Exception):
    """The file is no DICOM file at all."""


def refused(problem: str, got: object, wanted: str, fix: str = "Export the file again, or leave it out.") -> ScanError:
    """A reason against a file, which must name tags and sizes only, never what a header says."""
    return ScanError(problem, got=got, wanted=wanted, fix=fix)


def cut_short(got: str, wanted: str) -> ScanError:
    """The reason against a file that ends too early."""
    return refused("The file is cut short.", got, wanted, "Obtain the file again.")


class BoundedFile:
    """A file that refuses to be read past its end, in huge pieces, or for longer than it has time."""

    def __init__(self, file: BinaryIO, size: int, deadline: float) -> None:
        self.file, self.size, self.deadline = file, size, deadline
        self.tell = file.tell
        self.name = "a DICOM file"  # pydicom puts it into messages

    def read(self, size: int = -1, /) -> bytes:
        """As that of a file; near the end a tag's worth may come back short."""
        if time.monotonic() > self.deadline:
            raise refused("The header takes too long to read.", f"over {MOST_SECONDS:g} s", "a header of usual size")
        if size > 16 or size < 0:
            if size > LARGEST_VALUE or size < 0:
                raise refused("An element of the header is absurdly long.", f"{size} bytes", f"up to {LARGEST_VALUE}")
            if self.file.tell() + size > self.size:
                raise cut_short("an element that goes on past the end", "a whole header")
        return self.file.read(size)

    def seek(self, place: int, whence: int = 0, /) -> int:
        """As that of a file, up to its end."""
        if whence == 0 and place > self.size:
            raise cut_short("an element that goes on past the end", "a whole header")
        return self.file.seek(place, whence)

    def close(self) -> None:
        """Nothing; whoever opened the file closes it."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom from warning or logging, since what it says quotes the values of a header."""
    mode, logger = config.settings.reading_validation_mode, logging.getLogger("pydicom")
    disabled = logger.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.disabled = True
        config.settings.reading_validation_mode = config.IGNORE
        try:
            yield
        finally:
            config.settings.reading_validation_mode, logger.disabled = mode, disabled


def open_bounded(path: Path) -> tuple[BinaryIO, int]:
    """The file and its size.

    Raises:
        ScanError: it cannot be opened, or is empty.
    """
    try:
        file = path.open("rb")
        return file, path.stat().st_size
    except OSError as error:
        raise refused("The file cannot be read.", error.strerror or "an error", "a file that can be read") from None
