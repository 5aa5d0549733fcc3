"""What the repository promises beside its code: a typed package, one version, one command, and files that travel."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
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


def test_a_wheel_holds_the_types_marker_the_licence_and_every_module(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left behind in the checkout."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "medclr", source / "medclr", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("medclr-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "medclr").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "medclr/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
