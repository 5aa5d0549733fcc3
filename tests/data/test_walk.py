from __future__ import annotations

from pathlib import Path

import pytest

from medclr.data.walk import DICOM, OTHER, REFUSED, VOLUME, kind_of, walk


def test_files_come_folder_by_folder_and_hidden_ones_do_not(tmp_path: Path) -> None:
    for name in ("b/2.dcm", "b/1.dcm", "a.nii", ".git/x.nii", "b/._1.dcm", "home/key"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = list(walk(tmp_path, tmp_path / "home"))
    assert [file.path for file in found] == ["a.nii", "b/1.dcm", "b/2.dcm"]
    assert {(file.size, file.refused) for file in found} == {(1, None)}


def test_links_stay_inside_and_are_met_once(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    (root / ".annex").mkdir(parents=True)
    (root / "a.nii").write_text("a")
    (root / ".annex" / "key").write_text("b")
    (tmp_path / "outside.nii").write_text("c")
    (root / "annexed.nii").symlink_to(root / ".annex" / "key")
    (root / "again.nii").symlink_to("a.nii")
    (root / "out.nii").symlink_to(tmp_path / "outside.nii")
    (root / "broken.nii").symlink_to(root / ".annex" / "gone")
    (root / "loop").symlink_to(root)
    found = {file.path: file.refused and file.refused.problem for file in walk(root)}
    assert found == {
        "a.nii": None,
        "annexed.nii": None,
        "again.nii": "The scan is a duplicate.",
        "out.nii": "The file is a link that leaves the folder.",
        "broken.nii": "The file cannot be read.",
        "loop": "The folder is a link, which is not followed.",
    }


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    try:
        (tmp_path / "a\udcff.nii").write_text("x")
    except OSError:
        pytest.skip("this file system has no such names")
    (found,) = walk(tmp_path)
    assert found.path == "a\\xff.nii"
    assert found.refused is not None


HEADLESS = b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" + b"\0" * 200


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.nii.gz", b"", VOLUME),
        ("a.MHA", b"", VOLUME),
        ("a.txt", b"\0" * 128 + b"DICM", DICOM),
        ("IM0001", HEADLESS, DICOM),
        ("1.2.840.5", HEADLESS, DICOM),
        ("a.dcm", HEADLESS, DICOM),
        ("a.dcm", b"text", REFUSED),
        ("a.txt", HEADLESS, OTHER),
        ("README", b"a readme of some length, which is text", OTHER),
        ("a.img", b"\0" * 128 + b"DICM", DICOM),
        ("a.img", b"analyze", REFUSED),
        ("a.npz", b"PK", REFUSED),
        ("a.tar.gz", b"PK", REFUSED),
        ("a.json", b"{}", OTHER),
        ("a.dcmseries", b"{}", OTHER),
        ("empty", b"", OTHER),
    ],
)
def test_a_file_is_known_by_its_name_and_its_first_bytes(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(content)
    found, error = kind_of(tmp_path / name, name)
    assert found == kind
    assert (error is not None) == (kind == REFUSED)
