"""A folder of scans becomes a datalist of those that can be used, and a list of those that cannot, with reasons.

DICOM, NIfTI, NRRD and MetaImage files, and BIDS data sets, may lie in any mixture. Files are known by what
:mod:`medclr.data.index_store` holds of them, so that an interrupted run goes on where it was; memory holds a few
hundred bytes for each volume, and nothing for each DICOM slice.
"""

from __future__ import annotations

import fnmatch
import os
from functools import partial
from pathlib import Path

from rich.progress import Progress

from medclr.data.bids import DESCRIPTION, BidsDatasets
from medclr.data.index_dicom import look_at, lost_look, number_of_series, read_series, refuse_repeated
from medclr.data.index_naming import Naming
from medclr.data.index_people import SHARED, people_of, resolve
from medclr.data.index_processes import in_processes, progress_bar
from medclr.data.index_result import QUARANTINE_FILE, IndexResult, Quarantined
from medclr.data.index_rows import Paths, made_rows, note_hidden_parts, quarantine_entries
from medclr.data.index_scans import (
    Known,
    add_dicom,
    add_volumes,
    identify_scans,
    refuse_repeated_content,
    refuse_series_files,
    typed_columns,
)
from medclr.data.index_store import Store
from medclr.data.index_summary import summarise, summarise_files
from medclr.data.index_volumes import (
    claims_of,
    probe_volumes,
    refuse_two_labels,
    refuse_unused_labels,
    volumes_of_folder,
)
from medclr.data.labels import LabelFolders, LabelRule, LabelTemplate
from medclr.data.patients import Identify
from medclr.data.privacy import private_home
from medclr.data.walk import SOURCES, Source, available_cores, walk
from medclr.errors import DatalistError, ScanError
from medclr.keys import PATIENT_ID

_UNKNOWN = ScanError(
    "The patient is unknown.",
    got="a header without PatientID",
    wanted="a PatientID, or --patients with a pattern of the path such as '{patient}/*'",
    fix="Say whose the scans are.",
)

__all__ = ["QUARANTINE_FILE", "IndexResult", "Quarantined", "index"]


