"""medclr pretrains 3D encoders on unlabelled scans by contrast, as a plugin for MONAI.

Research use only, not a medical device.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medclr.data import read_datalist
    from medclr.losses import NTXentLoss, info_nce
    from medclr.models import Encoder
    from medclr.pairs import PatientPairDataset
    from medclr.views import TwoViews
    from medclr.weights import Coverage, Manifest, load_encoder, save_encoder

__version__ = version("medclr")

# Names are looked up when they are first used: `medclr --help` must not wait for torch and MONAI.
_ROOMS = {
    "read_datalist": "data",
    "NTXentLoss": "losses",
    "info_nce": "losses",
    "Encoder": "models",
    "PatientPairDataset": "pairs",
    "TwoViews": "views",
    "Coverage": "weights",
    "Manifest": "weights",
    "load_encoder": "weights",
    "save_encoder": "weights",
}
_ROOM_NAMES = {
    "affinity",
    "data",
    "distributed",
    "engine",
    "errors",
    "evaluate",
    "launch",
    "losses",
    "methods",
    "models",
    "pairs",
    "transfer",
    "views",
    "weights",
}
__all__ = [
    "Coverage",
    "Encoder",
    "Manifest",
    "NTXentLoss",
    "PatientPairDataset",
    "TwoViews",
    "info_nce",
    "load_encoder",
    "read_datalist",
    "save_encoder",
]


def __getattr__(name: str) -> Any:
    if name in _ROOM_NAMES:  # so that one `$import medclr` serves a bundle
        return import_module(f"medclr.{name}")
    if name in _ROOMS:
        return getattr(import_module(f"medclr.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'medclr' has no attribute {name!r}")
