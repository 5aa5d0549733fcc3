from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, layer_norm, relu

from medclr.errors import ConfigError
from medclr.models import Projector

NORMS = ["batch", "layer", "none"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("last_norm", [False, True])
def test_every_shape_trains(norm: str, layers: int, last_norm: bool) -> None:
    head = Projector(6, 10, 4, layers=layers, norm=norm, last_norm=last_norm)
    z = head(torch.randn(8, 6))
    assert z.shape == (8, 4)
    assert (head.in_features, head.out_features) == (6, 4)
    (z * torch.randn(8, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert sum(isinstance(module, nn.Linear) for module in head.modules()) == layers


def test_the_default_is_simclrs_head_by_hand() -> None:
    head = Projector(6, out_features=4)
    x = torch.randn(8, 6)
    linear, norm, _, last = head.layers
    hidden = batch_norm(x @ linear.weight.T, None, None, norm.weight, norm.bias, training=True)
    assert linear.bias is None
    assert linear.weight.shape == (6, 6)
    torch.testing.assert_close(head(x), relu(hidden) @ last.weight.T + last.bias)


def test_a_layer_norm_head_by_hand() -> None:
    head = Projector(6, 10, 4, norm="layer", last_norm=True)
    x = torch.randn(8, 6)
    linear, norm, _, last, _ = head.layers
    hidden = layer_norm(x @ linear.weight.T + linear.bias, (10,), norm.weight, norm.bias)
    expected = layer_norm(relu(hidden) @ last.weight.T + last.bias, (4,))
    torch.testing.assert_close(head(x), expected)


def test_a_last_batch_norm_standardises_every_dimension() -> None:
    z = Projector(6, 32, 4, layers=3, last_norm=True)(torch.randn(64, 6))
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, unbiased=False), torch.ones(4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_a_sample_is_projected_by_itself_without_batch_norm(norm: str) -> None:
    head, x = Projector(6, norm=norm), torch.randn(8, 6)
    torch.testing.assert_close(head(x)[:1], head(x[:1]))


@pytest.mark.parametrize("norm", NORMS)
def test_bf16_works_under_autocast_and_as_weights(norm: str) -> None:
    head, x = Projector(6, norm=norm), torch.randn(8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = head(x)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), head(x), atol=0.05, rtol=0.05)
    assert head.bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("change", [{"in_features": 0}, {"hidden": -1}, {"out_features": 1.5}, {"layers": 0}])
def test_sizes_below_one_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Projector(**{"in_features": 4, **change})


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch, layer, none"):
        Projector(4, norm="instance")


def test_batch_norm_refuses_to_train_on_one_sample_but_not_to_infer() -> None:
    head = Projector(4)
    with pytest.raises(ConfigError, match="single sample"):
        head(torch.zeros(1, 4))
    assert head.eval()(torch.zeros(1, 4)).shape == (1, 128)
    assert Projector(4, layers=1)(torch.zeros(1, 4)).shape == (1, 128)
