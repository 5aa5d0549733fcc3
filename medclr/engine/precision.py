"""Which number format a step computes in."""

from __future__ import annotations

from typing import Literal

import torch

from medclr.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str | torch.device, precision: Precision) -> torch.autocast:
    """The autocast context of a precision on any device; one that does nothing for ``fp32``.

    Raises:
        ConfigError: for an unknown precision.
    """
    if precision not in DTYPES:
        raise ConfigError(
            "The precision is unknown.", got=precision, wanted=", ".join(DTYPES), fix="For example precision: bf16."
        )
    return torch.autocast(torch.device(device).type, DTYPES[precision], enabled=precision != "fp32")


def default_precision(device: str | torch.device) -> Precision:
    """``bf16`` where the hardware multiplies it (CUDA from Ampere on, CPUs with AVX-512 BF16), else ``fp32``."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
