"""BIDS data sets in a folder: whose scan a file is, of which session, and what the tables say of both.

A data set is recognised by its ``dataset_description.json``, wherever it lies. Subject labels belong to one data set:
``sub-01`` of two data sets are two patients. What lies under ``derivatives/`` and ``sourcedata/`` shows the subjects of
the data set above, and is left out unless asked for, as tools for BIDS do.

Reference: Gorgolewski et al., The brain imaging data structure, 2016, doi:10.1038/sdata.2016.44.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from medclr import keys
from medclr.data.cells import Cells, is_missing
from medclr.data.privacy import parse_date
from medclr.errors import ScanError

DESCRIPTION: Final = "dataset_description.json"
DIAGNOSIS: Final = "diagnosis"

_ASIDE = ("derivatives", "sourcedata", "code", "stimuli")
_SEGMENTATIONS = ("mask", "dseg", "probseg")
_MODALITIES = {
    "anat": "MR",
    "func": "MR",
    "dwi": "MR",
    "fmap": "MR",
    "perf": "MR",
    "mrs": "MR",
    "pet": "PT",
    "ct": "CT",
}
_COLUMNS = {
    keys.AGE: ("age", "age_at_scan", "age_at_session"),
    keys.SEX: ("sex", "gender"),
    keys.DAYS: ("days", "days_since_baseline", "days_from_baseline", "days_since_first"),
    DIAGNOSIS: ("diagnosis", "diagnostic_group", "dx", "group"),
    keys.SITE: ("site", "site_id"),
}
_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
_TIMES = ("acq_time", "session_date", "acq_date")
_LARGEST_TABLE = 1 << 26


Table = dict[str, list[dict[str, str]]]


class BidsScan(NamedTuple):
    """What BIDS says of a scan."""

    subject: str
    """With its ``sub-``."""
    session: str
    """With its ``ses-``; empty where there is one session only."""
    dataset: str
    """Tells subjects of one data set from those of another."""
    cells: Cells
    """Columns of the datalist that are known."""
    date: str
    """Of the scan, YYYY-MM-DD, or empty."""


class BidsDatasets:
    """The data sets of a folder.

    Args:
        root: the folder.
        descriptions: paths of every ``dataset_description.json``, relative to it.
    """

    def __init__(self, root: Path, descriptions: Iterable[str]) -> None:
        self._root = root
        self._roots = {path.rpartition("/")[0] for path in descriptions}
        self._tables: dict[Path, Table] = {}
        self.unreadable: set[str] = set()
        """Tables that could not be read, relative to the folder."""
        # Data sets of one name are told apart by where they lie; the first keeps the plain name.
        self._spaces: dict[str, str] = {}
        for home in sorted({self._home(place) for place in self._roots}):
            name = self._name(home)
            self._spaces[home] = f"{name}/{home}" if name in self._spaces.values() else name

    def __len__(self) -> int:
        return len(self._roots)

    def find(self, path: str) -> BidsScan | None:
        """What BIDS says of a file, or None where it lies in no data set or names no subject."""
        inner = self._inner(path)
        if inner is None:
            return None
        home = self._home(inner)
        parts = path[len(home) + 1 if home else 0 :].split("/")
        entities = dict(re.findall(r"(?:^|[/_])(sub|ses)-([A-Za-z0-9]+)(?=[_./]|$)", "/".join(parts)))
        if "sub" not in entities:
            return None
        subject, session = f"sub-{entities['sub']}", f"ses-{entities['ses']}" if "ses" in entities else ""
        base = self._root / home
        all_sessions = self._table(base / "sessions.tsv", "participant_id").get(_bare(subject), [])
        rows = [
            *self._table(base / "participants.tsv", "participant_id").get(_bare(subject), []),
            *(row for row in all_sessions if _bare(row.get("session_id", "")) == _bare(session)),
            *self._table(base / subject / f"{subject}_sessions.tsv", "session_id").get(_bare(session), []),
        ]
        folder = base / subject / session if session else base / subject
        stem = f"{subject}_{session}" if session else subject
        name = path[len(folder.relative_to(self._root).as_posix()) + 1 :]
        rows += self._table(folder / f"{stem}_scans.tsv", "filename").get(name, [])
        cells: Cells = {}
        day = ""
        for row in rows:
            cells |= _known(row)
            day = next((found for column in _TIMES if (found := _day(row.get(column, "")))), day)
        suffix = parts[-1].split(".")[0].rpartition("_")[2]
        datatype = parts[-2] if len(parts) > 1 else ""
        if datatype in _MODALITIES:
            cells[keys.MODALITY] = _MODALITIES[datatype]
            cells[keys.SEQUENCE] = suffix
        return BidsScan(subject, session, self._spaces[home], cells, day)

    def aside(self, path: str, derivatives: bool = False) -> ScanError | None:
        """Why a file of a data set is no raw scan: it is a segmentation, or lies in a folder that is kept apart.

        Args:
            path: the file.
            derivatives: let folders that are kept apart count too.
        """
        inner = self._inner(path)
        if inner is None:
            return None
        home = self._home(inner)
        parts = path[len(home) + 1 if home else 0 :].split("/")
        apart = next((part for part in parts[:-1] if part in _ASIDE), None)
        suffix = parts[-1].split(".")[0].rpartition("_")[2]
        if apart and not derivatives:
            return _left_out(f"it lies in {apart}", "the option --derivatives")
        if suffix in _SEGMENTATIONS:
            return _left_out(f"a segmentation by its name ({suffix})", "a template for labels, --labels")
        return None

    def _inner(self, path: str) -> str | None:
        """The innermost data set that holds a path."""
        folder = path
        while folder:
            folder = folder.rpartition("/")[0]
            if folder in self._roots:
                return folder
        return None

    def _home(self, place: str) -> str:
        """The data set whose subjects another one shows: the one above ``derivatives/`` or ``sourcedata/``."""
        parts = place.split("/") if place else []
        for number, part in enumerate(parts):
            above = "/".join(parts[:number])
            if part in _ASIDE and above in self._roots:
                return above
        return place

    def _name(self, place: str) -> str:
        """What tells a data set from others, wherever it is moved to; of a lone derived one, its parent's."""
        folder = self._root / place
        for above in (self._root / place).absolute().parents:
            if above.name in _ASIDE and (above.parent / DESCRIPTION).is_file():
                folder = above.parent
        try:
            content = json.loads((folder / DESCRIPTION).read_bytes()[:_LARGEST_TABLE])
            return f"bids:{str(content.get('DatasetDOI') or content.get('Name') or '').strip()}"
        except (OSError, ValueError, AttributeError, RecursionError):
            return "bids:"

    def _table(self, path: Path, column: str) -> Table:
        """Rows by the value of a column; labels without their ``sub-`` or ``ses-``."""
        if path in self._tables:
            return self._tables[path]
        table: Table = {}
        try:
            if path.is_file() and path.stat().st_size <= _LARGEST_TABLE:
                with path.open(encoding="utf-8-sig", newline="") as file:
                    for line in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                        row = {name: cell for name, cell in line.items() if name and isinstance(cell, str)}
                        table.setdefault(_bare(row.get(column, "")), []).append(row)
        except (OSError, ValueError, csv.Error):
            self.unreadable.add(path.relative_to(self._root).as_posix())
        if len(self._tables) > 64:  # paths come in order, so a subject's tables are soon done with
            self._tables = {known: rows for known, rows in self._tables.items() if known.parent.name[:4] != "sub-"}
        self._tables[path] = table
        return table


def _bare(label: str) -> str:
    return re.sub("^(sub|ses)-", "", label.strip())


def _known(row: dict[str, str]) -> Cells:
    plain = {name.strip().lower(): cell.strip() for name, cell in row.items() if not is_missing(cell)}
    cells: Cells = {}
    for column, names in _COLUMNS.items():
        found = next((plain[name] for name in names if name in plain), None)
        if found is not None:
            cells[column] = found
    if keys.SEX in cells:
        cells[keys.SEX] = _SEXES.get(cells[keys.SEX].lower(), cells[keys.SEX])
    for column in (keys.AGE, keys.DAYS):
        if column in cells and not re.fullmatch(r"-?\d+(\.\d*)?( ?\+)?", cells[column]):
            del cells[column]
    return cells


def _day(text: str) -> str:
    found = parse_date(text)
    return "" if found is None else found.isoformat()


def _left_out(got: str, option: str) -> ScanError:
    return ScanError(
        "The file is no raw scan of its BIDS data set.",
        got=got,
        wanted=f"raw scans, or {option}",
        fix="Give the option, or index the folder of such files on its own.",
    )
