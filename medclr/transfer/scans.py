"""Scans with their masks, preprocessed once and kept in memory, for training, validation and inference downstream."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.utils import MAX_SEED
from torch.utils.data import Dataset
from tqdm import tqdm

from medclr import keys
from medclr.data import Preprocessing, Quarantine
from medclr.data.load import plain
from medclr.draws import stable_seed
from medclr.errors import ConfigError, DatalistError, ScanError, find_cause

logger = logging.getLogger(__name__)

Item = dict[str, Any]


class SegmentationDataset(Dataset[Any]):
    """One item a scan that can be used: those without a mask are left out, those that cannot be read are quarantined.

    Every scan is read once at construction, so that what is bad is known before training starts; what fits is kept.
    Masks are read where ``preprocessing`` loads ``label``.

    Args:
        data: rows of one section of a datalist.
        preprocessing: how a scan is loaded and normalised.
        transform: random augmentation of an item, or None; to resume a run exactly, a MONAI transform that has
            ``set_random_state``, such as a ``Compose`` of such.
        in_channels: sequences that a scan must have.
        out_channels: classes that a mask may hold, with the background; needed where masks are read.
        quarantine: where scans that fail are recorded.
        cache_mb: how many megabytes of preprocessed scans to keep.
        may_be_empty: whether a section without rows, or without masks, is no error but a data set of length 0.
        seed: the run's seed.

    Raises:
        ConfigError: for an unusable ``cache_mb``, or masks without ``out_channels``.
        DatalistError: for no rows, no row with a mask, no scan that can be used, or no mask with any foreground; later,
            where more scans become unusable than ``quarantine`` tolerates.

    Items are dictionaries with ``image`` (C, X, Y, Z) float32 and, with masks, ``label`` (1, X, Y, Z) int16, both
    MetaTensors that know the way back to the scan's own grid, and ``scan``, the row's place in ``data``; or whatever
    ``transform`` makes of that.

    An item that :class:`~medclr.transfer.ScanSampler` asks for is a pure function of (seed, epoch, turn, scan): the
    transform's random state is set for each, in whatever worker it runs and whatever came before. This reaches as far
    as MONAI's ``set_random_state``: a transform without it, and one inside a ``Compose`` that draws from the global
    generators of NumPy or torch, draw something else in a resumed run.

    Example:
        >>> masked = Preprocessing(load=["image", "label"])
        >>> SegmentationDataset(datalist.training, masked, in_channels=1, out_channels=3)  # doctest: +SKIP
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        preprocessing: Preprocessing,
        transform: Callable[[Item], Any] | None = None,
        *,
        in_channels: int = 1,
        out_channels: int | None = None,
        quarantine: Quarantine | None = None,
        cache_mb: float = 2048,
        may_be_empty: bool = False,
        seed: int = 0,
    ) -> None:
        self.rows, self.preprocessing, self.transform = list(data), preprocessing, transform
        self.in_channels, self.out_channels, self.seed = in_channels, out_channels, int(seed)
        self.quarantine = quarantine if quarantine is not None else Quarantine()
        self.masked = keys.LABEL in preprocessing.load
        if not 0 <= cache_mb < math.inf:
            raise ConfigError("The cache is unusable.", got=cache_mb, wanted=">= 0 MB", fix="Set cache_mb: 2048.")
        if self.masked and out_channels is None:
            raise ConfigError(
                "Masks cannot be checked without the number of classes.",
                got="out_channels None",
                wanted="the number of classes, with the background",
                fix="For example out_channels: 2.",
            )
        self.scans: list[int] = []
        self._cache: dict[int, Item] = {}
        self._voxels = [1] * (out_channels or 1)
        chosen = [n for n, row in enumerate(self.rows) if not self.masked or row.get(keys.LABEL) is not None]
        self.without_mask = len(self.rows) - len(chosen)
        if not chosen and not may_be_empty:
            raise DatalistError(
                "There is no scan to segment." if not self.masked else "No scan has a mask.",
                got=f"{len(self.rows)} rows, none of them with {keys.LABEL}" if self.rows else "an empty section",
                wanted="at least one row" + (f" with the path of a mask under {keys.LABEL}" if self.masked else ""),
                fix="Index the folder with its labels, or name another section of the datalist.",
            )
        if chosen:
            self._read_all(chosen, cache_mb * 2**20)
        for line in self.summary().splitlines():
            logger.info(line)
        if transform is not None and not hasattr(transform, "set_random_state"):
            kind = getattr(transform, "__name__", type(transform).__name__)
            logger.warning("%s takes no random state: where it draws, a run cannot be resumed exactly", kind)
        self.quarantine.watch(len(self.rows))

    def __len__(self) -> int:
        """Number of usable scans."""
        return len(self.scans)

    def __getitem__(self, index: int | tuple[int, int, int]) -> Any:
        """The scan of place ``index``, or of (place, epoch, turn), augmented if there is a transform.

        By place alone, the transform draws whatever its random state gives. Where the scan has become unusable, it is
        quarantined, and the next one stands in.
        """
        item = self._find(index[0] if isinstance(index, tuple) else index)
        if self.transform is None:
            return item
        if isinstance(index, tuple) and hasattr(self.transform, "set_random_state"):
            _, epoch, turn = index
            self.transform.set_random_state(seed=stable_seed("segmentation", self.seed, epoch, turn) % MAX_SEED)
        return self.transform(item)

    def class_shares(self) -> list[float]:
        """Share of each class of the masks' voxels, the background first; a class that is nowhere counts one voxel."""
        return [count / sum(self._voxels) for count in self._voxels]

    def _find(self, index: int) -> Item:
        first = range(len(self.scans))[index]
        for place in (*range(first, len(self.scans)), *range(first)):
            scan = self.scans[place]
            kept = self._cache.get(scan)
            if kept is not None:
                # A clone, because transforms write their trace into the MetaTensor that they are given.
                return {k: v.clone() if torch.is_tensor(v) else v for k, v in kept.items()}
            try:
                return self._load(scan)
            except ScanError as error:
                self.quarantine.add(scan, error)
        raise DatalistError(
            "No scan of the section can be used any more.",
            got=f"{len(self.scans)} scans that could be read at the start",
            wanted="files that stay where they are",
            fix="Check that the folder of the scans is still there.",
        )

    def summary(self) -> str:
        """Scans used, left out and quarantined, in plain lines."""
        patients = len({str(self.rows[scan].get(keys.PATIENT_ID)) for scan in self.scans})
        lines = [f"{len(self.scans)} scans of {patients} patients in use"]
        if self.without_mask:
            lines.append(f"{self.without_mask} scans left out: they have no mask")
        bad = self.quarantine.reasons()
        if bad:
            lines.append(f"{len(bad)} scans quarantined")
        return "\n".join(lines)

    def _read_all(self, chosen: Sequence[int], room: float) -> None:
        for scan in tqdm(chosen, desc="reading scans", unit="scan", leave=False):
            try:
                item = self._load(scan)
            except ScanError as error:
                self.quarantine.add(scan, error)
                continue
            self.scans.append(scan)
            if self.masked:
                found = torch.bincount(plain(item[keys.LABEL]).flatten().long(), minlength=len(self._voxels))
                self._voxels = [old + new for old, new in zip(self._voxels, found.tolist(), strict=True)]
            size = sum(value.numel() * value.element_size() for value in item.values() if torch.is_tensor(value))
            if size <= room:
                self._cache[scan] = item
                room -= size
        if not self.scans:
            first = next(iter(self.quarantine.reasons().values()))
            raise DatalistError(
                "No scan of the section can be used.",
                got=f"{len(chosen)} scans, the first: {first}",
                wanted="at least one readable 3D scan" + (" with its mask" if self.masked else ""),
                fix="Check the datalist and the folder that it points to.",
            )
        if self.masked and all(count == 1 for count in self._voxels[1:]):
            raise DatalistError(
                "All masks are empty.",
                got=f"{len(self.scans)} masks in which every voxel is 0",
                wanted="at least one voxel of a class above 0",
                fix="Check that label names the masks, and that they were exported with their classes.",
            )

    def _load(self, scan: int) -> Item:
        try:
            done = self.preprocessing(dict(self.rows[scan]))
        except Exception as error:  # MONAI wraps what a transform raises
            cause = find_cause(error)
            if cause is None:
                raise
            raise cause from None
        image: MetaTensor = done[keys.IMAGE]
        if image.shape[0] != self.in_channels:
            raise ScanError(
                "A scan has another number of sequences than the network takes.",
                got=image.shape[0],
                wanted=self.in_channels,
                fix=f"Set in_channels: {image.shape[0]} if all scans are like this one.",
            )
        item: Item = {keys.IMAGE: image, keys.SCAN: scan}
        if self.masked:
            label = done[keys.LABEL]
            highest = int(label.max())
            if self.out_channels is not None and highest >= self.out_channels:
                raise ScanError(
                    "A mask holds a class that the network does not have.",
                    got=f"class {highest}",
                    wanted=f"classes 0 to {self.out_channels - 1}",
                    fix=f"Set out_channels: {highest + 1} (the background counts), or correct the mask.",
                )
            item[keys.LABEL] = label.to(torch.int16)
        return item
