from __future__ import annotations

import json

import pytest
import torch

from medclr.errors import ConfigError
from medclr.geometry import Crop, View
from medclr.views import (
    ContrastBrightness,
    CutOut,
    Gamma,
    GaussianBlur,
    GaussianNoise,
    HistogramShift,
    RandomSpatial,
    Requantise,
    TwoViews,
)

SIZE = (12, 14, 10)
FIELDS = View._fields


def _recipe(probability=0.7):
    return TwoViews(
        RandomSpatial(SIZE, rotation=20, translation=1.0, flip=(True, True, False), probability=probability),
        GaussianNoise(probability=probability),
        GaussianBlur(probability=probability),
        Gamma(probability=probability),
        HistogramShift(probability=probability),
        ContrastBrightness(probability=probability),
        Requantise(probability=probability),
        CutOut(holes=2, fill="noise", probability=probability),
        CutOut(fill="mean", unit="mm", size=(2, 6), probability=probability),
    )


def _pair(make_crop, **settings):
    settings = {"shape": (20, 24, 18), "count": 8, "channels": 2, "inside": [[5, 0, 0], [20, 24, 18]], **settings}
    return make_crop(view=1, **settings), make_crop(view=2, **settings)


def _take(crop, rows):
    return Crop(*(tensor[rows] for tensor in crop))


def test_a_permuted_batch_gives_permuted_views_bit_for_bit(make_crop):
    crops, recipe = _pair(make_crop), _recipe()
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    views = recipe(*crops)
    permuted = recipe(*(_take(crop, order) for crop in crops))
    for view, other in zip(views, permuted, strict=True):
        for name in FIELDS:
            assert torch.equal(getattr(view, name)[order], getattr(other, name)), name


def test_a_batch_equals_its_items_one_by_one(make_crop):
    crops, recipe = _pair(make_crop), _recipe()
    views = recipe(*crops)
    for sample in range(8):
        single = recipe(*(_take(crop, slice(sample, sample + 1)) for crop in crops))
        for view, one in zip(views, single, strict=True):
            torch.testing.assert_close(view.image[sample], one.image[0], atol=2e-6, rtol=0)
            for name in FIELDS[1:]:
                assert torch.equal(getattr(view, name)[sample], getattr(one, name)[0]), name


def test_a_second_call_gives_the_same_views(make_crop):
    crops, recipe = _pair(make_crop), _recipe()
    first = recipe(*crops)
    torch.rand(10)
    for view, again in zip(first, recipe(*crops), strict=True):
        assert torch.equal(view.image, again.image)


def test_the_views_of_a_pair_and_of_two_epochs_differ(make_crop):
    crop_1, crop_2 = _pair(make_crop)
    view_1, view_2 = _recipe(1.0)(crop_1, crop_2)
    later = crop_1._replace(key=crop_1.key + torch.tensor([0, 1, 0, 0, 0]))
    for other in (view_2, _recipe(1.0).view(later)):
        assert ((view_1.image - other.image).abs().flatten(1).amax(dim=1) > 0.01).all()
        assert ((view_1.affine - other.affine).abs().flatten(1).amax(dim=1) > 0.01).all()


def test_two_transforms_of_one_class_draw_independently(make_crop):
    crop = make_crop((12, 14, 10), count=200)
    still = RandomSpatial(SIZE, rotation=0, scale=1.0)
    plain = TwoViews(still).view(crop).image
    once = TwoViews(still, GaussianNoise(std=0.1)).view(crop).image - plain
    twice = TwoViews(still, GaussianNoise(std=0.1), GaussianNoise(std=0.1)).view(crop).image - plain
    assert float(once.std()) == pytest.approx(0.1, rel=0.02)
    # Independent variances add up; the same draw twice would double the standard deviation.
    assert float(twice.std()) == pytest.approx(0.1 * 2**0.5, rel=0.02)


def test_one_key_for_both_crops_is_refused(make_crop):
    crop_1, crop_2 = _pair(make_crop)
    crop_2 = crop_2._replace(key=torch.cat([crop_2.key[:5], crop_1.key[5:]]))
    with pytest.raises(ConfigError, match="same draw key") as caught:
        _recipe()(crop_1, crop_2)
    assert caught.value.got == crop_1.key[5].tolist()


@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [GaussianNoise()],
        [GaussianNoise(), RandomSpatial(SIZE)],
        [RandomSpatial(SIZE), GaussianNoise(), RandomSpatial(SIZE)],
    ],
)
def test_a_recipe_without_exactly_one_spatial_transform_in_front_is_refused(transforms):
    with pytest.raises(ConfigError, match="starts with its only spatial transform") as caught:
        TwoViews(*transforms)
    assert caught.value.got == [type(one).__name__ for one in transforms]


