from __future__ import annotations

import pytest

from medclr.data.privacy_match import private_components, suffix_of

HEADER = [
    "Müller-Lüdenscheidt^Anna Maria",
    "P-0042/7",
    "19870203",
    "20190312",
    "A123456",
    "1.2.840.113619.2.55.3.604688",
]


def hidden(path: str, private: list[str]) -> str:
    parts = path.split("/")
    marks = private_components([part[: len(part) - len(suffix_of(part))] for part in parts], private)
    return "/".join("*" if mark else part for part, mark in zip(parts, marks, strict=True))


@pytest.mark.parametrize(
    "part",
    [
        *(
            "DOE^JOHN",
            "doe_john",
            "JohnDoe",
            "Doe, John",
            "JOHN.DOE",
            "johndoe2",
            "John-Doe-T1",
            "DOE",
            "ct_john",
            "JDoe",
        ),
        *("doej", "DoeJohn_19", "x John x", "MRDOEJOHN", "ScanJohn", "Do\u0308e John", "DÖE_JOHN"),
    ],
)
def test_a_name_is_found_however_it_is_spelt(part: str) -> None:
    assert hidden(part, ["Doe^John"]) == "*"


@pytest.mark.parametrize(
    "part", ["Mueller", "MULLER", "müller", "annamaria", "Anna_Maria", "luedenscheidt", "LUDENSCHEIDT"]
)
def test_accents_and_umlauts_do_not_matter(part: str) -> None:
    assert hidden(part, HEADER) == "*"


@pytest.mark.parametrize("part", ["山田太郎", "山田_T1", "Yamada", "tarou yamada", "太郎"])
def test_names_in_several_scripts_are_found_in_each(part: str) -> None:
    assert hidden(part, ["Yamada^Tarou=山田^太郎=やまだ^たろう"]) == "*"


@pytest.mark.parametrize(
    "part",
    ["P-0042/7".replace("/", "_"), "P00427", "p00427_T1", "sub-P00427", "x.p-0042-7.y", "0042", "A123456", "a-123456"],
)
def test_an_id_is_found_with_or_without_separators(part: str) -> None:
    assert hidden(part, HEADER) == "*"


@pytest.mark.parametrize(
    "part",
    [
        *(
            "19870203",
            "1987-02-03",
            "03.02.1987",
            "2.3.1987",
            "3-2-87",
            "870203",
            "030287",
            "x19870203y",
            "DOB 1987_02_03",
        ),
        *("19870203101500", "03Feb1987", "3-feb-87", "Feb 3, 1987", "1987February03", "3rd_february_1987", "198702"),
        *("1987-02", "Feb1987", "02-1987", "1987034", "198702_03", "19870302"),
    ],
)
def test_a_date_is_found_in_the_usual_spellings(part: str) -> None:
    assert hidden(part, ["19870203"]) == "*"


@pytest.mark.parametrize("part", ["1987", "19870204", "1988-02-03", "0001", "3", "IM-0003-0002", "Mar1987", "february"])
def test_other_numbers_are_no_date_of_the_patient(part: str) -> None:
    assert hidden(part, ["19870203"]) == part


def test_a_date_is_found_across_folders() -> None:
    assert hidden("a/2019/03/12/scan.dcm", ["20190312"]) == "a/*/*/*/*".replace("/*/*/*/*", "/*/*/*/scan.dcm")
    assert hidden("a/201903/12/scan.dcm", ["20190312"]) == "a/*/*/scan.dcm"
    assert hidden("a/2019/04/12/scan.dcm", ["20190312"]) == "a/2019/04/12/scan.dcm"


@pytest.mark.parametrize(
    "part",
    [
        "1.2.840.113619.2.55.3.604688",
        "MR.1.2.840.113619.2.55.3.604688.dcm",
        "1_2_840_113619_2_55_3_604688",
        "12840113619",
    ],
)
def test_a_uid_is_found_in_file_names(part: str) -> None:
    assert hidden(part, HEADER) == "*"


@pytest.mark.parametrize(("value", "part"), [("7", "7"), ("7", "sub-07"), ("7", "P7"), ("AB", "ab"), ("007", "pat7")])
def test_short_ids_count_where_they_are_all_that_a_component_says(value: str, part: str) -> None:
    assert hidden(part, [value]) == "*"


@pytest.mark.parametrize("part", ["IM_7", "slice17", "T2", "cab", "7T"])
def test_short_ids_do_not_count_inside_others(part: str) -> None:
    assert hidden(part, ["7", "ab"]) == part


@pytest.mark.parametrize(
    "path", ["raw/CT/series_003/IM-0001-0012.dcm", "imagesTr/scan.nii.gz", "T1_axial/0042x.dcm".replace("0042x", "142")]
)
def test_what_says_nothing_of_the_patient_stays(path: str) -> None:
    assert hidden(path, HEADER) == path


def test_each_of_several_values_counts() -> None:
    assert hidden("Roe/Poe/Coe", ["Roe^A\\Poe^B", ""]) == "*/*/Coe"


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.nii.gz", ".nii.gz"), ("A.DCM", ".DCM"), ("doe.john", ""), ("x.1987", ""), (".dcm", "")]
)
def test_only_known_suffixes_are_suffixes(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix
