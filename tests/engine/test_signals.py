from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from medclr.engine.signals import SIGNALS, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_the_handlers_come_back(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert "stops after this step" in capfd.readouterr().err


def test_a_second_signal_does_what_it_always_does() -> None:
    with StopSignals(grace=-1.0) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_two_signals_at_once_count_as_one() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGTERM


def test_a_forked_process_leaves_it_to_its_parent(tmp_path: Path) -> None:
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            (tmp_path / "alive").write_text(str(signals.received))
            os._exit(0)
        os.waitpid(child, 0)
    assert (tmp_path / "alive").read_text() == "None"
    assert signals.received is None


def test_in_another_thread_nothing_is_done() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
