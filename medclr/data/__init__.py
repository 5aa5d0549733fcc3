"""From files to crops."""

from medclr.data.crops import CropAround, ForegroundCrop, OverlappingCrops, RandomCrop
from medclr.data.datalist import Datalist, read_datalist, write_datalist
from medclr.data.preprocess import Preprocessing, Volume
from medclr.data.scans import Quarantine, ScanReader

__all__ = [
    "CropAround",
    "Datalist",
    "ForegroundCrop",
    "OverlappingCrops",
    "Preprocessing",
    "Quarantine",
    "RandomCrop",
    "ScanReader",
    "Volume",
    "read_datalist",
    "write_datalist",
]
