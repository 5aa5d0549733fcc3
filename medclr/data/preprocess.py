"""From files to normalised volumes: one object for training, inference, the downstream bundles and the manifest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.image_reader import ImageReader
from monai.transforms import (
    Compose,
    LoadImage,
    MapTransform,
    Orientationd,
    ScaleIntensityRangePercentiles,
    Spacingd,
    Transform,
)
from torch import Tensor

from medclr import keys
from medclr.errors import ConfigError, ScanError

CHANNELS = "channels"
"""Key of a preprocessed row: bool tensor (C,), which sequences are present."""
POINT = "point"
"""Column of a datalist row: a point of interest, three numbers in the scan's world space (RAS, millimetres)."""
AFFINE_TOLERANCE_MM = 1e-2
"""How far the corners of two grids may lie apart and still be one grid; headers store float32 and rounded text."""


class Volume(NamedTuple):
    """One preprocessed scan."""

    image: Tensor
    """(C, X, Y, Z) float32; zero in absent channels."""
    affine: Tensor
    """(4, 4) float32; voxel index to the scan's world space in millimetres."""
    channels: Tensor
    """(C,) bool; which sequences are present."""
    label: Tensor | None = None
    """(X, Y, Z) integer mask, where the row has one and it was asked for."""
    point: Tensor | None = None
    """(3,) float32, world millimetres, where the row has one."""


class Preprocessing(Compose):
    """Load, check, orient, resample and normalise the scan of a datalist row.

    A ``monai.transforms.Compose``, so that it can stand in a bundle's ``preprocessing`` and be inverted by ``Invertd``.

    Args:
        load: the keys to load: ``image``, and ``label`` where a mask is wanted.
        orientation: axis codes that every scan is turned to, or None to leave it.
        spacing: voxel spacing in millimetres that every scan is resampled to, or None to keep the native grid.
        intensity: a transform of one channel (1, X, Y, Z), applied to every present channel by itself. The default
            maps the 0.5th and 99.5th percentile of the volume to 0 and 1 and clips, which suits MR; for CT give a
            window: ``monai.transforms.ScaleIntensityRange(-1000, 400, 0, 1, clip=True)``.
        reader: a MONAI image reader, or the name of one; MONAI chooses by file type if None.

    Raises:
        ConfigError: at construction, for unusable settings.
        ScanError: when called, for a scan that cannot be read, is not 3D, is constant or not finite, whose sequences
            lie on different grids, or whose label lies on another grid than its image. MONAI wraps it.

    Example:
        >>> preprocessing = Preprocessing(orientation="RAS", spacing=(1.0, 1.0, 1.0))
        >>> volume = preprocessing.volume({"image": "scan.nii.gz", "patient_id": "p1"})  # doctest: +SKIP
    """

    def __init__(
        self,
        load: Sequence[str] = (keys.IMAGE,),
        *,
        orientation: str | None = "RAS",
        spacing: Sequence[float] | None = None,
        intensity: Transform | None = None,
        reader: ImageReader | str | None = None,
    ) -> None:
        unknown = set(load) - {keys.IMAGE, keys.LABEL}
        if keys.IMAGE not in load or unknown:
            raise ConfigError(
                "Preprocessing cannot load these keys.",
                got=list(load),
                wanted="image, or image and label",
                fix="Set load: [image] or load: [image, label].",
            )
        if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
            raise ConfigError(
                "The spacing is unusable.",
                got=spacing,
                wanted="three numbers > 0, millimetres, or null",
                fix="For example spacing: [1.0, 1.0, 1.0].",
            )
        self.load, self.orientation = tuple(load), orientation
        self.spacing = None if spacing is None else tuple(float(step) for step in spacing)
        self.intensity = intensity or ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True)
        steps: list[Any] = [LoadScand(self.load, reader=reader)]
        if orientation is not None:
            steps.append(Orientationd(self.load, axcodes=orientation, labels=None, allow_missing_keys=True))
        if self.spacing is not None:
            modes = tuple("nearest" if key == keys.LABEL else "bilinear" for key in self.load)
            steps.append(Spacingd(self.load, pixdim=self.spacing, mode=modes, allow_missing_keys=True))
        steps.append(NormaliseChannelsd(self.intensity))
        super().__init__(steps)

    def volume(self, row: Mapping[str, Any]) -> Volume:
        """Preprocess one datalist row into plain tensors; raises :class:`ScanError` itself, unwrapped."""
        try:
            done = self(dict(row))
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ScanError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None
        image, label, point = done[keys.IMAGE], done.get(keys.LABEL), row.get(POINT)
        return Volume(
            image=_plain(image).to(torch.float32),
            affine=torch.as_tensor(image.affine, dtype=torch.float32),
            channels=done[CHANNELS],
            label=_plain(label)[0].to(torch.int16) if isinstance(label, MetaTensor) else None,
            point=None if point is None else torch.tensor(point, dtype=torch.float32),
        )

    def describe(self) -> dict[str, Any]:
        """The settings as plain values, for the manifest that travels with weights."""
        settings = {
            name: value
            for name, value in vars(self.intensity).items()
            if not name.startswith("_") and isinstance(value, (int, float, str, bool, type(None)))
        }
        return {
            "orientation": self.orientation,
            "spacing": None if self.spacing is None else list(self.spacing),
            "intensity": {"name": type(self.intensity).__name__, **settings},
        }


