from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medclr.data.bids import BidsDatasets
from medclr.data.index import IndexResult
from medclr.data.index import index as index_folder

index = partial(index_folder, workers=1)


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path_factory.mktemp("home")))


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 200, (4, 5, 6)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path


def describe(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_description.json").write_text(json.dumps({"Name": name, "BIDSVersion": "1.9.0"}))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two subjects: one with two sessions and scan times, one without sessions; tables of all kinds."""
    root = tmp_path / "study"
    describe(root, "A study")
    for seed, name in enumerate(
        [
            "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
            "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz",
            "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
            "sub-02/anat/sub-02_T1w.nii.gz",
            "sub-02/pet/sub-02_pet.nii.gz",
        ]
    ):
        save(root / name, seed)
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsex\tgroup\tname\nsub-01\t95\tfemale\tpatient\tJane\nsub-02\tn/a\tM\tcontrol\tJohn\n"
    )
    (root / "sub-01" / "sub-01_sessions.tsv").write_text(
        "session_id\tage\tacq_time\nses-a\t60\t2001-01-01T12:00:00\nses-b\t61.5\t2001-02-01T12:00:00\n"
    )
    (root / "sub-01" / "ses-b" / "sub-01_ses-b_scans.tsv").write_text(
        "filename\tacq_time\nanat/sub-01_ses-b_T1w.nii.gz\t2001-02-03T09:00:00\n"
    )
    return root


def rows(result: IndexResult) -> dict[str, dict[str, Any]]:
    """Rows by file name, without paths and digests."""
    found = {}
    for row in result.datalist.training:
        kept = {key: value for key, value in row.items() if key not in ("image", "content")}
        found[os.path.basename(row["image"]).split(".")[0]] = kept
    return found


def test_a_bids_data_set_needs_no_word_of_its_patients(dataset: Path) -> None:
    result = index(dataset, keep_ids=True)
    assert result.quarantine == []
    first = {"patient_id": "sub-01", "modality": "MR", "sex": "F", "diagnosis": "patient"}
    second = {"patient_id": "sub-02", "sex": "M", "diagnosis": "control", "study_id": "sub-02"}
    assert rows(result) == {
        "sub-01_ses-a_T1w": first
        | {"study_id": "ses-a", "series_id": "sub-01_ses-a_T1w", "sequence": "T1w", "age": 60, "days": 0},
        "sub-01_ses-a_FLAIR": first
        | {"study_id": "ses-a", "series_id": "sub-01_ses-a_FLAIR", "sequence": "FLAIR", "age": 60, "days": 0},
        "sub-01_ses-b_T1w": first
        | {"study_id": "ses-b", "series_id": "sub-01_ses-b_T1w", "sequence": "T1w", "age": 61.5, "days": 33},
        "sub-02_T1w": second | {"series_id": "sub-02_T1w", "modality": "MR", "sequence": "T1w"},
        "sub-02_pet": second | {"series_id": "sub-02_pet", "modality": "PT", "sequence": "pet"},
    }
    summary = result.summary
    assert (summary["patients"], summary["studies"], summary["series"]) == (2, 3, 5)
    assert summary["scans_per_patient"] == {2: 1, 3: 1}


def test_ids_are_pseudonyms_unless_they_are_public(dataset: Path) -> None:
    result = index(dataset)
    text = json.dumps([{k: v for k, v in row.items() if k != "image"} for row in result.datalist.training])
    assert not any(word in text for word in ("sub-0", "ses-", "2001", "Jane"))
    assert {len(row["patient_id"]) for row in result.datalist.training} == {20}
    assert [row["days"] for row in result.datalist.training[:3]] == [0, 0, 33]


