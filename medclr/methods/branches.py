"""What the methods with a momentum copy have in common: an online branch, a target branch, and heads that fit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medclr import keys
from medclr.errors import ConfigError
from medclr.geometry import View
from medclr.models import Encoder, Projector


def embed(encoder: nn.Module, projector: nn.Module, *views: View) -> tuple[Tensor, Tensor]:
    """Features (V * B, F) and projections (V * B, D) of V views, one view after the other."""
    features = encoder(torch.cat([view.image for view in views]))
    return features, projector(features)


def online_and_target(
    online: tuple[nn.Module, nn.Module, nn.Module], target: tuple[nn.Module, nn.Module], view_1: View, view_2: View
) -> dict[str, Tensor]:
    """Embeddings of a batch, sample by sample: of the network that is trained, and of its momentum copy.

    Args:
        online: encoder, projector and predictor.
        target: the copies of the first two.
        view_1: of each sample.
        view_2: the other view.

    Returns:
        ``features`` (B, 2, F), ``projections`` and ``predictions`` (B, 2, D), and ``targets`` (B, 2, D), which have no
        gradient.
    """
    encoder, projector, predictor = online
    features, projections = embed(encoder, projector, view_1, view_2)
    _, targets = embed(*target, view_1, view_2)
    return {
        keys.FEATURES: by_sample(features),
        keys.PROJECTIONS: by_sample(projections),
        "predictions": by_sample(predictor(projections)),
        "targets": by_sample(targets),
    }


def by_sample(embeddings: Tensor, views: int = 2) -> Tensor:
    """From one view after the other, (V * B, D), to one sample after the other, (B, V, D)."""
    return torch.stack(embeddings.chunk(views), dim=1)


def other_view(embeddings: Tensor) -> Tensor:
    """From (B, 2, D) to (2B, D), where the row of a view is that of its sample's other view."""
    return embeddings.flip(1).flatten(0, 1)


def refuse_unfitting_heads(encoder: Encoder, projector: Projector, predictor: Projector | None = None) -> None:
    """Raise :class:`ConfigError` unless each reads what the one before gives, and a predictor predicts projections."""
    if projector.in_features != encoder.out_features:
        raise ConfigError(
            "The projector does not fit the encoder.",
            got=f"a projector of {projector.in_features} features",
            wanted=f"{encoder.out_features}, the encoder's",
            fix="Leave the projector's in_features to the encoder: $@encoder.out_features.",
        )
    if predictor is not None and not predictor.in_features == predictor.out_features == projector.out_features:
        raise ConfigError(
            "The predictor does not fit the projector.",
            got=f"a predictor from {predictor.in_features} to {predictor.out_features} features",
            wanted=f"{projector.out_features} both, the projector's out_features",
            fix=f"Set the predictor's in_features and out_features to {projector.out_features}.",
        )
