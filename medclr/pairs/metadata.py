"""From columns of a datalist to a number for each row, as the affinity reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from medclr import keys
from medclr.affinity import VIEW
from medclr.affinity.columns import Row, names, number_of, require_columns, value_of
from medclr.affinity.meta import entry_of
from medclr.data.rows import is_file_name
from medclr.errors import ConfigError, DatalistError

_TAKEN = (keys.SAMPLE, keys.PATIENT, keys.SCAN, VIEW, keys.STUDY, keys.SERIES, keys.IMAGE, keys.PATIENT_ID)
"""What items hold anyway, or what two columns would share."""


def metadata_of(rows: Sequence[Row], columns: str | Sequence[str]) -> dict[str, Tensor]:
    """The entries of all rows, by name.

    A column in which every value is a number becomes float64, with NaN where a value is missing. ``study_id`` and
    ``series_id`` become ``study`` and ``series``, numbered patient by patient in the order of the datalist. All else
    is a category: the place of its text among the sorted texts of all rows. Missing is -1.

    Args:
        rows: rows of a datalist.
        columns: the columns to turn into entries.

    Returns:
        Tensors (rows,), int64 or float64, by the name of the entry.

    Raises:
        ConfigError: for something else than names of columns, or one that items hold anyway.
        DatalistError: for a column that no row has, or that holds no single values.

    Example:
        >>> metadata_of([{"patient_id": "a", "sex": "M"}, {"patient_id": "b", "sex": "F"}], ["sex"])["sex"].tolist()
        [1, 0]
    """
    columns = names(columns, "columns")
    taken = [name for name in columns if name in _TAKEN]
    if taken:
        raise ConfigError(
            "A column cannot become metadata.",
            got=taken[0],
            wanted="a column beside the image and the patient, whose name no entry has",
            fix="Leave it out: items hold sample, patient and scan anyway. A study is study_id, a series series_id.",
        )
    require_columns(rows, columns, "The metadata of the pairs")
    return {entry_of(column): _encoded(rows, column) for column in columns}


def _encoded(rows: Sequence[Row], column: str) -> Tensor:
    values = [value_of(row, column) for row in rows]
    present = [value for value in values if value is not None]
    if column in (keys.STUDY_ID, keys.SERIES_ID):
        owners = [str(row[keys.PATIENT_ID]) for row in rows]
        return _codes(
            [None if value is None else (owner, str(value)) for owner, value in zip(owners, values, strict=True)]
        )
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        numbers = [number_of(row, column) for row in rows]
        return torch.tensor([float("nan") if number is None else number for number in numbers], dtype=torch.float64)
    wrong = [value for value in present if not isinstance(value, str | int | float)]
    paths = column == keys.LABEL and any(isinstance(value, str) and is_file_name(value) for value in present)
    if wrong or paths:
        raise DatalistError(
            f"The column {column!r} cannot become metadata.",
            got="paths of masks" if paths else type(wrong[0]).__name__,
            wanted="a text, a number or null in each row",
            fix="Take another column, or write one class or number a scan.",
        )
    return _codes([None if value is None else str(value) for value in values], sorted)


def _codes(values: Sequence[Any], arrange: Callable[[list[Any]], list[Any]] = list) -> Tensor:
    different = arrange(list(dict.fromkeys(value for value in values if value is not None)))
    places = {value: code for code, value in enumerate(different)}
    return torch.tensor([-1 if value is None else places[value] for value in values], dtype=torch.int64)
