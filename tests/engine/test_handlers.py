from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from medclr import keys
from medclr.engine import ContrastLog, Curves, EmbeddingMetric, Progress, StepSchedule, ValidationLog, handlers
from medclr.engine.trainer import VIEWS
from medclr.errors import ConfigError
from medclr.geometry import View

BATCH, WIDTH = 6, 5


def schedule_of(network: nn.Module) -> LambdaLR:
    """A learning rate of 1 / (steps done + 1)."""
    return LambdaLR(torch.optim.SGD(network.parameters(), lr=1.0), lambda step: 1 / (step + 1))


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All points that TensorBoard's files hold, by curve."""
    events = events_of(folder)
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def pictures(folder: Path) -> dict[str, list[tuple[int, int, int]]]:
    """Step, height and width of all pictures, by name."""
    events = events_of(folder)
    return {
        tag: [(point.step, point.height, point.width) for point in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


# The schedule


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 10), (2, 6), (5, 2), (7, 2)])
def test_the_schedule_moves_with_the_optimizer_rather_than_the_batches(accumulation: int, steps: int) -> None:
    network = nn.Linear(1, 1)
    scheduler = schedule_of(network)
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=[{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}] * 5,
        network=network,
        optimizer=scheduler.optimizer,
        loss_function=nn.MSELoss(),
        accumulation_steps=accumulation,
        train_handlers=[StepSchedule(scheduler)],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        trainer.run()
    assert scheduler.last_epoch == steps
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(1 / (steps + 1))


def test_each_step_is_taken_at_the_learning_rate_of_its_number() -> None:
    weight = nn.Parameter(torch.zeros(()))
    network = nn.ParameterList([weight])
    scheduler = schedule_of(network)
    StepSchedule(scheduler).attach(Engine(lambda engine, batch: None))
    moved = []
    for _ in range(4):
        before, weight.grad = weight.item(), torch.ones(())
        scheduler.optimizer.step()
        moved.append(before - weight.item())
    assert moved == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_a_step_that_the_scaler_skips_moves_no_schedule() -> None:
    network = nn.Linear(1, 1)
    scheduler, scaler = schedule_of(network), torch.amp.GradScaler("cpu", init_scale=4.0)
    StepSchedule(scheduler).attach(Engine(lambda engine, batch: None))
    for gradient, steps in ((1.0, 1), (math.inf, 1), (math.nan, 1), (2.0, 2)):
        scheduler.optimizer.zero_grad()
        scaler.scale(network(torch.ones(1, 1)) * gradient).sum().backward()
        scaler.step(scheduler.optimizer)
        scaler.update()
        assert scheduler.last_epoch == steps


def test_a_step_without_any_gradient_moves_no_schedule() -> None:
    network = nn.Linear(1, 1)
    scheduler = schedule_of(network)
    StepSchedule(scheduler).attach(Engine(lambda engine, batch: None))
    for gradients, steps in (((1.0, 1.0), 1), ((None, None), 1), ((None, 1.0), 2)):
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
        scheduler.optimizer.step()
        assert scheduler.last_epoch == steps


# The log of training


