from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.engines import SupervisedTrainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from medclr.draws import shuffled
from medclr.errors import ConfigError, DatalistError
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


# Balance


class Cohort(Echo):
    """Echoes indices; the rows of each patient are given as values of ``site``, one a scan."""

    def __init__(self, *sites: list[str | None]) -> None:
        super().__init__(len(sites))
        self.rows = [{"patient_id": str(p), "site": site} for p, scans in enumerate(sites) for site in scans]
        ends = np.cumsum([len(scans) for scans in sites]).tolist()
        self.patients = [list(range(end - len(scans), end)) for end, scans in zip(ends, sites, strict=True)]  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.patients)  # type: ignore[arg-type]


def balanced(cohort: Cohort, epoch: int = 1, balance: str | None = "site", **settings: Any) -> PatientSampler:
    made = PatientSampler(cohort, balance=balance, **settings)  # type: ignore[arg-type]
    made.set_epoch(epoch)
    return made


def places(sampler: PatientSampler) -> Counter[int]:
    return Counter(place for place, _, _ in sampler)


# Sites of 6, 3, 2 and 1 patients.
UNEVEN_SIZES = {"a": 6, "b": 3, "c": 2, "d": 1}
UNEVEN: list[list[str | None]] = [["a"]] * 6 + [["b"], ["b", "b"]] + [["b"] * 4] + [["c"]] * 2 + [["d"]]


def test_without_balance_the_order_is_that_of_shuffled_passes() -> None:
    for epoch in range(3):
        wanted = [(int(place), epoch, turn) for turn in range(3) for place in shuffled(12, ("sampler", 5, epoch, turn))]
        assert list(balanced(Cohort(*UNEVEN), epoch, None, passes=3, seed=5)) == wanted


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_sites_occur_equally_often_in_each_epoch_and_patients_within_them_over_epochs(passes: int) -> None:
    total = Counter[int]()
    epochs = 60
    for epoch in range(epochs):
        made = balanced(Cohort(*UNEVEN), epoch, passes=passes, seed=3)
        drawn = places(made)
        assert len(made) == drawn.total() == 12 * passes
        assert Counter(UNEVEN[place][0] for place in drawn.elements()) == dict.fromkeys("abcd", 3 * passes)
        total += drawn
    for place, sites in enumerate(UNEVEN):
        wanted = epochs * 3 * passes / UNEVEN_SIZES[str(sites[0])]
        assert abs(total[place] - wanted) < 3


