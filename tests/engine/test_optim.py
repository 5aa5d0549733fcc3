from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SegResNet
from torch import nn

from medclr.engine import decay_groups
from medclr.errors import ConfigError
from medclr.methods import SimCLR
from medclr.models import Encoder, Projector


def method() -> SimCLR:
    encoder = Encoder(SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), norm="instance"))
    return SimCLR(encoder, Projector(encoder.out_features, out_features=8, norm="layer"))


def test_weights_decay_and_norms_and_biases_do_not() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.GroupNorm(1, 2), nn.Linear(2, 3), nn.BatchNorm1d(3))
    decayed, exempt = decay_groups(network, 0.01)
    assert decayed["weight_decay"] == 0.01
    assert exempt["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(network[0].weight), id(network[2].weight)]
    others = [network[0].bias, network[1].weight, network[1].bias, network[2].bias, network[3].weight, network[3].bias]
    assert [id(p) for p in exempt["params"]] == [id(p) for p in others]


def test_every_trained_parameter_of_a_method_is_in_one_group() -> None:
    network = method()
    grouped = [id(p) for group in decay_groups(network, 0.01) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())
    assert len(grouped) == len(set(grouped))


def test_parameters_without_gradient_are_left_out() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    decayed, exempt = decay_groups(network, 0.01)
    assert [id(p) for p in decayed["params"]] == [id(network[1].weight)]
    assert [id(p) for p in exempt["params"]] == [id(network[1].bias)]


def test_a_shared_parameter_is_there_once() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    assert [len(group["params"]) for group in decay_groups(network, 0.01)] == [1, 2]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_shrinks_the_weights_alone(optimizer: type[torch.optim.Optimizer]) -> None:
    network = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    step = optimizer(decay_groups(network, 0.5), lr=0.1)  # type: ignore[call-arg]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.step()
    torch.testing.assert_close(network.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(network.bias, before["bias"])


@pytest.mark.parametrize("network", [nn.GroupNorm(1, 2), nn.Linear(2, 2, bias=False)], ids=lambda n: type(n).__name__)
def test_a_network_with_one_kind_of_parameter_can_be_trained(network: nn.Module) -> None:
    optimizer = torch.optim.AdamW(decay_groups(network, 0.01), lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


def test_no_decay_at_all_is_fine() -> None:
    assert [group["weight_decay"] for group in decay_groups(nn.Linear(2, 2), 0.0)] == [0.0, 0.0]


@pytest.mark.parametrize("weight_decay", [-1e-4, float("nan"), float("inf")])
def test_an_unusable_decay_is_refused(weight_decay: float) -> None:
    with pytest.raises(ConfigError, match="weight decay"):
        decay_groups(nn.Linear(2, 2), weight_decay)
