from __future__ import annotations

from typing import Any

import pytest

from medclr.engine.same_run import differences

BEFORE = {
    "rate": 0.1,
    "max_epochs": 10,
    "size": [64, 64],
    "views": [{"sigma": 1}, {"_target_": "CutOut"}],
    "train": {"dataloader": {"num_workers": 2, "batch_size": 4}},
    "none": None,
}


def lines(changes: dict[str, Any]) -> list[str]:
    now = {name: value for name, value in {**BEFORE, **changes}.items() if value != "gone"}
    return differences(BEFORE, now, may_change=["train::dataloader::num_workers", "imports"], may_rise=["max_epochs"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"rate": 0.2}, ["rate: 0.1 -> 0.2"]),
        ({"max_epochs": 20}, []),
        ({"max_epochs": 5}, ["max_epochs: 10 -> 5 (may only rise)"]),
        ({"max_epochs": None}, ["max_epochs: 10 -> None (may only rise)"]),
        ({"size": [64, 32]}, ["size: [64, 64] -> [64, 32]"]),
        ({"views": [{"sigma": 2}, {"_target_": "CutOut"}]}, ["views::0::sigma: 1 -> 2"]),
        ({"views": [{"sigma": 1}]}, ["views::1::_target_: CutOut -> (not there)"]),
        ({"train": {"dataloader": {"num_workers": 8, "batch_size": 4}}}, []),
        (
            {"train": {"dataloader": {"num_workers": 8, "batch_size": 8}}},
            ["train::dataloader::batch_size: 4 -> 8"],
        ),
        ({"imports": ["$import torch"]}, []),
        ({"imports_of_mine": 1}, ["imports_of_mine: (not there) -> 1"]),
        ({"none": "gone"}, ["none: None -> (not there)"]),
        ({"new": {}}, ["new: (not there) -> {}"]),
    ],
)
def test_what_differs_is_named_but_for_what_may_change(changes: dict[str, Any], expected: list[str]) -> None:
    assert lines(changes) == expected
