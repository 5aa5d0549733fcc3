from __future__ import annotations

import multiprocessing
import os
import stat
from datetime import date, datetime
from pathlib import Path

import pytest

from medclr.data.privacy import (
    Pseudonyms,
    capped_age,
    days_since_first,
    described,
    is_private_column,
    parse_date,
    private_home,
)
from medclr.data.privacy_key import KEY_FILE, MAP_FILE
from medclr.errors import ConfigError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "home"


def test_the_private_folder_is_the_variables_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MEDCLR_HOME", "~/mine")
    assert private_home() == tmp_path / "mine"
    for empty in ("", " "):
        monkeypatch.setenv("MEDCLR_HOME", empty)
        assert private_home() == tmp_path / ".config" / "medclr"
    monkeypatch.delenv("MEDCLR_HOME")
    assert private_home() == tmp_path / ".config" / "medclr"
    assert not (tmp_path / ".config").exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_key_is_made_once_and_for_its_owner_alone(home: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        first = Pseudonyms(home).patient("P1")
    finally:
        os.umask(before)
    assert mode(home) == 0o700
    assert mode(home / KEY_FILE) == 0o600
    assert [path.name for path in home.iterdir()] == [KEY_FILE]
    assert Pseudonyms(home).patient("P1") == first
    assert Pseudonyms(home.with_name("other")).patient("P1") != first


def _pseudonym(home: Path) -> str:
    return Pseudonyms(home).patient("P1")


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        for round_ in range(20):
            home = tmp_path / str(round_)
            assert len(set(pool.map(_pseudonym, [home] * 8, chunksize=1))) == 1
            assert [path.name for path in home.iterdir()] == [KEY_FILE]


def test_a_file_system_without_hard_links_gets_a_key_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = Pseudonyms(home).patient("P1")
    assert mode(home / KEY_FILE) == 0o600
    assert Pseudonyms(home).patient("P1") == first


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o666, 0o644])
def test_a_key_that_others_may_read_is_refused(home: Path, bits: int) -> None:
    Pseudonyms(home)
    (home / KEY_FILE).chmod(bits)
    with pytest.raises(ConfigError, match=r"(?s)Others may read the private key.*chmod 600"):
        Pseudonyms(home)


@pytest.mark.parametrize("content", ["", "\n", "ab12", "0" * 62, "0" * 66, "z" * 64, "\u00fc" * 64])
def test_a_damaged_key_is_refused_and_not_shown(home: Path, content: str) -> None:
    Pseudonyms(home)
    (home / KEY_FILE).write_text(content)
    with pytest.raises(ConfigError, match="key is damaged") as caught:
        Pseudonyms(home)
    assert "fix:" in str(caught.value)
    assert len(content) < 3 or content not in str(caught.value)
    assert (home / KEY_FILE).read_text() == content


def test_no_second_key_is_made_where_a_map_needs_the_first(home: Path) -> None:
    Pseudonyms(home)
    (home / KEY_FILE).unlink()
    (home / MAP_FILE).touch(0o600)
    with pytest.raises(ConfigError, match=r"(?s)key is missing.*move .* away"):
        Pseudonyms(home)
    assert not (home / KEY_FILE).exists()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match=r"(?s)Others may write.*chmod 700"):
        Pseudonyms(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="MEDCLR_HOME"):
        Pseudonyms(tmp_path / "file" / "home")


def test_a_key_that_is_a_folder_is_refused(home: Path) -> None:
    (home / KEY_FILE).mkdir(parents=True)
    home.chmod(0o700)
    with pytest.raises(ConfigError, match="is no file"):
        Pseudonyms(home)


def test_pseudonyms_are_stable_short_and_of_their_kind(home: Path) -> None:
    names = Pseudonyms(home)
    made = [names.patient("1.2.3"), names.study("1.2.3"), names.series("1.2.3"), names.content("1.2.3")]
    assert [name.partition("-")[0] for name in made] == ["pat", "stu", "ser", "vox"]
    assert len({name.partition("-")[2] for name in made}) == 4
    for name in made:
        assert len(name) == 20
        assert name == name.lower()
        assert "1.2.3" not in name


