"""A volume as the list of its slices: what a series file holds beside a datalist."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from medclr.errors import ScanError

FORMAT: Final = "medclr DICOM volume"
VERSION: Final = 1


@dataclass(frozen=True, eq=False)
class SeriesVolume:
    """One volume of a series; nothing of it is private but the paths."""

    slices: tuple[tuple[str, int | None], ...]
    """Files relative to the root, from first to last along z, each with its frame or tile from 0, or None."""
    affine: NDArray[np.float64]
    """(4, 4) voxel to millimetres (right, anterior, superior)."""
    shape: tuple[int, int, int]
    """Voxels along x (columns), y (rows) and z (slices)."""
    spacing: tuple[float, float, float]
    """Millimetres."""
    modality: str
    sequence: str | None
    scanner: str | None
    dtype: str
    """``int16`` or ``float32``."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Pixels (x, y) by which each slice is moved further than the one before, to straighten a tilted stack."""
    start: tuple[int, int] = (0, 0)
    """Pixel (x, y) at which the first slice lies."""
    side: int = 0
    """Tiles along a side where the slices are tiles of a mosaic, else 0."""
    told_by: tuple[tuple[str, str], ...] = ()
    """What tells it from other volumes of the series, as name and value."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeriesVolume) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.slices)

    def to_json(self) -> str:
        """JSON text; :meth:`from_json` gives the same volume."""
        content = {**vars(self), "affine": self.affine.tolist()}
        return json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=None, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SeriesVolume:
        """The volume of a series file; further keys are ignored.

        Raises:
            ScanError: it is no series file, or one that is damaged.
        """
        try:
            return cls._of(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise bad_series_file(type(error).__name__) from None

    @classmethod
    def _of(cls, content: dict[str, Any]) -> SeriesVolume:
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError("another format")
        affine = np.array(content["affine"], dtype=np.float64)
        shape, spacing = tuple(map(int, content["shape"])), tuple(map(float, content["spacing"]))
        slices = tuple((str(path), None if place is None else int(place)) for path, place in content["slices"])
        usable = affine.shape == (4, 4) and np.isfinite(affine).all() and content["dtype"] in ("int16", "float32")
        if not usable or len(shape) != 3 or len(spacing) != 3 or len(slices) != shape[2] or min(shape) < 1:
            raise ValueError("contradictions")
        shift, start = tuple(map(float, content["shift"])), tuple(map(int, content["start"]))
        if len(shift) != 2 or len(start) != 2 or not all(map(math.isfinite, shift)):
            raise ValueError("contradictions")
        return cls(
            slices,
            affine,
            (shape[0], shape[1], shape[2]),
            (spacing[0], spacing[1], spacing[2]),
            str(content["modality"]),
            content["sequence"],
            content["scanner"],
            content["dtype"],
            (shift[0], shift[1]),
            (start[0], start[1]),
            int(content["side"]),
            tuple((str(name), str(value)) for name, value in content["told_by"]),
        )


def bad_series_file(got: str) -> ScanError:
    """The error for a file that lists no volume."""
    return ScanError(
        "The series file is unreadable.",
        got=got,
        wanted="a file that medclr index wrote",
        fix="Index the folder again.",
    )
