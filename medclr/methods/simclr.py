"""SimCLR: two views of a sample attract, those of other samples repel."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import normalize

from medclr import keys
from medclr.affinity import Affinity
from medclr.distributed import gather
from medclr.geometry import View
from medclr.losses.info_nce import check_temperature, info_nce
from medclr.methods.branches import by_sample, embed, refuse_unfitting_heads
from medclr.methods.metadata import needed_of_views, refuse_one_sample
from medclr.models import Encoder, Projector


class SimCLR(nn.Module):
    """SimCLR (arXiv:2002.05709) with pairs weighed by an affinity.

    Args:
        encoder: image (B, C, X, Y, Z) to features (B, F).
        projector: features (B, F) to projections (B, D); a two-layer MLP of the encoder's width if None.
        temperature: > 0.
        affinity: what each pair counts as; by default two samples of one patient are ignored.

    Raises:
        ConfigError: for an unusable temperature, or a projector of another width than the encoder's.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: Projector | None = None,
        *,
        temperature: float = 0.1,
        affinity: Affinity | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.encoder = encoder
        self.projector = projector if projector is not None else Projector(encoder.out_features)
        refuse_unfitting_heads(encoder, self.projector)
        self.temperature = temperature
        self.affinity = affinity if affinity is not None else Affinity()

    def forward(self, view_1: View, view_2: View) -> dict[str, Tensor]:
        """Embeddings of a batch, sample by sample: ``features`` (B, 2, F) and ``projections`` (B, 2, D)."""
        features, projections = embed(self.encoder, self.projector, view_1, view_2)
        return {keys.FEATURES: by_sample(features), keys.PROJECTIONS: by_sample(projections)}

    def contrast(self, embeddings: Mapping[str, Tensor], meta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of this rank's samples against those of all ranks.

        Args:
            embeddings: what ``forward`` returned.
            meta: what the affinity needs, (B,) each: ``sample`` and ``patient`` at least.

        Returns:
            ``loss`` (), the mean over this rank's 2B views, and ``plateau`` (), the loss of embeddings that tell
            nothing apart: the logarithm of the number of candidates.

        Raises:
            ConfigError: for missing metadata, or a batch of one sample.
        """
        z = normalize(embeddings[keys.PROJECTIONS].float(), dim=-1)
        own = needed_of_views(self.affinity, meta, views=z.shape[1])
        queries = z.flatten(0, 1)
        candidates = gather(queries)
        key_meta = {name: gather(value) for name, value in own.items()}
        refuse_one_sample(len(candidates))
        pairs = self.affinity.pairs(own, key_meta)
        return {
            keys.LOSS: info_nce(queries, candidates, pairs, self.temperature),
            keys.PLATEAU: z.new_tensor(math.log(max(1, len(candidates) - 1))),
        }

    def after_step(self, progress: float) -> None:
        """Nothing moves outside the optimizer; ``progress`` is steps done / total."""
