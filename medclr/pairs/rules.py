"""Pair rules: which two scans of a patient make a positive pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from medclr import keys
from medclr.affinity.columns import number_of, value_of
from medclr.errors import ConfigError

Scan = Mapping[str, Any]


class PairRule(Protocol):
    """What a pair rule offers. A rule sees rows and knows nothing of voxels."""

    @property
    def always_same_scan(self) -> bool:
        """Whether both crops always come from one scan."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that some row of the datalist must have."""

    def pairable(self, scans: Sequence[Scan]) -> bool:
        """Whether the patient with these scans gives the pair that the rule is about, or only the fallback."""

    def __call__(self, scans: Sequence[Scan], random: np.random.Generator) -> tuple[int, int]:
        """Places of two scans among ``scans``, the rows of one patient."""


class SameScan:
    """Both crops from one scan, drawn uniformly from the patient's (SimCLR, arXiv:2002.05709)."""

    always_same_scan = True
    columns: tuple[str, ...] = ()

    def pairable(self, scans: Sequence[Scan]) -> bool:
        """Whether the patient has a scan."""
        return len(scans) >= 1

    def __call__(self, scans: Sequence[Scan], random: np.random.Generator) -> tuple[int, int]:
        """The same place twice."""
        scan = int(random.integers(len(scans)))
        return scan, scan


class SamePatient:
    """Crops from two different scans of one patient (MICLe, arXiv:2101.05224; MedAug, arXiv:2102.10663).

    A patient with one scan gives two crops of it; ``PatientPairDataset`` reports how many did.
    """

    always_same_scan = False
    columns: tuple[str, ...] = ()

    def pairable(self, scans: Sequence[Scan]) -> bool:
        """Whether the patient has two scans."""
        return len(scans) >= 2

    def __call__(self, scans: Sequence[Scan], random: np.random.Generator) -> tuple[int, int]:
        """Two different places, or the only one twice."""
        if len(scans) == 1:
            return 0, 0
        first, second = random.choice(len(scans), size=2, replace=False)
        return int(first), int(second)


class SameStudy:
    """Crops from two different scans of one study, MedAug's best choice (arXiv:2102.10663).

    The first scan is drawn uniformly from those that have a partner, the second from its partners. A patient without
    such a pair, or without ``study_id``, gives two crops of one scan, as under :class:`SamePatient`.
    """

    always_same_scan = False
    columns = (keys.STUDY_ID,)

    def pairable(self, scans: Sequence[Scan]) -> bool:
        """Whether the patient has two scans of one study."""
        return _pairable(scans, _one_study)

    def __call__(self, scans: Sequence[Scan], random: np.random.Generator) -> tuple[int, int]:
        """Two different places of one study, or any place twice."""
        return _draw(scans, random, _one_study)


class AcrossModality:
    """Crops from two scans of one patient that differ in modality, or in sequence.

    The first scan is drawn uniformly from those that have a partner, the second from its partners: those of its own
    study where there are any, since they show the same state of the patient, else of another. A patient without such a
    pair gives two crops of one scan.

    Args:
        column: what must differ, and be known of both: ``modality``, ``sequence``, or another column.

    Raises:
        ConfigError: for a column that is no name.
    """

    always_same_scan = False

    def __init__(self, column: str = keys.MODALITY) -> None:
        if not isinstance(column, str) or not column:
            raise ConfigError(
                "The pair rule is unusable.",
                got=f"column {column!r}",
                wanted="the name of a column",
                fix="Set column: modality, or sequence.",
            )
        self.column = column

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that must differ; without ``study_id``, no partner is preferred."""
        return (self.column,)

    def pairable(self, scans: Sequence[Scan]) -> bool:
        """Whether the patient has scans of two modalities."""
        return _pairable(scans, self._differ)

    def __call__(self, scans: Sequence[Scan], random: np.random.Generator) -> tuple[int, int]:
        """Two places that differ, or any place twice."""
        return _draw(scans, random, self._differ, prefer=_one_study)

    def _differ(self, one: Scan, other: Scan) -> bool:
        values = value_of(one, self.column), value_of(other, self.column)
        return None not in values and values[0] != values[1]


class WithinDays:
    """Crops from two different scans of one patient, so many days apart.

    The first scan is drawn uniformly from those that have a partner, the second from its partners. A patient without
    such a pair, or without ``days``, gives two crops of one scan.

    Args:
        most: at most so many days apart.
        least: at least so many days apart.

    Raises:
        ConfigError: unless 0 <= ``least`` <= ``most``.
        DatalistError: when called, for ``days`` that are no number.
    """

    always_same_scan = False
    columns = (keys.DAYS,)

    def __init__(self, most: float, least: float = 0.0) -> None:
        numbers = all(isinstance(days, int | float) and not isinstance(days, bool) for days in (most, least))
        if not numbers or not 0 <= least <= most < math.inf:
            raise ConfigError(
                "The pair rule is unusable.",
                got=f"from {least!r} to {most!r} days",
                wanted="0 <= least <= most",
                fix="For example most: 90.",
            )
        self.most, self.least = most, least

    def pairable(self, scans: Sequence[Scan]) -> bool:
        """Whether the patient has two scans that lie so far apart."""
        return _pairable(scans, self._near)

    def __call__(self, scans: Sequence[Scan], random: np.random.Generator) -> tuple[int, int]:
        """Two different places that lie so far apart, or any place twice."""
        return _draw(scans, random, self._near)

    def _near(self, one: Scan, other: Scan) -> bool:
        first, second = number_of(one, keys.DAYS), number_of(other, keys.DAYS)
        return first is not None and second is not None and self.least <= abs(first - second) <= self.most


Partners = Callable[[Scan, Scan], bool]


def _one_study(one: Scan, other: Scan) -> bool:
    study = value_of(one, keys.STUDY_ID)
    return study is not None and str(study) == str(value_of(other, keys.STUDY_ID))


def _partners(scans: Sequence[Scan], first: int, fits: Partners) -> list[int]:
    return [place for place, scan in enumerate(scans) if place != first and fits(scans[first], scan)]


def _pairable(scans: Sequence[Scan], fits: Partners) -> bool:
    return any(_partners(scans, first, fits) for first in range(len(scans)))


def _draw(
    scans: Sequence[Scan], random: np.random.Generator, fits: Partners, prefer: Partners | None = None
) -> tuple[int, int]:
    order = random.permutation(len(scans)).tolist()
    for first in order:  # the first of a random order that has a partner is uniform among those that have one
        partners = _partners(scans, first, fits)
        if partners:
            preferred = [place for place in partners if prefer is not None and prefer(scans[first], scans[place])]
            partners = preferred or partners
            return int(first), int(partners[random.integers(len(partners))])
    return int(order[0]), int(order[0])
