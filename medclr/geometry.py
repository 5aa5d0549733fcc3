"""What travels from the data loader to the network: a batch of crops, and the batch of views made of them.

Both are named tuples of tensors, so that torch's own collation, pinning, device moves and DDP scatter handle them.
Shapes below are those of a batch; a single crop, as a dataset returns it, has no leading B.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Crop(NamedTuple):
    """What a crop rule reads from scans, including the margin that rotation needs."""

    image: Tensor
    """(B, C, X, Y, Z) float32; zero outside the scan and in absent channels."""
    affine: Tensor
    """(B, 4, 4) float32; voxel index of this crop to the scan's world space in millimetres."""
    inside: Tensor
    """(B, 2, 3) int64; the first voxel index inside the scan and one past the last, along each axis."""
    channels: Tensor
    """(B, C) bool; which sequences are present."""
    key: Tensor
    """(B, 5) int64; the draw key (see :mod:`medclr.draws`)."""


class View(NamedTuple):
    """What an encoder sees of a crop after augmentation."""

    image: Tensor
    """(B, C, X, Y, Z) float32."""
    affine: Tensor
    """(B, 4, 4) float32; voxel index of this view to the scan's world space in millimetres."""
    valid: Tensor
    """(B, 1, X, Y, Z) bool; False where a voxel lies outside the scan."""
    channels: Tensor
    """(B, C) bool; which sequences are present."""
    key: Tensor
    """(B, 5) int64; the draw key."""


_Batch = TypeVar("_Batch", Crop, View)


def to_device(batch: _Batch, device: torch.device | str, non_blocking: bool = False) -> _Batch:
    """Move the voxels; the small tensors that only steer the drawing (``inside``, ``key``) stay where they are."""
    steering = ("inside", "key")
    moved = {
        name: value if name in steering else value.to(device, non_blocking=non_blocking)
        for name, value in batch._asdict().items()
    }
    return batch._replace(**moved)


def spacing_of(affine: Tensor) -> Tensor:
    """Voxel spacing in millimetres (..., 3): the lengths of the columns of affines (..., 4, 4)."""
    return affine[..., :3, :3].norm(dim=-2)


def shifted(affine: Tensor, offset: Tensor) -> Tensor:
    """The affines (..., 4, 4) of a grid whose voxel 0 is the voxel ``offset`` (..., 3) of the given grid."""
    moved = affine.clone()
    moved[..., :3, 3] += (affine[..., :3, :3] @ offset.to(affine).unsqueeze(-1)).squeeze(-1)
    return moved
