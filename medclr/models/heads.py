"""Heads that a method puts behind its encoder; they are trained with it and thrown away after pretraining."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from torch import Tensor, nn

from medclr.errors import ConfigError

HEAD_NORMS: Final = ("batch", "layer", "none")


class Projector(nn.Module):
    """A multi-layer perceptron from features to embeddings; also a predictor, which differs in its sizes alone.

    With the defaults it is the projection head of SimCLR (arXiv:2002.05709, section 4.2). MoCo v3 (arXiv:2104.02057)
    projects with ``hidden=4096, out_features=256, layers=3, last_norm=True`` and predicts with the same, ``layers=2``.

    Args:
        in_features: F, the encoder's ``out_features``.
        hidden: width of the hidden layers; that of the input if None.
        out_features: D.
        layers: number of linear layers, >= 1; a ReLU stands between any two.
        norm: before each ReLU. ``"batch"`` sees the other samples of the batch; ``"layer"`` does not, so that gradient
            caching stays exact; with ``"none"`` SimCLR may collapse.
        last_norm: also behind the last linear layer, without learnt scale and shift.

    Raises:
        ConfigError: for sizes below 1, or an unknown norm.

    Example:
        >>> predictor = Projector(128, hidden=512, out_features=128)
    """

    def __init__(
        self,
        in_features: int,
        hidden: int | None = None,
        out_features: int = 128,
        *,
        layers: int = 2,
        norm: str = "batch",
        last_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_features if hidden is None else hidden
        sizes = {"in_features": in_features, "hidden": hidden, "out_features": out_features, "layers": layers}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ConfigError(
                    f"A projector's {name} is unusable.", got=size, wanted="a whole number >= 1", fix=f"Set {name}."
                )
        if norm not in HEAD_NORMS:
            raise ConfigError(
                "Unknown norm for a projector.", got=repr(norm), wanted=", ".join(HEAD_NORMS), fix="Set norm: batch."
            )
        self.in_features, self.out_features = in_features, out_features
        widths = [in_features, *[hidden] * (layers - 1), out_features]
        steps: list[nn.Module] = []
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            last = index == layers - 1
            normed = norm != "none" and (last_norm or not last)
            # Batch norm takes the mean away, and a bias with it.
            steps.append(nn.Linear(fan_in, fan_out, bias=not (normed and norm == "batch")))
            if normed and norm == "batch":
                steps.append(nn.BatchNorm1d(fan_out, affine=not last))
            elif normed:
                steps.append(nn.LayerNorm(fan_out, elementwise_affine=not last))
            if not last:
                steps.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*steps)
        self._compares = any(isinstance(step, nn.BatchNorm1d) for step in steps)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, F) to embeddings (B, D), not normalised.

        Raises:
            ConfigError: for a batch of one sample in training, where batch norm has nothing to compare.
        """
        if self._compares and self.training and len(features) < 2:
            raise ConfigError(
                "A projector with batch norm cannot train on a single sample.",
                got=f"a batch of {len(features)}",
                wanted="at least 2 samples",
                fix="Raise batch_size, or set the projector's norm: layer.",
            )
        embeddings: Tensor = self.layers(features)
        return embeddings
