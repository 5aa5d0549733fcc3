from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde

from medclr.affinity import Gaussian, Same
from medclr.errors import ConfigError, DatalistError

ROWS: list[dict[str, Any]] = [
    {"patient_id": "a", "age": 40, "sex": "F"},
    {"patient_id": "a", "age": 44, "sex": "F"},
    {"patient_id": "b", "age": 55.5, "sex": "M"},
    {"patient_id": "c", "age": None},
    {"patient_id": "d", "age": 61},
    {"patient_id": "d"},
    {"patient_id": "e", "age": math.nan},
    {"patient_id": "f", "age": 38},
]


@pytest.mark.parametrize("rule", ["scott", "silverman"])
def test_a_rule_gives_the_bandwidth_that_scipy_gives_over_patients(rule: Any) -> None:
    patients = np.array([42, 55.5, 61, 38])
    wanted = math.sqrt(gaussian_kde(patients, bw_method=rule).covariance.item())
    assert Gaussian("age", rule, ROWS).bandwidth == pytest.approx(wanted)


def test_repeat_scans_of_a_patient_do_not_narrow_the_bandwidth() -> None:
    assert Gaussian("age", "scott", ROWS * 5).bandwidth == pytest.approx(Gaussian("age", "scott", ROWS).bandwidth)


@pytest.mark.parametrize("bandwidth", [0, -1, math.nan, math.inf, "5", "scot", None, True])
def test_a_bandwidth_that_is_not_above_0_is_refused(bandwidth: Any) -> None:
    with pytest.raises(ConfigError, match="bandwidth is unusable"):
        Gaussian("age", bandwidth, ROWS)


def test_a_rule_without_rows_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="training rows"):
        Gaussian("age", "scott")


@pytest.mark.parametrize("bandwidth", [5, "scott"])
def test_a_column_that_no_row_has_is_named_with_those_that_are_there(bandwidth: Any) -> None:
    rows = [{**row, "weight": None} for row in ROWS]
    with pytest.raises(DatalistError, match=r"Gaussian\('weight'\) needs a column") as caught:
        Gaussian("weight", bandwidth, rows)
    assert "there are age, patient_id, sex" in str(caught.value)


@pytest.mark.parametrize("rows", [ROWS[:2], [{**row, "age": 50} for row in ROWS]])
def test_patients_that_are_all_alike_have_no_rule(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DatalistError, match="cannot be found by rule"):
        Gaussian("age", "silverman", rows)


def test_a_rule_over_texts_is_refused_without_showing_them() -> None:
    with pytest.raises(DatalistError, match="something else than numbers") as caught:
        Gaussian("sex", "scott", ROWS)
    assert "'F'" not in str(caught.value)


def test_a_distance_between_categories_is_refused() -> None:
    with pytest.raises(ConfigError, match="between categories") as caught:
        Gaussian("sex", 1.0)({"sex": torch.tensor([0, 1])}, {"sex": torch.tensor([0, 1])})
    assert "Same('sex')" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gaussian_is_in_fp32_and_finite_whatever_is_missing(dtype: torch.dtype) -> None:
    ages = {"age": torch.tensor([40, math.nan, 90], dtype=dtype)}
    weight, known = Gaussian("age", 10)(ages, ages)
    assert weight.dtype == torch.float32
    assert weight.isfinite().all()
    assert known.tolist() == [[True, False, True], [False] * 3, [True, False, True]]
    assert float(weight[0, 2]) == pytest.approx(math.exp(-12.5))


def test_numbers_can_be_the_same_too() -> None:
    site = {"site": torch.tensor([1.0, 2.0, math.nan], dtype=torch.float64)}
    weight, known = Same("site", 0.5)(site, site)
    assert weight[:2, :2].tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert known.tolist() == [[True, True, False], [True, True, False], [False] * 3]


@pytest.mark.parametrize("otherwise", [-0.1, 1, 2.0, math.nan, "0", None, True])
def test_another_weight_of_differing_values_is_refused(otherwise: Any) -> None:
    with pytest.raises(ConfigError, match="from 0 to below 1"):
        Same("sex", otherwise)
