from __future__ import annotations

import math

import pytest
import torch

from medclr import keys
from medclr.affinity import Affinity
from medclr.errors import ConfigError
from medclr.losses import NTXentLoss
from medclr.methods import SimCLR
from medclr.models import Projector
from tests.methods.builders import meta_of, method_of, tiny_encoder, view_of, views_of


def embeddings_of(z_1: torch.Tensor, z_2: torch.Tensor) -> dict[str, torch.Tensor]:
    return {keys.PROJECTIONS: torch.stack([z_1, z_2], dim=1)}


def test_with_one_sample_a_patient_the_loss_is_nt_xent() -> None:
    z_1, z_2 = torch.randn(2, 9, 16).unbind()
    method = SimCLR(tiny_encoder(), temperature=0.2)
    loss = method.contrast(embeddings_of(z_1, z_2), meta_of(list(range(9))))[keys.LOSS]
    torch.testing.assert_close(loss, NTXentLoss(0.2)(z_1, z_2))


def test_two_samples_of_one_patient_do_not_repel_each_other() -> None:
    torch.manual_seed(0)
    z_1, z_2 = torch.randn(2, 4, 16).unbind()
    z_1.requires_grad_(True)
    method = SimCLR(tiny_encoder())
    results = {}
    for same_patient in ("ignored", "negative"):
        method.affinity = Affinity(same_patient=same_patient)
        # The last sample shares its patient with the first: does the first sample's loss pull or push it?
        results[same_patient] = method.contrast(embeddings_of(z_1, z_2), meta_of([0, 1, 2, 0]))[keys.LOSS]
    alone = SimCLR(tiny_encoder()).contrast(embeddings_of(z_1, z_2), meta_of([0, 1, 2, 3]))[keys.LOSS]
    torch.testing.assert_close(results["negative"], alone)
    assert results["ignored"] < results["negative"], "fewer candidates in the denominator"


def test_the_plateau_is_the_loss_of_equal_embeddings() -> None:
    z = torch.ones(5, 16)
    result = SimCLR(tiny_encoder()).contrast(embeddings_of(z, z), meta_of(list(range(5))))
    assert float(result["plateau"]) == pytest.approx(math.log(9))
    torch.testing.assert_close(result[keys.LOSS], result["plateau"])


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_an_embedding_depends_on_its_own_sample_alone(norm: str) -> None:
    encoder = tiny_encoder()
    method = SimCLR(encoder, Projector(encoder.out_features, out_features=8, norm=norm)).train()
    images = torch.rand(2, 3, 1, 8, 8, 8)
    together = method(view_of(images[0]), view_of(images[1]))
    for place in range(3):
        alone = method(view_of(images[0, place : place + 1]), view_of(images[1, place : place + 1]))
        for name, value in together.items():
            torch.testing.assert_close(alone[name][0], value[place], rtol=1e-4, atol=1e-5)


def test_embeddings_have_one_row_a_sample_and_two_views() -> None:
    encoder = tiny_encoder()
    method = SimCLR(encoder, Projector(encoder.out_features, out_features=8))
    result = method(view_of(torch.rand(3, 1, 8, 8, 8)), view_of(torch.rand(3, 1, 8, 8, 8)))
    assert result[keys.FEATURES].shape == (3, 2, encoder.out_features)
    assert result[keys.PROJECTIONS].shape == (3, 2, 8)


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), float("inf")])
def test_an_unusable_temperature_is_refused_at_construction(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        SimCLR(tiny_encoder(), temperature=temperature)


def test_a_projector_of_another_width_is_refused_at_construction() -> None:
    with pytest.raises(ConfigError, match="projector"):
        SimCLR(tiny_encoder(), Projector(17))


@pytest.mark.parametrize("kind", ["SimCLR", "MoCo v3"])
def test_a_batch_of_one_sample_is_refused(kind: str) -> None:
    method = method_of(kind)
    with pytest.raises(ConfigError, match=r"one patient.*\n.*one sample"):
        method.contrast(method(*views_of(1)), meta_of([4]))
    assert method.contrast(method(*views_of(3)), meta_of([4, 4, 5]))[keys.LOSS] > 0
    by_chance = method.contrast(method(*views_of(3)), meta_of([4, 4, 4]))[keys.LOSS]
    assert float(by_chance) == 0.0, "one patient, whose only candidates are positives"


@pytest.mark.parametrize("kind", ["BYOL", "MoCo v2"])
def test_one_sample_is_enough_without_negatives_or_with_a_queue(kind: str) -> None:
    method = method_of(kind)
    assert method.contrast(method(*views_of(1)), meta_of([4]))[keys.LOSS].isfinite()
