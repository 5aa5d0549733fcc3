"""How a pair of embeddings counts: positive with a weight, negative, or ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from medclr import keys
from medclr.errors import ConfigError

VIEW = "view"
"""Key of an embedding's metadata: (B,) which view of its sample it is."""

Meta = Mapping[str, Tensor]
Pairs = Callable[[slice], tuple[Tensor, Tensor]]
"""From a block of query rows to its (positives, ignored), each (rows, K)."""


class Affinity:
    """From the metadata of queries and keys to the weights of their pairs.

    The views of one sample are positives of weight 1; an embedding and itself are ignored.

    Args:
        same_patient: what two samples of one patient are. By default they are ignored, since a patient's other scan
            is no negative; ``positive`` follows MedAug (arXiv:2102.10663), ``negative`` is plain SimCLR
            (arXiv:2002.05709).

    Raises:
        ConfigError: for another ``same_patient``.
    """

    def __init__(self, *, same_patient: Literal["ignored", "positive", "negative"] = "ignored") -> None:
        if same_patient not in ("ignored", "positive", "negative"):
            raise ConfigError(
                "The affinity is unusable.",
                got=f"same_patient {same_patient!r}",
                wanted="ignored, positive or negative",
                fix="Set same_patient: ignored.",
            )
        self.same_patient = same_patient

    def __call__(self, query: Meta, key: Meta) -> tuple[Tensor, Tensor]:
        """Weights for a block of queries.

        Args:
            query: ``sample``, ``patient`` and ``view``, int64 (B,) each.
            key: the same of the keys, (K,) each.

        Returns:
            positives: float32 (B, K), >= 0; 0 makes a pair negative.
            ignored: bool (B, K); True leaves a pair out of the loss.
        """
        sample = query[keys.SAMPLE][:, None] == key[keys.SAMPLE][None]
        itself = sample & (query[VIEW][:, None] == key[VIEW][None])
        positive, ignored = sample & ~itself, itself
        if self.same_patient != "negative":
            patient = (query[keys.PATIENT][:, None] == key[keys.PATIENT][None]) & ~sample
            if self.same_patient == "positive":
                positive = positive | patient
            else:
                ignored = ignored | patient
        return positive.to(torch.float32), ignored

    def pairs(self, query: Meta, key: Meta) -> Pairs:
        """The same a block of query rows at a time, so that no (B, K) table is held whole."""
        return lambda rows: self({name: value[rows] for name, value in query.items()}, key)
