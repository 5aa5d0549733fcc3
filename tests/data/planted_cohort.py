"""A made-up export whose every place for a name, an id, a date, an address or free text holds a value of its own."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1DicomExtension, Nifti1Extension
from numpy.typing import NDArray
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage
from scipy.ndimage import gaussian_filter

MARKER = "Zqxjkvwy"
"""In every planted text; nothing else has these letters in a row."""
NUMBER = "77391042"
"""In every planted number."""
UID_ROOT = "1.2.826.0.1.3680043.8.498.77391044215"
TEXT_GROUPS = (0x0008, 0x0010, 0x0012, 0x0018, 0x0020, 0x0028, 0x0032, 0x0038, 0x0040, 0x0088, 0x4000, 0x4008)
LENGTHS = {"PN": 60, "LO": 60, "SH": 16, "ST": 200, "LT": 200, "UT": 200, "UC": 60, "AE": 16, "UR": 60}
TECHNICAL = {
    *("Manufacturer", "ManufacturerModelName", "TimezoneOffsetFromUTC", "PatientAge", "BurnedInAnnotation"),
    *("PatientBirthDateInAlternativeCalendar", "PatientDeathDateInAlternativeCalendar", "MagneticFieldStrength"),
}
"""Of these a row may tell, or they have a form of their own."""


@dataclass
class Planted:
    """What was planted."""

    dates: list[date] = field(default_factory=list)
    count: int = 0

    def text(self) -> str:
        """A new text, of twelve letters."""
        self.count += 1
        digits = [self.count // 26**power % 26 for power in (3, 2, 1, 0)]
        return MARKER + "".join(string.ascii_lowercase[digit] for digit in digits)

    def number(self) -> str:
        """A new number of twelve digits."""
        self.count += 1
        return f"{NUMBER}{self.count:04}"

    def day(self, after: date = date(1931, 1, 9)) -> date:
        """A new date."""
        self.count += 1
        self.dates.append(after + timedelta(days=self.count % 2400))
        return self.dates[-1]

    def texts(self) -> list[str]:
        """What to search for, dates apart."""
        return [MARKER, NUMBER, UID_ROOT, UID_ROOT.rpartition(".")[2]]


def text_keywords() -> Iterator[tuple[str, str]]:
    """Keyword and type of all text and date elements in the groups that describe people, studies and equipment."""
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if tag >> 16 in TEXT_GROUPS and keyword and keyword not in TECHNICAL and (vr in LENGTHS or vr in ("DA", "DT")):
            yield keyword, vr


def plant(dataset: Dataset, planted: Planted) -> None:
    """Fill all text and date elements of a header, nested ones, private ones and overlays."""
    for keyword, vr in text_keywords():
        if vr == "PN":
            value = f"{planted.text()}^{planted.text()}"
        elif vr == "DA":
            value = f"{planted.day():%Y%m%d}"
        elif vr == "DT":
            value = f"{planted.day():%Y%m%d}101500.123+0100"
        else:
            value = planted.text()
        if vr != "AE":
            setattr(dataset, keyword, value)
    dataset.PatientTelephoneNumbers = planted.number()
    dataset.PatientAddress = f"{planted.text()} Street 5, {planted.number()} {planted.text()}"
    nested = Dataset()
    nested.PatientID, nested.IssuerOfPatientID = planted.number(), planted.text()
    inner = Dataset()
    inner.PersonName, inner.TextValue = planted.text(), planted.text()
    nested.ContentSequence = Sequence([inner])
    dataset.OtherPatientIDsSequence = Sequence([nested])
    request = Dataset()
    request.RequestedProcedureDescription, request.AccessionNumber = planted.text(), planted.number()
    dataset.RequestAttributesSequence = Sequence([request])
    block = dataset.private_block(0x0029, planted.text(), create=True)
    block.add_new(0x10, "LO", planted.text())
    block.add_new(0x11, "UN", planted.text().encode())
    dataset.private_block(0x0011, planted.text(), create=True).add_new(0x01, "PN", planted.text())
    dataset.add_new(0x60004000, "LT", planted.text())  # overlay comments
    dataset.add_new(0x60001500, "LO", planted.text())  # overlay label
    dataset.ImageComments = planted.text()


def smooth(seed: int, shape: tuple[int, int, int]) -> NDArray[np.int16]:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return ((noise / noise.std() + 4) * 150).astype(np.int16)


def save_study(folder: Path, patient: int, study: int, planted: Planted, patient_tags: dict[str, str]) -> list[Path]:
    """One series of nine slices, under names that hold the patient's name and id, the date and UIDs."""
    day = planted.day()
    name, number = patient_tags["PatientName"], patient_tags["PatientID"]
    place = folder / name.replace("^", "_").upper() / f"{day:%Y-%m-%d} {number}" / f"{day:%Y}" / f"{day:%m}"
    place.mkdir(parents=True)
    voxels = smooth(10 * patient + study, (24, 24, 9))
    paths = []
    header = Dataset()
    plant(header, planted)
    for z in range(voxels.shape[2]):
        uid = f"{UID_ROOT}.{patient}.{study}.{z + 1}"
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, UID(uid)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.SourceApplicationEntityTitle = planted.text()
        meta.ImplementationVersionName = planted.text()
        path = place / f"{name.partition('^')[0].lower()}.MR.{uid}.dcm" if z % 2 else place / f"{day:%d%m%Y}_{z}"
        image = FileDataset(str(path), header.copy(), file_meta=meta, preamble=b"\0" * 128)
        for keyword, value in patient_tags.items():
            setattr(image, keyword, value)
        image.StudyDate = image.SeriesDate = image.AcquisitionDate = image.ContentDate = f"{day:%Y%m%d}"
        image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, uid
        image.StudyInstanceUID = f"{UID_ROOT}.{patient}.{study}"
        image.SeriesInstanceUID = f"{UID_ROOT}.{patient}.{study}.100"
        image.FrameOfReferenceUID = f"{UID_ROOT}.{patient}.{study}.200"
        image.Modality, image.Manufacturer, image.ManufacturerModelName = "MR", "Maker", "Model"
        image.ImageType, image.InstanceNumber, image.PatientAge = ["ORIGINAL", "PRIMARY"], z + 1, "097Y"
        image.PixelSpacing, image.SliceThickness = [1.5, 1.5], 3
        image.ImageOrientationPatient, image.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-20, -18, 3 * z]
        image.Rows, image.Columns, image.SamplesPerPixel = 24, 24, 1
        image.PhotometricInterpretation, image.PixelRepresentation = "MONOCHROME2", 1
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit = 15
        image.PixelData = np.ascontiguousarray(voxels[:, :, z].T).tobytes()
        image.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def save_nifti(path: Path, voxels: NDArray[Any], planted: Planted) -> None:
    """A NIfTI file with text wherever its header has room."""
    image = nibabel.Nifti1Image(voxels, np.diag([1.5, 1.5, 3.0, 1.0]))
    for name, length in (("descrip", 79), ("aux_file", 23), ("db_name", 17), ("intent_name", 15)):
        image.header[name] = planted.text()[:length].encode()
    inner = Dataset()
    inner.PatientName, inner.PatientID = planted.text(), planted.number()
    image.header.extensions.append(Nifti1DicomExtension(2, inner))  # a whole DICOM header
    image.header.extensions.append(Nifti1Extension(6, planted.text().encode()))  # a comment
    image.header.extensions.append(Nifti1Extension(44, planted.text().encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def save_cohort(root: Path, planted: Planted) -> None:
    """Three DICOM patients with two studies each, four NIfTI patients with masks, a BIDS patient with two sessions."""
    for patient in range(3):
        tags = {
            "PatientName": f"{planted.text()}^{planted.text()}",
            "PatientID": planted.number(),
            "IssuerOfPatientID": planted.text(),
            "InstitutionName": planted.text(),
            "PatientBirthDate": f"{planted.day():%Y%m%d}",
            "PatientSex": "F",
        }
        for study in range(2):
            save_study(root / "export", patient, study, planted, tags)
    lines = ["volume,patient_id,age,PatientName,birth_date,group"]
    for patient in range(4):
        number = planted.number()
        voxels = smooth(100 + patient, (24, 24, 20))
        name = f"{number}_T1.nii.gz"
        save_nifti(root / "nifti" / "imagesTr" / name, voxels, planted)
        save_nifti(root / "nifti" / "labelsTr" / name, (voxels > 700).astype(np.uint8), planted)
        born = f"{planted.day():%Y-%m-%d}"
        lines.append(f"nifti/imagesTr/{name},{number},{93 + patient},{planted.text()},{born},{'ab'[patient % 2]}")
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    bids, subject = root / "bids", f"{planted.text()}"
    bids.mkdir()
    (bids / "dataset_description.json").write_text(f'{{"Name": "{planted.text()}", "BIDSVersion": "1.8.0"}}')
    header = "participant_id\tage\tsex\tbirth_date\tname\tcomments"
    values = f"sub-{subject}\t96\tF\t{planted.day():%Y-%m-%d}\t{planted.text()}\t{planted.text()}"
    (bids / "participants.tsv").write_text(f"{header}\n{values}\n")
    sessions = ["session_id\tacq_time\tremarks"]
    for session in ("one", "two"):
        save_nifti(
            bids / f"sub-{subject}" / f"ses-{session}" / "anat" / f"sub-{subject}_ses-{session}_T1w.nii.gz",
            smooth(200 + len(session) + len(sessions), (24, 24, 20)),
            planted,
        )
        sessions.append(f"ses-{session}\t{planted.day():%Y-%m-%d}T10:15:00\t{planted.text()}")
    (bids / f"sub-{subject}" / f"sub-{subject}_sessions.tsv").write_text("\n".join(sessions) + "\n")
