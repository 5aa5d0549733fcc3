"""How well scans are segmented: Dice by class and patient, against the mask on the scan's own grid."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys
from numpy.typing import NDArray
from torch import Tensor

from medclr import keys
from medclr.engine.metrics import bootstrap_interval
from medclr.errors import ConfigError, DatalistError
from medclr.transfer import SegmentationDataset

logger = logging.getLogger(__name__)


def dice_by_class(prediction: Tensor, mask: Tensor, classes: int) -> NDArray[np.float64]:
    """Dice of every class above the background.

    A class that neither holds is nan: there is no answer to be right about. One that only the prediction holds is 0.

    Args:
        prediction: (X, Y, Z) classes.
        mask: (X, Y, Z) classes.
        classes: number of classes K, with the background.

    Returns:
        (K - 1,) in [0, 1] or nan.

    Raises:
        ConfigError: for two shapes, or a class that is not among the K.
    """
    if prediction.shape != mask.shape:
        raise ConfigError(
            "A segmentation does not lie on the grid of its mask.",
            got=f"shapes {tuple(prediction.shape)} and {tuple(mask.shape)}",
            wanted="one shape",
            fix="Bring the prediction back to the scan's own grid before it is measured (Invertd).",
        )
    found = [int(image.amin()) for image in (prediction, mask)] + [int(image.amax()) for image in (prediction, mask)]
    if min(found) < 0 or max(found) >= classes:
        raise ConfigError(
            "A segmentation or its mask holds a class that is not measured.",
            got=f"classes {min(found)} to {max(found)}",
            wanted=f"classes 0 to {classes - 1}",
            fix="Set out_channels to the number of classes in the masks, with the background.",
        )
    # One count a pair of classes: one-hot volumes of a whole scan may take gigabytes.
    joint = torch.bincount((mask.long() * classes + prediction.long()).flatten(), minlength=classes**2)
    table = joint.reshape(classes, classes).double()
    size = table.sum(dim=0) + table.sum(dim=1)
    return torch.where(size > 0, 2 * table.diagonal() / size, torch.nan)[1:].numpy()


def dice_summary(patients: Sequence[str], dice: NDArray[np.float64], names: Sequence[str]) -> dict[str, Any]:
    """Mean over patients, with its 95% interval by bootstrap over patients, in all and for each class.

    Scans of one patient are averaged first, classes of one patient next; patients count the same.

    Args:
        patients: one a scan.
        dice: (scans, classes), nan where a class is absent.
        names: of the classes.

    Returns:
        ``patients`` (those who have any of the classes), ``scans``, ``mean``, ``low``, ``high``, and ``classes``: for
        each its ``patients``, ``mean``, ``low``, ``high``. Numbers are None where no patient has the class.

    Example:
        >>> summary = dice_summary(["a", "a", "b"], np.array([[0.8], [0.6], [0.9]]), ["lesion"])
        >>> round(summary["mean"], 3)
        0.8
    """
    unique = list(dict.fromkeys(patients))
    owner = np.array([unique.index(patient) for patient in patients])
    table = np.array([_nanmean(dice[owner == place], axis=0) for place in range(len(unique))])
    means = _nanmean(table, axis=1)
    return {
        "patients": int(np.isfinite(means).sum()),
        "scans": len(patients),
        **_interval(means),
        "classes": {
            name: {"patients": int(np.isfinite(column).sum()), **_interval(column)}
            for name, column in zip(names, table.T, strict=True)
        },
    }


class DiceTable:
    """Write the Dice of each scan to a CSV file, and the mean over patients with its interval to JSON and the log.

    Expects of the evaluator's output ``pred``: (1, X, Y, Z) classes on the scan's own grid, decollated. The mask is
    read again from its file, so that no resampling of it flatters the number.

    Args:
        path: the CSV file: patient, scan (row of the datalist's section), one column a class, mean. The summary goes
            beside it with the suffix ``.json``.
        dataset: the scans that are segmented.
        classes: number of classes, with the background.
        names: of the classes above the background; ``class_1``, ``class_2``, ... if None.

    Raises:
        ConfigError: for no class above the background, or a number of names that does not fit.
        DatalistError: at the end, if nothing was segmented.
    """

    def __init__(
        self, path: str | Path, dataset: SegmentationDataset, *, classes: int, names: Sequence[str] | None = None
    ) -> None:
        self.path, self.dataset, self.classes = Path(path), dataset, classes
        self.names = [f"class_{place}" for place in range(1, classes)] if names is None else list(names)
        if classes < 2:
            raise ConfigError(
                "There is no class to measure.",
                got=f"{classes} classes",
                wanted="two or more, with the background",
                fix="For example out_channels: 2.",
            )
        if len(self.names) != classes - 1:
            raise ConfigError(
                "The names of the classes do not fit their number.",
                got=self.names,
                wanted=f"{classes - 1} names, without the background",
                fix="Correct class_names, or set it to null.",
            )
        self.dice: dict[int, NDArray[np.float64]] = {}
        self.summary: dict[str, Any] = {}
        self._load = dataset.preprocessing.transforms[0].loader  # whatever reader the scans need, without the checks

    def attach(self, engine: Engine) -> None:
        """Measure after each scan, write at the end."""
        engine.add_event_handler(Events.STARTED, lambda _: self.dice.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Engine) -> None:
        """Measure the scans of one batch."""
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            scan = int(item[keys.SCAN])
            mask = self._load(self.dataset.rows[scan][keys.LABEL]).as_tensor()[0]
            prediction = torch.as_tensor(output[CommonKeys.PRED])[0].cpu()
            self.dice[scan] = dice_by_class(prediction, mask, self.classes)

    def write(self, engine: Engine) -> None:
        """Write the table and the summary, and say what they say."""
        if not self.dice:
            raise DatalistError(
                "Nothing was segmented.",
                got="no scan",
                wanted="at least one scan with a mask",
                fix="Name a section of the datalist whose scans have masks.",
            )
        scans = sorted(self.dice)
        patients = [str(self.dataset.rows[scan][keys.PATIENT_ID]) for scan in scans]
        table = np.array([self.dice[scan] for scan in scans])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["patient", "scan", *self.names, "mean"])
            for patient, scan, row in zip(patients, scans, table, strict=True):
                writer.writerow([patient, scan, *map(_text, row), _text(_nanmean(row, axis=0))])
        self.summary = dice_summary(patients, table, self.names)
        self.summary["quarantined"] = len(self.dataset.quarantine.reasons())
        self.path.with_suffix(".json").write_text(json.dumps(self.summary, indent=2) + "\n")
        engine.state.metrics["dice"] = self.summary["mean"]
        for line in self.text().splitlines():
            logger.info(line)

    def text(self) -> str:
        """The summary in plain lines."""
        done = self.summary
        lines = [f"Dice {_phrase(done)}: {done['patients']} patients, {done['scans']} scans; by scan in {self.path}"]
        lines += [f"  {name} {_phrase(part)}: {part['patients']} patients" for name, part in done["classes"].items()]
        if done["quarantined"]:
            lines.append(f"{done['quarantined']} scans quarantined")
        return "\n".join(lines)


def _interval(values: NDArray[np.float64]) -> dict[str, float | None]:
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "low": None, "high": None}
    low, high = bootstrap_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}


def _nanmean(values: NDArray[np.float64], axis: int) -> Any:
    count = np.isfinite(values).sum(axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def _phrase(part: Mapping[str, Any]) -> str:
    if part["mean"] is None:
        return "not measured"
    return f"{part['mean']:.3f} (95% interval {part['low']:.3f} to {part['high']:.3f})"


def _text(value: float) -> str:
    return "" if not np.isfinite(value) else f"{value:.6g}"
