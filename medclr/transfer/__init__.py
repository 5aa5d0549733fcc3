"""Pretrained encoders at work: what downstream bundles need beside MONAI."""

from medclr.transfer.checkpoint import SaveNetwork, Settings, load_network
from medclr.transfer.finetune import FreezeEncoder, checked_roi, initialise, start_from_prior
from medclr.transfer.inferers import AutocastInferer, needs_scaler
from medclr.transfer.sampler import ScanSampler
from medclr.transfer.scans import SegmentationDataset

__all__ = [
    "AutocastInferer",
    "FreezeEncoder",
    "SaveNetwork",
    "ScanSampler",
    "SegmentationDataset",
    "Settings",
    "checked_roi",
    "initialise",
    "load_network",
    "needs_scaler",
    "start_from_prior",
]
