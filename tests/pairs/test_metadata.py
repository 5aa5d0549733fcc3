from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from medclr.affinity import Affinity, Gaussian, Related, Same, of_views
from medclr.data import RandomCrop, ScanReader
from medclr.errors import ConfigError, DatalistError
from medclr.pairs import AcrossModality, PatientPairDataset, PatientSampler, SameScan, SameStudy, WithinDays
from tests.pairs.test_dataset import Invented, assert_same, pairs

VISITS = [
    {"study_id": "1", "modality": "MR", "days": 0, "age": 61.5, "sex": "M", "site": 3, "label": "AD"},
    {"study_id": "1", "modality": "CT", "days": 2, "age": None, "sex": "M", "site": 1, "label": "AD"},
    {"study_id": 2, "modality": "MR", "days": 400, "age": 62, "sex": "M", "site": 1},
    {"study_id": "1", "modality": "", "age": float("nan"), "sex": "F", "label": "CN"},
    {"study_id": "9", "modality": "MR", "days": 0, "site": 2, "label": "CN"},
    {"days": 10, "sex": "F"},
]  # of three patients with 3, 1 and 2 scans


def visits(rule: Any = None, **settings: Any) -> PatientPairDataset:
    owners = ["x", "x", "x", "b", "a", "a"]
    rows = [{"image": n, "patient_id": o, **v} for n, (o, v) in enumerate(zip(owners, VISITS, strict=True))]
    return PatientPairDataset(
        rows,
        rule,
        crop=RandomCrop((4, 4, 4)),
        reader=ScanReader(Invented()),  # type: ignore[arg-type]
        preload=False,
        **settings,
    )


COLUMNS = ("study_id", "modality", "days", "age", "sex", "site", "label")
nan = float("nan")
WANTED = {
    "study": [0, 0, 1, 2, 3, -1],
    "modality": [1, 0, 1, -1, 1, -1],
    "days": [0.0, 2.0, 400.0, nan, 0.0, 10.0],
    "age": [61.5, nan, 62.0, nan, nan, nan],
    "sex": [1, 1, 1, 0, -1, 0],
    "site": [3.0, 1.0, 1.0, nan, 2.0, nan],
    "label": [0, 0, -1, 1, 1, -1],
}


def test_columns_become_metadata_of_each_view() -> None:
    dataset = visits(columns=COLUMNS)
    for place in range(3):
        for epoch in range(8):
            meta = dataset[place, epoch, 0]["meta"]
            assert set(meta) == {"sample", "patient", "scan", *WANTED}
            first, second = meta["scan"].tolist()
            for name, values in WANTED.items():
                dtype = torch.float64 if isinstance(values[0], float) else torch.int64
                wanted = torch.tensor([values[first], values[second]], dtype=dtype)
                assert meta[name].dtype == dtype
                assert torch.equal(meta[name].nan_to_num(-7), wanted.nan_to_num(-7))


def test_columns_change_no_draw(cohort: list[dict]) -> None:
    plain, more = pairs(cohort), pairs(cohort, columns=["days"])
    for place in range(5):
        item = more[place, 2, 1]
        item["meta"] = {name: value for name, value in item["meta"].items() if name != "days"}
        assert_same(plain[place, 2, 1], item)


def test_renaming_patients_and_studies_changes_no_metadata() -> None:
    renamed = visits(columns=COLUMNS)
    names = {"x": "1", "b": "0", "a": "2"}
    rows = [
        {
            **row,
            "patient_id": names[row["patient_id"]],
            "study_id": row.get("study_id") and f"s{9 - int(row['study_id'])}",
        }
        for row in renamed.rows
    ]
    again = PatientPairDataset(rows, crop=renamed.crop, reader=renamed.reader, preload=False, columns=COLUMNS)
    assert_same(
        {name: value.nan_to_num(-7) for name, value in again.metadata.items()},
        {name: value.nan_to_num(-7) for name, value in renamed.metadata.items()},
    )


def test_the_summary_says_how_much_metadata_there_is() -> None:
    lines = visits(columns=["age", "study_id"]).summary().splitlines()
    assert lines[-1] == "metadata: age of 2 scans, study of 5 scans"


def test_a_single_column_may_be_given_by_its_name() -> None:
    assert list(visits(columns="sex").metadata) == ["sex"]


def test_a_column_that_no_row_has_is_refused_with_those_that_are_there(cohort: list[dict]) -> None:
    rows = [{**row, "age": None} for row in cohort]
    with pytest.raises(DatalistError, match="metadata of the pairs needs a column") as caught:
        pairs(rows, columns=["days", "age"])
    assert "no 'age'; there are days, image, label, patient_id" in str(caught.value)


