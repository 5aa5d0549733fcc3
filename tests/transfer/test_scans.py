from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, Flipd, Invertd, MapTransform, RandFlipd

from medclr.data import Preprocessing, Quarantine
from medclr.errors import ConfigError, DatalistError, ScanError
from medclr.transfer import SegmentationDataset

WriteScan = Callable[..., str]
MASKED = ("image", "label")


class Reading(Preprocessing):
    """Notes which rows were read."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.reads: list[str] = []

    def __call__(self, row: Any, *args: Any, **kwargs: Any) -> Any:
        self.reads.append(row["image"])
        return super().__call__(row, *args, **kwargs)


def masked(data: list[dict], transform: Any = None, **settings: Any) -> SegmentationDataset:
    preprocessing = settings.pop("preprocessing", None) or Preprocessing(MASKED)
    return SegmentationDataset(data, preprocessing, transform, **{"out_channels": 2, **settings})


def without_mask(row: dict[str, Any], *, null: bool) -> None:
    if null:
        row["label"] = None
    else:
        del row["label"]


def noise(shape: tuple[int, ...] = (7, 8, 9), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mask(highest: int = 1, shape: tuple[int, ...] = (7, 8, 9)) -> np.ndarray:
    voxels = np.zeros(shape, np.uint8)
    voxels[1:4, 2:5, 3:6] = highest
    return voxels


# Items


@pytest.mark.parametrize("cache_mb", [64, 0])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 2.0)])
def test_an_item_is_the_preprocessed_scan_with_its_mask_and_its_row(
    spacing: Any, cache_mb: float, cohort: list[dict]
) -> None:
    preprocessing = Preprocessing(MASKED, spacing=spacing)
    dataset = masked(cohort, preprocessing=preprocessing, cache_mb=cache_mb)
    assert len(dataset) == len(cohort)
    for place, row in enumerate(cohort):
        item, wanted = dataset[place], preprocessing.volume(row)
        assert set(item) == {"image", "label", "scan"}
        assert item["scan"] == place
        assert isinstance(item["image"], MetaTensor)
        assert isinstance(item["label"], MetaTensor)
        assert item["image"].dtype == torch.float32
        assert item["label"].dtype == torch.int16
        assert item["label"].shape == (1, *item["image"].shape[1:])
        assert torch.equal(item["image"].as_tensor(), wanted.image)
        assert wanted.label is not None
        assert torch.equal(item["label"].as_tensor()[0], wanted.label)


def test_without_masks_an_item_is_the_scan_alone_and_no_mask_is_read(cohort: list[dict]) -> None:
    for row in cohort:
        row["label"] = "nowhere.nii.gz"
    without_mask(cohort[1], null=False)
    dataset = SegmentationDataset(cohort, Preprocessing())
    assert len(dataset) == len(cohort)
    assert dataset.without_mask == 0
    assert set(dataset[0]) == {"image", "scan"}


@pytest.mark.parametrize("cache_mb", [64, 0])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 2.0)])
def test_image_and_mask_know_the_way_back_to_the_scans_own_grid(
    spacing: Any, cache_mb: float, cohort: list[dict]
) -> None:
    preprocessing = Preprocessing(MASKED, spacing=spacing)
    raw = Preprocessing(MASKED, orientation=None)
    back = Invertd(["image", "label"], transform=preprocessing, orig_keys=["image", "label"], nearest_interp=True)
    dataset = masked(cohort, preprocessing=preprocessing, cache_mb=cache_mb)
    for place, row in enumerate(cohort):
        item, wanted = back(dataset[place]), raw(dict(row))
        for key in MASKED:
            assert item[key].shape == wanted[key].shape
            torch.testing.assert_close(item[key].affine, wanted[key].affine, rtol=1e-4, atol=1e-4)
        if spacing is None:
            assert torch.equal(item["label"].as_tensor(), wanted["label"].as_tensor().to(item["label"].dtype))
            torch.testing.assert_close(item["image"].as_tensor(), wanted["image"].as_tensor())


def test_items_can_be_batched_by_workers(write_scan: WriteScan) -> None:
    data = [
        {
            "image": write_scan(f"image{n}", noise(seed=n)),
            "label": write_scan(f"label{n}", mask()),
            "patient_id": f"{n}",
        }
        for n in range(4)
    ]
    dataset = masked(data)
    batches = list(DataLoader(dataset, batch_size=2, num_workers=2))
    assert [batch["scan"].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert batches[0]["image"].shape == batches[0]["label"].shape == (2, 1, 7, 8, 9)
    assert torch.equal(batches[1]["image"][1].as_tensor(), dataset[3]["image"].as_tensor())


# Augmentation


def test_what_the_transform_makes_is_given_back(cohort: list[dict]) -> None:
    plain, flipped = masked(cohort), masked(cohort, Flipd(MASKED, 0))
    assert torch.equal(flipped[2]["image"].as_tensor(), plain[2]["image"].as_tensor().flip(1))
    assert torch.equal(flipped[2]["label"].as_tensor(), plain[2]["label"].as_tensor().flip(1))
    assert masked(cohort, lambda item: [item["scan"]] * 2)[4] == [4, 4]


class Blacken(MapTransform):
    """Changes voxels and trace where they lie."""

    def __call__(self, item: Any) -> Any:
        for key in self.keys:
            item[key].zero_()
            item[key].applied_operations.append({"class": "Blacken"})
        return item


@pytest.mark.parametrize("cache_mb", [64, 0])
def test_a_transform_leaves_no_trace_in_the_scan_that_is_kept(cache_mb: float, cohort: list[dict]) -> None:
    plain = masked(cohort, cache_mb=cache_mb)
    dataset = masked(cohort, Compose([Blacken(MASKED), RandFlipd(MASKED, prob=1.0)]), cache_mb=cache_mb)
    traces = [len(dataset[0]["image"].applied_operations) for _ in range(3)]
    assert traces == [len(plain[0]["image"].applied_operations) + 2] * 3
    dataset.transform = None
    assert torch.equal(dataset[0]["image"].as_tensor(), plain[0]["image"].as_tensor())
    assert torch.equal(dataset[0]["label"].as_tensor(), plain[0]["label"].as_tensor())
    assert len(dataset[0]["image"].applied_operations) == len(plain[0]["image"].applied_operations)


# The cache


def sized(write_scan: WriteScan, *edges: int) -> list[dict[str, Any]]:
    """Rows of scans of edge x 8 x 16 voxels, which take edge x 0.5 KB."""
    return [
        {"image": write_scan(f"image{place}", noise((edge, 8, 16), place)), "patient_id": f"{place}"}
        for place, edge in enumerate(edges)
    ]


def read_again(dataset: SegmentationDataset) -> list[int]:
    """The scans that are read when all are asked for."""
    preprocessing = dataset.preprocessing
    assert isinstance(preprocessing, Reading)
    preprocessing.reads.clear()
    for place in range(len(dataset)):
        dataset[place]
    paths = [row["image"] for row in dataset.rows]
    return [paths.index(path) for path in preprocessing.reads]


@pytest.mark.parametrize(
    ("kilobytes", "again"),
    [(100, []), (17, []), (16, [3]), (13, [2]), (4, [0, 2, 3]), (3.9, [0, 1, 2]), (0, [0, 1, 2, 3])],
)
def test_what_fits_is_kept_also_after_a_scan_that_does_not(
    kilobytes: float, again: list[int], write_scan: WriteScan
) -> None:
    rows = sized(write_scan, 10, 8, 12, 4)  # 5, 4, 6 and 2 KB
    dataset = SegmentationDataset(rows, Reading(), cache_mb=kilobytes / 1024)
    assert len(dataset) == 4
    assert read_again(dataset) == again
    assert read_again(dataset) == again


def test_every_scan_is_read_once_at_construction(cohort: list[dict]) -> None:
    preprocessing = Reading(MASKED)
    masked(cohort, preprocessing=preprocessing, cache_mb=0)
    assert preprocessing.reads == [row["image"] for row in cohort]


def test_the_mask_counts_as_well(write_scan: WriteScan) -> None:
    rows = sized(write_scan, 8)  # 4 KB, and half as much again for a mask of 16 bits
    rows[0]["label"] = write_scan("label", mask(shape=(8, 8, 16)))
    for kilobytes, again in ((6, []), (5.9, [0])):
        assert read_again(masked(rows, preprocessing=Reading(MASKED), cache_mb=kilobytes / 1024)) == again


def test_the_rows_stay_as_they_were(cohort: list[dict]) -> None:
    before = [dict(row) for row in cohort]
    dataset = masked(cohort)
    dataset[0]["image"].zero_()
    assert cohort == before == dataset.rows


# Which scans are used


@pytest.mark.parametrize("null", [False, True])
def test_scans_without_a_mask_are_left_out_counted_and_not_read(
    null: bool, cohort: list[dict], caplog: pytest.LogCaptureFixture
) -> None:
    for place in (0, 4):
        without_mask(cohort[place], null=null)
    preprocessing = Reading(MASKED)
    with caplog.at_level(logging.INFO):
        dataset = masked(cohort, preprocessing=preprocessing)
    assert dataset.scans == [1, 2, 3, 5, 6, 7, 8]
    assert dataset.without_mask == 2
    assert [dataset[place]["scan"] for place in range(len(dataset))] == dataset.scans
    assert cohort[0]["image"] not in preprocessing.reads
    assert dataset.summary() == "7 scans of 5 patients in use\n2 scans left out: they have no mask"
    for line in dataset.summary().splitlines():
        assert line in caplog.text
    assert not dataset.quarantine.reasons()


def test_all_good_scans_are_one_line(cohort: list[dict]) -> None:
    assert masked(cohort).summary() == "9 scans of 5 patients in use"


BAD_IMAGES: dict[str, Any] = {
    "not 3D": noise((7, 8, 9, 2)),
    "constant": np.ones((7, 8, 9), np.float32),
    "no numbers": np.where(noise() > 1, np.nan, noise()).astype(np.float32),
    "other shape": noise((7, 8, 10)),
}
BAD_MASKS: dict[str, Any] = {
    "a class too high": mask(2),
    "not 3D": np.stack([mask(), mask()], axis=-1),
    "no classes": mask().astype(np.float32) / 2,
    "below 0": -mask().astype(np.int16),
    "other shape": mask(shape=(7, 8, 10)),
}


@pytest.mark.parametrize(
    ("key", "voxels"),
    [("image", voxels) for voxels in BAD_IMAGES.values()] + [("label", voxels) for voxels in BAD_MASKS.values()],
    ids=[f"image {name}" for name in BAD_IMAGES] + [f"mask {name}" for name in BAD_MASKS],
)
@pytest.mark.parametrize("cache_mb", [64, 0])
def test_a_scan_that_cannot_be_used_is_quarantined_and_the_rest_goes_on(
    key: str, voxels: Any, cache_mb: float, write_scan: WriteScan, tmp_path: Path
) -> None:
    rows = [
        {"image": write_scan(f"image{n}", noise()), "label": write_scan(f"label{n}", mask()), "patient_id": f"{n}"}
        for n in range(3)
    ]
    rows[1][key] = write_scan("Doe_Jane", voxels)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    dataset = masked(rows, quarantine=quarantine, cache_mb=cache_mb)
    assert dataset.scans == [0, 2]
    assert list(quarantine.reasons()) == [1]
    assert "Doe" not in (tmp_path / "quarantine.jsonl").read_text()
    assert dataset.summary() == "2 scans of 2 patients in use\n1 scans quarantined"


@pytest.mark.parametrize("path", ["missing.nii.gz", ["a.nii.gz", "b.nii.gz"], 7], ids=str)
def test_a_mask_that_cannot_be_read_is_quarantined(path: Any, cohort: list[dict]) -> None:
    cohort[3]["label"] = path
    assert masked(cohort).scans == [0, 1, 2, 4, 5, 6, 7, 8]


def test_the_log_tells_what_is_quarantined_but_no_patient(
    cohort: list[dict], write_scan: WriteScan, caplog: pytest.LogCaptureFixture
) -> None:
    cohort[1]["image"] = write_scan("Doe_Jane", np.ones((7, 8, 9), np.float32))
    without_mask(cohort[2], null=True)
    with caplog.at_level(logging.INFO):
        masked(cohort)
    assert "7 scans of 5 patients in use" in caplog.text
    assert "1 scans left out" in caplog.text
    assert "1 scans quarantined" in caplog.text
    assert "Doe" not in caplog.text
    assert "patient 0" not in caplog.text


@pytest.mark.parametrize(
    ("highest", "out_channels", "usable"), [(1, 2, True), (2, 3, True), (2, 2, False), (7, 3, False)]
)
def test_classes_count_from_the_background(
    highest: int, out_channels: int, usable: bool, write_scan: WriteScan
) -> None:
    good = {"image": write_scan("image", noise()), "label": write_scan("good", mask()), "patient_id": "a"}
    row = {**good, "label": write_scan("label", mask(highest))}
    dataset = masked([good, row], out_channels=out_channels)
    assert dataset.scans == ([0, 1] if usable else [0])
    if not usable:
        (reason,) = dataset.quarantine.reasons().values()
        assert f"class {highest}" in reason
        assert f"classes 0 to {out_channels - 1}" in reason
        assert f"out_channels: {highest + 1}" in reason


def test_a_large_class_survives_as_int16(write_scan: WriteScan) -> None:
    voxels = mask().astype(np.int16) * 1000
    row = {"image": write_scan("image", noise()), "label": write_scan("label", voxels), "patient_id": "a"}
    assert masked([row], out_channels=1001)[0]["label"].unique().tolist() == [0, 1000]


@pytest.mark.parametrize("in_channels", [1, 2])
def test_a_scan_of_another_number_of_sequences_is_quarantined(in_channels: int, write_scan: WriteScan) -> None:
    one, two = write_scan("t1", noise(seed=1)), write_scan("t2", noise(seed=2))
    rows = [{"image": one, "patient_id": "a"}, {"image": [one, two], "patient_id": "b"}]
    dataset = SegmentationDataset(rows, Preprocessing(), in_channels=in_channels)
    assert dataset.scans == [in_channels - 1]
    assert dataset[0]["image"].shape[0] == in_channels
    (reason,) = dataset.quarantine.reasons().values()
    assert f"Got {3 - in_channels}, wanted {in_channels}" in reason


def test_an_absent_sequence_counts_as_a_channel(write_scan: WriteScan) -> None:
    row = {"image": [write_scan("t1", noise()), None], "patient_id": "a"}
    assert not SegmentationDataset([row], Preprocessing(), in_channels=2)[0]["image"][1].any()


def test_an_error_that_is_not_the_scans_is_not_swallowed(cohort: list[dict]) -> None:
    def broken(image: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(Exception) as caught:  # noqa: PT011
        SegmentationDataset(cohort, Preprocessing(intensity=broken))  # type: ignore[arg-type]
    assert not isinstance(caught.value, ScanError | DatalistError)


def test_a_scan_that_vanishes_later_is_quarantined_and_the_next_stands_in(write_scan: WriteScan) -> None:
    rows = sized(write_scan, 8, 9, 10)
    dataset = SegmentationDataset(rows, Preprocessing(), cache_mb=0)
    os.remove(rows[2]["image"])
    assert [dataset[index]["scan"] for index in range(3)] == [0, 1, 0]
    assert dataset[-1]["scan"] == 0
    assert len(list(dataset)) == 3
    assert list(dataset.quarantine.reasons()) == [2]
    assert "1 scans quarantined" in dataset.summary()


def test_where_all_scans_vanish_the_run_says_so(write_scan: WriteScan) -> None:
    rows = sized(write_scan, 8, 9)
    dataset = SegmentationDataset(rows, Preprocessing(), cache_mb=0, quarantine=Quarantine(limit=1))
    for row in rows:
        os.remove(row["image"])
    with pytest.raises(DatalistError, match="any more"):
        dataset[0]


def test_too_many_scans_that_vanish_later_end_the_run_and_those_bad_from_the_start_do_not_count(
    write_scan: WriteScan,
) -> None:
    rows = sized(write_scan, *range(8, 18))
    for place in (0, 1, 2):
        rows[place]["image"] = write_scan(f"flat{place}", np.ones((7, 8, 9), np.float32))
    dataset = SegmentationDataset(rows, Preprocessing(), cache_mb=0, quarantine=Quarantine(limit=0.2))
    for row in rows[7:]:
        os.remove(row["image"])
    assert dataset.scans == [3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(DatalistError, match="Too many scans") as caught:
        dataset[4, 1, 0]  # the third in a row, of ten, is one too many
    assert str(caught.value.got).startswith("3 of 10")


def test_shares_of_the_classes_are_those_of_all_masks_and_never_zero(write_scan: WriteScan) -> None:
    rows = []
    for number, voxels in enumerate((100, 28)):
        mask = np.zeros((8, 8, 8), np.uint8)
        mask.reshape(-1)[:voxels] = 1 + number
        rows.append(
            {
                "image": write_scan(f"image{number}", noise((8, 8, 8), number)),
                "label": write_scan(f"label{number}", mask),
                "patient_id": f"{number}",
            }
        )
    shares = SegmentationDataset(rows, Preprocessing(MASKED), out_channels=4).class_shares()
    expected = np.array([1024 - 128, 100, 28, 0]) + 1
    np.testing.assert_allclose(shares, expected / expected.sum())


# Sections that cannot be used


@pytest.mark.parametrize("load", [("image",), MASKED])
def test_an_empty_section_is_refused(load: tuple[str, ...]) -> None:
    with pytest.raises(DatalistError) as caught:
        SegmentationDataset([], Preprocessing(load), out_channels=2)
    assert caught.value.got == "an empty section"


def test_a_section_without_any_mask_is_refused(cohort: list[dict]) -> None:
    for place, row in enumerate(cohort):
        without_mask(row, null=place % 2 == 0)
    with pytest.raises(DatalistError, match="No scan has a mask") as caught:
        masked(cohort)
    assert "9 rows" in str(caught.value.got)


def test_a_section_may_be_empty_or_without_masks_where_that_is_allowed(
    cohort: list[dict], caplog: pytest.LogCaptureFixture
) -> None:
    for row in cohort:
        without_mask(row, null=True)
    with caplog.at_level(logging.INFO):
        assert len(masked([], may_be_empty=True)) == 0
        assert len(SegmentationDataset([], Preprocessing(), may_be_empty=True)) == 0
        dataset = masked(cohort, may_be_empty=True)
    assert len(dataset) == 0
    assert dataset.summary() == "0 scans of 0 patients in use\n9 scans left out: they have no mask"
    assert "9 scans left out" in caplog.text
    with pytest.raises(IndexError):
        dataset[0]


@pytest.mark.parametrize("may_be_empty", [False, True])
def test_a_section_whose_scans_are_all_bad_is_refused_with_the_first_reason(
    may_be_empty: bool, cohort: list[dict], write_scan: WriteScan
) -> None:
    flat = write_scan("flat", np.ones((7, 8, 9), np.float32))
    with pytest.raises(DatalistError, match="No scan of the section") as caught:
        masked([{**row, "image": flat} for row in cohort], may_be_empty=may_be_empty)
    assert "9 scans" in str(caught.value.got)
    assert "constant" in str(caught.value.got)
    assert "mask" in caught.value.wanted


@pytest.mark.parametrize("empty", [{0}, {2}, {0, 1}, {1, 2}, {0, 1, 2}], ids=str)
def test_empty_masks_are_fine_unless_all_are(empty: set[int], write_scan: WriteScan) -> None:
    rows = [
        {
            "image": write_scan(f"image{n}", noise()),
            "label": write_scan(f"label{n}", mask(0 if n in empty else 1)),
            "patient_id": f"{n}",
        }
        for n in range(3)
    ]
    if len(empty) == 3:
        with pytest.raises(DatalistError, match="All masks are empty") as caught:
            masked(rows)
        assert "3 masks" in str(caught.value.got)
    else:
        assert masked(rows).scans == [0, 1, 2]


@pytest.mark.parametrize("cache_mb", [-1, float("nan"), float("inf")])
def test_an_unusable_cache_is_refused(cache_mb: float, cohort: list[dict]) -> None:
    with pytest.raises(ConfigError, match="cache"):
        masked(cohort, cache_mb=cache_mb)


def test_masks_without_a_number_of_classes_are_refused_before_anything_is_read(cohort: list[dict]) -> None:
    preprocessing = Reading(MASKED)
    with pytest.raises(ConfigError, match="classes") as caught:
        SegmentationDataset(cohort, preprocessing)
    assert "out_channels" in caught.value.fix
    assert preprocessing.reads == []