def test_the_pseudonyms_of_a_known_key_never_change(home: Path) -> None:
    """Datalists that exist name patients by them."""
    home.mkdir(parents=True, mode=0o700)
    (home / KEY_FILE).write_text("00" * 32)
    (home / KEY_FILE).chmod(0o600)
    assert Pseudonyms(home).patient("P1") == "pat-6w77los27mvvslba"


def test_one_patient_is_one_however_the_id_is_spelt(home: Path) -> None:
    names = Pseudonyms(home)
    assert len({names.patient(text) for text in ("P 001", " P 001 ", "p  001", "P 001\0", "\uff30 001")}) == 1
    assert len({names.patient(text) for text in ("P001", "P01", "P1", "P 001", "")}) == 5
    assert names.patient("P1", "Hospital A") != names.patient("P1", "Hospital B")
    assert names.patient("P1", "Hospital A") == names.patient("p1", " hospital a ")
    assert names.patient("ab", "c") != names.patient("a", "bc")


def test_ids_that_are_no_utf8_have_pseudonyms(home: Path) -> None:
    assert Pseudonyms(home).patient("M\udcfcller") != Pseudonyms(home).patient("M\udcfaller")


@pytest.mark.parametrize(
    ("age", "shown"),
    [
        *((0, 0), (0.5, 0.5), (89, 89), (89.01, 90), (90, 90), (91, 90), (119, 90)),
        *((None, None), (float("nan"), None), (float("inf"), None), (-1, None), (True, None)),
    ],
)
def test_ages_above_89_are_all_one(age: float | None, shown: float | None) -> None:
    assert capped_age(age) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("20190312", " 20190312 ", "2019-03-12", "2019-3-12", "2019.03.12", "2019/03/12", "20190312101500"),
        *("20190312101500.123456", "20190312101500.12+0100", "201903121015", "2019-03-12T10:15:00", "2019-03-12 10:15"),
        *("2019-03-12T10:15:00Z", "20190312\0", "20190312T101500"),
        *(date(2019, 3, 12), datetime(2019, 3, 12, 10, 15)),
    ],
)
def test_dates_are_read_in_the_spellings_of_dicom_and_iso(text: object) -> None:
    assert parse_date(text) == date(2019, 3, 12)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "2019",
            "201903",
            "2019-03",
            "20191301",
            "20190230",
            "00000000",
            "2019031",
            "n/a",
            "12/03/2019",
            "unknown",
        ),
        *("20190312x", "99990101", "1.2.840", "20190312101500123456789", None, 20190312, 3.5, "2019-03-12-01"),
    ],
)
def test_what_is_no_date_is_none(text: object) -> None:
    assert parse_date(text) is None


def test_days_count_from_the_first_of_a_patients_dates() -> None:
    assert days_since_first(["20190312", "2019-03-01T23:59", "20200301", "", "20190301"]) == [11, 0, 366, None, 0]
    assert days_since_first(["", None]) == [None, None]
    assert days_since_first([]) == []


def test_values_are_described_without_their_text() -> None:
    secret = "Doe^John 19870203"
    for value in (secret, [secret], {secret: secret}, (secret,), secret.encode()):
        assert "Doe" not in described(value)
        assert "1987" not in described(value)
    assert described(19870203) == "a number"
    assert [described(value) for value in (None, True, float("nan"), " ", [])] == [
        *("null", "true", "nan", "an empty text", "an empty list")
    ]


@pytest.mark.parametrize(
    "name",
    [
        "PatientName",
        "patient_name",
        "dob",
        "BirthDate",
        "birthdate",
        "Scan Date",
        "acq_time_date",
        "Comments",
        "studydate",
    ],
)
def test_columns_that_hold_names_dates_or_free_text_are_known_by_their_name(name: str) -> None:
    assert is_private_column(name)


@pytest.mark.parametrize("name", ["age", "sex", "site", "scanner", "diagnosis", "update", "candidate", "days", "label"])
def test_other_columns_are_not(name: str) -> None:
    assert not is_private_column(name)
