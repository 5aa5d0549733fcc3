"""Which files are segmentations, and of which image."""

from __future__ import annotations

import posixpath
import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from medclr.data.nifti import Probe, stem_of
from medclr.errors import ConfigError, ScanError

GRID_TOLERANCE_MM = 1e-3
"""A label lies on the grid of its image if no corner of the volume is further off than this."""

LABEL_FOLDERS = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "images": "labels"}
"""Folder of images: folder of their labels, beside it. The Medical Segmentation Decathlon's names, and plain ones."""


class LabelRule(Protocol):
    """Tells labels from images, and finds the label files of an image. Paths are relative to the folder, with ``/``."""

    def is_label(self, path: str) -> bool:
        """Whether a file is a label, so that it is never indexed as an image."""

    def candidates(self, image: str) -> list[str]:
        """The label files of an image; more than one cannot be decided."""


class LabelFolders:
    """Labels by folder (``LABEL_FOLDERS``): same path, same name, perhaps compressed where the image is not."""

    def __init__(self, files: Iterable[str]) -> None:
        self._labels: dict[str, list[str]] = {}
        for file in files:
            if self.is_label(file):
                self._labels.setdefault(_bare(file), []).append(file)

    def is_label(self, path: str) -> bool:
        """Whether a folder on the way to the file is one for labels."""
        return not set(LABEL_FOLDERS.values()).isdisjoint(path.split("/")[:-1])

    def candidates(self, image: str) -> list[str]:
        """Files of the same name in the matching folder."""
        parts = image.split("/")
        place = next((i for i in range(len(parts) - 2, -1, -1) if parts[i] in LABEL_FOLDERS), None)
        if place is None:
            return []
        parts[place] = LABEL_FOLDERS[parts[place]]
        return self._labels.get(_bare("/".join(parts)), [])


class LabelTemplate:
    """Labels by a template that is filled in for each image.

    Args:
        template: a path in which ``{folder}`` is the indexed folder, ``{parent}`` the image's folder, ``{name}`` its
            file name, ``{stem}`` the name without suffix; ``*`` stands for any piece of the file name. A relative path
            starts at the indexed folder. Example: ``{parent}/../labels/{stem}_seg.nii.gz``.
        files: all volumes of the folder.

    Raises:
        ConfigError: an unknown name, ``*`` in a folder, a template of every file, or one of no file.
    """

    def __init__(self, template: str, files: Iterable[str]) -> None:
        self.template = template
        plain = template.replace("\\", "/").removeprefix("{folder}/")
        names = set(re.findall(r"\{([^{}]*)\}", plain))
        folder, _, name = plain.rpartition("/")
        if not names or names - {"parent", "name", "stem"} or "*" in folder or plain.startswith("/"):
            wanted = "{name} or {stem}, perhaps {parent}, below {folder}; * in the file name alone"
            raise self._bad("a template that cannot be filled in", wanted)
        self._folder, self._name = folder, name
        self._shape = re.compile(self._regex(plain))
        self._by_folder: dict[str, list[str]] = {}
        some = False
        for file in files:
            if self.is_label(file):
                self._by_folder.setdefault(posixpath.dirname(file), []).append(posixpath.basename(file))
            else:
                some = True
        for found in self._by_folder.values():
            found.sort()
        if not self._by_folder or not some:
            raise self._bad("it fits no file" if some else "it fits every file", "a template of labels, not of images")

    def is_label(self, path: str) -> bool:
        """Whether the path has the form of the template, for whatever image."""
        return self._shape.fullmatch(path) is not None

    def candidates(self, image: str) -> list[str]:
        """The files that the template, filled in for this image, names."""
        parent, name = posixpath.split(image)
        values = {"parent": parent or ".", "name": name, "stem": stem_of(image)}
        folder = posixpath.normpath(_fill(self._folder, values) or ".")
        pieces = [_fill(piece, values) for piece in self._name.split("*")]
        fits = re.compile("[^/]*".join(map(re.escape, pieces)))
        names = self._by_folder.get("" if folder == "." else folder, [])
        found = []
        for i in range(bisect_left(names, pieces[0]), len(names)):
            if not names[i].startswith(pieces[0]):
                break
            if fits.fullmatch(names[i]):
                found.append(posixpath.join("" if folder == "." else folder, names[i]))
        return found

    def _regex(self, plain: str) -> str:
        pieces = {"{parent}/": "(?:.*/)?", "{name}": r"[^/]+", "{stem}": r"[^/]+", "*": "[^/]*"}
        plain = re.sub(r"\{parent\}(?:/\.\.)+/", "{parent}/", plain)
        parts = re.split(r"(\{parent\}/|\{name\}|\{stem\}|\*)", posixpath.normpath(plain))
        return "".join(pieces.get(part, re.escape(part)) for part in parts)

    def _bad(self, got: str, wanted: str) -> ConfigError:
        return ConfigError(
            "The labels cannot be found.",
            got=f"--labels {self.template!r}: {got}",
            wanted=wanted,
            fix="Use a template such as '{folder}/labelsTr/{name}' or '{parent}/{stem}_seg.nii.gz'.",
        )


def refuse_other_grid(label: Probe, image: Probe) -> None:
    """Check that a label has the shape of its image, and its affine within ``GRID_TOLERANCE_MM`` at every corner.

    Raises:
        ScanError: it has not.
    """
    if label.shape != image.shape:
        raise ScanError(
            "The label has another shape than its image.",
            got=f"{label.shape}",
            wanted=f"{image.shape}",
            fix="Resample the label to its image.",
        )
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in image.shape])).reshape(3, -1)
    offset = (label.affine - image.affine)[:3]
    distance = float(np.linalg.norm(offset[:, :3] @ corners + offset[:, 3:], axis=0).max())
    if distance > GRID_TOLERANCE_MM:
        raise ScanError(
            "The label lies elsewhere than its image.",
            got=f"corners up to {distance:.4g} mm apart",
            wanted=f"the same affine, within {GRID_TOLERANCE_MM} mm",
            fix="Resample the label to its image, or correct its affine.",
        )


def _bare(path: str) -> str:
    return posixpath.join(posixpath.dirname(path), stem_of(path))


def _fill(template: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", value)
    return template
