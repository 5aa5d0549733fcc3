"""What the ids of a folder become in its datalist: keyed pseudonyms, or themselves where they are public already."""

from __future__ import annotations

import json

from medclr.data.privacy import Pseudonyms


class Naming:
    """Names for patients, studies, series, sites and contents.

    Args:
        keep_ids: ids stay as they are; contents are pseudonyms all the same.
    """

    def __init__(self, *, keep_ids: bool = False) -> None:
        self.keep_ids = keep_ids
        self._pseudonyms = Pseudonyms()
        self._issuers: dict[str, str] = {}

    def patient(self, text: str, issuer: str) -> str:
        """The name of a patient; a kept id says whose it is where two issuers gave the same."""
        if not self.keep_ids:
            return self._pseudonyms.patient(text, issuer)
        return text if self._issuers.setdefault(text, issuer) == issuer else f"{issuer.removeprefix('bids:')}:{text}"

    def study(self, text: str) -> str | None:
        """The name of a study: of a StudyInstanceUID, or of a JSON list whose last text is its plain name."""
        if not text:
            return None
        return _plain(text) if self.keep_ids else self._pseudonyms.study(text)

    def series(self, text: str) -> str | None:
        """The name of a series, as of a study."""
        if not text:
            return None
        return _plain(text) if self.keep_ids else self._pseudonyms.series(text)

    def site(self, text: str) -> str | None:
        """The name of an institution."""
        text = " ".join(text.lower().split())
        if not text or self.keep_ids:
            return text or None
        return "site-" + self._pseudonyms.study(f"site {text}").rpartition("-")[2][:8]

    def content(self, digest: str) -> str | None:
        """The name of a content."""
        return self._pseudonyms.content(digest) if digest else None


def _plain(text: str) -> str:
    if not text.startswith("["):
        return text
    return next((part for part in reversed(json.loads(text)) if part), "")
