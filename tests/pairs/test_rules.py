from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from medclr.pairs import SamePatient, SameScan


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
