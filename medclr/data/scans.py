"""Reading scans during a run: a cache for those that fit in memory, and quarantine for those that cannot be used."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medclr import keys
from medclr.data.preprocess import Preprocessing, Volume
from medclr.errors import ConfigError, DatalistError, ScanError

logger = logging.getLogger(__name__)


class Quarantine:
    """The scans of a datalist that a run could not use, with the reason.

    Kept in a file of JSON lines, so that data loader workers and ranks can add to it at the same time. It names a scan
    by its place in the datalist, not by its path, which may hold a name; so each section of a datalist needs a file of
    its own. What an earlier run left in the file stays there and is not counted: scans are repaired, datalists change.

    Args:
        path: the file, or None to keep it in this process's memory alone.
        limit: share of the scans, 0 to 1, that may be added once :meth:`watch` was called; one scan always may.

    Raises:
        ConfigError: for another limit.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, limit: float = 0.1) -> None:
        if not 0 <= limit <= 1:
            raise ConfigError(
                "The share of scans that may become unusable is no share.",
                got=limit,
                wanted="a number from 0 to 1",
                fix="Set max_bad_scans: 0.1; 1 never stops a run.",
            )
        self.path, self.limit = None if path is None else Path(path), limit
        self._watched = 0
        self._before: frozenset[int] = frozenset()
        self._known: dict[int, str] = {}
        self._begin = self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def watch(self, scans: int) -> None:
        """From now on, let too many further scans, of all processes that share the file, stop the run.

        A few bad scans are left out of a run; a disk that is gone is not, as nothing but what is cached would be left.

        Args:
            scans: how many there are.
        """
        self._watched, self._before = scans, frozenset(self.reasons())

    def add(self, scan: int, reason: ScanError) -> None:
        """Record that scan number ``scan`` cannot be used.

        Raises:
            DatalistError: that is one scan too many, since :meth:`watch`.
        """
        if scan in self._known:
            return
        text = f"{reason.problem} Got {reason.got}, wanted {reason.wanted}. {reason.fix}"
        self._known[scan] = text
        logger.warning("scan %d of the datalist is quarantined: %s", scan, text)
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:  # one short write in append mode is not interleaved
                    file.write(json.dumps({"scan": scan, "reason": text}) + "\n")
            except OSError as error:  # of the list, which must not pass for an error of the scan
                logger.warning("%s cannot be written: %s", self.path, error.strerror or error)
        if self._watched:
            self._stop_above_limit(text)

    def _stop_above_limit(self, last: str) -> None:
        most = max(1, math.floor(self.limit * self._watched + 1e-9))  # 0.29 of 100 are 29, whatever a float says
        added = len(self.reasons().keys() - self._before)
        if added > most:
            raise DatalistError(
                "Too many scans have become unusable during the run.",
                got=f"{added} of {self._watched} since the start, the last: {last}",
                wanted=f"at most {most} (max_bad_scans: {self.limit:g})",
                fix="Check that the folder of the scans is still mounted. "
                + (f"All reasons stand in {self.path}. " if self.path is not None else "")
                + "If so many scans may be left out, raise max_bad_scans.",
            )

    def reasons(self) -> dict[int, str]:
        """Reason by scan number, of all workers and ranks that share the file."""
        known = dict(self._known)
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._begin)
                lines = file.read().splitlines()
            for line in lines:
                try:
                    entry = json.loads(line)
                except ValueError:  # half a line, of a process that was killed or is writing now
                    continue
                known.setdefault(entry["scan"], entry["reason"])
        return dict(sorted(known.items()))


