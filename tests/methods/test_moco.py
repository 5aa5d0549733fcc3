from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from medclr import keys
from medclr.affinity import Affinity, Gaussian
from medclr.errors import ConfigError
from medclr.methods import MoCo
from medclr.models import Projector
from tests.methods.builders import WIDTH, meta_of, method_of, tiny_encoder, views_of


def projections(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {keys.PROJECTIONS: torch.randn(count, 2, WIDTH, generator=torch.Generator().manual_seed(seed))}


def step(method: Any, embeddings: dict[str, Tensor], meta: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the trainer calls, without the optimizer."""
    method.before_step(0.5)
    result: dict[str, Tensor] = method.contrast(embeddings, meta)
    method.after_step(0.5)
    return result


def plain_v2(embeddings: dict[str, Tensor], queue: Tensor, own: list[list[int]], temperature: float) -> Tensor:
    """Algorithm 1 of arXiv:1911.05722; ``own`` are the places of the queue that are of the query's patient."""
    q, k = (normalize(embeddings[keys.PROJECTIONS][:, view], dim=1) for view in (0, 1))
    negatives = q @ queue.T
    for row, places in enumerate(own):
        negatives[row, places] = -torch.inf
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), negatives], dim=1) / temperature
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def test_v2_contrasts_a_query_with_its_key_and_the_old_queue_alone() -> None:
    method = method_of("MoCo v2", temperature=0.3)
    first, second = projections(3, 1), projections(3, 2)
    assert float(step(method, first, meta_of([0, 1, 2]))[keys.LOSS]) == 0.0, "an empty queue, and no other keys"
    result = step(method, second, meta_of([3, 4, 5]))
    queue = normalize(first[keys.PROJECTIONS][:, 1], dim=1)
    torch.testing.assert_close(result[keys.LOSS], plain_v2(second, queue, [[], [], []], 0.3))
    assert float(result[keys.PLATEAU]) == pytest.approx(math.log(4))


def test_v2_ignores_the_querys_own_patient_in_the_queue() -> None:
    method = method_of("MoCo v2")
    first, second = projections(3, 1), projections(3, 2)
    queue = normalize(first[keys.PROJECTIONS][:, 1], dim=1)
    step(method, first, meta_of([0, 1, 2]))
    # The next epoch: the numbers of samples are the same again.
    result = step(method, second, meta_of([0, 7, 2]))
    torch.testing.assert_close(result[keys.LOSS], plain_v2(second, queue, [[0], [], [2]], 0.2))


@pytest.mark.parametrize("same_patient", ["positive", "negative"])
def test_v2_weighs_the_querys_own_patient_in_the_queue_by_the_affinity(same_patient: Any) -> None:
    method = method_of("MoCo v2", affinity=Affinity(same_patient=same_patient))
    first, second = projections(2, 1), projections(2, 2)
    step(method, first, meta_of([0, 1]))
    loss = step(method, second, meta_of([0, 5]))[keys.LOSS]
    q, k = (normalize(second[keys.PROJECTIONS][:, view], dim=1) for view in (0, 1))
    queue = normalize(first[keys.PROJECTIONS][:, 1], dim=1)
    logs = (torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / 0.2).log_softmax(dim=1)
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]) if same_patient == "positive" else torch.eye(3)[[0, 0]]
    torch.testing.assert_close(loss, -(weights * logs).sum(dim=1).mean())


def test_v2_keeps_what_a_kernel_reads_beside_the_keys() -> None:
    method = method_of("MoCo v2", affinity=Affinity(kernels=[Gaussian("age", bandwidth=5.0)]))
    first, second = projections(2, 1), projections(2, 2)
    step(method, first, {**meta_of([0, 1]), "age": torch.tensor([40.0, float("nan")])})
    loss = step(method, second, {**meta_of([2, 3]), "age": torch.tensor([45.0, 60.0])})[keys.LOSS]
    q, k = (normalize(second[keys.PROJECTIONS][:, view], dim=1) for view in (0, 1))
    queue = normalize(first[keys.PROJECTIONS][:, 1], dim=1)
    logs = (torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / 0.2).log_softmax(dim=1)
    weights = torch.tensor([[1.0, math.exp(-0.5), 0.0], [1.0, math.exp(-8.0), 0.0]])
    weights /= weights.sum(dim=1, keepdim=True)
    torch.testing.assert_close(loss, -(weights * logs).sum(dim=1).mean())


def test_v2_keys_have_no_gradient() -> None:
    method = method_of("MoCo v2")
    step(method, projections(3, 1), meta_of([0, 1, 2]))
    leaf = projections(3, 2)[keys.PROJECTIONS].requires_grad_()
    method.contrast({keys.PROJECTIONS: leaf}, meta_of([3, 4, 5]))[keys.LOSS].backward()
    assert leaf.grad is not None
    assert not leaf.grad[:, 1].any()
    assert leaf.grad[:, 0].any(dim=1).all()


def test_v2_in_evaluation_leaves_the_queue_alone() -> None:
    method = method_of("MoCo v2").eval()
    step(method, projections(3), meta_of([0, 1, 2]))
    assert int(method.queue.filled) == 0


