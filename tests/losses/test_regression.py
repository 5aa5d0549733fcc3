from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medclr.errors import ConfigError
from medclr.losses import regression_loss


def pair(count: int = 6, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randn(2, count, width, generator=generator)
    return drawn[0].clone().requires_grad_(), drawn[1].clone().requires_grad_()


def test_it_is_0_where_they_agree_2_where_they_are_square_and_4_where_they_are_opposite() -> None:
    z = torch.eye(3)
    assert float(regression_loss(z * 7, z)) == pytest.approx(0)
    assert float(regression_loss(z, z.roll(1, 0) * 0.1)) == pytest.approx(2)
    assert float(regression_loss(z, -z)) == pytest.approx(4)


def test_no_gradient_reaches_the_targets() -> None:
    predictions, targets = pair()
    regression_loss(predictions, targets).backward()
    assert predictions.grad is not None
    assert predictions.grad.abs().max() > 0
    assert targets.grad is None


def test_the_length_of_either_side_does_not_matter() -> None:
    predictions, targets = pair()
    scaled = regression_loss(predictions * 100, targets * 0.01)
    torch.testing.assert_close(scaled, regression_loss(predictions, targets))


def test_permuting_the_samples_permutes_the_gradient() -> None:
    predictions, targets = pair()
    order = torch.randperm(6)
    moved = predictions.detach()[order].requires_grad_()
    losses = regression_loss(predictions, targets), regression_loss(moved, targets[order])
    torch.testing.assert_close(*losses)
    gradients = torch.autograd.grad(losses[0], predictions)[0], torch.autograd.grad(losses[1], moved)[0]
    torch.testing.assert_close(gradients[0][order], gradients[1])


def test_a_row_of_zeros_is_finite() -> None:
    predictions, targets = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    loss = regression_loss(predictions, targets)
    loss.backward()
    assert float(loss.detach()) == 2
    assert predictions.grad is not None
    assert predictions.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_fp32_under_autocast(dtype: torch.dtype) -> None:
    predictions, targets = (side.detach().to(dtype).requires_grad_() for side in pair())
    with torch.autocast("cpu", torch.bfloat16):
        loss = regression_loss(predictions, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, regression_loss(predictions.float(), targets.float()))
    assert predictions.grad is not None
    assert predictions.grad.dtype == dtype
    assert predictions.grad.isfinite().all()


@pytest.mark.parametrize(
    ("one", "other"),
    [((3, 4), (4, 4)), ((3, 4), (3, 5)), ((4,), (4,)), ((2, 3, 4), (2, 3, 4)), ((0, 4), (0, 4)), ((3, 1), (3, 4))],
)
def test_sides_that_do_not_match_are_refused(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="Predictions and targets"):
        regression_loss(torch.zeros(one), torch.zeros(other))
