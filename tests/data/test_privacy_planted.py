"""A cohort in which every text, date and number is planted goes through everything; nothing of it may come out."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from nibabel.nifti1 import Nifti1Extension
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from medclr.data import Datalist, read_datalist, write_datalist
from medclr.data.privacy import References
from medclr.data.privacy_key import KEY_FILE
from medclr.data.privacy_map import _map_of
from medclr.errors import causes, find_cause
from tests.data.planted import Search, in_base64, spellings
from tests.data.planted_cohort import MARKER, Planted, save_cohort

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SMALL = {"roi_size": [16, 16, 16], "init_filters": 8, "device": "$torch.device('cpu')", "precision": "fp32"}
NAME, DAY = f"{MARKER}älpha^{MARKER}beta", date(1931, 7, 23)


# The search: what it must find, in each container, and that it finds nothing else.

ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-16-le": lambda text: text.encode("utf-16-le"),
    "utf-16-be": lambda text: text.encode("utf-16-be"),
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.encode("latin-1"),
    "upper case": lambda text: text.upper().encode(),
    "lower case": lambda text: text.lower().encode(),
    "base64": lambda text: base64.b64encode(text.encode()),
    "base64 after one": lambda text: base64.b64encode(b"x" + text.encode() + b"yy"),
    "base64 after two": lambda text: base64.b64encode(b"xx" + text.encode() + b"y"),
    "base64 for urls": lambda text: base64.urlsafe_b64encode(b"??>" + text.encode()),
    "url": lambda text: quote(text, safe="").encode(),
    "json": lambda text: json.dumps({"name": text}).encode(),
    "hexadecimal": lambda text: text.encode().hex().encode(),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS.keys())
@pytest.mark.parametrize("text", [NAME, "P-77/39104", "19310723", "1931-07-23"])
def test_the_search_finds_each_encoding(text: str, encode: Callable[[str], bytes]) -> None:
    search = Search([NAME, "P-77/39104"], [DAY])
    assert any(search.in_bytes(b"\1before " + encode(text) + b" after\2", "here"))
    assert not any(Search(["Absent^Person"], [date(1932, 8, 9)]).in_bytes(encode(text), "here"))


@pytest.mark.parametrize(
    "text",
    [
        *("19310723", "1931-07-23", "1931/7/23", "23.07.1931", "07/23/1931", "23071931", "07231931", "1931.07.23"),
        *("23-Jul-1931", "23Jul1931", "Jul 23, 1931", "23 July 1931", "19312307", "1931%2F07%2F23", "23_07_1931"),
    ],
)
def test_the_search_finds_the_usual_spellings_of_a_date(text: str) -> None:
    assert Search([], [DAY]).in_text(f"x{text}y", "here")
    assert text.lower() in {form.lower() for form in spellings(DAY)}
    assert not Search([], [date(1931, 7, 24)]).in_text(f"x{text}y", "here")


def test_chance_digits_of_a_decimal_number_are_no_date() -> None:
    search = Search([], [DAY])
    assert not search.in_text("[0.4193107231, -12.19310723]", "here")
    for text in ("1.2.840.19310723.4", "x.19310723", "id 19310723", "0.4193107231, 19310723", "201019310723.5"):
        assert search.in_text(text, "here"), text


def test_each_alignment_of_base64_has_characters_of_its_own() -> None:
    for before in range(7):
        found = base64.b64encode(bytes(range(before)) + b"Zqxjkvwyabcd" + b"rest")
        assert any(piece in found for piece in in_base64(b"Zqxjkvwyabcd"))
    assert all(len(piece) >= 14 for piece in in_base64(b"Zqxjkvwyabcd"))


def _plain(path: Path) -> None:
    path.write_text(f"a: {NAME}\n")


def _gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(NAME.encode()))


def _gzip_name(path: Path) -> None:
    with path.open("wb") as file, gzip.GzipFile(f"{MARKER}.nii", "wb", fileobj=file) as packed:
        packed.write(b"voxels")


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.txt", f"{NAME} " * 50)


def _zip_name(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{MARKER}.txt", "nothing")


def _zip_in_gzip_in_zip(path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", f"{NAME} " * 50)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("y.gz", gzip.compress(inner.getvalue()))


def _checkpoint(path: Path) -> None:
    torch.save({"weight": torch.zeros(3), "meta": {"name": NAME}}, path)


def _checkpoint_bytes(path: Path) -> None:
    torch.save({"bytes": torch.frombuffer(bytearray(NAME.encode()), dtype=torch.uint8)}, path)


def _safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path, metadata={"about": NAME})


def _npz(path: Path) -> None:
    np.savez_compressed(path, name=np.array([NAME]))
    path.with_suffix(path.suffix + ".npz").rename(path)


def _events(path: Path) -> None:
    with SummaryWriter(str(path.parent / "events")) as writer:
        writer.add_text("patient", NAME)


def _nifti_text(path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4))
    image.header["descrip"] = MARKER.encode()
    nibabel.save(image, path.with_name("x.nii.gz"))


def _nifti_extension(path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4))
    image.header.extensions.append(Nifti1Extension(6, NAME.encode()))
    nibabel.save(image, path.with_name("x.nii.gz"))


def _folder_name(path: Path) -> None:
    (path.parent / NAME).mkdir()


def _file_name(path: Path) -> None:
    path.with_name(f"{MARKER.upper()}_1.txt").touch()


CONTAINERS = [
    *(
        _plain,
        _gzip,
        _gzip_name,
        _zip,
        _zip_name,
        _zip_in_gzip_in_zip,
        _checkpoint,
        _checkpoint_bytes,
        _safetensors,
        _npz,
    ),
    *(_events, _nifti_text, _nifti_extension, _folder_name, _file_name),
]


@pytest.mark.parametrize("write", CONTAINERS, ids=lambda write: write.__name__[1:])
def test_the_search_looks_into_each_container(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "file")
    assert Search([MARKER]).in_folder(tmp_path)
    assert not Search(["Qzwyvkjx"]).in_folder(tmp_path)


# The cohort


@dataclass
class Left:
    """What a run through everything has left."""

    planted: Planted
    root: Path
    texts: dict[str, str] = field(default_factory=dict)
    """Logs, exceptions with their causes, and what was printed, by where it comes from."""
    datalist: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.root / "out"

    def said(self, *, of: str) -> str:
        return "\n".join(text for where, text in self.texts.items() if where.startswith(of))


def command(left: Left, name: str, *arguments: Any, module: str = "medclr") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "PYTHONWARNINGS": "default"},
    )
    left.texts[f"{name} stdout"], left.texts[f"{name} stderr"] = done.stdout, done.stderr
    return done


@contextlib.contextmanager
def recorded(left: Left, name: str) -> Iterator[None]:
    """Keep all that is logged at any level, warned of, printed, and raised, with all causes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            try:
                yield
            except Exception as error:  # whatever comes is looked at
                traceback.print_exception(error, file=stream)
                for link in causes(error):
                    print(repr(link), link, getattr(link, "__notes__", ""), file=stream)
                print(f"{type(find_cause(error)).__name__} in the end", file=stream)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        left.texts[name] = stream.getvalue()


