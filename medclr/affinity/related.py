"""What two scans of one patient count as, by how they are related."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medclr import keys
from medclr.affinity.columns import names
from medclr.affinity.kernels import checked_bandwidth, fading
from medclr.affinity.meta import Meta, both_known, distance, entry_of, equal
from medclr.errors import ConfigError

Counts = Literal["ignored", "positive", "negative", "kernels"] | float
"""What a pair is: a word, or the weight of a positive. ``kernels`` leaves it to them, as for two patients."""

_WEIGHTS = {"positive": 1.0, "negative": 0.0}


class Related:
    """Two scans of one patient that are alike in some columns, differ in others, or lie so many days apart.

    All conditions must hold. A scan that lacks one of the values is not related: what follows decides.

    Args:
        counts: what such a pair is: ``positive``, ``ignored``, ``negative``, a weight from 0 to 1, or ``kernels``.
        same: columns in which both agree: ``study_id``, ``sequence``, ...; ``scan`` stands for the scan itself.
        different: columns in which they differ: ``modality``, ``laterality``, ...
        within_days: at most so many days apart.
        least_days: at least so many days apart.
        bandwidth: days; the weight fades with the time between, times ``exp(-days^2 / (2 bandwidth^2))``.

    Raises:
        ConfigError: for another ``counts``, no condition, or days or a bandwidth that do not go together.

    Example:
        >>> Related("positive", same="study_id", different="modality").columns
        ('study_id', 'modality')
    """

    def __init__(
        self,
        counts: Counts = "positive",
        *,
        same: str | Sequence[str] = (),
        different: str | Sequence[str] = (),
        within_days: float | None = None,
        least_days: float = 0.0,
        bandwidth: float | None = None,
    ) -> None:
        self.counts = checked_counts(counts, "counts")
        self.same, self.different = names(same, "same"), names(different, "different")
        self.within_days, self.least_days = within_days, least_days
        self.bandwidth = None if bandwidth is None else checked_bandwidth(bandwidth)
        numbers = [least_days, math.inf if within_days is None else within_days]
        if any(isinstance(days, bool) or not isinstance(days, int | float) for days in numbers) or not (
            0 <= least_days <= numbers[1] and least_days < math.inf
        ):
            raise _unusable(f"days from {least_days!r} to {within_days!r}", "0 <= least_days <= within_days")
        if within_days is None and bandwidth is not None:
            raise _unusable("a bandwidth without within_days", "the days after which the relation ends")
        if bandwidth is not None and weight_of(self.counts) is None:
            raise _unusable(f"a bandwidth for pairs that are {counts}", "a bandwidth for positive, or for a weight")
        if not (self.same or self.different or self._timed):
            raise _unusable("no condition", "same, different or within_days")
        if set(self.same) & set(self.different):
            raise _unusable(f"same {list(self.same)}, different {list(self.different)}", "columns in one of the two")

    @property
    def _timed(self) -> bool:
        return self.within_days is not None or self.least_days > 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the datalist that it reads; ``scan`` is among them though every item has it."""
        return (*self.same, *self.different, *((keys.DAYS,) if self._timed else ()))

    def holds(self, query: Meta, key: Meta) -> Tensor:
        """(B, K) where two scans, of whichever patients, fulfil the conditions."""
        count = len(query[keys.PATIENT]), len(key[keys.PATIENT])
        held = torch.ones(count, dtype=torch.bool, device=query[keys.PATIENT].device)
        for column in self.same:
            held &= equal(query[entry_of(column)], key[entry_of(column)])
        for column in self.different:
            one, other = query[entry_of(column)], key[entry_of(column)]
            held &= (one[:, None] != other[None]) & both_known(one, other)
        if self._timed:
            days = distance(query, key, keys.DAYS)  # NaN is neither more nor less
            held &= (days >= self.least_days) & (days <= (math.inf if self.within_days is None else self.within_days))
        return held

    def weight(self, query: Meta, key: Meta) -> Tensor | float | None:
        """The weight of related pairs, one or (B, K); None where ``counts`` is no weight."""
        weight = weight_of(self.counts)
        if weight is None or self.bandwidth is None:
            return weight
        return weight * fading(distance(query, key, keys.DAYS), self.bandwidth)


def weight_of(counts: Counts) -> float | None:
    """The weight that ``counts`` stands for; None for ``ignored`` and ``kernels``."""
    return _WEIGHTS.get(counts) if isinstance(counts, str) else counts


def checked_counts(counts: object, setting: str) -> Counts:
    """``counts`` as it was given, a number as a float.

    Raises:
        ConfigError: for another word, or a number outside 0 to 1.
    """
    if counts in ("ignored", "positive", "negative", "kernels"):
        return counts
    if isinstance(counts, int | float) and not isinstance(counts, bool) and 0 <= counts <= 1:
        return float(counts)
    raise ConfigError(
        "The affinity is unusable.",
        got=f"{setting} {counts!r}",
        wanted="ignored, positive or negative, a weight from 0 to 1, or kernels",
        fix=f"Set {setting}: ignored.",
    )


def _unusable(got: str, wanted: str) -> ConfigError:
    fix = "For example Related('positive', same='study_id')."
    return ConfigError("A relation between scans is unusable.", got=got, wanted=wanted, fix=fix)
