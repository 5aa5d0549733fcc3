from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

import medclr
from medclr.engine import STOPPED_EXIT_CODE
from medclr.engine.record import commit_of
from medclr.errors import ConfigError, MedclrError
from tests.engine.runs import BATCH, EPOCHS, PATIENTS, STEPS, Killed, Run, same

A_EPOCH = PATIENTS // BATCH


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """How runs end that nobody disturbs: supervised and contrastive."""
    return {kind: Run(tmp_path_factory.mktemp("whole"), contrastive=kind).go().final() for kind in (False, True)}


@pytest.mark.parametrize(("every", "contrastive"), [(1, False), (2, False), (3, False), (2, True)])
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(
    uninterrupted: dict[bool, dict[str, Any]], tmp_path: Path, every: int, contrastive: bool
) -> None:
    some = 1 + 2 * contrastive
    moments: list[tuple[Any, int]] = [(Events.ITERATION_STARTED, n) for n in range(2, STEPS + 1, some)]
    moments += [(Events.ITERATION_COMPLETED, n) for n in range(2, STEPS + 1, 2 * some)]
    moments += [(event, n) for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED) for n in range(2, EPOCHS + 1)]
    moments += [(Events.COMPLETED, 1)]
    for place, (event, at) in enumerate(moments):
        folder = tmp_path / str(place)
        killed = Run(folder, contrastive=contrastive, every_steps=every).killed(event, at)
        other_start = killed.resumable.folder.names() and not contrastive  # all is in the checkpoint
        ended = Run(folder, contrastive=contrastive, every_steps=every, seed=99 if other_start else 3)
        ended.record.seed = 3
        assert same(ended.go().final(), uninterrupted[contrastive]), f"killed at {event} number {at}"


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    uninterrupted: dict[bool, dict[str, Any]], tmp_path: Path
) -> None:
    steps = 0
    for _ in range(STEPS + 1):
        run = Run(tmp_path, every_steps=1)
        try:
            run.killed(Events.ITERATION_STARTED, 3)  # two steps further each time
        except AssertionError:
            break
        steps += 1
    assert steps >= STEPS // 2 - 1
    assert same(run.final(), uninterrupted[False])


def test_no_step_is_left_out_or_done_twice(tmp_path: Path) -> None:
    first = Run(tmp_path, every_steps=2).killed(Events.ITERATION_STARTED, 8)
    second = Run(tmp_path, every_steps=2).go()
    whole = Run(tmp_path / "whole").go()
    assert [step for step, _ in second.losses] == list(range(7, STEPS + 1))
    assert first.losses[:6] + second.losses == whole.losses


def test_half_an_optimizer_step_is_not_saved(tmp_path: Path) -> None:
    Run(tmp_path, every_steps=1, accumulation=2).killed(Events.ITERATION_STARTED, 4)
    resumed = Run(tmp_path, accumulation=2).go()
    assert resumed.losses[0][0] == 3
    assert same(resumed.final(), Run(tmp_path / "whole", accumulation=2).go().final())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("step", [3, A_EPOCH, STEPS])
