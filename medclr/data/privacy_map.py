"""References: opaque names for components of paths, and the private map that leads back.

A reference is a keyed digest of the component that it stands for, so that one component always gets one reference, two
processes need not agree on anything, and a map that was tampered with does not fit. It stands for one component, which
is never ``..`` and never a path: no reference leads out of a folder.
"""

from __future__ import annotations

import atexit
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from medclr.data.privacy_key import (
    HOME_VARIABLE,
    MAP_FILE,
    keyed_digest,
    make_home,
    make_private_file,
    private_home,
    read_key,
    refuse_readable,
)
from medclr.data.privacy_match import private_components, suffix_of
from medclr.errors import ConfigError

_REFERENCE = re.compile(r"ref-[0-9a-f]{20}")
_TABLES = (
    "CREATE TABLE IF NOT EXISTS components(reference TEXT PRIMARY KEY, name BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS facts(name TEXT PRIMARY KEY, value TEXT NOT NULL)",
)
_PENDING = 5000
_SECONDS = 1.0
_WAIT = 60.0
"""Seconds to wait for another process that writes."""


def has_reference(path: str) -> bool:
    """Whether a path holds what looks like a reference."""
    return "ref-" in path and any(_REFERENCE.match(part) for part in path.split("/"))


def locate(path: str | os.PathLike[str]) -> str:
    """Where a file of a datalist lies: the path itself, or, where that holds references, what they stand for.

    What is there under its very name is taken as it is: a copy or a prediction may be named by a reference.

    Raises:
        ConfigError: a reference is unknown, or the private map or its key is missing, damaged or readable by others.
    """
    text = os.fspath(path)
    if not has_reference(text) or os.path.lexists(text):
        return text
    find = References().resolve
    done = ""
    for place, part in enumerate(text.split("/")):
        done = part if place == 0 else f"{done}/{part}"
        if _REFERENCE.match(part) and not os.path.lexists(done):
            done = f"{done[: len(done) - len(part)]}{find(part)}"
    return done


