from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from monai.data.image_reader import NibabelReader
from monai.transforms import LoadImage

from medclr.data.index_content import content_of
from medclr.data.itk_files import ITK_SUFFIXES, SimpleITKReader, find_itk, probe_itk
from medclr.data.nifti import probe_nifti
from medclr.errors import ScanError

VOXELS = np.random.default_rng(0).integers(0, 200, (6, 5, 4)).astype(np.int16)


def save(path: Path, voxels: np.ndarray = VOXELS, spacing: tuple[float, ...] = (1.5, 2.0, 3.0)) -> Path:
    """A file whose axes are turned and flipped."""
    image = SimpleITK.GetImageFromArray(voxels.T)
    image.SetSpacing(spacing)
    if len(spacing) == 3:
        image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, -1))
        image.SetOrigin((10, -20, 30))
    SimpleITK.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_a_file_is_what_its_nifti_conversion_is(tmp_path: Path, suffix: str) -> None:
    path, nifti = save(tmp_path / f"a{suffix}"), save(tmp_path / "a.nii.gz")
    probe, wanted = probe_itk(path), probe_nifti(nifti)
    assert (probe.shape, probe.dtype, probe.digest) == (wanted.shape, wanted.dtype, wanted.digest)
    np.testing.assert_allclose(probe.affine, wanted.affine, atol=1e-5)
    np.testing.assert_allclose(probe.spacing, (1.5, 2.0, 3.0))
    assert probe_itk(path, check_voxels=False).digest == ""
    loaded, reference = (
        LoadImage(reader=reader, image_only=True, ensure_channel_first=True)(name)
        for reader, name in ((SimpleITKReader(), path), (NibabelReader(), nifti))
    )
    np.testing.assert_array_equal(loaded, reference)
    np.testing.assert_allclose(loaded.affine, reference.affine, atol=1e-5)
    assert content_of(VOXELS, probe.affine) == probe.digest


def test_the_text_of_a_header_is_left_behind(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(VOXELS.T)
    image.SetMetaData("Patient", "Quux^Zelda")
    SimpleITK.WriteImage(image, str(tmp_path / "a.nrrd"))
    _, meta = (reader := SimpleITKReader()).get_data(reader.read(tmp_path / "a.nrrd"))
    assert "Quux" not in str(meta)


def test_several_files_are_channels(tmp_path: Path) -> None:
    names = [save(tmp_path / "a.nrrd"), save(tmp_path / "b.mha", VOXELS + 1)]
    assert LoadImage(reader=SimpleITKReader(), image_only=True, ensure_channel_first=True)(names).shape == (2, 6, 5, 4)


def header(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def rejects(path: Path, problem: str, **options: bool) -> None:
    with pytest.raises(ScanError, match=problem) as caught:
        probe_itk(path, **options)
    assert str(path.parent) not in str(caught.value)


def test_what_is_no_usable_volume_is_refused(tmp_path: Path) -> None:
    rejects(save(tmp_path / "flat.mha", VOXELS[:, :, 0], (1, 1)), "2D")
    rejects(save(tmp_path / "thin.mha", VOXELS[:, :, :1]), "2D")
    rejects(save(tmp_path / "constant.nrrd", VOXELS * 0), "constant")
    assert probe_itk(save(tmp_path / "empty.nrrd", VOXELS * 0), is_label=True).digest
    rejects(save(tmp_path / "nan.nrrd", np.where(VOXELS > 100, np.nan, 1.0)), "NaN")
    rejects(save(tmp_path / "far.nrrd", VOXELS, (1e6, 1, 1)), "spacing is absurd")
    image = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(image, str(tmp_path / "colour.nrrd"))
    rejects(tmp_path / "colour.nrrd", "no real numbers")
    (tmp_path / "text.nrrd").write_text("no image")
    rejects(tmp_path / "text.nrrd", "no readable NRRD")
    cut = save(tmp_path / "cut.mha")
    cut.write_bytes(cut.read_bytes()[:-30])
    rejects(cut, "no readable NRRD")


def test_a_header_that_asks_for_absurd_memory_is_refused(tmp_path: Path) -> None:
    rejects(header(save(tmp_path / "a.mha"), b"DimSize = 6 5 4", b"DimSize = 60000 50000 40000"), "size in the header")
    rejects(header(save(tmp_path / "b.mha"), b"DimSize = 6 5 4", b"DimSize = 600 500 40"), "size in the header")


@pytest.mark.parametrize("name", ["../a.raw", "/etc/passwd", "LIST", "a%03d.raw 1 4 1", "gone.raw"])
def test_voxels_lie_in_one_file_beside_the_header(tmp_path: Path, name: str) -> None:
    path = header(save(tmp_path / "a.mhd"), b"ElementDataFile = a.raw", f"ElementDataFile = {name}".encode())
    rejects(path, "voxels lie in other places|cannot be read")


def test_files_are_found_by_their_suffix() -> None:
    assert find_itk(["a.nrrd", "b.MHA", "c.raw", "d/e.nhdr", "f.mhd", "g.nii"]) == [
        "a.nrrd",
        "b.MHA",
        "d/e.nhdr",
        "f.mhd",
    ]
