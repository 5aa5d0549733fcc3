from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medclr.data import CropAround, ForegroundCrop, OverlappingCrops, RandomCrop, Volume
from medclr.data.crops import overlap
from medclr.draws import draw_key, generator
from medclr.errors import ConfigError, ScanError
from medclr.geometry import Crop, spacing_of

ANISOTROPIC = (0.7, 1.3, 3.0)


def affine_of(spacing: tuple[float, ...] = ANISOTROPIC, seed: int = 0) -> torch.Tensor:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() * spacing * [1, -1, 1]
    affine[:3, 3] = [-12, 30, 5]
    return torch.from_numpy(affine).float()


def numbered(shape: tuple[int, ...], channels: int = 2, **kwargs: Any) -> Volume:
    """A volume in which every voxel has a value of its own, and none is 0."""
    image = torch.arange(1, channels * int(np.prod(shape)) + 1, dtype=torch.float32).view(channels, *shape)
    return Volume(image, affine_of(), torch.arange(channels) > 0, **kwargs)


def key(place: int = 0) -> torch.Tensor:
    return draw_key(5, 1, place, 0, 0)


def start_of(crop: Crop, volume: Volume) -> np.ndarray:
    """The voxel of the volume that is the crop's voxel 0, from the two affines alone."""
    between = np.linalg.inv(volume.affine.double().numpy()) @ crop.affine.double().numpy()
    np.testing.assert_allclose(between[:3, :3], np.eye(3), atol=1e-5)
    start = between[:3, 3].round().astype(int)
    np.testing.assert_allclose(between[:3, 3], start, atol=1e-3)
    return start


def view_start(crop: Crop, volume: Volume, size: tuple[int, ...]) -> np.ndarray:
    """The same for the view, which lies in the middle of the crop."""
    return start_of(crop, volume) + (np.array(crop.image.shape[1:]) - size) // 2


def check_voxels(crop: Crop, volume: Volume) -> None:
    """Reference: look every voxel of the crop up in the scan, through world space."""
    shape = np.array(volume.image.shape[1:]).reshape(3, 1, 1, 1)
    source = start_of(crop, volume).reshape(3, 1, 1, 1) + np.indices(crop.image.shape[1:])
    inside = ((source >= 0) & (source < shape)).all(axis=0)
    found = volume.image.numpy()[(slice(None), *np.clip(source, 0, shape - 1))]
    np.testing.assert_array_equal(crop.image.numpy(), np.where(inside, found, 0))
    box = np.zeros_like(inside)
    low, high = crop.inside.tolist()
    box[tuple(slice(first, end) for first, end in zip(low, high, strict=True))] = True
    np.testing.assert_array_equal(box, inside)


edges = st.tuples(*[st.integers(1, 7)] * 3)
margins = st.tuples(*[st.integers(0, 5)] * 3)


def rule_of(name: str, size: tuple[int, ...], read_size: tuple[int, ...]) -> RandomCrop:
    return {
        "random": lambda: RandomCrop(size, read_size),
        "foreground": lambda: ForegroundCrop(size, read_size, threshold=30, tries=3),
        "overlapping": lambda: OverlappingCrops(size, read_size, min_iou=0.4),
        "mask": lambda: CropAround(size, read_size, jitter=4),
        "point": lambda: CropAround(size, read_size, target="point", jitter=9),
    }[name]()


@pytest.mark.parametrize("name", ["random", "foreground", "overlapping", "mask", "point"])
@given(shape=edges, size=edges, margin=margins, place=st.integers(0, 10**6))
def test_every_voxel_of_a_crop_is_the_scans_voxel_at_the_position_that_its_affine_says(
    name: str, shape: tuple[int, ...], size: tuple[int, ...], margin: tuple[int, ...], place: int
) -> None:
    read_size = tuple(edge + more for edge, more in zip(size, margin, strict=True))
    label = torch.zeros(shape, dtype=torch.int16)
    label[tuple(place % edge for edge in shape)] = 1
    target = torch.tensor([place % edge for edge in shape], dtype=torch.float32)
    point = affine_of()[:3, :3] @ target + affine_of()[:3, 3]
    volume = numbered(shape, label=label, point=point)
    crops = rule_of(name, size, read_size)(volume, volume, key(place))
    for view, crop in enumerate(crops, start=1):
        assert crop.image.shape == (2, *read_size)
        assert crop.image.dtype == crop.affine.dtype == torch.float32
        assert crop.inside.dtype == crop.key.dtype == torch.int64
        assert crop.channels.tolist() == [False, True]
        assert crop.key.tolist() == [5, 1, place, 0, view]
        check_voxels(crop, volume)


