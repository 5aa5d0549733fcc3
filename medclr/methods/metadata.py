"""What an affinity is told about each embedding of a batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from medclr.affinity import Affinity, of_views
from medclr.affinity.meta import check_entries


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