@pytest.mark.parametrize("stranger", [GaussianNoise, "GaussianNoise", None, torch.nn.Identity()])
def test_what_is_no_transform_is_refused(stranger):
    with pytest.raises(ConfigError, match="no transform"):
        TwoViews(RandomSpatial(SIZE), stranger)


def test_a_list_by_keyword_is_the_same_recipe(make_crop):
    crop = make_crop()
    parts = [RandomSpatial(SIZE), Gamma()]
    assert torch.equal(TwoViews(*parts).view(crop).image, TwoViews(transforms=parts).view(crop).image)


def test_absent_channels_and_voxels_outside_the_scan_stay_zero(make_crop):
    crop = _pair(make_crop)[0]
    channels = torch.tensor([[True, False], [True, True]]).repeat(4, 1)
    crop = crop._replace(image=crop.image * channels[:, :, None, None, None], channels=channels)
    view = _recipe(1.0).view(crop)
    present = view.valid & channels[:, :, None, None, None]
    assert not view.image[~present].any()
    assert torch.equal(view.channels, channels)
    assert not view.valid.all()
    assert view.image[present].count_nonzero() > 0.9 * int(present.sum())
    # A present channel does not notice that its neighbour is missing, but for the noise, which is one stream a sample.
    quiet = TwoViews(RandomSpatial(SIZE), GaussianBlur(), Gamma(), ContrastBrightness(), HistogramShift(), Requantise())
    whole = _pair(make_crop)[0]
    torch.testing.assert_close(quiet.view(whole).image[:, 0], quiet.view(crop).image[:, 0], atol=2e-6, rtol=0)


def test_crops_are_not_written_to(make_crop):
    crop = _pair(make_crop)[0]
    before = Crop(*(tensor.clone() for tensor in crop))
    _recipe(1.0).view(crop)
    for name in Crop._fields:
        assert torch.equal(getattr(before, name), getattr(crop, name)), name


def test_views_are_computed_without_gradient_and_in_float32_under_autocast(make_crop):
    crop, recipe = _pair(make_crop)[0], _recipe(1.0)
    wanted = recipe.view(crop).image
    crop.image.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = recipe.view(crop).image
    assert not got.requires_grad
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_the_global_random_state_is_neither_read_nor_moved(make_crop):
    crop, recipe = _pair(make_crop)[0], _recipe(1.0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = recipe.view(crop).image
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, recipe.view(crop).image)


def test_the_description_is_plain_data_that_names_every_setting():
    recipe = _recipe()
    description = json.loads(json.dumps(recipe.describe()))
    assert [one["name"] for one in description][:2] == ["RandomSpatial", "GaussianNoise"]
    assert description[0]["size"] == list(SIZE)
    assert description[0]["flip"] == [0.5, 0.5, 0.0]
    assert description[1] == {"name": "GaussianNoise", "std": [0.0, 0.1], "probability": 0.7}


def test_the_size_to_read_is_that_of_the_spatial_transform():
    spatial = RandomSpatial(SIZE, rotation=30)
    assert TwoViews(spatial, Gamma()).read_size((1, 1, 3)) == spatial.read_size((1, 1, 3)) != SIZE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_views_of_the_cpu_but_for_noise(make_crop):
    crop = _pair(make_crop)[0]
    recipe = TwoViews(
        RandomSpatial(SIZE, translation=1.0, flip=(True, True, False), probability=0.7),
        GaussianBlur(),
        Gamma(),
        ContrastBrightness(),
        HistogramShift(),
        CutOut(fill="mean"),
    )
    wanted, got = recipe.view(crop), recipe.view(Crop(*(tensor.cuda() for tensor in crop)))
    assert got.image.is_cuda
    torch.testing.assert_close(got.image.cpu(), wanted.image, atol=1e-3, rtol=0)
    assert torch.equal(got.valid.cpu(), wanted.valid)
    noisy = TwoViews(RandomSpatial(SIZE), GaussianNoise(std=0.1)).view(Crop(*(tensor.cuda() for tensor in crop)))
    plain = TwoViews(RandomSpatial(SIZE)).view(Crop(*(tensor.cuda() for tensor in crop)))
    assert float((noisy.image - plain.image)[plain.valid.expand_as(plain.image)].std()) == pytest.approx(0.1, rel=0.05)
