"""Digests of patients: how weights say whom they know, so that nobody is tested on whom they were trained on.

A digest is made of the text under ``patient_id`` alone. ``medclr index`` writes keyed pseudonyms there: their digests
lead to nobody without the key, and differ from key to key, so that what was indexed with another key cannot be
compared. An id of your own, such as the number that a hospital gave, can be found again by trying all numbers.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final

from medclr.errors import ConfigError
from medclr.keys import PATIENT_ID

logger = logging.getLogger(__name__)

DIGITS: Final = 16
"""Hexadecimal digits of a digest: two of a million patients share one with a chance of 3e-8."""

_DIGEST: Final = re.compile(rf"[0-9a-f]{{{DIGITS}}}")
_PSEUDONYM: Final = re.compile(r"pat-[0-9A-Za-z]{16,}")


def patient_digest(patient_id: str) -> str:
    """The first ``DIGITS`` hexadecimal digits of the sha256 of an id, which is of no other use than this.

    Example:
        >>> patient_digest("pat-0123456789abcdef")
        'a8d6d336b8102dd3'
    """
    return hashlib.sha256(f"medclr patient\n{patient_id}".encode()).hexdigest()[:DIGITS]


def patient_digests(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The digests of the patients of rows, sorted, each once.

    Ids that are not the pseudonyms of ``medclr index`` are a warning, once a process.

    Example:
        In a bundle: ``$medclr.weights.patient_digests(@data.training)``
    """
    patients = {str(row[PATIENT_ID]) for row in rows}
    if not all(map(_PSEUDONYM.fullmatch, patients)):
        _warn_of_plain_ids()
    return sorted(map(patient_digest, patients))


def checked_digests(name: str, digests: Any) -> list[str] | None:
    """``digests`` sorted and each once, if that is what they are; None stands for unknown.

    Raises:
        ConfigError: one is no digest, such as an id.
    """
    if digests is None:
        return None
    values = list(digests) if isinstance(digests, list | tuple | set | frozenset) else [digests]
    wrong = sum(not isinstance(value, str) or not _DIGEST.fullmatch(value) for value in values)
    if wrong:
        raise ConfigError(
            f"{name} are no digests of patients.",
            got=f"{wrong} other entries",  # which may be ids
            wanted=f"texts of {DIGITS} hexadecimal digits, or None where they are not known",
            fix="Make them with medclr.weights.patient_digests(rows).",
        )
    return sorted(set(values))


def joined(*digests: Sequence[str] | None) -> list[str] | None:
    """All digests of several lists, sorted; None where none of them is known."""
    known = [part for part in digests if part is not None]
    return sorted({digest for part in known for digest in part}) if known else None


@cache
def _warn_of_plain_ids() -> None:
    logger.warning(
        "the patient ids are not the pseudonyms that `medclr index` writes: from the digests that go with the weights, "
        "somebody who can list all possible ids can tell who was trained on. Before handing the weights on, leave the "
        "digests out (record_patients: false), or index the scans anew"
    )
