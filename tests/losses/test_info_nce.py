from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import ContrastiveLoss
from torch import Tensor
from torch.nn.functional import normalize

from medclr.errors import ConfigError
from medclr.losses import NTXentLoss, info_nce
from medclr.losses import info_nce as package_function

MODULE = sys.modules[package_function.__module__]


def slow_info_nce(queries: Tensor, keys: Tensor, positives: Tensor, ignored: Tensor, temperature: float) -> Tensor:
    """The formula of the docstring, one pair at a time, in float64, differentiated by autograd."""
    losses = []
    for i in range(len(queries)):
        candidates = [j for j in range(len(keys)) if not ignored[i, j]]
        weights = {j: float(positives[i, j]) for j in candidates if positives[i, j] > 0}
        if not weights:
            continue
        similarity = {j: (queries[i] @ keys[j]) / temperature for j in candidates}
        largest = max(float(value.detach()) for value in similarity.values())
        total = torch.stack([(value - largest).exp() for value in similarity.values()]).sum()
        terms = [weight * (similarity[j] - largest - total.log()) for j, weight in weights.items()]
        losses.append(-torch.stack(terms).sum() / sum(weights.values()))
    return torch.stack(losses).mean() if losses else (queries.sum() + keys.sum()) * 0


def embeddings(count: int, width: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def tables(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, columns, generator=generator)
    if kind == "one hot":
        positives = torch.nn.functional.one_hot(torch.arange(rows) % columns, columns).float()
        return positives, torch.zeros(rows, columns, dtype=torch.bool)
    if kind == "soft":
        return torch.where(drawn > 0.5, drawn * 10, 0.0), torch.zeros(rows, columns, dtype=torch.bool)
    ignored = torch.rand(rows, columns, generator=generator) < 0.4
    positives = torch.where(drawn > 0.6, drawn, 0.0)  # some of them ignored
    if kind == "rows without positives":
        positives[::2] = 0
        ignored[1] = True  # nothing is left of this row
    return positives, ignored


def both(
    queries: Tensor, keys: Tensor, pairs: tuple[Tensor, Tensor], temperature: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Loss and gradients, of medclr in fp32 and of the slow version in float64."""
    results = []
    for function, dtype in ((info_nce, torch.float32), (slow_info_nce, torch.float64)):
        q, k = (tensor.to(dtype).clone().requires_grad_() for tensor in (queries, keys))
        loss = function(q, k, pairs, temperature) if function is info_nce else slow_info_nce(q, k, *pairs, temperature)
        results.append((loss.detach(), *torch.autograd.grad(loss, (q, k))))
    return results[0], results[1]


def assert_close(fast: tuple[Tensor, ...], slow: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    for one, other in zip(fast, slow, strict=True):
        scale = max(float(other.abs().max()), 1e-6)
        assert float((one.double() - other).abs().max()) <= tolerance * scale


KINDS = ["one hot", "soft", "ignored", "rows without positives"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (5, 9), (9, 4)])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_loss_and_gradients_are_those_of_the_formula(kind: str, rows: int, columns: int, temperature: float) -> None:
    queries, keys = embeddings(rows, seed=1), embeddings(columns, seed=2)
    pairs = tables(kind, rows, columns)
    assert_close(*both(queries, keys, pairs, temperature), tolerance=1e-5)


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5),
    kind=st.sampled_from(KINDS[:3]),
)
def test_loss_and_gradients_are_those_of_the_formula_for_any_tables(
    rows: int, columns: int, seed: int, temperature: float, kind: str
) -> None:
    pairs = tables(kind, rows, columns, seed)
    fast, slow = both(embeddings(rows, seed=seed), embeddings(columns, seed=seed + 1), pairs, temperature)
    for one, other in zip(fast, slow, strict=True):
        assert float((one.double() - other).abs().max()) <= 2e-6 * (1 + 1 / temperature) * max(1, 1 / temperature)


def test_one_tensor_as_queries_and_keys_gets_both_gradients() -> None:
    z = embeddings(6)
    pairs = (torch.roll(torch.eye(6), 3, dims=1), torch.eye(6, dtype=torch.bool))
    fast, slow = z.float().requires_grad_(), z.clone().requires_grad_()
    loss, reference = info_nce(fast, fast, pairs, 0.1), slow_info_nce(slow, slow, *pairs, 0.1)
    assert_close(
        (loss.detach(), *torch.autograd.grad(loss, fast)), (reference.detach(), *torch.autograd.grad(reference, slow))
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_is_given_to_the_side_that_asks_for_it(which: int) -> None:
    sides = [embeddings(4).float(), embeddings(5, seed=1).float()]
    pairs = tables("soft", 4, 5)
    sides[which].requires_grad_()
    info_nce(sides[0], sides[1], pairs, 0.1).mul(3).backward()
    other = [side.detach().clone().requires_grad_() for side in sides]
    info_nce(other[0], other[1], pairs, 0.1).backward()
    assert sides[1 - which].grad is None
    torch.testing.assert_close(sides[which].grad, other[which].grad * 3)


def test_the_scale_of_a_rows_weights_does_not_matter() -> None:
    queries, keys = embeddings(5).float(), embeddings(6, seed=1).float()
    positives, ignored = tables("ignored", 5, 6)
    scaled = positives * torch.tensor([1e-6, 0.1, 1, 50, 1e6])[:, None]
    torch.testing.assert_close(
        info_nce(queries, keys, (positives, ignored), 0.1), info_nce(queries, keys, (scaled, ignored), 0.1)
    )


def test_the_order_of_rows_and_columns_does_not_matter() -> None:
    queries, keys = embeddings(8).float(), embeddings(9, seed=1).float()
    positives, ignored = tables("ignored", 8, 9)
    rows, columns = torch.randperm(8), torch.randperm(9)
    one = [tensor.clone().requires_grad_() for tensor in (queries, keys)]
    other = [queries[rows].requires_grad_(), keys[columns].requires_grad_()]
    losses = (
        info_nce(one[0], one[1], (positives, ignored), 0.1),
        info_nce(other[0], other[1], (positives[rows][:, columns], ignored[rows][:, columns]), 0.1),
    )
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, side) for loss, side in zip(losses, (one, other), strict=True)]
    torch.testing.assert_close(gradients[0][0][rows], gradients[1][0])
    torch.testing.assert_close(gradients[0][1][columns], gradients[1][1])


def test_a_key_that_every_query_ignores_has_no_gradient_and_no_influence() -> None:
    queries, keys = embeddings(5).float(), embeddings(6, seed=1).float().requires_grad_()
    positives, ignored = tables("soft", 5, 6)
    ignored[:, 2] = True
    loss = info_nce(queries, keys, (positives, ignored), 0.1)
    (gradient,) = torch.autograd.grad(loss, keys)
    assert torch.equal(gradient[2], torch.zeros(7))
    assert (gradient[[0, 1, 3, 4, 5]].norm(dim=1) > 0).all()
    moved = keys.detach().clone()
    moved[2] *= -20
    assert torch.equal(info_nce(queries, moved, (positives, ignored), 0.1), loss.detach())


def test_a_query_without_positives_has_no_gradient_and_is_not_counted() -> None:
    queries, keys = embeddings(4).float().requires_grad_(), embeddings(6, seed=1).float()
    positives, ignored = tables("soft", 4, 6)
    positives[1] = 0
    loss = info_nce(queries, keys, (positives, ignored), 0.1)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert torch.equal(gradient[1], torch.zeros(7))
    rest = [0, 2, 3]
    torch.testing.assert_close(
        loss.detach(), info_nce(queries[rest], keys, (positives[rest], ignored[rest]), 0.1).detach()
    )


@pytest.mark.parametrize("everything_ignored", [False, True])
def test_without_any_positive_the_loss_is_0_and_so_is_the_gradient(everything_ignored: bool) -> None:
    queries, keys = embeddings(4).float().requires_grad_(), embeddings(6).float().requires_grad_()
    pairs = (torch.ones(4, 6) * everything_ignored, torch.full((4, 6), everything_ignored))
    loss = info_nce(queries, keys, pairs, 0.005)
    loss.backward()
    assert float(loss.detach()) == 0
    for tensor in (queries, keys):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_embeddings_that_tell_nothing_apart_cost_the_logarithm_of_the_candidates() -> None:
    z = torch.ones(10, 8)
    assert float(NTXentLoss(0.1)(z, z)) == pytest.approx(np.log(19), rel=1e-6)


# Precision


def hard_case(count: int = 32) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Positives that are opposite, negatives that are equal: the largest loss there is."""
    queries = embeddings(count, 16).float()
    keys = torch.roll(queries, 1, dims=0)
    keys[::3] *= -1
    positives, ignored = torch.eye(count), torch.zeros(count, count, dtype=torch.bool)
    positives[4] = 0
    return queries, keys, (positives, ignored)


@pytest.mark.parametrize("temperature", [0.005, 0.001])
def test_a_small_temperature_stays_finite_and_right(temperature: float) -> None:
    queries, keys, pairs = hard_case()
    fast, slow = both(queries, keys, pairs, temperature)
    assert all(bool(tensor.isfinite().all()) for tensor in fast)
    assert float(slow[0]) > 50
    assert_close(fast, slow, tolerance=1e-4)  # fp32 similarities, divided by the temperature


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_fp32_under_autocast(dtype: torch.dtype) -> None:
    queries, keys, pairs = hard_case()
    queries, keys = queries.to(dtype).requires_grad_(), keys.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(queries, keys, pairs, 0.005)
    loss.backward()
    assert loss.dtype == torch.float32
    wanted = [tensor.detach().float().requires_grad_() for tensor in (queries, keys)]
    reference = info_nce(wanted[0], wanted[1], pairs, 0.005)
    reference.backward()
    assert torch.equal(loss, reference)
    for tensor, exact in zip((queries, keys), wanted, strict=True):
        assert tensor.grad.dtype == dtype
        assert torch.equal(tensor.grad, exact.grad.to(dtype))


def test_nt_xent_in_bf16_is_finite_with_gradients_of_its_input() -> None:
    z_1, z_2 = (embeddings(8, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = NTXentLoss(0.005)(z_1, z_2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for z in (z_1, z_2):
        assert z.grad.dtype == torch.bfloat16
        assert z.grad.isfinite().all()
        assert z.grad.abs().max() > 0


# Blocks


@pytest.mark.parametrize("elements", [1, 9, 20, 33, 10**6])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_size_give_the_whole(elements: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = embeddings(7, seed=1), embeddings(9, seed=2)
    positives, ignored = tables(kind, 7, 9)
    asked: list[slice] = []

    def pairs(rows: slice) -> tuple[Tensor, Tensor]:
        asked.append(rows)
        return positives[rows], ignored[rows]

    whole, _ = both(queries, keys, (positives, ignored), 0.1)
    monkeypatch.setattr(MODULE, "BLOCK_ELEMENTS", elements)
    q, k = queries.float().requires_grad_(), keys.float().requires_grad_()
    loss = info_nce(q, k, pairs, 0.1)
    block = max(1, elements // 9)
    assert [rows.start for rows in asked] == list(range(0, 7, block))
    for part, other in zip((loss.detach(), *torch.autograd.grad(loss, (q, k))), whole, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-6)


MEMORY = """
import re, sys, torch
from medclr.losses import NTXentLoss, info_nce

def peak():  # in MB; ru_maxrss would begin at what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def of_views(n):
    views = [torch.randn(n, 128, requires_grad=True) for _ in range(2)]
    return lambda: NTXentLoss(0.1)(*views)

def of_a_queue(n, queued, soft):
    q, k = (torch.randn(length, 128, requires_grad=True) for length in (n, queued))
    number, row = torch.arange(queued), torch.arange(n)
    def pairs(rows):
        apart = number - row[rows, None]
        return torch.exp(-apart.clamp(-9, 9).float() ** 2), apart == 3
    return lambda: info_nce(q, k, pairs if soft else (row, None), 0.1)

def step(case, size):
    loss = of_views(size * 16) if case == "views" else of_a_queue(size, size * 256, case == "soft")
    before = peak()
    loss().backward()
    return peak() - before

step(sys.argv[1], 4)
print(step(sys.argv[1], 256))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("case", ["views", "columns", "soft"])
def test_large_batches_and_queues_need_little_memory(case: str) -> None:
    # 4,096 pairs: 8,192 x 8,192 similarities alone would be 256 MB, and plain autograd keeps several such tables.
    # 65,536 keys: 256 queries' similarities are 64 MB, and so are the keys' gradient and twice their copy in fp32.
    done = subprocess.run([sys.executable, "-c", MEMORY, case], capture_output=True, text=True, check=True, timeout=200)
    assert 1 < float(done.stdout) < {"views": 150, "columns": 200, "soft": 300}[case]


# NT-Xent


def test_nt_xent_differentiates_through_the_normalisation() -> None:
    z_1, z_2 = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    gradients = []
    for function in (
        NTXentLoss(0.3),
        lambda a, b: slow_info_nce(
            normalize(torch.cat([a, b]), dim=1),
            normalize(torch.cat([a, b]), dim=1),
            torch.roll(torch.eye(10), 5, dims=1),
            torch.eye(10, dtype=torch.bool),
            0.3,
        ),
    ):
        a, b = z_1.clone().requires_grad_(), z_2.clone().requires_grad_()
        function(a, b).backward()
        gradients.append((a.grad, b.grad))
    assert_close(gradients[0], gradients[1], tolerance=1e-5)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_nt_xent_of_a_row_of_zeros_is_finite(temperature: float) -> None:
    z_1, z_2 = (embeddings(4, seed=seed).float() for seed in (0, 1))
    z_1[2] = 0
    loss = NTXentLoss(temperature)(z_1.requires_grad_(), z_2)
    loss.backward()
    assert loss.isfinite()
    assert z_1.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_monais_contrastive_loss_agrees(temperature: float) -> None:
    z_1, z_2 = torch.randn(16, 24), torch.randn(16, 24)
    torch.testing.assert_close(
        NTXentLoss(temperature)(z_1, z_2), ContrastiveLoss(temperature=temperature)(z_1, z_2), rtol=1e-5, atol=1e-6
    )


# Refusals


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    queries, keys = embeddings(4).float().requires_grad_(), embeddings(4, seed=1).float()
    loss = info_nce(queries, keys, (torch.eye(4), torch.zeros(4, 4, dtype=torch.bool)), 0.1)
    with pytest.raises(ConfigError, match="differentiated once"):
        torch.autograd.grad(loss, queries, create_graph=True)
    loss = NTXentLoss(0.1)(queries, keys)
    with pytest.raises(ConfigError, match="differentiated once"):
        torch.autograd.grad(loss, queries, create_graph=True)


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), float("inf"), None, "0.1"])
def test_an_unusable_temperature_is_refused(temperature: Any) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        NTXentLoss(temperature)
    z = embeddings(3).float()
    with pytest.raises(ConfigError, match="temperature"):
        info_nce(z, z, (torch.eye(3), torch.zeros(3, 3, dtype=torch.bool)), temperature)


@pytest.mark.parametrize(
    ("queries", "keys"), [((3, 4), (3, 5)), ((3,), (3,)), ((3, 4, 1), (3, 4, 1)), ((3, 4), (3, 2, 4))]
)
def test_embeddings_that_do_not_fit_are_refused(queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        info_nce(torch.zeros(queries), torch.zeros(keys), (torch.zeros(3, 3), torch.zeros(3, 3) > 0), 0.1)


@pytest.mark.parametrize("shape", [(3, 3), (4, 5), (2, 5), (3, 1), (1, 5), (5, 3)])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("by_block", [False, True])
def test_a_table_that_does_not_fit_is_refused(shape: tuple[int, ...], which: int, by_block: bool) -> None:
    pairs = [torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.bool)]
    pairs[which] = pairs[which].new_zeros(shape)
    with pytest.raises(ConfigError, match=r"\(3, 5\)"):
        info_nce(torch.zeros(3, 4), torch.zeros(5, 4), (lambda rows: tuple(pairs)) if by_block else tuple(pairs), 0.1)


@pytest.mark.parametrize(
    ("positives", "ignored"),
    [
        (torch.zeros(3), None),
        (torch.zeros(3, dtype=torch.int32), None),
        (torch.zeros(5, dtype=torch.int64), None),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3)),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(3, 5), torch.zeros(3, 5)),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.bool)),
    ],
)
def test_columns_and_tables_of_another_type_are_refused(positives: Tensor, ignored: Tensor | None) -> None:
    with pytest.raises(ConfigError, match=r"columns of int64"):
        info_nce(torch.zeros(3, 4), torch.zeros(5, 4), (positives, ignored), 0.1)


@pytest.mark.parametrize(
    ("one", "other"), [((3, 4), (4, 4)), ((3, 4), (3, 5)), ((4,), (4,)), ((2, 3, 4), (2, 3, 4)), ((0, 4), (0, 4))]
)
def test_views_that_do_not_match_are_refused(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="views"):
        NTXentLoss()(torch.zeros(one), torch.zeros(other))
