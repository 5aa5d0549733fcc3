from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.data.image_reader import NibabelReader
from monai.transforms import LoadImage, SaveImage
from nibabel.nifti1 import Nifti1Extension

from medclr.data import Preprocessing
from medclr.data.load import LoadScand
from medclr.data.privacy import References
from medclr.data.privacy_map import _map_of
from medclr.data.scan_files import KEPT, ScanFiles
from medclr.errors import ConfigError, ScanError, causes
from tests.conftest import AFFINES

TEXTS = {"descrip": b"ZQdescrip", "aux_file": b"ZQaux", "db_name": b"ZQdb", "intent_name": b"ZQintent"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path / "home"))
    _map_of.cache_clear()
    yield tmp_path / "home"
    _map_of.cache_clear()


def write(path: Path, affine: Any = None) -> Path:
    """A NIfTI file full of text."""
    voxels = np.random.default_rng(1).integers(0, 900, (9, 8, 7)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, AFFINES["oblique"] if affine is None else affine)
    for name, text in TEXTS.items():
        image.header[name] = text
    image.header.extensions.append(Nifti1Extension(2, b"ZQdicom"))
    image.header.extensions.append(Nifti1Extension(6, b"ZQcomment"))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


class Telling(NibabelReader):  # type: ignore[misc]
    """A reader that keeps what the header tells."""

    def get_data(self, img: Any) -> Any:
        voxels, meta = super().get_data(img)
        return voxels, {**meta, "descrip": "ZQdescrip", "PatientName": "ZQname", "space": "RAS"}


