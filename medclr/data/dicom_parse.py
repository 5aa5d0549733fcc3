"""The header of one DICOM file as raw elements, in bounded time and memory, whatever the file holds.

pydicom finds the elements; what it reads passes through :class:`medclr.data.dicom_bounds.BoundedFile`, which knows how
much there is to read and when to stop.
"""

from __future__ import annotations

import struct
import time
import zlib
from io import BytesIO
from typing import Any, BinaryIO, Final, NamedTuple

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import Tag

from medclr.data.dicom_bounds import MOST_SECONDS, BoundedFile, NotDicom, cut_short, quiet, refused
from medclr.data.dicom_tags import Tags
from medclr.errors import ScanError

LARGEST_INFLATED: Final = 1 << 29
"""Bytes that a deflated file may grow to."""
MOST_FRAMES: Final = 1 << 16

DEFLATED: Final = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
PIXEL_TAGS: Final = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_UNDEFINED = 0xFFFFFFFF
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


class PixelData(NamedTuple):
    """Where the pixels of a file lie."""

    tag: int
    start: int
    """Byte of the file (or of what a deflated file holds) at which the value, or the first item after the table of
    offsets, begins."""
    length: int
    """Bytes of the value; for encapsulated pixels up to the end of the last item."""
    encapsulated: bool


class Parsed(NamedTuple):
    """A header and where its pixels are."""

    tags: Tags
    meta: Tags
    syntax: str
    pixels: PixelData | None
    inflated: bytes | None


def parse(file: BinaryIO, size: int, wanted: list[int]) -> Parsed:
    """The wanted elements of an open file.

    Args:
        file: at its start.
        size: its bytes.
        wanted: tags of the elements to keep.

    Raises:
        NotDicom: it is something else.
        ScanError: it is a DICOM file that is damaged.
    """
    deadline = time.monotonic() + MOST_SECONDS
    begin = file.read(132)
    marked = begin[128:] == b"DICM"
    if not marked and not _may_be_headless(begin):
        raise NotDicom("no DICOM file")
    try:
        with quiet():
            return _parse(file, size, wanted, marked, deadline)
    except (NotDicom, ScanError):
        raise
    except Exception as error:  # pydicom fails in many ways on damaged files; the text of what it raises quotes them
        if not marked:
            raise NotDicom("no DICOM file") from None
        raise refused("The header is damaged.", type(error).__name__, "a readable DICOM header") from None


def _parse(file: BinaryIO, size: int, wanted: list[int], marked: bool, deadline: float) -> Parsed:
    bounded: Any = BoundedFile(file, size, deadline)
    meta, inflated = Dataset(), None
    if marked:
        file.seek(132)
        meta = read_dataset(bounded, False, True, stop_when=lambda tag, _, __: tag.group != 2)
    syntax = Tags(meta, deadline).text(0x00020010)
    if syntax == DEFLATED:
        inflated = _inflate(file, deadline)
        bounded, size = BoundedFile(BytesIO(inflated), len(inflated), deadline), len(inflated)
        dataset = read_dataset(bounded, False, True, stop_when=_at_pixels, specific_tags=list(map(Tag, wanted)))
    else:
        file.seek(0)
        dataset = read_partial(bounded, stop_when=_at_pixels, force=True, specific_tags=list(map(Tag, wanted)))
        syntax = syntax or str(dataset.file_meta.get("TransferSyntaxUID", ""))
        meta = dataset.file_meta
    encoding = dataset.original_encoding
    little = encoding[1] is not False
    pixels = _find_pixels(bounded, bool(encoding[0]), little)
    if not syntax:
        syntax = "1.2.840.10008.1.2" if encoding[0] else "1.2.840.10008.1.2.1" if little else BIG_ENDIAN
    return Parsed(Tags(dataset, deadline), Tags(meta, deadline), syntax, pixels, inflated)


def _may_be_headless(begin: bytes) -> bool:
    """Whether a file without the preamble could start with an element of group 2 or 8 of a sensible length."""
    if len(begin) < 16:
        return False
    for order in "<>":
        group, element = struct.unpack(f"{order}HH", begin[:4])
        explicit = begin[4:6].isalpha() and begin[4:6].isupper()
        length = struct.unpack(f"{order}H", begin[6:8])[0] if explicit else struct.unpack(f"{order}I", begin[4:8])[0]
        if group in (2, 8) and element <= 0x1200 and length <= 1024:
            return True
    return False


def _inflate(file: BinaryIO, deadline: float) -> bytes:
    inflater, pieces, total = zlib.decompressobj(-zlib.MAX_WBITS), [], 0
    try:
        while not inflater.eof:
            compressed = inflater.unconsumed_tail or file.read(1 << 16)
            piece = inflater.decompress(compressed, 1 << 20)
            total += len(piece)
            pieces.append(piece)
            if not compressed and not piece:
                raise cut_short("a deflated data set that breaks off", "all of it")
            if total > LARGEST_INFLATED or time.monotonic() > deadline:
                raise refused("The deflated data set is absurdly large.", f"over {total} bytes", "an image")
    except zlib.error:
        raise refused("The deflated data set is damaged.", "no deflate stream", "a deflate stream") from None
    return b"".join(pieces)


def _at_pixels(tag: Any, _: str | None, __: int) -> bool:
    return int.__ge__(tag, 0x7FE00008)  # pydicom's own comparison would make a tag of the number each time


def _find_pixels(file: Any, implicit: bool, little: bool) -> PixelData | None:
    order = "<" if little else ">"
    start = file.tell()
    head = file.file.read(12)
    if len(head) < 8:
        return None
    group, element = struct.unpack(f"{order}HH", head[:4])
    tag = group << 16 | element
    if tag not in PIXEL_TAGS:
        return None
    if implicit or not head[4:6].isalpha():
        length, value = struct.unpack(f"{order}I", head[4:8])[0], start + 8
    elif len(head) == 12 and head[4:6] in (b"OB", b"OW", b"UN", b"OF", b"OD", b"OL", b"OV"):
        length, value = struct.unpack(f"{order}I", head[8:12])[0], start + 12
    else:
        length, value = struct.unpack(f"{order}H", head[6:8])[0], start + 8
    if length != _UNDEFINED:
        if value + length > file.size:
            raise cut_short(f"{file.size - value} bytes of pixels", f"{length} bytes of pixels")
        return PixelData(tag, value, length, False)
    return PixelData(tag, value, _walk_items(file, value) - value, True)


def _walk_items(file: Any, place: int) -> int:
    """The end of the last item of encapsulated pixels; each must be whole, and the delimiter there."""
    for _ in range(4 * MOST_FRAMES):
        file.seek(place)
        head = file.read(8)
        if head[:4] == _DELIMITER:
            return place
        if len(head) < 8:
            raise cut_short("compressed pixels that break off", "the end of the last fragment")
        length = struct.unpack("<I", head[4:])[0]
        if head[:4] != _ITEM or length == _UNDEFINED:
            raise refused("The compressed pixels are damaged.", "no item where one should begin", "items of fragments")
        place += 8 + length
        if place > file.size:
            raise cut_short("a fragment that goes on past the end", "whole fragments")
    raise refused("The compressed pixels are damaged.", "a huge number of fragments", "a few for each frame")
