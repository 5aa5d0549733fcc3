"""One row of a datalist: what each key may hold, and where its files lie.

A path may hold references (:mod:`medclr.data.privacy`). Rows keep them, and a file is looked for under its real path.
Errors name the place, and a path as the datalist spells it: never where that leads, and never another value.

Reading 100,000 rows costs one ``lstat`` a file; symbolic links are followed once a folder, not once a row.
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

from medclr.data.privacy import described, has_reference, locate
from medclr.errors import ConfigError, DatalistError
from medclr.keys import AGE, DAYS, IMAGE, LABEL, PATIENT_ID, SERIES_ID, STUDY_ID

Row = dict[str, Any]
"""A row: text, numbers, and under ``image`` perhaps a list."""

SERIES_SUFFIX: Final = ".dcmseries"
"""Of a series file, which lists the slices of one DICOM volume."""

VOLUME_SUFFIXES: Final = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", SERIES_SUFFIX)
"""File types of images and segmentations."""

LISTED_FILES: Final = 5
"""How many missing files an error names."""

_IDS = (PATIENT_ID, STUDY_ID, SERIES_ID)
_NUMBERS = (DAYS, AGE)
_FILE_NAME = re.compile(
    r"[/\\]|\.(nii|gz|nrrd|nhdr|mha|mhd|json|dcm|dcmseries|png|jpe?g|tiff?|bmp|npy|npz|h5|hdf5|img|hdr|mgz|mat|raw|vtk|vti|zip|pt)$",
    re.IGNORECASE,
)


def is_file_name(text: str) -> bool:
    """Whether a text under ``label`` names a file, rather than a class."""
    return _FILE_NAME.search(text) is not None


def located(section: str, number: int, key: str | None = None) -> str:
    """How errors name a place in a datalist: ``training[3], key 'image'``; rows are counted from 0."""
    return f"{section}[{number}]" + (f", key {shortened(key)}" if key else "")


class RowReader:
    """Checks rows and makes their paths absolute; :meth:`finish` reports what only shows at the end.

    Args:
        root: the folder that all files must lie in.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.abspath(root)
        self._inside = os.path.join(self._root, "")
        self._real_inside = os.path.join(os.path.realpath(root), "")
        self._real_folders: dict[str, str] = {}
        self._images: dict[str, str] = {}
        self._missing: list[tuple[str, str]] = []
        self._channels: tuple[int, str] | None = None

    def read(self, section: str, rows: list[object], must_exist: bool = True) -> list[Row]:
        """Checked copies of rows.

        Args:
            section: the name used in errors.
            rows: rows as JSON gives them.
            must_exist: whether a missing file is an error.

        Raises:
            DatalistError: naming section, row and key.
        """
        return [self._read_row(row, section, number, must_exist) for number, row in enumerate(rows)]

    def finish(self) -> None:
        """Report missing files, up to ``LISTED_FILES`` of them by name.

        Raises:
            DatalistError: at least one file of the rows read so far is missing.
        """
        if not self._missing:
            return
        shown = "; ".join(f"{place}: {path}" for place, path in self._missing[:LISTED_FILES])
        more = len(self._missing) - LISTED_FILES
        raise DatalistError(
            f"The datalist names {len(self._missing)} missing file(s).",
            got=shown + (f"; and {more} more" if more > 0 else ""),
            wanted=f"files below {self._root}",
            fix="Give the folder of the scans as dataset_dir, or index the folder anew.",
        )

    def _read_row(self, row: object, section: str, number: int, must_exist: bool) -> Row:
        if not isinstance(row, dict):
            raise DatalistError(
                f"{located(section, number)}: the row is no object.",
                got=described(row),
                wanted='{"image": path, "patient_id": text, ...}',
                fix="Write the row as an object that names its patient; `medclr index` does so.",
            )
        out: Row = dict(row)
        for key in (IMAGE, PATIENT_ID):
            if out.get(key) is None:
                raise DatalistError(
                    f"{located(section, number, key)}: the key is missing.",
                    got=f"keys {shortened(list(row))}",
                    wanted=f"{IMAGE} and {PATIENT_ID} in every row",
                    fix=f"Add {key!r} to the row.",
                )
        for key, value in row.items():
            place = located(section, number, key)
            if key == IMAGE:
                out[key] = self._read_image(value, place, must_exist)
            elif key == LABEL and isinstance(value, str) and is_file_name(value):
                out[key] = self._locate(value, place, must_exist)[0]
            else:
                out[key] = _read_scalar(key, value, place)
        return out

    def _read_image(self, value: object, place: str, must_exist: bool) -> str | list[str | None]:
        paths: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(path, str) or (path is None and isinstance(value, list)) for path in paths):
            raise DatalistError(
                f"{place}: the value has the wrong type.",
                got=described(value),
                wanted="a path, or a list of paths in which null marks an absent sequence",
                fix="Write paths as text.",
            )
        if not any(path is not None for path in paths):
            raise DatalistError(
                f"{place}: the row has no image.",
                got=described(value),
                wanted="at least one path",
                fix="Remove the row: a scan without any sequence is no scan.",
            )
        first = self._channels = self._channels or (len(paths), place)
        if len(paths) != first[0]:
            raise DatalistError(
                f"{place}: the number of channels differs from other rows.",
                got=f"{len(paths)} here, {first[0]} in {first[1]}",
                wanted="the same sequences, in the same order, in every row",
                fix="Write null for a sequence that a scan lacks.",
            )
        if isinstance(value, str):
            return self._claim(value, place, must_exist)
        return [None if path is None else self._claim(path, place, must_exist) for path in paths]

    def _claim(self, text: str, place: str, must_exist: bool) -> str:
        absolute, real = self._locate(text, place, must_exist)
        if real in self._images:
            raise DatalistError(
                f"{place}: the file is in the datalist twice.",
                got=f"{shortened(text)}, also in {self._images[real]}",
                wanted="each image file once",
                fix="Remove one of the two.",
            )
        self._images[real] = place
        return absolute

    def _locate(self, text: str, place: str, must_exist: bool) -> tuple[str, str]:
        """The absolute path below the root as the user knows it, and the one with links resolved."""
        if not text.lower().endswith(VOLUME_SUFFIXES):
            raise DatalistError(
                f"{place}: the file type is unknown.",
                got=_ending(text),
                wanted=f"a file name that ends in one of {', '.join(VOLUME_SUFFIXES)}",
                fix="Convert the file, or point to a file of a known type.",
            )
        joined = os.path.join(self._root, text)
        hidden = has_reference(text)
        dotted = ".." in text.split("/")
        if hidden and dotted:
            raise _unusable(place, f"{shortened(text)}, which holds both a reference and '..'")
        try:
            # Only a link gives ".." another meaning than removing the folder before it, hence the slow way for "..".
            absolute = os.path.realpath(joined) if dotted else os.path.normpath(joined)
            file = locate(absolute) if hidden else absolute
            folder, name = os.path.split(file)
            if folder not in self._real_folders:
                self._real_folders[folder] = os.path.realpath(folder)
            real = os.path.join(self._real_folders[folder], name)
            try:
                mode = os.lstat(file).st_mode
            except FileNotFoundError:
                mode = 0
            if stat.S_ISLNK(mode):
                real = os.path.realpath(file)
            exists = stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and os.path.isfile(real))
        except (OSError, ValueError) as error:
            raise _unusable(place, f"{shortened(text)} ({_reason(error)})") from None
        except ConfigError as error:
            raise DatalistError(
                f"{place}: {error.problem[0].lower()}{error.problem[1:]}",
                got=error.got,
                wanted=error.wanted,
                fix=error.fix,
            ) from None
        known = absolute.startswith((self._inside, self._real_inside)) if hidden else True
        if not real.startswith(self._real_inside) or not known:
            raise DatalistError(
                f"{place}: the path leaves the folder of the datalist.",
                got=shortened(text),
                wanted=f"a file below {self._root}, also after links are followed",
                fix="Move the file there, or give a dataset_dir that holds all files.",
            )
        if must_exist and not exists:
            self._missing.append((place, shortened(text)))
        if not absolute.startswith(self._inside):
            inner = absolute if hidden else real
            absolute = os.path.join(self._root, os.path.relpath(inner, self._real_inside))
        return absolute, real


