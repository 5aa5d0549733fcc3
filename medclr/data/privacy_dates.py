"""Days and ages instead of dates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import date
from typing import Final

OLDEST: Final = 90
"""What stands for every age above 89 years."""

# DICOM's DA and DT, the DA of ACR-NEMA with dots, and ISO 8601, each with or without a time behind it.
_DATE = re.compile(
    r"(\d{4})(?:(\d{2})(\d{2})|-(\d{1,2})-(\d{1,2})|\.(\d{2})\.(\d{2})|/(\d{1,2})/(\d{1,2}))"
    r"(?:$|[T ].*|\d{2,6}(?:\.\d+)?(?:[+-]\d{4})?$|[+-]\d{4}$|Z$)"
)


def capped_age(age: float | None) -> float | None:
    """An age in years as it may be shown: every age above 89 becomes 90.

    The oldest are few enough to be recognised by their age; 90 is what most tables write for them, and stays a number.

    Args:
        age: years; None, NaN, infinity and negative numbers are unknown.

    Returns:
        the age, or None where it is not known.

    Example:
        >>> capped_age(89), capped_age(89.5), capped_age(103), capped_age(None)
        (89, 90, 90, None)
    """
    if age is None or isinstance(age, bool) or not math.isfinite(age) or age < 0:
        return None
    return OLDEST if age > OLDEST - 1 else age


def parse_date(text: object) -> date | None:
    """The date that a text holds, as DICOM (``20190312``, ``20190312101500.0+0100``) or ISO 8601 writes it; else None.

    A year or a month alone is no date, and neither are years before 1800 or from 2200 on.
    """
    if isinstance(text, date):
        return text if type(text) is date else date(text.year, text.month, text.day)
    if not isinstance(text, str):
        return None
    found = _DATE.match(text.strip(" \0\t\r\n"))
    if found is None:
        return None
    year, month, day = (int(part) for part in found.groups() if part)
    try:
        return date(year, month, day) if 1800 <= year < 2200 else None
    except ValueError:
        return None


def days_since_first(dates: Sequence[object]) -> list[int | None]:
    """Days from the first of one patient's dates to each of them.

    Args:
        dates: as :func:`parse_date` takes them, in any order.

    Returns:
        a number >= 0 for each, None for what is no date.

    Example:
        >>> days_since_first(["2019-03-12", "20190301", "", "20190399"])
        [11, 0, None, None]
    """
    parsed = [parse_date(text) for text in dates]
    first = min((day for day in parsed if day is not None), default=None)
    return [None if day is None or first is None else (day - first).days for day in parsed]