def bundle(left: Left, name: str, folder: str, configs: list[str], kind: str, **settings: Any) -> None:
    paths = BUNDLES / folder / "configs"
    with recorded(left, name):
        run = ConfigWorkflow(
            config_file=[str(paths / config) for config in configs],
            meta_file=str(paths / "metadata.json"),
            logging_file=False,  # type: ignore[arg-type]
            workflow_type=kind,
            **{**SMALL, "bundle_root": str(BUNDLES / folder), **settings},
        )
        run.initialize()
        run.run()
        run.finalize()


def segmentation_list(left: Left) -> Path:
    """A datalist of the scans that have masks, two for training and one each for validation and test."""
    datalist = read_datalist(left.out / "datalist.json")
    rows = [row for row in datalist.training if "label" in row]
    path = left.out / "masks.json"
    write_datalist(Datalist({"training": rows[:2], "validation": rows[2:3], "test": rows[3:]}, datalist.root), path)
    return path


def provoke(left: Left, split: Path, masks: Path) -> None:
    """Errors of all kinds, on a copy of the scans that the datalists point to."""
    out, scans = left.out, left.root / "scans"
    rows = json.loads(split.read_text())
    place = next(name for name in ("training", "validation", "test") if rows.get(name))
    for name, change in {
        "free text as age": {"age": MARKER},
        "a date as days": {"days": "1931-07-23"},
        "a name as image": {"image": f"{MARKER}.tiff"},
        "no patient": {"patient_id": None},
        "a list as patient": {"patient_id": [MARKER]},
        "a name of a file that is not there": {"image": str(Path(rows[place][0]["image"]).with_name("missing.nii.gz"))},
        "an unknown reference": {"image": f"ref-{'0' * 20}/a.nii.gz"},
    }.items():
        content = {**rows, place: [{**rows[place][0], **change}, *rows[place][1:]]}
        bad = left.root / "bad.json"  # outside of what is searched: it holds what is planted
        bad.write_text(json.dumps({**content, "dataset_dir": str(out / rows.get("dataset_dir", "."))}))
        with recorded(left, f"error: {name}"):
            read_datalist(bad)
    for name, header in (("age", "volume,patient_id,age"), ("patient", "volume,subject,patient_id")):
        lines = (scans / "table.csv").read_text().splitlines()[1:]
        table = left.root / "bad.csv"
        cells = [f"{line.split(',')[0]},{line.split(',')[1]},{line.split(',')[3]}" for line in lines]
        table.write_text("\n".join([header, *cells]) + "\n")
        command(
            left, f"error: table {name}", "index", scans, "--output", out / "bad" / "datalist.json", "--patients", table
        )
    command(left, "error: no scans", "index", scans / "bids" / "nowhere", "--output", out / "bad" / "datalist.json")

    # Files that are damaged or gone since they were indexed
    nifti = sorted((scans / "nifti" / "imagesTr").glob("*.nii.gz"))
    slices = sorted(path for path in (scans / "export").rglob("*") if path.is_file())
    nifti[0].write_bytes(nifti[0].read_bytes()[:900])
    nifti[1].write_bytes(b"no NIfTI " + MARKER.encode() * 40)
    slices[0].write_bytes(slices[0].read_bytes()[:-400])
    slices[10].write_bytes(slices[20].read_bytes())
    slices[20].unlink()
    slices[-1].write_bytes(b"\0" * 128 + b"DICM" + MARKER.encode() * 30)
    settings: dict[str, Any] = {"datalist": str(split), "batch_size": 2, "val_interval": 0}
    bundle(left, "damaged: pretraining", "contrastive_pretraining", ["train.yaml"], "train", **settings,
           output_dir=str(out / "damaged"), max_epochs=1)  # fmt: skip
    bundle(left, "damaged: segmentation", "segmentation", ["train.yaml"], "train", datalist=str(masks), max_epochs=1,
           output_dir=str(out / "damaged masks"), steps_per_epoch=1, val_interval=0)  # fmt: skip
    command(left, "damaged: index", "index", scans, "--output", out / "damaged" / "datalist.json",
            "--patients", scans / "table.csv", "--hide-subjects")  # fmt: skip
    nifti[2].unlink()
    with recorded(left, "error: a file is gone"):
        read_datalist(masks)
    home = Path(os.environ["MEDCLR_HOME"])
    _map_of.cache_clear()
    (home / "references.sqlite").rename(home / "elsewhere.sqlite")
    with recorded(left, "error: the map is gone"):
        read_datalist(masks)
    _map_of.cache_clear()
    (home / "elsewhere.sqlite").rename(home / "references.sqlite")


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    """Everything is run once; the tests look at what is left."""
    root = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCLR_HOME", str(root / "home"))
        (root / "home").mkdir(mode=0o700)
        (root / "home" / KEY_FILE).write_text("2a" * 32)  # so that chance has no part in what is found
        (root / "home" / KEY_FILE).chmod(0o600)
        _map_of.cache_clear()
        left = Left(Planted(), root)
        save_cohort(root / "scans", left.planted)
        out = left.out
        out.mkdir()
        scans = root / "scans"
        command(left, "index", "index", scans, "--output", out / "datalist.json", "--patients", scans / "table.csv",
                "--hide-subjects")  # fmt: skip
        left.datalist = json.loads((out / "datalist.json").read_text())
        patient = next((scans / "export").iterdir())
        command(left, "index of one patient's folder", "index", patient, "--output", out / "one" / "datalist.json")
        command(left, "index with copies", "index", scans, "--output", out / "copies.json", "--patients",
                scans / "table.csv", "--hide-subjects", "--export-nifti", out / "copies")  # fmt: skip
        split, masks = out / "split.json", segmentation_list(left)
        command(left, "split", "split", out / "datalist.json", "--output", split, "--fractions", "0.6,0.2,0.2")
        pretrained = {"datalist": str(split), "output_dir": str(out / "pretraining")}
        bundle(left, "pretraining", "contrastive_pretraining", ["train.yaml"], "train", **pretrained, batch_size=2,
               max_epochs=1, val_interval=1, save_interval=1, log_interval=1)  # fmt: skip
        bundle(left, "embedding", "contrastive_pretraining", ["inference.yaml"], "infer", **pretrained)
        segmented = {"datalist": str(masks), "output_dir": str(out / "segmentation")}
        bundle(left, "segmentation", "segmentation", ["train.yaml"], "train", **segmented, batch_size=2, max_epochs=1,
               steps_per_epoch=2, val_interval=1,
               pretrained=str(out / "pretraining" / "encoder.safetensors"))  # fmt: skip
        bundle(left, "segmenting", "segmentation", ["inference.yaml"], "infer", **segmented)
        bundle(left, "evaluation", "segmentation", ["train.yaml", "evaluate.yaml"], "train", **segmented,
               predictions=str(out / "evaluated"))  # fmt: skip
        provoke(left, split, masks)
        yield left
    _map_of.cache_clear()


