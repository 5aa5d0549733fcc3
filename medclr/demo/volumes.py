"""What the demo must know of a user's scans before it can configure the bundles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medclr.data.datalist import Datalist
from medclr.errors import ConfigError
from medclr.keys import IMAGE, LABEL

STRIDE = 8
"""Voxels of the image to one of SegResNet's coarsest map."""
LARGEST = 64
MANY_CLASSES = 64


def first_image(row: Mapping[str, Any]) -> Path:
    """The file of a scan, or of its first sequence that is there."""
    return Path(row[IMAGE] if isinstance(row[IMAGE], str) else next(path for path in row[IMAGE] if path))


def fitting_roi(rows: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """Voxels of a view that most scans hold: multiples of the network's stride, 24 to 64 along each axis.

    Args:
        rows: of the datalist; the scans' headers are read, turned to RAS as the bundles do.
    """
    shapes = []
    for row in rows:
        header = nibabel.load(first_image(row))
        order = np.argsort(nibabel.io_orientation(header.affine)[:, 0])
        shapes.append([header.shape[axis] for axis in order])
    low = np.quantile(np.array(shapes), 0.25, axis=0)
    x, y, z = (int(min(LARGEST, max(3 * STRIDE, edge // STRIDE * STRIDE))) for edge in low)
    return x, y, z


def count_classes(datalist: Datalist) -> int:
    """Number of classes with the background: one more than the highest value in any mask.

    Raises:
        ConfigError: that is more than ``MANY_CLASSES``.
    """
    masks = [row[LABEL] for rows in datalist.sections.values() for row in rows if isinstance(row.get(LABEL), str)]
    highest = max(int(np.asarray(nibabel.load(path).dataobj).max()) for path in masks)
    if highest >= MANY_CLASSES:
        raise ConfigError(
            "The masks hold very many classes.",
            got=f"a value of {highest}",
            wanted=f"classes 0, 1, 2, ... below {MANY_CLASSES}",
            fix="Write masks with classes that count from 0; a mask of 0 and 255 is one of 0 and 1.",
        )
    return 1 + highest
