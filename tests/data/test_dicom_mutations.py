"""Damaged DICOM files: no crash, no hang, little memory, and never a volume in a wrong place."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.data.dicom_mutations import Case, run_all

MUTATIONS = 1000
MOST_SECONDS = 10
MOST_MEMORY = 2 * 2**30


def judged(root: Path, folder: Path, seeds: range) -> list[Case]:
    # In a process of its own, whose memory is that of the reading alone, and whose crash would fail one test.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        cases, memory = pool.submit(run_all, root, folder, seeds).result()
    assert len(cases) == len(seeds)
    assert [case for case in cases if case.wrong] == []
    assert max(case.seconds for case in cases) < MOST_SECONDS
    assert memory < MOST_MEMORY
    return cases


@pytest.fixture
def dicom_dir(data_dir: Path) -> Path:
    if not (data_dir / "dicom").is_dir():
        pytest.skip("real DICOM files not found: no folder dicom among the real scans")
    return data_dir / "dicom"


def test_damaged_files_are_refused_or_read_right(dicom_dir: Path, tmp_path: Path) -> None:
    cases = judged(dicom_dir, tmp_path, range(0, 7 * 120, 7))
    outcomes = Counter(case.outcome for case in cases)
    assert outcomes["accepted"] > 10  # some damage does no harm,
    assert outcomes["refused"] > 10  # and some does
    assert any(case.harmless for case in cases)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_thousand_damaged_files_are_refused_or_read_right(dicom_dir: Path, tmp_path: Path) -> None:
    cases = judged(dicom_dir, tmp_path, range(10**6, 10**6 + MUTATIONS))
    assert len({(case.source, case.kind) for case in cases}) > 150
    assert sum(case.harmless for case in cases) > 50
