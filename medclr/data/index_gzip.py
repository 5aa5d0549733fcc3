"""Compressed files, a piece at a time: as ``gzip`` reads them, in fewer and larger steps."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from types import TracebackType

_PIECE = 1 << 18


class GzipStream:
    """What a gzip file holds, forwards; checksums are verified, and padding of zeros behind the end is let through.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._waiting = b""
        self._ended = False

    def __enter__(self) -> GzipStream:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()

    def seek(self, place: int) -> None:
        """Go on from a place; once, from the start."""
        while place > 0 and (piece := self.read(min(place, _PIECE))):
            place -= len(piece)

    def read(self, size: int) -> bytes:
        """So many bytes, fewer at the end.

        Raises:
            EOFError: the file breaks off.
            gzip.BadGzipFile: it is damaged, or none.
        """
        pieces, missing = [], size
        while missing > 0 and not self._ended:
            piece = self._some(missing)
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _some(self, most: int) -> bytes:
        fresh = self._waiting or self._file.read(_PIECE)
        if self._inflater.eof:  # another member, or padding
            fresh = fresh.lstrip(b"\0")
            self._waiting = fresh
            if fresh:
                self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
            else:
                self._ended = not self._file.peek(1)
            return b""
        try:
            piece = self._inflater.decompress(fresh, most)
        except zlib.error as error:
            raise gzip.BadGzipFile("damaged, or no gzip file") from error
        self._waiting = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
        if not fresh and not piece and not self._inflater.eof:
            raise EOFError("the compressed stream breaks off")
        return piece
