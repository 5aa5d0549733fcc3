"""DICOM files of a folder: each header is read once, and the files of a series become volumes, series by series."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medclr.data.dicom_header import DicomHeader, NotDicom, read_header
from medclr.data.dicom_series import SeriesVolume, volumes_of
from medclr.data.dicom_volume import read_volume
from medclr.data.index_content import content_of
from medclr.data.index_processes import BYTES_A_SECOND, SECONDS, deadline, in_processes, killed
from medclr.data.index_store import BAD, GOOD, Store, Update
from medclr.data.walk import DICOM, OTHER, REFUSED, Source, kind_of, named
from medclr.errors import ScanError

_DUPLICATE = "duplicate of "

_USABLE = "state = 'good' AND path NOT IN (SELECT path FROM refusals) AND path NOT IN (SELECT path FROM left_out)"

Tell = Callable[[], object]


class SeriesTask(NamedTuple):
    """Headers of one series."""

    name: str
    print: str
    headers: list[str]
    size: int
    """Bytes of its files."""


def look_at(root: Path, sources: tuple[Source, ...], name: str) -> Update:
    """What a file is; of a DICOM file all that its header says.

    Args:
        root: the folder.
        sources: the formats of one file a scan.
        name: the file, relative to the folder.
    """
    path, kind = root / name, DICOM
    try:
        with deadline():
            kind, error = kind_of(path, name, sources)
            if kind != DICOM:
                return Update(kind, BAD if error else GOOD, error=error)
            header = read_header(path, name)
    except NotDicom:
        if not name.lower().endswith((".dcm", ".dicom", ".dic")):
            return Update(OTHER, GOOD)
        return Update(REFUSED, BAD, error=_refused("The file is called DICOM, but is none.", "other content"))
    except ScanError as error:
        return Update(kind, BAD, error=error)
    except Exception as error:  # nothing that a file holds may end the run
        return Update(kind, BAD, error=_refused("The file is unreadable.", type(error).__name__))
    return update_of(header)


def update_of(header: DicomHeader) -> Update:
    """What the store holds of a header."""
    identity = header.identity
    patient = [identity.get("PatientID", ""), identity.get("IssuerOfPatientID", "")]
    series = identity.get("SeriesInstanceUID") or f"in {header.path.rpartition('/')[0]}"
    instance = identity.get("SOPInstanceUID")
    return Update(
        DICOM,
        GOOD,
        series=_digest([*patient, series]),
        instance=_digest([instance, *map(str, _place_of(header))]) if instance else None,
        patient=json.dumps(patient),
        data=header.to_json(),
    )


def lost_look(name: str) -> Update:
    """The outcome for a file that kills the process that looks at it."""
    return Update(REFUSED, BAD, error=killed())


def refuse_repeated(store: Store) -> None:
    """Of the files of one SOPInstanceUID, the first by path is used."""
    store.database.execute(
        f"""INSERT OR IGNORE INTO refusals
        SELECT path, 'The file is a duplicate.', 'duplicate of ' || char(31) || first || char(31), 'each image once'
        FROM files JOIN (
            SELECT instance AS known, MIN(path) AS first FROM files
            WHERE instance IS NOT NULL AND {_USABLE} GROUP BY instance HAVING COUNT(*) > 1) ON instance = known
        WHERE path != first AND {_USABLE}"""
    )


def read_series(store: Store, root: Path, *, workers: int, check_voxels: bool, tell: Tell) -> None:
    """Turn the files of every series into volumes, and read each volume once.

    What is known of a series whose files are unchanged stays.

    Args:
        store: holds the headers; takes the volumes.
        root: the folder.
        workers: processes.
        check_voxels: read the voxels.
        tell: called once a series.
    """
    task = partial(_read_one, root, check_voxels)
    tasks = _changed(store, check_voxels, tell)
    for item, found in in_processes(task, tasks, workers=workers, lost=_lost_series):
        store.database.execute(
            "INSERT OR REPLACE INTO series VALUES (?, ?, ?, ?)", (item.name, store.run, item.print, found)
        )
        store.keep()
        tell()
    store.database.execute("DELETE FROM series WHERE seen != ?", (store.run,))
    store.keep(now=True)


def number_of_series(store: Store) -> int:
    """Series with files that may be used, by patient and SeriesInstanceUID."""
    return store.number(f"SELECT COUNT(DISTINCT series) FROM files WHERE series IS NOT NULL AND {_USABLE}")


def found_series(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each series with ``volumes`` (``volume``, ``content``, ``dtype``, ``refused``) and ``refused`` by path."""
    for name, data in store.pages("SELECT name, data FROM series WHERE name > ? ORDER BY name"):
        yield name, json.loads(data)


