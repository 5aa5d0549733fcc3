from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.transforms import LoadImage

from medclr.data.datalist import Datalist, read_datalist
from medclr.data.dicom_volume import DicomVolumeReader
from medclr.data.index import IndexResult
from medclr.data.index import index as index_folder
from medclr.errors import DatalistError
from tests.data.index_files import ROOT_UID, save_series

index = partial(index_folder, workers=1)


@pytest.fixture(autouse=True)
def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path / "home"))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return tmp_path / "export"


def written(result: IndexResult, tmp_path: Path) -> Datalist:
    result.write(tmp_path / "out" / "list.json")
    return read_datalist(tmp_path / "out" / "list.json")


def reasons(result: IndexResult) -> dict[str, str]:
    return {entry.path: entry.problem for entry in result.quarantine}


def files_used(datalist: Datalist) -> Iterator[str]:
    for row in datalist.training:
        yield from (path for path, _ in json.loads(Path(row["image"]).read_text())["slices"])


def test_a_dicom_export_becomes_a_datalist_of_series_files(export: Path, tmp_path: Path) -> None:
    save_series(export / "a" / "one", 1, PatientAge="060Y", names="IM{:04d}")
    save_series(export / "a" / "two", 2, PatientID="ID0001", StudyDate="20200211", PatientAge="092Y")
    save_series(export / "b", 3, PatientBirthDate=None, PatientSex=None)
    (export / "notes.txt").write_text("nothing")
    result = index(export)
    assert result.quarantine == []
    with pytest.raises(DatalistError, match="once it is written"):
        _ = result.datalist
    rows = written(result, tmp_path).training
    first, second, third = rows
    assert first["patient_id"] == second["patient_id"] != third["patient_id"]
    assert first["study_id"] != second["study_id"]
    assert (first["days"], second["days"], third["days"]) == (0, 41, 0)
    assert (first["age"], second["age"]) == (60, 90)
    assert "age" not in third
    assert {(row["modality"], row["scanner"]) for row in rows} == {("CT", "maker model")}
    assert [Path(row["image"]).parent.name for row in rows] == ["list_series"] * 3
    assert len({row["content"] for row in rows}) == 3
    summary = result.summary
    counts = {key: summary[key] for key in ("patients", "studies", "series", "scans", "dicom_files", "other_files")}
    assert counts == {"patients": 2, "studies": 3, "series": 3, "scans": 3, "dicom_files": 12, "other_files": 1}
    assert summary["scans_per_patient"] == {1: 1, 2: 1}
    assert summary["modalities"] == {"CT": 3}
    assert summary["spacing_mm"] == [[1.5, 1.5, 2.0]] * 2
    load = LoadImage(reader=DicomVolumeReader(), image_only=True, dtype=np.float32)
    assert tuple(load(first["image"]).shape) == (8, 9, 4)


def test_processes_change_nothing(export: Path) -> None:
    for number in range(6):
        save_series(export / str(number), number)
    assert index(export, workers=2, progress=True) == index(export, fresh=True)


def test_nothing_private_of_headers_or_paths_is_written(export: Path, tmp_path: Path) -> None:
    folder = export / "QUUX_ZELDA1" / "19600101" / "ID0001"
    save_series(folder, 1, names="quux_{}.dcm")
    (cut := folder / "broken.dcm").write_bytes((folder / "quux_0.dcm").read_bytes()[:700])
    assert cut.stat().st_size == 700
    shutil.copy(folder / "quux_1.dcm", folder.parent / "again.dcm")
    image = nibabel.Nifti1Image(np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16), np.eye(4))
    nibabel.save(image, export / "QUUX_ZELDA1" / "t1.nii.gz")
    nibabel.save(image, export / "QUUX_ZELDA1" / "t2.nii.gz")
    result = index(export, patients=r"(?P<patient>QUUX_ZELDA\d)/t1")
    written(result, tmp_path)
    assert len(result.quarantine) == 3
    out = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(out) == 3
    for path in out:
        text = (str(path.name) + path.read_text()).lower()
        assert not [word for word in ("quux", "zelda", "id0001", "1960", "2020", ROOT_UID) if word in text]


def test_an_indexed_folder_whose_own_name_is_private_is_not_named(tmp_path: Path) -> None:
    folder = tmp_path / "exports" / "QUUX_ZELDA1"
    save_series(folder / "ct", 1)
    nibabel.save(nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), folder / "a.nii")
    result = index(folder, patients="{patient}.nii")
    rows = written(result, tmp_path).training
    assert len(rows) == 2
    text = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "QUUX" not in text
    series = next(row["image"] for row in rows if row["image"].endswith("series"))
    load = LoadImage(reader=DicomVolumeReader(), image_only=True, dtype=np.float32)
    assert tuple(load(series).shape) == (8, 9, 4)
    result.write(folder / "out" / "list.json")
    text = "".join(path.read_text() for path in (folder / "out").rglob("*") if path.is_file())
    assert "QUUX" not in text


