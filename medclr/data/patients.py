"""Whose scan a file is: from a pattern in its path, or from a table (CSV, TSV)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medclr.data.cells import Cells, column_name, is_missing
from medclr.data.nifti import VOLUME_SUFFIXES, stem_of
from medclr.errors import ConfigError, ScanError
from medclr.keys import IMAGE, PATIENT_ID

VOLUME_COLUMNS = (
    *("file", "filename", "file_name", "filepath", "file_path", "path"),
    *("image", "image_path", "volume", "scan"),
)
_HOW = (
    "--patients with a pattern of the path such as '{patient}/{study}_*.nii.gz', "
    "or with a table of columns volume and patient"
)
PATIENT_COLUMNS = ("patient", "patient_id", "patientid", "subject", "subject_id", "participant", "participant_id")


class PatientPattern:
    """Reads the patient, and other columns, off a path.

    Args:
        pattern: a regular expression with named groups, ``(?P<patient>...)`` among them; or a simple form such as
            ``{patient}/{study}_{sequence}.nii.gz``, in which a name stands for a piece of one path component (as short
            as fits), the same name again for the same text, and ``*`` for any piece. Either is searched in the path
            relative to the folder, with ``/`` between components; the simple form reaches to the end of a component,
            and may leave the suffix of the file out.

    Raises:
        ConfigError: no valid pattern, no ``patient`` in it, or a name that is reserved.

    Example:
        >>> PatientPattern("{patient}/{study}_{sequence}.nii.gz").match("raw/P01/first_T1.nii.gz")
        {'patient_id': 'P01', 'study_id': 'first', 'sequence': 'T1'}
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._regex = re.compile(pattern if "(?P<" in pattern else _simple(pattern))
        except re.error as error:
            raise _bad_pattern(pattern, str(error)) from error
        groups = list(self._regex.groupindex)
        if "patient" not in groups:
            raise _bad_pattern(pattern, "no name 'patient'")
        self._columns = {group: column_name(group, groups) for group in groups if group != "patient"}
        self._columns["patient"] = PATIENT_ID
        if IMAGE in groups or len(set(self._columns.values())) < len(groups):
            raise _bad_pattern(pattern, "a name that is reserved, or that means the same as another")

    def match(self, path: str) -> Cells | None:
        """The columns found in a path relative to the folder; None where the pattern, or the patient, is not in it."""
        found = self._regex.search(path)
        if found is None or not (found["patient"] or "").strip():
            return None
        return {self._columns[group]: text.strip() for group, text in found.groupdict().items() if text}


