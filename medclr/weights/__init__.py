"""Encoders on disk: saved with a manifest, loaded strictly or not at all."""

from medclr.weights.coverage import Coverage, Mismatch
from medclr.weights.io import encoder_state_dict, find_manifest, load_encoder, read_manifest, save_encoder
from medclr.weights.manifest import Manifest
from medclr.weights.patients import patient_digest, patient_digests

__all__ = [
    "Coverage",
    "Manifest",
    "Mismatch",
    "encoder_state_dict",
    "find_manifest",
    "load_encoder",
    "patient_digest",
    "patient_digests",
    "read_manifest",
    "save_encoder",
]
