"""Which two scans meet: pair rules, the pair dataset, and the sampler."""

from medclr.pairs.dataset import PatientPairDataset
from medclr.pairs.rules import AcrossModality, PairRule, SamePatient, SameScan, SameStudy, WithinDays
from medclr.pairs.sampler import PatientSampler

__all__ = [
    "AcrossModality",
    "PairRule",
    "PatientPairDataset",
    "PatientSampler",
    "SamePatient",
    "SameScan",
    "SameStudy",
    "WithinDays",
]
