"""What indexing has found, and writing it: rows pass through one at a time, from a nameless file on the disk."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from medclr.data.datalist import DATASET_DIR, Datalist, Row
from medclr.data.dicom_series import SeriesVolume
from medclr.data.dicom_volume import write_series
from medclr.data.files import dump_json, refuse_unwritable, writing
from medclr.data.index_export import copy_names, export_scans
from medclr.data.index_processes import progress_bar
from medclr.data.index_rows import Made
from medclr.data.privacy import private_home
from medclr.data.rows import SERIES_SUFFIX
from medclr.disk import replacing
from medclr.errors import DatalistError, ScanError
from medclr.keys import IMAGE, LABEL, TRAINING

QUARANTINE_FILE = "quarantine.json"
"""Written beside the datalist."""


class Quarantined(NamedTuple):
    """A file that is not in the datalist."""

    path: str
    """Relative to the folder."""
    reason: str
    problem: str
    """The first sentence of the reason, which is the same for the same kind of problem."""


class IndexResult:
    """What :func:`medclr.data.index.index` found.

    Args:
        rows: of all usable scans, by path.
        quarantine: path, reason and problem of every other file, by path.
        summary: counts and ranges, as described at :func:`medclr.data.index.index`.
        root: the folder.
        shown: the components of the folder's own path, as they may be shown.
    """

    def __init__(
        self,
        rows: Iterable[Made],
        quarantine: Iterable[tuple[str, str, str]],
        summary: dict[str, Any],
        root: Path,
        shown: list[str],
    ) -> None:
        self.summary, self.root = summary, root
        pairs = zip(root.parts, shown, strict=True)
        private = next((place for place, (part, seen) in enumerate(pairs) if part != seen), len(shown))
        self._top, self._below = Path(*root.parts[:private]), "/".join(shown[private:])
        self.has_series = self.has_files = False
        self._rows = _spool(self._noted(rows))
        self._quarantine = _spool(quarantine)

    @property
    def quarantine(self) -> list[Quarantined]:
        """Every file that is not used, by path."""
        return [Quarantined(*entry) for entry in _replay(self._quarantine)]

    @property
    def datalist(self) -> Datalist:
        """All usable scans, under ``training``, in memory.

        Raises:
            DatalistError: there are DICOM volumes, which need series files: :meth:`write`, then ``read_datalist``.
        """
        if self.has_series:
            raise DatalistError(
                "DICOM volumes are in a datalist once it is written.",
                got="series that have no file yet",
                wanted="a written datalist",
                fix="Call write(path), then read_datalist(path).",
            )
        rows = [self._row(made, self.root) for made in self.made()]
        return Datalist({TRAINING: rows}, self.root, extra=self._extra())

    def made(self) -> Iterator[Made]:
        """The rows, one after the other."""
        return (Made(*fields) for fields in _replay(self._rows))

    def write(
        self, output: str | Path, *, export: str | Path | None = None, workers: int = 1, progress: bool = False
    ) -> None:
        """Write the datalist; before it ``quarantine.json`` and, for DICOM, a folder of series files beside it.

        Args:
            output: the datalist; the folder is named after it, ``NAME_series``.
            export: a folder for pseudonymous NIfTI copies (:mod:`medclr.data.index_export`); rows then name those.
            workers: processes that copy.
            progress: show a bar on stderr while they do.

        Raises:
            DatalistError: a file cannot be written.
        """
        output = Path(os.path.abspath(output))
        refuse_unwritable(output)
        failed: dict[int, ScanError] = {}
        if export is not None:
            with progress_bar(progress) as bar:
                told = bar.add_task("Copies", total=self.summary["scans"])
                tell = partial(bar.advance, told)
                failed = export_scans(self.made(), self.root, Path(export), workers=workers, tell=tell)
        series = output.with_name(f"{output.stem}_series")
        folder = Path(os.path.realpath(output.parent))
        kept: set[str] = set()
        with _writing(output.with_name(QUARANTINE_FILE)) as lines:
            lines.items("[", self._entries(failed), "]")
        root = self._datalist_root(folder, export)
        with _writing(output) as lines:
            content = dict(self._extra())
            if root != folder:
                nested = folder.is_relative_to(root) or root.is_relative_to(folder)
                content[DATASET_DIR] = os.path.relpath(root, folder) if nested else str(root)
            head = "".join(f"  {json.dumps(key)}: {dump_json(value, key)},\n" for key, value in content.items())
            numbered = ((number, made) for number, made in enumerate(self.made()) if number not in failed)
            if export is None:
                rows = (self._written(made, root, series, kept) for _, made in numbered)
            else:
                copies = Path(os.path.realpath(export))
                rows = (self._copied(number, made, root, copies) for number, made in numbered)
            lines.items(f'{{\n{head}  "{TRAINING}": [', rows, "  ]\n}", indent="    ")
        if series.is_dir():
            for old in series.glob(f"*{SERIES_SUFFIX}"):
                if old.name not in kept:
                    old.unlink()

    def quarantined(self) -> Iterator[tuple[str, str, str]]:
        """The entries of the quarantine, one after the other."""
        return _replay(self._quarantine)

    def _entries(self, failed: dict[int, ScanError]) -> Iterator[dict[str, str]]:
        for path, reason, _ in self.quarantined():
            yield {"path": path, "reason": reason}
        for number, made in enumerate(self.made()) if failed else ():
            if number in failed:
                error = failed[number]
                path = made.file or f"{made.name}{SERIES_SUFFIX}"
                yield {"path": path, "reason": f"{error.problem} Got {error.got}; wanted {error.wanted}."}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IndexResult):
            return NotImplemented
        mine, others = ((found.root, found.summary, list(found.made()), found.quarantine) for found in (self, other))
        return mine == others

    __hash__ = None  # type: ignore[assignment]

    def _noted(self, rows: Iterable[Made]) -> Iterator[Made]:
        for made in rows:
            self.has_series |= made.volume is not None
            self.has_files |= made.file is not None
            yield made

    def _extra(self) -> dict[str, object]:
        return {"name": self.root.name} if not self._below else {}

    def _copied(self, number: int, made: Made, root: Path, copies: Path) -> Row:
        image, label = copy_names(number, made)
        paths = {IMAGE: image, LABEL: label}
        return {**{key: os.path.relpath(copies / name, root) for key, name in paths.items() if name}, **made.row}

    def _datalist_root(self, folder: Path, export: str | Path | None) -> Path:
        """The folder that holds all that rows name, and whose own path may be shown."""
        if export is not None:
            copies = Path(os.path.realpath(export))
            return folder if copies.is_relative_to(folder) else Path(os.path.commonpath([copies, folder]))
        if not self.has_files:
            return folder
        top, root = (Path(os.path.realpath(path)) for path in (self._top, self.root))
        if folder.is_relative_to(root):
            return root
        if not self.has_series and top == root:
            return top
        return Path(os.path.commonpath([top, folder]))

    def _from(self, folder: Path) -> tuple[Path, str]:
        """A folder that files of another may name, and where below it all files lie, as it may be shown."""
        root = Path(os.path.realpath(self.root))
        if folder.is_relative_to(root) or not self._below:
            return root, ""
        return Path(os.path.realpath(self._top)), self._below

    def _row(self, made: Made, root: Path) -> Row:
        label = {} if made.label is None else {LABEL: str(root / made.label)}
        return {IMAGE: str(root / str(made.file)), **label, **made.row}

    def _written(self, made: Made, root: Path, series: Path, kept: set[str]) -> Row:
        """A row with paths relative to the root; the series file of a DICOM volume is written."""
        top, below = self._from(root if made.volume is None else series.parent)
        if made.volume is None:
            prefix = os.path.join(os.path.relpath(top, root), below)
            names = {IMAGE: made.file, LABEL: made.label}
            paths = {key: os.path.normpath(os.path.join(prefix, name)) for key, name in names.items() if name}
            return {**paths, **made.row}
        name = f"{made.name}{SERIES_SUFFIX}"
        kept.add(name)
        volume = SeriesVolume.from_json(made.volume)
        slices = tuple((os.path.join(below, path), frame) for path, frame in volume.slices)
        write_series(replace(volume, slices=slices), series / name, top)
        return {IMAGE: os.path.relpath(os.path.realpath(series / name), root), **made.row}


@contextmanager
def _writing(path: Path) -> Iterator[_Lines]:
    with writing(path), replacing(path) as file:
        yield _Lines(file)


def _spool(items: Iterable[tuple[Any, ...]]) -> IO[bytes]:
    """Tuples in a file that has no name, so that it goes with this process."""
    file = tempfile.TemporaryFile(dir=private_home())  # noqa: SIM115  it stays open as long as the result is there
    for item in items:
        file.write(f"{json.dumps(item)}\n".encode())
    return file


def _replay(file: IO[bytes]) -> Iterator[tuple[Any, ...]]:
    place = 0
    while True:
        file.seek(place)
        line = file.readline()
        if not line:
            return
        place = file.tell()
        yield tuple(json.loads(line))


class _Lines:
    """A JSON list with one item a line, written as it comes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def items(self, begin: str, items: Iterable[object], end: str, indent: str = " ") -> None:
        self.file.write(begin.encode())
        separator = "\n"
        for item in items:
            self.file.write(f"{separator}{indent}{dump_json(item, TRAINING)}".encode())
            separator = ",\n"
        self.file.write(f"\n{end}\n".encode())
