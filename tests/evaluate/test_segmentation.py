from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine
from monai.data import DataLoader
from monai.data.image_reader import NibabelReader
from monai.engines import SupervisedEvaluator
from monai.transforms import AsDiscreted, Compose, Invertd
from numpy.typing import NDArray
from torch import Tensor, nn

from medclr.data import Preprocessing
from medclr.engine.metrics import bootstrap_interval
from medclr.errors import ConfigError, DatalistError
from medclr.evaluate.segmentation import DiceTable, dice_by_class, dice_summary
from medclr.transfer import SegmentationDataset

MASKED = ("image", "label")
NAN = float("nan")


def slow_dice(prediction: NDArray[Any], mask: NDArray[Any], classes: int) -> NDArray[np.float64]:
    """Voxel by voxel, as it is defined."""
    dice = []
    for k in range(1, classes):
        both = either = 0
        for a, b in zip(prediction.ravel().tolist(), mask.ravel().tolist(), strict=True):
            both += (a == k) and (b == k)
            either += (a == k) + (b == k)
        dice.append(2 * both / either if either else NAN)
    return np.array(dice)


# One scan


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 5), shape=st.tuples(*[st.integers(1, 4)] * 3))
def test_dice_is_twice_the_common_voxels_over_the_voxels_of_both(
    seed: int, classes: int, shape: tuple[int, ...]
) -> None:
    random = np.random.default_rng(seed)
    prediction, mask = random.integers(0, classes, (2, *shape))
    dice = dice_by_class(torch.from_numpy(prediction), torch.from_numpy(mask), classes)
    assert dice.dtype == np.float64
    assert dice.shape == (classes - 1,)
    np.testing.assert_allclose(dice, slow_dice(prediction, mask, classes), rtol=1e-6)


def test_absent_classes_are_nan_and_those_that_one_side_alone_has_are_0() -> None:
    prediction, mask = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    prediction[0], mask[1] = 1, 2  # class 1 is only predicted, class 2 only there, class 3 neither
    np.testing.assert_array_equal(dice_by_class(prediction, mask, 4), [0, 0, NAN])


def test_the_background_does_not_count() -> None:
    np.testing.assert_array_equal(dice_by_class(torch.zeros(3, 3, 3), torch.zeros(3, 3, 3), 3), [NAN, NAN])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_classes_may_be_of_any_type(dtype: torch.dtype) -> None:
    mask = torch.arange(27).view(3, 3, 3).remainder(3).to(dtype)
    np.testing.assert_array_equal(dice_by_class(mask, mask.clone(), 3), [1, 1])


def test_two_grids_are_refused() -> None:
    with pytest.raises(ConfigError, match="grid") as caught:
        dice_by_class(torch.zeros(2, 3, 4), torch.zeros(4, 3, 2), 2)
    assert "(2, 3, 4) and (4, 3, 2)" in str(caught.value.got)


@pytest.mark.parametrize("bad", [2, -1])
@pytest.mark.parametrize("place", [0, 1])
def test_a_class_that_is_not_measured_is_refused(place: int, bad: int) -> None:
    pair = [torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)]
    pair[place][0, 0, 0] = bad
    with pytest.raises(ConfigError, match="class") as caught:
        dice_by_class(*pair, 2)
    assert str(bad) in str(caught.value.got)


# The summary


def slow_summary(patients: list[str], dice: NDArray[np.float64]) -> tuple[list[float], list[list[float]]]:
    """One number a patient that has any; and for each class."""

    def mean(values: list[float]) -> float | None:
        known = [value for value in values if value == value]
        return sum(known) / len(known) if known else None

    overall, by_class = [], [[] for _ in dice.T]
    for patient in dict.fromkeys(patients):
        own = [row for name, row in zip(patients, dice, strict=True) if name == patient]
        each = [mean([row[k] for row in own]) for k in range(dice.shape[1])]
        for k, value in enumerate(each):
            by_class[k] += [] if value is None else [value]
        all_classes = mean([value for value in each if value is not None])
        overall += [] if all_classes is None else [all_classes]
    return overall, by_class


