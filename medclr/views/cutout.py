"""Cut-out: hide boxes of a view, so that no single place can carry the whole comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medclr import draws
from medclr.errors import ConfigError
from medclr.geometry import View, spacing_of
from medclr.views.intensity import noise_fields
from medclr.views.present import change_active, mean, standard_deviation
from medclr.views.ranges import (
    Params,
    Strength,
    draw_active,
    draw_field_seeds,
    draw_range,
    read_count,
    read_probability,
    read_range,
)

_UNITS = ("fraction", "mm")
_FILLS = ("mean", "noise")


class CutOut:
    """Replace boxes at random places in a view, in all of its channels (DeVries and Taylor 2017, arXiv 1708.04552).

    A box's centre is uniform over the view, so that boxes at the rim are cut off by it. Voxels of a box still count as
    valid: they lie inside the scan.

    Args:
        holes: how many boxes a view.
        size: side of a box along each axis, drawn for each box and axis. 0 changes nothing.
        unit: what ``size`` counts: ``"fraction"`` of the view's side, or ``"mm"``.
        fill: a number in units of the image; ``"mean"``, each channel's mean over the scan; or ``"noise"``, Gaussian
            noise of each channel's mean and standard deviation.
        probability: share of samples that change.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        holes: int = 1,
        size: Strength = (0.1, 0.4),
        unit: Literal["fraction", "mm"] = "fraction",
        fill: float | Literal["mean", "noise"] = 0.0,
        probability: float = 1.0,
    ) -> None:
        self.holes = read_count(self, "holes", holes)
        if unit not in _UNITS:
            raise ConfigError(
                "CutOut does not know this unit of size.",
                got=unit,
                wanted=" or ".join(map(repr, _UNITS)),
                fix="Set unit: fraction for shares of the view's side, or unit: mm.",
            )
        self.unit = unit
        self.size = (
            read_range(self, "size", size, minimum=0.0, maximum=1.0)
            if unit == "fraction"
            else read_range(self, "size", size, minimum=0.0)
        )
        self.fill: float | str = fill if isinstance(fill, str) else _constant(self, fill)
        if isinstance(self.fill, str) and self.fill not in _FILLS:
            raise ConfigError(
                "CutOut does not know this fill.",
                got=fill,
                wanted="a number, 'mean' or 'noise'",
                fix="Set fill: mean to hide a box behind the average value of its scan.",
            )
        self.probability = read_probability(self, probability)

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw ``centre`` (shares of the view) and ``size``, each (B, holes, 3), for each key (B, 5)."""
        purpose = f"{place}/CutOut"
        shape = (-1, self.holes, 3)
        size = draw_range(keys, f"{purpose}/size", self.size, self.holes * 3).view(shape)
        centre = draws.uniform(keys, f"{purpose}/centre", self.holes * 3).float().view(shape)
        active = draw_active(keys, purpose, self.probability) & (size > 0).all(dim=2).any(dim=1)
        return {"active": active, "centre": centre, "size": size, "field": draw_field_seeds(keys, purpose)}

    def apply(self, view: View, params: Params) -> View:
        """The views with boxes cut out."""
        return change_active(view, params, self._cut)

    def _cut(self, view: View, params: Params) -> Tensor:
        lengths = torch.tensor(view.image.shape[2:], device=view.image.device)
        half = params["size"] * (lengths if self.unit == "fraction" else 1 / spacing_of(view.affine)[:, None]) / 2
        centre = params["centre"] * lengths
        x, y, z = (
            ((torch.arange(n, device=half.device) + 0.5 - centre[:, :, axis, None]).abs() < half[:, :, axis, None])
            for axis, n in enumerate(view.image.shape[2:])
        )
        # Boxes that hold a voxel, counted by one matrix product over the boxes.
        planes = (x[..., None] & y[..., None, :]).flatten(2).to(half.dtype)
        hidden = torch.bmm(planes.transpose(1, 2), z.to(half.dtype)).view_as(view.valid) > 0
        return torch.where(hidden, self._filling(view, params), view.image)

    def _filling(self, view: View, params: Params) -> Tensor | float:
        if not isinstance(self.fill, str):
            return self.fill
        if self.fill == "mean":
            return mean(view)
        return mean(view) + standard_deviation(view) * noise_fields(view, params["field"])


def _constant(owner: CutOut, fill: float | Sequence[float]) -> float:
    low, high = read_range(owner, "fill", fill)
    if low != high:
        raise ConfigError(
            "CutOut fills with one value.",
            got=fill,
            wanted="a number, 'mean' or 'noise'",
            fix="Set fill: 0.0, or fill: mean.",
        )
    return low
