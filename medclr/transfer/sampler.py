"""Which scans an epoch of fine-tuning holds, in which order, on which rank."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from medclr import distributed
from medclr.draws import shuffled
from medclr.errors import ConfigError
from medclr.pairs.sampler import checked_items


class ScanSampler(DistributedSampler[Any]):
    """Yields (place in the data set, epoch, turn), with as many turns an epoch as are asked for.

    A ``DistributedSampler``, because MONAI's engines tell only those which epoch it is. Scans come in permutations, one
    after the other: each scan once before any comes again. An epoch takes up the stream where the one before left it,
    so that over a run, which MONAI counts from epoch 1, no scan is drawn more than once oftener than another. What is
    drawn depends on (seed, epoch, turn) alone; ranks take turns, so that a global batch holds the same scans on any
    number of ranks. What does not fill a turn of all ranks is left out.

    Args:
        dataset: the scans to draw.
        num_samples: scans an epoch, on all ranks together.
        seed: the run's seed.
        num_replicas: number of ranks; asked of the process group if None.
        rank: this rank; asked of the process group if None.

    Raises:
        ConfigError: for fewer scans an epoch than ranks, or no scan to draw.

    Example:
        >>> sampler = ScanSampler(range(3), num_samples=2, seed=0)
        >>> sampler.set_epoch(1)
        >>> [(epoch, turn) for _, epoch, turn in sampler]
        [(1, 0), (1, 1)]
    """

    def __init__(
        self,
        dataset: Sized,
        num_samples: int,
        seed: int = 0,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        ranks = distributed.world_size() if num_replicas is None else num_replicas
        if not isinstance(num_samples, int) or num_samples < ranks:
            raise ConfigError(
                "The number of scans an epoch is unusable.",
                got=num_samples,
                wanted=f"a whole number >= {ranks}, the number of ranks",
                fix="For example num_samples: the steps of an epoch times the scans of a batch.",
            )
        if not len(dataset):
            raise ConfigError(
                "There is no scan to draw.",
                got="an empty data set",
                wanted="at least one scan",
                fix="Leave the sampler out where there are no scans.",
            )
        super().__init__(
            cast("Dataset[Any]", dataset),
            num_replicas=ranks,
            rank=distributed.rank() if rank is None else rank,
            shuffle=True,
            seed=seed,
        )
        self.scans, self.turns = len(dataset), num_samples
        self.num_samples = num_samples // self.num_replicas
        self.total_size = self.num_samples * self.num_replicas
        self._left_out = 0

    def start_at(self, items: int) -> None:
        """Leave out what a run had done of an epoch before it was stopped; the length stays that of a whole epoch.

        Args:
            items: how many of this rank's first items the next iteration, and no later one, leaves out.

        Raises:
            ConfigError: unless ``items`` is a whole number >= 0.
        """
        self._left_out = checked_items(items)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """The draws of this rank in this epoch (see ``set_epoch``)."""
        begin = (self.epoch - 1) * self.turns  # MONAI counts from 1, so a run begins with a whole permutation
        first, last = begin // self.scans, (begin + self.turns - 1) // self.scans
        order = np.concatenate(
            [shuffled(self.scans, ("scans", self.seed, number)) for number in range(first, last + 1)]
        )
        order = order[begin - first * self.scans :]
        left_out, self._left_out = self._left_out, 0
        for turn in range(self.rank, self.total_size, self.num_replicas)[left_out:]:
            yield int(order[turn]), self.epoch, turn