def test_ids_and_paths_stay_where_they_are_public(export: Path, tmp_path: Path) -> None:
    save_series(export / "ID0001", 1)
    row = written(index(export, keep_ids=True), tmp_path).training[0]
    assert row["patient_id"] == "ID0001"
    assert row["series_id"] == f"{ROOT_UID}.1.0.1"
    assert next(files_used(read_datalist(tmp_path / "out" / "list.json"))) == "ID0001/0.dcm"


def test_repeated_instances_and_volumes_are_duplicates(export: Path, tmp_path: Path) -> None:
    save_series(export / "a", 1)
    shutil.copytree(export / "a", export / "b")
    save_series(export / "c", 2, seed=1)
    result = index(export, keep_ids=True)
    assert reasons(result) == {f"b/{n}.dcm": "The file is a duplicate." for n in range(4)} | {
        f"c/{n}.dcm": "The scan is a duplicate." for n in range(4)
    }
    named = {entry.path: entry.reason for entry in result.quarantine}
    assert "duplicate of a/2.dcm" in named["b/2.dcm"]
    assert "duplicate of a/0.dcm" in named["c/2.dcm"]
    assert sorted(files_used(written(result, tmp_path))) == [f"a/{n}.dcm" for n in range(4)]
    assert result.summary["conflicts"] == {"identical volumes under several patients (one is kept)": 1}


def test_a_conversion_of_a_dicom_series_is_its_duplicate(export: Path, tmp_path: Path) -> None:
    save_series(export / "a", 1)
    row = written(index(export), tmp_path).training[0]
    load = LoadImage(reader=DicomVolumeReader(), image_only=True, dtype=np.float32)
    volume = load(row["image"])
    nibabel.save(
        nibabel.Nifti1Image(volume.numpy()[::-1], volume.affine.numpy() @ np.diag([-1, 1, 1, 1])), export / "x.nii"
    )
    result = index(export, patients="{patient}.nii", keep_ids=True)
    assert reasons(result) == {"x.nii": "The scan is a duplicate."}


def test_one_series_uid_of_two_patients_is_never_one_volume(export: Path) -> None:
    save_series(export / "a", 1, slices=4)
    save_series(export / "b", 2, slices=4, SeriesInstanceUID=f"{ROOT_UID}.1.0.1")
    result = index(export)
    assert (result.summary["patients"], result.summary["scans"]) == (2, 2)


def test_a_dicom_file_without_a_patient_needs_a_word(export: Path, tmp_path: Path) -> None:
    save_series(export / "p1", 1, PatientID=None)
    save_series(export / "p2", 2, PatientID="")
    save_series(export / "p3", 3)
    result = index(export)
    assert set(reasons(result).values()) == {"The patient is unknown."}
    assert len(result.quarantine) == 8
    assert "--patients" in result.quarantine[0].reason
    result = index(export, patients="{patient}/*", keep_ids=True)
    assert [row["patient_id"] for row in written(result, tmp_path).training] == ["p1", "p2", "p3"]


def test_contradictions_within_a_patient_are_told_and_keep_the_patient_together(export: Path, tmp_path: Path) -> None:
    save_series(export / "a", 1)
    save_series(export / "b", 2, PatientID="ID0001", PatientBirthDate="19700101", PatientSex="M")
    result = index(export)
    assert result.summary["conflicts"] == {
        "patients with several dates of birth": 1,
        "patients with several sexes (none is given in their rows)": 1,
    }
    rows = written(result, tmp_path).training
    assert len({row["patient_id"] for row in rows}) == 1
    assert not any("sex" in row for row in rows)


def test_scans_of_one_patient_come_under_one_id_whatever_their_type(export: Path, tmp_path: Path) -> None:
    save_series(export / "dicom" / "a", 1)
    save_series(export / "dicom" / "b", 2, PatientID="ID0001", IssuerOfPatientID="clinic")
    save_series(export / "dicom" / "c", 3, PatientID="ID0003")
    describe = export / "bids" / "dataset_description.json"
    for seed, name in enumerate(["bids/sub-01/anat/sub-01_T1w.nii.gz", "nifti/one.nii.gz", "nifti/three.nii.gz"]):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        voxels = np.random.default_rng(seed).integers(0, 99, (4, 5, 6)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), export / name)
    describe.write_text('{"Name": "B"}')
    table = tmp_path / "who.csv"
    table.write_text("scan,patient\nID0001,P1\nsub-01,P1\nnifti/one.nii.gz,P1\nnifti/three.nii.gz,ID0003\n")
    result = index(export, patients=table)
    rows = written(result, tmp_path).training
    assert len(rows) == 6
    assert result.summary["scans_per_patient"] == {2: 1, 4: 1}


