from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from medclr.engine.metrics import (
    EmbeddingMetric,
    alignment,
    bootstrap_interval,
    dimension_std,
    effective_rank,
    embedding_report,
    pair_recall,
    uniformity,
)
from medclr.errors import DatalistError, MedclrError


def table(rows: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


# Alignment and uniformity


def test_alignment_is_0_for_equal_4_for_opposite_and_2_for_orthogonal_directions() -> None:
    z = table(9)
    assert alignment(z, z * 7) == pytest.approx(0, abs=1e-6)
    assert alignment(z, -0.1 * z) == pytest.approx(4, rel=1e-5)
    assert alignment(torch.eye(3), torch.eye(3).roll(1, dims=0)) == pytest.approx(2, rel=1e-6)


def test_alignment_is_the_mean_squared_distance_on_the_sphere() -> None:
    z_1, z_2 = table(8).numpy().astype(float), table(8, seed=1).numpy().astype(float)
    slow = np.mean(
        [
            sum((x / np.linalg.norm(a) - y / np.linalg.norm(b)) ** 2 for x, y in zip(a, b, strict=True))
            for a, b in zip(z_1, z_2, strict=True)
        ]
    )
    assert alignment(torch.from_numpy(z_1), torch.from_numpy(z_2)) == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("t", [1.0, 2.0, 3.0])
def test_uniformity_is_the_log_mean_potential_of_pairs(t: float) -> None:
    z = normalize(table(12).double(), dim=1).numpy()
    potentials = [np.exp(-t * np.sum((z[i] - z[j]) ** 2)) for i in range(12) for j in range(i)]
    assert uniformity(table(12) * 3, t) == pytest.approx(np.log(np.mean(potentials)), rel=1e-5)


def test_uniformity_is_0_when_collapsed_and_lower_the_more_is_spread() -> None:
    collapsed, spread = torch.ones(50, 16), table(50, 16)
    assert uniformity(collapsed) == pytest.approx(0, abs=1e-5)
    assert uniformity(spread) < uniformity(collapsed + 0.3 * spread) < -0.01


# Effective rank and standard deviation


def test_the_effective_rank_of_evenly_used_directions_is_their_number() -> None:
    for width in (2, 5, 8):
        both_ways = torch.cat([torch.eye(width), -torch.eye(width)])
        assert effective_rank(both_ways) == pytest.approx(width, rel=1e-4)
        assert effective_rank(torch.cat([both_ways, torch.zeros(2 * width, 20)], dim=1)) == pytest.approx(
            width, rel=1e-4
        )


def test_the_effective_rank_of_a_line_is_1() -> None:
    line = table(1, 8) * torch.tensor([1.0, -1, 2, -3, 0.5])[:, None]
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6])
def test_collapsed_embeddings_have_rank_1_whatever_their_rounding(noise: float) -> None:
    collapsed = table(1, 128) + noise * table(256, 128, seed=1)
    assert effective_rank(collapsed) == pytest.approx(1, abs=1e-3)
    assert dimension_std(collapsed) < 1e-4


def test_a_small_but_real_spread_is_measured() -> None:
    assert effective_rank(table(1, 16) + 1e-2 * table(400, 16, seed=1)) > 10


def test_the_effective_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    z = table(20, 7) * torch.tensor([5, 3, 2, 1, 0.5, 0.1, 0.01]) + 1
    unit = z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True)
    values = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False)
    share = values / values.sum()
    assert effective_rank(z) == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-4)


def test_the_effective_rank_ignores_a_common_offset_and_the_scale() -> None:
    z = normalize(table(300, 10), dim=1)
    assert effective_rank(z) == pytest.approx(effective_rank(z * 100), rel=1e-4)
    assert effective_rank(table(300, 10)) > 9
    assert 1 <= effective_rank(table(3, 10)) <= 2 + 1e-4  # three points span a plane


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_no_numbers_give_nan_and_no_crash(value: float) -> None:
    z = table(8)
    z[3, 2] = value
    assert math.isnan(effective_rank(z))
    assert math.isnan(dimension_std(z))
    assert math.isnan(uniformity(z))


def test_the_standard_deviation_is_1_when_spread_evenly_and_0_when_collapsed() -> None:
    assert dimension_std(table(5000, 32)) == pytest.approx(1, abs=0.02)
    assert dimension_std(torch.ones(50, 32)) == pytest.approx(0, abs=1e-5)
    z = normalize(table(30).double(), dim=1).numpy()
    assert dimension_std(table(30)) == pytest.approx(z.std(axis=0).mean() * 6**0.5, rel=1e-5)


# Recall


def slow_recall(embeddings: np.ndarray, patients: np.ndarray) -> dict[int, float]:
    hits: dict[int, list[bool]] = {}
    for i, patient in enumerate(patients):
        if list(patients).count(patient) < 2:
            continue
        cosines = {
            j: embeddings[i] @ embeddings[j] / (np.linalg.norm(embeddings[i]) * np.linalg.norm(embeddings[j]))
            for j in range(len(patients))
            if j != i
        }
        nearest = max(cosines, key=lambda j: cosines[j])
        hits.setdefault(int(patient), []).append(bool(patients[nearest] == patient))
    return {patient: float(np.mean(found)) for patient, found in sorted(hits.items())}


@given(patients=st.lists(st.integers(0, 5), min_size=2, max_size=14), seed=st.integers(0, 10**6))
def test_pair_recall_is_that_of_the_slow_loop(patients: list[int], seed: int) -> None:
    embeddings = np.random.default_rng(seed).standard_normal((len(patients), 3))
    recall = pair_recall(embeddings, np.array(patients))
    assert recall.tolist() == pytest.approx(list(slow_recall(embeddings, np.array(patients)).values()))


