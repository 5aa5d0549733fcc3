from __future__ import annotations

import logging
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclr.data.datalist import Datalist, Row
from medclr.data.splits import (
    fold_datalists,
    k_folds,
    labelled_datalists,
    make_splits,
    nested_fractions,
    split_datalist,
    split_patients,
)
from medclr.errors import ConfigError, DatalistError


def rows_of(patients: list[Any], **columns: list[Any]) -> list[Row]:
    return [
        {"image": f"/x/{n}.nii", "patient_id": str(patient), **{name: values[n] for name, values in columns.items()}}
        for n, patient in enumerate(patients)
    ]


def ids(rows: list[Row]) -> set[str]:
    return {row["patient_id"] for row in rows}


def places(rows: list[Row]) -> list[str]:
    return [row["image"] for row in rows]


cohorts = st.lists(st.integers(0, 40), min_size=1, max_size=80)
seeds = st.integers(-(2**40), 2**40)


@settings(max_examples=60, deadline=None)
@given(cohorts.filter(lambda patients: len(set(patients)) >= 10), seeds, st.booleans())
def test_a_split_shares_no_patient_and_keeps_every_row_once(patients: list[int], seed: int, stratified: bool) -> None:
    rows = rows_of(patients, site=[patient % 2 for patient in patients])
    counts = Counter({patient: patient % 2 for patient in patients}.values())
    stratify = "site" if stratified and min(counts.values()) > 1 else None
    made = split_patients(rows, fractions=(0.6, 0.2, 0.2), seed=seed, stratify=stratify)
    assert list(made) == ["training", "validation", "test"]
    assert sorted(places([row for part in made.values() for row in part])) == sorted(places(rows))
    assert sum(len(ids(part)) for part in made.values()) == len(ids(rows))
    for part in made.values():
        assert part == [row for row in rows if row in part]


@settings(max_examples=40, deadline=None)
@given(cohorts.filter(lambda patients: len(set(patients)) >= 3), seeds, st.integers(2, 3))
def test_folds_validate_each_row_once_and_share_no_patient(patients: list[int], seed: int, k: int) -> None:
    rows = rows_of(patients)
    folds = k_folds(rows, k, seed)
    assert len(folds) == k
    assert sorted(row for _, validation in folds for row in places(validation)) == sorted(places(rows))
    for training, validation in folds:
        assert not ids(training) & ids(validation)
        assert len(training) + len(validation) == len(rows)
    sizes = [len(ids(validation)) for _, validation in folds]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None)
@given(cohorts, seeds, st.data())
def test_fractions_nest(patients: list[int], seed: int, data: st.DataObject) -> None:
    rows = rows_of(patients, site=[patient % 3 for patient in patients])
    amounts = sorted(data.draw(st.lists(st.integers(1, len(set(patients))), min_size=1, max_size=4)))
    stratify = data.draw(st.sampled_from([None, "site"]))
    subsets = nested_fractions(rows, amounts, seed, stratify=stratify)
    assert [len(ids(subset)) for subset in subsets] == amounts
    for small, large in pairwise(subsets):
        assert set(places(small)) <= set(places(large))
    for subset in subsets:  # whole patients
        assert places(subset) == [row["image"] for row in rows if row["patient_id"] in ids(subset)]
    assert nested_fractions(rows, amounts[::-1], seed, stratify=stratify) == subsets[::-1]


@settings(max_examples=30, deadline=None)
@given(cohorts.filter(lambda patients: len(set(patients)) >= 10), seeds, st.randoms())
def test_new_pseudonyms_leave_everything_as_it_was(patients: list[int], seed: int, random: Any) -> None:
    names = dict(enumerate(random.sample(range(1000, 2000), 41)))
    sites = [patient % 2 for patient in patients]
    old, new = rows_of(patients, site=sites), rows_of([names[patient] for patient in patients], site=sites)

    def layout(rows: list[Row]) -> Any:
        return (
            {name: places(part) for name, part in split_patients(rows, seed=seed).items()},
            [(places(training), places(validation)) for training, validation in k_folds(rows, 2, seed)],
            [places(subset) for subset in nested_fractions(rows, [1, 3, 0.5], seed, stratify="site")],
        )

    assert layout(old) == layout(new)


