from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from medclr.data.privacy import References, has_reference, locate
from medclr.data.privacy_key import KEY_FILE, MAP_FILE, read_key
from medclr.data.privacy_map import _map_of
from medclr.errors import ConfigError

PRIVATE = ["Doe^John", "19870203"]
PATH = "DOE_JOHN/1987-02-03/T1/doe.nii.gz"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path / "home"))
    _map_of.cache_clear()
    yield tmp_path / "home"
    _map_of.cache_clear()


def forget() -> None:
    """Begin as a new process does."""
    _map_of.cache_clear()


def test_what_is_hidden_is_found_again_by_another_process(home: Path) -> None:
    with References() as references:
        hidden = references.hide(PATH, PRIVATE)
    parts = hidden.split("/")
    assert [has_reference(part) for part in parts] == [True, True, False, True]
    assert parts[2] == "T1"
    assert parts[3].endswith(".nii.gz")
    assert not any(word in hidden.lower() for word in ("doe", "john", "1987"))
    assert References().resolve(hidden) == PATH
    code = "import sys; from medclr.data.privacy import References; print(References().resolve(sys.argv[1]))"
    found = subprocess.run([sys.executable, "-c", code, hidden], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == PATH


def test_the_map_is_its_owners_alone(home: Path) -> None:
    before = os.umask(0)
    try:
        References().hide_all([(PATH, PRIVATE)])
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()} == {
        KEY_FILE: 0o600,
        MAP_FILE: 0o600,
    }
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_one_component_has_one_reference_and_needs_no_second_entry(home: Path) -> None:
    first, second = References().hide_all([(PATH, PRIVATE), (f"x/{PATH}", PRIVATE)])
    assert second == f"x/{first}"
    rows = sqlite3.connect(home / MAP_FILE).execute("SELECT COUNT(*) FROM components").fetchone()
    assert rows == (3,)


def test_nothing_is_made_where_nothing_is_hidden(home: Path) -> None:
    with References() as references:
        assert references.hide("raw/scan_3.nii.gz", PRIVATE) == "raw/scan_3.nii.gz"
        assert references.resolve("raw/scan_3.nii.gz") == "raw/scan_3.nii.gz"
    assert not home.exists()


def test_what_only_looks_like_a_reference_is_hidden_too(home: Path) -> None:
    name = f"ref-{'0' * 20}.dcm"
    hidden = References().hide(name, [])
    assert hidden != name
    assert References().resolve(hidden) == name


@pytest.mark.parametrize("name", ['Dö\'e "John"; DROP.dcm', "doe\n.dcm", "M\udcfcdoe john.dcm", "DOE JOHN.NII.GZ"])
def test_any_file_name_comes_back_as_it_was(home: Path, name: str) -> None:
    hidden = References().hide_all([(name, PRIVATE)])[0]
    assert hidden.endswith((".dcm", ".nii.gz"))
    forget()
    assert References().resolve(hidden) == name


def _hide(start: int) -> list[str]:
    with References() as references:
        return [references.hide(f"doe john {number}.dcm", PRIVATE) for number in range(start, start + 300)]


def test_processes_write_at_the_same_time(home: Path) -> None:
    with multiprocessing.get_context("fork").Pool(6) as pool:
        found = pool.map(_hide, [0, 200, 400, 600, 800, 1000], chunksize=1)
    forget()
    for start, hidden in zip([0, 200, 400, 600, 800, 1000], found, strict=True):
        assert [References().resolve(path) for path in hidden] == [
            f"doe john {number}.dcm" for number in range(start, start + 300)
        ]


def _find(path: str) -> tuple[str, bool]:
    found = locate(path)
    return found, _map_of(os.environ["MEDCLR_HOME"])._process == os.getpid()


def test_forked_workers_look_up_with_connections_of_their_own(home: Path) -> None:
    hidden = References().hide_all([(f"doe {number}.dcm", PRIVATE) for number in range(200)])
    forget()
    locate(hidden[0])  # opens a connection, which the workers inherit
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_find, hidden, chunksize=10) == [(f"doe {number}.dcm", True) for number in range(200)]


@pytest.mark.slow
def test_a_hundred_thousand_paths_take_seconds(home: Path) -> None:
    uid = "1.2.840.113619.2.55.3.604688"
    private = [*PRIVATE, "P0042", "A123456", "Hospital of Utopia", "Roe^Jane", *(f"{uid}.{part}" for part in range(6))]
    begin = time.perf_counter()
    with References() as references:
        hidden = [
            references.hide(f"export/DOE_JOHN/2019/S{n % 300}/MR.{uid}.9.{n}.dcm", [*private, f"{uid}.9.{n}"])
            for n in range(100_000)
        ]
    assert len(set(hidden)) == 100_000
    forget()
    assert References().resolve(hidden[-1]).endswith("99999.dcm")
    found = [References().resolve(path) for path in hidden[:20_000]]
    assert found[7] == f"export/DOE_JOHN/2019/S7/MR.{uid}.9.7.dcm"
    assert time.perf_counter() - begin < 60  # about 6 s on one core