def index(
    folder: str | Path,
    *,
    patients: str | Path | None = None,
    labels: str | None = None,
    images: str | None = None,
    table: str | Path | None = None,
    volume_column: str | None = None,
    patient_column: str | None = None,
    derivatives: bool = False,
    keep_ids: bool = False,
    hide_subjects: bool = False,
    fresh: bool = False,
    workers: int | None = None,
    check_voxels: bool = True,
    progress: bool = False,
    source: Source | None = None,
) -> IndexResult:
    """Index a folder of scans.

    Every file that is a DICOM file or a volume ends in the datalist or in the quarantine, except those that ``images``
    leaves out. A scan whose label cannot be used stays, without its label; the label is quarantined. Of repeated
    SOPInstanceUIDs, and of volumes with the same voxels, the first by path stays.

    Args:
        folder: searched downwards; hidden folders are skipped.
        patients: a pattern (:class:`medclr.data.patients.PatientPattern`) or the path of a table
            (:class:`medclr.data.patients.PatientTable`), which may also name DICOM scans by PatientID, folder or UID,
            and BIDS scans by ``sub-01``. It counts before what headers and BIDS say. DICOM and BIDS need none; another
            scan of unknown patient is quarantined.
        labels: a template (:class:`medclr.data.labels.LabelTemplate`); by default labels are found by folder
            (``medclr.data.labels.LABEL_FOLDERS``).
        images: a glob such as ``imagesTr/*``: other volumes that are not labels are left out.
        table: a further table, whose row of a volume or of a patient gives columns such as age.
        volume_column, patient_column: columns of the table, where their names do not tell.
        derivatives: index ``derivatives/`` and ``sourcedata/`` of BIDS data sets too.
        keep_ids: ids, dates and paths are public already: no pseudonyms, nothing is hidden.
        hide_subjects: hide BIDS subject labels, and the ids that tables and patterns give, in paths.
        fresh: read every file again, also those that are known from an earlier run.
        workers: processes; by default as many as there are cores. The result does not depend on it.
        check_voxels: read every voxel, to find constants, NaN and duplicates. Without it only headers and sizes count.
        progress: show a bar on stderr.
        source: a further format of one file a scan.

    Returns:
        the datalist, the quarantine, and a summary with ``patients, studies, series, scans, labelled``,
        ``scans_per_patient`` (number of patients by number of scans), ``modalities``, ``sequences``, ``scanners``,
        ``spacings`` (scans by value), ``spacing_mm`` and ``shape`` (lowest and highest per axis), ``dtypes``,
        ``quarantined`` (number by problem), ``dicom_files, dicom_series, volume_files, other_files, left_out``,
        ``unused_table_rows, without_table_row``, and ``conflicts`` (number by what does not fit together: such patients
        stay under one id, so that no split tears them apart).

    Raises:
        ConfigError: an argument cannot work, for example a table that names no file; or another process indexes the
            folder.
        DatalistError: the folder holds no usable volume.

    Example:
        >>> result = index("export", workers=2)  # doctest: +SKIP
        >>> result.write("datalist.json")  # doctest: +SKIP
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise _nothing(f"{folder} is no folder", "an existing folder", "Check the path of the folder.")
    workers = workers or available_cores()
    sources = SOURCES if source is None else (source, *SOURCES)
    identify = Identify(patients, table, volume_column=volume_column, patient_column=patient_column)
    settings = " ".join(f"{one.probe.__module__}.{one.probe.__qualname__}" for one in sources)  # type: ignore[attr-defined]
    with Store.open(root, settings=settings, fresh=fresh) as store, progress_bar(progress) as bar:
        _look(store, root, sources, workers, bar)
        datasets = _datasets(store, root)
        volumes = volumes_of_folder(store)
        rule: LabelRule = LabelTemplate(labels, volumes) if labels else LabelFolders(volumes)
        wanted = _select(store, [path for path in volumes if not rule.is_label(path)], images, datasets, derivatives)
        refuse_repeated(store)
        told = bar.add_task("Series", total=number_of_series(store))
        tell = partial(bar.advance, told)
        read_series(store, root, workers=workers, check_voxels=check_voxels, tell=tell)

        dicom = refuse_series_files(store)
        if not wanted and not number_of_series(store):
            got = f"{len(volumes)} volumes, of which {len(wanted)} are wanted and no labels, and no DICOM, below {root}"
            fix = "Check the folder" + (f", and --images {images!r}." if images else ".")
            raise _nothing(got, "at least one image (DICOM, NIfTI, NRRD or MetaImage)", fix)
        cells, bids = identify_scans(store, identify, wanted, dicom, datasets)
        known = Known(typed_columns(cells), bids)
        claims = claims_of(rule, wanted)
        refuse_two_labels(cells, claims)
        single = {names[0] for path, names in claims.items() if len(names) == 1 and path in cells}
        tasks = [(path, False) for path in wanted if path in cells] + [(path, True) for path in sorted(single)]
        told = bar.add_task("Volumes", total=len(tasks))
        tell = partial(bar.advance, told)
        probe_volumes(store, root, sources, tasks, workers=workers, check_voxels=check_voxels, tell=tell)

        naming = Naming(keep_ids=keep_ids)
        add_dicom(store, known, naming, _UNKNOWN)
        used = add_volumes(store, known, naming, wanted, claims)
        conflicts = resolve(store, naming.patient)
        shared = refuse_repeated_content(store)
        refuse_unused_labels(store, (path for path in volumes if rule.is_label(path)), used, claims)
        store.keep(now=True)
        counts = summarise_files(store)
        if not store.number("SELECT COUNT(*) FROM scans"):
            got = "; ".join(f"{number} x {problem}" for problem, number in counts["quarantined"].items())
            fix = "Repair them, or say whose they are with --patients."
            raise _nothing(f"every volume is unusable: {got}", "at least one usable scan of a known patient", fix)
        people = people_of(store)
        conflicts |= people.conflicts | ({SHARED: shared} if shared else {})
        summary = summarise(store) | counts
        summary |= {"unused_table_rows": identify.unused_rows, "without_table_row": identify.without_row}
        summary["conflicts"] = conflicts
        ids = {path: row[PATIENT_ID] for path, row in cells.items() if PATIENT_ID in row}
        ids |= {label: ids[path] for path, names in claims.items() if path in ids for label in names}
        paths = Paths(store, root, hide_subjects=hide_subjects, keep_ids=keep_ids, ids=ids)
        note_hidden_parts(store, paths)
        rows = made_rows(store, paths, naming, people)
        result = IndexResult(rows, quarantine_entries(store, paths), summary, root, paths.root)
        paths.flush()
        return result


def _look(store: Store, root: Path, sources: tuple[Source, ...], workers: int, bar: Progress) -> None:
    """Find the files that are there, and look at those that are new or have changed."""
    told = bar.add_task("Files", total=None)
    store.refresh(walk(root, private_home()), partial(bar.advance, told))
    new = store.number("SELECT COUNT(*) FROM files WHERE state = 'new'")
    bar.update(told, total=new, completed=0, description="Headers")
    paths = store.pages("SELECT path FROM files WHERE state = 'new' AND path > ? ORDER BY path")
    task = partial(look_at, root, sources)
    names = (path for (path,) in paths)
    for path, update in in_processes(task, names, workers=min(workers, max(new, 1)), lost=lost_look, chunk=16):
        store.update(path, update)
        bar.advance(told)
    store.keep(now=True)


def _datasets(store: Store, root: Path) -> BidsDatasets:
    rows = store.database.execute(
        "SELECT path FROM files WHERE path = ? OR path LIKE ? ORDER BY path", (DESCRIPTION, f"%/{DESCRIPTION}")
    )
    return BidsDatasets(root, [path for (path,) in rows])


def _select(
    store: Store, volumes: list[str], images: str | None, datasets: BidsDatasets, derivatives: bool
) -> list[str]:
    """Leave out what ``images`` does, and refuse what BIDS data sets keep apart; what is left of the volumes."""
    dicom = (path for (path,) in store.pages("SELECT path FROM files WHERE kind = 'dicom' AND path > ? ORDER BY path"))
    wanted = []
    for files, is_volume in ((volumes, True), (dicom if images is not None or len(datasets) else (), False)):
        for path in files:
            if images is not None and not fnmatch.fnmatchcase(path, images):
                store.database.execute("INSERT INTO left_out VALUES (?)", (path,))
                continue
            refused = datasets.aside(path, derivatives)
            if refused is not None:
                store.refuse(path, refused)
            elif is_volume:
                wanted.append(path)
    return wanted


def _nothing(got: str, wanted: str, fix: str) -> DatalistError:
    return DatalistError("There is nothing to index.", got=got, wanted=wanted, fix=fix)
