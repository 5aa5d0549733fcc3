"""Which two scans meet: pair rules, the pair dataset, and the sampler."""

from medclr.pairs.dataset import PatientPairDataset
from medclr.pairs.rules import PairRule, SamePatient, SameScan
from medclr.pairs.sampler import PatientSampler

__all__ = ["PairRule", "PatientPairDataset", "PatientSampler", "SamePatient", "SameScan"]
