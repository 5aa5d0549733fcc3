from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader as MonaiDataLoader
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from medclr import distributed, keys
from medclr.engine import ContrastiveTrainer, NonFiniteGuard, StepSchedule
from medclr.errors import ConfigError, MedclrError
from medclr.models import Projector
from tests.distributed.ranks import run_ranks
from tests.engine.test_trainer import Counting, RandomPairs, batches, method_of, prepare, trainer_of

POISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NaN": lambda loss, _: loss * math.nan,
    "infinite": lambda loss, _: loss / 0.0,
    "infinite, with a finite gradient": lambda loss, _: loss + math.inf,
    "finite, with a gradient that is NaN": lambda loss, embeddings: loss + (embeddings.sum() * 0.0).sqrt(),
}


class Poisoned(Counting):
    """The loss of the batches whose numbers are in ``bad`` is spoiled; and there is a batch norm, which remembers."""

    def __init__(self, *bad: int, poison: str = "NaN") -> None:
        template = method_of()
        super().__init__(template.encoder, Projector(template.encoder.out_features, out_features=8, norm="batch"))
        self.bad, self.poison, self.batch = bad, POISONS[poison], 0

    def contrast(self, embeddings: Any, meta: Any) -> dict[str, Tensor]:
        self.batch += 1
        results = super().contrast(embeddings, meta)
        if self.batch in self.bad:
            results[keys.LOSS] = self.poison(results[keys.LOSS], embeddings[keys.PROJECTIONS])
        return results


def adam(method: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(method.parameters(), lr=0.01, weight_decay=0.1)


def halving(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def guarded(method: Counting, guard: NonFiniteGuard | None = None, **settings: Any) -> ContrastiveTrainer:
    settings.setdefault("optimizer", adam(method))
    trainer = trainer_of(method, **settings)
    (guard or NonFiniteGuard()).attach(trainer)
    return trainer


def numbers_of(network: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    """Weights, buffers and moments."""
    yield from network.state_dict().values()
    for state in optimizer.state_dict()["state"].values():
        yield from state.values()


def assert_same(one: Iterator[Tensor], other: Iterator[Tensor]) -> None:
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first, second)


# Skipping


@pytest.mark.parametrize("poison", POISONS)
def test_a_run_with_a_skipped_step_is_the_run_without_its_batch(poison: str) -> None:
    trained, plain = Poisoned(2, 6, poison=poison), Poisoned()
    trainer = guarded(trained, clip_norm=1.0)
    scheduler = halving(trainer.optimizer)
    StepSchedule(scheduler).attach(trainer)
    trainer.run()

    optimizer = adam(plain)
    reference = halving(optimizer)
    for number, batch in enumerate(batches(epochs=2), start=1):
        if number in (2, 6):
            continue
        view_1, meta, (view_2,), _ = prepare()(batch, "cpu")
        optimizer.zero_grad()
        plain.contrast(plain(view_1, view_2), meta)[keys.LOSS].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        reference.step()
    assert_same(numbers_of(trained, trainer.optimizer), numbers_of(plain, optimizer))
    assert trained.progress == pytest.approx([1 / 6, 3 / 6, 4 / 6, 5 / 6])  # no step, no move of a momentum copy
    assert scheduler.state_dict()["last_epoch"] == reference.last_epoch == 4


def test_one_bad_batch_spoils_the_whole_step_that_it_is_accumulated_in() -> None:
    trained, plain = Poisoned(1, 5), Poisoned()  # of the steps (1, 2), (3), (4, 5), (6)
    trainer = guarded(trained, accumulation_steps=2)
    scheduler = halving(trainer.optimizer)
    StepSchedule(scheduler).attach(trainer)
    trainer.run()
    optimizer = adam(plain)
    for number, batch in enumerate(batches(epochs=2), start=1):
        if number in (3, 6):
            view_1, meta, (view_2,), _ = prepare()(batch, "cpu")
            optimizer.zero_grad()
            (plain.contrast(plain(view_1, view_2), meta)[keys.LOSS] / 2).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] /= 2
    assert_same(numbers_of(trained, trainer.optimizer), numbers_of(plain, optimizer))
    assert trained.progress == pytest.approx([3 / 6, 6 / 6])
    assert scheduler.last_epoch == 2
    assert [entry["step"] for entry in trainer.state.skipped_steps] == [2, 5]


def test_the_warning_names_the_step_and_what_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        guarded(Poisoned(2)).run()
        guarded(Poisoned(3, poison="finite, with a gradient that is NaN")).run()
    loss, gradient = caplog.messages
    assert loss.startswith(
        "step 2 is skipped: a loss of nan; 1 of the last 100 steps were skipped, and more than 5 stop"
    )
    assert re.match(r"step 3 is skipped: a loss of 0\.\d+ with a gradient that is no number; 1 of", gradient)


def test_a_healthy_run_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    plain, watched = Poisoned(), Poisoned()
    trainer = trainer_of(plain, optimizer=adam(plain))
    trainer.run()
    other = guarded(watched)
    other.run()
    assert_same(numbers_of(plain, trainer.optimizer), numbers_of(watched, other.optimizer))
    assert other.state.skipped_steps == []
    assert caplog.messages == []


# A gradient scaler


def test_gradients_that_overflow_are_the_scalers_business_and_do_not_count() -> None:
    method = Poisoned()
    trainer = guarded(method, NonFiniteGuard(max_skipped=0), precision="fp16")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    trainer.run()
    assert method.progress == []
    assert trainer.state.skipped_steps == []
    assert trainer.grad_scaler.get_scale() == 2.0**121


@pytest.mark.parametrize("poison", [name for name in POISONS if not name.startswith("finite")])
def test_a_loss_that_is_no_number_is_skipped_under_a_scaler_as_well(poison: str) -> None:
    method = Poisoned(2, poison=poison)
    trainer = guarded(method, precision="fp16", max_epochs=1, clip_norm=1.0)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scheduler = halving(trainer.optimizer)
    StepSchedule(scheduler).attach(trainer)
    seen: list[list[Tensor]] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: seen.append([value.clone() for value in numbers_of(method, trainer.optimizer)]),
    )
    trainer.run()
    assert [entry["step"] for entry in trainer.state.skipped_steps] == [2]
    assert_same(iter(seen[0]), iter(seen[1]))
    assert not all(torch.equal(one, other) for one, other in zip(seen[1], seen[2], strict=True))
    assert method.progress == pytest.approx([1 / 3, 3 / 3])
    assert scheduler.last_epoch == 2


