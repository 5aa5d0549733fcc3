"""The items of fine-tuning as pure functions of (seed, epoch, turn, scan)."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import (
    Compose,
    Flipd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)
from torch import Tensor

from medclr.data import Preprocessing
from medclr.transfer import ScanSampler, SegmentationDataset

MASKED = ("image", "label")
DRAWS = [(place, epoch, turn) for turn, place in enumerate((2, 0, 1, 2, 2)) for epoch in (1, 2)]


def augmentation() -> Compose:
    """What the segmentation bundle does, in small, and each of it always."""
    return Compose(
        [
            SpatialPadd(MASKED, (14, 14, 14)),
            RandCropByLabelClassesd(MASKED, "label", (14, 14, 14), num_classes=2, num_samples=1, warn=False),
            RandAffined(
                MASKED,
                prob=1.0,
                spatial_size=(10, 10, 10),
                rotate_range=[0.3] * 3,
                scale_range=[(-0.1, 0.2)] * 3,
                translate_range=[2] * 3,
                mode=["bilinear", "nearest"],
                padding_mode="zeros",
            ),
            RandScaleIntensityd("image", 0.3, prob=0.5),
            RandShiftIntensityd("image", 0.1, prob=0.5),
            RandAdjustContrastd("image", prob=0.5, gamma=(0.7, 1.5)),
            RandGaussianNoised("image", std=0.05, prob=0.5),
        ]
    )


def augmented(data: list[dict], transform: Any = None, **settings: Any) -> SegmentationDataset:
    transform = augmentation() if transform is None else transform
    return SegmentationDataset(data, Preprocessing(MASKED), transform, **{"out_channels": 2, **settings})


def tensors(item: Any) -> tuple[Tensor, Tensor]:
    """Image and mask of an item, which MONAI's crops make a list of one."""
    (only,) = item
    return only["image"].as_tensor(), only["label"].as_tensor()


def equal(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))


@pytest.mark.parametrize("cache_mb", [64, 0])
def test_an_item_is_the_same_in_any_order_and_whatever_came_before(cache_mb: float, cohort: list[dict]) -> None:
    first, second = augmented(cohort, seed=5), augmented(cohort, seed=5, cache_mb=cache_mb)
    items = {draw: first[draw] for draw in DRAWS}
    for draw in reversed(DRAWS):
        second[0]  # moves the transforms' random state on
        assert equal(second[draw], items[draw])
        assert items[draw][0]["scan"] == draw[0]


def test_an_item_changes_with_seed_epoch_turn_and_scan(cohort: list[dict]) -> None:
    dataset, other = augmented(cohort, seed=5), augmented(cohort, seed=6)
    items = [dataset[draw] for draw in DRAWS] + [other[draw] for draw in DRAWS]
    images = [tensors(item)[0] for item in items]
    assert not any(torch.equal(a, b) for n, a in enumerate(images) for b in images[:n])


def test_a_negative_place_counts_from_the_end(cohort: list[dict]) -> None:
    dataset = augmented(cohort)
    assert dataset[-1][0]["scan"] == dataset[-1, 1, 0][0]["scan"] == len(cohort) - 1
    assert equal(dataset[-1, 1, 0], dataset[len(cohort) - 1, 1, 0])
    with pytest.raises(IndexError):
        dataset[len(cohort), 1, 0]


def test_by_place_alone_the_transform_goes_on_drawing(cohort: list[dict]) -> None:
    dataset = augmented(cohort)
    dataset.transform.set_random_state(seed=1)  # type: ignore[union-attr]
    items = [dataset[0] for _ in range(3)]
    assert not equal(items[0], items[1])
    dataset.transform.set_random_state(seed=1)  # type: ignore[union-attr]
    assert all(equal(dataset[0], item) for item in items)


def batches_of(dataset: SegmentationDataset, sampler: ScanSampler, workers: int) -> DataLoader:
    return DataLoader(dataset, sampler=sampler, batch_size=2, num_workers=workers, persistent_workers=workers > 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_nor_on_where_a_run_was_resumed(workers: int, cohort: list[dict]) -> None:
    dataset = augmented(cohort[:3], seed=7)
    sampler = ScanSampler(dataset, 6, seed=7)
    loader = batches_of(dataset, sampler, workers)
    alone = augmented(cohort[:3], seed=7)
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        draws = list(sampler)
        wanted = [tensors(alone[draw]) for draw in draws]
        for left_out in (0, 4, 0):
            sampler.start_at(left_out)
            batches = list(loader)
            for key, number in (("image", 0), ("label", 1)):
                got = torch.cat([batch[key].as_tensor() for batch in batches])
                assert torch.equal(got, torch.stack([item[number] for item in wanted[left_out:]]))


class Noting:
    """Notes the seeds that it is given."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def set_random_state(self, seed: int) -> None:
        self.seeds.append(seed)

    def __call__(self, item: Any) -> Any:
        return item


def test_seeds_are_what_monai_takes_and_none_comes_twice(cohort: list[dict]) -> None:
    noting = Noting()
    dataset = augmented(cohort[:1], noting, seed=2**40)
    for epoch in range(10):
        for turn in range(100):
            dataset[0, epoch, turn]
    assert len(set(noting.seeds)) == len(noting.seeds) == 1000
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in noting.seeds)
    assert max(noting.seeds) > 2**31
    np.random.RandomState(max(noting.seeds))


def noise(item: Any) -> Any:
    return item


@pytest.mark.parametrize(
    ("transform", "name"), [(Flipd(MASKED, 0), "Flipd"), (noise, "noise"), (Compose([]), None), (None, None)], ids=str
)
def test_a_transform_without_a_random_state_is_told_once(
    transform: Any, name: str | None, cohort: list[dict], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = SegmentationDataset(cohort, Preprocessing(MASKED), transform, out_channels=2)
        for draw in DRAWS:
            dataset[draw]
    told = [record.getMessage() for record in caplog.records if record.name == "medclr.transfer.scans"]
    assert len(told) == (name is not None)
    if name is not None:
        assert told[0].startswith(f"{name} ")
        assert "cannot be resumed exactly" in told[0]


def test_a_single_random_transform_is_seeded_as_well(cohort: list[dict]) -> None:
    def flips(dataset: SegmentationDataset) -> list[Tensor]:
        return [dataset[0, 1, turn]["image"].as_tensor() for turn in range(20)]

    ours, theirs = (flips(augmented(cohort, RandFlipd(MASKED, prob=0.5), seed=1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len({float(image[0, 0, 0, 0]) for image in ours}) == 2
