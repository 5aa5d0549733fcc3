"""Which patients an epoch holds, in which order, on which rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from medclr import distributed
from medclr.draws import shuffled
from medclr.errors import ConfigError
from medclr.pairs.balance import Balance, occurrences
from medclr.pairs.dataset import Item, PatientPairDataset


class PatientSampler(DistributedSampler[Item]):
    """Yields (patient, epoch, occurrence); every patient occurs ``passes`` times an epoch, in a new order each time.

    With a ``balance``, patients occur in other proportions, in as many draws an epoch. The occurrence says how often
    the patient has come before in the epoch, so that no two draws are the same.

    A ``DistributedSampler``, because MONAI's engines tell only those which epoch it is. An epoch's order depends on
    (seed, epoch) alone; ranks take turns in it, so that a global batch holds the same patients on any number of ranks.
    What does not fill a turn of all ranks is left out.

    Args:
        dataset: the pairs to draw.
        passes: how often each patient occurs in an epoch; a small cohort wants several. With a balance, on average.
        balance: None has patients equally often, however many scans they have. ``scans`` has scans equally often. A
            column such as ``site`` or ``scanner`` has each of its values equally often, and the patients of a value
            among each other: those of a large site sit out some epochs, those of a small one repeat.
        seed: the run's seed.
        num_replicas: number of ranks; asked of the process group if None.
        rank: this rank; asked of the process group if None.

    Raises:
        ConfigError: for ``passes`` that are no whole number >= 1, or a ``balance`` that is no name.
        DatalistError: for a ``balance`` by a column that no row has.

    Example:
        >>> sampler = PatientSampler(dataset, passes=4, balance="site")  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: PatientPairDataset,
        *,
        passes: int = 1,
        balance: str | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if not isinstance(passes, int) or passes < 1:
            raise ConfigError(
                "The number of passes is unusable.", got=passes, wanted="a whole number >= 1", fix="Set passes: 1."
            )
        super().__init__(
            cast("Dataset[Item]", dataset),
            num_replicas=distributed.world_size() if num_replicas is None else num_replicas,
            rank=distributed.rank() if rank is None else rank,
            shuffle=True,
            seed=seed,
        )
        self.patients, self.passes = len(dataset), passes
        self.balance = None if balance is None else Balance(dataset.rows, dataset.patients, balance)
        self.num_samples = self.patients * passes // self.num_replicas
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

    def __iter__(self) -> Iterator[tuple[int, int, int]]:  # type: ignore[override]  # the dataset takes such an index
        """The draws of this rank in this epoch (see ``set_epoch``)."""
        order = self._order()
        occurrence = occurrences(order)
        left_out, self._left_out = self._left_out, 0
        for position in range(self.rank, self.total_size, self.num_replicas)[left_out:]:
            yield int(order[position]), self.epoch, int(occurrence[position])

    def _order(self) -> NDArray[np.int64]:
        if self.balance is not None:
            return self.balance.draw(self.patients * self.passes, self.seed, self.epoch)
        turns = range(self.passes)
        return np.concatenate([shuffled(self.patients, ("sampler", self.seed, self.epoch, turn)) for turn in turns])


def checked_items(items: int) -> int:
    """The number of items to leave out of an epoch.

    Raises:
        ConfigError: unless it is a whole number >= 0.
    """
    if not isinstance(items, int) or items < 0:
        raise ConfigError(
            "The place to start an epoch at is unusable.",
            got=items,
            wanted="a whole number of items >= 0",
            fix="Give the number of items that are done; 0 starts at the beginning.",
        )
    return items