# MONAI's own trainer


class Small(nn.Module):
    """A network with a batch norm: where the loss is no number, its statistics are none either."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def samples(*bad: int, scans: int = 8) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(3)
    images = torch.randn(scans, 3, generator=random)
    return [
        {"image": image * (math.nan if scan in bad else 1.0), "label": torch.ones(1), "scan": scan}
        for scan, image in enumerate(images)
    ]


def segmenting(data: list[dict[str, Any]], guard: NonFiniteGuard, **settings: Any) -> SupervisedTrainer:
    network = Small()
    optimizer = adam(network)
    return SupervisedTrainer(
        device="cpu",
        max_epochs=settings.pop("max_epochs", 2),
        train_data_loader=MonaiDataLoader(data, batch_size=2),
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        train_handlers=[StepSchedule(halving(optimizer)), guard],
        **settings,
    )


@pytest.mark.parametrize(("accumulation", "alone"), [(1, [0, 2, 3]), (2, [2, 3])])
def test_monais_trainer_skips_what_ours_does(accumulation: int, alone: list[int], tmp_path: Path) -> None:
    file = tmp_path / "nonfinite_batches.json"
    trainer = segmenting(samples(3), NonFiniteGuard(path=file), accumulation_steps=accumulation)
    trainer.run()
    plain = Small()
    optimizer = adam(plain)
    data = samples()
    for _ in range(2):
        for place, batch in enumerate(alone):
            image = torch.stack([row["image"] for row in data[2 * batch : 2 * batch + 2]])
            if place % accumulation == 0:
                optimizer.zero_grad()
            (nn.MSELoss()(plain(image), torch.ones(2, 1)) / accumulation).backward()
            if (place + 1) % accumulation == 0:
                optimizer.step()
                optimizer.param_groups[0]["lr"] /= 2
    assert_same(numbers_of(trainer.network, trainer.optimizer), numbers_of(plain, optimizer))
    found = json.loads(file.read_text())
    assert [entry["step"] for entry in found["steps"]] == [2, 6]  # both end a step, accumulated or not
    assert found["scans"] == [{"scan": 2, "steps": 2}, {"scan": 3, "steps": 2}]


def test_a_batch_that_names_no_scans_is_skipped_all_the_same(tmp_path: Path) -> None:
    data = [(row["image"], row["label"]) for row in samples(0, scans=4)]
    trainer = segmenting(data, NonFiniteGuard(path=tmp_path / "bad.json"), max_epochs=1)  # type: ignore[arg-type]
    trainer.run()
    assert json.loads((tmp_path / "bad.json").read_text()) == {
        "steps": [{"step": 1, "loss": "nan", "scans": []}],
        "scans": [],
    }


# Stopping


def test_a_run_that_skips_too_often_is_stopped_and_names_the_scans(tmp_path: Path) -> None:
    file = tmp_path / "run" / "nonfinite_batches.json"
    method = Poisoned(2, 3, 5)  # scans 4 to 7, 8 to 11, 4 to 7
    trainer = guarded(method, NonFiniteGuard(max_skipped=2, path=file))
    with pytest.raises(MedclrError, match="no number") as caught:
        trainer.run()
    message = str(caught.value)
    assert "The loss is no number" in message
    assert "a loss of nan at step 5; 3 of the last 100 steps were skipped" in message
    assert "at most 2" in message
    for hint in ("learning_rate", "warmup", "precision: fp32", str(file)):
        assert hint in caught.value.fix
    assert len(method.progress) == 2
    found = json.loads(file.read_text())
    assert found["steps"] == [
        {"step": 2, "loss": "nan", "scans": [4, 5, 6, 7]},
        {"step": 3, "loss": "nan", "scans": [8, 9, 10, 11]},
        {"step": 5, "loss": "nan", "scans": [4, 5, 6, 7]},
    ]
    assert found["scans"] == [
        {"scan": scan, "steps": steps} for steps, scans in ((2, range(4, 8)), (1, range(8, 12))) for scan in scans
    ]


def test_a_gradient_that_is_no_number_is_told_from_a_loss(tmp_path: Path) -> None:
    method = Poisoned(1, poison="finite, with a gradient that is NaN")
    with pytest.raises(MedclrError, match="The gradient is no number"):
        guarded(method, NonFiniteGuard(max_skipped=0, path=tmp_path / "bad.json")).run()
    (entry,) = json.loads((tmp_path / "bad.json").read_text())["steps"]
    assert 0.0 < entry["loss"] < 3.0


def test_of_an_accumulated_step_only_the_batch_is_named_whose_loss_is_no_number(tmp_path: Path) -> None:
    for poison, scans in (("infinite", range(4, 8)), ("finite, with a gradient that is NaN", range(12))):
        file = tmp_path / f"{poison}.json"
        guarded(Poisoned(2, poison=poison), NonFiniteGuard(path=file), max_epochs=1, accumulation_steps=3).run()
        assert json.loads(file.read_text())["steps"][0]["scans"] == list(scans)


@pytest.mark.parametrize(("window", "stops"), [(3, False), (4, True)])
def test_steps_are_counted_over_the_window_and_remembered_beyond_it(window: int, stops: bool) -> None:
    trainer = guarded(Poisoned(2, 5, 8), NonFiniteGuard(max_skipped=1, window=window), max_epochs=3)
    if stops:
        with pytest.raises(MedclrError, match=f"2 of the last {window} steps"):
            trainer.run()
    else:
        trainer.run()
        assert [entry["step"] for entry in trainer.state.skipped_steps] == [2, 5, 8]


def test_the_window_counts_optimizer_steps_not_batches() -> None:
    settings = {"max_epochs": 2, "accumulation_steps": 3}
    guarded(Poisoned(1, 4), NonFiniteGuard(max_skipped=1, window=1), **settings).run()
    with pytest.raises(MedclrError, match="2 of the last 2 steps"):
        guarded(Poisoned(1, 4), NonFiniteGuard(max_skipped=1, window=2), **settings).run()


def test_memory_of_skipped_steps_is_bounded_by_the_window() -> None:
    trainer = guarded(Poisoned(*range(1, 7)), NonFiniteGuard(max_skipped=4, window=4))
    trainer.run()  # of 4 steps never more than 4 are skipped
    assert [entry["step"] for entry in trainer.state.skipped_steps] == [3, 4, 5, 6]


def test_a_resumed_run_remembers_what_was_skipped(tmp_path: Path) -> None:
    first = guarded(Poisoned(2), max_epochs=1)
    first.run()
    file = io.BytesIO()
    torch.save({**first.state_dict(), "max_epochs": 2}, file)
    file.seek(0)
    path = tmp_path / "bad.json"
    second = guarded(Poisoned(1), NonFiniteGuard(max_skipped=1, path=path))
    second.load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(MedclrError, match="step 4; 2 of the last 100"):
        second.run()
    assert [(entry["step"], entry["loss"]) for entry in json.loads(path.read_text())["steps"]] == [
        (2, "nan"),
        (4, "nan"),
    ]


def test_a_second_run_from_the_start_forgets_the_first() -> None:
    trainer = guarded(Poisoned(2), max_epochs=1)
    trainer.run()
    assert len(trainer.state.skipped_steps) == 1
    trainer.run()
    assert trainer.state.skipped_steps == []


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        guarded(Poisoned(2), NonFiniteGuard(path=tmp_path / "file" / "bad.json")).run()
    failed, skipped = caplog.messages
    assert "cannot be written" in failed
    assert skipped.startswith("step 2 is skipped")
    assert "bad.json" not in skipped


def test_a_real_run_with_an_absurd_learning_rate_ends_in_the_guard() -> None:
    method = method_of()
    with pytest.raises(MedclrError, match="no number"):
        guarded(method, optimizer=torch.optim.SGD(method.parameters(), lr=1e30), max_epochs=40).run()


@pytest.mark.parametrize("settings", [{"max_skipped": -1}, {"window": 0}], ids=str)
def test_unusable_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="guard"):
        NonFiniteGuard(**settings)


# Ranks


def a_run_of_this_rank(folder: str) -> dict[str, Any]:
    """Rank 1 alone has a bad batch, the third of each epoch; the ranks share no scan."""
    rank = distributed.rank()
    data = samples(*((8 + 5,) if rank == 1 else ()), scans=16)[8 * rank : 8 * rank + 8]
    network = Small()
    optimizer = adam(network)
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=DataLoader(data, batch_size=2),
        network=DistributedDataParallel(network),
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        train_handlers=[NonFiniteGuard(max_skipped=1, path=Path(folder) / f"{rank}.json")],
    )
    message = ""
    try:
        trainer.run()
    except MedclrError as error:
        message = str(error)
    return {
        "weights": dict(network.state_dict()),
        "skipped": [[entry["step"], entry["scans"]] for entry in trainer.state.skipped_steps],
        "message": message,
    }


@pytest.mark.slow
def test_all_ranks_skip_and_stop_where_one_has_to(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    results = run_ranks(tmp_path / "ranks", a_run_of_this_rank, str(tmp_path))
    for result in results:
        assert result["skipped"] == [[3, [12, 13]], [7, [12, 13]]]
        assert "step 7; 2 of the last 100" in result["message"]
        for name, value in result["weights"].items():
            assert torch.isfinite(value).all()
            if "running" not in name:  # each rank has its own
                assert torch.equal(value, results[0]["weights"][name])
    assert [path.name for path in tmp_path.glob("*.json")] == ["0.json"]
    assert json.loads((tmp_path / "0.json").read_text())["scans"] == [
        {"scan": 12, "steps": 2},
        {"scan": 13, "steps": 2},
    ]


def test_scans_of_a_pretraining_batch_are_named_once_though_they_have_two_views() -> None:
    trainer = guarded(Poisoned(1), max_epochs=1, train_data_loader=DataLoader(RandomPairs(), batch_size=5))
    trainer.run()
    assert trainer.state.skipped_steps[0]["scans"] == [0, 1, 2, 3, 4]