def test_subject_labels_are_hidden_in_paths_where_asked(dataset: Path) -> None:
    (dataset / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_PDw.nii.gz").write_text("none")
    plain, hidden = index(dataset), index(dataset, hide_subjects=True)
    assert "sub-01/ses-a" in json.dumps(plain.datalist.training)
    shown = json.dumps([[row["image"] for row in hidden.datalist.training], hidden.quarantine])
    assert "sub-0" not in shown
    assert len(hidden.datalist.training) == 5


def test_an_age_of_over_89_is_capped(dataset: Path) -> None:
    (dataset / "sub-01" / "sub-01_sessions.tsv").unlink()
    ages = {row["age"] for row in index(dataset).datalist.training if "age" in row}
    assert ages == {90}


def test_subjects_of_two_data_sets_are_two_patients_even_under_one_label(dataset: Path) -> None:
    describe(dataset.parent / "other", "Another study")
    save(dataset.parent / "other" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", 77)
    for number in (1, 2):
        describe(dataset.parent / f"twin{number}", "Twins")
        save(dataset.parent / f"twin{number}" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", 80 + number)
    result = index(dataset.parent)
    assert result.summary["patients"] == 5
    kept = {row["patient_id"] for row in index(dataset.parent, keep_ids=True).datalist.training}
    assert len(kept) == 5


def test_a_patient_is_the_same_from_wherever_the_folder_is_indexed(dataset: Path) -> None:
    inside = {row["patient_id"] for row in index(dataset).datalist.training}
    assert inside == {row["patient_id"] for row in index(dataset.parent).datalist.training}


@pytest.fixture
def derived(dataset: Path) -> Path:
    """Derivatives with and without a description of their own, source data, and a segmentation."""
    describe(dataset / "derivatives" / "prep", "Prep")
    save(dataset / "derivatives" / "prep" / "sub-01" / "anat" / "sub-01_desc-brain_T1w.nii.gz", 50)
    save(dataset / "derivatives" / "plain" / "sub-02_T1w.nii.gz", 51)
    save(dataset / "sourcedata" / "sub-02" / "raw.nii.gz", 52)
    save(dataset / "sub-02" / "anat" / "sub-02_dseg.nii.gz", 53)
    return dataset


def test_derivatives_and_source_data_are_left_out_unless_asked_for(derived: Path) -> None:
    result = index(derived)
    reason = "The file is no raw scan of its BIDS data set."
    assert {entry.path: entry.problem for entry in result.quarantine} == dict.fromkeys(
        [
            "derivatives/plain/sub-02_T1w.nii.gz",
            "derivatives/prep/sub-01/anat/sub-01_desc-brain_T1w.nii.gz",
            "sourcedata/sub-02/raw.nii.gz",
            "sub-02/anat/sub-02_dseg.nii.gz",
        ],
        reason,
    )
    assert all("--derivatives" in entry.reason for entry in result.quarantine[:3])
    asked = index(derived, derivatives=True)
    assert [entry.path for entry in asked.quarantine] == ["sub-02/anat/sub-02_dseg.nii.gz"]
    assert asked.summary["patients"] == 2
    assert asked.summary["scans"] == 8


def test_derivatives_indexed_alone_show_the_subjects_of_their_data_set(derived: Path) -> None:
    raw = {row["patient_id"] for row in index(derived).datalist.training}
    alone = index(derived / "derivatives" / "prep")
    assert {row["patient_id"] for row in alone.datalist.training} < raw


def test_masks_in_derivatives_can_be_labels(derived: Path) -> None:
    for name in ("sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-02/anat/sub-02_T1w"):
        save(derived / "derivatives" / "masks" / f"{name}.nii.gz", 60)
    (derived / "derivatives" / "plain" / "sub-02_T1w.nii.gz").unlink()
    result = index(derived, labels="{folder}/derivatives/masks/{parent}/{name}")
    assert result.summary["labelled"] == 2


def test_a_table_of_patients_counts_before_subject_labels_and_for_the_whole_subject(dataset: Path) -> None:
    table = dataset.parent / "who.csv"
    table.write_text("scan,patient\nsub-01,P7\nsub-02/anat/sub-02_T1w.nii.gz,P8\n")
    result = index(dataset, patients=table, keep_ids=True)
    assert {name: row["patient_id"] for name, row in rows(result).items()} == {
        "sub-01_ses-a_T1w": "P7",
        "sub-01_ses-a_FLAIR": "P7",
        "sub-01_ses-b_T1w": "P7",
        "sub-02_T1w": "P8",
        "sub-02_pet": "P8",
    }


def test_a_file_of_no_subject_is_of_unknown_patient(dataset: Path) -> None:
    save(dataset / "template.nii.gz", 90)
    (entry,) = index(dataset).quarantine
    assert (entry.path, entry.problem) == ("template.nii.gz", "The patient is unknown.")
    assert "--patients" in entry.reason


@pytest.mark.parametrize(
    "content",
    [
        "",
        "participant_id\tage\n",
        "participant_id\tage\nsub-01\n",
        "nothing",
        "\udcff",
        "participant_id\tage\nsub-01\tx\n",
    ],
)
def test_a_damaged_table_costs_its_columns_and_no_scan(dataset: Path, content: str) -> None:
    (dataset / "participants.tsv").write_bytes(content.encode("utf-8", "surrogateescape"))
    (dataset / "dataset_description.json").write_text("[")
    result = index(dataset)
    assert result.summary["scans"] == 5
    assert not any("diagnosis" in row for row in result.datalist.training)


def test_tables_are_found_by_subject_and_session_of_the_whole_data_set(dataset: Path) -> None:
    (dataset / "sub-01" / "sub-01_sessions.tsv").unlink()
    (dataset / "sessions.tsv").write_text("participant_id\tsession_id\tdays\n01\tb\t17\nsub-02\tb\t9\n")
    datasets = BidsDatasets(dataset, ["dataset_description.json"])
    found = datasets.find("sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz")
    assert found is not None
    assert found.cells["days"] == "17"
    other = datasets.find("sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz")
    assert other is not None
    assert "days" not in other.cells
