from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.handlers import TensorBoardStatsHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from medclr.engine import Curves

broken_thread = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def points(folder: Path, tag: str = "loss") -> list[tuple[int, float]]:
    """All points of a curve that TensorBoard shows."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def training(curves: Curves, value: float = 1.0) -> Engine:
    """An engine that writes one point a step."""
    engine = Engine(lambda engine, batch: curves.add_scalar("loss", value, engine.state.iteration))
    curves.attach(engine)
    return engine


def in_the_next_second() -> None:
    """TensorBoard reads files in the order of their names, which hold the second that they were opened in."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


# Writing


def test_there_is_no_file_until_something_is_written(tmp_path: Path) -> None:
    curves = Curves(tmp_path / "tensorboard")
    curves.attach(Engine(lambda engine, batch: None))
    curves.flush()
    curves.close()
    assert list(tmp_path.iterdir()) == []
    curves.add_scalar("loss", 0.5, 3)
    curves.flush()
    assert points(tmp_path / "tensorboard") == [(3, 0.5)]
    curves.close()


def test_all_that_log_share_one_file_which_is_closed_at_the_end(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    engine = training(curves)
    evaluator = Engine(lambda engine, batch: curves.add_scalar("dice", 0.5, batch))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([engine.state.iteration]))
    threads = threading.active_count()
    engine.run(range(3), max_epochs=4)
    assert len(files(tmp_path)) == 1
    assert [step for step, _ in points(tmp_path)] == list(range(1, 13))
    assert [step for step, _ in points(tmp_path, "dice")] == [3, 6, 9, 12]
    assert threading.active_count() == threads


def test_an_epoch_is_on_the_disk_once_it_is_done(tmp_path: Path) -> None:
    engine = training(Curves(tmp_path))
    seen: list[int] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(len(points(tmp_path))))
    engine.run(range(3), max_epochs=2)
    assert seen == [3, 6]


@pytest.mark.parametrize("skip_completed", [False, True])
def test_the_file_is_closed_when_a_run_is_stopped(skip_completed: bool, tmp_path: Path) -> None:
    engine = training(Curves(tmp_path))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate(skip_completed))
    threads = threading.active_count()
    engine.run(range(9), max_epochs=1)
    assert [step for step, _ in points(tmp_path)] == [1, 2]
    assert threading.active_count() == threads


def test_an_exception_of_the_run_reaches_those_who_wait_for_it(tmp_path: Path) -> None:
    curves = Curves(tmp_path)

    def fail(engine: Engine, batch: Any) -> None:
        raise KeyError("a mistake")

    engine = Engine(fail)
    curves.attach(engine)
    with pytest.raises(KeyError, match="a mistake"):
        engine.run([0], max_epochs=1)


