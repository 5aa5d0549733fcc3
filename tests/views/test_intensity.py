from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import AdjustContrast

from medclr.errors import ConfigError
from medclr.geometry import View
from medclr.views import ContrastBrightness, CutOut, Gamma, GaussianBlur, GaussianNoise, HistogramShift, Requantise

STRONG = [
    GaussianNoise(std=0.3),
    Gamma(gamma=2.0),
    ContrastBrightness(contrast=0.5, brightness=0.4),
    Requantise(levels=5),
    HistogramShift(strength=0.8),
    GaussianBlur(sigma=1.5),
    CutOut(size=0.7, fill=0.25),
    CutOut(size=0.7, fill="mean"),
    CutOut(size=0.7, fill="noise"),
]
NOTHING = [
    GaussianNoise(std=0),
    Gamma(gamma=1.0),
    ContrastBrightness(contrast=1.0, brightness=0),
    HistogramShift(strength=0),
    GaussianBlur(sigma=0),
    CutOut(size=0),
    *(type(one)(probability=0.0) for one in STRONG),
]


def _name(transform):
    return type(transform).__name__


def _apply(transform, view, place="views/1"):
    return transform.apply(view, transform.make_params(view.key, place))


def _reference(view, params, change):
    """Voxels inside the scan of each present channel, one channel at a time, in NumPy."""
    wanted = np.zeros(view.image.shape)
    for sample, channel in np.ndindex(*view.image.shape[:2]):
        if view.channels[sample, channel]:
            inside = view.valid[sample, 0].numpy()
            values = view.image[sample, channel].double().numpy()[inside]
            one = {name: value[sample].double().numpy() for name, value in params.items()}
            wanted[sample, channel][inside] = change(values, one)
    return torch.from_numpy(wanted).float()


@pytest.fixture
def gappy(make_view):
    """Two channels, one of them absent in one sample, and a part outside the scan."""
    view = make_view(channels=2, outside=5)
    view.channels[1, 0] = False
    view.image[1, 0] = 0
    return view


@pytest.mark.parametrize("transform", NOTHING, ids=_name)
def test_without_strength_or_by_probability_nothing_changes_bit_for_bit(transform, gappy):
    assert torch.equal(_apply(transform, gappy).image, gappy.image)


@pytest.mark.parametrize("transform", STRONG, ids=_name)
def test_what_is_not_there_stays_zero_and_what_comes_in_is_left_alone(transform, gappy):
    before = View(*(tensor.clone() for tensor in gappy))
    after = _apply(transform, gappy)
    present = gappy.valid & gappy.channels[:, :, None, None, None]
    assert not after.image[~present].any()
    assert after.image.isfinite().all()
    changed = (after.image != before.image).flatten(2).any(dim=2)
    assert torch.equal(changed, gappy.channels)
    for name in View._fields:
        assert torch.equal(getattr(before, name), getattr(gappy, name)), name
        assert name == "image" or getattr(after, name) is getattr(gappy, name)


@pytest.mark.parametrize("transform", STRONG, ids=_name)
def test_the_share_of_samples_that_change_is_the_probability(transform, make_view):
    view = make_view((4, 4, 4), count=600)
    transform = type(transform)(**{**vars(transform), "probability": 0.3})
    after = _apply(transform, view)
    changed = (after.image != view.image).flatten(1).any(dim=1)
    assert float(changed.double().mean()) == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize("transform", STRONG, ids=_name)
def test_empty_and_constant_views_stay_finite(transform, make_view):
    view = make_view(count=2)
    view.valid[0] = False
    view.image[0] = 0
    view.image[1] = 3.0
    after = _apply(transform, view).image
    assert after.isfinite().all()
    assert not after[0].any()


def test_noise_has_the_drawn_standard_deviation_and_no_mean(make_view):
    view = make_view((24, 24, 24), count=3)
    transform = GaussianNoise(std=(0.05, 0.5))
    params = transform.make_params(view.key, "views/1")
    noise = (transform.apply(view, params).image - view.image).flatten(1)
    torch.testing.assert_close(noise.std(dim=1), params["std"][:, 0], rtol=0.03, atol=0)
    assert (noise.mean(dim=1).abs() < 0.02).all()
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.05
    assert params["std"].unique().numel() == 3


def test_gamma_equals_that_of_monai(make_view):
    view, transform = make_view(channels=2), Gamma(gamma=(0.5, 2.0))
    params = transform.make_params(view.key, "views/1")
    got = transform.apply(view, params).image
    for sample in range(len(got)):
        for channel in range(2):
            monai = AdjustContrast(gamma=float(params["gamma"][sample]))
            wanted = monai(view.image[sample, channel : channel + 1]).as_tensor()
            torch.testing.assert_close(got[sample, channel], wanted[0], atol=1e-5, rtol=0)


def test_gamma_keeps_the_range_of_what_is_inside_the_scan(gappy):
    transform = Gamma(gamma=(0.5, 2.0))
    params = transform.make_params(gappy.key, "views/1")

    def bend(values, one):
        low, way = values.min(), np.ptp(values)
        return low + way * ((values - low) / way) ** one["gamma"][0]

    torch.testing.assert_close(transform.apply(gappy, params).image, _reference(gappy, params, bend), atol=1e-5, rtol=0)


