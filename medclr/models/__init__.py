"""Networks: encoders taken from MONAI, and the heads that pretraining puts behind them."""

from medclr.models.architectures import ARCHITECTURES, encoder_prefixes
from medclr.models.encoder import Encoder, build_encoder, find_encoder
from medclr.models.heads import Projector
from medclr.models.norms import norm_argument, with_norm

__all__ = [
    "ARCHITECTURES",
    "Encoder",
    "Projector",
    "build_encoder",
    "encoder_prefixes",
    "find_encoder",
    "norm_argument",
    "with_norm",
]