@pytest.mark.parametrize("columns", [["patient_id"], ["image"], ["scan"], ["study"], ["view"], ["sex", "sex"], [3], 5])
def test_columns_that_cannot_be_metadata_are_refused(columns: Any) -> None:
    with pytest.raises(ConfigError):
        visits(columns=columns)


def test_paths_and_lists_are_no_metadata(cohort: list[dict]) -> None:
    with pytest.raises(DatalistError, match="'label' cannot become metadata") as caught:
        pairs(cohort, columns=["label"])
    assert "nii" not in str(caught.value)
    with pytest.raises(DatalistError, match="'point' cannot become metadata"):
        pairs([{**row, "point": [0, 1, 2]} for row in cohort], columns=["point"])


def test_an_affinity_reads_what_the_dataset_gives_it() -> None:
    affinity = Affinity(
        related=[Related("positive", same="study_id"), Related(0.5, within_days=500)],
        kernels=[Gaussian("age", 1.0), Same("label")],
    )
    dataset = visits(SameScan(), columns=affinity.columns)
    batch = default_collate([dataset[place, epoch, 0] for epoch in range(6) for place in range(3)])
    flat = of_views(batch["meta"], 2)
    flat["sample"] = torch.arange(18).repeat_interleave(2)  # each draw a sample of its own
    positives, ignored = affinity(flat, flat)
    scans = flat["scan"].tolist()
    seen = set()
    for one, row in enumerate(scans):
        for other, column in enumerate(scans):
            if one // 2 != other // 2:
                seen.add((row, column))
                got = "ignored" if ignored[one, other] else round(float(positives[one, other]), 4)
                assert got == pair_of_visits(row, column), (row, column)
    assert {(0, 1), (0, 2), (4, 5), (0, 3), (3, 4), (5, 5)} <= seen


def pair_of_visits(one: int, other: int) -> Any:
    """Worked out by hand from VISITS: patients are 0-2, 3 and 4-5."""
    of_one_patient = {0: 0, 1: 0, 2: 0, 3: 1, 4: 2, 5: 2}
    if of_one_patient[one] == of_one_patient[other]:
        if {one, other} <= {0, 1} or one == other != 5:
            return 1.0  # one study
        return 0.5  # days are known of all but 3; scan 5 with itself has no study, but is 0 days apart
    # No two patients have both an age, so labels decide: AD is 0 and 1, CN 3 and 4, the others have none.
    return 1.0 if {one, other} == {3, 4} else 0.0


@pytest.mark.parametrize(
    ("rule", "column"),
    [(SameStudy(), "study_id"), (AcrossModality(), "modality"), (AcrossModality("sequence"), "sequence")],
)
def test_a_rule_by_a_column_that_no_row_has_is_refused(rule: Any, column: str, cohort: list[dict]) -> None:
    with pytest.raises(DatalistError, match=f"pair rule {type(rule).__name__} needs a column") as caught:
        pairs(cohort, rule)
    assert f"no {column!r}; there are days" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "paired", "drawn"),
    [
        (SameStudy(), 1, [{(0, 1), (1, 0)}, {(3, 3)}, {(4, 4), (5, 5)}]),
        (AcrossModality(), 1, [{(0, 1), (1, 0), (2, 1)}, {(3, 3)}, {(4, 4), (5, 5)}]),
        (WithinDays(30), 2, [{(0, 1), (1, 0)}, {(3, 3)}, {(4, 5), (5, 4)}]),
        (WithinDays(500, least=30), 1, [{(0, 2), (2, 0), (1, 2), (2, 1)}, {(3, 3)}, {(4, 4), (5, 5)}]),
    ],
)
def test_rules_by_columns_draw_their_pairs_and_count_who_has_none(rule: Any, paired: int, drawn: list) -> None:
    dataset = visits(rule)
    assert dataset.paired_patients() == paired
    for place in range(3):
        assert {tuple(dataset[place, epoch, 0]["meta"]["scan"].tolist()) for epoch in range(60)} == drawn[place]


def test_a_rule_of_ones_own_needs_no_columns() -> None:
    class First:
        always_same_scan = True

        def pairable(self, scans: Any) -> bool:
            return True

        def __call__(self, scans: Any, random: Any) -> tuple[int, int]:
            return 0, 0

    assert visits(First())[0]["meta"]["scan"].tolist() == [0, 0]


@pytest.mark.parametrize("balance", ["scans", "modality"])
def test_a_balanced_epoch_has_no_sample_twice(balance: str) -> None:
    dataset = visits()
    sampler = PatientSampler(dataset, passes=5, balance=balance)
    drawn = [int(dataset[index]["meta"]["sample"]) for index in sampler]
    assert len(set(drawn)) == len(drawn) == 15