@pytest.mark.slow
def test_everything_ran_and_every_provoked_error_was_raised(left: Left) -> None:
    """Otherwise there would be nothing to find."""
    for name, text in left.texts.items():
        raised = "in the end" in text or "  fix:" in text
        assert raised == name.startswith("error:") or name.endswith(" stdout") or name.startswith("damaged:"), (
            name,
            text,
        )
    for pattern in ("pretraining/encoder.safetensors", "pretraining/checkpoints/*", "pretraining/tensorboard/*",
                    "pretraining/embeddings.csv", "segmentation/best.pt", "segmentation/tensorboard/*", "copies/*",
                    "segmentation/predictions/**/*.nii.gz", "evaluated/**/*.nii.gz", "one/datalist.json",
                    "damaged/quarantine*"):  # fmt: skip
        assert list(left.out.glob(pattern)), pattern
    assert "quarantined" in left.said(of="damaged: pretraining")
    assert "quarantined" in left.said(of="damaged: segmentation")


@pytest.mark.slow
def test_the_cohort_is_indexed_as_it_is(left: Left) -> None:
    rows = left.datalist["training"]
    assert json.loads((left.out / "quarantine.json").read_text()) == []
    assert len(rows) == 12
    assert len({row["patient_id"] for row in rows}) == 8
    assert {row["age"] for row in rows} == {90}
    assert {row.get("group") for row in rows} == {"a", "b", None}
    by_patient: dict[str, list[int]] = {}
    for row in rows:
        by_patient.setdefault(row["patient_id"], []).append(row.get("days", 0))
    assert sorted(map(len, by_patient.values())) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert all(min(days) == 0 for days in by_patient.values())
    assert all(max(days) > 0 for days in by_patient.values() if len(days) == 2)


