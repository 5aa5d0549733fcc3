"""Gaussian blur with a width in millimetres: a thicker slice, a softer kernel, a little motion."""

from __future__ import annotations

import torch
from torch import Tensor

from medclr.geometry import View, spacing_of
from medclr.views.present import change_active
from medclr.views.ranges import Params, Strength, draw_active, draw_range, read_probability, read_range

_TRUNCATE = 4.0


class GaussianBlur:
    """Blur with a Gaussian that is as wide in millimetres along every axis, whatever the voxel spacing.

    Models the point spread of scanners and reconstruction kernels. The weights reach four standard deviations and are
    renormalised where they leave the view or the scan, so that neither the edge of a view nor the zeros outside the
    scan bleed in (Knutsson and Westin 1993, doi 10.1109/CVPR.1993.341081). Three banded matrix products do the work.

    Args:
        sigma: standard deviation in millimetres. 0 changes nothing.
        probability: share of samples that change.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, *, sigma: Strength = (0.5, 1.5), probability: float = 1.0) -> None:
        self.sigma = read_range(self, "sigma", sigma, minimum=0.0)
        self.probability = read_probability(self, probability)

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw ``sigma`` in millimetres, (B, 1), for each key (B, 5)."""
        purpose = f"{place}/GaussianBlur"
        sigma = draw_range(keys, f"{purpose}/sigma", self.sigma)
        return {"active": draw_active(keys, purpose, self.probability) & (sigma[:, 0] != 0), "sigma": sigma}

    def apply(self, view: View, params: Params) -> View:
        """The blurred views."""
        return change_active(view, params, _blur)


def _blur(view: View, params: Params) -> Tensor:
    widths = params["sigma"] / spacing_of(view.affine)
    bands = [_band(widths[:, axis], n) for axis, n in enumerate(view.image.shape[2:])]
    blurred = _filter(view.image, bands)
    # Most views lie inside their scan as a whole and need no second blur; but only on the CPU is it free to ask which.
    rows = torch.arange(len(blurred), device=blurred.device)
    if blurred.device.type == "cpu":
        rows = (~view.valid.flatten(1).all(dim=1)).nonzero().squeeze(1)
    if len(rows):
        weights = _filter(view.valid[rows].to(blurred.dtype), [band[rows] for band in bands])
        blurred[rows] /= weights.clamp_(min=torch.finfo(weights.dtype).tiny)
    return blurred


def _band(width: Tensor, n: int) -> Tensor:
    """Matrices (B, n, n) that blur a line of ``n`` voxels by the widths (B,), in voxels; every row sums to 1."""
    place = torch.arange(n, device=width.device)
    apart = (place[:, None] - place[None, :]).abs()
    width = width[:, None, None]
    weights = torch.exp(-0.5 * (apart / width) ** 2)
    weights = torch.where(apart <= (_TRUNCATE * width + 0.5).floor(), weights, 0.0)
    return weights / weights.sum(dim=2, keepdim=True)


def _filter(image: Tensor, bands: list[Tensor]) -> Tensor:
    """Apply one matrix (B, n, n) along each axis of an image (B, C, X, Y, Z)."""
    channels = image.shape[1]
    lines = image.flatten(0, 1)
    for band in bands:
        # Filters the first axis and moves it to the end, so that each product is plain and nothing is copied.
        _, n, *others = lines.shape
        band = band.repeat_interleave(channels, dim=0)
        lines = torch.bmm(lines.flatten(2).transpose(1, 2), band.transpose(1, 2)).view(-1, *others, n)
    return lines.view_as(image)
