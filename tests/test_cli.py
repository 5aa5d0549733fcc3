from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import medclr.cli
from medclr.data.datalist import read_datalist
from medclr.errors import DatalistError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "scans"
    for n in range(12):
        for kind in ("images", "labels"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            voxels = np.random.default_rng(n).integers(0, 2 if kind == "labels" else 99, (3, 4, 5)).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), root / kind / f"P{n // 2}_{n % 2}.nii.gz")
    (root / "images" / "P9_0.nii.gz").write_text("no image")
    return root


def medclr_command(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run ``medclr`` in this process: exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["medclr", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            medclr.cli.main()
    out, err = capsys.readouterr()
    code = caught.value.code
    return (code if isinstance(code, int) else 0), out, err


@pytest.fixture
def datalist(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "datalist.json"
    arguments = ("index", folder, "--output", path, "--patients", "{patient}_*", "--workers", 1, "--keep-ids")
    code, out, _ = medclr_command(*arguments, capsys=capsys)
    assert code == 0
    for line in (
        "patients │ 6",
        "scans │ 12",
        "labelled scans │ 12",
        "quarantined │ 1",
        "no readable NIfTI image. │ 1",
    ):
        assert line in " ".join(out.split())
    return path


def test_index_writes_a_datalist_and_a_quarantine_list(datalist: Path) -> None:
    assert len(read_datalist(datalist).training) == 12
    entries = json.loads((datalist.parent / "quarantine.json").read_text())
    assert [entry["path"] for entry in entries] == ["images/P9_0.nii.gz"]


def test_split_writes_sections_and_nested_labelled_subsets(datalist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = datalist.parent / "split.json"
    arguments = (
        "split",
        datalist,
        "--output",
        output,
        "--fractions",
        "0.5,0.25,0.25",
        "--seed",
        3,
        "--labelled",
        "1,2",
    )
    code, out, _ = medclr_command(*arguments, capsys=capsys)
    assert code == 0
    assert "split.labelled2.json" in out
    split = read_datalist(output)
    assert [len(split.patients(name)) for name in ("training", "validation", "test")] == [3, 2, 1]
    one, two = (read_datalist(output.with_name(f"split.labelled{n}.json")) for n in (1, 2))
    assert set(one.patients("training")) < set(two.patients("training")) < set(split.patients("training"))
    assert one.validation == split.validation


def test_split_into_folds_writes_one_file_each(datalist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = medclr_command("split", datalist, "--output", datalist.parent / "cv", "--folds", 3, capsys=capsys)
    assert code == 0
    folds = [read_datalist(datalist.parent / f"cv.fold{n}.json") for n in range(3)]
    assert sorted(patient for fold in folds for patient in fold.patients("validation")) == [f"P{n}" for n in range(6)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("split", "nix.json", "--output", "x.json"), "The datalist cannot be read."),
        (("split", "{datalist}", "--output", "x.json", "--fractions", "a,b"), "no list of numbers"),
        (("split", "{datalist}", "--output", "x.json", "--fractions", "1,1"), "fractions of a split are unusable"),
        (("split", "{datalist}", "--output", "x.json", "--folds", "99"), "number of folds"),
        (("split", "{datalist}", "--output", "x.json", "--stratify", "nix"), "column to stratify by is unknown"),
        (("index", "{folder}", "--output", "{folder}", "--patients", "{{patient}}_*"), "it is a folder"),
        (("split", "{datalist}", "--output", "{datalist}/x.json"), "cannot be written"),
        (("index", "nix", "--output", "x.json", "--patients", "{{patient}}"), "nothing to index"),
        (("index", "{folder}", "--output", "x.json", "--patients", "nix.csv"), "table of patients"),
        (("index", "{folder}", "--output", "x.json", "--patients", "{{study}}"), "pattern for patients"),
    ],
)
def test_bad_input_ends_with_our_lines_and_exit_code_2(
    arguments: tuple[str, ...],
    words: str,
    folder: Path,
    datalist: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(datalist.parent)
    filled = [argument.format(folder=folder, datalist=datalist) for argument in arguments]
    code, out, err = medclr_command(*filled, capsys=capsys)
    assert code == 2
    assert words in err
    assert "fix:" in err
    assert "Traceback" not in out + err
    assert not Path("x.json").exists()


def test_debug_lets_the_error_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["medclr", "--debug", "split", str(tmp_path / "nix.json"), "--output", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(DatalistError, match="cannot be read"):
        medclr.cli.main()


def test_version_and_help_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['medclr', *sys.argv[1:]]; import medclr.cli\n"
        "try: medclr.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'monai', 'sklearn', 'nibabel', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for argument, words in (("--help", "split"), ("--version", "medclr 0.")):
        command = [sys.executable, "-c", code, argument]
        environment = {**os.environ, "COLUMNS": "100"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medclr", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("medclr ")