@given(shape=edges, size=edges, margin=margins, place=st.integers(0, 10**6))
def test_a_random_crop_lies_in_its_scan_or_is_centred_on_it(
    shape: tuple[int, ...], size: tuple[int, ...], margin: tuple[int, ...], place: int
) -> None:
    volume = numbered(shape)
    rule = RandomCrop(size, [edge + more for edge, more in zip(size, margin, strict=True)])
    for crop in rule(volume, volume, key(place)):
        for start, edge, seen in zip(view_start(crop, volume, size), shape, size, strict=True):
            if edge >= seen:
                assert 0 <= start <= edge - seen
            else:
                before, after = -start, seen - edge + start
                assert abs(before - after) <= 1


def test_random_crops_reach_every_place_and_differ_between_the_views() -> None:
    volume = numbered((6, 5, 4))
    starts: dict[int, set[tuple[int, ...]]] = {1: set(), 2: set()}
    same = 0
    for place in range(400):
        crops = RandomCrop((4, 4, 3))(volume, volume, key(place))
        for view, crop in enumerate(crops, start=1):
            starts[view].add(tuple(start_of(crop, volume).tolist()))
        same += torch.equal(crops[0].affine, crops[1].affine)
    assert starts[1] == starts[2] == set(np.ndindex(3, 2, 2))
    assert same < 400 / 12 * 2


@pytest.mark.parametrize("name", ["random", "foreground", "overlapping", "mask"])
def test_a_crop_depends_on_its_key_alone(name: str) -> None:
    label = torch.zeros(12, 11, 10, dtype=torch.int16)
    label[4:7, 3, 5] = 1
    volume = numbered((12, 11, 10), label=label)
    rule = rule_of(name, (5, 4, 3), (5, 4, 3))
    first = [rule(volume, volume, key(place)) for place in range(20)]
    second = [rule(volume, volume, key(place)) for place in reversed(range(20))]
    fresh = rule_of(name, (5, 4, 3), (5, 4, 3))
    third = [fresh(volume, volume, key(place)) for place in range(20)]
    for one, other, another in zip(first, reversed(second), third, strict=True):
        for view in (0, 1):
            assert torch.equal(one[view].affine, other[view].affine)
            assert torch.equal(one[view].affine, another[view].affine)
    assert len({tuple(crops[0].affine.flatten().tolist()) for crops in first}) > 5


def test_a_crop_shares_no_memory_with_the_cached_scan() -> None:
    volume = numbered((4, 4, 4))
    before = volume.image.clone()
    for crop in RandomCrop((4, 4, 4))(volume, volume, key()):
        crop.image.add_(1)
        crop.affine.add_(1)
    assert torch.equal(volume.image, before)
    assert torch.equal(volume.affine, affine_of())


# Foreground


def test_a_foreground_crop_takes_the_first_place_with_enough_foreground_or_else_the_best() -> None:
    image = torch.zeros(2, 20, 20, 20)
    image[1, :8, :8, :8] = 1  # in the second channel: any channel counts
    volume = Volume(image, affine_of(), torch.ones(2, dtype=torch.bool))
    size = (6, 6, 6)
    found, ended_early = 0, 0
    for place in range(60):
        rule = ForegroundCrop(size, threshold=0.5, share=0.2, tries=8)
        crop, _ = rule(volume, volume, key(place))
        view_key = key(place)
        view_key[-1] = 1
        random = generator(view_key, "crop")
        starts = [RandomCrop(size).start(volume, random) for _ in range(8)]
        shares = [float(image[1][tuple(slice(a, a + 6) for a in start)].mean()) for start in starts]
        enough = [share >= 0.2 for share in shares]
        wanted = starts[enough.index(True)] if any(enough) else starts[int(np.argmax(shares))]
        np.testing.assert_array_equal(start_of(crop, volume), wanted)
        found += any(enough)
        ended_early += any(enough) and enough.index(True) < int(np.argmax(shares))
    assert 10 < found < 60
    assert ended_early > 0