def view_of(seed: int, *, invalid: float = 0.0) -> View:
    image = torch.rand(BATCH, 2, 6, 8, 10, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(BATCH, 1, 6, 8, 10, dtype=torch.bool)
    valid[:, :, : round(6 * invalid)] = False
    return View(
        image=image,
        affine=torch.eye(4).repeat(BATCH, 1, 1),
        valid=valid,
        channels=torch.ones(BATCH, 2, dtype=torch.bool),
        key=torch.zeros(BATCH, 5, dtype=torch.int64),
    )


def projections_of(step: int) -> Tensor:
    return torch.randn(BATCH, 2, WIDTH, generator=torch.Generator().manual_seed(step))


def output_of(step: int) -> dict[str, Any]:
    views = view_of(1, invalid=1 / 3), view_of(2)
    return {
        "image": views[0],
        VIEWS: views,
        "label": {},
        "pred": {keys.PROJECTIONS: projections_of(step)},
        "loss": torch.tensor(1.0 / step),
        "plateau": torch.tensor(2.0),
        "by_sample": torch.ones(BATCH),
        "note": "text",
    }


def contrasting(
    log: ContrastLog, make: Callable[[int], Any] = output_of, *, batches: int = 6, epochs: int = 1
) -> Engine:
    engine = Engine(lambda engine, batch: make(engine.state.iteration))
    log.attach(engine)
    log.curves.attach(engine)
    engine.run(range(batches), max_epochs=epochs)
    return engine


def log_of(folder: Path, **settings: Any) -> ContrastLog:
    return ContrastLog(Curves(folder), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.25), **settings)


def slow_health(z: NDArray[Any]) -> dict[str, float]:
    """The four numbers as their papers define them, one vector or pair at a time."""
    unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
    flat = unit.reshape(-1, unit.shape[-1])
    values = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False)
    share = values / values.sum()
    first = unit[:, 0]
    potentials = [np.exp(-2 * np.sum((first[i] - first[j]) ** 2)) for i in range(len(first)) for j in range(i)]
    return {
        "effective_rank": float(np.exp(-np.sum(share * np.log(share)))),
        "dimension_std": float(np.mean([flat[:, d].std() for d in range(flat.shape[1])]) * flat.shape[1] ** 0.5),
        "alignment": float(np.mean([np.sum((a - b) ** 2) for a, b in unit])),
        "uniformity": float(np.log(np.mean(potentials))),
    }


def test_each_curve_has_a_point_every_few_steps(tmp_path: Path) -> None:
    engine = contrasting(log_of(tmp_path, interval=3), batches=4, epochs=2)
    found = curves(tmp_path)
    health = {"effective_rank", "dimension_std", "alignment", "uniformity"}
    names = {"loss", "plateau", "learning_rate", "padding"} | health
    assert set(found) == {f"train/{name}" for name in names}
    assert all([step for step, _ in points] == [3, 6] for points in found.values())
    assert [value for _, value in found["train/loss"]] == pytest.approx([1 / 3, 1 / 6])
    assert {value for _, value in found["train/learning_rate"]} == {0.25}
    assert [value for _, value in found["train/padding"]] == pytest.approx([1 / 3, 1 / 3])
    for place, step in enumerate((3, 6)):
        for name, value in slow_health(projections_of(step).double().numpy()).items():
            assert found[f"train/{name}"][place][1] == pytest.approx(value, rel=1e-4), name
    assert set(engine.state.metrics) == {f"train_{name}" for name in names}
    for name in names:
        assert engine.state.metrics[f"train_{name}"] == pytest.approx(found[f"train/{name}"][-1][1], rel=1e-6)


