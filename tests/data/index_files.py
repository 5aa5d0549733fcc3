"""Small DICOM series for the tests of indexing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

ROOT_UID = "1.2.826.0.1.3680043.8.498"


def save_series(
    folder: Path, number: int, *, slices: int = 4, seed: int | None = None, start: int = 0, **tags: Any
) -> list[Path]:
    """Write ``slices`` CT slices of 8 x 9 pixels, 2 mm apart, as ``0.dcm``, ... or as ``tags["names"]`` says.

    Args:
        folder: new or not.
        number: makes the UIDs of study and series.
        slices: how many.
        seed: of the pixels; by default the number.
        start: of the first name.
        tags: elements by keyword, in place of the usual ones; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = tags.pop("names", "{}.dcm")
    pixels = np.random.default_rng(number if seed is None else seed).integers(0, 2000, (slices, 9, 8)).astype(np.int16)
    paths = []
    for place in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = UID(f"{ROOT_UID}.{number}.{place + 1}")
        path = folder / names.format(place + start)
        data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
        values = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "SeriesInstanceUID": f"{ROOT_UID}.{number}.0.1",
            "StudyInstanceUID": f"{ROOT_UID}.{number}.0.2",
            "PatientID": f"ID{number:04d}",
            "PatientName": f"Quux^Zelda{number}",
            "PatientBirthDate": "19600101",
            "PatientSex": "F",
            "StudyDate": "20200101",
            "Modality": "CT",
            "Manufacturer": "Maker",
            "ManufacturerModelName": "Model",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "InstanceNumber": place + 1,
            "ImagePositionPatient": [0, 0, 2 * place],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [1.5, 1.5],
            "SliceThickness": 2,
            "Rows": 9,
            "Columns": 8,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
            "RescaleSlope": 1,
            "RescaleIntercept": 0,
            **tags,
        }
        for keyword, value in values.items():
            if value is not None:
                setattr(data, keyword, value)
        data.PixelData = pixels[place].tobytes()
        data.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
