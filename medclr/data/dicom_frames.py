"""What a DICOM header says of each of its frames: where it lies, how its values scale, and what tells it from others.

A file of one slice has one frame; an enhanced multi-frame file has functional groups, shared or per frame (DICOM PS3.3
C.7.6.16), and each macro is looked up in the frame first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from medclr.data.dicom_bounds import refused
from medclr.data.dicom_parse import Parsed
from medclr.data.dicom_tags import Tags

Key = str | float

IMAGE_TYPE: Final = "image type"
STACK: Final = "stack"
ECHO: Final = "echo"
ECHO_TIME: Final = "echo time"
TEMPORAL: Final = "temporal position"
B_VALUE: Final = "b-value"
GRADIENT: Final = "gradient"
ACQUISITION: Final = "acquisition"
TRIGGER: Final = "trigger time"

POSITION, ORIENTATION, SPACING = 0x00200032, 0x00200037, 0x00280030
SLOPE, INTERCEPT = 0x00281053, 0x00281052
SHARED, PER_FRAME = 0x52009229, 0x52009230
_MORE: Final = {  # further elements of plain files that tell frames apart, tried in this order
    "inversion time": 0x00180082,
    "repetition time": 0x00180080,
    "flip angle": 0x00181314,
    "acquisition time": 0x00080032,
    "content time": 0x00080033,
}
_SPATIAL = {0x00209056, 0x00209057, 0x00200032, 0x00201041}
WANTED: Final = [
    POSITION, ORIENTATION, SPACING, SLOPE, INTERCEPT, SHARED, PER_FRAME, 0x00200013, 0x00080008, 0x00180086, 0x00180081,
    0x00200100, 0x00189087, 0x00189089, 0x00200012, 0x00181060, 0x00209222, *_MORE.values(),
    0x00190010, 0x0019100C, 0x00430010, 0x00431039, 0x20010010, 0x20011003,
]  # fmt: skip


class Frame(NamedTuple):
    """One frame; what the header does not say is None."""

    position: tuple[float, ...] | None
    """(3,) centre of the first pixel in millimetres, patient coordinates (left, posterior, superior)."""
    orientation: tuple[float, ...] | None
    """(6,) directions of the rows and of the columns."""
    spacing: tuple[float, ...] | None
    """(2,) millimetres between rows, and between columns."""
    slope: float | None
    intercept: float | None
    number: int
    """Instance number, or place in a multi-frame file."""
    keys: dict[str, Key]
    """What can tell apart frames of one position, by name."""


def frames_of(parsed: Parsed, number: int) -> tuple[Frame, ...]:
    """The frames of a file.

    Args:
        parsed: its header.
        number: how many it holds.

    Raises:
        ScanError: the functional groups do not fit the number of frames, or a rescale slope is no number.
    """
    tags = parsed.tags
    if PER_FRAME not in tags and SHARED not in tags:
        return (_plain(tags),) * number
    shared = tags.first(SHARED)
    groups = tags.items(PER_FRAME)
    if PER_FRAME in tags and len(groups) != number:
        got = f"{len(groups)} readable functional groups for {number} frames"
        raise refused("The functional groups do not fit the frames.", got, "one for each frame")
    pointers = [_pointer(item) for item in tags.items(0x00209222)]
    empty = groups or [shared] * number
    return tuple(_enhanced(group, shared, tags, place, pointers) for place, group in enumerate(empty))


def _pointer(item: Tags) -> int:
    """The element that a dimension of the frames counts."""
    _, value, little = item.raw(0x00209165)
    if len(value) < 4:
        return 0
    group, element = struct.unpack(f"{'<' if little else '>'}HH", value[:4])
    return int(group << 16 | element)


def _plain(tags: Tags) -> Frame:
    keys: dict[str, Key] = {}
    _put(keys, IMAGE_TYPE, "\\".join(tags.texts(0x00080008)))
    _put(keys, ECHO, tags.number(0x00180086, "IS"))
    _put(keys, ECHO_TIME, tags.number(0x00180081))
    _put(keys, TEMPORAL, tags.number(0x00200100, "IS"))
    _put(keys, B_VALUE, _b_value(tags))
    _put(keys, GRADIENT, _vector(tags.numbers(0x00189089, "FD")))
    _put(keys, ACQUISITION, tags.number(0x00200012, "IS"))
    _put(keys, TRIGGER, tags.number(0x00181060))
    for name, tag in _MORE.items():
        _put(keys, name, tags.number(tag))
    return Frame(
        _tuple(tags.numbers(POSITION), 3),
        _tuple(tags.numbers(ORIENTATION), 6),
        _tuple(tags.numbers(SPACING), 2),
        _scale(tags, SLOPE),
        _scale(tags, INTERCEPT),
        tags.integer(0x00200013) or 0,
        keys,
    )


def _enhanced(group: Tags, shared: Tags, top: Tags, place: int, pointers: list[int]) -> Frame:
    def macro(sequence: int, tag: int) -> Tags:
        found = group.first(sequence)
        return found if tag in found else shared.first(sequence)

    def number(sequence: int, tag: int, vr: str) -> float | None:
        return macro(sequence, tag).number(tag, vr)

    content = group.first(0x00209111)
    keys: dict[str, Key] = {}
    for sequence in (0x00189226, 0x00189329, 0x00189751, 0x00189504):  # MR, CT, PET and X-ray 3D frame types
        _put(keys, IMAGE_TYPE, "\\".join(macro(sequence, 0x00089007).texts(0x00089007)))
    _put(keys, STACK, content.text(0x00209056))
    _put(keys, ECHO_TIME, number(0x00189114, 0x00189082, "FD"))
    _put(keys, TEMPORAL, content.number(0x00209128, "UL"))
    diffusion = macro(0x00189117, 0x00189087)
    _put(keys, B_VALUE, diffusion.number(0x00189087, "FD"))
    _put(keys, GRADIENT, _vector(diffusion.first(0x00189076).numbers(0x00189089, "FD")))
    _put(keys, "gradient kind", macro(0x00189117, 0x00189075).text(0x00189075))
    _put(keys, ACQUISITION, content.number(0x00209156, "US"))
    _put(keys, TRIGGER, number(0x00189118, 0x00209153, "FD"))
    _put(keys, "temporal offset", number(0x00209310, 0x0020930D, "FD"))
    _put(keys, "inversion time", number(0x00189115, 0x00189079, "FD"))
    indices = content.numbers(0x00209157, "UL")
    for pointer, index in zip(pointers, indices, strict=False):
        if pointer not in _SPATIAL:
            _put(keys, f"dimension {pointer:08x}", index)
    _put(keys, "flip angle", number(0x00189112, 0x00181314, "DS"))
    transformation = 0x00289145
    return Frame(
        _tuple(macro(0x00209113, POSITION).numbers(POSITION), 3),
        _tuple(macro(0x00209116, ORIENTATION).numbers(ORIENTATION), 6),
        _tuple(macro(0x00289110, SPACING).numbers(SPACING), 2),
        _first(_scale(macro(transformation, SLOPE), SLOPE), lambda: _scale(top, SLOPE)),
        _first(_scale(macro(transformation, INTERCEPT), INTERCEPT), lambda: _scale(top, INTERCEPT)),
        place + 1,
        keys,
    )


def _b_value(tags: Tags) -> float | None:
    """The standard's b-value, else those of Siemens, GE and Philips."""
    found = tags.number(0x00189087, "FD")
    if found is None and tags.text(0x00190010) == "SIEMENS MR HEADER":
        found = tags.number(0x0019100C, "IS")
    if found is None and tags.text(0x00430010) == "GEMS_PARM_01":
        found = tags.number(0x00431039, "IS")
        found = None if found is None else math.fmod(found, 1e9)  # GE adds 10^9 to mark a computed direction
    if found is None and tags.text(0x20010010) == "Philips Imaging DD 001":
        found = tags.number(0x20011003, "FL")
    return found


def _scale(tags: Tags, tag: int) -> float | None:
    """A rescale slope or intercept; None where the header has none.

    Raises:
        ScanError: it has one that is no finite number, or a slope of 0.
    """
    if tag not in tags or not tags.raw(tag)[1].strip(b" \0"):
        return None
    number = tags.number(tag)
    if number is None or abs(number) > 1e12 or (tag == SLOPE and number == 0):
        raise refused("The rescale slope or intercept is unusable.", "no number, or 0", "finite numbers")
    return number


def _first(value: float | None, other: Callable[[], float | None]) -> float | None:
    return other() if value is None else value


def _put(keys: dict[str, Key], name: str, value: Key | None) -> None:
    if value is not None and value != "":
        keys[name] = value


def _vector(numbers: list[float]) -> str:
    return " ".join(f"{number:.4f}" for number in numbers) if len(numbers) == 3 else ""


def _tuple(numbers: list[float], length: int) -> tuple[float, ...] | None:
    return tuple(numbers) if len(numbers) == length else None