def test_v2_embeds_a_query_of_the_first_view_and_a_key_of_the_second() -> None:
    method = method_of("MoCo v2")
    with torch.no_grad():
        method.key_projector.copy.layers[-1].bias.add_(1.0)
    views = views_of(3)
    result = method(*views)
    expected = [
        method.projector(method.encoder(views[0].image)),
        method.key_projector(method.key_encoder(views[1].image)),
    ]
    torch.testing.assert_close(result[keys.PROJECTIONS], torch.stack(expected, dim=1))
    assert result[keys.FEATURES].shape == (3, 2, method.encoder.out_features)
    method.contrast(result, meta_of([0, 1, 2]))[keys.LOSS].backward()
    copies = (method.key_encoder, method.key_projector)
    assert all(p.grad is None for copy in copies for p in copy.parameters())


def test_v3_is_the_mean_of_both_directions_over_the_keys_of_the_batch() -> None:
    method = method_of("MoCo v3", temperature=0.3)
    torch.manual_seed(0)
    predictions, targets = torch.randn(2, 5, 2, WIDTH).unbind()
    result = method.contrast({"predictions": predictions, "targets": targets}, meta_of(list(range(5))))
    losses = []
    for query, key in ((0, 1), (1, 0)):  # ctr(q1, k2) and ctr(q2, k1) of algorithm 1, arXiv:2104.02057
        q, k = normalize(predictions[:, query], dim=1), normalize(targets[:, key], dim=1)
        losses.append(cross_entropy(q @ k.T / 0.3, torch.arange(5)))
    torch.testing.assert_close(result[keys.LOSS], sum(losses) / 2)
    assert float(result[keys.PLATEAU]) == pytest.approx(math.log(5))


def test_v3_ignores_other_samples_of_a_querys_patient() -> None:
    method = method_of("MoCo v3")
    torch.manual_seed(0)
    predictions, targets = torch.randn(2, 3, 2, WIDTH).unbind()
    loss = method.contrast({"predictions": predictions, "targets": targets}, meta_of([0, 1, 0]))[keys.LOSS]
    losses = []
    for query, key in ((0, 1), (1, 0)):
        logits = normalize(predictions[:, query], dim=1) @ normalize(targets[:, key], dim=1).T / 0.2
        logits[0, 2] = logits[2, 0] = -torch.inf
        losses.append(cross_entropy(logits, torch.arange(3)))
    torch.testing.assert_close(loss, sum(losses) / 2)


def test_v3_plateau_is_the_loss_of_equal_embeddings() -> None:
    point = torch.ones(5, 2, WIDTH)
    result = method_of("MoCo v3").contrast({"predictions": point, "targets": point}, meta_of(list(range(5))))
    torch.testing.assert_close(result[keys.LOSS], result[keys.PLATEAU])


def test_v3_embeds_both_views_twice_and_keys_have_no_gradient() -> None:
    method = method_of("MoCo v3")
    result = method(*views_of(3))
    assert result["predictions"].shape == result["targets"].shape == result[keys.PROJECTIONS].shape == (3, 2, WIDTH)
    method.contrast(result, meta_of([0, 1, 2]))[keys.LOSS].backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())


def test_the_papers_momentum_is_the_default() -> None:
    v2, v3 = MoCo(tiny_encoder()), MoCo(tiny_encoder(), queue_size=0)
    assert (v2.key_encoder.momentum_at(0.0), v2.key_encoder.momentum_at(1.0)) == (0.999, 0.999)
    assert v3.key_encoder.momentum_at(0.0) == pytest.approx(0.99)
    assert v3.key_encoder.momentum_at(1.0) == 1.0
    assert v3(*views_of(2))["predictions"].shape == (2, 2, v3.projector.out_features)
    assert v2.temperature == v3.temperature == 0.2


def test_the_queue_is_named_to_ddp_as_what_it_leaves_alone() -> None:
    method = method_of("MoCo v2")
    named = {name for name, _ in method.named_buffers() if name.startswith("queue.")}
    assert set(method._ddp_params_and_buffers_to_ignore) == named
    assert {"queue.embeddings", "queue.pointer", "queue.filled", "queue.meta_patient"} <= named


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"predictor": Projector(128)}, "no predictor"),
        ({"temperature": 0.0}, "temperature"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": 1.1, "queue_size": 0}, "momentum"),
        ({"queue_size": -5}, "queue"),
        ({"projector": Projector(17)}, "projector does not fit"),
        ({"predictor": Projector(64), "queue_size": 0}, "predictor does not fit"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        MoCo(tiny_encoder(), **arguments)


@pytest.mark.parametrize("kind", ["SimCLR", "MoCo v2", "MoCo v3"])
def test_metadata_that_the_affinity_lacks_is_named(kind: str) -> None:
    method = method_of(kind, affinity=Affinity(kernels=[Gaussian("age", bandwidth=5.0)]))
    with pytest.raises(ConfigError, match="metadata") as refused:
        method.contrast(method(*views_of(3)), meta_of([0, 1, 2]))
    assert "'age'" in str(refused.value)


@pytest.mark.parametrize("kind", ["SimCLR", "MoCo v2", "MoCo v3"])
def test_an_affinity_is_given_what_it_needs_and_no_more(kind: str) -> None:
    class Asking(Affinity):
        def pairs(self, query: Any, key: Any) -> Any:
            assert set(query) == set(key) == set(self.needs)
            return super().pairs(query, key)

    method = method_of(kind, affinity=Asking())
    meta = {**meta_of([0, 1, 2]), keys.SCAN: torch.zeros(3, 2, dtype=torch.int64)}
    method.contrast(method(*views_of(3)), meta)
