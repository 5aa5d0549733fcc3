from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel
import numpy as np
import pytest
from rich.console import Console

from medclr.data.datalist import Datalist
from medclr.data.phantom import make_cohort
from medclr.demo import DemoSettings, run_demo
from medclr.demo.pictures import Case, draw_embeddings, draw_slices
from medclr.demo.report import Outcome, cases_of, print_report
from medclr.demo.stages import run_bundle
from medclr.demo.volumes import count_classes, fitting_roi
from medclr.errors import ConfigError, MedclrError


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200, color_system=None), text


def rows_of(tmp_path: Path, shapes: list[tuple[int, int, int]], highest: int = 2) -> list[dict[str, Any]]:
    rows = []
    for number, shape in enumerate(shapes):
        row: dict[str, Any] = {"patient_id": f"P{number}"}
        for key in ("image", "label"):
            voxels = np.zeros(shape, np.int16)
            voxels[2:8, 3:9, 2:7] = 1 + (number % highest)
            row[key] = str(tmp_path / f"{key}_{number}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), row[key])
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(35, 51, 35), (34, 52, 36), (37, 50, 38), (40, 60, 40)], (32, 48, 32)),
        ([(512, 512, 300)], (64, 64, 64)),
        ([(10, 100, 25)], (24, 64, 24)),
    ],
)
def test_views_are_as_large_as_most_scans_and_fit_the_network(
    shapes: list[tuple[int, int, int]], expected: tuple[int, int, int], tmp_path: Path
) -> None:
    assert fitting_roi(rows_of(tmp_path, shapes)) == expected


def test_classes_are_counted_over_all_masks_with_the_background(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [(10, 10, 10)] * 4, highest=3)
    assert count_classes(Datalist({"training": rows[:2], "test": rows[2:]}, tmp_path)) == 4


def test_slices_show_truth_and_both_predictions_in_colour(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [(20, 24, 16)])
    label = Path(row["label"])
    draw_slices(tmp_path / "a.png", [Case("unseen patient 1", Path(row["image"]), label, label, label)])
    picture = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    for colour in ("#F0E442", "#56B4E9", "#E69F00"):
        wanted = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
        assert (np.abs(picture - wanted).max(axis=-1) < 0.02).sum() > 50, colour


def test_the_map_joins_the_scans_of_a_patient(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with (tmp_path / "embeddings.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["scan", "patient_id", "age", "f0", "f1", "f2"])
        for scan in range(12):
            table.writerow([scan, f"P{scan // 3}", 50, *random.normal(size=3)])
    draw_embeddings(tmp_path / "map.png", tmp_path / "embeddings.csv")
    picture = matplotlib.image.imread(tmp_path / "map.png")[..., :3]
    coloured = (picture.max(axis=-1) - picture.min(axis=-1)) > 0.3
    assert coloured.sum() > 500


def test_a_prediction_is_found_in_the_folder_of_its_scan(tmp_path: Path) -> None:
    rows = [
        {
            "image": str(tmp_path / "site" / f"{n}.nii.gz"),
            "label": str(tmp_path / "m.nii.gz"),
            "patient_id": f"P{n // 2}",
        }
        for n in range(8)
    ]
    cases = cases_of(Datalist({"test": rows}, tmp_path), Path("out"))
    assert [case.image.name for case in cases] == ["0.nii.gz", "2.nii.gz", "4.nii.gz"]
    assert cases[1].pretrained == Path("out/pretrained_0/predictions/site/2_seg.nii.gz")
    assert cases[1].title == "unseen patient 2"


def test_the_table_names_figures_with_their_spread_and_the_files() -> None:
    outcome = Outcome(
        patients=40,
        scans=96,
        unseen=10,
        seconds_a_step=0.5,
        recall_before=(0.1, 0.0, 0.2),
        recall_after=(0.6, 0.4, 0.8),
        dice={"pretrained": [0.7, 0.72], "scratch": [0.6]},
        pictures=[Path("slices.png")],
        output=Path("out"),
    )
    shown, text = console()
    print_report(shown, outcome, 240)
    for words in (
        "40, 96",
        "0.50 s",
        "0.10 (95% interval 0.00 to 0.20)",
        "0.60 (95% interval 0.40 to 0.80)",
        "0.710, 0.700 to 0.720 over 2 seeds",
        "0.600 ",
        "slices.png",
        "out/pretraining/encoder.safetensors",
        "4.0 minutes",
    ):
        assert words in text.getvalue()


def test_own_scans_need_to_say_whose_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whose scans"):
        DemoSettings(output=tmp_path, folder=tmp_path)


def test_an_earlier_demo_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(ConfigError, match="earlier one"):
        run_demo(DemoSettings(output=tmp_path))


def test_masks_of_0_and_255_are_refused(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [(10, 10, 10)])
    nibabel.save(nibabel.Nifti1Image(np.full((10, 10, 10), 255, np.uint8), np.eye(4)), row["label"])
    with pytest.raises(ConfigError, match="very many classes"):
        count_classes(Datalist({"training": [row]}, tmp_path))


@pytest.mark.parametrize("name", ["seeds", "labelled", "pretrain_epochs"])
def test_unusable_counts_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        DemoSettings(output=tmp_path, **{name: 0})


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_demo_and_names_its_log(tmp_path: Path) -> None:
    shown, text = console()
    with pytest.raises(MedclrError, match="segmentation failed") as caught:
        run_bundle(shown, "segmentation", ["train"], tmp_path / "logs" / "a.log", datalist=tmp_path / "none.json")
    assert "a.log" in caught.value.fix
    assert "python -m monai.bundle run --config_file" in text.getvalue()
    assert (tmp_path / "logs" / "a.log").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("masks", [True, False])
def test_the_demo_runs_on_a_folder_of_ones_own_with_and_without_masks(masks: bool, tmp_path: Path) -> None:
    table = make_cohort(tmp_path / "mine", patients=10, shape=(32, 32, 32))
    if not masks:
        for path in (tmp_path / "mine" / "labelsTr").iterdir():
            path.unlink()
    shown, text = console()
    settings = DemoSettings(
        output=tmp_path / "out",
        folder=tmp_path / "mine",
        patients=str(table),
        pretrain_epochs=1,
        passes=4,
        batch_size=6,
        finetune_epochs=1,
        labelled=2,
        seeds=1,
    )
    outcome = run_demo(settings, shown)
    assert outcome.patients == 10
    assert outcome.seconds_a_step > 0
    assert all(path.stat().st_size > 10_000 for path in outcome.pictures)
    assert len(outcome.pictures) == 1 + masks
    assert set(outcome.dice) == ({"pretrained", "scratch"} if masks else set())
    assert (tmp_path / "out" / "pretraining" / "encoder.safetensors").exists()
    assert "What came of it" in text.getvalue()
