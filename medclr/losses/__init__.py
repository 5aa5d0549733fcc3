"""Contrastive losses: pure functions of embeddings, each named after its paper."""

from medclr.losses.info_nce import info_nce
from medclr.losses.nt_xent import NTXentLoss
from medclr.losses.regression import regression_loss

__all__ = ["NTXentLoss", "info_nce", "regression_loss"]