def everything(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(everything(part) for item in value.items() for part in item)
    return f"{value!r} {bytes(np.asarray(value).tobytes()) if isinstance(value, np.ndarray) else ''}"


def test_a_file_is_loaded_as_monai_does(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz")
    expected: Any = LoadImage(reader="NibabelReader", image_only=True, dtype=np.float32, ensure_channel_first=True)(
        path
    )
    loaded = ScanFiles()(str(path))
    assert loaded.dtype == expected.dtype
    assert loaded.shape == expected.shape
    assert loaded.stride() == expected.stride()
    assert bool((loaded.as_tensor() == expected.as_tensor()).all())
    for key in ("affine", "original_affine", "spatial_shape", "space", "original_channel_dim", "filename_or_obj"):
        assert str(loaded.meta[key]) == str(expected.meta[key]), key


def test_nothing_of_a_headers_text_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz")
    assert "ZQ" in everything(LoadImage(reader=Telling(), image_only=True)(path).meta)  # type: ignore[attr-defined]
    for image in (ScanFiles()(path), ScanFiles(Telling())(path), Preprocessing()({"image": str(path)})["image"]):
        assert isinstance(image, MetaTensor)
        assert set(image.meta) <= {*KEPT, "filename_or_obj"}
        assert "ZQ" not in everything(image.meta)


def test_what_monai_saves_of_a_scan_has_none_of_its_headers_text(tmp_path: Path) -> None:
    image = Preprocessing(orientation=None)({"image": str(write(tmp_path / "data" / "a" / "scan.nii.gz"))})["image"]
    SaveImage(
        tmp_path / "out",
        output_postfix="seg",
        resample=False,
        data_root_dir=str(tmp_path / "data"),
        separate_folder=False,
    )(image)
    saved: Any = nibabel.load(tmp_path / "out" / "a" / "scan_seg.nii.gz")
    assert not saved.header.extensions
    assert "ZQ" not in str(saved.header)
    assert np.allclose(saved.affine, AFFINES["oblique"], atol=1e-4)


def test_a_reference_is_resolved_for_reading_alone(tmp_path: Path) -> None:
    write(tmp_path / "data" / "ZORN_QUIN" / "zorn.nii.gz")
    hidden = References().hide_all([("ZORN_QUIN/zorn.nii.gz", ["Zorn^Quin"])])[0]
    image = ScanFiles()(tmp_path / "data" / hidden)
    assert image.meta["filename_or_obj"] == str(tmp_path / "data" / hidden)
    assert "ZORN" not in everything(image.meta)
    SaveImage(tmp_path / "out", resample=False, data_root_dir=str(tmp_path / "data"), separate_folder=False)(image)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [str(path.relative_to(tmp_path / "out")) for path in files] == [hidden.replace(".nii.gz", "_trans.nii.gz")]


@pytest.mark.parametrize("reader", [None, "NibabelReader", NibabelReader()])
@pytest.mark.parametrize("content", [b"", b"no NIfTI file", None])
def test_what_fails_names_no_real_path_in_error_log_or_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reader: Any, content: bytes | None
) -> None:
    (tmp_path / "data" / "ZORN_QUIN").mkdir(parents=True)
    if content is not None:
        (tmp_path / "data" / "ZORN_QUIN" / "zorn.nii.gz").write_bytes(content)
    hidden = References().hide_all([("ZORN_QUIN/zorn.nii.gz", ["Zorn^Quin"])])[0]
    row = {"image": str(tmp_path / "data" / hidden), "patient_id": "pat-1"}
    caplog.set_level(logging.DEBUG)
    for call in (
        LoadScand(["image"], reader=reader),
        Preprocessing(reader=reader),
        Preprocessing(reader=reader).volume,
    ):
        with pytest.raises((ScanError, RuntimeError)) as caught:
            call(row)
        stream = io.StringIO()
        traceback.print_exception(caught.value, file=stream)
        for text in (stream.getvalue(), caplog.text, *map(str, causes(caught.value))):
            assert "ZORN" not in text
            assert "zorn" not in text


class Failing(NibabelReader):  # type: ignore[misc]
    """A reader with a reason of its own, behind which the cause names the file."""

    def read(self, data: Any, **kwargs: Any) -> Any:
        raise ScanError("A slice is missing.", got="7", wanted="8", fix="Find it.") from RuntimeError(f"lost {data}")


def test_a_readers_own_reason_is_kept_and_what_lies_behind_it_is_not(tmp_path: Path) -> None:
    write(tmp_path / "ZORN_QUIN" / "scan.nii.gz")
    hidden = References().hide_all([("ZORN_QUIN", ["Zorn^Quin"])])[0]
    with pytest.raises(ScanError, match="slice is missing") as caught:
        ScanFiles(Failing())(tmp_path / hidden / "scan.nii.gz")
    assert list(causes(caught.value)) == [caught.value]


def test_the_reader_follows_from_the_file_type(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    voxels = np.random.default_rng(1).integers(0, 900, (9, 8, 7)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing((0.8, 1.1, 2.5))
    image.SetMetaData("PatientName", "ZQname")
    affine = np.diag([-0.8, -1.1, 2.5, 1.0])
    for name in ("scan.nrrd", "scan.mha", "scan.mhd", "SCAN2.NRRD"):
        sitk.WriteImage(image, str(tmp_path / name))
        loaded = ScanFiles()(tmp_path / name)
        assert np.array_equal(loaded.as_tensor()[0].numpy(), voxels)
        assert np.allclose(loaded.affine, affine)
        assert "ZQ" not in everything(loaded.meta)
    write(tmp_path / "scan.nii.gz")
    with pytest.raises(ScanError):
        ScanFiles("NibabelReader")(tmp_path / "scan.nrrd")  # a given reader reads everything


def test_an_unknown_reference_stops_a_run_and_is_no_bad_scan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MEDCLR_HOME"):
        LoadScand(["image"])({"image": str(tmp_path / f"ref-{'0' * 20}" / "a.nii.gz")})


def test_errors_about_labels_do_not_show_them(tmp_path: Path) -> None:
    row = {"image": str(write(tmp_path / "a.nii.gz")), "label": ["Zorn^Quin"]}
    with pytest.raises(ScanError, match="label is no file") as caught:
        LoadScand(["image", "label"])(row)
    assert "Zorn" not in str(caught.value)
