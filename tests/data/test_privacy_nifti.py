from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from medclr.data.privacy import export_nifti
from medclr.errors import DatalistError, ScanError
from tests.conftest import AFFINES

NIFTI_TEXT = ("descrip", "aux_file", "db_name", "intent_name")


def phantom(dtype: Any) -> NDArray[Any]:
    return (np.random.default_rng(0).random((7, 6, 5)) * 100).astype(dtype)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())
def test_a_copy_has_the_voxels_and_their_place(tmp_path: Path, affine: NDArray[np.float64], suffix: str) -> None:
    path = tmp_path / "sub" / f"copy{suffix}"
    export_nifti(phantom(np.int16), affine, path)
    read: Any = nibabel.load(path)
    assert np.array_equal(np.asarray(read.dataobj), phantom(np.int16))
    assert read.get_data_dtype() == np.int16
    assert np.allclose(read.affine, affine, atol=1e-4)
    assert np.allclose(read.get_qform(), affine, atol=1e-3)
    assert read.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, ">i2", np.uint16, np.int32, np.float16, np.float32, float])
def test_every_type_that_nifti_has_is_written_exactly(tmp_path: Path, dtype: Any) -> None:
    export_nifti(phantom(dtype), np.eye(4), tmp_path / "copy.nii")
    read: Any = nibabel.load(tmp_path / "copy.nii")
    assert np.array_equal(np.asarray(read.dataobj), phantom(dtype))


def test_a_skewed_affine_keeps_its_shear(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.2
    export_nifti(phantom(np.int16), affine, tmp_path / "copy.nii")
    assert np.allclose(nibabel.load(tmp_path / "copy.nii").affine, affine)  # type: ignore[attr-defined]


def test_a_copy_holds_not_a_word(tmp_path: Path) -> None:
    export_nifti(phantom(np.int16), np.eye(4), tmp_path / "doe_john.nii.gz")
    read: Any = nibabel.load(tmp_path / "doe_john.nii.gz")
    assert not read.header.extensions
    assert all(not bytes(read.header[name].tobytes()).strip(b"\0") for name in NIFTI_TEXT)


def test_equal_voxels_give_equal_bytes_without_name_or_time(tmp_path: Path) -> None:
    export_nifti(phantom(np.int16), np.eye(4), tmp_path / "doe_john.nii.gz")
    export_nifti(phantom(np.int16), np.eye(4), tmp_path / "other.nii.gz")
    content = (tmp_path / "doe_john.nii.gz").read_bytes()
    assert content == (tmp_path / "other.nii.gz").read_bytes()
    assert content[3] == 0  # no flag for a name, a comment or more
    assert content[4:8] == bytes(4)  # no time
    assert gzip.decompress(content)


@pytest.mark.parametrize(
    "volume", [np.zeros((3, 4)), np.zeros((2, 2, 2, 2)), np.zeros((2, 2, 2), complex), np.zeros((2, 2, 2), np.int64)]
)
def test_what_is_no_volume_is_refused(tmp_path: Path, volume: NDArray[Any]) -> None:
    with pytest.raises(ScanError, match="cannot be written as NIfTI"):
        export_nifti(volume, np.eye(4), tmp_path / "copy.nii")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_nifti_name_is_refused_without_saying_it(tmp_path: Path) -> None:
    with pytest.raises(DatalistError) as caught:
        export_nifti(phantom(np.int16), np.eye(4), tmp_path / "doe_john.dcm")
    assert "doe" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatalistError, match="cannot be written"):
        export_nifti(phantom(np.int16), np.eye(4), tmp_path / "file" / "copy.nii")
