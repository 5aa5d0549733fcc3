"""The bundles that come with medclr: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from medclr.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
_LEFT_BEHIND = ("models", "__pycache__", ".*")
"""What a run or an editor leaves in a bundle's folder, and a copy does not take along."""


class ShippedBundle(NamedTuple):
    """One bundle."""

    name: str
    version: str
    task: str
    folder: Path
    """It holds ``configs`` and ``docs``."""


def shipped_bundles() -> list[ShippedBundle]:
    """All bundles, sorted by name.

    Raises:
        ConfigError: the installation has lost them.
    """
    for root in (_PACKAGE / "bundles", _PACKAGE.parent / "bundles"):
        found = sorted(root.glob("*/configs/metadata.json"))
        if found:
            return [_described(path) for path in found]
    raise ConfigError(
        "The bundles are not there.",
        got=f"no bundle in {_PACKAGE / 'bundles'} or beside the package",
        wanted="the folder bundles, which the wheel carries",
        fix="Install medclr again, from a wheel or a checkout.",
    )


def find_bundle(name: str) -> ShippedBundle:
    """The bundle of this name.

    Raises:
        ConfigError: there is none; the message lists those that there are.

    Example:
        >>> find_bundle("segmentation").folder.name
        'segmentation'
    """
    bundles = {bundle.name: bundle for bundle in shipped_bundles()}
    if name not in bundles:
        raise ConfigError(
            "There is no such bundle.", got=name, wanted=", ".join(bundles), fix="See: medclr bundle list"
        )
    return bundles[name]


def copy_bundle(name: str, folder: str | Path) -> Path:
    """Copy a bundle, to be changed there; what runs have left in it stays behind.

    Args:
        name: of the bundle.
        folder: becomes the bundle's root; must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        ConfigError: an unknown bundle, or a folder that holds something or cannot be written.
    """
    bundle, folder = find_bundle(name), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "A bundle is not copied over something.",
            got=f"{folder}, which holds files" if folder.is_dir() else f"{folder}, which is a file",
            wanted="a folder that is new or empty",
            fix=f"For example: medclr bundle copy {name} {folder / name}",
        )
    try:
        shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns(*_LEFT_BEHIND), dirs_exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "The bundle cannot be copied.",
            got=str(error),
            wanted="a folder that you may write to, with space left",
            fix="Name another folder.",
        ) from error
    return folder


def _described(metadata: Path) -> ShippedBundle:
    content = json.loads(metadata.read_text(encoding="utf-8"))
    folder = metadata.parents[1]
    return ShippedBundle(folder.name, content["version"], content["task"], folder)
