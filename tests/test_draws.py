"""Draws depend on their key alone, look random, and never change silently."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medclr.draws import KEY_FIELDS, draw_key, generator, shuffled, stable_seed, torch_generators, uniform

CPU = torch.device("cpu")
MANY = 20_000
# Where a test below asks for a p-value, the numbers are the same in every run: it passes always or never.
UNLIKELY = 1e-4

keys = st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * len(KEY_FIELDS))


def keys_that_count(field: str, count: int = MANY) -> torch.Tensor:
    """Draw keys (count, 5) that differ in one field alone, by one from each to the next."""
    table = torch.tensor([[3, 1, 4, 1, 5]]).repeat(count, 1)
    table[:, KEY_FIELDS.index(field)] = torch.arange(count)
    return table


def slow_uniform(key: tuple[int, ...], purpose: str, count: int) -> list[float]:
    """The same numbers from Python's own integers, one at a time."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    state = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    for field in key:
        state = split_mix(state + golden + field & mask)
    return [(split_mix(state + golden * step & mask) >> 11) / 2**53 for step in range(1, count + 1)]


def split_mix(state: int) -> int:
    mask = 2**64 - 1
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    return state ^ state >> 31


def test_the_slow_reference_is_splitmix64() -> None:
    # The numbers that SplitMix64's published C code gives for the seed 1234567.
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [split_mix(1234567 + golden * step & mask) for step in range(1, 5)] == published


@given(keys, st.text(max_size=12), st.integers(0, 5))
def test_numbers_are_those_of_the_slow_reference(key: tuple[int, ...], purpose: str, count: int) -> None:
    assert uniform(draw_key(*key), purpose, count).tolist() == slow_uniform(key, purpose, count)


def test_a_key_holds_its_fields_in_order() -> None:
    key = draw_key(seed=1, epoch=2, place=3, occurrence=4, view=5)
    assert key.dtype == torch.int64
    assert dict(zip(KEY_FIELDS, key.tolist(), strict=True)) == {
        "seed": 1,
        "epoch": 2,
        "place": 3,
        "occurrence": 4,
        "view": 5,
    }


@given(st.lists(keys, min_size=1, max_size=6), st.integers(1, 4))
def test_a_key_gives_its_numbers_in_any_company(rows: list[tuple[int, ...]], count: int) -> None:
    together = uniform(torch.tensor(rows), "crop", count)
    alone = [uniform(draw_key(*row), "crop", count) for row in rows]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(uniform(torch.tensor(rows)[None], "crop", count)[0], together)
    assert torch.equal(uniform(torch.tensor(rows), "crop", count + 3)[:, :count], together)


@given(keys, st.integers(0, 50))
def test_numbers_lie_from_zero_to_below_one(key: tuple[int, ...], count: int) -> None:
    numbers = uniform(draw_key(*key), "crop", count)
    assert numbers.dtype == torch.float64
    assert numbers.shape == (count,)
    assert bool(((numbers >= 0) & (numbers < 1)).all())


def chi_square(numbers: np.ndarray, bins: int = 50) -> float:
    """How likely it is that even numbers fill the bins at least as unevenly."""
    return float(stats.chisquare(np.histogram(numbers, bins, (0, 1))[0]).pvalue)


@pytest.mark.parametrize("field", KEY_FIELDS)
def test_numbers_are_even_over_the_values_of_a_field(field: str) -> None:
    numbers = uniform(keys_that_count(field), "crop", 2).numpy()
    assert chi_square(numbers[:, 0]) > UNLIKELY
    assert chi_square(numbers[:, 1]) > UNLIKELY


def are_independent(first: np.ndarray, second: np.ndarray, bins: int = 12) -> bool:
    """Whether two columns of numbers neither rise together nor favour any cell of their joint table."""
    table = np.histogram2d(first, second, bins, ((0, 1), (0, 1)))[0].ravel()
    correlation = stats.pearsonr(first, second)
    return bool(correlation.pvalue > UNLIKELY and stats.chisquare(table).pvalue > UNLIKELY)


def test_dependence_would_be_noticed() -> None:
    numbers = uniform(keys_that_count("place"), "crop", 2).numpy()
    assert are_independent(numbers[:, 0], numbers[:, 1])
    assert not are_independent(numbers[:, 0], numbers[:, 0])
    assert not are_independent(numbers[:, 0], 1 - numbers[:, 0])
    assert not are_independent(numbers[:, 0], (numbers[:, 0] * 4) % 1)
    assert not are_independent(numbers[:, 0], 0.95 * numbers[:, 1] + 0.05 * numbers[:, 0])
    assert chi_square(numbers[:, 0] ** 1.1) < UNLIKELY


@pytest.mark.parametrize("field", KEY_FIELDS)
def test_neighbouring_values_of_a_field_are_independent(field: str) -> None:
    table = keys_that_count(field)
    neighbour = table.clone()
    neighbour[:, KEY_FIELDS.index(field)] += 1
    assert are_independent(uniform(table, "crop")[:, 0].numpy(), uniform(neighbour, "crop")[:, 0].numpy())


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(KEY_FIELDS, 2)])
def test_fields_do_not_stand_in_for_each_other(first: str, second: str) -> None:
    one, other = uniform(keys_that_count(first), "crop")[:, 0], uniform(keys_that_count(second), "crop")[:, 0]
    # The two tables meet where the counting field has the other table's fixed value; elsewhere they share nothing.
    assert int((one == other).sum()) <= 1
    assert are_independent(one.numpy(), other.numpy())


