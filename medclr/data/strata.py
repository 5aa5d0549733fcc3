"""Patients in order, grouped into strata: what splits are made of."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from medclr.data.rows import Row
from medclr.draws import shuffled, stable_seed
from medclr.errors import DatalistError
from medclr.keys import IMAGE, PATIENT_ID

MANY_VALUES = 10
"""A numeric column with more distinct values than this is binned by quantiles before stratifying."""

BINS = 4
"""Number of quantile bins."""


class Patients:
    """Patients in order of first appearance: the row numbers and the stratum of each."""

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

    def refuse_strata_of_one(self) -> None:
        """Raise where a stratum has a single patient, who cannot be spread over sections."""
        alone = [stratum for stratum, size in Counter(self.strata).items() if size == 1]
        if self.columns and alone:
            raise DatalistError(
                "A stratum has one patient only.",
                got=f"{len(alone)} such strata by {', '.join(self.columns)}, for example {alone[0]}",
                wanted="at least two patients in every stratum",
                fix="Stratify by fewer or coarser columns, or merge rare values.",
            )

    def _levels(self, column: str) -> list[Hashable]:
        values: list[Hashable] = [
            next((v for v in (self._rows[number].get(column) for number in numbers) if v is not None), None)
            for numbers in self._groups
        ]
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
