"""Searching everything that a run leaves for values that must not be there, in whatever they are wrapped."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from urllib.parse import quote, quote_plus

DEEPEST = 6
"""Containers within containers."""
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{8,}")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


class Search:
    """Looks for texts and dates.

    Args:
        texts: of six characters or more; found in any case, with or without separators, as UTF-8, -16 and -32, Latin-1,
            base64 at any alignment, URL-encoded, escaped as JSON and as hexadecimal digits.
        dates: found in the usual spellings with a full year, and reversed.
    """

    def __init__(self, texts: Iterable[str], dates: Iterable[date] = ()) -> None:
        self._needles: dict[bytes, str] = {}
        self._dated: dict[bytes, dict[bytes, str]] = {}
        self._packed: dict[bytes, str] = {}
        for text in texts:
            assert len(text) >= 6
            bare = "".join(letter for letter in text if letter.isalnum())
            for form in {text, text.upper(), bare, quote(text, safe=""), quote_plus(text), json.dumps(text)[1:-1]}:
                self._needles |= {coded: f"{text} in {code}" for coded, code in encoded(form)}
            for form in {text, text.upper(), text.lower(), bare}:
                self._packed |= dict.fromkeys(in_base64(form.encode()), f"{text} in base64")
            self._packed[text.encode().hex().encode()] = f"{text} in hexadecimal"
        for day in dates:
            years = [self._dated.setdefault(coded, {}) for coded, _ in encoded(f"{day.year}")]
            for form in spellings(day):
                for needles, (coded, code) in zip(years, encoded(form), strict=True):
                    needles[coded] = f"{day} in {code}"
            for form in (f"{day:%Y%m%d}", f"{day:%Y-%m-%d}"):
                self._packed |= dict.fromkeys(in_base64(form.encode()), f"{day} in base64")
                self._packed[form.encode().hex().encode()] = f"{day} in hexadecimal"

    def in_bytes(self, content: bytes, where: str, depth: int = 0) -> Iterator[str]:
        """Where something was found, and what."""
        low = content.lower()
        yield from (f"{where}: {name}" for needle, name in self._needles.items() if needle in low)
        for year, needles in self._dated.items():
            around = b"\0\0".join(
                low[max(0, at.start() - 100) : at.end() + 100] for at in re.finditer(re.escape(year), low)
            )
            for needle, name in needles.items():
                if needle in around and not (needle.isdigit() and only_in_decimals(needle, around)):
                    yield f"{where}: {name}"
        packed = b" ".join(_BASE64.findall(content))
        yield from (f"{where}: {name}" for needle, name in self._packed.items() if needle in packed)
        if depth < DEEPEST:
            for inner, member in members(content):
                yield from self.in_bytes(inner, f"{where} > {member}", depth + 1)

    def in_text(self, text: str, where: str) -> list[str]:
        """As :meth:`in_bytes`, of a text."""
        return list(self.in_bytes(text.encode("utf-8", "surrogateescape"), where))

    def in_folder(self, folder: Path) -> list[str]:
        """As :meth:`in_bytes`, of all files of a folder, their names, and those of folders."""
        found = []
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            found += self.in_text(name, f"the name of {name}")
            if path.is_file() and not path.is_symlink():
                found += self.in_bytes(path.read_bytes(), name)
        return found


def only_in_decimals(digits: bytes, content: bytes) -> bool:
    """Whether digits stand in the fraction of a decimal number wherever they stand, where chance puts any."""
    before = (content[max(0, found.start() - 24) : found.start()] for found in re.finditer(re.escape(digits), content))
    return all(re.search(rb"(?:^|[^0-9.])[0-9]{1,3}\.[0-9]*$", text) for text in before)


def encoded(text: str) -> list[tuple[bytes, str]]:
    """A text as programs store it (NumPy as UTF-32), with ASCII letters in lower case."""
    codes = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "latin-1")
    return [(text.encode(code, "replace").lower(), code) for code in codes]


def members(content: bytes) -> Iterator[tuple[bytes, str]]:
    """What lies in a zip archive (a checkpoint of torch, too), or in a gzip stream."""
    if zipfile.is_zipfile(io.BytesIO(content)) and content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for entry in archive.infolist():
                yield archive.read(entry), f"zip member {entry.filename}"
                yield entry.comment + entry.extra, "zip entry"
            yield archive.comment, "zip comment"
        return
    if content[:2] == b"\x1f\x8b":
        with contextlib.suppress(OSError, EOFError, zlib.error):
            yield gzip.decompress(content), "gzip"


def in_base64(text: bytes) -> Iterator[bytes]:
    """The characters that a text gives in base64 whatever stands around it, for each of the three alignments."""
    for offset in range(3):
        encoded = base64.b64encode(bytes(offset) + text + bytes(3))
        whole = encoded[-(-8 * offset // 6) : 8 * (offset + len(text)) // 6]
        yield from {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}


def spellings(day: date) -> set[str]:
    """A date with its full year, as people and programs write it."""
    year, month, number = f"{day.year}", f"{day.month:02}", f"{day.day:02}"
    name = _MONTHS[day.month - 1]
    orders = ((year, month, number), (number, month, year), (month, number, year), (year, number, month))
    forms = {separator.join(order) for order in orders for separator in ("", "-", ".", "/", "_", " ", "%2F")}
    forms |= {separator.join(part.lstrip("0") for part in order) for order in orders for separator in "-./"}
    forms |= {f"{number}{gap}{name}{gap}{year}" for gap in ("", "-", " ", "_")}
    return forms | {f"{name} {day.day}, {year}", f"{name}{number}{year}", f"{day:%d %B %Y}", f"{day:%B %d, %Y}"}
