from __future__ import annotations

import csv
import logging
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from medclr.data import CropAround, OverlappingCrops, Preprocessing, Quarantine, RandomCrop, ScanReader, Volume
from medclr.engine import explained
from medclr.errors import ConfigError, DatalistError, ScanError
from medclr.geometry import Crop
from medclr.pairs import PatientPairDataset, PatientSampler, SamePatient, SameScan
from tests.engine.test_failures import all_of

SIZE = (8, 8, 8)


def pairs(datalist: list[dict], rule: Any = None, **settings: Any) -> PatientPairDataset:
    settings.setdefault("crop", RandomCrop(SIZE, (10, 10, 10)))
    settings.setdefault("reader", ScanReader(Preprocessing()))
    return PatientPairDataset(datalist, rule, **settings)


class Invented:
    """Stands in for the preprocessing: scan ``row["image"]`` is filled with its number; those in ``bad`` fail."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.reads = bad, 0

    def volume(self, row: Mapping[str, Any]) -> Volume:
        self.reads += 1
        if row["image"] in self.bad:
            raise ScanError("Bad scan.", got="noise", wanted="anatomy", fix="Drop it.")
        label = None if row.get("no mask") else torch.ones(9, 9, 9, dtype=torch.int16)
        return Volume(torch.full((1, 9, 9, 9), 1.0 + row["image"]), torch.eye(4), torch.tensor([True]), label)


def invented(*scans: int, bad: tuple[int, ...] = (), rule: Any = None, **settings: Any) -> PatientPairDataset:
    """One patient for each count of scans."""
    owners = [patient for patient, count in enumerate(scans) for _ in range(count)]
    rows = [{"image": scan, "patient_id": f"p{patient}"} for scan, patient in enumerate(owners)]
    for scan in settings.pop("no_mask", ()):
        rows[scan]["no mask"] = True
    settings.setdefault("crop", RandomCrop((4, 4, 4)))
    settings.setdefault("preload", False)
    settings.setdefault("reader", ScanReader(Invented(*bad), quarantine=Quarantine(limit=1)))  # type: ignore[arg-type]
    return PatientPairDataset(rows, rule, **settings)


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, whatever is nested."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert len(one) == len(other)
        for part, twin in zip(one, other, strict=True):
            assert_same(part, twin)


def differ(one: dict, other: dict) -> bool:
    return not torch.equal(one["crop_1"].image, other["crop_1"].image)


# Items


def test_an_item_holds_two_crops_and_where_they_come_from(cohort: list[dict]) -> None:
    dataset = pairs(cohort, seed=4)
    assert len(dataset) == 5
    for place in range(5):
        item = dataset[place, 7, 2]
        assert set(item) == {"crop_1", "crop_2", "meta"}
        meta = item["meta"]
        assert {name: (value.dtype, tuple(value.shape)) for name, value in meta.items()} == {
            "sample": (torch.int64, ()),
            "patient": (torch.int64, ()),
            "scan": (torch.int64, (2,)),
        }
        assert int(meta["patient"]) == place
        assert int(meta["sample"]) == place + 2 * 5
        for scan in meta["scan"].tolist():
            assert cohort[scan]["patient_id"] == f"patient {place}"
        for view in (1, 2):
            crop = item[f"crop_{view}"]
            assert isinstance(crop, Crop)
            assert crop.image.shape == (1, 10, 10, 10)
            assert crop.key.tolist() == [4, 7, place, 2, view]


def test_the_crops_show_the_scans_that_the_metadata_names() -> None:
    dataset = invented(3, 2, 1)
    for place in range(3):
        for occurrence in range(5):
            item = dataset[place, 1, occurrence]
            for view, scan in enumerate(item["meta"]["scan"].tolist(), start=1):
                assert (item[f"crop_{view}"].image == 1 + scan).all()


def test_same_patient_draws_two_different_scans_where_there_are_two() -> None:
    dataset = invented(3, 1, 2)
    for place, different in ((0, True), (1, False), (2, True)):
        drawn = {tuple(dataset[place, epoch, 0]["meta"]["scan"].tolist()) for epoch in range(40)}
        assert all((one != other) == different for one, other in drawn)
        assert len(drawn) == {0: 6, 1: 1, 2: 2}[place]


def test_same_scan_draws_one_scan_and_reads_it_once() -> None:
    preprocessing = Invented()
    dataset = invented(3, 2, rule=SameScan(), reader=ScanReader(preprocessing, cache_mb=0))  # type: ignore[arg-type]
    scans = {tuple(dataset[0, epoch, 0]["meta"]["scan"].tolist()) for epoch in range(30)}
    assert scans == {(0, 0), (1, 1), (2, 2)}
    assert preprocessing.reads == 30


def test_items_collate_into_a_batch(cohort: list[dict]) -> None:
    dataset = pairs(cohort)
    batch = default_collate([dataset[place] for place in (3, 1, 4)])
    assert isinstance(batch["crop_1"], Crop)
    assert batch["crop_1"].image.shape == (3, 1, 10, 10, 10)
    assert batch["crop_2"].affine.shape == (3, 4, 4)
    assert batch["crop_2"].inside.shape == (3, 2, 3)
    assert batch["crop_1"].channels.shape == (3, 1)
    assert batch["crop_1"].key.shape == (3, 5)
    assert batch["meta"]["scan"].shape == (3, 2)
    assert batch["meta"]["patient"].tolist() == [3, 1, 4]


# Determinism


def test_an_item_is_a_function_of_seed_epoch_place_and_occurrence(cohort: list[dict]) -> None:
    one, other = pairs(cohort, seed=1), pairs(cohort, seed=1, reader=ScanReader(Preprocessing(), cache_mb=0))
    indices = [(place, epoch, occurrence) for place in range(5) for epoch in (1, 2) for occurrence in (0, 1)]
    first = {index: one[index] for index in indices}
    for index in reversed(indices):
        assert_same(first[index], other[index])
    assert sum(differ(first[0, 1, 0], first[0, epoch, turn]) for epoch, turn in ((1, 1), (2, 0), (2, 1))) == 3
    assert differ(first[0, 1, 0], pairs(cohort, seed=2)[0, 1, 0])


def test_a_plain_index_is_that_of_the_epoch_that_was_set(cohort: list[dict]) -> None:
    dataset = pairs(cohort)
    assert_same(dataset[2], dataset[2, 0, 0])
    dataset.set_epoch(6)
    assert_same(dataset[2], dataset[2, 6, 0])
    assert_same(dataset[np.int64(2)], dataset[2])
    assert_same(dataset[-2], dataset[3])


@pytest.mark.parametrize("place", [5, -6])
def test_a_place_beyond_the_patients_is_an_index_error(place: int, cohort: list[dict]) -> None:
    with pytest.raises(IndexError):
        pairs(cohort)[place, 0, 0]


@pytest.mark.parametrize("names", [list("zyxwv"), ["9", "10", "1", "02", "2"], [7, 3, 5, 1, 2]], ids=str)
def test_renaming_patients_changes_nothing(names: list[Any], cohort: list[dict]) -> None:
    renamed = [{**row, "patient_id": names[int(row["patient_id"][-1])]} for row in cohort]
    one, other = pairs(cohort), pairs(renamed)
    for place in range(5):
        assert_same(one[place, 3, 1], other[place, 3, 1])
    assert one.summary() == other.summary()


def epochs_of(dataset: PatientPairDataset, epochs: int, **settings: Any) -> list[Any]:
    sampler = PatientSampler(dataset, passes=2, seed=5)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=3, sampler=sampler, drop_last=True, **settings)
    batches = []
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        batches.append(list(loader))
    return batches


def test_workers_give_the_very_same_batches(cohort: list[dict]) -> None:
    alone = epochs_of(pairs(cohort), 2)
    assert [len(batches) for batches in alone] == [3, 3]
    assert_same(alone, epochs_of(pairs(cohort), 2, num_workers=2, persistent_workers=True))
    lazy = pairs(cohort, preload=False, reader=ScanReader(Preprocessing(), cache_mb=0.05))
    assert_same(alone, epochs_of(lazy, 2, num_workers=2))


def test_spawned_workers_give_the_very_same_batches(cohort: list[dict], write_scan: Callable[..., str]) -> None:
    cohort[2]["image"] = write_scan("flat", np.full((9, 9, 9), 1, np.float32))
    alone = epochs_of(pairs(cohort), 1)
    assert_same(alone, epochs_of(pairs(cohort), 1, num_workers=1, multiprocessing_context="spawn"))


@pytest.mark.parametrize("crop", [RandomCrop(SIZE), CropAround(SIZE, jitter=2)])
def test_a_pickled_copy_gives_the_same_items(crop: RandomCrop, cohort: list[dict], tmp_path: Path) -> None:
    reader = ScanReader(Preprocessing(("image", "label")), quarantine=Quarantine(tmp_path / "quarantine.jsonl"))
    dataset = pairs(cohort, crop=crop, reader=reader)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    for place in range(5):
        assert_same(dataset[place, 1, 0], copy[place, 1, 0])


# Bad scans


def test_a_bad_scan_is_replaced_by_another_of_its_patient() -> None:
    dataset = invented(3, 2, bad=(1,))
    drawn = {tuple(dataset[0, epoch, 0]["meta"]["scan"].tolist()) for epoch in range(40)}
    assert drawn == {(0, 2), (2, 0)}
    assert list(dataset.reader.quarantine.reasons()) == [1]


def test_with_one_good_scan_left_it_is_cropped_twice() -> None:
    dataset = invented(2, 2, bad=(0,))
    assert {tuple(dataset[0, epoch, 0]["meta"]["scan"].tolist()) for epoch in range(10)} == {(1, 1)}


def test_items_do_not_depend_on_when_a_bad_scan_is_found() -> None:
    known, unknown = invented(3, 2, 2, bad=(1, 5, 6), preload=True), invented(3, 2, 2, bad=(1, 5, 6))
    for epoch in range(10):
        for place in range(3):
            assert_same(known[place, epoch, 0], unknown[place, epoch, 0])


def test_a_patient_without_usable_scans_is_replaced_and_samples_stay_apart() -> None:
    dataset = invented(2, 2, 1, 1, 2, bad=(0, 1, 4))
    batch = [dataset[place, 1, turn] for place in range(5) for turn in (0, 1, 2)]
    assert sorted(int(item["meta"]["sample"]) for item in batch) == list(range(15))
    for item, place in zip(batch, [place for place in range(5) for _ in range(3)], strict=True):
        patient = int(item["meta"]["patient"])
        assert patient in {1, 3, 4}
        assert patient == place or place in {0, 2}
        assert set(item["meta"]["scan"].tolist()) <= {2, 3, 5, 6, 7}
        assert item["crop_1"].key[2] == place
    replacements = {int(dataset[0, epoch, 0]["meta"]["patient"]) for epoch in range(40)}
    assert replacements == {1, 3, 4}  # not always the same one


def test_a_scan_that_the_crop_rule_refuses_is_quarantined_alone() -> None:
    dataset = invented(3, 2, no_mask=(1,), crop=CropAround((4, 4, 4)))
    drawn = {tuple(dataset[0, epoch, 0]["meta"]["scan"].tolist()) for epoch in range(20)}
    assert drawn == {(0, 2), (2, 0)}
    assert "no mask" in dataset.reader.quarantine.reasons()[1]
    assert list(dataset.reader.quarantine.reasons()) == [1]


def test_a_run_without_any_usable_scan_ends_with_a_reason() -> None:
    dataset = invented(2, 1, bad=(0, 1, 2))
    with pytest.raises(DatalistError, match="No scan"):
        dataset[0]
    with pytest.raises(DatalistError, match="No scan"):
        invented(2, 1, bad=(0, 1, 2), preload=True)


def test_a_worker_quarantines_in_the_file_that_the_run_reads(
    cohort: list[dict], write_scan: Callable[..., str], tmp_path: Path
) -> None:
    cohort[1]["image"] = write_scan("flat", np.full((9, 9, 9), 1, np.float32))
    cohort[3]["image"] = str(tmp_path / "missing.nii.gz")  # the only scan of patient 1
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", limit=0.5)
    dataset = pairs(cohort, preload=False, reader=ScanReader(Preprocessing(), quarantine=quarantine))
    batches = epochs_of(dataset, 3, num_workers=2)
    assert sum(len(epoch) for epoch in batches) == 9
    assert list(quarantine.reasons()) == [1, 3]
    assert "5 patients" not in dataset.summary()
    assert "2 scans quarantined, 1 patients left without scans" in dataset.summary()


# Scans that are gone during the run


def epoch_of(dataset: PatientPairDataset, workers: int) -> list[Any]:
    with explained():
        return all_of(DataLoader(dataset, batch_size=1, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_is_gone_stops_the_run_and_a_single_scan_does_not(
    workers: int, cohort: list[dict], write_scan: Callable[..., str], tmp_path: Path
) -> None:
    for number, row in enumerate(cohort):
        row["image"] = write_scan(f"scan_{number}", np.random.default_rng(number).random((9, 9, 9), np.float32))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", limit=0.2)
    # without a cache, a preload ends after the first scan
    dataset = pairs(cohort, reader=ScanReader(Preprocessing(), cache_mb=0, quarantine=quarantine))
    assert len(epoch_of(dataset, workers)) == 5
    Path(cohort[3]["image"]).unlink()  # the only scan of its patient
    assert len(epoch_of(dataset, workers)) == 5
    assert list(quarantine.reasons()) == [3]
    for row in cohort:
        Path(row["image"]).unlink(missing_ok=True)
    with pytest.raises(DatalistError, match="Too many scans have become unusable during the run") as caught:
        epoch_of(dataset, workers)
    message = str(caught.value)
    assert re.search(r"\b[2-9] of 9 since the start", message), "workers may find several before one of them says so"
    assert "at most 1 (max_bad_scans: 0.2)" in message
    assert "still mounted" in message


def test_scans_that_were_bad_before_the_run_do_not_stop_it(cohort: list[dict], tmp_path: Path) -> None:
    for row in cohort[4:8]:
        row["image"] = str(tmp_path / "missing.nii.gz")
    dataset = pairs(cohort)
    assert list(dataset.reader.quarantine.reasons()) == [4, 5, 6, 7]
    assert len(epoch_of(dataset, 0)) == 5


# The summary


def test_the_summary_counts_pairs_and_fallbacks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset = invented(3, 1, 2, 2, 1, preload=True)
    assert dataset.paired_patients() == 3
    line = "5 patients, 9 scans; pairs by SamePatient: 3 patients as the rule says, 2 by two crops of one scan"
    assert dataset.summary() == line
    assert line in caplog.text


def test_the_summary_counts_what_is_quarantined() -> None:
    dataset = invented(3, 1, 2, 2, 1, bad=(3, 4, 0), preload=True)  # leaves 2, 0, 1, 2, 1
    assert dataset.paired_patients() == 2
    assert dataset.summary().splitlines() == [
        "4 patients, 6 scans; pairs by SamePatient: 2 patients as the rule says, 2 by two crops of one scan",
        "3 scans quarantined, 1 patients left without scans",
    ]


def test_same_scan_has_no_fallback() -> None:
    assert invented(3, 1, 2, rule=SameScan()).paired_patients() == 3


def test_real_scans_of_one_patient_meet(data_dir: Path) -> None:
    folder = data_dir / "msd_hippocampus"
    with (folder / "volumes.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))[:10]
    rows = [
        {"image": str(folder / "imagesTr" / f"{row['volume']}.nii.gz"), "patient_id": row["patient"]} for row in listed
    ]
    dataset = pairs(rows, crop=RandomCrop((24, 32, 24), (32, 40, 32)))
    assert dataset.reader.failed == frozenset()
    patients = [row["patient"] for row in listed]
    assert dataset.paired_patients() == sum(patients.count(name) > 1 for name in set(patients)) > 0
    for item in (dataset[place] for place in range(len(dataset))):
        first, second = item["meta"]["scan"].tolist()
        assert patients[first] == patients[second]
        assert (first != second) == (patients.count(patients[first]) > 1)
        for view in (1, 2):
            assert 0 <= float(item[f"crop_{view}"].image.min()) < float(item[f"crop_{view}"].image.max()) <= 1


# Construction


@pytest.mark.parametrize("scans", [(), (1,), (4,)])
def test_fewer_than_two_patients_are_refused(scans: tuple[int, ...]) -> None:
    with pytest.raises(DatalistError, match="Too few patients"):
        invented(*scans)


def test_overlapping_crops_of_different_scans_are_refused() -> None:
    with pytest.raises(ConfigError, match="SameScan"):
        invented(2, 2, rule=SamePatient(), crop=OverlappingCrops((4, 4, 4)))
    dataset = invented(2, 2, rule=SameScan(), crop=OverlappingCrops((4, 4, 4)))
    assert dataset[0]["crop_1"].image.shape == (1, 4, 4, 4)
