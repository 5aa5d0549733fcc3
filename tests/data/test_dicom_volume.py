"""Reading a volume by its series file, with MONAI and without."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from monai.transforms import Compose, LoadImaged, Orientationd
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from medclr.data.dicom_series import SeriesVolume
from medclr.data.dicom_volume import DicomVolumeReader, inside, read_series, read_volume, write_series
from medclr.data.rows import SERIES_SUFFIX
from medclr.errors import ScanError
from tests.data.dicom_files import anatomy, expected_affine, volumes_in, voxels_of, write_stack

OBLIQUE = (0.8, 0.6, 0.0, -0.6, 0.8, 0.0)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A series file beside the folder of its slices."""
    write_stack(tmp_path / "export" / "deep", anatomy(), orientation=OBLIQUE)
    volumes, _ = volumes_in(tmp_path / "export")
    path = tmp_path / "lists" / f"one{SERIES_SUFFIX}"
    write_series(volumes[0], path, tmp_path / "export")
    return path


def test_monai_loads_a_series_file(series: Path) -> None:
    load = LoadImaged("image", reader=DicomVolumeReader, ensure_channel_first=True)
    image = load({"image": str(series)})["image"]
    np.testing.assert_array_equal(image[0].numpy(), anatomy())
    np.testing.assert_allclose(image.affine.numpy(), expected_affine(OBLIQUE), atol=1e-5)
    turned = Compose([load, Orientationd("image", "RAS", labels=None)])({"image": str(series)})["image"]
    assert (np.diag(turned.affine.numpy())[:3] > 0).all()


def test_the_metadata_hold_nothing_of_the_patient(series: Path) -> None:
    reader = DicomVolumeReader()
    assert reader.verify_suffix(str(series))
    assert not reader.verify_suffix("image.nii.gz")
    _, meta = reader.get_data(reader.read(str(series)))
    assert set(meta) == {
        "affine", "original_affine", "space", "spatial_shape", "spacing", "original_channel_dim", "modality",
    }  # fmt: skip


def test_several_series_files_are_channels_of_one_grid(series: Path, tmp_path: Path) -> None:
    reader = DicomVolumeReader()
    voxels, _ = reader.get_data(reader.read([str(series), str(series)]))
    assert voxels.shape == (2, 9, 7, 6)
    write_stack(tmp_path / "other", anatomy((9, 7, 5)))
    other = tmp_path / f"other{SERIES_SUFFIX}"
    write_series(volumes_in(tmp_path / "other")[0][0], other, tmp_path / "other")
    with pytest.raises(ScanError, match="different grids"):
        reader.get_data(reader.read([str(series), str(other)]))


