from __future__ import annotations

import numpy as np
import pytest
import torch

from medclr.views import CutOut

SHAPE = (12, 14, 10)


def _apply(transform, view):
    params = transform.make_params(view.key, "views/1")
    return transform.apply(view, params).image, params


@pytest.mark.parametrize(
    ("unit", "size", "spacing"),
    [
        ("fraction", (0.2, 0.6), (1.0, 1.0, 1.0)),
        ("mm", (3.0, 9.0), (1.0, 1.0, 1.0)),
        ("mm", (3.0, 9.0), (0.7, 0.7, 5.0)),
    ],
)
def test_boxes_lie_where_they_were_drawn(make_view, unit, size, spacing):
    view = make_view(SHAPE, channels=2, spacing=spacing)
    got, params = _apply(CutOut(holes=3, size=size, unit=unit, fill=-1), view)
    assert float(params["size"].min()) >= size[0]
    assert float(params["size"].max()) <= size[1]
    for sample in range(4):
        hidden = np.zeros(SHAPE, dtype=bool)
        for hole in range(3):
            centre = params["centre"][sample, hole].double().numpy() * SHAPE - 0.5
            side = params["size"][sample, hole].double().numpy()
            side = side * SHAPE if unit == "fraction" else side / np.array(spacing)
            for index in np.ndindex(*SHAPE):
                hidden[index] |= bool((np.abs(np.array(index) - centre) < side / 2).all())
        wanted = torch.where(torch.from_numpy(hidden), -1.0, view.image[sample])
        assert torch.equal(got[sample], wanted)
        assert 0 < hidden.mean() < 1


def test_a_box_of_the_whole_view_hides_all_that_its_centre_lets_it(make_view):
    view = make_view(SHAPE, count=32)
    got, params = _apply(CutOut(size=1.0, fill=-1), view)
    hidden = (got == -1).flatten(1).double().mean(dim=1)
    wanted = (1 - (params["centre"][:, 0].double() - 0.5).abs()).prod(dim=1)
    torch.testing.assert_close(hidden, wanted, atol=0.15, rtol=0)


def test_the_mean_is_that_of_the_voxels_inside_the_scan(make_view):
    view = make_view(SHAPE, channels=2, outside=5)
    got = _apply(CutOut(size=0.8, fill="mean"), view)[0]
    for sample in range(4):
        inside = view.valid[sample, 0]
        for channel in range(2):
            old, new = view.image[sample, channel][inside], got[sample, channel][inside]
            filled = new[new != old]
            torch.testing.assert_close(filled, old.mean().expand_as(filled), atol=1e-5, rtol=0)
            assert len(filled)


def test_noise_has_the_mean_and_spread_of_the_scan(make_view):
    view = make_view((32, 32, 32), count=2, outside=8)
    view = view._replace(image=(view.image * 3 + 2) * view.valid)
    got = _apply(CutOut(holes=3, size=0.9, fill="noise"), view)[0]
    for sample in range(2):
        old = view.image[sample][view.valid[sample]]
        new = got[sample][got[sample] != view.image[sample]]
        assert len(new) > 3000
        assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.08)
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.06)


def test_centres_are_even_over_the_view(make_keys):
    centre = CutOut().make_params(make_keys(4000), "views/1")["centre"].flatten().double()
    counts = torch.histc(centre, 10, 0, 1)
    assert float((counts / 1200 - 1).abs().max()) < 0.12
