from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medclr.errors import ConfigError, DatalistError
from medclr.pairs import AcrossModality, PairRule, SamePatient, SameScan, SameStudy, WithinDays


def scans(count: int) -> list[dict]:
    return [{"image": str(place)} for place in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_same_patient_draws_two_different_scans_every_ordered_pair_equally_often(count: int) -> None:
    random = np.random.default_rng(0)
    drawn = Counter(SamePatient()(scans(count), random) for _ in range(300 * count))
    assert set(drawn) == {(one, other) for one in range(count) for other in range(count) if one != other}
    wanted = 300 * count / (count * (count - 1))
    assert all(abs(times - wanted) < 5 * wanted**0.5 for times in drawn.values())


def test_same_patient_falls_back_to_the_only_scan() -> None:
    assert SamePatient()(scans(1), np.random.default_rng(0)) == (0, 0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_same_scan_draws_one_scan_twice_each_equally_often(count: int) -> None:
    random = np.random.default_rng(0)
    drawn = Counter(SameScan()(scans(count), random) for _ in range(300 * count))
    assert set(drawn) == {(place, place) for place in range(count)}
    assert all(abs(times - 300) < 5 * 300**0.5 for times in drawn.values())


@pytest.mark.parametrize("rule", [SamePatient(), SameScan()])
def test_a_draw_depends_on_the_generator_alone(rule: SamePatient | SameScan) -> None:
    draws = [
        [rule(scans(4), random) for _ in range(20)] for random in (np.random.default_rng(3), np.random.default_rng(3))
    ]
    assert draws[0] == draws[1]
    assert all(type(place) is int for pair in draws[0] for place in pair)


def test_rules_say_what_they_offer() -> None:
    assert [SamePatient().pairable(scans(count)) for count in range(4)] == [False, False, True, True]
    assert [SameScan().pairable(scans(count)) for count in range(4)] == [False, True, True, True]
    assert SameScan().always_same_scan
    assert not SamePatient().always_same_scan
    assert SamePatient().columns == SameScan().columns == ()


# Rules by columns

RULES: dict[str, PairRule] = {
    "same study": SameStudy(),
    "across modality": AcrossModality(),
    "across sequence": AcrossModality("sequence"),
    "within days": WithinDays(30),
    "days apart": WithinDays(60, least=10),
}


def fits(rule: PairRule, one: dict, other: dict) -> bool:
    """The rule in plain words, over rows in which a missing value is None or no key."""
    if isinstance(rule, WithinDays):
        days = one.get("days"), other.get("days")
        return None not in days and rule.least <= abs(days[0] - days[1]) <= rule.most  # type: ignore[operator]
    if isinstance(rule, AcrossModality):
        values = one.get(rule.column), other.get(rule.column)
        return None not in values and values[0] != values[1]
    return one.get("study_id") is not None and one.get("study_id") == other.get("study_id")


row = st.fixed_dictionaries(
    {},
    optional={
        "study_id": st.sampled_from([None, "1", "2", "3"]),
        "modality": st.sampled_from([None, "CT", "MR"]),
        "sequence": st.sampled_from([None, "T1", "T2", "FLAIR"]),
        "days": st.one_of(st.none(), st.integers(0, 100)),
    },
)


@given(name=st.sampled_from(sorted(RULES)), rows=st.lists(row, min_size=1, max_size=6), seed=st.integers(0, 999))
def test_a_pair_fits_the_rule_or_is_one_scan_twice(name: str, rows: list[dict], seed: int) -> None:
    rule = RULES[name]
    pairs = {
        (one, other)
        for one in range(len(rows))
        for other in range(len(rows))
        if one != other and fits(rule, rows[one], rows[other])
    }
    assert rule.pairable(rows) == bool(pairs)
    first, second = rule(rows, np.random.default_rng(seed))
    assert (first, second) in pairs if pairs else first == second < len(rows)
    assert type(first) is type(second) is int
    assert (first, second) == rule(rows, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("rule", "rows", "wanted"),
    [
        (
            SameStudy(),
            [{"study_id": study} for study in ("1", "1", "2", "3", "3", "3", None)],
            {(0, 1): 60, (1, 0): 60, (3, 4): 30, (3, 5): 30, (4, 3): 30, (4, 5): 30, (5, 3): 30, (5, 4): 30},
        ),
        (
            WithinDays(10),
            [{"days": days} for days in (0, 10, 30, 12)],
            {(0, 1): 100, (1, 0): 50, (1, 3): 50, (3, 1): 100},
        ),
        (
            AcrossModality(),  # the MR of the other study is only for the CT that has none in its own
            [{"study_id": s, "modality": m} for s, m in (("1", "CT"), ("1", "MR"), ("2", "CT"), ("1", "CT"))],
            {(0, 1): 75, (1, 0): 37.5, (1, 3): 37.5, (2, 1): 75, (3, 1): 75},
        ),
        (SameStudy(), [{"study_id": "1"}, {"study_id": "2"}, {}], {(0, 0): 100, (1, 1): 100, (2, 2): 100}),
    ],
)  # fmt: skip
def test_the_first_scan_is_uniform_and_so_are_its_partners(rule: PairRule, rows: list[dict], wanted: dict) -> None:
    random = np.random.default_rng(0)
    drawn = Counter(rule(rows, random) for _ in range(round(10 * sum(wanted.values()))))
    assert set(drawn) == set(wanted)
    assert all(abs(drawn[pair] - 10 * times) < 5 * (10 * times) ** 0.5 for pair, times in wanted.items())


def test_whole_numbers_and_texts_of_one_study_are_the_same_study() -> None:
    assert SameStudy().pairable([{"study_id": 1}, {"study_id": "1"}])


def test_rules_name_the_columns_that_they_need() -> None:
    assert [rule.columns for rule in RULES.values()] == [
        ("study_id",),
        ("modality",),
        ("sequence",),
        ("days",),
        ("days",),
    ]
    assert not any(rule.always_same_scan for rule in RULES.values())


@pytest.mark.parametrize(
    "days", [(-1, 0), (5, 6), (float("nan"), 0), (float("inf"), 0), ("90", 0), (90, None), (True, 0), (90, -1)]
)
def test_days_that_exclude_everything_are_refused(days: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="pair rule"):
        WithinDays(*days)


@pytest.mark.parametrize("column", ["", None, ["modality"]])
def test_a_modality_column_without_a_name_is_refused(column: Any) -> None:
    with pytest.raises(ConfigError, match="pair rule"):
        AcrossModality(column)


def test_days_that_are_no_number_are_an_error_of_the_datalist() -> None:
    with pytest.raises(DatalistError, match="'days'"):
        WithinDays(30).pairable([{"days": "2020-01-01"}, {"days": 3}])
