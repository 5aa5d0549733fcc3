from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medclr.engine import CheckpointFolder, explain
from medclr.errors import ConfigError, MedclrError

STATE = {"weights": torch.arange(300.0), "nested": {"rates": [0.1, 0.2], "none": None, "flag": True}}


def write_several(folder: CheckpointFolder, steps: int) -> None:
    for step in range(1, steps + 1):
        folder.write({**STATE, "step": step}, {"step": step, "note": "ä"})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "deep" / "checkpoints")
    name = folder.write(STATE, {"step": 300})
    found = CheckpointFolder(tmp_path / "deep" / "checkpoints").newest()
    assert found is not None
    assert found.name == name
    assert found.about["step"] == 300
    assert torch.equal(found.state["weights"], STATE["weights"])
    assert found.state["nested"] == STATE["nested"]


def test_an_empty_or_absent_folder_holds_none(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path).newest() is None
    assert CheckpointFolder(tmp_path / "absent").newest() is None


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_few_are_kept(tmp_path: Path, keep: int) -> None:
    folder = CheckpointFolder(tmp_path, keep=keep)
    write_several(folder, 9)
    assert [int(name.rsplit("_", 1)[1]) for name in folder.names()] == list(range(9, 9 - keep, -1))
    assert len(list(tmp_path.iterdir())) == 2 * keep


def test_the_same_step_can_be_written_twice(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.write({"turn": 1}, {"step": 5})
    folder.write({"turn": 2}, {"step": 5})
    found = folder.newest()
    assert found is not None
    assert found.state == {"turn": 2}


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_a_damaged_newest_one_is_passed_over_with_a_warning_and_goes_with_the_next_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, damage: str
) -> None:
    folder = CheckpointFolder(tmp_path)
    write_several(folder, 3)
    newest, older = folder.names()
    file = tmp_path / f"{newest}{suffix}"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": bytes(content[:-9]), "flip": bytes(content), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        found = folder.newest()
    assert found is not None
    assert found.name == older
    if (suffix, damage) == (".json", "gone"):  # it never became a checkpoint
        assert not caplog.messages
    else:
        assert any("damaged" in message and older in message for message in caplog.messages)
    folder.write(STATE, {"step": 4})
    folder.clean()
    assert len(folder.names()) == 2
    assert len(list(tmp_path.iterdir())) == 4
    assert older in folder.names()


def test_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    write_several(folder, 2)
    for file in tmp_path.glob("*.pt"):
        file.write_bytes(b"no zip")
    with pytest.raises(MedclrError, match="No checkpoint of the run can be read") as caught:
        folder.newest()
    assert "resume: never" in caught.value.fix


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    write_several(folder, 2)
    newest = folder.names()[0]
    torch.save({"function": subprocess.run}, tmp_path / f"{newest}.pt")
    about = json.loads((tmp_path / f"{newest}.json").read_text())
    import hashlib

    del about["sha256"]
    about["state_sha256"] = hashlib.sha256((tmp_path / f"{newest}.pt").read_bytes()).hexdigest()
    about["sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    (tmp_path / f"{newest}.json").write_text(json.dumps(about))
    found = folder.newest()
    assert found is not None
    assert found.about["step"] == 1


def mutations(seed: int, content: bytes) -> bytes:
    """One of several kinds of damage, never none."""
    dice = random.Random(seed)
    place, length = dice.randrange(len(content)), dice.randrange(1, 40)
    changed = bytearray(content)
    kinds: list[Callable[[], Any]] = [
        lambda: changed.__setitem__(place, changed[place] ^ (1 << dice.randrange(8))),
        lambda: changed.__delitem__(slice(place, None)),
        lambda: changed.__delitem__(slice(place, place + length)),
        lambda: changed.__setitem__(slice(place, place), dice.randbytes(length)),
        lambda: changed.__setitem__(slice(place, place + length), dice.randbytes(length)),
        lambda: changed.extend(dice.randbytes(length)),
        lambda: changed.__setitem__(slice(place, place), changed[place : place + length]),
    ]
    dice.choice(kinds)()
    return bytes(changed) if bytes(changed) != content else content[:-1]


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_no_damage_is_taken_for_a_checkpoint(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = CheckpointFolder(tmp_path)
    write_several(folder, 2)
    newest, older = folder.names()
    original = (tmp_path / f"{newest}{suffix}").read_bytes()
    said = json.loads((tmp_path / f"{newest}.json").read_text())
    for seed in range(100):
        content = mutations(seed, original)
        (tmp_path / f"{newest}{suffix}").write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = CheckpointFolder(tmp_path).newest()
        assert found is not None
        if found.name == newest:  # a space between two values, or an escaped letter, may differ
            assert suffix == ".json", f"seed {seed}"
            assert json.loads(content) == said, f"seed {seed}"
        else:
            assert found.name == older
            assert any("damaged" in message for message in caplog.messages), f"seed {seed}"


KILLED_WHILE_WRITING = """
import os, signal, sys, torch
from medclr.engine import CheckpointFolder, explain
folder = CheckpointFolder(sys.argv[1])
folder.write({"weights": torch.zeros(10)}, {"step": 1})
replace, left = os.replace, int(sys.argv[2])
def dying(*args):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    replace(*args)
os.replace = dying
folder.write({"weights": torch.ones(10)}, {"step": 2})
print("written")
"""


@pytest.mark.parametrize(("renames", "step"), [(0, 1), (1, 1), (2, 2)])
def test_being_killed_between_write_and_rename_loses_nothing(tmp_path: Path, renames: int, step: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path), str(renames)], capture_output=True, check=False
    )
    assert (b"written" in done.stdout) == (step == 2), done.stderr.decode()
    folder = CheckpointFolder(tmp_path)
    assert len(list(tmp_path.iterdir())) > 2
    folder.clean()
    assert len(list(tmp_path.iterdir())) == 2 * step
    found = folder.newest()
    assert found is not None
    assert found.about["step"] == step
    assert float(found.state["weights"][0]) == step - 1


def test_a_folder_that_is_a_file_or_has_no_room_is_noticed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        CheckpointFolder(tmp_path / "file" / "checkpoints").refuse_unusable(1)
    with pytest.raises(ConfigError, match="no room") as caught:
        CheckpointFolder(tmp_path / "checkpoints").refuse_unusable(2**60)
    assert "MB" in str(caught.value)
    CheckpointFolder(tmp_path / "checkpoints").refuse_unusable(2**20)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_that_is_really_full_leaves_the_checkpoint_before(small_disk: Path) -> None:
    folder = CheckpointFolder(small_disk / "checkpoints", keep=1)
    folder.write({"weights": torch.ones(6000)}, {"step": 1})
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}
    with pytest.raises(OSError, match="No space left") as caught:
        folder.write({"weights": torch.ones(12000)}, {"step": 2})
    assert isinstance(explain(caught.value), MedclrError)
    assert "disk is full" in str(explain(caught.value))
    assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before
    with pytest.raises(ConfigError, match="no room"):
        folder.refuse_unusable(40_000)
    folder.write({"weights": torch.ones(6000)}, {"step": 2})
    found = folder.newest()
    assert found is not None
    assert found.about["step"] == 2


def test_clearing_removes_checkpoints_alone(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    write_several(folder, 2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "my_step_1.json").write_text("{}")
    folder.clear()
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "my_step_1.json"}


@pytest.mark.parametrize("keep", [0, -1, 1.5])
def test_an_unusable_number_to_keep_is_refused(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(ConfigError, match="keep"):
        CheckpointFolder(tmp_path, keep=keep)
