"""Crop rules: where in two scans the two crops of a pair are read.

A rule is called with the two volumes and the pair's draw key, and returns two crops. It reads ``read_size`` voxels,
which is ``size``, what the encoder will see, plus the margin that rotation and scaling need, centred on the same point.
What lies outside the scan is zero, and the crop says so (``Crop.inside``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medclr.data.preprocess import Volume
from medclr.draws import generator
from medclr.errors import ConfigError, ScanError
from medclr.geometry import Crop, shifted, spacing_of

Start = NDArray[np.int64]


class RandomCrop:
    """Crops at random places, each wholly inside its scan where the scan is large enough, else centred on it.

    Args:
        size: voxels (X, Y, Z) that a view will have.
        read_size: voxels to read, ``size`` plus the margin of the spatial augmentation; ``size`` if None.

    Raises:
        ConfigError: for sizes that are not three whole numbers > 0, or a ``read_size`` below ``size``.
    """

    needs_same_scan = False

    def __init__(self, size: Sequence[int], read_size: Sequence[int] | None = None) -> None:
        self.size, self.read_size = (
            checked_size("size", size),
            checked_size("read_size", size if read_size is None else read_size),
        )
        if any(read < seen for read, seen in zip(self.read_size, self.size, strict=True)):
            raise ConfigError(
                "A crop would read less than its view shows.",
                got=f"read_size {list(self.read_size)}",
                wanted=f"at least size {list(self.size)}",
                fix="Leave read_size to the spatial transform's read_size(size).",
            )

    def __call__(self, volume_1: Volume, volume_2: Volume, key: Tensor) -> tuple[Crop, Crop]:
        """Two crops; ``key`` (5,) is the pair's draw key, whose view is 0."""
        crops = []
        for view, volume in ((1, volume_1), (2, volume_2)):
            view_key = _of_view(key, view)
            crops.append(self._read(volume, self.start(volume, generator(view_key, "crop")), view_key))
        return crops[0], crops[1]

    def start(self, volume: Volume, random: np.random.Generator) -> Start:
        """First voxel (3,) of the view's extent in the volume."""
        room = np.asarray(volume.image.shape[1:]) - self.size
        return np.where(room >= 0, random.integers(0, np.maximum(room, 0) + 1), room // 2)

    def _read(self, volume: Volume, start: Start, view_key: Tensor) -> Crop:
        margin: Start = (np.asarray(self.read_size) - np.asarray(self.size)) // 2
        return read_crop(volume, start - margin, self.read_size, view_key)


class ForegroundCrop(RandomCrop):
    """Random crops that hold enough foreground.

    Draws up to ``tries`` places and takes the first with the wanted share of voxels above the threshold, or else the
    one with the largest share.

    Args:
        size: voxels (X, Y, Z) that a view will have.
        read_size: voxels to read; ``size`` if None.
        threshold: normalised intensity above which a voxel, of any channel, is foreground.
        share: wanted share of foreground voxels, 0 to 1.
        tries: places to try.
    """

    def __init__(
        self,
        size: Sequence[int],
        read_size: Sequence[int] | None = None,
        *,
        threshold: float = 0.05,
        share: float = 0.5,
        tries: int = 10,
    ) -> None:
        super().__init__(size, read_size)
        if not 0 <= share <= 1 or tries < 1:
            raise ConfigError(
                "A foreground crop is unusable.",
                got=f"share {share}, tries {tries}",
                wanted="share from 0 to 1, tries >= 1",
                fix="For example share: 0.5 and tries: 10.",
            )
        self.threshold, self.share, self.tries = threshold, share, tries

    def start(self, volume: Volume, random: np.random.Generator) -> Start:
        """First voxel (3,) of the view's extent in the volume."""
        best, best_share = None, -1.0
        for _ in range(self.tries):
            start = super().start(volume, random)
            low, high = np.maximum(start, 0), start + self.size
            part = volume.image[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
            share = float((part.amax(dim=0) > self.threshold).float().mean())
            if share > best_share:
                best, best_share = start, share
            if share >= self.share:
                break
        assert best is not None  # tries >= 1
        return best


class CropAround(RandomCrop):
    """Crops around the mask or the point of each scan.

    Args:
        size: voxels (X, Y, Z) that a view will have.
        read_size: voxels to read; ``size`` if None.
        target: ``mask`` centres on the bounding box of the row's label (preprocessing must load it), ``point`` on the
            row's ``point`` column (world millimetres, RAS).
        jitter: largest shift of the centre along each axis, in millimetres.

    Raises:
        ScanError: when called, for a scan without mask or point; the run quarantines it.
    """

    def __init__(
        self,
        size: Sequence[int],
        read_size: Sequence[int] | None = None,
        *,
        target: Literal["mask", "point"] = "mask",
        jitter: float = 0.0,
    ) -> None:
        super().__init__(size, read_size)
        if target not in ("mask", "point") or not 0 <= jitter < math.inf:
            raise ConfigError(
                "A crop around a target is unusable.",
                got=f"target {target!r}, jitter {jitter}",
                wanted="target mask or point, jitter >= 0 mm",
                fix="For example target: mask and jitter: 5.",
            )
        self.target, self.jitter = target, jitter

    def start(self, volume: Volume, random: np.random.Generator) -> Start:
        """First voxel (3,) of the view's extent in the volume."""
        spacing = spacing_of(volume.affine).numpy()
        centre = self._centre(volume) + random.uniform(-self.jitter, self.jitter, 3) / spacing
        return np.round(centre - (np.asarray(self.size) - 1) / 2).astype(np.int64)

    def _centre(self, volume: Volume) -> NDArray[np.float64]:
        if self.target == "point":
            if volume.point is None:
                raise ScanError(
                    "A scan has no point to crop around.",
                    got="no point column",
                    wanted="point: [x, y, z] in world millimetres",
                    fix="Add the column, or choose another crop rule.",
                )
            world = np.append(volume.point.numpy().astype(np.float64), 1.0)
            voxel: NDArray[np.float64] = (np.linalg.inv(volume.affine.numpy().astype(np.float64)) @ world)[:3]
            if np.any(voxel < -0.5) or np.any(voxel > np.asarray(volume.image.shape[1:]) - 0.5):
                raise ScanError(
                    "A scan's point lies outside it.",
                    got=f"voxel {np.round(voxel, 1).tolist()} of a grid {list(volume.image.shape[1:])}",
                    wanted="a point inside the scan",
                    fix="Give the point in the scan's world space: RAS, millimetres.",
                )
            return voxel
        if volume.label is None or not bool(volume.label.any()):
            raise ScanError(
                "A scan has no mask to crop around.",
                got="no label" if volume.label is None else "an empty label",
                wanted="a mask with at least one voxel",
                fix="Add a label, let preprocessing load it (load: [image, label]), or choose another crop rule.",
            )
        voxels = torch.nonzero(volume.label)
        return (voxels.amin(dim=0) + voxels.amax(dim=0)).numpy().astype(np.float64) / 2


class OverlappingCrops(RandomCrop):
    """Two crops of one scan whose extents overlap, by at least a given intersection over union.

    Args:
        size: voxels (X, Y, Z) that a view will have.
        read_size: voxels to read; ``size`` if None.
        min_iou: smallest intersection over union of the two extents, before augmentation, from 0 to 1.
    """

    needs_same_scan = True

    def __init__(self, size: Sequence[int], read_size: Sequence[int] | None = None, *, min_iou: float = 0.3) -> None:
        super().__init__(size, read_size)
        if not 0 <= min_iou <= 1:
            raise ConfigError(
                "The overlap is unusable.", got=f"min_iou {min_iou}", wanted="0 to 1", fix="For example min_iou: 0.3."
            )
        self.min_iou = min_iou

    def __call__(self, volume_1: Volume, volume_2: Volume, key: Tensor) -> tuple[Crop, Crop]:
        """Two crops; ``key`` (5,) is the pair's draw key, whose view is 0."""
        one_grid = volume_1.image.shape == volume_2.image.shape and torch.equal(volume_1.affine, volume_2.affine)
        if not one_grid:
            raise ConfigError(
                "Overlapping crops were asked for in two different scans.",
                got="scans on different grids",
                wanted="both crops from one scan",
                fix="Use the pair rule SameScan with OverlappingCrops.",
            )
        random = generator(key, "crop")
        start_1 = self.start(volume_1, random)
        room = np.asarray(volume_1.image.shape[1:]) - self.size
        start_2 = start_1
        for turn in range(100):
            # Ever closer, so that a large overlap is found as well, and small views still move by single voxels.
            reach = np.ceil(np.asarray(self.size) * 0.95**turn).astype(np.int64)
            shift = random.integers(-reach, reach + 1)
            # Where the scan is smaller than the view, both crops are centred on it along that axis.
            candidate = np.where(room >= 0, np.clip(start_1 + shift, 0, np.maximum(room, 0)), start_1)
            if overlap(start_1, candidate, self.size) >= self.min_iou:
                start_2 = candidate
                break
        return (
            self._read(volume_1, start_1, _of_view(key, 1)),
            self._read(volume_2, start_2, _of_view(key, 2)),
        )


def overlap(start_1: Start, start_2: Start, size: Sequence[int]) -> float:
    """Intersection over union of two boxes of one size."""
    common = float(np.prod(np.maximum(np.asarray(size) - np.abs(start_1 - start_2), 0)))
    return common / (2 * float(np.prod(size)) - common)


def read_crop(volume: Volume, start: Start, size: Sequence[int], key: Tensor) -> Crop:
    """Read ``size`` voxels of ``volume`` from voxel ``start`` (3,), zero where that lies outside the scan."""
    shape = np.asarray(volume.image.shape[1:])
    low = np.clip(-start, 0, size)
    high = np.clip(shape - start, low, size)
    image = torch.zeros((volume.image.shape[0], *size), dtype=torch.float32)
    source = tuple(slice(int(a), int(b)) for a, b in zip(start + low, start + high, strict=True))
    target = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    image[(slice(None), *target)] = volume.image[(slice(None), *source)]
    return Crop(
        image=image,
        affine=shifted(volume.affine, torch.from_numpy(start)),
        inside=torch.from_numpy(np.stack([low, high]).astype(np.int64)),
        channels=volume.channels,
        key=key,
    )


def checked_size(name: str, size: Sequence[int]) -> tuple[int, int, int]:
    """``size`` as a triple, or :class:`ConfigError`."""
    try:
        x, y, z = (operator.index(edge) for edge in size)
    except (TypeError, ValueError):
        x = y = z = 0
    if min(x, y, z) < 1:
        raise ConfigError(
            f"{name} is unusable.", got=size, wanted="three whole numbers > 0", fix=f"For example {name}: [64, 64, 64]."
        )
    return x, y, z


def _of_view(key: Tensor, view: int) -> Tensor:
    view_key = key.clone()
    view_key[-1] = view
    return view_key
