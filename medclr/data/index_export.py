"""Pseudonymous NIfTI copies of indexed scans: voxels and their place, under names that tell nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from numpy.typing import NDArray

from medclr.data.dicom_stored import SeriesVolume
from medclr.data.dicom_volume import read_volume
from medclr.data.index_processes import deadline, in_processes, killed
from medclr.data.index_rows import Made
from medclr.data.itk_files import ITK_SUFFIXES, SimpleITKReader
from medclr.data.privacy import References, export_nifti, locate
from medclr.errors import DatalistError, ScanError
from medclr.keys import PATIENT_ID

SECONDS_A_VOLUME = 120.0


class Copy(NamedTuple):
    """A scan to copy."""

    number: int
    """Its place among the rows."""
    made: Made


def copy_names(number: int, made: Made) -> tuple[str, str | None]:
    """Where the copies of a scan and of its label lie in the folder of copies."""
    stem = f"{made.row[PATIENT_ID].replace('/', '-')}/{made.name or 'scan'}-{number:06d}"
    return f"{stem}.nii.gz", None if made.label is None else f"{stem}-label.nii.gz"


def export_scans(
    rows: Iterable[Made], root: Path, folder: Path, *, workers: int, tell: Callable[[], object] = lambda: None
) -> dict[int, ScanError]:
    """Write the copies.

    Args:
        rows: of the datalist.
        root: the indexed folder.
        folder: where copies go.
        workers: processes.
        tell: called once a scan.

    Returns:
        by the number of the row, why it has no copy.

    Raises:
        DatalistError: a copy cannot be written.
    """
    failed: dict[int, ScanError] = {}
    tasks = (Copy(number, made) for number, made in enumerate(rows))
    for copy, problem in in_processes(partial(_copy_one, root, folder), tasks, workers=workers, lost=_lost):
        if isinstance(problem, DatalistError):
            raise problem
        if problem is not None:
            failed[copy.number] = problem
        tell()
    return failed


def _copy_one(root: Path, folder: Path, copy: Copy) -> ScanError | DatalistError | None:
    made = copy.made
    image, label = copy_names(copy.number, made)
    try:
        with deadline(seconds=SECONDS_A_VOLUME):
            if made.volume is not None:
                resolve = References().resolve
                voxels, affine = read_volume(SeriesVolume.from_json(made.volume), lambda path: root / resolve(path))
            else:
                voxels, affine = _load(Path(locate(root / str(made.file))))
            export_nifti(voxels, affine, folder / image)
            if label is not None:
                export_nifti(*_load(Path(locate(root / str(made.label)))), folder / label)
    except (ScanError, DatalistError) as error:
        return error
    except Exception as error:  # readers raise many kinds, and their texts hold paths
        return ScanError(
            "The scan cannot be copied.",
            got=type(error).__name__,
            wanted="a file that has not changed since it was indexed",
            fix="Index the folder again.",
        )
    return None


def _load(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    if path.name.lower().endswith(ITK_SUFFIXES):
        reader = SimpleITKReader()
        voxels, meta = reader.get_data(reader.read(path))
        affine = meta["affine"]
    else:
        image = nibabel.load(path)
        voxels, affine = np.asanyarray(image.dataobj), np.asarray(image.affine)
        voxels = voxels.reshape(voxels.shape[:3])
    if voxels.dtype.kind in "iu" and voxels.dtype.itemsize == 8:
        fits = voxels.min() >= np.iinfo(np.int32).min and voxels.max() <= np.iinfo(np.int32).max
        voxels = voxels.astype(np.int32 if fits else np.float64)
    return (voxels.astype(np.float32) if voxels.dtype == np.float64 else voxels), affine


def _lost(_: Copy) -> ScanError:
    return killed()
