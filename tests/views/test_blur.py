from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medclr.views import GaussianBlur


def _blurred(view, sigma):
    transform = GaussianBlur(sigma=sigma)
    params = transform.make_params(view.key, "views/1")
    return transform.apply(view, params).image, params


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (2.0, 0.5, 1.0)])
@pytest.mark.parametrize("outside", [0, 4])
def test_a_blur_equals_scipys_normalised_by_what_is_inside_the_scan(make_view, spacing, outside):
    view = make_view((16, 15, 12), channels=2, spacing=spacing, outside=outside)
    # Samples inside and partly outside the scan, in one batch.
    view.valid[0] = True
    got, params = _blurred(view, (0.3, 2.0))
    for sample in range(4):
        sigma = params["sigma"][sample].double().numpy() / np.array(spacing)
        inside = view.valid[sample, 0].double().numpy()
        weights = np.maximum(gaussian_filter(inside, sigma, mode="constant"), 1e-9)
        for channel in range(2):
            values = view.image[sample, channel].double().numpy()
            wanted = gaussian_filter(values, sigma, mode="constant") / weights * inside
            np.testing.assert_allclose(got[sample, channel], wanted, atol=2e-5)


def test_a_blur_is_as_wide_in_millimetres_along_every_axis(make_view):
    view = make_view((41, 41, 21), count=1, spacing=(0.5, 0.5, 1.0))
    view.image.zero_()
    view.image[0, 0, 20, 20, 10] = 1.0
    blurred = _blurred(view, 1.5)[0][0, 0].double()
    for axis, spacing in enumerate((0.5, 0.5, 1.0)):
        others = [a for a in range(3) if a != axis]
        profile = blurred.sum(dim=others)
        place = (torch.arange(len(profile)) - len(profile) // 2) * spacing
        assert float((profile * place**2).sum().sqrt()) == pytest.approx(1.5, rel=0.02)


def test_a_constant_scan_stays_constant_up_to_its_rim(make_view):
    view = make_view(outside=5)
    view = view._replace(image=0.7 * view.valid.float())
    torch.testing.assert_close(_blurred(view, 3.0)[0], view.image, atol=1e-5, rtol=0)


def test_every_sample_has_its_own_width(make_view):
    view = make_view(count=16)
    blurred, params = _blurred(view, (0.2, 3.0))
    left = blurred.flatten(1).std(dim=1)
    order = params["sigma"][:, 0].argsort()
    assert params["sigma"].unique().numel() == 16
    assert float(np.corrcoef(left[order], np.arange(16))[0, 1]) < -0.7
