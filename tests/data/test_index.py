from __future__ import annotations

import gzip
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medclr.data.datalist import read_datalist
from medclr.data.index import IndexResult
from medclr.data.index import index as index_folder
from medclr.data.nifti import Probe
from medclr.data.splits import split_datalist
from medclr.data.walk import Source, walk
from medclr.errors import ConfigError, DatalistError, ScanError

index = partial(index_folder, keep_ids=True)


def save(path: Path, seed: int = 0, shape: tuple[int, ...] = (4, 5, 6), shift: float = 0, value: Any = None) -> None:
    data = np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)
    if value is not None:
        data = np.full(shape, value, np.float32)
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    affine[0, 3] = shift
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


@pytest.fixture(autouse=True)
def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The private folder, away from the user's."""
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Three patients, four scans, of which two have labels."""
    root = tmp_path / "scans"
    for n, name in enumerate(["a_1", "a_2", "b_1", "c_1"]):
        save(root / "imagesTr" / f"{name}.nii.gz", n)
    for name in ("a_1", "b_1"):
        save(root / "labelsTr" / f"{name}.nii.gz", value=1)
    (root / "dataset.json").write_text("{}")
    return root


def reasons(result: IndexResult) -> dict[str, str]:
    return {entry.path: entry.problem for entry in result.quarantine}


def images(result: IndexResult) -> list[str]:
    return [os.path.relpath(row["image"], result.datalist.root) for row in result.datalist.training]


def test_a_decathlon_folder_becomes_a_datalist(decathlon: Path) -> None:
    result = index(decathlon, patients="{patient}_{study}.nii.gz", workers=1)
    assert result.quarantine == []
    rows = result.datalist.training
    contents = [row.pop("content") for row in rows]
    assert len(set(contents)) == 4
    assert all(re.fullmatch(r"vox-\w{16,}", content) for content in contents)
    assert rows == [
        {
            "image": str(decathlon / f"imagesTr/{patient}_{study}.nii.gz"),
            **(
                {"label": str(decathlon / f"labelsTr/{patient}_{study}.nii.gz")}
                if patient + study in ("a1", "b1")
                else {}
            ),
            "patient_id": patient,
            "study_id": study,
        }
        for patient, study in [("a", "1"), ("a", "2"), ("b", "1"), ("c", "1")]
    ]
    wanted = {
        "patients": 3,
        "studies": 4,
        "scans": 4,
        "labelled": 2,
        "scans_per_patient": {1: 2, 2: 1},
        "spacing_mm": [[1.0, 1.5, 2.0], [1.0, 1.5, 2.0]],
        "shape": [[4, 5, 6], [4, 5, 6]],
        "dtypes": {"int16": 4},
        "quarantined": {},
        "other_files": 1,
        "left_out": 0,
        "unused_table_rows": 0,
        "without_table_row": 0,
        "volume_files": 6,
        "dicom_files": 0,
        "conflicts": {},
    }
    assert {key: result.summary[key] for key in wanted} == wanted


def test_what_is_written_reads_back(decathlon: Path, tmp_path: Path) -> None:
    save(decathlon / "imagesTr" / "d_1.nii.gz", value=3)
    result = index(decathlon, patients="{patient}_*", workers=1)
    result.write(tmp_path / "out" / "list.json")
    again = read_datalist(tmp_path / "out" / "list.json")
    assert again.sections == result.datalist.sections
    assert again.digest() == result.datalist.digest()
    entries = json.loads((tmp_path / "out" / "quarantine.json").read_text())
    assert [entry["path"] for entry in entries] == ["imagesTr/d_1.nii.gz"]
    assert "constant" in entries[0]["reason"]


@pytest.fixture
def broken(decathlon: Path) -> Path:
    """The decathlon folder and one file of each kind of trouble."""
    tr = decathlon / "imagesTr"
    save(tr / "unknown.nii.gz", 10)
    save(tr / "flat_1.nii.gz", 11, shape=(9, 9))
    save(tr / "movie_1.nii.gz", 12, shape=(4, 5, 6, 3))
    save(tr / "constant_1.nii.gz", value=0)
    save(tr / "nan_1.nii.gz", value=np.nan)
    save(tr / "copy_1.nii", 0)
    (tr / "text_1.nii.gz").write_text("this is no image")
    save(tr / "cut_1.nii.gz", 13, shape=(30, 30, 30))
    content = (tr / "cut_1.nii.gz").read_bytes()
    (tr / "cut_1.nii.gz").write_bytes(content[: len(content) // 2])
    for n, name in enumerate(["shape_1", "space_1", "cutlabel_1", "two_1"]):
        save(tr / f"{name}.nii.gz", 20 + n)
    labels = decathlon / "labelsTr"
    save(labels / "shape_1.nii.gz", shape=(4, 5, 7))
    save(labels / "space_1.nii.gz", shift=1.0)
    (labels / "cutlabel_1.nii.gz").write_bytes(gzip.compress(b"nothing"))
    save(labels / "two_1.nii.gz")
    save(labels / "two_1.nii")
    save(labels / "orphan_1.nii.gz")
    save(labels / "constant_1.nii.gz")
    (tr / "link_1.nii.gz").symlink_to(tr / "b_1.nii.gz")
    outside = decathlon.parent / "outside.nii.gz"
    save(outside, 30)
    (tr / "out_1.nii.gz").symlink_to(outside)
    (decathlon / "linked").symlink_to(decathlon.parent)
    save(decathlon / ".hidden" / "h_1.nii.gz", 31)
    return decathlon


def test_every_volume_is_in_the_datalist_or_in_the_quarantine_with_its_reason(broken: Path) -> None:
    result = index(broken, patients="{patient}_{study}", workers=1)
    assert reasons(result) == {
        "imagesTr/unknown.nii.gz": "The patient is unknown.",
        "imagesTr/flat_1.nii.gz": "The image is 2D.",
        "imagesTr/movie_1.nii.gz": "The image has more than three axes.",
        "imagesTr/constant_1.nii.gz": "The image is constant.",
        "imagesTr/nan_1.nii.gz": "The image holds NaN or infinity.",
        "imagesTr/copy_1.nii": "The scan is a duplicate.",
        "imagesTr/text_1.nii.gz": "The file is no readable NIfTI image.",
        "imagesTr/cut_1.nii.gz": "The file is cut short.",
        "labelsTr/shape_1.nii.gz": "The label has another shape than its image.",
        "labelsTr/space_1.nii.gz": "The label lies elsewhere than its image.",
        "labelsTr/cutlabel_1.nii.gz": "The file is no readable NIfTI image.",
        "labelsTr/two_1.nii.gz": "The image has several labels.",
        "labelsTr/two_1.nii": "The image has several labels.",
        "labelsTr/orphan_1.nii.gz": "The label belongs to no image.",
        "labelsTr/constant_1.nii.gz": "The label's image is quarantined.",
        "imagesTr/link_1.nii.gz": "The scan is a duplicate.",
        "imagesTr/out_1.nii.gz": "The file is a link that leaves the folder.",
        "linked": "The folder is a link, which is not followed.",
    }
    usable = ["a_1", "a_2", "b_1", "c_1", "cutlabel_1", "shape_1", "space_1", "two_1"]
    assert images(result) == [f"imagesTr/{name}.nii.gz" for name in usable]
    assert result.summary["labelled"] == 2
    assert result.summary["quarantined"]["The scan is a duplicate."] == 2
    assert sum(result.summary["quarantined"].values()) == len(result.quarantine)
    assert [entry.path for entry in result.quarantine] == sorted(entry.path for entry in result.quarantine)
    named = {entry.path: entry.reason for entry in result.quarantine}
    assert "imagesTr/a_1.nii.gz" in named["imagesTr/copy_1.nii"]
    assert "imagesTr/b_1.nii.gz" in named["imagesTr/link_1.nii.gz"]
    assert "imagesTr/shape_1.nii.gz" in named["labelsTr/shape_1.nii.gz"]
    assert all(str(broken) not in reason for reason in named.values())


def test_processes_change_nothing(broken: Path) -> None:
    alone = index(broken, patients="{patient}_{study}", workers=1)
    together = index(broken, patients="{patient}_{study}", workers=3, progress=True)
    assert together == alone


def test_without_reading_voxels_only_headers_and_sizes_are_checked(broken: Path) -> None:
    result = index(broken, patients="{patient}_{study}", workers=1, check_voxels=False)
    found = {path.split("/")[-1].split("_")[0] for path in images(result)}
    assert {"constant", "nan", "copy"} <= found
    assert not {"cut", "text", "flat", "movie", "unknown"} & found


def test_a_whole_folder_that_cannot_be_used_is_an_error_that_counts_reasons(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / f"P{n}_1.nii", value=0)
    with pytest.raises(DatalistError, match=r"3 x The image is constant"):
        index(tmp_path, patients="{patient}_1", workers=1)
    with pytest.raises(DatalistError, match=r"3 x The patient is unknown"):
        index(tmp_path, patients="{patient}_2", workers=1)


def test_folders_without_images_are_refused(tmp_path: Path, decathlon: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nix", decathlon / "labelsTr"):
        options = {"images": "nix/*"} if folder.name == "labelsTr" else {}
        with pytest.raises(DatalistError, match="nothing to index"):
            index(folder, patients="{patient}_1", workers=1, **options)


def test_images_limits_what_is_indexed_and_counts_the_rest(decathlon: Path) -> None:
    result = index(decathlon, patients="{patient}_*", images="imagesTr/a_*", workers=1)
    assert images(result) == ["imagesTr/a_1.nii.gz", "imagesTr/a_2.nii.gz"]
    assert result.summary["left_out"] == 2
    assert reasons(result) == {"labelsTr/b_1.nii.gz": "The label belongs to no image."}


def test_a_name_in_a_nifti_header_is_hidden_in_its_path(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    fields = {"db_name": b"QUUX", "descrip": b"Quux^Zelda", "aux_file": b"zelda^quux"}
    for seed, (field, text) in enumerate(fields.items()):
        image = nibabel.Nifti1Image(np.random.default_rng(seed).integers(0, 9, (4, 5, 6)).astype(np.int16), None)
        image.header[field] = text
        (root / f"zelda_quux_{field}").mkdir(parents=True)
        nibabel.save(image, root / f"zelda_quux_{field}" / "P1.nii.gz")
    result = index_folder(root, patients="{patient}.nii.gz", workers=1)
    assert len(images(result)) == 3
    assert not any("quux" in path for path in images(result))


def test_a_label_template_finds_labels_beside_images_and_shared_ones(tmp_path: Path) -> None:
    for n, name in enumerate(["P1/T1", "P1/T2", "P2/T1"]):
        save(tmp_path / f"{name}.nii.gz", n)
    save(tmp_path / "P1" / "lesion.nii.gz", value=1)
    result = index(tmp_path, patients="{patient}/{sequence}", labels="{parent}/lesion.nii.gz", workers=1)
    assert images(result) == ["P1/T1.nii.gz", "P1/T2.nii.gz", "P2/T1.nii.gz"]
    labels = [row.get("label") for row in result.datalist.training]
    assert labels == [str(tmp_path / "P1/lesion.nii.gz")] * 2 + [None]
    with pytest.raises(ConfigError, match="fits no file"):
        index(tmp_path, patients="{patient}/{sequence}", labels="{parent}/nix_{name}", workers=1)


def test_columns_of_tables_reach_the_rows(decathlon: Path, tmp_path: Path) -> None:
    volumes = tmp_path / "volumes.csv"
    volumes.write_text("scan,patient,Site,score\na_1,P1,x,1\na_2,P1,,2\nb_1,P2,y,n/a\nc_1,P3,x,3\nd_1,P4,x,3\n")
    result = index(decathlon, patients=volumes, workers=1)
    kept = [
        {k: v for k, v in row.items() if k not in ("image", "label", "content")} for row in result.datalist.training
    ]
    assert kept == [
        {"patient_id": "P1", "site": "x", "score": 1},
        {"patient_id": "P1", "score": 2},
        {"patient_id": "P2", "site": "y"},
        {"patient_id": "P3", "site": "x", "score": 3},
    ]
    assert result.summary["unused_table_rows"] == 1


@pytest.mark.parametrize(("column", "value"), [("label", "1"), ("label", "labelsTr/a_1.nii.gz")])
def test_a_class_column_and_label_files_do_not_mix(decathlon: Path, tmp_path: Path, column: str, value: str) -> None:
    (tmp_path / "v.csv").write_text(f"scan,patient,{column}\na_1,P1,{value}\n")
    with pytest.raises(ConfigError, match="clashes with label files"):
        index(decathlon, patients=tmp_path / "v.csv", workers=1)


def test_a_class_column_alone_becomes_the_label(tmp_path: Path) -> None:
    for n in range(2):
        save(tmp_path / "scans" / f"s{n}.nii", n)
    (tmp_path / "v.csv").write_text("scan,patient,Label\ns0,P1,1\ns1,P2,0\n")
    result = index(tmp_path / "scans", patients=tmp_path / "v.csv", workers=1)
    assert [row["label"] for row in result.datalist.training] == [1, 0]


def find_text(files: Any) -> list[str]:
    return [file for file in files if file.endswith(".scan")]


def probe_text(path: Path, *, check_voxels: bool = True, is_label: bool = False) -> Probe:
    if path.read_text() == "bad":
        raise ScanError("The scan is bad.", got="bad", wanted="good", fix="none")
    return Probe((2, 2, 2), np.eye(4), (1, 1, 1), "uint8", path.read_text())


def test_another_format_is_one_source(tmp_path: Path) -> None:
    for name, text in (("P1_a", "x"), ("P1_b", "x"), ("P2_a", "bad"), ("P3_a", "y")):
        (tmp_path / f"{name}.scan").write_text(text)
    result = index(tmp_path, patients="{patient}_*", source=Source(find_text, probe_text), workers=2)
    assert images(result) == ["P1_a.scan", "P3_a.scan"]
    assert reasons(result) == {"P1_b.scan": "The scan is a duplicate.", "P2_a.scan": "The scan is bad."}


def die(path: Path, *, check_voxels: bool = True, is_label: bool = False) -> Probe:
    if path.read_text() == "bad":
        os._exit(1)
    return probe_text(path, check_voxels=check_voxels, is_label=is_label)


def test_a_file_that_kills_its_process_costs_that_file_alone(tmp_path: Path) -> None:
    for number, text in enumerate(["x", "bad", *"abcdefgh"]):
        (tmp_path / f"P{number}_a.scan").write_text(text)
    result = index(tmp_path, patients="{patient}_*", source=Source(find_text, die), workers=2)
    assert len(images(result)) == 9
    assert reasons(result) == {"P1_a.scan": "The process that read the file was killed."}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_reported(decathlon: Path) -> None:
    closed = decathlon / "closed"
    closed.mkdir(mode=0)
    try:
        refused = {found.path: found.refused.problem for found in walk(decathlon) if found.refused}
        assert refused == {"closed": "The folder cannot be read."}
    finally:
        closed.chmod(0o700)


def test_the_hippocampus_set_is_indexed_and_split_by_patient(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "msd_hippocampus"
    result = index(folder, patients=folder / "volumes.csv", workers=1)
    summary = result.summary
    assert (summary["scans"], summary["patients"], summary["labelled"]) == (199, 130, 199)
    assert summary["scans_per_patient"] == {1: 61, 2: 69}
    assert result.quarantine == []
    split = split_datalist(result.datalist, seed=0)
    assert {name: counts["patients"] for name, counts in split.summary().items()} == {
        "training": 91,
        "validation": 20,
        "test": 19,
    }
    result.write(tmp_path / "list.json")
    assert read_datalist(tmp_path / "list.json").digest() == result.datalist.digest()


def test_the_nodule_set_is_indexed_by_named_columns_and_stratified(data_dir: Path) -> None:
    folder = data_dir / "lidc_nodules"
    with pytest.raises(ConfigError, match="--volume-column"):
        index(folder, patients=folder / "nodules.csv", workers=1)
    result = index(
        folder, patients=folder / "nodules.csv", volume_column="nodule", patient_column="scan_index", workers=1
    )
    assert (result.summary["scans"], result.summary["patients"], result.summary["labelled"]) == (101, 101, 101)
    split = split_datalist(result.datalist, seed=0, stratify="texture")
    for section in split.sections.values():
        assert any(row["texture"] == 5 for row in section)
        assert any(row["texture"] < 5 for row in section)


def test_the_stroke_set_is_indexed_by_pattern_with_its_table_of_participants(data_dir: Path) -> None:
    folder = data_dir / "soop_lesions"
    options = {"patients": "bwsr{patient}_lesion.nii.gz", "table": folder / "participants.tsv"}
    result = index(folder, **options, workers=1, check_voxels=False)
    assert (result.summary["scans"], result.summary["patients"]) == (1049, 1049)
    assert result.quarantine == []
    ages = [row["age"] for row in result.datalist.training if "age" in row]
    assert len(ages) > 500
    assert max(ages) <= 120
