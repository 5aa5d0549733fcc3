from __future__ import annotations

from pathlib import Path

import pytest

from medclr.data.cells import typed
from medclr.data.patients import Identify, PatientPattern, PatientTable
from medclr.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "path", "columns"),
    [
        ("{patient}/{study}_{sequence}.nii.gz", "raw/P01/s1_T1.nii.gz", ("P01", {"study_id": "s1", "sequence": "T1"})),
        ("{patient}_T1", "site/P01_T1.nii", ("P01", {})),
        ("bwsr{patient}_lesion.nii.gz", "lesions/bwsrsub-3_lesion.nii.gz", ("sub-3", {})),
        ("{patient}/{patient}_*", "x/aa/aa_1.nii.gz", ("aa", {})),
        ("{patient}/{patient}_*", "aa/a_1.nii.gz", None),
        ("{patient}/ses-{session}/", "P1/ses-2/T1.nii", ("P1", {"study_id": "2"})),
        ("{patient}_{session}_{study}", "P1_2_3.nii", ("P1", {"session": "2", "study_id": "3"})),
        ("{patient}_{label}", "P1_benign.nii", ("P1", {"label": "benign"})),
        ("{patient}.nii.gz", "a.b.nii.gz", ("a.b", {})),
        ("{patient}_T1.nii.gz", "P1_T1.nii.gz.nii.gz", None),
        (r"(?P<patient>\d+)_nod", "images/10_nod8_ann0.nii.gz", ("10", {})),
        (r"^(?P<patient>[A-Z]+)(_(?P<sequence>T\d))?", "AB_T2.nii", ("AB", {"sequence": "T2"})),
        (r"^(?P<patient>[A-Z]+)(_(?P<sequence>T\d))?", "AB.nii", ("AB", {})),
        (r"^(?P<patient>[A-Z]*)", "1.nii", None),
        ("{patient}_{sequence}", "NA_T1.nii", ("NA", {"sequence": "T1"})),
    ],
)
def test_patterns_read_the_patient_off_a_path(
    pattern: str, path: str, columns: tuple[str, dict[str, str]] | None
) -> None:
    found = PatientPattern(pattern).match(path)
    assert found == (None if columns is None else {"patient_id": columns[0], **columns[1]})


@pytest.mark.parametrize(
    "pattern",
    [
        "{study}",
        "{patient",
        "(?P<patient>",
        "{patient}_{image}",
        "{patient}_{study}_{study_id}",
        "{patient}{pa tient}",
        "{}",
    ],
)
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        PatientPattern(pattern)