class LoadScand(MapTransform):
    """Load the files of a row with MONAI's ``LoadImage`` and check that they are 3D, finite, and on one grid.

    ``image`` may be one path or a list of paths of co-registered sequences; a null entry becomes a zero channel, and
    the row gains ``channels``. ``label`` is left as it is where it is no path, and left out where absent.
    """

    def __init__(self, load: Sequence[str], *, reader: ImageReader | str | None = None) -> None:
        super().__init__(load, allow_missing_keys=True)
        self.loader = LoadImage(reader=reader, image_only=True, dtype=np.float32, ensure_channel_first=True)

    def __call__(self, row: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Row of paths to row of MetaTensors (C, X, Y, Z)."""
        done = dict(row)
        paths = row[keys.IMAGE]
        paths = list(paths) if isinstance(paths, (list, tuple)) else [paths]
        images = [None if path is None else self._scan(path) for path in paths]
        present = [image for image in images if image is not None]
        if not present:
            raise ScanError(
                "A scan has no sequence at all.",
                got=paths,
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
        stacked = torch.cat([torch.zeros_like(_plain(first)) if image is None else _plain(image) for image in images])
        done[keys.IMAGE] = MetaTensor(stacked, affine=first.affine, meta=first.meta)
        done[CHANNELS] = torch.tensor([image is not None for image in images])
        if keys.LABEL in self.keys and isinstance(row.get(keys.LABEL), str):
            label = self._read(row[keys.LABEL])
            check_same_grid(
                label,
                first,
                "A label lies on another grid than its image.",
                "Resample the label to its image, or correct the header that is wrong.",
            )
            if not bool((label == label.round()).all()):
                raise ScanError(
                    "A label holds values that are no whole numbers.",
                    got=sorted(label.unique().tolist())[:5],
                    wanted="0, 1, 2, ...",
                    fix="Give a mask of classes, not a probability map.",
                )
            done[keys.LABEL] = label
        return done

    def _scan(self, path: str) -> MetaTensor:
        image = self._read(path)
        if not bool(torch.isfinite(_plain(image)).all()):
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

    def _read(self, path: str) -> MetaTensor:
        try:
            image = self.loader(path)
        except Exception as error:  # readers raise many kinds, and their texts hold paths, which may hold names
            raise ScanError(
                "A file cannot be read as an image.",
                got=type(error).__name__,
                wanted="a complete file of a known type",
                fix="Copy or convert the file again.",
            ) from error
        if image.ndim != 4 or image.shape[0] != 1 or min(image.shape[1:]) < 2:
            raise ScanError(
                "A scan is not 3D.",
                got=f"shape {tuple(image.shape[1:] if image.shape[0] == 1 else image.shape)}",
                wanted="one volume (X, Y, Z) a file",
                fix="Split a series into one file a volume.",
            )
        if abs(float(np.linalg.det(image.affine[:3, :3]))) < 1e-9:
            raise ScanError(
                "A scan's geometry is unusable.",
                got="an affine that cannot be inverted",
                wanted="three independent axes with spacing > 0",
                fix="Correct the header.",
            )
        return image


class NormaliseChannelsd(MapTransform):
    """Apply ``intensity`` to each present channel of ``image`` by itself; absent channels stay zero."""

    def __init__(self, intensity: Transform) -> None:
        super().__init__((keys.IMAGE,))
        self.intensity = intensity

    def __call__(self, row: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Row to row, ``image`` normalised in place of the old one."""
        done = dict(row)
        image = row[keys.IMAGE]
        for channel in torch.nonzero(row[CHANNELS]).flatten().tolist():
            image[channel : channel + 1] = self.intensity(image[channel : channel + 1])
        done[keys.IMAGE] = image
        return done


def check_same_grid(image: MetaTensor, other: MetaTensor, problem: str, fix: str) -> None:
    """Raise :class:`ScanError` unless both volumes have one shape and their corners lie within the tolerance."""
    if image.shape[1:] != other.shape[1:]:
        raise ScanError(
            problem, got=f"shapes {tuple(image.shape[1:])} and {tuple(other.shape[1:])}", wanted="one shape", fix=fix
        )
    extent = np.asarray(image.shape[1:]) - 1
    corners = np.array([[*(extent * corner), 1.0] for corner in np.ndindex(2, 2, 2)])
    apart = np.abs(corners @ (np.asarray(image.affine) - np.asarray(other.affine)).T).max()
    if apart > AFFINE_TOLERANCE_MM:
        raise ScanError(
            problem, got=f"corners up to {apart:.3g} mm apart", wanted=f"within {AFFINE_TOLERANCE_MM:g} mm", fix=fix
        )


def _plain(image: MetaTensor | Tensor) -> Tensor:
    return image.as_tensor() if isinstance(image, MetaTensor) else image
