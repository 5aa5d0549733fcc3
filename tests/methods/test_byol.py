from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from medclr import keys
from medclr.errors import ConfigError
from medclr.methods import BYOL
from medclr.models import MomentumCopy, Projector
from tests.methods.builders import WIDTH, meta_of, method_of, tiny_encoder, views_of


def embeddings_of(predictions: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"predictions": predictions, "targets": targets}


def test_each_view_predicts_the_target_of_the_other() -> None:
    torch.manual_seed(0)
    predictions, targets = torch.randn(2, 5, 2, WIDTH).unbind()
    result = method_of("BYOL").contrast(embeddings_of(predictions, targets), meta_of([0] * 5))
    expected = []
    for sample in range(5):
        for view in range(2):
            p, z = normalize(predictions[sample, view], dim=0), normalize(targets[sample, 1 - view], dim=0)
            expected.append(float((p - z).square().sum()))
    assert float(result[keys.LOSS]) == pytest.approx(sum(expected) / 10, rel=1e-5)


def test_the_plateau_is_the_loss_of_unrelated_directions_and_a_collapse_lies_below_it() -> None:
    torch.manual_seed(0)
    method = method_of("BYOL")
    unrelated = method.contrast(embeddings_of(*torch.randn(2, 2000, 2, 64).unbind()), {})
    assert float(unrelated[keys.LOSS]) == pytest.approx(float(unrelated[keys.PLATEAU]), abs=0.02)
    point = torch.ones(4, 2, 64)
    collapsed = method.contrast(embeddings_of(point, point), {})
    assert float(collapsed[keys.LOSS]) == pytest.approx(0.0, abs=1e-6)
    assert float(collapsed[keys.PLATEAU]) == 2.0


def test_no_gradient_reaches_the_target() -> None:
    method = method_of("BYOL")
    embeddings = method(*views_of(3))
    assert not embeddings["targets"].requires_grad
    leaves = {name: value.detach().requires_grad_() for name, value in embeddings.items()}
    method.contrast(leaves, {})[keys.LOSS].backward()
    assert [name for name, value in leaves.items() if value.grad is not None] == ["predictions"]
    method.contrast(embeddings, {})[keys.LOSS].backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())
    assert all(p.grad is None for copy in (method.target_encoder, method.target_projector) for p in copy.parameters())


def test_embeddings_have_one_row_a_sample_and_two_views() -> None:
    method = method_of("BYOL")
    result = method(*views_of(3))
    assert {name: tuple(value.shape) for name, value in result.items()} == {
        keys.FEATURES: (3, 2, method.encoder.out_features),
        keys.PROJECTIONS: (3, 2, WIDTH),
        "predictions": (3, 2, WIDTH),
        "targets": (3, 2, WIDTH),
    }
    # Before the first step the target is the online network.
    torch.testing.assert_close(result["targets"], result[keys.PROJECTIONS].detach())


def test_the_default_heads_fit() -> None:
    method = BYOL(tiny_encoder())
    assert method(*views_of(2))["predictions"].shape == (2, 2, method.projector.out_features)


def test_the_target_follows_the_online_network() -> None:
    method = method_of("BYOL", momentum=0.9)
    before = method.target_encoder.copy.convInit.conv.weight.clone()
    with torch.no_grad():
        method.encoder.convInit.conv.weight.add_(1.0)
    method.after_step(0.25)
    momentum = 1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2
    torch.testing.assert_close(method.target_encoder.copy.convInit.conv.weight, before + (1 - momentum))


@pytest.mark.parametrize(
    ("heads", "problem"),
    [
        ({"projector": Projector(17)}, "projector does not fit"),
        ({"predictor": Projector(17, out_features=128)}, "predictor does not fit"),
        ({"predictor": Projector(128, out_features=64)}, "predictor does not fit"),
    ],
)
def test_heads_that_do_not_fit_are_refused_at_construction(heads: dict[str, Projector], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        BYOL(tiny_encoder(), **heads)


def test_a_momentum_that_is_none_is_refused_at_construction() -> None:
    with pytest.raises(ConfigError, match="momentum"):
        method_of("BYOL", momentum=1.5)


@pytest.mark.parametrize("kind", ["BYOL", "MoCo v2", "MoCo v3"])
def test_weights_that_were_loaded_before_the_run_are_in_both_copies_at_its_first_step(kind: str) -> None:
    method = method_of(kind)
    copies = [copy for copy in method.children() if isinstance(copy, MomentumCopy)]
    assert len(copies) == 2
    with torch.no_grad():
        for parameter in (*method.encoder.parameters(), *method.projector.parameters()):
            parameter.add_(1.0)
    method.before_step(0.0)
    for network, copy in zip((method.encoder, method.projector), copies, strict=True):
        for own, its in zip(network.parameters(), copy.copy.parameters(), strict=True):
            assert torch.equal(own, its)