@given(seed=st.integers(0, 10**6), scans=st.integers(1, 12), classes=st.integers(1, 4))
def test_the_summary_averages_scans_then_classes_then_patients(seed: int, scans: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    patients = [str(patient) for patient in random.integers(0, 5, scans)]
    dice = random.random((scans, classes))
    dice[random.random((scans, classes)) < 0.3] = NAN
    names = [f"organ {k}" for k in range(classes)]
    summary = dice_summary(patients, dice, names)
    overall, by_class = slow_summary(patients, dice)
    assert summary["patients"] == len(overall)
    assert summary["scans"] == scans
    assert list(summary["classes"]) == names
    parts = [(summary, overall), *zip(summary["classes"].values(), by_class, strict=True)]
    for part, values in parts:
        if not values:
            assert part["mean"] is part["low"] is part["high"] is None
            continue
        assert part["mean"] == pytest.approx(np.mean(values))
        assert (part["low"], part["high"]) == pytest.approx(bootstrap_interval(np.array(values)))
        assert part["low"] - 1e-12 <= part["mean"] <= part["high"] + 1e-12
    assert [part["patients"] for part in summary["classes"].values()] == [len(values) for values in by_class]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_patient_with_many_scans_counts_once() -> None:
    summary = dice_summary(["a"] * 9 + ["b"], np.array([[0.2]] * 9 + [[0.8]]), ["lesion"])
    assert summary["mean"] == pytest.approx(0.5)


def test_patients_need_not_be_in_order() -> None:
    mixed = dice_summary(["a", "b", "a"], np.array([[0.2, NAN], [0.9, 0.5], [0.4, 0.6]]), ["x", "y"])
    sorted_ = dice_summary(["a", "a", "b"], np.array([[0.2, NAN], [0.4, 0.6], [0.9, 0.5]]), ["x", "y"])
    assert mixed == sorted_
    assert mixed["mean"] == pytest.approx(((0.3 + 0.6) / 2 + 0.7) / 2)  # not (0.2 + 0.5) / 2 for the first patient


def test_the_interval_of_many_patients_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(1).normal(0.7, 0.1, 400)
    summary = dice_summary([str(n) for n in range(400)], values[:, None], ["lesion"])
    half = 1.96 * values.std() / 20
    assert summary["low"] == pytest.approx(values.mean() - half, abs=0.002)
    assert summary["high"] == pytest.approx(values.mean() + half, abs=0.002)


# The table


class FromIntensity(nn.Module):
    """Takes what is brighter than 0.5 for class 1."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.full_like(image, 0.5), image], dim=1)


def pipeline(
    dataset: SegmentationDataset, table: DiceTable, *, keep: dict[int, NDArray[Any]] | None = None
) -> SupervisedEvaluator:
    """MONAI's evaluator, which brings each prediction back to the scan's own grid."""

    def look(item: Any) -> Any:
        if keep is not None:
            keep[int(item["scan"])] = np.asarray(item["pred"][0]).copy()
        return item

    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(dataset, batch_size=1),
        network=FromIntensity(),
        postprocessing=Compose(
            [
                AsDiscreted("pred", argmax=True),
                Invertd("pred", transform=dataset.preprocessing, orig_keys="image", nearest_interp=True),
                look,
            ]
        ),
        val_handlers=[table],
    )


def masked(rows: list[dict], spacing: Any = None, **settings: Any) -> SegmentationDataset:
    return SegmentationDataset(rows, Preprocessing(MASKED, spacing=spacing), **{"out_channels": 2, **settings})


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def voxels_of(path: str) -> NDArray[Any]:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.mark.parametrize("spacing", [None, (1.5, 2.0, 2.0)])
def test_dice_is_that_of_the_segmentation_and_the_mask_as_they_lie_on_disk(
    spacing: Any, cohort: list[dict], tmp_path: Path
) -> None:
    dataset, found = masked(cohort, spacing), dict[int, NDArray[Any]]()
    table = DiceTable(tmp_path / "dice.csv", dataset, classes=2)
    evaluator = pipeline(dataset, table, keep=found)
    evaluator.run()
    rows = read_table(tmp_path / "dice.csv")
    assert list(found) == [int(row["scan"]) for row in rows] == list(range(len(cohort)))
    for row in rows:
        source = cohort[int(row["scan"])]
        mask = voxels_of(source["label"])
        assert found[int(row["scan"])].shape == mask.shape
        (wanted,) = slow_dice(found[int(row["scan"])], mask, 2)
        assert 0 < wanted < 1
        assert float(row["class_1"]) == pytest.approx(wanted, rel=1e-5)
        assert row["mean"] == row["class_1"]
        assert row["patient"] == source["patient_id"]


class Perfect(SegmentationDataset):
    """Shows the mask itself as the image, so that what the network sees it gets right on the preprocessed grid."""

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        item["image"].copy_(item["label"])
        return item


@pytest.mark.parametrize(("spacing", "perfect"), [(None, True), ((2.5, 2.5, 2.5), False)])
def test_what_is_lost_by_resampling_the_mask_is_lost_in_dice(
    spacing: Any, perfect: bool, cohort: list[dict], tmp_path: Path
) -> None:
    dataset = Perfect(cohort, Preprocessing(MASKED, spacing=spacing), out_channels=2)
    table = DiceTable(tmp_path / "dice.csv", dataset, classes=2)
    pipeline(dataset, table).run()
    values = np.array(list(table.dice.values())).ravel()
    assert len(values) == len(cohort)
    assert (values == 1).all() == perfect
    assert perfect or (values < 0.95).any()


def test_the_files_and_the_log_hold_what_was_measured(
    cohort: list[dict], tmp_path: Path, caplog: pytest.LogCaptureFixture, write_scan: Callable[..., str]
) -> None:
    cohort[4]["image"] = write_scan("flat", np.ones((5, 5, 5), np.float32))
    cohort[7]["label"] = None
    dataset = masked(cohort)
    path = tmp_path / "new folder" / "dice.test.csv"
    table = DiceTable(path, dataset, classes=2, names=["lesion"])
    evaluator = pipeline(dataset, table)
    with caplog.at_level(logging.INFO):
        evaluator.run()
    rows = read_table(path)
    assert list(rows[0]) == ["patient", "scan", "lesion", "mean"]
    assert [int(row["scan"]) for row in rows] == [0, 1, 2, 3, 5, 6, 8]
    summary = json.loads((tmp_path / "new folder" / "dice.test.json").read_text())
    wanted = dice_summary(
        [row["patient"] for row in rows], np.array([table.dice[int(row["scan"])] for row in rows]), ["lesion"]
    )
    assert summary == table.summary == {**wanted, "quarantined": 1}
    assert (summary["patients"], summary["scans"]) == (5, 7)
    assert evaluator.state.metrics["dice"] == summary["mean"]
    interval = f"{summary['mean']:.3f} (95% interval {summary['low']:.3f} to {summary['high']:.3f})"
    assert table.text().splitlines() == [
        f"Dice {interval}: 5 patients, 7 scans; by scan in {path}",
        f"  lesion {interval}: 5 patients",
        "1 scans quarantined",
    ]
    for line in table.text().splitlines():
        assert line in caplog.messages
    assert "patient 0" not in caplog.text
    assert "scan_0" not in caplog.text


def two_scans(write_scan: Callable[..., str], *masks: NDArray[Any]) -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    return [
        {
            "image": write_scan(f"image{n}", random.random(mask.shape, np.float32)),
            "label": write_scan(f"label{n}", mask),
            "patient_id": f"p{n}",
        }
        for n, mask in enumerate(masks)
    ]


def box(value: int, edge: int = 2) -> NDArray[np.uint8]:
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[:edge, :edge, :edge] = value
    return mask


def measured(table: DiceTable, outputs: dict[int, NDArray[Any]], *, batch_size: int = 1) -> Engine:
    """Run the table on predictions that are given, in batches as MONAI decollates them."""

    def step(engine: Engine, scans: list[int]) -> list[dict[str, Any]]:
        engine.state.batch = [{"scan": torch.tensor(scan)} for scan in scans]
        return [{"pred": torch.from_numpy(outputs[scan])[None]} for scan in scans]

    engine = Engine(step)
    table.attach(engine)
    scans = list(outputs)
    engine.run([scans[place : place + batch_size] for place in range(0, len(scans), batch_size)])
    return engine


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_scans_may_come_in_any_order_and_several_at_once(
    batch_size: int, write_scan: Callable[..., str], tmp_path: Path
) -> None:
    dataset = masked(two_scans(write_scan, box(1), box(1), box(1)))
    table = DiceTable(tmp_path / "dice.csv", dataset, classes=2)
    measured(table, {2: box(1), 0: box(0), 1: box(1, edge=1)}, batch_size=batch_size)
    rows = read_table(tmp_path / "dice.csv")
    assert [(row["patient"], row["scan"]) for row in rows] == [("p0", "0"), ("p1", "1"), ("p2", "2")]
    assert [float(row["class_1"]) for row in rows] == pytest.approx([0, 2 / 9, 1], rel=1e-5)


def test_a_class_that_is_absent_is_an_empty_cell_and_null(write_scan: Callable[..., str], tmp_path: Path) -> None:
    dataset = masked(two_scans(write_scan, box(1), box(2)), out_channels=4)
    table = DiceTable(tmp_path / "dice.csv", dataset, classes=4, names=["a", "b", "c"])
    measured(table, {0: box(1), 1: box(2, edge=1)})
    first, second = read_table(tmp_path / "dice.csv")
    assert (first["a"], first["b"], first["c"], first["mean"]) == ("1", "", "", "1")
    assert (second["a"], second["c"]) == ("", "")
    assert float(second["b"]) == float(second["mean"]) == pytest.approx(2 / 9, rel=1e-5)
    summary = json.loads((tmp_path / "dice.json").read_text())
    assert summary["classes"]["c"] == {"patients": 0, "mean": None, "low": None, "high": None}
    assert summary["classes"]["b"]["patients"] == 1
    assert summary["mean"] == pytest.approx((1 + 2 / 9) / 2)
    assert "  c not measured: 0 patients" in table.text().splitlines()


def test_scans_of_one_patient_are_averaged_first(write_scan: Callable[..., str], tmp_path: Path) -> None:
    rows = two_scans(write_scan, box(1), box(1), box(1))
    rows[2]["patient_id"] = rows[0]["patient_id"]
    table = DiceTable(tmp_path / "dice.csv", masked(rows), classes=2)
    measured(table, {0: box(1), 1: box(0), 2: box(1)})
    assert table.summary["patients"] == 2
    assert table.summary["mean"] == pytest.approx(0.5)


def test_a_second_run_starts_afresh(write_scan: Callable[..., str], tmp_path: Path) -> None:
    table = DiceTable(tmp_path / "dice.csv", masked(two_scans(write_scan, box(1), box(1))), classes=2)
    measured(table, {0: box(1), 1: box(0)})
    measured(table, {1: box(1)})
    assert [row["scan"] for row in read_table(tmp_path / "dice.csv")] == ["1"]
    assert table.summary["scans"] == 1


def test_a_segmentation_on_another_grid_than_the_scans_own_is_refused(
    write_scan: Callable[..., str], tmp_path: Path
) -> None:
    table = DiceTable(tmp_path / "dice.csv", masked(two_scans(write_scan, box(1))), classes=2)
    with pytest.raises(ConfigError, match="grid"):
        measured(table, {0: box(1)[:5]})


def test_masks_are_read_by_the_reader_of_the_scans(write_scan: Callable[..., str], tmp_path: Path) -> None:
    class Swapping(NibabelReader):
        """A format of its own, in which 1 stands for nothing and 0 for something."""

        def get_data(self, img: Any) -> Any:
            voxels, header = super().get_data(img)
            return (1 - voxels if set(np.unique(voxels)) <= {0, 1} else voxels), header

    rows = two_scans(write_scan, box(1))
    dataset = SegmentationDataset(rows, Preprocessing(MASKED, reader=Swapping()), out_channels=2)
    table = DiceTable(tmp_path / "dice.csv", dataset, classes=2)
    measured(table, {0: 1 - box(1)})
    assert table.summary["mean"] == 1


@pytest.mark.parametrize(
    ("classes", "names"), [(3, ["a"]), (3, ["a", "b", "c"]), (2, []), (3, ["background", "a", "b"])]
)
def test_names_that_do_not_fit_the_classes_are_refused(
    classes: int, names: list[str], cohort: list[dict], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="names") as caught:
        DiceTable(tmp_path / "dice.csv", masked(cohort), classes=classes, names=names)
    assert f"{classes - 1} names" in caught.value.wanted


@pytest.mark.parametrize("classes", [0, 1])
def test_the_background_alone_cannot_be_measured(classes: int, cohort: list[dict], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no class"):
        DiceTable(tmp_path / "dice.csv", masked(cohort), classes=classes)


def test_a_run_that_segmented_nothing_is_refused_at_its_end(tmp_path: Path) -> None:
    dataset = masked([], may_be_empty=True)
    table = DiceTable(tmp_path / "dice.csv", dataset, classes=2)
    with pytest.raises(DatalistError, match="Nothing was segmented"):
        table.write(Engine(lambda engine, batch: None))
    assert list(tmp_path.iterdir()) == []
