"""The same voxels twice: what the column ``content`` says of the rows of a datalist.

``medclr index`` writes it: a keyed pseudonym of the digest of a scan's voxels, ``vox-...``. Equal ones are one scan,
whatever its files are called, and whatever patients they are said to be of.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from medclr.data.rows import Row, located
from medclr.errors import DatalistError
from medclr.keys import CONTENT, PATIENT_ID

logger = logging.getLogger(__name__)


def contents_of(row: Row) -> list[str]:
    """The contents that a row names: none, one, or one a channel where ``content`` is a list as ``image`` is."""
    content = row.get(CONTENT)
    if isinstance(content, list | tuple):
        return [str(entry) for entry in content if entry is not None]
    return [] if content is None else [str(content)]


def refuse_shared_contents(sections: Mapping[str, Sequence[Row]]) -> None:
    """Raise where the same voxels are in two sections, whoever they are said to be of.

    Raises:
        DatalistError: naming both places.
    """
    places: dict[str, tuple[str, int]] = {}
    for section, rows in sections.items():
        for number, row in enumerate(rows):
            for content in contents_of(row):
                first = places.setdefault(content, (section, number))
                if first[0] != section:
                    raise DatalistError(
                        f"{located(section, number, CONTENT)}: the same scan is in two sections.",
                        got=f"the same voxels in {located(*first)}",
                        wanted="each scan in one section",
                        fix="Remove one of the two rows, or give both the same patient and split again; "
                        "`medclr index` leaves duplicates out.",
                    )


def warn_of_repeated_contents(sections: Mapping[str, Sequence[Row]]) -> None:
    """Log how often a section holds the same voxels twice, which index would not write: such scans count double."""
    for section, rows in sections.items():
        patients: dict[str, set[object]] = defaultdict(set)
        counts: Counter[str] = Counter()
        for row in rows:
            for content in set(contents_of(row)):
                counts[content] += 1
                patients[content].add(row.get(PATIENT_ID))
        repeated = [content for content, count in counts.items() if count > 1]
        if repeated:
            logger.warning(
                "%s: %d scan(s) are in it twice or more, with the same voxels; %d of them under several patients",
                section,
                len(repeated),
                sum(len(patients[content]) > 1 for content in repeated),
            )
