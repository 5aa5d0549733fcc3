"""Gathering over ranks: the rows, their order, and the gradients that come back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medclr.distributed import gather, is_distributed, rank, world_size
from medclr.errors import ConfigError
from tests.distributed.ranks import RankError
from tests.distributed.ranks import run_ranks as run_in

Runner = Callable[..., list[Any]]
RANKS = 2
ROWS = 4
WIDTH = 6
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8)


def rows_of(rank: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(ROWS * 3 * 2).reshape(ROWS, 3, 2) % 5 + rank).to(dtype)


def gather_everything() -> dict[str, Any]:
    gathered = {str(dtype): gather(rows_of(rank(), dtype)) for dtype in DTYPES}
    turned = gather(rows_of(rank(), torch.float32).transpose(0, 2))
    return {"rank": rank(), "world_size": world_size(), "distributed": is_distributed(), "turned": turned, **gathered}


def test_every_rank_gets_all_rows_in_the_order_of_ranks(run_ranks: Runner) -> None:
    results = run_ranks(gather_everything, world_size=3)
    for number, result in enumerate(results):
        assert (result["rank"], result["world_size"], result["distributed"]) == (number, 3, True)
        for dtype in DTYPES:
            assert result[str(dtype)].dtype == dtype
            assert torch.equal(result[str(dtype)], torch.cat([rows_of(other, dtype) for other in range(3)]))
        turned = [rows_of(other, torch.float32).transpose(0, 2) for other in range(3)]
        assert torch.equal(result["turned"], torch.cat(turned))


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(RANKS * ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))


def contrast(queries: Tensor, keys: Tensor, first: int) -> Tensor:
    """A row's own key against all keys, averaged over the rows; row 0 owns the key ``first``."""
    scores = nn.functional.normalize(queries) @ nn.functional.normalize(keys).T / 0.1
    return nn.functional.cross_entropy(scores, torch.arange(len(queries)) + first)


def gradients_of_a_rank(detach: bool) -> dict[str, Tensor]:
    """The loss and gradients of this rank's own rows, averaged over the ranks as DistributedDataParallel does."""
    model = network()
    own = slice(rank() * ROWS, (rank() + 1) * ROWS)
    query, key = (model(view[own]) for view in batch())
    keys = gather(key.detach() if detach else key)
    loss = contrast(query, keys, rank() * ROWS)
    loss.backward()
    values = {"loss": loss.detach(), **{name: value.grad for name, value in model.named_parameters()}}
    for value in values.values():
        dist.all_reduce(value)
        value /= world_size()
    return values


def work_of_two_ranks() -> dict[str, Any]:
    """All that two ranks are asked for, in one start of them."""
    return {
        "gathered": gradients_of_a_rank(detach=False),
        "detached": gradients_of_a_rank(detach=True),
        "row": gradient_of_my_rows(),
    }


def gradients_of_one_process() -> dict[str, Tensor]:
    model = network()
    query, key = (model(view) for view in batch())
    loss = contrast(query, key, 0)
    loss.backward()
    return {"loss": loss.detach(), **{name: value.grad for name, value in model.named_parameters()}}


def gradient_of_my_rows() -> Tensor:
    rows = torch.ones(2, 1, requires_grad=True)
    weights = torch.tensor([[1.0], [10.0], [100.0], [1000.0]]) * (rank() + 1)
    (gather(rows) * weights).sum().backward()
    assert rows.grad is not None
    return rows.grad


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_in(tmp_path_factory.mktemp("ranks"), work_of_two_ranks)


def test_two_ranks_learn_what_one_process_learns_from_the_joined_batch(two_ranks: list[dict[str, Any]]) -> None:
    expected = gradients_of_one_process()
    for result in two_ranks:
        assert result["gathered"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(result["gathered"][name], value, rtol=1e-10, atol=1e-12)


def test_a_gather_without_gradients_would_learn_something_else(two_ranks: list[dict[str, Any]]) -> None:
    expected = gradients_of_one_process()
    for result in two_ranks:
        torch.testing.assert_close(result["detached"]["loss"], expected["loss"])
        assert not torch.allclose(result["detached"]["0.weight"], expected["0.weight"], rtol=0.1)


def test_a_row_gets_the_sum_of_the_gradients_of_all_ranks(two_ranks: list[dict[str, Any]]) -> None:
    assert [result["row"].tolist() for result in two_ranks] == [[[3.0], [30.0]], [[300.0], [3000.0]]]


def test_one_process_gathers_its_own_rows_untouched() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather(rows) is rows
    assert (rank(), world_size(), is_distributed()) == (0, 1, False)


def test_a_group_of_one_rank_is_one_process(run_ranks: Runner) -> None:
    (result,) = run_ranks(gather_everything, world_size=1)
    assert (result["rank"], result["world_size"], result["distributed"]) == (0, 1, False)
    assert torch.equal(result["torch.float32"], rows_of(0, torch.float32))


def refuse_in_the_second_rank() -> Tensor:
    if rank() == 1:
        raise ConfigError("The second rank refuses.", got=1, wanted=0, fix="Run one rank.")
    return gather(torch.zeros(1))


def test_what_a_rank_raises_reaches_the_test(run_ranks: Runner) -> None:
    with pytest.raises(RankError, match=r"rank 1:(.|\n)*ConfigError: The second rank refuses\."):
        run_ranks(refuse_in_the_second_rank)


def never_end() -> None:
    time.sleep(600)


def test_ranks_that_never_end_are_killed(run_ranks: Runner) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="never_end has not ended in 2 ranks after 2 s"):
        run_ranks(never_end, timeout=2)
    assert time.monotonic() - start < 30


def test_ranks_start_without_monai() -> None:
    """Each rank is a process of its own; MONAI's seconds of imports are left to those who need them."""
    program = "import sys, medclr.distributed; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0
