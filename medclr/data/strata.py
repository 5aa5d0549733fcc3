"""Patients in order, grouped into strata: what splits are made of."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Final

import numpy as np

from medclr.data.contents import contents_of
from medclr.data.rows import Row, is_file_name
from medclr.draws import shuffled, stable_seed
from medclr.errors import DatalistError
from medclr.keys import CONTENT, IMAGE, LABEL, PATIENT_ID, SITE

logger = logging.getLogger(__name__)

USUAL: Final = (LABEL, SITE)
"""Columns that a split is stratified by where nothing else is asked for; what matters most comes first."""
PLAIN: Final = "none"
"""What ``medclr split --stratify`` calls a split that looks at no column."""

MANY_VALUES = 10
"""A numeric column with more distinct values than this is binned by quantiles before stratifying."""

BINS = 4
"""Number of quantile bins."""


_RARE: Final = object()
"""Stands in a stratum for the values of a column that were merged."""
_MASK: Final = object()
"""Stands in a stratum for the path of any mask."""


def usual_columns(rows: Sequence[Row]) -> list[str]:
    """Those of ``USUAL`` in which patients differ; none where all are alike, so that the split is the plain one."""
    differ = []
    for column in USUAL:
        if any(row.get(column) is not None for row in rows) and len(set(Patients(rows, column).strata)) > 1:
            differ.append(column)
    return differ


def chosen_columns(asked: str | Sequence[str] | None, rows: Sequence[Row]) -> list[str] | None:
    """The columns asked for, or the usual ones; None where there are none, as for a plain split."""
    if asked is None:
        usual = usual_columns(rows)
        if usual:
            logger.info("stratified by %s", ", ".join(usual))
        return usual or None
    columns = [asked] if isinstance(asked, str) else list(asked)
    if columns == [PLAIN] and not any(PLAIN in row for row in rows):
        return None
    return columns or None


class Patients:
    """Patients in order of first appearance: the row numbers and the stratum of each.

    A label that is a file counts as labelled, whatever its name; a patient who has none is a stratum of their own kind.
    """

    def __init__(self, rows: Sequence[Row], stratify: str | Sequence[str] | None) -> None:
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(row[PATIENT_ID], []).append(number)
        if not groups:
            raise DatalistError(
                "There is nothing to split.", got="no rows", wanted="at least one row", fix="Give a section with rows."
            )
        self._rows = rows
        self._groups = list(groups.values())
        self.columns = [stratify] if isinstance(stratify, str) else list(stratify or ())
        self.strata = list(zip(*map(self._levels, self.columns), strict=True)) or [()] * len(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def rows_of(self, places: Iterable[int]) -> list[Row]:
        """The rows of some patients, in the order of the datalist."""
        return [self._rows[number] for number in sorted(number for place in places for number in self._groups[place])]

    def codes(self) -> list[int]:
        """The stratum of each patient as a number that follows the order of first appearance."""
        places = {stratum: code for code, stratum in enumerate(dict.fromkeys(self.strata))}
        return [places[stratum] for stratum in self.strata]

    def merge_rare(self, minimum: int) -> None:
        """Merge strata of fewer than ``minimum`` patients, who cannot be spread over so many parts; the log says it.

        They lose the last column first: with label and site, the rare sites of a label become one stratum, and only if
        that is still rare, it joins all other rare ones. What is left then may be rare itself, and falls anywhere.
        """
        total = len(set(self.strata))
        rare = {stratum for stratum, size in Counter(self.strata).items() if size < minimum}
        touched = sum(stratum in rare for stratum in self.strata)
        if not self.columns or not rare:
            return
        for kept in reversed(range(len(self.columns))):
            sizes = Counter(self.strata)
            merged = (_RARE,) * (len(self.columns) - kept)
            self.strata = [s if sizes[s] >= minimum else (*s[:kept], *merged) for s in self.strata]
        logger.warning(
            "stratified by %s: %d of %d strata have fewer than %d patients (%d patients in all) and were merged; "
            "fewer or coarser columns would keep strata apart",
            ", ".join(self.columns),
            len(rare),
            total,
            minimum,
            touched,
        )

    def refuse_shared_contents(self) -> None:
        """Raise where two patients have a scan with the same voxels, which a split could put on both of its sides."""
        owners: dict[str, int] = {}
        shared = set()
        for place, numbers in enumerate(self._groups):
            for content in {content for number in numbers for content in contents_of(self._rows[number])}:
                if owners.setdefault(content, place) != place:
                    shared.add(content)
        if shared:
            raise DatalistError(
                "Two patients have a scan with the same voxels.",
                got=f"{len(shared)} such scan(s), by the column {CONTENT!r}",
                wanted="each scan under one patient, or it could be trained on and tested on",
                fix="Give both rows the patient that they are of, or remove one; `medclr index` leaves duplicates out.",
            )

    def _levels(self, column: str) -> list[Hashable]:
        values: list[Hashable] = [
            next((v for v in (self._rows[number].get(column) for number in numbers) if v is not None), None)
            for numbers in self._groups
        ]
        if column == LABEL:  # a mask says only that it is there
            values = [_MASK if isinstance(value, str) and is_file_name(value) else value for value in values]
        present = [value for value in values if value is not None]
        if not present or column == IMAGE:
            known = sorted({key for row in self._rows for key in row} - {IMAGE, PATIENT_ID})
            raise DatalistError(
                "The column to stratify by is unknown.",
                got=repr(column),
                wanted=f"one of {', '.join(known) or '(there is no column)'}",
                fix="Name a column of the datalist.",
            )
        numbers = [float(v) for v in present if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < len(present) or len(set(numbers)) <= MANY_VALUES:
            return values
        edges = np.quantile(numbers, np.linspace(0, 1, BINS + 1)[1:-1])
        return [None if v is None else int(np.searchsorted(edges, v, side="right")) for v in values]  # type: ignore[call-overload]


def spread(strata: Sequence[int], seed: int, purpose: str) -> list[int]:
    """An order of patients in which every stretch has about the mixture of the whole.

    Systematic sampling: the j-th patient of a stratum of n, in random order, stands at (j + u) / n, with one random u a
    stratum. A stratum of two then falls anywhere with equal chance, which two-stage random splits refuse to handle.
    """
    members = defaultdict(list)
    for place in shuffled(len(strata), (seed, purpose)).tolist():
        members[strata[place]].append(place)
    offsets = np.random.default_rng(stable_seed(seed, purpose, "offsets")).random(len(members))
    position = {
        place: (rank + offsets[code]) / len(places)
        for code, places in members.items()
        for rank, place in enumerate(places)
    }
    return sorted(position, key=position.__getitem__)


def apportion(total: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to ``fractions`` (which sum to 1) that sum to ``total``, by largest remainder."""
    exact = [total * fraction for fraction in fractions]
    counts = [math.floor(value + 1e-9) for value in exact]
    remainders = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in remainders[: total - sum(counts)]:
        counts[i] += 1
    return counts
