from __future__ import annotations

import os
import time

import pytest

from medclr.data.index_processes import deadline, in_processes
from medclr.errors import ScanError


def square(number: int) -> int:
    return number * number


def deadly(number: int) -> int:
    if number % 10 == 3:
        os._exit(1)
    return number * number


def slow(number: int) -> str:
    try:
        with deadline(seconds=0.3):
            time.sleep(5 if number == 2 else 0)
    except ScanError as error:
        return error.problem
    return ""


def stuck(number: int) -> str:
    """Does not come back from a call that no signal ends."""
    with deadline(seconds=0.1):
        if number == 2:
            import signal

            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(60)
    return ""


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7])
def test_every_item_comes_back_once(workers: int, chunk: int) -> None:
    found = list(in_processes(square, range(100), workers=workers, lost=square, chunk=chunk))
    assert sorted(found) == [(number, number * number) for number in range(100)]


def test_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []
    items = (taken.append(number) or number for number in range(1000))  # type: ignore[func-returns-value]
    results = in_processes(square, items, workers=2, lost=square, chunk=2)
    next(results)
    assert len(taken) <= 40
    results.close()  # type: ignore[attr-defined]


def test_an_item_that_kills_its_process_is_lost_and_no_other() -> None:
    found = dict(in_processes(deadly, range(30), workers=2, lost=lambda number: -number, chunk=3))
    assert found == {number: -number if number % 10 == 3 else number * number for number in range(30)}


def test_what_takes_too_long_is_stopped() -> None:
    began = time.monotonic()
    found = dict(in_processes(slow, range(4), workers=2, lost=str))
    assert found == {0: "", 1: "", 2: "The file takes too long to read.", 3: ""}
    assert time.monotonic() - began < 4


def test_what_does_not_come_back_ends_with_its_process() -> None:
    began = time.monotonic()
    found = dict(in_processes(stuck, range(4), workers=2, lost=lambda _: "lost"))
    assert found == {0: "", 1: "", 2: "lost", 3: ""}
    assert time.monotonic() - began < 20