class References:
    """Hides components of relative paths, and finds the way back.

    New references are kept in memory for a moment and written together: at the latest by :meth:`flush`, by leaving
    ``with``, and at the end of the process. Objects of one private folder share what they know. Safe for several
    processes and threads.

    Args:
        home: the private folder; :func:`private_home` by default. Only :meth:`hide` makes anything there.

    Example:
        >>> with References() as references:  # doctest: +SKIP
        ...     references.hide("DOE_JOHN/19870203/scan.nii.gz", ["Doe^John", "19870203"])
        'ref-3f0c94d1b2a5e6978c10/ref-0b1c2d3e4f5a69788796/scan.nii.gz'
    """

    def __init__(self, home: Path | None = None) -> None:
        self._map = _map_of(os.path.abspath(private_home() if home is None else home))

    def hide(self, path: str, private: Iterable[str]) -> str:
        """A relative path in which components that match are replaced, as are those that look like references.

        Args:
            path: relative to the indexed folder, with ``/``.
            private: names, ids, dates and UIDs as headers and tables write them
                (:func:`medclr.data.privacy_match.private_components`).

        Returns:
            the path; a replaced file name keeps a suffix that is in :data:`medclr.data.privacy_match.SUFFIXES`.

        Raises:
            ConfigError: the private folder, the key or the map cannot be used.
        """
        parts = path.split("/")
        bare = [part[: len(part) - len(suffix_of(part))] for part in parts]
        hidden = private_components(bare, private)
        return "/".join(
            self._map.name(part) if part not in ("", ".", "..") and (private or _REFERENCE.match(part)) else part
            for part, private in zip(parts, hidden, strict=True)
        )

    def hide_all(self, paths: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
        """Several paths, each with what is private of it; written when this returns."""
        done = [self.hide(path, private) for path, private in paths]
        self.flush()
        return done

    def resolve(self, path: str) -> str:
        """The path with every reference replaced by what it stands for.

        Raises:
            ConfigError: a reference is unknown, or the map or its key is missing, damaged or readable by others.
        """
        return "/".join(self._map.find(part) if _REFERENCE.match(part) else part for part in path.split("/"))

    def flush(self) -> None:
        """Write what is new to the disk."""
        self._map.flush()

    def __enter__(self) -> References:
        """The object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is new."""
        self.flush()


class _Map:
    """The SQLite file of one private folder, and what this process knows of it."""

    def __init__(self, home: Path) -> None:
        self.home, self.path = home, home / MAP_FILE
        self._begin()
        atexit.register(self.flush)

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._key: bytes | None = None
        self._database: sqlite3.Connection | None = None
        self._references: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._pending: dict[str, str] = {}
        self._written = time.monotonic()

    def name(self, part: str) -> str:
        """The reference of a component."""
        with self._mine():
            known = self._references.get(part)
            if known is None:
                known = self._references[part] = self._digest(self._read_key(create=True), part)
                self._pending[known] = part
            if len(self._pending) >= _PENDING or time.monotonic() - self._written > _SECONDS:
                self.flush()
            return known

    def find(self, reference: str) -> str:
        """The component of a reference."""
        with self._mine():
            known = self._names.get(reference) or self._pending.get(reference)
            if known is None:
                known = self._names[reference] = self._look_up(reference)
            return known

    def flush(self) -> None:
        """Write pending references."""
        if os.getpid() != self._process:
            return  # they are the parent's, which writes them
        with self._lock:
            self._written = time.monotonic()
            if not self._pending:
                return
            pending, self._pending = self._pending, {}
            known, self._references = self._references, {}  # whatever is not written is no reference
            database = self._open(create=True)
            try:
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    database.executemany(
                        "INSERT OR IGNORE INTO components VALUES (?, ?)",
                        [(reference, part.encode("utf-8", "surrogateescape")) for reference, part in pending.items()],
                    )
            except sqlite3.Error as error:
                raise self._unusable(error) from None
            self._references = known

    def _mine(self) -> threading.RLock:
        """The lock, in whatever process this is: a connection must not cross a fork."""
        if os.getpid() != self._process:
            self._abandoned = self._database  # closing it here would drop the locks of the parent
            self._begin()
        return self._lock

    def _read_key(self, *, create: bool) -> bytes:
        if self._key is None:
            self._key = read_key(self.home, create=create)
        return self._key

    def _look_up(self, reference: str) -> str:
        bare = reference[: _REFERENCE.match(reference).end()]  # type: ignore[union-attr]  # the caller has matched it
        try:
            row = (
                self._open(create=False)
                .execute("SELECT name FROM components WHERE reference = ?", (reference,))
                .fetchone()
            )
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if row is None:
            raise ConfigError(
                "A path of the datalist holds a reference that the private map does not know.",
                got=f"{bare} in {self.path}",
                wanted="the map of the machine and user that indexed the scans",
                fix=f"Set {HOME_VARIABLE} to the folder that holds key and {MAP_FILE} of the indexing, or index again.",
            )
        part = row[0].decode("utf-8", "surrogateescape") if isinstance(row[0], bytes) else ""
        forbidden = part in ("", ".", "..") or "/" in part or "\0" in part
        if forbidden or self._digest(self._read_key(create=False), part) != reference:
            raise ConfigError(
                "The private map does not fit its key.",
                got=f"another name under {bare} in {self.path}",
                wanted="the map and the key of one private folder, as medclr wrote them",
                fix="Restore both from the same copy; without one, move both away and index again.",
            )
        return part

    def _open(self, *, create: bool) -> sqlite3.Connection:
        if self._database is not None:
            return self._database
        key = self._read_key(create=create)
        try:
            if create:
                make_home(self.home)
                make_private_file(self.path)
            if not self.path.exists():
                raise ConfigError(
                    "The private map of references is missing.",
                    got=f"no file {self.path}",
                    wanted="the map of the machine and user that indexed the scans",
                    fix=f"Set {HOME_VARIABLE} to the folder that holds it, restore it, or index again.",
                )
            refuse_readable(self.path, "The private map of references")
            database = sqlite3.connect(
                f"{self.path.as_uri()}?mode=rw", uri=True, timeout=_WAIT, check_same_thread=False, isolation_level=None
            )
            if create:
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    for statement in _TABLES:
                        database.execute(statement)
                    database.execute("INSERT OR IGNORE INTO facts VALUES ('key', ?)", (_mark(key),))
            marks = database.execute("SELECT value FROM facts WHERE name = 'key'").fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        except OSError as error:
            raise self._unusable(error.strerror) from None
        if marks != [(_mark(key),)]:
            database.close()
            raise ConfigError(
                "The private map was made with another key.",
                got=str(self.home),
                wanted="the map and the key of one private folder",
                fix="Restore both from the same copy; without one, move both away and index again.",
            )
        self._database = database
        return database

    def _digest(self, key: bytes, part: str) -> str:
        return f"ref-{keyed_digest(key, 'path', part).hex()[:20]}{suffix_of(part).lower()}"

    def _unusable(self, error: object) -> ConfigError:
        return ConfigError(
            "The private map of references cannot be used.",
            got=f"{self.path}: {error}",
            wanted="the map as medclr wrote it, in a folder with space left",
            fix="Restore it from a copy; without one, move it away and index again.",
        )


@lru_cache(maxsize=16)
def _map_of(home: str) -> _Map:
    return _Map(Path(home))


def _mark(key: bytes) -> str:
    return keyed_digest(key, "map").hex()[:20]
