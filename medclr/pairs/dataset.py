"""One item is one patient: two scans by the pair rule, a crop of each by the crop rule."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medclr import keys
from medclr.affinity.columns import require_columns
from medclr.affinity.meta import known
from medclr.data.preprocess import Volume
from medclr.data.scans import ScanReader
from medclr.draws import draw_key, generator
from medclr.errors import ConfigError, DatalistError, ScanError
from medclr.geometry import Crop
from medclr.pairs.metadata import metadata_of
from medclr.pairs.rules import PairRule, SamePatient

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Item = dict[str, Crop | dict[str, Tensor]]


class CropRule(Protocol):
    """What a crop rule offers; see :mod:`medclr.data.crops`."""

    @property
    def needs_same_scan(self) -> bool:
        """Whether both crops must come from one scan."""

    def __call__(self, volume_1: Volume, volume_2: Volume, key: Tensor) -> tuple[Crop, Crop]:
        """Two crops for one draw key (5,)."""


class PatientPairDataset(Dataset[Item]):
    """Pairs of crops, one patient an item.

    An item is a pure function of (seed, epoch, patient's place in the datalist, occurrence in the epoch). A scan that
    cannot be used is quarantined and another one of the patient drawn; a patient left without scans is replaced by
    another, drawn from the same key.

    Args:
        datalist: rows of one section of a datalist; each with ``image`` and ``patient_id``.
        rule: which two scans of a patient meet; ``SamePatient()`` if None.
        crop: where the two crops are read.
        reader: reads, caches and quarantines scans.
        seed: the run's seed.
        preload: read scans now until the reader's cache is full, so that what is bad is known before training.
        columns: columns of the datalist that items carry as metadata, usually ``affinity.columns``.

    Raises:
        DatalistError: for fewer than two patients: there would be nothing to contrast with; and for a column that the
            rule or ``columns`` needs and no row has.
        ConfigError: for a crop rule that needs one scan under a pair rule that draws two, or unusable ``columns``.

    Items are dictionaries with ``crop_1`` and ``crop_2`` (:class:`~medclr.geometry.Crop`) and ``meta``: ``sample`` (),
    ``patient`` () and ``scan`` (2,), all int64, and for each of ``columns`` what each view's scan has, (2,): int64
    codes, -1 where missing, or float64, NaN where missing (see :func:`~medclr.pairs.metadata.metadata_of`).

    Example:
        >>> dataset = PatientPairDataset(
        ...     rows, WithinDays(90), crop=RandomCrop((64, 64, 64)), reader=reader, columns=["age"]
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        datalist: Sequence[Row],
        rule: PairRule | None = None,
        *,
        crop: CropRule,
        reader: ScanReader,
        seed: int = 0,
        preload: bool = True,
        columns: str | Sequence[str] = (),
    ) -> None:
        self.rows = list(datalist)
        self.rule: PairRule = rule if rule is not None else SamePatient()
        self.crop, self.reader, self.seed = crop, reader, int(seed)
        if crop.needs_same_scan and not self.rule.always_same_scan:
            raise ConfigError(
                "The crop rule and the pair rule do not go together.",
                got=f"{type(crop).__name__} under {type(self.rule).__name__}",
                wanted="a pair rule that draws both crops from one scan",
                fix="Use SameScan, or another crop rule.",
            )
        places: dict[str, list[int]] = {}
        for scan, row in enumerate(self.rows):
            places.setdefault(str(row[keys.PATIENT_ID]), []).append(scan)
        self.patients = list(places.values())
        if len(self.patients) < 2:
            raise DatalistError(
                "Too few patients to contrast.",
                got=f"{len(self.patients)} patient(s) in {len(self.rows)} rows",
                wanted="at least two",
                fix="Add patients to this section of the datalist, or check that patient_id tells them apart.",
            )
        require_columns(self.rows, getattr(self.rule, "columns", ()), f"The pair rule {type(self.rule).__name__}")
        self.metadata = metadata_of(self.rows, columns)
        self.epoch = 0
        if preload:
            reader.preload(self.rows)
        for line in self.summary().splitlines():
            logger.info(line)
        reader.quarantine.watch(len(self.rows))

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.patients)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of items that are asked for by a plain index."""
        self.epoch = epoch

    def paired_patients(self) -> int:
        """How many patients give the pair that the rule is about, of scans that are not quarantined."""
        bad = self.reader.quarantine.reasons()
        usable = ([self.rows[scan] for scan in scans if scan not in bad] for scans in self.patients)
        return sum(1 for rows in usable if rows and self.rule.pairable(rows))

    def usable_patients(self) -> int:
        """How many patients have a scan that is not quarantined."""
        bad = self.reader.quarantine.reasons()
        return sum(1 for scans in self.patients if any(scan not in bad for scan in scans))

    def summary(self) -> str:
        """Patients, scans, fallbacks and quarantine in plain lines."""
        bad = self.reader.quarantine.reasons()
        alive = self.usable_patients()
        paired = self.paired_patients()
        lines = [
            f"{alive} patients, {len(self.rows) - len(bad)} scans; pairs by {type(self.rule).__name__}: "
            f"{paired} patients as the rule says, {alive - paired} by two crops of one scan"
        ]
        if bad:
            lines.append(f"{len(bad)} scans quarantined, {len(self.patients) - alive} patients left without scans")
        if self.metadata:
            known_rows = {name: int(known(value).sum()) for name, value in self.metadata.items()}
            listed = ", ".join(f"{name} of {count} scans" for name, count in known_rows.items())
            lines.append(f"metadata: {listed}")
        return "\n".join(lines)

    def __getitem__(self, index: int | tuple[int, int, int]) -> Item:
        """The item of patient ``index``, or of (patient, epoch, occurrence)."""
        place, epoch, occurrence = index if isinstance(index, tuple) else (index, self.epoch, 0)
        place = range(len(self.patients))[place]
        key = draw_key(self.seed, epoch, place, occurrence, 0)
        random = generator(key, "pair")
        sample = place + occurrence * len(self.patients)
        for patient in self._candidates(place, random):
            scans = list(self.patients[patient])
            while scans:
                first, second = self.rule([self.rows[scan] for scan in scans], random)
                chosen = scans[first], scans[second]
                try:
                    crop_1, crop_2 = self._crops(chosen, key)
                except _Unusable as failure:
                    scans.remove(failure.scan)
                    continue
                meta = {keys.SAMPLE: sample, keys.PATIENT: patient, keys.SCAN: chosen}
                entries = {name: torch.tensor(value, dtype=torch.int64) for name, value in meta.items()}
                entries |= {name: value[list(chosen)] for name, value in self.metadata.items()}
                return {keys.CROP_1: crop_1, keys.CROP_2: crop_2, keys.META: entries}
        raise DatalistError(
            "No scan of the datalist can be used.",
            got=f"{len(self.rows)} scans, all quarantined",
            wanted="at least one usable scan",
            fix="See the quarantine file for the reasons.",
        )

    def _candidates(self, place: int, random: np.random.Generator) -> Iterator[int]:
        yield place
        yield from random.permutation(len(self.patients)).tolist()

    def _crops(self, scans: tuple[int, int], key: Tensor) -> tuple[Crop, Crop]:
        volumes: dict[int, Volume] = {}
        for scan in dict.fromkeys(scans):
            try:
                volumes[scan] = self.reader.read(scan, self.rows[scan])
            except ScanError as error:
                raise _Unusable(scan) from error
        try:
            return self.crop(volumes[scans[0]], volumes[scans[1]], key)
        except ScanError as error:
            # Which of the two the crop rule refused shows when each is cropped with itself.
            for scan, volume in volumes.items():
                try:
                    self.crop(volume, volume, key)
                except ScanError as alone:
                    self.reader.refuse(scan, alone)
                    raise _Unusable(scan) from alone
            raise error


class _Unusable(Exception):
    def __init__(self, scan: int) -> None:
        super().__init__(scan)
        self.scan = scan
