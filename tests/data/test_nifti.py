from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medclr.data.index_content import content_of
from medclr.data.nifti import find_nifti, probe_nifti, stem_of
from medclr.errors import ScanError

SHAPE = (50, 60, 70)


def voxels(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 100, shape or SHAPE).astype(dtype)


def save(path: Path, data: Any, affine: Any = None, *, sform: Any = None) -> Path:
    """Save with an affine that nibabel checks, or with an sform that it does not."""
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine
    image = nibabel.Nifti1Image(data, affine if sform is None else None)
    if sform is not None:
        image.header.set_sform(sform, 1)
    nibabel.save(image, path)
    return path


def patch(path: Path, offset: int, replacement: np.ndarray[Any, Any]) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + replacement.nbytes] = replacement.tobytes()
    path.write_bytes(bytes(content))
    return path


@pytest.fixture(params=[".nii", ".nii.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"scan{request.param}"


@pytest.mark.parametrize("check_voxels", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, ">i2"])
def test_a_usable_volume_is_described(path: Path, dtype: Any, check_voxels: bool) -> None:
    affine = np.array([[0, 0, 3, 5], [-1.5, 0, 0, 6], [0, 2, 0, 7], [0, 0, 0, 1.0]])
    probe = probe_nifti(save(path, voxels(dtype=dtype), affine), check_voxels=check_voxels)
    assert probe.shape == SHAPE
    assert probe.spacing == (1.5, 2.0, 3.0)
    assert probe.dtype == np.dtype(dtype).newbyteorder("=").name
    np.testing.assert_array_equal(probe.affine, affine)
    assert len(probe.digest) == (64 if check_voxels else 0)


def test_axes_of_length_1_at_the_end_are_dropped(path: Path) -> None:
    assert probe_nifti(save(path, voxels(*SHAPE, 1, 1))).shape == SHAPE


def test_the_digest_is_that_of_the_voxels(tmp_path: Path) -> None:
    data = voxels()
    probe = probe_nifti(save(tmp_path / "a.nii", data))
    reference = content_of(data, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert probe.digest == reference
    assert probe_nifti(save(tmp_path / "b.nii.gz", data.astype(np.float64), np.eye(4))).digest == reference
    turned = np.ascontiguousarray(data.transpose(2, 0, 1)[::-1])
    affine = np.array([[0, 1.0, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
    assert probe_nifti(save(tmp_path / "d.nii.gz", turned, affine)).digest == reference
    data[-1, -1, -1] += 1
    assert probe_nifti(save(tmp_path / "c.nii", data)).digest != reference


def rejects(path: Path, problem: str, **options: Any) -> ScanError:
    with pytest.raises(ScanError) as caught:
        probe_nifti(path, **options)
    assert problem in caught.value.problem, caught.value
    return caught.value


@pytest.mark.parametrize("check_voxels", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_rejected(path: Path, share: float, check_voxels: bool) -> None:
    content = save(path, voxels()).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    rejects(path, "cut short", check_voxels=check_voxels)


@pytest.mark.parametrize("check_voxels", [True, False])
def test_a_whole_gzip_file_with_too_few_voxels_is_rejected(tmp_path: Path, check_voxels: bool) -> None:
    content = save(tmp_path / "a.nii", voxels()).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(content[:-4]))
    error = rejects(path, "cut short", check_voxels=check_voxels)
    assert (error.got, error.wanted) == (f"{len(content) - 4} bytes", f"{len(content)} bytes by its header")


@pytest.mark.parametrize("check_voxels", [True, False])
def test_a_gzip_file_of_several_members_is_fine(tmp_path: Path, check_voxels: bool) -> None:
    content = save(tmp_path / "a.nii", voxels()).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    assert probe_nifti(path, check_voxels=check_voxels).shape == SHAPE


@pytest.mark.parametrize("check_voxels", [True, False])
def test_a_file_much_longer_than_its_header_says_is_rejected(path: Path, check_voxels: bool) -> None:
    save(path, voxels())
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    content += bytes(1 << 20)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    rejects(path, "longer", check_voxels=check_voxels)


def test_a_wrong_checksum_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", voxels())
    patch(path, path.stat().st_size - 8, np.zeros(4, np.uint8))
    rejects(path, "no readable NIfTI")


@pytest.mark.parametrize("content", [b"", b"x", b"no image" * 1000, gzip.compress(b"no image" * 1000), bytes(5000)])
def test_a_file_that_is_no_image_is_rejected(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    error = rejects(path, "no readable NIfTI")
    assert str(path.parent) not in str(error)


def test_an_absent_file_is_rejected(tmp_path: Path) -> None:
    rejects(tmp_path / "nix.nii.gz", "no readable NIfTI")


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((9, 9), "2D"),
        ((9, 9, 1), "2D"),
        ((9, 1, 9), "2D"),
        ((9, 9, 9, 2), "more than three"),
        ((9, 9, 1, 3), "more than"),
    ],
)
def test_only_3d_is_taken(path: Path, shape: tuple[int, ...], problem: str) -> None:
    rejects(save(path, voxels(*shape)), problem)


def test_no_voxels_are_rejected(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(4, 4, 4))
    rejects(patch(path, 44, np.array([0], "<i2")), "no voxels")


def test_voxels_that_are_no_numbers_are_rejected(path: Path) -> None:
    rejects(save(path, np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "no real numbers")
    rejects(save(path, voxels(4, 4, 4, dtype=np.complex64)), "no real numbers")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_constant_image_is_rejected_and_a_constant_label_is_not(path: Path, dtype: Any) -> None:
    save(path, np.full(SHAPE, 7, dtype))
    rejects(path, "constant")
    assert probe_nifti(path, is_label=True).shape == SHAPE
    assert probe_nifti(path, check_voxels=False).shape == SHAPE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 50 * 60 * 70])
def test_nan_and_infinity_are_rejected_and_counted(path: Path, value: float, count: int) -> None:
    data = voxels()
    data.reshape(-1)[-count:] = value
    error = rejects(save(path, data), "NaN or infinity")
    assert error.got == f"{count} of {data.size} voxels"
    rejects(path, "NaN or infinity", is_label=True)


@pytest.mark.parametrize("spacing", [0.0, 1e-5, 1e4])
def test_absurd_spacing_is_rejected(path: Path, spacing: float) -> None:
    rejects(save(path, voxels(4, 4, 4), sform=np.diag([1, spacing, 1, 1])), "spacing is absurd")


@pytest.mark.parametrize("spacing", [0.0, -1.0, np.nan])
def test_spacing_that_the_reader_would_silently_repair_is_rejected(tmp_path: Path, spacing: float) -> None:
    path = patch(save(tmp_path / "a.nii", voxels(4, 4, 4)), 252, np.array([0, 0], "<i2"))  # no qform, no sform
    assert probe_nifti(path).shape == (4, 4, 4)
    patch(path, 80, np.array([spacing], "<f4"))
    rejects(path, "spacing is absurd")


def test_an_affine_that_cannot_be_inverted_is_rejected(path: Path) -> None:
    affine = np.eye(4)
    affine[:3, 1] = affine[:3, 0]
    rejects(save(path, voxels(4, 4, 4), sform=affine), "cannot be inverted")


def test_an_affine_with_nan_is_rejected(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(4, 4, 4))
    rejects(patch(path, 292, np.array([np.nan], "<f4")), "affine holds NaN")


def test_a_header_of_gigantic_size_needs_no_memory(tmp_path: Path) -> None:
    path = patch(save(tmp_path / "a.nii", voxels(4, 4, 4)), 42, np.array([32767] * 3, "<i2"))
    rejects(path, "cut short")


def test_names() -> None:
    assert find_nifti(["a.nii", "b.NII.GZ", "c.gz", "d.nii.txt", "e/f.nii.gz", "nii"]) == [
        "a.nii",
        "b.NII.GZ",
        "e/f.nii.gz",
    ]
    assert [stem_of(name) for name in ("x/a.b.nii.gz", "a.nii", "a.NII.GZ", "a")] == ["a.b", "a", "a", "a"]
