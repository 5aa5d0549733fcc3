"""Rows of a datalist and entries of a quarantine from the store, with nothing private in them, one after the other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from medclr import keys
from medclr.data.dicom_series import SeriesVolume
from medclr.data.index_naming import Naming
from medclr.data.index_people import People, days_between
from medclr.data.index_scans import scans_in_order
from medclr.data.index_store import Scan, Store
from medclr.data.nifti import Probe
from medclr.data.privacy import References, capped_age
from medclr.data.rows import Row

_IN_PATHS = (
    *("PatientID", "OtherPatientIDs", "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName"),
    *("PatientBirthDate", "PatientAddress", "PatientTelephoneNumbers", "MedicalRecordLocator", "ResponsiblePerson"),
    *("AccessionNumber", "StudyID", "AdmissionID", "RequestedProcedureID", "PerformedProcedureStepID"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "ScheduledProcedureStepID"),
    *("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime", "InstitutionName"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "PhysiciansOfRecord"),
    *("RequestingPhysician", "OperatorsName"),
)
_NAMED = re.compile("\x1f(.*?)\x1f", re.DOTALL)


class Made(NamedTuple):
    """A row, and what of it depends on where the datalist is written."""

    row: Row
    file: str | None
    """The image relative to the folder; None for a DICOM volume."""
    label: str | None
    volume: str | None
    """The DICOM volume; its slices are relative to the folder."""
    name: str | None
    """Of its series file, without suffix."""


class Paths:
    """Paths of the folder as they may be shown.

    Args:
        store: holds the headers.
        root: the folder.
        hide_subjects: also hide subject labels of BIDS, and the ids that patterns and tables give.
        keep_ids: show all as it is.
    """

    def __init__(
        self,
        store: Store,
        root: Path,
        *,
        hide_subjects: bool = False,
        keep_ids: bool = False,
        ids: dict[str, str] | None = None,
    ) -> None:
        self._store, self._keep = store, keep_ids
        self._subjects = hide_subjects
        self._ids = ids or {}
        self._last: tuple[str, list[str]] = ("", [])
        self._references = References()
        self._root = root.parts
        self.root = list(root.parts)
        """The components of the folder's own path, as they may be shown."""

    def hide(self, path: str, private: Iterable[str]) -> str:
        """A path without components that match what is private of its own, or that were hidden in another path."""
        if self._keep:
            return path
        parts = path.split("/")
        shown = self._references.hide(path, private).split("/")
        marks = ", ".join("?" * len(parts))
        known = {
            part for (part,) in self._store.database.execute(f"SELECT part FROM hidden WHERE part IN ({marks})", parts)
        }
        pairs = zip(parts, shown, strict=True)
        return "/".join(self._references.hide(part, [part]) if part in known else seen for part, seen in pairs)

    def note_hidden(self, path: str, private: list[str]) -> None:
        """Remember the folders that are hidden in a path, so that they are in all others."""
        if self._keep:
            return
        shown = self._references.hide(path, private).split("/")
        folders = zip(path.split("/")[:-1], shown[:-1], strict=True)
        hidden = [(part,) for part, seen in folders if part != seen]
        self._store.database.executemany("INSERT OR IGNORE INTO hidden VALUES (?)", hidden)
        for place, part in enumerate(self._root):
            if part != os.sep and self.root[place] == part:
                self.root[place] = self._references.hide(part, private)

    def flush(self) -> None:
        """Put the way back from hidden names on the disk."""
        self._references.flush()

    def of_scan(self, path: str, person: str | None) -> str:
        """The path of a file that holds a scan."""
        private = [json.loads(person)[0]] if person and self._subjects else []
        return self.hide(path, [*private, *self._names(path)])

    def of_dicom(self, path: str) -> str:
        """The path of a DICOM file, without what its header, or that of the nearest readable one, holds."""
        return self.hide(path, [*self._identity(path), *self._nearby(path.rpartition("/")[0])])

    def _nearby(self, folder: str) -> list[str]:
        """What is private of any series that lies in a folder: a file may lie in another patient's."""
        if folder != self._last[0]:
            select = (
                "SELECT data FROM files WHERE path > ? AND path < ? AND kind = 'dicom' AND data IS NOT NULL "
                "GROUP BY series LIMIT 32"
            )
            rows = self._store.database.execute(select, (f"{folder}/", f"{folder}0")) if folder else ()
            self._last = folder, list(dict.fromkeys(value for (data,) in rows for value in private_values(data)))
        return self._last[1]

    def of_any(self, path: str) -> str:
        """The path of whatever file."""
        kind = self._store.database.execute("SELECT kind FROM files WHERE path = ?", (path,)).fetchone()
        if kind is not None and kind[0] in ("dicom", "refused"):
            return self.of_dicom(path)
        private = self._names(path)
        if self._subjects:
            private += [self._ids[path]] if path in self._ids else []
            found = re.findall(r"(?:^|[/_])sub-([A-Za-z0-9]+)", path)
            private += [text for label in found for text in (f"sub-{label}", label)]
        return self.hide(path, private)

    def _names(self, path: str) -> list[str]:
        """What the header of a volume holds where programs put names."""
        select = "SELECT data FROM files WHERE path = ? AND kind = 'volume' AND data IS NOT NULL"
        row = self._store.database.execute(select, (path,)).fetchone()
        return [] if row is None else list(Probe.from_json(row[0]).names)

    def _identity(self, path: str) -> list[str]:
        select = "SELECT data FROM files WHERE path = ? AND data IS NOT NULL AND kind = 'dicom'"
        row = self._store.database.execute(select, (path,)).fetchone()
        folder = path
        near = (
            "SELECT data FROM files WHERE path > ? AND path < ? AND kind = 'dicom' AND data IS NOT NULL "
            "ORDER BY path LIMIT 1"
        )
        while row is None and folder:
            folder = folder.rpartition("/")[0]
            low = f"{folder}/" if folder else ""
            high = f"{folder}0" if folder else "\U0010ffff"
            row = self._store.database.execute(near, (low, high)).fetchone()
        return [] if row is None else private_values(row[0])


