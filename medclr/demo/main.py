"""The demo: index, split, pretrain, fine-tune with and without, evaluate on patients never seen, embed, and show it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from medclr.data.datalist import Datalist, write_datalist
from medclr.data.index import IndexResult, index
from medclr.data.phantom import make_cohort
from medclr.data.splits import make_splits
from medclr.demo.pictures import draw_embeddings, draw_slices
from medclr.demo.report import ARMS, Outcome, cases_of, print_report
from medclr.demo.stages import run_bundle
from medclr.demo.volumes import count_classes, fitting_roi
from medclr.errors import ConfigError
from medclr.keys import LABEL, TEST

SHAPE, SPACING = (44, 44, 36), (1.3, 1.3, 1.3)
"""Of the synthetic cohort: coarse, so that a few minutes of two CPU cores show something."""
SCANNERS = ("scanner_a", "scanner_b")
"""T1-like both: to know a patient again across T1 and T2 takes longer than a demo."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does.

    Args:
        output: a folder for everything.
        folder: the user's own scans, or None for the synthetic cohort.
        patients: whose they are: a table or a pattern, as for ``medclr index``; needed with ``folder``.
        labels: where the masks are, as for ``medclr index``.
        images: which files are scans, as for ``medclr index``.
        synthetic_patients: size of the synthetic cohort.
        pretrain_epochs: each draws every training patient ``passes`` times.
        passes: draws of a patient an epoch.
        batch_size: patients a step of pretraining.
        finetune_epochs: of 10 steps each.
        labelled: patients whose labels are used.
        seeds: repetitions of the fine-tuning, with and without pretraining.
        init_filters: width of the network.

    Raises:
        ConfigError: own scans without ``patients``, or counts below 1.
    """

    output: Path
    folder: Path | None = None
    patients: str | None = None
    labels: str | None = None
    images: str | None = None
    synthetic_patients: int = 40
    pretrain_epochs: int = 30
    passes: int = 8
    batch_size: int = 24
    finetune_epochs: int = 35
    labelled: int = 3
    seeds: int = 2
    init_filters: int = 8

    def __post_init__(self) -> None:
        if self.folder is not None and not self.patients:
            raise ConfigError(
                "It is not known whose scans these are.",
                got=f"the folder {self.folder} alone",
                wanted="a table of patients, or a pattern of file names",
                fix="Add --patients volumes.csv, or --patients '{patient}_*.nii.gz'.",
            )
        counts = (
            "synthetic_patients",
            "pretrain_epochs",
            "passes",
            "batch_size",
            "finetune_epochs",
            "labelled",
            "seeds",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is unusable.", got=getattr(self, name), wanted=">= 1", fix=f"Raise {name}.")


def run_demo(settings: DemoSettings, console: Console | None = None) -> Outcome:
    """Run the whole job and print what came of it.

    Returns:
        The figures of the table, and the files.

    Raises:
        MedclrError: a stage failed; the message names its log.
    """
    console = console or Console()
    start = time.perf_counter()
    output = settings.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            "The demo does not write over an earlier one.",
            got=f"{output}, which is not empty",
            wanted="a folder that is new or empty",
            fix="Remove it, or name another: --output FOLDER.",
        )
    found = _find_scans(settings, console)
    labelled = any(row.get(LABEL) for row in found.datalist.training)
    roi = fitting_roi(found.datalist.training)
    splits = _split(found.datalist, settings, labelled, console)
    split, few = output / "split.json", output / "few.json"
    write_datalist(splits[""], split)
    shared = {"roi_size": roi, "init_filters": settings.init_filters}

    _say(
        console, f"Pretraining without labels on {len(splits[''].patients('training'))} patients, views of {roi} voxels"
    )
    pretraining = output / "pretraining"
    run_bundle(
        console,
        "contrastive_pretraining",
        ["train"],
        output / "logs" / "pretraining.log",
        datalist=split,
        output_dir=pretraining,
        batch_size=min(settings.batch_size, len(splits[""].patients("training"))),
        passes=settings.passes,
        max_epochs=settings.pretrain_epochs,
        val_interval=settings.pretrain_epochs if len(splits[""].validation) > 1 else 0,
        log_interval=2,
        **shared,
    )
    if labelled:
        write_datalist(splits[f"labelled{settings.labelled}"], few)
        _fine_tune(settings, few, pretraining / "encoder.safetensors", count_classes(found.datalist), shared, console)

    _say(console, "Embedding all scans")
    everything = output / "everything.json"
    rows = [row for section in splits[""].sections.values() for row in section]
    write_datalist(Datalist({TEST: rows}, found.datalist.root), everything)
    run_bundle(
        console,
        "contrastive_pretraining",
        ["inference"],
        output / "logs" / "embedding.log",
        datalist=everything,
        output_dir=pretraining,
        **shared,
    )
    pictures = [output / "embeddings.png"]
    draw_embeddings(pictures[0], pretraining / "embeddings.csv")
    if labelled:
        pictures.insert(0, output / "slices.png")
        draw_slices(pictures[0], cases_of(splits[""], output))
    outcome = Outcome.collect(settings.seeds if labelled else 0, output, splits[""], pictures)
    print_report(console, outcome, time.perf_counter() - start)
    return outcome


def _find_scans(settings: DemoSettings, console: Console) -> IndexResult:
    folder, patients = settings.folder, settings.patients
    if folder is None:
        folder = settings.output / "cohort"
        _say(console, f"Making {settings.synthetic_patients} synthetic patients in {folder}")
        patients = str(
            make_cohort(
                folder,
                patients=settings.synthetic_patients,
                shape=SHAPE,
                spacing=SPACING,
                scanners=SCANNERS,
                progress=True,
            )
        )
    _say(console, f"Indexing {folder}")
    assert patients is not None  # DemoSettings has seen to it
    found = index(folder, patients=patients, labels=settings.labels, images=settings.images, progress=True)
    found.write(settings.output / "datalist.json")
    counts = found.summary
    console.print(
        f"{counts['scans']} scans of {counts['patients']} patients, {counts['labelled']} with a mask, "
        f"{sum(counts['quarantined'].values())} files in quarantine.json"
    )
    return found


def _split(datalist: Datalist, settings: DemoSettings, labelled: bool, console: Console) -> dict[str, Datalist]:
    splits = make_splits(
        datalist, fractions=(0.6, 0.15, 0.25), labelled=[settings.labelled] if labelled else (), seed=0
    )
    if labelled and not any(row.get(LABEL) for row in splits[""].test):
        raise ConfigError(
            "No patient of the test section has a mask.",
            got=f"{sum(1 for row in datalist.training if row.get(LABEL))} masks in all",
            wanted="masks of most patients, so that some remain for the evaluation",
            fix="Add masks, or leave all of them out to see the pretraining alone.",
        )
    parts = [f"{len(splits[''].patients(name))} for {name}" for name in splits[""].sections]
    masks = f"; masks of {settings.labelled} patients are used to fine-tune" if labelled else ""
    console.print(f"Split by patient: {', '.join(parts)}{masks}")
    return splits


def _fine_tune(
    settings: DemoSettings, datalist: Path, encoder: Path, classes: int, shared: dict[str, object], console: Console
) -> None:
    for seed in range(settings.seeds):
        for arm in ARMS:
            _say(console, f"Fine-tuning on {settings.labelled} patients, {arm}, seed {seed}; then the unseen patients")
            run_bundle(
                console,
                "segmentation",
                ["train", "evaluate", "train_evaluate"],
                settings.output / "logs" / f"{arm}_{seed}.log",
                datalist=datalist,
                output_dir=settings.output / f"{arm}_{seed}",
                **({"pretrained": encoder} if arm == "pretrained" else {}),
                **({"predictions": settings.output / f"{arm}_{seed}" / "predictions"} if seed == 0 else {}),
                out_channels=classes,
                max_epochs=settings.finetune_epochs,
                steps_per_epoch=10,
                seed=seed,
                **shared,
            )


def _say(console: Console, text: str) -> None:
    console.rule(f"[bold]{text}", align="left")
