from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medclr.data.datalist import Datalist, in_channels, read_datalist, write_datalist
from medclr.data.files import refuse_unwritable
from medclr.errors import DatalistError
from tests.test_disk import FAULT, FAULTS


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def put(path: Path, **content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def row(image: Any, patient: Any = "P1", **columns: Any) -> dict[str, Any]:
    return {"image": image, "patient_id": patient, **columns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz", "sub/d.nii", "labels/a.nii.gz", "e.nii.gz")
    return tmp_path


def test_rows_come_back_with_absolute_paths_and_their_columns(folder: Path) -> None:
    path = put(
        folder / "list.json",
        name="mine",
        training=[row("a.nii.gz", 7, label="labels/a.nii.gz", days=3, site="X", study_id=5, anything=True)],
        test=[row("./sub/../sub/d.nii", " P2 ", label=1)],
    )
    datalist = read_datalist(path)
    assert datalist.training == [
        {
            "image": str(folder / "a.nii.gz"),
            "label": str(folder / "labels/a.nii.gz"),
            "patient_id": "7",
            "days": 3,
            "site": "X",
            "study_id": "5",
            "anything": True,
        }
    ]
    assert datalist.test == [{"image": str(folder / "sub/d.nii"), "patient_id": "P2", "label": 1}]
    assert datalist.validation == []
    assert datalist.extra == {"name": "mine"}
    assert datalist.patients("test") == ["P2"]


def test_dataset_dir_is_the_argument_then_the_files_key_then_the_files_folder(tmp_path: Path) -> None:
    for place in ("beside", "recorded", "given"):
        touch(tmp_path, f"{place}/a.nii")
    rows = [row("a.nii")]
    plain = put(tmp_path / "beside" / "list.json", training=rows)
    recorded = put(tmp_path / "beside" / "recorded.json", dataset_dir="../recorded", training=rows)
    assert read_datalist(plain).training[0]["image"] == str(tmp_path / "beside/a.nii")
    assert read_datalist(recorded).training[0]["image"] == str(tmp_path / "recorded/a.nii")
    assert read_datalist(recorded, tmp_path / "given").training[0]["image"] == str(tmp_path / "given/a.nii")
    with pytest.raises(DatalistError, match="folder of the scans is not there"):
        read_datalist(plain, tmp_path / "nowhere")


def test_an_absent_sequence_stays_null_and_counts_as_a_channel(folder: Path) -> None:
    path = put(folder / "list.json", training=[row(["a.nii.gz", None]), row([None, "b.nii.gz"])])
    datalist = read_datalist(path)
    assert datalist.training[0]["image"] == [str(folder / "a.nii.gz"), None]
    assert in_channels(datalist) == 2
    write_datalist(datalist, folder / "again.json")
    assert read_datalist(folder / "again.json").training == datalist.training


def test_a_single_path_is_one_channel(folder: Path) -> None:
    assert in_channels(read_datalist(put(folder / "list.json", training=[row("a.nii.gz"), row(["b.nii.gz"])]))) == 1


def test_rows_built_by_hand_with_different_channels_have_no_in_channels(folder: Path) -> None:
    rows = [row(str(folder / "a.nii.gz")), row([str(folder / "b.nii.gz"), None])]
    with pytest.raises(DatalistError, match="number of channels"):
        in_channels(Datalist({"training": rows}, folder))


BAD_ROWS = {
    "image missing": ([{"patient_id": "P"}], "training[0], key 'image'"),
    "image null": ([row(None)], "training[0], key 'image'"),
    "patient missing": ([row("a.nii.gz"), {"image": "b.nii.gz"}], "training[1], key 'patient_id'"),
    "patient null": ([row("a.nii.gz", None)], "training[0], key 'patient_id'"),
    "patient blank": ([row("a.nii.gz", "  ")], "training[0], key 'patient_id'"),
    "patient float": ([row("a.nii.gz", 1.5)], "training[0], key 'patient_id'"),
    "patient bool": ([row("a.nii.gz", True)], "training[0], key 'patient_id'"),
    "row no object": (["a.nii.gz"], "training[0]"),
    "image a number": ([row(3)], "training[0], key 'image'"),
    "image list with a number": ([row(["a.nii.gz", 3])], "training[0], key 'image'"),
    "image list of nulls": ([row([None, None])], "training[0], key 'image'"),
    "image list empty": ([row([])], "training[0], key 'image'"),
    "channels differ": ([row(["a.nii.gz", None]), row("b.nii.gz")], "training[1], key 'image'"),
    "same file twice": ([row("a.nii.gz"), row("sub/../a.nii.gz")], "training[1], key 'image'"),
    "same file in two channels": ([row(["a.nii.gz", "a.nii.gz"])], "training[0], key 'image'"),
    "unknown type": ([row("a.png")], "training[0], key 'image'"),
    "no type": ([row("a")], "training[0], key 'image'"),
    "unknown label type": ([row("a.nii.gz", label="labels/a.png")], "training[0], key 'label'"),
    "label null": ([row("a.nii.gz", label=None)], "training[0], key 'label'"),
    "label list": ([row("a.nii.gz", label=[1, 2])], "training[0], key 'label'"),
    "leaves by dots": ([row("../a.nii.gz")], "training[0], key 'image'"),
    "leaves absolutely": ([row("/somewhere/a.nii.gz")], "training[0], key 'image'"),
    "label leaves": ([row("a.nii.gz", label="../a.nii.gz")], "training[0], key 'label'"),
    "missing file": ([row("a.nii.gz"), row("nix.nii.gz")], "training[1], key 'image'"),
    "a folder": ([row("folder.nii")], "training[0], key 'image'"),
    "missing label": ([row("a.nii.gz", label="labels/nix.nii.gz")], "training[0], key 'label'"),
    "column an object": ([row("a.nii.gz", site={"x": 1})], "training[0], key 'site'"),
    "column a list": ([row("a.nii.gz", site=["x"])], "training[0], key 'site'"),
    "column NaN": ([row("a.nii.gz", score=float("nan"))], "training[0], key 'score'"),
    "column infinite": ([row("a.nii.gz", score=float("inf"))], "training[0], key 'score'"),
    "days text": ([row("a.nii.gz", days="3")], "training[0], key 'days'"),
    "zero byte in path": ([row("a\0.nii.gz")], "training[0], key 'image'"),
    "path too long": ([row("x/" * 3000 + "a.nii.gz")], "training[0], key 'image'"),
    "half a character in path": ([row("a\ud800.nii.gz")], "training[0], key 'image'"),
}


@pytest.mark.parametrize(("rows", "place"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_refused_with_its_place(folder: Path, rows: list[Any], place: str) -> None:
    (folder / "folder.nii").mkdir()
    with pytest.raises(DatalistError) as caught:
        read_datalist(put(folder / "list.json", training=rows))
    assert place in str(caught.value)
    assert "fix:" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_patient_in_two_sections_is_refused_without_showing_the_id(folder: Path) -> None:
    path = put(
        folder / "list.json", training=[row("a.nii.gz", 12345)], test=[row("b.nii.gz"), row("c.nii.gz", "12345")]
    )
    with pytest.raises(DatalistError, match="two sections") as caught:
        read_datalist(path)
    assert "test[1]" in str(caught.value)
    assert "training[0]" in str(caught.value)
    assert "12345" not in str(caught.value)
    with pytest.raises(DatalistError, match="two sections"):  # even if only one of them is wanted
        read_datalist(path, sections=["training"])


def test_the_same_file_in_two_sections_is_refused(folder: Path) -> None:
    path = put(folder / "list.json", training=[row("a.nii.gz")], test=[row("a.nii.gz", "P2")])
    with pytest.raises(DatalistError, match=r"test\[0\].*twice"):
        read_datalist(path)


def test_missing_files_are_counted_and_five_are_named(folder: Path) -> None:
    path = put(folder / "list.json", training=[row(f"missing{i}.nii") for i in range(8)])
    with pytest.raises(DatalistError, match="8 missing") as caught:
        read_datalist(path)
    assert "missing4.nii" in str(caught.value)
    assert "missing5.nii" not in str(caught.value)
    assert "3 more" in str(caught.value)


def test_links_may_stay_inside_but_not_lead_out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    touch(outside, "x.nii.gz")
    (folder / "inside.nii.gz").symlink_to(folder / "a.nii.gz")
    (folder / "out.nii.gz").symlink_to(outside / "x.nii.gz")
    (folder / "outdir").symlink_to(outside)
    inside = read_datalist(put(folder / "list.json", training=[row("inside.nii.gz")]))
    assert inside.training[0]["image"] == str(folder / "inside.nii.gz")
    for name in ("out.nii.gz", "outdir/x.nii.gz", str(outside / "x.nii.gz")):
        with pytest.raises(DatalistError, match=r"training\[0\].*leaves"):
            read_datalist(put(folder / "list.json", training=[row(name)]))
    with pytest.raises(DatalistError, match="twice"):
        read_datalist(put(folder / "list.json", training=[row("inside.nii.gz"), row("a.nii.gz")]))


def test_a_linked_root_and_absolute_paths_below_it_are_fine(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    link = tmp_path_factory.mktemp("links") / "data"
    link.symlink_to(folder)
    path = put(
        folder / "list.json", training=[row("a.nii.gz"), row(str(folder / "b.nii.gz")), row(str(link / "c.nii.gz"))]
    )
    for root in (folder, link):
        images = [entry["image"] for entry in read_datalist(path, root).training]
        assert images == [str(root / name) for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("", "JSON"),
        ("[" * 100_000, "recursion"),
        ('{"training": 3}', "list"),
        ('{"training": []}', "empty"),
        ("{}", "empty"),
        ('{"training": [], "training": []}', "twice"),
        ('{"training": [{"image": "a.nii.gz", "image": "b.nii.gz", "patient_id": "P"}]}', "twice"),
        ('{"dataset_dir": 3, "training": []}', "dataset_dir"),
        ('{"dataset_dir": "%s", "training": []}' % ("x" * 5000), "folder of the scans is not there"),
    ],
)
def test_a_file_that_is_no_datalist_is_refused(folder: Path, text: str, words: str) -> None:
    path = folder / "list.json"
    path.write_text(text)
    with pytest.raises(DatalistError, match=words):
        read_datalist(path)


def test_an_absent_datalist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatalistError, match="cannot be read"):
        read_datalist(tmp_path / "nix.json")


def test_a_section_asked_for_has_to_be_there_with_rows(folder: Path) -> None:
    path = put(folder / "list.json", training=[row("a.nii.gz")], validation=[])
    for name in ("validation", "test", "training2"):
        with pytest.raises(DatalistError, match=r"(?s)" + name + r".*training \(1 rows\)"):
            read_datalist(path, sections=[name])
        with pytest.raises(DatalistError, match=r"(?s)" + name + r".*training \(1 rows\)"):
            read_datalist(path).section(name)


def test_files_of_sections_not_asked_for_may_be_absent(folder: Path) -> None:
    path = put(folder / "list.json", training=[row("a.nii.gz")], test=[row("elsewhere.nii.gz", "P2")])
    datalist = read_datalist(path, sections=["training"])
    assert list(datalist.sections) == ["training"]
    assert read_datalist(path, sections="training") == datalist
    with pytest.raises(DatalistError, match="missing"):
        read_datalist(path)


def test_a_round_trip_keeps_rows_extra_keys_and_digest(folder: Path) -> None:
    extra = {"name": "x", "labels": {"0": "background"}, "numTraining": 1}
    path = put(folder / "list.json", **extra, training=[row("a.nii.gz", label="labels/a.nii.gz")], validation=[])
    datalist = read_datalist(path)
    for target in (folder / "again.json", folder / "sub" / "again.json", folder.parent / f"{folder.name}.json"):
        write_datalist(datalist, target)
        again = read_datalist(target)
        assert again.sections == datalist.sections
        assert again.extra == extra
        assert again.digest() == datalist.digest()
        target.unlink()


def test_a_datalist_outside_its_folder_records_where_that_is(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    datalist = read_datalist(put(folder / "list.json", training=[row("a.nii.gz")]))
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "new" / "list.json"
    write_datalist(datalist, elsewhere)
    assert json.loads(elsewhere.read_text())["dataset_dir"] == str(folder)
    assert json.loads(elsewhere.read_text())["training"][0]["image"] == "a.nii.gz"
    write_datalist(datalist, folder / "lists" / "list.json")
    assert json.loads((folder / "lists" / "list.json").read_text())["dataset_dir"] == ".."


def test_the_digest_follows_the_rows_and_not_their_place(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = put(folder / "list.json", training=[row("a.nii.gz", age=3), row("b.nii.gz")])
    digest = read_datalist(path).digest()
    moved = tmp_path_factory.mktemp("moved") / "folder"
    shutil.copytree(folder, moved)
    assert read_datalist(moved / "list.json").digest() == digest
    same = put(folder / "same.json", training=[{"age": 3, "patient_id": "P1", "image": "a.nii.gz"}, row("b.nii.gz")])
    assert read_datalist(same).digest() == digest
    for rows in ([row("b.nii.gz"), row("a.nii.gz", age=3)], [row("a.nii.gz", age=4), row("b.nii.gz")]):
        assert read_datalist(put(folder / "other.json", training=rows)).digest() != digest
    other_section = put(folder / "other.json", validation=[row("a.nii.gz", age=3), row("b.nii.gz")])
    assert read_datalist(other_section).digest() != digest


@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS)
def test_a_failed_write_is_reported_and_leaves_the_old_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: Any
) -> None:
    datalist = read_datalist(put(folder / "list.json", training=[row("a.nii.gz")]))
    before = (folder / "list.json").read_text()
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(DatalistError, match=FAULT) as caught:
        write_datalist(datalist, folder / "list.json")
    monkeypatch.undo()
    assert "list.json" in str(caught.value)
    assert (folder / "list.json").read_text() == before
    assert not list(folder.glob(".*"))
    write_datalist(datalist, folder / "list.json")
    assert read_datalist(folder / "list.json") == datalist


@pytest.mark.parametrize("place", ["sub", "a.nii.gz/new.json", "x" * 250])
def test_a_path_that_cannot_be_written_is_refused_before_long_work(folder: Path, place: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(DatalistError, match="cannot be written"):
        refuse_unwritable(folder / place)
    assert sorted(folder.rglob("*")) == before


def test_a_path_that_can_be_written_is_left_as_it_is(folder: Path) -> None:
    before = put(folder / "list.json", training=[]).read_text()
    refuse_unwritable(folder / "list.json")
    assert (folder / "list.json").read_text() == before
    refuse_unwritable(folder / "new" / "list.json")
    assert list((folder / "new").iterdir()) == []


def test_what_json_cannot_hold_is_not_written(folder: Path) -> None:
    datalist = Datalist({"training": [row(str(folder / "a.nii.gz"))]}, folder, extra={"x": float("nan")})
    with pytest.raises(DatalistError, match="'x'"):
        write_datalist(datalist, folder / "list.json")


@pytest.mark.parametrize(
    "sections",
    [
        {"training": []},
        {},
        {"train": [row("/x/a.nii")]},
        {"training": [{"image": "/x/a.nii"}]},
        {"training": [{"patient_id": "P"}]},
        {"training": [row("/x/a.nii")], "test": [row("/x/b.nii")]},
    ],
)
def test_a_datalist_built_by_hand_is_checked(sections: dict[str, Any]) -> None:
    with pytest.raises(DatalistError):
        Datalist(sections, Path("/x"))


ROWS_WITH_REPEATS = [
    ("a.nii.gz", "P1", 1),
    ("b.nii.gz", "P1", 2),
    ("c.nii.gz", "P2", 3),
    ("labels/a.nii.gz", "P3", 4),
    ("sub/d.nii", "P1", 1),
    ("e.nii.gz", "P4", 4),
]


@pytest.mark.parametrize("patient", ["P1", "P2"])
@pytest.mark.parametrize(
    ("images", "contents"),
    [
        (["a.nii.gz", "b.nii.gz"], ["vox-secret", "vox-secret"]),
        ([["a.nii.gz", None], ["b.nii.gz", "c.nii.gz"]], [["vox-secret", None], ["vox-other", "vox-secret"]]),
    ],
)
def test_the_same_voxels_in_two_sections_are_refused_whoever_they_are_of(
    images: list[Any], contents: list[Any], patient: str
) -> None:
    sections = {
        "training": [row("/x/z.nii.gz", "P0", content="vox-mine"), row(images[0], "P1", content=contents[0])],
        "test": [row(images[1], patient, content=contents[1])],
    }
    with pytest.raises(DatalistError) as caught:
        Datalist(sections, Path("/x"))
    if patient == "P2":
        assert "test[0], key 'content': the same scan is in two sections" in str(caught.value)
        assert "training[1]" in str(caught.value.got)
    assert "secret" not in str(caught.value)


def test_a_file_that_leaks_voxels_is_refused_also_where_one_section_is_wanted(folder: Path) -> None:
    leak = [row("b.nii.gz", "P2", content="vox-1")]
    path = put(folder / "list.json", training=[row("a.nii.gz", content="vox-1")], validation=leak)
    for sections in (None, ["training"]):
        with pytest.raises(DatalistError, match="two sections"):
            read_datalist(path, sections=sections)


def test_rows_without_a_content_are_no_duplicates(folder: Path) -> None:
    rows = [row("a.nii.gz"), row("b.nii.gz", content=None)]
    path = put(folder / "list.json", training=rows, test=[row("c.nii.gz", "P2", content=None)])
    assert len(read_datalist(path).training) == 2


def test_the_same_voxels_twice_in_a_section_are_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(name, patient, content=f"vox-{content}") for name, patient, content in ROWS_WITH_REPEATS]
    read_datalist(put(folder / "list.json", training=rows[:2], test=rows[2:4]))
    assert caplog.messages == []
    read_datalist(put(folder / "list.json", training=rows))
    (message,) = caplog.messages
    assert message.startswith(
        "training: 2 scan(s) are in it twice or more, with the same voxels; 1 of them under several"
    )
    assert "vox" not in message.replace("voxels", "")


def test_rows_outside_the_root_are_not_written(folder: Path) -> None:
    datalist = Datalist({"training": [row("/elsewhere/a.nii.gz")]}, folder)
    with pytest.raises(DatalistError, match="leaves its root"):
        write_datalist(datalist, folder / "list.json")


def test_summary_counts_patients_scans_and_labels(folder: Path) -> None:
    rows = [row("a.nii.gz", label="labels/a.nii.gz"), row("b.nii.gz"), row("c.nii.gz", "P2", label=0)]
    datalist = read_datalist(put(folder / "list.json", training=rows, test=[]))
    assert datalist.summary() == {
        "training": {"patients": 2, "scans": 3, "labelled": 2},
        "test": {"patients": 0, "scans": 0, "labelled": 0},
    }


def test_monai_loads_what_is_written_and_read(folder: Path) -> None:
    from monai.data import load_decathlon_datalist
    from monai.transforms import LoadImaged

    for name, value in (("a.nii.gz", 1), ("b.nii.gz", 2), ("labels/a.nii.gz", 3)):
        nibabel.save(nibabel.Nifti1Image(np.full((2, 3, 4), value, np.float32), np.eye(4)), folder / name)
    source = put(
        folder / "list.json",
        training=[row("a.nii.gz", label="labels/a.nii.gz")],
        validation=[row(["b.nii.gz", "c.nii.gz"], "P2"), row(["sub/d.nii", None], "P2")],
    )
    with pytest.raises(DatalistError):
        read_datalist(source)  # one channel and two
    source = put(
        folder / "list.json",
        training=[row("a.nii.gz", label="labels/a.nii.gz", age=3)],
        validation=[row("b.nii.gz", "P2", label=1)],
    )
    datalist = read_datalist(source)
    write_datalist(datalist, folder / "lists" / "again.json")
    for section in ("training", "validation"):
        assert load_decathlon_datalist(folder / "lists" / "again.json", True, section, folder) == datalist.section(
            section
        )
    loaded = LoadImaged(["image", "label"])(datalist.training[0])
    assert float(loaded["image"].max()) == 1
    assert float(loaded["label"].max()) == 3
