"""The private values of a DICOM header: read as text, so that paths can be searched for them; kept, never shown."""

from __future__ import annotations

from typing import Final

from pydicom.datadict import tag_for_keyword

from medclr.data.dicom_bounds import quiet
from medclr.data.dicom_tags import Tags

LONGEST: Final = 256
"""Characters that are kept of a value."""

KEYWORDS: Final = (
    "PatientID", "IssuerOfPatientID", "PatientName", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName",
    "PatientMotherBirthName", "PatientBirthDate", "PatientBirthTime", "PatientAddress", "PatientTelephoneNumbers",
    "MilitaryRank", "MedicalRecordLocator", "RegionOfResidence",
    "CountryOfResidence", "Occupation", "PatientComments", "ResponsiblePerson", "ResponsibleOrganization",
    "AccessionNumber", "StudyID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID",
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime", "StudyTime", "SeriesTime",
    "ReferringPhysicianName", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "PhysiciansOfRecord",
    "RequestingPhysician", "OperatorsName", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName",
    "StationName", "DeviceSerialNumber", "StudyDescription", "SeriesDescription", "ProtocolName",
    "RequestedProcedureDescription", "RequestedProcedureID", "PerformedProcedureStepDescription",
    "PerformedProcedureStepID", "ScheduledProcedureStepID", "AdmissionID", "CurrentPatientLocation", "ImageComments",
    "AdditionalPatientHistory",
)  # fmt: skip
_TAGS: Final = {keyword: tag for keyword in KEYWORDS if (tag := tag_for_keyword(keyword)) is not None}
_OTHER_IDS: Final = 0x00101002
IDENTITY: Final = [*_TAGS.values(), _OTHER_IDS]


def identity_of(tags: Tags) -> dict[str, str]:
    """Private values by keyword; several values of one are divided by ``\\``.

    Those of ``OtherPatientIDsSequence`` join ``OtherPatientIDs``. What cannot be decoded is taken byte by byte.
    """
    found = {}
    with quiet():
        for keyword, tag in _TAGS.items():
            text = _text(tags, tag)
            if text:
                found[keyword] = text[:LONGEST]
        others = [_text(item, 0x00100020) for item in tags.items(_OTHER_IDS)[:16]]
    if any(others):
        listed = [*found.get("OtherPatientIDs", "").split("\\"), *others]
        found["OtherPatientIDs"] = "\\".join(dict.fromkeys(filter(None, listed)))[:LONGEST]
    return found


def _text(tags: Tags, tag: int) -> str:
    if tag not in tags:
        return ""
    try:
        value = tags.dataset[tag].value
        values = value if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
        text = "\\".join(str(part) for part in values if part is not None)
    except Exception:  # an unknown character set, or bytes that are no text of it
        text = tags.raw(tag)[1][: 4 * LONGEST].decode("latin-1")
    return text.strip(" \0\t\r\n")