def test_an_id_without_issuer_is_that_of_the_only_issuer(export: Path) -> None:
    save_series(export / "a", 1)
    save_series(export / "b", 2, PatientID="ID0001", IssuerOfPatientID="clinic")
    assert index(export).summary["patients"] == 1
    save_series(export / "c", 3, PatientID="ID0001", IssuerOfPatientID="practice")
    assert index(export).summary["patients"] == 3


def test_a_pattern_that_tears_one_patient_apart_is_told(export: Path) -> None:
    save_series(export / "p1", 1)
    save_series(export / "p2", 2, PatientID="ID0001")
    result = index(export, patients="{patient}/*")
    assert result.summary["patients"] == 2
    assert result.summary["conflicts"] == {"ids of headers that a table or pattern gives to several patients": 1}


def test_files_that_are_no_scans_are_refused_politely(export: Path) -> None:
    save_series(export / "a", 1)
    np.savez(export / "volumes.npz", np.zeros(3))
    (export / "export.zip").write_bytes(b"PK\x03\x04")
    (export / "false.dcm").write_text("a text that is long enough to be looked at and is no DICOM file at all")
    (export / "README").write_text("A readme without suffix is no scan, and nothing to be told about either.")
    (export / "brain.mgz").write_bytes(b"1")
    result = index(export)
    named = {entry.path: entry.reason for entry in result.quarantine}
    assert set(named) == {"volumes.npz", "export.zip", "false.dcm", "brain.mgz"}
    assert "Convert" in named["volumes.npz"] or "NIfTI" in named["volumes.npz"]
    assert result.summary["other_files"] == 1


def test_series_files_of_an_earlier_run_do_not_stay(export: Path, tmp_path: Path) -> None:
    for number in range(3):
        save_series(export / str(number), number)
    assert len(written(index(export), tmp_path).training) == 3
    shutil.rmtree(export / "1")
    assert len(written(index(export), tmp_path).training) == 2
    assert len(list((tmp_path / "out" / "list_series").iterdir())) == 2


def test_images_limits_dicom_too(export: Path) -> None:
    save_series(export / "a", 1)
    save_series(export / "b", 2)
    result = index(export, images="a/*")
    assert (result.summary["scans"], result.summary["left_out"]) == (1, 4)
    assert result.quarantine == []


def test_rows_do_not_depend_on_the_text_of_pseudonyms(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        save_series(export / str(number), number)
    one = [row["content"] for row in written(index(export), tmp_path).training]
    digests = [row["scanner"] for row in written(index(export), tmp_path).training]
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path / "other"))
    result = index(export)
    again = written(result, tmp_path)
    assert [row["content"] for row in again.training] != one
    assert [row["scanner"] for row in again.training] == digests
    folders = [path.split("/")[0] for path in files_used(again)]
    assert folders == [str(number) for number in range(8) for _ in range(4)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> tuple[IndexResult, Path]:
    """The shared DICOM folder, indexed."""
    home = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCLR_HOME", str(home / "home"))
        result = index_folder(data_dir / "dicom", workers=2, keep_ids=True)
        result.write(home / "list.json")
    return result, home / "list.json"


def test_every_shared_dicom_file_is_in_the_datalist_or_in_the_quarantine(
    shared: tuple[IndexResult, Path], data_dir: Path
) -> None:
    result, path = shared
    everything = {str(file.relative_to(data_dir / "dicom")) for file in (data_dir / "dicom").rglob("*.dcm")}
    used, refused = set(files_used(read_datalist(path))), {entry.path for entry in result.quarantine}
    assert len(everything) == 771
    assert everything <= used | refused
    assert not used & refused
    summary = result.summary
    assert (summary["dicom_files"], summary["dicom_series"]) == (771, 23)
    assert summary["volume_files"] == sum(entry.path.endswith((".nii", ".nii.gz")) for entry in result.quarantine)


def test_shared_files_of_one_image_in_several_encodings_are_used_once(shared: tuple[IndexResult, Path]) -> None:
    result, path = shared
    duplicates = [entry.path for entry in result.quarantine if "duplicate of" in entry.reason]
    assert sum(name.startswith("dcm_qa_ts/") for name in duplicates) == 8
    used = {name.rpartition("/")[0] for name in files_used(read_datalist(path))}
    assert "studyforrest_t1" in used
    assert len([name for name in used if "generic/compressed" in name]) == 1