def table(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize(
    "name", ["imagesTr/a.nii.gz", "imagesTr/a", "a.nii.gz", "a", "./imagesTr/a.nii.gz", "imagesTr\\a"]
)
@pytest.mark.parametrize(("delimiter", "bom"), [(",", ""), ("\t", ""), (";", "\ufeff")])
def test_a_table_names_a_volume_in_several_ways(tmp_path: Path, name: str, delimiter: str, bom: str) -> None:
    lines = [["Volume", "Subject", "Age", "x"], [name, "P1", "30", "n/a"], ["b", "P2", "40", "1"], []]
    path = table(tmp_path, bom + "\n".join(delimiter.join(line) for line in lines))
    known, unknown = Identify(path)(["imagesTr/a.nii.gz", "imagesTr/c.nii.gz"])
    assert known == {"imagesTr/a.nii.gz": {"patient_id": "P1", "age": "30"}}
    assert list(unknown) == ["imagesTr/c.nii.gz"]
    assert unknown["imagesTr/c.nii.gz"].got == "the table has no row for it"


def test_a_row_without_patient_leaves_the_scan_unknown(tmp_path: Path) -> None:
    known, unknown = Identify(table(tmp_path, "file,patient\na,\nb,N/A\nc,P"))(["a.nii", "b.nii", "c.nii"])
    assert list(known) == ["c.nii"]
    assert {error.got for error in unknown.values()} == {"its row names no patient"}


def test_a_name_that_fits_several_files_leaves_all_of_them_unknown(tmp_path: Path) -> None:
    path = table(tmp_path, "file,patient\nT1,P1\ny/T2,P1")
    known, unknown = Identify(path)(["x/T1.nii", "y/T1.nii", "y/T2.nii"])
    assert list(known) == ["y/T2.nii"]
    assert list(unknown) == ["x/T1.nii", "y/T1.nii"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 rows"),
        ("file,patient", "0 rows"),
        ("file,patient\na", "line 2"),
        ("file,patient\na,P1,3", "line 2"),
        ("file,patient\na,P1\na,P2", "lines 2 and 3"),
        ("file,image,patient\na,a,P1", "file, image"),
        ("file,patient,subject\na,P1,P1", "patient, subject"),
        ("nodule,patient\na,P1", "--table"),
        ("file,who\na,P1", "--patient-column"),
        ("file,patient,x,x\na,P1,1,2", "different names"),
        ("file,patient,study,study_id\na,P1,1,2", "mean different things"),
        ('file,patient\n"a,P1', "table in UTF-8"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="table of patients") as caught:
        PatientTable(table(tmp_path, text))
    assert words in str(caught.value)


def test_unreadable_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="table of patients"):
        PatientTable(tmp_path / "nix.csv")
    (tmp_path / "bad.csv").write_bytes(b"file,patient\n\xff\xfe,P1")
    with pytest.raises(ConfigError, match="table of patients"):
        PatientTable(tmp_path / "bad.csv")


def test_lines_that_say_the_same_twice_are_fine(tmp_path: Path) -> None:
    known, _ = Identify(table(tmp_path, "file,patient\na,P1\na,P1"))(["a.nii"])
    assert known == {"a.nii": {"patient_id": "P1"}}


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path, "nodule,who,image_quality\na,P1,good")
    known, _ = Identify(path, volume_column="nodule", patient_column="who")(["x/a.nii"])
    assert known == {"x/a.nii": {"patient_id": "P1", "image_quality": "good"}}
    with pytest.raises(ConfigError, match="asked for 'nix'"):
        Identify(path, volume_column="nix", patient_column="who")
    with pytest.raises(ConfigError, match="no table is given"):
        Identify("{patient}.nii", volume_column="nodule")


def test_a_pattern_and_a_table_of_patients_go_together(tmp_path: Path) -> None:
    path = table(tmp_path, "participant_id\tAge\tsex\nsub-1\t30\tF\nsub-9\t40\tM\n", "p.tsv")
    identify = Identify("{patient}_T1", path)
    known, unknown = identify(["sub-1_T1.nii", "sub-2_T1.nii", "other.nii"])
    assert known == {
        "sub-1_T1.nii": {"patient_id": "sub-1", "age": "30", "sex": "F"},
        "sub-2_T1.nii": {"patient_id": "sub-2"},
    }
    assert list(unknown) == ["other.nii"]
    assert (identify.unused_rows, identify.without_row) == (1, 1)


def test_two_tables_go_together_and_a_contradiction_is_unknown(tmp_path: Path) -> None:
    volumes = table(tmp_path, "file,patient,sex\na,P1,F\nb,P2,M")
    patients = table(tmp_path, "patient,sex,age\nP1,F,30\nP2,F,40", "p.csv")
    known, unknown = Identify(volumes, patients)(["a.nii", "b.nii"])
    assert known == {"a.nii": {"patient_id": "P1", "sex": "F", "age": "30"}}
    assert unknown["b.nii"].got == "two sources differ in sex"


def test_a_table_that_fits_no_scan_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, "file,patient\nx,P1")
    with pytest.raises(ConfigError, match="none of its 1 rows fits any of 2 scans"):
        Identify(path)(["a.nii", "b.nii"])


def test_a_column_becomes_numbers_only_as_a_whole() -> None:
    cells = [
        {
            "a": "1",
            "b": "1.5",
            "c": "007",
            "d": "1",
            "sex": "1",
            "age": "89+",
            "patient_id": "12",
            "label": "0",
            "e": "1e999",
        },
        {"a": "-2", "b": "3", "c": "12", "d": "x", "sex": "2", "age": "30", "patient_id": "13", "label": "1", "e": "1"},
        {"b": "1e3"},
    ]
    assert typed(cells) == [
        {"a": 1, "b": 1.5, "c": "007", "d": "1", "sex": "1", "age": 89, "patient_id": "12", "label": 0, "e": "1e999"},
        {"a": -2, "b": 3, "c": "12", "d": "x", "sex": "2", "age": 30, "patient_id": "13", "label": 1, "e": "1"},
        {"b": 1000.0},
    ]
    with pytest.raises(ConfigError, match="'days'"):
        typed([{"days": "soon"}])