def private_values(header: str) -> list[str]:
    """What of a header must not be in a path."""
    identity = json.loads(header)["identity"]
    return [part for keyword in _IN_PATHS for part in identity.get(keyword, "").split("\\") if part]


def made_rows(store: Store, paths: Paths, naming: Naming, people: People) -> Iterator[Made]:
    """The rows, by path."""
    numbers: dict[str, int] = {}
    for patient, *fields in scans_in_order(store):
        scan = Scan(*fields)
        row: Row = {keys.PATIENT_ID: patient}
        series = naming.series(scan.series)
        row |= _present({keys.STUDY_ID: naming.study(scan.study), keys.SERIES_ID: series})
        row |= json.loads(scan.cells)
        if keys.AGE in row:
            row[keys.AGE] = capped_age(row[keys.AGE])
        if patient in people.doubtful_sex:
            row.pop(keys.SEX, None)
        if scan.date and keys.DAYS not in row:
            row |= _present({keys.DAYS: days_between(people.first[patient], scan.date)})
        row |= _present({"content": naming.content(scan.content)})
        person = scan.given or scan.native
        if scan.volume is None:
            label = None if scan.label is None else paths.of_scan(scan.label, person)
            yield Made(row, paths.of_scan(scan.place, person), label, None, None)
            continue
        stem = series or "series"
        numbers[stem] = numbers.get(stem, 0) + 1
        yield Made(row, None, None, _shown(scan.volume, paths), f"{stem}-{numbers[stem]:03d}")


def note_hidden_parts(store: Store, paths: Paths) -> None:
    """Find the components of paths that DICOM headers make private, before any path is shown."""
    last = ("", "")
    select = (
        "SELECT path, patient, data FROM files WHERE kind = 'dicom' AND data IS NOT NULL AND path > ? ORDER BY path"
    )
    for path, patient, data in store.pages(select):  # also of what is refused: its folder may hold other files
        here = (patient or "", path.rpartition("/")[0])
        if here != last:
            paths.note_hidden(path, private_values(data))
        last = here


def quarantine_entries(store: Store, paths: Paths) -> Iterator[tuple[str, str, str]]:
    """Path, reason and problem of every file that is not used, by path."""
    select = """
        SELECT path, problem, got, wanted FROM (
            SELECT path, problem, got, wanted FROM refusals
            UNION ALL
            SELECT path, problem, got, wanted FROM files WHERE problem IS NOT NULL AND kind IN ('dicom', 'refused')
            AND path NOT IN (SELECT path FROM refusals) AND path NOT IN (SELECT path FROM left_out))
        WHERE path > ? ORDER BY path"""
    for path, problem, got, wanted in store.pages(select):
        shown = _NAMED.sub(lambda found: paths.of_any(found[1]), got)
        yield paths.of_any(path), f"{problem} Got {shown}; wanted {wanted}.", problem


def _shown(volume: str, paths: Paths) -> str:
    """The volume with paths that may be shown."""
    content = SeriesVolume.from_json(volume)
    cache: dict[str, str] = {}
    for path, _ in content.slices:
        if path not in cache:
            cache[path] = paths.of_dicom(path)
    slices = tuple((cache[path], frame) for path, frame in content.slices)
    return replace(content, slices=slices).to_json()


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
