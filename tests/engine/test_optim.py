from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import SegResNet
from torch import nn

from medclr.engine import LARS, decay_groups
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


def plain_lars(
    weights: list[Any], gradients: list[list[Any]], rates: list[float], *, momentum: float, decay: float, trust: float
) -> list[Any]:
    """Algorithm 1 of arXiv:1708.03888 in NumPy, one number after the other; norms and biases by plain momentum."""
    weights, velocities = [w.copy() for w in weights], [np.zeros_like(w) for w in weights]
    for step, rate in zip(gradients, rates, strict=True):
        for place, gradient in enumerate(step):
            w, update = weights[place], gradient.copy()
            if w.ndim > 1:
                update = gradient + decay * w
                length, steepness = math.sqrt((w**2).sum()), math.sqrt((update**2).sum())
                if length > 0 and steepness > 0:
                    update = update * trust * length / steepness
            velocities[place] = momentum * velocities[place] + update
            weights[place] = w - rate * velocities[place]
    return weights


def test_lars_moves_as_the_algorithm_says_under_a_schedule() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(2, 3)).double()
    nn.init.zeros_(network[3].weight)  # no ratio of norms to be had, in the first step
    weights = [p.detach().numpy().copy() for p in network.parameters()]
    gradients = [
        [np.random.default_rng((step, n)).normal(size=w.shape) for n, w in enumerate(weights)] for step in range(4)
    ]
    gradients[2][0][:] = 0.0
    rates = [0.1, 0.5, 1.0, 0.2]
    optimizer = LARS(decay_groups(network, 0.01), lr=1.0, momentum=0.8, trust=0.02)
    for rate, step in zip(rates, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(network.parameters(), step, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        for parameter, gradient in zip(network.parameters(), step, strict=True):
            assert np.array_equal(parameter.grad.numpy(), gradient), "the gradient is read only"
    expected = plain_lars(weights, gradients, rates, momentum=0.8, decay=0.01, trust=0.02)
    for parameter, value in zip(network.parameters(), expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-10, atol=1e-12)


def test_the_first_lars_step_has_the_length_that_the_weight_allows_whatever_its_gradient() -> None:
    for scale in (1e-3, 1.0, 1e3):
        weight = nn.Parameter(torch.full((2, 2), 3.0))
        weight.grad = torch.full((2, 2), scale)
        LARS([weight], lr=0.5, trust=0.01).step()
        assert float((weight.detach() - 3.0).norm()) == pytest.approx(0.5 * 0.01 * 6.0, rel=1e-4)


def test_lars_neither_adapts_nor_decays_norms_and_biases() -> None:
    bias = nn.Parameter(torch.full((3,), 2.0))
    bias.grad = torch.full((3,), 0.5)
    LARS([bias], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(bias.detach(), torch.full((3,), 2.0 - 0.1 * 0.5))


def test_lars_leaves_parameters_without_a_gradient_alone_and_calls_a_closure() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([weight], lr=0.1)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert optimizer.step() is None
    assert bool((weight == 1.0).all())
    assert not optimizer.state


def test_lars_goes_on_from_its_state() -> None:
    def run(steps: range, optimizer: LARS, weight: nn.Parameter) -> None:
        for step in steps:
            weight.grad = torch.full((2, 2), float(step + 1)) + torch.eye(2)
            optimizer.step()

    whole, first, second = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    run(range(4), LARS([whole], lr=5.0), whole)
    half, rest = LARS([first], lr=5.0), LARS([second], lr=1.0)
    run(range(2), half, first)
    second.data.copy_(first.data)
    rest.load_state_dict(half.state_dict())
    run(range(2, 4), rest, second)
    assert torch.equal(second, whole)


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"lr": math.nan}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1e-4}, {"trust": 0.0}],
)
def test_unusable_settings_of_lars_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="LARS"):
        LARS([nn.Parameter(torch.ones(2, 2))], **{"lr": 0.1, **settings})
