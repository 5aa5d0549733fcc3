"""Contrastive methods: each a small module with ``forward``, ``contrast`` and ``after_step``."""

from medclr.methods.simclr import SimCLR

__all__ = ["SimCLR"]
