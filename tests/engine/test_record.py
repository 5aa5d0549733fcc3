from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path

import pytest

from medclr.engine import RunRecord
from medclr.engine.record import PATIENTS, commit_of, hardware
from medclr.weights import Manifest


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_commit_is_that_of_the_checkout_and_says_where_files_differ(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    assert commit_of(tmp_path) is None, "a folder in a checkout that does not hold it has no commit"
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    commit = commit_of(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "file").write_text("two")
    assert commit_of(tmp_path) == f"{commit}-dirty"
    assert commit_of(tmp_path / "nowhere") is None


def test_the_hardware_has_no_name_of_the_machine() -> None:
    about = hardware()
    assert {"processor", "cores", "threads", "ranks"} <= set(about)
    assert Path("/etc/hostname").read_text().strip() not in json.dumps(about)


def test_attempts_add_up(tmp_path: Path) -> None:
    first = RunRecord(tmp_path / "run.json", seed=1, datalist_digest="d")
    first.start({"a": 1, "path": tmp_path}, step=0)
    earlier = first.so_far(7)
    second = RunRecord(tmp_path / "run.json", seed=1, datalist_digest="d")
    second.start({"a": 1}, step=7, earlier=earlier)
    second.end(9, "completed")
    content = json.loads((tmp_path / "run.json").read_text())
    assert [attempt["to_step"] for attempt in content["attempts"]] == [7, 9]
    assert content["wall_s"] == pytest.approx(sum(attempt["wall_s"] for attempt in content["attempts"]), abs=0.1)
    assert second.for_weights()["attempts"] == 2


def test_patients_of_all_attempts_are_kept_and_stand_in_the_checkpoint_alone(tmp_path: Path) -> None:
    a, b, c = ("a" * 16, "b" * 16, "c" * 16)
    first = RunRecord(tmp_path / "run.json", patients={"training": [b], "validation": None})
    first.start({}, step=0)
    earlier = json.loads(json.dumps(first.so_far(7)))
    second = RunRecord(tmp_path / "run.json", patients={"training": [a, b], "validation": [c]})
    second.start({}, step=7, earlier=earlier)
    assert second.seen_patients() == {"training": [a, b], "validation": [c]}
    third = RunRecord(tmp_path / "run.json", patients={"training": [c], "validation": None})
    third.start({}, step=9, earlier=second.so_far(9))
    third.end(11, "completed")
    assert third.seen_patients() == {"training": [a, b, c], "validation": [c]}
    assert a not in (tmp_path / "run.json").read_text()
    assert [PATIENTS in attempt for attempt in third.so_far(11)] == [False, False, True]
    assert a not in json.dumps(third.for_weights())


def test_a_run_that_records_no_patients_keeps_none_of_earlier_attempts() -> None:
    first = RunRecord(None, patients={"training": ["a" * 16]})
    first.start({}, step=0)
    second = RunRecord(None)
    second.start({}, step=7, earlier=first.so_far(7))
    assert second.seen_patients() is None
    assert "a" * 16 not in json.dumps(second.so_far(8))


def test_what_goes_with_the_weights_holds_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datalist = str(tmp_path / "jane" / "split.json")
    words = ["--datalist", datalist, "--output_dir", "doe_jane_19600131", "--pretrained=jane", "--rate", "0.1"]
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "monai.bundle", *words])
    record = RunRecord(None)
    record.start({"datalist": datalist, "output_dir": "doe_jane", "predictions": "jane", "rate": 0.1}, step=0)
    assert "jane" not in json.dumps([record.for_weights(), record.settings()])
    assert record.for_weights()["command"][-2:] == ["--rate", "0.1"]
    text = Manifest("SimCLR", settings=record.settings(), run=record.for_weights()).to_json()
    assert "jane" not in text
    assert "monai.bundle" in text
    assert '"rate": 0.1' in text


def test_a_file_that_cannot_be_written_is_said_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    record = RunRecord(tmp_path / "file" / "run.json")
    with caplog.at_level(logging.WARNING):
        record.start({}, step=0)
    assert any("cannot be written" in message for message in caplog.messages)
