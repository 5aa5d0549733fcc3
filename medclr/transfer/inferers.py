"""An inferer in another number format, for MONAI's engines, whose own mixed precision knows CUDA alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

from medclr.errors import ConfigError


class AutocastInferer(Inferer):
    """Run another inferer inside an autocast context; the network sees plain tensors, the prediction is float32.

    So loss and metrics are computed in float32 outside of the context (but for fp16, where MONAI has a context of its
    own), on any device, in training and validation.

    Args:
        inferer: what runs the network.
        autocast: a context that can be entered again and again, such as ``torch.autocast("cpu", torch.bfloat16)``.

    Example:
        >>> inferer = AutocastInferer(SimpleInferer(), torch.autocast("cpu", torch.bfloat16))  # doctest: +SKIP
    """

    def __init__(self, inferer: Inferer, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.inferer, self.autocast = inferer, autocast

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Images (B, C, X, Y, Z) to predictions (B, K, X, Y, Z) float32."""
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        with self.autocast:
            prediction: Tensor = self.inferer(plain, network, *args, **kwargs)
        return prediction.float()


def needs_scaler(device: str | torch.device, precision: str) -> bool:
    """Whether MONAI's trainer must scale the loss (its ``amp``): for ``fp16``, whose small gradients vanish.

    Raises:
        ConfigError: for ``fp16`` on another device than CUDA, where MONAI's trainer has no scaler.
    """
    if precision == "fp16" and torch.device(device).type != "cuda":
        raise ConfigError(
            "fp16 needs a CUDA device here.",
            got=f"precision fp16 on {torch.device(device).type}",
            wanted="bf16 or fp32",
            fix="Set precision: bf16.",
        )
    return precision == "fp16"
