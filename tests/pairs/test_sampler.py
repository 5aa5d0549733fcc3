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
from medclr.pairs import PatientSampler


class Echo(Dataset[torch.Tensor]):
    """Gives each index back."""

    def __init__(self, patients: int) -> None:
        self.patients = patients

    def __len__(self) -> int:
        return self.patients

    def __getitem__(self, index: tuple[int, int, int]) -> torch.Tensor:
        return torch.tensor(index)


def sampler(patients: int, epoch: int = 1, **settings: Any) -> PatientSampler:
    made = PatientSampler(Echo(patients), **settings)  # type: ignore[arg-type]
    made.set_epoch(epoch)
    return made


@given(patients=st.integers(2, 30), passes=st.integers(1, 4), epoch=st.integers(0, 50), seed=st.integers(0, 1000))
def test_every_patient_occurs_so_many_times_each_time_with_another_occurrence(
    patients: int, passes: int, epoch: int, seed: int
) -> None:
    draws = list(sampler(patients, epoch, passes=passes, seed=seed))
    assert Counter((place, occurrence) for place, _, occurrence in draws) == Counter(
        (place, occurrence) for place in range(patients) for occurrence in range(passes)
    )
    assert {drawn for _, drawn, _ in draws} == {epoch}
    assert all(type(part) is int for draw in draws for part in draw)
    for turn in range(passes):  # a patient comes back only when all have been seen
        assert {place for place, _, _ in draws[turn * patients : (turn + 1) * patients]} == set(range(patients))


@given(patients=st.integers(2, 40), passes=st.integers(1, 3), ranks=st.integers(1, 6), batch=st.integers(1, 4))
def test_ranks_share_out_the_order_of_one_rank_batch_by_batch(
    patients: int, passes: int, ranks: int, batch: int
) -> None:
    alone = list(sampler(patients, 3, passes=passes, seed=9))
    shares = [sampler(patients, 3, passes=passes, seed=9, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    drawn = [list(share) for share in shares]
    length = patients * passes // ranks
    assert [len(draws) for draws in drawn] == [len(share) for share in shares] == [length] * ranks
    assert [draw for turn in zip(*drawn, strict=True) for draw in turn] == alone[: length * ranks]
    for start in range(0, length - batch + 1, batch):  # a global batch
        together = [draw for draws in drawn for draw in draws[start : start + batch]]
        assert sorted(together) == sorted(alone[start * ranks : (start + batch) * ranks])


def test_the_order_changes_with_epoch_seed_and_pass_and_repeats_itself() -> None:
    def order(**settings: Any) -> list[int]:
        return [place for place, _, _ in sampler(20, **settings)]

    base = order(seed=1, epoch=1)
    assert base == order(seed=1, epoch=1)
    assert base != list(range(20))
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(5)}) == 15
    twice = order(seed=1, epoch=1, passes=2)
    assert twice[:20] == base
    assert twice[20:] != base


def test_the_order_has_no_favourites() -> None:
    first = Counter(next(iter(sampler(5, epoch)))[0] for epoch in range(500))
    assert set(first) == set(range(5))
    assert all(60 < times < 140 for times in first.values())


def test_a_loader_drops_the_incomplete_batch() -> None:
    made = sampler(7, passes=2)
    loader: DataLoader[torch.Tensor] = DataLoader(made.dataset, batch_size=4, sampler=made, drop_last=True)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [tuple(draw) for batch in batches for draw in batch.tolist()] == list(made)[:12]


@pytest.mark.parametrize("workers", [0, 2])
def test_monais_engine_tells_the_epoch(workers: int) -> None:
    made = PatientSampler(Echo(6), seed=2)  # type: ignore[arg-type]
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
    assert seen == [draw for epoch in (1, 2, 3) for draw in sampler(6, epoch, seed=2)]


@pytest.mark.parametrize("passes", [0, -1, 1.5, "2", None])
def test_unusable_passes_are_refused(passes: Any) -> None:
    with pytest.raises(ConfigError, match="passes"):
        sampler(3, passes=passes)


# Starting in the middle of an epoch


@given(
    patients=st.integers(2, 20),
    passes=st.integers(1, 3),
    ranks=st.integers(1, 3),
    items=st.integers(0, 70),
)
def test_a_later_start_gives_the_rest_of_the_epoch_and_the_next_epochs_are_whole(
    patients: int, passes: int, ranks: int, items: int
) -> None:
    for rank in range(ranks):
        settings = {"passes": passes, "seed": 4, "num_replicas": ranks, "rank": rank}
        made, whole = sampler(patients, 7, **settings), sampler(patients, 7, **settings)
        made.start_at(items)
        assert len(made) == len(whole)
        assert list(made) == list(whole)[items:]
        for epoch in (7, 8):
            made.set_epoch(epoch)
            assert list(made) == list(sampler(patients, epoch, **settings))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_with_the_batches_that_are_left(workers: int, drop_last: bool) -> None:
    made = sampler(7, passes=2, epoch=3)
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
    made = sampler(3)
    with pytest.raises(ConfigError, match="place to start"):
        made.start_at(items)
    assert len(list(made)) == 3
