"""The metadata of embeddings: which entries there are, what is missing, and how each view gets its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from medclr import keys
from medclr.errors import ConfigError

VIEW = "view"
"""Key of an embedding's metadata: (B,) which view of its sample it is."""

Meta = Mapping[str, Tensor]
"""Entries (B,): numbers of samples, patients, scans, studies and categories as int64, in which a negative number stands
for a missing value; quantities (age, days) as floats, in which NaN does."""
Pairs = Callable[[slice], tuple[Tensor, Tensor]]
"""From a block of query rows to its (positives, ignored), each (rows, K)."""

_ENTRIES = {keys.STUDY_ID: keys.STUDY, keys.SERIES_ID: keys.SERIES}


def entry_of(column: str) -> str:
    """The entry of the metadata that a column becomes: ``study_id`` is ``study``, most keep their name."""
    return _ENTRIES.get(column, column)


def of_views(meta: Meta, views: int) -> dict[str, Tensor]:
    """Metadata of samples as that of their embeddings, in the order of ``embeddings.flatten(0, 1)``.

    Args:
        meta: entries (B,), which all views of a sample share, or (B, V), which give each view its own.
        views: V, the number of views a sample.

    Returns:
        The same entries, (B * V,) each, and ``view``: the number of each view.

    Raises:
        ConfigError: for an entry of another shape.

    Example:
        >>> of_views({"patient": torch.tensor([4, 5]), "scan": torch.tensor([[0, 1], [2, 2]])}, 2)["scan"].tolist()
        [0, 1, 2, 2]
    """
    flat: dict[str, Tensor] = {}
    for name, value in meta.items():
        if value.ndim != 1 and tuple(value.shape[1:]) != (views,):
            raise ConfigError(
                "Metadata does not fit the views.",
                got=f"{name} {tuple(value.shape)}",
                wanted=f"(B,), or (B, {views}): one for each view",
                fix="Give an entry for each sample, or for each view of it.",
            )
        flat[name] = value.repeat_interleave(views) if value.ndim == 1 else value.flatten()
    sample = meta[keys.SAMPLE] if keys.SAMPLE in meta else next(iter(meta.values()))
    flat[VIEW] = torch.arange(views, device=sample.device).repeat(len(sample))
    return flat


def check_entries(meta: Meta, needs: Sequence[str]) -> None:
    """Raise unless metadata holds all that an affinity reads, one number for each embedding.

    Raises:
        ConfigError: naming the entry, and those that are there.
    """
    for name in needs:
        if name not in meta:
            raise ConfigError(
                "The affinity lacks metadata.",
                got=f"no {name!r} among {', '.join(sorted(meta)) or 'no entries'}",
                wanted=", ".join(needs),
                fix="Give the dataset the columns that the affinity reads: columns: $@affinity.columns.",
            )
        if meta[name].shape != meta[keys.SAMPLE].shape or meta[name].ndim != 1:
            raise ConfigError(
                "The affinity's metadata does not fit the embeddings.",
                got=f"{name} {tuple(meta[name].shape)}, sample {tuple(meta[keys.SAMPLE].shape)}",
                wanted="(B,): a number for each embedding",
                fix="Spread the metadata over the views with medclr.affinity.of_views.",
            )


def known(value: Tensor) -> Tensor:
    """Where a value is there: a float that is not NaN, a number or code that is not negative."""
    return ~value.isnan() if value.is_floating_point() else value >= 0


def both_known(query: Tensor, key: Tensor) -> Tensor:
    """(B, K) where neither of two values is missing."""
    return known(query)[:, None] & known(key)[None]


def equal(query: Tensor, key: Tensor) -> Tensor:
    """(B, K) where two values are known and equal."""
    return (query[:, None] == key[None]) & both_known(query, key)


def distance(query: Meta, key: Meta, column: str) -> Tensor:
    """(B, K) by how much a quantity differs; NaN where either is missing.

    Raises:
        ConfigError: for an entry that is a category.
    """
    name = entry_of(column)
    for values in (query[name], key[name]):
        if not values.is_floating_point():
            raise ConfigError(
                "A distance was asked for between categories.",
                got=f"{name} as {str(values.dtype).removeprefix('torch.')}",
                wanted="numbers, as floats",
                fix=f"Let every {column} in the datalist be a number or null, or compare it with Same({column!r}).",
            )
    return (query[name][:, None] - key[name][None]).abs()
