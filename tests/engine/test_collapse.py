from __future__ import annotations

import io
import logging
from typing import Any

import pytest
import torch
from ignite.engine import Events

from medclr.engine import CollapseGuard, ContrastiveTrainer, NonFiniteGuard
from medclr.errors import ConfigError, MedclrError
from medclr.models import Projector
from tests.engine.test_trainer import Counting, method_of, trainer_of


def collapsed(method: Counting) -> Counting:
    """All embeddings are one: the last layer knows its bias alone."""
    last = method.projector.layers[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.ones_(last.bias)
    return method


def guarded(method: Counting, guard: CollapseGuard, epochs: int = 4) -> ContrastiveTrainer:
    trainer = trainer_of(method, max_epochs=epochs, optimizer=torch.optim.SGD(method.parameters(), lr=0.0))
    guard.attach(trainer)
    return trainer


def run(method: Counting, guard: CollapseGuard, epochs: int = 4) -> ContrastiveTrainer:
    trainer = guarded(method, guard, epochs)
    trainer.run()
    return trainer


def test_a_collapsed_run_is_stopped_after_one_window_and_says_what_to_change() -> None:
    guard = CollapseGuard(interval=1, window=3, after=2)
    method = collapsed(method_of())
    with pytest.raises(MedclrError, match="collapsed") as caught:
        run(method, guard)
    assert len(method.progress) == 5  # two steps of grace, then a window of three
    message = str(caught.value)
    assert "over 3 steps" in message
    assert "loss 1.946, plateau 1.946" in message  # ln 7
    assert "learning_rate" in message


def test_a_collapsed_run_may_go_on_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    method = collapsed(method_of())
    with caplog.at_level(logging.WARNING):
        run(method, CollapseGuard(interval=1, window=2, after=0, action="warn"))
    assert len(method.progress) == 12
    assert sum("collapsed" in message for message in caplog.messages) == 1


def test_embeddings_on_a_line_have_collapsed_though_they_are_spread() -> None:
    method = method_of()
    last = method.projector.layers[-1]
    with torch.no_grad():
        last.weight.copy_(torch.ones(len(last.weight), 1) * last.weight[:1])
        last.bias.zero_()
    with pytest.raises(MedclrError, match="effective rank"):
        run(method, CollapseGuard(interval=1, window=2, after=0))


def test_a_healthy_run_is_left_alone_and_so_is_one_healthy_measurement_in_a_window() -> None:
    run(method_of(), CollapseGuard(interval=1, window=2, after=0))
    method = collapsed(method_of())
    healthy = {name: value.clone() for name, value in method_of().projector.state_dict().items()}
    sick = {name: value.clone() for name, value in method.projector.state_dict().items()}
    trainer = guarded(method, CollapseGuard(interval=1, window=3, after=0))
    trainer.add_event_handler(
        Events.ITERATION_STARTED,
        lambda engine: method.projector.load_state_dict(healthy if engine.state.iteration % 3 == 0 else sick),
    )
    trainer.run()


def test_projections_that_are_no_numbers_are_not_measured() -> None:
    method = method_of()
    with torch.no_grad():
        method.projector.layers[-1].bias.fill_(float("nan"))
    trainer = run(method, CollapseGuard(interval=1, window=2, after=0))
    assert trainer.state.collapse_window == []


def stopped_and_resumed(method: Counting, guard: CollapseGuard, first_epochs: int) -> ContrastiveTrainer:
    """A run that goes on in another process, as far as its state goes."""
    state = run(method, guard, first_epochs).state_dict()
    file = io.BytesIO()
    torch.save({**state, "max_epochs": 4}, file)
    file.seek(0)
    again = CollapseGuard(interval=1, window=guard.window, after=guard.after, action=guard.action)
    trainer = guarded(method, again)
    trainer.load_state_dict(torch.load(file, weights_only=True))
    return trainer


def test_a_resumed_run_goes_on_with_the_window_that_it_had() -> None:
    method = collapsed(method_of())
    trainer = stopped_and_resumed(method, CollapseGuard(interval=1, window=5, after=0), 1)
    assert trainer.state.iteration == len(trainer.state.collapse_window) == 3
    with pytest.raises(MedclrError, match="over 5 steps"):
        trainer.run()
    assert trainer.state.iteration == 5


def test_a_resumed_run_does_not_warn_again(caplog: pytest.LogCaptureFixture) -> None:
    method = collapsed(method_of())
    with caplog.at_level(logging.WARNING):
        stopped_and_resumed(method, CollapseGuard(interval=1, window=2, after=0, action="warn"), 2).run()
    assert sum("collapsed" in message for message in caplog.messages) == 1


def test_a_second_run_from_the_start_forgets_the_first() -> None:
    trainer = run(collapsed(method_of()), CollapseGuard(interval=1, window=5, after=0), epochs=1)
    assert len(trainer.state.collapse_window) == 3
    trainer.run()
    assert len(trainer.state.collapse_window) == 3


def test_a_learning_rate_that_destroys_the_network_is_noticed_on_a_real_run() -> None:
    method = method_of()
    method.projector = Projector(method.encoder.out_features, out_features=8, norm="none")
    trainer = trainer_of(method, max_epochs=30, optimizer=torch.optim.SGD(method.parameters(), lr=100.0))
    NonFiniteGuard().attach(trainer)
    CollapseGuard(interval=1, window=5, after=5).attach(trainer)
    with pytest.raises(MedclrError, match=r"collapsed|no number"):
        trainer.run()


@pytest.mark.parametrize("settings", [{"interval": 0}, {"window": 0}, {"after": -1}, {"action": "shout"}])
def test_unusable_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="collapse guard"):
        CollapseGuard(**settings)
