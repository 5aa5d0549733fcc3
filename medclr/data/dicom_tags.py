"""The values of raw DICOM elements, made of their bytes: what a damaged file says of its own types is not believed."""

from __future__ import annotations

import math
import struct
from io import BytesIO
from typing import Any

from pydicom.dataset import Dataset
from pydicom.filereader import read_sequence
from pydicom.tag import Tag

from medclr.data.dicom_bounds import BoundedFile

_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}


class Tags:
    """Raw elements of a data set, by tag; values that cannot be understood are absent."""

    def __init__(self, dataset: Dataset, deadline: float) -> None:
        self.dataset, self.deadline = dataset, deadline

    def __contains__(self, tag: int) -> bool:
        return Tag(tag) in self.dataset

    def raw(self, tag: int) -> tuple[str, bytes, bool]:
        """Value representation as stated, bytes, and whether they are little endian."""
        element: Any = self.dataset.get_item(Tag(tag)) if tag in self else None
        value = getattr(element, "value", None)
        if not isinstance(value, bytes):
            return "", b"", True
        return element.VR or "", value, element.is_little_endian

    def texts(self, tag: int) -> list[str]:
        """The values of a text, without padding."""
        value = self.raw(tag)[1][:4096]
        text = value.decode("latin-1").strip(" \0\t\r\n")
        return [part.strip(" \0") for part in text.split("\\")] if text else []

    def text(self, tag: int) -> str:
        """The first value of a text, else nothing."""
        return next(iter(self.texts(tag)), "")

    def numbers(self, tag: int, vr: str = "DS") -> list[float]:
        """The values of a number; an empty list where one of them is none, or is not finite.

        Args:
            tag: the element.
            vr: what the standard says that it is; the file's own word counts where it names another type of number.
        """
        stated, value, little = self.raw(tag)
        code = _NUMBERS.get(stated) or (None if stated in ("DS", "IS") else _NUMBERS.get(vr))
        try:
            if code:
                size = struct.calcsize(code)
                found = struct.unpack(
                    f"{'<' if little else '>'}{min(len(value) // size, 4096)}{code}",
                    value[: min(len(value) // size, 4096) * size],
                )
            else:
                found = tuple(float(part) for part in self.texts(tag))
        except (ValueError, struct.error):
            return []
        return list(found) if all(math.isfinite(number) for number in found) else []

    def number(self, tag: int, vr: str = "DS") -> float | None:
        """The first value of a number, else None."""
        return next(iter(self.numbers(tag, vr)), None)

    def integer(self, tag: int, vr: str = "IS") -> int | None:
        """The first value of a whole number, else None."""
        number = self.number(tag, vr)
        return int(number) if number is not None and number == int(number) else None

    def items(self, tag: int) -> list[Tags]:
        """The items of a sequence; none where it is no sequence."""
        if tag not in self:
            return []
        element: Any = self.dataset.get_item(Tag(tag))
        value = element.value
        if isinstance(value, bytes):
            file: Any = BoundedFile(BytesIO(value), len(value), self.deadline)
            try:
                value = read_sequence(file, element.is_implicit_VR, element.is_little_endian, len(value), "latin-1")
            except (OSError, struct.error, ValueError, KeyError, AttributeError, TypeError):
                return []
        if not hasattr(value, "__iter__") or isinstance(value, str):
            return []
        return [Tags(item, self.deadline) for item in value if isinstance(item, Dataset)]

    def first(self, tag: int) -> Tags:
        """The first item of a sequence, else an item that holds nothing."""
        return next(iter(self.items(tag)), Tags(Dataset(), self.deadline))
