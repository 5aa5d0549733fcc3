"""The datalist: MONAI's JSON list of scans, one row a scan, read with every check that needs no voxels.

A file holds ``{"training": [row, ...], "validation": [...], "test": [...]}``; sections are optional, and other
top-level keys are kept. A row is a dictionary:

=============  =====================================================================================================
``image``      a path, or a list of co-registered sequences (channels) in which ``null`` marks an absent one
``patient_id`` text; whole numbers become text
``label``      optional: a path (segmentation), or a number or text (class)
``content``    optional: which voxels these are, ``vox-...``, as ``medclr index`` writes it; equal ones are one scan
others         optional scalars: ``study_id, series_id, modality, sequence, days, site, scanner, age, sex, ...``
=============  =====================================================================================================

Paths are relative to ``dataset_dir``: the argument, else the file's top-level key of that name, else the file's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medclr.data.contents import refuse_shared_contents, warn_of_repeated_contents
from medclr.data.files import dump_json, read_json, unreadable, write_text
from medclr.data.rows import Row, RowReader, is_file_name, located, shortened
from medclr.errors import DatalistError
from medclr.keys import IMAGE, LABEL, PATIENT_ID, SECTIONS, TEST, TRAINING, VALIDATION

DATASET_DIR = "dataset_dir"
"""Top-level key of the file: the folder that relative paths start from."""

__all__ = ["Datalist", "Row", "in_channels", "read_datalist", "write_datalist"]


@dataclass(frozen=True)
class Datalist:
    """The rows of each section, with absolute paths, so that MONAI's loaders take them unchanged.

    Args:
        sections: rows by section name: ``training``, ``validation``, ``test``.
        root: the folder that all paths lie in.
        path: the file that it was read from.
        extra: the file's other top-level keys.

    Raises:
        DatalistError: no rows at all, an unknown section, a row without a patient, or a patient or the same
            voxels (``content``) in two sections.
    """

    sections: dict[str, list[Row]]
    root: Path
    path: Path | None = None
    extra: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        origin = self.path or "the given rows"
        unknown = [name for name in self.sections if name not in SECTIONS]
        if unknown:
            raise DatalistError(
                "A datalist has an unknown section.",
                got=f"{', '.join(map(repr, unknown))} in {origin}",
                wanted=f"sections among {', '.join(SECTIONS)}",
                fix="Rename the section, or keep its rows elsewhere.",
            )
        if not any(self.sections.values()):
            raise DatalistError(
                "The datalist is empty.",
                got=f"no row in any section of {origin}",
                wanted=f"at least one row under one of {', '.join(SECTIONS)}",
                fix="Make one with: medclr index FOLDER --output datalist.json --patients volumes.csv",
            )
        _refuse_shared_patients(self.sections)
        refuse_shared_contents(self.sections)

    @property
    def training(self) -> list[Row]:
        """Rows of the training section; an empty list if there is none."""
        return self.sections.get(TRAINING, [])

    @property
    def validation(self) -> list[Row]:
        """Rows of the validation section; an empty list if there is none."""
        return self.sections.get(VALIDATION, [])

    @property
    def test(self) -> list[Row]:
        """Rows of the test section; an empty list if there is none."""
        return self.sections.get(TEST, [])

    def section(self, name: str) -> list[Row]:
        """The rows of a section, at least one.

        Raises:
            DatalistError: the section is unknown, absent or empty; the message lists those that are there.
        """
        if not self.sections.get(name):
            raise _no_section(name, {key: len(rows) for key, rows in self.sections.items()}, self.path)
        return self.sections[name]

    def patients(self, section: str) -> list[str]:
        """The patients of a section in order of first appearance."""
        return list(dict.fromkeys(row[PATIENT_ID] for row in self.section(section)))

    def repeats(self, section: str) -> int:
        """How many patients of a section have two scans or more; 0 for a section that is not there."""
        counts = Counter(row[PATIENT_ID] for row in self.sections.get(section, []))
        return sum(count > 1 for count in counts.values())

    def digest(self) -> str:
        """Sha256 (hex) of the rows with relative paths: the same after the folder has moved or keys were reordered."""
        state = hashlib.sha256()
        for section in SECTIONS:
            for row in self._relative_rows(section):
                state.update(f"{section}\t{json.dumps(row, sort_keys=True)}\n".encode())
        return state.hexdigest()

    def summary(self) -> dict[str, dict[str, int]]:
        """Counts of ``patients``, ``scans`` (rows) and ``labelled`` rows of each section."""
        return {
            name: {
                "patients": len({row[PATIENT_ID] for row in rows}),
                "scans": len(rows),
                "labelled": sum(row.get(LABEL) is not None for row in rows),
            }
            for name, rows in self.sections.items()
        }

    def _relative_rows(self, section: str) -> Iterator[Row]:
        prefix = os.path.join(os.path.abspath(self.root), "")

        def relative(path: str) -> str:
            if path.startswith(prefix):
                return path[len(prefix) :]
            raise DatalistError(
                "A row of the datalist leaves its root.",
                got=path,
                wanted=f"an absolute path below {prefix}",
                fix="Set Datalist.root to a folder that holds all files.",
            )

        for row in self.sections.get(section, []):
            image, label = row[IMAGE], row.get(LABEL)
            paths = [path and relative(path) for path in image] if isinstance(image, list) else relative(image)
            row = {**row, IMAGE: paths}
            if isinstance(label, str) and is_file_name(label):
                row[LABEL] = relative(label)
            yield row


def read_datalist(
    path: str | Path, dataset_dir: str | Path | None = None, *, sections: Sequence[str] | None = None
) -> Datalist:
    """Read and validate a datalist; no voxel is read.

    Args:
        path: the JSON file.
        dataset_dir: the folder that relative paths start from. Without it: the file's own ``dataset_dir`` key (itself
            relative to the file), else the file's folder.
        sections: the sections wanted; others are left out, and their files need not be there. All by default.

    Returns:
        rows as plain dictionaries with absolute paths; ``patient_id`` is text.

    Raises:
        DatalistError: naming section, row (counted from 0) and key: no JSON object, no rows, a section that is absent
            or empty though asked for, a missing or unknown value, a missing or duplicate file, an unknown file type, a
            path that leaves the folder, a patient or the same voxels in two sections, rows with different numbers of
            channels. The same voxels twice in one section are a warning.

    Example:
        >>> rows = read_datalist("datalist.json", "/data/hippocampus").training  # doctest: +SKIP
    """
    path = Path(path)
    sections = [sections] if isinstance(sections, str) else sections
    content = read_json(path)
    present = {str(name): _rows_of(name, content.pop(name), path) for name in SECTIONS if name in content}
    for name in sections or ():
        if not present.get(name):
            raise _no_section(name, {key: len(rows) for key, rows in present.items()}, path)
    root = _find_root(content.pop(DATASET_DIR, None), path, dataset_dir)
    reader = RowReader(root)
    checked = {name: reader.read(name, rows, sections is None or name in sections) for name, rows in present.items()}
    reader.finish()
    everything = Datalist(sections=checked, root=root, path=path, extra=content)
    warn_of_repeated_contents(checked)
    if sections is None:
        return everything
    return Datalist({name: checked[name] for name in SECTIONS if name in sections}, root, path, content)


def write_datalist(datalist: Datalist, path: str | Path) -> None:
    """Write a datalist in one step (a reader sees the old file or the new one), with relative paths, one row a line.

    ``dataset_dir`` is recorded where the file does not lie in the root itself: relative where one of the two folders
    holds the other, so that they can move together, absolute elsewhere.

    Raises:
        DatalistError: a row leaves the root, an extra key holds no JSON, or the file cannot be written.
    """
    path = Path(path)
    content: dict[str, object] = dict(datalist.extra)
    folder, root = os.path.realpath(path.parent), os.path.realpath(datalist.root)
    if folder != root:
        content[DATASET_DIR] = (
            os.path.relpath(root, folder) if os.path.commonpath([folder, root]) in (folder, root) else root
        )
    parts = [f"  {json.dumps(key)}: {dump_json(value, key)}" for key, value in content.items()]
    for name in SECTIONS:
        if name in datalist.sections:
            rows = ",\n".join(f"    {dump_json(row, name)}" for row in datalist._relative_rows(name))
            parts.append(f"  {json.dumps(name)}: [\n{rows}\n  ]" if rows else f"  {json.dumps(name)}: []")
    write_text("{\n" + ",\n".join(parts) + "\n}\n", path)


def in_channels(datalist: Datalist) -> int:
    """Number of channels of every row: the length of an ``image`` list, 1 for a single path.

    Raises:
        DatalistError: rows differ.
    """
    places = {
        len(row[IMAGE]) if isinstance(row[IMAGE], list) else 1: located(section, number, IMAGE)
        for section, rows in datalist.sections.items()
        for number, row in enumerate(rows)
    }
    if len(places) > 1:
        raise DatalistError(
            "Rows of the datalist differ in their number of channels.",
            got="; ".join(f"{count} in {place}" for count, place in places.items()),
            wanted="the same sequences, in the same order, in every row",
            fix="Write null for a sequence that a scan lacks.",
        )
    return next(iter(places))


def _rows_of(name: str, rows: object, path: Path) -> list[object]:
    if isinstance(rows, list):
        return rows
    fix = f'Write "{name}": [{{"image": "scan.nii.gz", "patient_id": "P001"}}].'
    raise unreadable(path, f"{type(rows).__name__} under {name!r}", "a list of rows", fix)


def _find_root(recorded: object, path: Path, dataset_dir: str | Path | None) -> Path:
    if dataset_dir is not None:
        root, origin = Path(dataset_dir), "the argument dataset_dir"
    elif recorded is None:
        return Path(os.path.abspath(path.parent))
    elif isinstance(recorded, str) and recorded and "\0" not in recorded:
        root, origin = path.parent / recorded, f"the key {DATASET_DIR!r} of {path}"
    else:
        fix = f"Correct or remove the key {DATASET_DIR!r}."
        raise unreadable(path, f"{DATASET_DIR} = {shortened(recorded)}", "the path of a folder", fix)
    if not os.path.isdir(root):  # Path.is_dir raises for a name that is too long
        raise DatalistError(
            "The folder of the scans is not there.",
            got=f"{shortened(str(root))}, from {origin}",
            wanted="an existing folder",
            fix="Say where the scans lie: --dataset_dir FOLDER.",
        )
    return Path(os.path.abspath(root))


def _no_section(name: str, sizes: dict[str, int], path: Path | None) -> DatalistError:
    there = ", ".join(f"{key} ({size} rows)" for key, size in sizes.items()) or "none"
    problem = "is empty" if name in sizes else "is not in the datalist" if name in SECTIONS else "is unknown"
    return DatalistError(
        f"Section {name!r} {problem}.",
        got=f"sections {there}" + (f" in {path}" if path else ""),
        wanted=f"one of {', '.join(SECTIONS)} with at least one row",
        fix="Choose another section, or make one: medclr split datalist.json --output split.json",
    )


def _refuse_shared_patients(sections: dict[str, list[Row]]) -> None:
    places: dict[str, tuple[str, int]] = {}
    for section, rows in sections.items():
        for number, row in enumerate(rows):
            patient = row.get(PATIENT_ID)
            if not isinstance(patient, str) or not patient or not row.get(IMAGE):
                raise DatalistError(
                    f"{located(section, number)}: the row lacks an image or a patient.",
                    got=f"keys {', '.join(map(str, row)) or '(none)'}; {PATIENT_ID} is {type(patient).__name__}",
                    wanted=f"{IMAGE}: a path or a list of paths; {PATIENT_ID}: text that is not empty",
                    fix="Give every row both.",
                )
            first = places.setdefault(patient, (section, number))
            if first[0] != section:
                raise DatalistError(
                    f"{located(section, number, PATIENT_ID)}: a patient is in two sections.",
                    got=f"the same patient in {located(*first)}",
                    wanted="all scans of a patient in one section",
                    fix="Split by patient: medclr split datalist.json --output split.json",
                )
