from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medclr import keys
from medclr.draws import draw_key
from medclr.engine import PrepareViews
from medclr.geometry import Crop, View
from medclr.views import GaussianNoise, RandomSpatial, TwoViews

SIZE = (6, 7, 8)


def crop(view: int) -> Crop:
    return Crop(
        image=torch.rand(3, 1, *SIZE, generator=torch.Generator().manual_seed(view)),
        affine=torch.eye(4).repeat(3, 1, 1) * view,
        inside=torch.tensor([[0, 0, 0], SIZE]).repeat(3, 1, 1),
        channels=torch.ones(3, 1, dtype=torch.bool),
        key=torch.stack([draw_key(0, 0, place, 0, view) for place in range(3)]),
    )


def batch() -> dict[str, Any]:
    meta = {keys.SAMPLE: torch.arange(3), keys.PATIENT: torch.tensor([4, 4, 5]), keys.SCAN: torch.arange(6).view(3, 2)}
    return {keys.CROP_1: crop(1), keys.CROP_2: crop(2), keys.META: meta}


def recipe() -> TwoViews:
    return TwoViews(RandomSpatial(SIZE, rotation=0.0, scale=(1.0, 1.0)), GaussianNoise(std=0.1))


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_both_views_come_of_their_own_crop_and_the_metadata_as_the_target(device: Any) -> None:
    view_1, meta, others, kwargs = PrepareViews(recipe())(batch(), device)
    wanted_1, wanted_2 = recipe()(crop(1), crop(2))
    (view_2,) = others
    for view, wanted in ((view_1, wanted_1), (view_2, wanted_2)):
        assert isinstance(view, View)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(view, wanted, strict=True))
    assert not torch.equal(view_1.image, view_2.image)
    assert set(meta) == {keys.SAMPLE, keys.PATIENT, keys.SCAN}
    assert all(torch.equal(value, batch()[keys.META][name]) for name, value in meta.items())
    assert kwargs == {}


class Watching:
    """Stands in for the views and keeps what it was given."""

    def __call__(self, crop_1: Crop, crop_2: Crop) -> tuple[Any, Any]:
        self.crops = crop_1, crop_2
        return "view 1", "view 2"


def test_voxels_and_metadata_move_to_the_device_before_they_are_augmented_and_steering_tensors_stay() -> None:
    watching = Watching()
    view_1, meta, others, _ = PrepareViews(watching)(batch(), "meta")  # type: ignore[arg-type]
    for moved, source in zip(watching.crops, (crop(1), crop(2)), strict=True):
        devices = {name: value.device.type for name, value in moved._asdict().items()}
        assert devices == {"image": "meta", "affine": "meta", "channels": "meta", "inside": "cpu", "key": "cpu"}
        assert torch.equal(moved.key, source.key)
    assert {value.device.type for value in meta.values()} == {"meta"}
    assert (view_1, others) == ("view 1", ("view 2",))


def test_the_batch_stays_as_it_was_and_gives_the_same_views_again() -> None:
    prepare, data = PrepareViews(recipe()), batch()
    first, second = prepare(data)[0], prepare(data)[0]
    assert torch.equal(first.image, second.image)
    assert torch.equal(data[keys.CROP_1].image, crop(1).image)


def test_what_monais_trainer_passes_beside_is_taken() -> None:
    view_1, *_ = PrepareViews(recipe())(batch(), "cpu", True, memory_format=torch.contiguous_format)
    assert isinstance(view_1.image, Tensor)
