"""Cells of text, as tables and file names give them, turned into columns of a datalist."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from medclr import keys
from medclr.data.privacy import described
from medclr.data.rows import Row
from medclr.errors import ConfigError

Cells = dict[str, str]

MISSING = ("", "n/a", "na", "nan", "null", "none")
"""What stands for a value that is not known, in any case."""

_RENAMED = {"study": keys.STUDY_ID, "series": keys.SERIES_ID, "session": keys.STUDY_ID}
_TEXT = (
    keys.PATIENT_ID,
    keys.STUDY_ID,
    keys.SERIES_ID,
    keys.MODALITY,
    keys.SEQUENCE,
    keys.SITE,
    keys.SCANNER,
    keys.SEX,
)
_NUMERIC = (keys.DAYS, keys.AGE)
_KNOWN = (*_TEXT, *_NUMERIC, keys.LABEL)
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def is_missing(cell: str) -> bool:
    """Whether a cell says that nothing is known."""
    return cell.strip().lower() in MISSING


def column_name(name: str, others: Collection[str]) -> str:
    """The datalist's name of a column: ``study`` is ``study_id``, ``Age`` is ``age``, ``session`` a study."""
    plain = name.strip().lower()
    if plain == "session" and {"study", keys.STUDY_ID} & {other.strip().lower() for other in others}:
        return name
    plain = _RENAMED.get(plain, plain)
    return plain if plain in _KNOWN else name


def typed(cells: Sequence[Cells]) -> list[Row]:
    """Rows with numbers where a whole column is numeric; a leading zero, as in 007, makes it text.

    An age of ``89+``, as tables write it to hide the oldest, counts as 89.

    Raises:
        ConfigError: ``age`` or ``days`` holds something else than numbers.
    """
    top = re.compile(r"(\d+) ?\+")
    cells = [
        {name: top.sub(r"\1", cell) if name == keys.AGE and top.fullmatch(cell) else cell for name, cell in row.items()}
        for row in cells
    ]
    columns = dict.fromkeys(name for row in cells for name in row)
    numeric = set()
    for column in columns:
        values = [row[column] for row in cells if column in row]
        wrong = next((value for value in values if not _is_number(value)), None)
        if wrong is None and column not in _TEXT:
            numeric.add(column)
        elif column in _NUMERIC:
            raise ConfigError(
                f"The column {column!r} holds something else than numbers.",
                got=described(wrong),
                wanted=f"numbers, or one of {', '.join(map(repr, MISSING))}",
                fix="Clean the column, or give it another name.",
            )
    return [{name: _number(cell) if name in numeric else cell for name, cell in row.items()} for row in cells]


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)
