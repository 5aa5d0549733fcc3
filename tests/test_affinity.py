from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medclr.affinity import Affinity
from medclr.errors import ConfigError

# Two views each of three samples; samples 0 and 1 are two scans' pairs of patient 7, and patient 9 has one.
SAMPLE = [0, 0, 1, 1, 2, 2]
PATIENT = [7, 7, 7, 7, 9, 9]
VIEW = [0, 1, 0, 1, 0, 1]
# i: itself, +: positive, p: same patient, .: negative
TRUTH = ["i+pp..", "+ipp..", "ppi+..", "pp+i..", "....i+", "....+i"]


def meta(sample: list[int], patient: list[int], view: list[int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in (("sample", sample), ("patient", patient), ("view", view))}


@pytest.mark.parametrize(
    ("same_patient", "positive", "ignored"),
    [("ignored", "+", "ip"), ("positive", "+p", "i"), ("negative", "+", "i")],
)
def test_the_truth_table(same_patient: Any, positive: str, ignored: str) -> None:
    table = meta(SAMPLE, PATIENT, VIEW)
    positives, left_out = Affinity(same_patient=same_patient)(table, table)
    assert positives.dtype == torch.float32
    assert left_out.dtype == torch.bool
    assert positives.tolist() == [[float(cell in positive) for cell in row] for row in TRUTH]
    assert left_out.tolist() == [[cell in ignored for cell in row] for row in TRUTH]


def test_the_default_ignores_a_patients_other_samples() -> None:
    table = meta(SAMPLE, PATIENT, VIEW)
    for one, other in zip(Affinity()(table, table), Affinity(same_patient="ignored")(table, table), strict=True):
        assert torch.equal(one, other)


def test_queries_and_keys_may_differ() -> None:
    queries = meta([1, 2], [7, 9], [0, 1])
    positives, ignored = Affinity()(queries, meta(SAMPLE, PATIENT, VIEW))
    assert positives.tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert ignored.tolist() == [[True, True, True, False, False, False], [False, False, False, False, False, True]]


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=12),
    block=st.integers(1, 5),
    same_patient=st.sampled_from(["ignored", "positive", "negative"]),
)
def test_blocks_of_rows_are_the_rows_of_the_whole(rows: list[tuple[int, ...]], block: int, same_patient: Any) -> None:
    table = meta(*[list(column) for column in zip(*rows, strict=True)])
    affinity = Affinity(same_patient=same_patient)
    positives, ignored = affinity(table, table)
    assert not (positives.bool() & ignored).any()
    assert ignored.diagonal().all()
    pairs = affinity.pairs(table, table)
    blocks = [pairs(slice(start, start + block)) for start in range(0, len(rows), block)]
    assert torch.equal(torch.cat([part for part, _ in blocks]), positives)
    assert torch.equal(torch.cat([part for _, part in blocks]), ignored)


@pytest.mark.parametrize("same_patient", ["ignore", "", None, True])
def test_another_setting_is_refused(same_patient: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Affinity(same_patient=same_patient)
    assert "ignored, positive or negative" in str(caught.value)