@given(seed=st.integers(0, 99), epoch=st.integers(0, 99), sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_no_site_occurs_more_than_once_oftener_than_another(seed: int, epoch: int, sizes: list[int]) -> None:
    cohort = Cohort(*[[str(site)] for site, size in enumerate(sizes) for _ in range(size)])
    drawn = Counter(cohort.rows[place]["site"] for place in places(balanced(cohort, epoch, seed=seed)).elements())
    times = [drawn[str(site)] for site in range(len(sizes))]
    assert max(times) - min(times) <= 1


def test_a_patient_of_a_large_site_comes_back_within_about_twice_its_interval() -> None:
    cohort = Cohort(*[["a"]] * 30, ["b"], ["c"])  # the patients of a occur in about 32 / 3 / 30 of the epochs
    interval = 30 * 3 / 32
    last = dict.fromkeys(range(30), 0)
    for epoch in range(100):
        for place in places(balanced(cohort, epoch)):
            last[place] = epoch
        assert all(epoch - seen <= 2 * interval + 1 for place, seen in last.items() if place < 30)


def test_scans_occur_equally_often_when_asked() -> None:
    cohort = Cohort(["a"], ["a"] * 2, ["a"] * 3, ["a"] * 6)
    for epoch in range(5):
        assert places(balanced(cohort, epoch, "scans", passes=3)) == {0: 1, 1: 2, 2: 3, 3: 6}


def test_a_patient_seen_at_two_sites_counts_to_each_by_its_scans() -> None:
    cohort = Cohort(["a"], ["a", "b"], ["b"], ["b"])
    total = sum((places(balanced(cohort, epoch, passes=3)) for epoch in range(50)), Counter())
    # a: 1 + 1/2 patients, b: 2 + 1/2; each site has 1/2 of 600 draws
    wanted = {0: 300 / 1.5, 1: 150 / 1.5 + 150 / 2.5, 2: 300 / 2.5, 3: 300 / 2.5}
    assert all(abs(total[place] - times) < 4 for place, times in wanted.items())


def test_a_patient_without_a_site_occurs_as_often_as_without_balance() -> None:
    cohort = Cohort(["a"], ["a"], ["a"], ["b"], [None], [None, None])
    for epoch in range(5):
        drawn = places(balanced(cohort, epoch, passes=3))
        assert (drawn[4], drawn[5]) == (3, 3)
        assert drawn[3] == 6 == drawn[0] + drawn[1] + drawn[2]


@given(
    sites=st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=4), min_size=2, max_size=12),
    by=st.sampled_from(["site", "scans"]),
    passes=st.integers(1, 3),
    ranks=st.integers(1, 3),
    epoch=st.integers(0, 30),
    items=st.integers(0, 20),
)
def test_balanced_draws_are_unique_shared_out_and_go_on_from_the_middle(
    sites: list[list[str | None]], by: str, passes: int, ranks: int, epoch: int, items: int
) -> None:
    cohort = Cohort(["a"], *sites)
    alone = list(balanced(cohort, epoch, by, passes=passes, seed=1))
    assert len(alone) == len(cohort) * passes
    seen = Counter[int]()
    for place, drawn, occurrence in alone:
        assert (drawn, occurrence) == (epoch, seen[place])
        seen[place] += 1
    made = [balanced(cohort, epoch, by, passes=passes, seed=1, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    shares = [list(share) for share in made]
    assert [draw for turn in zip(*shares, strict=True) for draw in turn] == alone[: len(alone) // ranks * ranks]
    made[0].start_at(items)
    assert list(made[0]) == shares[0][items:]
    assert list(made[0]) == shares[0]


def test_repeats_of_a_patient_are_spread_over_the_epoch() -> None:
    cohort = Cohort(*[["a"]] * 30, ["b"])
    for epoch in range(10):
        draws = [place for place, _, _ in balanced(cohort, epoch, passes=4)]
        at = [position for position, place in enumerate(draws) if place == 30]
        assert len(at) == 62
        assert sum(position < 62 for position in at) in range(29, 34)  # a half of the epoch, and of its repeats
        assert max(np.diff(at)) < 10


def test_the_balanced_order_changes_with_epoch_and_seed_and_repeats_itself() -> None:
    orders = {
        (seed, epoch): tuple(place for place, _, _ in balanced(Cohort(*UNEVEN), epoch, seed=seed, passes=2))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert orders[1, 2] == tuple(place for place, _, _ in balanced(Cohort(*UNEVEN), 2, seed=1, passes=2))


def test_renaming_sites_and_patients_changes_no_draw() -> None:
    renamed = Cohort(*[["zyxw"["abcd".index(str(site))] for site in sites] for sites in UNEVEN])
    for row in renamed.rows:
        row["patient_id"] = f"x{9 - int(row['patient_id'])}"  # type: ignore[arg-type]
    assert list(balanced(renamed, 4, passes=2)) == list(balanced(Cohort(*UNEVEN), 4, passes=2))


@pytest.mark.parametrize("balance", ["", 3, ["site"], True, "patient_id", "image"])
def test_an_unusable_balance_is_refused(balance: Any) -> None:
    with pytest.raises(ConfigError, match="balance is unusable"):
        balanced(Cohort(*UNEVEN), balance=balance)


def test_a_balance_by_a_column_that_no_row_has_is_refused() -> None:
    with pytest.raises(DatalistError, match="balance of the sampler needs a column") as caught:
        balanced(Cohort(*UNEVEN), balance="scanner")
    assert "there are patient_id, site" in str(caught.value)
