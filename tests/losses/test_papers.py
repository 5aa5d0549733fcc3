"""Each paper's loss is a call of info_nce or regression_loss: held to its formula in NumPy, float64, pair by pair."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from medclr.losses import NTXentLoss, info_nce, regression_loss

Array = NDArray[np.float64]
TEMPERATURES = [0.1, 0.5, 1.0]


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def unit(z: Array) -> Array:
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def rows(z: Tensor) -> Tensor:
    return normalize(z, dim=1)


def cross_entropy(logits: Array, label: int) -> float:
    """Of one row; the largest logit is taken out first."""
    shifted = logits - logits.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[label])


def assert_same(own: Callable[..., Tensor], paper: Callable[..., float], *inputs: Array) -> None:
    """Loss and, by central differences of the paper's formula, the gradient of every input."""
    tensors = [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in inputs]
    loss = own(*tensors)
    assert float(loss.detach()) == pytest.approx(paper(*inputs), rel=1e-5, abs=1e-6)
    step = 1e-5
    for number, gradient in enumerate(torch.autograd.grad(loss, tensors)):
        wanted = np.zeros_like(inputs[number])
        for place in np.ndindex(*wanted.shape):
            moved = [array.copy() for array in inputs]
            for sign in (1, -1):
                moved[number][place] = inputs[number][place] + sign * step
                wanted[place] += sign * paper(*moved) / (2 * step)
        assert np.abs(gradient.double().numpy() - wanted).max() <= 1e-4 * max(np.abs(wanted).max(), 1e-2)


# NT-Xent