@pytest.mark.parametrize(("first", "second"), [("rotation", "scale"), ("noise", "noise "), ("a", "b"), ("", "x")])
def test_purposes_are_independent(first: str, second: str) -> None:
    table = keys_that_count("place")
    assert are_independent(uniform(table, first)[:, 0].numpy(), uniform(table, second)[:, 0].numpy())


def test_successive_numbers_of_a_key_are_independent() -> None:
    numbers = uniform(keys_that_count("place"), "crop", 3).numpy()
    for one, other in itertools.combinations(range(3), 2):
        assert are_independent(numbers[:, one], numbers[:, other])
    long = uniform(draw_key(0, 0, 0, 0, 0), "noise", MANY + 1).numpy()
    assert are_independent(long[:-1], long[1:])


@pytest.mark.parametrize("field", KEY_FIELDS)
def test_one_bit_of_a_key_turns_half_of_the_bits(field: str) -> None:
    table = keys_that_count(field, 200)
    seeds = [one.initial_seed() for one in torch_generators(table, "noise", CPU)]
    turned = []
    for bit in range(0, 63, 7):
        flipped = table.clone()
        flipped[:, KEY_FIELDS.index(field)] ^= 1 << bit
        others = [one.initial_seed() for one in torch_generators(flipped, "noise", CPU)]
        turned += [(one ^ other).bit_count() for one, other in zip(seeds, others, strict=True)]
    # 63 fair coins have a mean of 31.5 and a deviation of 4.
    assert abs(np.mean(turned) - 31.5) < 0.4
    assert abs(np.std(turned) - 3.97) < 0.4


def test_a_million_keys_do_not_collide() -> None:
    table = torch.cartesian_prod(torch.arange(4), torch.arange(50), torch.arange(500), torch.arange(5), torch.arange(2))
    assert len(uniform(table, "crop").unique()) == len(table) == 1_000_000


def test_a_generator_belongs_to_its_key_and_purpose() -> None:
    key, other = draw_key(1, 2, 3, 4, 0), draw_key(1, 2, 3, 4, 1)
    numbers = generator(key, "crop").random(4)
    assert np.array_equal(numbers, generator(key, "crop").random(4))
    assert not np.isin(numbers, generator(key, "noise").random(4)).any()
    assert not np.isin(numbers, generator(other, "crop").random(4)).any()


def test_noise_belongs_to_its_key_in_any_company() -> None:
    table = keys_that_count("place", 3)
    together = [torch.randn(5, generator=one) for one in torch_generators(table, "noise", CPU)]
    for row, noise in zip(table, together, strict=True):
        (alone,) = torch_generators(row[None], "noise", CPU)
        assert torch.equal(torch.randn(5, generator=alone), noise)
    assert len(torch.stack(together).unique()) == 15
    other = torch.randn(5, generator=torch_generators(table, "blur", CPU)[0])
    assert not torch.isin(other, together[0]).any()


@given(st.integers(0, 300), st.lists(st.integers() | st.text(max_size=5), max_size=4))
def test_shuffling_keeps_each_number_once(count: int, seeds: list[int | str]) -> None:
    order = shuffled(count, seeds)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, shuffled(count, seeds))


def test_every_order_is_equally_likely() -> None:
    orders = [tuple(shuffled(4, ["split", seed])) for seed in range(4800)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == len(orders)
    assert stats.chisquare(counts).pvalue > UNLIKELY


def test_seeds_of_other_parts_are_other_seeds() -> None:
    parts = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), ("a", "bc"), ("ab", "c"), ("abc",), ("a", 1), ("a1",), (-1,)]
    seeds = [stable_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numbers_are_those_of_every_earlier_release() -> None:
    """Runs are repeated from their seed. Where one of these figures changes, no earlier run can be repeated: say so."""
    table = torch.stack([draw_key(0, 0, 0, 0, 0), draw_key(7, 3, 123, 1, 2), draw_key(-1, 0, 2**40, 0, 1)])
    assert uniform(table, "rotation", 3).tolist() == [
        [0.651306697231685, 0.9576087857335335, 0.9624876353968995],
        [0.7191681165131938, 0.9627415720690206, 0.5601410967818795],
        [0.46062825236897664, 0.07510104669843543, 0.2558425524924366],
    ]
    assert generator(table[1], "crop").integers(0, 1000, 5).tolist() == [738, 424, 30, 30, 8]
    noise = torch_generators(table, "noise", CPU)
    assert [one.initial_seed() for one in noise] == [919549083331690888, 5992253359060180244, 2766571221644678405]
    assert stable_seed("split", 3) == 2218992558683254930
    assert shuffled(10, ["split", 3]).tolist() == [9, 5, 6, 1, 3, 2, 7, 4, 8, 0]