class PatientTable:
    """A table whose rows name a volume, or a patient; its other columns become columns of the datalist.

    Args:
        path: CSV, or values separated by tabs or semicolons, with a header line.
        volume_column: names a volume by its path relative to the folder or its file name, with or without suffix. By
            default the column called file, path, image, volume, scan or similar (``VOLUME_COLUMNS``).
        patient_column: by default patient, patient_id, subject, participant_id or similar (``PATIENT_COLUMNS``).
        names_volumes: whether there must be a volume column (True) or either will do (False).

    Raises:
        ConfigError: the file cannot be read, has no rows, lacks a column, has several that might be meant, or
            contradicts itself.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        volume_column: str | None = None,
        patient_column: str | None = None,
        names_volumes: bool = True,
    ) -> None:
        self.path = Path(path)
        numbers, lines = _read(self.path)
        header = list(lines[0])
        volume = self._choose(header, volume_column, VOLUME_COLUMNS, "volume", required=names_volumes)
        required = names_volumes or volume is None
        patient = self._choose(header, patient_column, PATIENT_COLUMNS, "patient", required=required)
        columns = {name: column_name(name, header) for name in header if name not in (volume, patient)}
        if patient is not None:
            columns[patient] = PATIENT_ID
        if len(set(columns.values())) < len(columns) or IMAGE in columns.values():
            fix = "Rename or remove columns, or choose with --volume-column and --patient-column."
            raise _bad_table(self.path, f"columns {', '.join(header)}", "columns that mean different things", fix)
        self.rows: list[Cells] = [
            {columns[name]: cell for name, cell in line.items() if name in columns and not is_missing(cell)}
            for line in lines
        ]
        self.by_volume = volume is not None
        self._places: dict[str, int] = {}
        for place, line in enumerate(lines):
            key = _tidy(line[volume]) if volume is not None else self.rows[place].get(PATIENT_ID, "")
            first = self._places.setdefault(key, place) if key else place
            if self.rows[first] != self.rows[place]:
                got = f"lines {numbers[first]} and {numbers[place]} name the same {'volume' if volume else 'patient'}"
                raise _bad_table(self.path, f"{got} and differ", "one row each", "Remove one of the lines.")

    def find(self, path: str, patient: str | None = None) -> int | None:
        """The number of the row of a volume, or of a patient if the table names no volumes; None if there is none."""
        if not self.by_volume:
            return self._places.get(patient or "")
        suffix = len(path.rsplit("/", 1)[-1]) - len(stem_of(path))
        keys = (path, path[: len(path) - suffix], path.rsplit("/", 1)[-1], stem_of(path))
        return next((self._places[key] for key in keys if key in self._places), None)

    def find_name(self, names: Sequence[str]) -> int | None:
        """The number of the row of a scan by the names that it has besides its path, the first that is in the table."""
        return next((self._places[name] for name in names if name and name in self._places), None)

    def ambiguous(self, found: Iterable[tuple[str, int | None]]) -> set[int]:
        """Rows that name several volumes alike, given each path with the row found for it."""
        if not self.by_volume:
            return set()
        files: dict[int, set[str]] = {}
        for path, place in found:
            if place is not None:
                folder = path.rpartition("/")[0]
                files.setdefault(place, set()).add(f"{folder}/{stem_of(path)}")
        return {place for place, paths in files.items() if len(paths) > 1}

    def _choose(
        self, header: list[str], given: str | None, known: tuple[str, ...], what: str, *, required: bool
    ) -> str | None:
        columns = [name for name in header if name.strip().lower().replace(" ", "_") in known]
        if given is not None:
            columns = [given] if given in header else []
        if len(columns) == 1:
            return columns[0]
        if not columns and not required and given is None:
            return None
        got = f"columns {', '.join(header)}" + (f"; asked for {given!r}" if given else "")
        wanted = f"one {what} column" if given else f"exactly one {what} column, called one of {', '.join(known)}"
        fix = f"Choose it with --{what}-column."
        if what == "volume" and not columns:
            fix += (
                " If the table has one row a patient, give a file name pattern as --patients, and the table as --table."
            )
        raise _bad_table(self.path, got, wanted, fix)


class Identify:
    """Finds the patient of each scan, and the columns that come with it.

    Args:
        patients: a pattern, or the path of a table that names volumes and patients; None where scans name their own.
        table: a further table of columns, by volume or by patient.
        volume_column, patient_column: of the table (of ``patients``, if that is one too).

    Raises:
        ConfigError: the pattern or a table cannot be used.
    """

    def __init__(
        self,
        patients: str | Path | None,
        table: str | Path | None = None,
        *,
        volume_column: str | None = None,
        patient_column: str | None = None,
    ) -> None:
        self.pattern = PatientPattern(str(patients)) if "{" in str(patients) or "(?P<" in str(patients) else None
        self.tables: list[PatientTable] = []
        self.asked = patients is not None or table is not None
        if not self.pattern and patients is not None:
            self.tables.append(PatientTable(patients, volume_column=volume_column, patient_column=patient_column))
            volume_column = patient_column = None
        if table is not None:
            further = PatientTable(
                table, volume_column=volume_column, patient_column=patient_column, names_volumes=False
            )
            self.tables.append(further)
        elif volume_column or patient_column:
            raise ConfigError(
                "A column is named, but no table is given.",
                got=f"--volume-column {volume_column}, --patient-column {patient_column}",
                wanted="a table as --patients or --table",
                fix="Give the table, or leave the columns out.",
            )
        self.unused_rows = 0
        self.without_row = 0

    def __call__(
        self, paths: Sequence[str], names: Mapping[str, Sequence[str]] | None = None
    ) -> tuple[dict[str, Cells], dict[str, ScanError]]:
        """Columns of the scans whose patient is known, and reasons for the others.

        Args:
            paths: scans.
            names: further names that a table may know a scan by, such as a PatientID or ``sub-01``, of the scans that
                name their patient themselves. Their columns lack ``patient_id`` where neither pattern nor table has it.

        Raises:
            ConfigError: a table fits none of the scans.
        """
        names = names or {}
        known: dict[str, Cells] = {}
        unknown: dict[str, ScanError] = {}
        for path in paths:
            cells = self.pattern.match(path) if self.pattern else {}
            if cells is None and path not in names:
                unknown[path] = _unknown("the pattern does not fit the path")
            elif not self.asked and path not in names:
                unknown[path] = _unknown("a file that does not name one", _HOW)
            else:
                known[path] = cells or {}
        for table in self.tables:
            rows = {path: table.find(path, known[path].get(PATIENT_ID)) for path in known}
            several = table.ambiguous(rows.items())
            rows |= {path: table.find_name(names[path]) for path, row in rows.items() if row is None and path in names}
            if known and all(row is None for row in rows.values()):
                got = f"none of its {len(table.rows)} rows fits any of {len(known)} scans"
                fix = (
                    "Check the columns (--volume-column, --patient-column), and that names are relative to the folder."
                )
                raise _bad_table(table.path, got, "rows that name scans of the folder, or their patients", fix)
            for path, row in rows.items():
                found = {} if row is None else table.rows[row]
                if not table.by_volume and PATIENT_ID not in known[path]:
                    # The row was found by the scan's own name of its patient, which says more than the row's.
                    found = {name: cell for name, cell in found.items() if name != PATIENT_ID}
                clash = [name for name, cell in found.items() if known[path].get(name, cell) != cell]
                if row in several:
                    unknown[path] = _unknown("the table's name for it fits several files")
                elif clash:
                    unknown[path] = _unknown(f"two sources differ in {', '.join(clash)}")
                elif PATIENT_ID not in found and PATIENT_ID not in known[path] and path not in names:
                    unknown[path] = _unknown(
                        "the table has no row for it" if row is None else "its row names no patient"
                    )
                else:
                    known[path] |= found
            known = {path: cells for path, cells in known.items() if path not in unknown}
            self.unused_rows += len(table.rows) - len(set(rows.values()) - {None})
            self.without_row += sum(rows[path] is None for path in known)
        return known, unknown


def _unknown(got: str, wanted: str = "one patient for every scan") -> ScanError:
    fix = "Complete the table, or widen the pattern."
    return ScanError("The patient is unknown.", got=got, wanted=wanted, fix=fix)


def _simple(pattern: str) -> str:
    """A regular expression for ``{patient}/{study}_*.nii.gz``."""
    seen: set[str] = set()
    parts = []
    for part in re.split(r"(\{[^{}]*\}|\*)", pattern):
        name = part[1:-1]
        if part == "*":
            parts.append("[^/]*?")
        elif not part.startswith("{"):
            parts.append(re.escape(part))
        elif name in seen:
            parts.append(f"(?P={name})")
        else:
            parts.append(f"(?P<{name}>[^/]+?)")
            seen.add(name)
    # Short matches need an end to reach for, and a name must not start in the middle of a component.
    start = "(?:^|/)" if pattern.startswith(("{", "*")) else ""
    end = r"(?:\.(?:nii(?:\.gz)?|nrrd|nhdr|mha|mhd|dcm)$|/|$)"
    if pattern.lower().endswith(("/", *VOLUME_SUFFIXES, ".dcm")):
        end = "" if pattern.endswith("/") else "$"
    return start + "".join(parts) + end


def _read(path: Path) -> tuple[list[int], list[dict[str, str]]]:
    """Line numbers and cells by column name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.split("\n", 1)[0]
        delimiter = max("\t;,", key=first.count)
        reader = csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fix = "Check the path, and save the table as CSV in UTF-8."
        raise _bad_table(path, str(error), "a table in UTF-8 text", fix) from error
    header, numbers, rows = (lines or [(0, [])])[0][1], [n for n, _ in lines[1:]], [cells for _, cells in lines[1:]]
    uneven = next((number for number, cells in lines if len(cells) != len(header)), None)
    if uneven is not None:
        got = f"line {uneven} has another number of cells than the header"
        raise _bad_table(path, got, f"{len(header)} cells a line", "Repair the line; quote cells that hold commas.")
    names = [name for name in header if name]
    if not rows or not names or len(set(names)) < len(names):
        got = f"{len(rows)} rows with columns {', '.join(names) or '(none)'}"
        raise _bad_table(path, got, "a header line with different names, and at least one row", "Repair the table.")
    return numbers, [{name: cell for name, cell in zip(header, cells, strict=True) if name} for cells in rows]


def _tidy(name: str) -> str:
    name = name.replace("\\", "/")
    return name[2:] if name.startswith("./") else name


def _bad_table(path: Path, got: str, wanted: str, fix: str) -> ConfigError:
    return ConfigError("The table of patients cannot be used.", got=f"{path}: {got}", wanted=wanted, fix=fix)


def _bad_pattern(pattern: str, got: str) -> ConfigError:
    return ConfigError(
        "The pattern for patients cannot be used.",
        got=f"{pattern!r}: {got}",
        wanted="a form such as {patient}/{study}_{sequence}.nii.gz, or a regular expression with (?P<patient>...)",
        fix="Name the piece of the path that identifies the patient.",
    )
