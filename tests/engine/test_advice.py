from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from medclr import keys
from medclr.data import Preprocessing, RandomCrop, ScanReader
from medclr.engine import Advice
from medclr.models import with_norm
from medclr.pairs import PatientPairDataset, SamePatient, SameScan
from tests.engine.test_trainer import RandomPairs, method_of, trainer_of


class SlowPairs(RandomPairs):
    def __getitem__(self, place: int) -> dict[str, Any]:
        time.sleep(0.1)
        return super().__getitem__(place)


class PaddedPairs(RandomPairs):
    """Scans that fill a quarter of their crops."""

    def __getitem__(self, place: int) -> dict[str, Any]:
        item = super().__getitem__(place)
        for name in (keys.CROP_1, keys.CROP_2):
            item[name] = item[name]._replace(inside=torch.tensor([[0, 0, 0], [2, 8, 8]]))
        return item


class ManyPairs(RandomPairs):
    def __len__(self) -> int:
        return 32


def advice_on(caplog: pytest.LogCaptureFixture, *, dataset: Any = None, data: Any = None, **settings: Any) -> list[str]:
    method = settings.pop("method", None) or method_of()
    loader = DataLoader(data or ManyPairs(), batch_size=16)
    trainer = trainer_of(method, train_data_loader=loader, **settings)
    Advice(dataset, warm_up=0).attach(trainer)
    with caplog.at_level(logging.WARNING, logger="medclr.engine.advice"):
        trainer.run()
    return [record.getMessage() for record in caplog.records if record.name == "medclr.engine.advice"]


def test_a_run_that_is_as_it_should_be_gets_no_advice(caplog: pytest.LogCaptureFixture) -> None:
    assert advice_on(caplog) == []


def test_few_negatives_are_pointed_out_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(method_of())
    Advice(warm_up=0).attach(trainer)
    with caplog.at_level(logging.WARNING, logger="medclr.engine.advice"):
        trainer.run()
    (message,) = [record.getMessage() for record in caplog.records if "contrasted" in record.getMessage()]
    assert "7 others" in message
    assert "batch_size" in message


def test_slow_reading_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = advice_on(caplog, data=SlowPairs(), max_epochs=1)[-1:]
    assert "waiting for data" in message
    assert "num_workers" in message


def test_much_padding_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    messages = advice_on(caplog, data=PaddedPairs())
    assert any("75% of the voxels" in message and "roi_size" in message for message in messages)


def test_a_norm_that_leaks_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    method = method_of()
    with_norm(method.encoder, "batch")
    (message,) = advice_on(caplog, method=method)
    assert "norm: group" in message


@pytest.mark.parametrize(("rule", "expected"), [(SamePatient, 1), (SameScan, 0)])
def test_patients_without_a_second_scan_are_pointed_out(
    rule: Callable[[], Any], expected: int, cohort: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    first = {row["patient_id"]: row for row in reversed(cohort)}
    rows = [*first.values(), *[row for row in cohort if row["patient_id"] == "patient 0"][1:]]
    reader = ScanReader(Preprocessing())
    dataset = PatientPairDataset(rows, rule(), crop=RandomCrop((8, 8, 8)), reader=reader)
    messages = advice_on(caplog, dataset=dataset)
    assert len(messages) == expected
    if expected:
        assert "4 of 5 patients have no second scan for SamePatient" in messages[0]
