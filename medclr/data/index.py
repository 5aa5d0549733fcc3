"""A folder of scans becomes a datalist of those that can be used, and a list of those that cannot, with reasons.

A format of scans is a :class:`medclr.data.walk.Source`: which files are its volumes, and whether one can be used.
Patients, labels, duplicates and the datalist are the same for all formats.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medclr.data.cells import Cells, typed
from medclr.data.datalist import Datalist, Row, write_datalist
from medclr.data.files import write_text
from medclr.data.labels import LabelFolders, LabelRule, LabelTemplate, refuse_other_grid
from medclr.data.nifti import Probe
from medclr.data.patients import Identify
from medclr.data.rows import is_file_name
from medclr.data.walk import NIFTI, Source, probe_all, walk
from medclr.errors import ConfigError, DatalistError, ScanError
from medclr.keys import IMAGE, LABEL, PATIENT_ID, TRAINING

QUARANTINE_FILE = "quarantine.json"
"""Written beside the datalist."""


class Quarantined(NamedTuple):
    """A file that is not in the datalist."""

    path: str
    """Relative to the folder."""
    reason: str
    problem: str
    """The first sentence of the reason, which is the same for the same kind of problem."""


@dataclass(frozen=True)
class IndexResult:
    """What :func:`index` found.

    Args:
        datalist: all usable scans, under ``training``.
        quarantine: every other volume, sorted by path.
        summary: counts and ranges, as described at :func:`index`.
    """

    datalist: Datalist
    quarantine: list[Quarantined]
    summary: dict[str, Any]

    def write(self, output: str | Path) -> None:
        """Write the datalist, and ``quarantine.json`` beside it (first, so that a datalist never lacks it).

        Raises:
            DatalistError: a file cannot be written.
        """
        entries = [{"path": path, "reason": reason} for path, reason, _ in self.quarantine]
        write_text(json.dumps(entries, indent=1) + "\n", Path(output).with_name(QUARANTINE_FILE))
        write_datalist(self.datalist, output)


def index(
    folder: str | Path,
    *,
    patients: str | Path,
    labels: str | None = None,
    images: str | None = None,
    table: str | Path | None = None,
    volume_column: str | None = None,
    patient_column: str | None = None,
    workers: int | None = None,
    check_voxels: bool = True,
    progress: bool = False,
    source: Source = NIFTI,
) -> IndexResult:
    """Index a folder of scans.

    Every volume of the folder ends in the datalist or in the quarantine, except those that ``images`` leaves out. A
    scan whose label cannot be used stays, without its label; the label is quarantined.

    Args:
        folder: searched downwards; hidden folders are skipped.
        patients: a pattern (:class:`medclr.data.patients.PatientPattern`) or the path of a table
            (:class:`medclr.data.patients.PatientTable`). A scan of unknown patient is quarantined.
        labels: a template (:class:`medclr.data.labels.LabelTemplate`); by default labels are found by folder
            (``medclr.data.labels.LABEL_FOLDERS``).
        images: a glob such as ``imagesTr/*``: other volumes that are not labels are left out.
        table: a further table, whose row of a volume or of a patient gives columns such as age.
        volume_column, patient_column: columns of the table, where their names do not tell.
        workers: processes; by default as many as there are cores. The result does not depend on it.
        check_voxels: read every voxel, to find constants, NaN and duplicates. Without it only headers and sizes count.
        progress: show a bar on stderr.
        source: the format of the scans.

    Returns:
        the datalist, the quarantine, and a summary with ``patients, scans, labelled``, ``scans_per_patient`` (number of
        patients by number of scans), ``spacing_mm`` and ``shape`` (lowest and highest per axis), ``dtypes``,
        ``quarantined`` (number by problem), ``other_files, left_out, unused_table_rows, without_table_row``.

    Raises:
        ConfigError: an argument cannot work, for example a table that names no file.
        DatalistError: the folder holds no usable volume.

    Example:
        >>> result = index("msd_hippocampus", patients="msd_hippocampus/volumes.csv")  # doctest: +SKIP
        >>> result.write("datalist.json")  # doctest: +SKIP
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise _nothing(f"{folder} is no folder", "an existing folder", "Check the path of the folder.")
    found = walk(root, source)
    rejected = found.rejected
    rule: LabelRule = LabelTemplate(labels, found.volumes) if labels else LabelFolders(found.volumes)
    scans = [path for path in found.volumes if not rule.is_label(path)]
    wanted = [path for path in scans if images is None or fnmatch.fnmatchcase(path, images)]
    if not wanted:
        got = f"{len(found.volumes)} volumes, of which {len(scans)} are no labels, below {root}"
        fix = "Check the folder" + (f", and --images {images!r}." if images else ".")
        raise _nothing(got, "at least one image (.nii, .nii.gz)", fix)

    identify = Identify(patients, table, volume_column=volume_column, patient_column=patient_column)
    cells, unknown = identify(wanted)
    rejected |= unknown
    columns = dict(zip(cells, typed(list(cells.values())), strict=True))
    claims = {path: rule.candidates(path) for path in wanted}
    _refuse_two_labels(cells, claims)
    single = {path: names[0] for path, names in claims.items() if len(names) == 1 and path in cells}
    tasks = [(path, False) for path in cells] + [(path, True) for path in sorted(set(single.values()))]
    probes = probe_all(root, tasks, source=source, check_voxels=check_voxels, workers=workers, progress=progress)

    accepted = _without_duplicates({path: probes[path] for path in cells}, rejected)
    labelled = _match_labels(accepted, single, probes, rejected)
    used = set(labelled.values())
    claimants: dict[str, list[str]] = {}
    for image, names in claims.items():
        for name in names:
            claimants.setdefault(name, []).append(image)
    for path in found.volumes:
        if rule.is_label(path) and path not in used:
            rejected.setdefault(path, _why_unused(claimants.get(path, []), claims))

    rows: list[Row] = []
    for path in accepted:
        label = {LABEL: str(root / labelled[path])} if path in labelled else {}
        rows.append({IMAGE: str(root / path), **label, PATIENT_ID: columns[path][PATIENT_ID], **columns[path]})
    if not rows:
        counts = Counter(error.problem for error in rejected.values())
        got = "; ".join(f"{number} x {problem}" for problem, number in counts.most_common())
        raise _nothing(
            f"every volume is unusable: {got}", "at least one usable scan of a known patient", "Repair them."
        )
    quarantine = [
        Quarantined(path, f"{error.problem} Got {error.got}; wanted {error.wanted}.", error.problem)
        for path, error in sorted(rejected.items())
    ]
    summary = {
        **_describe(rows, list(accepted.values())),
        "quarantined": dict(Counter(entry.problem for entry in quarantine).most_common()),
        "other_files": found.others,
        "left_out": len(scans) - len(wanted),
        "unused_table_rows": identify.unused_rows,
        "without_table_row": identify.without_row,
    }
    return IndexResult(Datalist({TRAINING: rows}, root, extra={"name": root.name}), quarantine, summary)


def _without_duplicates(probes: Mapping[str, Probe | ScanError], rejected: dict[str, ScanError]) -> dict[str, Probe]:
    accepted: dict[str, Probe] = {}
    originals: dict[str, str] = {}
    for path, probe in probes.items():
        if isinstance(probe, ScanError):
            rejected[path] = probe
        elif probe.digest and originals.setdefault(probe.digest, path) != path:
            got = f"a duplicate of {originals[probe.digest]}, voxel by voxel"
            rejected[path] = _refusal("The scan is a duplicate.", got, "each scan once")
        else:
            accepted[path] = probe
    return accepted


def _match_labels(
    accepted: Mapping[str, Probe],
    single: Mapping[str, str],
    probes: Mapping[str, Probe | ScanError],
    rejected: dict[str, ScanError],
) -> dict[str, str]:
    """The label of each accepted image that has one on its grid."""
    labelled = {}
    for image in accepted:
        if image not in single:
            continue
        label = probes[single[image]]
        try:
            if isinstance(label, ScanError):
                raise label
            refuse_other_grid(label, accepted[image])
            labelled[image] = single[image]
        except ScanError as error:
            reason = _refusal(error.problem, f"{error.got} (label of {image})", str(error.wanted))
            rejected.setdefault(single[image], reason)
    return labelled


def _why_unused(images: Sequence[str], claims: Mapping[str, Sequence[str]]) -> ScanError:
    if not images:
        return _refusal("The label belongs to no image.", "no indexed image of its name", "an image for every label")
    several = next((image for image in images if len(claims[image]) > 1), None)
    if several is not None:
        got = f"{len(claims[several])} files for {several}"
        return _refusal("The image has several labels.", got, "one label file an image")
    return _refusal("The label's image is quarantined.", images[0], "a usable image for every label")


def _refuse_two_labels(cells: Mapping[str, Cells], claims: Mapping[str, Sequence[str]]) -> None:
    both = next((path for path in cells if LABEL in cells[path] and claims[path]), None)
    path = next((path for path in cells if is_file_name(cells[path].get(LABEL, ""))), None)
    if both is not None or path is not None:
        raise ConfigError(
            f"The column {LABEL!r} clashes with label files.",
            got=f"a class and a label file for {both}" if both else f"a file name for {path}",
            wanted="classes in the column, or label files, not both",
            fix="Rename the column; point to label files with --labels.",
        )


def _describe(rows: Sequence[Row], probes: Sequence[Probe]) -> dict[str, Any]:
    scans = Counter(row[PATIENT_ID] for row in rows)
    spacing, shape = np.array([probe.spacing for probe in probes]), np.array([probe.shape for probe in probes])
    return {
        "patients": len(scans),
        "scans": len(rows),
        "labelled": sum(LABEL in row for row in rows),
        "scans_per_patient": dict(sorted(Counter(scans.values()).items())),
        "spacing_mm": [spacing.min(axis=0).round(4).tolist(), spacing.max(axis=0).round(4).tolist()],
        "shape": [shape.min(axis=0).tolist(), shape.max(axis=0).tolist()],
        "dtypes": dict(Counter(probe.dtype for probe in probes).most_common()),
    }


def _refusal(problem: str, got: str, wanted: str) -> ScanError:
    return ScanError(problem, got=got, wanted=wanted, fix="Repair the file, or leave it out.")


def _nothing(got: str, wanted: str, fix: str) -> DatalistError:
    return DatalistError("There is nothing to index.", got=got, wanted=wanted, fix=fix)
