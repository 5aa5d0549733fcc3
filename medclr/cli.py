"""The command line: thin commands around the package's functions.

What is slow to import is imported by the command that needs it, so that ``medclr --help`` answers at once.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medclr.errors import ConfigError, MedclrError

if TYPE_CHECKING:
    from medclr.data.datalist import Datalist

app = typer.Typer(
    help="Contrastive pretraining of 3D encoders on unlabelled scans, for MONAI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bundles = typer.Typer(help="The bundles that come with medclr: list or copy them.", no_args_is_help=True)
app.add_typer(bundles, name="bundle")
_state = {"debug": False}


def main() -> None:
    """Run the command line. An error that medclr raises on purpose ends with its own lines and exit code 2."""
    try:
        app()
    except MedclrError as error:
        if _state["debug"]:
            raise
        Console(stderr=True, soft_wrap=True).print(Text(str(error), style="red"))
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"medclr {version('medclr')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _state["debug"] = debug


@app.command("index")
def index_command(
    folder: Annotated[
        Path, typer.Argument(help="The folder of scans: DICOM, NIfTI, NRRD, MetaImage, BIDS; searched downwards.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The datalist; quarantine.json goes beside it.")],
    patients: Annotated[
        str | None,
        typer.Option(
            help="Whose scan a file is: a table (CSV, TSV) or a pattern such as '{patient}/{study}_*.nii.gz'. "
            "DICOM and BIDS know their patients."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Where labels lie, e.g. '{folder}/labelsTr/{name}'; found by folder names if left out."),
    ] = None,
    images: Annotated[str | None, typer.Option(help="Index only these, e.g. 'imagesTr/*'.")] = None,
    table: Annotated[Path | None, typer.Option(help="A further table of columns, by volume or by patient.")] = None,
    volume_column: Annotated[str | None, typer.Option(help="The table's column of volumes.")] = None,
    patient_column: Annotated[str | None, typer.Option(help="The table's column of patients.")] = None,
    derivatives: Annotated[bool, typer.Option(help="Index derivatives/ and sourcedata/ of BIDS too.")] = False,
    keep_ids: Annotated[bool, typer.Option("--keep-ids", help="Ids are public already: no pseudonyms.")] = False,
    hide_subjects: Annotated[
        bool, typer.Option("--hide-subjects", help="Hide BIDS subjects, and ids that tables give, in paths.")
    ] = False,
    export_nifti: Annotated[Path | None, typer.Option(help="Write pseudonymous copies here, and list those.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Read all files again.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if left out.")] = None,
    check_voxels: Annotated[bool, typer.Option(help="Read every voxel once: constants, NaN, duplicates.")] = True,
) -> None:
    """Turn a folder of scans into a datalist; what cannot be used is listed with its reason."""
    from medclr.data.files import refuse_unwritable
    from medclr.data.index import QUARANTINE_FILE, index
    from medclr.data.index_summary import print_summary
    from medclr.data.walk import available_cores

    refuse_unwritable(output)
    result = index(
        folder,
        patients=patients,
        labels=labels,
        images=images,
        table=table,
        volume_column=volume_column,
        patient_column=patient_column,
        derivatives=derivatives,
        keep_ids=keep_ids,
        hide_subjects=hide_subjects,
        fresh=fresh,
        workers=workers,
        check_voxels=check_voxels,
        progress=True,
    )
    result.write(output, export=export_nifti, workers=workers or available_cores(), progress=True)
    print_summary(result.summary)
    print(f"Wrote {output} and {output.with_name(QUARANTINE_FILE)}")


@app.command("split")
def split_command(
    datalist: Annotated[Path, typer.Argument(help="The datalist to split.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The datalist to write, or the start of its name.")],
    fractions: Annotated[
        str | None, typer.Option(help="Of the patients: training,validation,test, e.g. 0.7,0.15,0.15 (the default).")
    ] = None,
    folds: Annotated[int | None, typer.Option(help="Cross-validation instead: writes NAME.fold0.json, ...")] = None,
    labelled: Annotated[
        str | None,
        typer.Option(
            help="Also write NAME.labelled1.json, ..., whose training section has the labelled scans of so many "
            "patients, e.g. 1,3,10 or 0.1. A datalist that is split already keeps its sections."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Any whole number.")] = 0,
    stratify: Annotated[
        str | None,
        typer.Option(
            help="Spread the values of these columns evenly, the most important first, e.g. sex,age; label and site if "
            "left out, `none` for a plain split. Rare combinations are merged."
        ),
    ] = None,
    dataset_dir: Annotated[Path | None, typer.Option("--dataset_dir", help="Where the scans lie, if moved.")] = None,
) -> None:
    """Split a datalist by patient."""
    from medclr.data.datalist import read_datalist, write_datalist
    from medclr.data.splits import make_splits

    made = make_splits(
        read_datalist(datalist, dataset_dir),
        fractions=None if fractions is None else _numbers(fractions, "--fractions"),
        folds=folds,
        labelled=() if labelled is None else _numbers(labelled, "--labelled"),
        seed=seed,
        stratify=None if stratify is None else [column.strip() for column in stratify.split(",")],
    )
    suffix = output.suffix or ".json"
    paths = {name: output.with_name(".".join(filter(None, [output.stem, name])) + suffix) for name in made}
    for name, part in made.items():
        write_datalist(part, paths[name])
    _print_sections({paths[name].name: part for name, part in made.items()})


@bundles.command("list")
def list_command() -> None:
    """The bundles that come with medclr."""
    from medclr.shipped import shipped_bundles

    table = Table("bundle", "version", "what it does")
    for bundle in shipped_bundles():
        table.add_row(bundle.name, bundle.version, bundle.task)
    Console().print(table)


@bundles.command("copy")
def copy_command(
    name: Annotated[str, typer.Argument(help="A name of `medclr bundle list`.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write it to; new or empty.")],
) -> None:
    """Copy a bundle, to run or change it there."""
    from medclr.shipped import copy_bundle

    print(f"Wrote {copy_bundle(name, folder)}; how to run it stands in {folder / 'docs' / 'README.md'}")


@app.command("demo")
def demo_command(
    folder: Annotated[
        Path | None, typer.Argument(help="Your own scans (NIfTI); a synthetic cohort if left out.")
    ] = None,
    patients: Annotated[str | None, typer.Option(help="Whose the scans are, as for `medclr index`.")] = None,
    labels: Annotated[str | None, typer.Option(help="Where the masks lie, as for `medclr index`.")] = None,
    images: Annotated[str | None, typer.Option(help="Which files are scans, as for `medclr index`.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for everything.")] = Path("runs/demo"),
    labelled: Annotated[int, typer.Option(min=1, help="Patients whose masks are used.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of the fine-tuning.")] = 2,
    pretrain_epochs: Annotated[int, typer.Option(min=1, help="Of 8 draws of each training patient.")] = 30,
    finetune_epochs: Annotated[int, typer.Option(min=1, help="Of 10 steps.")] = 35,
) -> None:
    """Show the whole of medclr in a few minutes: pretrain, segment with and without it, embed, and draw."""
    from medclr.demo import DemoSettings, run_demo

    run_demo(
        DemoSettings(
            output=output,
            folder=folder,
            patients=patients,
            labels=labels,
            images=images,
            labelled=labelled,
            seeds=seeds,
            pretrain_epochs=pretrain_epochs,
            finetune_epochs=finetune_epochs,
        )
    )


def _numbers(text: str, option: str) -> list[int | float]:
    try:
        return [int(part) if part.strip().isdigit() else float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{option} is no list of numbers.",
            got=repr(text),
            wanted="numbers with commas between",
            fix=f"{option} 1,3",
        ) from error


def _print_sections(datalists: dict[str, Datalist]) -> None:
    table = Table("file", "section", "patients", "scans", "labelled")
    for name, datalist in datalists.items():
        for section, counts in datalist.summary().items():
            table.add_row(name, section, *(str(counts[key]) for key in ("patients", "scans", "labelled")))
    Console().print(table)
