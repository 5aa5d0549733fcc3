"""Synthetic DICOM files of known geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from medclr.data.dicom_header import DicomHeader, NotDicom, read_header
from medclr.data.dicom_series import SeriesVolume, volumes_of
from medclr.data.dicom_volume import read_volume
from medclr.errors import ScanError

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SERIES_UID, FRAME_UID = generate_uid(entropy_srcs=["series"]), generate_uid(entropy_srcs=["frame"])
SPACING = (0.8, 0.6, 2.5)
"""Millimetres along x, y and z."""
ORIGIN = (-20.0, 11.0, 35.0)

Change = Callable[[Dataset, int], None]


def anatomy(shape: tuple[int, int, int] = (9, 7, 6), seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(0, 2000, shape, dtype=np.int16)


def blank(pixels: NDArray[Any], sop_class: str = MR) -> Dataset:
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = UID(sop_class)
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.Modality = "CT" if sop_class == CT else "MR"
    image.PatientID, image.PatientName = "made up", "Nobody^At All"
    image.SeriesInstanceUID, image.FrameOfReferenceUID = SERIES_UID, FRAME_UID
    image.ImageType = ["ORIGINAL", "PRIMARY"]
    image.Rows, image.Columns = pixels.shape[-2:]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = pixels.dtype.itemsize * 8
    image.BitsStored, image.HighBit = image.BitsAllocated, image.BitsAllocated - 1
    image.PixelRepresentation = int(pixels.dtype.kind == "i")
    image.PixelData = pixels.tobytes()
    image["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    return image


def write_stack(
    folder: Path,
    voxels: NDArray[Any],
    *,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = ORIGIN,
    step: Sequence[float] | None = None,
    spacing: Sequence[float] = SPACING,
    sop_class: str = MR,
    change: Change | None = None,
    name: str = "slice",
    first: int = 1,
) -> list[Path]:
    """One file a slice of voxels (X, Y, Z); ``step`` is the way to the next slice, by default along the normal."""
    axes = np.array(orientation, dtype=float).reshape(2, 3)
    way = np.cross(*axes) * spacing[2] if step is None else np.array(step)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for z in range(voxels.shape[2]):
        image = blank(np.ascontiguousarray(voxels[:, :, z].T), sop_class)
        image.ImagePositionPatient = [float(f"{value:.6f}") for value in origin + z * way]
        image.ImageOrientationPatient = [float(f"{value:.8f}") for value in orientation]
        image.PixelSpacing = [spacing[1], spacing[0]]
        image.InstanceNumber = z + first
        if change:
            change(image, z)
        paths.append(folder / f"{name}_{z:03d}")
        image.save_as(paths[-1], enforce_file_format=True)
    return paths


def expected_affine(
    orientation: Sequence[float] = AXIAL, origin: Sequence[float] = ORIGIN, spacing: Sequence[float] = SPACING
) -> NDArray[np.float64]:
    axes = np.array(orientation, dtype=float).reshape(2, 3)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([axes[0], axes[1], np.cross(*axes)], axis=1) * spacing
    affine[:3, 3] = origin
    return np.diag([-1.0, -1, 1, 1]) @ affine


def write_enhanced(path: Path, frames: Sequence[tuple[NDArray[Any], Dataset]], shared: Dataset | None = None) -> Path:
    """An enhanced MR file of (rows, columns) frames with their functional groups."""
    image = blank(np.stack([pixels for pixels, _ in frames]), ENHANCED_MR)
    image.NumberOfFrames = len(frames)
    image.PerFrameFunctionalGroupsSequence = Items([group for _, group in frames])
    image.SharedFunctionalGroupsSequence = Items([shared or Dataset()])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(path, enforce_file_format=True)
    return path


def macro(**values: Any) -> Dataset:
    item = Dataset()
    for key, value in values.items():
        setattr(item, key, value)
    return item


def placed(position: Sequence[float], **content: Any) -> Dataset:
    """Functional groups of a frame at a position."""
    group = Dataset()
    group.PlanePositionSequence = Items([macro(ImagePositionPatient=[float(value) for value in position])])
    group.FrameContentSequence = Items([macro(**content)])
    return group


def shared_groups(spacing: Sequence[float] = SPACING, orientation: Sequence[float] = AXIAL) -> Dataset:
    group = Dataset()
    group.PlaneOrientationSequence = Items([macro(ImageOrientationPatient=list(orientation))])
    group.PixelMeasuresSequence = Items([macro(PixelSpacing=[spacing[1], spacing[0]])])
    return group


def dimension(tag: int) -> Dataset:
    item = Dataset()
    item.DimensionIndexPointer = Tag(tag)
    return item


def headers_in(folder: Path) -> tuple[list[DicomHeader], dict[str, ScanError]]:
    """Headers of all files below a folder, and the reasons against files."""
    headers, refusals = [], {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        try:
            if path.is_file():
                headers.append(read_header(path, name))
        except ScanError as error:
            refusals[name] = error
        except NotDicom:
            continue
    return headers, refusals


def volumes_in(folder: Path) -> tuple[list[SeriesVolume], dict[str, ScanError]]:
    headers, refusals = headers_in(folder)
    volumes, more = volumes_of(headers)
    return volumes, refusals | more


def voxels_of(folder: Path, volume: SeriesVolume) -> tuple[NDArray[Any], NDArray[np.float64]]:
    return read_volume(volume, lambda path: folder / path)
