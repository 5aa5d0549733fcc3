"""What the repository promises beside its code: a typed package, one version, one command, and files that travel."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import medclr

ROOT = Path(__file__).resolve().parents[1]
# Where homes and checkouts of some machine lie: a file that names a place in it works on that machine alone. Examples
# may speak of the home of "someone".
MACHINE_PATH = re.compile(r"(?<![\w.$}:/-])/(?:work|home|root|Users|mnt|scratch)/(?!someone\b)\w")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=60,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so that nothing says which files are tracked")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def machine_paths(text: str) -> list[str]:
    return [text[match.start() : match.end() + 30].splitlines()[0] for match in MACHINE_PATH.finditer(text)]


def test_no_file_names_a_place_on_one_machine() -> None:
    found = {}
    for path in tracked_files():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if places := machine_paths(text):
            found[str(path.relative_to(ROOT))] = places
    assert found == {}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("open('/home/jsmith/scans')", False),
        ("see /work/scans", False),
        ('"/Users/jsmith/x"', False),
        ("../shared/data, ./runs and /home/someone/scans", True),
        ("https://example.org/home/page and a/tmp/b", True),
        ("$HOME/home/x and {folder}/tmp/x", True),
    ],
)
def test_a_place_on_one_machine_is_told_from_a_relative_path(text: str, clean: bool) -> None:
    assert (machine_paths(text) == []) == clean


def test_the_installed_version_is_the_one_written_down() -> None:
    assert importlib.metadata.version("medclr") == project()["version"]
    assert getattr(medclr, "__version__", project()["version"]) == project()["version"]


def test_the_changelog_has_an_entry_for_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[?([^\]\s]+)", text, re.MULTILINE)
    version = project()["version"]
    assert headings[0] == "Unreleased"
    assert ("Unreleased" if ".dev" in version else version) in headings


def test_every_public_name_is_there() -> None:
    for name in medclr.__all__:
        assert getattr(medclr, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        medclr.no_such_name  # noqa: B018


def test_the_command_is_declared_and_can_be_imported() -> None:
    assert project()["scripts"] == {"medclr": "medclr.cli:main"}
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="medclr")
    assert callable(entry.load())


def test_the_licence_is_apache_2_in_full() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project()["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in text
    for section in range(1, 10):
        assert re.search(rf"^ +{section}\. [A-Z]", text, re.MULTILINE)
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left behind in the checkout, with what a run leaves in a bundle."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("medclr", "bundles"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "bundles" / "segmentation" / "models").mkdir(exist_ok=True)
    (source / "bundles" / "segmentation" / "models" / "last.pt").write_text("a run's")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("medclr-*.whl")
    return path


def test_a_wheel_holds_the_types_marker_the_licence_every_module_and_every_bundle(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "medclr").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "medclr/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    shipped = {f"medclr/{path.relative_to(ROOT)}" for path in tracked_files() if ROOT / "bundles" in path.parents}
    assert {name for name in names if name.startswith("medclr/bundles/")} == shipped
    assert "medclr/bundles/segmentation/configs/train.yaml" in shipped


@pytest.mark.slow
def test_an_installed_wheel_lists_copies_and_runs_its_bundles(
    wheel: Path, cohort: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In an environment of its own, which borrows the other packages but not the checkout."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [str(python), *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    site = Path(run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    # A path in a .pth file is searched, but its own .pth files, such as that of an editable install, are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert str(site) in run("-c", "import medclr; print(medclr.__file__)")
    listed = run("-m", "medclr", "bundle", "list")
    assert "segmentation" in listed
    assert "contrastive_pretraining" in listed
    run("-m", "medclr", "bundle", "copy", "contrastive_pretraining", "mine")
    rows = [{**row, "label": None} for row in cohort]
    for row in rows:
        shutil.copy(row["image"], tmp_path / Path(row["image"]).name)
        row["image"] = Path(row["image"]).name
        del row["label"]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": rows}))
    settings = {
        "roi_size": "[16,16,16]",
        "init_filters": 8,
        "batch_size": 2,
        "max_epochs": 1,
        "val_interval": 0,
        "precision": "fp32",
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    configs = ("--config_file", "mine/configs/train.yaml", "--meta_file", "mine/configs/metadata.json")
    run("-m", "monai.bundle", "run", *configs, "--bundle_root", "mine", "--datalist", "datalist.json", *options)
    assert (tmp_path / "mine" / "models" / "encoder.safetensors").exists()
