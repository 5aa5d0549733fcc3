"""Pretrained encoders at work: what downstream bundles need beside MONAI."""

from medclr.transfer.checkpoint import SaveNetwork, Settings, load_network
from medclr.transfer.finetune import FreezeEncoder, checked_roi, initialise, start_from_prior
from medclr.transfer.inferers import AutocastInferer, needs_scaler
from medclr.transfer.sampler import ScanSampler
from medclr.transfer.scans import SegmentationDataset
from medclr.transfer.seen import check_unseen, seen_patients

__all__ = [
    "AutocastInferer",
    "FreezeEncoder",
    "SaveNetwork",
    "ScanSampler",
    "SegmentationDataset",
    "Settings",
    "check_unseen",
    "checked_roi",
    "initialise",
    "load_network",
    "needs_scaler",
    "seen_patients",
    "start_from_prior",
]
