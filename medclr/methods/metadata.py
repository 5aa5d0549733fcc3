"""What an affinity is told about each embedding of a batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from medclr.affinity import Affinity, of_views
from medclr.affinity.meta import check_entries
from medclr.errors import ConfigError


def needed_of_views(affinity: Affinity, meta: Mapping[str, Tensor], views: int) -> dict[str, Tensor]:
    """The entries that an affinity reads, and no others, in the order of ``embeddings.flatten(0, 1)``.

    Args:
        affinity: which says what it ``needs``.
        meta: a batch's metadata: (B,) each, or (B, V) where views differ.
        views: V.

    Returns:
        ``affinity.needs``, (B * V,) each, ``view`` among them.

    Raises:
        ConfigError: naming an entry that the batch has not.
    """
    there = {name: meta[name] for name in affinity.needs if name in meta}
    spread = of_views(there, views) if there else {}
    check_entries(spread, affinity.needs)
    return spread


def refuse_one_sample(candidates: int) -> None:
    """Raise where the batch of all ranks is one sample: there is nothing to tell it from.

    A larger batch that holds one patient by chance teaches nothing, and does no harm.

    Args:
        candidates: embeddings, two of each sample.

    Raises:
        ConfigError: for one sample.
    """
    if candidates == 2:
        raise ConfigError(
            "A batch holds one patient, who has no negatives.",
            got="two embeddings of one sample",
            wanted="two patients or more in the batch of all ranks",
            fix="Raise batch_size; where memory ends, set chunk_size too (cached.yaml), or take moco.yaml.",
        )
