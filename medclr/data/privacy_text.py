"""What errors and datalists may say of values that may be private."""

from __future__ import annotations

import math
import re
from typing import Final

_PRIVATE_WORDS: Final = frozenset(
    (
        *("name", "surname", "firstname", "lastname", "forename", "initials", "birth", "birthday", "birthdate", "dob"),
        *("address", "street", "city", "zip", "zipcode", "postcode", "postal", "phone", "telephone", "tel", "mobile"),
        *("fax", "email", "mail", "ssn", "nhs", "nhsnumber", "insurance", "mrn", "accession", "physician", "doctor"),
        *(
            "referrer",
            "operator",
            "radiologist",
            "contact",
            "comment",
            "comments",
            "note",
            "notes",
            "remark",
            "remarks",
        ),
        *("report", "findings", "impression", "history", "date", "datetime", "timestamp", "acqtime"),
    )
)
_PRIVATE_ENDS: Final = ("date", "datetime", "name", "address", "comment", "comments", "birthday", "phone")
_QUALIFIERS: Final = frozenset(
    (
        *("study", "series", "scan", "birth", "visit", "session", "exam", "acquisition", "acq", "patient", "subject"),
        *("family", "given", "first", "last", "full", "home", "hospital", "referring", "operator", "physician"),
    )
)


def described(value: object) -> str:
    """What an error may say of a value of a datalist: its kind and size, and never a text, which may be a name.

    Example:
        >>> described("Doe^John"), described(float("nan")), described([1, 2])
        ('a text of 8 characters', 'nan', 'a list of 2')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"a text of {len(value)} characters" if value.strip() else "an empty text"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    return type(value).__name__


def is_private_column(name: str) -> bool:
    """Whether a table's column, by its name, holds what must not reach a datalist: names, dates, addresses, free text.

    Example:
        >>> [is_private_column(name) for name in ("Birth_Date", "scanDate", "patient name", "age", "site", "update")]
        [True, True, True, False, False, False]
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[a-z]+", spaced.lower())
    squeezed = "".join(words)
    return (
        not _PRIVATE_WORDS.isdisjoint(words)
        or squeezed in _PRIVATE_WORDS
        or any(
            len(words) == 1 and squeezed.endswith(end) and squeezed[: -len(end)] in _QUALIFIERS for end in _PRIVATE_ENDS
        )
    )