def test_a_signal_lets_the_step_finish_then_saves_and_ends_with_a_code_of_its_own(
    uninterrupted: dict[bool, dict[str, Any]], tmp_path: Path, name: str, step: int
) -> None:
    before = signal.getsignal(getattr(signal, name))
    run = Run(tmp_path, every_steps=0)
    run.trainer.add_event_handler(
        Events.ITERATION_STARTED(once=step), lambda: os.kill(os.getpid(), getattr(signal, name))
    )
    with pytest.raises(SystemExit) as ended:
        run.go()
    assert ended.value.code == STOPPED_EXIT_CODE
    assert run.trainer.state.iteration == step
    assert json.loads((tmp_path / "run.json").read_text())["attempts"][0]["outcome"] == f"stopped by {name}"
    assert signal.getsignal(getattr(signal, name)) == before
    assert same(Run(tmp_path).go().final(), uninterrupted[False])


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def twice(engine: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run.trainer.add_event_handler(Events.ITERATION_STARTED(once=2), twice)
    with pytest.raises(KeyboardInterrupt):
        run.go()


def test_a_signal_breaks_off_an_evaluation_which_is_repeated(
    uninterrupted: dict[bool, dict[str, Any]], tmp_path: Path
) -> None:
    run = Run(tmp_path, every_steps=0)
    run.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED(once=1), lambda engine: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(SystemExit):
        run.go()
    assert run.evaluator.state.best_metric_epoch == -1
    assert run.evaluator.state.iteration == 1
    assert same(Run(tmp_path).go().final(), uninterrupted[False])


def test_an_error_between_two_steps_loses_no_step(uninterrupted: dict[bool, dict[str, Any]], tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=0)

    def fail(engine: Any) -> None:
        if engine.state.iteration == 8:
            raise ValueError("a scan that nobody expected")

    run.trainer.add_event_handler(Events.GET_BATCH_STARTED, fail)
    with pytest.raises(ValueError, match="nobody"):
        run.go()
    resumed = Run(tmp_path).go()
    assert resumed.losses[0][0] == 9
    assert same(resumed.final(), uninterrupted[False])
    outcomes = [attempt["outcome"] for attempt in json.loads((tmp_path / "run.json").read_text())["attempts"]]
    assert outcomes == ["failed: ValueError", "completed"]


def test_an_error_within_a_step_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=3)
    run.trainer.add_event_handler(Events.ITERATION_STARTED(once=5), lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.go()
    assert Run(tmp_path).go().losses[0][0] == 4


def test_a_complete_run_is_left_alone_and_goes_on_when_more_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Run(tmp_path).go()
    with caplog.at_level(logging.INFO):
        again = Run(tmp_path).go()
    assert again.losses == []
    assert any("complete (15 steps)" in message for message in caplog.messages)
    assert same(again.final()["network"], first.final()["network"])
    longer = Run(tmp_path, epochs=EPOCHS + 2).go()
    assert [step for step, _ in longer.losses] == list(range(STEPS + 1, STEPS + 2 * A_EPOCH + 1))
    assert longer.scheduler.t_total == STEPS + 2 * A_EPOCH
    expected = longer.scheduler.base_lrs[0] * longer.scheduler.lr_lambdas[0](STEPS + 2 * A_EPOCH)
    assert longer.scheduler.get_last_lr()[0] == pytest.approx(expected)


def test_a_run_stopped_by_the_user_early_is_complete(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    run.go()
    assert run.trainer.state.iteration == 2 * A_EPOCH
    assert Run(tmp_path).go().losses == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rate": 0.02}, "rate: 0.01 -> 0.02"),
        ({"epochs": 2}, "max_epochs: 3 -> 2 (may only rise)"),
        ({"configuration": {"views": ["a", {"sigma": 2}]}}, "views::0: (not there) -> a"),
        ({"digest": "other rows"}, "the datalist: other rows"),
    ],
)
def test_another_configuration_is_refused_with_the_difference_unless_forced(
    tmp_path: Path, settings: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    Run(tmp_path).killed(Events.ITERATION_STARTED, 4)
    with pytest.raises(ConfigError, match="another configuration") as refused:
        Run(tmp_path, **settings).go()
    assert line in str(refused.value)
    assert "resume: force" in refused.value.fix
    with caplog.at_level(logging.WARNING):
        forced = Run(tmp_path, **settings, resume="force").go()
    assert forced.losses[0][0] == 3
    assert any(line in message for message in caplog.messages)


@pytest.mark.parametrize(
    "configuration",
    [
        {"num_workers": 4},
        {"device": "cuda:1"},
        {"output_dir": "elsewhere"},
        {"train": {"dataloader": {"num_workers": 3}, "handlers": [{"_target_": "Another"}]}},
        {"log_interval": 5, "checkpoint_minutes": 1, "resume": "auto"},
    ],
)
def test_what_does_not_change_the_weights_may_change(tmp_path: Path, configuration: dict[str, Any]) -> None:
    Run(tmp_path).killed(Events.ITERATION_STARTED, 4)
    assert Run(tmp_path, configuration=configuration).go().losses[0][0] == 3


def test_a_run_can_start_anew_and_then_goes_on_with_itself(tmp_path: Path) -> None:
    Run(tmp_path, rate=0.5).killed(Events.ITERATION_STARTED, 9)
    Run(tmp_path, resume="never").killed(Events.ITERATION_STARTED, 4)
    assert Run(tmp_path).go().losses[0][0] == 3


def test_epochs_of_another_length_are_refused_even_by_force(tmp_path: Path) -> None:
    Run(tmp_path).killed(Events.ITERATION_STARTED, 4)
    other = Run(tmp_path, resume="force")
    other.trainer.state.epoch_length = 4
    with pytest.raises(ConfigError, match="another length"):
        other.go()


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    Run(tmp_path).killed(Events.ITERATION_STARTED, 4)
    other = Run(tmp_path)
    other.resumable.state.items["network"] = torch.nn.Linear(3, 3)
    with pytest.raises(MedclrError, match="does not fit the run"):
        other.go()


def test_a_full_disk_during_the_run_leaves_the_checkpoint_before_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, every_steps=2)
    write, calls = run.resumable.folder.write, []

    def full(state: Any, about: Any) -> str:
        calls.append(about["step"])
        if about["step"] in (4, 6):
            raise OSError(28, "No space left on device")
        return write(state, about)

    monkeypatch.setattr(run.resumable.folder, "write", full)
    with caplog.at_level(logging.WARNING):
        run.killed(Events.ITERATION_STARTED, 8)
    assert calls == [2, 4, 6]
    assert sum("No space left on device" in message for message in caplog.messages) == 2
    assert Run(tmp_path).go().losses[0][0] == 3


