from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medclr.data.datalist import read_datalist, write_datalist
from medclr.data.privacy import References
from medclr.data.privacy_key import MAP_FILE
from medclr.data.privacy_map import _map_of
from medclr.data.rows import SERIES_SUFFIX, VOLUME_SUFFIXES, is_file_name
from medclr.errors import DatalistError

PRIVATE = ["Zorn^Quin", "19870203"]
SECRETS = ("zorn", "quin", "1987")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MEDCLR_HOME", str(tmp_path / "home"))
    _map_of.cache_clear()
    yield tmp_path / "home"
    _map_of.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, home: Path) -> Path:
    for name in ("ZORN_QUIN/19870203/T1.nii.gz", "ZORN_QUIN/19870203/mask.nii.gz", "plain.nii.gz"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "data"


def hide(path: str) -> str:
    return References().hide_all([(path, PRIVATE)])[0]


def put(folder: Path, *rows: Any) -> Path:
    path = folder / "datalist.json"
    path.write_text(json.dumps({"training": list(rows)}))
    return path


def row(image: Any, **columns: Any) -> dict[str, Any]:
    return {"image": image, "patient_id": "pat-1", **columns}


def refusal(path: Path) -> str:
    with pytest.raises(DatalistError) as caught:
        read_datalist(path)
    causes = [
        caught.value,
        caught.value.__cause__,
        None if caught.value.__suppress_context__ else caught.value.__context__,
    ]
    text = " ".join(str(cause) for cause in causes if cause is not None)
    below = text.replace(str(path.parent), "")
    assert not any(secret in below.lower() for secret in SECRETS)
    return text


def test_rows_keep_references_and_their_files_are_found(folder: Path) -> None:
    image, label = hide("ZORN_QUIN/19870203/T1.nii.gz"), hide("ZORN_QUIN/19870203/mask.nii.gz")
    assert not any(secret in image.lower() for secret in SECRETS)
    datalist = read_datalist(put(folder, row(image, label=label), row("plain.nii.gz")))
    assert datalist.training[0]["image"] == str(folder / image)
    assert datalist.training[0]["label"] == str(folder / label)
    write_datalist(datalist, folder / "again.json")
    text = (folder / "again.json").read_text()
    assert json.loads(text)["training"][0]["image"] == image
    assert not any(secret in text.lower() for secret in SECRETS)


def test_a_file_that_is_missing_is_named_by_its_reference(folder: Path) -> None:
    image = hide("ZORN_QUIN/19870203/missing.nii.gz")
    assert image in refusal(put(folder, row(image)))


def test_one_file_under_its_name_and_its_reference_is_there_twice(folder: Path) -> None:
    (folder / "a.nii.gz").symlink_to(folder / "ZORN_QUIN" / "19870203" / "T1.nii.gz")
    text = refusal(put(folder, row(hide("ZORN_QUIN/19870203/T1.nii.gz")), row("a.nii.gz")))
    assert "twice" in text
    assert "training[1]" in text


def test_a_reference_to_a_link_that_leads_out_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "zorn_quin.nii.gz").touch()
    (folder / "ZORN_OUT").symlink_to(tmp_path / "outside")
    (folder / "zorn_out.nii.gz").symlink_to(tmp_path / "outside" / "zorn_quin.nii.gz")
    for path in ("ZORN_OUT/zorn_quin.nii.gz", "zorn_out.nii.gz"):
        hidden = hide(path)
        assert "leaves the folder" in refusal(put(folder, row(hidden)))
        assert hidden in refusal(put(folder, row(hidden)))


def test_a_plain_link_that_leads_out_does_not_say_where_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "zorn_quin.nii.gz").touch()
    (folder / "link.nii.gz").symlink_to(tmp_path / "zorn_quin.nii.gz")
    assert "leaves the folder" in refusal(put(folder, row("link.nii.gz")))


@pytest.mark.parametrize("form", ["{}/../../x.nii.gz", "../data/{}", "{}/../{}", "/elsewhere/{}"])
def test_references_do_not_mix_with_dots_and_do_not_leave(folder: Path, form: str) -> None:
    hidden = hide("ZORN_QUIN/19870203/T1.nii.gz")
    assert "training[0], key 'image'" in refusal(put(folder, row(form.format(hidden, hidden))))


def test_absolute_references_below_a_linked_root_are_fine(folder: Path, tmp_path: Path) -> None:
    hidden = hide("ZORN_QUIN/19870203/T1.nii.gz")
    (tmp_path / "link").symlink_to(folder)
    path = put(folder, row(str(folder / hidden)))
    for root in (folder, tmp_path / "link"):
        assert read_datalist(path, root).training[0]["image"] == str(root / hidden)


def test_a_reference_that_nobody_knows_is_refused_with_its_place(folder: Path) -> None:
    hide("ZORN_QUIN/19870203/T1.nii.gz")
    text = refusal(put(folder, row("plain.nii.gz"), row(f"ref-{'0' * 20}/T1.nii.gz")))
    assert "training[1], key 'image'" in text
    assert "MEDCLR_HOME" in text


def test_without_the_private_map_a_datalist_of_references_says_what_to_do(folder: Path, home: Path) -> None:
    path = put(folder, row(hide("ZORN_QUIN/19870203/T1.nii.gz")))
    _map_of.cache_clear()
    os.replace(home / MAP_FILE, home / "elsewhere")
    text = refusal(path)
    assert "map of references is missing" in text
    assert "MEDCLR_HOME" in text


def test_copies_that_are_named_by_references_need_no_map(folder: Path, home: Path) -> None:
    hidden = hide("ZORN_QUIN/19870203/T1.nii.gz")
    (folder / hidden).parent.mkdir(parents=True)
    (folder / hidden).touch()
    _map_of.cache_clear()
    os.replace(home / MAP_FILE, home / "elsewhere")
    assert read_datalist(put(folder, row(hidden))).training[0]["image"] == str(folder / hidden)


BAD_VALUES = {
    "row": "Zorn^Quin 1987",
    "image a name": row("Zorn^Quin 1987"),
    "image with an ending": row("Zorn^Quin.1987"),
    "image an object": row({"Zorn": "Quin"}),
    "image a list": row(["plain.nii.gz", {"Zorn^Quin": 1987}]),
    "patient a list": {"image": "plain.nii.gz", "patient_id": ["Zorn^Quin"]},
    "days a date": row("plain.nii.gz", days="1987-02-03"),
    "age free text": row("plain.nii.gz", age="Quin is 19870"),
    "column an object": row("plain.nii.gz", site={"Zorn": "Quin"}),
    "label a list": row("plain.nii.gz", label=["Zorn^Quin"]),
}


@pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_errors_do_not_show_values(folder: Path, bad: Any) -> None:
    assert "training[0]" in refusal(put(folder, bad))


def test_an_unusable_path_is_refused_without_what_the_system_says_of_it(folder: Path) -> None:
    assert "cannot be used" in refusal(put(folder, row("x" * 300 + ".nii.gz")))


def test_a_series_file_is_a_volume(folder: Path) -> None:
    assert SERIES_SUFFIX in VOLUME_SUFFIXES
    assert is_file_name(f"x{SERIES_SUFFIX}")
    (folder / f"ser-1{SERIES_SUFFIX}").touch()
    path = put(folder, row(f"ser-1{SERIES_SUFFIX}"))
    assert read_datalist(path).training[0]["image"] == str(folder / f"ser-1{SERIES_SUFFIX}")
