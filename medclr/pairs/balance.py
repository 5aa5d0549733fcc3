"""How often each patient occurs in an epoch, where patients are not to occur equally often."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from medclr import keys
from medclr.affinity.columns import Row, names, require_columns, value_of
from medclr.draws import shuffled, stable_seed
from medclr.errors import ConfigError

SCANS: Final = "scans"
"""The balance in which each scan, rather than each patient, occurs equally often."""

_GOLDEN: Final = (5**0.5 - 1) / 2


class Balance:
    """Shares of an epoch, and the patients that an epoch holds by them.

    ``scans`` gives a patient a share in proportion to its scans. A column gives each of its values the same share,
    which the value's patients divide equally; a patient whose scans have several values counts to each by its part of
    the scans, and one without a value has the share that it would have without balance.

    Args:
        rows: rows of a datalist.
        patients: the row numbers of each patient.
        by: ``scans``, or a column such as ``site`` or ``scanner``.

    Raises:
        ConfigError: for something else than a name.
        DatalistError: for a column that no row has.
    """

    def __init__(self, rows: Sequence[Row], patients: Sequence[Sequence[int]], by: str) -> None:
        if not isinstance(by, str) or not by or by in (keys.IMAGE, keys.PATIENT_ID):
            raise ConfigError(
                "The balance is unusable.",
                got=f"balance {by!r}",
                wanted="null, scans, or a column such as site or scanner",
                fix="Set balance: site, or leave it out: patients then occur equally often.",
            )
        if by == SCANS:
            parts = [(0, patient, len(scans) / len(rows)) for patient, scans in enumerate(patients)]
        else:
            require_columns(rows, names(by, "balance"), "The balance of the sampler")
            parts = _parts([[value_of(rows[scan], by) for scan in scans] for scans in patients])
        self.group, self.patient = (np.asarray([part[which] for part in parts]) for which in (0, 1))
        self.share: NDArray[np.float64] = np.asarray([share for _, _, share in parts], dtype=np.float64)

    def draw(self, count: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """The patients of one epoch in their order, (count,).

        Each value, and each patient within it, occurs as often as its share says, rounded up or down (systematic
        sampling); a patient whose share is below 1 comes back within about twice its wanted interval of epochs, since
        the point where the sampling begins moves by the golden ratio. A patient that occurs several times is spread
        over the epoch.
        """
        order = self._order(seed)
        edges = np.cumsum(self.share[order])
        begin = (np.random.default_rng(stable_seed("balance", seed)).random() + epoch * _GOLDEN) % 1.0
        points = (begin + np.arange(count)) * (edges[-1] / count)
        drawn = self.patient[order][np.minimum(np.searchsorted(edges, points, side="right"), len(order) - 1)]
        times = np.bincount(drawn, minlength=int(self.patient.max()) + 1)
        patients = np.repeat(np.arange(len(times)), times)
        turn = occurrences(patients)
        late = np.random.default_rng(stable_seed("balance", seed, epoch)).random(count)
        place: NDArray[np.int64] = patients[np.argsort((turn + late) / times[patients], kind="stable")]
        return place

    def _order(self, seed: int) -> NDArray[np.int64]:
        """The parts in a random order that keeps the parts of one value together."""
        shuffle = shuffled(len(self.group), ("balance", seed))
        return shuffle[np.argsort(self.group[shuffle], kind="stable")]


def occurrences(patients: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each entry has come before, (count,)."""
    order = np.argsort(patients, kind="stable")
    listed = patients[order]
    starts = np.flatnonzero(np.diff(listed, prepend=-1))
    before = np.empty(len(patients), dtype=np.int64)
    before[order] = np.arange(len(listed)) - np.repeat(starts, np.diff(starts, append=len(listed)))
    return before


def _parts(values: Sequence[Sequence[Any]]) -> list[tuple[int, int, float]]:
    """(group, patient, share of the epoch) of each value of each patient; the groups are numbered as they appear."""
    within: defaultdict[str, dict[int, float]] = defaultdict(dict)
    unknown = 0
    for patient, scans in enumerate(values):
        counts = Counter(str(value) for value in scans if value is not None)
        unknown += not counts
        for value, times in counts.items():
            within[value][patient] = times / counts.total()
    known = 1.0 - unknown / len(values)
    parts = [
        (group, patient, known * part / (len(within) * sum(of_patients.values())))
        for group, of_patients in enumerate(within.values())
        for patient, part in of_patients.items()
    ]
    told = {patient for _, patient, _ in parts}
    return parts + [(len(within), patient, 1.0 / len(values)) for patient in range(len(values)) if patient not in told]
