"""Contrastive losses: pure functions of embeddings, each named after its paper."""

from medclr.losses.info_nce import NTXentLoss, info_nce

__all__ = ["NTXentLoss", "info_nce"]
