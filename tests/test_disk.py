from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medclr.disk import remove_parts, replacing, try_writing


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file.bin").write_bytes(b"old")
    return tmp_path / "file.bin"


def test_a_file_takes_the_place_of_another_at_the_end_and_not_before(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file.bin"]


def test_folders_are_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "deep" / "folder" / "file") as file:
        file.write(b"new")
    assert (tmp_path / "deep" / "folder" / "file").read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_alone(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replacing(path) as file:  # noqa: PT012
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert names(path.parent) == ["file.bin"]


class FullDisk(io.FileIO):
    def write(self, data: Any) -> int:
        super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def full_disk(path: Path, mode: str) -> FullDisk:
    return FullDisk(path, mode)


def failing(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


FAULTS = [(Path, "open", full_disk), (os, "fsync", failing), (os, "replace", failing)]
"""What to patch, for a disk that is full or fails at each step of writing a file."""
FAULT = "No space left|Input/output error"


@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS)
def test_a_disk_that_fails_leaves_the_old_file_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: Any
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(OSError, match=FAULT), replacing(path) as file:
        file.write(b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(path.parent) == ["file.bin"]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else f"{os.fstat(handle).st_size} bytes")
        fsync(handle)

    def noted_replace(*paths: Any) -> None:
        steps.append("name")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with replacing(path) as file:
        file.write(b"four")
    assert steps == ["4 bytes", "name", "folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from medclr.disk import replacing
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "rename":
    os.replace = die
with replacing(Path(sys.argv[1])) as file:
    file.write(b"new" * 100_000)
    if sys.argv[2] == "write":
        die()
"""


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_process_that_is_killed_leaves_the_old_file_and_a_part_that_can_be_removed(path: Path, moment: str) -> None:
    (path.parent / "other.part").write_bytes(b"not ours")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert path.read_bytes() == b"old"
    assert len(names(path.parent)) == 3
    remove_parts(path.parent)
    assert names(path.parent) == ["file.bin", "other.part"]
    assert path.read_bytes() == b"old"


def test_no_parts_are_removed_from_a_folder_that_is_not_there(tmp_path: Path) -> None:
    remove_parts(tmp_path / "nowhere")


def test_trying_leaves_the_file_as_it_is_and_makes_its_folder(path: Path) -> None:
    try_writing(path)
    assert path.read_bytes() == b"old"
    try_writing(path.parent / "new" / "file")
    assert names(path.parent) == ["file.bin", "new"]
    assert names(path.parent / "new") == []


@pytest.mark.parametrize("place", ["", "file.bin/file", "x" * 250])
def test_trying_finds_what_writing_would(path: Path, place: str) -> None:
    target = path.parent / place
    with pytest.raises(OSError):  # noqa: PT011
        try_writing(target)
    with pytest.raises(OSError), replacing(target):  # noqa: PT011
        pass
    assert names(path.parent) == ["file.bin"]
