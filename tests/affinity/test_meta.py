from __future__ import annotations

import pytest
import torch

from medclr.affinity import VIEW, of_views
from medclr.errors import ConfigError


@pytest.mark.parametrize("views", [1, 2, 3])
def test_metadata_follows_the_order_of_flattened_embeddings(views: int) -> None:
    sample, scan = torch.tensor([5, 6, 8]), torch.arange(3 * views).reshape(3, views)
    age = torch.tensor([40.0, torch.nan, 50.5], dtype=torch.float64)
    embeddings = torch.stack([sample[:, None].expand(3, views), scan], dim=2).flatten(0, 1)
    flat = of_views({"sample": sample, "scan": scan, "age": age}, views)
    assert set(flat) == {"sample", "scan", "age", VIEW}
    assert torch.equal(flat["sample"], embeddings[:, 0])
    assert torch.equal(flat["scan"], embeddings[:, 1])
    assert flat[VIEW].tolist() == list(range(views)) * 3
    assert flat["age"].dtype == torch.float64
    assert flat["age"][0] == flat["age"][views - 1] == 40.0
    assert flat["age"][views : 2 * views].isnan().all()


@pytest.mark.parametrize("shape", [(3, 3), (3, 1), (3, 2, 1), ()])
def test_an_entry_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="does not fit the views") as caught:
        of_views({"sample": torch.zeros(3), "scan": torch.zeros(shape)}, 2)
    assert f"scan {shape}" in str(caught.value)
