"""Pair rules: which two scans of a patient make a positive pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class PairRule(Protocol):
    """What a pair rule offers. A rule sees rows and knows nothing of voxels."""

    @property
    def always_same_scan(self) -> bool:
        """Whether both crops always come from one scan."""

    def pairable(self, scans: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the patient with these scans gives the pair that the rule is about, or only the fallback."""

    def __call__(self, scans: Sequence[Mapping[str, Any]], random: np.random.Generator) -> tuple[int, int]:
        """Places of two scans among ``scans``, the rows of one patient."""


class SameScan:
    """Both crops from one scan, drawn uniformly from the patient's (SimCLR, arXiv:2002.05709)."""

    always_same_scan = True

    def pairable(self, scans: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the patient has a scan."""
        return len(scans) >= 1

    def __call__(self, scans: Sequence[Mapping[str, Any]], random: np.random.Generator) -> tuple[int, int]:
        """The same place twice."""
        scan = int(random.integers(len(scans)))
        return scan, scan


class SamePatient:
    """Crops from two different scans of one patient (MICLe, arXiv:2101.05224; MedAug, arXiv:2102.10663).

    A patient with one scan gives two crops of it; ``PatientPairDataset`` reports how many did.
    """

    always_same_scan = False

    def pairable(self, scans: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the patient has two scans."""
        return len(scans) >= 2

    def __call__(self, scans: Sequence[Mapping[str, Any]], random: np.random.Generator) -> tuple[int, int]:
        """Two different places, or the only one twice."""
        if len(scans) == 1:
            return 0, 0
        first, second = random.choice(len(scans), size=2, replace=False)
        return int(first), int(second)
