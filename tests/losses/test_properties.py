"""What holds of info_nce and NT-Xent whatever the embeddings, the tables and the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from medclr.losses import NTXentLoss, info_nce, nt_xent

SEEDS = st.integers(0, 10**6)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int) -> Tensor:
    return normalize(drawn(*shape, seed=seed), dim=1)


def loss_and_gradients(queries: Tensor, keys: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    q, k = queries.detach().clone().requires_grad_(), keys.detach().clone().requires_grad_()
    loss = info_nce(q, k, *rest)  # type: ignore[arg-type]
    return loss.detach(), *torch.autograd.grad(loss, (q, k))


def tables(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.where(random[0] > 0.6, random[0], 0.0), random[1] < 0.3


@given(count=st.integers(1, 12), seed=SEEDS, temperature=st.floats(0.05, 5))
def test_permuting_the_samples_leaves_nt_xent_and_permutes_its_gradient(
    count: int, seed: int, temperature: float
) -> None:
    z_1, z_2 = (drawn(count, 6, seed=seed + view).requires_grad_() for view in (0, 1))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    moved = [z.detach()[order].requires_grad_() for z in (z_1, z_2)]
    losses = NTXentLoss(temperature)(z_1, z_2), NTXentLoss(temperature)(*moved)
    torch.testing.assert_close(*losses)
    before, after = torch.autograd.grad(losses[0], (z_1, z_2)), torch.autograd.grad(losses[1], moved)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one[order], other, rtol=1e-4, atol=1e-5 / temperature)


@given(count=st.integers(1, 12), seed=SEEDS, temperature=st.floats(0.02, 5))
def test_small_and_large_batches_have_one_nt_xent(count: int, seed: int, temperature: float) -> None:
    results = []
    for largest in (nt_xent.LARGEST_TABLE, 0):  # the whole table, and blocks of it
        views = [(drawn(count, 6, seed=seed + view) * 3).requires_grad_() for view in (0, 1)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nt_xent, "LARGEST_TABLE", largest)
            loss = NTXentLoss(temperature)(*views)
        results.append((loss.detach(), *torch.autograd.grad(loss, views)))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=1e-4, atol=2e-6 / temperature)


@given(count=st.integers(1, 12), seed=SEEDS)
def test_the_views_may_be_swapped(count: int, seed: int) -> None:
    z_1, z_2 = (drawn(count, 6, seed=seed + view) for view in (0, 1))
    torch.testing.assert_close(NTXentLoss(0.2)(z_1, z_2), NTXentLoss(0.2)(z_2, z_1))


@given(columns=st.integers(2, 12), seed=SEEDS, temperature=st.floats(0.05, 5))
def test_an_ignored_pair_has_no_gradient_at_all(columns: int, seed: int, temperature: float) -> None:
    positives, ignored = tables(1, columns, seed)
    _, _, of_keys = loss_and_gradients(
        unit(1, 6, seed=seed), unit(columns, 6, seed=seed + 1), (positives, ignored), temperature
    )
    assert torch.equal(of_keys[ignored[0]], torch.zeros(int(ignored.sum()), 6))


@given(rows=st.integers(1, 6), columns=st.integers(2, 12), seed=SEEDS)
def test_moving_an_ignored_key_does_not_move_the_query_that_ignores_it(rows: int, columns: int, seed: int) -> None:
    queries, keys = unit(rows, 6, seed=seed), unit(columns, 6, seed=seed + 1)
    positives, ignored = tables(rows, columns, seed)
    ignored[0, 0] = True
    moved = keys.clone()
    moved[0] *= -5
    # A row by itself, so that it is averaged over the same number of queries either way.
    for row in range(rows):
        one, other = (
            loss_and_gradients(queries[row, None], k, (positives[row, None], ignored[row, None]), 0.2)
            for k in (keys, moved)
        )
        if ignored[row, 0]:
            assert torch.equal(one[0], other[0])
            torch.testing.assert_close(one[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.float64, torch.bfloat16])
@given(count=st.integers(1, 12), seed=SEEDS, temperature=st.floats(0.05, 5))
def test_one_hot_weights_give_nt_xent(count: int, seed: int, temperature: float, dtype: torch.dtype) -> None:
    z_1, z_2 = (drawn(count, 6, seed=seed + view) for view in (0, 1))
    z = normalize(torch.cat([z_1, z_2]), dim=1)
    partner = torch.arange(2 * count).roll(count)
    pairs = (one_hot(partner, 2 * count).to(dtype) * 3, torch.eye(2 * count, dtype=torch.bool))
    if dtype == torch.bool:
        pairs = (pairs[0] > 0, pairs[1])
    torch.testing.assert_close(info_nce(z, z, pairs, temperature), NTXentLoss(temperature)(z_1, z_2))


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("ignoring", ["table", "column", "nothing"])
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), seed=SEEDS)
def test_columns_say_what_tables_say(rows: int, columns: int, seed: int, ignoring: str, by_block: bool) -> None:
    queries, keys = unit(rows, 6, seed=seed), unit(columns, 6, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    positive, ignored = torch.randint(columns, (2, rows), generator=generator)  # some are both
    whole = {
        "table": tables(rows, columns, seed)[1],
        "column": one_hot(ignored, columns).bool(),
        "nothing": torch.zeros(rows, columns, dtype=torch.bool),
    }[ignoring]
    short = {"table": whole, "column": ignored, "nothing": None}[ignoring]
    soft = tables(rows, columns, seed)[0]
    for positives, table in ((positive, one_hot(positive, columns).float()), (soft, soft)):
        pairs = (
            (lambda block, p=positives: (p[block], None if short is None else short[block]))
            if by_block
            else (positives, short)
        )
        fast = loss_and_gradients(queries, keys, pairs, 0.1)
        slow = loss_and_gradients(queries, keys, (table, whole), 0.1)
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@given(count=st.integers(2, 12), seed=SEEDS)
def test_extreme_temperatures_stay_finite(count: int, seed: int, temperature: float, dtype: torch.dtype) -> None:
    sides = [unit(count, 6, seed=seed + side).to(dtype) for side in (0, 1)]
    number, neighbour = torch.arange(count), torch.eye(count).roll(1, 0) > 0
    for pairs in ((number, None), tables(count, count, seed), (torch.eye(count), neighbour)):
        for value in loss_and_gradients(*sides, pairs, temperature):
            assert value.isfinite().all()
    z_1, z_2 = (side.clone().requires_grad_() for side in sides)
    loss = NTXentLoss(temperature)(z_1, z_2)
    loss.backward()
    assert loss.isfinite()
    assert all(z.grad is not None and z.grad.dtype == dtype and z.grad.isfinite().all() for z in (z_1, z_2))
    if temperature > 1:
        assert float(loss.detach()) == pytest.approx(math.log(2 * count - 1), abs=0.01), "all candidates are alike"


@given(batch=st.integers(1, 6), queued=st.integers(1, 12), seed=SEEDS)
def test_a_patients_own_keys_in_a_queue_count_for_nothing(batch: int, queued: int, seed: int) -> None:
    """MoCo for the first query: its patient's keys in the queue might as well not be there."""
    generator = torch.Generator().manual_seed(seed)
    patients, owners = torch.arange(batch), torch.randint(batch + 1, (queued,), generator=generator)
    queries, own, queue = unit(batch, 6, seed=seed), unit(batch, 6, seed=seed + 1), unit(queued, 6, seed=seed + 2)
    others = patients[:, None] != patients
    ignored = torch.cat([others, patients[:, None] == owners], dim=1)
    _, of_all, _ = loss_and_gradients(queries, torch.cat([own, queue]), (patients, ignored), 0.1)
    for row in range(batch):
        q, table = queries[row, None], (torch.tensor([row]), ignored[row, None])
        loss, of_query, of_keys = loss_and_gradients(q, torch.cat([own, queue]), table, 0.1)
        rest = torch.cat([own[row, None], queue[owners != row]])
        alone = loss_and_gradients(q, rest, (torch.tensor([0]), None), 0.1)
        torch.testing.assert_close(loss, alone[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(of_query, alone[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_all[row] * batch, of_query[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(of_keys[batch:][owners == row], torch.zeros(int((owners == row).sum()), 6))
