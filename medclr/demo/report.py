"""What the demo found, as figures and as a table."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medclr.data.datalist import Datalist
from medclr.demo.pictures import Case
from medclr.demo.volumes import first_image
from medclr.keys import LABEL, PATIENT_ID

SHOWN_CASES = 3
ARMS = {"pretrained": "with pretraining", "scratch": "from scratch"}
"""What is compared, by the name of its folders: the same fine-tuning with and without the pretrained encoder."""


@dataclass(frozen=True)
class Outcome:
    """Figures of one demo.

    Args:
        patients: in all.
        scans: in all.
        unseen: patients of the test section that Dice was measured on.
        seconds_a_step: of pretraining, without validation.
        recall_before, recall_after: pair recall on validation patients: (mean, low, high) of an untrained and of the
            pretrained encoder; None where no validation patient has two scans.
        dice: mean Dice over unseen patients, one value a seed, by arm; empty without masks.
        pictures: the PNG files.
        output: the folder of everything.
    """

    patients: int
    scans: int
    unseen: int
    seconds_a_step: float
    recall_before: tuple[float, float, float] | None
    recall_after: tuple[float, float, float] | None
    dice: dict[str, list[float]]
    pictures: list[Path]
    output: Path

    @classmethod
    def collect(cls, seeds: int, output: Path, split: Datalist, pictures: list[Path]) -> Outcome:
        """Read what the runs have written below ``output``."""
        events = EventAccumulator(str(output / "pretraining" / "tensorboard"))
        events.Reload()
        points = events.Scalars("train/loss")
        gaps = [(b.wall_time - a.wall_time) / (b.step - a.step) for a, b in pairwise(points)]
        recall = []
        if "validation/pair_recall" in events.Tags()["scalars"]:
            names = ("pair_recall", "pair_recall_low", "pair_recall_high")
            curves = [[point.value for point in events.Scalars(f"validation/{name}")] for name in names]
            recall = [(curves[0][place], curves[1][place], curves[2][place]) for place in (0, -1)]
        counts = split.summary()
        tables = {
            arm: [json.loads((output / f"{arm}_{seed}" / "dice_test.json").read_text()) for seed in range(seeds)]
            for arm in ARMS
            if seeds
        }
        return cls(
            patients=sum(part["patients"] for part in counts.values()),
            scans=sum(part["scans"] for part in counts.values()),
            unseen=tables["pretrained"][0]["patients"] if tables else counts["test"]["patients"],
            seconds_a_step=float(np.median(gaps)) if gaps else float("nan"),
            recall_before=recall[0] if recall else None,
            recall_after=recall[1] if recall else None,
            dice={arm: [part["mean"] for part in parts if part["mean"] is not None] for arm, parts in tables.items()},
            pictures=pictures,
            output=output,
        )


def cases_of(split: Datalist, output: Path) -> list[Case]:
    """The files of the first unseen patients that have a mask, one scan each."""
    first: dict[str, dict[str, Any]] = {}
    for row in split.test:
        if row.get(LABEL):
            first.setdefault(row[PATIENT_ID], row)
    cases = []
    for number, row in enumerate(list(first.values())[:SHOWN_CASES]):
        image = first_image(row)
        name = image.name.removesuffix(".gz").removesuffix(".nii") + "_seg.nii.gz"
        place = Path(os.path.relpath(image, split.root)).parent / name
        files = [output / f"{arm}_0" / "predictions" / place for arm in ARMS]
        cases.append(Case(f"unseen patient {number + 1}", image, Path(row[LABEL]), *files))
    return cases


def print_report(console: Console, outcome: Outcome, seconds: float) -> None:
    """The table at the end."""
    table = Table(title="What came of it")
    table.add_column("what")
    table.add_column("figure", overflow="fold")
    table.add_row("patients, scans", f"{outcome.patients}, {outcome.scans}")
    table.add_row("a step of pretraining", f"{outcome.seconds_a_step:.2f} s")
    if outcome.recall_before is not None and outcome.recall_after is not None:
        table.add_row(
            "pair recall, untrained encoder", "{:.2f} (95% interval {:.2f} to {:.2f})".format(*outcome.recall_before)
        )
        table.add_row(
            "pair recall, pretrained encoder", "{:.2f} (95% interval {:.2f} to {:.2f})".format(*outcome.recall_after)
        )
    for arm, label in ARMS.items():
        values = outcome.dice.get(arm)
        if values:
            spread = f", {min(values):.3f} to {max(values):.3f} over {len(values)} seeds" if len(values) > 1 else ""
            table.add_row(
                f"Dice (mean of classes), {outcome.unseen} unseen patients, {label}", f"{np.mean(values):.3f}{spread}"
            )
    table.add_row("pictures", "\n".join(map(str, outcome.pictures)))
    table.add_row("encoder", str(outcome.output / "pretraining" / "encoder.safetensors"))
    table.add_row("everything else", str(outcome.output))
    table.add_row("time", f"{seconds / 60:.1f} minutes")
    console.print(table)
    console.print("A demo of this size shows how it works, not how well: see docs/benchmarks.md. Research use only.")
