"""Reading a DICOM volume from the slices that a series file lists, also by MONAI's ``LoadImage``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from monai.data.image_reader import ImageReader
from numpy.typing import NDArray

from medclr.data.dicom_bounds import refused
from medclr.data.dicom_geometry import TO_RAS, sheared
from medclr.data.dicom_header import DicomHeader, NotDicom, read_parsed
from medclr.data.dicom_parse import DEFLATED
from medclr.data.dicom_pixels import Pixels, rescaled, tile
from medclr.data.dicom_stored import SeriesVolume, bad_series_file
from medclr.data.privacy_map import has_reference, locate
from medclr.data.rows import SERIES_SUFFIX
from medclr.disk import replacing
from medclr.errors import ScanError

ROOT: Final = "root"
"""Key of a series file: the folder of its slices, relative to the file's own."""
LARGEST_SERIES_FILE: Final = 1 << 26
_TOLERANCE_MM = 0.05


def read_volume(
    volume: SeriesVolume, locate: Callable[[str], Path | str], headers: Mapping[str, DicomHeader] | None = None
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels (X, Y, Z) as ``int16`` or ``float32``, and the affine (4, 4) to millimetres (RAS+).

    Each file's header is looked at again: a slice that is no longer what was indexed is refused.

    Args:
        volume: its slices in order.
        locate: from a slice's path to the file.
        headers: by path, those that were read just now, and need not be read again.

    Raises:
        ScanError: a slice is missing, damaged, or has changed.
    """
    voxels = np.empty(volume.shape, dtype=volume.dtype, order="F")
    wanted: dict[str, list[tuple[int, int | None]]] = {}
    for z, (path, place) in enumerate(volume.slices):
        wanted.setdefault(path, []).append((z, place))
    stack: list[NDArray[Any]] | None = [np.empty((0, 0))] * volume.shape[2] if volume.shift != (0.0, 0.0) else None
    for path, places in wanted.items():
        file = Path(locate(path))
        header, inflated = (headers or {}).get(path), None
        if header is None or header.syntax == DEFLATED:
            try:
                header, parsed = read_parsed(file, path, private=False)
            except NotDicom:
                raise _changed("another kind of file") from None
            inflated = parsed.inflated
        pixels = Pixels(file, header, inflated)
        whole = pixels.frame(0) if volume.side else None
        for z, place in places:
            _check(volume, header, z, place)
            frame = header.frames[place or 0] if not volume.side else header.frames[0]
            stored = pixels.frame(place or 0) if whole is None else tile(whole, volume.side, place or 0)
            values = rescaled(stored, frame.slope, frame.intercept, volume.dtype).T
            if stack is not None:
                stack[z] = values
            else:
                voxels[:, :, z] = values
    if stack is not None:
        fill = min(float(values.min()) for values in stack)
        for z, values in enumerate(stack):
            place_xy = (volume.start[0] + z * volume.shift[0], volume.start[1] + z * volume.shift[1])
            lowest = (max(0.0, place_xy[0]), max(0.0, place_xy[1]))  # a rounding below 0 is none
            voxels[:, :, z] = sheared(values, lowest, (volume.shape[0], volume.shape[1]), fill)
    return voxels, volume.affine.copy()


def _check(volume: SeriesVolume, header: DicomHeader, z: int, place: int | None) -> None:
    """Refuse a slice that is not the one which was indexed, by size and place."""
    if volume.side:
        tiles = header.mosaic
        if tiles is None or tiles.side != volume.side or not 0 <= (place or 0) < tiles.tiles:
            raise _changed("another kind of image")
        position = np.array(tiles.position) + (place or 0) * np.array(tiles.step)
        size = (tiles.columns, tiles.rows)
    else:
        if not 0 <= (place or 0) < len(header.frames):
            raise _changed("fewer frames")
        if header.frames[place or 0].position is None:
            raise _changed("no position")
        position = np.array(header.frames[place or 0].position)
        size = (header.columns, header.rows)
    room = [volume.shape[axis] - size[axis] for axis in (0, 1)]
    if header.samples != 1 or (min(room) < 0 if volume.shift != (0.0, 0.0) else room != [0, 0]):
        raise _changed("another size")
    lies = [volume.start[axis] + z * volume.shift[axis] for axis in (0, 1)]
    meant = volume.affine @ np.array([*lies, z, 1.0])
    if np.abs(TO_RAS @ position - meant[:3]).max() > max(_TOLERANCE_MM, 0.2 * min(volume.spacing)):
        raise _changed("another position")


def write_series(volume: SeriesVolume, path: str | os.PathLike[str], root: str | os.PathLike[str]) -> None:
    """Write a series file, whole or not at all.

    Args:
        volume: its slices are relative to ``root``.
        path: the file, which should end in ``.dcmseries``.
        root: the folder of the slices; noted relative to the file's folder.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    content = json.loads(volume.to_json())
    content[ROOT] = os.path.relpath(os.path.abspath(root), os.path.abspath(target.parent)).replace(os.sep, "/")
    with replacing(target) as file:
        file.write((json.dumps(content, allow_nan=False) + "\n").encode())


def read_series(path: str | os.PathLike[str]) -> tuple[SeriesVolume, Path]:
    """The volume that a series file lists, and the folder of its slices.

    Raises:
        ScanError: the file cannot be read, or is no series file.
    """
    target = Path(path)
    try:
        if target.stat().st_size > LARGEST_SERIES_FILE:
            raise bad_series_file("an absurdly large file")
        text = target.read_text(encoding="utf-8")
        root = json.loads(text)[ROOT]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise bad_series_file(type(error).__name__) from None
    if not isinstance(root, str):
        raise bad_series_file("no root")
    return SeriesVolume.from_json(text), Path(os.path.normpath(target.parent.absolute() / root))


def inside(root: Path, path: str, resolve: Callable[[str], str] | None = None) -> Path:
    """The file of a slice.

    Args:
        root: the folder of the slices.
        path: as the series file has it.
        resolve: from a path whose parts may hide names to the real one; the root is part of it.

    Raises:
        ScanError: it leads outside of ``root``, also by a link.
    """
    joined = os.path.join(root, path)
    full = os.path.realpath(joined if resolve is None else os.fspath(resolve(joined)))
    if os.path.isabs(path) or ".." in Path(path).parts or not full.startswith(os.path.join(os.path.realpath(root), "")):
        raise refused("A slice lies outside of its folder.", "a path that leads out", "files below the root")
    return Path(full)


class DicomVolumeReader(ImageReader):
    """Reads series files (``.dcmseries``) for MONAI's ``LoadImage`` and ``LoadImaged``.

    Args:
        resolve: from the path of a slice to its real one, where parts of it hide names; by default the references of
            this user's private folder.
        **kwargs: ignored; ``LoadImage`` passes what it has for other readers.
    """

    def __init__(self, resolve: Callable[[str], str] | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.resolve = resolve

    def verify_suffix(self, filename: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> bool:
        """Whether all files are series files."""
        names = [filename] if isinstance(filename, (str, os.PathLike)) else list(filename)
        return all(os.fspath(name).lower().endswith(SERIES_SUFFIX) for name in names)

    def read(self, data: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], **kwargs: Any) -> Any:
        """The volume that each file lists, with the folder of its slices; no pixels yet."""
        names = [data] if isinstance(data, (str, os.PathLike)) else list(data)
        read = [read_series(name) for name in names]
        return read[0] if len(read) == 1 else read

    def get_data(self, img: Any) -> tuple[NDArray[Any], dict[str, Any]]:
        """Voxels (X, Y, Z) and metadata: affine (RAS+), spacing and shape, nothing of the patient.

        Several volumes are stacked as channels in front; their shapes and affines must agree.

        Raises:
            ScanError: a slice is missing, damaged, changed or outside of its folder, or the grids differ.
        """
        listed = img if isinstance(img, list) else [img]
        arrays, affines = [], []
        for volume, root in listed:
            resolve = self.resolve or _references(volume)
            voxels, affine = read_volume(volume, partial(_located, root, resolve))
            arrays.append(voxels)
            affines.append(affine)
        if any(array.shape != arrays[0].shape for array in arrays) or not np.allclose(affines, affines[0], atol=1e-2):
            raise refused("The sequences of one scan lie on different grids.", "several shapes or affines", "one grid")
        meta = {
            "affine": affines[0],
            "original_affine": affines[0].copy(),
            "space": "RAS",
            "spatial_shape": np.asarray(arrays[0].shape),
            "spacing": np.asarray(listed[0][0].spacing),
            "original_channel_dim": float("nan") if len(arrays) == 1 else 0,
            "modality": listed[0][0].modality,
        }
        return (arrays[0] if len(arrays) == 1 else np.stack(arrays)), meta


def _located(root: Path, resolve: Callable[[str], str] | None, path: str) -> Path:
    return inside(root, path, resolve)


def _references(volume: SeriesVolume) -> Callable[[str], str] | None:
    """What resolves hidden parts of paths; None where no path has any."""
    return locate if any(has_reference(path) for path, _ in volume.slices) else None


def _changed(got: str) -> ScanError:
    return refused("A slice is not what was indexed.", got, "the same files as then", "Index the folder again.")
