"""Siemens mosaics: one image that holds the slices of a volume as tiles.

The tags of a mosaic say where a slice as large as the whole image would lie; how many tiles there are, and in which
direction they follow, stands in Siemens' own headers only. A mosaic is unfolded where these agree with each other.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medclr.data.dicom_bounds import refused
from medclr.data.dicom_frames import Frame
from medclr.data.dicom_tags import Tags
from medclr.errors import ScanError

GAP, CREATORS = 0x00180088, range(0x10, 0x20)
WANTED: Final = [
    GAP,
    *(0x00190000 | block for block in CREATORS),
    *(0x00190000 | block << 8 | 0x0A for block in CREATORS),
    *(0x00290000 | block for block in CREATORS),
    *(0x00290000 | block << 8 | low for block in CREATORS for low in (0x10, 0x20)),
]
MOST_TILES: Final = 1024
_CSA_NAMES = ("NumberOfImagesInMosaic", "SliceNormalVector", "ProtocolSliceNumber")
_LINE = re.compile(
    rb"sSliceArray\.(?:asSlice\[(\d{1,4})\]\.(sPosition|sNormal)\.d(Sag|Cor|Tra)|(lSize)|(ucImageNumb\w{3}))"
    rb"\s*=\s*([-+.\deExXa-fA-F]{1,30})"
)


class Mosaic(NamedTuple):
    """How the tiles of a mosaic lie."""

    tiles: int
    """Number of slices; they fill the image by rows."""
    side: int
    """Tiles along each side of the image."""
    rows: int
    columns: int
    """Of one slice."""
    position: tuple[float, ...]
    """(3,) centre of the first pixel of the first slice, in patient coordinates."""
    step: tuple[float, ...]
    """(3,) from one slice to the next, in millimetres."""


def is_mosaic(image_type: list[str], tags: Tags) -> bool:
    """Whether an image says that it is a mosaic."""
    return "MOSAIC" in image_type or (_private(tags, 0x0019, "SIEMENS MR HEADER", 0x0A).integer("US") or 0) > 1


def mosaic_of(tags: Tags, frame: Frame, rows: int, columns: int) -> Mosaic:
    """How a mosaic unfolds.

    Args:
        tags: the header, with Siemens' private elements.
        frame: what its tags say of the image as a whole.
        rows, columns: of the whole image.

    Raises:
        ScanError: number, direction or distance of the slices is not known, or is contradicted.
    """
    image = _csa(_private(tags, 0x0029, "SIEMENS CSA HEADER", 0x10).value)
    protocol = _protocol(_private(tags, 0x0029, "SIEMENS CSA HEADER", 0x20).value or _loose(tags))
    counts = {
        count
        for count in (
            _private(tags, 0x0019, "SIEMENS MR HEADER", 0x0A).integer("US"),
            _integer(image.get("NumberOfImagesInMosaic")),
            protocol.size,
        )
        if count
    }
    if len(counts) != 1:
        got = "several numbers of slices" if counts else "no number of slices"
        raise _unreliable(got, "one number of slices in NumberOfImagesInMosaic and the protocol")
    tiles = counts.pop()
    side = math.ceil(math.sqrt(tiles)) if 1 <= tiles <= MOST_TILES else 0
    if not side or rows % side or columns % side:
        raise _unreliable("tiles that do not fill the image", "equal tiles")
    if frame.position is None or frame.orientation is None or frame.spacing is None:
        raise _unreliable("no position, orientation or spacing", "all three")
    gap = tags.number(GAP)
    if gap is None or not 0.01 <= gap <= 100:
        raise _unreliable("no SpacingBetweenSlices", "the distance of the slices")
    backwards = bool(_integer(image.get("ProtocolSliceNumber"))) or protocol.backwards

    axes = np.array(frame.orientation).reshape(2, 3)
    normal = np.cross(axes[0], axes[1])
    offset = [(columns - columns // side) / 2 * frame.spacing[1], (rows - rows // side) / 2 * frame.spacing[0]]
    first = np.array(frame.position) + offset @ axes
    signs = set()
    stated = np.array(image.get("SliceNormalVector") or [], dtype=float)
    if stated.shape == (3,) and np.abs(stated).max() > 0:
        signs.add(_sign(stated, normal))
    middle = first + [columns // side / 2 * frame.spacing[1], rows // side / 2 * frame.spacing[0]] @ axes
    run = _run_of(protocol, middle, max(frame.spacing), gap)
    if run is not None:
        signs.add(_sign(run, normal))
    if backwards and run is None:
        raise _unreliable("slices that are numbered backwards", "a protocol that says where they lie")
    if len(signs) != 1:
        raise _unreliable("no one direction of the slices", "a SliceNormalVector, or a protocol, along the normal")
    step = normal / np.linalg.norm(normal) * gap * signs.pop()
    return Mosaic(tiles, side, rows // side, columns // side, tuple(first.tolist()), tuple(step.tolist()))


def _run_of(protocol: _Protocol, middle: NDArray[np.float64], pixel: float, gap: float) -> NDArray[np.float64] | None:
    """The direction of the tiles, from the place in the protocol at which the centre of the first tile lies.

    The protocol lists its slices in one order, and images may be numbered in the other. None where the first tile lies
    at neither end, as after a correction of motion.
    """
    places = protocol.positions
    if places is None or len(places) < 2:
        return None
    run = places[-1] - places[0]
    length = float(np.linalg.norm(run))
    if abs(length / (len(places) - 1) - gap) > 0.02 * gap:
        raise _unreliable("a protocol with other gaps than SpacingBetweenSlices", "one distance")
    ends = [float(np.linalg.norm(middle - place)) for place in (places[0], places[-1])]
    if min(ends) > pixel + 0.4 * gap or max(ends) < 2 * min(ends):
        return None
    return run / length if ends[0] < ends[1] else -run / length


def _sign(direction: NDArray[np.float64], normal: NDArray[np.float64]) -> int:
    along = float(direction @ normal)
    if not 0.995 < abs(along) < 1.005:
        raise _unreliable("slices that do not follow the normal of the image", "slices along it")
    return 1 if along > 0 else -1


class _Value(NamedTuple):
    tags: Tags
    tag: int

    @property
    def value(self) -> bytes:
        return self.tags.raw(self.tag)[1]

    def integer(self, vr: str) -> int | None:
        return self.tags.integer(self.tag, vr) if self.tag else None


def _private(tags: Tags, group: int, creator: str, low: int) -> _Value:
    """A private element, in whichever block its creator has reserved."""
    for block in CREATORS:
        if tags.text(group << 16 | block) == creator:
            return _Value(tags, group << 16 | block << 8 | low)
    return _Value(tags, 0)


def _loose(tags: Tags) -> bytes:
    """The series header where anonymisation removed the name of the block's owner."""
    value = tags.raw(0x00291020)[1]
    return value if value[:4] == b"SV10" and 0x00290010 not in tags else b""


