"""Rotation, scale, shift, flip and the cut to the view's size, composed into one resampling, in millimetres.

A view is a grid of voxels laid into the scan. In the axes of the crop, a view voxel that lies ``o`` millimetres from
the view's centre is read ``R S F o + t`` millimetres from the same place in the crop: F flips, S shrinks the grid by
the scale, R rotates it, t shifts it. With D the diagonal of the voxel spacing, voxel indices go through
``D^-1 R S F D``, so a rotation stays a rotation where slices are thick. The axes of a crop are taken to be
perpendicular.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from medclr import draws
from medclr.errors import ConfigError
from medclr.geometry import Crop, View, shifted, spacing_of
from medclr.views.ranges import (
    Params,
    Strength,
    draw_active,
    draw_log_range,
    read_positive_range,
    read_probability,
    read_size,
    read_triple,
)

# A sampling point may miss the outermost voxel centre by the rounding of float32 and still count as inside the scan.
_TOLERANCE = 1e-3


class RandomSpatial:
    """Turn a crop into a view: rotate, scale, shift and flip it at random, and cut it to ``size``, in one resampling.

    Models that anatomy has no preferred pose, and that patients differ in size. Interpolation is trilinear. A sample
    whose draw is neutral is cut out of the crop, and perhaps flipped, without interpolation: bit for bit.

    Args:
        size: voxels of the view (X, Y, Z). The voxel spacing stays that of the crop.
        rotation: largest angle in degrees, either way, about each axis of the crop; a triple gives one an axis. For
            thick slices stacked along the last axis, ``(0, 0, 15)`` stays within the slices. Drawn uniformly.
        scale: magnification of the anatomy; 1.1 shows it 10% larger. Its logarithm is drawn uniformly.
        anisotropic: draw one scale an axis of the view, instead of one for all.
        translation: largest shift in millimetres, either way, along each axis of the crop. Crop rules place the crops
            already, so that this is 0 by default.
        flip: probability of a flip along each axis; ``True`` is 0.5. A flip exchanges left and right in the image, so
            leave it out along an axis whose direction means something.
        probability: share of the samples that are rotated, scaled and shifted. Flips have their own.

    Raises:
        ConfigError: a setting is out of its range.

    Example:
        >>> spatial = RandomSpatial((32, 48, 32), rotation=15, scale=(0.9, 1.1), flip=(True, False, False))
        >>> spatial.read_size(spacing=(1.0, 1.0, 1.0))
        (56, 70, 56)
    """

    def __init__(
        self,
        size: Sequence[int],
        *,
        rotation: float | Sequence[float] = 15.0,
        scale: Strength = (0.9, 1.1),
        anisotropic: bool = False,
        translation: float | Sequence[float] = 0.0,
        flip: Sequence[bool | float] = (False, False, False),
        probability: float = 1.0,
    ) -> None:
        self.size = read_size(self, "size", size)
        self.rotation = read_triple(self, "rotation", rotation, maximum=180.0)
        self.scale = read_positive_range(self, "scale", scale)
        self.anisotropic = bool(anisotropic)
        self.translation = read_triple(self, "translation", translation)
        if not isinstance(flip, Sequence) or len(flip) != 3:
            raise ConfigError(
                "RandomSpatial cannot use its setting 'flip'.",
                got=flip,
                wanted="three truth values or probabilities, one an axis",
                fix="Write flip=(True, False, False) to flip along the first axis in half of the views.",
            )
        halves = tuple(0.5 if one is True else 0 if one is False else one for one in flip)
        self.flip = read_triple(self, "flip", halves, maximum=1.0)
        self.probability = read_probability(self, probability)

    def read_size(self, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> tuple[int, int, int]:
        """How large a crop must be for every view that can be drawn to lie inside it.

        Args:
            spacing: voxel spacing of the crop in millimetres, one number an axis.

        Returns:
            Voxels along each axis, at least the size of the view, as few as will do.

        Raises:
            ConfigError: the spacing is not three positive numbers.
        """
        step = read_triple(self, "spacing", spacing)
        if min(step) <= 0:
            raise ConfigError(
                "No crop can be read at this voxel spacing.",
                got=tuple(spacing),
                wanted="three positive numbers of millimetres",
                fix="Pass the spacing of the preprocessed scans, such as (1.0, 1.0, 1.0).",
            )
        if self.probability == 0:
            return self.size
        # The grid shrinks as the anatomy grows; a sample that the probability spares keeps a scale of 1.
        widest = 1 / min(self.scale[0], 1.0) if self.probability < 1 else 1 / self.scale[0]
        reach = [(n - 1) / 2 * d * widest for n, d in zip(self.size, step, strict=True)]
        reach = _reach(reach, [math.radians(angle) for angle in self.rotation])
        margins = [
            math.ceil((r + t) / d - (n - 1) / 2 - _TOLERANCE / 2)
            for r, t, d, n in zip(reach, self.translation, step, self.size, strict=True)
        ]
        x, y, z = (n + 2 * max(margin, 0) for n, margin in zip(self.size, margins, strict=True))
        return x, y, z

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw ``rotation`` (degrees), ``scale``, ``translation`` (mm), ``flip``; each (B, 3), for each key (B, 5)."""
        purpose = f"{place}/RandomSpatial"
        active = draw_active(keys, purpose, self.probability)[:, None]
        either_way = draws.uniform(keys, f"{purpose}/rotation", 3) * 2 - 1
        rotation = either_way * torch.tensor(self.rotation, dtype=torch.float64)
        either_way = draws.uniform(keys, f"{purpose}/translation", 3) * 2 - 1
        translation = either_way * torch.tensor(self.translation, dtype=torch.float64)
        scale = draw_log_range(keys, f"{purpose}/scale", self.scale, 3 if self.anisotropic else 1).expand(-1, 3)
        return {
            "rotation": torch.where(active, rotation, 0.0).float(),
            "scale": torch.where(active, scale, 1.0),
            "translation": torch.where(active, translation, 0.0).float(),
            "flip": draws.uniform(keys, f"{purpose}/flip", 3) < torch.tensor(self.flip, dtype=torch.float64),
        }

    def apply(self, crop: Crop, params: Params) -> View:
        """The views (B, C, *size) of a batch of crops, whose shape may exceed the view's in any way.

        The centre of the view lies at that of the crop, rounded down to whole voxels along axes where an odd number of
        voxels is left over. Voxels outside the scan are 0 and marked so in ``valid``.

        Raises:
            ConfigError: the crops are smaller than the view.
        """
        got = tuple(crop.image.shape[2:])
        if len(got) != 3 or any(n < wanted for n, wanted in zip(got, self.size, strict=True)):
            raise ConfigError(
                "The crops are too small for the views.",
                got=f"crops of {got} voxels",
                wanted=f"3D crops of at least {self.size} voxels",
                fix="Let the crop rule read crops of the size that read_size(spacing) tells.",
            )
        turned = (params["rotation"] != 0) | (params["scale"] != 1) | (params["translation"] != 0)
        rows = turned.any(dim=1).nonzero().squeeze(1)
        if len(rows) == len(turned):
            return self._resample(crop, params)
        view = self._cut(crop, params)
        if len(rows) == 0:
            return view
        chosen = Crop(*(tensor[rows.to(tensor.device)] for tensor in crop))
        part = self._resample(chosen, {name: drawn[rows] for name, drawn in params.items()})
        return View(*(old.index_copy(0, rows.to(old.device), new) for old, new in zip(view, part, strict=True)))

    def _cut(self, crop: Crop, params: Params) -> View:
        """The middle of each crop, flipped where drawn, without interpolation."""
        start = self._start(crop)
        x, y, z = (slice(first, first + n) for first, n in zip(start.tolist(), self.size, strict=True))
        low, high = (crop.inside[:, end].cpu() - start for end in (0, 1))
        valid = torch.ones(len(crop.image), 1, *self.size, dtype=torch.bool)
        for axis, n in enumerate(self.size):
            index = torch.arange(n)
            along = (index >= low[:, axis, None]) & (index < high[:, axis, None])
            valid &= along.view(-1, 1, *(n if axis == other else 1 for other in range(3)))
        device = crop.image.device
        image, valid = crop.image[:, :, x, y, z], valid.to(device)
        for axis in range(3):
            flipped = params["flip"][:, axis]
            if flipped.any():
                there = flipped.to(device).view(-1, 1, 1, 1, 1)
                image = torch.where(there, image.flip(axis + 2), image)
                valid = torch.where(there, valid.flip(axis + 2), valid)
        sign = torch.where(params["flip"], -1.0, 1.0).to(crop.affine)
        last = torch.tensor(self.size).sub(1).to(sign) * (sign < 0)
        affine = shifted(crop.affine, start.to(sign) + last)
        affine[:, :3, :3] *= sign[:, None, :]
        return View(torch.where(valid, image, 0.0), affine, valid, crop.channels, crop.key)

    def _resample(self, crop: Crop, params: Params) -> View:
        device, lengths = crop.image.device, crop.image.shape[2:]
        # Float64 throughout these few numbers: world coordinates are hundreds of millimetres, and TF32 must not get in.
        spacing = spacing_of(crop.affine.double())
        linear = _linear(params).to(device)
        matrix = linear * spacing[:, None, :] / spacing[:, :, None]
        middle = (torch.tensor(self.size, dtype=torch.float64) - 1) / 2
        centre = (self._start(crop) + middle).to(device) + params["translation"].to(device).double() / spacing
        origin = centre - (matrix * middle.to(device)).sum(dim=2)

        affine = torch.eye(4, dtype=torch.float64, device=device).repeat(len(matrix), 1, 1)
        affine[:, :3, :3], affine[:, :3, 3] = matrix, origin
        affine = (crop.affine.double() @ affine).to(crop.affine.dtype)

        valid = self._valid(matrix, origin, crop.inside.to(device), lengths)
        # grid_sample counts from -1 to 1 between the outermost voxel centres, and names the last axis first. Outside,
        # it repeats the border: what is not valid is zeroed below, and rounding must not darken the rest.
        half = torch.tensor([max(n - 1, 1) / 2 for n in lengths], dtype=torch.float64, device=device)
        points = self._points((matrix / half[:, None]).flip(1), (origin / half - 1).flip(1))
        image = grid_sample(
            crop.image, points.permute(0, 2, 3, 4, 1), mode="bilinear", padding_mode="border", align_corners=True
        )
        return View(torch.where(valid, image, 0.0), affine, valid, crop.channels, crop.key)

    def _valid(self, matrix: Tensor, origin: Tensor, inside: Tensor, lengths: Sequence[int]) -> Tensor:
        """Where the points that are read lie inside the scan, by their coordinates: (B, 1, *size) bool."""
        low = inside[:, 0].clamp(min=0) - _TOLERANCE
        high = torch.minimum(inside[:, 1], torch.tensor(lengths, device=inside.device)) - 1 + _TOLERANCE
        valid = torch.ones(len(matrix), 1, *self.size, dtype=torch.bool, device=matrix.device)
        # A box is inside a box where its corners are, which spares most views the question voxel by voxel. On an
        # accelerator to ask which would cost more, as the host would have to wait for the answer.
        rows = torch.arange(len(matrix), device=matrix.device)
        if matrix.device.type == "cpu":
            ends = [torch.tensor([0.0, n - 1.0], dtype=torch.float64) for n in self.size]
            corners = torch.cartesian_prod(*ends) @ matrix.transpose(1, 2) + origin[:, None]
            within = (corners >= low[:, None]) & (corners <= high[:, None])
            rows = (~within.flatten(1).all(dim=1)).nonzero().squeeze(1)
        if len(rows):
            points = self._points(matrix[rows], origin[rows])
            low, high = low[rows].view(-1, 3, 1, 1, 1), high[rows].view(-1, 3, 1, 1, 1)
            valid[rows] = ((points >= low) & (points <= high)).all(dim=1, keepdim=True)
        return valid

    def _points(self, matrix: Tensor, origin: Tensor) -> Tensor:
        """Where each voxel of the view is read: (B, 3, *size) float32.

        Contiguous, as writing coordinates side by side, the way ``grid_sample`` names them, takes many times longer.
        """
        x, y, z = (torch.arange(n, device=matrix.device) for n in self.size)
        along_x = (origin[:, :, None] + matrix[:, :, 0, None] * x).float()[:, :, :, None, None]
        along_y = (matrix[:, :, 1, None] * y).float()[:, :, None, :, None]
        along_z = (matrix[:, :, 2, None] * z).float()[:, :, None, None, :]
        return (along_x + along_y) + along_z

    def _start(self, crop: Crop) -> Tensor:
        """The crop voxel (3,) where an unturned view begins, on the CPU."""
        return torch.tensor([(n - wanted) // 2 for n, wanted in zip(crop.image.shape[2:], self.size, strict=True)])


def _linear(params: Params) -> Tensor:
    """R S F, from millimetres in the view to millimetres in the crop: (B, 3, 3) float64. R turns about z, y, then x."""
    angles = torch.deg2rad(params["rotation"].double())
    turns = None
    for axis, (a, b) in ((0, (1, 2)), (1, (2, 0)), (2, (0, 1))):
        turn = torch.eye(3, dtype=torch.float64).repeat(len(angles), 1, 1)
        cosine, sine = angles[:, axis].cos(), angles[:, axis].sin()
        turn[:, a, a], turn[:, b, b], turn[:, a, b], turn[:, b, a] = cosine, cosine, -sine, sine
        turns = turn if turns is None else turns @ turn
    assert turns is not None
    return turns * (torch.where(params["flip"], -1.0, 1.0).double() / params["scale"].double())[:, None, :]


def _reach(half: Sequence[float], limits: Sequence[float]) -> list[float]:
    """How far along each axis a box of these half sides can reach when turned about z, y, then x up to these limits."""
    steps = torch.linspace(0, limits[2], 1000, dtype=torch.float64)
    cosine, sine = steps.cos(), steps.sin()
    reach = [0.0, 0.0, 0.0]
    for corner in (1, -1):
        # About z in small steps; the best turns about y and x are then known, as each moves a corner in one plane.
        x, y = (cosine * half[0] - corner * sine * half[1]).abs(), (sine * half[0] + corner * cosine * half[1]).abs()
        z = _turned(torch.full_like(x, half[2]), x, limits[1])
        ends = (_turned(x, torch.full_like(x, half[2]), limits[1]), _turned(y, z, limits[0]), _turned(z, y, limits[0]))
        reach = [max(known, float(end.max())) for known, end in zip(reach, ends, strict=True)]
    # No corner moves further than this between a step and the nearest one looked at.
    between = limits[2] / (len(steps) - 1) / 2 * math.hypot(half[0], half[1])
    return [reach[0] + between, reach[1] + between, reach[2] + between * (limits[0] + limits[1] > 0)]


def _turned(along: Tensor, across: Tensor, limit: float) -> Tensor:
    """How far points reach along one axis after any turn up to ``limit`` radians, towards the other axis or away."""
    angle = torch.atan2(across, along).clamp(max=limit)
    return along * angle.cos() + across * angle.sin()