def test_pair_recall_counts_patients_with_1_2_and_3_scans() -> None:
    patients = np.array([4, 9, 4, 7, 9, 9])
    angles = np.radians([0, 90, 5, 7, 95, 200])
    # 4: 0 finds 5 degrees; 5 degrees finds 7. 9: 90 and 95 find each other; 200 finds 95. 7 has one scan.
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1], [3], [0.2], [5], [1], [1]])
    assert pair_recall(embeddings, patients).tolist() == [0.5, 1.0]


def test_pair_recall_of_patients_with_one_scan_each_is_empty() -> None:
    assert pair_recall(table(4).numpy(), np.arange(4)).shape == (0,)


def test_collapsed_embeddings_recall_no_more_than_chance() -> None:
    patients = np.repeat(np.arange(50), 2)
    assert pair_recall(np.ones((100, 8)), patients).mean() <= 0.05


# The interval


def test_the_interval_holds_the_mean_and_narrows_with_more_patients() -> None:
    random = np.random.default_rng(0)
    few, many = (random.choice([0.0, 0.5, 1.0], size) for size in (20, 2000))
    widths = []
    for values in (few, many):
        low, high = bootstrap_interval(values)
        assert low < values.mean() < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(2 * 1.96 * many.std() / 2000**0.5, rel=0.1)
    assert widths[0] > 5 * widths[1]


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(random.random(40) < 0.4, level=0.9, draws=300)  # type: ignore[arg-type]
        covered += low <= 0.4 <= high
    assert 0.82 < covered / 300 < 0.96


def test_the_interval_repeats_itself_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).random(30)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    low, high = bootstrap_interval(values, level=0.5)
    wide_low, wide_high = bootstrap_interval(values, level=0.99)
    assert wide_low < low < high < wide_high
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


# The report and the metric


PATIENTS = torch.tensor([3, 8, 3, 5, 8, 8])


def test_the_report_agrees_with_its_parts() -> None:
    z = table(6)
    report = embedding_report(z, PATIENTS)
    recall = pair_recall(z.numpy(), PATIENTS.numpy())
    low, high = bootstrap_interval(recall)
    assert report == pytest.approx(
        {
            "effective_rank": effective_rank(z),
            "dimension_std": dimension_std(z),
            "uniformity": uniformity(z),
            "alignment": alignment(z[[0, 1]], z[[2, 4]]),
            "pair_recall": recall.mean(),
            "pair_recall_low": low,
            "pair_recall_high": high,
            "pair_recall_chance": (1 / 5 + 2 / 5) / 2,
        }
    )
    assert all(type(value) is float for value in report.values())


def test_the_chance_level_is_what_random_embeddings_recall() -> None:
    patients = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4])
    reports = [embedding_report(table(12, 64, seed), patients) for seed in range(300)]
    recalled = np.mean([report["pair_recall"] for report in reports])
    assert recalled == pytest.approx(reports[0]["pair_recall_chance"], abs=0.03)


def test_a_report_without_pairs_leaves_out_what_needs_them() -> None:
    assert set(embedding_report(table(4), torch.arange(4))) == {"effective_rank", "dimension_std", "uniformity"}


def run(batches: list[tuple[Tensor, Tensor]], metric: EmbeddingMetric, epochs: int = 1) -> Engine:
    engine = Engine(lambda _, batch: {"pred": batch[0], "label": batch[1]})
    metric.attach(engine, "value")
    engine.run(batches, max_epochs=epochs)
    return engine


@pytest.mark.parametrize("key", ["pair_recall", "effective_rank", "alignment"])
def test_the_metric_reports_the_whole_run_through_an_engine(key: str) -> None:
    z = table(6)
    metric = EmbeddingMetric(key)
    engine = run(
        [(z[:4].requires_grad_(), PATIENTS[:4]), (z[4:5], PATIENTS[4:5, None]), (z[5:], PATIENTS[5:])], metric, 2
    )
    assert metric.report == pytest.approx(embedding_report(z.detach(), PATIENTS))
    assert engine.state.metrics["value"] == pytest.approx(metric.report[key])


def test_the_metric_takes_bf16_features() -> None:
    z = table(6).bfloat16()
    metric = EmbeddingMetric()
    run([(z, PATIENTS)], metric)
    assert metric.report == pytest.approx(embedding_report(z.float(), PATIENTS))


def test_the_metric_is_the_key_metric_of_monais_evaluator() -> None:
    z = table(6)
    rows = [{"image": z[place], "label": PATIENTS[place]} for place in range(6)]
    metric = EmbeddingMetric("uniformity")
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(rows, batch_size=1),  # type: ignore[arg-type]
        network=torch.nn.Identity(),
        key_val_metric={"uniformity": metric},
        decollate=False,
    )
    evaluator.run()
    assert evaluator.state.metrics["uniformity"] == pytest.approx(uniformity(z))
    assert evaluator.state.key_metric_name == "uniformity"


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_scans_cannot_be_measured(rows: int) -> None:
    metric = EmbeddingMetric()
    if rows:
        metric.update((table(rows), torch.zeros(rows)))
    with pytest.raises(DatalistError, match="Nothing to measure"):
        metric.compute()


def test_recall_without_pairs_is_refused_with_a_way_out() -> None:
    with pytest.raises(DatalistError, match="effective_rank"):
        run([(table(4), torch.arange(4))], EmbeddingMetric())
    run([(table(4), torch.arange(4))], EmbeddingMetric("effective_rank"))


def test_embeddings_that_are_no_numbers_are_refused() -> None:
    z = table(6)
    z[2] = math.nan
    with pytest.raises(MedclrError, match="1 of 6 scans"):
        run([(z, PATIENTS)], EmbeddingMetric())
