from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor

from medclr import keys
from medclr.engine import CollapseGuard, ContrastiveTrainer, NonFiniteGuard
from medclr.errors import ConfigError, MedclrError
from medclr.models import Projector
from tests.engine.test_trainer import Counting, method_of, trainer_of


class Exploding(Counting):
    """Its loss is infinite from the third step on."""

    def contrast(self, embeddings: Any, meta: Any) -> dict[str, Tensor]:
        results = super().contrast(embeddings, meta)
        return {**results, keys.LOSS: results[keys.LOSS] / (0.0 if len(self.progress) >= 2 else 1.0)}


def collapsed(method: Counting) -> Counting:
    """All embeddings are one: the last layer knows its bias alone."""
    last = method.projector.layers[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.ones_(last.bias)
    return method


def run(method: Counting, guard: Any, epochs: int = 4, rate: float = 0.0) -> ContrastiveTrainer:
    trainer = trainer_of(method, max_epochs=epochs, optimizer=torch.optim.SGD(method.parameters(), lr=rate))
    guard.attach(trainer)
    trainer.run()
    return trainer


def test_a_loss_that_is_no_number_stops_the_run_before_it_reaches_the_weights() -> None:
    template = method_of()
    method = Exploding(template.encoder, template.projector)
    before: dict[str, Tensor] = {}
    trainer = trainer_of(method)
    NonFiniteGuard().attach(trainer)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda _: before.update({k: v.clone() for k, v in method.state_dict().items()})
    )
    with pytest.raises(MedclrError, match="no number") as caught:
        trainer.run()
    assert "inf at step 3" in str(caught.value)
    assert "learning_rate" in caught.value.fix
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


def test_a_real_run_with_an_absurd_learning_rate_ends_in_the_guard() -> None:
    with pytest.raises(MedclrError, match="no number"):
        run(method_of(), NonFiniteGuard(), epochs=40, rate=1e30)


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
    trainer = trainer_of(method, max_epochs=4, optimizer=torch.optim.SGD(method.parameters(), lr=0.0))
    CollapseGuard(interval=1, window=3, after=0).attach(trainer)
    trainer.add_event_handler(
        Events.ITERATION_STARTED,
        lambda engine: method.projector.load_state_dict(healthy if engine.state.iteration % 3 == 0 else sick),
    )
    trainer.run()


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