def test_the_seed_decides() -> None:
    rows = rows_of(list(range(50)))
    assert split_patients(rows, seed=3) == split_patients(rows, seed=3)
    assert split_patients(rows, seed=3) != split_patients(rows, seed=4)
    assert k_folds(rows, 5, 3) == k_folds(rows, 5, 3)
    assert k_folds(rows, 5, 3) != k_folds(rows, 5, 4)
    assert nested_fractions(rows, [10], 3) != nested_fractions(rows, [10], 4)


def test_the_order_of_patients_is_the_same_in_every_version() -> None:
    rows = rows_of(list(range(12)))
    made = split_patients(rows, fractions=(0.5, 0.25, 0.25), seed=0)
    got = [sorted(int(patient) for patient in ids(part)) for part in made.values()]
    assert got == [[0, 1, 3, 5, 10, 11], [2, 7, 8], [4, 6, 9]]
    assert [int(row["patient_id"]) for row in nested_fractions(rows, [3], 0)[0]] == [1, 3, 7]


def test_every_patient_is_equally_likely_in_the_smallest_subset() -> None:
    # Stratum 0 has 8 patients, stratum 1 has 2: one patient of ten is drawn, each with chance 0.1.
    rows = rows_of(list(range(10)), site=[0] * 8 + [1] * 2)
    drawn = Counter(nested_fractions(rows, [1], seed, stratify="site")[0][0]["patient_id"] for seed in range(4000))
    assert len(drawn) == 10
    small = (drawn["8"] + drawn["9"]) / 4000
    assert 0.1 < small < 0.3
    within = [drawn[str(patient)] for patient in range(8)]
    assert max(within) < 1.4 * min(within)