def test_it_opens_another_file_after_it_was_closed(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    curves.add_scalar("loss", 1.0, 1)
    curves.close()
    in_the_next_second()
    curves.add_scalar("loss", 2.0, 2)
    curves.close()
    curves.close()
    assert points(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_it_takes_the_place_of_monais_writer(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    engine = Engine(lambda engine, batch: {"loss": float(batch)})
    TensorBoardStatsHandler(curves, output_transform=lambda output: output).attach(engine)  # type: ignore[arg-type]
    curves.attach(engine)
    engine.run([3.0, 4.0], max_epochs=1)
    assert points(tmp_path) == [(1, 3.0), (2, 4.0)]


def test_whatever_a_writer_can_add_can_be_added(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    curves.add_image("picture", torch.zeros(1, 4, 4), 5)
    curves.add_text("note", "text", global_step=6)
    curves.add_histogram("weights", torch.arange(5.0), 7)
    curves.close()
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert (tags["images"], tags["tensors"], tags["histograms"]) == (["picture"], ["note/text_summary"], ["weights"])
    for name in ("add_nothing", "purge", "__deepcopy__"):
        assert not hasattr(curves, name)


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclr.distributed.rank", lambda: 1)
    training(Curves(tmp_path / "tensorboard")).run(range(3), max_epochs=2)
    assert list(tmp_path.iterdir()) == []


# Resuming


def test_of_a_resumed_run_each_step_is_shown_once(tmp_path: Path) -> None:
    training(Curves(tmp_path), value=1.0).run(range(4), max_epochs=2)  # was killed after step 8
    in_the_next_second()
    again = Curves(tmp_path)
    resumed = training(again, value=2.0)
    resumed.load_state_dict({"iteration": 5, "epoch_length": 4, "max_epochs": 3})
    again.add_scalar("loss", 3.0, 5)  # by a validation, before training starts
    resumed.run(range(4))
    first, rest = points(tmp_path)[:5], points(tmp_path)[5:]
    assert first == [(step, 1.0) for step in range(1, 6)]
    assert rest == [(5, 3.0), *((step, 2.0) for step in range(6, 13))]


def test_a_run_from_the_start_hides_nothing(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    curves.add_scalar("dice", 0.1, 0)  # by a validation of the untrained network
    training(curves).run(range(2), max_epochs=1)
    assert points(tmp_path, "dice") == [(0, pytest.approx(0.1))]
    assert len(files(tmp_path)) == 1


# A disk that fails


class FailingDisk:
    """From a moment on, nothing can be written any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, by: Exception | None = None) -> None:
        self.full, self.writes = False, 0
        original = RecordWriter.write

        def write(writer: RecordWriter, data: bytes) -> None:
            self.writes += 1
            if self.full:
                raise by or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(writer, data)

        monkeypatch.setattr(RecordWriter, "write", write)


@pytest.mark.timeout(60)
@broken_thread
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError("No space left on device, as TensorFlow says it")], ids=str)
def test_a_full_disk_ends_the_curves_and_not_the_run(
    flush: bool, error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    disk, curves = FailingDisk(monkeypatch, by=error), Curves(tmp_path)
    engine = training(curves)
    threads = threading.active_count()

    @engine.on(Events.ITERATION_COMPLETED)
    def _step() -> None:
        if flush:
            curves.flush()
        disk.full = engine.state.iteration >= 4

    with caplog.at_level(logging.WARNING):
        engine.run(range(50), max_epochs=4)
    assert engine.state.iteration == 200
    (message,) = [record.getMessage() for record in caplog.records if record.name == "medclr.engine.curves"]
    assert message.startswith("TensorBoard curves stop at step ")
    assert message.endswith("the training goes on")
    assert "No space left on device" in message
    assert not flush or "at step 5:" in message
    assert threading.active_count() == threads  # none is left running
    writes = disk.writes
    curves.add_scalar("loss", 1.0, 201)
    curves.flush()
    curves.close()
    assert disk.writes == writes


@pytest.mark.timeout(60)
@broken_thread
@pytest.mark.parametrize("method", ["add_scalar", "flush", "close"])
def test_no_call_hangs_or_fails_after_the_thread_that_writes_has_died(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    disk, curves, threads = FailingDisk(monkeypatch), Curves(tmp_path), threading.active_count()
    curves.add_scalar("loss", 1.0, 1)
    curves.flush()
    assert threading.active_count() == threads + 1
    disk.full = True
    curves.add_scalar("loss", 1.0, 2)
    while threading.active_count() > threads:
        time.sleep(0.01)
    getattr(curves, method)(*(("loss", 1.0, 3) if method == "add_scalar" else ()))
    assert sum("curves stop at step" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("value", [torch.zeros(3), "text"], ids=str)
def test_a_mistake_of_the_caller_is_raised(value: Any, tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    with pytest.raises((ValueError, AssertionError, NotImplementedError)):  # as torch likes it
        curves.add_scalar("loss", value, 1)
    curves.add_scalar("loss", 1.0, 2)
    curves.close()
    assert points(tmp_path) == [(2, 1.0)]


def test_a_folder_that_cannot_be_made_ends_the_curves_and_not_the_run(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").touch()
    training(Curves(tmp_path / "file" / "tensorboard")).run(range(3), max_epochs=2)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "medclr.engine.curves"]
    assert "curves stop at step 1: Not a directory" in message


_LIMITED = """
import logging, resource, signal, sys
from ignite.engine import Engine
from medclr.engine import Curves
logging.basicConfig(level=logging.WARNING)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
curves = Curves(sys.argv[1])
def step(engine, batch):
    curves.add_scalar("loss", 1.0, engine.state.iteration)
    curves.flush()
engine = Engine(step)
curves.attach(engine)
engine.run(range(500), max_epochs=2)
print("steps", engine.state.iteration)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="limits the size of files")
def test_a_file_that_the_system_lets_grow_no_further_ends_no_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=240, check=True
    )
    assert "steps 1000" in done.stdout
    assert done.stderr.count("curves stop at step") == 1
    assert "File too large" in done.stderr
    assert len(points(tmp_path)) > 20


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.timeout(120)
@broken_thread
def test_a_disk_that_is_really_full_ends_no_run(small_disk: Path, caplog: Any) -> None:
    engine = training(Curves(small_disk))
    engine.run(range(500), max_epochs=6)
    assert engine.state.iteration == 3000
    (message,) = [record.getMessage() for record in caplog.records if record.name == "medclr.engine.curves"]
    assert "No space left on device" in message
    assert len(points(small_disk)) > 100
