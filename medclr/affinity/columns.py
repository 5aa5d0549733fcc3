"""Columns of a datalist as the affinity and the pair rules see them: what is there, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medclr import keys
from medclr.errors import ConfigError, DatalistError

Row = Mapping[str, Any]


def value_of(row: Row, column: str) -> Any:
    """The value of a row, or None where it is missing: no key, null, NaN or text without a character."""
    value = row.get(column)
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if isinstance(value, str) and not value.strip() else value


def number_of(row: Row, column: str) -> float | None:
    """The value as a number, or None where it is missing.

    Raises:
        DatalistError: for a value that is no number.
    """
    value = value_of(row, column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise DatalistError(
            f"The column {column!r} holds something else than numbers.",
            got=type(value).__name__ if isinstance(value, str) else repr(value),
            wanted="finite numbers, or null where there is none",
            fix=f"Correct the column {column!r} of the datalist.",
        )
    return float(value)


def require_columns(rows: Sequence[Row], columns: Iterable[str], asked_by: str) -> None:
    """Raise unless each column has a value in some row.

    Args:
        rows: rows of a datalist.
        columns: names of columns.
        asked_by: who needs them, for the error.

    Raises:
        DatalistError: naming the column, who asked for it, and the columns that are there.
    """
    for column in columns:
        if all(value_of(row, column) is None for row in rows):
            there = {name for row in rows for name in row if value_of(row, name) is not None}
            raise DatalistError(
                f"{asked_by} needs a column that no row of the datalist has.",
                got=f"no {column!r}; there are {', '.join(sorted(there)) or 'no columns'}",
                wanted=f"a value under {column!r}, in as many rows as possible",
                fix="Add the column (medclr index --table TABLE), or choose a setting that does without it.",
            )


def names(columns: str | Iterable[str], setting: str) -> tuple[str, ...]:
    """Names of columns as a tuple; a single name may be given as it is.

    Raises:
        ConfigError: for something else than names, or a name given twice.
    """
    listed = (columns,) if isinstance(columns, str) else tuple(columns) if isinstance(columns, Iterable) else (None,)
    if not all(isinstance(name, str) and name for name in listed) or len(set(listed)) < len(listed):
        raise ConfigError(
            f"{setting} is unusable.",
            got=repr(columns),
            wanted="names of columns, each once",
            fix=f"For example {setting}: [{keys.STUDY_ID}].",
        )
    return tuple(str(name) for name in listed)
