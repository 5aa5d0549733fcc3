from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medclr.data.index
from medclr.data.index import IndexResult, index
from medclr.data.index_store import Store
from medclr.data.nifti import Probe
from medclr.data.walk import Source
from tests.data.index_files import save_series

SCANS = 120


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("READ_LOG", str(tmp_path / "log"))
    return tmp_path / "home"


def find_slow(files: Any) -> list[str]:
    return [file for file in files if file.endswith(".scan")]


def probe_slow(path: Path, *, check_voxels: bool = True, is_label: bool = False) -> Probe:
    time.sleep(float(path.parent.joinpath("pause").read_text()))
    with open(os.environ["READ_LOG"], "a") as log:
        log.write(f"{path.name}\n")
    return Probe((2, 2, 2), np.eye(4), (1, 1, 1), "uint8", path.read_text())


SLOW = Source(find_slow, probe_slow)


def run(folder: Path, workers: int) -> IndexResult:
    return index(folder, patients="{patient}_*", source=SLOW, workers=workers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "scans"
    root.mkdir()
    for number in range(SCANS):
        (root / f"P{number:03d}_a.scan").write_text(str(number))
    (root / "pause").write_text("0.04")
    return root


def reads() -> Counter[str]:
    log = Path(os.environ["READ_LOG"])
    return Counter(log.read_text().split() if log.exists() else [])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(folder: Path, tmp_path: Path, how: signal.Signals) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    code += f"from pathlib import Path; from tests.data.test_index_resume import run; run(Path({str(folder)!r}), 2)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(reads()) < SCANS * 3 // 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(how)
    assert process.wait(20) != 0
    before = reads()
    assert 0 < len(before) < SCANS
    assert children
    limit = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(is_alive(child) for child in children)

    before = reads()
    (folder / "pause").write_text("0")
    result = run(folder, 2)
    twice = sum(count > 1 for count in reads().values())
    # What a killed run had not put on the disk is read again: a second's worth, and what was under way.
    assert twice <= (10 if how == signal.SIGINT else 60)
    assert twice < len(before)
    assert result.summary["scans"] == SCANS
    assert result == index(folder, patients="{patient}_*", source=SLOW, workers=1, fresh=True)


def is_alive(process: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_file_that_did_not_change_is_not_read_again(folder: Path) -> None:
    (folder / "pause").write_text("0")
    run(folder, 1)
    (folder / "P000_a.scan").write_text("changed")
    (folder / "P001_a.scan").unlink()
    (folder / "P999_a.scan").write_text("new")
    result = run(folder, 1)
    assert {name for name, count in reads().items() if count > 1} == {"P000_a.scan"}
    assert result.summary["scans"] == SCANS
    names = [Path(row["image"]).name for row in result.datalist.training]
    assert "P999_a.scan" in names
    assert "P001_a.scan" not in names
    index(folder, patients="{patient}_*", source=SLOW, workers=1, fresh=True)
    assert sum(reads().values()) == 2 * SCANS + 2


def test_dicom_headers_and_series_that_did_not_change_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "export"
    for number in range(3):
        save_series(root / str(number), number)
    seen: list[str] = []
    look_at, read_one = medclr.data.index.look_at, medclr.data.index_dicom._read_one

    def look(folder: Path, sources: Any, name: str) -> Any:
        seen.append(name)
        return look_at(folder, sources, name)

    def read(folder: Path, check_voxels: bool, task: Any) -> str:
        seen.append("series")
        return read_one(folder, check_voxels, task)

    monkeypatch.setattr(medclr.data.index, "look_at", look)
    monkeypatch.setattr(medclr.data.index_dicom, "_read_one", read)
    first = index(root, workers=1)
    assert Counter(seen)["series"] == 3
    assert len(seen) == 3 + 12
    seen.clear()
    assert index(root, workers=1) == first
    assert seen == []
    (root / "1" / "0.dcm").unlink()
    index(root, workers=1)
    assert seen == ["series"]
    seen.clear()
    index(root, workers=1, check_voxels=False)
    assert seen == ["series"] * 3


def test_the_store_is_private_and_of_one_folder(folder: Path, home: Path) -> None:
    (folder / "pause").write_text("0")
    run(folder, 1)
    files = list((home / "index").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) & 0o077 for file in files if file.suffix == ".sqlite"} == {0}
    assert stat.S_IMODE((home / "index").stat().st_mode) == 0o700
    store = "from medclr.data.index_store import Store\nfrom pathlib import Path\n"
    code = f"{store}Store.open(Path({str(folder)!r})).__enter__()"
    with Store.open(folder):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "The working store of the index cannot be used" in done.stderr


def test_a_store_that_is_damaged_is_made_anew(folder: Path, home: Path) -> None:
    (folder / "pause").write_text("0")
    run(folder, 1)
    (file,) = (home / "index").glob("*.sqlite")
    file.write_bytes(b"no database" * 1000)
    assert run(folder, 1).summary["scans"] == SCANS


def test_another_form_of_the_store_begins_anew(folder: Path, home: Path) -> None:
    (folder / "pause").write_text("0")
    run(folder, 1)
    (file,) = (home / "index").glob("*.sqlite")
    with sqlite3.connect(file) as database:
        database.execute("UPDATE facts SET value = 'older' WHERE name = 'form'")
    run(folder, 1)
    assert set(reads().values()) == {2}


def test_what_is_found_outlives_the_store(folder: Path, tmp_path: Path) -> None:
    (folder / "pause").write_text("0")
    result = run(folder, 1)
    index(folder, patients="{patient}_*", source=SLOW, images="P00*", workers=1)
    result.write(tmp_path / "list.json")
    assert len(json.loads((tmp_path / "list.json").read_text())["training"]) == SCANS