def _csa(value: bytes) -> dict[str, list[float]]:
    """The numbers of a CSA header that matter here; nothing where it is damaged."""
    if not value or len(value) > 1 << 22:
        return {}
    found: dict[str, list[float]] = {}
    try:
        start = 16 if value[:4] == b"SV10" else 8
        number = struct.unpack("<I", value[start - 8 : start - 4])[0]
        for _ in range(min(number, 1024)):
            name = value[start : start + 64].split(b"\0")[0].decode("latin-1")
            items = struct.unpack("<I", value[start + 76 : start + 80])[0]
            start += 84
            texts = []
            for _ in range(min(items, 4096)):
                size = struct.unpack("<I", value[start : start + 4])[0]
                if size > len(value):
                    return {}
                texts.append(value[start + 16 : start + 16 + size].split(b"\0")[0].strip())
                start += 16 + (size + 3) // 4 * 4
            if name in _CSA_NAMES:
                found[name] = [float(text) for text in texts if text]
    except (ValueError, struct.error):
        return {}
    return found


def _integer(values: list[float] | None) -> int | None:
    return int(values[0]) if values and math.isfinite(values[0]) else None


class _Protocol(NamedTuple):
    size: int | None
    positions: NDArray[np.float64] | None
    """(N, 3) centres of the slices."""
    backwards: bool
    """Whether the images are numbered against the order of this list."""


def _protocol(value: bytes) -> _Protocol:
    """The slices that the measurement protocol lists, from the last ASCCONV block."""
    start = value.rfind(b"### ASCCONV BEGIN")
    if start < 0:
        return _Protocol(None, None, False)
    end = value.find(b"### ASCCONV END", start)
    text = value[start : end if end > 0 else len(value)]
    size, backwards = None, False
    places: dict[int, dict[bytes, float]] = {}
    for index, kind, axis, is_size, order, number in _LINE.findall(text):
        try:
            if is_size:
                size = int(number, 0)
            elif order:
                backwards = backwards or int(number, 0) != 0
            elif kind == b"sPosition":
                places.setdefault(int(index), {})[axis] = float(number)
        except ValueError:
            continue
    if size is None or not 1 < size <= MOST_TILES:
        return _Protocol(size, None, backwards)
    listed = [[places.get(k, {}).get(axis, 0.0) for axis in (b"Sag", b"Cor", b"Tra")] for k in range(size)]
    return _Protocol(size, np.array(listed), backwards)


def _unreliable(got: str, wanted: str) -> ScanError:
    return refused("The Siemens mosaic cannot be unfolded safely.", got, wanted, "Convert it with the vendor's tools.")