@pytest.mark.slow
def test_nothing_planted_is_in_any_output(left: Left) -> None:
    found = Search(left.planted.texts(), left.planted.dates).in_folder(left.out)
    assert not found, "\n".join(found[:20])


@pytest.mark.slow
def test_nothing_planted_is_in_any_log_or_error(left: Left) -> None:
    search = Search(left.planted.texts(), left.planted.dates)
    # What the user types comes back: the path of one patient's folder.
    typed = next((left.root / "scans" / "export").iterdir()).name
    found = [hit for where, text in left.texts.items() for hit in search.in_text(text.replace(typed, ""), where)]
    assert not found, "\n".join(found[:20])


@pytest.mark.slow
def test_the_same_search_finds_what_is_planted_in_the_scans_and_in_the_private_folder(left: Left) -> None:
    search = Search(left.planted.texts(), left.planted.dates)
    for path in sorted((left.root / "scans").rglob("*")):
        if path.is_file() and path.suffix != ".json":
            assert any(search.in_bytes(path.read_bytes(), "")) or path.stat().st_size < 1000, path.suffix
    assert search.in_folder(left.root / "home")
    with References() as references:
        hidden = references.hide(f"{MARKER}/x.nii.gz", [MARKER])
    assert not search.in_text(hidden, "")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["segmentation/best.pt", "pretraining/encoder.safetensors", "pretraining/run.json"])
def test_a_value_that_is_added_to_an_output_is_found(left: Left, tmp_path: Path, where: str) -> None:
    source = left.out / where
    copy = tmp_path / source.name
    if copy.suffix == ".pt":
        torch.save({**torch.load(source, weights_only=True), "note": left.planted.number()}, copy)
    else:
        shutil.copy(source, copy)
        copy.write_bytes(copy.read_bytes() + f"{left.planted.dates[0]:%d.%m.%Y}".encode())
    assert Search(left.planted.texts(), left.planted.dates).in_folder(tmp_path)
    assert not any(Search(left.planted.texts(), left.planted.dates).in_bytes(source.read_bytes(), ""))
