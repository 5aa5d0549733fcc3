from __future__ import annotations

import contextlib
import gc
import json
import logging
import multiprocessing
import os
import pickle
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medclr.data import Preprocessing, Quarantine, ScanReader, Volume
from medclr.engine import explained
from medclr.errors import ConfigError, DatalistError, ScanError
from medclr.evaluate import ScanDataset
from tests.engine.test_failures import all_of

MB = 2**20


def unusable(got: str = "noise") -> ScanError:
    return ScanError("The scan is bad.", got=got, wanted="anatomy", fix="Scan again.")


class Invented:
    """Stands in for the preprocessing: volumes of ``row["mb"]`` megabytes, ``ScanError`` for ``row["bad"]``."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.looked_at: list[weakref.ref[torch.Tensor]] = []

    def volume(self, row: Mapping[str, Any]) -> Volume:
        self.reads.append(row["image"])
        voxels = torch.zeros(1, 1, 1, int(row.get("mb", 1) * MB) // 4 - 17)
        if row.get("bad"):
            self.looked_at.append(weakref.ref(voxels))
            raise unusable()
        return Volume(voxels, torch.eye(4), torch.ones(4, dtype=torch.bool))  # 17 numbers of 4 bytes beside the voxels


def rows(*sizes: float) -> list[dict[str, Any]]:
    return [{"image": f"{place}", "mb": size} for place, size in enumerate(sizes)]


def reader(cache_mb: float = 1000, quarantine: Quarantine | None = None) -> tuple[ScanReader, list[str]]:
    invented = Invented()
    return ScanReader(invented, cache_mb=cache_mb, quarantine=quarantine), invented.reads  # type: ignore[arg-type]


def test_a_scan_that_fits_in_the_cache_is_read_once() -> None:
    scans, reads = reader()
    first = scans.read(0, {"image": "0"})
    assert scans.read(0, {"image": "0"}) is first
    assert reads == ["0"]


def test_the_cache_counts_bytes_and_drops_the_scan_that_was_used_longest_ago() -> None:
    scans, reads = reader(cache_mb=10)
    table = rows(4, 4, 2, 3)
    for scan in (0, 1, 2):  # 10 MB: full
        scans.read(scan, table[scan])
    scans.read(0, table[0])  # now 1 was used longest ago
    scans.read(3, table[3])  # 3 MB do not fit: 1 goes
    assert reads == ["0", "1", "2", "3"]
    for scan in (0, 2, 3):
        scans.read(scan, table[scan])
    assert reads == ["0", "1", "2", "3"]
    scans.read(1, table[1])
    assert reads == ["0", "1", "2", "3", "1"]


def test_a_scan_larger_than_the_cache_is_read_each_time_and_pushes_nothing_out() -> None:
    scans, reads = reader(cache_mb=5)
    table = rows(2, 6)
    for scan in (0, 1, 0, 1):
        scans.read(scan, table[scan])
    assert reads == ["0", "1", "1"]


def test_without_a_cache_nothing_is_kept() -> None:
    scans, reads = reader(cache_mb=0)
    for _ in range(2):
        scans.read(0, {"image": "0"})
    assert reads == ["0", "0"]


@pytest.mark.parametrize("cache_mb", [-1, float("nan"), float("inf")])
def test_an_unusable_cache_is_refused(cache_mb: float) -> None:
    with pytest.raises(ConfigError):
        reader(cache_mb)


def test_a_scan_that_failed_is_not_read_again() -> None:
    scans, reads = reader()
    messages = []
    for _ in range(3):
        with pytest.raises(ScanError) as caught:
            scans.read(0, {"image": "0", "bad": True})
        messages.append(str(caught.value))
    assert reads == ["0"]
    assert messages == [str(unusable())] * 3
    assert scans.failed == {0}


def test_a_scan_that_failed_leaves_none_of_its_voxels_in_memory() -> None:
    invented = Invented()
    scans = ScanReader(invented)  # type: ignore[arg-type]
    for _ in range(3):
        with contextlib.suppress(ScanError):  # pytest.raises would keep the traceback
            scans.read(0, {"image": "0", "bad": True})
    gc.collect()
    assert len(invented.looked_at) == 1
    assert invented.looked_at[0]() is None


def test_a_scan_can_be_refused_after_it_was_read() -> None:
    scans, _ = reader()
    scans.read(0, {"image": "0"})
    scans.refuse(0, unusable("no mask"))
    with pytest.raises(ScanError, match="no mask"):
        scans.read(0, {"image": "0"})
    assert list(scans.quarantine.reasons()) == [0]


def test_a_reader_that_serves_two_lists_is_refused_instead_of_giving_the_wrong_scan() -> None:
    scans, _ = reader()
    scans.preload(rows(1, 1))
    scans.preload(rows(1, 1))  # the same list again is fine
    with pytest.raises(ConfigError, match="two lists"):
        scans.preload([{"image": "elsewhere"}])


def test_preload_reads_until_the_cache_is_full_and_keeps_what_it_read() -> None:
    for sizes, kept in (((4, 4, 4, 4), 2), ((3, 3, 3, 1.5), 3), ((11, 1, 1), 0)):
        scans, reads = reader(cache_mb=10)
        table = rows(*sizes)
        scans.preload(table)
        assert reads == [str(scan) for scan in range(kept + 1)]  # one more, to see that it does not fit
        for scan in range(kept):
            scans.read(scan, table[scan])
        assert len(reads) == kept + 1


def test_preload_of_the_whole_list_finds_every_bad_scan_and_keeps_no_more_than_fits() -> None:
    scans, reads = reader(cache_mb=10)
    table = rows(4, 4, 4, 4, 4)
    table[1]["bad"] = table[4]["bad"] = True
    scans.preload(table, whole=True)
    assert reads == ["0", "1", "2", "3", "4"]
    assert scans.failed == {1, 4}
    for scan in (0, 2):
        scans.read(scan, table[scan])
    assert len(reads) == 5
    scans.read(3, table[3])
    assert len(reads) == 6


def test_preload_of_nothing_but_bad_scans_says_why() -> None:
    scans, _ = reader()
    with pytest.raises(DatalistError) as caught:
        scans.preload([{"image": "0", "bad": True}, {"image": "1", "bad": True}])
    assert "2 scans" in str(caught.value)
    assert "The scan is bad." in str(caught.value)


def test_preload_of_an_empty_list_does_nothing() -> None:
    scans, reads = reader()
    scans.preload([])
    assert reads == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts this process's open files in /proc")
def test_preload_opens_no_files_that_stay_open(cohort: list[dict]) -> None:
    scans = ScanReader(Preprocessing(("image", "label")))
    before = len(os.listdir("/proc/self/fd"))
    scans.preload(cohort)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_forked_worker_finds_what_was_preloaded() -> None:
    scans, _ = reader()
    scans.preload(rows(1, 1))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_reads_after, (scans,)) == ["0", "1"]


def _reads_after(scans: ScanReader) -> list[str]:
    for scan, row in enumerate(rows(1, 1)):
        scans.read(scan, row)
    return scans.preprocessing.reads  # type: ignore[attr-defined]


def test_a_reader_survives_pickling_with_what_it_knows() -> None:
    scans, _ = reader()
    scans.read(1, {"image": "1"})
    with pytest.raises(ScanError):
        scans.read(0, {"image": "0", "bad": True})
    copy = pickle.loads(pickle.dumps(ScanReader(Preprocessing(spacing=(1, 1, 1)), quarantine=scans.quarantine)))  # noqa: S301
    assert copy.preprocessing.describe() == Preprocessing(spacing=(1, 1, 1)).describe()
    assert list(copy.quarantine.reasons()) == [0]


# Quarantine


def test_quarantine_keeps_the_first_reason_and_tells_it_once(caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine()
    with caplog.at_level(logging.WARNING):
        quarantine.add(3, unusable("noise"))
        quarantine.add(3, unusable("motion"))
        quarantine.add(1, unusable("motion"))
    assert list(quarantine.reasons()) == [1, 3]
    assert "noise" in quarantine.reasons()[3]
    for part in ("The scan is bad.", "anatomy", "Scan again."):
        assert part in quarantine.reasons()[3]
    assert len(caplog.records) == 2
    assert "scan 3" in caplog.records[0].getMessage()


def test_without_a_bad_scan_there_is_no_file(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl")
    assert quarantine.reasons() == {}
    assert list(tmp_path.iterdir()) == []


def _add_many(quarantine: Quarantine, first: int) -> None:
    logging.disable(logging.WARNING)
    for scan in range(first, 600, 2):
        quarantine.add(scan, unusable("x" * 300))
    quarantine.add(7, unusable(f"seen by {first}"))


def test_processes_that_share_the_file_merge_what_they_found(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    mine = Quarantine(path)
    mine.add(1000, unusable("mine"))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_many, args=(Quarantine(path), first)) for first in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    reasons = mine.reasons()
    assert list(reasons) == [*range(600), 1000]
    for line in path.read_text().splitlines():
        assert set(json.loads(line)) == {"scan", "reason"}


def test_half_a_line_is_passed_over(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    quarantine.add(2, unusable())
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"scan": 5, "rea')
    assert list(quarantine.reasons()) == [2]


def test_what_an_earlier_run_left_in_the_file_stays_and_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add(2, unusable("earlier"))
    now = Quarantine(path)
    assert now.reasons() == {}
    now.add(5, unusable())
    assert list(now.reasons()) == [5]
    assert [json.loads(line)["scan"] for line in path.read_text().splitlines()] == [2, 5]


def test_real_scans_are_told_by_number_alone(
    cohort: list[dict], write_scan: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cohort[1]["image"] = write_scan("Doe_Jane", np.full((5, 6, 7), 2.0, np.float32))
    scans = ScanReader(Preprocessing(), quarantine=Quarantine(tmp_path / "quarantine.jsonl"))
    with caplog.at_level(logging.INFO):
        scans.preload(cohort)
    assert scans.failed == {1}
    for text in (caplog.text, (tmp_path / "quarantine.jsonl").read_text()):
        assert "constant" in text
        assert "Doe" not in text
        assert "patient 0" not in text


# A limit to what may become unusable during a run


@pytest.mark.parametrize(
    ("limit", "scans", "allowed"),
    [(0.1, 130, 13), (0.1, 139, 13), (0.1, 5, 1), (0.0, 50, 1), (0.29, 100, 29), (0.5, 3, 1), (1.0, 4, 4)],
)
def test_more_bad_scans_than_the_limit_stop_the_run(limit: float, scans: int, allowed: int) -> None:
    quarantine = Quarantine(limit=limit)
    quarantine.watch(scans)
    for scan in range(allowed):
        quarantine.add(scan, unusable())
        quarantine.add(scan, unusable())  # again: not counted again
    if allowed == scans:
        return
    with pytest.raises(DatalistError, match="Too many scans") as caught:
        quarantine.add(allowed, unusable("the last one"))
    message = str(caught.value)
    assert f"{allowed + 1} of {scans} since the start, the last: The scan is bad. Got the last one" in message
    assert f"at most {allowed} (max_bad_scans: {limit:g})" in message
    for hint in ("mounted", "raise max_bad_scans"):
        assert hint in caught.value.fix
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # noqa: S301
    assert allowed in quarantine.reasons()


def test_what_was_bad_from_the_start_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, limit=0.2)
    for scan in range(5):
        quarantine.add(scan, unusable())  # before the watch: never too many
    quarantine.watch(10)
    for scan in range(7):
        quarantine.add(scan, unusable())
    with pytest.raises(DatalistError, match="3 of 10") as caught:
        quarantine.add(7, unusable())
    assert str(path) in caught.value.fix


def test_scans_that_other_processes_found_count_as_well(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    here, there = Quarantine(path, limit=0.2), Quarantine(path, limit=0.2)
    for quarantine in (here, there):
        quarantine.watch(10)
    here.add(0, unusable())
    there.add(0, unusable())
    there.add(1, unusable())
    with pytest.raises(DatalistError, match="3 of 10"):
        here.add(2, unusable())
    with pytest.raises(DatalistError, match="4 of 10"):
        there.add(3, unusable())


def test_without_a_watch_nothing_stops() -> None:
    quarantine = Quarantine(limit=0.0)
    for scan in range(50):
        quarantine.add(scan, unusable())
    assert len(quarantine.reasons()) == 50


@pytest.mark.parametrize("limit", [-0.1, 1.1, float("nan")])
def test_an_unusable_limit_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        Quarantine(limit=limit)


def test_a_reader_lets_the_error_through() -> None:
    scans, _ = reader(quarantine=Quarantine(limit=0.0))
    scans.quarantine.watch(9)
    with pytest.raises(ScanError):
        scans.read(0, {"image": "0", "bad": True})
    scans.read(1, {"image": "1"})
    with pytest.raises(DatalistError, match="Too many"):
        scans.refuse(1, unusable("no mask"))
    with pytest.raises(DatalistError, match="Too many"):
        scans.read(2, {"image": "2", "bad": True})
    with pytest.raises(DatalistError, match="Too many"):
        scans.preload([{"image": "0"}, {"image": "1"}, {"image": "2"}, {"image": "3", "bad": True}])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_is_gone_stops_the_embedding_of_scans(
    workers: int, write_scan: Callable[..., str], tmp_path: Path
) -> None:
    random = np.random.default_rng(2)
    listed = [
        {"image": write_scan(f"scan_{number}", random.random((5, 6, 7), np.float32)), "patient_id": number}
        for number in range(6)
    ]
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", limit=0.4)
    dataset = ScanDataset(listed, ScanReader(Preprocessing(), cache_mb=0, quarantine=quarantine))
    for row in listed[1:3]:
        Path(str(row["image"])).unlink()
    loader = DataLoader(dataset, num_workers=workers)
    assert [int(item["scan"]) for item in loader] == [0, -1, -1, 3, 4, 5]
    for row in listed[3:]:
        Path(str(row["image"])).unlink()
    with pytest.raises(DatalistError, match=r"Too many scans .* during the run") as caught, explained():
        all_of(loader)
    assert "of 6 since the start" in str(caught.value)