def test_a_moved_tree_is_still_read(series: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for name in ("lists", "export"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    voxels, _ = DicomVolumeReader().get_data(DicomVolumeReader().read(str(tmp_path / "new" / "lists" / series.name)))
    np.testing.assert_array_equal(voxels, anatomy())


@pytest.mark.parametrize("path", ["../outside", "deep/../../outside", "/etc/hostname", "link"])
def test_a_slice_outside_of_the_root_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"")
    os.symlink(tmp_path / "outside", root / "link")
    with pytest.raises(ScanError, match="outside of its folder"):
        inside(root, path)


def test_hidden_parts_of_a_path_are_resolved_by_the_reader(series: Path) -> None:
    content = json.loads(series.read_text())
    content["slices"] = [[path.replace("deep", "veiled"), place] for path, place in content["slices"]]
    series.write_text(json.dumps(content))
    reader = DicomVolumeReader(resolve=lambda path: path.replace("veiled", "deep"))
    np.testing.assert_array_equal(reader.get_data(reader.read(str(series)))[0], anatomy())
    with pytest.raises(ScanError, match="cannot be read"):
        DicomVolumeReader().get_data(DicomVolumeReader().read(str(series)))


def test_a_slice_that_has_changed_is_refused(series: Path, tmp_path: Path) -> None:
    volume, root = read_series(series)
    files = sorted((tmp_path / "export" / "deep").iterdir())
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    with pytest.raises(ScanError, match="not what was indexed"):
        read_volume(volume, lambda path: root / path)
    files[0].write_bytes(first[:-20])
    with pytest.raises(ScanError, match="cut short"):
        read_volume(volume, lambda path: root / path)
    files[0].unlink()
    with pytest.raises(ScanError, match="cannot be read"):
        read_volume(volume, lambda path: root / path)


@pytest.mark.parametrize("change", [{"format": "x"}, {"shape": [9, 7, 5]}, {"affine": [[1]]}, {"dtype": "object"},
                                    {"slices": 3}, {"root": None}])  # fmt: skip
def test_a_damaged_series_file_is_refused(series: Path, change: dict[str, object]) -> None:
    series.write_text(json.dumps({**json.loads(series.read_text()), **change}))
    with pytest.raises(ScanError, match="series file is unreadable"):
        read_series(series)


def test_a_series_file_is_replaced_whole(series: Path, tmp_path: Path) -> None:
    volume, _ = read_series(series)
    write_series(volume, series, tmp_path / "export")
    assert [path.name for path in series.parent.iterdir()] == [series.name]
    assert SeriesVolume.from_json(volume.to_json()) == volume


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("kind", ["<u2", "<i2", "u1"])
def test_compressed_slices_hold_the_same_voxels(tmp_path: Path, syntax: str, kind: str) -> None:
    voxels = (anatomy() % 250).astype(kind)
    if kind == "<i2":
        voxels -= 120
    voxels = voxels.repeat(8, axis=0).repeat(8, axis=1)  # encoders refuse tiny frames
    for path in write_stack(tmp_path, voxels):
        image = dcmread(path)
        image.compress(syntax, generate_instance_uid=False)
        image.save_as(path)
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    np.testing.assert_array_equal(voxels_of(tmp_path, volumes[0])[0], voxels)


@pytest.mark.parametrize("name", ["JPEGLSNearLossless_16.dcm", "JPEG2000.dcm", "JPGExtended.dcm", "MR_small_RLE.dcm"])
def test_a_real_compressed_slice_equals_what_simpleitk_decodes(tmp_path: Path, name: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    source = Path(str(get_testdata_file(name)))
    for z in range(3):
        image = dcmread(source)
        image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, 2 * z], [1, 0, 0, 0, 1, 0]
        image.PixelSpacing, image.SOPInstanceUID = [1, 1], f"1.2.{z}"
        image.SOPClassUID, image.ImageType = "1.2.840.10008.5.1.4.1.1.4", ["ORIGINAL", "PRIMARY"]
        image.InstanceNumber = z
        image.save_as(tmp_path / f"{z}")
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    voxels, _ = voxels_of(tmp_path, volumes[0])
    wanted = sitk.GetArrayFromImage(sitk.ReadImage(str(source), imageIO="GDCMImageIO"))[0].T
    np.testing.assert_allclose(voxels[:, :, 1], wanted, atol=1 if name == "JPEG2000.dcm" else 0)


def test_a_compressed_frame_of_another_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for path in write_stack(tmp_path, anatomy((64, 64, 3))):
        image = dcmread(path)
        image.compress(JPEG2000Lossless, generate_instance_uid=False)
        frame = bytearray(image.PixelData)
        start = frame.find(b"\xff\x4f\xff\x51") + 8
        frame[start : start + 8] = (60000).to_bytes(4, "big") * 2
        image.PixelData = encapsulate([bytes(frame[frame.find(b"\xff\x4f") :])])
        image.save_as(path)
    volumes, _ = volumes_in(tmp_path)
    with pytest.raises(ScanError, match="contradicts the header"):
        voxels_of(tmp_path, volumes[0])
