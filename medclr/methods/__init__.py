"""Contrastive methods: small modules with ``forward``, ``contrast``, ``after_step`` and perhaps ``before_step``."""

from medclr.methods.byol import BYOL
from medclr.methods.moco import MoCo
from medclr.methods.simclr import SimCLR

__all__ = ["BYOL", "MoCo", "SimCLR"]