class ScanReader:
    """Read datalist rows into volumes, keeping what fits in memory.

    Args:
        preprocessing: how a scan is loaded and normalised.
        cache_mb: how many megabytes of preprocessed volumes to keep, oldest out first; 0 keeps none. Workers that are
            forked share what was kept before, and each may keep as much again of what it reads itself.
        quarantine: where scans that fail are recorded.

    A reader serves one list of rows, since it knows a scan by its number.

    Raises:
        ConfigError: for an unusable ``cache_mb``.
    """

    def __init__(
        self, preprocessing: Preprocessing, *, cache_mb: float = 2048, quarantine: Quarantine | None = None
    ) -> None:
        if not 0 <= cache_mb < math.inf:
            raise ConfigError("The cache is unusable.", got=cache_mb, wanted=">= 0 MB", fix="Set cache_mb: 2048.")
        self.preprocessing = preprocessing
        self.cache_bytes = int(cache_mb * 2**20)
        self.quarantine = quarantine if quarantine is not None else Quarantine()
        self._cache: OrderedDict[int, Volume] = OrderedDict()
        self._failed: dict[int, ScanError] = {}
        self._files: dict[int, Any] = {}
        self._held = 0

    @property
    def failed(self) -> frozenset[int]:
        """Numbers of the scans that this reader found unusable."""
        return frozenset(self._failed)

    def read(self, scan: int, row: Mapping[str, Any]) -> Volume:
        """The volume of row number ``scan``.

        Raises:
            ScanError: where it cannot be used; it is quarantined, and not read again.
            DatalistError: where it is one too many of those, as :meth:`Quarantine.add` says.
            ConfigError: where this number stood for another row before.
        """
        volume = self._load(scan, row)
        size = _bytes(volume)
        if scan in self._cache:
            self._cache.move_to_end(scan)
        elif size <= self.cache_bytes:
            while self._held + size > self.cache_bytes:
                self._held -= _bytes(self._cache.popitem(last=False)[1])
            self._keep(scan, volume)
        return volume

    def refuse(self, scan: int, error: ScanError) -> None:
        """Quarantine a scan that could be read but not used."""
        # A copy, because the traceback of the error itself holds on to the voxels that were being looked at.
        self._failed[scan] = copy(error)
        self.quarantine.add(scan, error)

    def preload(self, rows: Sequence[Mapping[str, Any]], *, whole: bool = False) -> None:
        """Read rows, with a progress bar, until the cache is full: what is bad is known before training starts.

        Args:
            rows: the rows, in the order of their numbers.
            whole: read the rest as well, without keeping it, so that every bad scan is known.

        Raises:
            DatalistError: if no scan can be used.
        """
        usable = 0
        for scan, row in enumerate(tqdm(rows, desc="reading scans", unit="scan", leave=False)):
            try:
                volume = self._load(scan, row)
            except ScanError:
                continue
            usable += 1
            if scan in self._cache:
                continue
            if self._held + _bytes(volume) <= self.cache_bytes:
                self._keep(scan, volume)
            elif not whole:
                logger.info("the cache of %.0f MB is full after %d scans", self.cache_bytes / 2**20, scan)
                break
        if not usable and len(rows):
            first = next(iter(self.quarantine.reasons().values()))
            raise DatalistError(
                "No scan of the datalist can be used.",
                got=f"{len(rows)} scans, the first: {first}",
                wanted=f"at least one readable 3D scan under {keys.IMAGE}",
                fix="Check the datalist and the folder that it points to.",
            )

    def _load(self, scan: int, row: Mapping[str, Any]) -> Volume:
        files = row.get(keys.IMAGE)
        if self._files.setdefault(scan, files) != files:
            raise ConfigError(
                "One reader was given two lists of scans.",
                got=f"two different rows with number {scan}",
                wanted="a reader for each section of a datalist",
                fix="Make a ScanReader, with a Quarantine, for each dataset.",
            )
        if scan in self._failed:
            raise copy(self._failed[scan])
        if scan in self._cache:
            return self._cache[scan]
        try:
            return self.preprocessing.volume(row)
        except ScanError as error:
            self.refuse(scan, error)
            raise

    def _keep(self, scan: int, volume: Volume) -> None:
        self._cache[scan] = volume
        self._held += _bytes(volume)


def _bytes(volume: Volume) -> int:
    return sum(tensor.nbytes for tensor in volume if tensor is not None)
