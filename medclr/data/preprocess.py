"""From files to normalised volumes: one object for training, inference, the downstream bundles and the manifest."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from monai.data.image_reader import ImageReader
from monai.transforms import (
    Compose,
    MapTransform,
    Orientationd,
    ScaleIntensityRangePercentiles,
    Spacingd,
    Transform,
)
from torch import Tensor

from medclr import keys
from medclr.data.load import CHANNELS, LoadScand, plain
from medclr.data.privacy import described
from medclr.errors import ConfigError, ScanError

POINT = "point"
"""Column of a datalist row: a point of interest, three numbers in the scan's world space (RAS, millimetres)."""


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
        reader: a MONAI image reader, or the name of one; if None, the one that the file's type asks for.

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
        if orientation is not None and not _names_three_axes(orientation):
            raise ConfigError(
                "The orientation is unusable.",
                got=orientation,
                wanted="one letter of each of R/L, A/P and S/I, or null",
                fix="For example orientation: RAS.",
            )
        steps_mm = None if spacing is None else _three_numbers(spacing)
        if spacing is not None and (steps_mm is None or min(steps_mm) <= 0):
            raise ConfigError(
                "The spacing is unusable.",
                got=spacing,
                wanted="three numbers > 0, millimetres, or null",
                fix="For example spacing: [1.0, 1.0, 1.0].",
            )
        if intensity is not None and not callable(intensity):
            raise ConfigError(
                "The intensity is unusable.",
                got=intensity,
                wanted="a transform of one channel, or null",
                fix="For example intensity: {_target_: NormalizeIntensity}.",
            )
        self.load, self.orientation, self.spacing = tuple(load), orientation, steps_mm
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
        image, label, place = done[keys.IMAGE], done.get(keys.LABEL), row.get(POINT)
        point = None if place is None else _three_numbers(place)
        if place is not None and point is None:
            raise ScanError(
                "A scan's point is unusable.",
                got=described(place),
                wanted="[x, y, z] in world millimetres",
                fix="Correct the row's point, or drop it.",
            )
        return Volume(
            image=plain(image).to(torch.float32),
            affine=torch.as_tensor(image.affine, dtype=torch.float32),
            channels=done[CHANNELS],
            label=plain(label)[0].to(torch.int16) if isinstance(label, MetaTensor) else None,
            point=None if point is None else torch.tensor(point, dtype=torch.float32),
        )

    def describe(self) -> dict[str, Any]:
        """The settings as plain values, for the manifest that travels with weights."""
        return {
            "orientation": self.orientation,
            "spacing": None if self.spacing is None else list(self.spacing),
            "intensity": _settings(self.intensity),
        }


class NormaliseChannelsd(MapTransform):
    """Apply ``intensity`` to each present channel of ``image`` by itself; absent channels stay zero.

    Raises:
        ScanError: for a channel that the transform leaves constant, not finite, or outside the range it should clip to.
    """

    def __init__(self, intensity: Transform) -> None:
        super().__init__((keys.IMAGE,))
        self.intensity = intensity

    def __call__(self, row: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Row to row, ``image`` normalised in place of the old one."""
        done = dict(row)
        image = row[keys.IMAGE]
        for channel in torch.nonzero(row[CHANNELS]).flatten().tolist():
            image[channel : channel + 1] = self._checked(self.intensity(image[channel : channel + 1]))
        done[keys.IMAGE] = image
        return done

    def _checked(self, image: Tensor) -> Tensor:
        low, high = float(image.min()), float(image.max())
        limits = -math.inf, math.inf
        if getattr(self.intensity, "clip", False) and getattr(self.intensity, "b_max", None) is not None:
            # MONAI's percentile scaling shifts, and neither scales nor clips, where both percentiles are one value.
            limits = self.intensity.b_min - 1e-3, self.intensity.b_max + 1e-3
        if not (math.isfinite(low) and low < high and math.isfinite(high) and limits[0] <= low and high <= limits[1]):
            raise ScanError(
                "A scan cannot be normalised.",
                got=f"values from {low:g} to {high:g} after {type(self.intensity).__name__}",
                wanted="finite values that differ, within the range that it scales to",
                fix="Crop the scan to the body, choose another intensity, or drop the scan.",
            )
        return image


def _names_three_axes(codes: Any) -> bool:
    return isinstance(codes, str) and len(codes) == 3 and all(set(axis) & set(codes) for axis in ("RL", "AP", "SI"))


def _three_numbers(values: Any) -> tuple[float, float, float] | None:
    if isinstance(values, str):
        return None
    try:
        x, y, z = (float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return (x, y, z) if math.isfinite(x) and math.isfinite(y) and math.isfinite(z) else None


def _settings(transform: Any) -> dict[str, Any]:
    kind = {"name": type(transform).__name__}
    if isinstance(transform, Compose):
        return {**kind, "transforms": [_settings(part) for part in transform.transforms]}
    simple = (int, float, str, bool, type(None))
    settings = {
        key: list(value) if isinstance(value, (list, tuple)) else value
        for key, value in vars(transform).items()
        if not key.startswith("_")
        and all(isinstance(part, simple) for part in (value if isinstance(value, (list, tuple)) else [value]))
    }
    return {**settings, **kind}
