"""The guard against embeddings that have collapsed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys
from torch import Tensor

from medclr import distributed, keys
from medclr.engine.guards import remember
from medclr.engine.metrics import dimension_std, effective_rank
from medclr.errors import ConfigError, MedclrError

logger = logging.getLogger(__name__)


class CollapseGuard:
    """Notice embeddings that have collapsed to a point or a line, which a loss alone does not show.

    Every ``interval`` steps the batch's projections are measured. They have collapsed where, over a whole window of
    measurements, the standard deviation of a dimension stays below ``min_std`` (1 if spread evenly, arXiv:2011.10566)
    or the effective rank below ``min_rank`` (arXiv:2210.02885). Loss and plateau are reported beside it, as support.
    Projections that are no numbers are :class:`~medclr.engine.NonFiniteGuard`'s matter, and not measured.

    The window, and whether it was warned of, are kept in ``engine.state``, and travel with its state dict.

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
        self.interval, self.window, self.after, self.action = interval, window, after, action
        self.min_std, self.min_rank = min_std, min_rank

    def attach(self, engine: Engine) -> None:
        """Measure every few steps."""
        remember(engine, collapse_window=[], collapse_warned=False)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.check)

    def check(self, engine: Engine) -> None:
        """Measure the projections of this step, and judge the window."""
        projections = projections_of(engine.state.output)
        if projections is None or engine.state.iteration <= self.after or engine.state.collapse_warned:
            return
        z = projections.detach().float().flatten(0, 1)
        measured = [dimension_std(z), effective_rank(z)]
        if all(map(math.isfinite, measured)):
            engine.state.collapse_window = [*engine.state.collapse_window, measured][-self.window :]
        window = engine.state.collapse_window
        highest_std, highest_rank = (max(column) for column in zip(*(window or [[math.inf] * 2]), strict=True))
        collapsed = len(window) == self.window and (highest_std < self.min_std or highest_rank < self.min_rank)
        # All ranks stop together: one that went on alone would wait for the others.
        if not distributed.any_rank([collapsed], engine.state.device)[0]:
            return
        loss, plateau = (float(engine.state.output.get(name, float("nan"))) for name in (keys.LOSS, keys.PLATEAU))
        health = (
            f"a dimension's standard deviation of at most {highest_std:.3g}, an effective rank of {highest_rank:.3g}"
        )
        error = MedclrError(
            "The embeddings have collapsed.",
            got=f"over {len(window) * self.interval} steps {health}; loss {loss:.3f}, plateau {plateau:.3f}",
            wanted=f"at least {self.min_std:g} and {self.min_rank:g}",
            fix="Lower learning_rate, raise warmup or batch_size; where neither a queue nor chunk_size is set, keep "
            "head_norm: batch.",
        )
        if self.action == "stop":
            raise error
        engine.state.collapse_warned = True
        logger.warning(str(error))


def projections_of(output: Any) -> Tensor | None:
    """The projections (B, 2, D) in an engine's output, or None where a method has none."""
    embeddings = output.get(CommonKeys.PRED) if isinstance(output, Mapping) else None
    return embeddings.get(keys.PROJECTIONS) if isinstance(embeddings, Mapping) else None
