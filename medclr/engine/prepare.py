"""From a batch of crops to what a method is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor

from medclr import keys
from medclr.geometry import Crop, View, to_device
from medclr.views import TwoViews


class PrepareViews(PrepareBatch):
    """Move the crops to the device, augment the whole batch there, and hand both views to the method.

    Args:
        views: the recipe that is drawn twice.
    """

    def __init__(self, views: TwoViews) -> None:
        self.views = views

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[View, dict[str, Tensor], tuple[View], dict[str, Any]]:
        """Batch of a pair dataset to (view_1, meta, (view_2,), {})."""
        device = torch.device("cpu") if device is None else torch.device(device)
        crop_1: Crop = to_device(batchdata[keys.CROP_1], device, non_blocking)
        crop_2: Crop = to_device(batchdata[keys.CROP_2], device, non_blocking)
        meta = {name: value.to(device, non_blocking=non_blocking) for name, value in batchdata[keys.META].items()}
        view_1, view_2 = self.views(crop_1, crop_2)
        return view_1, meta, (view_2,), {}