# Errors


def test_an_unknown_reference_says_where_it_was_looked_for(home: Path) -> None:
    References().hide_all([(PATH, PRIVATE)])
    with pytest.raises(ConfigError, match=r"(?s)does not know.*MEDCLR_HOME"):
        References().resolve(f"ref-{'0' * 20}/x.dcm")


def test_a_missing_map_says_what_to_do(home: Path) -> None:
    hidden = References().hide_all([(PATH, PRIVATE)])[0]
    forget()
    (home / MAP_FILE).unlink()
    with pytest.raises(ConfigError, match=r"(?s)map of references is missing.*MEDCLR_HOME"):
        locate(hidden)
    assert not (home / MAP_FILE).exists()


def test_a_missing_private_folder_says_what_to_do_and_is_not_made(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)key is missing.*MEDCLR_HOME"):
        locate(f"ref-{'0' * 20}/x.dcm")
    assert not home.exists()


@pytest.mark.parametrize("content", [b"", b"no database, but text " * 100])
def test_a_damaged_map_says_what_to_do(home: Path, content: bytes) -> None:
    hidden = References().hide_all([(PATH, PRIVATE)])[0]
    forget()
    (home / MAP_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"(?s)map of references cannot be used.*Restore"):
        locate(hidden)
    assert (home / MAP_FILE).read_bytes() == content


@pytest.mark.parametrize("name", ["ROE_JANE", "../../etc", "..", "a/b", "/etc/passwd", "", "doe\0"])
def test_a_map_that_was_tampered_with_is_refused_without_saying_the_name(home: Path, name: str) -> None:
    hidden = References().hide_all([(PATH, PRIVATE)])[0]
    forget()
    with sqlite3.connect(home / MAP_FILE) as database:
        assert database.execute("UPDATE components SET name = ?", (name.encode(),)).rowcount == 3
    with pytest.raises(ConfigError, match="does not fit its key") as caught:
        References().resolve(hidden)
    assert "ROE" not in str(caught.value)
    assert "passwd" not in str(caught.value)


@pytest.mark.parametrize("name", ["..", ".", "a/../../b", "/etc/passwd", "x\0y"])
def test_even_with_the_key_no_reference_leads_out_of_a_folder(home: Path, name: str) -> None:
    References().hide_all([(PATH, PRIVATE)])
    forged = _map_of(str(home))._digest(read_key(home), name)
    forget()
    with sqlite3.connect(home / MAP_FILE) as database:
        database.execute("INSERT INTO components VALUES (?, ?)", (forged, name.encode()))
    with pytest.raises(ConfigError, match="does not fit its key"):
        References().resolve(f"a/{forged}/b")


def test_a_map_of_another_key_is_refused(home: Path) -> None:
    hidden = References().hide_all([(PATH, PRIVATE)])[0]
    forget()
    (home / KEY_FILE).write_text("11" * 32)
    for act in (lambda: References().resolve(hidden), lambda: References().hide_all([(PATH, PRIVATE)])):
        with pytest.raises(ConfigError, match="another key"):
            act()


@pytest.mark.parametrize("bits", [0o644, 0o640, 0o602])
def test_a_map_that_others_may_read_is_refused(home: Path, bits: int) -> None:
    hidden = References().hide_all([(PATH, PRIVATE)])[0]
    forget()
    (home / MAP_FILE).chmod(bits)
    with pytest.raises(ConfigError, match=r"(?s)Others may read.*chmod 600"):
        References().resolve(hidden)


# Files


def test_files_are_found_under_their_real_names_or_under_the_very_name(home: Path, tmp_path: Path) -> None:
    hidden = References().hide_all([(PATH, PRIVATE)])[0]
    real = tmp_path / "data" / PATH
    real.parent.mkdir(parents=True)
    real.touch()
    assert locate(tmp_path / "data" / hidden) == str(real)
    assert locate(real) == str(real)
    copy = tmp_path / "copies" / hidden  # as predictions are named
    copy.parent.mkdir(parents=True)
    copy.touch()
    assert locate(copy) == str(copy)
    inner = copy.parent / References().hide_all([("doe.dcm", PRIVATE)])[0]
    assert locate(inner) == str(copy.parent / "doe.dcm")
