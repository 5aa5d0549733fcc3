"""One recipe of augmentation, written once and drawn twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from medclr.errors import ConfigError
from medclr.geometry import Crop, View
from medclr.views.ranges import Params


@runtime_checkable
class Spatial(Protocol):
    """Turns crops into views. A recipe starts with exactly one."""

    def read_size(self, spacing: Sequence[float] = ...) -> tuple[int, int, int]:
        """Voxels that a crop must have for every view that can be drawn to lie inside it."""

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw for each key (B, 5); ``place`` keeps apart the transforms of a recipe."""

    def apply(self, crop: Crop, params: Params) -> View:
        """The views of the crops."""


@runtime_checkable
class Intensity(Protocol):
    """Changes the values of views. A recipe may hold any number."""

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw for each key (B, 5); ``place`` keeps apart the transforms of a recipe."""

    def apply(self, view: View, params: Params) -> View:
        """The changed views; those that come in are left as they are."""


class TwoViews:
    """Make two views of each pair of crops, batched, on the device where the crops are.

    Every sample has its own draws, a pure function of its crop's ``key``: a batch gives what its items give one by one,
    in any order. Computes without gradient, and in float32 also where autocast is on.

    Args:
        *args: the transforms, in the order in which they act: first the spatial one, then those of intensity.
        transforms: the same as one list, for bundles, where a configuration has keywords only.

    Raises:
        ConfigError: there is not exactly one spatial transform, in front; or something is no transform.

    Example:
        >>> two_views = TwoViews(RandomSpatial((32, 48, 32)), GaussianNoise(std=(0, 0.1)), Gamma(probability=0.5))
        >>> view_1, view_2 = two_views(crop_1, crop_2)
    """

    def __init__(self, *args: Spatial | Intensity, transforms: Sequence[Spatial | Intensity] = ()) -> None:
        self.transforms = (*args, *transforms)
        for transform in self.transforms:
            if isinstance(transform, type) or not isinstance(transform, Intensity):
                raise ConfigError(
                    "TwoViews was given something that is no transform.",
                    got=repr(transform),
                    wanted="objects with make_params and apply, such as medclr.views.GaussianNoise()",
                    fix="List objects, not classes or names; in a bundle, each is a `_target_: medclr.views...`.",
                )
        if [isinstance(one, Spatial) for one in self.transforms] != [True] + [False] * (len(self.transforms) - 1):
            raise ConfigError(
                "A recipe of views starts with its only spatial transform, which turns crops into views.",
                got=[type(one).__name__ for one in self.transforms],
                wanted="one spatial transform, then any number of intensity transforms",
                fix="Put medclr.views.RandomSpatial(size) first, and only there.",
            )

    def __call__(self, crop_1: Crop, crop_2: Crop) -> tuple[View, View]:
        """Two batches of views, the first of ``crop_1``, the second of ``crop_2``.

        Raises:
            ConfigError: the two crops of a pair have one and the same key, which would draw the same view twice; or
                the crops are smaller than the views.
        """
        same = (crop_1.key.cpu() == crop_2.key.cpu()).all(dim=-1)
        if same.any():
            raise ConfigError(
                "Two crops of a pair carry the same draw key, so that their views would be augmented alike.",
                got=crop_1.key[int(same.nonzero()[0])].tolist(),
                wanted="keys that differ in their last number, the view: 1 and 2",
                fix="Let the dataset draw the two crops with medclr.draws.draw_key(..., view=1) and view=2.",
            )
        return self.view(crop_1), self.view(crop_2)

    def view(self, crop: Crop) -> View:
        """One batch of views, drawn by the keys of the crops."""
        with torch.no_grad(), torch.autocast(crop.image.device.type, enabled=False):
            current: Any = crop._replace(image=crop.image.float())
            for number, transform in enumerate(self.transforms):
                current = transform.apply(current, transform.make_params(crop.key, f"views/{number}"))
        view: View = current
        return view

    def read_size(self, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> tuple[int, int, int]:
        """Voxels that a crop of this spacing (mm) must have for every view that can be drawn to lie inside it."""
        spatial = self.transforms[0]
        assert isinstance(spatial, Spatial)
        return spatial.read_size(spacing)

    def describe(self) -> list[dict[str, Any]]:
        """The recipe as plain data, for a manifest: each transform's name and settings, in order."""
        return [{"name": type(one).__name__, **vars(one)} for one in self.transforms]
