"""From the places of slices to the grid of their volume: no even, right-angled stack is straightened or refused.

With a tilted gantry the table moves aslant to the slices. Such a stack is sheared: each slice is moved within its own
plane, by a shift that grows evenly from slice to slice, until all lie on a grid at right angles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medclr.data.dicom_bounds import refused
from medclr.data.dicom_groups import EVEN, LEAST_SLICES, ROUNDING_MM, Slice, along, is_even, repeats
from medclr.data.nifti import MAX_SPACING_MM, MIN_SPACING_MM

STRAIGHT: Final = 0.1
"""Share of a pixel that the last slice may lie aside of the first; more is straightened."""
MOST_TILT: Final = 45.0
"""Degrees."""
MOST_VOXELS: Final = 1 << 29
TO_RAS: Final = np.diag([-1.0, -1.0, 1.0])


class Grid(NamedTuple):
    """The grid of a volume."""

    affine: NDArray[np.float64]
    """(4, 4) voxel to millimetres (right, anterior, superior)."""
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    shift: tuple[float, float]
    """Pixels along x and y by which each slice lies further than the one before; 0 for a straight stack."""
    start: tuple[int, int]
    """Pixel (x, y) of the grid at which the first slice lies, before its shift."""


def grid_of(slices: Sequence[Slice]) -> Grid:
    """The grid of slices sorted along their normal.

    Raises:
        ScanError: too few, missing or repeated slices, uneven gaps, or a tilt that cannot be straightened.
    """
    number, first = len(slices), slices[0]
    places = along(slices)
    if repeats(places):
        got = f"{number} slices at fewer places, and no tag that tells them apart"
        raise refused("Slices are there twice.", got, "one slice at each place")
    if number < LEAST_SLICES:
        raise refused("A volume has fewer than three slices.", number, "at least three parallel slices")
    gaps = np.diff(places)
    if not is_even(places):
        usual = float(np.median(gaps))
        missing = round(float((gaps / usual - 1).sum())) if usual > 0 else 0
        whole = np.abs(gaps / usual - np.round(gaps / usual)).max() < 0.1 if usual > 0 else False
        problem = "Slices are missing." if whole and missing > 0 else "The gaps between slices are uneven."
        got = f"gaps from {gaps.min():.4g} to {gaps.max():.4g} mm"
        raise refused(problem, got, "one gap")
    gap = float(places[-1] - places[0]) / (number - 1)
    if not MIN_SPACING_MM <= gap <= MAX_SPACING_MM:
        raise refused("The distance of slices is absurd.", f"{gap:.4g} mm", f"{MIN_SPACING_MM} to {MAX_SPACING_MM} mm")
    axes, (row_gap, column_gap) = _axes(first), first.frame.spacing or (1.0, 1.0)
    pixel = np.array([column_gap, row_gap])
    # (N, 2) in pixels: how far each slice lies aside of the first, along x and y.
    aside = np.array([item.position - first.position for item in slices]) @ axes[:, :2] / pixel
    steps = aside[-1] / (number - 1)
    noise = np.abs(aside - np.outer(np.arange(number), steps)) * pixel
    if noise.max() > max(ROUNDING_MM, EVEN * float(pixel.min())):
        got = f"slices up to {noise.max():.3g} mm aside of a line"
        raise refused("The slices do not lie on a line.", got, "slices above each other")
    shift, start, extra = _straightened(slices, steps, pixel, gap)
    corner = first.position - axes[:, :2] @ (np.array(start) * pixel)
    affine = np.eye(4)
    affine[:3, :3] = TO_RAS @ axes * [column_gap, row_gap, gap]
    affine[:3, 3] = TO_RAS @ corner
    shape = (first.header.columns + extra[0], first.header.rows + extra[1], number)
    if math.prod(shape) > MOST_VOXELS:
        raise refused("The volume is absurdly large.", f"{math.prod(shape)} voxels", f"up to {MOST_VOXELS}")
    return Grid(affine, shape, (float(column_gap), float(row_gap), gap), shift, start)


def _axes(item: Slice) -> NDArray[np.float64]:
    """(3, 3) unit vectors along rows (x), columns (y) and the normal (z), as columns."""
    row, column = np.asarray(item.frame.orientation, dtype=np.float64).reshape(2, 3)
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return np.stack([row, column, np.cross(row, column)], axis=1)


def _straightened(
    slices: Sequence[Slice], steps: NDArray[np.float64], pixel: NDArray[np.float64], gap: float
) -> tuple[tuple[float, float], tuple[int, int], tuple[int, int]]:
    number = len(slices)
    total = steps * (number - 1)
    tilt = math.degrees(math.atan2(float(np.linalg.norm(steps * pixel)), gap))
    header = slices[0].header
    stated = abs(header.tilt or 0.0)
    if "ORIGINAL" in header.image_type and 0.5 < stated <= 90 and abs(tilt - stated) > max(1.0, 0.1 * stated):
        got = f"positions that tilt by {tilt:.3g} degrees, not by what GantryDetectorTilt says"
        raise refused("The gantry tilt contradicts the positions.", got, "one tilt")
    if np.abs(total).max() <= max(STRAIGHT, ROUNDING_MM / float(pixel.min())):
        return (0.0, 0.0), (0, 0), (0, 0)
    if tilt > MOST_TILT:
        raise refused("The stack of slices is tilted too far.", f"{tilt:.3g} degrees", f"up to {MOST_TILT:g} degrees")
    # A shift towards negative pixels makes room before the first one.
    start = tuple(math.ceil(max(0.0, -float(length)) - 1e-6) for length in total)
    extra = tuple(math.ceil(abs(float(length)) - 1e-6) for length in total)
    return (float(steps[0]), float(steps[1])), (start[0], start[1]), (extra[0], extra[1])


def sheared(frame: NDArray[np.float32], place: tuple[float, float], shape: tuple[int, int], fill: float,
            ) -> NDArray[np.float32]:  # fmt: skip
    """A slice (X, Y) moved within its plane, by linear interpolation along each axis.

    Args:
        frame: its pixels.
        place: where its first pixel lies on the grid, in pixels along x and y; at least 0.
        shape: of the grid's slice.
        fill: value outside of the frame.
    """
    moved = frame
    for axis in (0, 1):
        whole = math.floor(place[axis] + 1e-9)
        part = max(0.0, place[axis] - whole)
        long = np.full([shape[axis] if k == axis else moved.shape[k] for k in (0, 1)], fill, dtype=np.float32)
        pieces = [(whole, 1 - part), (whole + 1, part)] if part > 1e-6 else [(whole, 1.0)]
        sources = np.moveaxis(moved, axis, 0)
        target = np.moveaxis(long, axis, 0)
        if len(pieces) == 1:
            target[whole : whole + len(sources)] = sources
        else:
            inner = sources[1:] * (1 - part) + sources[:-1] * part
            target[whole + 1 : whole + len(sources)] = inner
            target[whole] = sources[0] * (1 - part) + fill * part
            if whole + len(sources) < len(target):
                target[whole + len(sources)] = sources[-1] * part + fill * (1 - part)
        moved = long
    return moved