def test_a_full_disk_at_the_end_is_an_error_of_medclrs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, every_steps=0)

    def full(state: Any, about: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.resumable.folder, "write", full)
    with pytest.raises(MedclrError, match="full"):
        run.go()


def test_the_run_manifest_says_how_and_on_what_and_how_long(tmp_path: Path) -> None:
    Run(tmp_path).killed(Events.ITERATION_STARTED, 4)
    Run(tmp_path).go()
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["configuration"] == {"rate": 0.01, "max_epochs": 3}
    assert content["seed"] == 3
    assert content["datalist_digest"] == "rows"
    assert content["versions"]["torch"] == torch.__version__
    assert content["hardware"]["cores"] == os.cpu_count()
    assert content["git"]["medclr"] == commit_of(Path(medclr.__file__).parent)
    assert content["command"]
    assert [(a["from_step"], a["to_step"], a["outcome"]) for a in content["attempts"]] == [
        (0, 2, "killed"),
        (2, 15, "completed"),
    ]
    assert content["wall_s"] >= 0


@pytest.mark.parametrize("settings", [{"resume": "maybe"}, {"every_steps": -1}, {"every_minutes": -0.5}, {"keep": 0}])
def test_unusable_settings_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Run(tmp_path, **settings)


def test_a_checkpoint_is_written_after_minutes_too(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=0, every_minutes=1e-9).killed(Events.ITERATION_STARTED, 4)
    assert run.resumable.folder.names()[0].endswith("step_3")


def test_files_are_bounded(tmp_path: Path) -> None:
    Run(tmp_path, every_steps=1, keep=3).go()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6


def test_being_killed_is_no_error_that_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=0)
    run.trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda engine: _die(engine.state.iteration == 5))
    with pytest.raises(Killed):
        run.go()
    assert run.resumable.folder.names() == []


def _die(now: bool) -> None:
    if now:
        raise Killed
