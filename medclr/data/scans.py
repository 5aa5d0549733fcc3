"""Reading scans during a run: a cache for those that fit in memory, and quarantine for those that cannot be used."""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medclr import keys
from medclr.data.preprocess import Preprocessing, Volume
from medclr.errors import DatalistError, ScanError

logger = logging.getLogger(__name__)


class Quarantine:
    """The scans of a datalist that a run could not use, with the reason.

    Kept in a file of JSON lines, so that data loader workers and ranks can add to it at the same time. It names a scan
    by its place in the datalist, not by its path, which may hold a name.

    Args:
        path: the file, or None to keep it in this process's memory alone.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._known: dict[int, str] = {}
        self._announced: set[int] = set()

    def add(self, scan: int, reason: ScanError) -> None:
        """Record that scan number ``scan`` cannot be used."""
        if scan in self._known:
            return
        text = f"{reason.problem} Got {reason.got}, wanted {reason.wanted}. {reason.fix}"
        self._known[scan] = text
        logger.warning("scan %d of the datalist is quarantined: %s", scan, text)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:  # one short write in append mode is not interleaved
                file.write(json.dumps({"scan": scan, "reason": text}) + "\n")

    def reasons(self) -> dict[int, str]:
        """Reason by scan number, of all workers and ranks that share the file."""
        known = dict(self._known)
        if self.path is not None and self.path.exists():
            for line in self.path.read_text().splitlines():
                entry = json.loads(line)
                known.setdefault(entry["scan"], entry["reason"])
        return dict(sorted(known.items()))


class ScanReader:
    """Read datalist rows into volumes, keeping what fits in memory.

    Args:
        preprocessing: how a scan is loaded and normalised.
        cache_mb: how many megabytes of preprocessed volumes to keep, oldest out first. Volumes that ``preload`` read
            lie in shared memory, so that workers do not copy them.
        quarantine: where scans that fail are recorded.
    """

    def __init__(
        self, preprocessing: Preprocessing, *, cache_mb: float = 2048, quarantine: Quarantine | None = None
    ) -> None:
        self.preprocessing = preprocessing
        self.cache_bytes = int(cache_mb * 2**20)
        self.quarantine = quarantine if quarantine is not None else Quarantine()
        self._cache: OrderedDict[int, Volume] = OrderedDict()
        self._failed: dict[int, ScanError] = {}
        self._held = 0

    def read(self, scan: int, row: Mapping[str, Any]) -> Volume:
        """The volume of row number ``scan``; raises :class:`ScanError` (and quarantines) where it cannot be used."""
        if scan in self._failed:
            raise self._failed[scan]
        if scan in self._cache:
            self._cache.move_to_end(scan)
            return self._cache[scan]
        try:
            volume = self.preprocessing.volume(row)
        except ScanError as error:
            self.refuse(scan, error)
            raise
        size = _bytes(volume)
        if size <= self.cache_bytes:
            while self._held + size > self.cache_bytes:
                self._held -= _bytes(self._cache.popitem(last=False)[1])
            self._cache[scan] = volume
            self._held += size
        return volume

    def refuse(self, scan: int, error: ScanError) -> None:
        """Quarantine a scan that could be read but not used."""
        self._failed[scan] = error
        self.quarantine.add(scan, error)

    def preload(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Read rows, with a progress bar, until the cache is full: what is bad is known before training starts.

        Raises:
            DatalistError: if no scan can be used.
        """
        usable = 0
        for scan, row in enumerate(tqdm(rows, desc="reading scans", unit="scan", leave=False)):
            try:
                volume = self.read(scan, row)
            except ScanError:
                continue
            usable += 1
            if scan in self._cache:
                for tensor in volume:
                    if tensor is not None:
                        tensor.share_memory_()
            if self._held > 0.95 * self.cache_bytes:
                logger.info("the cache of %.0f MB is full after %d scans", self.cache_bytes / 2**20, scan + 1)
                break
        if not usable and len(rows):
            first = next(iter(self.quarantine.reasons().values()))
            raise DatalistError(
                "No scan of the datalist can be used.",
                got=f"{len(rows)} scans, the first: {first}",
                wanted=f"at least one readable 3D scan under {keys.IMAGE}",
                fix="Check the datalist and the folder that it points to.",
            )


def _bytes(volume: Volume) -> int:
    return sum(tensor.nbytes for tensor in volume if tensor is not None)