def test_health_says_when_the_projections_collapsed(tmp_path: Path) -> None:
    def collapsed(step: int) -> dict[str, Any]:
        return {**output_of(step), "pred": {keys.PROJECTIONS: torch.ones(BATCH, 2, WIDTH)}}

    metrics = contrasting(log_of(tmp_path, interval=1), collapsed).state.metrics
    assert metrics["train_effective_rank"] == 1
    assert metrics["train_dimension_std"] == pytest.approx(0, abs=1e-6)
    assert metrics["train_uniformity"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("pred", [torch.zeros(BATCH, WIDTH), {keys.FEATURES: torch.zeros(BATCH, 2, WIDTH)}], ids=type)
def test_a_method_without_projections_has_the_other_curves(pred: Any, tmp_path: Path) -> None:
    contrasting(log_of(tmp_path, interval=1), lambda step: {**output_of(step), "pred": pred})
    assert set(curves(tmp_path)) == {"train/loss", "train/plateau", "train/learning_rate", "train/padding"}


def test_projections_in_half_precision_are_measured_in_float32(tmp_path: Path) -> None:
    def half(step: int) -> dict[str, Any]:
        return {**output_of(step), "pred": {keys.PROJECTIONS: projections_of(step).bfloat16().requires_grad_()}}

    metrics = contrasting(log_of(tmp_path, interval=1), half, batches=1).state.metrics
    wanted = slow_health(projections_of(1).bfloat16().double().numpy())
    assert {name: metrics[f"train_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [1, 5]), (9, [1])])
def test_pictures_are_drawn_in_the_first_epoch_and_every_few_after_it(
    every: int, epochs: list[int], tmp_path: Path
) -> None:
    contrasting(log_of(tmp_path, pictures=1, picture_interval=every), batches=3, epochs=5)
    drawn = [step for step, *_ in pictures(tmp_path)["views/patient_0"]]
    assert drawn == [3 * epoch for epoch in epochs]  # at the step that the epoch ends with


@pytest.mark.parametrize(("wanted", "drawn"), [(0, 0), (2, 2), (BATCH, BATCH), (99, BATCH)])
def test_there_is_a_picture_for_each_of_the_first_patients_of_a_batch(wanted: int, drawn: int, tmp_path: Path) -> None:
    contrasting(log_of(tmp_path, pictures=wanted), batches=1)
    assert sorted(pictures(tmp_path)) == [f"views/patient_{place}" for place in range(drawn)]


class Album:
    """Stands in for the curves and keeps the pictures as they are."""

    def __init__(self) -> None:
        self.pictures: dict[str, Tensor] = {}

    def add_image(self, name: str, picture: Tensor, step: int) -> None:
        self.pictures[name] = picture


def test_a_picture_shows_the_middle_slices_of_both_views_one_above_the_other(tmp_path: Path) -> None:
    log, album = log_of(tmp_path), Album()
    log.curves = album  # type: ignore[assignment]
    engine = Engine(lambda engine, batch: None)
    engine.state.epoch, engine.state.output = 1, output_of(1)
    log.draw(engine)
    picture = album.pictures["views/patient_2"][0]
    half = picture.shape[0] // 2
    assert picture.shape == (2 * half, (8 + 2) + (6 + 2) + (6 + 2))  # Y, X and X wide, with an edge
    for view, part in zip(engine.state.output[VIEWS], picture.split(half), strict=True):
        image = view.image[2, 0]
        grey = (image - image.min()) / (image.max() - image.min())
        sagittal, coronal, axial = part[:, 1:9], part[:, 11:17], part[:, 19:25]
        for shown, slice_ in ((sagittal, grey[3]), (coronal, grey[:, 4]), (axial, grey[:, :, 5])):
            torch.testing.assert_close(shown[1 : 1 + slice_.shape[1]], slice_.T.flip(0))  # upwards is up


def test_a_constant_view_can_be_drawn(tmp_path: Path) -> None:
    def constant(step: int) -> dict[str, Any]:
        views = tuple(view._replace(image=torch.ones_like(view.image)) for view in output_of(step)[VIEWS])
        return {**output_of(step), VIEWS: views}

    contrasting(log_of(tmp_path), constant, batches=1)
    assert len(pictures(tmp_path)) == 4


def test_an_output_without_views_is_not_drawn(tmp_path: Path) -> None:
    contrasting(log_of(tmp_path), lambda step: {k: v for k, v in output_of(step).items() if k != VIEWS}, batches=1)
    assert pictures(tmp_path) == {}


def test_points_are_on_the_disk_where_a_guard_stops_the_run(tmp_path: Path) -> None:
    def stop(engine: Engine) -> None:
        raise ValueError("stopped")

    engine = Engine(lambda engine, batch: output_of(1))
    log_of(tmp_path, interval=1).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)
    with pytest.raises(ValueError, match="stopped"):
        engine.run(range(9), max_epochs=1)
    assert [step for step, _ in curves(tmp_path)["train/loss"]] == [1, 2]


def test_a_loss_that_is_no_number_is_logged_as_it_is(tmp_path: Path) -> None:
    def bad(step: int) -> dict[str, Any]:
        pred = {keys.PROJECTIONS: projections_of(step) * math.nan}
        return {**output_of(step), "pred": pred, "loss": torch.tensor(math.nan)}

    contrasting(log_of(tmp_path, interval=1), bad, batches=2)
    found = curves(tmp_path)
    assert [step for step, _ in found["train/loss"]] == [1, 2]
    assert all(math.isnan(value) for name in ("loss", "effective_rank") for _, value in found[f"train/{name}"])


@pytest.mark.parametrize("settings", [{"interval": 0}, {"interval": -1}, {"picture_interval": 0}], ids=str)
def test_an_unusable_interval_is_refused(settings: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="interval"):
        log_of(tmp_path, **settings)


def test_rank_0_alone_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("medclr.distributed.rank", lambda: 1)
    engine = contrasting(log_of(tmp_path / "train", interval=1))
    ValidationLog(EmbeddingMetric(), Curves(tmp_path / "validation")).attach(engine)
    Progress(lambda: "summary").attach(engine)
    capsys.readouterr()
    engine.run([0], max_epochs=2)
    assert list(tmp_path.iterdir()) == []
    assert engine.state.metrics == {}
    assert capsys.readouterr().err == ""


# The log of validation


def embedded(seed: int) -> list[dict[str, Tensor]]:
    vectors = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(seed))
    return [{"image": vector, "label": torch.tensor([place // 2])} for place, vector in enumerate(vectors)]


def validating(metric: EmbeddingMetric, log: ValidationLog, data: list[dict[str, Tensor]]) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=data,
        network=nn.Identity(),
        key_val_metric={metric.key: metric},
        val_handlers=[log],
        decollate=False,
    )


def test_a_report_is_logged_at_the_training_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, metric = nn.Linear(1, 1), EmbeddingMetric()
    scheduler = schedule_of(network)
    evaluator = validating(metric, ValidationLog(metric, Curves(tmp_path), scheduler), embedded(0))
    reports = []
    for steps in (0, 3):
        for _ in range(steps):
            scheduler.optimizer.step()
            scheduler.step()
        with caplog.at_level(logging.INFO):
            evaluator.run()
        reports.append(dict(metric.report))
    assert "pair_recall_low" in reports[0]
    assert len(list(tmp_path.iterdir())) == 1  # one file for all validations
    for name, value in reports[0].items():
        points = curves(tmp_path)[f"validation/{name}"]
        assert [step for step, _ in points] == [0, 3]
        assert points[0][1] == pytest.approx(value, rel=1e-5)
    assert evaluator.state.metrics.items() >= reports[1].items()
    for step in (0, 3):
        assert f"held-out patients at step {step}: " in caplog.text
    assert f"effective_rank {reports[0]['effective_rank']:.4g}" in caplog.text


def test_a_validation_by_itself_is_step_0(tmp_path: Path) -> None:
    metric = EmbeddingMetric("effective_rank")
    validating(metric, ValidationLog(metric, Curves(tmp_path)), embedded(1)).run()
    assert curves(tmp_path)["validation/effective_rank"] == [(0, pytest.approx(metric.report["effective_rank"]))]


# Progress


class Bars:
    """What the bars of a test wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text = io.StringIO()
        self.made: list[Any] = []
        original = handlers.tqdm

        def tqdm(*args: Any, **settings: Any) -> Any:
            bar = original(*args, **settings, file=self.text, mininterval=0)
            self.made.append(bar)
            return bar

        monkeypatch.setattr(handlers, "tqdm", tqdm)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    return Bars(monkeypatch)


def loss_of(step: int) -> dict[str, Tensor]:
    return {"loss": torch.tensor(float(step))}


def training(progress: Progress, make: Callable[[int], Any] = loss_of) -> Engine:
    engine = Engine(lambda engine, batch: make(engine.state.iteration))
    progress.attach(engine)
    return engine


def test_the_bar_counts_all_steps_of_the_run_and_shows_the_loss_of_the_first_and_every_tenth(bars: Bars) -> None:
    training(Progress()).run(range(7), max_epochs=3)
    (bar,) = bars.made
    assert (bar.n, bar.total, bar.desc) == (21, 21, "training")
    text = bars.text.getvalue()
    assert "epoch=1, loss=1.000" in text
    assert "epoch=2, loss=10.000" in text
    assert "epoch=3, loss=20.000" in text
    assert "loss=2.000" not in text


def test_the_bar_can_have_another_title(bars: Bars) -> None:
    training(Progress(title="segmenting")).run([0], max_epochs=1)
    assert bars.made[0].desc == "segmenting"


def test_a_resumed_run_starts_where_it_was(bars: Bars, caplog: pytest.LogCaptureFixture) -> None:
    engine = training(Progress())
    engine.load_state_dict({"epoch": 2, "epoch_length": 4, "max_epochs": 3})
    with caplog.at_level(logging.INFO):
        engine.run(range(4))
    (bar,) = bars.made
    assert (bar.initial, bar.n, bar.total) == (8, 12, 12)
    assert "4 steps" in caplog.text


@pytest.mark.parametrize("output", [None, [{"loss": 1.0}], {"pred": torch.zeros(1)}, torch.zeros(2)], ids=str)
def test_an_output_without_a_loss_is_counted_all_the_same(output: Any, bars: Bars) -> None:
    training(Progress(), lambda step: output).run(range(3), max_epochs=1)
    assert bars.made[0].n == 3
    assert "loss" not in bars.text.getvalue()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "medclr.engine.handlers"]


def test_the_summary_follows_the_steps_line_by_line(bars: Bars, caplog: pytest.LogCaptureFixture) -> None:
    engine = training(Progress(lambda: "9 scans in use\n1 scans quarantined"))
    with caplog.at_level(logging.INFO):
        engine.run(range(2), max_epochs=2)
    first, *rest = told(caplog)
    assert first.startswith("4 steps, 0.0")
    assert rest == ["9 scans in use", "1 scans quarantined"]


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_time_for_data_and_time_for_steps_are_told_apart_and_validation_counts_as_neither(
    bars: Bars, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("medclr.engine.handlers.time", clock)

    def passing(seconds: float) -> None:
        clock.now += seconds

    def data() -> Any:
        for batch in range(4):
            passing(2.0)
            yield batch

    engine = Engine(lambda engine, batch: passing(5.0))
    Progress().attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: passing(1000.0))
    for _ in range(2):  # a second run is measured by itself
        with caplog.at_level(logging.INFO):
            engine.run(data(), max_epochs=1, epoch_length=4)
    assert told(caplog) == ["4 steps, 7.000 s a step (2.000 s of it waiting for data)"] * 2


def test_the_bar_is_closed_when_a_run_is_stopped(bars: Bars, caplog: pytest.LogCaptureFixture) -> None:
    engine = training(Progress())
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate())
    with caplog.at_level(logging.INFO):
        engine.run(range(9), max_epochs=1)
    (bar,) = bars.made
    assert bar.disable  # as tqdm marks what is closed
    assert "2 steps" in caplog.text


def test_the_bar_of_a_run_that_fails_or_is_stopped_is_closed_and_the_error_comes_through() -> None:
    progress = Progress()
    engine = training(progress)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run(range(5))
    assert progress.bar is not None
    assert progress.bar.disable
    stopped = Progress()
    engine = training(stopped)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate(skip_completed=True))
    engine.run(range(5))
    assert stopped.bar is not None
    assert stopped.bar.disable