@pytest.mark.parametrize("shape", [(3, 20, 20), (3, 3, 3)])
def test_a_foreground_crop_of_a_small_scan_counts_the_voxels_that_are_there(shape: tuple[int, ...]) -> None:
    volume = numbered(shape)
    rule = ForegroundCrop((6, 6, 6), share=1.0, tries=1)
    for crop in rule(volume, volume, key()):
        check_voxels(crop, volume)


def test_a_scan_without_foreground_still_gives_a_crop() -> None:
    volume = Volume(torch.zeros(1, 9, 9, 9), affine_of(), torch.ones(1, dtype=torch.bool))
    crop, _ = ForegroundCrop((4, 4, 4))(volume, volume, key())
    assert crop.image.shape == (1, 4, 4, 4)


# Around a mask or a point


def world_centre(crop: Crop) -> np.ndarray:
    middle = np.append((np.array(crop.image.shape[1:]) - 1) / 2, 1.0)
    return (crop.affine.double().numpy() @ middle)[:3]


@pytest.mark.parametrize("size", [(5, 5, 5), (5, 3, 7)])
@pytest.mark.parametrize("margin", [0, 2, 6])
def test_a_crop_of_odd_size_is_centred_on_the_masks_bounding_box_exactly(size: tuple[int, ...], margin: int) -> None:
    label = torch.zeros(20, 18, 16, dtype=torch.int16)
    label[4:9, 3:6, 10] = 1
    label[4, 13, 14] = 2  # box 4..8, 3..13, 10..14
    volume = numbered((20, 18, 16), label=label)
    rule = CropAround(size, [edge + margin for edge in size])
    for crop in rule(volume, volume, key()):
        start = view_start(crop, volume, size)
        np.testing.assert_array_equal(start + np.array(size) // 2, [6, 8, 12])


@pytest.mark.parametrize("size", [(4, 4, 4), (5, 6, 7)])
def test_a_crop_is_centred_on_a_point_within_half_a_voxel(size: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        voxel = random.uniform(-0.4, [19.4, 17.4, 15.4])
        affine = affine_of().double().numpy()
        point = (affine @ np.append(voxel, 1))[:3]
        volume = numbered((20, 18, 16), point=torch.from_numpy(point).float())
        crop, _ = CropAround(size, target="point")(volume, volume, key())
        apart = np.linalg.inv(affine[:3, :3]) @ (world_centre(crop) - point)
        assert np.abs(apart).max() <= 0.5 + 1e-3


def test_jitter_is_bounded_in_millimetres_along_each_axis_and_uses_its_range() -> None:
    label = torch.zeros(41, 41, 41, dtype=torch.int16)
    label[20, 20, 20] = 1
    volume = numbered((41, 41, 41), channels=1, label=label)
    spacing = spacing_of(volume.affine).numpy()
    np.testing.assert_allclose(spacing, ANISOTROPIC, rtol=1e-5)
    jitter = 6.0
    moved = []
    for place in range(200):
        for crop in CropAround((5, 5, 5), jitter=jitter)(volume, volume, key(place)):
            moved.append((view_start(crop, volume, (5, 5, 5)) + 2 - 20) * spacing)
    largest = np.abs(moved).max(axis=0)
    assert (largest <= jitter + spacing / 2 + 1e-4).all()
    assert (largest >= jitter - spacing).all()
    assert (np.abs(np.mean(moved, axis=0)) < 1).all()


def test_the_views_jitter_independently() -> None:
    label = torch.ones(9, 9, 9, dtype=torch.int16)
    volume = numbered((9, 9, 9), label=label)
    pairs = [CropAround((3, 3, 3), jitter=3)(volume, volume, key(place)) for place in range(20)]
    assert sum(torch.equal(one.affine, other.affine) for one, other in pairs) < 10


@pytest.mark.parametrize(
    ("target", "extra", "words"),
    [
        ("mask", {}, "no mask"),
        ("mask", {"label": torch.zeros(6, 6, 6, dtype=torch.int16)}, "no mask"),
        ("point", {}, "no point"),
        ("point", {"point": torch.tensor([500.0, 0, 0])}, "outside"),
    ],
)
def test_a_scan_without_its_target_is_refused(target: Any, extra: dict[str, Any], words: str) -> None:
    volume = numbered((6, 6, 6), **extra)
    with pytest.raises(ScanError, match=words):
        CropAround((3, 3, 3), target=target)(volume, volume, key())


# Overlap


def slow_iou(start_1: np.ndarray, start_2: np.ndarray, size: tuple[int, ...]) -> float:
    one, other = ({tuple(start + index) for index in np.ndindex(*size)} for start in (start_1, start_2))
    return len(one & other) / len(one | other)


@given(shift=st.tuples(*[st.integers(-5, 5)] * 3), size=st.tuples(*[st.integers(1, 4)] * 3))
def test_overlap_is_the_intersection_over_union_of_voxels(shift: tuple[int, ...], size: tuple[int, ...]) -> None:
    assert overlap(np.zeros(3, int), np.array(shift), size) == pytest.approx(
        slow_iou(np.zeros(3, int), np.array(shift), size)
    )


@pytest.mark.parametrize("shape", [(20, 18, 16), (9, 7, 8), (9, 9, 9), (6, 20, 3), (4, 4, 4)])
@pytest.mark.parametrize("min_iou", [0.0, 0.3, 0.7, 1.0])
def test_overlapping_crops_overlap_enough_in_every_draw(shape: tuple[int, ...], min_iou: float) -> None:
    size = (8, 7, 6)
    volume = numbered(shape)
    rule, ious = OverlappingCrops(size, (10, 10, 10), min_iou=min_iou), []
    for place in range(100):
        starts = [view_start(crop, volume, size) for crop in rule(volume, volume, key(place))]
        ious.append(overlap(starts[0], starts[1], size))
        for start in starts:
            for first, edge, seen in zip(start, shape, size, strict=True):
                assert 0 <= first <= edge - seen if edge >= seen else first == (edge - seen) // 2
    assert min(ious) >= min_iou
    if shape == (20, 18, 16) and min_iou < 1:
        assert np.mean(np.array(ious) == 1) < 0.25  # seldom the very same place
        assert np.mean(ious) < min_iou + 0.3


@pytest.mark.parametrize(
    "other", [numbered((9, 9, 8)), Volume(torch.ones(2, 9, 9, 9), torch.eye(4), torch.ones(2) > 0)]
)
def test_overlapping_crops_of_two_scans_are_refused(other: Volume) -> None:
    with pytest.raises(ConfigError, match="SameScan"):
        OverlappingCrops((4, 4, 4))(numbered((9, 9, 9)), other, key())


def test_a_scan_that_was_read_twice_is_one_scan() -> None:
    crops = OverlappingCrops((4, 4, 4))(numbered((9, 9, 9)), numbered((9, 9, 9)), key())
    assert len(crops) == 2


# Settings


@pytest.mark.parametrize(
    "size", [8, (8, 8), (8, 8, 0), (8, 8, -1), (8, 8, 2.5), (8, 8, 8, 8), ("a", 1, 1), None, "888"], ids=str
)
@pytest.mark.parametrize("rule", [RandomCrop, ForegroundCrop, CropAround, OverlappingCrops])
def test_unusable_sizes_fail_at_construction(rule: type, size: Any) -> None:
    with pytest.raises(ConfigError, match="size is unusable"):
        rule(size)
    if size is not None:
        with pytest.raises(ConfigError, match="read_size is unusable"):
            rule((2, 2, 2), size)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (RandomCrop, {"read_size": (8, 7, 8)}),
        (ForegroundCrop, {"share": 1.5}),
        (ForegroundCrop, {"share": float("nan")}),
        (ForegroundCrop, {"tries": 0}),
        (CropAround, {"target": "organ"}),
        (CropAround, {"jitter": -1}),
        (CropAround, {"jitter": float("nan")}),
        (OverlappingCrops, {"min_iou": -0.1}),
        (OverlappingCrops, {"min_iou": 1.1}),
    ],
    ids=str,
)
def test_unusable_settings_fail_at_construction(rule: type, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        rule((8, 8, 8), **settings)
    assert "fix:" in str(caught.value)


def test_sizes_may_come_as_numpy_integers() -> None:
    assert RandomCrop(np.array([4, 5, 6]), np.array([6, 7, 8])).read_size == (6, 7, 8)
