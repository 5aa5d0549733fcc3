"""Embeddings of whole scans: windows over a scan, the mean of their features, one row of a table a scan."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data.utils import dense_patch_slices
from monai.inferers import Inferer
from monai.utils.enums import CommonKeys
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from medclr import keys
from medclr.data.crops import checked_size
from medclr.data.scans import ScanReader
from medclr.errors import ConfigError, DatalistError, ScanError

logger = logging.getLogger(__name__)


class ScanDataset(Dataset[dict[str, Any]]):
    """One item a scan that can be used; those that cannot are quarantined at construction.

    Args:
        datalist: rows of one section of a datalist.
        reader: reads, caches and quarantines scans.
        allow_empty: whether a datalist without rows gives an empty data set, and says so in the log.

    Raises:
        DatalistError: if no scan can be used.

    Items are dictionaries with ``image`` (C, X, Y, Z), ``label`` (), the patient's place among the patients, and
    ``scan`` (), the row's place in the datalist. A scan that has become unusable since is quarantined; its item is a
    single black voxel with ``label`` and ``scan`` -1, which metrics and tables leave out.
    """

    def __init__(self, datalist: Sequence[Mapping[str, Any]], reader: ScanReader, *, allow_empty: bool = False) -> None:
        self.rows, self.reader = list(datalist), reader
        if not self.rows and allow_empty:
            logger.info("there are no held-out patients to look at")
        elif not self.rows:
            raise DatalistError(
                "There is no scan to embed.",
                got="an empty section",
                wanted="at least one row",
                fix="Name a section of the datalist that holds scans.",
            )
        reader.preload(self.rows, whole=True)
        bad = reader.failed
        self.scans = [scan for scan in range(len(self.rows)) if scan not in bad]
        names = [str(row[keys.PATIENT_ID]) for row in self.rows]
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        self.patients = [places[name] for name in names]
        reader.quarantine.watch(len(self.rows))

    def __len__(self) -> int:
        """Number of usable scans."""
        return len(self.scans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One preprocessed scan."""
        scan = self.scans[index]
        try:
            volume = self.reader.read(scan, self.rows[scan])
        except ScanError:  # the reader has quarantined it
            files = self.rows[scan][keys.IMAGE]
            black = torch.zeros(len(files) if isinstance(files, (list, tuple)) else 1, 1, 1, 1)
            return {keys.IMAGE: black, keys.LABEL: torch.tensor(-1), keys.SCAN: torch.tensor(-1)}
        return {
            keys.IMAGE: volume.image,
            keys.LABEL: torch.tensor(self.patients[scan]),
            keys.SCAN: torch.tensor(scan),
        }

    def summary(self) -> str:
        """Scans used and quarantined."""
        bad = len(self.reader.failed)
        return f"{len(self.rows) - bad} scans embedded, {bad} quarantined"


class WindowEmbedder(Inferer):
    """Mean of an encoder's features over windows that cover a scan.

    Features of whole scans differ with their size; windows show the encoder what it was trained on. Scans smaller than
    the window are padded with zeros, as crops are in training.

    Args:
        roi_size: voxels (X, Y, Z) of a window, the size of the views in pretraining.
        overlap: share of a window that the next one covers again, 0 to below 1.
        batch_size: windows a forward pass.
    """

    def __init__(self, roi_size: Sequence[int], *, overlap: float = 0.25, batch_size: int = 8) -> None:
        super().__init__()
        self.roi_size = checked_size("roi_size", roi_size)
        if not 0 <= overlap < 1 or batch_size < 1:
            raise ConfigError(
                "The windows are unusable.",
                got=f"overlap {overlap}, batch_size {batch_size}",
                wanted="overlap from 0 to below 1, batch_size >= 1",
                fix="For example overlap: 0.25.",
            )
        self.overlap, self.batch_size = overlap, batch_size

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Scans (B, C, X, Y, Z) to features (B, F)."""
        missing = [max(0, roi - edge) for roi, edge in zip(self.roi_size, inputs.shape[2:], strict=True)]
        around = [side for lack in reversed(missing) for side in (lack // 2, lack - lack // 2)]
        scans = pad(inputs, around)
        step = tuple(max(1, round(edge * (1 - self.overlap))) for edge in self.roi_size)
        windows = dense_patch_slices(tuple(scans.shape[2:]), self.roi_size, step)
        rows = []
        for scan in scans:
            features = [
                network(
                    torch.stack([scan[(slice(None), *window)] for window in windows[start : start + self.batch_size]]),
                    *args,
                    **kwargs,
                )
                for start in range(0, len(windows), self.batch_size)
            ]
            rows.append(torch.cat(features).float().mean(dim=0))
        return torch.stack(rows)


class EmbeddingTable:
    """Write one row a scan: the datalist's plain columns, then the features ``f0``, ``f1``, ...

    Args:
        path: the CSV file.
        dataset: the scans that are embedded.
    """

    def __init__(self, path: str | Path, dataset: ScanDataset) -> None:
        self.path, self.dataset = Path(path), dataset
        self.features: dict[int, list[float]] = {}

    def attach(self, engine: Engine) -> None:
        """Collect after each batch, write at the end."""
        engine.add_event_handler(Events.STARTED, lambda _: self.features.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Keep the features of one batch."""
        scans = engine.state.batch[keys.SCAN].flatten().tolist()
        rows = engine.state.output[CommonKeys.PRED].float().cpu().tolist()
        self.features.update({scan: row for scan, row in zip(scans, rows, strict=True) if scan >= 0})

    def write(self, engine: Engine) -> None:
        """Write the table and say where it is."""
        rows = self.dataset.rows
        plain = [
            name for name in dict.fromkeys(name for row in rows for name in row) if name not in (keys.IMAGE, keys.LABEL)
        ]
        width = len(next(iter(self.features.values())))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow([keys.SCAN, *plain, *(f"f{place}" for place in range(width))])
            for scan, features in sorted(self.features.items()):
                table.writerow(
                    [scan, *(rows[scan].get(name, "") for name in plain), *(f"{value:.6g}" for value in features)]
                )
        logger.info("%s; %d features each, in %s", self.dataset.summary(), width, self.path)
