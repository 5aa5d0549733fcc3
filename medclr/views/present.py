"""Changing what is there: the samples that are drawn, their present channels, and the voxels inside the scan.

Everything else in a view is 0 before a transform and stays exactly 0 after it, so that padding and absent channels look
alike in every view, and take no part in any statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from medclr.geometry import View
from medclr.views.ranges import Params


def change_active(view: View, params: Params, change: Callable[[View, Params], Tensor]) -> View:
    """The view with new voxels in the samples that ``params["active"]`` (B,) names; the others keep theirs bit for bit.

    Args:
        view: the batch of views; it is not written to.
        params: what was drawn, on the CPU, so that nobody waits for a device.
        change: from the active samples alone, and their draws with the numbers on the view's device, to new voxels
            (A, C, X, Y, Z). It may return anything where nothing is present: those voxels are set to 0 here.
    """
    rows = params["active"].nonzero().squeeze(1)
    if len(rows) == 0:
        return view
    device, everyone = view.image.device, len(rows) == len(view.image)
    part = view if everyone else View(*(tensor[rows.to(tensor.device)] for tensor in view))
    drawn = {name: value if everyone else value[rows] for name, value in params.items()}
    # Numbers meet the voxels; what only steers, such as the seeds of noise, is read on the host.
    drawn = {name: value.to(device) if value.is_floating_point() else value for name, value in drawn.items()}
    image = torch.where(present(part), change(part, drawn), 0.0)
    return view._replace(image=image if everyone else view.image.index_copy(0, rows.to(device), image))


def present(view: View) -> Tensor:
    """Which voxels hold data: inside the scan, and of a channel that is there. (B, C, X, Y, Z) bool."""
    return view.valid & each(view.channels)


def each(value: Tensor) -> Tensor:
    """A number a sample (B,) or a channel (B, C), shaped to multiply images (B, C, X, Y, Z)."""
    return value.reshape(len(value), -1, 1, 1, 1)


def value_range(view: View) -> tuple[Tensor, Tensor]:
    """The smallest value of each channel, and the way from there to its largest one; each (B, C, 1, 1, 1).

    The way is 1 where a channel is constant or nothing is present, so that one can divide by it.
    """
    low = torch.where(view.valid, view.image, math.inf).flatten(2).amin(dim=2)
    way = torch.where(view.valid, view.image, -math.inf).flatten(2).amax(dim=2) - low
    low = torch.where(low.isfinite(), low, 0.0)
    return each(low), each(torch.where(way > 0, way, 1.0))


def mean(view: View) -> Tensor:
    """Mean of each channel over the voxels inside the scan; (B, C, 1, 1, 1), and 0 where there are none."""
    # What lies outside the scan is 0 and adds nothing.
    return each(view.image.flatten(2).sum(dim=2) / voxels(view))


def standard_deviation(view: View) -> Tensor:
    """Standard deviation of each channel over the voxels inside the scan; (B, C, 1, 1, 1)."""
    away = torch.where(view.valid, view.image - mean(view), 0.0)
    return each((away.square().flatten(2).sum(dim=2) / voxels(view)).sqrt())


def voxels(view: View) -> Tensor:
    """How many voxels of each view lie inside the scan, at least 1; (B, 1) float32."""
    # Summing the booleans as bytes is three times as fast as summing them as such.
    inside = view.valid.flatten(1).view(torch.uint8).sum(dim=1, dtype=torch.int32)
    return inside.clamp(min=1).float()[:, None]
