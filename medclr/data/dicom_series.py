"""The files of one DICOM series become volumes with right geometry, or are refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from medclr.data.dicom_bounds import refused
from medclr.data.dicom_classes import left_out
from medclr.data.dicom_geometry import Grid, grid_of
from medclr.data.dicom_groups import LEAST_SLICES, Group, Slice, group_slices
from medclr.data.dicom_header import DicomHeader
from medclr.data.dicom_stored import SeriesVolume
from medclr.errors import ScanError

__all__ = ["SeriesVolume", "volumes_of"]

_INT16: Final = np.iinfo(np.int16)


def volumes_of(headers: Sequence[DicomHeader]) -> tuple[list[SeriesVolume], dict[str, ScanError]]:
    """The volumes of one series.

    Args:
        headers: of all files of one SeriesInstanceUID, in any order.

    Returns:
        the volumes, and the reason against each file that is in none of them; every path is in exactly one of the two.
    """
    refusals: dict[str, ScanError] = {}
    slices: list[Slice] = []
    volumes: list[SeriesVolume] = []
    for header in _without_repeats(sorted(headers, key=lambda header: header.path), refusals):
        reason = left_out(header)
        if reason is not None:
            refusals[header.path] = reason
        elif header.mosaic is not None:
            try:
                volumes.append(_of_mosaic(header))
            except ScanError as error:
                refusals[header.path] = error
        else:
            several = len(header.frames) > 1
            slices += [Slice(header, frame, place if several else None) for place, frame in enumerate(header.frames)]
    groups = group_slices(slices) if slices else []
    usual = max((len(group.slices) for group in groups), default=0)
    for group in groups:
        try:
            if len(group.slices) < usual and _is_cut(group, groups):
                got = f"{len(group.slices)} slices of {usual} that the other volumes of the series have"
                raise refused("Slices are missing.", got, "the same slices in each of its volumes")
            volumes.append(_of_group(group))
        except ScanError as error:
            reason = error
            if len(group.slices) < LEAST_SLICES and _turned(groups):
                got = f"{len(group.slices)} of an orientation, in a series of several"
                reason = refused("A volume has fewer than three slices.", got, "at least three parallel slices")
            for item in group.slices:
                refusals.setdefault(item.header.path, reason)
    used = {path for volume in volumes for path, _ in volume.slices}
    return _ordered(volumes), {path: error for path, error in sorted(refusals.items()) if path not in used}


def _without_repeats(headers: Iterable[DicomHeader], refusals: dict[str, ScanError]) -> list[DicomHeader]:
    """Each SOPInstanceUID once; two different images under one are both refused."""
    first: dict[str, DicomHeader] = {}
    clashing: set[str] = set()
    kept = []
    for header in headers:
        instance = header.identity.get("SOPInstanceUID", "")
        known = first.setdefault(instance, header) if instance else header
        if known is header:
            kept.append(header)
        elif _same_place(known, header):
            got = f"duplicate of {known.path}"
            refusals[header.path] = refused("The file is a duplicate.", got, "each SOPInstanceUID once")
        else:
            clashing.add(instance)
            kept.append(header)
    for header in kept:
        if header.identity.get("SOPInstanceUID", "") in clashing:
            got = "one SOPInstanceUID for images of different place or size"
            refusals[header.path] = refused("Two different images have one SOPInstanceUID.", got, "one each")
    return [header for header in kept if header.path not in refusals]


def _same_place(one: DicomHeader, other: DicomHeader) -> bool:
    same = (one.rows, one.columns, len(one.frames)) == (other.rows, other.columns, len(other.frames))
    places = [(frame.position, frame.orientation, frame.spacing) for frame in one.frames]
    return same and places == [(frame.position, frame.orientation, frame.spacing) for frame in other.frames]


def _turned(groups: Sequence[Group]) -> bool:
    orientations = {group.slices[0].frame.orientation for group in groups}
    return len(orientations) > 1


def _is_cut(group: Group, groups: Sequence[Group]) -> bool:
    """Whether another volume, told from this by the same tags, has this one's slices and more."""
    names, first = set(group.told_by), group.slices[0]
    if not names:
        return False
    own = {item.frame.position for item in group.slices}
    for other in groups:
        beside = set(other.told_by) == names and other.slices[0].frame.orientation == first.frame.orientation
        if beside and len(other.slices) > len(own) and own < {item.frame.position for item in other.slices}:
            return True
    return False


def _of_group(group: Group) -> SeriesVolume:
    first = group.slices[0].header
    scaled = {item.frame.slope is None and item.frame.intercept is None for item in group.slices}
    if len(scaled) > 1:
        got = "a rescale slope in some slices alone"
        raise refused("The slices of a volume scale differently.", got, "RescaleSlope in all of them, or in none")
    grid = grid_of(group.slices)
    return _volume(
        first,
        tuple((item.header.path, item.place) for item in group.slices),
        grid,
        "float32" if grid.shift != (0.0, 0.0) else _dtype(group.slices),
        tuple(sorted((name, str(value)) for name, value in group.told_by.items())),
    )


def _of_mosaic(header: DicomHeader) -> SeriesVolume:
    mosaic, frame = header.mosaic, header.frames[0]
    assert mosaic is not None
    if mosaic.tiles < LEAST_SLICES:
        raise refused("A volume has fewer than three slices.", mosaic.tiles, "at least three")
    tiles = [
        Slice(
            replace(header, rows=mosaic.rows, columns=mosaic.columns),
            frame._replace(position=tuple(float(a + k * b) for a, b in zip(mosaic.position, mosaic.step, strict=True))),
            k,
        )
        for k in range(mosaic.tiles)
    ]
    if tiles[0].normal @ np.array(mosaic.step) < 0:
        tiles.reverse()
    slices = tuple((header.path, item.place) for item in tiles)
    told_by = (("acquisition", str(frame.keys.get("acquisition", frame.number))),)
    return _volume(header, slices, grid_of(tiles), _dtype(tiles), told_by, side=mosaic.side)


def _volume(
    header: DicomHeader,
    slices: tuple[tuple[str, int | None], ...],
    grid: Grid,
    dtype: str,
    told_by: tuple[tuple[str, str], ...],
    side: int = 0,
) -> SeriesVolume:
    return SeriesVolume(
        slices, grid.affine, grid.shape, grid.spacing, header.modality, header.sequence, header.scanner, dtype,
        grid.shift, grid.start, side, told_by,
    )  # fmt: skip


def _dtype(slices: Iterable[Slice]) -> str:
    """``int16`` where every value that the slices could hold is one, else ``float32``."""
    for item in slices:
        allocated, stored, _ = item.header.bits
        slope, intercept = item.frame.slope, item.frame.intercept
        slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
        low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if item.header.signed else (0, 2**stored - 1)
        ends = (low * slope + intercept, high * slope + intercept)
        whole = slope == round(slope) and intercept == round(intercept) and allocated <= 16
        if not whole or min(ends) < _INT16.min or max(ends) > _INT16.max:
            return "float32"
    return "int16"


def _ordered(volumes: list[SeriesVolume]) -> list[SeriesVolume]:
    return sorted(volumes, key=lambda volume: (volume.told_by, volume.slices[0]))
