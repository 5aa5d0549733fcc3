from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.engines import SupervisedTrainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from medclr.errors import ConfigError
from medclr.transfer import ScanSampler

Draw = tuple[int, int, int]


class Echo(Dataset[torch.Tensor]):
    """Gives each index back."""

    def __init__(self, scans: int) -> None:
        self.scans = scans

    def __len__(self) -> int:
        return self.scans

    def __getitem__(self, index: Draw) -> torch.Tensor:
        return torch.tensor(index)


def sampler(scans: int, num_samples: int, epoch: int = 1, **settings: Any) -> ScanSampler:
    made = ScanSampler(Echo(scans), num_samples, **{"seed": 0, **settings})
    made.set_epoch(epoch)
    return made


def run(scans: int, num_samples: int, epochs: int, **settings: Any) -> list[Draw]:
    """The draws of the epochs from 1 on, one after the other."""
    return [draw for epoch in range(1, epochs + 1) for draw in sampler(scans, num_samples, epoch, **settings)]


@given(scans=st.integers(1, 30), num_samples=st.integers(1, 40), epoch=st.integers(0, 50), seed=st.integers(0, 1000))
def test_an_epoch_has_the_turns_that_are_asked_for_of_scans_that_are_there(
    scans: int, num_samples: int, epoch: int, seed: int
) -> None:
    made = sampler(scans, num_samples, epoch, seed=seed)
    draws = list(made)
    assert len(made) == len(draws) == num_samples
    assert [(drawn, turn) for _, drawn, turn in draws] == [(epoch, turn) for turn in range(num_samples)]
    assert {place for place, _, _ in draws} <= set(range(scans))
    assert all(type(part) is int for draw in draws for part in draw)


@given(scans=st.integers(1, 12), num_samples=st.integers(1, 30), epochs=st.integers(1, 12))
def test_over_the_epochs_every_scan_comes_once_before_any_comes_again(
    scans: int, num_samples: int, epochs: int
) -> None:
    places = [place for place, _, _ in run(scans, num_samples, epochs, seed=3)]
    rounds = [places[start : start + scans] for start in range(0, len(places), scans)]
    assert all(sorted(whole) == list(range(scans)) for whole in rounds[:-1])
    assert len(set(rounds[-1])) == len(rounds[-1])
    times = Counter(dict.fromkeys(range(scans), 0) | Counter(places))
    assert max(times.values()) - min(times.values()) <= 1


@given(scans=st.integers(1, 20), num_samples=st.integers(6, 40), ranks=st.integers(1, 6), batch=st.integers(1, 4))
def test_ranks_share_out_the_order_of_one_rank_batch_by_batch(
    scans: int, num_samples: int, ranks: int, batch: int
) -> None:
    alone = list(sampler(scans, num_samples, 3, seed=9))
    shares = [sampler(scans, num_samples, 3, seed=9, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    drawn = [list(share) for share in shares]
    length = num_samples // ranks
    assert [len(draws) for draws in drawn] == [len(share) for share in shares] == [length] * ranks
    assert [draw for turn in zip(*drawn, strict=True) for draw in turn] == alone[: length * ranks]
    for start in range(0, length - batch + 1, batch):  # a global batch
        together = [draw for draws in drawn for draw in draws[start : start + batch]]
        assert sorted(together) == sorted(alone[start * ranks : (start + batch) * ranks])


def test_an_epoch_is_the_same_whatever_was_drawn_before() -> None:
    made = sampler(5, 7, seed=2)
    for epoch in (4, 1, 3, 4, 2):
        made.set_epoch(epoch)
        assert list(made) == list(made) == list(sampler(5, 7, epoch, seed=2))


def test_the_order_changes_with_seed_and_permutation() -> None:
    orders = {
        tuple(place for place, _, _ in sampler(20, 20, epoch, seed=seed)) for seed in range(3) for epoch in range(5)
    }
    assert len(orders) == 15
    assert tuple(range(20)) not in orders


def test_the_order_has_no_favourites() -> None:
    first = Counter(next(iter(sampler(5, 5, epoch)))[0] for epoch in range(500))
    assert set(first) == set(range(5))
    assert all(60 < times < 140 for times in first.values())


def test_more_scans_than_draws_are_all_seen_within_few_epochs() -> None:
    assert {place for place, _, _ in run(20, 4, 5)} == set(range(20))
    assert {place for place, _, _ in run(20, 4, 4)} != set(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_monais_engine_tells_the_epoch(workers: int) -> None:
    made = ScanSampler(Echo(4), 6, seed=2)
    assert isinstance(made, DistributedSampler)
    loader: DataLoader[torch.Tensor] = DataLoader(
        made.dataset, batch_size=2, sampler=made, num_workers=workers, persistent_workers=workers > 0
    )
    seen: list[tuple[int, ...]] = []
    network = torch.nn.Linear(1, 1)
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=3,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss_function=torch.nn.MSELoss(),
        iteration_update=lambda engine, batch: seen.extend(map(tuple, batch.tolist())),
    )
    trainer.run()
    assert seen == run(4, 6, 3, seed=2)


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, "2", None])
def test_an_unusable_number_of_draws_is_refused(num_samples: Any) -> None:
    with pytest.raises(ConfigError, match="scans an epoch"):
        sampler(3, num_samples)


def test_fewer_draws_than_ranks_are_refused() -> None:
    assert len(sampler(3, 2, num_replicas=2, rank=1)) == 1
    with pytest.raises(ConfigError, match="scans an epoch") as caught:
        sampler(3, 2, num_replicas=3, rank=1)
    assert "3, the number of ranks" in str(caught.value.wanted)


def test_a_data_set_without_scans_is_refused() -> None:
    with pytest.raises(ConfigError, match="no scan to draw"):
        sampler(0, 4)


# Starting in the middle of an epoch


@given(scans=st.integers(1, 20), num_samples=st.integers(3, 30), ranks=st.integers(1, 3), items=st.integers(0, 40))
def test_a_later_start_gives_the_rest_of_the_epoch_and_the_next_epochs_are_whole(
    scans: int, num_samples: int, ranks: int, items: int
) -> None:
    for rank in range(ranks):
        settings = {"seed": 4, "num_replicas": ranks, "rank": rank}
        made, whole = sampler(scans, num_samples, 7, **settings), sampler(scans, num_samples, 7, **settings)
        made.start_at(items)
        assert len(made) == len(whole)
        assert list(made) == list(whole)[items:]
        for epoch in (7, 8):
            made.set_epoch(epoch)
            assert list(made) == list(sampler(scans, num_samples, epoch, **settings))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_with_the_batches_that_are_left(workers: int, drop_last: bool) -> None:
    made = sampler(4, 14, epoch=3)
    loader: DataLoader[torch.Tensor] = DataLoader(
        made.dataset,
        batch_size=3,
        sampler=made,
        drop_last=drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    whole = [batch.tolist() for batch in loader]
    assert len(whole) == len(loader) == (4 if drop_last else 5)
    for batches in (2, 4):
        made.start_at(batches * 3)
        assert len(loader) == len(whole)
        assert [batch.tolist() for batch in loader] == whole[batches:]
        assert [batch.tolist() for batch in loader] == whole


@pytest.mark.parametrize("items", [-1, 1.5, "2", None])
def test_an_unusable_start_is_refused(items: Any) -> None:
    made = sampler(3, 3)
    with pytest.raises(ConfigError, match="place to start"):
        made.start_at(items)
    assert len(list(made)) == 3
