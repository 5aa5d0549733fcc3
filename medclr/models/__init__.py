"""Networks: encoders taken from MONAI, and what pretraining puts behind and beside them."""

from medclr.models.architectures import ARCHITECTURES, encoder_prefixes
from medclr.models.encoder import Encoder, build_encoder, find_encoder
from medclr.models.heads import Projector
from medclr.models.momentum import MomentumCopy
from medclr.models.norms import norm_argument, synchronised, with_norm
from medclr.models.queue import NegativeQueue

__all__ = [
    "ARCHITECTURES",
    "Encoder",
    "MomentumCopy",
    "NegativeQueue",
    "Projector",
    "build_encoder",
    "encoder_prefixes",
    "find_encoder",
    "norm_argument",
    "synchronised",
    "with_norm",
]
