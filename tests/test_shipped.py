from __future__ import annotations

import os
from pathlib import Path

import pytest

from medclr.errors import ConfigError
from medclr.shipped import copy_bundle, find_bundle, shipped_bundles


def test_every_bundle_is_listed_with_its_task_and_version() -> None:
    bundles = {bundle.name: bundle for bundle in shipped_bundles()}
    root = Path(__file__).resolve().parents[1] / "bundles"
    assert set(bundles) == {path.name for path in root.iterdir() if path.is_dir()}
    assert bundles["segmentation"].version == "0.1.0"
    assert "Segmentation" in bundles["segmentation"].task


def test_an_unknown_bundle_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no such bundle") as caught:
        find_bundle("segmentatoin")
    assert "contrastive_pretraining, segmentation" in str(caught.value)


def test_a_copy_holds_all_but_what_runs_have_left(tmp_path: Path) -> None:
    folder = copy_bundle("segmentation", tmp_path / "deep" / "mine")
    original = find_bundle("segmentation").folder
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    wanted = {path.relative_to(original) for path in original.rglob("*") if path.is_file()}
    assert names == {name for name in wanted if name.parts[0] != "models"}
    assert (folder / "configs" / "train.yaml").read_text() == (original / "configs" / "train.yaml").read_text()


def test_a_copy_may_go_into_an_empty_folder(tmp_path: Path) -> None:
    assert (copy_bundle("segmentation", tmp_path) / "LICENSE").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_copy_never_goes_over_something(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    if kind == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        target.write_text("mine")
    with pytest.raises(ConfigError, match="not copied over"):
        copy_bundle("segmentation", target)
    assert list(tmp_path.rglob("train.yaml")) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_copy_to_where_one_may_not_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy_bundle("segmentation", tmp_path / "mine")


def test_a_copy_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        copy_bundle("segmentation", tmp_path / "file" / "mine")
