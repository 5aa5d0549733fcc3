from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Affine
from scipy.spatial.transform import Rotation

from medclr import draws
from medclr.errors import ConfigError
from medclr.geometry import Crop, spacing_of
from medclr.views import RandomSpatial

THICK = (0.7, 0.7, 5.0)
STILL = {"rotation": 0, "scale": 1.0}


def _view(spatial, crop, place="views/0"):
    return spatial.apply(crop, spatial.make_params(crop.key, place))


def _indices(shape):
    return np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1).reshape(-1, 3)


def _world(affine, index):
    affine = affine.double().numpy()
    return index @ affine[:3, :3].T + affine[:3, 3]


def _crop_points(crop, view, sample):
    """The crop's coordinates of every voxel of a view, through world space."""
    world = _world(view.affine[sample], _indices(view.image.shape[2:]))
    affine = crop.affine[sample].double().numpy()
    return (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T


@pytest.mark.parametrize("shape", [(20, 24, 18), (21, 25, 18), (12, 14, 10)])
def test_at_zero_strength_a_view_is_the_middle_of_its_crop_bit_for_bit(make_crop, shape):
    crop, size = make_crop(shape), (12, 14, 10)
    view = _view(RandomSpatial(size, **STILL), crop)
    start = [(n - s) // 2 for n, s in zip(shape, size, strict=True)]
    x, y, z = (slice(a, a + s) for a, s in zip(start, size, strict=True))
    assert torch.equal(view.image, crop.image[:, :, x, y, z])
    assert view.valid.all()
    np.testing.assert_allclose(_world(view.affine[0], np.zeros(3)), _world(crop.affine[0], np.array(start)), atol=1e-4)
    assert torch.equal(view.affine[:, :3, :3], crop.affine[:, :3, :3])


@pytest.mark.parametrize("shape", [(20, 24, 18), (21, 25, 19)])
def test_interpolation_at_a_neutral_draw_agrees_with_the_cut(make_crop, shape):
    crop, spatial = (
        make_crop(shape, inside=[[5, 0, 0], list(shape)]),
        RandomSpatial((12, 14, 10), **STILL, flip=[0.5] * 3),
    )
    params = spatial.make_params(crop.key, "views/0")
    cut, read = spatial._cut(crop, params), spatial._resample(crop, params)
    torch.testing.assert_close(read.image, cut.image, atol=2e-5, rtol=0)
    torch.testing.assert_close(read.affine, cut.affine, atol=2e-5, rtol=0)
    assert torch.equal(read.valid, cut.valid)
    assert not cut.valid.all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_sure_flip_reverses_one_axis_and_says_so_in_the_affine(make_crop, axis):
    crop, size = make_crop((21, 24, 18)), (12, 14, 10)
    plain = _view(RandomSpatial(size, **STILL), crop)
    flipped = _view(RandomSpatial(size, **STILL, flip=[float(axis == a) for a in range(3)]), crop)
    assert torch.equal(flipped.image, plain.image.flip(axis + 2))
    here = _indices(size)
    there = here.copy()
    there[:, axis] = size[axis] - 1 - here[:, axis]
    np.testing.assert_allclose(_world(flipped.affine[1], here), _world(plain.affine[1], there), atol=1e-4)


def test_flips_happen_as_often_as_asked(make_keys):
    flips = RandomSpatial((4, 4, 4), flip=(True, 0.2, False)).make_params(make_keys(2000), "views/0")["flip"]
    np.testing.assert_allclose(flips.double().mean(dim=0), [0.5, 0.2, 0.0], atol=0.04)


def test_one_resampling_equals_interpolation_by_scipy_at_the_points_that_the_affine_names(make_crop):
    crop = make_crop((20, 24, 18), spacing=(1.2, 0.8, 2.0))
    view = _view(RandomSpatial((10, 11, 8), rotation=30, scale=(0.8, 1.2), translation=2.0, flip=[0.5] * 3), crop)
    compared = 0
    for sample in range(len(crop.image)):
        points = _crop_points(crop, view, sample)
        wanted = scipy.ndimage.map_coordinates(crop.image[sample, 0].numpy(), points.T, order=1, mode="nearest")
        valid = view.valid[sample, 0].numpy().ravel()
        got = view.image[sample, 0].numpy().ravel()
        np.testing.assert_allclose(got[valid], wanted[valid], atol=1e-4)
        assert not got[~valid].any()
        compared += valid.sum()
    assert compared > 0.5 * view.valid.numel()


def test_the_grid_follows_the_formula_built_from_scipys_rotations(make_crop):
    crop = make_crop(spacing=THICK)
    spatial = RandomSpatial((9, 8, 7), rotation=40, scale=(0.7, 1.4), anisotropic=True, translation=3.0, flip=[0.5] * 3)
    params = spatial.make_params(crop.key, "views/0")
    view = spatial.apply(crop, params)
    middle, spacing = (np.array(spatial.size) - 1) / 2, np.array(THICK)
    start = (np.array(crop.image.shape[2:]) - spatial.size) // 2
    for sample in range(len(crop.image)):
        one = {name: value[sample].double().numpy() for name, value in params.items()}
        turn = Rotation.from_euler("XYZ", one["rotation"], degrees=True).as_matrix()
        away = (_indices(spatial.size) - middle) * spacing
        away = (away * (1 - 2 * one["flip"]) / one["scale"]) @ turn.T + one["translation"]
        np.testing.assert_allclose(_crop_points(crop, view, sample), start + middle + away / spacing, atol=2e-3)


def test_views_equal_those_of_monai_for_one_matrix(make_crop):
    crop = make_crop((20, 24, 18), count=2)
    spatial = RandomSpatial((12, 14, 10), rotation=25, scale=(0.8, 1.2))
    view = _view(spatial, crop)
    for sample in range(2):
        matrix = np.eye(4)
        matrix[:3, :3] = (
            np.linalg.inv(crop.affine[sample].double().numpy())[:3, :3] @ view.affine[sample, :3, :3].numpy()
        )
        # MONAI's own way to reach voxel coordinates is align_corners=False, its default.
        monai = Affine(affine=matrix, spatial_size=spatial.size, padding_mode="border", image_only=True)
        wanted = monai(crop.image[sample]).as_tensor()
        inside = view.valid[sample]
        torch.testing.assert_close(view.image[sample][inside], wanted[inside], atol=1e-4, rtol=0)


def test_a_rotation_preserves_millimetres_where_slices_are_thick(make_crop):
    crop = make_crop((40, 40, 8), count=16, spacing=THICK)
    spatial = RandomSpatial((24, 24, 5), rotation=60, scale=1.0)
    view = _view(spatial, crop)
    torch.testing.assert_close(spacing_of(view.affine), torch.tensor(THICK).expand(16, 3), atol=1e-4, rtol=0)
    columns = view.affine[:, :3, :3].double()
    gram = columns.transpose(1, 2) @ columns
    torch.testing.assert_close(gram, torch.diag(torch.tensor(THICK).double() ** 2).expand(16, 3, 3), atol=1e-3, rtol=0)
    assert (view.affine[:, :3, :3] - crop.affine[:, :3, :3]).abs().amax(dim=(1, 2)).min() > 0.05


def test_what_is_read_is_where_the_affine_says_in_both_views(make_crop):
    """A ramp through world space is what trilinear interpolation gives exactly, so both views must show it."""
    spatial = RandomSpatial(
        (16, 16, 6), rotation=20, scale=(0.8, 1.25), anisotropic=True, translation=2, flip=[0.5] * 3
    )
    crops = [make_crop((40, 40, 8), view=view, spacing=THICK) for view in (1, 2)]
    slope = np.array([0.02, -0.03, 0.01])
    compared = 0
    for crop in crops:
        for sample in range(len(crop.image)):
            ramp = _world(crop.affine[sample], _indices(crop.image.shape[2:])) @ slope
            crop.image[sample, 0] = torch.from_numpy(ramp.reshape(crop.image.shape[2:]))
        view = _view(spatial, crop)
        for sample in range(len(crop.image)):
            valid = view.valid[sample, 0].numpy().ravel()
            wanted = _world(view.affine[sample], _indices(spatial.size)) @ slope
            np.testing.assert_allclose(view.image[sample, 0].numpy().ravel()[valid], wanted[valid], atol=1e-3)
            compared += valid.sum()
    assert compared > 0.3 * 2 * view.valid.numel()


def test_one_world_point_looks_alike_in_both_views_of_a_scan(make_crop):
    spatial = RandomSpatial((20, 22, 20), rotation=20, scale=(0.9, 1.1), flip=[0.5] * 3)
    first, second = (make_crop((40, 40, 40), count=3, view=view) for view in (1, 2))
    for sample in range(3):
        world = _world(first.affine[sample], _indices((40, 40, 40)))
        smooth = np.sin(world / 6).sum(axis=1).reshape(40, 40, 40)
        first.image[sample, 0] = second.image[sample, 0] = torch.from_numpy(smooth)
    view_1, view_2 = _view(spatial, first), _view(spatial, second)
    for sample in range(3):
        world = _world(view_1.affine[sample], _indices(spatial.size))
        other = view_2.affine[sample].double().numpy()
        points = (world - other[:3, 3]) @ np.linalg.inv(other[:3, :3]).T
        shared = ((points >= 0) & (points <= np.array(spatial.size) - 1)).all(axis=1)
        seen = scipy.ndimage.map_coordinates(view_2.image[sample, 0].numpy(), points[shared].T, order=1)
        assert shared.mean() > 0.4
        np.testing.assert_allclose(view_1.image[sample, 0].numpy().ravel()[shared], seen, atol=0.03)


def test_scale_magnifies_the_anatomy_and_shortens_the_columns_of_the_affine(make_crop):
    crop = make_crop((40, 40, 40), count=1)
    ball = (torch.from_numpy(_indices((40, 40, 40)) - 19.5).norm(dim=1) < 6).view(40, 40, 40).float()
    crop.image[0, 0] = ball
    view = _view(RandomSpatial((30, 30, 30), rotation=0, scale=2.0), crop)
    assert float(view.image.sum() / ball.sum()) == pytest.approx(8, rel=0.1)
    torch.testing.assert_close(spacing_of(view.affine), torch.full((1, 3), 0.5))


def test_scales_are_drawn_evenly_between_halving_and_doubling(make_keys):
    scale = RandomSpatial((4, 4, 4), scale=(0.5, 2.0)).make_params(make_keys(4000), "views/0")["scale"]
    assert torch.equal(scale[:, 0], scale[:, 1])
    assert 0.5 <= scale.min() < 0.51
    assert 1.95 < scale.max() <= 2.0
    assert float((scale[:, 0] < 1).double().mean()) == pytest.approx(0.5, abs=0.03)
    free = RandomSpatial((4, 4, 4), scale=(0.5, 2.0), anisotropic=True).make_params(make_keys(4000), "views/0")["scale"]
    assert abs(np.corrcoef(free[:, 0], free[:, 1])[0, 1]) < 0.06


def test_translation_moves_by_millimetres_along_the_axes_of_the_crop(make_crop):
    crop = make_crop((30, 30, 9), spacing=THICK)
    spatial = RandomSpatial((10, 10, 5), **STILL, translation=(2.0, 0.0, 5.0))
    params = spatial.make_params(crop.key, "views/0")
    moved, still = spatial.apply(crop, params), _view(RandomSpatial((10, 10, 5), **STILL), crop)
    along = (moved.affine - still.affine)[:, None, :3, 3] @ (crop.affine[:, :3, :3] / torch.tensor(THICK))
    torch.testing.assert_close(along[:, 0], params["translation"], atol=1e-4, rtol=0)
    assert params["translation"].abs().amax(dim=0).tolist() <= [2.0, 0.0, 5.0]
    assert params["translation"][:, 2].abs().max() > 2


def test_only_the_share_of_samples_that_is_asked_for_is_turned(make_keys):
    params = RandomSpatial((4, 4, 4), translation=1.0, probability=0.3).make_params(make_keys(3000), "views/0")
    turned = (params["rotation"] != 0).all(dim=1)
    assert float(turned.double().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(turned, (params["scale"] != 1).any(dim=1))
    assert torch.equal(turned, (params["translation"] != 0).any(dim=1))


def test_a_batch_of_turned_and_unturned_samples_gives_each_its_own(make_crop):
    crop = make_crop((24, 28, 20), count=12, inside=[[6, 0, 0], [24, 28, 20]])
    spatial = RandomSpatial((12, 14, 10), probability=0.5, flip=[0.5] * 3)
    params = spatial.make_params(crop.key, "views/0")
    turned = (params["rotation"] != 0).any(dim=1)
    assert 0 < int(turned.sum()) < 12
    whole = spatial.apply(crop, params)
    for sample in range(12):
        single = spatial.apply(
            Crop(*(tensor[sample : sample + 1] for tensor in crop)),
            {name: value[sample : sample + 1] for name, value in params.items()},
        )
        for name in ("image", "affine", "valid", "channels", "key"):
            assert torch.equal(getattr(whole, name)[sample], getattr(single, name)[0]), name


def test_valid_marks_exactly_what_lies_inside_the_scan_and_the_rest_is_zero(make_crop):
    inside = [[4, -3, 2], [16, 15, 30]]
    crop = make_crop((20, 24, 18), count=6, inside=inside)
    crop = crop._replace(image=(crop.image > 0).float())
    view = _view(RandomSpatial((14, 16, 12), rotation=25, scale=(0.8, 1.2)), crop)
    low, high = np.maximum(inside[0], 0), np.minimum(inside[1], crop.image.shape[2:])
    for sample in range(6):
        points = _crop_points(crop, view, sample)
        beyond = np.maximum(low - points, points - (high - 1)).max(axis=1)
        valid = view.valid[sample, 0].numpy().ravel()
        assert valid[beyond < -1e-3].all()
        assert not valid[beyond > 3e-3].any()
    assert 0.2 < view.valid.double().mean() < 0.9
    assert torch.equal(view.image, view.image * view.valid)
    # The scan is 1 throughout, and its rim is not darkened by the zeros beyond.
    torch.testing.assert_close(view.image, view.valid.float(), atol=2e-3, rtol=0)


def test_a_crop_that_missed_the_scan_gives_an_empty_view(make_crop):
    crop = make_crop((20, 24, 18), inside=[[0, 0, 0], [0, 24, 18]])
    for spatial in (RandomSpatial((14, 16, 12)), RandomSpatial((14, 16, 12), **STILL)):
        view = _view(spatial, crop)
        assert not view.valid.any()
        assert not view.image.any()


def test_channels_are_turned_alike(make_crop):
    crop = make_crop(channels=3)
    crop = crop._replace(image=crop.image[:, :1] * torch.tensor([1.0, 2.0, 0.0]).view(3, 1, 1, 1))
    view = _view(RandomSpatial((12, 14, 10)), crop)
    torch.testing.assert_close(view.image[:, 1], 2 * view.image[:, 0])
    assert not view.image[:, 2].any()


def _extremes(spatial, count=64):
    """Draws at the ends of every range, in all combinations of signs, and some between."""
    keys = torch.stack([draws.draw_key(1, 0, place, 0, 1) for place in range(count)])
    params = spatial.make_params(keys, "views/0")
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))
    params["rotation"][:] = (
        signs[:, :3] * torch.tensor(spatial.rotation) * torch.where(torch.arange(64) < 48, 1, 0.5)[:, None]
    )
    params["translation"][:] = signs[:, 3:] * torch.tensor(spatial.translation)
    params["scale"][:32] = spatial.scale[0]
    return keys, params


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 9)] * 3),
    rotation=st.tuples(*[st.floats(0, 180)] * 3),
    low=st.floats(0.5, 1.5),
    factor=st.floats(1, 2),
    translation=st.tuples(*[st.floats(0, 4)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 5)] * 3),
    probability=st.sampled_from([0.5, 1.0]),
)
def test_no_view_reaches_beyond_a_crop_of_the_size_to_read(
    size, rotation, low, factor, translation, spacing, probability
):
    spatial = RandomSpatial(
        size, rotation=rotation, scale=(low, low * factor), translation=translation, probability=probability
    )
    shape = spatial.read_size(spacing)
    keys, extremes = _extremes(spatial)
    affine = torch.diag(torch.tensor([*spacing, 1.0])).repeat(64, 1, 1)
    image = torch.ones(64, 1, 1, 1, 1).expand(64, 1, *shape)
    inside = torch.tensor([[0, 0, 0], list(shape)]).repeat(64, 1, 1)
    crop = Crop(image, affine, inside, torch.ones(64, 1, dtype=torch.bool), keys)
    for params in (extremes, spatial.make_params(keys, "views/0")):
        assert spatial.apply(crop, params).valid.all()


