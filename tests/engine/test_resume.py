from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events

import medclr
from medclr.engine import STOPPED_EXIT_CODE, NonFiniteGuard
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


def again(folder: Path, **settings: Any) -> Run:
    """The run once more, from other weights and numbers: all that it needs is in the checkpoint."""
    run = Run(folder, seed=99, **settings)
    run.record.seed = 3
    return run


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
    resumed = again(tmp_path).go()
    assert [number for number, _ in resumed.losses] == list(range(step + 1, STEPS + 1))
    assert same(resumed.final(), uninterrupted[False])


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.resumable.signals.grace = -1.0

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
    resumed = again(tmp_path).go()
    assert resumed.losses[0][0] == A_EPOCH + 1
    assert same(resumed.final(), uninterrupted[False])


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
    assert forced.scheduler.base_lrs == [settings.get("rate", 0.01)]
    assert forced.optimizer.param_groups[0]["initial_lr"] == settings.get("rate", 0.01)
    assert any(line in message for message in caplog.messages)


@pytest.mark.parametrize(
    "configuration",
    [
        {"num_workers": 4},
        {"device": "cuda:1"},
        {"output_dir": "elsewhere"},
        {"train": {"dataloader": {"num_workers": 3}, "handlers": [{"_target_": "monai.handlers.StatsHandler"}]}},
        {"log_interval": 5, "checkpoint_minutes": 1, "resume": "auto"},
    ],
)
def test_what_does_not_change_the_weights_may_change(tmp_path: Path, configuration: dict[str, Any]) -> None:
    Run(tmp_path).killed(Events.ITERATION_STARTED, 4)
    assert Run(tmp_path, configuration=configuration).go().losses[0][0] == 3


def test_a_handler_that_may_change_the_training_is_part_of_the_configuration(tmp_path: Path) -> None:
    def with_handlers(*names: str) -> dict[str, Any]:
        return {"train": {"handlers": [{"_target_": f"medclr.engine.{name}"} for name in names]}}

    Run(tmp_path, configuration=with_handlers("StepSchedule", "Progress")).killed(Events.ITERATION_STARTED, 4)
    with pytest.raises(ConfigError, match="handlers::0::_target_"):
        Run(tmp_path, configuration=with_handlers("Progress")).go()
    Run(tmp_path, configuration=with_handlers("Advice", "StepSchedule")).go()


def test_fewer_epochs_are_refused_and_fewer_than_are_done_even_by_force(tmp_path: Path) -> None:
    Run(tmp_path).killed(Events.ITERATION_STARTED, 10)
    with pytest.raises(ConfigError, match="max_epochs: 3 -> 2"):
        Run(tmp_path, epochs=2).go()
    with pytest.raises(ConfigError, match="further than it is asked"):
        Run(tmp_path, epochs=1, resume="force").go()
    assert Run(tmp_path, epochs=2, resume="force").go().losses[-1][0] == 2 * A_EPOCH


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
        lambda optimizer, total: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total + 1),
        lambda optimizer, total: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 3),
            ],
            [3],
        ),
    ],
)
def test_any_schedule_follows_the_new_length_of_a_run(tmp_path: Path, schedule: Any) -> None:
    Run(tmp_path, schedule=schedule).go()
    longer = Run(tmp_path, schedule=schedule, epochs=EPOCHS + 2)
    rates: list[float] = []
    longer.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: rates.extend(longer.scheduler.get_last_lr()))
    longer.go()
    whole = Run(tmp_path / "whole", schedule=schedule, epochs=EPOCHS + 2)
    expected: list[float] = []
    whole.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: expected.extend(whole.scheduler.get_last_lr()))
    whole.go()
    assert rates == pytest.approx(expected[STEPS:])


def test_what_a_new_guard_remembers_need_not_be_in_the_checkpoint(tmp_path: Path) -> None:
    Run(tmp_path).killed(Events.ITERATION_STARTED, 4)
    resumed = Run(tmp_path)
    NonFiniteGuard().attach(resumed.trainer)
    assert resumed.go().trainer.state.skipped_steps == []


def test_two_processes_do_not_run_in_one_folder(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom medclr.disk import claimed\n"
        "with claimed(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "checkpoints" / ".lock")], stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    try:
        with pytest.raises(ConfigError, match="Another process runs") as refused:
            Run(tmp_path).go()
        assert str(other.pid) in str(refused.value)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert Run(tmp_path).go().trainer.state.iteration == STEPS


def test_a_signal_while_the_last_files_are_written_leaves_what_comes_next_for_later(
    uninterrupted: dict[bool, dict[str, Any]], tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.trainer.add_event_handler(Events.COMPLETED, lambda engine: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        run.go()
    assert ended.value.code == STOPPED_EXIT_CODE
    assert same(run.final(), uninterrupted[False])
    run.evaluator.run()
    assert run.evaluator.state.iteration == 3, "a later evaluation is not broken off"
    assert Run(tmp_path).go().losses == []


def test_what_no_checkpoint_can_hold_is_noticed_at_the_first_one(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"value": np.float64(1)}

    run = Run(tmp_path)
    run.resumable.state.items["odd"] = Odd()
    with pytest.raises(MedclrError, match="is damaged"):
        run.go()


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = Run(tmp_path).killed(Events.ITERATION_STARTED, 6)
    before = killed.resumable.folder.names()

    def stale(*values: Any, **settings: Any) -> Any:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("torch.load", stale)
    with pytest.raises(OSError, match="Stale"):
        Run(tmp_path).go()
    monkeypatch.undo()
    assert killed.resumable.folder.names() == before


def test_how_an_earlier_attempt_ended_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.add_event_handler(Events.ITERATION_STARTED(once=6), lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.go()
    Run(tmp_path).go()
    attempts = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert [(a["to_step"], a["outcome"]) for a in attempts] == [(5, "failed: ZeroDivisionError"), (15, "completed")]


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
    assert len(list((tmp_path / "checkpoints").glob("*_step_*"))) == 6


def test_being_killed_is_no_error_that_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=0)
    run.trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda engine: _die(engine.state.iteration == 5))
    with pytest.raises(Killed):
        run.go()
    assert run.resumable.folder.names() == []


def _die(now: bool) -> None:
    if now:
        raise Killed
