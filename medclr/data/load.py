"""Loading the files of a datalist row, and refusing what is no usable 3D scan."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.image_reader import ImageReader
from monai.transforms import MapTransform
from torch import Tensor

from medclr import keys
from medclr.data.privacy import described
from medclr.data.scan_files import ScanFiles
from medclr.errors import ScanError

CHANNELS = "channels"
"""Key of a preprocessed row: bool tensor (C,), which sequences are present."""
LARGEST_CLASS = int(torch.iinfo(torch.int16).max)
AFFINE_TOLERANCE_MM = 1e-2
"""How far the corners of two grids may lie apart and still be one grid; headers store float32 and rounded text."""


class LoadScand(MapTransform):
    """Load the files of a row with MONAI's ``LoadImage`` and check that they are 3D, finite, and on one grid.

    ``image`` may be one path or a list of paths of co-registered sequences; a null entry becomes a zero channel, and
    the row gains ``channels``. ``label`` is left out where it is absent or null.
    """

    def __init__(self, load: Sequence[str], *, reader: ImageReader | str | None = None) -> None:
        super().__init__(load, allow_missing_keys=True)
        self.loader = ScanFiles(reader)

    def __call__(self, row: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Row of paths to row of MetaTensors (C, X, Y, Z)."""
        done = dict(row)
        paths = row.get(keys.IMAGE)
        paths = list(paths) if isinstance(paths, (list, tuple)) else [paths]
        images = [None if path is None else self._scan(path) for path in paths]
        present = [image for image in images if image is not None]
        if not present:
            raise ScanError(
                "A scan has no sequence at all.",
                got=described(paths),
                wanted="at least one path under image",
                fix="Drop the row, or name its file.",
            )
        first = present[0]
        for image in present[1:]:
            check_same_grid(
                image,
                first,
                "The sequences of one scan lie on different grids.",
                "Register and resample the sequences to one grid, or give each its own row.",
            )
        stacked = torch.cat([torch.zeros_like(plain(first)) if image is None else plain(image) for image in images])
        done[keys.IMAGE] = MetaTensor(stacked, meta=first.meta)
        done[CHANNELS] = torch.tensor([image is not None for image in images])
        if keys.LABEL in self.keys and keys.LABEL in done:
            path = done.pop(keys.LABEL)
            if path is not None:
                done[keys.LABEL] = self._mask(path, first)
        return done

    def _mask(self, path: Any, image: MetaTensor) -> MetaTensor:
        if not isinstance(path, (str, os.PathLike)):
            raise ScanError(
                "A label is no file.",
                got=described(path),
                wanted="the path of one mask",
                fix="Name the mask's file under label, or leave label out of load.",
            )
        label = self._read(path)
        check_same_grid(
            label,
            image,
            "A label lies on another grid than its image.",
            "Resample the label to its image, or correct the header that is wrong.",
        )
        values = plain(label)
        wrong = values[~((values == values.round()) & (values >= 0) & (values <= LARGEST_CLASS))]
        if len(wrong):
            raise ScanError(
                "A label holds values that are no classes.",
                got=wrong.unique()[:5].tolist(),
                wanted=f"whole numbers 0, 1, 2, ... up to {LARGEST_CLASS}",
                fix="Give a mask of classes, not a probability map.",
            )
        return label

    def _scan(self, path: Any) -> MetaTensor:
        image = self._read(path)
        if not bool(torch.isfinite(plain(image)).all()):
            raise ScanError(
                "A scan holds values that are no numbers.",
                got="NaN or infinite voxels",
                wanted="finite voxels",
                fix="Convert the scan again, or replace those voxels.",
            )
        if float(image.min()) == float(image.max()):
            raise ScanError(
                "A scan is constant.",
                got=f"every voxel is {float(image.min()):g}",
                wanted="an image",
                fix="Drop the scan: it holds no information.",
            )
        return image

    def _read(self, path: Any) -> MetaTensor:
        image = self.loader(path)
        if image.ndim != 4 or image.shape[0] != 1 or min(image.shape[1:]) < 2:
            raise ScanError(
                "A scan is not 3D.",
                got=f"shape {tuple(image.shape[1:] if image.shape[0] == 1 else image.shape)}",
                wanted="one volume (X, Y, Z) a file",
                fix="Split a series into one file a volume.",
            )
        if not abs(float(np.linalg.det(image.affine[:3, :3]))) >= 1e-9:
            raise ScanError(
                "A scan's geometry is unusable.",
                got="an affine that cannot be inverted",
                wanted="three independent axes with spacing > 0",
                fix="Correct the header.",
            )
        return image


def check_same_grid(image: MetaTensor, other: MetaTensor, problem: str, fix: str) -> None:
    """Raise :class:`ScanError` unless both volumes have one shape and their corners lie within the tolerance."""
    if image.shape[1:] != other.shape[1:]:
        raise ScanError(
            problem, got=f"shapes {tuple(image.shape[1:])} and {tuple(other.shape[1:])}", wanted="one shape", fix=fix
        )
    extent = np.asarray(image.shape[1:]) - 1
    corners = np.array([[*(extent * corner), 1.0] for corner in np.ndindex(2, 2, 2)])
    apart = np.abs(corners @ (np.asarray(image.affine) - np.asarray(other.affine)).T).max()
    if not apart <= AFFINE_TOLERANCE_MM:
        raise ScanError(
            problem, got=f"corners up to {apart:.3g} mm apart", wanted=f"within {AFFINE_TOLERANCE_MM:g} mm", fix=fix
        )


def plain(image: MetaTensor | Tensor) -> Tensor:
    """The voxels without MONAI's metadata."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image
