"""MoCo: keys come from a momentum copy, negatives from a queue (v2) or from the batch (v3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medclr import keys
from medclr.affinity import VIEW, Affinity
from medclr.distributed import gather
from medclr.errors import ConfigError
from medclr.geometry import View
from medclr.losses.info_nce import check_temperature, info_nce
from medclr.methods.branches import embed, online_and_target, refuse_unfitting_heads
from medclr.methods.metadata import needed_of_views, refuse_one_sample
from medclr.models import Encoder, MomentumCopy, NegativeQueue, Projector


class MoCo(nn.Module):
    """MoCo v2 (arXiv:1911.05722, arXiv:2003.04297), and MoCo v3 (arXiv:2104.02057) with ``queue_size=0``.

    **v2**: view 1 is the query, view 2 through the momentum copy its key, and the negatives are a queue of the keys of
    earlier batches, never those of the same batch. So the number of negatives does not depend on the batch, and a step
    encodes each view once.

    **v3**: both views are queries, through a predictor, and keys, through the momentum copy; the negatives are the keys
    of the other samples, of all ranks. The loss is the mean of both directions, without the paper's factor of twice
    the temperature, so that its plateau is that of a cross-entropy.

    Pairs are weighed by an affinity; by default, other scans of a query's patient are ignored, in the queue as well.
    Batch norm tells a query from its key by the statistics of its batch (section 3.3 of the first paper shuffles
    against it, medclr does not): v2 wants a norm that keeps samples apart, in the encoder and in the projector.

    Args:
        encoder: image (B, C, X, Y, Z) to features (B, F).
        projector: features (B, F) to projections (B, D); if None, a two-layer MLP of the encoder's width, with layer
            norm for v2 (the paper's has none) and batch norm for v3.
        predictor: v3 alone: (B, D) to (B, D); a two-layer MLP of the encoder's width if None.
        queue_size: keys in the queue, several batches of all ranks; 0 is v3.
        temperature: > 0.
        momentum: of the key encoder; if None, 0.999 and constant for v2, 0.99 and growing to 1 on a cosine for v3.
        affinity: what each pair counts as.

    Raises:
        ConfigError: for an unusable temperature, momentum or queue, heads that do not fit, or a predictor in v2.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: Projector | None = None,
        predictor: Projector | None = None,
        *,
        queue_size: int = 4096,
        temperature: float = 0.2,
        momentum: float | None = None,
        affinity: Affinity | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        queued = queue_size != 0
        if queued and predictor is not None:
            raise ConfigError(
                "MoCo v2 has no predictor.",
                got=f"a predictor, and a queue of {queue_size}",
                wanted="either of them",
                fix="Drop the predictor, or set queue_size: 0 for MoCo v3.",
            )
        if projector is None:
            projector = Projector(encoder.out_features, norm="layer" if queued else "batch")
        if predictor is None and not queued:
            predictor = Projector(projector.out_features, encoder.out_features, projector.out_features)
        refuse_unfitting_heads(encoder, projector, predictor)
        self.encoder, self.projector, self.predictor = encoder, projector, predictor
        self.temperature = temperature
        self.affinity = affinity if affinity is not None else Affinity()
        if momentum is None:
            momentum = 0.999 if queued else 0.99
        self.key_encoder = MomentumCopy(encoder, momentum, cosine=not queued)
        self.key_projector = MomentumCopy(projector, momentum, cosine=not queued)
        self.queue: NegativeQueue | None = None
        if queued:
            self.queue = NegativeQueue(queue_size, projector.out_features, self.affinity.needs)
            # All ranks hold the same queue; DDP would send the whole of it before each forward pass.
            self._ddp_params_and_buffers_to_ignore = self.queue.buffer_names("queue")

    def forward(self, view_1: View, view_2: View) -> dict[str, Tensor]:
        """Embeddings of a batch, sample by sample.

        Returns:
            v2: ``features`` (B, 2, F) and ``projections`` (B, 2, D) of the query of view 1 and the key of view 2.
            v3: ``features``, ``projections`` and ``predictions`` (B, 2, D) of both views, and their keys as
            ``targets`` (B, 2, D). Keys have no gradient.
        """
        if self.predictor is None:
            query = embed(self.encoder, self.projector, view_1)
            key = embed(self.key_encoder, self.key_projector, view_2)
            both = zip((keys.FEATURES, keys.PROJECTIONS), query, key, strict=True)
            return {name: torch.stack(pair, dim=1) for name, *pair in both}
        online = (self.encoder, self.projector, self.predictor)
        return online_and_target(online, (self.key_encoder, self.key_projector), view_1, view_2)

    def contrast(self, embeddings: Mapping[str, Tensor], meta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of this rank's queries.

        In training, v2 also keeps the keys of all ranks for the queue, which they join in ``after_step``.

        Args:
            embeddings: what ``forward`` returned.
            meta: what the affinity needs, (B,) each: ``sample`` and ``patient`` at least.

        Returns:
            ``loss`` (), the mean over this rank's queries, and ``plateau`` (), the loss of embeddings that tell
            nothing apart: the logarithm of the number of candidates. With an empty queue both are 0.

        Raises:
            ConfigError: for missing metadata, a queue smaller than the batch of all ranks, or, without a queue, a
                batch of one sample.
        """
        own = needed_of_views(self.affinity, meta, views=2)
        if self.queue is not None:
            return self._against_queue(self.queue, embeddings[keys.PROJECTIONS], own)
        queries = normalize(embeddings["predictions"].flatten(0, 1).float(), dim=1)
        candidates = gather(normalize(embeddings["targets"].detach().flatten(0, 1).float(), dim=1))
        key_meta = {name: gather(value) for name, value in own.items()}
        refuse_one_sample(len(candidates))
        pairs = self.affinity.pairs(own, key_meta)

        def of_the_other_view(rows: slice) -> tuple[Tensor, Tensor]:
            positives, ignored = pairs(rows)
            return positives, ignored | (own[VIEW][rows, None] == key_meta[VIEW])

        return {
            keys.LOSS: info_nce(queries, candidates, of_the_other_view, self.temperature),
            keys.PLATEAU: queries.new_tensor(math.log(len(candidates) / 2)),
        }

    def _against_queue(self, queue: NegativeQueue, projections: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
        queries = normalize(projections[:, 0].float(), dim=1)
        key = normalize(projections[:, 1].detach().float(), dim=1)
        query_meta = {name: value[0::2] for name, value in own.items()}
        key_meta = {name: value[1::2] for name, value in own.items()}
        queued, queued_meta = queue.contents()
        candidates = torch.cat([key, queued])
        pairs = self.affinity.pairs(
            query_meta,
            {name: torch.cat([value, queued_meta[name].to(value.dtype)]) for name, value in key_meta.items()},
        )
        number = torch.arange(len(queries), device=queries.device)

        def own_key_and_queue(rows: slice) -> tuple[Tensor, Tensor]:
            positives, ignored = pairs(rows)
            others = torch.zeros_like(ignored)
            others[:, : len(key)] = number[rows, None] != number
            return positives, ignored | others

        loss = info_nce(queries, candidates, own_key_and_queue, self.temperature)
        queue.stash(key, key_meta)
        return {keys.LOSS: loss, keys.PLATEAU: loss.new_tensor(math.log(1 + len(queued)))}

    def before_step(self, progress: float) -> None:
        """At the beginning of a run the key encoder is the encoder; keys of a step that was skipped are discarded."""
        self.key_encoder.before_step(progress)
        self.key_projector.before_step(progress)
        if self.queue is not None:
            self.queue.before_step()

    def after_step(self, progress: float) -> None:
        """Move the key encoder, and let the step's keys into the queue; ``progress`` is steps done / total."""
        self.key_encoder.after_step(progress)
        self.key_projector.after_step(progress)
        if self.queue is not None:
            self.queue.after_step()
