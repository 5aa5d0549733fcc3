from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medclr.affinity import Related
from medclr.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "no condition"),
        ({"counts": "ignore", "same": "scan"}, "counts 'ignore'"),
        ({"counts": 1.2, "same": "scan"}, "counts 1.2"),
        ({"same": "modality", "different": "modality"}, "columns in one of the two"),
        ({"same": ["scan", "scan"]}, "same is unusable"),
        ({"same": 3}, "same is unusable"),
        ({"different": [""]}, "different is unusable"),
        ({"within_days": -1}, "0 <= least_days"),
        ({"within_days": 5, "least_days": 6}, "0 <= least_days"),
        ({"within_days": math.nan}, "0 <= least_days"),
        ({"within_days": "90"}, "0 <= least_days"),
        ({"within_days": True}, "0 <= least_days"),
        ({"least_days": -1, "same": "scan"}, "0 <= least_days"),
        ({"least_days": math.inf}, "0 <= least_days"),
        ({"within_days": 90, "bandwidth": 0}, "bandwidth is unusable"),
        ({"same": "scan", "bandwidth": 30}, "without within_days"),
        ({"counts": "ignored", "within_days": 90, "bandwidth": 30}, "a bandwidth for pairs that are ignored"),
        ({"counts": "kernels", "within_days": 90, "bandwidth": 30}, "a bandwidth for pairs that are kernels"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Related(**settings)
    assert problem in str(caught.value)


def test_it_reads_the_columns_of_its_conditions() -> None:
    assert Related(same="study_id", different=["modality", "side"]).columns == ("study_id", "modality", "side")
    assert Related(within_days=30).columns == Related(least_days=1).columns == ("days",)
    assert Related(same="scan", least_days=0).columns == ("scan",)


def test_days_are_counted_from_the_least_to_the_most_both_included_in_either_direction() -> None:
    patient = torch.zeros(7, dtype=torch.int64)
    query = {"patient": patient[:1], "days": torch.tensor([100.0])}
    days = torch.tensor([100.0, 105.0, 94.9, 160.0, 40.0, 160.1, math.nan])
    key = {"patient": patient, "days": days}
    assert Related(within_days=60, least_days=5).holds(query, key).tolist() == [
        [False, True, True, True, True, False, False]
    ]
    assert Related(within_days=60).holds(query, key).tolist() == [[True, True, True, True, True, False, False]]
    assert Related(least_days=5.05).holds(query, key).tolist() == [[False, False, True, True, True, True, False]]
