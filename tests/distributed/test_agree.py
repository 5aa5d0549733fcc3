from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medclr.distributed import any_rank, barrier, rank, text_of_rank_0
from medclr.engine import ContrastiveTrainer, check_output, random_state
from medclr.engine.agreement import refuse_other_batches, refuse_other_configurations
from medclr.engine.run_state import together
from medclr.errors import ConfigError, MedclrError
from tests.methods.builders import meta_of, method_of, views_of

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


def disagree() -> list[str]:
    other = rank() == 1
    common = {"seed": 0, "output_dir": "/data/a person"}
    return [
        refusal(lambda: refuse_other_batches(3 + other)),
        refusal(lambda: refuse_other_configurations({**common, "learning_rate": 0.1 + other})),
        refusal(lambda: refuse_other_configurations({**common, "queue_size": 4} if other else common)),
        refusal(lambda: refuse_other_configurations(common, "ab" if other else "cd")),
        refusal(lambda: refuse_other_configurations(common, "ab")),
    ]


def refusal(check: Callable[[], None]) -> str:
    try:
        check()
    except ConfigError as error:
        return str(error.got)
    return "passed"


def test_ranks_that_disagree_are_told_in_what(run_ranks: Runner) -> None:
    texts = [
        "batch_size 3, 4",
        "learning_rate of rank 1 other than of rank 0",
        "the keys of rank 1 other than of rank 0",
        "the rows of the datalist of rank 1 other than of rank 0",
        "passed",
    ]
    assert run_ranks(disagree) == [texts, texts]


def test_the_trainer_and_the_check_of_the_output_ask_the_ranks(run_ranks: Runner, tmp_path: Path) -> None:
    assert run_ranks(train_apart, tmp_path) == [["batch_size 2, 3", "seed of rank 1 other than of rank 0"]] * 2


def train_apart(folder: Path) -> list[str]:
    method, samples = method_of("SimCLR"), 2 + rank()
    trainer = ContrastiveTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[0],
        network=method,
        optimizer=torch.optim.SGD(method.parameters(), lr=0.1),
        loss_function=method.contrast,
        prepare_batch=lambda *_, **__: (*views_of(samples)[:1], meta_of([*range(samples)]), views_of(samples)[1:], {}),
    )
    logging.disable()  # ignite writes the traceback of what is expected here
    return [refusal(trainer.run), refusal(lambda: check_output(folder, {"seed": rank()}))]


def test_one_process_has_nobody_to_disagree_with() -> None:
    refuse_other_batches(3)
    refuse_other_configurations({"seed": 0})
