from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from medclr.distributed import any_rank, barrier, rank, text_of_rank_0
from medclr.engine import random_state
from medclr.engine.run_state import together
from medclr.errors import ConfigError, MedclrError

Runner = Callable[..., list[Any]]


def agree() -> dict[str, Any]:
    texts = [text_of_rank_0(text) for text in (f"000012_step_{rank()}", "" if rank() == 0 else "other", "ä" * 90)]
    flags = any_rank([rank() == 1, False, True])
    barrier()
    return {"texts": texts, "flags": flags, "outcome": fails_on(1)}


def fails_on(who: int) -> str:
    try:
        with together():
            if rank() == who:
                raise ConfigError("A bad setting.", got=1, wanted=2, fix="Set 2.")
    except MedclrError as error:
        return error.problem
    return "passed"


def test_ranks_agree_on_flags_texts_and_failures(run_ranks: Runner) -> None:
    results = run_ranks(agree)
    for result in results:
        assert result["texts"] == ["000012_step_0", "", "ä" * 90]
        assert result["flags"] == [True, False, True]
    assert [result["outcome"] for result in results] == ["Another rank has failed.", "A bad setting."]


def random_numbers() -> list[float]:
    torch.manual_seed(rank())
    values = []
    for state in random_state.of_all_ranks(random_state.take(), torch.device("cpu")):
        random_state.put_back(state)
        values.append(float(torch.rand(())))
    return values


def test_the_random_states_of_all_ranks_come_together(run_ranks: Runner) -> None:
    expected = [float(torch.rand((), generator=torch.Generator().manual_seed(number))) for number in (0, 1)]
    assert run_ranks(random_numbers) == [expected, expected]


def test_one_process_agrees_with_itself() -> None:
    barrier()
    assert any_rank([True, False]) == [True, False]
    assert text_of_rank_0("text") == "text"
    assert fails_on(1) == "passed"
    with pytest.raises(ConfigError, match="A bad setting"), together():
        raise ConfigError("A bad setting.", got=1, wanted=2, fix="Set 2.")
