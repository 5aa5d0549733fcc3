"""The affinity: from the metadata of queries and keys to what each of their pairs counts as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from medclr import keys
from medclr.affinity.kernels import Kernel
from medclr.affinity.meta import VIEW, Meta, Pairs, check_entries, entry_of, equal
from medclr.affinity.related import Counts, Related, checked_counts, weight_of
from medclr.errors import ConfigError

Part = TypeVar("Part")


class Affinity:
    """From the metadata of queries and keys to the weights of their pairs.

    One rule says what a pair is; the first line that fits decides:

    1. An embedding and itself are ignored; the other views of its sample are positives of weight 1.
    2. Two samples of one patient are what the first of ``related`` that holds says, else what ``same_patient`` says.
    3. Two samples of two patients have the product of the kernels' weights: those of y-aware InfoNCE
       (arXiv:2106.08808), of supervised contrast (arXiv:2004.11362) for ``Same("label")``. A kernel whose value is
       missing on either side is left out; where none is left, and for weight 0, the pair is negative.

    A missing value thus changes nothing: the pair counts as it would without that part. A pair is never both ignored
    and positive, and the loss divides a row's weights by their sum.

    Keys may come from this batch, from other ranks, or from a queue. Numbers of samples repeat from epoch to epoch, so
    the keys of a queue carry ``sample`` -1, which is nobody's: a patient's older scans are then weighed by line 2.

    Args:
        same_patient: what two samples of one patient are. By default they are ignored, since a patient's other scan
            is no negative; ``positive``, or a weight from 0 to 1, attracts them as MedAug does (arXiv:2102.10663),
            ``negative`` is plain SimCLR (arXiv:2002.05709), ``kernels`` treats them as those of two patients.
        related: what closer relations count as, in the order in which they are asked.
        kernels: metadata kernels, which multiply.

    Raises:
        ConfigError: for another ``same_patient``, or something else than relations and kernels.

    Example:
        >>> Affinity(related=[Related("positive", same="study_id")], kernels=[Same("sex")]).columns
        ('study_id', 'sex')
    """

    def __init__(
        self,
        *,
        same_patient: Counts = "ignored",
        related: Sequence[Related] = (),
        kernels: Sequence[Kernel] = (),
    ) -> None:
        self.same_patient = checked_counts(same_patient, "same_patient")
        self.related = _checked("related", related, "holds", "Related")
        self.kernels = _checked("kernels", kernels, "__call__", "Gaussian or Same")
        columns = [part.columns for part in self.related] + [part.columns for part in self.kernels]
        self.reads = tuple(dict.fromkeys(name for part in columns for name in part))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the datalist that the dataset must turn into metadata."""
        return tuple(name for name in self.reads if name != keys.SCAN)

    @property
    def needs(self) -> tuple[str, ...]:
        """The entries of the metadata that are read."""
        return (keys.SAMPLE, keys.PATIENT, VIEW, *map(entry_of, self.reads))

    def __call__(self, query: Meta, key: Meta) -> tuple[Tensor, Tensor]:
        """Weights for a block of queries.

        Args:
            query: the entries of ``needs``, (B,) each: int64, or floats for quantities.
            key: the same of the keys, (K,) each.

        Returns:
            positives: float32 (B, K), from 0 to 1; 0 makes a pair negative.
            ignored: bool (B, K); True leaves a pair out of the loss.

        Raises:
            ConfigError: for an entry that is not there, or does not fit.
        """
        check_entries(query, self.needs)
        check_entries(key, self.needs)
        sample = equal(query[keys.SAMPLE], key[keys.SAMPLE])
        itself = sample & (query[VIEW][:, None] == key[VIEW][None])
        positives, ignored = self._of_kernels(query, key, sample), itself
        undecided = equal(query[keys.PATIENT], key[keys.PATIENT]) & ~sample
        for relation in (*self.related, None):
            counts = self.same_patient if relation is None else relation.counts
            held = undecided if relation is None else undecided & relation.holds(query, key)
            undecided = undecided & ~held
            if counts == "ignored":
                ignored = ignored | held
            elif counts != "kernels":
                weight = weight_of(counts) if relation is None else relation.weight(query, key)
                positives = torch.where(held, weight, positives)  # type: ignore[arg-type]  # counts is a weight
        return positives.masked_fill(sample, 1.0).masked_fill(ignored, 0.0), ignored

    def pairs(self, query: Meta, key: Meta) -> Pairs:
        """The same a block of query rows at a time, so that no (B, K) table is held whole."""
        check_entries(query, self.needs)
        return lambda rows: self({name: query[name][rows] for name in self.needs}, key)

    def _of_kernels(self, query: Meta, key: Meta, like: Tensor) -> Tensor:
        product = torch.ones_like(like, dtype=torch.float32)
        told = torch.zeros_like(like)
        for kernel in self.kernels:
            weight, known = kernel(query, key)
            product = torch.where(known, product * weight, product)
            told = told | known
        return product.masked_fill(~told, 0.0)


def _checked(setting: str, parts: Sequence[Part], offers: str, wanted: str) -> tuple[Part, ...]:
    listed: tuple[Any, ...] = tuple(parts) if isinstance(parts, Sequence) else (parts,)
    for part in listed:
        if not hasattr(part, "columns") or not hasattr(part, offers):
            raise ConfigError(
                "The affinity is unusable.",
                got=f"{setting} with {type(part).__name__} {str(part)[:100]!r}",
                wanted=f"a list of {wanted}",
                fix=f"Give the parts of {setting} as objects; in a bundle, each with its _target_.",
            )
    return listed
