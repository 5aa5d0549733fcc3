from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from medclr.data.datalist import read_datalist
from medclr.data.index import index
from medclr.data.load import LoadScand
from tests.data.index_files import save_series


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One scan of each file type, one of them with a label, under names and with headers that tell whose they are."""
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path / "home"))
    root = tmp_path / "QUUX"
    save_series(root / "ID0001", 1)
    voxels = np.random.default_rng(0).integers(0, 99, (4, 5, 6))
    image = nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([1, 2, 3, 1]))
    image.header["descrip"] = b"Quux^Zelda"
    for folder in ("images", "labels"):
        (root / folder).mkdir()
        nibabel.save(image, root / folder / "zelda.nii.gz")
    other = SimpleITK.GetImageFromArray(voxels.astype(np.int64))
    other.SetMetaData("Patient", "Quux^Zelda")
    SimpleITK.WriteImage(other, root / "images" / "other.nrrd")
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_hold_voxels_and_place_and_not_a_word(mixture: Path, tmp_path: Path, workers: int) -> None:
    result = index(mixture, patients="{patient}.nii", workers=workers, hide_subjects=True)
    result.write(tmp_path / "plain" / "list.json")
    result = index(mixture, patients="images/{patient}.*", workers=workers)
    result.write(tmp_path / "out" / "list.json", export=tmp_path / "copies", workers=workers)
    plain, copied = (read_datalist(tmp_path / name / "list.json").training for name in ("plain", "out"))
    assert len(copied) == 3
    assert sum("label" in row for row in copied) == 1
    assert {Path(row["image"]).suffixes[-2] for row in copied} == {".nii"}
    load = LoadScand(["image", "label"])
    by_content = {row["content"]: load(row) for row in copied}
    for row in plain:
        mine, wanted = by_content[row["content"]]["image"], load(row)["image"]
        np.testing.assert_array_equal(mine, wanted)
        np.testing.assert_allclose(mine.affine, wanted.affine, atol=1e-4)
    files = [path for folder in ("copies", "out") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert not list((tmp_path / "out").glob("*_series"))
    for path in files:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        text = (str(path.relative_to(tmp_path)).encode() + content).lower()
        assert b"quux" not in text.replace(b"id", b"id")
        assert b"zelda" not in text
        assert b"id0001" not in text


def test_a_scan_that_went_missing_is_quarantined_and_no_row(mixture: Path, tmp_path: Path) -> None:
    result = index(mixture, patients="images/{patient}.*", workers=1)
    (mixture / "images" / "other.nrrd").unlink()
    result.write(tmp_path / "out" / "list.json", export=tmp_path / "copies")
    assert len(read_datalist(tmp_path / "out" / "list.json").training) == 2
    assert "other.nrrd" in (tmp_path / "out" / "quarantine.json").read_text()