def test_contrast_is_about_the_mean_of_what_is_inside_the_scan(gappy):
    transform = ContrastBrightness(contrast=(0.2, 2.0), brightness=(-0.5, 0.5))
    params = transform.make_params(gappy.key, "views/1")

    def stretch(values, one):
        return (values - values.mean()) * one["contrast"][0] + values.mean() + one["brightness"][0]

    torch.testing.assert_close(
        transform.apply(gappy, params).image, _reference(gappy, params, stretch), atol=1e-5, rtol=0
    )


def test_the_histogram_goes_through_the_drawn_curve(gappy):
    transform = HistogramShift(control_points=5, strength=(0.2, 0.9))
    params = transform.make_params(gappy.key, "views/1")
    assert params["curve"].shape == (4, 5)

    def shift(values, one):
        low, way = values.min(), np.ptp(values)
        return low + way * np.interp((values - low) / way, np.linspace(0, 1, 5), one["curve"])

    torch.testing.assert_close(
        transform.apply(gappy, params).image, _reference(gappy, params, shift), atol=1e-5, rtol=0
    )


@settings(max_examples=40, deadline=None)
@given(points=st.integers(3, 12), strength=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_every_curve_rises_from_0_to_1(points, strength, seed):
    keys = torch.tensor([[seed, 0, place, 0, 1] for place in range(8)])
    curve = HistogramShift(control_points=points, strength=strength).make_params(keys, "views/1")["curve"]
    assert (curve.diff(dim=1) > 0).all()
    torch.testing.assert_close(curve[:, [0, -1]], torch.tensor([[0.0, 1.0]]).expand(8, 2))


def test_requantised_channels_keep_few_evenly_spaced_values_near_the_old_ones(gappy):
    transform = Requantise(levels=(4, 12))
    params = transform.make_params(gappy.key, "views/1")
    after = transform.apply(gappy, params).image
    for sample, channel in ((0, 0), (0, 1), (2, 1)):
        inside, levels = gappy.valid[sample, 0], int(params["levels"][sample])
        old, new = gappy.image[sample, channel][inside], after[sample, channel][inside]
        step = float(old.max() - old.min()) / (levels - 1)
        assert 4 <= levels <= 12
        assert levels - 1 <= len(np.unique(np.round((new / step).numpy(), 3))) <= levels + 1
        assert float((new - old).abs().max()) <= step / 2 + 1e-5
        away = (new - new.min()) / step
        torch.testing.assert_close(away, away.round(), atol=1e-3, rtol=0)


def test_requantising_overwrites_the_step_of_a_scanner(make_view):
    """Two scans with one quantisation step no longer share their values."""
    view = make_view((16, 16, 16), count=2)
    view = view._replace(image=(view.image * 37).round() / 37)
    after = _apply(Requantise(levels=(16, 32)), view).image.flatten(1).numpy()
    before = view.image.flatten(1).numpy()
    assert np.isin(before[0], before[1]).mean() > 0.9
    assert np.isin(after[0].round(5), after[1].round(5)).mean() < 0.1


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (GaussianNoise, {"std": -0.1}, "std"),
        (GaussianNoise, {"std": (0.2, 0.1)}, "std"),
        (GaussianNoise, {"std": (0.1, 0.2, 0.3)}, "std"),
        (GaussianNoise, {"std": "0.1"}, "std"),
        (GaussianNoise, {"std": None}, "std"),
        (GaussianNoise, {"std": True}, "std"),
        (GaussianNoise, {"probability": 1.5}, "probability"),
        (GaussianNoise, {"probability": -0.1}, "probability"),
        (GaussianBlur, {"sigma": (-1, 1)}, "sigma"),
        (GaussianBlur, {"sigma": float("inf")}, "sigma"),
        (Gamma, {"gamma": 0}, "gamma"),
        (Gamma, {"gamma": (1.5, 0.7)}, "gamma"),
        (ContrastBrightness, {"contrast": (-1, 1)}, "contrast"),
        (ContrastBrightness, {"brightness": (1, -1)}, "brightness"),
        (Requantise, {"levels": 1}, "levels"),
        (HistogramShift, {"control_points": 2}, "control_points"),
        (HistogramShift, {"control_points": 4.0}, "control_points"),
        (HistogramShift, {"strength": 1.0}, "strength|order of values"),
        (HistogramShift, {"strength": -0.1}, "strength"),
        (CutOut, {"holes": 0}, "holes"),
        (CutOut, {"size": (0.1, 1.1)}, "size"),
        (CutOut, {"size": -3, "unit": "mm"}, "size"),
        (CutOut, {"unit": "voxels"}, "unit"),
        (CutOut, {"fill": "zeros"}, "fill"),
        (CutOut, {"fill": (0.0, 1.0)}, "fill"),
        (CutOut, {"fill": float("nan")}, "fill"),
    ],
)
def test_an_unusable_setting_is_refused_by_name(kind, settings, named):
    with pytest.raises(ConfigError, match=named) as caught:
        kind(**settings)
    assert caught.value.wanted
    assert caught.value.fix


def test_a_list_from_a_configuration_is_as_good_as_a_pair():
    assert GaussianNoise(std=[0, 0.2]).std == (0.0, 0.2)
