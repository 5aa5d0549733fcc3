"""What is known of the files of a folder, in a private SQLite file that outlives an interrupted run.

It holds headers, hence names and dates: it lies in the private folder of :mod:`medclr.data.privacy`, readable by its
owner alone, and whoever wants it gone removes it (``--fresh`` begins with an empty one).
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from medclr.data.privacy import private_home
from medclr.data.walk import REFUSED, Found
from medclr.disk import claimed
from medclr.errors import ConfigError, ScanError

NEW: Final = "new"
GOOD: Final = "good"
BAD: Final = "bad"

_FORM = 1
_PAGE = 2000
_SECONDS = 1.0
_TABLES = """
CREATE TABLE IF NOT EXISTS facts(name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files(
    path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, seen INTEGER, kind TEXT, state TEXT, asked TEXT,
    problem TEXT, got TEXT, wanted TEXT, series TEXT, instance TEXT, patient TEXT, data TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_state ON files(state, path);
CREATE INDEX IF NOT EXISTS by_series ON files(series, path);
CREATE INDEX IF NOT EXISTS by_instance ON files(instance, path);
CREATE TABLE IF NOT EXISTS series(name TEXT PRIMARY KEY, seen INTEGER, print TEXT, data TEXT);
DROP TABLE IF EXISTS refusals;
CREATE TABLE refusals(path TEXT PRIMARY KEY, problem TEXT, got TEXT, wanted TEXT) WITHOUT ROWID;
DROP TABLE IF EXISTS left_out;
CREATE TABLE left_out(path TEXT PRIMARY KEY) WITHOUT ROWID;
DROP TABLE IF EXISTS hidden;
CREATE TABLE hidden(part TEXT PRIMARY KEY) WITHOUT ROWID;
DROP TABLE IF EXISTS scans;
CREATE TABLE scans(
    number INTEGER PRIMARY KEY, place TEXT, volume TEXT, label TEXT, given TEXT, native TEXT, patient TEXT, study TEXT,
    series TEXT, date TEXT, birth TEXT, sex TEXT, content TEXT, cells TEXT, grid TEXT);
CREATE INDEX scans_by_place ON scans(place, number);
CREATE INDEX scans_by_content ON scans(content);
CREATE INDEX scans_by_person ON scans(given, native);
CREATE INDEX scans_by_patient ON scans(patient);
"""


class Scan(NamedTuple):
    """A usable scan, as the table ``scans`` holds it; a text is empty where nothing is known."""

    place: str
    """The file, or the first of its files, relative to the folder."""
    volume: str | None
    """A DICOM volume; None where the file holds the scan."""
    label: str | None
    given: str | None
    """The patient by the user's word, as :func:`medclr.data.index_people.person` writes one."""
    native: str | None
    """The patient by the scan's own."""
    study: str
    series: str
    date: str
    birth: str
    sex: str
    content: str
    cells: str
    """Other columns of the row, as JSON."""
    grid: str
    """Spacing, shape and voxel type, as JSON."""


class Update(NamedTuple):
    """What was found out about a file."""

    kind: str
    state: str
    asked: str = ""
    error: ScanError | None = None
    series: str | None = None
    instance: str | None = None
    patient: str | None = None
    data: str | None = None


class Store:
    """The working store of one folder; :meth:`open` makes it.

    Args:
        path: the SQLite file.
        settings: what else its content depends on; another text begins anew.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path = path
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.execute("PRAGMA synchronous=NORMAL")
        self.database.execute("PRAGMA secure_delete=ON")
        self.database.executescript(_TABLES)
        facts = f"{_FORM} {version('medclr')} {settings}"
        if self.fact("form") != facts:
            self.database.executescript("DELETE FROM files; DELETE FROM series; DELETE FROM facts;")
            self.set_fact("form", facts)
        self.run = int(self.fact("run") or 0) + 1
        self.set_fact("run", str(self.run))
        self._written = time.monotonic()
        self.database.execute("BEGIN")

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, *, settings: str = "", fresh: bool = False, home: Path | None = None
    ) -> Iterator[Store]:
        """The store of a folder, for one process at a time; what was found out stays, however this ends.

        Args:
            folder: the folder that is indexed.
            settings: as above.
            fresh: forget what is known.
            home: where it lies, by default the private folder.

        Raises:
            ConfigError: another process has it open, or the file cannot be made or read.
        """
        name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:24]
        path = (home or private_home()) / "index" / f"{name}.sqlite"
        store: Store | None = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with claimed(path.with_suffix(".lock")):
                if fresh:
                    for old in (path, path.with_name(f"{path.name}-journal")):
                        old.unlink(missing_ok=True)
                try:
                    store = cls(path, settings)
                except sqlite3.DatabaseError:
                    # Killed while it wrote, on a file system that did not keep its word: begin anew.
                    path.unlink(missing_ok=True)
                    store = cls(path, settings)
                try:
                    yield store
                finally:
                    store.close()
        except (OSError, sqlite3.OperationalError) as error:
            raise ConfigError(
                "The working store of the index cannot be used.",
                got=f"{getattr(error, 'strerror', None) or error}",
                wanted=f"a file in {path.parent} for this process alone",
                fix="Wait for the other run to end, or set MEDCLR_HOME to a folder with space that you may write to.",
            ) from error

    def close(self) -> None:
        """Keep what was found out."""
        self.database.execute("COMMIT")
        self.database.close()

    def keep(self, now: bool = False) -> None:
        """Put what was found out on the disk, if the last time was a while ago."""
        if now or time.monotonic() - self._written > _SECONDS:
            self.database.execute("COMMIT")
            self.database.execute("BEGIN")
            self._written = time.monotonic()

    def fact(self, name: str) -> str | None:
        """A noted fact."""
        found = self.database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def set_fact(self, name: str, value: str) -> None:
        """Note a fact."""
        self.database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def refresh(self, files: Iterable[Found], tell: Callable[[], object] = lambda: None) -> None:
        """Take in the files that are there: a file of unchanged size and time keeps what is known of it."""
        upsert = """
            INSERT INTO files(path, size, mtime, seen, state) VALUES (?, ?, ?, ?, 'new')
            ON CONFLICT(path) DO UPDATE SET seen = excluded.seen, size = excluded.size, mtime = excluded.mtime,
            state = CASE WHEN size = excluded.size AND mtime = excluded.mtime THEN state ELSE 'new' END"""
        for found in files:
            time_of = found.mtime if found.refused is None else -1
            self.database.execute(upsert, (found.path, found.size, time_of, self.run))
            if found.refused is not None:
                self.update(found.path, Update(REFUSED, BAD, error=found.refused))
            self.keep()
            tell()
        self.database.execute("DELETE FROM files WHERE seen != ?", (self.run,))
        self.keep(now=True)

    def update(self, path: str, update: Update) -> None:
        """Note what was found out about a file."""
        error = update.error
        reason = (None,) * 3 if error is None else (error.problem, str(error.got), str(error.wanted))
        self.database.execute(
            "UPDATE files SET kind = ?, state = ?, asked = ?, problem = ?, got = ?, wanted = ?, series = ?, "
            "instance = ?, patient = ?, data = ? WHERE path = ?",
            (
                update.kind,
                update.state,
                update.asked,
                *reason,
                update.series,
                update.instance,
                update.patient,
                update.data,
                path,
            ),
        )
        self.keep()

    def refuse(self, path: str, error: ScanError) -> None:
        """Note why a file is not used this time; the first reason stays."""
        self.database.execute(
            "INSERT OR IGNORE INTO refusals VALUES (?, ?, ?, ?)",
            (path, error.problem, str(error.got), str(error.wanted)),
        )

    def pages(self, select: str, arguments: tuple[Any, ...] = (), key: int = 0, start: Any = "") -> Iterator[Any]:
        """Rows of a query, a page at a time, so that the table may change meanwhile.

        Args:
            select: with ``{after}`` for the comparison with the last key seen and without ORDER BY's end; for example
                ``SELECT path FROM files WHERE path > ? ORDER BY path``. Its last argument is the key.
            arguments: the others, before that one.
            key: which column is the key.
            start: before the first key.
        """
        last = start
        while True:
            page = self.database.execute(f"{select} LIMIT {_PAGE}", (*arguments, last)).fetchall()
            yield from page
            if len(page) < _PAGE:
                return
            last = page[-1][key]

    def add(self, scan: Scan) -> None:
        """Note a usable scan."""
        names = ", ".join(Scan._fields)
        marks = ", ".join("?" * len(Scan._fields))
        self.database.execute(f"INSERT INTO scans({names}) VALUES ({marks})", scan)

    def number(self, select: str, arguments: tuple[Any, ...] = ()) -> int:
        """The single number that a query gives."""
        return int(self.database.execute(select, arguments).fetchone()[0] or 0)
