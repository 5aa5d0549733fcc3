"""Crops and views travel as tuples, and affines keep millimetres."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from medclr.geometry import Crop, View, shifted, spacing_of, to_device

angles = st.tuples(*[st.floats(-180, 180)] * 3)
spacings = st.tuples(*[st.floats(0.2, 8)] * 3)
offsets = st.tuples(*[st.integers(-40, 40)] * 3)


def affine_of(degrees: tuple[float, ...], spacing: tuple[float, ...]) -> Tensor:
    """Voxel index to millimetres: spacing first, then a rotation, then a shift."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = (12.5, -30.0, 7.0)
    return torch.from_numpy(affine)


def crop(number: int = 0) -> Crop:
    return Crop(
        image=torch.full((2, 4, 5, 6), float(number)),
        affine=torch.eye(4),
        inside=torch.tensor([[0, 0, 0], [4, 5, 6]]),
        channels=torch.tensor([True, False]),
        key=torch.tensor([1, 2, number, 0, 1]),
    )


def view() -> View:
    return View(
        image=torch.zeros(1, 2, 4, 5, 6),
        affine=torch.eye(4)[None],
        valid=torch.ones(1, 1, 4, 5, 6, dtype=torch.bool),
        channels=torch.tensor([[True, False]]),
        key=torch.zeros(1, 5, dtype=torch.int64),
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_batches_crops_as_crops(workers: int) -> None:
    context = "fork" if workers else None
    loader = DataLoader([crop(0), crop(1), crop(2)], batch_size=3, num_workers=workers, multiprocessing_context=context)
    (batch,) = loader
    assert type(batch) is Crop
    shapes = {name: tuple(value.shape) for name, value in batch._asdict().items()}
    assert shapes == {
        "image": (3, 2, 4, 5, 6),
        "affine": (3, 4, 4),
        "inside": (3, 2, 3),
        "channels": (3, 2),
        "key": (3, 5),
    }
    assert batch.image[:, 0, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.key[:, 2].tolist() == [0, 1, 2]
    assert (batch.inside.dtype, batch.channels.dtype, batch.key.dtype) == (torch.int64, torch.bool, torch.int64)


def test_a_batch_of_two_crops_an_item_keeps_them_apart() -> None:
    first, second = default_collate([(crop(0), crop(10)), (crop(1), crop(11))])
    assert (type(first), type(second)) == (Crop, Crop)
    assert first.key[:, 2].tolist() == [0, 1]
    assert second.key[:, 2].tolist() == [10, 11]


@pytest.mark.parametrize(("batch", "steering"), [(crop(), {"inside", "key"}), (view(), {"key"})])
def test_only_the_steering_tensors_stay_behind(batch: Crop | View, steering: set[str]) -> None:
    moved = to_device(batch, "meta")
    assert type(moved) is type(batch)
    devices = {name: value.device.type for name, value in moved._asdict().items()}
    assert devices == {name: "cpu" if name in steering else "meta" for name in batch._fields}
    for name in steering:
        assert getattr(moved, name) is getattr(batch, name)
    assert all(value.device.type == "cpu" for value in batch)


def test_moving_to_where_it_is_changes_nothing() -> None:
    batch = view()
    for before, after in zip(batch, to_device(batch, torch.device("cpu"), non_blocking=True), strict=True):
        assert after is before


@given(angles, spacings)
def test_spacing_is_read_from_a_rotated_affine(degrees: tuple[float, ...], spacing: tuple[float, ...]) -> None:
    affine = affine_of(degrees, spacing)
    expected = torch.tensor(spacing, dtype=torch.float64)
    torch.testing.assert_close(spacing_of(affine), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(spacing_of(affine.float()[None, None]), expected.float()[None, None], rtol=1e-5, atol=0)


def test_spacing_belongs_to_the_voxel_axes_not_to_the_world() -> None:
    # A sagittal scan: its voxel axes are the world's y, z, x, and slices lie 5 mm apart along the last of them.
    affine = torch.tensor([[0.0, 0, 5, 0], [0.7, 0, 0, 0], [0, 0.9, 0, 0], [0, 0, 0, 1]])
    assert spacing_of(affine).tolist() == pytest.approx([0.7, 0.9, 5.0])


@given(angles, spacings, offsets)
def test_a_shifted_grid_starts_at_the_named_voxel(
    degrees: tuple[float, ...], spacing: tuple[float, ...], offset: tuple[int, ...]
) -> None:
    affine = affine_of(degrees, spacing)
    before = affine.clone()
    result = shifted(affine, torch.tensor(offset))
    assert torch.equal(affine, before)
    for voxel in ((0, 0, 0), (1, 0, 0), (3, -2, 7)):
        here = result @ torch.tensor([*voxel, 1], dtype=torch.float64)
        there = affine @ torch.tensor([*np.add(voxel, offset), 1], dtype=torch.float64)
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-9)
    back = shifted(result, -torch.tensor(offset))
    torch.testing.assert_close(back, affine, rtol=1e-10, atol=1e-9)


def test_each_grid_of_a_batch_has_its_own_shift() -> None:
    affines = torch.stack([affine_of((0, 0, 90), (1, 2, 3)), affine_of((30, 40, 50), (2, 2, 2))]).float()
    moves = torch.tensor([[1, 2, 3], [-4, 0, 5]])
    together = shifted(affines, moves)
    for affine, move, result in zip(affines, moves, together, strict=True):
        torch.testing.assert_close(shifted(affine, move), result)
    torch.testing.assert_close(
        shifted(affines[:1], torch.tensor([0.5, 0, 0]))[0], shifted(affines[0], torch.tensor([0.5, 0, 0]))
    )