def header_of(store: Store, path: str) -> DicomHeader:
    """What the header of a file says."""
    row = store.database.execute("SELECT data FROM files WHERE path = ?", (path,)).fetchone()
    return DicomHeader.from_json(row[0])


def _changed(store: Store, check_voxels: bool, tell: Tell) -> Iterator[SeriesTask]:
    names = store.pages("SELECT DISTINCT series FROM files WHERE state = 'good' AND series > ? ORDER BY series")
    select = f"SELECT path, size, mtime, data FROM files WHERE series = ? AND {_USABLE} ORDER BY path"
    for (name,) in names:
        files = store.database.execute(select, (name,)).fetchall()
        if not files:
            continue
        mark = _digest([[path, size, mtime] for path, size, mtime, _ in files] + [check_voxels])
        known = store.database.execute("SELECT print FROM series WHERE name = ?", (name,)).fetchone()
        if known == (mark,):
            store.database.execute("UPDATE series SET seen = ? WHERE name = ?", (store.run, name))
            tell()
            continue
        yield SeriesTask(name, mark, [data for *_, data in files], sum(size for _, size, *_ in files))


def _read_one(root: Path, check_voxels: bool, task: SeriesTask) -> str:
    headers = [DicomHeader.from_json(text) for text in task.headers]
    refused: dict[str, ScanError] = {}
    volumes: list[SeriesVolume] = []
    try:
        with deadline(seconds=SECONDS + len(headers) / 100):
            volumes, refused = volumes_of(headers)
    except ScanError as error:
        refused = {header.path: error for header in headers}
    except Exception as error:  # as above
        reason = _refused("The series cannot be put together.", type(error).__name__)
        refused = {header.path: reason for header in headers}
    known = {header.path: header for header in headers}
    found = []
    for volume in volumes:
        content, dtype, reason_against = "", "", None
        if check_voxels:
            try:
                with deadline(seconds=SECONDS + task.size / BYTES_A_SECOND):
                    content, dtype = _read_voxels(root, volume, known)
            except ScanError as error:
                reason_against = _listed(error)
            except Exception as error:  # as above
                reason_against = _listed(_refused("The pixels cannot be read.", type(error).__name__))
        found.append({"volume": volume.to_json(), "content": content, "dtype": dtype, "refused": reason_against})
    return json.dumps({"volumes": found, "refused": {path: _listed(error) for path, error in refused.items()}})


def _read_voxels(root: Path, volume: SeriesVolume, headers: Mapping[str, DicomHeader]) -> tuple[str, str]:
    voxels, affine = read_volume(volume, lambda name: root / name, headers)
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise _refused("The image holds NaN or infinity.", "voxels that are no numbers")
    if (voxels == voxels.flat[0]).all():
        raise _refused("The image is constant.", "one value in every voxel")
    return content_of(voxels, affine), voxels.dtype.name


def _lost_series(task: SeriesTask) -> str:
    paths = [DicomHeader.from_json(text).path for text in task.headers]
    return json.dumps({"volumes": [], "refused": {path: _listed(killed()) for path in paths}})


def _place_of(header: DicomHeader) -> tuple[object, ...]:
    """What two files of one SOPInstanceUID share if they hold one image, whatever the encoding."""
    first, last = header.frames[0], header.frames[-1]
    place = [first.position, first.orientation, first.spacing, last.position, first.number, last.number]
    return (header.rows, header.columns, len(header.frames), *place)


def _listed(error: ScanError) -> list[str]:
    got = str(error.got)
    if got.startswith(_DUPLICATE):
        got = _DUPLICATE + named(got.removeprefix(_DUPLICATE))
    return [error.problem, got, str(error.wanted)]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _refused(problem: str, got: str) -> ScanError:
    return ScanError(problem, got=got, wanted="a readable DICOM image", fix="Export it again, or leave it out.")
