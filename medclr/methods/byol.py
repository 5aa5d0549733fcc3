"""BYOL: the online network predicts what its momentum copy makes of the other view; there are no negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor, nn

from medclr import keys
from medclr.geometry import View
from medclr.losses.regression import regression_loss
from medclr.methods.branches import online_and_target, other_view, refuse_unfitting_heads
from medclr.models import Encoder, MomentumCopy, Projector

UNRELATED: Final = 2.0
"""2 - 2 cos of two directions that have nothing to do with each other."""


class BYOL(nn.Module):
    """BYOL (arXiv:2006.07733): a regression of one view's target on the other view, symmetrised, without negatives.

    A predictor and a slow target keep it from collapsing, where the heads have batch norm or, with less margin
    (arXiv:2010.10241), another norm.

    Args:
        encoder: image (B, C, X, Y, Z) to features (B, F).
        projector: features (B, F) to projections (B, D); a two-layer MLP of the encoder's width if None. The paper's
            has ``hidden=4096, out_features=256``.
        predictor: (B, D) to (B, D); a two-layer MLP as wide as the projector's if None.
        momentum: of the target at the beginning; it grows to 1 on a cosine.

    Raises:
        ConfigError: for heads that do not fit, or a momentum outside 0 to 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: Projector | None = None,
        predictor: Projector | None = None,
        *,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector if projector is not None else Projector(encoder.out_features)
        if predictor is None:
            width = self.projector.out_features
            predictor = Projector(width, encoder.out_features, width)
        self.predictor = predictor
        refuse_unfitting_heads(encoder, self.projector, self.predictor)
        self.target_encoder = MomentumCopy(self.encoder, momentum)
        self.target_projector = MomentumCopy(self.projector, momentum)

    def forward(self, view_1: View, view_2: View) -> dict[str, Tensor]:
        """Embeddings of a batch, sample by sample.

        Returns:
            ``features`` (B, 2, F), ``projections`` and ``predictions`` (B, 2, D) of the online network, and
            ``targets`` (B, 2, D) of the momentum copy, without a gradient.
        """
        online = (self.encoder, self.projector, self.predictor)
        return online_and_target(online, (self.target_encoder, self.target_projector), view_1, view_2)

    def contrast(self, embeddings: Mapping[str, Tensor], meta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of this rank's samples. Each is by itself: nothing is gathered, and ``meta`` is not read.

        Args:
            embeddings: what ``forward`` returned.
            meta: the batch's metadata.

        Returns:
            ``loss`` (), 0 to 4, the mean of 2 - 2 cos over both directions (the paper's is their sum), and
            ``plateau`` (), 2: the loss of predictions that know nothing of their targets. A loss below it is no proof
            of learning: embeddings that have collapsed to a point predict each other perfectly, with a loss of 0.
            Watch ``dimension_std`` and ``effective_rank``.
        """
        predictions = embeddings["predictions"].flatten(0, 1)
        loss = regression_loss(predictions, other_view(embeddings["targets"]))
        return {keys.LOSS: loss, keys.PLATEAU: loss.new_tensor(UNRELATED)}

    def before_step(self, progress: float) -> None:
        """At the beginning of a run the target is the online network."""
        self.target_encoder.before_step(progress)
        self.target_projector.before_step(progress)

    def after_step(self, progress: float) -> None:
        """Move the target; ``progress`` is steps done / total."""
        self.target_encoder.after_step(progress)
        self.target_projector.after_step(progress)