def _read_scalar(key: str, value: object, place: str) -> object:
    fits = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    wanted = "text, true, false, null or a finite number"
    if key in _IDS:
        wanted = "text that is not empty, or a whole number"
        value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        # White space around an id would make two patients of one.
        value = value.strip() if isinstance(value, str) else value
        fits = (isinstance(value, str) and value != "") or (value is None and key != PATIENT_ID)
    elif key in _NUMBERS:
        wanted = "a finite number or null"
        fits = fits and not isinstance(value, str | bool)
    elif key == LABEL:
        wanted = "a path, or a class as text or finite number; no key at all where there is no label"
        fits = fits and value is not None
    if not fits:
        raise DatalistError(
            f"{place}: the value is unusable.",
            got=described(value),
            wanted=wanted,
            fix="Correct the value, or leave the key out.",
        )
    return value


def _unusable(place: str, got: str) -> DatalistError:
    return DatalistError(
        f"{place}: the path cannot be used.", got=got, wanted="a path to a file", fix="Correct the path."
    )


def _reason(error: OSError | ValueError) -> str:
    """What is wrong with a path, without the path."""
    return getattr(error, "strerror", None) or type(error).__name__


def _ending(text: str) -> str:
    """What errors say of a text that should be a path: it may be anything."""
    suffix = _FILE_NAME.search(text.replace("\\", "/").rpartition("/")[2])
    return described(text) if suffix is None else f"a text that ends in {suffix[0]!r}"


def shortened(value: object) -> str:
    """How errors show a value that may be long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
