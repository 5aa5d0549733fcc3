"""Guards: they watch a run, and stop it or warn, with the reason and the setting to change."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

from medclr import keys
from medclr.engine.metrics import dimension_std, effective_rank
from medclr.errors import ConfigError, MedclrError

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Stop a run at the first loss that is NaN or infinite, before its gradient reaches the weights.

    On a GPU this waits for the loss of each step, which costs little beside a 3D convolution.
    """

    def attach(self, engine: Engine) -> None:
        """Look at each loss, before the backward pass."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.check)

    def check(self, engine: Engine) -> None:
        """Raise :class:`MedclrError` for a loss that is no number."""
        loss = engine.state.output[CommonKeys.LOSS]
        if not bool(loss.isfinite().all()):
            raise MedclrError(
                "The loss is no number.",
                got=f"{float(loss):g} at step {engine.state.iteration}",
                wanted="a finite loss; the weights are still those of the step before",
                fix="Lower learning_rate, raise warmup, or set precision: fp32.",
            )


class CollapseGuard:
    """Notice embeddings that have collapsed to a point or a line, which a loss alone does not show.

    Every ``interval`` steps the batch's projections are measured. They have collapsed where, over a whole window of
    measurements, the standard deviation of a dimension stays below ``min_std`` (1 if spread evenly, arXiv:2011.10566)
    or the effective rank below ``min_rank`` (arXiv:2210.02885). Loss and plateau are reported beside it, as support.

    Args:
        interval: steps between two measurements.
        window: measurements that must agree.
        min_std: smallest healthy mean standard deviation of a dimension, of 1.
        min_rank: smallest healthy effective rank.
        after: steps before the first measurement: fresh projections may be close to each other without a collapse.
        action: ``stop`` raises an error, ``warn`` writes to the log once.

    Raises:
        ConfigError: for settings below 1, or another action.
    """

    def __init__(
        self,
        *,
        interval: int = 10,
        window: int = 10,
        min_std: float = 0.05,
        min_rank: float = 1.5,
        after: int = 100,
        action: Literal["stop", "warn"] = "stop",
    ) -> None:
        if interval < 1 or window < 1 or after < 0 or action not in ("stop", "warn"):
            raise ConfigError(
                "The collapse guard is unusable.",
                got=f"interval {interval}, window {window}, after {after}, action {action!r}",
                wanted="interval and window >= 1, after >= 0, action stop or warn",
                fix="For example interval: 10, window: 10, action: stop.",
            )
        self.interval, self.after, self.action = interval, after, action
        self.min_std, self.min_rank = min_std, min_rank
        self.measured: deque[tuple[float, float]] = deque(maxlen=window)
        self.warned = False

    def attach(self, engine: Engine) -> None:
        """Measure every few steps."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.check)

    def check(self, engine: Engine) -> None:
        """Measure the projections of this step, and judge the window."""
        projections = projections_of(engine.state.output)
        if projections is None or engine.state.iteration <= self.after or self.warned:
            return
        z = projections.detach().float().flatten(0, 1)
        self.measured.append((dimension_std(z), effective_rank(z)))
        if len(self.measured) < (self.measured.maxlen or 1):
            return
        highest_std, highest_rank = (max(column) for column in zip(*self.measured, strict=True))
        if highest_std >= self.min_std and highest_rank >= self.min_rank:
            return
        loss, plateau = (float(engine.state.output.get(name, float("nan"))) for name in (keys.LOSS, keys.PLATEAU))
        health = (
            f"a dimension's standard deviation of at most {highest_std:.3g}, an effective rank of {highest_rank:.3g}"
        )
        error = MedclrError(
            "The embeddings have collapsed.",
            got=f"over {len(self.measured) * self.interval} steps {health}; loss {loss:.3f}, plateau {plateau:.3f}",
            wanted=f"at least {self.min_std:g} and {self.min_rank:g}",
            fix="Lower learning_rate, raise warmup, keep norm: batch in the projector, or raise batch_size.",
        )
        if self.action == "stop":
            raise error
        self.warned = True
        logger.warning(str(error))


def projections_of(output: Any) -> Tensor | None:
    """The projections (B, 2, D) in an engine's output, or None where a method has none."""
    embeddings = output.get(CommonKeys.PRED) if isinstance(output, Mapping) else None
    return embeddings.get(keys.PROJECTIONS) if isinstance(embeddings, Mapping) else None