@pytest.mark.parametrize(
    ("fractions", "counts"), [((0.7, 0.15, 0.15), (7, 2, 1)), ((0.8, 0.2), (8, 2)), ((0.5, 0, 0.5), (5, 5))]
)
def test_fractions_count_patients(fractions: tuple[float, ...], counts: tuple[int, ...]) -> None:
    rows = rows_of([n // 3 for n in range(30)])
    made = split_patients(rows, fractions=fractions, seed=1)
    assert tuple(len(ids(part)) for part in made.values()) == counts
    assert list(made) == [
        name for name, part in zip(("training", "validation", "test"), fractions, strict=False) if part
    ]


@pytest.mark.parametrize(
    "fractions", [(1.0,), (0.5, 0.6), (0.5, 0.4), (0, 1), (1.2, -0.2), (0.4, 0.2, 0.2, 0.2), (float("nan"), 0.5), ()]
)
def test_unusable_fractions_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(DatalistError, match="fractions"):
        split_patients(rows_of(list(range(30))), fractions=fractions, seed=0)


@pytest.mark.parametrize(("patients", "fractions"), [(3, (0.9, 0.05, 0.05)), (1, (0.5, 0.5)), (2, (0.7, 0.15, 0.15))])
def test_a_fraction_that_leaves_a_section_empty_is_refused(patients: int, fractions: tuple[float, ...]) -> None:
    with pytest.raises(DatalistError, match="empty"):
        split_patients(rows_of(list(range(patients))), fractions=fractions, seed=0)


@pytest.mark.parametrize("k", [0, 1, 6, 2.0])
def test_impossible_folds_are_refused(k: Any) -> None:
    with pytest.raises(DatalistError, match="folds"):
        k_folds(rows_of([0, 0, 1, 2, 3, 4]), k, 0)


@pytest.mark.parametrize("amount", [0, -1, 7, 0.0, 0.01, 1.5, float("nan"), True])
def test_impossible_amounts_are_refused(amount: Any) -> None:
    with pytest.raises(DatalistError, match="amount"):
        nested_fractions(rows_of(list(range(6))), [amount], 0)


def test_strata_are_spread_evenly() -> None:
    sites = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    rows = rows_of(list(range(100)), site=sites)
    for seed in range(10):
        made = split_patients(rows, fractions=(0.6, 0.2, 0.2), seed=seed, stratify="site")
        for part in made.values():
            got = Counter(row["site"] for row in part)
            for site, total in Counter(sites).items():
                assert abs(got[site] - total * len(part) / 100) <= 1
        for _, validation in k_folds(rows, 5, seed, "site"):
            assert Counter(row["site"] for row in validation) == {"a": 12, "b": 6, "c": 2}


def test_numbers_with_many_values_are_binned_by_quantiles() -> None:
    rows = rows_of(list(range(40)), age=[20 + n * 1.5 for n in range(40)])
    for _, validation in k_folds(rows, 5, 0, "age"):
        assert Counter(int((row["age"] - 20) / 1.5) // 10 for row in validation) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_several_columns_combine() -> None:
    rows = rows_of(list(range(40)), sex=["F", "M"] * 20, site=["a", "a", "b", "b"] * 10)
    for _, validation in k_folds(rows, 5, 0, ["sex", "site"]):
        assert set(Counter((row["sex"], row["site"]) for row in validation).values()) == {2}


def test_a_patients_value_is_the_first_that_is_known() -> None:
    rows = rows_of([n // 2 for n in range(40)], sex=[None if n % 2 == 0 else "FM"[n // 2 % 2] for n in range(40)])
    for training, _ in k_folds(rows, 2, 0, "sex"):
        assert Counter(row["sex"] for row in training if row["sex"]) == {"F": 5, "M": 5}


def merged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "were merged" in message]


def test_a_rare_site_is_merged_and_said_without_its_name(caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(list(range(26)), site=["a"] * 20 + ["rare 1", "rare 2", "rare 3"] * 2)
    with caplog.at_level(logging.INFO):
        made = split_patients(rows, fractions=(0.5, 0.5), seed=0, stratify="site")
    assert merged(caplog) == []
    for part in made.values():  # two of each, and one in each section
        assert Counter(row["site"] for row in part) == {"a": 10, "rare 1": 1, "rare 2": 1, "rare 3": 1}
    with caplog.at_level(logging.INFO):
        made = split_patients(rows, fractions=(0.5, 0.25, 0.25), seed=0, stratify="site")
    (message,) = merged(caplog)
    assert "3 of 4 strata have fewer than 3 patients (6 patients in all)" in message
    assert "rare 1" not in message
    assert 2 <= sum(row["site"] != "a" for row in made["training"]) <= 4


def test_rare_strata_are_merged_over_the_last_column_first() -> None:
    # Of each class 40 patients, of whom 20 come from one site and 20 from a site each.
    sites = [*["big"] * 20, *(f"small {n}" for n in range(20))] * 2
    rows = rows_of(list(range(80)), diagnosis=[0] * 40 + [1] * 40, site=sites)
    for seed in range(10):
        made = split_patients(rows, fractions=(0.5, 0.25, 0.25), seed=seed, stratify=["diagnosis", "site"])
        for part in made.values():
            cells = Counter((row["diagnosis"], row["site"] == "big") for row in part)
            assert max(cells.values()) - min(cells.values()) <= 2, (
                "the classes stay apart although their sites are rare"
            )


def test_every_patient_is_in_a_split_whose_strata_are_all_rare(caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(list(range(20)), site=[n // 2 for n in range(20)])
    folds = k_folds(rows, 3, 0, "site")
    assert sorted(place for _, validation in folds for place in places(validation)) == sorted(places(rows))
    assert len(merged(caplog)) == 1
    made = split_patients(rows_of(list(range(9)), site=[*range(8), 0]), seed=0, stratify="site")
    assert sum(map(len, made.values())) == 9


def test_a_rest_that_stays_rare_falls_anywhere_and_breaks_no_folds() -> None:
    rows = rows_of(list(range(20)), site=["a"] * 19 + ["b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folds = k_folds(rows, 3, 0, "site")
    assert [len(validation) for _, validation in folds].count(7) == 2
    test = [bool(split_patients(rows, seed=seed, stratify="site")["test"][-1]["site"] == "b") for seed in range(60)]
    assert 0 < sum(test) < 30
    assert len(nested_fractions(rows, [20], 0, stratify="site")[0]) == 20


def test_a_mask_counts_as_labelled_whatever_its_name(caplog: pytest.LogCaptureFixture) -> None:
    labels: list[Any] = [f"/x/mask_{n}.nii.gz" if n % 4 == 0 else None for n in range(40)]
    for seed in range(5):
        made = split_patients(rows_of(list(range(40)), label=labels), fractions=(0.5, 0.5), seed=seed, stratify="label")
        assert [sum(row["label"] is not None for row in part) for part in made.values()] == [5, 5]
    assert merged(caplog) == [], "ten masks are one value"


@pytest.mark.parametrize("folds", [None, 4])
def test_a_split_is_by_class_and_site_where_nothing_is_asked_for(folds: int | None) -> None:
    rows = rows_of(list(range(80)), label=[0, 1] * 40, site=["a", "a", "b", "b"] * 20, scanner=list("wxyz") * 20)
    given = Datalist({"training": rows}, Path("/x"))
    fractions = None if folds else (0.5, 0.25, 0.25)
    for seed in range(5):
        made = make_splits(given, fractions=fractions, folds=folds, seed=seed)
        assert made == make_splits(given, fractions=fractions, folds=folds, seed=seed, stratify=["label", "site"])
        for part in made.values():
            assert part.extra["split"]["stratify"] == ["label", "site"]  # type: ignore[index]
            assert set(Counter((row["label"], row["site"]) for row in part.validation).values()) == {5}


def test_a_split_by_default_spreads_the_few_that_have_a_mask() -> None:
    given = Datalist({"training": rows_of(list(range(40)), label=["/x/m.nii"] * 8 + [None] * 32)}, Path("/x"))
    for seed in range(5):
        made = make_splits(given, fractions=(0.5, 0.25, 0.25), seed=seed)[""]
        assert [counts["labelled"] for counts in made.summary().values()] == [4, 2, 2]


@pytest.mark.parametrize(
    "columns", [{}, {"site": ["a"] * 40}, {"label": ["/x/m.nii"] * 40, "scanner": list("abcd") * 10}]
)
@pytest.mark.parametrize("settings", [{}, {"folds": 5}, {"fractions": (0.6, 0.4), "labelled": [3]}])
def test_where_patients_do_not_differ_the_split_is_the_plain_one(columns: Any, settings: Any) -> None:
    rows = rows_of(list(range(40)), **{"label": ["/x/m.nii"] * 40, **columns})
    given = Datalist({"training": rows}, Path("/x"))
    for stratify in ("none", ["none"], []):
        assert make_splits(given, seed=3, stratify=stratify, **settings) == make_splits(given, seed=3, **settings)
    if not settings:
        assert make_splits(given, seed=3)[""].sections == split_patients(rows, seed=3)


def test_none_is_a_plain_split_also_where_patients_differ() -> None:
    rows = rows_of(list(range(40)), site=list("ab") * 20)
    given = Datalist({"training": rows}, Path("/x"))
    assert make_splits(given, seed=3, stratify=["none"])[""].sections == split_patients(rows, seed=3)
    assert make_splits(given, seed=3)[""].sections != split_patients(rows, seed=3)


@pytest.mark.parametrize("contents", [["vox-1", "vox-1"], [["vox-1", None], [None, "vox-1"]]])
def test_the_same_voxels_under_two_patients_are_not_split(contents: list[Any]) -> None:
    rows = rows_of(list(range(20)), content=[None] * 18 + contents)
    for split in (lambda: split_patients(rows, seed=0), lambda: k_folds(rows, 3, 0)):
        with pytest.raises(DatalistError, match="Two patients have a scan with the same voxels") as caught:
            split()
        assert "1 such scan" in str(caught.value.got)
        assert "vox-1" not in str(caught.value)


def test_the_same_voxels_of_one_patient_stay_together() -> None:
    rows = rows_of([n // 2 for n in range(40)], content=[f"vox-{n // 2}" for n in range(40)])
    assert sum(map(len, split_patients(rows, seed=0).values())) == 40


@pytest.mark.parametrize("column", ["nix", "image", "empty"])
def test_an_unknown_column_is_refused_with_those_that_are_there(column: str) -> None:
    with pytest.raises(DatalistError, match=r"(?s)unknown.*site"):
        split_patients(rows_of(list(range(20)), site=["a"] * 20, empty=[None] * 20), seed=0, stratify=column)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DatalistError, match="nothing to split"):
        split_patients([], seed=0)


def datalist(patients: int = 20, labelled: int = 20, **sections: list[Row]) -> Datalist:
    rows = rows_of([n // 2 for n in range(2 * patients)])
    for n in range(labelled):
        rows[n]["label"] = n % 2
    return Datalist({"training": rows, **sections}, Path("/x"), extra={"name": "mine"})


def held_back() -> list[Row]:
    return [{"image": "/x/held.nii", "patient_id": "held"}]


def test_an_existing_section_is_never_overwritten() -> None:
    with pytest.raises(DatalistError, match="split already"):
        split_datalist(datalist(test=held_back()), seed=0)
    made = split_datalist(datalist(test=held_back()), fractions=(0.8, 0.2), seed=0)
    assert made.test == held_back()
    assert len(made.patients("validation")) == 4
    assert made.extra["name"] == "mine"


def test_folds_join_training_and_validation_and_leave_test() -> None:
    split = split_datalist(datalist(test=held_back()), fractions=(0.8, 0.2), seed=0)
    folds = fold_datalists(split, 4, seed=0)
    assert len(folds) == 4
    assert all(fold.test == held_back() for fold in folds)
    assert set().union(*(fold.patients("validation") for fold in folds)) == {str(n) for n in range(20)}


def test_labelled_subsets_keep_labelled_rows_of_training_only() -> None:
    split = split_datalist(datalist(labelled=15), fractions=(0.6, 0.2, 0.2), seed=0)
    able = {row["patient_id"] for row in split.training if "label" in row}
    made = labelled_datalists(split, [1, 3, 1.0], seed=0)
    assert [len(part.patients("training")) for part in made] == [1, 3, len(able)]
    for small, large in pairwise(made):
        assert set(small.patients("training")) <= set(large.patients("training"))
    for part in made:
        assert all("label" in row for row in part.training)
        assert (part.validation, part.test) == (split.validation, split.test)
    with pytest.raises(DatalistError, match="No training row has a label"):
        labelled_datalists(datalist(labelled=0), [1], seed=0)


def test_make_splits_names_what_it_makes() -> None:
    assert list(make_splits(datalist(), seed=0)) == [""]
    assert list(make_splits(datalist(), labelled=[1, 0.5], seed=0)) == ["", "labelled1", "labelled0.5"]
    assert list(make_splits(datalist(), folds=2, seed=0)) == ["fold0", "fold1"]
    named = list(make_splits(datalist(), folds=2, labelled=[3], seed=0))
    assert named == ["fold0", "fold1", "fold0.labelled3", "fold1.labelled3"]
    split = make_splits(datalist(), labelled=[3], seed=0)
    again = make_splits(split[""], labelled=[3], seed=0)
    assert list(again) == ["labelled3"]
    assert again["labelled3"].sections == split["labelled3"].sections
    with pytest.raises(ConfigError, match="either"):
        make_splits(datalist(), fractions=(0.8, 0.2), folds=2, seed=0)
