"""Which components of a path hold a name, an id or a date.

Spellings differ: ``Müller^Anna`` is ``anna_mueller`` and ``MuellerAnna`` in paths, ``19870203`` is ``3.2.1987`` or
``03Feb87``. Where in doubt a component counts as private: hiding one too many costs readability, one too few a name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

from medclr.data.privacy_dates import parse_date

SUFFIXES: Final = (
    *(".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcmseries", ".dcm", ".dicom", ".ima", ".img", ".hdr"),
    *(
        ".json",
        ".tsv",
        ".csv",
        ".bval",
        ".bvec",
        ".txt",
        ".xml",
        ".pdf",
        ".zip",
        ".tar.gz",
        ".gz",
        ".npz",
        ".npy",
        ".png",
    ),
)
"""Ends of file names that stay: they say what a file is, and nothing of a patient."""


SHORTEST_PART: Final = 3
"""Letters of the shortest part of a name that counts by itself, as a whole word."""

SHORTEST_INSIDE: Final = 4
"""Characters of the shortest name or id that counts wherever it stands, with separators left out."""

_LONG_PART = 5
"""Letters from which a part of a name counts inside a word, too."""
_LETTERS = re.compile(r"[^\W\d_]+")
_DIGITS = re.compile(r"\d+")
_TOKENS = re.compile(r"[^\W_]+")
_UID = re.compile(r"[\d.]{9,}")
_SEVERAL = re.compile(r"[=\\]")
"""Between spellings of one name, and between several values."""
_UMLAUT = re.compile(r"([aou])e")
_GERMAN = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_LABELS = "p|pt|pat|patient|s|sub|subj|subject|case|id|pid|mrn|study|st|acc|exam"
_NO_DECOMPOSITION = str.maketrans(
    {"ø": "o", "ł": "l", "æ": "ae", "œ": "oe", "đ": "d", "ð": "d", "þ": "th", "\u0131": "i"}
)
_MONTHS = (
    ("jan", "ene", "gen"),
    ("feb", "fev"),
    ("mar", "mrz"),
    ("apr", "avr", "abr"),
    ("may", "mai", "mag"),
    ("jun", "juin", "giu"),
    ("jul", "juil", "lug"),
    ("aug", "aou", "ago"),
    ("sep", "set"),
    ("oct", "okt", "ott"),
    ("nov",),
    ("dec", "dez", "dic"),
)


class _Value(NamedTuple):
    """The spellings of one private value."""

    squeezed: str
    words: frozenset[str]
    """They count as whole words."""
    inside: tuple[str, ...]
    """They count anywhere, with separators left out."""
    number: str
    """Without leading zeros; empty where the value is no number."""
    short: str
    """Without leading zeros; empty where the value is long enough to count by itself."""
    date: tuple[int, int, int] | None


class _Part(NamedTuple):
    """The spellings of one component of a path."""

    squeezed: tuple[str, ...]
    words: frozenset[str]
    tokens: tuple[str, ...]
    numbers: tuple[str, ...]
    stripped: frozenset[str]
    """Numbers without leading zeros."""


def private_components(parts: Sequence[str], private: Iterable[str]) -> list[bool]:
    """Which components of a path match a private value.

    Args:
        parts: the components, without suffix of the file.
        private: names, ids and dates, as headers and tables write them.

    Returns:
        one truth value a component.
    """
    values = [_value(text) for text in private if text]
    # Folders recur, file names do not.
    hidden = [any(_matches_folder(part, value) for value in values) for part in parts[:-1]]
    name = _part(parts[-1])
    hidden.append(any(_matches(name, value) for value in values))
    numeric = [part.replace("-", "").replace(".", "").replace("_", "").isdigit() for part in parts]
    if any(here and after for here, after in pairwise(numeric)):  # folders such as 2019/03/12
        dates = {value.date for value in values if value.date is not None}
        for length in (2, 3):
            for start in range(len(parts) - length + 1):
                digits = [number for part in parts[start : start + length] for number in _DIGITS.findall(part)]
                if all(numeric[start : start + length]) and any(_is_date(digits, day) for day in dates):
                    hidden[start : start + length] = [True] * length
    return hidden


@lru_cache(maxsize=1 << 16)
def _matches_folder(part: str, value: _Value) -> bool:
    return _matches(_part(part), value)


def _matches(part: _Part, value: _Value) -> bool:
    if value.squeezed in part.squeezed or not value.words.isdisjoint(part.words):
        return True
    for squeezed in part.squeezed:
        for text in value.inside:
            if text in squeezed:
                return True
    if value.short and part.squeezed[0].endswith(value.short):
        return re.fullmatch(rf"(?:{_LABELS})?0*{re.escape(value.short)}", part.squeezed[0]) is not None
    if len(value.squeezed) >= 8:
        for token in part.tokens:
            if len(token) >= 8 and token in value.squeezed:
                return True
    if value.number in part.stripped:
        return True
    if value.date is None or not part.numbers:
        return False
    return _is_date(part.numbers, value.date) or _spells_month(part.squeezed[0], value.date)


def _is_date(numbers: Sequence[str], date: tuple[int, int, int]) -> bool:
    """Whether digits spell a date: as one number, or as three (or year and month) in a row."""
    year, month, day = date
    long = (
        f"{year}{month:02}{day:02}",
        f"{day:02}{month:02}{year}",
        f"{month:02}{day:02}{year}",
        f"{year}{day:02}{month:02}",
    )
    if any(form in number for number in numbers if len(number) >= 8 for form in long):
        return True
    two = f"{year % 100:02}"
    short = {f"{two}{month:02}{day:02}", f"{day:02}{month:02}{two}", f"{month:02}{day:02}{two}"}
    short |= {f"{year}{month:02}", f"{month:02}{year}", f"{year}{(_day_of_year(date)):03}"}
    if not short.isdisjoint(numbers):
        return True
    values = [int(number) if len(number) < 10 else -1 for number in numbers]
    years = (year, year % 100)
    for first, second, third in zip(values, values[1:], values[2:], strict=False):
        if first in years and {(second, third)} & {(month, day), (day, month)}:
            return True
        if third in years and {(first, second)} & {(month, day), (day, month)}:
            return True
    if any(pair in ((year, month), (month, year)) for pair in pairwise(values)):
        return True
    # 201903 12, and 0312 2019
    joined = ["".join(pair) for pair in pairwise(numbers)]
    return any(form in text for text in joined if len(text) == 8 for form in long)


def _spells_month(squeezed: str, date: tuple[int, int, int]) -> bool:
    year, month, day = date
    if not any(name in squeezed for name in _MONTHS[month - 1]):
        return False
    for name in _MONTHS[month - 1]:
        letters = rf"{name}[^\W\d_]*"
        years = rf"(?:{year}|{year % 100:02})"
        ordinal = rf"0?{day}(?:st|nd|rd|th)?"
        forms = (
            rf"(?<!\d){ordinal}{letters}{years}",
            rf"{letters}{ordinal}{years}",
            rf"{years}{letters}{ordinal}(?!\d)",
        )
        if re.search("|".join((*forms, rf"{letters}{year}", rf"{year}{letters}")), squeezed):
            return True
    return False


def _day_of_year(date: tuple[int, int, int]) -> int:
    day = parse_date(f"{date[0]:04}-{date[1]}-{date[2]}")
    return 0 if day is None else day.timetuple().tm_yday


@lru_cache(maxsize=1 << 12)
def _value(text: str) -> _Value:
    words: set[str] = set()
    inside: set[str] = set()
    folded = fold(text)
    squeezed = "".join(_TOKENS.findall(folded[0]))
    if _UID.fullmatch(text):
        inside.add(squeezed)
    else:
        for spelt in {*folded, *(_UMLAUT.sub(r"\1", one) for one in folded)}:
            for group in _SEVERAL.split(spelt):
                _spell(group, words, inside)
    day = parse_date(text)
    return _Value(
        squeezed,
        frozenset(words),
        tuple(sorted(inside)),
        squeezed.lstrip("0") if squeezed.isdigit() and len(squeezed.lstrip("0")) >= SHORTEST_PART else "",
        squeezed.lstrip("0") if len(squeezed.lstrip("0")) < SHORTEST_PART else "",
        None if day is None else (day.year, day.month, day.day),
    )


def _spell(text: str, words: set[str], inside: set[str]) -> None:
    """Add the spellings of one name or id."""
    tokens, parts = _TOKENS.findall(text), _LETTERS.findall(text)
    joined = {"".join(order) for order in (tokens, tokens[::-1], tokens[:2], tokens[1::-1])}
    inside |= {name for name in joined if _long_enough(name, SHORTEST_INSIDE)}
    words |= {name for name in joined if len(name) >= SHORTEST_PART}
    words |= {part for part in parts if _long_enough(part, SHORTEST_PART)}
    words |= {token for token in tokens if len(token) >= SHORTEST_INSIDE}
    inside |= {part for part in parts if _long_enough(part, _LONG_PART)}
    if len(parts) > 1 and len(parts[0]) >= SHORTEST_PART:
        words |= {parts[0] + parts[1][0], parts[1][0] + parts[0]}  # doej, jdoe


@lru_cache(maxsize=1 << 12)
def _part(text: str) -> _Part:
    spellings = fold(text)
    tokens = [token for one in spellings for token in _TOKENS.findall(one)]
    words = {*tokens, *(word for one in spellings for word in _LETTERS.findall(one))}
    if _CAMEL.search(text):
        words |= {word for one in fold(_CAMEL.sub(" ", text)) for word in _LETTERS.findall(one)}
    squeezed = tuple("".join(_TOKENS.findall(one)) for one in spellings)
    numbers = tuple(_DIGITS.findall(spellings[0]))
    stripped = frozenset(number.lstrip("0") for number in numbers) - {""}
    return _Part(squeezed, frozenset(words), tuple(tokens), numbers, stripped)


def _long_enough(text: str, letters: int) -> bool:
    """Names in other scripts are shorter."""
    return len(text) >= (letters if text.isascii() else 2)


def fold(text: str) -> tuple[str, ...]:
    """A text without case and accents; where it has umlauts, also with ``ue`` for ``ü``."""
    if text.isascii():
        return (text.lower(),)
    lower = unicodedata.normalize("NFC", text.casefold())
    return tuple(dict.fromkeys(map(_plain, (lower, lower.translate(_GERMAN)))))


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text).translate(_NO_DECOMPOSITION)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def suffix_of(part: str) -> str:
    """The end of a file name that says what it is; kept as it is spelt."""
    if "." not in part:
        return ""
    low = part.lower()
    if not low.endswith(SUFFIXES):
        return ""
    found = next((suffix for suffix in SUFFIXES if low.endswith(suffix)), "")
    return part[len(part) - len(found) :] if found and len(found) < len(part) else ""
