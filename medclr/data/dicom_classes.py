"""Which DICOM images can be slices of a volume; the others are left out with the reason."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from medclr.data.dicom_bounds import refused
from medclr.data.dicom_frames import IMAGE_TYPE
from medclr.data.dicom_header import DicomHeader
from medclr.data.nifti import MAX_SPACING_MM, MIN_SPACING_MM
from medclr.errors import ScanError

_STORAGE = "1.2.840.10008.5.1.4.1.1."
LEFT_OUT: Final = {
    f"{_STORAGE}7": "a secondary capture",
    f"{_STORAGE}3": "ultrasound frames in time",
    f"{_STORAGE}3.1": "ultrasound frames in time",
    f"{_STORAGE}6": "an ultrasound image",
    f"{_STORAGE}6.1": "an ultrasound image",
    f"{_STORAGE}1": "a radiograph",
    f"{_STORAGE}1.1": "a radiograph",
    f"{_STORAGE}12.1": "an angiogram",
    f"{_STORAGE}12.2": "a fluoroscopy",
    f"{_STORAGE}20": "a nuclear medicine image without slice positions",
    f"{_STORAGE}66.4": "a segmentation",
    f"{_STORAGE}66.7": "a segmentation",
    f"{_STORAGE}30": "a parametric map",
    f"{_STORAGE}481.1": "a radiotherapy image",
    f"{_STORAGE}481.2": "a radiotherapy dose",
    f"{_STORAGE}4.3": "a colour image",
    f"{_STORAGE}4.2": "spectroscopy",
}
_PREFIXES: Final = {
    f"{_STORAGE}7.": "a secondary capture",
    f"{_STORAGE}1.1.": "a radiograph",
    f"{_STORAGE}77.": "a photograph or a microscopy",
    f"{_STORAGE}88.": "a report",
    f"{_STORAGE}104.": "a document",
    f"{_STORAGE}11.": "a presentation state",
}
_LOCALIZERS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"}
_PROJECTIONS = {"PROJECTION IMAGE", "MIP", "MAX_IP", "MIN_IP", "PROJECTION", "VOLUME_RENDER", "SCREEN SAVE"}
_GREY = {"MONOCHROME1", "MONOCHROME2", ""}


def left_out(header: DicomHeader) -> ScanError | None:
    """Why a file cannot be part of a volume, or None."""
    kind = LEFT_OUT.get(header.sop_class) or next(
        (kind for prefix, kind in _PREFIXES.items() if header.sop_class.startswith(prefix)), None
    )
    if kind:
        return refused("The image is no slice of a volume.", kind, "CT, MR, PET or the like")
    if header.modality in ("SR", "PR", "KO", "SEG", "RTDOSE", "RTIMAGE"):
        return refused("The image is no slice of a volume.", f"Modality {header.modality}", "CT, MR, PET or the like")
    if header.samples != 1 or header.photometric not in _GREY:
        return refused("The image is in colour.", "several samples a pixel, or a palette", "grey values")
    words = {word.upper() for word in header.image_type}
    for frame in header.frames:
        words.update(str(frame.keys.get(IMAGE_TYPE, "")).upper().split("\\"))
    if words & _LOCALIZERS:
        return refused("The image is a localizer.", "ImageType says so", "slices of a volume")
    if words & _PROJECTIONS:
        return refused("The image is a projection.", "ImageType says so", "slices of a volume")
    if header.unusable is not None:
        return refused(
            header.unusable[0], header.unusable[1], header.unusable[2], "Convert it with the vendor's tools."
        )
    if header.bits[0] not in (8, 16, 32) and not (header.pixels and header.pixels.tag == 0x7FE00009):
        return refused("The pixels' type is not supported.", f"{header.bits[0]} bits", "8, 16 or 32 bits")
    places = dict.fromkeys((frame.position, frame.orientation, frame.spacing) for frame in header.frames)
    return next(filter(None, map(_unplaced, places)), None)


def _unplaced(place: tuple[Any, Any, Any]) -> ScanError | None:
    """Against a frame's position, orientation and spacing."""
    position, orientation, spacing = place
    missing = [
        name
        for name, value in zip(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"), place, strict=True)
        if value is None
    ]
    if missing:
        got = f"no readable {' and no '.join(missing)}"
        return refused("The place of the image is not known.", got, "position, orientation and spacing")
    if max(map(abs, position)) > 1e5:
        return refused("The position of the image is absurd.", "more than 100 m", "millimetres")
    if not all(MIN_SPACING_MM <= length <= MAX_SPACING_MM for length in spacing):
        wanted = f"{MIN_SPACING_MM} to {MAX_SPACING_MM} mm"
        return refused("The pixel spacing is absurd.", "PixelSpacing out of range", wanted)
    axes = np.array(orientation).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 3e-3 or abs(float(axes[0] @ axes[1])) > 3e-3:
        got = "directions that are not at right angles, or not of length 1"
        return refused("The orientation of the image is unusable.", got, "ImageOrientationPatient of unit vectors")
    return None
