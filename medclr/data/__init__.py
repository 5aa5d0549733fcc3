"""From files to crops."""

from medclr.data.crops import CropAround, ForegroundCrop, OverlappingCrops, RandomCrop
from medclr.data.preprocess import Preprocessing, Volume
from medclr.data.scans import Quarantine, ScanReader

__all__ = [
    "CropAround",
    "ForegroundCrop",
    "OverlappingCrops",
    "Preprocessing",
    "Quarantine",
    "RandomCrop",
    "ScanReader",
    "Volume",
]
