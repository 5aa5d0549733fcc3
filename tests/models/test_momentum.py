from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medclr.engine import decay_groups
from medclr.errors import ConfigError
from medclr.models import MomentumCopy

PROGRESS = (0.25, 0.5, 0.75, 1.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def move(module: nn.Module, seed: int) -> None:
    """What an optimizer step does, as far as a copy is concerned; a batch has passed as well."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random))
    module.train()(torch.randn(5, 3, generator=random))


@pytest.mark.parametrize("cosine", [True, False])
def test_the_copy_moves_as_the_formula_says(cosine: bool) -> None:
    online = network()
    copy = MomentumCopy(online, 0.9, cosine=cosine)
    expected = {name: value.detach().double().numpy().copy() for name, value in online.named_parameters()}
    for step, progress in enumerate(PROGRESS):
        move(online, step)
        copy.after_step(progress)
        momentum = 1 - (1 - 0.9) * (np.cos(np.pi * progress) + 1) / 2 if cosine else 0.9
        for name, value in online.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * value.detach().double().numpy()
        for name, value in copy.copy.named_parameters():
            np.testing.assert_allclose(value.double().numpy(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("momentum", "progress", "expected"), [(0.99, 0.0, 0.99), (0.99, 0.5, 0.995), (0.9, 1.0, 1.0)])
def test_the_momentum_grows_to_one_on_a_cosine(momentum: float, progress: float, expected: float) -> None:
    assert MomentumCopy(network(), momentum).momentum_at(progress) == pytest.approx(expected, abs=1e-12)
    assert MomentumCopy(network(), momentum, cosine=False).momentum_at(progress) == momentum


def test_running_statistics_are_those_of_the_network() -> None:
    online = network()
    copy = MomentumCopy(online, 0.999)
    move(online, 1)
    assert not torch.equal(copy.copy[1].running_mean, online[1].running_mean)
    copy.after_step(0.5)
    for name, value in online.named_buffers():
        assert torch.equal(dict(copy.copy.named_buffers())[name], value), name


def test_the_copy_starts_from_weights_that_are_loaded_into_the_network_later() -> None:
    online = network()
    copy = MomentumCopy(online, 0.999)
    move(online, 1)
    copy.before_step(0.1)
    assert not torch.equal(copy.copy[0].weight, online[0].weight)
    copy.before_step(0.0)
    for name, value in online.state_dict().items():
        assert torch.equal(copy.copy.state_dict()[name], value), name


def test_the_copy_has_no_gradient_and_no_place_in_an_optimizer() -> None:
    holder = nn.Module()
    holder.online = network()
    holder.copied = MomentumCopy(holder.online)
    assert not holder.copied(torch.randn(4, 3, requires_grad=True)).requires_grad
    grouped = {id(p) for group in decay_groups(holder, 0.1) for p in group["params"]}
    assert grouped == {id(p) for p in holder.online.parameters()}


def test_the_copy_is_in_the_state_dict_and_the_network_is_not_there_twice() -> None:
    online = network()
    copy = MomentumCopy(online, 0.5)
    assert set(copy.state_dict()) == {f"copy.{name}" for name in online.state_dict()}
    move(online, 1)
    copy.after_step(0.1)
    other = MomentumCopy(network(), 0.5)
    other.load_state_dict(copy.state_dict())
    for name, value in copy.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("momentum", [-0.1, 1.001, float("nan"), "fast", True])
def test_a_momentum_outside_zero_to_one_is_refused(momentum: object) -> None:
    with pytest.raises(ConfigError, match="momentum"):
        MomentumCopy(network(), momentum)  # type: ignore[arg-type]
