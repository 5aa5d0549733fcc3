"""The usable scans of a folder, with their patients and columns, from what was read of its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from medclr import keys
from medclr.data.bids import BidsDatasets, BidsScan
from medclr.data.cells import Cells, typed
from medclr.data.dicom_header import DicomHeader
from medclr.data.dicom_series import SeriesVolume
from medclr.data.index_dicom import found_series, header_of
from medclr.data.index_naming import Naming
from medclr.data.index_people import person, plain_date
from medclr.data.index_store import Scan, Store
from medclr.data.index_volumes import match_label, probe_of, refusal
from medclr.data.patients import Identify
from medclr.data.privacy import is_private_column
from medclr.data.rows import Row
from medclr.data.walk import named
from medclr.errors import ScanError


class Known(NamedTuple):
    """Whose the scans are, and what else is said of them."""

    columns: dict[str, Row]
    """Typed columns by file."""
    bids: dict[str, BidsScan]


def refuse_series_files(store: Store) -> dict[str, tuple[str, ...]]:
    """Refuse the DICOM files that are in no usable volume.

    Returns:
        by the first file of each usable volume, the names that its header has for it: patient, folder, series, study.
    """
    names: dict[str, tuple[str, ...]] = {}
    for _, series in found_series(store):
        used = {path for entry in series["volumes"] if not entry["refused"] for path in files_of(entry["volume"])}
        for entry in series["volumes"]:
            paths = files_of(entry["volume"])
            if entry["refused"]:
                for path in paths:
                    if path not in used:
                        store.refuse(path, refusal(*entry["refused"]))
            else:
                identity = header_of(store, paths[0]).identity
                wanted = ("PatientID", "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber")
                names[paths[0]] = (
                    identity.get("PatientID", ""),
                    paths[0].rpartition("/")[0],
                    *(identity.get(keyword, "") for keyword in wanted[1:]),
                )
        for path, reason in series["refused"].items():
            if path not in used:
                store.refuse(path, refusal(*reason))
    return names


def identify_scans(
    store: Store,
    identify: Identify,
    volumes: list[str],
    dicom: Mapping[str, tuple[str, ...]],
    datasets: BidsDatasets,
) -> tuple[dict[str, Cells], dict[str, BidsScan]]:
    """Columns of every scan whose patient is known, in order of paths; the others are refused.

    Args:
        store: takes the refusals.
        identify: what the user says.
        volumes: files of one volume each.
        dicom: as :func:`refuse_series_files` gives it.
        datasets: BIDS data sets.
    """
    bids = {path: found for path in [*volumes, *dicom] if (found := datasets.find(path))} if len(datasets) else {}
    names: dict[str, tuple[str, ...]] = {path: own for path, own in dicom.items() if own[0]}
    for path, scan in bids.items():
        names[path] = (*names.get(path, ()), scan.subject, scan.subject[4:])
    known, unknown = identify(sorted([*volumes, *dicom]), names)
    for path, error in unknown.items():
        if path not in dicom:
            store.refuse(path, error)
    cells = {path: ((bids[path].cells | own) if path in bids else own) for path, own in known.items()}
    return cells, bids


def add_dicom(store: Store, known: Known, naming: Naming, unknown: ScanError) -> None:
    """Note the usable DICOM volumes; the files of those of unknown patient are refused."""
    for _, series in found_series(store):
        entries = [entry for entry in series["volumes"] if not entry["refused"]]
        used = {path for entry in entries if (paths := files_of(entry["volume"]))[0] in known.columns for path in paths}
        for entry in entries:
            paths = files_of(entry["volume"])
            if paths[0] in known.columns:
                store.add(_dicom_scan(entry, header_of(store, paths[0]), known, naming))
                continue
            for path in paths:
                if path not in used:
                    store.refuse(path, unknown)


def add_volumes(
    store: Store, known: Known, naming: Naming, images: list[str], labels: Mapping[str, list[str]]
) -> set[str]:
    """Note the usable files of one volume each.

    Args:
        store: holds what checking them has found; takes scans and refusals.
        known: of those whose patient is known.
        naming: what ids become.
        images: the files.
        labels: label files of an image.

    Returns:
        the label files that are used.
    """
    used: set[str] = set()
    for path in images:
        if path not in known.columns:
            continue
        probe = probe_of(store, path)
        if isinstance(probe, ScanError):
            store.refuse(path, probe)
            continue
        found = labels.get(path, [])
        label = found[0] if len(found) == 1 and match_label(store, path, probe, found[0]) else None
        if label:
            used.add(label)
        row, bids = known.columns[path], known.bids.get(path)
        row, day = _without_dates(row, naming)
        given = person(str(row.pop(keys.PATIENT_ID))) if keys.PATIENT_ID in row else None
        native = None if bids is None else person(bids.subject, bids.dataset)
        study, series = _texts(row, given or native or "")
        if bids is not None:
            study = study or json.dumps([bids.dataset, bids.subject, bids.session])
            series = series or json.dumps([bids.dataset, path.rpartition("/")[2].split(".")[0]])
        grid = json.dumps([probe.spacing, probe.shape, probe.dtype])
        sex, day = str(row.get(keys.SEX, "")), day or (bids.date if bids else "")
        content = probe.digest
        cells = json.dumps(row)
        store.add(Scan(path, None, label, given, native, study, series, day, "", sex, content, cells, grid))
        store.keep()
    return used


def refuse_repeated_content(store: Store) -> int:
    """Of scans of one content the first stays; the files of the others are refused as its duplicates.

    Returns:
        how many contents were there under several patients.
    """
    shared = store.number(
        "SELECT COUNT(*) FROM (SELECT content FROM scans WHERE content != '' GROUP BY content "
        "HAVING COUNT(DISTINCT patient) > 1)"
    )
    select = "SELECT number, content, place, volume FROM scans WHERE content != '' AND number > ? ORDER BY number"
    for number, content, place, volume in store.pages(select, start=-1):
        first = store.database.execute(
            "SELECT place, number FROM scans WHERE content = ? ORDER BY place, number LIMIT 1", (content,)
        ).fetchone()
        if first[1] == number:
            continue
        store.database.execute("DELETE FROM scans WHERE number = ?", (number,))
        reason = refusal(
            "The scan is a duplicate.", f"duplicate of {named(first[0])}, voxel by voxel", "each scan once"
        )
        for path in [place] if volume is None else files_of(volume):
            store.refuse(path, reason)
    # A file with several volumes is used as long as one of them is.
    for (volume,) in store.database.execute("SELECT volume FROM scans WHERE volume IS NOT NULL"):
        store.database.executemany("DELETE FROM refusals WHERE path = ?", [(path,) for path in files_of(volume)])
    return shared


def files_of(volume: str) -> list[str]:
    """The files of a DICOM volume, in order, each once."""
    return list(dict.fromkeys(path for path, _ in SeriesVolume.from_json(volume).slices))


def typed_columns(cells: Mapping[str, Cells]) -> dict[str, Row]:
    """Columns by file, as numbers where a whole column is numeric."""
    return dict(zip(cells, typed(list(cells.values())), strict=True))


def scans_in_order(store: Store) -> Iterator[tuple[Any, ...]]:
    """``patient`` and the fields of each scan, by path."""
    names = ", ".join(f"scans.{name}" for name in Scan._fields)
    yield from store.database.execute(f"SELECT patient, {names} FROM scans ORDER BY place, number")


def _dicom_scan(entry: dict[str, Any], header: DicomHeader, known: Known, naming: Naming) -> Scan:
    volume = SeriesVolume.from_json(entry["volume"])
    identity, bids = header.identity, known.bids.get(header.path)
    said, day = _without_dates(known.columns[header.path], naming)
    given = person(str(said.pop(keys.PATIENT_ID))) if keys.PATIENT_ID in said else None
    native = person(identity["PatientID"], identity.get("IssuerOfPatientID", "")) if identity.get("PatientID") else None
    if bids is not None:
        given = given or person(bids.subject, bids.dataset)
    study, series = _texts(said, given or native or "")
    own = {
        keys.MODALITY: volume.modality,
        keys.SEQUENCE: volume.sequence,
        keys.SCANNER: volume.scanner,
        keys.SITE: naming.site(identity.get("InstitutionName", "")),
        keys.AGE: header.age,
        keys.SEX: header.sex,
    }
    row = {name: value for name, value in own.items() if value not in (None, "")} | said
    dates = (identity.get(name, "") for name in ("StudyDate", "SeriesDate", "AcquisitionDate"))
    header_day = next((found for text in dates if (found := plain_date(text))), "")
    return Scan(
        header.path,
        entry["volume"],
        None,
        given,
        native,
        study or identity.get("StudyInstanceUID", ""),
        series or identity.get("SeriesInstanceUID", ""),
        header_day or day,
        plain_date(identity.get("PatientBirthDate", "")),
        str(header.sex or ""),
        entry["content"],
        json.dumps(row),
        json.dumps([volume.spacing, volume.shape, entry["dtype"]]),
    )


def _without_dates(row: Row, naming: Naming) -> tuple[Row, str]:
    """A row without dates and, unless ids are public, without what identifies; and its date."""
    if naming.keep_ids:
        return dict(row), ""
    private = [name for name in row if is_private_column(name)]
    # A date of birth is none of a scan.
    dates = [
        plain_date(str(row[name])) for name in private if "birth" not in name.lower() and "dob" not in name.lower()
    ]
    kept = {name: value for name, value in row.items() if name not in private}
    return kept, next(filter(None, dates), "")


def _texts(row: Row, who: str) -> tuple[str, str]:
    """Study and series as the user names them, taken out of the row; a name that is no UID is the patient's."""
    study, series = (str(row.pop(key, "") or "") for key in (keys.STUDY_ID, keys.SERIES_ID))
    return tuple(  # type: ignore[return-value]
        text if not text or text.count(".") > 3 else json.dumps([who, text]) for text in (study, series)
    )