def paper_nt_xent(z_1: Array, z_2: Array, temperature: float) -> float:
    """Algorithm 1 of arXiv:2002.05709: views 2k - 1 and 2k interleaved, l(i, j) summed over both orders."""
    z = unit(np.stack([z_1, z_2], axis=1).reshape(-1, z_1.shape[1]))
    n = len(z)

    def loss(i: int, j: int) -> float:
        others = [k for k in range(n) if k != i]
        return cross_entropy(np.array([z[i] @ z[k] for k in others]) / temperature, others.index(j))

    return sum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(n // 2)) / n


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_nt_xent(count: int, temperature: float) -> None:
    z_1, z_2 = drawn(count, 4, seed=1) * 3, drawn(count, 4, seed=2) * 0.5
    assert_same(NTXentLoss(temperature), lambda a, b: paper_nt_xent(a, b, temperature), z_1, z_2)


def test_micle_is_nt_xent_of_two_scans_of_each_patient() -> None:
    """MICLe (arXiv:2101.05224): the positive of a scan's view is a view of another scan of its patient."""
    patients = np.array([0, 1, 2, 3])
    scan_1, scan_2 = drawn(4, 5, seed=1), drawn(4, 5, seed=2)

    def paper(a: Array, b: Array) -> float:
        z, owner = unit(np.concatenate([a, b])), np.concatenate([patients, patients])
        terms = []
        for i in range(len(z)):
            others = [k for k in range(len(z)) if k != i]
            (j,) = (k for k in others if owner[k] == owner[i])
            terms.append(cross_entropy(np.array([z[i] @ z[k] for k in others]) / 0.1, others.index(j)))
        return float(np.mean(terms))

    def by_table(a: Tensor, b: Tensor) -> Tensor:
        z, owner = rows(torch.cat([a, b])), torch.from_numpy(patients).repeat(2)
        itself = torch.eye(len(z), dtype=torch.bool)
        return info_nce(z, z, ((owner[:, None] == owner) & ~itself, itself), 0.1)

    assert_same(by_table, paper, scan_1, scan_2)
    assert_same(NTXentLoss(0.1), paper, scan_1, scan_2)


# MoCo


def paper_moco(q: Array, k: Array, queue: Array, temperature: float) -> float:
    """Algorithm 1 of arXiv:1911.05722: logits [q . k+, q . queue] / t, label 0; the queue is (K, D) here."""
    q, k, queue = unit(q), unit(k), unit(queue)
    logits = [np.concatenate([[q[i] @ k[i]], queue @ q[i]]) / temperature for i in range(len(q))]
    return float(np.mean([cross_entropy(row, 0) for row in logits]))


def moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    number = torch.arange(len(q))
    ignored = torch.zeros(len(q), len(k) + len(queue), dtype=torch.bool)
    ignored[:, : len(k)] = number[:, None] != number  # of this batch's keys, only the query's own is a candidate
    return info_nce(rows(q), rows(torch.cat([k, queue])), (number, ignored), temperature)


@pytest.mark.parametrize("temperature", [0.07, *TEMPERATURES])
def test_moco_with_a_queue(temperature: float) -> None:
    assert_same(
        lambda *z: moco(*z, temperature),
        lambda *z: paper_moco(*z, temperature),
        drawn(4, 5, seed=1), drawn(4, 5, seed=2), drawn(9, 5, seed=3),
    )  # fmt: skip


def paper_ctr(q: Array, k: Array, temperature: float) -> float:
    """Algorithm 1 of arXiv:2104.02057: the batch's keys are the candidates, and the loss is scaled by 2 t."""
    logits = unit(q) @ unit(k).T / temperature
    return 2 * temperature * float(np.mean([cross_entropy(row, i) for i, row in enumerate(logits)]))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_moco_v3_is_two_calls_times_2_t(temperature: float) -> None:
    def own(q_1: Tensor, q_2: Tensor, k_1: Tensor, k_2: Tensor) -> Tensor:
        number = torch.arange(len(q_1))
        calls = [info_nce(rows(q), rows(k), (number, None), temperature) for q, k in ((q_1, k_2), (q_2, k_1))]
        return 2 * temperature * (calls[0] + calls[1])

    def as_one_call(q_1: Tensor, q_2: Tensor, k_1: Tensor, k_2: Tensor) -> Tensor:
        view = torch.arange(2).repeat_interleave(len(q_1))
        other = torch.arange(2 * len(q_1)).roll(len(q_1))
        pairs = (other, view[:, None] == view)
        # The mean over both views' queries is half the sum of the two calls.
        return 4 * temperature * info_nce(rows(torch.cat([q_1, q_2])), rows(torch.cat([k_1, k_2])), pairs, temperature)

    def paper(q_1: Array, q_2: Array, k_1: Array, k_2: Array) -> float:
        return paper_ctr(q_1, k_2, temperature) + paper_ctr(q_2, k_1, temperature)

    inputs = [drawn(3, 4, seed=seed) for seed in range(4)]
    assert_same(own, paper, *inputs)
    assert_same(as_one_call, paper, *inputs)


# Several positives


def test_supervised_contrast_with_the_sum_outside() -> None:
    """Equation 2 of arXiv:2004.11362, averaged over the anchors; an anchor alone in its class has no term."""
    labels = np.array([0, 0, 1, 1, 1, 2])

    def paper(z: Array) -> float:
        z = unit(z)
        terms = []
        for i in range(len(z)):
            others = [a for a in range(len(z)) if a != i]
            logits = np.array([z[i] @ z[a] for a in others]) / 0.1
            positives = [p for p in others if labels[p] == labels[i]]
            if positives:
                terms.append(sum(cross_entropy(logits, others.index(p)) for p in positives) / len(positives))
        return float(np.mean(terms))

    def own(z: Tensor) -> Tensor:
        z, label = rows(z), torch.from_numpy(labels)
        return info_nce(z, z, (label[:, None] == label, torch.arange(len(z))), 0.1)

    assert_same(own, paper, drawn(6, 5))


@pytest.mark.parametrize("sigma", [0.1, 2.0, 30.0])
def test_y_aware_contrast(sigma: float) -> None:
    """arXiv:2106.08808: log-shares of the candidates, weighted by a Gaussian of the ages, each row's sum 1.

    The paper's denominator is a mean over the candidates rather than a sum, which takes a constant off the loss. The
    authors' code divides the columns by their sums; the formula, and this test, the rows.
    """
    ages = np.array([20.0, 24.0, 60.0, 21.0])

    def paper(z_1: Array, z_2: Array) -> float:
        a, b = unit(z_1), unit(z_2)
        n, total = len(a), 0.0
        for i in range(n):
            weights = np.array([np.exp(-((ages[k] - ages[i]) ** 2) / (2 * sigma**2)) for k in range(n)])
            scores = np.array([a[i] @ b[k] for k in range(n)]) / 0.1
            mean = np.mean(np.exp(scores))
            total -= sum(weights[k] / weights.sum() * np.log(np.exp(scores[k]) / mean) for k in range(n))
        return total / n + np.log(n)

    def own(z_1: Tensor, z_2: Tensor) -> Tensor:
        age = torch.from_numpy(ages)
        weights = torch.exp(-((age[:, None] - age) ** 2) / (2 * sigma**2))
        return info_nce(rows(z_1), rows(z_2), (weights, None), 0.1)

    assert_same(own, paper, drawn(4, 5, seed=1), drawn(4, 5, seed=2))


@pytest.mark.parametrize("sigma", [0.01, 2.0, 5.0, 100.0])
def test_y_aware_contrast_over_both_views(sigma: float) -> None:
    """As its authors train with it: all 2N embeddings are queries and candidates, none of itself; a sum over N."""
    ages = np.array([20.0, 24.0, 60.0, 21.0] * 2)

    def paper(z_1: Array, z_2: Array) -> float:
        z = unit(np.concatenate([z_1, z_2]))
        n, total = len(z), 0.0
        for i in range(n):
            others = [k for k in range(n) if k != i]
            weights = {k: np.exp(-((ages[k] - ages[i]) ** 2) / (2 * sigma**2)) for k in others}
            scores = {k: z[i] @ z[k] / 0.1 for k in others}
            shares = {k: scores[k] - np.log(sum(np.exp(scores[j]) for j in others)) for k in others}
            total -= sum(weights[k] / sum(weights.values()) * shares[k] for k in others)
        return total / (n / 2)

    def own(z_1: Tensor, z_2: Tensor) -> Tensor:
        z, age = rows(torch.cat([z_1, z_2])), torch.from_numpy(ages)
        weights = torch.exp(-((age[:, None] - age) ** 2) / (2 * sigma**2))
        return 2 * info_nce(z, z, (weights, torch.eye(len(z), dtype=torch.bool)), 0.1)

    assert_same(own, paper, drawn(4, 5, seed=1), drawn(4, 5, seed=2))


def test_medaug_is_moco_whose_key_is_another_scan_of_the_patient() -> None:
    """arXiv:2102.10663: the positive is drawn among the patient's scans; the loss is MoCo's."""
    scans, other_scans, queue = drawn(4, 5, seed=1), drawn(4, 5, seed=2), drawn(6, 5, seed=3)
    assert_same(lambda *z: moco(*z, 0.2), lambda *z: paper_moco(*z, 0.2), scans, other_scans, queue)


def test_all_of_a_patients_scans_as_positives_are_the_mean_of_medaugs_draws() -> None:
    patients, keys_of = np.array([0, 1, 2]), np.array([0, 0, 0, 1, 1, 2, 3, 3])

    def paper(q: Array, k: Array) -> float:
        q, k = unit(q), unit(k)
        terms = []
        for i, patient in enumerate(patients):
            draws = np.flatnonzero(keys_of == patient)
            terms.append(np.mean([cross_entropy(k @ q[i] / 0.2, int(drawn_scan)) for drawn_scan in draws]))
        return float(np.mean(terms))

    def own(q: Tensor, k: Tensor) -> Tensor:
        same = torch.from_numpy(patients)[:, None] == torch.from_numpy(keys_of)
        return info_nce(rows(q), rows(k), (same, None), 0.2)

    assert_same(own, paper, drawn(3, 5, seed=1), drawn(8, 5, seed=2))


# BYOL


def paper_byol(p: Array, z: Array) -> float:
    """Equation 2 of arXiv:2006.07733, averaged over the batch."""
    terms = [np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2 for a, b in zip(p, z, strict=True)]
    return float(np.mean(terms))


def test_byol() -> None:
    targets = drawn(5, 4, seed=2) * 0.3
    assert_same(
        lambda p: regression_loss(p, torch.from_numpy(targets)), lambda p: paper_byol(p, targets), drawn(5, 4) * 4
    )