def test_the_size_to_read_is_not_wasteful():
    spatial = RandomSpatial((32, 48, 32), rotation=15, scale=(0.9, 1.1))
    half = np.array([15.5, 23.5, 15.5]) / 0.9
    corners = np.array(list(itertools.product([-1, 1], repeat=3))) * half
    angles = list(itertools.product(np.linspace(-15, 15, 9), repeat=3))
    reached = np.abs(corners @ Rotation.from_euler("XYZ", angles, degrees=True).as_matrix().swapaxes(1, 2)).max(
        axis=(0, 1)
    )
    needed = 2 * reached + 1
    got = np.array(spatial.read_size())
    assert (got >= needed - 1e-6).all()
    assert (got < needed + 2).all()


def test_without_strength_nothing_more_than_the_view_is_read():
    assert RandomSpatial((12, 14, 10), **STILL, flip=(True, True, True)).read_size(THICK) == (12, 14, 10)
    assert RandomSpatial((12, 14, 10), rotation=90, probability=0).read_size(THICK) == (12, 14, 10)


def test_a_rotation_within_thick_slices_reads_no_further_slice():
    assert RandomSpatial((64, 64, 8), rotation=(0, 0, 30), scale=1.0).read_size(THICK)[2] == 8


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": (0, 4, 4)}, "size"),
        ({"size": (4, 4)}, "size"),
        ({"size": (4.5, 4, 4)}, "size"),
        ({"size": 4}, "size"),
        ({"rotation": 181}, "rotation"),
        ({"rotation": -5}, "rotation"),
        ({"rotation": (1, 2)}, "rotation"),
        ({"rotation": math.nan}, "rotation"),
        ({"scale": (1.1, 0.9)}, "scale"),
        ({"scale": 0}, "scale"),
        ({"scale": "large"}, "scale"),
        ({"translation": -1}, "translation"),
        ({"flip": (True, False)}, "flip"),
        ({"flip": (2.0, 0, 0)}, "flip"),
        ({"flip": True}, "flip"),
        ({"probability": 1.2}, "probability"),
        ({"probability": (0.2, 0.4)}, "probability"),
    ],
)
def test_an_unusable_setting_is_refused_by_name(settings, named):
    with pytest.raises(ConfigError, match=named) as caught:
        RandomSpatial(**{"size": (4, 4, 4), **settings})
    assert str(settings[named]) in str(caught.value)


@pytest.mark.parametrize("spacing", [(1, 1), (0, 1, 1), (1, -1, 1)])
def test_an_impossible_spacing_is_refused(spacing):
    with pytest.raises(ConfigError, match="spacing"):
        RandomSpatial((4, 4, 4)).read_size(spacing)


def test_crops_smaller_than_the_views_are_refused(make_crop):
    with pytest.raises(ConfigError, match="too small") as caught:
        _view(RandomSpatial((12, 26, 10)), make_crop((20, 24, 18)))
    assert "(20, 24, 18)" in str(caught.value)
